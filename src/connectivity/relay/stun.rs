//! The STUN and TURN messages of the client side (RFC 8489, RFC 8656), on top of `stun_codec`.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use bytecodec::{DecodeExt, EncodeExt};
use secrecy::{ExposeSecret, SecretString};
use stun_codec::rfc5389::attributes::{
    ErrorCode, Fingerprint, MessageIntegrity, Nonce, Realm, Software, Username, XorMappedAddress,
};
use stun_codec::rfc5389::methods::BINDING;
use stun_codec::rfc5766::attributes::{
    ChannelNumber, Lifetime, RequestedTransport, XorPeerAddress, XorRelayAddress,
};
use stun_codec::rfc5766::methods::{ALLOCATE, CHANNEL_BIND, REFRESH};
use stun_codec::rfc8656::attributes::{
    AdditionalAddressFamily, AddressFamily, RequestedAddressFamily,
};
use stun_codec::{
    Message, MessageClass, MessageDecoder, MessageEncoder, Method, TransactionId,
    define_attribute_enums,
};

define_attribute_enums!(
    Attribute,
    AttributeDecoder,
    AttributeEncoder,
    [
        MessageIntegrity,
        Username,
        Realm,
        Nonce,
        ErrorCode,
        Software,
        XorMappedAddress,
        Fingerprint,
        ChannelNumber,
        Lifetime,
        XorPeerAddress,
        XorRelayAddress,
        RequestedTransport,
        RequestedAddressFamily,
        AdditionalAddressFamily
    ]
);

/// STUN header: type, length, magic cookie, transaction id (RFC 8489 §5).
const STUN_HEADER_LEN: usize = 20;
const MAGIC_COOKIE: [u8; 4] = [0x21, 0x12, 0xA4, 0x42];
/// IANA protocol number of UDP, the only transport a relay of ours is asked for.
const UDP: u8 = 17;
const SOFTWARE: &str = concat!("firezone-gateway/", env!("CARGO_PKG_VERSION"));

/// Long-term credentials without their realm (RFC 8489 §9.2); never printed.
#[derive(Clone)]
pub(super) struct Credentials {
    username: Username,
    password: SecretString,
}

impl Credentials {
    /// `None` when the user name exceeds what USERNAME can carry (RFC 8489 §14.3).
    pub(super) fn new(username: &str, password: &SecretString) -> Option<Self> {
        Some(Self {
            username: Username::new(username.to_owned()).ok()?,
            password: password.clone(),
        })
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials([redacted])")
    }
}

/// What a 401 or 438 asks the next request to carry (RFC 8489 §9.2.4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Challenge {
    pub(super) realm: Realm,
    pub(super) nonce: Nonce,
}

/// Which relayed addresses an ALLOCATE asks for (RFC 8656 §7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Families {
    /// ADDITIONAL-ADDRESS-FAMILY: IPv4, and IPv6 if the server has it.
    Both,
    /// No family attribute: the server's default, which is IPv4.
    Default,
    /// REQUESTED-ADDRESS-FAMILY: IPv6 alone.
    V6,
}

/// A request of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Binding,
    Allocate(Families),
    /// Carries nothing but an optional LIFETIME: generic servers answer REQUESTED-TRANSPORT with
    /// 420 and read ADDITIONAL-ADDRESS-FAMILY as "this family only" (data-path spec §3.7).
    Refresh {
        /// LIFETIME in seconds; zero deletes the allocation.
        lifetime: Option<u32>,
    },
    ChannelBind {
        channel: u16,
        peer: SocketAddr,
    },
}

impl Request {
    fn method(self) -> Method {
        match self {
            Request::Binding => BINDING,
            Request::Allocate(_) => ALLOCATE,
            Request::Refresh { .. } => REFRESH,
            Request::ChannelBind { .. } => CHANNEL_BIND,
        }
    }
}

