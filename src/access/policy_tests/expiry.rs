//! Grants that end.

#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn every_kind_of_grant_ends_on_the_tick_even_if_the_slow_path_is_late() {
    const TICK: Duration = Duration::from_nanos(1);
    let packets = |dst: [u8; 4], port| {
        (
            meta(&udp4(addr4(1), dst, 1, port, b"")),
            udp4(dst, addr4(1), port, 1, b""),
        )
    };
    let error = icmp4(
        PUBLIC,
        addr4(1),
        11,
        0,
        [0; 4],
        &udp4(addr4(1), HOST, 1, 2, b""),
    );
    for (grant, (there, back)) in [
        (cidr(1, LAN, &[]), packets(HOST, 443)),
        (internet(1), packets(PUBLIC, 443)),
        (dns(1, "a.example"), packets(GATEWAY4, DNS_PORT)),
    ] {
        let (policy, now) = policy(&[(grant, Some(UNIX + 60))]);
        let end = now + Duration::from_secs(60);
        for at in [now, end - TICK] {
            let allowed = Verdict::Allow { until: Some(end) };
            assert_eq!(policy.outbound(&there, at), allowed);
            assert_eq!(inbound(&policy, &back, at), allowed);
            // Judged anew each time, so that it needs no end.
            assert_eq!(inbound(&policy, &error, at), FOREVER);
        }
        for at in [end, end + TICK, end + Duration::from_secs(86_400)] {
            assert_eq!(
                policy.outbound(&there, at),
                prohibited(DropReason::GrantExpired)
            );
            assert_eq!(
                inbound(&policy, &back, at),
                silent(DropReason::GrantExpired)
            );
            assert_eq!(
                inbound(&policy, &error, at),
                silent(DropReason::GrantExpired)
            );
        }
    }
}

#[test]
fn an_expired_dns_grant_leaves_proxy_addresses_prohibited() {
    let (policy, now) = policy(&[(dns(1, "a.example"), Some(UNIX + 60))]);
    let packet = meta(&udp4(addr4(1), [100, 96, 0, 1], 1, 443, b""));
    let end = now + Duration::from_secs(60);
    assert_eq!(
        policy.outbound(&packet, end - Duration::from_nanos(1)),
        unreachable(DropReason::NotTranslated)
    );
    assert_eq!(
        policy.outbound(&packet, end),
        prohibited(DropReason::GrantExpired)
    );
}

#[test]
fn gateway_services_last_as_long_as_the_longest_grant() {
    let (policy, now) = policy(&[
        (cidr(1, LAN, &[]), Some(UNIX + 60)),
        (dns(2, "a.example"), Some(UNIX + 90)),
        (internet(3), Some(UNIX + 30)),
    ]);
    let packet = meta(&udp4(addr4(1), GATEWAY4, 1, 53_535, b""));
    let until = Some(now + Duration::from_secs(90));
    assert_eq!(policy.outbound(&packet, now), Verdict::Allow { until });
}
