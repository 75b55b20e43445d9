//! The portal channel: a WebSocket that speaks Phoenix channels.

pub mod messages;