/// Encodes a request, signed when `auth` is given (RFC 8489 §9.2.3).
pub(super) fn encode(
    request: Request,
    id: TransactionId,
    auth: Option<(&Credentials, &Challenge)>,
) -> Vec<u8> {
    let mut message = Message::<Attribute>::new(MessageClass::Request, request.method(), id);
    if let Ok(software) = Software::new(SOFTWARE.to_owned()) {
        message.add_attribute(software);
    }
    match request {
        Request::Binding => {}
        Request::Allocate(families) => {
            message.add_attribute(RequestedTransport::new(UDP));
            match families {
                Families::Both => {
                    message.add_attribute(AdditionalAddressFamily::new(AddressFamily::V6));
                }
                Families::Default => {}
                Families::V6 => {
                    message.add_attribute(RequestedAddressFamily::new(AddressFamily::V6));
                }
            }
        }
        Request::Refresh { lifetime } => {
            if let Some(seconds) = lifetime {
                message.add_attribute(Lifetime::from_u32(seconds));
            }
        }
        Request::ChannelBind { channel, peer } => {
            message.add_attribute(
                ChannelNumber::new(channel).expect("the channel table hands out 0x4000..=0x4FFF"),
            );
            message.add_attribute(XorPeerAddress::new(peer));
        }
    }
    if let Some((credentials, challenge)) = auth {
        message.add_attribute(credentials.username.clone());
        message.add_attribute(challenge.realm.clone());
        message.add_attribute(challenge.nonce.clone());
        let integrity = MessageIntegrity::new_long_term_credential(
            &message,
            &credentials.username,
            &challenge.realm,
            credentials.password.expose_secret(),
        )
        .expect("every attribute is bounded far below the 16-bit message length");
        message.add_attribute(integrity);
    }
    MessageEncoder::default()
        .encode_into_bytes(message)
        .expect("every attribute is bounded far below the 16-bit message length")
}

/// Whether a message carries a MESSAGE-INTEGRITY, and a right one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Integrity {
    Valid,
    Invalid,
    Absent,
}

/// What an answer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Success,
    /// The ERROR-CODE.
    Error(u16),
    /// It has attributes that have to be understood and are not, or is an error that says none: the
    /// transaction has failed (RFC 8489 §6.3.3, §6.3.4).
    Nonsense,
}

/// A STUN message from a relay.
#[derive(Debug)]
pub(super) struct Incoming {
    message: Message<Attribute>,
    /// Whether every attribute that has to be understood is.
    is_understood: bool,
}

impl Incoming {
    /// `None` for everything that is not one well-formed STUN message, and for a wrong FINGERPRINT.
    pub(super) fn decode(datagram: &[u8]) -> Option<Self> {
        if !is_well_formed(datagram) {
            return None;
        }
        let message = MessageDecoder::<Attribute>::new()
            .decode_from_bytes(datagram)
            .ok()?
            .ok()?;
        Some(Self {
            message,
            is_understood: is_understood(datagram),
        })
    }

    /// The same message once more.
    #[cfg(any(test, fuzzing))]
    pub(super) fn encode(&self) -> Vec<u8> {
        MessageEncoder::default()
            .encode_into_bytes(self.message.clone())
            .expect("it came out of a datagram")
    }

    pub(super) fn id(&self) -> TransactionId {
        self.message.transaction_id()
    }

    pub(super) fn is_success(&self) -> bool {
        self.message.class() == MessageClass::SuccessResponse
    }

    /// Whether this is an answer to `request`, as far as class and method tell.
    pub(super) fn answers(&self, request: Request) -> bool {
        let is_response = matches!(
            self.message.class(),
            MessageClass::SuccessResponse | MessageClass::ErrorResponse
        );
        is_response && self.message.method() == request.method()
    }

    pub(super) fn integrity(&self, credentials: &Credentials, realm: &Realm) -> Integrity {
        let Some(integrity) = self.message.attributes().find_map(|a| match a {
            Attribute::MessageIntegrity(integrity) => Some(integrity),
            _ => None,
        }) else {
            return Integrity::Absent;
        };
        let password = credentials.password.expose_secret();
        match integrity.check_long_term_credential(&credentials.username, realm, password) {
            Ok(()) => Integrity::Valid,
            Err(_) => Integrity::Invalid,
        }
    }

    /// What follows MESSAGE-INTEGRITY is not covered by it and must be ignored (RFC 8489 §14.5).
    fn covered(&self) -> impl Iterator<Item = &Attribute> {
        self.message
            .attributes()
            .take_while(|a| !matches!(a, Attribute::MessageIntegrity(_)))
    }

