//! A portal on a real socket, peers that speak to it, and a client of its control API.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use firezone_lab::portal::{Options, Policy, Portal, Timings};
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

pub const GATEWAY_AGENT: &str = "Debian/13.0 gateway/1.6.0 (x86_64; 6.12)";
pub const CLIENT_AGENT: &str = "Debian/13.0 headless-client/1.5.11 (x86_64; 6.12)";
pub const GATEWAY_TOKEN: &str = ".gateway-token";
pub const CLIENT_TOKEN: &str = "client-token";
pub const NET: &str = "5b5b5b5b-0000-4000-8000-000000000001";

const POLICY: &str = r#"
account_slug: test
sites: [{id: 5a5a5a5a-0000-4000-8000-000000000001, name: Lab}]
gateway_tokens: [{token: .gateway-token}]
client_tokens: [{token: client-token}]
resources:
  - {id: 5b5b5b5b-0000-4000-8000-000000000001, type: cidr, name: Net, address: 10.0.0.0/8}
relays:
  - {id: 5d5d5d5d-0000-4000-8000-000000000001, v4: "192.0.2.1:3478", v6: "[2001:db8::1]:3478", secret: s}
"#;

/// How long a test waits for something that ought to happen.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a test waits for something that ought not to happen.
const QUIET: Duration = Duration::from_millis(150);

pub fn timings() -> Timings {
    Timings {
        idle: Duration::from_secs(30),
        authorization: Duration::from_secs(20),
        presence_debounce: Duration::from_millis(10),
    }
}

pub async fn portal(timings: Timings, state: Option<PathBuf>) -> Portal {
    Portal::start(Options {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        control: "127.0.0.1:0".parse().unwrap(),
        policy: Policy::parse(POLICY).unwrap(),
        state,
        timings,
    })
    .await
    .unwrap()
}

/// Who connects, and how.
#[derive(Clone)]
pub struct Dial {
    pub address: SocketAddr,
    pub path: &'static str,
    pub topic: &'static str,
    pub token: Option<&'static str>,
    pub external_id: &'static str,
    pub public_key: String,
    pub user_agent: &'static str,
}

impl Dial {
    pub fn gateway(portal: &Portal) -> Self {
        Self {
            address: portal.addresses()[0],
            path: "/gateway/v2/websocket",
            topic: "gateway",
            token: Some(GATEWAY_TOKEN),
            external_id: "edge-1",
            // Bytes whose base64 needs escaping in a query.
            public_key: STANDARD.encode([0xfb; 32]),
            user_agent: GATEWAY_AGENT,
        }
    }

    pub fn client(portal: &Portal) -> Self {
        Self {
            address: portal.addresses()[0],
            path: "/client/v2/websocket",
            topic: "client",
            token: Some(CLIENT_TOKEN),
            external_id: "laptop",
            public_key: STANDARD.encode([0x01; 32]),
            user_agent: CLIENT_AGENT,
        }
    }

    pub async fn try_connect(self) -> Result<Double, Error> {
        let key = self
            .public_key
            .replace('+', "%2B")
            .replace('/', "%2F")
            .replace('=', "%3D");
        let url = format!(
            "ws://{}{}?external_id={}&name=the+{}&public_key={key}",
            self.address, self.path, self.external_id, self.external_id
        );
        let mut request = url.into_client_request()?;
        let headers = request.headers_mut();
        headers.insert("user-agent", self.user_agent.parse().unwrap());
        if let Some(token) = self.token {
            let value = format!("Bearer {token}").parse().unwrap();
            headers.insert("x-authorization", value);
        }
        let (ws, _) = connect_async(request).await?;
        Ok(Double {
            ws,
            topic: self.topic,
            next_ref: 0,
            inbox: VecDeque::new(),
        })
    }

    pub async fn connect(self) -> Double {
        self.try_connect().await.unwrap()
    }

    /// Connects and joins; returns the `init` too.
    pub async fn join(self) -> (Double, Value) {
        let mut double = self.connect().await;
        let reference = double.say("phx_join", Value::Null).await;
        assert_eq!(
            double.reply(reference).await,
            json!({"status": "ok", "response": {}})
        );
        let init = double.payload("init").await;
        (double, init)
    }

