#!/usr/bin/env bash
# Makes a deb and an rpm from a folder that describes them; the build.sh of each such folder calls it.
#
#   make-packages.sh --from DIR --name NAME --out DIR --program NAME=PATH… [--only deb|rpm] [--fast]
#
# DIR has `files` (what is installed; its head explains the columns), `deb/` (control, maintainer scripts) and `rpm/NAME.spec`.
# Programs must be linked statically, all for one machine, and of the version in the root Cargo.toml.
#
# Same input, same bytes: every time is SOURCE_DATE_EPOCH (that of the last commit if it is not set), owners are root, names
# are sorted. Nothing is installed; --out gets the finished files only, each moved into place whole.
set -euo pipefail
umask 022
export LC_ALL=C TZ=UTC

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(cd -- "$here/../../.." && pwd)
# Of the packaging, for the same version of the programs.
release=1

fail() {
    echo "make-packages.sh: $*" >&2
    exit 1
}
need() { command -v "$1" >/dev/null || fail "$1 is missing: apt-get install $2"; }

from='' name='' out='' fast='' kinds='deb rpm'
declare -A program=()
while [ $# -gt 0 ]; do
    if [ "$1" = --fast ]; then
        fast=yes && shift
        continue
    fi
    [ $# -ge 2 ] || fail "$1 needs a value"
    case "$1" in
    --from) from=$2 ;;
    --name) name=$2 ;;
    --out) out=$2 ;;
    --program)
        [[ $2 == *=* ]] || fail "--program $2: NAME=PATH is expected"
        program[${2%%=*}]=${2#*=}
        ;;
    --only)
        [[ $2 == deb || $2 == rpm ]] || fail "--only $2: deb or rpm is expected"
        kinds=$2
        ;;
    *) fail "unknown argument $1" ;;
    esac
    shift 2
done
if [ -z "$from" ] || [ -z "$name" ] || [ -z "$out" ]; then fail "--from, --name and --out are needed"; fi

need readelf binutils
for kind in $kinds; do
    if [ "$kind" = deb ]; then need dpkg-deb dpkg; else need rpmbuild rpm; fi
done

# --- Version and time

version=$(sed -n '/^\[workspace\.package\]/,/^\[/s/^version *= *"\([^"]*\)".*/\1/p' "$root/Cargo.toml")
[ -n "$version" ] || fail "$root/Cargo.toml has no version under [workspace.package]"
# 1.0.0-rc.1 comes before 1.0.0 in both formats when it is written with a tilde.
package_version=${version//-/\~}

if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
    SOURCE_DATE_EPOCH=$(git -C "$root" log -1 --format=%ct 2>/dev/null) || SOURCE_DATE_EPOCH=$(stat -c %Y "$root/Cargo.toml")
fi
[[ $SOURCE_DATE_EPOCH =~ ^[0-9]+$ ]] || fail "SOURCE_DATE_EPOCH is $SOURCE_DATE_EPOCH: seconds since 1970 are expected"
export SOURCE_DATE_EPOCH

# --- Programs

# Nothing for what is no program.
machine_of() { (readelf -h "$1" 2>/dev/null || true) | sed -n 's/^ *Machine: *//p'; }

machine=''
for key in "${!program[@]}"; do
    path=${program[$key]}
    [ -f "$path" ] || fail "$path is not there"
    this=$(machine_of "$path")
    [ -n "$this" ] || fail "$path is no program for Linux"
    if [ -n "$machine" ] && [ "$this" != "$machine" ]; then fail "$path is for $this, another program for $machine"; fi
    machine=$this
    headers=$(readelf -lW "$path")
    if [[ $headers == *INTERP* ]]; then fail "$path is not linked statically: it would run on few hosts; build it with +crt-static"; fi
done
case "$machine" in
*X86-64) deb_arch=amd64 rpm_arch=x86_64 ;;
AArch64) deb_arch=arm64 rpm_arch=aarch64 ;;
*) fail "there are no packages for machine \"$machine\"" ;;
esac
if [ "$(uname -m)" = "$rpm_arch" ]; then
    for key in "${!program[@]}"; do
        said=$("${program[$key]}" --version) || fail "${program[$key]} does not run"
        [ "$said" = "$key $version" ] || fail "${program[$key]} is \"$said\", Cargo.toml says $version: build it again"
    done
fi

# --- The tree as it is to be installed

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stage=$work/stage
mkdir "$stage"

mkdir -p "$out"
out=$(cd -- "$out" && pwd)

