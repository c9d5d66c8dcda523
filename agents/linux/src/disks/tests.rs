//! Disk discovery on fixture trees of sysfs.

use super::*;
use std::collections::HashMap;

/// A made-up host in a directory.
struct Host {
    dir: tempfile::TempDir,
    heads: HashMap<String, Vec<u8>>,
    minor: u32,
    mounts: String,
}

impl Host {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), heads: HashMap::new(), minor: 0, mounts: String::new() }
    }
    fn put(&self, path: &str, text: &str) {
        let path = self.dir.path().join("sys/block").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    fn dir(&self, path: &str) {
        fs::create_dir_all(self.dir.path().join("sys/block").join(path)).unwrap();
    }
    fn device(&mut self, path: &str, sectors: u64) -> String {
        self.minor += 1;
        self.put(&format!("{path}/dev"), &format!("8:{}\n", self.minor));
        self.put(&format!("{path}/size"), &format!("{sectors}\n"));
        format!("8:{}", self.minor)
    }
    fn disk(&mut self, name: &str, sectors: u64) -> String {
        self.dir(&format!("{name}/mq/0"));
        self.put(&format!("{name}/serial"), &format!("S-{name}\n"));
        self.device(name, sectors)
    }
    fn partition(&mut self, disk: &str, name: &str, start: u64, sectors: u64) -> String {
        self.put(&format!("{disk}/{name}/partition"), "1\n");
        self.put(&format!("{disk}/{name}/start"), &format!("{start}\n"));
        self.device(&format!("{disk}/{name}"), sectors)
    }
    /// `path` is where the lower one lies in sysfs.
    fn stack(&self, lower: &str, upper: &str) {
        self.dir(&format!("{lower}/holders/{upper}"));
        self.dir(&format!("{upper}/slaves/{}", lower.rsplit('/').next().unwrap()));
    }
    fn dm(&mut self, name: &str, dm_name: &str, uuid: &str, sectors: u64) -> String {
        self.put(&format!("{name}/dm/name"), dm_name);
        self.put(&format!("{name}/dm/uuid"), uuid);
        self.device(name, sectors)
    }
    fn mount(&mut self, number: &str, at: &str, kind: &str, source: &str) {
        self.mounts.push_str(&format!("30 1 {number} / {at} rw,relatime shared:1 - {kind} {source} rw\n"));
    }
    fn read(&self) -> Disks {
        let root = self.dir.path();
        fs::create_dir_all(root.join("proc/self")).unwrap();
        fs::write(root.join("proc/self/mountinfo"), &self.mounts).unwrap();
        let roots = Roots { sys: root.join("sys"), proc: root.join("proc"), dev: root.join("dev") };
        let heads = self.heads.clone();
        Disks::discover(&roots, &move |p| heads.get(p.file_name()?.to_str()?).cloned()).unwrap()
    }
}

fn leaves(disks: &Disks, choices: &[&str]) -> Vec<(String, u64, u64)> {
    let choices: Vec<String> = choices.iter().map(|c| (*c).to_owned()).collect();
    disks
        .resolve(&choices)
        .unwrap()
        .leaves
        .into_iter()
        .map(|l| (l.volume, l.range.start(), l.range.sectors.0))
        .collect()
}

fn btrfs(devices: u64) -> Vec<u8> {
    let mut head = vec![0; probe::PROBE_BYTES];
    head[65600..65608].copy_from_slice(b"_BHRfS_M");
    head[65568..65584].fill(7);
    head[65536 + 0x88..65536 + 0x90].copy_from_slice(&devices.to_le_bytes());
    head
}

