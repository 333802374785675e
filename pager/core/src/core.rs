//! The core itself: what it knows, how an event finds its handler, and what all handlers share.
//!
//! **One look a call.** A `Publish` is applied by the shell after `handle` returns, so a handler reads the directory before it
//! publishes and never again in the same call. That is why one call starts the work of one request only, and why the
//! end of a transfer merely marks waiting requests as ready.

use std::collections::{BTreeMap, VecDeque};

use crate::entry::{DEVICE_COUNT_MAX, Entry, PageState, PoisonReason};
use crate::event::{
    Action, CoreError, DeviceId, Directory, EntryRun, Event, Outcome, PageStatus, Pages, RegionId, ReqId, SpaceId,
    StepResult, Ticket,
};
use crate::fault::CpuOp;
use crate::frames::{FrameTable, Owner};
use crate::policy::Policy;
use crate::request::Request;
use crate::stats::Stats;
use crate::transfer::{Phase, Transfer};

/// Most pages of one transfer: 2 MiB.
pub const CHUNK_PAGES: u64 = 512;
/// Free frames scrubbed in one go after a restart, so that faults get in between.
const SCRUB_FRAMES: usize = 1024;
/// Owner of frames under scrub.
pub(crate) const KEEPER: Owner = Owner { region: RegionId(u64::MAX), page: 0 };

#[derive(Clone, Copy, Debug)]
pub(crate) struct RegionInfo {
    pub space: SpaceId,
    pub page_count: u64,
    pub in_place: bool,
    pub dying: bool,
    /// Transfers in flight.
    pub transfers: u32,
}

/// See the module head of the crate.
#[derive(Debug)]
pub struct Core<P> {
    pub(crate) policy: P,
    pub(crate) regions: BTreeMap<RegionId, RegionInfo>,
    pub(crate) frames: [Option<FrameTable>; DEVICE_COUNT_MAX as usize],
    pub(crate) failed_mask: u8,
    /// Devices whose free frames hold unknown bytes.
    unknown_mask: u8,
    pub(crate) transfers: BTreeMap<Ticket, Transfer>,
    pub(crate) cpu_ops: BTreeMap<Ticket, CpuOp>,
    scrubs: BTreeMap<Ticket, (DeviceId, Vec<(u32, u32)>)>,
    pub(crate) requests: BTreeMap<u64, Request>,
    /// Requests that can go on, in turn.
    pub(crate) ready: VecDeque<u64>,
    /// Steps that met EAGAIN.
    pub(crate) again: Vec<Ticket>,
    /// Transfers whose device is gone: they end at the next tick.
    pub(crate) doomed: Vec<Ticket>,
    /// Transfers whose system pages are not punched yet.
    pub(crate) punching: u32,
    next_ticket: u64,
    next_order: u64,
    pub(crate) stats: Stats,
}

impl<P: Policy> Core<P> {
    /// Knows nothing yet.
    pub fn new(policy: P) -> Self {
        Self {
            policy,
            regions: BTreeMap::new(),
            frames: Default::default(),
            failed_mask: 0,
            unknown_mask: 0,
            transfers: BTreeMap::new(),
            cpu_ops: BTreeMap::new(),
            scrubs: BTreeMap::new(),
            requests: BTreeMap::new(),
            ready: VecDeque::new(),
            again: Vec::new(),
            doomed: Vec::new(),
            punching: 0,
            next_ticket: 1,
            next_order: 1,
            stats: Stats::default(),
        }
    }

    /// Counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// A [`Event::Tick`] would do something now.
    pub fn has_runnable_work(&self) -> bool {
        !self.ready.is_empty() || !self.doomed.is_empty() || self.unknown_mask != 0
    }

    /// Nothing is in flight and nobody waits.
    pub fn idle(&self) -> bool {
        self.transfers.is_empty()
            && self.requests.is_empty()
            && self.cpu_ops.is_empty()
            && self.scrubs.is_empty()
            && !self.has_runnable_work()
    }

    /// Advice: device faults map system pages in place.
    pub fn set_in_place(&mut self, region: RegionId, on: bool) {
        if let Some(info) = self.regions.get_mut(&region) {
            info.in_place = on;
        }
    }

