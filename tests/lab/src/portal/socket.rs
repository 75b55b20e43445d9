//! The task of one connection.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use super::core::{Admission, Ending, Outgoing};
use super::server::Shared;
use super::store::Role;

/// How long a peer may take to accept a frame.
const SEND: Duration = Duration::from_secs(10);
/// How long a peer gets to answer a Close frame.
const CLOSE: Duration = Duration::from_secs(1);

/// Runs a connection to its end.
pub(super) async fn run(shared: Arc<Shared>, ws: WebSocket, role: Role, admission: Admission) {
    let (queue, outgoing) = mpsc::unbounded_channel();
    let id = shared.with(|core, now| core.open(now, admission, queue));
    let ending = Connection {
        shared: &shared,
        ws,
        role,
        id,
        outgoing,
    }
    .drive()
    .await;
    shared.with(|core, now| core.closed(now, id, ending));
}

struct Connection<'a> {
    shared: &'a Shared,
    ws: WebSocket,
    role: Role,
    id: u64,
    outgoing: mpsc::UnboundedReceiver<Outgoing>,
}

impl Connection<'_> {
    async fn drive(mut self) -> Ending {
        let (mut faults, idle) = self
            .shared
            .with(|core, _| (core.faults(), core.timings().idle));
        let mut idle_at = Instant::now() + idle;
        loop {
            let blackhole = faults.borrow_and_update().of(self.role).blackhole;
            tokio::select! {
                // `Err` cannot happen: the state that owns the sender outlives its connections.
                _ = faults.changed() => {}
                () = sleep_until(idle_at) => {
                    self.shared.with(|core, _| core.offline(self.id));
                    if !blackhole {
                        self.close(1000, "").await;
                    }
                    return ending("idle", None, "no frame within the idle limit");
                }
                command = self.outgoing.recv() => match command {
                    Some(Outgoing::Text(_)) if blackhole => {}
                    Some(Outgoing::Text(text)) => {
                        let sent = timeout(SEND, self.ws.send(Message::text(text))).await;
                        match sent {
                            Ok(Ok(())) => {}
                            Ok(Err(error)) => return ending("transport", None, error),
                            Err(elapsed) => return ending("transport", None, elapsed),
                        }
                    }
                    Some(Outgoing::Close { code, reason }) => {
                        if !blackhole {
                            self.close(code, &reason).await;
                        }
                        return ending("portal_close", None, reason);
                    }
                    Some(Outgoing::Kill) | None => return ending("portal_kill", None, ""),
                },
                message = self.ws.recv(), if !blackhole => {
                    idle_at = Instant::now() + idle;
                    self.shared.with(|core, now| core.handle_frame(now, self.id));
                    match message {
                        Some(Ok(Message::Text(text))) => self
                            .shared
                            .with(|core, now| core.handle_text(now, self.id, &text)),
                        // Serializer v1 has no binary frames; ping and pong are answered below us.
                        Some(Ok(Message::Binary(_) | Message::Ping(_) | Message::Pong(_))) => {}
                        Some(Ok(Message::Close(frame))) => {
                            self.shared.with(|core, _| core.offline(self.id));
                            self.finish().await;
                            let (code, reason) = frame
                                .map(|f| (Some(f.code), f.reason.to_string()))
                                .unwrap_or_default();
                            return ending("peer_close", code, reason);
                        }
                        Some(Err(error)) => return ending("transport", None, error),
                        None => return ending("transport", None, "end of stream"),
                    }
                }
            }
        }
    }

    async fn close(&mut self, code: u16, reason: &str) {
        let frame = CloseFrame {
            code,
            reason: reason.into(),
        };
        if let Ok(Ok(())) = timeout(SEND, self.ws.send(Message::Close(Some(frame)))).await {
            self.finish().await;
        }
    }

    /// Completes the closing handshake: flushes our Close frame and waits for the end of stream.
    async fn finish(&mut self) {
        let _ = timeout(CLOSE, async {
            while let Some(Ok(_)) = self.ws.recv().await {}
        })
        .await;
    }
}

fn ending(by: &'static str, code: Option<u16>, reason: impl ToString) -> Ending {
    Ending {
        by,
        code,
        reason: reason.to_string(),
    }
}
