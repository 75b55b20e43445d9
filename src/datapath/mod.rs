//! The fast path: workers that move packets of established sessions.
//!
//! The slow path publishes peers, paths and policies in a [`peers::PeerTable`]; workers read it
//! without locks and hand over whatever is not established data.

pub mod coalesce;
pub mod counters;
pub(crate) mod flow_cache;
pub mod peers;
pub mod train;
pub mod worker;
