//! The kit's parts: device memory without an aperture, a copy engine that does DMA straight between staging areas and the
//! namespace, and the compute units' way to a frame.
//!
//! A staging area is mapped for DMA once a session with the pager. If the controller dies under a request, nobody knows whether it still
//! moves data: its access to the areas is taken away before the failure is told, and given back when the controller works again.

use std::collections::VecDeque;

use uhmm_compute::FramePort;
use uhmm_driver_bar::memory::BarMemory;
use uhmm_driver_block::engine::BlockEngine;
use uhmm_driver_kit::{
    CopyEngine, CopyOp, CopyWork, DeviceError, DeviceMemory, Frames, PAGE_BYTES, StagedCopy, Staging, StagingUse,
};
use uhmm_ipc::message::{Aperture, Fd};
use uhmm_kernel_hook::Window;
use uhmm_kernel_hook::error::chain;
use uhmm_pci::{DmaMapping, DmaMemory, DmaRight, RemovalWatch};

use crate::error::NvmeError;
use crate::namespace::Namespace;
use crate::sealed::Sealed;
use crate::shell::InFlight;

/// Copies in flight: two of 2 MiB fill a queue of 32 commands of 128 KiB.
const COPIES_MAX: usize = 4;

/// What the frames are, and the watch for the device's removal, which lives as long.
#[derive(Debug)]
pub struct NvmeMemory {
    frames: MemoryFrames,
    _removal: Option<RemovalWatch>,
}

#[derive(Debug)]
enum MemoryFrames {
    Namespace(Namespace),
    Sealed(Sealed),
    Buffer(BarMemory),
}

impl NvmeMemory {
    /// A namespace.
    pub fn new(namespace: Namespace, removal: Option<RemovalWatch>) -> Self {
        Self { frames: MemoryFrames::Namespace(namespace), _removal: removal }
    }

    /// A namespace whose pages are sealed.
    pub fn sealed(sealed: Sealed, removal: Option<RemovalWatch>) -> Self {
        Self { frames: MemoryFrames::Sealed(sealed), _removal: removal }
    }

    /// The controller's memory buffer.
    pub fn buffer(memory: BarMemory, removal: Option<RemovalWatch>) -> Self {
        Self { frames: MemoryFrames::Buffer(memory), _removal: removal }
    }
}

impl DeviceMemory for NvmeMemory {
    fn frame_count(&self) -> u32 {
        match &self.frames {
            MemoryFrames::Namespace(namespace) => namespace.frame_count(),
            MemoryFrames::Sealed(sealed) => sealed.frame_count(),
            MemoryFrames::Buffer(memory) => memory.frame_count(),
        }
    }

    fn aperture(&self) -> Option<Aperture> {
        match &self.frames {
            MemoryFrames::Namespace(_) | MemoryFrames::Sealed(_) => None,
            MemoryFrames::Buffer(memory) => memory.aperture(),
        }
    }

    fn kept(&self) -> Vec<(String, Fd)> {
        match &self.frames {
            MemoryFrames::Namespace(namespace) => {
                let controller = namespace.controller();
                std::iter::once(controller.kept()).chain(controller.device().kept()).collect()
            }
            MemoryFrames::Sealed(sealed) => {
                let controller = sealed.namespace().controller();
                [controller.kept(), sealed.kept()].into_iter().chain(controller.device().kept()).collect()
            }
            MemoryFrames::Buffer(memory) => memory.kept(),
        }
    }

    /// A buffer is as empty after a power cycle as before its first use: nothing is noted in it that outlives the vault.
    fn give_back(&mut self) -> Result<(), DeviceError> {
        match &self.frames {
            MemoryFrames::Namespace(namespace) => namespace.release().map_err(|error| chain(&error).into()),
            MemoryFrames::Sealed(sealed) => sealed.namespace().release().map_err(|error| chain(&error).into()),
            MemoryFrames::Buffer(_) => Ok(()),
        }
    }
}

/// A staging area as the device sees it.
#[derive(Debug)]
struct Area {
    used_by: StagingUse,
    memory: DmaMemory,
    /// `None`: taken away from a controller that died.
    mapping: Option<DmaMapping>,
}

/// See the module head.
#[derive(Debug)]
pub struct NvmeEngine {
    namespace: Namespace,
    areas: Vec<Area>,
}

impl NvmeEngine {
    /// Works on this namespace.
    pub fn new(namespace: Namespace) -> Self {
        Self { namespace, areas: Vec::new() }
    }

    /// Where the device finds a staging page.
    fn iova(&mut self, staging: &Staging, page: u32) -> Result<u64, NvmeError> {
        let device = self.namespace.controller().device();
        let area = self.areas.iter_mut().find(|area| area.used_by == staging.used_by).ok_or(NvmeError::Bounds)?;
        if area.mapping.is_none() {
            area.mapping = Some(device.map_dma(&area.memory, DmaRight::ReadWrite, u64::MAX)?);
        }
        let mapping = area.mapping.as_ref().ok_or(NvmeError::Bounds)?;
        Ok(mapping.iova(u64::from(page) * PAGE_BYTES))
    }

    /// `None`: it is over already.
    fn start(&mut self, staging: &Staging, copy: StagedCopy) -> Result<Option<InFlight>, NvmeError> {
        if copy.op == CopyOp::Scrub {
            return self.namespace.zero(copy.frames).map(|()| None);
        }
        let iova = self.iova(staging, copy.staging_page)?;
        let started = match copy.op {
            CopyOp::CopyIn => self.namespace.start_write(copy.frames, iova),
            _ => self.namespace.start_read(copy.frames, iova),
        };
        started.map(Some)
    }

