//! A listener whose connections are few and short-lived. `axum::serve` has no limits of its own,
//! and a peer that sends one byte a minute would otherwise hold a task and a socket for ever.

use std::{
    fmt, fs, io,
    net::{self, SocketAddr},
    os::unix::{self, fs::FileTypeExt as _},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    extract::connect_info::Connected,
    serve::{IncomingStream, Listener},
};
use rustix::{fs::Mode, net::listen, process::umask};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep, sleep_until},
};

/// Connections at a time; more wait in the kernel's backlog.
const CONNECTIONS: usize = 256;
/// How many may wait there. The standard library asks for 128, and cannot be told otherwise.
const BACKLOG: i32 = 1024;
/// Time from accepting a connection to the end of its one answer.
const LIFETIME: Duration = Duration::from_secs(5);
/// Whom a Unix socket is for: its owner and group, to read and write.
const NOT_FOR_OTHERS: Mode = Mode::RWXO.union(Mode::XUSR).union(Mode::XGRP);

/// Where something listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// An address and a port.
    Tcp(SocketAddr),
    /// A socket in the file system, for those whom its permissions let in.
    Unix(PathBuf),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl From<SocketAddr> for Place {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

/// A listening socket that no runtime knows yet: it may take rights to open it, and those are gone
/// before there are threads.
#[derive(Debug)]
pub struct Opened(OpenedKind);

#[derive(Debug)]
enum OpenedKind {
    Tcp(net::TcpListener),
    Unix(unix::net::UnixListener),
}

impl Opened {
    pub(super) fn at(place: &Place) -> io::Result<Self> {
        let opened = match place {
            Place::Tcp(address) => {
                let listener = net::TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                listen(&listener, BACKLOG)?;
                OpenedKind::Tcp(listener)
            }
            Place::Unix(path) => {
                let listener = bind_unix(path)?;
                listener.set_nonblocking(true)?;
                listen(&listener, BACKLOG)?;
                OpenedKind::Unix(listener)
            }
        };
        Ok(Self(opened))
    }

    /// Has the runtime that this is called in wait for connections.
    ///
    /// # Errors
    /// When the runtime cannot.
    pub fn listen(self) -> io::Result<Socket> {
        Ok(match self.0 {
            OpenedKind::Tcp(listener) => Socket::Tcp(TcpListener::from_std(listener)?),
            OpenedKind::Unix(listener) => Socket::Unix(UnixListener::from_std(listener)?),
        })
    }
}

/// An open listening socket.
#[derive(Debug)]
pub enum Socket {
    /// For an address and a port.
    Tcp(TcpListener),
    /// In the file system.
    Unix(UnixListener),
}

impl Socket {
    /// Where it listens.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn place(&self) -> io::Result<Place> {
        match self {
            Self::Tcp(listener) => Ok(Place::Tcp(listener.local_addr()?)),
            Self::Unix(listener) => {
                let address = listener.local_addr()?;
                let path = address.as_pathname().unwrap_or(Path::new(""));
                Ok(Place::Unix(path.to_owned()))
            }
        }
    }
}

/// A socket that was left behind is replaced, one that somebody answers at is not.
fn bind_unix(path: &Path) -> io::Result<unix::net::UnixListener> {
    if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        match unix::net::UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path)?;
            }
            _ => return Err(io::ErrorKind::AddrInUse.into()),
        }
    }
    // Not changed afterwards: somebody else could be faster. It is of the whole process, but nothing
    // else makes files while the listeners are opened.
    let usual = umask(NOT_FOR_OTHERS);
    let listener = unix::net::UnixListener::bind(path);
    umask(usual);
    listener
}

pub(super) struct Bounded {
    socket: Socket,
    slots: Arc<Semaphore>,
    lifetime: Duration,
}

impl Bounded {
    pub(super) fn new(socket: Socket) -> Self {
        Self::with_limits(socket, CONNECTIONS, LIFETIME)
    }

    pub(super) fn with_limits(socket: Socket, connections: usize, lifetime: Duration) -> Self {
        Self {
            socket,
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

/// The other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    Tcp(SocketAddr),
    /// Whoever may open the socket.
    Unix,
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    pub(super) peer: Peer,
    lifetime: Lifetime,
}

impl Caller {
    /// Whether it is a process of this host, or in a container of the same network namespace. No
    /// datagram from elsewhere is taken with a loopback source (RFC 1122 §3.2.1.3).
    pub(super) fn is_local(&self) -> bool {
        match self.peer {
            Peer::Tcp(address) => address.ip().to_canonical().is_loopback(),
            Peer::Unix => true,
        }
    }

    /// When the connection ends.
    pub(super) fn lifetime(&self) -> Lifetime {
        self.lifetime.clone()
    }
}

impl Connected<IncomingStream<'_, Bounded>> for Caller {
    fn connect_info(stream: IncomingStream<'_, Bounded>) -> Self {
        Self {
            peer: *stream.remote_addr(),
            lifetime: stream.io().lifetime.clone(),
        }
    }
}

impl Listener for Bounded {
    type Io = Connection;
    type Addr = Peer;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let slot = Arc::clone(&self.slots)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let (stream, peer) = match &mut self.socket {
            Socket::Tcp(listener) => {
                let (stream, address) = Listener::accept(listener).await;
                (Stream::Tcp(stream), Peer::Tcp(address))
            }
            Socket::Unix(listener) => {
                let (stream, _) = Listener::accept(listener).await;
                (Stream::Unix(stream), Peer::Unix)
            }
        };
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
        Ok(match &self.socket {
            Socket::Tcp(listener) => Peer::Tcp(listener.local_addr()?),
            Socket::Unix(_) => Peer::Unix,
        })
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Calls the same method of whichever stream it is.
macro_rules! either {
    ($stream:expr, $stream_of_kind:ident => $act:expr) => {
        match $stream {
            Stream::Tcp($stream_of_kind) => $act,
            Stream::Unix($stream_of_kind) => $act,
        }
    };
}

/// A connection that fails with [`io::ErrorKind::TimedOut`] once its time is up.
pub(super) struct Connection {
    stream: Stream,
    lifetime: Lifetime,
    timer: Pin<Box<Sleep>>,
    _slot: OwnedSemaphorePermit,
}

impl Connection {
    fn in_time<T>(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        act: impl FnOnce(&mut Stream, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        while self.timer.as_mut().poll(context).is_ready() {
            let end = self.lifetime.end();
            if end <= Instant::now() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            self.timer.as_mut().reset(end);
        }
        act(&mut self.stream, context)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.in_time(
            context,
            |stream, context| either!(stream, s => Pin::new(s).poll_read(context, buffer)),
        )
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.in_time(
            context,
            |stream, context| either!(stream, s => Pin::new(s).poll_write(context, bytes)),
        )
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.in_time(
            context,
            |stream, context| either!(stream, s => Pin::new(s).poll_write_vectored(context, slices)),
        )
    }

    fn is_write_vectored(&self) -> bool {
        either!(&self.stream, s => s.is_write_vectored())
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.in_time(
            context,
            |stream, context| either!(stream, s => Pin::new(s).poll_flush(context)),
        )
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.in_time(
            context,
            |stream, context| either!(stream, s => Pin::new(s).poll_shutdown(context)),
        )
    }
}
