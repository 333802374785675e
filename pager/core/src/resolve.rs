//! Device faults: a window of pages that a device wants to use.
//!
//! ```text
//!   page is ...                         and then
//!   here (Device, Exclusive)            mapped; a frame that others share: read-only, for a write it goes home first
//!   on another device                   across, or home when there is no way across
//!   system, reachable, advised so       mapped in place
//!   system                              moved here; read-mostly and only read: copied here
//!   Duplicated                          copy mapped read-only; for a write the copies collapse first
//!   on the move                         waited for
//! ```
//! A plain fault is answered as soon as `fault_page` can be mapped. A range fault (`whole`) goes through the window from
//! `fault_page` on, keeps several transfers in flight, looks at everything again at its end, and ends the window at the first page
//! that cannot be had.

use crate::core::{CHUNK_PAGES, Core};
use crate::entry::{CPU, PageState};
use crate::event::{
    Action, Backing, Cause, CoreError, DeviceId, Directory, MapKind, MapRun, Outcome, PageStatus, Pages, RegionId,
    TraceKind,
};
use crate::policy::{DeviceFault, DeviceFaultAction, Policy};
use crate::request::{Next, OUTSTANDING_MAX, Request};
use crate::transfer::{Kind, Transfer};
use crate::way::{Leg, Wish};

/// How often a range fault looks at its window again before it is content with what it has.
const PASSES_MAX: u8 = 16;

/// What a device wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resolve {
    pub fault_page: u64,
    pub device: DeviceId,
    pub write: bool,
    pub whole: bool,
    pub exclusive: bool,
    /// From this page on the device is full: system pages are mapped in place if they can be.
    pub in_place_from: u64,
}

/// What a page needs before the device can use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    Nothing,
    Wait,
    /// The frame is nobody else's any more: say so.
    Unshare,
    /// The program maps the frame, and the device wants it alone.
    HideFromCpu,
    Home,
    Collapse,
    Move,
    Copy,
    Pause {
        until_us: u64,
    },
    Refuse(CoreError),
}

impl<P: Policy> Core<P> {
    pub(crate) fn step_resolve(
        &mut self,
        dir: &impl Directory,
        order: u64,
        request: &mut Request,
        wish: Resolve,
        out: &mut Vec<Action>,
    ) -> Next {
        let fault_page = wish.fault_page;
        if let Some(status) = request.failed.take() {
            return Next::Reply(Outcome::Failed(failure(status, request.region, fault_page)));
        }
        // What it is given now could be taken for what a dead driver had.
        if self.walks_for(wish.device) {
            return Next::Wait;
        }
        if request.map_from.is_some() {
            return self.map_window(dir, order, request, wish, out);
        }
        if request.cursor < fault_page {
            request.cursor = fault_page;
        }
        // More than the device can hold beside others would push out its own first pages.
        let frame_count = self.table(wish.device).map_or(1, |table| table.frame_count());
        request.limit = request.limit.min(fault_page + u64::from(frame_count / 2).max(1));
        let end = if wish.whole { request.limit } else { (fault_page + 1).min(request.limit) };
        if request.cursor >= end {
            return self.window_passed(dir, order, request, wish, out);
        }
        let page = request.cursor;
        match self.need(dir, request.region, page, wish) {
            Need::Nothing => {
                let left = Pages { first: page, count: end - page };
                let share = left.iter().take(self.budget as usize);
                let run = share.take_while(|at| self.is_ready(dir, request.region, *at, wish)).count() as u64;
                request.cursor = page + run.max(1);
                if request.cursor >= end { self.window_passed(dir, order, request, wish, out) } else { Next::Again }
            }
            Need::Wait => Next::Wait,
            Need::Pause { until_us } => {
                let at = Transfer { device: wish.device, ..Transfer::new(request.region, Pages::one(page), OUT) };
                self.trace(TraceKind::Throttle, &Transfer { cause: Cause::DeviceFault, ..at }, out);
                self.stats.throttled += 1;
                request.pause(until_us);
                Next::Wait
            }
            Need::Refuse(error) if page == fault_page => Next::Reply(Outcome::Failed(error)),
            Need::Refuse(_) => {
                request.limit = page;
                Next::Again
            }
            need => self.bring(dir, order, request, need, wish, out),
        }
    }

