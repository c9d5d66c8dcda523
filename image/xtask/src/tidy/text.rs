//! Checks on one file at a time.

use super::{
    Complaint,
    source::{Source, closing, words},
};

pub fn all(source: &Source) -> Vec<Complaint> {
    let mut complaints = module_doc(source);
    complaints.extend(bare_matches(source));
    complaints.extend(unfinished(source));
    complaints.extend(banned_words(source));
    complaints.extend(unsafe_without_reason(source));
    complaints.extend(engine(source));
    complaints
}

fn module_doc(source: &Source) -> Vec<Complaint> {
    let first = source.text.lines().map(str::trim).find(|l| !l.is_empty() && !l.starts_with("#!["));
    if first.is_some_and(|l| l.starts_with("//!")) {
        return Vec::new();
    }
    vec![Complaint::new("module-doc", &source.path, 1, "a source file begins with what it is (`//!`)")]
}

fn bare_matches(source: &Source) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    for (at, call) in source.code.match_indices("matches!(") {
        let before = source.code[..at].trim_end().chars().next_back();
        let end = closing(&source.code, at + call.len() - 1);
        let after = source.code[end..].trim_start().chars().next();
        if matches!(before, Some(';' | '{' | '}'))
            && after == Some(';')
            && source.code[..at].ends_with(|c: char| c.is_whitespace() || c == '{')
        {
            complaints.push(Complaint::new(
                "bare-matches",
                &source.path,
                source.line(at),
                "`matches!` alone tests nothing: assert it",
            ));
        }
    }
    complaints
}

fn unfinished(source: &Source) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    let mut say = |at: usize, what: &str| {
        complaints.push(Complaint::new("unfinished", &source.path, source.line(at), format!("{what} is left in")));
    };
    for call in ["dbg!", "todo!", "unimplemented!"] {
        source
            .code
            .match_indices(call)
            .filter(|(at, _)| !is_name_before(&source.code, *at))
            .for_each(|(at, _)| say(at, call));
    }
    // Split, so that this file does not complain of itself.
    for note in [concat!("FIX", "ME"), concat!("TO", "DO"), concat!("XX", "X")] {
        words(&source.comments, note).for_each(|at| say(at, note));
    }
    complaints
}

fn is_name_before(code: &str, at: usize) -> bool {
    code[..at].chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_')
}

/// Words that have been used for something we have a word for. Only where the other word is never right: a list that
/// forbids too much is worked around.
const BANNED: &[(&[&str], &str)] = &[
    (&["slave"], "standby, node or target"),
    (&["consistency", "group"], "protection group"),
    (&["restore", "point"], "recovery point"),
    (&["savepoint"], "bookmark"),
    (&["dirty", "bitmap"], "dirty map"),
    (&["initial", "copy"], "initial sync"),
    (&["full", "resync"], "initial sync"),
    (&["fail", "back"], "failback, one word"),
    (&["take", "over"], "takeover, one word"),
    (&["book", "mark"], "bookmark, one word"),
    (&["time", "line"], "timeline, one word"),
    (&["data", "point"], "recovery point"),
    (&["wal"], "journal"),
    (&["redo", "log"], "journal"),
    (&["block", "log"], "journal"),
    (&["flushed", "lsn"], "durable LSN: a name that promises durability says so"),
    (&["synced", "lsn"], "durable LSN: a name that promises durability says so"),
];

fn banned_words(source: &Source) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    for (at, name) in identifiers(&source.code) {
        let parts = parts(name);
        for (banned, instead) in BANNED {
            if parts.windows(banned.len()).any(|w| w.iter().map(String::as_str).eq(banned.iter().copied())) {
                complaints.push(Complaint::new(
                    "words",
                    &source.path,
                    source.line(at),
                    format!("`{name}`: say {instead}"),
                ));
            }
        }
    }
    complaints
}

fn identifiers(code: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at + code[at..].find(|c: char| c.is_alphabetic() || c == '_')?;
        let end = code[start..].find(|c: char| !c.is_alphanumeric() && c != '_').map_or(code.len(), |n| start + n);
        at = end;
        Some((start, &code[start..end]))
    })
}

/// The words of a name: `DirtyMap`, `dirty_map` and `DIRTY_MAP` are all `dirty`, `map`.
fn parts(name: &str) -> Vec<String> {
    let mut parts: Vec<String> = Vec::new();
    let mut lower_before = false;
    let mut fresh = true;
    for c in name.chars() {
        if c == '_' {
            fresh = true;
            lower_before = false;
            continue;
        }
        if fresh || (c.is_uppercase() && lower_before) {
            parts.push(String::new());
        }
        if let Some(last) = parts.last_mut() {
            last.extend(c.to_lowercase());
        }
        lower_before = c.is_lowercase() || c.is_ascii_digit();
        fresh = false;
    }
    parts
}

