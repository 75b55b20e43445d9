//! DNS resources (data-path spec §5.4 and §6).

#![allow(clippy::unwrap_used)]

use super::*;

const PROXY: [u8; 4] = [100, 96, 0, 1];
const PROXY2: [u8; 4] = [100, 96, 0, 2];
const PROXY6: &str = "fd00:2021:1111:8000::1";

/// A DNS resource for `*.corp.example` with filters.
fn corp(n: u8, filters: &[Filter]) -> Resource {
    let Resource::Dns(mut resource) = dns(n, "*.corp.example") else {
        unreachable!();
    };
    resource.filters = filters.to_vec();
    Resource::Dns(resource)
}

/// Client 1, which can announce names.
struct Namer {
    access: Access,
    now: Instant,
}

impl Namer {
    fn new(grants: &[(Resource, Option<u64>)]) -> Self {
        let (access, now) = access();
        let mut namer = Self { access, now };
        for (resource, expires_at) in grants {
            namer.grant(resource.clone(), *expires_at);
        }
        namer
    }

    fn grant(&mut self, resource: Resource, expires_at: Option<u64>) {
        let now = self.now;
        self.access.authorize(now, &peer(1), resource, expires_at);
    }

    fn announce(&mut self, resource: u8, domain: &str, proxies: &[IpAddr], addresses: &[IpAddr]) {
        let mut resolved = Resolved {
            ipv4: Some(vec![]),
            ipv6: Some(vec![]),
        };
        for address in addresses {
            match address {
                IpAddr::V4(a) => resolved.ipv4.as_mut().unwrap().push(*a),
                IpAddr::V6(a) => resolved.ipv6.as_mut().unwrap().push(*a),
            }
        }
        let (client, resource) = (client_id(1), resource_id(resource));
        self.access
            .announce(client, resource, domain, proxies, &resolved, self.now)
            .unwrap();
    }

    fn policy(&self) -> Arc<ClientPolicy> {
        self.access.policy(client_id(1)).unwrap()
    }

    fn send(&self, packet: &[u8]) -> Result<Passed, Denied> {
        self.policy().admit_outbound(&meta(packet), self.now)
    }

    fn receive(&self, packet: &[u8]) -> Result<Passed, Denied> {
        self.policy().admit_inbound(&meta(packet), self.now)
    }

    /// The flow of a TCP segment to a proxy address.
    #[track_caller]
    fn connect(&self, proxy: [u8; 4], port: u16) -> Arc<Flow> {
        let passed = self.send(&tcp4(addr4(1), proxy, 1000, port, b""));
        passed.unwrap().flow.unwrap()
    }

    /// Asserts what becomes of a TCP segment to this port of a proxy address.
    #[track_caller]
    fn assert_to(&self, proxy: [u8; 4], port: u16, expected: Verdict) {
        let packet = tcp4(addr4(1), proxy, 1000, port, b"");
        let passed = self.send(&packet).map(|passed| passed.until);
        assert_eq!(Verdict::from(passed), expected);
    }
}

#[test]
fn an_announced_name_is_reached_through_its_proxy_address_both_ways() {
    let mut namer = Namer::new(&[(corp(1, &[]), None)]);
    let proxies = [PROXY.into(), PROXY6.parse().unwrap()];
    let addresses = [HOST.into(), HOST6.parse().unwrap()];
    namer.announce(1, "db.corp.example", &proxies, &addresses);
    let (c4, c6) = (addr4(1), addr6(1));
    for (out, back) in [
        (
            tcp4(c4, PROXY, 1000, 443, b""),
            tcp4(HOST, c4, 443, 1000, b""),
        ),
        (
            icmp4(c4, PROXY, 8, 0, [0, 7, 0, 1], b""),
            icmp4(HOST, c4, 0, 0, [0, 7, 0, 1], b""),
        ),
        (
            udp6(&c6, PROXY6, 1000, 443, b""),
            udp6(HOST6, &c6, 443, 1000, b""),
        ),
    ] {
        let unasked = namer.receive(&back).unwrap_err();
        assert_eq!(
            unasked,
            Denied {
                reason: DropReason::NoFlow,
                reply: None
            }
        );
        let flow = namer.send(&out).unwrap().flow.unwrap();
        assert!(flow.is_translated());
        assert_eq!(flow.remote(), meta(&out).dst);
        assert_eq!(flow.outside(), meta(&back).src);
        let answer = namer.receive(&back).unwrap().flow.unwrap();
        assert!(Arc::ptr_eq(&flow, &answer));
    }
}

