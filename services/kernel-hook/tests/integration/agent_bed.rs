//! The pager's side of an agent, played by a test: orders into the ring, answers out of it, events of the userfaultfd read. Nobody answers
//! faults, so no test touches a page that was taken out.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use uhmm_kernel_hook::agent::{AgentFiles, AgentProcess, AgentSeat, ORDERS_BYTES, STAGING_BYTES};
use uhmm_kernel_hook::own_memory::{self, RangeAdvice};
use uhmm_kernel_hook::pagemap::{self, Categories};
use uhmm_kernel_hook::program::{ProgramAdvice, ProgramMemory};
use uhmm_kernel_hook::{
    AddrRange, EventFd, Features, PAGE_SIZE, Prot, RegisterMode, UffdEvent, Userfaultfd, Window, memfd, procmap,
};
use uhmm_shared::agent::{
    BELL, BLOCK_WORDS, BLOCKS, Done, ENTRIES, GATE, Op, Order, SLOTS, Status, WORDS, status_byte,
};
use uhmm_shared::fill_gate::FillGate;
use uhmm_shared::ring::{Consumer, Descriptor, HEAD, LANE, Producer};
use uhmm_shared::words::Words;

use crate::common::wait_readable;

pub const HUGE_BYTES: u64 = 2 << 20;
pub const HUGE_PAGES: u64 = 512;
const REGION: u64 = 1;
/// What the pager asks of a userfaultfd, but for what private memory has no use for.
const FEATURES: Features = Features::MOVE
    .union(Features::PAGEFAULT_FLAG_WP)
    .union(Features::EVENT_REMOVE)
    .union(Features::EVENT_REMAP)
    .union(Features::EVENT_UNMAP);

/// What became of neighbouring pages.
pub type Runs = Vec<(u64, Status)>;

/// The orders as the pager has them mapped.
#[derive(Clone)]
pub struct OrderWords(Arc<Window>);

impl OrderWords {
    fn word(&self, index: usize) -> &AtomicU64 {
        self.0.atomic_u64(index as u64 * 8).unwrap()
    }
}

impl Words for OrderWords {
    fn word_count(&self) -> usize {
        WORDS
    }
    fn load(&self, index: usize, order: Ordering) -> u64 {
        self.word(index).load(order)
    }
    fn store(&self, index: usize, value: u64, order: Ordering) {
        self.word(index).store(value, order);
    }
    fn swap(&self, index: usize, value: u64, order: Ordering) -> u64 {
        self.word(index).swap(value, order)
    }
    fn compare_exchange(&self, at: usize, old: u64, new: u64, yes: Ordering, no: Ordering) -> Result<u64, u64> {
        self.word(at).compare_exchange(old, new, yes, no)
    }
    fn fence(&self, order: Ordering) {
        std::sync::atomic::fence(order);
    }
}

/// Orders and answers. It may be made before a fork and used in another process than the agent's.
pub struct Desk {
    pub words: OrderWords,
    pub staging: Window,
    pub next_id: u64,
    orders: Producer<OrderWords>,
    answers: Consumer<OrderWords>,
    done: EventFd,
    orders_fd: OwnedFd,
    staging_fd: OwnedFd,
}

impl Desk {
    pub fn new() -> Self {
        let orders = memfd::create_sealed("uhmm-test-orders", ORDERS_BYTES).unwrap();
        let staging = memfd::create_sealed("uhmm-test-staging", STAGING_BYTES).unwrap();
        Self::open(orders, staging, EventFd::new().unwrap())
    }

    /// Another one of the same memory, for another process.
    pub fn reopen(&self) -> Self {
        let again = |fd: &OwnedFd| memfd::try_clone(fd.as_fd()).unwrap();
        Self::open(again(&self.orders_fd), again(&self.staging_fd), self.done.try_clone().unwrap())
    }

