//! PCI devices made of software, for drivers to be tested against without hardware and without root.
//!
//! ```text
//!   driver service (any process)                         model process, or the same process in unit tests
//!   PciDevice -> PciBackend: vfio-user ---- socket ----> frame: config space, BARs, DMA table, interrupts -> DeviceModel
//! ```
//! A model is a plain state machine: register accesses and the passing of time go in, DMA and interrupts come out through
//! [`Host`]. Device memory of a model lives in its process (or in a memfd), so it outlives the driver as real device memory does.

pub mod model;

pub use model::{BarKind, DeviceModel, DmaFault, Host, Identity};
