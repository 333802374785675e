//! A PCI device as its driver sees it.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::{EventFd, Prot, Window};

use crate::backend::{InterruptKind, PciBackend, RegionIndex, RegionInfo};
use crate::dma::{DmaMapping, DmaMemory, DmaRight};
use crate::error::PciError;
use crate::iova::IovaAllocator;

const VENDOR: u64 = 0;
const DEVICE: u64 = 2;
const COMMAND: u64 = 4;
const COMMAND_MEMORY: u16 = 0b010;
const COMMAND_BUS_MASTER: u16 = 0b100;

/// Cheap to clone; all clones are one device.
#[derive(Clone, Debug)]
pub struct PciDevice {
    backend: Arc<dyn PciBackend>,
    iovas: Arc<Mutex<IovaAllocator>>,
}

impl PciDevice {
    /// Memory accesses are switched on, and DMA too unless the device was adopted: work may be in flight then, whose memory is to be
    /// mapped before (see [`PciDevice::allow_dma`]).
    ///
    /// # Errors
    /// The device does not answer.
    pub fn new(backend: Arc<dyn PciBackend>) -> Result<Self, PciError> {
        let iovas = IovaAllocator::new(&backend.iova_ranges());
        let device = Self { backend, iovas: Arc::new(Mutex::new(iovas)) };
        let dma = if device.is_adopted() { 0 } else { COMMAND_BUS_MASTER };
        device.switch_on(COMMAND_MEMORY | dma)?;
        Ok(device)
    }

