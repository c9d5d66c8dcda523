//! Leases and takeovers that begin by themselves: an agent with the real holder of a lease, services that are a word, and boxes that are killed.
//! With kernels, databases and real addresses it is tested on whole hosts (`hw-tests/tests/takeover.rs`).

use crate::{
    agent::{Conn, Host, Identity},
    support::{Control, Inside, Outside, Rng, wait_for},
    takeovers::EndMachines,
};
use model::{ByteLen, GroupId, HostId, MonoTime, SourceSeq};
use replication::ownership::{Holder, HolderAction, HolderEvent, HolderRecord, HolderState};
use serde_json::{Value, json};
use std::{
    io,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use wire::{AgentStatus, GroupAgentState, GroupAgentStatus, Holding, HostPlan, Message, Purpose};

const LOOK: Duration = Duration::from_millis(10);
const RENEW: Duration = Duration::from_millis(300);

fn wall_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64
}

/// What the host is, to be looked at and changed by a test.
pub struct Shared {
    pub at: SocketAddr,
    /// The network to the box is cut.
    pub is_cut: bool,
    ends: bool,
    /// Every plan is refused with this.
    pub refuses: Option<String>,
    pub plan: Option<HostPlan>,
    pub holding: Holding,
    term: u64,
    /// When it was seen to serve last.
    served_us: u64,
}

/// A host that holds a lease as the real agent does, in a thread of its own.
pub struct Leased {
    shared: Arc<Mutex<Shared>>,
    thread: Option<JoinHandle<()>>,
}

