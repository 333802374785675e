//! How a unit reaches the bytes of a frame.
//!
//! ```text
//!   window:  access ------------------------------------------------> frame
//!   port:    lock the frame -> load -> access on the unit's page -> store (after a write) -> unlock
//! ```
//! Both happen inside the unit's gate section, so a revocation waits for them. The locks make an access by port one step for all
//! units, and for the copy engine when that is wrapped in [`LockedEngine`]: a store writes bytes back that the access did not
//! change, and must not undo what another one has written there meanwhile.
//!
//! Lock order: the locks of several frames are taken in ascending order; under them only the device is waited for.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};
use std::time::Duration;

use uhmm_driver_kit::{CopyEngine, CopyOp, CopyWork, DeviceError, Frames, PAGE_BYTES, StagedCopy, Staging};
use uhmm_kernel_hook::{HookError, MappedBytes, Window};

/// Frames whose numbers differ by less than this never share a lock. A copy of the pager's (2 MiB) takes 512 of them.
const LOCK_COUNT: usize = 2048;

/// The device has not answered while a unit may stay inside the gate, and perhaps will: nothing of the access has happened, nor will. The
/// unit leaves the gate, so that revocations go on, and does the access anew, until so long after the first try.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Late {
    /// As long as the driver waits for such a device elsewhere.
    pub patience: Duration,
    /// Said when it is over.
    pub reason: String,
}

/// One unit's way to the frames of a device whose memory the CPU does not see. Each unit has its own, and its own page.
///
/// Called inside the gate: both calls take a bounded time, well below the two seconds that the pager grants a revocation. A device
/// that does not answer is an error, not a wait: [`Late`] where it may answer yet (the unit leaves the gate and comes again), another one
/// ends the job with EIO.
pub trait FramePort: Send {
    /// The page that frames are loaded to: 4096 bytes in this process, best where the device can reach them.
    fn page(&self) -> &Window;

    /// Brings at least the bytes `part` of the frame (0..4096, not empty) to the same place of the page.
    ///
    /// # Errors
    /// The device failed; the page holds anything.
    fn load(&mut self, frame: u32, part: Range<u64>) -> Result<(), DeviceError>;

    /// Puts at least the bytes `part` of the page into the frame, and returns after the frame holds them. What is stored beyond
    /// `part` must have been loaded: a port widens `part` to what its device can do in the same way here and in
    /// [`FramePort::load`], which was called before with the same `part`, or not at all when `part` is the whole page.
    ///
    /// # Errors
    /// The device failed; `part` of the frame holds anything.
    fn store(&mut self, frame: u32, part: Range<u64>) -> Result<(), DeviceError>;
}

/// How one unit reaches frames.
pub enum UnitFrames {
    /// All frames are memory of this process, frame 0 at offset 0.
    Window(Arc<Window>),
    /// Frames come to the unit's page and go back. All units (and the engine) of a device share the locks.
    Port(Box<dyn FramePort>, Arc<FrameLocks>),
}

impl fmt::Debug for UnitFrames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Window(window) => write!(f, "Window({} bytes)", window.len()),
            Self::Port(..) => f.write_str("Port"),
        }
    }
}

/// What an access does to the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Right {
    Read,
    Write,
    /// Reads and writes in one step.
    Atomic,
}

/// Why the bytes of a frame were out of reach.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("Device memory cannot be accessed: {0}")]
    Memory(#[from] HookError),
    #[error("The device could not {what} frame {frame}: {source}")]
    Port { what: &'static str, frame: u32, source: DeviceError },
}

impl FrameError {
    /// The access may be done anew.
    pub(crate) fn late(&self) -> Option<&Late> {
        let Self::Port { source, .. } = self else { return None };
        source.downcast_ref()
    }
}

impl UnitFrames {
    /// `act` on the `len` bytes at `offset` of the frame, which lie in one page.
    pub(crate) fn access<R>(
        &mut self,
        frame: u32,
        offset: u64,
        len: usize,
        right: Right,
        act: &mut impl FnMut(&MappedBytes, u64) -> Result<R, HookError>,
    ) -> Result<R, FrameError> {
        match self {
            Self::Window(window) => Ok(act(window, u64::from(frame) * PAGE_BYTES + offset)?),
            Self::Port(port, locks) => {
                let part = offset..offset + len as u64;
                let load = |port: &mut Box<dyn FramePort>| {
                    let loaded = port.load(frame, part.clone());
                    loaded.map_err(|source| FrameError::Port { what: "read", frame, source })
                };
                if right == Right::Read {
                    let _shared = locks.read(frame);
                    load(port)?;
                    return Ok(act(port.page(), offset)?);
                }
                let _alone = locks.write(frame);
                if right == Right::Atomic || part != (0..PAGE_BYTES) {
                    load(port)?;
                }
                let result = act(port.page(), offset)?;
                let stored = port.store(frame, part.clone());
                stored.map_err(|source| FrameError::Port { what: "write", frame, source })?;
                Ok(result)
            }
        }
    }
}

/// Locks of frames, shared by everything in this process that changes parts of them.
pub struct FrameLocks {
    stripes: Box<[RwLock<()>]>,
}

impl fmt::Debug for FrameLocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FrameLocks({})", self.stripes.len())
    }
}

