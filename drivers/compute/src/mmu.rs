//! The MMU of one device thread: virtual addresses to frames (or to system pages in place), one page at a time.
//!
//! ```text
//!   access(addr): region (cached) -> gate: enter -> load entry -> touch (accessed, dirty) -> copy the bytes -> leave
//!                                                      |
//!                     invalid or not writable ---------+--> leave -> suspend until resumed -> forget the region -> again
//! ```
//! A gate section covers one access inside one page, at most 4 KiB, and nothing in it can block (but the read or write of a file that
//! stays in place, whose pages never change their owner): so whoever revokes a page never
//! waits long for this thread. (Where a frame has to come through a port, the access takes as long as the device does, and a device that is
//! late is asked anew in a section of its own.) The entry is
//! loaded anew for every access; only the region is remembered.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use uhmm_driver_kit::{AddressSpaces, FilePages, MappedRegion, PAGE_BYTES, SystemPages};
use uhmm_ipc::message::{ErrorCode, WireError};
use uhmm_ipc::shared::gate::Slot;
use uhmm_kernel_hook::{HookError, MappedBytes, Window};

use crate::frames::{FrameError, Late, Right, UnitFrames};
use crate::kernels::{DeviceView, KernelResult, invalid, page_pieces};

/// Where a device thread waits for its faults.
pub trait Suspend {
    /// Reports the fault and sleeps. `Ok`: touch the page again.
    fn suspend(&self, addr: u64, write: bool) -> KernelResult<()>;

    /// Why the job is to end, if it is cancelled.
    fn cancelled(&self) -> WireError;
}

/// See the module head.
pub struct Mmu<'a> {
    space: u64,
    frames: &'a mut UnitFrames,
    spaces: &'a AddressSpaces,
    slot: &'a mut Slot,
    suspend: &'a dyn Suspend,
    cancel: &'a AtomicBool,
    region: Option<Arc<MappedRegion>>,
    /// For pages of files.
    scratch: Option<Window>,
    fault_count: u64,
}

impl std::fmt::Debug for Mmu<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mmu(space {}, {} faults)", self.space, self.fault_count)
    }
}

impl<'a> Mmu<'a> {
    /// For one job. `cancel` is looked at before every access.
    pub fn new(
        space: u64,
        frames: &'a mut UnitFrames,
        spaces: &'a AddressSpaces,
        slot: &'a mut Slot,
        suspend: &'a dyn Suspend,
        cancel: &'a AtomicBool,
    ) -> Self {
        Self { space, frames, spaces, slot, suspend, cancel, region: None, scratch: None, fault_count: 0 }
    }

    /// Faults so far.
    pub fn fault_count(&self) -> u64 {
        self.fault_count
    }

    /// One access of `len` bytes inside one page: `act` gets the memory and the offset of `addr` in it, and must not block.
    fn access<R>(
        &mut self,
        addr: u64,
        len: usize,
        right: Right,
        mut act: impl FnMut(&MappedBytes, u64) -> Result<R, HookError>,
    ) -> KernelResult<R> {
        let mut late_since = None;
        loop {
            if self.cancel.load(Ordering::Acquire) {
                return Err(self.suspend.cancelled());
            }
            match self.try_access(addr, len, right, &mut act) {
                Some(Err(AccessError::Frame(error)))
                    if error.late().is_some_and(|late| waits(late, &mut late_since)) => {}
                Some(result) => return result.map_err(|failure| failure.at(addr)),
                None => {
                    // The region may have been detached: look it up again after the fault.
                    self.region = None;
                    self.fault_count += 1;
                    self.suspend.suspend(addr, right != Right::Read)?;
                }
            }
        }
    }

    /// `None`: a fault.
    fn try_access<R>(
        &mut self,
        addr: u64,
        len: usize,
        right: Right,
        act: &mut impl FnMut(&MappedBytes, u64) -> Result<R, HookError>,
    ) -> Option<Result<R, AccessError>> {
        if self.region.as_ref().is_none_or(|region| region.page_of(addr).is_none()) {
            self.region = self.spaces.find(self.space, addr);
        }
        let region = self.region.as_deref()?;
        let page = region.page_of(addr)?;
        let _inside = self.slot.enter();
        let pte = region.table.touch(page, region.table.load(page), right != Right::Read)?;
        let offset = addr % PAGE_BYTES;
        Some(match pte.frame_number() {
            Some(frame) => self.frames.access(frame, offset, len, right, act).map_err(AccessError::from),
            None => match &region.system {
                SystemPages::Mapped(window) => act(window, page * PAGE_BYTES + offset).map_err(AccessError::from),
                SystemPages::File(file) => {
                    let place = FilePlace { file, at: page * PAGE_BYTES + offset, offset, len };
                    place.access(&mut self.scratch, right, act)
                }
                SystemPages::Private => return None,
            },
        })
    }
}

