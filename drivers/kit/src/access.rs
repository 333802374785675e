//! Direct accesses: a client has the device read or write a range by virtual address, without any kernel. Every driver can do it,
//! because the kit does it: it walks the device's page table as the device would, and asks for the whole rest of the range at
//! the first page that is missing.
//!
//! ```text
//!   Access --> [ walk: 64 pages a turn ] --all pages--> Accessed{pages, faults}
//!                |   |            ^   ^
//!                |   | missing    |   | resumed
//!                |   v            |   |
//!                |  [ one range fault: fault book, mirror, pager ] --failed--> error
//!                |                    |
//!                +-- no aperture --> [ one piece through the copy engine ]
//! ```
//! * **Revocation.** The walk runs in the driver's loop, so revocations by message cannot run meanwhile; those that the pager does
//!   itself are kept out by the loop's place in the gate ([`DevicePageTable::with_page`]). Devices without an aperture are revoked by
//!   message only, and while a piece of theirs is in flight acknowledgements are held back.
//! * **One fault a range.** A range fault is everything from the missing page to the end of the range, as far as the device has room for it. It is
//!   asked for piece by piece, a region or a mapping at a time, before the walk goes on: what may not be accessed further on fails the access
//!   before it has begun. It counts once; a page that was brought and is taken away again before the walk comes to it is another.
//! * **Progress.** A page that is taken away again between its fault and its access is asked for again after a pause; after a second
//!   without one page more the access fails with EBUSY.
//! * **Additions** are atomic against CPU, other devices and kernels where the CPU sees the page. In frames that it does not see they
//!   are read, changed and written by the engine: a writable frame is this device's alone, and kernels of the space do not run
//!   meanwhile (those that run already are waited for, those that are submitted wait).

pub(crate) mod buffers;
pub(crate) mod engine;
pub(crate) mod prepare;
mod stall;
mod transfer;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use uhmm_ipc::message::driver::AccessOp;
use uhmm_ipc::message::{ErrorCode, Fd, Reply, TraceId, WireError, driver};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kernel_hook::Window;

use crate::device::{
    DeviceMemory, DevicePageTable, Driver, FaultId, Job, JobId, JobQueue, JobReport, PAGE_BYTES, PageRange, Place,
    RegionKey,
};
use crate::fault::{FaultEvent, FaultRange, RANGE_PAGES_MAX};
use crate::run::{DriverLoop, Due};
use buffers::Buffers;
use engine::{PIECE_PAGES, Piece, Run, gather};
use prepare::Preparing;
use stall::{Next, STALL_LIMIT, Stall};
use transfer::{buffer_refused, check, transfer};

/// Pages of one turn: some tens of microseconds, so that the loop's other work is not kept waiting.
const TURN_PAGES: u64 = PIECE_PAGES;
/// The same where pages are only looked at.
const LOOKED_AT_PAGES: u64 = 32 * TURN_PAGES;
/// Faults of accesses are named by this bit and their job; the device's own never have it.
const ACCESS_FAULT: u64 = 1 << 63;
/// What a client asked for.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub space: u64,
    pub addr: u64,
    pub len_bytes: u64,
    pub op: AccessOp,
    pub buffer: Option<Fd>,
}

impl Wanted {
    fn page_count(&self) -> u64 {
        self.len_bytes / PAGE_BYTES
    }

    fn writes(&self) -> bool {
        !matches!(self.op, AccessOp::Read | AccessOp::Map | AccessOp::Peek)
    }

    /// Pages are brought and mapped, and that is all.
    fn needs_no_bytes(&self) -> bool {
        matches!(self.op, AccessOp::MakeExclusive | AccessOp::Map | AccessOp::MapForWrite)
    }

    /// First address behind the range.
    fn end(&self) -> u64 {
        self.addr + self.len_bytes
    }
}

/// One access under way.
#[derive(Debug)]
struct Access {
    wanted: Wanted,
    buffer: Option<Arc<Window>>,
    /// Pages done, or in the piece in flight.
    done_pages: u64,
    fault_count: u64,
    /// The range fault has brought what lies below this address (an exclusive one: as the device's alone).
    covered_end: u64,
    stall: Option<Stall>,
    trace: TraceId,
}

