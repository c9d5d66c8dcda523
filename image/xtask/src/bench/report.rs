//! The table.

use super::{
    Results,
    fio::{Job, READS, WRITES},
    systems::{HOLDFAST, HOLDFAST_TLS, RAW},
};
use std::{fs, thread::available_parallelism};

/// Order of the rows.
const SYSTEMS: &[&str] = &[RAW, "qemu-nbd, raw", "qemu-nbd, qcow2", "nbdkit file", HOLDFAST, HOLDFAST_TLS];
/// What our random writes are held against: those that offer a disk over NBD, as we do.
const PEERS: &[&str] = &["qemu-nbd, raw", "qemu-nbd, qcow2", "nbdkit file"];

/// Percent of ten seconds in which somebody waited for a CPU, above which a machine is not idle.
const BUSY: f64 = 10.0;
/// Any moment is open within this, however long the history.
const OPEN_MS_GOAL: f64 = 100.0;

pub fn render(results: &Results, commit: &str, rounds: u32, busy: f64) -> String {
    let mut text = format!("# Measured\n\nBy `cargo xtask bench` at commit {commit}, on {}. ", machine());
    text += &if busy > BUSY {
        format!(
            "**Other work was waiting for the CPUs {busy:.0} % of the time when it began: compare within this run only.**\n\n"
        )
    } else {
        "The machine was otherwise idle.\n\n".to_owned()
    };
    if !results.failures.is_empty() {
        text += "**Not measured:**\n\n";
        for (what, why) in &results.failures {
            text += &format!("- {what}: {why}\n");
        }
        text += "\n";
    }
    let writes = table(results, WRITES);
    if !writes.is_empty() {
        text += &format!(
            "## Durable writes\n\nPer second, median of {rounds} interleaved rounds. Every writer has one write outstanding and goes on when \
             it and a flush after it have returned: the raw file by `O_DIRECT` and `fdatasync`, all others by an NBD write and an NBD flush. \
             In brackets the ratio to the raw file.\n\n{writes}\n"
        );
        text += &verdicts(results);
    }
    let reads = table(results, READS);
    if !reads.is_empty() {
        text += &format!("## Reading a view\n\nThe newest moment, after random overwrites.\n\n{reads}\n");
    }
    text += &histories(results);
    if !results.facts.is_empty() {
        text += "## Sizes and memory\n\n";
        for (what, value) in &results.facts {
            text += &format!("- {what}: {value}\n");
        }
    }
    text
}

fn table(results: &Results, jobs: &[Job]) -> String {
    let rows: Vec<&str> =
        SYSTEMS.iter().copied().filter(|s| jobs.iter().any(|j| rate(results, s, j).is_some())).collect();
    if rows.is_empty() {
        return String::new();
    }
    let mut text = format!(
        "| system |{}\n|---|{}\n",
        jobs.iter().map(|j| format!(" {} |", j.name)).collect::<String>(),
        "---:|".repeat(jobs.len())
    );
    for system in rows {
        let cells = jobs.iter().map(|job| match (rate(results, system, job), rate(results, RAW, job)) {
            (Some(rate), Some(raw)) => format!(" {rate:.0} ({:.2}) |", rate / raw),
            (Some(rate), None) => format!(" {rate:.0} |"),
            _ => " – |".to_owned(),
        });
        text += &format!("| {system} |{}\n", cells.collect::<String>());
    }
    text
}

/// Opening and restarting by the length of the history.
fn histories(results: &Results) -> String {
    const COLUMNS: [(&str, &str); 6] = [
        ("open_ms", "open, ms"),
        ("open_ms_max", "worst"),
        ("first_read_ms", "first read, ms"),
        ("first_read_ms_max", "worst"),
        ("restart_ms", "restart after a kill, ms"),
        ("index_bytes_per_record", "index bytes per record"),
    ];
    if results.histories.is_empty() {
        return String::new();
    }
    let heads: String = COLUMNS.iter().map(|(_, head)| format!(" {head} |")).collect();
    let mut text = format!(
        "## Long histories\n\nMoments drawn at random over the whole history; records of 512 bytes, so that ten million fit.\n\n\
         | records |{heads}\n|---:|{}\n",
        "---:|".repeat(COLUMNS.len())
    );
    for history in &results.histories {
        let cells: String = COLUMNS.iter().map(|(key, _)| format!(" {} |", history[*key])).collect();
        text += &format!("| {} |{cells}\n", history["records"]);
    }
    let slowest =
        results.histories.iter().filter_map(|h| Some(h["open_ms_max"].as_f64()? + h["first_read_ms_max"].as_f64()?));
    if let Some(slowest) = slowest.reduce(f64::max) {
        let met = if slowest <= OPEN_MS_GOAL { "met" } else { "**missed**" };
        text += &format!("\nSlowest open and first read: {slowest:.1} ms; goal {OPEN_MS_GOAL} ms {met}.\n");
    }
    text + "\n"
}

