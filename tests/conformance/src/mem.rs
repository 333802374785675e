//! A program's own memory, as cases use it: made in every way that Linux knows, filled, cut, moved, and compared byte for byte.
//!
//! A thin layer over the kernel hook's [`ProgramMemory`], or over a region that the SDK has allocated: patterns, words of failure,
//! and offsets. An access to a part that a case
//! has unmapped or protected ends the case's process with a signal, which the runner reports.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;

use uhmm_kernel_hook::own_memory::{self, RangeAdvice};
use uhmm_kernel_hook::pagemap::{Categories, open_own_pagemap, scan};
use uhmm_kernel_hook::program::ProgramMemory;
use uhmm_kernel_hook::{AddrRange, HookError};
use uhmm_sdk::Region;

use crate::case::{CaseResult, During, Failure, not_applicable};
use crate::pattern;

pub(crate) use uhmm_kernel_hook::program::ProgramAdvice as MemAdvice;

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;
/// Compared at once.
const CHUNK: u64 = 1 << 20;

/// What mremap does with the old place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Remap {
    /// It is unmapped.
    Move,
    /// It stays mapped, without its pages (MREMAP_DONTUNMAP).
    KeepOld,
}

/// See the module head.
pub(crate) struct Mem {
    memory: Memory,
    private: bool,
}

enum Memory {
    Own(ProgramMemory),
    Allocated(Box<Region>),
}

/// The same call on the one or the other.
macro_rules! on {
    ($memory:expr, $name:ident($($arg:expr),*)) => {
        match &$memory {
            Memory::Own(memory) => memory.$name($($arg),*),
            Memory::Allocated(region) => region.bytes().$name($($arg),*),
        }
    };
}

impl Mem {
    fn of(memory: Result<ProgramMemory, HookError>, private: bool, what: &str) -> CaseResult<Self> {
        Ok(Self { memory: Memory::Own(memory.during(what)?), private })
    }

    /// Memory that the SDK has allocated: managed from its first byte on, at addresses that are the SDK's.
    pub(crate) fn allocated(region: Region) -> Self {
        Self { memory: Memory::Allocated(Box::new(region)), private: false }
    }

    /// The memory of the program's own that some steps need.
    fn own(&self, step: &str) -> CaseResult<&ProgramMemory> {
        match &self.memory {
            Memory::Own(memory) => Ok(memory),
            Memory::Allocated(_) => not_applicable!(
                "The CPU reaches only memory that uhmm has allocated on a device, and its addresses are uhmm's: {step} is not done there"
            ),
        }
    }

    /// Private anonymous memory.
    pub(crate) fn private(len: u64) -> CaseResult<Self> {
        Self::of(ProgramMemory::private(len), true, "mmap(private)")
    }

    /// The same, of 4 KiB pages only.
    pub(crate) fn small(len: u64) -> CaseResult<Self> {
        let mem = Self::of(ProgramMemory::private_aligned(len), true, "mmap(private)")?;
        mem.advise(0, len, MemAdvice::NoHugePage)?;
        Ok(mem)
    }

    /// The same, aligned to 2 MiB and of huge pages where the kernel has them.
    pub(crate) fn huge(len: u64) -> CaseResult<Self> {
        let mem = Self::of(ProgramMemory::private_aligned(len), true, "mmap(private)")?;
        mem.advise(0, len, MemAdvice::HugePage)?;
        Ok(mem)
    }

    /// Shared anonymous memory.
    pub(crate) fn shared(len: u64) -> CaseResult<Self> {
        Self::of(ProgramMemory::shared(len), false, "mmap(shared)")
    }

    /// hugetlb memory.
    pub(crate) fn hugetlb(len: u64, shared: bool) -> Result<Self, HookError> {
        let memory = if shared { ProgramMemory::hugetlb_shared(len)? } else { ProgramMemory::hugetlb(len)? };
        Ok(Self { memory: Memory::Own(memory), private: !shared })
    }

    /// Shared mapping of a file.
    pub(crate) fn file_shared(file: BorrowedFd<'_>, len: u64, writable: bool) -> CaseResult<Self> {
        Self::of(ProgramMemory::file_shared(file, 0, len, writable), false, "mmap(file, shared)")
    }

    /// The same of a part, writable.
    pub(crate) fn file_part(file: BorrowedFd<'_>, offset: u64, len: u64) -> CaseResult<Self> {
        Self::of(ProgramMemory::file_shared(file, offset, len, true), false, "mmap(file, shared)")
    }

