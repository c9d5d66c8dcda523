//! The second channel: this host's heartbeat datagrams ([`wire::Beat`]), from a thread that waits for nobody.
//!
//! The engine may be slow, its queue full, the stream's TCP connection in backoff: beats go on, and say that the host lives. The thread shares
//! nothing with them but the process. It hears challenges from the box and sends each back in the next beat; without today's challenge a beat
//! counts for nothing.
//!
//! Sent to the address that the agent has of its box, at the port that the plan says; to all of a name's addresses until one has answered. A box
//! that has not answered for [`UNANSWERED`] is looked up anew, by another thread: a name service that hangs silences nobody.

use crate::{clock, net};
use model::{HostId, MonoTime};
use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};
use wire::{BEAT_LEN, Beat, BeatFrom, PlanBeat};

const UNANSWERED: Duration = Duration::from_secs(10);
/// How soon the thread sees that it is to end.
const END_LOOK: Duration = Duration::from_millis(200);
/// Answers to older beats tell no news.
const ANSWER_AGE_MS_MAX: u64 = 10_000;
/// At one go: a flood of strangers' datagrams must not hold up the beat.
const READ_MAX: usize = 64;

/// Sends beats until it is dropped.
pub struct Beats {
    plan: PlanBeat,
    over: Arc<AtomicBool>,
}

impl Beats {
    /// `box_address`: `HOST:PORT` as the agent has it; the port is the plan's.
    pub fn start(host: HostId, box_address: String, plan: PlanBeat) -> io::Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let mut sender = Sender {
            host,
            box_address,
            plan,
            sockets: Vec::new(),
            addresses: Vec::new(),
            answered: None,
            heard: Instant::now(),
            lookup: None,
            echo: 0,
        };
        let ends = Arc::clone(&over);
        thread::Builder::new().name("beats".to_owned()).spawn(move || {
            while !ends.load(Ordering::Acquire) {
                sender.turn(&ends);
            }
        })?;
        Ok(Self { plan, over })
    }
    pub fn is(&self, plan: PlanBeat) -> bool {
        self.plan == plan
    }
}

impl Drop for Beats {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
    }
}

struct Sender {
    host: HostId,
    box_address: String,
    plan: PlanBeat,
    /// One for each family.
    sockets: Vec<(bool, UdpSocket)>,
    addresses: Vec<SocketAddr>,
    /// The one that has answered.
    answered: Option<SocketAddr>,
    heard: Instant,
    lookup: Option<mpsc::Receiver<Vec<SocketAddr>>>,
    echo: u64,
}

