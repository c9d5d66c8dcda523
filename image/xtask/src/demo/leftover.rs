//! What a run that was killed hard left behind: its capture, mounts and loop devices over files in its folder.

use anyhow::Result;
use hw_tests::{process, product, tools};
use std::{fs, path::Path, time::Duration};

const TOOL_MAX: Duration = Duration::from_secs(30);

/// Takes the capture out of the kernel, unmounts and detaches everything that lies in `dir`.
pub fn take_down(dir: &Path) -> Result<()> {
    if !tools::is_root() {
        return Ok(());
    }
    product::unpin(&product::pin_dir(&dir.join("agent")))?;
    product::end_machines(&dir.join("b/data"));
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for at in mounts_in(dir, &mounts) {
        println!("taking down a mount of an earlier run: {at}");
        process::call("umount", &[&at], TOOL_MAX)?;
    }
    if tools::find("losetup").is_none() {
        return Ok(());
    }
    let listed =
        process::call("losetup", &["--list", "--noheadings", "--raw", "--output", "NAME,BACK-FILE"], TOOL_MAX)?;
    for device in loops_in(dir, &listed.stdout) {
        println!("taking down a loop device of an earlier run: {device}");
        process::call("losetup", &["--detach", &device], TOOL_MAX)?;
    }
    Ok(())
}

/// Mount points below `dir`, the deepest first. Spaces stand as `\040` in the kernel's list.
fn mounts_in(dir: &Path, mounts: &str) -> Vec<String> {
    let points = mounts.lines().filter_map(|l| l.split(' ').nth(1)).map(|p| p.replace("\\040", " "));
    let mut points: Vec<String> = points.filter(|p| Path::new(p).starts_with(dir)).collect();
    points.reverse();
    points
}

fn loops_in(dir: &Path, listed: &str) -> Vec<String> {
    let entries = listed.lines().filter_map(|l| l.split_once(' '));
    entries.filter(|(_, file)| Path::new(file).starts_with(dir)).map(|(device, _)| device.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_in_the_folder_is_taken_down() {
        let mounts = "/dev/a / ext4 rw 0 0\n/dev/loop0 /t/try/mnt ext4 rw 0 0\n/dev/b /t/try/mnt/sub ext4 rw 0 0\n/dev/c /t/try-other/mnt ext4 rw 0 0\n/dev/d /t/try/a\\040b ext4 rw 0 0\n";
        assert_eq!(mounts_in(Path::new("/t/try"), mounts), ["/t/try/a b", "/t/try/mnt/sub", "/t/try/mnt"]);
        let loops = "/dev/loop0 /t/try/disk.img\n/dev/loop1 /t/try-other/disk.img\n/dev/loop2 /t/try/d k.img\n";
        assert_eq!(loops_in(Path::new("/t/try"), loops), ["/dev/loop0", "/dev/loop2"]);
    }
}
