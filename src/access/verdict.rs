//! Answers of a policy, and the one list of reasons for which the data path drops packets.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use super::flows::Flow;
use crate::packet::Malformed;

/// A packet may pass.
#[derive(Debug, Clone)]
pub struct Passed {
    /// When this ends and must be asked for again: the expiry of the grant that decided it. It
    /// holds strictly before this instant; `None` has no end.
    pub until: Option<Instant>,
    /// The flow that the packet belongs to; `None` for the gateway's own services.
    pub flow: Option<Arc<Flow>>,
}

/// A packet is to be dropped. Not to be remembered: a denial can turn into an allowance with time
/// alone, when a grant that overrides another one ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Denied {
    /// Why, for counters and logs.
    pub reason: DropReason,
    /// What to tell the sender, if anything.
    pub reply: Option<Reply>,
}

/// What a policy says of a packet, apart from flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// Let it through.
    Allow {
        /// See [`Passed::until`].
        until: Option<Instant>,
    },
    /// Drop it.
    Deny(Denied),
}

impl Verdict {
    /// Whether the packet may pass.
    pub fn is_allow(&self) -> bool {
        matches!(self, Verdict::Allow { .. })
    }
}

impl From<Result<Option<Instant>, Denied>> for Verdict {
    fn from(outcome: Result<Option<Instant>, Denied>) -> Self {
        match outcome {
            Ok(until) => Verdict::Allow { until },
            Err(denied) => Verdict::Deny(denied),
        }
    }
}

/// ICMP answer to a denied packet (data-path spec §5.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reply {
    /// [`crate::packet::icmp::prohibited`]; clients take it as a hint to ask for access again.
    Prohibited,
    /// [`crate::packet::icmp::unreachable`].
    Unreachable,
}

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// Why a packet or datagram was dropped. Closed: a counter per reason fits into an array
        /// of [`DropReason::COUNT`] elements at [`DropReason::index`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum DropReason {
            $($(#[$doc])* $variant,)*
        }

        impl DropReason {
            /// Every reason, in the order of [`Self::index`].
            pub const ALL: &'static [DropReason] = &[$(DropReason::$variant,)*];

            /// A stable name for metrics, status and logs.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(DropReason::$variant => $name,)*
                }
            }
        }
    };
}

drop_reasons! {
    // Inner packets that are not worth a look (data-path spec §5.2).
    /// [`Malformed::Version`].
    MalformedVersion => "malformed_version",
    /// [`Malformed::Truncated`].
    MalformedTruncated => "malformed_truncated",
    /// [`Malformed::TooLong`].
    MalformedTooLong => "malformed_too_long",
    /// [`Malformed::Length`].
    MalformedLength => "malformed_length",
    /// [`Malformed::Fragment`].
    MalformedFragment => "malformed_fragment",
    /// [`Malformed::Options`].
    MalformedOptions => "malformed_options",
    /// [`Malformed::SourceRouted`].
    MalformedSourceRouted => "malformed_source_routed",
    /// [`Malformed::ExtensionHeaders`].
    MalformedExtensionHeaders => "malformed_extension_headers",
    /// [`Malformed::TcpHeader`].
    MalformedTcpHeader => "malformed_tcp_header",
    /// [`Malformed::UdpLength`].
    MalformedUdpLength => "malformed_udp_length",
    /// [`Malformed::IcmpHeader`].
    MalformedIcmpHeader => "malformed_icmp_header",
    /// [`Malformed::IcmpFamily`].
    MalformedIcmpFamily => "malformed_icmp_family",
    /// A control packet whose header or body cannot be read (data-path spec §6.1).
    MalformedControl => "malformed_control",
    /// An announcement of a name beyond what may wait for resolution (data-path spec §6.2).
    ControlLimited => "control_limited",

    // Client to resource (data-path spec §5.3).
    /// Multicast destination.
    Multicast => "multicast",
    /// ICMP error sent by a client.
    IcmpErrorFromClient => "icmp_error_from_client",
    /// The source is not one of the client's tunnel addresses.
    SourceNotClient => "source_not_client",
    /// A service of the gateway itself that clients have no business with.
    GatewayServiceClosed => "gateway_service_closed",
    /// Another peer's tunnel address.
    OtherPeer => "other_peer",

    // Either direction (data-path spec §5.4).
    /// No grant covers the remote address.
    NoGrant => "no_grant",
    /// A grant covers the remote address, its filters do not permit the protocol or port.
    FilterDenied => "filter_denied",
    /// Only grants that have expired cover the remote address.
    GrantExpired => "grant_expired",
    /// A range that an Internet resource does not include.
    InternetRefused => "internet_refused",
    /// A proxy address without translation (data-path spec §6.4).
    NotTranslated => "not_translated",
    /// A protocol that cannot be translated (data-path spec §6.5).
    NatUnsupportedProtocol => "nat_unsupported_protocol",
    /// No free port for a translation (data-path spec §6.5).
    NatExhausted => "nat_exhausted",
    /// More flows than one client, or all together, may have.
    FlowLimit => "flow_limit",

    // Resource to client (data-path spec §5.6).
    /// The destination is not one of the client's tunnel addresses.
    DestinationNotClient => "destination_not_client",
    /// The source claims to be a tunnel address.
    SourceInTunnelRange => "source_in_tunnel_range",
    /// Not part of a flow that the client has begun, or of one that has ended.
    NoFlow => "no_flow",
    /// An ICMP error that is not about a packet of the client.
    IcmpErrorNotForClient => "icmp_error_not_for_client",
    /// Read from the device for a tunnel address that no client holds.
    NoPeer => "no_peer",

    // Sessions and paths.
    /// The client has no policy, that is no grant at all.
    NoPolicy => "no_policy",
    /// No WireGuard session is established.
    NoSession => "no_session",
    /// No path to the peer is nominated.
    NoPath => "no_path",
    /// A receiver index that was never given out or is no longer in use.
    UnknownIndex => "unknown_index",
    /// Authentication of a data message failed.
    DecryptFailed => "decrypt_failed",
    /// A data message that was seen before or is behind the replay window.
    Replayed => "replayed",
    /// A handshake message that fails its checks.
    HandshakeInvalid => "handshake_invalid",
    /// A handshake message beyond the admission budget.
    HandshakeRateLimited => "handshake_rate_limited",
    /// A datagram that is neither STUN, TURN nor WireGuard.
    UnknownDatagram => "unknown_datagram",

    // Queues and devices.
    /// The queue to the slow path is full.
    QueueFull => "queue_full",
    /// Writing to the TUN device failed.
    DeviceWriteFailed => "device_write_failed",
    /// Sending on the UDP socket failed.
    SocketWriteFailed => "socket_write_failed",
}

