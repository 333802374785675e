//! The driver service `file`.

use std::sync::Arc;

use uhmm_compute::{FrameLocks, Kernel, LockedEngine, UnitFrames, Workers, kernels};
use uhmm_driver_kit::{
    DeviceError, Driver, DriverError, DriverParts, KernelSpec, MemoryOrigin, OpenContext, PAGE_BYTES, Parts,
    ServiceArgs, SharedTable, run_driver,
};
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::DiskMode;

use crate::backend::Buffers;
use crate::engine::{
    BlockEngine, BlockMemory, BlockPort, COPY_LIMITS, FILE_NAME, Hold, TABLE_NAME, UNIT_LIMITS, UNIT_PATIENCE,
};
use crate::file::FileBackend;
use crate::file::open::Medium;
use crate::lane::{Lane, Shared};
use crate::machine::{Limits, PIECE_PAGES};
use crate::table::{Life, Table};

/// A file or a partition as device memory, with compute units in software.
#[derive(Debug)]
pub struct FileDriver {
    kernels: Arc<[Kernel]>,
}

impl Default for FileDriver {
    fn default() -> Self {
        Self { kernels: kernels::all().into() }
    }
}

/// `uhmm driver file`: runs until told to stop.
///
/// # Errors
/// When the service cannot go on; the supervisor starts the next incarnation.
pub fn run(args: ServiceArgs) -> Result<(), DriverError> {
    run_driver(args, FileDriver::default())
}

/// What frames are on, and what the vault knows of them.
#[derive(Debug)]
pub struct Taken {
    /// File or partition.
    pub medium: Medium,
    /// Frames, blocks, seal.
    pub shared: Arc<Shared>,
    /// The table's memory.
    pub table: Fd,
    /// Which life it is in.
    pub life: Life,
    /// Whether that began before.
    pub origin: MemoryOrigin,
}

/// Goes on with what the last incarnation kept, or begins a new life. Frames of an earlier life are worth nothing, and unreadable where they were sealed.
///
/// # Errors
/// The medium is refused.
pub fn take(
    path: &std::path::Path,
    memory_bytes: u64,
    format: bool,
    sealed: bool,
    kept: &[(String, Fd)],
) -> Result<Taken, DeviceError> {
    let named = |wanted: &str| kept.iter().find(|(name, _)| name == wanted).map(|(_, fd)| fd.clone());
    let mut medium = Medium::open(path, memory_bytes, format, named(FILE_NAME))?;
    if let Some(fd) = named(TABLE_NAME)
        && let Some(table) = Table::adopt(&fd, medium.frames, medium.blocks, sealed)?
        && medium.is_of(table.life()?)
        // Without seals nobody would notice that pages behind the old end are zeroes now.
        && (sealed || !medium.was_short)
    {
        let life = table.life()?;
        match Shared::open(table) {
            Ok(shared) => {
                let (shared, origin) = (Arc::new(shared), MemoryOrigin::Adopted);
                return Ok(Taken { medium, shared, table: fd, life, origin });
            }
            Err(error) => tracing::error!(%error, "The frames of the last incarnation are given up"),
        }
    } else if named(TABLE_NAME).is_some() {
        tracing::error!(path = %path.display(), "It is not what the last incarnation left there: the frames are given up");
    }
    let life = Life::draw()?;
    let (table, fd) = Table::create(medium.frames, medium.blocks, life, sealed)?;
    medium.begin(life)?;
    let shared = Arc::new(Shared::open(table)?);
    Ok(Taken { medium, shared, table: fd, life, origin: MemoryOrigin::Created })
}

impl Taken {
    /// A lane with requests of at most `pages`.
    ///
    /// # Errors
    /// Out of memory or threads.
    pub fn lane(&self, limits: Limits, pages: u32, mode: DiskMode) -> Result<(Lane, &'static str), DeviceError> {
        let buffers = Buffers::new(limits.depth, pages)?;
        let backend = FileBackend::new(&self.medium, limits.depth, buffers.clone(), mode)?;
        let way = backend.describe();
        Ok((Lane::new(self.shared.clone(), Box::new(backend), buffers, limits), way))
    }
}

impl Hold for Medium {
    fn kept(&self) -> Vec<(String, Fd)> {
        vec![(FILE_NAME.to_owned(), self.file.clone())]
    }

    fn give_back(&mut self, life: Life) -> Result<(), DeviceError> {
        Ok(Medium::give_back(self, life)?)
    }
}

impl Driver for FileDriver {
    type Memory = BlockMemory;
    type Engine = LockedEngine<BlockEngine>;
    type Table = SharedTable;
    type Queue = Workers;

    fn name(&self) -> &'static str {
        "file"
    }

    fn kernels(&self) -> Vec<KernelSpec> {
        self.kernels.iter().map(Kernel::spec).collect()
    }

    fn open(&mut self, context: OpenContext<'_>) -> Result<DriverParts<Self>, DeviceError> {
        let OpenContext { plan, kept, port } = context;
        let path = plan.path.as_deref().ok_or("Say which file: path = \"/var/lib/uhmm/far0\" in its [[device]]")?;
        let taken = take(path, plan.memory_bytes, plan.format, plan.seal.is_sealed(), &kept)?;
        let (lane, way) = taken.lane(COPY_LIMITS, PIECE_PAGES, DiskMode::Auto)?;
        tracing::info!(
            path = %path.display(), bytes = u64::from(taken.medium.frames) * PAGE_BYTES, way, seal = ?plan.seal, origin = ?taken.origin,
            "Far memory is open"
        );
        let units = plan.workers.max(1);
        let table = SharedTable::create(units, false)?;
        let locks = Arc::new(FrameLocks::default());
        let unit_frames = (0..units)
            .map(|_| {
                let (lane, _) = taken.lane(UNIT_LIMITS, 1, DiskMode::Auto)?;
                Ok(UnitFrames::Port(Box::new(BlockPort::new(lane, UNIT_PATIENCE)?), locks.clone()))
            })
            .collect::<Result<_, DeviceError>>()?;
        let queue = Workers::start(&table, &port, &self.kernels, unit_frames)?;
        let engine = LockedEngine::new(BlockEngine::new(lane), locks);
        let Taken { medium, table: kept, life, origin, .. } = taken;
        let frames = medium.frames;
        Ok(Parts {
            memory: BlockMemory::new(Box::new(medium), frames, kept, life),
            origin,
            engine: Some(engine),
            table,
            queue,
        })
    }
}
