//! The shell around the machine: registers, queue memory, interrupts. One lock; whoever waits for a request may be the one that looks.
//!
//! ```text
//!   thread A -- submit --> lock: machine.step -> commands into slots -> doorbells                        look for a while, then
//!            -- wait ----> lock: entries with the right phase -> machine.step -> finished?  no: A is the one that <-+ sleeps on the eventfds
//!   thread B -- wait ------------------------------------------------------------- no: waits until A says: look again
//! ```
//! Between two looks nobody holds the lock. Registers are read only while setting up and when nothing has happened for a while.

mod wait;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::EventFd;
use uhmm_pci::{Bar, DmaMapping, InterruptKind, PciDevice, PciError};

use crate::book::Book;
use crate::error::NvmeError;
use crate::layout::{Layout, PAGE};
use crate::machine::{Action, Config, Event, Identity, Machine, Phase, Report, Request, RequestError, RequestId};
use crate::protocol::command::COMMAND_BYTES;
use crate::protocol::completion::COMPLETION_BYTES;
use crate::protocol::identify::IDENTIFY_BYTES;
use crate::protocol::registers::{CAP, CC, CC_DISABLED, GONE};
use crate::protocol::{Capabilities, Completion, ControllerStatus, QueueId};
use crate::queue::ENTRIES_MAX;
use crate::shell::wait::Patience;
use crate::start::{Prepared, check, prepare, stop};

/// Vault name of the memory that controller and driver share.
pub const DMA_NAME: &str = "driver/nvme-dma";
/// The controller is told of so many commands at the latest, and begins while the next ones are written.
const RING_EVERY: usize = 8;
/// Ids of one batch.
const BATCH_SHIFT: u32 = 20;

/// How a controller is driven.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Which namespace.
    pub namespace: u32,
    /// Pairs of I/O queues; fewer if the controller has fewer.
    pub pairs: u16,
    /// Entries of each queue; fewer if the controller has fewer.
    pub entries: u16,
    /// When an I/O command is late. A pager waits two seconds for a device that is inside a page.
    pub io_timeout: Duration,
    /// When an admin command is late.
    pub admin_timeout: Duration,
    /// How often a request is sent.
    pub attempts_max: u8,
    /// Resets without one good completion between them.
    pub resets_max: u8,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            namespace: 1,
            pairs: 2,
            entries: 64,
            io_timeout: Duration::from_secs(1),
            admin_timeout: Duration::from_millis(500),
            attempts_max: 3,
            resets_max: 4,
        }
    }
}

/// Counters, for tests and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Times the controller was switched off and on.
    pub resets: u64,
    /// Completions taken.
    pub completions: u64,
    /// Sleeps until an interrupt.
    pub sleeps: u64,
}

/// Several requests, waited for together.
#[derive(Debug)]
struct Batch {
    id: u64,
    /// Of one command.
    single: bool,
    /// Somebody looks for its completions.
    looks: bool,
    open: usize,
    error: Option<RequestError>,
}

#[derive(Debug)]
struct Inner {
    machine: Machine,
    /// Few at a time.
    batches: Vec<Batch>,
    next_batch: u64,
    /// Doorbells to be rung when a look or a submission is through: tail, head of each queue.
    tails: Vec<Option<u16>>,
    heads: Vec<Option<u16>>,
    /// Somebody looks and sleeps for all.
    watched: bool,
    /// An access failed because the device is gone; the machine is told at the next [`Shared::ring`].
    unplugged: bool,
    last_report: Option<Report>,
    counters: Counters,
    /// Threads that wait for somebody else to look.
    waiters: usize,
    /// Of batches of several commands, and of single ones: a bulk copy must not make a program that reads a page wait for an interrupt.
    patience: [Patience; 2],
    /// When the clock was last looked at.
    now: Duration,
    /// When something was completed, or CSTS was read.
    status_at: Duration,
    /// Kept for its room.
    actions: Vec<Action>,
}

impl Inner {
    fn has_open(&self, batch: u64) -> bool {
        self.batches.iter().any(|open| open.id == batch && open.open > 0)
    }

    fn batch(&mut self, id: u64) -> Option<&mut Batch> {
        self.batches.iter_mut().find(|batch| batch.id == id)
    }

    fn take_batch(&mut self, id: u64) -> Option<Batch> {
        let at = self.batches.iter().position(|batch| batch.id == id)?;
        Some(self.batches.swap_remove(at))
    }

    fn patience(&mut self, single: bool) -> &mut Patience {
        &mut self.patience[usize::from(single)]
    }
}

