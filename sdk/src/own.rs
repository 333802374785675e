//! The registry of the SDK's own mappings: what is in it is never put under management.
//!
//! It is a table of the process, of atomic words only: no lock that a fork could leave taken, and nothing that blocks in a signal handler.
//! A forked child inherits the entries, and they stay right there: a mapping that children inherit is at the same place, and of one that they
//! do not (MADV_DONTFORK) nothing is there that could be adopted. The child may map something else at that place later; so that this can
//! be managed, such a mapping is better noted with [`note_not_inherited`].

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};

/// How many mappings can be noted at once.
const SLOTS: usize = 512;
/// Bits of a slot's word that count pages; those above are the number of the first page.
const COUNT_BITS: u32 = 28;

/// One mapping. A slot keeps its name for ever, so that it can be read while it is given to another mapping.
struct Slot {
    taken: AtomicBool,
    /// First page and count of pages, in one word so that both are of one mapping; 0: none.
    pages: AtomicU64,
    /// The process that has the mapping, 0: its children too.
    process: AtomicU32,
    what: OnceLock<&'static str>,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot { taken: AtomicBool::new(false), pages: AtomicU64::new(0), process: AtomicU32::new(0), what: OnceLock::new() }
}; SLOTS];

/// Keeps a mapping in the registry; dropping it forgets the mapping. (In a forked child that only forgets the child's entry.)
#[derive(Debug)]
#[must_use = "the mapping is forgotten when this is dropped"]
pub struct Noted {
    slot: Option<usize>,
}

impl Drop for Noted {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.and_then(|slot| TABLE.get(slot)) {
            slot.pages.store(0, Ordering::Release);
            slot.taken.store(false, Ordering::Release);
        }
    }
}

/// Memory of a library that belongs to uhmm and not to the program (its heap, for example): never put under management, by whatever call, as long
/// as the answer lives. `what` it is goes into the text of refusals. Children inherit the entry with the mapping.
pub fn never_manage(range: AddrRange, what: &'static str) -> Noted {
    note(range, what)
}

/// Notes a mapping of the SDK's own; `what` it is goes into the text of refusals ("the stack of uhmm's agent"). When the table is full, which
/// is a bug of the SDK, that is logged and the mapping is not noted.
pub(crate) fn note(range: AddrRange, what: &'static str) -> Noted {
    note_for(range, what, 0)
}

/// [`note`] for a mapping that children do not inherit (MADV_DONTFORK): the entry does not count in them.
pub(crate) fn note_not_inherited(range: AddrRange, what: &'static str) -> Noted {
    note_for(range, what, std::process::id())
}

fn note_for(range: AddrRange, what: &'static str, process: u32) -> Noted {
    let slot = word_of(range).and_then(|word| {
        let slot = TABLE.iter().position(|slot| take(slot, what))?;
        TABLE[slot].process.store(process, Ordering::Relaxed);
        TABLE[slot].pages.store(word, Ordering::Release);
        Some(slot)
    });
    if slot.is_none() {
        tracing::error!(%range, what, "A mapping of uhmm's own does not fit into the registry: please report it");
    }
    Noted { slot }
}

/// Takes a free slot of this name, or of none. Who has taken a slot is alone with its name, so that setting it never waits.
fn take(slot: &Slot, what: &'static str) -> bool {
    let fits = || slot.what.get().is_none_or(|name| *name == what);
    if !fits() || slot.taken.swap(true, Ordering::AcqRel) {
        return false;
    }
    let named = *slot.what.get_or_init(|| what) == what;
    if !named {
        slot.taken.store(false, Ordering::Release);
    }
    named
}

/// A noted mapping that shares a page with `range`.
pub(crate) fn overlapping(range: AddrRange) -> Option<(AddrRange, &'static str)> {
    noted().find(|(own, _)| own.overlaps(&range))
}

