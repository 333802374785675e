//! What the pages of a process are, without touching them: present, zero page, huge, written, swapped, of a file.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use crate::abi;
use crate::error::HookError;
use crate::memfd;
use crate::range::{AddrRange, PAGE_SIZE};

bitflags::bitflags! {
    /// Kinds of a page; the names are the kernel's (`PAGE_IS_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Categories: u64 {
        /// Its range is registered for asynchronous write protection.
        const WPALLOWED = 1 << 0;
        /// Written since it was last protected.
        const WRITTEN = 1 << 1;
        /// Of a file or shared memory.
        const FILE = 1 << 2;
        /// In memory and mapped.
        const PRESENT = 1 << 3;
        /// In swap.
        const SWAPPED = 1 << 4;
        /// The kernel's shared page of zeros.
        const PFNZERO = 1 << 5;
        /// Part of a huge page that is mapped as one.
        const HUGE = 1 << 6;
        /// Marked by the soft-dirty mechanism.
        const SOFT_DIRTY = 1 << 7;
        /// A guard (MADV_GUARD_INSTALL): a touch is a SIGSEGV. Kernels before 6.15 do not know the kind (EINVAL).
        const GUARD = 1 << 8;
    }
}

/// Neighbouring pages of the same kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// First byte.
    pub start: u64,
    /// Byte after the last.
    pub end: u64,
    /// What they are.
    pub categories: Categories,
}

/// How many runs one call of the kernel returns.
const RUN_BATCH: usize = 256;

/// Opens /proc/PID/pagemap for [`scan`].
///
/// # Errors
/// `Call`: ENOENT when the process is gone, EACCES without the right to look at it.
pub fn open_pagemap(pid: u32) -> Result<OwnedFd, HookError> {
    let hint = "Run as the client's user, or as root";
    let file = File::open(format!("/proc/{pid}/pagemap"))
        .map_err(|error| HookError::hinted("open(/proc/PID/pagemap)", error, hint))?;
    Ok(file.into())
}

/// This process's own, for [`scan`]. See [`open_own_maps`](crate::procmap::open_own_maps) for the path.
///
/// # Errors
/// `Call`: ENOENT without /proc.
pub fn open_own_pagemap() -> Result<OwnedFd, HookError> {
    let file = File::open("/proc/thread-self/pagemap")
        .map_err(|error| HookError::hinted("open(/proc/thread-self/pagemap)", error, "Mount /proc"))?;
    Ok(file.into())
}

/// Which pages of a range are in memory and mapped by this process alone: private ones among them are written without a copy.
///
/// # Errors
/// `Call`: ESRCH when the process is gone.
pub fn mapped_alone(pagemap: BorrowedFd<'_>, range: AddrRange) -> Result<Vec<bool>, HookError> {
    const ALONE: u64 = 1 << 56;
    const ENTRY_BYTES: u64 = 8;
    let range = AddrRange::new(range.start, range.len)?;
    let mut bytes = vec![0u8; (range.len / PAGE_SIZE * ENTRY_BYTES) as usize];
    let file = memfd::to_file(pagemap)?;
    file.read_exact_at(&mut bytes, range.start / PAGE_SIZE * ENTRY_BYTES)
        .map_err(|error| HookError::on("read(pagemap)", range, error, ""))?;
    let entry = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |entry, byte| entry << 8 | u64::from(*byte));
    Ok(bytes.chunks_exact(ENTRY_BYTES as usize).map(|bytes| entry(bytes) & ALONE != 0).collect())
}

/// Whether this kernel tells of guards (6.15 and newer). 6.13 and 6.14 have them and do not tell.
#[must_use]
pub fn tells_guards() -> bool {
    static TELLS: OnceLock<bool> = OnceLock::new();
    let ask = || {
        let pagemap = open_own_pagemap()?;
        scan(pagemap.as_fd(), AddrRange { start: PAGE_SIZE, len: PAGE_SIZE }, Categories::GUARD)
    };
    *TELLS.get_or_init(|| ask().is_ok())
}

/// The guards in a range (MADV_GUARD_INSTALL), in order. None, where the kernel cannot say so.
///
/// # Errors
/// As [`scan`].
pub fn guards(pagemap: BorrowedFd<'_>, range: AddrRange) -> Result<Vec<AddrRange>, HookError> {
    if !tells_guards() {
        return Ok(Vec::new());
    }
    let runs = scan(pagemap, range, Categories::GUARD)?;
    Ok(runs.iter().map(|run| AddrRange { start: run.start, len: run.end - run.start }).collect())
}

