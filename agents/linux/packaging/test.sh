#!/usr/bin/env bash
# Tests the packages of agent and box: makes them, looks into them, installs, updates, removes and purges them in a scratch root.
#
#   agents/linux/packaging/test.sh [FOLDER WITH THE BUILT PROGRAMS]
#
# Needs no network; touches nothing outside of a temporary folder, which it removes. What this machine cannot do is printed as
# `SKIPPED: why`. Ends with 0 when everything else held, with 1 and `FAILED: what` at the first thing that did not.
#
# Installing needs root: the maintainer scripts run in a chroot with busybox as their shell and a `systemctl` that notes how it was called.
# Whether the agent works under its unit's restrictions cannot be seen here, only by a guest with systemd.
set -euo pipefail
umask 022
export LC_ALL=C

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(cd -- "$here/../../.." && pwd)
box=$root/appliance/supervisor/packaging
built=${1:-${CARGO_TARGET_DIR:-$root/target}/x86_64-unknown-linux-gnu/debug}

work=$(mktemp -d)
daemon=''
finish() {
    # A child that is killed before it has become its program comes by here too.
    if [ "$BASHPID" != "$$" ]; then return; fi
    if [ -n "$daemon" ]; then kill -KILL "$daemon" 2>/dev/null || true; fi
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 1' INT TERM HUP

fail() {
    echo "FAILED: $*" >&2
    exit 1
}
ok() { echo "ok: $*"; }
skip() { echo "SKIPPED: $*"; }
# same WHAT EXPECTED GOT
same() {
    [ "$2" = "$3" ] || fail "$1:"$'\n'"$(diff -U3 --label expected --label found <(echo "$2") <(echo "$3") || true)"
}
# says TEXT COMMAND…: the command fails and says so
says() {
    local text=$1 said
    shift
    if said=$("$@" 2>&1); then fail "this was not refused: $*"; fi
    [[ $said == *"$text"* ]] || fail "$* was refused, but without \"$text\": $said"
}
# rpm reads packages with a database of its own at hand, even when it is not asked for one.
query() { rpm --dbpath "$work/rpmdb" -qp "$@"; }
has() { command -v "$1" >/dev/null; }

for tool in dpkg dpkg-deb rpm rpmbuild readelf; do has "$tool" || fail "$tool is missing"; done
version=$(sed -n '/^\[workspace\.package\]/,/^\[/s/^version *= *"\([^"]*\)".*/\1/p' "$root/Cargo.toml")

# As they are now: a build may replace them meanwhile.
mkdir "$work/programs"
for program in holdfast-agent holdfastd holdfast; do
    cp "$built/$program" "$work/programs/" || fail "$built/$program is not there: cargo build -p agent-linux -p supervisor -p ctl"
done
built=$work/programs

# --- Building

build_both() {
    "$here/build.sh" --fast --binary "$built/holdfast-agent" --out "$1" || fail "the agent's packages were not made"
    "$box/build.sh" --fast --binaries "$built" --out "$1" || fail "the box's packages were not made"
}
build_both "$work/a" >"$work/made"
(umask 077 && TZ=Asia/Shanghai && export TZ && build_both "$work/b" >/dev/null) || exit 1
same "files made" "$(cd "$work/a" && ls -A)" "$(cd "$work/b" && ls -A)"
[ "$(wc -l <"$work/made")" = 4 ] || fail "four packages are expected, found: $(cat "$work/made")"
while read -r path; do
    cmp "$path" "$work/b/${path##*/}" || fail "${path##*/} is not the same when it is made twice"
done <"$work/made"
ok "four packages, the same when made twice"

says "is not there: cargo build" "$here/build.sh" --binary "$work/none" --out "$work/c"
says "is not there: cargo build" "$box/build.sh" --binaries "$work" --out "$work/c"
says "unknown argument --bianry" "$here/build.sh" --bianry x
mkdir "$work/wrong"
cp "$built/holdfastd" "$work/wrong/holdfast-agent"
says "built without clang" "$here/build.sh" --binary "$work/wrong/holdfast-agent" --out "$work/c"
cp "$(command -v bash)" "$work/wrong/holdfastd" && cp "$built/holdfast" "$work/wrong/holdfast"
if [[ $(readelf -lW "$work/wrong/holdfastd") == *INTERP* ]]; then
    says "not linked statically" "$box/build.sh" --binaries "$work/wrong" --out "$work/c"
fi
cp "$built/holdfast" "$work/wrong/holdfastd"
says "build it again" "$box/build.sh" --binaries "$work/wrong" --out "$work/c"
echo "text" >"$work/wrong/holdfastd"
says "is no program" "$box/build.sh" --binaries "$work/wrong" --out "$work/c"
[ -z "$(ls -A "$work/c" 2>/dev/null)" ] || fail "a refused build left something: $(ls -A "$work/c")"
ok "programs that must not be packed are refused"

# --- Looking into them

# inspect NAME FOLDER SCRIPTS: contents, modes and owners of both packages are those of FOLDER/files
inspect() {
    local name=$1 from=$2 deb=$work/a/${1}_$version-1_amd64.deb rpm=$work/a/$1-$version-1.x86_64.rpm tree=$work/x-$1
    local expected found script
    expected=$(sed '/^#/d' "$from/files" | awk '{ print ($4 == "dir" ? "d" : "-"), $1, $3 }' | sort -k3)
    mkdir "$tree" && dpkg-deb -x "$deb" "$tree"
    # Folders that belong to the system are in a deb too.
    found=$(cd "$tree" && find . -mindepth 1 \( ! -type d -o -path "*/$name" \) -printf '%y 0%m /%P\n' | sed 's/^f/-/' | sort -k3)
    same "$name: contents of the deb" "$expected" "$found"
    dpkg-deb -c "$deb" | awk '$2 != "root/root"' | { ! grep .; } || fail "$name: not everything in the deb is root's"
    [ -z "$(find "$tree" -perm /022)" ] || fail "$name: others may write: $(find "$tree" -perm /022)"
    found=$(query --qf '[%{FILEMODES:perms} 0%{FILEMODES:octal} %{FILENAMES}\n]' "$rpm" |
        awk '{ print substr($1, 1, 1), "0" substr($2, length($2) - 2), $3 }' | sort -k3)
    same "$name: contents of the rpm" "$expected" "$found"
    same "$name: owners in the rpm" "root root" "$(query --qf '[%{FILEUSERNAME} %{FILEGROUPNAME}\n]' "$rpm" | sort -u)"
    found=$(query --qf '[%{FILEDIGESTS} %{FILENAMES}\n]' "$rpm" | awk 'NF == 2 { print $1 "  ." $2 }')
    (cd "$tree" && sha256sum --check --quiet --strict - <<<"$found") || fail "$name: deb and rpm differ"
    same "$name: version of the deb" "$version-1 amd64" "$(dpkg-deb -f "$deb" Version) $(dpkg-deb -f "$deb" Architecture)"
    same "$name: version of the rpm" "$version-1 x86_64" "$(query --qf '%{VERSION}-%{RELEASE} %{ARCH}' "$rpm")"
    expected=$(awk '$4 == "config" { print $3 }' "$from/files")
    same "$name: configuration files" "$expected $expected" "$(dpkg-deb --info "$deb" conffiles) $(query -c "$rpm")"
    for script in postinst prerm postrm; do
        dpkg-deb -I "$deb" "$script" | cmp - "$from/deb/$script" || fail "$name: $script is not the one of the tree"
    done
    if has shellcheck; then
        for script in POSTIN PREUN POSTUN; do
            found=$(query --qf "%{$script}" "$rpm")
            [ "$found" != "(none)" ] || fail "$name: the rpm has no $script"
            shellcheck --shell=sh - <<<"$found" || fail "$name: $script of the rpm"
        done
    else
        skip "shellcheck is missing: the rpm's scripts were not checked"
    fi
    if query --requires "$rpm" | grep -E '\.so|^/.*lib'; then fail "$name: the rpm asks for libraries"; fi
    while read -r _ source destination _; do
        [[ $source == @* ]] || continue
        if [[ $(readelf -lW "$tree$destination") == *INTERP* ]]; then fail "$destination is not static"; fi
        # ldd's exit code differs between versions, its words do not.
        [[ $(ldd "$tree$destination" 2>&1) =~ statically|"not a dynamic" ]] || fail "ldd finds libraries of $destination"
        cmp "$built/${source#@}" "$tree$destination" || fail "$destination is not what was built"
        same "$destination --version" "${source#@} $version" "$("$tree$destination" --version)"
    done <"$from/files"
    ok "$name: contents, modes, owners, scripts; static, and runs from where it was unpacked"
}
inspect holdfast-agent "$here"
inspect holdfast "$box"
[[ $(query --scripts "$work/a/holdfast-agent-$version-1.x86_64.rpm") == *"/usr/bin/holdfast-agent remove"* ]] ||
    fail "removing the rpm leaves capture in the kernel"

# --- Hooks

if has shellcheck; then
    for hook in "$here"/hooks/system-shutdown "$here"/hooks/early.sh "$here"/hooks/generator "$here"/hooks/*/*; do
        shellcheck "$hook" || fail "${hook#"$here"/}"
    done
else
    skip "shellcheck is missing: the hooks were not checked"
fi
# They must never keep a host from going down or coming up.
hooks=$work/hooks
mkdir -p "$hooks/root/var/lib/holdfast-agent"
touch "$hooks/root/var/lib/holdfast-agent/identity.json"
cat >"$hooks/agent" <<END
#!/bin/sh
echo "\$*" >>"$hooks/calls"
exit 7
END
chmod +x "$hooks/agent"
for hook in system-shutdown early.sh; do
    sed "s|^agent=.*|agent=$hooks/agent|" "$here/hooks/$hook" >"$hooks/$hook"
done
# Nothing is mounted for a test.
mkdir "$hooks/bin"
printf '#!/bin/sh\nexit 0\n' >"$hooks/bin/mount"
chmod +x "$hooks/bin/mount"
PATH=$hooks/bin:$PATH
sh "$hooks/system-shutdown" reboot || fail "the shutdown hook fails when the agent does"
sh "$hooks/early.sh" "$hooks/root" || fail "the boot hook fails when the agent does"
sh "$hooks/early.sh" "$hooks/none" || fail "the boot hook fails without state"
sh "$hooks/early.sh" --device "$hooks/none" || fail "the boot hook fails without a device"
calls="carry-out;early --sysroot $hooks/root"
for device in /dev/*; do
    if [ -b "$device" ]; then
        sh "$hooks/early.sh" --device "$device" || fail "the boot hook fails when the agent does, before the mount"
        calls="$calls;early --device $device"
        break
    fi
done
same "calls of the hooks" "$calls" "$(paste -sd';' "$hooks/calls")"
rm "$hooks/agent"
sh "$hooks/system-shutdown" reboot || fail "the shutdown hook fails without the agent"
sh "$hooks/early.sh" "$hooks/root" || fail "the boot hook fails without the agent"
PATH=${PATH#"$hooks/bin:"}
ok "hooks: checked, call the agent, never fail"

# The generator: units of the plan get the condition, what is no unit's name gets nothing, a box's machine and a host without a plan neither.
generate() {
    rm -rf "$hooks/made"
    mkdir "$hooks/made"
    sh "$hooks/generator" "$hooks/made" "$hooks/made" "$hooks/made" || fail "the generator fails"
    (cd "$hooks/made" && find . ! -type d | sort | paste -sd' ')
}
sed -e "s|^gate=.*|gate=$hooks/gate|" -e "s|^dmi=.*|dmi=$hooks/dmi|" "$here/hooks/generator" >"$hooks/generator"
same "no plan" "" "$(generate)"
mkdir "$hooks/gate"
printf 'postgresql@15-main.service\n../x.service\n\na b.service\n.service\nweb.service\n' >"$hooks/gate/units"
same "half a plan" "" "$(generate)"
printf '[Unit]\nConditionPathExists=|/x\n' >"$hooks/gate/condition.conf"
expected="./postgresql@15-main.service.d/60-holdfast.conf ./sysinit.target.wants/holdfast-gate.service ./web.service.d/60-holdfast.conf"
same "a plan" "$expected" "$(generate)"
cmp "$hooks/gate/condition.conf" "$hooks/made/web.service.d/60-holdfast.conf" || fail "the condition is another"
printf 'QEMU\0holdfast.takeover=drill\0' >"$hooks/dmi"
same "a machine that a box runs" "" "$(generate)"
ok "generator: holds the plan's units, and nothing else"

# --- The examples of configurations are what the programs accept

# Every key, with the `#` before it removed.
all_keys() { sed -E 's/^#([a-z_]+ = )/\1/' "$1"; }
agent=$work/x-holdfast-agent/usr/bin/holdfast-agent
[ "$(all_keys "$here/config.toml" | grep -cE '^[a-z_]+ = ')" -ge 10 ] || fail "config.toml: keys are missing"
all_keys "$here/config.toml" >"$work/all.toml"
{ cat "$here/config.toml" && echo 'levle = "info"'; } >"$work/wrong.toml"
"$agent" --config "$here/config.toml" disks >/dev/null || fail "the agent does not accept its config.toml"
"$agent" --config "$work/all.toml" disks >/dev/null || fail "the agent does not accept its config.toml with every key"
says levle "$agent" --config "$work/wrong.toml" disks
ok "the agent accepts its config.toml, with and without every key"

# Starts the packed holdfastd with a configuration and stops it again.
try_box() {
    local what=$1 deadline=$((SECONDS + 60)) code=0
    shift
    # Without the `READY` of the one before.
    : >"$work/said"
    "$work/x-holdfast/usr/bin/holdfastd" "$@" --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0 >"$work/said" 2>"$work/log" &
    daemon=$!
    until grep -q '^READY ' "$work/said"; do
        kill -0 "$daemon" 2>/dev/null || fail "$what: $(cat "$work/log")"
        [ "$SECONDS" -lt "$deadline" ] || fail "$what: not ready within 60 s: $(cat "$work/log")"
        sleep 0.02
    done
    kill -TERM "$daemon"
    wait "$daemon" || code=$?
    daemon=''
    [ "$code" = 0 ] || fail "$what: holdfastd ended with $code: $(cat "$work/log")"
}
try_box "holdfast.toml" --config "$box/holdfast.toml" --data "$work/d1"
[ "$(all_keys "$box/holdfast.toml" | grep -cE '^[a-z_]+ = ')" -ge 15 ] || fail "holdfast.toml: keys are missing"
all_keys "$box/holdfast.toml" | sed -e "s|/var/lib/holdfast|$work/d2|" >"$work/all.toml"
try_box "holdfast.toml with every key" --config "$work/all.toml" --nbd-listen 127.0.0.1:0
[ -d "$work/d2/run" ] || fail "holdfastd did not go by its holdfast.toml"
{ cat "$box/holdfast.toml" && echo 'dpeth = 4'; } >"$work/wrong.toml"
says dpeth "$work/x-holdfast/usr/bin/holdfastd" --config "$work/wrong.toml" --data "$work/d3"
ok "the box accepts its holdfast.toml, with and without every key, starts with it and stops with 0"

# --- Units

# unit FILE EXPOSURE: it parses, and `systemd-analyze security` finds no more exposure (0 to 100) than when its limits were chosen.
unit() {
    local file=$work/unit/${1##*/} said
    mkdir -p "$work/unit"
    # The program is not installed here.
    sed -E 's|^ExecStart=[^ ]+|ExecStart=/bin/sh|' "$1" >"$file"
    said=$(systemd-analyze verify "$file" 2>&1) || fail "${1##*/}: $said"
    if grep -F "${1##*/}" <<<"$said"; then fail "${1##*/} has a fault"; fi
    if [[ $(systemd-analyze --help) == *--offline* ]]; then
        systemd-analyze security --no-pager --offline=true --threshold="$2" "$file" >"$work/log" 2>&1 ||
            fail "${1##*/} is more exposed than it was: $(tail -n 1 "$work/log")"
    fi
}
# What would be missed only when it is too late: the unit says why each is so.
for line in KillMode=process RuntimeDirectoryPreserve=yes StateDirectoryMode=0700 Type=notify Restart=always; do
    grep -qx "$line" "$here/holdfast-agent.service" || fail "holdfast-agent.service does not say $line"
