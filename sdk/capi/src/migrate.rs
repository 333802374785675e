//! Migration: by request, ahead of use, and back to make room.

use std::ffi::{c_int, c_void};

use uhmm_sdk::{MigrateReport, PageStatus, Target};

use crate::buffers::{Out, address, copy_items, items_mut};
use crate::device::uhmm_device;
use crate::error::{Failure, guard, remark};
use crate::handles;
use crate::memory::UHMM_PAGE_BYTES;
use crate::pending::{Answer, uhmm_pending};
use crate::session::uhmm_session;

/// Fate of a page: moved now.
pub const UHMM_PAGE_MOVED: u8 = 0;
/// Fate of a page: it was there already.
pub const UHMM_PAGE_ALREADY_THERE: u8 = 1;
/// Fate of a page: it lost a race; try again.
pub const UHMM_PAGE_BUSY: u8 = 2;
/// Fate of a page: pinned, stays. Or locked (mlock, mlockall), and RLIMIT_MEMLOCK has no room for it a second time while it moves: raise it
/// (ulimit -l).
pub const UHMM_PAGE_PINNED: u8 = 3;
/// Fate of a page: the device is full and nothing could be evicted. Or the way out of the address space needs more than the process may have:
/// vm.max_map_count, its control group's memory.
pub const UHMM_PAGE_NO_MEMORY: u8 = 4;
/// Fate of a page: the copy failed; it is valid where it was.
pub const UHMM_PAGE_IO: u8 = 5;
/// Fate of a page: lost with a device; touching it raises SIGBUS.
pub const UHMM_PAGE_POISONED: u8 = 6;
/// Fate of a page: unmapped meanwhile.
pub const UHMM_PAGE_GONE: u8 = 7;
/// Fate of a page: not one of those that were to move, see UHMM_MIGRATE_*.
pub const UHMM_PAGE_NOT_SELECTED: u8 = 8;
/// How many fates there are.
pub const UHMM_PAGE_FATES: usize = 9;

/// Migrates: to the device, only what is in system memory; pages on other devices stay there.
pub const UHMM_MIGRATE_FROM_SYSTEM: u32 = 1;
/// Migrates: home, only what is on the device; pages on other devices stay there.
pub const UHMM_MIGRATE_FROM_DEVICE: u32 = 2;
/// Migrates, and the device maps what is there then: its accesses meet no fault. Not with UHMM_MIGRATE_FROM_DEVICE.
pub const UHMM_MIGRATE_AND_MAP: u32 = 4;

/// What a migration did.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uhmm_migrate_report {
    /// Pages that moved because of this request.
    pub moved_pages: u64,
    /// Pages of each fate, by UHMM_PAGE_*.
    pub pages: [u64; UHMM_PAGE_FATES],
}

/// Migrates a range to `device` (NULL: home, to system memory) and waits. Addresses stay what they are. Partial success is 0: look
/// at the report. `fates` gets one UHMM_PAGE_* a page; it has room for `capacity` of them, at least as many as the range has pages,
/// or is NULL with capacity 0. `report` may be NULL.
///
/// Errors: -EINVAL not whole pages, or a part that is not managed; -EFAULT nothing of it is managed, or not mapped and readable; -ENOENT memory of
/// files, which devices use in place; -EPERM a coherent device that serves another user; -EIO the agent is gone (see uhmm_agent()); the services'
/// own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_migrate(
    session: *mut uhmm_session,
    addr: *const c_void,
    len_bytes: u64,
    device: *mut uhmm_device,
    report: *mut uhmm_migrate_report,
    fates: *mut u8,
    capacity: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable or null, and an array of `capacity`.
        let wanted = unsafe { Wanted::new(report, fates, capacity) }?;
        wanted.room_for(len_bytes / UHMM_PAGE_BYTES)?;
        let session = handles::get(session)?;
        let done = session.sdk.migrate(address(addr)?, len_bytes, target(device)?)?;
        wanted.tell(&done)
    })
}

