//! ARP requests to hosts on the box's own links: a host's network card answers for its address where its firewall drops pings.
//!
//! One packet socket for all links. A host is asked on the link whose network has its address, the longest prefix first, from the box's own
//! address there; looked for anew with the plans, as links come and go. An answer counts when it is a reply, came by that link, is from
//! the address that was asked and to our card.
//!
//! # What it proves
//!
//! That somebody on the link answers for the address: a switch or router that does so for others (proxy ARP) and anybody who lies makes the host
//! look alive. That is an alarm where a takeover was due, and never the other way round.
//!
//! # Limits
//!
//! IPv4, and networks that the box is on: what is behind a router cannot be asked, which is said. Needs `CAP_NET_RAW`. At most [`READ_MAX`] packets
//! are read at a time, so that a flood cannot hold up the rest.

use model::MonoTime;
use std::{
    collections::BTreeMap,
    ffi::CStr,
    io, mem,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

const READ_MAX: usize = 1_000;
const ETHERTYPE: u16 = 0x0806;
const REQUEST: u8 = 1;
const REPLY: u8 = 2;
const PACKET_LEN: usize = 28;

/// One of the box's own links.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Link {
    index: i32,
    mac: [u8; 6],
    ours: Ipv4Addr,
    bits: u32,
}

struct Target {
    next: MonoTime,
    period_ms: u64,
    link: Result<Link, String>,
}

/// See the module.
pub struct Arp {
    socket: Result<OwnedFd, String>,
    targets: BTreeMap<Ipv4Addr, Target>,
}

impl Arp {
    /// Opens nothing: that is done when somebody is to be asked.
    pub fn new() -> Self {
        Self { socket: Err("nobody is asked by ARP".into()), targets: BTreeMap::new() }
    }

    /// Why an address cannot be asked, if so.
    pub fn fault(&self, address: IpAddr) -> Option<String> {
        let IpAddr::V4(v4) = address else {
            return Some(format!("{address} cannot be asked by ARP, which knows IPv4 only"));
        };
        let unasked = || Some(format!("{address} is not asked by ARP yet"));
        self.targets
            .get(&v4)
            .map_or_else(unasked, |t| t.link.as_ref().err().cloned())
            .or_else(|| self.socket.as_ref().err().cloned())
    }

    /// Asks these and no others, each so often.
    pub fn set(&mut self, wanted: &BTreeMap<IpAddr, u64>, now: MonoTime) {
        self.targets.retain(|address, _| wanted.contains_key(&IpAddr::V4(*address)));
        if wanted.is_empty() {
            return;
        }
        if self.socket.is_err() {
            self.socket = open()
                .map_err(|e| format!("this box may not ask by ARP ({e}): give the daemon CAP_NET_RAW and AF_PACKET"));
        }
        let links = links();
        for (address, period_ms) in wanted {
            let IpAddr::V4(v4) = *address else { continue };
            let link = match &links {
                Ok(links) => link_of(links, v4),
                Err(e) => Err(format!("the links of this box cannot be listed: {e}")),
            };
            let target =
                self.targets.entry(v4).or_insert(Target { next: now, period_ms: *period_ms, link: Err(String::new()) });
            (target.period_ms, target.link) = (*period_ms, link);
        }
    }

    /// Sends what is due.
    pub fn send(&mut self, now: MonoTime) {
        let Ok(socket) = &self.socket else { return };
        for (address, target) in self.targets.iter_mut().filter(|(_, t)| now >= t.next) {
            target.next = now.plus_ms(target.period_ms);
            if let Ok(link) = &target.link {
                // A link that is down is silence like any other.
                let _ = send(socket, link, *address);
            }
        }
    }