impl Access {
    fn new(wanted: Wanted, buffer: Option<Arc<Window>>, trace: TraceId) -> Self {
        Self { wanted, buffer, done_pages: 0, fault_count: 0, covered_end: 0, stall: None, trace }
    }

    /// Where the walk stands.
    fn at(&self) -> u64 {
        self.wanted.addr + self.done_pages * PAGE_BYTES
    }

    /// Missing here is no part of the range fault that there was.
    fn is_new_fault(&self) -> bool {
        self.fault_count == 0 || self.at() < self.covered_end
    }

    /// What the range fault has to bring yet. An access that stands still is content with its page.
    fn next_piece(&self, room_pages: u64) -> Option<(TraceId, Wanted, u64)> {
        let stands = self.stall.is_some_and(|stall| stall.page == self.done_pages && stall.tries > 0);
        let brought_pages = self.covered_end.saturating_sub(self.at()) / PAGE_BYTES;
        let more = self.covered_end < self.wanted.end() && (1..room_pages).contains(&brought_pages);
        (more && !stands).then(|| (self.trace, self.wanted.clone(), self.covered_end))
    }
}

/// Accesses under way.
#[derive(Debug, Default)]
pub(crate) struct AccessBook {
    accesses: BTreeMap<JobId, Access>,
    /// Those that do not wait for a fault, a pause or the engine, in turn.
    ready: VecDeque<JobId>,
    /// Whose piece the engine has.
    at_engine: Option<JobId>,
    /// Those that wait for the engine.
    engine_queue: VecDeque<JobId>,
    /// Quiescences that wait for the engine.
    held_tickets: Vec<u64>,
    /// The space in whose frames the engine adds.
    adding: Option<u64>,
    /// Kernels that wait until it has.
    held_jobs: Vec<Job>,
    /// Kernels that wait for their ranges.
    preparing: BTreeMap<JobId, Preparing>,
    pub(crate) buffers: Buffers<ConnId>,
}

/// Where a walk stands: a region, its first address and its pages.
type Here = Option<(RegionKey, u64, u64)>;

impl AccessBook {
    pub(crate) fn has_work(&self) -> bool {
        !self.ready.is_empty()
    }

    pub(crate) fn contains(&self, job: JobId) -> bool {
        self.accesses.contains_key(&job)
    }

    /// The access that a fault belongs to.
    pub(crate) fn job_of(fault: FaultId) -> Option<JobId> {
        (fault.0 & ACCESS_FAULT != 0).then_some(JobId(fault.0 & !ACCESS_FAULT))
    }

    /// What was revoked may still be in use by the engine: the ticket comes again when it is not.
    pub(crate) fn holds_back(&mut self, ticket: u64) -> bool {
        let in_flight = self.at_engine.is_some();
        if in_flight {
            self.held_tickets.push(ticket);
        }
        in_flight
    }

    /// The access's range fault has brought the pages below `end`.
    pub(crate) fn covered_until(&mut self, job: JobId, end: u64) {
        if let Some(access) = self.accesses.get_mut(&job) {
            access.covered_end = end;
        }
    }
}

/// How a turn ended.
enum Turn {
    More,
    Done,
    Missing,
    /// These pages go through the engine.
    Engine(Vec<Run>),
    EngineTaken,
    /// Kernels run where the engine would add.
    Contended,
    Failed(WireError),
}

impl<D: Driver> DriverLoop<D> {
    pub(crate) fn begin_access(
        &mut self,
        conn: ConnId,
        call: CallId,
        trace: TraceId,
        deadline: Option<Instant>,
        wanted: Wanted,
    ) -> Result<(), WireError> {
        self.jobs.check_queue(conn, wanted.space)?;
        let map = |buffer| self.accesses.buffers.map(conn, buffer, wanted.len_bytes);
        let buffer = check(&wanted)?.map(map).transpose().map_err(|error| buffer_refused(&error))?;
        let job = self.jobs.open_access(conn, call, wanted.space, trace)?;
        tracing::debug!(
            request = trace.0, job = job.0, space = wanted.space, addr = wanted.addr, len_bytes = wanted.len_bytes,
            op = ?wanted.op, "Access begins"
        );
        if let Some(deadline) = deadline {
            let timer = self.after(deadline.saturating_duration_since(Instant::now()), Due::JobDeadline(job));
            self.job_timers.insert(job, timer);
        }
        self.accesses.accesses.insert(job, Access::new(wanted, buffer, trace));
        self.accesses.ready.push_back(job);
        Ok(())
    }