impl Leased {
    pub fn start((identity, group): (Identity, GroupId), at: SocketAddr) -> Self {
        let whose = identity.host;
        Self::of(identity, whose, Some(group), at)
    }
    /// Stands by for another host.
    pub fn stand_by(identity: Identity, whose: HostId, at: SocketAddr) -> Self {
        Self::of(identity, whose, None, at)
    }
    fn of(identity: Identity, whose: HostId, group: Option<GroupId>, at: SocketAddr) -> Self {
        let shared = Shared {
            at,
            is_cut: false,
            ends: false,
            refuses: None,
            plan: None,
            holding: if group.is_some() { Holding::Unfenced } else { Holding::Down },
            term: 0,
            served_us: 0,
        };
        let shared = Arc::new(Mutex::new(shared));
        let of_thread = Arc::clone(&shared);
        let thread = thread::spawn(move || Life::new(identity, whose, group, of_thread).run());
        Self { shared, thread: Some(thread) }
    }
    pub fn see(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
    pub fn serves(&self) -> bool {
        !matches!(self.see().holding, Holding::Down | Holding::Stopping)
    }
    pub fn wait(&self, what: &str, is: impl Fn(&Shared) -> bool) {
        wait_for(what, || is(&self.see()).then_some(()));
    }
}

impl Drop for Leased {
    fn drop(&mut self) {
        self.see().ends = true;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Life {
    identity: Identity,
    group: Option<GroupId>,
    shared: Arc<Mutex<Shared>>,
    holder: Holder,
    conn: Option<Conn>,
    began: Instant,
    asked: Option<Instant>,
}

impl Life {
    fn new(identity: Identity, whose: HostId, group: Option<GroupId>, shared: Arc<Mutex<Shared>>) -> Self {
        let record = if group.is_some() { HolderRecord::UNFENCED } else { HolderRecord::STANDBY };
        let (holder, actions) = Holder::new(whose, record, None, 7_000, 500, MonoTime(1));
        let mut this = Self { identity, group, shared, holder, conn: None, began: Instant::now(), asked: None };
        this.act(actions);
        this
    }
    fn now(&self) -> MonoTime {
        MonoTime(self.began.elapsed().as_nanos() as u64 + 1)
    }
    fn connect(&self, at: SocketAddr) -> io::Result<Conn> {
        let mut conn = self.identity.dial(at)?;
        let hello = conn.try_hello_as(4, self.identity.host, Purpose::Control, self.identity.instance);
        hello?.map_err(|refused| io::Error::other(refused.to_string()))?;
        conn.set_patience(LOOK);
        Ok(conn)
    }

    fn run(mut self) {
        loop {
            let (at, is_cut, ends) = {
                let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
                shared.holding = self.holder.holding();
                shared.term = self.holder.record().term.0;
                if !matches!(shared.holding, Holding::Down | Holding::Stopping) {
                    shared.served_us = wall_us();
                }
                (shared.at, shared.is_cut, shared.ends)
            };
            if ends {
                return;
            }
            if is_cut {
                self.conn = None;
            } else if self.conn.is_none() {
                self.conn = self.connect(at).ok();
            }
            if self.conn.is_none() {
                thread::sleep(LOOK);
            } else if self.talk().is_err() {
                self.conn = None;
            }
            let actions = self.holder.on(HolderEvent::Tick, self.now());
            self.act(actions);
        }
    }

    fn talk(&mut self) -> io::Result<()> {
        if self.asked.is_none_or(|at| at.elapsed() >= RENEW) {
            self.asked = Some(Instant::now());
            let request = self.holder.request(self.now());
            self.say(&Message::Lease(request))?;
            if let Some(group) = self.group {
                self.say(&Message::Status(all_is_in(group)))?;
            }
        }
        let Some(conn) = &mut self.conn else { return Ok(()) };
        let heard = match conn.try_hear() {
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => return Ok(()),
            heard => heard?,
        };
        let now = self.now();
        let actions = match heard {
            Message::LeaseAnswer(answer) => self.holder.on(HolderEvent::Answer(answer), now),
            Message::LeaseRevoke(end) => self.holder.on(HolderEvent::Revoke(end), now),
            Message::HostPlan(plan) => {
                let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
                let refused = shared.refuses.clone();
                let (whose, version) = (plan.whose, plan.version);
                if refused.is_none() {
                    shared.plan = Some(plan);
                }
                drop(shared);
                return self.say(&Message::HostPlanTaken { whose, version, refused });
            }
            _ => return Ok(()),
        };
        self.act(actions);
        Ok(())
    }
    fn say(&mut self, message: &Message) -> io::Result<()> {
        self.conn.as_mut().map_or(Ok(()), |conn| conn.try_say(message))
    }

    /// Its services start and stop at once.
    fn act(&mut self, actions: Vec<HolderAction>) {
        for action in actions {
            let event = match action {
                HolderAction::Raise { order, .. } => HolderEvent::Raised { order },
                HolderAction::Stop { order, .. } => HolderEvent::Stopped { order },
                HolderAction::Released(end) => {
                    // Lost with the connection, it is said again when the box asks again.
                    let _ = self.say(&Message::LeaseReleased(end));
                    continue;
                }
                _ => continue,
            };
            let next = self.holder.on(event, self.now());
            self.act(next);
        }
        assert!(!matches!(self.holder.state(), HolderState::Stopping { hard: true, .. }), "it stops at once");
    }
}

/// Of an agent whose every write is durable on the box.
fn all_is_in(group: GroupId) -> AgentStatus {
    let group = GroupAgentStatus {
        group,
        state: GroupAgentState::Replicating,
        text: String::new(),
        lag_ms: Some(0),
        spool_bytes: ByteLen(0),
        spool_bytes_max: ByteLen(0),
        dirty_bytes: ByteLen(0),
        sync_done: ByteLen(0),
        sync_total: ByteLen(0),
        durable: SourceSeq(0),
        gate: "async".into(),
        captured_bytes: ByteLen(0),
        captured_records: 0,
    };
    AgentStatus {
        agent_version: "test".into(),
        kernel: String::new(),
        backend: String::new(),
        uptime_s: 1,
        rss_bytes: ByteLen(0),
        mono_ns: 1,
        wall_us: wall_us(),
        groups: vec![group],
    }
}

fn plan(more: &str) -> String {
    format!(
        "host = \"db1\"\n[machine]\ncpus = 1\nmemory_mib = 64\nboot_seconds_max = 2\n\
         [lease]\nlease_ms = 3000\nstop_ms = 1000\nservices = [{{ configured = \"web\" }}]\n{more}"
    )
}

const DETECT: &str = "[detect]\nautomatic = true\nhold_ms = 100\n\
    channels = [{ channel = \"stream\", period_ms = 500, missed_max = 4 }]\n\
    [detect.uplink]\nothers = [\"127.0.0.1\"]\n";

/// A host of which the box holds a disk that boots and says nothing.
fn protected(inside: &Inside) -> (Identity, GroupId) {
    let mut disk = vec![0; 4 << 20];
    // cli; hlt; jmp back to the hlt
    disk[..4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let mut host = Host::protect(inside, "db1", disk);
    host.connect();
    host.settle();
    (host.identity().clone(), host.spec.id)
}

pub fn status(control: &impl Control) -> Value {
    control.get("plan-status")[0].clone()
}
pub fn wait_fences(control: &impl Control) {
    wait_for("the lease to be held", || (status(control)["ownership"]["fences"] == true).then_some(()));
}
fn settled(control: &impl Control, id: &str) -> Value {
    wait_for("the run to settle", || {
        let run = control.get(&format!("runs/{id}"));
        assert!(run["stuck"].is_null(), "{run}");
        matches!(run["phase"]["is"].as_str(), Some("serving" | "failed" | "ended")).then_some(run)
    })
}
fn step<'a>(run: &'a Value, name: &str) -> &'a Value {
    run["steps"].as_array().unwrap().iter().find(|s| s["step"] == name).unwrap_or_else(|| panic!("no {name}: {run}"))
}

#[test]
fn a_host_that_falls_silent_is_fenced_by_its_lease_and_taken_over_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let inside = Inside::start(&data, "");
    let host = Leased::start(protected(&inside), inside.listen());
    inside.ok("PUT", "plans/db1", &plan(DETECT));
    wait_fences(&inside);
    host.wait("the plan", |h| h.plan.as_ref().is_some_and(|p| p.services.len() == 1));
    host.wait("the lease", |h| h.holding == Holding::Serving);
    wait_for("the host to be seen well", || (status(&inside)["seen"]["verdict"] == "well").then_some(()));
    wait_for("the uplink", || {
        status(&inside)["seen"]["reasons"].to_string().contains("peer 127.0.0.1 answers").then_some(())
    });
    wait_for("nothing to be in the way", || status(&inside)["seen"]["in_the_way"].is_null().then_some(()));
    assert_eq!(inside.refused("PUT", "plans/other", &plan("")), "plan-twice");

