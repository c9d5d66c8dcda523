//! The index deleted or damaged, a segment damaged: the first costs nothing, the second stops its group and no other.

use crate::{
    ingest::{History, change},
    support::{Control, Inside, Outside, Rng, assert_same, wait_for},
};
use nbd::client::{Client, ClientError};
use std::{
    fs,
    path::{Path, PathBuf},
};
use supervisor::Event;

const SIZE: u64 = 8 << 20;

/// A box with two groups and some history in both, stopped in good order. Returns the folders of `a` and `b`.
fn prepare(data: &Path) -> ([PathBuf; 2], [History; 2]) {
    let inside = Inside::start(data, "");
    let mut histories = [History::fresh(), History::fresh()];
    let mut dirs = Vec::new();
    for (name, history) in ["a", "b"].iter().zip(&mut histories) {
        let made = inside.make_group(name, &[("v", SIZE)]);
        dirs.push(data.join("groups").join(made["id"].as_str().unwrap()));
        let mut client = inside.ingest(&format!("{name}-v"));
        let mut rng = Rng::new(5);
        // Enough for several segments of 4 MiB.
        while history.changes.len() < 1500 {
            change(&mut client, &mut rng, history).unwrap();
        }
        client.flush().unwrap();
    }
    wait_for("an index", || (inside.group_state("a")["index_bytes"].as_u64()? > 0).then_some(()));
    inside.stop();
    ([dirs[0].clone(), dirs[1].clone()], histories)
}

