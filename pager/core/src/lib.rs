//! The pure state machine of page states: `event, now -> actions`, no I/O, no clock, no threads.
//!
//! The same code runs in the pager service, in the simulator of this crate's tests and under a model checker.
//!
//! ```text
//!         +---------------- rollback (copy failed) ----------------+
//!         v                                                        |
//!   Absent / System --Migrate, Resolve--> MovingOut --CopyDone--> Device --CpuFault, Migrate home, eviction--> MovingHome --FillDone--> System
//!                                                                    \--device memory lost--> Poisoned
//! ```
//!
//! Order of the steps, which is what makes a crash after any of them harmless:
//!
//! * out: publish MovingOut, write-protect, revoke, copy, publish Device, punch, wake
//! * home: publish MovingHome, revoke, fill (visible to the CPU at once), publish System, free the frames
//!
//! What the shell promises: actions of one call run in order; an action with a ticket is answered by exactly one event;
//! publishes are applied before the next event is handled; what is read of a program's changes is told before the faults read with
//! it, and after that nothing is filled on older orders. What it may not assume: anything about what is in flight, which is
//! all in here and all lost in a crash. [`Event::RecoverRegion`] rebuilds it from the directories.

mod across;
mod attr;
mod clock;
mod coherent;
mod core;
mod discard;
mod ending;
mod entry;
mod event;
mod evict;
mod fault;
mod fork;
mod frames;
mod free;
mod home;
mod out;
mod pace;
mod policy;
mod ready;
mod recovering;
mod recovery;
mod request;
mod resolve;
mod runs;
mod scrub;
pub mod sim;
mod slots;
mod stats;
mod transfer;
mod walk;
mod way;

pub use attr::Attr;
pub use clock::{Found, LOOKS_PER_TURN, SECOND_CHANCES_MAX, Search};
pub use core::{CHUNK_PAGES, Core};
pub use entry::{BadEntry, CPU, DEVICE_COUNT_MAX, Entry, LOST_FRAME, PageState, PoisonReason};
pub use event::{
    Action, Backing, Cause, CopyRun, CopyStatus, CoreError, DeviceId, Directory, EntryRun, Event, FillStop, MapKind,
    MapRun, Only, Outcome, PageStatus, Pages, RegionId, ReqId, SpaceId, StatusRun, StepResult, Target, Ticket,
    TraceKind,
};
pub use frames::{FrameTable, Owner};
pub use policy::{CpuFault, DefaultPolicy, DeviceFault, DeviceFaultAction, Policy};
pub use stats::Stats;
