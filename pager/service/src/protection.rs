//! What the client itself may do with its addresses limits what devices may do: asked of the kernel at device-fault time, because
//! userfaultfd does not report mprotect; and what changes it afterwards, as far as it is told.

use uhmm_ipc::message::{ErrorCode, TraceId, WireError, pager};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};
use uhmm_pager_core::{Backing, Event, Target};

use crate::advise::revoke_all;
use crate::calls::{Answer, refuse};
use crate::closing::Away;
use crate::kernel_view::{Ended, Part, Shown};
use crate::requests::{FaultKind, Piece};
use crate::service::Pager;
use crate::then::Then;

/// The part of a window that a device may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Allowed {
    /// Pages at its front that it may not.
    pub skip: u64,
    /// Pages after them.
    pub count: u64,
    /// The client may write there.
    pub writable: bool,
}

impl Pager {
    /// Cuts a device's window to the neighbouring pages that the client may use as it may use the faulting one: neither another
    /// protection, nor a guard, nor what is not the segment's memory any more. A range that is read as a whole goes on over all that may
    /// be read, and is writable only if all of it is: its first write asks again.
    pub(crate) fn allowed(
        &mut self,
        segment_id: u64,
        window: AddrRange,
        fault_addr: u64,
        kind: FaultKind,
    ) -> Result<Allowed, WireError> {
        let write = kind.write || kind.exclusive;
        let all = Allowed { skip: 0, count: window.len / PAGE_SIZE, writable: true };
        let Some(segment) = self.regions.segment(segment_id) else { return Ok(all) };
        let space = segment.space;
        let Some(parts) = self.view(segment, window) else { return Ok(all) };
        let part = parts.iter().position(|part| part.range.contains(fault_addr));
        let rest = &parts[part.unwrap_or(parts.len())..];
        let fault = |text: &str| Err(WireError::new(ErrorCode::Fault, format!("Address {fault_addr:#x} {text}")));
        let Some(Part { range, shown }) = rest.first().copied() else {
            return fault("is outside the window that was asked for");
        };
        match shown {
            Shown::Guard => {
                self.drop_guarded(space, &[range]);
                fault("is a guard page (MADV_GUARD_INSTALL)")
            }
            Shown::Other => match self.end_what_is_gone(space, range, false) {
                Ended::Yes => fault("is not mapped any more, or something else is mapped there"),
                Ended::NotYet => {
                    let text = format!("The mapping of address {fault_addr:#x} is changing: ask again");
                    Err(WireError::new(ErrorCode::Busy, text))
                }
            },
            Shown::Ours { read: false, .. } => fault("is not mapped, or may not be read"),
            Shown::Ours { write: false, .. } if write => {
                let text = format!("Address {fault_addr:#x} may not be written: its mapping is read-only");
                Err(WireError::new(ErrorCode::Permission, text))
            }
            Shown::Ours { write: writable, .. } => {
                let skip = (range.start - window.start) / PAGE_SIZE;
                let (len, writable) = if kind.whole && !write { readable_front(rest) } else { (range.len, writable) };
                Ok(Allowed { skip, count: len / PAGE_SIZE, writable })
            }
        }
    }

    /// A migration needs memory that can be read, without holes.
    pub(crate) fn check_mapped(&self, conn: ConnId, addr: u64, len_bytes: u64) -> Result<(), WireError> {
        let space_id = self.space_of(conn)?;
        let range = AddrRange { start: addr, len: len_bytes };
        let Some(vmas) = self.vmas(space_id, range) else { return Ok(()) };
        let mut next = addr;
        for vma in vmas.iter().take_while(|vma| vma.read && vma.start <= addr.max(vma.start)) {
            if vma.start > next {
                break;
            }
            next = vma.end;
        }
        if next < range.end() {
            let text = format!("{range} is not mapped and readable as a whole: see {next:#x}");
            return Err(WireError::new(ErrorCode::Invalid, text));
        }
        Ok(())
    }

    /// The client called mprotect: whatever devices map of the range was allowed by the old protection.
    pub(crate) fn protection_changed(&mut self, conn: ConnId, call: CallId, addr: u64, len_bytes: u64) -> Answer {
        let pieces = match self.locate(conn, addr, len_bytes) {
            Ok(pieces) => pieces,
            Err(error) => return Some(Err(error)),
        };
        self.ask_pieces((conn, call, TraceId::default()), &pieces, Then::Tell, revoke_all);
        None
    }

