//! Test double of the stock headless client. It follows the protocol descriptions, shares no code
//! with the gateway and brings its own TURN implementation, so that an error made on one side does
//! not cancel out on the other.
//!
//! [`core`] holds the protocol without I/O; [`io`] moves datagrams and packets on one thread;
//! [`channel`] talks to the portal; [`control`] answers `GET /status` and friends.

pub mod candidate;
pub mod channel;
pub mod config;
pub mod connection;
pub mod control;
pub mod core;
pub mod demux;
pub mod dns;
pub mod erase;
pub mod io;
pub mod messages;
pub mod netconf;
pub mod packet;
pub mod relay;
pub mod status;
pub mod transmit;
pub mod tun;
