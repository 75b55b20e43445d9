//! The stream of events that the page lives on.

use super::*;

/// A stream of events, as it comes.
struct Stream {
    stream: TcpStream,
    text: String,
}

impl Stream {
    fn open(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        let request = b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n";
        stream.write_all(request).unwrap();
        let timeout = Some(Duration::from_secs(10));
        stream.set_read_timeout(timeout).unwrap();
        Self {
            stream,
            text: String::new(),
        }
    }

    /// Reads until something is told, and says whether it ever was.
    fn until(&mut self, wanted: &str) -> bool {
        let mut buffer = [0; 4096];
        while !self.text.contains(wanted) {
            match self.stream.read(&mut buffer) {
                Ok(0) | Err(_) => return false,
                Ok(length) => self
                    .text
                    .push_str(&String::from_utf8_lossy(&buffer[..length])),
            }
        }
        true
    }

    /// When the events came about.
    fn times(&self) -> Vec<&str> {
        let events = self.text.split("data: {\"at\":").skip(1);
        events.filter_map(|event| event.split(',').next()).collect()
    }
}

#[test]
fn events_tell_what_changes_for_longer_than_an_answer_may_take() {
    let server = Server::start(good());
    let mut one = Stream::open(server.address);
    assert!(one.until("edge-7"), "{}", one.text);
    for head in [
        "HTTP/1.1 200",
        "content-type: text/event-stream",
        "cache-control: no-store",
        "content-security-policy: default-src 'none'",
        "retry: 2000\n\nevent: status\ndata: {",
    ] {
        assert!(one.text.contains(head), "{}", one.text);
    }
    let mut other = Stream::open(server.address);
    server.change(|status| status.portal.state = PortalState::Waiting);
    assert!(one.until("\"state\":\"waiting\""), "{}", one.text);
    assert!(one.until("not joined"), "readiness is in it: {}", one.text);
    let began = Instant::now();
    for n in 0..6 {
        let name = format!("edge-{n}-anew");
        server.change(|status| status.name.clone_from(&name));
        assert!(one.until(&name), "{}", one.text);
    }
    let took = began.elapsed();
    assert!(
        took > Duration::from_secs(5),
        "more often than once a second"
    );
    assert!(other.until("edge-5-anew"), "{}", other.text);
    // All are told the same thing, put together once.
    let (one, other) = (one.times(), other.times());
    assert!(one.ends_with(&other[1..]), "{one:?} {other:?}");
}

#[test]
fn events_end_with_the_one_that_tells_of_the_shutdown() {
    let server = Server::start(good());
    let mut stream = Stream::open(server.address);
    assert!(stream.until("edge-7"));
    server.drain.begin();
    server.change(|status| status.draining = true);
    assert!(!stream.until("never told"), "it ends");
    let last = stream.text.rsplit("data: ").next().unwrap();
    assert!(last.contains("\"draining\":true"), "{last}");
    assert!(stream.text.ends_with("0\r\n\r\n"), "in order");
}

#[test]
fn the_number_of_streams_is_bounded_and_places_are_given_back() {
    let server = Server::start(good());
    let mut streams: Vec<Stream> = (0..16).map(|_| Stream::open(server.address)).collect();
    for stream in &mut streams {
        assert!(stream.until("edge-7"));
    }
    assert_eq!(server.code("/events"), 503);
    assert_eq!(server.code("/status"), 200);
    streams.pop();
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut stream = Stream::open(server.address);
        if stream.until("edge-7") {
            break;
        }
        assert!(Instant::now() < deadline, "{}", stream.text);
    }
}

#[test]
fn a_browser_that_takes_no_event_loses_its_stream() {
    let mut huge = good();
    huge.name = "x".repeat(16 << 20);
    let server = Server::start(huge);
    let mut stream = Stream::open(server.address);
    assert!(stream.until("HTTP/1.1 200"));
    std::thread::sleep(Duration::from_secs(7));
    // What is in the kernel's buffers comes, and then nothing more.
    let timeout = Some(Duration::from_secs(2));
    stream.stream.set_read_timeout(timeout).unwrap();
    let mut rest = Vec::new();
    let end = stream.stream.take(32 << 20).read_to_end(&mut rest);
    let end = end.map_err(|error| error.kind());
    assert!(
        matches!(end, Ok(_) | Err(io::ErrorKind::ConnectionReset)),
        "{end:?}"
    );
    assert!(rest.len() < 16 << 20, "it was cut off");
}

#[test]
fn the_busiest_clients_are_told_of_if_there_are_too_many() {
    let server = Server::start(good());
    server.change(|status| {
        status.clients = (0..500)
            .map(|n| model::ClientStatus {
                id: format!("client-{n}-"),
                rx_bytes: n,
                ..model::ClientStatus::default()
            })
            .collect();
    });
    let mut stream = Stream::open(server.address);
    assert!(stream.until("\n\n\r\n"), "{}", stream.text);
    assert!(stream.until("client-300-"), "{}", stream.text);
    assert!(stream.text.contains("\"clients_left_out\":300"));
    assert!(!stream.text.contains("client-299-"), "{}", stream.text);
}
