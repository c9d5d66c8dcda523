//! `cargo xtask tidy`: the rules of the house that no compiler checks.
//!
//! Each check is a pure function from facts to complaints, with a test that feeds it a violation and expects the
//! complaint by name. Facts come from `cargo metadata`, git's list of files, and [`source`], which knows code from
//! comments and strings.
//!
//! | check | rule |
//! |---|---|
//! | `dependency-law` | who may use whom; engine crates use no runtime, clock or socket |
//! | `one-list` | versions stand in the root manifest only |
//! | `top-level` | the visible top level is fixed |
//! | `licence` | Apache-2.0, in the file and in every manifest |
//! | `one-tls-provider` | ring only |
//! | `module-doc` | every source file says what it is |
//! | `bare-matches` | `matches!(..);` tests nothing |
//! | `unfinished` | no `dbg!`, `todo!`, or notes to self |
//! | `words` | one word, one meaning, in identifiers |
//! | `unsafe` | every `unsafe` says why it is sound |
//! | `engine` | engine crates take time as an argument and start no threads |
//! | `function-length` | a ceiling that only comes down |
//! | `promises` | every test that the tables of faults and parts name exists |
//! | `private-path` | no path of somebody's machine |
//! | `shell` | shellcheck has nothing to say |

mod law;
mod length;
mod promises;
mod source;
mod text;
mod tree;

use crate::repo::Repo;
use anyhow::{Result, bail};
use source::Source;
use std::{fmt, fs, path::Path};

/// One broken rule.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Complaint {
    pub path: String,
    pub line: usize,
    pub check: &'static str,
    pub text: String,
}

impl Complaint {
    fn new(check: &'static str, path: &str, line: usize, text: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, check, text: text.into() }
    }
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {} [{}]", self.path, self.line, self.text, self.check)
    }
}

pub fn run(repo: &Repo) -> Result<()> {
    let complaints = check(repo)?;
    complaints.iter().for_each(|c| println!("{c}"));
    if complaints.is_empty() {
        return Ok(());
    }
    bail!("tidy: {} complaints", complaints.len());
}

fn check(repo: &Repo) -> Result<Vec<Complaint>> {
    let files = repo.files()?;
    let mut complaints = Vec::new();
    let (mut sources, mut scripts) = (Vec::new(), Vec::new());
    for file in &files {
        let name = file.to_string_lossy().into_owned();
        // What is not text has no lines to check.
        let Ok(text) = fs::read_to_string(repo.root.join(file)) else { continue };
        complaints.extend(text::private_paths(&name, &text));
        if name.ends_with("Cargo.toml") && name != "Cargo.toml" {
            complaints.extend(law::one_list(&name, &text));
        }
        if tree::is_shell(&name, &text) {
            scripts.push(name.clone());
        }
        if name.ends_with(".rs") {
            sources.push(Source::new(&name, &text));
        }
    }
    for source in &sources {
        complaints.extend(text::all(source));
    }
    let kept = fs::read_to_string(repo.root.join(length::LIST)).unwrap_or_default();
    complaints.extend(length::check(&sources, &kept));
    for page in promises::PAGES {
        let table = fs::read_to_string(repo.root.join(page)).unwrap_or_default();
        complaints.extend(promises::check(page, &table, &sources));
    }
    let metadata = repo.metadata()?;
    complaints.extend(law::check(&metadata)?);
    complaints.extend(tree::top_level(&top_level_names(&repo.root)?));
    complaints.extend(tree::licence(&fs::read_to_string(repo.root.join("LICENSE")).unwrap_or_default(), &metadata));
    complaints.extend(tree::one_tls_provider(|package| tree::used_by(repo, package))?);
    complaints.extend(tree::shell(repo, &scripts)?);
    complaints.sort();
    complaints.dedup();
    Ok(complaints)
}

fn top_level_names(root: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(root)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
