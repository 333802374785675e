//! Requests that take the core some time, and the answers that come of its outcomes.

use uhmm_ipc::message::pager::{MapKind, MapRun, Only, PageStatus, Residency, ResidencyRun, StatusRun, Target};
use uhmm_ipc::message::{ErrorCode, Reply, TraceId, WireError, pager};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};
use uhmm_kit::record::{self, Place, What, Why};
use uhmm_pager_core::{
    Backing, CoreError, DeviceId, Entry, Event, MapKind as CoreMapKind, Only as CoreOnly, Outcome, PageState,
    PageStatus as CoreStatus, Pages, RegionId, ReqId, Target as CoreTarget,
};

use crate::calls::{Answer, refuse};
use crate::directory::DirectoryFile;
use crate::failures::add_reason;
use crate::home::AtHomeFault;
use crate::noted::place;
use crate::service::Pager;
use crate::space::{DEVICE_SLOTS, Phase, Region, Segment};
use crate::then::Then;

/// Runs in one answer: fits 64 KiB with room to spare.
pub(crate) const ANSWER_RUNS_MAX: usize = 2048;

/// Of a request that is about a whole space.
pub(crate) const NO_PAGES: Pages = Pages { first: 0, count: 0 };

/// Who waits for a core request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PendingRequest {
    pub conn: ConnId,
    pub call: CallId,
    pub trace: TraceId,
    /// Whose pages; 0: a whole space's.
    pub region: u64,
    /// Which; none: a whole space's.
    pub pages: Pages,
    /// First page that was asked for: answers count from it.
    pub first_page: u64,
    /// What to do with the answer.
    pub then: Then,
    /// One of several requests behind one call; 0: the only one.
    pub group: u64,
}

/// One call over several regions.
#[derive(Debug)]
pub(crate) struct Group {
    conn: ConnId,
    call: CallId,
    pub then: Then,
    left: usize,
    moved_pages: u64,
    runs: Vec<StatusRun>,
    why: String,
    error: Option<WireError>,
}

/// A part of a range that lies in one region.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub located: Located,
    /// Pages before it in the range.
    pub offset: u64,
}

/// A checked range: one live region of the caller's own space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Located {
    pub region: u64,
    pub pages: Pages,
}

/// What a device wants of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FaultKind {
    pub write: bool,
    pub whole: bool,
    pub exclusive: bool,
}

impl Group {
    /// `left` requests behind one call.
    pub(crate) fn new(conn: ConnId, call: CallId, then: Then, left: usize) -> Self {
        Self { conn, call, then, left, moved_pages: 0, runs: Vec::new(), why: String::new(), error: None }
    }
}

impl Pager {
    pub(crate) fn ask_core(&mut self, request: PendingRequest) -> ReqId {
        let id = ReqId(self.next_request);
        self.next_request += 1;
        self.requests.insert(id, request);
        id
    }

    /// The session's space, for client calls.
    pub(crate) fn space_of(&self, conn: ConnId) -> Result<u64, WireError> {
        let space = self.sessions.get(&conn).and_then(|session| session.space);
        space.ok_or_else(|| WireError::new(ErrorCode::Permission, "Open or attach a space before any other call"))
    }