    /// Starts what the page at the cursor needs.
    fn bring(
        &mut self,
        dir: &impl Directory,
        order: u64,
        request: &mut Request,
        need: Need,
        wish: Resolve,
        out: &mut Vec<Action>,
    ) -> Next {
        let (region, page) = (request.region, request.cursor);
        request.clean = false;
        if request.outstanding >= OUTSTANDING_MAX {
            return Next::Wait;
        }
        let end = if wish.whole { request.limit } else { request.pages.end() };
        let left = Pages { first: page, count: (end - page).min(CHUNK_PAGES) };
        let started = match need {
            Need::Unshare => {
                let entry = Self::entry(dir, region, page);
                Self::publish_same(region, Pages::one(page), entry.with_shared(false), out);
                return Next::Again;
            }
            Need::HideFromCpu => {
                let run = Self::run_while(dir, region, left, |offset, entry| {
                    entry.cpu_mapped() && !self.busy(region, page + offset, entry)
                });
                self.start_revoke(region, run, CPU, CPU, order, out);
                run
            }
            Need::Home => {
                let (run, first, mask) = self.frame_run(dir, region, left);
                self.split_huge(dir, region, run, out);
                self.start_home(region, run, first, mask, Some(order), Cause::DeviceFault, out);
                run
            }
            Need::Collapse => {
                let (run, first, mask) = self.frame_run(dir, region, left);
                self.start_collapse(region, run, first, mask, Some(order), out);
                run
            }
            _ => {
                let wanted = wish;
                let wish = Wish { device: wish.device, keep: need == Need::Copy, cause: Cause::DeviceFault };
                match self.bring_here(dir, order, region, left, wish, out) {
                    Leg::Started(run) | Leg::First(run) => run,
                    Leg::Wait => return Next::Wait,
                    Leg::Again => return Next::Again,
                    Leg::Full(_) => return self.no_room(dir, request, wanted),
                }
            }
        };
        // A range fault goes on with the rest of its window and looks at these pages again at the end.
        if started.end() >= end || !wish.whole {
            return Next::Wait;
        }
        request.cursor = started.end();
        Next::Again
    }

    /// The device is full, or lost: in place, if it can reach the page there; else the window ends here.
    fn no_room(&mut self, dir: &impl Directory, request: &mut Request, wish: Resolve) -> Next {
        let page = request.cursor;
        let settled = Self::entry(dir, request.region, page).is_settled_system();
        if settled && self.reaches_system(request.region) && !wish.exclusive {
            request.map_in_place_from(page);
            return Next::Again;
        }
        if page == wish.fault_page {
            let status = self.no_room_status(wish.device);
            return Next::Reply(Outcome::Failed(failure(status, request.region, page)));
        }
        request.limit = page;
        Next::Again
    }

    /// The cursor is at the end of the window.
    fn window_passed(
        &mut self,
        dir: &impl Directory,
        order: u64,
        request: &mut Request,
        wish: Resolve,
        out: &mut Vec<Action>,
    ) -> Next {
        if request.outstanding > 0 {
            return Next::Wait;
        }
        request.passes = request.passes.saturating_add(1);
        let tired = request.passes >= PASSES_MAX;
        // Pages of an earlier step may have left again. When others want them as much, what is here has to do.
        if (request.clean || tired) && self.is_ready(dir, request.region, wish.fault_page, wish) {
            return self.map_window(dir, order, request, wish, out);
        }
        if !tired || !wish.whole {
            (request.clean, request.cursor) = (true, wish.fault_page);
            return Next::Again;
        }
        Next::Reply(Outcome::Failed(busy(wish.fault_page)))
    }

    fn is_ready(&mut self, dir: &impl Directory, region: RegionId, page: u64, wish: Resolve) -> bool {
        let attr = dir.attr(region, page);
        let entry = Self::entry(dir, region, page);
        if self.busy(region, page, entry) || attr.no_access_mask() & (1 << wish.device.0) != 0 {
            return false;
        }
        match entry.state() {
            PageState::Device | PageState::Exclusive => {
                let kept = wish.write && entry.shared() || wish.exclusive && entry.cpu_mapped();
                entry.device() == wish.device && !kept
            }
            PageState::Absent | PageState::System => {
                let full = page >= wish.in_place_from && self.reaches_system(region);
                !wish.exclusive && (full || self.stays_in_place(dir, region, page, wish.device))
            }
            PageState::Duplicated => !wish.write && (entry.device() == wish.device || self.reaches_system(region)),
            _ => false,
        }
    }

