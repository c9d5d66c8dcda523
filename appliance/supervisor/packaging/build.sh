#!/usr/bin/env bash
# Makes the box's packages, deb and rpm, from built static binaries. Installs nothing.
#
#   appliance/supervisor/packaging/build.sh [--out DIR] [--binaries DIR] [--only deb|rpm] [--fast]
#
# Without --binaries: holdfastd and holdfast as `cargo build -p supervisor -p ctl` leaves them. --fast packs quickly instead of small.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(cd -- "$here/../../.." && pwd)
binaries=${CARGO_TARGET_DIR:-$root/target}/x86_64-unknown-linux-gnu/debug
out=$root/target/packages
more=()

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$here/build.sh"; }
fail() {
    echo "build.sh: $*" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    case "$1" in
    --out | --binaries | --only)
        [ $# -ge 2 ] || fail "$1 needs a value"
        case "$1" in
        --out) out=$2 ;;
        --binaries) binaries=$2 ;;
        --only) more+=("$1" "$2") ;;
        esac
        shift 2
        ;;
    --fast) more+=("$1") && shift ;;
    --help) usage && exit ;;
    *) fail "unknown argument $1; see --help" ;;
    esac
done

for program in holdfastd holdfast; do
    [ -f "$binaries/$program" ] ||
        fail "$binaries/$program is not there: cargo build -p supervisor -p ctl, or give another folder with --binaries"
done

exec "$root/agents/linux/packaging/make-packages.sh" --from "$here" --name holdfast --out "$out" \
    --program "holdfastd=$binaries/holdfastd" --program "holdfast=$binaries/holdfast" "${more[@]}"
