//! What the operator asks of regions that are somebody else's: where their pages are, and to move them as their owner could.

use uhmm_ipc::message::pager::{StripCell, Target};
use uhmm_ipc::message::{ErrorCode, TraceId, WireError, pager};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kit::record::{self, What, Why};
use uhmm_pager_core::{Backing, DeviceId, Entry, Event, PageState, Pages, Target as CoreTarget};

use crate::calls::{Answer, refuse};
use crate::noted::place;
use crate::requests::{Located, Piece, Then};
use crate::service::Pager;
use crate::space::{Phase, Region};

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
        let target = match target {
            Target::Home => CoreTarget::Home,
            Target::Device(device) => {
                let Some(plan) = self.service.plan.device(device) else {
                    return refuse(
                        ErrorCode::NotFound,
                        format!("Device {device} is not in the plan: see `uhmm status`"),
                    );
                };
                if plan.coherent {
                    let text =
                        format!("Device {} is coherent: only its user's own programs move memory there", plan.name);
                    return refuse(ErrorCode::Permission, text);
                }
                if self.spaces.get(&space).is_some_and(|space| space.state.at_home) {
                    let text = "Its process stays at home: let it leave with `uhmm home --release PID`";
                    return refuse(ErrorCode::Busy, text);
                }
                CoreTarget::Device(DeviceId(device))
            }
        };
        let event = self.event_at(What::Request, uhmm_pager_core::RegionId(id), pages);
        let event = record::Event { why: Why::User, trace: trace.0, to: place(target), ..event };
        self.begin_request(conn, call, event);
        let piece = Piece { located: Located { region: id, pages }, offset: 0 };
        let migrate = |req, region, pages| Event::Migrate { req, region, pages, target };
        self.ask_pieces((conn, call, trace), &[piece], Then::Tell, migrate);
        None
    }
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
