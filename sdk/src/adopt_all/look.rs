//! One look at the address space: what is new is adopted, what has become a thread's is given back.
//!
//! ```text
//!   maps, threads' words --cut, decide--> pieces --probe--> managed: counted, or given back where a thread lives now
//!                                                  \-> new --worth--> smaps, guards --decide--> runs --worth--> AdoptRegion
//! ```
//!
//! smaps walks every page table up to the last new mapping, so it is read only when there is one that maps alone does not rule out, and what
//! it has ruled out is remembered for a while. Measured with 1000 mappings, none of them new: a look costs 6 times as much as reading
//! /proc/self/maps, and half as much as reading smaps of memory that is hardly touched (the most of it is a UFFDIO_MOVE of nothing for each
//! mapping, see `RegistrationProbe`). With a new one behind 512 MiB of touched 4 KiB pages: 10 times that, 1.5 times a reading of smaps.
//!
//! Nothing here is needed for a page to come home: the pager does that without the SDK, so that this may itself live in managed memory.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use uhmm_ipc::message::{Call, ErrorCode, Reply, pager};
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE, RegistrationProbe, own_memory, pagemap, threads};

use super::maps::{self, Mapping};
use super::policy::{LeftAlone, Surroundings, cut, decide, follows_guard, is_kept_stack, worth};
use crate::Error;
use crate::adopted::AdoptedRanges;
use crate::links::Peer;
use crate::own::{self, Noted};
use crate::pending::Pending;
use crate::session::Inner;

/// How long what smaps or the pager has ruled out is not asked about again, unless the mapping changes.
const REMEMBERED: Duration = Duration::from_secs(5);
/// How often the kernel is asked about a mapping while events of the userfaultfd are unread.
const PROBE_TRIES: u32 = 3;
/// How long a call is waited for before it is asked whether to stop.
const WAIT_STEP: Duration = Duration::from_millis(100);

/// What [`Session::adopt_all`](crate::Session::adopt_all) has found and done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdoptedAll {
    /// Regions that this call has made.
    pub region_count: u64,
    /// Bytes that this call has put under management.
    pub bytes: u64,
    /// Bytes of private memory that were under management before.
    pub already_bytes: u64,
    /// Bytes that are left alone, by reason, in the order of [`LeftAlone::ALL`]; a reason without bytes is left out.
    pub left_alone: Vec<(LeftAlone, u64)>,
    /// Bytes that this call has given back, because a thread lives there now.
    pub given_back_bytes: u64,
}

impl AdoptedAll {
    pub(super) fn changed(&self) -> bool {
        self.region_count > 0 || self.given_back_bytes > 0
    }
}

/// What is kept between looks.
#[derive(Debug)]
pub(crate) struct Looker {
    state: Mutex<State>,
    probe: Arc<RegistrationProbe>,
    _noted: Vec<Noted>,
}

/// Mappings that were ruled out, by bounds, and until when that counts.
#[derive(Debug, Default)]
struct State {
    ruled_out: HashMap<AddrRange, (LeftAlone, Instant)>,
}

/// Memory that may be adopted.
#[derive(Clone, Debug)]
struct Candidate<'a> {
    piece: AddrRange,
    mapping: &'a Mapping,
    around: Surroundings,
}

/// Neighbouring candidates: one region.
#[derive(Debug)]
struct Run<'a> {
    range: AddrRange,
    parts: Vec<Candidate<'a>>,
}

/// What a look is about.
struct Look<'a> {
    session: &'a Arc<Inner>,
    stopped: &'a dyn Fn() -> bool,
    probe: &'a Arc<RegistrationProbe>,
    state: &'a mut State,
    left: BTreeMap<LeftAlone, u64>,
    /// In order, neighbours joined.
    managed: Vec<AddrRange>,
    report: AdoptedAll,
}

