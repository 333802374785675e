//! Why pages could not be moved: noted by page where it happens, told to whoever hears of their fate.
//!
//! What fails is noted with its pages; a request that begins forgets what was noted for its own, so the reason that is told is that of this
//! request and of these pages. Bounded: each space has its newest, and another one's do not push them out.

use std::collections::{HashMap, VecDeque};
use std::fmt::Display;
use std::sync::Arc;

use uhmm_ipc::ConnId;
use uhmm_ipc::message::TraceId;
use uhmm_pager_core::{PageStatus as CoreStatus, Pages, RegionId, StatusRun as CoreRun, Ticket};
use uhmm_shared::agent::Status;

use crate::agent::{AgentRun, Job, Life};
use crate::service::Pager;

/// Ranges of pages that are noted for a space.
const NOTED_MAX: usize = 256;
/// Longest reason that is told.
const WHY_BYTES: usize = 1000;
const LOST_DEVICE: &str = "The device is lost, or has failed a copy: see its driver's log";
const FULL_DEVICE: &str = "The device is full, and nothing of it could be evicted";
const AGENT_LOST: &str = "The process's agent was killed while it worked on these pages";
const LOCK_LIMIT: &str =
    "Locked memory stays: RLIMIT_MEMLOCK has no room for it a second time while it moves (ulimit -l)";
const MAP_LIMIT: &str = "Memory stays: the process has as many mappings as vm.max_map_count allows";
const NO_MEMORY: &str = "Memory stays: the system, or the process's control group, has no memory for the way out";

/// Pages that failed together.
#[derive(Clone, Debug)]
struct Noted {
    region: RegionId,
    pages: Pages,
    why: Arc<str>,
}

/// See the module head.
#[derive(Debug, Default)]
pub(crate) struct Failures {
    /// By space, newest last.
    noted: HashMap<u64, VecDeque<Noted>>,
}

impl Failures {
    fn note(&mut self, space: u64, region: RegionId, pages: Pages, why: &str) {
        let noted = self.noted.entry(space).or_default();
        let known = noted.back_mut().filter(|last| last.region == region && *last.why == *why);
        match known {
            // Page after page of one chunk.
            Some(last) if last.pages.end() == pages.first => last.pages.count += pages.count,
            known => {
                let why = known.map_or_else(|| Arc::from(why), |last| Arc::clone(&last.why));
                noted.push_back(Noted { region, pages, why });
            }
        }
        if noted.len() > NOTED_MAX {
            noted.pop_front();
        }
    }

    /// What failed before has nothing to do with what begins now.
    pub(crate) fn forget(&mut self, space: u64, region: RegionId, pages: Pages) {
        let Some(noted) = self.noted.get_mut(&space) else { return };
        let parts = std::mem::take(noted).into_iter().flat_map(|old| {
            let mine = old.region == region;
            let before =
                Pages { count: pages.first.clamp(old.pages.first, old.pages.end()) - old.pages.first, ..old.pages };
            let first = pages.end().clamp(old.pages.first, old.pages.end());
            let behind = Pages { first, count: old.pages.end() - first };
            let whole = [old.pages, Pages { count: 0, ..old.pages }];
            let left = if mine && old.pages.overlap(pages).is_some() { [before, behind] } else { whole };
            left.map(|pages| Noted { pages, ..old.clone() })
        });
        *noted = parts.filter(|part| part.pages.count > 0).collect();
        if noted.is_empty() {
            self.noted.remove(&space);
        }
    }

    pub(crate) fn forget_space(&mut self, space: u64) {
        self.noted.remove(&space);
    }

    /// The newest reason that was noted for some of these pages.
    fn newest(&self, space: u64, region: RegionId, pages: Pages) -> Option<&str> {
        let fits = |noted: &&Noted| noted.region == region && noted.pages.overlap(pages).is_some();
        self.noted.get(&space)?.iter().rev().find(fits).map(|noted| &*noted.why)
    }

    /// Why some pages of a region have not moved: the reasons of all of them, each once.
    fn why(&self, space: u64, region: RegionId, runs: &[CoreRun]) -> String {
        let mut told = String::new();
        for run in runs {
            let noted = self.newest(space, region, Pages { first: run.first, count: run.count });
            let why = match run.status {
                CoreStatus::Io => noted.unwrap_or(LOST_DEVICE),
                CoreStatus::NoMemory => noted.unwrap_or(FULL_DEVICE),
                CoreStatus::Pinned => noted.unwrap_or_default(),
                _ => "",
            };
            add_reason(&mut told, why);
        }
        told
    }
}

