# compose/gateway.yaml, the file that users start from, as it is, against the lab's portal.
# shellcheck shell=bash

production() {
    local command=("${COMPOSE[@]}") sudo=()
    # The variables have to be set behind sudo, which drops them.
    if [ "${command[0]}" = sudo ]; then sudo=(sudo); command=("${command[@]:1}"); fi
    "${sudo[@]}" env FIREZONE_GATEWAY_IMAGE="$GATEWAY_IMAGE" FIREZONE_TOKEN="${TOKEN:-unset}" \
        FIREZONE_API_URL=ws://198.19.77.10:8081 ${NAME:+"FIREZONE_NAME=$NAME"} \
        "${command[@]}" -p firezone-production -f "$ROOT/compose/gateway.yaml" \
        -f "$HERE/production.yaml" "$@" >/dev/null 2>&1
}
# Compose v1 and v2 name them differently.
production_containers() { docker_ ps -aq --filter label=com.docker.compose.project=firezone-production; }
production_status() { local c; for c in $(production_containers); do docker_ exec "$c" /firezone-gateway status --json | tr -d ' \n'; echo; done; }
production_portals_are() { [ "$(production_status | grep -c "\"state\":\"$1\"")" = "${2:-1}" ]; }
production_health_is() { [ "$(docker_ inspect -f '{{.State.Health.Status}}' "$(production_containers)")" = "$1" ]; }
# The identities, in no order that means anything. (The first "id" of a document.)
production_ids() { production_status | sed 's/"id":"\([^"]*\)".*/\n\1/' | sed -n '2~2p' | sort; }

cell_production_file_gives_a_ready_gateway() {
    local findings ids TOKEN=.spare-gateway-token NAME=production
    later production down -v
    production up -d
    wait_until 40 "healthy" production_health_is healthy
    wait_until 30 "joined" production_portals_are joined
    findings=$(production_status | grep -o '"level":"error"' || true)
    check "the preflight has nothing to complain about" [ -z "$findings" ]
    check "root is read-only" [ "$(docker_ inspect -f '{{.HostConfig.ReadonlyRootfs}}' "$(production_containers)")" = true ]
    ids=$(production_ids)
    production up -d --force-recreate
    wait_until 30 "joined again in a new container" production_portals_are joined
    check "with the same identity" [ -n "$ids" -a "$(production_ids)" = "$ids" ]
}

cell_production_file_scaled_to_three_is_three_lasting_gateways() {
    # Without a name: each has its own.
    local ids TOKEN=.spare-gateway-token NAME=
    later production down -v
    production up -d --scale gateway=3
    wait_until 40 "three have joined" production_portals_are joined 3
    ids=$(production_ids)
    check "each with an identity of its own" [ "$(uniq <<<"$ids" | wc -l)" = 3 ]
    production up -d --scale gateway=1
    wait_until 20 "two have left" production_portals_are joined 1
    check "the one that stays is who it was" grep -qxF "$(production_ids)" <<<"$ids"
    production up -d --scale gateway=3
    wait_until 40 "three again" production_portals_are joined 3
    check "the same three" [ "$(production_ids)" = "$ids" ]
    production up -d --scale gateway=3 --force-recreate
    wait_until 40 "three in new containers" production_portals_are joined 3
    check "the same three still" [ "$(production_ids)" = "$ids" ]
}

cell_production_file_with_a_refused_token_is_a_state_not_a_crash_loop() {
    local TOKEN=.not-a-token-of-this-lab NAME=production
    later production down -v
    production up -d
    wait_until 30 "says that it is blocked" production_portals_are blocked
    # Not started, because no portal has ever let it in, but alive: nothing for a restart to mend.
    check "is alive" docker_ exec "$(production_containers)" /firezone-gateway healthcheck --check live
    check "was never restarted" [ "$(docker_ inspect -f '{{.RestartCount}}' "$(production_containers)")" = 0 ]
    check "does not show the token" not grep -qF "$TOKEN" <(docker_ logs "$(production_containers)" 2>&1; production_status)
}
