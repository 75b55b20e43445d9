# What goes through: much of it, many at once, and every signal that TCP has.
# shellcheck shell=bash

cell_download_of_200_megabytes_is_undamaged() {
    local begun
    begun=$(now_ms)
    check "IPv4" download "$WEB4/bytes/200000000"
    note "$((200000 * 8 / ($(now_ms) - begun))) Mbit/s, the server's own checksum included"
}

cell_downloads_at_once_are_undamaged() {
    downloads_at_once 6 20000000 "$WEB4" "$WEB6"
}

cell_upload_is_undamaged() {
    local size=50000000 wanted got
    got=$(inside client sh -c "head -c $size /dev/zero | curl -fsS --max-time 60 -T - -X POST $WEB4/sink")
    wanted=$(inside web sh -c "head -c $size /dev/zero | sha256sum | cut -d' ' -f1")
    check "all bytes arrive: $got" grep -qF "$wanted" <<<"$got"
}

cell_iperf_moves_data_both_ways() {
    local address way mbit
    for address in 10.213.3.81 fd00:213:3::81; do
        for way in '' --reverse; do
            # shellcheck disable=SC2086  # an empty flag shall vanish
            mbit=$(inside client iperf3 --client "$address" --time 2 --format m $way |
                awk '/receiver/ { for (i = 2; i <= NF; i++) if ($i == "Mbits/sec") print int($(i - 1)) }')
            check "$address $way: ${mbit:-no} Mbit/s" [ "${mbit:-0}" -ge 10 ]
        done
    done
}

# ---------------------------------------------------------------- resets

cell_refused_port_is_refused_at_once() {
    local url code begun
    for url in http://10.213.3.80:81/ 'http://[fd00:213:3::80]:81/'; do
        begun=$(now_ms)
        code=0
        inside client curl -sS -o /dev/null --max-time 10 "$url" 2>/dev/null || code=$?
        # 7: curl could not connect.
        check "$url after $(($(now_ms) - begun)) ms" [ "$code" = 7 -a $(($(now_ms) - begun)) -lt 2000 ]
    done
}

# The resource resets a connection that is under way, and the client's application sees a reset.
cell_reset_by_the_resource_reaches_the_client() {
    local pid code=0 begun
    inside client curl -sS -o /dev/null --max-time 30 --limit-rate 10M "$WEB4/bytes/400000000" 2>/dev/null &
    pid=$!
    sleep 1
    begun=$(now_ms)
    rules web 'chain cell { type filter hook input priority filter; ip saddr 10.213.3.2 tcp dport 80 counter reject with tcp reset; }'
    wait "$pid" || code=$?
    # 56: curl: connection reset by peer.
    check "curl ends with code $code after $(($(now_ms) - begun)) ms" [ "$code" = 56 ]
    check "at once" [ $(($(now_ms) - begun)) -lt 5000 ]
}

# The client's application goes away with data unread, and the resource sees it.
cell_reset_by_the_client_reaches_the_resource() {
    local port=$((20000 + RANDOM % 10000))
    # Others' may linger.
    open_there() { [ -n "$(inside web ss -Htn state established "sport = :80 and dport = :$port")" ]; }
    inside client sh -c "curl -sS -o /dev/null --max-time 30 --local-port $port --limit-rate 100k $WEB4/bytes/60000000 & sleep 2; kill -9 \$!" >/dev/null 2>&1 &
    wait_until 2 "the resource has a connection" open_there
    wait $! || true
    wait_until 5 "the resource has none any more" not open_there
}

# ---------------------------------------------------------------- congestion signals (RFC 3168, RFC 6040)

ecn_on() {
    later in_kernel client 'echo 2 >/proc/sys/net/ipv4/tcp_ecn'
    in_kernel client 'echo 1 >/proc/sys/net/ipv4/tcp_ecn'
}

# What the resource marks as capable of ECN is so inside, and shows it outside.
cell_ecn_is_negotiated_and_shows_outside() {
    ecn_on
    meets direct
    rules router-g "$FORWARD ip saddr 10.213.2.10 meta l4proto udp ip ecn ect0 counter; ip6 saddr 2001:db8:9a::10 meta l4proto udp ip6 ecn ect0 counter; }"
    rules client 'chain cell { type filter hook input priority filter; iifname "tun-client" ip saddr 10.213.3.80 ip ecn ect0 counter; }'
    check "a download" download "$WEB4/bytes/5000000"
    note "$(counted client) packets inside, $(counted router-g) outside carry ECT(0)"
    # What the kernel has merged or not yet cut counts as one.
    check "inside" [ "$(counted client)" -gt 20 ]
    check "outside" [ "$(counted router-g)" -gt 20 ]
}

# Congestion that a router outside marks reaches the resource, which tells its peer.
cell_ecn_congestion_outside_reaches_the_inside() {
    ecn_on
    meets direct
    # The client's double does not copy the inner bits, so that all of its datagrams may be marked.
    rules router-c "$FORWARD ip daddr 198.19.77.3 meta l4proto udp ip ecn set ce counter; ip6 daddr 2001:db8:9a::/64 meta l4proto udp ip6 ecn set ce counter; }"
    rules web 'chain cell { type filter hook input priority filter; ip saddr 10.213.3.2 ip ecn ce counter; }'
    inside client sh -c "head -c 5000000 /dev/zero | curl -fsS -o /dev/null --max-time 30 -T - -X POST $WEB4/sink"
    note "$(counted router-c) datagrams were marked outside, $(counted web) packets of them inside"
    check "marks arrive" [ "$(counted web)" -gt 20 ]
}

# Where the inside is not capable of ECN, a mark outside must not become one inside.
cell_ecn_congestion_outside_does_not_touch_what_knows_no_ecn() {
    meets direct
    rules router-c "$FORWARD ip daddr 198.19.77.3 meta l4proto udp ip ecn set ce counter; ip6 daddr 2001:db8:9a::/64 meta l4proto udp ip6 ecn set ce counter; }"
    rules web 'chain cell { type filter hook input priority filter; ip saddr 10.213.3.2 ip ecn ce counter; }'
    check "ping" inside client ping -c 20 -i 0.02 10.213.3.80 >/dev/null
    check "outside there were marks" [ "$(counted router-c)" -gt 10 ]
    check "inside there is none" [ "$(counted web)" = 0 ]
}