/// The pages of `range` that have any of the kinds `any_of`, as runs in order; each run tells all kinds asked for.
///
/// # Errors
/// `Call`: ESRCH when the process is gone, ENOTTY on kernels before 6.7.
pub fn scan(pagemap: BorrowedFd<'_>, range: AddrRange, any_of: Categories) -> Result<Vec<PageRun>, HookError> {
    let range = AddrRange::new(range.start, range.len)?;
    let mut runs = Vec::new();
    let mut batch = [abi::PageRegion::default(); RUN_BATCH];
    let mut start = range.start;
    while start < range.end() {
        let mut request = abi::PmScanArg {
            size: size_of::<abi::PmScanArg>() as u64,
            start,
            end: range.end(),
            vec: batch.as_mut_ptr().expose_provenance() as u64,
            vec_len: RUN_BATCH as u64,
            category_anyof_mask: any_of.bits(),
            return_mask: any_of.bits(),
            ..Default::default()
        };
        // SAFETY: the kernel writes at most `vec_len` regions to `batch`, which lives through the call.
        let found = unsafe { abi::PAGEMAP_SCAN.call(pagemap, &mut request) }
            .map_err(|source| HookError::on("PAGEMAP_SCAN", range, source, ""))?;
        for region in &batch[..(found as usize).min(RUN_BATCH)] {
            let categories = Categories::from_bits_truncate(region.categories);
            push_run(&mut runs, PageRun { start: region.start, end: region.end, categories });
        }
        if request.walk_end <= start {
            return Err(HookError::Strange { call: "PAGEMAP_SCAN", detail: format!("no progress at {start:#x}") });
        }
        start = request.walk_end;
    }
    Ok(runs)
}

/// Joins a run that a batch boundary has cut.
fn push_run(runs: &mut Vec<PageRun>, run: PageRun) {
    match runs.last_mut() {
        Some(last) if last.end == run.start && last.categories == run.categories => last.end = run.end,
        _ => runs.push(run),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::window::Window;

    #[test]
    fn a_guard_is_told_where_the_kernel_has_them() {
        let pagemap = open_own_pagemap().unwrap();
        let window = Window::anonymous(2 * 4096).unwrap();
        let place = std::ptr::with_exposed_provenance_mut(window.addr() as usize);
        // SAFETY: the first page of a mapping of our own that nobody refers into.
        let installed = unsafe { libc::madvise(place, 4096, crate::own_memory::GUARD_INSTALL) } == 0;
        let found = guards(pagemap.as_fd(), window.range()).unwrap();
        let first = AddrRange { start: window.addr(), len: PAGE_SIZE };
        assert_eq!(found, if installed && tells_guards() { vec![first] } else { Vec::new() });
        assert!(installed || !tells_guards());
    }

    #[test]
    fn a_private_page_that_was_written_is_mapped_alone_and_a_file_page_is_not() {
        let pagemap = open_own_pagemap().unwrap();
        let window = Window::anonymous(3 * 4096).unwrap();
        window.advise(0, window.len(), crate::bytes::Advice::NoHugePage).unwrap();
        window.store_u8(4096, 1).unwrap();
        assert_eq!(mapped_alone(pagemap.as_fd(), window.range()).unwrap(), [false, true, false]);
    }

    #[test]
    fn scan_finds_touched_pages_only_and_joins_batches() {
        let pagemap = open_own_pagemap().unwrap();
        let window = Window::anonymous(2048 * 4096).unwrap();
        window.advise(0, window.len(), crate::bytes::Advice::NoHugePage).unwrap();
        for page in (0..1400).step_by(2) {
            window.store_u8(page * 4096, 1).unwrap();
        }
        window.fill(1500 * 4096, 500 * 4096, 1).unwrap();
        let runs = scan(pagemap.as_fd(), window.range(), Categories::PRESENT | Categories::PFNZERO).unwrap();
        assert_eq!(runs.len(), 701, "700 single pages and one run");
        let last = runs.last().unwrap();
        assert_eq!((last.start, last.end), (window.addr() + 1500 * 4096, window.addr() + 2000 * 4096));
        assert_eq!(last.categories, Categories::PRESENT);
    }
}
