//! The mirror's pure state machine: who mirrors what, and the two-pass fan-out of invalidations.
//!
//! ```text
//!  pager: Invalidate(id, pages, device mask)          driver d: Login / Ack(id)            process of d is dead
//!        |                                                   |                                   |
//!        v                                                   v                                   v
//!  +-----------+  pass 1: start on every device   +----------------------+  last bit of `waiting` cleared  +------+
//!  |  started  | -------------------------------> | waiting (mask of d)  | ------------------------------> | done |
//!  +-----------+  (not logged in: sent at Login)  +----------------------+      or the deadline passed     +------+
//! ```
//!
//! All starts go out before anything is waited for, so N devices cost the slowest one and not the sum. A device that is
//! not logged in (the mirror was restarted) is waited for: silence is never taken for consent. Only the pager's word that
//! the process is dead (`device_void`) or the deadline, which makes the pager fence it, takes a device out.
//!
//! A device fault is bracketed as in HMM: `fault_begin` notes the window, invalidations mark the part of it that they overlap
//! ([`crate::window`]), and `fault_end` leaves of the answer what may still be installed: a fault on a large window gets on
//! although small parts of it are invalidated all the time. Only a fault whose own page was hit must be asked again. Invalidations
//! of other devices do not count: the pager's messages keep their order, so an answer that comes after one was found after it
//! was asked for, and the fault may well be its cause (the page is taken from another device).
//!
//! After a crash nothing is restored from disk: drivers log in and open their spaces again, the pager repeats what is pending.

use std::collections::BTreeMap;

use uhmm_ipc::message::pager::MapRun;

use crate::window::Window;

/// Devices are few: one bit each.
pub const DEVICE_COUNT_MAX: u8 = 8;

/// A run of pages of one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRange {
    /// Region id.
    pub region: u64,
    /// First page inside the region.
    pub first_page: u64,
    /// Pages.
    pub page_count: u64,
}

/// One interval of a process that devices mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Interval {
    end: u64,
    region: u64,
    device_mask: u8,
}

/// An invalidation asked for by the pager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalidation {
    /// The pager's id.
    pub id: u64,
    /// Space.
    pub space: u64,
    /// Pages.
    pub range: PageRange,
    /// Devices that must acknowledge.
    pub device_mask: u8,
    /// The region goes away: tables are dropped, and every device that knows the region is told.
    pub unmap: bool,
    /// Time by which the slowest device must have acknowledged.
    pub deadline_ms: u64,
}

/// What the shell has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send the invalidation to this device.
    Start {
        /// Device.
        device: u8,
        /// What.
        invalidation: Invalidation,
        /// Sequence number of the space.
        sequence: u64,
    },
    /// Tell the pager.
    Finished {
        /// The pager's id.
        id: u64,
        /// Devices that did not acknowledge in time.
        late_mask: u8,
    },
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The device never opened this space.
    #[error("Space {space} is not mirrored by device {device}: open it first with the client's token")]
    NotOpen {
        /// Space.
        space: u64,
        /// Device.
        device: u8,
    },
    /// The device never looked this region up.
    #[error("Region {region} of space {space} is not mirrored by device {device}: look its address up first")]
    NotMirrored {
        /// Space.
        space: u64,
        /// Region.
        region: u64,
        /// Device.
        device: u8,
    },
}

#[derive(Debug)]
struct Pending {
    invalidation: Invalidation,
    sequence: u64,
    /// Devices that have not acknowledged.
    waiting: u8,
}

#[derive(Debug, Default)]
struct Space {
    sequence: u64,
    open_mask: u8,
    /// Incarnation of the driver that opened it, by device.
    openers: [u32; DEVICE_COUNT_MAX as usize],
    intervals: BTreeMap<u64, Interval>,
}

#[derive(Debug)]
struct Fault {
    space: u64,
    region: u64,
    window: Window,
    device: u8,
    sequence: u64,
}

/// What of a resolved device fault may be installed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installable {
    /// Sequence number of the space when the fault began.
    pub sequence: u64,
    /// The runs without what was invalidated meanwhile; the fault's page is among them if the pager had it.
    pub runs: Vec<MapRun>,
}

/// Always-on counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Invalidations asked for.
    pub invalidations: u64,
    /// Messages to devices for them.
    pub invalidate_starts: u64,
    /// Devices that missed a deadline.
    pub late_devices: u64,
    /// Device faults begun.
    pub faults: u64,
    /// Device faults that must be asked again because their page was invalidated meanwhile.
    pub fault_retries: u64,
    /// Device faults that were answered without the parts of the window that were invalidated meanwhile.
    pub fault_trims: u64,
}

