//! Answers that are on their way.
//!
//! ```text
//!   uhmm_x_async / uhmm_submit --> uhmm_pending: Slot <---- link thread: the SDK's Pending completes
//!   poll, wait (any thread, any number of times) --------> | condvar
//!   uhmm_pending_migrated / _finished / _accessed  <------ | a copy of the answer, as often as it is asked for
//!   uhmm_pending_free: the call itself goes on
//! ```

use std::ffi::{c_int, c_void};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uhmm_sdk::{AccessReport, Error, JobResult, MigrateReport, Pending};

use crate::buffers::{Out, bytes_mut, items_mut};
use crate::device::uhmm_access_report;
use crate::error::{Failure, guard, guard_value};
use crate::handles::{self, Handle};
use crate::jobs::{self, uhmm_job_report};
use crate::migrate::{Wanted, uhmm_migrate_report};

/// One answer that is on its way: what the functions that do not wait give. Free it with uhmm_pending_free().
pub struct uhmm_pending;

impl Handle for uhmm_pending {
    type Object = Arc<Slot>;
    const KIND: &'static str = "uhmm_pending";
}

/// What a call can answer.
pub(crate) enum Answer {
    Migrated(MigrateReport),
    Finished(JobResult),
    /// With what was read.
    Accessed((Vec<u8>, AccessReport)),
}

/// Where the link thread leaves an answer.
pub(crate) struct Slot {
    answer: Mutex<Option<Result<Answer, Failure>>>,
    ready: Condvar,
    /// Says when that thread was killed, as a filter of the program's may do.
    is_orphaned: Box<dyn Fn() -> bool + Send + Sync>,
}

/// How often who waits looks whether the thread lives.
const LIFE_CHECK: Duration = Duration::from_millis(500);

impl Slot {
    fn new(is_orphaned: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self { answer: Mutex::new(None), ready: Condvar::new(), is_orphaned: Box::new(is_orphaned) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Result<Answer, Failure>>> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn complete(&self, result: Result<Answer, Failure>) {
        *self.lock() = Some(result);
        self.ready.notify_all();
    }

    /// Whether the answer is here; waits at most `limit` (`None`: for good).
    fn wait(&self, limit: Option<Duration>) -> bool {
        let end = limit.and_then(|limit| Instant::now().checked_add(limit));
        let mut answer = self.lock();
        while answer.is_none() {
            if (self.is_orphaned)() {
                *answer = Some(Err(Error::AgentGone.into()));
                break;
            }
            let left = match end.map(|end| end.checked_duration_since(Instant::now())) {
                None => LIFE_CHECK,
                Some(None) => return false,
                Some(Some(left)) => left.min(LIFE_CHECK),
            };
            answer = self.ready.wait_timeout(answer, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Looks at a good answer; the call's own error otherwise.
    fn read<T>(&self, look: impl FnOnce(&Answer) -> Result<T, Failure>) -> Result<T, Failure> {
        match &*self.lock() {
            None => Err(Failure::NotReady),
            Some(Err(failure)) => Err(failure.keep()),
            Some(Ok(answer)) => look(answer),
        }
    }
}

impl Answer {
    fn other<T>(&self) -> Result<T, Failure> {
        let with = match self {
            Answer::Migrated(_) => "uhmm_pending_migrated()",
            Answer::Finished(_) => "uhmm_pending_finished()",
            Answer::Accessed(_) => "uhmm_pending_accessed()",
        };
        Err(Failure::OtherAnswer { with })
    }
}

/// A handle for a call of the SDK.
pub(crate) fn open<T: Send + 'static>(
    call: Pending<T>,
    kind: impl FnOnce(T) -> Answer + Send + 'static,
) -> *mut uhmm_pending {
    let slot = Arc::new(Slot::new(call.lifeline()));
    let completed = Arc::clone(&slot);
    call.on_answer(move |result| completed.complete(result.map(kind).map_err(Failure::from)));
    handles::open(slot)
}

/// Whether the answer is here: 1, or 0 while it is not.
///
/// Errors: -EINVAL a wrong handle.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_pending_poll(pending: *mut uhmm_pending) -> c_int {
    guard_value(|| Ok(handles::get(pending)?.wait(Some(Duration::ZERO)).into()))
}

/// Waits until the answer is here: 1, or 0 when it is not after `timeout_ms` (the call goes on). Negative: waits as long as it
/// takes.
///
/// Errors: -EINVAL a wrong handle.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_pending_wait(pending: *mut uhmm_pending, timeout_ms: i64) -> c_int {
    guard_value(|| {
        let limit = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
        Ok(handles::get(pending)?.wait(limit).into())
    })
}

/// Frees the handle. The call is not cancelled. In a forked child, a handle of the parent is left alone.
///
/// Errors: -EINVAL a wrong handle.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_pending_free(pending: *mut uhmm_pending) -> c_int {
    guard(|| handles::close(pending).map(drop))
}

/// The answer of uhmm_migrate_async() or uhmm_prefetch_async(), with the arguments and errors of uhmm_migrate(). Can be asked
/// more than once.
///
/// Errors: -EBUSY it is not here yet; -EINVAL another kind of answer, or too little room; the call's own, as uhmm_migrate().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_pending_migrated(
    pending: *mut uhmm_pending,
    report: *mut uhmm_migrate_report,
    fates: *mut u8,
    capacity: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable or null, and an array of `capacity`.
        let wanted = unsafe { Wanted::new(report, fates, capacity) }?;
        handles::get(pending)?.read(|answer| match answer {
            Answer::Migrated(done) => wanted.tell(done),
            other => other.other(),
        })
    })
}

