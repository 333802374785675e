//! VFIO's ioctls on the descriptors that a driver holds: an IOMMU address space and the device.
//!
//! ```text
//!   Container (type 1)    \
//!                          map, unmap, adopt_map, iova_ranges      device: region, read, write, irq_count, set_irqs, reset
//!   Ioas (iommufd)        /
//! ```
//! All of it works the same on descriptors that were just opened and on such that another process opened and died with.
//!
//! Safe although a device writes to memory: a mapping pins the *pages*, not the addresses, and comes from a [`crate::MappedBytes`], whose
//! contract is that others may write to its bytes at any time. When the window is unmapped, its pages stay pinned until the
//! DMA mapping goes, so the device can never reach memory that came to lie at the same addresses.

mod abi;
mod container;
mod device;
mod ioas;
mod iommufd_abi;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::error::HookError;

pub use container::Container;
pub use device::{Irq, Region, VfioDevice};
pub use ioas::Ioas;

/// A descriptor of one's own for what another crate has opened.
///
/// # Errors
/// `Call` when the process is out of descriptors, or this is none.
pub fn duplicate(opened: &impl AsRawFd) -> Result<OwnedFd, HookError> {
    // SAFETY: takes a number and touches no memory; a number that is no descriptor is answered with EBADF.
    let fd = unsafe { libc::fcntl(opened.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) };
    if fd < 0 {
        return Err(HookError::failed("fcntl(F_DUPFD_CLOEXEC)", io::Error::last_os_error()));
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