done
if grep -E '^(ProtectHome|PrivateTmp|PrivateDevices|InaccessiblePaths|ProtectKernelTunables)=' "$here/holdfast-agent.service"; then
    fail "holdfast-agent.service hides what the agent has to see"
fi
if has systemd-analyze; then
    unit "$here/holdfast-agent.service" 41
    # No sandbox: it does what the plan says.
    unit "$here/holdfast-inside.service" 100
    unit "$here/holdfast-gate.service" 100
    # As its user, not as the agent.
    unit "$here/holdfast-script@.service" 100
    unit "$box/holdfastd.service" 22
    ok "units parse"
else
    skip "systemd-analyze is missing: units were not checked"
fi

# --- Installing, updating, removing, purging

if [ "$(id -u)" != 0 ]; then
    skip "not root: packages were not installed in a scratch root"
    exit 0
fi
if ! has busybox; then
    skip "busybox is missing: packages were not installed in a scratch root"
    exit 0
fi
[[ $(readelf -lW "$(command -v busybox)") != *INTERP* ]] || {
    skip "busybox is not static: packages were not installed in a scratch root"
    exit 0
}

# A root with a shell, and a systemctl that notes its calls; running systemd is pretended.
scratch() {
    scratch=$work/$1
    mkdir -p "$scratch"/{bin,etc,run/systemd/system,var/lib/dpkg/{info,updates,triggers},var/lib/rpm,tmp,usr/bin,dev,sys/fs/bpf}
    touch "$scratch/var/lib/dpkg/status" "$scratch/var/lib/dpkg/available" "$scratch/dev/null"
    cp "$(command -v busybox)" "$scratch/bin/busybox"
    for applet in sh rm rmdir cat; do ln -s busybox "$scratch/bin/$applet"; done
    cat >"$scratch/usr/bin/systemctl" <<'END'
#!/bin/sh
echo "$*" >>/calls
case "$*" in *is-active*) exit 3 ;; esac
END
    chmod 0755 "$scratch/usr/bin/systemctl"
}
# calls COMMAND…: how it called systemctl, in one line
calls() {
    rm -f "$scratch/calls"
    "$@" >"$work/log" 2>&1 || fail "$*: $(cat "$work/log")"
    if [ -f "$scratch/calls" ]; then paste -sd';' "$scratch/calls"; fi
}
deb() { dpkg --root="$scratch" --force-not-root --log=/dev/null "$@"; }
pin() {
    mkdir -p "$scratch/sys/fs/bpf/holdfast"
    touch "$scratch/sys/fs/bpf/holdfast/link-issue" "$scratch/sys/fs/bpf/holdfast/ring"
}
enrolled() {
    install -d -m 0700 "$scratch/var/lib/holdfast-agent"
    echo '{}' >"$scratch/var/lib/holdfast-agent/identity.json"
}
none() { for path in "$@"; do [ ! -e "$scratch$path" ] || fail "$path was left: $(ls -lAR "$scratch$path")"; done; }

