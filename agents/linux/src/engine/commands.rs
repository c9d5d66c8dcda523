//! What people and the box ask for.

use super::group::{BookmarkFor, PlacedBookmark};
use super::scribe::{Key, Stored};
use super::{Engine, Input, RENEW_US, Wait, start};
use crate::{
    capture::choose::{self, Choice},
    clock,
    disks::{Disks, Leaf, Resolution},
    enrol, freeze,
    freeze::{FreezeError, Frozen},
    link::FromLink,
    local::{Answer, Failure, Reply, Request},
    state::{GroupRecord, HostIdentity, StateError, VolumeRecord},
    tls,
};
use model::{BookmarkName, Consistency, GroupId, GroupSpec, Sectors, SyncMode, VolumeId, VolumeSpec};
use replication::Event;
use std::sync::Arc;
use wire::{Command, CommandResult, Message, Refusal, RefuseCode};

/// A request that waits for the box's answer; one at a time.
pub(super) enum Pending {
    Protect { resolution: Resolution, asked: Vec<VolumeSpec>, sync: bool, answer: Answer },
    Unprotect { group: GroupId, answer: Answer },
}

/// Bookmarks of one group that wait for a freeze, for their place or for the box; more at once are somebody's mistake.
const WAITING_MAX: usize = 64;

fn fail(answer: &Answer, code: &str, message: impl Into<String>, remedy: &str) {
    // Whoever asked may have gone away.
    let _ = answer.send(Reply::Error(Failure::new(code, message, remedy)));
}

fn done(answer: &Answer, value: serde_json::Value) {
    let _ = answer.send(Reply::Ok(value));
}

const OFFLINE: &str = "look at `holdfast-agent status`; this needs the box";

impl Engine {
    pub(super) fn request(&mut self, request: Request, answer: Answer) {
        match request {
            Request::Status => done(&answer, self.status_json()),
            Request::Protect { devices, group, whole_image, mode } => {
                self.protect(&devices, group, whole_image, mode, answer);
            }
            Request::Unprotect { group } => self.unprotect(&group, answer),
            Request::Bookmark { group, name, consistency } => self.bookmark_locally(group, name, consistency, answer),
            Request::Resync { group } => match self.group_named(&group) {
                None => fail(&answer, "no-such-group", format!("no group {group:?} is protected here"), ""),
                Some(id) => {
                    self.resync(id);
                    done(&answer, serde_json::json!({ "group": id }));
                }
            },
        }
    }

    fn event(&mut self, id: GroupId, event: Event) {
        if let Some((running, ctx)) = self.running(id) {
            running.on(ctx, id, event);
        }
    }

    /// Everything is copied anew, so what was written past us is as well.
    fn resync(&mut self, id: GroupId) {
        self.unknown_writes_settled(id);
        self.event(id, Event::Resync);
    }

    fn group_named(&self, name: &str) -> Option<GroupId> {
        self.groups.iter().find(|g| g.record.spec.name == name || g.id().to_string() == name).map(|g| g.id())
    }

    // ---- protect ----------------------------------------------------------------------------------------------------------------

