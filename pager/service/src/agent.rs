//! A client's agent as the pager sees it: what it was asked, what waits, and the memory between the two (`uhmm_shared::agent`).
//!
//! ```text
//!   ask -> [waits for a slot, or for room] -> outstanding, lane 0, bell --> agent (one after the other) --> lane 1 -> answered
//!                                                  \-- about frames: a message to the client's SDK, asked again on a new connection
//! ```
//! Orders and answers lie in memory that outlives pager and agent. A new pager finds the ring as the dead one left it: it refuses the
//! orders that were not begun, and looks at the one that may have been. A new agent goes on with the ring. Everything asked is absolute
//! and repeatable. An agent that never answers keeps its own process's migrations waiting, and nobody else's.
//!
//! **Not trusted.** The program can write to all of this memory. Every index, number and status is checked where it is read; a ring that
//! is corrupt is a lost agent. What an answer can name is this process's own staging slots, regions and pages.
//!
//! **A slot** is in use while its bytes are copied on, and while the scratch block of its number holds pages ([`Agent::taken`]).

mod changed;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use uhmm_ipc::ConnId;
use uhmm_ipc::message::Fd;
use uhmm_ipc::message::pager::{AgentMemory, FramesOp};
use uhmm_ipc::shared::fill_gate::FillGate;
use uhmm_ipc::shared::words::{SharedWords, Words};
use uhmm_kernel_hook::process::PidFd;
use uhmm_kernel_hook::window::{Prot, Window};
use uhmm_kernel_hook::{AddrRange, EventFd, HookError, PAGE_SIZE, memfd};
use uhmm_pager_core::{Pages, RegionId, Ticket};
use uhmm_shared::agent::{
    BELL, BLOCK_WORDS, BLOCKS, DEAD_PAGERS, DIARY, DIARY_ENTRIES, Done, ENTRIES, GATE, GRANTS, IN_FLIGHT_MAX,
    ORDER_PAGES, Op, SLOTS, Status, WORDS, status_byte,
};
use uhmm_shared::ring::{Consumer, Producer, RingFault};

pub use changed::Changed;

/// Pages of a staging slot.
pub const SLOT_PAGES: u64 = 512;

/// What the answer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Pages to frames of a device; the answer says which are in the slot.
    Out {
        /// The core's ticket.
        ticket: Ticket,
        /// Device.
        device: u8,
        /// Frame of the job's first page.
        frame: u32,
    },
    /// Scratch pages (and perhaps pages in place) are given back.
    Punch {
        /// The core's ticket.
        ticket: Ticket,
    },
    /// Pages go back.
    MoveBack {
        /// The core's ticket.
        ticket: Ticket,
    },
    /// What a dead pager left in scratch is given back.
    Tidy,
    /// Frames for the program to map.
    Show {
        /// The core's ticket.
        ticket: Ticket,
    },
    /// Frames that the program shall not map any more.
    Hide {
        /// The core's ticket.
        ticket: Ticket,
    },
    /// One huge page home.
    FillHuge {
        /// The core's ticket.
        ticket: Ticket,
    },
}

impl Purpose {
    /// The core's ticket; 0: it has none.
    pub fn ticket(self) -> Ticket {
        match self {
            Self::Tidy => Ticket(0),
            Self::Out { ticket, .. }
            | Self::Punch { ticket }
            | Self::MoveBack { ticket }
            | Self::Show { ticket }
            | Self::Hide { ticket }
            | Self::FillHuge { ticket } => ticket,
        }
    }
}

/// What needs a staging slot says so before it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Take pages out.
    MoveOut,
    /// Copy pages that stay.
    CopyOut,
    /// Give pages back.
    Drop {
        /// Those in the address space too.
        in_place: bool,
    },
    /// Put pages back.
    MoveBack,
    /// Bring a huge page home from the slot, which holds its bytes already.
    FillHuge {
        /// Slot.
        slot: u32,
    },
    /// Map frames over the pages.
    MapDevice {
        /// Device.
        device: u8,
        /// Frame of the first page.
        frame: u32,
        /// Of the device's memory.
        generation: u64,
    },
    /// Map the region's own memory there again.
    UnmapDevice,
}

