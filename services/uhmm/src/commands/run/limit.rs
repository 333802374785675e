//! `--ram SIZE`: what the program has in memory stays below a limit, and the rest of it lives on the device.
//!
//! ```text
//!   look (every 10-100 ms): resident bytes of all its processes        > limit - reserve/2 ?
//!       |                                                                    | yes
//!       |          lap: the kernel tells which pages are in memory (PAGEMAP_SCAN), in order of addresses, from where the last lap ended
//!       |               blocks of 64 KiB --> policy: Send | Keep --> neighbours together --> pager: MoveRange, at once or after a rest
//!       `<-------------------------------------------- until so much is on its way that limit - reserve is reached, or a lap has been made
//! ```
//! Leaving is asynchronous: the reserve is what the program can grow by, and bring back, before it is over its limit; no fault waits for room. What is not
//! managed (code, stacks, shared memory) counts and cannot leave. The pager moves what it manages of a range and leaves the rest alone,
//! so this needs no list of its own: the kernel's view is the truth. Who is over the limit has no time: what is to rest rests a quarter as long then, and not at
//! all where even the reserve is used up twice.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use uhmm_kernel_hook::pagemap::PageRun;
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};
use uhmm_sdk::{Error, MoveId, Operator, Rest, Rested};

use super::memory::{Hand, Process, blocks, resident, stretches};
use super::policy::{BLOCK_BYTES, Block, MOVE_BYTES, PIECE_BYTES, Place, Policy, Verdict};
use super::rules::LeftAlone;

/// The reserve is this part of the limit, between these bounds.
const RESERVE_PART: u64 = 16;
const RESERVE_MIN_BYTES: u64 = 8 << 20;
const RESERVE_MAX_BYTES: u64 = 256 << 20;
/// Moves that are under way at a time: those that rest hold a slot of the program's agent each (`pager/service/src/rest.rs`).
const MOVES_MAX: usize = 12;
/// What a policy may let rest for.
const REST_MAX: Duration = Duration::from_secs(1);
/// Between two looks: near the limit, and far below it.
const SOON: Duration = Duration::from_millis(10);
const LATER: Duration = Duration::from_millis(100);
/// After a lap in which nothing left, doubled each time: what is new is not managed yet, or the device is full, or nothing is left that could leave.
const STUCK_MIN: Duration = Duration::from_millis(20);
const STUCK_MAX: Duration = Duration::from_secs(1);

/// What a look found.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// Of all processes.
    pub resident_bytes: u64,
    /// When to look again.
    pub pause: Duration,
}

/// What is known of a block.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    /// It was sent, and nobody has been told that it came back.
    sent: bool,
    touched: Option<Instant>,
}

/// A move that is under way.
#[derive(Clone, Copy, Debug)]
struct Moving {
    pid: u32,
    range: AddrRange,
    pages: u64,
    rests: bool,
}

/// A piece that shall leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    range: AddrRange,
    pages: u64,
    rest: Option<Duration>,
    /// Blocks up to here may be joined to it.
    end: u64,
}

/// The limit and all that it remembers.
pub struct Limit {
    ram_bytes: u64,
    device: u8,
    policy: Box<dyn Policy>,
    left_alone: LeftAlone,
    /// Who is over the limit has time all the same: it was made for it.
    patient: bool,
    hand: Hand,
    known: HashMap<Place, Known>,
    moving: HashMap<MoveId, Moving>,
    /// A policy that keeps everything has had its lap.
    overruled: bool,
    /// Pages that have left since a lap was made.
    left_in_lap: u64,
    stuck_until: Option<Instant>,
    stuck_pause: Duration,
    pub tally: Tally,
}

/// What holding the limit came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Pages that have left because of the limit.
    pub sent_pages: u64,
    /// Pieces that the program has touched while they rested, so that they stayed.
    pub touched_pieces: u64,
    /// Answers of the policy that made no sense.
    pub strange_answers: u64,
    /// Looks that found more than the limit, and of how many.
    pub looks_over: u64,
    pub looks: u64,
    /// Laps in which nothing could leave, as there was nothing before for a second.
    pub laps_stuck: u64,
}

