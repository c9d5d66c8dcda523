#!/bin/sh
# Run in the initramfs, twice: before the root file system is mounted (`--device` and what it is mounted from), and, should capture not
# have begun then, when it is mounted read-only at $1. Capture begins before the host's first write.
# Whatever happens here, the host boots: without it the disks are compared once the agent runs.

agent=/usr/bin/holdfast-agent
# In the initramfs itself, which is gone once the host is up: capture begins once in a boot, and only then are there no writes yet.
begun=/holdfast-begun

[ -x "$agent" ] || exit 0
[ ! -e "$begun" ] || exit 0
if [ "${1:?}" = --device ]; then
    # A name that udev did not make a device of, or a file system on the network.
    [ -b "${2:-}" ] || exit 0
    set -- --device "$2"
else
    # Not enrolled, or /var is a file system of its own, which is not there yet.
    [ -e "$1/var/lib/holdfast-agent/identity.json" ] || exit 0
    set -- --sysroot "$1"
fi
# Only what every initramfs has: Debian's comes without grep.
there=''
while read -r _ on what _; do
    if [ "$on $what" = "/sys/fs/bpf bpf" ]; then there=yes; fi
done </proc/mounts
if [ -z "$there" ]; then
    mount -t bpf -o nosuid,nodev,noexec,mode=700 bpf /sys/fs/bpf || exit 0
fi
if command -v timeout >/dev/null 2>&1; then
    timeout 60 "$agent" early "$@" && : >"$begun"
else
    "$agent" early "$@" && : >"$begun"
fi
exit 0
