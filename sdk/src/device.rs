//! Devices: what they are, and jobs on virtual addresses.

use std::sync::Arc;
use std::time::Duration;

use uhmm_ipc::message::pager::Target;
use uhmm_ipc::message::{Call, Reply, driver};

use crate::Error;
use crate::agent::Peer;
use crate::pending::Pending;
use crate::session::Inner;

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Driver's name, e.g. `soft`.
    pub driver: String,
    /// Id in the plan.
    pub id: u8,
    /// Device memory in bytes.
    pub memory_bytes: u64,
    /// The CPU can see device memory.
    pub aperture: bool,
    /// Kernels that jobs can name, with their arguments, one line each.
    pub kernels: Vec<String>,
}

/// Work for a device. Addresses in `args` are this process's own pointers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    kernel: String,
    args: Vec<u64>,
    idempotent: bool,
    deadline: Option<Duration>,
}

impl Job {
    /// A job that is not run again by itself: if the driver dies meanwhile it ends with
    /// [`ErrorCode::Stale`](crate::ErrorCode::Stale).
    pub fn new(kernel: impl Into<String>, args: impl Into<Vec<u64>>) -> Self {
        Self { kernel: kernel.into(), args: args.into(), idempotent: false, deadline: None }
    }

    /// The job only reads, or writes absolute values: it is run again from its start after a restart of the driver.
    #[must_use]
    pub fn idempotent(mut self) -> Self {
        self.idempotent = true;
        self
    }

    /// The answer must be here after this time, else the call ends with [`ErrorCode::TimedOut`](crate::ErrorCode::TimedOut).
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }
}

/// What a job brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobResult {
    /// The kernel's results.
    pub results: Vec<u64>,
    /// Device faults that the job met.
    pub fault_count: u64,
    /// Time on the device in nanoseconds, faults included.
    pub run_time_ns: u64,
}

/// A device with a queue for this session. Cheap to clone; survives restarts of its driver.
#[derive(Clone)]
pub struct Device {
    pub(crate) session: Arc<Inner>,
    pub(crate) name: String,
    pub(crate) info: DeviceInfo,
}

impl Device {
    /// Id in the plan: bit in masks, index in tables.
    pub fn id(&self) -> u8 {
        self.info.id
    }

    /// Name in the plan.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the driver said when the device was opened.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// As a destination of migrations.
    pub fn target(&self) -> Target {
        Target::Device(self.info.id)
    }

    /// Queues a job. Its faults on absent or migrated pages are answered by the services; nothing has to be moved before.
    pub fn submit(&self, job: Job) -> Pending<JobResult> {
        let Job { kernel, args, idempotent, deadline } = job;
        let call = driver::Call::Submit { space: self.session.space.id, kernel, args, idempotent };
        self.session.agent.call(Peer::Driver(self.name.clone()), Call::Driver(call), deadline, |reply| match reply {
            Reply::Driver(driver::Reply::Finished { results, fault_count, run_time_ns }) => {
                Ok(JobResult { results, fault_count, run_time_ns })
            }
            _ => Err(Error::StrangeReply { question: "Submit" }),
        })
    }

    /// [`Device::submit`] and wait.
    pub fn run(&self, job: Job) -> Result<JobResult, Error> {
        self.submit(job).wait()
    }
}

impl From<&Device> for Target {
    fn from(device: &Device) -> Self {
        device.target()
    }
}

/// Asks a driver what it drives.
pub(crate) fn ask_info(session: &Inner, name: &str, deadline: Duration) -> Pending<DeviceInfo> {
    let peer = Peer::Driver(name.to_owned());
    session.agent.call(peer, Call::Driver(driver::Call::Info), Some(deadline), |reply| match reply {
        Reply::Driver(driver::Reply::Info { driver, device, memory_bytes, aperture, kernels }) => {
            Ok(DeviceInfo { driver, id: device, memory_bytes, aperture, kernels })
        }
        _ => Err(Error::StrangeReply { question: "Info" }),
    })
}
