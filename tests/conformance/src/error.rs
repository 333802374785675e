//! What keeps the suite from running at all. A failing case is a result, never one of these.

use std::path::PathBuf;

use uhmm_kernel_hook::HookError;

/// Why the suite could not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConformanceError {
    /// No case has a name like that.
    #[error("No case matches \"{filter}\": `uhmm conformance --list` shows all names")]
    NoSuchCase {
        /// The regular expression.
        filter: String,
    },
    /// The regular expression is none.
    #[error("The filter is not a regular expression")]
    BadFilter(#[from] regex::Error),
    /// A file or folder of the run could not be made or read.
    #[error("{} cannot be used: {source}", .path.display())]
    Path {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A process could not be started or waited for.
    #[error("{what} failed: {source}")]
    Process {
        /// Which step.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The supervisor ended before its services were ready.
    #[error("The supervisor ended before its services were ready; its words: {log}")]
    NotReady {
        /// End of its log.
        log: String,
    },
    /// The system under test does not answer.
    #[error("The system under test cannot be asked")]
    Operator(#[from] uhmm_sdk::Error),
    /// A call of the runner's own failed.
    #[error("The runner's own system call failed")]
    Hook(#[from] HookError),
    /// No device belongs to the driver.
    #[error("No device of the plan is driven by \"{driver}\": name another --driver; the plan has {have}")]
    NoDevice {
        /// As asked.
        driver: String,
        /// What there is.
        have: String,
    },
    /// The first contact with the system failed.
    #[error("The system under test does not work at all: {why}")]
    Unusable {
        /// What went wrong.
        why: String,
    },
    /// The system does not become ready again.
    #[error("The system is not ready again after {seconds} s: {state}")]
    NeverReady {
        /// How long was waited.
        seconds: u64,
        /// `uhmm status` in words.
        state: String,
    },
    /// SIGINT or SIGTERM.
    #[error("Stopped by a signal: the results so far are above")]
    Interrupted,
    /// The regular answer of the suite could not be printed.
    #[error("The report cannot be printed")]
    Print(#[from] serde_json::Error),
}

impl ConformanceError {
    pub(crate) fn path(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Path { path, source }
    }

    pub(crate) fn process(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Process { what, source }
    }
}