/// uhmm_migrate() of some of the pages, as a kernel driver selects them: `flags` are UHMM_MIGRATE_*, `device` is the one that they name. Pages that
/// are left out have the fate UHMM_PAGE_NOT_SELECTED, and those that are where they shall be UHMM_PAGE_ALREADY_THERE.
///
/// Errors: as uhmm_migrate(); -EINVAL also flags that do not go together; with UHMM_MIGRATE_AND_MAP those of uhmm_fault_and_migrate().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_migrate_some(
    session: *mut uhmm_session,
    addr: *const c_void,
    len_bytes: u64,
    device: *mut uhmm_device,
    flags: u32,
    report: *mut uhmm_migrate_report,
    fates: *mut u8,
    capacity: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable or null, and an array of `capacity`.
        let wanted = unsafe { Wanted::new(report, fates, capacity) }?;
        wanted.room_for(len_bytes / UHMM_PAGE_BYTES)?;
        let (session, device, addr) = (handles::get(session)?, handles::get(device)?, address(addr)?);
        let (sdk, from_system) = (&session.sdk, flags & UHMM_MIGRATE_FROM_SYSTEM != 0);
        let done = match flags & !UHMM_MIGRATE_FROM_SYSTEM {
            0 if from_system => sdk.migrate_from_system(addr, len_bytes, &device)?,
            0 => sdk.migrate(addr, len_bytes, &*device)?,
            UHMM_MIGRATE_AND_MAP => sdk.migrate_and_map(addr, len_bytes, &device, from_system)?,
            UHMM_MIGRATE_FROM_DEVICE if !from_system => sdk.migrate_from_device(addr, len_bytes, &device)?,
            _ => {
                let expected = "UHMM_MIGRATE_FROM_SYSTEM and UHMM_MIGRATE_AND_MAP, or UHMM_MIGRATE_FROM_DEVICE alone";
                return Err(Failure::BadValue { name: "flags", value: flags.into(), expected });
            }
        };
        wanted.tell(&done)
    })
}

/// uhmm_migrate() without waiting: the answer comes through `pending`, see uhmm_pending_migrated(). The memory can be used
/// meanwhile; a page that is touched waits for its own copy.
///
/// Errors: -EINVAL not whole pages. The migration's own come with its answer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_migrate_async(
    session: *mut uhmm_session,
    addr: *const c_void,
    len_bytes: u64,
    device: *mut uhmm_device,
    pending: *mut *mut uhmm_pending,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let pending = unsafe { Out::new(pending, "pending") }?;
        let session = handles::get(session)?;
        let call = session.sdk.migrate_async(address(addr)?, len_bytes, target(device)?)?;
        pending.set(crate::pending::open(call, Answer::Migrated));
        Ok(())
    })
}

/// Brings a range to `device` (NULL: home) ahead of its use there and waits; the place is noted as the pages' prefetch location (see
/// uhmm_attributes()). `report` may be NULL.
///
/// Errors: as uhmm_migrate().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_prefetch(
    session: *mut uhmm_session,
    addr: *const c_void,
    len_bytes: u64,
    device: *mut uhmm_device,
    report: *mut uhmm_migrate_report,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable or null; no array.
        let wanted = unsafe { Wanted::new(report, std::ptr::null_mut(), 0) }?;
        let session = handles::get(session)?;
        let done = session.sdk.prefetch(address(addr)?, len_bytes, target(device)?)?.wait()?;
        wanted.tell(&done)
    })
}

/// uhmm_prefetch() without waiting: the answer comes through `pending`, see uhmm_pending_migrated().
///
/// Errors: as uhmm_migrate_async().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_prefetch_async(
    session: *mut uhmm_session,
    addr: *const c_void,
    len_bytes: u64,
    device: *mut uhmm_device,
    pending: *mut *mut uhmm_pending,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let pending = unsafe { Out::new(pending, "pending") }?;
        let session = handles::get(session)?;
        let call = session.sdk.prefetch(address(addr)?, len_bytes, target(device)?)?;
        pending.set(crate::pending::open(call, Answer::Migrated));
        Ok(())
    })
}

/// Brings pages of this process home from a device, coldest first: `page_count` of them, 0 for all. `evicted_pages` gets how
/// many came; it may be NULL.
///
/// Errors: -EINVAL a wrong handle or pointer; the services' own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_evict(
    session: *mut uhmm_session,
    device: *mut uhmm_device,
    page_count: u64,
    evicted_pages: *mut u64,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable, or null.
        let evicted_pages = unsafe { Out::optional(evicted_pages, "evicted_pages") }?;
        let done = handles::get(session)?.sdk.evict(&*handles::get(device)?, page_count)?;
        if let Some(evicted_pages) = evicted_pages {
            evicted_pages.set(done);
        }
        Ok(())
    })
}

/// Where to.
fn target(device: *mut uhmm_device) -> Result<Target, Failure> {
    if device.is_null() { Ok(Target::Home) } else { Ok(handles::get(device)?.target()) }
}