scratch agent-deb
package=$work/a/holdfast-agent_$version-1_amd64.deb
same "first installation" "--quiet enable holdfast-agent.service;daemon-reload" "$(calls deb -i "$package")"
grep -q "holdfast-agent enrol --box" "$work/log" || fail "the next command is not said: $(cat "$work/log")"
same "update" "daemon-reload;try-restart holdfast-agent.service;" "$(calls deb -i "$package");"
pin
same "removal, never enrolled" "stop holdfast-agent.service;daemon-reload" "$(calls deb -r holdfast-agent)"
none /sys/fs/bpf/holdfast /var/lib/holdfast-agent /run/holdfast-agent /usr/bin/holdfast-agent
[ -f "$scratch/etc/holdfast-agent/config.toml" ] || fail "removing took the configuration along"
enrolled
calls deb -i "$package" >/dev/null
grep -q "enrolled, and not running: systemctl start" "$work/log" || fail "the next command is not said: $(cat "$work/log")"
# A configuration that cannot be read, and capture in the kernel at the usual place.
echo 'ring_mib = "big"' >"$scratch/etc/holdfast-agent/config.toml"
pin
calls deb -r holdfast-agent >/dev/null
grep -q "line 1" "$work/log" || fail "it is not said what is wrong with the configuration: $(cat "$work/log")"
none /sys/fs/bpf/holdfast
[ -f "$scratch/var/lib/holdfast-agent/identity.json" ] || fail "removing took the identity along"
calls deb -P holdfast-agent >/dev/null
none /var/lib/holdfast-agent /run/holdfast-agent /etc/holdfast-agent /usr/share/holdfast-agent /usr/lib/systemd/system-generators/holdfast-agent
# What cannot be taken out of the kernel keeps the package, and the agent is started again.
calls deb -i "$package" >/dev/null
mkdir -p "$scratch/sys/fs/bpf/holdfast/link-issue"
rm -f "$scratch/calls"
says "the package stays installed" deb -r holdfast-agent
same "removal that failed" "start holdfast-agent.service" "$(tail -n 1 "$scratch/calls")"
[ -x "$scratch/usr/bin/holdfast-agent" ] || fail "the package is gone, and capture still in the kernel"
rmdir "$scratch/sys/fs/bpf/holdfast/link-issue"
calls deb -P holdfast-agent >/dev/null
none /sys/fs/bpf/holdfast /var/lib/holdfast-agent /run/holdfast-agent /etc/holdfast-agent
ok "the agent's deb: installed, updated, removed, purged; nothing left"

