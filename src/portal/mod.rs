//! The portal channel: a WebSocket that speaks Phoenix channels.
//!
//! [`channel::Channel`] decides (sans-IO), [`driver::Driver`] does: it owns the socket, the dial
//! attempt and the spans. The rest of the gateway talks to the driver only.

pub mod channel;
pub mod clock;
pub mod dial;
pub mod driver;
pub mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod history;
pub mod login;
pub mod messages;
pub mod reconnect;
pub mod wire;

#[cfg(test)]
mod test_portal;

pub use self::channel::{Event, GaveUpReason, NotJoined};
pub use self::driver::{Driver, PortalConfig};
pub use self::error::{ErrorType, Failure};
