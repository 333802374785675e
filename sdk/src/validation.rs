//! Calls to drivers that wait until the pager has taken back what devices may not do any more: mprotect and its like tell nobody.
//!
//! ```text
//!   access, kernel --> mappings as at the last time, no new grant, no guard? --yes----------------------> sent to the driver
//!                          `-- no --> asked (Revalidate to the pager) --> answered, remembered --> next: sent, in the order of asking
//! ```
//! What is remembered was looked at **before** the pager was asked, together with the word that the pager changes before it allows a
//! device anything: whatever changes later differs from it.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::time::Instant;

use uhmm_ipc::CallId;
use uhmm_ipc::message::{Reply, TraceId, WireError, pager};
use uhmm_kernel_hook::procmap::Vma;
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE, pagemap, procmap};

use crate::links::{Deliver, Make};

/// Pages that are looked through for guards before a kernel; more are asked of nobody (see the pager's `revalidate`).
const GUARD_PAGES_MAX: u64 = 1 << 14;
/// Ranges that are remembered.
const KNOWN_MAX: usize = 8;

/// Where this process's mappings are looked at.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) maps: BorrowedFd<'a>,
    pub(crate) pagemap: BorrowedFd<'a>,
    /// See `uhmm_shared::agent::GRANTS`.
    pub(crate) grants: Option<u64>,
}

impl View<'_> {
    /// The mappings of some ranges, cut to them; `None` where the kernel does not tell.
    fn of(&self, ranges: &[AddrRange]) -> Option<Vec<Vma>> {
        let mut all = Vec::new();
        for range in ranges {
            let vmas = procmap::query_range(self.maps, *range).ok()?;
            all.extend(vmas.iter().filter_map(|vma| part_of(vma, *range)));
        }
        Some(all)
    }

    fn has_guards(&self, ranges: &[AddrRange]) -> bool {
        let found = |range: &AddrRange| pagemap::guards(self.pagemap, *range).is_ok_and(|guards| !guards.is_empty());
        ranges.iter().any(found)
    }
}

/// A look at some ranges that the pager has confirmed.
struct Known {
    /// What was asked about; `None`: the whole process, of which devices have mappings in `ranges`.
    asked: Option<AddrRange>,
    ranges: Vec<AddrRange>,
    vmas: Vec<Vma>,
    grants: u64,
}

/// A look before the pager was asked.
struct Look {
    asked: Option<AddrRange>,
    /// Of the range, or of the ranges that the last answer told.
    ranges: Vec<AddrRange>,
    vmas: Option<Vec<Vma>>,
    grants: Option<u64>,
}

/// A call to a driver.
pub(crate) struct Validated {
    pub(crate) driver: String,
    pub(crate) make: Make,
    pub(crate) trace: TraceId,
    /// When its answer must be here.
    pub(crate) until: Option<Instant>,
    pub(crate) deliver: Deliver,
}

/// The pager's answer, once it is here.
type Answer = Option<Result<(), WireError>>;

/// See the module head.
#[derive(Default)]
pub(crate) struct Validations {
    /// By driver, in the order of asking.
    waiting: BTreeMap<String, VecDeque<(CallId, Answer, Validated)>>,
    /// What was looked at before a question that is on its way.
    looks: BTreeMap<CallId, Look>,
    known: VecDeque<Known>,
    /// Where devices have mappings, by the last answer about the whole process.
    told: Option<Vec<AddrRange>>,
}

impl Validations {
    /// Nothing has changed since the pager was asked last: the call can go to the driver at once. (Not before others that wait.)
    pub(crate) fn stands(&self, driver: &str, range: Option<AddrRange>, view: View<'_>) -> bool {
        let covers = |known: &&Known| match (known.asked, range) {
            (None, None) => true,
            (Some(asked), Some(range)) => asked.contains_range(&range),
            (None, Some(range)) => known.ranges.iter().any(|known| known.contains_range(&range)),
            (Some(_), None) => false,
        };
        let Some(known) = self.known.iter().find(covers).filter(|_| !self.waiting.contains_key(driver)) else {
            return false;
        };
        let ranges = range.map_or(known.ranges.clone(), |range| vec![range]);
        let expected: Vec<Vma> = match range {
            Some(range) => known.vmas.iter().filter_map(|vma| part_of(vma, range)).collect(),
            None => known.vmas.clone(),
        };
        let page_count: u64 = ranges.iter().map(|range| range.len / PAGE_SIZE).sum();
        view.grants == Some(known.grants)
            && view.of(&ranges).is_some_and(|now| now == expected)
            && (range.is_none() && page_count > GUARD_PAGES_MAX || !view.has_guards(&ranges))
    }

