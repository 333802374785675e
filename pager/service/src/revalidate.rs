//! Taking back what devices may do and the program itself may not any more. mprotect, guards, shmdt and the like are silent, so the question
//! is asked when it matters: before a device is given work (`Revalidate`, sent by the SDK ahead of every access and every kernel).
//!
//! ```text
//!   for every segment that devices were told about, where it was granted anything:
//!     kernel: not its memory --> the segment ends                         (kernel_view)
//!     kernel: a guard        --> private content is dropped, mappings go
//!     kernel: fewer rights   --> mappings go; the next fault is answered by the new rights
//!   all revocations done, and what ended is let go of --> Done
//! ```
//! The SDK need not ask when nothing has changed: it compares the program's mappings with those of the last time, and a word that changes
//! with every grant (`sdk/src/validation.rs`).
//!
//! What runs on a device already is not stopped: it may go on under the old rights until it meets a fault, or until `session.protect` says
//! that they have changed.

use uhmm_ipc::message::pager::GrantedRange;
use uhmm_ipc::message::{ErrorCode, Reply, TraceId, pager};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};
use uhmm_pager_core::Pages;

use crate::advise::revoke_all;
use crate::calls::{Answer, refuse};
use crate::granted::Granted;
use crate::kernel_view::{Ended, Part, Shown};
use crate::requests::{Located, Piece};
use crate::service::Pager;
use crate::space::Segment;
use crate::then::Then;

/// Guards are looked for in at most so many granted pages of the whole space (100 us); a range of its own is always looked at.
const GUARD_PAGES_MAX: u64 = 1 << 14;

/// So many ranges are told: the SDK asks about each of them itself before it asks again.
const TOLD_MAX: usize = 32;

/// A caller who waits until devices have let go of addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LettingGo {
    conn: ConnId,
    call: CallId,
    space: u64,
    range: AddrRange,
    /// The answer tells what devices have mappings of.
    tells: bool,
}

/// What has to be taken back.
#[derive(Debug, Default)]
struct TakeBack {
    /// Not the segments' memory any more.
    gone: Vec<AddrRange>,
    guards: Vec<AddrRange>,
    pieces: Vec<Piece>,
    /// The same as parts of segments.
    taken: Vec<(u64, std::ops::Range<u64>)>,
}

impl TakeBack {
    /// What devices may do with a part of a segment, and what the kernel shows there.
    fn add(&mut self, segment: &Segment, Part { range, shown }: Part) {
        let part = pages_of(segment, range);
        let taken = match shown {
            Shown::Other => {
                self.gone.push(range);
                return;
            }
            Shown::Guard => {
                self.guards.push(range);
                vec![part]
            }
            Shown::Ours { read: false, .. } => vec![part],
            Shown::Ours { write: false, .. } => segment.granted.writable.within(part),
            Shown::Ours { .. } => return,
        };
        for part in taken {
            let pages = Pages { first: segment.first_page + part.start, count: part.end - part.start };
            self.pieces.push(Piece { located: Located { region: segment.region, pages }, offset: 0 });
            self.taken.push((segment.id, part));
        }
    }

    /// Ends what is gone; what is to be revoked is granted no more from then on. Returns around what ended, from `start` on if nothing did, and
    /// what to revoke. `None`: events must be read first, and nothing is forgotten: who asks again has to find all of it again.
    fn take<W>(
        self,
        world: &mut W,
        start: u64,
        mut end: impl FnMut(&mut W, AddrRange) -> Ended,
        granted: for<'a> fn(&'a mut W, u64) -> Option<&'a mut Granted>,
    ) -> Option<(AddrRange, Vec<Piece>)> {
        let mut over = AddrRange { start, len: 0 };
        for gone in self.gone {
            if end(world, gone) == Ended::NotYet {
                return None;
            }
            over = if over.len == 0 { gone } else { AddrRange { start: over.start, len: gone.end() - over.start } };
        }
        for (id, part) in self.taken {
            if let Some(granted) = granted(world, id) {
                granted.remove(part);
            }
        }
        Some((over, self.pieces))
    }
}

