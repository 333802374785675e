//! Each order of the pager, done by an agent that is a process.

use std::os::fd::AsFd;

use crate::agent_bed::{
    Bed, Desk, HUGE_BYTES, HUGE_PAGES, check, filled, huge, locked_bytes, pages_of, present, range_of,
};
use rustix::process::Signal;

use crate::common::{Child, become_nobody, hear, is_root, tell, wait_readable};
use uhmm_kernel_hook::own_memory::{self, RangeAdvice};
use uhmm_kernel_hook::pagemap::{self, Categories};
use uhmm_kernel_hook::process::vm_read;
use uhmm_kernel_hook::program::{ProgramAdvice, ProgramMemory};
use uhmm_kernel_hook::{AddrRange, CopyMode, PAGE_SIZE, SeqPacket, UffdEvent, Userfaultfd, Window, WpOutcome};
use uhmm_shared::agent::{DEAD_PAGERS, DIARY, Op, Order, Status, changed_word};
use uhmm_shared::words::Words;

const P: u64 = PAGE_SIZE;
const OUT: Op = Op::MoveOut { slot: 1 };
const DROP: Op = Op::Drop { in_place: false };
const DROP_IN_PLACE: Op = Op::Drop { in_place: true };
/// Where slot 1 lies in staging memory.
const SLOT_1: u64 = HUGE_BYTES;

#[test]
fn integration_agent_pages_leave_are_staged_and_come_back_and_all_of_it_can_be_repeated() {
    let (mut bed, memory) = Bed::with(8);
    for _ in 0..2 {
        // The same order again, as after the death of an agent.
        bed.desk.next_id = 1;
        assert_eq!(bed.run(&memory, 2, 4, OUT), [(4, Status::Moved)]);
        assert_eq!((present(&memory), bed.in_scratch(), bed.records()), (4, 4, 1));
        assert_eq!(bed.desk.staging.load_u64(SLOT_1 + 3 * P).unwrap(), 6);
        bed.desk.staging.fill(SLOT_1, HUGE_BYTES, 0).unwrap();
    }
    for _ in 0..2 {
        assert_eq!(bed.run(&memory, 2, 4, Op::MoveBack), [(4, Status::Moved)]);
    }
    check(&memory);
    assert_eq!((bed.in_scratch(), bed.records()), (0, 0));
}

#[test]
fn integration_agent_a_block_that_holds_pages_takes_no_others() {
    let (mut bed, memory) = Bed::with(8);
    assert_eq!(bed.run(&memory, 0, 4, OUT), [(4, Status::Moved)]);
    assert_eq!(bed.run(&memory, 4, 4, OUT), [(4, Status::Failed)]);
    assert_eq!((present(&memory), bed.in_scratch()), (4, 4), "nothing was touched");
    assert_eq!(bed.run(&memory, 4, 4, Op::MoveOut { slot: 2 }), [(4, Status::Moved)]);
    assert_eq!(bed.run(&memory, 0, 8, Op::MoveBack), [(8, Status::Moved)], "out of two blocks");
    check(&memory);
}

#[test]
fn integration_agent_holes_and_zero_pages_are_reported_and_never_staged() {
    let mut bed = Bed::new();
    let memory = ProgramMemory::private(4 * P).unwrap();
    memory.advise(0, 4 * P, ProgramAdvice::NoHugePage).unwrap();
    memory.store_u64(P, 9).unwrap();
    assert_eq!(memory.load_u64(2 * P).unwrap(), 0, "the kernel's zero page");
    bed.adopt(&memory);
    bed.desk.staging.fill(SLOT_1, 4 * P, 0xee).unwrap();
    let zero_data_zero = [(1, Status::Zero), (1, Status::Moved), (2, Status::Zero)];
    assert_eq!(bed.run(&memory, 0, 4, OUT), zero_data_zero);
    assert_eq!(bed.desk.staging.load_u8(SLOT_1 + 2 * P).unwrap(), 0xee);
    assert_eq!(bed.desk.staging.load_u64(SLOT_1 + P).unwrap(), 9);
    assert_eq!(present(&memory), 0, "the zero page is out too: a write must fault");
    bed.run(&memory, 0, 4, DROP);
    assert_eq!((bed.in_scratch(), bed.records()), (0, 0));
}

