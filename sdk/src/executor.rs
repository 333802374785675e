//! What the pager asks of this process and nobody else can do: taking private pages out of the address space, putting them back,
//! dropping them.
//!
//! ```text
//!   MoveOut   address range --UFFDIO_MOVE--> scratch block --copy--> staging slot (shared with the pager)
//!   Drop      scratch block is free (a huge page is kept for a later arrival)
//!   MoveBack  scratch block --UFFDIO_MOVE--> address range
//!   FillHuge  staging slot --copy--> scratch huge page --UFFDIO_MOVE--> address range
//!   MapDevice, UnmapDevice: `frames`
//! ```
//!
//! A block is 2 MiB of anonymous memory, aligned, registered for write protection only: UFFDIO_MOVE takes it as a destination, and
//! a hole in it is the kernel's business, not the pager's. It is registered while it holds something and not while it is
//! emptied, so that no REMOVE event goes out. What is in scratch is known by (region, page): every operation can be repeated.
//!
//! What puts pages into the address space waits while the pager reads events, and is refused when one of them has overtaken its order
//! ([`FillGate`]): pages that the program drops meanwhile stay dropped.
//!
//! Nothing here holds a reference into the program's memory; ranges are numbers, and the kernel checks them.

mod blocks;
mod frames;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use uhmm_ipc::message::driver::CoherentMemory;
use uhmm_ipc::message::pager::{AgentOp, AgentRun, AgentStatus, DIARY_BYTES, DIARY_ENTRIES};
use uhmm_ipc::shared::fill_gate::{Fill, FillGate};
use uhmm_kernel_hook::own_memory::{self, RangeAdvice};
use uhmm_kernel_hook::pagemap::{self, Categories};
use uhmm_kernel_hook::{
    AddrRange, CopyMode, FillOutcome, FillStop, HookError, PAGE_SIZE, Prot, UffdState, Userfaultfd, Window, memfd,
    process,
};

use self::blocks::Block;
pub(crate) use self::frames::{Allocation, Allocations, rights_stay};

const HUGE_BYTES: u64 = 2 << 20;
const HUGE_PAGES: u64 = HUGE_BYTES / PAGE_SIZE;
/// How often an operation that met an unread event tries again before it reports the pages as busy.
const AGAIN_TRIES: u32 = 2000;
/// How long pages on their way back wait for the event to be read. As long as a pager may take to be started again.
const PATIENCE: Duration = Duration::from_secs(10);
/// What UFFDIO_MOVE says when only one of the two places is locked (and for other differences, which locking does not mend), and
/// UFFDIO_CONTINUE of any private memory that is registered.
const EINVAL: i32 = 22;
/// Copies between our own memory and the staging area.
const COPY_BYTES: usize = 64 << 10;

/// One thing to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    /// Grows with every new order.
    pub id: u64,
    pub region: u64,
    pub first_page: u64,
    pub addr: u64,
    pub page_count: u64,
    pub op: AgentOp,
}

impl Order {
    fn range(&self, from: u64, count: u64) -> AddrRange {
        AddrRange { start: self.addr + from * PAGE_SIZE, len: count * PAGE_SIZE }
    }

    /// Where a page of this order goes in a block. A huge page stays huge when both places have the same offset in 2 MiB.
    fn page_in_block(&self, page: u64) -> u64 {
        let into = self.addr / PAGE_SIZE % HUGE_PAGES;
        if into + self.page_count <= HUGE_PAGES { into + page } else { page }
    }

    fn whole(&self) -> AddrRange {
        self.range(0, self.page_count)
    }
}

/// What is mapped where an order applies.
#[derive(Debug, Default)]
struct Mapped {
    /// Pages from the first one on that are managed private memory.
    page_count: u64,
    /// The page after the last one of each mapping: nothing is moved across.
    ends: Vec<u64>,
    /// All of it may be written.
    writable: bool,
}

/// A page in scratch.
#[derive(Clone, Copy, Debug)]
struct Taken {
    block: usize,
    /// Page inside the block.
    page: u64,
    status: AgentStatus,
}

