//! A real device through the kernel's VFIO, as an ordinary user who may open the device's file and `/dev/iommu`, or else its group.
//!
//! ```text
//!   cdev.rs   /dev/iommu, /dev/vfio/devices/vfioN --the hook's ioctls--> address space + device --+
//!   open.rs   /dev/vfio/GROUP, /dev/vfio/vfio  --(vfio-ioctls)-->          container + device  --+
//!   vault: driver/pci-* (an earlier incarnation opened them; space.rs)  -------------------------+--> VfioBackend: the hook's ioctls
//! ```
//! iommufd is taken where both files are there and this account may open them, group and container otherwise; one line of the
//! log says which. `space.rs` is the one interface over both; regions, interrupts and reset are the same anyway.
//!
//! **Adoption.** As long as anybody has the device's descriptor, the kernel does not reset the device, keeps it a bus master and keeps
//! every DMA mapping with its pages pinned, also those of a process that was killed: what was in flight ends in memory that
//! the vault keeps. The next incarnation
//!
//! 1. takes over the mappings that the device may still be using ([`PciBackend::dma_adopt`]), while the IOMMU's entries stay as
//!    they are. Type 1: the kernel's "update the virtual address" moves owner and RLIMIT_MEMLOCK count to the new process.
//!    iommufd: a mapping has no process that would have to live; its pages count for the user who made it, dead or alive,
//!    until it goes, so it is enough to see that the mapping is there (moving it to another process, IOMMU_IOAS_CHANGE_PROCESS,
//!    would need Linux 6.13 and mappings made by file);
//! 2. unmaps everything else by address: the kernel lets anybody with the descriptor unmap what a dead process mapped;
//! 3. routes new eventfds. Interrupts that came meanwhile are lost, so [`crate::PciDevice::interrupts`] signals each once.
//!
//! **Address space and device are enough**: the device holds group or iommufd. A second process that opens the device
//! is refused until the last descriptor of the device is closed; then the kernel resets the device where it can.

mod cdev;
mod open;
mod space;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::EventFd;
use uhmm_kernel_hook::vfio::{Irq, Region, VfioDevice};

use crate::backend::{InterruptKind, PciBackend, RegionIndex, RegionInfo};
use crate::dma::{DmaMemory, DmaRight};
use crate::error::PciError;
use crate::iova::IovaRange;
use crate::path::PciAddress;

use self::space::Space;

const BAR_COUNT: u8 = 6;

/// See the module head.
#[derive(Debug)]
pub struct VfioBackend {
    address: PciAddress,
    space: Space,
    device: VfioDevice,
    adopted: bool,
    /// BARs 0 to 5 and config space.
    regions: Vec<(RegionIndex, Region)>,
    iova_ranges: Vec<IovaRange>,
    /// What the crate opened; closed last, with our descriptors.
    _opened: Option<open::Opened>,
}

impl VfioBackend {
    /// Opens the device, or goes on with what an earlier incarnation left in the vault.
    ///
    /// # Errors
    /// `Open` says what to do; `File` for sysfs.
    pub fn open(address: PciAddress, kept: &[(String, Fd)]) -> Result<Self, PciError> {
        match Space::adopt(kept)? {
            Some((space, device)) => {
                tracing::info!(device = %address, space = space.name(), "Taken over from the vault");
                Self::with(address, space, device, true, None)
            }
            None => {
                let open::Fresh { space, device, opened } = open::open(address)?;
                Self::with(address, space, device, false, opened)
            }
        }
    }

    fn with(
        address: PciAddress,
        space: Space,
        device: Fd,
        adopted: bool,
        opened: Option<open::Opened>,
    ) -> Result<Self, PciError> {
        let unusable = |source: io::Error| PciError::Open {
            device: address.to_string(),
            problem:
                "the kernel does not answer for its descriptors; stop uhmm, so that they are closed, and start it again"
                    .to_owned(),
            source: Some(source.into()),
        };
        let device = VfioDevice::new(device).map_err(unusable)?;
        let mut regions = Vec::new();
        for index in (0..BAR_COUNT).map(RegionIndex::Bar).chain([RegionIndex::Config]) {
            let region = device.region(index.number()).map_err(unusable)?;
            if region.len > 0 {
                regions.push((index, region));
            }
        }
        let iova_ranges = usable(space.iova_ranges().map_err(unusable)?);
        Ok(Self { address, space, device, adopted, regions, iova_ranges, _opened: opened })
    }

