//! The generation header: one page in the vault (`driver/state`) that names the content of device memory.
//!
//! The pager compares the generation at every login. The same number means "your pages are where you left them"; another one
//! means that the memory is new and everything in it is lost. So the number is drawn when memory is created, is written
//! once, and lives exactly as long as the memory.
//!
//! ```text
//!   magic u64 @0 | version u64 @8 | generation u64 @16 | frame_count u64 @24
//! ```

use std::os::fd::AsFd;
use std::sync::Arc;

use uhmm_ipc::message::{Fd, TraceId};
use uhmm_kernel_hook::memfd;
use uhmm_kernel_hook::{HookError, PAGE_SIZE, Prot, Window};

use crate::device::MemoryOrigin;

/// Vault name of the header.
pub const STATE_NAME: &str = "driver/state";
const MAGIC: u64 = u64::from_le_bytes(*b"uhmm-drv");
const VERSION: u64 = 1;

/// Header of the memory in use.
#[derive(Debug)]
pub(crate) struct Generation {
    /// Names the content.
    pub(crate) number: u64,
    /// For the vault.
    pub(crate) fd: Fd,
}

impl Generation {
    /// The kept header if it speaks of this memory, or a new one. Adopted memory without a header of its size is of unknown
    /// content: a new generation, so that the pager gives up its pages instead of trusting them.
    pub(crate) fn settle(kept: Option<Fd>, origin: MemoryOrigin, frame_count: u32) -> Result<Self, HookError> {
        if origin == MemoryOrigin::Adopted
            && let Some(fd) = kept
            && let Some(number) = read(&fd, frame_count)?
        {
            return Ok(Self { number, fd });
        }
        // Not a secret, only unlike every other; 0 stays free for "never seen".
        let number = TraceId::fresh().0;
        let fd: Fd = Arc::new(memfd::create_sealed("uhmm-driver-state", PAGE_SIZE)?);
        let window = Window::map(fd.as_fd(), 0, PAGE_SIZE, Prot::ReadWrite)?;
        window.store_u64(8, VERSION)?;
        window.store_u64(16, number)?;
        window.store_u64(24, u64::from(frame_count))?;
        window.store_u64(0, MAGIC)?;
        Ok(Self { number, fd })
    }
}

fn read(fd: &Fd, frame_count: u32) -> Result<Option<u64>, HookError> {
    let window = Window::map(fd.as_fd(), 0, PAGE_SIZE, Prot::ReadWrite)?;
    let valid = window.load_u64(0)? == MAGIC
        && window.load_u64(8)? == VERSION
        && window.load_u64(24)? == u64::from(frame_count);
    Ok(valid.then_some(window.load_u64(16)?).filter(|number| *number != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generation_lives_as_long_as_the_memory() -> Result<(), HookError> {
        let first = Generation::settle(None, MemoryOrigin::Created, 100)?;
        let adopted = Generation::settle(Some(first.fd.clone()), MemoryOrigin::Adopted, 100)?;
        assert_eq!(first.number, adopted.number);
        let recreated = Generation::settle(Some(first.fd.clone()), MemoryOrigin::Created, 100)?;
        assert_ne!(first.number, recreated.number, "new memory is a new generation");
        Ok(())
    }

    #[test]
    fn a_header_of_other_memory_is_not_trusted() -> Result<(), HookError> {
        let first = Generation::settle(None, MemoryOrigin::Created, 100)?;
        let resized = Generation::settle(Some(first.fd.clone()), MemoryOrigin::Adopted, 101)?;
        assert_ne!(first.number, resized.number);
        let blank: Fd = Arc::new(memfd::create_sealed("uhmm-test", PAGE_SIZE)?);
        let fresh = Generation::settle(Some(blank), MemoryOrigin::Adopted, 100)?;
        assert_ne!(fresh.number, 0);
        Ok(())
    }
}
