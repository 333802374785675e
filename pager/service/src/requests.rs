//! Requests that take the core some time, and the answers that come of its outcomes.

use uhmm_ipc::message::pager::{Advice, MapKind, MapRun, PageStatus, Residency, ResidencyRun, StatusRun, Target};
use uhmm_ipc::message::{ErrorCode, Reply, TraceId, WireError, pager};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kernel_hook::PAGE_SIZE;
use uhmm_pager_core::{
    CoreError, DeviceId, Entry, Event, MapKind as CoreMapKind, Outcome, PageState, PageStatus as CoreStatus, Pages,
    RegionId, ReqId, Target as CoreTarget,
};

use crate::calls::{Answer, refuse};
use crate::directory::{FLAG_DEVICE_READ_ONLY, FLAG_IN_PLACE};
use crate::service::Pager;
use crate::space::{DEVICE_SLOTS, Phase};

/// Runs in one answer: fits 64 KiB with room to spare.
const ANSWER_RUNS_MAX: usize = 2048;

/// Who waits for a core request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PendingRequest {
    pub conn: ConnId,
    pub call: CallId,
    pub trace: TraceId,
    /// First page that was asked for: answers count from it.
    pub first_page: u64,
    /// Devices may not write the region.
    pub read_only: bool,
}

/// A checked range: one live region of the caller's own space.
#[derive(Clone, Copy, Debug)]
struct Located {
    region: u64,
    pages: Pages,
    whole: bool,
}