/// One thing to do, on consecutive addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Region.
    pub region: RegionId,
    /// Pages of it.
    pub pages: Pages,
    /// What.
    pub order: Order,
    /// Why.
    pub purpose: Purpose,
    /// Slot, once it has one.
    pub slot: Option<u32>,
    /// Its place in the ring, once it is there.
    pub sent_at: Option<u64>,
    /// The program has changed the place since. Pages went to other addresses (mremap): whatever the agent found at the old ones says
    /// nothing about them. Or pages that the agent is to put there were dropped.
    pub overtaken: bool,
}

impl Job {
    /// One that nothing has happened to.
    pub fn new(region: RegionId, pages: Pages, order: Order, purpose: Purpose) -> Self {
        Self { region, pages, order, purpose, slot: None, sent_at: None, overtaken: false }
    }

    fn needs_slot(&self) -> bool {
        self.slot.is_none() && matches!(self.order, Order::MoveOut | Order::CopyOut)
    }

    /// Of an allocated region, whose addresses do not change.
    pub fn is_about_frames(&self) -> bool {
        matches!(self.order, Order::MapDevice { .. } | Order::UnmapDevice)
    }

    /// Puts pages into the address space.
    fn fills(&self) -> bool {
        matches!(self.order, Order::FillHuge { .. } | Order::MoveBack)
    }

    /// Its pages' addresses matter.
    pub fn is_about_a_place(&self) -> bool {
        self.fills() || self.empties()
    }

    /// Takes pages out of the address space, or drops them there.
    fn empties(&self) -> bool {
        matches!(self.order, Order::MoveOut | Order::CopyOut | Order::Drop { in_place: true })
    }

    /// As it goes into the ring; `None`: it is about frames.
    pub fn op(&self) -> Option<Op> {
        let slot = self.slot.unwrap_or(0);
        Some(match self.order {
            Order::MoveOut => Op::MoveOut { slot },
            Order::CopyOut => Op::CopyOut { slot },
            Order::Drop { in_place } => Op::Drop { in_place },
            Order::MoveBack => Op::MoveBack,
            Order::FillHuge { slot } => Op::FillHuge { slot },
            Order::MapDevice { .. } | Order::UnmapDevice => return None,
        })
    }

    /// As it goes to the client's SDK; `None`: it goes into the ring.
    pub fn frames_op(&self) -> Option<FramesOp> {
        match self.order {
            Order::MapDevice { device, frame, generation } => Some(FramesOp::MapDevice { device, frame, generation }),
            Order::UnmapDevice => Some(FramesOp::UnmapDevice),
            _ => None,
        }
    }
}

/// Neighbouring pages of one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgentRun {
    /// Pages.
    pub page_count: u64,
    /// What became of them.
    pub status: Status,
}

/// Pages that lie in the scratch block of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Region.
    pub region: RegionId,
    /// Pages of it.
    pub pages: Pages,
    /// Slot, and block.
    pub slot: u32,
}

/// Whether somebody carries out orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// As far as is known.
    Lives,
    /// It has ended. The client may start another one, which goes on with what is in the ring.
    Ended,
    /// It has ended, and no other has come, or its ring is corrupt: orders are answered here.
    Lost,
}

/// See the module head.
#[derive(Debug)]
pub struct Agent {
    /// Connection to the client, while there is one.
    pub conn: Option<ConnId>,
    /// What the vault keeps.
    pub memory: AgentMemory,
    /// Staging memory.
    pub staging: Window,
    /// There are answers.
    pub done_event: EventFd,
    /// Tells when the agent has ended; `None`: it is a thread, and ends with the client.
    pub pidfd: Option<PidFd>,
    /// Whether it works.
    pub life: Life,
    words: SharedWords,
    orders: Lane<Producer<SharedWords>>,
    answers: Lane<Consumer<SharedWords>>,
    gate: FillGate<SharedWords>,
    /// Orders up to this one may fill nothing any more.
    refused: u64,
    /// How often each slot is in use.
    slot_uses: Vec<u32>,
    taken: Vec<Taken>,
    waiting: VecDeque<Job>,
    outstanding: BTreeMap<u64, Job>,
    next_id: u64,
}

/// A ring's end, which has nothing to show.
struct Lane<T>(T);

impl<T> std::fmt::Debug for Lane<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lane")
    }
}

