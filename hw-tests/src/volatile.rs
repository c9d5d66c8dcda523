//! A guest's disk with a cache that loses power: what was not flushed is there afterwards, or not, or in part.
//!
//! QEMU's own caches survive its being killed, for they are this machine's memory. So QEMU gets the disk from here, over NBD: a write is
//! answered when it is in the cache, a flush when everything that was answered before it is on the medium, a write with FUA when it is.
//! [`Volatile::cut`] then draws what a disk may do: of each write that was not flushed, in sectors, all, a beginning, or nothing.
//!
//! A server of the protocol's newstyle with simple replies, one connection at a time; of one request after the other, so that the order of
//! answers is the order of the writes. Bounds: the disk is kept in memory twice, and unflushed writes once more.

use crate::{Draw, process::wait_for};
use anyhow::{Context, Result, bail};
use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

const SECTOR: usize = 512;
const REQUEST_MAX: usize = 32 << 20;
/// A guest that was killed closes its connection at once.
const GONE_MAX: Duration = Duration::from_secs(30);

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const OPT_ABORT: u32 = 2;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_UNSUPPORTED: u32 = 1 << 31 | 1;
/// Has flags, flush, FUA, trim, write-zeroes.
const EXPORT_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6;
const FLAG_FUA: u16 = 1;
const EINVAL: u32 = 22;

struct Disk {
    /// As whoever reads it sees it.
    seen: Vec<u8>,
    medium: Vec<u8>,
    /// Answered and not flushed, in order.
    cached: Vec<(usize, Vec<u8>)>,
    connected: bool,
}

impl Disk {
    fn write(&mut self, at: usize, bytes: &[u8], fua: bool) {
        self.seen[at..at + bytes.len()].copy_from_slice(bytes);
        match fua {
            // Older writes to the same place may not come over it any more.
            true => {
                self.cached.push((at, bytes.to_vec()));
                self.flush();
            }
            false => self.cached.push((at, bytes.to_vec())),
        }
    }

    fn flush(&mut self) {
        for (at, bytes) in self.cached.drain(..) {
            self.medium[at..at + bytes.len()].copy_from_slice(&bytes);
        }
    }

    /// How many bytes were lost.
    fn cut(&mut self, draw: &mut Draw) -> u64 {
        for (at, bytes) in std::mem::take(&mut self.cached) {
            let sectors = bytes.len() / SECTOR;
            let kept = match draw.below(3) {
                0 => sectors,
                1 => draw.below(sectors as u64 + 1) as usize,
                _ => 0,
            };
            self.medium[at..at + kept * SECTOR].copy_from_slice(&bytes[..kept * SECTOR]);
        }
        let lost = self.seen.iter().zip(&self.medium).filter(|(s, m)| s != m).count() as u64;
        self.seen.copy_from_slice(&self.medium);
        lost
    }
}

/// A disk; its server ends with the test.
pub struct Volatile {
    disk: Arc<Mutex<Disk>>,
    socket: PathBuf,
}

impl Volatile {
    /// An empty disk, served at `socket`.
    pub fn serve(socket: &Path, bytes: usize) -> Result<Self> {
        let disk = Disk { seen: vec![0; bytes], medium: vec![0; bytes], cached: Vec::new(), connected: false };
        let disk = Arc::new(Mutex::new(disk));
        let listener = UnixListener::bind(socket).with_context(|| format!("listen at {}", socket.display()))?;
        let of = disk.clone();
        thread::Builder::new().name("volatile".to_owned()).spawn(move || {
            for stream in listener.incoming().map_while(std::io::Result::ok) {
                locked(&of).connected = true;
                // A guest that is killed ends it anyhow; one that is answered nonsense says so itself.
                let _ = converse(stream, &of);
                locked(&of).connected = false;
            }
        })?;
        Ok(Self { disk, socket: socket.to_owned() })
    }

    /// QEMU's words for it.
    pub fn drive(&self) -> String {
        format!(
            "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},if=virtio,cache.direct=off,cache.no-flush=off",
            self.socket.display()
        )
    }

    /// The power is gone: waits until nobody is connected, and draws what is left. Answers how many bytes are not as they were.
    pub fn cut(&self, draw: &mut Draw) -> Result<u64> {
        wait_for("the guest to be gone", GONE_MAX, || Ok((!locked(&self.disk).connected).then_some(())))?;
        Ok(locked(&self.disk).cut(draw))
    }

    /// What whoever reads it sees.
    pub fn content(&self) -> Vec<u8> {
        locked(&self.disk).seen.clone()
    }
}