impl Looker {
    pub(super) fn new() -> Result<Self, Error> {
        let probe = RegistrationProbe::new().map_err(Error::kernel("Making pages to look for managed memory with"))?;
        let _noted = probe
            .ranges()
            .map(|range| own::note_not_inherited(range, "a page that uhmm looks for memory with"))
            .collect();
        Ok(Self { state: Mutex::default(), probe: Arc::new(probe), _noted })
    }

    /// Looks once. `stopped` is asked before everything that may wait for the pager.
    pub(super) fn look(&self, session: &Arc<Inner>, stopped: &dyn Fn() -> bool) -> Result<AdoptedAll, Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        state.ruled_out.retain(|_, (_, until)| *until > now);
        let (left, managed, report) = Default::default();
        Look { session, stopped, probe: &self.probe, state: &mut state, left, managed, report }.run()
    }

    /// Private memory that is under management now, in order, neighbours joined.
    pub(super) fn managed(&self, session: &Arc<Inner>) -> Result<Vec<AddrRange>, Error> {
        let maps = read_maps()?;
        let listed = session.adopted_list();
        let mut found = Vec::new();
        for mapping in maps.iter().filter(|mapping| mapping.is_private_anonymous()) {
            if !(mapping.read && mapping.write) {
                joined(listed.parts_in(mapping.range)).into_iter().for_each(|part| push_joined(&mut found, part));
            } else if is_managed(&self.probe, session, mapping.range.start, &|| false)? == Some(true) {
                push_joined(&mut found, mapping.range);
            }
        }
        for (own, _) in own::ranges() {
            found = found.into_iter().flat_map(|range| without(range, own)).collect();
        }
        Ok(found)
    }
}

