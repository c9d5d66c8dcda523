//! The rig's own promises, against other people's programs: what it finds wrong in ours must not be its own mistake.

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Scratch, compare,
    disk::{LoopDisk, Workload, check_ext4, copy_sparse, counters, loop_disks_work},
    guest::{Guest, Initramfs, Kernel},
    image::ImageDisk,
    nbd::Client,
    process::{Program, wait_for},
    skip, tools,
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const STEP_MAX: Duration = Duration::from_secs(60);

#[test]
fn a_guest_boots_runs_commands_and_answers_on_qmp() -> Result<()> {
    let dir = Scratch::new()?;
    let kernel =
        Kernel::debian("linux-image-amd64", &PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/guest"))?;
    let disk = dir.path().join("disk");
    fs::File::create(&disk)?.set_len(16 << 20)?;
    let drive = format!("file={},if=virtio,format=raw", disk.display());
    let mut guest = Guest::boot(&kernel, &Initramfs::new(&kernel)?, dir.path(), &["-drive", &drive])?;
    assert_eq!(guest.sh("uname -r", STEP_MAX)?.trim(), kernel.version);
    guest.sh("printf mark | dd of=/dev/vda bs=4 seek=1 conv=fsync", STEP_MAX)?;
    ensure!(guest.sh("false", STEP_MAX).is_err(), "a failing command passed");
    let status = guest.qmp.execute("query-status", serde_json::json!({}))?;
    assert_eq!(status["status"], "running");
    guest.power_off()?;
    assert_eq!(&fs::read(&disk)?[..8], b"\0\0\0\0mark");
    dir.done()
}

/// nbdkit over a file of `bytes`.
fn nbdkit(dir: &Path, file: &Path, bytes: u64) -> Result<(Program, PathBuf)> {
    fs::File::create(file)?.set_len(bytes)?;
    let socket = dir.join("kit.sock");
    let mut command = Command::new(tools::need("nbdkit")?);
    command.args(["--foreground", "--unix"]).arg(&socket).arg("file").arg(file);
    let mut program = Program::start("nbdkit", command, &dir.join("kit.log"))?;
    wait_for("nbdkit", STEP_MAX, || {
        program.expect_running()?;
        Ok(socket.exists().then_some(()))
    })?;
    Ok((program, socket))
}

#[test]
fn an_image_changed_in_rounds_is_sent_whole() -> Result<()> {
    let dir = Scratch::new()?;
    let bytes = 16 << 20;
    let mut image = ImageDisk::create(dir.path(), bytes, 9)?;
    let far = dir.path().join("far.img");
    let (_kit, socket) = nbdkit(dir.path(), &far, bytes)?;
    let mut client = Client::connect(&socket, "")?;
    image.send(&mut client)?;
    for round in 0..5 {
        image.change()?;
        let sent = image.send(&mut client)?;
        ensure!(sent > 0 && sent < bytes, "round {round} sent {sent} bytes");
        assert_eq!(compare::export_with_file(&mut client, image.path())?, None, "round {round}");
        assert_eq!(compare::file_with_file(&far, image.path())?, None, "round {round}");
        check_ext4(image.path(), false)?;
    }
    assert_eq!(image.send(&mut client)?, 0, "nothing has changed");
    dir.done()
}

#[test]
fn a_server_that_dies_is_sent_again_what_it_had_not_flushed() -> Result<()> {
    let dir = Scratch::new()?;
    let bytes = 16 << 20;
    let mut image = ImageDisk::create(dir.path(), bytes, 10)?;
    image.change()?;
    let far = dir.path().join("far.img");
    let (mut kit, socket) = nbdkit(dir.path(), &far, bytes)?;
    let mut client = Client::connect(&socket, "")?;
    kit.kill()?;
    ensure!(image.send(&mut client).is_err(), "a dead server took the blocks");
    fs::remove_file(&socket)?;
    let (_kit, socket) = nbdkit(dir.path(), &far, bytes)?;
    image.send(&mut Client::connect(&socket, "")?)?;
    assert_eq!(compare::file_with_file(&far, image.path())?, None);
    dir.done()
}

#[test]
fn a_frozen_disks_copy_is_whole_and_the_workload_goes_on() -> Result<()> {
    if let Err(why) = loop_disks_work() {
        skip(why);
        return Ok(());
    }
    let dir = Scratch::new()?;
    let mut disk = LoopDisk::create(&dir.path().join("disk.img"), 64 << 20)?;
    disk.make_ext4()?;
    disk.mount(&dir.path().join("mnt"))?;
    let mut workload = Workload::start(disk.mount_point().context("mounted")?, 3, Duration::ZERO);
    let copy = dir.path().join("copy.img");
    for _ in 0..2 {
        let goal = workload.steps() + 25;
        wait_for("the workload", STEP_MAX, || Ok((workload.steps() > goal).then_some(())))?;
        disk.freeze()?;
        copy_sparse(disk.backing(), &copy)?;
        disk.thaw()?;
        check_ext4(&copy, false)?;
        let (a, b) = counters(&copy)?;
        ensure!(a == b || a == b + 1, "A is {a}, B is {b}");
        workload.check()?;
    }
    workload.stop()?;
    disk.unmount()?;
    dir.done()
}
