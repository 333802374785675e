//! What a driver author implements: a handful of small traits, each one piece of a real device.
//!
//! ```text
//!   DeviceMemory      frames and, perhaps, an aperture            (memfd | BAR through VFIO | NVMe CMB)
//!   CopyEngine        staging pages <-> frames, scrub             (memcpy | DMA engine), on a thread of its own
//!   DevicePageTable   attach, begin, install, revoke, quiesce     (shared memory | IOMMU | the device's own MMU)
//!   JobQueue          submit, resume after a fault, cancel        (threads | doorbells)
//!   Driver            its kernels, and how to build the parts above
//! ```
//! Everything here is called from the driver's one loop thread, except [`CopyEngine`]. No method may wait for another service.
//! The device talks back only through [`crate::DevicePort`].

use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use uhmm_ipc::message::pager::{MapRun, Memory};
use uhmm_ipc::message::{Aperture, Fd, WireError};
use uhmm_ipc::shared::copy_ring::CopyOp;
use uhmm_kernel_hook::{HookError, Prot, Window, memfd};
use uhmm_kit::record::Each;
use uhmm_manifest::DevicePlan;

use crate::file_pages::FilePages;
use crate::port::DevicePort;

/// Bytes of a page and of a frame.
pub const PAGE_BYTES: u64 = 4096;

/// Any error of a device part. Its text goes into the log and, for jobs, to the client; sources stay chained.
pub type DeviceError = Box<dyn std::error::Error + Send + Sync>;

/// A region as the driver loop names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionKey {
    /// Space.
    pub space: u64,
    /// Region, unique inside the space.
    pub region: u64,
}

impl fmt::Display for RegionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {} of space {}", self.region, self.space)
    }
}

/// Consecutive pages of a region, counted from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// First page.
    pub first: u64,
    /// Pages.
    pub count: u64,
}

impl PageRange {
    /// One past the last page; saturates, since the numbers come from other processes.
    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// The page lies inside.
    pub fn contains(&self, page: u64) -> bool {
        page >= self.first && page < self.end()
    }
}

/// What the mirror says about a region.
#[derive(Clone, Debug)]
pub struct RegionMap {
    /// Its name.
    pub key: RegionKey,
    /// First virtual address.
    pub addr: u64,
    /// Pages.
    pub page_count: u64,
    /// Devices may not write.
    pub device_read_only: bool,
    /// The system pages, for in-place mappings.
    pub memory: Memory,
}

/// Consecutive frames of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frames {
    /// First frame.
    pub first: u32,
    /// Frames.
    pub count: u32,
}

/// Device memory. It outlives the driver's process: the vault keeps [`DeviceMemory::kept`].
pub trait DeviceMemory {
    /// Size in pages.
    fn frame_count(&self) -> u32;

    /// A CPU-visible window onto all of it; sealed when it is a file. `None`: the pager moves data through [`CopyEngine`].
    fn aperture(&self) -> Option<Aperture>;

    /// Descriptors that the vault keeps for the next incarnation, by vault name below `driver/`.
    fn kept(&self) -> Vec<(String, Fd)>;