/// An order that a dead pager had given and that may have been begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// Region.
    pub region: RegionId,
    /// Pages of it.
    pub pages: Pages,
    /// What.
    pub op: Op,
}

impl Agent {
    /// `first_id` grows from one incarnation to the next, so that an answer meant for a dead pager names nothing, and no order of
    /// that one is begun or fills anything from now on.
    ///
    /// # Errors
    /// What is wrong with the memory, in words.
    pub fn open(conn: Option<ConnId>, memory: &AgentMemory, first_id: u64) -> Result<Self, String> {
        let text = |error: HookError| error.to_string();
        let own = |fd: &Fd| memfd::try_clone(fd.as_fd()).map_err(text);
        let len = memfd::len(memory.staging.as_fd()).map_err(text)?;
        let wanted = SLOTS * SLOT_PAGES * PAGE_SIZE;
        if len != wanted {
            return Err(format!("Staging memory has {len} bytes, it must have {wanted}"));
        }
        memfd::check_sealed(memory.staging.as_fd(), len).map_err(text)?;
        let staging = Window::map(memory.staging.as_fd(), 0, len, Prot::ReadWrite).map_err(text)?;
        let words = SharedWords::open(&memory.orders, WORDS as u64).map_err(|error| error.to_string())?;
        let done_event = EventFd::from_fd(own(&memory.done)?).map_err(text)?;
        let pidfd = memory.agent.as_ref().map(own).transpose()?.map(PidFd::from_fd);
        let gate = FillGate::at(words.clone(), GATE);
        words.store(DEAD_PAGERS, first_id - 1, Release);
        words.fence(SeqCst);
        gate.end_reading(first_id - 1);
        Ok(Self {
            conn,
            memory: memory.clone(),
            staging,
            done_event,
            pidfd,
            life: Life::Lives,
            orders: Lane(Producer::open(words.clone(), 0, ENTRIES)),
            answers: Lane(Consumer::open(words.clone(), 1, ENTRIES)),
            words,
            gate,
            refused: 0,
            slot_uses: vec![0; SLOTS as usize],
            taken: Vec::new(),
            waiting: VecDeque::new(),
            outstanding: BTreeMap::new(),
            next_id: first_id,
        })
    }

    /// The oldest order of a dead pager that has no answer: it may have been begun before this pager forbade it. To be asked once, after
    /// [`Agent::open`].
    pub fn begun(&mut self) -> Option<Begun> {
        let unread = self.orders.0.unread().ok().filter(|unread| *unread > 0)?;
        let order = uhmm_shared::agent::Order::decode(&self.orders.0.nth_last(unread)?)?;
        let pages = Pages { first: order.first_page, count: order.page_count };
        Some(Begun { region: RegionId(order.region), pages, op: order.op })
    }

    /// What lies in scratch blocks, by their records: for a new pager. Their slots are in use until those pages are given back or put
    /// back; so is the slot of the order that may have been begun.
    pub fn find_taken(&mut self, begun: Option<Begun>) -> Vec<Taken> {
        if let Some(Begun { region, pages, op: Op::MoveOut { slot } | Op::CopyOut { slot } | Op::FillHuge { slot } }) =
            begun
        {
            self.take(Taken { region, pages, slot });
        }
        for slot in 0..SLOTS as u32 {
            let known = self.taken.iter().any(|taken| taken.slot == slot);
            if let Some(taken) = self.record(slot).filter(|_| !known) {
                self.take(taken);
            }
        }
        self.taken.clone()
    }

    /// What a scratch block's record says. The program can write there.
    fn record(&self, slot: u32) -> Option<Taken> {
        let word = |field: usize| self.words.load(BLOCKS + slot as usize * BLOCK_WORDS + field, Acquire);
        let (region, first, count) = (RegionId(word(1)), word(2), word(4));
        let legal = (1..=ORDER_PAGES).contains(&count) && first.checked_add(count).is_some();
        legal.then_some(Taken { region, pages: Pages { first, count }, slot })
    }

    /// Queues a job.
    pub fn ask(&mut self, job: Job) {
        self.waiting.push_back(job);
    }

