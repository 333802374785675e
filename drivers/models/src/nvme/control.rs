//! The test's hand on the model: what it does wrong, how slow it is, what it has seen.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::faults::{Fault, FaultPlan};

const INTERNAL_ERROR: u16 = 0x06;

/// What one I/O command meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NvmeFault {
    /// It fails with this status (type << 8 | code, bit 14: do not retry).
    Status(u16),
    /// It is carried out, and nobody is told.
    DropCompletion,
    /// It and everything behind it in its queue is never looked at, until the controller is reset.
    StuckQueue,
    /// Its completion has the id of no command.
    WrongId,
    /// Its completion comes twice.
    DoubleCompletion,
    /// The controller gives up: CSTS.CFS.
    Fatal,
    /// Its data goes to (or comes from) an address that nobody mapped.
    WildAddress,
    /// The device is pulled out.
    Removal,
}

impl From<Fault> for NvmeFault {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::CommandError => Self::Status(INTERNAL_ERROR),
            Fault::DropCompletion => Self::DropCompletion,
            Fault::StuckQueue => Self::StuckQueue,
            Fault::CorruptId => Self::WrongId,
            Fault::Removal => Self::Removal,
            Fault::StrayDma => Self::WildAddress,
        }
    }
}

/// What the model has seen since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NvmeCounters {
    /// Times it was enabled.
    pub enables: u64,
    /// Function-level resets.
    pub function_resets: u64,
    /// I/O commands fetched.
    pub io_commands: u64,
    /// Commands that read or wrote blocks with data.
    pub transfers: u64,
    /// Flushes.
    pub flushes: u64,
    /// Write Zeroes.
    pub zeroings: u64,
    /// Aborts.
    pub aborts: u64,
    /// DMA that the IOMMU refused.
    pub dma_faults: u64,
    /// Doorbells with a value that cannot be, or that stood there already.
    pub bad_doorbells: u64,
}

#[derive(Debug, Default)]
pub(super) struct Orders {
    faults: FaultPlan<NvmeFault>,
    pub(super) latency: Duration,
    pub(super) vanished: bool,
    pub(super) stubborn: bool,
    pub(super) seen: NvmeCounters,
}

impl Orders {
    /// What the I/O command that was fetched now meets.
    pub(super) fn next_fault(&mut self) -> Option<NvmeFault> {
        self.seen.io_commands += 1;
        self.faults.next_command()
    }
}

/// Cheap to clone; all clones are one model's.
#[derive(Clone, Debug, Default)]
pub struct NvmeControl {
    orders: Arc<Mutex<Orders>>,
}

impl NvmeControl {
    /// As [`FaultPlan::inject`], in I/O commands.
    pub fn inject(&self, nth: u64, fault: NvmeFault) {
        self.orders().faults.inject(nth, fault);
    }

    /// I/O commands take at least so long.
    pub fn set_latency(&self, latency: Duration) {
        self.orders().latency = latency;
    }

    /// From now on every register reads as all ones and nothing moves, as after a surprise removal.
    pub fn vanish(&self) {
        self.orders().vanished = true;
    }

    /// CC.EN = 0 has no effect until a function-level reset.
    pub fn set_stubborn(&self) {
        self.orders().stubborn = true;
    }

    /// So far.
    pub fn counters(&self) -> NvmeCounters {
        self.orders().seen
    }

    pub(super) fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
