//! What the operator asks of memory that is somebody else's: where its pages are, and to move them as their owner could.

use uhmm_ipc::constants::MAX_REST_MS;
use uhmm_ipc::message::pager::{Rest, StripCell, Target};
use uhmm_ipc::message::{ErrorCode, TraceId, WireError, pager};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};
use uhmm_kit::record::{self, What, Why};
use uhmm_pager_core::{Backing, DeviceId, Entry, Event, PageState, Pages, RegionId, Target as CoreTarget};

use crate::calls::{Answer, refuse};
use crate::home::Whose;
use crate::noted::place;
use crate::requests::{Located, Piece};
use crate::service::Pager;
use crate::space::{Phase, Region};
use crate::then::Then;

/// Pages that are looked at in a cell: a terabyte costs as much as a megabyte.
const LOOKS: u64 = 8;
/// As the wire has it.
const CELLS_MAX: u16 = 1024;

impl Pager {
    fn living(&self, region: u64) -> Result<&Region, WireError> {
        let living = self.regions.get(region).filter(|region| region.phase == Phase::Live);
        let missing = || format!("Region {region} does not exist: `uhmm status` lists those that do");
        living.ok_or_else(|| WireError::new(ErrorCode::NotFound, missing()))
    }

    /// A cell says what most of the pages are that were looked at; of as many, the one that is further away.
    pub(crate) fn strip(&self, region: u64, cells: u16) -> Result<pager::Reply, WireError> {
        let region = self.living(region)?;
        let cells = u64::from(cells.clamp(1, CELLS_MAX)).min(region.page_count.max(1));
        let cell = |cell: u64| {
            let first = cell * region.page_count / cells;
            let count = ((cell + 1) * region.page_count / cells).saturating_sub(first).max(1);
            let looks = count.min(LOOKS);
            let mut seen = [0u8; 32];
            for look in 0..looks {
                let raw = region.directory.load(first + look * count / looks);
                seen[usize::from(cell_of(raw).byte()) % 32] += 1;
            }
            let most = seen.iter().enumerate().max_by_key(|(_, count)| **count).map_or(0, |(byte, _)| byte);
            most as u8
        };
        Ok(pager::Reply::Strip((0..cells).map(cell).collect()))
    }

    pub(crate) fn move_region(
        &mut self,
        conn: ConnId,
        call: CallId,
        trace: TraceId,
        id: u64,
        target: Target,
    ) -> Answer {
        let region = match self.living(id) {
            Ok(region) => region,
            Err(error) => return Some(Err(error)),
        };
        if region.backing == Backing::File {
            return refuse(ErrorCode::Invalid, format!("Region {id} shows a file: devices use it in place"));
        }
        let (space, pages) = (region.space, Pages { first: 0, count: region.page_count });
        let target = match self.operators_target(&[space], target) {
            Ok(target) => target,
            Err(error) => return Some(Err(error)),
        };
        let event = self.event_at(What::Request, uhmm_pager_core::RegionId(id), pages);
        self.move_pieces(conn, call, trace, (event, &[piece_of(id, pages)]), (target, Then::Tell))
    }

    /// What of a process is managed in a range. Parts that are not, of whatever is mapped there, stay where they are.
    pub(crate) fn move_range(
        &mut self,
        conn: ConnId,
        call: CallId,
        trace: TraceId,
        (who, range): (Whose, AddrRange),
        (target, rest): (Target, Option<Rest>),
    ) -> Answer {
        if let Some(rest) = rest.filter(|rest| rest.ms > MAX_REST_MS) {
            let text = format!("Pages cannot rest for {} ms: give {MAX_REST_MS} at most", rest.ms);
            return refuse(ErrorCode::Invalid, text);
        }
        let range = match AddrRange::new(range.start, range.len) {
            Ok(range) => range,
            Err(error) => return refuse(ErrorCode::Invalid, error.to_string()),
        };
        let spaces = self.spaces_of(who);
        if spaces.is_empty() {
            let text = "This process has no memory under management: `uhmm status` lists those that have";
            return refuse(ErrorCode::NotFound, text);
        }
        let target = match self.operators_target(&spaces, target) {
            Ok(target) => target,
            Err(error) => return Some(Err(error)),
        };
        let pieces = self.movable_between(who, range.start, range.end());
        let Some(first) = pieces.first() else {
            return Some(Ok(pager::Reply::Migrated { moved_pages: 0, runs: Vec::new(), why: String::new() }));
        };
        let event = self.event_at(What::Request, uhmm_pager_core::RegionId(first.located.region), first.located.pages);
        let event = record::Event { addr: range.start, pages: range.len / PAGE_SIZE, ..event };
        if target != CoreTarget::Home {
            pieces.iter().for_each(|piece| self.core.is_held_to_a_limit(RegionId(piece.located.region)));
        }
        self.move_pieces(conn, call, trace, (event, &pieces), (target, rest.map_or(Then::Tell, Then::Rested)))
    }

    fn move_pieces(
        &mut self,
        conn: ConnId,
        call: CallId,
        trace: TraceId,
        (event, pieces): (record::Event, &[Piece]),
        (target, then): (CoreTarget, Then),
    ) -> Answer {
        let event = record::Event { why: Why::User, trace: trace.0, to: place(target), ..event };
        self.begin_request(conn, call, event);
        let migrate = |req, region, pages| Event::Migrate { req, region, pages, target };
        self.ask_pieces((conn, call, trace), pieces, then, migrate);
        None
    }

    /// Where an operator may send pages of these spaces.
    fn operators_target(&self, spaces: &[u64], target: Target) -> Result<CoreTarget, WireError> {
        let Target::Device(device) = target else { return Ok(CoreTarget::Home) };
        let Some(plan) = self.service.plan.device(device) else {
            let text = format!("Device {device} is not in the plan: see `uhmm status`");
            return Err(WireError::new(ErrorCode::NotFound, text));
        };
        if plan.coherent {
            let text = format!("Device {} is coherent: only its user's own programs move memory there", plan.name);
            return Err(WireError::new(ErrorCode::Permission, text));
        }
        if spaces.iter().any(|id| self.spaces.get(id).is_some_and(|space| space.state.at_home)) {
            let text = "Its process stays at home: let it leave with `uhmm home --release PID`";
            return Err(WireError::new(ErrorCode::Busy, text));
        }
        if self.records.is_closed(device) {
            return Err(WireError::new(ErrorCode::NoMemory, self.closed_text(device)));
        }
        Ok(CoreTarget::Device(DeviceId(device)))
    }
}

fn piece_of(region: u64, pages: Pages) -> Piece {
    Piece { located: Located { region, pages }, offset: 0 }
}

fn cell_of(raw: u64) -> StripCell {
    let Ok(entry) = Entry::decode(raw) else { return StripCell::Poisoned };
    match entry.state() {
        PageState::Absent => StripCell::Absent,
        PageState::System => StripCell::System,
        PageState::MovingOut | PageState::MovingHome => StripCell::Moving,
        PageState::Poisoned => StripCell::Poisoned,
        PageState::Device | PageState::Exclusive | PageState::Duplicated => StripCell::Device(entry.device().0),
    }
}
