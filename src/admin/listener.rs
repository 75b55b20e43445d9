//! A listener whose connections are few and short-lived. `axum::serve` has no limits of its own,
//! and a peer that sends one byte a minute would otherwise hold a task and a socket for ever.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep, sleep_until},
};

/// Connections at a time; more wait in the kernel's backlog.
const CONNECTIONS: usize = 256;
/// Time from accepting a connection to the end of its one answer.
const LIFETIME: Duration = Duration::from_secs(5);

pub(super) struct Bounded {
    listener: TcpListener,
    slots: Arc<Semaphore>,
    lifetime: Duration,
}

impl Bounded {
    pub(super) fn new(listener: TcpListener) -> Self {
        Self::with_limits(listener, CONNECTIONS, LIFETIME)
    }

    pub(super) fn with_limits(
        listener: TcpListener,
        connections: usize,
        lifetime: Duration,
    ) -> Self {
        Self {
            listener,
            slots: Arc::new(Semaphore::new(connections)),
            lifetime,
        }
    }
}

/// When a connection ends; a stream of events goes on for as long as its events are taken. Clones
/// share it.
#[derive(Debug, Clone)]
pub(super) struct Lifetime(Arc<Mutex<Instant>>);

impl Lifetime {
    fn of(lifetime: Duration) -> Self {
        Self(Arc::new(Mutex::new(Instant::now() + lifetime)))
    }

    fn end(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It ends so long from now at the earliest.
    pub(super) fn extend(&self, more: Duration) {
        let mut end = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *end = (*end).max(Instant::now() + more);
    }
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    address: SocketAddr,
    lifetime: Lifetime,
}

impl Caller {
    /// Whether it is a process of this host, or in a container of the same network namespace. No
    /// datagram from elsewhere is taken with a loopback source (RFC 1122 §3.2.1.3).
    pub(super) fn is_local(&self) -> bool {
        self.address.ip().to_canonical().is_loopback()
    }

    /// When the connection ends.
    pub(super) fn lifetime(&self) -> Lifetime {
        self.lifetime.clone()
    }
}

impl Connected<IncomingStream<'_, Bounded>> for Caller {
    fn connect_info(stream: IncomingStream<'_, Bounded>) -> Self {
        Self {
            address: *stream.remote_addr(),
            lifetime: stream.io().lifetime.clone(),
        }
    }
}

impl Listener for Bounded {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let slot = Arc::clone(&self.slots)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let (stream, peer) = Listener::accept(&mut self.listener).await;
        let lifetime = Lifetime::of(self.lifetime);
        let connection = Connection {
            stream,
            timer: Box::pin(sleep_until(lifetime.end())),
            lifetime,
            _slot: slot,
        };
        (connection, peer)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A connection that fails with [`io::ErrorKind::TimedOut`] once its time is up.
pub(super) struct Connection {
    stream: TcpStream,
    lifetime: Lifetime,
    timer: Pin<Box<Sleep>>,
    _slot: OwnedSemaphorePermit,
}

impl Connection {
    fn in_time<T>(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        act: impl FnOnce(Pin<&mut TcpStream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        while self.timer.as_mut().poll(context).is_ready() {
            let end = self.lifetime.end();
            if end <= Instant::now() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            self.timer.as_mut().reset(end);
        }
        act(Pin::new(&mut self.stream), context)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.in_time(context, |stream, context| stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.in_time(context, |stream, context| stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.in_time(context, |stream, context| {
            stream.poll_write_vectored(context, slices)
        })
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.in_time(context, |stream, context| stream.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.in_time(context, |stream, context| stream.poll_shutdown(context))
    }
}
