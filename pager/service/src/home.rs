//! A process that stays at home, and a device that is emptied.
//!
//! ```text
//!   Home{pid, stay} --> the space is marked (also in the vault): no migration begins, device faults wait
//!        --> every page comes home, again until none is away (what was under way before the mark may still arrive)
//!        --> pages that nobody has touched are there too  --> Evicted{pages}
//!   Home{pid, stay: false}, or the end of the space  --> device faults that wait are asked again
//! ```
//! Debuggers and core dumps read a process by ways that cannot wait for a page (/proc/PID/mem, ptrace): for them a page on a device is an
//! error, and so is one that was never touched, because its first touch is a fault that the pager answers.

use std::collections::VecDeque;

use uhmm_ipc::message::pager::{PageStatus, StatusRun};
use uhmm_ipc::message::{ErrorCode, Reply, TraceId, WireError, pager};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kernel_hook::uffd::FillStop as HookStop;
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};
use uhmm_pager_core::{Backing, DeviceId, Entry, Event, PageState, Pages, RegionId, SpaceId, Target};

use crate::calls::{Answer, refuse};
use crate::requests::{FaultKind, Group, Located, NO_PAGES, PendingRequest, Piece};
use crate::service::Pager;
use crate::space::{Phase, Space};
use crate::then::Then;

/// System calls of one turn for pages that nobody has touched, and bytes of one of them.
const TURN_CALLS: u32 = 2048;
const CALL_BYTES: u64 = 32 << 20;

/// Whose pages come home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// All spaces of a process, by what it is called everywhere; 0: by its number here.
    Process { pid: u32, name: u64 },
    /// One space.
    Space(u64),
}

/// A device fault that waits until its process may leave home.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AtHomeFault {
    pub conn: ConnId,
    pub call: CallId,
    pub trace: TraceId,
    pub space: u64,
    pub segment_id: u64,
    pub window: Pages,
    pub fault_page: u64,
    pub device: u8,
    pub kind: FaultKind,
}

/// What is going on of all this.
#[derive(Debug, Default)]
pub(crate) struct HomeBook {
    /// Device faults of processes that stay at home.
    pub faults: Vec<AtHomeFault>,
    /// Processes that come home.
    pub homings: VecDeque<Homing>,
}

/// Pages that nobody has touched are to be there, and then somebody is answered.
#[derive(Debug)]
pub(crate) struct Homing {
    /// Nobody: a pager before had begun.
    caller: Option<(ConnId, CallId)>,
    /// What the caller hears; not yet known while more may come.
    answer: Option<pager::Reply>,
    untouched: VecDeque<Untouched>,
}

/// Where pages may never have been touched.
#[derive(Debug)]
enum Untouched {
    /// The kernel knows which.
    Private { space: u64, left: AddrRange },
    /// The directory knows which.
    Shared { region: u64, next_page: u64 },
}

impl Pager {
    pub(crate) fn home(&mut self, conn: ConnId, call: CallId, (pid, process): (u32, u64), stay: bool) -> Answer {
        let who = match pid {
            0 => match self.space_of(conn) {
                Ok(space) => Whose::Space(space),
                Err(error) => return Some(Err(error)),
            },
            pid => Whose::Process { pid, name: process },
        };
        let spaces = self.spaces_of(who);
        if spaces.is_empty() {
            let text = format!("Process {pid} has no memory under management: `uhmm status` lists those that have");
            return refuse(ErrorCode::NotFound, text);
        }
        for id in &spaces {
            if let Some(space) = self.spaces.get_mut(id) {
                space.state.at_home = stay;
            }
            self.keep_state(*id);
            tracing::info!(space = id, pid, stay, "A process stays at home, or may leave it again");
        }
        if !stay {
            spaces.into_iter().for_each(|space| self.let_faults_go(space));
            return Some(Ok(pager::Reply::Evicted { page_count: 0 }));
        }
        self.come_home(conn, call, who, 0);
        None
    }