/// See the module head. Clones share one controller.
#[derive(Clone, Debug)]
pub struct Controller {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
    device: PciDevice,
    bar: Bar,
    capabilities: Capabilities,
    layout: Layout,
    memory: DmaMapping,
    events: Vec<EventFd>,
    started: Instant,
    adopted: bool,
}

impl Drop for Shared {
    /// A driver that ends in order leaves nothing that moves. One that is killed leaves everything: see `open`.
    fn drop(&mut self) {
        let book = Book::new(self.memory.window(), self.layout);
        if let Err(error) = book.set_adoptable(0) {
            tracing::error!(%error, "State page cannot be written");
        }
        if let Err(error) = stop(&self.device, &self.bar, self.capabilities) {
            tracing::warn!(%error, "Controller could not be switched off");
        }
    }
}

impl Controller {
    /// Opens the controller, or goes on with it where the last incarnation was killed: `kept` is its memory, from the vault. Returns
    /// when the controller takes requests, and when no command of the last incarnation is in flight any more.
    ///
    /// Until then old DMA mappings stay: what a dead command writes lands in the pages that it was meant for, which the mapping
    /// keeps from becoming anybody else's. After that they are removed, before anything new is mapped. If the controller cannot be adopted it is
    /// switched off first.
    ///
    /// # Errors
    /// The device is not suitable, does not come up or cannot be stopped.
    pub fn open(device: PciDevice, kept: Option<Fd>, options: Options) -> Result<Self, NvmeError> {
        let bar = device.bar(0)?;
        let capabilities = Capabilities(bar.load_u64(CAP)?);
        let vectors = device.interrupt_count(InterruptKind::Msix);
        check(&device, capabilities, vectors)?;
        let layout = Layout {
            entries: options.entries.clamp(4, ENTRIES_MAX).min(capabilities.queue_entries_max().min(1 << 15) as u16),
            pairs: options.pairs.clamp(1, 32).min(vectors as u16 - 1),
        };
        let Prepared { memory, adopted } = prepare(&device, &bar, capabilities, kept, options.namespace, layout)?;
        let events = device.interrupts(InterruptKind::Msix, usize::from(layout.pairs) + 1)?;
        device.allow_dma()?;
        let config = Config {
            capabilities,
            layout,
            iova: memory.iova(0),
            namespace: options.namespace,
            io_timeout: options.io_timeout,
            admin_timeout: options.admin_timeout,
            attempts_max: options.attempts_max.max(1),
            resets_max: options.resets_max,
        };
        let book = Book::new(memory.window(), layout);
        let machine = match adopted {
            Some(pairs) => {
                let queues = (0..=pairs).map(|queue| book.adopt_queue(QueueId(queue))).collect::<Result<_, _>>()?;
                Machine::adopt(config, queues, Duration::ZERO)
            }
            None => Machine::new(config),
        };
        let count = usize::from(layout.pairs) + 1;
        let inner = Inner {
            machine,
            batches: Vec::new(),
            next_batch: 0,
            tails: vec![None; count],
            heads: vec![None; count],
            watched: false,
            unplugged: false,
            last_report: None,
            counters: Counters::default(),
            waiters: 0,
            patience: Default::default(),
            now: Duration::ZERO,
            status_at: Duration::ZERO,
            actions: Vec::new(),
        };
        let shared = Shared {
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            device,
            bar,
            capabilities,
            layout,
            memory,
            events,
            started: Instant::now(),
            adopted: adopted.is_some(),
        };
        let controller = Self { shared: Arc::new(shared) };
        controller.come_up()?;
        if adopted.is_some() {
            controller.shared.device.finish_adoption()?;
        }
        Ok(controller)
    }

    /// Sets the controller up, or waits until an adopted one is drained.
    fn come_up(&self) -> Result<(), NvmeError> {
        let shared = &*self.shared;
        let mut inner = shared.lock();
        shared.step(&mut inner, Event::Start)?;
        loop {
            shared.reap(&mut inner)?;
            match inner.machine.phase() {
                Phase::Running => return Ok(()),
                phase @ (Phase::Dead | Phase::Gone) => {
                    let reason = inner.last_report.as_ref().map(ToString::to_string).unwrap_or_default();
                    return Err(NvmeError::Setup { device: shared.device.describe(), reason, phase });
                }
                _ => {}
            }
            inner = shared.rest(inner)?;
        }
    }

    /// For the vault.
    pub fn kept(&self) -> (String, Fd) {
        (DMA_NAME.to_owned(), self.shared.memory.memory().fd.clone())
    }