    /// The regions that show `[addr, addr + len_bytes)`, part by part; each part is consecutive pages of one live region.
    pub(crate) fn locate(&self, conn: ConnId, addr: u64, len_bytes: u64) -> Result<Vec<Piece>, WireError> {
        let space_id = self.space_of(conn)?;
        let invalid = |text: String| WireError::new(ErrorCode::Invalid, text);
        let shown = || format!("[{addr:#x}, +{len_bytes:#x})");
        if len_bytes == 0 {
            return Err(invalid(format!("Range {} is empty: give at least one page", shown())));
        }
        if !addr.is_multiple_of(PAGE_SIZE) || !len_bytes.is_multiple_of(PAGE_SIZE) {
            return Err(invalid(format!("Range {} is not page aligned: round it to {PAGE_SIZE} bytes", shown())));
        }
        let end = addr.checked_add(len_bytes);
        let end = end.ok_or_else(|| invalid(format!("Range {} wraps around the address space", shown())))?;
        let mut pieces: Vec<Piece> = Vec::new();
        let mut at = addr;
        while at < end {
            let live = |s: &&Segment| self.regions.get(s.region).is_some_and(|region| region.phase == Phase::Live);
            let Some(segment) = self.segment_at(space_id, at).filter(live) else {
                let nowhere = self.touched(space_id, addr, end).is_empty();
                let (code, text) = if nowhere {
                    (
                        ErrorCode::Fault,
                        format!("Range {} is in no region of this process: allocate or adopt it first", shown()),
                    )
                } else {
                    (ErrorCode::Invalid, format!("Range {} leaves its region at {at:#x}: there is a hole", shown()))
                };
                return Err(WireError::new(code, text));
            };
            let to = segment.range().end().min(end);
            let first = segment.first_page + (at - segment.addr) / PAGE_SIZE;
            let pages = Pages { first, count: (to - at) / PAGE_SIZE };
            match pieces.last_mut().map(|piece| &mut piece.located) {
                Some(last) if last.region == segment.region && last.pages.end() == first => {
                    last.pages.count += pages.count
                }
                _ => {
                    let located = Located { region: segment.region, pages };
                    pieces.push(Piece { located, offset: (at - addr) / PAGE_SIZE });
                }
            }
            at = to;
        }
        Ok(pieces)
    }

