//! The driver of the accelerator that `uhmm device-model accel` plays, as a device whose memory the CPU does not see: everything goes
//! through its copy engine. (`bar` drives the same device through its aperture.)
//!
//! ```text
//!   kit's copy thread: staging area --+                                  +-- completion, interrupt --> done
//!   units: one page each -------------+--> Accel: descriptor, doorbell --+-- late, wrong, failed --> engine restarted, once more
//!                                                                        +-- gone --> the driver ends
//! ```
//! [`engine`]: the ring. [`memory`]: frames, and whether their bytes are those of the last incarnation.

pub mod engine;
pub mod memory;

use std::sync::Arc;

use uhmm_compute::{FrameLocks, Kernel, LockedEngine, UnitFrames, Workers, kernels};
use uhmm_driver_kit::{
    DeviceError, Driver, DriverError, DriverParts, KernelSpec, OpenContext, Parts, ServiceArgs, SharedTable, run_driver,
};

use crate::engine::Accel;
use crate::memory::{AccelCopies, AccelMemory, AccelPort};

/// The driver; see the crate's head.
#[derive(Debug)]
pub struct AccelDriver {
    kernels: Arc<[Kernel]>,
}

impl Default for AccelDriver {
    fn default() -> Self {
        Self { kernels: kernels::all().into() }
    }
}

/// `uhmm driver accel`: runs until told to stop.
///
/// # Errors
/// When the service cannot go on; the supervisor starts the next incarnation.
pub fn run(args: ServiceArgs) -> Result<(), DriverError> {
    run_driver(args, AccelDriver::default())
}

impl Driver for AccelDriver {
    type Memory = AccelMemory;
    type Engine = LockedEngine<AccelCopies>;
    type Table = SharedTable;
    type Queue = Workers;

    fn name(&self) -> &'static str {
        "accel"
    }

    fn kernels(&self) -> Vec<KernelSpec> {
        self.kernels.iter().map(Kernel::spec).collect()
    }

    fn open(&mut self, context: OpenContext<'_>) -> Result<DriverParts<Self>, DeviceError> {
        let OpenContext { plan, kept, port } = context;
        let path = plan.pci.as_ref().ok_or("The manifest names no PCI device for it: add `pci`")?;
        let device = uhmm_pci::open(path, &kept)?;
        let lost = port.clone();
        let removal = device.watch_removal(move |reason| lost.lost(reason))?;
        let accel = Arc::new(Accel::open(device)?);
        let (memory, origin) = AccelMemory::open(accel.clone(), &kept, plan.memory_bytes, removal)?;
        let units = plan.workers.max(1);
        let table = SharedTable::create(units, false)?;
        let locks = Arc::new(FrameLocks::default());
        let frames = (0..units)
            .map(|_| Ok(UnitFrames::Port(Box::new(AccelPort::new(accel.clone())?), locks.clone())))
            .collect::<Result<_, DeviceError>>()?;
        let queue = Workers::start(&table, &port, &self.kernels, frames)?;
        let engine = LockedEngine::new(AccelCopies::new(accel), locks);
        Ok(Parts { memory, origin, engine: Some(engine), table, queue })
    }
}
