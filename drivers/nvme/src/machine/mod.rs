//! The controller's life and everything in flight, as a pure state machine: `event, now -> actions`. No memory, no registers, no threads.
//!
//! ```text
//!          Start                CSTS.RDY=0            CSTS.RDY=1
//!   Off ----------> Disabling ------------> Enabling ------------> Setup: controller, namespace, queue count, queues ---> Running
//!    ^                 |  ^ too late: function-level reset, once     |                                                     |
//!   Dead <-------------+--+------------------------------------------+        a command late: abort; late again, or a      |
//!    (resets used up)     ^                                                   completion that cannot be true, or CFS       |
//!                         +----------------------------------------------------------------------------------------------+
//!   adopt -> Setup: controller, namespace, -> Draining (commands of the dead incarnation, one flush a queue) -> Running
//!   any, CSTS = all ones -> Gone
//! ```
//! **Every request can be asked again**: reads, writes and zeroing of whole frames, and flush. So after a reset all that was in flight is
//! simply sent once more. A command that was late itself is sent [`Config::attempts_max`] times at most; those that only shared the
//! controller with it do not count. A request that is finished with an error is one page range that the pager reports and keeps.
//!
//! **Of two or more pairs the first raises no interrupts.** Requests go there while somebody looks for completions anyway; an interrupt that nobody
//! needs costs more than a command on a fast device.
//!
//! A request is finished only when the device cannot touch its memory any more: its completion came, or the controller was disabled, or
//! the machine says [`Phase::Dead`] and the caller takes the memory away from the device before it tells anybody.

mod event;
mod flight;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

pub use event::{Action, Event, Report, Request, RequestError, RequestId};
pub use flight::Flight;

use crate::layout::{Layout, PIECE_BYTES_MAX, pages_of};
use crate::machine::flight::{Owner, Work};
use crate::protocol::registers::{ACQ, AQA, ASQ, CC, CC_DISABLED, CC_ENABLED};
use crate::protocol::{
    Capabilities, Command, Completion, ControllerInfo, ControllerStatus, NamespaceInfo, Opcode, QueueId,
};
use crate::queue::QueuePair;

/// What does not change in the machine's life.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// CAP.
    pub capabilities: Capabilities,
    /// Entries and pairs that the memory has room for.
    pub layout: Layout,
    /// Where that memory is for the device.
    pub iova: u64,
    /// Which namespace.
    pub namespace: u32,
    /// When an I/O command is late.
    pub io_timeout: Duration,
    /// When an admin command is late, and an abort has not helped.
    pub admin_timeout: Duration,
    /// How often a request is sent.
    pub attempts_max: u8,
    /// Resets without one good completion between them.
    pub resets_max: u8,
}

/// Where the controller is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing was done yet.
    Off,
    /// EN is 0; RDY is not yet. The flag: after a function-level reset.
    Disabling(bool),
    /// The function is being reset.
    Resetting,
    /// EN is 1; RDY is not yet.
    Enabling,
    /// Admin commands, one after the other.
    Setup(Step),
    /// Commands of the last incarnation are in flight.
    Draining,
    /// Takes requests.
    Running,
    /// Given up; [`Event::Start`] tries again. The device may still reach memory that was given to it.
    Dead,
    /// Unplugged.
    Gone,
}

/// What the admin command of a setup is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Identify the controller.
    Controller,
    /// Identify the namespace.
    Namespace,
    /// How many queues.
    QueueCount,
    /// Completion queue of a pair.
    CompletionQueue(u16),
    /// Submission queue of a pair.
    SubmissionQueue(u16),
}

/// What identify said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The controller.
    pub controller: ControllerInfo,
    /// The namespace.
    pub namespace: NamespaceInfo,
}

impl Identity {
    /// Most bytes of one command with data.
    pub fn piece_bytes(&self) -> u64 {
        self.controller.transfer_bytes_max.unwrap_or(PIECE_BYTES_MAX).min(PIECE_BYTES_MAX)
    }

    /// Most blocks of one command without.
    pub fn zero_blocks_max(&self) -> u64 {
        1 << 16
    }
}

/// See the module head.
#[derive(Debug)]
pub struct Machine {
    config: Config,
    phase: Phase,
    /// Of the phase.
    until: Duration,
    /// Taken over from the last incarnation: no queues are to be made.
    adopting: bool,
    controller: Option<ControllerInfo>,
    identity: Option<Identity>,
    admin: QueuePair<Flight>,
    io: Vec<QueuePair<Flight>>,
    /// Requests that are not in flight.
    waiting: VecDeque<Work>,
    resets: u8,
    looking: bool,
}

