//! Who else has an address, and telling everybody that it is here now: ARP for IPv4, unsolicited neighbour advertisements for IPv6.
//!
//! Before an IPv4 address is put up, the link is asked for it [`ASKED`] times (RFC 5227); when another machine answers, it is not put up, and
//! that machine is named. IPv6 addresses are asked for by the kernel itself when they are put up. Afterwards both are announced
//! [`ANNOUNCED`] times, over seconds: switches and neighbours that missed the first learn of the move by a later one.
//!
//! What has no Ethernet address (loopback, tunnels) has no neighbours to ask or to tell.

use std::{
    ffi::CString,
    fs, io,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    thread,
    time::{Duration, Instant},
};

pub const ASKED: u32 = 3;
const ASK_WAIT: Duration = Duration::from_millis(500);
pub const ANNOUNCED: u32 = 3;
/// Between the first and the second; each pause after it is twice as long.
const ANNOUNCE_PAUSE: Duration = Duration::from_millis(500);
const ETHERTYPE: u16 = 0x0806;

#[derive(Debug, thiserror::Error)]
pub enum ArpError {
    #[error("could not {what} on {device}")]
    System {
        what: &'static str,
        device: String,
        #[source]
        source: io::Error,
    },
    #[error("{device} has no Ethernet address")]
    NoEthernet { device: String },
}

/// A device of this host that has neighbours.
pub struct Arp {
    device: String,
    index: i32,
    mac: [u8; 6],
    socket: OwnedFd,
}

impl Arp {
    /// None: it has no neighbours to ask.
    pub fn open(device: &str) -> Result<Option<Self>, ArpError> {
        let Some((index, mac)) = by_kernel(device)? else { return Ok(None) };
        let failed = |what| ArpError::System { what, device: device.to_owned(), source: io::Error::last_os_error() };
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
        // SAFETY: plain call; the descriptor is checked and owned right away.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(ETHERTYPE.to_be())) };
        if fd < 0 {
            return Err(failed("open a socket for ARP"));
        }
        // SAFETY: `fd` was just opened and is nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let this = Self { device: device.to_owned(), index, mac, socket };
        let at = this.place();
        // SAFETY: `at` is a sockaddr_ll of that length, alive for the call.
        let bound = unsafe { libc::bind(fd, (&raw const at).cast(), size_of_val(&at) as libc::socklen_t) };
        if bound < 0 {
            return Err(failed("bind a socket for ARP"));
        }
        Ok(Some(this))
    }

    /// Everybody on the link.
    fn place(&self) -> libc::sockaddr_ll {
        libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: ETHERTYPE.to_be(),
            sll_ifindex: self.index,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
        }
    }

    fn send(&self, operation: u8, sender: Ipv4Addr, target: Ipv4Addr) -> Result<(), ArpError> {
        let mut packet = vec![0, 1, 8, 0, 6, 4, 0, operation];
        packet.extend(self.mac);
        packet.extend(sender.octets());
        packet.extend([0; 6]);
        packet.extend(target.octets());
        let at = self.place();
        // SAFETY: buffer and address are alive for the call and of the lengths given.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const at).cast(),
                size_of_val(&at) as libc::socklen_t,
            )
        };
        if sent < 0 {
            let source = io::Error::last_os_error();
            return Err(ArpError::System { what: "send ARP", device: self.device.clone(), source });
        }
        Ok(())
    }

    /// Who else has an address: the Ethernet address that answers, or that asks for it at the same time.
    pub fn who_has(&self, ip: Ipv4Addr) -> Result<Option<String>, ArpError> {
        for _ in 0..ASKED {
            self.send(1, Ipv4Addr::UNSPECIFIED, ip)?;
            let deadline = Instant::now() + ASK_WAIT;
            while let Some(left) = deadline.checked_duration_since(Instant::now()) {
                let mut poll = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                // SAFETY: one pollfd, alive for the call.
                if unsafe { libc::poll(&raw mut poll, 1, left.as_millis() as i32 + 1) } <= 0 {
                    break;
                }
                let mut packet = [0_u8; 64];
                // SAFETY: the buffer is alive for the call and of that length.
                let n = unsafe { libc::recv(self.socket.as_raw_fd(), packet.as_mut_ptr().cast(), packet.len(), 0) };
                if let Some(mac) = usize::try_from(n).ok().and_then(|n| other(&packet[..n], ip, self.mac)) {
                    let mac: Vec<String> = mac.iter().map(|b| format!("{b:02x}")).collect();
                    return Ok(Some(mac.join(":")));
                }
            }
        }
        Ok(None)
    }

    /// Tells every neighbour where the address is now, as a request and as a reply: some listen only to one of them.
    fn announce(&self, ip: Ipv4Addr) -> Result<(), ArpError> {
        self.send(1, ip, ip)?;
        self.send(2, ip, ip)
    }
}