    /// Parts of a range that are known to be alike, with the pages before them: `alike` says how many from a page on.
    pub(crate) fn alike_pieces<'a>(
        &'a self,
        pieces: &'a [Piece],
        alike: impl Fn(&DirectoryFile, u64) -> u64 + Copy + 'a,
    ) -> impl Iterator<Item = (u64, &'a Region, Pages)> {
        let live = |piece: &'a Piece| Some((piece, self.regions.get(piece.located.region)?));
        pieces.iter().filter_map(live).flat_map(move |(piece, region)| {
            let all = piece.located.pages;
            let mut left = all;
            std::iter::from_fn(move || {
                let offset = piece.offset + (left.first - all.first);
                let count = alike(&region.directory, left.first).clamp(1, left.count.max(1));
                let part = (left.count > 0).then_some(Pages { count, ..left })?;
                left = left.after(count);
                Some((offset, region, part))
            })
        })
    }

    /// Asks the core for every part of a range; the caller is answered when all are through.
    pub(crate) fn ask_pieces(
        &mut self,
        (conn, call, trace): (ConnId, CallId, TraceId),
        pieces: &[Piece],
        then: Then,
        event: impl Fn(ReqId, RegionId, Pages) -> Event,
    ) {
        let group = self.open_group(Group::new(conn, call, then, pieces.len()));
        for Piece { located, offset } in pieces {
            // Answers of the core count from the region's start, those to the client from the range's.
            let first_page = located.pages.first.wrapping_sub(*offset);
            self.forget_failures(located.region, located.pages);
            let (region, then) = (located.region, then.of_a_piece());
            if then == Then::Tell {
                self.end_rest_of_pages(RegionId(region), located.pages);
            }
            let pages = located.pages;
            let req = self.ask_core(PendingRequest { conn, call, trace, region, pages, first_page, then, group });
            self.push(event(req, RegionId(located.region), located.pages));
        }
    }

    /// Several requests behind one call begin.
    pub(crate) fn open_group(&mut self, group: Group) -> u64 {
        let id = self.next_group;
        self.next_group += 1;
        self.groups.insert(id, group);
        id
    }

    fn group_answered(&mut self, id: u64, answer: Result<pager::Reply, WireError>) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.left -= 1;
        match answer {
            Ok(pager::Reply::Migrated { moved_pages, runs, why }) => {
                group.moved_pages += moved_pages;
                group.runs.extend(runs);
                add_reason(&mut group.why, &why);
            }
            Ok(pager::Reply::Evicted { page_count }) => group.moved_pages += page_count,
            Ok(_) => {}
            Err(error) => drop(group.error.get_or_insert(error)),
        }
        if group.left > 0 {
            return;
        }
        let Some(group) = self.groups.remove(&id) else { return };
        self.end_request(group.conn, group.call, group.error.is_none());
        let Group { conn, call, then, moved_pages, mut runs, why, mut error, .. } = group;
        // Nothing came home and something never will: asking again would go on for ever.
        let stuck = moved_pages == 0 && runs.iter().any(|run| run.status == PageStatus::Io);
        if let (Then::Release { addr, len_bytes }, true) = (then, stuck) {
            let text = format!(
                "Pages of [{addr:#x}, +{len_bytes:#x}) could not be copied home: they stay managed, try again ({why})"
            );
            error.get_or_insert(WireError::new(ErrorCode::Io, text));
        }
        if let (Then::Release { addr, len_bytes }, None) = (then, &error) {
            return self.released(conn, call, addr, len_bytes);
        }
        if let Then::LetGo { addr, len_bytes, tells } = then {
            return self.revalidated(conn, call, AddrRange { start: addr, len: len_bytes }, tells);
        }
        if let (Then::Home { who, before }, None) = (then, &error) {
            return self.homed(conn, call, who, before + moved_pages, stuck.then_some(why));
        }
        if let Then::Close { space } = then {
            return self.came_home_to_close(space, error, stuck.then_some(&why));
        }
        runs.sort_unstable_by_key(|run| run.first_page);
        let answer = match error {
            Some(error) => Err(error),
            None if then == Then::CountEvicted => Ok(pager::Reply::Evicted { page_count: moved_pages }),
            None if runs.is_empty() => Ok(pager::Reply::Done),
            None => Ok(pager::Reply::Migrated { moved_pages, runs: bounded(runs), why }),
        };
        self.service.reactor.reply(conn, call, answer.map(Reply::Pager));
    }

    #[allow(clippy::too_many_arguments, reason = "the message's own fields, checked one by one")]
    pub(crate) fn migrate(
        &mut self,
        conn: ConnId,
        call: CallId,
        trace: TraceId,
        addr: u64,
        len_bytes: u64,
        target: Target,
        prefetch: bool,
        only: Only,
    ) -> Answer {
        let pieces = match self.locate(conn, addr, len_bytes) {
            Ok(pieces) => pieces,
            Err(error) => return Some(Err(error)),
        };
        let target = match target {
            Target::Home => CoreTarget::Home,
            Target::Device(device) if self.service.plan.device(device).is_some() => {
                CoreTarget::Device(DeviceId(device))
            }
            Target::Device(device) => {
                return refuse(ErrorCode::NotFound, format!("Device {device} is not in the plan: see `uhmm status`"));
            }
        };
        let only = match core_only(only, target) {
            Ok(only) => only,
            Err(error) => return Some(Err(error)),
        };
        if let Err(error) = self.check_mapped(conn, addr, len_bytes) {
            return Some(Err(error));
        }
        if let (CoreTarget::Device(_), Some(kept)) = (target, self.kept_at_home(conn, len_bytes / PAGE_SIZE)) {
            return Some(Ok(kept));
        }
        if let CoreTarget::Device(device) = target
            && let Some(kept) = self.kept_from(device.0, len_bytes / PAGE_SIZE)
        {
            return Some(Ok(kept));
        }
        if let CoreTarget::Device(device) = target
            && let Err(error) = self.may_use(conn, device.0).and_then(|()| self.can_take_out(conn, &pieces))
        {
            return Some(Err(error));
        }
        if prefetch {
            for piece in &pieces {
                self.change_attributes(piece.located, |attr| attr.with_prefetched(Some(target)));
            }
        }
        tracing::debug!(request = trace.0, addr, ?target, len_bytes, "Migrate");
        let event = record::Event::new(What::Request, record::now_ns());
        let (why, then) = if prefetch { (Why::Prefetch, Then::Prefetched) } else { (Why::User, Then::Tell) };
        let (trace_id, pages) = (trace.0, len_bytes / PAGE_SIZE);
        let space = self.space_of(conn).unwrap_or_default();
        let event = record::Event { why, to: place(target), trace: trace_id, space, addr, pages, ..event };
        self.begin_request(conn, call, event);
        self.ask_pieces((conn, call, trace), &pieces, then, |req, region, pages| match only {
            CoreOnly::All => Event::Migrate { req, region, pages, target },
            only => Event::MigrateOnly { req, region, pages, target, only },
        });
        None
    }

    pub(crate) fn query(&self, conn: ConnId, addr: u64, len_bytes: u64) -> Result<pager::Reply, WireError> {
        let pieces = self.locate(conn, addr, len_bytes)?;
        let mut runs: Vec<ResidencyRun> = Vec::new();
        for (offset, region, pages) in self.alike_pieces(&pieces, DirectoryFile::alike) {
            let seen = residency(region.directory.load(pages.first));
            let full = runs.len() == ANSWER_RUNS_MAX;
            match runs.last_mut() {
                Some(run) if (run.residency, run.pinned, run.mapped_mask, run.huge, run.coherent) == seen => {
                    run.page_count += pages.count
                }
                _ if full => break,
                _ => runs.push(ResidencyRun {
                    first_page: offset,
                    page_count: pages.count,
                    residency: seen.0,
                    pinned: seen.1,
                    mapped_mask: seen.2,
                    huge: seen.3,
                    coherent: seen.4,
                }),
            }
        }
        Ok(pager::Reply::Residency { runs })
    }

    #[allow(clippy::too_many_arguments, reason = "the message's own fields, checked one by one")]
    pub(crate) fn resolve(
        &mut self,
        conn: ConnId,
        call: CallId,
        trace: TraceId,
        space: u64,
        segment_id: u64,
        window: Pages,
        fault_page: u64,
        device: u8,
        kind: FaultKind,
    ) -> Answer {
        let segment = self.regions.segment(segment_id).filter(|segment| segment.space == space);
        let live = segment.and_then(|s| self.regions.get(s.region)).filter(|region| region.phase == Phase::Live);
        let (in_place, live) = (live.is_some_and(|r| r.backing == Backing::File), live.is_some());
        if live
            && !in_place
            && self.spaces.get(&space).is_some_and(|space| space.state.at_home)
            && !self.closing.has(space)
        {
            let fault = AtHomeFault { conn, call, trace, space, segment_id, window, fault_page, device, kind };
            self.home.faults.push(fault);
            return None;
        }
        let Some(segment) = segment.filter(|_| live && !self.closing.has(space)) else {
            return refuse(ErrorCode::NotFound, format!("Region {segment_id} of space {space} does not exist"));
        };
        if !in_place && self.records.is_closed(device) {
            return refuse(ErrorCode::NoMemory, self.closed_text(device));
        }
        let end = window.first.checked_add(window.count).filter(|end| *end <= segment.page_count);
        let inside = end.is_some_and(|end| (window.first..end).contains(&fault_page));
        if !inside {
            let (first, count) = (window.first, window.count);
            let text = format!("Window {first}+{count} of page {fault_page} leaves region {segment_id}");
            return refuse(ErrorCode::Invalid, text);
        }
        if usize::from(device) >= DEVICE_SLOTS || segment.granted_mask & (1 << device) == 0 {
            return refuse(ErrorCode::Permission, format!("Region {segment_id} was not granted to device {device}"));
        }
        let (region, first_page, fault_addr) =
            (segment.region, segment.first_page, segment.addr + fault_page * PAGE_SIZE);
        let addrs = AddrRange { start: segment.addr + window.first * PAGE_SIZE, len: window.count * PAGE_SIZE };
        let allowed = match self.allowed(segment_id, addrs, fault_addr, kind) {
            Ok(allowed) => allowed,
            Err(error) => return Some(Err(error)),
        };
        let pages = Pages { first: first_page + window.first + allowed.skip, count: allowed.count };
        let (pages, advised) = self.same_advice(region, pages, first_page + fault_page);
        if advised && kind.write {
            let text = format!("Address {fault_addr:#x} is read-only for devices by advice");
            return refuse(ErrorCode::Permission, text);
        }
        let read_only = advised || !allowed.writable;
        if let Some(segment) = self.regions.segment_mut(segment_id) {
            let first = pages.first - first_page;
            segment.granted.add(first..first + pages.count, !read_only);
        }
        if let Some(agent) = self.spaces.get(&space).and_then(|space| space.agent.as_ref()) {
            agent.count_grant();
        }
        let event = record::Event::new(What::DeviceFault, record::now_ns());
        let event = record::Event { trace: trace.0, space, addr: fault_addr, pages: pages.count, ..event };
        self.begin_request(conn, call, record::Event { to: Place::Device(device), ..event });
        let then = Then::Map { read_only };
        self.forget_failures(region, pages);
        self.end_rest_of_pages(RegionId(region), pages);
        let pending = PendingRequest { conn, call, trace, region, pages, first_page, then, group: 0 };
        let req = self.ask_core(pending);
        let FaultKind { write, whole, exclusive } = kind;
        let (device, fault_page) = (DeviceId(device), first_page + fault_page);
        self.push(Event::Resolve { req, region: RegionId(region), pages, fault_page, device, write, whole, exclusive });
        None
    }

    /// The part of a window around the faulting page that devices may use in the same way by advice, and whether only to read.
    fn same_advice(&self, region: u64, pages: Pages, fault_page: u64) -> (Pages, bool) {
        let Some(region) = self.regions.get(region) else { return (pages, false) };
        let read_only = |page: u64| region.directory.attr(page).read_only();
        let advised = read_only(fault_page);
        let first = (pages.first..fault_page).rev().take_while(|page| read_only(*page) == advised).last();
        let mut end = fault_page;
        while end < pages.end() && read_only(end) == advised {
            end += region.directory.attrs_alike(end);
        }
        let after = end.min(pages.end()) - fault_page;
        let first = first.unwrap_or(fault_page);
        (Pages { first, count: fault_page - first + after }, advised)
    }

    /// The core has finished a request.
    pub(crate) fn answer_request(&mut self, req: ReqId, outcome: Outcome) {
        let Some(pending) = self.requests.remove(&req) else { return };
        let answer = match outcome {
            Outcome::Done => Ok(pager::Reply::Done),
            Outcome::Migrated { moved_pages, .. } if pending.then == Then::CountEvicted => {
                Ok(pager::Reply::Evicted { page_count: moved_pages })
            }
            Outcome::Migrated { runs, moved_pages } => {
                tracing::debug!(request = pending.trace.0, moved_pages, "Migrated");
                let why = self.why_stayed(pending.conn, pending.trace, RegionId(pending.region), &runs);
                let runs = runs.iter().map(|run| StatusRun {
                    first_page: run.first.wrapping_sub(pending.first_page),
                    page_count: run.count,
                    status: wire_status(run.status),
                });
                Ok(pager::Reply::Migrated { moved_pages, runs: bounded(runs.collect()), why })
            }
            Outcome::Resolved { runs } => {
                let read_only = matches!(pending.then, Then::Map { read_only: true });
                let runs = runs.iter().map(|run| MapRun {
                    first_page: run.first - pending.first_page,
                    page_count: run.count,
                    kind: match run.kind {
                        CoreMapKind::Frame(frame) => MapKind::Frame(frame),
                        CoreMapKind::System => MapKind::System,
                    },
                    writable: run.writable && !read_only,
                });
                Ok(pager::Reply::Resolved { runs: runs.take(ANSWER_RUNS_MAX).collect() })
            }
            Outcome::Failed(error) => {
                let reason = match error {
                    CoreError::Io { page } => self.why_failed(RegionId(pending.region), page),
                    _ => None,
                };
                let text = reason.map_or_else(|| error.to_string(), |why| format!("{error}: {why}"));
                if matches!(error, CoreError::Io { .. }) {
                    tracing::warn!(request = pending.trace.0, region = pending.region, text, "A device gets no page");
                }
                Err(WireError::new(wire_code(&error), text))
            }
        };
        if pending.group != 0 {
            return self.group_answered(pending.group, answer);
        }
        self.end_request(pending.conn, pending.call, answer.is_ok());
        self.service.reactor.reply(pending.conn, pending.call, answer.map(Reply::Pager));
    }
}

