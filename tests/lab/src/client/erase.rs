//! Frees a relay's socket of an allocation that this client has lost track of: REFRESH with
//! lifetime 0 after a 437, as stock clients do (data-path spec §3.3). The TURN library cannot.

use std::time::{Duration, Instant};

use turn_client_proto::stun::types::attribute::{ErrorCode, Nonce, Realm, Username};
use turn_client_proto::stun::types::message::{
    IntegrityAlgorithm, LongTermKeyCredentials, Message, MessageClass, MessageWriteVec,
    TransactionId,
};
use turn_client_proto::stun::types::prelude::{MessageWrite as _, MessageWriteExt as _};
use turn_client_proto::types::attribute::Lifetime;
use turn_client_proto::types::message::REFRESH;

use super::messages::Secret;

const RETRY: Duration = Duration::from_secs(1);
const GIVE_UP: Duration = Duration::from_secs(8);

/// How far it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Erased {
    /// Not yet.
    Pending,
    /// There is nothing left to free, or no answer.
    Done,
}

/// One attempt.
#[derive(Debug)]
pub struct Eraser {
    began: Instant,
    id: TransactionId,
    request: Vec<u8>,
    signed: bool,
    next: Instant,
}

impl Eraser {
    /// Begins with the unsigned request, which is answered with realm and nonce.
    pub fn new(now: Instant) -> Self {
        let (id, request) = request(None);
        Self {
            began: now,
            id,
            request,
            signed: false,
            next: now,
        }
    }

    /// When [`Self::poll`] has something to do.
    pub fn timeout(&self) -> Instant {
        self.next
    }

    /// The datagram that is due; `None` when it is to be given up.
    pub fn poll(&mut self, now: Instant) -> Option<Option<&[u8]>> {
        if now >= self.began + GIVE_UP {
            return None;
        }
        if now < self.next {
            return Some(None);
        }
        self.next = now + RETRY;
        Some(Some(&self.request))
    }

    /// Takes an answer; `None` if it is not to this.
    pub fn handle(
        &mut self,
        now: Instant,
        message: &Message<'_>,
        username: &str,
        password: &Secret,
    ) -> Option<Erased> {
        if message.transaction_id() != self.id {
            return None;
        }
        let code = message.attribute::<ErrorCode>().map_or(0, |e| e.code());
        if message.has_class(MessageClass::Success) || self.signed || !matches!(code, 401 | 438) {
            return Some(Erased::Done);
        }
        let (Ok(realm), Ok(nonce)) = (message.attribute::<Realm>(), message.attribute::<Nonce>())
        else {
            return Some(Erased::Done);
        };
        let sign = (realm.realm(), nonce.nonce(), username, password.expose());
        (self.id, self.request) = request(Some(sign));
        self.signed = true;
        self.next = now;
        Some(Erased::Pending)
    }
}

fn request(sign: Option<(&str, &str, &str, &str)>) -> (TransactionId, Vec<u8>) {
    let mut builder = Message::builder_request(REFRESH, MessageWriteVec::new());
    let id = builder.transaction_id();
    let lifetime = Lifetime::new(0);
    // None of these can fail: each attribute is written once, and the integrity last.
    let _ = builder.add_attribute(&lifetime);
    if let Some((realm, nonce, username, password)) = sign {
        let key = LongTermKeyCredentials::new(username.into(), password.into(), realm.into());
        if let (Ok(username), Ok(realm), Ok(nonce)) = (
            Username::new(username),
            Realm::new(realm),
            Nonce::new(nonce),
        ) {
            let _ = builder.add_attribute(&username);
            let _ = builder.add_attribute(&realm);
            let _ = builder.add_attribute(&nonce);
        }
        let key = key.make_key(IntegrityAlgorithm::Sha1);
        let _ = builder.add_message_integrity_with_key(&key, IntegrityAlgorithm::Sha1);
    }
    (id, builder.finish())
}
