# A gateway that goes: one alone, and one of two.
# shellcheck shell=bash

back_in_service() {
    wait_until 60 "back in service" fetch "$WEB4/"
    wait_until 40 "healthy" gateway_health_is healthy
}

cell_gateway_stops_fast_and_cleanly() {
    local begun took code
    later start gateway
    begun=$(now_ms)
    docker_ stop "$(container gateway)" >/dev/null
    took=$(($(now_ms) - begun))
    code=$(docker_ inspect -f '{{.State.ExitCode}}' "$(container gateway)")
    check "stopped after $took ms" [ "$took" -lt 3000 ]
    check "exit code $code" [ "$code" = 0 ]
    start gateway
    back_in_service
}

# New connections and an old one, with the network namespace and its connection tracking still there.
cell_gateway_restart_gives_its_clients_back() {
    local fetches=() stream=()
    later start gateway
    watch_begin fetches 10.213.3.80 30; fetches=("$WATCH" "$WATCH_PID")
    watch_begin stream 10.213.3.80 30; stream=("$WATCH" "$WATCH_PID")
    docker_ restart -t 10 "$(container gateway)" >/dev/null
    WATCH=${fetches[0]} WATCH_PID=${fetches[1]}
    watch_end "new connections"
    check "they work again within ten seconds" [ "$WATCH_LONGEST" -lt 10000 -a "$WATCH_ENDED" = well ]
    WATCH=${stream[0]} WATCH_PID=${stream[1]}
    watch_end "a TCP connection"
    check "it outlives the restart" [ "$WATCH_ENDED" = well -a "$WATCH_LONGEST" -lt 15000 ]
    back_in_service
}

# It cannot say goodbye: the client has to find out by itself (ICE gives up after 16.5 s, spec §2.4).
# Nor can it give its allocations back: coturn keeps them for ten minutes and refuses the same port to the
# new process, which has another key and so another user name.
cell_gateway_that_was_killed_gives_its_clients_back() {
    later renew_relays
    later start gateway
    watch_begin fetches 10.213.3.80 60
    docker_ kill "$(container gateway)" >/dev/null
    start gateway
    watch_end "new connections"
    check "they work again within 25 seconds" [ "$WATCH_LONGEST" -lt 25000 -a "$WATCH_ENDED" = well ]
    back_in_service
}

two_gateways() {
    cell_net a 31
    cell_net b 32
    cell_gateway a "${USUAL[@]}"
    cell_gateway b "${USUAL[@]}"
    GATEWAY=cell-a-net wait_until 20 "gateway a is ready" probe /readyz
    GATEWAY=cell-b-net wait_until 20 "gateway b is ready" probe /readyz
    wait_until 20 "a page comes" fetch "$CELL_WEB4/"
}
serving() { status_is '.clients | length == 1'; }
# Which of them serves the client; the other one in OTHER.
find_serving() {
    if GATEWAY=cell-a-net serving; then SERVING=a OTHER=b; else SERVING=b OTHER=a; fi
    note "the client is served by $SERVING"
}

cell_two_gateways_in_a_site_the_other_one_takes_over_when_one_stops() {
    local fetches=() stream=() begun
    two_gateways
    find_serving
    watch_begin fetches 10.213.3.90 8; fetches=("$WATCH" "$WATCH_PID")
    watch_begin stream 10.213.3.90 8; stream=("$WATCH" "$WATCH_PID")
    begun=$(now_ms)
    docker_ stop -t 10 "$(container "cell-$SERVING")" >/dev/null
    note "it stopped within $(($(now_ms) - begun)) ms"
    WATCH=${fetches[0]} WATCH_PID=${fetches[1]}
    watch_end "new connections"
    check "they work again within five seconds" [ "$WATCH_LONGEST" -lt 5000 -a "$WATCH_ENDED" = well ]
    GATEWAY=cell-$OTHER-net
    check "the other gateway serves the client" serving
    # The resource sees another address, so a TCP connection cannot go on; its end is told.
    WATCH=${stream[0]} WATCH_PID=${stream[1]}
    watch_end "a TCP connection"
    check "it is told at once" [ "$WATCH_ENDED" = reset -a "${WATCH_ENDED_AFTER:-99999}" -lt 10000 ]
}

cell_two_gateways_in_a_site_the_other_one_takes_over_when_one_dies() {
    later renew_relays
    two_gateways
    find_serving
    watch_begin fetches 10.213.3.90 60
    docker_ kill "$(container "cell-$SERVING")" >/dev/null
    watch_end "new connections"
    # Nobody tells the client: it finds out by itself, as with a single gateway.
    check "they work again within 25 seconds" [ "$WATCH_LONGEST" -lt 25000 -a "$WATCH_ENDED" = well ]
    GATEWAY=cell-$OTHER-net
    check "the other gateway serves the client" serving
}

cell_traces_reach_the_collector() {
    has_span() { inside collector sh -c 'curl -fsS "http://127.0.0.1:4318/spans?name=$1" | grep -q "\"$1\""' has "$1"; }
    later start gateway
    docker_ restart -t 5 "$(container gateway)" >/dev/null
    wait_until 20 "connecting to the portal" has_span portal.connect
    wait_until 20 "allocating at a relay" has_span relay.allocate
    wait_until 30 "the client is served" fetch "$WEB4/"
    wait_until 20 "setting up a client's connection" has_span connection.establish
}
