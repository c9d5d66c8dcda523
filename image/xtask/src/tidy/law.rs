//! Who may use whom.

use super::{Complaint, text::ENGINE};
use anyhow::{Context, Result};
use serde_json::Value;

/// The product crates and what of ours each may use besides `model`. A crate without a row is refused: give it one first.
const LAW: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("durable", &[]),
    ("wire", &[]),
    ("nbd", &[]),
    ("web", &[]),
    ("panel", &[]),
    ("journal", &["durable"]),
    ("archive", &["durable"]),
    ("shelf", &["durable"]),
    ("update", &["durable"]),
    ("replication", &["wire"]),
    ("pair", &["durable", "wire"]),
    ("takeover", &["journal", "nbd", "wire"]),
    ("agent-linux", &["durable", "wire", "nbd", "replication"]),
    ("ctl", &["durable", "journal", "nbd"]),
    ("sim", &["durable", "wire", "journal", "replication", "pair", "takeover", "update"]),
    (
        "supervisor",
        &[
            "durable",
            "wire",
            "nbd",
            "journal",
            "archive",
            "replication",
            "pair",
            "takeover",
            "shelf",
            "panel",
            "update",
            "web",
        ],
    ),
    // The rig starts programs and links none of the product.
    ("hw-tests", &[]),
    ("xtask", &["hw-tests"]),
];

/// Not product: may not even use `model`.
const OUTSIDE: &[&str] = &["hw-tests", "xtask"];

/// What would bring a runtime, a clock or a socket into an engine crate.
const FOREIGN_TO_ENGINE: &[&str] =
    &["tokio", "tokio-rustls", "rustls", "hyper", "hyper-util", "mio", "socket2", "jiff", "time", "chrono", "reqwest"];

/// `metadata` is what `cargo metadata --no-deps` prints.
pub fn check(metadata: &Value) -> Result<Vec<Complaint>> {
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let name_of = |p: &Value| p["name"].as_str().unwrap_or("").to_owned();
    let ours: Vec<String> = packages.iter().map(name_of).collect();
    let mut complaints = Vec::new();
    for package in packages {
        let name = name_of(package);
        let manifest = package["manifest_path"].as_str().unwrap_or("Cargo.toml");
        let mut say = |text: String| complaints.push(Complaint::new("dependency-law", manifest, 1, text));
        let Some((_, allowed)) = LAW.iter().find(|(row, _)| *row == name) else {
            say(format!("crate {name} has no row in the dependency law"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let used = name_of(dependency);
            let model = used == "model" && !OUTSIDE.contains(&name.as_str());
            if ours.contains(&used) && !model && !allowed.contains(&used.as_str()) {
                say(format!("{name} may not use {used}"));
            }
            let shipped = dependency["kind"].is_null();
            if ENGINE.contains(&name.as_str()) && shipped && FOREIGN_TO_ENGINE.contains(&used.as_str()) {
                say(format!("engine crate {name} may not use {used}"));
            }
        }
    }
    Ok(complaints)
}

/// A member's manifest takes every version from the root's list.
pub fn one_list(path: &str, manifest: &str) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    let mut in_dependencies = false;
    for (number, line) in manifest.lines().enumerate() {
        let line = line.trim();
        if line.starts_with('[') {
            in_dependencies = line.trim_matches(['[', ']']).ends_with("dependencies");
            continue;
        }
        let free = line.is_empty() || line.starts_with('#');
        let listed = line.contains("workspace = true") || line.contains("path = ");
        if in_dependencies && !free && line.contains('=') && !listed {
            complaints.push(Complaint::new(
                "one-list",
                path,
                number + 1,
                format!("`{line}`: the version belongs into the root's list"),
            ));
        }
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn metadata(name: &str, uses: &[&str]) -> Value {
        let dependencies: Vec<Value> = uses.iter().map(|u| json!({ "name": u, "kind": null })).collect();
        let mut packages: Vec<Value> = LAW
            .iter()
            .filter(|(row, _)| *row != name)
            .map(|(row, _)| json!({ "name": row, "dependencies": [] }))
            .collect();
        packages.push(json!({ "name": name, "manifest_path": "m", "dependencies": dependencies }));
        json!({ "packages": packages })
    }
    fn said(name: &str, uses: &[&str]) -> Vec<String> {
        check(&metadata(name, uses)).unwrap().into_iter().map(|c| c.text).collect()
    }

    #[test]
    fn a_forbidden_edge_is_named() {
        assert_eq!(said("journal", &["durable", "model", "serde"]), [""; 0]);
        assert_eq!(said("journal", &["wire"]), ["journal may not use wire"]);
        assert_eq!(
            said("supervisor", &["sim", "ctl", "journal"]),
            ["supervisor may not use sim", "supervisor may not use ctl"]
        );
        assert_eq!(said("hw-tests", &["model"]), ["hw-tests may not use model"]);
        assert_eq!(said("sim", &["supervisor"]), ["sim may not use supervisor"]);
    }

    #[test]
    fn a_runtime_in_an_engine_crate_is_named() {
        assert_eq!(said("replication", &["tokio"]), ["engine crate replication may not use tokio"]);
        assert_eq!(said("supervisor", &["tokio"]), [""; 0]);
    }

    #[test]
    fn a_crate_without_a_row_is_named() {
        assert_eq!(said("novelty", &[]), ["crate novelty has no row in the dependency law"]);
    }

    #[test]
    fn a_version_outside_the_list_is_named() {
        let good = "[package]\nversion = \"1\"\n[dependencies]\n# why\nserde.workspace = true\nmodel = { workspace = true }\nhw = { path = \"..\" }\n";
        assert_eq!(one_list("m", good), []);
        let found = one_list("m", "[dev-dependencies]\nserde = \"1\"\n");
        assert_eq!((found.len(), found[0].line), (1, 2));
        assert_eq!(one_list("m", "[target.'cfg(unix)'.dependencies]\nlibc = { version = \"0.2\" }\n").len(), 1);
    }
}
