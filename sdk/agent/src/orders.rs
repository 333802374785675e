//! What the pager orders, done.
//!
//! ```text
//!   MoveOut   address range --UFFDIO_MOVE--> scratch block of the slot --copy--> staging slot (shared with the pager)
//!   CopyOut   address range --/proc/self/mem--> staging slot
//!   Drop      scratch is freed (and pages in place are)
//!   MoveBack  scratch block --UFFDIO_MOVE--> address range
//!   FillHuge  staging slot --copy--> fresh huge page in scratch --UFFDIO_MOVE--> address range
//! ```
//!
//! Scratch is registered with the userfaultfd (for write protection, which raises no faults) only while pages are moved there: UFFDIO_MOVE
//! wants that of its destination, and what is registered cannot be freed without an event that somebody has to read.
//!
//! What puts pages into the address space waits while the pager reads events, and is refused when one of them has overtaken its order
//! ([`FillGate`]): pages that the program drops meanwhile stay dropped.

use core::sync::atomic::Ordering::{Acquire, Relaxed};

use uhmm_shared::agent::{
    BELL, DEAD_PAGERS, DIARY, DIARY_ENTRIES, DROPS, Done, ENTRIES, GATE, ORDER_PAGES, Op, Order, SLOTS, Status,
    set_status, was_answered,
};
use uhmm_shared::fill_gate::{Fill, FillGate};
use uhmm_shared::ring::{Consumer, Descriptor, Producer, RingFault};
use uhmm_shared::words::Words;

use crate::huge::HugeBlocks;
use crate::life::Life;
use crate::look::{HOLE, PAGE, ZERO_PAGE, look, mapping_at, status_of};
use crate::memory::{Orders, Work, block_addr, staging_addr};
use crate::sys::{EAGAIN, EBUSY, EEXIST, EINVAL, ENOENT, ENOMEM, ESRCH};
use crate::taken::{self, Part, Record};
use crate::{BLOCK_BYTES, Config, End, PAGE_BYTES, sys};

const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const UFFDIO_MOVE: u64 = 0xc028_aa05;
const UFFDIO_CONTINUE: u64 = 0xc020_aa07;
const REGISTER_WP: u64 = 2;
const MOVE_ALLOW_SRC_HOLES: u64 = 2;
const CONTINUE_DONTWAKE: u64 = 1;
/// An address below everything that can be mapped: a question about it meets an unread event or nothing.
const NOWHERE: u64 = 1 << 20;

/// How often an operation that met an unread event tries again before it reports the pages as busy.
const AGAIN_TRIES: u32 = 2000;
/// How long pages on their way back wait for the event to be read: as long as a pager may take to be started again.
const PATIENCE_NS: u64 = 10_000_000_000;
const PAUSE_NS: u64 = 1_000_000;
/// How long the kernel may keep us inside madvise, see `sys::end_after_s`.
const MADVISE_S: u64 = 20;

/// How an ioctl that goes through a range ended: how many pages were done, and the error number that stopped it.
#[derive(Clone, Copy)]
struct Outcome {
    done: u64,
    stop: Option<i64>,
}

/// See the module head.
pub(crate) struct Agent<'a> {
    config: &'a Config,
    words: Orders,
    orders: Consumer<Orders>,
    answers: Producer<Orders>,
    gate: FillGate<Orders>,
    life: Life,
    huge: HugeBlocks,
    work: &'a mut Work,
}

impl<'a> Agent<'a> {
    /// # Safety
    /// See [`spawn`](crate::spawn).
    pub(crate) unsafe fn new(config: &'a Config) -> Self {
        // SAFETY: the caller's promise: the memory is there, and `work` is this agent's alone.
        let (words, work) = unsafe { (Orders::at(config.orders), &mut *(config.work as *mut Work)) };
        Self {
            config,
            words,
            orders: Consumer::open(words, 0, ENTRIES),
            answers: Producer::open(words, 1, ENTRIES),
            gate: FillGate::at(words, GATE),
            life: Life::new(config, words),
            huge: HugeBlocks::new(config.scratch, config.pagemap),
            work,
        }
    }

