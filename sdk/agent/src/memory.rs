//! The agent's memory: words that it shares with the pager, scratch, staging, and its own records. All of it belongs to the SDK's mappings
//! and is never managed.

use core::sync::atomic::{AtomicU64, Ordering};

use uhmm_shared::agent::{HUGE_BLOCKS, ORDER_PAGES, SLOTS, WORDS};
use uhmm_shared::words::Words;

use crate::{BLOCK_BYTES, PAGE_BYTES};

/// Bytes of scratch.
pub const SCRATCH_BYTES: u64 = (SLOTS + HUGE_BLOCKS) * BLOCK_BYTES;

/// Regions of one PAGEMAP_SCAN.
pub(crate) const SCAN_REGIONS: usize = 64;

/// What would be too much for the stack. Zeros are a legal start.
#[derive(Debug)]
#[repr(C)]
pub struct Work {
    /// What the kernel says of a range: first byte, end, categories.
    pub(crate) regions: [[u64; 3]; SCAN_REGIONS],
    /// What the pages of an order are; see `look.rs`.
    pub(crate) kinds: [u8; ORDER_PAGES as usize],
    /// The same of scratch.
    pub(crate) scratch_kinds: [u8; ORDER_PAGES as usize],
    /// What becomes of them.
    pub(crate) statuses: [u8; ORDER_PAGES as usize],
    /// Pages at which another mapping begins.
    pub(crate) borders: [bool; ORDER_PAGES as usize],
}

/// The words of the orders.
#[derive(Clone, Copy)]
pub(crate) struct Orders {
    base: *const AtomicU64,
}

impl Orders {
    /// # Safety
    /// `addr` names [`WORDS`] words, mapped for as long as this or a copy of it is used.
    pub(crate) unsafe fn at(addr: u64) -> Self {
        Self { base: addr as *const AtomicU64 }
    }

    /// Address of a word, for a futex on its low half.
    pub(crate) fn addr_of(self, index: usize) -> u64 {
        self.base as u64 + 8 * index.min(WORDS - 1) as u64
    }

    #[inline(always)]
    fn word(&self, index: usize) -> Option<&AtomicU64> {
        // SAFETY: inside the words, see `at`; nobody forms a reference to them that is not atomic.
        (index < WORDS).then(|| unsafe { &*self.base.add(index) })
    }
}

impl Words for Orders {
    #[inline(always)]
    fn word_count(&self) -> usize {
        WORDS
    }
    #[inline(always)]
    fn load(&self, index: usize, order: Ordering) -> u64 {
        self.word(index).map_or(0, |word| match order {
            Ordering::Relaxed => word.load(Ordering::Relaxed),
            _ => word.load(Ordering::Acquire),
        })
    }
    #[inline(always)]
    fn store(&self, index: usize, value: u64, order: Ordering) {
        if let Some(word) = self.word(index) {
            match order {
                Ordering::Relaxed => word.store(value, Ordering::Relaxed),
                _ => word.store(value, Ordering::Release),
            }
        }
    }
    #[inline(always)]
    fn swap(&self, index: usize, value: u64, _order: Ordering) -> u64 {
        self.word(index).map_or(0, |word| word.swap(value, Ordering::AcqRel))
    }
    #[inline(always)]
    fn compare_exchange(
        &self,
        index: usize,
        current: u64,
        new: u64,
        _success: Ordering,
        _failure: Ordering,
    ) -> Result<u64, u64> {
        self.word(index)
            .map_or(Err(!current), |word| word.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire))
    }
    #[inline(always)]
    fn fence(&self, _order: Ordering) {
        core::sync::atomic::fence(Ordering::SeqCst);
    }
}

/// Where a scratch block begins.
pub(crate) fn block_addr(scratch: u64, block: u64) -> u64 {
    scratch.wrapping_add(block.min(SLOTS + HUGE_BLOCKS - 1).wrapping_mul(BLOCK_BYTES))
}

/// Where a page of a staging slot lies.
pub(crate) fn staging_addr(staging: u64, slot: u32, page: u64) -> u64 {
    let slot = u64::from(slot).min(SLOTS - 1);
    staging
        .wrapping_add(slot.wrapping_mul(BLOCK_BYTES))
        .wrapping_add(page.min(ORDER_PAGES - 1).wrapping_mul(PAGE_BYTES))
}
