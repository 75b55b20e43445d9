//! Announcements of names, and what flow logs are told.

use std::io;
use std::net::IpAddr;
use std::sync::Mutex;

use super::*;
use crate::access::Resolved;
use crate::packet::{Meta, samples};
use crate::portal::messages::DnsResource;

const PROXY: &str = "100.96.0.1";

impl World {
    fn authorize_names(&mut self, resource: u128, pattern: &str, token: Option<&str>) {
        let mut authorization = authorization(resource, &private(), None);
        authorization.resource = Resource::Dns(DnsResource {
            id: resource_id(resource),
            address: pattern.into(),
            name: "names".into(),
            filters: Vec::new(),
        });
        authorization.flow_logs_ingest_token = token.map(|token| token.to_owned().into());
        self.core.handle_portal(
            self.now,
            Ingress::CreateAuthorization(Box::new(authorization)),
        );
    }

    fn announce(&mut self, resource: u128, domain: &str) {
        let id = resource_id(resource);
        let body = serde_json::json!({"resource": id, "domain": domain, "proxy_ips": [PROXY]});
        let packet = samples::control(0, body.to_string().as_bytes());
        self.core.handle_control(self.now, client_id(), &packet);
    }

    fn resolve(&mut self, name: &str, addresses: Option<&[[u8; 4]]>) {
        let resolved = Resolved {
            ipv4: addresses.map(|all| all.iter().map(|a| (*a).into()).collect()),
            ipv6: addresses.map(|_| vec![]),
        };
        self.core.resolved(self.now, name, &resolved);
    }

    /// What the client is told of its names.
    fn told(&mut self, tunn: &mut Tunn) -> Vec<(String, bool)> {
        let mut buffer = [0; 2048];
        let mut told = Vec::new();
        for message in self.wireguard_out() {
            if let TunnResult::WriteToTunnelV6(packet, _) =
                tunn.decapsulate(None, &message, &mut buffer)
                && let Ok(Control::DomainStatus { domain, active, .. }) = control::parse(packet)
            {
                told.push((domain, active));
            }
        }
        told
    }

    fn commands(&mut self) -> Vec<Command> {
        std::iter::from_fn(|| self.core.poll_command()).collect()
    }

    /// Dropped packets, of all and of the client.
    fn dropped(&self, reason: DropReason) -> [u64; 2] {
        let peer = self.core.wireguard.peer(client_id()).unwrap();
        [
            self.core.counters.dropped(reason),
            peer.counters.dropped(reason),
        ]
    }

    /// The real address behind the proxy, if a packet to it passes.
    fn destination(&self) -> Option<IpAddr> {
        self.destination_from(1000)
    }

    fn destination_from(&self, port: u16) -> Option<IpAddr> {
        let policy = self.core.access.policy(client_id())?;
        let packet = samples::udp4([100, 64, 0, 9], [100, 96, 0, 1], port, 53, b"x");
        let meta = Meta::parse(&packet).unwrap();
        let flow = policy.admit_outbound(&meta, self.now).ok()?.flow?;
        flow.count_out(&meta);
        Some(flow.outside())
    }
}

fn connected(pattern: &str, token: Option<&str>) -> (World, Tunn) {
    let mut w = World::new();
    w.authorize_names(1, pattern, token);
    let tunn = w.connect_client();
    w.commands();
    w.wireguard_out();
    (w, tunn)
}

#[test]
fn a_name_is_resolved_once_and_confirmed_to_all_who_asked() {
    let (mut w, mut tunn) = connected("**.Example", None);
    w.announce(1, "Db.example");
    w.announce(1, "Db.example");
    assert_eq!(w.commands(), [Command::Resolve("db.example".into())]);
    assert_eq!(w.told(&mut tunn), []);
    w.resolve("db.example", Some(&[[10, 0, 0, 1]]));
    assert_eq!(w.told(&mut tunn), [("Db.example".to_owned(), true)]);
    assert_eq!(w.destination(), Some([10, 0, 0, 1].into()));
    // Each later announcement asks again.
    w.announce(1, "Db.example");
    assert_eq!(w.commands().len(), 1);
}

