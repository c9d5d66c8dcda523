//! A Rust source file with its code told from its comments and strings.
//!
//! Not a parser: a scanner that knows where comments, strings and characters begin and end, which is all the checks need
//! to not stumble over their own words in a comment or a test fixture.

/// A file in three views of the same length, so that a position in one is the same place in the others.
#[derive(Clone, Debug)]
pub struct Source {
    pub path: String,
    pub text: String,
    /// Comments, strings and characters blanked.
    pub code: String,
    /// Everything but comments blanked.
    pub comments: String,
    /// `code` with test modules and functions blanked too.
    pub shipped: String,
}

impl Source {
    pub fn new(path: &str, text: &str) -> Self {
        let (code, comments) = split(text);
        let shipped = if is_test_file(path) { blank(text) } else { without_tests(&code) };
        Self { path: path.to_owned(), text: text.to_owned(), code, comments, shipped }
    }

    /// The line number of a position, from 1.
    pub fn line(&self, at: usize) -> usize {
        self.text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count() + 1
    }

    /// The name of the crate's folder, e.g. `appliance/model`.
    pub fn crate_dir(&self) -> &str {
        ["/src/", "/tests/", "/examples/", "/benches/", "/build.rs"]
            .iter()
            .filter_map(|part| self.path.find(part))
            .min()
            .map_or(&self.path, |at| &self.path[..at])
    }
}

/// Positions of `word` in `code` where it stands alone.
pub fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word).map(|(at, _)| at).filter(move |at| {
        let before = code[..*at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        let part_of_name = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        !part_of_name(before) && !part_of_name(after)
    })
}

/// Where the bracket opened at `open` is closed, exclusive; the end of the text when it never is.
pub fn closing(code: &str, open: usize) -> usize {
    let bytes = code.as_bytes();
    let mut depth = 0usize;
    for (at, byte) in bytes.iter().enumerate().skip(open) {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return at + 1;
                }
            }
            _ => {}
        }
    }
    code.len()
}

/// Whether a file holds tests only.
fn is_test_file(path: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or(path);
    path.contains("/tests/") || path.contains("/benches/") || file.ends_with("tests.rs") || file.starts_with("test_")
}

/// Every byte but line ends as a space.
fn blank(text: &str) -> String {
    text.bytes().map(|b| if b == b'\n' { '\n' } else { ' ' }).collect()
}

/// (code, comments)
fn split(text: &str) -> (String, String) {
    let bytes = text.as_bytes();
    let (mut code, mut comments) = (blank(text).into_bytes(), blank(text).into_bytes());
    let mut at = 0;
    while at < bytes.len() {
        let end = if bytes[at..].starts_with(b"//") || bytes[at..].starts_with(b"/*") {
            let end = comment_end(bytes, at);
            comments[at..end].copy_from_slice(&bytes[at..end]);
            end
        } else if let Some(end) = string_end(bytes, at).or_else(|| char_end(bytes, at)) {
            end
        } else {
            code[at] = bytes[at];
            at + 1
        };
        at = end;
    }
    (lossless(code), lossless(comments))
}

/// The views are cut at ASCII places, but a multi-byte name in code would be cut nowhere either.
fn lossless(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes)
        .unwrap_or_else(|e| e.into_bytes().iter().map(|b| if b.is_ascii() { *b as char } else { ' ' }).collect())
}

fn comment_end(bytes: &[u8], at: usize) -> usize {
    if bytes[at + 1] == b'/' {
        return bytes[at..].iter().position(|b| *b == b'\n').map_or(bytes.len(), |n| at + n);
    }
    let (mut depth, mut at) = (0usize, at);
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    bytes.len()
}