impl Machine {
    /// A controller in whatever state it may be. The first event is [`Event::Start`].
    pub fn new(config: Config) -> Self {
        Self {
            admin: QueuePair::new(QueueId::ADMIN, config.layout.entries),
            config,
            phase: Phase::Off,
            until: Duration::ZERO,
            adopting: false,
            controller: None,
            identity: None,
            io: Vec::new(),
            waiting: VecDeque::new(),
            resets: 0,
            looking: false,
        }
    }

    /// A controller that runs, with its queues; first the admin queue. The first event is [`Event::Start`].
    pub fn adopt(config: Config, mut queues: Vec<QueuePair<Flight>>, now: Duration) -> Self {
        let admin = queues.remove(0);
        let mut machine = Self { admin, io: queues, adopting: true, ..Self::new(config) };
        for queue in std::iter::once(&mut machine.admin).chain(&mut machine.io) {
            for (_, flight) in queue.owners() {
                flight.until = now + config.io_timeout;
            }
        }
        machine
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Known from the first setup on.
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// Pairs of I/O queues in use.
    pub fn pairs(&self) -> u16 {
        self.io.len() as u16
    }

    /// Requests that have not ended, and what is left of the last incarnation.
    pub fn open_requests(&self) -> usize {
        self.waiting.len() + self.io.iter().map(QueuePair::in_flight).sum::<usize>()
    }

    /// Where the next completion of a queue comes: its entry, and its phase. `None`: there is no such queue now.
    pub fn next_completion(&self, queue: QueueId) -> Option<(u16, bool)> {
        let takes =
            !matches!(self.phase, Phase::Off | Phase::Disabling(_) | Phase::Resetting | Phase::Dead | Phase::Gone);
        let pair = match queue.index() {
            0 => Some(&self.admin),
            index => self.io.get(index - 1),
        };
        pair.filter(|_| takes).map(|pair| (pair.head(), pair.phase()))
    }

    /// One step. What the shell does with `actions`, in their order, is its side of the protocol.
    pub fn step(&mut self, event: Event<'_>, now: Duration, actions: &mut Vec<Action>) {
        match event {
            Event::Start => self.start(now, actions),
            Event::Submit { id, request } => self.submit(id, request, actions),
            Event::Pace { looking } => {
                self.looking = looking;
                return;
            }
            Event::Status(status) => self.status(status, now, actions),
            Event::Completion { queue, entry } => self.completion(queue, &entry, now, actions),
            Event::Identified { page } => self.identified(page, now, actions),
            Event::FunctionReset { done } => self.function_reset(done, now, actions),
            Event::Tick => self.tick(now, actions),
        }
        if self.phase == Phase::Running {
            self.fill(now, actions);
        }
    }

    fn start(&mut self, now: Duration, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Off if self.adopting => self.setup(Step::Controller, now, actions),
            Phase::Off | Phase::Dead => {
                self.resets = 0;
                self.disable(false, now, actions);
            }
            _ => {}
        }
    }

