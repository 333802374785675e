//! The benches, and what they share: memory that uhmm manages, the touching of pages, client processes.

pub(super) mod access;
pub(super) mod client;
pub(super) mod fault;
pub(super) mod job;
pub(super) mod managed;
pub(super) mod party;
pub(super) mod scale;
pub(super) mod scan;
pub(super) mod touch;
pub(super) mod ways;