/// The end of the string literal that begins at `at`, if one does.
fn string_end(bytes: &[u8], at: usize) -> Option<usize> {
    if at > 0 && is_name(bytes[at - 1]) && bytes[at] != b'"' {
        return None;
    }
    let mut open = at;
    while open < bytes.len() && open - at < 2 && matches!(bytes[open], b'b' | b'c' | b'r') {
        open += 1;
    }
    let raw = bytes[at..open].contains(&b'r');
    let hashes = if raw { bytes[open..].iter().take_while(|b| **b == b'#').count() } else { 0 };
    open += hashes;
    if bytes.get(open) != Some(&b'"') {
        return None;
    }
    let mut end = open + 1;
    while end < bytes.len() {
        match bytes[end] {
            b'\\' if !raw => end += 2,
            b'"' if bytes[end + 1..].len() >= hashes && bytes[end + 1..end + 1 + hashes].iter().all(|b| *b == b'#') => {
                return Some(end + 1 + hashes);
            }
            _ => end += 1,
        }
    }
    Some(bytes.len())
}

/// The end of the character literal that begins at `at`, if one does; a lifetime is none.
fn char_end(bytes: &[u8], at: usize) -> Option<usize> {
    if bytes[at] != b'\'' {
        return None;
    }
    if bytes.get(at + 1) == Some(&b'\\') {
        let close = bytes.get(at + 3..)?.iter().position(|b| *b == b'\'')?;
        return Some(at + 4 + close);
    }
    // One character of up to four bytes, then the quote.
    let close = (2..=5).find(|n| bytes.get(at + n) == Some(&b'\''))?;
    let inner = std::str::from_utf8(&bytes[at + 1..at + close]).ok()?;
    (inner.chars().count() == 1).then_some(at + close + 1)
}

fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn without_tests(code: &str) -> String {
    let mut out = code.as_bytes().to_vec();
    for mark in ["#[cfg(test)]", "#[cfg(all(test", "#[test]"] {
        for (at, _) in code.match_indices(mark) {
            // What the attribute is on ends with its block, or with a semicolon when it has none.
            let after = at + mark.len();
            let Some(stop) = code[after..].find(['{', ';']).map(|n| after + n) else { continue };
            let end = if code.as_bytes()[stop] == b'{' { closing(code, stop) } else { stop + 1 };
            out[at..end].iter_mut().filter(|b| **b != b'\n').for_each(|b| *b = b' ');
        }
    }
    lossless(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_comments_and_strings_are_told_apart() {
        let text = "let a = \"no // comment\"; // yes \"here\"\nlet b = 'x'; let c: &'a str = r#\"raw \" todo\"#; /* in /* deep */ out */ let d = '\\''; let e = b\"x\\\"y\"; let f = 'ü';\n";
        let source = Source::new("crate/src/a.rs", text);
        assert_eq!(source.code.len(), text.len());
        for gone in ["comment", "todo", "deep", "out", "x", "ü", "yes"] {
            assert!(!source.code.contains(gone), "{gone} is left in {:?}", source.code);
        }
        for kept in ["let a", "let b", "&'a str", "let c", "let d", "let e", "let f"] {
            assert!(source.code.contains(kept), "{kept} is missing in {:?}", source.code);
        }
        assert!(source.comments.contains("yes \"here\"") && source.comments.contains("out */"));
        assert!(!source.comments.contains("no //"));
    }

    #[test]
    fn tests_are_not_shipped() {
        let text =
            "fn a() { x }\n#[cfg(test)]\nmod tests { fn b() { y } }\nfn c() {}\n#[cfg(test)]\nmod other;\nfn d() {}\n";
        let shipped = Source::new("crate/src/a.rs", text).shipped;
        assert!(shipped.contains("fn a") && shipped.contains("fn c") && shipped.contains("fn d"));
        assert!(!shipped.contains("fn b") && !shipped.contains("other"));
        assert!(!Source::new("crate/tests/a.rs", text).shipped.contains("fn a"));
    }

    #[test]
    fn a_word_stands_alone() {
        assert_eq!(words("unsafe unsafe_op an_unsafe (unsafe)", "unsafe").collect::<Vec<_>>(), [0, 28]);
    }

    #[test]
    fn the_crate_of_a_file_is_its_folder() {
        assert_eq!(Source::new("appliance/model/src/a/b.rs", "").crate_dir(), "appliance/model");
        assert_eq!(Source::new("hw-tests/tests/a.rs", "").crate_dir(), "hw-tests");
    }
}