/// What may be selected where.
fn core_only(only: Only, target: CoreTarget) -> Result<CoreOnly, WireError> {
    match (only, target) {
        (Only::All, _) => Ok(CoreOnly::All),
        (Only::InSystem, CoreTarget::Device(_)) => Ok(CoreOnly::InSystem),
        (Only::OnDevice(device), CoreTarget::Home) => Ok(CoreOnly::OnDevice(DeviceId(device))),
        _ => {
            let text = "Pages in system memory are selected to go to a device, and those on a device to come home";
            Err(WireError::new(ErrorCode::Invalid, text))
        }
    }
}

fn bounded(mut runs: Vec<StatusRun>) -> Vec<StatusRun> {
    if runs.len() > ANSWER_RUNS_MAX {
        let page_count = runs[ANSWER_RUNS_MAX - 1..].iter().map(|run| run.page_count).sum();
        runs.truncate(ANSWER_RUNS_MAX);
        if let Some(last) = runs.last_mut() {
            *last = StatusRun { page_count, status: PageStatus::Busy, ..*last };
        }
    }
    runs
}

/// Residency, pinned, devices that map it, huge, coherent of a raw entry. What does not decode is shown as lost: recovery poisons it.
pub(crate) fn residency(raw: u64) -> (Residency, bool, u8, bool, bool) {
    let Ok(entry) = Entry::decode(raw) else { return (Residency::Poisoned, false, 0, false, false) };
    let residency = match entry.state() {
        PageState::Absent => Residency::Absent,
        PageState::System => Residency::System,
        PageState::Duplicated => Residency::Duplicated(entry.device().0),
        PageState::Device => Residency::Device(entry.device().0),
        PageState::Exclusive => Residency::Exclusive(entry.device().0),
        PageState::MovingOut | PageState::MovingHome => Residency::Moving,
        PageState::Poisoned => Residency::Poisoned,
    };
    let coherent = entry.cpu_mapped() && entry.state() == PageState::Device;
    (residency, entry.pinned(), entry.mapped_mask() as u8, entry.huge(), coherent)
}

