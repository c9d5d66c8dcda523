//! Runs worlds by seed: `world [--ownership] --seed N [--count N] [--memory] [--trace]`. What `cargo xtask sim` calls.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut options = sim::Options::default();
    let (mut seed, mut count, mut trace, mut ownership) = (1u64, 1u64, false, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|text| text.parse().ok());
        match arg.as_str() {
            "--memory" => options.memory = true,
            "--trace" => trace = true,
            "--ownership" => ownership = true,
            "--seed" | "--count" => match number() {
                Some(value) if arg == "--seed" => seed = value,
                Some(value) => count = value,
                None => return usage(&format!("{arg} needs a number")),
            },
            other => return usage(&format!("{other:?} is not known")),
        }
    }
    let sink = || -> Option<sim::TraceSink> { if trace { Some(Box::new(|line| println!("{line}"))) } else { None } };
    let seeds = seed..seed.saturating_add(count);
    let mut failed = 0;
    let fields = if ownership {
        let mut total = sim::ownership::Summary::default();
        for seed in seeds {
            match sim::ownership::run_with(seed, sim::ownership::Options::default(), sink()) {
                Ok(summary) => total.add(&summary),
                Err(failure) => {
                    failed += 1;
                    eprintln!("seed {seed}: {failure}");
                }
            }
        }
        total.fields()
    } else {
        let mut total = sim::Summary::default();
        for seed in seeds {
            match sim::run_with(seed, options, sink()) {
                Ok(summary) => total.add(&summary),
                Err(failure) => {
                    failed += 1;
                    eprintln!("seed {seed}: {failure}");
                }
            }
        }
        total.fields()
    };
    for (name, value) in fields {
        println!("{value:>12}  {name}");
    }
    if failed == 0 {
        return ExitCode::SUCCESS;
    }
    eprintln!("{failed} of {count} worlds failed");
    ExitCode::FAILURE
}

fn usage(what: &str) -> ExitCode {
    eprintln!("{what}\nusage: world [--ownership] --seed N [--count N] [--memory] [--trace]");
    ExitCode::FAILURE
}
