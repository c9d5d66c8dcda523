//! Positions. Each counts one thing and never turns into another by accident.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            pub const ZERO: Self = Self(0);
            pub const MAX: Self = Self(<$inner>::MAX);
            /// The position after this one.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
            /// The position before this one; zero stays zero.
            #[must_use]
            pub const fn prev(self) -> Self {
                Self(self.0.saturating_sub(1))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

counter!(/// Position in one journal: the first record is 1, each record adds one, none is left out. Zero is "before
    /// everything". A timeline that branches at LSN *b* goes on with *b + 1* of its own.
    Lsn, u64);
counter!(/// Position in a source's stream, counted by the source: the first record is 1, without a hole.
    SourceSeq, u64);
counter!(/// Grows at every change of ownership; whatever carries a lower one is refused.
    Term, u64);
counter!(/// A line of history inside one journal. Zero is the first; others branch from it.
    TimelineId, u32);
