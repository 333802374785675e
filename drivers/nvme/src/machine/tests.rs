//! The machine against a device that is played here, well-behaved or not.

use std::collections::{BTreeMap, VecDeque};

use super::*;
use crate::protocol::Status;
use crate::protocol::identify::IDENTIFY_BYTES;

const MS: Duration = Duration::from_millis(1);
const LAYOUT: Layout = Layout { entries: 8, pairs: 2 };

fn config() -> Config {
    Config {
        capabilities: Capabilities(2047 | 1 << 24 | 1 << 37),
        layout: LAYOUT,
        iova: 1 << 20,
        namespace: 1,
        io_timeout: 100 * MS,
        admin_timeout: 50 * MS,
        attempts_max: 3,
        resets_max: 5,
    }
}

/// What the device does wrong, each once, in this order of commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Status(u16),
    Drop,
    WrongId,
    Twice,
    OtherQueue,
    /// From here on this queue does nothing until a reset.
    Stuck,
    Fatal,
}

#[derive(Default)]
struct Ring {
    slots: BTreeMap<u16, Command>,
    head: u16,
    tail: u16,
    completions: VecDeque<Completion>,
    stuck: bool,
}

/// Device and shell in one.
struct World {
    machine: Machine,
    now: Duration,
    enabled: bool,
    fatal: bool,
    gone: bool,
    /// Disabling needs a function-level reset.
    stubborn: bool,
    rings: Vec<Ring>,
    faults: VecDeque<Fault>,
    /// I/O commands that were executed: their first blocks.
    executed: Vec<u64>,
    finished: BTreeMap<RequestId, Result<(), RequestError>>,
    reports: Vec<Report>,
    adoptable: u16,
    serial: u8,
    /// Chooses the order of completions.
    random: u64,
}

impl World {
    fn new(machine: Machine) -> Self {
        Self {
            machine,
            now: Duration::ZERO,
            enabled: true,
            fatal: false,
            gone: false,
            stubborn: false,
            rings: (0..=LAYOUT.pairs).map(|_| Ring::default()).collect(),
            faults: VecDeque::new(),
            executed: vec![],
            finished: BTreeMap::new(),
            reports: vec![],
            adoptable: 0,
            serial: b'7',
            random: 1,
        }
    }

    /// A controller that runs.
    fn running() -> Self {
        let mut world = Self::new(Machine::new(config()));
        world.step(Event::Start);
        world.run_until(|world| world.machine.phase() == Phase::Running);
        world
    }

    fn draw(&mut self, below: usize) -> usize {
        // Marsaglia's xorshift.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % below.max(1) as u64) as usize
    }

    fn step(&mut self, event: Event<'_>) {
        let mut actions = Vec::new();
        self.machine.step(event, self.now, &mut actions);
        let mut follow = Vec::new();
        for action in actions {
            self.act(action, &mut follow);
        }
        for again in follow {
            match again {
                Action::ReadIdentify => {
                    let page = self.identify_page();
                    self.step(Event::Identified { page: &page });
                }
                _ => self.step(Event::FunctionReset { done: true }),
            }
        }
    }

    fn act(&mut self, action: Action, follow: &mut Vec<Action>) {
        match action {
            Action::Store32 { register: CC, value } => {
                self.enabled = value & 1 != 0 || (self.enabled && self.stubborn);
                self.fatal &= self.enabled;
            }
            Action::Store32 { .. } | Action::Store64 { .. } | Action::RingHead { .. } | Action::Taken { .. } => {}
            Action::ClearQueues => self.rings.iter_mut().for_each(|ring| *ring = Ring::default()),
            Action::Place { queue, placed, command, .. } => {
                let ring = &mut self.rings[queue.index()];
                let fetched = ring.slots.insert(placed.slot, command).is_none();
                assert!(fetched, "slot {} of {queue:?} was not fetched yet", placed.slot);
            }
            Action::RingTail { queue, tail } => self.rings[queue.index()].tail = tail,
            Action::ReadIdentify => follow.push(action),
            Action::ResetFunction => {
                (self.enabled, self.stubborn) = (false, false);
                follow.push(action);
            }
            Action::Adoptable { pairs } => self.adoptable = pairs,
            Action::Finish { id, result } => {
                assert!(self.finished.insert(id, result).is_none(), "{id:?} ended twice");
            }
            Action::Report(report) => self.reports.push(report),
        }
    }

    fn identify_page(&self) -> Vec<u8> {
        let mut page = vec![0; IDENTIFY_BYTES];
        if matches!(self.machine.phase(), Phase::Setup(Step::Controller)) {
            (page[4], page[77], page[512], page[513], page[520]) = (self.serial, 5, 0x66, 0x44, 8);
        } else {
            (page[2], page[130]) = (1, 12);
        }
        page
    }

