//! A session: this process under management.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use uhmm_ipc::message::pager::{Advice, Only, PageStatus, ResidencyRun, Target};
use uhmm_ipc::message::{Call, ErrorCode, Reply, TraceId, pager};
use uhmm_kernel_hook::{AddrRange, Features, UffdKind, UffdState, own_memory};

use crate::adopt_all::Everything;
use crate::adopted::AdoptedRanges;
use crate::agent::AgentKind;
use crate::child::Sentinel;
use crate::device::{Device, DeviceInfo, ask_info};
use crate::frames::Allocations;
use crate::links::{Identification, Introduction, Left, Links, Peer, Space};
use crate::pending::Pending;
use crate::range::{PAGE_BYTES, check_range};
use crate::region::Region;
use crate::residency::{MigrateReport, ResidencySummary, append_runs};
use crate::{Error, forking, paths};

/// How long `connect` and `device` wait for a service that is there but does not answer (it may be restarting).
pub(crate) const OPEN_DEADLINE: Duration = Duration::from_secs(10);
/// How often a thread that waits for unread events lets others run before it sleeps between looks.
const SETTLE_YIELDS: u32 = 200;
const SETTLE_PAUSE: Duration = Duration::from_micros(200);
/// Runs in one answer to a query.
const MAX_RUNS: usize = uhmm_ipc::constants::MAX_RUNS as usize;

/// What regions and devices share with their session.
pub(crate) struct Inner {
    pub(crate) links: Links,
    pub(crate) space: Space,
    run_dir: PathBuf,
    devices: Mutex<HashMap<String, DeviceInfo>>,
    kind: UffdKind,
    pub(crate) sentinel: Sentinel,
    adopted: Mutex<Adopted>,
    pub(crate) allocations: Arc<Allocations>,
}

#[derive(Default)]
struct Adopted {
    ranges: AdoptedRanges,
    /// What the program has given back by itself: `adopt_all` leaves it alone as long as it is mapped.
    released: AdoptedRanges,
}

/// A process's connection to uhmm: regions are allocated here, moved by address and used by devices.
///
/// One a process is enough; it can be shared by all threads. It survives restarts of every service: calls wait for the service to come
/// back, unless they carry a deadline.
///
/// Regions and devices keep what they need of it alive. When the last of them and the session itself are dropped, it ends: what was adopted comes
/// home and belongs to the program alone again, with its bytes, then agent and thread end and the quota is free. That is waited for, ten seconds at
/// most and not at all while the pager is away; otherwise it goes on behind the program's back. What cannot come home (its device is lost) stays
/// managed as long as the process lives, and so does a forked child that shows memory which its parent allocated.
pub struct Session {
    /// Of `adopt_all`. Its thread ends before the rest goes.
    pub(crate) everything: Mutex<Option<Everything>>,
    pub(crate) inner: Arc<Inner>,
}

impl Session {
    /// Connects to the supervisor's services in `run_dir` (default: see [`run_dir`](crate::run_dir)) and puts this process under
    /// management: makes its userfaultfd, starts the agent (a process that shares this one's memory) and introduces itself to the pager.
    ///
    /// # Errors
    /// [`Error::NotRunning`] when no supervisor has been started there, [`Error::Kernel`] when this account may not make a
    /// userfaultfd, [`ErrorCode::TimedOut`] when the pager does not answer for ten seconds.
    pub fn connect(run_dir: Option<&Path>) -> Result<Self, Error> {
        let run_dir = paths::run_dir(run_dir);
        if !paths::has_service(&run_dir, "pager")? {
            return Err(Error::NotRunning { run_dir });
        }
        Self::begin(run_dir, Identification::Open { nonce: TraceId::fresh().0 }, Sentinel::new()?, None)
    }

