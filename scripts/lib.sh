# Shared by the scripts in this directory; sourced, never run.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PROJECT=firezone-lab
LAB_FILE=$ROOT/compose/lab.yaml
GATEWAY_IMAGE=firezone-gateway:lab
LAB_IMAGE=firezone-lab:latest
TOOLS_IMAGE=firezone-lab-tools:latest
BASE_IMAGE=firezone-lab-base:bookworm
BINARIES=(firezone-gateway lab-portal lab-client lab-web lab-collector)
STAGE=$ROOT/target/lab-images
LOGS=$ROOT/target/lab-logs
# Remembers what has to be undone; lives as long as the machine is up.
RUN_DIR=/run/firezone-lab

if [ -t 1 ]; then BOLD=$'\e[1m' RED=$'\e[31m' GREEN=$'\e[32m' DIM=$'\e[2m' PLAIN=$'\e[0m'
else BOLD='' RED='' GREEN='' DIM='' PLAIN=''; fi

step() { printf '%s==>%s %s\n' "$BOLD" "$PLAIN" "$*"; }
note() { printf '    %s\n' "$*"; }
good() { printf '    %sok%s %s\n' "$GREEN" "$PLAIN" "$*"; }
fail() { printf '    %sFAILED%s %s\n' "$RED" "$PLAIN" "$*"; }
die()  { printf '%serror:%s %s\n' "$RED" "$PLAIN" "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# The comment block at the top of a script is its help text.
show_help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif have sudo; then sudo "$@"
    else die "this needs root: $* (run the script as root, or install sudo)"; fi
}

# Runs a long command quietly: its output goes to a file that is shown when it fails.
quietly() {
    local log=$LOGS/${LOG_PREFIX:-}$1.log; shift
    mkdir -p "$LOGS"
    if ! "$@" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        die "this failed: $* (whole output: $log)"
    fi
}

# ---------------------------------------------------------------- packages

