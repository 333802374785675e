//! Where pages are: residency by page runs, and snapshots with the kernel's byte for each page, and what devices use.

use std::ffi::{c_int, c_void};

use uhmm_sdk::{HotRange, Residency, ResidencyRun};

use crate::buffers::{Out, address, copy_items, items_mut};
use crate::device::uhmm_device;
use crate::error::{Failure, guard};
use crate::handles;
use crate::memory::UHMM_PAGE_BYTES;
use crate::session::uhmm_session;

/// Residency: never touched; reads as zero.
pub const UHMM_RESIDENCY_ABSENT: u8 = 0;
/// Residency: system memory.
pub const UHMM_RESIDENCY_SYSTEM: u8 = 1;
/// Residency: memory of `device`.
pub const UHMM_RESIDENCY_DEVICE: u8 = 2;
/// Residency: memory of `device`, which nobody else may use without taking it back.
pub const UHMM_RESIDENCY_EXCLUSIVE: u8 = 3;
/// Residency: system memory, with a read-only copy on `device`.
pub const UHMM_RESIDENCY_DUPLICATED: u8 = 4;
/// Residency: on its way.
pub const UHMM_RESIDENCY_MOVING: u8 = 5;
/// Residency: lost with a device; touching it raises SIGBUS.
pub const UHMM_RESIDENCY_POISONED: u8 = 6;
/// No device, where a device id could stand.
pub const UHMM_NO_DEVICE: u8 = 255;

/// Snapshot: not mapped, or not readable.
pub const UHMM_SNAPSHOT_ERROR: u8 = 0xff;
/// Snapshot: nothing that this device could use as it is.
pub const UHMM_SNAPSHOT_NONE: u8 = 0;
/// Snapshot: readable.
pub const UHMM_SNAPSHOT_READ: u8 = 1;
/// Snapshot: writable.
pub const UHMM_SNAPSHOT_WRITE: u8 = 2;
/// Snapshot: part of a page of 2 MiB.
pub const UHMM_SNAPSHOT_PMD: u8 = 4;
/// Snapshot: part of a page of 1 GiB.
pub const UHMM_SNAPSHOT_PUD: u8 = 8;
/// Snapshot: the zero page.
pub const UHMM_SNAPSHOT_ZERO: u8 = 0x10;
/// Snapshot: private memory of the device that was asked. Compare under UHMM_SNAPSHOT_WHERE.
pub const UHMM_SNAPSHOT_PRIVATE_LOCAL: u8 = 0x20;
/// Snapshot: private memory of another device.
pub const UHMM_SNAPSHOT_PRIVATE_REMOTE: u8 = 0x30;
/// Snapshot: coherent memory of the device that was asked.
pub const UHMM_SNAPSHOT_COHERENT_LOCAL: u8 = 0x40;
/// Snapshot: coherent memory of another device.
pub const UHMM_SNAPSHOT_COHERENT_REMOTE: u8 = 0x50;
/// Snapshot: the bits that say where the page is.
pub const UHMM_SNAPSHOT_WHERE: u8 = 0x70;

/// Neighbouring pages of one residency.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct uhmm_residency_run {
    /// Offset in pages from the start of the range.
    pub first_page: u64,
    /// Pages.
    pub page_count: u64,
    /// UHMM_RESIDENCY_*.
    pub residency: u8,
    /// Device id for UHMM_RESIDENCY_DEVICE, _EXCLUSIVE and _DUPLICATED, else UHMM_NO_DEVICE.
    pub device: u8,
    /// Bit d: device d maps the pages now.
    pub mapped_mask: u8,
    /// Pinned: stay in system memory.
    pub pinned: bool,
    /// Kept as pages of 2 MiB on the device.
    pub huge: bool,
    /// On a device, and the CPU reaches them there.
    pub coherent: bool,
}

/// Where the pages of a range are, in order and without gaps; they may move while this is written. At most `capacity` runs are
/// copied to `runs`; `run_count` gets how many there are, which may be more.
///
/// Errors: -EINVAL not whole pages, or a part that is not managed; -EFAULT nothing of it is managed; the services' own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_residency(
    session: *mut uhmm_session,
    addr: *const c_void,
    len_bytes: u64,
    runs: *mut uhmm_residency_run,
    capacity: usize,
    run_count: *mut usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let run_count = unsafe { Out::new(run_count, "run_count") }?;
        // SAFETY: the caller's array of `capacity`.
        let runs = unsafe { items_mut(runs, capacity, "runs") }?;
        let found = handles::get(session)?.sdk.residency(address(addr)?, len_bytes)?;
        copy_items(found.iter().map(flatten), runs);
        run_count.set(found.len());
        Ok(())
    })
}

