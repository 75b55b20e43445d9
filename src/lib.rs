//! Library half of `firezone-gateway`; `main.rs` is the command line around it.
//!
//! Two halves share the process: a single-threaded *slow path* that owns all protocol state
//! (portal channel, ICE, TURN, handshakes, policy) and a *fast path* of workers that move packets
//! of established sessions. See `README.md` for the picture.

pub mod access;
pub mod admin;
pub mod config;
pub mod connectivity;
pub mod datapath;
pub mod device;
pub mod diagnose;
pub mod dns;
mod fault;
mod file_version;
pub mod flow_logs;
#[cfg(any(test, fuzzing))]
mod fuzzing;
pub mod gateway;
pub mod host;
pub mod ids;
pub mod kept_files;
pub mod net;
pub mod packet;
pub mod portal;
pub mod telemetry;
mod throttle;
mod timers;
pub mod wireguard;
