//! What happened, by name.
//!
//! An event is logged with structured fields, counted for `/metrics`, and kept in a ring for `status`. The names are the
//! contract: scripts and tests look for them, texts may change.

use crate::clock::Clock;
use serde::Serialize;
use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::watch;

/// How many events `status` shows: enough for a screen, bounded for ever.
const RING: usize = 128;
/// A text from a peer inside an event: the rest tells nothing more and must not fill the log.
const TEXT_MAX: usize = 300;

macro_rules! events {
    ($($(#[$doc:meta])* $variant:ident = $name:literal $level:ident),* $(,)?) => {
        /// The kinds of events.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
        pub enum Event { $($(#[$doc])* #[serde(rename = $name)] $variant),* }

        impl Event {
            pub const ALL: &'static [Event] = &[$(Event::$variant),*];
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }
            const fn level(self) -> Level {
                match self { $(Self::$variant => Level::$level),* }
            }
        }
    };
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Info,
    Warn,
    Error,
}

events! {
    Started = "started" Info,
    Stopping = "stopping" Info,
    TokenMade = "token-made" Info,
    /// Used, unknown or expired.
    TokenRefused = "token-refused" Warn,
    HostEnrolled = "host-enrolled" Info,
    HostRenewed = "host-renewed" Info,
    HostRevoked = "host-revoked" Warn,
    /// A certificate that is good but whose host was revoked or forgotten.
    HostRefused = "host-refused" Warn,
    ClientCertificateMade = "client-certificate-made" Info,
    /// A handshake that ended before anybody was known: wrong CA, no certificate, not TLS at all.
    HandshakeFailed = "handshake-failed" Warn,
    ConnectionLimit = "connection-limit" Warn,
    HostConnected = "host-connected" Info,
    HostDisconnected = "host-disconnected" Info,
    /// Nothing heard within the timeout: the connection is taken for dead.
    HostSilent = "host-silent" Warn,
    /// A second agent with the same identity.
    DuplicateAgent = "duplicate-agent" Error,
    SessionReplaced = "session-replaced" Info,
    /// Bytes that are no frame, or a frame that has no business where it came.
    FrameRefused = "frame-refused" Error,
    StreamOpened = "stream-opened" Info,
    StreamClosed = "stream-closed" Info,
    GroupCreated = "group-created" Info,
    GroupOpened = "group-opened" Info,
    /// Work that was cut off by a crash was cut from the journal's end; none of it had been acknowledged.
    GroupRecovered = "group-recovered" Warn,
    GroupStopped = "group-stopped" Error,
    GroupReopened = "group-reopened" Warn,
    GroupDeleted = "group-deleted" Warn,
    PolicyChanged = "policy-changed" Info,
    JournalFull = "journal-full" Error,
    JournalRoom = "journal-room" Info,
    HistoryShortened = "history-shortened" Warn,
    JobFailed = "job-failed" Error,
    BookmarkMade = "bookmark-made" Info,
    BookmarkDeleted = "bookmark-deleted" Info,
    ViewOpened = "view-opened" Info,
    ViewClosed = "view-closed" Info,
    /// Nobody had it open for longer than it was given.
    ViewExpired = "view-expired" Warn,
    ViewDamaged = "view-damaged" Error,
    NbdConnected = "nbd-connected" Info,
    NbdClosed = "nbd-closed" Info,
    /// An NBD client that broke the protocol.
    NbdRefused = "nbd-refused" Warn,
    /// Something in the data folder that the catalogue does not know; left alone.
    Stray = "stray" Warn,
    /// How the journals' device makes writes durable.
    JournalDevice = "journal-device" Info,
    /// Something about it that may cost acknowledged writes.
    DeviceDoubtful = "device-doubtful" Warn,
    /// One of two copies of a control file was damaged; the other one was used.
    CopyDamaged = "copy-damaged" Error,
    /// Commands went to a protected disk past the block layer: what they wrote, if anything, was not captured.
    UnknownWrite = "unknown-write" Warn,
    /// To spare its host an agent only marks writes.
    CaptureReduced = "capture-reduced" Warn,
    /// An agent holds other programs of its host back, as it was configured to.
    HostThrottled = "host-throttled" Warn,
    /// One of the three above is over.
    HostNoticeOver = "host-notice-over" Info,
    /// A takeover or a drill.
    TakeoverBegun = "takeover-begun" Warn,
    TakeoverServing = "takeover-serving" Warn,
    TakeoverFailed = "takeover-failed" Error,
    TakeoverEnded = "takeover-ended" Info,
    /// A machine waits for its disks' content.
    TargetConnected = "target-connected" Info,
    TargetGone = "target-gone" Info,
    RestoreBegun = "restore-begun" Warn,
    RestoreDone = "restore-done" Info,
    RestoreFailed = "restore-failed" Error,
    RestoreEnded = "restore-ended" Info,
    /// Somebody else runs a host's services from now on.
    OwnerChanged = "owner-changed" Warn,
    /// A host holds a lease, or does not any more.
    LeaseChanged = "lease-changed" Info,
    /// Who owns a host cannot be read or stored, or its agent knows more than the box.
    OwnershipUnsure = "ownership-unsure" Error,
    /// A host's agent does not take its plan.
    HostPlanRefused = "host-plan-refused" Error,
    /// Something is wrong with a watched host, and nothing is taken over by itself.
    TakeoverDoubt = "takeover-doubt" Warn,
    /// A probe made by a host's agent ends otherwise than the one before.
    ProbeChanged = "probe-changed" Warn,
    /// A host was found to be lost; what follows is in the text.
    TakeoverDecided = "takeover-decided" Warn,
    /// Its machine had ended by itself.
    TakeoverRestarted = "takeover-restarted" Error,
    FailbackBegun = "failback-begun" Info,
    /// The host serves again, or was told to; somebody has to say that it does well.
    FailbackReturned = "failback-returned" Warn,
    FailbackCommitted = "failback-committed" Info,
    /// What somebody did could not be written down.
    AuditFailed = "audit-failed" Error,
    /// The pages' certificate could not be made anew.
    CertificateFailed = "certificate-failed" Error,
}

/// One event as `status` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    pub time_us: u64,
    pub event: Event,
    pub subject: String,
    pub text: String,
}

/// Counts, keeps and logs events.
pub struct Events {
    clock: Clock,
    counts: Vec<AtomicU64>,
    ring: Mutex<VecDeque<Entry>>,
    noted: watch::Sender<u64>,
}

impl Events {
    pub fn new(clock: Clock) -> Self {
        let counts = Event::ALL.iter().map(|_| AtomicU64::new(0)).collect();
        Self { clock, counts, ring: Mutex::new(VecDeque::with_capacity(RING)), noted: watch::Sender::new(0) }
    }

    /// Notes `event` about `subject` (a host, group, address) with a sentence.
    pub fn note(&self, event: Event, subject: impl ToString, text: impl ToString) {
        let (subject, text) = (clean(&subject.to_string()), clean(&text.to_string()));
        self.counts[event as usize].fetch_add(1, Ordering::Relaxed);
        match event.level() {
            Level::Info => tracing::info!(event = event.name(), subject = %subject, "{text}"),
            Level::Warn => tracing::warn!(event = event.name(), subject = %subject, "{text}"),
            Level::Error => tracing::error!(event = event.name(), subject = %subject, "{text}"),
        }
        let mut ring = crate::lock(&self.ring);
        if ring.len() == RING {
            ring.pop_front();
        }
        ring.push_back(Entry { time_us: self.clock.wall_us(), event, subject, text });
        drop(ring);
        self.noted.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Changes with each event.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.noted.subscribe()
    }

    pub fn count(&self, event: Event) -> u64 {
        self.counts[event as usize].load(Ordering::Relaxed)
    }

    pub fn recent(&self) -> Vec<Entry> {
        crate::lock(&self.ring).iter().cloned().collect()
    }
}

/// A peer's text may hold anything; a log line must stay one line.
fn clean(text: &str) -> String {
    text.chars().take(TEXT_MAX).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_the_ring_is_bounded() {
        let mut names: Vec<_> = Event::ALL.iter().map(|e| e.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Event::ALL.len());
        let events = Events::new(Clock::start());
        for i in 0..3 * RING {
            events.note(Event::FrameRefused, i, "x\ny".repeat(500));
        }
        let kept = events.recent();
        assert_eq!((kept.len(), events.count(Event::FrameRefused)), (RING, 3 * RING as u64));
        assert!(kept.iter().all(|e| !e.text.contains('\n') && e.text.chars().count() <= TEXT_MAX));
    }
}