    /// The HTTP answer to a connect that is refused: status, `Retry-After`, body as JSON.
    pub async fn refused(self) -> (u16, Option<String>, Value) {
        match self.try_connect().await.err().unwrap() {
            Error::Http(response) => {
                let retry_after = response.headers().get("retry-after");
                let retry_after = retry_after.map(|v| v.to_str().unwrap().to_owned());
                let body = response.body().clone().unwrap_or_default();
                (
                    response.status().as_u16(),
                    retry_after,
                    serde_json::from_slice(&body).unwrap_or_default(),
                )
            }
            other => panic!("not an HTTP answer: {other}"),
        }
    }
}

/// A peer of the portal.
pub struct Double {
    ws: WebSocketStream<MaybeTlsStream<TcpStream>>,
    topic: &'static str,
    next_ref: u64,
    inbox: VecDeque<Value>,
}

impl Double {
    /// Sends a message on the peer's own topic; returns its number.
    pub async fn say(&mut self, event: &str, payload: Value) -> u64 {
        self.say_on(self.topic, event, payload).await
    }

    pub async fn say_on(&mut self, topic: &str, event: &str, payload: Value) -> u64 {
        let reference = self.next_ref;
        self.next_ref += 1;
        let frame = json!({"topic": topic, "event": event, "payload": payload, "ref": reference});
        self.ws
            .send(Message::text(frame.to_string()))
            .await
            .unwrap();
        reference
    }

    pub async fn heartbeat(&mut self) -> u64 {
        self.say_on("phoenix", "heartbeat", json!({})).await
    }

    pub async fn close(&mut self, code: u16) {
        let frame = CloseFrame {
            code: code.into(),
            reason: "".into(),
        };
        self.ws.close(Some(frame)).await.unwrap();
        while let Some(Ok(_)) = self.ws.next().await {}
    }

    /// The payload of the next message with this event; others stay for later.
    pub async fn payload(&mut self, event: &str) -> Value {
        self.find(|frame| frame["event"] == event).await["payload"].take()
    }

    /// The payload of the reply with this number, which has to be a JSON number again.
    pub async fn reply(&mut self, reference: u64) -> Value {
        let number = json!(reference);
        self.find(|frame| frame["event"] == "phx_reply" && frame["ref"] == number)
            .await["payload"]
            .take()
    }

    async fn find(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        if let Some(position) = self.inbox.iter().position(&wanted) {
            return self.inbox.remove(position).unwrap();
        }
        let search = async {
            loop {
                match self.ws.next().await {
                    Some(Ok(Message::Text(text))) => {
                        let frame: Value = serde_json::from_str(&text).unwrap();
                        if wanted(&frame) {
                            return frame;
                        }
                        self.inbox.push_back(frame);
                    }
                    Some(Ok(_)) => {}
                    end => panic!("connection ended: {end:?}"),
                }
            }
        };
        tokio::time::timeout(PATIENCE, search)
            .await
            .expect("message did not come")
    }

    /// The code of the Close frame that ends the connection; `None` if it ends without one.
    pub async fn closed(&mut self) -> Option<u16> {
        let end = async {
            loop {
                match self.ws.next().await {
                    Some(Ok(Message::Close(frame))) => {
                        // Reading on sends our own Close frame.
                        while let Some(Ok(_)) = self.ws.next().await {}
                        return frame.map(|f| f.code.into());
                    }
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return None,
                }
            }
        };
        tokio::time::timeout(PATIENCE, end)
            .await
            .expect("connection did not end")
    }

    /// Asserts that nothing arrives for a while.
    pub async fn quiet(&mut self) {
        assert_eq!(self.inbox, [] as [Value; 0]);
        if let Ok(message) = tokio::time::timeout(QUIET, self.ws.next()).await {
            panic!("unexpected {message:?}");
        }
    }
}

pub async fn get(portal: &Portal, path: &str) -> Value {
    http(portal.control_address(), "GET", path, "").await.1
}

/// Uses the control API, which has to agree.
pub async fn post(portal: &Portal, path: &str, body: Value) -> Value {
    let (status, answer) = try_post(portal, path, body).await;
    assert_eq!(status, 200, "{answer}");
    answer
}

pub async fn try_post(portal: &Portal, path: &str, body: Value) -> (u16, Value) {
    http(portal.control_address(), "POST", path, &body.to_string()).await
}

async fn http(address: SocketAddr, method: &str, path: &str, body: &str) -> (u16, Value) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: portal\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or_default())
}

/// Waits until the control API shows what is wanted.
pub async fn eventually(portal: &Portal, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let state = get(portal, path).await;
        if wanted(&state) {
            return state;
        }
        assert!(
            tokio::time::Instant::now() < deadline,
            "not reached: {state:#}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
