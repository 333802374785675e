//! Direct accesses to device memory that the CPU does not see: pieces of a range go through the copy engine's thread.
//!
//! ```text
//!   loop: post(piece), wake ---> copy thread: take -> per run: frames <-> kit's staging <-> client's buffer -> done
//!   loop: outcome()         <--- DevicePort::nudge --------------------------------------------------------------+
//! ```
//! One piece is in flight at most. While it is, nothing that was revoked counts as out of use: the loop holds acknowledgements back.
//! The lane outlives copy threads: a piece that a stopping thread has not taken is done by the next one.
//!
//! Lock order: the lane's lock is a leaf.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uhmm_ipc::message::driver::AccessOp;
use uhmm_kernel_hook::Window;

use crate::device::{CopyEngine, DeviceError, Frames, PAGE_BYTES, Staging};
use crate::port::DevicePort;

/// Most pages of one piece, and size of the kit's staging area.
pub(crate) const PIECE_PAGES: u64 = 64;

/// Consecutive frames, and where their bytes are in the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) frames: Frames,
    pub(crate) buffer_page: u64,
}

/// One more page behind what was gathered so far.
pub(crate) fn gather(runs: &mut Vec<Run>, frame: u32, buffer_page: u64) {
    if let Some(Run { frames, buffer_page: first }) = runs.last_mut()
        && frames.first.checked_add(frames.count) == Some(frame)
        && *first + u64::from(frames.count) == buffer_page
    {
        frames.count += 1;
        return;
    }
    runs.push(Run { frames: Frames { first: frame, count: 1 }, buffer_page });
}

/// Work for the copy thread: at most [`PIECE_PAGES`] pages, frames already checked.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) op: AccessOp,
    pub(crate) buffer: Arc<Window>,
    pub(crate) runs: Vec<Run>,
}

impl Piece {
    /// Frames are inside the device, and runs inside the staging area.
    pub(crate) fn in_bounds(&self, frame_count: u32) -> bool {
        self.runs.iter().all(|Run { frames, .. }| {
            u64::from(frames.count) <= PIECE_PAGES
                && frames.first.checked_add(frames.count).is_some_and(|end| end <= frame_count)
        })
    }

