//! The callback thread: what is the program's runs here and not on the link thread, whose descriptors are its own. A callback that writes to
//! the program's files, and a log subscriber that does, would write to something else there.
//!
//! ```text
//!   link thread: answer -> callback ---+
//!   link thread: tracing -> Forward ---+--> channel --> "uhmm-callbacks": runs it, or tells the program's subscriber
//! ```
//! One a process, started with the first callback, or with the first session when the program listens to logs. All signals are blocked
//! there. Nobody waits for it: it may do what a program's thread does, but one callback holds up the others.

use std::fmt::Write;
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, PoisonError};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span;
use tracing::{Event, Level, Metadata, Subscriber};
use uhmm_kernel_hook::signal;

use crate::Error;

type Work = Box<dyn FnOnce() + Send>;

/// The running thread, with its process: a forked child has none.
static RUNNING: Mutex<Option<(u32, Sender<Work>)>> = Mutex::new(None);

fn sender() -> Result<Sender<Work>, Error> {
    let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    let own = std::process::id();
    if let Some((_, sender)) = running.as_ref().filter(|(pid, _)| *pid == own) {
        return Ok(sender.clone());
    }
    let (sender, work) = mpsc::channel::<Work>();
    let body = move || work.into_iter().for_each(|work| work());
    let spawned = signal::with_all_blocked(|| std::thread::Builder::new().name("uhmm-callbacks".into()).spawn(body));
    drop(spawned.map_err(Error::kernel("Blocking signals"))?.map_err(Error::Thread)?);
    if let Some(inherited) = running.replace((own, sender.clone())) {
        // The parent's: its channel's other end is in the parent's thread.
        std::mem::forget(inherited);
    }
    Ok(sender)
}

/// Called by the program's threads before there is something to run: the thread gets the program's descriptors.
pub(crate) fn ensure_started() -> Result<(), Error> {
    sender().map(drop)
}

/// The same, if somebody listens to logs.
pub(crate) fn ensure_started_for_logs() -> Result<(), Error> {
    if tracing::dispatcher::has_been_set() { ensure_started() } else { Ok(()) }
}

/// Runs something on the callback thread, after what was given before.
pub(crate) fn run(work: impl FnOnce() + Send + 'static) {
    let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|(_, sender)| sender.clone());
    if let Some(sender) = running {
        // A thread that a callback has panicked on runs nothing any more.
        drop(sender.send(Box::new(work)));
    }
}

/// From now on the calling thread's log records go to the callback thread.
pub(crate) fn forward_logs() -> tracing::subscriber::DefaultGuard {
    tracing::subscriber::set_default(Forward)
}

struct Forward;

impl Subscriber for Forward {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        tracing::dispatcher::has_been_set() && *metadata.level() <= LevelFilter::current()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        // The program's own subscriber decides.
        Some(LevelFilter::OFF)
    }

    fn new_span(&self, _span: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _span: &span::Id, _values: &span::Record<'_>) {}

    fn record_follows_from(&self, _span: &span::Id, _follows: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        let (level, Text(text)) = (*event.metadata().level(), text);
        run(move || match level {
            Level::ERROR => tracing::error!(target: "uhmm_sdk", "{text}"),
            Level::WARN => tracing::warn!(target: "uhmm_sdk", "{text}"),
            Level::INFO => tracing::info!(target: "uhmm_sdk", "{text}"),
            Level::DEBUG => tracing::debug!(target: "uhmm_sdk", "{text}"),
            Level::TRACE => tracing::trace!(target: "uhmm_sdk", "{text}"),
        });
    }

    fn enter(&self, _span: &span::Id) {}

    fn exit(&self, _span: &span::Id) {}
}

/// A record as text: the message, then the fields.
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let written = match field.name() {
            "message" => {
                let rest = std::mem::take(&mut self.0);
                write!(self.0, "{value:?}{rest}")
            }
            name => write!(self.0, " {name}={value:?}"),
        };
        // A String takes everything.
        let _ = written;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_runs_in_order_on_a_thread_of_its_own() {
        ensure_started().unwrap();
        let (sender, results) = mpsc::channel();
        for number in 0..10 {
            let sender = sender.clone();
            run(move || sender.send((number, std::thread::current().name().map(str::to_owned))).unwrap());
        }
        drop(sender);
        let results: Vec<_> = results.iter().collect();
        assert!(results.iter().map(|(number, _)| *number).eq(0..10));
        assert!(results.iter().all(|(_, name)| name.as_deref() == Some("uhmm-callbacks")));
    }
}