    fn protect(&mut self, devices: &[String], name: Option<String>, whole_image: bool, mode: SyncMode, answer: Answer) {
        let mut disks = match Disks::here() {
            Ok(disks) => disks,
            Err(e) => return fail(&answer, "disks", crate::error_chain(&e), ""),
        };
        if mode == SyncMode::Async {
            disks.at_mirrors(self.why_mirrors());
        }
        let mirrored = mode != SyncMode::Async || disks.why_mirrors().is_some();
        if mirrored && whole_image {
            let text = match disks.why_mirrors() {
                None => "--sync mirrors volumes, --whole-image takes whole disks: choose one".to_owned(),
                Some(why) => format!("{why}, so volumes are mirrored, and --whole-image takes whole disks"),
            };
            return fail(&answer, "disks", text, "");
        }
        let resolve = || match mode {
            SyncMode::Async => disks.resolve(devices),
            SyncMode::Sync { .. } => disks.volumes(devices, "chosen; its writes wait for the box"),
        };
        let resolved = resolve().and_then(|mut first| {
            if whole_image {
                let whole: Vec<String> = first.leaves.iter().map(|l| l.disk.clone()).collect();
                let mut second = disks.resolve(&whole)?;
                second.notes.splice(0..0, first.notes.drain(..));
                return Ok(second);
            }
            Ok(first)
        });
        let resolution = match resolved {
            Ok(resolution) if !resolution.leaves.is_empty() => resolution,
            Ok(_) => return fail(&answer, "nothing-chosen", "no disk was chosen", "see `holdfast-agent disks`"),
            Err(e) => return fail(&answer, "disks", crate::error_chain(&e), "see `holdfast-agent disks`"),
        };
        if mirrored && let Err(e) = self.may_mirror(&disks, devices, mode) {
            return fail(&answer, "no-mirror", crate::error_chain(&e), "see `holdfast-agent disks`");
        }
        for leaf in &resolution.leaves {
            let taken = self
                .groups
                .iter()
                .flat_map(|g| g.record.volumes.iter().map(move |v| (g, v)))
                .find(|(_, v)| disks.get(&v.device).is_some_and(|d| overlap(d, leaf)));
            if let Some((group, volume)) = taken {
                let text = format!(
                    "/dev/{} is protected already, by group {:?} (/dev/{})",
                    leaf.volume, group.record.spec.name, volume.device
                );
                return fail(&answer, "protected-already", text, "unprotect that group first");
            }
        }
        if self.groups.len() >= self.config.groups_max() {
            let text = format!(
                "{} groups fit under the memory ceiling of {} MiB",
                self.config.groups_max(),
                self.config.memory_mib
            );
            return fail(&answer, "memory", text, "raise memory_mib or lower spool_memory_mib in the configuration");
        }
        if self.pending.is_some() {
            return fail(&answer, "busy", "another change waits for the box", "try again in a moment");
        }
        if self.control_up.is_none() {
            return fail(
                &answer,
                Failure::NO_BOX,
                format!("no connection to the box: {}", self.control_reason),
                OFFLINE,
            );
        }
        let name = name.unwrap_or_else(|| format!("{}-{}", enrol::host_name(), resolution.leaves[0].volume));
        let volumes: Vec<VolumeSpec> = resolution
            .leaves
            .iter()
            .enumerate()
            .map(|(i, leaf)| VolumeSpec {
                id: VolumeId(i as u32),
                name: if mirrored {
                    disks.get(&leaf.volume).map_or_else(String::new, |d| d.title())
                } else {
                    format!("/dev/{}", leaf.volume)
                },
                sectors: Sectors(leaf.range.sectors.0),
                identity: disks.get(&leaf.volume).map(|d| d.identity.to_string()).unwrap_or_default(),
            })
            .collect();
        self.tell(Message::Protect { group_name: name, volumes: volumes.clone(), mode });
        self.pending = Some(Pending::Protect { resolution, asked: volumes, sync: mirrored, answer });
        self.pending_since = clock::mono();
    }

    /// Why a new group's volumes are captured at mirrors; none where capture runs or would.
    fn why_mirrors(&self) -> Option<String> {
        let runs = self.ctx.capture.is_some() && self.config.capture != Choice::DmMirror;
        if runs { None } else { choose::why_mirrors(self.config.capture) }
    }

    /// A box that never answers must not keep every later change waiting.
    pub(super) fn give_up_pending(&mut self, now: model::MonoTime) {
        if self.pending.is_some()
            && now.ms_since(self.pending_since) >= super::PENDING_MS
            && let Some(Pending::Protect { answer, .. } | Pending::Unprotect { answer, .. }) = self.pending.take()
        {
            fail(&answer, "no-answer", format!("the box has not answered for {} s", super::PENDING_MS / 1000), OFFLINE);
        }
    }

