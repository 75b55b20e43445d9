# How client and gateway meet: NAT, families, small packets, loss, and clients that move.
# shellcheck shell=bash

# meets KIND FAMILY: with a new connection, over a path of this kind and family.
meets() {
    wait_until 10 "the client leaves" client_leaves
    wait_until 30 "a page comes" fetch "$WEB4/"
    wait_until 20 "the path is $1" path_is_ "$1"
    case ${2:-} in
        4) check "over IPv4" client_status_is '.remote | startswith("[") | not' ;;
        6) check "over IPv6" client_status_is '.remote | startswith("[")' ;;
    esac
}

cell_direct_path_carries_ipv4_and_ipv6() {
    meets direct
    wait_until 30 "IPv6" fetch "$WEB6/"
    check "downloads are undamaged" download "$WEB4/bytes/10000000"
    check "over IPv6 as well" download "$WEB6/bytes/10000000"
}

cell_nat_that_keeps_ports_on_both_sides_leaves_the_path_direct() {
    outside 4
    meets direct 4
}

cell_nat_symmetric_at_the_client_needs_one_relay() {
    outside 4
    nats symmetric keeping
    meets relay
    check "a download is undamaged" download "$WEB4/bytes/3000000"
}

cell_nat_symmetric_at_the_gateway_needs_one_relay() {
    outside 4
    nats keeping symmetric
    meets relay
    check "a download is undamaged" download "$WEB4/bytes/3000000"
}

cell_nat_symmetric_on_both_sides_needs_two_relays() {
    outside 4
    nats symmetric symmetric
    meets relay_both
    check "a download is undamaged" download "$WEB4/bytes/3000000"
}

cell_outside_with_ipv4_alone_reaches_ipv6_resources() {
    outside 4
    meets direct 4
    wait_until 10 "IPv6 inside" fetch "$WEB6/"
}

cell_outside_with_ipv6_alone_reaches_ipv4_resources() {
    # All but the portal, which has no other address here.
    outside 6
    meets direct 6
    wait_until 10 "IPv4 inside" fetch "$WEB4/"
}

cell_outside_with_an_mtu_of_1280_carries_full_packets() {
    local router
    # Both ends remember for ten minutes what they learn of the way.
    later inside client ip -6 route flush cache
    later inside gateway-net ip -6 route flush cache
    for router in router-c router-g; do
        later inside $router lab-entrypoint mtu 1500
        inside $router lab-entrypoint mtu 1280
    done
    # Full packets are 1344 or 1364 bytes outside.
    meets direct
    check "a download" download "$WEB4/bytes/3000000" --max-time 20
    check "a download over IPv6" download "$WEB6/bytes/3000000" --max-time 20
    outside 4
    meets direct 4
    check "a download over IPv4 outside" download "$WEB4/bytes/3000000" --max-time 20
    # Not through a relay: coturn forbids to fragment what it passes on.
}

cell_loss_of_two_percent_slows_but_damages_nothing() {
    # One in fifty, not one by chance: what the kernel has not yet cut counts as one packet, so a download
    # is some hundred of them, and chance would spare all of those now and then.
    rules router-g "$FORWARD meta l4proto udp numgen inc mod 50 < 1 counter drop; }"
    meets direct
    check "a download" download "$WEB4/bytes/10000000"
    note "$(counted router-g) were lost"
    # 10 MB are at least 160 packets of 64 KiB.
    check "some were lost" [ "$(counted router-g)" -gt 2 ]
}

cell_direct_path_that_is_blocked_is_left_and_taken_again() {
    meets direct
    watch_begin stream 10.213.3.80 30
    block_direct_
    watch_end "a TCP connection"
    check "it goes on within ten seconds" [ "$WATCH_ENDED" = well -a "$WATCH_LONGEST" -lt 10000 ]
    check "through a relay" path_is_ relay
    unblock_direct
    # Only a client that has something to send looks for a better path.
    direct_again() { fetch "$WEB4/" && path_is_ direct; }
    wait_until 40 "direct again" direct_again
}

# ---------------------------------------------------------------- roaming

