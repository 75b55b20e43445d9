//! Times and limits of the TURN client. Sources: data-path spec §3 and §9, RFC 8489, RFC 8656.

use std::time::Duration;

/// First retransmission after this long (data-path spec §3.2).
pub const RETRANSMIT_FIRST: Duration = Duration::from_secs(1);
/// Each further interval is longer by this factor (§3.2).
pub const RETRANSMIT_FACTOR: f64 = 1.5;
/// A request fails at the first deadline later than this after it was first sent (§3.2).
pub const RETRANSMIT_GIVE_UP: Duration = Duration::from_secs(8);

/// BINDING towards the relay keeps NAT bindings open and tells that it lives (§3.1).
pub const KEEP_ALIVE: Duration = Duration::from_secs(25);

/// Lifetime that is assumed when the server names none (RFC 8656 §3.2).
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(600);
/// Longest lifetime that is believed; RFC 8656 §7.2 recommends servers to grant no more.
pub const MAX_LIFETIME: Duration = Duration::from_secs(3600);
/// Shortest pause before a REFRESH, whatever lifetime the server grants.
pub const MIN_REFRESH_INTERVAL: Duration = Duration::from_secs(5);
/// Pause after a REFRESH that failed without costing the allocation.
pub const REFRESH_RETRY: Duration = Duration::from_secs(15);

/// Lifetime of a channel binding (RFC 8656 §12, §9 of the spec).
pub const CHANNEL_LIFETIME: Duration = Duration::from_secs(600);
/// Age at which a channel in use is bound anew. Its permission lasts 300 s (RFC 8656 §9), and a
/// server like coturn deletes the channel together with it; what is left is for retransmission.
pub const CHANNEL_REFRESH: Duration = Duration::from_secs(240);
/// First pause after which a refused peer is asked for again: soon, because the pair that needs the
/// channel is given up after some seconds without an answer. Doubles up to [`CHANNEL_RETRY_MAX`],
/// since each refusal costs a number for [`CHANNEL_REUSE`].
pub const CHANNEL_RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest pause after a refused channel.
pub const CHANNEL_RETRY_MAX: Duration = Duration::from_secs(80);
/// Age at which the number may serve another peer (RFC 8656 §12.1, data-path spec §3.4).
pub const CHANNEL_REUSE: Duration = Duration::from_secs(900);
/// Peers that may wait for an allocation (§3.4).
pub const MAX_QUEUED_PEERS: usize = 100;

/// First pause before a silent relay is probed again; doubles up to [`PROBE_MAX`].
pub const PROBE_FIRST: Duration = Duration::from_secs(1);
/// Longest pause between two probes of a silent relay.
pub const PROBE_MAX: Duration = Duration::from_secs(30);
/// First pause after a refusal that may pass; doubles up to [`REFUSED_MAX`].
pub const REFUSED_FIRST: Duration = Duration::from_secs(5);
/// The same when quota or capacity are used up: a minute at least (RFC 8656 §7.4), even after what
/// chance takes off.
pub const FULL_FIRST: Duration = Duration::from_secs(80);
/// Longest pause after a refusal, and the only one after a relay has no address of any family.
pub const REFUSED_MAX: Duration = Duration::from_secs(300);
/// First pause after bad credentials, which only the portal can mend; doubles up to
/// [`REFUSED_MAX`].
pub const BAD_CREDENTIALS_FIRST: Duration = Duration::from_secs(30);

/// 401 or 438 answers that one request follows before it counts as failed.
pub const MAX_CHALLENGES: u8 = 4;
/// 437 answers that one allocation attempt follows before it counts as failed.
pub const MAX_MISMATCHES: u8 = 2;
/// Shortest pause between two checks that the portal's messages cause.
pub const POKE_INTERVAL: Duration = Duration::from_secs(5);

/// How long a relay that the portal withdrew stays in service while another one takes over, and in
/// case it was a flap.
pub const RETIREMENT: Duration = Duration::from_secs(5);
/// The same when there is no other usable relay.
pub const RETIREMENT_OF_LAST: Duration = Duration::from_secs(30);
/// Sockets of removed relays that are remembered, so that their late packets are recognised
/// (data-path spec §9).
pub const MAX_REMOVED: usize = 64;
/// Floor of the median absolute deviation when relays are compared (data-path spec §3.8).
pub const MIN_RTT_DEVIATION: Duration = Duration::from_millis(2);
