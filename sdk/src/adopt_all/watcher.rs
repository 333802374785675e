//! The thread that looks for new mappings. userfaultfd does not tell of them, so it looks again and again.

use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uhmm_kernel_hook::signal;

use super::look::Looker;
use crate::Error;
use crate::session::Inner;

/// Time between two looks while the address space changes, and the longest while it does not.
const SHORTEST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_millis(500);
/// A look takes at most one part in so many of a processor's time, however large the address space is.
const COST_PART: u32 = 20;

/// Name of the thread.
const THREAD: &str = "uhmm-adopt";

/// Tells the thread to end.
#[derive(Debug, Default)]
pub(super) struct Stop {
    asked: Mutex<bool>,
    told: Condvar,
}

impl Stop {
    pub(super) fn asked(&self) -> bool {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits; true when the thread shall end.
    fn wait(&self, pause: Duration) -> bool {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.told.wait_timeout_while(asked, pause, |asked| !*asked);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn ask(&self) {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.told.notify_all();
    }
}

/// Ends the thread and waits for it when it is dropped.
#[derive(Debug)]
pub(super) struct Watcher {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
    /// A forked child has this value, but not the thread.
    process: u32,
}

impl Watcher {
    /// Starts the thread, all of whose signals are blocked: handlers are the program's, and run on its own threads only.
    pub(super) fn start(session: Weak<Inner>, looker: Arc<Looker>) -> Result<Self, Error> {
        let stop = Arc::<Stop>::default();
        let asked = Arc::clone(&stop);
        let builder = std::thread::Builder::new().name(THREAD.into());
        let thread = signal::with_all_blocked(|| builder.spawn(move || watch(&session, &looker, &asked)))
            .map_err(Error::kernel("Blocking the signals of a thread of uhmm's"))?
            .map_err(Error::Thread)?;
        Ok(Self { stop, thread: Some(thread), process: std::process::id() })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            return;
        }
        self.stop.ask();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("The thread that looks for new memory panicked");
        }
    }
}

fn watch(session: &Weak<Inner>, looker: &Looker, stop: &Stop) {
    let mut pause = SHORTEST;
    while !stop.wait(pause) {
        let Some(session) = session.upgrade() else { return };
        let begun = Instant::now();
        let changed = match looker.look(&session, &|| stop.asked()) {
            Ok(look) => look.changed(),
            Err(Error::AgentGone) => return,
            Err(error) => {
                tracing::warn!(%error, "Looking for new memory failed, and is tried again");
                false
            }
        };
        let paced = if changed { SHORTEST } else { LONGEST.min(pause * 3 / 2) };
        pause = paced.max(begun.elapsed() * COST_PART);
    }
}
