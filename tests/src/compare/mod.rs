//! Programs as they are, under `uhmm run` and beside it under the kernel's own answer: a memory cgroup of the same size, with swap on zram and in
//! a file of the same disk.
//!
//! ```text
//!   plain run --> its result, its working set
//!   for each part of the working set, interleaved:   uhmm run --ram | cgroup + zram | cgroup + swap file --> the same result? how long? p99?
//! ```
//! `uhmm-run-compare` prints the table (docs/run.md); `integration_run_programs` runs a few small ones.

pub mod arrange;
pub mod pages;
pub mod programs;
pub mod report;
pub mod servers;

/// What one run of a program came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Equal in every run, whatever the arrangement.
    pub result: String,
    /// For the work that is measured.
    pub seconds: f64,
    /// Of a server's answers, where a client records them.
    pub p99_us: Option<f64>,
}