    /// The device can map system pages of the region.
    pub(crate) fn reaches_system(&self, region: RegionId) -> bool {
        matches!(self.backing(region), Some(Backing::Shared | Backing::File))
    }

    /// A system page that is not to be moved to this device.
    fn stays_in_place(&self, dir: &impl Directory, region: RegionId, page: u64, device: DeviceId) -> bool {
        let attr = dir.attr(region, page);
        let entry = Self::entry(dir, region, page);
        let advised = attr.in_place_mask() & (1 << device.0) != 0 || self.policy.keeps_in_place(region, page, attr);
        let must = self.backing(region) == Some(Backing::File);
        self.reaches_system(region) && (must || advised || entry.pinned())
    }

    fn need(&mut self, dir: &impl Directory, region: RegionId, page: u64, wish: Resolve) -> Need {
        let entry = Self::entry(dir, region, page);
        let attr = dir.attr(region, page);
        if attr.no_access_mask() & (1 << wish.device.0) != 0 {
            return Need::Refuse(CoreError::NoAccess { page });
        }
        if self.busy(region, page, entry) {
            return Need::Wait;
        }
        if self.is_ready(dir, region, page, wish) {
            return Need::Nothing;
        }
        match entry.state() {
            PageState::Poisoned => Need::Refuse(CoreError::Poisoned { page }),
            PageState::Device | PageState::Exclusive
                if entry.device() == wish.device && wish.exclusive && entry.cpu_mapped() =>
            {
                Need::HideFromCpu
            }
            PageState::Device | PageState::Exclusive if entry.device() == wish.device => {
                match self.table(entry.device()).map(|table| table.is_shared(entry.frame())) {
                    // Who else names the frame is known when the device has logged in.
                    None => Need::Wait,
                    Some(true) => Need::Home,
                    Some(false) => Need::Unshare,
                }
            }
            PageState::Device | PageState::Exclusive => Need::Move,
            PageState::Duplicated => Need::Collapse,
            _ if entry.pinned() || self.backing(region) == Some(Backing::File) => {
                Need::Refuse(CoreError::Busy { page })
            }
            _ => self.need_of_system(region, page, attr, wish),
        }
    }

    fn need_of_system(&mut self, region: RegionId, page: u64, attr: crate::Attr, wish: Resolve) -> Need {
        let (device, write, now_us) = (wish.device, wish.write, self.now_us);
        let in_place = self.reaches_system(region) && !wish.exclusive;
        match self.policy.device_fault(DeviceFault { region, page, device, write, attr, in_place, now_us }) {
            DeviceFaultAction::Wait { until_us } => Need::Pause { until_us },
            DeviceFaultAction::Copy if !wish.write => Need::Copy,
            _ => Need::Move,
        }
    }

    /// Maps what can be mapped when its part of the window has its turn, the faulting page among it. Nothing is mapped in place that could
    /// still migrate. What is revoked before the last part is mapped is not in the answer ([`Self::not_mapped`]).
    fn map_window(
        &mut self,
        dir: &impl Directory,
        order: u64,
        request: &mut Request,
        wish: Resolve,
        out: &mut Vec<Action>,
    ) -> Next {
        let from = request.map_from.unwrap_or(request.pages.first);
        let left = Pages { first: from, count: request.limit.saturating_sub(from) };
        let part = Pages { count: left.count.min(self.budget), ..left };
        for page in part.iter() {
            self.map_page(dir, request, page, wish, out);
        }
        if part.count < left.count {
            request.map_from = Some(part.end());
            self.half_mapped.insert(order);
            return Next::Again;
        }
        self.half_mapped.remove(&order);
        request.map_from = None;
        let runs = std::mem::take(&mut request.mapped);
        if runs.iter().any(|run| (run.first..run.first + run.count).contains(&wish.fault_page)) {
            return Next::Reply(Outcome::Resolved { runs });
        }
        // It was taken away while the rest was mapped.
        (request.clean, request.cursor) = (false, wish.fault_page);
        if request.passes < PASSES_MAX { Next::Again } else { Next::Reply(Outcome::Failed(busy(wish.fault_page))) }
    }