fn wire_status(status: CoreStatus) -> PageStatus {
    match status {
        CoreStatus::Ok => PageStatus::Moved,
        CoreStatus::AlreadyThere => PageStatus::AlreadyThere,
        CoreStatus::Busy => PageStatus::Busy,
        CoreStatus::Pinned => PageStatus::Pinned,
        CoreStatus::NoMemory => PageStatus::NoMemory,
        CoreStatus::Io => PageStatus::Io,
        CoreStatus::Poisoned => PageStatus::Poisoned,
        CoreStatus::Gone => PageStatus::Gone,
        CoreStatus::NotSelected => PageStatus::NotSelected,
    }
}

fn wire_code(error: &CoreError) -> ErrorCode {
    match error {
        CoreError::NoSuchRegion { .. } => ErrorCode::NotFound,
        CoreError::NotMigratable { .. } | CoreError::NoSuchDevice { .. } => ErrorCode::NotFound,
        CoreError::OutOfRange { .. } => ErrorCode::Invalid,
        CoreError::Gone { .. } => ErrorCode::Fault,
        CoreError::Busy { .. } => ErrorCode::Busy,
        CoreError::NoMemory { .. } => ErrorCode::NoMemory,
        CoreError::NoAccess { .. } => ErrorCode::Permission,
        CoreError::Poisoned { .. } | CoreError::Io { .. } => ErrorCode::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fragmented_answer_is_bounded_and_loses_no_page() {
        let status = |page: u64| if page.is_multiple_of(2) { PageStatus::Moved } else { PageStatus::Pinned };
        let runs: Vec<StatusRun> =
            (0..5000).map(|page| StatusRun { first_page: page, page_count: 1, status: status(page) }).collect();
        let runs = bounded(runs);
        assert_eq!(runs.len(), ANSWER_RUNS_MAX);
        assert_eq!(runs.iter().map(|run| run.page_count).sum::<u64>(), 5000);
        assert_eq!(runs.last().map(|run| run.status), Some(PageStatus::Busy));
    }

    #[test]
    fn an_entry_that_does_not_decode_is_shown_as_lost() {
        assert_eq!(residency(0xf).0, Residency::Poisoned);
    }
}