/// A device that is late is asked once more.
fn waits(late: &Late, since: &mut Option<Instant>) -> bool {
    // The first try has taken its time already; that is not counted.
    since.get_or_insert_with(Instant::now).elapsed() < late.patience
}

/// Why bytes behind a mapped address were out of reach.
#[derive(Debug, thiserror::Error)]
enum AccessError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("System memory cannot be accessed: {0}")]
    System(#[from] HookError),
    #[error("It lies behind the end of its file")]
    BehindEnd,
    #[error("Its file failed: {0}")]
    File(std::io::Error),
    #[error("It is a page of a file that stays in place, where nothing can be changed atomically")]
    NotAtomic,
}

impl AccessError {
    fn at(&self, addr: u64) -> WireError {
        let code = match self {
            Self::File(error) if error.kind() == ErrorKind::StorageFull => ErrorCode::NoMemory,
            Self::File(error)
                if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) =>
            {
                ErrorCode::Permission
            }
            Self::Frame(_) | Self::System(_) | Self::File(_) => ErrorCode::Io,
            Self::BehindEnd => ErrorCode::Fault,
            Self::NotAtomic => ErrorCode::Invalid,
        };
        WireError::new(code, format!("Device access of address {addr:#x} failed: {self}"))
    }
}

impl From<std::io::Error> for AccessError {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == ErrorKind::UnexpectedEof { Self::BehindEnd } else { Self::File(error) }
    }
}

/// Bytes of a page that is read and written through its file.
struct FilePlace<'a> {
    file: &'a FilePages,
    /// In the region.
    at: u64,
    /// In the page.
    offset: u64,
    len: usize,
}

impl FilePlace<'_> {
    /// Exactly these bytes, by way of a scratch page that `act` sees at the same offset.
    fn access<R>(
        &self,
        scratch: &mut Option<Window>,
        right: Right,
        act: &mut impl FnMut(&MappedBytes, u64) -> Result<R, HookError>,
    ) -> Result<R, AccessError> {
        let page = match scratch {
            Some(page) => page,
            none => none.insert(Window::anonymous(PAGE_BYTES)?),
        };
        let mut bytes = [0; PAGE_BYTES as usize];
        let bytes = &mut bytes[..self.len];
        match right {
            Right::Atomic => Err(AccessError::NotAtomic),
            Right::Read => {
                self.file.read(self.at, bytes)?;
                page.write(self.offset, bytes)?;
                Ok(act(page, self.offset)?)
            }
            Right::Write => {
                let result = act(page, self.offset)?;
                page.read(self.offset, bytes)?;
                self.file.write(self.at, bytes)?;
                Ok(result)
            }
        }
    }
}

impl DeviceView for Mmu<'_> {
    fn read(&mut self, addr: u64, out: &mut [u8]) -> KernelResult<()> {
        let mut rest = out;
        for (at, len) in page_pieces(addr, rest.len() as u64)? {
            let (piece, later) = rest.split_at_mut(len);
            self.access(at, len, Right::Read, |bytes, offset| bytes.read(offset, piece))?;
            rest = later;
        }
        Ok(())
    }

    fn write(&mut self, addr: u64, bytes: &[u8]) -> KernelResult<()> {
        let mut rest = bytes;
        for (at, len) in page_pieces(addr, bytes.len() as u64)? {
            let (piece, later) = rest.split_at(len);
            self.access(at, len, Right::Write, |bytes, offset| bytes.write(offset, piece))?;
            rest = later;
        }
        Ok(())
    }

    fn load_u64(&mut self, addr: u64) -> KernelResult<u64> {
        if addr.is_multiple_of(8) {
            return self.access(addr, 8, Right::Read, |bytes, offset| bytes.load_u64(offset));
        }
        let mut bytes = [0; 8];
        self.read(addr, &mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn store_u64(&mut self, addr: u64, value: u64) -> KernelResult<()> {
        if addr.is_multiple_of(8) {
            return self.access(addr, 8, Right::Write, |bytes, offset| bytes.store_u64(offset, value));
        }
        self.write(addr, &value.to_ne_bytes())
    }

    fn fetch_add_u64(&mut self, addr: u64, value: u64) -> KernelResult<u64> {
        if !addr.is_multiple_of(8) {
            return invalid(format!("Atomic access at {addr:#x}: the address must be a multiple of 8"));
        }
        self.access(addr, 8, Right::Atomic, |bytes, offset| {
            Ok(bytes.atomic_u64(offset)?.fetch_add(value, Ordering::SeqCst))
        })
    }
}

#[cfg(test)]
mod tests;
