//! Jobs: kernels of a device on the program's own pointers.

use std::ffi::{c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::time::Duration;

use uhmm_sdk::{Job, JobResult};

use crate::buffers::{self, Out, copy_items, items, items_mut};
use crate::device::uhmm_device;
use crate::error::{Failure, guard};
use crate::handles;
use crate::pending::{Answer, uhmm_pending};

/// The job only reads, or writes absolute values: it is run again from its start after a restart of the driver. Other jobs end with
/// -ESTALE then.
pub const UHMM_JOB_IDEMPOTENT: u32 = 1;

/// A range that a job uses, see uhmm_run_with().
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uhmm_job_range {
    /// First byte.
    pub addr: *const c_void,
    /// Bytes; their pages are meant.
    pub len_bytes: u64,
    /// UHMM_JOB_READS or UHMM_JOB_WRITES.
    pub access: u32,
}

/// The job reads the range.
pub const UHMM_JOB_READS: u32 = 0;
/// The job writes the range, and may read it.
pub const UHMM_JOB_WRITES: u32 = 1;

/// What a job brought, beside its results.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uhmm_job_report {
    /// Results that the kernel returned; the caller's array may hold fewer.
    pub result_count: usize,
    /// Device faults that the job met.
    pub fault_count: u64,
    /// Time on the device in nanoseconds, faults included.
    pub run_time_ns: u64,
}

/// Runs a kernel and waits. `args` are its `arg_count` arguments: pointers, lengths, constants, as uhmm_device_kernel() lists them.
/// Nothing has to be moved before. `flags` is 0 or UHMM_JOB_IDEMPOTENT; a `deadline_ms` of 0 is none. At most `capacity` results are
/// copied to `results` (may be NULL with capacity 0). `report` may be NULL.
///
/// Errors: -ENOENT no such kernel; -EINVAL its arguments; -EFAULT, -EPERM, -ENOMEM, -EBUSY, -EIO of its faults, as uhmm_device_read(); -ETIMEDOUT the
/// deadline passed; -ESTALE the driver died and the job is not idempotent; the services' own.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "a C function without a structure for its arguments")]
pub unsafe extern "C" fn uhmm_run(
    device: *mut uhmm_device,
    kernel: *const c_char,
    args: *const u64,
    arg_count: usize,
    flags: u32,
    deadline_ms: u32,
    report: *mut uhmm_job_report,
    results: *mut u64,
    capacity: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable, or null.
        let report = unsafe { Out::optional(report, "report") }?;
        // SAFETY: the caller's array of `capacity`.
        let results = unsafe { items_mut(results, capacity, "results") }?;
        // SAFETY: text that ends with a zero, and an array of `arg_count`.
        let job = unsafe { job(kernel, args, arg_count, flags, deadline_ms) }?;
        tell(&handles::get(device)?.run(job)?, report, results);
        Ok(())
    })
}

/// uhmm_run() without waiting: the answer comes through `pending`, see uhmm_pending_finished().
///
/// Errors: -EINVAL a wrong handle, pointer, text or flag. The job's own come with its answer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_submit(
    device: *mut uhmm_device,
    kernel: *const c_char,
    args: *const u64,
    arg_count: usize,
    flags: u32,
    deadline_ms: u32,
    pending: *mut *mut uhmm_pending,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let pending = unsafe { Out::new(pending, "pending") }?;
        // SAFETY: text that ends with a zero, and an array of `arg_count`.
        let job = unsafe { job(kernel, args, arg_count, flags, deadline_ms) }?;
        pending.set(crate::pending::open(handles::get(device)?.submit(job), Answer::Finished));
        Ok(())
    })
}

