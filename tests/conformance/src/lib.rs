//! The conformance suite: HMM's semantics as cases that any driver can be held against.
//!
//! ```text
//!   uhmm conformance (runner) --+-- uhmm up: pager, mirror, two drivers        (or --run-dir: somebody else's system)
//!          |                    +-- killer thread (--chaos): kill -9 of a service every 20..300 ms
//!          |                    `-- per case: uhmm conformance-case NAME       one process group, one deadline
//!          |                                    `-- forked children, helper processes
//!          `-- after each case: regions, vault entries, descriptors and processes are what they were before
//! ```
//!
//! A case is one function over a [`Ctx`](ctx::Ctx); it ends with `Ok`, with what was wrong, or with why it does not apply. It
//! runs in a process of its own, so a case that hangs or dies is a failed case with a name, and what it leaves behind can be seen.
//! Case names are those of the anchors: kernel selftests `T..`, kfdtest `K..`, `IGT..`, users' pains `P..`, test hooks `R..`.

mod case;
mod cases;
mod chaos;
mod child;
mod ctx;
mod error;
mod forked;
mod leaks;
mod mem;
mod pattern;
mod report;
mod runner;
mod spawned;
mod system;

pub use case::CaseArgs;
pub use error::ConformanceError;
pub use report::{CaseReport, Report, Status};
pub use runner::{Options, case_names, run, run_case};