    fn protected(&mut self, spec: GroupSpec) {
        let Some(Pending::Protect { resolution, asked, sync, answer }) = self.pending.take() else { return };
        let disks = match Disks::here() {
            Ok(disks) => disks,
            Err(e) => return fail(&answer, "disks", crate::error_chain(&e), ""),
        };
        let Some(order) = order_of_box(&asked, &spec.volumes) else {
            return fail(&answer, "box", "the box answered with other volumes than it was asked to protect", "");
        };
        let volumes = spec
            .volumes
            .iter()
            .zip(order)
            .map(|(volume, leaf)| {
                let leaf = &resolution.leaves[leaf];
                VolumeRecord {
                    id: volume.id,
                    device: leaf.volume.clone(),
                    sectors: leaf.range.sectors.0,
                    identity: disks.get(&leaf.volume).map(|d| d.identity.clone()).unwrap_or_default(),
                    max_sectors_kb: if sync { None } else { start::clamp_requests(&leaf.disk) },
                }
            })
            .collect();
        let unknown = Default::default();
        let record = GroupRecord { spec: spec.clone(), volumes, skips: Vec::new(), sync, unknown };
        let id = spec.id;
        match self.add_group(record.clone(), &disks) {
            Ok(()) => {
                let leaves: Vec<_> = resolution
                    .leaves
                    .iter()
                    .map(|l| serde_json::json!({ "device": format!("/dev/{}", l.volume), "why": l.why, "bytes": l.range.bytes() }))
                    .collect();
                done(
                    &answer,
                    serde_json::json!({ "group": id, "name": spec.name, "volumes": leaves, "notes": resolution.notes }),
                );
            }
            Err(why) => {
                // The box must not keep a group that nobody fills.
                start::restore_requests(&record);
                self.groups.retain(|g| g.id() != id);
                self.tell(Message::Unprotect { group: id });
                fail(&answer, "capture", why, "");
            }
        }
    }

    fn unprotect(&mut self, name: &str, answer: Answer) {
        let Some(id) = self.group_named(name) else {
            return fail(
                &answer,
                "no-such-group",
                format!("no group {name:?} is protected here"),
                "see `holdfast-agent status`",
            );
        };
        if self.pending.is_some() {
            return fail(&answer, "busy", "another change waits for the box", "try again in a moment");
        }
        if self.control_up.is_none() {
            return fail(
                &answer,
                Failure::NO_BOX,
                format!("no connection to the box: {}", self.control_reason),
                OFFLINE,
            );
        }
        self.tell(Message::Unprotect { group: id });
        self.pending = Some(Pending::Unprotect { group: id, answer });
        self.pending_since = clock::mono();
    }

    fn unprotected(&mut self, group: GroupId) {
        if let Some(i) = self.groups.iter().position(|g| g.id() == group) {
            self.remove_group(i);
        }
        if let Some(Pending::Unprotect { group: wanted, .. }) = &self.pending
            && *wanted == group
            && let Some(Pending::Unprotect { answer, .. }) = self.pending.take()
        {
            done(&answer, serde_json::json!({ "group": group }));
        }
    }

    fn declined(&mut self, refusal: &Refusal) {
        match self.pending.take() {
            None => tracing::warn!(%refusal, "the box declined"),
            Some(Pending::Unprotect { group, answer }) if refusal.code == RefuseCode::UnknownGroup => {
                // It has forgotten the group already.
                self.pending = Some(Pending::Unprotect { group, answer });
                self.unprotected(group);
            }
            Some(Pending::Protect { answer, .. } | Pending::Unprotect { answer, .. }) => {
                fail(&answer, "declined", format!("the box declined: {refusal}"), "");
            }
        }
    }

    // ---- bookmarks --------------------------------------------------------------------------------------------------------------

    fn bookmark_locally(&mut self, group: Option<String>, name: String, consistency: Consistency, answer: Answer) {
        let name: BookmarkName = match name.parse() {
            Ok(name) => name,
            Err(e) => return fail(&answer, "bad-name", format!("{e}"), ""),
        };
        let id = match &group {
            Some(group) => self.group_named(group),
            None if self.groups.len() == 1 => self.groups.first().map(|g| g.id()),
            None => return fail(&answer, "which-group", "there is not exactly one group", "name it with --group"),
        };
        match id {
            None => fail(
                &answer,
                "no-such-group",
                format!("no group {:?} is protected here", group.unwrap_or_default()),
                "",
            ),
            Some(id) => self.bookmark(id, name, consistency, BookmarkFor::Local(answer)),
        }
    }

