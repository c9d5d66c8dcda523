//! The fence on a real kernel, in a network namespace of its own: addresses, services, and a lease that runs out.

mod common;

use agent_linux::{
    arp::{self, Arp},
    clock,
    config::FenceCommands,
    fence::{
        Fence, Gate, Orders, Services, Store,
        addresses::{self, Lifetime},
        filter, let_go,
    },
};
use common::{root, run};
use model::{HostId, Owner, Term};
use nix::sched::{CloneFlags, setns, unshare};
use replication::ownership::{EndedBy, Grantor, GrantorAction, GrantorEvent, Hold, HolderRecord, OwnershipRecord};
use std::{
    fs::File,
    net::{IpAddr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};
use wire::{HostPlan, LeaseRules, Message, PlanAddress, PlanService};

const HOST: HostId = HostId([1; 16]);
const RULES: LeaseRules = LeaseRules { lease_ms: 4_000, stop_ms: 1_500 };
/// Nothing here takes this long; a machine that is busy may.
const PATIENCE: Duration = Duration::from_secs(60);

/// Threads begun after this see nothing of the machine's network.
fn alone() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
    run("ip", &["link", "set", "lo", "up"]);
}
fn address(text: &str) -> PlanAddress {
    PlanAddress { address: text.into(), device: "lo".into() }
}
fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "{what} did not come about");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn root_the_kernel_ends_an_address_whose_agent_is_stopped() {
    if !root("root_the_kernel_ends_an_address_whose_agent_is_stopped") {
        return;
    }
    alone();
    for at in [address("192.0.2.7/24"), address("2001:db8::7/64")] {
        assert!(!addresses::is_up(&at).unwrap());
        addresses::down(&at).expect("what is not there is down");
        addresses::up(&at, Lifetime::Forever).unwrap();
        assert!(addresses::is_up(&at).unwrap());
        addresses::down(&at).unwrap();
        assert!(!addresses::is_up(&at).unwrap());
        addresses::up(&at, Lifetime::Seconds(2)).unwrap();
        addresses::up(&at, Lifetime::Seconds(3)).unwrap();
        let shown = run("ip", &["address", "show", "dev", "lo"]);
        assert!(shown.contains("valid_lft 3sec") || shown.contains("valid_lft 2sec"), "{shown}");
        // Nobody does anything any more.
        wait_for("the end of the address", || !addresses::is_up(&at).unwrap());
    }
    let nowhere = PlanAddress { address: "192.0.2.7/24".into(), device: "nothere0".into() };
    assert_eq!(
        addresses::up(&nowhere, Lifetime::Forever).unwrap_err().to_string(),
        "there is no network device nothere0"
    );
    addresses::down(&nowhere).expect("without its device it cannot answer");
}

/// A box with a host behind a network that can be cut.
struct Rig {
    dir: tempfile::TempDir,
    plan: HostPlan,
    grantor: Grantor,
    from_host: mpsc::Receiver<Message>,
    to_box: mpsc::Sender<Message>,
    fence: Option<Fence>,
    cut: bool,
    owned: Vec<(Owner, EndedBy)>,
}

