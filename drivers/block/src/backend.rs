//! What a medium has to do: move blocks to and from a lane's buffers, several requests at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use uhmm_driver_kit::PAGE_BYTES;
use uhmm_kernel_hook::{HookError, Window};

use crate::machine::{Fault, PIECE_PAGES};
use crate::runs::Run;

/// A request, without its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRequest {
    /// Its name, never used again in this lane.
    pub id: u64,
    /// Buffer to medium; else medium to buffer.
    pub write: bool,
    /// Where on the medium.
    pub blocks: Run,
    /// Which buffer.
    pub slot: u32,
    /// How often it was tried before: where several have the blocks, another one is asked.
    pub tries: u32,
}

/// What a medium says about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// All of it is done. What was read is not believed, only what was written.
    Done,
    /// It was not done, or in part, and nothing of it happens any more.
    Failed(Fault),
    /// Nobody knows: the session of this number broke. A write may still land.
    Unknown(u64, Fault),
}

/// See the module head. Used by one thread at a time.
pub trait Backend: Send {
    /// Starts a request. Its answer comes out of [`Backend::wait`], also when it cannot even be started.
    fn submit(&mut self, request: BlockRequest);

    /// Waits until something is answered, the patience is over, or nothing is in flight, and says what was answered.
    fn wait(&mut self, patience: Duration, answers: &mut Vec<(u64, Answer)>);

    /// Sessions of which nothing lands any more, and whose requests were all answered. Each is said once.
    fn dead_sessions(&mut self) -> Vec<u64> {
        Vec::new()
    }

    /// What a request has read, which was answered last, is not what was put there, in these of its blocks.
    fn wrong(&mut self, _id: u64, _blocks: Run) {}

    /// The time, in microseconds from any moment on.
    fn now_us(&self) -> u64;
}

/// A lane's buffers: one of [`PIECE_PAGES`] for each request in flight.
#[derive(Clone, Debug)]
pub struct Buffers {
    /// All of them.
    pub window: Arc<Window>,
    pages: u32,
}

impl Buffers {
    /// `pages` each.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(depth: u32, pages: u32) -> Result<Self, HookError> {
        let pages = pages.clamp(1, PIECE_PAGES);
        let window = Arc::new(Window::anonymous(u64::from(depth) * u64::from(pages) * PAGE_BYTES)?);
        Ok(Self { window, pages })
    }

    /// The same in memory that is there: `pages` each.
    pub fn over(window: Arc<Window>, pages: u32) -> Self {
        Self { window, pages: pages.clamp(1, PIECE_PAGES) }
    }

    /// Where a page of a slot is.
    pub fn at(&self, slot: u32, page: u32) -> u64 {
        (u64::from(slot) * u64::from(self.pages) + u64::from(page)) * PAGE_BYTES
    }
}

/// A clock for backends.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Default for Clock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock {
    /// Microseconds since it was made.
    pub fn now_us(&self) -> u64 {
        self.0.elapsed().as_micros() as u64
    }
}
