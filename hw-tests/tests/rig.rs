//! The rig's own promises.

use anyhow::Result;
use hw_tests::guest::{Guest, Initramfs, Kernel};
use std::{path::PathBuf, time::Duration};

#[test]
fn a_guest_boots_runs_commands_and_answers_on_qmp() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let kernel =
        Kernel::debian("linux-image-amd64", &PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/guest"))?;
    let disk = dir.path().join("disk");
    std::fs::File::create(&disk)?.set_len(16 << 20)?;
    let drive = format!("file={},if=virtio,format=raw", disk.display());
    let mut guest = Guest::boot(&kernel, &Initramfs::new(&kernel)?, dir.path(), &["-drive", &drive])?;
    assert_eq!(guest.sh("uname -r", Duration::from_secs(30))?.trim(), kernel.version);
    guest.sh("printf mark | dd of=/dev/vda bs=4 seek=1 conv=fsync", Duration::from_secs(30))?;
    assert!(guest.sh("false", Duration::from_secs(30)).is_err());
    let status = guest.qmp.execute("query-status", serde_json::json!({}))?;
    assert_eq!(status["status"], "running");
    guest.power_off()?;
    assert_eq!(&std::fs::read(&disk)?[..8], b"\0\0\0\0mark");
    Ok(())
}
