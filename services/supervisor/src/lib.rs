//! The supervisor: starts and watches services, keeps the vault, hands endpoints out. Tiny, and it never waits for anyone.
//!
//! [`core`] decides (start order, heartbeats, restarts), [`service`] does. What the next supervisor must know lies in
//! `supervisor.toml` of the run directory: channel keys and incarnations. Descriptors it gets back from the services.

pub mod core;
mod service;
mod state;
mod vault;

pub use service::{SupervisorError, SupervisorOptions, run};
