//! The way of a CPU fault: userfaultfd -> region -> core -> (revoke) -> UFFDIO_COPY from the aperture -> publish.
//!
//! The kernel hands out faults before older events, and while an event is unread every fill in that process answers EAGAIN
//! (paging-floors.md, section 5): so a descriptor is read on before anything is retried, a share each turn of the loop.

use std::time::{Duration, Instant};

use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};
use uhmm_pager_core::{Event, RegionId};

use crate::agent::Agent;
use crate::forking::{Batch, Told};
use crate::service::Pager;
use crate::space::{Birth, Space};

/// How often the agent is looked at before its fill is left alone: about as long as UFFDIO_MOVE of a huge page takes.
const FILL_LOOKS: u32 = 32;
/// Dead children of a process that are still to be worked off while its next event is read.
const CHILDREN_MAX: usize = 16;
/// Reads of one userfaultfd in a turn of the loop, of up to 64 messages each.
const READS_PER_TURN: u32 = 4;
/// Nothing more is read in this turn after so long: one fork of a large program takes longer.
const READ_TIME: Duration = Duration::from_millis(1);

impl Pager {
    /// Reads everything the space's userfaultfd has to say. Its agent fills nothing meanwhile, nor what it was asked before the program
    /// changed the place.
    pub(crate) fn read_uffd(&mut self, space_id: u64) {
        if self.forks.stands_still(space_id) {
            return;
        }
        if self.is_ahead(space_id) {
            self.unread.insert(space_id);
            return;
        }
        if !self.agent_stands_still(space_id) {
            // Its fill takes microseconds; whoever stops the process in the middle of it keeps its own faults waiting.
            self.reread.insert(space_id);
            return;
        }
        if self.read_share(space_id) {
            self.has_read(space_id);
        }
    }

    /// What was read is decided.
    pub(crate) fn has_read(&mut self, space_id: u64) {
        if let Some(agent) = self.tell_what_was_overtaken(space_id) {
            agent.end_reading();
        }
    }

    /// None of the agent's orders puts anything there any more.
    pub(crate) fn tell_what_was_overtaken(&mut self, space_id: u64) -> Option<&Agent> {
        let overtaken = std::mem::take(&mut self.overtaken);
        let agent = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut())?;
        overtaken.into_iter().for_each(|(region, pages)| agent.dropped(region, pages));
        Some(agent)
    }

    /// Its children die faster than their ends are worked off: it waits until they are, instead of everybody else.
    fn is_ahead(&self, space_id: u64) -> bool {
        let is_child = |space: &&Space| space.dying && space.state.parent == space_id;
        self.dying_spaces > CHILDREN_MAX && self.spaces.values().filter(is_child).count() > CHILDREN_MAX
    }

    fn agent_stands_still(&self, space_id: u64) -> bool {
        let agent = self.spaces.get(&space_id).and_then(|space| space.agent.as_ref());
        let stands_still = |agent: &Agent| {
            (0..FILL_LOOKS).any(|look| {
                if look > 0 {
                    std::thread::yield_now();
                }
                agent.begin_reading()
            })
        };
        agent.is_none_or(stands_still)
    }

    /// Goes on with spaces that had more to say than their share.
    pub(crate) fn read_on(&mut self) {
        for space in std::mem::take(&mut self.unread) {
            self.read_uffd(space);
        }
    }

    /// A turn's share of what there is to read. A program that makes more events than that waits for its next turn by itself: each of
    /// its threads waits until its event is read. `false`: a fork is not through, and the agent fills nothing until it is.
    fn read_share(&mut self, space_id: u64) -> bool {
        let begun = Instant::now();
        for _ in 0..READS_PER_TURN {
            let space = self.spaces.get(&space_id);
            let Some(space) = space.filter(|space| space.is_born()) else { return true };
            let Some(journal) = self.journals.free() else { break };
            let mut events = std::mem::take(&mut self.uffd_events);
            let read = self.journals.at(journal).read(&space.uffd, space_id, &mut events);
            let full_read = matches!(read, Ok(count) if count > 0);
            if let Err(error) = read {
                tracing::warn!(%error, space = space_id, "Reading userfaultfd failed");
            }
            let mut children = self.make_children(space_id, journal, &events);
            let mut told = std::mem::take(&mut self.told);
            told.extend(events.iter().enumerate().map(|(slot, event)| (slot, Told::of(event, children.remove(&slot)))));
            events.clear();
            self.uffd_events = events;
            if !self.work_off(space_id, Batch { journal, told, again: false }) {
                return false;
            }
            if !full_read {
                return true;
            }
            self.hot.fault(Instant::now());
            if begun.elapsed() > READ_TIME {
                break;
            }
        }
        self.unread.insert(space_id);
        true
    }

    /// `again`: a dead pager has read it.
    pub(crate) fn on_told(&mut self, space_id: u64, told: Told, again: bool) {
        if !told.is_fault() {
            tracing::debug!(space = space_id, ?told, "Event of an address space");
        }
        match told {
            Told::Fault { addr, write, wp, minor } => self.on_cpu_fault(space_id, addr, write, wp, minor),
            Told::Unmap { start, end } => self.on_unmapped(space_id, start, end),
            Told::Remove { start, end } => self.on_removed(space_id, start, end),
            // Nothing at the old place: it was written down.
            Told::Remap { from, len, .. } if again && self.touched(space_id, from, from + len).is_empty() => {}
            Told::Remap { from, to, len } => self.on_remapped(space_id, from, to, len),
            Told::Fork { child } => child.into_iter().for_each(|child| self.on_fork(space_id, child)),
        }
    }

    fn on_cpu_fault(&mut self, space_id: u64, addr: u64, write: bool, wp: bool, minor: bool) {
        let Some(segment) = self.segment_at(space_id, addr) else {
            self.fault_outside(space_id, addr, wp, minor);
            return;
        };
        let page = segment.first_page + (addr - segment.addr) / PAGE_SIZE;
        let region = RegionId(segment.region);
        self.faulted.push((region, page));
        self.note_fault(space_id, addr, (region, page), (wp, minor));
        self.push(Event::CpuFault { region, page, write, wp, minor });
    }

    /// The sentinel of a forked child, or a range that is not managed any more: the kernel's own answer is given, which is what is
    /// there, or else an empty page.
    fn fault_outside(&mut self, space_id: u64, addr: u64, wp: bool, minor: bool) {
        if self.serve_sentinel(space_id, addr) {
            return;
        }
        let Some(space) = self.spaces.get(&space_id) else { return };
        let page = AddrRange { start: addr & !(PAGE_SIZE - 1), len: PAGE_SIZE };
        tracing::debug!(space = space_id, addr = format_args!("{addr:#x}"), "Fault outside every region");
        let served = match (wp, minor) {
            (true, _) => space.uffd.write_protect(page, false, false).map(drop),
            (false, true) => space.uffd.cont(page, false, false).map(drop),
            // What was not there when the process forked may have been on a device.
            (false, false) if space.state.birth == Birth::Lost => space.uffd.poison(page).map(drop),
            (false, false) => space.uffd.zeropage(page, false).map(drop),
        };
        if let Err(error) = served.and_then(|()| space.uffd.wake(page)) {
            tracing::warn!(%error, space = space_id, addr = format_args!("{addr:#x}"), "Fault outside every region");
        }
    }
}
