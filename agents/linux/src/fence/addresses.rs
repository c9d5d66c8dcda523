//! Addresses of the services: put up with an end, taken down, looked for. By netlink, without another process: taking an address down
//! must work on a host that can start none.
//!
//! An address is put up with the rest of its lease as its lifetime (`valid_lft`, whole seconds, rounded down), so that the kernel takes it down
//! at the lease's end whatever becomes of this process.

use std::{
    ffi::{CStr, CString},
    io,
    net::IpAddr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};
use wire::PlanAddress;

const FOREVER: u32 = u32::MAX;
const IFA_CACHEINFO: u16 = 6;
/// A kernel that does not answer a request at once is not going to.
const ANSWER_S: libc::time_t = 2;

#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    #[error("{address:?} is not an address with its prefix")]
    Syntax { address: String },
    #[error("there is no network device {device}")]
    NoDevice { device: String },
    #[error("could not {what} {address} on {device}")]
    Kernel {
        what: &'static str,
        address: String,
        device: String,
        #[source]
        source: io::Error,
    },
}

/// Until when an address stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lifetime {
    Forever,
    Seconds(u32),
}

/// Puts an address up, or changes how long it stays.
pub fn up(at: &PlanAddress, lifetime: Lifetime) -> Result<(), AddressError> {
    let seconds = match lifetime {
        Lifetime::Forever => FOREVER,
        // Zero would be refused, and the largest means for ever.
        Lifetime::Seconds(s) => s.clamp(1, FOREVER - 1),
    };
    let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    change(at, libc::RTM_NEWADDR, flags, Some(seconds)).map_err(|e| e.of("put up", at))
}

/// Takes an address down; one that is not there is down.
pub fn down(at: &PlanAddress) -> Result<(), AddressError> {
    match change(at, libc::RTM_DELADDR, 0, None) {
        Err(Failed::Kernel(e)) if matches!(e.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::ENODEV)) => Ok(()),
        // Without its device it cannot answer.
        Err(Failed::NoDevice) => Ok(()),
        other => other.map_err(|e| e.of("take down", at)),
    }
}

/// Whether the host has this address on any device.
pub fn is_up(at: &PlanAddress) -> Result<bool, AddressError> {
    let (wanted, _) = parse(at).map_err(|e| e.of("look for", at))?;
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the pointer is ours to be written; the list is freed below.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return Err(Failed::Kernel(io::Error::last_os_error()).of("look for", at));
    }
    let (mut found, mut next) = (false, list);
    while !next.is_null() {
        // SAFETY: an entry of the list, which lives until it is freed below.
        let entry = unsafe { &*next };
        // SAFETY: the address, if there is one, belongs to the entry.
        found |= unsafe { address_of(entry.ifa_addr) } == Some(wanted);
        next = entry.ifa_next;
    }
    // SAFETY: made by getifaddrs and freed once.
    unsafe { libc::freeifaddrs(list) };
    Ok(found)
}

/// # Safety
///
/// `at` is null or points to a socket address as long as its family's.
unsafe fn address_of(at: *const libc::sockaddr) -> Option<IpAddr> {
    if at.is_null() {
        return None;
    }
    // SAFETY: see above; the family says how long it is.
    unsafe {
        match i32::from((*at).sa_family) {
            libc::AF_INET => {
                let v4 = std::ptr::read_unaligned(at.cast::<libc::sockaddr_in>());
                Some(IpAddr::from(v4.sin_addr.s_addr.to_ne_bytes()))
            }
            libc::AF_INET6 => {
                let v6 = std::ptr::read_unaligned(at.cast::<libc::sockaddr_in6>());
                Some(IpAddr::from(v6.sin6_addr.s6_addr))
            }
            _ => None,
        }
    }
}

enum Failed {
    Syntax,
    NoDevice,
    Kernel(io::Error),
}

impl Failed {
    fn of(self, what: &'static str, at: &PlanAddress) -> AddressError {
        match self {
            Self::Syntax => AddressError::Syntax { address: at.address.clone() },
            Self::NoDevice => AddressError::NoDevice { device: at.device.clone() },
            Self::Kernel(source) => {
                AddressError::Kernel { what, address: at.address.clone(), device: at.device.clone(), source }
            }
        }
    }
}

fn parse(at: &PlanAddress) -> Result<(IpAddr, u8), Failed> {
    let (ip, bits) = at.address.split_once('/').ok_or(Failed::Syntax)?;
    Ok((ip.parse().map_err(|_| Failed::Syntax)?, bits.parse().map_err(|_| Failed::Syntax)?))
}

/// One request to the kernel, and its answer.
fn change(at: &PlanAddress, kind: u16, flags: i32, seconds: Option<u32>) -> Result<(), Failed> {
    let (ip, bits) = parse(at)?;
    let name = CString::new(at.device.as_str()).map_err(|_| Failed::NoDevice)?;
    let index = device_index(&name)?;
    let (family, bytes) = match ip {
        IpAddr::V4(v4) => (libc::AF_INET as u8, v4.octets().to_vec()),
        IpAddr::V6(v6) => (libc::AF_INET6 as u8, v6.octets().to_vec()),
    };
    // struct ifaddrmsg: family, prefix, flags, scope, index.
    let mut body = vec![family, bits, 0, 0];
    body.extend_from_slice(&index.to_ne_bytes());
    attribute(&mut body, libc::IFA_LOCAL, &bytes);
    attribute(&mut body, libc::IFA_ADDRESS, &bytes);
    if let Some(seconds) = seconds {
        // struct ifa_cacheinfo: preferred, valid, and two stamps that the kernel sets.
        let words = [seconds, seconds, 0, 0].map(u32::to_ne_bytes).concat();
        attribute(&mut body, IFA_CACHEINFO, &words);
    }
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags) as u16;
    // struct nlmsghdr: length, kind, flags, sequence, port.
    let mut message = Vec::with_capacity(16 + body.len());
    message.extend_from_slice(&(16 + body.len() as u32).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&body);
    ask(&message).map_err(Failed::Kernel)
}

fn device_index(name: &CStr) -> Result<u32, Failed> {
    // SAFETY: a string with its end.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(Failed::NoDevice),
        index => Ok(index),
    }
}

fn attribute(out: &mut Vec<u8>, kind: u16, data: &[u8]) {
    out.extend_from_slice(&(4 + data.len() as u16).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// Sends one request and reads what the kernel says of it.
fn ask(message: &[u8]) -> io::Result<()> {
    // SAFETY: no preconditions; the descriptor is new and ours.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let limit = libc::timeval { tv_sec: ANSWER_S, tv_usec: 0 };
    // SAFETY: a valid descriptor, and a value of the length that is said.
    let set = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const limit).cast(),
            size_of::<libc::timeval>() as u32,
        )
    };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the buffer and its length.
    if unsafe { libc::send(fd.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut answer = [0u8; 512];
    // SAFETY: the buffer and its length.
    let got = unsafe { libc::recv(fd.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
    let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    // struct nlmsgerr after the header: zero, or an error number below it.
    let code = answer.get(16..20).filter(|_| got >= 20).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
    match code {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
