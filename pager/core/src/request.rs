//! Requests: what somebody waits for. A step looks at the directory once and starts at most one transfer.
//!
//! A request that meets pages on the move, a full device or a device that never logged in is *blocked*; the end of any transfer
//! makes it look again. It owns nothing while it waits, so requests cannot deadlock each other.

use crate::core::{CHUNK_PAGES, Core};
use crate::entry::{Entry, PageState};
use crate::event::{
    Action, CoreError, DeviceId, Directory, MapKind, MapRun, Outcome, PageStatus, Pages, RegionId, ReqId, StatusRun,
    Target,
};
use crate::frames::Owner;
use crate::policy::{DeviceFaultAction, Policy};

/// Transfers that one migration keeps in flight, so that a driver's copy engine has something to do.
const OUTSTANDING_MAX: u32 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Migrate { target: Target },
    Resolve { fault_page: u64, device: DeviceId },
    Pin { on: bool },
    Discard,
    Teardown,
}

/// What somebody waits for.
#[derive(Debug)]
pub(crate) struct Request {
    pub id: Option<ReqId>,
    pub region: RegionId,
    pub pages: Pages,
    kind: Kind,
    /// First page not dealt with.
    cursor: u64,
    /// Fate by page (migrations only).
    status: Vec<PageStatus>,
    moved_pages: u64,
    /// A copy of the page that matters failed.
    failed: Option<PageStatus>,
    /// Pages that could not leave the device they are on (migrations only).
    stranded: Option<(Pages, PageStatus)>,
    /// Transfers in flight.
    pub outstanding: u32,
    pub blocked: bool,
}

impl Request {
    fn new(id: Option<ReqId>, region: RegionId, pages: Pages, kind: Kind) -> Self {
        Self {
            id,
            region,
            pages,
            kind,
            cursor: pages.first,
            status: Vec::new(),
            moved_pages: 0,
            failed: None,
            stranded: None,
            outstanding: 0,
            blocked: false,
        }
    }

    pub fn migrate(req: ReqId, region: RegionId, pages: Pages, target: Target) -> Self {
        Self::new(Some(req), region, pages, Kind::Migrate { target })
    }

    pub fn resolve(req: ReqId, region: RegionId, pages: Pages, fault_page: u64, device: DeviceId) -> Self {
        Self::new(Some(req), region, pages, Kind::Resolve { fault_page, device })
    }

    pub fn pin(req: ReqId, region: RegionId, pages: Pages, on: bool) -> Self {
        Self::new(Some(req), region, pages, Kind::Pin { on })
    }

    pub fn discard(region: RegionId, pages: Pages) -> Self {
        Self::new(None, region, pages, Kind::Discard)
    }

    pub fn teardown(req: Option<ReqId>, region: RegionId, page_count: u64) -> Self {
        Self::new(req, region, Pages { first: 0, count: page_count }, Kind::Teardown)
    }

    pub fn is_teardown_of(&self, region: RegionId) -> bool {
        self.kind == Kind::Teardown && self.region == region
    }

    pub fn is_teardown(&self) -> bool {
        self.kind == Kind::Teardown
    }

    /// It goes through many pages and is content with its turn.
    pub fn is_bulk(&self) -> bool {
        matches!(self.kind, Kind::Migrate { .. } | Kind::Discard | Kind::Teardown)
    }

    /// What is named beside the range lies in it, and devices exist.
    pub fn target_is_inside(&self) -> bool {
        match self.kind {
            Kind::Resolve { fault_page, device } => {
                self.pages.contains(fault_page) && device.0 < crate::DEVICE_COUNT_MAX
            }
            Kind::Migrate { target: Target::Device(device) } => device.0 < crate::DEVICE_COUNT_MAX,
            _ => true,
        }
    }