    /// One turn of one access.
    pub(crate) fn step_access(&mut self) {
        let Some(job) = self.accesses.ready.pop_front() else { return };
        let Some(mut access) = self.accesses.accesses.remove(&job) else { return };
        let turn = self.walk(job, &mut access);
        let (page_count, fault_count) = (access.wanted.page_count(), access.fault_count);
        // What is not mapped is not brought.
        if access.wanted.op == AccessOp::Peek && matches!(turn, Turn::Missing) {
            let (page_count, at) = (access.done_pages, access.at());
            self.accesses.accesses.insert(job, access);
            return self.end_access(job, peeked(page_count, at));
        }
        let next = match turn {
            Turn::Missing | Turn::Contended => Stall::at(&mut access.stall, access.done_pages, Instant::now()),
            _ => Next::Try,
        };
        let fault = (matches!(turn, Turn::Missing) && next == Next::Try).then(|| self.missing(job, &mut access));
        let at = access.at();
        if let Turn::Engine(runs) = &turn {
            self.post(job, &access, runs.clone());
        }
        self.accesses.accesses.insert(job, access);
        match (turn, next) {
            (Turn::Missing | Turn::Contended, Next::Pause(pause)) => {
                self.after(pause, Due::Access(job));
            }
            (Turn::Missing, Next::GiveUp) => {
                self.end_access(job, Err(busy(at, "others took the page away again and again")))
            }
            (Turn::Contended, Next::GiveUp) => {
                let why = "kernels of the space run, and the CPU does not see this device's memory: submit a kernel that adds";
                self.end_access(job, Err(busy(at, why)));
            }
            (Turn::More, _) => self.goes_on(job),
            (Turn::Contended, _) => self.accesses.ready.push_back(job),
            (Turn::Missing, Next::Try) => fault.into_iter().for_each(|fault| self.step_faults(fault)),
            (Turn::Engine(_), _) => {}
            (Turn::EngineTaken, _) => self.accesses.engine_queue.push_back(job),
            (Turn::Failed(error), _) => self.end_access(job, Err(error)),
            (Turn::Done, _) => self.end_access(job, Ok(driver::Reply::Accessed { page_count, fault_count })),
        }
    }

    fn walk(&mut self, job: JobId, access: &mut Access) -> Turn {
        let op = access.wanted.op;
        if matches!(op, AccessOp::Map | AccessOp::MapForWrite) {
            return self.look(access);
        }
        let by_engine = self.window.is_none() && !access.wanted.needs_no_bytes();
        if by_engine && self.accesses.at_engine.is_some() {
            return Turn::EngineTaken;
        }
        if by_engine && matches!(op, AccessOp::FetchAdd(_)) && !self.additions_may_run(job, access.wanted.space) {
            return Turn::Contended;
        }
        let adds = matches!(op, AccessOp::FetchAdd(_));
        let alone = adds && !self.plan.coherent && self.additions_may_run(job, access.wanted.space);
        let (mut runs, mut here, mut end) = (Vec::new(), None, Turn::More);
        for _ in 0..TURN_PAGES {
            if access.done_pages == access.wanted.page_count() {
                end = Turn::Done;
                break;
            }
            match self.walk_page(access, &mut here, alone, by_engine.then_some(&mut runs)) {
                Ok(true) => access.done_pages += 1,
                Ok(false) => {
                    end = Turn::Missing;
                    break;
                }
                Err(error) => return Turn::Failed(error),
            }
        }
        if runs.is_empty() { end } else { Turn::Engine(runs) }
    }

