//! Floors: the same work with the kernel hook and nothing else.
//!
//! ```text
//!   bare.rs     memory of this process whose faults another process answers    -> handler.rs: that process
//!   steps.rs    the steps of a migration, by one thread
//!   copies.rs   memcpy between resident memory
//!   echo.rs     a process that answers what it is told, over a bare socket or over uhmm's stubs
//! ```

pub(super) mod bare;
pub(super) mod copies;
pub(super) mod echo;
pub(super) mod handler;
pub(super) mod steps;
