//! The accelerator's memory as frames, and who copies to and from them.
//!
//! ```text
//!   | frame 0 | frame 1 | ... | frame n-1 | mark |      the last page says whose content it is
//! ```
//! A model that was started again has other memory than the one before, though it looks the same. So the last page bears a random
//! mark, and the vault has the same page. It is written after everything else: an incarnation that dies while it clears the memory leaves none.

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use uhmm_compute::FramePort;
use uhmm_driver_kit::{CopyEngine, DeviceError, DeviceMemory, Frames, MemoryOrigin, PAGE_BYTES, Staging, StagingUse};
use uhmm_ipc::message::{Aperture, Fd, TraceId};
use uhmm_kernel_hook::{Window, memfd};
use uhmm_pci::{DmaMapping, DmaMemory, DmaRight, RemovalWatch};

use crate::engine::{Accel, Command};

const MARK_NAME: &str = "driver/accel-mark";
const MARK_MAGIC: u64 = u64::from_le_bytes(*b"uhmmaccl");
/// Zeroed by one command, which has a deadline.
const ZERO_BYTES: u64 = 16 << 20;

/// Frames.
#[derive(Debug)]
pub struct AccelMemory {
    accel: Arc<Accel>,
    frame_count: u32,
    mark: Fd,
    _removal: RemovalWatch,
}

impl AccelMemory {
    /// Takes at most `limit_bytes`. `kept`: what the last incarnation had in the vault.
    ///
    /// # Errors
    /// The device does not answer, or has no memory.
    pub fn open(
        accel: Arc<Accel>,
        kept: &[(String, Fd)],
        limit_bytes: u64,
        removal: RemovalWatch,
    ) -> Result<(Self, MemoryOrigin), DeviceError> {
        let mark_at = accel.memory_bytes().checked_sub(PAGE_BYTES).ok_or("The accelerator has no memory")?;
        let frame_count = u32::try_from(mark_at.min(limit_bytes) / PAGE_BYTES)?;
        let scratch = DmaMemory::create("uhmm-accel-mark", PAGE_BYTES)?;
        let page = accel.device().map_dma(&scratch, DmaRight::ReadWrite, u64::MAX)?;
        accel.run(Command::CopyOut { iova: page.iova(0), offset: mark_at, len: PAGE_BYTES })?;
        let old = kept.iter().find(|(name, _)| name == MARK_NAME).map(|(_, fd)| fd.clone());
        if let Some(mark) = old {
            memfd::check_sealed(mark.as_fd(), PAGE_BYTES)?;
            let known = DmaMemory::adopt(mark.clone(), PAGE_BYTES)?;
            if scratch.window.first_difference(0, &known.window, 0, PAGE_BYTES)?.is_none() {
                return Ok((Self { accel, frame_count, mark, _removal: removal }, MemoryOrigin::Adopted));
            }
            tracing::warn!("Device memory does not bear the mark of the last incarnation: its content is given up");
        }
        accel.run(Command::Zero { offset: mark_at, len: PAGE_BYTES })?;
        zero(&accel, 0, u64::from(frame_count) * PAGE_BYTES)?;
        scratch.window.fill(0, PAGE_BYTES, 0)?;
        scratch.window.store_u64(0, MARK_MAGIC)?;
        scratch.window.store_u64(8, TraceId::fresh().0)?;
        accel.run(Command::CopyIn { iova: page.iova(0), offset: mark_at, len: PAGE_BYTES })?;
        Ok((Self { accel, frame_count, mark: scratch.fd, _removal: removal }, MemoryOrigin::Created))
    }
}

impl DeviceMemory for AccelMemory {
    fn frame_count(&self) -> u32 {
        self.frame_count
    }

    fn aperture(&self) -> Option<Aperture> {
        None
    }

    fn kept(&self) -> Vec<(String, Fd)> {
        let mut kept = self.accel.device().kept();
        kept.push((MARK_NAME.to_owned(), self.mark.clone()));
        kept
    }
}

