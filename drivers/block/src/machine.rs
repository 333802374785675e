//! One lane of requests to a medium: what is asked, in pieces, in flight, late, tried again. Pure: `event, now -> actions`.
//!
//! ```text
//!   Ask ---> pieces wait: reads first ---> Start, a slot each ---> Done ----> all pieces: Ended
//!              ^   ^                         |  deadline: the ask ends; slot, pin and blocks stay with the request until it is answered
//!              |   +-- later, page by page --+  failed, or not what was put there
//! ```
//! * A write goes to blocks that nobody refers to, and the frames refer to them when it was acknowledged. Tried again it goes elsewhere.
//! * What a read brings is checked by whoever has the key; wrong pages are read once more, alone, and then they are lost: exactly these.
//! * Whatever answers twice, too late or about something unknown changes nothing.
//!
//! Its tests are those of the lane (`lane/tests.rs`), over media that do all of this.
//!
//! Copies on several servers have their place here: a piece would have a request for each, and end with the last write or the first good read.

use std::collections::{HashMap, VecDeque};

use uhmm_driver_kit::Frames;
use uhmm_kernel_hook::HookError;

use crate::runs::Run;
use crate::store::{Pin, Store};

/// Pages of one request at most.
pub const PIECE_PAGES: u32 = 64;

/// How much and how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests in flight.
    pub depth: u32,
    /// Writes among them: the rest is for reads, which somebody waits for.
    pub writes: u32,
    /// A read that is not answered for so long is given up.
    pub deadline_us: u64,
    /// A write: its page stays at home.
    pub write_deadline_us: u64,
    /// How often a page is read or written before it is given up.
    pub tries: u32,
    /// Pause before the second try; four times as long before each further one.
    pub pause_us: u64,
}

impl Limits {
    fn deadline_us(&self, write: bool) -> u64 {
        if write { self.write_deadline_us } else { self.deadline_us }
    }
}

/// What is done to frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Memory to frames.
    Write,
    /// Frames to memory.
    Read,
    /// Frames become zero.
    Zero,
}

/// What somebody wants.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// Its name; not that of another one that has not ended.
    pub ticket: u64,
    /// What.
    pub op: Op,
    /// Which frames; they exist.
    pub frames: Frames,
    /// Page of the asker's memory that the first frame comes from or goes to.
    pub place: u64,
}

/// A request to the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its name, never used again in this lane.
    pub id: u64,
    /// Write, else read.
    pub write: bool,
    /// Where.
    pub blocks: Run,
    /// Whose pages.
    pub frame: u32,
    /// First page of the asker's memory.
    pub place: u64,
    /// Which of the lane's buffers.
    pub slot: u32,
    /// How often it was tried before.
    pub tries: u32,
}

/// Why pages were not moved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The medium said no.
    #[error("{0}")]
    Refused(String),
    /// It said nothing.
    #[error("the medium has not answered for {} ms", .0 / 1000)]
    Late(u64),
    /// Other bytes came back.
    #[error("{0}")]
    Wrong(uhmm_driver_kit::seal::SealError),
    /// No block to write to.
    #[error("there is no free block: {resting} rest because writes to them were not answered")]
    Full {
        /// Blocks.
        resting: u32,
    },
    /// The table's memory.
    #[error("the block table cannot be used: {0}")]
    Table(String),
}

impl From<HookError> for Fault {
    fn from(error: HookError) -> Self {
        Self::Table(error.to_string())
    }
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All of it done, and what was read is right.
    Done,
    /// Nothing of it lands any more.
    Failed(Fault),
    /// These pages, counted from the first, are not those that were put there.
    Wrong(Vec<u32>, Fault),
    /// The session broke: a write may still land, until the server is known to have dropped the session.
    Unknown(u64, Fault),
}

/// What happens.
#[derive(Clone, Debug)]
pub enum Event {
    /// Somebody wants something.
    Ask(Ask),
    /// A request was answered.
    Done(u64, Outcome),
    /// Time has passed.
    Tick,
}

/// How an ask ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Why, of the first page.
    pub fault: Fault,
    /// Frames that were not moved, counted from the first one, ascending.
    pub pages: Vec<u32>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this to the medium; what is written is sealed first.
    Start(Request),
    /// Pages of the asker's memory become zero.
    Fill {
        /// First page.
        place: u64,
        /// Pages.
        count: u32,
    },
    /// An ask has ended, once.
    Ended(u64, Result<(), Failure>),
}

/// A part of an ask.
#[derive(Clone, Debug)]
struct Piece {
    ticket: u64,
    write: bool,
    frames: Frames,
    place: u64,
    /// Where it is read from.
    pinned: Option<(Pin, u32)>,
    /// Blocks that refused it.
    avoid: Vec<Run>,
    tries: u32,
    since_us: u64,
}

