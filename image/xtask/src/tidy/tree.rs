//! Checks on the tree as a whole.

use super::Complaint;
use crate::repo::Repo;
use anyhow::{Result, bail};
use hw_tests::{process, tools};
use serde_json::Value;
use std::{process::Command, time::Duration};

/// What may be seen at the top; the rest hides behind a dot.
const TOP_LEVEL: &[&str] = &[
    "Cargo.toml",
    "Cargo.lock",
    "LICENSE",
    "README.md",
    "appliance",
    "image",
    "buildroot-config",
    "ui-templates",
    "agents",
    "hw-tests",
    // Made by builds, ignored by git.
    "target",
];

pub fn top_level(names: &[String]) -> Vec<Complaint> {
    let stray = names.iter().filter(|n| !n.starts_with('.') && !TOP_LEVEL.contains(&n.as_str()));
    stray.map(|n| Complaint::new("top-level", n, 1, "has no place at the top of the tree")).collect()
}

pub fn licence(text: &str, metadata: &Value) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    let head: String = text.split_whitespace().take(4).collect::<Vec<_>>().join(" ");
    if head != "Apache License Version 2.0," {
        complaints.push(Complaint::new("licence", "LICENSE", 1, "is not the Apache License, Version 2.0"));
    }
    for package in metadata["packages"].as_array().into_iter().flatten() {
        if package["license"] != "Apache-2.0" {
            let manifest = package["manifest_path"].as_str().unwrap_or("Cargo.toml");
            complaints.push(Complaint::new(
                "licence",
                manifest,
                1,
                format!("license is {}, not Apache-2.0", package["license"]),
            ));
        }
    }
    complaints
}

/// TLS by rustls with ring, and nothing beside it: two providers double what has to be watched for flaws.
pub fn one_tls_provider(used_by: impl Fn(&str) -> Result<String>) -> Result<Vec<Complaint>> {
    let mut complaints = Vec::new();
    for provider in ["aws-lc-rs", "aws-lc-sys", "openssl-sys", "native-tls"] {
        let users = used_by(provider)?;
        if !users.is_empty() {
            complaints.push(Complaint::new(
                "one-tls-provider",
                "Cargo.lock",
                1,
                format!("{provider} is built in:\n{users}"),
            ));
        }
    }
    Ok(complaints)
}

/// Who brings `package` into what we build; empty when nobody does.
pub fn used_by(repo: &Repo, package: &str) -> Result<String> {
    let asked = repo.ask_cargo(&["tree", "--workspace", "--locked", "--edges=normal,build", "--invert", package])?;
    if asked.status.success() {
        // "nothing to print" goes to stderr.
        return Ok(asked.stdout.trim().to_owned());
    }
    if asked.stderr.contains("did not match any packages") {
        return Ok(String::new());
    }
    bail!("cargo tree: {}", asked.stderr.trim());
}

pub fn is_shell(path: &str, text: &str) -> bool {
    let first = text.lines().next().unwrap_or("");
    let interpreter = first.strip_prefix("#!").and_then(|l| l.split(['/', ' ']).next_back()).unwrap_or("");
    path.ends_with(".sh") || ["sh", "bash", "dash"].contains(&interpreter)
}

pub fn shell(repo: &Repo, scripts: &[String]) -> Result<Vec<Complaint>> {
    if scripts.is_empty() {
        return Ok(Vec::new());
    }
    let Some(shellcheck) = tools::find("shellcheck") else {
        println!("SKIPPED: shellcheck is missing: {} scripts were not checked", scripts.len());
        return Ok(Vec::new());
    };
    let mut command = Command::new(shellcheck);
    command.args(["--format=gcc", "--severity=style"]).args(scripts).current_dir(&repo.root);
    let done = process::run(command, Duration::from_secs(120))?;
    if done.status.code().is_none_or(|code| code > 1) {
        bail!("{} failed: {}", done.what, done.stderr.trim());
    }
    Ok(done.stdout.lines().filter_map(shell_complaint).collect())
}

/// `file:line:column: level: text`
fn shell_complaint(line: &str) -> Option<Complaint> {
    let mut parts = line.splitn(4, ':');
    let (path, number, _, text) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    Some(Complaint::new("shell", path, number.parse().ok()?, text.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_stray_at_the_top_is_named() {
        let names = ["appliance", ".ci", "docs", "Cargo.toml"].map(String::from);
        let found = top_level(&names);
        assert_eq!(found.iter().map(|c| c.path.as_str()).collect::<Vec<_>>(), ["docs"]);
    }

    #[test]
    fn another_licence_is_named() {
        let apache =
            "                                 Apache License\n                           Version 2.0, January 2004\n";
        let of = |license: &str| json!({ "packages": [{ "license": license }] });
        assert_eq!(licence(apache, &of("Apache-2.0")), []);
        assert_eq!(licence("MIT License", &of("Apache-2.0")).len(), 1);
        assert_eq!(licence(apache, &of("MIT")).len(), 1);
        assert_eq!(licence(apache, &json!({ "packages": [{}] })).len(), 1);
    }

    #[test]
    fn a_second_tls_provider_is_named() {
        let found =
            one_tls_provider(|p| Ok(if p == "aws-lc-rs" { "rustls v0.23".into() } else { String::new() })).unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].text.contains("aws-lc-rs"));
        assert_eq!(one_tls_provider(|_| Ok(String::new())).unwrap(), []);
    }

    #[test]
    fn scripts_are_known_by_name_and_by_first_line() {
        assert!(is_shell("a.sh", "") && is_shell("a", "#!/usr/bin/env bash\n") && is_shell("a", "#!/bin/sh\n"));
        assert!(!is_shell("a", "#!/usr/bin/env python3\n") && !is_shell("a.rs", "//! Doc.\n"));
    }

    #[test]
    fn a_faulty_script_is_named() {
        if tools::find("shellcheck").is_none() {
            hw_tests::skip("shellcheck is missing");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("bad.sh"), "#!/bin/sh\nrm $1/file\n").unwrap();
        std::fs::write(dir.path().join("good.sh"), "#!/bin/sh\nrm \"$1/file\"\n").unwrap();
        let repo = Repo { root: dir.path().to_owned() };
        let found = shell(&repo, &["bad.sh".into(), "good.sh".into()]).unwrap();
        assert!(!found.is_empty() && found.iter().all(|c| c.path == "bad.sh" && c.line == 2), "{found:?}");
    }
}