    fn open(orders_fd: OwnedFd, staging_fd: OwnedFd, done: EventFd) -> Self {
        let window = Window::map(orders_fd.as_fd(), 0, ORDERS_BYTES, Prot::ReadWrite).unwrap();
        let words = OrderWords(Arc::new(window));
        Self {
            staging: Window::map(staging_fd.as_fd(), 0, STAGING_BYTES, Prot::ReadWrite).unwrap(),
            next_id: 1,
            orders: Producer::open(words.clone(), 0, ENTRIES),
            answers: Consumer::open(words.clone(), 1, ENTRIES),
            done,
            words,
            orders_fd,
            staging_fd,
        }
    }

    pub fn gate(&self) -> FillGate<OrderWords> {
        FillGate::at(self.words.clone(), GATE)
    }

    /// Orders given and answers got, ever.
    pub fn counts(&self) -> (u64, u64) {
        (self.orders.index(), self.answers.index())
    }

    /// Writes an index that no pager writes.
    pub fn corrupt(&self) {
        self.words.store(LANE[0] + HEAD, 1 << 40, Ordering::Release);
        self.ring_bell();
    }

    fn ring_bell(&self) {
        self.words.word(BELL).fetch_add(1, Ordering::Release);
        self.words.0.wake_futex(BELL as u64 * 8).unwrap();
    }

    /// Puts words into the ring as an order.
    pub fn give_raw(&mut self, descriptor: &Descriptor) {
        if self.orders.push(descriptor).unwrap() {
            self.ring_bell();
        }
    }

    /// Gives an order for pages that lie at an address; returns its number.
    pub fn give(&mut self, first_page: u64, addr: u64, page_count: u64, op: Op) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.give_raw(&Order { id, region: REGION, first_page, addr, page_count, op }.encode());
        id
    }

    /// The next answer, if there is one: the order's number, and where the statuses are. Else the agent will tell.
    pub fn try_answer(&mut self) -> Option<Done> {
        loop {
            if let Some(descriptor) = self.answers.pop().unwrap() {
                return Some(Done::decode(&descriptor).unwrap());
            }
            if self.answers.arm().unwrap() {
                return None;
            }
        }
    }

    /// Waits for the next answer.
    pub fn answer(&mut self) -> Done {
        loop {
            if let Some(done) = self.try_answer() {
                return done;
            }
            wait_readable(self.done.as_fd());
            self.done.drain().unwrap();
        }
    }

    pub fn runs(&self, done: Done, page_count: u64) -> Runs {
        let mut runs = Runs::new();
        for page in 0..page_count {
            let status = Status::of(status_byte(&self.words, done.area, page)).expect("a status");
            match runs.last_mut() {
                Some((count, last)) if *last == status => *count += 1,
                _ => runs.push((1, status)),
            }
        }
        runs
    }

    /// Gives an order and waits for what becomes of it.
    pub fn ask(&mut self, first_page: u64, addr: u64, page_count: u64, op: Op) -> Runs {
        let id = self.give(first_page, addr, page_count, op);
        let done = self.answer();
        assert_eq!(done.id, id);
        self.runs(done, page_count)
    }
}

/// Reads the events of a userfaultfd and keeps them, as the pager does: no fill meanwhile.
struct Reader {
    stop: Arc<(AtomicBool, EventFd)>,
    thread: Option<JoinHandle<()>>,
    events: Arc<Mutex<Vec<UffdEvent>>>,
}

impl Reader {
    fn start(uffd: Arc<Userfaultfd>, gate: FillGate<OrderWords>) -> Self {
        let stop = Arc::new((AtomicBool::new(false), EventFd::new().unwrap()));
        let events = Arc::new(Mutex::new(Vec::new()));
        let (stopped, kept) = (stop.clone(), events.clone());
        let read = move || {
            while !stopped.0.load(Ordering::Acquire) {
                let mut waits = [PollFd::new(&*uffd, PollFlags::IN), PollFd::new(&stopped.1, PollFlags::IN)];
                // EINTR: looks again.
                let _ = poll(&mut waits, None);
                if !gate.begin_reading() {
                    // An agent fills just now, or was killed while it did; nothing tells of the end of that.
                    std::thread::yield_now();
                    continue;
                }
                while uffd.read_events(&mut kept.lock().unwrap()).unwrap() > 0 {}
                gate.end_reading(0);
            }
        };
        Self { stop, thread: Some(std::thread::spawn(read)), events }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.0.store(true, Ordering::Release);
        let told = self.stop.1.signal();
        if let Some(thread) = self.thread.take().filter(|_| told.is_ok()) {
            // One that has failed has said why.
            let _ = thread.join();
        }
    }
}

