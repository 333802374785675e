//! A lane: the machine's orders carried out. It seals what leaves and checks what comes, between the asker's memory and the buffers of a medium.
//!
//! ```text
//!   asker's memory --page by page--> close --> buffer --> medium        generation counted, closed, tag noted, written, published
//!   asker's memory <--page by page-- open  <-- buffer <-- medium        what does not open is wrong, and never reaches the asker
//! ```
//! Each thread that moves pages has a lane of its own; they share the frames ([`Shared`]). Its lock is held for bookkeeping only: never while
//! anything is sealed or waited for.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uhmm_driver_kit::PAGE_BYTES;
use uhmm_driver_kit::seal::{Page, Seal, SealName};
use uhmm_kernel_hook::{HookError, MappedBytes};

use crate::backend::{Answer, Backend, BlockRequest, Buffers};
use crate::machine::{Action, Ask, Counts, Event, Failure, Fault, Limits, Machine, Outcome, Request};
use crate::runs::Run;
use crate::store::{Store, StoreError};
use crate::table::Table;

/// Longest wait when the machine waits for nothing.
const IDLE: Duration = Duration::from_secs(1);

/// What all lanes of a device share.
#[derive(Debug)]
pub struct Shared {
    store: Mutex<Store>,
    /// Blocks that a lane has taken or pinned are its own here.
    table: Table,
    seal: Option<Seal>,
    life: u64,
}

impl Shared {
    /// Goes on with this table.
    ///
    /// # Errors
    /// It is damaged.
    pub fn open(table: Table) -> Result<Self, StoreError> {
        let seal = table.key()?.map(|key| Seal::new(&key)).transpose();
        let seal = seal.map_err(|_| StoreError::Damaged { frame: 0 })?;
        let life = table.life()?.number;
        Ok(Self { store: Mutex::new(Store::open(table.clone())?), table, seal, life })
    }

    /// The same, where writes of a dead driver may still land.
    ///
    /// # Errors
    /// It is damaged.
    pub fn open_after_death(table: Table) -> Result<Self, StoreError> {
        let store = Mutex::new(Store::open_after_death(table.clone())?);
        Ok(Self { store, ..Self::open(table)? })
    }

    /// Blocks, generations, marks.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// What lies in a block is what was put there for this frame. `page` is the page afterwards, or means nothing.
    ///
    /// # Errors
    /// It is something else.
    pub fn unseal(&self, block: u32, frame: u32, page: &mut Page) -> Result<(), Fault> {
        let Some(seal) = &self.seal else { return Ok(()) };
        let (generation, tag) = (self.table.generation(block)?, self.table.tag(block)?);
        let name = SealName { block, generation, frame, life: self.life };
        seal.open(name, tag, page).map_err(Fault::Wrong)
    }

    /// Frames and blocks.
    pub fn store(&self) -> MutexGuard<'_, Store> {
        // Whoever panics under it has a broken table: the next incarnation checks it anew.
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module head.
pub struct Lane {
    shared: Arc<Shared>,
    machine: Machine,
    backend: Box<dyn Backend>,
    buffers: Buffers,
    /// In flight, by the machine's names.
    requests: std::collections::HashMap<u64, Request>,
    page: Box<Page>,
    ended: Vec<(u64, Result<(), Failure>)>,
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane").field("machine", &self.machine).finish_non_exhaustive()
    }
}

impl Lane {
    /// Over a medium that moves blocks to and from these buffers.
    pub fn new(shared: Arc<Shared>, backend: Box<dyn Backend>, buffers: Buffers, limits: Limits) -> Self {
        Self {
            shared,
            machine: Machine::new(limits),
            backend,
            buffers,
            requests: std::collections::HashMap::new(),
            page: Box::new([0; PAGE_BYTES as usize]),
            ended: Vec::new(),
        }
    }

    /// Requests have so many pages at most.
    #[must_use]
    pub fn with_pieces(mut self, pages: u32) -> Self {
        self.machine.set_pieces(pages);
        self
    }

    /// Asks that have not ended.
    pub fn open_asks(&self) -> usize {
        self.machine.open_asks()
    }

    /// What it has counted.
    pub fn counts(&self) -> Counts {
        self.machine.counts()
    }

    /// Begins. `memory` is the same until no ask is open.
    pub fn ask(&mut self, memory: &MappedBytes, ask: Ask) {
        self.handle(memory, Event::Ask(ask));
    }

    /// What has ended since the last time.
    pub fn ended(&mut self) -> Vec<(u64, Result<(), Failure>)> {
        std::mem::take(&mut self.ended)
    }

    /// One from start to end, alone in this lane.
    ///
    /// # Errors
    /// It was not done, in full or in part.
    pub fn run(&mut self, memory: &MappedBytes, ask: Ask) -> Result<(), Failure> {
        self.ask(memory, ask);
        loop {
            if let Some((_, result)) = self.ended().into_iter().find(|(ticket, _)| *ticket == ask.ticket) {
                return result;
            }
            self.step(memory);
        }
    }