/// See the module head.
pub(crate) struct Executor {
    uffd: Userfaultfd,
    staging: Window,
    gate: FillGate,
    pagemap: OwnedFd,
    blocks: Vec<Block>,
    free: Vec<usize>,
    /// Empty but for one huge page each.
    kept_huge: Vec<usize>,
    taken: BTreeMap<(u64, u64), Taken>,
    /// Ranges that were ever dropped in place.
    drops: u64,
    /// What the SDK has allocated.
    allocations: Arc<Allocations>,
    /// Memory of coherent devices, by device and generation; also what a device had before, of which frames may be mapped.
    apertures: BTreeMap<(u8, u64), CoherentMemory>,
    /// Latest order about frames.
    last_frames_order: u64,
}

impl Executor {
    pub(crate) fn new(
        uffd: Userfaultfd,
        staging: BorrowedFd<'_>,
        allocations: Arc<Allocations>,
    ) -> Result<Self, HookError> {
        let pagemap = pagemap::open_pagemap(std::process::id())?;
        Ok(Self {
            uffd,
            staging: Window::map(staging, 0, memfd::len(staging)?, Prot::ReadWrite)?,
            gate: FillGate::open(staging)?,
            pagemap,
            blocks: Vec::new(),
            free: Vec::new(),
            kept_huge: Vec::new(),
            taken: BTreeMap::new(),
            drops: 0,
            allocations,
            apertures: BTreeMap::new(),
            last_frames_order: 0,
        })
    }

    /// Does one thing. What fails is told by page; an error of the whole is `Failed` for all of them.
    pub(crate) fn run(&mut self, order: &Order) -> Vec<AgentRun> {
        let slot_offset = |slot: u32| u64::from(slot) * HUGE_BYTES;
        let result = match order.op {
            _ if order.page_count > HUGE_PAGES => Err(HookError::Strange {
                call: "agent order",
                detail: format!("{} pages are more than a slot has", order.page_count),
            }),
            AgentOp::MoveOut { slot } => self.move_out(order, slot_offset(slot)).and_then(|runs| self.settled(runs)),
            AgentOp::CopyOut { slot } => self.copy_out(order, slot_offset(slot)).and_then(|runs| self.settled(runs)),
            AgentOp::Drop { in_place } => self.drop_pages(order, in_place),
            AgentOp::MoveBack => self.move_back(order),
            AgentOp::FillHuge { slot } => self.fill_huge(order, slot_offset(slot)),
            AgentOp::Probe => self.probe(order),
            AgentOp::MapDevice { device, frame, generation } => self.map_device(order, device, frame, generation),
            AgentOp::UnmapDevice => self.unmap_device(order),
        };
        result.unwrap_or_else(|error| {
            tracing::warn!(%error, ?order, "The agent could not do what the pager asked");
            vec![AgentRun { page_count: order.page_count, status: AgentStatus::Failed }]
        })
    }

    /// Passes on what was found once the pager has read every event before it: it must know first when the range has moved.
    fn settled(&self, runs: Vec<AgentRun>) -> Result<Vec<AgentRun>, HookError> {
        patiently(|| self.uffd.state(), |state| *state == UffdState::EventUnread)?;
        Ok(runs)
    }

    /// What the pages of a range are: `None` for a hole.
    fn look(&self, range: AddrRange) -> Result<Vec<Option<Categories>>, HookError> {
        let any = Categories::PRESENT | Categories::SWAPPED | Categories::PFNZERO | Categories::HUGE;
        let mut pages = vec![None; (range.len / PAGE_SIZE) as usize];
        for run in pagemap::scan(self.pagemap.as_fd(), range, any)? {
            let from = run.start.max(range.start).saturating_sub(range.start) / PAGE_SIZE;
            let to = (run.end.min(range.end()) - range.start) / PAGE_SIZE;
            for page in &mut pages[from as usize..to as usize] {
                *page = Some(run.categories);
            }
        }
        Ok(pages)
    }

    /// What is there, up to the first page that is not managed private memory.
    fn mapped(&self, order: &Order) -> Result<Mapped, HookError> {
        let range = order.whole();
        let mut next = range.start;
        let mut mapped = Mapped { writable: true, ..Mapped::default() };
        for vma in own_memory::mappings(range)? {
            let end = vma.end.min(range.end());
            let usable = vma.start <= next && !vma.shared && vma.inode == 0;
            if !usable || !self.is_managed(AddrRange { start: next, len: end - next })? {
                break;
            }
            mapped.writable &= vma.write;
            mapped.page_count = (end - range.start) / PAGE_SIZE;
            mapped.ends.push(mapped.page_count);
            next = end;
        }
        Ok(mapped)
    }

