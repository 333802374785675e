//! What happens inside: counters of the services, the trace of the pager, and the test hook that makes things fail.

use std::ffi::{c_char, c_int};

use uhmm_sdk::{FaultPoint, TraceCause, TraceKind, TraceRecord};

use crate::buffers::{self, Out, copy_items, items_mut, text_field};
use crate::error::{Failure, guard};
use crate::handles;
use crate::policy::place;
use crate::session::uhmm_session;

/// Longest name of a counter, with its final zero.
pub const UHMM_METRIC_NAME_BYTES: usize = 64;

/// Trace: pages begin to move.
pub const UHMM_TRACE_MIGRATE_START: u8 = 0;
/// Trace: they have moved, or stay; the page count is what moved.
pub const UHMM_TRACE_MIGRATE_END: u8 = 1;
/// Trace: devices lost their mappings.
pub const UHMM_TRACE_INVALIDATE: u8 = 2;
/// Trace: a fault was answered by waiting, because the block thrashes.
pub const UHMM_TRACE_THROTTLE: u8 = 3;

/// Cause: the program asked.
pub const UHMM_CAUSE_PREFETCH: u8 = 0;
/// Cause: a CPU fault.
pub const UHMM_CAUSE_CPU_FAULT: u8 = 1;
/// Cause: a device fault.
pub const UHMM_CAUSE_DEVICE_FAULT: u8 = 2;
/// Cause: a device was full.
pub const UHMM_CAUSE_EVICTION: u8 = 3;
/// Cause: the address space changed (unmap, remap, fork, protection).
pub const UHMM_CAUSE_ADDRESS_SPACE: u8 = 4;

/// Fails: the allocation of 2 MiB of device memory in one piece; small pieces are tried instead.
pub const UHMM_FAIL_HUGE_FRAMES: u32 = 0;
/// Fails: the allocation of device memory.
pub const UHMM_FAIL_FRAMES: u32 = 1;
/// Fails: the copy to a device.
pub const UHMM_FAIL_COPY_OUT: u32 = 2;
/// Fails: the copy to system memory.
pub const UHMM_FAIL_COPY_HOME: u32 = 3;
/// Fails: the allocation of a page of 2 MiB of system memory for pages that come home; small pages are tried instead.
pub const UHMM_FAIL_SYSTEM_HUGE: u32 = 4;
/// Fails: the allocation of system memory for pages that come home; they stay on the device, and are tried again.
pub const UHMM_FAIL_SYSTEM_PAGES: u32 = 5;

/// One counter of a service.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uhmm_metric {
    /// Name; carries the unit.
    pub name: [c_char; UHMM_METRIC_NAME_BYTES],
    /// Value.
    pub value: u64,
}

/// One event in the life of pages.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct uhmm_trace_record {
    /// Counts up by one; starts again at 1 with each start of the pager.
    pub sequence: u64,
    /// Nanoseconds of CLOCK_MONOTONIC.
    pub time_ns: u64,
    /// First address.
    pub addr: u64,
    /// Pages.
    pub page_count: u64,
    /// Where from: device id or UHMM_PLACE_HOME.
    pub from: i32,
    /// Where to: device id or UHMM_PLACE_HOME.
    pub to: i32,
    /// UHMM_TRACE_*.
    pub kind: u8,
    /// UHMM_CAUSE_*.
    pub cause: u8,
}

/// All counters of a service: "supervisor", "pager", "mirror" or a device's name. At most `capacity` are copied to `metrics`;
/// `metric_count` gets how many there are, which may be more.
///
/// Errors: -ENOTCONN no system runs any more; -ENOENT no such service; -EPERM the run directory cannot be entered; -ETIMEDOUT it does not answer for
/// ten seconds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_stats(
    session: *mut uhmm_session,
    service: *const c_char,
    metrics: *mut uhmm_metric,
    capacity: usize,
    metric_count: *mut usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let metric_count = unsafe { Out::new(metric_count, "metric_count") }?;
        // SAFETY: the caller's array of `capacity`.
        let metrics = unsafe { items_mut(metrics, capacity, "metrics") }?;
        // SAFETY: text that ends with a zero.
        let service = unsafe { buffers::text(service, "service") }?;
        let found = uhmm_sdk::operator::stats(Some(&handles::get(session)?.run_dir), service)?;
        let flat = found.iter().map(|metric| uhmm_metric { name: text_field(&metric.name), value: metric.value });
        copy_items(flat, metrics);
        metric_count.set(found.len());
        Ok(())
    })
}

