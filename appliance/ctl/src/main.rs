//! `holdfast`: the command line of the box, and the offline reader and verifier of journals.
//!
//! Two kinds of commands. *Online* ones talk to `holdfastd` over its control socket ([`client`]); *offline* ones (`inspect`,
//! `export`, `verify --journal`) read a journal's folder with no daemon and no index ([`offline`]), on the box or on any
//! machine the folder was copied to.
//!
//! What is printed is for looking at: tables, bars and a timeline ([`picture`]); `--json` gives the box's own answer
//! unchanged. Errors are sentences on stderr with what to do about them. Exit codes: 0 done, 1 not done, 2 wrong usage,
//! 3 verification found damage.
//!
//! A restore ([`restore`], [`copy`], [`target`]) writes to a new file beside the wanted one and renames it when everything
//! is on the disk, so that a file of the wanted name is always whole; after a power loss at most a `.holdfast-partial`
//! file is left. A block device has no such second name: what an interrupted restore leaves on it is said.
//!
//! Tests: units beside the code; `tests/online.rs` runs the binary against a made-up box over a unix socket,
//! `tests/offline.rs` against journals made in the test, compared bit for bit.

mod api;
mod args;
mod client;
mod copy;
mod machine;
mod offline;
mod online;
mod picture;
mod points;
mod restore;
mod status;
mod takeover;
mod target;
mod times;
mod watch;

use clap::Parser as _;
use std::process::ExitCode;

/// How a command that did its work ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    Done,
    /// A verification ran to its end and found damage.
    Damaged,
}

fn main() -> ExitCode {
    let args = args::Args::parse();
    match online::run(args) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Damaged) => ExitCode::from(3),
        Err(e) if is_closed_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("holdfast: {}", sentence(&e));
            if let Some(remedy) = remedy(&e) {
                eprintln!("  what to do: {remedy}");
            }
            ExitCode::FAILURE
        }
    }
}

/// The chain of causes as one sentence: "could not start: open view: segment 41: record checksum". A cause that the text
/// before it repeats already is left out.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.ends_with(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    text
}

fn remedy(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|cause| {
        cause
            .downcast_ref::<client::ApiError>()
            .and_then(client::ApiError::remedy)
            .or_else(|| cause.downcast_ref::<target::TargetError>().and_then(target::TargetError::remedy))
            .or_else(|| cause.downcast_ref::<times::PointError>().map(times::PointError::remedy))
            .or_else(|| cause.downcast_ref::<online::ChoiceError>().map(online::ChoiceError::remedy))
            .or_else(|| cause.downcast_ref::<offline::OfflineError>().and_then(offline::OfflineError::remedy))
    })
}

/// `holdfast points | head` is no failure.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
