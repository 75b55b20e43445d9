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
async fn a_dead_server_is_passed_over_and_then_no_longer_asked_first() {
    let (server, host) = server(Zone::default().text("a.example.", 20)).await;
    host.use_servers(&["127.0.0.77".parse().unwrap(), server.address.ip()]);
    let world = World::new(&host, anybody).await;
    for _ in 0..3 {
        let answer = world.udp(&query("a.example.", RecordType::TXT, 7)).await;
        assert_eq!(answer.answers.len(), 1);
    }
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
async fn queries_under_way_are_bounded() {
    let silent = Zone {
        silent: vec!["a.example."],
        ..Zone::default()
    };
    let (_server, host) = server(silent).await;
    let world = World::new(&host, anybody).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let message = query("a.example.", RecordType::TXT, 7);
    while world.counters.read().limited == 0 {
        socket.send_to(&message, world.address).await.unwrap();
        tokio::task::yield_now().await;
    }
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
