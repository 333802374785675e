use std::sync::Arc;

use proptest::prelude::*;
use uhmm_ipc::shared::fill_gate::Fill;
use uhmm_shared::agent::{changed_word, set_status};
use uhmm_shared::ring::{self, HEAD, LANE};

use super::*;

const FIRST_ID: u64 = 1 << 32;

/// The program's side: its memory, and an agent that answers what the test tells it to.
struct Program {
    memory: AgentMemory,
    words: SharedWords,
    orders: Consumer<SharedWords>,
    answers: Producer<SharedWords>,
}

impl Program {
    fn new() -> Self {
        let words = SharedWords::create("uhmm-test-orders", WORDS as u64).unwrap();
        ring::format(&words, ENTRIES);
        let staging: Fd = Arc::new(memfd::create_sealed("uhmm-test-staging", SLOTS * SLOT_PAGES * PAGE_SIZE).unwrap());
        let done: Fd = Arc::new(EventFd::new().unwrap().into_fd());
        let (maps, pagemap, smaps) = (staging.clone(), staging.clone(), staging.clone());
        let memory = AgentMemory { maps, pagemap, smaps, staging, orders: words.fd().clone(), done, agent: None };
        let (orders, answers) = (Consumer::open(words.clone(), 0, ENTRIES), Producer::open(words.clone(), 1, ENTRIES));
        Self { memory, words, orders, answers }
    }

    fn pager(&self, incarnation: u64) -> Agent {
        Agent::open(None, &self.memory, incarnation * FIRST_ID).unwrap()
    }

    /// Does the oldest order: every page has this status.
    fn answer(&mut self, status: Status) -> u64 {
        let area = self.orders.index() & (ENTRIES - 1);
        let order = uhmm_shared::agent::Order::decode(&self.orders.peek().unwrap().expect("an order")).expect("legal");
        (0..order.page_count).for_each(|page| set_status(&self.words, area, page, status));
        self.answers.push(&Done { id: order.id, area }.encode()).unwrap();
        self.orders.advance();
        order.id
    }

    fn gate(&self) -> FillGate<SharedWords> {
        FillGate::at(self.words.clone(), GATE)
    }
}

fn job(order: Order, first: u64) -> Job {
    let purpose = Purpose::Out { ticket: Ticket(first), device: 0, frame: 0 };
    Job::new(RegionId(1), Pages { first, count: 8 }, order, purpose)
}

/// Gives the agent all that is ready.
fn send(agent: &mut Agent) -> Vec<(u64, Job)> {
    let ready = agent.ready();
    for (id, job) in &ready {
        let (region, first_page, page_count) = (job.region.0, job.pages.first, job.pages.count);
        let op = job.op().expect("for the ring");
        assert!(agent.send(&uhmm_shared::agent::Order { id: *id, region, first_page, addr: 0x7000, page_count, op }));
    }
    ready
}

#[test]
fn jobs_without_a_slot_wait_and_others_pass_them() {
    let program = Program::new();
    let mut agent = program.pager(1);
    for _ in 0..SLOTS + 1 {
        agent.ask(job(Order::MoveOut, 0));
    }
    agent.ask(job(Order::Drop { in_place: false }, 0));
    let ready = agent.ready();
    assert_eq!(ready.len() as u64, SLOTS + 1);
    assert_eq!(ready.last().unwrap().1.order, Order::Drop { in_place: false });
    assert!(agent.ready().is_empty());
    let done = agent.answered(ready[0].0).unwrap();
    agent.free_slot(done.slot.unwrap());
    assert_eq!(agent.ready().len(), 1);
}

#[test]
fn a_slot_is_free_when_its_block_is() {
    let program = Program::new();
    let mut agent = program.pager(1);
    let slot = agent.take_slot().unwrap();
    let (region, pages) = (RegionId(1), Pages { first: 8, count: 8 });
    agent.take(Taken { region, pages, slot });
    agent.free_slot(slot);
    assert_eq!(agent.taken_of(region, Pages { first: 0, count: 10 }), 2);
    agent.untake(region, Pages { first: 10, count: 2 });
    agent.untake(RegionId(2), pages);
    assert_eq!(agent.taken_of(region, pages), 6);
    assert_ne!(agent.take_slot(), Some(slot), "six pages are still there");
    agent.untake(region, Pages { first: 0, count: 100 });
    assert_eq!(agent.take_slot(), Some(slot));
}