    /// `id`: of the question to the pager.
    pub(crate) fn asked(&mut self, id: CallId, range: Option<AddrRange>, view: View<'_>, call: Validated) {
        let ranges = range.map(|range| vec![range]).or_else(|| self.told.clone()).unwrap_or_default();
        let look = Look { asked: range, vmas: view.of(&ranges), ranges, grants: view.grants };
        self.looks.insert(id, look);
        self.waiting.entry(call.driver.clone()).or_default().push_back((id, None, call));
    }

    /// The pager has answered; false for an answer to something else.
    pub(crate) fn answered(&mut self, id: CallId, result: &Result<Reply, WireError>) -> bool {
        let mut all = self.waiting.values_mut().flatten();
        let Some((_, answer, _)) = all.find(|(known, _, _)| *known == id) else { return false };
        *answer = Some(result.as_ref().map(drop).map_err(Clone::clone));
        if let (Some(look), Ok(reply)) = (self.looks.remove(&id), result) {
            self.remember(look, reply);
        }
        true
    }

    fn remember(&mut self, look: Look, reply: &Reply) {
        self.known.retain(|known| known.asked != look.asked);
        let told = match reply {
            Reply::Pager(pager::Reply::Granted { ranges }) => {
                Some(ranges.iter().map(|range| AddrRange { start: range.addr, len: range.len_bytes }).collect())
            }
            _ => None,
        };
        let same = look.asked.is_some() || told.as_ref() == Some(&look.ranges);
        if look.asked.is_none() {
            self.told = told;
        }
        let Look { asked, ranges, vmas: Some(vmas), grants: Some(grants) } = look else { return };
        if same {
            self.known.push_front(Known { asked, ranges, vmas, grants });
            self.known.truncate(KNOWN_MAX);
        }
    }

    /// Nobody will answer: all calls that wait.
    pub(crate) fn give_up(&mut self) -> Vec<Validated> {
        self.looks.clear();
        std::mem::take(&mut self.waiting).into_values().flatten().map(|(_, _, call)| call).collect()
    }

    /// A call whose turn it is, and why it is refused, if it is.
    pub(crate) fn next(&mut self) -> Option<(Validated, Option<WireError>)> {
        let is_due = |lane: &&mut VecDeque<(CallId, Answer, Validated)>| {
            lane.front().is_some_and(|(_, answer, _)| answer.is_some())
        };
        let (_, answer, call) = self.waiting.values_mut().find(is_due)?.pop_front()?;
        self.waiting.retain(|_, lane| !lane.is_empty());
        Some((call, answer.and_then(Result::err)))
    }
}

