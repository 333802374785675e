//! The copy engine's thread: requests of the pager out of the ring, through the engine, completions back.
//!
//! ```text
//!   pager                      shared memory                      copy thread
//!   push request, ring submit -> request lane  -> pop, check range -> engine: staging <-> frames
//!   pop, drain complete       <- completion lane <- push, ring complete if the pager sleeps
//! ```
//! The engine asks for requests itself, so that it may have several in flight. When a piece of a client's direct access waits
//! (`access/engine.rs`), it is given no more until the piece is done.
//!
//! A ring belongs to one session with the pager: when the link is lost, the thread ends and hands the engine back, and the
//! next session begins with a new ring. What was in flight the new pager asks again (copies are absolute).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use uhmm_ipc::message::pager::CopyRing;
use uhmm_ipc::ring::{Consumer, Producer, Ring, RingError};
use uhmm_ipc::shared::copy_ring::{CopyCompletion, CopyOp, CopyRequest, CopyStatus};
use uhmm_kernel_hook::{EventFd, HookError};

use crate::access::engine::{EngineLane, PIECE_PAGES};
use crate::device::{
    CopyEngine, CopyWork, DeviceError, Frames, LostFrames, PAGE_BYTES, StagedCopy, Staging, StagingUse,
};
use crate::error::DriverError;
use crate::stats::CopyCounters;

/// Entries of the ring in each direction.
const RING_ENTRIES: u32 = 256;
/// Pause while the pager has no room for completions; it tells nobody when it has.
const COMPLETION_PAUSE: Duration = Duration::from_micros(100);

/// A running copy thread.
pub(crate) struct CopyService<E> {
    thread: JoinHandle<E>,
    stop: Arc<AtomicBool>,
    submit: EventFd,
    ring: CopyRing,
}

impl<E: CopyEngine + 'static> CopyService<E> {
    /// Makes ring and staging area and starts the thread.
    pub(crate) fn start(
        mut engine: E,
        frame_count: u32,
        staging_bytes: u64,
        counters: Arc<CopyCounters>,
        lane: EngineLane,
    ) -> Result<Self, DriverError> {
        let staging_pages = u32::try_from(staging_bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        let staging_bytes = u64::from(staging_pages) * PAGE_BYTES;
        let areas = Areas::create(staging_bytes, &mut engine)?;
        let ring = Ring::create(RING_ENTRIES)?;
        let (submit, complete) = (EventFd::new()?, EventFd::new()?);
        let shown = CopyRing {
            ring: ring.fd().clone(),
            submit: Arc::new(submit.try_clone()?.into_fd()),
            complete: Arc::new(complete.try_clone()?.into_fd()),
            staging: areas.pager.fd.clone(),
        };
        let (completions, requests) = ring.into_ends();
        let stop = Arc::new(AtomicBool::new(false));
        lane.open();
        let asked = Asked {
            frame_count,
            staging_pages,
            lane,
            requests,
            completions,
            submit: submit.try_clone()?,
            complete,
            stop: stop.clone(),
            counters,
            failed: None,
        };
        let worker = Worker { engine, areas, asked };
        let thread = std::thread::Builder::new()
            .name("copy-engine".to_owned())
            .spawn(move || worker.run())
            .map_err(DriverError::Thread)?;
        Ok(Self { thread, stop, submit, ring: shown })
    }

    /// For `DriverLogin`.
    pub(crate) fn ring(&self) -> CopyRing {
        self.ring.clone()
    }

    /// There is a piece in the lane.
    pub(crate) fn wake(&self) {
        if let Err(error) = self.submit.signal() {
            tracing::error!(%error, "The copy thread cannot be woken");
        }
    }

    /// Ends the thread after the request it is at, and hands the engine back; `None` if the engine panicked.
    pub(crate) fn stop(self) -> Option<E> {
        self.stop.store(true, Ordering::Release);
        self.wake();
        self.thread.join().ok()
    }
}

/// What the engine copies from and to.
struct Areas {
    pager: Staging,
    /// The pager does not see it.
    access: Staging,
}

impl Areas {
    fn create<E: CopyEngine>(staging_bytes: u64, engine: &mut E) -> Result<Self, DriverError> {
        let pager = Staging::create(StagingUse::Pager, staging_bytes)?;
        let access = Staging::create(StagingUse::Access, PIECE_PAGES * PAGE_BYTES)?;
        let areas = Self { pager, access };
        for area in [&areas.pager, &areas.access] {
            engine.attach(area).map_err(DriverError::Staging)?;
        }
        Ok(areas)
    }
}

