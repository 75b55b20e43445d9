//! Stand-in portal, client, resource and trace collector, and the network namespaces in which
//! tests put them. The doubles follow the protocol's description and share no code with the
//! gateway.

pub mod browser;
pub mod client;
pub mod collector;
pub mod names;
pub mod netns;
pub mod portal;
pub mod scenario;
pub mod traffic;
pub mod usage;
pub mod web;
