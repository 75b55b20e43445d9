#![allow(clippy::unwrap_used)]

use super::*;
use crate::access::fixtures::*;
use crate::access::limits::MAX_UNTOLD;
use crate::access::{Access, Resolved};
use crate::packet::samples::{icmp4, ip4, tcp4, tcp4_flags, udp4};

const HOST: [u8; 4] = [10, 0, 0, 1];
const PROXY: [u8; 4] = [100, 96, 0, 1];
const SECOND: Duration = Duration::from_secs(1);

/// Client 1 with a network and names, whose packets pass as a worker lets them.
struct World {
    access: Access,
    start: Instant,
    now: Instant,
}

impl World {
    fn new() -> Self {
        let (mut access, now) = access();
        access.account_for_flows(true);
        access.authorize(now, &peer(1), cidr(1, "10.0.0.0/8", &[]), None);
        access.authorize(now, &peer(1), dns(2, "**.example"), None);
        Self {
            access,
            start: now,
            now,
        }
    }

    fn out(&self, packet: &[u8]) {
        let policy = self.access.policy(client_id(1)).unwrap();
        let meta = meta(packet);
        let flow = policy.admit_outbound(&meta, self.now).unwrap().flow;
        let flow = flow.unwrap();
        flow.pass_out(policy.tick(self.now), &meta, &mut packet.to_vec());
    }

    fn come(&self, packet: &[u8]) {
        let policy = self.access.policy(client_id(1)).unwrap();
        let meta = meta(packet);
        let flow = policy.admit_inbound(&meta, self.now).unwrap().flow;
        let flow = flow.unwrap();
        flow.pass_in(policy.tick(self.now), &meta, &mut packet.to_vec());
    }

    fn to_host(&self, flags: &str) {
        self.out(&tcp4_flags(addr4(1), HOST, 1000, 443, flags));
    }

    fn host_says(&self, flags: &str) {
        self.come(&tcp4_flags(HOST, addr4(1), 443, 1000, flags));
    }

    /// What there is to report after this many seconds, with a tick in each.
    fn after(&mut self, seconds: u32) -> Vec<FlowReport> {
        let mut reports = Vec::new();
        for _ in 0..seconds {
            self.now += SECOND;
            self.access.handle_timeout(self.now);
            reports.extend(std::iter::from_fn(|| self.access.poll_report()));
        }
        reports
    }

    fn seconds(&self, at: Instant) -> u64 {
        at.duration_since(self.start).as_secs()
    }
}

/// `began` or `ended` by report.
fn kinds(reports: &[FlowReport]) -> Vec<&'static str> {
    let kind = |r: &FlowReport| if r.ended.is_some() { "ended" } else { "began" };
    reports.iter().map(kind).collect()
}

#[test]
fn nothing_is_accounted_for_unless_asked() {
    let mut world = World::new();
    world.access.account_for_flows(false);
    world.to_host("S");
    world.host_says("R");
    assert!(world.after(60).is_empty());
}

#[test]
fn a_connection_is_told_from_its_first_packet_to_its_last() {
    let mut world = World::new();
    world.to_host("S");
    world.host_says("SA");
    let reports = world.after(1);
    assert_eq!(kinds(&reports), ["began"]);
    assert_eq!(reports[0].client, client_id(1));
    assert_eq!(reports[0].resource, resource_id(1));
    assert_eq!(reports[0].protocol, 6);
    assert_eq!(reports[0].source, SocketAddr::from((addr4(1), 1000)));
    assert_eq!(reports[0].destination, SocketAddr::from((HOST, 443)));
    assert_eq!(reports[0].domain, None);
    assert_eq!(reports[0].began, world.start);

    world.out(&tcp4(addr4(1), HOST, 1000, 443, &[1; 100]));
    world.come(&tcp4(HOST, addr4(1), 443, 1000, &[1; 1000]));
    assert!(world.after(9).is_empty());
    world.to_host("FA");
    world.host_says("FA");
    world.to_host("A");
    let reports = world.after(30);
    assert_eq!(kinds(&reports), ["ended"]);
    let end = reports[0].ended.unwrap();
    assert_eq!(reports[0].began, world.start);
    assert_eq!(world.seconds(end.last_packet), 10);
    let counted = Counted {
        out_packets: 4,
        out_bytes: 100,
        in_packets: 3,
        in_bytes: 1000,
    };
    assert_eq!(end.counted, counted);
    assert!(world.after(300).is_empty());
}

