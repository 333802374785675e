//! The whole address space under management, and what is.

use std::ffi::c_int;

use uhmm_sdk::{AddrRange, AdoptedAll, LeftAlone};

use crate::buffers::{Out, copy_items, host_len, items_mut};
use crate::error::guard;
use crate::handles;
use crate::session::uhmm_session;

/// Left alone: libuhmm's own.
pub const UHMM_LEFT_OWN: u8 = 0;
/// Left alone: shared mappings; adopt them one by one.
pub const UHMM_LEFT_SHARED: u8 = 1;
/// Left alone: private mappings of files.
pub const UHMM_LEFT_FILE: u8 = 2;
/// Left alone: private MAP_HUGETLB memory.
pub const UHMM_LEFT_HUGE_PAGES: u8 = 3;
/// Left alone: the kernel's mappings, and devices' memory.
pub const UHMM_LEFT_KERNEL: u8 = 4;
/// Left alone: executable.
pub const UHMM_LEFT_EXECUTABLE: u8 = 5;
/// Left alone: stacks that grow by themselves.
pub const UHMM_LEFT_GROWS_DOWN: u8 = 6;
/// Left alone: PROT_NONE, reserved addresses.
pub const UHMM_LEFT_NO_ACCESS: u8 = 7;
/// Left alone: stacks and control blocks of threads.
pub const UHMM_LEFT_THREAD_STACK: u8 = 8;
/// Left alone: given back by uhmm_release().
pub const UHMM_LEFT_RELEASED: u8 = 9;
/// Left alone: mlock().
pub const UHMM_LEFT_LOCKED: u8 = 10;
/// Left alone: MADV_DONTFORK.
pub const UHMM_LEFT_NOT_INHERITED: u8 = 11;
/// Left alone: MADV_WIPEONFORK.
pub const UHMM_LEFT_WIPED_IN_CHILDREN: u8 = 12;
/// Left alone: mseal().
pub const UHMM_LEFT_SEALED: u8 = 13;
/// Left alone: less than 64 KiB together with its neighbours, or a small growth of the heap.
pub const UHMM_LEFT_SMALL: u8 = 14;
/// Left alone: the manifest's quota is reached.
pub const UHMM_LEFT_QUOTA: u8 = 15;
/// Left alone: refused by the pager or the kernel, for example because another userfaultfd has it.
pub const UHMM_LEFT_REFUSED: u8 = 16;
/// How many reasons there are.
pub const UHMM_LEFT_REASONS: usize = 17;

/// What uhmm_adopt_all() did.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uhmm_adopted_all {
    /// Regions that this call made.
    pub region_count: u64,
    /// Bytes that this call put under management.
    pub bytes: u64,
    /// Bytes of private memory that were under management before.
    pub already_bytes: u64,
    /// Bytes that this call gave back, because a thread lives there now.
    pub given_back_bytes: u64,
    /// Bytes that were left alone, by UHMM_LEFT_*.
    pub left_alone_bytes: [u64; UHMM_LEFT_REASONS],
}

/// A range of addresses of this process.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct uhmm_range {
    /// First address, a multiple of the page size.
    pub addr: u64,
    /// Length, a multiple of the page size.
    pub len_bytes: u64,
}

/// Puts all private anonymous memory of this process under management (heap, arenas, mmapped memory), but what must not be, and what
/// appears later too: a thread of libuhmm's looks for it until uhmm_disconnect(), twenty times a second while the address space changes. All of
/// that thread's signals are blocked. What is adopted stays so; what uhmm_release() gives back is left alone from then on. May be called
/// again, to have new memory adopted at once. A forked child keeps what was adopted, and looks for more when it calls this with its own session.
/// `report` may be NULL.
///
/// Errors: -EPERM uhmm_system_calls_wait() or uhmm_fork_supported() is 0, so the program would break (the text says what to change); -EIO
/// /proc cannot be read. A mapping that cannot be adopted is no error: see left_alone_bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_adopt_all(session: *mut uhmm_session, report: *mut uhmm_adopted_all) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable or null.
        let report = unsafe { Out::optional(report, "report") }?;
        let done = handles::get(session)?.sdk.adopt_all()?;
        if let Some(report) = report {
            report.set(flatten(&done));
        }
        Ok(())
    })
}

