//! uhmm for applications: memory whose pages move between system memory and devices while every pointer stays what it is.
//!
//! ```no_run
//! # fn main() -> Result<(), uhmm_sdk::Error> {
//! let session = uhmm_sdk::Session::connect(None)?;
//! let region = session.allocate(64 << 20)?;              // ordinary memory: build ordinary structures in it
//! let arena = region.arena()?;
//! let numbers = arena.alloc_slice_copy(&[1u64, 2, 3])?;
//! let device = session.device("soft0")?;
//! session.migrate(region.addr(), region.len_bytes(), &device)?;
//! let addr = numbers.as_ptr().addr() as u64;             // the same pointer works there ...
//! let sum = device.run(uhmm_sdk::Job::new("sum", [addr, 24]).idempotent())?;
//! assert_eq!(sum.results, [numbers.iter().sum::<u64>()]); // ... and here: touched pages come home by themselves
//! # Ok(())
//! # }
//! ```
//!
//! ```text
//!   app threads             link thread                      services
//!   Session, Region  -----> reactor: links, reconnects ----> pager   (regions, migration, residency)
//!   Device           <----- Pending<T>                 ----> drivers (jobs)
//!   memory access    ---------- kernel: userfaultfd -------> pager   (no SDK code on this path)
//!   the agent, a process <----- orders in shared memory <--- pager   (private pages out of the address space, and back)
//! ```
//!
//! Services may die and come back at any time: memory accesses and calls wait for the next incarnation. What this costs
//! is time, never bytes. Calls that cannot be repeated say so ([`ErrorCode::Stale`]).
//!
//! Memory that exists already (from any allocator, or mmap) can be managed too, in place: [`Session::adopt`], or all of it:
//! [`Session::adopt_all`]. What a device reads
//! and writes without a job goes through [`Device::read`] and its neighbours.
//!
//! Limits that Linux sets: without [`Session::fork_supported`] a child made by `fork` does not inherit managed ranges (touching one
//! there is a SIGSEGV), with it the child goes on with [`Session::in_child`]; memory of a region (not adopted memory) that I/O
//! refers to must be pinned ([`Session::pin`]); see [`Session::uffd_kind`] for system calls on migrated memory.

mod adopt_all;
mod adopted;
mod agent;
mod arena;
mod callbacks;
mod child;
mod device;
mod error;
mod forking;
mod frames;
mod links;
mod memory;
pub mod operator;
mod own;
mod paths;
mod pending;
mod pieces;
mod range;
mod refused;
mod region;
mod residency;
mod session;
mod validation;

pub use adopt_all::{ADOPT_ALL_MIN_BYTES, AdoptedAll, LeftAlone};
pub use agent::AgentKind;
pub use arena::Arena;
pub use device::{AccessReport, Device, DeviceInfo, Job, JobResult};
pub use error::Error;
pub use memory::{Adopted, AdoptedKind, RangeAttributes, SnapshotPage, Uniform};
pub use operator::{EndedMove, MoveId, Operator, Rested};
pub use own::{Noted, never_manage};
pub use paths::run_dir;
pub use pending::Pending;
pub use range::{PAGE_BYTES, enclosing_pages};
pub use region::Region;
pub use residency::{MAX_DEVICES, MigrateReport, ResidencySummary};
pub use session::Session;

pub use uhmm_ipc::message::pager::{
    AccessMode, Advice, Claim, ClaimShare, Claims, DeviceUse, FaultPoint, HotRange, PageStatus, RegionStatus,
    Residency, ResidencyRun, Rest, StatusRun, Target, TraceCause, TraceKind, TraceRecord,
};
pub use uhmm_ipc::message::supervisor::ServiceStatus;
pub use uhmm_ipc::message::{ErrorCode, Metric, TraceId};
pub use uhmm_kernel_hook::{AddrRange, UffdKind};
