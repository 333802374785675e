//! One PCI device for a driver that runs as an ordinary process, however the device is reached.
//!
//! ```text
//!   driver: bar(n).load/store, map_dma(memory) -> DmaMapping, interrupts, reset
//!      |
//!   PciDevice            IOVA allocator, mappings that undo themselves, capabilities
//!      |
//!   PciBackend           VFIO (a real device behind an IOMMU) | vfio-user (a device in another process) | a model in this process
//! ```
//! The device reaches exactly the memory that was given to [`PciDevice::map_dma`] and is not unmapped again, nothing else.
//! What [`PciBackend::kept`] returns goes into the vault: while it is there the device is not reset, and the next incarnation of the
//! driver takes it over with everything that is still in flight.

pub mod backend;
pub mod device;
pub mod dma;
pub mod error;
pub mod iova;
pub mod path;
pub mod removal;
mod vfio;
pub mod vfio_user;

pub use backend::{InterruptKind, PciBackend, RegionIndex, RegionInfo};
pub use device::{Bar, PciDevice};
pub use dma::{DmaMapping, DmaMemory, DmaRight};
pub use error::PciError;
pub use iova::{IovaAllocator, IovaRange};
pub use path::{PciAddress, PciPath};
pub use removal::RemovalWatch;
pub use vfio::VfioBackend;
pub use vfio_user::VfioUserBackend;

use std::sync::Arc;

use uhmm_ipc::message::Fd;

/// Opens the device, or goes on with what an earlier incarnation of the driver left in the vault: `kept`, of which other names than
/// those of [`PciBackend::kept`] are ignored.
///
/// # Errors
/// `Open` says what is wrong and what to do.
pub fn open(path: &PciPath, kept: &[(String, Fd)]) -> Result<PciDevice, PciError> {
    match path {
        PciPath::Vfio(address) => PciDevice::new(Arc::new(VfioBackend::open(*address, kept)?)),
        PciPath::VfioUser(socket) => PciDevice::new(Arc::new(VfioUserBackend::open(socket)?)),
    }
}
