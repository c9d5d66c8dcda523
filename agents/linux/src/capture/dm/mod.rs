//! `dm-mirror-nbd`: capture that makes the host wait for the box, on volumes of the device mapper (LVM, LUKS, plain dm).
//!
//! The kernel's own mirror is put live into the volume: its first leg is the disk as it was, its second an NBD device that the agent
//! serves. A write of the host returns when **both** have it, and the agent answers for its leg when the box has the write durable. No
//! module of ours, no reboot.
//!
//! | part | |
//! |---|---|
//! | [`ioctl`] | the device mapper's control device |
//! | [`table`] | which tables may carry a mirror, what ours looks like |
//! | [`nbdk`], [`netlink`] | the kernel's NBD client |
//! | [`leg`] | the served leg, its guard |
//! | [`mirror`] | insertion, watch, removal |
//! | [`order`] | which writes may not be on the local disk yet |
//! | [`process`] | what the agent's process must be meanwhile |
//!
//! It does not stand behind the trait [`Capture`](super::Capture): its writes come one by one and wait for an answer, they are not polled
//! from a ring. The engine's `sync` module is its other half.
//!
//! **Order.** Writes are handed on as they arrive at the leg. A write that depends on another was issued after that one returned, that is,
//! after it had arrived here: so every prefix is a crash image. A write is handed on at the latest before it returns.
//!
//! **What may fail, and what the host sees**
//!
//! | | |
//! |---|---|
//! | the box does not answer in time | after `wait_ms_max`: policy *available*: goes on, alarm, dirty map; *strict*: waits on, at most `sync_hold_s`; from `wait_ms_max` + 5.5 s on it is the kernel that keeps the writes |
//! | the agent is killed or stopped (SIGSTOP) | the connection ends: the kernel leaves the leg out, no error, a stall of milliseconds |
//! | the same under *strict* | the kernel keeps the host's writes; the next agent takes them up, those that were under way `wait_ms_max` + 5.5 s after they were sent. With none within `sync_hold_s` the kernel lets the host go on alone, without an error; the next agent says so and compares what was written. A stop in good order (`systemctl stop`, an upgrade) takes the mirror out under this policy too |
//! | the agent hangs in the kernel | the kernel's time limit: bound + 5.5 s, once; then as if killed |
//! | the agent's engine hangs | the leg's guard answers at the bound |
//! | the local disk fails | the host's writes go on to the box and an alarm is raised; reads are served from the box while it has everything (state sync), else they fail (EIO) |
//! | the local disk fails, and then the agent dies | nothing is left to write to: the host gets errors (EIO), under *strict* when `sync_hold_s` is over; a new agent does not go on, for it cannot tell the box's newer data from the disk's older |
//! | LVM loads another table | seen within a second; the mirror is put in again; what was written in between is compared |
//!
//! **Out and in again.** What is written while no leg is in (agent dead or stopped, another table) is marked in the kernel by the watch
//! ([`super::bpf::watch`], `engine/memory.rs`); only that is compared when the mirror is in again. Not so after a reboot of the host, where BPF
//! is refused, and where the watch says that it does not know: then everything is compared, and the status says why. Kernels
//! before 5.15 do not tell whether a volume's device was made anew, so there a mirror that is not in the table any more (a planned stop,
//! another table) counts as not known.
//!
//! **Limits.** What is written at boot before the agent runs is not seen. Stacks that keep metadata of their own (thin, cache, snapshot,
//! dm-raid) are refused. A LUKS volume whose key is in a keyring that the agent's process cannot search is refused by the kernel when its table is loaded. Raw partitions are no
//! dm volumes and are refused. The agent's state directory must not lie on a volume it mirrors. A disk that fails for the first time *during*
//! the first copy may lose what was written in the second until it is noticed.
//!
//! **Tests**: everything without a kernel here; with one, in QEMU guests: `hw-tests/tests/sync.rs`. There, under emulation: a killed agent held
//! a host's write for 0.2 to 0.7 s, a stopped one for 0.2 s; 50 cuts and a kill of a writing host lost no acknowledged write.

/// As the status shows it.
pub const NAME: &str = "dm-mirror-nbd";

pub mod ioctl;
pub mod leg;
pub mod mirror;
pub mod nbdk;
pub mod netlink;
pub mod order;
pub mod process;
pub mod table;