#[test]
fn no_more_orders_are_in_the_ring_than_it_has_answers_for() {
    let mut program = Program::new();
    let mut agent = program.pager(1);
    (0..IN_FLIGHT_MAX + 5).for_each(|first| agent.ask(job(Order::MoveBack, first * 8)));
    assert_eq!(send(&mut agent).len() as u64, IN_FLIGHT_MAX);
    let first = program.answer(Status::Moved);
    assert!(send(&mut agent).is_empty(), "answered, and nobody has looked");
    let (answered, runs) = agent.next_answer().unwrap().expect("an answer");
    assert_eq!((answered.pages.first, first), (0, FIRST_ID));
    assert_eq!(runs, [AgentRun { page_count: 8, status: Status::Moved }]);
    assert_eq!(send(&mut agent).len(), 1);
}

#[test]
fn a_new_pager_finds_the_ring_and_no_order_of_the_dead_one_is_begun() {
    let mut program = Program::new();
    let mut dead = program.pager(1);
    (0..3).for_each(|first| dead.ask(job(Order::MoveOut, first * 8)));
    let sent = send(&mut dead);
    program.answer(Status::Moved);
    drop(dead);
    let mut agent = program.pager(2);
    assert_eq!(program.words.load(DEAD_PAGERS, Acquire), 2 * FIRST_ID - 1);
    let begun = agent.begun().expect("the second may have been begun");
    assert_eq!((begun.pages, begun.op), (sent[1].1.pages, Op::MoveOut { slot: 1 }));
    let taken = agent.find_taken(Some(begun));
    assert_eq!(taken, [Taken { region: RegionId(1), pages: begun.pages, slot: 1 }]);
    assert!(agent.next_answer().unwrap().is_none(), "answers for the dead one name nothing");
    agent.ask(job(Order::MoveBack, 0));
    send(&mut agent);
    program.answer(Status::Failed);
    program.answer(Status::Failed);
    program.answer(Status::Moved);
    assert_eq!(agent.next_answer().unwrap().map(|(job, _)| job.order), Some(Order::MoveBack));
}

#[test]
fn what_lies_in_scratch_is_found_by_its_records_unless_they_are_nonsense() {
    let program = Program::new();
    let record = |slot: usize, first: u64, count: u64| {
        for (field, value) in [(1, 5), (2, first), (4, count)] {
            program.words.store(BLOCKS + slot * BLOCK_WORDS + field, value, Relaxed);
        }
    };
    record(3, 16, 8);
    record(4, u64::MAX, 8);
    record(5, 0, ORDER_PAGES + 1);
    let mut agent = program.pager(2);
    let taken = agent.find_taken(None);
    assert_eq!(taken, [Taken { region: RegionId(5), pages: Pages { first: 16, count: 8 }, slot: 3 }]);
    assert!(agent.claims(RegionId(5), 23) && !agent.claims(RegionId(5), 24) && !agent.claims(RegionId(6), 16));
}

#[test]
fn an_agent_that_lies_hurts_its_own_process_only() {
    let mut program = Program::new();
    let mut agent = program.pager(1);
    agent.ask(job(Order::MoveOut, 0));
    let (id, _) = send(&mut agent)[0];
    // Orders that nobody gave, areas that do not exist, statuses that are none.
    for done in [Done { id: id + 1, area: 0 }, Done { id: u64::MAX, area: 63 }] {
        program.answers.push(&done.encode()).unwrap();
    }
    program.answers.push(&[id, 64, 0, 0, 0, 0, 0, 0]).unwrap();
    assert!(agent.next_answer().unwrap().is_none());
    (0..8).for_each(|word| program.words.store(uhmm_shared::agent::area_word(7) + word, u64::MAX, Relaxed));
    program.answers.push(&Done { id, area: 7 }.encode()).unwrap();
    let (_, runs) = agent.next_answer().unwrap().expect("the order's");
    assert_eq!(runs, [AgentRun { page_count: 8, status: Status::Failed }]);
    program.answers.push(&Done { id, area: 7 }.encode()).unwrap();
    assert!(agent.next_answer().unwrap().is_none(), "answered twice");
    program.words.store(LANE[1] + HEAD, 1 << 40, SeqCst);
    assert!(agent.next_answer().is_err());
}