    /// Works until the end.
    pub(crate) fn run(mut self) -> End {
        loop {
            let bell = self.words.load(BELL, Acquire) as u32;
            if let Some(end) = self.life.is_told(&self.words).or_else(|| self.life.pause(&self.words)) {
                return end;
            }
            match self.orders.peek() {
                Ok(Some(order)) => {
                    if self.answer(&order).is_err() {
                        return End::BadRing;
                    }
                    continue;
                }
                Ok(None) => {}
                Err(_) => return End::BadRing,
            }
            let again_ns = self.huge.in_idle_time(self.work);
            match self.orders.arm() {
                Ok(true) => {}
                Ok(false) => continue,
                Err(_) => return End::BadRing,
            }
            if let Some(end) = self.life.sleep(&self.words, bell, again_ns) {
                return end;
            }
        }
    }

    /// Does an order unless an agent before has answered it and was killed then; answers, and only then takes it out of the ring.
    fn answer(&mut self, descriptor: &Descriptor) -> Result<(), RingFault> {
        let [id, ..] = *descriptor;
        let area = self.orders.index() & (ENTRIES - 1);
        let done = Done { id, area };
        if !was_answered(&self.answers, &done) {
            let order = Order::decode(descriptor);
            let count = order.map_or(ORDER_PAGES, |order| order.page_count);
            match order.filter(|order| order.id > self.words.load(DEAD_PAGERS, Acquire)) {
                Some(order) => self.run_order(&order),
                None => self.all(Status::Failed),
            }
            for (page, status) in (0..count).zip(&self.work.statuses) {
                set_status(&self.words, area, page, Status::of(*status).unwrap_or(Status::Failed));
            }
            if self.answers.push(&done.encode())? {
                sys::tell(self.config.done_event);
            }
        }
        self.orders.advance();
        Ok(())
    }

    fn run_order(&mut self, order: &Order) {
        match order.op {
            Op::MoveOut { slot } => self.move_out(order, slot),
            Op::CopyOut { slot } => self.copy_out(order, slot),
            Op::Drop { in_place } => self.drop_pages(order, in_place),
            Op::MoveBack => self.move_back(order),
            Op::FillHuge { slot } => self.fill_huge(order, slot),
        }
    }

    fn all(&mut self, status: Status) {
        self.work.statuses.fill(status.byte());
    }

    fn set(&mut self, page: u64, status: Status) {
        if let Some(at) = self.work.statuses.get_mut(page as usize) {
            *at = status.byte();
        }
    }

    fn status(&self, page: u64) -> Option<Status> {
        self.work.statuses.get(page as usize).and_then(|byte| Status::of(*byte))
    }

    fn look(&mut self, addr: u64, count: u64) -> bool {
        let Work { regions, kinds, .. } = &mut *self.work;
        look(self.config.pagemap, regions, kinds, addr, count)
    }

    fn look_at_scratch(&mut self, addr: u64, count: u64) -> bool {
        let Work { regions, scratch_kinds, .. } = &mut *self.work;
        look(self.config.pagemap, regions, scratch_kinds, addr, count)
    }

    fn kind(&self, page: u64) -> u8 {
        self.work.kinds.get(page as usize).copied().unwrap_or(HOLE)
    }

    fn scratch_kind(&self, page: u64) -> u8 {
        self.work.scratch_kinds.get(page as usize).copied().unwrap_or(HOLE)
    }

    fn block(&self, block: u64) -> u64 {
        block_addr(self.config.scratch, block)
    }

