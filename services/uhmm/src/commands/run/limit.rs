//! `--ram SIZE`: what the program has in memory stays below a limit, and the rest of it lives on the device.
//!
//! ```text
//!   look (every 10-100 ms): resident bytes of all its processes        > limit - reserve/2 ?
//!       |                                                                    | yes
//!       |          lap: the kernel tells which pages are in memory (PAGEMAP_SCAN), in order of addresses, from where the last lap ended
//!       |               blocks of 64 KiB --> policy: Send | Keep --> neighbours together --> pager: MoveRange
//!       `<-------------------------------------------- until so much has left that limit - reserve is reached, or a lap has been made
//! ```
//! Leaving is asynchronous: the reserve is what the program can grow by, and bring back, before it is over its limit; no fault waits for room. What is not
//! managed (code, stacks, shared memory) counts and cannot leave. The pager moves what it manages of a range and leaves the rest alone,
//! so this needs no list of its own: the kernel's view is the truth.

use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use uhmm_kernel_hook::pagemap::{self, Categories, PageRun};
use uhmm_kernel_hook::procmap::{self, Vma};
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE, PidFd, process};
use uhmm_sdk::Operator;

use super::policy::{BLOCK_BYTES, Block, Place, Policy, Verdict};

/// The reserve is this part of the limit, between these bounds.
const RESERVE_PART: u64 = 16;
const RESERVE_MIN_BYTES: u64 = 8 << 20;
const RESERVE_MAX_BYTES: u64 = 256 << 20;
/// Where a program's memory can be.
const ALL_ADDRESSES: AddrRange = AddrRange { start: 0, len: 1 << 47 };
/// What is asked of the kernel, and of the pager, at once.
const SCAN_BYTES: u64 = 32 << 20;
const MOVE_BYTES: u64 = 4 << 20;
/// Between two looks: near the limit, and far below it.
const SOON: Duration = Duration::from_millis(10);
const LATER: Duration = Duration::from_millis(100);
/// After a lap in which nothing left, doubled each time: what is new is not managed yet, or the device is full, or nothing is left that could leave.
const STUCK_MIN: Duration = Duration::from_millis(20);
const STUCK_MAX: Duration = Duration::from_secs(1);

/// Where a lap goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Hand {
    pid: u32,
    addr: u64,
}

/// What a look found.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// Of all processes.
    pub resident_bytes: u64,
    /// When to look again.
    pub pause: Duration,
}

/// The limit and all that it remembers.
pub struct Limit {
    ram_bytes: u64,
    device: u8,
    policy: Box<dyn Policy>,
    hand: Hand,
    /// Blocks that were sent, until the policy has been told that they came back.
    sent: HashSet<Place>,
    /// A policy that keeps everything has had its lap.
    overruled: bool,
    stuck_until: Option<Instant>,
    stuck_pause: Duration,
    pub tally: Tally,
}

/// What holding the limit came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Pages that have left because of the limit.
    pub sent_pages: u64,
    /// Looks that found more than the limit, and of how many.
    pub looks_over: u64,
    pub looks: u64,
    /// Laps in which nothing could leave, as there was nothing before for a second.
    pub laps_stuck: u64,
}

/// One process that is looked after.
struct Process {
    handle: PidFd,
    pagemap: OwnedFd,
    /// Private memory that can be read and written and is of no file.
    writable: Vec<AddrRange>,
}

impl Limit {
    pub fn new(ram_bytes: u64, device: u8, policy: Box<dyn Policy>) -> Self {
        Self {
            ram_bytes,
            device,
            policy,
            hand: Hand::default(),
            sent: HashSet::new(),
            overruled: false,
            stuck_until: None,
            stuck_pause: STUCK_MIN,
            tally: Tally::default(),
        }
    }

    fn reserve_bytes(&self) -> u64 {
        (self.ram_bytes / RESERVE_PART).clamp(RESERVE_MIN_BYTES, RESERVE_MAX_BYTES).min(self.ram_bytes / 2)
    }

    /// Looks, and sends away what is too much.
    pub fn look(&mut self, operator: &mut Operator, pids: &[u32]) -> Look {
        let resident_bytes = resident(pids);
        let (high, low) = (self.ram_bytes - self.reserve_bytes() / 2, self.ram_bytes - self.reserve_bytes());
        self.tally.looks += 1;
        self.tally.looks_over += u64::from(resident_bytes > self.ram_bytes);
        let stuck = self.stuck_until.is_some_and(|until| Instant::now() < until);
        if resident_bytes <= high || stuck {
            let near = resident_bytes > low.saturating_sub(2 * self.reserve_bytes());
            return Look { resident_bytes, pause: if near { SOON } else { LATER } };
        }
        let wanted_pages = (resident_bytes - low).div_ceil(PAGE_SIZE);
        let was_overruled = self.overruled;
        let left = self.lap(operator, pids, wanted_pages);
        self.tally.sent_pages += left;
        // The next lap overrules a policy that has kept everything.
        let stuck = left == 0 && (was_overruled || !self.overruled);
        self.stuck_until = stuck.then(|| Instant::now() + self.stuck_pause);
        self.stuck_pause = if stuck { (self.stuck_pause * 2).min(STUCK_MAX) } else { STUCK_MIN };
        self.tally.laps_stuck += u64::from(stuck && self.stuck_pause == STUCK_MAX);
        Look { resident_bytes, pause: SOON }
    }

    pub fn ended(&mut self, pid: u32) {
        self.policy.ended(pid);
        self.sent.retain(|place| place.pid != pid);
    }

