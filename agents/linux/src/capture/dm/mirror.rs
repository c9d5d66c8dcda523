//! Putting a mirror into a live volume, watching it, and taking it out again.
//!
//! ```text
//!   before            with the mirror                         after
//!   X: linear …       X:     mirror core … keep_log           X: linear …
//!                      ├ leg 0  X-holdfast: linear …  (the old table, word for word)
//!                      └ leg 1  /dev/nbdN ── socketpair ── agent
//! ```
//!
//! X keeps its number, its name and whoever has it open; only its table changes, in one call each way ([`DeviceMapper::swap`]). What
//! was under way completes on the old table, so every write is either on the old table alone or on both legs.
//!
//! **Nothing has to be remembered.** The inner device is known by its identifier ([`uuid_of`]), the leg by the mirror's table. So an agent
//! that was killed is followed by one that finds the mirror and goes on ([`Mirror::put_in`]), and `holdfast-agent remove` needs neither state nor
//! box ([`take_out_all`]).
//!
//! **Order of steps, and what a crash between them leaves:** inner device made (harmless, found again by its identifier) → leg connected
//! (it ends with its process) → table loaded (dropped with the next load) → swap (in one call). Taking out: old table loaded → swap →
//! inner removed → leg closed.

use super::{
    ioctl::{DeviceMapper, DmError, InFlight, NAME_MAX, UUID_MAX},
    leg::{self, Answers, Begin, FromLeg, GUARD_MARGIN_MS, Leg, LegNo},
    nbdk::{self, Connected, NbdError, Setup},
    table::{self, Found, Health, TableRefusal},
};
use crate::capture::DevNo;
use model::{ByteLen, SECTOR};
use std::{
    fs, io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

/// With it begin the identifiers of devices of ours.
pub const UUID_PREFIX: &str = "HOLDFAST-";
const NAME_SUFFIX: &str = "-holdfast";
/// The kernel ends a leg whose agent hangs this long after the guard should have answered.
const KERNEL_MARGIN_MS: u64 = 5_000;
/// The oldest kernel that this was run on. On 4.18 a write that was under way to the leg when its agent was killed never came back, and with it
/// the host's (`hw-tests/tests/without_bpf.rs` found it); nothing that can be asked tells which kernels in between have that mended.
const KERNEL_MIN: (u32, u32) = (5, 10);
/// A device that is still held by a probe is let go within moments.
const REMOVE_TRIES: u32 = 50;
const REMOVE_PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    #[error(transparent)]
    Dm(#[from] DmError),
    #[error("could not set up the mirror's second leg")]
    Nbd(#[from] NbdError),
    #[error("{name} cannot be mirrored")]
    Table {
        name: String,
        #[source]
        source: TableRefusal,
    },
    #[error(
        "{name} cannot be mirrored on this kernel, {release}: older ones than {}.{} may hold the host's writes for ever when the agent dies",
        KERNEL_MIN.0, KERNEL_MIN.1
    )]
    OldKernel { name: String, release: String },
    #[error("{name} is read-only: nothing is written to it")]
    ReadOnly { name: String },
    #[error("{name} is suspended by somebody else")]
    Suspended { name: String },
    #[error("{name} has {has} sectors, {had} were protected")]
    Size { name: String, had: u64, has: u64 },
    #[error(
        "the local disk under {name} has failed writes, which only the box has: nothing is copied from it. Mend the disk, or restore from \
         the box, then run `holdfast-agent remove` with the agent stopped and start it again"
    )]
    LocalDiskFailed { name: String },
    #[error("could not {what}")]
    System {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

/// The identifier of the inner device of a volume. Does not begin as LVM's do: its tools leave it alone.
fn uuid_of(uuid: &str, name: &str) -> String {
    let own = if uuid.is_empty() { name } else { uuid };
    let mut out = format!("{UUID_PREFIX}{own}");
    // Both are bounded by the kernel; together with the prefix one may be too long, and its end tells more than its beginning.
    if out.len() > UUID_MAX {
        out = format!("{UUID_PREFIX}{:016x}", fold(own));
    }
    out
}

fn name_of(name: &str) -> String {
    let out = format!("{name}{NAME_SUFFIX}");
    if out.len() > NAME_MAX { format!("{:016x}{NAME_SUFFIX}", fold(name)) } else { out }
}

fn fold(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

fn begin(first: LegNo, answers: Answers, sectors: u64, bounds: Bounds) -> Begin {
    Begin { first, answers, info: leg::export(ByteLen(sectors * SECTOR)), bound_ms: bounds.answer_ms }
}

fn sysfs(device: DevNo, file: &str) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{device}/{file}"))
}

/// How long requests may wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// The leg's guard answers what is older.
    pub answer_ms: u64,
    /// The host is held without an answer, and without an agent.
    pub hold: Option<Hold>,
}

