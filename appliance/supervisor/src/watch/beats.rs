//! The box's end of the heartbeat datagrams ([`wire::Beat`]): one UDP socket at the port agents connect to.
//!
//! It is opened when the first plan wants datagrams, and is closed with the daemon. Who does not know a host's key gets no answer at all.

use model::{HostId, MonoTime};
use std::{
    collections::BTreeMap,
    net::{SocketAddr, UdpSocket},
};
use wire::{BEAT_LEN, Beat, BeatFilter};

/// A new challenge so often; the one before is still good.
const CHALLENGE_MS: u64 = 5_000;
const READ_MAX: usize = 1_000;

struct OfHost {
    key: [u8; 32],
    filter: BeatFilter,
    /// The agent's connections, to know when it began anew.
    connections: u64,
}

pub struct Beats {
    socket: Result<UdpSocket, String>,
    hosts: BTreeMap<HostId, OfHost>,
    challenged: Option<MonoTime>,
}

impl Beats {
    pub fn open(at: SocketAddr) -> Self {
        let socket = UdpSocket::bind(at).and_then(|s| s.set_nonblocking(true).map(|()| s));
        let socket = socket.map_err(|e| format!("heartbeat datagrams cannot be heard at UDP {at}: {e}"));
        Self { socket, hosts: BTreeMap::new(), challenged: None }
    }
    pub fn fault(&self) -> Option<&str> {
        self.socket.as_ref().err().map(String::as_str)
    }

    /// Whose datagrams are heard, and with which key.
    pub fn set(&mut self, keys: &BTreeMap<HostId, ([u8; 32], u64)>) {
        self.hosts.retain(|host, _| keys.contains_key(host));
        for (host, (key, connections)) in keys {
            let fresh = || OfHost { key: *key, filter: BeatFilter::default(), connections: *connections };
            let of = self.hosts.entry(*host).or_insert_with(|| {
                self.challenged = None;
                fresh()
            });
            if of.key != *key {
                *of = fresh();
                self.challenged = None;
            }
            if of.connections != *connections {
                of.connections = *connections;
                of.filter.begin_anew();
            }
        }
    }

    /// Draws challenges, answers, and says who was heard. `draw`: a number nobody can guess.
    pub fn hear(&mut self, now: MonoTime, draw: impl Fn() -> Option<u64>) -> Vec<HostId> {
        let Ok(socket) = &self.socket else { return Vec::new() };
        if self.challenged.is_none_or(|at| now.ms_since(at) >= CHALLENGE_MS) {
            self.challenged = Some(now);
            for of in self.hosts.values_mut() {
                if let Some(drawn) = draw() {
                    of.filter.challenge(drawn);
                }
            }
        }
        let mut heard = Vec::new();
        let mut bytes = [0; BEAT_LEN + 1];
        for _ in 0..READ_MAX {
            let Ok((len, from)) = socket.recv_from(&mut bytes) else { break };
            let Ok(host) = Beat::claimed_host(&bytes[..len]) else { continue };
            let Some(of) = self.hosts.get_mut(&host) else { continue };
            let Ok(beat) = Beat::decode(&bytes[..len], &of.key) else { continue };
            if let Some(answer) = of.filter.answer(&beat, now) {
                // Lost, it is one beat.
                let _ = socket.send_to(&answer.encode(&of.key), from);
            }
            if of.filter.counts(&beat) {
                heard.push(host);
            }
        }
        heard
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use wire::BeatFrom;

    #[test]
    fn a_beat_counts_with_key_and_todays_challenge_and_never_twice() {
        let mut beats = Beats::open("127.0.0.1:0".parse().unwrap());
        let at = beats.socket.as_ref().unwrap().local_addr().unwrap();
        let (host, key) = (HostId([1; 16]), [9; 32]);
        beats.set(&[(host, (key, 1))].into());
        let agent = UdpSocket::bind("127.0.0.1:0").unwrap();
        agent.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let beat = |number, echo| Beat { from: BeatFrom::Agent, host, number, echo, mono: MonoTime(1) };
        let send = |bytes: &[u8]| assert_eq!(agent.send_to(bytes, at).unwrap(), bytes.len());
        let answer = || {
            let mut bytes = [0; 128];
            let (len, _) = agent.recv_from(&mut bytes).expect("an answer");
            Beat::decode(&bytes[..len], &key).unwrap()
        };
        // On loopback a datagram is there when the call that sends it returns.
        let hear = |beats: &mut Beats, ms| beats.hear(MonoTime::from_ms(ms), || Some(ms + 100));
        send(&beat(5, 0).encode(&key));
        assert_eq!(hear(&mut beats, 0), [], "it cannot know the challenge yet");
        let echo = answer().echo;
        let good = beat(6, echo).encode(&key);
        send(&good);
        assert_eq!(hear(&mut beats, 10), [host]);
        answer();
        send(&good);
        assert_eq!(hear(&mut beats, 20), [], "recorded and sent again");
        answer();
        send(&beat(7, echo).encode(&[8; 32]));
        send(b"HFB1");
        send(&beat(7, 1).encode(&key));
        assert_eq!(hear(&mut beats, 30), [], "forged, cut off, and with a challenge of no time");
        assert_eq!(answer().number, 7, "only who knows the key gets an answer");
        // Two challenges later the echo is of the past.
        assert_eq!(hear(&mut beats, 6_000), []);
        assert_eq!(hear(&mut beats, 12_000), []);
        send(&beat(8, echo).encode(&key));
        assert_eq!(hear(&mut beats, 12_001), []);
        let echo = answer().echo;
        // A rebooted agent counts from the beginning; its connection proves who it is.
        beats.set(&[(host, (key, 2))].into());
        send(&beat(1, echo).encode(&key));
        assert_eq!(hear(&mut beats, 12_002), [host]);
        beats.set(&BTreeMap::new());
        send(&beat(2, echo).encode(&key));
        assert_eq!(hear(&mut beats, 12_003), [], "nobody watches it any more");
    }
}