APT_UPDATED=
apt_install() {
    if ! have apt-get; then
        die "missing here: $*. Only Debian and its relatives are set up automatically; install these with your package manager and run this again."
    fi
    step "Installing $*"
    if [ -z "$APT_UPDATED" ]; then quietly apt-update as_root apt-get update; APT_UPDATED=1; fi
    quietly apt-install as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

# need COMMAND PACKAGE [COMMAND PACKAGE]...: installs in one go what is missing.
need() {
    local missing=()
    while [ $# -gt 0 ]; do
        have "$1" || [ -x "/usr/sbin/$1" ] || missing+=("$2")
        shift 2
    done
    [ ${#missing[@]} = 0 ] || apt_install "${missing[@]}"
}

# ---------------------------------------------------------------- Docker

DOCKER=(docker)
COMPOSE=()

docker_answers() {
    if docker version >/dev/null 2>&1; then DOCKER=(docker); return 0; fi
    # The daemon may be up and only this user not be in its group.
    if [ "$(id -u)" != 0 ] && have sudo && sudo docker version >/dev/null 2>&1; then
        DOCKER=(sudo docker); return 0
    fi
    return 1
}

wait_for_docker() {
    local end=$((SECONDS + $1))
    until docker_answers; do [ $SECONDS -lt $end ] || return 1; sleep 0.5; done
}

remember() { as_root mkdir -p "$RUN_DIR"; printf '%s\n' "$2" | as_root tee "$RUN_DIR/$1" >/dev/null; }

start_docker() {
    # On a busy machine a running daemon may miss one question.
    if as_root kill -0 "$(cat /var/run/docker.pid 2>/dev/null)" 2>/dev/null && wait_for_docker 30; then return 0; fi
    step "Starting Docker"
    if [ -d /run/systemd/system ] && have systemctl; then
        as_root systemctl start docker >/dev/null 2>&1 || true
        wait_for_docker 20 && { remember dockerd "systemctl stop docker"; return 0; }
    elif have service; then
        # This can come back with success and no daemon, for example where it may not mount cgroups.
        as_root service docker start >/dev/null 2>&1 || true
        wait_for_docker 5 && { remember dockerd "service docker stop"; return 0; }
        as_root service docker stop >/dev/null 2>&1 || true
    fi
    as_root mkdir -p "$RUN_DIR"
    # A new session, so that Ctrl-C in this terminal does not take the daemon along.
    as_root setsid -f sh -c "echo \$\$ >$RUN_DIR/dockerd.pid; PATH=\$PATH:/usr/sbin:/sbin exec dockerd >$RUN_DIR/dockerd.log 2>&1 </dev/null"
    wait_for_docker 30 || { as_root tail -n 20 "$RUN_DIR/dockerd.log" >&2; die "dockerd does not come up (log: $RUN_DIR/dockerd.log)"; }
    remember dockerd "kill $(as_root cat "$RUN_DIR/dockerd.pid")"
    note "dockerd runs in the background, log in $RUN_DIR/dockerd.log"
}

# Stops the daemon if these scripts started it and nobody else has come to use it.
stop_docker_if_ours() {
    [ -e "$RUN_DIR/dockerd" ] || return 0
    if docker_answers && [ -n "$("${DOCKER[@]}" ps -aq)" ]; then
        note "other containers exist, so Docker keeps running"
        return 0
    fi
    # shellcheck disable=SC2046  # words of a command we wrote ourselves
    as_root $(as_root cat "$RUN_DIR/dockerd") >/dev/null 2>&1 || true
    as_root rm -rf "$RUN_DIR"
}

find_compose() {
    local sudo=()
    [ "${DOCKER[0]}" = sudo ] && sudo=(sudo)
    if "${DOCKER[@]}" compose version >/dev/null 2>&1; then COMPOSE=("${DOCKER[@]}" compose)
    elif have docker-compose; then COMPOSE=("${sudo[@]}" docker-compose)
    else return 1; fi
}

have_dockerd() { have dockerd || [ -x /usr/sbin/dockerd ]; }

ensure_docker() {
    if ! docker_answers; then
        if ! have docker || ! have_dockerd; then
            have apt-get || die "no Docker answers here. Start yours, or install it (https://docs.docker.com/engine/install/) with the compose plugin, and run this again."
            # iptables: the daemon cannot make a network without it.
            apt_install docker.io iptables
        fi
        start_docker
    fi
    find_compose && return 0
    # Debian's compose and Docker's own packages exclude each other.
    if dpkg -s docker-ce >/dev/null 2>&1; then apt_install docker-compose-plugin; else apt_install docker-compose; fi
    find_compose || die "neither 'docker compose' nor 'docker-compose' works; install the compose plugin"
}

compose() { "${COMPOSE[@]}" -p "$PROJECT" -f "$LAB_FILE" "$@"; }
image_exists() { "${DOCKER[@]}" image inspect "$1" >/dev/null 2>&1; }
container() { printf '%s-%s' "$PROJECT" "$1"; }
inside() { local c; c=$(container "$1"); shift; "${DOCKER[@]}" exec "$c" "$@"; }

# ---------------------------------------------------------------- Rust

RUST_USER=()

rust_is_enough() {
    have cargo || return 1
    local wanted found
    wanted=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$ROOT/Cargo.toml" | head -n 1)
    found=$("${RUST_USER[@]}" cargo --version 2>/dev/null | awk '{ print $2 }')
    [ -n "$found" ] && [ "$(printf '%s\n%s\n' "$wanted" "$found" | sort -V | head -n 1)" = "$wanted" ]
}

# Finds a usable cargo. Under sudo that is often the calling user's own: it is then run as
# that user, so that neither target/ nor ~/.cargo ends up owned by root.
find_cargo() {
    local home
    if [ -d "$HOME/.cargo/bin" ]; then PATH=$HOME/.cargo/bin:$PATH; fi
    rust_is_enough && return 0
    if [ "$(id -u)" = 0 ] && [ -n "${SUDO_USER:-}" ] && [ "$SUDO_USER" != root ]; then
        home=$(getent passwd "$SUDO_USER" | cut -d: -f6)
        if [ -x "$home/.cargo/bin/cargo" ]; then
            PATH=$home/.cargo/bin:$PATH
            RUST_USER=(sudo -u "$SUDO_USER" -H env "PATH=$PATH")
            rust_is_enough && return 0
        fi
    fi
    return 1
}

install_rust() {
    have curl || apt_install curl ca-certificates
    step "Installing Rust with rustup"
    curl -fsS --max-time 20 https://static.rust-lang.org/rustup/release-stable.toml >/dev/null 2>&1 || return 1
    curl -fsSL --max-time 60 https://sh.rustup.rs -o /tmp/rustup-init.sh || return 1
    quietly rustup sh /tmp/rustup-init.sh -y --profile minimal --component clippy,rustfmt --no-modify-path
    rm -f /tmp/rustup-init.sh
    find_cargo
}

need_compiler() { need cc build-essential; }
cargo() { "${RUST_USER[@]}" env cargo "$@"; }
host_triple() { "${RUST_USER[@]}" rustc -vV | sed -n 's/^host: //p'; }
target_dir() { printf '%s' "${CARGO_TARGET_DIR:-$ROOT/target}"; }

# ---------------------------------------------------------------- binaries and images

build_with_cargo() {
    local triple bins=() b
    need_compiler
    triple=$(host_triple)
    for b in "${BINARIES[@]}"; do bins+=(--bin "$b"); done
    step "Building static binaries ${DIM}(a few minutes the first time)${PLAIN}"
    # --target even for this very machine: procedural macros must not see +crt-static.
    (cd "$ROOT" && "${RUST_USER[@]}" env RUSTFLAGS='-C target-feature=+crt-static' \
        cargo build --release --locked --workspace --target "$triple" "${bins[@]}") ||
        die "the build failed"
    collect_binaries "$(target_dir)/$triple/release"
}

build_with_docker() {
    local id
    step "Building static binaries inside Docker ${DIM}(several minutes the first time)${PLAIN}"
    "${DOCKER[@]}" build -f "$ROOT/docker/Dockerfile" --target build \
        --build-arg 'CARGO_BINS=--workspace --bins' -t firezone-lab-build:latest "$ROOT" || return 1
    id=$("${DOCKER[@]}" create firezone-lab-build:latest true)
    rm -rf "$STAGE/out" && mkdir -p "$STAGE"
    "${DOCKER[@]}" cp "$id:/out" "$STAGE/out"
    "${DOCKER[@]}" rm "$id" >/dev/null
    collect_binaries "$STAGE/out"
}

collect_binaries() {
    local b
    mkdir -p "$STAGE/gateway" "$STAGE/lab/bin"
    for b in "${BINARIES[@]}"; do
        [ -x "$1/$b" ] || die "the build made no $b"
        if [ "$b" = firezone-gateway ]; then cp "$1/$b" "$STAGE/gateway/"; else cp "$1/$b" "$STAGE/lab/bin/"; fi
    done
    cp "$ROOT/docker/lab-entrypoint" "$STAGE/lab/"
}

registry_reachable() { timeout 60 "${DOCKER[@]}" pull -q "$1" >/dev/null 2>&1; }

build_binaries() {
    if find_cargo; then build_with_cargo; return; fi
    if registry_reachable "$(sed -n 's/^ARG RUST_IMAGE=//p' "$ROOT/docker/Dockerfile")"; then
        build_with_docker || die "the build inside Docker failed"
        return
    fi
    install_rust || die "cannot build: no recent Rust here, no container registry and no https://sh.rustup.rs reachable. Install Rust $(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$ROOT/Cargo.toml" | head -n 1) or newer and run this again."
    build_with_cargo
}

# A Debian to put the lab's tools on: pulled where there is a registry, else made here.
ensure_base() {
    image_exists "$BASE_IMAGE" && return 0
    local slim=debian:bookworm-slim had_slim='' rootfs
    image_exists "$slim" && had_slim=1
    if [ -n "$had_slim" ] || registry_reachable "$slim"; then
        "${DOCKER[@]}" tag "$slim" "$BASE_IMAGE"
        [ -n "$had_slim" ] || "${DOCKER[@]}" rmi "$slim" >/dev/null
        return 0
    fi
    need debootstrap debootstrap
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || apt_install debian-archive-keyring
    step "No container registry reachable: making a Debian base image ${DIM}(about a minute)${PLAIN}"
    rootfs=$(mktemp -d)
    quietly debootstrap as_root env "PATH=$PATH:/usr/sbin:/sbin" \
        debootstrap --variant=minbase bookworm "$rootfs" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
    as_root tar -C "$rootfs" -c --exclude='./var/cache/apt/archives/*.deb' --exclude='./dev/*' . |
        "${DOCKER[@]}" import - "$BASE_IMAGE" >/dev/null
    as_root rm -rf --one-file-system "$rootfs"
}

docker_build() {
    local log=$1; shift
    # Some hosts let containers out only through the host's own network.
    mkdir -p "$LOGS"
    # --force-rm: or else a failed step of the legacy builder leaves its container behind.
    "${DOCKER[@]}" build --force-rm "$@" >"$LOGS/$log.log" 2>&1 ||
        quietly "$log" "${DOCKER[@]}" build --force-rm --network host "$@"
}

# What our tags named before.
prune_images() { "${DOCKER[@]}" image prune -f --filter label=firezone.lab >/dev/null; }

build_images() {
    local version revision
    build_binaries
    step "Building images"
    ensure_base
    version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version *= *"\(.*\)"/\1/p' "$ROOT/Cargo.toml")
    revision=$(git -C "$ROOT" rev-parse --short HEAD 2>/dev/null || echo unknown)
    docker_build image-gateway -f "$ROOT/docker/Dockerfile.prebuilt" --label firezone.lab=1 \
        --build-arg "VERSION=$version" --build-arg "REVISION=$revision" -t "$GATEWAY_IMAGE" "$STAGE/gateway"
    docker_build image-tools -f "$ROOT/docker/lab.Dockerfile" --target tools --label firezone.lab=1 \
        --build-arg "BASE=$BASE_IMAGE" -t "$TOOLS_IMAGE" "$STAGE/lab"
    docker_build image-lab -f "$ROOT/docker/lab.Dockerfile" --label firezone.lab=1 \
        --build-arg "BASE=$BASE_IMAGE" -t "$LAB_IMAGE" "$STAGE/lab"
    prune_images
    good "$GATEWAY_IMAGE, $("${DOCKER[@]}" image inspect -f '{{.Size}}' "$GATEWAY_IMAGE" | awk '{ printf "%.1f MB", $1 / 1e6 }')"
}

# ---------------------------------------------------------------- the lab

WEB4=http://10.213.3.80
WEB_NAME=web.resource.lab
WEB6='http://[fd00:213:3::80]'

# What runs but was made from older images has to go first: the gateway lives in another
# container's network namespace and must never be left in one that is gone.
remove_stale_lab() {
    local name image running
    for name in gateway:$GATEWAY_IMAGE client:$LAB_IMAGE; do
        image=${name#*:} name=$(container "${name%%:*}")
        running=$("${DOCKER[@]}" inspect -f '{{.Image}}' "$name" 2>/dev/null) || continue
        if [ "$running" != "$("${DOCKER[@]}" image inspect -f '{{.Id}}' "$image")" ]; then
            note "images have changed, replacing the running lab"
            quietly lab-replace compose down --remove-orphans
            return 0
        fi
    done
}

# The lab's networks are this machine's, too, while it runs: an address of theirs that means
# something else here would be cut off.
check_subnets() {
    have ip || return 0
    local subnet route
    for subnet in $(sed -n 's/^ *- subnet: *\([0-9].*\)/\1/p' "$LAB_FILE"); do
        case $subnet in
            *:*) route=$(ip -6 route show root "$subnet") ;;
            *) route=$(ip -4 route show root "$subnet") ;;
        esac
        [ -z "$route" ] || die "this machine already has a route into $subnet, which the lab uses: $route"
    done
}

start_lab() {
    [ -d /proc/sys/net/ipv6 ] || die "this kernel has IPv6 switched off; the lab needs it (boot without ipv6.disable=1)"
    [ -e /dev/net/tun ] || as_root modprobe tun 2>/dev/null || true
    [ -e /dev/net/tun ] || die "/dev/net/tun is missing: the kernel has no TUN driver (CONFIG_TUN)"
    remove_stale_lab
    [ -n "$("${DOCKER[@]}" network ls -q --filter "name=^${PROJECT}_")" ] || check_subnets
    step "Starting the lab"
    quietly lab-up compose up -d --remove-orphans
}

lab_running() {
    local c
    for c in gateway client portal relay router-c router-g web; do
        [ "$("${DOCKER[@]}" inspect -f '{{.State.Running}}' "$(container "$c")" 2>/dev/null)" = true ] || return 1
    done
}

# fetch URL: one request through the tunnel, from the client's container.
fetch() { inside client curl -fsS --connect-timeout 2 --max-time "${2:-4}" "$1"; }

# fetch_by_name NAME 4|6: the same by name. The client is asked as an application's DNS query would
# ask it: it makes addresses up, which only the gateway can translate.
fetch_by_name() {
    local answer address resolve
    answer=$(inside client curl -fsS --max-time 4 -H 'content-type: application/json' \
        -d "{\"domain\":\"$1\"}" http://127.0.0.1:8083/resolve) || return 1
    case $2 in
        4) address=$(grep -o '"100\.[0-9.]*"' <<<"$answer" | head -n 1) ;;
        6) address=$(grep -o '"fd00:[0-9a-f:]*"' <<<"$answer" | head -n 1) ;;
    esac
    address=${address//\"/}
    [ -n "$address" ] || return 1
    resolve=$1:80:$address
    [ "$2" = 4 ] || resolve="$1:80:[$address]"
    inside client curl -fsS --connect-timeout 2 --max-time 4 --resolve "$resolve" "http://$1${3:-/}"
}

# attempt COMMAND...: runs it in a shell that ends at the first error, and leaves in
# ATTEMPT how it went. `set -e` has no effect inside a condition, so "if COMMAND" would not do that.
attempt() {
    set +e
    (set -e; "$@")
    # shellcheck disable=SC2034  # read by the callers
    ATTEMPT=$?
    set -e
}

now_ms() { printf '%s' $((${EPOCHREALTIME/[.,]/} / 1000)); }

# wait_until SECONDS WHAT COMMAND...: prints one line, with the time it took.
wait_until() {
    local limit=$1 what=$2 begun took; shift 2
    begun=$(now_ms)
    until "$@" >/dev/null 2>&1; do
        if [ $(($(now_ms) - begun)) -ge $((limit * 1000)) ]; then fail "$what (waited $limit s)"; return 1; fi
        sleep 0.2
    done
    took=$(($(now_ms) - begun))
    good "$what ${DIM}($((took / 1000)).$((took % 1000 / 100)) s)${PLAIN}"
}

gateway_health_is() { [ "$("${DOCKER[@]}" inspect -f '{{.State.Health.Status}}' "$(container gateway)")" = "$1" ]; }
portal_answers() { inside portal curl -fsS -o /dev/null --max-time 2 http://127.0.0.1:8082/healthz; }

# The path of the client's connection as the gateway sees it: direct, relay_..., or nothing.
# Read from the JSON without jq, which not every machine has; the status has one "path" per client.
current_path() { inside gateway /firezone-gateway status --json 2>/dev/null | sed -n 's/.*"path" *: *"\([a-z_]*\)".*/\1/p' | head -n 1; }
path_is() {
    case "$(current_path)" in
        direct) [ "$1" = direct ] ;;
        relay*) [ "$1" = relayed ] ;;
        *) return 1 ;;
    esac
}