    /// `kind`: of the userfaultfd, where it is not made here.
    fn begin(run_dir: PathBuf, who: Identification, sentinel: Sentinel, kind: Option<UffdKind>) -> Result<Self, Error> {
        // The program may go elsewhere.
        let run_dir = std::path::absolute(&run_dir).unwrap_or(run_dir);
        let allocations = Arc::<Allocations>::default();
        let known = allocations.clone();
        let introduction =
            Introduction { run_dir: run_dir.clone(), who, sentinel: sentinel.clone(), allocations: known };
        let (links, space, made) = Links::start(introduction)?;
        let kind = kind.unwrap_or(made);
        let space = space.wait_timeout(OPEN_DEADLINE).unwrap_or_else(|| {
            let text = format!("The pager in {} does not answer: see `uhmm status`", run_dir.display());
            Err(Error::Service { code: ErrorCode::TimedOut, text })
        });
        let space = space.inspect_err(|_| links.close(Left::default()))?;
        tracing::info!(space = space.id, features = format_args!("{:#x}", space.features), ?kind, "Session opened");
        let devices = Mutex::new(HashMap::new());
        let adopted = Mutex::default();
        Ok(Self {
            everything: Mutex::default(),
            inner: Arc::new(Inner { links, space, run_dir, devices, kind, sentinel, adopted, allocations }),
        })
    }

    /// In a forked child: its own session, on the address space that it has inherited. The parent's session, regions and devices
    /// must neither be used nor dropped here (`std::mem::forget`): their threads do not exist in this process.
    ///
    /// # Errors
    /// [`Error::NotForked`] when fork events are not granted, or nobody serves this process's faults.
    pub fn in_child(&self) -> Result<Self, Error> {
        if !self.fork_supported() {
            return Err(Error::NotForked);
        }
        let (space, token) = self.inner.sentinel.identity()?;
        if space == 0 || space == self.inner.space.id {
            return Err(Error::NotForked);
        }
        let who = Identification::Child { space, token };
        let run_dir = self.inner.run_dir.clone();
        Self::begin(run_dir, who, self.inner.sentinel.clone(), Some(self.inner.kind))
    }

    /// Whether forked children are managed too. Without it managed memory is left out of children.
    pub fn fork_supported(&self) -> bool {
        self.inner.forks()
    }

    /// Test hook: the agent stands still for this long. Private memory that is being taken out or put back waits; CPU faults on what is on
    /// a device do not need it.
    pub fn pause_agent(&self, duration: Duration) {
        if let Err(error) = self.inner.links.ask(move |links| links.pause_agent(duration)) {
            tracing::warn!(%error, "The agent cannot be paused");
        }
    }

    /// Who takes this process's private pages out of its address space now.
    ///
    /// # Errors
    /// [`Error::AgentGone`] when the session's own thread was killed.
    pub fn agent(&self) -> Result<AgentKind, Error> {
        self.inner.links.ask(|links| Ok(links.agent_kind()))
    }

    /// Whether system calls may be given migrated memory. [`UffdKind::Full`]: yes, the kernel waits for the page like the program
    /// does. User mode only: they fail with EFAULT until the page is touched; what `uhmm doctor` says about /dev/userfaultfd
    /// or `vm.unprivileged_userfaultfd` changes that.
    pub fn uffd_kind(&self) -> UffdKind {
        self.inner.kind
    }

    /// This process's number at the pager.
    pub fn space(&self) -> u64 {
        self.inner.space.id
    }

    /// Allocates `len_bytes` bytes of zeroed, managed memory. Nothing is rounded; pages cost nothing before they are touched.
    ///
    /// # Errors
    /// [`Error::EmptyRange`], [`Error::UnalignedLength`]; [`Error::Kernel`] when there is no memory; the pager's own (quota).
    pub fn allocate(&self, len_bytes: u64) -> Result<Region, Error> {
        Region::create(Arc::clone(&self.inner), len_bytes)
    }

    /// Moves the pages of a range and waits. Partial success is success: look at the report. Addresses stay what they are.
    ///
    /// # Errors
    /// The range is not page aligned or not managed, or the device is unknown.
    pub fn migrate(&self, addr: u64, len_bytes: u64, target: impl Into<Target>) -> Result<MigrateReport, Error> {
        self.migrate_async(addr, len_bytes, target)?.wait()
    }

