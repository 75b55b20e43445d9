//! The portal's end of a connection, as little of it as the socket tests need.

#![allow(clippy::unwrap_used)]

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, accept_async};
use url::Url;

pub(super) async fn listen() -> (TcpListener, Url) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    (listener, url.parse().unwrap())
}

/// Reads the head of a request.
pub(super) async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

/// Answers one request with plain HTTP and returns its head.
pub(super) async fn answer(listener: &TcpListener, answer: &str) -> String {
    let (mut stream, _) = listener.accept().await.unwrap();
    let head = read_request(&mut stream).await;
    stream.write_all(answer.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    head
}

/// A gateway's socket, seen from the portal.
pub(super) struct Peer<S = TcpStream> {
    pub(super) socket: WebSocketStream<S>,
}

impl Peer {
    pub(super) async fn accept(listener: &TcpListener) -> Self {
        let (stream, _) = listener.accept().await.unwrap();
        Self::over(stream).await
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Peer<S> {
    pub(super) async fn over(stream: S) -> Self {
        let socket = accept_async(stream).await.unwrap();
        Self { socket }
    }

    /// The next message; a Close frame appears as its code.
    pub(super) async fn receive(&mut self) -> Value {
        loop {
            match self.socket.next().await.unwrap().unwrap() {
                Message::Text(text) => return serde_json::from_str(&text).unwrap(),
                Message::Close(frame) => {
                    return json!({"close": frame.map(|f| u16::from(f.code))});
                }
                _ => {}
            }
        }
    }

    pub(super) async fn send(&mut self, frame: Value) {
        self.socket
            .send(Message::text(frame.to_string()))
            .await
            .unwrap();
    }

    /// Expects the join as the first message and answers it.
    pub(super) async fn join(&mut self) {
        let join = self.receive().await;
        assert_eq!(
            (&join["event"], &join["ref"]),
            (&json!("phx_join"), &json!(0))
        );
        self.send(json!({"topic": "gateway", "event": "phx_reply", "ref": 0,
            "payload": {"status": "ok", "response": {}}}))
            .await;
        assert_eq!(self.receive().await["event"], "set_snownet_capabilities");
    }
}
