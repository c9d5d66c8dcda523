//! What a run does on the box itself: interfaces for a machine's cards, and the plan's hooks.

use super::{OUTPUT_MAX, Stop, clipped, failed};
use crate::{
    machine::{self, MachineSpec, Wire},
    state::RunState,
};
use std::{
    io::Read as _,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Makes the interfaces behind the machine's cards and puts them into their bridges.
pub(super) fn plug(spec: &MachineSpec) -> Result<(), Stop> {
    for (i, nic) in spec.nics.iter().enumerate() {
        let Wire::Bridge(bridge) = &nic.wire else { continue };
        let tap = spec.tap(i);
        if !PathBuf::from("/sys/class/net").join(&tap).exists() {
            ip(&["tuntap", "add", "dev", &tap, "mode", "tap"])?;
        }
        ip(&["link", "set", "dev", &tap, "master", bridge, "up"])?;
    }
    Ok(())
}

pub(super) fn unplug(spec: &MachineSpec) {
    for (i, nic) in spec.nics.iter().enumerate() {
        if matches!(nic.wire, Wire::Bridge(_)) {
            // One that is gone already is as well.
            let _ = ip(&["link", "del", "dev", &spec.tap(i)]);
        }
    }
}

fn ip(args: &[&str]) -> Result<(), Stop> {
    let done = machine::outside("ip").args(args).stdin(Stdio::null()).output();
    let done = done.map_err(|e| failed(format!("could not run ip: {e}"), "install iproute2"))?;
    if done.status.success() {
        return Ok(());
    }
    let said = clipped(&String::from_utf8_lossy(&done.stderr));
    Err(failed(format!("ip {}: {said}", args.join(" ")), "the box must run as root to plug a machine into a bridge"))
}

/// Runs a hook, for so long at most; what it printed.
pub(super) fn run_hook(words: &[String], state: &RunState, seconds_max: u64) -> Result<String, Stop> {
    let (program, args) = words.split_first().ok_or_else(|| failed("a hook without a program", "correct the plan"))?;
    let remedy = "run it by hand on the box to see why";
    // By `env`, so that it is the same wherever it is started.
    let mut command = machine::outside("env");
    command
        .args(["-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"])
        .args([format!("HOLDFAST_RUN={}", state.id), format!("HOLDFAST_PLAN={}", state.plan_name)])
        .arg(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command.spawn().map_err(|e| failed(format!("could not start the hook {program}: {e}"), remedy))?;
    // Read beside it: a hook that prints much must not wait for us. What is beyond the bound is read and dropped.
    let readers: Vec<thread::JoinHandle<String>> = [
        child.stdout.take().map(|s| Box::new(s) as Box<dyn std::io::Read + Send>),
        child.stderr.take().map(|s| Box::new(s) as Box<dyn std::io::Read + Send>),
    ]
    .into_iter()
    .flatten()
    .map(|mut pipe| {
        thread::spawn(move || {
            let (mut kept, mut buf) = (Vec::new(), [0; 4096]);
            while let Ok(n @ 1..) = pipe.read(&mut buf) {
                let room = OUTPUT_MAX.saturating_sub(kept.len()).min(n);
                kept.extend_from_slice(&buf[..room]);
            }
            String::from_utf8_lossy(&kept).into_owned()
        })
    })
    .collect();
    let deadline = Instant::now() + Duration::from_secs(seconds_max);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
            Ok(None) => {
                // With all it started: a child that holds the pipes would keep us reading.
                let group = format!("-{}", child.id());
                let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
                let _ = child.wait();
                return Err(failed(
                    format!("the hook {program} did not end within {seconds_max} s and was killed"),
                    remedy,
                ));
            }
            Err(e) => return Err(failed(format!("wait for the hook {program}: {e}"), remedy)),
        }
    };
    let output = readers.into_iter().filter_map(|r| r.join().ok()).collect::<Vec<_>>().join("");
    let output = clipped(&output);
    if status.success() {
        Ok(output)
    } else {
        Err(failed(format!("the hook {program} ended with {status}: {output}"), remedy))
    }
}