    // Alive, and cut off from the box.
    host.see().is_cut = true;
    let begun = wait_for("a takeover with no hand on it", || inside.get("runs")[0].as_object().cloned());
    let run = settled(&inside, begun["id"].as_str().unwrap());
    assert_eq!(run["phase"], json!({ "is": "failed", "step": "boot" }), "{run}");
    assert_eq!(run["fenced"]["by"], "lease", "{run}");
    assert!(run["decision"].as_str().unwrap().contains("silent on every required channel"), "{run}");
    assert!(run["measured"]["detection_ms"].as_u64().is_some_and(|ms| ms >= 1_000), "{run}");
    assert!(!host.serves(), "the host has stopped by itself");
    let first_us = step(&run, "fence")["ended_us"].as_u64().unwrap();
    assert!(host.see().served_us < first_us, "the host had stopped when the box began");
    assert_eq!(inside.get("runs").as_array().map(Vec::len), Some(1), "one takeover for one silence");
    let owned = status(&inside)["ownership"].clone();
    assert_eq!((&owned["owner"], &owned["hold"]), (&json!("box"), &json!("standing")), "{owned}");
    let page = inside.metrics(&data);
    for line in ["holdfast_host_owner{host=\"db1\",owner=\"box\"} 1", "holdfast_host_verdict{host=\"db1\""] {
        assert!(page.contains(line), "{page}");
    }
    assert_eq!(inside.refused("PUT", "plans/db1", &plan("")), "plan-in-use");
    let adopt = json!({ "owner": "host", "confirm": "db1" }).to_string();
    assert_eq!(inside.refused("POST", "owners/db1", &adopt), "plan-in-use");

