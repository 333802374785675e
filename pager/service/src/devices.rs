//! Devices as the pager sees them: a window onto their memory, or a copy engine behind a ring.
//!
//! A device with an **aperture** is copied to and from directly and, when its page tables and gate are shared, revoked
//! directly: no message. A device without one does its copies itself: requests go through a shared-memory ring, the data
//! through a staging memfd, and invalidations through the mirror.
//!
//! What must survive the pager about a device is one record in the vault (`devices/state`): which incarnation holds
//! mappings and which generation of memory the directories speak of.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use uhmm_ipc::ConnId;
use uhmm_ipc::message::pager::CopyRing;
use uhmm_ipc::message::{Aperture, Fd};
use uhmm_ipc::ring::{Consumer, Producer, Ring, RingError};
use uhmm_ipc::shared::copy_ring::{CopyCompletion, CopyOp, CopyRequest, CopyStatus};
use uhmm_ipc::shared::gate::Gate;
use uhmm_kernel_hook::EventFd;
use uhmm_kernel_hook::memfd;
use uhmm_kernel_hook::window::{Prot, Window};
use uhmm_kernel_hook::{HookError, PAGE_SIZE, PidFd};

use crate::space::DEVICE_SLOTS;

const MAGIC: u64 = u64::from_le_bytes(*b"uhmm-dev");
const RECORD_BYTES: u64 = 32;
/// Not zero: no page comes to the device any more.
const OFF_CLOSED: u64 = 24;
/// User id plus one of who has a coherent device.
const OFF_USER: u64 = 16;

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Its descriptors could not be mapped or are not sealed.
    #[error("Device memory, gate or staging area was refused")]
    Hook(#[from] HookError),
    /// The shared structures are malformed.
    #[error("Shared structure of the device was refused: {0}")]
    Shared(String),
    /// Neither window nor copy engine.
    #[error("The driver offers neither an aperture nor a copy ring: give one of them at login")]
    NoCopyPath,
    /// What has logged in cannot be watched.
    #[error("The driver's process has ended")]
    NoProcess,
}

/// The record of every device slot that outlives the pager.
#[derive(Debug)]
pub struct DeviceRecords {
    fd: Fd,
    window: Window,
}

impl DeviceRecords {
    /// Vault name.
    pub const VAULT_NAME: &'static str = "devices/state";

    /// New, empty.
    pub fn create() -> Result<Self, HookError> {
        let fd = Arc::new(memfd::create_sealed("uhmm-devices", PAGE_SIZE)?);
        let window = Window::map(fd.as_fd(), 0, PAGE_SIZE, Prot::ReadWrite)?;
        window.store_u64(0, MAGIC)?;
        Ok(Self { fd, window })
    }

    /// From the vault; `None` when it is something else.
    pub fn adopt(fd: Fd) -> Result<Option<Self>, HookError> {
        let window = Window::map(fd.as_fd(), 0, PAGE_SIZE, Prot::ReadWrite)?;
        Ok((window.load_u64(0)? == MAGIC).then_some(Self { fd, window }))
    }

    /// For the vault.
    pub fn fd(&self) -> Fd {
        self.fd.clone()
    }

    /// (incarnation that may hold mappings, generation of memory), zero when never seen.
    pub fn get(&self, device: u8) -> (u64, u64) {
        let base = RECORD_BYTES * (1 + u64::from(device));
        (self.window.load_u64(base).unwrap_or(0), self.window.load_u64(base + 8).unwrap_or(0))
    }

    /// Who may use a coherent device; nobody does before the first one.
    pub fn user(&self, device: u8) -> Option<u32> {
        let word = self.window.load_u64(RECORD_BYTES * (1 + u64::from(device)) + OFF_USER).unwrap_or(0);
        word.checked_sub(1).and_then(|uid| u32::try_from(uid).ok())
    }

    /// From now on only this user may.
    pub fn set_user(&self, device: u8, uid: u32) -> Result<(), HookError> {
        self.window.store_u64(RECORD_BYTES * (1 + u64::from(device)) + OFF_USER, u64::from(uid) + 1)
    }

    /// Whether an operator has drained it. Holds whatever happens to driver and memory.
    pub fn is_closed(&self, device: u8) -> bool {
        self.window.load_u64(RECORD_BYTES * (1 + u64::from(device)) + OFF_CLOSED).unwrap_or(0) != 0
    }

    /// From now on pages come no more, or again.
    pub fn close(&self, device: u8, closed: bool) -> Result<(), HookError> {
        self.window.store_u64(RECORD_BYTES * (1 + u64::from(device)) + OFF_CLOSED, u64::from(closed))
    }

    /// Remembers both. Other memory is nobody's yet.
    pub fn set(&self, device: u8, incarnation: u64, generation: u64) -> Result<(), HookError> {
        let base = RECORD_BYTES * (1 + u64::from(device));
        if self.get(device).1 != generation {
            self.window.store_u64(base + OFF_USER, 0)?;
        }
        self.window.store_u64(base + 8, generation)?;
        self.window.store_u64(base, incarnation)
    }
}

/// A copy that the driver does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineJob {
    /// Core's ticket.
    pub ticket: u64,
    /// What is done with it when it completes.
    pub op: CopyOp,
    /// First staging page it owns.
    pub staging_page: u32,
    /// Pages.
    pub count: u32,
}

/// Copy engine of a device without an aperture.
pub struct CopyEngine {
    submit: Producer,
    complete: Consumer,
    doorbell: EventFd,
    /// Rung by the driver.
    pub completion_event: EventFd,
    /// Data area shared with the driver.
    pub staging: Window,
    free_staging: Vec<(u32, u32)>,
    jobs: HashMap<u64, EngineJob>,
    next_id: u64,
}