/// Sender's hardware address at 8, its protocol address at 14, whose is asked for at 24.
fn other(packet: &[u8], ip: Ipv4Addr, ours: [u8; 6]) -> Option<[u8; 6]> {
    let mac: [u8; 6] = packet.get(8..14)?.try_into().ok()?;
    let sender = packet.get(14..18)?;
    let probes = sender == [0; 4] && packet.get(24..28)? == ip.octets() && packet[7] == 1;
    (mac != ours && packet.get(..7)? == [0, 1, 8, 0, 6, 4, 0] && (sender == ip.octets() || probes)).then_some(mac)
}

/// Number and Ethernet address by the kernel of this thread's network namespace, whatever `/sys` shows.
fn by_kernel(device: &str) -> Result<Option<(i32, [u8; 6])>, ArpError> {
    let failed = |what, source| ArpError::System { what, device: device.to_owned(), source };
    let name = CString::new(device).map_err(|e| failed("name a device", e.into()))?;
    // SAFETY: plain call; the descriptor is checked and owned right away.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(failed("open a socket", io::Error::last_os_error()));
    }
    // SAFETY: `fd` was just opened and is nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: numbers and bytes all through, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes().iter().take(libc::IFNAMSIZ - 1)) {
        *to = *from as libc::c_char;
    }
    // SAFETY: a valid descriptor, and a request that lives for the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR as _, &raw mut request) } != 0 {
        return Err(failed("look at", io::Error::last_os_error()));
    }
    // SAFETY: what that request fills in.
    let address = unsafe { request.ifr_ifru.ifru_hwaddr };
    if address.sa_family != libc::ARPHRD_ETHER {
        return Ok(None);
    }
    let mut mac = [0; 6];
    mac.iter_mut().zip(&address.sa_data).for_each(|(to, from)| *to = *from as u8);
    // SAFETY: a string with its end.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    let index = i32::try_from(index).map_err(|_| ArpError::NoEthernet { device: device.to_owned() })?;
    Ok(Some((index, mac)))
}

/// Unsolicited neighbour advertisement (RFC 4861): this address is behind this card now, whatever was known of it.
fn advertise(device: &str, ip: Ipv6Addr) -> Result<(), ArpError> {
    let Some((index, mac)) = by_kernel(device)? else { return Ok(()) };
    let failed = |what| ArpError::System { what, device: device.to_owned(), source: io::Error::last_os_error() };
    // SAFETY: plain call; the descriptor is checked and owned right away.
    let fd = unsafe { libc::socket(libc::AF_INET6, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_ICMPV6) };
    if fd < 0 {
        return Err(failed("open a socket for neighbour advertisements"));
    }
    // SAFETY: `fd` was just opened and is nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let option = |name, value: i32| {
        let len = size_of_val(&value) as libc::socklen_t;
        // SAFETY: a valid descriptor, and a value of the length that is said.
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_IPV6, name, (&raw const value).cast(), len) == 0 }
    };
    // Who gets it with fewer hops drops it: it could come from elsewhere.
    if !option(libc::IPV6_MULTICAST_HOPS, 255) || !option(libc::IPV6_MULTICAST_IF, index) {
        return Err(failed("set up a socket for neighbour advertisements"));
    }
    // SAFETY: numbers all through, for which zero is a value.
    let mut at: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
    at.sin6_family = libc::AF_INET6 as u16;
    at.sin6_scope_id = index.unsigned_abs();
    // From the address itself: an advertisement of a neighbour's that is believed names who sends it.
    at.sin6_addr.s6_addr = ip.octets();
    let len = size_of_val(&at) as libc::socklen_t;
    // SAFETY: an address of that length, alive for the call.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const at).cast(), len) } != 0 {
        return Err(failed("send neighbour advertisements from the new address"));
    }
    // Advertisement, override; the address; our card. The kernel makes the checksum.
    let mut packet = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    packet.extend(ip.octets());
    packet.extend([2, 1]);
    packet.extend(mac);
    // All nodes of the link.
    at.sin6_addr.s6_addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).octets();
    // SAFETY: buffer and address are alive for the call and of the lengths given.
    let sent = unsafe {
        libc::sendto(socket.as_raw_fd(), packet.as_ptr().cast(), packet.len(), 0, (&raw const at).cast(), len)
    };
    if sent < 0 { Err(failed("send a neighbour advertisement")) } else { Ok(()) }
}

