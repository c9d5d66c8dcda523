//! Whole Debian hosts: they boot by their own boot loader and initramfs, and go down and come back as hosts do.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Scratch,
    debian::{DebianGuest, DebianImage, Firmware, Options, Profile},
    product::Binaries,
};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

const STEP_MAX: Duration = Duration::from_secs(120);

fn cache() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/guest")
}

fn boots(profile: Profile, firmware: Firmware, root: &str, more: fn(&mut DebianGuest) -> Result<()>) -> Result<()> {
    if let Some(why) = DebianImage::refused() {
        hw_tests::skip(format!("a Debian host of its own: {why}"));
        return Ok(());
    }
    let dir = Scratch::new()?;
    let image = DebianImage::get(profile, &cache())?;
    let disk = image.overlay(&dir.path().join("disk.qcow2"))?;
    // The agent, on a disk of its own: for who wants it in the guest.
    let agent = dir.path().join("agent");
    fs::copy(Binaries::beside_us()?.agent, &agent)?;
    fs::File::options().append(true).open(&agent)?.set_len(fs::metadata(&agent)?.len().next_multiple_of(1 << 20))?;
    let options = Options { firmware, disks: vec![agent], ..Options::default() };
    let mut guest = DebianGuest::boot(&disk, &dir.path().join("guest"), &options)?;
    let source = guest.sh("findmnt -no SOURCE /", STEP_MAX)?;
    assert_eq!(source.trim(), root);
    let efi = guest.sh("[ -d /sys/firmware/efi ] && echo efi || echo bios", STEP_MAX)?;
    assert_eq!(efi.trim(), if firmware == Firmware::Uefi { "efi" } else { "bios" });
    let failed = guest.sh("systemctl --failed --no-legend", STEP_MAX)?;
    assert_eq!(failed.trim(), "", "units that failed");
    more(&mut guest)?;
    guest.shut_down()?;
    dir.done()
}

#[test]
fn a_debian_host_boots_from_its_partition_by_bios_and_a_fenced_one_comes_up_held() -> Result<()> {
    boots(Profile::PARTITION, Firmware::Bios, "/dev/vda4", comes_up_held)
}

#[test]
fn a_debian_host_boots_from_its_logical_volume_by_uefi() -> Result<()> {
    boots(Profile::LVM, Firmware::Uefi, "/dev/mapper/vg-root", |_| Ok(()))
}

const PLAN: &str = r#"{"whose":"WHOSE","version":1,"addresses":[{"address":"192.0.2.10/24","device":"eth0"}],"services":[{"unit":"app.service"}],"probes":[],"beat":null}"#;
/// Started by the host itself at each boot, as a database is.
const APP: &str = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sh -c 'echo ran >>/var/app-ran'\n[Install]\nWantedBy=multi-user.target\n";
/// Where a network manager has its place in the order of a boot: it brings the address up as soon as it may, whoever owns it.
const ADDRESS: &str = "[Unit]\nDefaultDependencies=no\nAfter=network-pre.target local-fs.target\nBefore=network.target\n\
    [Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sh -c 'ip link set eth0 up; ip address add 192.0.2.10/24 dev eth0'\n\
    [Install]\nWantedBy=multi-user.target\n";

