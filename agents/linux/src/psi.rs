//! How hard the host is working: the kernel's pressure-stall information.

use replication::PressureInput;
use std::path::Path;

/// The three averages over 10 s, in percent: tasks stalled on memory and processor at all, and all tasks stalled on I/O (on a busy
/// database host some task always waits for a disk: that alone is no reason to hold back).
/// A kernel without PSI has zeroes: nothing is held back for a reason that is not known.
pub fn read(proc: &Path, input: &mut PressureInput) {
    let value = |file: &str, line: &str| {
        let text = std::fs::read_to_string(proc.join("pressure").join(file)).unwrap_or_default();
        parse(&text, line).unwrap_or(0)
    };
    input.psi_mem = value("memory", "some");
    input.psi_cpu = value("cpu", "some");
    input.psi_io = value("io", "full");
}

fn parse(text: &str, line: &str) -> Option<u8> {
    let fields = text.lines().find_map(|l| l.strip_prefix(line))?;
    let avg = fields.split_whitespace().find_map(|f| f.strip_prefix("avg10="))?;
    let percent: f64 = avg.parse().ok()?;
    Some(percent.clamp(0.0, 100.0).round() as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_text_is_read() {
        let text = "some avg10=12.51 avg60=1.00 avg300=0.00 total=5\nfull avg10=3.00 avg60=0.00 avg300=0.00 total=1\n";
        assert_eq!(parse(text, "some"), Some(13));
        assert_eq!(parse(text, "full"), Some(3));
        assert_eq!(parse("", "some"), None);
        assert_eq!(parse("some avg10=xx", "some"), None);
        assert_eq!(parse("some avg10=1e9", "some"), Some(100));
    }
}