/// uhmm_run() of a job that names what it uses: the pages of its `range_count` ranges (at most 64) are brought to the device and mapped there
/// before it starts, which costs a small part of faulting them in. What is not named, does not fit (half of the device's memory) or is taken
/// away again is faulted in as ever; what cannot be brought fails the job only if it touches it.
///
/// Errors: as uhmm_run(); -EINVAL also the ranges.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "a C function without a structure for its arguments")]
pub unsafe extern "C" fn uhmm_run_with(
    device: *mut uhmm_device,
    kernel: *const c_char,
    args: *const u64,
    arg_count: usize,
    ranges: *const uhmm_job_range,
    range_count: usize,
    flags: u32,
    deadline_ms: u32,
    report: *mut uhmm_job_report,
    results: *mut u64,
    capacity: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable, or null.
        let report = unsafe { Out::optional(report, "report") }?;
        // SAFETY: the caller's array of `capacity`.
        let results = unsafe { items_mut(results, capacity, "results") }?;
        // SAFETY: text that ends with a zero, and an array of `arg_count`.
        let job = unsafe { job(kernel, args, arg_count, flags, deadline_ms) }?;
        // SAFETY: an array of `range_count`.
        let job = unsafe { with_ranges(job, ranges, range_count) }?;
        tell(&handles::get(device)?.run(job)?, report, results);
        Ok(())
    })
}

/// uhmm_run_with() without waiting: the answer comes through `pending`, see uhmm_pending_finished().
///
/// Errors: -EINVAL a wrong handle, pointer, text, flag or range. The job's own come with its answer.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "a C function without a structure for its arguments")]
pub unsafe extern "C" fn uhmm_submit_with(
    device: *mut uhmm_device,
    kernel: *const c_char,
    args: *const u64,
    arg_count: usize,
    ranges: *const uhmm_job_range,
    range_count: usize,
    flags: u32,
    deadline_ms: u32,
    pending: *mut *mut uhmm_pending,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let pending = unsafe { Out::new(pending, "pending") }?;
        // SAFETY: text that ends with a zero, and an array of `arg_count`.
        let job = unsafe { job(kernel, args, arg_count, flags, deadline_ms) }?;
        // SAFETY: an array of `range_count`.
        let job = unsafe { with_ranges(job, ranges, range_count) }?;
        pending.set(crate::pending::open(handles::get(device)?.submit(job), Answer::Finished));
        Ok(())
    })
}

/// # Safety
/// `ranges` is null or an array of `count`.
unsafe fn with_ranges(job: Job, ranges: *const uhmm_job_range, count: usize) -> Result<Job, Failure> {
    // SAFETY: the same contract.
    let ranges = unsafe { items(ranges, count, "ranges") }?;
    ranges.iter().try_fold(job, |job, range| {
        let addr = buffers::address(range.addr)?;
        match range.access {
            UHMM_JOB_READS => Ok(job.reads(addr, range.len_bytes)),
            UHMM_JOB_WRITES => Ok(job.writes(addr, range.len_bytes)),
            other => {
                let expected = "UHMM_JOB_READS or UHMM_JOB_WRITES";
                Err(Failure::BadValue { name: "access", value: other.into(), expected })
            }
        }
    })
}

/// # Safety
/// `kernel` is null or text that ends with a zero, `args` null or an array of `arg_count`.
unsafe fn job(
    kernel: *const c_char,
    args: *const u64,
    arg_count: usize,
    flags: u32,
    deadline_ms: u32,
) -> Result<Job, Failure> {
    // SAFETY: the same contract.
    let kernel = unsafe { buffers::text(kernel, "kernel") }?;
    // SAFETY: the same contract.
    let args = unsafe { items(args, arg_count, "args") }?;
    let mut job = Job::new(kernel, args);
    match flags {
        0 => {}
        UHMM_JOB_IDEMPOTENT => job = job.idempotent(),
        other => {
            let expected = "0 or UHMM_JOB_IDEMPOTENT";
            return Err(Failure::BadValue { name: "flags", value: other.into(), expected });
        }
    }
    Ok(if deadline_ms == 0 { job } else { job.deadline(Duration::from_millis(deadline_ms.into())) })
}

pub(crate) fn tell(done: &JobResult, report: Option<Out<uhmm_job_report>>, results: &mut [MaybeUninit<u64>]) {
    copy_items(done.results.iter().copied(), results);
    if let Some(report) = report {
        report.set(uhmm_job_report {
            result_count: done.results.len(),
            fault_count: done.fault_count,
            run_time_ns: done.run_time_ns,
        });
    }
}
