//! The kernel's NBD client, in one of two ways.
//!
//! **Tied** to the process: set up by ioctl from a thread that stays inside the kernel as long as the device is connected. A thread inside
//! `NBD_DO_IT` dies with its process: the kernel fails at once what is under way, and the mirror goes on without the leg. The same
//! happens when the agent is stopped (SIGSTOP, a debugger, a frozen cgroup): a stopped agent is a dead one. The device is free again when
//! the thread has left, in whatever way.
//!
//! **Lasting** ([`Setup::reconnect`], by netlink): a connection that ended is waited for. Requests stay in the kernel until another
//! agent gives the device a new socket ([`adopt`]), at most so long. What was under way when the connection ended is sent again
//! when its own time limit has passed, so that one is kept short, and a server that is late on purpose loses its connection by it and
//! comes back with [`Connected::again`]. The kernel itself ends the wait: nobody has to be there for that.

use super::netlink::{Family, Lasting, Limits};
use crate::capture::DevNo;
use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::PathBuf,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    #[error(
        "this kernel has no NBD client: load its module with `modprobe nbd`, and at each boot with `echo nbd \
         >/etc/modules-load.d/holdfast-agent.conf`; some distributions have it in a package of its own (kernel-modules-extra)"
    )]
    Missing,
    #[error("all {tried} NBD devices are in use: load the module with more (`modprobe nbd nbds_max=64`)")]
    NoneFree { tried: u32 },
    #[error("could not {what} /dev/nbd{index}")]
    Device {
        what: &'static str,
        index: u32,
        #[source]
        source: io::Error,
    },
    #[error("could not ask the kernel's NBD client over netlink")]
    Netlink(#[source] io::Error),
    #[error("could not start a thread")]
    Thread(#[source] io::Error),
    #[error("/dev/nbd{index} did not come up within {} s", UP_MAX.as_secs())]
    NotUp { index: u32 },
}

/// What the kernel is told of the other end.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub bytes: u64,
    pub block: u32,
    /// A request that is not answered for this long ends the connection.
    pub timeout: Duration,
    /// A connection that ended is waited for so long; none: what is under way fails at once.
    pub reconnect: Option<Duration>,
    /// As in the NBD handshake.
    pub server_flags: u16,
}

const SET_SOCK: u32 = 0xab00;
const SET_BLOCK: u32 = 0xab01;
const DO_IT: u32 = 0xab03;
const CLEAR_SOCK: u32 = 0xab04;
const SET_BLOCKS: u32 = 0xab07;
const SET_TIMEOUT: u32 = 0xab09;
const SET_FLAGS: u32 = 0xab0a;

/// From the setup until the kernel serves the device.
const UP_MAX: Duration = Duration::from_secs(10);
const UP_POLL: Duration = Duration::from_millis(5);

fn sysfs(index: u32) -> PathBuf {
    PathBuf::from(format!("/sys/block/nbd{index}"))
}

fn call(device: &File, command: u32, argument: u64) -> io::Result<()> {
    // SAFETY: these commands take numbers; a socket's number is checked by the kernel.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), command as libc::Ioctl, argument) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The kernel takes whole seconds; a limit is never shorter than asked for.
fn seconds(limit: Duration) -> u64 {
    limit.as_millis().div_ceil(1000).max(1) as u64
}

fn in_use(index: u32) -> bool {
    sysfs(index).join("pid").exists()
}

/// A connected NBD device. Dropping it ends the connection.
#[derive(Debug)]
pub struct Connected {
    pub index: u32,
    /// For changes while it is connected; held open, or the kernel would end a lasting connection when somebody who looked at the
    /// device closes it.
    device: File,
    lasting: bool,
}

fn limits(timeout: Duration, reconnect: Duration) -> Limits {
    Limits { answer: timeout, reconnect }
}

fn open_device(index: u32) -> Result<File, NbdError> {
    let options = fs::OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC).clone();
    options.open(format!("/dev/nbd{index}")).map_err(|source| NbdError::Device { what: "open", index, source })
}