    /// Whether a part of one private mapping is registered: somebody may have put other memory in its place. UFFDIO_CONTINUE is
    /// not for private memory, so it changes nothing, but the kernel looks for the registration first.
    fn is_managed(&self, part: AddrRange) -> Result<bool, HookError> {
        let unread = |outcome: &FillOutcome| outcome.stop == Some(FillStop::Again);
        let outcome = patiently(|| self.uffd.cont(part, false, true), unread)?;
        if unread(&outcome) {
            return Err(HookError::Strange {
                call: "UFFDIO_CONTINUE",
                detail: format!("{part} changes without an end"),
            });
        }
        Ok(outcome.stop == Some(FillStop::Other(EINVAL)))
    }

    fn move_out(&mut self, order: &Order, slot_offset: u64) -> Result<Vec<AgentRun>, HookError> {
        let Mapped { page_count: count, ends, writable } = self.mapped(order)?;
        let pages = order.first_page..order.first_page + order.page_count;
        let known: Vec<bool> = pages.map(|page| self.taken.contains_key(&(order.region, page))).collect();
        if !writable && count > 0 && !known.contains(&true) {
            return Ok(vec![AgentRun { page_count: order.page_count, status: AgentStatus::ReadOnly }]);
        }
        let kinds = self.look(order.whole())?;
        let missing = |page: u64| kinds[page as usize].is_some() && !known[page as usize];
        let mut statuses = vec![AgentStatus::Gone; order.page_count as usize];
        let mut blocks: Vec<usize> = Vec::new();
        let mut page = 0;
        while page < count {
            if let Some(taken) = self.taken.get(&(order.region, order.first_page + page)) {
                statuses[page as usize] = taken.status;
                page += 1;
                continue;
            }
            let end = ends.iter().copied().find(|end| *end > page).unwrap_or(count);
            let run = (page..end).take_while(|at| missing(*at)).count() as u64;
            if run == 0 {
                // A hole stays one: its touch is a fault, and waits.
                statuses[page as usize] = AgentStatus::Zero;
                page += 1;
                continue;
            }
            let stop = self.move_run(order, page, run, &mut blocks)?;
            while page < end && self.taken.contains_key(&(order.region, order.first_page + page)) {
                statuses[page as usize] = self.taken[&(order.region, order.first_page + page)].status;
                page += 1;
            }
            if let Some(status) = stop {
                statuses[page as usize] = status;
                page += 1;
            }
        }
        for block in blocks {
            let whole = self.blocks[block].used == HUGE_PAGES;
            self.blocks[block].huge = whole && statuses.iter().all(|status| *status == AgentStatus::MovedHuge);
            self.free_if_empty(block)?;
        }
        self.stage(order, &statuses, slot_offset)?;
        Ok(runs(&statuses))
    }

    /// Moves pages of one mapping until one cannot be moved; then its status is told. `blocks`: those that this order fills, the
    /// last one is filled now.
    fn move_run(
        &mut self,
        order: &Order,
        first: u64,
        count: u64,
        blocks: &mut Vec<usize>,
    ) -> Result<Option<AgentStatus>, HookError> {
        let mut done = 0;
        let (mut separated, mut matched) = (false, false);
        while done < count {
            let block = match blocks.last() {
                Some(block) => *block,
                None => self.begin_block(blocks)?,
            };
            let source = order.range(first + done, count - done);
            let into = order.page_in_block(first + done);
            let to = self.blocks[block].addr_of(into);
            let outcome = again(
                || self.uffd.move_pages(to, source.start, source.len, true),
                |outcome| outcome.done_bytes == 0 && outcome.stop == Some(FillStop::Again),
            )?;
            let moved = outcome.done_bytes / PAGE_SIZE;
            self.note_taken(order, first + done, moved, block)?;
            done += moved;
            separated &= moved == 0;
            match outcome.stop {
                None => return Ok(None),
                // One of several owners after a fork: with a copy of its own it can be moved. A pinned page stays busy.
                Some(FillStop::Busy) if !separated => {
                    separated = true;
                    if own_memory::advise(order.range(first + done, 1), RangeAdvice::PopulateWrite).is_err() {
                        return Ok(Some(AgentStatus::Busy));
                    }
                }
                Some(FillStop::Again) if moved > 0 => {}
                Some(FillStop::Busy | FillStop::Again | FillStop::Exists) => return Ok(Some(AgentStatus::Busy)),
                Some(FillStop::Gone | FillStop::NoPage | FillStop::NoProcess) => return Ok(Some(AgentStatus::Gone)),
                Some(FillStop::Other(EINVAL)) if !matched => {
                    matched = true;
                    let locked = self.blocks[block].locked;
                    let block = if self.blocks[block].used == 0 { block } else { self.begin_block(blocks)? };
                    self.lock(block, !locked)?;
                }
                Some(FillStop::NoMemory | FillStop::Other(_)) => return Ok(Some(AgentStatus::Failed)),
            }
        }
        Ok(None)
    }