#[test]
fn the_last_words_of_something_older_are_no_flow_until_more_is_said() {
    let mut world = World::new();
    world.to_host("A");
    world.to_host("FA");
    assert!(world.after(30).is_empty());
    world.out(&tcp4(addr4(1), HOST, 1000, 443, b"more"));
    let reports = world.after(16);
    assert_eq!(kinds(&reports), ["began"]);
}

#[test]
fn silence_ends_a_flow_for_the_logs_and_it_begins_anew_when_it_speaks() {
    let mut world = World::new();
    world.to_host("S");
    world.host_says("SA");
    assert_eq!(kinds(&world.after(100)), ["began"]);
    let reports = world.after(40);
    assert_eq!(kinds(&reports), ["ended"]);
    assert_eq!(world.seconds(reports[0].ended.unwrap().last_packet), 0);
    assert!(world.after(60).is_empty());
    world.out(&tcp4(addr4(1), HOST, 1000, 443, b"more"));
    let reports = world.after(16);
    assert_eq!(kinds(&reports), ["began"]);
    assert_eq!(world.seconds(reports[0].began), 200);
    world.host_says("R");
    let reports = world.after(30);
    assert_eq!(kinds(&reports), ["ended"]);
    assert_eq!(reports[0].ended.unwrap().counted.out_packets, 1);
}

#[test]
fn a_flow_begins_anew_with_what_the_resource_says_just_as_well() {
    let mut world = World::new();
    world.to_host("S");
    world.host_says("SA");
    assert_eq!(kinds(&world.after(140)), ["began", "ended"]);
    // Keep-alives of a connection are not worth a record.
    world.host_says("A");
    assert!(world.after(60).is_empty());
    world.come(&tcp4(HOST, addr4(1), 443, 1000, b"push"));
    let reports = world.after(16);
    assert_eq!(kinds(&reports), ["began"]);
    assert_eq!(world.seconds(reports[0].began), 200);
    world.to_host("A");
    world.host_says("R");
    let reports = world.after(30);
    assert_eq!(kinds(&reports), ["ended"]);
    let counted = reports[0].ended.unwrap().counted;
    assert_eq!((counted.in_bytes, counted.out_bytes), (4, 0));
}

#[test]
fn a_connection_that_follows_on_the_same_ports_is_another_flow() {
    let mut world = World::new();
    world.to_host("S");
    world.host_says("R");
    world.to_host("S");
    assert_eq!(kinds(&world.after(1)), ["began", "began", "ended"]);
}

#[test]
fn one_who_ends_and_begins_connections_without_pause_cannot_fill_our_memory() {
    let mut world = World::new();
    for _ in 0..3 * MAX_UNTOLD {
        world.to_host("S");
        world.to_host("R");
    }
    let reports = world.after(1);
    assert_eq!(reports.len(), MAX_UNTOLD);
    let not_logged = 3 * MAX_UNTOLD - reports.len() / 2;
    assert_eq!(world.access.reports_dropped(), not_logged as u64);
    // What comes later is logged again.
    world.to_host("S");
    assert_eq!(kinds(&world.after(1)), ["began"]);
}

