# What is reached: networks, names, the internet; and what not (any more).
# shellcheck shell=bash

# refused_at_once WHAT COMMAND...: fails, and well before a time-out.
refused_at_once() {
    local what=$1 begun; shift
    begun=$(now_ms)
    check "$what is refused" not "$@" >/dev/null 2>&1
    check "at once (after $(($(now_ms) - begun)) ms)" [ $(($(now_ms) - begun)) -lt 3000 ]
}

cell_resource_sees_the_gateways_own_address() {
    # The resources have no route to the tunnel, and the server says whom it sees.
    check "IPv4 comes from 10.213.3.2" peer_is "$WEB4" 10.213.3.2
    check "IPv6 comes from fd00:213:3::2" peer_is "$WEB6" fd00:213:3::2
}

cell_names_are_translated() {
    local family
    for family in 4 6; do
        wait_until 20 "IPv$family by name" fetch_by_name "$WEB_NAME" "$family"
    done
    # Whom the resource sees is the gateway, as by address.
    fetch_by_name "$WEB_NAME" 4 /peer | tr -d ' ' | grep -qF '"peer":"10.213.3.'
    # What a filter of the resource does not permit is refused at once, not after a time-out.
    refused_at_once "another port" inside client curl -fsS --max-time 10 "http://$(made_up "$WEB_NAME" 4):8080/"
}

# Both families of addresses are made up by the client; only one leads anywhere.
cell_name_with_ipv4_alone() {
    wait_until 20 "IPv4" fetch_by_name v4.single.lab 4
    refused_at_once "IPv6" fetch_by_name v4.single.lab 6
}

cell_name_with_ipv6_alone() {
    wait_until 20 "IPv6" fetch_by_name v6.single.lab 6
    refused_at_once "IPv4" fetch_by_name v6.single.lab 4
}

# The gateway's resolver answers nobody: who is reached by address does not notice, and why names are
# not reached is said.
cell_dns_that_is_dead_stops_names_and_nothing_else() {
    rules gateway-net 'chain cell { type filter hook input priority filter; iif lo ip daddr 127.0.0.11 drop; }'
    watch_begin fetches 10.213.3.80 8
    check "a new name is not reached" not fetch_by_name dead.resource.lab 4
    watch_end "by address"
    check "nothing is lost by address" [ "$WATCH_LONGEST" -lt 1000 ]
    wait_until 20 "the log names the name" logged gateway dead.resource.lab
    check "the status counts it" status_is '.dropped.not_translated > 0'
    check "it stays ready" probe /readyz
    inside gateway-net nft delete table inet cell
    wait_until 30 "names are reached when the resolver is back" fetch_by_name "$WEB_NAME" 4
}

cell_internet_resource_takes_what_is_not_named() {
    later remove_cells
    docker_ run -d --name "$(container cell-web)" --network "${PROJECT}_internet" --ip 198.19.77.90 --ip6 2001:db8:1::90 \
        --cap-drop ALL --cap-add NET_ADMIN --cap-add NET_BIND_SERVICE \
        -e 'LAB_ROUTES=2001:db8:c1::/64=2001:db8:1::2 2001:db8:9a::/64=2001:db8:1::3' "$LAB_IMAGE" run lab-web >/dev/null
    cell_client client-lan 20 "-e LAB_GATEWAY4=10.213.1.254 -e LAB_GATEWAY6=2001:db8:c1::fe" --id surfer --name surfer --internet
    sees() { cell_fetch "$1/peer" | tr -d ' ' | grep -qF "\"peer\":\"$2\""; }
    # The address of the router in front of the gateway, not that of the client's own.
    wait_until 20 "IPv4 comes from the gateway's site" sees http://198.19.77.90 198.19.77.3
    wait_until 10 "IPv6 comes from the gateway" sees 'http://[2001:db8:1::90]' 2001:db8:9a::10
    refused_at_once "a private address" cell_fetch http://192.168.77.7/
}

# ---------------------------------------------------------------- taken back

access_again() { client_post /connect "{\"resource_id\": \"$1\", \"again\": true}"; }
NETWORK=5b5b5b5b-1ab0-4000-8000-000000000001

