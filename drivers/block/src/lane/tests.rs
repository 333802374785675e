//! Lanes over a medium that drops, delays, reorders, duplicates, damages and lies, in virtual time; and that dies with its driver.
//!
//! The model is a map of what each frame was acknowledged to hold. A medium that is merely slow or moody never costs a page; one that lies
//! costs pages, and never shows a wrong byte.

use std::collections::{BTreeMap, HashMap, HashSet};

use proptest::prelude::*;
use uhmm_driver_kit::Frames;
use uhmm_kernel_hook::Window;

use super::*;
use crate::machine::Op;
use crate::runs::Run;
use crate::table::Life;

const FRAMES: u32 = 200;
const BLOCKS: u32 = 264;
const LIMITS: Limits =
    Limits { depth: 6, writes: 4, deadline_us: 50_000, write_deadline_us: 50_000, tries: 4, pause_us: 100 };

/// What the medium does, in thousandths of all requests.
#[derive(Clone, Copy, Debug, Default)]
struct Mood {
    /// Answers "failed".
    fails: u64,
    /// Of writes that fail: they were done all the same.
    lands: u64,
    /// Answers long after the deadline.
    late: u64,
    /// Never answers; a write may land at any time.
    drops: u64,
    /// Answers twice, and about things nobody has asked.
    duplicates: u64,
    /// A bit is another one.
    damages: u64,
    /// Says that it has done what it has not done.
    lies: u64,
}

/// Costs time only.
const SLOW: Mood = Mood { fails: 0, lands: 0, late: 0, drops: 0, duplicates: 150, damages: 0, lies: 0 };
/// Costs nothing but tries, as long as the same page does not fail four times.
const MOODY: Mood = Mood { fails: 60, lands: 500, duplicates: 100, ..SLOW };
const HOSTILE: Mood = Mood { fails: 100, lands: 500, late: 30, drops: 20, duplicates: 100, damages: 50, lies: 50 };

struct InFlight {
    request: BlockRequest,
    due_us: u64,
    bytes: Vec<u8>,
}

struct World {
    rng: u64,
    now_us: u64,
    mood: Mood,
    blocks: BTreeMap<u32, Vec<u8>>,
    in_flight: Vec<InFlight>,
    /// Dropped writes that may still land.
    adrift: Vec<InFlight>,
    /// Every generation of every block that was ever written.
    used: HashSet<(u32, u64)>,
}

impl World {
    fn below(&mut self, bound: u64) -> u64 {
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        self.rng % bound.max(1)
    }

    fn chance(&mut self, thousandths: u64) -> bool {
        self.below(1000) < thousandths
    }

    fn land(&mut self, write: &InFlight) {
        for (at, page) in write.bytes.chunks_exact(PAGE_BYTES as usize).enumerate() {
            let mut page = page.to_vec();
            if self.chance(self.mood.damages) {
                let bit = self.below(PAGE_BYTES * 8) as usize;
                page[bit / 8] ^= 1 << (bit % 8);
            }
            self.blocks.insert(write.request.blocks.first + at as u32, page);
        }
    }

    fn answer(&mut self, flight: InFlight, buffers: &Buffers, answers: &mut Vec<(u64, Answer)>) {
        let BlockRequest { id, write, blocks, slot, .. } = flight.request;
        let failed = self.chance(self.mood.fails);
        let lies = self.chance(self.mood.lies);
        if write {
            let lands = if failed { self.chance(self.mood.lands) } else { !lies };
            if lands {
                self.land(&flight);
            }
        } else if !lies {
            for at in 0..blocks.count {
                let zero = vec![0; PAGE_BYTES as usize];
                let mut page = self.blocks.get(&(blocks.first + at)).unwrap_or(&zero).clone();
                if self.chance(self.mood.damages) {
                    page[self.rng as usize % 4096] ^= 4;
                }
                buffers.window.write(buffers.at(slot, at), &page).unwrap();
            }
        }
        let answer = if failed { Answer::Failed(Fault::Refused("moody".into())) } else { Answer::Done };
        answers.push((id, answer));
        if self.chance(self.mood.duplicates) {
            answers.push((id, Answer::Done));
            answers.push((id ^ 1 << 40, Answer::Failed(Fault::Refused("a stray".into()))));
        }
    }
}

