//! A host that stands by for another one, on a real kernel: its fence serves by grant only, asks who has the address first, and lets go when the
//! box takes the host back. Two network namespaces, which this test makes.

mod common;

use agent_linux::{
    clock,
    config::FenceCommands,
    fence::{Fence, Gate, Orders, Services, Store, addresses},
};
use common::{root, run};
use model::{HostId, Owner};
use nix::sched::{CloneFlags, setns, unshare};
use replication::ownership::{Grantor, GrantorAction, GrantorEvent, OwnershipRecord};
use std::{
    fs::File,
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};
use wire::{HostPlan, LeaseRules, Message, PlanAddress, PlanService};

const HOST: HostId = HostId([1; 16]);
const STANDBY: HostId = HostId([2; 16]);
const RULES: LeaseRules = LeaseRules { lease_ms: 6_000, stop_ms: 2_000 };
/// Nothing here takes this long; a machine that is busy may.
const PATIENCE: Duration = Duration::from_secs(90);

/// Somebody else on the wire, in a namespace that lives as long as a process does.
struct Neighbour(Child);

impl Neighbour {
    fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
        run("ip", &["link", "set", "lo", "up"]);
        let child = Command::new("unshare").args(["--net", "sleep", "600"]).spawn().expect("unshare");
        let this = Self(child);
        let ours = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let theirs = || std::fs::read_link(format!("/proc/{}/ns/net", this.0.id())).ok();
        let begun = Instant::now();
        while theirs().is_none_or(|ns| ns == ours) {
            assert!(begun.elapsed() < PATIENCE, "no other namespace");
            thread::sleep(Duration::from_millis(10));
        }
        run("ip", &["link", "add", "here0", "type", "veth", "peer", "name", "there0"]);
        run("ip", &["link", "set", "there0", "netns", &this.0.id().to_string()]);
        run("ip", &["link", "set", "here0", "up"]);
        this.ip(&["link", "set", "there0", "up"]);
        this
    }
    fn ip(&self, words: &[&str]) {
        let pid = self.0.id().to_string();
        run("nsenter", &[&["--target", &pid, "--net", "ip"][..], words].concat());
    }
}

impl Neighbour {
    fn connects(&self, at: SocketAddr) -> io::Result<()> {
        let namespace = File::open(format!("/proc/{}/ns/net", self.0.id()))?;
        // A thread of its own: it stays in the namespace.
        let there = thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            TcpStream::connect_timeout(&at, Duration::from_secs(2)).map(drop)
        });
        there.join().expect("no panic")
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Rig {
    grantor: Grantor,
    heard: mpsc::Receiver<Message>,
    fence: Fence,
}

impl Rig {
    fn act(&mut self, actions: Vec<GrantorAction>) {
        for action in actions {
            match action {
                GrantorAction::Answer { answer, .. } => self.fence.message(Message::LeaseAnswer(answer)),
                GrantorAction::Revoke { end, .. } => self.fence.message(Message::LeaseRevoke(end)),
                _ => {}
            }
        }
    }
    fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            assert!(begun.elapsed() < PATIENCE, "{what} did not come about: {:?}", self.grantor.record());
            while let Ok(message) = self.heard.try_recv() {
                let from = Owner::Standby(STANDBY);
                let event = match message {
                    Message::Lease(request) => GrantorEvent::Request { from, request },
                    Message::LeaseReleased(end) => GrantorEvent::Released { from, end },
                    other => panic!("{other:?}"),
                };
                let actions = self.grantor.on(event, clock::boot());
                self.act(actions);
            }
            let actions = self.grantor.on(GrantorEvent::Tick, clock::boot());
            self.act(actions);
            thread::sleep(Duration::from_millis(5));
        }
    }
    fn for_a_while(&mut self, ms: u64) {
        let begun = clock::boot();
        self.until("time", |_| clock::boot().ms_since(begun) > ms);
    }
}

#[test]
fn root_a_standby_serves_by_grant_only_and_not_where_its_address_answers() {
    if !root("root_a_standby_serves_by_grant_only_and_not_where_its_address_answers") {
        return;
    }
    let neighbour = Neighbour::new();
    // As when the lost host is not as lost as was thought.
    neighbour.ip(&["address", "add", "192.0.2.7/24", "dev", "there0"]);
    let dir = tempfile::tempdir().unwrap();
    let running = dir.path().join("running");
    let shell = |text: String| vec!["sh".to_owned(), "-c".to_owned(), text];
    let file = running.display();
    let web = FenceCommands {
        start: shell(format!("touch {file}")),
        stop: shell(format!("rm -f {file}")),
        kill: shell(format!("rm -f {file}")),
        check: shell(format!("test -e {file}")),
    };
    let services =
        Services { systemctl: "false".into(), configured: [("web".to_owned(), web)].into(), orders: Orders::default() };
    let address = PlanAddress { address: "192.0.2.7/24".into(), device: "here0".into() };
    let plan = HostPlan {
        whose: HOST,
        version: 1,
        addresses: vec![address.clone()],
        services: vec![PlanService::Configured("web".into())],
        probes: vec![],
        beat: None,
    };
    let (tell, heard) = mpsc::channel();
    let store = Store::of_other(dir.path(), dir.path(), "boot", HOST).unwrap();
    let kept = (store, Gate::new(dir.path(), dir.path(), None));
    let fence = Fence::start(HOST, plan, kept, services, Box::new(move |m| drop(tell.send(m)))).unwrap();
    let record = OwnershipRecord { owner: Owner::Box, ..OwnershipRecord::new(HOST) };
    let mut rig = Rig { grantor: Grantor::new(record, clock::boot()).unwrap(), heard, fence };
    let up = || addresses::is_up(&address).unwrap();
    // The box owns it: it asks, and serves nobody.
    rig.for_a_while(2_500);
    assert!(!up() && !running.exists(), "it serves by grant only");
    let actions = rig.grantor.begin_move(Owner::Standby(STANDBY), Some(RULES)).unwrap();
    rig.act(actions);
    let actions = rig.grantor.on(GrantorEvent::BoxStopped, clock::boot());
    rig.act(actions);
    // Its address answers elsewhere: nothing is started.
    rig.for_a_while(5_000);
    assert!(!up() && !running.exists(), "the address answers elsewhere");
    neighbour.ip(&["address", "del", "192.0.2.7/24", "dev", "there0"]);
    rig.until("its services", |_| up() && running.exists());
    neighbour.ip(&["address", "add", "192.0.2.8/24", "dev", "there0"]);
    // It answers who is on the wire.
    let listener = TcpListener::bind("192.0.2.7:0").unwrap();
    let at = listener.local_addr().unwrap();
    let begun = Instant::now();
    while let Err(e) = neighbour.connects(at) {
        assert!(begun.elapsed() < PATIENCE, "the address does not answer: {e}");
        rig.for_a_while(200);
    }
    // Taken back: it has stopped before the box owns it.
    let actions = rig.grantor.begin_move(Owner::Box, None).unwrap();
    rig.act(actions);
    rig.until("the box", |rig| rig.grantor.record().owner == Owner::Box);
    assert!(!up() && !running.exists(), "two would serve");
}