/// The private memory of this process that is under management now, in order of address, neighbours joined. At most `capacity` ranges are copied
/// to `ranges`; `range_count` gets how many there are, which may be more. With a capacity of 0, `ranges` may be NULL.
///
/// Errors: -EINVAL a wrong handle or pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_adopted_ranges(
    session: *mut uhmm_session,
    ranges: *mut uhmm_range,
    capacity: u64,
    range_count: *mut u64,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let range_count = unsafe { Out::new(range_count, "range_count") }?;
        // SAFETY: the caller's array of `capacity`.
        let ranges = unsafe { items_mut(ranges, host_len(capacity, "ranges")?, "ranges") }?;
        let found = handles::get(session)?.sdk.adopted_ranges();
        copy_items(found.iter().map(told), ranges);
        range_count.set(found.len() as u64);
        Ok(())
    })
}

fn told(range: &AddrRange) -> uhmm_range {
    uhmm_range { addr: range.start, len_bytes: range.len }
}

fn flatten(done: &AdoptedAll) -> uhmm_adopted_all {
    let mut flat = uhmm_adopted_all {
        region_count: done.region_count,
        bytes: done.bytes,
        already_bytes: done.already_bytes,
        given_back_bytes: done.given_back_bytes,
        ..Default::default()
    };
    for (why, bytes) in &done.left_alone {
        let place = LeftAlone::ALL.iter().position(|known| known == why);
        if let Some(place) = place.and_then(|index| flat.left_alone_bytes.get_mut(index)) {
            *place += bytes;
        }
    }
    flat
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_reasons_are_the_sdks_order() {
        let numbers = [
            (UHMM_LEFT_OWN, LeftAlone::Own),
            (UHMM_LEFT_SHARED, LeftAlone::Shared),
            (UHMM_LEFT_FILE, LeftAlone::File),
            (UHMM_LEFT_HUGE_PAGES, LeftAlone::HugePages),
            (UHMM_LEFT_KERNEL, LeftAlone::Kernel),
            (UHMM_LEFT_EXECUTABLE, LeftAlone::Executable),
            (UHMM_LEFT_GROWS_DOWN, LeftAlone::GrowsDown),
            (UHMM_LEFT_NO_ACCESS, LeftAlone::NoAccess),
            (UHMM_LEFT_THREAD_STACK, LeftAlone::ThreadStack),
            (UHMM_LEFT_RELEASED, LeftAlone::Released),
            (UHMM_LEFT_LOCKED, LeftAlone::Locked),
            (UHMM_LEFT_NOT_INHERITED, LeftAlone::NotInherited),
            (UHMM_LEFT_WIPED_IN_CHILDREN, LeftAlone::WipedInChildren),
            (UHMM_LEFT_SEALED, LeftAlone::Sealed),
            (UHMM_LEFT_SMALL, LeftAlone::Small),
            (UHMM_LEFT_QUOTA, LeftAlone::Quota),
            (UHMM_LEFT_REFUSED, LeftAlone::Refused),
        ];
        assert_eq!(numbers.len(), UHMM_LEFT_REASONS);
        assert_eq!(LeftAlone::ALL.len(), UHMM_LEFT_REASONS);
        for (number, why) in numbers {
            assert_eq!(LeftAlone::ALL[usize::from(number)], why);
        }
    }

    #[test]
    fn a_report_has_every_reason_at_its_number() {
        let done = AdoptedAll {
            region_count: 2,
            bytes: 3,
            already_bytes: 4,
            left_alone: vec![(LeftAlone::File, 5), (LeftAlone::Refused, 6)],
            ..Default::default()
        };
        let flat = flatten(&done);
        assert_eq!((flat.region_count, flat.bytes, flat.already_bytes), (2, 3, 4));
        assert_eq!(flat.left_alone_bytes.iter().sum::<u64>(), 11);
        assert_eq!(flat.left_alone_bytes[usize::from(UHMM_LEFT_REFUSED)], 6);
    }
}