scratch box-deb
package=$work/a/holdfast_$version-1_amd64.deb
same "first installation" "--quiet enable holdfastd.service;daemon-reload" "$(calls deb -i "$package")"
grep -q "holdfast host token" "$work/log" || fail "the next command is not said: $(cat "$work/log")"
same "update" "daemon-reload;try-restart holdfastd.service" "$(calls deb -i "$package")"
mkdir -p "$scratch/var/lib/holdfast/groups"
same "removal" "stop holdfastd.service;daemon-reload" "$(calls deb -r holdfast)"
calls deb -P holdfast >/dev/null
grep -q "stays in /var/lib/holdfast" "$work/log" || fail "it is not said that history stays: $(cat "$work/log")"
[ -d "$scratch/var/lib/holdfast/groups" ] || fail "a purge took the history along"
none /etc/holdfast /usr/bin/holdfastd /usr/bin/holdfast
ok "the box's deb: installed, updated, removed, purged; history stays"

# Debian's rpm wants to be told that it is meant.
rpm_options=(--nodeps --nosignature)
if rpm --force-debian --version >/dev/null 2>&1; then rpm_options+=(--force-debian); fi
rpm_in() { rpm --root "$scratch" --dbpath /var/lib/rpm "${rpm_options[@]}" "$@"; }
# What rpm runs at the end of an update: a second version to update to would have to be built.
updated() { chroot "$scratch" /bin/sh -s 1 <<<"$(query --qf '%{POSTUN}' "$1")"; }

