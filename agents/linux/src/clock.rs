//! The clocks of the host.

use model::MonoTime;

/// CLOCK_MONOTONIC, the one that captured writes are stamped with.
pub fn mono() -> MonoTime {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the struct is ours to be written. The call cannot fail with this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    MonoTime(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// Microseconds since 1970 on the wall clock; zero when it is set before that.
pub fn wall_us() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}

/// CLOCK_BOOTTIME, which also counts while the host sleeps: leases run by it. One boot's times mean nothing in another.
pub fn boot() -> MonoTime {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: as above.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time) };
    MonoTime(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}
