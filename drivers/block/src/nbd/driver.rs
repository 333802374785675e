//! The driver service `nbd`.

use std::sync::Arc;
use std::time::Duration;

use uhmm_compute::{FrameLocks, Kernel, LockedEngine, UnitFrames, Workers, kernels};
use uhmm_driver_kit::{
    DeviceError, Driver, DriverError, DriverParts, Each, KernelSpec, MetricKind, OpenContext, PAGE_BYTES, Parts,
    ServiceArgs, SharedTable, run_driver,
};
use uhmm_ipc::message::Fd;

use super::NbdBackend;
use super::client::Client;
use super::fill::Filler;
use super::medium::{Exports, Keeper, Wanted, take};
use crate::backend::Buffers;
use crate::engine::{BlockEngine, BlockMemory, BlockPort, COPY_LIMITS, Hold, TABLE_NAME, UNIT_LIMITS};
use crate::lane::Lane;
use crate::machine::Limits;
use crate::table::Life;

/// A write that a server does not take in this time stays at home.
const WRITE_DEADLINE: Duration = Duration::from_secs(20);
/// A read waits longer than its server may be away.
const READ_GRACE: Duration = Duration::from_secs(30);

/// Block servers as device memory, with compute units in software.
#[derive(Debug)]
pub struct NbdDriver {
    kernels: Arc<[Kernel]>,
}

impl Default for NbdDriver {
    fn default() -> Self {
        Self { kernels: kernels::all().into() }
    }
}

/// `uhmm driver nbd`: runs until told to stop.
///
/// # Errors
/// When the service cannot go on; the supervisor starts the next incarnation.
pub fn run(args: ServiceArgs) -> Result<(), DriverError> {
    run_driver(args, NbdDriver::default())
}

impl Exports {
    /// A lane with requests of at most `pages`.
    ///
    /// # Errors
    /// Out of memory.
    pub fn lane(&self, limits: Limits, pages: u32) -> Result<Lane, DeviceError> {
        let buffers = Buffers::new(limits.depth, pages)?;
        let backend = NbdBackend::new(self, buffers.clone());
        Ok(Lane::new(self.shared.clone(), Box::new(backend), buffers, limits).with_pieces(pages))
    }
}

/// Ends before the servers' connections do.
#[derive(Debug)]
struct Remote {
    keeper: Keeper,
    filler: Option<Filler>,
    clients: Arc<Vec<Client>>,
}

impl Hold for Remote {
    fn kept(&self) -> Vec<(String, Fd)> {
        self.keeper.kept()
    }

    fn give_back(&mut self, life: Life) -> Result<(), DeviceError> {
        self.filler = None;
        self.keeper.give_back(life)
    }

    fn tell(&self, each: &mut Each<'_>) {
        let away = self.clients.iter().filter(|client| !client.is_up()).count() as u64;
        each(format_args!("servers"), MetricKind::Gauge, self.clients.len() as u64);
        each(format_args!("servers_away"), MetricKind::Gauge, away);
        let behind = self.filler.as_ref().map_or(0, Filler::behind_pages);
        each(format_args!("behind_pages"), MetricKind::Gauge, behind);
    }
}

impl Driver for NbdDriver {
    type Memory = BlockMemory;
    type Engine = LockedEngine<BlockEngine>;
    type Table = SharedTable;
    type Queue = Workers;

    fn name(&self) -> &'static str {
        "nbd"
    }

    fn kernels(&self) -> Vec<KernelSpec> {
        self.kernels.iter().map(Kernel::spec).collect()
    }

    fn open(&mut self, context: OpenContext<'_>) -> Result<DriverParts<Self>, DeviceError> {
        let OpenContext { plan, kept, port } = context;
        let remote = plan.remote.as_ref();
        let remote = remote.ok_or("Say which block server: url = \"nbd://192.0.2.7/export\" in its [[device]]")?;
        let table = kept.into_iter().find(|(name, _)| name == TABLE_NAME).map(|(_, fd)| fd);
        let exports = take(&Wanted {
            plan: remote,
            memory_bytes: plan.memory_bytes,
            format: plan.format,
            sealed: plan.seal.is_sealed(),
            kept: table,
            port: port.clone(),
        })?;
        let frames = exports.shared.table().frames();
        let blocks = exports.shared.table().blocks();
        tracing::info!(
            urls = ?remote.urls.iter().map(ToString::to_string).collect::<Vec<_>>(), bytes = u64::from(frames) * PAGE_BYTES, blocks,
            seal = ?plan.seal, fua = exports.fua, origin = ?exports.origin, "Far memory is open"
        );
        let patience = Duration::from_secs(u64::from(remote.patience_s)) + READ_GRACE;
        let limits = Limits {
            deadline_us: patience.as_micros() as u64,
            write_deadline_us: WRITE_DEADLINE.as_micros() as u64,
            ..COPY_LIMITS
        };
        let lane = exports.lane(limits, exports.pages)?;
        let units = plan.workers.max(1);
        let table = SharedTable::create(units, false)?;
        let locks = Arc::new(FrameLocks::default());
        let unit_frames = (0..units)
            .map(|_| {
                let lane = exports.lane(UNIT_LIMITS, 1)?;
                Ok(UnitFrames::Port(Box::new(BlockPort::new(lane, patience)?), locks.clone()))
            })
            .collect::<Result<_, DeviceError>>()?;
        let queue = Workers::start(&table, &port, &self.kernels, unit_frames)?;
        let engine = LockedEngine::new(BlockEngine::new(lane), locks);
        let held = Remote {
            keeper: Keeper::start(&exports, port)?,
            filler: Filler::start(&exports)?,
            clients: exports.clients.clone(),
        };
        let Exports { table: kept, life, origin, .. } = exports;
        Ok(Parts {
            memory: BlockMemory::new(Box::new(held), frames, kept, life),
            origin,
            engine: Some(engine),
            table,
            queue,
        })
    }
}