/// All noted mappings, in no order.
pub(crate) fn ranges() -> Vec<(AddrRange, &'static str)> {
    noted().collect()
}

fn noted() -> impl Iterator<Item = (AddrRange, &'static str)> {
    let own = std::process::id();
    TABLE.iter().filter_map(move |slot| {
        let range = range_of(slot.pages.load(Ordering::Acquire))?;
        let process = slot.process.load(Ordering::Relaxed);
        if process != 0 && process != own {
            return None;
        }
        slot.what.get().map(|what| (range, *what))
    })
}

/// `None` for what no mapping of a process can be.
fn word_of(range: AddrRange) -> Option<u64> {
    let (first, count) =
        (range.start / PAGE_SIZE, range.end().div_ceil(PAGE_SIZE).checked_sub(range.start / PAGE_SIZE)?);
    (count > 0 && count >> COUNT_BITS == 0 && first >> (64 - COUNT_BITS) == 0).then_some(first << COUNT_BITS | count)
}

fn range_of(word: u64) -> Option<AddrRange> {
    let (first, count) = (word >> COUNT_BITS, word & ((1 << COUNT_BITS) - 1));
    (count > 0).then_some(AddrRange { start: first * PAGE_SIZE, len: count * PAGE_SIZE })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Places that no other test notes.
    fn range(test: u64, first: u64, count: u64) -> AddrRange {
        AddrRange { start: (test << 30) + first * PAGE_SIZE, len: count * PAGE_SIZE }
    }

    #[test]
    fn what_is_noted_is_found_until_it_is_dropped() {
        let whole = range(1, 10, 10);
        let noted = note(whole, "a test's mapping");
        assert_eq!(overlapping(range(1, 19, 5)), Some((whole, "a test's mapping")));
        assert_eq!(overlapping(range(1, 0, 100)), Some((whole, "a test's mapping")));
        assert_eq!((overlapping(range(1, 20, 1)), overlapping(range(1, 9, 1))), (None, None));
        assert!(ranges().contains(&(whole, "a test's mapping")));
        drop(noted);
        assert_eq!(overlapping(whole), None);
    }

    #[test]
    fn slots_are_used_again_by_the_same_name() {
        for round in 0..4 * SLOTS as u64 {
            let noted = note(range(2, round, 1), if round % 2 == 0 { "even" } else { "odd" });
            assert!(noted.slot.is_some(), "round {round}");
        }
    }

    #[test]
    fn what_is_no_range_of_a_process_is_not_noted() {
        assert_eq!(word_of(AddrRange { start: PAGE_SIZE, len: 0 }), None);
        assert_eq!(word_of(AddrRange { start: 1 << 50, len: PAGE_SIZE }), None);
        let largest = AddrRange { start: (1 << 47) - (1 << 39), len: 1 << 39 };
        assert_eq!(range_of(word_of(largest).unwrap()), Some(largest));
    }

    #[test]
    fn what_children_do_not_inherit_does_not_count_in_them() {
        let (here, everywhere) = (range(3, 1, 1), range(3, 2, 1));
        let _here = note_not_inherited(here, "a mapping of one process");
        let _everywhere = note(everywhere, "an inherited mapping");
        assert!(overlapping(here).is_some() && overlapping(everywhere).is_some());
        let found = || i32::from(overlapping(here).is_some()) * 2 + i32::from(overlapping(everywhere).is_some());
        let child = uhmm_kernel_hook::fork::fork_child(found).unwrap();
        assert_eq!(child.wait().unwrap(), uhmm_kernel_hook::fork::Ended::Code(1));
    }

    #[test]
    fn many_threads_note_and_forget_at_once() {
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                scope.spawn(move || {
                    for round in 0..500 {
                        let place = range(10 + thread, round, 1);
                        let _noted = note(place, "a thread's mapping");
                        assert_eq!(overlapping(place), Some((place, "a thread's mapping")));
                    }
                });
            }
        });
    }
}
