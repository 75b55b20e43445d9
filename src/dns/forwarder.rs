//! The DNS service on the gateway's tunnel addresses: what clients ask about DNS resources besides
//! addresses, such as SRV and TXT records, goes to the site's name servers (data-path spec §6.7).
//!
//! Messages pass as they are. A query that cannot be answered gets SERVFAIL, so that nobody waits.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout, timeout_at};

use super::message::{self, MAX_MESSAGE, Query};
use super::resolver::{Settings, name_servers};
use super::upstreams::Upstreams;
use super::watched::Watched;

/// Longest that a query may take (data-path spec §9).
const LIMIT: Duration = Duration::from_secs(5);
/// After this the next server is asked.
const TRY: Duration = Duration::from_secs(2);
/// Queries under way at once (data-path spec §9).
const CONCURRENT: usize = 1000;
/// Of one client, so that none takes all places.
const CONCURRENT_OF_CLIENT: usize = 100;
/// TCP connections at once.
const CONNECTIONS: usize = 256;
/// Of one client. Resolvers use one and few more (RFC 7766 §6.2.2).
const CONNECTIONS_OF_CLIENT: usize = 16;
/// A connection without a query is closed after this (RFC 7766 §6.2.3).
const IDLE: Duration = Duration::from_secs(10);
/// Longest answer over UDP in bytes: fits into the tunnel (data-path spec §9).
const MAX_UDP: usize = 1200;
/// How often the servers' speed is measured (data-path spec §9), and how long they may take.
const EVALUATION: Duration = Duration::from_secs(60);
const EVALUATION_LIMIT: Duration = Duration::from_secs(2);
/// How often it is seen whether the list of servers has changed.
const LIST_AGE: Duration = Duration::from_secs(5);
/// Pause before an address that could not be bound is tried again.
const BIND_PAUSE: Duration = Duration::from_millis(500);

/// What became of queries.
#[derive(Debug, Default)]
pub struct ForwarderCounters {
    answered: AtomicU64,
    failed: AtomicU64,
    limited: AtomicU64,
    ignored: AtomicU64,
}

/// What became of queries, as of now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Forwarded {
    /// Answered by a name server.
    pub answered: u64,
    /// Answered with SERVFAIL by us, as no name server could be reached in time.
    pub failed: u64,
    /// Beyond the number of queries or connections that may be under way; not answered.
    pub limited: u64,
    /// No standard query, or not from a client; not answered.
    pub ignored: u64,
}