impl Limit {
    pub fn new(ram_bytes: u64, device: u8, policy: Box<dyn Policy>, left_alone: LeftAlone) -> Self {
        Self {
            ram_bytes,
            device,
            policy,
            left_alone,
            patient: false,
            hand: Hand::default(),
            known: HashMap::new(),
            moving: HashMap::new(),
            overruled: false,
            left_in_lap: 0,
            stuck_until: None,
            stuck_pause: STUCK_MIN,
            tally: Tally::default(),
        }
    }

    /// Whoever has made it follows the program with it: nothing is in a hurry.
    pub fn patient(self) -> Self {
        Self { patient: true, ..self }
    }

    /// Another limit from now on.
    pub fn set(&mut self, ram_bytes: u64) {
        self.ram_bytes = ram_bytes;
    }

    fn reserve_bytes(&self) -> u64 {
        (self.ram_bytes / RESERVE_PART).clamp(RESERVE_MIN_BYTES, RESERVE_MAX_BYTES).min(self.ram_bytes / 2)
    }

    /// Looks, and sends away what is too much.
    pub fn look(&mut self, operator: &mut Operator, pids: &[u32]) -> Look {
        self.take_ended(operator, Duration::ZERO);
        let resident_bytes = resident(pids);
        let (high, low) = (self.ram_bytes - self.reserve_bytes() / 2, self.ram_bytes - self.reserve_bytes());
        self.tally.looks += 1;
        self.tally.looks_over += u64::from(resident_bytes > self.ram_bytes);
        let stuck = self.stuck_until.is_some_and(|until| Instant::now() < until);
        let leaving_bytes = self.moving.values().map(|moving| moving.pages).sum::<u64>() * PAGE_SIZE;
        if resident_bytes.saturating_sub(leaving_bytes) <= high || stuck {
            let near = resident_bytes > low.saturating_sub(2 * self.reserve_bytes());
            return Look { resident_bytes, pause: if near { SOON } else { LATER } };
        }
        let wanted_pages = (resident_bytes - low).div_ceil(PAGE_SIZE);
        let (was_overruled, end) = (self.overruled, Instant::now() + SOON);
        let around = self.lap(operator, pids, (wanted_pages, resident_bytes), end);
        if around {
            self.take_ended(operator, end.saturating_duration_since(Instant::now()));
            // The next lap overrules a policy that has kept everything.
            let stuck = self.left_in_lap == 0 && self.moving.is_empty() && (was_overruled || !self.overruled);
            let pause = if stuck { self.stuck_pause } else { STUCK_MIN };
            self.stuck_until = Some(Instant::now() + pause);
            self.stuck_pause = if stuck { (self.stuck_pause * 2).min(STUCK_MAX) } else { STUCK_MIN };
            self.tally.laps_stuck += u64::from(stuck && self.stuck_pause == STUCK_MAX);
            self.left_in_lap = 0;
        }
        Look { resident_bytes, pause: if self.moving.is_empty() { SOON } else { Duration::ZERO } }
    }

    pub fn ended(&mut self, pid: u32) {
        self.policy.ended(pid);
        self.known.retain(|place, _| place.pid != pid);
    }

    /// From the hand on, until so many pages are on their way or time is over. Whether it came around.
    fn lap(&mut self, operator: &mut Operator, pids: &[u32], need: (u64, u64), end: Instant) -> bool {
        let (wanted_pages, resident_bytes) = need;
        let processes: BTreeMap<u32, Process> =
            pids.iter().filter_map(|pid| Some((*pid, Process::open(*pid, &self.left_alone)?))).collect();
        let begin = self.hand;
        let mut kept_all = true;
        for (pid, range) in stretches(&processes, begin) {
            let Some(process) = processes.get(&pid) else { continue };
            for piece in self.judged(pid, &process.present(range)) {
                kept_all = false;
                while self.moving.len() >= MOVES_MAX {
                    let left = end.saturating_duration_since(Instant::now());
                    self.take_ended(operator, left);
                    if left.is_zero() && self.moving.len() >= MOVES_MAX {
                        return false;
                    }
                }
                self.begin(operator, process, pid, piece, resident_bytes);
                self.hand = Hand { pid, addr: piece.range.end() };
                if self.moving.values().map(|moving| moving.pages).sum::<u64>() >= wanted_pages {
                    self.overruled = false;
                    return false;
                }
            }
            self.hand = Hand { pid, addr: range.end() };
        }
        self.overruled = kept_all;
        true
    }

