//! `cargo xtask rescue`: a medium that boots a machine which is to get its disks back.
//!
//! One file for CD drives, virtual media of management boards and USB sticks (`dd`), by BIOS and by UEFI: GRUB, Debian's kernel, and an
//! initramfs of busybox, the static agent and the drivers of disks and network cards. It runs `holdfast-agent rescue` and nothing else, wholly
//! from memory. Box, token, name and address are asked for on every console, or given here and written into the medium.
//!
//! # Limits
//!
//! x86_64. No Secure Boot: GRUB is not signed. No firmware files: cards that need one from their driver do not come up (most of
//! Broadcom's bnx2 and some of QLogic's). No drivers for disks over the network, no md, LVM or encryption: whole disks are written. A medium that
//! stays in its drive boots again; the machine's own boot order decides.

use crate::{
    deps::{self, GUEST_KERNEL, Purpose},
    repo::Repo,
};
use anyhow::{Context, Result, bail, ensure};
use hw_tests::{
    guest::{Initramfs, Kernel},
    process, tools,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Packing some ninety megabytes on a busy machine.
const PACK_MAX: Duration = Duration::from_secs(300);
/// In the kernel's tree of modules: what disks and network cards hang on.
const DRIVERS: [&str; 21] = [
    "kernel/drivers/ata/",
    "kernel/drivers/block/",
    "kernel/drivers/hv/",
    "kernel/drivers/message/",
    "kernel/drivers/net/ethernet/",
    "kernel/drivers/net/hyperv/",
    "kernel/drivers/net/mdio/",
    "kernel/drivers/net/pcs/",
    "kernel/drivers/net/phy/",
    "kernel/drivers/net/virtio_net.ko",
    "kernel/drivers/net/vmxnet3/",
    "kernel/drivers/net/xen-netfront.ko",
    "kernel/drivers/nvme/",
    "kernel/drivers/pci/controller/",
    "kernel/drivers/scsi/",
    "kernel/drivers/ufs/",
    "kernel/drivers/usb/host/",
    "kernel/drivers/usb/storage/",
    "kernel/drivers/virtio/",
    "kernel/drivers/xen/",
    "kernel/net/packet/",
];
/// Where the kernel's own words go; it is asked on every console there is.
const LINE: &str = "console=tty0 console=ttyS0,115200 quiet panic=30 random.trust_cpu=on";

#[derive(clap::Args)]
pub struct Options {
    /// Where it goes [default: target/holdfast-rescue.iso]
    #[arg(long)]
    out: Option<PathBuf>,
    /// HOST or HOST:PORT of the box; left out: asked for when it boots
    #[arg(long = "box", requires = "token")]
    box_address: Option<String>,
    /// A token of the box, which the medium holds for everybody to read: it lets one machine enrol, once
    #[arg(long, requires = "box_address")]
    token: Option<String>,
    /// Name of the machine on the box [default: rescue- and the end of its network card's address]
    #[arg(long)]
    name: Option<String>,
    /// Address of the machine: ADDRESS/PREFIX[,GATEWAY[,DEVICE]] [default: by DHCP]
    #[arg(long)]
    ip: Option<String>,
    /// The agent beside this program is up to date; nothing is installed or built
    #[arg(long, hide = true)]
    built: bool,
}

pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    let line = kernel_line(options)?;
    if !options.built {
        let missing = deps::install(repo, Some(Purpose::Rescue))?;
        if !missing.tools.is_empty() {
            bail!("missing: {}", missing.tools.join(", "));
        }
        println!("building");
        repo.show(&mut repo.cargo(&["build", "--package", "agent-linux"]))?;
    }
    let target = repo.target_dir()?;
    let out = options.out.clone().unwrap_or_else(|| target.join("holdfast-rescue.iso"));
    make(repo, &target, &line, &out)?;
    let bytes = fs::metadata(&out)?.len();
    println!(
        "{} ({} MiB): burn it, attach it as a CD drive, or write it onto a USB stick with dd; x86_64, BIOS or UEFI without Secure Boot",
        out.display(),
        bytes >> 20
    );
    Ok(())
}