/// An agent of this process with its pager. The thread that makes it is the one whose death the agent notices.
pub struct Bed {
    pub desk: Desk,
    pub uffd: Arc<Userfaultfd>,
    pub agent: Option<AgentProcess>,
    seat: Option<AgentSeat>,
    files: AgentFiles,
    life: u64,
    only_one: bool,
    reader: Option<Reader>,
    adopted: Vec<AddrRange>,
}

impl Bed {
    /// For a test among others of this process.
    pub fn new() -> Self {
        let (uffd, _) = Userfaultfd::create(None).unwrap();
        Self::start(Desk::new(), uffd, false)
    }

    pub fn start(desk: Desk, uffd: Userfaultfd, only_one: bool) -> Self {
        uffd.api(FEATURES).unwrap();
        let mut seat = AgentSeat::new(desk.staging_fd.as_fd(), desk.orders_fd.as_fd()).unwrap();
        let life = seat.life().hold().unwrap();
        let files = AgentFiles {
            uffd: uffd.try_clone_fd().unwrap(),
            pagemap: pagemap::open_own_pagemap().unwrap(),
            maps: procmap::open_own_maps().unwrap(),
            mem: Some(File::open("/proc/self/mem").unwrap().into()),
            done: memfd::try_clone(desk.done.as_fd()).unwrap(),
        };
        let uffd = Arc::new(uffd);
        let reader = Some(Reader::start(uffd.clone(), desk.gate()));
        let (seat, adopted) = (Some(seat), Vec::new());
        let mut bed = Self { desk, uffd, agent: None, seat, files, life, only_one, reader, adopted };
        bed.start_agent();
        bed
    }

    /// With so many small pages of a program, adopted; page n begins with n + 1.
    pub fn with(pages: u64) -> (Self, ProgramMemory) {
        let (mut bed, memory) = (Self::new(), filled(pages));
        bed.adopt(&memory);
        (bed, memory)
    }

    pub fn adopt(&mut self, memory: &ProgramMemory) {
        let range = range_of(memory);
        self.uffd.register(range, RegisterMode::MISSING | RegisterMode::WP).unwrap();
        self.adopted.push(range);
    }

    pub fn seat(&self) -> &AgentSeat {
        self.seat.as_ref().unwrap()
    }

    pub fn agent(&self) -> &AgentProcess {
        self.agent.as_ref().unwrap()
    }

    /// Also another one, when the one before has ended.
    pub fn start_agent(&mut self) {
        let seat = self.seat.as_mut().unwrap();
        if let Some(dead) = self.agent.take() {
            dead.reap();
            seat.has_ended();
        }
        self.agent = Some(seat.start(&self.files, self.life, self.only_one).unwrap());
    }

    /// Orders something for pages of a program's memory.
    pub fn run(&mut self, memory: &ProgramMemory, first: u64, count: u64, op: Op) -> Runs {
        self.desk.ask(first, memory.addr() + first * PAGE_SIZE, count, op)
    }

    /// From now on nothing may happen that sends one.
    pub fn read_no_events(&mut self) {
        self.reader = None;
    }

    /// The events read so far.
    pub fn take_events(&self) -> Vec<UffdEvent> {
        std::mem::take(&mut *self.reader.as_ref().unwrap().events.lock().unwrap())
    }

    /// The addresses of a slot's scratch block.
    pub fn block(&self, slot: u64) -> AddrRange {
        let (scratch, _) = self.seat().ranges()[1];
        AddrRange { start: scratch.start.next_multiple_of(HUGE_BYTES) + slot * HUGE_BYTES, len: HUGE_BYTES }
    }

    /// Pages that lie in the blocks of all slots.
    pub fn in_scratch(&self) -> u64 {
        let first = self.block(0);
        pages_of(AddrRange { start: first.start, len: SLOTS * HUGE_BYTES }, Categories::PRESENT)
    }

