//! The WebSocket to the portal: dial, join, heartbeat, reconnect (portal-channel spec §1).

use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, interval_at, timeout};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::client::{Request, generate_key};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::config::{Endpoint, endpoint, user_agent};
use super::io::{Command, CoreHandle};
use super::messages::{Egress, FrameIn, FrameOut, Ingress, Secret, TOPIC};
use super::netconf::FWMARK;

/// For one TCP connect (§1.5).
const TCP_TIMEOUT: Duration = Duration::from_secs(5);
/// For the upgrade after that.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(10);
/// For the join reply (§1.7).
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Between heartbeats (§1.8).
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);
/// More unanswered heartbeats than this end the connection (§1.8).
const MAX_MISSED_HEARTBEATS: usize = 3;
/// First pause between attempts; grows by half up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause between attempts.
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// Who dials, and where.
#[derive(Debug, Clone)]
pub struct Login {
    /// Base URL.
    pub portal_url: String,
    /// Token.
    pub token: Secret,
    /// Stable identity.
    pub external_id: String,
    /// Display name.
    pub name: String,
    /// Kept for the life of the process: a transient reconnect must not change the identity of
    /// existing connections.
    pub public_key: [u8; 32],
}

/// Keeps a channel open for ever.
///
/// # Errors
/// Only for a URL that can never work.
pub async fn run(
    login: Login,
    core: CoreHandle,
    mut egress: UnboundedReceiver<Egress>,
) -> anyhow::Result<()> {
    let target = endpoint(
        &login.portal_url,
        &login.external_id,
        &login.name,
        &login.public_key,
    )?;
    let mut pause = FIRST_PAUSE;
    loop {
        let mut joined = false;
        let error = match session(&target, &login.token, &core, &mut egress, &mut joined).await {
            Ok(()) => return Ok(()),
            Err(error) => format!("{error:#}"),
        };
        tracing::warn!(error, "portal connection lost");
        core.send(Command::PortalDown(error));
        if joined {
            pause = FIRST_PAUSE;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(MAX_PAUSE);
    }
}

async fn dial(target: &Endpoint) -> anyhow::Result<TcpStream> {
    let mut last = None;
    let addrs = lookup_host((target.host.as_str(), target.port))
        .await
        .with_context(|| format!("cannot resolve {}", target.host))?;
    for addr in addrs {
        let socket = if addr.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }?;
        if let Err(error) = socket2::SockRef::from(&socket).set_mark(FWMARK) {
            tracing::debug!(%error, "cannot mark the portal socket");
        }
        match timeout(TCP_TIMEOUT, socket.connect(addr)).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Ok(Err(error)) => last = Some(anyhow::Error::new(error).context(addr)),
            Err(_) => last = Some(anyhow::anyhow!("{addr}: connect timed out")),
        }
    }
    Err(last.unwrap_or_else(|| anyhow::anyhow!("no addresses")))
}

fn upgrade(target: &Endpoint, token: &Secret) -> anyhow::Result<Request> {
    let host = if target.host.contains(':') {
        format!("[{}]", target.host)
    } else {
        target.host.clone()
    };
    Ok(Request::builder()
        .uri(format!(
            "ws://{host}:{}{}",
            target.port, target.path_and_query
        ))
        // Without the port, as the stock client sends it (§1.3).
        .header("Host", host)
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", generate_key())
        .header("User-Agent", user_agent())
        .header("X-Authorization", format!("Bearer {}", token.expose()))
        .body(())?)
}

struct Socket {
    stream: WebSocketStream<TcpStream>,
    next_ref: u64,
}

impl Socket {
    async fn push(&mut self, topic: &str, event: &str, payload: Value) -> anyhow::Result<u64> {
        let reference = self.next_ref;
        self.next_ref += 1;
        let text = serde_json::to_string(&FrameOut {
            topic,
            event,
            payload,
            reference,
        })?;
        self.stream.send(Message::text(text)).await?;
        Ok(reference)
    }
}