    /// A turn of an access that only has its pages mapped.
    fn look(&mut self, access: &mut Access) -> Turn {
        let mut turn_pages = LOOKED_AT_PAGES;
        loop {
            let left_pages = access.wanted.page_count() - access.done_pages;
            if left_pages == 0 {
                return Turn::Done;
            }
            if turn_pages == 0 {
                return Turn::More;
            }
            let at = access.at();
            let Some((key, addr, page_count)) = self.attached_at(access.wanted.space, at) else { return Turn::Missing };
            let first = (at - addr) / PAGE_BYTES;
            let count = left_pages.min(turn_pages).min(page_count - first);
            match self.table.mapped_pages(key, PageRange { first, count }, access.wanted.writes()) {
                Ok(mapped) => {
                    access.done_pages += mapped.min(count);
                    turn_pages -= mapped.min(count);
                    if mapped < count {
                        return Turn::Missing;
                    }
                }
                Err(error) => return Turn::Failed(broken(at, &error.to_string())),
            }
        }
    }

    /// One page; false when it is missing. `here`: where the page before was. `runs`: the engine's, if it takes them.
    fn walk_page(
        &mut self,
        access: &Access,
        here: &mut Here,
        alone: bool,
        runs: Option<&mut Vec<Run>>,
    ) -> Result<bool, WireError> {
        let addr = access.at();
        let page_of = |(key, first, page_count): (RegionKey, u64, u64)| {
            let page = addr.checked_sub(first)? / PAGE_BYTES;
            (page < page_count).then_some((key, page))
        };
        if here.and_then(page_of).is_none() {
            *here = self.attached_at(access.wanted.space, addr);
        }
        let Some((key, page)) = here.and_then(page_of) else { return Ok(false) };
        // A mapping alone does not say that the page is the device's alone.
        if access.wanted.op == AccessOp::MakeExclusive && addr >= access.covered_end {
            return Ok(false);
        }
        let (window, mut result, mut runs) = (&self.window, Ok(()), runs);
        let lent =
            self.table.with_page(key, page, access.wanted.writes(), &mut |place| match (place, runs.as_deref_mut()) {
                (Place::Frame(frame), Some(runs)) => gather(runs, frame, access.done_pages),
                (place, _) => result = transfer(access, window.as_ref(), place, alone),
            });
        result.map_err(|failure| failure.at(addr))?;
        lent.map_err(|error| broken(addr, &error.to_string()))
    }

    /// The next turn is another client's, if one waits. Accesses of one client end in the order that they came in: it may be waiting for the
    /// first of them.
    fn goes_on(&mut self, job: JobId) {
        let space = |job: &JobId| self.accesses.accesses.get(job).map(|access| access.wanted.space);
        let mine = space(&job);
        if self.accesses.ready.iter().any(|other| space(other) != mine) {
            self.accesses.ready.push_back(job);
        } else {
            self.accesses.ready.push_front(job);
        }
    }

    /// The engine may add in frames of the space: no kernel changes them meanwhile.
    fn additions_may_run(&self, me: JobId, space: u64) -> bool {
        let held = |job: &JobId| self.accesses.held_jobs.iter().any(|held| held.id == *job);
        self.jobs.of_space(space).all(|job| job == me || self.accesses.contains(job) || held(&job))
    }

    fn post(&mut self, job: JobId, access: &Access, runs: Vec<Run>) {
        let (Some(buffer), Some(copy)) = (access.buffer.clone(), &self.copy) else { return };
        let op = access.wanted.op;
        self.accesses.at_engine = Some(job);
        self.accesses.adding = matches!(op, AccessOp::FetchAdd(_)).then_some(access.wanted.space);
        self.lane.post(Piece { op, buffer, runs });
        copy.wake();
    }

