//! Back into the address space, or away: MoveBack, FillHuge and Drop.

use core::sync::atomic::Ordering::{Relaxed, Release};

use uhmm_shared::agent::{DIARY, DIARY_ENTRIES, DROPS, ORDER_PAGES, Order, SLOTS, Status};
use uhmm_shared::fill_gate::Fill;
use uhmm_shared::words::Words;

use super::{Agent, MOVE_ALLOW_SRC_HOLES, Outcome, outcome};
use crate::look::{HOLE, is_empty};
use crate::memory::staging_addr;
use crate::sys::{EAGAIN, EEXIST, ENOENT, ENOMEM, ESRCH};
use crate::taken::{self, Part};
use crate::{BLOCK_BYTES, PAGE_BYTES, sys};

const UFFDIO_COPY: u64 = 0xc028_aa03;

impl Agent<'_> {
    pub(super) fn drop_pages(&mut self, order: &Order, in_place: bool) {
        for block in 0..SLOTS {
            let Some(part) = taken::part(&self.words, block, order) else { continue };
            if part.whole {
                self.give_block_back(block);
                continue;
            }
            let addr = self.block(block).wrapping_add(part.in_block.wrapping_mul(PAGE_BYTES));
            let _ = sys::madvise(addr, part.count.wrapping_mul(PAGE_BYTES), sys::MADV_DONTNEED_LOCKED);
            self.forget_if_empty(block);
        }
        if in_place && order.addr != 0 {
            self.drop_in_place(order);
        }
        self.all(Status::Moved);
    }

    /// Only what is there: a page that is not there may have come home by the time that the kernel gets to it.
    fn drop_in_place(&mut self, order: &Order) {
        let (count, _) = self.mapped(order);
        if !self.look(order.addr, order.page_count) {
            return;
        }
        let mut page = 0;
        while page < count {
            let mut end = page;
            while end < count && !is_empty(self.kind(end)) {
                end = end.wrapping_add(1);
            }
            if end > page {
                let addr = order.addr.wrapping_add(page.wrapping_mul(PAGE_BYTES));
                let run = end.wrapping_sub(page);
                // Not inside the gate: the kernel waits for the pager to read of it. Between the two nothing but this thread's own
                // steps lie, and only a program that unmaps what it has just migrated can come in between.
                if self.at_place(order, || Outcome { done: run, stop: None }).stop.is_some() {
                    return;
                }
                self.announce(addr, run);
                let _ = self.advise_program(addr, run, sys::MADV_DONTNEED_LOCKED);
            }
            page = end.max(page.wrapping_add(1));
        }
    }

    /// Writes into the diary what is dropped now.
    fn announce(&self, addr: u64, count: u64) {
        let drops = self.words.load(DROPS, Relaxed);
        self.words.store(DROPS, drops.wrapping_add(1), Relaxed);
        let entry = DIARY.wrapping_add((drops % DIARY_ENTRIES) as usize * 2);
        self.words.store(entry, addr, Release);
        let end = addr.wrapping_add(count.wrapping_mul(PAGE_BYTES));
        self.words.store(entry.wrapping_add(1), end, Release);
    }

    /// Frees what lies in a block and its record.
    pub(super) fn give_block_back(&mut self, block: u64) {
        let addr = self.block(block);
        let _ = sys::madvise(addr, BLOCK_BYTES, sys::MADV_DONTNEED_LOCKED);
        let _ = sys::unlock(addr, BLOCK_BYTES);
        taken::forget(&self.words, block);
    }

    fn forget_if_empty(&mut self, block: u64) {
        if self.look_at_scratch(self.block(block), ORDER_PAGES)
            && self.work.scratch_kinds.iter().all(|kind| *kind == HOLE)
        {
            let _ = sys::unlock(self.block(block), BLOCK_BYTES);
            taken::forget(&self.words, block);
        }
    }

    pub(super) fn move_back(&mut self, order: &Order) {
        self.all(Status::Moved);
        for block in 0..SLOTS {
            let Some(part) = taken::part(&self.words, block, order) else { continue };
            let addr = self.block(block).wrapping_add(part.in_block.wrapping_mul(PAGE_BYTES));
            if !self.look_at_scratch(addr, part.count) {
                self.all(Status::Failed);
                return;
            }
            self.put_part_back(order, part, addr);
            self.forget_if_empty(block);
        }
    }

    /// `from`: where the part lies in scratch.
    fn put_part_back(&mut self, order: &Order, part: Part, from: u64) {
        let mut page = 0;
        while page < part.count {
            let mut end = page;
            while end < part.count && self.scratch_kind(end) != HOLE {
                end = end.wrapping_add(1);
            }
            if end == page {
                page = page.wrapping_add(1);
                continue;
            }
            let at = part.of_order.wrapping_add(page);
            let to = order.addr.wrapping_add(at.wrapping_mul(PAGE_BYTES));
            let from = from.wrapping_add(page.wrapping_mul(PAGE_BYTES));
            match self.put_back(order, to, from, end.wrapping_sub(page)) {
                Ok(done) => page = page.wrapping_add(done.max(1)),
                Err(Status::NoMemory) => {
                    // Nor is there any for the next ones.
                    for at in at..part.of_order.wrapping_add(part.count) {
                        self.set(at, Status::NoMemory);
                    }
                    return;
                }
                Err(status) => {
                    self.set(at, status);
                    page = page.wrapping_add(1);
                }
            }
        }
    }

    /// Puts some of `count` pages back, at least one; returns how many of them scratch need not keep. `Gone`: there is no such place, or
    /// not any more, or the program has changed it since; the pager knows whether there is another (mremap) and what is wanted.
    /// `Failed`: not now; the page is safe where it is, and the pager may ask again. `NoMemory`: the same at once, since nobody tells when
    /// there is some, and other orders wait.
    fn put_back(&mut self, order: &Order, to: u64, from: u64, count: u64) -> Result<u64, Status> {
        let not_now = |outcome: &Outcome| outcome.done == 0 && outcome.stop == Some(EAGAIN);
        let move_pages = |count: u64| {
            let call = || self.fill(order, || self.move_pages(to, from, count, MOVE_ALLOW_SRC_HOLES));
            self.patiently(call, not_now)
        };
        let moved = move_pages(count);
        if moved.done > 0 {
            return Ok(moved.done);
        }
        // The place may be several mappings by now, and some of them gone: a page is in one.
        let mut moved = move_pages(1);
        if !matches!(moved.stop, None | Some(EEXIST | ESRCH | ENOENT | EAGAIN | ENOMEM)) {
            // Its protection has changed meanwhile: a copy goes anywhere.
            let copy = || {
                let mut request = [to, from, PAGE_BYTES, 0, 0];
                let answer = sys::ioctl(self.config.uffd, UFFDIO_COPY, &mut request);
                let [.., copied] = request;
                outcome(answer, copied, PAGE_BYTES)
            };
            moved = self.patiently(|| self.fill(order, copy), not_now);
        }
        match moved.stop {
            None | Some(EEXIST | ESRCH) => {
                // A copy, or a newer page: what is in scratch is not needed.
                let _ = sys::madvise(from, PAGE_BYTES, sys::MADV_DONTNEED_LOCKED);
                Ok(1)
            }
            Some(ENOENT) => Err(Status::Gone),
            Some(ENOMEM) => Err(Status::NoMemory),
            Some(_) => Err(Status::Failed),
        }
    }

    /// Puts pages in place, unless the pager is reading events (EAGAIN) or has read one that has overtaken the order (ENOENT).
    fn fill(&self, order: &Order, call: impl FnOnce() -> Outcome) -> Outcome {
        match self.gate.fill(self.config.number, order.id, call) {
            Fill::Done(outcome) => outcome,
            Fill::Reading => Outcome { done: 0, stop: Some(EAGAIN) },
            Fill::Refused => Outcome { done: 0, stop: Some(ENOENT) },
        }
    }

    pub(super) fn fill_huge(&mut self, order: &Order, slot: u32) {
        self.all(Status::Failed);
        if order.page_count != ORDER_PAGES || !order.addr.is_multiple_of(BLOCK_BYTES) {
            return;
        }
        let Some(block) = self.huge.take(self.work) else { return };
        sys::copy(staging_addr(self.config.staging, slot, 0), block, BLOCK_BYTES);
        let moved = self.again(
            || self.fill(order, || self.move_pages(order.addr, block, ORDER_PAGES, 0)),
            |outcome| outcome.done == 0 && outcome.stop == Some(EAGAIN),
        );
        if moved.stop.is_none() {
            self.all(Status::MovedHuge);
        } else {
            // The place has become several mappings, or has pages or guards: what did not arrive is filled page by page by the pager.
            for page in 0..moved.done {
                self.set(page, Status::Moved);
            }
            self.huge.empty(block);
        }
    }
}