#[test]
fn what_a_client_may_not_announce_is_refused_at_once() {
    let (mut w, mut tunn) = connected("*.example", None);
    w.announce(1, "a.b.example");
    w.announce(2, "a.example");
    assert_eq!(w.commands(), []);
    let refused = |name: &str| (name.to_owned(), false);
    assert_eq!(
        w.told(&mut tunn),
        [refused("a.b.example"), refused("a.example")]
    );
}

#[test]
fn a_name_that_does_not_exist_is_active_and_one_that_cannot_be_resolved_is_not() {
    let (mut w, mut tunn) = connected("**.example", None);
    w.announce(1, "a.example");
    w.resolve("a.example", Some(&[]));
    assert_eq!(w.told(&mut tunn), [("a.example".to_owned(), true)]);
    assert_eq!(w.destination(), None);
    w.announce(1, "a.example");
    w.resolve("a.example", None);
    assert_eq!(w.told(&mut tunn), [("a.example".to_owned(), false)]);
    for (addresses, active) in [(Some([[10, 0, 0, 7]]), true), (None, true)] {
        w.announce(1, "a.example");
        w.resolve("a.example", addresses.as_ref().map(<[_; 1]>::as_slice));
        assert_eq!(w.told(&mut tunn), [("a.example".to_owned(), active)]);
        assert_eq!(w.destination(), Some([10, 0, 0, 7].into()));
    }
}

#[test]
fn what_is_taken_back_while_its_name_is_resolved_is_not_confirmed() {
    let (mut w, mut tunn) = connected("**.example", None);
    w.authorize(2);
    w.announce(1, "a.example");
    w.core.handle_portal(
        w.now,
        Ingress::RejectAccess {
            client_id: client_id(),
            resource_id: resource_id(1),
        },
    );
    w.wireguard_out();
    w.resolve("a.example", Some(&[[10, 0, 0, 1]]));
    assert_eq!(w.told(&mut tunn), [("a.example".to_owned(), false)]);
}

#[test]
fn unreadable_control_packets_are_counted() {
    let (mut w, _tunn) = connected("**.example", None);
    assert_eq!(w.dropped(DropReason::MalformedControl), [0, 0]);
    let packet = samples::control(0, b"{}");
    w.core.handle_control(w.now, client_id(), &packet);
    assert_eq!(w.dropped(DropReason::MalformedControl), [1, 1]);
}

#[test]
fn a_client_that_announces_too_much_is_held_back() {
    let (mut w, mut tunn) = connected("**.example", None);
    for n in 0..100 {
        w.announce(1, &format!("n{n}.example"));
    }
    assert_eq!(w.commands().len(), 64);
    assert_eq!(w.dropped(DropReason::ControlLimited), [36, 36]);
    assert_eq!(w.told(&mut tunn), [], "it will announce them again");
}

#[test]
fn flows_are_told_with_the_way_they_took_and_an_odd_token_costs_nothing() {
    let (mut w, _tunn) = connected("**.example", Some("odd"));
    w.core.log_flows();
    w.announce(1, "a.example");
    w.resolve("a.example", Some(&[[10, 0, 0, 1]]));
    assert!(w.destination().is_some(), "access in spite of the token");
    w.now += Duration::from_secs(1);
    w.core.handle_timeout(w.now);
    let (report, outers) = w.core.poll_flow_report().unwrap();
    assert_eq!(report.domain.as_deref(), Some("a.example"));
    assert!(report.ended.is_none() && report.authorization.is_none());
    assert_eq!(outers.len(), 1);
    assert_eq!(outers[0].client, sock(CLIENT));
    assert_eq!(outers[0].gateway, sock(GATEWAY));
    w.core.shutdown(w.now);
    let (report, outers) = w.core.poll_flow_report().unwrap();
    assert_eq!(report.ended.unwrap().counted.out_packets, 1);
    assert_eq!(outers.len(), 1, "known to the end");
    assert!(w.core.poll_flow_report().is_none());
}

