//! What every page has: language, who looks, what was just done, and how its live part is kept up to date.

use crate::{
    access::Role,
    assets,
    format::{self, When},
    lang::Lang,
    sessions::Flash,
    words,
};

pub struct Frame {
    pub lang: Lang,
    /// `auto`, `light` or `dark`.
    pub theme: &'static str,
    pub title: String,
    /// Which entry of the menu this page belongs to.
    pub area: &'static str,
    pub box_name: String,
    /// Empty: nobody is signed in.
    pub user: String,
    pub role: Role,
    pub csrf: String,
    /// Path and query of this page.
    pub here: String,
    pub flash: Option<Flash>,
    /// What of the API the page's live part follows; empty: nothing.
    pub watch: String,
}

/// Numbers as templates hand them over.
pub trait Number {
    fn number(&self) -> u64;
}
impl Number for u64 {
    fn number(&self) -> u64 {
        *self
    }
}
impl Number for usize {
    fn number(&self) -> u64 {
        *self as u64
    }
}
impl<T: Number + ?Sized> Number for &T {
    fn number(&self) -> u64 {
        (*self).number()
    }
}

/// The menu: name of the area, where it is, who sees it.
pub const MENU: [(&str, &str, Role); 9] = [
    ("overview", "/", Role::Viewer),
    ("hosts", "/hosts", Role::Viewer),
    ("groups", "/groups", Role::Viewer),
    ("plans", "/plans", Role::Viewer),
    ("runs", "/runs", Role::Viewer),
    ("restores", "/restores", Role::Viewer),
    ("events", "/events", Role::Viewer),
    ("users", "/users", Role::Administrator),
    ("audit", "/audit", Role::Administrator),
];

impl Frame {
    pub fn t(&self, key: &str) -> &'static str {
        self.lang.t(key)
    }
    pub fn fill(&self, key: &str, with: &[&str]) -> String {
        self.lang.fill(key, with)
    }
    pub fn fill1(&self, key: &str, with: &str) -> String {
        self.lang.fill(key, &[with])
    }
    /// A code of the API in words.
    pub fn code(&self, section: &str, code: &str) -> String {
        words::code(self.lang, section, code)
    }
    pub fn menu(&self) -> Vec<(&'static str, &'static str, &'static str)> {
        let seen = MENU.iter().filter(|(.., role)| self.role >= *role);
        seen.map(|(area, path, _)| (*area, *path, menu_text(self.lang, area))).collect()
    }
    pub fn operates(&self) -> bool {
        self.role >= Role::Operator
    }
    pub fn administers(&self) -> bool {
        self.role >= Role::Administrator
    }
    pub fn asset(&self, name: &str) -> String {
        format!("/static/{}/{name}", assets::version())
    }
    pub fn languages(&self) -> [Lang; 2] {
        Lang::ALL
    }
    pub fn bytes(&self, n: impl Number) -> String {
        format::bytes(n.number())
    }
    pub fn count(&self, n: impl Number) -> String {
        format::count(n.number())
    }
    pub fn span(&self, ms: impl Number) -> String {
        format::span_ms(ms.number())
    }
    pub fn when(&self, us: impl Number) -> When {
        When(us.number())
    }
    /// From one moment to another, in microseconds.
    pub fn between(&self, from: impl Number, to: impl Number) -> String {
        format::span_ms(to.number().saturating_sub(from.number()) / 1000)
    }
}

fn menu_text(lang: Lang, area: &str) -> &'static str {
    match area {
        "overview" => lang.t("menu.overview"),
        "hosts" => lang.t("menu.hosts"),
        "groups" => lang.t("menu.groups"),
        "plans" => lang.t("menu.plans"),
        "runs" => lang.t("menu.runs"),
        "restores" => lang.t("menu.restores"),
        "events" => lang.t("menu.events"),
        "users" => lang.t("menu.users"),
        _ => lang.t("menu.audit"),
    }
}
