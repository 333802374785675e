//! With a real userfaultfd of this very process; nobody answers faults, so no test touches a page that was taken out.

use std::os::fd::AsFd;

use uhmm_kernel_hook::program::{ProgramAdvice, ProgramMemory};
use uhmm_kernel_hook::{Features, RegisterMode, WpOutcome, memfd};

use super::*;

const P: u64 = PAGE_SIZE;

struct Bed {
    executor: Executor,
    staging: Window,
    /// The pager's side of the gate.
    pager: FillGate,
    /// Of the orders.
    next_id: u64,
}

impl Bed {
    fn new() -> Self {
        let (uffd, _) = Userfaultfd::create(None).unwrap();
        uffd.api(Features::MOVE.union(Features::PAGEFAULT_FLAG_WP)).unwrap();
        let memory = memfd::create_sealed("uhmm-test-staging", 2 * HUGE_BYTES + DIARY_BYTES).unwrap();
        let executor = Executor::new(uffd, memory.as_fd(), Arc::default()).unwrap();
        let staging = Window::map(memory.as_fd(), 0, 2 * HUGE_BYTES + DIARY_BYTES, Prot::ReadWrite).unwrap();
        Self { executor, staging, pager: FillGate::open(&memory).unwrap(), next_id: 1 }
    }

    /// With so many pages of a program, adopted.
    fn with(pages: u64) -> (Self, ProgramMemory) {
        let (bed, memory) = (Self::new(), filled(pages));
        bed.adopt(&memory);
        (bed, memory)
    }

    fn adopt(&self, memory: &ProgramMemory) {
        let range = AddrRange { start: memory.addr(), len: memory.len() };
        self.executor.uffd.register(range, RegisterMode::MISSING | RegisterMode::WP).unwrap();
    }

    fn run(&mut self, memory: &ProgramMemory, first: u64, count: u64, op: AgentOp) -> Vec<(u64, AgentStatus)> {
        let order = Order {
            id: self.next_id,
            region: 1,
            first_page: first,
            addr: memory.addr() + first * P,
            page_count: count,
            op,
        };
        self.executor.run(&order).iter().map(|run| (run.page_count, run.status)).collect()
    }

    fn present(&self, memory: &ProgramMemory) -> u64 {
        let range = AddrRange { start: memory.addr(), len: memory.len() };
        let runs = pagemap::scan(self.executor.pagemap.as_fd(), range, Categories::PRESENT).unwrap();
        runs.iter().map(|run| (run.end - run.start) / P).sum()
    }
}

fn filled(pages: u64) -> ProgramMemory {
    let memory = ProgramMemory::private_aligned(pages.max(1) * P).unwrap();
    memory.advise(0, memory.len(), ProgramAdvice::NoHugePage).unwrap();
    (0..pages).for_each(|page| memory.store_u64(page * P, page + 1).unwrap());
    memory
}

const OUT: AgentOp = AgentOp::MoveOut { slot: 1 };
const DROP: AgentOp = AgentOp::Drop { in_place: false };

#[test]
fn pages_leave_are_staged_and_come_back_and_all_of_it_can_be_repeated() {
    let (mut bed, memory) = Bed::with(8);
    for _ in 0..2 {
        assert_eq!(bed.run(&memory, 2, 4, OUT), [(4, AgentStatus::Moved)]);
        assert_eq!(bed.present(&memory), 4);
        assert_eq!(bed.staging.load_u64(HUGE_BYTES + 3 * P).unwrap(), 6);
        bed.staging.fill(HUGE_BYTES, HUGE_BYTES, 0).unwrap();
    }
    for _ in 0..2 {
        assert_eq!(bed.run(&memory, 2, 4, AgentOp::MoveBack), [(4, AgentStatus::Moved)]);
    }
    (0..8).for_each(|page| assert_eq!(memory.load_u64(page * P).unwrap(), page + 1));
    assert_eq!((bed.executor.taken.len(), bed.executor.free.len()), (0, 1));
}

#[test]
fn holes_and_zero_pages_are_reported_and_never_staged() {
    let mut bed = Bed::new();
    let memory = ProgramMemory::private(4 * P).unwrap();
    memory.advise(0, 4 * P, ProgramAdvice::NoHugePage).unwrap();
    memory.store_u64(P, 9).unwrap();
    assert_eq!(memory.load_u64(2 * P).unwrap(), 0, "the kernel's zero page");
    bed.adopt(&memory);
    bed.staging.fill(HUGE_BYTES, 4 * P, 0xee).unwrap();
    let zero_data_zero = [(1, AgentStatus::Zero), (1, AgentStatus::Moved), (2, AgentStatus::Zero)];
    assert_eq!(bed.run(&memory, 0, 4, OUT), zero_data_zero);
    assert_eq!(bed.staging.load_u8(HUGE_BYTES + 2 * P).unwrap(), 0xee);
    assert_eq!(bed.present(&memory), 0, "the zero page is out too: a write must fault");
    bed.run(&memory, 0, 4, DROP);
    assert_eq!(bed.executor.taken.len(), 0);
}