    /// A transfer tells what became of some pages.
    pub fn note(&mut self, pages: Pages, status: PageStatus) {
        match self.kind {
            // The first leg of a way from device to device: the pages are still to be dealt with.
            Kind::Migrate { .. } if pages.first >= self.cursor => {
                self.stranded = (status != PageStatus::Ok).then_some((pages, status));
            }
            Kind::Migrate { .. } => {
                self.record(pages, status);
                if status == PageStatus::Ok {
                    self.moved_pages += pages.count;
                }
            }
            Kind::Resolve { fault_page, .. } if status != PageStatus::Ok && pages.contains(fault_page) => {
                self.failed = Some(status);
            }
            // A page that cannot come home is not waited for for ever.
            Kind::Pin { .. } if status != PageStatus::Ok => self.cursor = self.cursor.max(pages.end()),
            _ => {}
        }
    }

    fn record(&mut self, pages: Pages, status: PageStatus) {
        if self.status.is_empty() {
            self.status = vec![PageStatus::Busy; self.pages.count as usize];
        }
        let from = (pages.first - self.pages.first) as usize;
        self.status[from..from + pages.count as usize].fill(status);
    }

    fn runs(&self) -> Vec<StatusRun> {
        let mut runs: Vec<StatusRun> = Vec::new();
        if self.status.is_empty() {
            runs.push(StatusRun { first: self.pages.first, count: self.pages.count, status: PageStatus::Busy });
        }
        for (offset, status) in self.status.iter().enumerate() {
            match runs.last_mut() {
                Some(run) if run.status == *status => run.count += 1,
                _ => runs.push(StatusRun { first: self.pages.first + offset as u64, count: 1, status: *status }),
            }
        }
        runs
    }

    fn left(&self) -> Pages {
        Pages { first: self.cursor, count: self.pages.end().saturating_sub(self.cursor) }
    }
}

/// What a step leaves behind.
enum Next {
    /// More at the next tick.
    Again,
    /// When a transfer has ended.
    Wait,
    /// Finished.
    Reply(Outcome),
}

impl<P: Policy> Core<P> {
    pub(crate) fn step(&mut self, dir: &impl Directory, order: u64, out: &mut Vec<Action>) {
        let Some(mut request) = self.requests.remove(&order) else { return };
        // The request is put back before transfers of this step report to it.
        let kind = request.kind;
        let next = match kind {
            Kind::Migrate { target } => self.step_migrate(dir, order, &mut request, target, out),
            Kind::Resolve { fault_page, device } => {
                self.step_resolve(dir, order, &mut request, fault_page, device, out)
            }
            Kind::Pin { on } => self.step_pin(dir, order, &mut request, on, out),
            Kind::Discard => self.step_discard(dir, order, &mut request, out),
            Kind::Teardown => self.step_teardown(dir, &request, out),
        };
        match next {
            Next::Reply(outcome) => self.reply(request.id, outcome, out),
            Next::Again => {
                self.requests.insert(order, request);
                self.ready.push_back(order);
            }
            Next::Wait => {
                request.blocked = true;
                self.requests.insert(order, request);
            }
        }
        self.adopt_new_transfers(order);
    }

    /// Transfers started in this step were begun while the request was out of the map: count them now.
    fn adopt_new_transfers(&mut self, order: u64) {
        let Some(request) = self.requests.get_mut(&order) else { return };
        let mine = self.transfers.values_mut().filter(|transfer| transfer.owner == Some(order));
        let req = request.id.unwrap_or(ReqId(0));
        request.outstanding = mine.map(|transfer| transfer.req = req).count() as u32;
    }