    /// [`Session::migrate`] without waiting. The memory can be used meanwhile; a page that is touched waits for its own copy.
    pub fn migrate_async(
        &self,
        addr: u64,
        len_bytes: u64,
        target: impl Into<Target>,
    ) -> Result<Pending<MigrateReport>, Error> {
        self.move_to(addr, len_bytes, target.into(), false, Only::All)
    }

    fn move_to(
        &self,
        addr: u64,
        len_bytes: u64,
        target: Target,
        prefetch: bool,
        only: Only,
    ) -> Result<Pending<MigrateReport>, Error> {
        check_range(addr, len_bytes)?;
        let call = pager::Call::Migrate { addr, len_bytes, target, prefetch, only };
        Ok(self.inner.links.call(Peer::Pager, Call::Pager(call), None, |reply| match reply {
            Reply::Pager(pager::Reply::Migrated { moved_pages, runs, why }) => {
                Ok(MigrateReport { moved_pages, runs, why })
            }
            _ => Err(Error::StrangeReply { question: "Migrate" }),
        }))
    }

    /// Brings a range to a device (or home) ahead of its use there, and notes that as its last prefetch location.
    pub fn prefetch(
        &self,
        addr: u64,
        len_bytes: u64,
        target: impl Into<Target>,
    ) -> Result<Pending<MigrateReport>, Error> {
        self.move_to(addr, len_bytes, target.into(), true, Only::All)
    }

    /// Moves those pages of a range to a device that are in system memory; what is on other devices stays there
    /// ([`PageStatus::NotSelected`]).
    pub fn migrate_from_system(&self, addr: u64, len_bytes: u64, device: &Device) -> Result<MigrateReport, Error> {
        self.move_to(addr, len_bytes, device.target(), false, Only::InSystem)?.wait()
    }

    /// Brings those pages of a range home that are on a device; what is on other devices stays there ([`PageStatus::NotSelected`]).
    pub fn migrate_from_device(&self, addr: u64, len_bytes: u64, device: &Device) -> Result<MigrateReport, Error> {
        self.move_to(addr, len_bytes, Target::Home, false, Only::OnDevice(device.id()))?.wait()
    }

    /// [`Session::migrate`] (of what is in system memory only, with `from_system`), and the device maps what is there then: its accesses
    /// meet no fault.
    pub fn migrate_and_map(
        &self,
        addr: u64,
        len_bytes: u64,
        device: &Device,
        from_system: bool,
    ) -> Result<MigrateReport, Error> {
        let only = if from_system { Only::InSystem } else { Only::All };
        let report = self.move_to(addr, len_bytes, device.target(), false, only)?.wait()?;
        for run in &report.runs {
            if matches!(run.status, PageStatus::Moved | PageStatus::AlreadyThere) {
                device.map(addr + run.first_page * PAGE_BYTES, run.page_count * PAGE_BYTES)?;
            }
        }
        Ok(report)
    }

    /// Brings every page of this process home and keeps it there (or lets it leave again): for whatever reads this process in ways that
    /// cannot wait for a page (/proc/PID/mem, ptrace, a core dump). Jobs that need a page wait. Returns how many pages came.
    pub fn stay_home(&self, stay: bool) -> Result<u64, Error> {
        let call = pager::Call::Home { pid: 0, stay, process: 0 };
        let answer = self.inner.links.call(Peer::Pager, Call::Pager(call), None, |reply| match reply {
            Reply::Pager(pager::Reply::Evicted { page_count }) => Ok(page_count),
            _ => Err(Error::StrangeReply { question: "Home" }),
        });
        answer.wait()
    }

    /// Before a signal ends this process whose default action is a core dump, every page comes home; that takes `patience` at most. Signals that
    /// the program handles or ignores are left alone, and so are forked children.
    pub fn home_on_fatal_signals(&self, patience: Duration) -> Result<(), Error> {
        self.inner.links.ask_before_fatal_signals(patience)
    }

