//! Who runs a host's services.

use crate::HostId;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Who runs a host's services and answers at its addresses. There is one at a time, and each has a [`Term`](crate::Term) of its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")] // No tag: postcard cannot read one back.
pub enum Owner {
    /// The host itself.
    Host,
    /// The box, as a machine of its own.
    Box,
    /// Another host that follows its journal.
    Standby(HostId),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("the host"),
            Self::Box => f.write_str("the box"),
            Self::Standby(id) => write!(f, "standby {id}"),
        }
    }
}