/// One byte of UHMM_SNAPSHOT_* for each page of a range, as `device` sees it. Nothing is faulted in or moved. `pages` has room for
/// `capacity` bytes, at least as many as the range has pages. Parts of the range may be unmapped or not under management.
///
/// Errors: -EINVAL not whole pages, or too little room; the services' own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_snapshot(
    session: *mut uhmm_session,
    device: *mut uhmm_device,
    addr: *const c_void,
    len_bytes: u64,
    pages: *mut u8,
    capacity: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's array of `capacity`.
        let pages = unsafe { items_mut(pages, capacity, "pages") }?;
        let needed = len_bytes / UHMM_PAGE_BYTES;
        if (capacity as u64) < needed {
            return Err(Failure::TooSmall { name: "pages", capacity, needed });
        }
        let session = handles::get(session)?;
        let found = session.sdk.snapshot(&*handles::get(device)?, address(addr)?, len_bytes)?;
        copy_items(found.iter().map(|page| page.bits()), pages);
        Ok(())
    })
}

/// 2 MiB of memory that a device has used lately.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct uhmm_hot_range {
    /// First address, a multiple of 2 MiB.
    pub addr: u64,
    /// Share of its pages that the device uses in 100 ms, 1 to 1000, on an average that halves with every 100 ms.
    pub heat_permille: u16,
}

/// What a device uses of this process's memory, hottest first. The first call begins the watching and tells what was used up to now;
/// it goes on until five seconds after the last call. At most `capacity` ranges are copied to `ranges`; `range_count` gets how many
/// there are, which may be more. A restart of the pager forgets the heat and nothing else.
///
/// Errors: -ENOENT the device has no aperture, so nobody but its driver knows; the services' own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_hot_ranges(
    session: *mut uhmm_session,
    device: *mut uhmm_device,
    ranges: *mut uhmm_hot_range,
    capacity: usize,
    range_count: *mut usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let range_count = unsafe { Out::new(range_count, "range_count") }?;
        // SAFETY: the caller's array of `capacity`.
        let ranges = unsafe { items_mut(ranges, capacity, "ranges") }?;
        let found = handles::get(session)?.sdk.hot_ranges(&*handles::get(device)?)?;
        let told = |range: &HotRange| uhmm_hot_range { addr: range.addr, heat_permille: range.heat_permille };
        copy_items(found.iter().map(told), ranges);
        range_count.set(found.len());
        Ok(())
    })
}

fn flatten(run: &ResidencyRun) -> uhmm_residency_run {
    let (residency, device) = match run.residency {
        Residency::Absent => (UHMM_RESIDENCY_ABSENT, UHMM_NO_DEVICE),
        Residency::System => (UHMM_RESIDENCY_SYSTEM, UHMM_NO_DEVICE),
        Residency::Device(id) => (UHMM_RESIDENCY_DEVICE, id),
        Residency::Exclusive(id) => (UHMM_RESIDENCY_EXCLUSIVE, id),
        Residency::Duplicated(id) => (UHMM_RESIDENCY_DUPLICATED, id),
        Residency::Moving => (UHMM_RESIDENCY_MOVING, UHMM_NO_DEVICE),
        Residency::Poisoned => (UHMM_RESIDENCY_POISONED, UHMM_NO_DEVICE),
    };
    uhmm_residency_run {
        first_page: run.first_page,
        page_count: run.page_count,
        residency,
        device,
        mapped_mask: run.mapped_mask,
        pinned: run.pinned,
        huge: run.huge,
        coherent: run.coherent,
    }
}

#[cfg(test)]
mod tests {
    use uhmm_sdk::SnapshotPage;

    use super::*;

    #[test]
    fn the_snapshot_constants_are_the_sdks() {
        for (own, sdk) in [
            (UHMM_SNAPSHOT_ERROR, SnapshotPage::ERROR),
            (UHMM_SNAPSHOT_NONE, SnapshotPage::NONE),
            (UHMM_SNAPSHOT_READ, SnapshotPage::READ),
            (UHMM_SNAPSHOT_WRITE, SnapshotPage::WRITE),
            (UHMM_SNAPSHOT_PMD, SnapshotPage::PMD),
            (UHMM_SNAPSHOT_ZERO, SnapshotPage::ZERO),
            (UHMM_SNAPSHOT_PRIVATE_LOCAL, SnapshotPage::DEVICE_LOCAL),
        ] {
            assert_eq!(own, sdk.bits());
        }
    }

    #[test]
    fn a_run_says_which_device_only_where_one_has_a_part() {
        let run = |residency| {
            let (first_page, page_count, mapped_mask) = (1, 2, 4);
            let (pinned, huge, coherent) = (true, false, true);
            let run = ResidencyRun { first_page, page_count, residency, pinned, mapped_mask, huge, coherent };
            let flat = flatten(&run);
            assert_eq!((flat.first_page, flat.page_count, flat.mapped_mask), (1, 2, 4));
            assert_eq!((flat.pinned, flat.huge, flat.coherent), (true, false, true));
            (flat.residency, flat.device)
        };
        assert_eq!(run(Residency::Device(3)), (UHMM_RESIDENCY_DEVICE, 3));
        assert_eq!(run(Residency::Exclusive(0)), (UHMM_RESIDENCY_EXCLUSIVE, 0));
        assert_eq!(run(Residency::Duplicated(1)), (UHMM_RESIDENCY_DUPLICATED, 1));
        assert_eq!(run(Residency::System), (UHMM_RESIDENCY_SYSTEM, UHMM_NO_DEVICE));
    }
}
