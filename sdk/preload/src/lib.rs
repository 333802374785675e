//! What `uhmm run` preloads into a program that knows nothing of uhmm: all its private memory is under management before `main` begins, and what
//! appears later follows ([`uhmm_sdk::Session::adopt_all`]). Where pages are is decided elsewhere, by `uhmm run` (`services/uhmm/src/commands/run`).
//!
//! ```text
//!   uhmm run --fork, exec with LD_PRELOAD--> ld.so --> begin(): session, agent, adopt_all --> main
//!                                                       failed: one line, exit 125 (or, when so asked, the program runs without)
//! ```
//! It stays out of the program's way: no symbol of the program's is interposed, what it allocates lies in a heap of its own that is never
//! managed, its threads have all signals blocked and descriptors of their own, there is no exit handler, and `errno` is what it was.
//! A forked child keeps what its parent had adopted; a program that is executed begins anew, since the environment goes with it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::OnceLock;

use uhmm_kernel_hook::heap::PrivateHeap;
use uhmm_kernel_hook::process;
use uhmm_sdk::{Noted, Session};

#[global_allocator]
static HEAP: PrivateHeap = PrivateHeap::new();

/// What lives as long as the program. Statics are not dropped: nothing runs when it exits.
static KEPT: OnceLock<(Session, Option<Noted>)> = OnceLock::new();

/// Run directory of the system whose memory it is. Without it this library does nothing: the program was not started by `uhmm run`.
const RUN_DIR: &str = "UHMM_RUN_SYSTEM";
/// The program runs without uhmm where it cannot run with it.
const OR_WITHOUT: &str = "UHMM_RUN_OR_WITHOUT";
/// What `uhmm run` exits with too, when it is not the program that failed.
const FAILED: i32 = 125;

/// ld.so calls it when the libraries that this one needs are ready, before the program's own code.
#[allow(unsafe_code, reason = "the only way to run before a program's main")]
#[used]
// SAFETY: the section holds pointers to functions that are called once; this is one.
#[unsafe(link_section = ".init_array")]
static BEGIN: extern "C" fn() = begin;

extern "C" fn begin() {
    let Some(run_dir) = std::env::var_os(RUN_DIR).map(PathBuf::from) else { return };
    let begun = process::with_errno_kept(|| std::panic::catch_unwind(|| start(run_dir)));
    let error = match begun {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error,
        Err(_) => "uhmm's own code failed: please report it".to_owned(),
    };
    let program = std::env::args_os().next().unwrap_or_else(|| OsString::from("?"));
    let (program, pid) = (program.display(), std::process::id());
    if std::env::var_os(OR_WITHOUT).is_some() {
        eprintln!("uhmm run: {program} (pid {pid}) runs without uhmm: {error}");
        return;
    }
    eprintln!("uhmm run: {program} (pid {pid}) cannot run with uhmm: {error} (with --or-without it runs all the same)");
    process::exit_now(FAILED);
}

fn start(run_dir: PathBuf) -> Result<(), String> {
    // Whatever goes wrong later is told where the program tells its own troubles, and only that.
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing_level()).with_ansi(false);
    drop(log.try_init());
    HEAP.hold_over_forks().map_err(|error| error.to_string())?;
    let heap = HEAP.range().map(|range| uhmm_sdk::never_manage(range, "the heap of uhmm's library"));
    let session = Session::connect(Some(&run_dir)).map_err(|error| error.to_string())?;
    session.adopt_all().map_err(|error| error.to_string())?;
    drop(KEPT.set((session, heap)));
    Ok(())
}

/// `UHMM_RUN_LOG=debug` and the like, for who looks for a fault in uhmm.
fn tracing_level() -> tracing_subscriber::filter::LevelFilter {
    let said = std::env::var("UHMM_RUN_LOG").ok();
    said.and_then(|level| level.parse().ok()).unwrap_or(tracing_subscriber::filter::LevelFilter::ERROR)
}