    /// Decides. Actions are appended to `out`; see the crate head for what the shell promises.
    pub fn handle(&mut self, dir: &impl Directory, _now_us: u64, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::CpuFault { region, page, wp, minor, .. } => self.cpu_fault(dir, region, page, wp, minor, out),
            Event::CpuFillDone { ticket, done_pages, stop } => self.cpu_fill_done(dir, ticket, done_pages, stop, out),
            Event::WpDone { ticket, result } => self.wp_done(ticket, result, out),
            Event::RevokeDone { ticket, .. } => self.revoke_done(dir, ticket, out),
            Event::CopyDone { ticket, result } | Event::ZeroDone { ticket, result } => {
                self.copy_done(ticket, result, out);
            }
            Event::PunchDone { ticket, result } => self.punch_done(ticket, result, out),
            Event::FillDone { ticket, done_pages, stop } => self.fill_done(ticket, done_pages, stop, out),
            Event::ScrubDone { ticket, result } => self.scrub_done(ticket, result),
            Event::Tick => self.tick(dir, out),
            Event::Migrate { req, region, pages, target } => {
                self.accept(Request::migrate(req, region, pages, target), out);
            }
            Event::Pin { req, region, pages, on } => {
                self.accept(Request::pin(req, region, pages, on), out);
            }
            Event::Resolve { req, region, pages, fault_page, device, .. } => {
                self.stats.device_faults += 1;
                let order = self.accept(Request::resolve(req, region, pages, fault_page, device), out);
                self.step_now(dir, order, out);
            }
            Event::Unmapped { region, pages } => {
                self.accept(Request::discard(region, pages), out);
            }
            // A hole in a settled system page reads as zero anyway; pages on a device are not the backing's to lose.
            Event::Removed { .. } | Event::DeviceDown { .. } => {}
            Event::RegionAdded { region, space, page_count } => self.add_region(region, space, page_count),
            Event::RegionFree { req, region } => self.begin_teardown(req, region, out),
            Event::SpaceGone { space } => self.scrub_space(space, out),
            Event::RecoverRegion { region, space, page_count } => {
                self.add_region(region, space, page_count);
                self.recover_region(dir, region, out);
            }
            Event::Recovered => {}
            Event::DeviceUp { device, frame_count, fresh_mappings, memory_known, memory_lost } => {
                self.device_up(dir, device, frame_count, fresh_mappings, memory_known, memory_lost, out);
            }
            Event::DeviceVoid { device } => self.clear_mapped(dir, device, out),
            Event::DeviceFailed { device } => self.device_failed(dir, device, out),
        }
    }

    pub(crate) fn ticket(&mut self) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        ticket
    }

    /// A page's entry; what does not decode counts as lost.
    pub(crate) fn entry(dir: &impl Directory, region: RegionId, page: u64) -> Entry {
        Entry::decode(dir.load(region, page)).unwrap_or(Entry::poisoned(PoisonReason::BadEntry))
    }

    /// First pages of `pages` that `take` accepts; `take` sees the offset and the entry.
    pub(crate) fn run_while(
        dir: &impl Directory,
        region: RegionId,
        pages: Pages,
        mut take: impl FnMut(u64, Entry) -> bool,
    ) -> Pages {
        let taken = pages.iter().take(CHUNK_PAGES as usize);
        let count = taken.take_while(|page| take(page - pages.first, Self::entry(dir, region, *page))).count() as u64;
        Pages { first: pages.first, count }
    }

    /// Nobody may begin anything with the page: it is on the move, or it has left and its system page is not punched yet.
    pub(crate) fn busy(&self, region: RegionId, page: u64, entry: Entry) -> bool {
        entry.is_moving() || self.punch_is_due(region, page)
    }

    fn punch_is_due(&self, region: RegionId, page: u64) -> bool {
        let due = |t: &Transfer| t.phase == Phase::Punch && t.region == region && t.pages.contains(page);
        self.punching > 0 && self.transfers.values().any(due)
    }

    /// First pages of `pages` on one device in consecutive frames; the first one is not busy.
    pub(crate) fn device_run(&self, dir: &impl Directory, region: RegionId, pages: Pages) -> (Pages, Entry, u8) {
        let first = Self::entry(dir, region, pages.first);
        let mut mask = 0;
        let run = Self::run_while(dir, region, pages, |offset, entry| {
            let follows = entry.state() == PageState::Device
                && entry.device() == first.device()
                && u64::from(entry.frame()) == u64::from(first.frame()) + offset
                && !self.busy(region, pages.first + offset, entry);
            if follows {
                mask |= entry.mapped_mask();
            }
            follows
        });
        (run, first, mask)
    }

    fn add_region(&mut self, region: RegionId, space: SpaceId, page_count: u64) {
        let info = RegionInfo { space, page_count, in_place: false, dying: false, transfers: 0 };
        self.regions.insert(region, info);
    }

    /// A region on its end: only its teardown may begin anything.
    pub(crate) fn is_dying(&self, region: RegionId) -> bool {
        self.regions.get(&region).is_none_or(|info| info.dying)
    }

    /// Some region is on its end: its frames come back soon.
    pub(crate) fn something_dies(&self) -> bool {
        self.regions.values().any(|info| info.dying)
    }

    /// Checks a request's range and queues it.
    pub(crate) fn accept(&mut self, request: Request, out: &mut Vec<Action>) -> u64 {
        let order = self.next_request_order();
        let refused = match self.regions.get(&request.region) {
            None => Some(CoreError::NoSuchRegion { region: request.region.0 }),
            Some(info) if info.dying => Some(CoreError::NoSuchRegion { region: request.region.0 }),
            Some(info) => {
                let (pages, page_count) = (request.pages, info.page_count);
                let fits = pages.first.checked_add(pages.count).is_some_and(|end| end <= page_count);
                let legal = fits && pages.count > 0 && request.target_is_inside();
                (!legal).then_some(CoreError::OutOfRange { first: pages.first, count: pages.count, page_count })
            }
        };
        if let Some(error) = refused {
            if let Some(req) = request.id {
                out.push(Action::Reply { req, outcome: Outcome::Failed(error) });
            }
            return order;
        }
        self.requests.insert(order, request);
        self.ready.push_back(order);
        order
    }

    pub(crate) fn next_request_order(&mut self) -> u64 {
        self.next_order += 1;
        self.next_order
    }

    /// Frames are being scrubbed: some come back soon.
    pub(crate) fn scrubbing(&self) -> bool {
        !self.scrubs.is_empty()
    }

    /// A transfer ended or a device came: whoever waited looks again.
    pub(crate) fn unblock_all(&mut self) {
        for (order, request) in &mut self.requests {
            if std::mem::take(&mut request.blocked) {
                self.ready.push_back(*order);
            }
        }
    }

    /// What a request has waited for is there: it looks before another one takes it away. Otherwise two devices that want the
    /// same page, or two requests that want the last frame, can undo each other's work for ever.
    pub(crate) fn prefer(&mut self, order: u64) {
        if self.requests.get(&order).is_none_or(Request::is_bulk) {
            return;
        }
        if let Some(place) = self.ready.iter().position(|other| *other == order) {
            self.ready.remove(place);
            self.ready.push_front(order);
        }
    }

    /// One step of one request, and whatever met EAGAIN once more.
    fn tick(&mut self, dir: &impl Directory, out: &mut Vec<Action>) {
        for ticket in std::mem::take(&mut self.again) {
            self.stats.retries += 1;
            self.repeat_step(dir, ticket, out);
        }
        if !self.doomed.is_empty() {
            // These publish, so nobody looks at the directory in the same call.
            for ticket in std::mem::take(&mut self.doomed) {
                self.end_doomed(ticket, out);
            }
            return;
        }
        if let Some(order) = self.ready.pop_front() {
            self.step(dir, order, out);
        } else if self.unknown_mask != 0 {
            self.scrub_unknown(out);
        }
    }

    fn step_now(&mut self, dir: &impl Directory, order: u64, out: &mut Vec<Action>) {
        if self.ready.back() == Some(&order) {
            self.ready.pop_back();
            self.step(dir, order, out);
        }
    }

    pub(crate) fn reply(&mut self, req: Option<ReqId>, outcome: Outcome, out: &mut Vec<Action>) {
        if let Some(req) = req {
            out.push(Action::Reply { req, outcome });
        }
    }

    /// Tells the request behind a transfer what became of some pages.
    pub(crate) fn note(&mut self, owner: Option<u64>, pages: Pages, status: PageStatus) {
        if let Some(request) = owner.and_then(|order| self.requests.get_mut(&order)) {
            request.note(pages, status);
        }
    }

    pub(crate) fn table(&mut self, device: DeviceId) -> Option<&mut FrameTable> {
        self.frames.get_mut(usize::from(device.0))?.as_mut()
    }

    pub(crate) fn release(&mut self, device: DeviceId, first: u32, count: u64) {
        if let Some(table) = self.table(device) {
            table.release(first, count as u32);
        }
    }

    /// Gives frames back that hold neither what they held before nor anything whole.
    pub(crate) fn release_torn(&mut self, device: DeviceId, first: u32, count: u64) {
        if let Some(table) = self.table(device) {
            table.release_unknown(first, count as u32);
            self.note_unknown(device);
        }
    }

    /// The device will not return, so nothing is asked of it any more.
    pub(crate) fn is_failed(&self, device: DeviceId) -> bool {
        self.failed_mask & (1 << device.0) != 0
    }

    pub(crate) fn publish_same(region: RegionId, pages: Pages, entry: Entry, out: &mut Vec<Action>) {
        if pages.count > 0 {
            let entries = EntryRun::Same { entry, count: pages.count };
            out.push(Action::Publish { region, first: pages.first, entries });
        }
    }

    pub(crate) fn publish_frames(region: RegionId, pages: Pages, entry_of_first: Entry, out: &mut Vec<Action>) {
        if pages.count > 0 {
            let entries = EntryRun::Frames { entry_of_first, count: pages.count };
            out.push(Action::Publish { region, first: pages.first, entries });
        }
    }

    fn scrub_space(&mut self, space: SpaceId, out: &mut Vec<Action>) {
        for device in (0..DEVICE_COUNT_MAX).map(DeviceId) {
            let runs = self.table(device).map(|table| table.begin_scrub(Some(space), KEEPER, usize::MAX));
            self.start_scrub(device, runs.unwrap_or_default(), out);
        }
    }

    fn scrub_unknown(&mut self, out: &mut Vec<Action>) {
        let device = DeviceId(self.unknown_mask.trailing_zeros() as u8);
        if self.is_failed(device) {
            self.unknown_mask &= !(1 << device.0);
            return;
        }
        let runs = self.table(device).map(|table| table.begin_scrub(None, KEEPER, SCRUB_FRAMES)).unwrap_or_default();
        if runs.is_empty() {
            self.unknown_mask &= !(1 << device.0);
        }
        self.start_scrub(device, runs, out);
    }

    pub(crate) fn note_unknown(&mut self, device: DeviceId) {
        self.unknown_mask |= 1 << device.0;
    }

    /// Frames of the runs are owned by [`KEEPER`] until the scrub is through; those of a failed device until it is back.
    pub(crate) fn start_scrub(&mut self, device: DeviceId, runs: Vec<(u32, u32)>, out: &mut Vec<Action>) {
        if runs.is_empty() || self.is_failed(device) {
            return;
        }
        let ticket = self.ticket();
        self.stats.scrubbed += runs.iter().map(|(_, count)| u64::from(*count)).sum::<u64>();
        self.scrubs.insert(ticket, (device, runs.clone()));
        out.push(Action::Scrub { ticket, device, runs });
    }

    /// The frames were replaced: scrubs of the old ones mean nothing.
    pub(crate) fn forget_scrubs(&mut self, device: DeviceId) {
        self.scrubs.retain(|_, (of, _)| *of != device);
    }

    fn scrub_done(&mut self, ticket: Ticket, result: StepResult) {
        let Some((device, runs)) = self.scrubs.remove(&ticket) else { return };
        // Frames that could not be scrubbed stay out of use: nobody shall read what they hold.
        if result == StepResult::Ok
            && let Some(table) = self.table(device)
        {
            table.scrubbed(&runs);
        }
        self.unblock_all();
    }
}