    /// Private mapping of a file.
    pub(crate) fn file_private(file: BorrowedFd<'_>, len: u64) -> CaseResult<Self> {
        Self::of(ProgramMemory::file_private(file, 0, len), true, "mmap(file, private)")
    }

    pub(crate) fn addr(&self) -> u64 {
        on!(self.memory, addr())
    }

    pub(crate) fn len(&self) -> u64 {
        on!(self.memory, len())
    }

    /// Copy-on-write memory, which a device owns when it has it.
    pub(crate) fn is_private(&self) -> bool {
        self.private
    }

    // ---- the CPU's accesses

    pub(crate) fn load(&self, off: u64) -> CaseResult<u64> {
        Ok(on!(self.memory, load_u64(off))?)
    }

    pub(crate) fn store(&self, off: u64, value: u64) -> CaseResult {
        Ok(on!(self.memory, store_u64(off, value))?)
    }

    /// Adds atomically; the value before.
    pub(crate) fn fetch_add(&self, off: u64, value: u64) -> CaseResult<u64> {
        Ok(match &self.memory {
            Memory::Own(memory) => memory.fetch_add_u64(off, value)?,
            Memory::Allocated(region) => region.bytes().atomic_u64(off)?.fetch_add(value, Ordering::SeqCst),
        })
    }

    pub(crate) fn write(&self, off: u64, bytes: &[u8]) -> CaseResult {
        Ok(on!(self.memory, write(off, bytes))?)
    }

    pub(crate) fn bytes(&self, off: u64, len: u64) -> CaseResult<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        // Page by page: the C library copies large pieces in either direction, as their addresses happen to lie, and cases count faults.
        for (at, page) in (off..).step_by(PAGE as usize).zip(bytes.chunks_mut(PAGE as usize)) {
            on!(self.memory, read(at, page))?;
        }
        Ok(bytes)
    }

    /// Writes the pattern everywhere.
    pub(crate) fn fill(&self, seed: u64) -> CaseResult {
        self.fill_at(0, self.len(), seed)
    }

    /// Writes the pattern to a part of the whole.
    pub(crate) fn fill_at(&self, off: u64, len: u64, seed: u64) -> CaseResult {
        chunks(off, len).try_for_each(|(at, count)| self.write(at, &pattern::bytes(seed, at, count)))
    }

    /// The CPU finds the pattern.
    pub(crate) fn expect(&self, off: u64, len: u64, seed: u64) -> CaseResult {
        self.expect_of(off, len, 0, seed)
    }

    /// [`Mem::expect`] of everything.
    pub(crate) fn expect_all(&self, seed: u64) -> CaseResult {
        self.expect(0, self.len(), seed)
    }

    /// This memory was moved from `from` bytes into a patterned mapping: the CPU finds that part of the pattern.
    pub(crate) fn expect_moved(&self, from: u64, seed: u64) -> CaseResult {
        self.expect_of(0, self.len(), from, seed)
    }

    fn expect_of(&self, off: u64, len: u64, from: u64, seed: u64) -> CaseResult {
        for (at, count) in chunks(off, len) {
            let (found, expected) = (self.bytes(at, count)?, pattern::bytes(seed, from + at, count));
            if let Some(difference) = pattern::difference(&found, &expected, at) {
                return Err(Failure::Failed(format!("The CPU sees other bytes: {difference}")));
            }
        }
        Ok(())
    }

    /// The CPU finds zeros.
    pub(crate) fn expect_zero(&self, off: u64, len: u64) -> CaseResult {
        for (at, count) in chunks(off, len) {
            if let Some(difference) = pattern::difference(&self.bytes(at, count)?, &vec![0; count as usize], at) {
                return Err(Failure::Failed(format!("The CPU does not see zeros: {difference}")));
            }
        }
        Ok(())
    }

    // ---- the address space

    pub(crate) fn unmap(&self, off: u64, len: u64) -> CaseResult {
        self.own("munmap")?.unmap(off, len).during("munmap")
    }

    /// mprotect behind the SDK's back.
    pub(crate) fn protect(&self, off: u64, len: u64, read: bool, write: bool) -> CaseResult {
        self.own("mprotect behind the SDK's back")?.protect(off, len, read, write).during("mprotect")
    }

    pub(crate) fn advise(&self, off: u64, len: u64, advice: MemAdvice) -> CaseResult {
        if matches!((&self.memory, advice), (Memory::Allocated(_), MemAdvice::HugePage | MemAdvice::NoHugePage)) {
            // Says something about pages that allocated memory does not have.
            return Ok(());
        }
        let guard = match advice {
            MemAdvice::GuardInstall => Some(RangeAdvice::GuardInstall),
            MemAdvice::GuardRemove => Some(RangeAdvice::GuardRemove),
            _ => None,
        };
        if let (Memory::Allocated(_), Some(advice)) = (&self.memory, guard) {
            let range = AddrRange { start: self.addr() + off, len };
            return own_memory::advise(range, advice).during("madvise(guard)");
        }
        self.own("madvise")?.advise(off, len, advice).during("madvise")
    }

    pub(crate) fn access_faults(&self, off: u64, write: bool) -> CaseResult<bool> {
        own_memory::access_faults(self.addr() + off, write).during("Probe an access")
    }

    /// A page of shared memory shows another page of what is below it.
    pub(crate) fn remap_file_page(&self, off: u64, file_page: u64) -> CaseResult {
        self.own("remap_file_pages")?.remap_file_page(off, file_page).during("remap_file_pages")
    }

    pub(crate) fn lock(&self, off: u64, len: u64) -> CaseResult {
        self.own("mlock")?.lock(off, len).during("mlock")
    }

    fn moved(&self, memory: Result<ProgramMemory, HookError>) -> CaseResult<Self> {
        Self::of(memory, self.private, "mremap")
    }

    /// Moves a part to wherever the kernel likes.
    pub(crate) fn remap(&self, off: u64, len: u64, how: Remap) -> CaseResult<Self> {
        self.moved(self.own("mremap")?.remap(off, len, how == Remap::KeepOld, None))
    }

    /// Moves a part over `target` at an offset, which takes its place.
    pub(crate) fn remap_over(&self, off: u64, len: u64, how: Remap, target: &Mem, at: u64) -> CaseResult<Self> {
        let target = target.own("mremap")?;
        self.moved(self.own("mremap")?.remap(off, len, how == Remap::KeepOld, Some((target, at))))
    }

    /// Fresh private memory in a hole that `unmap` has left.
    pub(crate) fn map_fresh(&self, off: u64, len: u64) -> CaseResult<Self> {
        Self::of(self.own("mmap over a hole")?.map_fresh(off, len), true, "mmap(fixed)")
    }

    // ---- what the kernel says about it

    fn scanned(&self, off: u64, len: u64, categories: Categories) -> CaseResult<u64> {
        let pagemap = open_own_pagemap()?;
        let range = AddrRange { start: self.addr() + off, len };
        let runs = scan(pagemap.as_fd(), range, categories)?;
        let fitting = runs.iter().filter(|run| run.categories.contains(categories));
        Ok(fitting.map(|run| (run.end - run.start) / PAGE).sum())
    }

    /// Pages of the range that are present in the CPU's page table.
    pub(crate) fn present_pages(&self, off: u64, len: u64) -> CaseResult<u64> {
        self.scanned(off, len, Categories::PRESENT)
    }

    /// Pages of the range that are mapped as part of a 2 MiB page.
    pub(crate) fn huge_mapped_pages(&self, off: u64, len: u64) -> CaseResult<u64> {
        self.scanned(off, len, Categories::HUGE)
    }
}

