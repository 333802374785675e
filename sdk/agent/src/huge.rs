//! Huge pages for arrivals. Pages that the program had are never used again for this: something may still refer to them (a pipe, a
//! socket) and would see the new bytes. A fresh one costs an allocation and 2 MiB of zeroing, so while pages come home the next one is made
//! before it is asked for.

use uhmm_shared::agent::{HUGE_BLOCKS, ORDER_PAGES, SLOTS};

use crate::look::{HUGE_PAGE, look};
use crate::memory::{Work, block_addr};
use crate::{BLOCK_BYTES, sys};

/// How long a huge page that nobody has asked for is kept.
const KEPT_NS: u64 = 200_000_000;

pub(crate) struct HugeBlocks {
    scratch: u64,
    pagemap: i32,
    ready: [bool; HUGE_BLOCKS as usize],
    /// Until when more are made ahead of need; 0: nobody comes home.
    wanted_until_ns: u64,
}

impl HugeBlocks {
    /// An agent that was killed may have left some, which nobody would give back.
    pub(crate) fn new(scratch: u64, pagemap: i32) -> Self {
        let blocks = Self { scratch, pagemap, ready: [false; HUGE_BLOCKS as usize], wanted_until_ns: 0 };
        for index in 0..blocks.ready.len() {
            blocks.empty(blocks.addr(index));
        }
        blocks
    }

    fn addr(&self, index: usize) -> u64 {
        block_addr(self.scratch, SLOTS + index as u64)
    }

    /// The address of a huge page; its place is empty afterwards, or [`HugeBlocks::empty`] makes it so.
    pub(crate) fn take(&mut self, work: &mut Work) -> Option<u64> {
        self.wanted_until_ns = sys::now_ns().saturating_add(KEPT_NS);
        let index = self.ready.iter().position(|ready| *ready).unwrap_or(0);
        if !self.ready.iter().any(|ready| *ready) && !self.make(index, work) {
            return None;
        }
        self.ready.iter_mut().skip(index).take(1).for_each(|ready| *ready = false);
        Some(self.addr(index))
    }

    fn make(&mut self, index: usize, work: &mut Work) -> bool {
        let addr = self.addr(index);
        // Whatever mlockall has made of the place: what is put in a huge page is not locked.
        let _ = sys::unlock(addr, BLOCK_BYTES);
        self.empty(addr);
        let made = sys::madvise(addr, BLOCK_BYTES, sys::MADV_HUGEPAGE)
            .and_then(|_| sys::madvise(addr, BLOCK_BYTES, sys::MADV_POPULATE_WRITE));
        let Work { regions, scratch_kinds, .. } = work;
        let huge = made.is_ok()
            && look(self.pagemap, regions, scratch_kinds, addr, ORDER_PAGES)
            && scratch_kinds.iter().all(|kind| *kind == HUGE_PAGE);
        if !huge {
            self.empty(addr);
        }
        self.ready.iter_mut().skip(index).take(1).for_each(|ready| *ready = huge);
        huge
    }

    /// Gives back what lies there.
    pub(crate) fn empty(&self, addr: u64) {
        let _ = sys::madvise(addr, BLOCK_BYTES, sys::MADV_DONTNEED_LOCKED);
    }

    /// Called when there is nothing else to do: makes what was used up while pages come home, gives all back when they do not any more.
    /// Returns when it wants to be called again.
    pub(crate) fn in_idle_time(&mut self, work: &mut Work) -> Option<u64> {
        if self.wanted_until_ns == 0 {
            return None;
        }
        if sys::now_ns() < self.wanted_until_ns {
            for index in 0..self.ready.len() {
                if !self.ready.get(index).is_some_and(|ready| *ready) && !self.make(index, work) {
                    break;
                }
            }
            return Some(self.wanted_until_ns);
        }
        self.wanted_until_ns = 0;
        for index in 0..self.ready.len() {
            self.empty(self.addr(index));
        }
        self.ready.fill(false);
        None
    }
}