    /// From the hand once around, until so many pages have left. Returns how many have.
    fn lap(&mut self, operator: &mut Operator, pids: &[u32], wanted_pages: u64) -> u64 {
        let processes: BTreeMap<u32, Process> =
            pids.iter().filter_map(|pid| Some((*pid, Process::open(*pid)?))).collect();
        let begin = self.hand;
        let mut left = 0;
        let mut kept_all = true;
        for (pid, range) in stretches(&processes, begin) {
            let Some(process) = processes.get(&pid) else { continue };
            let blocks = self.judged(pid, &process.present(range));
            for run in joined(&blocks) {
                kept_all = false;
                left += self.send(operator, process, pid, run);
                self.hand = Hand { pid, addr: run.end() };
                if left >= wanted_pages {
                    self.overruled = false;
                    return left;
                }
            }
            self.hand = Hand { pid, addr: range.end() };
        }
        self.overruled = kept_all;
        left
    }

    /// The blocks that shall leave, in order.
    fn judged(&mut self, pid: u32, present: &[PageRun]) -> Vec<u64> {
        let mut pages: BTreeMap<u64, u64> = BTreeMap::new();
        for run in present {
            let mut at = run.start;
            while at < run.end {
                let block = at - at % BLOCK_BYTES;
                let to = (block + BLOCK_BYTES).min(run.end);
                *pages.entry(block).or_default() += (to - at) / PAGE_SIZE;
                at = to;
            }
        }
        let shall_leave = |(addr, resident_pages): (u64, u64)| {
            let place = Place { pid, addr };
            let came_back = self.sent.remove(&place);
            let verdict = self.policy.judge(&Block { place, resident_pages, came_back });
            (verdict == Verdict::Send || self.overruled).then_some(addr)
        };
        pages.into_iter().filter_map(shall_leave).collect()
    }

    fn send(&mut self, operator: &mut Operator, process: &Process, pid: u32, run: AddrRange) -> u64 {
        match operator.move_range(&process.handle, run, Some(self.device)) {
            Ok(0) => 0,
            Ok(pages) => {
                let blocks = (run.start..run.end()).step_by(BLOCK_BYTES as usize);
                self.sent.extend(blocks.map(|addr| Place { pid, addr }));
                pages
            }
            // It may have ended, or be kept at home, or the device is full: the next lap tells.
            Err(error) => {
                tracing::debug!(pid, %run, %error, "Pages stay where they are");
                0
            }
        }
    }
}

impl Process {
    /// What is in memory there and its own.
    fn present(&self, range: AddrRange) -> Vec<PageRun> {
        let foreign = Categories::FILE | Categories::PFNZERO;
        let runs = pagemap::scan(self.pagemap.as_fd(), range, Categories::PRESENT | foreign).unwrap_or_default();
        let own = |run: &PageRun| run.categories.contains(Categories::PRESENT) && !run.categories.intersects(foreign);
        runs.into_iter().filter(own).collect()
    }

    /// `None`: it has ended, or is somebody else's.
    fn open(pid: u32) -> Option<Self> {
        let (handle, maps) = (PidFd::open(pid).ok()?, procmap::open_maps(pid).ok()?);
        let vmas = procmap::query_range(maps.as_fd(), ALL_ADDRESSES).ok()?;
        let own = |vma: &&Vma| vma.read && vma.write && !vma.shared && vma.inode == 0;
        let writable = vmas.iter().filter(own).map(Vma::range).collect();
        Some(Self { handle, pagemap: pagemap::open_pagemap(pid).ok()?, writable })
    }
}

/// Once around all memory from the hand on, in pieces that one look of the kernel is for.
fn stretches(processes: &BTreeMap<u32, Process>, hand: Hand) -> Vec<(u32, AddrRange)> {
    let all = processes.iter().flat_map(|(pid, process)| process.writable.iter().map(|range| (*pid, *range)));
    let pieces = all.flat_map(|(pid, range)| {
        let starts = (range.start..range.end()).step_by(SCAN_BYTES as usize);
        starts.map(move |start| (pid, AddrRange { start, len: SCAN_BYTES.min(range.end() - start) }))
    });
    let (before, after): (Vec<_>, Vec<_>) =
        pieces.partition(|(pid, range)| (*pid, range.end()) <= (hand.pid, hand.addr));
    let cut = |(pid, range): (u32, AddrRange)| {
        let start = if pid == hand.pid { range.start.max(hand.addr) } else { range.start };
        (pid, AddrRange { start, len: range.end() - start })
    };
    after.into_iter().map(cut).chain(before).collect()
}

/// Neighbouring blocks as one range, of [`MOVE_BYTES`] at most.
fn joined(blocks: &[u64]) -> Vec<AddrRange> {
    let mut runs: Vec<AddrRange> = Vec::new();
    for addr in blocks {
        match runs.last_mut().filter(|run| run.end() == *addr && run.len < MOVE_BYTES) {
            Some(run) => run.len += BLOCK_BYTES,
            None => runs.push(AddrRange { start: *addr, len: BLOCK_BYTES }),
        }
    }
    runs
}

/// Bytes in memory. Pages that a forked child still shares with its parent count once, which only the kernel can tell (Pss), at some cost.
pub fn resident(pids: &[u32]) -> u64 {
    if let [pid] = pids {
        return process::rss(*pid).map_or(0, |rss| rss.anon + rss.file + rss.shmem);
    }
    pids.iter().filter_map(|pid| process::proportional_bytes(*pid)).sum()
}