fn check_group(inside: &Inside, name: &str, history: &History) {
    wait_for("the group", || (inside.group_state(name)["state"] == "ingest").then_some(()));
    for part in [4, 2, 1] {
        let (lsn, _) = history.changes[history.changes.len() / part - 1];
        let view = inside.view(name, &format!("{{\"lsn\":{lsn}}}"));
        assert_same(&view.volumes[0], &history.image_at(lsn, SIZE), (name, lsn));
        inside.close_view(&view);
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { todo.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}

#[test]
fn the_index_may_be_deleted_or_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let ([a, b], [history_a, history_b]) = prepare(&data);
    assert!(!files(&a.join("index")).is_empty(), "there is an index to delete");
    fs::remove_dir_all(a.join("index")).unwrap();
    for (i, file) in files(&b.join("index")).iter().enumerate() {
        let mut bytes = fs::read(file).unwrap();
        match i % 3 {
            0 => bytes.iter_mut().skip(i).step_by(97).for_each(|b| *b ^= 0x40),
            1 => bytes.truncate(bytes.len() / 2),
            _ => bytes.fill(0xAA),
        }
        fs::write(file, bytes).unwrap();
    }
    let inside = Inside::start(&data, "");
    check_group(&inside, "a", &history_a);
    check_group(&inside, "b", &history_b);
    // And it is built again.
    for group in ["a", "b"] {
        wait_for("the index", || {
            let state = inside.group_state(group);
            (state["index_bytes"].as_u64()? > 0 && state["retention"]["index_behind"] == false).then_some(())
        });
    }
    check_group(&inside, "a", &history_a);
}

#[test]
fn a_damaged_segment_stops_its_group_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let ([a, _], [_, history_b]) = prepare(&data);
    // In the middle of the segment that was open last: read record by record at the next start.
    let segment = files(&a.join("seg")).into_iter().rfind(|f| f.extension().is_some_and(|e| e == "seg")).unwrap();
    let mut bytes = fs::read(&segment).unwrap();
    // The trailer: without it a sealed segment cannot be used.
    let at = bytes.len() - 100;
    bytes[at..].iter_mut().for_each(|b| *b ^= 0x11);
    fs::write(&segment, &bytes).unwrap();

    let inside = Inside::start(&data, "");
    let stopped = wait_for("the group to stop", || {
        let state = inside.group_state("a");
        (state["state"] == "stopped").then_some(state)
    });
    let reason = stopped["reason"].as_str().unwrap();
    assert!(reason.contains(segment.file_name().unwrap().to_str().unwrap()) && reason.contains("0x"), "{reason}");
    assert_eq!(stopped["risks"][0]["kind"], "corrupt", "{stopped}");
    assert_eq!(inside.refused("POST", "groups/a/views", r#"{"at":"latest"}"#), "group-stopped");
    assert_eq!(inside.refused("POST", "groups/a/bookmarks", r#"{"name":"x"}"#), "group-stopped");
    assert!(inside.events(Event::GroupStopped) >= 1);
    check_group(&inside, "b", &history_b);
    let mut client = inside.ingest("b-v");
    client.write(0, &[7; 512], true).unwrap();
    // A stopped group can still be deleted.
    inside.ok("DELETE", "groups/a?confirm=a", "");
    assert!(!a.exists());
}

#[test]
fn damage_met_by_a_read_is_named_and_nothing_else_suffers() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let ([a, _], [history, _]) = prepare(&data);
    let segment = files(&a.join("seg")).into_iter().find(|f| f.extension().is_some_and(|e| e == "seg")).unwrap();
    let mut bytes = fs::read(&segment).unwrap();
    // Payload bytes of an old, sealed segment: its index is whole, so it opens; a read that needs them must notice.
    let middle = bytes.len() / 3;
    bytes[middle..middle + 4096].iter_mut().for_each(|b| *b ^= 0x11);
    fs::write(&segment, &bytes).unwrap();
    let inside = Inside::start(&data, "");
    wait_for("the group", || (inside.group_state("a")["state"] == "ingest").then_some(()));
    let (_, lines) = inside.call("POST", "groups/a/verify", "");
    let report: serde_json::Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!(report["report"]["clean"], false, "{report}");
    let named = report["report"]["damage"][0].as_str().unwrap();
    assert!(named.contains(segment.file_name().unwrap().to_str().unwrap()), "{named}");
    // Moments of that time: every block is what it was, or an error; never anything else.
    let mut failed = 0;
    for (lsn, _) in history.changes[..400].iter().step_by(20) {
        let opened = inside.ok("POST", "groups/a/views", &format!("{{\"at\":{{\"lsn\":{lsn}}}}}"));
        let pieces = read_around_damage(&opened["exports"][0], &history.image_at(*lsn, SIZE));
        assert!(pieces <= 20, "LSN {lsn}: {pieces} pieces could not be read: more than lay in the damaged bytes");
        failed += pieces;
        inside.ok("DELETE", &format!("views/{}", opened["id"].as_str().unwrap()), "");
    }
    assert!(failed > 0, "no moment needed the damaged bytes: nothing was tried");
    // Said for as long as it is so, with file and place.
    let state = inside.group_state("a");
    let risk = state["risks"].as_array().unwrap().iter().find(|r| r["kind"] == "damaged").cloned();
    let what = risk.unwrap_or_else(|| panic!("{state}"))["what"].as_str().unwrap().to_owned();
    assert!(what.contains(segment.file_name().unwrap().to_str().unwrap()) && what.contains("0x"), "{what}");
    // What does not need the damaged bytes goes on.
    let mut client = inside.ingest("a-v");
    let data = vec![9; SIZE as usize];
    client.write(0, &data, true).unwrap();
    let view = inside.view("a", "\"latest\"");
    assert!(view.lsn > history.lsn);
    assert_same(&view.volumes[0], &data, "written over");
}

/// Reads an export in pieces of 64 KiB, and those that fail in pieces of a sector: each must be as in `want`, or an error that names
/// a segment. Returns how many pieces of 64 KiB failed.
fn read_around_damage(export: &serde_json::Value, want: &[u8]) -> usize {
    let socket = export["unix_socket"].as_str().unwrap();
    let stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    let mut client = Client::connect(stream, export["export_name"].as_str().unwrap()).unwrap();
    let mut failed = 0;
    for (piece, want) in (0..).zip(want.chunks(64 << 10)) {
        let at = piece * (64 << 10);
        let mut got = vec![0; want.len()];
        match client.read(at, &mut got) {
            Ok(()) => assert_same(&got, want, ("piece at", at)),
            Err(ClientError::Remote(e)) => {
                assert!(e.text.contains(".seg") && e.text.contains("0x"), "{e}");
                failed += 1;
                for (sector, want) in (0..).zip(want.chunks(512)) {
                    let mut got = [0; 512];
                    match client.read(at + sector * 512, &mut got) {
                        Ok(()) => assert_same(&got, want, ("sector at", at + sector * 512)),
                        Err(ClientError::Remote(_)) => {}
                        Err(e) => panic!("{e}"),
                    }
                }
            }
            Err(e) => panic!("{e}"),
        }
    }
    client.disconnect().unwrap();
    failed
}

#[test]
fn damage_below_what_was_acknowledged_stops_the_group_and_cuts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let outside = Outside::start(&data);
    let mut histories = [History::fresh(), History::fresh()];
    let mut rng = Rng::new(31);
    let mut folder = PathBuf::new();
    for (name, history) in ["a", "b"].iter().zip(&mut histories) {
        let made = outside.make_group(name, &[("v", SIZE)]);
        if *name == "a" {
            folder = data.join("groups").join(made["id"].as_str().unwrap());
        }
        let mut client = outside.ingest(&format!("{name}-v"));
        for _ in 0..60 {
            change(&mut client, &mut rng, history).unwrap();
        }
        client.flush().unwrap();
        // Batches carry how far everything is durable: one more, so that all of the above is claimed.
        change(&mut client, &mut rng, history).unwrap();
        client.flush().unwrap();
    }
    outside.kill();
    let open = files(&folder.join("seg")).into_iter().find(|f| f.extension().is_some_and(|e| e == "open")).unwrap();
    let whole = fs::read(&open).unwrap();
    // In the first batch after the header: acknowledged long ago, and not a torn tail.
    let mut bytes = whole.clone();
    bytes[4096 + 80] ^= 0x20;
    fs::write(&open, &bytes).unwrap();

    let inside = Inside::start(&data, "");
    let stopped = wait_for("the group to stop", || {
        let state = inside.group_state("a");
        (state["state"] == "stopped").then_some(state)
    });
    let reason = stopped["reason"].as_str().unwrap();
    assert!(reason.contains(open.file_name().unwrap().to_str().unwrap()) && reason.contains("0x"), "{reason}");
    check_group(&inside, "b", &histories[1]);
    inside.stop();
    assert!(fs::read(&open).unwrap() == bytes, "a refused segment was changed");
    // The administrator's repair, from a copy: everything is there again.
    fs::write(&open, &whole).unwrap();
    let inside = Inside::start(&data, "");
    check_group(&inside, "a", &histories[0]);
    let view = inside.view("a", "\"latest\"");
    assert_same(&view.volumes[0], &histories[0].image_at(u64::MAX, SIZE), "after the repair");
}
