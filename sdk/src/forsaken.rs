//! Memory whose pager is lost with all that was kept of it (three deaths at once, or another system in the place of this one): pages on devices
//! will never come, and nobody answers a fault. What is here stays readable, what is not is poisoned: a signal, and never zeros or a thread
//! that hangs. The program's memory is its own again afterwards.

use uhmm_kernel_hook::uffd::FillStop;
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE, Userfaultfd};

use crate::adopt_all::maps::{Mapping, read_maps};

/// Name of what a session allocates, in maps.
const ALLOCATED: &str = "/memfd:uhmm-region";
/// A page on which nothing can be done after so many attempts is left alone.
const ATTEMPTS: u32 = 1000;

/// Poisons what is missing of all memory that this userfaultfd watches, and watches no more.
pub(crate) fn give_up(uffd: &Userfaultfd) {
    let mappings = match read_maps() {
        Ok(mappings) => mappings,
        Err(error) => {
            return tracing::error!(%error, "The mappings of this process cannot be read: threads that wait for lost pages wait on");
        }
    };
    for mapping in mappings.iter().filter(|mapping| !mapping.shared || is_allocated(mapping)) {
        settle(uffd, mapping);
    }
    // Files are all here.
    for mapping in mappings.iter().filter(|mapping| mapping.read || mapping.write) {
        if let Err(error) = uffd.unregister(mapping.range) {
            tracing::trace!(%error, range = %mapping.range, "Was not watched");
        }
    }
    read_events(uffd);
}

fn is_allocated(mapping: &Mapping) -> bool {
    mapping.name.starts_with(ALLOCATED)
}

/// Threads that unmap or fork wait until somebody has read of it.
fn read_events(uffd: &Userfaultfd) {
    let mut events = Vec::new();
    while matches!(uffd.read_events(&mut events), Ok(count) if count > 0) {
        events.clear();
    }
}

/// Shared pages that are in the file but not in the page table are mapped, whatever is still missing is poisoned.
fn settle(uffd: &Userfaultfd, mapping: &Mapping) {
    let (end, mut at, mut attempts) = (mapping.range.end(), mapping.range.start, 0);
    let mut poisons = !mapping.shared;
    while at < end && attempts < ATTEMPTS {
        let len = if poisons && mapping.shared { PAGE_SIZE } else { end - at };
        let range = AddrRange { start: at, len };
        let outcome = if poisons { uffd.poison(range) } else { uffd.cont(range, false, false) };
        let Ok(outcome) = outcome else { return };
        at += outcome.done_bytes;
        attempts = if outcome.done_bytes > 0 { 0 } else { attempts + 1 };
        poisons = match outcome.stop {
            // Of shared memory a hole was filled: perhaps the next page is there again.
            None => !mapping.shared,
            Some(FillStop::Again) => {
                read_events(uffd);
                poisons
            }
            Some(FillStop::Exists) => {
                at += PAGE_SIZE;
                attempts = 0;
                !mapping.shared
            }
            Some(FillStop::NoPage) => true,
            // Not watched by this one: the kernel says so of the first page.
            Some(FillStop::Gone | FillStop::NoProcess | FillStop::NoMemory | FillStop::Busy | FillStop::Other(_)) => {
                return;
            }
        };
    }
}
