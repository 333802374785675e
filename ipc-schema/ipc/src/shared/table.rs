//! The device page table of one region: one 64-bit entry a page in a memfd, written by the device's driver, revoked by the
//! pager (or by the driver's own loop when the mirror says so).
//!
//! ```text
//!                begin(nonce)               install(nonce, entry)
//!   Invalid ------------------> Pending(nonce) -----------------> Valid --touch--> Valid + ACCESSED (+ DIRTY)
//!      ^                              |                              |
//!      +------------ revoke ----------+------------ revoke ----------+        (swap with 0; tells whether it was DIRTY)
//!
//!   bit 0 VALID | 1 WRITE | 2 ACCESSED | 3 DIRTY | 4 SYSTEM (in place, else frame) | 5 PENDING
//!   bits 12..44 frame when VALID | bits 32..64 nonce when PENDING
//! ```
//! A device fault takes a while to be resolved; an invalidation may come in between. The nonce makes that visible: `install`
//! succeeds only if the entry still holds what `begin` wrote, so a resolution that was revoked meanwhile is never installed.
//! The pager takes ACCESSED away again when it has noted the use (`take_accessed`). Accessed and dirty bits are set by compare-and-swap on the very VALID value that was loaded, so a late device thread cannot
//! bring a revoked entry back. A table does not outlive its driver's incarnation: a new one attaches new tables.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering::{AcqRel, Acquire, SeqCst};

use super::words::{SharedWords, Words, WordsError};

const VALID: u64 = 1;
const WRITE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 2;
const DIRTY: u64 = 1 << 3;
const SYSTEM: u64 = 1 << 4;
const PENDING: u64 = 1 << 5;
const FRAME_SHIFT: u32 = 12;
const NONCE_SHIFT: u32 = 32;

/// One entry. What a peer wrote may be any bit pattern; the getters never panic.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pte(u64);

impl Pte {
    /// Nothing mapped.
    pub const INVALID: Self = Self(0);

    /// Maps a frame of the device's memory.
    pub fn frame(frame: u32, writable: bool) -> Self {
        Self(VALID | (u64::from(frame) << FRAME_SHIFT) | if writable { WRITE } else { 0 })
    }

    /// Maps the region's own page in place (the region's memfd at the same offset).
    pub fn system(writable: bool) -> Self {
        Self(VALID | SYSTEM | if writable { WRITE } else { 0 })
    }

    fn pending(nonce: u32) -> Self {
        Self(PENDING | (u64::from(nonce) << NONCE_SHIFT))
    }

    /// The device may use the page.
    pub fn is_valid(self) -> bool {
        self.0 & VALID != 0
    }

    /// The device may write.
    pub fn is_writable(self) -> bool {
        self.0 & (VALID | WRITE) == VALID | WRITE
    }

    /// The device used the page.
    pub fn is_accessed(self) -> bool {
        self.0 & (VALID | ACCESSED) == VALID | ACCESSED
    }

    /// The device wrote to the page.
    pub fn is_dirty(self) -> bool {
        self.0 & (VALID | DIRTY) == VALID | DIRTY
    }

    /// The page is mapped in place.
    pub fn is_system(self) -> bool {
        self.0 & (VALID | SYSTEM) == VALID | SYSTEM
    }

    /// Frame number of a page in device memory.
    pub fn frame_number(self) -> Option<u32> {
        (self.0 & (VALID | SYSTEM) == VALID).then_some((self.0 >> FRAME_SHIFT) as u32)
    }

    /// A fault is being resolved under this nonce.
    pub fn pending_nonce(self) -> Option<u32> {
        (self.0 & (VALID | PENDING) == PENDING).then_some((self.0 >> NONCE_SHIFT) as u32)
    }

    /// The word as it lies in the memfd.
    pub fn bits(self) -> u64 {
        self.0
    }
}

impl std::fmt::Debug for Pte {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(nonce) = self.pending_nonce() {
            return write!(f, "Pending({nonce})");
        }
        if !self.is_valid() {
            return write!(f, "Invalid");
        }
        match self.frame_number() {
            Some(frame) => write!(f, "Frame({frame}")?,
            None => write!(f, "System(")?,
        }
        let bit = |set: bool, letter: &'static str| if set { letter } else { "" };
        write!(f, " {}{}{})", bit(self.is_writable(), "W"), bit(self.is_accessed(), "A"), bit(self.is_dirty(), "D"))
    }
}

