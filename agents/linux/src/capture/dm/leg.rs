//! The second leg of a mirror: an NBD server over a socketpair with the kernel, whose replies are given by somebody else.
//!
//! ```text
//!  kernel NBD ──request──▶ reader thread ──FromLeg::Request──▶ engine ──answer(id)──▶ kernel NBD
//!                                              guard thread ──answers what is overdue──▶
//! ```
//!
//! A write is stamped when it arrives and handed on in the order of arrival. Its reply is the host's: until then the application's
//! write has not returned. Who replies is the engine, when the box has the write; **or the guard**, when the bound has
//! passed and the engine has not answered, because it is itself waiting for the disk, stopped in a debugger, or broken. So no failure of
//! the engine holds the host longer than the bound. The guard says so ([`FromLeg::Overran`]), and what it let pass is no promise.
//!
//! **Async** ([`Answers::AtOnce`]): a write is answered as soon as it lies in the engine's inbox, so the engine may wait for the very disk.
//! What does not fit ([`Budget`](super::budget::Budget)) is not kept and the host does not wait for room: its place is told as lost, before
//! anything that was written after it.
//!
//! [`Leg::open_up`] ends all waiting: what waits and what comes is answered at once and not handed on. Needed before the mirror is
//! taken out, because the kernel waits for what is under way then.
//!
//! The mirror reads here only once its local leg has failed, and the kernel says so before it does. Every other read is somebody's who looks
//! what is on the new device (udev, our own list of disks): it sees zeroes, without asking the engine, which may be the one that looks.
//!
//! Bounds: the kernel has at most 128 requests under way; with [`REQUEST_KIB`] each that is 32 MiB.

use super::budget::{Budget, Charge};
use crate::{
    capture::{Op, TargetId},
    clock,
};
use model::{ByteLen, Extent, MonoTime, SECTOR};
use nbd::{Access, BlockSizes, Command, Errno, ExportFlags, ExportInfo, Incoming, REQUEST_LEN, Request, Session};
use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

/// Longest request the kernel is told to make.
pub const REQUEST_KIB: u32 = 256;
/// The guard looks this often.
const GUARD_PERIOD: Duration = Duration::from_millis(50);
/// The engine decides at the bound, the guard this much later.
pub const GUARD_MARGIN_MS: u64 = 500;

/// Who lets a write of the host return.
#[derive(Clone, Debug)]
pub enum Answers {
    /// The engine, when the machine says so.
    Engine,
    /// The leg, when the write lies in the engine's inbox or is marked as lost, under the volume's name there.
    AtOnce(Arc<Budget>, TargetId),
}

/// A leg's own number of a request; the kernel's cookies are used again.
pub type LegNo = u64;

/// A write of the host on its way to the box.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LegWrite {
    pub id: LegNo,
    pub op: Op,
    pub fua: bool,
    /// In sectors of the volume; empty for a flush.
    pub extent: Extent,
    pub data: Vec<u8>,
    pub mono: MonoTime,
}

/// What a leg tells.
#[derive(Debug)]
pub enum FromLeg {
    /// The charge, for one that was answered already, is dropped when the write is somebody else's memory.
    Write(LegWrite, Option<Charge>),
    /// Written, not kept, and perhaps not on the local disk yet; of all volumes.
    Lost(Vec<(TargetId, Extent)>),
    /// To be answered with the data or an error.
    Read { id: LegNo, extent: Extent },
    /// The guard answered what the engine did not.
    Overran { requests: usize },
    /// The kernel has given the leg up, or somebody ended it.
    Gone { why: String },
}

struct Waiting {
    request: Request,
    since: MonoTime,
}

struct Inner {
    waiting: BTreeMap<LegNo, Waiting>,
    next: LegNo,
    open: bool,
}