impl Rig {
    fn new() -> Self {
        Self::on("lo")
    }
    fn on(device: &str) -> Self {
        let (to_box, from_host) = mpsc::channel();
        let plan = HostPlan {
            whose: HOST,
            version: 1,
            addresses: vec![PlanAddress { address: "192.0.2.7/24".into(), device: device.into() }],
            services: vec![PlanService::Configured("web".into())],
            probes: vec![],
            beat: None,
        };
        let dir = tempfile::tempdir().unwrap();
        let grantor = Grantor::new(OwnershipRecord::new(HOST), clock::boot()).unwrap();
        let rig = Self { dir, plan, grantor, from_host, to_box, fence: None, cut: false, owned: Vec::new() };
        // As the host had it before it had a plan.
        addresses::up(&rig.plan.addresses[0], Lifetime::Forever).unwrap();
        std::fs::write(rig.file("running"), "").unwrap();
        rig
    }
    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    fn start(&mut self, boot: &str) {
        let shell = |text: String| vec!["sh".to_owned(), "-c".to_owned(), text];
        let (file, stops) = (self.file("running"), self.file("stops"));
        let (file, stops) = (file.display(), stops.display());
        let web = FenceCommands {
            start: shell(format!("touch {file}")),
            stop: shell(format!("rm -f {file}; echo >> {stops}")),
            kill: shell(format!("rm -f {file}")),
            check: shell(format!("test -e {file}")),
        };
        let services = Services {
            systemctl: "false".into(),
            configured: [("web".to_owned(), web)].into(),
            orders: Orders::default(),
        };
        let tell = self.to_box.clone();
        let store = Store::new(self.dir.path(), self.dir.path(), boot);
        let gate = Gate::new(self.dir.path(), self.dir.path(), None);
        let tell = Box::new(move |m| drop(tell.send(m)));
        let fence = Fence::start(HOST, self.plan.clone(), (store, gate), services, tell);
        self.fence = Some(fence.unwrap());
    }
    fn act(&mut self, actions: Vec<GrantorAction>) {
        for action in actions {
            let message = match action {
                GrantorAction::Answer { answer, .. } => Message::LeaseAnswer(answer),
                GrantorAction::Revoke { end, .. } => Message::LeaseRevoke(end),
                GrantorAction::Owned { owner, by, .. } => {
                    self.owned.push((owner, by));
                    continue;
                }
                _ => continue,
            };
            if let (false, Some(fence)) = (self.cut, &self.fence) {
                fence.message(message);
            }
        }
    }
    /// What has arrived, and the time. The oracle: whenever the box may serve, the host does not answer.
    fn turn(&mut self) {
        while let Ok(message) = self.from_host.try_recv() {
            if self.cut {
                continue;
            }
            let event = match message {
                Message::Lease(request) => GrantorEvent::Request { from: Owner::Host, request },
                Message::LeaseReleased(end) => GrantorEvent::Released { from: Owner::Host, end },
                other => panic!("{other:?}"),
            };
            let actions = self.grantor.on(event, clock::boot());
            self.act(actions);
        }
        let actions = self.grantor.on(GrantorEvent::Tick, clock::boot());
        self.act(actions);
        if self.grantor.record().owner == Owner::Box {
            assert!(!self.serves() && !self.runs(), "two serve");
        }
    }
    fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            assert!(begun.elapsed() < PATIENCE, "{what} did not come about: {:?}", self.grantor.record());
            self.turn();
            thread::sleep(Duration::from_millis(5));
        }
    }
    fn serves(&self) -> bool {
        addresses::is_up(&self.plan.addresses[0]).unwrap()
    }
    fn runs(&self) -> bool {
        self.file("running").exists()
    }
    fn stops(&self) -> usize {
        lines(&self.file("stops"))
    }
    fn leased(&self) -> bool {
        matches!(self.grantor.record().hold, Hold::Leased { .. })
    }
}

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

