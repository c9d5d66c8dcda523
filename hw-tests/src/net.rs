//! A host of its own on the network: a namespace at the end of a cable that can be pulled.
//!
//! A pulled cable is what a proxy cannot imitate: nothing is refused, nothing is closed, packets just stop arriving, and both
//! ends find out by themselves. Block devices, the capture in the kernel and unix sockets know nothing of it.

use crate::{
    process::{Finished, call},
    tools,
};
use anyhow::{Context, Result};
use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

const IP_MAX: Duration = Duration::from_secs(30);

/// A namespace and the cable to it; both go when this is dropped.
#[derive(Debug)]
pub struct Cable {
    namespace: String,
    /// Our end; an interface's name has at most 15 characters.
    near: String,
    address: Ipv4Addr,
    nsenter: PathBuf,
}

impl Cable {
    /// Makes a namespace with one interface, and plugs it in. Needs root.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        // Each test is a process of its own: its number keeps names and addresses apart from those of its neighbours.
        let (us, n) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let place = us.wrapping_mul(4).wrapping_add(u32::from(n)) % (1 << 14);
        // 10.192.0.0/12 in networks of four: base, near, far, broadcast.
        let base = u32::from(Ipv4Addr::new(10, 192, 0, 0)) + place * 4;
        let (address, far_address) = (Ipv4Addr::from(base + 1), Ipv4Addr::from(base + 2));
        let (namespace, near, nsenter) = (format!("hf-{us}-{n}"), format!("hf{place}a"), tools::need("nsenter")?);
        let this = Self { namespace, near, address, nsenter };
        let far = format!("hf{place}b");
        ip(&["netns", "add", &this.namespace])?;
        ip(&["link", "add", &this.near, "type", "veth", "peer", "name", &far, "netns", &this.namespace])?;
        ip(&["address", "add", &format!("{address}/30"), "dev", &this.near])?;
        ip(&["link", "set", &this.near, "up"])?;
        this.inside(&["address", "add", &format!("{far_address}/30"), "dev", &far])?;
        this.inside(&["link", "set", "lo", "up"])?;
        this.inside(&["link", "set", &far, "up"])?;
        Ok(this)
    }

    /// Where the host in the namespace reaches us.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }
    /// Bytes that came to us through the cable so far, all protocols.
    pub fn received(&self) -> Result<u64> {
        let file = format!("/sys/class/net/{}/statistics/rx_bytes", self.near);
        let text = std::fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
        text.trim().parse().with_context(|| format!("{file} says {text:?}"))
    }
    pub fn pull(&self) -> Result<()> {
        ip(&["link", "set", &self.near, "down"]).map(drop)
    }
    /// Plugs it in again; an interface keeps its address while it is down.
    pub fn plug(&self) -> Result<()> {
        ip(&["link", "set", &self.near, "up"]).map(drop)
    }
    /// Turns `command` into the same one on the host behind the cable. `/sys` stays ours: `ip netns exec` would mount another
    /// one, without the BPF file system.
    pub fn host(&self, command: &Command) -> Command {
        let mut there = Command::new(&self.nsenter);
        there.arg(format!("--net=/run/netns/{}", self.namespace)).arg("--").arg(command.get_program());
        there.args(command.get_args());
        there
    }

    fn inside(&self, args: &[&str]) -> Result<Finished> {
        ip(&[&["-n", &self.namespace], args].concat())
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        let gone = ip(&["link", "delete", &self.near]).and_then(|_| ip(&["netns", "delete", &self.namespace]));
        if let Err(e) = gone {
            eprintln!("namespace {}: {e:#}", self.namespace);
        }
    }
}

fn ip(args: &[&str]) -> Result<Finished> {
    call("ip", args, IP_MAX).with_context(|| format!("ip {}", args.join(" ")))
}

/// Leaves this machine's network for one of our own: this thread, and every program and thread it starts from here on, sees nothing but a
/// bridge with these addresses of ours. It goes with the last of them, and so do its interfaces. Needs root; call it before other threads are
/// started.
pub fn leave_for_a_bridge(bridge: &str, addresses: &[&str]) -> Result<()> {
    // SAFETY: plain numbers; what this thread shared with others it now has alone.
    if unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) } != 0 {
        return Err(std::io::Error::last_os_error()).context("leave this machine's network");
    }
    // Interfaces are looked for in /sys as well, which shows those of the network it was mounted in.
    call("mount", &["--make-rprivate", "/"], IP_MAX)?;
    call("mount", &["-t", "sysfs", "sysfs", "/sys"], IP_MAX)?;
    ip(&["link", "set", "lo", "up"])?;
    ip(&["link", "add", bridge, "type", "bridge"])?;
    // A bridge without a port that is up forgets all its neighbours; a real one has others plugged in.
    let (anchor, other_end) = (format!("{bridge}-a"), format!("{bridge}-b"));
    ip(&["link", "add", &anchor, "type", "veth", "peer", "name", &other_end])?;
    ip(&["link", "set", &anchor, "master", bridge, "up"])?;
    ip(&["link", "set", &other_end, "up"])?;
    ip(&["link", "set", bridge, "up"])?;
    for address in addresses {
        ip(&["address", "add", address, "dev", bridge])?;
    }
    Ok(())
}

/// Has our neighbours' hardware addresses believed for an hour, unless a neighbour itself says that they have changed.
pub fn believe_neighbours(device: &str) -> Result<()> {
    let file = format!("/proc/sys/net/ipv4/neigh/{device}/base_reachable_time_ms");
    std::fs::write(&file, "7200000").with_context(|| format!("write {file}"))
}

/// A cable from a machine of ours to a bridge.
pub fn tap(name: &str, bridge: &str) -> Result<()> {
    ip(&["tuntap", "add", "dev", name, "mode", "tap"])?;
    ip(&["link", "set", "dev", name, "master", bridge, "up"]).map(drop)
}

/// The hardware address we hold for a neighbour.
pub fn neighbour(address: Ipv4Addr) -> Result<Option<String>> {
    let text = std::fs::read_to_string("/proc/thread-self/net/arp").context("read our neighbours")?;
    let found = text.lines().skip(1).find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        (words.first()?.parse() == Ok(address)).then(|| words.get(3).map(|mac| (*mac).to_owned()))?
    });
    Ok(found.filter(|mac| mac != "00:00:00:00:00:00"))
}

/// Whether namespaces can be had here; why not otherwise.
pub fn cables_work() -> Result<(), String> {
    if !tools::is_root() {
        return Err("a network namespace needs root".into());
    }
    if !Path::new("/proc/self/ns/net").exists() {
        return Err("this kernel has no network namespaces".into());
    }
    Ok(())
}