#[test]
fn integration_agent_a_page_shared_with_a_forked_child_is_separated_and_the_child_keeps_its_own() {
    let mut bed = Bed::new();
    let memory = filled(2);
    own_memory::advise(range_of(&memory), RangeAdvice::DoFork).unwrap();
    bed.adopt(&memory);
    let (socket, peer) = SeqPacket::pair().unwrap();
    let mut child = Child::fork(|| {
        hear(&peer);
        memory.load_u64(P).unwrap_or(0) as i32
    });
    assert_eq!(bed.run(&memory, 0, 2, OUT), [(2, Status::Moved)]);
    assert_eq!(bed.desk.staging.load_u64(SLOT_1 + P).unwrap(), 2);
    tell(&socket, b"read");
    assert_eq!(child.wait().code(), Some(2));
}

#[test]
fn integration_agent_memory_that_may_not_be_written_or_read_is_left_alone_copied_in_place_and_dropped() {
    for readable in [true, false] {
        let mut bed = Bed::new();
        let memory = filled(4);
        bed.adopt(&memory);
        memory.protect(0, 4 * P, readable, false).unwrap();
        assert_eq!(bed.run(&memory, 0, 4, OUT), [(4, Status::ReadOnly)]);
        assert_eq!(bed.run(&memory, 0, 4, Op::CopyOut { slot: 0 }), [(4, Status::Busy)], "not protected");
        assert_eq!(bed.uffd.write_protect(range_of(&memory), true, false).unwrap(), WpOutcome::Done);
        assert_eq!(bed.run(&memory, 0, 4, Op::CopyOut { slot: 0 }), [(4, Status::Moved)], "readable: {readable}");
        for page in 0..4 {
            assert_eq!(bed.desk.staging.load_u64(page * P).unwrap(), page + 1);
        }
        assert_eq!((present(&memory), bed.in_scratch()), (4, 0));
        assert_eq!(bed.run(&memory, 0, 4, DROP_IN_PLACE), [(4, Status::Moved)]);
        assert_eq!(present(&memory), 0);
    }
}

#[test]
fn integration_agent_what_is_dropped_in_place_is_in_the_diary_before_its_event() {
    let (mut bed, memory) = Bed::with(4);
    assert_eq!(bed.run(&memory, 1, 2, DROP_IN_PLACE), [(2, Status::Moved)]);
    let dropped = (memory.addr() + P, memory.addr() + 3 * P);
    let events = bed.take_events();
    assert!(matches!(events[..], [UffdEvent::Remove { start, end }] if (start, end) == dropped), "{events:?}");
    let word = |at: usize| bed.desk.words.load(DIARY + at, std::sync::atomic::Ordering::Acquire);
    assert_eq!((word(0), word(1)), dropped);
    assert_eq!(present(&memory), 2);
    // Where nothing is there is nothing to drop, and no event that could be taken for the program's.
    assert_eq!(bed.run(&memory, 1, 2, DROP_IN_PLACE), [(2, Status::Moved)]);
    assert!(bed.take_events().is_empty());
}

#[test]
fn integration_agent_write_protection_outlives_every_look_at_a_page() {
    let (mut bed, memory) = Bed::with(3);
    let range = range_of(&memory);
    assert_eq!(bed.uffd.write_protect(range, true, false).unwrap(), WpOutcome::Done);
    assert_eq!(bed.run(&memory, 0, 3, Op::CopyOut { slot: 0 }), [(3, Status::Moved)]);
    let pagemap = pagemap::open_own_pagemap().unwrap();
    let written = pagemap::scan(pagemap.as_fd(), range, Categories::WRITTEN).unwrap();
    assert_eq!(written, [], "a page that is not write-protected any more counts as written");
}

#[test]
fn integration_agent_pages_find_their_way_back_to_memory_that_may_not_be_written_any_more() {
    let (mut bed, memory) = Bed::with(4);
    assert_eq!(bed.run(&memory, 0, 4, OUT), [(4, Status::Moved)]);
    memory.protect(P, 2 * P, true, false).unwrap();
    assert_eq!(bed.run(&memory, 0, 4, Op::MoveBack), [(4, Status::Moved)]);
    check(&memory);
    assert_eq!((bed.in_scratch(), bed.records()), (0, 0));
}

