//! Compute units in software, for any driver: threads that run kernels on the device's memory through the device's page table.
//!
//! ```text
//!   driver kit's loop --submit, resume, cancel--> Workers: unit-0, unit-1, ...   each: kernel -> Mmu -> frame | system page
//!                     <--------- DevicePort ----- faults, ends of jobs                                    |
//!                                                              window: the CPU sees device memory --------+
//!                                                              port: the unit's own page, filled and stored by the device
//! ```
//! A driver makes its [`uhmm_driver_kit::SharedTable`] with one place for each unit, tells for each unit how it reaches frames
//! ([`UnitFrames`]), and gives [`Workers`] to the kit as its queue:
//!
//! ```text
//!   let frames = (0..units).map(|_| UnitFrames::Window(window.clone())).collect();
//!   let queue = Workers::start(&table, &port, &kernels, frames)?;
//! ```
//! Devices without a window implement [`FramePort`], and give their copy engine to the kit inside [`LockedEngine`].
//!
//! After a crash nothing of this is left: jobs that were running are submitted again, or ended, by the kit.

mod frames;
pub mod kernels;
mod mmu;
mod workers;

pub use frames::{FrameLocks, FramePort, Late, LockedEngine, UnitFrames};
pub use kernels::Kernel;
pub use workers::{ComputeError, Workers};