#[test]
fn a_disk_and_a_partition_are_leaves_of_their_own() {
    let mut host = Host::new();
    host.disk("sda", 1000);
    let part = host.partition("sda", "sda1", 100, 200);
    host.partition("sda", "sda2", 300, 400);
    host.mount(&part, "/srv/a\\040b", "ext4", "/dev/sda1");
    let disks = host.read();
    assert_eq!(leaves(&disks, &["sda"]), [("sda".to_owned(), 0, 1000)]);
    assert_eq!(leaves(&disks, &["/dev/sda2"]), [("sda2".to_owned(), 300, 400)]);
    assert_eq!(leaves(&disks, &["/srv/a b"]), [("sda1".to_owned(), 100, 200)]);
    assert_eq!(leaves(&disks, &["sda1", "sda"]), [("sda".to_owned(), 0, 1000)], "the whole disk has its partition");
    assert_eq!(disks.mounts_above("sda"), ["/srv/a b"]);
    let text = disks.to_string();
    assert!(text.contains("sda") && text.contains("  sda1") && text.contains("/srv/a b"), "{text}");
    assert!(matches!(disks.resolve(&["/nowhere".into()]), Err(DisksError::NotABlockDevice { .. })));
}

#[test]
fn a_logical_volume_takes_along_what_its_volume_group_lies_on() {
    let mut host = Host::new();
    host.disk("sda", 1000);
    host.partition("sda", "sda3", 500, 500);
    host.disk("sdb", 2000);
    host.disk("sdc", 3000);
    host.dm("dm-0", "vg-root", "LVM-abc", 400);
    host.dm("dm-1", "vg-data", "LVM-def", 400);
    host.dm("dm-2", "luks-x", "CRYPT-LUKS2-y", 400);
    // vg = sda3 + sdb; root lies on sda3 only, data on both, an encrypted volume on data.
    host.stack("sda/sda3", "dm-0");
    host.stack("sda/sda3", "dm-1");
    host.stack("sdb", "dm-1");
    host.stack("dm-1", "dm-2");
    host.mount("8:7", "/data", "xfs", "/dev/mapper/luks-x");
    let disks = host.read();
    let both = [("sda3".to_owned(), 500, 500), ("sdb".to_owned(), 0, 2000)];
    assert_eq!(leaves(&disks, &["/dev/mapper/vg-root"]), both);
    assert_eq!(leaves(&disks, &["dm-2"]), both);
    assert_eq!(leaves(&disks, &["sdb"]), both);
    assert_eq!(leaves(&disks, &["sdc"]), [("sdc".to_owned(), 0, 3000)]);
    let whole = [("sda".to_owned(), 0, 1000), ("sdb".to_owned(), 0, 2000)];
    assert_eq!(leaves(&disks, &["sda"]), whole);
    let said = disks.resolve(&["/dev/mapper/vg-root".into()]).unwrap().notes.join("\n");
    assert!(said.contains("/dev/mapper/vg-root lies on /dev/sda3"), "{said}");
    assert!(said.contains("/dev/sdb is taken along: /dev/mapper/vg-data lies on it too"), "{said}");
    assert_eq!(disks.mounts_above("sdb"), ["/data"]);
}

#[test]
fn where_bpf_is_refused_volumes_are_captured_and_not_what_they_lie_on() {
    let mut host = Host::new();
    host.disk("sda", 1000);
    host.dm("dm-0", "vg-data", "LVM-abc", 400);
    host.dm("dm-1", "vg-thin", "LVM-def", 400);
    host.stack("sda", "dm-0");
    host.stack("sda", "dm-1");
    let mut disks = host.read();
    assert_eq!(disks.why_mirrors(), None);
    let refused = BTreeMap::from([("dm-1".to_owned(), "its target keeps data of its own".to_owned())]);
    disks.mirrors = Some(Mirrors { why: "BPF is refused: lockdown".to_owned(), refused });
    assert_eq!(leaves(&disks, &["/dev/mapper/vg-data", "dm-0"]), [("dm-0".to_owned(), 0, 400)]);
    let leaf = &disks.resolve(&["dm-0".to_owned()]).unwrap().leaves[0];
    assert_eq!((leaf.backend, leaf.backend.name()), (Backend::DmMirrorAsync, "dm-mirror-async"));
    let no = |choice: &str| disks.resolve(&[choice.to_owned()]).unwrap_err().to_string();
    assert!(no("sda").contains("lockdown") && no("sda").contains("choose the volumes"), "{}", no("sda"));
    assert!(no("dm-1").contains("data of its own"), "{}", no("dm-1"));
    let value = disks.json();
    assert_eq!(value["at_mirrors"], "BPF is refused: lockdown");
    let of = |path: &str| value["devices"].as_array().unwrap().iter().find(|d| d["path"] == path).unwrap().clone();
    assert_eq!(of("/dev/mapper/vg-data")["captured_on"], serde_json::json!(["dm-0"]));
    assert!(of("/dev/sda")["refused"].as_str().unwrap().contains("lockdown"));
    let text = disks.to_string();
    assert!(text.contains("dm-mirror-async") && text.contains("BPF is refused: lockdown"), "{text}");
}