impl ForwarderCounters {
    pub(super) fn read(&self) -> Forwarded {
        Forwarded {
            answered: self.answered.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            limited: self.limited.load(Ordering::Relaxed),
            ignored: self.ignored.load(Ordering::Relaxed),
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Transport {
    Udp,
    Tcp,
}

/// Serves until dropped.
pub(super) struct Forwarder {
    _tasks: JoinSet<()>,
}

impl Forwarder {
    /// Only those are answered that `is_client` says. Must be called within a runtime.
    pub(super) fn start(
        addresses: Vec<SocketAddr>,
        settings: Arc<Settings>,
        counters: Arc<ForwarderCounters>,
        is_client: fn(IpAddr) -> bool,
    ) -> Self {
        let shared = Arc::new(Shared::new(settings, is_client, counters));
        let mut tasks = JoinSet::new();
        for address in addresses {
            tasks.spawn(serve_udp(address, Arc::clone(&shared)));
            tasks.spawn(serve_tcp(address, Arc::clone(&shared)));
        }
        tasks.spawn(evaluate(shared));
        Self { _tasks: tasks }
    }
}

/// The servers.
struct List {
    file: Watched<Vec<IpAddr>>,
    /// When it was last looked at.
    seen: Option<Instant>,
    upstreams: Upstreams,
}

struct Shared {
    settings: Arc<Settings>,
    /// Whoever else can reach the addresses, such as a neighbour on the site's network, is not to
    /// use the gateway as a resolver.
    is_client: fn(IpAddr) -> bool,
    counters: Arc<ForwarderCounters>,
    list: Mutex<List>,
    queries: Arc<Places>,
    connections: Arc<Places>,
}

/// A number of places, of which nobody gets more than a share.
struct Places {
    all: usize,
    of_one: usize,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    all: usize,
    by_asker: HashMap<IpAddr, usize>,
}

impl Places {
    fn new(all: usize, of_one: usize) -> Arc<Self> {
        Arc::new(Self {
            all,
            of_one,
            taken: Mutex::default(),
        })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        // Nothing in between can panic.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for this asker, if there is one.
    fn take(self: &Arc<Self>, asker: IpAddr) -> Option<Place> {
        let mut taken = self.taken();
        let of_asker = taken.by_asker.get(&asker).copied().unwrap_or(0);
        if taken.all >= self.all || of_asker >= self.of_one {
            return None;
        }
        taken.all += 1;
        taken.by_asker.insert(asker, of_asker + 1);
        Some(Place {
            places: Arc::clone(self),
            asker,
        })
    }
}

/// Given back when dropped.
struct Place {
    places: Arc<Places>,
    asker: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        taken.all -= 1;
        if let Some(count) = taken.by_asker.get_mut(&self.asker) {
            *count -= 1;
            if *count == 0 {
                taken.by_asker.remove(&self.asker);
            }
        }
    }
}

impl Shared {
    fn new(
        settings: Arc<Settings>,
        is_client: fn(IpAddr) -> bool,
        counters: Arc<ForwarderCounters>,
    ) -> Self {
        let list = List {
            file: Watched::new(settings.resolv_conf.clone()),
            seen: None,
            upstreams: Upstreams::default(),
        };
        Self {
            settings,
            is_client,
            counters,
            list: Mutex::new(list),
            queries: Places::new(CONCURRENT, CONCURRENT_OF_CLIENT),
            connections: Places::new(CONNECTIONS, CONNECTIONS_OF_CLIENT),
        }
    }

    fn list(&self) -> MutexGuard<'_, List> {
        // Measurements, of which each stands for itself.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self) -> Vec<IpAddr> {
        let now = Instant::now();
        let mut guard = self.list();
        let list = &mut *guard;
        if list
            .seen
            .is_none_or(|at| now.duration_since(at) >= LIST_AGE)
        {
            list.seen = Some(now);
            if let Some(servers) = list.file.current(name_servers) {
                list.upstreams.set(servers);
            }
        }
        list.upstreams.order()
    }

    /// The answer to a query: a name server's, or SERVFAIL.
    async fn answer(&self, query: &Query<'_>, transport: Transport) -> Vec<u8> {
        let response = self.ask(query, transport).await;
        count(match response {
            Some(_) => &self.counters.answered,
            None => &self.counters.failed,
        });
        response.unwrap_or_else(|| query.failure())
    }

    /// The answer of the first server that has one; else a refusal, if somebody answered at all.
    async fn ask(&self, query: &Query<'_>, transport: Transport) -> Option<Vec<u8>> {
        let deadline = tokio::time::Instant::now() + LIMIT;
        let order = self.order();
        let mut refusal = None;
        // Twice: a datagram can get lost, and with one server there is nobody else to ask.
        for _ in 0..2 {
            for &upstream in &order {
                let now = tokio::time::Instant::now();
                if now >= deadline {
                    // Who is given no time cannot be blamed for not answering.
                    return refusal;
                }
                let begin = Instant::now();
                let address = SocketAddr::new(upstream, self.settings.port);
                let asked = exchange(query, address, transport);
                let outcome = timeout_at(deadline.min(now + TRY), asked).await;
                if let Ok(Err(error)) = &outcome {
                    tracing::debug!(%upstream, %error, "name server not reached");
                }
                let response = outcome.ok().and_then(Result::ok);
                // How a server does over TCP, which takes longer and is often closed to
                // everybody, says nothing about how it does over UDP.
                if transport == Transport::Udp {
                    let upstreams = &mut self.list().upstreams;
                    match response {
                        Some(_) => upstreams.answered(upstream, begin.elapsed()),
                        None => upstreams.failed(upstream),
                    }
                }
                match response {
                    Some(response) if message::is_refusal(&response) => refusal = Some(response),
                    Some(response) => return Some(response),
                    None => {}
                }
            }
            if refusal.is_some() {
                break;
            }
        }
        refusal
    }
}

/// Sends a query to a server and waits for its answer; the caller limits the time.
async fn exchange(
    query: &Query<'_>,
    upstream: SocketAddr,
    transport: Transport,
) -> io::Result<Vec<u8>> {
    let id = rand::random();
    let sent = query.with_id(id);
    let mut response = match transport {
        Transport::Udp => {
            let any: IpAddr = match upstream {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            // A new socket each time: its random port is one more thing to guess.
            let socket = UdpSocket::bind((any, 0)).await?;
            socket.connect(upstream).await?;
            socket.send(&sent).await?;
            let mut buffer = vec![0; MAX_MESSAGE];
            loop {
                let len = socket.recv(&mut buffer).await?;
                if query.is_answered_by(&buffer[..len], id) {
                    buffer.truncate(len);
                    break buffer;
                }
            }
        }
        Transport::Tcp => {
            let mut stream = TcpStream::connect(upstream).await?;
            write_framed(&mut stream, &sent).await?;
            let response = read_framed(&mut stream).await?;
            if !query.is_answered_by(&response, id) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            response
        }
    };
    message::set_id(&mut response, query.id());
    Ok(response)
}

async fn serve_udp(address: SocketAddr, shared: Arc<Shared>) {
    let socket = Arc::new(bind(address, || UdpSocket::bind(address)).await);
    // Ends its queries along with itself.
    let mut queries = JoinSet::new();
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        while queries.try_join_next().is_some() {}
        let (len, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // An ICMP error about an earlier answer, or no memory; the next one may work.
            Err(_) => {
                sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        if !(shared.is_client)(from.ip()) || Query::parse(&buffer[..len]).is_none() {
            count(&shared.counters.ignored);
            continue;
        }
        let Some(place) = shared.queries.take(from.ip()) else {
            count(&shared.counters.limited);
            continue;
        };
        let message = buffer[..len].to_vec();
        let (socket, shared) = (Arc::clone(&socket), Arc::clone(&shared));
        queries.spawn(async move {
            let _place = place;
            let Some(query) = Query::parse(&message) else {
                return;
            };
            let mut response = shared.answer(&query, Transport::Udp).await;
            if response.len() > MAX_UDP {
                response = query.truncated(&response);
            }
            if let Err(error) = socket.send_to(&response, from).await {
                tracing::debug!(%error, "answer not sent");
            }
        });
    }
}

async fn serve_tcp(address: SocketAddr, shared: Arc<Shared>) {
    let listener = bind(address, || async { TcpListener::bind(address).await }).await;
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            // The connection was gone already, or there are too many open files.
            Err(_) => {
                sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        if !(shared.is_client)(from.ip()) {
            count(&shared.counters.ignored);
            continue;
        }
        let Some(place) = shared.connections.take(from.ip()) else {
            count(&shared.counters.limited);
            continue;
        };
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            let _place = place;
            if let Err(error) = connection(stream, from.ip(), &shared).await {
                tracing::debug!(%error, "DNS connection ended");
            }
        });
    }
}

/// Answers one query after the other (RFC 7766).
async fn connection(mut stream: TcpStream, asker: IpAddr, shared: &Arc<Shared>) -> io::Result<()> {
    loop {
        let Ok(message) = timeout(IDLE, read_framed(&mut stream)).await else {
            return Ok(());
        };
        let message = match message {
            Ok(message) => message,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        let Some(query) = Query::parse(&message) else {
            count(&shared.counters.ignored);
            return Ok(());
        };
        let Some(place) = shared.queries.take(asker) else {
            count(&shared.counters.limited);
            return Ok(());
        };
        let response = shared.answer(&query, Transport::Tcp).await;
        drop(place);
        timeout(IDLE, write_framed(&mut stream, &response)).await??;
    }
}

/// Measures the servers' speed now and then, also of those that are not asked otherwise.
async fn evaluate(shared: Arc<Shared>) {
    loop {
        let mut measurements = JoinSet::new();
        for upstream in shared.order() {
            let shared = Arc::clone(&shared);
            measurements.spawn(async move {
                let message = message::root_query(0);
                let Some(query) = Query::parse(&message) else {
                    return;
                };
                let begin = Instant::now();
                let address = SocketAddr::new(upstream, shared.settings.port);
                let asked = exchange(&query, address, Transport::Udp);
                // Whatever it says: who refuses this one may still answer others.
                match timeout(EVALUATION_LIMIT, asked).await {
                    Ok(Ok(_)) => shared.list().upstreams.answered(upstream, begin.elapsed()),
                    _ => shared.list().upstreams.failed(upstream),
                }
            });
        }
        while measurements.join_next().await.is_some() {}
        sleep(EVALUATION).await;
    }
}

/// Binds as soon as the address is there, and tells if that takes long: an IPv6 address is not
/// usable for the first moments.
async fn bind<S, F>(address: SocketAddr, mut bind: impl FnMut() -> F) -> S
where
    F: Future<Output = io::Result<S>>,
{
    /// Attempts that may fail without a word.
    const PATIENCE: u32 = 10;

    let mut attempts = 0;
    loop {
        match bind().await {
            Ok(socket) => return socket,
            Err(error) if attempts == PATIENCE => {
                tracing::warn!(%address, %error, "DNS is not served here yet; trying again");
            }
            Err(_) => {}
        }
        attempts = attempts.saturating_add(1);
        sleep(BIND_PAUSE).await;
    }
}

async fn read_framed(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let len = usize::from(stream.read_u16().await?);
    let mut message = vec![0; len];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_framed(stream: &mut (impl AsyncWrite + Unpin), message: &[u8]) -> io::Result<()> {
    let len = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // In one piece: some peers read the length and the message with one call.
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend_from_slice(&len.to_be_bytes());
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}

#[cfg(test)]
#[path = "forwarder_tests.rs"]
mod tests;
