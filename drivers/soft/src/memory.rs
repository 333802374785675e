//! Device memory of the soft device: a sealed memfd, kept by the vault, so that it survives the driver as VRAM survives a
//! driver on real hardware.

use std::os::fd::AsFd;
use std::sync::Arc;

use uhmm_driver_kit::{CopyEngine, DeviceError, DeviceMemory, Frames, MemoryOrigin, PAGE_BYTES, Staging};
use uhmm_ipc::message::{Aperture, Fd};
use uhmm_kernel_hook::{Prot, Window, memfd};

/// Vault name of the memory.
pub const VRAM_NAME: &str = "driver/vram";

/// The memory, mapped.
#[derive(Clone, Debug)]
pub struct SoftMemory {
    fd: Fd,
    window: Arc<Window>,
    frame_count: u32,
    aperture: bool,
}

impl SoftMemory {
    /// Takes the memory of the last incarnation if it has the planned size, or makes new memory of zeroes. `populate`: new memory
    /// is allocated now instead of at first use, so that a full host refuses the device and not a job.
    pub fn open(
        kept: Vec<(String, Fd)>,
        memory_bytes: u64,
        populate: bool,
        aperture: bool,
    ) -> Result<(Self, MemoryOrigin), DeviceError> {
        let frame_count = u32::try_from(memory_bytes / PAGE_BYTES)?;
        if frame_count == 0 || !memory_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(format!("Device memory of {memory_bytes} bytes is no whole number of pages").into());
        }
        let adopted = kept.into_iter().find(|(name, _)| name == VRAM_NAME).map(|(_, fd)| fd);
        let adopted = adopted.filter(|fd| match memfd::check_sealed(fd.as_fd(), memory_bytes) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "Kept device memory does not fit the plan: its content is given up");
                false
            }
        });
        let (fd, origin) = match adopted {
            Some(fd) => (fd, MemoryOrigin::Adopted),
            None => {
                let fd: Fd = Arc::new(memfd::create_sealed("uhmm-vram", memory_bytes)?);
                if populate {
                    memfd::allocate(fd.as_fd(), 0, memory_bytes)?;
                }
                (fd, MemoryOrigin::Created)
            }
        };
        let window = Arc::new(Window::map(fd.as_fd(), 0, memory_bytes, Prot::ReadWrite)?);
        Ok((Self { fd, window, frame_count, aperture }, origin))
    }

    /// What the device's threads access, frame 0 at offset 0.
    pub fn window(&self) -> Arc<Window> {
        self.window.clone()
    }
}

impl DeviceMemory for SoftMemory {
    fn frame_count(&self) -> u32 {
        self.frame_count
    }

    fn aperture(&self) -> Option<Aperture> {
        self.aperture.then(|| Aperture { fd: self.fd.clone(), offset_bytes: 0 })
    }

    fn kept(&self) -> Vec<(String, Fd)> {
        vec![(VRAM_NAME.to_owned(), self.fd.clone())]
    }
}

/// The soft device's DMA engine: memcpy.
#[derive(Debug)]
pub struct SoftEngine {
    window: Arc<Window>,
}

impl SoftEngine {
    /// Works on this memory.
    pub fn new(memory: &SoftMemory) -> Self {
        Self { window: memory.window() }
    }
}

fn bytes_of(page: u32) -> u64 {
    u64::from(page) * PAGE_BYTES
}

impl CopyEngine for SoftEngine {
    /// The processor reaches it as it is.
    fn attach(&mut self, _: &Staging) -> Result<(), DeviceError> {
        Ok(())
    }

    fn copy_in(&mut self, staging: &Staging, staging_page: u32, frames: Frames) -> Result<(), DeviceError> {
        let (from, to) = (bytes_of(staging_page), bytes_of(frames.first));
        Ok(staging.window.copy_to(from, &self.window, to, bytes_of(frames.count))?)
    }

    fn copy_out(&mut self, frames: Frames, staging: &Staging, staging_page: u32) -> Result<(), DeviceError> {
        let (from, to) = (bytes_of(frames.first), bytes_of(staging_page));
        Ok(self.window.copy_to(from, &staging.window, to, bytes_of(frames.count))?)
    }

    fn scrub(&mut self, frames: Frames) -> Result<(), DeviceError> {
        Ok(self.window.fill(bytes_of(frames.first), bytes_of(frames.count), 0)?)
    }
}

#[cfg(test)]
mod tests {
    use uhmm_driver_kit::StagingUse;

    use super::*;

    #[test]
    fn the_next_incarnation_finds_the_bytes_of_the_last() -> Result<(), DeviceError> {
        let (first, origin) = SoftMemory::open(vec![], 1 << 20, true, true)?;
        assert_eq!((origin, first.frame_count()), (MemoryOrigin::Created, 256));
        first.window().store_u64(8192, 4711)?;
        let (second, origin) = SoftMemory::open(first.kept(), 1 << 20, true, true)?;
        assert_eq!(origin, MemoryOrigin::Adopted);
        assert_eq!(second.window().load_u64(8192)?, 4711);
        Ok(())
    }

    #[test]
    fn memory_of_another_size_is_not_adopted() -> Result<(), DeviceError> {
        let (first, _) = SoftMemory::open(vec![], 1 << 20, false, true)?;
        let (second, origin) = SoftMemory::open(first.kept(), 2 << 20, false, false)?;
        assert_eq!((origin, second.frame_count()), (MemoryOrigin::Created, 512));
        assert!(second.aperture().is_none() && first.aperture().is_some());
        assert!(SoftMemory::open(vec![], 5000, false, true).is_err());
        Ok(())
    }

    #[test]
    fn the_engine_moves_and_scrubs_whole_frames() -> Result<(), DeviceError> {
        let (memory, _) = SoftMemory::open(vec![], 64 * PAGE_BYTES, false, false)?;
        let staging = Staging::create(StagingUse::Pager, 8 * PAGE_BYTES)?;
        staging.window.fill(2 * PAGE_BYTES, 2 * PAGE_BYTES, 0xab)?;
        let mut engine = SoftEngine::new(&memory);
        let frames = Frames { first: 30, count: 2 };
        engine.copy_in(&staging, 2, frames)?;
        assert_eq!(memory.window().load_u8(32 * PAGE_BYTES - 1)?, 0xab);
        assert_eq!(memory.window().load_u8(32 * PAGE_BYTES)?, 0);
        engine.copy_out(frames, &staging, 5)?;
        assert_eq!(staging.window.load_u8(7 * PAGE_BYTES - 1)?, 0xab);
        engine.scrub(frames)?;
        assert_eq!(memory.window().load_u8(30 * PAGE_BYTES)?, 0);
        assert!(engine.scrub(Frames { first: 63, count: 2 }).is_err());
        Ok(())
    }
}
