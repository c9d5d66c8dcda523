//! Echo requests to hosts and to what proves the uplink, over IPv4 and IPv6.
//!
//! An answer counts when it comes from the address that was asked and carries what was sent: eight bytes drawn at the start, which nobody off
//! the path knows, and the number of one of the last requests.
//!
//! # Limits
//!
//! Raw sockets need `CAP_NET_RAW`; without it, datagram sockets of the kernel's are tried, which `net.ipv4.ping_group_range` allows. With neither
//! there is no ping, which is said. So many answers are read at a time that a flood of strangers' ones cannot hold up the rest.

use model::MonoTime;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr, UdpSocket},
};

/// Answers to older requests than so many do not count.
const LATE_MAX: u64 = 8;
const READ_MAX: usize = 1_000;

struct Socket {
    // The kernel takes an echo like a datagram.
    socket: UdpSocket,
    /// Raw ones of IPv4 bring the packet's header along.
    has_header: bool,
}

struct Target {
    next: MonoTime,
    period_ms: u64,
    number: u64,
}

/// See the module.
pub struct Pinger {
    v4: Result<Socket, String>,
    v6: Result<Socket, String>,
    key: [u8; 8],
    targets: BTreeMap<IpAddr, Target>,
}

impl Pinger {
    pub fn new(key: [u8; 8]) -> Self {
        let v4 = open(AddressFamily::Inet, SockProtocol::Icmp);
        let v6 = open(AddressFamily::Inet6, SockProtocol::IcmpV6);
        Self { v4, v6, key, targets: BTreeMap::new() }
    }

    /// Why an address cannot be asked, if so.
    pub fn fault(&self, address: IpAddr) -> Option<&str> {
        self.of(address).as_ref().err().map(String::as_str)
    }
    fn of(&self, address: IpAddr) -> &Result<Socket, String> {
        if address.is_ipv4() { &self.v4 } else { &self.v6 }
    }

    /// Asks these and no others, each so often.
    pub fn set(&mut self, wanted: &BTreeMap<IpAddr, u64>, now: MonoTime) {
        self.targets.retain(|address, _| wanted.contains_key(address));
        for (address, period_ms) in wanted {
            let target = self.targets.entry(*address).or_insert(Target { next: now, period_ms: *period_ms, number: 0 });
            target.period_ms = *period_ms;
        }
    }

    /// Sends what is due.
    pub fn send(&mut self, now: MonoTime) {
        let due: Vec<IpAddr> = self.targets.iter().filter(|(_, t)| now >= t.next).map(|(a, _)| *a).collect();
        for address in due {
            let Some(target) = self.targets.get_mut(&address) else { continue };
            target.number += 1;
            target.next = now.plus_ms(target.period_ms);
            let packet = request(address, self.key, target.number);
            if let Ok(socket) = self.of(address) {
                // A network that is not there is silence like any other.
                let _ = socket.socket.send_to(&packet, SocketAddr::new(address, 0));
            }
        }
    }

    /// Who has answered since the last time.
    pub fn receive(&mut self) -> Vec<IpAddr> {
        let mut answered = Vec::new();
        for socket in [&self.v4, &self.v6].into_iter().flatten() {
            let mut packet = [0; 2048];
            for _ in 0..READ_MAX {
                let Ok((len, from)) = socket.socket.recv_from(&mut packet) else { break };
                let from = from.ip().to_canonical();
                let number = self.targets.get(&from).map(|t| t.number);
                let number_said = answer(&packet[..len], socket.has_header, from.is_ipv4(), self.key);
                if let (Some(ours), Some(said)) = (number, number_said)
                    && said <= ours
                    && ours - said < LATE_MAX
                {
                    answered.push(from);
                }
            }
        }
        answered
    }
}

