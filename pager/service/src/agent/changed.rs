//! What becomes of an agent's orders when the program changes the place that they are about.
//!
//! ```text
//!                       puts pages there        takes pages out, or drops them       not sent yet
//!   dropped             refused                 good: dropped where it arrives       (fills) never sent
//!   unmapped            refused                 refused: other memory may be there   never sent: it may lie in several places
//!   moved (mremap)      refused                 refused, and all is asked anew       never sent
//! ```
//! It is told while the agent stands still ([`Agent::begin_reading`]): the program goes on as soon as its event is read.

use std::sync::atomic::Ordering::Release;

use uhmm_ipc::shared::words::Words;
use uhmm_pager_core::{Pages, RegionId};
use uhmm_shared::agent::changed_word;

use super::{Agent, Job, Order};

/// How the program has changed a place that stays where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// The content is gone.
    Dropped,
    /// The place too.
    Unmapped,
}

impl Agent {
    /// An event was read.
    pub fn has_changed(&mut self, region: RegionId, pages: Pages, how: Changed) {
        match how {
            Changed::Dropped => self.dropped(region, pages),
            Changed::Unmapped => self.unmapped(region, pages),
        }
    }

    /// mremap: these pages are elsewhere now. Jobs that were not sent yet go to the new addresses.
    pub fn moved(&mut self, region: RegionId, pages: Pages) {
        self.refuse(region, pages, Job::empties);
        self.overtake(region, pages, |job| !job.is_about_frames());
    }

    /// These pages have no address any more, nor is their content wanted.
    pub fn unmapped(&mut self, region: RegionId, pages: Pages) {
        self.refuse(region, pages, Job::empties);
        // Of what was to be dropped in place some may be there still. What was taken out before is dropped where it arrives.
        self.overtake(region, pages, |job| {
            let is_sent = job.sent_at.is_some();
            job.fills() || job.order == Order::Drop { in_place: true } || job.empties() && !is_sent
        });
    }

    /// Their content is not wanted any more: none of them may be put back from now on.
    pub fn dropped(&mut self, region: RegionId, pages: Pages) {
        self.overtake(region, pages, Job::fills);
    }

    /// What is in the ring and concerned does nothing any more to the pages at its addresses.
    fn refuse(&self, region: RegionId, pages: Pages, concerned: impl Fn(&Job) -> bool) {
        for (id, job) in &self.outstanding {
            let is_there = job.region == region && job.pages.overlap(pages).is_some() && concerned(job);
            if let Some(at) = job.sent_at.filter(|_| is_there) {
                self.words.store(changed_word(at), *id, Release);
            }
        }
    }

    fn overtake(&mut self, region: RegionId, pages: Pages, concerned: impl Fn(&Job) -> bool) {
        let concerned = |job: &&mut Job| job.region == region && job.pages.overlap(pages).is_some() && concerned(job);
        for job in self.outstanding.values_mut().filter(concerned) {
            job.overtaken = true;
            if job.fills() {
                self.refused = self.next_id - 1;
            }
        }
        self.waiting.iter_mut().filter(concerned).for_each(|job| job.overtaken = true);
    }

    /// Events of the process may be read now: the agent touches no page of it until [`Agent::end_reading`]. `false`: it does just now.
    pub fn begin_reading(&self) -> bool {
        self.gate.begin_reading()
    }

    /// What was read is decided, and everything that it has overtaken was told.
    pub fn end_reading(&self) {
        self.gate.end_reading(self.refused);
    }
}
