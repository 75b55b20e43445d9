# What a container may lack: it runs as well as it can, and says what to add.
# shellcheck shell=bash

# found NAME LEVEL WORDS: the preflight has found something, and knows the line to add.
found() { wait_until 20 "$1 is found, with the line to add: $3" status_is ".host[] | select(.name == \"$1\" and .level == \"$2\") | (.fix // \"\") | contains(\"$3\")"; }
stays_up() {
    check "it is live" probe /livez
    # A second look at the host decides.
    wait_until 15 "it is not ready" not probe /readyz
    check "it runs" [ "$(docker_ inspect -f '{{.State.Running}} {{.RestartCount}}' "$(container cell-a)")" = "true 0" ]
}
serves() {
    wait_until 20 "ready" probe /readyz
    wait_until 20 "IPv4" fetch "$CELL_WEB4/"
    [ "${1:-}" = IPv4 ] || wait_until 20 "IPv6" fetch "$CELL_WEB6/"
}

# What is missing is named together with the line that gives it, and can be read.
cell_host_without_tun_says_so() {
    GATEWAY=cell-a-net
    cell_net a 31
    cell_gateway a --cap-add NET_ADMIN
    found tun_device error /dev/net/tun
    stays_up
}

cell_host_without_net_admin_says_so() {
    GATEWAY=cell-a-net
    cell_net a 31
    cell_gateway a --device /dev/net/tun
    found net_admin error NET_ADMIN
    stays_up
}

cell_host_with_nothing_at_all_says_so() {
    GATEWAY=cell-a-net
    cell_net a 31
    cell_gateway a
    found tun_device error /dev/net/tun
    found net_admin error NET_ADMIN
    stays_up
}

cell_host_that_does_not_forward_ipv4_says_so_and_is_mended_live() {
    GATEWAY=cell-a-net
    cell_net a 31 --sysctl net.ipv4.ip_forward=0
    cell_gateway a "${USUAL[@]}"
    found forwarding_ipv4 error net.ipv4.ip_forward
    check "startupz says it" probe_says /startupz forwarding_ipv4
    stays_up
    in_kernel cell-a-net 'echo 1 >/proc/sys/net/ipv4/ip_forward'
    serves
}

cell_host_that_does_not_forward_ipv6_serves_ipv4_and_says_so() {
    GATEWAY=cell-a-net
    cell_net a 31
    in_kernel cell-a-net 'for f in /proc/sys/net/ipv6/conf/*/forwarding; do echo 0 >$f; done'
    cell_gateway a "${USUAL[@]}"
    found forwarding_ipv6 warning net.ipv6.conf.all.forwarding
    serves IPv4
}

cell_host_without_ipv6_serves_ipv4_and_says_so() {
    GATEWAY=cell-a-net
    cell_net a 31
    in_kernel cell-a-net 'echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6'
    cell_gateway a "${USUAL[@]}"
    found ipv6_enabled warning disable_ipv6
    serves IPv4
    refused_at_once "IPv6" fetch "$CELL_WEB6/"
}

cell_container_with_a_read_only_root_serves() {
    GATEWAY=cell-a-net
    cell_net a 31
    # Not even a state directory: it asks for nothing but the identity that it is given.
    cell_gateway a --device /dev/net/tun --cap-add NET_ADMIN --read-only
    check "the root is read-only" [ "$(docker_ inspect -f '{{.HostConfig.ReadonlyRootfs}}' "$(container cell-a)")" = true ]
    serves
    check "what cannot be kept is said" status_is '.host[] | select(.name == "state_directory") | .level == "warning"'
}

# Capabilities do not reach the program of a user other than root unless its file has them, which images
# do not keep everywhere. It has to say exactly that.
cell_container_of_another_user_says_why_it_has_no_rights() {
    GATEWAY=cell-a-net
    cell_net a 31
    cell_gateway a "${USUAL[@]}" --user 65532:65532
    found net_admin error user:
    check "it says that the user is why" status_is '.host[] | select(.name == "net_admin") | .found | contains("65532")'
    stays_up
}

cell_container_leaves_root_and_keeps_net_admin_alone() {
    GATEWAY=cell-a-net
    cell_net a 31
    cell_gateway a "${USUAL[@]}"
    serves
    # Of the process itself: the image has nothing to look from the inside with.
    local pid status
    pid=$(docker_ inspect -f '{{.State.Pid}}' "$(container cell-a)")
    status=$(as_root cat "/proc/$pid/status")
    check "user and group are 65532" [ "$(awk '/^[UG]id:/ { printf "%s ", $3 }' <<<"$status")" = "65532 65532 " ]
    check "of all rights it has NET_ADMIN" grep -q '^CapEff:.0*1000$' <<<"$status"
    check "and will never have more" grep -q '^NoNewPrivs:.1$' <<<"$status"
    check "which it says" status_is '.host[] | select(.name == "privileges") | .level == "ok"'
}

cell_container_without_setuid_stays_root_and_says_so() {
    GATEWAY=cell-a-net
    cell_net a 31
    cell_gateway a --device /dev/net/tun --cap-add NET_ADMIN --security-opt no-new-privileges:true --read-only --tmpfs /var/lib/firezone
    serves
    found privileges warning SETUID
}

cell_container_of_64_mebibytes_carries_load_without_being_killed() {
    local id peak
    GATEWAY=cell-a-net
    cell_net a 31
    cell_gateway a "${USUAL[@]}" --memory 64m --memory-swap 64m
    serves
    downloads_at_once 8 25000000 "$CELL_WEB4" "$CELL_WEB6"
    check "nothing was killed" [ "$(docker_ inspect -f '{{.State.OOMKilled}} {{.State.Running}} {{.RestartCount}}' "$(container cell-a)")" = "false true 0" ]
    note "the process occupies $(inside cell-a-net sh -c 'curl -s http://127.0.0.1:8080/metrics | awk "/^process_memory_usage_bytes/ { printf \"%.1f\", \$2 / 1048576 }"') MiB"
    # Where the control groups of this machine can be seen.
    id=$(docker_ inspect -f '{{.Id}}' "$(container cell-a)")
    peak=$(as_root find /sys/fs/cgroup -path "*$id*" -name memory.peak 2>/dev/null | head -n 1) || peak=
    if [ -n "$peak" ]; then
        note "at most, the kernel's buffers included: $(($(as_root cat "$peak") / 1048576)) MiB"
        check "the kernel has not killed for want of memory" grep -qx "oom_kill 0" <(as_root cat "${peak%peak}events")
    fi
}
