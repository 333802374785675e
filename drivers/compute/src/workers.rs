//! The units: threads that take one job each and run its kernel.
//!
//! ```text
//!   submit --> waiting --a thread is free--> running --kernel returned--> finished (reported once)
//!                 |                            |  ^
//!                 | cancel: reported at once   |  +-- resume(outcome)
//!                 v                            v  |
//!              finished                     suspended on a fault; cancel wakes it too
//! ```
//! One lock for all of it: it is taken at the start and end of a job and around a fault, never for an access. Nothing is called
//! while it is held. A kernel that panics ends its job with EIO; the thread goes on.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use uhmm_driver_kit::{AddressSpaces, DeviceFault, DevicePort, FaultId, Job, JobId, JobQueue, JobReport, SharedTable};
use uhmm_ipc::message::{ErrorCode, WireError};
use uhmm_ipc::shared::gate::Slot;

use crate::frames::UnitFrames;
use crate::kernels::{Kernel, KernelResult};
use crate::mmu::{Mmu, Suspend};

/// Why there are no units.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ComputeError {
    /// The driver made its page table for fewer threads.
    #[error("The page table has no place for unit {unit}: make it for as many threads as there are units")]
    NoSlot {
        /// Counted from 0.
        unit: usize,
    },
    /// The host gives no more threads.
    #[error("A unit's thread could not be started: raise the limit on processes, or plan fewer workers")]
    Thread(#[source] std::io::Error),
}

/// What every thread needs of the device.
#[derive(Clone)]
struct Device {
    spaces: AddressSpaces,
    port: DevicePort,
    kernels: Arc<[Kernel]>,
}

/// A job that a thread has taken.
#[derive(Default)]
struct Running {
    cancel: Arc<AtomicBool>,
    why: Option<WireError>,
    fault: Option<FaultId>,
    outcome: Option<Result<(), WireError>>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Job>,
    running: HashMap<JobId, Running>,
    next_fault: u64,
    stopping: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// A job came, or the end.
    work: Condvar,
    /// A suspended job may go on, or must end. Threads are few: all look.
    resumed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads.
pub struct Workers {
    shared: Arc<Shared>,
    port: DevicePort,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}

impl Workers {
    /// One unit for each item of `frames`; unit n stands at place n of the table's gate, which the driver uses for nothing else.
    /// Jobs name `kernels` by their place. Called once, by [`uhmm_driver_kit::Driver::open`].
    ///
    /// # Errors
    /// The table has fewer places, or the host gives no thread; nothing is running then.
    pub fn start(
        table: &SharedTable,
        port: &DevicePort,
        kernels: &Arc<[Kernel]>,
        frames: Vec<UnitFrames>,
    ) -> Result<Self, ComputeError> {
        let device = Device { spaces: table.spaces(), port: port.clone(), kernels: kernels.clone() };
        let mut workers = Self { shared: Arc::default(), port: port.clone(), threads: Vec::new() };
        for (unit, frames) in frames.into_iter().enumerate() {
            let slot = table.slot(unit).filter(|_| unit < table.thread_count()).ok_or(ComputeError::NoSlot { unit })?;
            let (shared, device) = (workers.shared.clone(), device.clone());
            let thread = std::thread::Builder::new().name(format!("unit-{unit}"));
            let thread = thread.spawn(move || work(&shared, &device, slot, frames)).map_err(ComputeError::Thread)?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }
}

impl JobQueue for Workers {
    fn submit(&mut self, job: Job) {
        self.shared.lock().waiting.push_back(job);
        self.shared.work.notify_one();
    }

    fn resume(&mut self, fault: FaultId, outcome: Result<(), WireError>) {
        let mut state = self.shared.lock();
        if let Some(running) = state.running.values_mut().find(|running| running.fault == Some(fault)) {
            running.outcome = Some(outcome);
            self.shared.resumed.notify_all();
        }
    }