impl DropReason {
    /// Number of reasons.
    pub const COUNT: usize = Self::ALL.len();

    /// Position in [`Self::ALL`].
    #[inline]
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<Malformed> for DropReason {
    #[inline]
    fn from(malformed: Malformed) -> Self {
        match malformed {
            Malformed::Version => DropReason::MalformedVersion,
            Malformed::Truncated => DropReason::MalformedTruncated,
            Malformed::TooLong => DropReason::MalformedTooLong,
            Malformed::Length => DropReason::MalformedLength,
            Malformed::Fragment => DropReason::MalformedFragment,
            Malformed::Options => DropReason::MalformedOptions,
            Malformed::SourceRouted => DropReason::MalformedSourceRouted,
            Malformed::ExtensionHeaders => DropReason::MalformedExtensionHeaders,
            Malformed::TcpHeader => DropReason::MalformedTcpHeader,
            Malformed::UdpLength => DropReason::MalformedUdpLength,
            Malformed::IcmpHeader => DropReason::MalformedIcmpHeader,
            Malformed::IcmpFamily => DropReason::MalformedIcmpFamily,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn index_is_the_position_and_names_are_distinct() {
        let mut names = HashSet::new();
        for (position, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), position);
            assert!(names.insert(reason.as_str()), "{reason}");
        }
        assert_eq!(names.len(), DropReason::COUNT);
    }

    #[test]
    fn every_reason_is_explained() {
        let page = include_str!("../../docs/access.md");
        for reason in DropReason::ALL {
            let name = reason.as_str();
            let told = page.contains(&format!("`{name}`"))
                || name.starts_with("malformed_") && page.contains("`malformed_...`");
            assert!(told, "{name} is not in docs/access.md");
        }
    }

    #[test]
    fn malformed_packets_keep_their_name() {
        for malformed in [
            Malformed::Version,
            Malformed::Truncated,
            Malformed::TooLong,
            Malformed::Length,
            Malformed::Fragment,
            Malformed::Options,
            Malformed::SourceRouted,
            Malformed::ExtensionHeaders,
            Malformed::TcpHeader,
            Malformed::UdpLength,
            Malformed::IcmpHeader,
            Malformed::IcmpFamily,
        ] {
            assert_eq!(DropReason::from(malformed).as_str(), malformed.as_str());
        }
    }
}