/// A mapping cut to a range.
fn part_of(vma: &Vma, range: AddrRange) -> Option<Vma> {
    let part = vma.range().intersection(&range)?;
    // Without a file it is 0 wherever a mapping begins.
    let offset = if vma.inode == 0 { 0 } else { vma.offset + (part.start - vma.start) };
    Some(Vma { start: part.start, end: part.end(), offset, ..*vma })
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use uhmm_ipc::message::ErrorCode;
    use uhmm_kernel_hook::own_memory::{self, RangeAdvice};
    use uhmm_kernel_hook::program::ProgramMemory;

    use super::*;

    struct Own {
        maps: OwnedFd,
        pagemap: OwnedFd,
    }

    impl Own {
        fn new() -> Self {
            Self { maps: procmap::open_own_maps().unwrap(), pagemap: pagemap::open_own_pagemap().unwrap() }
        }

        fn view(&self, grants: u64) -> View<'_> {
            View { maps: self.maps.as_fd(), pagemap: self.pagemap.as_fd(), grants: Some(grants) }
        }
    }

    fn ask(validations: &mut Validations, own: &Own, range: Option<AddrRange>, grants: u64, told: &[AddrRange]) {
        validations.asked(CallId(7), range, own.view(grants), call("d", 7));
        let ranges = told.iter().map(|range| pager::GrantedRange { addr: range.start, len_bytes: range.len }).collect();
        let reply = if range.is_some() { pager::Reply::Done } else { pager::Reply::Granted { ranges } };
        assert!(validations.answered(CallId(7), &Ok(Reply::Pager(reply))));
        assert!(validations.next().is_some());
    }

    #[test]
    fn the_pager_is_asked_again_when_a_mapping_or_a_grant_has_changed_and_not_otherwise() {
        let own = Own::new();
        let memory = ProgramMemory::private(16 * PAGE_SIZE).unwrap();
        let part =
            |first: u64, count: u64| AddrRange { start: memory.addr() + first * PAGE_SIZE, len: count * PAGE_SIZE };
        let mut validations = Validations::default();
        for range in [Some(part(2, 4)), None] {
            assert!(!validations.stands("d", range, own.view(1)));
            ask(&mut validations, &own, range, 1, &[part(2, 4)]);
            if range.is_none() {
                assert!(!validations.stands("d", range, own.view(1)), "only now it is known where to look");
                ask(&mut validations, &own, range, 1, &[part(2, 4)]);
            }
            assert!(validations.stands("d", range, own.view(1)));
            assert!(validations.stands("d", Some(part(3, 2)), own.view(1)), "a part of it");
            assert!(!validations.stands("d", Some(part(1, 2)), own.view(1)), "more than that");
            assert!(!validations.stands("d", range, own.view(2)), "a grant");
            memory.protect(0, PAGE_SIZE, true, false).unwrap();
            assert!(validations.stands("d", range, own.view(1)), "outside of it");
            memory.protect(3 * PAGE_SIZE, PAGE_SIZE, true, false).unwrap();
            assert!(!validations.stands("d", range, own.view(1)), "fewer rights");
            assert!(!validations.stands("d", Some(part(3, 2)), own.view(1)), "fewer rights in a part");
            assert!(validations.stands("d", Some(part(2, 1)), own.view(1)), "and not in this one");
            memory.protect(0, 16 * PAGE_SIZE, true, true).unwrap();
            assert!(validations.stands("d", range, own.view(1)));
            if pagemap::tells_guards() {
                own_memory::advise(part(5, 1), RangeAdvice::GuardInstall).unwrap();
                assert!(!validations.stands("d", range, own.view(1)), "a guard");
                own_memory::advise(part(5, 1), RangeAdvice::GuardRemove).unwrap();
            }
        }
        assert!(validations.stands("d", Some(part(3, 1)), own.view(1)), "a part of what is known of the whole process");
        assert!(!validations.stands("d", Some(part(5, 2)), own.view(1)));
        memory.unmap(4 * PAGE_SIZE, PAGE_SIZE).unwrap();
        assert!(!validations.stands("d", None, own.view(1)));
    }

    fn call(driver: &str, trace: u64) -> Validated {
        let make: Make = Box::new(|_| Err(crate::Error::AgentGone));
        Validated { driver: driver.into(), make, trace: TraceId(trace), until: None, deliver: Box::new(drop) }
    }

    #[test]
    fn calls_to_one_driver_keep_their_order_and_others_do_not_wait_for_them() {
        let own = Own::new();
        let mut validations = Validations::default();
        for (id, driver) in [(1, "a"), (2, "a"), (3, "b")] {
            validations.asked(CallId(id), None, own.view(0), call(driver, id));
        }
        let done = Ok(Reply::Pager(pager::Reply::Done));
        assert!(!validations.answered(CallId(9), &done));
        assert!(validations.answered(CallId(2), &done));
        assert!(validations.next().is_none(), "the first has no answer yet");
        assert!(validations.answered(CallId(3), &Err(WireError::new(ErrorCode::Io, "broken"))));
        let (b, refused) = validations.next().unwrap();
        assert_eq!((b.trace.0, refused.map(|error| error.code)), (3, Some(ErrorCode::Io)));
        assert!(validations.answered(CallId(1), &done));
        let order: Vec<u64> = std::iter::from_fn(|| validations.next()).map(|(call, _)| call.trace.0).collect();
        assert_eq!(order, [1, 2]);
    }
}
