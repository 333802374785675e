//! The way of a CPU fault: userfaultfd -> region -> core -> (revoke) -> UFFDIO_COPY from the aperture -> publish.
//!
//! The kernel hands out faults before older events, and while an event is unread every fill in that process answers EAGAIN
//! (paging-floors.md, section 5): so a descriptor is read on before anything is retried, a share each turn of the loop.

use std::time::{Duration, Instant};

use uhmm_kernel_hook::uffd::{Change, KeptEvent, UffdEvent};
use uhmm_kernel_hook::{AddrRange, HookError, PAGE_SIZE};
use uhmm_pager_core::{Event, RegionId};

use crate::agent::Agent;
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
        if self.is_ahead(space_id) {
            self.unread.insert(space_id);
            return;
        }
        if !self.agent_stands_still(space_id) {
            // Its fill takes microseconds; whoever stops the process in the middle of it keeps its own faults waiting.
            self.reread.insert(space_id);
            return;
        }
        self.read_share(space_id);
        if let Some(agent) = self.tell_what_was_overtaken(space_id) {
            agent.end_reading();
        }
    }

    /// None of the agent's orders puts anything there any more.
    fn tell_what_was_overtaken(&mut self, space_id: u64) -> Option<&Agent> {
        let overtaken = std::mem::take(&mut self.overtaken);
        let agent = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut())?;
        overtaken.into_iter().for_each(|(region, pages, how)| agent.has_changed(region, pages, how));
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
    /// its threads waits until its event is read.
    fn read_share(&mut self, space_id: u64) {
        let begun = Instant::now();
        for _ in 0..READS_PER_TURN {
            let space = self.spaces.get(&space_id);
            let Some(space) = space.filter(|space| space.is_born()) else { return };
            let read_at = Instant::now();
            let mut events = std::mem::take(&mut self.uffd_events);
            let read = self.journal.read(&space.uffd, space_id, &mut events);
            let full_read = matches!(read, Ok(count) if count > 0);
            if let Err(error) = read {
                tracing::warn!(%error, space = space_id, "Reading userfaultfd failed");
            }
            let mut children = self.make_children(space_id, &events);
            // Changes first: the program goes on with them already, and an older fault must not be answered with what it has dropped.
            let is_fault = |event: &UffdEvent| matches!(event, UffdEvent::Fault { .. });
            for faults in [false, true] {
                let now = || events.iter().enumerate().filter(|(_, event)| is_fault(event) == faults);
                for (slot, event) in now() {
                    let child = children.remove(&slot);
                    self.on_uffd_event(space_id, event, child);
                }
                self.drain();
                self.faulted.clear();
                self.poison_what_is_due();
                self.forget_protection_that_is_due();
                // Not before the directory says what has changed: the next pager has only that and the journal.
                now().for_each(|(slot, _)| self.event_handled(slot));
            }
            if full_read {
                self.after_faults(space_id, &events, read_at);
            }
            events.clear();
            self.uffd_events = events;
            if !full_read {
                return;
            }
            if begun.elapsed() > READ_TIME {
                break;
            }
        }
        self.unread.insert(space_id);
    }

    fn event_handled(&self, slot: usize) {
        if let Err(error) = self.journal.handled(slot) {
            tracing::error!(%error, slot, "An event's place in the journal cannot be emptied");
        }
    }

    /// What the dead pager had read of an address space's changes and perhaps not written down.
    pub(crate) fn repeat_kept_events(&mut self) -> Result<(), HookError> {
        let (space_id, kept) = self.journal.kept()?;
        let mut children = self.recover_children(space_id, &kept)?;
        let slots: Vec<usize> = kept.iter().map(|event| event.slot).collect();
        for KeptEvent { id, event, .. } in kept {
            tracing::info!(space = space_id, ?event, "Event of an address space, read by the pager before");
            match event {
                Change::Unmap { start, end } => self.on_unmapped(space_id, start, end),
                Change::Remove { start, end } => self.on_removed(space_id, start, end),
                // Nothing at the old place: it was written down.
                Change::Remap { from, to, len } if !self.touched(space_id, from, from + len).is_empty() => {
                    self.on_remapped(space_id, from, to, len);
                }
                Change::Remap { .. } => {}
                Change::Fork { .. } => children.remove(&id).into_iter().for_each(|child| self.on_fork(space_id, child)),
            }
        }
        self.drain();
        slots.into_iter().for_each(|slot| self.event_handled(slot));
        // Orders that wait; none of this pager's is out yet, and those of the dead one are refused anyway.
        self.tell_what_was_overtaken(space_id);
        Ok(())
    }

    fn on_uffd_event(&mut self, space_id: u64, event: &UffdEvent, child: Option<u64>) {
        if !matches!(event, UffdEvent::Fault { .. }) {
            tracing::debug!(space = space_id, ?event, "Event of an address space");
        }
        match *event {
            UffdEvent::Fault { addr, write, wp, minor, .. } => self.on_cpu_fault(space_id, addr, write, wp, minor),
            UffdEvent::Unmap { start, end } => self.on_unmapped(space_id, start, end),
            UffdEvent::Remove { start, end } => self.on_removed(space_id, start, end),
            UffdEvent::Remap { from, to, len } => self.on_remapped(space_id, from, to, len),
            UffdEvent::Fork { .. } => child.into_iter().for_each(|child| self.on_fork(space_id, child)),
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
        self.end_rest_of_page(region, page);
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
