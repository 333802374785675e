//! A client's view of a region: the shared mapping that the pager fills, empties and protects behind the program's back.

use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use crate::bytes::{Advice, MappedBytes};
use crate::error::HookError;
use crate::memfd;
use crate::range::{PAGE_SIZE, aligned};
use crate::window::{Placement, map_raw};

/// Regions of this size and more start on such a boundary, so that huge pages can be mapped.
const HUGE_BYTES: u64 = 2 << 20;

/// The mapping of a region's memfd in the client. Made by the SDK, which then registers its range with a userfaultfd.
///
/// Left out of forked children: they would read zeros from migrated pages (see `allow_fork`). Dropping it unmaps the range,
/// which sends an UNMAP event if the userfaultfd asked for it. After a crash of the pager an access waits until the next one.
#[derive(Debug)]
pub struct ManagedMapping {
    bytes: MappedBytes,
}

impl ManagedMapping {
    /// Maps all `len` bytes of a region's memfd, at `hint` if that is free, else where the kernel likes (aligned to 2 MiB if
    /// the region is that large).
    ///
    /// # Errors
    /// `Unaligned`, `Empty`, `OutOfWindow` when the file is shorter, `Call` when the kernel refuses.
    pub fn map(memfd: BorrowedFd<'_>, len: u64, hint: Option<u64>) -> Result<Self, HookError> {
        aligned("region length", len)?;
        if len == 0 {
            return Err(HookError::Empty { start: hint.unwrap_or(0) });
        }
        let file_len = memfd::len(memfd)?;
        if len > file_len {
            return Err(HookError::OutOfWindow { off: 0, len, window_len: file_len });
        }
        let wished = hint.filter(|addr| addr.is_multiple_of(PAGE_SIZE)).and_then(|addr| {
            let placed = Placement::FreeAt(addr);
            map_raw(placed, len, READ_WRITE, libc::MAP_SHARED, Some((memfd, 0))).ok()
        });
        let base = match wished {
            Some(base) => base,
            None if len >= HUGE_BYTES => map_aligned(memfd, len)?,
            None => map_raw(Placement::Anywhere, len, READ_WRITE, libc::MAP_SHARED, Some((memfd, 0)))?,
        };
        // SAFETY: a fresh mapping of that length, readable and writable, owned by nobody else.
        let mapping = Self { bytes: unsafe { MappedBytes::from_raw(base, len, true) } };
        mapping.bytes.advise(0, len, Advice::DontFork)?;
        Ok(mapping)
    }

    /// Lets forked children inherit the mapping; only right when the pager was granted EVENT_FORK and registers the child.
    ///
    /// # Errors
    /// `Call` when the kernel refuses.
    pub fn allow_fork(&self) -> Result<(), HookError> {
        self.bytes.advise(0, self.bytes.len(), Advice::DoFork)
    }

    /// Keeps the mapping for the rest of the process: for regions whose addresses the program has spread. Returns its address.
    pub fn leak(self) -> u64 {
        let addr = self.bytes.addr();
        std::mem::forget(self);
        addr
    }
}

impl Deref for ManagedMapping {
    type Target = MappedBytes;

    fn deref(&self) -> &MappedBytes {
        &self.bytes
    }
}

const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Reserves `len` and a huge page more, maps the file over the aligned part and gives the rest back.
fn map_aligned(memfd: BorrowedFd<'_>, len: u64) -> Result<NonNull<u8>, HookError> {
    let reserved_len = len.checked_add(HUGE_BYTES).ok_or(HookError::Wraps { start: 0, len })?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let reserved = map_raw(Placement::Anywhere, reserved_len, libc::PROT_NONE, flags, None)?;
    let head = (reserved.addr().get() as u64).next_multiple_of(HUGE_BYTES) - reserved.addr().get() as u64;
    // SAFETY: head < HUGE_BYTES, so base..base+len lies inside the reservation.
    let base = unsafe { reserved.add(head as usize) };
    let mapped = map_raw(Placement::Over(base), len, READ_WRITE, libc::MAP_SHARED, Some((memfd, 0)));
    let tail = HUGE_BYTES - head;
    // SAFETY: head and tail are the unused ends of our own reservation; on failure the middle still is part of it.
    unsafe {
        if mapped.is_err() {
            libc::munmap(reserved.as_ptr().cast(), reserved_len as usize);
        } else {
            if head > 0 {
                libc::munmap(reserved.as_ptr().cast(), head as usize);
            }
            if tail > 0 {
                libc::munmap(base.add(len as usize).as_ptr().cast(), tail as usize);
            }
        }
    }
    mapped
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn large_regions_are_aligned_for_huge_pages() {
        let len = 3 * HUGE_BYTES + PAGE_SIZE;
        let fd = memfd::create_sealed("uhmm-region-test", len).unwrap();
        let mapping = ManagedMapping::map(fd.as_fd(), len, None).unwrap();
        assert_eq!(mapping.addr() % HUGE_BYTES, 0);
        mapping.store_u64(len - 8, 77).unwrap();
        assert_eq!(mapping.load_u64(len - 8).unwrap(), 77);
    }

    #[test]
    fn a_hint_is_taken_when_free_and_never_replaces_a_mapping() {
        let fd = memfd::create_sealed("uhmm-region-test", PAGE_SIZE).unwrap();
        let first = ManagedMapping::map(fd.as_fd(), PAGE_SIZE, Some(0x5000_0000_0000)).unwrap();
        assert_eq!(first.addr(), 0x5000_0000_0000);
        let second = ManagedMapping::map(fd.as_fd(), PAGE_SIZE, Some(0x5000_0000_0000)).unwrap();
        assert_ne!(second.addr(), first.addr());
        first.store_u8(9, 9).unwrap();
        assert_eq!(second.load_u8(9).unwrap(), 9);
    }

    #[test]
    fn map_refuses_a_file_that_is_too_short() {
        let fd = memfd::create_sealed("uhmm-region-test", PAGE_SIZE).unwrap();
        assert!(matches!(
            ManagedMapping::map(fd.as_fd(), 2 * PAGE_SIZE, None),
            Err(HookError::OutOfWindow { window_len: PAGE_SIZE, .. })
        ));
    }
}
