//! Devices: what they are, and what they do with ranges of the program's own addresses.

use std::ffi::{c_char, c_int, c_void};

use crate::buffers::{self, Out, address, copy_text, items_mut, text_field};
use crate::error::{Failure, guard};
use crate::handles::{self, Handle};
use crate::session::uhmm_session;

/// Longest name of a device or driver, with its final zero.
pub const UHMM_NAME_BYTES: usize = 65;

/// A device with a queue for a session: what uhmm_device_open() gives. May be used by all threads.
pub struct uhmm_device;

impl Handle for uhmm_device {
    type Object = uhmm_sdk::Device;
    const KIND: &'static str = "uhmm_device";
}

/// What a device is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uhmm_device_info {
    /// Name in the manifest.
    pub name: [c_char; UHMM_NAME_BYTES],
    /// Driver's name.
    pub driver: [c_char; UHMM_NAME_BYTES],
    /// Id in the plan: bit in masks, index in tables.
    pub id: u8,
    /// The CPU can see device memory.
    pub aperture: bool,
    /// The CPU reaches allocated memory there without bringing it home.
    pub coherent: bool,
    /// Device memory in bytes.
    pub memory_bytes: u64,
    /// Kernels that jobs can name, see uhmm_device_kernel().
    pub kernel_count: usize,
}

/// What an access of a device met.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uhmm_access_report {
    /// Pages of the range.
    pub page_count: u64,
    /// Device faults: 0 when all pages were there, 1 when one range fault brought all that was missing.
    pub fault_count: u64,
}

impl From<uhmm_sdk::AccessReport> for uhmm_access_report {
    fn from(report: uhmm_sdk::AccessReport) -> Self {
        Self { page_count: report.page_count, fault_count: report.fault_count }
    }
}

/// Opens a queue on a device by its name in the manifest. It survives restarts of its driver.
///
/// Errors: -EINVAL not a name; -ENOENT no such device; -EPERM the run directory cannot be entered; -ETIMEDOUT its driver does not answer for ten
/// seconds; the services' own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_device_open(
    session: *mut uhmm_session,
    name: *const c_char,
    device: *mut *mut uhmm_device,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let device = unsafe { Out::new(device, "device") }?;
        // SAFETY: text that ends with a zero.
        let name = unsafe { buffers::text(name, "name") }?;
        device.set(handles::open(handles::get(session)?.sdk.device(name)?));
        Ok(())
    })
}

/// Closes a device's handle. Pages stay where they are. In a forked child, a handle of the parent is left alone.
///
/// Errors: -EINVAL a wrong handle.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_device_close(device: *mut uhmm_device) -> c_int {
    guard(|| handles::close(device).map(drop))
}

/// What a device is.
///
/// Errors: -EINVAL a wrong handle or pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_device_describe(device: *mut uhmm_device, info: *mut uhmm_device_info) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let into = unsafe { Out::new(info, "info") }?;
        let device = handles::get(device)?;
        let info = device.info();
        into.set(uhmm_device_info {
            name: text_field(device.name()),
            driver: text_field(&info.driver),
            id: info.id,
            aperture: info.aperture,
            coherent: info.coherent,
            memory_bytes: info.memory_bytes,
            kernel_count: info.kernels.len(),
        });
        Ok(())
    })
}

/// One line about the kernel number `index` (from 0): its name and arguments. At most `capacity` bytes with the final zero are
/// written; longer text is cut.
///
/// Errors: -ENOENT the device has not that many kernels; -EINVAL a wrong handle or pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_device_kernel(
    device: *mut uhmm_device,
    index: usize,
    usage: *mut c_char,
    capacity: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller promises `capacity` writable bytes.
        let usage = unsafe { items_mut(usage, capacity, "usage") }?;
        let device = handles::get(device)?;
        let kernels = &device.info().kernels;
        let kernel = kernels.get(index).ok_or(Failure::NoKernel { index, count: kernels.len() })?;
        copy_text(kernel, usage);
        Ok(())
    })
}

/// The device reads `len_bytes` (whole pages) at the program's address `addr` and the bytes are copied to `into`. Pages that are not
/// on the device are faulted in, all with one range fault. `report` may be NULL.
///
/// Errors: -EFAULT not mapped, not readable, behind the end of its file, or not managed; -EPERM the device may not use a page (advice, or a coherent
/// device that serves another user); -EINVAL not whole pages; -ENOMEM the device is full, or no memory for the bytes on their way; -EBUSY others took
/// the pages away again and again, for a second; -EIO the device is lost or has failed; the services' own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_device_read(
    device: *mut uhmm_device,
    addr: *const c_void,
    into: *mut c_void,
    len_bytes: u64,
    report: *mut uhmm_access_report,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable, or null.
        let report = unsafe { Out::optional(report, "report") }?;
        // SAFETY: the caller promises `len_bytes` writable bytes.
        let into = unsafe { buffers::bytes_mut(into, len_bytes, "into") }?;
        let done = handles::get(device)?.read(address(addr)?, into)?;
        tell(report, done);
        Ok(())
    })
}