/// One counter of a service, by name.
///
/// Errors: as uhmm_stats(); -ENOENT also when there is no such counter.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_stat(
    session: *mut uhmm_session,
    service: *const c_char,
    name: *const c_char,
    value: *mut u64,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let value = unsafe { Out::new(value, "value") }?;
        // SAFETY: text that ends with a zero.
        let service = unsafe { buffers::text(service, "service") }?;
        // SAFETY: text that ends with a zero.
        let name = unsafe { buffers::text(name, "name") }?;
        let found = uhmm_sdk::operator::stats(Some(&handles::get(session)?.run_dir), service)?;
        let metric = found.into_iter().find(|metric| metric.name == name);
        let missing = || Failure::NoCounter { service: service.into(), name: name.into() };
        value.set(metric.ok_or_else(missing)?.value);
        Ok(())
    })
}

/// What happened to this process's pages, from sequence number `since` on (0: all that is remembered). At most `capacity` records are
/// copied to `records`, and `record_count` gets how many were: ask again from the last sequence number plus 1, until it is 0.
///
/// Errors: -EINVAL a wrong handle or pointer; the services' own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_read_trace(
    session: *mut uhmm_session,
    since: u64,
    records: *mut uhmm_trace_record,
    capacity: usize,
    record_count: *mut usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let record_count = unsafe { Out::new(record_count, "record_count") }?;
        // SAFETY: the caller's array of `capacity`.
        let records = unsafe { items_mut(records, capacity, "records") }?;
        let found = handles::get(session)?.sdk.read_trace(since)?;
        record_count.set(copy_items(found.iter().map(flatten), records));
        Ok(())
    })
}

/// Test hook: the `nth` allocation or copy (UHMM_FAIL_*) for this process from now on fails, 1 being the next one; 0 disarms.
///
/// Errors: -EPERM the manifest does not say `fault_injection = true`; -EINVAL the point; the services' own.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_inject(session: *mut uhmm_session, point: u32, nth: u32) -> c_int {
    guard(|| {
        let point = match point {
            UHMM_FAIL_HUGE_FRAMES => FaultPoint::HugeFrames,
            UHMM_FAIL_FRAMES => FaultPoint::Frames,
            UHMM_FAIL_COPY_OUT => FaultPoint::CopyOut,
            UHMM_FAIL_COPY_HOME => FaultPoint::CopyHome,
            UHMM_FAIL_SYSTEM_HUGE => FaultPoint::SystemHuge,
            UHMM_FAIL_SYSTEM_PAGES => FaultPoint::SystemPages,
            other => {
                let expected = "one of UHMM_FAIL_*";
                return Err(Failure::BadValue { name: "point", value: other.into(), expected });
            }
        };
        Ok(handles::get(session)?.sdk.inject(point, nth)?)
    })
}

fn flatten(record: &TraceRecord) -> uhmm_trace_record {
    let kind = match record.kind {
        TraceKind::MigrateStart => UHMM_TRACE_MIGRATE_START,
        TraceKind::MigrateEnd => UHMM_TRACE_MIGRATE_END,
        TraceKind::Invalidate => UHMM_TRACE_INVALIDATE,
        TraceKind::Throttle => UHMM_TRACE_THROTTLE,
    };
    let cause = match record.cause {
        TraceCause::Prefetch => UHMM_CAUSE_PREFETCH,
        TraceCause::CpuFault => UHMM_CAUSE_CPU_FAULT,
        TraceCause::DeviceFault => UHMM_CAUSE_DEVICE_FAULT,
        TraceCause::Eviction => UHMM_CAUSE_EVICTION,
        TraceCause::AddressSpace => UHMM_CAUSE_ADDRESS_SPACE,
    };
    uhmm_trace_record {
        sequence: record.sequence,
        time_ns: record.time_ns,
        addr: record.addr,
        page_count: record.page_count,
        from: place(Some(record.from)),
        to: place(Some(record.to)),
        kind,
        cause,
    }
}
