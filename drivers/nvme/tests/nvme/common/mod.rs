//! Driver and model in one process, and a way to die in the middle of things.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use uhmm_driver_kit::{MemoryOrigin, Staging, StagingUse};
use uhmm_driver_nvme::engine::NvmeEngine;
use uhmm_driver_nvme::error::NvmeError;
use uhmm_driver_nvme::namespace::Namespace;
use uhmm_driver_nvme::shell::{Controller, Options};
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::EventFd;
use uhmm_models::nvme::{NvmeControl, NvmeModel, NvmeOptions};
use uhmm_models::{Machine, ModelBackend};
use uhmm_pci::{
    DmaMemory, DmaRight, InterruptKind, IovaRange, PciBackend, PciDevice, PciError, RegionIndex, RegionInfo,
};

pub type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Short, so that tests of lateness are; long enough for a machine that does other things too.
pub fn options() -> Options {
    let ms = Duration::from_millis;
    Options { io_timeout: ms(300), admin_timeout: ms(2000), ..Options::default() }
}

/// A model in a machine.
pub struct Bench {
    pub machine: Machine,
    pub control: NvmeControl,
    pub blocks: Fd,
}

/// A driver that can be killed.
pub struct Driver {
    pub controller: Controller,
    pub kept: Fd,
    fuse: Arc<AtomicU64>,
}

impl Bench {
    pub fn new(options: NvmeOptions) -> Result<Self, AnyError> {
        let (model, control) = NvmeModel::new(options)?;
        let blocks = model.blocks();
        Ok(Self { machine: Machine::start(Box::new(model))?, control, blocks })
    }

    pub fn driver(&self, kept: Option<Fd>) -> Result<Driver, AnyError> {
        self.driver_with(kept, options())
    }

    pub fn driver_with(&self, kept: Option<Fd>, options: Options) -> Result<Driver, AnyError> {
        let fuse = Arc::new(AtomicU64::new(u64::MAX));
        let backend = Mortal { inner: ModelBackend::connect(&self.machine)?, fuse: fuse.clone() };
        let controller = Controller::open(PciDevice::new(Arc::new(backend))?, kept, options)?;
        let kept = controller.kept().1;
        Ok(Driver { controller, kept, fuse })
    }
}

impl Driver {
    pub fn namespace(&self, format: bool) -> Result<(Namespace, MemoryOrigin), NvmeError> {
        Namespace::open(self.controller.clone(), u64::MAX, format)
    }

    /// Runs `work` and dies before the `nth` register store in it, or after it; as by SIGKILL, nothing is cleaned up. Returns what
    /// the vault has, and whether it died within.
    pub fn killed_at<T>(self, bench: &Bench, nth: u64, work: impl FnOnce() -> T) -> (Fd, bool) {
        self.fuse.store(nth, Ordering::SeqCst);
        let died = catch_unwind(AssertUnwindSafe(|| std::mem::forget(work()))).is_err();
        // The lock of a thread that died is as it left it; nobody of this incarnation goes on.
        std::mem::forget(self.controller);
        bench.machine.disconnect();
        (self.kept, died)
    }
}

/// An engine with the pager's staging area.
pub fn engine(namespace: &Namespace, staging_bytes: u64) -> Result<(NvmeEngine, Staging), AnyError> {
    let staging = Staging::create(StagingUse::Pager, staging_bytes)?;
    let mut engine = NvmeEngine::new(namespace.clone());
    uhmm_driver_kit::CopyEngine::attach(&mut engine, &staging)?;
    Ok((engine, staging))
}

/// A way to the model that ends at a chosen store.
#[derive(Debug)]
struct Mortal {
    inner: ModelBackend,
    fuse: Arc<AtomicU64>,
}

impl PciBackend for Mortal {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn is_adopted(&self) -> bool {
        self.inner.is_adopted()
    }

    fn region(&self, region: RegionIndex) -> Option<RegionInfo> {
        self.inner.region(region)
    }

    fn read(&self, region: RegionIndex, offset: u64, bytes: &mut [u8]) -> Result<(), PciError> {
        self.inner.read(region, offset, bytes)
    }

    fn write(&self, region: RegionIndex, offset: u64, bytes: &[u8]) -> Result<(), PciError> {
        if region == RegionIndex::Bar(0) && self.fuse.fetch_sub(1, Ordering::SeqCst) <= 1 {
            self.fuse.store(1, Ordering::SeqCst);
            resume_unwind(Box::new("killed"));
        }
        self.inner.write(region, offset, bytes)
    }

    fn iova_ranges(&self) -> Vec<IovaRange> {
        self.inner.iova_ranges()
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, right: DmaRight) -> Result<(), PciError> {
        self.inner.dma_map(iova, memory, right)
    }

    fn dma_unmap(&self, iova: u64, len_bytes: u64) -> Result<(), PciError> {
        self.inner.dma_unmap(iova, len_bytes)
    }

    fn interrupt_count(&self, kind: InterruptKind) -> u32 {
        self.inner.interrupt_count(kind)
    }

    fn set_interrupts(&self, kind: InterruptKind, events: &[EventFd]) -> Result<(), PciError> {
        self.inner.set_interrupts(kind, events)
    }

    fn reset(&self) -> Result<(), PciError> {
        self.inner.reset()
    }

    fn kept(&self) -> Vec<(String, Fd)> {
        self.inner.kept()
    }
}
