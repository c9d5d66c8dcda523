//! Branches: a group's disks as of a moment, written beside the group itself, through kills and beside a failing journal.

use crate::{
    ingest::{Change, History, change},
    support::{Control, Outside, Rng, assert_same},
};
const SIZE: u64 = 8 << 20;

fn export_of(made: &serde_json::Value) -> String {
    made["exports"][0]["export_name"].as_str().expect("an export").to_owned()
}

/// What a client of the export reads, whole.
fn image(control: &impl Control, export: &str) -> Vec<u8> {
    let mut client = control.ingest(export);
    let mut image = vec![0; SIZE as usize];
    for (i, part) in image.chunks_mut(1 << 20).enumerate() {
        client.read((i as u64) << 20, part).expect("reads");
    }
    image
}

/// A branch's own history begins at LSN 1 over what the trunk was.
struct Line {
    export: String,
    start: Vec<u8>,
    history: History,
}

impl Line {
    fn now(&self) -> Vec<u8> {
        self.at(self.history.lsn)
    }
    fn at(&self, lsn: u64) -> Vec<u8> {
        let mut image = self.start.clone();
        for (_, change) in self.history.changes.iter().take_while(|(at, _)| *at <= lsn) {
            match change {
                Change::Write(offset, data) => image[*offset as usize..][..data.len()].copy_from_slice(data),
                Change::Zero(offset, len) => image[*offset as usize..][..*len as usize].fill(0),
            }
        }
        image
    }
    fn grow(&mut self, control: &impl Control, rng: &mut Rng, changes: usize) {
        let mut client = control.ingest(&self.export);
        for _ in 0..changes {
            change(&mut client, rng, &mut self.history).expect("written");
        }
        client.flush().expect("durable");
    }
}

#[test]
fn branches_are_written_beside_their_group_through_kills_of_the_box() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Outside::start(dir.path());
    let mut rng = Rng::new(41);
    let made = running.make_group("vm", &[("root", SIZE)]);
    let mut trunk = Line { export: export_of(&made), start: vec![0; SIZE as usize], history: History::fresh() };
    trunk.grow(&running, &mut rng, 80);
    let past = trunk.history.changes[40].0;
    let ask = |name: &str, lsn: u64| format!("{{\"name\":\"{name}\",\"at\":{{\"lsn\":{lsn}}}}}");
    let made = running.ok("POST", "groups/vm/branches", &ask("drill 1", past));
    assert_eq!(
        (made["branch"]["group_name"].as_str(), made["branch"]["lsn"].as_u64()),
        (Some("vm"), Some(past)),
        "{made}"
    );
    let mut drill = Line { export: export_of(&made), start: trunk.at(past), history: History::fresh() };
    assert_same(&image(&running, &drill.export), &drill.now(), "a fresh branch");
    for round in 0..3 {
        drill.grow(&running, &mut rng, 40);
        trunk.grow(&running, &mut rng, 40);
        running.kill();
        running = Outside::start(dir.path());
        assert_same(&image(&running, &drill.export), &drill.now(), format!("the branch after kill {round}"));
        assert_same(&image(&running, &trunk.export), &trunk.now(), format!("the group after kill {round}"));
    }
    // Its own history opens like any.
    let middle = drill.history.changes[drill.history.changes.len() / 2].0;
    let view = running.view("drill%201", &format!("{{\"lsn\":{middle}}}"));
    assert_same(&view.volumes[0], &drill.at(middle), "a moment of the branch");
    running.close_view(&view);
    // A branch of the branch, and the rules of deleting.
    let made = running.ok("POST", "groups/drill%201/branches", &ask("deeper", middle));
    let mut deeper = Line { export: export_of(&made), start: drill.at(middle), history: History::fresh() };
    deeper.grow(&running, &mut rng, 30);
    assert_same(&image(&running, &deeper.export), &deeper.now(), "a branch of a branch");
    assert_eq!(running.get("groups/vm")["branches"], serde_json::json!(["drill 1"]));
    assert_eq!(running.refused("DELETE", "groups/vm?confirm=vm", ""), "has-branches");
    assert_eq!(running.refused("DELETE", "groups/drill%201?confirm=drill%201", ""), "has-branches");
    running.ok("DELETE", "groups/deeper?confirm=deeper", "");
    running.ok("DELETE", "groups/drill%201?confirm=drill%201", "");
    assert_eq!(running.get("groups/vm")["branches"], serde_json::json!([]));
    assert_same(&image(&running, &trunk.export), &trunk.now(), "the group at the end");
    assert_eq!(running.refused("POST", "groups/vm/branches", &ask("vm", past)), "name-taken");
    assert_eq!(running.refused("POST", "groups/vm/branches", &ask("late", 1 << 40)), "no-such-point");
    running.ok("DELETE", "groups/vm?confirm=vm", "");
    running.terminate();
}
