//! Memory: allocated, adopted, given back, discarded, protected, pinned.

use std::ffi::{c_int, c_void};

use crate::buffers::{Out, address};
use crate::error::{Failure, guard};
use crate::handles;
use crate::session::uhmm_session;

/// Bytes of one page: the unit of addresses and lengths.
pub const UHMM_PAGE_BYTES: u64 = 4096;

/// Protection: the program may read. The same number as PROT_READ.
pub const UHMM_PROTECT_READ: u32 = 1;
/// Protection: the program may write. The same number as PROT_WRITE.
pub const UHMM_PROTECT_WRITE: u32 = 2;

/// Memory of uhmm_allocate().
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uhmm_region_info {
    /// Number at the pager, as in `uhmm status`.
    pub region: u64,
    /// Length.
    pub len_bytes: u64,
    /// System memory that it takes now; falls when pages leave for a device.
    pub populated_bytes: u64,
}

/// Allocates zeroed, managed, shared memory; `len_bytes` is a multiple of the page size. Pages cost nothing before they are
/// touched.
///
/// Errors: -EINVAL the length; -ENOMEM no memory, no mapping left (vm.max_map_count), or the quota of this process; the services' own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_allocate(session: *mut uhmm_session, len_bytes: u64, addr: *mut *mut c_void) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let addr = unsafe { Out::new(addr, "addr") }?;
        let session = handles::get(session)?;
        let region = session.sdk.allocate(len_bytes)?;
        let first = region.addr();
        session.regions().insert(first, region);
        addr.set(std::ptr::with_exposed_provenance_mut(first as usize));
        Ok(())
    })
}

/// Frees what uhmm_allocate() gave, as a whole, on every device too. Its addresses are gone.
///
/// Errors: -ENOENT no allocation of this session begins there; the services' own.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_free(session: *mut uhmm_session, addr: *mut c_void) -> c_int {
    guard(|| {
        let (session, addr) = (handles::get(session)?, address(addr)?);
        let region = session.regions().remove(&addr);
        Ok(region.ok_or(Failure::NoAllocation { addr })?.free()?)
    })
}

/// What uhmm_allocate() gave at `addr`.
///
/// Errors: -ENOENT no allocation of this session begins there; the services' own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_region(
    session: *mut uhmm_session,
    addr: *const c_void,
    info: *mut uhmm_region_info,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let info = unsafe { Out::new(info, "info") }?;
        let (session, addr) = (handles::get(session)?, address(addr)?);
        let regions = session.regions();
        let region = regions.get(&addr).ok_or(Failure::NoAllocation { addr })?;
        let populated_bytes = region.populated_bytes()?;
        info.set(uhmm_region_info { region: region.id(), len_bytes: region.len_bytes(), populated_bytes });
        Ok(())
    })
}

/// Puts memory that exists already under management, in place: addresses and bytes stay what they are. What is under management
/// already stays so. Private anonymous memory
/// (malloc'd in whole pages, mmapped) can migrate; shared mappings of files, and shared memory of huge pages (MAP_HUGETLB), are
/// used by devices in place. Private MAP_HUGETLB memory is refused.
///
/// Errors: -ENOMEM no mapping left (vm.max_map_count), or a quota of the manifest's; the services' own. -EINVAL not whole pages, several mappings of which some are shared, or a kind of memory that cannot be managed (private memory of
/// files or of huge pages, executable, growing downwards, the kernel's); -EFAULT a hole; -EPERM memory that must not be managed: libuhmm's own,
/// stacks and control blocks of threads (the kernel writes there when a thread ends and cannot wait for a page), and where
/// uhmm_system_calls_wait() is 0, the calling thread's alternate signal stack and the heap that holds libuhmm's own objects. The text says
/// which part of the range it is, why, and what can be done.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_adopt(session: *mut uhmm_session, addr: *mut c_void, len_bytes: u64) -> c_int {
    guard(|| {
        handles::get(session)?.sdk.adopt(address(addr)?, len_bytes)?;
        Ok(())
    })
}

/// Gives adopted memory, or a part of it, back to the kernel alone: its pages come home first and stay. What is not adopted stays
/// as it is.
///
/// Errors: -EINVAL not whole pages, or a range with memory of uhmm_allocate() among other; -EIO pages are lost, or could not be copied home; the
/// services' own.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_release(session: *mut uhmm_session, addr: *mut c_void, len_bytes: u64) -> c_int {
    guard(|| Ok(handles::get(session)?.sdk.release(address(addr)?, len_bytes)?))
}

/// The bytes of a range are not needed any more: it reads as zero from now on and costs no memory anywhere.
///
/// Errors: -EINVAL not whole pages, or not mapped; -EFAULT shared memory of which nothing is managed; the services' own.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_discard(session: *mut uhmm_session, addr: *mut c_void, len_bytes: u64) -> c_int {
    guard(|| Ok(handles::get(session)?.sdk.discard(address(addr)?, len_bytes)?))
}

/// mprotect(2) that devices obey too when it returns: `protection` is 0, UHMM_PROTECT_READ, or UHMM_PROTECT_READ |
/// UHMM_PROTECT_WRITE. (A plain mprotect counts from the next access or kernel of a device on;
/// a kernel that runs already may go on until its next fault.)
///
/// Errors: -EINVAL not whole pages, or another protection; -EPERM the mapping does not allow it; -ENOMEM a hole, or no mapping left
/// (vm.max_map_count); -EFAULT not managed (the protection is changed nevertheless); the services' own.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_protect(
    session: *mut uhmm_session,
    addr: *mut c_void,
    len_bytes: u64,
    protection: u32,
) -> c_int {
    guard(|| {
        let (read, write) = match protection {
            0 => (false, false),
            UHMM_PROTECT_READ => (true, false),
            both if both == UHMM_PROTECT_READ | UHMM_PROTECT_WRITE => (true, true),
            other => {
                let expected = "0, UHMM_PROTECT_READ, or both UHMM_PROTECT_READ and UHMM_PROTECT_WRITE";
                return Err(Failure::BadValue { name: "protection", value: other.into(), expected });
            }
        };
        Ok(handles::get(session)?.sdk.protect(address(addr)?, len_bytes, read, write)?)
    })
}

/// Brings a range home and keeps it there until uhmm_unpin(): for memory that I/O refers to (O_DIRECT, RDMA, registered io_uring
/// buffers), which nobody but the program knows of.
///
/// Errors: -EINVAL not whole pages, or a part that is not managed; -EFAULT nothing of it is managed; the services' own.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_pin(session: *mut uhmm_session, addr: *const c_void, len_bytes: u64) -> c_int {
    guard(|| Ok(handles::get(session)?.sdk.pin(address(addr)?, len_bytes)?))
}

/// Ends uhmm_pin(), with the same errors.
///
/// Errors: as uhmm_pin().
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_unpin(session: *mut uhmm_session, addr: *const c_void, len_bytes: u64) -> c_int {
    guard(|| Ok(handles::get(session)?.sdk.unpin(address(addr)?, len_bytes)?))
}