    /// What it says as an answer.
    pub(super) fn verdict(&self) -> Verdict {
        if !self.is_understood {
            return Verdict::Nonsense;
        }
        if self.is_success() {
            return Verdict::Success;
        }
        let code = self.covered().find_map(|a| match a {
            Attribute::ErrorCode(e) => Some(e.code()),
            _ => None,
        });
        code.map_or(Verdict::Nonsense, Verdict::Error)
    }

    pub(super) fn realm(&self) -> Option<&Realm> {
        self.covered().find_map(|a| match a {
            Attribute::Realm(realm) => Some(realm),
            _ => None,
        })
    }

    pub(super) fn nonce(&self) -> Option<&Nonce> {
        self.covered().find_map(|a| match a {
            Attribute::Nonce(nonce) => Some(nonce),
            _ => None,
        })
    }

    pub(super) fn lifetime(&self) -> Option<Duration> {
        self.covered().find_map(|a| match a {
            Attribute::Lifetime(lifetime) => Some(lifetime.lifetime()),
            _ => None,
        })
    }

    pub(super) fn mapped(&self) -> Option<SocketAddr> {
        self.covered().find_map(|a| match a {
            Attribute::XorMappedAddress(mapped) => Some(mapped.address()),
            _ => None,
        })
    }

    /// The relayed addresses, one per family at most.
    pub(super) fn relayed(&self) -> Vec<SocketAddr> {
        let mut found: Vec<SocketAddr> = Vec::with_capacity(2);
        for attribute in self.covered() {
            if let Attribute::XorRelayAddress(relayed) = attribute {
                let addr = relayed.address();
                if !found.iter().any(|a| a.is_ipv4() == addr.is_ipv4()) {
                    found.push(addr);
                }
            }
        }
        found
    }
}

/// Checks header and attribute boundaries before the codec sees the bytes, so that its verdict on
/// lengths is never needed.
fn is_well_formed(datagram: &[u8]) -> bool {
    let Some((header, mut attributes)) = datagram.split_first_chunk::<STUN_HEADER_LEN>() else {
        return false;
    };
    if header[0] & 0xC0 != 0 || header[4..8] != MAGIC_COOKIE {
        return false;
    }
    let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if len != attributes.len() || !len.is_multiple_of(4) {
        return false;
    }
    while let Some((&[_, _, l0, l1], rest)) = attributes.split_first_chunk::<4>() {
        let padded = usize::from(u16::from_be_bytes([l0, l1])).next_multiple_of(4);
        let Some(rest) = rest.get(padded..) else {
            return false;
        };
        attributes = rest;
    }
    attributes.is_empty()
}

/// Whether all attributes of a well-formed message are known that have to be (types below 0x8000,
/// RFC 8489 §14), up to MESSAGE-INTEGRITY, which ends what counts.
fn is_understood(message: &[u8]) -> bool {
    let mut attributes = message.get(STUN_HEADER_LEN..).unwrap_or_default();
    while let Some((&[t0, t1, l0, l1], rest)) = attributes.split_first_chunk::<4>() {
        match u16::from_be_bytes([t0, t1]) {
            0x0008 => return true,
            // MAPPED-ADDRESS, UNKNOWN-ATTRIBUTES and RESERVATION-TOKEN are for others, but known.
            0x0001 | 0x000A | 0x0022 => {}
            // Those of the codec above.
            0x0006 | 0x0009 | 0x000C | 0x000D | 0x0012 | 0x0014..=0x0017 | 0x0019 | 0x0020 => {}
            0x8000.. => {}
            _ => return false,
        }
        let padded = usize::from(u16::from_be_bytes([l0, l1])).next_multiple_of(4);
        attributes = rest.get(padded..).unwrap_or_default();
    }
    true
}

/// Whether a datagram is one STUN message, without looking at what it says.
pub(super) fn is_stun(datagram: &[u8]) -> bool {
    matches!(datagram.first(), Some(0..=3)) && is_well_formed(datagram)
}

#[cfg(test)]
mod tests;
