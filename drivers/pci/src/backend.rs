//! What every way to a PCI device offers. Implemented once a way; drivers use [`crate::PciDevice`].

use std::fmt;

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::EventFd;

use crate::dma::{DmaMemory, DmaRight};
use crate::error::PciError;
use crate::iova::IovaRange;

/// A region of the device, numbered as VFIO does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RegionIndex {
    /// Base address register 0 to 5.
    Bar(u8),
    /// Config space.
    Config,
}

impl RegionIndex {
    /// VFIO's (and vfio-user's) number.
    pub fn number(self) -> u32 {
        match self {
            Self::Bar(bar) => u32::from(bar),
            Self::Config => 7,
        }
    }
}

impl fmt::Display for RegionIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bar(bar) => write!(f, "BAR {bar}"),
            Self::Config => f.write_str("Config space"),
        }
    }
}

/// Size and rights of a region.
#[derive(Clone, Debug)]
pub struct RegionInfo {
    /// Bytes.
    pub len_bytes: u64,
    /// All of it can be mapped: the descriptor to map, and where in it the region begins. `None`: only reads and writes by call.
    pub mappable: Option<(Fd, u64)>,
}

/// Interrupts of a device, as VFIO groups them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InterruptKind {
    /// Message-signalled.
    Msi,
    /// Message-signalled, with a table.
    Msix,
    /// The device reports an error that cannot be recovered without a reset.
    Error,
    /// Somebody wants the device back (hot-unplug): the driver is to stop and let go.
    Request,
}

/// See the module head. Calls may come from any thread; none waits for the device longer than a register access takes, and a
/// device (or a process that plays it) that does not answer is an error, not a hang.
pub trait PciBackend: Send + Sync + fmt::Debug {
    /// For messages: which device, reached how.
    fn describe(&self) -> String;

    /// The device was taken over from an earlier incarnation, without a reset: queues, memory and DMA go on.
    fn is_adopted(&self) -> bool;

    /// `None`: the device has no such region.
    fn region(&self, region: RegionIndex) -> Option<RegionInfo>;

    /// Reads by call, in one access of 1, 2, 4 or 8 bytes (config space: any length).
    fn read(&self, region: RegionIndex, offset: u64, bytes: &mut [u8]) -> Result<(), PciError>;

    /// Writes by call, in one access.
    fn write(&self, region: RegionIndex, offset: u64, bytes: &[u8]) -> Result<(), PciError>;

    /// IOVAs that this platform can map.
    fn iova_ranges(&self) -> Vec<IovaRange>;

    /// From now on the device reaches `memory` at `iova`. The range is free and page-aligned (the caller's allocator sees to it).
    fn dma_map(&self, iova: u64, memory: &DmaMemory, right: DmaRight) -> Result<(), PciError>;

    /// Takes over the mapping of exactly these addresses that an earlier incarnation made with the same memory and the same right; DMA
    /// to it goes on undisturbed. Where mappings end with the process that made them, the device stands still meanwhile, and this
    /// makes a new one.
    fn dma_adopt(&self, iova: u64, memory: &DmaMemory, right: DmaRight) -> Result<(), PciError> {
        self.dma_map(iova, memory, right)
    }

    /// The device reaches nothing there any more when this returns. A device that was unplugged reaches nothing: that is a success.
    fn dma_unmap(&self, iova: u64, len_bytes: u64) -> Result<(), PciError>;

    /// On an adopted device, with the addresses that nobody of this incarnation has: mappings of earlier incarnations in them go.
    /// Nothing to do where mappings end with the process that made them.
    fn dma_unmap_stale(&self, _unused: &[IovaRange]) -> Result<(), PciError> {
        Ok(())
    }

    /// How many vectors of this kind the device has.
    fn interrupt_count(&self, kind: InterruptKind) -> u32;

    /// Vector n signals `events[n]`. Replaces what was set; an empty list switches the kind off.
    fn set_interrupts(&self, kind: InterruptKind, events: &[EventFd]) -> Result<(), PciError>;

    /// Function-level reset: queues stop, registers have their first values; DMA mappings stay.
    fn reset(&self) -> Result<(), PciError>;

    /// Descriptors for the vault, by vault name (below `driver/pci-`). Empty where the device lives in another process anyway.
    fn kept(&self) -> Vec<(String, Fd)>;
}