/// A host that would rather wait than write what only it has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hold {
    /// How long the box has before it counts as late: after that the kernel keeps the requests, not the agent.
    pub wait_ms: u64,
    /// How long the kernel keeps them for an agent to come.
    pub reconnect_ms: u64,
}

impl Bounds {
    /// After this the kernel takes a leg for dead that says nothing at all.
    pub fn kernel_ms(self) -> u64 {
        self.hold.map_or(self.answer_ms, |h| h.wait_ms) + GUARD_MARGIN_MS + KERNEL_MARGIN_MS
    }
    /// The worst stall of the host.
    pub fn stall_ms_max(self) -> u64 {
        self.kernel_ms() + self.hold.map_or(0, |h| h.reconnect_ms)
    }
    fn timeout(self) -> Duration {
        Duration::from_millis(self.kernel_ms())
    }
    fn reconnect(self) -> Option<Duration> {
        self.hold.map(|h| Duration::from_millis(h.reconnect_ms))
    }
}

/// How a mirror was found at a look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen {
    Whole,
    /// The local disk failed writes or reads; the host lives from the leg.
    LocalFailed,
    /// The kernel has left our leg out.
    LegOut,
    /// Somebody (LVM, cryptsetup) has put another table in.
    Replaced,
    /// The volume is not active any more.
    Gone,
}

/// A mirror in use.
pub struct Mirror {
    pub name: String,
    outer: DevNo,
    inner: DevNo,
    sectors: u64,
    nbd: Connected,
    pub leg: Leg,
    /// It was to hold the host, and found that the kernel had let it go: nobody came in time.
    pub let_go: bool,
}

/// Major and minor number of a kernel's release.
fn numbers(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// No mirror where it could harm the host.
fn check_kernel(name: &str) -> Result<(), MirrorError> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    match numbers(&release) {
        Some(have) if have >= KERNEL_MIN => Ok(()),
        _ => Err(MirrorError::OldKernel { name: name.to_owned(), release }),
    }
}

/// Whether a mirror of ours could be put in: the same looks as [`Mirror::put_in`], and nothing changed.
pub fn check(dm: &DeviceMapper, outer: DevNo) -> Result<(), MirrorError> {
    let info = dm.info(outer)?;
    check_kernel(&info.name)?;
    if info.uuid.starts_with(UUID_PREFIX) {
        return Err(MirrorError::Table { name: info.name, source: TableRefusal::ForeignMirror });
    }
    if info.read_only {
        return Err(MirrorError::ReadOnly { name: info.name });
    }
    let ours = dm.by_uuid(&uuid_of(&info.uuid, &info.name))?.map(|i| i.number);
    match table::judge(&dm.table(outer)?, ours) {
        Ok(_) => Ok(()),
        Err(source) => Err(MirrorError::Table { name: info.name, source }),
    }
}

/// Whether our mirror is in a volume's table, whoever put it in.
pub fn is_in(dm: &DeviceMapper, outer: DevNo) -> Result<bool, DmError> {
    let info = dm.info(outer)?;
    let ours = dm.by_uuid(&uuid_of(&info.uuid, &info.name))?.map(|i| i.number);
    Ok(matches!(table::judge(&dm.table(outer)?, ours), Ok(Found::Mirrored { .. })))
}

