//! Agents that are killed at any moment: the next one finishes what is in the ring, and each order is answered once.

use std::hint::spin_loop;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::agent_bed::{
    Bed, Desk, HUGE_BYTES, HUGE_PAGES, Runs, check, filled, huge, locked_bytes, pages_of, present, range_of,
};
use crate::common::{Child, wait_readable};
use uhmm_kernel_hook::own_memory::{self, RangeAdvice};
use uhmm_kernel_hook::pagemap::Categories;
use uhmm_kernel_hook::program::{ProgramAdvice, ProgramMemory};
use uhmm_kernel_hook::{AddrRange, CopyMode, PAGE_SIZE, Userfaultfd};
use uhmm_shared::agent::{HUGE_BLOCKS, Op, SLOTS, Status};

const OUT: Op = Op::MoveOut { slot: 3 };
const SLOT_3: u64 = 3 * HUGE_BYTES;
const DROP: Op = Op::Drop { in_place: false };
/// A fill goes into one mapping.
const PIECE_BYTES: u64 = HUGE_BYTES / 32;
/// An order of 512 small pages takes some 200 us here, as long as it takes an agent to begin.
const LATEST_US: u64 = 500;

/// The same moments in every run, as far as the machine plays along (xorshift64).
struct Moments {
    state: u64,
    /// Kills that left some pages in scratch and some in place.
    partly_out: u64,
}

impl Moments {
    fn new(seed: u64) -> Self {
        Self { state: seed, partly_out: 0 }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % end
    }
}

/// Kills the agent some time from now.
fn end(bed: &Bed, after: Duration) {
    let end = Instant::now() + after;
    while Instant::now() < end {
        spin_loop();
    }
    assert!(bed.agent().pidfd().signal(Signal::KILL).unwrap(), "it has ended by itself");
    wait_readable(bed.agent().pidfd().as_fd());
}

/// Kills the agent some time from now, and starts the next one.
fn kill(bed: &mut Bed, after: Duration) {
    end(bed, after);
    bed.start_agent();
}

/// Waits until the agent is seen at work, or long enough: on a busy machine it may begin late, or be done already.
fn seen_at_work(memory: &ProgramMemory, before: u64) {
    let late = Instant::now() + Duration::from_micros(4 * LATEST_US);
    while present(memory) == before && Instant::now() < late {
        std::thread::yield_now();
    }
}

/// Gives an order, kills up to three agents that are at it, and returns what becomes of it.
fn run_killed(bed: &mut Bed, moments: &mut Moments, memory: &ProgramMemory, op: Op) -> Runs {
    let before = present(memory);
    let id = bed.desk.give(0, memory.addr(), HUGE_PAGES, op);
    for _ in 0..1 + moments.below(3) {
        let waits = moments.below(2) == 0;
        if waits {
            seen_at_work(memory, before);
        }
        end(bed, Duration::from_micros(moments.below(if waits { LATEST_US / 4 } else { LATEST_US })));
        moments.partly_out += u64::from((1..HUGE_PAGES).contains(&bed.in_scratch()));
        bed.start_agent();
    }
    // The one before may have answered and been killed before it told of that: a pager looks when an agent begins.
    let done = bed.desk.answer();
    assert_eq!(done.id, id);
    bed.desk.runs(done, HUGE_PAGES)
}

/// What is in the staging slot is what was there.
fn check_staged(bed: &Bed) {
    for page in 0..HUGE_PAGES {
        assert_eq!(bed.desk.staging.load_u64(SLOT_3 + page * PAGE_SIZE).unwrap(), page + 1, "page {page}");
    }
}

/// An order that is killed or not, and one afterwards that is not: no order was answered twice, and none is left.
fn settle(bed: &mut Bed) {
    assert_eq!(bed.desk.ask(0, 0, 1, DROP), [(1, Status::Moved)]);
    let (orders, answers) = bed.desk.counts();
    assert_eq!(orders, answers, "an order was answered twice");
}

fn is_out(runs: &Runs) -> bool {
    runs.iter().all(|(_, status)| matches!(status, Status::Moved | Status::MovedHuge))
}