/// How far above an `unsafe` its reason may stand: attributes and a statement's first lines come between.
const REASON_LINES: usize = 8;

fn unsafe_without_reason(source: &Source) -> Vec<Complaint> {
    let lines: Vec<&str> = source.text.lines().collect();
    let mut complaints = Vec::new();
    for at in words(&source.code, "unsafe") {
        let after = source.code[at + "unsafe".len()..].trim_start();
        // Declarations of what others wrote; their users give the reasons.
        if after.starts_with("extern") || after.starts_with("fn(") {
            continue;
        }
        // `#[unsafe(no_mangle)]`
        if after.starts_with('(') {
            continue;
        }
        let line = source.line(at);
        let reason = lines[line.saturating_sub(REASON_LINES + 1)..line]
            .iter()
            .any(|l| l.contains("// SAFETY") || l.contains("# Safety"));
        if !reason {
            complaints.push(Complaint::new(
                "unsafe",
                &source.path,
                line,
                "`unsafe` without a `// SAFETY:` that says why it is sound",
            ));
        }
    }
    complaints
}

/// Crates that are simulated: no runtime, no clock, no socket, no thread.
pub const ENGINE: &[&str] = &["model", "durable", "wire", "journal", "replication", "pair", "update"];

const FORBIDDEN_IN_ENGINE: &[(&str, &str)] = &[
    ("tokio::", "no runtime"),
    ("SystemTime::now", "time is an argument"),
    ("Instant::now", "time is an argument"),
    ("thread::spawn", "the caller owns the threads"),
    ("thread::Builder", "the caller owns the threads"),
    ("thread::sleep", "time is an argument"),
    ("std::net", "sockets stay with the caller"),
    ("UnixStream", "sockets stay with the caller"),
    ("TcpStream", "sockets stay with the caller"),
];

/// What an engine file may do all the same, and why.
const ENGINE_EXCEPTIONS: &[(&str, &str, &str)] = &[
    (
        "appliance/durable/src/os.rs",
        "thread::",
        "the real disk: where the kernel refuses io_uring, threads that only write and flush stand in for it",
    ),
    (
        "appliance/journal/src/index/sled.rs",
        "thread::sleep",
        "sled frees its file lock some time after it is closed; the real store waits for that, simulated worlds use another",
    ),
];

fn engine(source: &Source) -> Vec<Complaint> {
    let Some(name) = source.crate_dir().strip_prefix("appliance/").filter(|n| ENGINE.contains(n)) else {
        return Vec::new();
    };
    // Examples measure: they own a clock and threads as any caller does.
    if source.path.contains("/examples/") {
        return Vec::new();
    }
    let excepted =
        |what: &str| ENGINE_EXCEPTIONS.iter().any(|(path, start, _)| source.path == *path && what.starts_with(start));
    let mut complaints = Vec::new();
    for (what, why) in FORBIDDEN_IN_ENGINE.iter().filter(|(what, _)| !excepted(what)) {
        for (at, _) in source.shipped.match_indices(what) {
            let text = format!("`{what}` in engine crate {name}: {why}");
            complaints.push(Complaint::new("engine", &source.path, source.line(at), text));
        }
    }
    complaints
}

/// Paths of the machines this is written on: they mean nothing to anyone else.
pub fn private_paths(path: &str, text: &str) -> Vec<Complaint> {
    // Split, so that this file does not complain of itself.
    let private = [concat!("/wo", "rk/"), concat!("/tmp", "/hf"), concat!("/root", "/"), concat!("/home", "/")];
    let mut complaints = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for found in private.iter().filter(|p| mentions(line, p)) {
            complaints.push(Complaint::new(
                "private-path",
                path,
                number + 1,
                format!("{found} is a path of somebody's machine"),
            ));
        }
    }
    complaints
}