scratch agent-rpm
package=$work/a/holdfast-agent-$version-1.x86_64.rpm
same "first installation" "--quiet enable holdfast-agent.service;daemon-reload" "$(calls rpm_in -i "$package")"
grep -q "holdfast-agent enrol --box" "$work/log" || fail "the next command is not said: $(cat "$work/log")"
same "modes as installed" "755 700" "$(stat -c %a "$scratch/usr/bin/holdfast-agent") $(enrolled && stat -c %a "$scratch/var/lib/holdfast-agent")"
pin
same "update" "daemon-reload;try-restart holdfast-agent.service" "$(calls updated "$package")"
same "removal" "stop holdfast-agent.service;--quiet disable holdfast-agent.service;daemon-reload" "$(calls rpm_in -e holdfast-agent)"
none /sys/fs/bpf/holdfast /usr/bin/holdfast-agent /usr/share/holdfast-agent
[ -f "$scratch/var/lib/holdfast-agent/identity.json" ] || fail "removing took the identity along"
ok "the agent's rpm: installed, removed"

scratch box-rpm
package=$work/a/holdfast-$version-1.x86_64.rpm
same "first installation" "--quiet enable holdfastd.service;daemon-reload" "$(calls rpm_in -i "$package")"
same "update" "daemon-reload;try-restart holdfastd.service" "$(calls updated "$package")"
mkdir -p "$scratch/var/lib/holdfast/groups"
same "removal" "stop holdfastd.service;--quiet disable holdfastd.service;daemon-reload" "$(calls rpm_in -e holdfast)"
[ -d "$scratch/var/lib/holdfast/groups" ] || fail "removing took the history along"
none /usr/bin/holdfastd
ok "the box's rpm: installed, removed; history stays"