fn open(family: AddressFamily, protocol: SockProtocol) -> Result<Socket, String> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let raw = socket(family, SockType::Raw, flags, protocol);
    let has_header = raw.is_ok() && family == AddressFamily::Inet;
    let opened = raw.or_else(|_| socket(family, SockType::Datagram, flags, protocol));
    let fd = opened.map_err(|e| {
        format!("this box may not ping ({e}): give the daemon CAP_NET_RAW, or set net.ipv4.ping_group_range")
    })?;
    Ok(Socket { socket: UdpSocket::from(fd), has_header })
}

/// Type, code, checksum, identifier, sequence, then the key and the number.
fn request(to: IpAddr, key: [u8; 8], number: u64) -> [u8; 24] {
    let mut packet = [0; 24];
    packet[0] = if to.is_ipv4() { 8 } else { 128 };
    packet[4..6].copy_from_slice(&key[..2]);
    packet[6..8].copy_from_slice(&(number as u16).to_be_bytes());
    packet[8..16].copy_from_slice(&key);
    packet[16..].copy_from_slice(&number.to_be_bytes());
    // The kernel makes that of IPv6, which covers addresses too.
    if to.is_ipv4() {
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

fn checksum(packet: &[u8]) -> u16 {
    let words = packet.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The number in an answer to one of ours.
fn answer(packet: &[u8], has_header: bool, is_v4: bool, key: [u8; 8]) -> Option<u64> {
    let from = match (has_header, packet.first()?) {
        (true, first) => usize::from(first & 0xf) * 4,
        (false, _) => 0,
    };
    let echo = packet.get(from..)?;
    let kind = if is_v4 { 0 } else { 129 };
    if *echo.first()? != kind || echo.get(8..16)? != key {
        return None;
    }
    Some(u64::from_be_bytes(echo.get(16..24)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{thread::sleep, time::Duration};

    #[test]
    fn only_an_answer_with_our_key_counts() {
        let (key, v4) = ([7; 8], "192.0.2.1".parse().unwrap());
        let sent = request(v4, key, 0x0102);
        assert_eq!(checksum(&sent), 0, "a packet with its checksum sums up to nothing");
        assert_eq!(answer(&sent, false, true, key), None, "a request is no answer");
        let mut came = sent;
        came[0] = 0;
        assert_eq!(answer(&came, false, true, key), Some(0x0102));
        assert_eq!(answer(&came, false, true, [8; 8]), None);
        assert_eq!(answer(&came, false, false, key), None, "another protocol's number");
        let whole: Vec<u8> = [&[0x46u8; 24][..], &came].concat();
        assert_eq!(answer(&whole, true, true, key), Some(0x0102), "behind a header of 24 bytes");
        for len in 0..whole.len() {
            assert_eq!(answer(&whole[..len], true, true, key), None, "{len}");
        }
    }

    #[test]
    fn this_machine_answers_itself_and_nobody_else_does() {
        let mut pinger = Pinger::new([3; 8]);
        let here: IpAddr = "127.0.0.1".parse().unwrap();
        if let Some(fault) = pinger.fault(here) {
            assert!(fault.contains("CAP_NET_RAW"), "{fault}");
            println!("SKIPPED: {fault}");
            return;
        }
        let nowhere: IpAddr = "127.255.255.254".parse().unwrap();
        pinger.set(&[(here, 10), (nowhere, 10)].into(), MonoTime(0));
        let mut now = MonoTime(0);
        let mut heard = Vec::new();
        while !heard.contains(&here) {
            now = now.plus_ms(10);
            pinger.send(now);
            sleep(Duration::from_millis(5));
            heard.extend(pinger.receive());
            assert!(now < MonoTime::from_ms(100_000), "it never answered");
        }
        pinger.set(&[(nowhere, 10)].into(), now);
        heard.clear();
        for _ in 0..10 {
            now = now.plus_ms(10);
            pinger.send(now);
            heard.extend(pinger.receive());
        }
        assert!(!heard.contains(&here), "nobody asked it any more: {heard:?}");
    }
}