#[test]
fn reports_that_nobody_takes_are_dropped_at_some_point() {
    let mut reports = Reports::default();
    let owner = Owner {
        resource: resource_id(1),
        authorization: None,
    };
    let (now, end) = (Instant::now(), SocketAddr::from((HOST, 1)));
    let account = Account::new(owner, None);
    for _ in 0..MAX_REPORTS + 5 {
        reports.push(account.report(client_id(1), 6, (end, end), now, None));
    }
    assert_eq!(reports.dropped(), 5);
    reports.drop_flows(2);
    assert_eq!(reports.dropped(), 7);
    let taken = std::iter::from_fn(|| reports.pop()).count();
    assert_eq!(taken, MAX_REPORTS);
}

#[test]
fn everything_ends_with_the_client() {
    let mut world = World::new();
    world.to_host("S");
    world.out(&udp4(addr4(1), HOST, 7, 9, b"x"));
    world.access.remove_client(client_id(1));
    let reports: Vec<_> = std::iter::from_fn(|| world.access.poll_report()).collect();
    assert_eq!(reports.len(), 4);
    // Beginnings that were not told yet come first, each before its end.
    for port in [1000, 7] {
        let own: Vec<_> = reports
            .iter()
            .filter(|report| report.source.port() == port)
            .cloned()
            .collect();
        assert_eq!(kinds(&own), ["began", "ended"], "{port}");
    }
    assert!(world.after(60).is_empty());
}

#[test]
fn a_flow_by_name_is_told_with_the_name_and_where_it_really_goes() {
    let mut world = World::new();
    let resolved = Resolved {
        ipv4: Some(vec![HOST.into()]),
        ipv6: None,
    };
    world
        .access
        .announce(
            client_id(1),
            resource_id(2),
            "A.example",
            &[PROXY.into()],
            &resolved,
            world.now,
        )
        .unwrap();
    world.out(&udp4(addr4(1), HOST, 1000, 53, b""));
    world.out(&udp4(addr4(1), PROXY, 1000, 53, b""));
    let reports = world.after(1);
    assert_eq!(reports[1].domain.as_deref(), Some("a.example"));
    assert_eq!(reports[1].resource, resource_id(2));
    assert_eq!(reports[1].destination, SocketAddr::from((HOST, 53)));
    assert_eq!(reports[1].source, SocketAddr::from((addr4(1), 1001)));
}

#[test]
fn only_tcp_and_udp_are_told() {
    let mut world = World::new();
    world.out(&icmp4(addr4(1), HOST, 8, 0, [0, 1, 0, 1], b"ping"));
    world.out(&ip4(addr4(1), HOST, 47, b"gre payload"));
    assert!(world.after(700).is_empty());
}

#[test]
fn a_flow_is_logged_with_the_grant_that_it_began_under() {
    use crate::flow_logs::Authorization;
    use crate::flow_logs::fixtures::{claims, token_of};

    let mut world = World::new();
    let grant = |world: &mut World, id: Option<&str>| {
        let authorization = id.map(|id| {
            let token = token_of(&claims(id));
            Arc::new(Authorization::parse(&token).unwrap())
        });
        let network = cidr(1, "10.0.0.0/8", &[]);
        world
            .access
            .authorize_with(world.now, &peer(1), network, None, authorization);
    };
    let ids = |reports: &[FlowReport]| -> Vec<Option<String>> {
        let id = |a: &Arc<Authorization>| a.id().to_owned();
        reports
            .iter()
            .map(|report| report.authorization.as_ref().map(id))
            .collect()
    };
    grant(&mut world, Some("first"));
    world.to_host("S");
    assert_eq!(ids(&world.after(1)), [Some("first".to_owned())]);
    grant(&mut world, Some("second"));
    world.out(&udp4(addr4(1), HOST, 7, 9, b"x"));
    world.host_says("R");
    let reports = world.after(30);
    assert_eq!(kinds(&reports), ["began", "ended"]);
    let expected = ["second", "first"].map(|id| Some(id.to_owned()));
    assert_eq!(ids(&reports), expected);
    grant(&mut world, None);
    world.out(&udp4(addr4(1), HOST, 8, 9, b"x"));
    assert_eq!(ids(&world.after(1)), [None]);
}
