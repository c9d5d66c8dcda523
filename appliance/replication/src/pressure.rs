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

/// What is known of spool and host. The three `psi_*` are the kernel's pressure-stall averages over 10 s, in percent.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PressureInput {
    pub spool_used: u64,
    pub spool_max: u64,
    pub lag_ms: u64,
    pub psi_mem: u8,
    pub psi_io: u8,
    pub psi_cpu: u8,
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

/// The worst of what each input asks for.
pub fn pressure(input: &PressureInput) -> Pressure {
    let used = if input.spool_max == 0 {
        // No spool at all is a full one.
        100
    } else {
        (u128::from(input.spool_used) * 100 / u128::from(input.spool_max)).min(100) as u64
    };
    let (mem, io, cpu) = (u64::from(input.psi_mem), u64::from(input.psi_io), u64::from(input.psi_cpu));
    if used >= 95 || mem >= 40 {
        return Pressure::DirtyMapOnly;
    }
    if used >= 75 || mem >= 20 || io >= 60 {
        return Pressure::SpillOnly;
    }
    // From the point where a resource begins to hurt: 10 ms more for each percent, at most a second in all.
    let over = |value: u64, from: u64| if value >= from { 10 * (value - from + 1) } else { 0 };
    let late = if input.lag_ms >= 10_000 { (input.lag_ms / 100).min(1000) } else { 0 };
    let ms = over(used, 50).max(over(mem, 10)).max(over(io, 20)).max(over(cpu, 50)).max(late).min(1000);
    if ms > 0 { Pressure::Delay { ms } } else { Pressure::None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn the_table() {
        use Pressure::{Delay, DirtyMapOnly, None, SpillOnly};
        //  used  lag     mem io  cpu
        let table: [(u64, u64, u8, u8, u8, Pressure); 20] = [
            (0, 0, 0, 0, 0, None),
            (49, 9_999, 9, 19, 49, None),
            (50, 0, 0, 0, 0, Delay { ms: 10 }),
            (74, 0, 0, 0, 0, Delay { ms: 250 }),
            (75, 0, 0, 0, 0, SpillOnly),
            (94, 0, 0, 0, 0, SpillOnly),
            (95, 0, 0, 0, 0, DirtyMapOnly),
            (100, 0, 0, 0, 0, DirtyMapOnly),
            (0, 10_000, 0, 0, 0, Delay { ms: 100 }),
            (0, u64::MAX, 0, 0, 0, Delay { ms: 1000 }),
            (0, 0, 10, 0, 0, Delay { ms: 10 }),
            (0, 0, 19, 0, 0, Delay { ms: 100 }),
            (0, 0, 20, 0, 0, SpillOnly),
            (0, 0, 40, 0, 0, DirtyMapOnly),
            (0, 0, 0, 20, 0, Delay { ms: 10 }),
            (0, 0, 0, 59, 0, Delay { ms: 400 }),
            (0, 0, 0, 60, 0, SpillOnly),
            (0, 0, 0, 100, 100, SpillOnly),
            (0, 0, 0, 0, 100, Delay { ms: 510 }),
            (60, 0, 12, 0, 90, Delay { ms: 410 }),
        ];
        for (spool_used, lag_ms, psi_mem, psi_io, psi_cpu, want) in table {
            let input = PressureInput { spool_used, spool_max: 100, lag_ms, psi_mem, psi_io, psi_cpu };
            assert_eq!(pressure(&input), want, "{input:?}");
        }
        assert_eq!(pressure(&PressureInput::default()), DirtyMapOnly, "no spool");
        let huge = PressureInput { spool_used: u64::MAX, spool_max: u64::MAX, ..PressureInput::default() };
        assert_eq!(pressure(&huge), DirtyMapOnly);
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