number=0
while read -r mode source destination what rest; do
    number=$((number + 1))
    if [ -z "$mode" ] || [[ $mode == \#* ]]; then continue; fi
    where="$from/files, line $number"
    [[ $mode =~ ^0[0-7]{3}$ && $destination == /* && -z $rest ]] || fail "$where: mode, source, destination, kind are expected"
    case "$source" in
    -) path='' ;;
    @*)
        path=${program[${source#@}]:-}
        [ -n "$path" ] || fail "$where: no --program ${source#@}=PATH was given"
        ;;
    /*) path=$root$source ;;
    *) path=$from/$source ;;
    esac
    case "$what" in
    dir) install -d -m "$mode" "$stage$destination" && echo "%dir %attr($mode,root,root) $destination" >>"$work/filelist" ;;
    file | config)
        [ -f "$path" ] || fail "$where: $path is not there"
        install -D -m "$mode" "$path" "$stage$destination"
        if [ "$what" = config ]; then
            echo "%config(noreplace) %attr($mode,root,root) $destination" >>"$work/filelist"
            echo "$destination" >>"$work/conffiles"
        else
            echo "%attr($mode,root,root) $destination" >>"$work/filelist"
        fi
        ;;
    *) fail "$where: kind is \"$what\": file, config or dir is expected" ;;
    esac
done <"$from/files"

same_time() { find "$1" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +; }
same_time "$stage"

put() {
    mv -f "$1" "$out/.$2.new"
    mv -f "$out/.$2.new" "$out/$2"
    echo "$out/$2"
}

# --- The packages

make_deb() {
    local tree=$work/deb size script file
    cp -a "$stage" "$tree"
    size=$(du -sk --apparent-size "$stage" | cut -f1)
    install -d -m 0755 "$tree/DEBIAN"
    sed -e "s/@VERSION@/$package_version-$release/" -e "s/@ARCH@/$deb_arch/" -e "s/@INSTALLED_SIZE@/$size/" \
        "$from/deb/control" >"$tree/DEBIAN/control"
    if [ -f "$work/conffiles" ]; then cp "$work/conffiles" "$tree/DEBIAN/conffiles"; fi
    for script in preinst postinst prerm postrm; do
        if [ -f "$from/deb/$script" ]; then install -m 0755 "$from/deb/$script" "$tree/DEBIAN/$script"; fi
    done
    if [ -f "$from/deb/triggers" ]; then install -m 0644 "$from/deb/triggers" "$tree/DEBIAN/triggers"; fi
    (cd "$tree" && find . -path ./DEBIAN -prune -o -type f -printf '%P\0' | sort -z | xargs -0 md5sum) >"$work/md5sums"
    install -m 0644 "$work/md5sums" "$tree/DEBIAN/md5sums"
    same_time "$tree"
    file=${name}_$package_version-${release}_$deb_arch.deb
    # Every dpkg reads xz and gzip; older ones do not know zstd.
    local packing=(-Zxz -z6)
    if [ -n "$fast" ]; then packing=(-Zgzip -z1); fi
    dpkg-deb "${packing[@]}" --root-owner-group --build "$tree" "$work/$file" >"$work/log" || {
        cat "$work/log" >&2
        fail "dpkg-deb failed"
    }
    put "$work/$file" "$file"
}

make_rpm() {
    local file=$name-$package_version-$release.$rpm_arch.rpm payload=w6.xzdio
    if [ -n "$fast" ]; then payload=w1.gzdio; fi
    # The scripts that rpmbuild runs over what is installed would strip the programs and look for what they depend on.
    rpmbuild -bb --quiet --target "$rpm_arch-linux" \
        --define "_topdir $work/rpm" --define "_rpmdir $work" --define "_rpmfilename $file" --define "_tmppath $work" --define "_dbpath $work/rpmdb" \
        --define "version $package_version" --define "release $release" --define "stage $stage" --define "filelist $work/filelist" \
        --define "_binary_payload $payload" --define "_buildhost holdfast" --define "use_source_date_epoch_as_buildtime 1" \
        --define "clamp_mtime_to_source_date_epoch 1" --define "_build_id_links none" --define "debug_package %{nil}" \
        --define "__os_install_post %{nil}" --define "__find_provides %{nil}" --define "__find_requires %{nil}" \
        --define "_use_internal_dependency_generator 0" \
        "$from/rpm/$name.spec" >"$work/log" 2>&1 || {
        cat "$work/log" >&2
        fail "rpmbuild failed"
    }
    put "$work/$file" "$file"
}

for kind in $kinds; do "make_$kind"; done
