//! Private pages on their way back into the address space.
//!
//! ```text
//!   MoveBack -> put back                                         done
//!           |-> Gone: the program has moved or dropped them      asked again for the addresses that they have now
//!           `-> Failed, NoMemory: safe in scratch                Later: the core asks again in 1 ms, 2 ms ... 256 ms
//! ```

use uhmm_pager_core::{CopyRun, CopyStatus, Pages};
use uhmm_shared::agent::Status;

use crate::agent::{AgentRun, Job, Order};
use crate::service::Pager;

/// After so many answers that a place is not there the space's record of its addresses is wrong (an event was lost).
const PUT_BACK_TRIES: u32 = 1000;

impl Pager {
    /// Pages that moved while they were taken out are back, at their new addresses.
    pub(crate) fn not_taken_out(&mut self, space_id: u64, job: &Job, runs: &[AgentRun]) {
        let ticket = job.purpose.ticket();
        let status = if job.order == Order::MoveBack { CopyStatus::Busy } else { CopyStatus::Gone };
        let mut at = 0;
        let mut fates = Vec::new();
        for run in runs {
            let count = run.page_count.min(job.pages.count - at);
            // What cannot be put back now the core asks back, once it knows that nothing was taken out.
            let again = job.order == Order::MoveBack && run.status == Status::Gone;
            if count > 0 && !again {
                fates.push((job.pages.first + at, CopyRun { count, status }));
            }
            at += count;
        }
        if at < job.pages.count {
            // The process is gone.
            fates.push((job.pages.first + at, CopyRun { count: job.pages.count - at, status: CopyStatus::Gone }));
        }
        if let Some(parts) = self.parts.get_mut(&ticket.0) {
            parts.runs.extend(fates);
        }
        if job.order == Order::MoveBack {
            self.put_back_again(space_id, job, runs);
            self.send_to_agent(space_id);
        }
        self.part_done(ticket, job.purpose);
    }

    /// What could not be put back is in scratch still, because it has moved to other addresses meanwhile (mremap).
    pub(crate) fn put_back_again(&mut self, space_id: u64, job: &Job, runs: &[AgentRun]) {
        let mut at = 0;
        for run in runs {
            let pages = Pages { first: job.pages.first + at, count: run.page_count.min(job.pages.count - at) };
            at += pages.count;
            if pages.count == 0 || run.status != Status::Gone {
                continue;
            }
            let Some(parts) = self.parts.get_mut(&job.purpose.ticket().0) else { return };
            parts.again += 1;
            let given_up = parts.again >= PUT_BACK_TRIES;
            if given_up {
                tracing::error!(space = space_id, ?pages, "Pages could not be put back: their place is gone");
            }
            self.put_back_wanted(space_id, job, pages, given_up);
        }
    }

    /// What stays in scratch for now: the core asks it back later, and ever later.
    pub(crate) fn note_put_back(&mut self, job: &Job, runs: &[AgentRun]) {
        let met = |status| runs.iter().any(|run| run.status == status);
        self.note_room(job.region, met(Status::Moved), met(Status::NoMemory));
        if met(Status::Failed) {
            tracing::warn!(region = job.region.0, pages = ?job.pages, "Pages could not be put back yet");
        }
        if let Some(parts) = self.parts.get_mut(&job.purpose.ticket().0) {
            parts.later |= met(Status::Failed) || met(Status::NoMemory);
        }
    }

    /// What was dropped since the order was given is not put back.
    fn put_back_wanted(&mut self, space_id: u64, job: &Job, mut pages: Pages, given_up: bool) {
        while pages.count > 0 {
            let (count, discarded) = self.core.alike_in_front(job.purpose.ticket(), pages);
            let order = if discarded || given_up { Order::Drop { in_place: false } } else { Order::MoveBack };
            self.ask_parts(space_id, job.region, Pages { count, ..pages }, order, job.purpose);
            pages = pages.after(count);
        }
    }
}