#[test]
fn a_page_shared_with_a_forked_child_is_separated_and_the_child_keeps_its_own() {
    let (mut bed, memory) = Bed::with(2);
    let (go, wait) = std::os::unix::net::UnixStream::pair().unwrap();
    let child = uhmm_kernel_hook::fork::fork_child(|| {
        use std::io::Read;
        let mut byte = [0];
        drop((&wait).read_exact(&mut byte));
        i32::from(memory.load_u64(P).unwrap_or(0) != 2)
    })
    .unwrap();
    assert_eq!(bed.run(&memory, 0, 2, OUT), [(2, AgentStatus::Moved)]);
    assert_eq!(bed.staging.load_u64(HUGE_BYTES + P).unwrap(), 2);
    use std::io::Write;
    (&go).write_all(&[1]).unwrap();
    assert_eq!(child.wait().unwrap(), uhmm_kernel_hook::fork::Ended::Code(0));
}

#[test]
fn memory_that_may_not_be_written_is_left_alone_copied_in_place_and_dropped() {
    let mut bed = Bed::new();
    let memory = filled(4);
    memory.protect(0, 4 * P, true, false).unwrap();
    bed.adopt(&memory);
    assert_eq!(bed.run(&memory, 0, 4, OUT), [(4, AgentStatus::ReadOnly)]);
    assert_eq!(bed.run(&memory, 0, 4, AgentOp::CopyOut { slot: 0 }), [(4, AgentStatus::Moved)]);
    assert_eq!((bed.present(&memory), bed.staging.load_u64(3 * P).unwrap()), (4, 4));
    bed.run(&memory, 0, 4, AgentOp::Drop { in_place: true });
    assert_eq!(bed.present(&memory), 0);
}

#[test]
fn write_protection_outlives_every_look_at_a_page() {
    let (mut bed, memory) = Bed::with(3);
    let range = AddrRange { start: memory.addr(), len: 3 * P };
    assert_eq!(bed.executor.uffd.write_protect(range, true, false).unwrap(), WpOutcome::Done);
    assert_eq!(bed.run(&memory, 0, 3, AgentOp::CopyOut { slot: 0 }), [(3, AgentStatus::Moved)]);
    assert_eq!(bed.run(&memory, 0, 3, AgentOp::Probe), [(3, AgentStatus::Moved)]);
    let written = pagemap::scan(bed.executor.pagemap.as_fd(), range, Categories::WRITTEN).unwrap();
    assert_eq!(written, [], "a page that is not write-protected any more counts as written");
}

#[test]
fn pages_find_their_way_back_to_memory_that_may_not_be_written_any_more() {
    let (mut bed, memory) = Bed::with(4);
    assert_eq!(bed.run(&memory, 0, 4, OUT), [(4, AgentStatus::Moved)]);
    memory.protect(P, 2 * P, true, false).unwrap();
    assert_eq!(bed.run(&memory, 0, 4, AgentOp::MoveBack), [(4, AgentStatus::Moved)]);
    (0..4).for_each(|page| assert_eq!(memory.load_u64(page * P).unwrap(), page + 1));
    assert_eq!((bed.executor.taken.len(), bed.executor.free.len()), (0, 1));
}

#[test]
fn a_huge_page_that_went_back_is_not_kept_for_arrivals() {
    let mut bed = Bed::new();
    let memory = ProgramMemory::private_aligned(HUGE_BYTES).unwrap();
    memory.advise(0, HUGE_BYTES, ProgramAdvice::HugePage).unwrap();
    memory.store_u64(0, 1).unwrap();
    bed.adopt(&memory);
    let range = AddrRange { start: memory.addr(), len: HUGE_BYTES };
    let huge = |bed: &Bed| !pagemap::scan(bed.executor.pagemap.as_fd(), range, Categories::HUGE).unwrap().is_empty();
    let was_huge = huge(&bed);
    bed.run(&memory, 0, HUGE_PAGES, OUT);
    bed.run(&memory, 0, HUGE_PAGES, AgentOp::MoveBack);
    assert_eq!(huge(&bed), was_huge, "a huge page is one on its way back too");
    assert_eq!((memory.load_u64(0).unwrap(), bed.executor.kept_huge.len()), (1, 0));
}

#[test]
fn locked_memory_moves_like_any_other() {
    let mut bed = Bed::new();
    let memory = filled(4);
    memory.lock(0, 2 * P).unwrap();
    bed.adopt(&memory);
    assert_eq!(bed.run(&memory, 0, 4, OUT), [(4, AgentStatus::Moved)], "two mappings, one of them locked");
    assert_eq!((bed.present(&memory), bed.staging.load_u64(HUGE_BYTES + 3 * P).unwrap()), (0, 4));
    bed.run(&memory, 0, 4, AgentOp::MoveBack);
    (0..4).for_each(|page| assert_eq!(memory.load_u64(page * P).unwrap(), page + 1));
    assert!(bed.executor.blocks.iter().all(|block| !block.locked));
}

