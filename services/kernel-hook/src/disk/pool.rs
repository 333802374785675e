//! Transfers by threads that call pread and pwrite.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Finished, Transfer, check, full};
use crate::error::HookError;
use crate::memfd;

/// More threads than this bring nothing that a disk could use.
const THREADS_MAX: u32 = 16;

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Transfer>,
    done: Vec<Finished>,
    under_way: usize,
    stop: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
    ended: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics under it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module head.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    depth: usize,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    pub(super) fn start(file: Arc<OwnedFd>, depth: u32) -> Result<Self, HookError> {
        let mut pool = Self { shared: Arc::default(), depth: depth.max(1) as usize, threads: Vec::new() };
        for _ in 0..depth.clamp(1, THREADS_MAX) {
            let (shared, file) = (pool.shared.clone(), file.clone());
            let thread = std::thread::Builder::new().name("disk".to_owned()).spawn(move || work(&shared, &file));
            pool.threads.push(thread.map_err(|error| HookError::failed("starting a thread", error))?);
        }
        Ok(pool)
    }

    pub(super) fn submit(&mut self, transfer: Transfer) -> Result<(), HookError> {
        check(&transfer)?;
        let mut state = self.shared.lock();
        if state.under_way >= self.depth {
            return Err(full());
        }
        state.under_way += 1;
        state.waiting.push_back(transfer);
        self.shared.work.notify_one();
        Ok(())
    }

    pub(super) fn wait(&mut self, patience: Duration, done: &mut Vec<Finished>) {
        let end = Instant::now() + patience;
        let mut state = self.shared.lock();
        loop {
            state.under_way -= state.done.len();
            let left = end.saturating_duration_since(Instant::now());
            if !state.done.is_empty() || state.under_way == 0 || left.is_zero() {
                return done.append(&mut state.done);
            }
            state = self.shared.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn work(shared: &Shared, file: &OwnedFd) {
    let mut state = shared.lock();
    loop {
        if let Some(transfer) = state.waiting.pop_front() {
            drop(state);
            let finished = Finished { token: transfer.token, outcome: perform(file, &transfer) };
            drop(transfer);
            state = shared.lock();
            state.done.push(finished);
            shared.ended.notify_one();
        } else if state.stop {
            return;
        } else {
            state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn perform(file: &OwnedFd, transfer: &Transfer) -> Result<(), io::Error> {
    let Transfer { offset, window, at, len, .. } = transfer;
    let moved = if transfer.write {
        memfd::write_from_window(file.as_fd(), *offset, window, *at, u64::from(*len))
    } else {
        memfd::read_to_window(file.as_fd(), *offset, window, *at, u64::from(*len))
    };
    moved.map_err(|error| match error {
        HookError::Call { source, .. } => source,
        HookError::OutOfWindow { .. } => io::ErrorKind::UnexpectedEof.into(),
        other => io::Error::other(other.to_string()),
    })
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}