/// What [`Table::begin`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// The entry is now pending under the caller's nonce: ask the mirror, then `install`.
    Started,
    /// Somebody else's fault is on its way.
    Pending,
    /// Mapped already. A fault that needs more than this entry gives must `revoke` the page first.
    Valid(Pte),
    /// The page lies outside the table.
    OutOfRange,
}

/// A device page table. All methods work from any thread of any process that maps it.
pub struct Table<W: Words = SharedWords> {
    words: W,
    page_count: u64,
}

impl Table {
    /// A new table of `page_count` invalid entries in a sealed memfd. Called by the driver, which passes
    /// [`fd`](Self::fd) to the pager (`AttachTable`).
    pub fn create(page_count: u64) -> Result<Self, WordsError> {
        Ok(Self { words: SharedWords::create("uhmm-table", page_count)?, page_count })
    }

    /// A table that somebody else made; refused unless it is sealed against resizing and large enough for `page_count`.
    pub fn open(fd: impl AsFd, page_count: u64) -> Result<Self, WordsError> {
        Ok(Self { words: SharedWords::open(fd, page_count)?, page_count })
    }

    /// The memfd.
    pub fn fd(&self) -> &std::sync::Arc<OwnedFd> {
        self.words.fd()
    }
}

impl<W: Words> Table<W> {
    /// A table over any words (for models and tests).
    pub fn over(words: W, page_count: u64) -> Self {
        let page_count = page_count.min(words.word_count() as u64);
        Self { words, page_count }
    }

    /// Entries.
    pub fn page_count(&self) -> u64 {
        self.page_count
    }

    fn index(&self, page: u64) -> Option<usize> {
        (page < self.page_count).then_some(page as usize)
    }

    /// The entry as it is now; invalid outside the table. A device thread calls this after `gate::Slot::enter` only.
    pub fn load(&self, page: u64) -> Pte {
        self.index(page).map_or(Pte::INVALID, |index| Pte(self.words.load(index, SeqCst)))
    }

    /// Invalid becomes pending. Called by the driver before it asks the mirror.
    pub fn begin(&self, page: u64, nonce: u32) -> Begin {
        let Some(index) = self.index(page) else { return Begin::OutOfRange };
        match self.words.compare_exchange(index, 0, Pte::pending(nonce).0, AcqRel, Acquire) {
            Ok(_) => Begin::Started,
            Err(found) if Pte(found).is_valid() => Begin::Valid(Pte(found)),
            Err(_) => Begin::Pending,
        }
    }

    /// Pending under this nonce becomes `entry`. False if it was revoked meanwhile: the job refaults.
    pub fn install(&self, page: u64, nonce: u32, entry: Pte) -> bool {
        self.index(page).is_some_and(|index| {
            self.words.compare_exchange(index, Pte::pending(nonce).0, entry.0, AcqRel, Acquire).is_ok()
        })
    }

    /// Gives up a pending entry whose fault was not resolved. False if it was revoked meanwhile.
    pub fn cancel(&self, page: u64, nonce: u32) -> bool {
        self.install(page, nonce, Pte::INVALID)
    }

    /// Marks the page accessed, and dirty for a write, in the entry that was loaded. `None` if the entry is not that any more,
    /// or does not allow the access: leave the gate and fault. Device threads call this before the access itself.
    pub fn touch(&self, page: u64, loaded: Pte, write: bool) -> Option<Pte> {
        if !loaded.is_valid() || (write && !loaded.is_writable()) {
            return None;
        }
        let marked = Pte(loaded.0 | ACCESSED | if write { DIRTY } else { 0 });
        if marked == loaded {
            return Some(loaded);
        }
        let index = self.index(page)?;
        match self.words.compare_exchange(index, loaded.0, marked.0, SeqCst, SeqCst) {
            Ok(_) => Some(marked),
            // Another thread of the device marked the same mapping: that is no revocation.
            Err(found) if (found | ACCESSED | DIRTY) == (loaded.0 | ACCESSED | DIRTY) => {
                self.touch(page, Pte(found), write)
            }
            Err(_) => None,
        }
    }

