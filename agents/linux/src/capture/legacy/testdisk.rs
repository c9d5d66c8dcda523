//! A disk of the agent's own, in memory, behind the kernel's loop driver: what calibration and self-test read from and write to. A disk of
//! the host is never written to for that. It is gone with its last open file, however the agent ends.

use crate::capture::{CaptureError, DevNo};
use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    process::{Command, Stdio},
};

/// Holes, but for what the self-test writes. Its dirty map is one piece.
pub const BYTES: u64 = 32 << 30;
/// Somebody else may take the number that was free a moment ago.
const TRIES: u32 = 20;

const CTL_GET_FREE: libc::c_ulong = 0x4c82;
const SET_FD: libc::c_ulong = 0x4c00;
const SET_STATUS64: libc::c_ulong = 0x4c04;
/// Where `lo_flags` lies in `struct loop_info64`, its length, and the flag that frees the device with its last user.
const FLAGS_AT: usize = 52;
const INFO_LEN: usize = 232;
const AUTOCLEAR: u32 = 4;
const BLKDISCARD: libc::c_ulong = 0x1277;

pub struct TestDisk {
    /// Opened for direct I/O.
    pub file: File,
    pub number: DevNo,
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> CaptureError {
    move |source| CaptureError::TestDisk { what, source }
}

fn ioctl(file: &File, command: libc::c_ulong, argument: u64) -> io::Result<libc::c_int> {
    // SAFETY: these commands take a number or a pointer to a struct that the callers below keep alive and long enough.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), command as libc::Ioctl, argument) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done) }
}

impl TestDisk {
    pub fn new() -> Result<Self, CaptureError> {
        // SAFETY: the name ends with a zero; the flag is a plain number.
        let memory = unsafe { libc::memfd_create(c"holdfast-self-test".as_ptr(), libc::MFD_CLOEXEC) };
        if memory < 0 {
            return Err(failed("make a file in memory")(io::Error::last_os_error()));
        }
        // SAFETY: a descriptor that was just made and belongs to nobody else.
        let memory = unsafe { File::from_raw_fd(memory) };
        memory.set_len(BYTES).map_err(failed("make a file in memory"))?;
        let control = || OpenOptions::new().read(true).write(true).open("/dev/loop-control");
        let control = control().or_else(|_| {
            // What comes of it shows when it is opened.
            let _ = Command::new("modprobe").arg("loop").stdin(Stdio::null()).stderr(Stdio::null()).status();
            control()
        });
        let control = control.map_err(failed("open /dev/loop-control (is the module `loop` there?)"))?;
        let mut tries = 0;
        loop {
            let free = ioctl(&control, CTL_GET_FREE, 0).map_err(failed("find a free loop device"))?;
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
                .open(format!("/dev/loop{free}"))
                .map_err(failed("open a loop device"))?;
            match ioctl(&file, SET_FD, memory.as_raw_fd() as u64) {
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) && tries < TRIES => tries += 1,
                Err(e) => return Err(failed("set a loop device up")(e)),
                Ok(_) => {
                    let mut info = [0u8; INFO_LEN];
                    info[FLAGS_AT..FLAGS_AT + 4].copy_from_slice(&AUTOCLEAR.to_ne_bytes());
                    ioctl(&file, SET_STATUS64, info.as_ptr() as u64).map_err(failed("set a loop device up"))?;
                    let number = file.metadata().map_err(failed("look at a loop device"))?.rdev();
                    let number = DevNo { major: libc::major(number), minor: libc::minor(number) };
                    return Ok(Self { file, number });
                }
            }
        }
    }

    pub fn sectors(&self) -> u64 {
        BYTES / 512
    }

    pub fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        let range = [at, len];
        ioctl(&self.file, BLKDISCARD, range.as_ptr() as u64).map(drop)
    }
}