    fn step_migrate(
        &mut self,
        dir: &impl Directory,
        order: u64,
        request: &mut Request,
        target: Target,
        out: &mut Vec<Action>,
    ) -> Next {
        let left = request.left();
        if left.count == 0 {
            return if request.outstanding > 0 {
                Next::Wait
            } else {
                Next::Reply(Outcome::Migrated { runs: request.runs(), moved_pages: request.moved_pages })
            };
        }
        if let Some((pages, status)) = request.stranded.take_if(|(pages, _)| pages.contains(left.first)) {
            let run = Pages { count: pages.end() - left.first, ..left };
            request.record(run, status);
            request.cursor = run.end();
            return Next::Again;
        }
        if request.outstanding >= OUTSTANDING_MAX {
            return Next::Wait;
        }
        let region = request.region;
        let first = Self::entry(dir, region, left.first);
        if self.busy(region, left.first, first) {
            return Next::Wait;
        }
        match target {
            Target::Home if first.state() == PageState::Device => {
                let (run, first, mask) = self.device_run(dir, region, left);
                self.start_home(region, run, first, mask, Some(order), out);
                request.cursor = run.end();
                Next::Again
            }
            Target::Device(device) if first.state() == PageState::Device && first.device() != device => {
                // Home first; this request looks at the pages again when they have arrived, or cannot.
                let (run, first, mask) = self.device_run(dir, region, left);
                self.start_home(region, run, first, mask, Some(order), out);
                Next::Wait
            }
            Target::Device(device) if first.is_settled_system() && !first.pinned() => {
                self.migrate_run_out(dir, order, request, left, device, out)
            }
            _ => {
                let status = settled_status(first, target);
                let run = Self::run_while(dir, region, left, |_, entry| {
                    !entry.is_moving()
                        && settled_status(entry, target) == status
                        && entry.is_settled_system() == first.is_settled_system()
                        && (!entry.owns_frame() || entry.device() == first.device())
                });
                request.record(run, status);
                request.cursor = run.end();
                Next::Again
            }
        }
    }

    fn migrate_run_out(
        &mut self,
        dir: &impl Directory,
        order: u64,
        request: &mut Request,
        left: Pages,
        device: DeviceId,
        out: &mut Vec<Action>,
    ) -> Next {
        let (region, begun) = (request.region, request.pages.first..request.cursor);
        // Pages that this same request brought are not pushed out again for its later ones.
        let spare = |owner: Owner| owner.region == region && begun.contains(&owner.page);
        match self.move_run_out(dir, order, region, left, device, spare, out) {
            RunOut::Started(run) => {
                request.cursor = run.end();
                Next::Again
            }
            RunOut::Wait => Next::Wait,
            RunOut::Full => {
                request.record(left, PageStatus::NoMemory);
                request.cursor = left.end();
                Next::Again
            }
        }
    }

    /// Sends the first pages of `pages` (settled system pages) to the device, or makes room for them.
    #[allow(clippy::too_many_arguments, reason = "one decision's own inputs")]
    fn move_run_out(
        &mut self,
        dir: &impl Directory,
        order: u64,
        region: RegionId,
        pages: Pages,
        device: DeviceId,
        spare: impl Fn(Owner) -> bool,
        out: &mut Vec<Action>,
    ) -> RunOut {
        let zero = Self::entry(dir, region, pages.first).state() == PageState::Absent;
        let run = Self::run_while(dir, region, pages, |_, entry| {
            entry.is_settled_system() && !entry.pinned() && (entry.state() == PageState::Absent) == zero
        });
        let Some(space) = self.regions.get(&region).map(|info| info.space) else { return RunOut::Full };
        if self.is_failed(device) {
            return RunOut::Full;
        }
        let Some(table) = self.table(device) else { return RunOut::Wait };
        if let Some((frame, count)) = table.allocate(run.count as u32, Owner { region, page: run.first }, space) {
            let run = Pages { count: u64::from(count), ..run };
            let mask = run.iter().fold(0, |mask, page| mask | Self::entry(dir, region, page).mapped_mask());
            self.start_out(region, run, device, frame, mask, zero, order, out);
            return RunOut::Started(run);
        }
        let soon = !self.transfers.is_empty() || self.scrubbing() || self.something_dies();
        if self.evict(dir, device, run.count, spare, order, out) || soon {
            return RunOut::Wait;
        }
        RunOut::Full
    }

