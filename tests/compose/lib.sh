# What the cells of the end-to-end matrix have in common; sourced by tests/compose/run.
# shellcheck shell=bash
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib.sh"

HERE=$ROOT/tests/compose
# The part of the lab whose gateway is asked; cells with a gateway of their own set another one.
# The image has no curl, so it is the neighbour that owns the network namespace.
GATEWAY=gateway-net
# The resource of gateways that a cell starts itself (site "Cells" of compose/lab-policy.yaml).
CELL_WEB4=http://10.213.3.90
CELL_WEB6='http://[fd00:213:3::90]'
RELAY_A=198.19.77.20
RELAY_B=198.19.77.21

# ---------------------------------------------------------------- small words

check() { local what=$1; shift; if "$@"; then good "$what"; else fail "$what"; return 1; fi; }
not() { ! "$@"; }
docker_() { "${DOCKER[@]}" "$@"; }
start() { docker_ start "$(container "$1")" >/dev/null; }
stop() { docker_ stop -t "${2:-2}" "$(container "$1")" >/dev/null; }
hup() { docker_ kill -s HUP "$(container gateway)" >/dev/null; }
starts_of() { docker_ inspect -f '{{.State.StartedAt}} {{.RestartCount}}' "$(container "$1")"; }
# Whether a part has logged this since the cell began.
logged() { docker_ logs --since "$CELL_BEGUN" "$(container "$1")" 2>&1 | grep -qF -- "$2"; }