impl Sender {
    /// One beat, and what is heard until the next is due.
    fn turn(&mut self, ends: &AtomicBool) {
        let next = Instant::now() + Duration::from_millis(self.plan.period_ms.max(1));
        self.look_up();
        self.send();
        while !ends.load(Ordering::Acquire) {
            let Some(left) = next.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) else { return };
            if self.wait(left.min(END_LOOK)) {
                self.receive();
            }
        }
    }

    fn look_up(&mut self) {
        if let Some(found) = self.lookup.as_ref().map(mpsc::Receiver::try_recv) {
            match found {
                Ok(found) => {
                    if !found.is_empty() {
                        self.addresses = found;
                    }
                    self.lookup = None;
                }
                Err(mpsc::TryRecvError::Disconnected) => self.lookup = None,
                Err(mpsc::TryRecvError::Empty) => {}
            }
        }
        let silent = self.heard.elapsed() >= UNANSWERED;
        if self.lookup.is_some() || !(self.addresses.is_empty() || silent) {
            return;
        }
        if silent {
            (self.answered, self.heard) = (None, Instant::now());
        }
        let (to, from) = mpsc::channel();
        let (address, port) = (self.box_address.clone(), self.plan.port);
        let spawned = thread::Builder::new().name("beats-lookup".to_owned()).spawn(move || {
            let found = net::resolve(&address).unwrap_or_default();
            let _ = to.send(found.into_iter().map(|at| SocketAddr::new(at.ip(), port)).collect());
        });
        if spawned.is_ok() {
            self.lookup = Some(from);
            // An address that needs no name service is there at once.
            if self.addresses.is_empty()
                && let Some(Ok(found)) = self.lookup.as_ref().map(|l| l.recv_timeout(END_LOOK))
            {
                (self.addresses, self.lookup) = (found, None);
            }
        }
    }

    fn send(&mut self) {
        // By the clock of the boot, so that the next agent's numbers are higher than this one's.
        let now = clock::boot();
        let beat = Beat { from: BeatFrom::Agent, host: self.host, number: now.0, echo: self.echo, mono: now };
        let bytes = beat.encode(&self.plan.key);
        let all = self.answered.map_or_else(|| self.addresses.clone(), |at| vec![at]);
        for at in all {
            // A network that is not there is one beat less; there may be one at the next.
            if let Ok(socket) = self.socket(at.is_ipv4()) {
                let _ = socket.send_to(&bytes, at);
            }
        }
    }

    fn socket(&mut self, is_v4: bool) -> io::Result<&UdpSocket> {
        if let Some(at) = self.sockets.iter().position(|(v4, _)| *v4 == is_v4) {
            return Ok(&self.sockets[at].1);
        }
        let any: SocketAddr = if is_v4 { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
        let socket = UdpSocket::bind(any)?;
        socket.set_nonblocking(true)?;
        self.sockets.push((is_v4, socket));
        Ok(&self.sockets[self.sockets.len() - 1].1)
    }

    /// Whether there is something to be read.
    fn wait(&self, limit: Duration) -> bool {
        let of = |(_, s): &(bool, UdpSocket)| libc::pollfd { fd: s.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut polls: Vec<libc::pollfd> = self.sockets.iter().map(of).collect();
        let ms = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX).max(1);
        // SAFETY: so many entries, alive for the call.
        unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, ms) > 0 }
    }

    fn receive(&mut self) {
        let mut bytes = [0; BEAT_LEN + 1];
        let now = clock::boot();
        for (_, socket) in &self.sockets {
            for _ in 0..READ_MAX {
                // An error of an earlier datagram is told here: one beat is lost.
                let Ok((len, from)) = socket.recv_from(&mut bytes) else { break };
                let Ok(answer) = Beat::decode(&bytes[..len], &self.plan.key) else { continue };
                let age = now.ms_since(MonoTime(answer.number));
                let ours = answer.from == BeatFrom::Box && answer.host == self.host && answer.number <= now.0;
                if ours && age <= ANSWER_AGE_MS_MAX {
                    (self.echo, self.heard, self.answered) = (answer.echo, Instant::now(), Some(from));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::BeatFilter;

    #[test]
    fn beats_count_at_a_box_that_answers_and_go_on_when_it_does_not() {
        let at_box = UdpSocket::bind("127.0.0.1:0").unwrap();
        at_box.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let (host, key) = (HostId([3; 16]), [9; 32]);
        let plan = PlanBeat { port: at_box.local_addr().unwrap().port(), period_ms: 20, key };
        // The agent's own port is of no matter.
        let beats = Beats::start(host, "127.0.0.1:1".into(), plan).unwrap();
        assert!(beats.is(plan) && !beats.is(PlanBeat { key: [1; 32], ..plan }));
        let mut filter = BeatFilter::default();
        let hear = || {
            let mut bytes = [0; 128];
            let (len, from) = at_box.recv_from(&mut bytes).expect("a beat");
            (Beat::decode(&bytes[..len], &key).expect("with the key"), from)
        };
        let mut last = 0;
        for _ in 0..5 {
            let (beat, _) = hear();
            assert!(beat.number > last, "numbers go up");
            last = beat.number;
            assert!(!filter.counts(&beat), "unanswered, it knows no challenge");
        }
        filter.challenge(77);
        let mut counted = 0;
        for _ in 0..200 {
            let (beat, from) = hear();
            counted += u32::from(filter.counts(&beat));
            if counted == 5 {
                break;
            }
            let answer = filter.answer(&beat, MonoTime(1)).expect("a challenge");
            // Forged answers and noise change nothing.
            let forged = Beat { echo: 1, ..answer };
            at_box.send_to(&forged.encode(&[8; 32]), from).unwrap();
            at_box.send_to(&Beat { host: HostId([4; 16]), echo: 1, ..answer }.encode(&key), from).unwrap();
            at_box.send_to(&Beat { number: 1, echo: 1, ..answer }.encode(&key), from).unwrap();
            at_box.send_to(b"noise", from).unwrap();
            at_box.send_to(&answer.encode(&key), from).unwrap();
        }
        assert_eq!(counted, 5, "beats that echo the challenge count");
        drop(beats);
    }
}