    fn bookmark(&mut self, group: GroupId, name: BookmarkName, consistency: Consistency, answer: BookmarkFor) {
        let id = self.next_bookmark;
        self.next_bookmark += 1;
        let Some((running, _)) = self.running(group) else {
            return self.bookmark_failed(answer, "the group is not running here".to_owned());
        };
        if running.bookmarks.len() >= WAITING_MAX {
            return self.bookmark_failed(answer, format!("{WAITING_MAX} bookmarks are waiting already"));
        }
        if consistency == Consistency::Filesystem && self.freezing {
            return self
                .bookmark_failed(answer, "another bookmark has file systems frozen right now; try again".to_owned());
        }
        let Some((running, _)) = self.running(group) else { return };
        let devices: Vec<String> = running.volumes.iter().map(|v| v.device.clone()).collect();
        match consistency {
            Consistency::Application => {
                self.bookmark_failed(
                    answer,
                    "application-consistent bookmarks are not possible yet; use filesystem".to_owned(),
                );
            }
            Consistency::Crash => {
                running.bookmarks.push(PlacedBookmark { id, seq: None, name: name.clone(), answer, frozen: None });
                self.ctx.wait(Wait::Bookmark { group, id, name, consistency });
            }
            Consistency::Filesystem => {
                running.bookmarks.push(PlacedBookmark { id, seq: None, name: name.clone(), answer, frozen: None });
                self.freezing = true;
                // Freezing waits for the host's writers: not in this thread.
                let sender = self.to_self.clone();
                let job = move || {
                    let result = Disks::here().map_err(|_| FreezeError::NothingMounted).and_then(|disks| {
                        let mut mounts: Vec<String> = devices.iter().flat_map(|d| disks.mounts_above(d)).collect();
                        mounts.sort();
                        mounts.dedup();
                        freeze::freeze_all(&mounts)
                    });
                    let _ = sender.send(Input::Frozen { group, id, name, result });
                };
                if let Err(e) = std::thread::Builder::new().name("freeze".to_owned()).spawn(job) {
                    self.freezing = false;
                    self.take_bookmark(group, id, &format!("could not start a thread: {e}"));
                }
            }
        }
    }

    fn bookmark_failed(&mut self, answer: BookmarkFor, why: String) {
        match answer {
            BookmarkFor::Local(answer) => fail(&answer, "no-bookmark", why, ""),
            BookmarkFor::Box { id } => {
                self.tell(Message::CommandDone { id, result: CommandResult::Failed { text: why } })
            }
        }
    }

    /// Whether the guard may have let go of the file systems of a bookmark.
    pub(super) fn thawed(&mut self, group: GroupId, id: u64) -> bool {
        let Some((running, _)) = self.running(group) else { return true };
        let bookmark = running.bookmarks.iter().find(|b| b.id == id);
        bookmark.is_none_or(|b| b.frozen.as_ref().is_none_or(|f| !f.surely_frozen()))
    }

    pub(super) fn take_bookmark(&mut self, group: GroupId, id: u64, why: &str) {
        let Some((running, _)) = self.running(group) else { return };
        if let Some(at) = running.bookmarks.iter().position(|b| b.id == id) {
            let bookmark = running.bookmarks.swap_remove(at);
            self.bookmark_failed(bookmark.answer, why.to_owned());
        }
    }

    /// The file systems stand still: everything written so far is before the barrier that is taken now.
    pub(super) fn frozen(&mut self, group: GroupId, id: u64, name: BookmarkName, result: Result<Frozen, FreezeError>) {
        self.freezing = false;
        match result {
            Err(e) => self.take_bookmark(group, id, &crate::error_chain(&e)),
            Ok(frozen) => {
                let Some((running, _)) = self.running(group) else { return };
                let Some(bookmark) = running.bookmarks.iter_mut().find(|b| b.id == id) else { return };
                bookmark.frozen = Some(frozen);
                self.ctx.wait(Wait::Bookmark { group, id, name, consistency: Consistency::Filesystem });
            }
        }
    }

    // ---- the box ----------------------------------------------------------------------------------------------------------------

