//! Ten thousand worlds of ownership, in ten tests (`never_two_owners_in_seeds_…`) so that they share the machine's cores; and that they would find out what is wrong.

use sim::ownership::{Broken, Failure, FailureKind, Options, Summary, run, run_with};
use std::cell::RefCell;
use std::rc::Rc;

const WORLDS: u64 = 1000;

fn live_through(first: u64) {
    let mut total = Summary::default();
    let mut failures = Vec::new();
    for seed in first..first + WORLDS {
        match run(seed) {
            Ok(summary) => total.add(&summary),
            Err(failure) => failures.push(format!("seed {seed}: {failure}")),
        }
    }
    failures.truncate(10);
    assert!(failures.is_empty(), "of {WORLDS} worlds failed:\n{}", failures.join("\n"));
    // Worlds in which something never happens prove nothing about it.
    for (name, count) in total.fields() {
        assert!(count > 0, "no {name} in seeds {first} to {}", first + WORLDS - 1);
    }
    assert!(total.partitions_without_takeover >= WORLDS, "{total:?}");
    assert_eq!(total.deaths + total.isolations, WORLDS);
    // The others had an unsteady line before, which makes silence last longer.
    assert!(total.deaths_in_six_seconds * 100 >= WORLDS * 95, "{total:?}");
}

macro_rules! worlds {
    ($($name:ident $first:literal)*) => {
        $(#[test]
        fn $name() {
            live_through($first);
        })*
    };
}

worlds! {
    never_two_owners_in_seeds_1_to_1000 1
    never_two_owners_in_seeds_1001_to_2000 1001
    never_two_owners_in_seeds_2001_to_3000 2001
    never_two_owners_in_seeds_3001_to_4000 3001
    never_two_owners_in_seeds_4001_to_5000 4001
    never_two_owners_in_seeds_5001_to_6000 5001
    never_two_owners_in_seeds_6001_to_7000 6001
    never_two_owners_in_seeds_7001_to_8000 7001
    never_two_owners_in_seeds_8001_to_9000 8001
    never_two_owners_in_seeds_9001_to_10000 9001
}

#[test]
fn each_way_to_get_ownership_wrong_is_found_out() {
    for broken in Broken::ALL {
        let right = |failure: &Failure| match broken {
            Broken::OneChannelDecides | Broken::NoUplinkProof => {
                matches!(failure.kind, FailureKind::TakeoverWhile { .. } | FailureKind::FalseTakeover { .. })
            }
            _ => matches!(failure.kind, FailureKind::TwoServe { .. }),
        };
        let lives = |seed| run_with(seed, Options { broken: Some(broken) }, None);
        let found = (1..=500).find_map(|seed| lives(seed).err().filter(right));
        let failure = found.unwrap_or_else(|| panic!("{broken:?} passes 500 worlds"));
        assert!(failure.to_string().contains(&format!("cargo xtask sim --ownership --seed {} --trace", failure.seed)));
    }
}

#[test]
fn a_seed_of_ownership_repeats_everything() {
    for seed in [3, 17, 42] {
        let traced = || {
            let lines = Rc::new(RefCell::new(Vec::new()));
            let sink = Rc::clone(&lines);
            let trace = move |line: &str| sink.borrow_mut().push(line.to_owned());
            let summary = run_with(seed, Options::default(), Some(Box::new(trace)))
                .unwrap_or_else(|failure| panic!("seed {seed}: {failure}"));
            (lines.take(), summary)
        };
        let first = traced();
        assert!(first.0.len() > 50, "seed {seed}: {} lines are too few to compare", first.0.len());
        assert_eq!(first, traced(), "seed {seed}");
    }
}