impl Pager {
    fn ask_core(&mut self, request: PendingRequest) -> ReqId {
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

    /// Finds the live region of the caller that holds all of `[addr, addr + len_bytes)`.
    fn locate(&self, conn: ConnId, addr: u64, len_bytes: u64) -> Result<Located, WireError> {
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
        let space = self.spaces.get(&space_id);
        let region = space.and_then(|space| space.region_at(addr, &self.regions)).and_then(|id| self.regions.get(id));
        let Some(region) = region.filter(|region| region.phase == Phase::Live) else {
            let text = format!("Range {} is in no region of this process: allocate it first", shown());
            return Err(WireError::new(ErrorCode::Fault, text));
        };
        let bounds = region.range();
        if end > bounds.end() {
            let text = format!("Range {} leaves its region [{:#x}, {:#x})", shown(), bounds.start, bounds.end());
            return Err(WireError::new(ErrorCode::Fault, text));
        }
        let pages = Pages { first: (addr - bounds.start) / PAGE_SIZE, count: len_bytes / PAGE_SIZE };
        Ok(Located { region: region.id, pages, whole: pages.count == region.page_count })
    }

    pub(crate) fn migrate(
        &mut self,
        conn: ConnId,
        call: CallId,
        trace: TraceId,
        addr: u64,
        len_bytes: u64,
        target: Target,
    ) -> Answer {
        let located = match self.locate(conn, addr, len_bytes) {
            Ok(located) => located,
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
        tracing::debug!(
            request = trace.0,
            region = located.region,
            ?target,
            page_count = located.pages.count,
            "Migrate"
        );
        let pending = PendingRequest { conn, call, trace, first_page: located.pages.first, read_only: false };
        let req = self.ask_core(pending);
        self.push(Event::Migrate { req, region: RegionId(located.region), pages: located.pages, target });
        None
    }

    pub(crate) fn query(&self, conn: ConnId, addr: u64, len_bytes: u64) -> Result<pager::Reply, WireError> {
        let located = self.locate(conn, addr, len_bytes)?;
        let Some(region) = self.regions.get(located.region) else {
            return Err(WireError::new(ErrorCode::NotFound, "The region is gone"));
        };
        let mut runs: Vec<ResidencyRun> = Vec::new();
        for offset in 0..located.pages.count {
            let seen = residency(region.directory.load(located.pages.first + offset));
            let full = runs.len() == ANSWER_RUNS_MAX;
            match runs.last_mut() {
                Some(run) if (run.residency, run.pinned, run.mapped_mask) == seen => run.page_count += 1,
                _ if full => break,
                _ => runs.push(ResidencyRun {
                    first_page: offset,
                    page_count: 1,
                    residency: seen.0,
                    pinned: seen.1,
                    mapped_mask: seen.2,
                }),
            }
        }
        Ok(pager::Reply::Residency { runs })
    }

    pub(crate) fn advise(&mut self, conn: ConnId, call: CallId, addr: u64, len_bytes: u64, advice: Advice) -> Answer {
        let located = match self.locate(conn, addr, len_bytes) {
            Ok(located) => located,
            Err(error) => return Some(Err(error)),
        };
        let (flag, on) = match advice {
            Advice::Pin | Advice::Unpin => {
                let trace = TraceId::default();
                let pending = PendingRequest { conn, call, trace, first_page: located.pages.first, read_only: false };
                let req = self.ask_core(pending);
                let on = advice == Advice::Pin;
                self.push(Event::Pin { req, region: RegionId(located.region), pages: located.pages, on });
                return None;
            }
            Advice::InPlace => (FLAG_IN_PLACE, true),
            Advice::MigrateOnFault => (FLAG_IN_PLACE, false),
            Advice::DeviceReadOnly => (FLAG_DEVICE_READ_ONLY, true),
            Advice::DeviceReadWrite => (FLAG_DEVICE_READ_ONLY, false),
        };
        if !located.whole {
            let text = format!("{advice:?} applies to whole regions: give the region's own range");
            return refuse(ErrorCode::Invalid, text);
        }
        self.set_region_flag(located.region, flag, on)
    }

    /// Takes effect with the next device fault; mappings that contradict it are revoked by moving the pages' owner.
    fn set_region_flag(&mut self, region_id: u64, flag: u64, on: bool) -> Answer {
        let Some(region) = self.regions.get_mut(region_id) else {
            return refuse(ErrorCode::NotFound, "The region is gone");
        };
        if let Err(error) = region.directory.set_flag(flag, on) {
            return refuse(ErrorCode::Io, format!("The directory could not be changed: {error}"));
        }
        if flag == FLAG_IN_PLACE {
            self.core.set_in_place(RegionId(region_id), on);
        }
        Some(Ok(pager::Reply::Done))
    }

    #[allow(clippy::too_many_arguments, reason = "the message's own fields, checked one by one")]
    pub(crate) fn resolve(
        &mut self,
        conn: ConnId,
        call: CallId,
        trace: TraceId,
        space: u64,
        region_id: u64,
        window: Pages,
        fault_page: u64,
        device: u8,
        write: bool,
    ) -> Answer {
        let region = self.regions.get(region_id).filter(|r| r.space == space && r.phase == Phase::Live);
        let Some(region) = region else {
            return refuse(ErrorCode::NotFound, format!("Region {region_id} of space {space} does not exist"));
        };
        let end = window.first.checked_add(window.count).filter(|end| *end <= region.page_count);
        let inside = end.is_some_and(|end| (window.first..end).contains(&fault_page));
        if !inside {
            let text =
                format!("Window {}+{} of page {fault_page} leaves region {region_id}", window.first, window.count);
            return refuse(ErrorCode::Invalid, text);
        }
        if usize::from(device) >= DEVICE_SLOTS || region.granted_mask & (1 << device) == 0 {
            return refuse(ErrorCode::Permission, format!("Region {region_id} was not granted to device {device}"));
        }
        let read_only = region.directory.flags() & FLAG_DEVICE_READ_ONLY != 0;
        if read_only && write {
            let text = format!("Region {region_id} is read-only for devices: page {fault_page} cannot be written");
            return refuse(ErrorCode::Permission, text);
        }
        let pending = PendingRequest { conn, call, trace, first_page: 0, read_only };
        let req = self.ask_core(pending);
        let device = DeviceId(device);
        self.push(Event::Resolve { req, region: RegionId(region_id), pages: window, fault_page, device, write });
        None
    }

    /// The core has finished a request.
    pub(crate) fn answer_request(&mut self, req: ReqId, outcome: Outcome) {
        let Some(pending) = self.requests.remove(&req) else { return };
        let answer = match outcome {
            Outcome::Done => Ok(pager::Reply::Done),
            Outcome::Migrated { runs, moved_pages } => {
                tracing::debug!(request = pending.trace.0, moved_pages, "Migrated");
                let runs = runs.iter().map(|run| StatusRun {
                    first_page: run.first.saturating_sub(pending.first_page),
                    page_count: run.count,
                    status: wire_status(run.status),
                });
                Ok(pager::Reply::Migrated { moved_pages, runs: bounded(runs.collect()) })
            }
            Outcome::Resolved { runs } => {
                let runs = runs.iter().map(|run| MapRun {
                    first_page: run.first,
                    page_count: run.count,
                    kind: match run.kind {
                        CoreMapKind::Frame(frame) => MapKind::Frame(frame),
                        CoreMapKind::System => MapKind::System,
                    },
                    writable: run.writable && !pending.read_only,
                });
                Ok(pager::Reply::Resolved { runs: runs.collect() })
            }
            Outcome::Failed(error) => Err(WireError::new(wire_code(&error), error.to_string())),
        };
        self.service.reactor.reply(pending.conn, pending.call, answer.map(Reply::Pager));
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

/// Residency, pinned, mapped mask of a raw entry. What does not decode is shown as lost: recovery poisons it.
pub(crate) fn residency(raw: u64) -> (Residency, bool, u8) {
    let Ok(entry) = Entry::decode(raw) else { return (Residency::Poisoned, false, 0) };
    let residency = match entry.state() {
        PageState::Absent => Residency::Absent,
        PageState::System | PageState::Duplicated => Residency::System,
        PageState::Device | PageState::Exclusive => Residency::Device(entry.device().0),
        PageState::MovingOut | PageState::MovingHome => Residency::Moving,
        PageState::Poisoned => Residency::Poisoned,
    };
    (residency, entry.pinned(), entry.mapped_mask())
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
    }
}

fn wire_code(error: &CoreError) -> ErrorCode {
    match error {
        CoreError::NoSuchRegion { .. } => ErrorCode::NotFound,
        CoreError::OutOfRange { .. } => ErrorCode::Invalid,
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
