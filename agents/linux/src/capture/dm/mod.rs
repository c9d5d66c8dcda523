//! `dm-mirror-nbd`: capture that makes the host wait for the box, on volumes of the device mapper (LVM, LUKS, plain dm); and
//! `dm-mirror-async`: the same without the waiting, where the kernel refuses BPF.
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
//! | [`budget`] | how much may lie between legs and engine in async mode |
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
//! **Async.** The leg answers as soon as a write lies in the engine's inbox. What has no room there is not kept: its place is marked, told before
//! whatever was written later on any volume, and copied. So each write costs the host one way to the agent's memory and back, never a wait
//! for the engine, the box or the agent's own disk. What was written while no agent ran is not known where BPF is refused: the next agent
//! compares the whole volume.
//!
//! **Why not `dm-log-writes`**, the kernel's own log of writes, which asks for nobody's answer: its log is not in the order of the writes. A write
//! is logged when a flush that began after it completes, or at once when it carries FUA. So a block that was written and then written with
//! FUA (`O_DSYNC`) stands in the log with its old contents last (tried on 6.1: the disk had the new block, the replayed log the old one); and
//! of two flushes under way at once the later one may end first (each hardware queue has its own), and then what hangs on the earlier one
//! comes behind what was written after it. Nothing in the log tells. Besides, it keeps unflushed writes in kernel memory without a bound, and
//! a page that it cannot get fails the host's write.
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
//! | async: the agent's engine hangs, its disk too | nothing; what does not fit into the agent's memory is marked and copied |
//! | async: the local disk fails | within a second the mirror is taken out, and the host hears its disk's errors itself; a write that failed in that second was reported as done, and only the box has it |
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
//! **Under the agent's own feet.** A volume may hold the root file system, the agent's program, its state, the journal and the swap. What serves
//! the leg must then never wait for a write to it:
//!
//! | what could wait | why it does not |
//! |---|---|
//! | a page of the program or of its memory | all is locked ([`process`]); where that is refused, so is the mirror |
//! | an allocation that would first write something out | none does so (`PR_SET_IO_FLUSHER`, in all threads) |
//! | the engine, for its state directory | a thread of its own writes there, and the engine does not wait for it (`engine/scribe.rs`); what has to be found by the next agent lies in memory (`run_dir`) |
//! | the spool | there is no file: what does not fit into memory is marked |
//! | the log | a journal that takes no line loses it |
//! | somebody to resume a suspended volume | each change of a table is one call into the kernel ([`ioctl`]) |
//! | a file that is read (a table of names, a device's beginning) and whose time of access is to be noted | the journal of the file system may make it wait; then the leg's guard answers at the bound |
//!
//! Not the strict policy: there the kernel would keep the writes of a dead agent for the next, which may have to write before it runs.
//! Refused by name.
//!
//! **Limits.** Kernels before 5.10 are refused: on 4.18 a write under way to a leg whose agent was killed never came back. What is written at boot before the agent runs is not seen. Stacks that keep metadata of their own (thin, cache, snapshot,
//! dm-raid) are refused. A LUKS volume whose key is in a keyring that the agent's process cannot search is refused by the kernel when its table is loaded. Raw partitions are no
//! dm volumes and are refused, until a boot has laid a volume over them ([`crate::shim`]). A disk that fails for the first time *during*
//! the first copy may lose what was written in the second until it is noticed.
//!
//! **Tests**: everything without a kernel here; with one, in QEMU guests: `hw-tests/tests/sync.rs`, `sync_power.rs` (power cuts), `root_mirror.rs` (a whole Debian on a mirrored root), `shim.rs` (one on a plain partition), and `without_bpf.rs` under kernel lockdown. There, under emulation: a killed agent held
//! a host's write for 0.2 to 0.7 s, a stopped one for 0.2 s; 50 cuts and a kill of a writing host lost no acknowledged write.

/// As the status shows it.
pub const NAME: &str = "dm-mirror-nbd";
/// The same where the host does not wait for the box.
pub const NAME_ASYNC: &str = "dm-mirror-async";

pub mod budget;
pub mod ioctl;
pub mod leg;
pub mod mirror;
pub mod nbdk;
pub mod netlink;
pub mod order;
pub mod process;
pub mod table;