struct Fake {
    world: Arc<Mutex<World>>,
    buffers: Buffers,
    table: Table,
}

impl Backend for Fake {
    fn submit(&mut self, request: BlockRequest) {
        let mut world = self.world.lock().unwrap();
        let mut bytes = vec![0; (u64::from(request.blocks.count) * PAGE_BYTES) as usize];
        if request.write {
            self.buffers.window.read(self.buffers.at(request.slot, 0), &mut bytes).unwrap();
            for block in request.blocks.first..request.blocks.end() {
                let fresh = world.used.insert((block, self.table.generation(block).unwrap()));
                assert!(fresh, "block {block} is written twice in one generation");
            }
        }
        let (drops, late) = (world.mood.drops, world.mood.late);
        let patience = if world.chance(late) { 300_000 } else { 4000 };
        let due_us = world.now_us + world.below(patience);
        let flight = InFlight { request, due_us, bytes };
        if world.chance(drops) { world.adrift.push(flight) } else { world.in_flight.push(flight) }
    }

    fn wait(&mut self, patience: Duration, answers: &mut Vec<(u64, Answer)>) {
        let mut world = self.world.lock().unwrap();
        if !world.adrift.is_empty() && world.mood.drops < 1000 && world.chance(100) {
            let count = world.adrift.len() as u64;
            let at = world.below(count) as usize;
            let write = world.adrift.swap_remove(at);
            if write.request.write {
                world.land(&write);
            }
        }
        let end = world.now_us + patience.as_micros() as u64;
        let next = world.in_flight.iter().map(|flight| flight.due_us).min().filter(|due| *due <= end);
        world.now_us = next.unwrap_or(end).max(world.now_us);
        let now = world.now_us;
        while let Some(at) = world.in_flight.iter().position(|flight| flight.due_us <= now) {
            let flight = world.in_flight.swap_remove(at);
            world.answer(flight, &self.buffers, answers);
        }
    }

    fn now_us(&self) -> u64 {
        self.world.lock().unwrap().now_us
    }
}

/// A driver, its medium, and what is known of the frames.
struct Bed {
    world: Arc<Mutex<World>>,
    table: Table,
    lane: Lane,
    memory: Window,
    known: BTreeMap<u32, u64>,
    next_value: u64,
    next_ticket: u64,
    lost_pages: u64,
    refused_pages: u64,
}

fn lane(world: &Arc<Mutex<World>>, table: &Table) -> Lane {
    let shared = Arc::new(Shared::open(table.clone()).unwrap());
    let buffers = Buffers::new(LIMITS.depth, 64).unwrap();
    let fake = Fake { world: world.clone(), buffers: buffers.clone(), table: table.clone() };
    Lane::new(shared, Box::new(fake), buffers, LIMITS)
}

/// Asks of one round: which frames, and what is written.
type Asked = HashMap<u64, (Op, Frames, u64)>;

impl Bed {
    fn new(seed: u64, mood: Mood, sealed: bool) -> Self {
        let (table, _) = Table::create(FRAMES, BLOCKS, Life { owner: [1, 2], number: 3 }, sealed).unwrap();
        let world = World {
            rng: seed | 1,
            now_us: 1,
            mood,
            blocks: BTreeMap::new(),
            in_flight: Vec::new(),
            adrift: Vec::new(),
            used: HashSet::new(),
        };
        let world = Arc::new(Mutex::new(world));
        let lane = lane(&world, &table);
        let memory = Window::anonymous(u64::from(FRAMES) * PAGE_BYTES).unwrap();
        let known = BTreeMap::new();
        Self { world, table, lane, memory, known, next_value: 1, next_ticket: 1, lost_pages: 0, refused_pages: 0 }
    }

    fn below(&self, bound: u64) -> u64 {
        self.world.lock().unwrap().below(bound)
    }

    /// What a page of this value looks like.
    fn put(&self, frame: u32, value: u64) {
        let at = u64::from(frame) * PAGE_BYTES;
        self.memory.fill(at, PAGE_BYTES, value as u8).unwrap();
        self.memory.store_u64(at, value).unwrap();
        self.memory.store_u64(at + 4088, value).unwrap();
    }

