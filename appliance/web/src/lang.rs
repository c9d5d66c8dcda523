//! The languages of the pages: `ui-templates/lang/*.toml`, built in.
//!
//! A text is found by its key (`group.title`); `{0}`, `{1}` in it are filled in. A key that a language lacks shows itself; a test fails
//! before that can happen, and also when a key is used by nobody.

use std::{collections::HashMap, sync::OnceLock};

/// A language of the pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lang {
    En,
    ZhCn,
}

impl Lang {
    pub const ALL: [Self; 2] = [Self::En, Self::ZhCn];

    /// As in `lang=""`.
    pub const fn code(self) -> &'static str {
        match self {
            Self::En => "en",
            Self::ZhCn => "zh-CN",
        }
    }
    /// As its speakers call it.
    pub const fn own_name(self) -> &'static str {
        match self {
            Self::En => "English",
            Self::ZhCn => "简体中文",
        }
    }
    pub fn of_code(code: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|lang| lang.code() == code)
    }

    /// The best for an `Accept-Language`.
    pub fn accepted(header: &str) -> Self {
        let mut best = (0.0, Self::En);
        for part in header.split(',').take(16) {
            let (tag, quality) = part.split_once(";q=").unwrap_or((part, "1"));
            let quality: f32 = quality.trim().parse().unwrap_or(0.0);
            let lang = match tag.trim().to_ascii_lowercase().split('-').next() {
                Some("zh") => Self::ZhCn,
                Some("en") => Self::En,
                _ => continue,
            };
            if quality > best.0 {
                best = (quality, lang);
            }
        }
        best.1
    }

    pub fn t(self, key: &str) -> &'static str {
        match self.texts().get_key_value(key) {
            Some((_, text)) => text,
            None => {
                tracing::error!(key, lang = self.code(), "a text is missing");
                "…"
            }
        }
    }
    /// A text that may not be there: of a code that another version of the API may have.
    pub fn known(self, key: &str) -> Option<&'static str> {
        self.texts().get(key).map(String::as_str)
    }
    /// A text with its places filled in.
    pub fn fill(self, key: &str, with: &[&str]) -> String {
        let mut text = String::new();
        let mut rest = self.t(key);
        // One pass: what is filled in is not looked at again.
        while let Some((before, after)) = rest.split_once('{') {
            text.push_str(before);
            match after.split_once('}').and_then(|(n, tail)| Some((with.get(n.parse::<usize>().ok()?)?, tail))) {
                Some((value, tail)) => {
                    text.push_str(value);
                    rest = tail;
                }
                None => {
                    text.push('{');
                    rest = after;
                }
            }
        }
        text + rest
    }

    fn texts(self) -> &'static HashMap<String, String> {
        static TEXTS: [OnceLock<HashMap<String, String>>; 2] = [OnceLock::new(), OnceLock::new()];
        TEXTS[self as usize].get_or_init(|| flatten(self.file()))
    }

    fn file(self) -> &'static str {
        match self {
            Self::En => include_str!("../../../ui-templates/lang/en.toml"),
            Self::ZhCn => include_str!("../../../ui-templates/lang/zh-CN.toml"),
        }
    }
}

fn flatten(file: &str) -> HashMap<String, String> {
    let table: toml::Table = file.parse().unwrap_or_else(|e| {
        tracing::error!("a language file cannot be read: {e}");
        toml::Table::new()
    });
    let mut texts = HashMap::new();
    for (section, value) in &table {
        for (key, text) in value.as_table().into_iter().flatten() {
            texts.insert(format!("{section}.{key}"), text.as_str().unwrap_or_default().to_owned());
        }
    }
    texts
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeSet, fs, path::Path};

    fn read_all(dir: &Path, out: &mut String) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.to_string_lossy().into_owned();
            if path.is_dir() {
                read_all(&path, out);
            } else if name.ends_with(".html") || name.ends_with(".rs") {
                out.push_str(&fs::read_to_string(&path).unwrap());
            }
        }
    }

    /// Sections whose keys are codes of the API; the page asks for them by the code and shows the code itself where there is none.
    const CODES: [&str; 15] = [
        "state",
        "risk",
        "gap",
        "step",
        "phase",
        "consistency",
        "role",
        "hold",
        "event",
        "quality",
        "kept",
        "kind",
        "outcome",
        "verdict",
        "authority",
    ];

    #[test]
    fn no_key_is_missing_and_none_is_useless() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut text = String::new();
        read_all(&root.join("../../ui-templates"), &mut text);
        read_all(&root.join("src"), &mut text);
        let sections: BTreeSet<&str> = Lang::En.texts().keys().filter_map(|k| k.split('.').next()).collect();
        let mut used = BTreeSet::new();
        for (at, _) in text.match_indices('"') {
            let literal = text[at + 1..].split('"').next().unwrap_or_default();
            let before = &text[..at];
            let asked = before.ends_with(".t(") || before.ends_with("fill(") || before.ends_with("fill1(");
            let Some((section, key)) = literal.split_once('.') else { continue };
            let plain = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
            if plain(section) && plain(key) && key != "log" && (asked || sections.contains(section)) {
                used.insert(literal.to_owned());
            }
        }
        assert!(used.len() > 100, "the search finds nothing: {used:?}");
        let keys = |lang: Lang| lang.texts().keys().cloned().collect::<BTreeSet<_>>();
        let (en, zh) = (keys(Lang::En), keys(Lang::ZhCn));
        assert!(en.len() > 100);
        assert_eq!(en.difference(&zh).collect::<Vec<_>>(), Vec::<&String>::new(), "missing in zh-CN");
        assert_eq!(zh.difference(&en).collect::<Vec<_>>(), Vec::<&String>::new(), "missing in en");
        assert_eq!(used.difference(&en).collect::<Vec<_>>(), Vec::<&String>::new(), "used and nowhere");
        let of_code =
            |key: &String| key.starts_with("ship.") || CODES.contains(&key.split('.').next().unwrap_or_default());
        let useless: Vec<_> = en.difference(&used).filter(|k| !of_code(k)).collect();
        assert_eq!(useless, Vec::<&String>::new(), "used by nobody");
        let places = |text: &str| (0..9).filter(|i| text.contains(&format!("{{{i}}}"))).collect::<Vec<_>>();
        for key in &en {
            assert!(!Lang::En.t(key).is_empty() && !Lang::ZhCn.t(key).is_empty(), "{key} is empty");
            assert_eq!(places(Lang::En.t(key)), places(Lang::ZhCn.t(key)), "{key} has other places");
        }
    }

    #[test]
    fn a_language_is_chosen_as_the_browser_wishes() {
        for (header, lang) in [
            ("", Lang::En),
            ("de-DE,de", Lang::En),
            ("zh-CN,zh;q=0.9,en;q=0.8", Lang::ZhCn),
            ("en-GB,zh;q=0.9", Lang::En),
            ("de,en;q=0.4,zh;q=0.5", Lang::ZhCn),
            ("zh;q=x", Lang::En),
        ] {
            assert_eq!(Lang::accepted(header), lang, "{header}");
        }
    }

    #[test]
    fn what_is_filled_in_is_not_filled_again() {
        assert_eq!(Lang::En.fill("risk.lagging", &["{1}", "9 ms"]).matches("9 ms").count(), 1);
    }
}
