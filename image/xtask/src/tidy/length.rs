//! Functions fit a screen, or nearly: a ceiling, and a list of the longer ones that only gets shorter.

use super::{
    Complaint,
    source::{Source, closing, words},
};

/// Lines of a function, its signature and last brace counted.
pub const LINES_MAX: usize = 100;
/// One function a line: `path::name lines`. An entry is never raised and goes when its function is short enough.
pub const LIST: &str = "image/xtask/long-functions.txt";

#[derive(Debug, PartialEq, Eq)]
struct Function {
    key: String,
    line: usize,
    lines: usize,
}

pub fn check(sources: &[Source], list: &str) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    let mut allowed: Vec<(&str, usize, usize)> = Vec::new();
    for (number, line) in list.lines().enumerate().filter(|(_, l)| !l.is_empty() && !l.starts_with('#')) {
        match line.rsplit_once(' ').and_then(|(key, lines)| Some((key, lines.parse().ok()?, number + 1))) {
            Some(entry) => allowed.push(entry),
            None => complaints.push(Complaint::new(
                "function-length",
                LIST,
                number + 1,
                format!("{line:?} is not `path::name lines`"),
            )),
        }
    }
    let long: Vec<(Function, &Source)> = sources
        .iter()
        .flat_map(|s| functions(s).into_iter().filter(|f| f.lines > LINES_MAX).map(move |f| (f, s)))
        .collect();
    for (function, source) in &long {
        let ceiling = allowed.iter().find(|(key, ..)| *key == function.key).map_or(LINES_MAX, |(_, lines, _)| *lines);
        if function.lines > ceiling {
            let text = format!("`{}` has {} lines, at most {ceiling}: split it", function.key, function.lines);
            complaints.push(Complaint::new("function-length", &source.path, function.line, text));
        }
    }
    for (key, lines, number) in allowed {
        let now = long.iter().find(|(f, _)| f.key == key).map(|(f, _)| f.lines);
        if now.is_none_or(|now| now < lines) {
            let now = now.map_or("no longer too long".to_owned(), |n| format!("{n} lines now"));
            complaints.push(Complaint::new(
                "function-length",
                LIST,
                number,
                format!("`{key}` has {now}: lower the entry"),
            ));
        }
    }
    complaints
}

fn functions(source: &Source) -> Vec<Function> {
    let code = &source.shipped;
    let mut found = Vec::new();
    for at in words(code, "fn") {
        let after = code[at + 2..].trim_start();
        let name: String = after.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if name.is_empty() {
            continue;
        }
        let Some(open) = body(code, at) else { continue };
        let (first, last) = (source.line(at), source.line(closing(code, open) - 1));
        found.push(Function { key: format!("{}::{name}", source.path), line: first, lines: last - first + 1 });
    }
    found
}

/// The opening brace of the function's body; none for a declaration.
fn body(code: &str, from: usize) -> Option<usize> {
    let mut depth = 0i32;
    for (at, byte) in code.bytes().enumerate().skip(from) {
        match byte {
            b'(' | b'[' => depth += 1,
            b')' | b']' => depth -= 1,
            b'{' if depth == 0 => return Some(at),
            b';' if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(lines: usize) -> [Source; 1] {
        let body = "    x();\n".repeat(lines - 2);
        [Source::new(
            "a/src/b.rs",
            &format!("//! Doc.\nfn short() {{}}\nfn long(a: [u8; 3]) {{\n{body}}}\ntrait T {{ fn no(&self); }}\n"),
        )]
    }

    #[test]
    fn a_long_function_is_named() {
        assert_eq!(check(&source(LINES_MAX), ""), []);
        let found = check(&source(LINES_MAX + 1), "");
        assert_eq!((found.len(), found[0].line), (1, 3));
        assert!(found[0].text.contains("a/src/b.rs::long") && found[0].text.contains("101 lines"), "{}", found[0]);
    }

    #[test]
    fn the_list_only_gets_shorter() {
        let list = "# why\na/src/b.rs::long 120\n";
        assert_eq!(check(&source(120), list), []);
        assert_eq!(check(&source(121), list).len(), 1, "longer than recorded");
        assert_eq!(check(&source(110), list).len(), 1, "shorter: lower the entry");
        assert_eq!(check(&source(50), list).len(), 1, "short enough: drop the entry");
        assert_eq!(check(&source(50), "nonsense\n").len(), 1);
    }
}