/// What the caller wants to know of a migration.
pub(crate) struct Wanted<'a> {
    report: Option<Out<uhmm_migrate_report>>,
    fates: &'a mut [std::mem::MaybeUninit<u8>],
}

impl Wanted<'_> {
    /// # Safety
    /// `report` is null or the caller's variable, `fates` null or the caller's array of `capacity`.
    pub(crate) unsafe fn new(
        report: *mut uhmm_migrate_report,
        fates: *mut u8,
        capacity: usize,
    ) -> Result<Self, Failure> {
        // SAFETY: the same contract.
        let report = unsafe { Out::optional(report, "report") }?;
        // SAFETY: the same contract.
        let fates = unsafe { items_mut(fates, capacity, "fates") }?;
        Ok(Self { report, fates })
    }

    /// An array that is given must do, before anything is done.
    pub(crate) fn room_for(&self, page_count: u64) -> Result<(), Failure> {
        let capacity = self.fates.len();
        if capacity > 0 && (capacity as u64) < page_count {
            return Err(Failure::TooSmall { name: "fates", capacity, needed: page_count });
        }
        Ok(())
    }

    pub(crate) fn tell(self, done: &MigrateReport) -> Result<(), Failure> {
        self.room_for(done.runs.iter().map(|run| run.page_count).sum())?;
        if !done.why.is_empty() {
            remark(&done.why);
        }
        let mut report = uhmm_migrate_report { moved_pages: done.moved_pages, ..Default::default() };
        for run in &done.runs {
            report.pages[usize::from(fate(run.status))] += run.page_count;
        }
        let each = done.runs.iter().flat_map(|run| std::iter::repeat_n(fate(run.status), run.page_count as usize));
        copy_items(each, self.fates);
        if let Some(place) = self.report {
            place.set(report);
        }
        Ok(())
    }
}

fn fate(status: PageStatus) -> u8 {
    match status {
        PageStatus::Moved => UHMM_PAGE_MOVED,
        PageStatus::AlreadyThere => UHMM_PAGE_ALREADY_THERE,
        PageStatus::Busy => UHMM_PAGE_BUSY,
        PageStatus::Pinned => UHMM_PAGE_PINNED,
        PageStatus::NoMemory => UHMM_PAGE_NO_MEMORY,
        PageStatus::Io => UHMM_PAGE_IO,
        PageStatus::Poisoned => UHMM_PAGE_POISONED,
        PageStatus::Gone => UHMM_PAGE_GONE,
        PageStatus::NotSelected => UHMM_PAGE_NOT_SELECTED,
    }
}

#[cfg(test)]
mod tests {
    use uhmm_sdk::StatusRun;

    use super::*;

    fn done() -> MigrateReport {
        let run = |first_page, page_count, status| StatusRun { first_page, page_count, status };
        MigrateReport {
            moved_pages: 2,
            runs: vec![run(0, 2, PageStatus::Moved), run(2, 1, PageStatus::Pinned)],
            why: String::new(),
        }
    }

    #[test]
    fn every_page_gets_its_fate_and_each_fate_its_count() {
        let (mut report, mut fates) = (uhmm_migrate_report::default(), [9u8; 4]);
        // SAFETY: a variable and an array of four.
        unsafe { Wanted::new(&mut report, fates.as_mut_ptr(), 4) }.unwrap().tell(&done()).unwrap();
        assert_eq!(fates, [UHMM_PAGE_MOVED, UHMM_PAGE_MOVED, UHMM_PAGE_PINNED, 9]);
        assert_eq!((report.moved_pages, report.pages[0], report.pages[3]), (2, 2, 1));
    }

    #[test]
    fn an_array_that_is_too_short_is_refused_and_none_is_fine() {
        let mut fates = [9u8; 2];
        // SAFETY: no variable and an array of two.
        let wanted = unsafe { Wanted::new(std::ptr::null_mut(), fates.as_mut_ptr(), 2) }.unwrap();
        let error = wanted.tell(&done()).unwrap_err();
        assert!(matches!(error, Failure::TooSmall { capacity: 2, needed: 3, .. }), "{error}");
        assert_eq!(fates, [9, 9]);
        // SAFETY: nothing is given.
        unsafe { Wanted::new(std::ptr::null_mut(), std::ptr::null_mut(), 0) }.unwrap().tell(&done()).unwrap();
    }
}