    /// What is mapped where an order applies: how many pages from the first one on are managed private memory, and whether all of it may
    /// be written. Notes where one mapping ends and the next begins: nothing is moved across.
    fn mapped(&mut self, order: &Order) -> (u64, bool) {
        self.work.borders.fill(false);
        let end = order.addr.wrapping_add(order.page_count.wrapping_mul(PAGE_BYTES));
        let (mut next, mut writable) = (order.addr, true);
        while next < end {
            let Some(mapping) = mapping_at(self.config.maps, next) else { break };
            let here = mapping.end.min(end).wrapping_sub(next);
            if !mapping.anonymous || mapping.start > next || !self.is_managed(next, here) {
                break;
            }
            writable &= mapping.writable;
            next = next.wrapping_add(here);
            let border = next.wrapping_sub(order.addr) / PAGE_BYTES;
            if let Some(at) = self.work.borders.get_mut(border as usize) {
                *at = true;
            }
        }
        (next.wrapping_sub(order.addr) / PAGE_BYTES, writable)
    }

    /// Whether a part of one private mapping is registered: somebody may have put other memory in its place. UFFDIO_CONTINUE is not
    /// for private memory, so it changes nothing, but the kernel looks for the registration first.
    fn is_managed(&self, addr: u64, len_bytes: u64) -> bool {
        let ask = || {
            let mut request = [addr, len_bytes, CONTINUE_DONTWAKE, 0];
            outcome(sys::ioctl(self.config.uffd, UFFDIO_CONTINUE, &mut request), 0, len_bytes)
        };
        self.patiently(ask, |outcome| outcome.stop == Some(EAGAIN)).stop == Some(EINVAL)
    }

    /// Passes on what was found once the pager has read every event before it: it must know first when the range has moved.
    fn settle(&self) {
        let ask = || {
            let mut request = [NOWHERE, PAGE_BYTES, CONTINUE_DONTWAKE, 0];
            outcome(sys::ioctl(self.config.uffd, UFFDIO_CONTINUE, &mut request), 0, PAGE_BYTES)
        };
        self.patiently(ask, |outcome| outcome.stop == Some(EAGAIN));
    }

    /// Repeats what met an unread event of this address space: the pager is reading it, or will.
    fn again(&self, mut call: impl FnMut() -> Outcome, is_again: impl Fn(&Outcome) -> bool) -> Outcome {
        let mut outcome = call();
        for _ in 0..AGAIN_TRIES {
            if !is_again(&outcome) {
                break;
            }
            sys::let_others_run();
            outcome = call();
        }
        outcome
    }

    /// As [`Agent::again`] for what must not be given up: until the pager, or the next one, has read its events.
    fn patiently(&self, mut call: impl FnMut() -> Outcome, is_again: impl Fn(&Outcome) -> bool) -> Outcome {
        let mut outcome = self.again(&mut call, &is_again);
        if !is_again(&outcome) {
            return outcome;
        }
        let end_ns = sys::now_ns().saturating_add(PATIENCE_NS);
        while is_again(&outcome) && sys::now_ns() < end_ns && !self.life.is_over(&self.words) {
            // Nothing tells when somebody else has read an event.
            sys::sleep_ns(PAUSE_NS);
            outcome = call();
        }
        outcome
    }

    fn move_pages(&self, to: u64, from: u64, count: u64, mode: u64) -> Outcome {
        let len_bytes = count.wrapping_mul(PAGE_BYTES);
        let mut request = [to, from, len_bytes, mode, 0];
        let answer = sys::ioctl(self.config.uffd, UFFDIO_MOVE, &mut request);
        let [.., moved] = request;
        outcome(answer, moved, len_bytes)
    }

    /// madvise on memory of the program's, where the kernel may wait for the pager.
    fn advise_program(&self, addr: u64, count: u64, advice: u64) -> Result<u64, i64> {
        let alarm = |seconds| {
            if self.config.is_process {
                sys::end_after_s(seconds);
            }
        };
        alarm(MADVISE_S);
        let answer = sys::madvise(addr, count.wrapping_mul(PAGE_BYTES), advice);
        alarm(0);
        answer
    }

