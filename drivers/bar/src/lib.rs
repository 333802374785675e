//! The driver of PCI devices that have plain memory behind a base address register: shared memory of a virtual machine (ivshmem),
//! the aperture of an accelerator. The CPU and everybody who is shown the BAR use the same bytes, so nothing is ever copied by DMA.
//!
//! ```text
//!   BAR:  | frame 0 | frame 1 | ... | frame n-1 | mark |        the last page says whose content it is
//!             ^ pager, programs (coherent = true), units of uhmm-compute: all through the same mapping
//! ```
//! Which BAR: the one that the manifest names, or else the largest that can be mapped. Jobs run on this machine's CPU.
//!
//! [`memory`]: frames, and whether their bytes are those of the last incarnation.

pub mod memory;

use std::sync::Arc;

use uhmm_compute::{Kernel, UnitFrames, Workers, kernels};
use uhmm_driver_kit::{
    DeviceError, DevicePort, Driver, DriverError, DriverParts, KernelSpec, OpenContext, Parts, ServiceArgs,
    SharedTable, run_driver,
};
use uhmm_ipc::message::Fd;
use uhmm_pci::{PciDevice, PciPath};

use crate::memory::{BarMemory, Unused};

/// How the device of a path is opened, with what the last incarnation kept.
type Opener = fn(&PciPath, &[(String, Fd)]) -> Result<PciDevice, uhmm_pci::PciError>;

/// The driver; see the crate's head.
#[derive(Debug)]
pub struct BarDriver {
    kernels: Arc<[Kernel]>,
    open: Opener,
}

impl Default for BarDriver {
    fn default() -> Self {
        Self { kernels: kernels::all().into(), open: uhmm_pci::open }
    }
}

/// `uhmm driver bar`: runs until told to stop.
///
/// # Errors
/// When the service cannot go on; the supervisor starts the next incarnation.
pub fn run(args: ServiceArgs) -> Result<(), DriverError> {
    run_driver(args, BarDriver::default())
}

impl Driver for BarDriver {
    type Memory = BarMemory;
    type Engine = Unused;
    type Table = SharedTable;
    type Queue = Workers;

    fn name(&self) -> &'static str {
        "bar"
    }

    fn kernels(&self) -> Vec<KernelSpec> {
        self.kernels.iter().map(Kernel::spec).collect()
    }

    fn open(&mut self, context: OpenContext<'_>) -> Result<DriverParts<Self>, DeviceError> {
        let OpenContext { plan, kept, port } = context;
        let path = plan.pci.as_ref().ok_or("The manifest names no PCI device for it: add `pci`")?;
        let device = (self.open)(path, &kept)?;
        let lost = port.clone();
        let removal = device.watch_removal(move |reason| lost.lost(reason))?;
        let (mut memory, origin) = BarMemory::open(device, &kept, plan.bar, plan.memory_bytes)?;
        memory.keep_watch(removal);
        let table = SharedTable::create(plan.workers, true)?;
        let queue = self.start_units(&table, &port, plan.workers, &memory)?;
        Ok(Parts { memory, origin, engine: None, table, queue })
    }
}

impl BarDriver {
    fn start_units(
        &self,
        table: &SharedTable,
        port: &DevicePort,
        count: u32,
        memory: &BarMemory,
    ) -> Result<Workers, DeviceError> {
        let frames = (0..count).map(|_| UnitFrames::Window(memory.window())).collect();
        Ok(Workers::start(table, port, &self.kernels, frames)?)
    }
}
