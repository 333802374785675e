//! What a case is, and how one process runs it and tells the runner.

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uhmm_kernel_hook::HookError;
use uhmm_kernel_hook::error::chain;

use crate::ctx::Ctx;

/// What a step of a case comes to.
pub(crate) type CaseResult<T = ()> = Result<T, Failure>;

/// Why a case ended early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// An assertion did not hold.
    Failed(String),
    /// It means nothing here.
    NotApplicable(String),
}

impl Failure {
    /// The same, with what was being done put before.
    pub(crate) fn at(self, what: &str) -> Self {
        match self {
            Failure::Failed(why) => Failure::Failed(format!("{what}: {why}")),
            other => other,
        }
    }
}

/// Puts what was being done before a failure's words.
pub(crate) trait During<T> {
    fn during(self, what: &str) -> CaseResult<T>;
}

impl<T, E: Into<Failure>> During<T> for Result<T, E> {
    fn during(self, what: &str) -> CaseResult<T> {
        self.map_err(|error| error.into().at(what))
    }
}

impl From<uhmm_sdk::Error> for Failure {
    fn from(error: uhmm_sdk::Error) -> Self {
        Failure::Failed(chain(&error))
    }
}

impl From<HookError> for Failure {
    fn from(error: HookError) -> Self {
        Failure::Failed(chain(&error))
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::Failed(error.to_string())
    }
}

/// Ends the case when a condition does not hold.
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err($crate::case::Failure::Failed(format!($($text)+)));
        }
    };
}

/// Ends the case when two values differ, and shows both.
macro_rules! ensure_eq {
    ($found:expr, $expected:expr, $($text:tt)+) => {{
        let (found, expected) = (&$found, &$expected);
        if found != expected {
            let what = format!($($text)+);
            return Err($crate::case::Failure::Failed(format!("{what}: found {found:?} where {expected:?} was expected")));
        }
    }};
}

/// Ends the case because it means nothing here.
macro_rules! not_applicable {
    ($($text:tt)+) => { return Err($crate::case::Failure::NotApplicable(format!($($text)+))) };
}

pub(crate) use {ensure, ensure_eq, not_applicable};

/// Which kind of device memory a case is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    /// Memory that a CPU access brings home: adopted memory, on a device of any kind.
    Private,
    /// Memory that the CPU reaches where it is: allocated memory on coherent devices.
    Coherent,
    /// Either.
    Any,
}

type Run = Box<dyn Fn(&Ctx) -> CaseResult>;

/// One case.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) needs: Needs,
    pub(crate) device_count: usize,
    pub(crate) deadline: Duration,
    pub(crate) run: Run,
}

/// The list of all cases, in the order in which they run.
#[derive(Default)]
pub(crate) struct Registry {
    pub(crate) cases: Vec<Case>,
}

/// Longest time for one case of an undisturbed run; the runner gives more under disturbance.
const CASE_DEADLINE: Duration = Duration::from_secs(20);

impl Registry {
    /// A case that is about either kind of device memory.
    pub(crate) fn one(&mut self, name: impl Into<String>, run: impl Fn(&Ctx) -> CaseResult + 'static) -> &mut Case {
        self.add(name.into(), Needs::Any, Box::new(run))
    }

    /// A case and its `.coherent` twin.
    pub(crate) fn both(&mut self, name: &str, run: fn(&Ctx) -> CaseResult) {
        self.add(name.to_owned(), Needs::Private, Box::new(run));
        self.add(format!("{name}.coherent"), Needs::Coherent, Box::new(run));
    }

    /// As [`Registry::both`], with that many devices.
    pub(crate) fn both_with_devices(&mut self, name: &str, device_count: usize, run: fn(&Ctx) -> CaseResult) {
        let first = self.cases.len();
        self.both(name, run);
        self.cases[first..].iter_mut().for_each(|case| case.device_count = device_count);
    }

    fn add(&mut self, name: String, needs: Needs, run: Run) -> &mut Case {
        let index = self.cases.len();
        self.cases.push(Case { name, needs, device_count: 1, deadline: CASE_DEADLINE, run });
        &mut self.cases[index]
    }
}

impl Case {
    /// Needs that many devices of the driver.
    pub(crate) fn devices(&mut self, device_count: usize) -> &mut Self {
        self.device_count = device_count;
        self
    }

    /// Needs more time than the others.
    pub(crate) fn deadline_s(&mut self, seconds: u64) -> &mut Self {
        self.deadline = Duration::from_secs(seconds);
        self
    }
}

/// What the runner tells the process of a case (`uhmm conformance-case`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaseArgs {
    /// Which case.
    pub name: String,
    /// Of the system under test.
    pub run_dir: PathBuf,
    /// Device names, first to last.
    pub devices: Vec<String>,
    /// The case is about memory that the CPU reaches on the device.
    pub coherent: bool,
    /// Services are being killed meanwhile.
    pub chaos: bool,
    /// The case's own agent thread stands still now and then.
    pub pause_agent: bool,
    /// For everything random.
    pub seed: u64,
    /// The case's own words to a process that it has started itself; empty for the case proper.
    pub role: Vec<String>,
}

/// What the process of a case says in its last line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) status: OutcomeStatus,
    pub(crate) why: String,
}

/// See [`Outcome`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum OutcomeStatus {
    Passed,
    Failed,
    NotApplicable,
}

impl From<CaseResult> for Outcome {
    fn from(result: CaseResult) -> Self {
        match result {
            Ok(()) => Outcome { status: OutcomeStatus::Passed, why: String::new() },
            Err(Failure::Failed(why)) => Outcome { status: OutcomeStatus::Failed, why },
            Err(Failure::NotApplicable(why)) => Outcome { status: OutcomeStatus::NotApplicable, why },
        }
    }
}

/// Runs a step; a panic is a failure like any other.
pub(crate) fn guarded(step: impl FnOnce() -> CaseResult) -> CaseResult {
    std::panic::catch_unwind(AssertUnwindSafe(step)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(Failure::Failed(format!("Panicked: {}", text.unwrap_or_default())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_failure_with_its_words() {
        let outcome = Outcome::from(guarded(|| panic!("page {} is lost", 7)));
        assert_eq!(outcome, Outcome { status: OutcomeStatus::Failed, why: "Panicked: page 7 is lost".into() });
    }

    #[test]
    fn failures_tell_what_was_being_done_and_reasons_stay_as_they_are() {
        let failed: CaseResult = Err(Failure::Failed("x".into()));
        assert_eq!(failed.during("Fork").unwrap_err(), Failure::Failed("Fork: x".into()));
        let none: CaseResult = Err(Failure::NotApplicable("one device".into()));
        assert_eq!(none.during("Fork").unwrap_err(), Failure::NotApplicable("one device".into()));
    }
}
