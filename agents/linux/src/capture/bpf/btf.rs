//! The few questions capture has for the kernel's type information (BTF), answered from its raw bytes.
//!
//! What a kernel can do is decided from here and never from its version: distribution kernels carry changes back (Debian's
//! 5.10 has the one-argument `block_rq_issue` of 5.11).

use std::collections::{HashMap, HashSet};

#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    #[error("read")]
    Read(#[source] std::io::Error),
    #[error("it is not BTF of version 1")]
    Header,
    #[error("type {id} ends past the end of the section")]
    Truncated { id: u32 },
    #[error("type {id} is of kind {kind}, which is not known")]
    Kind { id: u32, kind: u32 },
}

/// Answers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Facts {
    /// Arguments of the tracepoints, by name.
    pub tracepoint_args: HashMap<&'static str, u32>,
    /// Sizes of structs.
    pub struct_size: HashMap<&'static str, u32>,
    /// Enumerators.
    pub enumerator: HashMap<&'static str, u32>,
    /// Members that are there, as `struct.member`.
    pub members: HashSet<&'static str>,
}

const TRACEPOINTS: [(&str, &str); 4] = [
    ("btf_trace_block_rq_issue", "block_rq_issue"),
    ("btf_trace_block_rq_complete", "block_rq_complete"),
    ("btf_trace_block_bio_queue", "block_bio_queue"),
    ("btf_trace_block_bio_complete", "block_bio_complete"),
];
/// Struct, member, and the name of the answer.
const MEMBERS: [(&str, &str, &str); 1] = [("block_device_operations", "rw_page", "block_device_operations.rw_page")];
const STRUCTS: [&str; 3] = ["page", "bio_vec", "request"];
const ENUMERATORS: [&str; 7] = [
    "__REQ_FUA",
    "__REQ_PREFLUSH",
    "REQ_OP_WRITE",
    "REQ_OP_FLUSH",
    "REQ_OP_DISCARD",
    "REQ_OP_SECURE_ERASE",
    "REQ_OP_WRITE_ZEROES",
];

const KIND_PTR: u32 = 2;
const KIND_STRUCT: u32 = 4;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_FUNC_PROTO: u32 = 13;

struct Type {
    name: u32,
    kind: u32,
    vlen: u32,
    /// Size or type, by kind.
    size_or_type: u32,
    /// Where what follows begins.
    rest: usize,
}