/// The device writes `len_bytes` (whole pages) from `from` to the program's address `addr`. `report` may be NULL.
///
/// Errors: as uhmm_device_read(); -EPERM also when the mapping is read-only, or its file may not be written (sealed, a read-only file system).
/// Nothing is written when a part of the range cannot be (as far as the device has room for all of it).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_device_write(
    device: *mut uhmm_device,
    addr: *mut c_void,
    from: *const c_void,
    len_bytes: u64,
    report: *mut uhmm_access_report,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable, or null.
        let report = unsafe { Out::optional(report, "report") }?;
        // SAFETY: the caller promises `len_bytes` readable bytes.
        let from = unsafe { buffers::bytes(from, len_bytes, "from") }?;
        let done = handles::get(device)?.write(address(addr)?, from)?;
        tell(report, done);
        Ok(())
    })
}

/// The device adds `value` to every 8-byte word of a range (whole pages), wrapping. `before` gets the words from before: room for
/// len_bytes / 8 of them, or NULL. `report` may be NULL. Not repeated by itself: -ESTALE when the driver died meanwhile.
///
/// Errors: as uhmm_device_write(); -ESTALE the driver died meanwhile: it may or may not be done; -EINVAL also memory of a file, where nothing can be
/// added atomically.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_device_fetch_add(
    device: *mut uhmm_device,
    addr: *mut c_void,
    len_bytes: u64,
    value: u64,
    before: *mut u64,
    report: *mut uhmm_access_report,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable, or null.
        let report = unsafe { Out::optional(report, "report") }?;
        let count = if before.is_null() { 0 } else { usize::try_from(len_bytes / 8).unwrap_or(usize::MAX) };
        // SAFETY: the caller promises room for this many words.
        let before = unsafe { buffers::words_mut(before, count, "before") }?;
        let done = handles::get(device)?.fetch_add_into(address(addr)?, len_bytes, value, before)?;
        tell(report, done);
        Ok(())
    })
}

/// Makes the pages of a range the device's alone, for its atomics, until the program touches them, forks, changes their protection, or
/// another device takes them. `report` may be NULL.
///
/// Errors: as uhmm_device_write(); -EBUSY also memory that stays in place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_device_exclusive(
    device: *mut uhmm_device,
    addr: *mut c_void,
    len_bytes: u64,
    report: *mut uhmm_access_report,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable, or null.
        let report = unsafe { Out::optional(report, "report") }?;
        let done = handles::get(device)?.make_exclusive(address(addr)?, len_bytes)?;
        tell(report, done);
        Ok(())
    })
}

/// Whether no page of a range is any device's alone: 0, or -EPERM while one is.
///
/// Errors: -EINVAL not whole pages, or a part that is not managed; -EFAULT nothing of it is managed; the services' own.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_check_exclusive(session: *mut uhmm_session, addr: *const c_void, len_bytes: u64) -> c_int {
    guard(|| Ok(handles::get(session)?.sdk.check_exclusive(address(addr)?, len_bytes)?))
}

/// Lets the device fault a range in, so that it lies on the device afterwards (but for pages that advice keeps elsewhere) and is mapped there.
/// `report` may be NULL.
///
/// Errors: as uhmm_device_read().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_fault_and_migrate(
    device: *mut uhmm_device,
    addr: *const c_void,
    len_bytes: u64,
    report: *mut uhmm_access_report,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable, or null.
        let report = unsafe { Out::optional(report, "report") }?;
        let done = handles::get(device)?.map(address(addr)?, len_bytes)?;
        tell(report, done);
        Ok(())
    })
}

/// uhmm_device_read() of what the device maps already: nothing is faulted in or moved. Reads up to the first page that it does not map;
/// `page_count` gets how many pages were read.
///
/// Errors: -ENOENT the device does not map the first page; -EINVAL not whole pages; -EIO the device is lost or has failed; the services' own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_device_peek(
    device: *mut uhmm_device,
    addr: *const c_void,
    into: *mut c_void,
    len_bytes: u64,
    page_count: *mut u64,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let page_count = unsafe { Out::new(page_count, "page_count") }?;
        // SAFETY: the caller promises `len_bytes` writable bytes.
        let into = unsafe { buffers::bytes_mut(into, len_bytes, "into") }?;
        page_count.set(handles::get(device)?.peek(address(addr)?, into)?);
        Ok(())
    })
}

fn tell(report: Option<Out<uhmm_access_report>>, done: uhmm_sdk::AccessReport) {
    if let Some(report) = report {
        report.set(done.into());
    }
}
