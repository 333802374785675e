//! Which I/O virtual addresses are free: first fit from below, inside what platform and device can address.

use std::collections::BTreeMap;

use uhmm_kernel_hook::PAGE_SIZE;

use crate::error::PciError;

/// Addresses that a device may use: `start` up to, but without, `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IovaRange {
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
}

/// Pure bookkeeping; knows nothing of the IOMMU.
#[derive(Clone, Debug)]
pub struct IovaAllocator {
    usable: Vec<IovaRange>,
    /// Start to end.
    taken: BTreeMap<u64, u64>,
}

impl IovaAllocator {
    /// `usable`: what the platform leaves free (without MSI windows and the like). Address 0 is never given out: drivers and devices
    /// take it for "none".
    pub fn new(usable: &[IovaRange]) -> Self {
        let mut usable: Vec<IovaRange> = usable
            .iter()
            .map(|range| IovaRange { start: range.start.max(PAGE_SIZE).next_multiple_of(PAGE_SIZE), end: range.end })
            .filter(|range| range.start < range.end)
            .collect();
        usable.sort_by_key(|range| range.start);
        Self { usable, taken: BTreeMap::new() }
    }

    /// The lowest free addresses for `len` bytes (rounded up to pages) below `limit` whose start is a multiple of `align`.
    ///
    /// # Errors
    /// `NoIova`.
    pub fn allocate(&mut self, len: u64, align: u64, limit: u64) -> Result<u64, PciError> {
        let none = PciError::NoIova { len, limit };
        let Some(len) = len.max(1).checked_next_multiple_of(PAGE_SIZE) else { return Err(none) };
        let align = align.max(PAGE_SIZE);
        for range in &self.usable {
            let end = range.end.min(limit);
            let mut at = range.start.checked_next_multiple_of(align);
            while let Some(start) = at {
                let Some(stop) = start.checked_add(len).filter(|&stop| stop <= end) else { break };
                match self.overlapping(start, stop) {
                    Some(taken_end) => at = taken_end.checked_next_multiple_of(align),
                    None => {
                        self.taken.insert(start, stop);
                        return Ok(start);
                    }
                }
            }
        }
        Err(none)
    }

    /// Takes these addresses (identity mappings, mappings of an earlier incarnation).
    ///
    /// # Errors
    /// `IovaTaken` when some are in use or not usable.
    pub fn take(&mut self, iova: u64, len: u64) -> Result<(), PciError> {
        let taken = PciError::IovaTaken { iova, len };
        let Some(end) = iova.checked_add(len).and_then(|end| end.checked_next_multiple_of(PAGE_SIZE)) else {
            return Err(taken);
        };
        let usable = self.usable.iter().any(|range| range.start <= iova && end <= range.end);
        if len == 0 || !iova.is_multiple_of(PAGE_SIZE) || !usable || self.overlapping(iova, end).is_some() {
            return Err(taken);
        }
        self.taken.insert(iova, end);
        Ok(())
    }

    /// Gives back what begins at `iova`. Unknown addresses are ignored.
    pub fn free(&mut self, iova: u64) {
        self.taken.remove(&iova);
    }

    /// What nobody has: all usable addresses that are not taken.
    pub fn gaps(&self) -> Vec<IovaRange> {
        let mut gaps = Vec::new();
        for range in &self.usable {
            let mut start = range.start;
            for (&taken, &taken_end) in self.taken.range(range.start..range.end) {
                gaps.push(IovaRange { start, end: taken });
                start = taken_end;
            }
            gaps.push(IovaRange { start, end: range.end });
        }
        gaps.retain(|gap| gap.start < gap.end);
        gaps
    }

    /// The end of the last range in use that overlaps.
    fn overlapping(&self, start: u64, end: u64) -> Option<u64> {
        self.taken
            .range(..end)
            .next_back()
            .filter(|(_, taken_end)| **taken_end > start)
            .map(|(_, taken_end)| *taken_end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn allocator() -> IovaAllocator {
        IovaAllocator::new(&[IovaRange { start: 16 * MIB, end: 1 << 40 }, IovaRange { start: 0, end: 2 * MIB }])
    }

    #[test]
    fn lowest_first_aligned_and_never_zero() {
        let mut iovas = allocator();
        assert_eq!(iovas.allocate(1, 1, u64::MAX).ok(), Some(4096));
        assert_eq!(iovas.allocate(8192, 1, u64::MAX).ok(), Some(8192));
        assert_eq!(iovas.allocate(4096, MIB, u64::MAX).ok(), Some(MIB));
        assert_eq!(iovas.allocate(2 * MIB, 1, u64::MAX).ok(), Some(16 * MIB));
        iovas.free(8192);
        assert_eq!(iovas.allocate(4096, 1, u64::MAX).ok(), Some(8192));
    }

    #[test]
    fn gaps_are_what_is_left() {
        let mut iovas = allocator();
        let gap = |start, end| IovaRange { start, end };
        assert_eq!(iovas.gaps(), [gap(4096, 2 * MIB), gap(16 * MIB, 1 << 40)]);
        assert!(iovas.take(16 * MIB, MIB).is_ok() && iovas.take(20 * MIB, MIB).is_ok());
        assert!(iovas.take(4096, 2 * MIB - 4096).is_ok());
        assert_eq!(iovas.gaps(), [gap(17 * MIB, 20 * MIB), gap(21 * MIB, 1 << 40)]);
    }

    #[test]
    fn the_devices_mask_and_the_end_are_kept() {
        let mut iovas = allocator();
        assert!(matches!(iovas.allocate(4 * MIB, 1, 16 * MIB), Err(PciError::NoIova { .. })));
        assert_eq!(iovas.allocate(MIB, 1, 17 * MIB).ok(), Some(4096));
        assert!(iovas.allocate(1 << 40, 1, u64::MAX).is_err());
        assert!(iovas.allocate(u64::MAX, 1, u64::MAX).is_err());
    }

    #[test]
    fn chosen_addresses_are_taken_once_and_only_where_usable() {
        let mut iovas = allocator();
        assert!(iovas.take(20 * MIB, 2 * MIB).is_ok());
        for (iova, len) in
            [(21 * MIB, MIB), (19 * MIB, 2 * MIB), (3 * MIB, 4096), (20 * MIB + 1, 1), (0, 4096), (40 * MIB, 0)]
        {
            assert!(matches!(iovas.take(iova, len), Err(PciError::IovaTaken { .. })), "{iova:#x}");
        }
        assert!(iovas.take(u64::MAX - 4095, 8192).is_err());
        assert_eq!(iovas.allocate(8 * MIB, 1, u64::MAX).ok(), Some(22 * MIB));
    }
}