/// Announces an address so often, with pauses; as long as `still` says that it is ours to announce.
pub fn announce(device: &str, ip: std::net::IpAddr, still: impl Fn() -> bool) -> Result<(), ArpError> {
    let mut pause = ANNOUNCE_PAUSE;
    for n in 0..ANNOUNCED {
        if n > 0 {
            thread::sleep(pause);
            pause *= 2;
        }
        if !still() {
            return Ok(());
        }
        match ip {
            std::net::IpAddr::V4(v4) => match Arp::open(device)? {
                Some(arp) => arp.announce(v4)?,
                None => return Ok(()),
            },
            std::net::IpAddr::V6(v6) => advertise(device, v6)?,
        }
    }
    Ok(())
}

/// What the kernel found out about an IPv6 address that was put up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asked {
    /// It is still asking for it.
    Still,
    Free,
    /// Another machine has it; the kernel does not use it.
    Taken,
    /// Taken down, or away: when another machine has it and it was put up with an end.
    Gone,
}

/// As `/proc/net/if_inet6` has it: address, number, prefix, scope, flags, device.
pub fn asked_by_kernel(device: &str, ip: Ipv6Addr) -> io::Result<Asked> {
    const TENTATIVE: u32 = 0x40;
    const DAD_FAILED: u32 = 0x08;
    let wanted: String = ip.octets().iter().map(|b| format!("{b:02x}")).collect();
    let text = fs::read_to_string("/proc/thread-self/net/if_inet6")?;
    let found = text
        .lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>())
        .find(|w| w.first() == Some(&wanted.as_str()) && w.last() == Some(&device));
    let flags = found.and_then(|w| u32::from_str_radix(w.get(4)?, 16).ok());
    Ok(match flags {
        None => Asked::Gone,
        Some(flags) if flags & DAD_FAILED != 0 => Asked::Taken,
        Some(flags) if flags & TENTATIVE != 0 => Asked::Still,
        Some(_) => Asked::Free,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_that_has_or_asks_for_an_address_is_seen_and_oneself_is_not() {
        let ip: Ipv4Addr = "192.0.2.7".parse().unwrap();
        let packet = |operation: u8, mac: u8, sender: [u8; 4], target: [u8; 4]| {
            [&[0, 1, 8, 0, 6, 4, 0, operation][..], &[mac; 6], &sender, &[0; 6], &target].concat()
        };
        let (ours, seven) = ([1; 6], ip.octets());
        assert_eq!(other(&packet(2, 2, seven, [0; 4]), ip, ours), Some([2; 6]), "it answers");
        assert_eq!(other(&packet(1, 2, seven, seven), ip, ours), Some([2; 6]), "it announces it");
        assert_eq!(other(&packet(1, 2, [0; 4], seven), ip, ours), Some([2; 6]), "it asks for it, to take it");
        assert_eq!(other(&packet(1, 1, [0; 4], seven), ip, ours), None, "that was us");
        assert_eq!(other(&packet(1, 2, [192, 0, 2, 9], seven), ip, ours), None, "a neighbour who looks for it");
        for len in 0..28 {
            let cut = &packet(1, 2, [0; 4], seven)[..len];
            assert_eq!(other(cut, ip, ours), None, "{len}");
        }
    }
}
