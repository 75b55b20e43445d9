//! An open socket with its queue of outgoing messages.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::{Sink, SinkExt, Stream, StreamExt};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use super::SHUTDOWN_LIMIT;
use crate::portal::channel::CloseCause;
use crate::portal::dial::Socket;

/// A socket that takes no data for this long is dead.
pub(super) const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) struct Link {
    socket: Socket,
    outgoing: VecDeque<(String, u64)>,
    /// Handed to the socket, not flushed yet.
    in_flight: Vec<u64>,
    stalls_at: Option<Instant>,
}

pub(super) enum LinkInput {
    /// These messages left.
    Written(Vec<u64>),
    Text(Utf8Bytes),
    /// Nothing more will come.
    Closed(CloseCause),
}

impl Link {
    pub(super) fn new(socket: Socket) -> Self {
        Self {
            socket,
            outgoing: VecDeque::new(),
            in_flight: Vec::new(),
            stalls_at: None,
        }
    }

    pub(super) fn send(&mut self, text: String, reference: u64, now: Instant) {
        self.outgoing.push_back((text, reference));
        self.stalls_at.get_or_insert(now + WRITE_TIMEOUT);
    }

    /// When the socket counts as dead unless it takes data before.
    pub(super) fn stalls_at(&self) -> Option<Instant> {
        self.stalls_at
    }

    pub(super) fn into_socket(self) -> Socket {
        self.socket
    }

    /// Writes before it reads: an answer can only follow.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<LinkInput> {
        if let Poll::Ready(input) = self.poll_write(cx) {
            return Poll::Ready(input);
        }
        loop {
            let Poll::Ready(item) = Pin::new(&mut self.socket).poll_next(cx) else {
                return Poll::Pending;
            };
            return Poll::Ready(match item {
                Some(Ok(Message::Text(text))) => LinkInput::Text(text),
                Some(Ok(Message::Close(frame))) => LinkInput::Closed(CloseCause::Frame {
                    code: frame.as_ref().map(|f| f.code.into()),
                    reason: frame.map(|f| f.reason.to_string()).unwrap_or_default(),
                }),
                Some(Ok(Message::Binary(_))) => {
                    tracing::debug!("ignoring a binary message of the portal");
                    continue;
                }
                Some(Ok(_)) => continue,
                Some(Err(e)) => LinkInput::Closed(close_cause(e)),
                None => LinkInput::Closed(CloseCause::Eof),
            });
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<LinkInput> {
        let mut socket = Pin::new(&mut self.socket);
        while !self.outgoing.is_empty() {
            match socket.as_mut().poll_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(e)) => return Poll::Ready(LinkInput::Closed(close_cause(e))),
                Poll::Pending => return Poll::Pending,
            }
            let Some((text, reference)) = self.outgoing.pop_front() else {
                break;
            };
            if let Err(e) = socket.as_mut().start_send(Message::text(text)) {
                return Poll::Ready(LinkInput::Closed(close_cause(e)));
            }
            self.in_flight.push(reference);
        }
        if self.in_flight.is_empty() {
            return Poll::Pending;
        }
        socket.poll_flush(cx).map(|result| match result {
            Ok(()) => {
                self.stalls_at = None;
                LinkInput::Written(std::mem::take(&mut self.in_flight))
            }
            Err(e) => LinkInput::Closed(close_cause(e)),
        })
    }

    /// Sends everything, then a Close frame, and waits for the answer to it.
    pub(super) async fn finish(mut self, code: u16) {
        while let Some((text, _)) = self.outgoing.pop_front() {
            if self.socket.feed(Message::text(text)).await.is_err() {
                return;
            }
        }
        say_goodbye(self.socket, Some(code)).await;
    }
}

/// Ends a socket in the background, so that the portal learns of it before the next attempt.
pub(super) fn linger(socket: Socket, code: Option<u16>) {
    tokio::spawn(async move {
        let _ = timeout(SHUTDOWN_LIMIT, say_goodbye(socket, code)).await;
    });
}

async fn say_goodbye(mut socket: Socket, code: Option<u16>) {
    let frame = code.map(|code| CloseFrame {
        code: code.into(),
        reason: Utf8Bytes::default(),
    });
    let sent = match frame {
        Some(frame) => socket.send(Message::Close(Some(frame))).await,
        None => socket.flush().await,
    };
    if sent.is_ok() {
        while let Some(Ok(_)) = socket.next().await {}
    }
}

fn close_cause(error: Error) -> CloseCause {
    match error {
        Error::ConnectionClosed | Error::AlreadyClosed => CloseCause::Eof,
        Error::Io(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => CloseCause::Eof,
        Error::Io(e) => CloseCause::Io(e.to_string()),
        Error::Protocol(
            tokio_tungstenite::tungstenite::error::ProtocolError::ResetWithoutClosingHandshake,
        ) => CloseCause::Eof,
        e => CloseCause::Protocol(e.to_string()),
    }
}
