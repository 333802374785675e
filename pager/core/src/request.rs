//! Requests: what somebody waits for. A step looks at the directory once and starts at most one transfer.
//!
//! A request that meets pages on the move, a full device or a device that never logged in is *blocked*; the end of any transfer
//! makes it look again. It owns nothing while it waits, so requests cannot deadlock each other.

use crate::core::{CHUNK_PAGES, Core};
use crate::entry::{Entry, PageState};
use crate::event::{
    Action, Cause, DeviceId, Directory, MapRun, Only, Outcome, PageStatus, Pages, RegionId, ReqId, SpaceId, Target,
};
use crate::frames::HUGE_PAGES;
use crate::policy::Policy;
use crate::ready::Lane;
use crate::resolve::{Resolve, without};
use crate::runs::Fates;
use crate::way::{Leg, Wish};

/// Transfers that one migration keeps in flight, so that a driver's copy engine has something to do.
pub(crate) const OUTSTANDING_MAX: u32 = 4;

/// Most pages of one step over pages that are known to be alike: 4 GiB.
const WIDE_PAGES: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Migrate { target: Target, only: Only },
    Resolve(Resolve),
    Pin { on: bool },
    Discard,
    Revoke { devices: u16 },
    Evict { space: SpaceId, device: DeviceId, left: u64 },
    Teardown,
}

/// What somebody waits for.
#[derive(Debug)]
pub(crate) struct Request {
    pub id: Option<ReqId>,
    pub region: RegionId,
    pub pages: Pages,
    kind: Kind,
    /// Why pages move (migrations only).
    cause: Cause,
    /// Whose turn its steps are.
    pub lane: Lane,
    /// First page not dealt with.
    pub cursor: u64,
    /// End of what can be had (range faults).
    pub limit: u64,
    /// Rounds over the window (range faults).
    pub passes: u8,
    /// What is mapped of the window, and from where on nothing is yet, once that has begun (range faults).
    pub mapped: Vec<MapRun>,
    pub map_from: Option<u64>,
    /// This round found nothing to do so far (range faults).
    pub clean: bool,
    /// It waits for the clock.
    not_before_us: Option<u64>,
    /// Fate by page (migrations only).
    fates: Fates,
    pub moved_pages: u64,
    /// A copy of the page that matters failed.
    pub failed: Option<PageStatus>,
    /// Pages that could not leave the device they are on (migrations only).
    stranded: Option<(Pages, PageStatus)>,
    /// Transfers in flight.
    pub outstanding: u32,
}

impl Request {
    fn new(id: Option<ReqId>, region: RegionId, pages: Pages, kind: Kind) -> Self {
        Self {
            id,
            region,
            pages,
            kind,
            cause: Cause::Prefetch,
            // Until the region tells.
            lane: Lane::Ends,
            cursor: pages.first,
            limit: pages.end(),
            passes: 0,
            clean: true,
            mapped: Vec::new(),
            map_from: None,
            not_before_us: None,
            fates: Fates::default(),
            moved_pages: 0,
            failed: None,
            stranded: None,
            outstanding: 0,
        }
    }

    pub fn migrate(req: ReqId, region: RegionId, pages: Pages, target: Target, only: Only) -> Self {
        Self::new(Some(req), region, pages, Kind::Migrate { target, only })
    }

    /// What follows a CPU fault home.
    pub fn follow(region: RegionId, pages: Pages) -> Self {
        let kind = Kind::Migrate { target: Target::Home, only: Only::All };
        Self { cause: Cause::CpuFault, ..Self::new(None, region, pages, kind) }
    }

    pub fn resolve(req: ReqId, region: RegionId, pages: Pages, wish: Resolve) -> Self {
        Self::new(Some(req), region, pages, Kind::Resolve(wish))
    }

    pub fn pin(req: ReqId, region: RegionId, pages: Pages, on: bool) -> Self {
        Self::new(Some(req), region, pages, Kind::Pin { on })
    }

    pub fn discard(req: Option<ReqId>, region: RegionId, pages: Pages) -> Self {
        Self::new(req, region, pages, Kind::Discard)
    }

    pub fn revoke(req: ReqId, region: RegionId, pages: Pages, devices: u16) -> Self {
        Self::new(Some(req), region, pages, Kind::Revoke { devices })
    }