impl Default for FrameLocks {
    fn default() -> Self {
        Self { stripes: (0..LOCK_COUNT).map(|_| RwLock::default()).collect() }
    }
}

impl FrameLocks {
    fn stripe(&self, frame: u32) -> &RwLock<()> {
        &self.stripes[frame as usize % self.stripes.len()]
    }

    // The locks guard no data of this process: after a panic under one of them there is nothing to distrust.
    fn read(&self, frame: u32) -> RwLockReadGuard<'_, ()> {
        self.stripe(frame).read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, frame: u32) -> RwLockWriteGuard<'_, ()> {
        self.stripe(frame).write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of all of them, in the order in which they are taken.
    fn stripes_of(&self, frames: Frames) -> impl Iterator<Item = &RwLock<()>> {
        let count = self.stripes.len();
        let mut wanted: Vec<usize> = (frames.first..frames.first.saturating_add(frames.count))
            .take(count)
            .map(|at| at as usize % count)
            .collect();
        wanted.sort_unstable();
        wanted.into_iter().map(|at| &self.stripes[at])
    }

    /// All of them, for a change.
    fn write_all(&self, frames: Frames) -> Vec<RwLockWriteGuard<'_, ()>> {
        self.stripes_of(frames).map(|stripe| stripe.write().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    /// The same, or none when anybody has one of them.
    fn try_write_all(&self, frames: Frames) -> Option<Vec<RwLockWriteGuard<'_, ()>>> {
        self.stripes_of(frames)
            .map(|stripe| match stripe.try_write() {
                Ok(guard) => Some(guard),
                Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            })
            .collect()
    }
}

/// A copy engine that writes no frame while a unit changes a part of it.
#[derive(Debug)]
pub struct LockedEngine<E> {
    engine: E,
    locks: Arc<FrameLocks>,
}

impl<E> LockedEngine<E> {
    /// `locks`: those of the units.
    pub fn new(engine: E, locks: Arc<FrameLocks>) -> Self {
        Self { engine, locks }
    }
}

impl<E: CopyEngine> CopyEngine for LockedEngine<E> {
    fn attach(&mut self, staging: &Staging) -> Result<(), DeviceError> {
        self.engine.attach(staging)
    }

    fn copy_in(&mut self, staging: &Staging, staging_page: u32, frames: Frames) -> Result<(), DeviceError> {
        let _alone = self.locks.write_all(frames);
        self.engine.copy_in(staging, staging_page, frames)
    }

    // Reads what is there: a device that tears a frame which is written meanwhile needs no more care than a racing reader does.
    fn copy_out(&mut self, frames: Frames, staging: &Staging, staging_page: u32) -> Result<(), DeviceError> {
        self.engine.copy_out(frames, staging, staging_page)
    }

    fn scrub(&mut self, frames: Frames) -> Result<(), DeviceError> {
        let _alone = self.locks.write_all(frames);
        self.engine.scrub(frames)
    }

    fn serve(&mut self, staging: &Staging, work: &mut dyn CopyWork) {
        let mut work = LockedWork { work, locks: &self.locks, held: Vec::new(), waits: None };
        loop {
            self.engine.serve(staging, &mut work);
            if work.waits.is_none() {
                return;
            }
        }
    }
}

/// Copies whose frames are locked from their start to their end.
struct LockedWork<'a> {
    work: &'a mut dyn CopyWork,
    locks: &'a FrameLocks,
    held: Vec<(u64, Vec<RwLockWriteGuard<'a, ()>>)>,
    /// It needs a lock that is taken, perhaps by a copy in flight.
    waits: Option<StagedCopy>,
}

impl CopyWork for LockedWork<'_> {
    /// While copies hold locks nothing is waited for: this thread may wait for itself otherwise.
    fn next(&mut self) -> Option<StagedCopy> {
        let copy = self.waits.take().or_else(|| self.work.next())?;
        if copy.op == CopyOp::CopyOut {
            return Some(copy);
        }
        let locked = self.locks.try_write_all(copy.frames);
        if locked.is_none() && !self.held.is_empty() {
            self.waits = Some(copy);
            return None;
        }
        let locked = locked.unwrap_or_else(|| self.locks.write_all(copy.frames));
        self.held.push((copy.ticket, locked));
        Some(copy)
    }

    fn done(&mut self, copy: StagedCopy, outcome: Result<(), DeviceError>) {
        self.held.retain(|(ticket, _)| *ticket != copy.ticket);
        self.work.done(copy, outcome);
    }
}

#[cfg(test)]
mod tests;