impl Look<'_> {
    fn run(mut self) -> Result<AdoptedAll, Error> {
        // Before the mappings: what is released meanwhile is mapped, and must not be taken for unmapped.
        let released = self.session.released_list();
        let maps = read_maps()?;
        self.session.forget_unmapped(&maps.iter().map(|mapping| mapping.range).collect::<Vec<_>>(), &released);
        let (candidates, threads) = self.survey(&maps, &released)?;
        for range in threads {
            self.give_back(range)?;
        }
        let promising = self.worthwhile(merge(candidates));
        let known = self.with_flags(promising)?;
        let runs = self.worthwhile(merge(known));
        let mut made = Vec::new();
        let mut quota = false;
        for run in &runs {
            quota = quota || self.adopt(run, &mut made)?;
            if quota {
                self.leave(LeftAlone::Quota, run.range.len);
            }
        }
        self.recheck(&made)?;
        self.report.left_alone = self.left.into_iter().collect();
        Ok(self.report)
    }

    fn leave(&mut self, why: LeftAlone, bytes: u64) {
        *self.left.entry(why).or_default() += bytes;
    }

    fn count_managed(&mut self, piece: AddrRange) {
        push_joined(&mut self.managed, piece);
        self.report.already_bytes += piece.len;
    }

    /// How many bytes right before `addr` are managed.
    fn managed_before(&self, addr: u64) -> u64 {
        let found = self.managed.binary_search_by_key(&addr, AddrRange::end);
        found.map_or(0, |index| self.managed[index].len)
    }

    /// What may be adopted as far as maps tells, and what is managed though a thread lives there.
    fn survey<'m>(
        &mut self,
        maps: &'m [Mapping],
        released: &AdoptedRanges,
    ) -> Result<(Vec<Candidate<'m>>, Vec<AddrRange>), Error> {
        let heads = heads()?;
        let (listed, own) = (self.session.adopted_list(), own::ranges());
        let (mut candidates, mut threads) = (Vec::new(), Vec::new());
        let before = std::iter::once(None).chain(maps.iter().map(Some));
        for (before, mapping) in before.zip(maps) {
            let first = heads.partition_point(|head| *head < mapping.range.start);
            let inside = &heads[first..first + heads[first..].partition_point(|head| *head < mapping.range.end())];
            let guarded = follows_guard(before, mapping);
            for (piece, thread) in cut(mapping.range, guarded, inside) {
                let around = Surroundings {
                    own: own.iter().any(|(range, _)| range.overlaps(&piece)),
                    thread,
                    guarded: guarded && inside.is_empty() && is_kept_stack(piece),
                    released: released.overlaps(piece),
                };
                let verdict = decide(mapping, &around);
                let matters = matches!(verdict, Ok(()) | Err(LeftAlone::ThreadStack));
                let managed = match (matters, mapping.read && mapping.write) {
                    (false, _) => Some(false),
                    (true, true) => is_managed(self.probe, self.session, piece.start, self.stopped)?,
                    // The kernel cannot be asked about other rights.
                    (true, false) => Some(listed.overlaps(piece)),
                };
                match (verdict, managed) {
                    (Ok(()), Some(true)) => self.count_managed(piece),
                    (Ok(()), Some(false)) => match self.state.ruled_out.get(&piece) {
                        Some((why, _)) => *self.left.entry(*why).or_default() += piece.len,
                        None => candidates.push(Candidate { piece, mapping, around }),
                    },
                    // Only where a thread lives now; a guard alone may have come there later.
                    (Err(LeftAlone::ThreadStack), Some(true)) if thread => threads.push(piece),
                    (Err(LeftAlone::ThreadStack), Some(true)) => self.count_managed(piece),
                    (Err(why), _) => self.leave(why, piece.len),
                    // An event is on its way: the next look sees what has become of it.
                    (Ok(()), None) => {}
                }
            }
        }
        Ok((candidates, threads))
    }

    /// Leaves out what is too small to be worth a region.
    fn worthwhile<'m>(&mut self, runs: Vec<Run<'m>>) -> Vec<Run<'m>> {
        let mut kept = Vec::new();
        for run in runs {
            let heap = run.parts.first().is_some_and(|part| part.mapping.name == "[heap]");
            match worth(run.range, heap, self.managed_before(run.range.start)) {
                Ok(()) => kept.push(run),
                Err(why) => self.leave(why, run.range.len),
            }
        }
        kept
    }

    /// What is still to be adopted when smaps and the first page of each mapping are known.
    fn with_flags<'m>(&mut self, runs: Vec<Run<'m>>) -> Result<Vec<Candidate<'m>>, Error> {
        let Some(end) = runs.last().map(|run| run.range.end()) else { return Ok(Vec::new()) };
        let flags = maps::read_flags(end).map_err(|error| unreadable("/proc/self/smaps", error))?;
        let pagemap = pagemap::open_own_pagemap().map_err(Error::kernel("Opening /proc/self/pagemap"))?;
        let mut kept = Vec::new();
        for candidate in runs.into_iter().flat_map(|run| run.parts) {
            let whole = candidate.mapping.range;
            // Changed since maps was read: the next look sees what it is now.
            let Some(flags) = flags.around(&candidate.piece) else { continue };
            let mapping = Mapping { flags, ..candidate.mapping.clone() };
            let first = AddrRange { start: whole.start, len: PAGE_SIZE };
            let guarded = || pagemap::guards(pagemap.as_fd(), first).is_ok_and(|guards| !guards.is_empty());
            let guarded = is_kept_stack(whole) && guarded();
            match decide(&mapping, &Surroundings { guarded, ..candidate.around }) {
                Ok(()) => kept.push(candidate),
                Err(why) => self.rule_out(&candidate, why),
            }
        }
        Ok(kept)
    }

    fn rule_out(&mut self, candidate: &Candidate<'_>, why: LeftAlone) {
        self.leave(why, candidate.piece.len);
        self.state.ruled_out.insert(candidate.piece, (why, Instant::now() + REMEMBERED));
    }

    /// Makes a region of a run, or of each of its parts where the pager does not want the whole. True: the quota is reached.
    fn adopt(&mut self, run: &Run<'_>, made: &mut Vec<AddrRange>) -> Result<bool, Error> {
        let whole = self.adopt_range(run.range, made);
        match whole {
            Ok(()) => Ok(false),
            Err(error) if is_fatal(&error) => Err(error),
            Err(error) if error.code() == ErrorCode::NoMemory => Ok(true),
            Err(error) => {
                tracing::debug!(range = %run.range, %error, "Memory is left alone, or adopted in parts");
                for part in &run.parts {
                    let alone =
                        if run.parts.len() == 1 { Err(()) } else { self.adopt_range(part.piece, made).map_err(drop) };
                    if alone.is_err() {
                        self.rule_out(part, LeftAlone::Refused);
                    }
                }
                Ok(false)
            }
        }
    }

    fn adopt_range(&mut self, range: AddrRange, made: &mut Vec<AddrRange>) -> Result<(), Error> {
        if !self.session.settle_while(&|| !(self.stopped)())? {
            return Err(Error::AgentGone);
        }
        // Before it is asked: when this thread stops waiting, the memory may be managed nevertheless and needs the session's agent.
        self.session.note_adopted(range);
        let call = pager::Call::AdoptRegion { addr: range.start, len_bytes: range.len };
        let answer = self.session.links.call(Peer::Pager, Call::Pager(call), None, |reply| match reply {
            Reply::Pager(pager::Reply::RegionCreated { .. }) => Ok(()),
            _ => Err(Error::StrangeReply { question: "AdoptRegion" }),
        });
        let done = self.wait(&answer);
        match &done {
            Ok(()) => {
                made.push(range);
                self.report.region_count += 1;
                self.report.bytes += range.len;
            }
            Err(error) if is_fatal(error) => {}
            // Somebody else may have adopted it at the same moment.
            Err(_) => match is_managed(self.probe, self.session, range.start, self.stopped) {
                Ok(Some(true)) => {}
                _ => self.session.forget_adopted(range),
            },
        }
        done
    }

    /// A thread was born where memory was adopted a moment before.
    fn recheck(&mut self, made: &[AddrRange]) -> Result<(), Error> {
        if made.is_empty() {
            return Ok(());
        }
        for head in heads()?.into_iter().filter(|head| made.iter().any(|range| range.contains(*head))) {
            let page = AddrRange { start: head / PAGE_SIZE * PAGE_SIZE, len: PAGE_SIZE };
            let vmas = own_memory::mappings(page).map_err(Error::kernel("Looking at the mapping of a thread"))?;
            for vma in vmas {
                self.give_back(vma.range())?;
            }
        }
        Ok(())
    }

    fn give_back(&mut self, range: AddrRange) -> Result<(), Error> {
        tracing::debug!(%range, "A thread lives in managed memory now: it is given back");
        let call = pager::Call::ReleaseRange { addr: range.start, len_bytes: range.len };
        let answer = self.session.done("ReleaseRange", call, None);
        match self.wait(&answer) {
            Ok(()) => {
                self.session.forget_adopted(range);
                self.report.given_back_bytes += range.len;
                self.leave(LeftAlone::ThreadStack, range.len);
                Ok(())
            }
            Err(error) if is_fatal(&error) => Err(error),
            Err(error) => {
                tracing::warn!(%range, %error, "A thread's memory is not given back, and is tried again");
                Ok(())
            }
        }
    }

    fn wait(&self, answer: &Pending<()>) -> Result<(), Error> {
        loop {
            if let Some(result) = answer.wait_timeout(WAIT_STEP) {
                return result;
            }
            if (self.stopped)() {
                return Err(Error::AgentGone);
            }
        }
    }
}

