//! Out of the address space: MoveOut and CopyOut.

use uhmm_shared::agent::{ORDER_PAGES, Order, SLOTS, Status};

use super::{Agent, MOVE_ALLOW_SRC_HOLES, READING};
use crate::look::{GUARD, HOLE, WRITABLE, ZERO_PAGE, is_empty, status_of};
use crate::memory::staging_addr;
use crate::sys::{EAGAIN, EBUSY, EEXIST, EINVAL, ENOENT, ENOMEM, ESRCH};
use crate::taken::{self, Record};
use crate::{BLOCK_BYTES, PAGE_BYTES, sys};

const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const REGISTER_WP: u64 = 2;

impl Agent<'_> {
    pub(super) fn move_out(&mut self, order: &Order, slot: u32) {
        let block = u64::from(slot);
        let (count, writable) = self.mapped(order);
        let known = taken::record(&self.words, block);
        let resumed = known.filter(|record| {
            (record.id, record.region, record.first_page, record.page_count)
                == (order.id, order.region, order.first_page, order.page_count)
        });
        if !writable && count > 0 && resumed.is_none() {
            return self.all(Status::ReadOnly);
        }
        let looked = self.look(order.addr, order.page_count);
        if !looked || resumed.is_none() && !self.is_free(order, block) {
            return self.all(Status::Failed);
        }
        let into_address = order.addr / PAGE_BYTES % ORDER_PAGES;
        // A huge page stays huge when both places have the same offset in 2 MiB.
        let into = if into_address.wrapping_add(order.page_count) <= ORDER_PAGES { into_address } else { 0 };
        let Order { id, region, first_page, page_count, .. } = *order;
        taken::keep(&self.words, block, &Record { id, region, first_page, page_count, into });
        self.all(Status::Gone);
        if resumed.is_some() {
            self.note_taken_before(block, into, page_count);
        }
        self.move_to_block(order, block, into, count, resumed.is_some());
        if self.see_what_came(block, into, page_count) {
            self.stage(slot, into, page_count);
        } else {
            self.give_block_back(block);
        }
        self.settle();
    }

    /// An agent that was killed in the middle of this order has taken what is in scratch and not in place. (What is in both places was
    /// put into scratch by mlockall.)
    fn note_taken_before(&mut self, block: u64, into: u64, page_count: u64) {
        self.look_at_scratch(self.block(block), ORDER_PAGES);
        for page in 0..page_count {
            if is_empty(self.kind(page)) && self.scratch_kind(into.wrapping_add(page)) != HOLE {
                self.set(page, Status::Moved);
            }
        }
    }

    /// Of the pages that were moved, which are there: the others were holes. `false`: none.
    fn see_what_came(&mut self, block: u64, into: u64, page_count: u64) -> bool {
        self.look_at_scratch(self.block(block), ORDER_PAGES);
        let mut any = false;
        for page in 0..page_count {
            if self.status(page) == Some(Status::Moved) {
                let kind = self.scratch_kind(into.wrapping_add(page));
                any |= kind != HOLE;
                self.set(page, status_of(kind));
            }
        }
        any
    }

    /// Whether an order's block can be used: it holds nothing, and no other block has the order's pages.
    fn is_free(&mut self, order: &Order, block: u64) -> bool {
        for other in 0..SLOTS {
            let claimed = match taken::part(&self.words, other, order) {
                Some(part) => {
                    let addr = self.block(other).wrapping_add(part.in_block.wrapping_mul(PAGE_BYTES));
                    Some((addr, part.count))
                }
                None if other == block && taken::record(&self.words, block).is_some() => {
                    Some((self.block(block), ORDER_PAGES))
                }
                None => None,
            };
            let Some((addr, count)) = claimed else { continue };
            if !self.look_at_scratch(addr, count) || self.work.scratch_kinds.iter().any(|kind| *kind != HOLE) {
                return false;
            }
        }
        true
    }

    /// Moves what there is of the first `count` pages of an order: what was moved is `Moved` then, also holes between.
    fn move_to_block(&mut self, order: &Order, block: u64, into: u64, count: u64, resumed: bool) {
        let start = self.block(block);
        let mut request = [start, BLOCK_BYTES, REGISTER_WP, 0];
        match sys::ioctl(self.config.uffd, UFFDIO_REGISTER, &mut request) {
            Ok(_) => {}
            Err(ENOMEM) => return self.all(Status::MapLimit),
            Err(_) => return self.all(Status::Failed),
        }
        let mut page = 0;
        while page < count {
            let mut end = page.wrapping_add(1);
            while end < count && !self.work.borders.get(end as usize).copied().unwrap_or(true) {
                end = end.wrapping_add(1);
            }
            let tries = Tries { resumed, ..Tries::default() };
            self.move_piece(order, start.wrapping_add(into.wrapping_mul(PAGE_BYTES)), page, end, tries);
            page = end;
        }
        let mut request = [start, BLOCK_BYTES];
        let _ = sys::ioctl(self.config.uffd, UFFDIO_UNREGISTER, &mut request);
    }

    /// Pages of one mapping. Holes stay holes: their touch is a fault, and waits.
    fn move_piece(&mut self, order: &Order, to: u64, first: u64, end: u64, mut tries: Tries) {
        let mut page = first;
        let mut separated = false;
        while page < end {
            if is_empty(self.kind(page)) {
                if self.status(page) != Some(Status::Moved) {
                    self.set(page, self.status_of_nothing(page));
                }
                page = page.wrapping_add(1);
                continue;
            }
            let offset = page.wrapping_mul(PAGE_BYTES);
            let last = self.end_of_run(page, end, tries.resumed);
            let left = last.wrapping_sub(page);
            let (to, from) = (to.wrapping_add(offset), order.addr.wrapping_add(offset));
            let moved = self.again(
                || self.at_place(order, || self.move_pages(to, from, left, MOVE_ALLOW_SRC_HOLES)),
                |outcome| outcome.done == 0 && outcome.stop == Some(EAGAIN),
            );
            for done in page..page.wrapping_add(moved.done) {
                self.set(done, Status::Moved);
            }
            page = page.wrapping_add(moved.done);
            separated &= moved.done == 0;
            let status = match moved.stop {
                None => continue,
                Some(EAGAIN) if moved.done > 0 => continue,
                // One of several owners after a fork: with a copy of its own it can be moved. A pinned page stays busy.
                Some(EBUSY) if !separated => {
                    separated = true;
                    if self.advise_program(from, 1, sys::MADV_POPULATE_WRITE).is_ok() {
                        continue;
                    }
                    Status::Busy
                }
                // Nor any other page of it: the wait was long enough.
                Some(READING) => {
                    (page..end).for_each(|page| self.set(page, Status::Busy));
                    return;
                }
                Some(EBUSY | EAGAIN) => Status::Busy,
                Some(EEXIST | EINVAL) => match self.make_alike(moved.stop, to, left, &mut tries) {
                    Ok(()) => continue,
                    Err(status) => status,
                },
                Some(ENOENT | ESRCH) => Status::Gone,
                Some(ENOMEM) => Status::NoMemory,
                Some(_) => Status::Failed,
            };
            self.set(page, status);
            page = page.wrapping_add(1);
        }
    }

    /// What is told of a page that is not there.
    fn status_of_nothing(&self, page: u64) -> Status {
        if self.kind(page) == GUARD { Status::Guard } else { Status::Zero }
    }

    /// The first page after `page` that cannot be moved along, at most `end`: a guard, and where scratch has pages already a hole too.
    fn end_of_run(&self, page: u64, end: u64, resumed: bool) -> u64 {
        let mut last = page;
        while last < end && self.kind(last) != GUARD && !(resumed && self.kind(last) == HOLE) {
            last = last.wrapping_add(1);
        }
        last
    }

    /// UFFDIO_MOVE wants an empty place (mlockall fills it) that is locked like the memory (and other likenesses, which are not to be had).
    fn make_alike(&self, stop: Option<i64>, to: u64, count: u64, tries: &mut Tries) -> Result<(), Status> {
        let len_bytes = count.wrapping_mul(PAGE_BYTES);
        if stop == Some(EEXIST) {
            if tries.resumed || core::mem::replace(&mut tries.emptied, true) {
                return Err(Status::Busy);
            }
            return self.empty_registered(to, len_bytes).map_err(|_| Status::Failed);
        }
        tries.matched = tries.matched.wrapping_add(1);
        match tries.matched {
            1 => {
                tries.lock_refused = sys::lock(to, len_bytes).is_err();
                if tries.lock_refused {
                    sys::unlock(to, len_bytes).map(drop).map_err(|_| Status::Failed)
                } else {
                    Ok(())
                }
            }
            2 if !tries.lock_refused => sys::unlock(to, len_bytes).map(drop).map_err(|_| Status::Failed),
            _ if tries.lock_refused => Err(Status::LockLimit),
            _ => Err(Status::Failed),
        }
    }

    /// Nobody would read of it if registered memory was freed.
    fn empty_registered(&self, addr: u64, len_bytes: u64) -> Result<(), i64> {
        sys::ioctl(self.config.uffd, UFFDIO_UNREGISTER, &mut [addr, len_bytes])?;
        let _ = sys::unlock(addr, len_bytes);
        sys::madvise(addr, len_bytes, sys::MADV_DONTNEED_LOCKED)?;
        sys::ioctl(self.config.uffd, UFFDIO_REGISTER, &mut [addr, len_bytes, REGISTER_WP, 0]).map(drop)
    }

    /// Copies what was taken out to the staging slot.
    fn stage(&self, slot: u32, into: u64, page_count: u64) {
        let mut page = 0;
        while page < page_count {
            let mut end = page;
            while end < page_count && !matches!(self.scratch_kind(into.wrapping_add(end)), HOLE | ZERO_PAGE) {
                end = end.wrapping_add(1);
            }
            if end > page {
                let from = self.block(u64::from(slot)).wrapping_add(into.wrapping_add(page).wrapping_mul(PAGE_BYTES));
                let to = staging_addr(self.config.staging, slot, page);
                sys::copy(from, to, end.wrapping_sub(page).wrapping_mul(PAGE_BYTES));
            }
            page = end.max(page.wrapping_add(1));
        }
    }

    /// Pages that stay where they are; nobody can write them now.
    pub(super) fn copy_out(&mut self, order: &Order, slot: u32) {
        self.all(Status::Gone);
        let (count, _) = self.mapped(order);
        // When KSM merges pages their protection is lost: it may not look at these any more. Kernels without it say EINVAL.
        let _ = sys::madvise(order.addr, count.wrapping_mul(PAGE_BYTES), sys::MADV_UNMERGEABLE);
        if !self.look(order.addr, order.page_count) || self.config.mem < 0 {
            return self.all(Status::Failed);
        }
        let mut page = 0;
        while page < count {
            let mut end = page;
            while end < count && !is_empty(self.kind(end)) && self.kind(end) != ZERO_PAGE {
                end = end.wrapping_add(1);
            }
            if end == page {
                self.set(page, self.status_of_nothing(page));
                page = page.wrapping_add(1);
                continue;
            }
            let from = order.addr.wrapping_add(page.wrapping_mul(PAGE_BYTES));
            let to = staging_addr(self.config.staging, slot, page);
            let len_bytes = end.wrapping_sub(page).wrapping_mul(PAGE_BYTES);
            let read = sys::read_memory(self.config.mem, from, to, len_bytes).unwrap_or(0) / PAGE_BYTES;
            let read_end = page.wrapping_add(read).min(end);
            for at in page..read_end {
                self.set(at, Status::Moved);
            }
            page = read_end;
            if page < end {
                // Poison, or gone just now; what lies behind it can be read.
                self.set(page, Status::Busy);
                page = page.wrapping_add(1);
            }
        }
        self.refuse_unprotected(order, count);
        self.settle();
    }

    /// Pages that lost their protection before they were copied may have been written since.
    fn refuse_unprotected(&mut self, order: &Order, count: u64) {
        if !self.look_for_writable(order.addr, count) {
            return;
        }
        for page in 0..count {
            if self.status(page) == Some(Status::Moved) && self.scratch_kind(page) == WRITABLE {
                self.set(page, Status::Busy);
            }
        }
    }
}

/// What was tried to make a place like the memory that goes there.
#[derive(Clone, Copy, Default)]
struct Tries {
    /// Some pages lie there already, and stay.
    resumed: bool,
    emptied: bool,
    matched: u32,
    lock_refused: bool,
}
