# compose/gateway.yaml, the file that users start from, as it is, against the lab's portal.
# shellcheck shell=bash

production() {
    local command=("${COMPOSE[@]}") sudo=()
    # The variables have to be set behind sudo, which drops them.
    if [ "${command[0]}" = sudo ]; then sudo=(sudo); command=("${command[@]:1}"); fi
    "${sudo[@]}" env FIREZONE_GATEWAY_IMAGE="$GATEWAY_IMAGE" FIREZONE_TOKEN="${TOKEN:-unset}" \
        FIREZONE_API_URL=ws://198.19.77.10:8081 FIREZONE_NAME=production \
        "${command[@]}" -p firezone-production -f "$ROOT/compose/gateway.yaml" \
        -f "$HERE/production.yaml" "$@" >/dev/null 2>&1
}
production_status() { docker_ exec firezone-production /firezone-gateway status --json | tr -d ' \n'; }
production_portal_is() { production_status | grep -q "\"state\":\"$1\""; }
production_health_is() { [ "$(docker_ inspect -f '{{.State.Health.Status}}' firezone-production)" = "$1" ]; }

cell_production_file_gives_a_ready_gateway() {
    local findings id TOKEN=.spare-gateway-token
    later production down -v
    production up -d
    wait_until 40 "healthy" production_health_is healthy
    wait_until 30 "joined" production_portal_is joined
    findings=$(production_status | grep -o '"level":"error"' || true)
    check "the preflight has nothing to complain about" [ -z "$findings" ]
    check "root is read-only" [ "$(docker_ inspect -f '{{.HostConfig.ReadonlyRootfs}}' firezone-production)" = true ]
    id=$(production_status | grep -o '"id":"[^"]*"' | head -n 1)
    production up -d --force-recreate
    wait_until 30 "joined again in a new container" production_portal_is joined
    check "with the same identity" [ "$(production_status | grep -o '"id":"[^"]*"' | head -n 1)" = "$id" ]
}

cell_production_file_with_a_refused_token_is_a_state_not_a_crash_loop() {
    local TOKEN=.not-a-token-of-this-lab
    later production down -v
    production up -d
    wait_until 30 "says that it is blocked" production_portal_is blocked
    # Not started, because no portal has ever let it in, but alive: nothing for a restart to mend.
    check "is alive" docker_ exec firezone-production /firezone-gateway healthcheck --check live
    check "was never restarted" [ "$(docker_ inspect -f '{{.RestartCount}}' firezone-production)" = 0 ]
    check "does not show the token" not grep -qF "$TOKEN" <(docker_ logs firezone-production 2>&1; production_status)
}
