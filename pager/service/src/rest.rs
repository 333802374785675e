//! A second chance: private pages that are on their way out rest in the client's scratch before anything is done with their bytes.
//!
//! ```text
//!   MoveOut answered -> [rests] -- nobody has touched it until its time is over --> to its frames      (or stays: back, Kept)
//!                          |------ touched in the first half of it ---------------> all of it back, by UFFDIO_MOVE (Busy)
//!                          |------ touched later ---------------------------------> 64 KiB around that back, the rest goes on
//!                          `------ anybody else wants something of these pages ----> all of it back
//! ```
//! For the core it is a copy that takes long and that may fail for some pages, so a pager or an agent that is killed meanwhile changes nothing: pages
//! in scratch are found and put back as ever. What rests has a slot, so only some of a space's slots are for that.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use uhmm_ipc::TimerToken;
use uhmm_ipc::message::pager::Rest;
use uhmm_pager_core::{CopyStatus, Pages, RegionId, ReqId, Ticket};
use uhmm_shared::agent::{SLOTS, Status};

use crate::agent::{AgentRun, Job, Order};
use crate::requests::PendingRequest;
use crate::service::Pager;
use crate::then::Then;

pub(crate) const TIMER_REST: TimerToken = TimerToken(4);
/// Jobs of a space that rest at a time: the other slots are for what is on its way.
const RESTING_MAX: usize = SLOTS as usize - 4;
/// What comes back around a page that was touched late.
const BLOCK_PAGES: u64 = 16;

/// What rests, of all spaces.
#[derive(Debug, Default)]
pub(crate) struct Resting {
    /// Tickets whose pages are to rest when they are taken out.
    wanted: HashMap<u64, Rest>,
    rests: Vec<Rester>,
}

/// Pages that lie in scratch.
#[derive(Debug)]
struct Rester {
    space: u64,
    job: Job,
    runs: Vec<AgentRun>,
    since: Instant,
    until: Instant,
    stays: bool,
}

impl Resting {
    /// Its pages have arrived, or are back.
    pub(crate) fn forget(&mut self, ticket: Ticket) {
        self.wanted.remove(&ticket.0);
    }

    fn take(&mut self, which: impl Fn(&Rester) -> bool) -> Vec<Rester> {
        let (taken, kept) = std::mem::take(&mut self.rests).into_iter().partition(which);
        self.rests = kept;
        taken
    }

    /// Pages that rest now.
    pub(crate) fn pages(&self) -> u64 {
        self.rests.iter().map(|rester| rester.job.pages.count).sum()
    }
}

impl Rester {
    /// What of it goes back because one of its pages was touched.
    fn touched(&self, page: u64, now: Instant) -> Pages {
        let pages = self.job.pages;
        let late = now.saturating_duration_since(self.since) * 2 >= self.until.saturating_duration_since(self.since);
        if self.stays || !late {
            return pages;
        }
        let first = pages.first + (page - pages.first) / BLOCK_PAGES * BLOCK_PAGES;
        Pages { first, count: BLOCK_PAGES.min(pages.end() - first) }
    }
}

impl Pager {
    /// Pages of this request are asked for now.
    pub(crate) fn note_rest(&mut self, ticket: Ticket, req: ReqId, keep: bool) {
        let rest = self.requests.get(&req).and_then(|request| match request.then {
            Then::Rested(rest) if !keep => Some(rest),
            _ => None,
        });
        if let Some(rest) = rest {
            self.resting.wanted.insert(ticket.0, rest);
        }
    }

    /// The agent has taken out what it could: that rests, or goes on at once.
    pub(crate) fn rest(&mut self, space: u64, job: Job, runs: &[AgentRun]) {
        let wanted = self.resting.wanted.get(&job.purpose.ticket().0).copied();
        // What was copied in place can be read there: nobody would know.
        let taken = job.order == Order::MoveOut
            && runs.iter().any(|run| matches!(run.status, Status::Moved | Status::MovedHuge));
        let Some(rest) = wanted.filter(|_| taken) else { return self.taken_out(space, &job, runs, &[]) };
        if self.is_wanted(job.region, job.pages)
            || self.resting.rests.iter().filter(|rester| rester.space == space).count() >= RESTING_MAX
        {
            return self.taken_out(space, &job, runs, &[(job.pages, CopyStatus::Busy)]);
        }
        let (since, time) = (Instant::now(), Duration::from_millis(u64::from(rest.ms)));
        let (until, runs) = (since + time, runs.to_vec());
        self.resting.rests.push(Rester { space, job, runs, since, until, stays: rest.stays });
        self.service.reactor.add_timer(time, TIMER_REST);
        // Who has touched one since it was taken out waits already: its fault is raised again, and ends the rest.
        self.wake(job.region, job.pages);
    }

    /// Somebody has asked for one of these pages while they were taken out.
    fn is_wanted(&self, region: RegionId, pages: Pages) -> bool {
        let wants = |request: &PendingRequest| {
            let other = !matches!(request.then, Then::Rested(_));
            other && request.region == region.0 && request.pages.overlap(pages).is_some()
        };
        self.requests.values().any(wants)
    }

