//! Compiles the kernel halves (of the capture backends `bpf-rq` and `bpf-legacy`, and of the watch over mirrored volumes) with clang and hands their places to
//! the crate.
//!
//! A machine without clang still builds the agent: the objects are then empty, cargo prints a warning, and the backends say at
//! run time that they were not built in.

use std::{env, error::Error, fs, path::Path, process::Command};

/// Source, object, and the variable that names the object to the crate.
const OBJECTS: [(&str, &str, &str); 3] = [
    ("src/capture/bpf/capture.bpf.c", "capture.bpf.o", "HOLDFAST_BPF_OBJECT"),
    ("src/capture/legacy/legacy.bpf.c", "legacy.bpf.o", "HOLDFAST_BPF_LEGACY_OBJECT"),
    ("src/capture/bpf/watch.bpf.c", "watch.bpf.o", "HOLDFAST_WATCH_OBJECT"),
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-env-changed=HOLDFAST_CLANG");
    for (source, object, variable) in OBJECTS {
        println!("cargo:rerun-if-changed={source}");
        let object = Path::new(&env::var("OUT_DIR")?).join(object);
        println!("cargo:rustc-env={variable}={}", object.display());
        if !compile(source, &object)? {
            println!("cargo:warning=clang was not found: holdfast-agent is built without {source}");
            fs::write(&object, b"")?;
        }
    }
    Ok(())
}

/// Says whether there is a compiler.
fn compile(source: &str, object: &Path) -> Result<bool, Box<dyn Error>> {
    let named = env::var("HOLDFAST_CLANG").ok();
    let names: Vec<String> = match named {
        Some(name) => vec![name],
        // The plain name first: what the machine's owner chose. 11 is the first that knows what the sources use.
        None => std::iter::once("clang".to_owned()).chain((11..=24).rev().map(|v| format!("clang-{v}"))).collect(),
    };
    for name in &names {
        let run = Command::new(name)
            .args(["-O2", "-g", "-target", "bpf", "-mcpu=v2", "-Wall", "-Werror", "-fno-ident", "-c", source, "-o"])
            .arg(object)
            .output();
        match run {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(format!("could not run {name}: {e}").into()),
            Ok(out) if out.status.success() => return Ok(true),
            // A compiler that is there and fails is a fault in our source, not a missing tool.
            Ok(out) => return Err(format!("{name}: {}", String::from_utf8_lossy(&out.stderr)).into()),
        }
    }
    Ok(false)
}
