//! The supervisor: starts and watches services, keeps the vault, hands endpoints out. Tiny, and it never waits for anyone.
//!
//! [`core`] decides (start order, heartbeats, restarts), [`service`] does. What the next supervisor must know lies in
//! `supervisor.toml` of the run directory: channel keys, incarnations, processes. Descriptors lie in a second process too, the
//! [`holder`]: it gives them to the next supervisor, and services that live hand theirs back.

pub mod core;
mod holder;
mod keeping;
mod processes;
mod service;
mod state;
mod vault;

pub use holder::{HolderOptions, run_holder};
pub use service::{SupervisorError, SupervisorOptions, run};
