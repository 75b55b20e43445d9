//! Who reaches what, in network namespaces: names, filters, revocation and truthful errors, with
//! the tools that people use.
//!
//! Needs root, coturn, iproute2, nftables, curl, ping, and Debian's dnsmasq-base, bind9-dnsutils,
//! traceroute and netcat-openbsd; run by `scripts/test`.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use firezone_lab::scenario::{
    CORP_ID, GATEWAY_V4, GATEWAY_V6, INTERNET, Lab, NETWORK_V4_ID, RESOURCE_V4, RESOURCE_V6,
};
use firezone_lab::traffic::{Download, page};
use serde_json::{Value, json};

/// The gateway's own tunnel addresses: the first that the lab's portal gives away.
const GATEWAY_TUNNEL_V4: &str = "100.64.0.1";
const GATEWAY_TUNNEL_V6: &str = "fd00:2021:1111::1";

/// What the C library says of the errors that ICMP messages turn into.
const NO_ROUTE: &str = "No route to host";
const UNREACHABLE: &str = "Network is unreachable";
const NO_PERMISSION: &str = "Permission denied";
const REFUSED: &str = "Connection refused";

fn gateway() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_firezone-gateway"))
}

/// A lab whose site has a name server with these records.
fn lab(name: &str, env: &[(&str, &str)], records: &[&str]) -> Result<Lab> {
    let mut lab = Lab::new(name, gateway())?;
    lab.serve_names(records)?;
    lab.start_surroundings()?;
    lab.start_gateway(env)?;
    lab.wait_ready()?;
    lab.start_client(&[])?;
    Ok(lab)
}