    /// Of no region: it goes through a device.
    pub fn evict(req: ReqId, space: SpaceId, device: DeviceId, page_count: u64) -> Self {
        let left = if page_count == 0 { u64::MAX } else { page_count };
        let nowhere = Pages { first: 0, count: 0 };
        let lane = Lane::Space(space);
        Self { lane, ..Self::new(Some(req), RegionId(u64::MAX), nowhere, Kind::Evict { space, device, left }) }
    }

    pub fn teardown(req: Option<ReqId>, region: RegionId, page_count: u64) -> Self {
        Self::new(req, region, Pages { first: 0, count: page_count }, Kind::Teardown)
    }

    /// It goes through many pages and is content with its turn.
    pub fn is_bulk(&self) -> bool {
        !matches!(self.kind, Kind::Resolve(_) | Kind::Pin { .. })
    }

    /// It sends pages to a device.
    pub fn goes_away(&self) -> bool {
        matches!(self.kind, Kind::Migrate { target: Target::Device(_), .. })
    }

    /// It sends pages to a device, or drops them: neither is done to a file.
    pub fn is_not_for_files(&self) -> bool {
        matches!(self.kind, Kind::Migrate { target: Target::Device(_), .. } | Kind::Discard)
    }

    /// From this page on a range fault is content with system pages in place.
    pub fn map_in_place_from(&mut self, page: u64) {
        if let Kind::Resolve(wish) = &mut self.kind {
            wish.in_place_from = wish.in_place_from.min(page);
        }
    }

    /// So many pages less are left to evict.
    pub fn take_from_eviction(&mut self, count: u64) {
        if let Kind::Evict { left, .. } = &mut self.kind {
            *left = left.saturating_sub(count.max(1));
        }
    }

    /// Waits for the clock.
    pub fn pause(&mut self, until_us: u64) {
        self.not_before_us = Some(until_us);
    }

    pub fn not_before_us(&self) -> Option<u64> {
        self.not_before_us
    }

    /// Whether its pause is over now.
    pub fn end_pause(&mut self, now_us: u64) -> bool {
        self.not_before_us.take_if(|until_us| *until_us <= now_us).is_some()
    }

    /// What is named beside the range lies in it, and devices exist.
    pub fn target_is_inside(&self) -> bool {
        match self.kind {
            Kind::Resolve(Resolve { fault_page, device, .. }) => {
                self.pages.contains(fault_page) && device.0 < crate::DEVICE_COUNT_MAX
            }
            Kind::Migrate { target: Target::Device(device), .. } | Kind::Evict { device, .. } => {
                device.0 < crate::DEVICE_COUNT_MAX
            }
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
                self.fates.set(pages, status);
                if status == PageStatus::Ok {
                    self.moved_pages += pages.count;
                }
            }
            Kind::Resolve(Resolve { fault_page, .. }) if status != PageStatus::Ok => {
                if pages.contains(fault_page) {
                    self.failed = Some(status);
                } else if pages.first > fault_page {
                    self.limit = self.limit.min(pages.first);
                }
            }
            Kind::Evict { .. } if status == PageStatus::Ok => self.moved_pages += pages.count,
            // A page that cannot come home is not waited for for ever.
            Kind::Pin { .. } if status != PageStatus::Ok => self.cursor = self.cursor.max(pages.end()),
            _ => {}
        }
    }

    /// Devices lose mappings, this one's perhaps among them (range faults).
    pub fn unmap(&mut self, region: RegionId, pages: Pages, devices: u16) {
        if let Kind::Resolve(Resolve { device, .. }) = self.kind
            && self.region == region
            && devices & (1 << device.0) != 0
        {
            self.mapped = without(std::mem::take(&mut self.mapped), pages);
        }
    }

    pub fn left(&self) -> Pages {
        Pages { first: self.cursor, count: self.pages.end().saturating_sub(self.cursor) }
    }
}