    fn map_page(
        &mut self,
        dir: &impl Directory,
        request: &mut Request,
        page: u64,
        wish: Resolve,
        out: &mut Vec<Action>,
    ) {
        let (region, bit) = (request.region, 1u16 << wish.device.0);
        let entry = Self::entry(dir, region, page);
        // Neighbours are mapped as they are. The faulting page may have become somebody else's too since it was looked at.
        let write = wish.write && page == wish.fault_page;
        if !self.is_ready(dir, region, page, Resolve { write, ..wish }) {
            return;
        }
        let here = entry.owns_frame() && entry.device() == wish.device;
        let kind = if here { MapKind::Frame(entry.frame()) } else { MapKind::System };
        if let MapKind::Frame(frame) = kind
            && let Some(table) = self.table(wish.device)
        {
            table.touch(frame);
        }
        let taken = wish.exclusive && entry.lives_on_device() && page >= wish.fault_page;
        let state = match entry.state() {
            // The device may write it: it is not untouched any more.
            PageState::Absent => PageState::System,
            _ if taken => PageState::Exclusive,
            state => state,
        };
        let mapped = entry.with_state(state).with_mapped_mask(entry.mapped_mask() | bit);
        if mapped != entry {
            Self::publish_same(region, Pages::one(page), mapped, out);
        }
        let writable = !entry.shared() && entry.state() != PageState::Duplicated;
        extend(&mut request.mapped, page, kind, writable);
    }

    /// Devices lose mappings of some pages, among them those that a range fault has mapped and not answered.
    pub(crate) fn not_mapped(&mut self, region: RegionId, pages: Pages, devices: u16) {
        for order in &self.half_mapped {
            if let Some(request) = self.requests.get_mut(order) {
                request.unmap(region, pages, devices);
            }
        }
    }
}

const OUT: Kind = Kind::Out { zero: false, keep: false };

fn busy(page: u64) -> CoreError {
    CoreError::Busy { page }
}

fn failure(status: PageStatus, region: RegionId, page: u64) -> CoreError {
    match status {
        PageStatus::Gone => CoreError::Gone { page },
        PageStatus::Busy | PageStatus::Pinned => CoreError::Busy { page },
        PageStatus::NoMemory => CoreError::NoMemory { page },
        PageStatus::Poisoned => CoreError::Poisoned { page },
        PageStatus::Ok | PageStatus::AlreadyThere | PageStatus::NotSelected => {
            CoreError::NoSuchRegion { region: region.0 }
        }
        PageStatus::Io => CoreError::Io { page },
    }
}

/// Mappings without some pages.
pub(crate) fn without(runs: Vec<MapRun>, pages: Pages) -> Vec<MapRun> {
    let cut = |run: MapRun| {
        let end = run.first + run.count;
        let before = MapRun { count: pages.first.clamp(run.first, end) - run.first, ..run };
        let first = pages.end().clamp(run.first, end);
        let kind = match run.kind {
            MapKind::Frame(frame) => MapKind::Frame(frame + (first - run.first) as u32),
            MapKind::System => MapKind::System,
        };
        [before, MapRun { first, count: end - first, kind, ..run }]
    };
    runs.into_iter().flat_map(cut).filter(|run| run.count > 0).collect()
}

fn extend(runs: &mut Vec<MapRun>, page: u64, kind: MapKind, writable: bool) {
    if let Some(run) = runs.last_mut()
        && run.first + run.count == page
        && run.writable == writable
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
    runs.push(MapRun { first: page, count: 1, kind, writable });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_revoked_is_cut_out_of_what_was_mapped() {
        let run = |first, count, kind| MapRun { first, count, kind, writable: true };
        let runs = vec![run(0, 10, MapKind::Frame(100)), run(10, 5, MapKind::System)];
        let cut = |first, count| without(runs.clone(), Pages { first, count });
        assert_eq!(cut(20, 5), runs);
        assert_eq!(
            cut(3, 2),
            [run(0, 3, MapKind::Frame(100)), run(5, 5, MapKind::Frame(105)), run(10, 5, MapKind::System)]
        );
        assert_eq!(cut(8, 4), [run(0, 8, MapKind::Frame(100)), run(12, 3, MapKind::System)]);
        assert_eq!(cut(0, 15), []);
    }
}
