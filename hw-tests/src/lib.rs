//! The rig: what black-box tests, `cargo xtask try` and `cargo xtask bench` stand on.
//!
//! Nothing here links a product crate. The box, the agent and the command line are started as programs and spoken to
//! over their documented faces (control socket, NBD, TLS), by clients written here from the public protocols alone: a
//! mistake shared by our server and our own client would otherwise pass every test.
//!
//! - [`process`]: programs that die with the test, a time limit on every wait;
//! - [`tools`]: finding system tools, saying which package brings a missing one;
//! - [`nbd`]: a small NBD client;
//! - [`net`]: a host behind a cable that can be pulled;
//! - [`control`]: JSON over the box's control socket;
//! - [`product`]: the three binaries, a box and an agent in a folder;
//! - [`disk`]: loop disks with a file system and a workload, as root;
//! - [`image`]: an ext4 image changed in rounds without root;
//! - [`load`]: a writer whose every state is known;
//! - [`compare`]: a view against its oracle, byte by byte;
//! - [`line`]: a network line that is cut or goes half-open;
//! - [`postgres`]: a client that commits rows over a network;
//! - [`power`]: disks that lose power;
//! - [`volatile`]: a guest's disk whose cache loses power;
//! - [`dm_host`]: such a guest whose disk is a volume of the device mapper;
//! - [`guest`] and [`qmp`]: QEMU guests with Debian's kernel and a busybox initramfs;
//! - [`debian`]: guests that are whole Debian hosts, for what a reboot shows.
//!
//! Tests are named by what they promise. One that cannot run here prints `SKIPPED: why` through [`skip`] and is counted
//! by `cargo xtask test`; nothing is skipped in silence.

pub mod compare;
pub mod control;
pub mod debian;
pub mod disk;
pub mod dm_host;
pub mod guest;
pub mod image;
pub mod line;
pub mod load;
pub mod nbd;
pub mod net;
pub mod postgres;
pub mod power;
pub mod process;
pub mod product;
pub mod qmp;
pub mod record;
pub mod tools;
pub mod volatile;

/// Prints why a test did not run, in the form `cargo xtask test` counts.
pub fn skip(why: impl std::fmt::Display) {
    println!("SKIPPED: {why}");
}

/// A test's folder. Removed by [`Scratch::done`]; a test that fails leaves it and says where it is.
#[derive(Debug)]
pub struct Scratch(Option<tempfile::TempDir>);

impl Scratch {
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self(Some(tempfile::Builder::new().prefix("hf-").tempdir()?)))
    }
    pub fn path(&self) -> &std::path::Path {
        self.0.as_ref().map_or(std::path::Path::new("/"), |dir| dir.path())
    }
    /// The test has passed.
    pub fn done(mut self) -> anyhow::Result<()> {
        Ok(self.0.take().map_or(Ok(()), tempfile::TempDir::close)?)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(dir) = self.0.take() {
            eprintln!("what the test left: {}", dir.keep().display());
        }
    }
}

/// A small generator: workloads must be the same for the same seed, and unguessable content defeats compression.
#[derive(Clone, Debug)]
pub struct Draw(u64);

impl Draw {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn word(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    /// A number below `bound`, which must not be zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.word() % bound
    }
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.word().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}
