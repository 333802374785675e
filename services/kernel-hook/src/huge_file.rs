//! Writing to files of huge pages (hugetlbfs), which know no write(2): through a mapping that nobody touches but the kernel. An
//! access of the CPU to it would raise SIGBUS where the file has become shorter, or where a hole is to be filled and no huge page is
//! left, and whoever shares the file decides about both. process_vm_writev on ourselves answers EFAULT instead.
//!
//! ```text
//!   bytes --process_vm_writev(own pid)--> mapping (NORESERVE) --> page of the file --> whoever maps it sees them
//! ```
//! The mapping keeps no page: it reserves none, and what is cut off or punched out of the file leaves it.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use crate::error::HookError;
use crate::memfd;
use crate::range::AddrRange;
use crate::window::{Placement, map_raw};

/// A part of a file of huge pages that can be written. Clone the `Arc` around it; dropping it unmaps.
#[derive(Debug)]
pub struct HugeFile {
    base: NonNull<u8>,
    mapped_bytes: u64,
    /// In the mapping, which begins and ends with whole huge pages.
    begin: u64,
    len: u64,
}

// SAFETY: nothing here reads or writes the mapping but the kernel, on behalf of `write`, which any thread may call.
unsafe impl Send for HugeFile {}
// SAFETY: as above.
unsafe impl Sync for HugeFile {}

impl HugeFile {
    /// `len` bytes of a file from `off` on, both in bytes of any alignment; `None` when it does not consist of huge pages. The file may be
    /// shorter, and does not get longer.
    ///
    /// # Errors
    /// `Wraps`, `Empty`; `Call`: EACCES for a file that was not opened for reading and writing.
    pub fn open(file: BorrowedFd<'_>, off: u64, len: u64) -> Result<Option<Self>, HookError> {
        let Some(page_bytes) = memfd::huge_page_bytes(file)? else { return Ok(None) };
        if len == 0 {
            return Err(HookError::Empty { start: off });
        }
        let first = off - off % page_bytes;
        let end = off.checked_add(len).and_then(|end| end.checked_next_multiple_of(page_bytes));
        let mapped_bytes = end.ok_or(HookError::Wraps { start: off, len })? - first;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let base = map_raw(Placement::Anywhere, mapped_bytes, libc::PROT_READ, flags, Some((file, first)))?;
        let mapped = Self { base, mapped_bytes, begin: off - first, len };
        // Not in mmap: hugetlbfs makes a file as long as a mapping of it that is writable from the start.
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the mapping is this value's.
        if unsafe { libc::mprotect(base.as_ptr().cast(), mapped_bytes as usize, rights) } == 0 {
            return Ok(Some(mapped));
        }
        let hint = "Open the file for reading and writing";
        Err(HookError::on("mprotect", mapped.range(), io::Error::last_os_error(), hint))
    }

    fn range(&self) -> AddrRange {
        AddrRange { start: self.base.addr().get() as u64, len: self.mapped_bytes }
    }

    /// Writes bytes at an offset of the part. Fills a hole of the file with a huge page, as a store to a mapping would.
    ///
    /// # Errors
    /// `OutOfWindow`; `Call`: EFAULT behind the end of the file, or where no huge page is left (a part may have been written).
    pub fn write(&self, off: u64, from: &[u8]) -> Result<(), HookError> {
        let len = from.len() as u64;
        if off.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(HookError::OutOfWindow { off, len, window_len: self.len });
        }
        let mut done = 0;
        while done < from.len() {
            let local = libc::iovec { iov_base: from[done..].as_ptr().cast_mut().cast(), iov_len: from.len() - done };
            let place = (self.begin + off) as usize + done;
            // SAFETY: begin + off + len lies inside the mapping, by the check above.
            let at = unsafe { self.base.as_ptr().add(place) };
            let remote = libc::iovec { iov_base: at.cast(), iov_len: from.len() - done };
            // SAFETY: the kernel reads `from` and writes into this value's own mapping, which nobody holds a reference into.
            let rc = unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0) };
            match rc {
                1.. => done += rc as usize,
                0 => {
                    return Err(HookError::Strange { call: "process_vm_writev", detail: "nothing was written".into() });
                }
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        let range = AddrRange { start: at.addr() as u64, len: len - done as u64 };
                        return Err(HookError::on("process_vm_writev", range, error, ""));
                    }
                }
            }
        }
        Ok(())
    }
}

impl Drop for HugeFile {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's alone.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.mapped_bytes as usize) };
    }
}