    fn begin_block(&mut self, blocks: &mut Vec<usize>) -> Result<usize, HookError> {
        let block = self.take_block()?;
        blocks.push(block);
        Ok(block)
    }

    /// Notes what has arrived in scratch, from what is there now: until it was moved, a page could still be written.
    fn note_taken(&mut self, order: &Order, first: u64, count: u64, block: usize) -> Result<(), HookError> {
        if count == 0 {
            return Ok(());
        }
        let into = order.page_in_block(first);
        let range = AddrRange { start: self.blocks[block].addr_of(into), len: count * PAGE_SIZE };
        for (at, kind) in (0..).zip(self.look(range)?) {
            let taken = Taken { block, page: into + at, status: status_of(kind) };
            self.taken.insert((order.region, order.first_page + first + at), taken);
            self.blocks[block].used += 1;
        }
        Ok(())
    }

    /// Copies what was taken out to the staging slot.
    fn stage(&self, order: &Order, statuses: &[AgentStatus], slot_offset: u64) -> Result<(), HookError> {
        let mut page = 0;
        while page < order.page_count {
            let place = |at: u64| {
                let moved = matches!(statuses[at as usize], AgentStatus::Moved | AgentStatus::MovedHuge);
                self.taken.get(&(order.region, order.first_page + at)).filter(|_| moved)
            };
            let Some(first) = place(page) else {
                page += 1;
                continue;
            };
            let follows = |at: &u64| {
                place(*at).is_some_and(|taken| taken.block == first.block && taken.page == first.page + (at - page))
            };
            let count = (page..order.page_count).take_while(follows).count() as u64;
            let block = &self.blocks[first.block];
            let from = block.head + first.page * PAGE_SIZE;
            block.memory.copy_to(from, &self.staging, slot_offset + page * PAGE_SIZE, count * PAGE_SIZE)?;
            page += count;
        }
        Ok(())
    }

    /// Pages that stay where they are; nobody can write them now.
    fn copy_out(&self, order: &Order, slot_offset: u64) -> Result<Vec<AgentRun>, HookError> {
        let count = self.mapped(order)?.page_count;
        let kinds = self.look(order.whole())?;
        let mut statuses = vec![AgentStatus::Gone; order.page_count as usize];
        let mut buffer = vec![0; COPY_BYTES];
        for page in 0..count {
            statuses[page as usize] = match kinds[page as usize] {
                None => AgentStatus::Zero,
                Some(kind) if kind.contains(Categories::PFNZERO) => AgentStatus::Zero,
                Some(_) => AgentStatus::Moved,
            };
        }
        let mut page = 0;
        while page < count {
            let data = (page..count).take_while(|at| statuses[*at as usize] == AgentStatus::Moved);
            let run = data.take(COPY_BYTES / PAGE_SIZE as usize).count() as u64;
            if run == 0 {
                page += 1;
                continue;
            }
            let bytes = &mut buffer[..(run * PAGE_SIZE) as usize];
            let read = process::vm_read(std::process::id(), order.range(page, run).start, bytes)?;
            if read != bytes.len() {
                return Err(HookError::Strange { call: "process_vm_readv", detail: format!("{read} bytes came") });
            }
            self.staging.write(slot_offset + page * PAGE_SIZE, bytes)?;
            page += run;
        }
        Ok(runs(&statuses))
    }