    /// Jobs that can be given to the agent now, in order. Those that need a slot hold back others of their kind, not those that free
    /// slots. Each is outstanding then, and must be [sent](Agent::send) or [answered](Agent::answered).
    pub fn ready(&mut self) -> Vec<(u64, Job)> {
        let mut ready = Vec::new();
        let mut kept = VecDeque::new();
        let mut room = IN_FLIGHT_MAX.saturating_sub(self.in_flight());
        while let Some(mut job) = self.waiting.pop_front() {
            let is_for_ring = job.op().is_some();
            if is_for_ring && room == 0 {
                kept.push_back(job);
                continue;
            }
            if job.needs_slot() {
                job.slot = self.take_slot();
            }
            if job.needs_slot() {
                kept.push_back(job);
                continue;
            }
            room -= u64::from(is_for_ring);
            self.outstanding.insert(self.next_id, job);
            ready.push((self.next_id, job));
            self.next_id += 1;
        }
        self.waiting = kept;
        ready
    }

    /// Orders in the ring that were not answered, of this pager or another one.
    fn in_flight(&self) -> u64 {
        self.orders.0.index().saturating_sub(self.answers.0.index())
    }

    /// Puts an order into the ring. `false`: the ring is corrupt.
    pub fn send(&mut self, order: &uhmm_shared::agent::Order) -> bool {
        if let Some(job) = self.outstanding.get_mut(&order.id) {
            job.sent_at = Some(self.orders.0.index());
        }
        match self.orders.0.push(&order.encode()) {
            Ok(true) => {
                self.ring_bell();
                true
            }
            Ok(false) => true,
            // There is room for all that are in flight.
            Err(RingFault::Full | RingFault::Corrupt { .. }) => false,
        }
    }

    fn ring_bell(&self) {
        self.words.store(BELL, self.words.load(BELL, Relaxed).wrapping_add(1), Release);
        self.words.wake(BELL);
    }

    /// The next answer: the job with what became of its pages. `Ok(None)`: nothing now; the agent will tell of the next one.
    ///
    /// # Errors
    /// The ring is corrupt.
    pub fn next_answer(&mut self) -> Result<Option<(Job, Vec<AgentRun>)>, RingFault> {
        loop {
            let Some(descriptor) = self.answers.0.pop()? else {
                if self.answers.0.arm()? {
                    return Ok(None);
                }
                continue;
            };
            // Meant for a dead pager, or nonsense: names nothing.
            let Some(done) = Done::decode(&descriptor) else { continue };
            let job = self.outstanding.get(&done.id).copied().filter(|job| job.op().is_some());
            let Some(job) = job else { continue };
            self.outstanding.remove(&done.id);
            let runs = self.runs(done.area, job.pages.count);
            return Ok(Some((job, runs)));
        }
    }

    /// What an area says about the first `count` pages. A byte that is no status is a failure.
    fn runs(&self, area: u64, count: u64) -> Vec<AgentRun> {
        let mut runs: Vec<AgentRun> = Vec::new();
        for page in 0..count.min(ORDER_PAGES) {
            let status = Status::of(status_byte(&self.words, area, page)).unwrap_or(Status::Failed);
            match runs.last_mut() {
                Some(run) if run.status == status => run.page_count += 1,
                _ => runs.push(AgentRun { page_count: 1, status }),
            }
        }
        runs
    }

    /// Messages about frames that a new connection must be told again, in order.
    pub fn unanswered_frames(&self) -> Vec<(u64, Job)> {
        self.outstanding.iter().filter(|(_, job)| job.is_about_frames()).map(|(id, job)| (*id, *job)).collect()
    }

    /// The answer to a job came, or it was never given. Its slot, if it has one, is the caller's until [`Agent::free_slot`].
    pub fn answered(&mut self, id: u64) -> Option<Job> {
        self.outstanding.remove(&id)
    }

    /// A slot for the pager's own use (to bring a huge page home).
    pub fn take_slot(&mut self) -> Option<u32> {
        let free = self.slot_uses.iter().position(|uses| *uses == 0)?;
        self.slot_uses[free] = 1;
        Some(free as u32)
    }

    /// The slot's content is not needed any more.
    pub fn free_slot(&mut self, slot: u32) {
        if let Some(uses) = self.slot_uses.get_mut(slot as usize) {
            *uses = uses.saturating_sub(1);
        }
    }