    fn submit(&mut self, id: RequestId, request: Request, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Gone => actions.push(Action::Finish { id, result: Err(RequestError::Gone) }),
            Phase::Dead => actions.push(Action::Finish { id, result: Err(RequestError::Dead) }),
            _ => self.waiting.push_back(Work { id, request, attempts: 0 }),
        }
    }

    /// CSTS, as read now.
    fn status(&mut self, status: ControllerStatus, now: Duration, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Off | Phase::Gone | Phase::Dead | Phase::Resetting => {}
            _ if status.is_gone() => self.gone(actions),
            Phase::Disabling(_) if !status.is_ready() => self.enable(now, actions),
            Phase::Disabling(_) => {}
            _ if status.is_fatal() => self.reset(Report::Fatal, now, actions),
            Phase::Enabling if status.is_ready() => self.setup(Step::Controller, now, actions),
            Phase::Running | Phase::Draining if !status.is_ready() => self.reset(Report::NotReady, now, actions),
            _ => {}
        }
    }

    fn disable(&mut self, after_reset: bool, now: Duration, actions: &mut Vec<Action>) {
        self.adopting = false;
        self.phase = Phase::Disabling(after_reset);
        self.until = now + self.config.capabilities.timeout();
        actions.push(Action::Adoptable { pairs: 0 });
        actions.push(Action::Store32 { register: CC, value: CC_DISABLED });
    }

    fn enable(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Config { layout, iova, capabilities, .. } = self.config;
        self.phase = Phase::Enabling;
        self.until = now + capabilities.timeout();
        self.admin = QueuePair::new(QueueId::ADMIN, layout.entries);
        self.io.clear();
        self.give_up_late(actions);
        actions.push(Action::ClearQueues);
        let last = u32::from(layout.entries - 1);
        actions.push(Action::Store32 { register: AQA, value: last | last << 16 });
        actions.push(Action::Store64 { register: ASQ, value: iova + layout.submission(QueueId::ADMIN) });
        actions.push(Action::Store64 { register: ACQ, value: iova + layout.completion(QueueId::ADMIN) });
        actions.push(Action::Store32 { register: CC, value: CC_ENABLED });
    }

    /// Requests that were late too often. Not before the device has let go of their memory: now.
    fn give_up_late(&mut self, actions: &mut Vec<Action>) {
        let attempts_max = self.config.attempts_max;
        self.waiting.retain(|Work { id, request, attempts }| {
            let late = *attempts >= attempts_max;
            if late {
                let error = RequestError::NoAnswer { request: *request, attempts: *attempts };
                actions.push(Action::Finish { id: *id, result: Err(error) });
            }
            !late
        });
    }

    fn setup(&mut self, step: Step, now: Duration, actions: &mut Vec<Action>) {
        self.phase = Phase::Setup(step);
        let Config { layout, iova, namespace, .. } = self.config;
        let entries = layout.entries;
        let command = match step {
            Step::Controller => Command::identify_controller().with_memory(iova + layout.identify(), 0),
            Step::Namespace => Command::identify_namespace(namespace).with_memory(iova + layout.identify(), 0),
            Step::QueueCount => Command::set_queue_count(layout.pairs),
            Step::CompletionQueue(pair) => {
                let queue = QueueId(pair);
                Command::create_completion_queue(queue, entries, (!self.is_silent(queue)).then_some(pair))
                    .with_memory(iova + layout.completion(queue), 0)
            }
            Step::SubmissionQueue(pair) => {
                let queue = QueueId(pair);
                Command::create_submission_queue(queue, entries).with_memory(iova + layout.submission(queue), 0)
            }
        };
        self.admin_command(command, Owner::Setup(step), now, actions);
    }

    fn admin_command(&mut self, command: Command, owner: Owner, now: Duration, actions: &mut Vec<Action>) {
        let flight = Flight::new(owner, now + self.config.admin_timeout);
        match self.admin.submit_last(flight) {
            Some(placed) => {
                let command = command.with_id(placed.id);
                actions.push(Action::Place { queue: QueueId::ADMIN, placed, command, list: None });
                actions.push(Action::RingTail { queue: QueueId::ADMIN, tail: self.admin.tail() });
            }
            None => self.reset(Report::AdminFull, now, actions),
        }
    }

    fn setup_done(&mut self, step: Step, entry: &Completion, now: Duration, actions: &mut Vec<Action>) {
        if !entry.status.is_ok() {
            return self.reset(Report::Setup { step, status: entry.status }, now, actions);
        }
        match step {
            Step::Controller | Step::Namespace => actions.push(Action::ReadIdentify),
            Step::QueueCount => {
                let pairs = entry.queue_pairs_granted().min(u32::from(self.config.layout.pairs)) as u16;
                self.io = (1..=pairs).map(|pair| QueuePair::new(QueueId(pair), self.config.layout.entries)).collect();
                self.setup(Step::CompletionQueue(1), now, actions);
            }
            Step::CompletionQueue(pair) => self.setup(Step::SubmissionQueue(pair), now, actions),
            Step::SubmissionQueue(pair) if usize::from(pair) < self.io.len() => {
                self.setup(Step::CompletionQueue(pair + 1), now, actions);
            }
            Step::SubmissionQueue(_) => self.run(actions),
        }
    }

    /// The page that an identify brought.
    fn identified(&mut self, page: &[u8], now: Duration, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Setup(Step::Controller) => match ControllerInfo::decode(page) {
                Ok(controller) => {
                    self.controller = Some(controller);
                    self.setup(Step::Namespace, now, actions);
                }
                Err(error) => self.die(Report::Identify(error), actions),
            },
            Phase::Setup(Step::Namespace) => match NamespaceInfo::decode(self.config.namespace, page) {
                Ok(namespace) => self.known(namespace, now, actions),
                Err(error) => self.die(Report::Identify(error), actions),
            },
            _ => {}
        }
    }

    fn known(&mut self, namespace: NamespaceInfo, now: Duration, actions: &mut Vec<Action>) {
        let Some(controller) = self.controller.take() else { return };
        let identity = Identity { controller, namespace };
        if self.identity.as_ref().is_some_and(|known| *known != identity) {
            return self.die(Report::OtherDevice, actions);
        }
        self.identity = Some(identity);
        if !self.adopting {
            return self.setup(Step::QueueCount, now, actions);
        }
        self.phase = Phase::Draining;
        for index in 0..self.io.len() {
            let probe = Command::io(Opcode::Flush, self.config.namespace, 0, 1);
            let flight = Flight::new(Owner::Probe, now + self.config.io_timeout);
            let pair = &mut self.io[index];
            let queue = pair.queue();
            let Some(placed) = pair.submit_last(flight) else {
                return self.reset(Report::Adoption, now, actions);
            };
            actions.push(Action::Place { queue, placed, command: probe.with_id(placed.id), list: None });
            actions.push(Action::RingTail { queue, tail: self.io[index].tail() });
        }
    }

    /// Takes requests from now on, and another incarnation may go on from here.
    fn run(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::Running;
        self.adopting = false;
        actions.push(Action::Adoptable { pairs: self.pairs() });
    }

    fn completion(&mut self, queue: QueueId, entry: &Completion, now: Duration, actions: &mut Vec<Action>) {
        let pair = match queue.index() {
            0 => Some(&mut self.admin),
            index => self.io.get_mut(index - 1),
        };
        let Some(pair) = pair else { return };
        let taken = match pair.complete(entry) {
            Ok(taken) => taken,
            Err(fault) => return self.reset(Report::Queue(fault), now, actions),
        };
        let place = taken.as_ref().map(|(place, _)| *place);
        actions.push(Action::Taken { queue, place, completed: pair.completed() });
        actions.extend(pair.head_to_tell().map(|head| Action::RingHead { queue, head }));
        match taken.map(|(_, flight)| flight.owner) {
            Some(Owner::Setup(step)) => self.setup_done(step, entry, now, actions),
            Some(Owner::Request(work)) => self.request_done(work, entry, actions),
            Some(Owner::Abort) if !entry.was_aborted() => actions.push(Action::Report(Report::NotAborted)),
            Some(Owner::Abort | Owner::Orphan) | None => {}
            Some(Owner::Probe) if entry.status.is_ok() => {}
            Some(Owner::Probe) => return self.reset(Report::Adoption, now, actions),
        }
        if self.phase == Phase::Draining && self.io.iter().all(|pair| pair.in_flight() == 0) {
            self.run(actions);
        }
    }

    fn request_done(&mut self, mut work: Work, entry: &Completion, actions: &mut Vec<Action>) {
        let Work { id, request, .. } = work;
        if entry.status.is_ok() {
            self.resets = 0;
            return actions.push(Action::Finish { id, result: Ok(()) });
        }
        work.attempts += 1;
        if entry.status.is_final() || work.attempts >= self.config.attempts_max {
            let error = RequestError::Status { request, status: entry.status, attempts: work.attempts };
            return actions.push(Action::Finish { id, result: Err(error) });
        }
        actions.push(Action::Report(Report::Retry { request, status: entry.status }));
        self.waiting.push_back(work);
    }

    /// Waiting requests into free slots, one queue after the other.
    fn fill(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let mut rung = 0_u64;
        while let Some(work) = self.waiting.front().copied() {
            let (looking, silent) = (self.looking, self.io.len() > 1);
            let wrong = |queue: QueueId| silent && (queue.0 == 1) != looking;
            let order = |pair: &&mut QueuePair<Flight>| (!pair.has_room(), wrong(pair.queue()), pair.in_flight());
            let Some(pair) = self.io.iter_mut().min_by_key(order) else { break };
            let Some(placed) = pair.submit(Flight::new(Owner::Request(work), now + self.config.io_timeout)) else {
                break;
            };
            let queue = pair.queue();
            self.waiting.pop_front();
            rung |= 1 << queue.0;
            let Request { opcode, lba, blocks, iova, bytes } = work.request;
            let mut command = Command::io(opcode, self.config.namespace, lba, blocks).with_id(placed.id);
            let mut list = None;
            if bytes > 0 {
                let list_page = self.config.iova + self.config.layout.list(queue, placed.place);
                let pages = pages_of(iova, u64::from(bytes), list_page);
                command = command.with_memory(pages.first, pages.second);
                list = pages.list;
            }
            actions.push(Action::Place { queue, placed, command, list });
        }
        for pair in self.io.iter().filter(|pair| rung >> pair.queue().0 & 1 != 0) {
            actions.push(Action::RingTail { queue: pair.queue(), tail: pair.tail() });
        }
    }

    /// The pair raises no interrupts.
    fn is_silent(&self, queue: QueueId) -> bool {
        queue.0 == 1 && self.io.len() > 1
    }

    /// Something is in flight whose completion raises no interrupt.
    pub fn needs_looking(&self) -> bool {
        self.io.first().is_some_and(|pair| self.is_silent(pair.queue()) && pair.in_flight() > 0)
    }

    /// When [`Event::Tick`] has something to do, if nothing comes before.
    pub fn next_deadline(&mut self) -> Option<Duration> {
        match self.phase {
            Phase::Off | Phase::Dead | Phase::Gone | Phase::Resetting => None,
            Phase::Disabling(_) | Phase::Enabling => Some(self.until),
            _ => {
                let pairs = std::iter::once(&mut self.admin).chain(&mut self.io);
                pairs.flat_map(QueuePair::owners).map(|(_, flight)| flight.until).min()
            }
        }
    }

    fn tick(&mut self, now: Duration, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Disabling(false) if now >= self.until => {
                actions.push(Action::Report(Report::Disable));
                self.phase = Phase::Resetting;
                actions.push(Action::ResetFunction);
            }
            Phase::Disabling(true) if now >= self.until => self.die(Report::Disable, actions),
            Phase::Enabling if now >= self.until => self.reset(Report::Enable, now, actions),
            Phase::Setup(_) | Phase::Draining | Phase::Running => self.tick_flights(now, actions),
            _ => {}
        }
    }

    fn tick_flights(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.admin.owners().any(|(_, flight)| now >= flight.until) {
            return self.reset(Report::AdminLate, now, actions);
        }
        let aborting = self.io.iter_mut().flat_map(QueuePair::owners).any(|(_, flight)| flight.aborting);
        let mut late = None;
        for pair in &mut self.io {
            let queue = pair.queue();
            for (id, flight) in pair.owners().filter(|(_, flight)| now >= flight.until) {
                if flight.aborting {
                    late = Some((queue, id, true));
                } else if late.is_none() && !aborting {
                    late = Some((queue, id, false));
                }
            }
        }
        match late {
            Some((queue, id, true)) => self.reset(Report::Late { queue: queue.0, id }, now, actions),
            Some((queue, id, false)) => self.abort(queue, id, now, actions),
            None => {}
        }
    }

    fn abort(&mut self, queue: QueueId, id: u16, now: Duration, actions: &mut Vec<Action>) {
        let until = now + self.config.admin_timeout;
        let Some(pair) = self.io.get_mut(queue.index() - 1) else { return };
        for (_, flight) in pair.owners().filter(|(other, _)| *other == id) {
            (flight.aborting, flight.until) = (true, until);
        }
        actions.push(Action::Report(Report::Aborting { queue: queue.0, id }));
        self.admin_command(Command::abort(queue, id), Owner::Abort, now, actions);
    }

    /// Everything from the beginning, and everything in flight again.
    fn reset(&mut self, why: Report, now: Duration, actions: &mut Vec<Action>) {
        actions.push(Action::Report(why));
        for flight in self.io.iter_mut().flat_map(QueuePair::drain) {
            let Some(mut work) = flight.work() else { continue };
            work.attempts += u8::from(now >= flight.until || flight.aborting);
            self.waiting.push_back(work);
        }
        self.admin.drain();
        self.resets += 1;
        if self.resets > self.config.resets_max {
            return self.die(Report::ResetsUsedUp, actions);
        }
        self.disable(false, now, actions);
    }

    fn function_reset(&mut self, done: bool, now: Duration, actions: &mut Vec<Action>) {
        if self.phase != Phase::Resetting {
            return;
        }
        if done { self.disable(true, now, actions) } else { self.die(Report::Disable, actions) }
    }

    fn die(&mut self, why: Report, actions: &mut Vec<Action>) {
        self.phase = Phase::Dead;
        actions.push(Action::Adoptable { pairs: 0 });
        actions.push(Action::Report(why));
        self.finish_all(&RequestError::Dead, actions);
    }

    fn gone(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::Gone;
        actions.push(Action::Adoptable { pairs: 0 });
        actions.push(Action::Report(Report::Gone));
        self.finish_all(&RequestError::Gone, actions);
    }

    fn finish_all(&mut self, error: &RequestError, actions: &mut Vec<Action>) {
        self.admin.drain();
        let in_flight = self.io.drain(..).flat_map(|mut pair| pair.drain()).filter_map(|flight| flight.work());
        for Work { id, .. } in in_flight.chain(self.waiting.drain(..)) {
            actions.push(Action::Finish { id, result: Err(error.clone()) });
        }
    }
}