impl Mirror {
    /// Puts a mirror into a live volume, or a new leg into a mirror that an agent before us left. Writes arrive at `deliver` from before
    /// this returns; when they began, only the caller can say: everything before is to be copied.
    pub fn put_in(
        dm: &Arc<DeviceMapper>,
        outer: DevNo,
        sectors: u64,
        bounds: Bounds,
        answers: Answers,
        deliver: impl Fn(FromLeg) -> bool + Send + Sync + 'static,
    ) -> Result<Self, MirrorError> {
        let info = dm.info(outer)?;
        let name = info.name.clone();
        check_kernel(&name)?;
        if info.read_only {
            return Err(MirrorError::ReadOnly { name });
        }
        if info.suspended {
            return Err(MirrorError::Suspended { name });
        }
        let uuid = uuid_of(&info.uuid, &name);
        let known = dm.by_uuid(&uuid)?.map(|i| i.number);
        let table = dm.table(outer)?;
        let found = table::judge(&table, known).map_err(|source| MirrorError::Table { name: name.clone(), source })?;
        let (has, again) = match found {
            Found::Plain { sectors } => (sectors, false),
            Found::Mirrored { sectors, .. } => (sectors, true),
        };
        if has != sectors {
            return Err(MirrorError::Size { name, had: sectors, has });
        }
        let inner = match (&found, known) {
            (Found::Mirrored { inner, .. }, _) => {
                if health_of(dm, outer)?.is_some_and(|(local, _)| local != Health::Alive) {
                    return Err(MirrorError::LocalDiskFailed { name });
                }
                *inner
            }
            // Left by a crash, or LVM has put its own table back: what it holds may be older than that.
            (Found::Plain { .. }, Some(inner)) => {
                dm.load(inner, &table, false)?;
                dm.start(inner)?;
                inner
            }
            (Found::Plain { .. }, None) => Self::make_inner(dm, &name_of(&name), &uuid, &table)?,
        };
        let (leg, kernel) = Self::serve(dm, [outer, inner], begin(1, answers, sectors, bounds), deliver)?;
        let mut let_go = false;
        if let Found::Mirrored { leg: old, .. } = &found {
            // What waits in the kernel for an agent goes on with this one, if the host is to be held; else it goes on without.
            let whole = health_of(dm, outer)? == Some((Health::Alive, Health::Alive));
            let taken = bounds
                .reconnect()
                .filter(|_| whole)
                .and_then(|reconnect| nbdk::adopt(*old, &kernel, bounds.timeout(), reconnect));
            if let Some(nbd) = taken {
                return Ok(Self { name, outer, inner, sectors, nbd, leg, let_go });
            }
            nbdk::let_go(*old);
            let_go = bounds.hold.is_some() && !whole;
        }
        let made = Self::connect(kernel, sectors, bounds).and_then(|nbd| {
            let mirror = Self { name, outer, inner, sectors, nbd, leg, let_go };
            mirror.swap_in(dm, sectors, again).map(|()| mirror)
        });
        if made.is_err() && matches!(found, Found::Plain { .. }) {
            // As it was before. What cannot be removed now is found by the next try.
            let _ = dm.remove(inner);
        }
        made
    }

    fn make_inner(
        dm: &DeviceMapper,
        name: &str,
        uuid: &str,
        table: &[super::ioctl::Target],
    ) -> Result<DevNo, MirrorError> {
        let inner = dm.create(name, uuid)?;
        let started = dm.load(inner, table, false).and_then(|()| dm.start(inner));
        if let Err(e) = started {
            let _ = dm.remove(inner);
            return Err(e.into());
        }
        Ok(inner)
    }

    /// Serves a leg; answers it and the kernel's end of it.
    fn serve(
        dm: &Arc<DeviceMapper>,
        [outer, inner]: [DevNo; 2],
        begin: Begin,
        deliver: impl Fn(FromLeg) -> bool + Send + Sync + 'static,
    ) -> Result<(Leg, OwnedFd), MirrorError> {
        let system = |what| move |source| MirrorError::System { what, source };
        // Without it the count of writes under way is always zero.
        if fs::read_to_string(sysfs(inner, "queue/iostats")).is_ok_and(|t| t.trim() == "0") {
            fs::write(sysfs(inner, "queue/iostats"), "1").map_err(system("make the kernel count writes under way"))?;
        }
        let (kernel, ours) = UnixStream::pair().map_err(system("make a socket pair"))?;
        let asks = dm.clone();
        // When it cannot be told, the engine is asked.
        let mirror_reads = move || {
            health_of(&asks, outer).map_or(true, |health| health.is_some_and(|(local, _)| local != Health::Alive))
        };
        let leg = Leg::serve_from(begin, ours, mirror_reads, deliver).map_err(system("start the leg's threads"))?;
        Ok((leg, kernel.into()))
    }

