//! A client's agent as the pager sees it: what it was asked, what waits, and the staging memory between the two.
//!
//! ```text
//!   ask -> [waits for a slot] -> outstanding, Event::Agent --> agent thread (one after the other) --> AgentDone -> answered
//!                                      \-- connection or pager lost: asked again, in order
//! ```
//! Everything asked is absolute and repeatable, so asking twice does no harm. An agent that never answers keeps its own process's
//! migrations waiting, and nobody else's.

use std::collections::{BTreeMap, VecDeque};

use uhmm_ipc::ConnId;
use uhmm_ipc::message::Fd;
use uhmm_ipc::message::pager::{AgentOp, DIARY_BYTES, DIARY_ENTRIES};
use uhmm_ipc::shared::fill_gate::FillGate;
use uhmm_kernel_hook::window::Window;
use uhmm_kernel_hook::{AddrRange, HookError};
use uhmm_pager_core::{Pages, RegionId, Ticket};

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
    /// Whether the first page exists.
    Probe {
        /// The core's ticket.
        ticket: Ticket,
    },
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
    /// The core's ticket.
    pub fn ticket(self) -> Ticket {
        match self {
            Self::Out { ticket, .. }
            | Self::Punch { ticket }
            | Self::MoveBack { ticket }
            | Self::Probe { ticket }
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
    /// Look.
    Probe,
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
    /// The program has changed the place since. Pages went to other addresses (mremap): whatever the agent found at the old ones says
    /// nothing about them. Or pages that the agent is to put there were dropped.
    pub overtaken: bool,
}

impl Job {
    /// One that nothing has happened to.
    pub fn new(region: RegionId, pages: Pages, order: Order, purpose: Purpose) -> Self {
        Self { region, pages, order, purpose, slot: None, overtaken: false }
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

    /// As it goes on the wire.
    pub fn op(&self) -> AgentOp {
        let slot = self.slot.unwrap_or(0);
        match self.order {
            Order::MoveOut => AgentOp::MoveOut { slot },
            Order::CopyOut => AgentOp::CopyOut { slot },
            Order::Drop { in_place } => AgentOp::Drop { in_place },
            Order::MoveBack => AgentOp::MoveBack,
            Order::FillHuge { slot } => AgentOp::FillHuge { slot },
            Order::Probe => AgentOp::Probe,
            Order::MapDevice { device, frame, generation } => AgentOp::MapDevice { device, frame, generation },
            Order::UnmapDevice => AgentOp::UnmapDevice,
        }
    }
}

/// See the module head.
#[derive(Debug)]
pub struct Agent {
    /// Connection to the client, while there is one.
    pub conn: Option<ConnId>,
    /// /proc/PID/maps of the client.
    pub maps: Fd,
    /// Staging memory.
    pub staging: Window,
    /// The same, for the vault.
    pub staging_fd: Fd,
    gate: FillGate,
    /// Orders up to this one may fill nothing any more.
    refused: u64,
    free_slots: Vec<u32>,
    waiting: VecDeque<Job>,
    outstanding: BTreeMap<u64, Job>,
    next_id: u64,
}

impl Agent {
    /// `first_id` grows from one incarnation to the next, so that an answer meant for a dead pager names nothing, and no order of
    /// that one fills anything from now on.
    ///
    /// # Errors
    /// Staging memory without room for the gate.
    pub fn new(
        conn: Option<ConnId>,
        maps: Fd,
        staging: Window,
        staging_fd: Fd,
        first_id: u64,
    ) -> Result<Self, HookError> {
        let gate = FillGate::open(&*staging_fd)?;
        gate.end_reading(first_id - 1);
        let slots = u32::try_from(staging.len() / (SLOT_PAGES * uhmm_kernel_hook::PAGE_SIZE)).unwrap_or(0);
        Ok(Self {
            conn,
            maps,
            staging,
            staging_fd,
            gate,
            refused: 0,
            free_slots: (0..slots).rev().collect(),
            waiting: VecDeque::new(),
            outstanding: BTreeMap::new(),
            next_id: first_id,
        })
    }

    /// Queues a job.
    pub fn ask(&mut self, job: Job) {
        self.waiting.push_back(job);
    }

    /// Jobs that can be sent now, in order. Those that need a slot hold back others of their kind, not those that free slots.
    pub fn ready(&mut self) -> Vec<(u64, Job)> {
        let mut ready = Vec::new();
        let mut kept = VecDeque::new();
        while let Some(mut job) = self.waiting.pop_front() {
            if job.needs_slot() {
                job.slot = self.free_slots.pop();
            }
            if job.needs_slot() {
                kept.push_back(job);
                continue;
            }
            self.outstanding.insert(self.next_id, job);
            ready.push((self.next_id, job));
            self.next_id += 1;
        }
        self.waiting = kept;
        ready
    }

    /// What a new connection must be asked again, in order.
    pub fn unanswered(&self) -> Vec<(u64, Job)> {
        self.outstanding.iter().map(|(id, job)| (*id, *job)).collect()
    }

    /// The answer to a job came. Its slot, if it has one, is the caller's until [`Agent::free_slot`].
    pub fn answered(&mut self, id: u64) -> Option<Job> {
        self.outstanding.remove(&id)
    }

    /// A slot for the pager's own use (to bring a huge page home).
    pub fn take_slot(&mut self) -> Option<u32> {
        self.free_slots.pop()
    }

    /// The slot's content is not needed any more.
    pub fn free_slot(&mut self, slot: u32) {
        self.free_slots.push(slot);
    }

    /// mremap: these pages are elsewhere now. Jobs that were not sent yet go to the new addresses.
    pub fn moved(&mut self, region: RegionId, pages: Pages) {
        self.overtake(region, pages, |job| !job.is_about_frames());
    }

    /// These pages are unmapped, or their content is not wanted any more: none of them may be put back from now on.
    pub fn dropped(&mut self, region: RegionId, pages: Pages) {
        self.overtake(region, pages, Job::fills);
    }

    fn overtake(&mut self, region: RegionId, pages: Pages, concerned: impl Fn(&Job) -> bool) {
        let concerned = |job: &&mut Job| job.region == region && job.pages.overlap(pages).is_some() && concerned(job);
        for job in self.outstanding.values_mut().filter(concerned) {
            job.overtaken = true;
            if job.fills() {
                self.refused = self.next_id - 1;
            }
        }
        self.waiting.iter_mut().filter(concerned).for_each(|job| job.overtaken = true);
    }

    /// Events of the process may be read now: the agent fills nothing until [`Agent::end_reading`]. `false`: it does just now.
    pub fn begin_reading(&self) -> bool {
        self.gate.begin_reading()
    }

    /// What was read is decided, and everything that it has overtaken was told.
    pub fn end_reading(&self) {
        self.gate.end_reading(self.refused);
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
        let diary = self.staging.len().saturating_sub(DIARY_BYTES);
        let word = |index: u64| self.staging.load_u64(diary + 8 * index).unwrap_or(0);
        (0..DIARY_ENTRIES).any(|entry| word(2 * entry) <= addrs.start && addrs.end() <= word(2 * entry + 1))
    }

    /// Jobs that wait or are under way.
    pub fn len(&self) -> usize {
        self.waiting.len() + self.outstanding.len()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;

    use uhmm_ipc::shared::fill_gate::Fill;
    use uhmm_kernel_hook::memfd;
    use uhmm_kernel_hook::window::Prot;

    use super::*;

    fn agent(slots: u64) -> Agent {
        let len = slots * SLOT_PAGES * 4096 + DIARY_BYTES;
        let memory = memfd::create_sealed("uhmm-test-staging", len).unwrap();
        let staging = Window::map(memory.as_fd(), 0, len, Prot::ReadWrite).unwrap();
        let memory = Arc::new(memory);
        Agent::new(None, memory.clone(), staging, memory, 1 << 32).unwrap()
    }

    fn job(order: Order, first: u64) -> Job {
        let purpose = Purpose::Out { ticket: Ticket(first), device: 0, frame: 0 };
        Job::new(RegionId(1), Pages { first, count: 8 }, order, purpose)
    }

    #[test]
    fn jobs_without_a_slot_wait_and_others_pass_them() {
        let mut agent = agent(1);
        for order in [Order::MoveOut, Order::MoveOut, Order::Drop { in_place: false }] {
            agent.ask(job(order, 0));
        }
        let ready = agent.ready();
        assert_eq!(
            ready.iter().map(|(_, job)| job.order).collect::<Vec<_>>(),
            [Order::MoveOut, Order::Drop { in_place: false }]
        );
        assert!(agent.ready().is_empty());
        let done = agent.answered(ready[0].0).unwrap();
        agent.free_slot(done.slot.unwrap());
        assert_eq!(agent.ready().len(), 1);
    }

    #[test]
    fn a_new_connection_is_asked_what_was_not_answered_in_order() {
        let mut agent = agent(4);
        (0..3).for_each(|first| agent.ask(job(Order::MoveOut, first * 8)));
        let sent = agent.ready();
        assert!(agent.answered(sent[1].0).is_some() && agent.answered(sent[1].0).is_none());
        assert_eq!(agent.unanswered(), [sent[0], sent[2]]);
        assert_eq!(agent.give_up().len(), 2);
    }

    #[test]
    fn what_the_program_drops_is_not_put_back_and_other_orders_are_not_concerned() {
        let mut agent = agent(4);
        let agents_side = FillGate::open(&*agent.staging_fd).unwrap();
        agent.ask(job(Order::MoveBack, 0));
        agent.ask(job(Order::MoveOut, 0));
        let sent = agent.ready();
        agent.ask(job(Order::FillHuge { slot: 3 }, 0));
        assert!(agent.begin_reading());
        agent.dropped(RegionId(2), Pages { first: 0, count: 9 });
        agent.dropped(RegionId(1), Pages { first: 8, count: 9 });
        agent.end_reading();
        assert_eq!(agents_side.fill(sent[0].0, || ()), Fill::Done(()));
        assert!(agent.begin_reading());
        agent.dropped(RegionId(1), Pages { first: 7, count: 9 });
        agent.end_reading();
        assert_eq!(agents_side.fill(sent[1].0, || ()), Fill::Refused, "all that were sent by then");
        let overtaken: Vec<bool> = sent.iter().map(|(id, _)| agent.answered(*id).unwrap().overtaken).collect();
        assert_eq!(overtaken, [true, false], "what was taken out is dropped where it arrives");
        let waiting = agent.ready();
        assert!(waiting[0].1.overtaken, "never sent");
    }

    #[test]
    fn no_order_of_a_dead_pager_fills_anything() {
        let agent = agent(1);
        let agents_side = FillGate::open(&*agent.staging_fd).unwrap();
        assert_eq!(agents_side.fill((1 << 32) - 1, || ()), Fill::Refused);
        assert_eq!(agents_side.fill(1 << 32, || ()), Fill::Done(()));
    }

    #[test]
    fn allocated_memory_does_not_move_so_orders_about_its_frames_stay_good() {
        let mut agent = agent(1);
        agent.ask(job(Order::MapDevice { device: 0, frame: 3, generation: 1 }, 8));
        agent.ask(job(Order::UnmapDevice, 8));
        agent.moved(RegionId(1), Pages { first: 0, count: 100 });
        let ready = agent.ready();
        assert!(ready[0].0 < ready[1].0 && ready.iter().all(|(_, job)| !job.overtaken && job.is_about_frames()));
    }

    #[test]
    fn only_an_own_drop_of_exactly_these_pages_is_recognised() {
        let mut agent = agent(1);
        agent.ask(job(Order::Drop { in_place: true }, 8));
        let is_dropping = |agent: &Agent, region: u64, first: u64, count: u64| {
            let addrs = AddrRange { start: first * 4096, len: count * 4096 };
            agent.is_dropping(RegionId(region), Pages { first, count }, addrs)
        };
        assert!(!is_dropping(&agent, 1, 8, 8), "the agent has not begun: this is the program's");
        let diary = agent.staging.len() - DIARY_BYTES;
        // The agent may have gone on to the next one when the event is dealt with.
        for (word, page) in [8, 16, 32, 40].into_iter().enumerate() {
            agent.staging.store_u64(diary + 8 * word as u64, page * 4096).unwrap();
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
}
