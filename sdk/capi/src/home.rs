//! Bringing everything home: of this process, for those who read it in ways that cannot wait; of a device, before it is taken away.

use std::ffi::c_int;
use std::time::Duration;

use crate::buffers::Out;
use crate::device::uhmm_device;
use crate::error::guard;
use crate::handles;
use crate::session::uhmm_session;

/// Brings every page of this process home and keeps it there (`stay`), or lets pages leave again. For whatever reads this process in ways that
/// cannot wait for a page: ptrace, /proc/PID/mem, gcore, a core dump. Meanwhile migrations to devices leave all pages where they are
/// (UHMM_PAGE_PINNED), and jobs that need a page wait. `uhmm home PID` does the same from outside. `moved_pages` gets how many came; it may be
/// NULL.
///
/// Errors: -EIO pages could not be copied home, the rest is there; the services' own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_stay_home(session: *mut uhmm_session, stay: bool, moved_pages: *mut u64) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable, or null.
        let moved_pages = unsafe { Out::optional(moved_pages, "moved_pages") }?;
        let moved = handles::get(session)?.sdk.stay_home(stay)?;
        if let Some(place) = moved_pages {
            place.set(moved);
        }
        Ok(())
    })
}

/// Before a signal ends this process whose default action is a core dump (SIGSEGV, SIGBUS, SIGABRT and so on), every page comes home, so that the
/// core file has it; that takes `patience_ms` at most. Signals that the program handles, ignores or handles later are left alone, and so are
/// forked children. The handlers run on the alternate signal stack of the thread, if it has one. Costs nothing before a signal comes.
///
/// Errors: -EIO sigaction(2) was refused; the services' own.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_home_on_fatal_signals(session: *mut uhmm_session, patience_ms: u32) -> c_int {
    guard(|| Ok(handles::get(session)?.sdk.home_on_fatal_signals(Duration::from_millis(patience_ms.into()))?))
}

/// Brings every page of every process home from a device, as a driver does before its device is taken away. Devices may fetch pages again:
/// advice and uhmm_stay_home() keep them. `moved_pages` gets how many came; it may be NULL.
///
/// Errors: -ENOTCONN no system runs any more; -EPERM the run directory cannot be entered; the services' own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_empty_device(
    session: *mut uhmm_session,
    device: *mut uhmm_device,
    moved_pages: *mut u64,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable, or null.
        let moved_pages = unsafe { Out::optional(moved_pages, "moved_pages") }?;
        let (session, device) = (handles::get(session)?, handles::get(device)?);
        let moved = uhmm_sdk::Operator::connect(Some(&session.run_dir))?.empty_device(device.id())?;
        if let Some(place) = moved_pages {
            place.set(moved);
        }
        Ok(())
    })
}
