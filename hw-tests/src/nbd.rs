//! A small NBD client over a unix socket or TCP without TLS: fixed newstyle, `NBD_OPT_GO`, simple replies.
//!
//! Written from the protocol's specification, on purpose without the product's own client, so that the two check each
//! other. One request at a time: slow and obvious.

use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::File,
    io::{Read, Write},
    os::unix::{fs::FileExt, net::UnixStream},
    path::Path,
    time::Duration,
};

/// A server that says nothing for this long is taken as hung.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Bytes asked for at once; servers must take 32 MiB, 1 MiB keeps memory small.
pub const CHUNK: usize = 1 << 20;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISCONNECT: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_WRITE_ZEROES: u16 = 6;
const CMD_FLAG_FUA: u16 = 1;

/// A connection to one export.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    size: u64,
    flags: u16,
    cookie: u64,
}

impl Client {
    pub fn connect(socket: &Path, export: &str) -> Result<Self> {
        let what = || format!("NBD export {export:?} at {}", socket.display());
        let stream = UnixStream::connect(socket).with_context(what)?;
        stream.set_read_timeout(Some(SILENCE_MAX))?;
        stream.set_write_timeout(Some(SILENCE_MAX))?;
        let mut client = Self { stream, size: 0, flags: 0, cookie: 0 };
        client.negotiate(export).with_context(what)?;
        Ok(client)
    }

    pub fn size(&self) -> u64 {
        self.size
    }
    /// Whether the server refuses writes.
    pub fn read_only(&self) -> bool {
        self.flags & 2 != 0
    }

    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.request(CMD_READ, 0, offset, bytes.len() as u32)?;
        self.reply("read", offset)?;
        self.stream.read_exact(bytes).with_context(|| format!("read {} bytes at {offset}", bytes.len()))
    }
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.write_flagged(0, offset, bytes)
    }
    /// A write that is on stable storage when it returns.
    pub fn write_fua(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.write_flagged(CMD_FLAG_FUA, offset, bytes)
    }
    fn write_flagged(&mut self, flags: u16, offset: u64, bytes: &[u8]) -> Result<()> {
        self.request(CMD_WRITE, flags, offset, bytes.len() as u32)?;
        self.stream.write_all(bytes).with_context(|| format!("write {} bytes at {offset}", bytes.len()))?;
        self.reply("write", offset)
    }
    pub fn flush(&mut self) -> Result<()> {
        self.request(CMD_FLUSH, 0, 0, 0)?;
        self.reply("flush", 0)
    }
    pub fn trim(&mut self, offset: u64, len: u32) -> Result<()> {
        self.request(CMD_TRIM, 0, offset, len)?;
        self.reply("trim", offset)
    }
    pub fn write_zeroes(&mut self, offset: u64, len: u32) -> Result<()> {
        self.request(CMD_WRITE_ZEROES, 0, offset, len)?;
        self.reply("write zeroes", offset)
    }

    /// Copies the whole export into a file, leaving holes where it reads as zeroes.
    pub fn copy_to(&mut self, path: &Path) -> Result<()> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        file.set_len(self.size)?;
        let mut buffer = vec![0; CHUNK];
        let mut offset = 0;
        while offset < self.size {
            let len = CHUNK.min((self.size - offset) as usize);
            self.read(offset, &mut buffer[..len])?;
            if buffer[..len].iter().any(|b| *b != 0) {
                file.write_all_at(&buffer[..len], offset).with_context(|| format!("write {}", path.display()))?;
            }
            offset += len as u64;
        }
        Ok(())
    }

    fn negotiate(&mut self, export: &str) -> Result<()> {
        ensure!(self.be64()? == MAGIC && self.be64()? == OPTION_MAGIC, "the server does not speak newstyle NBD");
        let server = self.be16()?;
        ensure!(server & 1 != 0, "the server does not speak fixed newstyle");
        // Fixed newstyle, and no zeroes after the old answer.
        self.stream.write_all(&3u32.to_be_bytes())?;
        let mut go = (export.len() as u32).to_be_bytes().to_vec();
        go.extend(export.as_bytes());
        go.extend(0u16.to_be_bytes());
        let mut option = OPTION_MAGIC.to_be_bytes().to_vec();
        option.extend(OPT_GO.to_be_bytes());
        option.extend((go.len() as u32).to_be_bytes());
        option.extend(&go);
        self.stream.write_all(&option)?;
        loop {
            ensure!(self.be64()? == REPLY_MAGIC, "an option reply has a wrong magic");
            let (option, reply, len) = (self.be32()?, self.be32()?, self.be32()?);
            ensure!(option == OPT_GO && len <= 65536, "an option reply to {option} of {len} bytes");
            let mut data = vec![0; len as usize];
            self.stream.read_exact(&mut data)?;
            match reply {
                REP_ACK => break,
                REP_INFO if data.len() >= 12 && data[..2] == INFO_EXPORT.to_be_bytes() => {
                    self.size = u64::from_be_bytes(data[2..10].try_into()?);
                    self.flags = u16::from_be_bytes(data[10..12].try_into()?);
                }
                REP_INFO => {}
                refused => bail!("the server refused ({refused:#x}): {}", String::from_utf8_lossy(&data)),
            }
        }
        ensure!(self.flags & 1 != 0, "the server sent no export information");
        Ok(())
    }

    fn request(&mut self, command: u16, flags: u16, offset: u64, len: u32) -> Result<()> {
        self.cookie += 1;
        let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
        request.extend(flags.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(self.cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        self.stream.write_all(&request).context("send an NBD request")
    }

    fn reply(&mut self, what: &str, offset: u64) -> Result<()> {
        let magic = self.be32().with_context(|| format!("answer to {what} at {offset}"))?;
        ensure!(magic == SIMPLE_REPLY_MAGIC, "answer to {what} at {offset}: magic {magic:#x}");
        let (error, cookie) = (self.be32()?, self.be64()?);
        ensure!(cookie == self.cookie, "answer to {what} at {offset} is for another request");
        if error != 0 {
            return Err(std::io::Error::from_raw_os_error(error as i32))
                .with_context(|| format!("{what} at {offset} was refused"));
        }
        Ok(())
    }

    fn be16(&mut self) -> Result<u16> {
        let mut bytes = [0; 2];
        self.stream.read_exact(&mut bytes)?;
        Ok(u16::from_be_bytes(bytes))
    }
    fn be32(&mut self) -> Result<u32> {
        let mut bytes = [0; 4];
        self.stream.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }
    fn be64(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // A farewell is a courtesy; a server that is already gone needs none.
        let _gone = self.request(CMD_DISCONNECT, 0, 0, 0);
    }
}
