#![allow(clippy::unwrap_used)]

use std::net::{Ipv4Addr, Ipv6Addr};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use is::stun::{StunMessage, StunPacket};
use is::{Candidate, IceAgent, IceCreds, Protocol};
use uuid::Uuid;

use super::*;
use crate::ids::ResourceId;
use crate::portal::messages::{
    AuthorizationEntry, CidrResource, IceCredentials, PresharedKey, Resource,
};

const GATEWAY: &str = "192.0.2.1:52625";
const CLIENT: &str = "192.0.2.9:40000";

fn sock(s: &str) -> SocketAddr {
    s.parse().unwrap()
}

fn client_id() -> ClientId {
    ClientId(Uuid::from_u128(1))
}

fn resource_id(n: u128) -> ResourceId {
    ResourceId(Uuid::from_u128(100 + n))
}

fn creds(name: &str) -> IceCredentials {
    IceCredentials {
        username: name.into(),
        password: format!("{name}-password-0123456789"),
    }
}

fn private() -> StaticSecret {
    StaticSecret::from([5; 32])
}

fn init() -> Init {
    Init {
        interface: Interface {
            ipv4: Ipv4Addr::new(100, 64, 0, 1),
            ipv6: "fd00:2021:1111::1".parse::<Ipv6Addr>().unwrap(),
        },
        relays: Vec::new(),
        authorizations: Vec::new(),
        account_slug: None,
        flow_logs: None,
    }
}

fn authorization(
    resource: u128,
    key: &StaticSecret,
    expires_at: Option<u64>,
) -> CreateAuthorization {
    CreateAuthorization {
        reference: format!("ref-{resource}"),
        resource: Resource::Cidr(CidrResource {
            id: resource_id(resource),
            address: "10.0.0.0/8".parse().unwrap(),
            name: "net".into(),
            filters: Vec::new(),
        }),
        client: ClientPeer {
            id: client_id(),
            public_key: PublicKey::from(key).to_bytes(),
            preshared_key: PresharedKey([3; 32]),
            ipv4: Ipv4Addr::new(100, 64, 0, 9),
            ipv6: "fd00:2021:1111::9".parse().unwrap(),
            version: None,
        },
        client_ice_credentials: creds("clnt"),
        gateway_ice_credentials: creds("gtwy"),
        expires_at,
        use_iceless: false,
        flow_logs_ingest_token: None,
    }
}

#[path = "core_names_tests.rs"]
mod names;

struct World {
    now: Instant,
    core: Core,
    table: Arc<PeerTable>,
}

