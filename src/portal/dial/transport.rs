//! The stream under the WebSocket, plain or TLS, which finds its way back when the WebSocket
//! handshake does not want it.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A stream of bytes.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

type Slot = Arc<Mutex<Option<Box<dyn Io>>>>;

/// The stream under a [`super::Socket`].
pub struct Transport {
    /// Taken only when dropped.
    stream: Option<Box<dyn Io>>,
    slot: Slot,
}

/// Gives the stream back after its [`Transport`] was dropped.
pub(super) struct Returned(Slot);

pub(super) fn lend(stream: Box<dyn Io>) -> (Transport, Returned) {
    let slot = Slot::default();
    let transport = Transport {
        stream: Some(stream),
        slot: Arc::clone(&slot),
    };
    (transport, Returned(slot))
}

impl Returned {
    /// `None` while the transport lives.
    pub(super) fn take(self) -> Option<Box<dyn Io>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Transport {
    fn stream(self: Pin<&mut Self>) -> Pin<&mut Box<dyn Io>> {
        Pin::new(
            self.get_mut()
                .stream
                .as_mut()
                .expect("the stream leaves only with the transport"),
        )
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        // Nobody else holds the slot unless the handshake is still under way; then the stream is
        // closed together with it.
        *self.slot.lock().unwrap_or_else(PoisonError::into_inner) = self.stream.take();
    }
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Transport")
    }
}

impl AsyncRead for Transport {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stream().poll_read(cx, buf)
    }
}

impl AsyncWrite for Transport {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.stream().poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(cx)
    }
}