#[test]
fn the_portal_switches_accounting_on_and_says_where_to_upload_once() {
    let (mut w, _tunn) = connected("**.example", None);
    w.announce(1, "a.example");
    w.resolve("a.example", Some(&[[10, 0, 0, 1]]));
    let uploads = FlowLogUploads {
        api_url: "https://logs.example.net/".into(),
        interval_secs: 60,
        batch_size: 0,
    };
    let listed = vec![AuthorizationEntry {
        client_id: client_id(),
        resource_id: resource_id(1),
        expires_at: None,
    }];
    let off = FlowLogUploads {
        interval_secs: 0,
        ..uploads.clone()
    };
    for (port, flow_logs, told, counts) in [
        (1, None, false, false),
        (2, Some(uploads.clone()), true, true),
        (3, Some(uploads.clone()), false, true),
        (4, Some(off), true, false),
        (5, Some(uploads.clone()), true, true),
        (6, None, true, false),
    ] {
        w.core.handle_portal(
            w.now,
            Ingress::Init(Init {
                flow_logs: flow_logs.clone(),
                authorizations: listed.clone(),
                ..init()
            }),
        );
        let expected = told.then_some(Command::ConfigureFlowLogs(flow_logs));
        let configured: Vec<Command> = w
            .commands()
            .into_iter()
            .filter(|c| matches!(c, Command::ConfigureFlowLogs(_)))
            .collect();
        assert_eq!(configured, expected.into_iter().collect::<Vec<_>>());

        assert!(w.destination_from(port).is_some());
        w.now += Duration::from_secs(1);
        w.core.handle_timeout(w.now);
        let reported = std::iter::from_fn(|| w.core.poll_flow_report())
            .any(|(report, _)| report.source.port() == port);
        assert_eq!(reported, counts, "the flow from port {port}");
    }
}

/// What is logged at INFO and above while `act` runs.
fn logged(act: impl FnOnce()) -> String {
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);
    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let log = Log::default();
    let lines = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || lines.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, act);
    let bytes = log.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn a_client_cannot_flood_the_log_with_names() {
    let (mut w, _tunn) = connected("**.example", None);
    let log = logged(|| {
        for n in 0..1000 {
            let name = format!("n{n}.example");
            w.announce(1, &name);
            w.resolve(&name, None);
        }
    });
    // One may have told of the path.
    let lines = log.matches("Name not usable").count();
    assert!((15..=20).contains(&lines), "{lines} lines: {log}");

    let log = logged(|| {
        w.now += Duration::from_secs(10);
        w.core.handle_timeout(w.now);
    });
    let told = format!("suppressed={}", 1000 - lines);
    assert!(
        log.contains("More was not logged") && log.contains(&told),
        "{log}"
    );
    let log = logged(|| {
        w.now += Duration::from_secs(10);
        w.announce(1, "more.example");
        w.resolve("more.example", None);
    });
    assert!(
        log.contains("Name not usable") && !log.contains("suppressed"),
        "{log}"
    );
}

#[test]
fn a_client_cannot_flood_the_log_with_its_choice_of_addresses() {
    let (mut w, _tunn) = connected("**.example", None);
    let log = logged(|| {
        for n in 0..1000 {
            // The same address for another name: everything was renumbered.
            let name = format!("n{n}.example");
            w.announce(1, &name);
            w.resolve(&name, Some(&[[10, 0, 0, 1]]));
        }
    });
    let lines = log.matches("made up its addresses anew").count();
    assert!((15..=20).contains(&lines), "{lines} lines: {log}");
}