fn locked(disk: &Mutex<Disk>) -> MutexGuard<'_, Disk> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}

fn take<const N: usize>(stream: &mut UnixStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn skip(stream: &mut UnixStream, bytes: u32) -> Result<()> {
    std::io::copy(&mut stream.take(u64::from(bytes)), &mut std::io::sink())?;
    Ok(())
}

fn converse(mut stream: UnixStream, disk: &Mutex<Disk>) -> Result<()> {
    stream.write_all(&[MAGIC.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat())?;
    // Fixed newstyle, no zeroes behind an answer.
    stream.write_all(&3u16.to_be_bytes())?;
    take::<4>(&mut stream)?;
    let size = locked(disk).seen.len() as u64;
    loop {
        if u64::from_be_bytes(take(&mut stream)?) != OPTION_MAGIC {
            bail!("no option");
        }
        let (option, len) = (u32::from_be_bytes(take(&mut stream)?), u32::from_be_bytes(take(&mut stream)?));
        skip(&mut stream, len)?;
        let mut answer = |kind: u32, data: &[u8]| -> Result<()> {
            let head = [option.to_be_bytes(), kind.to_be_bytes(), (data.len() as u32).to_be_bytes()].concat();
            stream.write_all(&[&REPLY_MAGIC.to_be_bytes()[..], &head, data].concat())?;
            Ok(())
        };
        match option {
            OPT_GO => {
                let export = [&0u16.to_be_bytes()[..], &size.to_be_bytes(), &EXPORT_FLAGS.to_be_bytes()].concat();
                answer(REP_INFO, &export)?;
                answer(REP_ACK, &[])?;
                break;
            }
            OPT_ABORT => return answer(REP_ACK, &[]),
            _ => answer(REP_UNSUPPORTED, &[])?,
        }
    }
    serve(stream, disk)
}

fn serve(mut stream: UnixStream, disk: &Mutex<Disk>) -> Result<()> {
    loop {
        if u32::from_be_bytes(take(&mut stream)?) != REQUEST_MAGIC {
            bail!("no request");
        }
        let (flags, command) = (u16::from_be_bytes(take(&mut stream)?), u16::from_be_bytes(take(&mut stream)?));
        let cookie: [u8; 8] = take(&mut stream)?;
        let offset = u64::from_be_bytes(take(&mut stream)?) as usize;
        let len = u32::from_be_bytes(take(&mut stream)?) as usize;
        let fua = flags & FLAG_FUA != 0;
        if len > REQUEST_MAX {
            bail!("a request of {len} bytes");
        }
        let mut data = Vec::new();
        if command == 1 {
            data.resize(len, 0);
            stream.read_exact(&mut data)?;
        }
        let mut disk = locked(disk);
        let inside = offset.checked_add(len).is_some_and(|end| end <= disk.seen.len());
        let mut error = 0;
        let mut out = Vec::new();
        match command {
            0 if inside => out.extend_from_slice(&disk.seen[offset..offset + len]),
            1 if inside => disk.write(offset, &data, fua),
            2 => return Ok(()),
            3 => disk.flush(),
            // What is trimmed reads as before: a disk may do that.
            4 if inside => {}
            6 if inside => disk.write(offset, &vec![0; len], fua),
            _ => error = EINVAL,
        }
        drop(disk);
        stream.write_all(&[&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &cookie, &out].concat())?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::Client;

    #[test]
    fn what_was_flushed_is_there_and_the_rest_may_be() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("disk");
        let disk = Volatile::serve(&socket, 1 << 20).unwrap();
        let (mut lost, mut kept) = (0, 0);
        for round in 0..40u64 {
            let mut draw = Draw::new(round);
            let mut client = Client::connect(&socket, "").unwrap();
            client.write(0, &[1 + round as u8; 4096]).unwrap();
            client.flush().unwrap();
            client.write(8192, &[101 + round as u8; 4096]).unwrap();
            let mut back = [0; 4096];
            client.read(8192, &mut back).unwrap();
            assert_eq!(back, [101 + round as u8; 4096], "the cache is read");
            drop(client);
            disk.cut(&mut draw).unwrap();
            let left = disk.content();
            assert_eq!(left[..4096], [1 + round as u8; 4096]);
            let new = left[8192..12288].iter().filter(|b| **b == 101 + round as u8).count();
            assert_eq!(new % SECTOR, 0, "sectors are written whole");
            lost += u64::from(new < 4096);
            kept += u64::from(new > 0);
        }
        assert!(lost > 5 && kept > 5, "lost {lost}, kept {kept}");
    }
}