    pub(super) fn heard_control(&mut self, generation: u64, what: FromLink) {
        match what {
            FromLink::Up { box_name, version } => {
                self.control_up = Some(generation);
                self.box_hears_notices = version >= wire::VERSION_NOTICES;
                self.box_leases = version >= wire::VERSION_OWNERSHIP;
                self.told_notices = None;
                self.control_heard = clock::mono();
                self.control_reason.clear();
                self.box_name = box_name;
                self.tell(Message::ListGroups);
                if clock::wall_us().saturating_sub(self.identity.enrolled_us) > RENEW_US {
                    self.renew();
                }
            }
            FromLink::Down { why, refusal, .. } => {
                self.control_up = None;
                self.control_reason = refusal.map_or(why, |r| r.to_string());
                self.renewing = None;
                self.ctx.sync.reads_failed();
                if let Some(Pending::Protect { answer, .. } | Pending::Unprotect { answer, .. }) = self.pending.take() {
                    fail(
                        &answer,
                        // What was asked may have been done: not to be asked again without looking.
                        "box-lost",
                        format!("the connection to the box broke: {}", self.control_reason),
                        OFFLINE,
                    );
                }
            }
            _ if self.control_up != Some(generation) => {}
            FromLink::Ack(_) => {}
            FromLink::Message(message) => {
                self.control_heard = clock::mono();
                self.control_message(*message);
            }
        }
    }

    fn control_message(&mut self, message: Message) {
        match message {
            Message::Heartbeat { number, .. } => self.tell(Message::HeartbeatAck { number }),
            Message::HeartbeatAck { .. } => {}
            Message::Groups(specs) => self.groups_of_box(specs),
            Message::Protected { spec } => self.protected(spec),
            Message::Unprotected { group } => self.unprotected(group),
            Message::Declined(refusal) => {
                self.renewing = None;
                self.declined(&refusal);
            }
            Message::Command { id, what } => self.command(id, what),
            Message::ReadBackDone { id, data } => self.ctx.sync.read_back(id, data),
            Message::Enrolled { host, certificate_pem, ca_pem } => self.renewed(host, &certificate_pem, &ca_pem),
            Message::HostPlan(plan) => self.host_plan(plan),
            Message::LeaseAnswer(_) | Message::LeaseRevoke(_) => self.lease(message),
            other => tracing::debug!(message = other.name(), "not for a control connection"),
        }
    }

    fn groups_of_box(&mut self, specs: Vec<GroupSpec>) {
        let (mut changed, mut modes) = (false, Vec::new());
        for group in &mut self.groups {
            match specs.iter().find(|s| s.id == group.record.spec.id) {
                Some(spec) => {
                    changed |= group.record.spec.policy != spec.policy || group.record.spec.name != spec.name;
                    group.record.spec.policy = spec.policy.clone();
                    group.record.spec.name.clone_from(&spec.name);
                    modes.push((spec.id, spec.policy.mode));
                }
                None => {
                    tracing::warn!(group = %group.record.spec.name, "the box has this group no longer; unprotect it here")
                }
            }
        }
        if changed {
            self.store_groups();
            modes.into_iter().for_each(|(id, mode)| self.mode_of_sync(id, mode));
        }
    }

    fn command(&mut self, id: u64, what: Command) {
        let known =
            |engine: &Self, group: GroupId| engine.groups.iter().any(|g| g.id() == group && g.running.is_some());
        let group = match &what {
            Command::Bookmark { group, .. }
            | Command::Resync { group }
            | Command::Pause { group, .. }
            | Command::Resume { group }
            | Command::Release { group } => *group,
            Command::Spec { spec } => spec.id,
        };
        let must_run = !matches!(what, Command::Release { .. } | Command::Spec { .. });
        if must_run && !known(self, group) {
            let text = "the group is not running on this host; see its status".to_owned();
            return self.tell(Message::CommandDone { id, result: CommandResult::Failed { text } });
        }
        match what {
            Command::Bookmark { group, name, consistency } => {
                return self.bookmark(group, name, consistency, BookmarkFor::Box { id });
            }
            Command::Resync { group } => self.resync(group),
            Command::Pause { group, reason } => {
                tracing::info!(%group, %reason, "paused by the box");
                self.event(group, Event::Pause);
            }
            Command::Resume { group } => self.event(group, Event::Unpause),
            Command::Spec { spec } => self.groups_of_box(vec![spec]),
            Command::Release { group } => self.unprotected(group),
        }
        self.tell(Message::CommandDone { id, result: CommandResult::Done });
    }

