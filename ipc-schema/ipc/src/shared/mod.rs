//! Structures in memory shared between processes: no message on the hot paths.
//!
//! * [`words`]: sealed memfds seen as atomic 64-bit words, the only way in which anything here touches shared memory.
//! * [`table`]: a device's page table of one region; the pager revokes by an atomic swap.
//! * [`gate`]: where device threads say that they are inside, so that a revoker can wait for them.
//! * [`fill_gate`]: an agent fills pages, or the pager reads what the program did to them; not both at once.
//! * [`copy_ring`]: descriptors of the copy ring (carried by [`crate::ring`]).
//! * [`index_layout`]: data layout shared by the CPU and device kernels.
//!
//! ```text
//!   device thread                          revoker (pager, or the driver's loop)
//!     gate: slot <- odd, fence               table: entry <- 0 (swap), fence
//!     table: load entry                      gate: slot odd? wait until it changes
//!     use the page (only if VALID)           nobody uses the page: change its owner
//!     gate: slot <- even
//! ```
//! Whichever fence comes first: either the revoker sees the odd slot and waits, or the thread sees the revoked entry.

pub mod copy_ring;
pub mod fill_gate;
pub mod gate;
pub mod index_layout;
#[cfg(test)]
pub(crate) mod model;
pub mod table;
pub mod words;