    /// First half of giving a range back to the kernel alone: its pages come home.
    pub(crate) fn release_range(&mut self, conn: ConnId, call: CallId, addr: u64, len_bytes: u64) -> Answer {
        let pieces = match self.managed_pieces(conn, addr, len_bytes) {
            Ok(pieces) => pieces,
            Err(error) => return Some(Err(error)),
        };
        // What was allocated is freed by its owner, as a whole.
        let allocated = |piece: &&Piece| {
            self.regions.get(piece.located.region).is_some_and(|region| region.backing == Backing::Shared)
        };
        match pieces.iter().filter(allocated).count() {
            0 if pieces.is_empty() => return Some(Ok(pager::Reply::Done)),
            0 => {}
            all if all == pieces.len() => return Some(Ok(pager::Reply::Done)),
            _ => {
                let text = format!(
                    "[{addr:#x}, +{len_bytes:#x}) holds memory that was allocated, not adopted: release what is around it"
                );
                return refuse(ErrorCode::Invalid, text);
            }
        }
        self.bring_home_to_release(conn, call, &pieces, addr, len_bytes);
        None
    }

    /// What of a range is managed; none of it after a release that is repeated.
    fn managed_pieces(&self, conn: ConnId, addr: u64, len_bytes: u64) -> Result<Vec<Piece>, WireError> {
        let space_id = self.space_of(conn)?;
        let range = AddrRange::new(addr, len_bytes).map_err(|e| WireError::new(ErrorCode::Invalid, e.to_string()))?;
        let touched = self.touched(space_id, range.start, range.end());
        let part = |id: &u64| {
            let segment = self.regions.segment(*id)?;
            let part = segment.range().intersection(&range)?;
            Some(self.locate(conn, part.start, part.len))
        };
        let pieces: Result<Vec<Vec<Piece>>, WireError> = touched.iter().filter_map(part).collect();
        Ok(pieces?.into_iter().flatten().collect())
    }

    fn bring_home_to_release(&mut self, conn: ConnId, call: CallId, pieces: &[Piece], addr: u64, len_bytes: u64) {
        let then = Then::Release { addr, len_bytes };
        self.ask_pieces((conn, call, TraceId::default()), pieces, then, |req, region, pages| Event::Migrate {
            req,
            region,
            pages,
            target: Target::Home,
        });
    }

    /// Second half: the pages are at home, so nothing is lost when nobody looks after them any more. Pages that a device took
    /// again meanwhile are brought home again; pages that cannot come home end it with an error.
    pub(crate) fn released(&mut self, conn: ConnId, call: CallId, addr: u64, len_bytes: u64) {
        let answer = |pager: &mut Self, result: Result<pager::Reply, WireError>| {
            pager.service.reactor.reply(conn, call, result.map(uhmm_ipc::message::Reply::Pager));
        };
        let Ok(pieces) = self.managed_pieces(conn, addr, len_bytes) else {
            return answer(self, Ok(pager::Reply::Done));
        };
        let Away { moving, lost } = self.away(&pieces);
        if lost {
            let text = format!(
                "Pages of [{addr:#x}, +{len_bytes:#x}) were lost with their device: release the range around them"
            );
            return answer(self, Err(WireError::new(ErrorCode::Io, text)));
        }
        if moving {
            return self.bring_home_to_release(conn, call, &pieces, addr, len_bytes);
        }
        let Ok(space_id) = self.space_of(conn) else { return };
        let range = AddrRange { start: addr, len: len_bytes };
        self.not_managed_any_more(space_id, range);
        // No device reads there any more when the caller goes on.
        self.revalidated(conn, call, range, false);
    }
}

/// Bytes at the front that may be read, and whether all of them may be written.
fn readable_front(parts: &[Part]) -> (u64, bool) {
    let rights = parts.iter().map_while(|part| match part.shown {
        Shown::Ours { read: true, write } => Some((part.range.len, write)),
        _ => None,
    });
    rights.fold((0, true), |(len, all), (more, write)| (len + more, all && write))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_as_a_whole_ends_where_it_may_not_be_read() {
        let part = |start: u64, shown| Part { range: AddrRange { start, len: PAGE_SIZE }, shown };
        let ours = |read, write| Shown::Ours { read, write };
        let parts = [part(0, ours(true, true)), part(4096, ours(true, false)), part(8192, ours(false, false))];
        assert_eq!(readable_front(&parts), (2 * PAGE_SIZE, false));
        assert_eq!(readable_front(&parts[..1]), (PAGE_SIZE, true));
        assert_eq!(readable_front(&[part(0, Shown::Guard), parts[0]]), (0, true));
    }
}
