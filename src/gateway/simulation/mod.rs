//! The gateway's core against clients, relays and the portal in a simulated internet: NAT routers
//! of all kinds, both address families, loss, delay and reordering, all in virtual time.

// What a failing schedule did is for whoever reads it.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod nat;
mod network;
mod oracle;
mod schedules;
mod tests;
mod world;