struct Shared {
    session: Session,
    inner: Mutex<Inner>,
    answers: Answers,
    writer: Mutex<UnixStream>,
    /// Whether the mirror reads here.
    mirror_reads: Box<dyn Fn() -> bool + Send + Sync>,
    bound_ms: AtomicU64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the kernel is told of the leg.
pub fn export(bytes: ByteLen) -> ExportInfo {
    ExportInfo {
        size: bytes,
        access: Access::ReadWrite,
        // No write-zeroes: the mirror has none, and the block layer writes zeroes instead.
        flags: ExportFlags::FLUSH | ExportFlags::FUA | ExportFlags::TRIM,
        blocks: BlockSizes::SECTORS,
        description: String::new(),
    }
}

/// What the kernel's NBD client is told of an export's abilities: no flush and no FUA. A write is answered when all is done that the host
/// waits for, so neither says more; and a flush that fails because the agent died could hang the host: device-mapper's mirror then
/// forgets, of a region that it was about to recover and that has a write under way, that it is recovering. What is written there waits for
/// ever, and so does whoever wants to suspend the volume (`dm_rh_dec` and `flush_failure` in the kernel).
pub fn kernel_flags(export: &ExportInfo) -> u16 {
    let flags = export.flags.without(ExportFlags::FLUSH).without(ExportFlags::FUA);
    ExportInfo { flags, ..export.clone() }.agreed_flags()
}

/// How a leg begins.
pub struct Begin {
    /// Its requests are numbered from here: one that goes on where another ended goes on counting.
    pub first: LegNo,
    pub answers: Answers,
    pub info: ExportInfo,
    /// How long a request may wait in all.
    pub bound_ms: u64,
}

/// A served leg. Dropping it closes the connection.
pub struct Leg {
    shared: Arc<Shared>,
}

impl Leg {
    /// Serves `ours`, the other end of what the kernel was given. `bound_ms`: how long a request may wait in all. `deliver` may wait;
    /// that holds the host back, no longer than the bound.
    pub fn serve(
        ours: UnixStream,
        info: ExportInfo,
        bound_ms: u64,
        mirror_reads: impl Fn() -> bool + Send + Sync + 'static,
        deliver: impl Fn(FromLeg) -> bool + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let begin = Begin { first: 1, answers: Answers::Engine, info, bound_ms };
        Self::serve_from(begin, ours, mirror_reads, deliver)
    }

    /// The same, in all ways.
    pub fn serve_from(
        begin: Begin,
        ours: UnixStream,
        mirror_reads: impl Fn() -> bool + Send + Sync + 'static,
        deliver: impl Fn(FromLeg) -> bool + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            session: Session::agreed(begin.info),
            inner: Mutex::new(Inner { waiting: BTreeMap::new(), next: begin.first, open: false }),
            answers: begin.answers,
            writer: Mutex::new(ours.try_clone()?),
            mirror_reads: Box::new(mirror_reads),
            bound_ms: AtomicU64::new(begin.bound_ms),
        });
        let deliver: Arc<dyn Fn(FromLeg) -> bool + Send + Sync> = Arc::new(deliver);
        let (guarded, told) = (shared.clone(), deliver.clone());
        let watched = Arc::new(AtomicBool::new(true));
        let ended = watched.clone();
        // To tell the engine may take as long as the engine hangs: the guard must not wait for that.
        let (overran, requests) = mpsc::sync_channel(1);
        thread::Builder::new().name("leg-teller".to_owned()).spawn(move || {
            while let Ok(requests) = requests.recv() {
                if !told(FromLeg::Overran { requests }) {
                    return;
                }
            }
        })?;
        thread::Builder::new().name("leg-guard".to_owned()).spawn(move || guard(&guarded, &watched, &overran))?;
        let reading = shared.clone();
        thread::Builder::new().name("leg".to_owned()).spawn(move || {
            let why = match read_requests(ours, &reading, deliver.as_ref()) {
                Ok(why) => why.to_owned(),
                Err(e) => format!("the kernel's connection broke: {e}"),
            };
            ended.store(false, Ordering::Release);
            deliver(FromLeg::Gone { why });
        })?;
        Ok(Self { shared })
    }

    pub fn set_bound(&self, ms: u64) {
        self.shared.bound_ms.store(ms, Ordering::Release);
    }

    /// The request is done: the host goes on.
    pub fn done(&self, id: LegNo) {
        self.shared.reply(id, Ok(None));
    }
    pub fn data(&self, id: LegNo, data: &[u8]) {
        self.shared.reply(id, Ok(Some(data)));
    }
    pub fn failed(&self, id: LegNo) {
        self.shared.reply(id, Err(Errno::Io));
    }

    /// From here on everything is answered at once and nothing is handed on.
    pub fn open_up(&self) {
        locked(&self.shared.inner).open = true;
        self.shared.answer_older_than(0);
    }

    /// Number of the last request that was handed on, or is about to be.
    pub fn last(&self) -> LegNo {
        locked(&self.shared.inner).next - 1
    }

    pub fn answers_at_once(&self) -> bool {
        matches!(self.shared.answers, Answers::AtOnce(..))
    }

    pub fn waiting(&self) -> usize {
        locked(&self.shared.inner).waiting.len()
    }
}

