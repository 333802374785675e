//! The soft device: a complete device in one process, with its own memory, its own page table, its own threads.
//!
//! ```text
//!   driver kit's loop --submit, resume, cancel--> uhmm_compute::Workers: unit-0, unit-1, ...
//!                     --begin, install, revoke--> SharedTable (memfd, shown to the pager if there is an aperture)
//!                     <--------- DevicePort ----- faults, ends of jobs
//! ```
//! With an aperture the pager reads and writes device memory directly; without one (`aperture = false` in the manifest) it uses
//! the copy ring and revokes by message, exactly as with hardware whose memory the CPU cannot see.
//! [`memory`]: device memory; everything else comes from the driver kit and `uhmm-compute`.

pub mod memory;

use std::sync::Arc;

use uhmm_compute::{Kernel, UnitFrames, Workers, kernels};
use uhmm_driver_kit::{
    DeviceError, Driver, DriverError, DriverParts, KernelSpec, OpenContext, Parts, ServiceArgs, SharedTable, run_driver,
};

use crate::memory::{SoftEngine, SoftMemory};

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
        let frames = (0..worker_count).map(|_| UnitFrames::Window(memory.window())).collect();
        let queue = Workers::start(&table, &port, &self.kernels, frames)?;
        let engine = (!plan.aperture).then(|| SoftEngine::new(&memory));
        Ok(Parts { memory, origin, engine, table, queue })
    }
}
