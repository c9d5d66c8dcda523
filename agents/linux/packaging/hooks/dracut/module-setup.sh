#!/bin/bash
# dracut module: capture begins before the root file system is mounted. Becomes part of the next initramfs that is made (`dracut -f`).

check() {
    require_binaries /usr/bin/holdfast-agent || return 1
    return 0
}

depends() {
    return 0
}

installkernel() {
    if [ -s /etc/holdfast-agent/shims ]; then
        instmods dm-mod
    fi
}

install() {
    inst_binary /usr/bin/holdfast-agent
    inst_multiple -o mount timeout
    inst_script /usr/share/holdfast-agent/early.sh /usr/share/holdfast-agent/early.sh
    # Disks that get a volume of the device mapper laid over them (`holdfast-agent shim`).
    if [ -s /etc/holdfast-agent/shims ]; then
        inst_simple /etc/holdfast-agent/shims
        inst_rules 59-holdfast-shim.rules
        inst_multiple -o modprobe sh
    fi
    # shellcheck disable=SC2154 # dracut sets moddir
    # After what resumes from a disk, which is at 10.
    inst_hook pre-mount 90 "$moddir/holdfast-premount.sh"
    inst_hook pre-pivot 05 "$moddir/holdfast-early.sh"
}
