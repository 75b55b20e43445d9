//! Test doubles around the gateway: the stand-in portal, the trace collector and the resource web
//! server. They follow the specifications and share no code with the gateway, so that a mistake
//! cannot be on both sides.

pub mod collector;
pub mod portal;
pub mod web;
