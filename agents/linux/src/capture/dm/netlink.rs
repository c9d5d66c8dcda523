//! The kernel's NBD client over generic netlink: the few calls that a connection needs which outlives the process that made it.
//!
//! Format: `nlmsghdr`, `genlmsghdr`, attributes padded to four bytes (`include/uapi/linux/nbd-netlink.h`). Every call asks for an
//! acknowledgement and waits for it; the kernel answers within the call.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    time::Duration,
};

const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NESTED: u16 = 1 << 15;

const NBD_CONNECT: u8 = 1;
const NBD_DISCONNECT: u8 = 2;
const NBD_RECONFIGURE: u8 = 3;
const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const CLIENT_FLAGS: u16 = 6;
const SOCKETS: u16 = 7;
const DEAD_CONN_TIMEOUT: u16 = 8;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;
/// The device is free again when nobody has it open any more.
const DISCONNECT_ON_CLOSE: u64 = 1 << 1;

const HEADER: usize = 20;
const ANSWER_MAX: usize = 8192;
/// The kernel answers in the call itself; longer means that the answer was lost.
const ANSWER_S: libc::time_t = 10;

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

fn attribute(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    out.extend_from_slice(&((value.len() + 4) as u16).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    pad(out);
}

fn message(family: u16, command: u8, attributes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + attributes.len());
    out.extend_from_slice(&((HEADER + attributes.len()) as u32).to_ne_bytes());
    out.extend_from_slice(&family.to_ne_bytes());
    out.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    out.extend_from_slice(&1u32.to_ne_bytes());
    out.extend_from_slice(&0u32.to_ne_bytes());
    out.extend_from_slice(&[command, 1, 0, 0]);
    out.extend_from_slice(attributes);
    out
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The value of an attribute among others.
fn find(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut rest = attributes;
    loop {
        let len = usize::from(u16_at(rest, 0)?);
        let kind = u16_at(rest, 2)? & !NESTED;
        let value = rest.get(4..len)?;
        if kind == wanted {
            return Some(value);
        }
        rest = rest.get(len.next_multiple_of(4)..)?;
    }
}

/// What an answer of one or more messages says: what came before the acknowledgement, and the error it carries.
enum Part<'a> {
    Acknowledged(i32),
    Data(&'a [u8]),
}

fn parts(answer: &[u8]) -> Option<Vec<Part<'_>>> {
    let mut out = Vec::new();
    let mut rest = answer;
    while rest.len() >= 16 {
        let len = u32_at(rest, 0)? as usize;
        let one = rest.get(..len).filter(|_| len >= 16)?;
        if u16_at(one, 4)? == NLMSG_ERROR {
            out.push(Part::Acknowledged(u32_at(one, 16)? as i32));
        } else {
            out.push(Part::Data(one.get(HEADER..)?));
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(out)
}

/// What a lasting connection is made with.
#[derive(Clone, Copy, Debug)]
pub struct Lasting {
    pub bytes: u64,
    pub block: u32,
    pub server_flags: u16,
    pub limits: Limits,
}

/// How long the kernel waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// For the answer to a request, before it takes the connection for dead.
    pub answer: Duration,
    /// For another connection, before it fails what waits.
    pub reconnect: Duration,
}

impl Limits {
    /// Whole seconds, never less than asked for.
    fn push(self, out: &mut Vec<u8>) {
        let seconds = |d: Duration| (d.as_millis().div_ceil(1000).max(1) as u64).to_ne_bytes();
        attribute(out, TIMEOUT, &seconds(self.answer));
        attribute(out, DEAD_CONN_TIMEOUT, &seconds(self.reconnect));
    }
}

fn sockets(out: &mut Vec<u8>, socket: RawFd) {
    let mut item = Vec::new();
    attribute(&mut item, SOCK_FD, &(socket as u32).to_ne_bytes());
    let mut list = Vec::new();
    attribute(&mut list, SOCK_ITEM | NESTED, &item);
    attribute(out, SOCKETS | NESTED, &list);
}

/// The kernel's NBD family.
pub struct Family {
    socket: OwnedFd,
    id: u16,
}

impl Family {
    pub fn open() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: no pointers; a new descriptor or an error.
        let raw = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_GENERIC) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and ours alone.
        let socket = unsafe { OwnedFd::from_raw_fd(raw) };
        let limit = libc::timeval { tv_sec: ANSWER_S, tv_usec: 0 };
        // SAFETY: the struct is valid for the call and as long as said.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const limit).cast(),
                size_of::<libc::timeval>() as libc::socklen_t,
            )
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut this = Self { socket, id: GENL_ID_CTRL };
        let mut name = Vec::new();
        attribute(&mut name, CTRL_ATTR_FAMILY_NAME, b"nbd\0");
        let answer = this.call(CTRL_CMD_GETFAMILY, &name)?;
        let id = find(&answer, CTRL_ATTR_FAMILY_ID).and_then(|v| u16_at(v, 0));
        this.id = id.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the kernel names no NBD family"))?;
        Ok(this)
    }

    /// Sends a command and waits for its acknowledgement; answers what came with it.
    fn call(&self, command: u8, attributes: &[u8]) -> io::Result<Vec<u8>> {
        let out = message(self.id, command, attributes);
        // SAFETY: the buffer is ours and as long as said.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), out.as_ptr().cast(), out.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut data = Vec::new();
        loop {
            let mut answer = [0u8; ANSWER_MAX];
            // SAFETY: the buffer is ours and as long as said.
            let got = unsafe { libc::recv(self.socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
            let Ok(got) = usize::try_from(got) else {
                let error = io::Error::last_os_error();
                if error.raw_os_error() == Some(libc::EINTR) {
                    continue;
                }
                return Err(error);
            };
            let bad = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer over netlink makes no sense");
            for part in parts(&answer[..got]).ok_or_else(bad)? {
                match part {
                    Part::Data(bytes) => data = bytes.to_vec(),
                    Part::Acknowledged(0) => return Ok(data),
                    Part::Acknowledged(code) => return Err(io::Error::from_raw_os_error(code.wrapping_neg())),
                }
            }
        }
    }

    /// Makes a device speak to `socket`, beyond the life of this process. EBUSY: it is in use.
    pub fn connect(&self, index: u32, socket: RawFd, with: &Lasting) -> io::Result<()> {
        let mut out = Vec::new();
        attribute(&mut out, INDEX, &index.to_ne_bytes());
        attribute(&mut out, SIZE_BYTES, &with.bytes.to_ne_bytes());
        attribute(&mut out, BLOCK_SIZE_BYTES, &u64::from(with.block).to_ne_bytes());
        attribute(&mut out, SERVER_FLAGS, &u64::from(with.server_flags).to_ne_bytes());
        attribute(&mut out, CLIENT_FLAGS, &DISCONNECT_ON_CLOSE.to_ne_bytes());
        with.limits.push(&mut out);
        sockets(&mut out, socket);
        self.call(NBD_CONNECT, &out).map(drop)
    }

    /// Gives a device whose connection is dead another one. ENOSPC: the kernel does not know yet that it is dead.
    pub fn reconnect(&self, index: u32, socket: RawFd, limits: Limits) -> io::Result<()> {
        let mut out = Vec::new();
        attribute(&mut out, INDEX, &index.to_ne_bytes());
        limits.push(&mut out);
        sockets(&mut out, socket);
        self.call(NBD_RECONFIGURE, &out).map(drop)
    }

    pub fn set_limits(&self, index: u32, limits: Limits) -> io::Result<()> {
        let mut out = Vec::new();
        attribute(&mut out, INDEX, &index.to_ne_bytes());
        limits.push(&mut out);
        self.call(NBD_RECONFIGURE, &out).map(drop)
    }

    /// Ends a connection; what waits for it fails.
    pub fn disconnect(&self, index: u32) -> io::Result<()> {
        let mut out = Vec::new();
        attribute(&mut out, INDEX, &index.to_ne_bytes());
        self.call(NBD_DISCONNECT, &out).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_found_again() {
        let mut out = Vec::new();
        attribute(&mut out, 2, b"nbd\0");
        attribute(&mut out, 1, &7u16.to_ne_bytes());
        attribute(&mut out, 9 | NESTED, b"abc");
        assert_eq!(out.len(), 8 + 8 + 8);
        assert_eq!(find(&out, 1), Some(&7u16.to_ne_bytes()[..]));
        assert_eq!((find(&out, 9), find(&out, 3)), (Some(&b"abc"[..]), None));
        let whole = message(0x1c, 3, &out);
        assert_eq!((u32_at(&whole, 0), u16_at(&whole, 4), whole[16]), (Some(whole.len() as u32), Some(0x1c), 3));
    }

    #[test]
    fn nonsense_of_the_kernel_is_an_error_and_no_panic() {
        for cut in 0..24 {
            let whole = message(1, 1, &[]);
            let _ = parts(&whole[..cut.min(whole.len())]);
        }
        assert!(parts(&[9, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_none(), "shorter than its head");
        assert!(find(&[0, 0, 1, 0], 1).is_none() && find(&[200, 0, 1, 0, 1], 1).is_none());
    }

    #[test]
    fn limits_are_never_shorter_than_asked_for() {
        let mut out = Vec::new();
        Limits { answer: Duration::from_millis(10_500), reconnect: Duration::ZERO }.push(&mut out);
        assert_eq!(find(&out, TIMEOUT), Some(&11u64.to_ne_bytes()[..]));
        assert_eq!(find(&out, DEAD_CONN_TIMEOUT), Some(&1u64.to_ne_bytes()[..]));
    }
}