    fn find(&self, index: RegionIndex, offset: u64, len: usize) -> Result<&Region, PciError> {
        let region = self.regions.iter().find(|(known, _)| *known == index).map(|(_, region)| region);
        let (len, region_len) = (len as u64, region.map_or(0, |region| region.len));
        region.filter(|_| offset.checked_add(len).is_some_and(|end| end <= region_len)).ok_or(PciError::OutOfRegion {
            region: index,
            offset,
            len,
            region_len,
        })
    }
}

/// A kernel that does not say what it reserves: x86's window for interrupts, and addresses that every IOMMU has.
fn usable(told: Option<Vec<(u64, u64)>>) -> Vec<IovaRange> {
    let ranges = told.unwrap_or_else(|| vec![(0, 0xfedf_ffff), (0xfef0_0000, (1 << 39) - 1)]);
    ranges.into_iter().map(|(start, last)| IovaRange { start, end: last.saturating_add(1) & !0xfff }).collect()
}

fn irq(kind: InterruptKind) -> Irq {
    match kind {
        InterruptKind::Msi => Irq::Msi,
        InterruptKind::Msix => Irq::Msix,
        InterruptKind::Error => Irq::Error,
        InterruptKind::Request => Irq::Request,
    }
}

impl PciBackend for VfioBackend {
    fn describe(&self) -> String {
        format!("PCI device {}", self.address)
    }

    fn is_adopted(&self) -> bool {
        self.adopted
    }

    fn region(&self, index: RegionIndex) -> Option<RegionInfo> {
        let region = self.find(index, 0, 0).ok()?;
        let mappable = region.mappable.then(|| (Arc::clone(self.device.fd()), region.offset));
        Some(RegionInfo { len_bytes: region.len, mappable })
    }

    fn read(&self, index: RegionIndex, offset: u64, bytes: &mut [u8]) -> Result<(), PciError> {
        let region = self.find(index, offset, bytes.len())?;
        let done = self.device.read(region, offset, bytes);
        done.map_err(|source| PciError::Access { region: index, offset, source })
    }

    fn write(&self, index: RegionIndex, offset: u64, bytes: &[u8]) -> Result<(), PciError> {
        let region = self.find(index, offset, bytes.len())?;
        let done = self.device.write(region, offset, bytes);
        done.map_err(|source| PciError::Access { region: index, offset, source })
    }

    fn iova_ranges(&self) -> Vec<IovaRange> {
        self.iova_ranges.clone()
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, right: DmaRight) -> Result<(), PciError> {
        self.space.map(iova, memory, right)
    }

    fn dma_adopt(&self, iova: u64, memory: &DmaMemory, _right: DmaRight) -> Result<(), PciError> {
        self.space.adopt_map(iova, memory)
    }

    fn dma_unmap(&self, iova: u64, len_bytes: u64) -> Result<(), PciError> {
        self.space.unmap(iova, len_bytes)
    }

    fn dma_unmap_stale(&self, unused: &[IovaRange]) -> Result<(), PciError> {
        unused.iter().try_for_each(|range| self.dma_unmap(range.start, range.end - range.start))
    }

    fn interrupt_count(&self, kind: InterruptKind) -> u32 {
        self.device.irq_count(irq(kind))
    }

    fn set_interrupts(&self, kind: InterruptKind, events: &[EventFd]) -> Result<(), PciError> {
        let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
        // The kernel changes eventfds, but not their number.
        let set = self.device.set_irqs(irq(kind), &[]).and_then(|()| match fds.is_empty() {
            true => Ok(()),
            false => self.device.set_irqs(irq(kind), &fds),
        });
        set.map_err(|source| PciError::Interrupts { kind, source })
    }

    fn reset(&self) -> Result<(), PciError> {
        let device = self.describe();
        if !self.device.can_reset() {
            return Err(PciError::Unsupported { device, what: "be reset" });
        }
        self.device.reset().map_err(|source| PciError::Reset { device, source })
    }

    fn kept(&self) -> Vec<(String, Fd)> {
        self.space.kept(self.device.fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_behind_their_last_address_and_at_whole_pages() {
        let told = Some(vec![(0, 0xfedf_ffff), (0xfef0_0000, u64::MAX)]);
        let end = !0xfff;
        assert_eq!(usable(told), [IovaRange { start: 0, end: 0xfee0_0000 }, IovaRange { start: 0xfef0_0000, end }]);
        assert!(usable(None).iter().all(|range| range.end <= 0xfee0_0000 || range.start >= 0xfef0_0000));
    }
}
