# Relays: used, restarted, lost, withdrawn, with other credentials.
# shellcheck shell=bash

relayed() {
    block_direct_
    client_leaves
    wait_until 45 "IPv4 through a relay" fetch "$WEB4/"
    wait_until 20 "the path is relayed" path_is_ relay
}
# The container of the relay that the client's connection uses.
relay_in_use() {
    case $(status_value "$(ours)"' | "\(.local) \(.remote)"') in
        *$RELAY_B* | *2001:db8:1::21*) printf relay-b ;;
        *) printf relay ;;
    esac
}

cell_relay_carries_ipv4_and_ipv6_when_direct_is_blocked() {
    fetch "$WEB4/" >/dev/null
    block_direct_
    wait_until 45 "IPv4 through the relay" fetch "$WEB4/"
    wait_until 20 "IPv6 through the relay" fetch "$WEB6/"
    wait_until 20 "path is relayed" path_is_ relay
    check "a download is undamaged" download "$WEB4/bytes/10000000"
}

cell_relay_over_ipv6_alone_carries_both() {
    block_direct_
    rules router-g "$FORWARD meta nfproto ipv4 meta l4proto udp drop; }"
    rules router-c "$FORWARD meta nfproto ipv4 meta l4proto udp drop; }"
    later renew_relays
    renew_relays
    wait_until 20 "relays are met anew" both_ends_have_relays
    wait_until 45 "IPv4" fetch "$WEB4/"
    wait_until 20 "IPv6" fetch "$WEB6/"
    check "both ends of the path are IPv6" client_status_is '(.local | startswith("[")) and (.remote | startswith("["))'
}

# without_the_relay_in_use WORDS COMMAND...: what happens to its container, and how long a stream stands still.
without_the_relay_in_use() {
    local words=$1 in_use; shift
    later renew_relays
    relayed
    in_use=$(relay_in_use)
    watch_begin stream 10.213.3.80 40
    docker_ "$@" "$(container "$in_use")" >/dev/null
    watch_end "a TCP connection, while $in_use $words"
    check "it goes on within ten seconds" [ "$WATCH_ENDED" = well -a "$WATCH_LONGEST" -lt 10000 ]
}

cell_other_relay_takes_over_when_one_stops() {
    without_the_relay_in_use "is away" stop -t 0
}

cell_relay_that_restarts_and_forgets_is_used_again() {
    without_the_relay_in_use restarts restart -t 0
    wait_until 60 "both relays lend addresses" all_relays_allocated
    check "a page comes" fetch "$WEB4/" >/dev/null
}

cell_direct_path_does_not_notice_that_all_relays_are_lost() {
    later renew_relays
    wait_until 20 "the path is direct" path_is_ direct
    watch_begin stream 10.213.3.80 6
    stop relay 0
    stop relay-b 0
    watch_end "a TCP connection"
    check "not a second is lost" [ "$WATCH_ENDED" = well -a "$WATCH_LONGEST" -lt 1000 ]
    check "the path is still direct" path_is_ direct
}

cell_relays_that_were_all_lost_are_used_as_soon_as_they_return() {
    later renew_relays
    relayed
    stop relay 0
    stop relay-b 0
    wait_until 20 "nothing comes through" not fetch "$WEB4/" 2
    wait_until 40 "readiness says that no relay is left" probe_says /readyz '[-]relays'
    start relay
    start relay-b
    wait_until 60 "a page comes" fetch "$WEB4/"
    check "through a relay" path_is_ relay
}

cell_relay_credentials_that_are_rotated_cost_nothing() {
    local ids ttl=', "credentials_ttl": 3600'
    relayed
    mapfile -t ids < <(portal_value /state '.relays[].id')
    watch_begin stream 10.213.3.80 8
    # The same relays, with other user names and passwords.
    relays "[$(relay "${ids[0]}" $RELAY_A "$ttl"), $(relay "${ids[1]}" $RELAY_B "$ttl")]"
    wait_until 10 "the gateway uses them" status_is '[.relays[] | select(.state == "allocated" and .credentials_expire_at < now + 3700)] | length == 2'
    watch_end "a TCP connection"
    check "not two seconds are lost" [ "$WATCH_ENDED" = well -a "$WATCH_LONGEST" -lt 2000 ]
    client_leaves
    wait_until 20 "a new connection works" fetch "$WEB4/"
}

cell_relay_that_is_withdrawn_hands_over_to_the_next() {
    relays "[$(relay "$(fresh_id)" $RELAY_A)]"
    relayed
    check "through the only one there is" [ "$(relay_in_use)" = relay ]
    watch_begin stream 10.213.3.80 10
    relays "[$(relay "$(fresh_id)" $RELAY_B)]"
    wait_until 20 "it has moved to the other one" eval '[ "$(relay_in_use)" = relay-b ]'
    watch_end "a TCP connection"
    check "not three seconds are lost" [ "$WATCH_ENDED" = well -a "$WATCH_LONGEST" -lt 3000 ]
}