    /// Who has answered since the last time.
    pub fn receive(&mut self) -> Vec<IpAddr> {
        let mut answered = Vec::new();
        let Ok(socket) = &self.socket else { return answered };
        let mut packet = [0; 64];
        for _ in 0..READ_MAX {
            let Ok((len, index)) = receive(socket, &mut packet) else { break };
            let Some((from, to)) = reply(&packet[..len]) else { continue };
            let link = self.targets.get(&from).and_then(|t| t.link.as_ref().ok());
            if link.is_some_and(|l| l.index == index && l.mac == to) {
                answered.push(IpAddr::V4(from));
            }
        }
        answered
    }
}

fn link_of(links: &[Link], to: Ipv4Addr) -> Result<Link, String> {
    if links.iter().any(|l| l.ours == to) {
        return Err(format!("{to} is this box's own address"));
    }
    let mask = |bits: u32| u32::MAX.checked_shl(32 - bits).unwrap_or(0);
    let on = links.iter().filter(|l| (u32::from(l.ours) ^ u32::from(to)) & mask(l.bits) == 0);
    let no = || {
        format!("{to} is on no link of this box: ARP cannot ask it; use channel = \"icmp\", or give another address")
    };
    on.max_by_key(|l| l.bits).copied().ok_or_else(no)
}

/// Every link with an Ethernet address that is up, once for each of its addresses.
fn links() -> io::Result<Vec<Link>> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the pointer is ours to be written; the list is freed below.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let (mut cards, mut addresses) = (BTreeMap::new(), Vec::new());
    let mut next = list;
    while !next.is_null() {
        // SAFETY: an entry of the list, which lives until it is freed below.
        let entry = unsafe { &*next };
        next = entry.ifa_next;
        let usable =
            entry.ifa_flags & (libc::IFF_UP | libc::IFF_LOOPBACK | libc::IFF_NOARP) as u32 == libc::IFF_UP as u32;
        if entry.ifa_addr.is_null() || !usable {
            continue;
        }
        // SAFETY: a name with its end, of the entry.
        let name = unsafe { CStr::from_ptr(entry.ifa_name) }.to_owned();
        // SAFETY: an address of the entry; its family says what it is.
        match i32::from(unsafe { (*entry.ifa_addr).sa_family }) {
            libc::AF_PACKET => {
                // SAFETY: of that family, and so of that length.
                let at = unsafe { std::ptr::read_unaligned(entry.ifa_addr.cast::<libc::sockaddr_ll>()) };
                if at.sll_halen == 6 {
                    let mut mac = [0; 6];
                    mac.copy_from_slice(&at.sll_addr[..6]);
                    cards.insert(name, (at.sll_ifindex, mac));
                }
            }
            libc::AF_INET if !entry.ifa_netmask.is_null() => {
                let v4 = |at: *const libc::sockaddr| {
                    // SAFETY: of that family, and so of that length.
                    let at = unsafe { std::ptr::read_unaligned(at.cast::<libc::sockaddr_in>()) };
                    u32::from_be(at.sin_addr.s_addr)
                };
                addresses.push((name, Ipv4Addr::from(v4(entry.ifa_addr)), v4(entry.ifa_netmask).leading_ones()));
            }
            _ => {}
        }
    }
    // SAFETY: made by getifaddrs and freed once.
    unsafe { libc::freeifaddrs(list) };
    let link = |(name, ours, bits)| {
        // An address may have a label: `eth0:1`.
        let name: std::ffi::CString = name;
        let bare = name.as_bytes().split(|b| *b == b':').next().unwrap_or_default();
        let (index, mac) = *cards.iter().find(|(n, _)| n.as_bytes() == bare)?.1;
        Some(Link { index, mac, ours, bits })
    };
    Ok(addresses.into_iter().filter_map(link).collect())
}

fn open() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no preconditions; the descriptor is checked and owned right away.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(ETHERTYPE.to_be())) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Ethernet, IPv4, lengths, operation; then hardware and protocol address of the sender and of who is asked.
fn packet(operation: u8, mac: [u8; 6], ours: Ipv4Addr, to: Ipv4Addr) -> [u8; PACKET_LEN] {
    let mut packet = [0; PACKET_LEN];
    packet[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, operation]);
    packet[8..14].copy_from_slice(&mac);
    packet[14..18].copy_from_slice(&ours.octets());
    packet[24..].copy_from_slice(&to.octets());
    packet
}

