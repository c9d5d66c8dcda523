//! Which backend captures what does not wait for the box.
//!
//! `bpf-rq` where it works. Where BPF is refused (kernel lockdown in mode confidentiality, a policy, a kernel too old or built without type
//! information), volumes of the device mapper are captured at mirrors ([`super::dm`]) that do not make the host wait for the box.
//! `bpf-legacy` only when it is asked for.
//!
//! Why not the kernel's own `dm-log-writes`: see [`super::dm`].

use super::{
    Capture, CaptureError, DevNo,
    bpf::{self, BpfCapture, Options, Pins},
    legacy::LegacyCapture,
};
use std::path::Path;

/// What the configuration asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// And mirrors where BPF is refused.
    #[default]
    BpfRq,
    /// For kernels that are too old for the other one. Only when it is asked for: it stands on what it finds by looking.
    BpfLegacy,
    /// Mirrors, whether or not BPF would work.
    DmMirror,
}

/// Starts the backend that was chosen.
pub fn start(options: &Options, on: Option<(&Path, DevNo)>, choice: Choice) -> Result<Box<dyn Capture>, CaptureError> {
    match choice {
        Choice::BpfRq => match BpfCapture::start(options, on) {
            Ok(capture) => Ok(Box::new(capture)),
            Err(e) if e.asks_too_much_of_the_kernel() => Err(CaptureError::TooOld { source: Box::new(e) }),
            Err(e) => Err(e),
        },
        Choice::BpfLegacy => {
            // What the other one may have left would capture on, for nobody.
            if let Some(pins) = Pins::existing(&options.pins) {
                pins.clear()?;
            }
            Ok(Box::new(LegacyCapture::start(options)?))
        }
        Choice::DmMirror => Err(CaptureError::MirrorsOnly),
    }
}

/// Why volumes are captured at mirrors here; none where they are not.
pub fn why_mirrors(choice: Choice) -> Option<String> {
    match choice {
        Choice::BpfLegacy => None,
        Choice::DmMirror => Some("the configuration says capture = \"dm-mirror\"".to_owned()),
        Choice::BpfRq => bpf::probe::refusal().map(|e| {
            let old = match e {
                CaptureError::Btf { .. } => {
                    "; for kernels from 4.18 on that have none there is capture = \"bpf-legacy\" in the configuration"
                }
                _ => "",
            };
            format!("BPF is refused: {}{old}", crate::error_chain(&e))
        }),
    }
}