#[test]
fn root_a_host_cut_off_from_its_box_is_down_before_the_box_begins() {
    if !root("root_a_host_cut_off_from_its_box_is_down_before_the_box_begins") {
        return;
    }
    alone();
    let mut rig = Rig::new();
    rig.start("boot-1");
    // Without a lease, nothing happens to it, box or no box.
    rig.cut = true;
    let begun = clock::boot();
    rig.until("time", |_| clock::boot().ms_since(begun) > 1_500);
    assert!(rig.serves() && rig.runs());
    rig.cut = false;
    let actions = rig.grantor.arm(RULES).unwrap();
    rig.act(actions);
    rig.until("the lease", Rig::leased);
    let begun = clock::boot();
    rig.until("renewals", |_| clock::boot().ms_since(begun) > RULES.lease_ms + 500);
    assert!(rig.serves() && rig.runs() && rig.stops() == 0, "renewed, it goes on");
    let shown = run("ip", &["address", "show", "dev", "lo"]);
    assert!(!shown.contains("192.0.2.7/24 scope global lo\n       valid_lft forever"), "{shown}");

    rig.cut = true;
    let actions = rig.grantor.begin_move(Owner::Box, None).unwrap();
    rig.act(actions);
    rig.until("the takeover", |rig| rig.grantor.record().owner == Owner::Box);
    assert_eq!(rig.owned, [(Owner::Box, EndedBy::Silence)]);
    assert!(!rig.serves() && !rig.runs());

    let gate = Gate::new(rig.dir.path(), rig.dir.path(), None);
    assert!(gate.mark.exists() && !gate.may_serve.exists(), "nobody may start it");
    // The line is back, and the host reboots: it stays down.
    rig.cut = false;
    rig.fence = None;
    rig.start("boot-2");
    let begun = clock::boot();
    rig.until("time", |_| clock::boot().ms_since(begun) > 3_000);
    assert!(!rig.serves() && !rig.runs());

    let actions = rig.grantor.begin_move(Owner::Host, Some(RULES)).unwrap();
    rig.act(actions);
    let actions = rig.grantor.on(GrantorEvent::BoxStopped, clock::boot());
    rig.act(actions);
    rig.until("the failback", |rig| rig.serves() && rig.runs());

    // A planned move does not wait for the lease.
    let actions = rig.grantor.begin_move(Owner::Box, None).unwrap();
    rig.act(actions);
    rig.until("the release", |rig| rig.grantor.record().owner == Owner::Box);
    assert_eq!(rig.owned.last(), Some(&(Owner::Box, EndedBy::Release)));
}

#[test]
fn root_an_agent_that_is_restarted_stops_nothing_and_a_boot_does() {
    if !root("root_an_agent_that_is_restarted_stops_nothing_and_a_boot_does") {
        return;
    }
    alone();
    let mut rig = Rig::new();
    rig.start("boot-1");
    let actions = rig.grantor.arm(LeaseRules { lease_ms: 30_000, stop_ms: 2_000 }).unwrap();
    rig.act(actions);
    rig.until("the lease", Rig::leased);
    for _ in 0..3 {
        rig.fence = None;
        rig.start("boot-1");
        let before = rig.grantor.holding();
        rig.until("a request", |rig| rig.grantor.holding() != before);
    }
    assert!(rig.serves() && rig.runs() && rig.stops() == 0);
    // Without its agent for longer than the lease, the kernel ends the address; services wait for the agent.
    rig.cut = true;
    rig.fence = None;
    rig.start("boot-2");
    rig.until("the stop of a boot", |rig| !rig.serves() && !rig.runs());
    rig.cut = false;
    rig.until("the grant", |rig| rig.serves() && rig.runs());
    // Owned again only because nobody else was.
    assert_eq!(rig.grantor.record().owner, Owner::Host);
    // The agent is removed: what serves goes on, for longer than the lease.
    rig.fence = None;
    let store = Store::new(rig.dir.path(), rig.dir.path(), "boot-2");
    let gate = Gate::new(rig.dir.path(), rig.dir.path(), None);
    assert!(gate.mark.exists() && gate.may_serve.exists(), "leased, and granted");
    store.store_plan(&rig.plan).unwrap();
    assert!(run("ip", &["address", "show", "dev", "lo", "to", "192.0.2.7"]).contains("sec "));
    assert!(let_go(&store, &gate).unwrap());
    let shown = run("ip", &["address", "show", "dev", "lo", "to", "192.0.2.7"]);
    assert!(shown.contains("valid_lft forever") && rig.runs(), "{shown}");
    assert_eq!((store.plan().unwrap(), store.holder().unwrap(), store.lease()), (None, None, None));
    assert!(!gate.mark.exists() && !gate.may_serve.exists(), "the next boot holds nothing");
    assert!(!let_go(&store, &gate).unwrap());
}