/// The session is over, or its watcher.
fn is_fatal(error: &Error) -> bool {
    matches!(error, Error::AgentGone)
}

fn unreadable(path: &'static str, error: std::io::Error) -> Error {
    Error::kernel("Reading this process's mappings")(uhmm_kernel_hook::HookError::call(path, None, error))
}

fn read_maps() -> Result<Vec<Mapping>, Error> {
    maps::read_maps().map_err(|error| unreadable("/proc/self/maps", error))
}

/// Addresses of all threads' robust lists, in order.
fn heads() -> Result<Vec<u64>, Error> {
    let words = threads::thread_words().map_err(Error::kernel("Looking at this process's threads"))?;
    let mut heads: Vec<u64> = words.into_iter().map(|words| words.robust_list).collect();
    heads.sort_unstable();
    Ok(heads)
}

/// Whether readable and writable memory at `addr` is registered with the session's userfaultfd; `None` when that cannot be told now.
fn is_managed(
    probe: &Arc<RegistrationProbe>,
    session: &Arc<Inner>,
    addr: u64,
    stopped: &dyn Fn() -> bool,
) -> Result<Option<bool>, Error> {
    for _ in 0..PROBE_TRIES {
        let probe = Arc::clone(probe);
        let asked = session.links.ask(move |links| {
            let asked = links.uffd().map_or(Ok(None), |uffd| probe.ask(uffd, addr));
            asked.map_err(Error::kernel("Asking whether memory is managed"))
        })?;
        if asked.is_some() || !session.settle_while(&|| !stopped())? {
            return Ok(asked);
        }
    }
    Ok(None)
}