/// A line's output on the client, whatever it exits with.
fn client(lab: &Lab, line: &str) -> Result<String> {
    let output = lab.net.try_output("client", &format!("{line} 2>&1"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn url(host: IpAddr, port: u16) -> String {
    match host {
        IpAddr::V4(a) => format!("http://{a}:{port}/"),
        IpAddr::V6(a) => format!("http://[{a}]:{port}/"),
    }
}

/// The page of a host, which says whom it sees.
fn fetch(lab: &Lab, host: IpAddr) -> Result<String> {
    lab.fetch(&url(host, 80)).with_context(|| lab.net.logs())
}

/// An attempt to connect that must fail, and with this error.
fn refused(lab: &Lab, host: IpAddr, port: u16, error: &str) -> Result<()> {
    let text = client(lab, &format!("nc -v -w 5 -z {host} {port}"))?;
    ensure!(
        text.contains(error),
        "not {error:?} at {host}:{port}: {text}"
    );
    Ok(())
}

fn dropped(lab: &Lab, reason: &str) -> Result<u64> {
    let status = lab.status()?;
    let of_all = status["dropped"][reason].as_u64().unwrap_or(0);
    let of_client = status["clients"][0]["dropped"][reason].as_u64();
    ensure!(of_client.unwrap_or(0) <= of_all, "{status}");
    Ok(of_client.unwrap_or(0))
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn names_are_reached_over_both_families_with_all_tools() -> Result<()> {
    let lab = lab(
        "names",
        &[],
        &[
            "--host-record=a.corp.example,10.99.0.2,fd99::2",
            "--srv-host=_http._tcp.a.corp.example,a.corp.example,80",
            "--txt-record=a.corp.example,hello from the site",
        ],
    )?;
    let name = lab.resolve("a.corp.example")?;
    ensure!(
        fetch(&lab, name.v4)?.contains(GATEWAY_V4),
        "not masqueraded"
    );
    ensure!(
        fetch(&lab, name.v6)?.contains(GATEWAY_V6),
        "not masqueraded"
    );
    for host in [name.v4, name.v6] {
        lab.net
            .sh("client", &format!("ping -c 3 -i 0.2 -W 5 {host}"))?;
        // UDP: the site's name server itself, as any other resource.
        if host.is_ipv4() {
            let answer = client(&lab, &format!("dig +short @{host} a.corp.example AAAA"))?;
            ensure!(answer.contains(RESOURCE_V6), "{answer}");
        }
        let hops = client(&lab, &format!("traceroute -n -q 1 -w 2 -m 4 {host}"))?;
        ensure!(hops.contains(&format!("2  {host}")), "{hops}");
    }
    for host in [RESOURCE_V4, RESOURCE_V6] {
        let hops = client(&lab, &format!("traceroute -I -n -q 1 -w 2 -m 4 {host}"))?;
        ensure!(hops.contains(&format!("2  {host}")), "{hops}");
        lab.net.sh("client", &format!("ping -c 1 -W 5 {host}"))?;
    }
    // What is no address is asked for at the gateway, over UDP and TCP.
    for server in [GATEWAY_TUNNEL_V4, GATEWAY_TUNNEL_V6] {
        for transport in ["+notcp", "+tcp"] {
            let dig = format!("dig {transport} +short -p 53535 @{server}");
            let answer = client(&lab, &format!("{dig} _http._tcp.a.corp.example SRV"))?;
            ensure!(answer.contains("80 a.corp.example."), "{answer}");
            let answer = client(&lab, &format!("{dig} a.corp.example TXT"))?;
            ensure!(answer.contains("hello from the site"), "{answer}");
        }
    }
    let status = lab.status()?;
    ensure!(status["dns"]["answered"].as_u64() == Some(8), "{status}");
    ensure!(
        status["clients"][0]["domains"].as_u64() == Some(1),
        "{status}"
    );
    ensure!(status["clients"][0]["flows"].as_u64() > Some(5), "{status}");
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn filters_hold_and_names_of_one_address_have_their_own() -> Result<()> {
    let mut lab = lab(
        "filters",
        &[],
        &[
            "--host-record=web.lab.example,10.99.0.2,fd99::2",
            "--host-record=api.lab.example,10.99.0.2,fd99::2",
        ],
    )?;
    let listen = ["--listen", "0.0.0.0:8080", "--listen", "[::]:8080"];
    lab.start_web("web-8080", &listen)?;
    let (web, api) = (
        lab.resolve("web.lab.example")?,
        lab.resolve("api.lab.example")?,
    );
    ensure!(web.v4 != api.v4, "two names, two addresses");
    for host in [web.v4, web.v6] {
        fetch(&lab, host)?;
        lab.net.sh("client", &format!("ping -c 1 -W 5 {host}"))?;
    }
    for host in [api.v4, api.v6] {
        lab.net
            .eventually("the other port", Duration::from_secs(10), |net| {
                net.sh(
                    "client",
                    &format!("curl -sSf -g --max-time 2 '{}'", url(host, 8080)),
                )
            })?;
    }
    // The errors that "administratively prohibited" turns into, for IPv4 and IPv6.
    for (v4, v6, port) in [(web.v4, web.v6, 8080), (api.v4, api.v6, 80)] {
        refused(&lab, v4, port, NO_ROUTE)?;
        refused(&lab, v6, port, NO_PERMISSION)?;
    }
    let ping = client(&lab, &format!("ping -c 1 -W 5 {}", api.v4))?;
    ensure!(ping.contains("Packet filtered"), "{ping}");
    ensure!(dropped(&lab, "filter_denied")? >= 5, "{}", lab.status()?);
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn errors_of_the_site_reach_the_application_as_what_they_are() -> Result<()> {
    let lab = lab(
        "errors",
        &[],
        &["--host-record=a.corp.example,10.99.0.2,fd99::2"],
    )?;
    let name = lab.resolve("a.corp.example")?;
    for host in [name.v4, name.v6] {
        fetch(&lab, host)?;
        refused(&lab, host, 81, REFUSED)?;
        // "Port unreachable", translated back.
        let dig = client(
            &lab,
            &format!("dig +time=2 +tries=1 -p 54 @{host} a.example"),
        )?;
        ensure!(dig.contains("connection refused"), "{dig}");
    }
    lab.net.nft(
        "resource",
        "table inet refusing { chain input { type filter hook input priority 0; \
         ip protocol tcp tcp dport 82 reject with icmp type host-unreachable; \
         meta nfproto ipv6 tcp dport 82 reject with icmpv6 type addr-unreachable; }; }",
    )?;
    for host in [name.v4, name.v6, RESOURCE_V4.parse()?, RESOURCE_V6.parse()?] {
        refused(&lab, host, 82, NO_ROUTE)?;
    }
    // A narrow place on the way: its "too big" must come through, or large packets vanish.
    lab.net.sh(
        "gateway",
        "ip link set eth1 mtu 1280 && ip route change 10.99.0.0/24 dev eth1 mtu lock 1000",
    )?;
    for host in [name.v4, RESOURCE_V4.parse()?] {
        let ping = client(&lab, &format!("ping -M do -s 1100 -c 2 -W 3 {host}"))?;
        ensure!(
            ping.contains("mtu = 1000") || ping.contains("mtu=1000"),
            "{ping}"
        );
    }
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_name_without_addresses_is_unreachable_and_one_that_moves_is_followed() -> Result<()> {
    let mut lab = lab(
        "moves",
        &[],
        &[
            "--host-record=six.corp.example,fd99::2",
            "--host-record=moves.corp.example,10.99.0.2",
        ],
    )?;
    let six = lab.resolve("six.corp.example")?;
    ensure!(fetch(&lab, six.v6)?.contains(GATEWAY_V6), "not masqueraded");
    refused(&lab, six.v4, 80, UNREACHABLE)?;
    let none = lab.resolve("none.corp.example")?;
    refused(&lab, none.v4, 80, UNREACHABLE)?;
    refused(&lab, none.v6, 80, NO_ROUTE)?;
    ensure!(dropped(&lab, "not_translated")? >= 3, "{}", lab.status()?);

    let moves = lab.resolve("moves.corp.example")?;
    fetch(&lab, moves.v4)?;
    let mut download = Download::start_from(&lab, &moves.v4.to_string(), 20_000_000, "2M")?;
    std::thread::sleep(Duration::from_secs(1));
    lab.net.sh("resource", "ip addr add 10.99.0.77/32 dev lo")?;
    lab.net
        .sh("gateway", "ip route add 10.99.0.77/32 via 10.99.0.2")?;
    lab.serve_names(&["--host-record=moves.corp.example,10.99.0.77"])?;
    // The former answer may be kept for as long as it says, which is a second.
    std::thread::sleep(Duration::from_secs(2));
    ensure!(lab.resolve("moves.corp.example")?.v4 == moves.v4, "same");
    let counted = "nft list chain inet count input";
    lab.net.nft(
        "resource",
        "table inet count { chain input { type filter hook input priority 0; \
         ip daddr 10.99.0.77 tcp flags syn counter; }; }",
    )?;
    lab.net
        .eventually("the new address", Duration::from_secs(10), |net| {
            net.sh(
                "client",
                &format!("curl -sSf -o /dev/null {}", url(moves.v4, 80)),
            )?;
            let counters = net.output("resource", counted)?;
            ensure!(!counters.contains("packets 0 "), "{counters}");
            Ok(())
        })?;
    ensure!(download.goes_on()?, "the download was to last");
    // What has begun stays where it began.
    download.finish()
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn what_is_taken_back_ends_at_once_and_what_is_given_again_works_at_once() -> Result<()> {
    let mut lab = lab(
        "taken-back",
        &[],
        &["--host-record=a.corp.example,10.99.0.2,fd99::2"],
    )?;
    let name = lab.resolve("a.corp.example")?;
    fetch(&lab, name.v4)?;
    fetch(&lab, RESOURCE_V4.parse()?)?;
    let id = lab.status()?["clients"][0]["id"].clone();
    for (host, resource, by_time) in [
        (name.v4.to_string(), CORP_ID, false),
        (RESOURCE_V4.to_owned(), NETWORK_V4_ID, false),
        (name.v4.to_string(), CORP_ID, true),
        (RESOURCE_V4.to_owned(), NETWORK_V4_ID, true),
    ] {
        // Access to something else stays, so that the connection itself does, too.
        fetch(&lab, RESOURCE_V6.parse()?)?;
        let before = received(&lab)?;
        let download = Download::start_from(&lab, &host, 100_000_000, "1M")?;
        std::thread::sleep(Duration::from_secs(1));
        ensure!(received(&lab)? > before + 300_000, "nothing has come");
        if by_time {
            let body = json!({"resource": resource, "in_seconds": 2});
            lab.portal_post("/expire", &body)?;
            std::thread::sleep(Duration::from_secs(2));
        } else {
            lab.portal_post("/reject", &json!({"client": id, "resource": resource}))?;
        }
        std::thread::sleep(Duration::from_secs(1));
        let cut = received(&lab)?;
        std::thread::sleep(Duration::from_secs(1));
        let after = received(&lab)?;
        // A few answers and keep-alives still go; a download would move a megabyte.
        ensure!(after - cut < 20_000, "{resource} goes on: {cut} to {after}");
        download.give_up();
        let status = lab.status()?;
        ensure!(
            !status["clients"][0]["grants"]
                .to_string()
                .contains(resource),
            "{status}"
        );
        refused(&lab, host.parse()?, 80, NO_ROUTE)?;
        // A name is not announced again: what was confirmed to the client once stays true.
        lab.connect(resource)?;
        let again = format!("curl -sSf -o /dev/null --max-time 2 '{}'", page(&host));
        lab.net
            .eventually("given again", Duration::from_secs(10), |net| {
                net.sh("client", &again)
            })?;
    }
    Ok(())
}

/// Bytes that the gateway has sent to its client.
fn received(lab: &Lab) -> Result<u64> {
    let status = lab.status()?;
    status["clients"][0]["tx_bytes"]
        .as_u64()
        .with_context(|| status.to_string())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn the_internet_resource_reaches_the_internet_and_nothing_private() -> Result<()> {
    let mut lab = Lab::new("internet", gateway())?;
    lab.add_v6()?;
    lab.serve_names(&["--host-record=a.corp.example,10.99.0.2"])?;
    lab.start_surroundings()?;
    let listen = ["--listen", "0.0.0.0:80,[::]:80"];
    lab.start_web_on("internet", "web-internet", &listen)?;
    // A network beyond the lab's own, which everybody reaches by the routers.
    lab.net.sh(
        "internet",
        "ip addr add 192.0.2.1/32 dev lo && ip addr add 2001:db8:99::1/128 dev lo",
    )?;
    for router in ["router-g", "router-c"] {
        lab.net.sh(
            router,
            "ip route add 192.0.2.1 via 203.0.113.1 && ip route add 2001:db8:99::1 via 2001:db8::1",
        )?;
    }
    lab.start_gateway(&[])?;
    lab.wait_ready()?;
    lab.start_client(&["--internet"])?;
    for (host, seen) in [
        ("192.0.2.1", "203.0.113.20"),
        ("2001:db8:99::1", "2001:db8:20::2"),
    ] {
        let body = lab.fetch(&page(host)).with_context(|| lab.net.logs())?;
        ensure!(body.contains(seen), "not by the gateway: {body}");
        lab.net
            .sh("client", &format!("ping -c 2 -i 0.2 -W 5 {host}"))?;
        refused(&lab, host.parse()?, 81, REFUSED)?;
        let hops = client(&lab, &format!("traceroute -I -n -q 1 -w 2 -m 5 {host}"))?;
        ensure!(hops.contains(&format!("  {host}")), "{hops}");
    }
    let name = lab.resolve("a.corp.example")?;
    fetch(&lab, name.v4)?;
    refused(&lab, "172.31.0.1".parse()?, 80, UNREACHABLE)?;
    refused(&lab, "fd31::1".parse()?, 80, NO_ROUTE)?;
    ensure!(dropped(&lab, "internet_refused")? >= 2, "{}", lab.status()?);
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn the_gateway_itself_is_closed_but_for_what_the_operator_opens() -> Result<()> {
    let mut lab = lab("own-ports", &[("FIREZONE_GATEWAY_PORTS", "tcp/81")], &[])?;
    lab.start_web_on(
        "gateway",
        "web-81",
        &["--listen", "0.0.0.0:81", "--listen", "[::]:81"],
    )?;
    lab.start_web_on(
        "gateway",
        "web-82",
        &["--listen", "0.0.0.0:82", "--listen", "[::]:82"],
    )?;
    fetch(&lab, RESOURCE_V4.parse()?)?;
    for server in [GATEWAY_TUNNEL_V4, GATEWAY_TUNNEL_V6] {
        lab.net.sh("client", &format!("ping -c 1 -W 5 {server}"))?;
        let opened = url(server.parse()?, 81);
        lab.net
            .sh("client", &format!("curl -sSf -g --max-time 5 '{opened}'"))?;
    }
    refused(&lab, GATEWAY_TUNNEL_V4.parse()?, 82, NO_ROUTE)?;
    refused(&lab, GATEWAY_TUNNEL_V6.parse()?, 82, NO_PERMISSION)?;
    // Its admin server least of all.
    refused(&lab, GATEWAY_TUNNEL_V4.parse()?, 8080, NO_ROUTE)?;
    ensure!(
        dropped(&lab, "gateway_service_closed")? >= 3,
        "{}",
        lab.status()?
    );
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn what_no_client_has_asked_for_does_not_come_in() -> Result<()> {
    let lab = lab("unsolicited", &[], &[])?;
    fetch(&lab, RESOURCE_V4.parse()?)?;
    // The site knows a way to the tunnel, so nothing but flow state keeps it out.
    lab.net
        .sh("resource", "ip route add 100.64.0.0/11 via 10.99.0.1")?;
    let address = client_address(&lab)?;
    let before = dropped(&lab, "no_flow")?;
    let ping = lab
        .net
        .try_output("resource", &format!("ping -c 2 -i 0.2 -W 1 {address}"))?;
    ensure!(!ping.status.success(), "a ping came in");
    lab.net
        .try_output("resource", &format!("nc -z -w 1 {address} 8083"))?;
    ensure!(dropped(&lab, "no_flow")? >= before + 3, "{}", lab.status()?);
    // And the client still is served.
    fetch(&lab, RESOURCE_V4.parse()?)?;
    Ok(())
}

fn client_address(lab: &Lab) -> Result<String> {
    let status: Value = lab.status()?;
    let address = status["clients"][0]["addresses"][0].as_str();
    Ok(address.with_context(|| status.to_string())?.to_owned())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_site_without_working_name_servers_delays_nobody_else() -> Result<()> {
    let lab = lab(
        "dns-dead",
        &[],
        &["--host-record=web.corp.example,10.99.0.2"],
    )?;
    let web = lab.resolve("web.corp.example")?;
    fetch(&lab, web.v4)?;
    // Longer than all that follows takes, so that it happens while the name is waited for.
    let patience = format!("nameserver {RESOURCE_V4}\noptions timeout:3 attempts:5\n");
    lab.net.etc("gateway", "resolv.conf", &patience)?;
    lab.net.nft(
        "resource",
        "table inet dead { chain input { type filter hook input priority 0; \
         udp dport 53 drop; tcp dport 53 drop; }; }",
    )?;
    let other = lab.resolve("other.corp.example")?;
    let told = |name: &str| {
        let log = lab.net.whole_log("lab-client");
        let told = log
            .lines()
            .rfind(|line| line.contains("domain status") && line.contains(name))?;
        Some(told.to_owned())
    };
    // Announced again as well; what was known stays in force.
    lab.resolve("web.corp.example")?;
    fetch(&lab, web.v4)?;
    // A new grant, for which the portal, the core and the tables are needed.
    fetch(&lab, RESOURCE_V4.parse()?)?;
    let early = told("other.corp.example");
    ensure!(early.is_none(), "it was not waited for: {early:?}");
    let answer = client(
        &lab,
        &format!("dig +time=8 +tries=1 -p 53535 @{GATEWAY_TUNNEL_V4} a.example TXT"),
    )?;
    ensure!(answer.contains("SERVFAIL"), "{answer}");
    // In the end the client is told, and its packets are answered.
    let end = std::time::Instant::now() + Duration::from_secs(20);
    let late = loop {
        if let Some(line) = told("other.corp.example") {
            break line;
        }
        ensure!(std::time::Instant::now() < end, "{}", lab.net.logs());
        std::thread::sleep(Duration::from_millis(50));
    };
    ensure!(late.contains("\"Inactive\""), "{late}");
    refused(&lab, other.v4, 80, UNREACHABLE)?;
    Ok(())
}

/// A UDP packet over IPv4 to a port that nobody but these packets use.
fn udp4(src: [u8; 4], dst: [u8; 4], port: u16, len: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    etherparse::PacketBuilder::ipv4(src, dst, 64)
        .udp(4444, port)
        .write(&mut packet, &vec![b'x'; len])
        .expect("short");
    packet
}

fn udp6(src: &str, dst: &str, port: u16) -> Vec<u8> {
    let octets = |a: &str| a.parse::<std::net::Ipv6Addr>().expect("valid").octets();
    let mut packet = Vec::new();
    etherparse::PacketBuilder::ipv6(octets(src), octets(dst), 64)
        .udp(4444, port)
        .write(&mut packet, b"x")
        .expect("short");
    packet
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn a_client_that_forges_packets_reaches_nothing_and_is_counted() -> Result<()> {
    let mut lab = lab("forged", &[], &[])?;
    fetch(&lab, RESOURCE_V4.parse()?)?;
    fetch(&lab, RESOURCE_V6.parse()?)?;
    let own: std::net::Ipv4Addr = client_address(&lab)?.parse()?;
    let own = own.octets();
    let status = lab.status()?;
    let own6 = status["clients"][0]["addresses"][1].as_str();
    let own6 = own6.context("an IPv6 address")?.to_owned();
    let resource = [10, 99, 0, 2];
    lab.net.nft(
        "resource",
        "table inet seen { chain input { type filter hook input priority -300; \
         meta l4proto != icmpv6 counter; }; }",
    )?;
    let seen = |lab: &Lab| -> Result<u64> {
        let text = lab
            .net
            .output("resource", "nft list chain inet seen input")?;
        let number = text
            .split("packets ")
            .nth(1)
            .and_then(|t| t.split(' ').next());
        Ok(number.context("a counter")?.parse()?)
    };
    let all_drops = |lab: &Lab| -> Result<u64> {
        let status = lab.status()?;
        let drops = status["clients"][0]["dropped"].as_object();
        Ok(drops.map_or(0, |d| d.values().filter_map(Value::as_u64).sum()))
    };

    // What is right arrives, so that what is wrong could.
    let valid = udp4(own, resource, 9999, 100);
    lab.inject(&[valid.clone(), udp6(&own6, RESOURCE_V6, 9999)])?;
    lab.net
        .eventually("two arrive", Duration::from_secs(5), |net| {
            let text = net.output("resource", "nft list chain inet seen input")?;
            ensure!(text.contains("packets 2 "), "{text}");
            Ok(())
        })?;

    let mut forged: Vec<Vec<u8>> = Vec::new();
    let others = [[100, 64, 0, 77], resource, [100, 64, 0, 1], [127, 0, 0, 1]];
    forged.extend(others.map(|src| udp4(src, resource, 9999, 10)));
    forged.push(udp6("fd00:2021:1111::77", RESOURCE_V6, 9999));
    forged.push(udp6("::1", RESOURCE_V6, 9999));
    // To others, to groups, to the gateway itself.
    let places = [
        [100, 64, 0, 77],
        [100, 96, 0, 1],
        [224, 0, 0, 251],
        [255, 255, 255, 255],
        [127, 0, 0, 1],
        [192, 168, 20, 1],
        [100, 64, 0, 1],
    ];
    forged.extend(places.map(|dst| udp4(own, dst, 22, 10)));
    forged.extend(["fd00:2021:1111::77", "ff02::1", "::1"].map(|dst| udp6(&own6, dst, 22)));
    // Fragments: the first, a later one.
    for bits in [[0x20, 0], [0, 1]] {
        let mut fragment = valid.clone();
        fragment[6..8].copy_from_slice(&bits);
        forged.push(fragment);
    }
    // A length field that lies, both ways.
    for len in [valid.len() - 1, valid.len() + 1] {
        let mut lie = valid.clone();
        lie[24..26].copy_from_slice(&((len - 20) as u16).to_be_bytes());
        forged.push(lie);
    }
    // Another version; ICMP of the other family; an error about somebody's packet.
    for version in [0x05, 0x75, 0xF5] {
        let mut odd = valid.clone();
        odd[0] = version;
        forged.push(odd);
    }
    let mut icmpv6_in_v4 = valid.clone();
    icmpv6_in_v4[9] = 58;
    forged.push(icmpv6_in_v4);
    let mut error = Vec::new();
    etherparse::PacketBuilder::ipv4(own, resource, 64)
        .icmpv4_raw(3, 1, [0; 4])
        .write(&mut error, &udp4(resource, own, 1, 8))
        .context("short")?;
    forged.push(error);
    // Too long for the tunnel.
    forged.push(udp4(own, resource, 9999, 1400));
    // Every truncation, as it is and with a length field that admits to it.
    for len in 1..valid.len() {
        forged.push(valid[..len].to_vec());
        let mut cut = valid[..len].to_vec();
        if len >= 4 {
            cut[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        }
        forged.push(cut);
    }

    let before = all_drops(&lab)?;
    lab.inject(&forged)?;
    let wanted = before + forged.len() as u64;
    lab.net
        .eventually("all are counted", Duration::from_secs(10), |net| {
            let status = net.output("gateway", "curl -sf http://127.0.0.1:8080/status")?;
            let status: Value = serde_json::from_str(&status)?;
            let drops = &status["clients"][0]["dropped"];
            let sum = drops
                .as_object()
                .map_or(0, |d| d.values().filter_map(Value::as_u64).sum());
            ensure!(sum == wanted, "{sum} of {wanted}: {drops}");
            Ok(())
        })?;
    ensure!(seen(&lab)? == 2, "something arrived");
    // And the client still is served.
    fetch(&lab, RESOURCE_V4.parse()?)?;
    Ok(())
}

#[test]
#[ignore = "needs root, coturn and network namespaces"]
fn flow_logs_reach_the_portal_with_the_grants_token() -> Result<()> {
    let mut lab = Lab::new("flow-logs", gateway())?;
    let policy = lab.net.dir().join("policy.yaml");
    let text = std::fs::read_to_string(&policy)?;
    let uploads = format!("flow_logs: {{api_url: \"http://{INTERNET}:4318\", interval: 1}}\n");
    std::fs::write(&policy, text + &uploads)?;
    lab.serve_names(&["--host-record=a.corp.example,10.99.0.2,fd99::2"])?;
    lab.start_surroundings()?;
    lab.start_gateway(&[("FIREZONE_FLOW_LOGS", "true")])?;
    lab.wait_ready()?;
    lab.start_client(&[])?;
    let name = lab.resolve("a.corp.example")?;
    fetch(&lab, name.v4)?;
    fetch(&lab, RESOURCE_V6.parse()?)?;
    // With the gateway's end, all flows end.
    std::thread::sleep(Duration::from_secs(2));
    lab.net.signal("gateway", rustix::process::Signal::TERM)?;
    lab.net.wait("gateway", Duration::from_secs(5))?;
    let log = lab.net.whole_log("gateway");
    ensure!(
        log.contains("Flow began") && log.contains("Flow ended"),
        "{log}"
    );
    // What was not uploaded then is, after the next start.
    lab.start_gateway(&[])?;
    let uploaded = |net: &firezone_lab::netns::Net| -> Result<Vec<Value>> {
        let text = net.output("internet", "curl -sSf http://127.0.0.1:4318/flow_logs")?;
        Ok(serde_json::from_str(&text)?)
    };
    lab.net
        .eventually("two ends are uploaded", Duration::from_secs(20), |net| {
            let all = uploaded(net)?;
            let ends = all
                .iter()
                .filter(|log| log["record"]["flow_end"].is_string());
            ensure!(ends.count() >= 2, "{all:?}");
            Ok(())
        })?;
    let all = uploaded(&lab.net)?;
    let by_name = all
        .iter()
        .find(|log| {
            log["record"]["domain"] == "a.corp.example" && !log["record"]["flow_end"].is_null()
        })
        .with_context(|| format!("{all:?}"))?;
    let (record, claims) = (&by_name["record"], &by_name["claims"]);
    ensure!(
        claims["resource_id"] == CORP_ID && claims["role"] == "responder",
        "{claims}"
    );
    ensure!(
        record["protocol"] == "tcp" && record["inner_dst_ip"] == RESOURCE_V4,
        "{record}"
    );
    ensure!(record["inner_dst_port"] == 80, "{record}");
    ensure!(record["rx_bytes"].as_u64() > Some(100), "{record}");
    ensure!(record["tx_bytes"].as_u64() > Some(50), "{record}");
    ensure!(record["outers"][0]["dst_port"] == 52625, "{record}");
    // The token stays out of logs and status.
    let shown = lab.status()?.to_string() + &lab.net.whole_log("gateway");
    ensure!(shown.contains("access granted"), "not the whole log");
    ensure!(!shown.contains("eyJ"), "a token shows");
    Ok(())
}