#[test]
fn a_name_grants_nothing_on_the_real_address() {
    let mut namer = Namer::new(&[(corp(1, &[]), None)]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    namer.assert_to(HOST, 443, prohibited(DropReason::NoGrant));
    namer.connect(PROXY, 443);
    namer.assert_to(HOST, 443, prohibited(DropReason::NoGrant));
}

#[test]
fn an_announced_name_is_judged_by_the_filters_of_its_resource() {
    let mut namer = Namer::new(&[
        (corp(1, &[tcp(443, 443)]), Some(UNIX + 10)),
        (dns(2, "*.other.example"), None),
    ]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    let until = Some(namer.now + Duration::from_secs(10));
    namer.assert_to(PROXY, 443, Verdict::Allow { until });
    namer.assert_to(PROXY, 80, prohibited(DropReason::FilterDenied));

    // Filters that change meanwhile apply to what comes back, too.
    let back = tcp4(HOST, addr4(1), 443, 1000, b"");
    assert!(namer.receive(&back).is_ok());
    namer.access.update_resource(&corp(1, &[tcp(80, 80)]));
    assert_eq!(
        namer.receive(&back).unwrap_err(),
        Denied {
            reason: DropReason::FilterDenied,
            reply: None
        }
    );
}

#[test]
fn two_names_for_one_host_keep_their_own_filters_both_ways() {
    let mut namer = Namer::new(&[
        (corp(1, &[tcp(443, 443)]), None),
        (dns(2, "ssh.example"), None),
    ]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    namer.announce(2, "ssh.example", &[PROXY2.into()], &[HOST.into()]);
    namer.assert_to(PROXY, 22, prohibited(DropReason::FilterDenied));
    let web = namer.connect(PROXY, 443);
    let other = namer.connect(PROXY2, 443);
    assert_eq!(web.outside(), other.outside());
    assert_ne!(web.outside_port(), other.outside_port());

    let back = |flow: &Flow| tcp4(HOST, addr4(1), 443, flow.outside_port(), b"");
    for flow in [&web, &other] {
        let answer = namer.receive(&back(flow)).unwrap().flow.unwrap();
        assert!(Arc::ptr_eq(&answer, flow));
    }
    // What is taken from one is not taken from the other.
    namer.access.update_resource(&corp(1, &[tcp(80, 80)]));
    assert_eq!(
        namer.receive(&back(&web)).unwrap_err().reason,
        DropReason::FilterDenied
    );
    assert!(namer.receive(&back(&other)).is_ok());
    namer.access.reject(client_id(1), resource_id(2));
    assert_eq!(
        namer.receive(&back(&other)).unwrap_err().reason,
        DropReason::NoGrant
    );
}

#[test]
fn a_name_with_ipv6_addresses_alone_is_unreachable_over_ipv4() {
    let mut namer = Namer::new(&[(corp(1, &[tcp(443, 443)]), None)]);
    let proxies = [PROXY.into(), PROXY6.parse().unwrap()];
    namer.announce(1, "db.corp.example", &proxies, &[HOST6.parse().unwrap()]);
    namer.assert_to(PROXY, 443, unreachable(DropReason::NotTranslated));
    // Filters come first: they say more than the lack of an address.
    namer.assert_to(PROXY, 80, prohibited(DropReason::FilterDenied));
    let out = tcp6(&addr6(1), PROXY6, 1000, 443, b"");
    let flow = namer.send(&out).unwrap().flow.unwrap();
    assert_eq!(flow.outside(), HOST6.parse::<IpAddr>().unwrap());
    // A name without any address is unreachable as a whole.
    namer.announce(1, "none.corp.example", &[PROXY2.into()], &[]);
    namer.assert_to(PROXY2, 443, unreachable(DropReason::NotTranslated));
}

#[test]
fn a_protocol_that_cannot_be_translated_is_dropped_silently() {
    let mut namer = Namer::new(&[(corp(1, &[]), None)]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    for protocol in [47, 50, 132] {
        let packet = ip4(addr4(1), PROXY, protocol, b"payload");
        assert_eq!(
            namer.send(&packet).unwrap_err(),
            Denied {
                reason: DropReason::NatUnsupportedProtocol,
                reply: None
            }
        );
    }
}

#[test]
fn an_address_that_was_not_announced_is_unreachable_beside_one_that_was() {
    let mut namer = Namer::new(&[(corp(1, &[]), None)]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    namer.assert_to(PROXY, 443, FOREVER);
    namer.assert_to(PROXY2, 443, unreachable(DropReason::NotTranslated));
}

#[test]
fn one_client_cannot_use_the_names_of_another() {
    let mut namer = Namer::new(&[(corp(1, &[]), None)]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    let now = namer.now;
    namer.access.authorize(now, &peer(2), corp(1, &[]), None);
    let other = namer.access.policy(client_id(2)).unwrap();
    let packet = meta(&tcp4(addr4(2), PROXY, 1000, 443, b""));
    assert_eq!(
        other.admit_outbound(&packet, now).unwrap_err(),
        Denied {
            reason: DropReason::NotTranslated,
            reply: Some(Reply::Unreachable)
        }
    );
}

#[test]
fn a_name_whose_grant_was_taken_back_is_prohibited() {
    for other in [cidr(9, LAN6, &[]), dns(9, "other.example"), internet(9)] {
        let mut namer = Namer::new(&[(corp(1, &[]), None), (other, None)]);
        namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
        namer.connect(PROXY, 443);
        namer.access.reject(client_id(1), resource_id(1));
        namer.assert_to(PROXY, 443, prohibited(DropReason::NoGrant));
        let back = tcp4(HOST, addr4(1), 443, 1000, b"");
        assert_eq!(
            namer.receive(&back).unwrap_err(),
            Denied {
                reason: DropReason::NoGrant,
                reply: None
            }
        );
    }
}

#[test]
fn a_name_whose_grant_has_expired_is_prohibited_before_and_after_its_removal() {
    let mut namer = Namer::new(&[
        (corp(1, &[]), Some(UNIX + 10)),
        (dns(2, "other.example"), None),
    ]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    namer.connect(PROXY, 443);
    namer.now += Duration::from_secs(10);
    namer.assert_to(PROXY, 443, prohibited(DropReason::GrantExpired));
    let back = tcp4(HOST, addr4(1), 443, 1000, b"");
    assert_eq!(
        namer.receive(&back).unwrap_err(),
        Denied {
            reason: DropReason::GrantExpired,
            reply: None
        }
    );
    namer.access.handle_timeout(namer.now);
    namer.assert_to(PROXY, 443, prohibited(DropReason::NoGrant));
}

#[test]
fn a_name_works_again_once_its_resource_is_granted_again() {
    let mut namer = Namer::new(&[(corp(1, &[]), None), (cidr(2, LAN6, &[]), None)]);
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    let flow = namer.connect(PROXY, 443);
    namer.access.reject(client_id(1), resource_id(1));
    namer.assert_to(PROXY, 443, prohibited(DropReason::NoGrant));
    namer.grant(corp(1, &[]), None);
    // Clients do not announce again what was confirmed once; even the connection goes on.
    assert!(Arc::ptr_eq(&namer.connect(PROXY, 443), &flow));
    let back = tcp4(HOST, addr4(1), 443, 1000, b"");
    assert!(namer.receive(&back).is_ok());
}

#[test]
fn of_a_network_over_the_proxy_range_and_a_name_what_permits_wins_then_the_name() {
    let (name_end, network_end) = (Some(UNIX + 10), Some(UNIX + 20));
    for (name, network) in [(1, 2), (2, 1)] {
        let mut namer = Namer::new(&[
            (corp(name, &[tcp(443, 444)]), name_end),
            (
                cidr(network, "100.64.0.0/10", &[tcp(444, 445)]),
                network_end,
            ),
        ]);
        namer.announce(name, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
        let until = |s| Verdict::Allow {
            until: Some(namer.now + Duration::from_secs(s)),
        };
        namer.assert_to(PROXY, 443, until(10));
        // Both permit it; the name is the longer prefix, whatever the ids.
        namer.assert_to(PROXY, 444, until(10));
        namer.assert_to(PROXY, 445, until(20));
        namer.assert_to(PROXY, 446, prohibited(DropReason::FilterDenied));
        // Where nothing was announced the network helps only to say no.
        namer.assert_to(PROXY2, 445, unreachable(DropReason::NotTranslated));
    }
}

#[test]
fn of_a_name_and_a_network_of_just_its_address_the_larger_id_decides() {
    for (name, network, seconds) in [(1, 2, 20), (2, 1, 10)] {
        let mut namer = Namer::new(&[
            (corp(name, &[]), Some(UNIX + 10)),
            (cidr(network, "100.96.0.1/32", &[]), Some(UNIX + 20)),
        ]);
        namer.announce(name, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
        let until = Some(namer.now + Duration::from_secs(seconds));
        namer.assert_to(PROXY, 443, Verdict::Allow { until });
    }
}

#[test]
fn of_two_resources_with_the_same_name_what_permits_wins_then_the_larger_id() {
    let mut namer = Namer::new(&[
        (corp(1, &[tcp(443, 444)]), Some(UNIX + 10)),
        (corp(2, &[tcp(444, 445)]), Some(UNIX + 20)),
        (corp(3, &[]), Some(UNIX + 30)),
    ]);
    for n in [2, 1] {
        namer.announce(n, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    }
    let until = |s| Verdict::Allow {
        until: Some(namer.now + Duration::from_secs(s)),
    };
    namer.assert_to(PROXY, 443, until(10));
    namer.assert_to(PROXY, 444, until(20));
    namer.assert_to(PROXY, 445, until(20));
    // The third covers the name, but it was not announced for it.
    namer.assert_to(PROXY, 446, prohibited(DropReason::FilterDenied));
}

#[test]
fn an_internet_resource_and_names_do_not_mix() {
    let mut namer = Namer::new(&[
        (corp(1, &[tcp(443, 443)]), None),
        (internet(2), Some(UNIX + 10)),
        (cidr(3, "100.64.0.0/10", &[]), None),
    ]);
    // A private address, which the Internet resource alone would refuse.
    namer.announce(1, "db.corp.example", &[PROXY.into()], &[HOST.into()]);
    let end = namer.now + Duration::from_secs(10);
    namer.assert_to(PUBLIC, 80, Verdict::Allow { until: Some(end) });
    namer.assert_to(HOST, 443, unreachable(DropReason::InternetRefused));
    namer.assert_to(PROXY, 443, FOREVER);
    let back = tcp4(HOST, addr4(1), 443, 1000, b"");
    assert_eq!(namer.receive(&back).unwrap().until, None);
    // The Internet resource permits nothing on a name, and networks are ignored besides it.
    namer.assert_to(PROXY, 80, prohibited(DropReason::FilterDenied));
    namer.assert_to(PROXY2, 443, unreachable(DropReason::NotTranslated));
    namer.now = end;
    namer.assert_to(PROXY, 80, FOREVER);
}

#[test]
fn errors_about_translated_flows_name_the_flow_that_they_are_about() {
    let mut namer = Namer::new(&[(corp(1, &[]), None)]);
    let proxies = [PROXY.into(), PROXY6.parse().unwrap()];
    let addresses = [HOST.into(), HOST6.parse().unwrap()];
    namer.announce(1, "db.corp.example", &proxies, &addresses);
    namer.announce(1, "b.corp.example", &[PROXY2.into()], &[HOST.into()]);
    let (c4, c6) = (addr4(1), addr6(1));
    let policy = namer.policy();
    let first = namer.connect(PROXY, 443);
    let second = namer.connect(PROXY2, 443);
    let third = namer.send(&udp6(&c6, PROXY6, 1000, 443, b"")).unwrap();
    let (third, port) = (third.flow.unwrap(), second.outside_port());
    let quoted6 = udp6(&c6, HOST6, 1000, 443, b"");
    for (packet, expected) in [
        // From the resource itself or a router on the way, of any kind.
        (
            icmp4(HOST, c4, 3, 3, [0; 4], &tcp4(c4, HOST, 1000, 443, b"")),
            &first,
        ),
        (
            icmp4(PUBLIC, c4, 11, 0, [0; 4], &tcp4(c4, HOST, port, 443, b"")),
            &second,
        ),
        (icmp6(PUBLIC6, &c6, 2, 0, [0, 0, 5, 0], &quoted6), &third),
    ] {
        let about = policy.admit_error(&packet, &meta(&packet), namer.now);
        let (flow, embedded) = about.unwrap().unwrap();
        assert!(Arc::ptr_eq(&flow, expected));
        assert_eq!(embedded.dst, flow.outside());
        assert_eq!(embedded.src_port, flow.outside_port());
    }
    // About a packet as the client sent it, or about none that it sent.
    for quoted in [
        tcp4(c4, PROXY, 1000, 443, b""),
        tcp4(c4, HOST, 999, 443, b""),
    ] {
        let packet = icmp4(PUBLIC, c4, 3, 1, [0; 4], &quoted);
        assert_eq!(
            unasked(&policy, &packet, namer.now),
            silent(DropReason::NoFlow)
        );
    }
}

#[test]
fn a_client_that_renumbers_its_names_loses_the_flows_to_the_old_ones() {
    let mut namer = Namer::new(&[(corp(1, &[]), None), (cidr(2, LAN, &[]), None)]);
    namer.announce(1, "a.corp.example", &[PROXY.into()], &[HOST.into()]);
    let old = namer.connect(PROXY, 443);
    let direct = namer.connect([10, 0, 0, 2], 443);
    namer.announce(1, "b.corp.example", &[PROXY.into()], &[PUBLIC.into()]);
    let tick = namer.policy().tick(namer.now);
    assert!(old.is_over(tick));
    assert!(!direct.is_over(tick));
    assert_eq!(namer.connect(PROXY, 443).outside(), IpAddr::from(PUBLIC));
}

#[test]
fn an_address_that_was_forgotten_and_given_to_another_name_leads_to_that_one() {
    let mut namer = Namer::new(&[(dns(1, "a.example"), None), (dns(2, "b.example"), None)]);
    namer.announce(1, "a.example", &[PROXY.into()], &[HOST.into()]);
    let old = namer.connect(PROXY, 443);
    assert_eq!(old.outside(), IpAddr::from(HOST));
    // The client has no access to the old name any more, and must not keep it under the new one.
    namer.grant(dns(1, "c.example"), None);
    namer.announce(2, "b.example", &[PROXY.into()], &[PUBLIC.into()]);
    assert_eq!(namer.connect(PROXY, 443).outside(), IpAddr::from(PUBLIC));
    assert!(old.is_over(namer.policy().tick(namer.now)));
}

#[test]
fn an_address_that_made_room_and_was_given_to_another_name_leads_to_that_one() {
    let mut namer = Namer::new(&[(dns(1, "a.example"), None), (dns(2, "**.b.example"), None)]);
    namer.announce(1, "a.example", &[PROXY.into()], &[HOST.into()]);
    namer.connect(PROXY, 443);
    namer.access.reject(client_id(1), resource_id(1));
    let others: Vec<IpAddr> = (0..crate::access::limits::MAX_PROXIES as u32)
        .map(|n| Ipv4Addr::from_bits(Ipv4Addr::new(100, 97, 0, 0).to_bits() + n).into())
        .collect();
    for (n, some) in others.chunks(64).enumerate() {
        namer.announce(2, &format!("n{n}.b.example"), some, &[PUBLIC.into()]);
    }
    namer.assert_to(PROXY, 443, unreachable(DropReason::NotTranslated));
    namer.announce(2, "one.b.example", &[PROXY.into()], &[PUBLIC.into()]);
    assert_eq!(namer.connect(PROXY, 443).outside(), IpAddr::from(PUBLIC));
}