/// Joins candidates that lie side by side.
fn merge(candidates: Vec<Candidate<'_>>) -> Vec<Run<'_>> {
    let mut runs: Vec<Run<'_>> = Vec::new();
    for candidate in candidates {
        match runs.last_mut().filter(|run| run.range.end() == candidate.piece.start) {
            Some(run) => {
                run.range.len += candidate.piece.len;
                run.parts.push(candidate);
            }
            None => runs.push(Run { range: candidate.piece, parts: vec![candidate] }),
        }
    }
    runs
}

/// Ranges in order, joined where they touch.
pub(super) fn joined(mut ranges: Vec<AddrRange>) -> Vec<AddrRange> {
    ranges.sort_unstable();
    let mut all = Vec::new();
    ranges.into_iter().for_each(|range| push_joined(&mut all, range));
    all
}

fn push_joined(all: &mut Vec<AddrRange>, range: AddrRange) {
    match all.last_mut().filter(|last| last.end() == range.start) {
        Some(last) => last.len += range.len,
        None => all.push(range),
    }
}

/// What of `range` is not in `hole`.
fn without(range: AddrRange, hole: AddrRange) -> impl Iterator<Item = AddrRange> {
    let before = (range.start, range.end().min(hole.start));
    let behind = (range.start.max(hole.end()), range.end());
    [before, behind]
        .into_iter()
        .filter(|(start, end)| start < end)
        .map(|(start, end)| AddrRange { start, len: end - start })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, count: u64) -> AddrRange {
        AddrRange { start: first * PAGE_SIZE, len: count * PAGE_SIZE }
    }

    #[test]
    fn neighbours_become_one_run() {
        let mapping = Mapping::parse("1000-9000 rw-p 00000000 00:00 0 ").unwrap();
        let around = Surroundings::default();
        let candidate = |first, count| Candidate { piece: range(first, count), mapping: &mapping, around };
        let runs = merge(vec![candidate(1, 2), candidate(3, 1), candidate(5, 1)]);
        assert_eq!(
            runs.iter().map(|run| (run.range, run.parts.len())).collect::<Vec<_>>(),
            [(range(1, 3), 2), (range(5, 1), 1)]
        );
        assert!(merge(Vec::new()).is_empty());
    }

    #[test]
    fn ranges_are_joined_in_order_and_holes_are_cut_out() {
        assert_eq!(joined(vec![range(9, 1), range(1, 2), range(3, 2)]), [range(1, 4), range(9, 1)]);
        let cut = |hole| without(range(10, 10), hole).collect::<Vec<_>>();
        assert_eq!(cut(range(12, 1)), [range(10, 2), range(13, 7)]);
        assert_eq!(cut(range(20, 5)), [range(10, 10)]);
        assert_eq!(cut(range(5, 6)), [range(11, 9)]);
        assert!(cut(range(0, 100)).is_empty());
    }
}