/// Rounds of going out and coming home, by the agent or (every third time) as from a device. Returns how many agents were killed half-way.
fn rounds(memory: &ProgramMemory, seed: u64, count: u64) -> u64 {
    let (mut bed, mut moments) = (Bed::new(), Moments::new(seed));
    bed.adopt(memory);
    for round in 0..count {
        bed.desk.staging.fill(SLOT_3, HUGE_BYTES, 0).unwrap();
        let out = run_killed(&mut bed, &mut moments, memory, OUT);
        assert!(is_out(&out), "round {round}: {out:?}");
        assert_eq!((present(memory), bed.in_scratch(), bed.records()), (0, HUGE_PAGES, 1), "round {round}");
        check_staged(&bed);
        if round % 3 == 2 {
            let dropped = run_killed(&mut bed, &mut moments, memory, DROP);
            assert_eq!(dropped, [(HUGE_PAGES, Status::Moved)], "round {round}");
            for offset in (0..HUGE_BYTES).step_by(PIECE_BYTES as usize) {
                let (to, from) = (memory.addr() + offset, SLOT_3 + offset);
                let filled = bed.uffd.copy(to, &bed.desk.staging, from, PIECE_BYTES, CopyMode::default());
                assert!(filled.unwrap().is_complete());
            }
        } else {
            let back = run_killed(&mut bed, &mut moments, memory, Op::MoveBack);
            assert_eq!(back, [(HUGE_PAGES, Status::Moved)], "round {round}");
        }
        check(memory);
        assert_eq!((bed.in_scratch(), bed.records()), (0, 0), "round {round}");
        settle(&mut bed);
    }
    moments.partly_out
}

/// Small pages in 32 mappings, each of which is a call of its own: there are moments between.
fn cut() -> ProgramMemory {
    let memory = filled(HUGE_PAGES);
    for offset in (0..HUGE_BYTES).step_by(2 * PIECE_BYTES as usize) {
        memory.advise(offset, PIECE_BYTES, ProgramAdvice::HugePage).unwrap();
    }
    memory
}

#[test]
fn integration_agent_killed_in_the_middle_of_small_pages_loses_nothing_and_answers_once() {
    rounds(&filled(HUGE_PAGES), 0x5eed_0001, 100);
}

#[test]
fn integration_agent_killed_between_mappings_loses_nothing_and_answers_once() {
    let mut halfway = 0;
    // Once is enough on an idle machine.
    for seed in 0x5eed_0006..0x5eed_0026 {
        halfway += rounds(&cut(), seed, 200);
        if halfway >= 20 {
            return;
        }
    }
    panic!("only {halfway} agents were killed when some pages were out and some were not");
}

#[test]
fn integration_agent_killed_in_the_middle_of_huge_pages_loses_nothing_and_answers_once() {
    let Some(memory) = huge() else { return };
    rounds(&memory, 0x5eed_0002, 100);
}

#[test]
fn integration_agent_killed_while_many_orders_wait_answers_each_once_and_in_order() {
    let mut moments = Moments::new(0x5eed_0003);
    let memory = filled(HUGE_PAGES);
    let mut bed = Bed::new();
    bed.adopt(&memory);
    for round in 0..40 {
        let mut given = Vec::new();
        for part in 0..16 {
            let first = part * 32;
            let addr = memory.addr() + first * PAGE_SIZE;
            given.push(bed.desk.give(first, addr, 32, Op::MoveOut { slot: part as u32 }));
            given.push(bed.desk.give(first, addr, 32, Op::MoveBack));
        }
        for _ in 0..4 {
            kill(&mut bed, Duration::from_micros(moments.below(LATEST_US)));
        }
        for id in given {
            let done = bed.desk.answer();
            assert_eq!(done.id, id, "round {round}");
            assert_eq!(bed.desk.runs(done, 32), [(32, Status::Moved)], "round {round}, order {id}");
        }
        settle(&mut bed);
        check(&memory);
        assert_eq!((bed.in_scratch(), bed.records()), (0, 0), "round {round}");
    }
}

#[test]
fn integration_agent_killed_while_it_drops_or_copies_does_both_again() {
    let mut moments = Moments::new(0x5eed_0004);
    let memory = filled(HUGE_PAGES);
    let mut bed = Bed::new();
    bed.adopt(&memory);
    for round in 0..60 {
        bed.desk.staging.fill(SLOT_3, HUGE_BYTES, 0).unwrap();
        memory.protect(0, HUGE_BYTES, true, false).unwrap();
        let protected = bed.uffd.write_protect(range_of(&memory), true, false).unwrap();
        assert_eq!(protected, uhmm_kernel_hook::WpOutcome::Done);
        let copied = run_killed(&mut bed, &mut moments, &memory, Op::CopyOut { slot: 3 });
        assert_eq!(copied, [(HUGE_PAGES, Status::Moved)], "round {round}");
        check_staged(&bed);
        check(&memory);
        let dropped = run_killed(&mut bed, &mut moments, &memory, Op::Drop { in_place: true });
        assert_eq!(dropped, [(HUGE_PAGES, Status::Moved)], "round {round}");
        assert_eq!(present(&memory), 0, "round {round}");
        memory.protect(0, HUGE_BYTES, true, true).unwrap();
        let filled = bed.uffd.copy(memory.addr(), &bed.desk.staging, SLOT_3, HUGE_BYTES, CopyMode::default());
        assert!(filled.unwrap().is_complete());
        settle(&mut bed);
        check(&memory);
    }
}

