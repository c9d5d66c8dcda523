//! The kernel's NBD client, set up over generic netlink (kernel 4.12 and later; older ones are not supported).
//!
//! Over netlink the kernel runs the connection by itself: no thread of ours has to stay inside an ioctl, a socket that closes is a dead
//! connection and nothing else, and the time limit counts for a hung agent too. The device keeps its number until
//! [`disconnect`]ed, also when its agent dies; the next agent finds that number in the mirror's table.

use crate::capture::DevNo;
use std::{
    fs, io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    #[error("could not talk to the kernel over netlink")]
    Netlink(#[source] io::Error),
    #[error(
        "this kernel has no NBD client: load its module with `modprobe nbd`, and at each boot with `echo nbd \
         >/etc/modules-load.d/holdfast-agent.conf`; some distributions have it in a package of its own (kernel-modules-extra)"
    )]
    Missing,
    #[error("the kernel refused to {what}")]
    Refused {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the kernel's answer about NBD makes no sense: {what}")]
    Answer { what: &'static str },
    #[error("could not read the number of /dev/nbd{index}")]
    Number {
        index: u32,
        #[source]
        source: io::Error,
    },
}

/// What the kernel is told of the other end.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub bytes: u64,
    pub block: u32,
    /// A request that is not answered for this long ends the connection.
    pub timeout: Duration,
    /// As in the NBD handshake.
    pub server_flags: u16,
}

const GENL_CTRL: u16 = 0x10;
const CTRL_GETFAMILY: u8 = 3;
const CTRL_FAMILY_ID: u16 = 1;
const CTRL_FAMILY_NAME: u16 = 2;
const CMD_CONNECT: u8 = 1;
const CMD_DISCONNECT: u8 = 2;
const CMD_RECONFIGURE: u8 = 3;
const ATTR_INDEX: u16 = 1;
const ATTR_SIZE: u16 = 2;
const ATTR_BLOCK: u16 = 3;
const ATTR_TIMEOUT: u16 = 4;
const ATTR_SERVER_FLAGS: u16 = 5;
const ATTR_SOCKETS: u16 = 7;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;
const NESTED: u16 = 0x8000;
const NLMSG_ERROR: u16 = 2;
/// Answers are a few dozen bytes.
const ANSWER_MAX: usize = 8192;
/// Setting up a device can wait for udev's probing of the one before; more than this is a hung kernel.
const ANSWER_WAIT: libc::timeval = libc::timeval { tv_sec: 10, tv_usec: 0 };