    fn cancel(&mut self, job: JobId, why: WireError) {
        let mut state = self.shared.lock();
        if let Some(running) = state.running.get_mut(&job) {
            running.why.get_or_insert(why);
            running.cancel.store(true, Ordering::Release);
            self.shared.resumed.notify_all();
            return;
        }
        let before = state.waiting.len();
        state.waiting.retain(|waiting| waiting.id != job);
        let was_waiting = state.waiting.len() < before;
        drop(state);
        if was_waiting {
            self.port.finished(job, JobReport { result: Err(why), fault_count: 0, run_time_ns: 0 });
        }
    }

    fn stop(&mut self) {
        let mut state = self.shared.lock();
        state.stopping = true;
        let jobs: Vec<JobId> = state.waiting.iter().map(|job| job.id).chain(state.running.keys().copied()).collect();
        drop(state);
        for job in jobs {
            self.cancel(job, WireError::new(ErrorCode::Stale, "The driver was stopped"));
        }
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("A unit of the device had panicked");
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Life of one thread.
fn work(shared: &Shared, device: &Device, mut slot: Slot, mut frames: UnitFrames) {
    while let Some((job, cancel)) = take(shared) {
        let report = run(shared, device, (&mut slot, &mut frames), &job, &cancel);
        shared.lock().running.remove(&job.id);
        device.port.finished(job.id, report);
    }
}

/// The next job; `None` when the device stops.
fn take(shared: &Shared) -> Option<(Job, Arc<AtomicBool>)> {
    let mut state = shared.lock();
    loop {
        if state.stopping {
            return None;
        }
        if let Some(job) = state.waiting.pop_front() {
            let running = Running::default();
            let cancel = running.cancel.clone();
            state.running.insert(job.id, running);
            return Some((job, cancel));
        }
        state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
}

fn run(
    shared: &Shared,
    device: &Device,
    (slot, frames): (&mut Slot, &mut UnitFrames),
    job: &Job,
    cancel: &AtomicBool,
) -> JobReport {
    let start = Instant::now();
    let suspension = Suspension { shared, port: &device.port, job };
    let mut mmu = Mmu::new(job.space, frames, &device.spaces, slot, &suspension, cancel);
    let result = match device.kernels.get(job.kernel) {
        // The gate is left by the unwinding; nothing else of the MMU is half done after a panic.
        Some(kernel) => catch_unwind(AssertUnwindSafe(|| (kernel.run)(&mut mmu, &job.args))).unwrap_or_else(|_| {
            Err(WireError::new(ErrorCode::Io, format!("Kernel {} failed inside: this is a bug of it", kernel.name)))
        }),
        None => Err(WireError::new(ErrorCode::NotFound, format!("The device has no kernel {}", job.kernel))),
    };
    let fault_count = mmu.fault_count();
    let run_time_ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    JobReport { result, fault_count, run_time_ns }
}

/// How a running job waits for its faults.
struct Suspension<'a> {
    shared: &'a Shared,
    port: &'a DevicePort,
    job: &'a Job,
}

impl Suspend for Suspension<'_> {
    fn suspend(&self, addr: u64, write: bool) -> KernelResult<()> {
        let mut state = self.shared.lock();
        state.next_fault += 1;
        let fault = FaultId(state.next_fault);
        if let Some(running) = state.running.get_mut(&self.job.id) {
            running.fault = Some(fault);
            running.outcome = None;
        }
        drop(state);
        let (job, space) = (self.job.id, self.job.space);
        self.port.fault(DeviceFault { fault, job, space, addr, write, at: Instant::now() });
        let mut state = self.shared.lock();
        loop {
            let Some(running) = state.running.get_mut(&self.job.id) else { return Err(stopped()) };
            if let Some(why) = &running.why {
                return Err(why.clone());
            }
            if let Some(outcome) = running.outcome.take() {
                running.fault = None;
                return outcome;
            }
            state = self.shared.resumed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn cancelled(&self) -> WireError {
        self.shared.lock().running.get(&self.job.id).and_then(|running| running.why.clone()).unwrap_or_else(stopped)
    }
}

fn stopped() -> WireError {
    WireError::new(ErrorCode::Stale, "The device stopped the job")
}

#[cfg(test)]
mod tests;