    /// Pages lie in a block.
    pub fn take(&mut self, taken: Taken) {
        if let Some(uses) = self.slot_uses.get_mut(taken.slot as usize) {
            *uses += 1;
            self.taken.push(taken);
        }
    }

    /// How many of some pages are known to lie in scratch.
    pub fn taken_of(&self, region: RegionId, pages: Pages) -> u64 {
        let of = |taken: &&Taken| taken.region == region;
        self.taken.iter().filter(of).filter_map(|taken| taken.pages.overlap(pages)).map(|part| part.count).sum()
    }

    /// They do not any more.
    pub fn untake(&mut self, region: RegionId, pages: Pages) {
        for Taken { region: of, pages: in_block, slot } in std::mem::take(&mut self.taken) {
            let Some(part) = in_block.overlap(pages).filter(|_| of == region) else {
                self.taken.push(Taken { region: of, pages: in_block, slot });
                continue;
            };
            let before = Pages { first: in_block.first, count: part.first - in_block.first };
            let behind = Pages { first: part.end(), count: in_block.end() - part.end() };
            for rest in [before, behind].into_iter().filter(|rest| rest.count > 0) {
                self.take(Taken { region: of, pages: rest, slot });
            }
            self.free_slot(slot);
        }
    }

    /// The process is gone: nobody will answer.
    pub fn give_up(&mut self) -> Vec<Job> {
        let outstanding = std::mem::take(&mut self.outstanding).into_values();
        outstanding.chain(std::mem::take(&mut self.waiting)).collect()
    }

    /// An own madvise of the agent is under way on exactly these pages: its event is not the program's. After a restart the order may
    /// still be the dead pager's, while ours waits for the agent's connection.
    pub fn is_dropping(&self, region: RegionId, pages: Pages, addrs: AddrRange) -> bool {
        let drops = |job: &Job| job.order == Order::Drop { in_place: true } && job.region == region;
        let mut jobs = self.outstanding.values().chain(&self.waiting);
        self.has_announced(addrs) && jobs.any(|job| drops(job) && job.pages.overlap(pages) == Some(pages))
    }

    /// The agent's diary has these addresses among those dropped last.
    fn has_announced(&self, addrs: AddrRange) -> bool {
        let word = |index: usize| self.words.load(DIARY + index, Acquire);
        (0..DIARY_ENTRIES as usize).any(|entry| word(2 * entry) <= addrs.start && addrs.end() <= word(2 * entry + 1))
    }

    /// A device is about to be allowed something.
    pub fn count_grant(&self) {
        self.words.store(GRANTS, self.words.load(GRANTS, Relaxed).wrapping_add(1), Release);
    }

    /// Its process has ended.
    pub fn has_ended(&self) -> bool {
        self.pidfd.as_ref().is_some_and(|pidfd| pidfd.exited().unwrap_or(true))
    }

    /// Another agent has begun. Those that are in the ring are its first orders.
    pub fn begin_again(&mut self, pidfd: Option<PidFd>) {
        self.pidfd = pidfd;
        self.life = Life::Lives;
        self.ring_bell();
    }

    /// Nobody will answer: what was asked, in order. An agent that was killed in the middle of filling fills nothing.
    pub fn lose(&mut self) -> Vec<Job> {
        self.life = Life::Lost;
        self.gate.nobody_fills();
        let in_ring = |job: &Job| job.op().is_some();
        let mut lost = Vec::new();
        self.outstanding.retain(|_, job| {
            let is_lost = in_ring(job);
            lost.extend(is_lost.then_some(*job));
            !is_lost
        });
        let (waiting, frames) = std::mem::take(&mut self.waiting).into_iter().partition::<Vec<_>, _>(in_ring);
        lost.extend(waiting);
        self.waiting = frames.into();
        lost
    }

    /// Whether a scratch block's record claims a page. Whoever carried out orders is gone, so nothing changes it.
    pub fn claims(&self, region: RegionId, page: u64) -> bool {
        let claims = |taken: &Taken| taken.region == region && taken.pages.contains(page);
        self.taken.iter().any(claims)
            || (0..SLOTS as u32).filter_map(|slot| self.record(slot)).any(|found| claims(&found))
    }

    /// Jobs that wait or are under way.
    pub fn len(&self) -> usize {
        self.waiting.len() + self.outstanding.len()
    }
}

#[cfg(test)]
mod tests;
