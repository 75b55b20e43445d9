//! Gateway and clients talk to the portal: messages take their time and can be lost.

use super::*;

/// One end's connection to the portal.
pub(super) struct Link {
    pub(super) conn: Option<(ConnId, UnboundedReceiver<Outgoing>)>,
    pub(super) references: u64,
    pub(super) joined: bool,
}

pub(super) enum Mail {
    /// To the portal, on a connection. The gateway's messages are kept as they were, since those
    /// under way can be lost.
    Portal(ConnId, String, Option<Egress>),
    Gateway(ConnId, String),
    Client(usize, ConnId, String),
}

pub(super) fn policy(relays: &[Relay]) -> Policy {
    let mut policy = Policy::parse(&format!(
        r#"
sites: [{{id: 5a5a5a5a-0000-4000-8000-000000000001, name: Lab}}]
gateway_tokens: [{{token: g}}]
client_tokens: [{{token: c}}]
resources: [{{id: {RESOURCE_ID}, type: cidr, name: Net, address: 10.20.0.0/16}}]
relays: []
"#
    ))
    .expect("a valid policy");
    policy.relays = relays.to_vec();
    policy
}

impl World {
    pub(super) fn connect_portal(&mut self) {
        let now = self.wall_now();
        let key = self.core.public_key();
        let agent = "Debian/13.0 gateway/1.6.0 (x86_64; 6.12)";
        self.gateway_link = connect(&mut self.portal, now, Role::Gateway, "gateway", agent, key);
        let conn = self.gateway_link.conn.as_ref().expect("just made").0;
        self.post(Mail::Portal(conn, wire::encode_join(0), None));
        for n in 0..self.devices.len() {
            let key = self.devices[n].core.public_key();
            let name = format!("client-{n}");
            let agent = "Debian/13.0 headless-client/1.5.11 (x86_64; 6.12)";
            let link = connect(&mut self.portal, now, Role::Client, &name, agent, key);
            let conn = link.conn.as_ref().expect("just made").0;
            self.devices[n].link = link;
            self.post(Mail::Portal(
                conn,
                client_frame("phx_join", Value::Null, 0),
                None,
            ));
        }
    }

    pub(super) fn post(&mut self, mail: Mail) {
        self.mails += 1;
        self.mail
            .insert((self.now + self.portal_delay, self.mails), mail);
    }

    pub(super) fn collect_mail(&mut self) {
        if let Some((conn, queue)) = &mut self.gateway_link.conn {
            let conn = *conn;
            let texts: Vec<String> = texts(queue).collect();
            for text in texts {
                self.post(Mail::Gateway(conn, text));
            }
        }
        for n in 0..self.devices.len() {
            if let Some((conn, queue)) = &mut self.devices[n].link.conn {
                let conn = *conn;
                let texts: Vec<String> = texts(queue).collect();
                for text in texts {
                    self.post(Mail::Client(n, conn, text));
                }
            }
        }
    }

    pub(super) fn deliver_mail(&mut self) {
        while let Some(entry) = self.mail.first_entry() {
            if entry.key().0 > self.now {
                break;
            }
            match entry.remove() {
                Mail::Portal(conn, text, _) => {
                    let now = self.wall_now();
                    self.portal.handle_text(now, conn, &text);
                }
                Mail::Gateway(conn, text) => {
                    if self.gateway_link.is(conn) {
                        self.gateway_mail(&text);
                    }
                }
                Mail::Client(n, conn, text) => {
                    if self.devices[n].link.is(conn) {
                        self.client_mail(n, &text);
                    }
                }
            }
        }
    }

    pub(super) fn gateway_mail(&mut self, text: &str) {
        match wire::decode(text).expect("the portal's frames are in order") {
            Inbound::Message { message, skipped } => {
                assert_eq!(skipped, 0, "{text}");
                self.core.handle_portal(self.now, message);
            }
            Inbound::Reply(reply) => {
                assert_eq!(reply.result, Ok(()), "{text}");
                if !self.gateway_link.joined {
                    self.gateway_link.joined = true;
                    self.core.connected(self.now);
                }
            }
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn client_mail(&mut self, n: usize, text: &str) {
        let frame: FrameIn = serde_json::from_str(text).expect("a frame");
        let device = &mut self.devices[n];
        if frame.event == "phx_reply" {
            if !device.link.joined {
                device.link.joined = true;
                device.core.handle_portal_up(self.now);
            }
        } else if let Ok(Some(message)) = ClientIngress::decode(&frame.event, frame.payload) {
            device.core.handle_portal(self.now, message);
            device.tunnel = device.core.status(self.now).tunnel.ipv4;
        }
    }
}

impl Link {
    pub(super) fn new() -> Self {
        Self {
            conn: None,
            references: 0,
            joined: false,
        }
    }

    pub(super) fn is(&self, conn: ConnId) -> bool {
        self.conn.as_ref().is_some_and(|(id, _)| *id == conn)
    }
}

fn texts(queue: &mut UnboundedReceiver<Outgoing>) -> impl Iterator<Item = String> + '_ {
    std::iter::from_fn(|| queue.try_recv().ok()).map(|outgoing| match outgoing {
        Outgoing::Text(text) => text,
        other => panic!("{other:?}"),
    })
}

fn connect(
    portal: &mut Portal,
    now: Now,
    role: Role,
    name: &str,
    agent: &str,
    public_key: [u8; 32],
) -> Link {
    let token = match role {
        Role::Gateway => "g",
        Role::Client => "c",
    };
    let params = [
        ("external_id", name.to_owned()),
        ("name", name.to_owned()),
        ("public_key", STANDARD.encode(public_key)),
    ];
    let request = ConnectRequest {
        role,
        protocol: Protocol::V2,
        remote: SocketAddr::from(([192, 0, 2, 200], 5000)),
        authorization: Some(format!("Bearer {token}")),
        user_agent: agent.to_owned(),
        params: params.map(|(k, v)| (k.to_owned(), v)).into(),
    };
    let admission = portal.admit(now, request).expect("a valid token");
    let (sender, queue) = mpsc::unbounded_channel();
    Link {
        conn: Some((portal.open(now, admission, sender), queue)),
        references: 0,
        joined: false,
    }
}

pub(super) fn client_frame(event: &str, payload: Value, reference: u64) -> String {
    let frame = FrameOut {
        topic: TOPIC,
        event,
        payload,
        reference,
    };
    serde_json::to_string(&frame).expect("plain values")
}
