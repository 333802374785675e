//! Where pages are, and what a migration did with them.

use uhmm_ipc::message::pager::{PageStatus, Residency, ResidencyRun, StatusRun};

/// Most devices that one plan can hold (the directory's mask of mappings has one bit each).
pub const MAX_DEVICES: usize = 8;

/// Pages by residency, summed over a range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResidencySummary {
    /// Never touched: read as zero, cost no memory anywhere.
    pub absent_pages: u64,
    /// In system memory.
    pub system_pages: u64,
    /// On each device, by device id.
    pub device_pages: [u64; MAX_DEVICES],
    /// On their way.
    pub moving_pages: u64,
    /// Lost with a device: accesses raise SIGBUS.
    pub poisoned_pages: u64,
    /// Pinned to system memory (also counted there).
    pub pinned_pages: u64,
}

impl ResidencySummary {
    /// Adds one run.
    pub fn add(&mut self, run: &ResidencyRun) {
        match run.residency {
            Residency::Absent => self.absent_pages += run.page_count,
            Residency::System => self.system_pages += run.page_count,
            Residency::Duplicated(_) => self.system_pages += run.page_count,
            Residency::Device(device) | Residency::Exclusive(device) => {
                if let Some(pages) = self.device_pages.get_mut(usize::from(device)) {
                    *pages += run.page_count;
                }
            }
            Residency::Moving => self.moving_pages += run.page_count,
            Residency::Poisoned => self.poisoned_pages += run.page_count,
        }
        if run.pinned {
            self.pinned_pages += run.page_count;
        }
    }

    /// Pages on all devices.
    pub fn all_device_pages(&self) -> u64 {
        self.device_pages.iter().sum()
    }

    /// All pages of the range.
    pub fn page_count(&self) -> u64 {
        self.absent_pages + self.system_pages + self.moving_pages + self.poisoned_pages + self.all_device_pages()
    }
}

/// What a migration did, page by page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MigrateReport {
    /// Pages that moved because of this request.
    pub moved_pages: u64,
    /// Fate of every page, in order; `first_page` counts from the start of the request.
    pub runs: Vec<StatusRun>,
    /// Why pages of the fates `Io`, `NoMemory` and (by a limit of the process's) `Pinned` stayed; empty when there are none.
    pub why: String,
}

impl MigrateReport {
    /// Pages of one fate.
    pub fn pages_with(&self, status: PageStatus) -> u64 {
        self.runs.iter().filter(|run| run.status == status).map(|run| run.page_count).sum()
    }

    /// Every page is where it was asked to be.
    pub fn complete(&self) -> bool {
        self.runs.iter().all(|run| matches!(run.status, PageStatus::Moved | PageStatus::AlreadyThere))
    }
}

/// Joins one answer page of a query to what came before. `from_page` is where that answer began in the whole request.
/// Returns how many pages the answer covered.
pub(crate) fn append_runs(all: &mut Vec<ResidencyRun>, from_page: u64, page: Vec<ResidencyRun>) -> u64 {
    let mut covered = 0;
    for mut run in page {
        covered = covered.max(run.first_page.saturating_add(run.page_count));
        run.first_page += from_page;
        match all.last_mut() {
            Some(last) if joins(last, &run) => last.page_count += run.page_count,
            _ => all.push(run),
        }
    }
    covered
}

fn joins(last: &ResidencyRun, next: &ResidencyRun) -> bool {
    last.first_page + last.page_count == next.first_page
        && (last.residency, last.pinned, last.mapped_mask) == (next.residency, next.pinned, next.mapped_mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first_page: u64, page_count: u64, residency: Residency) -> ResidencyRun {
        ResidencyRun { first_page, page_count, residency, pinned: false, mapped_mask: 0, huge: false, coherent: false }
    }

    #[test]
    fn a_summary_counts_every_page_once() {
        let mut summary = ResidencySummary::default();
        for one in [run(0, 3, Residency::Absent), run(3, 4, Residency::Device(2)), run(7, 5, Residency::System)] {
            summary.add(&one);
        }
        summary.add(&ResidencyRun { pinned: true, ..run(12, 1, Residency::System) });
        assert_eq!(summary.page_count(), 13);
        assert_eq!((summary.absent_pages, summary.device_pages[2], summary.system_pages), (3, 4, 6));
        assert_eq!((summary.pinned_pages, summary.all_device_pages()), (1, 4));
    }

    #[test]
    fn answer_pages_are_joined_where_they_meet() {
        let mut all = Vec::new();
        assert_eq!(append_runs(&mut all, 0, vec![run(0, 2, Residency::System), run(2, 2, Residency::Device(0))]), 4);
        assert_eq!(append_runs(&mut all, 4, vec![run(0, 6, Residency::Device(0)), run(6, 1, Residency::Absent)]), 7);
        assert_eq!(all, [run(0, 2, Residency::System), run(2, 8, Residency::Device(0)), run(10, 1, Residency::Absent)]);
    }

    #[test]
    fn a_migration_is_complete_only_if_every_page_arrived() {
        let status = |first_page, status| StatusRun { first_page, page_count: 2, status };
        let mut report = MigrateReport {
            moved_pages: 2,
            runs: vec![status(0, PageStatus::Moved), status(2, PageStatus::AlreadyThere)],
            why: String::new(),
        };
        assert!(report.complete());
        report.runs.push(status(4, PageStatus::Pinned));
        assert!(!report.complete());
        assert_eq!(report.pages_with(PageStatus::Pinned), 2);
    }
}
