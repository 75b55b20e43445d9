//! ICE agents, candidates and path selection.

pub mod relay;