    /// One that nobody else waits for.
    fn run(&mut self, staging: &Staging, copy: StagedCopy) -> Result<(), DeviceError> {
        let outcome = self.start(staging, copy).and_then(finished);
        self.ended(outcome)
    }

    /// What the pager is told must be true afterwards too.
    fn ended(&mut self, outcome: Result<(), NvmeError>) -> Result<(), DeviceError> {
        if outcome.is_err() && self.namespace.controller().is_dead() {
            self.areas.iter_mut().for_each(|area| area.mapping = None);
        }
        outcome.map_err(|error| chain(&error).into())
    }
}

/// Waits for what was started.
fn finished(started: Option<InFlight>) -> Result<(), NvmeError> {
    started.map_or(Ok(()), InFlight::finish)
}

impl CopyEngine for NvmeEngine {
    fn attach(&mut self, staging: &Staging) -> Result<(), DeviceError> {
        self.areas.retain(|area| area.used_by != staging.used_by);
        let memory = DmaMemory { fd: staging.fd.clone(), offset_bytes: 0, window: staging.window.clone() };
        let device = self.namespace.controller().device();
        let mapping = Some(device.map_dma(&memory, DmaRight::ReadWrite, u64::MAX)?);
        self.areas.push(Area { used_by: staging.used_by, memory, mapping });
        Ok(())
    }

    fn copy_in(&mut self, staging: &Staging, staging_page: u32, frames: Frames) -> Result<(), DeviceError> {
        self.run(staging, StagedCopy { ticket: 0, op: CopyOp::CopyIn, frames, staging_page })
    }

    fn copy_out(&mut self, frames: Frames, staging: &Staging, staging_page: u32) -> Result<(), DeviceError> {
        self.run(staging, StagedCopy { ticket: 0, op: CopyOp::CopyOut, frames, staging_page })
    }

    fn scrub(&mut self, frames: Frames) -> Result<(), DeviceError> {
        let outcome = self.namespace.zero(frames);
        self.ended(outcome)
    }

    /// The next copies are in the queues before the first one has ended.
    fn serve(&mut self, staging: &Staging, work: &mut dyn CopyWork) {
        let mut in_flight = VecDeque::new();
        loop {
            while in_flight.len() < COPIES_MAX
                && let Some(copy) = work.next()
            {
                match self.start(staging, copy) {
                    Ok(started) => in_flight.push_back((copy, started)),
                    Err(error) => work.done(copy, self.ended(Err(error))),
                }
            }
            let Some((copy, started)) = in_flight.pop_front() else { return };
            let outcome = finished(started);
            work.done(copy, self.ended(outcome));
        }
    }
}

/// Either way of copying.
#[derive(Debug)]
pub enum AnyEngine {
    /// Straight.
    Open(NvmeEngine),
    /// Sealed.
    Sealed(Box<BlockEngine>),
}

impl AnyEngine {
    fn engine(&mut self) -> &mut dyn CopyEngine {
        match self {
            Self::Open(engine) => engine,
            Self::Sealed(engine) => &mut **engine,
        }
    }
}

impl CopyEngine for AnyEngine {
    fn attach(&mut self, staging: &Staging) -> Result<(), DeviceError> {
        self.engine().attach(staging)
    }

    fn copy_in(&mut self, staging: &Staging, staging_page: u32, frames: Frames) -> Result<(), DeviceError> {
        self.engine().copy_in(staging, staging_page, frames)
    }

    fn copy_out(&mut self, frames: Frames, staging: &Staging, staging_page: u32) -> Result<(), DeviceError> {
        self.engine().copy_out(frames, staging, staging_page)
    }

    fn scrub(&mut self, frames: Frames) -> Result<(), DeviceError> {
        self.engine().scrub(frames)
    }

    fn serve(&mut self, staging: &Staging, work: &mut dyn CopyWork) {
        self.engine().serve(staging, work);
    }
}

/// A compute unit's page, mapped for the device. Whole frames always: a frame is one to eight blocks.
#[derive(Debug)]
pub struct NvmePort {
    namespace: Namespace,
    page: DmaMapping,
}

impl NvmePort {
    /// With a new page.
    ///
    /// # Errors
    /// Out of memory, descriptors or I/O addresses.
    pub fn new(namespace: Namespace) -> Result<Self, NvmeError> {
        let page = DmaMemory::create("uhmm-nvme-unit", PAGE_BYTES)?;
        let page = namespace.controller().device().map_dma(&page, DmaRight::ReadWrite, u64::MAX)?;
        Ok(Self { namespace, page })
    }
}

impl FramePort for NvmePort {
    fn page(&self) -> &Window {
        self.page.window()
    }

    fn load(&mut self, frame: u32, _part: std::ops::Range<u64>) -> Result<(), DeviceError> {
        let done = self.namespace.read(Frames { first: frame, count: 1 }, self.page.iova(0));
        done.map_err(|error| chain(&error).into())
    }

    fn store(&mut self, frame: u32, _part: std::ops::Range<u64>) -> Result<(), DeviceError> {
        let done = self.namespace.write(Frames { first: frame, count: 1 }, self.page.iova(0));
        done.map_err(|error| chain(&error).into())
    }
}
