//! Private memory: what the SDK's agent counts on when it takes pages out of its own process and puts them back. Each of these
//! is the kernel's behaviour, not ours; a kernel that changes one of them is found here and not in lost bytes.

use std::os::fd::AsFd;

use crate::common::{Child, become_nobody, hear, is_root, tell, wait_readable};
use uhmm_kernel_hook::own_memory::{self, RangeAdvice};
use uhmm_kernel_hook::pagemap::{self, Categories};
use uhmm_kernel_hook::program::{ProgramAdvice, ProgramMemory};
use uhmm_kernel_hook::{
    AddrRange, Advice, CopyMode, Features, FillOutcome, FillStop, PAGE_SIZE, RegisterMode, SendStatus, SeqPacket,
    UffdEvent, UffdState, Userfaultfd, Window, WpOutcome, process,
};

const HUGE_BYTES: u64 = 2 << 20;
const MISSING_WP: RegisterMode = RegisterMode::MISSING.union(RegisterMode::WP);
const DONE: Option<FillStop> = None;
const EINVAL: Option<FillStop> = Some(FillStop::Other(libc::EINVAL));

fn uffd(features: Features) -> Userfaultfd {
    let (uffd, _) = Userfaultfd::create(None).unwrap();
    uffd.api(features | Features::MOVE).unwrap();
    uffd
}

fn range_of(memory: &ProgramMemory) -> AddrRange {
    AddrRange::new(memory.addr(), memory.len()).unwrap()
}

/// Small pages, each full of its number plus one.
fn pages(page_count: u64) -> ProgramMemory {
    let memory = ProgramMemory::private(page_count * PAGE_SIZE).unwrap();
    memory.advise(0, memory.len(), ProgramAdvice::NoHugePage).unwrap();
    for page in 0..page_count {
        memory.write(page * PAGE_SIZE, &[page as u8 + 1; PAGE_SIZE as usize]).unwrap();
    }
    memory
}

fn huge_memory() -> ProgramMemory {
    let memory = ProgramMemory::private_aligned(HUGE_BYTES).unwrap();
    memory.advise(0, HUGE_BYTES, ProgramAdvice::HugePage).unwrap();
    memory
}

/// Scratch as the agent makes it: write protection only, so that holes in it are the kernel's business.
fn scratch(uffd: &Userfaultfd, page_count: u64) -> Window {
    let window = Window::anonymous(page_count * PAGE_SIZE).unwrap();
    uffd.register(window.range(), RegisterMode::WP).unwrap();
    window
}

fn kinds(range: AddrRange) -> Vec<(u64, Categories)> {
    let any = Categories::PRESENT | Categories::SWAPPED | Categories::PFNZERO | Categories::HUGE | Categories::FILE;
    let pagemap = pagemap::open_own_pagemap().unwrap();
    let runs = pagemap::scan(pagemap.as_fd(), range, any).unwrap();
    runs.iter().map(|run| ((run.end - run.start) / PAGE_SIZE, run.categories)).collect()
}

/// Moves one page; why it did not.
fn move_page(uffd: &Userfaultfd, to: u64, from: u64) -> Option<FillStop> {
    uffd.move_pages(to, from, PAGE_SIZE, true).unwrap().stop
}

#[test]
fn integration_pages_move_out_and_back_with_holes_and_zero_pages() {
    let uffd = uffd(Features::empty());
    let memory = pages(4);
    memory.advise(PAGE_SIZE, 2 * PAGE_SIZE, ProgramAdvice::DontNeed).unwrap();
    assert_eq!(memory.load_u64(2 * PAGE_SIZE).unwrap(), 0, "a read makes it the kernel's page of zeros");
    uffd.register(range_of(&memory), MISSING_WP).unwrap();
    let scratch = scratch(&uffd, 4);
    let outcome = uffd.move_pages(scratch.addr(), memory.addr(), 4 * PAGE_SIZE, true).unwrap();
    assert!(outcome.is_complete(), "{outcome:?}");
    assert_eq!(kinds(range_of(&memory)), []);
    assert!(kinds(scratch.range()).iter().any(|(_, kind)| kind.contains(Categories::PFNZERO)), "zeros stay shared");
    assert_eq!((scratch.load_u8(0).unwrap(), scratch.load_u8(3 * PAGE_SIZE).unwrap()), (1, 4));
    assert!(scratch.compare(2 * PAGE_SIZE, &[0; PAGE_SIZE as usize]).unwrap());
    // Each by itself, as after a failed migration; the hole is not brought home.
    for page in [0, 2, 3] {
        assert_eq!(move_page(&uffd, memory.addr() + page * PAGE_SIZE, scratch.addr() + page * PAGE_SIZE), DONE);
    }
    assert_eq!((memory.load_u64(0).unwrap() as u8, memory.load_u64(3 * PAGE_SIZE).unwrap() as u8), (1, 4));
    assert_eq!(memory.load_u64(2 * PAGE_SIZE).unwrap(), 0);
}