    pub(crate) fn end_rests_that_are_over(&mut self) {
        let now = Instant::now();
        for rester in self.resting.take(|rester| rester.until <= now) {
            let kept = [(rester.job.pages, CopyStatus::Kept)];
            let back = if rester.stays { &kept[..] } else { &[] };
            self.stats.rested_pages += rester.job.pages.count;
            self.taken_out(rester.space, &rester.job, &rester.runs, back);
        }
    }

    /// The program wants a page: before the core is told of its fault.
    pub(crate) fn end_rest_of_page(&mut self, region: RegionId, page: u64) {
        if self.resting.rests.is_empty() {
            return;
        }
        let now = Instant::now();
        for rester in self.resting.take(|rester| rester.job.region == region && rester.job.pages.contains(page)) {
            let back = rester.touched(page, now);
            self.stats.rest_touched_pages += back.count;
            self.taken_out(rester.space, &rester.job, &rester.runs, &[(back, CopyStatus::Busy)]);
        }
    }

    /// Somebody wants these pages for something: nobody waits for those that rest.
    pub(crate) fn end_rest_of_pages(&mut self, region: RegionId, pages: Pages) {
        self.end_rest(|rester| rester.job.region == region && rester.job.pages.overlap(pages).is_some());
    }

    pub(crate) fn end_rest_of_region(&mut self, region: RegionId) {
        self.end_rest(|rester| rester.job.region == region);
    }

    pub(crate) fn end_rest_of_space(&mut self, space: u64) {
        self.end_rest(|rester| rester.space == space);
    }

    fn end_rest(&mut self, which: impl Fn(&Rester) -> bool) {
        for rester in self.resting.take(which) {
            self.taken_out(rester.space, &rester.job, &rester.runs, &[(rester.job.pages, CopyStatus::Busy)]);
        }
    }
}

/// Runs from page `first` on, cut where what goes back begins and ends, each with what is to be said of it then.
pub(crate) fn cut_at<'a>(
    runs: &'a [AgentRun],
    first: u64,
    back: &'a [(Pages, CopyStatus)],
) -> impl Iterator<Item = (AgentRun, Option<CopyStatus>)> + 'a {
    let mut at = first;
    runs.iter().flat_map(move |run| {
        let mut left = Pages { first: at, count: run.page_count };
        at = left.end();
        std::iter::from_fn(move || {
            let here = back.iter().find(|(part, _)| part.contains(left.first));
            let next = back.iter().map(|(part, _)| part.first).filter(|page| *page > left.first).min();
            let end = here.map(|(part, _)| part.end()).or(next).unwrap_or(left.end()).min(left.end());
            let count = end - left.first;
            let piece = (left.count > 0).then_some((AgentRun { page_count: count, ..*run }, here.map(|(_, why)| *why)));
            left = left.after(count);
            piece
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::Purpose;

    fn pages(first: u64, count: u64) -> Pages {
        Pages { first, count }
    }

    fn resting(first: u64, count: u64, stays: bool) -> Rester {
        let purpose = Purpose::Out { ticket: Ticket(1), device: 0, frame: 0 };
        let job = Job::new(RegionId(1), pages(first, count), Order::MoveOut, purpose);
        let since = Instant::now();
        Rester { space: 1, job, runs: Vec::new(), since, until: since + Duration::from_millis(100), stays }
    }

    #[test]
    fn who_is_touched_early_goes_back_whole_and_later_only_around_the_page() {
        let rester = resting(40, 50, false);
        let at = |ms| rester.since + Duration::from_millis(ms);
        assert_eq!(rester.touched(60, at(49)), pages(40, 50));
        assert_eq!(rester.touched(60, at(50)), pages(56, 16));
        assert_eq!(rester.touched(40, at(99)), pages(40, 16));
        assert_eq!(rester.touched(89, at(99)), pages(88, 2), "no more than there is");
        assert_eq!(resting(40, 50, true).touched(60, rester.since), pages(40, 50));
    }

    #[test]
    fn runs_are_cut_where_something_goes_back() {
        let run = |page_count, status| AgentRun { page_count, status };
        let runs = [run(10, Status::Moved), run(2, Status::Busy), run(8, Status::Zero)];
        let cut = |back: &[(Pages, CopyStatus)]| cut_at(&runs, 100, back).collect::<Vec<_>>();
        let whole: Vec<_> = runs.iter().map(|run| (*run, None)).collect();
        assert_eq!(cut(&[]), whole);
        let back = Some(CopyStatus::Kept);
        let expected: Vec<_> = runs.iter().map(|run| (*run, back)).collect();
        assert_eq!(cut(&[(pages(100, 20), CopyStatus::Kept)]), expected);
        assert_eq!(
            cut(&[(pages(104, 10), CopyStatus::Kept)]),
            [
                (run(4, Status::Moved), None),
                (run(6, Status::Moved), back),
                (run(2, Status::Busy), back),
                (run(2, Status::Zero), back),
                (run(6, Status::Zero), None)
            ]
        );
    }
}