    /// The system ends in order (`uhmm down`), and the vault with it: what frames hold is worth nothing any more, and nobody will ever adopt it. A
    /// device that notes on itself who has it is told here that nobody has. Called once, after units and copy engine have stopped and before the
    /// parts are dropped; never when the driver is killed, replaced by another process, or has lost its device.
    ///
    /// # Errors
    /// The device did not take the note. Only logged: the driver ends all the same, as if it had been killed.
    fn give_back(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Tells counters and gauges of its own, beside those that every driver has (`uhmm stats`, `uhmm metrics`). Asked each time when the record is
    /// written, from the driver's loop, so it only reads what lies ready. A name stands in `services/watch/src/catalog.rs` too, with what it means.
    fn tell(&self, _each: &mut Each<'_>) {}
}

/// Whose a staging area is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StagingUse {
    /// The pager's: pages on their way out and home.
    Pager,
    /// The kit's own, for `Access` calls.
    Access,
}

/// Memory that a copy engine reads and writes: a sealed memfd, and all of it mapped here.
#[derive(Clone, Debug)]
pub struct Staging {
    /// Whose.
    pub used_by: StagingUse,
    /// The file.
    pub fd: Fd,
    /// The mapping.
    pub window: Arc<Window>,
}

impl Staging {
    /// New zeroed memory.
    ///
    /// # Errors
    /// Out of memory or descriptors.
    pub fn create(used_by: StagingUse, len_bytes: u64) -> Result<Self, HookError> {
        let fd: Fd = Arc::new(memfd::create_sealed("uhmm-staging", len_bytes)?);
        let window = Arc::new(Window::map(fd.as_fd(), 0, len_bytes, Prot::ReadWrite)?);
        Ok(Self { used_by, fd, window })
    }
}

/// A copy that the pager asks for. In bounds, of one frame at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StagedCopy {
    /// Which one; unique among those that have not ended.
    pub ticket: u64,
    /// What to do.
    pub op: CopyOp,
    /// Consecutive frames.
    pub frames: Frames,
    /// First of as many staging pages; means nothing to a scrub.
    pub staging_page: u32,
}

/// Why a copy out of frames failed, of an engine that knows: some of them cannot be had any more, however often they are asked for. The pager
/// poisons exactly these pages.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{lost} frames behind the first {good} are lost: {reason}")]
pub struct LostFrames {
    /// Frames in front of them that were copied.
    pub good: u32,
    /// Frames that are lost. What lies behind them is to be asked for again.
    pub lost: u32,
    /// Why.
    pub reason: String,
}

/// Where [`CopyEngine::serve`] gets its copies from.
pub trait CopyWork {
    /// One to start now. `None`: there is none, or none shall be started before those in flight have ended.
    fn next(&mut self) -> Option<StagedCopy>;

    /// One has ended, after which the device touches neither frames nor staging pages on its behalf.
    fn done(&mut self, copy: StagedCopy, outcome: Result<(), DeviceError>);
}

/// Moves bytes for devices without an aperture. Called by the copy thread; ranges are already checked.
pub trait CopyEngine: Send {
    /// From now on requests name this area, and none that came before it for the same use: a session with the pager begins. Here an
    /// engine that does DMA makes the area reachable for the device, and the earlier one unreachable.
    fn attach(&mut self, staging: &Staging) -> Result<(), DeviceError>;

    /// Staging pages, the first one here, to frames. Returns after the frames hold the bytes.
    fn copy_in(&mut self, staging: &Staging, staging_page: u32, frames: Frames) -> Result<(), DeviceError>;

    /// Frames to staging pages. Returns after the staging area holds the bytes.
    fn copy_out(&mut self, frames: Frames, staging: &Staging, staging_page: u32) -> Result<(), DeviceError>;

    /// Frames become zero.
    fn scrub(&mut self, frames: Frames) -> Result<(), DeviceError>;

    /// One copy of the pager's, from start to end.
    fn perform(&mut self, staging: &Staging, copy: StagedCopy) -> Result<(), DeviceError> {
        match copy.op {
            CopyOp::CopyIn => self.copy_in(staging, copy.staging_page, copy.frames),
            CopyOp::CopyOut => self.copy_out(copy.frames, staging, copy.staging_page),
            CopyOp::Scrub => self.scrub(copy.frames),
        }
    }

    /// Performs copies until there are none, one after the other. A device that works on several at once should override this:
    /// start the next ones before the first has ended, so that its queues are never empty. They do not depend on each other and may end in any order.
    fn serve(&mut self, staging: &Staging, work: &mut dyn CopyWork) {
        while let Some(copy) = work.next() {
            let outcome = self.perform(staging, copy);
            work.done(copy, outcome);
        }
    }
}

/// Whether the device has stopped using what was revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quiescence {
    /// It has.
    Reached,
    /// Not yet: [`DevicePort::quiesced`] will say so with the same ticket (an IOTLB flush, DMA in flight).
    Pending,
}

/// Which pages an install did not map because they were revoked after [`DevicePageTable::begin`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InstallReport {
    /// Pages mapped by this install.
    pub installed_pages: u64,
    /// Lost races. Their users fault again.
    pub refused: Vec<u64>,
}

