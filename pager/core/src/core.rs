//! The core itself: what it knows, how an event finds its handler, and what all handlers share.
//!
//! **One look a call.** A `Publish` is applied by the shell after `handle` returns, so a handler reads the directory before it
//! publishes and never again in the same call. That is why one call starts the work of one request only, and why the
//! end of a transfer merely marks waiting requests as ready.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::clock::Search;
use crate::coherent::CpuMap;
use crate::ending::Endings;
use crate::entry::{DEVICE_COUNT_MAX, Entry, PoisonReason};
use crate::event::{
    Action, Backing, CoreError, DeviceId, Directory, EntryRun, Event, Only, Outcome, PageStatus, Pages, RegionId,
    ReqId, SpaceId, Ticket,
};
use crate::fault::CpuOp;
use crate::fork::ForkWait;
use crate::frames::{FrameTable, HUGE_PAGES, Owner};
use crate::policy::Policy;
use crate::ready::{Lane, Ready};
use crate::recovering::Recovering;
use crate::request::Request;
use crate::resolve::Resolve;
use crate::stats::Stats;
use crate::transfer::Transfer;
use crate::walk::Walk;

/// Most pages of one transfer: 2 MiB.
pub const CHUNK_PAGES: u64 = 512;
/// Entries that one step looks at: well below a millisecond.
const STEP_PAGES: u64 = 8192;
/// Owner of frames under scrub.
pub(crate) const KEEPER: Owner = Owner { region: RegionId(u64::MAX), page: 0 };

#[derive(Clone, Copy, Debug)]
pub(crate) struct RegionInfo {
    pub space: SpaceId,
    pub page_count: u64,
    pub backing: Backing,
    pub dying: bool,
    /// Transfers in flight.
    pub transfers: u32,
    /// Requests that wait, without its end.
    pub requests: u32,
}