# later COMMAND...: to be done when the cell is over, however it ends; the last one first.
UNDO=()
later() { UNDO+=("$(printf '%q ' "$@")"); }
undo_all() {
    local i
    for ((i = ${#UNDO[@]} - 1; i >= 0; i--)); do eval "${UNDO[i]}" >/dev/null 2>&1 || true; done
    UNDO=()
}

# ---------------------------------------------------------------- asking and telling

# ask PART URL JQ: a value out of a JSON document.
ask() { inside "$1" sh -c 'curl -sS --max-time 3 "$1" | jq -r "$2"' ask "$2" "$3"; }
# holds PART URL JQ: whether an expression is true of it.
holds() { inside "$1" sh -c 'curl -sS --max-time 3 "$1" | jq -e "$2" >/dev/null' holds "$2" "$3"; }

status_value() { ask "$GATEWAY" http://127.0.0.1:8080/status "$1"; }
status_is() { holds "$GATEWAY" http://127.0.0.1:8080/status "$1"; }
# Whether a probe passes, and whether it says something, passed or not.
probe() { inside "$GATEWAY" curl -fs -o /dev/null --max-time 3 "http://127.0.0.1:8080$1"; }
probe_says() { inside "$GATEWAY" curl -sS --max-time 3 "http://127.0.0.1:8080$1?verbose" | grep -qF -- "$2"; }
joined() { status_is '.portal.state == "joined"'; }
# The lab's client among those that a gateway serves: one that was killed stays for a while.
ours() { printf '.clients[] | select(.addresses | tostring | contains("%s"))' "$OUR_ADDRESS"; }
client_status_is() { status_is "$(ours) | $1"; }
path_is_() { client_status_is ".path | . != null and startswith(\"$1\")"; }

portal_value() { ask portal "http://127.0.0.1:8082$1" "$2"; }
portal_is() { holds portal http://127.0.0.1:8082/state "$1"; }
portal_post() { inside portal curl -fsS -o /dev/null --max-time 5 -d "$2" "http://127.0.0.1:8082$1"; }
# faults JSON: for gateways; see tests/lab/src/portal/faults.rs.
faults() { portal_post /faults "$1"; }

client_value() { ask client http://127.0.0.1:8083/status "$1"; }
client_is() { holds client http://127.0.0.1:8083/status "$1"; }
client_post() { inside client curl -fsS -o /dev/null --max-time 5 -H 'content-type: application/json' -d "$2" "http://127.0.0.1:8083$1"; }
# Says goodbye to all gateways; the next packet begins anew, with nothing left of earlier paths.
client_leaves() { inside client curl -fsS -o /dev/null --max-time 5 -X POST http://127.0.0.1:8083/disconnect; }
# made_up NAME 4|6: the address that the client has made up for a name.
made_up() {
    local which='test("[.]")'
    [ "$2" = 4 ] || which='test(":")'
    inside client sh -c 'curl -fsS --max-time 4 -H "content-type: application/json" -d "$1" http://127.0.0.1:8083/resolve | jq -r "$2"' \
        made_up "{\"domain\":\"$1\"}" "[.proxy_ips[] | select($which)][0]"
}

peer_is() { fetch "$1/peer" | tr -d ' ' | grep -qF "\"peer\":\"$2\""; }
# sha256_of PART URL [CURL OPTION...]
sha256_of() { local part=$1 url=$2; shift 2; inside "$part" curl -fsS --connect-timeout 5 --max-time 60 "$@" "$url" | sha256sum | cut -d' ' -f1; }
# download URL [CURL OPTION...]: whether what comes through the tunnel is what the server sends.
download() {
    local url=$1 wanted got; shift
    # Without the tunnel: the server asks itself.
    wanted=$(sha256_of web "http://127.0.0.1/bytes/${url##*/}")
    got=$(sha256_of client "$url" "$@")
    [ "$got" = "$wanted" ] || { note "$url: $got instead of $wanted"; return 1; }
}

# downloads_at_once COUNT BYTES URL4 URL6: over both families in turns.
downloads_at_once() {
    local n url pids=() sums wanted
    sums=$(mktemp -d) && later rm -rf "$sums"
    wanted=$(sha256_of web "http://127.0.0.1/bytes/$2")
    for ((n = 1; n <= $1; n++)); do
        url=$3
        [ $((n % 2)) = 0 ] || url=$4
        sha256_of client "$url/bytes/$2" >"$sums/$n" &
        pids+=($!)
    done
    for n in "${pids[@]}"; do wait "$n"; done
    for n in "$sums"/*; do check "download ${n##*/} is undamaged" [ "$(cat "$n")" = "$wanted" ]; done
}

# ---------------------------------------------------------------- how long something stands still

# watch_begin stream|fetches HOST SECONDS: asks the web server on HOST again and again through the
# tunnel, over one connection or a new one each time, until an interruption is over or SECONDS are.
watch_begin() {
    WATCH=$(mktemp)
    docker_ exec -i "$(container client)" perl - "$1" "$2" "$3" <"$HERE/watch.pl" >"$WATCH" 2>&1 &
    WATCH_PID=$!
    # It has to be under way before anything happens.
    local tries=50
    until grep -q begun "$WATCH" || [ $((tries -= 1)) = 0 ]; do sleep 0.1; done
}
# Sets WATCH_LONGEST (ms without an answer), WATCH_ENDED (well, reset, closed, silent) and
# WATCH_ENDED_AFTER (ms from the last answer until then).
watch_end() {
    wait "$WATCH_PID" || { fail "the watch: $(cat "$WATCH")"; rm -f "$WATCH"; return 1; }
    read -r _ WATCH_ANSWERS WATCH_LONGEST WATCH_ENDED WATCH_ENDED_AFTER < <(tail -n 1 "$WATCH")
    rm -f "$WATCH"
    note "$1: $WATCH_ANSWERS answers, longest silence $WATCH_LONGEST ms, ended $WATCH_ENDED${WATCH_ENDED_AFTER:+ after $WATCH_ENDED_AFTER ms}"
}

# ---------------------------------------------------------------- meddling

# in_kernel PART SHELL: in the network namespace of a part, where its part of /proc/sys can be written.
in_kernel() {
    docker_ run --rm --security-opt systempaths=unconfined --cap-drop ALL --cap-add NET_ADMIN \
        --network "container:$(container "$1")" --entrypoint sh "$LAB_IMAGE" -c "$2" >/dev/null
}

# rules PART NFT: a table `inet cell` of this content, gone again when the cell ends.
rules() {
    later inside "$1" nft delete table inet cell
    inside "$1" nft "add table inet cell; delete table inet cell; table inet cell { $2; }"
}
# counted PART: packets that the rules of the cell have counted.
counted() { inside "$1" sh -c 'nft -j list table inet cell | jq "[.. | .counter? | objects | .packets] | add // 0"'; }

FORWARD='chain cell { type filter hook forward priority filter - 2;'
block_direct_() { later unblock_direct; block_direct; }
# outside FAMILY: client and gateway have nothing else to meet over. (The portal has IPv4 alone.) The
# client leaves before, as long as its goodbye arrives.
outside() {
    wait_until 10 "the client leaves" client_leaves
    case $1 in
        4) rules router-c "$FORWARD meta nfproto ipv6 drop; }" ;;
        6) rules router-c "$FORWARD meta nfproto ipv4 meta l4proto udp drop; }" ;;
    esac
}
# nats KIND KIND: of the client's and the gateway's router. Relays know both ends by the ports that NAT
# gave them, so all of them have to meet anew before and after, as in another network.
nats() {
    later renew_relays
    later inside router-g lab-entrypoint nat keeping
    later inside router-c lab-entrypoint nat keeping
    inside router-c lab-entrypoint nat "$1"
    inside router-g lab-entrypoint nat "$2"
    renew_relays
    wait_until 20 "relays are met anew" both_ends_have_relays
}

# relays JSON: what the portal offers from now on.
relays() {
    later renew_relays
    portal_post /relays "{\"relays\": $1, \"immediate\": true, \"force\": true}"
}
relay() { printf '{"id": "%s", "v4": "%s:3478", "v6": "[2001:db8:1::%s]:3478", "secret": "lab-relay-secret", "realm": "firezone"%s}' "$1" "$2" "${2##*.}" "${3:-}"; }
fresh_id() { cat /proc/sys/kernel/random/uuid; }
# Those of compose/lab-policy.yaml, and nobody remembers anything of earlier ones: relays would refuse the
# same port with another user name for a while, and the client's double holds on to relays of whose
# end it was not told.
renew_relays() {
    local c pids=() policy=5d5d5d5d-1ab0-4000-8000-00000000000
    portal_post /relays "{\"relays\": [$(relay ${policy}1 $RELAY_A), $(relay ${policy}2 $RELAY_B)], \"immediate\": true}"
    # First the relays: who meets one that is about to restart would hold on to what it has forgotten.
    for c in relay relay-b; do docker_ restart -t 0 "$(container $c)" >/dev/null & pids+=($!); done
    wait "${pids[@]}"
    pids=()
    for c in client gateway; do docker_ restart -t 2 "$(container $c)" >/dev/null & pids+=($!); done
    wait "${pids[@]}"
}
all_relays_allocated() { status_is '[.relays[] | select(.state == "allocated")] | length >= 2'; }
both_ends_have_relays() { all_relays_allocated && client_is '[.relays[] | select(.relayed != null) | .id] | unique | length >= 2'; }

# ---------------------------------------------------------------- gateways and clients of a cell

# cell_net NAME NUMBER [docker option...]: a network namespace for a gateway, beside the lab's own.
cell_net() {
    local name=$1 last=$2 c; shift 2
    c=$(container "cell-$name-net")
    docker_ create --name "$c" --hostname "cell-$name" --stop-signal SIGKILL --cap-drop ALL --cap-add NET_ADMIN \
        --network "${PROJECT}_gateway-lan" --ip "10.213.2.$last" --ip6 "2001:db8:9a::$last" \
        -e LAB_GATEWAY4=10.213.2.254 -e LAB_GATEWAY6=2001:db8:9a::fe \
        --add-host portal.lab:198.19.77.10 --add-host collector.lab:198.19.77.30 \
        --sysctl net.ipv4.ip_forward=1 --sysctl net.ipv4.conf.all.src_valid_mark=1 \
        --sysctl net.ipv6.conf.all.disable_ipv6=0 --sysctl net.ipv6.conf.all.forwarding=1 \
        --sysctl net.ipv6.conf.default.forwarding=1 "$@" "$LAB_IMAGE" hold >/dev/null
    docker_ network connect --ip "10.213.3.$last" --ip6 "fd00:213:3::$last" "${PROJECT}_resource-lan" "$c"
    docker_ start "$c" >/dev/null
    # Its entry point ends as `sleep`, when addresses and routes are there.
    docker_ exec "$c" sh -c 'until [ "$(cat /proc/1/comm)" = sleep ]; do sleep 0.05; done'
}

# What compose/gateway.yaml gives a gateway.
USUAL=(--device /dev/net/tun --cap-add NET_ADMIN --cap-add SETUID --cap-add SETGID --security-opt no-new-privileges:true --read-only --tmpfs /var/lib/firezone)

# cell_gateway NAME [docker option...]: a gateway in there. It serves $CELL_WEB4 and $CELL_WEB6.
cell_gateway() {
    local name=$1; shift
    docker_ run -d --name "$(container "cell-$name")" --network "container:$(container "cell-$name-net")" --cap-drop ALL \
        -e FIREZONE_API_URL=ws://portal.lab:8081 -e FIREZONE_TOKEN=.cell-gateway-token \
        -e FIREZONE_NAME="cell-$name" -e FIREZONE_ID="cell-$name" \
        -e OTEL_EXPORTER_OTLP_ENDPOINT=http://collector.lab:4318 -e OTEL_BSP_SCHEDULE_DELAY=1000 \
        "$@" "$GATEWAY_IMAGE" >/dev/null
}

# cell_client NETWORK NUMBER ROUTES ARGUMENT...: another client. ROUTES are options with its routes.
cell_client() {
    local network=$1 last=$2 routes=$3 prefix4 prefix6; shift 3
    case $network in
        internet) prefix4=198.19.77 prefix6=2001:db8:1: ;;
        client-lan) prefix4=10.213.1 prefix6=2001:db8:c1: ;;
        gateway-lan) prefix4=10.213.2 prefix6=2001:db8:9a: ;;
    esac
    # shellcheck disable=SC2086  # several options
    docker_ run -d --name "$(container cell-client)" --hostname cell-client --network "${PROJECT}_$network" \
        --ip "$prefix4.$last" --ip6 "$prefix6:$last" --cap-drop ALL --cap-add NET_ADMIN --cap-add NET_RAW --device /dev/net/tun \
        --sysctl net.ipv6.conf.all.disable_ipv6=0 $routes "$LAB_IMAGE" \
        run lab-client --portal-url ws://198.19.77.10:8081 --token lab-client-token "$@" >/dev/null
}
cell_fetch() { inside cell-client curl -fsS --connect-timeout 2 --max-time 4 "$1"; }

# ---------------------------------------------------------------- evidence

# gather DIRECTORY: what every part of the lab has to say.
gather() {
    local dir=$1 name part
    mkdir -p "$dir"
    docker_ ps -a --filter "name=^firezone-" --format '{{.Names}}\t{{.Status}}\t{{.Image}}' >"$dir/containers.txt" 2>&1
    while IFS=$'\t' read -r name _; do
        docker_ logs --timestamps --since "$CELL_BEGUN" "$name" >"$dir/$name.log" 2>&1
        docker_ inspect "$name" >"$dir/$name.inspect.json" 2>&1
        part=${name#"$PROJECT"-}
        case $part in
            gateway-net | cell-*-net)
                inside "$part" curl -sS --max-time 5 http://127.0.0.1:8080/status >"$dir/$part.status.json" 2>&1
                inside "$part" curl -sS --max-time 5 http://127.0.0.1:8080/metrics >"$dir/$part.metrics.txt" 2>&1
                inside "$part" curl -sS --max-time 5 'http://127.0.0.1:8080/readyz?verbose' >"$dir/$part.readyz.txt" 2>&1 ;;
            gateway | cell-client) ;;
            cell-*) docker_ exec "$name" /firezone-gateway status >"$dir/$part.status.txt" 2>&1 ;;
        esac
        case $part in
            gateway) inside gateway /firezone-gateway status >"$dir/gateway.status.txt" 2>&1 ;;
            client | cell-client) inside "$part" curl -sS --max-time 5 http://127.0.0.1:8083/status >"$dir/$part.status.json" 2>&1 ;;
            portal)
                inside portal curl -sS --max-time 5 http://127.0.0.1:8082/state >"$dir/portal.state.json" 2>&1
                inside portal curl -sS --max-time 5 'http://127.0.0.1:8082/events?n=2000' >"$dir/portal.events.json" 2>&1 ;;
            collector) inside collector curl -sS --max-time 5 http://127.0.0.1:4318/spans >"$dir/spans.json" 2>&1 ;;
        esac
        case $part in
            gateway-net | router-* | client | web | cell-*-net | cell-client)
                inside "$part" sh -c 'ip addr; ip route; ip -6 route; ip rule; nft list ruleset; ss -tuanp; conntrack -L 2>/dev/null' >"$dir/$part.network.txt" 2>&1 ;;
        esac
    done < <(docker_ ps -a --filter "name=^firezone-" --format '{{.Names}}\t')
    return 0
}