#[test]
fn integration_a_page_that_two_processes_share_is_busy_until_it_is_made_its_own() {
    let uffd = uffd(Features::empty());
    let memory = pages(1);
    let (socket, peer) = SeqPacket::pair().unwrap();
    let mut child = Child::fork(|| {
        tell(&peer, b"forked");
        hear(&peer);
        memory.load_u64(0).unwrap() as u8 as i32
    });
    hear(&socket);
    let scratch = scratch(&uffd, 1);
    assert_eq!(move_page(&uffd, scratch.addr(), memory.addr()), Some(FillStop::Busy));
    own_memory::advise(range_of(&memory), RangeAdvice::PopulateWrite).unwrap();
    assert_eq!(move_page(&uffd, scratch.addr(), memory.addr()), DONE);
    scratch.store_u8(0, 99).unwrap();
    tell(&socket, b"read");
    assert_eq!(child.wait().code(), Some(1), "the child keeps its own bytes");
}

#[test]
fn integration_both_places_must_be_locked_alike() {
    let uffd = uffd(Features::empty());
    let (memory, scratch) = (pages(1), scratch(&uffd, 1));
    uffd.register(range_of(&memory), MISSING_WP).unwrap();
    memory.lock(0, PAGE_SIZE).unwrap();
    assert_eq!(move_page(&uffd, scratch.addr(), memory.addr()), EINVAL);
    own_memory::lock(scratch.range(), true).unwrap();
    assert_eq!(kinds(scratch.range()), [], "locking fetches nothing");
    assert_eq!(move_page(&uffd, scratch.addr(), memory.addr()), DONE);
    assert_eq!(scratch.load_u8(0).unwrap(), 1);
    assert_eq!(move_page(&uffd, memory.addr(), scratch.addr()), DONE);
    own_memory::lock(scratch.range(), false).unwrap();
    assert_eq!(memory.load_u64(0).unwrap() as u8, 1);
}

#[test]
fn integration_read_only_pages_do_not_move_but_are_copied_dropped_and_filled() {
    let uffd = uffd(Features::empty());
    let (memory, scratch) = (pages(2), scratch(&uffd, 1));
    uffd.register(range_of(&memory), MISSING_WP).unwrap();
    memory.protect(0, 2 * PAGE_SIZE, true, false).unwrap();
    assert_eq!(move_page(&uffd, scratch.addr(), memory.addr()), EINVAL);
    let mut bytes = [0; 2 * PAGE_SIZE as usize];
    assert_eq!(process::vm_read(std::process::id(), memory.addr(), &mut bytes).unwrap(), bytes.len());
    assert_eq!((bytes[0], bytes[PAGE_SIZE as usize]), (1, 2));
    own_memory::advise(range_of(&memory), RangeAdvice::DontNeed).unwrap();
    assert_eq!(kinds(range_of(&memory)), []);
    memory.protect(PAGE_SIZE, PAGE_SIZE, false, false).unwrap();
    let copy = Window::anonymous(2 * PAGE_SIZE).unwrap();
    copy.write(0, &bytes).unwrap();
    // As the two have different protection by now, they are two mappings.
    for page in [0, PAGE_SIZE] {
        let outcome = uffd.copy(memory.addr() + page, &copy, page, PAGE_SIZE, CopyMode::default()).unwrap();
        assert!(outcome.is_complete(), "{outcome:?}");
    }
    assert!(memory.access_faults(0, true).unwrap() && !memory.access_faults(0, false).unwrap());
    assert!(memory.access_faults(PAGE_SIZE, false).unwrap());
    memory.protect(0, 2 * PAGE_SIZE, true, true).unwrap();
    assert_eq!((memory.load_u64(0).unwrap() as u8, memory.load_u64(PAGE_SIZE).unwrap() as u8), (1, 2));
}

