//! Safe accessors of mapped memory that somebody else may be changing at the same moment.
//!
//! No `&[u8]` over mapped memory is ever formed: single values go through atomics, bulk through raw copies, which run at memcpy
//! speed. A bulk read that races with a writer in another process yields some mix of old and new bytes, as `read(2)` of the
//! same file would; who needs more orders it with the atomics.
//!
//! ```text
//!   use of one mapping:   untyped --atomic_u32/u64--> atomics given out
//!                            \-------Bump::new------> typed (raw writes and atomics refused from then on)
//! ```

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::error::HookError;
use crate::guarded;
use crate::range::{AddrRange, PAGE_SIZE, aligned};

const UNTYPED: u8 = 0;
const ATOMICS: u8 = 1;
const TYPED: u8 = 2;

/// Compare and fill go through a buffer of this size, so that no reference to mapped memory is needed.
const CHUNK_BYTES: usize = 4096;

/// What to tell the kernel about a part of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Drop the page table entries (shared files keep the pages). Sends a REMOVE event on registered ranges.
    DontNeed,
    /// Punch a hole into the shared file below. Sends a REMOVE event on registered ranges.
    Remove,
    /// Make every page readable now; on a registered range this waits for the pager.
    PopulateRead,
    /// Make every page writable now; on a registered range this waits for the pager.
    PopulateWrite,
    /// Prefer huge pages.
    HugePage,
    /// Use base pages only.
    NoHugePage,
    /// Leave the range out of children made by fork.
    DontFork,
    /// Undo `DontFork`.
    DoFork,
    /// Leave the range out of core dumps.
    DontDump,
}

impl Advice {
    fn code(self) -> (&'static str, libc::c_int) {
        match self {
            Self::DontDump => ("madvise(DONTDUMP)", libc::MADV_DONTDUMP),
            Self::DontNeed => ("madvise(DONTNEED)", libc::MADV_DONTNEED),
            Self::Remove => ("madvise(REMOVE)", libc::MADV_REMOVE),
            Self::PopulateRead => ("madvise(POPULATE_READ)", libc::MADV_POPULATE_READ),
            Self::PopulateWrite => ("madvise(POPULATE_WRITE)", libc::MADV_POPULATE_WRITE),
            Self::HugePage => ("madvise(HUGEPAGE)", libc::MADV_HUGEPAGE),
            Self::NoHugePage => ("madvise(NOHUGEPAGE)", libc::MADV_NOHUGEPAGE),
            Self::DontFork => ("madvise(DONTFORK)", libc::MADV_DONTFORK),
            Self::DoFork => ("madvise(DOFORK)", libc::MADV_DOFORK),
        }
    }
}

/// Mapped bytes with checked access; [`crate::Window`] and [`crate::ManagedMapping`] lend it. Unmaps itself when dropped.
///
/// Errors of every accessor: `OutOfWindow`, `Unaligned`, and for changes `ReadOnly` or `Claimed`. An access to a page that the
/// pager has poisoned, or that a truncated file no longer has, raises SIGBUS: map sealed files only, or
/// [`crate::Window::map_guarded`], whose bulk copies answer an error.
#[derive(Debug)]
pub struct MappedBytes {
    base: NonNull<u8>,
    len: u64,
    writable: bool,
    /// It may vanish: bulk copies go through the kernel.
    guarded: bool,
    claim: AtomicU8,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is unmapped only by the one owner's drop.
unsafe impl Send for MappedBytes {}
// SAFETY: shared access goes through atomics, or through raw copies whose races are those that other processes cause anyway.
unsafe impl Sync for MappedBytes {}

impl MappedBytes {
    /// Takes over a mapping.
    ///
    /// # Safety
    /// `base..base+len` (rounded up to pages) is mapped, readable, writable if `writable`, and owned by nobody else.
    pub(crate) unsafe fn from_raw(base: NonNull<u8>, len: u64, writable: bool) -> Self {
        Self { base, len, writable, guarded: false, claim: AtomicU8::new(UNTYPED) }
    }