    /// Blocks of which a record says that they hold pages.
    pub fn records(&self) -> usize {
        let is_kept = |slot: &usize| self.desk.words.load(BLOCKS + slot * BLOCK_WORDS + 4, Ordering::Acquire) != 0;
        (0..SLOTS as usize).filter(is_kept).count()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // What was unmapped or moved since cannot be unregistered, and need not be.
        for range in &self.adopted {
            let _ = self.uffd.unregister(*range);
        }
        if let Some(mut seat) = self.seat.take() {
            seat.life().release();
            seat.close(self.agent.as_ref(), Some(&self.uffd));
            if let Some(agent) = self.agent.take() {
                agent.reap();
            }
        }
        self.reader = None;
    }
}

pub fn range_of(memory: &ProgramMemory) -> AddrRange {
    AddrRange::new(memory.addr(), memory.len()).unwrap()
}

/// Pages of a range of this process that are of some kind.
pub fn pages_of(range: AddrRange, kind: Categories) -> u64 {
    let pagemap = pagemap::open_own_pagemap().unwrap();
    let runs = pagemap::scan(pagemap.as_fd(), range, kind).unwrap();
    runs.iter().map(|run| (run.end - run.start) / PAGE_SIZE).sum()
}

pub fn present(memory: &ProgramMemory) -> u64 {
    pages_of(range_of(memory), Categories::PRESENT)
}

/// Bytes of mappings of a range that are locked (VM_LOCKED), whatever is there.
pub fn locked_bytes(range: AddrRange) -> u64 {
    let smaps = std::fs::read_to_string("/proc/thread-self/smaps").unwrap();
    let (mut here, mut bytes) = (0, 0);
    for line in smaps.lines() {
        let addrs = line.split_once(' ').and_then(|(addrs, _)| addrs.split_once('-'));
        let number = |text| u64::from_str_radix(text, 16).ok();
        if let Some((start, end)) = addrs.and_then(|(start, end)| Some((number(start)?, number(end)?))) {
            here = end.min(range.end()).saturating_sub(start.max(range.start));
        } else if line.strip_prefix("VmFlags:").is_some_and(|flags| flags.split(' ').any(|flag| flag == "lo")) {
            bytes += here;
        }
    }
    bytes
}

/// Small pages that no child of another test shares; page n begins with n + 1.
pub fn filled(pages: u64) -> ProgramMemory {
    let memory = ProgramMemory::private_aligned(pages * PAGE_SIZE).unwrap();
    memory.advise(0, memory.len(), ProgramAdvice::NoHugePage).unwrap();
    own_memory::advise(range_of(&memory), RangeAdvice::DontFork).unwrap();
    (0..pages).for_each(|page| memory.store_u64(page * PAGE_SIZE, page + 1).unwrap());
    memory
}

/// One huge page, if the kernel has one to give.
pub fn huge() -> Option<ProgramMemory> {
    let memory = ProgramMemory::private_aligned(HUGE_BYTES).unwrap();
    memory.advise(0, HUGE_BYTES, ProgramAdvice::HugePage).unwrap();
    own_memory::advise(range_of(&memory), RangeAdvice::DontFork).unwrap();
    (0..HUGE_PAGES).for_each(|page| memory.store_u64(page * PAGE_SIZE, page + 1).unwrap());
    let is_huge = pages_of(range_of(&memory), Categories::HUGE) == HUGE_PAGES;
    if !is_huge {
        eprintln!("skipped: the kernel gives no transparent huge page now (see /sys/kernel/mm/transparent_hugepage)");
    }
    is_huge.then_some(memory)
}

/// All pages are there, and each begins with its number.
pub fn check(memory: &ProgramMemory) {
    assert_eq!(present(memory), memory.len() / PAGE_SIZE, "a page is missing");
    let pages = 0..memory.len() / PAGE_SIZE;
    pages.for_each(|page| assert_eq!(memory.load_u64(page * PAGE_SIZE).unwrap(), page + 1, "page {page}"));
}
