//! The device's own kernel, beside those in software: a queue in front of two kinds of units.
//!
//! ```text
//!   submit --+-- kernel < software kernels --> units in software (uhmm-compute)
//!            +-- factorial -----------------> one thread that has the device compute, one job at a time
//! ```

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use uhmm_compute::Workers;
use uhmm_driver_kit::{DevicePort, FaultId, Job, JobId, JobQueue, JobReport, KernelSpec};
use uhmm_ipc::message::{ErrorCode, WireError};

use crate::frame::lock;
use crate::hardware::Edu;

/// 13! does not fit the device's 32 bits.
const LARGEST: u64 = 12;

/// The kernel that the device itself runs.
pub fn spec() -> KernelSpec {
    KernelSpec {
        name: "factorial",
        usage: "n (0 to 12) -> n!, computed by the device",
        argument_count: 1,
        idempotent: true,
    }
}

/// Both kinds of units.
#[derive(Debug)]
pub struct EduQueue {
    units: Workers,
    software_kernels: usize,
    /// `None` when stopped.
    to_device: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl EduQueue {
    /// Kernels below `software_kernels` go to the units.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn start(
        units: Workers,
        software_kernels: usize,
        edu: Arc<Mutex<Edu>>,
        port: DevicePort,
    ) -> std::io::Result<Self> {
        let (to_device, jobs) = channel();
        let thread = std::thread::Builder::new().name("factorial".to_owned());
        let thread = thread.spawn(move || compute(&jobs, &edu, &port))?;
        Ok(Self { units, software_kernels, to_device: Some(to_device), thread: Some(thread) })
    }
}

/// Life of the device's thread: until the queue lets go of its end.
fn compute(jobs: &Receiver<Job>, edu: &Mutex<Edu>, port: &DevicePort) {
    for job in jobs {
        let start = Instant::now();
        let result = factorial(edu, &job.args);
        let run_time_ns = start.elapsed().as_nanos() as u64;
        port.finished(job.id, JobReport { result, fault_count: 0, run_time_ns });
    }
}

fn factorial(edu: &Mutex<Edu>, args: &[u64]) -> Result<Vec<u64>, WireError> {
    match args {
        // Nothing is locked but the device, and that for a DMA (100 ms) at most.
        [n] if *n <= LARGEST => match lock(edu).factorial(*n as u32) {
            Ok(value) => Ok(vec![u64::from(value)]),
            Err(error) => Err(WireError::new(ErrorCode::Io, error.to_string())),
        },
        _ => Err(WireError::new(
            ErrorCode::Invalid,
            format!("factorial takes one number from 0 to {LARGEST}, not {args:?}"),
        )),
    }
}

impl JobQueue for EduQueue {
    fn submit(&mut self, job: Job) {
        if job.kernel < self.software_kernels {
            return self.units.submit(job);
        }
        // After `stop` nobody listens, and nobody waits for an answer.
        if let Some(Err(lost)) = self.to_device.as_ref().map(|to_device| to_device.send(job)) {
            tracing::error!(job = ?lost.0.id, "The device's thread has ended: the job is lost");
        }
    }

    fn resume(&mut self, fault: FaultId, outcome: Result<(), WireError>) {
        // Factorials touch no memory, so only units fault.
        self.units.resume(fault, outcome);
    }

    fn cancel(&mut self, job: JobId, why: WireError) {
        // A factorial is over before a cancellation could matter; units ignore jobs that they do not know.
        self.units.cancel(job, why);
    }

    fn stop(&mut self) {
        self.units.stop();
        self.to_device = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("The device's thread had panicked");
        }
    }
}

impl Drop for EduQueue {
    fn drop(&mut self) {
        self.stop();
    }
}