#[test]
fn integration_a_place_that_is_taken_or_not_registered_is_refused() {
    let uffd = uffd(Features::empty());
    let (memory, scratch) = (pages(1), scratch(&uffd, 1));
    scratch.store_u8(0, 50).unwrap();
    assert_eq!(move_page(&uffd, scratch.addr(), memory.addr()), Some(FillStop::Exists));
    let plain = Window::anonymous(PAGE_SIZE).unwrap();
    assert_eq!(move_page(&uffd, plain.addr(), memory.addr()), EINVAL);
    assert_eq!((memory.load_u64(0).unwrap() as u8, scratch.load_u8(0).unwrap()), (1, 50), "nothing was replaced");
}

#[test]
fn integration_a_huge_page_stays_huge_out_and_back_and_is_recycled() {
    let uffd = uffd(Features::empty());
    let (memory, place) = (huge_memory(), huge_memory());
    memory.store_u64(5 * PAGE_SIZE, 77).unwrap();
    let one_huge_page = [(512, Categories::PRESENT | Categories::HUGE)];
    if kinds(range_of(&memory)) != one_huge_page {
        eprintln!("skipped: the kernel gives no transparent huge page now (see /sys/kernel/mm/transparent_hugepage)");
        return;
    }
    uffd.register(range_of(&memory), MISSING_WP).unwrap();
    uffd.register(range_of(&place), RegisterMode::WP).unwrap();
    assert!(uffd.move_pages(place.addr(), memory.addr(), HUGE_BYTES, true).unwrap().is_complete());
    assert_eq!((kinds(range_of(&place)), kinds(range_of(&memory))), (one_huge_page.into(), vec![]));
    assert_eq!(place.load_u64(5 * PAGE_SIZE).unwrap(), 77);
    place.write(0, &[9; HUGE_BYTES as usize]).unwrap();
    assert!(uffd.move_pages(memory.addr(), place.addr(), HUGE_BYTES, false).unwrap().is_complete());
    assert_eq!(kinds(range_of(&memory)), one_huge_page);
    assert_eq!(memory.load_u64(HUGE_BYTES - 8).unwrap(), u64::from_ne_bytes([9; 8]));
    // A part of it moves too: then it is split.
    assert_eq!(move_page(&uffd, place.addr(), memory.addr()), DONE);
    assert_eq!(kinds(range_of(&memory)), [(511, Categories::PRESENT)]);
}

#[test]
fn integration_dropping_sends_an_event_where_registered_and_none_where_not() {
    let uffd = uffd(Features::EVENT_REMOVE);
    let (memory, scratch) = (pages(1), scratch(&uffd, 1));
    assert_eq!(move_page(&uffd, scratch.addr(), memory.addr()), DONE);
    let mut events = Vec::new();
    // As the agent empties a block.
    uffd.unregister(scratch.range()).unwrap();
    scratch.advise(0, PAGE_SIZE, Advice::DontNeed).unwrap();
    uffd.register(scratch.range(), RegisterMode::WP).unwrap();
    assert_eq!(scratch.load_u8(0).unwrap(), 0, "and a touch of it is no fault of ours");
    assert_eq!(uffd.read_events(&mut events).unwrap(), 0);
    // With the registration, the call waits until somebody has read the event.
    std::thread::scope(|threads| {
        let dropping = threads.spawn(|| own_memory::advise(scratch.range(), RangeAdvice::DontNeed));
        wait_readable(uffd.as_fd());
        assert_eq!(move_page(&uffd, scratch.addr(), memory.addr()), Some(FillStop::Again), "an event is unread");
        assert_eq!(uffd.read_events(&mut events).unwrap(), 1);
        dropping.join().unwrap().unwrap();
    });
    let AddrRange { start: first, .. } = scratch.range();
    assert!(matches!(events[..], [UffdEvent::Remove { start, .. }] if start == first), "{events:?}");
}