/// What the thread owns.
struct Worker<E> {
    engine: E,
    areas: Areas,
    asked: Asked,
}

/// The thread's end of the ring, and of the lane.
struct Asked {
    frame_count: u32,
    staging_pages: u32,
    lane: EngineLane,
    requests: Consumer,
    completions: Producer,
    submit: EventFd,
    complete: EventFd,
    stop: Arc<AtomicBool>,
    counters: Arc<CopyCounters>,
    failed: Option<CopyThreadError>,
}

/// Why the thread stopped before it was told to.
#[derive(Debug, thiserror::Error)]
enum CopyThreadError {
    #[error("Copy ring is unusable until the pager's next session")]
    Ring(#[from] RingError),
    #[error("Copy request is malformed: the pager is of another version")]
    Request(#[from] uhmm_ipc::shared::copy_ring::CopyRingError),
    #[error("Event descriptor of the copy ring failed")]
    Event(#[from] HookError),
    #[error("Waiting for copy requests failed")]
    Wait(#[from] rustix::io::Errno),
}

impl<E: CopyEngine> Worker<E> {
    fn run(mut self) -> E {
        if let Err(error) = self.serve() {
            let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            tracing::error!(%error, source, "Copy thread ends");
            self.asked.lane.close(&format!("{error}: {source}"));
        }
        self.engine
    }

    fn serve(&mut self) -> Result<(), CopyThreadError> {
        while !self.asked.stops() {
            self.access();
            self.engine.serve(&self.areas.pager, &mut self.asked);
            if let Some(error) = self.asked.failed.take() {
                return Err(error);
            }
            if !self.asked.lane.has_piece() && self.asked.requests.arm()? {
                self.asked.wait()?;
            }
        }
        Ok(())
    }

    /// One piece of a direct access, if there is one.
    fn access(&mut self) {
        let Asked { lane, counters, frame_count, .. } = &self.asked;
        let Some(piece) = lane.take() else { return };
        let done = if piece.in_bounds(*frame_count) {
            piece.perform(&mut self.engine, &self.areas.access)
        } else {
            Err("A mapping leaves device memory".into())
        };
        counters.count(done.is_ok(), piece.page_count() * PAGE_BYTES);
        if let Err(error) = &done {
            tracing::error!(%error, ?piece, "Direct access failed");
        }
        lane.done(done);
    }
}

impl Asked {
    fn stops(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// The next request that makes sense; what makes none is answered here.
    fn pop(&mut self) -> Result<Option<StagedCopy>, CopyThreadError> {
        // A stopping thread takes nothing new, and a direct access has its turn when what is in flight has ended.
        while !self.stops() && !self.lane.has_piece() {
            let Some(slot) = self.requests.pop()? else { return Ok(None) };
            let request = CopyRequest::decode(&slot)?;
            if request.in_bounds(self.frame_count, self.staging_pages) {
                let CopyRequest { ticket, op, frame, count, staging_page } = request;
                return Ok(Some(StagedCopy { ticket, op, frames: Frames { first: frame, count }, staging_page }));
            }
            self.counters.count(false, 0);
            tracing::warn!(?request, "Copy request leaves device memory or staging area");
            self.complete(CopyCompletion { ticket: request.ticket, status: CopyStatus::OutOfRange })?;
        }
        Ok(None)
    }

    fn complete(&mut self, completion: CopyCompletion) -> Result<(), CopyThreadError> {
        let slot = completion.encode();
        loop {
            match self.completions.push(&slot) {
                Ok(true) => return Ok(self.complete.signal()?),
                Ok(false) => return Ok(()),
                Err(RingError::Full) if !self.stops() => std::thread::sleep(COMPLETION_PAUSE),
                Err(RingError::Full) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn wait(&mut self) -> Result<(), CopyThreadError> {
        let mut fds = [PollFd::new(&self.submit, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        self.submit.drain()?;
        Ok(())
    }
}

/// The first failure of the ring ends the work, and is looked at when the engine has come back.
impl CopyWork for Asked {
    fn next(&mut self) -> Option<StagedCopy> {
        if self.failed.is_some() {
            return None;
        }
        self.pop().unwrap_or_else(|error| {
            self.failed = Some(error);
            None
        })
    }

    fn done(&mut self, copy: StagedCopy, outcome: Result<(), DeviceError>) {
        self.counters.count(outcome.is_ok(), u64::from(copy.frames.count) * PAGE_BYTES);
        let status = match outcome {
            Ok(()) => CopyStatus::Ok,
            Err(error) => {
                tracing::error!(%error, ?copy, "Copy failed");
                match error.downcast_ref::<LostFrames>() {
                    Some(LostFrames { good, lost, .. }) if copy.op == CopyOp::CopyOut => {
                        CopyStatus::Lost { good: *good, lost: *lost }
                    }
                    _ => CopyStatus::Io,
                }
            }
        };
        if let Err(error) = self.complete(CopyCompletion { ticket: copy.ticket, status }) {
            self.failed.get_or_insert(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    use uhmm_kernel_hook::{Prot, Window};

    use crate::port::DevicePort;

    const STAGING_PAGES: u32 = 16;
    const STAGING_BYTES: u64 = STAGING_PAGES as u64 * PAGE_BYTES;

    /// Remembers what it was asked; `broken` makes it fail.
    struct Recorder {
        asked: Vec<(&'static str, u32, u32, u32)>,
        broken: bool,
    }

    impl Recorder {
        fn note(&mut self, what: &'static str, frames: Frames, staging_page: u32) -> Result<(), DeviceError> {
            self.asked.push((what, frames.first, frames.count, staging_page));
            if self.broken { Err("The device is broken".into()) } else { Ok(()) }
        }
    }

    impl CopyEngine for Recorder {
        fn attach(&mut self, staging: &Staging) -> Result<(), DeviceError> {
            self.asked.push(("attach", staging.used_by as u32, (staging.window.len() / PAGE_BYTES) as u32, 0));
            Ok(())
        }

        fn copy_in(&mut self, staging: &Staging, staging_page: u32, frames: Frames) -> Result<(), DeviceError> {
            assert_eq!(
                staging.window.load_u64(u64::from(staging_page) * PAGE_BYTES)?,
                77,
                "the pager's bytes are there"
            );
            self.note("in", frames, staging_page)
        }

        fn copy_out(&mut self, frames: Frames, staging: &Staging, staging_page: u32) -> Result<(), DeviceError> {
            staging.window.store_u64(u64::from(staging_page) * PAGE_BYTES, 99)?;
            self.note("out", frames, staging_page)
        }

        fn scrub(&mut self, frames: Frames) -> Result<(), DeviceError> {
            self.note("scrub", frames, 0)
        }
    }

    fn lane() -> EngineLane {
        EngineLane::new(DevicePort::new(|| {}))
    }

    /// The pager's end.
    struct Asker {
        requests: Producer,
        completions: Consumer,
        submit: EventFd,
        complete: EventFd,
        staging: Window,
    }

    impl Asker {
        fn open(ring: &CopyRing) -> Result<Self, DeviceError> {
            let (requests, completions) = Ring::open(ring.ring.as_fd())?.into_ends();
            Ok(Self {
                requests,
                completions,
                submit: EventFd::from_fd(ring.submit.try_clone()?)?,
                complete: EventFd::from_fd(ring.complete.try_clone()?)?,
                staging: Window::map(ring.staging.as_fd(), 0, STAGING_BYTES, Prot::ReadWrite)?,
            })
        }

        fn ask(&mut self, op: CopyOp, frame: u32, count: u32, staging_page: u32) -> Result<CopyStatus, DeviceError> {
            let request = CopyRequest { op, ticket: u64::from(frame) + 1000, frame, count, staging_page };
            if self.requests.push(&request.encode())? {
                self.submit.signal()?;
            }
            loop {
                if let Some(slot) = self.completions.pop()? {
                    let completion = CopyCompletion::decode(&slot)?;
                    assert_eq!(completion.ticket, request.ticket);
                    return Ok(completion.status);
                }
                if self.completions.arm()? {
                    poll(&mut [PollFd::new(&self.complete, PollFlags::IN)], None)?;
                    self.complete.drain()?;
                }
            }
        }
    }

    #[test]
    fn requests_are_checked_performed_and_answered_in_order() -> Result<(), DeviceError> {
        let counters = Arc::new(CopyCounters::default());
        let service =
            CopyService::start(Recorder { asked: vec![], broken: false }, 64, STAGING_BYTES, counters.clone(), lane())?;
        let mut asker = Asker::open(&service.ring())?;
        asker.staging.store_u64(5 * PAGE_BYTES, 77)?;
        assert_eq!(asker.ask(CopyOp::CopyIn, 10, 4, 5)?, CopyStatus::Ok);
        assert_eq!(asker.ask(CopyOp::CopyOut, 60, 4, 9)?, CopyStatus::Ok);
        assert_eq!(asker.staging.load_u64(9 * PAGE_BYTES)?, 99);
        assert_eq!(asker.ask(CopyOp::CopyOut, 61, 4, 9)?, CopyStatus::OutOfRange);
        assert_eq!(asker.ask(CopyOp::CopyIn, 0, 2, STAGING_PAGES - 1)?, CopyStatus::OutOfRange);
        assert_eq!(asker.ask(CopyOp::Scrub, 0, 64, u32::MAX)?, CopyStatus::Ok);
        let engine = service.stop().ok_or("The engine comes back")?;
        assert_eq!(
            engine.asked,
            [
                ("attach", 0, STAGING_PAGES, 0),
                ("attach", 1, PIECE_PAGES as u32, 0),
                ("in", 10, 4, 5),
                ("out", 60, 4, 9),
                ("scrub", 0, 64, 0)
            ]
        );
        assert_eq!(counters.bytes.load(Ordering::Relaxed), 72 * PAGE_BYTES);
        assert_eq!(counters.failed_copies.load(Ordering::Relaxed), 2);
        Ok(())
    }

    /// Takes three before it does any of them, and does the last one first.
    struct Several {
        inner: Recorder,
    }

    impl CopyEngine for Several {
        fn attach(&mut self, staging: &Staging) -> Result<(), DeviceError> {
            self.inner.attach(staging)
        }

        fn copy_in(&mut self, staging: &Staging, staging_page: u32, frames: Frames) -> Result<(), DeviceError> {
            self.inner.copy_in(staging, staging_page, frames)
        }

        fn copy_out(&mut self, frames: Frames, staging: &Staging, staging_page: u32) -> Result<(), DeviceError> {
            self.inner.copy_out(frames, staging, staging_page)
        }

        fn scrub(&mut self, frames: Frames) -> Result<(), DeviceError> {
            self.inner.scrub(frames)
        }

        fn serve(&mut self, staging: &Staging, work: &mut dyn CopyWork) {
            let mut taken: Vec<StagedCopy> = work.next().into_iter().collect();
            while (1..3).contains(&taken.len()) {
                taken.extend(work.next());
            }
            while let Some(copy) = taken.pop() {
                let outcome = self.perform(staging, copy);
                work.done(copy, outcome);
            }
        }
    }

    #[test]
    fn an_engine_may_have_several_copies_in_flight_and_each_is_answered_once() -> Result<(), DeviceError> {
        let engine = Several { inner: Recorder { asked: vec![], broken: false } };
        let service = CopyService::start(engine, 64, STAGING_BYTES, Arc::default(), lane())?;
        let mut asker = Asker::open(&service.ring())?;
        // All are in the ring before the thread is told; the third leaves device memory.
        for frame in [1, 2, 64, 3] {
            let request = CopyRequest { op: CopyOp::Scrub, ticket: u64::from(frame), frame, count: 1, staging_page: 0 };
            asker.requests.push(&request.encode())?;
        }
        asker.submit.signal()?;
        let mut answers = Vec::new();
        while answers.len() < 4 {
            match asker.completions.pop()? {
                Some(slot) => answers.push(CopyCompletion::decode(&slot)?),
                None if asker.completions.arm()? => {
                    poll(&mut [PollFd::new(&asker.complete, PollFlags::IN)], None)?;
                    asker.complete.drain()?;
                }
                None => {}
            }
        }
        let expected = [(64, CopyStatus::OutOfRange), (3, CopyStatus::Ok), (2, CopyStatus::Ok), (1, CopyStatus::Ok)];
        assert_eq!(answers.iter().map(|a| (a.ticket, a.status)).collect::<Vec<_>>(), expected);
        let engine = service.stop().ok_or("The engine comes back")?;
        assert_eq!(engine.inner.asked.iter().filter(|asked| asked.0 == "scrub").count(), 3);
        Ok(())
    }

    #[test]
    fn a_broken_device_is_reported_and_the_next_session_gets_the_same_engine() -> Result<(), DeviceError> {
        let counters = Arc::new(CopyCounters::default());
        let service =
            CopyService::start(Recorder { asked: vec![], broken: true }, 8, STAGING_BYTES, counters.clone(), lane())?;
        assert_eq!(Asker::open(&service.ring())?.ask(CopyOp::Scrub, 0, 1, 0)?, CopyStatus::Io);
        let mut engine = service.stop().ok_or("The engine comes back")?;
        engine.broken = false;
        let service = CopyService::start(engine, 8, STAGING_BYTES, counters, lane())?;
        assert_eq!(Asker::open(&service.ring())?.ask(CopyOp::Scrub, 1, 1, 0)?, CopyStatus::Ok);
        assert_eq!(service.stop().map(|engine| engine.asked.len()), Some(6));
        Ok(())
    }
}
