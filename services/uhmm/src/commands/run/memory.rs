//! What a program has in memory, as the kernel tells it: resident bytes, and which pages of which mappings.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use uhmm_kernel_hook::pagemap::{self, Categories, PageRun};
use uhmm_kernel_hook::procmap::{self, Vma};
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE, PidFd, process};

use super::policy::BLOCK_BYTES;
use super::rules::{LeftAlone, Mapping, names};

/// Where a program's memory can be.
const ALL_ADDRESSES: AddrRange = AddrRange { start: 0, len: 1 << 47 };
/// What is asked of the kernel at once.
const SCAN_BYTES: u64 = 32 << 20;

/// Where a lap goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hand {
    pub pid: u32,
    pub addr: u64,
}

/// One process that is looked after.
pub struct Process {
    pub handle: PidFd,
    pagemap: OwnedFd,
    /// Private memory that can be read and written and is of no file.
    writable: Vec<AddrRange>,
}

/// The blocks that have pages there, in order, with how many.
pub fn blocks(present: &[PageRun]) -> BTreeMap<u64, u64> {
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
    pages
}

impl Process {
    /// What is in memory there and its own.
    pub fn present(&self, range: AddrRange) -> Vec<PageRun> {
        let foreign = Categories::FILE | Categories::PFNZERO;
        let runs = pagemap::scan(self.pagemap.as_fd(), range, Categories::PRESENT | foreign).unwrap_or_default();
        let own = |run: &PageRun| run.categories.contains(Categories::PRESENT) && !run.categories.intersects(foreign);
        runs.into_iter().filter(own).collect()
    }

    /// `None`: it has ended, or is somebody else's.
    pub fn open(pid: u32, left_alone: &LeftAlone) -> Option<Self> {
        let (handle, maps) = (PidFd::open(pid).ok()?, procmap::open_maps(pid).ok()?);
        let vmas = procmap::query_range(maps.as_fd(), ALL_ADDRESSES).ok()?;
        let names = if left_alone.has_names() { names(pid).ok()? } else { Vec::new() };
        let own = |vma: &&Vma| {
            let known = names.binary_search_by_key(&vma.start, |(start, _)| *start).ok();
            let name = known.and_then(|at| names.get(at)).map_or("", |(_, name)| name);
            let mapping = Mapping { name, len_bytes: vma.range().len };
            vma.read && vma.write && !vma.shared && vma.inode == 0 && !left_alone.has(&mapping)
        };
        let writable = vmas.iter().filter(own).map(Vma::range).collect();
        Some(Self { handle, pagemap: pagemap::open_pagemap(pid).ok()?, writable })
    }
}

/// Once around all memory from the hand on, in pieces that one look of the kernel is for.
pub fn stretches(processes: &BTreeMap<u32, Process>, hand: Hand) -> Vec<(u32, AddrRange)> {
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

/// Bytes in memory. Pages that a forked child still shares with its parent count once, which only the kernel can tell (Pss), at some cost.
pub fn resident(pids: &[u32]) -> u64 {
    if let [pid] = pids {
        return process::rss(*pid).map_or(0, |rss| rss.anon + rss.file + rss.shmem);
    }
    pids.iter().filter_map(|pid| process::proportional_bytes(*pid)).sum()
}