/// See the module head.
#[derive(Debug, Default)]
pub struct MirrorCore {
    logged_in: u8,
    /// Incarnation of the latest session, by device.
    sessions: [u32; DEVICE_COUNT_MAX as usize],
    spaces: BTreeMap<u64, Space>,
    pending: BTreeMap<u64, Pending>,
    faults: BTreeMap<u64, Fault>,
    next_fault: u64,
    counters: Counters,
}

fn bit(device: u8) -> u8 {
    1u8.checked_shl(u32::from(device)).unwrap_or(0)
}

impl MirrorCore {
    /// Counters since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Open mirrors, as (space, device mask), for status output.
    pub fn open_mirrors(&self) -> impl Iterator<Item = (u64, u8)> + '_ {
        self.spaces.iter().map(|(id, space)| (*id, space.open_mask))
    }

    /// Intervals mirrored at present.
    pub fn interval_count(&self) -> usize {
        self.spaces.values().map(|space| space.intervals.len()).sum()
    }

    /// Invalidations that wait for somebody.
    pub fn pending_count(&self) -> usize {
        self.pending.len()
    }

    /// A driver's session began: send it what it has to acknowledge.
    pub fn device_login(&mut self, device: u8, incarnation: u32, out: &mut Vec<Action>) {
        self.logged_in |= bit(device);
        if let Some(session) = self.sessions.get_mut(usize::from(device)) {
            *session = incarnation;
        }
        for pending in self.pending.values().filter(|p| p.waiting & bit(device) != 0) {
            self.counters.invalidate_starts += 1;
            out.push(Action::Start { device, invalidation: pending.invalidation, sequence: pending.sequence });
        }
    }

    /// A driver's session is lost. Its process may live on, so what it owes stays owed.
    pub fn device_lost(&mut self, device: u8) {
        self.logged_in &= !bit(device);
        self.faults.retain(|_, fault| fault.device != device);
    }

    /// The driver's process is dead: nothing of it uses memory any more. The next one may be here already, before the pager has heard of
    /// it: it maps nothing yet, but what it has opened stays open.
    pub fn device_void(&mut self, device: u8, out: &mut Vec<Action>) {
        let latest = self.sessions.get(usize::from(device)).filter(|_| self.logged_in & bit(device) != 0).copied();
        for space in self.spaces.values_mut() {
            if space.openers.get(usize::from(device)).copied() != latest {
                space.open_mask &= !bit(device);
            }
            space.intervals.retain(|_, interval| {
                interval.device_mask &= !bit(device);
                interval.device_mask != 0
            });
        }
        let ids: Vec<u64> = self.pending.keys().copied().collect();
        for id in ids {
            self.acknowledge(device, id, out);
        }
    }

    /// The pager accepted the client's token.
    pub fn open(&mut self, space: u64, device: u8) {
        let session = self.sessions.get(usize::from(device)).copied().unwrap_or(0);
        let space = self.spaces.entry(space).or_default();
        space.open_mask |= bit(device);
        if let Some(opener) = space.openers.get_mut(usize::from(device)) {
            *opener = session;
        }
    }

    /// Whether the device mirrors the space.
    pub fn is_open(&self, space: u64, device: u8) -> Result<(), Refusal> {
        match self.spaces.get(&space) {
            Some(state) if state.open_mask & bit(device) != 0 => Ok(()),
            _ => Err(Refusal::NotOpen { space, device }),
        }
    }

    /// The device gave the space up.
    pub fn close(&mut self, space: u64, device: u8) {
        let Some(state) = self.spaces.get_mut(&space) else { return };
        state.open_mask &= !bit(device);
        state.intervals.retain(|_, interval| {
            interval.device_mask &= !bit(device);
            interval.device_mask != 0
        });
        if state.open_mask == 0 {
            self.spaces.remove(&space);
        }
    }

    /// The device was told about a region and may build mappings in it.
    pub fn mirrored(&mut self, space: u64, device: u8, region: u64, addr: u64, len_bytes: u64) {
        let intervals = &mut self.spaces.entry(space).or_default().intervals;
        let end = addr.saturating_add(len_bytes);
        // A new region at an old address replaces whatever stood there: the old one is gone or the pager would have refused.
        let old = intervals.get(&addr).filter(|i| i.region == region).map_or(0, |i| i.device_mask);
        intervals.retain(|start, interval| interval.region == region || interval.end <= addr || *start >= end);
        intervals.insert(addr, Interval { end, region, device_mask: old | bit(device) });
    }

    /// read_begin: a device fault leaves for the pager. The key ends it.
    pub fn fault_begin(&mut self, space: u64, device: u8, pages: PageRange, fault_page: u64) -> Result<u64, Refusal> {
        self.is_open(space, device)?;
        let (state, region) = (&self.spaces[&space], pages.region);
        let known = state.intervals.values().any(|i| i.region == region && i.device_mask & bit(device) != 0);
        if !known {
            return Err(Refusal::NotMirrored { space, region, device });
        }
        self.counters.faults += 1;
        self.next_fault += 1;
        let mut window = Window::new(pages.first_page, pages.page_count, fault_page);
        for pending in self.pending.values().map(|p| p.invalidation) {
            if pending.space == space && pending.range.region == region && pending.device_mask & bit(device) != 0 {
                window.invalidate(pending.range.first_page, pending.range.page_count);
            }
        }
        self.faults.insert(self.next_fault, Fault { space, region, window, device, sequence: state.sequence });
        Ok(self.next_fault)
    }

    /// read_retry: what may be installed of the pager's answer, `None` when the fault's page was invalidated meanwhile.
    pub fn fault_end(&mut self, key: u64, runs: Vec<MapRun>) -> Option<Installable> {
        let fault = self.faults.remove(&key)?;
        let Some(runs) = fault.window.keep(runs) else {
            self.counters.fault_retries += 1;
            return None;
        };
        self.counters.fault_trims += u64::from(fault.window.is_hit());
        Some(Installable { sequence: fault.sequence, runs })
    }

    /// The pager refused to resolve a fault.
    pub fn fault_failed(&mut self, key: u64) {
        self.faults.remove(&key);
    }

    /// The pager asks for an invalidation. Asking again with the same id begins it anew (it is absolute).
    pub fn invalidate(&mut self, invalidation: Invalidation, out: &mut Vec<Action>) {
        self.counters.invalidations += 1;
        let space = self.spaces.entry(invalidation.space).or_default();
        space.sequence += 1;
        let sequence = space.sequence;
        let mut waiting = invalidation.device_mask;
        if invalidation.unmap {
            let holders = space.intervals.values().filter(|i| i.region == invalidation.range.region);
            waiting |= holders.fold(0, |mask, i| mask | i.device_mask);
            space.intervals.retain(|_, i| i.region != invalidation.range.region);
        }
        let range = invalidation.range;
        let hit = |fault: &&mut Fault| {
            fault.space == invalidation.space && fault.region == range.region && waiting & bit(fault.device) != 0
        };
        for fault in self.faults.values_mut().filter(hit) {
            fault.window.invalidate(range.first_page, range.page_count);
        }
        let invalidation = Invalidation { device_mask: waiting, ..invalidation };
        for device in (0..DEVICE_COUNT_MAX).filter(|d| waiting & self.logged_in & bit(*d) != 0) {
            self.counters.invalidate_starts += 1;
            out.push(Action::Start { device, invalidation, sequence });
        }
        if waiting == 0 {
            self.pending.remove(&invalidation.id);
            out.push(Action::Finished { id: invalidation.id, late_mask: 0 });
        } else {
            self.pending.insert(invalidation.id, Pending { invalidation, sequence, waiting });
        }
    }

    /// A device has really stopped using the range. Unknown ids (an older pager's) are ignored.
    pub fn acknowledge(&mut self, device: u8, id: u64, out: &mut Vec<Action>) {
        let Some(pending) = self.pending.get_mut(&id) else { return };
        pending.waiting &= !bit(device);
        if pending.waiting == 0 {
            self.pending.remove(&id);
            out.push(Action::Finished { id, late_mask: 0 });
        }
    }

    /// Reports what is late; the pager fences those devices.
    pub fn tick(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        let late: Vec<u64> =
            self.pending.iter().filter(|(_, p)| p.invalidation.deadline_ms <= now_ms).map(|(id, _)| *id).collect();
        for id in late {
            let Some(pending) = self.pending.remove(&id) else { continue };
            self.counters.late_devices += u64::from(pending.waiting.count_ones());
            out.push(Action::Finished { id, late_mask: pending.waiting });
        }
    }

    /// When [`Self::tick`] has something to do next.
    pub fn next_deadline_ms(&self) -> Option<u64> {
        self.pending.values().map(|p| p.invalidation.deadline_ms).min()
    }

    /// The pager's session is lost: a new one repeats what is still needed, and open faults must be asked again.
    pub fn pager_lost(&mut self) {
        self.pending.clear();
        for fault in self.faults.values_mut() {
            fault.window.invalidate_all();
        }
    }

    /// The client is gone. Returns the devices to tell.
    pub fn space_gone(&mut self, space: u64) -> u8 {
        self.faults.retain(|_, fault| fault.space != space);
        self.spaces.remove(&space).map_or(0, |state| state.open_mask)
    }
}

#[cfg(test)]
mod tests;
