//! The Holdfast agent: captures what a Linux host writes and sends it to the box.

pub mod capture;
pub mod clock;
pub mod disks;

/// An error and its causes as one sentence, outermost first.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