/// With the package's files and an agent's state of a host that is leased; its box cannot be reached, and no agent runs.
fn comes_up_held(guest: &mut DebianGuest) -> Result<()> {
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agents/linux/packaging");
    let of_package = |file: &str| fs::read_to_string(packaging.join(file)).with_context(|| file.to_owned());
    let sh = |guest: &mut DebianGuest, line: &str| guest.sh(line, STEP_MAX).with_context(|| line.to_owned());
    sh(guest, "dd if=/dev/vdb of=/usr/bin/holdfast-agent bs=1M status=none && chmod 755 /usr/bin/holdfast-agent")?;
    let put = |guest: &mut DebianGuest, to: &str, text: &str| {
        guest.sh(&format!("mkdir -p $(dirname {to}); : >{to}"), STEP_MAX)?;
        // A line of a terminal's has a bound.
        for part in text.as_bytes().chunks(500) {
            let octal: String = part.iter().map(|b| format!("\\0{b:03o}")).collect();
            guest.sh(&format!("printf '%b' '{octal}' >>{to}"), STEP_MAX)?;
        }
        anyhow::Ok(())
    };
    let units = "/usr/lib/systemd/system";
    put(guest, &format!("{units}/holdfast-gate.service"), &of_package("holdfast-gate.service")?)?;
    put(guest, "/usr/lib/systemd/system-generators/holdfast-agent", &of_package("hooks/generator")?)?;
    put(guest, "/etc/systemd/system/app.service", APP)?;
    put(guest, "/etc/systemd/system/service-address.service", ADDRESS)?;
    sh(guest, "chmod 755 /usr/lib/systemd/system-generators/holdfast-agent; systemctl enable -q app service-address")?;
    // As the agent writes them when the plan comes and the lease is armed.
    put(guest, "/etc/holdfast-agent/gate/units", "app.service\n")?;
    put(
        guest,
        "/etc/holdfast-agent/gate/condition.conf",
        "[Unit]\nRequiresMountsFor=/var/lib/holdfast-agent\nConditionPathExists=|!/var/lib/holdfast-agent/fenced\n\
         ConditionPathExists=|/run/holdfast-agent/may-serve\n",
    )?;
    put(guest, "/var/lib/holdfast-agent/takeover-plan.json", &PLAN.replace("WHOSE", &"07".repeat(16)))?;
    put(guest, "/var/lib/holdfast-agent/ownership.json", r#"{"fenced":true,"term":3}"#)?;
    sh(guest, "touch /var/lib/holdfast-agent/fenced; sync")?;
    guest.reboot()?;

    // The service never ran, and nobody can start it; the address is up and answers nobody; and the boot waited for nobody.
    sh(guest, "systemctl is-system-running --wait || true")?;
    let gate = sh(
        guest,
        "systemctl show -p ActiveState -p Result holdfast-gate; systemctl status --no-pager holdfast-gate || true",
    )?;
    ensure!(gate.contains("ActiveState=active") && gate.contains("Result=success"), "{gate}");
    sh(guest, "! systemctl is-active -q app && [ ! -e /var/app-ran ]")?;
    let app =
        sh(guest, "systemctl start app; systemctl show -p ConditionResult -p InactiveExitTimestampMonotonic app")?;
    ensure!(app.contains("ConditionResult=no") && app.contains("InactiveExitTimestampMonotonic=0"), "{app}");
    sh(guest, "[ ! -e /var/app-ran ]")?;
    sh(guest, "systemctl is-active -q service-address && ip address show dev eth0 | grep -q 192.0.2.10/24")?;
    let time = |guest: &mut DebianGuest, property: &str, unit: &str| -> Result<u64> {
        let shown = sh(guest, &format!("systemctl show --value -p {property} {unit}"))?;
        shown.trim().parse().with_context(|| format!("{property} of {unit}: {shown:?}"))
    };
    let gate_begun = time(guest, "ExecMainStartTimestampMonotonic", "holdfast-gate")?;
    let gate_ended = time(guest, "ExecMainExitTimestampMonotonic", "holdfast-gate")?;
    let address = time(guest, "ExecMainStartTimestampMonotonic", "service-address")?;
    ensure!(gate_ended <= address, "the address came up before the gate was closed: {gate_ended} {address}");
    println!("the gate took {} ms of an emulated boot", (gate_ended - gate_begun) / 1000);
    // A neighbour on a link of its own asks; hosts answer for all their addresses on every link.
    sh(
        guest,
        "ip netns add n && ip link add v0 type veth peer name v1 netns n && ip addr add 198.51.100.1/24 dev v0 && ip link set v0 up",
    )?;
    sh(
        guest,
        "ip -n n addr add 198.51.100.2/24 dev v1 && ip -n n link set v1 up && ip -n n route add 192.0.2.10/32 dev v1",
    )?;
    // Nobody listens there: who is reached says so.
    let asks = |ip: &str| format!("ip netns exec n timeout 10 bash -c 'echo >/dev/tcp/{ip}/9' 2>&1 | grep -q refused");
    sh(guest, &asks("198.51.100.1"))?;
    sh(guest, &format!("! {{ {}; }}", asks("192.0.2.10")))?;

    // Not leased any more, and booted anew, it is a host like any other.
    sh(guest, "rm /var/lib/holdfast-agent/fenced; sync")?;
    guest.reboot()?;
    sh(guest, "systemctl is-system-running --wait || true")?;
    sh(guest, "systemctl is-active -q app && [ -e /var/app-ran ]")?;
    let gate = sh(guest, "systemctl show -p ActiveState -p ConditionResult holdfast-gate")?;
    ensure!(gate.contains("ActiveState=inactive") && gate.contains("ConditionResult=no"), "{gate}");
    Ok(())
}
