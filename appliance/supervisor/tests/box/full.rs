//! The journal's disk is full: history is kept, new writes are refused by name, and room brings them back.

use crate::support::{Control, Inside, Rng, assert_same, wait_for};
use nbd::{Errno, client::ClientError};
use std::path::Path;
use supervisor::Event;

const SIZE: u64 = 16 << 20;

/// A small file system of its own, gone with the test.
struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    fn mount(at: &'a Path, mib: u64) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let options = format!("size={mib}m");
        match nix::mount::mount(Some("tmpfs"), at, Some("tmpfs"), nix::mount::MsFlags::empty(), Some(options.as_str()))
        {
            Ok(()) => Some(Self(at)),
            Err(e) => {
                println!("SKIPPED: a small file system cannot be mounted ({e}); run as root");
                None
            }
        }
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_refuses_writes_and_keeps_what_was_taken() {
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().join("m");
    let Some(_tmpfs) = Tmpfs::mount(&mount, 120) else { return };
    let data = mount.join("d");
    let inside = Inside::start(&data, "");
    inside.make_group("g", &[("v", SIZE)]);
    let mut client = inside.ingest("g-v");
    let mut image = vec![0; SIZE as usize];
    let mut rng = Rng::new(1);
    let mut buf = vec![0; 256 << 10];
    let slots = SIZE / buf.len() as u64;
    let error = loop {
        let at = rng.below(slots) * buf.len() as u64;
        rng.fill(&mut buf);
        match client.write(at, &buf, false) {
            Ok(()) => image[at as usize..][..buf.len()].copy_from_slice(&buf),
            Err(ClientError::Remote(e)) => {
                // A refused write may be there in part.
                image[at as usize..][..buf.len()].fill(0);
                break (at, e);
            }
            Err(e) => panic!("{e}"),
        }
    };
    let (hole, error) = error;
    assert_eq!(error.errno, Errno::NoSpace, "{error}");
    assert!(error.text.contains("full"), "{error}");
    // What was acknowledged is flushed, and all of it can be read.
    client.flush().unwrap();
    let check = |client: &mut nbd::client::Client<_>, image: &[u8]| {
        let mut read = vec![0; SIZE as usize];
        client.read(0, &mut read).unwrap();
        read[hole as usize..][..buf.len()].fill(0);
        assert_same(&read, image, "what was taken before the disk was full");
    };
    check(&mut client, &image);
    // The alarm.
    let state = inside.group_state("g");
    assert!(state["risks"].as_array().unwrap().iter().any(|r| r["kind"] == "journal-full"), "{state}");
    assert!(inside.metrics(&data).contains("holdfast_group_journal_full{group=\"g\"} 1\n"));
    assert!(inside.events(Event::JournalFull) >= 1);
    // Old moments stay open.
    let view = inside.view("g", "{\"lsn\":1}");
    assert_same(&view.volumes[0], &vec![0; SIZE as usize], "the first moment");
    inside.close_view(&view);
    // The window may be shortened to nothing: then there is room again, and writes are taken.
    let mut policy = state["policy"].clone();
    policy["window_hours_floor"] = 0.into();
    inside.ok("PATCH", "groups/g/policy", &policy.to_string());
    wait_for("room", || client.write(hole, &buf, true).ok());
    image[hole as usize..][..buf.len()].fill(0);
    wait_for("the alarm to end", || {
        let state = inside.group_state("g");
        (!state["risks"].as_array().unwrap().iter().any(|r| r["kind"] == "journal-full")).then_some(())
    });
    check(&mut client, &image);
    inside.stop();
    let inside = Inside::start(&data, "");
    let mut client = inside.ingest("g-v");
    check(&mut client, &image);
}
