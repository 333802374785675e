//! PCI devices made of software, for drivers to be tested against without hardware and without root; and a block server ([`block`]).
//!
//! ```text
//!   driver                                               model process, or the driver's own process in unit tests
//!   PciDevice -> PciBackend: vfio-user ---- socket ----> server --+
//!                            ModelBackend ------------------------+-> Machine: config space, BARs, DMA table, interrupts
//!                                                                       |  ^ Host: DMA, interrupts
//!                                                                       v  |
//!                                                                     DeviceModel
//! ```
//! A model is a plain state machine: register accesses and the passing of time go in, DMA and interrupts come out through
//! [`Host`]. Device memory of a model lives in its process (or in a memfd), so it outlives the driver as real device memory does.
//!
//! **A driver that goes away** (killed, disconnected, [`ModelBackend`] dropped) leaves the device as it is: registers, queues
//! and device memory stay. Its DMA mappings and interrupts are gone when the disconnect is complete, bus mastering is off and the device
//! stands still. Work in flight goes on when the next driver switches bus mastering on; what is not mapped by then is a
//! [`DmaFault`], and the model reports it as its kind of device does. So a driver that takes the device over maps first.

pub mod accel;
pub mod block;
pub mod config;
pub mod dma;
pub mod faults;
pub mod local;
pub mod machine;
pub mod model;
pub mod nvme;
pub mod server;
#[cfg(test)]
mod testing;

pub use dma::{DmaTable, MapError};
pub use local::ModelBackend;
pub use machine::{Machine, MachineError};
pub use model::{BarKind, DeviceModel, DmaFault, Host, Identity};
pub use server::{Server, ServerError, serve};