    fn step_resolve(
        &mut self,
        dir: &impl Directory,
        order: u64,
        request: &mut Request,
        fault_page: u64,
        device: DeviceId,
        out: &mut Vec<Action>,
    ) -> Next {
        let region = request.region;
        match request.failed.take() {
            Some(PageStatus::Gone) => {
                return Next::Reply(Outcome::Failed(CoreError::NoSuchRegion { region: region.0 }));
            }
            Some(_) => return Next::Reply(Outcome::Failed(CoreError::Io { page: fault_page })),
            None => {}
        }
        let entry = Self::entry(dir, region, fault_page);
        if self.busy(region, fault_page, entry) {
            return Next::Wait;
        }
        match entry.state() {
            PageState::Poisoned => Next::Reply(Outcome::Failed(CoreError::Poisoned { page: fault_page })),
            PageState::Device if entry.device() == device => self.map_window(dir, request, device, false, out),
            PageState::Device | PageState::Exclusive => {
                let (run, first, mask) = self.device_run(dir, region, Self::rest_of_window(request, fault_page));
                self.start_home(region, run, first, mask, Some(order), out);
                Next::Wait
            }
            _ => {
                let advised = self.regions.get(&region).is_some_and(|info| info.in_place);
                let action = self.policy.device_fault(region, request.pages, advised);
                if entry.pinned() || action == DeviceFaultAction::MapInPlace {
                    return self.map_window(dir, request, device, true, out);
                }
                let pages = Self::rest_of_window(request, fault_page);
                match self.move_run_out(dir, order, region, pages, device, |_| false, out) {
                    RunOut::Started(_) | RunOut::Wait => Next::Wait,
                    RunOut::Full => self.map_window(dir, request, device, true, out),
                }
            }
        }
    }

    /// The window from the faulting page on: the page that matters is in the first run.
    fn rest_of_window(request: &Request, fault_page: u64) -> Pages {
        Pages { first: fault_page, count: (request.pages.end() - fault_page).min(CHUNK_PAGES) }
    }

    /// Maps what can be mapped at this instant; the faulting page can. `in_place`: system pages too.
    fn map_window(
        &mut self,
        dir: &impl Directory,
        request: &Request,
        device: DeviceId,
        in_place: bool,
        out: &mut Vec<Action>,
    ) -> Next {
        let Kind::Resolve { fault_page, .. } = request.kind else { return Next::Wait };
        let (region, bit) = (request.region, 1u8 << device.0);
        let mut runs: Vec<MapRun> = Vec::new();
        for page in request.pages.iter() {
            let entry = Self::entry(dir, region, page);
            let kind = match entry.state() {
                _ if self.busy(region, page, entry) => continue,
                PageState::Device if entry.device() == device => MapKind::Frame(entry.frame()),
                // Only the faulting page is mapped in place unasked; neighbours may still migrate.
                PageState::Absent | PageState::System if entry.pinned() || (in_place && page == fault_page) => {
                    MapKind::System
                }
                PageState::Absent | PageState::System if self.regions.get(&region).is_some_and(|i| i.in_place) => {
                    MapKind::System
                }
                _ => continue,
            };
            if let MapKind::Frame(frame) = kind
                && let Some(table) = self.table(device)
            {
                table.touch(frame);
            }
            let mapped = match entry.state() {
                // The device may write it: it is not untouched any more.
                PageState::Absent => entry.with_state(PageState::System),
                _ => entry,
            };
            let mapped = mapped.with_mapped_mask(entry.mapped_mask() | bit);
            if mapped != entry {
                Self::publish_same(region, Pages::one(page), mapped, out);
            }
            extend(&mut runs, page, kind);
        }
        Next::Reply(Outcome::Resolved { runs })
    }

    fn step_pin(
        &mut self,
        dir: &impl Directory,
        order: u64,
        request: &mut Request,
        on: bool,
        out: &mut Vec<Action>,
    ) -> Next {
        let left = request.left();
        if left.count == 0 {
            return if request.outstanding > 0 { Next::Wait } else { Next::Reply(Outcome::Done) };
        }
        let region = request.region;
        let first = Self::entry(dir, region, left.first);
        if self.busy(region, left.first, first) {
            return Next::Wait;
        }
        if on && first.state() == PageState::Device {
            let (run, first, mask) = self.device_run(dir, region, left);
            self.start_home(region, run, first, mask, Some(order), out);
            return Next::Wait;
        }
        let run = Self::run_while(dir, region, left, |_, entry| entry == first);
        let run = if run.count == 0 { Pages::one(left.first) } else { run };
        if first.is_settled_system() && first.pinned() != on {
            Self::publish_same(region, run, first.with_pinned(on), out);
        }
        request.cursor = run.end();
        Next::Again
    }