#[test]
fn integration_a_registration_is_found_without_changing_anything() {
    let uffd = uffd(Features::MISSING_SHMEM);
    let memory = pages(2);
    let whole = range_of(&memory);
    let ask = |range: AddrRange| uffd.cont(range, false, true).unwrap();
    let not_there = FillOutcome { done_bytes: 0, stop: Some(FillStop::Gone) };
    assert_eq!(ask(whole), not_there);
    uffd.register(whole, MISSING_WP).unwrap();
    assert_eq!(ask(whole), FillOutcome { done_bytes: 0, stop: EINVAL });
    memory.unmap(PAGE_SIZE, PAGE_SIZE).unwrap();
    assert_eq!(ask(whole.sub_pages(1, 1).unwrap()), not_there);
    let _other = memory.map_fresh(PAGE_SIZE, PAGE_SIZE).unwrap();
    assert_eq!(ask(whole.sub_pages(1, 1).unwrap()), not_there, "other memory in the same place is not ours");
    assert_eq!(memory.load_u64(0).unwrap() as u8, 1);
}

#[test]
fn integration_an_ordinary_user_moves_pages_too() {
    let body = || {
        let uffd = Userfaultfd::create_user_mode_only().unwrap();
        uffd.api(Features::MOVE | Features::EVENT_REMOVE).unwrap();
        let (memory, scratch) = (pages(1), scratch(&uffd, 1));
        uffd.register(range_of(&memory), MISSING_WP).unwrap();
        assert_eq!(move_page(&uffd, scratch.addr(), memory.addr()), DONE);
        assert_eq!(scratch.load_u8(7).unwrap(), 1);
        assert_eq!(move_page(&uffd, memory.addr(), scratch.addr()), DONE);
        assert_eq!(kinds(range_of(&memory)), [(1, Categories::PRESENT)]);
        i32::from(memory.load_u64(0).unwrap() as u8)
    };
    let mut child = Child::fork(|| {
        if is_root() {
            become_nobody();
        }
        body()
    });
    assert_eq!(child.wait().code(), Some(1));
}

#[test]
fn integration_a_process_without_pidfd_is_known_to_be_dead_by_a_call_that_changes_nothing() {
    let (socket, peer) = SeqPacket::pair().unwrap();
    let mut child = Child::fork(|| {
        let page = Window::anonymous(PAGE_SIZE).unwrap();
        let uffd = uffd(Features::PAGEFAULT_FLAG_WP);
        uffd.register(page.range(), RegisterMode::MISSING).unwrap();
        assert_eq!(peer.send(&page.addr().to_ne_bytes(), &[uffd.as_fd()]).unwrap(), SendStatus::Sent);
        hear(&peer);
        0
    });
    let (addr, mut fds) = hear(&socket);
    let childs = Userfaultfd::from_fd(fds.remove(0)).unwrap();
    let page = AddrRange::new(u64::from_ne_bytes(addr.try_into().unwrap()), PAGE_SIZE).unwrap();
    assert_eq!(childs.state().unwrap(), UffdState::Quiet);
    assert_eq!(childs.write_protect(page, false, true).unwrap(), WpOutcome::Gone, "alive, and not registered for it");
    let source = pages(1);
    assert_eq!(move_page(&childs, page.start, source.addr()), EINVAL, "only the process itself moves its pages");
    tell(&socket, b"end");
    assert_eq!(child.wait().code(), Some(0));
    assert_eq!(childs.write_protect(page, false, true).unwrap(), WpOutcome::NoProcess);
    assert_eq!(childs.state().unwrap(), UffdState::NoProcess);
}

