#!/usr/bin/env bash
# Makes the agent's packages, deb and rpm, from a built static binary. Installs nothing.
#
#   agents/linux/packaging/build.sh [--out DIR] [--binary PATH] [--only deb|rpm] [--fast]
#
# Without --binary: holdfast-agent as `cargo build -p agent-linux` leaves it. --fast packs quickly instead of small.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(cd -- "$here/../../.." && pwd)
built=${CARGO_TARGET_DIR:-$root/target}/x86_64-unknown-linux-gnu/debug
binary=$built/holdfast-agent
out=$root/target/packages
more=()

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$here/build.sh"; }
fail() {
    echo "build.sh: $*" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    case "$1" in
    --out | --binary | --only)
        [ $# -ge 2 ] || fail "$1 needs a value"
        case "$1" in
        --out) out=$2 ;;
        --binary) binary=$2 ;;
        --only) more+=("$1" "$2") ;;
        esac
        shift 2
        ;;
    --fast) more+=("$1") && shift ;;
    --help) usage && exit ;;
    *) fail "unknown argument $1; see --help" ;;
    esac
done

[ -f "$binary" ] || fail "$binary is not there: cargo build -p agent-linux, or give another with --binary"
# The kernel half of capture is an object of machine type 247 (BPF) inside the program; a build without clang has none.
LC_ALL=C grep -aqP '\x7fELF\x02\x01\x01\x00{9}\x01\x00\xf7\x00' "$binary" ||
    fail "$binary was built without clang and cannot capture: install clang and build it again"

exec "$here/make-packages.sh" --from "$here" --name holdfast-agent --out "$out" --program "holdfast-agent=$binary" "${more[@]}"