    // It comes back: it is told, and stays down.
    let term = owned["term"].as_u64().unwrap();
    host.see().is_cut = false;
    host.wait("the truth", |h| h.term == term);
    assert!(!host.serves());
    end_machine(&data, run["id"].as_str().unwrap());
    // Ended: what the machine wrote is thrown away, and the host's services are its own again.
    let id = run["id"].as_str().unwrap();
    inside.ok("POST", &format!("runs/{id}/end"), &json!({ "confirm": "db1" }).to_string());
    assert_eq!(settled_end(&inside, id)["phase"]["how"], "discarded");
    host.wait("the services of the host", |h| h.holding == Holding::Serving && h.term > term);
    wait_fences(&inside);
    // Without its plan it is its own for good, and is told so last.
    inside.ok("DELETE", "plans/db1", "");
    host.wait("the end of the lease", |h| h.holding == Holding::Unfenced);
    host.wait("the end of the plan", |h| h.plan.as_ref().is_some_and(|p| p.services.is_empty()));
    assert!(inside.events(supervisor::Event::TakeoverDecided) == 1);
    drop(host);
    inside.stop();
}

#[test]
fn a_host_that_is_heard_is_never_served_beside_whatever_was_said_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let _end = EndMachines(data.clone());
    let inside = Inside::start(&data, "");
    let host = Leased::start(protected(&inside), inside.listen());
    let machine = "[machine]\ncpus = 1\nmemory_mib = 64\nagent = false\nshutdown_seconds_max = 1\n";
    inside.ok("PUT", "plans/db1", &format!("host = \"db1\"\n{machine}"));
    let wish = json!({ "plan": "db1", "kind": "failover", "source_is_off": "me" }).to_string();
    let begin = || {
        let begun = inside.ok("POST", "runs", &wish);
        settled(&inside, begun["id"].as_str().unwrap())
    };
    wait_for("the host to be heard", || (begin()["phase"]["how"] == "refused").then_some(()));
    // Nor under another name.
    let group = inside.get("groups")[0]["name"].as_str().unwrap().to_owned();
    inside.ok("PUT", "plans/disks", &format!("groups = [{group:?}]\n{machine}"));
    let wish_by_group = json!({ "plan": "disks", "kind": "failover", "source_is_off": "me" }).to_string();
    let refused = settled(&inside, inside.ok("POST", "runs", &wish_by_group)["id"].as_str().unwrap());
    assert_eq!(refused["phase"]["how"], "refused", "{refused}");
    host.see().is_cut = true;
    let run = wait_for("the takeover", || Some(begin()).filter(|run| run["phase"]["is"] == "serving"));
    let id = run["id"].as_str().unwrap();
    let again = || inside.ok("POST", &format!("runs/{id}/again"), "{\"source_is_off\":\"me\"}");
    let failed = |step_name: &str| {
        let run = wait_for("the refusal", || {
            let run = inside.get(&format!("runs/{id}"));
            (run["phase"] == json!({ "is": "failed", "step": step_name })).then_some(run)
        });
        step(&run, step_name)["outcome"]["text"].as_str().unwrap().to_owned()
    };
    // Somebody switches the host on; then the machine dies.
    host.see().is_cut = false;
    wait_for("the host to be heard again", || {
        inside.get("hosts")[0]["connected"].as_bool().unwrap_or(false).then_some(())
    });
    end_machine(&data, id);
    assert!(failed("start").contains("the host serves"));
    again();
    assert!(failed("fence").contains("said to be off, but the agent of db1 is connected"));
    host.see().is_cut = true;
    wait_for("the host to be off", || {
        again();
        Some(settled(&inside, id)).filter(|run| run["phase"]["is"] == "serving")
    });
    end_machine(&data, id);
    inside.ok("POST", &format!("runs/{id}/end"), &json!({ "confirm": "db1" }).to_string());
    assert_eq!(settled_end(&inside, id)["phase"]["how"], "discarded");
    drop(host);
    inside.stop();
}

