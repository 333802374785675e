//! The soft device: a complete device in one process, with its own memory, its own page table, its own threads.
//!
//! ```text
//!   driver kit's loop --submit, resume, cancel--> workers: unit-0, unit-1, ...   each: kernel -> Mmu -> frames | system pages
//!                     --begin, install, revoke--> SharedTable (memfd, shown to the pager if there is an aperture)
//!                     <--------- DevicePort ----- faults, ends of jobs
//! ```
//! With an aperture the pager reads and writes device memory directly; without one (`aperture = false` in the manifest) it uses
//! the copy ring and revokes by message, exactly as with hardware whose memory the CPU cannot see.
//!
//! * [`kernels`]: what jobs can run. [`mmu`]: how they reach memory. [`workers`]: who runs them. [`memory`]: device memory.

pub mod kernels;
pub mod memory;
pub mod mmu;
pub mod workers;

use std::sync::Arc;

use uhmm_driver_kit::{
    DeviceError, Driver, DriverError, DriverParts, KernelSpec, OpenContext, Parts, ServiceArgs, SharedTable, run_driver,
};

use crate::kernels::Kernel;
use crate::memory::{SoftEngine, SoftMemory};
use crate::workers::{Device, Workers};

/// The driver of the soft device.
#[derive(Debug)]
pub struct SoftDriver {
    kernels: Arc<[Kernel]>,
}

impl Default for SoftDriver {
    fn default() -> Self {
        Self { kernels: kernels::all().into() }
    }
}

/// `uhmm driver soft`: runs until told to stop.
///
/// # Errors
/// When the service cannot go on; the supervisor starts the next incarnation.
pub fn run(args: ServiceArgs) -> Result<(), DriverError> {
    run_driver(args, SoftDriver::default())
}

impl Driver for SoftDriver {
    type Memory = SoftMemory;
    type Engine = SoftEngine;
    type Table = SharedTable;
    type Queue = Workers;

    fn name(&self) -> &'static str {
        "soft"
    }

    fn kernels(&self) -> Vec<KernelSpec> {
        self.kernels.iter().map(Kernel::spec).collect()
    }

    fn open(&mut self, context: OpenContext<'_>) -> Result<DriverParts<Self>, DeviceError> {
        let OpenContext { plan, kept, port } = context;
        let (memory, origin) = SoftMemory::open(kept, plan.memory_bytes, plan.populate, plan.aperture)?;
        let worker_count = plan.workers.max(1);
        let table = SharedTable::create(worker_count, plan.aperture)?;
        let device = Device { memory: memory.window(), spaces: table.spaces(), port, kernels: self.kernels.clone() };
        let slots = (0..worker_count as usize).filter_map(|index| table.slot(index)).collect();
        let queue = Workers::start(&device, slots)?;
        let engine = (!plan.aperture).then(|| SoftEngine::new(&memory));
        Ok(Parts { memory, origin, engine, table, queue })
    }
}
