//! Devices: what they are, and jobs on virtual addresses.

use std::sync::Arc;
use std::time::Duration;

use uhmm_ipc::message::driver::{AccessOp, JobRange};
use uhmm_ipc::message::pager::Target;
use uhmm_ipc::message::{Call, Reply, driver};
use uhmm_kernel_hook::AddrRange;

use crate::Error;
use crate::links::{Loop, Peer};
use crate::pending::Pending;
use crate::pieces::{Buffer, Buffers, Bytes};
use crate::range::{PAGE_BYTES, check_range, enclosing_pages};
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
    /// Pages of allocated memory that live there are reached by the program where they are: no CPU access brings them home.
    pub coherent: bool,
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
    ranges: Vec<JobRange>,
}

impl Job {
    /// A job that is not run again by itself: if the driver dies meanwhile it ends with
    /// [`ErrorCode::Stale`](crate::ErrorCode::Stale).
    pub fn new(kernel: impl Into<String>, args: impl Into<Vec<u64>>) -> Self {
        Self { kernel: kernel.into(), args: args.into(), idempotent: false, deadline: None, ranges: Vec::new() }
    }

    /// The job only reads, or writes absolute values: it is run again from its start after a restart of the driver.
    #[must_use]
    pub fn idempotent(mut self) -> Self {
        self.idempotent = true;
        self
    }

    /// The job reads `len_bytes` bytes at `addr`: their pages are brought to the device and mapped there before it starts, which costs a small
    /// part of faulting them in. A job may name 64 ranges. What is not named, does not fit (half of the device's memory) or is taken away
    /// again is faulted in as ever, and what cannot be brought is no failure before the job touches it.
    #[must_use]
    pub fn reads(self, addr: u64, len_bytes: u64) -> Self {
        self.uses(addr, len_bytes, false)
    }

    /// The same of what the job writes.
    #[must_use]
    pub fn writes(self, addr: u64, len_bytes: u64) -> Self {
        self.uses(addr, len_bytes, true)
    }