    /// Brings this process's pages home from a device, coldest first; 0: all of them. Returns how many came.
    pub fn evict(&self, device: &Device, page_count: u64) -> Result<u64, Error> {
        let call = pager::Call::Evict { device: device.id(), page_count };
        let answer = self.inner.links.call(Peer::Pager, Call::Pager(call), None, |reply| match reply {
            Reply::Pager(pager::Reply::Evicted { page_count }) => Ok(page_count),
            _ => Err(Error::StrangeReply { question: "Evict" }),
        });
        answer.wait()
    }

    /// Where the pages of a range are, in order and without gaps. A snapshot: pages may move while it is taken.
    pub fn residency(&self, addr: u64, len_bytes: u64) -> Result<Vec<ResidencyRun>, Error> {
        let page_count = check_range(addr, len_bytes)?;
        let mut runs = Vec::new();
        let mut done_pages = 0;
        while done_pages < page_count {
            let start = addr + done_pages * PAGE_BYTES;
            let answer = self.query(start, (page_count - done_pages) * PAGE_BYTES)?;
            let covered_pages = append_runs(&mut runs, done_pages, answer);
            if covered_pages == 0 || covered_pages > page_count - done_pages {
                return Err(Error::StrangeReply { question: "Query" });
            }
            done_pages += covered_pages;
        }
        Ok(runs)
    }

    /// [`Session::residency`], summed.
    pub fn residency_summary(&self, addr: u64, len_bytes: u64) -> Result<ResidencySummary, Error> {
        let mut summary = ResidencySummary::default();
        self.residency(addr, len_bytes)?.iter().for_each(|run| summary.add(run));
        Ok(summary)
    }

    fn query(&self, addr: u64, len_bytes: u64) -> Result<Vec<ResidencyRun>, Error> {
        let call = pager::Call::Query { addr, len_bytes };
        let answer = self.inner.links.call(Peer::Pager, Call::Pager(call), None, |reply| match reply {
            Reply::Pager(pager::Reply::Residency { runs }) if runs.len() <= MAX_RUNS => Ok(runs),
            _ => Err(Error::StrangeReply { question: "Query" }),
        });
        answer.wait()
    }

    /// Says how a range will be used.
    pub fn advise(&self, addr: u64, len_bytes: u64, advice: Advice) -> Result<(), Error> {
        check_range(addr, len_bytes)?;
        self.inner.done("Advise", pager::Call::Advise { addr, len_bytes, advice }, None).wait()
    }

    /// Brings a range home and keeps it there until [`Session::unpin`]: for memory that I/O refers to (O_DIRECT, RDMA,
    /// registered io_uring buffers), which nobody but the program knows of.
    pub fn pin(&self, addr: u64, len_bytes: u64) -> Result<(), Error> {
        self.advise(addr, len_bytes, Advice::Pin)
    }

    /// Ends [`Session::pin`].
    pub fn unpin(&self, addr: u64, len_bytes: u64) -> Result<(), Error> {
        self.advise(addr, len_bytes, Advice::Unpin)
    }

    /// Opens a queue on a device, by its name in the plan. Opening it again gives the same queue.
    ///
    /// # Errors
    /// [`Error::NoSuchService`]; [`ErrorCode::TimedOut`] when its driver does not answer for ten seconds.
    pub fn device(&self, name: &str) -> Result<Device, Error> {
        if !paths::valid_name(name) {
            return Err(Error::BadDeviceName { name: name.into() });
        }
        let open = |info| Device { session: Arc::clone(&self.inner), name: name.into(), info, buffers: Arc::default() };
        let known = self.inner.devices.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        if let Some(info) = known {
            return Ok(open(info));
        }
        if !paths::has_service(&self.inner.run_dir, name)? {
            return Err(Error::NoSuchService { service: name.into(), run_dir: self.inner.run_dir.clone() });
        }
        self.inner.links.open_driver(name, &self.inner.space);
        let info = ask_info(&self.inner, name, OPEN_DEADLINE).wait()?;
        if info.coherent {
            forking::prepare_for(&self.inner)?;
        }
        self.inner.devices.lock().unwrap_or_else(PoisonError::into_inner).insert(name.into(), info.clone());
        Ok(open(info))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.links.close(Left { adopted: self.adopted_list(), kept_out: !self.forks() });
    }
}

