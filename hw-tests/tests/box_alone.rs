//! A box without agents: other people's NBD clients, and kills.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Draw, Scratch, compare,
    image::ImageDisk,
    process::{self, call, wait_for},
    product::{Appliance, At, Binaries},
    tools,
};
use std::{
    fs,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

const TOOL_MAX: Duration = Duration::from_secs(120);
const DISK_BYTES: u64 = 32 << 20;

fn start(dir: &Path) -> Result<Appliance> {
    Appliance::start(&Binaries::beside_us()?, &dir.join("box"))
}

fn assert_view_is(appliance: &Appliance, group: &str, at: &At, oracle: &Path) -> Result<()> {
    let view = appliance.view(group, at)?;
    let difference = compare::export_with_file(&mut view.only()?.connect()?, oracle)?;
    ensure!(difference.is_none(), "{at}: {}", difference.map(|d| d.to_string()).unwrap_or_default());
    view.close()
}

#[test]
fn qemu_img_and_nbdcopy_write_a_disk_and_read_a_moment_of_it() -> Result<()> {
    let dir = Scratch::new()?;
    let mut appliance = start(dir.path())?;
    appliance.create_ingest("foreign", &[("disk", DISK_BYTES)])?;
    let uri = appliance.ingest_target("foreign", "disk")?.uri();
    let mut image = ImageDisk::create(dir.path(), DISK_BYTES, 3)?;
    image.change()?;
    let source = image.path().to_string_lossy().into_owned();

    call("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &source, &uri], TOOL_MAX)?;
    let by_qemu = appliance.bookmark("foreign", "by-qemu")?;
    let first = dir.path().join("first.img");
    fs::copy(image.path(), &first)?;
    image.change()?;
    call("nbdcopy", &["--flush", &source, &uri], TOOL_MAX)?;
    let by_nbdcopy = appliance.bookmark("foreign", "by-nbdcopy")?;

    assert_view_is(&appliance, "foreign", &At::Lsn(by_qemu.lsn), &first)?;
    assert_view_is(&appliance, "foreign", &At::Lsn(by_nbdcopy.lsn), image.path())?;
    let view = appliance.view("foreign", &At::Bookmark("by-nbdcopy".into()))?;
    let view_uri = view.only()?.uri();
    call("qemu-img", &["compare", "-f", "raw", "-F", "raw", &source, &view_uri], TOOL_MAX)?;
    let copy = dir.path().join("copy.img");
    call("nbdcopy", &[&view_uri, &copy.to_string_lossy()], TOOL_MAX)?;
    assert_eq!(compare::file_with_file(&copy, image.path())?, None);
    let map = call("qemu-img", &["map", "--output=json", "-f", "raw", &view_uri], TOOL_MAX)?.stdout;
    ensure!(map.contains("\"zero\": true"), "a sparse disk has no zeroes in its map: {map}");
    view.close()?;
    appliance.stop()?;
    dir.done()
}

#[test]
fn nbd_over_tls_takes_our_certificates_and_no_others() -> Result<()> {
    let dir = Scratch::new()?;
    let mut appliance = start(dir.path())?;
    appliance.create_ingest("remote", &[("disk", DISK_BYTES)])?;
    let export = appliance.ingest_target("remote", "disk")?.export_name;
    let mut image = ImageDisk::create(dir.path(), DISK_BYTES, 5)?;
    image.change()?;
    let convert = |credentials: &str| -> Result<process::Finished> {
        let (host, port) = (appliance.nbd_listen().ip(), appliance.nbd_listen().port());
        let mut command = Command::new(tools::need("qemu-img")?);
        command.args(["convert", "-n", "--target-image-opts", "--object", credentials, "-f", "raw"]).arg(image.path());
        command
            .arg(format!("driver=nbd,host={host},port={port},export={export},tls-creds=tls,tls-hostname=holdfast-box"));
        process::run(command, TOOL_MAX)
    };
    let ours = dir.path().join("ours");
    appliance.client_certificate("desk", &ours)?;
    convert(&format!("tls-creds-x509,id=tls,endpoint=client,dir={}", ours.display()))?.ok()?;
    let written = appliance.bookmark("remote", "written")?;
    assert_view_is(&appliance, "remote", &At::Lsn(written.lsn), image.path())?;

    // The box's authority is known, but the client shows nothing of its own.
    let bare = dir.path().join("bare");
    fs::create_dir(&bare)?;
    fs::copy(ours.join("ca-cert.pem"), bare.join("ca-cert.pem"))?;
    let refused = convert(&format!("tls-creds-x509,id=tls,endpoint=client,dir={}", bare.display()))?;
    ensure!(!refused.status.success(), "a client without a certificate was let in");
    let another = start(&dir.path().join("another"))?;
    let theirs = dir.path().join("theirs");
    another.client_certificate("desk", &theirs)?;
    fs::copy(ours.join("ca-cert.pem"), theirs.join("ca-cert.pem"))?;
    let refused = convert(&format!("tls-creds-x509,id=tls,endpoint=client,dir={}", theirs.display()))?;
    ensure!(!refused.status.success(), "a client of another box's authority was let in");
    let plain = format!("nbd://{}/{export}", appliance.nbd_listen());
    let mut info = Command::new(tools::need("nbdinfo")?);
    info.arg(plain);
    ensure!(!process::run(info, TOOL_MAX)?.status.success(), "a client without TLS was let in");
    appliance.stop()?;
    dir.done()
}

#[test]
fn a_view_cannot_be_written_to() -> Result<()> {
    let dir = Scratch::new()?;
    let mut appliance = start(dir.path())?;
    appliance.create_ingest("g", &[("disk", DISK_BYTES)])?;
    let mut client = appliance.ingest_target("g", "disk")?.connect()?;
    client.write_fua(4096, &[7; 4096])?;
    let moment = appliance.bookmark("g", "m")?;
    let view = appliance.view("g", &At::Lsn(moment.lsn))?;
    let mut reader = view.only()?.connect()?;
    ensure!(reader.read_only(), "the export does not say it is read-only");
    ensure!(reader.write(0, &[1; 4096]).is_err(), "a write into a view was taken");
    let mut block = [0; 4096];
    reader.read(4096, &mut block)?;
    assert_eq!(block, [7; 4096]);
    drop(reader);
    view.close()?;
    appliance.stop()?;
    dir.done()
}

/// Blocks of the disk the killed box is written to.
const BLOCKS: u64 = 512;
const BLOCK: usize = 4096;
const KILLS: u64 = 5;

/// A block's content in its nth version: its own number everywhere, so that a misplaced block is seen too.
fn content(block: u64, version: u64) -> Vec<u8> {
    let word = [block.to_le_bytes(), version.to_le_bytes()].concat();
    if version == 0 { vec![0; BLOCK] } else { word.iter().copied().cycle().take(BLOCK).collect() }
}

#[test]
fn no_acknowledged_write_is_lost_when_the_box_is_killed() -> Result<()> {
    let dir = Scratch::new()?;
    let mut appliance = start(dir.path())?;
    appliance.create_ingest("g", &[("disk", BLOCKS * BLOCK as u64)])?;
    let seed = 11;
    let mut draw = Draw::new(seed);
    // Per block: the version last acknowledged, and the one after it that may or may not have made it.
    let (mut acknowledged, mut tried) = (vec![0u64; BLOCKS as usize], vec![0u64; BLOCKS as usize]);
    let mut bookmarks = Vec::new();
    for round in 0..KILLS {
        let export = appliance.ingest_target("g", "disk")?;
        let count = Arc::new(AtomicU64::new(0));
        let (count2, mut draw2, mut acked2, mut tried2) =
            (count.clone(), Draw::new(draw.word()), acknowledged.clone(), tried.clone());
        let writer = thread::spawn(move || -> Result<(Vec<u64>, Vec<u64>)> {
            let mut client = export.connect()?;
            loop {
                let block = draw2.below(BLOCKS);
                tried2[block as usize] += 1;
                let version = tried2[block as usize];
                // The kill comes in the middle of one of these.
                if client.write_fua(block * BLOCK as u64, &content(block, version)).is_err() {
                    return Ok((acked2, tried2));
                }
                acked2[block as usize] = version;
                count2.fetch_add(1, Ordering::Relaxed);
            }
        });
        let goal = 50 + draw.below(400);
        wait_for("writes to be acknowledged", TOOL_MAX, || {
            ensure!(!writer.is_finished(), "round {round}, seed {seed}: the writer ended by itself");
            Ok((count.load(Ordering::Relaxed) >= goal).then_some(()))
        })?;
        appliance.kill()?;
        (acknowledged, tried) = writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        appliance.run().with_context(|| format!("restart after kill {round}, seed {seed}"))?;

        let mut client = appliance.ingest_target("g", "disk")?.connect()?;
        let mut bytes = vec![0; BLOCK];
        for block in 0..BLOCKS {
            client.read(block * BLOCK as u64, &mut bytes)?;
            let (acked, last) = (acknowledged[block as usize], tried[block as usize]);
            let found = (acked..=last).find(|version| bytes == content(block, *version));
            let found = found.with_context(|| {
                format!("round {round}, seed {seed}: block {block} has neither version {acked} nor {last}")
            })?;
            (acknowledged[block as usize], tried[block as usize]) = (found, last);
        }
        let name = format!("after-kill-{round}");
        appliance.bookmark("g", &name)?;
        bookmarks.push((name, acknowledged.clone()));
    }
    // Every earlier moment is still what it was.
    for (name, versions) in &bookmarks {
        let view = appliance.view("g", &At::Bookmark(name.clone()))?;
        let mut client = view.only()?.connect()?;
        let mut bytes = vec![0; BLOCK];
        for (block, version) in (0..).zip(versions) {
            client.read(block * BLOCK as u64, &mut bytes)?;
            ensure!(bytes == content(block, *version), "{name}, seed {seed}: block {block} is not version {version}");
        }
        drop(client);
        view.close()?;
    }
    appliance.stop()?;
    dir.done()
}
