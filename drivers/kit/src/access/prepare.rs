//! A job's ranges, before it starts: each is brought and mapped as by a `Map` access, one after the other, under the job's own name.
//!
//! ```text
//!   Submit{ranges} --> [ range ] --brought, or not--> [ range ] --> ... --> the job starts
//!                          `-- its client, its space or its time is gone --> the job ends, as an access would
//! ```
//! They are no promise: what cannot be brought is the job's own fault, if it touches it, and is answered then.

use std::collections::VecDeque;

use uhmm_ipc::message::driver::{AccessOp, JobRange};
use uhmm_ipc::message::{TraceId, WireError, driver};

use super::transfer::check;
use super::{Access, Wanted};
use crate::device::{DeviceMemory, Driver, Job, JobId, PAGE_BYTES};
use crate::run::DriverLoop;

/// A job that does not run yet.
#[derive(Debug)]
pub(crate) struct Preparing {
    job: Job,
    left: VecDeque<Wanted>,
    /// More than the device has room for would push out what was brought first.
    room_pages: u64,
    trace: TraceId,
}

impl Preparing {
    /// What is brought next, as far as there is room.
    fn next(&mut self) -> Option<Wanted> {
        let mut wanted = self.left.pop_front().filter(|_| self.room_pages > 0)?;
        wanted.len_bytes = wanted.len_bytes.min(self.room_pages.saturating_mul(PAGE_BYTES));
        self.room_pages -= wanted.len_bytes / PAGE_BYTES;
        Some(wanted)
    }
}

/// The ranges of a client's job, checked.
pub(crate) fn wanted(space: u64, ranges: &[JobRange]) -> Result<VecDeque<Wanted>, WireError> {
    let wanted = ranges.iter().map(|JobRange { addr, len_bytes, write }| {
        let op = if *write { AccessOp::MapForWrite } else { AccessOp::Map };
        let wanted = Wanted { space, addr: *addr, len_bytes: *len_bytes, op, buffer: None };
        check(&wanted)?;
        Ok(wanted)
    });
    wanted.collect()
}

impl<D: Driver> DriverLoop<D> {
    /// Starts the job when its ranges are there.
    pub(crate) fn prepare_job(&mut self, job: Job, ranges: VecDeque<Wanted>, trace: TraceId) {
        let id = job.id;
        let room_pages = u64::from(self.memory.frame_count() / 2);
        self.accesses.preparing.insert(id, Preparing { job, left: ranges, room_pages, trace });
        self.prepare_next(id);
    }

    fn prepare_next(&mut self, id: JobId) {
        let Some(preparing) = self.accesses.preparing.get_mut(&id) else { return };
        let trace = preparing.trace;
        match preparing.next() {
            Some(wanted) => {
                self.accesses.accesses.insert(id, Access::new(wanted, None, trace));
                self.accesses.ready.push_back(id);
            }
            None => {
                if let Some(Preparing { job, .. }) = self.accesses.preparing.remove(&id) {
                    self.start_job(job);
                }
            }
        }
    }

    /// A range is there, or not. False: it was no job's.
    pub(super) fn prepared(&mut self, id: JobId, result: &Result<driver::Reply, WireError>) -> bool {
        if !self.accesses.preparing.contains_key(&id) {
            return false;
        }
        if let Err(error) = result {
            tracing::debug!(job = id.0, %error, "A range of a job is left to its faults");
        }
        self.prepare_next(id);
        true
    }
}

#[cfg(test)]
mod tests {
    use uhmm_ipc::message::ErrorCode;

    use super::*;

    fn range(first_page: u64, page_count: u64, write: bool) -> JobRange {
        JobRange { addr: first_page * PAGE_BYTES, len_bytes: page_count * PAGE_BYTES, write }
    }

    #[test]
    fn ranges_are_brought_in_turn_as_far_as_there_is_room() {
        let left = wanted(3, &[range(1, 10, false), range(50, 10, true), range(80, 1, false)]).unwrap();
        let job = Job { id: JobId(1), space: 3, kernel: 0, args: vec![] };
        let mut preparing = Preparing { job, left, room_pages: 15, trace: TraceId(0) };
        let brought: Vec<_> = std::iter::from_fn(|| preparing.next())
            .map(|wanted| (wanted.addr / PAGE_BYTES, wanted.page_count(), wanted.writes()))
            .collect();
        assert_eq!(brought, [(1, 10, false), (50, 5, true)]);
    }

    #[test]
    fn a_range_that_is_none_is_refused_before_the_job_is_known() {
        for bad in [
            JobRange { len_bytes: 0, ..range(1, 1, false) },
            JobRange { addr: 4097, ..range(1, 1, false) },
            JobRange { len_bytes: 100, ..range(1, 1, false) },
            JobRange { addr: u64::MAX - 4095, ..range(1, 2, false) },
        ] {
            let refused = wanted(3, &[range(1, 1, false), bad]);
            assert_eq!(refused.map(|_| ()).map_err(|error| error.code), Err(ErrorCode::Invalid), "{bad:?}");
        }
    }
}