#[derive(Debug)]
struct Flight {
    piece: Piece,
    blocks: Run,
    slot: u32,
    deadline_us: u64,
    given_up: bool,
}

#[derive(Debug)]
struct Job {
    first_frame: u32,
    pieces: u32,
    failed: Vec<u32>,
    fault: Option<Fault>,
}

/// What a lane has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests to the medium.
    pub requests: u64,
    /// Pages tried again.
    pub retries: u64,
    /// Requests given up at their deadline.
    pub late: u64,
    /// Pages that came back wrong.
    pub wrong: u64,
    /// Answers to nothing.
    pub strays: u64,
}

/// See the module head.
#[derive(Debug)]
pub struct Machine {
    limits: Limits,
    jobs: HashMap<u64, Job>,
    reads: VecDeque<Piece>,
    writes: VecDeque<Piece>,
    later: Vec<(u64, Piece)>,
    flights: HashMap<u64, Flight>,
    slots: Vec<u32>,
    piece_pages: u32,
    writing: u32,
    next_id: u64,
    counts: Counts,
}

impl Machine {
    /// Idle.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            jobs: HashMap::new(),
            reads: VecDeque::new(),
            writes: VecDeque::new(),
            later: Vec::new(),
            flights: HashMap::new(),
            slots: (0..limits.depth).rev().collect(),
            piece_pages: PIECE_PAGES,
            writing: 0,
            next_id: 1,
            counts: Counts::default(),
        }
    }

    /// Requests have so many pages at most.
    pub fn set_pieces(&mut self, pages: u32) {
        self.piece_pages = pages.clamp(1, PIECE_PAGES);
    }

    /// Asks that have not ended.
    pub fn open_asks(&self) -> usize {
        self.jobs.len()
    }

    /// Somebody still waits for this request, so what it brings may be put into the asker's memory.
    pub fn wants(&self, id: u64) -> bool {
        self.flights.get(&id).is_some_and(|flight| !flight.given_up)
    }

    /// What it has counted.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// When [`Event::Tick`] has something to do.
    pub fn wakes_at(&self) -> Option<u64> {
        let deadlines = self.flights.values().filter(|flight| !flight.given_up).map(|flight| flight.deadline_us);
        let queued = self.reads.iter().chain(&self.writes).map(|piece| self.end_us(piece));
        deadlines.chain(self.later.iter().map(|(due, _)| *due)).chain(queued).min()
    }

    /// One step. What is to be done is appended to `out`, in order.
    pub fn handle(&mut self, store: &mut Store, now_us: u64, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::Ask(ask) => self.ask(store, now_us, ask, out),
            Event::Done(id, outcome) => self.answered(store, now_us, id, outcome, out),
            Event::Tick => {}
        }
        self.give_up(store, now_us, out);
        let (due, later) = std::mem::take(&mut self.later).into_iter().partition(|(due, _)| *due <= now_us);
        self.later = later;
        let due: Vec<(u64, Piece)> = due;
        due.into_iter().for_each(|(_, piece)| self.queue(piece));
        self.start(store, now_us, out);
    }

    fn ask(&mut self, store: &mut Store, now_us: u64, ask: Ask, out: &mut Vec<Action>) {
        let Ask { ticket, op, frames, place } = ask;
        let mut job = Job { first_frame: frames.first, pieces: 0, failed: Vec::new(), fault: None };
        let piece = |frames: Frames, pinned| {
            let place = place + u64::from(frames.first - job.first_frame);
            let write = op == Op::Write;
            Piece { ticket, write, frames, place, pinned, avoid: Vec::new(), tries: 0, since_us: now_us }
        };
        let mut pieces = Vec::new();
        let done = match op {
            Op::Zero => store.zero(frames),
            Op::Write => {
                for at in (0..frames.count).step_by(self.piece_pages as usize) {
                    let count = self.piece_pages.min(frames.count - at);
                    pieces.push(piece(Frames { first: frames.first + at, count }, None));
                }
                Ok(())
            }
            Op::Read => store.parts(frames, self.piece_pages).map(|parts| {
                for part in parts {
                    let Some(first) = part.block else {
                        let place = place + u64::from(part.frames.first - frames.first);
                        out.push(Action::Fill { place, count: part.frames.count });
                        continue;
                    };
                    let pin = store.pin(Run { first, count: part.frames.count });
                    pieces.push(piece(part.frames, Some((pin, first))));
                }
            }),
        };
        if let Err(error) = done {
            job.fault = Some(error.into());
            job.failed = (0..frames.count).collect();
        }
        job.pieces = pieces.len() as u32;
        pieces.into_iter().for_each(|piece| self.queue(piece));
        self.jobs.insert(ticket, job);
        self.end_if_done(ticket, out);
    }

    fn queue(&mut self, piece: Piece) {
        if piece.write { self.writes.push_back(piece) } else { self.reads.push_back(piece) }
    }

    /// Reads before writes, as long as there are slots.
    fn start(&mut self, store: &mut Store, now_us: u64, out: &mut Vec<Action>) {
        while !self.slots.is_empty() {
            if let Some(piece) = self.reads.pop_front() {
                let first = piece.pinned.map_or(0, |(_, first)| first);
                let blocks = Run { first, count: piece.frames.count };
                self.fly(piece, blocks, now_us, out);
            } else if self.writing < self.limits.writes
                && let Some(piece) = self.writes.pop_front()
            {
                let taken = store.take(piece.frames.count);
                if !self.write_to(store, piece, taken, now_us, out) {
                    return;
                }
            } else {
                return;
            }
        }
    }

    /// False: there is no free block now.
    fn write_to(
        &mut self,
        store: &mut Store,
        mut piece: Piece,
        taken: Option<Run>,
        now_us: u64,
        out: &mut Vec<Action>,
    ) -> bool {
        // Its old blocks may be the next ones that are taken, but not by itself.
        piece.avoid.drain(..).for_each(|run| store.release(run));
        let Some(blocks) = taken else {
            if self.end_us(&piece) > now_us {
                // Others end their reads and writes meanwhile.
                self.later.push((now_us + self.limits.pause_us.max(1), piece));
            } else {
                let all = (0..piece.frames.count).collect::<Vec<_>>();
                self.failed(&piece, &all, Fault::Full { resting: store.resting_blocks() });
                self.piece_ended(piece.ticket, out);
            }
            return false;
        };
        if blocks.count < piece.frames.count {
            let (had, rest) = (blocks.count, piece.frames.count - blocks.count);
            let frames = Frames { first: piece.frames.first + had, count: rest };
            self.writes.push_front(Piece { frames, place: piece.place + u64::from(had), ..piece.clone() });
            piece.frames.count = had;
            if let Some(job) = self.jobs.get_mut(&piece.ticket) {
                job.pieces += 1;
            }
        }
        self.fly(piece, blocks, now_us, out);
        true
    }

    fn fly(&mut self, piece: Piece, blocks: Run, now_us: u64, out: &mut Vec<Action>) {
        let Some(slot) = self.slots.pop() else { return self.queue(piece) };
        let id = self.next_id;
        self.next_id += 1;
        self.counts.requests += 1;
        self.writing += u32::from(piece.write);
        out.push(Action::Start(Request {
            id,
            write: piece.write,
            blocks,
            frame: piece.frames.first,
            place: piece.place,
            slot,
            tries: piece.tries,
        }));
        let deadline_us = now_us.saturating_add(self.limits.deadline_us(piece.write));
        self.flights.insert(id, Flight { piece, blocks, slot, deadline_us, given_up: false });
    }

    fn answered(&mut self, store: &mut Store, now_us: u64, id: u64, outcome: Outcome, out: &mut Vec<Action>) {
        let Some(Flight { piece, blocks, slot, given_up, .. }) = self.flights.remove(&id) else {
            self.counts.strays += 1;
            return;
        };
        self.slots.push(slot);
        self.writing -= u32::from(piece.write);
        if piece.write {
            self.written(store, now_us, piece, blocks, outcome, given_up, out);
        } else if given_up {
            piece.pinned.into_iter().for_each(|(pin, _)| store.unpin(pin));
        } else {
            self.read(store, now_us, piece, outcome, out);
        }
    }

    #[allow(clippy::too_many_arguments)] // Reason: the parts of one flight, and what `handle` was given.
    fn written(
        &mut self,
        store: &mut Store,
        now_us: u64,
        mut piece: Piece,
        blocks: Run,
        outcome: Outcome,
        given_up: bool,
        out: &mut Vec<Action>,
    ) {
        let all: Vec<u32> = (0..piece.frames.count).collect();
        let fault = match outcome {
            _ if given_up => {
                // Whoever asked was told that it failed. Answered is answered: nothing lands there any more.
                match outcome {
                    Outcome::Unknown(session, _) => store.rest(session, blocks),
                    _ => store.release(blocks),
                }
                return;
            }
            Outcome::Done => match store.publish(piece.frames.first, blocks) {
                Ok(()) => return self.piece_ended(piece.ticket, out),
                Err(error) => error.into(),
            },
            Outcome::Unknown(session, fault) => {
                store.rest(session, blocks);
                fault
            }
            Outcome::Failed(fault) | Outcome::Wrong(_, fault) => {
                piece.avoid.push(blocks);
                fault
            }
        };
        piece.tries += 1;
        if piece.tries < self.limits.tries {
            self.counts.retries += u64::from(piece.frames.count);
            piece.since_us = now_us + self.pause(piece.tries);
            self.later.push((piece.since_us, piece));
            return;
        }
        piece.avoid.drain(..).for_each(|run| store.release(run));
        self.failed(&piece, &all, fault);
        self.piece_ended(piece.ticket, out);
    }

    fn read(&mut self, store: &mut Store, now_us: u64, piece: Piece, outcome: Outcome, out: &mut Vec<Action>) {
        let Some((pin, first)) = piece.pinned else { return };
        let (bad, fault) = match outcome {
            Outcome::Done => (Vec::new(), None),
            Outcome::Failed(fault) | Outcome::Unknown(_, fault) => ((0..piece.frames.count).collect(), Some(fault)),
            Outcome::Wrong(bad, fault) => {
                self.counts.wrong += bad.len() as u64;
                (bad, Some(fault))
            }
        };
        let tries = piece.tries + 1;
        // What was asked for together is tried again page by page: so it shows which ones are lost.
        if let Some(fault) = fault {
            for at in bad.iter().copied().filter(|at| *at < piece.frames.count) {
                if tries >= self.limits.tries && piece.frames.count == 1 {
                    self.failed(&piece, &[at], fault.clone());
                    continue;
                }
                let pin = store.pin(Run { first: first + at, count: 1 });
                let frames = Frames { first: piece.frames.first + at, count: 1 };
                let place = piece.place + u64::from(at);
                let since_us = now_us + self.pause(tries);
                let again = Piece { frames, place, pinned: Some((pin, first + at)), tries, since_us, ..piece.clone() };
                self.counts.retries += 1;
                if let Some(job) = self.jobs.get_mut(&piece.ticket) {
                    job.pieces += 1;
                }
                self.later.push((since_us, again));
            }
        }
        store.unpin(pin);
        self.piece_ended(piece.ticket, out);
    }

    /// Nobody waits for it any longer.
    fn end_us(&self, piece: &Piece) -> u64 {
        piece.since_us.saturating_add(self.limits.deadline_us(piece.write))
    }

    fn pause(&self, tries: u32) -> u64 {
        self.limits.pause_us << (2 * (tries - 1)).min(20)
    }

    /// What is not answered in time is not waited for. The request keeps what it may still use. Nor is a slot waited for any longer, when all have
    /// such requests.
    fn give_up(&mut self, store: &mut Store, now_us: u64, out: &mut Vec<Action>) {
        let (reads, writes) = (std::mem::take(&mut self.reads), std::mem::take(&mut self.writes));
        let (kept, queued): (VecDeque<Piece>, VecDeque<Piece>) =
            reads.into_iter().chain(writes).partition(|piece| self.end_us(piece) > now_us);
        kept.into_iter().for_each(|piece| self.queue(piece));
        for piece in queued {
            piece.pinned.into_iter().for_each(|(pin, _)| store.unpin(pin));
            piece.avoid.iter().for_each(|run| store.release(*run));
            self.too_late(&piece, out);
        }
        let late = |flight: &&mut Flight| !flight.given_up && flight.deadline_us <= now_us;
        let mut given_up = Vec::new();
        for flight in self.flights.values_mut().filter(late) {
            flight.given_up = true;
            given_up.push(flight.piece.clone());
        }
        // In the order of their frames: a hash map has none.
        given_up.sort_by_key(|piece| (piece.ticket, piece.frames.first));
        given_up.iter().for_each(|piece| self.too_late(piece, out));
    }

    fn too_late(&mut self, piece: &Piece, out: &mut Vec<Action>) {
        self.counts.late += 1;
        let all: Vec<u32> = (0..piece.frames.count).collect();
        self.failed(piece, &all, Fault::Late(self.limits.deadline_us(piece.write)));
        self.piece_ended(piece.ticket, out);
    }

    fn failed(&mut self, piece: &Piece, pages: &[u32], fault: Fault) {
        let Some(job) = self.jobs.get_mut(&piece.ticket) else { return };
        let first = piece.frames.first - job.first_frame;
        job.failed.extend(pages.iter().map(|at| first + at));
        job.fault.get_or_insert(fault);
    }

    fn piece_ended(&mut self, ticket: u64, out: &mut Vec<Action>) {
        if let Some(job) = self.jobs.get_mut(&ticket) {
            job.pieces -= 1;
        }
        self.end_if_done(ticket, out);
    }

    fn end_if_done(&mut self, ticket: u64, out: &mut Vec<Action>) {
        if self.jobs.get(&ticket).is_none_or(|job| job.pieces > 0) {
            return;
        }
        let Some(Job { mut failed, fault, .. }) = self.jobs.remove(&ticket) else { return };
        failed.sort_unstable();
        out.push(Action::Ended(ticket, fault.map_or(Ok(()), |fault| Err(Failure { fault, pages: failed }))));
    }
}
