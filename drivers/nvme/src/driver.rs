//! The driver service.

use std::sync::Arc;

use uhmm_compute::{FrameLocks, Kernel, LockedEngine, UnitFrames, Workers, kernels};
use uhmm_driver_block::engine::{BlockEngine, BlockPort, TABLE_NAME, UNIT_PATIENCE};
use uhmm_driver_block::file::open::shape;
use uhmm_driver_kit::{
    DeviceError, DevicePort, Driver, DriverError, DriverParts, KernelSpec, MemoryOrigin, OpenContext, PAGE_BYTES,
    Parts, ServiceArgs, SharedTable, run_driver,
};

use uhmm_ipc::message::Fd;
use uhmm_pci::{PciDevice, RemovalWatch};

use crate::cmb;
use crate::engine::{AnyEngine, NvmeEngine, NvmeMemory, NvmePort};
use crate::error::NvmeError;
use crate::namespace::Namespace;
use crate::sealed::Sealed;
use crate::shell::{Controller, DMA_NAME, Options};

/// A namespace as device memory, with compute units in software.
#[derive(Debug)]
pub struct NvmeDriver {
    kernels: Arc<[Kernel]>,
}

impl Default for NvmeDriver {
    fn default() -> Self {
        Self { kernels: kernels::all().into() }
    }
}

/// `uhmm driver nvme`: runs until told to stop.
///
/// # Errors
/// When the service cannot go on; the supervisor starts the next incarnation.
pub fn run(args: ServiceArgs) -> Result<(), DriverError> {
    run_driver(args, NvmeDriver::default())
}

impl Driver for NvmeDriver {
    type Memory = NvmeMemory;
    type Engine = LockedEngine<AnyEngine>;
    type Table = SharedTable;
    type Queue = Workers;

    fn name(&self) -> &'static str {
        "nvme"
    }

    fn kernels(&self) -> Vec<KernelSpec> {
        self.kernels.iter().map(Kernel::spec).collect()
    }

    fn open(&mut self, context: OpenContext<'_>) -> Result<DriverParts<Self>, DeviceError> {
        let OpenContext { plan, kept, port } = context;
        let path = plan.pci.as_ref().ok_or("Say which controller: pci = \"0000:00:05.0\" in its [[device]]")?;
        let device = uhmm_pci::open(path, &kept)?;
        let lost = port.clone();
        let removal = device.watch_removal(move |reason| lost.lost(reason))?;
        if plan.cmb {
            return self.open_buffer(device, &kept, &OpenContext { plan, kept: Vec::new(), port }, removal);
        }
        let named = |wanted: &str| kept.iter().find(|(name, _)| name == wanted).map(|(_, fd)| fd.clone());
        let (memory, kept_table) = (named(DMA_NAME), named(TABLE_NAME));
        let controller = Controller::open(device, memory, Options::default())?;
        if let Some(identity) = controller.identity() {
            tracing::info!(
                device = %controller.device().describe(), model = %identity.controller.model, serial = %identity.controller.serial,
                bytes = identity.namespace.len_bytes(), block_bytes = 1_u64 << identity.namespace.block_shift,
                pairs = controller.pairs(), adopted = controller.is_adopted(), "Controller runs"
            );
        }
        let units = plan.workers.max(1);
        if plan.seal.is_sealed() {
            let (most, blocks) = shape(plan.memory_bytes);
            let (namespace, origin) = Namespace::open(controller, u64::from(blocks) * PAGE_BYTES, plan.format)?;
            let (sealed, origin) = Sealed::open(namespace, origin, most, kept_table)?;
            return self.open_sealed(sealed, origin, units, &port, removal);
        }
        let (namespace, origin) = Namespace::open(controller, plan.memory_bytes, plan.format)?;
        let table = SharedTable::create(units, false)?;
        let locks = Arc::new(FrameLocks::default());
        let frames = (0..units)
            .map(|_| Ok(UnitFrames::Port(Box::new(NvmePort::new(namespace.clone())?), locks.clone())))
            .collect::<Result<_, NvmeError>>()?;
        let queue = Workers::start(&table, &port, &self.kernels, frames)?;
        let engine = LockedEngine::new(AnyEngine::Open(NvmeEngine::new(namespace.clone())), locks);
        Ok(Parts { memory: NvmeMemory::new(namespace, Some(removal)), origin, engine: Some(engine), table, queue })
    }
}

impl NvmeDriver {
    /// Unless `seal = "none"`: pages pass through the block driver's lanes.
    fn open_sealed(
        &self,
        sealed: Sealed,
        origin: MemoryOrigin,
        units: u32,
        port: &DevicePort,
        removal: RemovalWatch,
    ) -> Result<DriverParts<Self>, DeviceError> {
        let table = SharedTable::create(units, false)?;
        let locks = Arc::new(FrameLocks::default());
        let frames = (0..units)
            .map(|_| Ok(UnitFrames::Port(Box::new(BlockPort::new(sealed.unit_lane()?, UNIT_PATIENCE)?), locks.clone())))
            .collect::<Result<_, DeviceError>>()?;
        let queue = Workers::start(&table, port, &self.kernels, frames)?;
        let engine = AnyEngine::Sealed(Box::new(BlockEngine::new(sealed.copy_lane()?)));
        let engine = Some(LockedEngine::new(engine, locks));
        Ok(Parts { memory: NvmeMemory::sealed(sealed, Some(removal)), origin, engine, table, queue })
    }

    /// `cmb = true`: everybody sees the memory, so nothing is copied by the device.
    fn open_buffer(
        &self,
        device: PciDevice,
        kept: &[(String, Fd)],
        context: &OpenContext<'_>,
        removal: RemovalWatch,
    ) -> Result<DriverParts<Self>, DeviceError> {
        let OpenContext { plan, port, .. } = context;
        let (memory, origin) = cmb::open(device, kept, plan.memory_bytes)?;
        let units = plan.workers.max(1);
        let table = SharedTable::create(units, true)?;
        let frames = (0..units).map(|_| UnitFrames::Window(memory.window())).collect();
        let queue = Workers::start(&table, port, &self.kernels, frames)?;
        Ok(Parts { memory: NvmeMemory::buffer(memory, Some(removal)), origin, engine: None, table, queue })
    }
}
