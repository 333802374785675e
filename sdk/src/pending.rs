//! Completion handles: what an app thread holds while the link thread talks to a service.
//!
//! ```text
//!   app thread                       link thread
//!   Pending<T>  ----- shared slot ----- Completer<T>
//!   wait()  <---- condvar ----            complete(result)
//!   on_complete(f)                        dropped: AgentGone    -> callback thread: f(result)
//! ```
//!
//! The completer's drop answers too, and a link thread that was killed (a seccomp filter of the program's may do that) is noticed by who waits,
//! so an app thread can never wait for a thread that has ended.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uhmm_ipc::message::TraceId;
use uhmm_kernel_hook::secluded::LifeWatch;

use crate::{Error, callbacks};

type Callback<T> = Box<dyn FnOnce(Result<T, Error>) + Send>;

enum Slot<T> {
    Waiting,
    Calls(Callback<T>),
    Ready(Result<T, Error>),
    Taken,
}

struct Shared<T> {
    slot: Mutex<Slot<T>>,
    ready: Condvar,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Slot<T>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One answer that is on its way.
///
/// It survives the restart of the service that was asked: idempotent calls are sent again by the link, the others end
/// with [`ErrorCode::Stale`](crate::ErrorCode::Stale). Dropping the handle does not cancel the call.
#[must_use = "the result of the call is lost; use wait(), try_get() or on_complete()"]
pub struct Pending<T> {
    shared: Arc<Shared<T>>,
    trace: TraceId,
    life: Option<LifeWatch>,
}

/// The link thread's half of a [`Pending`].
pub(crate) struct Completer<T> {
    shared: Option<Arc<Shared<T>>>,
}

/// Both halves of one answer. `life`: of the thread that will give it.
pub(crate) fn pair<T>(trace: TraceId, life: Option<LifeWatch>) -> (Completer<T>, Pending<T>) {
    let shared = Arc::new(Shared { slot: Mutex::new(Slot::Waiting), ready: Condvar::new() });
    (Completer { shared: Some(Arc::clone(&shared)) }, Pending { shared, trace, life })
}

/// How often who waits looks whether the other thread lives.
const LIFE_CHECK: Duration = Duration::from_millis(500);

impl<T> Pending<T> {
    /// The identity of this call in the logs of every process that it passes through.
    pub fn trace(&self) -> TraceId {
        self.trace
    }

    /// Blocks until the answer is here. Without a deadline of the call's own this takes as long as the service needs
    /// to come back.
    pub fn wait(self) -> Result<T, Error> {
        let mut slot = self.shared.lock();
        while matches!(*slot, Slot::Waiting) {
            slot = self.shared.ready.wait_timeout(slot, LIFE_CHECK).unwrap_or_else(PoisonError::into_inner).0;
            if matches!(*slot, Slot::Waiting) && self.is_orphaned() {
                return Err(Error::AgentGone);
            }
        }
        take(&mut slot).unwrap_or(Err(Error::AlreadyTaken))
    }

    /// The thread that would answer was killed.
    fn is_orphaned(&self) -> bool {
        self.life.as_ref().is_some_and(LifeWatch::is_orphaned)
    }

    /// Tells whether the thread that would answer was killed: nobody answers then.
    #[doc(hidden)]
    pub fn lifeline(&self) -> impl Fn() -> bool + Send + Sync + use<T> {
        let life = self.life.clone();
        move || life.as_ref().is_some_and(LifeWatch::is_orphaned)
    }

    /// The same, watching the thread that will answer.
    pub(crate) fn watched(self, life: LifeWatch) -> Self {
        Self { life: Some(life), ..self }
    }