/// Who replies, and to which card.
fn reply(packet: &[u8]) -> Option<(Ipv4Addr, [u8; 6])> {
    if packet.get(..8)? != [0, 1, 8, 0, 6, 4, 0, REPLY] {
        return None;
    }
    let from: [u8; 4] = packet.get(14..18)?.try_into().ok()?;
    Some((from.into(), packet.get(18..24)?.try_into().ok()?))
}

fn send(socket: &OwnedFd, link: &Link, to: Ipv4Addr) -> io::Result<()> {
    let packet = packet(REQUEST, link.mac, link.ours, to);
    let mut at: libc::sockaddr_ll = empty();
    at.sll_family = libc::AF_PACKET as u16;
    at.sll_protocol = ETHERTYPE.to_be();
    at.sll_ifindex = link.index;
    at.sll_halen = 6;
    at.sll_addr[..6].fill(0xff);
    let len = size_of_val(&at) as libc::socklen_t;
    // SAFETY: buffer and address are alive for the call and of the lengths given.
    let sent = unsafe {
        libc::sendto(socket.as_raw_fd(), packet.as_ptr().cast(), packet.len(), 0, (&raw const at).cast(), len)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A packet's length, and the link that it came by.
fn receive(socket: &OwnedFd, packet: &mut [u8]) -> io::Result<(usize, i32)> {
    let mut at: libc::sockaddr_ll = empty();
    let mut len = size_of_val(&at) as libc::socklen_t;
    // SAFETY: buffer and address are alive for the call and of the lengths given.
    let got = unsafe {
        libc::recvfrom(
            socket.as_raw_fd(),
            packet.as_mut_ptr().cast(),
            packet.len(),
            0,
            (&raw mut at).cast(),
            &raw mut len,
        )
    };
    usize::try_from(got).map(|got| (got, at.sll_ifindex)).map_err(|_| io::Error::last_os_error())
}

fn empty() -> libc::sockaddr_ll {
    // SAFETY: numbers all through, for which zero is a value.
    unsafe { mem::zeroed() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_reply_to_our_card_counts_and_the_nearest_link_is_asked() {
        let ours: Ipv4Addr = "192.0.2.1".parse().unwrap();
        let host: Ipv4Addr = "192.0.2.9".parse().unwrap();
        let mut came = packet(REPLY, [2; 6], host, ours);
        came[18..24].fill(7);
        assert_eq!(reply(&came), Some((host, [7; 6])));
        assert_eq!(reply(&packet(REQUEST, [2; 6], host, ours)), None, "a request is no reply");
        for len in 0..PACKET_LEN - 4 {
            assert_eq!(reply(&came[..len]), None, "{len}");
        }
        let link = |index, ours: &str, bits| Link { index, mac: [0; 6], ours: ours.parse().unwrap(), bits };
        let links = [link(1, "192.0.2.1", 24), link(2, "192.0.2.200", 28), link(3, "10.0.0.1", 0)];
        let of = |to: &str| link_of(&links[..2], to.parse().unwrap());
        assert_eq!(of("192.0.2.9").unwrap().index, 1);
        assert_eq!(of("192.0.2.201").unwrap().index, 2);
        assert!(of("198.51.100.1").unwrap_err().contains("is on no link of this box"));
        assert!(of("192.0.2.200").unwrap_err().contains("own address"));
        assert_eq!(link_of(&links, "198.51.100.1".parse().unwrap()).unwrap().index, 3);
        let mut arp = Arp::new();
        assert!(arp.fault("2001:db8::1".parse().unwrap()).unwrap().contains("IPv4 only"));
        arp.set(&BTreeMap::new(), MonoTime(0));
        arp.send(MonoTime(0));
        assert!(arp.receive().is_empty());
    }
}