    fn look(&self, frame: u32) -> u64 {
        let at = u64::from(frame) * PAGE_BYTES;
        let mut page = vec![0; PAGE_BYTES as usize];
        self.memory.read(at, &mut page).unwrap();
        let value = self.memory.load_u64(at).unwrap();
        let whole = page[8..4088].iter().all(|byte| *byte == value as u8);
        assert!(whole && self.memory.load_u64(at + 4088).unwrap() == value, "frame {frame} is a mixture");
        value
    }

    /// Asks that do not touch each other's frames.
    fn begin(&mut self) -> Asked {
        let mut asked = Asked::new();
        let mut frame = self.below(40) as u32;
        while frame < FRAMES && asked.len() < 8 {
            let count = (1 + self.below(90) as u32).min(FRAMES - frame);
            let op = [Op::Write, Op::Read, Op::Read, Op::Write, Op::Zero][self.below(5) as usize];
            let frames = Frames { first: frame, count };
            let (ticket, value) = (self.next_ticket, self.next_value);
            self.next_ticket += 1;
            for at in 0..count {
                match op {
                    Op::Write => self.put(frame + at, value + u64::from(at)),
                    _ => self.put(frame + at, u64::MAX),
                }
            }
            self.next_value += u64::from(count);
            asked.insert(ticket, (op, frames, value));
            self.lane.ask(&self.memory, Ask { ticket, op, frames, place: u64::from(frame) });
            frame += count + self.below(30) as u32;
        }
        asked
    }

    fn end(&mut self, asked: &mut Asked) {
        for (ticket, result) in self.lane.ended() {
            let (op, frames, value) = asked.remove(&ticket).expect("it ends once");
            let failed = result.map_or_else(|failure| failure.pages, |()| Vec::new());
            let all = 0..frames.count;
            for at in all {
                let frame = frames.first + at;
                let failed = failed.contains(&at);
                match op {
                    Op::Write if failed => self.refused_pages += 1,
                    Op::Write => drop(self.known.insert(frame, value + u64::from(at))),
                    Op::Zero => drop(self.known.insert(frame, 0)),
                    Op::Read if failed => self.lost_pages += 1,
                    Op::Read => {
                        let known = self.known.get(&frame).copied().unwrap_or(0);
                        assert_eq!(self.look(frame), known, "frame {frame} shows another page");
                    }
                }
            }
        }
    }

    fn round(&mut self) {
        let mut asked = self.begin();
        self.end(&mut asked);
        let mut steps = 0;
        while !asked.is_empty() {
            self.lane.step(&self.memory);
            self.end(&mut asked);
            steps += 1;
            assert!(steps < 20_000, "asks never end: {asked:?}");
        }
        assert_eq!(self.lane.open_asks(), 0);
    }

    /// Everything is read once more, while the medium behaves.
    fn read_all(&mut self) {
        self.world.lock().unwrap().mood = SLOW;
        let frames = Frames { first: 0, count: FRAMES };
        let mut asked: Asked = [(self.next_ticket, (Op::Read, frames, 0))].into();
        self.lane.ask(&self.memory, Ask { ticket: self.next_ticket, op: Op::Read, frames, place: 0 });
        self.next_ticket += 1;
        self.end(&mut asked);
        while !asked.is_empty() {
            self.lane.step(&self.memory);
            self.end(&mut asked);
        }
    }

