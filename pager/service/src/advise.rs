//! Advice and its cousins: what a client says about ranges, beside moving them.
//!
//! Advice is one word a page in the directory (`uhmm_pager_core::Attr`), so a range can be split without any work and everything
//! survives a crash; where all of 512 pages have the same, one word in all (`words.rs`). The same value again changes no word, and then nothing is invalidated.

use std::cell::Cell;

use uhmm_ipc::message::pager::{AccessMode, Advice, AttributeRun, Attributes, FaultPoint, Target};
use uhmm_ipc::message::{ErrorCode, TraceId, WireError, pager};
use uhmm_ipc::{CallId, ConnId};
use uhmm_pager_core::{
    Attr, Backing, DeviceId, Entry, Event, Pages, RegionId, ReqId, SpaceId, StepResult, Target as CoreTarget,
};

use crate::calls::{Answer, refuse};
use crate::requests::{ANSWER_RUNS_MAX, Located, NO_PAGES, PendingRequest, Piece};
use crate::service::Pager;
use crate::space::DEVICE_SLOTS;
use crate::then::Then;

fn core_target(target: Target) -> CoreTarget {
    match target {
        Target::Home => CoreTarget::Home,
        Target::Device(device) => CoreTarget::Device(DeviceId(device)),
    }
}

pub(crate) fn wire_target(target: CoreTarget) -> Target {
    match target {
        CoreTarget::Home => Target::Home,
        CoreTarget::Device(device) => Target::Device(device.0),
    }
}

/// Every device loses its mappings, and faults anew.
pub(crate) fn revoke_all(req: ReqId, region: RegionId, pages: Pages) -> Event {
    Event::RevokeMappings { req, region, pages, devices: u8::MAX }
}

/// The word after some advice; `None` for advice that is not kept in it.
fn advised(attr: Attr, advice: Advice) -> Option<Attr> {
    let with = |mask: u8, device: u8, on: bool| if on { mask | 1 << device } else { mask & !(1 << device) };
    Some(match advice {
        Advice::Pin | Advice::Unpin => return None,
        Advice::InPlace => attr.with_in_place_mask(u8::MAX),
        Advice::MigrateOnFault => attr.with_in_place_mask(0),
        Advice::DeviceReadOnly => attr.with_read_only(true),
        Advice::DeviceReadWrite => attr.with_read_only(false),
        Advice::Access { device, mode } => attr
            .with_in_place_mask(with(attr.in_place_mask(), device, mode == AccessMode::InPlace))
            .with_no_access_mask(with(attr.no_access_mask(), device, mode == AccessMode::None)),
        Advice::PreferredLocation(target) => attr.with_preferred(target.map(core_target)),
        Advice::ReadMostly(on) => attr.with_read_mostly(on),
        Advice::Granularity(log2_pages) => attr.with_granularity(log2_pages),
    })
}

impl Pager {
    pub(crate) fn advise(&mut self, conn: ConnId, call: CallId, addr: u64, len_bytes: u64, advice: Advice) -> Answer {
        let pieces = match self.locate(conn, addr, len_bytes) {
            Ok(pieces) => pieces,
            Err(error) => return Some(Err(error)),
        };
        if let Err(error) = self.check_advice(conn, advice) {
            return Some(Err(error));
        }
        let who = (conn, call, TraceId::default());
        if matches!(advice, Advice::Pin | Advice::Unpin) {
            let on = advice == Advice::Pin;
            self.ask_pieces(who, &pieces, Then::Tell, |req, region, pages| Event::Pin { req, region, pages, on });
            return None;
        }
        let mut changed = false;
        for piece in &pieces {
            changed |= self.change_attributes(piece.located, |attr| advised(attr, advice).unwrap_or(attr));
        }
        if !changed {
            return Some(Ok(pager::Reply::Done));
        }
        // Devices ask again, and are answered by the new advice.
        self.ask_pieces(who, &pieces, Then::Tell, revoke_all);
        None
    }

    fn check_advice(&self, conn: ConnId, advice: Advice) -> Result<(), WireError> {
        let device = match advice {
            Advice::Access { device, .. } | Advice::PreferredLocation(Some(Target::Device(device))) => device,
            Advice::Granularity(Some(log2_pages)) if log2_pages > 63 => {
                let text = format!("Granularity 2^{log2_pages} pages is too large: 63 is the most");
                return Err(WireError::new(ErrorCode::Invalid, text));
            }
            _ => return Ok(()),
        };
        if usize::from(device) >= DEVICE_SLOTS || self.service.plan.device(device).is_none() {
            let text = format!("Device {device} is not in the plan: see `uhmm status`");
            return Err(WireError::new(ErrorCode::NotFound, text));
        }
        // Pages go where they are preferred, whoever asks for them.
        self.rule_allows(self.space_of(conn)?, device)
    }

    /// Returns whether any word has changed.
    pub(crate) fn change_attributes(&mut self, located: Located, change: impl Fn(Attr) -> Attr) -> bool {
        let Some(region) = self.regions.get(located.region) else { return false };
        let changed = Cell::new(false);
        let noted = |old: Attr| {
            let new = change(old);
            changed.set(changed.get() || new != old);
            new
        };
        if let Err(error) = region.directory.change_attrs(located.pages, noted) {
            tracing::error!(%error, region = region.id, "Advice cannot be written");
        }
        changed.get()
    }

