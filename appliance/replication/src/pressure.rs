//! How hard the agent may lean on its host: one pure function, so that it can be read, tested and shown.
//!
//! | pressure | copying | live writes |
//! |---|---|---|
//! | `None` | as fast as credits allow | sent |
//! | `Delay` | a pause after each read | sent |
//! | `SpillOnly` | stopped | sent; the spool belongs on disk, not in memory |
//! | `DirtyMapOnly` | stopped | only marked: the stream has a gap |
//!
//! None of these ever makes a write of the host wait.
//!
//! **A copy always ends.** A host whose disks or processors are always busy must become protected some day: what the host's own load asks
//! for while a copy is due is a pause, at most [`DELAY_MS_MAX`] after each read of up to 1 MiB, and never a stop. The stops come from our own
//! spool, which empties by itself once the box takes what is in it; the host's memory alone may still turn live writes into
//! marks when nothing is being copied.

/// The longest pause after a read: with reads of 1 MiB the copy goes on at 4 MiB/s at least.
pub const DELAY_MS_MAX: u64 = 250;

/// What is known of spool and host. The three `psi_*` are the kernel's pressure-stall averages over 10 s, in percent.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PressureInput {
    pub spool_used: u64,
    pub spool_max: u64,
    pub lag_ms: u64,
    pub psi_mem: u8,
    pub psi_io: u8,
    pub psi_cpu: u8,
    /// A gap is open: there is something to copy, and lag is the gap's age, which holding the copy back would only raise.
    pub copying: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub enum Pressure {
    #[default]
    None,
    Delay {
        ms: u64,
    },
    SpillOnly,
    DirtyMapOnly,
}

/// Which of the inputs asked for the most.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PressureCause {
    Spool { percent: u64 },
    Lag { ms: u64 },
    Memory { percent: u64 },
    Io { percent: u64 },
    Processor { percent: u64 },
}

impl std::fmt::Display for PressureCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Spool { percent } => write!(f, "the spool is {percent} % full"),
            Self::Lag { ms } => write!(f, "the box is {ms} ms behind"),
            Self::Memory { percent } => write!(f, "the host stalls on memory {percent} % of the time"),
            Self::Io { percent } => write!(f, "the host stalls on I/O {percent} % of the time"),
            Self::Processor { percent } => write!(f, "the host waits for processors {percent} % of the time"),
        }
    }
}

/// The worst of what each input asks for.
pub fn pressure(input: &PressureInput) -> Pressure {
    pressure_and_cause(input).0
}

