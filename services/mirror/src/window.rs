//! The window of a device fault on its way through the pager, and which parts of it were invalidated meanwhile.
//!
//! ```text
//!   window      |---------------------F-----------------------|     F: the page that the device stands on
//!   invalidated      ####       ##          #######
//!   answer      ======================== =====================
//!   installable ====      ======  ==========       ============     nothing at all when F itself was invalidated
//! ```
//!
//! At most [`MARKS_MAX`] invalidated parts are told apart; beyond that the two nearest ones become one, together with what is
//! between them. That gives up pages which were still good, never F: the device asks for them again.

use uhmm_ipc::constants::MAX_RUNS;
use uhmm_ipc::message::pager::{MapKind, MapRun};

/// Invalidated parts that are told apart in one window.
pub const MARKS_MAX: usize = 32;

/// Pages `first .. end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    first: u64,
    end: u64,
}

/// See the module head.
#[derive(Clone, Debug)]
pub struct Window {
    all: Part,
    fault_page: u64,
    /// Invalidated: in order, apart from each other, not empty.
    marks: Vec<Part>,
}

impl Window {
    /// A window of `page_count` pages from `first_page` on, about which nothing has been heard yet.
    pub fn new(first_page: u64, page_count: u64, fault_page: u64) -> Self {
        let all = Part { first: first_page, end: first_page.saturating_add(page_count) };
        Self { all, fault_page, marks: Vec::new() }
    }

    /// These pages of the region were invalidated; what is outside the window does not matter.
    pub fn invalidate(&mut self, first_page: u64, page_count: u64) {
        let mut new = Part {
            first: first_page.max(self.all.first),
            end: first_page.saturating_add(page_count).min(self.all.end),
        };
        if new.first >= new.end {
            return;
        }
        let from = self.marks.partition_point(|mark| mark.end < new.first);
        let to = self.marks.partition_point(|mark| mark.first <= new.end);
        for mark in &self.marks[from..to] {
            new = Part { first: new.first.min(mark.first), end: new.end.max(mark.end) };
        }
        self.marks.splice(from..to, [new]);
        if self.marks.len() > MARKS_MAX {
            self.join_nearest();
        }
    }

    /// Nothing of the window may be installed.
    pub fn invalidate_all(&mut self) {
        self.marks = vec![self.all];
    }

    /// Whether any of its pages was invalidated.
    pub fn is_hit(&self) -> bool {
        !self.marks.is_empty()
    }

    /// What is still good of an answer: at most [`MAX_RUNS`] runs. `None` when the fault's own page is not.
    pub fn keep(&self, runs: Vec<MapRun>) -> Option<Vec<MapRun>> {
        let page = self.fault_page;
        if self.marks.iter().any(|mark| (mark.first..mark.end).contains(&page)) {
            return None;
        }
        if self.marks.is_empty() {
            return Some(runs);
        }
        let mut kept = Vec::with_capacity(runs.len() + self.marks.len());
        for run in &runs {
            self.cut(run, &mut kept);
        }
        // The cuts can make more runs than a message takes; then those around the fault's page are kept.
        let most = MAX_RUNS as usize;
        if let Some(surplus) = kept.len().checked_sub(most) {
            let at = kept.iter().position(|run| holds(run, page)).unwrap_or(0);
            kept.drain(..at.min(surplus));
            kept.truncate(most);
        }
        Some(kept)
    }

    /// The parts of a run between the marks.
    fn cut(&self, run: &MapRun, kept: &mut Vec<MapRun>) {
        let end = run.first_page.saturating_add(run.page_count);
        let mut next = run.first_page;
        for mark in self.marks.iter().skip_while(|mark| mark.end <= run.first_page).take_while(|mark| mark.first < end)
        {
            kept.extend(part_of(run, next, mark.first));
            next = mark.end;
        }
        kept.extend(part_of(run, next, end));
    }

    /// Makes two neighbouring marks one: those with the fewest pages between them, but never over the fault's page. There are
    /// more than two, so that a pair exists that does not have it in between.
    fn join_nearest(&mut self) {
        let gap = |at: &usize| {
            let between = self.marks[*at].end..self.marks[*at + 1].first;
            (between.contains(&self.fault_page), between.end - between.start)
        };
        if let Some(at) = (0..self.marks.len().saturating_sub(1)).min_by_key(gap) {
            self.marks[at].end = self.marks[at + 1].end;
            self.marks.remove(at + 1);
        }
    }
}

fn holds(run: &MapRun, page: u64) -> bool {
    (run.first_page..run.first_page.saturating_add(run.page_count)).contains(&page)
}

/// The pages `first .. end` of a run that reaches over them.
fn part_of(run: &MapRun, first: u64, end: u64) -> Option<MapRun> {
    if first >= end {
        return None;
    }
    let kind = match run.kind {
        // Frames are numbered with 32 bits; a run that leaves them is the driver's to refuse.
        MapKind::Frame(frame) => MapKind::Frame(u32::try_from(u64::from(frame) + (first - run.first_page)).ok()?),
        MapKind::System => MapKind::System,
    };
    Some(MapRun { first_page: first, page_count: end - first, kind, ..*run })
}

#[cfg(test)]
mod tests;