    /// The engine has ended a piece: everything that waited for it goes on.
    pub(crate) fn engine_events(&mut self) {
        let Some(outcome) = self.lane.outcome() else { return };
        let job = self.accesses.at_engine.take();
        self.accesses.adding = None;
        for held in std::mem::take(&mut self.accesses.held_jobs) {
            self.queue.submit(held);
        }
        for ticket in std::mem::take(&mut self.accesses.held_tickets) {
            self.quiesce(ticket);
        }
        let waiting = std::mem::take(&mut self.accesses.engine_queue);
        self.accesses.ready.extend(waiting);
        let Some(job) = job.filter(|job| self.accesses.contains(*job)) else { return };
        match outcome {
            Ok(()) => self.accesses.ready.push_back(job),
            Err(why) => {
                let addr = self.accesses.accesses.get(&job).map_or(0, |access| access.wanted.addr);
                self.end_access(job, Err(broken(addr, &why)));
            }
        }
    }

    /// A kernel runs now, or after the addition that is in flight in its space.
    pub(crate) fn start_job(&mut self, job: Job) {
        if self.accesses.adding == Some(job.space) {
            self.accesses.held_jobs.push(job);
        } else {
            self.queue.submit(job);
        }
    }

    /// Ends a kernel, or an access.
    pub(crate) fn cancel_job(&mut self, job: JobId, why: WireError) {
        if self.accesses.contains(job) {
            self.accesses.preparing.remove(&job);
            return self.end_access(job, Err(why));
        }
        let held = self.accesses.held_jobs.iter().position(|held| held.id == job);
        match held {
            Some(index) => {
                self.accesses.held_jobs.remove(index);
                self.port.finished(job, JobReport { result: Err(why), fault_count: 0, run_time_ns: 0 });
            }
            None => self.queue.cancel(job, why),
        }
        self.step_faults(FaultEvent::JobGone { job });
    }

    fn attached_at(&self, space: u64, addr: u64) -> Here {
        let of_space = RegionKey { space, region: 0 }..=RegionKey { space, region: u64::MAX };
        self.regions.range(of_space).find_map(|(key, attached)| {
            let page = addr.checked_sub(attached.map.addr)? / PAGE_BYTES;
            (page < attached.map.page_count).then_some((*key, attached.map.addr, attached.map.page_count))
        })
    }

    /// The walk's page is not there: the range fault begins, goes on behind what it had room for, or was in vain for this page.
    fn missing(&mut self, job: JobId, access: &mut Access) -> FaultEvent {
        let at = access.at();
        if access.is_new_fault() {
            access.fault_count += 1;
            self.stats.device_faults += 1;
        }
        access.covered_end = at;
        self.range_fault(job, access.trace, &access.wanted, at)
    }

    fn range_fault(&mut self, job: JobId, trace: TraceId, wanted: &Wanted, at: u64) -> FaultEvent {
        let (space, op) = (wanted.space, wanted.op);
        let fault = FaultId(ACCESS_FAULT | job.0);
        tracing::debug!(request = trace.0, job = job.0, space, addr = at, ?op, "Range fault");
        self.suspended.insert(fault, (job, Instant::now()));
        let range = Some(FaultRange { end: wanted.end(), exclusive: op == AccessOp::MakeExclusive });
        FaultEvent::Fault { fault, job, space, addr: at, write: wanted.writes(), range }
    }

    /// A piece of the range fault was answered: the next piece, if there is more to bring before the walk goes on.
    pub(crate) fn access_resumed(&mut self, job: JobId, outcome: Result<(), WireError>) -> Option<FaultEvent> {
        if let Err(error) = outcome {
            self.end_access(job, Err(error));
            return None;
        }
        // More than half of the device's memory would push out what was brought first.
        let room_pages = RANGE_PAGES_MAX.min(u64::from(self.memory.frame_count() / 2));
        let next = self.accesses.accesses.get(&job).and_then(|access| access.next_piece(room_pages));
        let Some((trace, wanted, at)) = next else {
            self.access_rested(job);
            return None;
        };
        Some(self.range_fault(job, trace, &wanted, at))
    }

    /// It may go on.
    pub(crate) fn access_rested(&mut self, job: JobId) {
        if self.accesses.contains(job) {
            self.accesses.ready.push_back(job);
        }
    }