/// Makes a free NBD device speak to `socket`; it does so until the other end is closed or this process ends. Loads the module if it is not
/// there.
pub fn connect(socket: OwnedFd, setup: &Setup) -> Result<Connected, NbdError> {
    if !sysfs(0).exists() {
        // What comes of it shows below.
        let _ = Command::new("modprobe").arg("nbd").stdin(Stdio::null()).stderr(Stdio::null()).status();
        if !sysfs(0).exists() {
            return Err(NbdError::Missing);
        }
    }
    if let Some(reconnect) = setup.reconnect {
        return connect_lasting(&socket, setup, reconnect);
    }
    let (sender, answer) = mpsc::channel();
    let setup = *setup;
    thread::Builder::new()
        .name("nbd".to_owned())
        .spawn(move || {
            let set = set_up_any(&socket, &setup);
            let kept = set.as_ref().ok().map(|(_, device)| device.try_clone());
            let told = sender.send(set).is_ok();
            if let Some(Ok(device)) = kept {
                if told {
                    // Returns when the connection ends; a reason it may give was told by the leg as well.
                    let _ = call(&device, DO_IT, 0);
                }
                // Fails what is still under way.
                let _ = call(&device, CLEAR_SOCK, 0);
            }
        })
        .map_err(NbdError::Thread)?;
    let gone = || NbdError::Thread(io::Error::other("the thread ended"));
    let (index, device) = answer.recv().map_err(|_| gone())??;
    wait_up(index)?;
    Ok(Connected { index, device, lasting: false })
}

fn wait_up(index: u32) -> Result<(), NbdError> {
    let end = Instant::now() + UP_MAX;
    while !in_use(index) {
        if Instant::now() > end {
            return Err(NbdError::NotUp { index });
        }
        thread::sleep(UP_POLL);
    }
    Ok(())
}

fn connect_lasting(socket: &OwnedFd, setup: &Setup, reconnect: Duration) -> Result<Connected, NbdError> {
    let family = Family::open().map_err(NbdError::Netlink)?;
    let with = Lasting {
        bytes: setup.bytes,
        block: setup.block,
        server_flags: setup.server_flags,
        limits: limits(setup.timeout, reconnect),
    };
    let mut index = 0;
    while sysfs(index).exists() {
        if !in_use(index) {
            match family.connect(index, socket.as_raw_fd(), &with) {
                Ok(()) => {
                    // Not opened before: an open device counts as in use. Should somebody have looked at it and closed it in between, it is
                    // free again, and this an error like others.
                    let device = open_device(index)?;
                    wait_up(index)?;
                    return Ok(Connected { index, device, lasting: true });
                }
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                Err(source) => return Err(NbdError::Device { what: "connect", index, source }),
            }
        }
        index += 1;
    }
    Err(NbdError::NoneFree { tried: index })
}

/// The number of an NBD device in its name; none for any other device.
fn index_of(number: DevNo) -> Option<u32> {
    let link = fs::read_link(format!("/sys/dev/block/{number}")).ok()?;
    link.file_name()?.to_str()?.strip_prefix("nbd")?.parse().ok()
}

/// Gives a lasting connection that an agent before us left, and whose requests wait, a new socket. None: it is none, or is over.
pub fn adopt(number: DevNo, socket: &OwnedFd, timeout: Duration, reconnect: Duration) -> Option<Connected> {
    let index = index_of(number).filter(|i| in_use(*i))?;
    // Not opened before it answers again: opening may read.
    reconnected(index, socket, limits(timeout, reconnect)).ok()?;
    Some(Connected { index, device: open_device(index).ok()?, lasting: true })
}

fn reconnected(index: u32, socket: &OwnedFd, limits: Limits) -> Result<(), NbdError> {
    let family = Family::open().map_err(NbdError::Netlink)?;
    let end = Instant::now() + UP_MAX;
    loop {
        match family.reconnect(index, socket.as_raw_fd(), limits) {
            Ok(()) => return Ok(()),
            // It has not noticed yet that the old connection is dead.
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) && Instant::now() < end => thread::sleep(UP_POLL),
            Err(source) => return Err(NbdError::Device { what: "connect again", index, source }),
        }
    }
}

