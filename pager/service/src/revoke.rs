//! Revocation: the one way by which a device loses its mapping of a page before the page changes owner.
//!
//! ```text
//!   core: Revoke{ticket, pages, devices}
//!     |-- device shares table and gate -> swap every entry to invalid on all such devices, then look at each gate (no message);
//!     |                                   a thread that is still inside is looked for again by a timer, never waited for in place
//!     |-- otherwise ------------------> Event::Invalidate to the mirror; the ticket completes with InvalidateDone
//!     `-- late or stuck -------------> Fence: the supervisor kills the driver; its death (`ServiceDied`) voids the mapping
//! ```
//!
//! Everything pending is repeated to a new mirror: invalidations are absolute. After the pager's own death nothing is
//! pending: recovery asks the core anew.

use std::collections::BTreeMap;

/// One revocation that waits for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingRevoke {
    /// Why.
    pub purpose: Purpose,
    /// Space.
    pub space: u64,
    /// Segment.
    pub segment: u64,
    /// First page of it.
    pub first_page: u64,
    /// Pages.
    pub page_count: u64,
    /// Devices that still may use the pages.
    pub waiting_mask: u8,
    /// Of those: not asked through the mirror, because their gate is watched or because they are fenced and only their death counts.
    pub fenced_mask: u8,
}

/// What happens when a revocation is through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The core's ticket completes.
    Ticket(u64),
    /// A retired segment is dropped everywhere.
    Unmap {
        /// Its region.
        region: u64,
    },
}

/// Revocations in flight, by the id used on the wire.
#[derive(Debug)]
pub struct PendingRevokes {
    by_id: BTreeMap<u64, PendingRevoke>,
    next_id: u64,
}

impl PendingRevokes {
    /// Ids carry the incarnation, so that an answer meant for a dead pager names nothing.
    pub fn new(incarnation: u32) -> Self {
        Self { by_id: BTreeMap::new(), next_id: u64::from(incarnation) << 32 | 1 }
    }

    /// Adds one.
    pub fn insert(&mut self, revoke: PendingRevoke) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.by_id.insert(id, revoke);
        id
    }

    /// By id.
    pub fn get(&self, id: u64) -> Option<&PendingRevoke> {
        self.by_id.get(&id)
    }

    /// The mirror's answer: every device but the late ones has stopped. Returns the revocation when nobody is left.
    pub fn done(&mut self, id: u64, late_mask: u8) -> Option<PendingRevoke> {
        let revoke = self.by_id.get_mut(&id)?;
        revoke.waiting_mask &= late_mask | revoke.fenced_mask;
        revoke.fenced_mask |= revoke.waiting_mask & late_mask;
        self.take_if_through(id)
    }

    /// One device has stopped (its gate was seen empty). Returns the revocation when nobody is left.
    pub fn device_done(&mut self, id: u64, device: u8) -> Option<PendingRevoke> {
        let revoke = self.by_id.get_mut(&id)?;
        revoke.waiting_mask &= !(1 << device);
        revoke.fenced_mask &= !(1 << device);
        self.take_if_through(id)
    }

    /// The device's process is dead. Returns what is through now.
    pub fn device_void(&mut self, device: u8) -> Vec<PendingRevoke> {
        let ids: Vec<u64> = self.by_id.keys().copied().collect();
        let clear = |revoke: &mut PendingRevoke| {
            revoke.waiting_mask &= !(1 << device);
            revoke.fenced_mask &= !(1 << device);
        };
        self.by_id.values_mut().for_each(clear);
        ids.into_iter().filter_map(|id| self.take_if_through(id)).collect()
    }

    fn take_if_through(&mut self, id: u64) -> Option<PendingRevoke> {
        if self.by_id.get(&id)?.waiting_mask != 0 {
            return None;
        }
        self.by_id.remove(&id)
    }

    /// What a new mirror must be told.
    pub fn unanswered(&self) -> impl Iterator<Item = (u64, &PendingRevoke)> {
        self.by_id.iter().filter(|(_, r)| r.waiting_mask & !r.fenced_mask != 0).map(|(id, r)| (*id, r))
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn revoke(waiting_mask: u8) -> PendingRevoke {
        PendingRevoke {
            purpose: Purpose::Ticket(9),
            space: 1,
            segment: 2,
            first_page: 0,
            page_count: 4,
            waiting_mask,
            fenced_mask: 0,
        }
    }

    #[test]
    fn a_revocation_is_through_when_the_last_device_is() {
        let mut pending = PendingRevokes::new(3);
        let id = pending.insert(revoke(0b101));
        assert_eq!(id >> 32, 3, "ids of another incarnation never match");
        assert!(pending.done(id, 0b100).is_none(), "device 2 is late");
        assert!(pending.unanswered().next().is_none(), "a fenced device is not asked again");
        assert!(pending.device_void(0).is_empty());
        assert_eq!(pending.device_void(2).len(), 1);
        assert_eq!(pending.len(), 0);
    }

    #[test]
    fn an_answer_for_an_unknown_id_changes_nothing() {
        let mut pending = PendingRevokes::new(3);
        let id = pending.insert(revoke(0b1));
        assert!(pending.done(id + 1, 0).is_none());
        assert_eq!(pending.len(), 1);
        assert!(pending.done(id, 0).is_some());
    }
}