    /// kill -9: what is in flight lands or does not, before the next incarnation begins.
    fn crash(&mut self) {
        let mut asked = self.begin();
        let steps = self.below(12);
        for _ in 0..steps {
            self.lane.step(&self.memory);
            self.end(&mut asked);
        }
        {
            let mut world = self.world.lock().unwrap();
            let mut left = std::mem::take(&mut world.in_flight);
            left.append(&mut world.adrift);
            for write in left.iter().filter(|flight| flight.request.write) {
                if world.chance(500) {
                    world.land(write);
                }
            }
        }
        self.lane = lane(&self.world, &self.table);
        // Each page of a write that had not ended is the old or the new one.
        for (op, frames, value) in asked.into_values() {
            for at in 0..frames.count {
                let frame = frames.first + at;
                let old = self.known.get(&frame).copied().unwrap_or(0);
                let new = if op == Op::Zero { 0 } else { value + u64::from(at) };
                let ask =
                    Ask { ticket: 0, op: Op::Read, frames: Frames { first: frame, count: 1 }, place: u64::from(frame) };
                let mood = std::mem::replace(&mut self.world.lock().unwrap().mood, SLOW);
                let read = self.lane.run(&self.memory, ask);
                self.world.lock().unwrap().mood = mood;
                if read.is_err() {
                    self.lost_pages += 1;
                    continue;
                }
                let found = self.look(frame);
                assert!(found == old || op != Op::Read && found == new, "frame {frame}: {found}, not {old} or {new}");
                self.known.insert(frame, found);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_slow_medium_costs_time_only(seed: u64, sealed: bool) {
        let mut bed = Bed::new(seed, SLOW, sealed);
        (0..12).for_each(|_| bed.round());
        bed.read_all();
        prop_assert_eq!((bed.lost_pages, bed.refused_pages), (0, 0));
        prop_assert!(bed.lane.counts().strays > 0 && bed.lane.counts().retries == 0);
    }

    #[test]
    fn a_medium_that_fails_now_and_then_costs_few_pages(seed: u64, sealed: bool) {
        let mut bed = Bed::new(seed, MOODY, sealed);
        (0..12).for_each(|_| bed.round());
        bed.read_all();
        prop_assert!(bed.lost_pages + bed.refused_pages < 20, "{} {}", bed.lost_pages, bed.refused_pages);
    }

    #[test]
    fn a_medium_that_lies_never_shows_a_wrong_byte(seed: u64) {
        let mut bed = Bed::new(seed, HOSTILE, true);
        (0..12).for_each(|_| bed.round());
        bed.read_all();
    }

    #[test]
    fn a_killed_driver_leaves_every_page_old_or_new(seed: u64, sealed: bool) {
        let mut bed = Bed::new(seed, SLOW, sealed);
        for _ in 0..6 {
            bed.round();
            bed.crash();
        }
        bed.read_all();
        prop_assert_eq!((bed.lost_pages, bed.refused_pages), (0, 0));
    }

    #[test]
    fn killed_over_a_medium_that_lies_it_never_shows_a_wrong_byte(seed: u64) {
        let mut bed = Bed::new(seed, HOSTILE, true);
        for _ in 0..6 {
            bed.round();
            bed.crash();
        }
        bed.read_all();
    }
}

/// The tests above can see what they look for.
#[test]
fn without_seals_lies_are_believed_and_the_model_notices() {
    let wrong = (1..40u64).any(|seed| {
        std::panic::catch_unwind(|| {
            let mut bed = Bed::new(seed * 7919, HOSTILE, false);
            (0..12).for_each(|_| bed.round());
        })
        .is_err()
    });
    assert!(wrong, "forty media lied, and nobody noticed");
}

#[test]
fn a_write_that_lands_after_everything_else_is_harmless() {
    let mut bed = Bed::new(5, SLOW, true);
    let one =
        |ticket, op, frame| Ask { ticket, op, frames: Frames { first: frame, count: 1 }, place: u64::from(frame) };
    bed.put(3, 100);
    bed.lane.run(&bed.memory, one(1, Op::Write, 3)).unwrap();
    bed.world.lock().unwrap().mood.drops = 1000;
    bed.put(3, 200);
    let failure = bed.lane.run(&bed.memory, one(2, Op::Write, 3)).unwrap_err();
    assert_eq!(failure, Failure { fault: Fault::Late(LIMITS.deadline_us), pages: vec![0] });
    let adrift = std::mem::take(&mut bed.world.lock().unwrap().adrift);
    assert_eq!(adrift.len(), 1);
    bed.world.lock().unwrap().mood.drops = 0;
    // All other blocks are written to: the one that was not answered for is not.
    for value in 300..800 {
        bed.put(3, value);
        bed.lane.run(&bed.memory, one(3, Op::Write, 3)).unwrap();
    }
    bed.world.lock().unwrap().land(&adrift[0]);
    bed.lane.run(&bed.memory, one(4, Op::Read, 3)).unwrap();
    assert_eq!(bed.look(3), 799);
}

#[test]
fn exactly_the_damaged_page_is_lost() {
    let mut bed = Bed::new(5, SLOW, true);
    let frames = Frames { first: 0, count: 150 };
    (0..150).for_each(|frame| bed.put(frame, 1000 + u64::from(frame)));
    bed.lane.run(&bed.memory, Ask { ticket: 1, op: Op::Write, frames, place: 0 }).unwrap();
    let block = |frame| bed.table.block_of(frame).unwrap().unwrap();
    let (first, second) = (block(70), block(71));
    {
        let mut world = bed.world.lock().unwrap();
        // One bit is wrong in one, and another one holds what was right a moment ago elsewhere.
        world.blocks.get_mut(&first).unwrap()[77] ^= 1;
        let elsewhere = world.blocks[&block(9)].clone();
        world.blocks.insert(second, elsewhere);
    }
    (0..150).for_each(|frame| bed.put(frame, 5));
    let failure = bed.lane.run(&bed.memory, Ask { ticket: 2, op: Op::Read, frames, place: 0 }).unwrap_err();
    assert_eq!(failure.pages, [70, 71]);
    assert!(failure.fault.to_string().contains("not those that were put there last"), "{}", failure.fault);
    for frame in (0..150).filter(|frame| ![70, 71].contains(frame)) {
        assert_eq!(bed.look(frame), 1000 + u64::from(frame));
    }
    assert_eq!((bed.look(70), bed.look(71)), (5, 5), "what is wrong reaches nobody");
}

#[test]
fn frames_in_a_row_are_one_request_each_way_and_zeroes_none() {
    let mut bed = Bed::new(5, SLOW, true);
    let frames = Frames { first: 0, count: 128 };
    bed.lane.run(&bed.memory, Ask { ticket: 1, op: Op::Write, frames, place: 0 }).unwrap();
    assert_eq!(bed.lane.counts().requests, 2);
    bed.lane.run(&bed.memory, Ask { ticket: 2, op: Op::Read, frames, place: 0 }).unwrap();
    assert_eq!(bed.lane.counts().requests, 4);
    bed.lane.run(&bed.memory, Ask { ticket: 3, op: Op::Zero, frames, place: 0 }).unwrap();
    bed.lane.run(&bed.memory, Ask { ticket: 4, op: Op::Read, frames, place: 0 }).unwrap();
    assert_eq!((bed.lane.counts().requests, bed.look(127)), (4, 0));
}

#[test]
fn reads_overtake_writes_that_wait_and_find_a_slot_among_them() {
    let mut bed = Bed::new(5, SLOW, true);
    let seen =
        |bed: &Bed| bed.world.lock().unwrap().in_flight.iter().map(|flight| flight.request.write).collect::<Vec<_>>();
    let one = Frames { first: 199, count: 1 };
    bed.lane.run(&bed.memory, Ask { ticket: 9, op: Op::Write, frames: one, place: 0 }).unwrap();
    for ticket in 0..3 {
        let frames = Frames { first: ticket * 64, count: 64 };
        for part in 0..4 {
            let frames = Frames { first: frames.first + part * 16, count: 16 };
            let ask = Ask { ticket: u64::from(ticket * 4 + part) + 10, op: Op::Write, frames, place: 0 };
            bed.lane.ask(&bed.memory, ask);
        }
    }
    assert_eq!(seen(&bed), [true; 4], "writes leave slots");
    bed.lane.ask(&bed.memory, Ask { ticket: 100, op: Op::Read, frames: one, place: 0 });
    assert_eq!(seen(&bed), [true, true, true, true, false], "at once");
}

#[test]
fn a_device_without_free_blocks_says_so_and_keeps_what_it_has() {
    let mut bed = Bed::new(5, SLOW, true);
    let taken = bed.lane.shared.store().take(BLOCKS).unwrap();
    assert_eq!(taken, Run { first: 0, count: BLOCKS });
    let frames = Frames { first: 0, count: 10 };
    let failure = bed.lane.run(&bed.memory, Ask { ticket: 1, op: Op::Write, frames, place: 0 }).unwrap_err();
    assert_eq!(failure, Failure { fault: Fault::Full { resting: 0 }, pages: (0..10).collect() });
    bed.lane.shared.store().release(taken);
    bed.lane.run(&bed.memory, Ask { ticket: 2, op: Op::Write, frames, place: 0 }).unwrap();
}