pub fn read_facts(bytes: &[u8]) -> Result<Facts, BtfError> {
    let word = |at: usize| -> Option<u32> { Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?)) };
    let header = || -> Option<(usize, usize, usize, usize)> {
        if bytes.get(..3)? != [0x9f, 0xeb, 1] {
            return None;
        }
        let base = word(4)? as usize;
        let types = base.checked_add(word(8)? as usize)?;
        let types_end = types.checked_add(word(12)? as usize)?;
        let strings = base.checked_add(word(16)? as usize)?;
        let strings_end = strings.checked_add(word(20)? as usize)?;
        (types_end <= bytes.len() && strings_end <= bytes.len()).then_some((types, types_end, strings, strings_end))
    };
    let (mut at, types_end, strings, strings_end) = header().ok_or(BtfError::Header)?;
    let name_is = |offset: u32, name: &str| -> bool {
        let rest = bytes.get(strings.saturating_add(offset as usize)..strings_end).unwrap_or_default();
        rest.starts_with(name.as_bytes()) && rest.get(name.len()) == Some(&0)
    };

    // One pass that remembers where each type begins (types refer to each other by number), then the questions.
    let mut types: Vec<Type> = Vec::new();
    while at < types_end {
        let id = types.len() as u32 + 1;
        let (Some(name), Some(info), Some(size_or_type)) = (word(at), word(at + 4), word(at + 8)) else {
            return Err(BtfError::Truncated { id });
        };
        let (kind, vlen) = (info >> 24 & 0x1f, info & 0xffff);
        let extra = match kind {
            1 | 14 | 17 => 4,
            2 | 7 | 8 | 9 | 10 | 11 | 12 | 16 | 18 => 0,
            3 => 12,
            4 | 5 | 15 | 19 => vlen as usize * 12,
            6 | 13 => vlen as usize * 8,
            _ => return Err(BtfError::Kind { id, kind }),
        };
        types.push(Type { name, kind, vlen, size_or_type, rest: at + 12 });
        at += 12 + extra;
        if at > types_end {
            return Err(BtfError::Truncated { id });
        }
    }
    let by_id = |id: u32| types.get((id as usize).checked_sub(1)?);

    let mut facts = Facts::default();
    for ty in &types {
        match ty.kind {
            KIND_TYPEDEF => {
                for (symbol, tracepoint) in TRACEPOINTS {
                    // typedef void (*btf_trace_X)(void *data, the tracepoint's own arguments)
                    if name_is(ty.name, symbol)
                        && let Some(pointer) = by_id(ty.size_or_type)
                        && pointer.kind == KIND_PTR
                        && let Some(proto) = by_id(pointer.size_or_type)
                        && proto.kind == KIND_FUNC_PROTO
                    {
                        facts.tracepoint_args.insert(tracepoint, proto.vlen.saturating_sub(1));
                    }
                }
            }
            KIND_STRUCT => {
                for name in STRUCTS {
                    if name_is(ty.name, name) {
                        facts.struct_size.insert(name, ty.size_or_type);
                    }
                }
                for (of, member, answer) in MEMBERS {
                    let names = (0..ty.vlen as usize).filter_map(|i| word(ty.rest + i * 12));
                    if name_is(ty.name, of) && names.into_iter().any(|n| name_is(n, member)) {
                        facts.members.insert(answer);
                    }
                }
            }
            KIND_ENUM => {
                for i in 0..ty.vlen as usize {
                    let (Some(name), Some(value)) = (word(ty.rest + i * 8), word(ty.rest + i * 8 + 4)) else { break };
                    for wanted in ENUMERATORS {
                        if name_is(name, wanted) {
                            facts.enumerator.insert(wanted, value);
                        }
                    }
                }
            }
            _ => {}
        }
    }
    Ok(facts)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A section with one struct, one enum and one tracepoint typedef, built by hand.
    fn section() -> Vec<u8> {
        let mut strings = vec![0u8];
        let mut string = |s: &str| {
            let at = strings.len() as u32;
            strings.extend_from_slice(s.as_bytes());
            strings.push(0);
            at
        };
        let (page, req, fua, tp) =
            (string("page"), string("req_flag_bits"), string("__REQ_FUA"), string("btf_trace_block_rq_issue"));
        let (operations, rw_page) = (string("block_device_operations"), string("rw_page"));
        let mut words: Vec<u32> = Vec::new();
        words.extend([page, 4 << 24, 64]); // 1: struct page, no members
        words.extend([req, 6 << 24 | 1, 4, fua, 17]); // 2: enum
        words.extend([0, 13 << 24 | 2, 0, 0, 0, 0, 0]); // 3: proto of two arguments
        words.extend([0, 2 << 24, 3]); // 4: pointer to 3
        words.extend([tp, 8 << 24, 4]); // 5: typedef of 4
        words.extend([operations, 4 << 24 | 2, 16, 0, 4, 0, rw_page, 4, 64]); // 6: struct of two members
        let types: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let mut out = vec![0x9f, 0xeb, 1, 0];
        for w in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            out.extend_from_slice(&w.to_le_bytes());
        }
        out.extend_from_slice(&types);
        out.extend_from_slice(&strings);
        out
    }

    #[test]
    fn the_questions_are_answered() {
        let facts = read_facts(&section()).unwrap();
        assert_eq!(facts.tracepoint_args.get("block_rq_issue"), Some(&1));
        assert_eq!(facts.struct_size.get("page"), Some(&64));
        assert_eq!(facts.enumerator.get("__REQ_FUA"), Some(&17));
        assert_eq!(facts.enumerator.get("__REQ_PREFLUSH"), None);
        assert!(facts.members.contains("block_device_operations.rw_page"));
    }

    #[test]
    fn damaged_bytes_are_an_error_and_never_a_panic() {
        let good = section();
        for cut in 0..good.len() {
            // Cutting leaves the header's lengths wrong: always refused.
            assert!(read_facts(&good[..cut]).is_err(), "cut at {cut}");
        }
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                // Whatever the answer, there is one.
                let answer = read_facts(&bad);
                if at < 3 {
                    assert!(answer.is_err(), "byte {at} bit {bit}");
                }
            }
        }
    }
}