cell_access_that_is_revoked_ends_at_once() {
    later client_leaves
    check "it works" eval 'fetch "$WEB4/" && fetch "$WEB6/"' >/dev/null
    watch_begin stream 10.213.3.80 4
    portal_post /reject '{"client": "lab-client", "resource": "Resource network"}'
    watch_end "a TCP connection"
    check "it is cut" [ "$WATCH_ENDED" != well -a "$WATCH_LONGEST" -gt 2000 ]
    refused_at_once "a new connection" fetch "$WEB4/"
    check "other resources are not touched" fetch "$WEB6/" >/dev/null
    access_again $NETWORK
    wait_until 10 "granted again, it works again" fetch "$WEB4/"
}

cell_access_that_expires_ends_without_the_portal() {
    later start portal; later hup
    later client_leaves
    # With another grant that stays, or else the connection would go, too.
    check "it works" eval 'fetch "$WEB4/" && fetch "$WEB6/"' >/dev/null
    portal_post /expire '{"client": "lab-client", "resource": "Resource network", "in_seconds": 4}'
    stop portal 1
    check "it works until then" fetch "$WEB4/" >/dev/null
    wait_until 8 "it ends" not fetch "$WEB4/"
    wait_until 5 "the log says why" logged gateway "access expired"
    check "the status counts it" status_is '[.dropped | .grant_expired, .no_grant | numbers] | add > 0'
    start portal
    hup
    wait_until 20 "joined" joined
    granted_again() { access_again $NETWORK && fetch "$WEB4/"; }
    wait_until 20 "granted again, it works again" granted_again
}

# A container has no clock of its own, so it is the portal's that is wrong.
cell_clock_of_the_portal_that_is_wrong_is_survived() {
    later client_leaves
    later portal_post /clock '{"offset_seconds": 0}'
    portal_post /clock '{"offset_seconds": 3600}'
    client_leaves
    wait_until 20 "an hour ahead: grants last longer, nothing else" fetch "$WEB4/"
    # Grants last eight hours, so these are over before they begin.
    portal_post /clock '{"offset_seconds": -36000}'
    client_leaves
    check "ten hours behind: what has ended before it began gives no access" not fetch "$WEB4/"
    check "the gateway is live and ready" eval 'probe /livez && probe /readyz'
    portal_post /clock '{"offset_seconds": 0}'
    client_leaves
    wait_until 20 "put right, it works" fetch "$WEB4/"
}

cell_filters_change_what_is_reached_at_once() {
    local filters='{"set_filters": {"resource": "Resource network", "filters": %s}}'
    later portal_post /resource "$(printf "$filters" '[]')"
    check "without filters port 80 is reached" fetch "$WEB4/" >/dev/null
    # shellcheck disable=SC2059  # the format is ours
    portal_post /resource "$(printf "$filters" '[{"protocol": "tcp", "ports": [81]}]')"
    wait_until 5 "only port 81 is left" not fetch "$WEB4/"
    refused_at_once "port 80" fetch "$WEB4/"
    check "ping is not permitted" not inside client ping -c 1 -W 1 10.213.3.80
    # shellcheck disable=SC2059
    portal_post /resource "$(printf "$filters" '[{"protocol": "tcp", "ports": [80]}, {"protocol": "icmp"}]')"
    wait_until 5 "port 80 is reached again" fetch "$WEB4/"
    check "and ping" inside client ping -c 1 -W 1 10.213.3.80 >/dev/null
}

cell_ping_goes_to_networks_and_names() {
    local target
    for target in 10.213.3.80 fd00:213:3::80; do
        check "$target" inside client ping -c 3 -i 0.2 -W 2 "$target" >/dev/null
    done
    wait_until 20 "the name is known" fetch_by_name "$WEB_NAME" 4
    for target in "$(made_up "$WEB_NAME" 4)" "$(made_up "$WEB_NAME" 6)"; do
        check "$target, made up for $WEB_NAME" inside client ping -c 3 -i 0.2 -W 2 "$target" >/dev/null
    done
}