    fn drop_pages(&mut self, order: &Order, in_place: bool) -> Result<Vec<AgentRun>, HookError> {
        let mut touched = Vec::new();
        for page in order.first_page..order.first_page + order.page_count {
            if let Some(taken) = self.taken.remove(&(order.region, page)) {
                self.blocks[taken.block].used -= 1;
                touched.push(taken.block);
            }
        }
        touched.dedup();
        for block in touched {
            self.free_if_empty(block)?;
        }
        if in_place && order.addr != 0 {
            let count = self.mapped(order)?.page_count;
            let present = self.look(order.whole())?;
            if present[..count as usize].iter().any(Option::is_some) {
                let range = order.range(0, count);
                self.announce(range)?;
                own_memory::advise(range, RangeAdvice::DontNeedLocked)?;
            }
        }
        Ok(vec![AgentRun { page_count: order.page_count, status: AgentStatus::Moved }])
    }

    /// Writes into the diary what is dropped now.
    fn announce(&mut self, range: AddrRange) -> Result<(), HookError> {
        let entry = self.staging.len() - DIARY_BYTES + self.drops % DIARY_ENTRIES * 16;
        self.drops += 1;
        self.staging.store_u64(entry, range.start)?;
        self.staging.store_u64(entry + 8, range.end())
    }

    fn move_back(&mut self, order: &Order) -> Result<Vec<AgentRun>, HookError> {
        let mut statuses = vec![AgentStatus::Moved; order.page_count as usize];
        let mut page = 0;
        while page < order.page_count {
            let place = |at: u64| self.taken.get(&(order.region, order.first_page + at));
            let Some(first) = place(page).copied() else {
                page += 1;
                continue;
            };
            let follows =
                |at: &u64| place(*at).is_some_and(|t| t.block == first.block && t.page == first.page + (at - page));
            let count = (page..order.page_count).take_while(follows).count() as u64;
            let Some(done) = self.put_back(order.id, order.range(page, count), first)? else {
                statuses[page as usize] = AgentStatus::Gone;
                page += 1;
                continue;
            };
            for at in page..page + done {
                self.taken.remove(&(order.region, order.first_page + at));
            }
            let block = &mut self.blocks[first.block];
            block.used -= done;
            // Part of it is missing now.
            block.huge = false;
            self.free_if_empty(first.block)?;
            page += done;
        }
        Ok(runs(&statuses))
    }

    /// Puts some of the pages at `first` in scratch back, at least one; returns how many of them scratch need not keep. `None`:
    /// there is no such place, or not any more, or the program has changed it since; the pager knows whether there is another (mremap)
    /// and what is wanted.
    fn put_back(&self, order: u64, to: AddrRange, first: Taken) -> Result<Option<u64>, HookError> {
        let block = &self.blocks[first.block];
        let not_now = |outcome: &FillOutcome| {
            outcome.done_bytes == 0 && matches!(outcome.stop, Some(FillStop::Again | FillStop::NoMemory))
        };
        let move_pages = |len: u64| {
            let from = block.addr_of(first.page);
            patiently(|| self.fill(order, || self.uffd.move_pages(to.start, from, len, true)), not_now)
        };
        let outcome = move_pages(to.len)?;
        if outcome.done_bytes > 0 {
            return Ok(Some(outcome.done_bytes / PAGE_SIZE));
        }
        // The place may be several mappings by now, and some of them gone: a page is in one.
        let mut outcome = move_pages(PAGE_SIZE)?;
        if let Some(FillStop::Other(_) | FillStop::Busy) = outcome.stop {
            // Its protection has changed meanwhile: a copy goes anywhere.
            let offset = block.head + first.page * PAGE_SIZE;
            let copy = || self.uffd.copy(to.start, &block.memory, offset, PAGE_SIZE, CopyMode::default());
            outcome = patiently(|| self.fill(order, copy), not_now)?;
        }
        match outcome.stop {
            None | Some(FillStop::Exists | FillStop::NoProcess) => Ok(Some(1)),
            Some(FillStop::Gone | FillStop::NoPage) => Ok(None),
            // Not now: the page is safe where it is, and the pager may ask again.
            Some(_) => {
                Err(HookError::Strange { call: "UFFDIO_MOVE", detail: format!("{outcome:?} on the way back to {to}") })
            }
        }
    }