impl Pager {
    pub(crate) fn revalidate(&mut self, conn: ConnId, call: CallId, addr: u64, len_bytes: u64) -> Answer {
        let space_id = match self.space_of(conn) {
            Ok(space) => space,
            Err(error) => return Some(Err(error)),
        };
        let whole = len_bytes == 0;
        let range = if whole {
            Some(AddrRange { start: 0, len: !(PAGE_SIZE - 1) })
        } else {
            AddrRange::new(addr, len_bytes).ok()
        };
        let Some(range) = range else {
            return refuse(ErrorCode::Invalid, format!("[{addr:#x}, +{len_bytes:#x}) is not a range of whole pages"));
        };
        let back = self.find_excess(space_id, range, whole);
        self.drop_guarded(space_id, &back.guards);
        let end = |pager: &mut Self, gone| pager.end_what_is_gone(space_id, gone, false);
        let taken = back.take(self, range.start, end, |pager, id| Some(&mut pager.regions.segment_mut(id)?.granted));
        let Some((over, pieces)) = taken else {
            self.waiting_revalidations.push((conn, call, addr, len_bytes));
            return None;
        };
        let waiting = LettingGo { conn, call, space: space_id, range: over, tells: whole };
        if pieces.is_empty() {
            self.answer_when_let_go(waiting);
        } else {
            let then = Then::LetGo { addr: over.start, len_bytes: over.len, tells: whole };
            self.ask_pieces((conn, call, TraceId::default()), &pieces, then, revoke_all);
        }
        None
    }

    /// Events have been read.
    pub(crate) fn revalidate_what_waits(&mut self) {
        for (conn, call, addr, len_bytes) in std::mem::take(&mut self.waiting_revalidations) {
            if let Some(answer) = self.revalidate(conn, call, addr, len_bytes) {
                self.service.reactor.reply(conn, call, answer.map(Reply::Pager));
            }
        }
    }

    fn find_excess(&self, space_id: u64, range: AddrRange, whole: bool) -> TakeBack {
        let mut back = TakeBack::default();
        let mut guard_pages_left = GUARD_PAGES_MAX;
        for id in self.touched(space_id, range.start, range.end()) {
            let Some(segment) = self.regions.segment(id).filter(|segment| segment.granted_mask != 0) else { continue };
            let Some(inside) = segment.range().intersection(&range) else { continue };
            for pages in segment.granted.readable.within(pages_of(segment, inside)) {
                let addrs = AddrRange {
                    start: segment.addr + pages.start * PAGE_SIZE,
                    len: (pages.end - pages.start) * PAGE_SIZE,
                };
                let looks_for_guards = !whole || guard_pages_left >= pages.end - pages.start;
                guard_pages_left = guard_pages_left.saturating_sub(pages.end - pages.start);
                let parts =
                    if looks_for_guards { self.view(segment, addrs) } else { self.view_mappings(segment, addrs) };
                for part in parts.unwrap_or_default() {
                    back.add(segment, part);
                }
            }
        }
        back
    }

    /// The revocations are done.
    pub(crate) fn revalidated(&mut self, conn: ConnId, call: CallId, range: AddrRange, tells: bool) {
        let space = self.space_of(conn).unwrap_or(0);
        self.answer_when_let_go(LettingGo { conn, call, space, range, tells });
    }

    pub(crate) fn answer_when_let_go(&mut self, waiting: LettingGo) {
        if self.is_held(&waiting) {
            self.letting_go.push(waiting);
        } else {
            self.let_go(&waiting);
        }
    }

    /// A device has dropped a segment.
    pub(crate) fn answer_who_waited(&mut self) {
        for waiting in std::mem::take(&mut self.letting_go) {
            self.answer_when_let_go(waiting);
        }
    }

    fn let_go(&mut self, waiting: &LettingGo) {
        let granted = waiting.tells.then(|| self.granted_ranges(waiting.space)).flatten();
        let answer = granted.map_or(pager::Reply::Done, |ranges| pager::Reply::Granted { ranges });
        self.service.reactor.reply(waiting.conn, waiting.call, Ok(Reply::Pager(answer)));
    }