    pub(crate) fn page_count(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.frames.count)).sum()
    }

    /// Called on the copy thread.
    pub(crate) fn perform<E: CopyEngine>(&self, engine: &mut E, staging: &Staging) -> Result<(), DeviceError> {
        let bytes = &staging.window;
        for Run { frames, buffer_page } in &self.runs {
            let (at, len) = (buffer_page * PAGE_BYTES, u64::from(frames.count) * PAGE_BYTES);
            match self.op {
                AccessOp::Read | AccessOp::Peek => {
                    engine.copy_out(*frames, staging, 0)?;
                    bytes.copy_to(0, &self.buffer, at, len)?;
                }
                AccessOp::Write => {
                    self.buffer.copy_to(at, bytes, 0, len)?;
                    engine.copy_in(staging, 0, *frames)?;
                }
                // Nobody else reaches the frames: see `DriverLoop::additions_may_run`.
                AccessOp::FetchAdd(value) => {
                    engine.copy_out(*frames, staging, 0)?;
                    for word in (0..len).step_by(8) {
                        let before = bytes.load_u64(word)?;
                        self.buffer.store_u64(at + word, before)?;
                        bytes.store_u64(word, before.wrapping_add(value))?;
                    }
                    engine.copy_in(staging, 0, *frames)?;
                }
                AccessOp::MakeExclusive | AccessOp::Map | AccessOp::MapForWrite => {}
            }
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct State {
    piece: Option<Piece>,
    outcome: Option<Result<(), String>>,
    /// Why no thread will take a piece.
    closed: Option<String>,
}

/// Between the loop and the copy thread; clones are the same lane.
#[derive(Clone, Debug)]
pub(crate) struct EngineLane {
    state: Arc<Mutex<State>>,
    port: DevicePort,
}

impl EngineLane {
    pub(crate) fn new(port: DevicePort) -> Self {
        Self { state: Arc::default(), port }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Only whole assignments under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loop: one piece, after the outcome of the one before was taken.
    pub(crate) fn post(&self, piece: Piece) {
        let mut state = self.lock();
        match state.closed.clone() {
            None => state.piece = Some(piece),
            Some(why) => {
                state.outcome = Some(Err(why));
                drop(state);
                self.port.nudge();
            }
        }
    }

    /// Loop: how the piece ended, once.
    pub(crate) fn outcome(&self) -> Option<Result<(), String>> {
        self.lock().outcome.take()
    }

    /// Copy thread: it serves from now on.
    pub(crate) fn open(&self) {
        self.lock().closed = None;
    }

    /// Copy thread: the next piece.
    pub(crate) fn take(&self) -> Option<Piece> {
        self.lock().piece.take()
    }

    /// Copy thread: there is one.
    pub(crate) fn has_piece(&self) -> bool {
        self.lock().piece.is_some()
    }

    /// Copy thread: the piece that was taken has ended.
    pub(crate) fn done(&self, outcome: Result<(), DeviceError>) {
        self.lock().outcome = Some(outcome.map_err(|error| error.to_string()));
        self.port.nudge();
    }

    /// Copy thread: it ends by itself; nothing is served until the next session.
    pub(crate) fn close(&self, why: &str) {
        let mut state = self.lock();
        state.closed = Some(why.to_owned());
        if state.piece.take().is_some() {
            state.outcome = Some(Err(why.to_owned()));
            drop(state);
            self.port.nudge();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::StagingUse;

    /// Device memory as a window that only the engine reaches.
    struct Engine(Window);

    impl CopyEngine for Engine {
        fn attach(&mut self, _: &Staging) -> Result<(), DeviceError> {
            Ok(())
        }

        fn copy_in(&mut self, staging: &Staging, staging_page: u32, frames: Frames) -> Result<(), DeviceError> {
            let (from, to) = (u64::from(staging_page) * PAGE_BYTES, u64::from(frames.first) * PAGE_BYTES);
            Ok(staging.window.copy_to(from, &self.0, to, u64::from(frames.count) * PAGE_BYTES)?)
        }

        fn copy_out(&mut self, frames: Frames, staging: &Staging, staging_page: u32) -> Result<(), DeviceError> {
            let (from, to) = (u64::from(frames.first) * PAGE_BYTES, u64::from(staging_page) * PAGE_BYTES);
            Ok(self.0.copy_to(from, &staging.window, to, u64::from(frames.count) * PAGE_BYTES)?)
        }

        fn scrub(&mut self, frames: Frames) -> Result<(), DeviceError> {
            Ok(self.0.fill(u64::from(frames.first) * PAGE_BYTES, u64::from(frames.count) * PAGE_BYTES, 0)?)
        }
    }

    fn runs() -> Vec<Run> {
        let mut runs = Vec::new();
        for (frame, buffer_page) in [(5, 0), (6, 1), (9, 2), (10, 4)] {
            gather(&mut runs, frame, buffer_page);
        }
        runs
    }

    #[test]
    fn pages_that_follow_each_other_in_both_places_are_one_run() {
        let run = |first, count, buffer_page| Run { frames: Frames { first, count }, buffer_page };
        assert_eq!(runs(), [run(5, 2, 0), run(9, 1, 2), run(10, 1, 4)]);
        let last = Piece { op: AccessOp::Read, buffer: Arc::new(Window::anonymous(4096).unwrap()), runs: runs() };
        assert!(last.in_bounds(11) && !last.in_bounds(10));
        assert_eq!(last.page_count(), 4);
    }

    #[test]
    fn bytes_go_out_come_back_and_are_added_to_through_the_engine() -> Result<(), DeviceError> {
        let mut engine = Engine(Window::anonymous(16 * PAGE_BYTES)?);
        let staging = Staging::create(StagingUse::Access, PIECE_PAGES * PAGE_BYTES)?;
        let buffer = Arc::new(Window::anonymous(5 * PAGE_BYTES)?);
        buffer.store_u64(2 * PAGE_BYTES + 8, u64::MAX)?;
        buffer.store_u64(3 * PAGE_BYTES, 77)?;
        let piece = |op| Piece { op, buffer: buffer.clone(), runs: runs() };
        piece(AccessOp::Write).perform(&mut engine, &staging)?;
        assert_eq!(engine.0.load_u64(9 * PAGE_BYTES + 8)?, u64::MAX);
        piece(AccessOp::FetchAdd(3)).perform(&mut engine, &staging)?;
        assert_eq!((engine.0.load_u64(9 * PAGE_BYTES + 8)?, buffer.load_u64(2 * PAGE_BYTES + 8)?), (2, u64::MAX));
        assert_eq!(engine.0.load_u64(7 * PAGE_BYTES)?, 0, "a frame of nobody's run");
        piece(AccessOp::Read).perform(&mut engine, &staging)?;
        assert_eq!((buffer.load_u64(2 * PAGE_BYTES + 8)?, buffer.load_u64(0)?), (2, 3));
        assert_eq!(buffer.load_u64(3 * PAGE_BYTES)?, 77, "a page of no run stays as it is");
        Ok(())
    }

    #[test]
    fn a_piece_ends_once_even_when_no_thread_takes_it() -> Result<(), DeviceError> {
        let lane = EngineLane::new(DevicePort::new(|| {}));
        let piece = || -> Result<Piece, DeviceError> {
            let buffer = Arc::new(Window::anonymous(4096)?);
            Ok(Piece { op: AccessOp::Read, buffer, runs: vec![] })
        };
        lane.post(piece()?);
        assert!(lane.outcome().is_none() && lane.take().is_some() && lane.take().is_none());
        lane.done(Ok(()));
        assert_eq!((lane.outcome(), lane.outcome()), (Some(Ok(())), None));
        lane.post(piece()?);
        lane.close("The ring is broken");
        assert_eq!(lane.outcome(), Some(Err("The ring is broken".to_owned())));
        lane.post(piece()?);
        assert!(lane.outcome().is_some_and(|outcome| outcome.is_err()), "a closed lane takes nothing");
        lane.open();
        lane.post(piece()?);
        assert!(lane.outcome().is_none() && lane.take().is_some());
        Ok(())
    }
}
