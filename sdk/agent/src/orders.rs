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
//! ([`FillGate`]): pages that the program drops meanwhile stay dropped. What takes pages out of it or drops them waits too, and is refused when
//! the program has unmapped or moved the place meanwhile: other memory may be there.

mod home;
mod out;

use core::sync::atomic::Ordering::Acquire;

use uhmm_shared::agent::{
    BELL, DEAD_PAGERS, Done, ENTRIES, GATE, ORDER_PAGES, Op, Order, Status, changed_word, set_status, was_answered,
};
use uhmm_shared::fill_gate::FillGate;
use uhmm_shared::ring::{Consumer, Descriptor, Producer, RingFault};
use uhmm_shared::words::Words;

use crate::huge::HugeBlocks;
use crate::life::Life;
use crate::look::{GUARD, HOLE, PAGE, look, look_for_writable, mapping_at};
use crate::memory::{Orders, Work, block_addr};
use crate::sys::{EAGAIN, EINVAL, ENOENT};
use crate::{Config, End, PAGE_BYTES, sys};

const UFFDIO_MOVE: u64 = 0xc028_aa05;
const UFFDIO_CONTINUE: u64 = 0xc020_aa07;
const MOVE_ALLOW_SRC_HOLES: u64 = 2;
const CONTINUE_DONTWAKE: u64 = 1;
/// An address below everything that can be mapped: a question about it meets an unread event or nothing.
const NOWHERE: u64 = 1 << 20;

/// How often an operation that met an unread event tries again before it reports the pages as busy.
const AGAIN_TRIES: u32 = 2000;
/// How long pages on their way back wait for the event to be read: as long as a pager may take to be started again.
const PATIENCE_NS: u64 = 10_000_000_000;
const PAUSE_NS: u64 = 1_000_000;
/// No error number: the pager is reading events.
const READING: i64 = i64::MAX;
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

    /// Which pages at an address have lost their write protection.
    fn look_for_writable(&mut self, addr: u64, count: u64) -> bool {
        let Work { regions, scratch_kinds, .. } = &mut *self.work;
        look_for_writable(self.config.pagemap, regions, scratch_kinds, addr, count)
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

    /// Does something to the pages at an order's addresses, which are not those that the order is about when the program has changed the
    /// place since (ENOENT). READING: the pager has not read its events all the time that one waits for that, or the program has ended.
    fn at_place(&self, order: &Order, mut call: impl FnMut() -> Outcome) -> Outcome {
        let refused = |stop| Outcome { done: 0, stop: Some(stop) };
        let mut unless_changed = || if self.has_changed(order) { refused(ENOENT) } else { call() };
        let act = || self.gate.act(self.config.number, &mut unless_changed).unwrap_or(refused(READING));
        self.patiently(act, |outcome| outcome.stop == Some(READING))
    }

    /// Of the order that is being carried out. What a dead pager did not live to read of the next one does not tell of its orders.
    fn has_changed(&self, order: &Order) -> bool {
        self.words.load(changed_word(self.orders.index()), Acquire) == order.id
            || order.id <= self.words.load(DEAD_PAGERS, Acquire)
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

const _: () = assert!(PAGE != HOLE && GUARD != HOLE);