/// Another reason, unless it is told already or there is no room for it.
pub(crate) fn add_reason(told: &mut String, why: &str) {
    if why.is_empty() || told.contains(why) || told.len() >= WHY_BYTES {
        return;
    }
    if !told.is_empty() {
        told.push_str("; ");
    }
    told.push_str(why);
    let end = (0..=WHY_BYTES.min(told.len())).rev().find(|at| told.is_char_boundary(*at)).unwrap_or(0);
    told.truncate(end);
}

/// Why the agent has left pages where they are.
fn why_not_taken(status: Status) -> Option<&'static str> {
    match status {
        Status::LockLimit => Some(LOCK_LIMIT),
        Status::MapLimit => Some(MAP_LIMIT),
        Status::NoMemory => Some(NO_MEMORY),
        Status::Failed => Some("The kernel refused to take pages out of the process: see the pager's log"),
        _ => None,
    }
}

impl Pager {
    /// Why something could not be done with some pages, for whoever is told that it was not.
    pub(crate) fn note_failure(&mut self, region: RegionId, pages: Pages, why: impl Display) {
        if let Some(space) = self.regions.get(region.0).map(|region| region.space) {
            self.failures.note(space, region, pages, &why.to_string());
        }
    }

    /// The same, for the pages of a ticket.
    pub(crate) fn note_failure_of(&mut self, ticket: Ticket, why: impl Display) {
        if let Some((region, pages)) = self.core.pages_of(ticket) {
            self.note_failure(region, pages, why);
        }
    }

    /// A request for these pages begins.
    pub(crate) fn forget_failures(&mut self, region: u64, pages: Pages) {
        if let Some(space) = self.regions.get(region).map(|region| region.space) {
            self.failures.forget(space, RegionId(region), pages);
        }
    }

    /// Why some of the pages of a request stayed, also for the log.
    pub(crate) fn why_stayed(&self, conn: ConnId, trace: TraceId, region: RegionId, runs: &[CoreRun]) -> String {
        let owner = self.regions.get(region.0).map(|region| region.space);
        let met = |status: CoreStatus| runs.iter().any(|run| run.status == status);
        let over_quota = owner.filter(|_| met(CoreStatus::NoMemory) && !met(CoreStatus::Io));
        let over_quota = over_quota.and_then(|space| self.over_quota(space));
        let noted = || owner.map(|space| self.failures.why(space, region, runs)).unwrap_or_default();
        let why = over_quota.unwrap_or_else(noted);
        let space = self.space_of(conn).unwrap_or(0);
        if runs.iter().any(|run| run.status == CoreStatus::Io) {
            tracing::warn!(request = trace.0, space, region = region.0, why, "Pages stay where they are");
        } else if !why.is_empty() {
            tracing::info!(request = trace.0, space, region = region.0, why, "Pages stay where they are");
        }
        why
    }

    /// Limits of the client's that keep pages where they are, by name: the fate of a page says no more than that.
    pub(crate) fn tell_limits(&self, space_id: u64, runs: &[AgentRun]) {
        let pid = self.spaces.get(&space_id).map_or(0, |space| space.state.pid);
        let met = |status| runs.iter().any(|run| run.status == status);
        if met(Status::LockLimit) {
            tracing::warn!(space = space_id, pid, "{LOCK_LIMIT}");
        }
        if met(Status::MapLimit) {
            tracing::warn!(space = space_id, pid, "{MAP_LIMIT}");
        }
        if met(Status::NoMemory) {
            tracing::warn!(space = space_id, pid, "{NO_MEMORY}");
        }
    }

    /// Why pages have not been taken out, for whoever asked for that.
    pub(crate) fn note_not_taken(&mut self, space_id: u64, job: &Job, runs: &[AgentRun]) {
        let agent = self.spaces.get(&space_id).and_then(|space| space.agent.as_ref());
        let lost = agent.is_none_or(|agent| agent.life == Life::Lost);
        let mut left = job.pages;
        for run in runs {
            let pages = Pages { count: run.page_count.min(left.count), ..left };
            left = left.after(pages.count);
            match why_not_taken(run.status) {
                Some(_) if lost => self.note_failure(job.region, pages, AGENT_LOST),
                Some(why) => self.note_failure(job.region, pages, why),
                None => {}
            }
        }
    }