    fn move_out(&mut self, order: &Order, slot: u32) {
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
            if self.kind(page) == HOLE && self.scratch_kind(into.wrapping_add(page)) != HOLE {
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
            if self.kind(page) == HOLE {
                if self.status(page) != Some(Status::Moved) {
                    self.set(page, Status::Zero);
                }
                page = page.wrapping_add(1);
                continue;
            }
            let offset = page.wrapping_mul(PAGE_BYTES);
            let last = if tries.resumed { self.end_of_run(page, end) } else { end };
            let left = last.wrapping_sub(page);
            let (to, from) = (to.wrapping_add(offset), order.addr.wrapping_add(offset));
            let moved = self.again(
                || self.move_pages(to, from, left, MOVE_ALLOW_SRC_HOLES),
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

    /// The first page after `page` that is not there, at most `end`.
    fn end_of_run(&self, page: u64, end: u64) -> u64 {
        let mut last = page;
        while last < end && self.kind(last) != HOLE {
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
    fn copy_out(&mut self, order: &Order, slot: u32) {
        self.all(Status::Gone);
        let (count, _) = self.mapped(order);
        if !self.look(order.addr, order.page_count) || self.config.mem < 0 {
            return self.all(Status::Failed);
        }
        let mut page = 0;
        while page < count {
            let mut end = page;
            while end < count && !matches!(self.kind(end), HOLE | ZERO_PAGE) {
                end = end.wrapping_add(1);
            }
            if end == page {
                self.set(page, Status::Zero);
                page = page.wrapping_add(1);
                continue;
            }
            let from = order.addr.wrapping_add(page.wrapping_mul(PAGE_BYTES));
            let to = staging_addr(self.config.staging, slot, page);
            let len_bytes = end.wrapping_sub(page).wrapping_mul(PAGE_BYTES);
            let read = sys::read_memory(self.config.mem, from, to, len_bytes).unwrap_or(0) / PAGE_BYTES;
            for at in page..end {
                let status = if at.wrapping_sub(page) < read { Status::Moved } else { Status::Busy };
                self.set(at, status);
            }
            page = end;
        }
        self.settle();
    }

    fn drop_pages(&mut self, order: &Order, in_place: bool) {
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
            while end < count && self.kind(end) != HOLE {
                end = end.wrapping_add(1);
            }
            if end > page {
                let addr = order.addr.wrapping_add(page.wrapping_mul(PAGE_BYTES));
                let run = end.wrapping_sub(page);
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
        self.words.store(entry, addr, core::sync::atomic::Ordering::Release);
        let end = addr.wrapping_add(count.wrapping_mul(PAGE_BYTES));
        self.words.store(entry.wrapping_add(1), end, core::sync::atomic::Ordering::Release);
    }

    /// Frees what lies in a block and its record.
    fn give_block_back(&mut self, block: u64) {
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

    fn move_back(&mut self, order: &Order) {
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
                Err(status) => {
                    self.set(at, status);
                    page = page.wrapping_add(1);
                }
            }
        }
    }

    /// Puts some of `count` pages back, at least one; returns how many of them scratch need not keep. `Gone`: there is no such place, or
    /// not any more, or the program has changed it since; the pager knows whether there is another (mremap) and what is wanted.
    /// `Failed`: not now; the page is safe where it is, and the pager may ask again.
    fn put_back(&mut self, order: &Order, to: u64, from: u64, count: u64) -> Result<u64, Status> {
        let not_now = |outcome: &Outcome| outcome.done == 0 && matches!(outcome.stop, Some(EAGAIN | ENOMEM));
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

    fn fill_huge(&mut self, order: &Order, slot: u32) {
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
            // If it was split after all, what did not arrive is filled page by page by the pager.
            self.huge.empty(block);
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

/// `counted`: the count that the kernel wrote, in bytes, or its error number below zero.
fn outcome(answer: Result<u64, i64>, counted: u64, len_bytes: u64) -> Outcome {
    let counted = counted as i64;
    match answer {
        Ok(_) => Outcome { done: len_bytes / PAGE_BYTES, stop: None },
        Err(_) if counted > 0 => Outcome { done: (counted as u64).min(len_bytes) / PAGE_BYTES, stop: Some(EAGAIN) },
        Err(error) => Outcome { done: 0, stop: Some(error) },
    }
}

const _: () = assert!(PAGE != HOLE);