    /// Whether the device used the page since this was asked last. Called by the pager. A device thread that holds the entry as it
    /// was marks it again; the dirty mark stays, it belongs to the revocation.
    pub fn take_accessed(&self, page: u64) -> bool {
        let loaded = self.load(page);
        // Most entries are not marked: only those that are cost a write to memory that the device uses.
        if !loaded.is_accessed() {
            return false;
        }
        if let Some(index) = self.index(page) {
            // Lost to a revocation: nothing to clear. Lost to another mark: the next look sees both.
            let _raced = self.words.compare_exchange(index, loaded.0, loaded.0 & !ACCESSED, AcqRel, Acquire);
        }
        true
    }

    /// Makes the entries invalid, pending ones too, and tells whether the device wrote through any of them. Pages outside the
    /// table are ignored. The device may be using the pages until [`Gate::wait`](super::gate::Gate::wait) says otherwise.
    pub fn revoke(&self, first_page: u64, page_count: u64) -> bool {
        let end = first_page.saturating_add(page_count).min(self.page_count);
        let mut had_dirty = false;
        self.in_use(first_page.min(end)..end, |pages| {
            for page in pages {
                let index = page as usize;
                // Most entries of a large range were never mapped: do not take their cache lines away from the device. A pending
                // entry that appears after this load is younger than the revocation; the mirror's sequence number refuses it.
                if self.words.load(index, SeqCst) != 0 {
                    had_dirty |= Pte(self.words.swap(index, 0, SeqCst)).is_dirty();
                }
            }
        });
        had_dirty
    }