    /// Puts pages in place, unless the pager is reading events (`Again`) or has read one that has overtaken the order (`Gone`).
    fn fill(
        &self,
        order: u64,
        call: impl FnOnce() -> Result<FillOutcome, HookError>,
    ) -> Result<FillOutcome, HookError> {
        let stopped = |stop| Ok(FillOutcome { done_bytes: 0, stop: Some(stop) });
        match self.gate.fill(order, call) {
            Fill::Done(outcome) => outcome,
            Fill::Reading => stopped(FillStop::Again),
            Fill::Refused => stopped(FillStop::Gone),
        }
    }

    fn fill_huge(&mut self, order: &Order, slot_offset: u64) -> Result<Vec<AgentRun>, HookError> {
        let failed = Ok(vec![AgentRun { page_count: order.page_count, status: AgentStatus::Failed }]);
        if order.page_count != HUGE_PAGES || !order.addr.is_multiple_of(HUGE_BYTES) {
            return failed;
        }
        let Some(block) = self.huge_block()? else { return failed };
        let (from, to) = (self.blocks[block].range().start, order.addr);
        self.staging.copy_to(slot_offset, &self.blocks[block].memory, self.blocks[block].head, HUGE_BYTES)?;
        let outcome = again(
            || self.fill(order.id, || self.uffd.move_pages(to, from, HUGE_BYTES, false)),
            |outcome| outcome.done_bytes == 0 && outcome.stop == Some(FillStop::Again),
        )?;
        if outcome.is_complete() {
            self.blocks[block].huge = false;
            self.free.push(block);
            return Ok(vec![AgentRun { page_count: order.page_count, status: AgentStatus::MovedHuge }]);
        }
        if outcome.done_bytes > 0 {
            // It was split after all; what did not arrive is filled page by page by the pager.
            tracing::debug!(?outcome, "A huge page came home in part");
        }
        self.empty(block)?;
        failed
    }

    fn probe(&self, order: &Order) -> Result<Vec<AgentRun>, HookError> {
        let count = self.mapped(order)?.page_count;
        let kinds = self.look(order.whole())?;
        let status = |page: usize| match kinds[page] {
            _ if page as u64 >= count => AgentStatus::Gone,
            None => AgentStatus::Zero,
            Some(_) => AgentStatus::Moved,
        };
        Ok(runs(&(0..order.page_count as usize).map(status).collect::<Vec<_>>()))
    }
}

/// Repeats what met an unread event of this address space: the pager is reading it, or will.
fn again<T>(mut call: impl FnMut() -> Result<T, HookError>, is_again: impl Fn(&T) -> bool) -> Result<T, HookError> {
    let mut outcome = call()?;
    for _ in 0..AGAIN_TRIES {
        if !is_again(&outcome) {
            break;
        }
        std::thread::yield_now();
        outcome = call()?;
    }
    Ok(outcome)
}

/// As [`again`] for what must not be given up: until the pager, or the next one, has read its events.
fn patiently<T>(mut call: impl FnMut() -> Result<T, HookError>, is_again: impl Fn(&T) -> bool) -> Result<T, HookError> {
    let end = Instant::now() + PATIENCE;
    let mut outcome = again(&mut call, &is_again)?;
    while is_again(&outcome) && Instant::now() < end {
        // Nothing tells when somebody else has read an event.
        std::thread::park_timeout(Duration::from_millis(1));
        outcome = call()?;
    }
    Ok(outcome)
}

fn status_of(kind: Option<Categories>) -> AgentStatus {
    match kind {
        None => AgentStatus::Zero,
        Some(kind) if kind.contains(Categories::PFNZERO) => AgentStatus::Zero,
        Some(kind) if kind.contains(Categories::HUGE) => AgentStatus::MovedHuge,
        Some(_) => AgentStatus::Moved,
    }
}

fn runs(statuses: &[AgentStatus]) -> Vec<AgentRun> {
    let mut runs: Vec<AgentRun> = Vec::new();
    for status in statuses {
        match runs.last_mut() {
            Some(run) if run.status == *status => run.page_count += 1,
            _ => runs.push(AgentRun { page_count: 1, status: *status }),
        }
    }
    runs
}

#[cfg(test)]
mod tests;