    fn step_discard(&mut self, dir: &impl Directory, order: u64, request: &mut Request, out: &mut Vec<Action>) -> Next {
        let left = request.left();
        if left.count == 0 {
            return if request.outstanding > 0 { Next::Wait } else { Next::Reply(Outcome::Done) };
        }
        let region = request.region;
        let first = Self::entry(dir, region, left.first);
        if self.busy(region, left.first, first) {
            return Next::Wait;
        }
        let run = if first.state() == PageState::Device {
            let (run, first, mask) = self.device_run(dir, region, left);
            self.start_drop(region, run, first, mask, Some(order), out);
            run
        } else {
            let run = Self::run_while(dir, region, left, |_, entry| entry == first);
            let run = if run.count == 0 { Pages::one(left.first) } else { run };
            if first.mapped_mask() != 0 {
                self.start_drop(region, run, first, first.mapped_mask(), Some(order), out);
            } else if first != Entry::ABSENT {
                Self::publish_same(region, run, Entry::ABSENT, out);
            }
            run
        };
        request.cursor = run.end();
        Next::Again
    }

    /// Begins the end of a region: nothing new, and everybody who waits for it is told.
    pub(crate) fn begin_teardown(&mut self, req: Option<ReqId>, region: RegionId, out: &mut Vec<Action>) {
        let Some(info) = self.regions.get_mut(&region) else {
            let error = CoreError::NoSuchRegion { region: region.0 };
            self.reply(req, Outcome::Failed(error), out);
            return;
        };
        if std::mem::replace(&mut info.dying, true) {
            self.reply(req, Outcome::Failed(CoreError::NoSuchRegion { region: region.0 }), out);
            return;
        }
        let page_count = info.page_count;
        let waiting = self.requests.iter().filter(|(_, r)| r.region == region && !r.is_teardown());
        let orders: Vec<u64> = waiting.map(|(order, _)| *order).collect();
        for order in orders {
            if let Some(request) = self.requests.remove(&order) {
                self.reply(request.id, Outcome::Failed(CoreError::NoSuchRegion { region: region.0 }), out);
            }
        }
        let ops: Vec<_> = self.cpu_ops.iter().filter(|(_, op)| op.region == region).map(|(t, _)| *t).collect();
        for ticket in ops {
            self.cpu_ops.remove(&ticket);
        }
        let order = self.next_request_order();
        self.requests.insert(order, Request::teardown(req, region, page_count));
        self.ready.push_back(order);
    }

    fn step_teardown(&mut self, dir: &impl Directory, request: &Request, out: &mut Vec<Action>) -> Next {
        let region = request.region;
        if self.regions.get(&region).is_none_or(|info| info.transfers > 0) {
            return Next::Wait;
        }
        let mask = request.pages.iter().fold(0, |mask, page| mask | Self::entry(dir, region, page).mapped_mask());
        self.start_teardown(region, request.pages, mask, out);
        if !self.regions.contains_key(&region) {
            // Nothing had to be revoked: it is over, and the region was dropped already.
            return Next::Reply(Outcome::Done);
        }
        Next::Wait
    }
}

enum RunOut {
    Started(Pages),
    Wait,
    Full,
}

fn settled_status(entry: Entry, target: Target) -> PageStatus {
    match entry.state() {
        PageState::Poisoned => PageStatus::Poisoned,
        _ if entry.is_settled_system() && entry.pinned() && target != Target::Home => PageStatus::Pinned,
        _ => PageStatus::AlreadyThere,
    }
}

fn extend(runs: &mut Vec<MapRun>, page: u64, kind: MapKind) {
    if let Some(run) = runs.last_mut()
        && run.first + run.count == page
    {
        let follows = match (run.kind, kind) {
            (MapKind::System, MapKind::System) => true,
            (MapKind::Frame(first), MapKind::Frame(frame)) => u64::from(first) + run.count == u64::from(frame),
            _ => false,
        };
        if follows {
            run.count += 1;
            return;
        }
    }
    runs.push(MapRun { first: page, count: 1, kind, writable: true });
}