impl Drop for Leg {
    fn drop(&mut self) {
        self.open_up();
        // The kernel may have closed it first.
        let _ = locked(&self.shared.writer).shutdown(Shutdown::Both);
    }
}

impl Shared {
    fn reply(&self, id: LegNo, result: Result<Option<&[u8]>, Errno>) {
        let Some(waiting) = locked(&self.inner).waiting.remove(&id) else { return };
        self.send(&waiting.request, result);
    }

    fn send(&self, request: &Request, result: Result<Option<&[u8]>, Errno>) {
        let mut out = Vec::with_capacity(16);
        match (result, request.command) {
            (Ok(Some(data)), Command::Read { .. }) if data.len() == request.len as usize => {
                self.session.push_read(&mut out, request, data);
            }
            // A read that nobody has data for.
            (Ok(_), Command::Read { .. }) => self.session.push_error(&mut out, request.cookie, Errno::Io, ""),
            (Ok(_), _) => self.session.push_done(&mut out, request.cookie),
            (Err(errno), _) => self.session.push_error(&mut out, request.cookie, errno, ""),
        }
        // A connection that broke is seen by the reader.
        let _ = locked(&self.writer).write_all(&out);
    }

    /// Answers what has waited for at least `ms`; writes as done, reads as failed.
    fn answer_older_than(&self, ms: u64) -> usize {
        let now = clock::mono();
        let mut overdue = Vec::new();
        {
            let mut inner = locked(&self.inner);
            // Numbers follow time, so the oldest come first.
            while let Some(first) = inner.waiting.first_entry() {
                if now.ms_since(first.get().since) < ms {
                    break;
                }
                overdue.push(first.remove());
            }
        }
        overdue.iter().for_each(|w| self.send(&w.request, Ok(None)));
        overdue.len()
    }
}

fn guard(shared: &Shared, watched: &AtomicBool, told: &mpsc::SyncSender<usize>) {
    let mut untold = 0;
    while watched.load(Ordering::Acquire) {
        thread::sleep(GUARD_PERIOD);
        untold += shared.answer_older_than(shared.bound_ms.load(Ordering::Acquire).saturating_add(GUARD_MARGIN_MS));
        if untold > 0 {
            match told.try_send(untold) {
                Ok(()) => untold = 0,
                // Still telling of the last ones; these come with the next.
                Err(mpsc::TrySendError::Full(_)) => {}
                Err(mpsc::TrySendError::Disconnected(_)) => return,
            }
        }
    }
}

/// Takes requests until the connection ends; answers why it did.
fn read_requests(
    mut stream: UnixStream,
    shared: &Shared,
    deliver: &(dyn Fn(FromLeg) -> bool + Send + Sync),
) -> io::Result<&'static str> {
    let mut header = [0; REQUEST_LEN];
    loop {
        match stream.read_exact(&mut header) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok("the kernel closed its end"),
            other => other?,
        }
        let incoming = shared.session.request(&header).map_err(io::Error::other)?;
        let request = match incoming {
            Incoming::Disconnect => return Ok("the device was disconnected"),
            Incoming::Refused { refusal, discard } => {
                io::copy(&mut Read::take(&mut stream, u64::from(discard)), &mut io::sink())?;
                let mut out = Vec::new();
                shared.session.push_refusal(&mut out, &refusal);
                locked(&shared.writer).write_all(&out)?;
                continue;
            }
            Incoming::Request(request) => request,
        };
        let mono = clock::mono();
        let mut data = vec![0; request.payload_len()];
        stream.read_exact(&mut data)?;
        if !take(request, data, mono, shared, deliver) {
            return Ok("nobody serves it any more");
        }
    }
}

