//! The stand-in portal over real sockets, seen by peers that follow the specification.
#![allow(clippy::unwrap_used)]

mod authorization;
mod channel;
mod control;
mod process;
mod restart;
mod support;