    fn renew(&mut self) {
        match enrol::request(&enrol::host_name()) {
            Ok(request) => {
                self.tell(Message::Renew { csr_der: request.csr_der });
                self.renewing = Some(request.key_pem);
            }
            Err(e) => tracing::warn!(error = %e, "could not make a new key"),
        }
    }

    fn renewed(&mut self, host: model::HostId, certificate: &str, ca: &str) {
        let Some(key) = self.renewing.take() else { return };
        if host != self.identity.host {
            tracing::error!("the box answered a renewal with a certificate for another host; the old one stays");
            return;
        }
        // Checked before the old one is replaced.
        let config = match tls::session_config(ca.as_bytes(), certificate.as_bytes(), key.as_bytes()) {
            Ok(config) => config,
            Err(e) => {
                return tracing::error!(error = %crate::error_chain(&e), "the renewed certificate is of no use; the old one stays");
            }
        };
        let identity = HostIdentity { enrolled_us: clock::wall_us(), ..self.identity.clone() };
        let (certificate, ca) = (certificate.to_owned(), ca.to_owned());
        self.ctx.scribe.put(Key::Identity, move |dir| {
            let result = dir.store_identity(&identity, &key, &certificate, &ca);
            Some(Stored::Identity { identity, tls: config, result })
        });
    }

    pub(super) fn renewal_stored(
        &mut self,
        identity: HostIdentity,
        tls: Arc<rustls::ClientConfig>,
        result: Result<(), StateError>,
    ) {
        match result {
            Ok(()) => {
                self.identity = identity;
                *self.peer.config.lock().unwrap_or_else(|e| e.into_inner()) = tls;
                tracing::info!("the host's certificate was renewed");
            }
            Err(e) => tracing::error!(error = %crate::error_chain(&e), "could not store the renewed certificate"),
        }
    }
}

/// For each volume of the box's answer, which of those asked for it is; none when they are not the same. The box gives the numbers, and a
/// disk that the group had before keeps its own: the order of the answer is not that of the question.
fn order_of_box(asked: &[VolumeSpec], answered: &[VolumeSpec]) -> Option<Vec<usize>> {
    if asked.len() != answered.len() {
        return None;
    }
    let order: Option<Vec<usize>> = answered
        .iter()
        .map(|a| asked.iter().position(|b| a.identity == b.identity && a.name == b.name && a.sectors == b.sectors))
        .collect();
    let order = order?;
    let each_once = order.iter().collect::<std::collections::BTreeSet<_>>().len() == order.len();
    each_once.then_some(order)
}

/// Whether a protected device and a leaf share sectors of a disk.
fn overlap(device: &crate::disks::Device, leaf: &Leaf) -> bool {
    let (disk, range) = match &device.class {
        crate::disks::Class::Partition { of, start } => (of.as_str(), model::Extent::new(*start, device.sectors)),
        _ => (device.name.as_str(), model::Extent::new(0, device.sectors)),
    };
    disk == leaf.disk && range.intersect(&leaf.range).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(id: u32, name: &str) -> VolumeSpec {
        VolumeSpec {
            id: VolumeId(id),
            name: format!("/dev/{name}"),
            sectors: Sectors(8),
            identity: format!("serial:{name}"),
        }
    }

    #[test]
    fn volumes_are_told_by_what_they_are_and_not_by_their_place() {
        // `sdb` was added to a group that had `sdc` and `sdd`: those keep their numbers, and the answer is in the order of numbers.
        let asked = [volume(0, "sdb"), volume(1, "sdc"), volume(2, "sdd")];
        let answered = [volume(0, "sdc"), volume(1, "sdd"), volume(2, "sdb")];
        assert_eq!(order_of_box(&asked, &answered), Some(vec![1, 2, 0]));
        assert_eq!(order_of_box(&asked, &asked), Some(vec![0, 1, 2]));
        assert_eq!(order_of_box(&asked, &answered[..2]), None);
        assert_eq!(order_of_box(&asked, &[volume(0, "sdb"), volume(1, "sdb"), volume(2, "sdd")]), None);
        assert_eq!(order_of_box(&asked, &[volume(0, "sdb"), volume(1, "sdc"), volume(2, "sde")]), None);
        let smaller = VolumeSpec { sectors: Sectors(4), ..volume(0, "sdb") };
        assert_eq!(order_of_box(&asked[..1], &[smaller]), None);
    }
}