fn chunks(off: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = off + len;
    (0..len.div_ceil(CHUNK)).map(move |index| (off + index * CHUNK, (end - off - index * CHUNK).min(CHUNK)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_byte_anywhere_is_found() {
        let mem = Mem::private(3 * CHUNK + PAGE).unwrap();
        mem.fill(5).unwrap();
        mem.expect_all(5).unwrap();
        assert!(mem.expect_all(6).is_err());
        let off = 2 * CHUNK + 7 * PAGE + 8;
        mem.store(off, mem.load(off).unwrap() ^ 1).unwrap();
        let Err(Failure::Failed(why)) = mem.expect_all(5) else { panic!("a wrong byte was not found") };
        assert!(why.contains(&format!("{off:#x}")), "{why}");
        assert!(mem.expect_zero(0, PAGE).is_err());
        mem.advise(0, PAGE, MemAdvice::DontNeed).unwrap();
        mem.expect_zero(0, PAGE).unwrap();
    }

    #[test]
    fn a_moved_part_keeps_its_place_in_the_pattern() {
        let mem = Mem::small(16 * PAGE).unwrap();
        mem.fill(1).unwrap();
        let moved = mem.remap(8 * PAGE, 4 * PAGE, Remap::Move).unwrap();
        moved.expect_moved(8 * PAGE, 1).unwrap();
        assert!(moved.expect_moved(0, 1).is_err());
        assert!(mem.load(8 * PAGE).is_err());
        mem.expect(12 * PAGE, 4 * PAGE, 1).unwrap();
        assert_eq!(mem.present_pages(0, 8 * PAGE).unwrap(), 8);
    }
}