/// This thread, and whoever it starts from now on, finds no memory when pages shall be moved (UFFDIO_MOVE).
fn without_memory_for_moves() {
    const UFFDIO_MOVE: u32 = 0xc028_aa05;
    let step = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let load = |offset: u32| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let unless = |value: u32, skip: u8| libc::sock_filter {
        jf: skip,
        ..step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value)
    };
    let answer = |what: u32| step(libc::BPF_RET | libc::BPF_K, what);
    // Number of the call, lower half of its second argument.
    let (number, command) = (load(0), load(24));
    let mut steps = [
        number,
        unless(libc::SYS_ioctl as u32, 3),
        command,
        unless(UFFDIO_MOVE, 1),
        answer(libc::SECCOMP_RET_ERRNO | libc::ENOMEM as u32),
        answer(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: a program that lives through the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program), 0);
    }
}

/// Nobody tells when there is memory: the pager knows how to wait, and the agent has other things to do.
#[test]
fn integration_agent_pages_that_there_is_no_memory_for_stay_in_scratch_and_keep_nobody_waiting() {
    let (mut bed, memory) = Bed::with(8);
    assert_eq!(bed.run(&memory, 0, 6, OUT), [(6, Status::Moved)]);
    without_memory_for_moves();
    assert!(bed.agent().pidfd().signal(Signal::KILL).unwrap());
    wait_readable(bed.agent().pidfd().as_fd());
    bed.start_agent();
    assert_eq!(bed.run(&memory, 0, 6, Op::MoveBack), [(6, Status::NoMemory)]);
    assert_eq!((present(&memory), bed.in_scratch(), bed.records()), (2, 6, 1), "nothing is lost");
    let block = bed.block(1).start;
    let mut first = [0; 8];
    assert_eq!(vm_read(std::process::id(), block + 5 * P, &mut first).unwrap(), 8);
    assert_eq!(u64::from_ne_bytes(first), 6);
}

/// Poison says that content is lost: it is no hole, which would be zero on a device.
#[test]
fn integration_agent_poison_is_not_taken_for_a_hole() {
    let (mut bed, memory) = Bed::with(4);
    memory.advise(P, P, ProgramAdvice::DontNeed).unwrap();
    let poisoned = AddrRange { start: memory.addr() + P, len: P };
    assert!(bed.uffd.poison(poisoned).unwrap().is_complete());
    let taken = [(1, Status::Moved), (1, Status::Failed), (2, Status::Moved)];
    assert_eq!(bed.run(&memory, 0, 4, OUT), taken);
    assert_eq!(bed.run(&memory, 0, 4, Op::MoveBack), [(4, Status::Moved)]);
    let found = [0, 2, 3].map(|page| memory.load_u64(page * P).unwrap());
    assert_eq!(found, [1, 3, 4]);
    assert_eq!(bed.uffd.write_protect(range_of(&memory), true, false).unwrap(), WpOutcome::Done);
    let copied = [(1, Status::Moved), (1, Status::Busy), (2, Status::Moved)];
    assert_eq!(bed.run(&memory, 0, 4, Op::CopyOut { slot: 0 }), copied);
    assert!(memory.access_faults(P, false).unwrap(), "it is poison still");
}

#[test]
fn integration_agent_pages_find_their_way_to_where_the_program_has_moved_its_memory() {
    let (mut bed, memory) = Bed::with(4);
    assert_eq!(bed.run(&memory, 0, 4, OUT), [(4, Status::Moved)]);
    let moved = memory.remap(0, 4 * P, false, None).unwrap();
    assert_ne!(moved.addr(), memory.addr());
    assert_eq!(bed.run(&memory, 0, 4, Op::MoveBack), [(4, Status::Gone)], "the old place");
    assert_eq!(bed.in_scratch(), 4, "nothing is lost");
    assert_eq!(bed.run(&moved, 0, 4, Op::MoveBack), [(4, Status::Moved)]);
    check(&moved);
    assert_eq!((bed.in_scratch(), bed.records()), (0, 0));
}

#[test]
fn integration_agent_pages_whose_place_is_unmapped_stay_in_scratch_until_they_are_dropped() {
    let (mut bed, memory) = Bed::with(4);
    assert_eq!(bed.run(&memory, 0, 4, OUT), [(4, Status::Moved)]);
    memory.unmap(2 * P, 2 * P).unwrap();
    assert_eq!(bed.run(&memory, 0, 4, Op::MoveBack), [(2, Status::Moved), (2, Status::Gone)]);
    assert_eq!((memory.load_u64(0).unwrap(), memory.load_u64(P).unwrap()), (1, 2));
    assert_eq!((bed.in_scratch(), bed.records()), (2, 1));
    assert_eq!(bed.desk.ask(2, 0, 2, DROP), [(2, Status::Moved)]);
    assert_eq!((bed.in_scratch(), bed.records()), (0, 0));
}

