//! The driver kit: implement a few small traits for a device, call [`run_driver`] from `main`, and the device is a uhmm driver
//! service: its memory survives crashes in the vault, its page faults are resolved through the mirror, its mappings are
//! revoked on demand, clients' jobs are queued, cancelled, timed and answered, and all of it is counted and traced.
//!
//! ```text
//!   client --OpenQueue, Submit--> driver loop --submit--> device threads (JobQueue)
//!                                   |    ^                   |
//!                     Lookup, Fault |    | Invalidate        | fault: leave the gate, report, sleep until resumed
//!                                   v    |                   v
//!                                   mirror <------------- DevicePort
//!                                   pager: DriverLogin (memory, gate, copy ring), AttachTable (page tables)
//! ```
//! * [`device`]: the traits. [`SharedTable`] is a ready page table for devices whose threads run in this process.
//! * [`fault`]: device faults as a pure state machine.
//! * [`seal`]: for frames that lie where others can read or change them.
//! * [`run_driver`]: the loop. [`DevicePort`]: how the device talks to it. [`main`]: a program around it.

pub mod device;
pub mod fault;
mod file_pages;
mod hint;
pub mod port;
pub mod seal;
pub mod stats;
pub mod table;

mod access;
mod clients;
mod copy_service;
mod error;
mod invalidate;
mod job;
mod program;
mod resolve;
mod run;
mod session;
mod state;
mod uplink;

pub use device::{
    CopyEngine, CopyWork, DeviceError, DeviceFault, DeviceMemory, DevicePageTable, Driver, DriverParts, FaultId,
    Frames, InstallReport, Job, JobId, JobQueue, JobReport, KernelSpec, LostFrames, MemoryOrigin, OpenContext,
    PAGE_BYTES, PageRange, Parts, Place, Quiescence, RegionKey, RegionMap, StagedCopy, Staging, StagingUse,
    SystemPages,
};
pub use error::DriverError;
pub use file_pages::FilePages;
pub use hint::Hint;
pub use port::{DeviceEvent, DevicePort};
pub use program::main;
pub use run::run_driver;
pub use table::{AddressSpaces, MappedRegion, SharedTable};
pub use uhmm_ipc::shared::copy_ring::CopyOp;
pub use uhmm_kit::ServiceArgs;
pub use uhmm_kit::record::{Each, Kind as MetricKind};
