//! Tables that promise: of faults and of parts. Each row names the tests that prove it, and all of them must exist.

use super::{Complaint, source::Source};
use std::collections::BTreeSet;

/// Their tables' last column is headed `tests` and holds names of tests in backticks.
pub const PAGES: [&str; 2] = ["appliance/docs/faults.md", "appliance/docs/parts.md"];
const CHECK: &str = "promises";
/// Heads the last column.
const TESTS: &str = "tests";

pub fn check(page: &str, table: &str, sources: &[Source]) -> Vec<Complaint> {
    let known: BTreeSet<&str> = sources.iter().flat_map(|s| tests(&s.text)).collect();
    let mut complaints = Vec::new();
    let (mut rows, mut columns) = (0, 0);
    let mut say = |line: usize, text: String| complaints.push(Complaint::new(CHECK, page, line, text));
    for (number, line) in (1..).zip(table.lines()) {
        let Some(row) = line.strip_prefix('|').and_then(|l| l.trim_end().strip_suffix('|')) else { continue };
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        if cells.last() == Some(&TESTS) {
            columns = cells.len();
            continue;
        }
        if cells.iter().all(|c| !c.is_empty() && c.chars().all(|c| "-:".contains(c))) {
            continue;
        }
        rows += 1;
        if cells.len() != columns || cells.iter().any(|c| c.is_empty()) {
            say(number, format!("{} cells, some perhaps empty: {columns} are expected", cells.len()));
            continue;
        }
        let named: Vec<&str> = cells[columns - 1].split('`').skip(1).step_by(2).collect();
        if named.is_empty() {
            say(number, format!("{:?} has no test", cells[0]));
        }
        for test in named.iter().filter(|t| !known.contains(**t)) {
            say(number, format!("there is no test `{test}`"));
        }
    }
    if rows == 0 {
        say(1, "the table is empty or gone".to_owned());
    }
    complaints
}

/// Names of the functions that stand below a `#[test]`.
fn tests(text: &str) -> impl Iterator<Item = &str> {
    text.split("#[test]").skip(1).filter_map(|after| {
        let name = after.split_once("fn ")?.1;
        name.split_once('(').map(|(name, _)| name.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> [Source; 1] {
        [Source::new("a/tests/b.rs", "//! Doc.\nfn helper() {}\n#[test]\nfn it_is_survived() -> Result<()> {\n}\n")]
    }

    #[test]
    fn a_test_that_does_not_exist_is_named() {
        let head = "# Faults\n\n| fault | what happens | what is said | tests |\n|---|---|---|---|\n";
        let check = |row: &str| check("f.md", &format!("{head}{row}\n"), &source());
        assert_eq!(check("| kill | nothing | \"x\" | `it_is_survived` |"), []);
        let found = check("| kill | nothing | \"x\" | `it_is_survived`, `helper` |");
        assert_eq!((found.len(), found[0].line), (1, 5));
        assert!(found[0].text.contains("`helper`"), "{}", found[0]);
        for bad in
            ["| kill | nothing | | `it_is_survived` |", "| kill | nothing | \"x\" | by hand |", "| kill | `it` |", ""]
        {
            assert_eq!(check(bad).len(), 1, "{bad:?}");
        }
    }
}