#[test]
fn integration_agent_a_newer_page_is_never_replaced_by_the_one_that_was_taken_out() {
    let (mut bed, memory) = Bed::with(4);
    assert_eq!(bed.run(&memory, 0, 4, OUT), [(4, Status::Moved)]);
    let newer = Window::anonymous(P).unwrap();
    newer.store_u64(0, 77).unwrap();
    assert!(bed.uffd.copy(memory.addr() + P, &newer, 0, P, CopyMode::default()).unwrap().is_complete());
    assert_eq!(bed.run(&memory, 0, 4, Op::MoveBack), [(4, Status::Moved)]);
    let found: Vec<u64> = (0..4).map(|page| memory.load_u64(page * P).unwrap()).collect();
    assert_eq!(found, [1, 77, 3, 4]);
    assert_eq!((bed.in_scratch(), bed.records()), (0, 0));
}

#[test]
fn integration_agent_memory_that_is_gone_or_not_managed_is_never_touched() {
    let mut bed = Bed::new();
    let memory = filled(4);
    assert_eq!(bed.run(&memory, 0, 4, OUT), [(4, Status::Gone)], "nobody registered it");
    assert_eq!(bed.run(&memory, 0, 4, DROP_IN_PLACE), [(4, Status::Moved)]);
    check(&memory);
    bed.adopt(&memory);
    memory.unmap(2 * P, 2 * P).unwrap();
    assert_eq!(bed.run(&memory, 0, 4, OUT), [(2, Status::Moved), (2, Status::Gone)]);
    assert_eq!(bed.run(&memory, 0, 4, Op::CopyOut { slot: 0 }), [(2, Status::Zero), (2, Status::Gone)]);
    bed.run(&memory, 0, 4, Op::MoveBack);
    assert_eq!(present(&memory), 2);
}

#[test]
fn integration_agent_orders_that_no_living_pager_gave_are_refused() {
    let (mut bed, memory) = Bed::with(4);
    bed.desk.words.store(DEAD_PAGERS, 5, std::sync::atomic::Ordering::Release);
    assert_eq!(bed.run(&memory, 0, 4, OUT), [(4, Status::Failed)], "a dead one's");
    bed.desk.next_id = 6;
    let good = Order { id: 6, region: 1, first_page: 0, addr: memory.addr(), page_count: 4, op: OUT }.encode();
    for (word, value) in [(3, memory.addr() + 1), (3, !4095), (4, 513), (4, 0), (5, 9), (5, 1 | 16 << 32)] {
        let mut bad = good;
        bad[word] = value;
        bed.desk.give_raw(&bad);
        let done = bed.desk.answer();
        assert_eq!((done.id, bed.desk.runs(done, 512)), (6, vec![(512, Status::Failed)]), "word {word}: {value:#x}");
    }
    check(&memory);
    assert_eq!(bed.run(&memory, 0, 4, OUT), [(4, Status::Moved)]);
}

#[test]
fn integration_agent_a_huge_page_stays_huge_both_ways() {
    let Some(memory) = huge() else { return };
    let mut bed = Bed::new();
    bed.adopt(&memory);
    let is_huge = || pages_of(range_of(&memory), Categories::HUGE) == HUGE_PAGES;
    assert_eq!(bed.run(&memory, 0, HUGE_PAGES, OUT), [(HUGE_PAGES, Status::MovedHuge)]);
    assert_eq!((present(&memory), bed.in_scratch()), (0, HUGE_PAGES));
    assert_eq!(bed.desk.staging.load_u64(SLOT_1 + 511 * P).unwrap(), 512);
    assert_eq!(bed.run(&memory, 0, HUGE_PAGES, Op::MoveBack), [(HUGE_PAGES, Status::Moved)]);
    assert!(is_huge());
    check(&memory);
    assert_eq!(bed.run(&memory, 0, HUGE_PAGES, OUT), [(HUGE_PAGES, Status::MovedHuge)]);
    assert_eq!(bed.run(&memory, 0, HUGE_PAGES, DROP), [(HUGE_PAGES, Status::Moved)]);
    assert_eq!((bed.in_scratch(), bed.records()), (0, 0));
    bed.desk.staging.store_u64(5 * P, 77).unwrap();
    bed.desk.staging.store_u64(511 * P, 78).unwrap();
    let home = bed.run(&memory, 0, HUGE_PAGES, Op::FillHuge { slot: 0 });
    if home == [(HUGE_PAGES, Status::Failed)] {
        eprintln!("skipped: the kernel had no second huge page");
        return;
    }
    assert_eq!(home, [(HUGE_PAGES, Status::MovedHuge)]);
    assert!(is_huge());
    assert_eq!((memory.load_u64(5 * P).unwrap(), memory.load_u64(511 * P).unwrap()), (77, 78));
}