#[test]
fn an_array_takes_along_its_members() {
    let mut host = Host::new();
    host.disk("sda", 1000);
    host.disk("sdb", 1000);
    host.put("md0/md/level", "raid1\n");
    host.device("md0", 900);
    host.partition("md0", "md0p1", 10, 100);
    host.stack("sda", "md0");
    host.stack("sdb", "md0");
    let disks = host.read();
    let both = [("sda".to_owned(), 0, 1000), ("sdb".to_owned(), 0, 1000)];
    assert_eq!(leaves(&disks, &["md0"]), both);
    assert_eq!(leaves(&disks, &["md0p1"]), both);
    assert_eq!(leaves(&disks, &["sda"]), both);
}

#[test]
fn a_btrfs_takes_along_its_devices_and_misses_none() {
    let mut host = Host::new();
    for name in ["sda", "sdb"] {
        host.disk(name, 1000);
        host.heads.insert(name.to_owned(), btrfs(2));
    }
    host.mount("0:44", "/pool", "btrfs", "/dev/sdb");
    let disks = host.read();
    let both = [("sda".to_owned(), 0, 1000), ("sdb".to_owned(), 0, 1000)];
    assert_eq!(leaves(&disks, &["sda"]), both);
    assert_eq!(leaves(&disks, &["/pool"]), both);
    assert_eq!(disks.mounts_above("sda"), ["/pool"]);
    host.heads.insert("sda".to_owned(), btrfs(3));
    host.heads.insert("sdb".to_owned(), btrfs(3));
    assert!(matches!(host.read().resolve(&["sda".into()]), Err(DisksError::MissingMember { spans: 3, found: 2, .. })));
}

#[test]
fn what_has_no_queue_is_captured_at_its_bios_or_refused_with_a_sentence() {
    let mut host = Host::new();
    host.device("zram0", 1000);
    host.disk("sdz", 1000);
    host.put("sdz/queue/zoned", "host-managed\n");
    host.disk("sr0", 0);
    let pmem = host.device("pmem0", 1000);
    host.put("md0/md/level", "raid0\n");
    host.device("md0", 1000);
    host.device("zram1", 1000);
    host.stack("zram1", "md0");
    host.mounts.push_str(&format!("30 1 {pmem} / /fast rw,relatime shared:1 - ext4 /dev/pmem0 rw,dax=always\n"));
    let mut disks = host.read();
    let refused = |disks: &Disks, name: &str| disks.resolve(&[name.to_owned()]).unwrap_err();
    let error = refused(&disks, "zram0");
    assert!(matches!(error, DisksError::NoQueue { .. }) && error.to_string().contains("ingest target"), "{error}");
    assert!(matches!(refused(&disks, "sdz"), DisksError::Zoned { .. }));
    assert!(matches!(refused(&disks, "sr0"), DisksError::Empty { .. }));
    disks.bio = BioCapture::Works;
    assert_eq!(disks.resolve(&["zram0".to_owned()]).unwrap().leaves[0].backend, Backend::BpfBio);
    let error = refused(&disks, "pmem0").to_string();
    assert!(error.contains("/fast is mounted with DAX"), "{error}");
    let error = refused(&disks, "md0").to_string();
    assert!(error.contains("array md0"), "{error}");
}