    fn uses(mut self, addr: u64, len_bytes: u64, write: bool) -> Self {
        let (addr, len_bytes) = enclosing_pages(addr, len_bytes);
        if len_bytes > 0 {
            self.ranges.push(JobRange { addr, len_bytes, write });
        }
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
    pub(crate) buffers: Arc<Buffers>,
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
        let Job { kernel, args, idempotent, deadline, ranges } = job;
        let call = driver::Call::Submit { space: self.session.space.id, kernel, args, idempotent, ranges };
        let make = |_: &mut Loop| Ok(Call::Driver(call));
        self.session.links.call_validated(&self.name, None, make, deadline, |reply| match reply {
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

/// What a direct access of a device brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AccessReport {
    /// Pages that were read, written or made exclusive: all of the range.
    pub page_count: u64,
    /// Device faults it met. A range of which nothing is mapped takes one, if nobody interferes.
    pub fault_count: u64,
}

/// Direct accesses: the device reads and writes a range by virtual address, without a kernel. Missing pages are faulted in with one
/// fault for the whole range, and stay where the fault has brought them.
///
/// # Errors
/// [`ErrorCode::Fault`](crate::ErrorCode::Fault) where nothing is mapped or may be read, `Permission` for a write to memory that
/// the program itself may not write, `Invalid`, `NoMemory`, `Busy`, `Io`. Nothing is known about a range whose write failed.
impl Device {
    /// The device reads `into.len()` bytes at `addr`; whole pages.
    pub fn read(&self, addr: u64, into: &mut [u8]) -> Result<AccessReport, Error> {
        self.access_in_pieces(addr, into.len() as u64, AccessOp::Read, Bytes::Into(into))
    }

    /// [`Device::read`] without waiting.
    pub fn read_at(
        &self,
        addr: u64,
        len_bytes: u64,
        deadline: Option<Duration>,
    ) -> Result<Pending<(Vec<u8>, AccessReport)>, Error> {
        let buffer = Buffer::new(&self.session.links, len_bytes)?;
        self.access(addr, len_bytes, AccessOp::Read, Some(buffer), deadline, |buffer, report| {
            Ok((buffer.map_or(Ok(Vec::new()), |buffer| buffer.bytes())?, report))
        })
    }

    /// The device writes the bytes to `addr`; whole pages.
    pub fn write(&self, addr: u64, from: &[u8]) -> Result<AccessReport, Error> {
        self.access_in_pieces(addr, from.len() as u64, AccessOp::Write, Bytes::From(from))
    }

    /// [`Device::write`] without waiting; the bytes are copied before this returns.
    pub fn write_at(&self, addr: u64, from: &[u8], deadline: Option<Duration>) -> Result<Pending<AccessReport>, Error> {
        let buffer = Buffer::new(&self.session.links, from.len() as u64)?;
        buffer.window.write(0, from).map_err(Error::kernel("Filling a device buffer"))?;
        self.access(addr, from.len() as u64, AccessOp::Write, Some(buffer), deadline, |_, report| Ok(report))
    }

    /// The device adds `value` to every aligned word of the range, atomically and wrapping; the words from before come back. Not run
    /// again by itself: if the driver dies meanwhile it ends with [`ErrorCode::Stale`](crate::ErrorCode::Stale).
    pub fn fetch_add(&self, addr: u64, len_bytes: u64, value: u64) -> Result<(Vec<u64>, AccessReport), Error> {
        check_range(addr, len_bytes)?;
        let mut before = vec![0; (len_bytes / 8) as usize];
        let report = self.fetch_add_into(addr, len_bytes, value, &mut before)?;
        Ok((before, report))
    }

    /// [`Device::fetch_add`]; the words from before go to `before`, as many as it has room for.
    pub fn fetch_add_into(
        &self,
        addr: u64,
        len_bytes: u64,
        value: u64,
        before: &mut [u64],
    ) -> Result<AccessReport, Error> {
        self.access_in_pieces(addr, len_bytes, AccessOp::FetchAdd(value), Bytes::Words(before))
    }

    /// [`Device::fetch_add`] without waiting.
    pub fn fetch_add_at(
        &self,
        addr: u64,
        len_bytes: u64,
        value: u64,
        deadline: Option<Duration>,
    ) -> Result<Pending<(Vec<u64>, AccessReport)>, Error> {
        let buffer = Buffer::new(&self.session.links, len_bytes)?;
        self.access(addr, len_bytes, AccessOp::FetchAdd(value), Some(buffer), deadline, |buffer, report| {
            let bytes = buffer.map_or(Ok(Vec::new()), |buffer| buffer.bytes())?;
            let words = bytes.chunks_exact(8).map(|word| {
                let mut bytes = [0; 8];
                bytes.copy_from_slice(word);
                u64::from_ne_bytes(bytes)
            });
            Ok((words.collect(), report))
        })
    }

    /// Brings a range to the device and has it mapped there, as [`Device::read`] does, without reading it.
    pub fn map(&self, addr: u64, len_bytes: u64) -> Result<AccessReport, Error> {
        self.access(addr, len_bytes, AccessOp::Map, None, None, |_, report| Ok(report))?.wait()
    }

    /// The device reads at `addr` what it maps already, and nothing is faulted in or moved: up to the first page that it does not map.
    /// Returns how many pages were read.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`](crate::ErrorCode::NotFound): it does not even map the first page.
    pub fn peek(&self, addr: u64, into: &mut [u8]) -> Result<u64, Error> {
        let len_bytes = into.len() as u64;
        let buffer = Buffer::new(&self.session.links, len_bytes)?;
        let read = self.access(addr, len_bytes, AccessOp::Peek, Some(buffer), None, |buffer, report| {
            Ok((buffer.map_or(Ok(Vec::new()), |buffer| buffer.bytes())?, report.page_count))
        })?;
        let (bytes, page_count) = read.wait()?;
        let len = (page_count.saturating_mul(PAGE_BYTES)).min(len_bytes) as usize;
        into[..len].copy_from_slice(&bytes[..len]);
        Ok(page_count)
    }

    /// The pages become the device's alone, for its atomics: until a CPU touches them, the process forks, their protection changes or
    /// another device wants them.
    pub fn make_exclusive(&self, addr: u64, len_bytes: u64) -> Result<AccessReport, Error> {
        self.make_exclusive_at(addr, len_bytes, None)?.wait()
    }

    /// [`Device::make_exclusive`] without waiting.
    pub fn make_exclusive_at(
        &self,
        addr: u64,
        len_bytes: u64,
        deadline: Option<Duration>,
    ) -> Result<Pending<AccessReport>, Error> {
        self.access(addr, len_bytes, AccessOp::MakeExclusive, None, deadline, |_, report| Ok(report))
    }

    pub(crate) fn access<T: Send + 'static>(
        &self,
        addr: u64,
        len_bytes: u64,
        op: AccessOp,
        buffer: Option<Buffer>,
        deadline: Option<Duration>,
        finish: impl FnOnce(Option<Buffer>, AccessReport) -> Result<T, Error> + Send + 'static,
    ) -> Result<Pending<T>, Error> {
        check_range(addr, len_bytes)?;
        let (space, key) = (self.session.space.id, buffer.as_ref().map(|buffer| buffer.memory.key()));
        let range = AddrRange { start: addr, len: len_bytes };
        let access = move |links: &mut Loop| {
            let buffer = key.map(|key| links.fd(key)).transpose()?;
            Ok(Call::Driver(driver::Call::Access { space, addr, len_bytes, op, buffer }))
        };
        Ok(self.session.links.call_validated(&self.name, Some(range), access, deadline, move |reply| match reply {
            Reply::Driver(driver::Reply::Accessed { page_count, fault_count }) => {
                finish(buffer, AccessReport { page_count, fault_count })
            }
            _ => Err(Error::StrangeReply { question: "Access" }),
        }))
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
    session.links.call(peer, Call::Driver(driver::Call::Info), Some(deadline), |reply| match reply {
        Reply::Driver(driver::Reply::Info { driver, device, memory_bytes, aperture, coherent, kernels }) => {
            Ok(DeviceInfo { driver, id: device, memory_bytes, aperture, coherent, kernels })
        }
        _ => Err(Error::StrangeReply { question: "Info" }),
    })
}
