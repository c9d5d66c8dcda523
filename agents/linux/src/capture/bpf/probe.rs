//! Whether the kernel would let capture in, without bringing it in.

use super::CaptureError;
use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported},
};

/// Why capture cannot begin in this kernel; none when nothing is known against it. What only the start itself can find (calibration, the
/// self-test) is not asked.
pub fn refusal() -> Option<CaptureError> {
    if let Err(e) = super::constants() {
        return Some(e);
    }
    // SAFETY: asks for a number.
    if unsafe { libc::geteuid() } != 0 {
        // Refused to this user, whatever the kernel would let root do.
        return None;
    }
    let feature = |what: &str| Some(CaptureError::Feature { what: what.to_owned() });
    match is_map_supported(MapType::RingBuf) {
        Ok(true) => {}
        Ok(false) => return feature("the kernel has no BPF ring buffer"),
        Err(e) => return feature(&format!("the kernel refuses BPF maps: {}", crate::error_chain(&e))),
    }
    match is_helper_supported(ProgramType::RawTracePoint, BpfHelper::BPF_FUNC_probe_read_kernel) {
        Ok(true) => None,
        Ok(false) => feature("the kernel lets no program read its memory (lockdown in mode confidentiality does that)"),
        Err(e) => feature(&format!("the kernel refuses BPF programs: {}", crate::error_chain(&e))),
    }
}
