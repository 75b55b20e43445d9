//! Names and numbers that the host configuration uses, in one table.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

/// Network of all tunnel addresses, IPv4 (data-path spec §5.1).
pub const TUNNEL_V4: (Ipv4Addr, u8) = (Ipv4Addr::new(100, 64, 0, 0), 11);
/// Network of all tunnel addresses, IPv6 (data-path spec §5.1).
pub const TUNNEL_V6: (Ipv6Addr, u8) = (Ipv6Addr::new(0xfd00, 0x2021, 0x1111, 0, 0, 0, 0, 0), 107);

/// Routing table of the tunnel networks (data-path spec §7.1).
pub const ROUTING_TABLE: u32 = 0x2021_fd00;
/// Mark of the gateway's own sockets, whose packets never enter the tunnel (data-path spec §1.1).
pub const FWMARK: u32 = 0xfd00_2021;
/// Priority of the policy rule that leads to [`ROUTING_TABLE`] (data-path spec §7.1).
pub const RULE_PRIORITY: u32 = 100;
/// Transmit queue of the device, packets (data-path spec §7.1).
pub const TX_QUEUE_LEN: u32 = 10_000;
/// Longest interface name, bytes without the terminator (Linux `IFNAMSIZ` - 1).
pub const MAX_LINK_NAME: usize = 15;

/// Our table in nf_tables, family `inet`.
pub const NFT_TABLE: &str = "firezone_gateway";
/// The chain that masquerades.
pub const NFT_POSTROUTING: &str = "postrouting";
/// The chain that accepts forwarded packets of the device.
pub const NFT_FORWARD: &str = "forward";
/// `srcnat`, the customary priority of source NAT (Linux `NF_IP_PRI_NAT_SRC`).
pub const NFT_PRIORITY_SRCNAT: i32 = 100;
/// `filter`, the customary priority of filtering (Linux `NF_IP_PRI_FILTER`).
pub const NFT_PRIORITY_FILTER: i32 = 0;

/// Receive buffer wanted for a UDP socket, bytes (data-path spec §1.1).
pub const UDP_RECEIVE_BUFFER: u64 = 16 * 1024 * 1024;
/// Send buffer wanted for a UDP socket, bytes (data-path spec §1.1).
pub const UDP_SEND_BUFFER: u64 = 2 * 1024 * 1024;

/// Device number of `/dev/net/tun`, major and minor (Linux `admin-guide/devices.txt`).
pub const TUN_DEVICE_NUMBER: (u32, u32) = (10, 200);
/// Mode of `/dev/net` when it has to be made (portal-channel spec §5.6).
pub const TUN_DIRECTORY_MODE: u32 = 0o751;
/// Mode of `/dev/net/tun` when it has to be made; udev gives it the same.
pub const TUN_NODE_MODE: u32 = 0o666;
/// 2024-01-01T00:00:00Z in Unix seconds. A clock before it was never set, and every TLS
/// certificate looks as if it were not valid yet.
pub const OLDEST_SANE_TIME: u64 = 1_704_067_200;
/// How far our clock may be from the portal's, seconds: an answer may have been under way for some, and
/// grants are not given for less than minutes.
pub const CLOCK_TOLERANCE: f64 = 30.0;

/// Largest IPv4 packet that the gateway sends, bytes: 1280 of an inner packet, 32 of WireGuard, 4 of a
/// relay's channel (RFC 8656 §12.4), 8 of UDP, 20 of IP.
pub const OUTER_PACKET_V4: u32 = 1344;
/// The same for IPv6, whose header has 40.
pub const OUTER_PACKET_V6: u32 = 1364;

/// How long an answer of the kernel may take. It normally takes microseconds; the bound is there
/// because a message that cannot be parsed is dropped and its answer then never comes.
pub const NETLINK_TIMEOUT: Duration = Duration::from_secs(5);

/// Preferred local UDP port (data-path spec §1.1).
pub const UDP_PORT: u16 = 52_625;