    pub(crate) fn spaces_of(&self, who: Whose) -> Vec<u64> {
        let is_called = |space: &Space, name| space.pidfd.as_ref().is_some_and(|pidfd| pidfd.name().ok() == Some(name));
        let mine = |id: u64, space: &Space| match who {
            Whose::Process { pid, name: 0 } => space.state.pid == pid,
            Whose::Process { name, .. } => is_called(space, name),
            Whose::Space(of) => id == of,
        };
        let spaces = self.spaces.iter().filter(|(id, space)| !space.dying && mine(**id, space));
        spaces.map(|(id, _)| *id).collect()
    }

    /// What of a process can be away: what is shown to it of memory that is not a file.
    fn movable(&self, who: Whose) -> Vec<Piece> {
        self.movable_between(who, 0, u64::MAX)
    }

    /// The same between two addresses, which are whole pages.
    pub(crate) fn movable_between(&self, who: Whose, start: u64, end: u64) -> Vec<Piece> {
        let segments = self.spaces_of(who).into_iter().flat_map(|id| self.touched(id, start, end));
        let piece = |id: u64| {
            let segment = self.regions.segment(id)?;
            let region = self.regions.get(segment.region)?;
            let (from, to) = (segment.addr.max(start), segment.range().end().min(end));
            let movable = region.phase == Phase::Live && region.backing != Backing::File && from < to;
            let first = segment.first_page + (from - segment.addr) / PAGE_SIZE;
            let pages = || Pages { first, count: (to - from) / PAGE_SIZE };
            movable.then(|| Piece { located: Located { region: region.id, pages: pages() }, offset: 0 })
        };
        segments.filter_map(piece).collect()
    }

    fn come_home(&mut self, conn: ConnId, call: CallId, who: Whose, before: u64) {
        let pieces = self.movable(who);
        if pieces.is_empty() {
            return self.homed(conn, call, who, before, None);
        }
        let (then, target) = (Then::Home { who, before }, Target::Home);
        self.ask_pieces((conn, call, TraceId::default()), &pieces, then, |req, region, pages| Event::Migrate {
            req,
            region,
            pages,
            target,
        });
    }

    /// A round is over. `stuck`: nothing came, and something never will.
    pub(crate) fn homed(&mut self, conn: ConnId, call: CallId, who: Whose, moved_pages: u64, stuck: Option<String>) {
        if let Some(why) = stuck {
            let text = format!("Pages could not be copied home, the rest is there: {why}");
            let error = WireError::new(ErrorCode::Io, text);
            self.service.reactor.reply(conn, call, Err(error));
            return;
        }
        let pieces = self.movable(who);
        let away = |piece: &Piece| {
            let Located { region, pages } = piece.located;
            let away = |entry: Entry| entry.is_moving() || entry.lives_on_device();
            self.regions.get(region).is_some_and(|region| region.directory.any(pages, away))
        };
        if pieces.iter().any(away) {
            return self.come_home(conn, call, who, moved_pages);
        }
        let untouched = self.perhaps_untouched(who, &pieces);
        let answer = Some(pager::Reply::Evicted { page_count: moved_pages });
        self.home.homings.push_back(Homing { caller: Some((conn, call)), answer, untouched });
    }

    /// Memory that comes under management of a process that is kept at home: all of it is there, and shall be there to be read.
    pub(crate) fn made_at_home(&mut self, conn: ConnId, call: CallId, region_id: u64) {
        let Some(region) = self.regions.get(region_id) else { return };
        let space = region.space;
        if region.backing == Backing::File || !self.spaces.get(&space).is_some_and(|space| space.state.at_home) {
            return;
        }
        let pieces = [Piece { located: Located { region: region_id, pages: self.all_pages(region_id) }, offset: 0 }];
        let mut untouched = self.perhaps_untouched(Whose::Space(space), &pieces);
        let mine = |part: &Untouched| match part {
            Untouched::Private { left, .. } => {
                self.segment_at(space, left.start).is_some_and(|s| s.region == region_id)
            }
            Untouched::Shared { region, .. } => *region == region_id,
        };
        untouched.retain(mine);
        let caller = Some((conn, call));
        match self.home.homings.iter_mut().find(|homing| homing.caller == caller) {
            Some(homing) => homing.untouched.extend(untouched),
            None => self.home.homings.push_back(Homing { caller, answer: None, untouched }),
        }
    }