/// The answer of uhmm_submit(), with the arguments and errors of uhmm_run(). Can be asked more than once.
///
/// Errors: -EBUSY it is not here yet; -EINVAL another kind of answer; the job's own, as uhmm_run().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_pending_finished(
    pending: *mut uhmm_pending,
    report: *mut uhmm_job_report,
    results: *mut u64,
    capacity: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable, or null.
        let report = unsafe { Out::optional(report, "report") }?;
        // SAFETY: the caller's array of `capacity`.
        let results = unsafe { items_mut(results, capacity, "results") }?;
        handles::get(pending)?.read(|answer| match answer {
            Answer::Finished(done) => {
                jobs::tell(done, report, results);
                Ok(())
            }
            other => other.other(),
        })
    })
}

/// The answer of uhmm_device_read_async() and its like. What was read (or the words from before a fetch-add) is copied to `into`, which has
/// room for `len_bytes`: at least as much as there is, or NULL with length 0. `report` may be NULL. Can be asked more than once.
///
/// Errors: -EBUSY it is not here yet; -EINVAL another kind of answer, or too little room; the access's own, as uhmm_device_read() and its like;
/// -ETIMEDOUT the deadline passed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_pending_accessed(
    pending: *mut uhmm_pending,
    into: *mut c_void,
    len_bytes: u64,
    report: *mut uhmm_access_report,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable, or null.
        let report = unsafe { Out::optional(report, "report") }?;
        // SAFETY: the caller promises `len_bytes` writable bytes.
        let into = unsafe { bytes_mut(into, len_bytes, "into") }?;
        handles::get(pending)?.read(|answer| match answer {
            Answer::Accessed((bytes, done)) => {
                if !into.is_empty() {
                    let too_small =
                        Failure::TooSmall { name: "into", capacity: into.len(), needed: bytes.len() as u64 };
                    into.get_mut(..bytes.len()).ok_or(too_small)?.copy_from_slice(bytes);
                }
                if let Some(report) = report {
                    report.set((*done).into());
                }
                Ok(())
            }
            other => other.other(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished() -> Answer {
        Answer::Finished(JobResult { results: vec![5], fault_count: 1, run_time_ns: 2 })
    }

    #[test]
    fn an_answer_is_waited_for_and_can_be_read_twice() {
        let slot = Arc::new(Slot::new(|| false));
        assert!(!slot.wait(Some(Duration::ZERO)) && !slot.wait(Some(Duration::from_millis(1))));
        assert!(matches!(slot.read(|_| Ok(())), Err(Failure::NotReady)));
        let waiting = [None, Some(Duration::MAX)].map(|limit| {
            let slot = Arc::clone(&slot);
            std::thread::spawn(move || slot.wait(limit))
        });
        slot.complete(Ok(finished()));
        assert!(waiting.into_iter().all(|waiter| waiter.join().unwrap()));
        for _ in 0..2 {
            slot.read(|answer| if matches!(answer, Answer::Finished(_)) { Ok(()) } else { answer.other() }).unwrap();
        }
    }

    #[test]
    fn who_waits_learns_that_nobody_answers_any_more() {
        let slot = Slot::new(|| true);
        assert!(slot.wait(Some(Duration::ZERO)) && slot.wait(None));
        assert!(!matches!(slot.read(|_| Ok(())), Err(Failure::NotReady) | Ok(())));
    }

    #[test]
    fn an_answer_of_another_kind_names_the_right_function() {
        let error = finished().other::<()>().unwrap_err();
        assert!(error.to_string().contains("uhmm_pending_finished()"), "{error}");
    }

    #[test]
    fn a_failed_calls_error_can_be_asked_twice() {
        let slot = Slot::new(|| false);
        slot.complete(Err(Failure::from(uhmm_sdk::Error::EmptyRange)));
        for _ in 0..2 {
            let error = slot.read(|_| Ok(())).unwrap_err();
            assert_eq!((error.errno(), error.full_text().contains("empty")), (libc::EINVAL, true));
        }
    }
}
