# What the portal does to a gateway: whatever it is, who is connected stays connected.
# shellcheck shell=bash

# A portal that goes and comes, with a download running.
cell_transfer_survives_a_portal_restart() {
    local url=$WEB4/bytes/40000000 before pid sum
    sum=$(mktemp) && later rm -f "$sum"
    later start portal
    before=$(starts_of gateway)
    sha256_of client "$url" --limit-rate 5M >"$sum" &
    pid=$!
    sleep 1
    docker_ restart -t 2 "$(container portal)" >/dev/null
    check "the transfer goes on to its end" wait "$pid"
    check "every byte is right" [ "$(cat "$sum")" = "$(sha256_of web http://127.0.0.1/bytes/40000000)" ]
    wait_until 40 "the gateway has joined again" joined
    check "the gateway was not restarted" [ "$(starts_of gateway)" = "$before" ]
    wait_until 30 "new connections work" fetch "$WEB4/"
}

# Longer than Docker's own interval of checking: nothing may call for a restart.
cell_portal_outage_leaves_the_gateway_healthy_and_carrying() {
    later hup; later start portal
    # Without a Close frame, after which the gateway would be in no hurry.
    docker_ kill "$(container portal)" >/dev/null
    wait_until 40 "the gateway says that it is not ready" not probe /readyz
    sleep 12
    check "Docker has seen no failure" [ "$(docker_ inspect -f '{{.State.Health.Status}} {{.State.Health.FailingStreak}}' "$(container gateway)")" = "healthy 0" ]
    check "still live" probe /livez
    check "still carrying" fetch "$WEB4/" >/dev/null
    check "the cause is named" status_is '.portal.last_error.kind | IN("server_close", "io", "tcp_connect", "tcp_timeout")'
    start portal
    # Delays have grown meanwhile.
    wait_until 60 "ready again by itself" probe /readyz
}

cell_portal_that_comes_up_after_the_gateway_is_waited_for() {
    later start gateway; later start portal
    stop portal 1
    docker_ restart -t 5 "$(container gateway)" >/dev/null
    wait_until 20 "the gateway waits" status_is '.portal.state == "waiting" and .portal.attempts >= 2'
    check "it is live" probe /livez
    check "it has not started, and says why" probe_says /startupz '[-]'
    check "it was not restarted" [ "$(docker_ inspect -f '{{.RestartCount}}' "$(container gateway)")" = 0 ]
    start portal
    wait_until 40 "ready by itself" probe /readyz
    wait_until 40 "the client is served" fetch "$WEB4/"
}

# What the gateway was answered lately when it asked to be let in, and the pauses between, as
# "STATUS after MS".
connects() {
    portal_value '/events?kind=connect&n=20' '[.[] | select(.name == "lab-gateway")] | . as $all |
        [range(1; length) | "\($all[.].status) after \($all[.].at_ms - $all[. - 1].at_ms) ms"] | .[]'
}

# refused JSON KIND: lets it be refused, and waits until it has joined in spite of that.
refused() {
    later faults '{"clear": true}'
    faults "{\"refuse\": $1, \"kill_all\": true}"
    wait_until 20 "the status names $2" status_is ".portal.last_error.kind == \"$2\""
    check "the client is still served" fetch "$WEB4/" >/dev/null
    wait_until 40 "it joins by itself" joined
}

cell_portal_that_refuses_with_401_blocks_and_closes_all_access() {
    later hup; later portal_post /token '{"token": ".lab-gateway-token", "revoked": false}'
    portal_post /token '{"token": ".lab-gateway-token", "revoked": true}'
    wait_until 20 "blocked" status_is '.portal.state == "blocked"'
    check "the status names the cause" status_is '.portal.last_error.kind == "http_401"'
    check "readiness says it in words" probe_says /readyz "blocked: token refused"
    check "it is live" probe /livez
    check "nobody is served" not fetch "$WEB4/" 2
    portal_post /token '{"token": ".lab-gateway-token", "revoked": false}'
    hup
    wait_until 10 "it joins when it is told to look" joined
    wait_until 30 "the client is served again" fetch "$WEB4/"
}

cell_portal_that_refuses_with_409_is_asked_again() {
    refused '{"status": 409, "code": "gateway_already_connected", "times": 3}' http_409
}

cell_portal_that_refuses_with_429_is_left_alone_as_long_as_it_says() {
    local pause
    refused '{"status": 429, "retry_after": 4, "times": 1}' http_429
    pause=$(connects | tail -n 1)
    note "$pause"
    [[ $pause =~ ^101\ after\ ([0-9]+)\ ms$ ]] || { fail "the last one should have been let in"; return 1; }
    # A tenth more at most, and the time of an attempt.
    check "it came back after 4 to 5 s" [ "${BASH_REMATCH[1]}" -ge 4000 -a "${BASH_REMATCH[1]}" -lt 5000 ]
}

cell_portal_that_is_overloaded_with_503_is_asked_again() {
    refused '{"status": 503, "retry_after": 1, "times": 2}' http_5xx
}

cell_portal_that_closes_with_1012_is_not_stormed() {
    local pause
    faults '{"close_all": {"code": 1012, "reason": "deploy"}}'
    check "the client is still served" fetch "$WEB4/" >/dev/null
    wait_until 20 "it joins by itself" status_is '.portal.state == "joined" and .portal.last_error.kind == "server_close"'
    pause=$(portal_value '/events?n=2000' '[.[] | select(.kind == "connect" and .name == "lab-gateway" or .kind == "disconnected" and .role == "gateway")] | .[-2:] | "\(.[0].kind) \(.[1].at_ms - .[0].at_ms)"')
    check "it came back within the ten seconds over which all spread ($pause)" [ "${pause##* }" -lt 11000 ]
    check "the client is still served" fetch "$WEB4/" >/dev/null
}

cell_portal_that_is_slow_to_answer_is_waited_for() {
    local before
    later faults '{"clear": true}'
    before=$(status_value .portal.attempts)
    faults '{"upgrade_delay_ms": 4000, "kill_all": true}'
    wait_until 10 "not ready meanwhile" not probe /readyz
    check "the client is still served" fetch "$WEB4/" >/dev/null
    wait_until 20 "joined" joined
    check "with a single attempt" status_is ".portal.attempts == $before + 1"
}

# A token that is replaced in its file, as secrets of an orchestrator are.
cell_token_file_that_is_replaced_is_read_again() {
    local dir
    dir=$(mktemp -d) && later rm -rf "$dir"
    chmod 755 "$dir"
    printf '.mistyped' >"$dir/token" && chmod 644 "$dir/token"
    cell_net a 31
    cell_gateway a "${USUAL[@]}" -e FIREZONE_TOKEN= -e FIREZONE_TOKEN_FILE=/run/token/token -v "$dir:/run/token:ro"
    GATEWAY=cell-a-net
    wait_until 20 "the wrong one is refused" status_is '.portal.state == "blocked"'
    printf '.cell-gateway-token\n' >"$dir/new" && chmod 644 "$dir/new" && mv "$dir/new" "$dir/token"
    wait_until 10 "the right one is noticed" joined
    wait_until 20 "a page comes" fetch "$CELL_WEB4/"
    check "none of them is in the log" not grep -qe mistyped -e cell-gateway-token <(docker_ logs "$(container cell-a)" 2>&1)
}