/// Ends a lasting connection that nobody serves: what waits for it fails now instead of later.
pub fn let_go(number: DevNo) {
    if let Some(index) = index_of(number).filter(|i| in_use(*i)) {
        disconnect(index);
    }
}

fn disconnect(index: u32) {
    if let Err(error) = Family::open().and_then(|family| family.disconnect(index)) {
        // One that was tied to its process, or is over already.
        tracing::debug!(index, %error, "could not end an NBD connection");
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        // A tied one ends with the leg at its other end.
        if self.lasting {
            disconnect(self.index);
        }
    }
}

/// Takes the first device that is not in use. Whoever sets one up at the same moment is told apart by the kernel (EBUSY).
fn set_up_any(socket: &OwnedFd, setup: &Setup) -> Result<(u32, File), NbdError> {
    let mut index = 0;
    while sysfs(index).exists() {
        if !in_use(index) {
            match set_up(socket, setup, index) {
                Err(NbdError::Device { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => {}
                other => return other.map(|device| (index, device)),
            }
        }
        index += 1;
    }
    Err(NbdError::NoneFree { tried: index })
}

fn set_up(socket: &OwnedFd, setup: &Setup, index: u32) -> Result<File, NbdError> {
    let failed = |what| move |source| NbdError::Device { what, index, source };
    let device = open_device(index)?;
    call(&device, SET_SOCK, socket.as_raw_fd() as u64).map_err(failed("connect"))?;
    let rest = call(&device, SET_BLOCK, u64::from(setup.block))
        .and_then(|()| call(&device, SET_BLOCKS, setup.bytes / u64::from(setup.block)))
        .and_then(|()| call(&device, SET_TIMEOUT, seconds(setup.timeout)))
        .and_then(|()| call(&device, SET_FLAGS, u64::from(setup.server_flags)));
    if let Err(source) = rest {
        let _ = call(&device, CLEAR_SOCK, 0);
        return Err(NbdError::Device { what: "set up", index, source });
    }
    Ok(device)
}

impl Connected {
    /// Whether it outlives this process, and a connection that ended.
    pub fn lasting(&self) -> bool {
        self.lasting
    }

    /// A new socket for a lasting connection that has ended.
    pub fn again(&self, socket: &OwnedFd, timeout: Duration, reconnect: Duration) -> Result<(), NbdError> {
        reconnected(self.index, socket, limits(timeout, reconnect))
    }

    /// Changes how long a request may wait, for its answer and for another connection.
    pub fn set_timeout(&self, timeout: Duration, reconnect: Option<Duration>) -> Result<(), NbdError> {
        if let Some(reconnect) = reconnect.filter(|_| self.lasting) {
            let set = Family::open().and_then(|f| f.set_limits(self.index, limits(timeout, reconnect)));
            return set.map_err(NbdError::Netlink);
        }
        call(&self.device, SET_TIMEOUT, seconds(timeout)).map_err(|source| NbdError::Device {
            what: "change the time limit of",
            index: self.index,
            source,
        })
    }

    pub fn number(&self) -> Result<DevNo, NbdError> {
        let (index, what) = (self.index, "read the number of");
        let text =
            fs::read_to_string(sysfs(index).join("dev")).map_err(|source| NbdError::Device { what, index, source })?;
        let parse = || {
            let (major, minor) = text.trim().split_once(':')?;
            Some(DevNo { major: major.parse().ok()?, minor: minor.parse().ok()? })
        };
        parse().ok_or(NbdError::Device { what, index, source: io::ErrorKind::InvalidData.into() })
    }

    /// Bounds what is in flight: the kernel has at most 128 requests of this length under way.
    pub fn bound_requests(&self, kib: u32) -> io::Result<()> {
        fs::write(sysfs(self.index).join("queue/max_sectors_kb"), kib.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_limit_is_rounded_up() {
        let limits = [(1, 1), (999, 1), (1000, 1), (1001, 2), (10_500, 11), (0, 1)];
        for (ms, wanted) in limits {
            assert_eq!(seconds(Duration::from_millis(ms)), wanted, "{ms} ms");
        }
    }
}