/// What a step leaves behind.
pub(crate) enum Next {
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
        if self.recovering.has(request.region) {
            self.blocked.insert(order);
            self.requests.insert(order, request);
            return;
        }
        self.stepping = request.id.unwrap_or(ReqId(0));
        // The request is put back before transfers of this step report to it.
        let (kind, ended) = (request.kind, self.ended);
        let next = match kind {
            Kind::Migrate { target, only } => self.step_migrate(dir, order, &mut request, (target, only), out),
            Kind::Resolve(wish) => self.step_resolve(dir, order, &mut request, wish, out),
            Kind::Revoke { devices } => self.step_revoke(dir, order, &mut request, devices, out),
            Kind::Evict { space, device, left } => {
                self.step_evict(dir, order, &mut request, (space, device, left), out)
            }
            Kind::Pin { on } => self.step_pin(dir, order, &mut request, on, out),
            Kind::Discard => self.step_discard(dir, order, &mut request, out),
            Kind::Teardown => self.step_teardown(dir, &mut request, out),
        };
        for (_, pages, status) in std::mem::take(&mut self.late_notes).into_iter().filter(|note| note.0 == order) {
            request.note(pages, status);
        }
        // What it would wait for has ended within this very step (nothing had to be revoked): nobody would wake it.
        let next = if matches!(next, Next::Wait) && ended != self.ended { Next::Again } else { next };
        match next {
            Next::Reply(outcome) => {
                self.searches.remove(&order);
                self.half_mapped.remove(&order);
                let followed = (request.region, request.pages.first, request.pages.count);
                if self.follows.get(&followed) == Some(&order) {
                    self.follows.remove(&followed);
                }
                self.frame_waits.remove(&order);
                if let Some(info) = self.regions.get_mut(&request.region) {
                    info.requests = info.requests.saturating_sub(1);
                }
                self.reply(request.id, outcome, out);
            }
            Next::Again => self.queue(order, request),
            Next::Wait => {
                let waiting = if request.not_before_us.is_some() { &mut self.paused } else { &mut self.blocked };
                waiting.insert(order);
                self.requests.insert(order, request);
            }
        }
        self.adopt_new_transfers(order);
        self.stepping = ReqId(0);
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
        (target, only): (Target, Only),
        out: &mut Vec<Action>,
    ) -> Next {
        let left = request.left();
        if left.count == 0 {
            return if request.outstanding > 0 {
                Next::Wait
            } else {
                Next::Reply(Outcome::Migrated {
                    runs: request.fates.of(request.pages),
                    moved_pages: request.moved_pages,
                })
            };
        }
        if let Some((pages, status)) = request.stranded.take_if(|(pages, _)| pages.contains(left.first)) {
            let run = Pages { count: pages.end() - left.first, ..left };
            request.fates.set(run, status);
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
        if stays(first, target, only) {
            return self.leave(dir, request, left, (target, only));
        }
        let on_target = matches!(target, Target::Device(device) if first.device() == device);
        match target {
            Target::Home if first.lives_on_device() => {
                let left = if first.huge() { Self::to_huge_boundary(dir, region, left) } else { left };
                let (run, first, mask) = self.frame_run(dir, region, left);
                self.split_huge(dir, region, run, out);
                let first = first.with_huge(first.huge() && run.count == u64::from(HUGE_PAGES));
                self.start_home(region, run, first, mask, Some(order), request.cause, out);
                request.cursor = run.end();
                Next::Again
            }
            Target::Home if first.state() == PageState::Duplicated => {
                let (run, first, mask) = self.frame_run(dir, region, left);
                self.start_collapse(region, run, first, mask, Some(order), out);
                request.cursor = run.end();
                Next::Again
            }
            Target::Device(device)
                if first.is_settled_system() && !first.pinned()
                    || first.state() == PageState::Duplicated
                    || first.lives_on_device() && !on_target =>
            {
                self.migrate_run_out(dir, order, request, left, device, out)
            }
            _ => self.settle(dir, request, left, target),
        }
    }

    /// The next pages are where they belong, or stay for a reason of their own.
    fn settle(&self, dir: &impl Directory, request: &mut Request, left: Pages, target: Target) -> Next {
        let region = request.region;
        let first = Self::entry(dir, region, left.first);
        let status = settled_status(first, target);
        let narrow = || {
            Self::run_while(dir, region, left, |_, entry| {
                !entry.is_moving()
                    && settled_status(entry, target) == status
                    && entry.is_settled_system() == first.is_settled_system()
                    && (!entry.owns_frame() || entry.device() == first.device())
            })
        };
        let run = self.wide_run(dir, region, left).unwrap_or_else(narrow);
        request.fates.set(run, status);
        request.cursor = run.end();
        Next::Again
    }

    /// The next pages are not among those that are to move.
    fn leave(&self, dir: &impl Directory, request: &mut Request, left: Pages, (target, only): (Target, Only)) -> Next {
        let run = Self::run_while(dir, request.region, left, |offset, entry| {
            stays(entry, target, only) && !self.busy(request.region, left.first + offset, entry)
        });
        request.fates.set(run, PageStatus::NotSelected);
        request.cursor = run.end();
        Next::Again
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
        let region = request.region;
        let wish = Wish { device, keep: false, cause: Cause::Prefetch };
        match self.bring_here(dir, order, region, left, wish, out) {
            Leg::Started(run) => {
                request.cursor = run.end();
                Next::Again
            }
            // This request looks at the pages again when they have arrived, or cannot.
            Leg::First(_) | Leg::Wait => Next::Wait,
            Leg::Again => Next::Again,
            Leg::Full(pages) => {
                request.fates.set(pages, self.no_room_status(device));
                request.cursor = pages.end();
                Next::Again
            }
        }
    }

    /// The first pages that have this entry, no more than can be published in one go.
    fn equal_run(&self, dir: &impl Directory, region: RegionId, left: Pages, first: Entry) -> Pages {
        let left = Pages { count: left.count.min(WIDE_PAGES), ..left };
        // Page by page no further than to what is known to be alike: that shall stay so.
        let single = |offset| offset == 0 || dir.alike(region, left.first + offset) == 1;
        let narrow = || Self::run_while(dir, region, left, |offset, entry| entry == first && single(offset));
        let run = self.wide_run(dir, region, left).unwrap_or_else(narrow);
        if run.count == 0 { Pages::one(left.first) } else { run }
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
        if on && first.lives_on_device() {
            let (run, first, mask) = self.frame_run(dir, region, left);
            self.split_huge(dir, region, run, out);
            self.start_home(region, run, first, mask, Some(order), Cause::Prefetch, out);
            return Next::Wait;
        }
        if on && first.state() == PageState::Duplicated {
            let (run, first, mask) = self.frame_run(dir, region, left);
            self.start_collapse(region, run, first, mask, Some(order), out);
            return Next::Wait;
        }
        let run = self.equal_run(dir, region, left, first);
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
        let run = if first.owns_frame() {
            let (run, first, mask) = self.frame_run(dir, region, left);
            self.split_huge(dir, region, run, out);
            self.start_drop(region, run, first, mask, Some(order), out);
            run
        } else {
            // The content of what is in system memory is dropped chunk by chunk: that takes time.
            let drops = first.mapped_mask() != 0 || first.state() == PageState::System;
            let most = if drops { left.count.min(CHUNK_PAGES) } else { left.count };
            let run = self.equal_run(dir, region, Pages { count: most, ..left }, first);
            if drops {
                self.start_drop(region, run, first, first.mapped_mask(), Some(order), out);
            } else if first != Entry::ABSENT {
                Self::publish_same(region, run, Entry::ABSENT, out);
            }
            run
        };
        request.cursor = run.end();
        Next::Again
    }

    fn step_revoke(
        &mut self,
        dir: &impl Directory,
        order: u64,
        request: &mut Request,
        devices: u16,
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
        let mapped = first.mapped_mask() & devices;
        let narrow = || {
            Self::run_while(dir, region, left, |offset, entry| {
                entry.mapped_mask() & devices == mapped && !self.busy(region, left.first + offset, entry)
            })
        };
        let wide = if mapped == 0 { self.wide_run(dir, region, left) } else { None };
        let run = wide.unwrap_or_else(narrow);
        if mapped != 0 {
            self.start_revoke(region, run, mapped, devices, order, out);
        }
        request.cursor = run.end();
        Next::Again
    }
}

/// Not one of the pages that are to move, and not there already.
fn stays(entry: Entry, target: Target, only: Only) -> bool {
    let (away, device) = (entry.lives_on_device(), entry.device());
    let there = match target {
        Target::Home => !away,
        Target::Device(to) => away && device == to,
    };
    let selected = match only {
        Only::All => true,
        Only::InSystem => !away,
        Only::OnDevice(from) => away && device == from,
    };
    !there && !selected && !matches!(entry.state(), PageState::Poisoned)
}

fn settled_status(entry: Entry, target: Target) -> PageStatus {
    match entry.state() {
        PageState::Poisoned => PageStatus::Poisoned,
        _ if entry.is_settled_system() && entry.pinned() && target != Target::Home => PageStatus::Pinned,
        _ => PageStatus::AlreadyThere,
    }
}