    /// Answers a call that has made regions, as soon as everything is there that shall be.
    pub(crate) fn answer_when_at_home(&mut self, conn: ConnId, call: CallId, answer: pager::Reply) {
        match self.home.homings.iter_mut().find(|homing| homing.caller == Some((conn, call))) {
            Some(homing) => homing.answer = Some(answer),
            None => drop(self.service.reactor.reply(conn, call, Ok(Reply::Pager(answer)))),
        }
    }

    /// A pager before had kept these at home, and may not have come to its end.
    pub(crate) fn go_on_being_home(&mut self) {
        let kept = self.spaces.iter().filter(|(_, space)| space.state.at_home && !space.dying);
        for id in kept.map(|(id, _)| *id).collect::<Vec<_>>() {
            let whose = Whose::Space(id);
            let untouched = self.perhaps_untouched(whose, &self.movable(whose));
            self.home.homings.push_back(Homing { caller: None, answer: None, untouched });
        }
    }

    fn perhaps_untouched(&self, who: Whose, pieces: &[Piece]) -> VecDeque<Untouched> {
        let backing = |region: u64| self.regions.get(region).map(|region| region.backing);
        let mut shared: Vec<u64> = pieces.iter().map(|piece| piece.located.region).collect();
        shared.retain(|region| backing(*region) == Some(Backing::Shared));
        shared.sort_unstable();
        shared.dedup();
        let shared = shared.into_iter().map(|region| Untouched::Shared { region, next_page: 0 });
        let private = self.spaces_of(who).into_iter().flat_map(|space| {
            let segments = self.touched(space, 0, u64::MAX).into_iter().filter_map(|id| self.regions.segment(id));
            let private = segments.filter(|segment| backing(segment.region) == Some(Backing::Private));
            private.map(move |segment| Untouched::Private { space, left: segment.range() })
        });
        shared.chain(private).collect()
    }

    /// One turn for those who wait until everything is there.
    pub(crate) fn go_on_homing(&mut self) {
        let Some(mut homing) = self.home.homings.pop_front() else { return };
        let mut calls = TURN_CALLS;
        while calls > 0 {
            let Some(part) = homing.untouched.pop_front() else {
                if let (Some((conn, call)), Some(answer)) = (homing.caller, homing.answer) {
                    self.service.reactor.reply(conn, call, Ok(Reply::Pager(answer)));
                }
                return;
            };
            let left = match part {
                Untouched::Private { space, left } => self.touch_private(space, left, &mut calls),
                Untouched::Shared { region, next_page } => self.touch_shared(region, next_page, &mut calls),
            };
            homing.untouched.extend(left);
        }
        self.home.homings.push_back(homing);
    }

    /// The kernel's zero page, wherever there is nothing. What is left when the turn is over.
    fn touch_private(&mut self, space_id: u64, mut left: AddrRange, calls: &mut u32) -> Option<Untouched> {
        while left.len > 0 && *calls > 0 {
            *calls -= 1;
            let uffd = &self.spaces.get(&space_id)?.uffd;
            let wanted = AddrRange { len: left.len.min(CALL_BYTES), ..left };
            let outcome = uffd.zeropage(wanted, false).ok()?;
            let skipped = match outcome.stop {
                None => 0,
                // It got as far as something.
                Some(HookStop::Again) if outcome.done_bytes > 0 => 0,
                // An event is unread: it is read before the next turn.
                Some(HookStop::Again) => {
                    self.reread.insert(space_id);
                    *calls = 0;
                    0
                }
                Some(HookStop::NoProcess | HookStop::NoMemory) => return None,
                // There is something, or no mapping any more.
                Some(_) => PAGE_SIZE,
            };
            let done = (outcome.done_bytes + skipped).min(left.len);
            left = AddrRange { start: left.start + done, len: left.len - done };
        }
        (left.len > 0).then_some(Untouched::Private { space: space_id, left })
    }

