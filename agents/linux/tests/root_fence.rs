//! The fence on a real kernel, in a network namespace of its own: addresses, services, and a lease that runs out.

mod common;

use agent_linux::{
    clock,
    config::FenceCommands,
    fence::{
        Fence, Orders, Services, Store,
        addresses::{self, Lifetime},
        let_go,
    },
};
use common::{root, run};
use model::{HostId, Owner};
use nix::sched::{CloneFlags, unshare};
use replication::ownership::{EndedBy, Grantor, GrantorAction, GrantorEvent, Hold, OwnershipRecord};
use std::{
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
        let (to_box, from_host) = mpsc::channel();
        let plan = HostPlan {
            whose: HOST,
            version: 1,
            addresses: vec![address("192.0.2.7/24")],
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
        let fence = Fence::start(HOST, self.plan.clone(), store, services, Box::new(move |m| drop(tell.send(m))));
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
    store.store_plan(&rig.plan).unwrap();
    assert!(run("ip", &["address", "show", "dev", "lo", "to", "192.0.2.7"]).contains("sec "));
    assert!(let_go(&store).unwrap());
    let shown = run("ip", &["address", "show", "dev", "lo", "to", "192.0.2.7"]);
    assert!(shown.contains("valid_lft forever") && rig.runs(), "{shown}");
    assert_eq!((store.plan().unwrap(), store.holder().unwrap(), store.lease()), (None, None, None));
    assert!(!let_go(&store).unwrap());
}
