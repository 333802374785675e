//! Device memory: the DMA buffer is frame 0, and only DMA reaches it.
//!
//! ```text
//!   frame byte     0 ............................... 4094      4095
//!   lies in        DMA buffer                                  lowest byte of the scratch register
//! ```
//! QEMU 7.2 ends itself when a DMA reaches the buffer's last byte, so that byte of the frame has another place. A driver is where
//! such errata end: nobody above learns of it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uhmm_compute::FramePort;
use uhmm_driver_kit::{CopyEngine, DeviceError, DeviceMemory, Frames, PAGE_BYTES, Staging, StagingUse};
use uhmm_ipc::message::{Aperture, Fd};
use uhmm_kernel_hook::Window;
use uhmm_pci::{DmaMapping, DmaMemory, DmaRight, PciDevice};

use crate::hardware::{DMA_LIMIT, Direction, Edu, REACHABLE_BYTES};

/// What the kit is told of device memory.
#[derive(Debug)]
pub struct EduMemory {
    device: PciDevice,
}

impl EduMemory {
    /// Memory of this device.
    pub fn new(device: PciDevice) -> Self {
        Self { device }
    }
}

impl DeviceMemory for EduMemory {
    fn frame_count(&self) -> u32 {
        1
    }

    fn aperture(&self) -> Option<Aperture> {
        None
    }

    /// The open device *is* the memory: as long as the vault has it, the frame keeps its bytes.
    fn kept(&self) -> Vec<(String, Fd)> {
        self.device.kept()
    }
}

/// The frame, for everybody in this process who moves bytes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Frame {
    edu: Arc<Mutex<Edu>>,
    device: PciDevice,
}

impl Frame {
    /// The frame of this device. `edu` is shared with whoever else uses its registers.
    pub fn new(edu: Arc<Mutex<Edu>>, device: PciDevice) -> Self {
        Self { edu, device }
    }

    /// The device may reach this memory until the mapping is dropped.
    fn map(&self, memory: &DmaMemory, right: DmaRight) -> Result<DmaMapping, DeviceError> {
        Ok(self.device.map_dma(memory, right, DMA_LIMIT)?)
    }

    /// Brings `part` of the frame to the same place of the page that begins at byte `at` of the memory.
    fn load(&self, memory: &DmaMapping, at: u64, part: Range<u64>) -> Result<(), DeviceError> {
        let edu = lock(&self.edu);
        if let Some(part) = by_dma(&part) {
            edu.transfer(Direction::ToMemory, memory.iova(at + part.start), part.start, part.end - part.start)?;
        }
        if part.contains(&REACHABLE_BYTES) {
            memory.window().store_u8(at + REACHABLE_BYTES, edu.scratch()? as u8)?;
        }
        Ok(())
    }

    /// The other way. Returns after the frame holds the bytes.
    fn store(&self, memory: &DmaMapping, at: u64, part: Range<u64>) -> Result<(), DeviceError> {
        let edu = lock(&self.edu);
        if let Some(part) = by_dma(&part) {
            edu.transfer(Direction::FromMemory, memory.iova(at + part.start), part.start, part.end - part.start)?;
        }
        if part.contains(&REACHABLE_BYTES) {
            edu.set_scratch(u32::from(memory.window().load_u8(at + REACHABLE_BYTES)?))?;
        }
        Ok(())
    }
}

/// What of a part of the frame lies in the DMA buffer.
fn by_dma(part: &Range<u64>) -> Option<Range<u64>> {
    let reachable = part.start..part.end.min(REACHABLE_BYTES);
    (!reachable.is_empty()).then_some(reachable)
}

/// A thread that panicked under this lock left no half-done state here: the device's registers say what it is doing.
pub(crate) fn lock(edu: &Mutex<Edu>) -> MutexGuard<'_, Edu> {
    edu.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The copy engine: DMA between the frame and the staging areas, where they are.
#[derive(Debug)]
pub struct EduEngine {
    frame: Frame,
    areas: HashMap<StagingUse, DmaMapping>,
    zeroes: DmaMapping,
}

impl EduEngine {
    /// Works on this frame.
    ///
    /// # Errors
    /// No memory for DMA.
    pub fn new(frame: Frame) -> Result<Self, DeviceError> {
        let zeroes = frame.map(&DmaMemory::create("uhmm-edu-zeroes", PAGE_BYTES)?, DmaRight::Read)?;
        Ok(Self { frame, areas: HashMap::new(), zeroes })
    }

    /// The frame becomes zero.
    ///
    /// # Errors
    /// The device failed; the frame holds anything.
    pub fn scrub_frame(&mut self) -> Result<(), DeviceError> {
        self.frame.store(&self.zeroes, 0, 0..PAGE_BYTES)
    }

    fn area(&self, staging: &Staging) -> Result<&DmaMapping, DeviceError> {
        self.areas.get(&staging.used_by).ok_or_else(|| "This staging area was never attached".into())
    }
}

impl CopyEngine for EduEngine {
    fn attach(&mut self, staging: &Staging) -> Result<(), DeviceError> {
        // The earlier area first: its addresses become free, and it must not stay reachable when the new one is refused.
        self.areas.remove(&staging.used_by);
        let memory = DmaMemory { fd: staging.fd.clone(), offset_bytes: 0, window: staging.window.clone() };
        self.areas.insert(staging.used_by, self.frame.map(&memory, DmaRight::ReadWrite)?);
        Ok(())
    }

    fn copy_in(&mut self, staging: &Staging, staging_page: u32, frames: Frames) -> Result<(), DeviceError> {
        // The kit has checked the ranges: there is one frame, so `frames` is that one.
        debug_assert_eq!(frames, Frames { first: 0, count: 1 });
        self.frame.store(self.area(staging)?, u64::from(staging_page) * PAGE_BYTES, 0..PAGE_BYTES)
    }

    fn copy_out(&mut self, frames: Frames, staging: &Staging, staging_page: u32) -> Result<(), DeviceError> {
        debug_assert_eq!(frames, Frames { first: 0, count: 1 });
        self.frame.load(self.area(staging)?, u64::from(staging_page) * PAGE_BYTES, 0..PAGE_BYTES)
    }

    fn scrub(&mut self, _frames: Frames) -> Result<(), DeviceError> {
        self.scrub_frame()
    }
}

/// How one software unit reaches the frame: by a page of its own, and DMA of exactly the bytes that a kernel touches.
#[derive(Debug)]
pub struct UnitPort {
    frame: Frame,
    page: DmaMapping,
}

impl UnitPort {
    /// With a new page.
    ///
    /// # Errors
    /// No memory for DMA.
    pub fn new(frame: Frame) -> Result<Self, DeviceError> {
        let page = frame.map(&DmaMemory::create("uhmm-edu-unit", PAGE_BYTES)?, DmaRight::ReadWrite)?;
        Ok(Self { frame, page })
    }
}

impl FramePort for UnitPort {
    fn page(&self) -> &Window {
        self.page.window()
    }

    fn load(&mut self, _frame: u32, part: Range<u64>) -> Result<(), DeviceError> {
        self.frame.load(&self.page, 0, part)
    }

    fn store(&mut self, _frame: u32, part: Range<u64>) -> Result<(), DeviceError> {
        self.frame.store(&self.page, 0, part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_byte_never_goes_by_dma() {
        assert_eq!(by_dma(&(0..4096)), Some(0..4095));
        assert_eq!(by_dma(&(8..16)), Some(8..16));
        assert_eq!(by_dma(&(4088..4096)), Some(4088..4095));
        assert_eq!(by_dma(&(4095..4096)), None);
    }
}