#[test]
fn what_is_lost_is_answered_and_frames_are_not_the_agents() {
    let program = Program::new();
    let mut agent = program.pager(1);
    agent.ask(job(Order::MoveOut, 0));
    send(&mut agent);
    agent.ask(job(Order::UnmapDevice, 0));
    agent.ask(job(Order::MoveBack, 8));
    let gate = program.gate();
    gate.fill(9, FIRST_ID + 7, || {
        assert!(!agent.begin_reading(), "killed in the middle of filling");
        let lost: Vec<Order> = agent.lose().iter().map(|job| job.order).collect();
        assert_eq!((lost, agent.life), (vec![Order::MoveOut, Order::MoveBack], Life::Lost));
        assert!(agent.begin_reading());
    });
    assert_eq!(agent.len(), 1);
    assert_eq!(agent.ready()[0].1.order, Order::UnmapDevice);
    assert_eq!(agent.unanswered_frames().len(), 1);
    agent.begin_again(None);
    assert_eq!(agent.life, Life::Lives);
}

#[test]
fn what_the_program_drops_is_not_put_back_and_other_orders_are_not_concerned() {
    let program = Program::new();
    let (mut agent, agents_side) = (program.pager(1), program.gate());
    agent.ask(job(Order::MoveBack, 0));
    agent.ask(job(Order::MoveOut, 0));
    let sent = agent.ready();
    agent.ask(job(Order::FillHuge { slot: 3 }, 0));
    assert!(agent.begin_reading());
    agent.dropped(RegionId(2), Pages { first: 0, count: 9 });
    agent.dropped(RegionId(1), Pages { first: 8, count: 9 });
    agent.end_reading();
    assert_eq!(agents_side.fill(1, sent[0].0, || ()), Fill::Done(()));
    assert!(agent.begin_reading());
    agent.dropped(RegionId(1), Pages { first: 7, count: 9 });
    agent.end_reading();
    assert_eq!(agents_side.fill(1, sent[1].0, || ()), Fill::Refused, "all that were sent by then");
    let overtaken: Vec<bool> = sent.iter().map(|(id, _)| agent.answered(*id).unwrap().overtaken).collect();
    assert_eq!(overtaken, [true, false], "what was taken out is dropped where it arrives");
    let waiting = agent.ready();
    assert!(waiting[0].1.overtaken, "never sent");
}

#[test]
fn what_is_unmapped_is_neither_taken_out_nor_dropped_by_orders_from_before() {
    let program = Program::new();
    let mut agent = program.pager(1);
    for order in [Order::MoveOut, Order::Drop { in_place: true }, Order::Drop { in_place: false }] {
        agent.ask(job(order, 0));
    }
    agent.ask(job(Order::CopyOut, 100));
    let sent = send(&mut agent);
    agent.ask(job(Order::MoveOut, 4));
    let changed = || (0..4).map(|at| program.words.load(changed_word(at), Acquire)).collect::<Vec<_>>();
    agent.has_changed(RegionId(1), Pages { first: 0, count: 200 }, Changed::Dropped);
    assert_eq!(changed(), [0; 4], "it is dropped where it arrives");
    agent.has_changed(RegionId(1), Pages { first: 7, count: 9 }, Changed::Unmapped);
    assert_eq!(changed(), [sent[0].0, sent[1].0, 0, 0]);
    agent.moved(RegionId(1), Pages { first: 107, count: 1 });
    assert_eq!(changed(), [sent[0].0, sent[1].0, 0, sent[3].0]);
    let overtaken: Vec<bool> = sent.iter().map(|(id, _)| agent.answered(*id).unwrap().overtaken).collect();
    assert_eq!(overtaken, [false, true, false, true], "what is in place still is dropped after all");
    assert!(agent.ready()[0].1.overtaken, "never sent: its pages lie in two places");
}