wait_ready() {
    wait_until 30 "portal answers" portal_answers &&
        wait_until 60 "gateway is healthy" gateway_health_is healthy &&
        wait_until 60 "client reaches the resource over IPv4" fetch "$WEB4/" &&
        wait_until 30 "client reaches the resource over IPv6" fetch "$WEB6/"
}

explain() {
    step "What the parts say"
    "${DOCKER[@]}" ps -a --filter "name=^$PROJECT-" --format '{{.Names}}: {{.Status}}' | sed 's/^/    /'
    inside gateway /firezone-gateway status 2>&1 | sed 's/^/    /' || true
    local c
    for c in gateway client portal relay; do
        step "Last lines of $c"
        "${DOCKER[@]}" logs --tail 15 "$(container "$c")" 2>&1 | sed 's/^/    /' || true
    done
}

block_direct()   { inside router-c lab-entrypoint block-direct;   inside router-g lab-entrypoint block-direct; }
unblock_direct() { inside router-c lab-entrypoint unblock-direct; inside router-g lab-entrypoint unblock-direct; }

# Gateways and clients that tests start are named like this (tests/compose), so that none can stay.
remove_cells() {
    local ids
    ids=$("${DOCKER[@]}" ps -aq --filter "name=^$(container cell-)")
    [ -n "$ids" ] || return 0
    # In order, because relays keep the allocations of those that were killed, and refuse the same port
    # to anybody else for ten minutes.
    # shellcheck disable=SC2086  # several words
    "${DOCKER[@]}" stop -t 3 $ids >/dev/null
    # shellcheck disable=SC2086
    "${DOCKER[@]}" rm -f -v $ids >/dev/null
}

stop_lab() {
    remove_cells
    # Volumes too: the gateway's identity in the lab is worth nothing.
    compose down -v --remove-orphans >/dev/null 2>&1 || compose down -v --remove-orphans
}

remove_images() {
    local image
    for image in "$GATEWAY_IMAGE" "$LAB_IMAGE" "$TOOLS_IMAGE" firezone-lab-build:latest "$BASE_IMAGE"; do
        if image_exists "$image"; then "${DOCKER[@]}" rmi -f "$image" >/dev/null; fi
    done
}