/// The same, and what asked for it; no cause when nothing does.
pub fn pressure_and_cause(input: &PressureInput) -> (Pressure, Option<PressureCause>) {
    let used = if input.spool_max == 0 {
        // No spool at all is a full one.
        100
    } else {
        (u128::from(input.spool_used) * 100 / u128::from(input.spool_max)).min(100) as u64
    };
    let (mem, io, cpu) = (u64::from(input.psi_mem), u64::from(input.psi_io), u64::from(input.psi_cpu));
    // From the point where a resource begins to hurt: 10 ms more for each percent.
    let delay = |value: u64, from: u64| match value.checked_sub(from) {
        Some(over) => Pressure::Delay { ms: (10 * (over + 1)).min(DELAY_MS_MAX) },
        None => Pressure::None,
    };
    let spool = match used {
        95.. => Pressure::DirtyMapOnly,
        75.. => Pressure::SpillOnly,
        _ => delay(used, 50),
    };
    let memory = match mem {
        40.. if !input.copying => Pressure::DirtyMapOnly,
        20.. if !input.copying => Pressure::SpillOnly,
        _ => delay(mem, 10),
    };
    let lag = if input.lag_ms >= 10_000 && !input.copying {
        Pressure::Delay { ms: (input.lag_ms / 100).min(DELAY_MS_MAX) }
    } else {
        Pressure::None
    };
    let asked = [
        (spool, PressureCause::Spool { percent: used }),
        (memory, PressureCause::Memory { percent: mem }),
        (delay(io, 20), PressureCause::Io { percent: io }),
        (delay(cpu, 50), PressureCause::Processor { percent: cpu }),
        (lag, PressureCause::Lag { ms: input.lag_ms }),
    ];
    asked.into_iter().fold(
        (Pressure::None, None),
        |worst, (pressure, cause)| {
            if pressure > worst.0 { (pressure, Some(cause)) } else { worst }
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn the_table() {
        use Pressure::{Delay, DirtyMapOnly, None, SpillOnly};
        //  used  lag     mem io  cpu, while something is copied and while not
        let table: [(u64, u64, u8, u8, u8, Pressure, Pressure); 20] = [
            (0, 0, 0, 0, 0, None, None),
            (49, 9_999, 9, 19, 49, None, None),
            (50, 0, 0, 0, 0, Delay { ms: 10 }, Delay { ms: 10 }),
            (70, 0, 0, 0, 0, Delay { ms: 210 }, Delay { ms: 210 }),
            (74, 0, 0, 0, 0, Delay { ms: 250 }, Delay { ms: 250 }),
            (75, 0, 0, 0, 0, SpillOnly, SpillOnly),
            (94, 0, 0, 0, 0, SpillOnly, SpillOnly),
            (95, 0, 0, 0, 0, DirtyMapOnly, DirtyMapOnly),
            (100, 0, 0, 0, 0, DirtyMapOnly, DirtyMapOnly),
            (0, 10_000, 0, 0, 0, None, Delay { ms: 100 }),
            (0, u64::MAX, 0, 0, 0, None, Delay { ms: 250 }),
            (0, 0, 10, 0, 0, Delay { ms: 10 }, Delay { ms: 10 }),
            (0, 0, 19, 0, 0, Delay { ms: 100 }, Delay { ms: 100 }),
            (0, 0, 20, 0, 0, Delay { ms: 110 }, SpillOnly),
            (0, 0, 40, 0, 0, Delay { ms: 250 }, DirtyMapOnly),
            (0, 0, 0, 20, 0, Delay { ms: 10 }, Delay { ms: 10 }),
            (0, 0, 0, 59, 0, Delay { ms: 250 }, Delay { ms: 250 }),
            (0, 0, 0, 100, 100, Delay { ms: 250 }, Delay { ms: 250 }),
            (0, 0, 0, 0, 60, Delay { ms: 110 }, Delay { ms: 110 }),
            (60, 0, 12, 0, 55, Delay { ms: 110 }, Delay { ms: 110 }),
        ];
        for (spool_used, lag_ms, psi_mem, psi_io, psi_cpu, copying_want, want) in table {
            for (copying, want) in [(true, copying_want), (false, want)] {
                let input = PressureInput { spool_used, spool_max: 100, lag_ms, psi_mem, psi_io, psi_cpu, copying };
                let (got, cause) = pressure_and_cause(&input);
                assert_eq!(got, want, "{input:?}");
                assert_eq!(cause.is_none(), got == None, "{input:?}: {cause:?}");
            }
        }
        assert_eq!(pressure(&PressureInput::default()), DirtyMapOnly, "no spool");
        let huge = PressureInput { spool_used: u64::MAX, spool_max: u64::MAX, ..PressureInput::default() };
        assert_eq!(pressure(&huge), DirtyMapOnly);
    }

    #[test]
    fn the_hosts_own_load_never_stops_a_copy() {
        for (psi_mem, psi_io, psi_cpu) in [(100, 0, 0), (0, 100, 0), (0, 0, 100), (100, 100, 100)] {
            let lag_ms = u64::MAX;
            let input = PressureInput { spool_max: 1, lag_ms, psi_mem, psi_io, psi_cpu, copying: true, spool_used: 0 };
            assert_eq!(pressure(&input), Pressure::Delay { ms: DELAY_MS_MAX }, "{input:?}");
        }
        let input = PressureInput { spool_max: 1, psi_io: 80, copying: true, ..PressureInput::default() };
        let (_, cause) = pressure_and_cause(&input);
        assert_eq!(cause.unwrap().to_string(), "the host stalls on I/O 80 % of the time");
    }

    #[test]
    fn more_of_anything_never_lowers_it() {
        for seed in 1..5000 {
            let mut rng = Rng::new(seed);
            let a = PressureInput {
                spool_used: rng.below(120),
                spool_max: 100,
                lag_ms: rng.below(200_000),
                psi_mem: rng.below(101) as u8,
                psi_io: rng.below(101) as u8,
                psi_cpu: rng.below(101) as u8,
                copying: rng.below(2) == 0,
            };
            let mut b = a;
            match rng.below(5) {
                0 => b.spool_used += rng.below(50),
                1 => b.lag_ms += rng.below(50_000),
                2 => b.psi_mem += rng.below(50) as u8,
                3 => b.psi_io += rng.below(50) as u8,
                _ => b.psi_cpu += rng.below(50) as u8,
            }
            assert!(pressure(&a) <= pressure(&b), "seed {seed}: {a:?} {b:?}");
        }
    }
}