    /// Tells the client, unless it is gone.
    pub(crate) fn end_access(&mut self, job: JobId, result: Result<driver::Reply, WireError>) {
        let Some(access) = self.accesses.accesses.remove(&job) else { return };
        self.accesses.ready.retain(|other| *other != job);
        self.accesses.engine_queue.retain(|other| *other != job);
        if self.prepared(job, &result) {
            return;
        }
        if let Some(timer) = self.job_timers.remove(&job) {
            self.cancel_timer(timer);
        }
        self.suspended.retain(|_, (of, _)| *of != job);
        self.step_faults(FaultEvent::JobGone { job });
        let Some(origin) = self.jobs.finished(job) else { return };
        let (fault_count, error) = (access.fault_count, result.as_ref().err().map(ToString::to_string));
        tracing::debug!(request = origin.trace.0, job = job.0, fault_count, error, "Access ended");
        self.stats.jobs += 1;
        self.stats.failed_jobs += u64::from(result.is_err());
        self.service.reactor.reply(origin.conn, origin.call, result.map(Reply::Driver));
    }
}

/// Up to the first page that the device does not map.
fn peeked(page_count: u64, at: u64) -> Result<driver::Reply, WireError> {
    if page_count == 0 {
        return Err(WireError::new(ErrorCode::NotFound, format!("The device maps nothing at address {at:#x}")));
    }
    Ok(driver::Reply::Accessed { page_count, fault_count: 0 })
}

fn broken(addr: u64, why: &str) -> WireError {
    WireError::new(ErrorCode::Io, format!("Device access of address {addr:#x} failed: {why}"))
}

fn busy(addr: u64, why: &str) -> WireError {
    let limit_ms = STALL_LIMIT.as_millis();
    WireError::new(
        ErrorCode::Busy,
        format!("Device access of address {addr:#x} made no progress in {limit_ms} ms: {why}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_of_accesses_are_told_from_the_devices_own() {
        assert_eq!(AccessBook::job_of(FaultId(ACCESS_FAULT | 7)), Some(JobId(7)));
        assert_eq!(AccessBook::job_of(FaultId(7)), None);
    }

    fn access(done_pages: u64, covered_pages: u64, fault_count: u64) -> Access {
        let wanted = Wanted { space: 1, addr: 0x10000, len_bytes: 100 * PAGE_BYTES, op: AccessOp::Read, buffer: None };
        let covered_end = if fault_count == 0 { 0 } else { wanted.addr + covered_pages * PAGE_BYTES };
        Access { done_pages, fault_count, covered_end, ..Access::new(wanted, None, TraceId(0)) }
    }

    #[test]
    fn what_a_range_fault_had_no_room_for_is_the_same_fault_and_what_was_lost_again_is_another() {
        assert!(access(0, 0, 0).is_new_fault(), "the first one");
        assert!(access(0, 0, 0).next_piece(50).is_none(), "nothing was brought");
        assert!(!access(40, 40, 1).is_new_fault(), "behind what was brought");
        assert!(!access(70, 40, 1).is_new_fault(), "behind pages that were there before");
        assert!(access(39, 40, 1).is_new_fault(), "brought and gone again");
    }

    #[test]
    fn a_range_fault_goes_on_piece_by_piece_until_its_end_or_the_devices_room() {
        let next = |access: Access| access.next_piece(50).map(|(_, _, at)| (at - 0x10000) / PAGE_BYTES);
        assert_eq!(next(access(10, 30, 1)), Some(30));
        assert_eq!(next(access(10, 60, 1)), None, "no room for more");
        assert_eq!(next(access(60, 100, 1)), None, "it is through");
        assert_eq!(next(access(10, 10, 1)), None, "the page itself was not brought: the walk decides");
        let (mut standing, now) = (access(10, 30, 1), Instant::now());
        standing.stall = Some(Stall { page: 10, since: now, tries: 1, rested: false });
        assert_eq!(next(standing), None, "an access that stands still takes what it gets");
    }

    #[test]
    fn quiescence_waits_for_the_piece_in_flight_and_for_no_later_one() {
        let mut book = AccessBook::default();
        assert!(!book.holds_back(1), "nothing is in flight");
        book.at_engine = Some(JobId(3));
        assert!(book.holds_back(2) && book.holds_back(3));
        assert_eq!(book.held_tickets, [2, 3], "both come again when it has ended");
    }
}
