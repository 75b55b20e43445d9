# Docker daemons beside the machine's own, each in a network namespace: labs that know nothing of each
# other, with the same names and addresses. Sourced by tests/compose/run.
# shellcheck shell=bash

# All of them belong to one process, whose number tells which ones nobody needs any more.
ENGINES_RUN=/run/firezone-e2e
ENGINES_DATA=/var/lib/firezone-e2e

engines_are_possible() {
    [ "$(id -u)" = 0 ] || die "labs beside each other need root"
    have_dockerd || die "labs beside each other need dockerd on this machine"
    have ip || die "labs beside each other need ip (iproute2)"
}

# engine_start N: sets DOCKER_HOST.
engine_start() {
    local run=$ENGINES_RUN.$$/$1 data=$ENGINES_DATA.$$/$1 netns=firezone-e2e-$$-$1
    mkdir -p "$run" "$data" /run/containerd
    echo '{}' >"$run/daemon.json"
    ip netns add "$netns"
    ip -n "$netns" link set lo up
    # Without the machine's containerd, whose mounts are not those of this namespace, the daemon starts one
    # of its own. (`ip netns exec` would hide the control groups.) In a session of its own, so that Ctrl-C
    # leaves it to us.
    setsid -f unshare -m nsenter "--net=/run/netns/$netns" sh -c "
        mount -t tmpfs -o size=64k none /run/containerd
        PATH=\$PATH:/usr/sbin:/sbin exec dockerd --config-file '$run/daemon.json' --data-root '$data' \
            --exec-root '$run' --pidfile '$run/pid' -H 'unix://$run/sock'" >"$run/log" 2>&1 </dev/null 7<&- 8>&- 9<&-
    export DOCKER_HOST=unix://$run/sock
    if ! wait_for_docker 60; then tail -n 20 "$run/log" >&2; die "a second dockerd does not come up"; fi
}

# engine_stop RUN DATA NETNS: with all that it has.
engine_stop() {
    local run=$1 data=$2 netns=$3 pid tries=100 mounts
    if pid=$(cat "$run/pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null; then
        docker -H "unix://$run/sock" ps -q 2>/dev/null | xargs -r docker -H "unix://$run/sock" kill >/dev/null 2>&1
        kill "$pid" 2>/dev/null
        while kill -0 "$pid" 2>/dev/null && [ $((tries -= 1)) -gt 0 ]; do sleep 0.1; done
        kill -9 "$pid" 2>/dev/null
    fi
    # What it left in the namespace, its containerd among others.
    ip netns pids "$netns" 2>/dev/null | xargs -r kill -9 2>/dev/null
    ip netns del "$netns" 2>/dev/null
    mounts=$(awk -v run="$run/" -v data="$data/" 'index($2, run) == 1 || index($2, data) == 1 { print $2 }' /proc/mounts)
    [ -z "$mounts" ] || printf '%s\n' "$mounts" | sort -r | xargs -r umount -l 2>/dev/null
    rm -rf --one-file-system "$run" "$data"
    return 0
}

# engines_stop PID: all of that process.
engines_stop() {
    local netns n
    set +e
    while read -r netns _; do
        case $netns in firezone-e2e-"$1"-*)
            n=${netns##*-}
            engine_stop "$ENGINES_RUN.$1/$n" "$ENGINES_DATA.$1/$n" "$netns" ;;
        esac
    done < <(ip netns list 2>/dev/null)
    rm -rf --one-file-system "$ENGINES_RUN.$1" "$ENGINES_DATA.$1"
}

# engines_of_the_dead: whoever was killed could not clean up.
engines_of_the_dead() {
    local run pid
    for run in "$ENGINES_RUN".*; do
        pid=${run##*.}
        if [ -d "$run" ] && ! kill -0 "$pid" 2>/dev/null; then (engines_stop "$pid"); fi
    done
}