/// File system → logical volume → volume group → LUKS → RAID → partitions → two disks, and a disk beside it.
fn tall() -> Disks {
    let mut host = Host::new();
    for disk in ["sda", "sdb"] {
        host.disk(disk, 1 << 21);
        host.partition(disk, &format!("{disk}1"), 2048, 1 << 20);
        host.stack(&format!("{disk}/{disk}1"), "md127");
    }
    host.put("sda/device/model", "Fast Disk\n");
    host.put("md127/md/level", "raid1\n");
    host.device("md127", 1 << 20);
    host.dm("dm-0", "safe", "CRYPT-LUKS2-0123-safe", (1 << 20) - 32768);
    host.stack("md127", "dm-0");
    let root = host.dm("dm-1", "vg--a-root", "LVM-aaaabbbb", 1 << 19);
    host.dm("dm-2", "vg--a-swap", "LVM-aaaacccc", 1 << 18);
    host.stack("dm-0", "dm-1");
    host.stack("dm-0", "dm-2");
    host.disk("sdc", 4096);
    host.mount(&root, "/", "xfs", "/dev/mapper/vg--a-root");
    let mut xfs = vec![0; probe::PROBE_BYTES];
    xfs[..4].copy_from_slice(b"XFSB");
    xfs[108..112].copy_from_slice(b"ROOT");
    host.heads.insert("dm-1".to_owned(), xfs);
    host.read()
}

#[test]
fn the_tree_shows_every_layer_once_under_its_disk() {
    let text = tall().to_string();
    let lines: Vec<&str> = text.lines().collect();
    let layers = [
        "sda ",
        "  sda1",
        "    md127",
        "      safe",
        "        vg-a",
        "          root",
        "          swap",
        "sdb ",
        "  sdb1",
        "    md127",
        "sdc ",
    ];
    for (line, layer) in lines.iter().zip(layers) {
        assert!(line.starts_with(layer), "{layer:?} expected in {line:?} of\n{text}");
    }
    assert!(lines[0].contains("(Fast Disk)") && lines[0].ends_with("bpf-rq"), "{text}");
    assert!(lines[2].contains("RAID array, raid1") && lines[3].contains("opened encrypted volume"), "{text}");
    assert!(lines[4].contains("LVM volume group"), "{text}");
    assert!(lines[5].contains("logical volume, xfs \"ROOT\"  /"), "{text}");
    assert!(text.contains("bpf-rq: every write, in one order over all disks"), "{text}");
}

#[test]
fn a_choice_says_what_it_lies_on_what_it_takes_along_and_what_it_costs() {
    let disks = tall();
    let stack = disks.stack_of(disks.find("/").unwrap());
    let expected = [
        "xfs at /",
        "logical volume /dev/mapper/vg--a-root",
        "LVM volume group vg-a",
        "opened encrypted volume /dev/mapper/safe",
        "RAID array, raid1 /dev/md127",
        "partition /dev/sda1 + partition /dev/sdb1",
        "disk /dev/sda + disk /dev/sdb",
    ];
    assert_eq!(stack, expected);
    let resolution = disks.resolve(&["/".to_owned()]).unwrap();
    let cost = Cost::of(&resolution, &disks, &crate::config::Config::default(), ByteLen(300 << 20));
    assert_eq!((cost.read, cost.network_max), (ByteLen(724 << 20), ByteLen(724 << 20)), "two partitions of half a GiB");
    assert!(cost.to_string().contains("and not 300"), "{cost}");
    assert_eq!(cost.dirty_map, ByteLen(2 * (512 << 10)), "one map for each disk");
    assert!(cost.to_string().contains("the first copy reads 724"), "{cost}");
    let value = disks.choice_json(&["/".to_owned()], &resolution);
    assert_eq!(value["volumes"].as_array().unwrap().len(), 2);
    assert_eq!(value["volumes"][0]["backend"], "bpf-rq");
    assert_eq!(value["choices"][0]["stack"][2], "LVM volume group vg-a");
}

#[test]
fn every_device_says_in_json_what_choosing_it_would_mean() {
    let value = tall().json();
    let of = |name: &str| {
        let all = value["devices"].as_array().unwrap();
        all.iter().find(|d| d["name"] == name).unwrap_or_else(|| panic!("{name} is missing in {value}")).clone()
    };
    let root = of("dm-1");
    assert_eq!((root["kind"].as_str(), root["volume_group"].as_str()), (Some("logical-volume"), Some("vg-a")));
    assert_eq!(root["captured_on"], serde_json::json!(["sda1", "sdb1"]));
    assert_eq!(root["takes_along"], serde_json::json!([]));
    assert_eq!((root["mounts"][0].as_str(), root["content"]["label"].as_str()), (Some("/"), Some("ROOT")));
    let member = of("sda1");
    assert_eq!(
        (member["captured_on"].clone(), member["takes_along"].clone()),
        (serde_json::json!(["sda1"]), serde_json::json!(["sdb1"]))
    );
    assert_eq!(of("md127")["raid_level"], "raid1");
    assert_eq!(of("sdc")["takes_along"], serde_json::json!([]));
    assert!(of("sdc")["promise"].as_str().unwrap().contains("one order"), "{value}");
}

