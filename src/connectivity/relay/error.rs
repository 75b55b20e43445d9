//! Why a relay is not usable: a closed list, shared by spans, status and logs.

/// Cause of a failed allocation attempt or of a lost allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum RelayError {
    /// No answer within the retransmission time.
    #[error("the relay does not answer")]
    NoResponse,
    /// The relay refuses user name or password, or they cannot be encoded.
    #[error("the relay refuses the credentials")]
    BadCredentials,
    /// The relay keeps asking for another nonce.
    #[error("the relay refuses every nonce it hands out")]
    StaleNonce,
    /// The relay does not know the allocation that it gave us (437, RFC 8656 §7.4).
    #[error("the relay has forgotten our allocation, as when it restarts")]
    Forgotten,
    /// The relay insists on another allocation for our 5-tuple (437, 441).
    #[error("the relay holds another allocation for our socket ({0})")]
    AllocationMismatch(u16),
    /// A quota is reached (486).
    #[error("the relay's quota for these credentials is reached (486)")]
    QuotaReached,
    /// The relay has no capacity (508).
    #[error("the relay has no capacity (508)")]
    InsufficientCapacity,
    /// The relay does not support what an allocation needs (420, 440, 442).
    #[error("the relay does not support UDP allocations of the wanted kind ({0})")]
    Unsupported(u16),
    /// Any other STUN error.
    #[error("the relay answers with error {0}")]
    Refused(u16),
    /// An answer without what it must carry, or with what is not understood.
    #[error("the relay's answer is incomplete or not understood")]
    Protocol,
    /// There were answers, but none that is signed with our credentials.
    #[error("the relay's answers do not prove that they are its own")]
    Integrity,
    /// The lifetime ended without a successful refresh.
    #[error("the allocation expired")]
    Expired,
    /// The relay entry has no address.
    #[error("the relay has no address")]
    NoAddress,
    /// The portal withdrew the relay.
    #[error("the portal withdrew the relay")]
    Withdrawn,
    /// The portal gave the relay another address or other credentials.
    #[error("the portal changed the relay's address or credentials")]
    Replaced,
    /// The gateway gave the relay up.
    #[error("released")]
    Released,
}

impl RelayError {
    pub(super) fn from_code(code: u16) -> Self {
        match code {
            401 => RelayError::BadCredentials,
            438 => RelayError::StaleNonce,
            437 | 441 => RelayError::AllocationMismatch(code),
            420 | 440 | 442 => RelayError::Unsupported(code),
            486 => RelayError::QuotaReached,
            508 => RelayError::InsufficientCapacity,
            other => RelayError::Refused(other),
        }
    }

    /// The value of the `error.type` attribute.
    pub fn error_type(self) -> &'static str {
        match self {
            RelayError::NoResponse => "relay_no_response",
            RelayError::BadCredentials => "relay_bad_credentials",
            RelayError::StaleNonce => "relay_stale_nonce",
            RelayError::Forgotten => "relay_forgot",
            RelayError::AllocationMismatch(_) => "relay_allocation_mismatch",
            RelayError::QuotaReached => "relay_quota_reached",
            RelayError::InsufficientCapacity => "relay_insufficient_capacity",
            RelayError::Unsupported(_) => "relay_unsupported",
            RelayError::Refused(_) => "relay_refused",
            RelayError::Protocol => "relay_protocol",
            RelayError::Integrity => "relay_integrity",
            RelayError::Expired => "relay_expired",
            RelayError::NoAddress => "relay_no_address",
            RelayError::Withdrawn => "relay_withdrawn",
            RelayError::Replaced => "relay_replaced",
            RelayError::Released => "relay_released",
        }
    }

    /// The STUN error code behind it, if there is one (RFC 8489 §14.8).
    pub fn stun_error_code(self) -> Option<u16> {
        match self {
            RelayError::BadCredentials => Some(401),
            RelayError::StaleNonce => Some(438),
            RelayError::Forgotten => Some(437),
            RelayError::QuotaReached => Some(486),
            RelayError::InsufficientCapacity => Some(508),
            RelayError::AllocationMismatch(code)
            | RelayError::Unsupported(code)
            | RelayError::Refused(code) => Some(code),
            RelayError::NoResponse
            | RelayError::Protocol
            | RelayError::Integrity
            | RelayError::Expired
            | RelayError::NoAddress
            | RelayError::Withdrawn
            | RelayError::Replaced
            | RelayError::Released => None,
        }
    }
}