impl std::fmt::Debug for CopyEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CopyEngine").field("in_flight", &self.jobs.len()).finish_non_exhaustive()
    }
}

impl CopyEngine {
    /// Maps what the driver gave at login.
    pub fn open(ring: &CopyRing) -> Result<Self, DeviceError> {
        let staging_bytes = memfd::len(ring.staging.as_fd())?;
        memfd::check_sealed(ring.staging.as_fd(), staging_bytes)?;
        let staging = Window::map(ring.staging.as_fd(), 0, staging_bytes, Prot::ReadWrite)?;
        let shared = |error: RingError| DeviceError::Shared(error.to_string());
        let (submit, mut complete) = Ring::open(ring.ring.as_fd()).map_err(shared)?.into_ends();
        let clone = |fd: &Fd| fd.as_fd().try_clone_to_owned().map_err(|e| DeviceError::Shared(e.to_string()));
        // From now on the driver rings for what it completes; a new ring is empty.
        complete.arm().map_err(shared)?;
        let pages = u32::try_from(staging_bytes / PAGE_SIZE).unwrap_or(u32::MAX);
        Ok(Self {
            submit,
            complete,
            doorbell: EventFd::from_fd(clone(&ring.submit)?)?,
            completion_event: EventFd::from_fd(clone(&ring.complete)?)?,
            staging,
            free_staging: vec![(0, pages)],
            jobs: HashMap::new(),
            next_id: 1,
        })
    }

    /// Takes `count` consecutive staging pages; `None`: all are in use, try again after a completion.
    pub fn take_staging(&mut self, count: u32) -> Option<u32> {
        let slot = self.free_staging.iter().position(|(_, free)| *free >= count)?;
        let (first, free) = self.free_staging[slot];
        if free == count {
            self.free_staging.swap_remove(slot);
        } else {
            self.free_staging[slot] = (first + count, free - count);
        }
        Some(first)
    }

    /// Gives staging pages back.
    pub fn give_staging(&mut self, first: u32, count: u32) {
        if count > 0 {
            self.free_staging.push((first, count));
            self.free_staging.sort_unstable();
            let merged = self.free_staging.drain(..).fold(Vec::<(u32, u32)>::new(), |mut runs, run| {
                match runs.last_mut() {
                    Some(last) if last.0 + last.1 == run.0 => last.1 += run.1,
                    _ => runs.push(run),
                }
                runs
            });
            self.free_staging = merged;
        }
    }

    /// Queues a copy; `false`: the ring is full, try again after a completion.
    pub fn submit(&mut self, job: EngineJob, frame: u32, count: u32) -> Result<bool, DeviceError> {
        let id = self.next_id;
        let request = CopyRequest { op: job.op, ticket: id, frame, count, staging_page: job.staging_page };
        match self.submit.push(&request.encode()) {
            Ok(must_signal) => {
                if must_signal {
                    self.doorbell.signal()?;
                }
                self.next_id += 1;
                self.jobs.insert(id, job);
                Ok(true)
            }
            Err(RingError::Full) => Ok(false),
            Err(error) => Err(DeviceError::Shared(error.to_string())),
        }
    }

    /// Next finished copy. A completion of something never asked for is an error: the driver is broken.
    pub fn completed(&mut self) -> Result<Option<(EngineJob, CopyStatus)>, DeviceError> {
        let shared = |error: RingError| DeviceError::Shared(error.to_string());
        let slot = loop {
            if let Some(slot) = self.complete.pop().map_err(shared)? {
                break slot;
            }
            if self.complete.arm().map_err(shared)? {
                return Ok(None);
            }
        };
        let completion = CopyCompletion::decode(&slot).map_err(|error| DeviceError::Shared(error.to_string()))?;
        let job = self.jobs.remove(&completion.ticket);
        let job = job.ok_or_else(|| DeviceError::Shared(format!("copy {} was never asked for", completion.ticket)))?;
        Ok(Some((job, completion.status)))
    }

    /// What was in flight when the driver's session ended.
    pub fn into_unfinished(self) -> impl Iterator<Item = EngineJob> {
        self.jobs.into_values()
    }
}

/// One device slot.
pub struct Device {
    /// Id in the plan.
    pub id: u8,
    /// Service that drives it.
    pub service: String,
    /// Its session.
    pub conn: Option<ConnId>,
    /// Incarnation of the last login.
    pub incarnation: u32,
    /// Its driver's process.
    pub pidfd: PidFd,
    /// Window onto all of it.
    pub aperture: Option<Window>,
    /// The sealed memfd behind that window, if it is one.
    pub file: Option<Aperture>,
    /// Who is inside.
    pub gate: Option<Gate>,
    /// Copy engine, when there is no aperture.
    pub engine: Option<CopyEngine>,
    /// A fence was asked for and the process is not known to be dead yet.
    pub fenced: bool,
}

/// All device slots.
pub type Devices = [Option<Device>; DEVICE_SLOTS];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coherent_device_is_one_users_until_its_memory_is_another() {
        let records = DeviceRecords::create().unwrap();
        records.set(3, 1, 77).unwrap();
        assert_eq!(records.user(3), None);
        records.set_user(3, 0).unwrap();
        records.set_user(4, 1000).unwrap();
        // A new incarnation of the driver with the memory of the old one.
        records.set(3, 2, 77).unwrap();
        let next = DeviceRecords::adopt(records.fd()).unwrap().unwrap();
        assert_eq!((next.get(3), next.user(3), next.user(4), next.user(5)), ((2, 77), Some(0), Some(1000), None));
        next.set(3, 2, 78).unwrap();
        assert_eq!((next.user(3), next.user(4)), (None, Some(1000)));
    }
}