/// One connection, from dialling to its end. `Ok` only when this process is stopping.
async fn session(
    target: &Endpoint,
    token: &Secret,
    core: &CoreHandle,
    egress: &mut UnboundedReceiver<Egress>,
    joined: &mut bool,
) -> anyhow::Result<()> {
    let tcp = dial(target).await?;
    if let Ok(local) = tcp.local_addr() {
        core.send(Command::HostAddress(local.ip()));
    }
    let (stream, _) = timeout(UPGRADE_TIMEOUT, client_async(upgrade(target, token)?, tcp))
        .await
        .context("upgrade timed out")?
        .context("upgrade refused")?;
    let mut socket = Socket {
        stream,
        next_ref: 0,
    };
    let join = socket.push(TOPIC, "phx_join", Value::Null).await?;
    let join_deadline = tokio::time::sleep(JOIN_TIMEOUT);
    tokio::pin!(join_deadline);
    let mut heartbeat = interval_at(Instant::now() + HEARTBEAT_INTERVAL, HEARTBEAT_INTERVAL);
    let mut outstanding: Vec<u64> = Vec::new();

    loop {
        tokio::select! {
            biased;
            _ = heartbeat.tick() => {
                let reference = socket.push("phoenix", "heartbeat", json!({})).await?;
                outstanding.push(reference);
                if outstanding.len() > MAX_MISSED_HEARTBEATS {
                    bail!("{} heartbeats unanswered", outstanding.len());
                }
            }
            () = &mut join_deadline, if !*joined => bail!("no answer to the join"),
            // Before the join reply no application message may be sent (§1.7).
            message = egress.recv(), if *joined => {
                let Some(message) = message else {
                    socket.stream.close(None).await.ok();
                    return Ok(());
                };
                let (event, payload) = message.encode();
                tracing::debug!(event, "to portal");
                socket.push(TOPIC, event, payload).await?;
            }
            message = socket.stream.next() => {
                let text = match message {
                    None => bail!("connection closed"),
                    Some(Err(error)) => return Err(error.into()),
                    Some(Ok(Message::Text(text))) => text,
                    Some(Ok(Message::Close(frame))) => bail!("closed by the portal: {frame:?}"),
                    Some(Ok(_)) => continue,
                };
                let frame: FrameIn = match serde_json::from_str(&text) {
                    Ok(frame) => frame,
                    Err(error) => {
                        tracing::warn!(%error, "undecodable frame");
                        continue;
                    }
                };
                if let Some(reference) = frame.reference
                    && frame.event == "phx_reply"
                {
                    let before = outstanding.len();
                    outstanding.retain(|r| *r != reference);
                    if outstanding.len() != before {
                        continue;
                    }
                    let ok = frame.payload.get("status").and_then(Value::as_str) == Some("ok");
                    if reference == join && !*joined && frame.topic == TOPIC {
                        if !ok {
                            bail!("join refused: {}", frame.payload["response"]["reason"]);
                        }
                        // Stale messages belong to the previous connection (§1.9).
                        while egress.try_recv().is_ok() {}
                        *joined = true;
                        tracing::info!("joined the portal");
                        core.send(Command::PortalUp);
                    } else if !ok {
                        tracing::warn!(payload = %frame.payload, "the portal refused a message");
                    }
                    continue;
                }
                match frame.event.as_str() {
                    "phx_close" => bail!("channel closed by the portal"),
                    "phx_error" => tracing::debug!("channel error"),
                    "disconnect" => bail!("disconnected: {}", frame.payload["reason"]),
                    event => match Ingress::decode(event, frame.payload) {
                        Ok(Some(message)) => {
                            tracing::debug!(event, "from portal");
                            core.send(Command::Portal(message));
                        }
                        Ok(None) => tracing::debug!(event, "unknown event"),
                        Err(error) => tracing::warn!(event, error, "malformed message"),
                    },
                }
            }
        }
    }
}