/// A medium that asks for everything.
pub fn make_asking(repo: &Repo, target: &Path, out: &Path) -> Result<()> {
    make(repo, target, LINE, out)
}

fn kernel_line(options: &Options) -> Result<String> {
    let mut line = LINE.to_owned();
    let given = [
        ("box", "--box", &options.box_address),
        ("token", "--token", &options.token),
        ("name", "--name", &options.name),
        ("ip", "--ip", &options.ip),
    ];
    for (key, flag, value) in given {
        let Some(value) = value else { continue };
        // It goes through GRUB's language, the kernel and a shell.
        let plain = |c: char| c.is_ascii_alphanumeric() || ".:-_/,[]=+".contains(c);
        ensure!(
            !value.is_empty() && value.chars().all(plain),
            "{flag} {value:?}: only letters, digits and . : - _ / , [ ] = + can be written into the medium"
        );
        line += &format!(" holdfast.{key}={value}");
    }
    Ok(line)
}

fn make(repo: &Repo, target: &Path, line: &str, out: &Path) -> Result<()> {
    let kernel = Kernel::debian(GUEST_KERNEL, &target.join("guest"))?;
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent)?;
    // Beside what it becomes: renamed when it is whole.
    let name = out.file_name().context("the medium needs a file name")?.to_string_lossy();
    let work = parent.join(format!(".{name}.making"));
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    let boot = work.join("tree/boot");
    fs::create_dir_all(boot.join("grub"))?;
    initramfs(repo, &kernel, &work)?.write(&boot.join("initrd"))?;
    let mut gzip = Command::new(tools::need("gzip")?);
    // Without its name and time: the same commit makes the same bytes.
    gzip.args(["--no-name", "-6"]).arg(boot.join("initrd"));
    process::run(gzip, PACK_MAX)?.ok()?;
    fs::copy(kernel.image(), boot.join("vmlinuz"))?;
    fs::write(boot.join("grub/grub.cfg"), menu(line))?;
    tools::need("xorriso")?;
    for grub in [tools::GRUB_BIOS, tools::GRUB_UEFI] {
        tools::need(grub)?;
    }
    let made = work.join("medium.iso");
    let mut command = Command::new(tools::need("grub-mkrescue")?);
    command.arg("-o").arg(&made).arg(work.join("tree")).args(["--", "-volid", "HOLDFAST_RESCUE"]);
    process::run(command, PACK_MAX)?.ok()?;
    fs::rename(&made, out)?;
    fs::remove_dir_all(&work)?;
    Ok(())
}

fn menu(line: &str) -> String {
    format!(
        "insmod all_video\n\
         if serial --unit=0 --speed=115200; then\n  terminal_input console serial\n  terminal_output console serial\nfi\n\
         set timeout=3\n\
         menuentry 'Holdfast rescue' {{\n  linux /boot/vmlinuz {line}\n  initrd /boot/initrd.gz\n}}\n"
    )
}

