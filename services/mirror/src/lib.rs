//! The mirror service: device faults go up to the pager through it, invalidations come down to every driver through it.
//!
//! ```text
//!   driver --Fault--> mirror --Resolve--> pager            pager --Invalidate--> mirror --Invalidate--> drivers (all at once)
//!   driver <--Mapped- mirror <--Resolved- pager            pager <InvalidateDone- mirror <------Ack----- drivers (the slowest counts)
//! ```
//!
//! [`core`] decides (with [`window`] for what is left of a disturbed fault), [`service`] moves messages. The mirror never touches client memory and keeps nothing that must survive it.

pub mod core;
pub mod service;
pub mod window;

pub use service::run;
