//! The supervisor: starts and watches services, keeps the vault, hands endpoints out. Tiny, and it never waits for anyone.
//!
//! [`core`] decides (start order, heartbeats, restarts), [`service`] does. What the next supervisor must know lies in
//! `supervisor.toml` of the run directory: channel keys, incarnations, processes. Descriptors lie in a second process too, the
//! [`holder`]: it gives them to the next supervisor, and services that live hand theirs back. A service manager that has started the
//! supervisor hears how it is ([`manager`]) and keeps the vault a third time, for the death of all at once ([`store`]).

mod confining;
pub mod core;
mod doors;
mod holder;
mod joining;
mod keeping;
mod manager;
mod processes;
mod record;
mod service;
mod state;
mod store;
mod vault;
mod views;

pub use holder::{HolderOptions, run_holder};
pub use service::{SupervisorError, SupervisorOptions, run};