#[test]
fn locked_memory_that_may_not_be_written_is_dropped_too() {
    let mut bed = Bed::new();
    let memory = filled(4);
    memory.lock(0, 4 * P).unwrap();
    memory.protect(0, 4 * P, true, false).unwrap();
    bed.adopt(&memory);
    bed.run(&memory, 0, 4, AgentOp::CopyOut { slot: 0 });
    assert_eq!(bed.run(&memory, 0, 4, AgentOp::Drop { in_place: true }), [(4, AgentStatus::Moved)]);
    assert_eq!(bed.present(&memory), 0, "or the program would go on with what the device has by now");
}

#[test]
fn memory_that_is_gone_or_not_managed_is_never_touched() {
    let mut bed = Bed::new();
    let memory = filled(4);
    assert_eq!(bed.run(&memory, 0, 4, OUT), [(4, AgentStatus::Gone)], "nobody registered it");
    bed.adopt(&memory);
    memory.unmap(2 * P, 2 * P).unwrap();
    assert_eq!(bed.run(&memory, 0, 4, OUT), [(2, AgentStatus::Moved), (2, AgentStatus::Gone)]);
    assert_eq!(bed.run(&memory, 0, 4, AgentOp::Probe), [(2, AgentStatus::Zero), (2, AgentStatus::Gone)]);
    bed.run(&memory, 0, 4, AgentOp::MoveBack);
    assert_eq!(bed.present(&memory), 2);
}

#[test]
fn a_huge_page_stays_huge_both_ways_and_is_used_again() {
    let mut bed = Bed::new();
    let memory = ProgramMemory::private_aligned(HUGE_BYTES).unwrap();
    memory.advise(0, HUGE_BYTES, ProgramAdvice::HugePage).unwrap();
    (0..HUGE_PAGES).for_each(|page| memory.store_u64(page * P, page + 1).unwrap());
    bed.adopt(&memory);
    let range = AddrRange { start: memory.addr(), len: HUGE_BYTES };
    if pagemap::scan(bed.executor.pagemap.as_fd(), range, Categories::HUGE).unwrap().is_empty() {
        // This kernel gives no huge pages (transparent_hugepage is `never`): there is nothing to keep huge.
        return;
    }
    let out = bed.run(&memory, 0, HUGE_PAGES, OUT);
    assert_eq!(out, [(HUGE_PAGES, AgentStatus::MovedHuge)]);
    bed.run(&memory, 0, HUGE_PAGES, DROP);
    assert_eq!(bed.executor.kept_huge.len(), 1);
    bed.staging.store_u64(5 * P, 77).unwrap();
    let home = bed.run(&memory, 0, HUGE_PAGES, AgentOp::FillHuge { slot: 0 });
    assert_eq!(home, [(HUGE_PAGES, AgentStatus::MovedHuge)]);
    assert_eq!(memory.load_u64(5 * P).unwrap(), 77);
    assert_eq!((bed.executor.kept_huge.len(), bed.executor.free.len()), (0, 1));
}

#[test]
fn nothing_is_put_where_the_program_has_dropped_pages_since_the_order_was_given() {
    let (mut bed, memory) = Bed::with(8);
    assert_eq!(bed.run(&memory, 2, 4, OUT), [(4, AgentStatus::Moved)]);
    assert!(bed.pager.begin_reading());
    bed.pager.end_reading(1);
    assert_eq!(bed.run(&memory, 2, 4, AgentOp::MoveBack), [(4, AgentStatus::Gone)]);
    assert_eq!((bed.present(&memory), bed.executor.taken.len()), (4, 4), "nothing is lost: the pager may ask again");
    bed.next_id = 2;
    assert_eq!(bed.run(&memory, 2, 4, AgentOp::MoveBack), [(4, AgentStatus::Moved)]);
    (0..8).for_each(|page| assert_eq!(memory.load_u64(page * P).unwrap(), page + 1));
}

#[test]
fn a_huge_page_is_not_put_where_the_program_has_dropped_it_since() {
    let mut bed = Bed::new();
    let memory = ProgramMemory::private_aligned(HUGE_BYTES).unwrap();
    bed.adopt(&memory);
    bed.staging.store_u64(5 * P, 77).unwrap();
    bed.pager.end_reading(1);
    let refused = bed.run(&memory, 0, HUGE_PAGES, AgentOp::FillHuge { slot: 0 });
    assert_eq!((refused, bed.present(&memory)), (vec![(HUGE_PAGES, AgentStatus::Failed)], 0));
}