fn zero(accel: &Accel, mut offset: u64, mut len: u64) -> Result<(), DeviceError> {
    while len > 0 {
        let part = len.min(ZERO_BYTES);
        accel.run(Command::Zero { offset, len: part })?;
        (offset, len) = (offset + part, len - part);
    }
    Ok(())
}

/// The kit's copies, straight between staging areas and device memory.
#[derive(Debug)]
pub struct AccelCopies {
    accel: Arc<Accel>,
    areas: Vec<(StagingUse, DmaMapping)>,
}

impl AccelCopies {
    /// No area yet.
    pub fn new(accel: Arc<Accel>) -> Self {
        Self { accel, areas: Vec::new() }
    }

    fn iova(&self, staging: &Staging, page: u32) -> Result<u64, DeviceError> {
        let area = self.areas.iter().find(|(used_by, _)| *used_by == staging.used_by);
        let (_, mapping) = area.ok_or("A copy names a staging area that was not attached")?;
        Ok(mapping.iova(u64::from(page) * PAGE_BYTES))
    }
}

impl CopyEngine for AccelCopies {
    fn attach(&mut self, staging: &Staging) -> Result<(), DeviceError> {
        self.areas.retain(|(used_by, _)| *used_by != staging.used_by);
        let memory = DmaMemory { fd: staging.fd.clone(), offset_bytes: 0, window: staging.window.clone() };
        let mapping = self.accel.device().map_dma(&memory, DmaRight::ReadWrite, u64::MAX)?;
        self.areas.push((staging.used_by, mapping));
        Ok(())
    }

    fn copy_in(&mut self, staging: &Staging, staging_page: u32, frames: Frames) -> Result<(), DeviceError> {
        let iova = self.iova(staging, staging_page)?;
        let (offset, len) = bytes(frames);
        Ok(self.accel.run(Command::CopyIn { iova, offset, len })?)
    }

    fn copy_out(&mut self, frames: Frames, staging: &Staging, staging_page: u32) -> Result<(), DeviceError> {
        let iova = self.iova(staging, staging_page)?;
        let (offset, len) = bytes(frames);
        Ok(self.accel.run(Command::CopyOut { iova, offset, len })?)
    }

    fn scrub(&mut self, frames: Frames) -> Result<(), DeviceError> {
        let (offset, len) = bytes(frames);
        zero(&self.accel, offset, len)
    }
}

fn bytes(frames: Frames) -> (u64, u64) {
    (u64::from(frames.first) * PAGE_BYTES, u64::from(frames.count) * PAGE_BYTES)
}

/// A compute unit's page, mapped for the device. The device copies exactly the bytes that are asked for.
#[derive(Debug)]
pub struct AccelPort {
    accel: Arc<Accel>,
    page: DmaMapping,
}

impl AccelPort {
    /// With a new page.
    ///
    /// # Errors
    /// Out of memory, descriptors or I/O addresses.
    pub fn new(accel: Arc<Accel>) -> Result<Self, DeviceError> {
        let page = DmaMemory::create("uhmm-accel-unit", PAGE_BYTES)?;
        let page = accel.device().map_dma(&page, DmaRight::ReadWrite, u64::MAX)?;
        Ok(Self { accel, page })
    }

    fn place(&self, frame: u32, part: &Range<u64>) -> (u64, u64, u64) {
        (self.page.iova(part.start), u64::from(frame) * PAGE_BYTES + part.start, part.end - part.start)
    }
}

impl FramePort for AccelPort {
    fn page(&self) -> &Window {
        self.page.window()
    }

    fn load(&mut self, frame: u32, part: Range<u64>) -> Result<(), DeviceError> {
        let (iova, offset, len) = self.place(frame, &part);
        Ok(self.accel.run(Command::CopyOut { iova, offset, len })?)
    }

    fn store(&mut self, frame: u32, part: Range<u64>) -> Result<(), DeviceError> {
        let (iova, offset, len) = self.place(frame, &part);
        Ok(self.accel.run(Command::CopyIn { iova, offset, len })?)
    }
}