#[test]
fn integration_moving_a_mapping_sends_its_new_place_and_keeps_it_registered() {
    let uffd = uffd(Features::EVENT_REMAP | Features::EVENT_UNMAP);
    let memory = pages(4);
    let old = range_of(&memory);
    uffd.register(old, MISSING_WP).unwrap();
    let next = |count: usize| {
        let mut events = Vec::new();
        while events.len() < count {
            wait_readable(uffd.as_fd());
            uffd.read_events(&mut events).unwrap();
        }
        events
    };
    std::thread::scope(|threads| {
        let moving = threads.spawn(|| memory.remap(PAGE_SIZE, 2 * PAGE_SIZE, false, None).unwrap());
        wait_readable(uffd.as_fd());
        assert_eq!(uffd.state().unwrap(), UffdState::EventUnread);
        let events = next(2);
        let moved = moving.join().unwrap();
        let gone = old.sub_pages(1, 2).unwrap();
        let place = (gone.start, moved.addr(), 2 * PAGE_SIZE);
        assert!(matches!(events[0], UffdEvent::Remap { from, to, len } if (from, to, len) == place), "{events:?}");
        assert!(matches!(events[1], UffdEvent::Unmap { start, end } if (start, end) == (gone.start, gone.end())));
        assert_eq!(moved.load_u64(PAGE_SIZE).unwrap() as u8, 3);
        let outcome = uffd.cont(range_of(&moved), false, true).unwrap();
        assert_eq!(outcome.stop, EINVAL, "it still is registered in its new place");
        assert_eq!(uffd.state().unwrap(), UffdState::Quiet);
        // Dropping what is registered waits for its reader.
        let dropping = threads.spawn(|| drop(moved));
        assert!(matches!(next(1)[..], [UffdEvent::Unmap { .. }]));
        dropping.join().unwrap();
    });
    uffd.unregister(old.sub_pages(0, 1).unwrap()).unwrap();
    uffd.unregister(old.sub_pages(3, 1).unwrap()).unwrap();
}

#[test]
fn integration_memory_mapped_where_other_memory_was_is_told_apart_by_waiting_for_quiet() {
    let uffd = uffd(Features::EVENT_UNMAP);
    let memory = pages(2);
    let whole = range_of(&memory);
    uffd.register(whole, MISSING_WP).unwrap();
    std::thread::scope(|threads| {
        let unmapping = threads.spawn(|| memory.unmap(0, 2 * PAGE_SIZE).unwrap());
        // The place is free before the event is read: this is how another thread gets it.
        let fresh = loop {
            match memory.map_fresh(0, PAGE_SIZE) {
                Ok(fresh) => break fresh,
                Err(error) => assert_eq!(error.errno(), Some(libc::EEXIST), "{error}"),
            }
        };
        assert_eq!(uffd.state().unwrap(), UffdState::EventUnread, "the older event is still on its way");
        wait_readable(uffd.as_fd());
        let mut events = Vec::new();
        assert_eq!(uffd.read_events(&mut events).unwrap(), 1);
        assert!(matches!(events[..], [UffdEvent::Unmap { .. }]), "{events:?}");
        unmapping.join().unwrap();
        assert_eq!(uffd.state().unwrap(), UffdState::Quiet);
        fresh.store_u64(0, 1).unwrap();
    });
}

#[test]
fn integration_shared_memory_under_write_protection_alone_tells_its_moves_and_never_faults() {
    let uffd = uffd(Features::EVENT_REMAP | Features::EVENT_UNMAP | Features::WP_HUGETLBFS_SHMEM);
    let memory = ProgramMemory::shared(2 * PAGE_SIZE).unwrap();
    uffd.register(range_of(&memory), RegisterMode::WP).unwrap();
    memory.store_u64(0, 1).unwrap();
    assert_eq!(memory.load_u64(PAGE_SIZE).unwrap(), 0);
    let mut events = Vec::new();
    assert_eq!(uffd.read_events(&mut events).unwrap(), 0, "{events:?}");
    std::thread::scope(|threads| {
        let moving = threads.spawn(|| drop(memory.remap(0, 2 * PAGE_SIZE, false, None).unwrap()));
        while events.len() < 3 {
            wait_readable(uffd.as_fd());
            uffd.read_events(&mut events).unwrap();
        }
        moving.join().unwrap();
    });
    let shape = matches!(events[..], [UffdEvent::Remap { .. }, UffdEvent::Unmap { .. }, UffdEvent::Unmap { .. }]);
    assert!(shape, "{events:?}");
}
