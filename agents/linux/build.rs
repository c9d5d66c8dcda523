//! Compiles the kernel half of the `bpf-rq` capture backend with clang and hands its place to the crate.
//!
//! A machine without clang still builds the agent: the object is then empty, cargo prints a warning, and the backend says at
//! run time that it was not built in.

use std::{env, error::Error, fs, path::Path, process::Command};

const SOURCE: &str = "src/capture/bpf/capture.bpf.c";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={SOURCE}");
    println!("cargo:rerun-if-env-changed=HOLDFAST_CLANG");
    let object = Path::new(&env::var("OUT_DIR")?).join("capture.bpf.o");
    println!("cargo:rustc-env=HOLDFAST_BPF_OBJECT={}", object.display());
    let named = env::var("HOLDFAST_CLANG").ok();
    let names: Vec<String> = match named {
        Some(name) => vec![name],
        // The plain name first: what the machine's owner chose. 11 is the first that knows what the source uses.
        None => std::iter::once("clang".to_owned()).chain((11..=24).rev().map(|v| format!("clang-{v}"))).collect(),
    };
    for name in &names {
        let run = Command::new(name)
            .args(["-O2", "-g", "-target", "bpf", "-mcpu=v2", "-Wall", "-Werror", "-fno-ident", "-c", SOURCE, "-o"])
            .arg(&object)
            .output();
        match run {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(format!("could not run {name}: {e}").into()),
            Ok(out) if out.status.success() => return Ok(()),
            // A compiler that is there and fails is a fault in our source, not a missing tool.
            Ok(out) => return Err(format!("{name}: {}", String::from_utf8_lossy(&out.stderr)).into()),
        }
    }
    println!("cargo:warning=clang was not found: holdfast-agent is built without the bpf-rq capture backend");
    fs::write(&object, b"")?;
    Ok(())
}