/// Nothing in it would hear that it is to shut down, which it is given a minute and a half for.
fn end_machine(data: &Path, id: &str) {
    let pid = std::fs::read_to_string(data.join("takeovers").join(id).join("pid")).expect("a machine");
    let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

fn settled_end(control: &impl Control, id: &str) -> Value {
    wait_for("the run to end", || {
        let run = control.get(&format!("runs/{id}"));
        (run["phase"]["is"] == "ended").then_some(run)
    })
}

#[test]
fn what_is_not_certain_is_an_alarm_once_and_no_takeover() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    let host = Leased::start(protected(&inside), inside.listen());
    host.see().refuses = Some("no [fence.services.web]".into());
    inside.ok("PUT", "plans/db1", &plan(DETECT));
    wait_for("the refusal", || (inside.events(supervisor::Event::HostPlanRefused) == 1).then_some(()));
    wait_for("the host to be seen", || (status(&inside)["seen"]["verdict"] == "well").then_some(()));
    wait_for("the uplink", || {
        status(&inside)["seen"]["reasons"].to_string().contains("peer 127.0.0.1 answers").then_some(())
    });
    let seen = status(&inside);
    assert!(seen["seen"]["in_the_way"].as_str().unwrap().contains("refuses the plan"), "{seen}");
    assert_eq!(seen["ownership"]["hold"], "standing", "what it has not taken is not armed");
    host.see().is_cut = true;
    let alarm = wait_for("an alarm", || status(&inside)["seen"]["alarm"].as_str().map(str::to_owned));
    assert!(alarm.contains("nothing is taken over by itself: its agent refuses the plan"), "{alarm}");
    let told = inside.events(supervisor::Event::TakeoverDoubt);
    // By hand neither, without a word.
    let begun = inside.ok("POST", "runs", &json!({ "plan": "db1", "kind": "failover" }).to_string());
    let run = settled(&inside, begun["id"].as_str().unwrap());
    assert_eq!(run["phase"], json!({ "is": "ended", "how": "refused" }), "{run}");
    assert!(step(&run, "check")["outcome"]["text"].as_str().unwrap().contains("its lease does not fence it"), "{run}");
    assert!(inside.get("status").to_string().contains("nothing is taken over by itself"), "an alert for the status");
    assert_eq!(inside.events(supervisor::Event::TakeoverDoubt), told, "said once");
    assert_eq!(inside.events(supervisor::Event::TakeoverDecided), 0);
    host.see().is_cut = false;
    wait_for("the alarm to be over", || status(&inside)["seen"]["alarm"].is_null().then_some(()));
    assert!(host.serves());
    // What an agent of its version could not even read is not sent to it.
    host.see().refuses = None;
    let probe = "[[detect.probe]]\nname = \"shop\"\nkind = { https = { address = \"127.0.0.1:443\", path = \"/\" } }\n";
    inside.ok("PUT", "plans/db1", &plan(&format!("{DETECT}{probe}")));
    wait_for("the refusal in its place", || {
        let said = status(&inside)["ownership"]["alerts"].to_string();
        said.contains("it is too old for the https probe shop: update it").then_some(())
    });
    inside.ok("PUT", "plans/db1", &plan(DETECT));
    wait_fences(&inside);
    drop(host);
    inside.stop();
}

/// A link with a neighbour that drops pings, in a network of this test's own; both go with the test.
struct Neighbour(String);

impl Neighbour {
    const ADDRESS: &str = "192.0.2.9";

    /// The calling thread, and those it starts from now on, are on the link. None: not root.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: ARP to a neighbour: needs root (network namespaces)");
            return None;
        }
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace");
        let this = Self(format!("hf-arp-{}", std::process::id()));
        ip(&["netns", "add", &this.0]);
        ip(&["link", "set", "lo", "up"]);
        ip(&["link", "add", "near", "type", "veth", "peer", "name", "far", "netns", &this.0]);
        ip(&["address", "add", "192.0.2.1/24", "dev", "near"]);
        ip(&["link", "set", "near", "up"]);
        this.there(&["ip", "address", "add", "192.0.2.9/24", "dev", "far"]);
        this.there(&["ip", "link", "set", "far", "up"]);
        this.there(&["sysctl", "-qw", "net.ipv4.icmp_echo_ignore_all=1"]);
        Some(this)
    }
    fn there(&self, command: &[&str]) {
        ip(&[&["netns", "exec", &self.0], command].concat());
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = std::process::Command::new("ip").args(["netns", "delete", &self.0]).status();
    }
}

