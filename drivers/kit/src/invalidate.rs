//! Giving mappings up: by the mirror's order, because a region or space is gone, or because its last client is.
//!
//! ```text
//!   Invalidate --> revoke entries --> quiesce --Reached--> (unmap: detach) --> Ack
//!                                       |  ^
//!                                       |  +-- not in time: again after a pause. No Ack meanwhile; if it never comes, the
//!                                       |      mirror reports us late and the pager has us fenced.
//!                                       +--Pending--> DevicePort::quiesced --> the same
//! ```
//! A direct access that the copy engine is at holds every quiescence back until it has ended.
//!
//! Everything is absolute and repeatable. An unknown region has no mappings, but it may have had some a moment ago: its
//! acknowledgement too comes after a quiescence.

use std::time::Duration;

use uhmm_ipc::message::{ErrorCode, TraceId, WireError, mirror};

use crate::device::{DevicePageTable, Driver, PageRange, Quiescence, RegionKey};
use crate::fault::FaultEvent;
use crate::run::{Asked, DriverLoop, Due};

/// Pause before a device that has not stopped is asked again.
const QUIESCE_PAUSE: Duration = Duration::from_millis(2);

/// What may be done once the device has stopped using what was revoked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct AfterQuiescence {
    detach: Vec<RegionKey>,
    ack: Option<u64>,
    close: Option<u64>,
}

impl<D: Driver> DriverLoop<D> {
    pub(crate) fn on_mirror_event(&mut self, event: mirror::Event, trace: TraceId) {
        match event {
            mirror::Event::Invalidate { id, space, region, first_page, page_count, unmap, .. } => {
                let key = RegionKey { space, region };
                tracing::debug!(request = trace.0, id, %key, first_page, page_count, unmap, "Invalidate");
                self.stats.invalidations += 1;
                self.stats.invalidated_pages += page_count;
                if unmap {
                    self.step_faults(FaultEvent::Unmapped { key });
                    self.retire(vec![key], Some(id), None);
                } else {
                    self.revoke(key, PageRange { first: first_page, count: page_count });
                    self.begin_quiescence(AfterQuiescence { ack: Some(id), ..AfterQuiescence::default() });
                }
            }
            mirror::Event::SpaceGone { space } => {
                tracing::info!(space, "Client is gone: its jobs end");
                self.end_space(space, "Its process is gone", false);
            }
        }
    }

    /// A space ends for this driver: jobs fail, mappings go. `tell`: the mirror does not know yet.
    pub(crate) fn end_space(&mut self, space: u64, why: &str, tell: bool) {
        for job in self.jobs.space_gone(space) {
            let error = WireError::new(ErrorCode::NotFound, format!("Space {space} ended before the job: {why}"));
            self.cancel_job(job, error);
        }
        self.spaces.remove(&space);
        self.step_faults(FaultEvent::SpaceGone { space });
        let keys = self.regions.keys().filter(|key| key.space == space).copied().collect();
        self.retire(keys, None, tell.then_some(space));
    }

    /// A region is not there any more, says somebody upstream.
    pub(crate) fn region_gone(&mut self, key: RegionKey) {
        self.step_faults(FaultEvent::Unmapped { key });
        self.retire(vec![key], None, None);
    }

    /// Revokes whole regions; they are detached when the device has stopped.
    pub(crate) fn retire(&mut self, keys: Vec<RegionKey>, ack: Option<u64>, close: Option<u64>) {
        let mut known = false;
        for key in &keys {
            known |= self.regions.remove(key).is_some();
            self.revoke(*key, PageRange { first: 0, count: u64::MAX });
        }
        if known || close.is_some() {
            self.refresh_preambles();
        }
        self.begin_quiescence(AfterQuiescence { detach: keys, ack, close });
    }

    fn revoke(&mut self, key: RegionKey, pages: PageRange) {
        if let Err(error) = self.table.revoke(key, pages) {
            // Not acknowledged, so nothing changes owner: the fence ends a device that cannot revoke.
            tracing::error!(%error, %key, "Device mappings could not be revoked");
        }
    }

    fn begin_quiescence(&mut self, then: AfterQuiescence) {
        self.next_ticket += 1;
        self.quiescing.insert(self.next_ticket, then);
        self.quiesce(self.next_ticket);
    }

    pub(crate) fn quiesce(&mut self, ticket: u64) {
        if self.accesses.holds_back(ticket) {
            return;
        }
        match self.table.quiesce(ticket) {
            Ok(Quiescence::Reached) => self.quiescent(ticket),
            Ok(Quiescence::Pending) => {}
            Err(error) => {
                tracing::warn!(%error, "The device has not stopped using revoked pages yet");
                self.after(QUIESCE_PAUSE, Due::Quiesce(ticket));
            }
        }
    }

    /// The device has stopped using everything revoked before the ticket.
    pub(crate) fn quiescent(&mut self, ticket: u64) {
        let Some(then) = self.quiescing.remove(&ticket) else { return };
        for key in then.detach {
            // Looked up and attached anew meanwhile: that table is another one.
            if !self.regions.contains_key(&key) {
                self.table.detach(key);
            }
        }
        if let Some(id) = then.ack {
            self.ask_mirror(mirror::Call::Ack { id }, TraceId::default(), Asked::Told);
        }
        if let Some(space) = then.close.filter(|space| !self.space_wanted(*space)) {
            self.ask_mirror(mirror::Call::Close { space }, TraceId::default(), Asked::Told);
        }
    }

    /// Open, or being opened.
    fn space_wanted(&self, wanted: u64) -> bool {
        let opening = |asked: &Asked| matches!(asked, Asked::Open { space, .. } if *space == wanted);
        self.spaces.contains_key(&wanted) || self.asked.values().any(|(_, asked)| opening(asked))
    }
}
