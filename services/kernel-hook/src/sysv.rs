//! System V shared memory, for programs that test uhmm: what attaches and detaches it tells no userfaultfd.

use std::io;
use std::ptr::NonNull;

use crate::error::HookError;
use crate::program::ProgramMemory;

/// A segment. It goes when the last attachment does.
#[derive(Debug)]
pub struct SysvSegment {
    id: libc::c_int,
    len: u64,
}

fn failed(call: &'static str) -> HookError {
    HookError::hinted(call, io::Error::last_os_error(), "")
}

impl SysvSegment {
    /// An empty segment of `len` bytes.
    ///
    /// # Errors
    /// `Call` (ENOSPC, ENOMEM).
    pub fn new(len: u64) -> Result<Self, HookError> {
        // SAFETY: makes a segment of nobody's.
        let id = unsafe { libc::shmget(libc::IPC_PRIVATE, len as usize, 0o600 | libc::IPC_CREAT) };
        if id < 0 { Err(failed("shmget")) } else { Ok(Self { id, len }) }
    }

    /// shmat at some place.
    ///
    /// # Errors
    /// `Call`.
    pub fn attach(&self) -> Result<ProgramMemory, HookError> {
        // SAFETY: the kernel chooses a free place.
        let base = unsafe { libc::shmat(self.id, std::ptr::null(), 0) };
        self.attached(base)
    }

    /// shmat with SHM_REMAP over all of `memory`, which loses its pages.
    ///
    /// # Errors
    /// `Call`; `OutOfWindow` when the sizes differ.
    pub fn attach_over(&self, memory: ProgramMemory) -> Result<ProgramMemory, HookError> {
        if memory.len() != self.len {
            return Err(HookError::OutOfWindow { off: 0, len: self.len, window_len: memory.len() });
        }
        let place = memory.leave();
        // SAFETY: the place was the other value's, which has given it up.
        let base = unsafe { libc::shmat(self.id, place.as_ptr().cast(), libc::SHM_REMAP) };
        self.attached(base)
    }

    /// shmat where a value that [`detach`] has ended was.
    ///
    /// # Errors
    /// `Call`: EINVAL when somebody else is there by now.
    pub fn attach_at(&self, addr: u64) -> Result<ProgramMemory, HookError> {
        // SAFETY: without SHM_REMAP the kernel refuses a place that is taken.
        let base = unsafe { libc::shmat(self.id, std::ptr::with_exposed_provenance(addr as usize), 0) };
        self.attached(base)
    }

    fn attached(&self, base: *mut libc::c_void) -> Result<ProgramMemory, HookError> {
        match NonNull::new(base.cast::<u8>()) {
            Some(base) if base.as_ptr().addr() != usize::MAX => Ok(ProgramMemory::take(base, self.len)),
            _ => Err(failed("shmat")),
        }
    }
}

impl Drop for SysvSegment {
    fn drop(&mut self) {
        // SAFETY: marks our own segment; its memory stays until the last attachment is gone.
        unsafe { libc::shmctl(self.id, libc::IPC_RMID, std::ptr::null_mut()) };
    }
}

/// shmdt of what [`SysvSegment::attach`] returned.
///
/// # Errors
/// `Call` (EINVAL for anything else).
pub fn detach(memory: ProgramMemory) -> Result<(), HookError> {
    let place = memory.leave();
    // SAFETY: the value has given the place up, so nobody refers into it.
    if unsafe { libc::shmdt(place.as_ptr().cast()) } == 0 { Ok(()) } else { Err(failed("shmdt")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_detached_and_another_one_takes_its_place() {
        let (one, other) = (SysvSegment::new(8192).unwrap(), SysvSegment::new(8192).unwrap());
        let first = one.attach().unwrap();
        first.store_u64(4096, 7).unwrap();
        let addr = first.addr();
        detach(first).unwrap();
        let second = other.attach_at(addr).unwrap();
        assert_eq!((second.addr(), second.load_u64(4096).unwrap()), (addr, 0));
        let third = one.attach_over(second).unwrap();
        assert_eq!(third.load_u64(4096).unwrap(), 7);
    }
}