    /// `None`: too many to tell.
    fn granted_ranges(&self, space_id: u64) -> Option<Vec<GrantedRange>> {
        let mut ranges: Vec<GrantedRange> = Vec::new();
        for id in self.spaces.get(&space_id)?.segments.values() {
            let Some(segment) = self.regions.segment(*id).filter(|segment| segment.granted_mask != 0) else { continue };
            for pages in segment.granted.readable.within(0..segment.page_count) {
                let addr = segment.addr + pages.start * PAGE_SIZE;
                let len_bytes = (pages.end - pages.start) * PAGE_SIZE;
                let full = ranges.len() == TOLD_MAX;
                match ranges.last_mut() {
                    Some(last) if last.addr + last.len_bytes == addr => last.len_bytes += len_bytes,
                    _ if full => return None,
                    _ => ranges.push(GrantedRange { addr, len_bytes }),
                }
            }
        }
        Some(ranges)
    }

    fn is_held(&self, waiting: &LettingGo) -> bool {
        let held = |segment: &Segment| segment.space == waiting.space && segment.range().overlaps(&waiting.range);
        waiting.range.len > 0 && self.regions.all_retired().any(held)
    }
}

/// Pages of a segment, from its first one on.
fn pages_of(segment: &Segment, range: AddrRange) -> std::ops::Range<u64> {
    (range.start - segment.addr) / PAGE_SIZE..(range.end() - segment.addr) / PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDR: u64 = 64 * PAGE_SIZE;

    /// Eight pages of which devices may do everything.
    fn segment() -> Segment {
        let (tables, granted) = (Default::default(), Granted::all(8));
        Segment {
            id: 3,
            space: 1,
            region: 2,
            addr: ADDR,
            first_page: 100,
            page_count: 8,
            tables,
            granted_mask: 1,
            granted,
        }
    }

    fn part(pages: std::ops::Range<u64>, shown: Shown) -> Part {
        Part { range: range(pages), shown }
    }

    fn range(pages: std::ops::Range<u64>) -> AddrRange {
        AddrRange { start: ADDR + pages.start * PAGE_SIZE, len: (pages.end - pages.start) * PAGE_SIZE }
    }

    /// Two pages may only be read, one not even that, one is a guard, two are something else, two are as they were.
    fn find(segment: &Segment) -> TakeBack {
        let mut back = TakeBack::default();
        let ours = |read, write| Shown::Ours { read, write };
        let parts = [(0..2, ours(true, false)), (2..3, ours(false, false)), (3..4, Shown::Guard), (4..6, Shown::Other)];
        parts
            .into_iter()
            .chain([(6..8, ours(true, true))])
            .for_each(|(pages, shown)| back.add(segment, part(pages, shown)));
        back
    }

    fn take(segment: &mut Segment, ended: Ended) -> Option<(AddrRange, Vec<Pages>)> {
        let back = find(segment);
        let end = |segment: &mut Segment, gone| {
            assert_eq!((gone, segment.id), (range(4..6), 3));
            ended
        };
        let taken = back.take(segment, 0, end, |segment, id| (id == 3).then_some(&mut segment.granted));
        taken.map(|(over, pieces)| (over, pieces.iter().map(|piece| piece.located.pages).collect()))
    }

    #[test]
    fn who_waits_for_events_finds_again_what_has_to_be_revoked() {
        let mut segment = segment();
        for _ in 0..3 {
            assert_eq!(take(&mut segment, Ended::NotYet), None);
            assert_eq!(segment.granted, Granted::all(8), "nothing was taken back");
        }
        let revoked = [(100, 2), (102, 1), (103, 1)].map(|(first, count)| Pages { first, count });
        assert_eq!(take(&mut segment, Ended::Yes), Some((range(4..6), revoked.to_vec())));
        assert_eq!(segment.granted.writable.within(0..8), vec![4..8; 1]);
        assert_eq!(segment.granted.readable.within(0..8), vec![4..8; 1]);
    }
}