    /// Bulk copies of it answer an error when its bytes have vanished (see [`crate::Window::map_guarded`]).
    pub(crate) fn guarded(mut self) -> Self {
        self.guarded = true;
        self
    }

    pub(crate) fn is_guarded(&self) -> bool {
        self.guarded
    }

    fn end(&self, at: *mut u8) -> guarded::End {
        guarded::End { at, guarded: self.guarded }
    }

    /// First address in this process.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.base.as_ptr().expose_provenance() as u64
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Always false: a mapping has at least one byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pages it covers, as addresses of this process.
    #[must_use]
    pub fn range(&self) -> AddrRange {
        AddrRange { start: self.addr(), len: self.len.next_multiple_of(PAGE_SIZE) }
    }

    /// Whether writes are allowed by the mapping.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Reserves the whole mapping for typed values.
    pub(crate) fn claim_typed(&self) -> Result<(), HookError> {
        if !self.writable {
            return Err(HookError::ReadOnly);
        }
        let claimed = self.claim.compare_exchange(UNTYPED, TYPED, Ordering::AcqRel, Ordering::Acquire);
        claimed.map(|_| ()).map_err(|used| HookError::Claimed { used: used_text(used) })
    }

    fn claim_atomics(&self) -> Result<(), HookError> {
        if self.claim.load(Ordering::Acquire) == ATOMICS {
            return Ok(());
        }
        match self.claim.compare_exchange(UNTYPED, ATOMICS, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) | Err(ATOMICS) => Ok(()),
            Err(used) => Err(HookError::Claimed { used: used_text(used) }),
        }
    }

    fn may_write(&self) -> Result<(), HookError> {
        if !self.writable {
            return Err(HookError::ReadOnly);
        }
        if self.claim.load(Ordering::Acquire) == TYPED {
            return Err(HookError::Claimed { used: used_text(TYPED) });
        }
        Ok(())
    }

    /// The address of `len` bytes at `off`, after checking that they lie inside.
    pub(crate) fn at(&self, off: u64, len: u64) -> Result<*mut u8, HookError> {
        match off.checked_add(len) {
            // SAFETY: off <= end <= the mapping's length, so the result stays inside it or one past its end.
            Some(end) if end <= self.len => Ok(unsafe { self.base.as_ptr().add(off as usize) }),
            _ => Err(HookError::OutOfWindow { off, len, window_len: self.len }),
        }
    }

    /// As `at`, for a change.
    pub(crate) fn at_mut(&self, off: u64, len: u64) -> Result<*mut u8, HookError> {
        self.may_write()?;
        self.at(off, len)
    }