#[test]
fn integration_agent_a_huge_page_is_made_of_no_other_range_than_a_huge_page() {
    let Some(memory) = huge() else { return };
    let mut bed = Bed::new();
    bed.adopt(&memory);
    let fill = Op::FillHuge { slot: 0 };
    assert_eq!(bed.run(&memory, 0, HUGE_PAGES, fill), [(HUGE_PAGES, Status::Failed)], "something is there");
    check(&memory);
    assert_eq!(bed.run(&memory, 0, 256, fill), [(256, Status::Failed)]);
    assert_eq!(bed.desk.ask(0, memory.addr() + P, HUGE_PAGES, fill), [(HUGE_PAGES, Status::Failed)]);
    check(&memory);
}

#[test]
fn integration_agent_nothing_is_put_where_the_program_has_dropped_pages_since_the_order_was_given() {
    let (mut bed, memory) = Bed::with(8);
    assert_eq!(bed.run(&memory, 2, 4, OUT), [(4, Status::Moved)]);
    bed.desk.gate().end_reading(2);
    assert_eq!(bed.run(&memory, 2, 4, Op::MoveBack), [(4, Status::Gone)]);
    assert_eq!((present(&memory), bed.in_scratch()), (4, 4), "nothing is lost: the pager may ask again");
    assert_eq!(bed.run(&memory, 2, 4, Op::MoveBack), [(4, Status::Moved)]);
    check(&memory);
}

#[test]
fn integration_agent_nothing_is_taken_from_where_the_program_has_mapped_other_memory_since_the_order_was_given() {
    for op in [OUT, DROP_IN_PLACE] {
        let (mut bed, memory) = Bed::with(4);
        let (at, id) = (bed.desk.counts().0, bed.desk.next_id);
        bed.desk.words.store(changed_word(at), id, std::sync::atomic::Ordering::Release);
        let runs = bed.run(&memory, 0, 4, op);
        assert!(op != OUT || runs == [(4, Status::Gone)], "{runs:?}");
        assert_eq!((present(&memory), bed.in_scratch()), (4, 0), "{op:?}");
        // It was about that order alone.
        assert_eq!(bed.run(&memory, 0, 4, op), [(4, Status::Moved)]);
        assert_eq!(present(&memory), 0);
    }
}

#[test]
fn integration_agent_nothing_is_taken_out_while_the_pager_reads() {
    let (mut bed, memory) = Bed::with(4);
    assert!(bed.desk.gate().begin_reading());
    let id = bed.desk.give(0, memory.addr(), 4, OUT);
    // It waits for as long as reading takes; nothing else tells that it has begun to.
    for _ in 0..1000 {
        assert!(bed.desk.try_answer().is_none() && present(&memory) == 4);
        std::thread::yield_now();
    }
    bed.desk.gate().end_reading(0);
    let done = bed.desk.answer();
    assert_eq!((done.id, bed.desk.runs(done, 4)), (id, vec![(4, Status::Moved)]));
}

#[test]
fn integration_agent_a_huge_page_is_not_put_where_the_program_has_dropped_it_since() {
    let mut bed = Bed::new();
    let memory = ProgramMemory::private_aligned(HUGE_BYTES).unwrap();
    bed.adopt(&memory);
    bed.desk.staging.store_u64(5 * P, 77).unwrap();
    bed.desk.gate().end_reading(1);
    let refused = bed.run(&memory, 0, HUGE_PAGES, Op::FillHuge { slot: 0 });
    assert_eq!((refused, present(&memory)), (vec![(HUGE_PAGES, Status::Failed)], 0));
}

#[test]
fn integration_agent_locked_memory_moves_like_any_other_and_nothing_stays_locked() {
    let mut bed = Bed::new();
    let memory = filled(4);
    memory.lock(0, 2 * P).unwrap();
    bed.adopt(&memory);
    assert_eq!(bed.run(&memory, 0, 4, OUT), [(4, Status::Moved)], "two mappings, one of them locked");
    assert_eq!((present(&memory), bed.desk.staging.load_u64(SLOT_1 + 3 * P).unwrap()), (0, 4));
    assert_eq!(locked_bytes(bed.block(1)), 2 * P, "the block is like the memory");
    bed.run(&memory, 0, 4, Op::MoveBack);
    check(&memory);
    assert_eq!((locked_bytes(bed.block(1)), locked_bytes(range_of(&memory))), (0, 2 * P));
}

