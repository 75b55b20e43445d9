//! The stand-in portal: the portal's side of the gateway and client channels, with a control API
//! for tests.
//!
//! It follows the portal-channel specification (§1, §2.1, §4, §6, §7) and deliberately shares no
//! code with the gateway. Relays have no channel of their own here; they are listed in the policy.

mod control;
pub mod core;
pub mod derive;
pub mod events;
pub mod faults;
pub mod ingest_token;
pub mod policy;
mod server;
mod socket;
pub mod store;
pub mod tls;
pub mod version;
pub mod wire;

pub use core::Timings;
pub use policy::Policy;
pub use server::{Options, Portal};