#[test]
fn names_of_logical_volumes_are_taken_apart() {
    let table = [
        ("vg-root", Some(("vg", "root"))),
        ("my--vg-my--lv", Some(("my-vg", "my-lv"))),
        ("a--b--c-d", Some(("a-b-c", "d"))),
        ("plain", None),
        ("-x", None),
        ("x-", None),
        ("--", None),
        ("", None),
    ];
    for (name, want) in table {
        let want = want.map(|(g, v): (&str, &str)| (g.to_owned(), v.to_owned()));
        assert_eq!(tree::lvm_names(name), want, "{name}");
    }
}

#[test]
fn a_multipath_map_is_the_leaf_and_not_its_paths() {
    let mut host = Host::new();
    host.disk("sda", 1000);
    host.disk("sdb", 1000);
    host.dm("dm-0", "mpatha", "mpath-360001", 1000);
    host.dir("dm-0/mq/0");
    host.stack("sda", "dm-0");
    host.stack("sdb", "dm-0");
    host.dm("dm-1", "vg-lv", "LVM-1", 500);
    host.stack("dm-0", "dm-1");
    assert_eq!(leaves(&host.read(), &["dm-1"]), [("dm-0".to_owned(), 0, 1000)]);
}

#[test]
fn a_replaced_disk_is_known() {
    let id = |hard: &[&str], place: &str, content: &str| Identity {
        hard: hard.iter().map(|s| (*s).to_owned()).collect(),
        place: place.to_owned(),
        content: content.to_owned(),
    };
    use identity::Same;
    let table = [
        (id(&["serial:1"], "a", "x"), id(&["serial:1"], "b", "y"), Same::Yes),
        (id(&["serial:1"], "a", "x"), id(&["serial:2"], "a", "x"), Same::No),
        (id(&["serial:1", "wwn:9"], "", ""), id(&["wwn:9"], "", ""), Same::Yes),
        (id(&[], "a", "Ext:1"), id(&[], "b", "Ext:1"), Same::Yes),
        (id(&[], "a", "Ext:1"), id(&[], "a", "Ext:2"), Same::No),
        (id(&[], "a", "Ext:1"), id(&[], "a", ""), Same::No),
        (id(&[], "a", ""), id(&[], "a", ""), Same::Unknown),
    ];
    for (had, has, want) in table {
        assert_eq!(had.compare(&has), want, "{had:?} {has:?}");
    }
    let mut host = Host::new();
    host.disk("sda", 10);
    host.partition("sda", "sda1", 1, 2);
    let disks = host.read();
    assert_eq!(disks.get("sda").unwrap().identity.to_string(), "serial:S-sda");
    assert_eq!(disks.get("sda1").unwrap().identity.to_string(), "serial:S-sda#1");
}

/// A leg that waits for an agent would make who reads it wait.
#[test]
fn the_served_leg_of_a_mirror_is_not_read() {
    let mut host = Host::new();
    let mut head = vec![0; probe::PROBE_BYTES];
    head[4086..4096].copy_from_slice(b"SWAPSPACE2");
    for nbd in ["nbd0", "nbd1"] {
        host.disk(nbd, 8);
        host.heads.insert(nbd.to_owned(), head.clone());
    }
    host.dm("dm-0", "data", "", 8);
    host.dm("dm-1", "data-holdfast", "HOLDFAST-data", 8);
    host.stack("dm-1", "dm-0");
    host.stack("nbd0", "dm-0");
    let disks = host.read();
    assert!(disks.get("nbd0").is_some_and(|d| d.signature.is_none()), "our leg was read");
    assert!(disks.get("nbd1").is_some_and(|d| d.signature.is_some()), "somebody else's is a disk like others");
}