    /// The pieces that shall leave, in order.
    fn judged(&mut self, pid: u32, present: &[PageRun]) -> Vec<Piece> {
        let now = Instant::now();
        let mut pieces: Vec<Piece> = Vec::new();
        for (addr, resident_pages) in blocks(present) {
            let place = Place { pid, addr };
            if self.moving.values().any(|moving| moving.pid == pid && moving.range.contains(addr)) {
                continue;
            }
            let known = self.known.entry(place).or_default();
            let came_back = std::mem::take(&mut known.sent);
            if came_back {
                known.touched = Some(now);
            }
            let age = known.touched.map(|touched| now.saturating_duration_since(touched));
            let verdict = self.policy.judge(&Block { place, resident_pages, came_back, age });
            let Some(piece) = self.validated(addr, resident_pages, verdict) else { continue };
            match pieces.last_mut() {
                Some(last) if last.range.end() == addr && addr < last.end && last.rest == piece.rest => {
                    last.range.len += BLOCK_BYTES;
                    last.pages += resident_pages;
                }
                _ => pieces.push(piece),
            }
        }
        pieces
    }

    /// What of an answer can be done: a block never leaves with what was not judged itself, nor in a piece that is too large for its way.
    fn validated(&mut self, addr: u64, pages: u64, verdict: Verdict) -> Option<Piece> {
        let range = AddrRange { start: addr, len: BLOCK_BYTES };
        let (answer, rest) = match verdict {
            Verdict::Send { range, rest } => (range, rest.filter(|rest| !rest.is_zero())),
            Verdict::Keep if self.overruled => (range, None),
            Verdict::Keep => return None,
        };
        let end = answer.start.checked_add(answer.len).filter(|end| answer.start <= addr && addr < *end);
        let strange = end.is_none() || rest.is_some_and(|rest| rest > REST_MAX);
        self.tally.strange_answers += u64::from(strange);
        let most = if rest.is_some() { PIECE_BYTES } else { MOVE_BYTES };
        let end = end.unwrap_or(addr).min(addr - addr % most + most);
        Some(Piece { range, pages, rest: rest.map(|rest| rest.min(REST_MAX)), end })
    }

    fn begin(&mut self, operator: &mut Operator, process: &Process, pid: u32, piece: Piece, resident_bytes: u64) {
        let over = if self.patient { 0 } else { resident_bytes.saturating_sub(self.ram_bytes) };
        let rest = piece.rest.filter(|_| over <= self.reserve_bytes());
        let rest = rest
            .map(|rest| if over > 0 { rest / 4 } else { rest })
            .map(|rest| Rest { ms: u32::try_from(rest.as_millis()).unwrap_or(u32::MAX).max(1), stays: false });
        match operator.begin_move(&process.handle, piece.range, self.device, rest) {
            Ok(id) => {
                let (range, pages, rests) = (piece.range, piece.pages, rest.is_some());
                self.moving.insert(id, Moving { pid, range, pages, rests });
            }
            Err(error) => tracing::debug!(pid, range = %piece.range, %error, "Pages stay where they are"),
        }
    }

    /// Waits for the first one that ends, as long as that.
    fn take_ended(&mut self, operator: &mut Operator, timeout: Duration) {
        match operator.moves_done(timeout) {
            Ok(ended) => ended.into_iter().for_each(|(id, result)| self.ended_one(id, result)),
            Err(error) => tracing::debug!(%error, "What became of moves is not known"),
        }
    }

    fn ended_one(&mut self, id: MoveId, result: Result<Rested, Error>) {
        let Some(Moving { pid, range, rests, .. }) = self.moving.remove(&id) else { return };
        let rested = result.unwrap_or_else(|error| {
            // It may have ended, or be kept at home, or the device is full: the next lap tells.
            tracing::debug!(pid, %range, %error, "Pages stay where they are");
            Rested::default()
        });
        self.tally.sent_pages += rested.moved_pages;
        self.left_in_lap += rested.moved_pages;
        let touched = rests && rested.busy_pages > 0;
        if touched {
            self.tally.touched_pieces += 1;
            self.policy.touched(pid, range);
        }
        for addr in (range.start..range.end()).step_by(BLOCK_BYTES as usize) {
            let known = self.known.entry(Place { pid, addr }).or_default();
            known.sent |= rested.moved_pages > 0;
            if touched {
                known.touched = Some(Instant::now());
            }
        }
    }
}
