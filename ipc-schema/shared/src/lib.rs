//! What lies in memory that processes share, as pure algorithms over atomic words: no allocation, no system call, no panic, so that the
//! agent (`sdk/agent`, which has no allocator and no thread-local memory) runs the same code as the services and as loom's models.
//!
//! ```text
//!   words      the one way in which anything here touches shared memory
//!   ring       descriptors from one process to another and back
//!   fill_gate  an agent fills pages, or the pager reads what the program did to them; not both at once
//!   agent      the pager's orders to an agent, its answers, and where they lie
//!   record     what a service has done: counters, times and last events, readable after its death
//! ```
//! Nothing that a peer can write is trusted: indices are checked each time, descriptors are copied out before anybody looks at them,
//! and a word outside its memory reads as zero.
#![cfg_attr(not(test), no_std)]

// For owners of shared words; nothing here allocates.
extern crate alloc;

pub mod agent;
pub mod fill_gate;
pub mod record;
pub mod ring;
pub mod words;
