//! A session that says goodbye: its process goes on without us, with all of its bytes.
//!
//! ```text
//!   CloseSpace --memory that was allocated is shown still--> Busy: its owner frees it
//!       |  from here on devices get nothing of the space
//!       `-> every page comes home, round by round until nothing is away --a page cannot--> Io: all stays as it was
//!             `-> some segments a turn: not registered any more, and cut --the last one--> the space ends --gone--> Done
//! ```
//! Whoever asks again (the link connects anew) is the one that is answered. A pager that dies on the way is asked again by the link, and goes
//! on with what is left.

use std::collections::{HashMap, VecDeque};

use uhmm_ipc::message::{ErrorCode, Reply, TraceId, WireError, pager};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kernel_hook::AddrRange;
use uhmm_pager_core::{Backing, Entry, Event, PageState, Target};

use crate::calls::{Answer, refuse};
use crate::directory::DirectoryFile;
use crate::requests::{Located, Piece};
use crate::service::Pager;
use crate::then::Then;

/// Segments that go in one turn.
const SEGMENTS_PER_TURN: usize = 64;

/// Sessions that say goodbye.
#[derive(Debug, Default)]
pub(crate) struct ClosingBook {
    /// Who is to be answered, by space.
    callers: HashMap<u64, (ConnId, CallId)>,
    /// Whose pages have come home.
    at_home: VecDeque<u64>,
}

impl ClosingBook {
    /// Devices get nothing of this space any more.
    pub(crate) fn has(&self, space_id: u64) -> bool {
        self.callers.contains_key(&space_id)
    }

    /// There is something to do in the next turn.
    pub(crate) fn works(&self) -> bool {
        !self.at_home.is_empty()
    }
}

/// What of some pages is not at home.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Away {
    pub moving: bool,
    pub lost: bool,
}

impl Pager {
    pub(crate) fn close_space(&mut self, conn: ConnId, call: CallId) -> Answer {
        let space_id = match self.space_of(conn) {
            Ok(id) => id,
            Err(error) => return Some(Err(error)),
        };
        let allocated = |piece: &Piece| {
            self.regions.get(piece.located.region).is_some_and(|region| region.backing == Backing::Shared)
        };
        let left = self.shown_of(space_id).iter().filter(|piece| allocated(piece)).count();
        if left > 0 {
            return refuse(ErrorCode::Busy, format!("{left} allocated regions are still managed: free them first"));
        }
        let under_way = self.closing.callers.insert(space_id, (conn, call)).is_some();
        if !under_way {
            // Device faults that wait hear that there is nothing for them any more.
            self.let_faults_go(space_id);
            self.bring_home_to_close(space_id);
        }
        None
    }

    /// All that is managed of a space.
    fn shown_of(&self, space_id: u64) -> Vec<Piece> {
        let segments = self.touched(space_id, 0, u64::MAX).into_iter().filter_map(|id| self.regions.segment(id));
        segments.map(|s| Piece { located: Located { region: s.region, pages: s.pages() }, offset: 0 }).collect()
    }

    fn bring_home_to_close(&mut self, space_id: u64) {
        let Some((conn, call)) = self.closing.callers.get(&space_id).copied() else { return };
        let pieces = self.shown_of(space_id);
        if pieces.is_empty() {
            return self.closing.at_home.push_back(space_id);
        }
        let (then, target) = (Then::Close { space: space_id }, Target::Home);
        let home = |req, region, pages| Event::Migrate { req, region, pages, target };
        self.ask_pieces((conn, call, TraceId::default()), &pieces, then, home);
    }

    /// A round is over. `stuck`: nothing came, and something never will.
    pub(crate) fn came_home_to_close(&mut self, space_id: u64, failed: Option<WireError>, stuck: Option<&str>) {
        let away = self.away(&self.shown_of(space_id));
        let reason = match stuck {
            _ if away.lost => Some("pages were lost with their device: release what is around them"),
            Some(why) => Some(why),
            None => None,
        };
        let error =
            reason.map(|why| WireError::new(ErrorCode::Io, format!("The session's memory stays managed: {why}")));
        match failed.or(error) {
            Some(error) => self.answer_closing(space_id, Err(error)),
            None if away.moving => self.bring_home_to_close(space_id),
            None => self.closing.at_home.push_back(space_id),
        }
    }

    /// One turn for sessions whose pages are at home.
    pub(crate) fn go_on_closing(&mut self) {
        let Some(space_id) = self.closing.at_home.pop_front() else { return };
        if !self.closing.has(space_id) || self.spaces.get(&space_id).is_none_or(|space| space.dying) {
            return;
        }
        let shown = self.touched(space_id, 0, u64::MAX);
        let some = shown.iter().take(SEGMENTS_PER_TURN).filter_map(|id| self.regions.segment(*id));
        let some: Vec<_> = some.map(|s| (s.range(), Located { region: s.region, pages: s.pages() })).collect();
        for (range, located) in some {
            if self.away(&[Piece { located, offset: 0 }]).moving {
                return self.bring_home_to_close(space_id);
            }
            self.not_managed_any_more(space_id, range);
        }
        if shown.len() > SEGMENTS_PER_TURN {
            return self.closing.at_home.push_back(space_id);
        }
        tracing::info!(space = space_id, "A session has ended: its process goes on with its memory");
        self.end_space(space_id);
    }

    /// Gives a range that is at home back to the kernel alone.
    pub(crate) fn not_managed_any_more(&mut self, space_id: u64, range: AddrRange) {
        if let Some(space) = self.spaces.get(&space_id)
            && let Err(error) = space.uffd.unregister(range)
        {
            tracing::debug!(%error, %range, "A released range was not registered");
        }
        for cut in self.cut(space_id, range.start, range.end()) {
            self.settle_cut(cut);
        }
    }

    /// What of some pages is not at home.
    pub(crate) fn away(&self, pieces: &[Piece]) -> Away {
        let mut away = Away::default();
        for (_, region, pages) in self.alike_pieces(pieces, DirectoryFile::alike) {
            match Entry::decode(region.directory.load(pages.first)) {
                Ok(entry) if entry.is_settled_system() => {}
                Ok(entry) if entry.state() != PageState::Poisoned => away.moving = true,
                _ => away.lost = true,
            }
        }
        away
    }

    /// A session's goodbye has come to its end: when the space is gone, or cannot go.
    pub(crate) fn answer_closing(&mut self, space_id: u64, result: Result<pager::Reply, WireError>) {
        let Some((conn, call)) = self.closing.callers.remove(&space_id) else { return };
        self.service.reactor.reply(conn, call, result.map(Reply::Pager));
    }
}