#[test]
fn no_order_of_a_dead_pager_fills_anything() {
    let program = Program::new();
    let (_agent, agents_side) = (program.pager(1), program.gate());
    assert_eq!(agents_side.fill(1, FIRST_ID - 1, || ()), Fill::Refused);
    assert_eq!(agents_side.fill(1, FIRST_ID, || ()), Fill::Done(()));
}

#[test]
fn allocated_memory_does_not_move_so_orders_about_its_frames_stay_good() {
    let program = Program::new();
    let mut agent = program.pager(1);
    agent.ask(job(Order::MapDevice { device: 0, frame: 3, generation: 1 }, 8));
    agent.ask(job(Order::UnmapDevice, 8));
    agent.moved(RegionId(1), Pages { first: 0, count: 100 });
    let ready = agent.ready();
    assert!(ready[0].0 < ready[1].0 && ready.iter().all(|(_, job)| !job.overtaken && job.is_about_frames()));
}

#[test]
fn only_an_own_drop_of_exactly_these_pages_is_recognised() {
    let program = Program::new();
    let mut agent = program.pager(1);
    agent.ask(job(Order::Drop { in_place: true }, 8));
    let is_dropping = |agent: &Agent, region: u64, first: u64, count: u64| {
        let addrs = AddrRange { start: first * 4096, len: count * 4096 };
        agent.is_dropping(RegionId(region), Pages { first, count }, addrs)
    };
    assert!(!is_dropping(&agent, 1, 8, 8), "the agent has not begun: this is the program's");
    // The agent may have gone on to the next one when the event is dealt with.
    for (word, page) in [8, 16, 32, 40].into_iter().enumerate() {
        program.words.store(DIARY + word, page * 4096, Relaxed);
    }
    for sent in [false, true] {
        if sent {
            agent.ready();
        }
        assert!(is_dropping(&agent, 1, 8, 8) && is_dropping(&agent, 1, 9, 2), "sent {sent}");
        assert!(!is_dropping(&agent, 1, 7, 9) && !is_dropping(&agent, 2, 8, 8), "sent {sent}");
    }
    let id = *agent.outstanding.keys().next().unwrap();
    agent.answered(id);
    assert!(!is_dropping(&agent, 1, 8, 8), "done: this is the program's");
}

#[test]
fn memory_of_another_size_is_refused_in_words() {
    let program = Program::new();
    let small: Fd = Arc::new(memfd::create_sealed("uhmm-test", PAGE_SIZE).unwrap());
    let refused = |memory: AgentMemory| Agent::open(None, &memory, FIRST_ID).unwrap_err();
    let staging = refused(AgentMemory { staging: small.clone(), ..program.memory.clone() });
    assert!(staging.contains("Staging memory has 4096 bytes"), "{staging}");
    let orders = refused(AgentMemory { orders: small, ..program.memory.clone() });
    assert!(orders.contains("512 words where"), "{orders}");
}

/// What the program may have written: noise, or what looks like something where it counts.
#[derive(Clone, Debug)]
struct Nonsense {
    seed: u64,
    /// One word in so many is noise; the others are zero.
    one_in: u64,
    words: Vec<(usize, u64)>,
}

impl Nonsense {
    fn write(&self, words: &SharedWords) {
        let mut state = self.seed | 1;
        for index in 0..WORDS {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if state.is_multiple_of(self.one_in) {
                words.store(index, state.rotate_left(32), Relaxed);
            }
        }
        self.words.iter().for_each(|(index, value)| words.store(*index, *value, Relaxed));
    }
}