/// System pages that a device may use where they are.
#[derive(Debug)]
pub enum SystemPages {
    /// The client's private memory: out of reach, so the pager never maps it in place.
    Private,
    /// Mapped here; the region's first page is at offset 0.
    Mapped(Window),
    /// A file that may shrink at any time: read and written, never accessed through a mapping.
    File(FilePages),
}

/// What a valid entry leads to; see [`DevicePageTable::with_page`].
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// A frame of the device.
    Frame(u32),
    /// A system page: whose, and which one of the region.
    System(&'a SystemPages, u64),
}

/// The device's page table: one part for each attached region.
///
/// ```text
///            begin(nonce)            install(nonce)
///   Invalid ------------> Pending ------------------> Valid
///      ^                     |                          |
///      +------- revoke ------+---------- revoke --------+     then quiesce: nobody uses the old entry any more
/// ```
/// A revocation between begin and install makes the install of that page fail: that is what makes stale answers harmless.
pub trait DevicePageTable {
    /// A region becomes reachable by jobs, with every page invalid. Returns the table's memfd when the pager may revoke in it
    /// directly (then [`DevicePageTable::gate`] is `Some` too). Attaching a key again replaces its table by an empty one.
    fn attach(&mut self, region: &RegionMap) -> Result<Option<Fd>, DeviceError>;

    /// Where the device's threads say that they are inside. `None`: revocation goes by message.
    fn gate(&self) -> Option<Fd>;

    /// The pages that are invalid become pending under this nonce. `upgrade` names pages that somebody wants to write: those
    /// whose mapping is valid but read-only become pending too.
    fn begin(
        &mut self,
        key: RegionKey,
        pages: PageRange,
        nonce: u32,
        upgrade: Option<PageRange>,
    ) -> Result<(), DeviceError>;

    /// If the page is mapped with the right that is asked for: marks it as used (accessed, and dirty for a write), calls `act` once
    /// with where it is, and returns true. Until `act` has returned no revocation of the page is reported as complete. The kit's
    /// own accesses (`Access` calls) go this way, in the loop; `act` waits for nothing but the file of [`SystemPages::File`].
    ///
    /// False, and no call: not mapped, or mapped read-only for a write. The kit then asks for the rest of its range with one fault,
    /// and comes back. Of a device without an aperture the kit keeps the frame beyond `act`, while its copy engine is at it; until
    /// that has ended it acknowledges no revocation.
    fn with_page(
        &mut self,
        key: RegionKey,
        page: u64,
        write: bool,
        act: &mut dyn FnMut(Place<'_>),
    ) -> Result<bool, DeviceError>;

    /// How many of the pages, from the first one on, are mapped with the right that is asked for: those are marked as used. Nothing is accessed.
    fn mapped_pages(&mut self, key: RegionKey, pages: PageRange, write: bool) -> Result<u64, DeviceError> {
        let mut count = 0;
        while count < pages.count && self.with_page(key, pages.first + count, write, &mut |_| {})? {
            count += 1;
        }
        Ok(count)
    }

    /// Pending pages of this nonce become valid as `runs` say; pages that are valid already stay as they are.
    fn install(&mut self, key: RegionKey, nonce: u32, runs: &[MapRun]) -> Result<InstallReport, DeviceError>;

    /// Pending pages of this nonce become invalid again.
    fn abandon(&mut self, key: RegionKey, pages: PageRange, nonce: u32) -> Result<(), DeviceError>;

    /// Pages become invalid, pending ones too. The device may go on using them until [`DevicePageTable::quiesce`].
    /// Repeatable; an unknown region is fine. True if the device had written one of them.
    fn revoke(&mut self, key: RegionKey, pages: PageRange) -> Result<bool, DeviceError>;

    /// Waits, briefly and bounded, until the device has stopped using everything revoked so far, or says that it will take
    /// longer. An error means "not stopped": the loop asks again, and meanwhile nobody gets an acknowledgement.
    fn quiesce(&mut self, ticket: u64) -> Result<Quiescence, DeviceError>;

    /// Forgets a region that was revoked and is quiescent.
    fn detach(&mut self, key: RegionKey);
}

/// Chosen by the loop, unique in this incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// Chosen by the device, unique in this incarnation: what waits for one fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FaultId(pub u64);

/// A job for the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its name.
    pub id: JobId,
    /// The space whose addresses it uses.
    pub space: u64,
    /// Index into [`Driver::kernels`].
    pub kernel: usize,
    /// As many as the kernel takes.
    pub args: Vec<u64>,
}

