//! Servers that are behind are filled in the background: what they lack is read from the other one, checked, and written as it is.
//!
//! A block is held meanwhile, as by a read, so it is still the same generation when the mark goes: the same bytes, however late they land.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use uhmm_driver_kit::seal::Page;
use uhmm_driver_kit::{DeviceError, Frames, PAGE_BYTES};
use uhmm_kernel_hook::Window;

use super::client::Client;
use super::medium::Exports;
use super::wire::Kind;
use crate::backend::Answer;
use crate::header::HEADER_BYTES;
use crate::lane::Shared;
use crate::machine::Fault;
use crate::runs::Run;

/// Between two looks at the marks.
const PAUSE: Duration = Duration::from_millis(500);
/// Frames that are looked at under the lock at once.
const LOOK_FRAMES: u32 = 4096;

/// See the module head.
#[derive(Debug)]
pub struct Filler {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    behind: Arc<AtomicU64>,
}

struct Work {
    clients: Arc<Vec<Client>>,
    shared: Arc<Shared>,
    buffer: Arc<Window>,
    page: Box<Page>,
    pages: u32,
    fua: bool,
}

impl Filler {
    /// Begins, where there are several servers.
    ///
    /// # Errors
    /// Out of memory or threads.
    pub fn start(exports: &Exports) -> Result<Option<Self>, DeviceError> {
        if exports.clients.len() < 2 {
            return Ok(None);
        }
        let mut work = Work {
            clients: exports.clients.clone(),
            shared: exports.shared.clone(),
            buffer: Arc::new(Window::anonymous(u64::from(exports.pages) * PAGE_BYTES)?),
            page: Box::new([0; PAGE_BYTES as usize]),
            pages: exports.pages,
            fua: exports.fua,
        };
        let (stop, stopped) = mpsc::channel::<()>();
        let behind = Arc::new(AtomicU64::new(0));
        let told = behind.clone();
        let thread = std::thread::Builder::new().name("nbd-fill".to_owned()).spawn(move || {
            while stopped.recv_timeout(PAUSE) == Err(RecvTimeoutError::Timeout) {
                let over = || stopped.try_recv() == Err(mpsc::TryRecvError::Disconnected);
                let left = (0..work.clients.len() as u32).map(|replica| work.fill(replica, &over)).sum();
                told.store(left, Ordering::Relaxed);
            }
        })?;
        Ok(Some(Self { stop: Some(stop), thread: Some(thread), behind }))
    }

    /// Pages that one server alone has, at the last look.
    pub fn behind_pages(&self) -> u64 {
        self.behind.load(Ordering::Relaxed)
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("The thread that fills servers has panicked");
        }
    }
}

impl Work {
    /// Returns how many pages it still lacks.
    fn fill(&mut self, replica: u32, over: &dyn Fn() -> bool) -> u64 {
        let (mut filled, mut lacking) = (0u64, 0u64);
        let frames = self.shared.table().frames();
        for first in (0..frames).step_by(LOOK_FRAMES as usize) {
            if over() {
                break;
            }
            let look = Frames { first, count: LOOK_FRAMES.min(frames - first) };
            for part in self.missing(look, replica) {
                lacking += u64::from(part.1.count);
                // One that is away is only reckoned up.
                if over() || !self.clients[replica as usize].is_up() {
                    continue;
                }
                match self.copy(part, replica) {
                    Ok(pages) => filled += u64::from(pages),
                    Err(error) => {
                        tracing::debug!(%error, replica, "Pages were not copied to the server that lacks them")
                    }
                }
            }
        }
        if filled > 0 {
            tracing::info!(url = %self.clients[replica as usize].url(), pages = filled, "Server filled");
        }
        lacking - filled
    }

    /// Parts of these frames that lie in a row of blocks which the replica lacks and the other one has.
    fn missing(&self, frames: Frames, replica: u32) -> Vec<(u32, Run)> {
        let store = self.shared.store();
        let table = store.table();
        let mut parts: Vec<(u32, Run)> = Vec::new();
        for frame in frames.first..frames.first + frames.count {
            let Ok(Some(block)) = table.block_of(frame) else { continue };
            let lacks = table.missing(block).is_ok_and(|missing| missing & 0b11 == 1 << replica);
            if !lacks {
                continue;
            }
            match parts.last_mut() {
                Some((first, run)) if *first + run.count == frame && run.end() == block && run.count < self.pages => {
                    run.count += 1;
                }
                _ => parts.push((frame, Run { first: block, count: 1 })),
            }
        }
        parts
    }

    fn copy(&mut self, (frame, run): (u32, Run), replica: u32) -> Result<u32, Fault> {
        let pin = {
            let mut store = self.shared.store();
            // Written anew since they were looked at: then the mark is another one's.
            let same = (0..run.count).all(|at| {
                let table = store.table();
                matches!(table.block_of(frame + at), Ok(Some(block)) if block == run.first + at)
            });
            if !same {
                return Ok(0);
            }
            store.pin(run)
        };
        let copied = self.copy_pinned(frame, run, replica);
        self.shared.store().unpin(pin);
        copied
    }

    fn copy_pinned(&mut self, frame: u32, run: Run, replica: u32) -> Result<u32, Fault> {
        let (from, to) = (&self.clients[1 - replica as usize], &self.clients[replica as usize]);
        let epoch = to.epoch().now();
        let (offset, len) = (HEADER_BYTES + u64::from(run.first) * PAGE_BYTES, run.count * PAGE_BYTES as u32);
        from.transfer(Kind::Read, offset, &self.buffer, len, true)?;
        for at in 0..run.count {
            self.buffer.read(u64::from(at) * PAGE_BYTES, &mut self.page[..])?;
            // What is broken here is not spread.
            self.shared.unseal(run.first + at, frame + at, &mut self.page)?;
        }
        match to.ask(Kind::Write { fua: self.fua }, offset, &self.buffer, len, true) {
            Answer::Done => {}
            Answer::Failed(fault) => return Err(fault),
            Answer::Unknown(session, fault) => {
                self.shared.store().haunt(session, run);
                return Err(fault);
            }
        }
        // A server that was exchanged meanwhile has not got them.
        let cleared = to.epoch().during(epoch, || {
            for block in run.first..run.end() {
                self.shared.table().set_missing(block, replica, false)?;
            }
            Ok(run.count)
        });
        cleared.unwrap_or(Ok(0))
    }
}