#[test]
fn integration_agent_locked_memory_that_may_not_be_written_is_dropped_too() {
    let mut bed = Bed::new();
    let memory = filled(4);
    memory.lock(0, 4 * P).unwrap();
    memory.protect(0, 4 * P, true, false).unwrap();
    bed.adopt(&memory);
    bed.run(&memory, 0, 4, Op::CopyOut { slot: 0 });
    assert_eq!(bed.run(&memory, 0, 4, DROP_IN_PLACE), [(4, Status::Moved)]);
    assert_eq!(present(&memory), 0, "or the program would go on with what the device has by now");
}

#[test]
fn integration_agent_locked_memory_beyond_the_limit_stays_and_says_why() {
    let mut child = Child::fork(|| {
        if is_root() {
            become_nobody();
        }
        let limit = libc::rlimit { rlim_cur: 4 * P, rlim_max: 4 * P };
        // SAFETY: one structure that lives through the call.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) }, 0);
        let mut bed = Bed::start(Desk::new(), Userfaultfd::create_user_mode_only().unwrap(), true);
        let memory = filled(4);
        bed.adopt(&memory);
        memory.lock(0, 4 * P).unwrap();
        assert_eq!(bed.run(&memory, 0, 4, OUT), [(4, Status::LockLimit)]);
        check(&memory);
        assert_eq!((bed.in_scratch(), locked_bytes(bed.block(1))), (0, 0));
        0
    });
    assert_eq!(child.wait().code(), Some(0));
}

/// In a child: the calls concern a whole process.
fn under_mlockall(flags: libc::c_int, before: bool, body: fn(Bed, ProgramMemory)) {
    let mut child = Child::fork(|| {
        // SAFETY: no byte changes.
        let lock = || assert_eq!(unsafe { libc::mlockall(flags) }, 0, "mlockall");
        let memory = filled(8);
        if before {
            lock();
        }
        let mut bed = Bed::start(Desk::new(), Userfaultfd::create(None).unwrap().0, true);
        bed.adopt(&memory);
        if !before {
            lock();
        }
        body(bed, memory);
        0
    });
    assert_eq!(child.wait().code(), Some(0));
}

#[test]
fn integration_agent_pages_move_though_mlockall_has_filled_scratch() {
    under_mlockall(libc::MCL_CURRENT, false, |mut bed, memory| {
        assert_eq!(pages_of(bed.block(1), Categories::PRESENT), HUGE_PAGES, "mlockall fills what is writable");
        assert_eq!(bed.run(&memory, 1, 4, OUT), [(4, Status::Moved)]);
        assert_eq!(present(&memory), 4);
        for page in 1..5 {
            assert_eq!(bed.desk.staging.load_u64(SLOT_1 + (page - 1) * P).unwrap(), page + 1);
        }
        assert_eq!(bed.run(&memory, 1, 4, Op::MoveBack), [(4, Status::Moved)]);
        check(&memory);
        assert_eq!(bed.run(&memory, 1, 4, OUT), [(4, Status::Moved)]);
        assert_eq!(bed.run(&memory, 1, 4, DROP), [(4, Status::Moved)]);
        let block = bed.block(1);
        assert_eq!((pages_of(block, Categories::PRESENT), locked_bytes(block)), (0, 0));
    });
}

#[test]
fn integration_agent_scratch_is_not_locked_though_mlockall_locks_all_that_is_mapped() {
    under_mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE, true, |mut bed, memory| {
        let (scratch, _) = bed.seat().ranges()[1];
        assert_eq!((locked_bytes(scratch), pages_of(scratch, Categories::PRESENT)), (0, 0));
        assert_eq!(bed.run(&memory, 1, 4, OUT), [(4, Status::Moved)]);
        assert_eq!(bed.desk.staging.load_u64(SLOT_1 + 3 * P).unwrap(), 5);
        assert_eq!(bed.run(&memory, 1, 4, Op::MoveBack), [(4, Status::Moved)]);
        check(&memory);
        assert_eq!((locked_bytes(scratch), pages_of(scratch, Categories::PRESENT)), (0, 0));
    });
}