fn nonsense() -> impl Strategy<Value = Nonsense> {
    let value = prop_oneof![
        0u64..70,
        Just(ORDER_PAGES),
        Just(u64::MAX),
        (0u64..600).prop_map(|below| u64::MAX - below),
        any::<u64>(),
        (0u64..8, 0u64..20).prop_map(|(op, argument)| op | argument << 32),
    ];
    let lanes = (0usize..2, prop_oneof![Just(HEAD), Just(ring::TAIL), Just(ring::ARMED)]);
    let index = prop_oneof![
        lanes.prop_map(|(lane, word)| LANE[lane] + word),
        ring::SLOTS..GATE,
        GATE..BLOCKS,
        BLOCKS..BLOCKS + SLOTS as usize * BLOCK_WORDS,
        0..WORDS,
    ];
    let words = prop::collection::vec((index, value), 0..60);
    // Indices that agree with each other, at the end of all numbers or anywhere.
    let ends = prop_oneof![Just(0u64), 0u64..200, any::<u64>()].prop_map(|below| u64::MAX - below);
    let indices = (ends, prop::array::uniform4(0u64..3)).prop_map(|(end, below)| {
        let place = |n: usize| LANE[n / 2] + if n.is_multiple_of(2) { HEAD } else { ring::TAIL };
        (0..4).map(|n| (place(n), end.saturating_sub(below[n]))).collect::<Vec<_>>()
    });
    let words = (words, prop::option::of(indices))
        .prop_map(|(words, indices)| words.into_iter().chain(indices.unwrap_or_default()).collect());
    let one_in = prop_oneof![Just(1u64), Just(2), Just(50), Just(1 << 60)];
    (any::<u64>(), one_in, words).prop_map(|(seed, one_in, words)| Nonsense { seed, one_in, words })
}

/// All that the agent's side reads without doing it.
fn read_as_agent(words: &SharedWords) {
    let (mut orders, mut answers) =
        (Consumer::open(words.clone(), 0, ENTRIES), Producer::open(words.clone(), 1, ENTRIES));
    for _ in 0..2 * ENTRIES {
        let Ok(Some(descriptor)) = orders.peek() else { break };
        if let Some(order) = uhmm_shared::agent::Order::decode(&descriptor) {
            assert!((1..=ORDER_PAGES).contains(&order.page_count));
            assert!(order.addr.checked_add(order.page_count * PAGE_SIZE).is_some());
        }
        let done = Done { id: descriptor[0], area: orders.index() & (ENTRIES - 1) };
        if !uhmm_shared::agent::was_answered(&answers, &done) {
            set_status(words, done.area, ORDER_PAGES - 1, Status::Moved);
            if answers.push(&done.encode()).is_err() {
                break;
            }
        }
        orders.advance();
    }
}

/// All that a pager reads, with orders of its own under way.
fn read_as_pager(agent: &mut Agent) {
    let begun = agent.begun();
    if let Some(begun) = begun {
        assert!(
            (1..=ORDER_PAGES).contains(&begun.pages.count)
                && begun.pages.first.checked_add(begun.pages.count).is_some()
        );
    }
    for taken in agent.find_taken(begun) {
        assert!(u64::from(taken.slot) < SLOTS && (1..=ORDER_PAGES).contains(&taken.pages.count), "{taken:?}");
        assert!(agent.claims(taken.region, taken.pages.end() - 1));
    }
    agent.claims(RegionId(1), u64::MAX);
    for first in 0..4 {
        agent.ask(job(Order::MoveBack, first * 8));
    }
    for (id, job) in agent.ready() {
        let (region, first_page, op) = (job.region.0, job.pages.first, job.op().expect("for the ring"));
        agent.send(&uhmm_shared::agent::Order { id, region, first_page, addr: 0x7000, page_count: 8, op });
    }
    // No more than a ring's worth can lie there, however often it is asked.
    for _ in 0..4 {
        let Ok(Some((job, runs))) = agent.next_answer() else { break };
        assert_eq!(runs.iter().map(|run| run.page_count).sum::<u64>(), job.pages.count);
    }
    agent.is_dropping(RegionId(1), Pages { first: 0, count: 8 }, AddrRange { start: 0x7000, len: 8 * PAGE_SIZE });
    agent.lose();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_program_writes_into_its_orders_neither_side_trips_over_it(before in nonsense(), while_it_works in nonsense()) {
        let program = Program::new();
        before.write(&program.words);
        read_as_agent(&program.words);
        let mut agent = program.pager(1);
        while_it_works.words.iter().for_each(|(index, value)| program.words.store(*index, *value, Relaxed));
        read_as_pager(&mut agent);
        while_it_works.write(&program.words);
        read_as_pager(&mut agent);
        read_as_agent(&program.words);
    }
}
