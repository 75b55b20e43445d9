//! Stand-ins used by the tests and the demo.

pub mod client;