# The router forgets its mappings (it restarted), and maps to other ports from now on.
cell_roaming_client_router_that_forgets_its_mappings() {
    outside 4
    meets direct 4
    watch_begin stream 10.213.3.80 60
    later renew_relays
    later inside router-c lab-entrypoint forget
    later inside router-c nft delete table inet cell_ports
    inside router-c nft 'table inet cell_ports { chain post { type nat hook postrouting priority srcnat - 2; ip saddr 10.213.1.0/24 meta l4proto udp masquerade to :20000-30000; }; }'
    inside router-c lab-entrypoint forget
    watch_end "a TCP connection"
    # Three seconds over a relay of the gateway's; otherwise when the client next asks a relay for its own
    # address, which it does every 25 s.
    check "it goes on within forty seconds" [ "$WATCH_ENDED" = well -a "$WATCH_LONGEST" -lt 40000 ]
    wait_until 20 "the path is direct" path_is_ direct
}

# The router gets another address, as from a provider at night, and everything of the client comes from
# there. Only the client can tell, once a relay has told it: it asks every 25 s. If that is the first word on
# its connection to the portal since, it is lost with that connection, and the client begins anew when it has
# given up; TCP tries again after 27 and 54 s.
cell_roaming_client_router_that_gets_another_address() {
    local wan='$(ip -o addr show | awk "/198.19.77.2\//{ print \$2; exit }")'
    outside 4
    meets direct 4
    watch_begin stream 10.213.3.80 60
    later renew_relays
    later inside router-c sh -c "nft delete table inet cell_address; ip addr del 198.19.77.4/24 dev $wan; lab-entrypoint forget all"
    inside router-c sh -c "ip addr add 198.19.77.4/24 dev $wan"
    inside router-c nft 'table inet cell_address { chain post { type nat hook postrouting priority srcnat - 2; ip saddr 10.213.1.0/24 snat ip to 198.19.77.4; }; }'
    inside router-c lab-entrypoint forget all
    watch_end "a TCP connection"
    check "it goes on within a minute" [ "$WATCH_ENDED" = well -a "$WATCH_LONGEST" -lt 60000 ]
    moved() { fetch "$WEB4/" && client_status_is '.remote | startswith("198.19.77.4:")'; }
    wait_until 40 "the path leads to the new address" moved
}

# A stock client that changes its network begins anew there, with another key (spec §4.4), and has had
# no chance to say goodbye.
cell_roaming_client_that_moves_to_another_network() {
    local before begun
    meets direct
    before=$(client_value .tunnel.public_key)
    later docker_ unpause "$(container client)"
    docker_ pause "$(container client)" >/dev/null
    later remove_cells
    begun=$(now_ms)
    cell_client internet 50 "-e LAB_ROUTES=2001:db8:9a::/64=2001:db8:1::3" --id lab-client --name lab-client
    wait_until 20 "served in the other network" cell_fetch "$WEB4/"
    note "$(($(now_ms) - begun)) ms after it began to move"
    check "with another key" [ "$(ask cell-client http://127.0.0.1:8083/status .tunnel.public_key)" != "$before" ]
    check "the gateway has the client once" status_is "[$(ours)] | length == 1"
    wait_until 10 "the path leads there" client_status_is '.path == "direct" and (.remote | test("198.19.77.50|2001:db8:1::50"))'
}

cell_roaming_client_in_the_gateways_own_network() {
    later remove_cells
    cell_client gateway-lan 50 "-e LAB_GATEWAY4=10.213.2.254 -e LAB_GATEWAY6=2001:db8:9a::fe" --id neighbour --name neighbour
    wait_until 20 "served" cell_fetch "$WEB4/"
    wait_until 10 "without leaving the network" status_is '.clients | map(select(.path == "direct" and (.remote | test("10.213.2.50|2001:db8:9a::50")))) | length == 1'
}

cell_roaming_client_with_a_symmetric_nat_on_its_way_to_a_direct_path() {
    outside 4
    nats symmetric keeping
    meets relay
    # As in another network: a new connection, and none of the mappings of the old one.
    nats keeping keeping
    meets direct 4
}