fn attribute(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let len = 4 + value.len();
    out.extend((len as u16).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// One generic netlink message that asks to be acknowledged.
fn message(family: u16, command: u8, attributes: &[u8]) -> Vec<u8> {
    const REQUEST_ACK: u16 = 1 | 4;
    let mut out = Vec::new();
    out.extend((20 + attributes.len() as u32).to_ne_bytes());
    out.extend(family.to_ne_bytes());
    out.extend(REQUEST_ACK.to_ne_bytes());
    out.extend(1u32.to_ne_bytes());
    out.extend(0u32.to_ne_bytes());
    out.extend([command, 1, 0, 0]);
    out.extend(attributes);
    out
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes([four[0], four[1], four[2], four[3]]))
}

/// The value of an attribute among several.
fn find(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let len = usize::from(u16_at(attributes, 0)?);
        let this = u16_at(attributes, 2)? & !NESTED;
        if len < 4 || len > attributes.len() {
            return None;
        }
        if this == kind {
            return Some(&attributes[4..len]);
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
}

/// What one datagram of answers brings.
#[derive(Debug, Default, PartialEq, Eq)]
struct Answers {
    /// Attributes of the answer proper.
    body: Option<Vec<u8>>,
    /// The acknowledgement: zero or an error number.
    ack: Option<i32>,
}

fn answers(mut bytes: &[u8], into: &mut Answers) -> Option<()> {
    while bytes.len() >= 16 {
        let len = u32_at(bytes, 0)? as usize;
        if len < 16 || len > bytes.len() {
            return None;
        }
        if u16_at(bytes, 4)? == NLMSG_ERROR {
            into.ack = Some(-(u32_at(bytes, 16)? as i32));
        } else {
            into.body = Some(bytes.get(20..len)?.to_vec());
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(())
}

/// A netlink socket and the number the kernel gave NBD's family.
#[derive(Debug)]
pub struct KernelNbd {
    socket: OwnedFd,
    family: u16,
}

impl KernelNbd {
    /// Loads the module if it is not there.
    pub fn open() -> Result<Self, NbdError> {
        if !PathBuf::from("/sys/module/nbd").exists() {
            // What comes of it shows below.
            let _ = Command::new("modprobe").arg("nbd").stdin(Stdio::null()).stderr(Stdio::null()).status();
        }
        // SAFETY: no pointers; the descriptor is checked below and ours.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_GENERIC) };
        if fd < 0 {
            return Err(NbdError::Netlink(io::Error::last_os_error()));
        }
        // SAFETY: just made and owned by nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let wait: *const libc::timeval = &ANSWER_WAIT;
        // SAFETY: the option's value is a timeval that lives for ever.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                wait.cast(),
                size_of::<libc::timeval>() as libc::socklen_t,
            )
        };
        if set != 0 {
            return Err(NbdError::Netlink(io::Error::last_os_error()));
        }
        let mut this = Self { socket, family: GENL_CTRL };
        let mut attributes = Vec::new();
        attribute(&mut attributes, CTRL_FAMILY_NAME, b"nbd\0");
        let answer = match this.call("name its NBD client", CTRL_GETFAMILY, &attributes) {
            Err(NbdError::Refused { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) => {
                return Err(NbdError::Missing);
            }
            other => other?,
        };
        this.family = find(&answer, CTRL_FAMILY_ID)
            .and_then(|v| u16_at(v, 0))
            .ok_or(NbdError::Answer { what: "the family has no number" })?;
        Ok(this)
    }

    fn call(&self, what: &'static str, command: u8, attributes: &[u8]) -> Result<Vec<u8>, NbdError> {
        let request = message(self.family, command, attributes);
        // SAFETY: a descriptor of ours and a buffer of that length.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
        if sent < 0 {
            return Err(NbdError::Netlink(io::Error::last_os_error()));
        }
        let mut got = Answers::default();
        while got.ack.is_none() {
            let mut buffer = [0u8; ANSWER_MAX];
            // SAFETY: the buffer and its length.
            let n = unsafe { libc::recv(self.socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            if n < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(NbdError::Netlink(error));
            }
            answers(&buffer[..n as usize], &mut got).ok_or(NbdError::Answer { what: "a message is cut off" })?;
        }
        match got.ack {
            None | Some(0) => Ok(got.body.unwrap_or_default()),
            Some(errno) => Err(NbdError::Refused { what, source: io::Error::from_raw_os_error(errno) }),
        }
    }

    /// Makes a free NBD device speak to `socket`, whose other end must not be closed before [`disconnect`](Self::disconnect). Answers
    /// its index.
    pub fn connect(&self, socket: BorrowedFd<'_>, setup: &Setup) -> Result<u32, NbdError> {
        let (mut fd, mut item, mut all) = (Vec::new(), Vec::new(), Vec::new());
        attribute(&mut fd, SOCK_FD, &(socket.as_raw_fd() as u32).to_ne_bytes());
        attribute(&mut item, SOCK_ITEM | NESTED, &fd);
        attribute(&mut all, ATTR_SIZE, &setup.bytes.to_ne_bytes());
        attribute(&mut all, ATTR_BLOCK, &u64::from(setup.block).to_ne_bytes());
        attribute(&mut all, ATTR_TIMEOUT, &setup.timeout.as_secs().max(1).to_ne_bytes());
        attribute(&mut all, ATTR_SERVER_FLAGS, &u64::from(setup.server_flags).to_ne_bytes());
        attribute(&mut all, ATTR_SOCKETS | NESTED, &item);
        let answer = self.call("connect an NBD device", CMD_CONNECT, &all)?;
        find(&answer, ATTR_INDEX)
            .and_then(|v| u32_at(v, 0))
            .ok_or(NbdError::Answer { what: "the new device has no number" })
    }

    /// Changes how long a request of a running connection may wait.
    pub fn set_timeout(&self, index: u32, timeout: Duration) -> Result<(), NbdError> {
        let mut attributes = Vec::new();
        attribute(&mut attributes, ATTR_INDEX, &index.to_ne_bytes());
        attribute(&mut attributes, ATTR_TIMEOUT, &timeout.as_secs().max(1).to_ne_bytes());
        self.call("change the time limit of an NBD device", CMD_RECONFIGURE, &attributes).map(drop)
    }

    /// Ends a connection; what it has not answered fails. One that is not there is as good as ended.
    pub fn disconnect(&self, index: u32) -> Result<(), NbdError> {
        let mut attributes = Vec::new();
        attribute(&mut attributes, ATTR_INDEX, &index.to_ne_bytes());
        match self.call("disconnect an NBD device", CMD_DISCONNECT, &attributes) {
            Err(NbdError::Refused { source, .. })
                if matches!(source.raw_os_error(), Some(libc::EINVAL | libc::ENODEV | libc::EBUSY)) =>
            {
                Ok(())
            }
            other => other.map(drop),
        }
    }
}

fn sysfs(index: u32) -> PathBuf {
    PathBuf::from(format!("/sys/block/nbd{index}"))
}

/// The device number of /dev/nbdN.
pub fn number(index: u32) -> Result<DevNo, NbdError> {
    let text = fs::read_to_string(sysfs(index).join("dev")).map_err(|source| NbdError::Number { index, source })?;
    let parse = || {
        let (major, minor) = text.trim().split_once(':')?;
        Some(DevNo { major: major.parse().ok()?, minor: minor.parse().ok()? })
    };
    parse().ok_or(NbdError::Answer { what: "its device number cannot be read" })
}

/// The index of the NBD device with this number.
pub fn index_of(device: DevNo) -> Option<u32> {
    let link = fs::read_link(format!("/sys/dev/block/{device}")).ok()?;
    link.file_name()?.to_str()?.strip_prefix("nbd")?.parse().ok()
}

/// Bounds what is in flight: the kernel has at most 128 requests of this length under way.
pub fn bound_requests(index: u32, kib: u32) -> io::Result<()> {
    fs::write(sysfs(index).join("queue/max_sectors_kb"), kib.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_again() {
        let mut all = Vec::new();
        attribute(&mut all, ATTR_SIZE, &7u64.to_ne_bytes());
        attribute(&mut all, CTRL_FAMILY_NAME + 40, b"nbd\0x");
        attribute(&mut all, ATTR_INDEX, &3u32.to_ne_bytes());
        assert_eq!(all.len() % 4, 0);
        assert_eq!(find(&all, ATTR_INDEX).and_then(|v| u32_at(v, 0)), Some(3));
        assert_eq!(find(&all, 99), None);
        for cut in 0..all.len() {
            // Whatever is cut off, nothing is read beyond it.
            let _ = find(&all[..cut], ATTR_INDEX);
        }
        assert_eq!(find(&[0, 0, 1, 0], 1), None, "a length of nothing");
    }

    #[test]
    fn an_answer_and_its_acknowledgement_are_told_apart() {
        let mut body = Vec::new();
        attribute(&mut body, ATTR_INDEX, &5u32.to_ne_bytes());
        let mut bytes = message(0x20, CMD_CONNECT, &body);
        let mut ack = Vec::new();
        ack.extend(36u32.to_ne_bytes());
        ack.extend(NLMSG_ERROR.to_ne_bytes());
        ack.extend([0; 10]);
        ack.extend((-libc::EBUSY).to_ne_bytes());
        ack.extend([0; 16]);
        let mut got = Answers::default();
        answers(&bytes, &mut got).unwrap();
        assert_eq!((got.body.as_deref(), got.ack), (Some(&body[..]), None));
        bytes.extend(&ack);
        answers(&bytes, &mut got).unwrap();
        assert_eq!(got.ack, Some(libc::EBUSY));
        assert_eq!(answers(&bytes[..bytes.len() - 1], &mut Answers::default()), None);
    }
}
