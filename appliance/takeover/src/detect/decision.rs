//! A decision with its reasons: made to be printed, kept beside the takeover it began, and read afterwards.

use super::policy::Channel;
use model::{HostId, MonoTime};
use std::fmt;

/// Something else that we hear when our own uplink works.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Witness {
    Gateway,
    /// Another box, or any address the operator named.
    Peer(String),
    Host(HostId),
}

impl fmt::Display for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gateway => f.write_str("the gateway"),
            Self::Peer(name) => write!(f, "peer {name}"),
            Self::Host(id) => write!(f, "host {id}"),
        }
    }
}

/// Why a takeover begins.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Cause {
    HostSilent,
    /// The host lives, its application does not.
    Application {
        probe: String,
    },
    /// Somebody pressed the button.
    Manual {
        by: String,
    },
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HostSilent => f.write_str("the host is silent on every required channel"),
            Self::Application { probe } => write!(f, "probe {probe:?} fails"),
            Self::Manual { by } => write!(f, "{by} said so"),
        }
    }
}

/// Why there is an alarm and no takeover.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Doubt {
    /// Some required channels are silent, others show life.
    ChannelsDisagree,
    /// It may be the box that is cut off.
    UplinkUnproved,
    /// It came back so often lately that silence has to last longer.
    Flapping { hold_ms: u64 },
    /// The box has not heard the host since its own start.
    NeverHeard,
    /// All agree, and the policy leaves it to a person.
    NotAutomatic,
    /// An application fails, and the policy says: alarm.
    ApplicationFails,
    /// A probe could not be made.
    ProbeBroken,
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ChannelsDisagree => f.write_str("some channels are silent and others show life"),
            Self::UplinkUnproved => f.write_str("nothing proves that the box itself is not cut off"),
            Self::Flapping { hold_ms } => {
                write!(f, "it came back lately, so silence must last {} now", seconds(*hold_ms))
            }
            Self::NeverHeard => f.write_str("the box has not heard it since its own start"),
            Self::NotAutomatic => f.write_str("the policy leaves a takeover to a person"),
            Self::ApplicationFails => f.write_str("an application fails on a host that lives"),
            Self::ProbeBroken => f.write_str("a probe could not be made"),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Heard on all required channels, and nothing fails.
    Well,
    /// Beats are missing, or a probe failed: not enough to say more.
    Watching,
    /// An alarm for a person.
    Doubt(Doubt),
    Takeover(Cause),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Well => f.write_str("the host is well"),
            Self::Watching => f.write_str("watching"),
            Self::Doubt(why) => write!(f, "alarm, no takeover: {why}"),
            Self::Takeover(why) => write!(f, "takeover: {why}"),
        }
    }
}

/// Which way a reason points.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Points {
    For,
    Against,
    /// Says nothing either way.
    Neither,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fact {
    Alive { channel: Channel },
    Late { channel: Channel, missed: u32 },
    Silent { channel: Channel, missed: u32, unsteady: bool },
    NotHeardYet { channel: Channel },
    WitnessAnswers { witness: Witness },
    WitnessSilent { witness: Witness },
    ProbeWorks { name: String },
    ProbeFails { name: String, times: u32, why: String },
    ProbeBroken { name: String, why: String },
    ProbeOld { name: String },
    Button { by: String },
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alive { channel } => write!(f, "{channel}: heard"),
            Self::Late { channel, missed } => write!(f, "{channel}: {missed} missed"),
            Self::Silent { channel, missed, unsteady } => {
                let unsteady = if *unsteady { ", and it had lost some before" } else { "" };
                write!(f, "{channel}: silent, {missed} missed{unsteady}")
            }
            Self::NotHeardYet { channel } => write!(f, "{channel}: not heard yet"),
            Self::WitnessAnswers { witness } => write!(f, "uplink: {witness} answers"),
            Self::WitnessSilent { witness } => write!(f, "uplink: {witness} does not answer"),
            Self::ProbeWorks { name } => write!(f, "probe {name:?} works"),
            Self::ProbeFails { name, times, why } => write!(f, "probe {name:?} failed {times} times: {why}"),
            Self::ProbeBroken { name, why } => write!(f, "probe {name:?} could not be made: {why}"),
            Self::ProbeOld { name } => write!(f, "probe {name:?}: no result of late"),
            Self::Button { by } => write!(f, "{by} asked for it"),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reason {
    pub points: Points,
    pub fact: Fact,
    pub since: MonoTime,
    /// It counts only as something to look at.
    pub advisory: bool,
}

/// What follows now, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision {
    pub verdict: Verdict,
    pub at: MonoTime,
    pub reasons: Vec<Reason>,
}

impl fmt::Display for Decision {
    /// One line for the verdict, one for each reason.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.verdict)?;
        for reason in &self.reasons {
            let points = match reason.points {
                Points::For => "for    ",
                Points::Against => "against",
                Points::Neither => "       ",
            };
            let age = seconds(self.at.ms_since(reason.since));
            let advisory = if reason.advisory { " (advisory)" } else { "" };
            write!(f, "\n  {points}  {} (since {age}){advisory}", reason.fact)?;
        }
        Ok(())
    }
}

fn seconds(ms: u64) -> String {
    format!("{}.{} s", ms / 1000, ms % 1000 / 100)
}
