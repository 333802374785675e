//! The end of a session: the pager gives the memory back, then agent and thread end.
//!
//! ```text
//!   last handle dropped --Close--> CloseSpace --Done, or nobody knows the space--> agent, thread end --> the drop goes on
//!                            |         `--Busy, Io: memory stays managed--> the thread stays, for good
//!                            `-- the pager is away: the drop does not wait, the thread goes on until it is back
//! ```
//! As long as the thread is there the agent is, and the descriptors: no page is lost because somebody did not wait.

use std::sync::PoisonError;
use std::thread::JoinHandle;
use std::time::Duration;

use uhmm_ipc::CallId;
use uhmm_ipc::message::{Call, ErrorCode, Reply, TraceId, WireError, pager};

use super::{Command, Links, Loop};
use crate::adopted::AdoptedRanges;
use crate::memory::let_children_have;
use crate::pending::{Completer, pair};

/// A drop ends, whatever the pager does.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a session leaves behind.
#[derive(Default)]
pub(crate) struct Left {
    /// Private memory that it has adopted.
    pub(crate) adopted: AdoptedRanges,
    /// Children had to do without that.
    pub(crate) kept_out: bool,
}

/// What the thread is told when the session is dropped.
pub(crate) struct Goodbye {
    /// Whoever waits for the thread's end need not wait any more.
    goes_on: Completer<()>,
    left: Left,
}

/// How this process stands with the pager.
#[derive(Default)]
pub(super) struct Standing {
    pub(super) pager_is_up: bool,
    /// Nobody is left who could serve us.
    pub(super) abandoned: bool,
    /// It has known our space.
    pub(super) was_known: bool,
    /// It does not know our space, or not any more.
    pub(super) refused: bool,
}

/// The session says goodbye.
pub(super) struct Closing {
    call: Option<CallId>,
    goes_on: Option<Completer<()>>,
    left: Left,
    over: bool,
}

impl Links {
    /// Ends the session, and waits for that where it makes sense.
    pub(crate) fn close(&self, left: Left) {
        let (goes_on, stays) = pair(TraceId::default(), Some(self.life.clone()));
        self.send(Command::Close(Goodbye { goes_on, left }));
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // The last handle may be dropped by something that runs on the link thread itself, which cannot wait for its own end.
        let waits = |thread: &JoinHandle<()>| thread.thread().id() != std::thread::current().id();
        let Some(thread) = thread.filter(waits) else { return };
        match stays.wait_timeout(PATIENCE) {
            Some(Ok(())) => {}
            None => tracing::warn!("The session's end takes long: it goes on while the program does"),
            // It has let go of that: it ends. One that was killed does not.
            Some(Err(_)) if self.life.is_orphaned() => {}
            Some(Err(_)) => {
                if thread.join().is_err() {
                    tracing::error!("The link thread panicked");
                }
            }
        }
    }
}

impl Loop {
    pub(super) fn say_goodbye(&mut self, goodbye: Goodbye) {
        let Goodbye { goes_on, left } = goodbye;
        // Who was refused at once has nothing at the pager.
        let over = self.standing.refused && !self.standing.was_known;
        let close = || Call::Pager(pager::Call::CloseSpace);
        let call = (!over).then(|| self.reactor.call(self.pager, close(), TraceId::default(), None));
        self.goodbye = Some(Closing { call, goes_on: Some(goes_on), left, over });
        if !over && !self.standing.pager_is_up {
            self.let_program_go_on();
        }
    }

    pub(super) fn is_goodbye(&self, call: CallId) -> bool {
        self.goodbye.as_ref().is_some_and(|goodbye| goodbye.call == Some(call))
    }

    pub(super) fn is_over(&self) -> bool {
        self.goodbye.as_ref().is_some_and(|goodbye| goodbye.over)
    }

    pub(super) fn goodbye_answered(&mut self, result: Result<Reply, WireError>) {
        // An earlier one had got through, or another system runs there that has never heard of us. Where something may be on a device it is not
        // for us to say that zeroes are as good.
        let inherits = self.child.is_some();
        let refused = self.standing.refused;
        let Some(goodbye) = &mut self.goodbye else { return };
        match result {
            Ok(_) => goodbye.over = true,
            Err(_) if refused && goodbye.left.adopted.is_empty() && !inherits => goodbye.over = true,
            Err(error) if error.code == ErrorCode::Busy => {
                tracing::info!(%error, "The session has ended, and its memory stays managed as long as this process lives");
            }
            Err(error) => {
                tracing::warn!(%error, "The session has ended, and its memory stays managed as long as this process lives");
            }
        }
        if !goodbye.over {
            self.let_program_go_on();
        }
    }

    fn let_program_go_on(&mut self) {
        if let Some(goes_on) = self.goodbye.as_mut().and_then(|goodbye| goodbye.goes_on.take()) {
            goes_on.complete(Ok(()));
        }
    }

    /// The thread ends, and nobody may be left to read of what is unmapped: the kernel would hold us until somebody had.
    pub(super) fn end(mut self) {
        if let Some(uffd) = &self.uffd
            && let Err(error) = uffd.unregister(self.sentinel.range())
        {
            tracing::debug!(%error, "The sentinel page stays registered");
        }
        // Whoever waits for an answer hears that there will be none.
        self.waiting.clear();
        self.agent.close(self.uffd.as_ref());
        let left = self.goodbye.as_ref().map(|goodbye| &goodbye.left).filter(|left| left.kept_out);
        for range in left.map(|left| left.adopted.all()).unwrap_or_default() {
            if let Err(error) = let_children_have(range) {
                tracing::warn!(%error, %range, "Children of this process do not get this range");
            }
        }
    }
}
