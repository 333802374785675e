//! Memory as programs use it, for programs that test uhmm: mapped in every way that Linux knows, cut, moved and protected, behind
//! an interface that stays sound whatever is done to it.
//!
//! A [`ProgramMemory`] knows which of its pages it still owns. Pages that were unmapped, or moved to another value by
//! [`ProgramMemory::remap`], are refused from then on. An access that the program itself has forbidden (mprotect) or that the pager
//! has poisoned ends the process with a signal, as it does in any program.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::HookError;
use crate::own_memory;
use crate::range::{AddrRange, PAGE_SIZE, aligned};
use crate::window::{Placement, map_raw};

const HUGE_BYTES: u64 = 2 << 20;
const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
const RESERVE: libc::c_int = PRIVATE | libc::MAP_NORESERVE;
/// Of 2 MiB, whatever the machine's default is.
const HUGETLB: libc::c_int = libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;

/// What a program tells the kernel about its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgramAdvice {
    /// Drop content (private) or page table entries (shared).
    DontNeed,
    /// Content may be dropped when memory is short.
    Free,
    /// Punch a hole into the file below.
    Remove,
    /// Prefer huge pages.
    HugePage,
    /// Use base pages only.
    NoHugePage,
    /// Make one huge page of it now.
    Collapse,
    /// Make every page writable now.
    PopulateWrite,
    /// Whoever touches it gets SIGSEGV; content is dropped (kernel 6.13 and newer).
    GuardInstall,
    /// And not any more.
    GuardRemove,
    /// Leave it out of core dumps; like the next ones it splits a mapping and does nothing else to it.
    DontDump,
    /// Read ahead.
    Sequential,
    /// Let the kernel merge pages of equal content.
    Mergeable,
    /// Forked children do not have it.
    DontFork,
    /// Forked children find it empty.
    WipeOnFork,
}

impl ProgramAdvice {
    fn code(self) -> (&'static str, libc::c_int) {
        match self {
            Self::DontNeed => ("madvise(DONTNEED)", libc::MADV_DONTNEED),
            Self::Free => ("madvise(FREE)", libc::MADV_FREE),
            Self::Remove => ("madvise(REMOVE)", libc::MADV_REMOVE),
            Self::HugePage => ("madvise(HUGEPAGE)", libc::MADV_HUGEPAGE),
            Self::NoHugePage => ("madvise(NOHUGEPAGE)", libc::MADV_NOHUGEPAGE),
            Self::Collapse => ("madvise(COLLAPSE)", libc::MADV_COLLAPSE),
            Self::PopulateWrite => ("madvise(POPULATE_WRITE)", libc::MADV_POPULATE_WRITE),
            Self::GuardInstall => ("madvise(GUARD_INSTALL)", own_memory::GUARD_INSTALL),
            Self::GuardRemove => ("madvise(GUARD_REMOVE)", own_memory::GUARD_REMOVE),
            Self::DontDump => ("madvise(DONTDUMP)", libc::MADV_DONTDUMP),
            Self::Sequential => ("madvise(SEQUENTIAL)", libc::MADV_SEQUENTIAL),
            Self::Mergeable => ("madvise(MERGEABLE)", libc::MADV_MERGEABLE),
            Self::DontFork => ("madvise(DONTFORK)", libc::MADV_DONTFORK),
            Self::WipeOnFork => ("madvise(WIPEONFORK)", 18),
        }
    }
}

/// See the module head.
#[derive(Debug)]
pub struct ProgramMemory {
    base: NonNull<u8>,
    len: u64,
    /// Pages that are still this value's.
    owned: Box<[AtomicBool]>,
}

// SAFETY: the mapping belongs to the process; accesses are volatile or atomic, and the kernel serialises what changes mappings.
unsafe impl Send for ProgramMemory {}
// SAFETY: as above; a page that one thread unmaps while another one reads it is the program's own race, and ends in a signal.
unsafe impl Sync for ProgramMemory {}

impl ProgramMemory {
    pub(crate) fn take(base: NonNull<u8>, len: u64) -> Self {
        let owned = (0..len.div_ceil(PAGE_SIZE)).map(|_| AtomicBool::new(true)).collect();
        Self { base, len, owned }
    }

