#![allow(clippy::unwrap_used)]

use hickory_resolver::proto::op::{Message, MessageType, OpCode, Query as Question, ResponseCode};
use hickory_resolver::proto::rr::{Name, RecordType};

use super::*;
use crate::dns::test_server::{Host, Server, Zone};

fn query(name: &str, kind: RecordType, id: u16) -> Vec<u8> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.add_query(Question::query(Name::from_ascii(name).unwrap(), kind));
    message.to_vec().unwrap()
}

struct World {
    forwarder: Option<Forwarder>,
    counters: Arc<ForwarderCounters>,
    address: SocketAddr,
}

impl World {
    /// A forwarder on a free loopback port.
    async fn new(host: &Host, is_client: fn(IpAddr) -> bool) -> Self {
        let free = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let counters = Arc::new(ForwarderCounters::default());
        let forwarder = Forwarder::start(
            vec![address],
            host.settings(),
            Arc::clone(&counters),
            is_client,
        );
        let world = Self {
            forwarder: Some(forwarder),
            counters,
            address,
        };
        // Both sockets are bound by tasks; TCP says when.
        while TcpStream::connect(address).await.is_err() {
            tokio::task::yield_now().await;
        }
        world
    }

    async fn udp(&self, message: &[u8]) -> Message {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect(self.address).await.unwrap();
        socket.send(message).await.unwrap();
        let mut buffer = vec![0; 65_535];
        let len = socket.recv(&mut buffer).await.unwrap();
        assert!(len <= MAX_UDP);
        Message::from_vec(&buffer[..len]).unwrap()
    }
}

fn anybody(_: IpAddr) -> bool {
    true
}

fn nobody(_: IpAddr) -> bool {
    false
}

async fn server(zone: Zone) -> (Server, Host) {
    let server = Server::start("127.0.0.1", 0, zone).await;
    let host = Host::new(&[server.address.ip()], server.address.port());
    (server, host)
}