/// The two goals, and what came of them.
fn verdicts(results: &Results) -> String {
    let mut text = String::new();
    for ours in [HOLDFAST, HOLDFAST_TLS] {
        for job in WRITES {
            let Some(rate_ours) = rate(results, ours, job) else { continue };
            if job.pattern == "write" {
                let Some(raw) = rate(results, RAW, job) else { continue };
                text += &verdict(ours, job, rate_ours / raw, 0.9, "the raw file");
            } else if let Some(best) = PEERS.iter().filter_map(|p| rate(results, p, job)).reduce(f64::max) {
                text += &verdict(ours, job, rate_ours / best, 2.0, "the best peer");
            }
        }
    }
    text + "\n"
}

fn verdict(system: &str, job: &Job, ratio: f64, goal: f64, of: &str) -> String {
    let met = if ratio >= goal { "met" } else { "**missed**" };
    format!("- {system}, {}: {ratio:.2} × {of}; goal {goal} {met}\n", job.name)
}

fn rate(results: &Results, system: &str, job: &Job) -> Option<f64> {
    let mut values = results.rates.get(&(system.to_owned(), job.name.to_owned()))?.clone();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Percent of the last ten seconds in which somebody waited for a CPU; none known counts as idle.
pub fn busy() -> f64 {
    let text = fs::read_to_string("/proc/pressure/cpu").unwrap_or_default();
    let value = text.split("avg10=").nth(1).and_then(|rest| rest.split(' ').next());
    value.and_then(|v| v.parse().ok()).unwrap_or(0.0)
}

/// The class of machine, without its name.
fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = available_parallelism().map_or(0, |n| n.get());
    let memory: u64 =
        read("/proc/meminfo").lines().next().and_then(|l| l.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0);
    let kind = if read("/proc/cpuinfo").contains("hypervisor") { "a virtual machine" } else { "a machine" };
    let kernel = read("/proc/sys/kernel/osrelease");
    let kernel: Vec<&str> = kernel.trim().split('.').take(2).collect();
    format!("{kind} with {cpus} CPUs and {} GiB of memory, Linux {}", memory.div_ceil(1 << 20), kernel.join("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_medians_ratios_and_missed_goals() {
        let mut results = Results::default();
        let mut put = |system: &str, job: &Job, values: &[f64]| {
            results.rates.insert((system.to_owned(), job.name.to_owned()), values.to_vec());
        };
        put(RAW, &WRITES[0], &[100.0, 1000.0, 110.0]);
        put("nbdkit file", &WRITES[0], &[50.0]);
        put(HOLDFAST, &WRITES[0], &[90.0]);
        put(RAW, &WRITES[3], &[100.0]);
        put(HOLDFAST, &WRITES[3], &[95.0]);
        results.facts.push(("memory".into(), "64 MiB".into()));
        results.histories.push(serde_json::json!({"records": 10000, "open_ms_max": 0.5, "first_read_ms_max": 120.0}));
        results.failures.push(("nbdkit".into(), "it is not installed".into()));
        let text = render(&results, "abc", 3, 50.0);
        assert!(text.contains("- nbdkit: it is not installed"), "{text}");
        assert!(text.contains("50 % of the time"), "{text}");
        assert!(text.contains("| raw file | 110 (1.00) |"), "{text}");
        assert!(text.contains("1.80 × the best peer; goal 2 **missed**"), "{text}");
        assert!(text.contains("0.95 × the raw file; goal 0.9 met"), "{text}");
        assert!(text.contains("| 10000 |") && text.contains("120.5 ms; goal 100 ms **missed**"), "{text}");
        assert!(text.contains("- memory: 64 MiB"), "{text}");
    }
}