    pub(crate) fn query_attributes(&self, conn: ConnId, addr: u64, len_bytes: u64) -> Result<pager::Reply, WireError> {
        let pieces = self.locate(conn, addr, len_bytes)?;
        let mut runs: Vec<AttributeRun> = Vec::new();
        for (offset, region, pages) in self.alike_pieces(&pieces, |d, page| d.attrs_alike(page).min(d.alike(page))) {
            let page = pages.first;
            let attr = region.directory.attr(page);
            let pinned = Entry::decode(region.directory.load(page)).is_ok_and(Entry::pinned);
            let attributes = Attributes {
                preferred: attr.preferred().map(wire_target),
                prefetched: attr.prefetched().map(wire_target),
                in_place_mask: attr.in_place_mask(),
                no_access_mask: attr.no_access_mask(),
                read_mostly: attr.read_mostly(),
                device_read_only: attr.read_only(),
                granularity_log2_pages: attr.granularity_log2_pages(),
                pinned,
            };
            let full = runs.len() == ANSWER_RUNS_MAX;
            match runs.last_mut() {
                Some(run) if run.attributes == attributes => run.page_count += pages.count,
                _ if full => break,
                _ => runs.push(AttributeRun { first_page: offset, page_count: pages.count, attributes }),
            }
        }
        Ok(pager::Reply::Attributes { runs })
    }

    pub(crate) fn discard(&mut self, conn: ConnId, call: CallId, addr: u64, len_bytes: u64) -> Answer {
        let pieces = match self.locate(conn, addr, len_bytes) {
            Ok(pieces) => pieces,
            Err(error) => return Some(Err(error)),
        };
        let shared = |piece: &Piece| {
            self.regions.get(piece.located.region).is_some_and(|region| region.backing == Backing::Shared)
        };
        if !pieces.iter().all(shared) {
            let text = "Only shared memory is discarded by a call: use madvise(MADV_DONTNEED) on private memory";
            return refuse(ErrorCode::Invalid, text);
        }
        let who = (conn, call, TraceId::default());
        self.ask_pieces(who, &pieces, Then::Tell, |req, region, pages| Event::Discard { req, region, pages });
        None
    }

    pub(crate) fn evict(&mut self, conn: ConnId, call: CallId, device: u8, page_count: u64) -> Answer {
        let space = match self.space_of(conn) {
            Ok(space) => SpaceId(space),
            Err(error) => return Some(Err(error)),
        };
        if self.service.plan.device(device).is_none() {
            return refuse(ErrorCode::NotFound, format!("The plan has no device {device}"));
        }
        let (trace, then) = (TraceId::default(), Then::CountEvicted);
        let pending = PendingRequest { conn, call, trace, region: 0, pages: NO_PAGES, first_page: 0, then, group: 0 };
        let req = self.ask_core(pending);
        self.push(Event::Evict { req, space, device: DeviceId(device), page_count });
        None
    }

    pub(crate) fn inject(&mut self, conn: ConnId, point: FaultPoint, nth: u32) -> Answer {
        let space = match self.space_of(conn) {
            Ok(space) => space,
            Err(error) => return Some(Err(error)),
        };
        if !self.service.plan.fault_injection {
            let text = "Faults are injected only where the manifest says fault_injection = true";
            return refuse(ErrorCode::Permission, text);
        }
        match point {
            FaultPoint::HugeFrames | FaultPoint::Frames => {
                let huge = point == FaultPoint::HugeFrames;
                self.push(Event::InjectAllocation { space: SpaceId(space), huge, nth });
            }
            FaultPoint::CopyOut | FaultPoint::CopyHome | FaultPoint::SystemHuge | FaultPoint::SystemPages => {
                self.injections.insert((space, point), nth);
            }
        }
        Some(Ok(pager::Reply::Done))
    }

    /// The result of a copy, or a failure that somebody ordered.
    pub(crate) fn injected(&mut self, of: (RegionId, Pages), point: FaultPoint, result: StepResult) -> StepResult {
        if self.injections.is_empty() {
            return result;
        }
        let (region, pages) = of;
        let space = self.regions.get(region.0).map_or(0, |region| region.space);
        let Some(left) = self.injections.get_mut(&(space, point)) else { return result };
        let fails = *left == 1;
        *left = left.saturating_sub(1);
        if *left == 0 {
            self.injections.remove(&(space, point));
        }
        if fails {
            self.note_failure(region, pages, "A failure was ordered by injection");
            return StepResult::Io;
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_of_one_device_leaves_the_others_alone() {
        let attr = Attr::default().with_in_place_mask(0b11);
        let none = advised(attr, Advice::Access { device: 0, mode: AccessMode::None }).unwrap();
        assert_eq!((none.in_place_mask(), none.no_access_mask()), (0b10, 0b01));
        let back = advised(none, Advice::Access { device: 0, mode: AccessMode::Migrate }).unwrap();
        assert_eq!((back.in_place_mask(), back.no_access_mask()), (0b10, 0));
        assert_eq!(advised(back, Advice::MigrateOnFault).unwrap(), Attr::default());
    }

    #[test]
    fn the_same_advice_again_is_no_change() {
        for advice in [Advice::InPlace, Advice::ReadMostly(true), Advice::Granularity(Some(3))] {
            let once = advised(Attr::default(), advice).unwrap();
            assert_ne!(once, Attr::default());
            assert_eq!(advised(once, advice), Some(once));
        }
    }
}