#[tokio::test]
async fn queries_of_any_type_are_answered_with_the_askers_number() {
    let (_server, host) = server(Zone::default().text("a.example.", 20)).await;
    let world = World::new(&host, anybody).await;
    let answer = world.udp(&query("a.example.", RecordType::TXT, 77)).await;
    assert_eq!(answer.metadata.id, 77);
    assert_eq!(answer.answers.len(), 1);
    let answer = world.udp(&query("b.example.", RecordType::SRV, 78)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(world.counters.read().answered, 2);
}

#[tokio::test]
async fn an_answer_too_long_for_the_tunnel_is_cut_and_whole_over_tcp() {
    let (_server, host) = server(Zone::default().text("long.example.", 3000)).await;
    let world = World::new(&host, anybody).await;
    let message = query("long.example.", RecordType::TXT, 7);
    let cut = world.udp(&message).await;
    assert!(cut.metadata.truncation && cut.answers.is_empty());

    let mut stream = TcpStream::connect(world.address).await.unwrap();
    // Two queries on one connection.
    for id in [8, 9] {
        let message = query("long.example.", RecordType::TXT, id);
        write_framed(&mut stream, &message).await.unwrap();
        let whole = read_framed(&mut stream).await.unwrap();
        let whole = Message::from_vec(&whole).unwrap();
        assert_eq!((whole.metadata.id, whole.answers.len()), (id, 1));
        assert!(!whole.metadata.truncation);
    }
}

#[tokio::test]
async fn without_any_server_the_answer_is_servfail() {
    let host = Host::new(&[], 53);
    let world = World::new(&host, anybody).await;
    let answer = world.udp(&query("a.example.", RecordType::SRV, 7)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(answer.queries.len(), 1);
    assert_eq!(world.counters.read().failed, 1);
}

#[test]
fn servers_stay_known_while_their_list_cannot_be_read() {
    let servers = |last: u8| [IpAddr::from([127, 0, 0, last])];
    let host = Host::new(&servers(1), 53);
    host.set_hosts("");
    let shared = Shared::new(host.settings(), anybody, Arc::default());
    assert_eq!(shared.order(), servers(1));
    host.break_files();
    shared.list().seen = None;
    assert_eq!(shared.order(), servers(1));
    host.use_servers(&servers(2));
    assert_eq!(shared.order(), servers(1), "not yet looked at");
    shared.list().seen = None;
    assert_eq!(shared.order(), servers(2));
}

#[tokio::test]
async fn a_silent_server_is_passed_over_and_then_no_longer_asked_first() {
    // Answers our own query and is the faster one until a client asks it something.
    let (first, host) = server(Zone {
        silent: vec!["a.example."],
        ..Zone::default()
    })
    .await;
    let second = Zone {
        silent: vec!["."],
        delay: Duration::from_millis(30),
        ..Zone::default().text("a.example.", 20)
    };
    let second = Server::start("127.0.0.2", first.address.port(), second).await;
    host.use_servers(&[first.address.ip(), second.address.ip()]);
    let world = World::new(&host, anybody).await;
    while first.asked() < 1 || second.asked() < 1 {
        sleep(Duration::from_millis(1)).await;
    }
    // So that the second's silence towards us is known before its first answer.
    sleep(Duration::from_millis(100)).await;
    for _ in 0..3 {
        let answer = world.udp(&query("a.example.", RecordType::TXT, 7)).await;
        assert_eq!(answer.answers.len(), 1);
    }
    assert_eq!((first.asked(), second.asked()), (1 + 1, 1 + 3));
}

#[tokio::test]
async fn what_happens_over_tcp_does_not_change_whom_udp_asks_first() {
    let zone = Zone::default().text("a.example.", 20);
    let (first, host) = server(zone.clone()).await;
    let second = Server::start("127.0.0.2", first.address.port(), zone).await;
    // Nobody listens there.
    let third = IpAddr::from([127, 0, 0, 3]);
    host.use_servers(&[third, first.address.ip(), second.address.ip()]);
    let shared = Shared::new(host.settings(), anybody, Arc::default());
    let before = shared.order();
    assert_eq!(before[0], third);
    let message = query("a.example.", RecordType::TXT, 7);
    let asked = Query::parse(&message).unwrap();
    assert!(shared.ask(&asked, Transport::Tcp).await.is_some());
    assert_eq!(shared.order(), before);
    assert!(shared.ask(&asked, Transport::Udp).await.is_some());
    assert_eq!(shared.order()[0], first.address.ip());
    assert_eq!(shared.order()[2], third);
}

#[tokio::test]
async fn a_refusal_is_passed_on_even_if_it_took_two_attempts() {
    let (server, host) = server(Zone {
        silent: vec!["a.example."],
        ..Zone::default()
    })
    .await;
    let shared = Arc::new(Shared::new(host.settings(), anybody, Arc::default()));
    let message = query("a.example.", RecordType::TXT, 7);
    let asking = Arc::clone(&shared);
    let asking = tokio::spawn(async move {
        let query = Query::parse(&message).unwrap();
        asking.answer(&query, Transport::Udp).await
    });
    while server.asked() == 0 {
        sleep(Duration::from_millis(1)).await;
    }
    server.set(Zone {
        broken: vec!["a.example."],
        ..Zone::default()
    });
    assert!(message::is_refusal(&asking.await.unwrap()));
    assert_eq!(server.asked(), 2);
    let expected = Forwarded {
        answered: 1,
        ..Forwarded::default()
    };
    assert_eq!(shared.counters.read(), expected, "by the server, not by us");
}

#[tokio::test]
async fn a_server_for_whom_no_time_is_left_is_not_asked_and_not_blamed() {
    let silent = Zone {
        silent: vec!["a.example."],
        ..Zone::default()
    };
    let (first, host) = server(silent.clone()).await;
    let mut servers = vec![first];
    for ip in ["127.0.0.2", "127.0.0.3", "127.0.0.4"] {
        let port = servers[0].address.port();
        servers.push(Server::start(ip, port, silent.clone()).await);
    }
    let all: Vec<IpAddr> = servers.iter().map(|s| s.address.ip()).collect();
    host.use_servers(&all);
    let shared = Shared::new(host.settings(), anybody, Arc::default());
    let message = query("a.example.", RecordType::TXT, 7);
    let asked = Query::parse(&message).unwrap();
    let begin = Instant::now();
    assert_eq!(shared.ask(&asked, Transport::Udp).await, None);
    assert!(begin.elapsed() >= LIMIT);
    assert_eq!(servers[3].asked(), 0);
    assert_eq!(shared.order()[0], all[3], "nothing is known of it");
}

#[tokio::test]
async fn a_server_that_refuses_is_not_the_last_word() {
    let broken = Zone {
        broken: vec!["a.example."],
        ..Zone::default()
    };
    let (first, host) = server(broken.clone()).await;
    let good = Zone::default().text("a.example.", 20);
    let second = Server::start("127.0.0.2", first.address.port(), good).await;
    host.use_servers(&[first.address.ip(), second.address.ip()]);
    let world = World::new(&host, anybody).await;
    let answer = world.udp(&query("a.example.", RecordType::TXT, 7)).await;
    assert_eq!(answer.answers.len(), 1);
    second.set(broken);
    let answer = world.udp(&query("a.example.", RecordType::TXT, 7)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn only_clients_are_served_and_only_queries_answered() {
    let (server, host) = server(Zone::default().text("a.example.", 20)).await;
    let world = World::new(&host, nobody).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let message = query("a.example.", RecordType::TXT, 7);
    socket.send_to(&message, world.address).await.unwrap();
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    // The connection is closed without an answer; the write may come too late to be noticed.
    let _ = write_framed(&mut stream, &message).await;
    assert!(read_framed(&mut stream).await.is_err());

    let world = World::new(&host, anybody).await;
    socket.send_to(b"nonsense", world.address).await.unwrap();
    let mut answer = query("a.example.", RecordType::TXT, 7);
    answer[2] |= 0x80;
    socket.send_to(&answer, world.address).await.unwrap();
    socket.send_to(&message, world.address).await.unwrap();
    let mut buffer = [0; 512];
    // What comes first answers the one query.
    socket.recv_from(&mut buffer).await.unwrap();
    assert_eq!(world.counters.read().ignored, 2);
    assert_eq!(world.counters.read().answered, 1);
    drop(server);
}

#[tokio::test]
async fn one_client_cannot_take_all_places() {
    let silent = Zone {
        silent: vec!["a.example."],
        ..Zone::default().text("b.example.", 20)
    };
    let (_server, host) = server(silent).await;
    let world = World::new(&host, anybody).await;
    let greedy = UdpSocket::bind("127.0.0.9:0").await.unwrap();
    let message = query("a.example.", RecordType::TXT, 7);
    for _ in 0..2 * CONCURRENT_OF_CLIENT {
        greedy.send_to(&message, world.address).await.unwrap();
        tokio::task::yield_now().await;
    }
    while world.counters.read().limited == 0 {
        greedy.send_to(&message, world.address).await.unwrap();
        tokio::task::yield_now().await;
    }
    let answer = world.udp(&query("b.example.", RecordType::TXT, 8)).await;
    assert_eq!(answer.answers.len(), 1, "another client is served");
}

#[tokio::test]
async fn one_client_cannot_take_all_connections() {
    let (_server, host) = server(Zone::default().text("a.example.", 20)).await;
    let world = World::new(&host, anybody).await;
    let message = query("a.example.", RecordType::TXT, 7);
    let connect = async |from: [u8; 4]| {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap();
        let mut stream = socket.connect(world.address).await.unwrap();
        // May come too late to be noticed when the connection is closed at once.
        let _ = write_framed(&mut stream, &message).await;
        let served = read_framed(&mut stream).await.is_ok();
        (stream, served)
    };
    let mut open = Vec::new();
    for _ in 0..CONNECTIONS_OF_CLIENT {
        let (stream, served) = connect([127, 0, 0, 9]).await;
        assert!(served);
        open.push(stream);
    }
    assert!(!connect([127, 0, 0, 9]).await.1);
    assert_eq!(world.counters.read().limited, 1);
    assert!(connect([127, 0, 0, 10]).await.1, "another client is served");
    // A place comes free with the connection.
    open.pop();
    while !connect([127, 0, 0, 9]).await.1 {
        sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn places_are_bounded_for_each_and_for_all_and_come_back() {
    let places = Places::new(5, 2);
    let asker = |last: u8| IpAddr::from([192, 0, 2, last]);
    let mut held: Vec<Place> = [1, 1, 2, 2, 3]
        .map(|last| places.take(asker(last)).unwrap())
        .into();
    assert!(places.take(asker(3)).is_none(), "all are taken");
    drop(held.pop());
    assert!(places.take(asker(1)).is_none(), "it has two");
    held.push(places.take(asker(4)).unwrap());
    drop(held);
    assert_eq!(places.taken().all, 0);
    assert!(places.taken().by_asker.is_empty());
}

/// Each query under way has a socket here, and there are not so many to be had by default.
fn allow_many_sockets() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
}

#[tokio::test]
async fn queries_under_way_are_bounded() {
    allow_many_sockets();
    let (server, host) = server(Zone {
        silent: vec!["a.example.", "."],
        ..Zone::default()
    })
    .await;
    let world = World::new(&host, anybody).await;
    // Our own query.
    while server.asked() == 0 {
        sleep(Duration::from_millis(1)).await;
    }
    let message = query("a.example.", RecordType::TXT, 7);
    let mut sent = 0;
    // From as many as are needed to take all places, at the most that each may have.
    for last in 1..=CONCURRENT / CONCURRENT_OF_CLIENT {
        let from = IpAddr::from([127, 0, 1, last as u8]);
        let client = UdpSocket::bind((from, 0)).await.unwrap();
        for _ in 0..CONCURRENT_OF_CLIENT {
            client.send_to(&message, world.address).await.unwrap();
            sent += 1;
            // None may get lost on the way.
            while sent > server.asked() + 20 {
                tokio::task::yield_now().await;
            }
        }
    }
    while server.asked() < CONCURRENT + 1 {
        tokio::task::yield_now().await;
    }
    assert_eq!(world.counters.read(), Forwarded::default());
    let late = UdpSocket::bind("127.0.1.99:0").await.unwrap();
    late.send_to(&message, world.address).await.unwrap();
    let limited = async {
        while world.counters.read().limited == 0 {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(LIMIT, limited).await.unwrap();
    assert_eq!(world.counters.read().limited, 1);
}

#[tokio::test]
async fn a_forwarder_that_is_dropped_frees_its_address_for_the_next() {
    let (_server, host) = server(Zone::default().text("a.example.", 20)).await;
    let mut world = World::new(&host, anybody).await;
    let answered = world.udp(&query("a.example.", RecordType::TXT, 7)).await;
    assert_eq!(answered.answers.len(), 1);
    drop(world.forwarder.take());
    let next = Forwarder::start(
        vec![world.address],
        host.settings(),
        Arc::clone(&world.counters),
        anybody,
    );
    world.forwarder = Some(next);
    while TcpStream::connect(world.address).await.is_err() {
        sleep(Duration::from_millis(10)).await;
    }
    let answered = world.udp(&query("a.example.", RecordType::TXT, 7)).await;
    assert_eq!(answered.answers.len(), 1);
}
