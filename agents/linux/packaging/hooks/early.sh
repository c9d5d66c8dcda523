#!/bin/sh
# Run in the initramfs, with the root file system mounted read-only at $1: capture begins before the host's first write.
# Whatever happens here, the host boots: without it the disks are compared once the agent runs.

root=${1:?}
agent=/usr/bin/holdfast-agent
# In the initramfs itself, which is gone once the host is up: capture begins once in a boot, and only then are there no writes yet.
begun=/holdfast-begun

[ -x "$agent" ] || exit 0
[ ! -e "$begun" ] || exit 0
# Not enrolled, or /var is a file system of its own, which is not there yet.
[ -e "$root/var/lib/holdfast-agent/identity.json" ] || exit 0
# Only what every initramfs has: Debian's comes without grep.
there=''
while read -r _ on what _; do
    if [ "$on $what" = "/sys/fs/bpf bpf" ]; then there=yes; fi
done </proc/mounts
if [ -z "$there" ]; then
    mount -t bpf -o nosuid,nodev,noexec,mode=700 bpf /sys/fs/bpf || exit 0
fi
if command -v timeout >/dev/null 2>&1; then
    timeout 60 "$agent" early --sysroot "$root" && : >"$begun"
else
    "$agent" early --sysroot "$root" && : >"$begun"
fi
exit 0
