//! What a modelled device may reach: the part that the IOMMU plays for a real one.
//!
//! A mapping is a range of I/O addresses, a window on somebody's memfd, and a right. Nothing else is reachable; adjacent mappings
//! serve one access together. What is removed is out of reach when [`DmaTable::unmap`] returns, because DMA happens under the same lock.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use uhmm_kernel_hook::{HookError, PAGE_SIZE, Prot, Window, memfd};
use uhmm_pci::DmaRight;

use crate::model::DmaFault;

/// The most mappings that one driver may have: half of what the kernel lets a process map, so that the model itself goes on.
pub const MAX_MAPPINGS: usize = 32_768;

/// Why a mapping was refused; nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// Not whole pages, nothing, or around the end of addresses.
    #[error("I/O addresses {iova:#x}+{len_bytes:#x} are not whole pages inside 64 bits: align them")]
    Shape {
        /// First address.
        iova: u64,
        /// Bytes.
        len_bytes: u64,
    },
    /// Some of it is mapped.
    #[error("I/O addresses {iova:#x}+{len_bytes:#x} are mapped already: unmap them first")]
    Overlap {
        /// First address.
        iova: u64,
        /// Bytes.
        len_bytes: u64,
    },
    /// Mappings are removed as they were made.
    #[error("No mapping is exactly {iova:#x}+{len_bytes:#x}: unmap what was mapped")]
    NotMapped {
        /// First address.
        iova: u64,
        /// Bytes.
        len_bytes: u64,
    },
    /// There are too many.
    #[error("The device has {MAX_MAPPINGS} mappings: unmap some, or map larger ranges")]
    TooMany,
    /// The memory cannot be mapped here.
    #[error("The memory behind the mapping cannot be used")]
    Memory(#[from] HookError),
}

#[derive(Debug)]
struct Mapping {
    end: u64,
    window: Window,
}

/// See the module head.
#[derive(Debug, Default)]
pub struct DmaTable {
    /// By first address. Never overlapping.
    mappings: BTreeMap<u64, Mapping>,
    faults: Cell<u64>,
}

impl DmaTable {
    /// The device reaches `len_bytes` of `fd` from `offset_bytes` at `iova`. Only memfds with a sealed size: whoever holds another kind
    /// of file could shorten it and so kill the model.
    ///
    /// # Errors
    /// See [`MapError`].
    pub fn map(
        &mut self,
        iova: u64,
        fd: BorrowedFd<'_>,
        offset_bytes: u64,
        len_bytes: u64,
        right: DmaRight,
    ) -> Result<(), MapError> {
        let end = range_end(iova, len_bytes)?;
        if self.mappings.range(..end).next_back().is_some_and(|(_, mapping)| mapping.end > iova) {
            return Err(MapError::Overlap { iova, len_bytes });
        }
        if self.mappings.len() >= MAX_MAPPINGS {
            return Err(MapError::TooMany);
        }
        memfd::check_sealed(fd, memfd::len(fd)?)?;
        let prot = match right {
            DmaRight::Read => Prot::ReadOnly,
            DmaRight::ReadWrite => Prot::ReadWrite,
        };
        let window = Window::map(fd, offset_bytes, len_bytes, prot)?;
        self.mappings.insert(iova, Mapping { end, window });
        Ok(())
    }

    /// The device reaches nothing there any more when this returns.
    ///
    /// # Errors
    /// `NotMapped` unless exactly these addresses were mapped at once.
    pub fn unmap(&mut self, iova: u64, len_bytes: u64) -> Result<(), MapError> {
        let end = range_end(iova, len_bytes)?;
        match self.mappings.get(&iova) {
            Some(mapping) if mapping.end == end => {
                self.mappings.remove(&iova);
                Ok(())
            }
            _ => Err(MapError::NotMapped { iova, len_bytes }),
        }
    }

    /// Everything goes. The fault counter stays.
    pub fn clear(&mut self) {
        self.mappings.clear();
    }

    /// Mappings there are.
    pub fn len(&self) -> usize {
        self.mappings.len()
    }

    /// The device reaches nothing.
    pub fn is_empty(&self) -> bool {
        self.mappings.is_empty()
    }

    /// Accesses that were refused since the device was made.
    pub fn fault_count(&self) -> u64 {
        self.faults.get()
    }

    /// The device reads.
    ///
    /// # Errors
    /// Some of it is not mapped.
    pub fn read(&self, iova: u64, bytes: &mut [u8]) -> Result<(), DmaFault> {
        let pieces = self.pieces(iova, bytes.len() as u64, false)?;
        let mut left = bytes;
        for (window, offset, len) in pieces {
            let (piece, rest) = left.split_at_mut(len as usize);
            window.read(offset, piece).map_err(|_| self.fault(iova, len, "read"))?;
            left = rest;
        }
        Ok(())
    }

    /// The device writes.
    ///
    /// # Errors
    /// Some of it is not mapped for writing; nothing was written then.
    pub fn write(&self, iova: u64, bytes: &[u8]) -> Result<(), DmaFault> {
        let pieces = self.pieces(iova, bytes.len() as u64, true)?;
        let mut left = bytes;
        for (window, offset, len) in pieces {
            let (piece, rest) = left.split_at(len as usize);
            window.write(offset, piece).map_err(|_| self.fault(iova, len, "write"))?;
            left = rest;
        }
        Ok(())
    }

    /// The device may do nothing at all just now (bus mastering is off).
    pub(crate) fn refuse(&self, iova: u64, len: u64) -> DmaFault {
        self.fault(iova, len, "access without bus mastering")
    }