/// Hands a request on, or answers it where nobody is to be asked. Says whether to go on.
fn take(
    request: Request,
    data: Vec<u8>,
    mono: MonoTime,
    shared: &Shared,
    deliver: &(dyn Fn(FromLeg) -> bool + Send + Sync),
) -> bool {
    let extent = Extent::new(request.offset / SECTOR, u64::from(request.len) / SECTOR);
    let op = match request.command {
        Command::Read { .. } if !(shared.mirror_reads)() => {
            shared.send(&request, Ok(Some(&vec![0; request.len as usize])));
            return true;
        }
        Command::Read { .. } => None,
        Command::Write { .. } => Some(Op::Write),
        Command::Flush => Some(Op::Flush),
        Command::Trim { .. } => Some(Op::Discard),
        Command::WriteZeroes { .. } => Some(Op::Zero),
        Command::Cache | Command::BlockStatus { .. } => {
            shared.send(&request, Err(Errno::NotSupported));
            return true;
        }
    };
    let id = {
        let mut inner = locked(&shared.inner);
        if inner.open {
            drop(inner);
            shared.send(&request, Ok(None));
            return true;
        }
        let id = inner.next;
        inner.next += 1;
        if op.is_none() || matches!(shared.answers, Answers::Engine) {
            inner.waiting.insert(id, Waiting { request, since: mono });
        }
        id
    };
    let write = match op {
        None => return deliver(FromLeg::Read { id, extent }),
        Some(Op::Flush) => LegWrite { id, op: Op::Flush, fua: false, extent: Extent::default(), data, mono },
        Some(op) => LegWrite { id, op, fua: request.fua(), extent, data, mono },
    };
    match &shared.answers {
        Answers::Engine => deliver(FromLeg::Write(write, None)),
        Answers::AtOnce(budget, target) => {
            let heard = keep_or_mark(write, budget, *target, deliver);
            shared.send(&request, Ok(None));
            heard
        }
    }
}

