//! What devices do with ranges, without waiting: for concurrent accesses and for deadlines. The answers come through `uhmm_pending`.

use std::ffi::{c_int, c_void};
use std::time::Duration;

use crate::buffers::{self, Out, address};
use crate::device::uhmm_device;
use crate::error::guard;
use crate::handles;
use crate::pending::{self, Answer, uhmm_pending};

/// uhmm_device_read() without waiting: the bytes come with uhmm_pending_accessed(). A `deadline_ms` of 0 is none; after it the answer
/// is -ETIMEDOUT.
///
/// Errors: -EINVAL not whole pages; -ENOMEM no memory for the bytes on their way. The access's own come with its answer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_device_read_async(
    device: *mut uhmm_device,
    addr: *const c_void,
    len_bytes: u64,
    deadline_ms: u32,
    pending: *mut *mut uhmm_pending,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let pending = unsafe { Out::new(pending, "pending") }?;
        let call = handles::get(device)?.read_at(address(addr)?, len_bytes, deadline(deadline_ms))?;
        pending.set(pending::open(call, Answer::Accessed));
        Ok(())
    })
}

/// uhmm_device_write() without waiting: the answer comes with uhmm_pending_accessed(). `from` is copied before this returns.
///
/// Errors: as uhmm_device_read_async().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_device_write_async(
    device: *mut uhmm_device,
    addr: *mut c_void,
    from: *const c_void,
    len_bytes: u64,
    deadline_ms: u32,
    pending: *mut *mut uhmm_pending,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let pending = unsafe { Out::new(pending, "pending") }?;
        // SAFETY: the caller promises `len_bytes` readable bytes.
        let from = unsafe { buffers::bytes(from, len_bytes, "from") }?;
        let call = handles::get(device)?.write_at(address(addr)?, from, deadline(deadline_ms))?;
        pending.set(pending::open(call, |done| Answer::Accessed((Vec::new(), done))));
        Ok(())
    })
}

/// uhmm_device_fetch_add() without waiting: the words from before come with uhmm_pending_accessed().
///
/// Errors: as uhmm_device_read_async().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_device_fetch_add_async(
    device: *mut uhmm_device,
    addr: *mut c_void,
    len_bytes: u64,
    value: u64,
    deadline_ms: u32,
    pending: *mut *mut uhmm_pending,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let pending = unsafe { Out::new(pending, "pending") }?;
        let call = handles::get(device)?.fetch_add_at(address(addr)?, len_bytes, value, deadline(deadline_ms))?;
        pending.set(pending::open(call, |(words, done)| {
            Answer::Accessed((words.iter().flat_map(|word| word.to_ne_bytes()).collect(), done))
        }));
        Ok(())
    })
}

/// uhmm_device_exclusive() without waiting: the answer comes with uhmm_pending_accessed().
///
/// Errors: -EINVAL not whole pages. The access's own come with its answer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_device_exclusive_async(
    device: *mut uhmm_device,
    addr: *mut c_void,
    len_bytes: u64,
    deadline_ms: u32,
    pending: *mut *mut uhmm_pending,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let pending = unsafe { Out::new(pending, "pending") }?;
        let call = handles::get(device)?.make_exclusive_at(address(addr)?, len_bytes, deadline(deadline_ms))?;
        pending.set(pending::open(call, |done| Answer::Accessed((Vec::new(), done))));
        Ok(())
    })
}

fn deadline(deadline_ms: u32) -> Option<Duration> {
    (deadline_ms > 0).then(|| Duration::from_millis(deadline_ms.into()))
}
