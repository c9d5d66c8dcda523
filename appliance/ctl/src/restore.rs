//! `holdfast restore`: a volume as it was at a moment, through a view of the daemon's over its unix socket.

use crate::{
    api::{Group, View},
    args::{Format, RestoreArgs},
    client::{Client, Route},
    copy::{self, Copied},
    machine,
    online::{self, ViewWish, open_view},
    target::{Allowed, Protected, Target},
    times::Clock,
};
use anyhow::Context as _;
use http::Method;
use model::ByteLen;
use std::{io::IsTerminal, os::unix::net::UnixStream, process::Command, time::Instant};

/// We connect to the view at once and close it at the end: one that nobody has open is left by a restore that was killed.
const IDLE_MINUTES: u64 = 5;

pub fn run(client: &Client, args: &RestoreArgs) -> anyhow::Result<()> {
    if let Some(command) = &args.command {
        return machine::command(client, command);
    }
    if !args.groups.is_empty() {
        return machine::restore(client, args);
    }
    let clock = Clock::local();
    // Both are demanded where no group is given first.
    let to = args.to.as_ref().context("--to is missing")?;
    let point = clock.point(args.at.as_deref().unwrap_or("latest"))?;
    let groups = online::groups(client)?;
    let group = online::pick_group(&groups, args.group.as_deref())?;
    let volume = online::pick_volume(&group.volumes, &group.name, args.volume.as_deref())?;
    let allowed = Allowed { overwrite: to.force, onto_protected: to.onto_protected };
    let mut target = Target::open(&to.to, allowed, &protected(&groups))?;
    if args.format == Format::Qcow2 {
        target.image_path()?;
    }
    copy::catch_interrupts();
    let started = Instant::now();
    let view = open_view(client, group, &point, &ViewWish { tcp: false, idle_minutes: Some(IDLE_MINUTES) })?;
    let opened = OpenView { client, view: &view };
    let moment = clock.show(view.time_us);
    eprintln!("restoring {} of group {} as of {moment} (LSN {})", volume.name, group.name, view.lsn);
    let export = view
        .exports
        .iter()
        .find(|export| export.volume == volume.id.0)
        .with_context(|| format!("the box opened the view without volume {}", volume.name))?;
    let result = match args.format {
        Format::Raw => copy_raw(&export.unix_socket, &export.export_name, &mut target),
        Format::Qcow2 => convert(&export.uri, ByteLen(export.bytes), &target),
    };
    let copied = result.with_context(|| match target.is_device() {
        true => format!("{} holds a part of the volume only", to.to.display()),
        false => format!("nothing was left at {}", to.to.display()),
    })?;
    target.finish()?;
    drop(opened);
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "restored {} as of {moment} (LSN {}) to {}: {}, {} of it written, in {seconds:.1} s",
        volume.name,
        view.lsn,
        to.to.display(),
        copied.size,
        copied.data
    );
    Ok(())
}

/// Closes the view however the restore ends: an open one holds history back.
struct OpenView<'a> {
    client: &'a Client,
    view: &'a View,
}

impl Drop for OpenView<'_> {
    fn drop(&mut self) {
        let id = online::plain(&self.view.id);
        let route = Route::new(&["views", &id]);
        if let Err(e) = self.client.call::<serde_json::Value>(Method::DELETE, &route, None) {
            eprintln!("view {id} could not be closed ({}): `holdfast view close {id}`", crate::sentence(&e.into()));
        }
    }
}

fn copy_raw(socket: &str, export: &str, target: &mut Target) -> anyhow::Result<Copied> {
    let stream = UnixStream::connect(socket).with_context(|| format!("connect to the view at {socket}"))?;
    let mut source = nbd::client::Client::connect(stream, export).context("open the view")?;
    let copied = copy::copy(&mut source, target)?;
    // Everything was read; a goodbye that fails changes nothing.
    drop(source.disconnect());
    Ok(copied)
}

fn convert(uri: &str, size: ByteLen, target: &Target) -> anyhow::Result<Copied> {
    let image = target.image_path()?;
    let mut command = Command::new("qemu-img");
    command.arg("convert");
    if std::io::stdout().is_terminal() {
        command.arg("-p"); // its bar; in a file it would be one long line
    }
    command.args(["-f", "raw", "-O", "qcow2", uri]).arg(image);
    let status =
        command.status().context("qemu-img makes the qcow2 image, and cannot be started (package qemu-utils)")?;
    anyhow::ensure!(status.success(), "qemu-img could not make the image ({status})");
    copy::check_interrupt()?;
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(image)?);
    Ok(Copied { size, data: ByteLen(blocks * 512) })
}

fn protected(groups: &[Group]) -> Vec<Protected> {
    let of_group = |group: &Group| {
        let name = group.name.clone();
        let volumes = group.volumes.clone().into_iter();
        volumes.map(move |v| Protected { group: name.clone(), volume: v.name, identity: v.identity })
    };
    groups.iter().flat_map(of_group).collect()
}