    /// The device.
    pub fn device(&self) -> &PciDevice {
        &self.shared.device
    }

    /// The controller went on where a killed driver left it, without a reset (at [`Controller::open`]).
    pub fn is_adopted(&self) -> bool {
        self.shared.adopted
    }

    /// What controller and namespace said.
    pub fn identity(&self) -> Option<Identity> {
        self.shared.lock().machine.identity().cloned()
    }

    /// Pairs of I/O queues in use.
    pub fn pairs(&self) -> u16 {
        self.shared.lock().machine.pairs()
    }

    /// So far.
    pub fn counters(&self) -> Counters {
        self.shared.lock().counters
    }

    /// The last thing that an operator should know.
    pub fn last_report(&self) -> Option<Report> {
        self.shared.lock().last_report.clone()
    }

    /// The memory that the controller shares with us, and how it is divided.
    pub(crate) fn memory(&self) -> (&DmaMapping, Layout) {
        (&self.shared.memory, self.shared.layout)
    }

    /// The controller may be reaching memory although its requests have ended: take it away before somebody else gets it.
    pub fn is_dead(&self) -> bool {
        matches!(self.shared.lock().machine.phase(), Phase::Dead)
    }

    /// Performs all requests, in any order, and returns after the last one has ended. Memory of the requests is mapped, and stays so.
    ///
    /// # Errors
    /// The first one that failed, after all have ended.
    pub fn run(&self, requests: impl IntoIterator<Item = Request>) -> Result<(), NvmeError> {
        self.submit(requests)?.finish()
    }

    /// The same, without waiting.
    ///
    /// # Errors
    /// A register could not be reached.
    pub fn submit(&self, requests: impl IntoIterator<Item = Request>) -> Result<InFlight, NvmeError> {
        let shared = &*self.shared;
        let mut inner = shared.lock();
        shared.look_at_clock(&mut inner);
        if inner.machine.phase() == Phase::Dead {
            shared.step(&mut inner, Event::Start)?;
        }
        let batch = inner.next_batch;
        inner.next_batch += 1;
        let requests = requests.into_iter();
        let single = requests.size_hint().1 == Some(1);
        let looking = inner.patience(single).next_batch();
        inner.batches.push(Batch { id: batch, single, looks: looking, open: 0, error: None });
        let mut submitted = shared.step(&mut inner, Event::Pace { looking });
        for (index, request) in requests.enumerate() {
            if let Some(entry) = inner.batch(batch) {
                entry.open += 1;
            }
            let id = RequestId(batch << BATCH_SHIFT | index as u64 & ((1 << BATCH_SHIFT) - 1));
            submitted = submitted.and(shared.step(&mut inner, Event::Submit { id, request }));
            if index % RING_EVERY == RING_EVERY - 1 {
                submitted = submitted.and(shared.ring(&mut inner));
            }
        }
        let rung = shared.ring(&mut inner);
        // Not before the lock is open: dropping it locks.
        drop(inner);
        let in_flight = InFlight { controller: self.clone(), batch, over: false };
        submitted.and(rung).map(|()| in_flight)
    }
}

/// Requests that were submitted together.
#[derive(Debug)]
#[must_use = "the memory of the requests is the device's until `finish` returns"]
pub struct InFlight {
    controller: Controller,
    batch: u64,
    /// Its result was taken.
    over: bool,
}

impl InFlight {
    /// Returns after the last one has ended.
    ///
    /// # Errors
    /// The first one that failed.
    pub fn finish(mut self) -> Result<(), NvmeError> {
        let shared = &*self.controller.shared;
        let mut inner = shared.wait(shared.lock(), self.batch)?;
        self.over = true;
        let error = inner.take_batch(self.batch).and_then(|batch| batch.error);
        error.map_or(Ok(()), |error| Err(error.into()))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.over {
            self.controller.shared.lock().take_batch(self.batch);
        }
    }
}

