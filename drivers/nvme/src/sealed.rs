//! A namespace whose pages are sealed: blocks for `uhmm-driver-block`'s lanes, which seal, check and publish; here they are moved by DMA.
//!
//! ```text
//!   staging --sealed by a lane--> buffers, mapped for DMA --Write--> blocks of 4 KiB behind the header
//! ```
//! A page is copied once more than without seals, and not written over the one before: some blocks are spare. Whoever takes the medium out, or drives
//! another controller of it, sees nothing and can change nothing without being noticed. The table of what lies where is in the vault.
//!
//! A driver that is killed leaves commands in flight; the next one waits for them before it uses a block (`Controller::open`). So no block rests.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use uhmm_driver_block::backend::{Answer, Backend, BlockRequest, Buffers, Clock};
use uhmm_driver_block::engine::{COPY_LIMITS, TABLE_NAME, UNIT_LIMITS};
use uhmm_driver_block::file::open::fitting;
use uhmm_driver_block::lane::{Lane, Shared};
use uhmm_driver_block::machine::{Fault, Limits, PIECE_PAGES};
use uhmm_driver_block::table::{Life, Table};
use uhmm_driver_kit::{DeviceError, Frames, MemoryOrigin, PAGE_BYTES};
use uhmm_ipc::message::Fd;
use uhmm_pci::{DmaMapping, DmaMemory, DmaRight};

use crate::error::NvmeError;
use crate::header::HeaderError;
use crate::namespace::Namespace;
use crate::shell::InFlight;

/// The copy engine's lane. Its buffers (4 MiB) stay mapped for DMA, and so are locked: with the controller's queues they fit into the 8 MiB that the
/// kernel lets a process lock where nobody has said more.
const NVME_COPY_LIMITS: Limits = Limits { depth: 16, writes: 12, ..COPY_LIMITS };

/// Blocks of a namespace as frames.
#[derive(Clone, Debug)]
pub struct Sealed {
    namespace: Namespace,
    shared: Arc<Shared>,
    table: Fd,
    frames: u32,
}

impl Sealed {
    /// Goes on with the table of the last incarnation, if it is of this life of the namespace; else every frame is zero. `frames`: at most so many.
    ///
    /// # Errors
    /// Too small, or out of memory.
    pub fn open(
        namespace: Namespace,
        origin: MemoryOrigin,
        frames: u32,
        kept: Option<Fd>,
    ) -> Result<(Self, MemoryOrigin), DeviceError> {
        let blocks = namespace.frame_count();
        let fitted = fitting(u64::from(blocks), frames);
        let (frames, _) = fitted.ok_or(HeaderError::TooSmall(u64::from(blocks) * PAGE_BYTES))?;
        let content = namespace.content()?.ok_or("The namespace is nobody's: this is a fault of uhmm's")?;
        let life = Life { owner: content.owner, number: content.generation };
        if let (MemoryOrigin::Adopted, Some(fd)) = (origin, kept)
            && let Some(table) = Table::adopt(&fd, frames, blocks, true)?
            && table.life()? == life
        {
            match Shared::open(table) {
                Ok(shared) => {
                    let shared = Arc::new(shared);
                    return Ok((Self { namespace, shared, table: fd, frames }, MemoryOrigin::Adopted));
                }
                Err(error) => tracing::error!(%error, "The frames of the last incarnation are given up"),
            }
        }
        let (table, fd) = Table::create(frames, blocks, life, true)?;
        let shared = Arc::new(Shared::open(table)?);
        Ok((Self { namespace, shared, table: fd, frames }, MemoryOrigin::Created))
    }

    /// Size.
    pub fn frame_count(&self) -> u32 {
        self.frames
    }

    /// Where they lie.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// For the vault.
    pub fn kept(&self) -> (String, Fd) {
        (TABLE_NAME.to_owned(), self.table.clone())
    }

    /// The copy engine's lane.
    ///
    /// # Errors
    /// Out of memory or I/O addresses.
    pub fn copy_lane(&self) -> Result<Lane, DeviceError> {
        self.lane(NVME_COPY_LIMITS, PIECE_PAGES)
    }

    /// A compute unit's lane.
    ///
    /// # Errors
    /// Out of memory or I/O addresses.
    pub fn unit_lane(&self) -> Result<Lane, DeviceError> {
        self.lane(UNIT_LIMITS, 1)
    }

    fn lane(&self, limits: Limits, pages: u32) -> Result<Lane, DeviceError> {
        let len = u64::from(limits.depth) * u64::from(pages) * PAGE_BYTES;
        let memory = DmaMemory::create("uhmm-nvme-sealed", len)?;
        let buffers = Buffers::over(memory.window.clone(), pages);
        let namespace = self.namespace.clone();
        let mut backend = NvmeBackend {
            namespace,
            memory,
            mapping: None,
            buffers: buffers.clone(),
            in_flight: VecDeque::new(),
            refused: Vec::new(),
            clock: Clock::default(),
        };
        backend.map()?;
        Ok(Lane::new(self.shared.clone(), Box::new(backend), buffers, limits))
    }
}

/// A lane's requests as commands.
struct NvmeBackend {
    namespace: Namespace,
    memory: DmaMemory,
    /// `None`: taken away from a controller that died.
    mapping: Option<DmaMapping>,
    buffers: Buffers,
    in_flight: VecDeque<(u64, InFlight)>,
    refused: Vec<(u64, Answer)>,
    clock: Clock,
}

impl NvmeBackend {
    /// Where the device finds the buffers.
    fn map(&mut self) -> Result<u64, NvmeError> {
        if self.mapping.is_none() {
            let device = self.namespace.controller().device();
            self.mapping = Some(device.map_dma(&self.memory, DmaRight::ReadWrite, u64::MAX)?);
        }
        Ok(self.mapping.as_ref().ok_or(NvmeError::Bounds)?.iova(0))
    }

    fn start(&mut self, request: BlockRequest) -> Result<InFlight, NvmeError> {
        let iova = self.map()? + self.buffers.at(request.slot, 0);
        let blocks = Frames { first: request.blocks.first, count: request.blocks.count };
        if request.write { self.namespace.start_write(blocks, iova) } else { self.namespace.start_read(blocks, iova) }
    }

    fn failed(&mut self, error: &NvmeError) -> Answer {
        // Nobody knows what a dead controller still moves: it reaches nothing of ours before this is told.
        if self.namespace.controller().is_dead() {
            self.mapping = None;
        }
        Answer::Failed(Fault::Refused(uhmm_kernel_hook::error::chain(error)))
    }
}

impl Backend for NvmeBackend {
    fn submit(&mut self, request: BlockRequest) {
        match self.start(request) {
            Ok(started) => self.in_flight.push_back((request.id, started)),
            Err(error) => {
                let answer = self.failed(&error);
                self.refused.push((request.id, answer));
            }
        }
    }

    /// The controller's own deadlines and retries bound the wait for each.
    fn wait(&mut self, patience: Duration, answers: &mut Vec<(u64, Answer)>) {
        if !self.refused.is_empty() {
            return answers.append(&mut self.refused);
        }
        match self.in_flight.pop_front() {
            Some((id, started)) => {
                let answer = started.finish().map_or_else(|error| self.failed(&error), |()| Answer::Done);
                answers.push((id, answer));
            }
            // The machine waits for a moment, not for an answer.
            None => std::thread::sleep(patience),
        }
    }

    fn now_us(&self) -> u64 {
        self.clock.now_us()
    }
}