/// Hands a write on if there is room, after what had none before it; else notes its place. Says whether anybody listens.
fn keep_or_mark(
    write: LegWrite,
    budget: &Arc<Budget>,
    target: TargetId,
    deliver: &(dyn Fn(FromLeg) -> bool + Send + Sync),
) -> bool {
    match budget.take(write.data.len()) {
        Some(charge) => {
            budget.tell_lost(|lost| deliver(FromLeg::Lost(lost))) && deliver(FromLeg::Write(write, Some(charge)))
        }
        None => {
            // A flush has no place.
            if !write.extent.is_empty() {
                budget.mark(target, write.extent);
            }
            true
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: u16 = 0;
    const WRITE: u16 = 1;
    const FLUSH: u16 = 3;

    fn request(kind: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
        let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
        out.extend([0, 0]);
        out.extend(kind.to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.extend(offset.to_be_bytes());
        out.extend(len.to_be_bytes());
        out
    }

    /// Error number and cookie of the next reply.
    fn reply(kernel: &mut UnixStream) -> (u32, u64) {
        let mut bytes = [0; 16];
        kernel.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[..4], 0x6744_6698u32.to_be_bytes());
        let error = u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        (error, u64::from_be_bytes(bytes[8..].try_into().unwrap()))
    }

    fn leg(bound_ms: u64) -> (UnixStream, Leg, mpsc::Receiver<FromLeg>) {
        leg_with(bound_ms, || true)
    }

    fn leg_with(
        bound_ms: u64,
        mirror_reads: impl Fn() -> bool + Send + Sync + 'static,
    ) -> (UnixStream, Leg, mpsc::Receiver<FromLeg>) {
        let (kernel, ours) = UnixStream::pair().unwrap();
        kernel.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let (sender, inbox) = mpsc::channel();
        let deliver = move |m| sender.send(m).is_ok();
        let leg = Leg::serve(ours, export(ByteLen(1 << 20)), bound_ms, mirror_reads, deliver).unwrap();
        (kernel, leg, inbox)
    }

    fn write_of(inbox: &mpsc::Receiver<FromLeg>) -> LegWrite {
        match inbox.recv_timeout(Duration::from_secs(60)).unwrap() {
            FromLeg::Write(write, _) => write,
            other => panic!("{other:?}"),
        }
    }

    fn write_to(kernel: &mut UnixStream, cookie: u64, sector: u64) {
        kernel.write_all(&request(WRITE, cookie, sector * 512, 512)).unwrap();
        kernel.write_all(&[cookie as u8; 512]).unwrap();
        assert_eq!(reply(kernel), (0, cookie), "answered at once, whoever listens");
    }

    /// What the engine does not take is bounded, the host never waits for room, and nothing goes missing unsaid.
    #[test]
    fn a_write_answered_at_once_is_kept_or_told_as_lost_before_what_follows() {
        use super::super::budget::REQUEST_BYTES;
        let (mut kernel, ours) = UnixStream::pair().unwrap();
        kernel.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let (sender, inbox) = mpsc::channel();
        let budget = Budget::new(2 * (REQUEST_BYTES + 512));
        let begin = Begin {
            first: 1,
            answers: Answers::AtOnce(budget.clone(), TargetId(5)),
            info: export(ByteLen(1 << 30)),
            bound_ms: 60_000,
        };
        let leg = Leg::serve_from(begin, ours, || false, move |m| sender.send(m).is_ok()).unwrap();
        let next = || inbox.recv_timeout(Duration::from_secs(60)).unwrap();
        (1..=2).for_each(|n| write_to(&mut kernel, n, n * 8));
        // Nobody takes them: the third to fifth have no room. A flush has no place that could be lost.
        (3..=5).for_each(|n| write_to(&mut kernel, n, 100 + n));
        kernel.write_all(&request(FLUSH, 6, 0, 0)).unwrap();
        assert_eq!((reply(&mut kernel), leg.waiting()), ((0, 6), 0));
        let FromLeg::Write(first, charge) = next() else { panic!() };
        assert_eq!((first.extent, first.data), (Extent::new(8, 1), vec![1; 512]));
        drop(charge);
        write_to(&mut kernel, 7, 200);
        assert!(matches!(next(), FromLeg::Write(second, Some(_)) if second.extent == Extent::new(16, 1)));
        let FromLeg::Lost(lost) = next() else { panic!() };
        assert_eq!(lost, [(TargetId(5), Extent::new(103, 3))]);
        let FromLeg::Write(after, charge) = next() else { panic!() };
        assert_eq!((after.id, after.extent), (7, Extent::new(200, 1)));

        // Lost last, and nothing follows: found by who looks.
        let held = budget.take(0).unwrap();
        write_to(&mut kernel, 8, 300);
        assert_eq!(budget.take_lost().unwrap(), [(TargetId(5), Extent::new(300, 1))]);
        drop((held, charge));
        assert_eq!(budget.fill().0, 0, "all of it was given back");
    }

    /// An engine that takes nothing any more holds up who tells it, not the guard, and so not the host.
    #[test]
    fn an_engine_that_does_not_listen_holds_nobody() {
        let (mut kernel, ours) = UnixStream::pair().unwrap();
        kernel.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let (wakes, asleep) = mpsc::channel::<()>();
        let asleep = Mutex::new(asleep);
        let deliver = move |what| match what {
            FromLeg::Overran { .. } => locked(&asleep).recv().is_ok(),
            _ => true,
        };
        let leg = Leg::serve(ours, export(ByteLen(1 << 20)), 1, || true, deliver).unwrap();
        for cookie in 1..=3 {
            kernel.write_all(&request(FLUSH, cookie, 0, 0)).unwrap();
            assert_eq!(reply(&mut kernel), (0, cookie));
        }
        drop(wakes);
        drop(leg);
    }

    #[test]
    fn replies_come_when_they_are_given_and_in_that_order() {
        let (mut kernel, leg, inbox) = leg(60_000);
        for (cookie, byte) in [(70, 1u8), (71, 2)] {
            kernel.write_all(&request(WRITE, cookie, u64::from(byte) * 4096, 512)).unwrap();
            kernel.write_all(&[byte; 512]).unwrap();
        }
        kernel.write_all(&request(FLUSH, 72, 0, 0)).unwrap();
        let (first, second, flush) = (write_of(&inbox), write_of(&inbox), write_of(&inbox));
        assert_eq!((first.extent, first.op, first.data), (Extent::new(8, 1), Op::Write, vec![1; 512]));
        assert_eq!((second.extent, flush.op, flush.extent), (Extent::new(16, 1), Op::Flush, Extent::default()));
        assert!(first.mono <= second.mono);
        assert_eq!(leg.waiting(), 3);
        leg.done(second.id);
        assert_eq!(reply(&mut kernel), (0, 71));
        leg.failed(first.id);
        assert_eq!(reply(&mut kernel).1, 70);
        leg.done(first.id);
        leg.done(flush.id);
        assert_eq!(reply(&mut kernel), (0, 72), "answered once each");
    }

    #[test]
    fn the_guard_answers_for_an_engine_that_does_not() {
        let (mut kernel, leg, inbox) = leg(10);
        kernel.write_all(&request(FLUSH, 9, 0, 0)).unwrap();
        let late = write_of(&inbox);
        assert_eq!(reply(&mut kernel), (0, 9));
        let told = inbox.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(matches!(told, FromLeg::Overran { requests: 1 }), "{told:?}");
        // The kernel uses the cookie again; the engine's late answer must not be taken for the new request's.
        leg.done(late.id);
        kernel.write_all(&request(FLUSH, 9, 0, 0)).unwrap();
        let next = write_of(&inbox);
        assert!(next.id > late.id && leg.waiting() == 1);
    }

    #[test]
    fn opened_up_nothing_waits_and_nothing_is_handed_on() {
        let (mut kernel, leg, inbox) = leg(60_000);
        kernel.write_all(&request(FLUSH, 1, 0, 0)).unwrap();
        write_of(&inbox);
        leg.open_up();
        assert_eq!(reply(&mut kernel), (0, 1));
        kernel.write_all(&request(WRITE, 2, 0, 512)).unwrap();
        kernel.write_all(&[7; 512]).unwrap();
        assert_eq!(reply(&mut kernel), (0, 2));
        drop(leg);
        assert!(matches!(inbox.recv_timeout(Duration::from_secs(60)).unwrap(), FromLeg::Gone { .. }));
        assert_eq!(kernel.read(&mut [0]).unwrap(), 0, "the connection ends with the leg");
    }

    #[test]
    fn reads_are_zeroes_until_the_local_leg_has_failed() {
        let failed = Arc::new(AtomicBool::new(false));
        let local_failed = failed.clone();
        let (mut kernel, leg, inbox) = leg_with(60_000, move || local_failed.load(Ordering::Acquire));
        kernel.write_all(&request(READ, 1, 0, 512)).unwrap();
        assert_eq!(reply(&mut kernel), (0, 1));
        let mut data = [1; 512];
        kernel.read_exact(&mut data).unwrap();
        assert_eq!(data, [0; 512]);
        failed.store(true, Ordering::Release);
        kernel.write_all(&request(READ, 2, 1024, 512)).unwrap();
        let FromLeg::Read { id, extent } = inbox.recv_timeout(Duration::from_secs(60)).unwrap() else { panic!() };
        assert_eq!(extent, Extent::new(2, 1));
        leg.data(id, &[5; 512]);
        assert_eq!(reply(&mut kernel), (0, 2));
        kernel.read_exact(&mut data).unwrap();
        assert_eq!(data, [5; 512]);
        kernel.write_all(&request(READ, 3, 1024, 512)).unwrap();
        let FromLeg::Read { id, .. } = inbox.recv_timeout(Duration::from_secs(60)).unwrap() else { panic!() };
        leg.done(id);
        assert_ne!(reply(&mut kernel).0, 0, "a read without data fails");
    }

    #[test]
    fn the_kernel_hears_of_neither_flush_nor_fua() {
        // Has flags, trim.
        assert_eq!(kernel_flags(&export(ByteLen(1 << 20))), 1 | 1 << 5);
    }

    #[test]
    fn nonsense_ends_the_leg_and_a_bad_range_does_not() {
        let (mut kernel, _leg, inbox) = leg(60_000);
        kernel.write_all(&request(WRITE, 1, 1 << 20, 512)).unwrap();
        kernel.write_all(&[0; 512]).unwrap();
        assert_ne!(reply(&mut kernel).0, 0);
        kernel.write_all(&[0xee; 28]).unwrap();
        assert!(matches!(inbox.recv_timeout(Duration::from_secs(60)).unwrap(), FromLeg::Gone { .. }));
    }
}
