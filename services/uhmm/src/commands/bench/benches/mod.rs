//! The benches, and what they share: memory that uhmm manages, the touching of pages, client processes.

pub(super) mod access;
pub(super) mod client;
pub(super) mod contended;
pub(super) mod costs;
pub(super) mod fault;
pub(super) mod fault_more;
pub(super) mod footprint;
pub(super) mod invalidate;
pub(super) mod ipc;
pub(super) mod job;
pub(super) mod managed;
pub(super) mod party;
pub(super) mod recover;
pub(super) mod scale;
pub(super) mod scan;
mod sizes;
pub(super) mod touch;
pub(super) mod ways;