    /// Called by a driver that adopted the device, when everything is mapped that work in flight may touch, and interrupts are set.
    /// Harmless where DMA never stopped.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn allow_dma(&self) -> Result<(), PciError> {
        self.switch_on(COMMAND_BUS_MASTER)
    }

    /// For messages.
    pub fn describe(&self) -> String {
        self.backend.describe()
    }

    /// Taken over from an earlier incarnation, without a reset.
    pub fn is_adopted(&self) -> bool {
        self.backend.is_adopted()
    }

    /// Vendor and device id.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn id(&self) -> Result<(u16, u16), PciError> {
        Ok((self.config_u16(VENDOR)?, self.config_u16(DEVICE)?))
    }

    /// Two bytes of config space.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn config_u16(&self, offset: u64) -> Result<u16, PciError> {
        let mut bytes = [0; 2];
        self.backend.read(RegionIndex::Config, offset, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    /// Changes two bytes of config space.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn write_config_u16(&self, offset: u64, value: u16) -> Result<(), PciError> {
        self.backend.write(RegionIndex::Config, offset, &value.to_le_bytes())
    }

    /// Registers or memory behind a base address register.
    ///
    /// # Errors
    /// The device has no such BAR, or it cannot be mapped.
    pub fn bar(&self, number: u8) -> Result<Bar, PciError> {
        let region = RegionIndex::Bar(number);
        let none = PciError::OutOfRegion { region, offset: 0, len: 1, region_len: 0 };
        let info = self.backend.region(region).filter(|info| info.len_bytes > 0).ok_or(none)?;
        let window = match &info.mappable {
            Some((fd, offset)) => Some(Window::map(fd.as_fd(), *offset, info.len_bytes, Prot::ReadWrite)?),
            None => None,
        };
        Ok(Bar { backend: Arc::clone(&self.backend), region, info, window: window.map(Arc::new) })
    }

    /// The device reaches `memory` somewhere below `limit` (its DMA mask plus one) until the mapping is dropped.
    ///
    /// # Errors
    /// `NoIova`, `Map`.
    pub fn map_dma(&self, memory: &DmaMemory, right: DmaRight, limit: u64) -> Result<DmaMapping, PciError> {
        let iova =
            self.lock().allocate(memory.len_bytes(), memory.len_bytes().min(2 << 20).next_power_of_two(), limit)?;
        DmaMapping::new(Arc::clone(&self.backend), Arc::clone(&self.iovas), iova, memory.clone(), right)
    }

    /// The same at addresses of the caller's choice (IOVA = virtual address, or what an earlier incarnation told the device).
    ///
    /// # Errors
    /// `IovaTaken`, `Map`.
    pub fn map_dma_at(&self, iova: u64, memory: &DmaMemory, right: DmaRight) -> Result<DmaMapping, PciError> {
        self.lock().take(iova, memory.len_bytes())?;
        DmaMapping::new(Arc::clone(&self.backend), Arc::clone(&self.iovas), iova, memory.clone(), right)
    }

    /// Takes over a mapping that an earlier incarnation made at `iova` with the same memory (from the vault). DMA to it that is in
    /// flight is not disturbed. To be called before [`PciDevice::finish_adoption`], which ends all other old mappings.
    ///
    /// # Errors
    /// `IovaTaken`; `Map` when nothing is mapped exactly there.
    pub fn adopt_dma(&self, iova: u64, memory: &DmaMemory, right: DmaRight) -> Result<DmaMapping, PciError> {
        self.lock().take(iova, memory.len_bytes())?;
        DmaMapping::adopted(Arc::clone(&self.backend), Arc::clone(&self.iovas), iova, memory.clone(), right)
    }

    /// The device reaches nothing any more but what this incarnation has adopted or mapped. A driver whose device
    /// [`PciDevice::is_adopted`] calls it once, after it has adopted (or stopped) what is in flight, before it maps anything and before
    /// [`PciDevice::allow_dma`].
    ///
    /// # Errors
    /// `Map`: something old could not be unmapped.
    pub fn finish_adoption(&self) -> Result<(), PciError> {
        if self.is_adopted() {
            let gaps = self.lock().gaps();
            self.backend.dma_unmap_stale(&gaps)?;
        }
        Ok(())
    }

    /// New eventfds for the first `count` vectors of this kind, routed. On an adopted device each message-signalled one is
    /// signalled once: what happened while nobody listened is looked at.
    ///
    /// # Errors
    /// As [`PciDevice::set_interrupts`].
    pub fn interrupts(&self, kind: InterruptKind, count: usize) -> Result<Vec<EventFd>, PciError> {
        let events = (0..count).map(|_| EventFd::new()).collect::<Result<Vec<_>, _>>()?;
        self.set_interrupts(kind, &events)?;
        if self.is_adopted() && matches!(kind, InterruptKind::Msi | InterruptKind::Msix) {
            events.iter().try_for_each(EventFd::signal)?;
        }
        Ok(events)
    }

    /// Vectors of this kind.
    pub fn interrupt_count(&self, kind: InterruptKind) -> u32 {
        self.backend.interrupt_count(kind)
    }

    /// Vector n signals `events[n]`; an empty list switches them off.
    ///
    /// # Errors
    /// The device has fewer vectors, or the kernel refuses.
    pub fn set_interrupts(&self, kind: InterruptKind, events: &[EventFd]) -> Result<(), PciError> {
        self.backend.set_interrupts(kind, events)
    }

    /// Function-level reset, then memory and bus mastering on again. DMA mappings stay.
    ///
    /// # Errors
    /// The state is unknown then.
    pub fn reset(&self) -> Result<(), PciError> {
        self.backend.reset()?;
        self.switch_on(COMMAND_MEMORY | COMMAND_BUS_MASTER)
    }

    /// For the vault; see [`PciBackend::kept`].
    pub fn kept(&self) -> Vec<(String, Fd)> {
        self.backend.kept()
    }

    fn switch_on(&self, bits: u16) -> Result<(), PciError> {
        let command = self.config_u16(COMMAND)?;
        if command & bits == bits { Ok(()) } else { self.write_config_u16(COMMAND, command | bits) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, IovaAllocator> {
        self.iovas.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A base address register: mapped where the device allows it, by call elsewhere. Little endian, as PCI is.
#[derive(Clone, Debug)]
pub struct Bar {
    backend: Arc<dyn PciBackend>,
    region: RegionIndex,
    info: RegionInfo,
    window: Option<Arc<Window>>,
}

impl Bar {
    /// Bytes.
    pub fn len_bytes(&self) -> u64 {
        self.info.len_bytes
    }

    /// The whole BAR in this process, where it can be mapped.
    pub fn window(&self) -> Option<&Arc<Window>> {
        self.window.as_ref()
    }

    /// What others map to see it: descriptor, and where the BAR begins in it.
    pub fn mappable(&self) -> Option<(Fd, u64)> {
        self.info.mappable.clone()
    }

    /// A 32-bit register.
    ///
    /// # Errors
    /// Outside, unaligned, or the device does not answer.
    pub fn load_u32(&self, offset: u64) -> Result<u32, PciError> {
        match &self.window {
            Some(window) => Ok(window.load_u32(offset)?),
            None => self.read_call::<4>(offset).map(u32::from_le_bytes),
        }
    }

    /// A 64-bit register.
    ///
    /// # Errors
    /// As [`Bar::load_u32`].
    pub fn load_u64(&self, offset: u64) -> Result<u64, PciError> {
        match &self.window {
            Some(window) => Ok(window.load_u64(offset)?),
            None => self.read_call::<8>(offset).map(u64::from_le_bytes),
        }
    }

    /// A 32-bit register. What was written to memory before is visible to the device first.
    ///
    /// # Errors
    /// As [`Bar::load_u32`].
    pub fn store_u32(&self, offset: u64, value: u32) -> Result<(), PciError> {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        match &self.window {
            Some(window) => Ok(window.store_u32(offset, value)?),
            None => self.write_call(offset, &value.to_le_bytes()),
        }
    }

    /// A 64-bit register.
    ///
    /// # Errors
    /// As [`Bar::load_u32`].
    pub fn store_u64(&self, offset: u64, value: u64) -> Result<(), PciError> {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        match &self.window {
            Some(window) => Ok(window.store_u64(offset, value)?),
            None => self.write_call(offset, &value.to_le_bytes()),
        }
    }

    fn read_call<const N: usize>(&self, offset: u64) -> Result<[u8; N], PciError> {
        self.check(offset, N as u64)?;
        let mut bytes = [0; N];
        self.backend.read(self.region, offset, &mut bytes)?;
        Ok(bytes)
    }

    fn write_call(&self, offset: u64, bytes: &[u8]) -> Result<(), PciError> {
        self.check(offset, bytes.len() as u64)?;
        self.backend.write(self.region, offset, bytes)
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), PciError> {
        let inside = offset.is_multiple_of(len) && offset.checked_add(len).is_some_and(|end| end <= self.len_bytes());
        let (region, region_len) = (self.region, self.len_bytes());
        if inside { Ok(()) } else { Err(PciError::OutOfRegion { region, offset, len, region_len }) }
    }
}