    /// Why one page could not be moved, where it is known.
    pub(crate) fn why_failed(&self, region: RegionId, page: u64) -> Option<&str> {
        let space = self.regions.get(region.0)?.space;
        self.failures.newest(space, region, Pages::one(page))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: u64 = 7;
    const REGION: RegionId = RegionId(1);

    fn pages(first: u64, count: u64) -> Pages {
        Pages { first, count }
    }

    fn run(first: u64, count: u64, status: CoreStatus) -> CoreRun {
        CoreRun { first, count, status }
    }

    #[test]
    fn every_page_that_stays_for_a_failure_has_a_reason() {
        let mut failures = Failures::default();
        let why = |failures: &Failures, runs: &[CoreRun]| failures.why(SPACE, REGION, runs);
        assert!(why(&failures, &[run(0, 1, CoreStatus::Io)]).contains("driver's log"));
        assert!(why(&failures, &[run(0, 1, CoreStatus::NoMemory)]).contains("full"));
        assert_eq!(why(&failures, &[run(0, 1, CoreStatus::Pinned)]), "", "the program's own doing");
        failures.note(SPACE, REGION, pages(0, 2), "The ring is broken");
        assert_eq!(why(&failures, &[run(0, 1, CoreStatus::Ok), run(1, 1, CoreStatus::Io)]), "The ring is broken");
        assert_eq!(why(&failures, &[run(0, 1, CoreStatus::Busy)]), "");
        failures.note(SPACE, REGION, pages(5, 1), &"é".repeat(600));
        assert_eq!(why(&failures, &[run(5, 1, CoreStatus::Io)]).len(), WHY_BYTES);
    }

    #[test]
    fn the_reason_is_that_of_the_page_and_no_other_ones() {
        let mut failures = Failures::default();
        failures.note(SPACE, REGION, pages(0, 4), "first");
        failures.note(SPACE, RegionId(2), pages(8, 1), "another region's");
        failures.note(SPACE + 1, REGION, pages(8, 1), "another space's");
        failures.note(SPACE, REGION, pages(2, 1), "newer");
        let why = |runs: &[CoreRun]| failures.why(SPACE, REGION, runs);
        assert_eq!(why(&[run(0, 1, CoreStatus::Io)]), "first");
        assert_eq!(why(&[run(2, 1, CoreStatus::Io)]), "newer");
        assert_eq!(why(&[run(8, 1, CoreStatus::Io)]), LOST_DEVICE);
        let both = why(&[run(3, 1, CoreStatus::Io), run(8, 2, CoreStatus::NoMemory), run(1, 1, CoreStatus::Io)]);
        assert_eq!(both, format!("first; {FULL_DEVICE}"));
    }

    #[test]
    fn what_begins_again_has_not_failed_yet_and_its_neighbours_have() {
        let mut failures = Failures::default();
        failures.note(SPACE, REGION, pages(0, 10), "old");
        failures.note(SPACE, RegionId(2), pages(0, 10), "other");
        failures.forget(SPACE, REGION, pages(3, 4));
        let found = |page| failures.newest(SPACE, REGION, Pages::one(page));
        assert_eq!([2, 3, 6, 7, 9].map(found), [Some("old"), None, None, Some("old"), Some("old")]);
        assert_eq!(failures.newest(SPACE, RegionId(2), pages(3, 1)), Some("other"));
        failures.forget(SPACE, REGION, pages(0, 100));
        failures.forget(SPACE, RegionId(2), pages(0, 100));
        assert!(failures.noted.is_empty());
    }

    #[test]
    fn a_space_has_its_newest_and_costs_nobody_elses() {
        let mut failures = Failures::default();
        failures.note(SPACE + 1, REGION, pages(0, 1), "quiet");
        for page in 0..10_000 {
            failures.note(SPACE, REGION, pages(page * 2, 1), "loud");
        }
        assert_eq!(failures.noted[&SPACE].len(), NOTED_MAX);
        assert_eq!(failures.newest(SPACE, REGION, Pages::one(19_998)), Some("loud"));
        assert_eq!(failures.newest(SPACE + 1, REGION, Pages::one(0)), Some("quiet"));
        (0..10_000).for_each(|page| failures.note(SPACE + 2, REGION, pages(page, 1), "in a row"));
        assert_eq!(failures.noted[&(SPACE + 2)].len(), 1);
    }
}
