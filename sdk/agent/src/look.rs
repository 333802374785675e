//! What the kernel says about a range of this address space: its pages (PAGEMAP_SCAN) and its mappings (PROCMAP_QUERY). Neither touches
//! anything, and neither waits for a page.

use uhmm_shared::agent::{ORDER_PAGES, Status};

use crate::memory::SCAN_REGIONS;
use crate::{PAGE_BYTES, sys};

const PAGEMAP_SCAN: u64 = 0xc060_6610;
const PROCMAP_QUERY: u64 = 0xc068_6611;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const ZERO: u64 = 1 << 5;
const HUGE: u64 = 1 << 6;
const WRITTEN: u64 = 1 << 1;
const GUARDED: u64 = 1 << 8;

/// Nothing is there.
pub(crate) const HOLE: u8 = 0;
/// A page.
pub(crate) const PAGE: u8 = 1;
/// A part of a huge page.
pub(crate) const HUGE_PAGE: u8 = 2;
/// The zero page.
pub(crate) const ZERO_PAGE: u8 = 3;

/// A page that nobody may touch: no content, and nothing may take its place.
pub(crate) const GUARD: u8 = 4;
/// A page that is not write-protected.
pub(crate) const WRITABLE: u8 = 5;

/// Neither a page nor the kernel's zero page: nothing can be taken out.
pub(crate) fn is_empty(kind: u8) -> bool {
    matches!(kind, HOLE | GUARD)
}

/// What a page of scratch says about the page that was taken out.
pub(crate) fn status_of(kind: u8) -> Status {
    match kind {
        PAGE => Status::Moved,
        HUGE_PAGE => Status::MovedHuge,
        _ => Status::Zero,
    }
}

/// Notes the kind of each of `count` pages at `addr`. `false`: the kernel does not say; all count as holes.
pub(crate) fn look(
    pagemap: i32,
    regions: &mut [[u64; 3]; SCAN_REGIONS],
    kinds: &mut [u8; ORDER_PAGES as usize],
    addr: u64,
    count: u64,
) -> bool {
    let any = PRESENT | SWAPPED | ZERO | HUGE;
    let kind = |categories: u64| match categories {
        _ if categories & GUARDED != 0 => GUARD,
        _ if categories & ZERO != 0 => ZERO_PAGE,
        _ if categories & HUGE != 0 => HUGE_PAGE,
        _ => PAGE,
    };
    // Kernels before 6.15 do not know the kind.
    scan(pagemap, regions, kinds, addr, count, any | GUARDED, kind)
        || scan(pagemap, regions, kinds, addr, count, any, kind)
}

/// Notes which of `count` pages at `addr` may be written without a fault although the place is registered for write protection.
pub(crate) fn look_for_writable(
    pagemap: i32,
    regions: &mut [[u64; 3]; SCAN_REGIONS],
    kinds: &mut [u8; ORDER_PAGES as usize],
    addr: u64,
    count: u64,
) -> bool {
    scan(pagemap, regions, kinds, addr, count, PRESENT | WRITTEN, |categories| {
        if categories == PRESENT | WRITTEN { WRITABLE } else { HOLE }
    })
}

fn scan(
    pagemap: i32,
    regions: &mut [[u64; 3]; SCAN_REGIONS],
    kinds: &mut [u8; ORDER_PAGES as usize],
    addr: u64,
    count: u64,
    any: u64,
    kind: impl Fn(u64) -> u8,
) -> bool {
    kinds.fill(HOLE);
    let end = addr.wrapping_add(count.wrapping_mul(PAGE_BYTES));
    let mut start = addr;
    while start < end {
        let vec = regions.as_mut_ptr() as u64;
        let mut request = [96, 0, start, end, 0, vec, SCAN_REGIONS as u64, 0, 0, 0, any, any];
        let Ok(found) = sys::ioctl(pagemap, PAGEMAP_SCAN, &mut request) else { return false };
        for [first, last, categories] in regions.iter().take(found as usize) {
            let from = first.wrapping_sub(addr) / PAGE_BYTES;
            let to = (*last).min(end).wrapping_sub(addr) / PAGE_BYTES;
            if let Some(pages) = kinds.get_mut(from as usize..to as usize) {
                pages.fill(kind(*categories));
            }
        }
        let [_, _, _, _, walked, ..] = request;
        if walked <= start {
            return false;
        }
        start = walked;
    }
    true
}

/// One mapping.
#[derive(Clone, Copy)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) writable: bool,
    /// Private and of no file.
    pub(crate) anonymous: bool,
}

/// The mapping that covers an address.
pub(crate) fn mapping_at(maps: i32, addr: u64) -> Option<Mapping> {
    const WRITABLE: u64 = 2;
    const SHARED: u64 = 8;
    let mut request = [104, 0, addr, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    sys::ioctl(maps, PROCMAP_QUERY, &mut request).ok()?;
    let [_, _, _, start, end, flags, _, _, inode, ..] = request;
    let anonymous = flags & SHARED == 0 && inode == 0;
    (start <= addr && end > addr).then_some(Mapping { start, end, writable: flags & WRITABLE != 0, anonymous })
}