    /// As if the program read them.
    fn touch_shared(&mut self, region_id: u64, mut next_page: u64, calls: &mut u32) -> Option<Untouched> {
        let page_count = self.regions.get(region_id)?.page_count;
        while next_page < page_count && *calls > 0 {
            let entry = Entry::decode(self.regions.get(region_id)?.directory.load(next_page));
            if entry.is_ok_and(|entry| entry.state() == PageState::Absent) {
                *calls -= 1;
                let (region, page) = (RegionId(region_id), next_page);
                self.push(Event::CpuFault { region, page, write: false, wp: false, minor: false });
                self.drain();
            }
            next_page += 1;
        }
        (next_page < page_count).then_some(Untouched::Shared { region: region_id, next_page })
    }

    /// A migration of a process that stays at home.
    pub(crate) fn kept_at_home(&self, conn: ConnId, page_count: u64) -> Option<pager::Reply> {
        let space = self.spaces.get(&self.space_of(conn).ok()?)?;
        space.state.at_home.then(|| pager::Reply::Migrated {
            moved_pages: 0,
            runs: vec![StatusRun { first_page: 0, page_count, status: PageStatus::Pinned }],
            why: "The process is kept at home by `uhmm home`, or by a fatal signal".to_owned(),
        })
    }

    /// Device faults of a process that may leave home again, or is gone, are asked again.
    pub(crate) fn let_faults_go(&mut self, space_id: u64) {
        let (mine, others) = std::mem::take(&mut self.home.faults).into_iter().partition(|f| f.space == space_id);
        self.home.faults = others;
        for fault in mine {
            let AtHomeFault { conn, call, trace, space, segment_id, window, fault_page, device, kind } = fault;
            let answer = self.resolve(conn, call, trace, space, segment_id, window, fault_page, device, kind);
            if let Some(answer) = answer {
                self.service.reactor.reply(conn, call, answer.map(Reply::Pager));
            }
        }
    }

    /// A migration to a device that is drained.
    pub(crate) fn kept_from(&self, device: u8, page_count: u64) -> Option<pager::Reply> {
        self.records.is_closed(device).then(|| pager::Reply::Migrated {
            moved_pages: 0,
            runs: vec![StatusRun { first_page: 0, page_count, status: PageStatus::NoMemory }],
            why: self.closed_text(device),
        })
    }

    /// What whoever wants to go there is told.
    pub(crate) fn closed_text(&self, device: u8) -> String {
        let name = self.service.plan.device(device).map_or("?", |device| device.name.as_str());
        format!("Device {name} is drained and takes no pages until `uhmm undrain {name}`: use another one")
    }

    /// Everybody's pages come home from a device.
    pub(crate) fn empty_device(&mut self, conn: ConnId, call: CallId, device: u8, then: pager::Emptied) -> Answer {
        if self.service.plan.device(device).is_none() {
            return refuse(ErrorCode::NotFound, format!("The plan has no device {device}"));
        }
        if then != pager::Emptied::Unchanged {
            tracing::info!(device, ?then, "Pages may come to a device, or may not");
            if let Err(error) = self.records.close(device, then == pager::Emptied::Closed) {
                return refuse(ErrorCode::Io, format!("This cannot be written down: {error}"));
            }
        }
        if then == pager::Emptied::Opened {
            return Some(Ok(pager::Reply::Evicted { page_count: 0 }));
        }
        let spaces: Vec<u64> = self.spaces.iter().filter(|(_, space)| !space.dying).map(|(id, _)| *id).collect();
        if spaces.is_empty() {
            return Some(Ok(pager::Reply::Evicted { page_count: 0 }));
        }
        let group = self.open_group(Group::new(conn, call, Then::CountEvicted, spaces.len()));
        for space in spaces {
            let (trace, then) = (TraceId::default(), Then::CountEvicted);
            let req = self.ask_core(PendingRequest {
                conn,
                call,
                trace,
                region: 0,
                pages: NO_PAGES,
                first_page: 0,
                then,
                group,
            });
            self.push(Event::Evict { req, space: SpaceId(space), device: DeviceId(device), page_count: 0 });
        }
        None
    }
}