/// Hosts on one link, each a namespace of its own on a bridge; all of it goes with the test. The calling thread is where the bridge is.
struct Hosts(Vec<String>);

impl Hosts {
    fn new(count: usize) -> Self {
        alone();
        run("ip", &["link", "add", "sw", "type", "bridge"]);
        run("ip", &["link", "set", "sw", "up"]);
        let this = Self((0..count).map(|n| format!("hf-{}-{n}", std::process::id())).collect());
        for (n, name) in this.0.iter().enumerate() {
            run("ip", &["netns", "add", name]);
            let port = format!("p{n}");
            run("ip", &["link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", name]);
            run("ip", &["link", "set", &port, "master", "sw", "up"]);
            this.ip(n, &["link", "set", "lo", "up"]);
            this.ip(n, &["link", "set", "eth0", "up"]);
        }
        this
    }
    fn ip(&self, host: usize, args: &[&str]) -> String {
        run("ip", &[&["-n", &self.0[host]], args].concat())
    }
    /// Does something on a host.
    fn on<T: Send>(&self, host: usize, act: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/run/netns/{}", self.0[host])).unwrap();
        thread::scope(|scope| {
            let there = scope.spawn(move || {
                setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
                act()
            });
            there.join().unwrap()
        })
    }
    /// The card that a host takes an address to be at.
    fn neighbour(&self, host: usize, ip: &str) -> String {
        let shown = self.ip(host, &["neighbour", "show", ip]);
        shown.split_whitespace().skip_while(|w| *w != "lladdr").nth(1).unwrap_or_default().to_owned()
    }
    fn mac(&self, host: usize, device: &str) -> String {
        let shown = self.ip(host, &["-o", "link", "show", device]);
        shown.split_whitespace().skip_while(|w| *w != "link/ether").nth(1).unwrap().to_owned()
    }
    /// Whether the host's kernel answers at that address: it has no such port, and says so.
    fn reaches(&self, host: usize, ip: IpAddr) -> bool {
        let asked = self.on(host, move || TcpStream::connect_timeout(&SocketAddr::new(ip, 9), Duration::from_secs(4)));
        asked.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.0 {
            let _ = std::process::Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

#[test]
fn root_an_address_moves_between_hosts_only_when_it_is_free_and_every_neighbour_hears_of_it() {
    if !root("root_an_address_moves_between_hosts_only_when_it_is_free_and_every_neighbour_hears_of_it") {
        return;
    }
    let (first, second, client) = (0, 1, 2);
    let hosts = Hosts::new(3);
    let mut devices = vec!["eth0"];
    if (0..3).all(|n| {
        let add = ["-n", &hosts.0[n], "link", "add", "link", "eth0", "name", "eth0.12", "type", "vlan", "id", "12"];
        let made = std::process::Command::new("ip").args(add).output().unwrap().status.success();
        made && !hosts.ip(n, &["link", "set", "eth0.12", "up"]).contains("error")
    }) {
        devices.push("eth0.12");
    } else {
        println!("SKIPPED: addresses on a VLAN: this kernel has none (8021q)");
    }
    for device in devices {
        hosts.ip(client, &["address", "flush", "dev", "eth0"]);
        hosts.ip(client, &["address", "add", "192.0.2.99/24", "dev", device]);
        hosts.ip(client, &["address", "add", "2001:db8::99/64", "dev", device, "nodad"]);
        // Cached for longer than the test, unless somebody tells otherwise.
        for family in ["ipv4", "ipv6"] {
            let set = format!("net.{family}.neigh.{}.base_reachable_time_ms=3600000", device.replace('.', "/"));
            run("ip", &["netns", "exec", &hosts.0[client], "sysctl", "-qw", &set]);
        }
        for text in ["192.0.2.7/24", "2001:db8::7/64"] {
            let at = PlanAddress { address: text.into(), device: device.into() };
            let ip: IpAddr = text.split('/').next().unwrap().parse().unwrap();
            let free_there = |host: usize| {
                hosts.on(host, || match ip {
                    IpAddr::V4(v4) => Arp::open(device).unwrap().unwrap().who_has(v4).unwrap(),
                    IpAddr::V6(_) => None,
                })
            };
            let settled = |host: usize| {
                let IpAddr::V6(v6) = ip else { return arp::Asked::Free };
                let mut said = arp::Asked::Still;
                wait_for("the kernel's own question", || {
                    said = hosts.on(host, || arp::asked_by_kernel(device, v6).unwrap());
                    said != arp::Asked::Still
                });
                said
            };
            assert_eq!(free_there(first), None, "{text} on {device} is free");
            hosts.on(first, || addresses::up(&at, Lifetime::Seconds(600)).unwrap());
            assert_eq!(settled(first), arp::Asked::Free);
            assert!(hosts.reaches(client, ip), "{text} on {device}");
            assert_eq!(hosts.neighbour(client, &ip.to_string()), hosts.mac(first, device));
            // A conflict: found before it is put up, or by the kernel when it is.
            if ip.is_ipv4() {
                assert_eq!(free_there(second), Some(hosts.mac(first, device)), "{text} on {device} is taken");
            } else {
                hosts.on(second, || addresses::up(&at, Lifetime::Seconds(600)).unwrap());
                // One with an end is taken away by the kernel itself, one without stays and is not used.
                assert_eq!(settled(second), arp::Asked::Gone, "{text} on {device} is taken");
                hosts.on(second, || addresses::up(&at, Lifetime::Forever).unwrap());
                assert_eq!(settled(second), arp::Asked::Taken, "{text} on {device} is taken");
                hosts.on(second, || addresses::down(&at).unwrap());
            }
            // It moves. Until it is announced the client asks where it was.
            hosts.on(first, || addresses::down(&at).unwrap());
            assert_eq!(free_there(second), None);
            hosts.on(second, || addresses::up(&at, Lifetime::Seconds(600)).unwrap());
            assert_eq!(settled(second), arp::Asked::Free);
            assert_eq!(hosts.neighbour(client, &ip.to_string()), hosts.mac(first, device), "nobody has told it yet");
            hosts.on(second, || arp::announce(device, ip, || true).unwrap());
            assert_eq!(hosts.neighbour(client, &ip.to_string()), hosts.mac(second, device), "{text} on {device}");
            assert!(hosts.reaches(client, ip), "{text} on {device}");
            hosts.on(second, || addresses::down(&at).unwrap());
        }
    }
}

#[test]
fn root_a_lease_is_not_begun_beside_another_machine_with_its_address() {
    if !root("root_a_lease_is_not_begun_beside_another_machine_with_its_address") {
        return;
    }
    let hosts = Hosts::new(1);
    run("ip", &["address", "add", "192.0.2.1/24", "dev", "sw"]);
    hosts.ip(0, &["address", "add", "192.0.2.7/24", "dev", "eth0"]);
    let mut rig = Rig::on("sw");
    // It comes from a boot, so that it has to be raised.
    addresses::down(&rig.plan.addresses[0]).unwrap();
    let store = Store::new(rig.dir.path(), rig.dir.path(), "boot-1");
    store.store_holder(HolderRecord { fenced: true, term: Term::ZERO }).unwrap();
    rig.start("boot-1");
    let actions = rig.grantor.arm(RULES).unwrap();
    rig.act(actions);
    let begun = clock::boot();
    rig.until("time", |_| clock::boot().ms_since(begun) > 6_000);
    assert!(!rig.serves() && !rig.runs(), "another machine has its address");
    hosts.ip(0, &["address", "del", "192.0.2.7/24", "dev", "eth0"]);
    rig.until("the grant", |rig| rig.serves() && rig.runs());
}

#[test]
fn root_a_closed_gate_answers_nobody_whoever_puts_the_address_up() {
    if !root("root_a_closed_gate_answers_nobody_whoever_puts_the_address_up") {
        return;
    }
    let (host, client) = (0, 1);
    let hosts = Hosts::new(2);
    let (own, own6, listed, listed6) = ("192.0.2.1", "2001:db8::1", "192.0.2.7", "2001:db8::7");
    for (ip, bits) in [("192.0.2.99", 24), ("2001:db8::99", 64)] {
        hosts.ip(client, &["address", "add", &format!("{ip}/{bits}"), "dev", "eth0", "nodad"]);
    }
    for (ip, bits) in [(own, 24), (own6, 64)] {
        hosts.ip(host, &["address", "add", &format!("{ip}/{bits}"), "dev", "eth0", "nodad"]);
    }
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(dir.path(), dir.path(), "boot-1");
    let gate = Gate::new(dir.path(), dir.path(), Some(dir.path().join("gate")));
    let device = |address: &str| PlanAddress { address: address.into(), device: "eth0".into() };
    let plan = HostPlan {
        whose: HOST,
        version: 1,
        addresses: vec![device("192.0.2.7/24"), device("2001:db8::7/64")],
        services: vec![PlanService::Unit("db@1.service".into()), PlanService::Configured("web".into())],
        probes: vec![],
        beat: None,
    };
    store.store_plan(&plan).unwrap();
    // Without a record, or with one that says that it is its own, nothing is held.
    let close = || hosts.on(host, || gate.close(&store).unwrap());
    assert!(!close());
    store.store_holder(HolderRecord { fenced: false, term: Term(3) }).unwrap();
    assert!(!close() && !gate.mark.exists() && !gate.closed.exists());
    gate.list(&plan).unwrap();
    assert_eq!(std::fs::read_to_string(dir.path().join("gate/units")).unwrap(), "db@1.service\n");
    let condition = std::fs::read_to_string(dir.path().join("gate/condition.conf")).unwrap();
    assert!(condition.contains(&format!("ConditionPathExists=|!{}\n", gate.mark.display())), "{condition}");
    assert!(condition.contains(&format!("ConditionPathExists=|{}\n", gate.may_serve.display())), "{condition}");

    // Fenced, and what cannot be read counts as that.
    std::fs::write(dir.path().join("ownership.json"), "{").unwrap();
    assert!(close() && gate.mark.exists() && gate.closed.exists());
    store.store_holder(HolderRecord { fenced: true, term: Term(3) }).unwrap();
    assert!(close(), "once more, as a second boot script would");
    // Now the network comes up, by whatever the host configures it with.
    for address in ["192.0.2.7/24", "2001:db8::7/64"] {
        hosts.ip(host, &["address", "add", address, "dev", "eth0", "nodad"]);
    }
    let reaches = |ip: &str| hosts.reaches(client, ip.parse().unwrap());
    let who_has = || hosts.on(client, || Arp::open("eth0").unwrap().unwrap().who_has(listed.parse().unwrap()).unwrap());
    assert!(reaches(own) && reaches(own6), "its other addresses are its own");
    assert_eq!(who_has(), None, "nobody answers for it");
    assert!(!reaches(listed) && !reaches(listed6));
    // Granted, it does.
    hosts.on(host, || gate.let_serve().unwrap());
    assert!(gate.may_serve.exists() && !gate.closed.exists());
    assert_eq!(who_has(), Some(hosts.mac(host, "eth0")));
    for ip in [listed, listed6] {
        hosts.ip(client, &["neighbour", "flush", "to", ip]);
        assert!(reaches(ip), "{ip}");
    }
    gate.hold().unwrap();
    assert!(!gate.may_serve.exists() && gate.mark.exists());
    // Let go, nothing of it is left.
    assert!(close());
    hosts.on(host, || gate.forget().unwrap());
    assert!(!gate.mark.exists() && !gate.closed.exists() && !dir.path().join("gate").exists());
    assert!(reaches(listed));
    hosts.on(host, || filter::open().unwrap());
}