    /// The parts of a range in which anything may be mapped: of a large one, what was never written costs nothing.
    pub fn in_use(&self, pages: Range<u64>, mut each: impl FnMut(Range<u64>)) {
        let end = pages.end.min(self.page_count) as usize;
        let range = (pages.start as usize).min(end)..end;
        self.words.in_use(range, &mut |part| each(part.start as u64..part.end as u64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_mapped_of_a_large_table_costs_nothing() {
        let pages = 1u64 << 28;
        let table = Table::create(pages).expect("a table");
        for page in [0, 5 << 20, pages - 1] {
            assert_eq!(table.begin(page, 7), Begin::Started);
            assert!(table.install(page, 7, Pte::frame(1, true)));
            assert!(table.touch(page, table.load(page), true).is_some());
        }
        let held = || uhmm_kernel_hook::memfd::populated_bytes(table.fd().as_fd()).expect("its size");
        let before = held();
        assert!(table.revoke(1, pages - 2), "the one in the middle was written");
        assert!(!table.revoke(1, pages - 2));
        assert!(table.load(0).is_valid() && !table.load(5 << 20).is_valid() && table.load(pages - 1).is_valid());
        assert!(table.revoke(0, u64::MAX));
        assert_eq!((table.load(0), table.load(pages - 1)), (Pte::INVALID, Pte::INVALID));
        assert_eq!(held(), before, "nobody looked at what was never written");
    }

    fn table() -> Table {
        Table::create(8).expect("a table")
    }

    fn mapped(table: &Table, page: u64, entry: Pte) -> Pte {
        assert_eq!(table.begin(page, 1), Begin::Started);
        assert!(table.install(page, 1, entry));
        table.load(page)
    }

    #[test]
    fn the_layout_is_that_of_the_contract() {
        assert_eq!(Pte::frame(0, false).bits(), 1);
        assert_eq!(Pte::frame(u32::MAX, true).bits(), 0xffff_ffff << 12 | 0b11);
        assert_eq!(Pte::system(true).bits(), 0b10011);
        assert_eq!(Pte::pending(u32::MAX).bits(), 0xffff_ffff << 32 | 0b10_0000);
        assert_eq!(Pte::frame(77, false).frame_number(), Some(77));
        assert_eq!(Pte::system(false).frame_number(), None);
        assert_eq!(Pte::pending(7).pending_nonce(), Some(7));
        assert_eq!(format!("{:?} {:?}", Pte::frame(3, true), Pte::INVALID), "Frame(3 W) Invalid");
    }

    #[test]
    fn a_fault_that_was_revoked_meanwhile_is_not_installed() {
        let table = table();
        assert_eq!(table.begin(2, 40), Begin::Started);
        assert!(!table.revoke(0, 8));
        assert!(!table.install(2, 40, Pte::frame(1, true)));
        assert_eq!(table.load(2), Pte::INVALID);
        // A newer fault of the same page is not confused with the revoked one.
        assert_eq!(table.begin(2, 41), Begin::Started);
        assert!(!table.install(2, 40, Pte::frame(1, true)));
        assert!(table.install(2, 41, Pte::frame(2, true)));
        assert_eq!(table.load(2).frame_number(), Some(2));
    }

    #[test]
    fn one_fault_a_page_at_a_time_and_a_cancelled_one_may_be_repeated() {
        let table = table();
        assert_eq!(table.begin(1, 5), Begin::Started);
        assert_eq!(table.begin(1, 6), Begin::Pending);
        assert!(!table.cancel(1, 6));
        assert!(table.cancel(1, 5));
        let entry = mapped(&table, 1, Pte::system(false));
        assert_eq!(table.begin(1, 7), Begin::Valid(entry));
    }

    #[test]
    fn accesses_are_marked_and_a_write_needs_a_writable_entry() {
        let table = table();
        let read_only = mapped(&table, 0, Pte::frame(4, false));
        assert_eq!(table.touch(0, read_only, true), None);
        let marked = table.touch(0, read_only, false).expect("readable");
        assert!(marked.is_accessed() && !marked.is_dirty());
        let writable = mapped(&table, 1, Pte::frame(5, true));
        assert!(table.touch(1, writable, true).expect("writable").is_dirty());
        assert_eq!(table.touch(2, Pte::INVALID, false), None);
    }

    #[test]
    fn an_accessed_mark_is_taken_once_and_set_again_by_the_next_use() {
        let table = table();
        let unmarked = mapped(&table, 2, Pte::frame(9, true));
        assert!(!table.take_accessed(2), "mapped is not used");
        let marked = table.touch(2, unmarked, true).expect("writable");
        assert!(table.take_accessed(2) && !table.take_accessed(2));
        assert!(table.load(2).is_dirty() && !table.load(2).is_accessed(), "the dirty mark is the revocation's");
        // A thread that loaded the marked entry goes on with it and is not thrown out.
        assert_eq!(table.touch(2, marked, true), Some(marked));
        let again = table.touch(2, table.load(2), false).expect("readable");
        assert!(again.is_accessed() && table.take_accessed(2));
        assert!(table.revoke(2, 1) && !table.take_accessed(2));
        assert_eq!(table.begin(3, 77), Begin::Started);
        assert!(!table.take_accessed(3) && !table.take_accessed(8), "pending entries and pages outside are not marks");
        assert_eq!(table.load(3).pending_nonce(), Some(77));
    }

    #[test]
    fn a_late_mark_does_not_bring_a_revoked_entry_back() {
        let table = table();
        let entry = mapped(&table, 3, Pte::frame(6, true));
        assert!(!table.revoke(3, 1), "nobody wrote");
        assert_eq!(table.touch(3, entry, true), None);
        assert_eq!(table.load(3), Pte::INVALID);
        let entry = mapped(&table, 3, Pte::frame(7, true));
        let other = table.touch(3, entry, false).expect("marked by another thread");
        // The first thread still holds the unmarked value: the same mapping, so it may go on.
        assert!(table.touch(3, entry, true).is_some_and(|now| now.is_dirty()));
        assert!(other.is_accessed());
        assert!(table.revoke(3, 1), "it was written");
    }

    #[test]
    fn pages_outside_the_table_are_neither_read_nor_written() {
        let table = table();
        let last = mapped(&table, 7, Pte::frame(1, true));
        for page in [8, 511, 512, u64::MAX] {
            assert_eq!(table.load(page), Pte::INVALID);
            assert_eq!(table.begin(page, 1), Begin::OutOfRange);
            assert!(!table.install(page, 1, Pte::frame(1, true)));
            assert_eq!(table.touch(page, last, true), None);
        }
        assert!(!table.revoke(8, u64::MAX));
        assert_eq!(table.load(7), last);
        assert!(!table.revoke(u64::MAX, u64::MAX));
        table.revoke(0, u64::MAX);
        assert_eq!(table.load(7), Pte::INVALID);
    }

    #[test]
    fn a_table_that_is_too_small_is_refused() {
        let table = table();
        assert!(Table::open(table.fd().as_fd(), 512).is_ok());
        assert!(matches!(Table::open(table.fd().as_fd(), 513), Err(WordsError::TooSmall { have: 512, need: 513 })));
        assert!(matches!(Table::create(0), Err(WordsError::Count { .. })));
    }
}