fn ip(args: &[&str]) {
    let out = std::process::Command::new("ip").args(args).output().expect("ip");
    assert!(out.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn a_host_that_drops_pings_is_seen_by_its_network_card() {
    let Some(neighbour) = Neighbour::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let _end = EndMachines(data.clone());
    let inside = Inside::start(&data, "");
    let host = Leased::start(protected(&inside), inside.listen());
    let detect = |address: &str| {
        plan(&format!(
            "[detect]\nautomatic = true\nhold_ms = 100\naddress = \"{address}\"\nchannels = [\n\
             {{ channel = \"stream\", period_ms = 500, missed_max = 4 }},\n{{ channel = \"arp\", period_ms = 500, missed_max = 4 }},\n\
             {{ channel = \"icmp\", period_ms = 500, missed_max = 4, weight = \"advisory\" }},\n]\n\
             [detect.uplink]\nothers = [\"127.0.0.1\"]\n"
        ))
    };
    let refused = inside.refused("PUT", "plans/db1", &detect("2001:db8::9"));
    assert_eq!(refused, "bad-plan", "ARP knows no IPv6");
    // What is behind a router cannot be asked, and that is said beforehand.
    inside.ok("PUT", "plans/db1", &detect("198.51.100.9"));
    wait_for("what is in the way", || {
        let seen = status(&inside)["seen"].clone();
        seen["in_the_way"].as_str().is_some_and(|w| w.contains("198.51.100.9 is on no link of this box")).then_some(())
    });
    inside.ok("PUT", "plans/db1", &detect(Neighbour::ADDRESS));
    wait_fences(&inside);
    let reasons = || status(&inside)["seen"]["reasons"].to_string();
    wait_for("ARP and the uplink", || {
        let reasons = reasons();
        let both = reasons.contains("ARP: heard") && reasons.contains("peer 127.0.0.1 answers");
        (both && status(&inside)["seen"]["in_the_way"].is_null()).then_some(())
    });
    assert!(!reasons().contains("ping: heard"), "it drops pings: {}", reasons());

    // Cut off from the box's port and alive on the link.
    host.see().is_cut = true;
    let alarm = wait_for("an alarm", || status(&inside)["seen"]["alarm"].as_str().map(str::to_owned));
    assert!(alarm.contains("some channels are silent and others show life"), "{alarm}");
    thread::sleep(Duration::from_secs(5));
    assert_eq!(inside.get("runs"), json!([]), "its card answers");
    // Its card does not answer any more.
    neighbour.there(&["ip", "link", "set", "far", "down"]);
    let begun = wait_for("a takeover with no hand on it", || inside.get("runs")[0].as_object().cloned());
    let decision = begun["decision"].as_str().unwrap().to_owned();
    assert!(decision.contains("ARP: silent"), "{decision}");
    settled(&inside, begun["id"].as_str().unwrap());
    drop(host);
    inside.stop();
}

/// One takeover of a leased host, with its box killed again and again on the way.
fn killed_on_the_way(data: &Path, host: &Leased, running: Outside, rng: &mut Rng, is_cut: bool) -> Outside {
    let mut running = running;
    host.see().is_cut = is_cut;
    let begun = running.ok("POST", "runs", &json!({ "plan": "db1", "kind": "failover" }).to_string());
    let id = begun["id"].as_str().unwrap().to_owned();
    for _ in 0..6 {
        // Wherever it has come to by then: that is the point.
        thread::sleep(Duration::from_millis(rng.below(700)));
        running.kill();
        running = Outside::start(data);
        host.see().at = running.listen();
    }
    let run = wait_for("the run to settle", || {
        let run = running.get(&format!("runs/{id}"));
        // Whoever sees the box own it must find the host stopped.
        if status(&running)["ownership"]["owner"] == "box" {
            assert!(!host.serves(), "two would serve");
        }
        matches!(run["phase"]["is"].as_str(), Some("failed" | "ended")).then_some(run)
    });
    assert_eq!(run["phase"], json!({ "is": "failed", "step": "boot" }), "{run}");
    assert_eq!(run["fenced"]["by"], "lease", "{run}");
    assert!(host.see().served_us < step(&run, "start")["ended_us"].as_u64().unwrap(), "the host had stopped: {run}");
    assert!(!host.serves());
    host.see().is_cut = false;
    end_machine(data, &id);
    running.ok("POST", &format!("runs/{id}/end"), &json!({ "confirm": "db1" }).to_string());
    running.kill();
    running = Outside::start(data);
    host.see().at = running.listen();
    // Killed before its end was kept, it is ended again.
    wait_for("the run to end", || match running.get(&format!("runs/{id}"))["phase"]["is"].as_str() {
        Some("ended") => Some(()),
        Some("failed") => {
            running.ok("POST", &format!("runs/{id}/end"), &json!({ "confirm": "db1" }).to_string());
            None
        }
        _ => None,
    });
    host.wait("the services of the host", |h| h.holding == Holding::Serving);
    running
}

#[test]
fn a_host_is_fenced_whenever_its_box_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let inside = Inside::start(&data, "");
    let identity = protected(&inside);
    inside.ok("PUT", "plans/db1", &plan(""));
    inside.stop();
    let mut rng = Rng::new(11);
    let mut running = Outside::start(&data);
    let host = Leased::start(identity, running.listen());
    // Cut off, so that only the lease's end shows that it has stopped; then heard, by its own word.
    for is_cut in [true, false, true] {
        wait_fences(&running);
        running = killed_on_the_way(&data, &host, running, &mut rng, is_cut);
    }
    // A lease survives its box's death.
    running.kill();
    running = Outside::start(&data);
    host.see().at = running.listen();
    wait_fences(&running);
    assert_eq!(host.see().holding, Holding::Serving);
    running.terminate();
}

#[test]
fn a_host_that_lives_is_moved_and_what_fails_before_it_served_is_undone() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let _end = EndMachines(data.clone());
    let mut inside = Inside::start(&data, "");
    let host = Leased::start(protected(&inside), inside.listen());
    let with = |more: &str| {
        plan("").replace("boot_seconds_max = 2\n", &format!("boot_seconds_max = 2\nshutdown_seconds_max = 1\n{more}"))
    };
    let wish = json!({ "plan": "db1", "kind": "failover", "planned": true });
    let begin = |inside: &Inside| {
        let begun = inside.ok("POST", "runs", &wish.to_string());
        settled(inside, begun["id"].as_str().unwrap())
    };
    let late = json!({ "plan": "db1", "kind": "failover", "planned": true, "source_is_off": "me" });
    assert_eq!(inside.refused("POST", "runs", &late.to_string()), "bad-request");
    // Without a lease it cannot be told to stop; one that is away cannot either.
    inside.ok("PUT", "plans/db1", "host = \"db1\"\n[machine]\ncpus = 1\nmemory_mib = 64\n");
    let run = begin(&inside);
    assert_eq!(run["phase"]["how"], "refused", "{run}");
    assert!(step(&run, "check")["outcome"]["text"].as_str().unwrap().contains("no [lease]"), "{run}");
    inside.ok("PUT", "plans/db1", &with(""));
    wait_fences(&inside);
    host.see().is_cut = true;
    wait_for("it to be away", || (inside.get("hosts")[0]["connected"] == false).then_some(()));
    let run = begin(&inside);
    assert!(step(&run, "check")["outcome"]["text"].as_str().unwrap().contains("not there"), "{run}");
    host.see().is_cut = false;
    wait_fences(&inside);
    host.wait("the lease", |h| h.holding == Holding::Serving);

    // Nothing inside answers: the new place has served nobody, and the host serves on.
    let term = host.see().term;
    wait_for("it to be seen", || (inside.get("hosts")[0]["connected"] == true).then_some(()));
    let run = begin(&inside);
    assert_eq!(run["phase"], json!({ "is": "ended", "how": "undone" }), "{run}");
    assert!(step(&run, "boot")["outcome"]["text"].as_str().unwrap().contains("nothing inside has answered"), "{run}");
    host.wait("its services again", |h| h.holding == Holding::Serving && h.term > term);
    assert_eq!(inside.get("groups").as_array().map(Vec::len), Some(1), "nothing of it is left");

    // Now it goes, by the host's own word, whatever its daemon does on the way.
    inside.ok("PUT", "plans/db1", &with("agent = false\n"));
    wait_fences(&inside);
    let id = inside.ok("POST", "runs", &wish.to_string())["id"].as_str().unwrap().to_owned();
    wait_for("the host to be told", || {
        let run = inside.get(&format!("runs/{id}"));
        run["steps"].as_array().unwrap().iter().any(|s| s["step"] == "fence").then_some(())
    });
    inside.stop();
    inside = Inside::start(&data, "");
    host.see().at = inside.listen();
    let run = settled(&inside, &id);
    assert_eq!(run["phase"]["is"], "serving", "{run}");
    assert!(!host.serves());
    assert_eq!(run["fenced"]["by"], "lease", "{run}");
    assert!(run["fenced"]["how"].as_str().unwrap().contains("said that it has stopped"), "{run}");
    let fence = step(&run, "fence");
    let served_us = run["begun_us"].as_u64().unwrap() + run["measured"]["serving_ms"].as_u64().unwrap() * 1000;
    let pause_us = served_us - fence["begun_us"].as_u64().unwrap();
    let said_ms = run["measured"]["pause_ms"].as_u64().expect("the pause");
    assert!(
        said_ms.abs_diff(pause_us / 1000) <= 1,
        "the pause is from the order to stop until something serves: {run}"
    );
    assert!(host.see().served_us < step(&run, "start")["ended_us"].as_u64().unwrap(), "never two");
    inside.ok("POST", &format!("runs/{id}/end"), &json!({ "confirm": "db1" }).to_string());
    assert_eq!(settled_end(&inside, &id)["phase"]["how"], "discarded");
    host.wait("its services once more", |h| h.holding == Holding::Serving);
    drop(host);
    inside.stop();
}