/// See the module head of the crate.
#[derive(Debug)]
pub struct Core<P> {
    pub(crate) policy: P,
    pub(crate) regions: BTreeMap<RegionId, RegionInfo>,
    pub(crate) frames: [Option<FrameTable>; DEVICE_COUNT_MAX as usize],
    pub(crate) failed_mask: u8,
    /// Devices whose frames the program may map.
    pub(crate) coherent_mask: u8,
    /// Frames on their way into the program's page table.
    pub(crate) cpu_maps: BTreeMap<Ticket, CpuMap>,
    /// Devices whose free frames hold unknown bytes.
    pub(crate) unknown_mask: u8,
    pub(crate) transfers: BTreeMap<Ticket, Transfer>,
    pub(crate) cpu_ops: BTreeMap<Ticket, CpuOp>,
    pub(crate) scrubs: BTreeMap<Ticket, (DeviceId, Vec<(u32, u32)>)>,
    /// Clients whose frames are to be scrubbed, some each turn.
    pub(crate) gone_spaces: VecDeque<SpaceId>,
    pub(crate) requests: BTreeMap<u64, Request>,
    /// Searches for somebody who makes room that are not through, by request.
    pub(crate) searches: BTreeMap<u64, Search>,
    /// Requests that can go on, in turn.
    pub(crate) ready: Ready,
    /// Requests that wait until a transfer ends.
    pub(crate) blocked: BTreeSet<u64>,
    /// Requests that wait for the clock.
    pub(crate) paused: BTreeSet<u64>,
    /// What is done to every page because of a device, some pages each turn.
    pub(crate) walks: VecDeque<Walk>,
    /// What a dead pager has left, some pages each turn.
    pub(crate) recovering: Recovering,
    /// The last turn was a walk's.
    pub(crate) walked: bool,
    /// Pages that one step looks at before others get their turn.
    pub(crate) budget: u64,
    /// Requests that bring home what did not come with a CPU fault, by region, first page and count.
    pub(crate) follows: BTreeMap<(RegionId, u64, u64), u64>,
    /// Range faults that have mapped a part of their window.
    pub(crate) half_mapped: BTreeSet<u64>,
    /// Regions on their end.
    pub(crate) endings: Endings,
    /// Steps that met EAGAIN.
    pub(crate) again: Vec<Ticket>,
    /// Steps that found no memory: when they try again.
    pub(crate) later: Vec<(u64, Ticket)>,
    /// Transfers whose device is gone: they end at the next tick.
    pub(crate) doomed: Vec<Ticket>,
    /// Transfers whose pages look settled and are not ([`Transfer::holds`]).
    pub(crate) holding: u32,
    /// Transfers that have ended: a step of a request that ends one has got somewhere.
    pub(crate) ended: u64,
    /// Content that was given up while its pages were on the way, by transfer.
    pub(crate) discards: BTreeMap<Ticket, Vec<Pages>>,
    /// CPU faults that wait for the end of a device's timeslice: when, where.
    pub(crate) late_wakes: Vec<(u64, RegionId, u64)>,
    /// Regions where no huge page was to be had lately: until when CPU faults do without.
    pub(crate) no_huge_until_us: BTreeMap<RegionId, u64>,
    /// Where the last huge page that a CPU fault brought home ends.
    pub(crate) last_huge: (RegionId, u64),
    /// What transfers told a request whose step is under way.
    pub(crate) late_notes: Vec<(u64, Pages, PageStatus)>,
    /// Pages of forked children that wait for the parent's.
    pub(crate) fork_waits: Vec<ForkWait>,
    /// Spaces whose device memory is limited, by group, and the groups' limits in pages.
    pub(crate) groups: BTreeMap<SpaceId, u16>,
    pub(crate) group_limits: BTreeMap<u16, u64>,
    /// The same, of one device.
    pub(crate) device_limits: BTreeMap<(u16, DeviceId), u64>,
    /// Test hook: allocations until one fails, by space; huge ones apart.
    pub(crate) failing_allocation: BTreeMap<(SpaceId, bool), u32>,
    /// Clock of the event that is being handled.
    pub(crate) now_us: u64,
    /// The request whose step is under way, or 0.
    pub(crate) stepping: ReqId,
    /// Device faults that have waited for a frame, by order.
    pub(crate) frame_waits: BTreeSet<u64>,
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
            coherent_mask: 0,
            cpu_maps: BTreeMap::new(),
            unknown_mask: 0,
            transfers: BTreeMap::new(),
            cpu_ops: BTreeMap::new(),
            scrubs: BTreeMap::new(),
            gone_spaces: VecDeque::new(),
            requests: BTreeMap::new(),
            searches: BTreeMap::new(),
            ready: Ready::default(),
            blocked: BTreeSet::new(),
            paused: BTreeSet::new(),
            walks: VecDeque::new(),
            recovering: Recovering::default(),
            walked: false,
            budget: STEP_PAGES,
            follows: BTreeMap::new(),
            half_mapped: BTreeSet::new(),
            endings: Endings::new(),
            again: Vec::new(),
            later: Vec::new(),
            doomed: Vec::new(),
            holding: 0,
            ended: 0,
            discards: BTreeMap::new(),
            fork_waits: Vec::new(),
            late_notes: Vec::new(),
            late_wakes: Vec::new(),
            no_huge_until_us: BTreeMap::new(),
            last_huge: (RegionId(0), 0),
            groups: BTreeMap::new(),
            group_limits: BTreeMap::new(),
            device_limits: BTreeMap::new(),
            failing_allocation: BTreeMap::new(),
            now_us: 0,
            stepping: ReqId(0),
            frame_waits: BTreeSet::new(),
            next_ticket: 1,
            next_order: 1,
            stats: Stats::default(),
        }
    }

    /// Another number of pages than usual that one step looks at before others get their turn: with few, small regions take many turns too.
    #[must_use]
    pub fn with_budget(self, pages: u64) -> Self {
        Self { budget: pages.max(1), ..self }
    }

    /// Frames of a device, and those of them that are free; `None`: it has not logged in.
    pub fn frame_counts(&self, device: DeviceId) -> Option<(u32, u32)> {
        let table = self.frames.get(usize::from(device.0))?.as_ref()?;
        Some((table.frame_count(), table.free_count()))
    }

    /// Counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Somebody holds the program to a limit by sending pages of this region away: see [`Policy::is_held_to_a_limit`].
    pub fn is_held_to_a_limit(&mut self, region: RegionId) {
        self.policy.is_held_to_a_limit(region);
    }

    /// A [`Event::Tick`] would do something now.
    pub fn has_runnable_work(&self) -> bool {
        let walks = !self.walks.is_empty() || !self.gone_spaces.is_empty() || self.recovering.any();
        !self.ready.is_empty() || !self.doomed.is_empty() || walks || self.may_scrub_unknown()
    }

    /// When a [`Event::Tick`] would do something that it would not do now, on the clock of `handle`.
    pub fn next_deadline_us(&self) -> Option<u64> {
        let paused = self.paused.iter().filter_map(|order| self.requests.get(order)?.not_before_us());
        let paused = paused.chain(self.later.iter().map(|(until_us, _)| *until_us));
        paused.chain(self.late_wakes.iter().map(|(until_us, ..)| *until_us)).min()
    }

    /// Nothing is in flight and nobody waits.
    pub fn idle(&self) -> bool {
        self.transfers.is_empty()
            && self.requests.is_empty()
            && self.cpu_ops.is_empty()
            && self.cpu_maps.is_empty()
            && self.scrubs.is_empty()
            && !self.has_runnable_work()
    }

    /// Decides. Actions are appended to `out`; see the crate head for what the shell promises.
    pub fn handle(&mut self, dir: &impl Directory, now_us: u64, event: Event, out: &mut Vec<Action>) {
        self.now_us = now_us;
        match event {
            Event::CpuFault { region, page, wp, minor, .. } => {
                if !self.recover_met(dir, region, page, out) {
                    self.cpu_fault(dir, region, page, wp, minor, out);
                }
            }
            Event::CpuFillDone { ticket, done_pages, stop } => self.cpu_fill_done(dir, ticket, done_pages, stop, out),
            Event::CpuMapped { ticket, result } => self.frames_shown(dir, ticket, result, out),
            Event::WpDone { ticket, result } => self.wp_done(ticket, result, out),
            Event::RevokeDone { ticket, .. } => self.revoke_done(dir, ticket, out),
            Event::CopyDone { ticket, result } | Event::ZeroDone { ticket, result } => {
                self.copy_done(ticket, result, out);
            }
            Event::PunchDone { ticket, result } => self.punch_done(dir, ticket, result, out),
            Event::NotPunched { ticket, left } => self.not_punched(dir, ticket, &left, out),
            Event::FillDone { ticket, done_pages, stop } => self.fill_done(ticket, done_pages, stop, out),
            Event::PoisonDone { ticket, result } => self.poison_done(ticket, result, out),
            Event::ScrubDone { ticket, result } => self.scrub_done(ticket, result),
            Event::Tick => self.tick(dir, out),
            Event::CopiedRuns { ticket, runs } => self.copied_runs(ticket, &runs, out),
            Event::MoveBackDone { ticket, result } => self.move_back_done(ticket, result, out),
            Event::Migrate { req, region, pages, target } => {
                self.accept(Request::migrate(req, region, pages, target, Only::All), out);
            }
            Event::MigrateOnly { req, region, pages, target, only } => {
                self.accept(Request::migrate(req, region, pages, target, only), out);
            }
            Event::Pin { req, region, pages, on } => {
                self.accept(Request::pin(req, region, pages, on), out);
            }
            Event::Resolve { req, region, pages, fault_page, device, write, whole, exclusive } => {
                self.stats.device_faults += 1;
                let write = write || exclusive;
                let wish = Resolve { fault_page, device, write, whole, exclusive, in_place_from: u64::MAX };
                let order = self.accept(Request::resolve(req, region, pages, wish), out);
                self.step_now(dir, order, out);
            }
            Event::Unmapped { region, pages } | Event::Removed { region, pages } if self.is_private(region) => {
                self.discard_now(dir, region, pages, out);
            }
            // A file's content is its owner's, whoever maps it.
            Event::Unmapped { region, .. } if self.backing(region) == Some(Backing::File) => {}
            Event::Unmapped { region, pages } => {
                self.accept(Request::discard(None, region, pages), out);
            }
            Event::Discard { req, region, pages } => {
                self.accept(Request::discard(Some(req), region, pages), out);
            }
            Event::RevokeMappings { req, region, pages, devices } => {
                self.accept(Request::revoke(req, region, pages, u16::from(devices)), out);
            }
            Event::Evict { req, space, device, page_count } => self.accept_evict(req, space, device, page_count, out),
            Event::Used { region, pages, device } => self.used(dir, region, pages, device),
            Event::InjectAllocation { space, huge, nth } => {
                self.failing_allocation.insert((space, huge), nth);
            }
            Event::Forked { parent, child, space } => self.forked(dir, parent, child, space, out),
            Event::ForkedBefore { parent, child } => self.forked_before(dir, parent, child, out),
            // A hole in a settled system page reads as zero anyway; pages on a device are not the backing's to lose.
            Event::Removed { .. } | Event::DeviceDown { .. } => {}
            Event::RegionAdded { region, space, page_count, backing } => {
                self.add_region(region, space, page_count, backing);
            }
            Event::RegionFree { req, region } => self.begin_teardown(req, region, out),
            Event::SpaceGone { space } => {
                self.set_group(space, None);
                self.scrub_space(space, out);
            }
            Event::SpaceGroup { space, group, limit_pages } => self.set_group(space, Some((group, limit_pages))),
            Event::GroupOnDevice { group, device, limit_pages } => {
                self.device_limits.insert((group, device), limit_pages);
            }
            Event::RecoverRegion { region, space, page_count, backing, strays } => {
                self.add_region(region, space, page_count, backing);
                self.begin_recovery(dir, region, strays, out);
            }
            Event::RecoverNow { region } => self.recover_now(dir, region, out),
            Event::Recovered => {}
            Event::DeviceUp { device, frame_count, fresh_mappings, memory_known, memory_lost, coherent } => {
                self.note_coherent(device, coherent);
                self.device_up(dir, device, frame_count, fresh_mappings, memory_known, memory_lost, out);
            }
            Event::DeviceVoid { device } => self.device_void(dir, device, out),
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
        Self::entry_of(dir.load(region, page))
    }

    fn entry_of(word: u64) -> Entry {
        Entry::decode(word).unwrap_or(Entry::poisoned(PoisonReason::BadEntry))
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

    /// Pages in runs that are known to be alike, with their entry: one step for what was never touched, however large.
    pub(crate) fn alike_parts(
        dir: &impl Directory,
        region: RegionId,
        pages: Pages,
    ) -> impl Iterator<Item = (Pages, Entry)> {
        let mut left = pages;
        std::iter::from_fn(move || {
            if left.count == 0 {
                return None;
            }
            let (count, word) = dir.look(region, left.first);
            let run = Pages { count: count.clamp(1, left.count), ..left };
            left = left.after(run.count);
            Some((run, Self::entry_of(word)))
        })
    }

    /// As `run_while`, but as far as it goes.
    pub(crate) fn whole_run(
        dir: &impl Directory,
        region: RegionId,
        pages: Pages,
        mut take: impl FnMut(Entry) -> bool,
    ) -> Pages {
        let parts = Self::alike_parts(dir, region, pages).take_while(|(_, entry)| take(*entry));
        Pages { count: parts.map(|(run, _)| run.count).sum(), ..pages }
    }

    /// The first pages if they are several and known to be alike, in one step however large; none of them is busy.
    pub(crate) fn wide_run(&self, dir: &impl Directory, region: RegionId, pages: Pages) -> Option<Pages> {
        let run = Pages { count: dir.alike(region, pages.first).min(pages.count), ..pages };
        let held = self.transfers.values().filter(|transfer| transfer.holds() && transfer.region == region);
        let held = held.filter_map(|transfer| transfer.pages.overlap(run)).map(|held| held.first).min();
        let run = Pages { count: held.map_or(run.count, |page| page - run.first), ..run };
        (run.count > 1).then_some(run)
    }

    /// Nobody may begin anything with the page: it is on the move, or it has left and its system page is not punched yet.
    pub(crate) fn busy(&self, region: RegionId, page: u64, entry: Entry) -> bool {
        entry.is_moving() || self.is_held(region, page)
    }

    fn is_held(&self, region: RegionId, page: u64) -> bool {
        let held = |t: &Transfer| t.holds() && t.region == region && t.pages.contains(page);
        self.holding > 0 && self.transfers.values().any(held)
    }

    /// First pages of `pages` that are alike, in consecutive frames of one device; the first one is not busy. Also its entry, and
    /// everybody who maps any of them.
    pub(crate) fn frame_run(&self, dir: &impl Directory, region: RegionId, pages: Pages) -> (Pages, Entry, u16) {
        let first = Self::entry(dir, region, pages.first);
        let mut mask = 0;
        let run = Self::run_while(dir, region, pages, |offset, entry| {
            let follows = entry.owns_frame()
                && entry.state() == first.state()
                && entry.device() == first.device()
                && (entry.shared(), entry.pinned(), entry.huge()) == (first.shared(), first.pinned(), first.huge())
                && entry.discarded() == first.discarded()
                && u64::from(entry.frame()) == u64::from(first.frame()) + offset
                && !self.busy(region, pages.first + offset, entry);
            if follows {
                mask |= entry.mapped_mask();
            }
            follows
        });
        (run, first, mask)
    }

    /// First pages of `pages` up to the next boundary of a huge page.
    pub(crate) fn to_huge_boundary(dir: &impl Directory, region: RegionId, pages: Pages) -> Pages {
        let size = u64::from(HUGE_PAGES);
        let into = (pages.first + size - dir.huge_phase(region) % size) % size;
        Pages { count: pages.count.min(size - into), ..pages }
    }

    /// Some pages of huge pages go their own way: those that stay are small from now on.
    pub(crate) fn split_huge(&self, dir: &impl Directory, region: RegionId, pages: Pages, out: &mut Vec<Action>) {
        let size = u64::from(HUGE_PAGES);
        for edge in [pages.first, pages.end() - 1] {
            let entry = Self::entry(dir, region, edge);
            if !entry.huge() {
                continue;
            }
            let into = u64::from(entry.frame()) % size;
            let Some(start) = edge.checked_sub(into) else { continue };
            for page in (start..start + size).filter(|page| !pages.contains(*page)) {
                let entry = Self::entry(dir, region, page);
                if entry.huge() {
                    Self::publish_same(region, Pages::one(page), entry.with_huge(false), out);
                }
            }
        }
    }

    pub(crate) fn add_region(&mut self, region: RegionId, space: SpaceId, page_count: u64, backing: Backing) {
        let info = RegionInfo { space, page_count, backing, dying: false, transfers: 0, requests: 0 };
        self.regions.insert(region, info);
    }

    /// Only the client itself can take its pages out.
    pub(crate) fn is_private(&self, region: RegionId) -> bool {
        self.backing(region) == Some(Backing::Private)
    }

    pub(crate) fn backing(&self, region: RegionId) -> Option<Backing> {
        self.regions.get(&region).map(|info| info.backing)
    }

    /// A region on its end: only its teardown may begin anything.
    pub(crate) fn is_dying(&self, region: RegionId) -> bool {
        self.regions.get(&region).is_none_or(|info| info.dying)
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
                if request.is_not_for_files() && info.backing == Backing::File {
                    Some(CoreError::NotMigratable { region: request.region.0 })
                } else {
                    (!legal).then_some(CoreError::OutOfRange { first: pages.first, count: pages.count, page_count })
                }
            }
        };
        if let Some(error) = refused {
            if let Some(req) = request.id {
                out.push(Action::Reply { req, outcome: Outcome::Failed(error) });
            }
            return order;
        }
        let Some(info) = self.regions.get_mut(&request.region) else { return order };
        info.requests += 1;
        let (space, goes_away) = (info.space, request.goes_away());
        if goes_away {
            self.stop_following(request.region);
        }
        let mut request = request;
        request.lane = Lane::Space(space);
        self.queue(order, request);
        order
    }

    /// It can go on.
    pub(crate) fn queue(&mut self, order: u64, request: Request) {
        self.ready.push(request.lane, order);
        self.requests.insert(order, request);
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
        for order in std::mem::take(&mut self.blocked) {
            if let Some(request) = self.requests.get(&order) {
                self.ready.push(request.lane, order);
            }
        }
    }

    /// What a request has waited for is there: it looks before another one takes it away. Otherwise two devices that want the
    /// same page, or two requests that want the last frame, can undo each other's work for ever.
    pub(crate) fn prefer(&mut self, order: u64) {
        if let Some(request) = self.requests.get(&order).filter(|request| !request.is_bulk()) {
            self.ready.prefer(request.lane, order);
        }
    }

    fn step_now(&mut self, dir: &impl Directory, order: u64, out: &mut Vec<Action>) {
        let lane = self.requests.get(&order).map(|request| request.lane);
        if lane.is_some_and(|lane| self.ready.take_newest(lane, order)) {
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
        let Some(order) = owner else { return };
        match self.requests.get_mut(&order) {
            Some(request) => request.note(pages, status),
            // It ended within the step that began it.
            None => self.late_notes.push((order, pages, status)),
        }
    }

    pub(crate) fn table(&mut self, device: DeviceId) -> Option<&mut FrameTable> {
        self.frames.get_mut(usize::from(device.0))?.as_mut()
    }

    pub(crate) fn release(&mut self, device: DeviceId, first: u32, count: u64, owner: Owner) {
        if let Some(table) = self.rebuilding(device) {
            table.release_claimed(first, count as u32, owner);
        } else if self.table(device).is_some_and(|table| table.release(first, count as u32, owner)) {
            self.note_unknown(device);
        }
    }

    /// Gives frames back that hold neither what they held before nor anything whole.
    pub(crate) fn release_torn(&mut self, device: DeviceId, first: u32, count: u64, owner: Owner) {
        if let Some(table) = self.table(device) {
            table.release_unknown(first, count as u32, owner);
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
}
