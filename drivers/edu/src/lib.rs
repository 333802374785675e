//! The teaching driver: QEMU's educational PCI device as a device of uhmm. `uhmm driver new NAME` copies it as the start of a new one.
//!
//! The device has a DMA buffer of 4 KiB that the CPU cannot address, which becomes one frame of device memory, and a unit that computes
//! factorials. A driver consists of these parts, each behind a trait of the driver kit:
//!
//! ```text
//!   part          trait             here                                what a larger device does
//!   registers     -                 hardware.rs                         its own registers, queues, doorbells
//!   memory        DeviceMemory      frame.rs: one frame, no aperture    many frames; an aperture if the CPU sees them
//!   copies        CopyEngine        frame.rs: DMA from and to staging   the same, with many DMAs in flight
//!   page table    DevicePageTable   SharedTable of the kit              the same, or the device's own MMU
//!   jobs          JobQueue          factorial.rs + software units       the device's own queues
//! ```
//! The kit runs everything else: sessions with pager and mirror, faults, invalidations, the vault, statistics.
//!
//! **Restart.** The supervisor starts this process again when it dies. The vault has the device's descriptors meanwhile, so the kernel
//! does not reset the device and does not end its DMA. [`EduDriver::open`] shows the order in which the next incarnation
//! takes the device over.

pub mod factorial;
pub mod frame;
pub mod hardware;

use std::sync::{Arc, Mutex};

use uhmm_compute::{FrameLocks, Kernel, LockedEngine, UnitFrames, Workers, kernels};
use uhmm_driver_kit::{
    DeviceError, Driver, DriverError, DriverParts, KernelSpec, MemoryOrigin, OpenContext, Parts, ServiceArgs,
    SharedTable, run_driver,
};
use uhmm_pci::RemovalWatch;

use crate::factorial::EduQueue;
use crate::frame::{EduEngine, EduMemory, Frame, UnitPort};
use crate::hardware::Edu;

/// The driver.
#[derive(Debug)]
pub struct EduDriver {
    /// What runs on the CPU instead of the device: every kernel of the conformance suite.
    software: Arc<[Kernel]>,
    /// Ends with the driver.
    removal: Option<RemovalWatch>,
}

impl Default for EduDriver {
    fn default() -> Self {
        Self { software: kernels::all().into(), removal: None }
    }
}

/// Runs the driver service until it is told to stop.
///
/// # Errors
/// When the service cannot go on; the supervisor starts the next incarnation.
pub fn run(args: ServiceArgs) -> Result<(), DriverError> {
    run_driver(args, EduDriver::default())
}

impl Driver for EduDriver {
    type Memory = EduMemory;
    // The locks keep an engine's write and a unit's write of the same frame apart.
    type Engine = LockedEngine<EduEngine>;
    type Table = SharedTable;
    type Queue = EduQueue;

    fn name(&self) -> &'static str {
        "edu"
    }

    /// Jobs name kernels by their place in this list: first those in software, last the device's own.
    fn kernels(&self) -> Vec<KernelSpec> {
        let software = self.software.iter().map(Kernel::spec);
        software.chain([factorial::spec()]).collect()
    }

    fn open(&mut self, context: OpenContext<'_>) -> Result<DriverParts<Self>, DeviceError> {
        let OpenContext { plan, kept, port } = context;
        // 1. Open the device, or take it over: `kept` is what `EduMemory::kept` gave to the vault.
        let path = plan.pci.as_ref().ok_or("The manifest names no PCI device for it: add `pci`")?;
        let device = uhmm_pci::open(path, &kept)?;
        let edu = Edu::new(&device)?;
        let lost = port.clone();
        self.removal = Some(device.watch_removal(move |reason| lost.lost(reason))?);

        // 2. An adopted device may be at a DMA that the dead process started. Its mappings still stand, so the DMA can end as it was
        //    meant to. Only then nothing of the old incarnation may be reachable any more. (A device with queues in memory would
        //    keep them in the vault, and take their mappings over with `PciDevice::adopt_dma` before `finish_adoption`.)
        if device.is_adopted() {
            edu.finish()?;
            device.finish_adoption()?;
            device.allow_dma()?;
        }

        // 3. Device memory: what the frame holds is worth something only if the device never was without its driver's supervisor.
        let origin = if device.is_adopted() { MemoryOrigin::Adopted } else { MemoryOrigin::Created };
        let edu = Arc::new(Mutex::new(edu));
        let frame = Frame::new(edu.clone(), device.clone());
        let locks = Arc::new(FrameLocks::default());
        let mut engine = EduEngine::new(frame.clone())?;
        if origin == MemoryOrigin::Created {
            engine.scrub_frame()?;
        }

        // 4. The page table that jobs see, with one place for each unit; the pager cannot read it for a device without aperture.
        let table = SharedTable::create(plan.workers, false)?;

        // 5. Who runs jobs: units in software that reach the frame by DMA, and the device's own unit.
        let ports = (0..plan.workers).map(|_| unit_frames(&frame, &locks)).collect::<Result<Vec<_>, _>>()?;
        let units = Workers::start(&table, &port, &self.software, ports)?;
        let queue = EduQueue::start(units, self.software.len(), edu, port)?;
        Ok(Parts {
            memory: EduMemory::new(device),
            origin,
            engine: Some(LockedEngine::new(engine, locks)),
            table,
            queue,
        })
    }
}

fn unit_frames(frame: &Frame, locks: &Arc<FrameLocks>) -> Result<UnitFrames, DeviceError> {
    Ok(UnitFrames::Port(Box::new(UnitPort::new(frame.clone())?), locks.clone()))
}
