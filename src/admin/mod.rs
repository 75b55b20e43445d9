//! Admin server: health, status.

pub mod model;