#[test]
fn integration_agent_killed_while_locked_pages_are_out_leaves_nothing_locked() {
    let mut moments = Moments::new(0x5eed_0005);
    let memory = filled(HUGE_PAGES);
    memory.lock(0, HUGE_BYTES / 2).unwrap();
    own_memory::advise(range_of(&memory), RangeAdvice::DontFork).unwrap();
    let mut bed = Bed::new();
    bed.adopt(&memory);
    for round in 0..30 {
        let out = run_killed(&mut bed, &mut moments, &memory, OUT);
        assert_eq!(out, [(HUGE_PAGES, Status::Moved)], "round {round}");
        let back = run_killed(&mut bed, &mut moments, &memory, Op::MoveBack);
        assert_eq!(back, [(HUGE_PAGES, Status::Moved)], "round {round}");
        check(&memory);
        assert_eq!(locked_bytes(bed.block(3)), 0, "round {round}");
    }
}

#[test]
fn integration_agent_killed_when_mlockall_has_filled_scratch_takes_nothing_for_the_programs() {
    // In a child: the call concerns a whole process.
    let mut child = Child::fork(|| {
        let mut moments = Moments::new(0x5eed_0007);
        let memory = cut();
        let mut bed = Bed::start(Desk::new(), Userfaultfd::create(None).unwrap().0, true);
        bed.adopt(&memory);
        for round in 0..30 {
            // SAFETY: no byte changes.
            assert_eq!(unsafe { libc::mlockall(libc::MCL_CURRENT) }, 0);
            let out = run_killed(&mut bed, &mut moments, &memory, OUT);
            let mut page = 0;
            for (count, status) in out {
                assert!(matches!(status, Status::Moved | Status::Busy), "round {round}: {status:?}");
                for page in (page..page + count).filter(|_| status == Status::Moved) {
                    assert_eq!(bed.desk.staging.load_u64(SLOT_3 + page * PAGE_SIZE).unwrap(), page + 1);
                }
                page += count;
            }
            let back = run_killed(&mut bed, &mut moments, &memory, Op::MoveBack);
            assert_eq!(back, [(HUGE_PAGES, Status::Moved)], "round {round}");
            check(&memory);
            assert_eq!(pages_of(bed.block(3), Categories::PRESENT), 0, "round {round}");
            assert_eq!(locked_bytes(bed.block(3)), 0, "round {round}");
        }
        7
    });
    assert_eq!(child.wait().code(), Some(7));
}

#[test]
fn integration_agent_killed_while_it_brings_huge_pages_home_leaves_none_behind() {
    let Some(memory) = huge() else { return };
    let mut moments = Moments::new(0x5eed_0008);
    let mut bed = Bed::new();
    bed.adopt(&memory);
    (0..HUGE_PAGES).for_each(|page| bed.desk.staging.store_u64(SLOT_3 + page * PAGE_SIZE, page + 1).unwrap());
    let in_place = Op::Drop { in_place: true };
    for round in 0..60 {
        assert_eq!(bed.run(&memory, 0, HUGE_PAGES, in_place), [(HUGE_PAGES, Status::Moved)]);
        let home = run_killed(&mut bed, &mut moments, &memory, Op::FillHuge { slot: 3 });
        match (&home[..], present(&memory)) {
            ([(HUGE_PAGES, Status::MovedHuge)], HUGE_PAGES) => {}
            // Brought home by the one that was killed, or by nobody: then the pager does it.
            ([(HUGE_PAGES, Status::Failed)], HUGE_PAGES) => {}
            ([(HUGE_PAGES, Status::Failed)], 0) => {
                let copied = bed.uffd.copy(memory.addr(), &bed.desk.staging, SLOT_3, HUGE_BYTES, CopyMode::default());
                assert!(copied.unwrap().is_complete());
            }
            other => panic!("round {round}: {other:?}"),
        }
        check(&memory);
        settle(&mut bed);
        kill(&mut bed, Duration::from_micros(moments.below(LATEST_US)));
        settle(&mut bed);
        let kept = AddrRange { start: bed.block(SLOTS).start, len: HUGE_BLOCKS * HUGE_BYTES };
        assert_eq!(pages_of(kept, Categories::PRESENT), 0, "round {round}: what the dead one had made ahead of need");
    }
}