    /// Blocks for at most `timeout`; `None` when the answer is not here by then (the call goes on).
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Result<T, Error>> {
        let end = Instant::now() + timeout;
        let mut slot = self.shared.lock();
        while matches!(*slot, Slot::Waiting) {
            let left = end.checked_duration_since(Instant::now())?;
            if self.is_orphaned() {
                return Some(Err(Error::AgentGone));
            }
            let left = left.min(LIFE_CHECK);
            slot = self.shared.ready.wait_timeout(slot, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        take(&mut slot)
    }

    /// The answer if it is here; `None` before that and after it was taken.
    pub fn try_get(&self) -> Option<Result<T, Error>> {
        take(&mut self.shared.lock())
    }

    /// Whether the answer is here.
    pub fn is_ready(&self) -> bool {
        matches!(*self.shared.lock(), Slot::Ready(_))
    }

    /// Calls `callback` with the answer: at once when it is here, else on a thread of the SDK that has the program's descriptors and no
    /// signals. There it holds up other callbacks, and nothing else: it may touch managed memory, and wait for other calls.
    pub fn on_complete(self, callback: impl FnOnce(Result<T, Error>) + Send + 'static)
    where
        T: Send + 'static,
    {
        let callback = move |result| callbacks::run(move || callback(result));
        match callbacks::ensure_started() {
            Ok(()) => self.on_answer(callback),
            Err(error) => callback(Err(error)),
        }
    }

    /// The same on the link thread, for what has nothing to do with the program's descriptors and is over at once (a flag, a condvar).
    #[doc(hidden)]
    pub fn on_answer(self, callback: impl FnOnce(Result<T, Error>) + Send + 'static) {
        let mut slot = self.shared.lock();
        if let Some(result) = take(&mut slot) {
            drop(slot);
            callback(result);
        } else if matches!(*slot, Slot::Waiting) {
            *slot = Slot::Calls(Box::new(callback));
        }
    }
}

/// Moves the answer out of the slot, if there is one.
fn take<T>(slot: &mut Slot<T>) -> Option<Result<T, Error>> {
    if !matches!(slot, Slot::Ready(_)) {
        return None;
    }
    match std::mem::replace(slot, Slot::Taken) {
        Slot::Ready(result) => Some(result),
        _ => None,
    }
}

impl<T> Completer<T> {
    /// Delivers the answer and wakes whoever waits.
    pub(crate) fn complete(mut self, result: Result<T, Error>) {
        self.deliver(result);
    }

    fn deliver(&mut self, result: Result<T, Error>) {
        let Some(shared) = self.shared.take() else { return };
        let mut slot = shared.lock();
        match std::mem::replace(&mut *slot, Slot::Taken) {
            Slot::Calls(callback) => {
                drop(slot);
                callback(result);
            }
            _ => {
                *slot = Slot::Ready(result);
                drop(slot);
                shared.ready.notify_all();
            }
        }
    }
}

impl<T> Drop for Completer<T> {
    fn drop(&mut self) {
        self.deliver(Err(Error::AgentGone));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn an_answer_is_taken_once() {
        let (completer, pending) = pair::<u32>(TraceId(7), None);
        assert_eq!(pending.trace(), TraceId(7));
        assert!(pending.try_get().is_none());
        assert!(!pending.is_ready());
        completer.complete(Ok(5));
        assert!(pending.is_ready());
        assert_eq!(pending.try_get().unwrap().unwrap(), 5);
        assert!(pending.try_get().is_none());
        assert!(matches!(pending.wait(), Err(Error::AlreadyTaken)));
    }

    #[test]
    fn waiting_ends_when_the_agent_is_gone() {
        let (completer, pending) = pair::<u32>(TraceId(1), None);
        drop(completer);
        assert!(matches!(pending.wait(), Err(Error::AgentGone)));
    }

    #[test]
    fn a_waiting_thread_is_woken_by_the_answer() {
        let (completer, pending) = pair::<u32>(TraceId(1), None);
        let (started, has_started) = mpsc::channel();
        let waiter = std::thread::spawn(move || {
            started.send(()).unwrap();
            pending.wait()
        });
        has_started.recv().unwrap();
        completer.complete(Ok(9));
        assert_eq!(waiter.join().unwrap().unwrap(), 9);
    }

    #[test]
    fn a_timeout_leaves_the_call_alive() {
        let (completer, pending) = pair::<u32>(TraceId(1), None);
        assert!(pending.wait_timeout(Duration::from_millis(1)).is_none());
        completer.complete(Ok(3));
        assert_eq!(pending.wait_timeout(Duration::from_millis(1)).unwrap().unwrap(), 3);
    }

    #[test]
    fn callbacks_run_whether_they_come_before_or_after_the_answer() {
        let (sender, results) = mpsc::channel();
        let (completer, pending) = pair::<u32>(TraceId(1), None);
        let early = sender.clone();
        pending.on_complete(move |result| early.send(result.unwrap()).unwrap());
        completer.complete(Ok(1));
        let (completer, pending) = pair::<u32>(TraceId(2), None);
        completer.complete(Ok(2));
        pending.on_complete(move |result| sender.send(result.unwrap()).unwrap());
        assert_eq!(results.iter().collect::<Vec<_>>(), [1, 2]);
    }
}
