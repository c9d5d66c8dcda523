//! Growing delays after failed sign-ins, per account and per address.
//!
//! The first [`FREE`] failures of a key cost nothing; each further one doubles the pause, up to a bound. A pause of an account is bounded
//! much lower than one of an address, for somebody elsewhere could cause it: they must not be able to keep its owner out for long. The
//! console is never asked. Pure: time is an argument, in milliseconds.
//!
//! Bounded: [`KEYS_MAX`] keys; a new one drives out the one that failed longest ago. A key that has been quiet for [`FORGET_MS`] is as new.

use std::collections::HashMap;

const FREE: u32 = 4;
const KEYS_MAX: usize = 4096;
const FORGET_MS: u64 = 30 * 60 * 1000;
const ACCOUNT_PAUSE_MS_MAX: u64 = 30 * 1000;
const ADDRESS_PAUSE_MS_MAX: u64 = 15 * 60 * 1000;

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Key {
    Account(String),
    Address(String),
}

#[derive(Default)]
pub struct Limits {
    failures: HashMap<Key, Failures>,
}

#[derive(Clone, Copy)]
struct Failures {
    count: u32,
    last_ms: u64,
}

impl Limits {
    /// How long, in milliseconds, the keys have to wait still; 0: an attempt may be made.
    pub fn wait_ms(&self, keys: &[Key], now_ms: u64) -> u64 {
        keys.iter().map(|key| self.of(key, now_ms)).max().unwrap_or(0)
    }

    fn of(&self, key: &Key, now_ms: u64) -> u64 {
        let Some(f) = self.failures.get(key) else { return 0 };
        let over = f.count.saturating_sub(FREE);
        if over == 0 || now_ms.saturating_sub(f.last_ms) > FORGET_MS {
            return 0;
        }
        let most = match key {
            Key::Account(_) => ACCOUNT_PAUSE_MS_MAX,
            Key::Address(_) => ADDRESS_PAUSE_MS_MAX,
        };
        let pause = 1000u64.checked_shl(over - 1).filter(|_| over < 20).unwrap_or(most).min(most);
        (f.last_ms + pause).saturating_sub(now_ms)
    }

    pub fn failed(&mut self, keys: &[Key], now_ms: u64) {
        for key in keys {
            if !self.failures.contains_key(key) && self.failures.len() >= KEYS_MAX {
                let oldest = self.failures.iter().min_by_key(|(_, f)| f.last_ms).map(|(key, _)| key.clone());
                oldest.and_then(|key| self.failures.remove(&key));
            }
            let f = self.failures.entry(key.clone()).or_insert(Failures { count: 0, last_ms: now_ms });
            f.count = if now_ms.saturating_sub(f.last_ms) > FORGET_MS { 1 } else { f.count.saturating_add(1) };
            f.last_ms = now_ms;
        }
    }

    /// The account's owner has proven to be it.
    pub fn succeeded(&mut self, keys: &[Key]) {
        for key in keys {
            self.failures.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_grows_to_its_bound_and_ends() {
        let account = [Key::Account("a".into())];
        let address = [Key::Address("::1".into())];
        let mut l = Limits::default();
        for _ in 0..FREE {
            l.failed(&account, 0);
        }
        assert_eq!(l.wait_ms(&account, 0), 0, "a slip of the fingers costs nothing");
        let mut seen = Vec::new();
        for _ in 0..40 {
            l.failed(&account, 0);
            l.failed(&address, 0);
            seen.push(l.wait_ms(&account, 0));
        }
        assert_eq!(seen[..5], [1000, 2000, 4000, 8000, 16_000]);
        assert_eq!(*seen.last().unwrap(), ACCOUNT_PAUSE_MS_MAX);
        assert_eq!(l.wait_ms(&address, 0), ADDRESS_PAUSE_MS_MAX);
        assert_eq!(l.wait_ms(&account, ACCOUNT_PAUSE_MS_MAX), 0);
        assert_eq!(l.wait_ms(&[address[0].clone(), account[0].clone()], 1000), ADDRESS_PAUSE_MS_MAX - 1000);
        l.failed(&address, FORGET_MS + 1);
        assert_eq!(l.wait_ms(&address, FORGET_MS + 1), 0, "long ago is forgotten");
        l.succeeded(&account);
        assert_eq!(l.wait_ms(&account, 1), 0);
    }

    #[test]
    fn the_table_is_bounded_and_keeps_the_newest() {
        let mut l = Limits::default();
        for i in 0..KEYS_MAX as u64 + 500 {
            l.failed(&[Key::Account(i.to_string())], i);
        }
        assert_eq!(l.failures.len(), KEYS_MAX);
        assert!(l.failures.contains_key(&Key::Account((KEYS_MAX + 499).to_string())));
        assert!(!l.failures.contains_key(&Key::Account("0".into())));
    }
}