    /// The device fetches one command of a queue and, perhaps, completes it.
    fn device_works(&mut self, index: usize) -> bool {
        let ring = &mut self.rings[index];
        if ring.stuck || ring.head == ring.tail || self.fatal || self.gone {
            return false;
        }
        let Some(command) = ring.slots.remove(&ring.head) else { panic!("doorbell before the command") };
        ring.head = (ring.head + 1) % LAYOUT.entries;
        let fault = if index > 0 { self.faults.pop_front() } else { None };
        let words: Vec<u32> =
            command.encode()[..].chunks(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect();
        // Set Features answers with two pairs, Abort (0) says that it did it.
        let result = if words[0] & 0xff == 9 { 1 | 1 << 16 } else { 0 };
        let mut entry = Completion {
            result,
            submission_head: self.rings[index].head,
            submission_queue: index as u16,
            id: command.id(),
            phase: true,
            status: Status::OK,
        };
        let ring = &mut self.rings[index];
        match fault {
            Some(Fault::Status(status)) => entry.status = Status(status),
            Some(Fault::Drop) => return true,
            Some(Fault::WrongId) => entry.id ^= 0x5500,
            Some(Fault::OtherQueue) => entry.submission_queue ^= 1,
            Some(Fault::Twice) => ring.completions.push_back(entry),
            Some(Fault::Stuck) => {
                ring.stuck = true;
                return true;
            }
            Some(Fault::Fatal) => {
                self.fatal = true;
                return true;
            }
            None => {}
        }
        if index > 0 && entry.status.is_ok() {
            self.executed.push(u64::from(words[10]));
        }
        ring.completions.push_back(entry);
        true
    }

    fn turn(&mut self) {
        let mut worked = false;
        for _ in 0..self.draw(4) {
            let queue = self.draw(self.rings.len());
            worked |= self.device_works(queue);
        }
        let queue = self.draw(self.rings.len());
        let entry = match self.rings[queue].completions.len() {
            0 => None,
            len => {
                let which = self.draw(len);
                self.rings[queue].completions.remove(which)
            }
        };
        if let Some(entry) = entry {
            let queue = QueueId(queue as u16);
            if self.machine.next_completion(queue).is_some() {
                self.step(Event::Completion { queue, entry });
            }
            worked = true;
        }
        let busy = self.rings.iter().any(|ring| ring.head != ring.tail && !ring.stuck && !self.fatal && !self.gone);
        if !worked && !busy {
            let word = if self.gone { u32::MAX } else { u32::from(self.enabled) | u32::from(self.fatal) << 1 };
            self.step(Event::Status(ControllerStatus(word)));
            self.now += MS;
            self.step(Event::Tick);
        }
    }

    fn run_until(&mut self, reached: impl Fn(&Self) -> bool) {
        for _ in 0..200_000 {
            if reached(self) {
                return;
            }
            self.turn();
        }
        panic!("not reached: {:?}, {:?}", self.machine, self.reports);
    }

    /// One write of a frame for each number.
    fn submit(&mut self, numbers: std::ops::Range<u64>) {
        for n in numbers {
            let request = Request { opcode: Opcode::Write, lba: n, blocks: 1, iova: n << 12, bytes: 4096 };
            self.step(Event::Submit { id: RequestId(n), request });
        }
    }

    fn finish_all(&mut self) {
        self.run_until(|world| world.machine.open_requests() == 0);
    }
}

#[test]
fn a_controller_is_set_up_and_runs_requests() {
    let mut world = World::running();
    assert_eq!((world.machine.pairs(), world.adoptable), (2, 2));
    let identity = world.machine.identity().cloned().unwrap();
    assert_eq!((identity.piece_bytes(), identity.namespace.block_shift), (128 << 10, 12));
    world.submit(0..100);
    world.finish_all();
    assert_eq!(world.finished.len(), 100);
    assert!(world.finished.values().all(Result::is_ok));
    assert!(world.reports.is_empty(), "{:?}", world.reports);
}

#[test]
fn requests_of_somebody_who_looks_go_to_the_pair_without_interrupts() {
    let mut machine = World::running().machine;
    let queues = |machine: &mut Machine, looking| {
        let mut actions = Vec::new();
        machine.step(Event::Pace { looking }, Duration::ZERO, &mut actions);
        for n in 0..3 {
            let request = Request { opcode: Opcode::Flush, lba: 0, blocks: 1, iova: 0, bytes: 0 };
            let id = RequestId(n + 10 * u64::from(looking));
            machine.step(Event::Submit { id, request }, Duration::ZERO, &mut actions);
        }
        let place = |action: &Action| if let Action::Place { queue, .. } = action { Some(queue.0) } else { None };
        actions.iter().filter_map(place).collect::<Vec<_>>()
    };
    assert_eq!(queues(&mut machine, false), [2, 2, 2]);
    assert!(!machine.needs_looking());
    assert_eq!(queues(&mut machine, true), [1, 1, 1]);
    assert!(machine.needs_looking());
}

#[test]
fn more_than_two_pages_go_through_the_list_of_their_place() {
    let mut machine = World::running().machine;
    let mut actions = Vec::new();
    let request = Request { opcode: Opcode::Read, lba: 8, blocks: 4, iova: 0x70_0000, bytes: 16384 };
    machine.step(Event::Submit { id: RequestId(1), request }, Duration::ZERO, &mut actions);
    let Some(Action::Place { queue, placed, command, list }) = actions.first() else { panic!("{actions:?}") };
    let list_page = (1 << 20) + LAYOUT.list(*queue, placed.place);
    assert_eq!(*list, Some((0x70_1000, 3)));
    let expected = Command::io(Opcode::Read, 1, 8, 4).with_memory(0x70_0000, list_page).with_id(placed.id);
    assert_eq!(*command, expected);
}

#[test]
fn a_command_that_fails_is_sent_again_and_reported_in_the_end() {
    let mut world = World::running();
    world.faults = VecDeque::from([Fault::Status(0x281)]);
    world.submit(0..1);
    world.finish_all();
    assert_eq!(world.finished[&RequestId(0)], Ok(()));
    world.faults = VecDeque::from([Fault::Status(0x281); 3]);
    world.submit(1..2);
    world.finish_all();
    assert!(matches!(
        world.finished[&RequestId(1)],
        Err(RequestError::Status { attempts: 3, status: Status(0x281), .. })
    ));
    world.faults = VecDeque::from([Fault::Status(0x4281)]);
    world.submit(2..3);
    world.finish_all();
    assert!(matches!(world.finished[&RequestId(2)], Err(RequestError::Status { attempts: 1, .. })), "it said: final");
}

#[test]
fn a_dropped_completion_ends_in_an_abort_then_a_reset_and_everything_is_sent_again() {
    let mut world = World::running();
    world.faults = VecDeque::from([Fault::Drop]);
    world.submit(0..20);
    world.finish_all();
    assert!(world.finished.len() == 20 && world.finished.values().all(Result::is_ok));
    assert!(world.reports.iter().any(|report| matches!(report, Report::Aborting { .. })));
    assert!(world.reports.iter().any(|report| matches!(report, Report::Late { .. })));
    assert_eq!(world.machine.phase(), Phase::Running);
}

#[test]
fn completions_that_cannot_be_true_are_never_trusted() {
    for fault in [Fault::WrongId, Fault::OtherQueue, Fault::Twice, Fault::Fatal, Fault::Stuck] {
        let mut world = World::running();
        world.faults = VecDeque::from([fault]);
        world.submit(0..20);
        world.finish_all();
        world.run_until(|world| world.machine.phase() == Phase::Running);
        assert!(world.finished.len() == 20 && world.finished.values().all(Result::is_ok), "{fault:?}");
        // A second completion may come when the machine has already stopped listening to that queue.
        assert!(fault == Fault::Twice || !world.reports.is_empty(), "{fault:?}");
    }
}

#[test]
fn a_request_that_never_ends_is_given_up_and_the_others_are_not() {
    let mut world = World::running();
    world.submit(0..1);
    for _ in 0..3 {
        world.faults.push_back(Fault::Drop);
        world.run_until(|world| world.faults.is_empty());
    }
    world.submit(1..10);
    world.finish_all();
    assert!(
        matches!(world.finished[&RequestId(0)], Err(RequestError::NoAnswer { attempts: 3, .. })),
        "{:?}",
        world.finished
    );
    assert!((1..10).all(|n| world.finished[&RequestId(n)] == Ok(())));
}

#[test]
fn a_controller_that_stays_broken_is_given_up_and_tried_again_when_asked() {
    let mut world = World::running();
    world.faults = VecDeque::from([Fault::Fatal; 6]);
    world.submit(0..4);
    world.finish_all();
    assert_eq!((world.machine.phase(), world.adoptable), (Phase::Dead, 0));
    assert!(world.finished.values().all(|result| *result == Err(RequestError::Dead)));
    world.submit(10..11);
    assert_eq!(world.finished[&RequestId(10)], Err(RequestError::Dead));
    world.faults.clear();
    world.step(Event::Start);
    world.submit(11..12);
    world.finish_all();
    assert_eq!(world.finished[&RequestId(11)], Ok(()));
}

#[test]
fn a_controller_that_cannot_be_disabled_gets_a_function_level_reset() {
    let mut world = World::new(Machine::new(config()));
    world.stubborn = true;
    world.step(Event::Start);
    world.run_until(|world| world.machine.phase() == Phase::Running);
    assert_eq!(world.reports, [Report::Disable]);
    assert!(world.now >= 500 * MS);
}

#[test]
fn a_removed_controller_ends_everything_at_once() {
    let mut world = World::running();
    world.submit(0..30);
    world.gone = true;
    world.finish_all();
    assert_eq!(world.machine.phase(), Phase::Gone);
    assert!(world.finished.values().filter(|result| **result == Err(RequestError::Gone)).count() >= 10);
    world.submit(40..41);
    assert_eq!(world.finished[&RequestId(40)], Err(RequestError::Gone));
}

#[test]
fn another_device_after_a_reset_is_not_taken_for_the_first() {
    let mut world = World::running();
    world.serial = b'8';
    world.faults = VecDeque::from([Fault::Fatal]);
    world.submit(0..1);
    world.finish_all();
    assert!(world.reports.contains(&Report::OtherDevice));
    assert_eq!(world.finished[&RequestId(0)], Err(RequestError::Dead));
}

/// The queues of a running controller whose driver dies now, with two commands in flight on the first I/O queue.
fn orphaned(world: &mut World) -> Vec<QueuePair<Flight>> {
    let queue = |id, submitted, completed, flights: &[(u16, u16)]| {
        QueuePair::adopt(QueueId(id), LAYOUT.entries, submitted, completed, flights, Flight::orphan)
    };
    for (queue, tail) in [(0, 4), (1, 5), (2, 1)] {
        (world.rings[queue].head, world.rings[queue].tail) = (tail, tail);
    }
    let at = |slot: u16, id: u16| (slot, Command::io(Opcode::Write, 1, 7, 1).with_id(id));
    world.rings[1].slots = BTreeMap::from([at(3, 0x0102), at(4, 0x0203)]);
    world.rings[1].head = 3;
    vec![queue(0, 12, 12, &[]), queue(1, 13, 11, &[(2, 0x0102), (3, 0x0203)]), queue(2, 9, 9, &[])]
}

#[test]
fn an_adopted_controller_is_not_reset_and_waits_for_the_dead_ones_commands() {
    let mut world = World::new(Machine::new(config()));
    let queues = orphaned(&mut world);
    world.machine = Machine::adopt(config(), queues, Duration::ZERO);
    world.step(Event::Start);
    world.submit(100..110);
    world.run_until(|world| world.machine.phase() == Phase::Running);
    assert_eq!(world.executed.iter().filter(|lba| **lba == 7).count(), 2, "before anybody uses the frames again");
    assert!(world.executed.iter().all(|lba| *lba < 100), "{:?}", world.executed);
    world.finish_all();
    assert!(world.finished.values().all(Result::is_ok) && world.reports.is_empty(), "{:?}", world.reports);
    assert!(world.enabled && world.adoptable == 2);
}

#[test]
fn an_adopted_controller_whose_queue_does_not_answer_is_reset() {
    let mut world = World::new(Machine::new(config()));
    let queues = orphaned(&mut world);
    world.machine = Machine::adopt(config(), queues, Duration::ZERO);
    world.faults = VecDeque::from([Fault::Stuck]);
    world.step(Event::Start);
    world.submit(100..110);
    world.finish_all();
    assert!(world.finished.values().all(Result::is_ok));
    assert!(world.reports.iter().any(|report| matches!(report, Report::Late { .. })), "{:?}", world.reports);
}

#[test]
fn random_histories_end_every_request_once_and_never_well_without_the_device() {
    for seed in 1..300_u64 {
        let mut world = World::running();
        world.random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut sent = 0;
        for _ in 0..30 {
            let looking = world.draw(2) == 0;
            world.step(Event::Pace { looking });
            let more = world.draw(20) as u64;
            world.submit(sent..sent + more);
            sent += more;
            if world.draw(3) == 0 {
                let all = [
                    Fault::Status(0x04),
                    Fault::Status(0x4281),
                    Fault::Drop,
                    Fault::WrongId,
                    Fault::Twice,
                    Fault::OtherQueue,
                    Fault::Stuck,
                    Fault::Fatal,
                ];
                let fault = all[world.draw(all.len())];
                world.faults.push_back(fault);
            }
            for _ in 0..world.draw(60) {
                world.turn();
            }
            if world.machine.phase() == Phase::Dead {
                world.faults.clear();
                world.step(Event::Start);
            }
        }
        world.faults.clear();
        world.finish_all();
        assert_eq!(world.finished.len() as u64, sent, "seed {seed}");
        for (id, result) in &world.finished {
            assert!(result.is_err() || world.executed.contains(&id.0), "seed {seed}: {id:?} was never executed");
        }
    }
}