impl World {
    fn new() -> Self {
        let now = Instant::now();
        let table = Arc::new(PeerTable::new());
        let mut core = Core::new(
            now,
            SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000),
            Arc::clone(&table),
            Arc::new(Counters::new()),
            7,
        );
        core.add_host(now, sock(GATEWAY));
        let mut world = Self { now, core, table };
        world.core.connected(now);
        world.init(&[]);
        world
    }

    fn init(&mut self, authorizations: &[AuthorizationEntry]) {
        let authorizations = authorizations.to_vec();
        let init = Init {
            authorizations,
            ..init()
        };
        self.core.handle_portal(self.now, Ingress::Init(init));
    }

    fn authorize(&mut self, resource: u128) {
        self.authorize_with(resource, &private(), None);
    }

    fn authorize_with(&mut self, resource: u128, key: &StaticSecret, expires_at: Option<u64>) {
        let authorization = authorization(resource, key, expires_at);
        self.core.handle_portal(
            self.now,
            Ingress::CreateAuthorization(Box::new(authorization)),
        );
    }

    fn egress(&mut self) -> Vec<Egress> {
        std::iter::from_fn(|| self.core.poll_egress()).collect()
    }

    /// Everything a client does until data can flow; returns its WireGuard end.
    fn connect_client(&mut self) -> Tunn {
        let mut agent = IceAgent::new(IceCreds {
            ufrag: "clnt".into(),
            pass: creds("clnt").password,
        });
        agent.set_controlling(true);
        agent.set_timing_advance(Duration::ZERO);
        agent.set_remote_credentials(IceCreds {
            ufrag: "gtwy".into(),
            pass: creds("gtwy").password,
        });
        agent.add_local_candidate(Candidate::host(sock(CLIENT), "udp").unwrap());
        agent.add_remote_candidate(Candidate::host(sock(GATEWAY), "udp").unwrap());
        self.core.handle_portal(
            self.now,
            Ingress::IceCandidates {
                client_id: client_id(),
                candidates: vec![
                    Candidate::host(sock(CLIENT), "udp")
                        .unwrap()
                        .to_sdp_string(),
                ],
            },
        );
        for _ in 0..200 {
            agent.handle_timeout(self.now);
            while let Some(t) = agent.poll_transmit() {
                let bytes: Vec<u8> = t.contents.into();
                self.core
                    .handle_datagram(self.now, t.destination, t.source, &bytes);
            }
            while let Some(t) = self.core.poll_transmit() {
                let Ok(message) = StunMessage::parse(&t.payload) else {
                    continue;
                };
                agent.handle_packet(
                    self.now,
                    StunPacket {
                        proto: Protocol::Udp,
                        source: sock(GATEWAY),
                        destination: t.destination,
                        message,
                    },
                );
            }
            self.now += Duration::from_millis(20);
            self.core.handle_timeout(self.now);
        }
        let mut tunn = Tunn::new(
            private(),
            PublicKey::from(self.core.public_key()),
            Some([3; 32]),
            None,
            1,
            None,
        );
        let mut buffer = [0; 2048];
        let TunnResult::WriteToNetwork(initiation) =
            tunn.format_handshake_initiation(&mut buffer, true)
        else {
            panic!("no initiation");
        };
        let initiation = initiation.to_vec();
        self.core
            .handle_datagram(self.now, sock(GATEWAY), sock(CLIENT), &initiation);
        let answer = self.wireguard_out().pop().expect("an answer");
        let TunnResult::WriteToNetwork(keepalive) = tunn.decapsulate(None, &answer, &mut buffer)
        else {
            panic!("handshake refused");
        };
        let peer = self
            .table
            .by_receiver_index(wireguard::data_receiver(keepalive).unwrap())
            .unwrap();
        let mut out = [0; 2048];
        peer.tunn().decapsulate(None, keepalive, &mut out);
        tunn
    }

    fn wireguard_out(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.core.poll_transmit())
            .filter(|t| StunMessage::parse(&t.payload).is_err())
            .map(|t| t.payload)
            .collect()
    }

    fn goodbyes(&mut self, tunn: &mut Tunn) -> usize {
        let mut buffer = [0; 2048];
        self.wireguard_out()
            .iter()
            .filter(|m| match tunn.decapsulate(None, m, &mut buffer) {
                TunnResult::WriteToTunnelV6(packet, _) => {
                    control::parse(packet) == Ok(Control::Goodbye)
                }
                _ => false,
            })
            .count()
    }
}

#[test]
fn an_authorization_is_answered_before_its_candidates() {
    let mut w = World::new();
    w.egress();
    w.authorize(1);
    let egress = w.egress();
    assert_eq!(
        egress[0],
        Egress::AuthorizationCreated {
            reference: "ref-1".into()
        }
    );
    assert!(
        egress.iter().skip(1).any(
            |e| matches!(e, Egress::BroadcastIceCandidates { client_ids, candidates }
                if client_ids == &[client_id()] && candidates[0].contains("192.0.2.1 52625"))
        ),
        "{egress:?}"
    );
}

#[test]
fn without_a_relay_the_authorization_is_answered_and_relays_are_asked_for_once() {
    let mut w = World::new();
    let first = w.egress();
    w.authorize(1);
    w.authorize(2);
    let mut all = first;
    all.extend(w.egress());
    let asked = all.iter().filter(|e| **e == Egress::NoRelays).count();
    let answered = all
        .iter()
        .filter(|e| matches!(e, Egress::AuthorizationCreated { .. }))
        .count();
    assert_eq!((asked, answered), (1, 2));
}

#[test]
fn a_second_resource_keeps_the_session() {
    let mut w = World::new();
    w.authorize(1);
    let _tunn = w.connect_client();
    let peer = Arc::clone(w.core.wireguard.peer(client_id()).unwrap());
    w.authorize(2);
    assert!(Arc::ptr_eq(
        &peer,
        w.core.wireguard.peer(client_id()).unwrap()
    ));
    assert!(peer.path().is_some());
    let status = w.core.client_statuses(
        w.now,
        SystemTime::UNIX_EPOCH + Duration::from_secs(1),
        false,
    );
    assert_eq!(status[0].grants.len(), 2);
    assert_eq!(status[0].path.as_deref(), Some("direct"));
}