/// A device that is gone is no failure of the access: the machine deals with it.
fn reached(access: Result<(), PciError>, unplugged: &mut bool) -> Result<(), PciError> {
    match access {
        Err(PciError::Gone { .. }) => {
            *unplugged = true;
            Ok(())
        }
        other => other,
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One event into the machine, and what it says done. Doorbells wait for [`Shared::ring`].
    fn step(&self, inner: &mut Inner, event: Event<'_>) -> Result<(), NvmeError> {
        let mut actions = std::mem::take(&mut inner.actions);
        inner.machine.step(event, inner.now, &mut actions);
        let mut outcome = Ok(());
        for action in actions.drain(..) {
            let acted = self.act(inner, action);
            outcome = outcome.and(acted);
        }
        inner.actions = actions;
        outcome
    }

    fn look_at_clock(&self, inner: &mut Inner) {
        inner.now = self.started.elapsed();
    }

    fn act(&self, inner: &mut Inner, action: Action) -> Result<(), NvmeError> {
        let book = Book::new(self.memory.window(), self.layout);
        match action {
            Action::Store32 { register, value } => {
                if register == CC {
                    // What a switched-off controller was to be told means nothing any more.
                    inner.tails.fill(None);
                    inner.heads.fill(None);
                    inner.counters.resets += u64::from(value == CC_DISABLED);
                }
                reached(self.bar.store_u32(register, value), &mut inner.unplugged)?;
            }
            Action::Store64 { register, value } => reached(self.bar.store_u64(register, value), &mut inner.unplugged)?,
            Action::ClearQueues => book.clear_queues()?,
            Action::Place { queue, placed, command, list } => {
                if let Some((first, count)) = list {
                    let page = self.layout.list(queue, placed.place);
                    for n in 0..count.min(PAGE / 8) {
                        self.memory.window().store_u64(page + 8 * n, first + n * PAGE)?;
                    }
                }
                let slot = self.layout.submission(queue) + u64::from(placed.slot) * COMMAND_BYTES;
                self.memory.window().write(slot, &command.encode())?;
                book.submitted(queue, &placed)?;
            }
            Action::RingTail { queue, tail } => inner.tails[queue.index()] = Some(tail),
            Action::RingHead { queue, head } => inner.heads[queue.index()] = Some(head),
            Action::Taken { queue, place, completed } => {
                inner.counters.completions += 1;
                book.completed(queue, place, completed)?;
            }
            Action::ReadIdentify => {
                let mut page = vec![0; IDENTIFY_BYTES];
                self.memory.window().read(self.layout.identify(), &mut page)?;
                self.step(inner, Event::Identified { page: &page })?;
            }
            Action::ResetFunction => {
                let done = self.device.reset();
                if let Err(error) = &done {
                    tracing::error!(%error, "Function-level reset failed");
                }
                self.step(inner, Event::FunctionReset { done: done.is_ok() })?;
            }
            Action::Adoptable { pairs } => book.set_adoptable(pairs)?,
            Action::Finish { id, result } => {
                if let Some(batch) = inner.batch(id.0 >> BATCH_SHIFT) {
                    batch.open -= 1;
                    batch.error = batch.error.take().or(result.err());
                    if batch.open == 0 {
                        self.wake(inner);
                    }
                }
            }
            Action::Report(report) => {
                tracing::warn!(device = %self.device.describe(), "{report}");
                inner.last_report = Some(report);
            }
        }
        Ok(())
    }

    /// Tells the controller what was submitted and taken.
    fn ring(&self, inner: &mut Inner) -> Result<(), NvmeError> {
        for queue in 0..inner.tails.len() {
            if let Some(head) = inner.heads[queue].take() {
                let doorbell = self.capabilities.head_doorbell(queue as u16);
                reached(self.bar.store_u32(doorbell, u32::from(head)), &mut inner.unplugged)?;
            }
            if let Some(tail) = inner.tails[queue].take() {
                let doorbell = self.capabilities.tail_doorbell(queue as u16);
                reached(self.bar.store_u32(doorbell, u32::from(tail)), &mut inner.unplugged)?;
            }
        }
        if std::mem::take(&mut inner.unplugged) {
            self.step(inner, Event::Status(ControllerStatus(GONE)))?;
        }
        Ok(())
    }

    /// Takes what the controller has completed. True: there was something.
    fn reap(&self, inner: &mut Inner) -> Result<bool, NvmeError> {
        let mut any = false;
        for queue in (0..inner.tails.len()).map(|queue| QueueId(queue as u16)) {
            let mut left = self.layout.entries;
            while let Some((head, phase)) = inner.machine.next_completion(queue).filter(|_| left > 0) {
                let at = self.layout.completion(queue) + u64::from(head) * COMPLETION_BYTES;
                // The phase is in the word that the controller writes last, and is loaded (with acquire) first.
                let high = self.memory.window().load_u64(at + 8)?;
                if Completion::phase_of(high) != phase {
                    break;
                }
                let entry = Completion::decode(self.memory.window().load_u64(at)?, high);
                self.step(inner, Event::Completion { queue, entry })?;
                (any, left) = (true, left - 1);
            }
        }
        self.ring(inner)?;
        Ok(any)
    }
}
