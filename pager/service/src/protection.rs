//! What the client itself may do with its addresses limits what devices may do: asked of the kernel at device-fault time, because
//! userfaultfd does not report mprotect; and what changes it afterwards, as far as it is told.

use uhmm_ipc::message::{ErrorCode, TraceId, WireError, pager};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};
use uhmm_pager_core::{Event, Pages, RegionId, Target};

use crate::calls::Answer;
use crate::requests::{PendingRequest, Then};
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
        let located = match self.locate(conn, addr, len_bytes) {
            Ok(located) => located,
            Err(error) => return Some(Err(error)),
        };
        let (region, pages) = (RegionId(located.region), located.pages);
        let pending =
            PendingRequest { conn, call, trace: TraceId::default(), first_page: pages.first, then: Then::Tell };
        let req = self.ask_core(pending);
        self.push(Event::RevokeMappings { req, region, pages, devices: u8::MAX });
        None
    }

    /// First half of giving a range back to the kernel alone: its pages come home.
    pub(crate) fn release_range(&mut self, conn: ConnId, call: CallId, addr: u64, len_bytes: u64) -> Answer {
        let located = match self.locate(conn, addr, len_bytes) {
            Ok(located) => located,
            // Repeated after a restart: the first one had got through.
            Err(error) if error.code == ErrorCode::Fault => return Some(Ok(pager::Reply::Done)),
            Err(error) => return Some(Err(error)),
        };
        self.bring_home_to_release(conn, call, located.region, located.pages, addr, len_bytes);
        None
    }

    fn bring_home_to_release(
        &mut self,
        conn: ConnId,
        call: CallId,
        region: u64,
        pages: Pages,
        addr: u64,
        len_bytes: u64,
    ) {
        let then = Then::Release { addr, len_bytes };
        let pending = PendingRequest { conn, call, trace: TraceId::default(), first_page: pages.first, then };
        let req = self.ask_core(pending);
        self.push(Event::Migrate { req, region: RegionId(region), pages, target: Target::Home });
    }

    /// Second half: the pages are at home, so nothing is lost when nobody looks after them any more. Pages that a device took
    /// again meanwhile are brought home again; pages that cannot come home end it with an error.
    pub(crate) fn released(&mut self, pending: PendingRequest) {
        let Then::Release { addr, len_bytes } = pending.then else { return };
        let (conn, call) = (pending.conn, pending.call);
        let answer = |pager: &mut Self, result: Result<pager::Reply, WireError>| {
            pager.service.reactor.reply(conn, call, result.map(uhmm_ipc::message::Reply::Pager));
        };
        let Ok(located) = self.locate(conn, addr, len_bytes) else {
            return answer(self, Ok(pager::Reply::Done));
        };
        let entries = self.regions.get(located.region).map(|region| &region.directory);
        let entry = |page| entries.map_or(0, |directory| directory.load(page));
        let (mut moving, mut lost) = (false, None);
        for page in located.pages.iter() {
            match uhmm_pager_core::Entry::decode(entry(page)) {
                Ok(entry) if entry.is_settled_system() => {}
                Ok(entry) if entry.state() != uhmm_pager_core::PageState::Poisoned => moving = true,
                _ => lost = Some(page),
            }
        }
        if let Some(page) = lost {
            let text = format!("Page {page} of the range was lost with its device: release the range around it");
            return answer(self, Err(WireError::new(ErrorCode::Io, text)));
        }
        if moving {
            let (region, pages) = (located.region, located.pages);
            return self.bring_home_to_release(conn, call, region, pages, addr, len_bytes);
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