/// What a job gave back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobReport {
    /// The kernel's results, or why it failed.
    pub result: Result<Vec<u64>, WireError>,
    /// Device faults it met.
    pub fault_count: u64,
    /// Time on the device, waiting for faults included, in nanoseconds.
    pub run_time_ns: u64,
}

/// Runs jobs. Every submitted job ends with exactly one [`DevicePort::finished`], cancelled ones too.
pub trait JobQueue {
    /// Runs the job as soon as a unit is free. Never waits.
    fn submit(&mut self, job: Job);

    /// The fault was resolved: the job touches the page again (and may fault again). Or it failed: the job fails with this error.
    /// An unknown fault (its job ended) is ignored.
    fn resume(&mut self, fault: FaultId, outcome: Result<(), WireError>);

    /// The job ends with this error as soon as possible. Unknown jobs are ignored.
    fn cancel(&mut self, job: JobId, why: WireError);

    /// Cancels everything and returns after the device has stopped.
    fn stop(&mut self);
}

/// A kernel that jobs can name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelSpec {
    /// Name in `Submit`.
    pub name: &'static str,
    /// Arguments and results for people, one line.
    pub usage: &'static str,
    /// How many arguments it takes.
    pub argument_count: usize,
    /// Running it twice gives what running it once gives. `Submit{idempotent}` of others is refused.
    pub idempotent: bool,
}

/// Where device memory came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryOrigin {
    /// From the vault: the bytes are those of the last incarnation.
    Adopted,
    /// New and zero.
    Created,
}

/// Everything that [`Driver::open`] is given.
#[derive(Debug)]
pub struct OpenContext<'a> {
    /// This device's part of the plan.
    pub plan: &'a DevicePlan,
    /// Descriptors that the last incarnation kept below `driver/` ([`DeviceMemory::kept`]), empty at first.
    pub kept: Vec<(String, Fd)>,
    /// How the device talks to the loop; clone it into every thread.
    pub port: DevicePort,
}

/// The parts of an open device.
#[derive(Debug)]
pub struct Parts<M, E, T, Q> {
    /// Device memory.
    pub memory: M,
    /// Whether its bytes are those of the last incarnation.
    pub origin: MemoryOrigin,
    /// Needed when the memory has no aperture.
    pub engine: Option<E>,
    /// Page table, empty.
    pub table: T,
    /// Queue, idle.
    pub queue: Q,
}

/// Parts of `D`.
pub type DriverParts<D> =
    Parts<<D as Driver>::Memory, <D as Driver>::Engine, <D as Driver>::Table, <D as Driver>::Queue>;

/// A driver: its name, its kernels, and how to open the device.
pub trait Driver {
    /// Device memory.
    type Memory: DeviceMemory;
    /// Copy engine.
    type Engine: CopyEngine + 'static;
    /// Page table.
    type Table: DevicePageTable;
    /// Queue.
    type Queue: JobQueue;

    /// Name of the driver (not of the device), e.g. `soft`.
    fn name(&self) -> &'static str;

    /// Kernels in the order of [`Job::kernel`].
    fn kernels(&self) -> Vec<KernelSpec>;

    /// Adopts the memory of the last incarnation, or makes new memory, and starts the device. Mappings of an earlier
    /// incarnation are void: the tables are new.
    fn open(&mut self, context: OpenContext<'_>) -> Result<DriverParts<Self>, DeviceError>;
}

/// A fault that a job met, as the device reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceFault {
    /// What to resume.
    pub fault: FaultId,
    /// Whose job.
    pub job: JobId,
    /// Space of the job.
    pub space: u64,
    /// The address.
    pub addr: u64,
    /// The access was a write.
    pub write: bool,
    /// When the job stopped, for the latency histogram.
    pub at: Instant,
}