    fn connect(kernel: OwnedFd, sectors: u64, bounds: Bounds) -> Result<Connected, MirrorError> {
        let info = leg::export(ByteLen(sectors * SECTOR));
        let setup = Setup {
            bytes: info.size.0,
            block: SECTOR as u32,
            timeout: bounds.timeout(),
            reconnect: bounds.reconnect(),
            server_flags: leg::kernel_flags(&info),
        };
        let nbd = nbdk::connect(kernel, &setup)?;
        if let Err(e) = nbd.bound_requests(leg::REQUEST_KIB) {
            tracing::warn!(error = %e, "could not bound the leg's requests: it may hold more of the host's writes in memory");
        }
        Ok(nbd)
    }

    /// Whether the host waits for an agent when there is none.
    pub fn holds(&self) -> bool {
        self.nbd.lasting()
    }

    /// A new leg for a mirror that holds the host, whose connection has ended. What waits in the kernel comes again by it.
    pub fn again(
        &mut self,
        dm: &Arc<DeviceMapper>,
        bounds: Bounds,
        deliver: impl Fn(FromLeg) -> bool + Send + Sync + 'static,
    ) -> Result<(), MirrorError> {
        let Some(reconnect) = bounds.reconnect() else { return Ok(()) };
        let first = self.leg.last() + 1;
        let begin = begin(first, Answers::Engine, self.sectors, bounds);
        let (leg, kernel) = Self::serve(dm, [self.outer, self.inner], begin, deliver)?;
        self.nbd.again(&kernel, bounds.timeout(), reconnect)?;
        self.leg = leg;
        Ok(())
    }

    /// Changes the table. A leg that was there before is dead, or dies with its process.
    fn swap_in(&self, dm: &DeviceMapper, sectors: u64, again: bool) -> Result<(), MirrorError> {
        let number = self.nbd.number()?;
        let loaded = dm.load(self.outer, &[table::mirror(sectors, self.inner, number)], false);
        let how = if again { InFlight::HandOver } else { InFlight::Complete };
        if let Err(e) = loaded.and_then(|()| dm.swap(self.outer, how)) {
            // The old table is still in use. Should the device be suspended, this resumes it with that.
            let _ = dm.clear(self.outer);
            let _ = dm.resume(self.outer);
            return Err(e.into());
        }
        Ok(())
    }

    /// The policy has changed.
    pub fn set_bounds(&self, bounds: Bounds) -> Result<(), MirrorError> {
        self.leg.set_bound(bounds.answer_ms);
        Ok(self.nbd.set_timeout(bounds.timeout(), bounds.reconnect())?)
    }

    /// The volume itself.
    pub fn outer(&self) -> DevNo {
        self.outer
    }
    /// The device that holds the volume's old table; what is copied is read from here.
    pub fn inner(&self) -> DevNo {
        self.inner
    }

    /// A look at the mirror; cheap.
    pub fn look(&self, dm: &DeviceMapper) -> Result<Seen, MirrorError> {
        let status = match dm.status(self.outer) {
            Ok(status) => status,
            Err(e) if e.is_gone() => return Ok(Seen::Gone),
            Err(e) => return Err(e.into()),
        };
        let [only] = status.as_slice() else { return Ok(Seen::Replaced) };
        if only.kind != "mirror" {
            return Ok(Seen::Replaced);
        }
        let ours = format!("2 {} {} ", self.inner, self.nbd.number()?);
        if !only.params.starts_with(&ours) {
            return Ok(Seen::Replaced);
        }
        Ok(match table::health(&only.params) {
            Some((Health::Alive, Health::Alive)) => Seen::Whole,
            Some((Health::Alive, _)) => Seen::LegOut,
            _ => Seen::LocalFailed,
        })
    }

    /// Writes under way on the local leg.
    pub fn local_writes_under_way(&self) -> Option<u64> {
        super::order::writes_under_way(&fs::read_to_string(sysfs(self.inner, "inflight")).ok()?)
    }

    /// Gives the volume its old table back. `parted`: the leg's connection has ended, and the kernel keeps what waits for it.
    pub fn take_out(self, dm: &DeviceMapper, parted: bool) -> Result<(), MirrorError> {
        self.leg.open_up();
        if parted {
            nbdk::let_go(self.nbd.number()?);
        }
        restore(dm, self.outer, self.inner)
    }
}

/// A moment with nothing under way on the device that holds a volume's old table: that is given to it once more. Its kinds keep nothing of
/// their own ([`table::judge`]), so nothing else changes; and in one call, so that whoever is killed in it leaves no device suspended,
/// which could be the one that the next agent has to be read from.
pub fn fence(dm: &DeviceMapper, inner: DevNo) -> Result<(), DmError> {
    dm.load(inner, &dm.table(inner)?, false)?;
    if let Err(e) = dm.swap(inner, InFlight::Complete) {
        let _ = dm.clear(inner);
        let _ = dm.resume(inner);
        return Err(e);
    }
    Ok(())
}

