//! Addresses that answer nobody although they are up: rules in the kernel's packet filter (nf_tables), by netlink.
//!
//! Made at boot before any network is configured ([`super::gate`]), so that it does not matter who puts an address up afterwards, nor when: ARP
//! requests for it are dropped and so is everything to and from it; the host's other addresses are left alone. Two tables of
//! a name of our own for each family, which nobody else's rules are in; taken away whole.
//!
//! # Limits
//!
//! A kernel without nf_tables refuses, which is said. `nft flush ruleset` takes these rules along: at boot we come after nftables.service, whose file
//! begins with it; an administrator who reloads it later takes away a second fence, the agent having taken the addresses down by then.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

const TABLE: &str = "holdfast-gate";
/// A kernel that does not answer a request at once is not going to; loading its module is part of the first.
const ANSWER_S: libc::time_t = 5;

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const DELETE_TABLE: u16 = SUBSYSTEM << 8 | 2;
const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
const NESTED: u16 = 0x8000;

/// A family's number in nf_tables, its two hooks, and where the addresses are in its header.
struct Family {
    number: u8,
    hook_in: u32,
    hook_out: u32,
    /// Of whom is asked, or who gets it.
    target: u32,
    /// Who says so.
    sender: u32,
}

const ARP: Family = Family { number: 3, hook_in: 0, hook_out: 1, target: 24, sender: 14 };
const V4: Family = Family { number: 2, hook_in: 1, hook_out: 3, target: 16, sender: 12 };
const V6: Family = Family { number: 10, hook_in: 1, hook_out: 3, target: 24, sender: 8 };
const ALL: [&Family; 3] = [&ARP, &V4, &V6];

/// From now on these answer nobody; those before do again.
pub fn close(addresses: &[IpAddr]) -> io::Result<()> {
    open()?;
    for family in ALL {
        let of: Vec<Vec<u8>> = addresses
            .iter()
            .filter_map(|ip| match (ip, family.number) {
                (IpAddr::V4(v4), 2 | 3) => Some(v4.octets().to_vec()),
                (IpAddr::V6(v6), 10) => Some(v6.octets().to_vec()),
                _ => None,
            })
            .collect();
        if of.is_empty() {
            continue;
        }
        let mut batch = Batch::default();
        batch.add(family, NEW_TABLE, libc::NLM_F_CREATE, &text(1, TABLE));
        for (chain, hook) in [("in", family.hook_in), ("out", family.hook_out)] {
            let hook = nested(4, &[number(1, hook), number(2, 0)].concat());
            // Whatever is not ours goes on.
            let body = [text(1, TABLE), text(3, chain), hook, number(5, 1), text(7, "filter")].concat();
            batch.add(family, NEW_CHAIN, libc::NLM_F_CREATE, &body);
        }
        for ip in &of {
            for (chain, offset) in [("in", family.target), ("out", family.sender)] {
                let rule = [drop_where(offset, ip)].concat();
                let body = [text(1, TABLE), text(2, chain), nested(4, &rule)].concat();
                batch.add(family, NEW_RULE, libc::NLM_F_CREATE | libc::NLM_F_APPEND, &body);
            }
        }
        batch.send()?;
    }
    Ok(())
}

/// All of them may answer again.
pub fn open() -> io::Result<()> {
    for family in ALL {
        let mut batch = Batch::default();
        batch.add(family, DELETE_TABLE, 0, &text(1, TABLE));
        match batch.send() {
            // There is none, or the kernel knows no such family.
            Err(e) if !matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => {
                return Err(e);
            }
            _ => {}
        }
    }
    Ok(())
}

/// Loads so many bytes of the header, compares them, drops.
fn drop_where(offset: u32, ip: &[u8]) -> Vec<u8> {
    let expression = |name: &str, data: &[u8]| nested(1, &[text(1, name), nested(2, data)].concat());
    let load = [number(1, 1), number(2, 1), number(3, offset), number(4, ip.len() as u32)].concat();
    let compare = [number(1, 1), number(2, 0), nested(3, &attribute(1, ip))].concat();
    let verdict = [number(1, 0), nested(2, &nested(2, &number(1, 0)))].concat();
    [expression("payload", &load), expression("cmp", &compare), expression("immediate", &verdict)].concat()
}

fn attribute(kind: u16, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(4 + data.len().next_multiple_of(4));
    out.extend_from_slice(&(4 + data.len() as u16).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}
fn nested(kind: u16, data: &[u8]) -> Vec<u8> {
    attribute(kind | NESTED, data)
}
fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}
fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), &[0]].concat())
}

/// All of it is done, or none.
#[derive(Default)]
struct Batch {
    messages: Vec<u8>,
    count: u32,
}

impl Batch {
    fn add(&mut self, family: &Family, kind: u16, flags: i32, body: &[u8]) {
        self.count += 1;
        let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags;
        let message = message(kind, flags as u16, self.count, family.number, 0, body);
        self.messages.extend_from_slice(&message);
    }

    fn send(&self) -> io::Result<()> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: no preconditions; the descriptor is checked and owned right away.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_NETFILTER) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let limit = libc::timeval { tv_sec: ANSWER_S, tv_usec: 0 };
        // SAFETY: a valid descriptor, and a value of the length that is said.
        let set = unsafe {
            let len = size_of::<libc::timeval>() as u32;
            libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVTIMEO, (&raw const limit).cast(), len)
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
        let request = libc::NLM_F_REQUEST as u16;
        let begin = message(BATCH_BEGIN, request, 0, 0, SUBSYSTEM, &[]);
        let end = message(BATCH_END, request, 0, 0, SUBSYSTEM, &[]);
        let all = [&begin[..], &self.messages, &end].concat();
        // SAFETY: the buffer and its length.
        if unsafe { libc::send(fd.as_raw_fd(), all.as_ptr().cast(), all.len(), 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut answered = 0;
        while answered < self.count {
            let mut answer = [0_u8; 8192];
            // SAFETY: the buffer and its length.
            let got = unsafe { libc::recv(fd.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
            let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
            answered += answers(&answer[..got.min(answer.len())])?;
        }
        Ok(())
    }
}

/// How many requests were done; the error of one that was not.
fn answers(mut rest: &[u8]) -> io::Result<u32> {
    let mut count = 0;
    while let Some(len) = rest.get(..4).and_then(|l| l.try_into().ok()).map(u32::from_ne_bytes) {
        // struct nlmsgerr after the header: zero, or an error number below it.
        let code = rest.get(16..20).and_then(|c| c.try_into().ok()).map(i32::from_ne_bytes);
        match code {
            Some(0) => count += 1,
            Some(error) => return Err(io::Error::from_raw_os_error(error.saturating_neg())),
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        rest = rest.get((len as usize).next_multiple_of(4).max(16)..).unwrap_or_default();
    }
    if count == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(count) }
}

/// struct nlmsghdr: length, kind, flags, sequence, port; struct nfgenmsg: family, version, resource.
fn message(kind: u16, flags: u16, sequence: u32, family: u8, resource: u16, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(20 + body.len());
    out.extend_from_slice(&(20 + body.len() as u32).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&sequence.to_ne_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&[family, 0]);
    out.extend_from_slice(&resource.to_be_bytes());
    out.extend_from_slice(body);
    out
}