    fn map(
        len: u64,
        flags: libc::c_int,
        prot: libc::c_int,
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result<Self, HookError> {
        aligned("length", len)?;
        map_raw(Placement::Anywhere, len, prot, flags, file).map(|base| Self::take(base, len))
    }

    /// Private anonymous memory.
    ///
    /// # Errors
    /// `Call`, `Unaligned`; so for all makers.
    pub fn private(len: u64) -> Result<Self, HookError> {
        Self::map(len, PRIVATE, READ_WRITE, None)
    }

    /// The same, at a multiple of 2 MiB.
    ///
    /// # Errors
    /// As [`Self::private`].
    pub fn private_aligned(len: u64) -> Result<Self, HookError> {
        let reserved = Self::map(len + HUGE_BYTES, RESERVE, libc::PROT_NONE, None)?;
        let head = reserved.addr().next_multiple_of(HUGE_BYTES) - reserved.addr();
        // SAFETY: head < HUGE_BYTES, so the aligned part lies inside the reservation.
        let base = unsafe { reserved.base.add(head as usize) };
        map_raw(Placement::Over(base), len, READ_WRITE, PRIVATE, None)?;
        reserved.give_up(head, len);
        Ok(Self::take(base, len))
    }

    /// Shared anonymous memory.
    ///
    /// # Errors
    /// As [`Self::private`].
    pub fn shared(len: u64) -> Result<Self, HookError> {
        Self::map(len, libc::MAP_SHARED | libc::MAP_ANONYMOUS, READ_WRITE, None)
    }

    /// Private memory of reserved huge pages of 2 MiB. Only whole ones can be unmapped or moved later.
    ///
    /// # Errors
    /// As [`Self::private`]; ENOMEM when none are reserved.
    pub fn hugetlb(len: u64) -> Result<Self, HookError> {
        aligned_huge(len)?;
        Self::map(len, PRIVATE | HUGETLB, READ_WRITE, None)
    }

    /// Shared memory of reserved huge pages of 2 MiB.
    ///
    /// # Errors
    /// As [`Self::hugetlb`].
    pub fn hugetlb_shared(len: u64) -> Result<Self, HookError> {
        aligned_huge(len)?;
        Self::map(len, libc::MAP_SHARED | libc::MAP_ANONYMOUS | HUGETLB, READ_WRITE, None)
    }

    /// Shared mapping of a file.
    ///
    /// # Errors
    /// As [`Self::private`].
    pub fn file_shared(file: BorrowedFd<'_>, offset: u64, len: u64, writable: bool) -> Result<Self, HookError> {
        let prot = if writable { READ_WRITE } else { libc::PROT_READ };
        Self::map(len, libc::MAP_SHARED, prot, Some((file, offset)))
    }

    /// Private mapping of a file.
    ///
    /// # Errors
    /// As [`Self::private`].
    pub fn file_private(file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<Self, HookError> {
        Self::map(len, libc::MAP_PRIVATE, READ_WRITE, Some((file, offset)))
    }

    /// First address.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.base.as_ptr().expose_provenance() as u64
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Always false.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn pages(&self, off: u64, len: u64) -> &[AtomicBool] {
        &self.owned[(off / PAGE_SIZE) as usize..(off + len).div_ceil(PAGE_SIZE) as usize]
    }

    /// The address of `len` bytes that are all this value's.
    fn at(&self, off: u64, len: u64) -> Result<*mut u8, HookError> {
        let outside = HookError::OutOfWindow { off, len, window_len: self.len };
        if off.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(outside);
        }
        if len > 0 && !self.pages(off, len).iter().all(|page| page.load(Ordering::Acquire)) {
            return Err(outside);
        }
        // SAFETY: inside the mapping, by the check above.
        Ok(unsafe { self.base.as_ptr().add(off as usize) })
    }

    fn part(&self, off: u64, len: u64) -> Result<(*mut libc::c_void, AddrRange), HookError> {
        aligned("offset", off)?;
        aligned("length", len)?;
        let place = self.at(off, len)?;
        Ok((place.cast(), AddrRange { start: self.addr() + off, len }))
    }

    fn set_owned(&self, off: u64, len: u64, owned: bool) {
        self.pages(off, len).iter().for_each(|page| page.store(owned, Ordering::Release));
    }

    fn disown(&self, off: u64, len: u64) {
        self.set_owned(off, len, false);
    }

    fn word(&self, off: u64) -> Result<&AtomicU64, HookError> {
        aligned_word(off)?;
        let place = self.at(off, 8)?;
        // SAFETY: mapped, aligned, and every access to words of this value is atomic.
        Ok(unsafe { AtomicU64::from_ptr(place.cast()) })
    }

    /// Loads a word.
    ///
    /// # Errors
    /// `OutOfWindow` outside, or where the pages are not this value's any more; `Unaligned`. So for all accesses.
    pub fn load_u64(&self, off: u64) -> Result<u64, HookError> {
        Ok(self.word(off)?.load(Ordering::SeqCst))
    }

    /// Stores a word.
    ///
    /// # Errors
    /// As [`Self::load_u64`].
    pub fn store_u64(&self, off: u64, value: u64) -> Result<(), HookError> {
        self.word(off)?.store(value, Ordering::SeqCst);
        Ok(())
    }

    /// Adds atomically, wrapping; returns the value before.
    ///
    /// # Errors
    /// As [`Self::load_u64`].
    pub fn fetch_add_u64(&self, off: u64, value: u64) -> Result<u64, HookError> {
        Ok(self.word(off)?.fetch_add(value, Ordering::SeqCst))
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// As [`Self::load_u64`].
    pub fn read(&self, off: u64, into: &mut [u8]) -> Result<(), HookError> {
        let place = self.at(off, into.len() as u64)?;
        // SAFETY: mapped for that length; the bytes are plain data that others may change meanwhile, copied once.
        unsafe { std::ptr::copy(place, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// As [`Self::load_u64`].
    pub fn write(&self, off: u64, from: &[u8]) -> Result<(), HookError> {
        let place = self.at(off, from.len() as u64)?;
        // SAFETY: mapped for that length, and nobody holds references into it.
        unsafe { std::ptr::copy(from.as_ptr(), place, from.len()) };
        Ok(())
    }

    /// munmap of a part.
    ///
    /// # Errors
    /// `Call`; so for everything below.
    pub fn unmap(&self, off: u64, len: u64) -> Result<(), HookError> {
        let (place, range) = self.part(off, len)?;
        self.disown(off, len);
        // SAFETY: the pages were this value's and are marked as gone.
        if unsafe { libc::munmap(place, len as usize) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        self.set_owned(off, len, true); // A refused munmap has unmapped nothing.
        Err(HookError::on("munmap", range, error, ""))
    }

    /// mprotect of a part.
    ///
    /// # Errors
    /// As [`Self::unmap`].
    pub fn protect(&self, off: u64, len: u64, read: bool, write: bool) -> Result<(), HookError> {
        let (place, range) = self.part(off, len)?;
        let prot = if read { libc::PROT_READ } else { 0 } | if write { libc::PROT_WRITE } else { 0 };
        // SAFETY: our own pages; an access that is not allowed any more ends in a signal, not in undefined behaviour of Rust.
        if unsafe { libc::mprotect(place, len as usize, prot) } == 0 {
            return Ok(());
        }
        Err(HookError::on("mprotect", range, io::Error::last_os_error(), ""))
    }

    /// madvise of a part.
    ///
    /// # Errors
    /// As [`Self::unmap`].
    pub fn advise(&self, off: u64, len: u64, advice: ProgramAdvice) -> Result<(), HookError> {
        let (place, range) = self.part(off, len)?;
        let (call, code) = advice.code();
        // SAFETY: our own pages, which hold plain data only.
        if unsafe { libc::madvise(place, len as usize, code) } == 0 {
            return Ok(());
        }
        Err(HookError::on(call, range, io::Error::last_os_error(), ""))
    }

    /// [`own_memory::access_faults`] for a byte.
    ///
    /// # Errors
    /// As [`Self::load_u64`], and its own.
    pub fn access_faults(&self, off: u64, write: bool) -> Result<bool, HookError> {
        self.at(off, 1)?;
        own_memory::access_faults(self.addr() + off, write)
    }

    /// mlock of a part.
    ///
    /// # Errors
    /// As [`Self::unmap`]; ENOMEM over the limit.
    pub fn lock(&self, off: u64, len: u64) -> Result<(), HookError> {
        let (place, range) = self.part(off, len)?;
        // SAFETY: locking changes no byte.
        if unsafe { libc::mlock(place, len as usize) } == 0 {
            return Ok(());
        }
        Err(HookError::on("mlock", range, io::Error::last_os_error(), "Raise the limit (ulimit -l)"))
    }

    /// mremap of a part: to some other place, or over a part of another value, which loses those pages. With `keep_old`
    /// (MREMAP_DONTUNMAP) the old pages stay mapped and empty.
    ///
    /// # Errors
    /// As [`Self::unmap`]. The old pages stay this value's then; those at the new place may be lost.
    pub fn remap(
        &self,
        off: u64,
        len: u64,
        keep_old: bool,
        over: Option<(&ProgramMemory, u64)>,
    ) -> Result<ProgramMemory, HookError> {
        let (place, range) = self.part(off, len)?;
        if over.is_none() && !keep_old {
            // Asked for the same length at no place of our choice, the kernel leaves the pages where they are. The new place has
            // the same offset in 2 MiB, so that huge pages stay huge.
            let place = Self::map(len.saturating_add(HUGE_BYTES), RESERVE, libc::PROT_NONE, None)?;
            let head = range.start.wrapping_sub(place.addr()) % HUGE_BYTES;
            return self.remap(off, len, false, Some((&place, head)));
        }
        let target = over.map(|(memory, at)| memory.part(at, len)).transpose()?;
        let mut flags = libc::MREMAP_MAYMOVE | if keep_old { libc::MREMAP_DONTUNMAP } else { 0 };
        let mut new_place = std::ptr::null_mut();
        if let (Some((memory, at)), Some((fixed, _))) = (over, target) {
            memory.disown(at, len);
            flags |= libc::MREMAP_FIXED;
            new_place = fixed;
        }
        if !keep_old {
            self.disown(off, len);
        }
        // SAFETY: the old pages are this value's; the new place is the kernel's choice, or was the other value's and is no more.
        let base = unsafe { libc::mremap(place, len as usize, len as usize, flags, new_place) };
        if base == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            self.set_owned(off, len, true); // The kernel moves all or nothing.
            return Err(HookError::on("mremap", range, error, ""));
        }
        let base =
            NonNull::new(base.cast()).ok_or(HookError::Strange { call: "mremap", detail: "address zero".into() })?;
        Ok(Self::take(base, len))
    }

    /// remap_file_pages: one page of shared memory shows another page of the file below. Linux tells no userfaultfd.
    ///
    /// # Errors
    /// As [`Self::unmap`].
    pub fn remap_file_page(&self, off: u64, file_page: u64) -> Result<(), HookError> {
        let (place, range) = self.part(off, PAGE_SIZE)?;
        // SAFETY: our own mapping, which holds plain data only; it stays mapped.
        let answer =
            unsafe { libc::syscall(libc::SYS_remap_file_pages, place, PAGE_SIZE as usize, 0, file_page as usize, 0) };
        if answer == 0 {
            return Ok(());
        }
        Err(HookError::on("remap_file_pages", range, io::Error::last_os_error(), ""))
    }

    /// Fresh private memory at addresses that [`Self::unmap`] has left free.
    ///
    /// # Errors
    /// As [`Self::unmap`]; `Claimed`-like EEXIST when somebody else has taken the place.
    pub fn map_fresh(&self, off: u64, len: u64) -> Result<ProgramMemory, HookError> {
        aligned("offset", off)?;
        aligned("length", len)?;
        if off.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(HookError::OutOfWindow { off, len, window_len: self.len });
        }
        let addr = self.addr() + off;
        map_raw(Placement::FreeAt(addr), len, READ_WRITE, PRIVATE, None).map(|base| Self::take(base, len))
    }

    /// Ends the value and leaves the mapping as it is.
    pub(crate) fn leave(self) -> NonNull<u8> {
        self.disown(0, self.len);
        self.base
    }

    /// Drops the value without the part in the middle, which is another value's now.
    fn give_up(self, off: u64, len: u64) {
        self.disown(off, len);
    }
}

fn aligned_huge(len: u64) -> Result<(), HookError> {
    if len.is_multiple_of(HUGE_BYTES) {
        return Ok(());
    }
    Err(HookError::Unaligned { what: "length", value: len, align: HUGE_BYTES })
}

fn aligned_word(off: u64) -> Result<(), HookError> {
    if off.is_multiple_of(8) { Ok(()) } else { Err(HookError::Unaligned { what: "offset", value: off, align: 8 }) }
}

impl Drop for ProgramMemory {
    fn drop(&mut self) {
        let mut page = 0;
        while page < self.owned.len() {
            let run = self.owned[page..].iter().take_while(|owned| owned.load(Ordering::Acquire)).count();
            if run > 0 {
                // SAFETY: these pages are this value's, and nobody holds references into them.
                unsafe { libc::munmap(self.base.as_ptr().add(page * 4096).cast(), run * 4096) };
            }
            page += run.max(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: u64 = PAGE_SIZE;

    #[test]
    fn what_was_unmapped_is_refused_and_the_rest_stays() {
        let memory = ProgramMemory::private(4 * P).unwrap();
        (0..4).for_each(|page| memory.store_u64(page * P, page + 1).unwrap());
        memory.unmap(P, 2 * P).unwrap();
        assert!(memory.load_u64(P).is_err() && memory.read(P - 8, &mut [0; 16]).is_err());
        assert_eq!((memory.load_u64(0).unwrap(), memory.load_u64(3 * P).unwrap()), (1, 4));
        let fresh = memory.map_fresh(P, P).unwrap();
        assert_eq!((fresh.addr(), fresh.load_u64(0).unwrap()), (memory.addr() + P, 0));
    }

    #[test]
    fn what_the_kernel_refuses_changes_nothing() {
        let memory = ProgramMemory::private(4 * P).unwrap();
        memory.store_u64(0, 1).unwrap();
        let onto_itself = memory.remap(0, 2 * P, false, Some((&memory, P))).unwrap_err();
        assert_eq!(onto_itself.errno(), Some(libc::EINVAL), "{onto_itself}");
        assert_eq!((memory.load_u64(0).unwrap(), memory.load_u64(P).unwrap()), (1, 0));
        assert!(matches!(memory.map_fresh(4 * P, P), Err(HookError::OutOfWindow { .. })));
        assert!(matches!(memory.map_fresh(u64::MAX - P + 1, P), Err(HookError::OutOfWindow { .. })));
        assert_eq!(memory.map_fresh(0, P).unwrap_err().errno(), Some(libc::EEXIST), "the place is taken");
    }

    #[test]
    fn moved_pages_belong_to_the_new_value() {
        let memory = ProgramMemory::private(4 * P).unwrap();
        memory.write(P, &[5; 4096]).unwrap();
        let moved = memory.remap(P, P, false, None).unwrap();
        assert!(memory.load_u64(P).is_err());
        assert_ne!(moved.addr(), memory.addr() + P, "it really is elsewhere");
        assert_eq!(moved.addr() % HUGE_BYTES, (memory.addr() + P) % HUGE_BYTES);
        assert_eq!(moved.load_u64(0).unwrap(), 0x0505_0505_0505_0505);
        let target = ProgramMemory::private(2 * P).unwrap();
        let there = moved.remap(0, P, false, Some((&target, P))).unwrap();
        assert_eq!(there.addr(), target.addr() + P);
        assert!(target.load_u64(P).is_err() && target.load_u64(0).is_ok());
        let copy = there.remap(0, P, true, None).unwrap();
        assert_eq!((there.load_u64(0).unwrap(), copy.load_u64(8).unwrap()), (0, 0x0505_0505_0505_0505));
    }

    #[test]
    fn aligned_memory_starts_at_a_huge_page() {
        let memory = ProgramMemory::private_aligned(3 * HUGE_BYTES).unwrap();
        assert_eq!(memory.addr() % HUGE_BYTES, 0);
        memory.store_u64(3 * HUGE_BYTES - 8, 1).unwrap();
        assert!(memory.store_u64(3 * HUGE_BYTES, 1).is_err());
    }

    #[test]
    fn shared_and_file_memory_show_what_others_write() {
        let file = crate::memfd::create_sealed("uhmm-program-test", P).unwrap();
        let shared = ProgramMemory::file_shared(std::os::fd::AsFd::as_fd(&file), 0, P, true).unwrap();
        let private = ProgramMemory::file_private(std::os::fd::AsFd::as_fd(&file), 0, P).unwrap();
        shared.store_u64(0, 7).unwrap();
        assert_eq!(private.load_u64(0).unwrap(), 7);
        private.store_u64(0, 8).unwrap();
        assert_eq!(shared.load_u64(0).unwrap(), 7);
    }
}
