//! The command line's grammar.

use clap::{ArgGroup, Args as ClapArgs, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Protect disks with this box, look at their history and open any moment of it.
#[derive(Parser, Debug)]
#[command(name = "holdfast", version, max_term_width = 100)]
pub struct Args {
    /// The daemon's control socket [env: HOLDFAST_SOCKET] [default: /var/lib/holdfast/run/control.sock]
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// How the box, its hosts and its protection groups are
    Status(StatusArgs),
    /// Enrol hosts, list them, cut them off
    #[command(subcommand)]
    Host(HostCommand),
    /// Protection groups and their policies
    #[command(subcommand)]
    Group(GroupCommand),
    /// The moments a group can be opened at: a timeline with gaps and bookmarks
    Points(PointsArgs),
    /// Name a moment and keep it
    #[command(subcommand)]
    Bookmark(BookmarkCommand),
    /// Open a moment as read-only disks (NBD)
    #[command(subcommand)]
    View(ViewCommand),
    /// Copy a volume as it was at a moment to a file or a device, or, with GROUP, whole disks to a machine that waits
    Restore(RestoreArgs),
    /// Check every checksum of a group's history
    Verify(VerifyArgs),
    /// Read a journal's folder without a daemon
    Inspect(InspectArgs),
    /// Copy a volume out of a journal's folder without a daemon
    Export(ExportArgs),
    /// Make a certificate for an NBD client over TLS
    ClientCert(ClientCertArgs),
    /// What is to be done when a host is lost
    #[command(subcommand)]
    Plan(PlanCommand),
    /// Run a lost host on this box, by its plan
    Takeover(TakeoverArgs),
    /// Move a host that lives, by its plan: its agent stops the services, and they go on elsewhere with nothing lost
    Migrate(MigrateArgs),
    /// Try a plan: run the host apart from everything, look at it, throw it away
    Drill(DrillArgs),
    /// Bring what a takeover's machine wrote to the host's own disks, and the services back to it
    Failback(FailbackArgs),
    /// Takeovers and drills: what they have come to
    #[command(subcommand)]
    Run(RunCommand),
    /// Who may sign in to the pages: first setup, and lost passwords
    #[command(subcommand)]
    Web(WebCommand),
}

#[derive(Subcommand, Debug)]
pub enum WebCommand {
    /// A code that makes the first administrator: valid once, for an hour
    SetupCode,
    /// A new password for a user; their sessions end
    ResetPassword { name: String },
}

#[derive(Subcommand, Debug)]
pub enum PlanCommand {
    /// All plans
    List {
        #[arg(long)]
        json: bool,
    },
    /// A plan with every key, to begin from
    Example,
    /// A plan as it was written
    Show { name: String },
    /// Check a plan and keep it
    Set {
        name: String,
        /// A file, or `-` for standard input
        file: PathBuf,
    },
    /// Check a plan and keep nothing
    Check {
        /// A file, or `-` for standard input
        file: PathBuf,
    },
    /// Delete a plan
    Delete { name: String },
    /// Who owns each host that a plan leases or watches, and what is seen of it
    Status {
        /// Only this plan's host
        name: Option<String>,
        #[arg(long)]
        json: bool,
    },
    /// Say who owns a host, when the box does not know any more
    Owner {
        host: String,
        owner: OwnerName,
        /// The host's name once more
        #[arg(long, value_name = "HOST")]
        confirm: Option<String>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum OwnerName {
    Host,
    Box,
}

#[derive(ClapArgs, Debug)]
pub struct TakeoverArgs {
    pub plan: String,
    /// `latest`, a time, an LSN or a bookmark [default: as the plan says]
    #[arg(long, value_name = "POINT")]
    pub at: Option<String>,
    /// You have made sure that the host is off and stays off
    #[arg(long)]
    pub source_is_off: bool,
    /// Say what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// The box's answer as it is, without waiting for the end
    #[arg(long)]
    pub json: bool,
}

#[derive(ClapArgs, Debug)]
pub struct MigrateArgs {
    pub plan: String,
    /// Where it goes on [default: as the plan says]
    #[arg(long, value_enum, value_name = "PLACE")]
    pub to: Option<PlaceName>,
    /// Say what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// The box's answer as it is, without waiting for the end
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum PlaceName {
    /// A machine on this box
    Box,
    /// Another hypervisor, on disks that this box exports
    Export,
}

#[derive(ClapArgs, Debug)]
pub struct DrillArgs {
    pub plan: String,
    /// `latest`, a time, an LSN or a bookmark [default: as the plan says]
    #[arg(long, value_name = "POINT")]
    pub at: Option<String>,
    /// Leave the machine running until `holdfast run end`
    #[arg(long)]
    pub hold: bool,
    /// Say what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// The box's answer as it is, without waiting for the end
    #[arg(long)]
    pub json: bool,
}

#[derive(ClapArgs, Debug)]
pub struct FailbackArgs {
    /// The plan of the takeover that serves, its run, or the host of the plan
    pub what: String,
    /// Who gets the data: a machine that waits with `holdfast-agent rescue` (see `holdfast restore targets`)
    #[arg(long, value_name = "TARGET")]
    pub to: String,
    /// Which disk gets which volume, as GROUP/VOLUME=/dev/sdX or VOLUME=/dev/sdX [default: by serial number or size]
    #[arg(long = "disk", value_name = "VOLUME=DISK")]
    pub disks: Vec<String>,
    /// After the host serves: the machine serves again unless somebody commits within so many minutes
    #[arg(long, value_name = "N", default_value_t = 60)]
    pub commit_minutes: u64,
    /// Do not ask before the target's disks are overwritten
    #[arg(long)]
    pub yes: bool,
    /// The box's answer as it is, without waiting for the end
    #[arg(long)]
    pub json: bool,
}

#[derive(Subcommand, Debug)]
pub enum RunCommand {
    /// All takeovers and drills that are known
    List {
        #[arg(long)]
        json: bool,
    },
    /// Its steps, and what was measured
    Show {
        id: String,
        #[arg(long)]
        json: bool,
    },
    /// Its steps as they end
    Watch { id: String },
    /// Try what failed again; start a machine again that has ended
    Again {
        id: String,
        /// You have made sure that the host is off and stays off
        #[arg(long)]
        source_is_off: bool,
    },
    /// Make a held drill a takeover: what was written in it is kept
    Promote {
        id: String,
        /// You have made sure that the host is off and stays off
        #[arg(long)]
        source_is_off: bool,
        /// The plan's name once more
        #[arg(long, value_name = "PLAN")]
        confirm: Option<String>,
    },
    /// Of an export: the machine at the other hypervisor serves
    Serves { id: String },
    /// Of an export that fails back: the machine at the other hypervisor is off and stays off
    Stopped { id: String },
    /// After a failback: the host serves well, and what the machine wrote may go when the host's own history holds it
    Commit { id: String },
    /// Before a failback is committed: the machine shall serve again
    Rollback {
        id: String,
        /// You have made sure that the host is off and stays off
        #[arg(long)]
        source_is_off: bool,
    },
    /// Take its machine down and throw away what it wrote
    End {
        id: String,
        /// Of a takeover: the plan's name once more
        #[arg(long, value_name = "PLAN")]
        confirm: Option<String>,
    },
    /// Save the picture of its screen, its serial log and its signed record
    Evidence { id: String, dir: PathBuf },
}

#[derive(ClapArgs, Debug)]
pub struct StatusArgs {
    /// The box's answer as it is
    #[arg(long)]
    pub json: bool,
    /// Keep looking, once a second, until interrupted
    #[arg(long)]
    pub watch: bool,
    /// With --watch: stop after so many looks
    #[arg(long, value_name = "N", requires = "watch")]
    pub count: Option<u64>,
}

#[derive(Subcommand, Debug)]
pub enum HostCommand {
    /// Make a single-use token for `holdfast-agent enrol`
    Token {
        /// Only a host of this name may use it
        #[arg(long)]
        name: Option<String>,
        /// How long it is valid
        #[arg(long, value_name = "N")]
        minutes: Option<u64>,
        #[arg(long)]
        json: bool,
    },
    /// The enrolled hosts
    List {
        #[arg(long)]
        json: bool,
    },
    /// Refuse a host from now on; what it wrote stays
    Revoke {
        /// Name or id
        host: String,
    },
}

#[derive(Subcommand, Debug)]
pub enum GroupCommand {
    /// All protection groups
    List {
        #[arg(long)]
        json: bool,
    },
    /// Make a group that is filled over NBD, without an agent
    Create {
        name: String,
        /// A volume and its size, e.g. system:40GiB; may be given several times
        #[arg(long = "volume", value_name = "NAME:SIZE", required = true)]
        volumes: Vec<String>,
        #[command(flatten)]
        policy: PolicyArgs,
    },
    /// Show or change a group's policy
    Policy {
        /// Name or id
        group: String,
        #[command(flatten)]
        policy: PolicyArgs,
    },
    /// Compare and copy again what differs; older moments stay open
    Resync {
        /// Name or id
        group: String,
    },
    /// Delete a group and its whole history
    Delete {
        /// Name or id
        group: String,
        /// The group's name once more
        #[arg(long, value_name = "NAME")]
        confirm: String,
    },
}

#[derive(ClapArgs, Debug, Default)]
pub struct PolicyArgs {
    /// async: the host never waits; sync: its flushes wait for the box
    #[arg(long, value_name = "async|sync")]
    pub mode: Option<Mode>,
    /// With sync: how long a flush waits at most, in milliseconds
    #[arg(long, value_name = "MS")]
    pub wait_ms: Option<u64>,
    /// With sync: what happens when it has waited that long
    #[arg(long, value_name = "degrade|hold")]
    pub at_bound: Option<AtBound>,
    /// Hours any moment of which can be opened
    #[arg(long, value_name = "H")]
    pub window_hours: Option<u32>,
    /// The window is never shortened below this
    #[arg(long, value_name = "H")]
    pub window_floor_hours: Option<u32>,
    /// At most this much journal, e.g. 500GiB, or `none`
    #[arg(long, value_name = "SIZE")]
    pub journal_max: Option<String>,
    /// Alarm when less history than this fits
    #[arg(long, value_name = "H")]
    pub alarm_below_hours: Option<u32>,
    /// Lower is shortened first when room runs out
    #[arg(long, value_name = "0-255")]
    pub priority: Option<u8>,
    /// Alarm when lag is above this, in milliseconds
    #[arg(long, value_name = "MS")]
    pub lag_alarm_ms: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Mode {
    Async,
    Sync,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum AtBound {
    Degrade,
    Hold,
}

#[derive(ClapArgs, Debug)]
pub struct PointsArgs {
    /// Name or id; may be left out when there is only one group
    pub group: Option<String>,
    /// The same, written as with the other commands
    #[arg(short = 'g', long = "group", value_name = "GROUP", conflicts_with = "group")]
    pub named: Option<String>,
    #[arg(long)]
    pub json: bool,
}

#[derive(Subcommand, Debug)]
pub enum BookmarkCommand {
    /// Name the moment that is now, behind everything the host has written
    Create {
        name: String,
        #[arg(short, long)]
        group: Option<String>,
        /// In each group of this host, or in none: one moment for a takeover of all of them
        #[arg(long, conflicts_with = "group")]
        host: Option<String>,
        /// filesystem: the host's file systems are frozen for the moment
        #[arg(long, default_value = "crash")]
        consistency: BookmarkConsistency,
        #[arg(long)]
        json: bool,
    },
    /// Forget the name; the moment ages like every other one
    Delete {
        name: String,
        #[arg(short, long)]
        group: Option<String>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum BookmarkConsistency {
    Crash,
    Filesystem,
}

#[derive(Subcommand, Debug)]
pub enum ViewCommand {
    /// Open a moment
    Open {
        /// `latest`, a time, an LSN or a bookmark
        #[arg(long, value_name = "POINT")]
        at: String,
        #[arg(short, long)]
        group: Option<String>,
        /// Over TLS for other machines too
        #[arg(long)]
        tcp: bool,
        /// Close it once nobody has had it open for so long; 0: never [default: what the box is set to, 60]
        #[arg(long, value_name = "N")]
        idle_minutes: Option<u64>,
        #[arg(long)]
        json: bool,
    },
    /// The open views
    List {
        #[arg(long)]
        json: bool,
    },
    /// Close a view
    Close { id: String },
}

#[derive(ClapArgs, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct RestoreArgs {
    #[command(subcommand)]
    pub command: Option<RestoreCommand>,
    /// Restore all disks of these groups, or of these hosts' groups, to the machine named with --to, on which `holdfast-agent rescue` runs
    #[arg(value_name = "GROUP", conflicts_with_all = ["group", "volume", "format", "force", "onto_protected"])]
    pub groups: Vec<String>,
    /// `latest`, a time (2026-11-22T10:31:07.250, `10:31`, `5m ago`), an LSN or a bookmark; to a machine, the latest when left out. Of
    /// several groups a time, or a bookmark that each has
    #[arg(long, value_name = "POINT", required_unless_present = "groups")]
    pub at: Option<String>,
    #[arg(short, long)]
    pub group: Option<String>,
    /// To a machine: which of its disks gets a volume, of several groups GROUP/VOLUME=/dev/DISK [default: the one of the same serial, else the only one of the same size]
    #[arg(long = "disk", value_name = "VOLUME=/dev/DISK", requires = "groups")]
    pub disks: Vec<String>,
    /// To a machine: overwrite its disks without being asked
    #[arg(long, requires = "groups")]
    pub yes: bool,
    /// To a machine: start it anew when it is done
    #[arg(long, requires = "groups")]
    pub reboot: bool,
    /// Name or number; may be left out when the group has only one
    #[arg(long)]
    pub volume: Option<String>,
    #[command(flatten)]
    pub to: Option<TargetArgs>,
    #[arg(long, default_value = "raw")]
    pub format: Format,
}

#[derive(Subcommand, Debug)]
pub enum RestoreCommand {
    /// Machines that wait for their disks' content
    Targets {
        #[arg(long)]
        json: bool,
    },
    /// Restores to machines, those that are over too
    List {
        #[arg(long)]
        json: bool,
    },
    /// How far one is
    Show { id: String },
    /// End one where it is; what is written stays written
    Cancel { id: String },
}

#[derive(ClapArgs, Debug)]
pub struct TargetArgs {
    /// File or block device to write; with GROUP, the machine
    #[arg(long, value_name = "FILE|DEVICE|MACHINE")]
    pub to: PathBuf,
    /// Overwrite what is there
    #[arg(long)]
    pub force: bool,
    /// Write even onto a device that is protected itself: what is written is captured as a change like any other
    #[arg(long)]
    pub onto_protected: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Format {
    Raw,
    Qcow2,
}

#[derive(ClapArgs, Debug)]
#[command(group = ArgGroup::new("what").multiple(false))]
pub struct VerifyArgs {
    /// Name or id; may be left out when there is only one group
    #[arg(group = "what")]
    pub group: Option<String>,
    /// The same, written as with the other commands
    #[arg(short = 'g', long = "group", value_name = "GROUP", group = "what")]
    pub named: Option<String>,
    /// A journal's folder, read without a daemon
    #[arg(long, value_name = "DIR", group = "what")]
    pub journal: Option<PathBuf>,
    #[arg(long)]
    pub json: bool,
}

#[derive(ClapArgs, Debug)]
pub struct InspectArgs {
    /// A journal's folder
    pub dir: PathBuf,
    /// List records too
    #[arg(long)]
    pub records: bool,
    /// With --records: from this LSN on
    #[arg(long, value_name = "LSN", default_value_t = 0)]
    pub from: u64,
    /// With --records: at most so many
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub limit: u64,
    #[arg(long)]
    pub json: bool,
}

#[derive(ClapArgs, Debug)]
pub struct ExportArgs {
    /// A journal's folder
    pub dir: PathBuf,
    /// `latest`, a time, an LSN or a bookmark
    #[arg(long, value_name = "POINT")]
    pub at: String,
    /// Name or number; may be left out when the group has only one
    #[arg(long)]
    pub volume: Option<String>,
    #[command(flatten)]
    pub to: TargetArgs,
}

#[derive(ClapArgs, Debug)]
pub struct ClientCertArgs {
    /// Who uses it; written into the certificate
    pub name: String,
    /// Folder for ca-cert.pem, client-cert.pem and client-key.pem
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_grammar_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn commands_are_read_as_the_manual_writes_them() {
        for line in [
            "holdfast status --watch --count 3",
            "holdfast --socket /x/y status --json",
            "holdfast host token --name web1 --minutes 30",
            "holdfast host revoke web1",
            "holdfast group create vm --volume system:40GiB --volume data:1TiB --window-hours 24",
            "holdfast group policy web1 --mode sync --wait-ms 500 --at-bound degrade",
            "holdfast group delete web1 --confirm web1",
            "holdfast points --socket /x/y",
            "holdfast bookmark create before-upgrade --consistency filesystem",
            "holdfast view open --at 2026-11-22T10:31:07.250 --tcp",
            "holdfast restore --at latest --volume /dev/sdb --to out.img --format qcow2 --force",
            "holdfast restore targets",
            "holdfast restore show 0123abcd",
            "holdfast restore db1 --to metal --disk /dev/sda=/dev/vda --yes --reboot",
            "holdfast restore db1 db1-data --at before-upgrade --to metal",
            "holdfast verify --journal /srv/j",
            "holdfast inspect /srv/j --records --from 7 --limit 3",
            "holdfast export /srv/j --at lsn:9 --to out.img",
            "holdfast client-cert desk --out /tmp/c",
            "holdfast plan status db1 --json",
            "holdfast migrate db1 --to export --dry-run",
            "holdfast run stopped 0123abcd",
            "holdfast plan owner db1 host --confirm db1",
        ] {
            if let Err(e) = Args::try_parse_from(line.split(' ')) {
                panic!("{line}: {e}");
            }
        }
        for line in [
            "holdfast",
            "holdfast status --count 3",
            "holdfast verify g --journal d",
            "holdfast restore --at latest",
            "holdfast restore --to out.img",
            "holdfast restore db1 --at latest",
            "holdfast restore --at latest --to out.img --yes",
        ] {
            assert!(Args::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
