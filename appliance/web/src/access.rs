//! Who asks, and what they may.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What somebody may do; each may what the ones before it may.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Looks.
    Viewer,
    /// Protects, opens, drills, takes over.
    Operator,
    /// Deletes history, cuts hosts off, makes users.
    Administrator,
    /// Whoever may open the control socket: root on the box. Cannot be given to anybody.
    Console,
}

impl Role {
    /// Those that a user or a token can have.
    pub const GIVEN: [Self; 3] = [Self::Viewer, Self::Operator, Self::Administrator];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Administrator => "administrator",
            Self::Console => "console",
        }
    }
    /// One of [`Role::GIVEN`] by its name.
    pub fn given(name: &str) -> Option<Self> {
        Self::GIVEN.into_iter().find(|role| role.name() == name)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which way somebody came.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Via {
    Console,
    Page,
    Api,
}

/// Whoever makes a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Caller {
    pub name: String,
    pub role: Role,
    pub via: Via,
    /// The address, for the audit.
    pub from: String,
}

impl Caller {
    /// Root on the box, over the control socket.
    pub fn console() -> Self {
        Self { name: "root".into(), role: Role::Console, via: Via::Console, from: "the box".into() }
    }
}