    /// Waits for answers and goes on with them.
    pub fn step(&mut self, memory: &MappedBytes) {
        let now = self.backend.now_us();
        let wait = self.machine.wakes_at().map(|at| Duration::from_micros(at.saturating_sub(now)));
        let mut answers = Vec::new();
        self.backend.wait(wait.unwrap_or(IDLE).min(IDLE), &mut answers);
        for (id, answer) in answers {
            self.answered(memory, id, answer);
        }
        // After the answers: whoever says that a session is dead has said before what it has left.
        for session in self.backend.dead_sessions() {
            self.shared.store().session_is_dead(session);
        }
        self.handle(memory, Event::Tick);
    }

    fn answered(&mut self, memory: &MappedBytes, id: u64, answer: Answer) {
        // The machine counts what answers to nothing.
        let request = self.requests.remove(&id);
        let outcome = match (answer, request) {
            (Answer::Done, Some(request)) if !request.write => self.check(memory, &request),
            (Answer::Done, _) => Outcome::Done,
            (Answer::Failed(fault), _) => Outcome::Failed(fault),
            (Answer::Unknown(session, fault), _) => Outcome::Unknown(session, fault),
        };
        self.handle(memory, Event::Done(id, outcome));
    }

    fn handle(&mut self, memory: &MappedBytes, event: Event) {
        let mut actions = Vec::new();
        let now = self.backend.now_us();
        self.machine.handle(&mut self.shared.store(), now, event, &mut actions);
        for action in actions {
            match action {
                Action::Start(request) => self.start(memory, request),
                Action::Fill { place, count } => {
                    let filled = memory.fill(place * PAGE_BYTES, u64::from(count) * PAGE_BYTES, 0);
                    if let Err(error) = filled {
                        tracing::error!(%error, "An ask left its memory");
                    }
                }
                Action::Ended(ticket, result) => self.ended.push((ticket, result)),
            }
        }
    }

    fn start(&mut self, memory: &MappedBytes, request: Request) {
        let sealed = if request.write { self.close(memory, &request) } else { Ok(()) };
        let Request { id, write, blocks, slot, tries, .. } = request;
        self.requests.insert(id, request);
        match sealed {
            Ok(()) => self.backend.submit(BlockRequest { id, write, blocks, slot, tries }),
            // Nothing was sent, so it is answered at once.
            Err(fault) => self.answered(memory, id, Answer::Failed(fault)),
        }
    }

    /// From the asker's memory into the buffer. The blocks are this lane's alone.
    fn close(&mut self, memory: &MappedBytes, request: &Request) -> Result<(), Fault> {
        let table = &self.shared.table;
        for at in 0..request.blocks.count {
            let block = request.blocks.first + at;
            let generation = table.next_generation(block)?;
            memory.read((request.place + u64::from(at)) * PAGE_BYTES, &mut self.page[..])?;
            if let Some(seal) = &self.shared.seal {
                let name = SealName { block, generation, frame: request.frame + at, life: self.shared.life };
                let tag = seal.close(name, &mut self.page).map_err(Fault::Wrong)?;
                table.set_tag(block, &tag)?;
            }
            self.buffers.window.write(self.buffers.at(request.slot, at), &self.page[..])?;
        }
        Ok(())
    }

    /// From the buffer into the asker's memory, if it is what was put there. The blocks are pinned: their tags stay.
    fn check(&mut self, memory: &MappedBytes, request: &Request) -> Outcome {
        let mut wrong = Vec::new();
        let mut fault = None;
        for at in 0..request.blocks.count {
            match self.open(memory, request, at) {
                Ok(()) => {}
                Err(why) => {
                    wrong.push(at);
                    fault.get_or_insert(why);
                }
            }
        }
        if let Some(fault @ Fault::Wrong(_)) = &fault {
            tracing::debug!(%fault, first = request.blocks.first, pages = wrong.len(), "Pages came back wrong");
            for at in &wrong {
                self.backend.wrong(request.id, Run { first: request.blocks.first + at, count: 1 });
            }
        }
        fault.map_or(Outcome::Done, |fault| Outcome::Wrong(wrong, fault))
    }

    fn open(&mut self, memory: &MappedBytes, request: &Request, at: u32) -> Result<(), Fault> {
        if !self.machine.wants(request.id) {
            return Ok(());
        }
        let block = request.blocks.first + at;
        self.buffers.window.read(self.buffers.at(request.slot, at), &mut self.page[..])?;
        self.shared.unseal(block, request.frame + at, &mut self.page)?;
        let into = (request.place + u64::from(at)) * PAGE_BYTES;
        memory.write(into, &self.page[..]).map_err(|error: HookError| error.into())
    }
}

#[cfg(test)]
mod tests;