/// Whether the line has the path from the root on, not as the end of a longer one.
fn mentions(line: &str, path: &str) -> bool {
    let inside = |c: char| c.is_alphanumeric() || "._-$}{~)".contains(c);
    line.match_indices(path).any(|(at, _)| !line[..at].chars().next_back().is_some_and(inside))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints(path: &str, text: &str) -> Vec<(&'static str, usize)> {
        all(&Source::new(path, &format!("//! Doc.\n{text}"))).iter().map(|c| (c.check, c.line)).collect()
    }

    #[test]
    fn a_file_without_a_module_doc_is_named() {
        let found = all(&Source::new("a/src/b.rs", "#![allow(x)]\nuse std::fs;\n"));
        assert_eq!(found.iter().map(|c| c.check).collect::<Vec<_>>(), ["module-doc"]);
        assert!(all(&Source::new("a/src/b.rs", "#![allow(x)]\n\n//! What it is.\n")).is_empty());
        assert!(!all(&Source::new("a/src/b.rs", "")).is_empty(), "an empty file says nothing either");
    }

    #[test]
    fn matches_alone_is_named_and_in_an_expression_is_not() {
        let bad =
            "fn a() {\n    matches!(x, Some(_));\n    let y = 1;\n    matches!(\n        y,\n        1\n    );\n}\n";
        assert_eq!(complaints("a/src/b.rs", bad), [("bare-matches", 3), ("bare-matches", 5)]);
        let good = "fn a() -> bool {\n    assert!(matches!(x, Some(_)));\n    let z = matches!(x, 1);\n    matches!(x, Some(_))\n}\n";
        assert_eq!(complaints("a/src/b.rs", good), []);
    }

    #[test]
    fn what_is_not_finished_is_named() {
        let note = concat!("// FIX", "ME later\n");
        assert_eq!(complaints("a/src/b.rs", &format!("fn a() {{ dbg!(1); }}\n{note}fn b() {{ todo!() }}\n")).len(), 3);
        assert_eq!(complaints("a/src/b.rs", "// nothing to-do here\nlet a = \"todo!\";\n"), []);
    }

    #[test]
    fn a_banned_word_is_named_in_every_spelling() {
        for name in ["dirty_bitmap", "DirtyBitmap", "DIRTY_BITMAP", "the_dirty_bitmap_of"] {
            assert_eq!(complaints("a/src/b.rs", &format!("let {name} = 1;\n")), [("words", 2)], "{name}");
        }
        for name in ["timeline", "bitmap", "dirty_map", "time_of_line", "walk"] {
            assert_eq!(complaints("a/src/b.rs", &format!("let {name} = 1;\n")), [], "{name}");
        }
        assert_eq!(complaints("a/src/b.rs", "// the slave of habit\n"), [], "a comment is free");
    }

    #[test]
    fn unsafe_without_a_reason_is_named() {
        assert_eq!(complaints("a/src/b.rs", "fn a() {\n    unsafe { b() };\n}\n"), [("unsafe", 3)]);
        assert_eq!(complaints("a/src/b.rs", "fn a() {\n    // SAFETY: b takes nothing.\n    unsafe { b() };\n}\n"), []);
        assert_eq!(complaints("a/src/b.rs", "/// # Safety\n/// Never.\npub unsafe fn a() {}\n"), []);
        assert_eq!(complaints("a/src/b.rs", "unsafe impl Send for A {}\n"), [("unsafe", 2)]);
        assert_eq!(complaints("a/src/b.rs", "// unsafe\nlet a = \"unsafe\";\n"), []);
    }

    #[test]
    fn a_clock_or_a_thread_in_an_engine_crate_is_named() {
        let code = "fn a() { std::time::Instant::now(); std::thread::spawn(b); }\n";
        assert_eq!(complaints("appliance/journal/src/b.rs", code), [("engine", 2), ("engine", 2)]);
        assert_eq!(complaints("appliance/supervisor/src/b.rs", code), []);
        assert_eq!(complaints("appliance/journal/examples/b.rs", code), []);
        assert_eq!(complaints("appliance/journal/src/b.rs", &format!("#[cfg(test)]\nmod tests {{ {code} }}\n")), []);
        assert_eq!(complaints("appliance/wire/src/b.rs", "use std::net::TcpListener;\nuse tokio::net;\n").len(), 2);
    }

    #[test]
    fn a_private_path_is_named_and_a_part_of_another_is_not() {
        let path = concat!("/wo", "rk/");
        assert_eq!(private_paths("a.md", &format!("one\nsee {path}shared\n"))[0].line, 2);
        assert_eq!(private_paths("a.md", &format!("(`{path}`)")).len(), 1);
        for other in [format!("frame{path}"), format!("$DIR{path}"), format!("..{path}"), format!("\"{{base}}{path}")] {
            assert_eq!(private_paths("a.md", &other), [], "{other}");
        }
    }
}
