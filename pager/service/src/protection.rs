//! What the client itself may do with its addresses limits what devices may do: asked of the kernel at device-fault time, because
//! userfaultfd does not report mprotect; and what changes it afterwards, as far as it is told.

use uhmm_ipc::message::{ErrorCode, TraceId, WireError, pager};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};
use uhmm_pager_core::{Entry, Event, PageState, Target};

use crate::advise::revoke_all;
use crate::calls::Answer;
use crate::requests::{Piece, Then};
use crate::service::Pager;

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
    /// Cuts a device's window to the one mapping that the faulting address lies in.
    pub(crate) fn allowed(
        &self,
        space_id: u64,
        addr: u64,
        page_count: u64,
        fault_addr: u64,
        write: bool,
    ) -> Result<Allowed, WireError> {
        let range = AddrRange { start: addr, len: page_count * PAGE_SIZE };
        let from_fault = AddrRange { start: fault_addr, len: range.end() - fault_addr };
        let Some(vmas) = self.vmas(space_id, from_fault) else {
            return Ok(Allowed { skip: 0, count: page_count, writable: true });
        };
        let Some(vma) = vmas.first().filter(|vma| vma.read && vma.start <= fault_addr) else {
            let text = format!("Address {fault_addr:#x} is not mapped, or may not be read");
            return Err(WireError::new(ErrorCode::Fault, text));
        };
        if write && !vma.write {
            let text = format!("Address {fault_addr:#x} may not be written: its mapping is read-only");
            return Err(WireError::new(ErrorCode::Permission, text));
        }
        // Neighbouring mappings of the same protection were one before they were split, by advice for example.
        let same = vmas.iter().take_while(|other| (other.read, other.write) == (vma.read, vma.write));
        let mut end = vma.end;
        for next in same.skip(1) {
            if next.start != end {
                break;
            }
            end = next.end;
        }
        let start = vma.start.max(addr);
        let end = end.min(range.end());
        let skip = (start - addr) / PAGE_SIZE;
        Ok(Allowed { skip, count: (end - start) / PAGE_SIZE, writable: vma.write })
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
        let pieces = match self.locate(conn, addr, len_bytes) {
            Ok(pieces) => pieces,
            // Repeated after a restart: the first one had got through.
            Err(error) if error.code == ErrorCode::Fault => return Some(Ok(pager::Reply::Done)),
            Err(error) => return Some(Err(error)),
        };
        self.bring_home_to_release(conn, call, &pieces, addr, len_bytes);
        None
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
        let Ok(pieces) = self.locate(conn, addr, len_bytes) else {
            return answer(self, Ok(pager::Reply::Done));
        };
        let (mut moving, mut lost) = (false, false);
        for (region, page) in pieces.iter().flat_map(Piece::pages) {
            let raw = self.regions.get(region).map_or(0, |region| region.directory.load(page));
            match Entry::decode(raw) {
                Ok(entry) if entry.is_settled_system() => {}
                Ok(entry) if entry.state() != PageState::Poisoned => moving = true,
                _ => lost = true,
            }
        }
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
        if let Some(space) = self.spaces.get(&space_id)
            && let Err(error) = space.uffd.unregister(range)
        {
            tracing::debug!(%error, %range, "A released range was not registered");
        }
        for cut in self.cut(space_id, addr, addr + len_bytes) {
            self.settle_cut(cut);
        }
        answer(self, Ok(pager::Reply::Done));
    }
}