#[test]
fn another_key_replaces_the_session() {
    let mut w = World::new();
    w.authorize(1);
    let peer = Arc::clone(w.core.wireguard.peer(client_id()).unwrap());
    w.authorize_with(1, &StaticSecret::from([9; 32]), None);
    assert!(!Arc::ptr_eq(
        &peer,
        w.core.wireguard.peer(client_id()).unwrap()
    ));
}

#[test]
fn losing_the_last_grant_says_goodbye_and_closes() {
    let mut w = World::new();
    w.authorize(1);
    let mut tunn = w.connect_client();
    w.core.handle_portal(
        w.now,
        Ingress::RejectAccess {
            client_id: client_id(),
            resource_id: resource_id(1),
        },
    );
    assert_eq!(w.goodbyes(&mut tunn), 1);
    assert!(w.core.wireguard.peer(client_id()).is_none());
    assert!(
        w.table
            .by_address(Ipv4Addr::new(100, 64, 0, 9).into())
            .is_none()
    );
}

#[test]
fn losing_one_of_two_grants_keeps_the_connection() {
    let mut w = World::new();
    w.authorize(1);
    w.authorize(2);
    let mut tunn = w.connect_client();
    w.core.handle_portal(
        w.now,
        Ingress::RejectAccess {
            client_id: client_id(),
            resource_id: resource_id(1),
        },
    );
    assert_eq!(w.goodbyes(&mut tunn), 0);
    assert!(w.core.wireguard.peer(client_id()).is_some());
}

#[test]
fn an_init_revokes_what_it_does_not_list() {
    let mut w = World::new();
    w.authorize(1);
    let mut tunn = w.connect_client();
    w.init(&[AuthorizationEntry {
        client_id: client_id(),
        resource_id: resource_id(1),
        expires_at: None,
    }]);
    assert!(w.core.wireguard.peer(client_id()).is_some(), "listed");
    w.init(&[]);
    assert_eq!(w.goodbyes(&mut tunn), 1);
    assert!(w.core.wireguard.peer(client_id()).is_none(), "not listed");
}

#[test]
fn a_grant_expires_while_the_portal_is_away() {
    let mut w = World::new();
    w.authorize_with(1, &private(), Some(1_800_000_010));
    let mut tunn = w.connect_client();
    w.core.disconnected(w.now, Vec::new());
    let left = Duration::from_secs(10) - Duration::from_millis(4000);
    w.core
        .handle_timeout(w.now + left - Duration::from_millis(1));
    assert!(w.core.wireguard.peer(client_id()).is_some());
    w.core
        .handle_timeout(w.now + left + Duration::from_millis(1));
    assert_eq!(w.goodbyes(&mut tunn), 1);
    assert!(w.core.wireguard.peer(client_id()).is_none());
}

#[test]
fn candidates_wait_for_the_portal_and_connections_outlive_its_absence() {
    let mut w = World::new();
    w.authorize(1);
    w.egress();
    let _tunn = w.connect_client();
    w.core.disconnected(w.now, Vec::new());
    w.core.add_host(w.now, sock("192.0.2.2:52625"));
    assert!(w.egress().is_empty(), "nothing leaves while away");
    assert!(w.core.wireguard.peer(client_id()).unwrap().path().is_some());
    w.core.connected(w.now);
    assert!(w.egress().iter().any(|e| matches!(
        e,
        Egress::BroadcastIceCandidates { candidates, .. } if candidates.len() == 1
            && candidates[0].contains("192.0.2.2")
    )));
}

#[test]
fn a_refused_token_closes_everybody() {
    let mut w = World::new();
    w.authorize(1);
    let mut tunn = w.connect_client();
    w.core.revoke_all(w.now);
    assert_eq!(w.goodbyes(&mut tunn), 1);
    assert!(w.core.wireguard.peer(client_id()).is_none());
}

#[test]
fn shutdown_says_goodbye() {
    let mut w = World::new();
    w.authorize(1);
    let mut tunn = w.connect_client();
    w.core.shutdown(w.now);
    assert_eq!(w.goodbyes(&mut tunn), 1);
}

#[test]
fn a_goodbye_of_the_client_is_not_answered() {
    let mut w = World::new();
    w.authorize(1);
    let mut tunn = w.connect_client();
    w.core
        .handle_control(w.now, client_id(), &control::goodbye());
    assert_eq!(w.goodbyes(&mut tunn), 0);
    assert!(w.core.wireguard.peer(client_id()).is_none());
    assert!(w.core.access.grants(client_id()).is_empty());
}

