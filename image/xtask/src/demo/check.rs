//! `cargo xtask try --check`: moments taken, opened and compared while everything runs and some of it is killed.

use super::{GROUP, Session, size};
use anyhow::{Context, Result, bail, ensure};
use hw_tests::{
    compare,
    disk::{check_ext4, counters},
    process::wait_for,
    product::{At, Moment},
};
use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

/// After a kill: recovery, reconnection and a resync of what changed meanwhile.
const RETURN_MAX: Duration = Duration::from_secs(60);

/// A moment and what the disk held then.
struct Taken {
    moment: Moment,
    oracle: PathBuf,
}

/// Where a spoilt oracle differs.
pub const SPOILT_BYTE: u64 = 12_345;

pub fn run(session: &mut Session, dir: &Path, spoil: bool) -> Result<()> {
    let first = session.take(dir, "first")?;
    if spoil {
        let oracle = File::options().read(true).write(true).open(&first.oracle)?;
        let mut byte = [0];
        oracle.read_exact_at(&mut byte, SPOILT_BYTE)?;
        oracle.write_all_at(&[byte[0] ^ 1], SPOILT_BYTE)?;
    }
    session.write_on(20)?;
    let second = session.take(dir, "second")?;
    session.write_on(5)?;
    session.compare(&first, &At::Bookmark(first.moment.name.clone()))?;
    session.compare(&second, &At::Lsn(second.moment.lsn))?;

    session.say("kill -9 of the box");
    session.appliance.kill()?;
    // A file's writer writes on; the image's writer waits for its box.
    let meanwhile = if session.source.agent().is_some() { 20 } else { 0 };
    session.write_on(meanwhile)?;
    session.appliance.run()?;
    session.back_in_step("the box")?;
    let third = session.take(dir, "third")?;
    session.write_on(5)?;
    session.compare(&third, &At::Time(third.moment.time_us))?;
    session.compare(&first, &At::Lsn(first.moment.lsn))?;

    let mut moments = 3;
    if let Some(agent) = session.source.agent() {
        agent.kill()?;
        session.say("kill -9 of the agent");
        session.write_on(20)?;
        session.source.agent().context("the agent is gone")?.run()?;
        session.back_in_step("the agent")?;
        let fourth = session.take(dir, "fourth")?;
        session.write_on(5)?;
        session.compare(&fourth, &At::Bookmark(fourth.moment.name.clone()))?;
        session.compare(&second, &At::Time(second.moment.time_us))?;
        moments += 1;
    }
    session.any_moment_is_a_file_system(dir, &first, &second)?;
    session.say(format!("check passed: {moments} moments opened while the disk was written to, every byte as it was"));
    Ok(())
}

impl Session {
    /// Waits until the writer has made `changes` more changes.
    fn write_on(&mut self, changes: u64) -> Result<()> {
        let goal = self.source.changes() + changes;
        wait_for("the disk to be written to", RETURN_MAX, || {
            self.source.check()?;
            Ok((self.source.changes() >= goal).then_some(()))
        })
    }

    fn back_in_step(&mut self, who: &str) -> Result<()> {
        let steady = self.source.steady_state();
        self.appliance.wait_state(GROUP, steady, RETURN_MAX).with_context(|| format!("after the kill of {who}"))?;
        self.write_on(2)?;
        self.say(format!("{who} is back and in step"));
        Ok(())
    }

    fn take(&mut self, dir: &Path, name: &str) -> Result<Taken> {
        let oracle = dir.join(format!("oracle-{name}.img"));
        let appliance = &self.appliance;
        let moment = self.source.hold(&oracle, || appliance.bookmark(GROUP, name))?;
        self.say(format!("bookmark {name:?} is LSN {}, time {}", moment.lsn, moment.time_us));
        Ok(Taken { moment, oracle })
    }

    /// Opens the moment and compares it whole, with the writer at work from before to after.
    fn compare(&mut self, taken: &Taken, at: &At) -> Result<()> {
        let before = self.source.changes();
        let view = self.appliance.view(GROUP, at).with_context(|| format!("open {at}"))?;
        let export = view.only()?;
        let mut client = export.connect()?;
        ensure!(client.read_only(), "a view must be read-only");
        let difference = compare::export_with_file(&mut client, &taken.oracle)?;
        if let Some(difference) = difference {
            bail!(
                "bookmark {:?} opened by {at} (LSN {}) is not what volume {} held: {difference}; oracle: {}",
                taken.moment.name,
                view.lsn,
                export.volume_name,
                taken.oracle.display()
            );
        }
        let bytes = client.size();
        drop(client);
        view.close()?;
        // The comparison may be quicker than one round of the writer.
        self.write_on(u64::from(self.source.changes() == before))?;
        let changes = self.source.changes() - before;
        self.say(format!(
            "{:?} opened by {at}: {} identical, {changes} changes meanwhile",
            taken.moment.name,
            size(bytes)
        ));
        Ok(())
    }

    /// A moment nobody chose, between two bookmarks, opens as a file system that a journal replay makes whole.
    fn any_moment_is_a_file_system(&mut self, dir: &Path, from: &Taken, to: &Taken) -> Result<()> {
        let at = At::Time(from.moment.time_us.midpoint(to.moment.time_us));
        let view = self.appliance.view(GROUP, &at)?;
        let copy = dir.join("unchosen.img");
        view.only()?.connect()?.copy_to(&copy)?;
        let lsn = view.lsn;
        view.close()?;
        if self.source.agent().is_none() {
            // Written in the order of block numbers, not in a file system's order: only whole rounds are consistent.
            self.say(format!(
                "{at} opens (LSN {lsn}); only a mounted file system's own order makes every moment consistent"
            ));
            return Ok(());
        }
        check_ext4(&copy, true).with_context(|| format!("{at}, LSN {lsn}"))?;
        let (a, b) = counters(&copy)?;
        ensure!(a == b || a == b + 1, "{at}, LSN {lsn}: A was written and synced before B, yet A is {a} and B is {b}");
        self.say(format!("{at} (LSN {lsn}), chosen by nobody: the file system is whole, order kept (A {a}, B {b})"));
        Ok(())
    }
}
