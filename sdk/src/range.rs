//! Checks on address ranges before they are sent: the SDK rounds nothing silently.

use crate::Error;

/// Bytes of one page, the unit of every request.
pub const PAGE_BYTES: u64 = 4096;

/// Accepts a length that is a non-zero multiple of [`PAGE_BYTES`]; returns it in pages.
pub(crate) fn check_length(len_bytes: u64) -> Result<u64, Error> {
    if len_bytes == 0 {
        return Err(Error::EmptyRange);
    }
    if !len_bytes.is_multiple_of(PAGE_BYTES) {
        return Err(Error::UnalignedLength {
            len_bytes,
            next_bytes: len_bytes.saturating_add(PAGE_BYTES - 1) & !(PAGE_BYTES - 1),
        });
    }
    Ok(len_bytes / PAGE_BYTES)
}

/// Accepts a page-aligned, non-empty range that does not wrap around; returns its pages.
pub(crate) fn check_range(addr: u64, len_bytes: u64) -> Result<u64, Error> {
    let page_count = check_length(len_bytes)?;
    if !addr.is_multiple_of(PAGE_BYTES) {
        return Err(Error::UnalignedAddress { addr });
    }
    if addr.checked_add(len_bytes).is_none() {
        return Err(Error::RangeWraps { addr, len_bytes });
    }
    Ok(page_count)
}

/// Accepts `len_bytes` bytes at `offset` of a region of `region_bytes`.
pub(crate) fn check_inside(offset: u64, len_bytes: u64, region_bytes: u64) -> Result<(), Error> {
    match offset.checked_add(len_bytes) {
        Some(end) if end <= region_bytes => Ok(()),
        _ => Err(Error::OutsideRegion { offset, len_bytes, region_bytes }),
    }
}

/// The whole pages that hold `len_bytes` bytes at `addr`: (first address, length in bytes). For callers that have an object
/// and need the range to migrate, advise or query; an empty object has no pages (length 0).
///
/// ```
/// assert_eq!(uhmm_sdk::enclosing_pages(0x1ff0, 0x20), (0x1000, 0x2000));
/// ```
pub fn enclosing_pages(addr: u64, len_bytes: u64) -> (u64, u64) {
    let first = addr & !(PAGE_BYTES - 1);
    if len_bytes == 0 {
        return (first, 0);
    }
    let last = addr.saturating_add(len_bytes - 1) & !(PAGE_BYTES - 1);
    (first, (last - first).saturating_add(PAGE_BYTES))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lengths_must_be_whole_pages_and_not_zero() {
        assert!(matches!(check_length(0), Err(Error::EmptyRange)));
        assert_eq!(check_length(8192).unwrap(), 2);
        let error = check_length(5000).unwrap_err();
        assert!(matches!(error, Error::UnalignedLength { len_bytes: 5000, next_bytes: 8192 }), "{error}");
    }

    #[test]
    fn ranges_must_be_aligned_and_must_not_wrap() {
        assert_eq!(check_range(0x1000, 0x3000).unwrap(), 3);
        assert!(matches!(check_range(0x1001, 0x1000), Err(Error::UnalignedAddress { addr: 0x1001 })));
        assert!(matches!(check_range(u64::MAX - 0xfff, 0x1000), Err(Error::RangeWraps { .. })));
    }

    #[test]
    fn accesses_must_lie_inside_the_region() {
        assert!(check_inside(0, 4096, 4096).is_ok());
        assert!(check_inside(4096, 0, 4096).is_ok());
        assert!(check_inside(1, 4096, 4096).is_err());
        assert!(check_inside(u64::MAX, 2, 4096).is_err());
    }

    proptest! {
        #[test]
        fn enclosing_pages_hold_every_byte_and_nothing_more(addr in 0u64..1 << 46, len in 1u64..1 << 20) {
            let (first, bytes) = enclosing_pages(addr, len);
            prop_assert!(check_range(first, bytes).is_ok());
            prop_assert!(first <= addr && addr + len <= first + bytes);
            prop_assert!(addr < first + PAGE_BYTES && addr + len + PAGE_BYTES > first + bytes);
        }
    }
}