impl Inner {
    /// Waits until the pager has read all that other threads' munmap, mremap and fork have to tell it. New memory may lie where
    /// other memory was a moment ago, and its management must not be taken for the other's.
    pub(crate) fn settle(&self) -> Result<(), Error> {
        self.settle_while(&|| true).map(drop)
    }

    /// [`Inner::settle`] while it is wanted; false when it is not any more.
    pub(crate) fn settle_while(&self, wanted: &dyn Fn() -> bool) -> Result<bool, Error> {
        let mut tries = 0u32;
        while self.links.ask(|links| links.uffd_state())? == UffdState::EventUnread {
            tries += 1;
            if !wanted() {
                return Ok(false);
            }
            if tries < SETTLE_YIELDS {
                std::thread::yield_now();
            } else {
                // Nothing tells when somebody else has read an event; the pager may be starting again.
                std::thread::park_timeout(SETTLE_PAUSE);
            }
        }
        Ok(true)
    }

    /// Private memory is managed from now on.
    pub(crate) fn note_adopted(&self, range: AddrRange) {
        let mut adopted = self.adopted.lock().unwrap_or_else(PoisonError::into_inner);
        adopted.ranges.insert(range);
        adopted.released.remove(range);
    }

    /// And is not any more, by the program's will.
    pub(crate) fn note_released(&self, range: AddrRange) {
        self.adopted.lock().unwrap_or_else(PoisonError::into_inner).released.insert(range);
        self.forget_adopted(range);
    }

    /// And is not any more.
    pub(crate) fn forget_adopted(&self, range: AddrRange) {
        self.adopted.lock().unwrap_or_else(PoisonError::into_inner).ranges.remove(range);
    }

    /// What this session has adopted, with what the program has unmapped since.
    pub(crate) fn adopted_list(&self) -> AdoptedRanges {
        self.adopted.lock().unwrap_or_else(PoisonError::into_inner).ranges.clone()
    }

    /// What the program has released, with what it has unmapped since.
    pub(crate) fn released_list(&self) -> AdoptedRanges {
        self.adopted.lock().unwrap_or_else(PoisonError::into_inner).released.clone()
    }

    /// Forgets what is not mapped any more of `released`, which was asked for before `mapped` was read, and of what is adopted. `mapped` is in
    /// order.
    pub(crate) fn forget_unmapped(&self, mapped: &[AddrRange], released: &AdoptedRanges) {
        let gone = |range: &AddrRange| {
            let next = mapped.partition_point(|mapped| mapped.end() <= range.start);
            mapped.get(next).is_none_or(|mapped| !mapped.overlaps(range))
        };
        let mut adopted = self.adopted.lock().unwrap_or_else(PoisonError::into_inner);
        released.all().into_iter().filter(gone).for_each(|range| adopted.released.remove(range));
        // Whoever adopts adds to the list when the memory is mapped, so what is not mapped under the lock is not about to be needed.
        let still_gone = |range: &AddrRange| own_memory::mappings(*range).is_ok_and(|found| found.is_empty());
        let gone: Vec<AddrRange> = adopted.ranges.all().into_iter().filter(gone).filter(still_gone).collect();
        gone.into_iter().for_each(|range| adopted.ranges.remove(range));
    }

    /// Forked children are managed too.
    pub(crate) fn forks(&self) -> bool {
        Features::from_bits_truncate(self.space.features).contains(Features::EVENT_FORK)
    }

    /// A call to the pager that is answered with `Done`.
    pub(crate) fn done(&self, question: &'static str, call: pager::Call, deadline: Option<Duration>) -> Pending<()> {
        self.links.call(Peer::Pager, Call::Pager(call), deadline, move |reply| match reply {
            Reply::Pager(pager::Reply::Done) => Ok(()),
            _ => Err(Error::StrangeReply { question }),
        })
    }
}