    /// The address for a typed value; the caller (the arena) has claimed the mapping.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn word<T>(&self, off: u64, write: bool) -> Result<*mut T, HookError> {
        let place = if write { self.at_mut(off, size_of::<T>() as u64)? } else { self.at(off, size_of::<T>() as u64)? };
        if !place.cast::<T>().is_aligned() {
            return Err(HookError::Unaligned { what: "offset", value: off, align: align_of::<T>() as u64 });
        }
        Ok(place.cast())
    }

    /// Loads a byte (acquire).
    ///
    /// # Errors
    /// See the type.
    pub fn load_u8(&self, off: u64) -> Result<u8, HookError> {
        let place = self.word::<u8>(off, false)?;
        // SAFETY: `word` checked bounds and alignment; the mapping outlives this borrow; concurrent access is atomic.
        Ok(unsafe { AtomicU8::from_ptr(place) }.load(Ordering::Acquire))
    }

    /// Loads a 16-bit value of this machine's byte order (acquire).
    ///
    /// # Errors
    /// See the type.
    pub fn load_u16(&self, off: u64) -> Result<u16, HookError> {
        let place = self.word::<u16>(off, false)?;
        // SAFETY: as in `load_u8`.
        Ok(unsafe { AtomicU16::from_ptr(place) }.load(Ordering::Acquire))
    }

    /// Loads a 32-bit value (acquire).
    ///
    /// # Errors
    /// See the type.
    pub fn load_u32(&self, off: u64) -> Result<u32, HookError> {
        let place = self.word::<u32>(off, false)?;
        // SAFETY: as in `load_u8`.
        Ok(unsafe { AtomicU32::from_ptr(place) }.load(Ordering::Acquire))
    }

    /// Loads a 64-bit value (acquire).
    ///
    /// # Errors
    /// See the type.
    pub fn load_u64(&self, off: u64) -> Result<u64, HookError> {
        let place = self.word::<u64>(off, false)?;
        // SAFETY: as in `load_u8`.
        Ok(unsafe { AtomicU64::from_ptr(place) }.load(Ordering::Acquire))
    }

    /// Stores a byte (release).
    ///
    /// # Errors
    /// See the type.
    pub fn store_u8(&self, off: u64, value: u8) -> Result<(), HookError> {
        let place = self.word::<u8>(off, true)?;
        // SAFETY: as in `load_u8`, and `word` checked that the mapping may be written.
        unsafe { AtomicU8::from_ptr(place) }.store(value, Ordering::Release);
        Ok(())
    }

    /// Stores a 16-bit value (release).
    ///
    /// # Errors
    /// See the type.
    pub fn store_u16(&self, off: u64, value: u16) -> Result<(), HookError> {
        let place = self.word::<u16>(off, true)?;
        // SAFETY: as in `store_u8`.
        unsafe { AtomicU16::from_ptr(place) }.store(value, Ordering::Release);
        Ok(())
    }

    /// Stores a 32-bit value (release).
    ///
    /// # Errors
    /// See the type.
    pub fn store_u32(&self, off: u64, value: u32) -> Result<(), HookError> {
        let place = self.word::<u32>(off, true)?;
        // SAFETY: as in `store_u8`.
        unsafe { AtomicU32::from_ptr(place) }.store(value, Ordering::Release);
        Ok(())
    }

    /// Stores a 64-bit value (release).
    ///
    /// # Errors
    /// See the type.
    pub fn store_u64(&self, off: u64, value: u64) -> Result<(), HookError> {
        let place = self.word::<u64>(off, true)?;
        // SAFETY: as in `store_u8`.
        unsafe { AtomicU64::from_ptr(place) }.store(value, Ordering::Release);
        Ok(())
    }

    /// A shared counter in the mapping, for compare-and-swap with other processes. Read-only mappings use `load_u32`.
    ///
    /// # Errors
    /// See the type.
    pub fn atomic_u32(&self, off: u64) -> Result<&AtomicU32, HookError> {
        let place = self.word::<u32>(off, true)?;
        self.claim_atomics()?;
        // SAFETY: checked bounds, alignment and writability; the reference is tied to the mapping; no arena can claim it any more.
        Ok(unsafe { AtomicU32::from_ptr(place) })
    }

    /// A shared counter in the mapping, for compare-and-swap with other processes. Read-only mappings use `load_u64`.
    ///
    /// # Errors
    /// See the type.
    pub fn atomic_u64(&self, off: u64) -> Result<&AtomicU64, HookError> {
        let place = self.word::<u64>(off, true)?;
        self.claim_atomics()?;
        // SAFETY: as in `atomic_u32`.
        Ok(unsafe { AtomicU64::from_ptr(place) })
    }

    /// Wakes one thread, of any process, that sleeps on the aligned 32-bit word at `off` as a futex. The word's new value was stored before.
    ///
    /// # Errors
    /// See the type.
    pub fn wake_futex(&self, off: u64) -> Result<(), HookError> {
        let place = self.word::<u32>(off, false)?;
        // SAFETY: the word is inside this mapping; the kernel takes its address as a name.
        let rc = unsafe { libc::syscall(libc::SYS_futex, place, libc::FUTEX_WAKE, 1) };
        if rc >= 0 { Ok(()) } else { Err(HookError::failed("futex(WAKE)", std::io::Error::last_os_error())) }
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// See the type.
    pub fn read(&self, off: u64, into: &mut [u8]) -> Result<(), HookError> {
        let from = self.at(off, into.len() as u64)?;
        if self.guarded {
            let to = guarded::End { at: into.as_mut_ptr(), guarded: false };
            // SAFETY: as below.
            return unsafe { guarded::copy(self.end(from), to, into.len()) };
        }
        // SAFETY: source checked; the destination is an exclusive slice of the same length, which no mapping of ours can overlap.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// See the type.
    pub fn write(&self, off: u64, from: &[u8]) -> Result<(), HookError> {
        let into = self.at_mut(off, from.len() as u64)?;
        if self.guarded {
            let source = guarded::End { at: from.as_ptr().cast_mut(), guarded: false };
            // SAFETY: as below; the source is only read.
            return unsafe { guarded::copy(source, self.end(into), from.len()) };
        }
        // SAFETY: destination checked and writable; the source is a slice, which no mapping of ours can overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) };
        Ok(())
    }

    /// [`MappedBytes::read`] of words of this machine's byte order. None of them is read atomically.
    ///
    /// # Errors
    /// See the type.
    pub fn read_words(&self, off: u64, into: &mut [u64]) -> Result<(), HookError> {
        // SAFETY: the same memory, ours alone while `into` is borrowed, and any bytes make words.
        let bytes = unsafe { std::slice::from_raw_parts_mut(into.as_mut_ptr().cast::<u8>(), size_of_val(into)) };
        self.read(off, bytes)
    }

    /// [`MappedBytes::write`] of words of this machine's byte order. None of them is written atomically.
    ///
    /// # Errors
    /// See the type.
    pub fn write_words(&self, off: u64, from: &[u64]) -> Result<(), HookError> {
        // SAFETY: the same memory, which nobody changes while `from` is borrowed; words have no padding.
        let bytes = unsafe { std::slice::from_raw_parts(from.as_ptr().cast::<u8>(), size_of_val(from)) };
        self.write(off, bytes)
    }

    /// Copies `len` bytes inside the mapping; the two places may overlap.
    ///
    /// # Errors
    /// See the type.
    pub fn copy_within(&self, off: u64, to_off: u64, len: u64) -> Result<(), HookError> {
        self.copy_to(off, self, to_off, len)
    }

    /// Copies `len` bytes to another mapping (or the same one).
    ///
    /// # Errors
    /// See the type.
    pub fn copy_to(&self, off: u64, dst: &MappedBytes, dst_off: u64, len: u64) -> Result<(), HookError> {
        let from = self.at(off, len)?;
        let into = dst.at_mut(dst_off, len)?;
        if self.guarded || dst.guarded {
            // SAFETY: as below.
            return unsafe { guarded::copy(self.end(from), dst.end(into), len as usize) };
        }
        // SAFETY: both checked; `copy` allows overlap, which occurs when `dst` is this very mapping.
        unsafe { std::ptr::copy(from, into, len as usize) };
        Ok(())
    }

    /// Sets `len` bytes to one value.
    ///
    /// # Errors
    /// See the type.
    pub fn fill(&self, off: u64, len: u64, byte: u8) -> Result<(), HookError> {
        let into = self.at_mut(off, len)?;
        if self.guarded {
            // SAFETY: as below.
            return unsafe { guarded::fill(self.end(into), byte, len as usize) };
        }
        // SAFETY: checked and writable.
        unsafe { std::ptr::write_bytes(into, byte, len as usize) };
        Ok(())
    }

    /// Whether the bytes at `off` equal `expected`.
    ///
    /// # Errors
    /// See the type.
    pub fn compare(&self, off: u64, expected: &[u8]) -> Result<bool, HookError> {
        self.at(off, expected.len() as u64)?;
        let mut buffer = [0u8; CHUNK_BYTES];
        let mut place = off;
        for part in expected.chunks(CHUNK_BYTES) {
            let ours = &mut buffer[..part.len()];
            self.read(place, ours)?;
            if ours != part {
                return Ok(false);
            }
            place += part.len() as u64;
        }
        Ok(true)
    }

    /// Where `len` bytes of two mappings first differ, counted from `off`; None when they are equal.
    ///
    /// # Errors
    /// See the type.
    pub fn first_difference(
        &self,
        off: u64,
        other: &MappedBytes,
        other_off: u64,
        len: u64,
    ) -> Result<Option<u64>, HookError> {
        self.at(off, len)?;
        other.at(other_off, len)?;
        let (mut ours, mut theirs) = ([0u8; CHUNK_BYTES], [0u8; CHUNK_BYTES]);
        let mut done = 0;
        while done < len {
            let take = (len - done).min(CHUNK_BYTES as u64) as usize;
            self.read(off + done, &mut ours[..take])?;
            other.read(other_off + done, &mut theirs[..take])?;
            if let Some(at) = ours[..take].iter().zip(&theirs[..take]).position(|(a, b)| a != b) {
                return Ok(Some(done + at as u64));
            }
            done += take as u64;
        }
        Ok(None)
    }

    /// Gives advice about `len` bytes at the page-aligned `off`.
    ///
    /// # Errors
    /// See the type; `Call` when the kernel refuses. `DontNeed` and `Remove` count as writes.
    pub fn advise(&self, off: u64, len: u64, advice: Advice) -> Result<(), HookError> {
        aligned("offset", off)?;
        let destroys = matches!(advice, Advice::DontNeed | Advice::Remove);
        let place = if destroys { self.at_mut(off, len)? } else { self.at(off, len)? };
        let (call, code) = advice.code();
        // SAFETY: the range is inside our mapping; advice that drops bytes was checked like a write, so no typed value is there.
        if unsafe { libc::madvise(place.cast(), len as usize, code) } == 0 {
            return Ok(());
        }
        let range = AddrRange { start: self.addr() + off, len };
        Err(HookError::on(call, range, io::Error::last_os_error(), ""))
    }

    /// Makes every page present and writable now, so that no access faults later.
    ///
    /// # Errors
    /// `Call` (ENOMEM when memory is short), `ReadOnly`.
    pub fn prefault(&self) -> Result<(), HookError> {
        self.may_write()?;
        self.advise(0, self.len, Advice::PopulateWrite)
    }

    /// Keeps pages in memory from their first touch on. Best effort: without it, the kernel may swap them out.
    ///
    /// # Errors
    /// `Call`, ENOMEM when the memlock limit is reached. Callers log it and go on.
    pub fn lock_on_fault(&self) -> Result<(), HookError> {
        // SAFETY: locking our own mapping changes no byte of it.
        let rc = unsafe { libc::mlock2(self.base.as_ptr().cast(), self.len as usize, libc::MLOCK_ONFAULT) };
        if rc == 0 {
            return Ok(());
        }
        Err(HookError::on("mlock2(ONFAULT)", self.range(), io::Error::last_os_error(), "Raise the limit (ulimit -l)"))
    }

    /// Which of `page_count` pages from `first_page` are in memory, without touching them. For a shared file: in its page cache.
    ///
    /// # Errors
    /// `OutOfWindow`, `Call`.
    pub fn residency(&self, first_page: u64, page_count: u64) -> Result<Vec<bool>, HookError> {
        let range = self.range().sub_pages(first_page, page_count)?;
        let mut flags = vec![0u8; page_count as usize];
        let place = std::ptr::with_exposed_provenance_mut::<libc::c_void>(range.start as usize);
        // SAFETY: the range is inside our mapping and the vector has one byte for each of its pages.
        if unsafe { libc::mincore(place, range.len as usize, flags.as_mut_ptr()) } != 0 {
            return Err(HookError::on("mincore", range, io::Error::last_os_error(), ""));
        }
        Ok(flags.into_iter().map(|flag| flag & 1 == 1).collect())
    }
}

impl Drop for MappedBytes {
    fn drop(&mut self) {
        // SAFETY: we own the mapping and every borrow of it has ended. Failure is impossible for a mapping we made.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len as usize) };
    }
}

fn used_text(claim: u8) -> &'static str {
    if claim == TYPED { "by a typed arena" } else { "through atomics" }
}