fn health_of(dm: &DeviceMapper, outer: DevNo) -> Result<Option<(Health, Health)>, DmError> {
    Ok(dm.status(outer)?.first().and_then(|t| table::health(&t.params)))
}

/// Puts the inner device's table back where the mirror is, and removes it.
fn restore(dm: &DeviceMapper, outer: DevNo, inner: DevNo) -> Result<(), MirrorError> {
    let table = match dm.table(outer) {
        Ok(table) => Some(table),
        Err(e) if e.is_gone() => None,
        Err(e) => return Err(e.into()),
    };
    if let Some(table) = table
        && let Ok(Found::Mirrored { .. }) = table::judge(&table, Some(inner))
    {
        dm.load(outer, &dm.table(inner)?, false)?;
        if let Err(e) = dm.swap(outer, InFlight::HandOver) {
            let _ = dm.resume(outer);
            return Err(e.into());
        }
    }
    let mut tries = 0;
    loop {
        match dm.remove(inner) {
            Err(DmError::Call { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) && tries < REMOVE_TRIES => {
                tries += 1;
                std::thread::sleep(REMOVE_PAUSE);
            }
            other => return Ok(other?),
        }
    }
}

/// Takes every mirror of ours out of this host; answers the names of the volumes that have their own table again.
pub fn take_out_all(dm: &DeviceMapper) -> Result<Vec<String>, MirrorError> {
    let mut out = Vec::new();
    let devices = dm.list()?;
    for (inner, _) in &devices {
        let Ok(info) = dm.info(*inner) else { continue };
        if !info.uuid.starts_with(UUID_PREFIX) {
            continue;
        }
        let mirrored = |(device, name): &(DevNo, String)| {
            let table = dm.table(*device).ok()?;
            match table::judge(&table, Some(*inner)) {
                Ok(Found::Mirrored { leg, .. }) => Some((*device, leg, name.clone())),
                _ => None,
            }
        };
        match devices.iter().find_map(mirrored) {
            Some((outer, leg, name)) => {
                // Nobody will come for what it keeps.
                nbdk::let_go(leg);
                restore(dm, outer, *inner)?;
                out.push(name);
            }
            // Left over: nobody's leg any more.
            None => dm.remove(*inner)?,
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ours_is_known_by_name_and_identifier_however_long_they_are() {
        assert_eq!(uuid_of("LVM-abc", "vg-root"), "HOLDFAST-LVM-abc");
        assert_eq!(uuid_of("", "plain"), "HOLDFAST-plain");
        assert_eq!(name_of("vg-root"), "vg-root-holdfast");
        let (long, other) = ("n".repeat(NAME_MAX), format!("{}m", "n".repeat(NAME_MAX - 1)));
        assert!(name_of(&long).len() <= NAME_MAX && uuid_of(&"u".repeat(UUID_MAX), &long).len() <= UUID_MAX);
        assert_ne!(name_of(&long), name_of(&other));
    }

    #[test]
    fn a_kernels_release_is_read_as_numbers() {
        for (release, want) in [("4.18.0-25-generic", (4, 18)), ("5.10.0-46-amd64", (5, 10)), ("6.1.192", (6, 1))] {
            assert_eq!(numbers(release), Some(want));
        }
        assert!(numbers("6.1").is_some_and(|n| n < (6, 12) && n > KERNEL_MIN));
        assert_eq!((numbers(""), numbers("linux"), numbers("6")), (None, None, None));
    }

    #[test]
    fn the_kernel_gives_up_after_the_guard() {
        let bounds = Bounds { answer_ms: 5_000, hold: None };
        assert!(bounds.kernel_ms() > bounds.answer_ms + GUARD_MARGIN_MS);
        assert_eq!(bounds.stall_ms_max(), bounds.kernel_ms());
        // Held: the kernel has what waits soon, and keeps it so long; the guard comes after.
        let held = Bounds { answer_ms: 300_000, hold: Some(Hold { wait_ms: 5_000, reconnect_ms: 300_000 }) };
        assert_eq!(held.kernel_ms(), bounds.kernel_ms());
        assert!(held.kernel_ms() < held.answer_ms && held.stall_ms_max() > held.answer_ms);
    }
}
