//! Ranges of virtual addresses: page aligned, not empty, not wrapping.

use crate::error::HookError;

/// Bytes in a base page. Huge pages are runs of these; every page index of the project counts in this unit.
pub const PAGE_SIZE: u64 = 4096;

/// A range of virtual addresses of some process. Made by [`AddrRange::new`], it is page aligned, not empty and does not wrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AddrRange {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

impl AddrRange {
    /// Checks and makes a range.
    ///
    /// # Errors
    /// `Unaligned`, `Empty` or `Wraps`; never touches the memory.
    pub fn new(start: u64, len: u64) -> Result<Self, HookError> {
        aligned("start address", start)?;
        aligned("length", len)?;
        if len == 0 {
            return Err(HookError::Empty { start });
        }
        if start.checked_add(len).is_none() {
            return Err(HookError::Wraps { start, len });
        }
        Ok(Self { start, len })
    }

    /// The `page_count` pages from `page` of this range, counted from its start.
    ///
    /// # Errors
    /// `OutOfWindow` when they do not all lie inside.
    pub fn sub_pages(&self, page: u64, page_count: u64) -> Result<Self, HookError> {
        let outside = || HookError::OutOfWindow {
            off: page.saturating_mul(PAGE_SIZE),
            len: page_count.saturating_mul(PAGE_SIZE),
            window_len: self.len,
        };
        let end = page.checked_add(page_count).ok_or_else(outside)?;
        if end > self.pages() {
            return Err(outside());
        }
        Self::new(self.start + page * PAGE_SIZE, page_count * PAGE_SIZE)
    }

    /// The byte after the last one.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// How many base pages it has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.len / PAGE_SIZE
    }

    /// Whether `addr` lies inside.
    #[must_use]
    pub fn contains(&self, addr: u64) -> bool {
        addr >= self.start && addr < self.end()
    }

    /// Whether all of `other` lies inside.
    #[must_use]
    pub fn contains_range(&self, other: &Self) -> bool {
        other.start >= self.start && other.end() <= self.end()
    }

    /// Whether the two share a byte.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    /// The bytes that both have, if any.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| Self { start, len: end - start })
    }
}

impl std::fmt::Display for AddrRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}+{:#x}", self.start, self.len)
    }
}

/// Refuses a value that is not a multiple of the page size.
pub(crate) fn aligned(what: &'static str, value: u64) -> Result<(), HookError> {
    if value.is_multiple_of(PAGE_SIZE) { Ok(()) } else { Err(HookError::Unaligned { what, value, align: PAGE_SIZE }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_refuses_what_is_not_a_page_range() {
        assert!(matches!(AddrRange::new(1, PAGE_SIZE), Err(HookError::Unaligned { what: "start address", .. })));
        assert!(matches!(AddrRange::new(0, 5), Err(HookError::Unaligned { what: "length", .. })));
        assert!(matches!(AddrRange::new(PAGE_SIZE, 0), Err(HookError::Empty { .. })));
        assert!(matches!(AddrRange::new(u64::MAX - 4095, 2 * PAGE_SIZE), Err(HookError::Wraps { .. })));
    }

    #[test]
    fn ranges_relate_by_half_open_intervals() {
        let a = AddrRange::new(0x1000, 0x3000).unwrap();
        let touching = AddrRange::new(0x4000, 0x1000).unwrap();
        let inner = AddrRange::new(0x2000, 0x1000).unwrap();
        assert_eq!((a.end(), a.pages()), (0x4000, 3));
        assert!(a.contains(0x1000) && a.contains(0x3fff) && !a.contains(0x4000) && !a.contains(0xfff));
        assert!(!a.overlaps(&touching) && a.overlaps(&inner));
        assert!(a.contains_range(&inner) && !inner.contains_range(&a));
        assert_eq!(a.intersection(&inner), Some(inner));
        assert_eq!(a.intersection(&touching), None);
    }

    #[test]
    fn sub_pages_stays_inside() {
        let a = AddrRange::new(0x10000, 0x4000).unwrap();
        assert_eq!(a.sub_pages(1, 2).unwrap(), AddrRange { start: 0x11000, len: 0x2000 });
        assert!(a.sub_pages(3, 2).is_err());
        assert!(a.sub_pages(u64::MAX, 2).is_err());
        assert!(a.sub_pages(0, 0).is_err());
    }
}
