//! Random texts, and how they are kept: hashed.

use data_encoding::{BASE32_NOPAD, HEXLOWER};
use ring::{
    digest,
    rand::{SecureRandom as _, SystemRandom},
};
use subtle::ConstantTimeEq as _;

/// `N` random bytes. None only if the system has no random source.
fn random<const N: usize>() -> Option<[u8; N]> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).ok()?;
    Some(bytes)
}

pub fn random_hex<const N: usize>() -> Option<String> {
    random::<N>().map(|bytes| HEXLOWER.encode(&bytes))
}

/// For people to type: letters and digits that are not mistaken for each other, in fours. 5 bits a character.
pub fn random_words(fours: usize) -> Option<String> {
    let text = BASE32_NOPAD.encode(&random::<40>()?);
    let words: Vec<&str> = (0..fours.min(16)).map(|i| &text[4 * i..4 * i + 4]).collect();
    Some(words.join("-"))
}

/// As it was typed, in any case and with any spaces or dashes.
pub fn plain_words(typed: &str) -> String {
    typed.chars().filter(|c| c.is_ascii_alphanumeric()).take(64).map(|c| c.to_ascii_uppercase()).collect()
}

/// SHA-256 in hexadecimal: enough for what is random anyway.
pub fn hash(text: &str) -> String {
    HEXLOWER.encode(digest::digest(&digest::SHA256, text.as_bytes()).as_ref())
}

pub fn same(a: &str, b: &str) -> bool {
    a.as_bytes().ct_eq(b.as_bytes()).into()
}