#[test]
fn the_device_is_configured_once_per_change_of_addresses() {
    let mut w = World::new();
    assert!(matches!(w.core.poll_command(), Some(Command::Configure(_))));
    w.init(&[]);
    assert_eq!(w.core.poll_command(), None);
}

#[test]
fn the_set_up_of_a_connection_is_told_step_by_step() {
    let mut w = World::new();
    w.authorize(1);
    let _tunn = w.connect_client();
    assert_eq!(w.core.poll_story(), None, "nothing was sent yet");
    w.core.handle_timeout(w.now + Duration::from_secs(40));
    let Some(Story::SetUp(told)) = w.core.poll_story() else {
        panic!("not told");
    };
    assert_eq!(told.failure, None);
    assert_eq!(told.path.map(|p| p.as_str()), Some("direct"));
    assert!(told.candidates.is_some() && told.nominated.is_some() && told.handshake.is_some());
    assert_eq!(Some(told.until), told.handshake);
}

/// How the path of a connected client ended, after something happened.
fn path_end(happens: impl FnOnce(&mut World)) -> &'static str {
    let mut w = World::new();
    w.authorize(1);
    let _tunn = w.connect_client();
    assert_eq!(w.core.served().all, 1);
    happens(&mut w);
    assert_eq!(w.core.served().all, 0);
    let stories = std::iter::from_fn(|| w.core.poll_story());
    let mut paths = stories.filter_map(|story| match story {
        Story::Path(path) => Some(path.end.as_str()),
        Story::Relay(_) | Story::SetUp(_) => None,
    });
    let end = paths.next().unwrap();
    assert_eq!(paths.next(), None);
    end
}

#[test]
fn the_end_of_a_path_is_told_with_its_cause() {
    assert_eq!(path_end(|w| w.core.shutdown(w.now)), "shutdown");
    assert_eq!(path_end(|w| w.core.revoke_all(w.now)), "token_refused");
    assert_eq!(path_end(|w| w.init(&[])), "resync");
    let goodbye = control::goodbye();
    assert_eq!(
        path_end(|w| w.core.handle_control(w.now, client_id(), &goodbye)),
        "goodbye"
    );
    let later = path_end(|w| {
        for second in 0..120 {
            w.core.handle_timeout(w.now + Duration::from_secs(second));
        }
    });
    assert_eq!(later, "disconnected");
}

#[test]
fn a_set_up_that_comes_to_nothing_says_why() {
    let mut w = World::new();
    w.authorize(1);
    w.core.handle_timeout(w.now + Duration::from_secs(11));
    let Some(Story::SetUp(told)) = w.core.poll_story() else {
        panic!("not told");
    };
    assert_eq!(told.failure, Some("no_candidates"));
}

#[test]
fn a_complete_status_has_pairs_and_no_secrets() {
    let mut w = World::new();
    w.authorize(1);
    let _tunn = w.connect_client();
    let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let brief = w.core.client_statuses(w.now, wall, false).remove(0);
    assert_eq!((brief.pairs.len(), brief.local_candidates.len()), (0, 0));
    assert_eq!(brief.path_history.len(), 1, "{brief:?}");

    let status = w.core.client_statuses(w.now, wall, true).remove(0);

    assert_eq!(status.pair_count, 1);
    let document = serde_json::to_value(&status).unwrap();
    assert_eq!(
        document["local_candidates"],
        serde_json::json!([{"kind": "host", "address": GATEWAY}])
    );
    assert_eq!(
        document["remote_candidates"],
        serde_json::json!([{"kind": "host", "address": CLIENT}])
    );
    let pair = &document["pairs"][0];
    assert_eq!(pair["local"], GATEWAY);
    assert_eq!(pair["local_kind"], "host");
    assert_eq!(pair["remote"], CLIENT);
    assert_eq!(pair["nominated"], true);
    assert_eq!(pair["in_use"], true);
    assert!(pair["answered_at"].as_f64().unwrap() > 1_799_999_990.0);
    let change = &document["path_history"][0];
    assert_eq!(change["from"], serde_json::Value::Null);
    assert_eq!(change["to"], "direct");
    assert_eq!(change["reason"], "nominated");
    for secret in ["clnt", "gtwy", "password"] {
        assert!(!document.to_string().contains(secret), "{document}");
    }
    assert_eq!(
        serde_json::from_value::<ClientStatus>(document).unwrap(),
        status
    );
}