fn initramfs(repo: &Repo, kernel: &Kernel, work: &Path) -> Result<Initramfs> {
    let ours = repo.root.join("image/rescue");
    let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
    let init = String::from_utf8(read(&ours.join("init"))?).context("image/rescue/init")?;
    let mut initramfs = Initramfs::bare(init);
    initramfs.file("bin/busybox", 0o755, read(&tools::need("busybox")?)?);
    for script in ["dhcp", "getent"] {
        initramfs.file(&format!("bin/{script}"), 0o755, read(&ours.join(script))?);
    }
    let us = std::env::current_exe()?;
    let agent = us.parent().context("our own program is in no folder")?.join("holdfast-agent");
    initramfs.file("bin/holdfast-agent", 0o755, read(&agent)?);

    // The modules and a fresh index of just these.
    let from = kernel.root().join("lib/modules").join(&kernel.version);
    let to = work.join("modules/lib/modules").join(&kernel.version);
    let index = fs::read_to_string(from.join("modules.dep")).context("the kernel's index of modules")?;
    for module in wanted(&index) {
        let file = to.join(&module);
        fs::create_dir_all(file.parent().context("a module is in a folder")?)?;
        fs::copy(from.join(&module), &file).with_context(|| format!("copy {module}"))?;
        if let Some(plain) = module.strip_suffix(".xz") {
            let mut unpack = Command::new(tools::need("xz")?);
            unpack.arg("-d").arg(&file);
            process::run(unpack, PACK_MAX)?.ok().with_context(|| format!("unpack {plain}"))?;
        }
    }
    for list in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
        if from.join(list).exists() {
            fs::copy(from.join(list), to.join(list))?;
        }
    }
    let base = work.join("modules").to_string_lossy().into_owned();
    process::call("depmod", &["-b", &base, &kernel.version], PACK_MAX)?;
    let mut files = BTreeMap::new();
    gather(&to, &to, &mut files)?;
    for (name, file) in files {
        if !name.ends_with(".bin") {
            initramfs.file(&format!("lib/modules/{}/{name}", kernel.version), 0o644, read(&file)?);
        }
    }
    Ok(initramfs)
}

fn gather(root: &Path, dir: &Path, found: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            gather(root, &path, found)?;
        } else {
            found.insert(path.strip_prefix(root)?.to_string_lossy().into_owned(), path);
        }
    }
    Ok(())
}

/// The drivers' modules and all they need, from lines like `a.ko: b.ko c.ko`.
fn wanted(index: &str) -> BTreeSet<String> {
    let needs: BTreeMap<&str, &str> = index.lines().filter_map(|l| l.split_once(':')).collect();
    let is_driver = |module: &&str| DRIVERS.iter().any(|d| module.starts_with(d));
    let mut found: BTreeSet<String> = BTreeSet::new();
    let mut next: Vec<&str> = needs.keys().copied().filter(|m| is_driver(m)).collect();
    while let Some(module) = next.pop() {
        if found.insert(module.to_owned()) {
            next.extend(needs.get(module).into_iter().flat_map(|n| n.split_whitespace()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_takes_along_what_it_needs_and_nothing_else() {
        let index = "kernel/drivers/scsi/sd_mod.ko: kernel/lib/crc.ko kernel/block/t10.ko\n\
                     kernel/lib/crc.ko:\nkernel/block/t10.ko: kernel/lib/deep.ko\nkernel/lib/deep.ko:\n\
                     kernel/sound/loud.ko: kernel/lib/crc.ko\n";
        let found: Vec<String> = wanted(index).into_iter().collect();
        assert_eq!(
            found,
            ["kernel/block/t10.ko", "kernel/drivers/scsi/sd_mod.ko", "kernel/lib/crc.ko", "kernel/lib/deep.ko"]
        );
    }

    #[test]
    fn what_is_given_goes_into_the_menu_and_nothing_that_could_be_more_than_a_word() {
        let mut options = Options {
            out: None,
            box_address: Some("[fe80::1]:7440".into()),
            token: Some("ABC.0123".into()),
            name: None,
            ip: Some("192.0.2.9/24,192.0.2.1".into()),
            built: false,
        };
        let line = kernel_line(&options).unwrap();
        assert!(
            line.ends_with(" holdfast.box=[fe80::1]:7440 holdfast.token=ABC.0123 holdfast.ip=192.0.2.9/24,192.0.2.1")
        );
        assert!(menu(&line).contains(&format!("linux /boot/vmlinuz {line}\n")));
        for bad in ["two words", "a;b", "$x", "", "a'b", "a\nb"] {
            options.name = Some(bad.into());
            let refused = kernel_line(&options).unwrap_err().to_string();
            assert!(refused.starts_with("--name"), "{refused}");
        }
    }
}