    /// All windows that the access touches, or none of them.
    fn pieces(&self, iova: u64, len: u64, write: bool) -> Result<Vec<(&Window, u64, u64)>, DmaFault> {
        let what = if write { "write" } else { "read" };
        let end = iova.checked_add(len).ok_or_else(|| self.fault(iova, len, what))?;
        let mut pieces = Vec::new();
        let mut at = iova;
        while at < end {
            let found = self.mappings.range(..=at).next_back();
            let usable = found.filter(|(_, mapping)| mapping.end > at && (!write || mapping.window.is_writable()));
            let (start, mapping) = usable.ok_or_else(|| self.fault(iova, len, what))?;
            let stop = mapping.end.min(end);
            pieces.push((&mapping.window, at - start, stop - at));
            at = stop;
        }
        Ok(pieces)
    }

    /// Counted always; told for the first ones and then ever more rarely, because a device that lost its way does not stop.
    fn fault(&self, iova: u64, len_bytes: u64, what: &'static str) -> DmaFault {
        let count = self.faults.get() + 1;
        self.faults.set(count);
        if count <= 8 || count.is_power_of_two() {
            tracing::warn!(iova = format_args!("{iova:#x}"), len_bytes, count, what, "DMA of the device was refused");
        }
        DmaFault { iova, len_bytes }
    }
}

fn range_end(iova: u64, len_bytes: u64) -> Result<u64, MapError> {
    let whole = len_bytes > 0 && iova.is_multiple_of(PAGE_SIZE) && len_bytes.is_multiple_of(PAGE_SIZE);
    iova.checked_add(len_bytes).filter(|_| whole).ok_or(MapError::Shape { iova, len_bytes })
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use super::*;

    fn memory(pages: u64) -> OwnedFd {
        memfd::create_sealed("uhmm-dma-test", pages * PAGE_SIZE).unwrap()
    }

    #[test]
    fn exactly_what_is_mapped_is_reached() {
        let fd = memory(4);
        let mut table = DmaTable::default();
        table.map(0x10000, fd.as_fd(), PAGE_SIZE, 2 * PAGE_SIZE, DmaRight::ReadWrite).unwrap();
        table.write(0x11ffe, &[7; 2]).unwrap();
        let mut back = [0; 2];
        table.read(0x11ffe, &mut back).unwrap();
        assert_eq!(back, [7; 2]);
        let window = Window::map(fd.as_fd(), 0, 4 * PAGE_SIZE, Prot::ReadOnly).unwrap();
        assert!(window.compare(3 * PAGE_SIZE - 2, &[7, 7, 0, 0]).unwrap());
        for (iova, len) in [(0xffff, 1), (0x12000, 1), (0x11fff, 2), (0xffff, 2), (0, 1), (u64::MAX, 2)] {
            assert_eq!(table.write(iova, &vec![9; len]), Err(DmaFault { iova, len_bytes: len as u64 }));
            assert!(table.read(iova, &mut vec![0; len]).is_err(), "{iova:#x}");
        }
        assert_eq!(table.fault_count(), 12);
        assert!(window.compare(3 * PAGE_SIZE - 2, &[7, 7, 0, 0]).unwrap(), "a refused write wrote");
        table.unmap(0x10000, 2 * PAGE_SIZE).unwrap();
        assert!(table.read(0x10000, &mut back).is_err());
    }

    #[test]
    fn neighbours_serve_one_access_but_a_write_is_all_or_nothing() {
        let (one, other) = (memory(1), memory(1));
        let mut table = DmaTable::default();
        table.map(0x2000, one.as_fd(), 0, PAGE_SIZE, DmaRight::ReadWrite).unwrap();
        table.map(0x3000, other.as_fd(), 0, PAGE_SIZE, DmaRight::Read).unwrap();
        let mut back = vec![1; 2 * PAGE_SIZE as usize];
        table.read(0x2000, &mut back).unwrap();
        assert!(back.iter().all(|byte| *byte == 0));
        assert!(table.write(0x2ff0, &[5; 32]).is_err(), "the second page is for reading only");
        table.read(0x2ff0, &mut back[..16]).unwrap();
        assert_eq!(back[..16], [0; 16]);
    }

    #[test]
    fn what_cannot_be_mapped_is_refused() {
        let fd = memory(2);
        let mut table = DmaTable::default();
        table.map(0x4000, fd.as_fd(), 0, 2 * PAGE_SIZE, DmaRight::ReadWrite).unwrap();
        for (iova, offset, len) in [
            (0x4000, 0, PAGE_SIZE),
            (0x5000, 0, PAGE_SIZE),
            (0x3000, 0, 2 * PAGE_SIZE),
            (0x8001, 0, PAGE_SIZE),
            (0x8000, 0, 100),
            (0x8000, 0, 0),
            (0x8000, PAGE_SIZE, 2 * PAGE_SIZE),
            (0x8000, u64::MAX - 4095, PAGE_SIZE),
            (u64::MAX - 4095, 0, 2 * PAGE_SIZE),
        ] {
            assert!(
                table.map(iova, fd.as_fd(), offset, len, DmaRight::Read).is_err(),
                "{iova:#x} {offset:#x} {len:#x}"
            );
        }
        assert!(matches!(table.unmap(0x4000, PAGE_SIZE), Err(MapError::NotMapped { .. })));
        assert!(matches!(table.unmap(0x5000, PAGE_SIZE), Err(MapError::NotMapped { .. })));
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert!(matches!(table.map(0x8000, file.as_fd(), 0, PAGE_SIZE, DmaRight::Read), Err(MapError::Memory(_))));
        assert_eq!(table.len(), 1);
    }
}
