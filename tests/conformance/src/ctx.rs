//! What a case works with: a session, the devices, and the steps that every case is made of.
//!
//! Under disturbance (`--chaos`, `--pause-agent`) calls may take long but give the same answers. What may differ is said here once:
//! counters begin again with each incarnation ([`Ctx::counters_hold`]), a page may be reported `Busy` or `Io` and stay
//! ([`Ctx::to_device`] asks again), and a device fault may have to be asked twice ([`Ctx::one_fault`]).

use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uhmm_sdk::{
    AccessReport, Device, Error, ErrorCode, MigrateReport, Operator, PageStatus, Pending, ResidencySummary, Session,
    Target,
};

use crate::case::{CaseArgs, CaseResult, During, Failure, ensure, ensure_eq, not_applicable};
use crate::mem::{Mem, PAGE};
use crate::pattern::{self, Rng};

/// Bytes of a 2 MiB page.
pub(crate) const PMD: u64 = 2 << 20;
/// The kernel selftests' buffer.
pub(crate) const BUF: u64 = 4 << 20;
/// Cases that fill a device need so many pieces of 2 MiB.
const LEAST_PMDS: u64 = 4;
/// How long a disturbed step is asked again.
pub(crate) const RETRY_PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at pages that a killed pager has left on their way.
pub(crate) const SETTLE_POLL: Duration = Duration::from_millis(5);

/// Bytes of a snapshot, as the kernel's selftest driver has them.
pub(crate) mod prot {
    /// No mapping, or not readable.
    pub(crate) const ERROR: u8 = 0xff;
    /// Nothing that this device could use.
    pub(crate) const NONE: u8 = 0;
    /// Readable.
    pub(crate) const READ: u8 = 1;
    /// Writable.
    pub(crate) const WRITE: u8 = 2;
    /// Mapped as part of a 2 MiB page.
    pub(crate) const PMD: u8 = 4;
    /// Mapped as part of a 1 GiB page.
    pub(crate) const PUD: u8 = 8;
    /// The zero page.
    pub(crate) const ZERO: u8 = 0x10;
    /// In this device's private memory.
    pub(crate) const PRIVATE_LOCAL: u8 = 0x20;
    /// In this device's coherent memory.
    pub(crate) const COHERENT_LOCAL: u8 = 0x40;
    /// In another device's coherent memory.
    pub(crate) const COHERENT_REMOTE: u8 = 0x50;
}

/// See the module head.
pub(crate) struct Ctx {
    pub(crate) session: Arc<Session>,
    pub(crate) args: CaseArgs,
    devices: Vec<Device>,
    notes: Mutex<Vec<String>>,
    _pauser: Option<Pauser>,
}

impl Ctx {
    /// Connects and opens the devices.
    pub(crate) fn open(args: CaseArgs) -> CaseResult<Self> {
        let session = Arc::new(Session::connect(Some(&args.run_dir)).during("Connect")?);
        Self::with_session(session, args)
    }

    /// The same over a session that exists, e.g. a forked child's own.
    pub(crate) fn with_session(session: Arc<Session>, args: CaseArgs) -> CaseResult<Self> {
        let devices: Result<Vec<Device>, Error> = args.devices.iter().map(|name| session.device(name)).collect();
        let devices = devices.during("Open the devices")?;
        let pauser = args.pause_agent.then(|| Pauser::start(Arc::clone(&session), args.seed));
        Ok(Self { session, args, devices, notes: Mutex::default(), _pauser: pauser })
    }

    pub(crate) fn run_dir(&self) -> &Path {
        &self.args.run_dir
    }

    pub(crate) fn rng(&self) -> Rng {
        Rng::new(self.args.seed)
    }

    /// Device by its place in the plan.
    pub(crate) fn device(&self, index: usize) -> CaseResult<&Device> {
        let missing = || Failure::NotApplicable(format!("The plan has {} devices of this driver", self.devices.len()));
        self.devices.get(index).ok_or_else(missing)
    }

    pub(crate) fn device_count(&self) -> usize {
        self.devices.len()
    }

    /// Device memory, for cases that fill it in pieces of 2 MiB: as many whole ones as there are.
    pub(crate) fn memory_in_huge_pages(&self) -> CaseResult<u64> {
        let memory = self.device(0)?.info().memory_bytes;
        if memory < LEAST_PMDS * PMD {
            not_applicable!("Fills device memory in pieces of 2 MiB; the device has {} KiB", memory >> 10);
        }
        Ok(memory / PMD * PMD)
    }

    /// Cases work on this much at once. Pressure is the subject of some on devices of a usual size; on a device that holds less than any
    /// case's buffer it would be the subject of all, at a page a time.
    pub(crate) fn fits(&self, len_bytes: u64) -> CaseResult {
        let memory = self.devices.iter().map(|device| device.info().memory_bytes).min().unwrap_or(u64::MAX);
        if memory < BUF && len_bytes > memory {
            not_applicable!("Works on {} KiB at once; the device has {} KiB", len_bytes >> 10, memory >> 10);
        }
        Ok(())
    }

    pub(crate) fn coherent(&self) -> bool {
        self.args.coherent
    }

    /// Nobody kills services or stops the agent.
    pub(crate) fn undisturbed(&self) -> bool {
        !self.args.chaos && !self.args.pause_agent
    }

    /// Counters of services are not reset by restarts during the case.
    pub(crate) fn counters_hold(&self) -> bool {
        !self.args.chaos
    }

    /// For cases whose subject dies with a service's incarnation.
    pub(crate) fn needs_living_services(&self, what: &str) -> CaseResult {
        if self.args.chaos {
            not_applicable!("{what} begins anew with each incarnation of a service, and services are being killed");
        }
        Ok(())
    }

    /// Operator's view of one counter.
    pub(crate) fn metric(&self, service: &str, name: &str) -> CaseResult<u64> {
        let metrics = Operator::connect(Some(self.run_dir()))?.stats(service)?;
        let found = metrics.iter().find(|metric| metric.name == name);
        found.map(|metric| metric.value).ok_or_else(|| Failure::Failed(format!("{service} has no counter {name}")))
    }

    /// Something to show beside a passed case, e.g. a measurement.
    pub(crate) fn note(&self, text: String) {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    /// All notes in one line.
    pub(crate) fn notes(&self) -> String {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).join("; ")
    }

    /// The memory of the cases about coherent devices: allocated by the SDK, whose addresses are its own.
    pub(crate) fn allocated(&self, len_bytes: u64, seed: Option<u64>) -> CaseResult<Mem> {
        self.fits(len_bytes)?;
        let mem = Mem::allocated(self.session.allocate(len_bytes).during("Allocate")?);
        if let Some(seed) = seed {
            mem.fill(seed)?;
        }
        Ok(mem)
    }

    /// Fresh private memory with a pattern, adopted; in a coherent case: allocated.
    pub(crate) fn patterned(&self, len_bytes: u64, seed: u64) -> CaseResult<Mem> {
        self.fits(len_bytes)?;
        if self.coherent() {
            return self.allocated(len_bytes, Some(seed));
        }
        let mem = Mem::private(len_bytes)?;
        mem.fill(seed)?;
        self.adopt(&mem)?;
        Ok(mem)
    }

    /// The same, of 4 KiB pages only.
    pub(crate) fn patterned_small(&self, len_bytes: u64, seed: u64) -> CaseResult<Mem> {
        if self.coherent() {
            return self.allocated(len_bytes, Some(seed));
        }
        let mem = Mem::small(len_bytes)?;
        mem.fill(seed)?;
        self.adopt(&mem)?;
        Ok(mem)
    }

    /// Never touched, adopted.
    pub(crate) fn untouched(&self, len_bytes: u64) -> CaseResult<Mem> {
        if self.coherent() {
            return self.allocated(len_bytes, None);
        }
        let mem = Mem::private(len_bytes)?;
        self.adopt(&mem)?;
        Ok(mem)
    }

    /// A region of 2 MiB pages where the kernel has them, adopted after it was filled (with a seed) or untouched.
    pub(crate) fn huge(&self, len_bytes: u64, seed: Option<u64>) -> CaseResult<Mem> {
        if self.coherent() {
            return self.allocated(len_bytes, seed);
        }
        let mem = Mem::huge(len_bytes)?;
        if let Some(seed) = seed {
            mem.fill(seed)?;
        }
        self.adopt(&mem)?;
        Ok(mem)
    }

    /// Puts a whole mapping under management.
    pub(crate) fn adopt(&self, mem: &Mem) -> CaseResult {
        self.adopt_at(mem.addr(), mem.len())
    }

    /// Puts a range under management until it is unmapped.
    pub(crate) fn adopt_at(&self, addr: u64, len_bytes: u64) -> CaseResult {
        self.fits(len_bytes)?;
        match self.session.adopt(addr, len_bytes) {
            Err(error @ Error::Kernel { .. }) if !may_follow_mappings() && is_of_mapped_file(addr)? => {
                not_applicable!(
                    "This account may not open the file behind a mapping: {}",
                    uhmm_kernel_hook::error::chain(&error)
                )
            }
            adopted => adopted.map(|_| ()).during("Adopt"),
        }
    }

    /// As adopt, for kinds of memory that a kernel or an SDK may refuse: not applicable with its reason.
    pub(crate) fn adopt_if_possible(&self, mem: &Mem) -> CaseResult {
        self.fits(mem.len())?;
        match self.session.adopt(mem.addr(), mem.len()) {
            Ok(_) => Ok(()),
            Err(error) => not_applicable!("This memory cannot be adopted: {}", uhmm_kernel_hook::error::chain(&error)),
        }
    }

    // ---- migration

    pub(crate) fn migrate(&self, addr: u64, len_bytes: u64, target: impl Into<Target>) -> Result<MigrateReport, Error> {
        self.session.migrate(addr, len_bytes, target)
    }

    /// Waits for the completion of a prefetch.
    pub(crate) fn wait_prefetch(&self, pending: Result<Pending<MigrateReport>, Error>) -> CaseResult<MigrateReport> {
        pending.and_then(Pending::wait).during("Prefetch")
    }

    /// Migrates until every page has arrived. Unless pages may be `Busy` or `Io` for a while, the first call must do it.
    fn move_all(&self, addr: u64, len_bytes: u64, target: Target, again: bool) -> CaseResult<MigrateReport> {
        let end = Instant::now() + RETRY_PATIENCE;
        loop {
            let report = self.migrate(addr, len_bytes, target).during("Migrate")?;
            let pages: u64 = report.runs.iter().map(|run| run.page_count).sum();
            ensure_eq!(pages, len_bytes / PAGE, "Pages in the report of a migration");
            if report.complete() {
                return Ok(report);
            }
            let passing = report.pages_with(PageStatus::Busy) + report.pages_with(PageStatus::Io);
            let there = report.pages_with(PageStatus::Moved) + report.pages_with(PageStatus::AlreadyThere);
            let may_retry = again && passing + there == pages;
            ensure!(may_retry && Instant::now() < end, "Migration to {target:?} is not complete: {:?}", report.runs);
        }
    }

    /// Every page of the range goes to the device.
    pub(crate) fn to_device(&self, device: usize, mem: &Mem, off: u64, len_bytes: u64) -> CaseResult<MigrateReport> {
        let target = self.device(device)?.target();
        self.move_all(mem.addr() + off, len_bytes, target, !self.undisturbed())
    }

    /// The whole mapping goes to the device.
    pub(crate) fn all_to_device(&self, device: usize, mem: &Mem) -> CaseResult<MigrateReport> {
        self.to_device(device, mem, 0, mem.len())
    }

    /// The whole mapping goes to the first device, in a case that itself kills services.
    pub(crate) fn all_moved_out(&self, mem: &Mem) -> CaseResult {
        self.move_all(mem.addr(), mem.len(), self.device(0)?.target(), true).map(|_| ())
    }

    /// Every page of the range comes home.
    pub(crate) fn to_home(&self, mem: &Mem, off: u64, len_bytes: u64) -> CaseResult<MigrateReport> {
        self.move_all(mem.addr() + off, len_bytes, Target::Home, !self.undisturbed())
    }

    // ---- device access

    /// A page that was unmapped is none for the first device. munmap returns when the pager has read of it, which is an instant before
    /// devices are told (paging-floors.md, section 5): until then reads may succeed.
    pub(crate) fn unmapped(&self, addr: u64, what: &str) -> CaseResult {
        const READS: u32 = 1000;
        let mut read = self.try_read(0, addr, PAGE)?;
        for _ in 1..READS {
            if read.is_err() {
                break;
            }
            read = self.try_read(0, addr, PAGE)?;
        }
        refused(read, ErrorCode::Fault, what).map(drop)
    }

    pub(crate) fn try_read(&self, device: usize, addr: u64, len_bytes: u64) -> CaseResult<Result<Access, Error>> {
        let mut bytes = vec![0xa5; len_bytes as usize];
        let result = self.device(device)?.read(addr, &mut bytes);
        Ok(result.map(|report| Access { bytes, report }))
    }

    pub(crate) fn try_write(&self, device: usize, addr: u64, bytes: &[u8]) -> CaseResult<Result<AccessReport, Error>> {
        Ok(self.device(device)?.write(addr, bytes))
    }

    /// The device reads the range; all its pages.
    pub(crate) fn read(&self, device: usize, mem: &Mem, off: u64, len_bytes: u64) -> CaseResult<Access> {
        let access = self.try_read(device, mem.addr() + off, len_bytes)?.during("Device read")?;
        ensure_eq!(access.report.page_count, len_bytes / PAGE, "Pages of a device read");
        Ok(access)
    }

    /// The device reads the range and finds the pattern.
    pub(crate) fn sees(&self, device: usize, mem: &Mem, off: u64, len: u64, seed: u64) -> CaseResult<AccessReport> {
        let access = self.read(device, mem, off, len)?;
        match pattern::difference(&access.bytes, &pattern::bytes(seed, off, len), off) {
            None => Ok(access.report),
            Some(difference) => Err(Failure::Failed(format!("The device sees other bytes: {difference}"))),
        }
    }

    /// [`Ctx::sees`] of the whole mapping.
    pub(crate) fn sees_all(&self, device: usize, mem: &Mem, seed: u64) -> CaseResult<AccessReport> {
        self.sees(device, mem, 0, mem.len(), seed)
    }

    /// The device reads the range and finds zeros.
    pub(crate) fn sees_zero(&self, device: usize, mem: &Mem, off: u64, len: u64) -> CaseResult<AccessReport> {
        let access = self.read(device, mem, off, len)?;
        match pattern::difference(&access.bytes, &vec![0; len as usize], off) {
            None => Ok(access.report),
            Some(difference) => Err(Failure::Failed(format!("The device does not see zeros: {difference}"))),
        }
    }

    /// The device writes the pattern to the range; all its pages.
    pub(crate) fn writes(&self, device: usize, mem: &Mem, off: u64, len: u64, seed: u64) -> CaseResult<AccessReport> {
        let bytes = pattern::bytes(seed, off, len);
        let report = self.try_write(device, mem.addr() + off, &bytes)?.during("Device write")?;
        ensure_eq!(report.page_count, len / PAGE, "Pages of a device write");
        Ok(report)
    }

    /// One range fault has resolved everything. Disturbed, a fault may have been asked again, but there was one.
    pub(crate) fn one_fault(&self, report: &AccessReport) -> CaseResult {
        if self.undisturbed() {
            ensure_eq!(report.fault_count, 1, "Device faults of one range access");
        } else {
            ensure!(report.fault_count >= 1, "Nothing was mapped, and the device met no fault");
        }
        Ok(())
    }

    /// The pages become the device's alone.
    pub(crate) fn exclusive(&self, device: usize, mem: &Mem, off: u64, len: u64) -> CaseResult<AccessReport> {
        let report = self.device(device)?.make_exclusive(mem.addr() + off, len).during("Make exclusive")?;
        ensure_eq!(report.page_count, len / PAGE, "Pages made exclusive");
        Ok(report)
    }

    // ---- where pages are

    pub(crate) fn residency(&self, mem: &Mem, off: u64, len_bytes: u64) -> CaseResult<ResidencySummary> {
        self.session.residency_summary(mem.addr() + off, len_bytes).during("Residency")
    }

    /// The same when nothing of the range is on its way any more: a fault waits for its own page only, and a device that is slow is still at the
    /// neighbours then.
    pub(crate) fn settled_residency(&self, mem: &Mem, off: u64, len_bytes: u64) -> CaseResult<ResidencySummary> {
        loop {
            let summary = self.residency(mem, off, len_bytes)?;
            if summary.moving_pages == 0 {
                return Ok(summary);
            }
            std::thread::yield_now();
        }
    }

    /// Every page of the range is on the device.
    pub(crate) fn on_device(&self, device: usize, mem: &Mem, off: u64, len_bytes: u64) -> CaseResult {
        let id = usize::from(self.device(device)?.id());
        let summary = self.residency(mem, off, len_bytes)?;
        ensure_eq!(summary.device_pages.get(id), Some(&(len_bytes / PAGE)), "Pages on the device ({summary:?})");
        Ok(())
    }

    /// No page of the range is on any device. A pager that was killed between filling pages and saying so leaves them on their way for its
    /// successor, which may have to wait for a driver that was killed as well: nobody tells when that is over.
    pub(crate) fn at_home(&self, mem: &Mem, off: u64, len_bytes: u64) -> CaseResult {
        let end = Instant::now() + RETRY_PATIENCE;
        let mut summary = self.residency(mem, off, len_bytes)?;
        while self.args.chaos && summary.moving_pages > 0 && Instant::now() < end {
            std::thread::sleep(SETTLE_POLL);
            summary = self.residency(mem, off, len_bytes)?;
        }
        let home = summary.system_pages + summary.absent_pages;
        ensure_eq!(home, len_bytes / PAGE, "Pages in system memory ({summary:?})");
        Ok(())
    }

    pub(crate) fn snapshot(&self, device: usize, mem: &Mem, off: u64, len_bytes: u64) -> CaseResult<Vec<u8>> {
        let pages = self.session.snapshot(self.device(device)?, mem.addr() + off, len_bytes).during("Snapshot")?;
        ensure_eq!(pages.len() as u64, len_bytes / PAGE, "Pages of a snapshot");
        Ok(pages.into_iter().map(|page| page.bits()).collect())
    }

    // ---- the address space

    /// Pages that nobody can read: a hole, or where there can be none, without rights.
    pub(crate) fn unreadable(&self, mem: &Mem, off: u64, len_bytes: u64) -> CaseResult {
        if self.coherent() { self.protect(mem, off, len_bytes, false, false) } else { mem.unmap(off, len_bytes) }
    }

    /// For cases in which a forked child gets pages of its own.
    pub(crate) fn needs_copy_on_write(&self) -> CaseResult {
        if self.coherent() {
            not_applicable!("The CPU reaches only memory that uhmm has allocated on a device, and children share that");
        }
        Ok(())
    }

    /// mprotect through the SDK, which tells the pager.
    pub(crate) fn protect(&self, mem: &Mem, off: u64, len_bytes: u64, read: bool, write: bool) -> CaseResult {
        self.session.protect(mem.addr() + off, len_bytes, read, write).during("Protect")
    }
}

/// The account may follow /proc/self/map_files. Without it memory that is shared and has no path cannot be adopted.
fn may_follow_mappings() -> bool {
    let opened = std::fs::read_dir("/proc/self/map_files")
        .map(|mut links| links.find_map(Result::ok).is_some_and(|link| std::fs::File::open(link.path()).is_ok()));
    opened.unwrap_or(false)
}

/// There is a file below this address, and it is mapped shared.
fn is_of_mapped_file(addr: u64) -> CaseResult<bool> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let shared = |line: &str| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let [start, end] = [start, end].map(|bound| u64::from_str_radix(bound, 16).ok());
        ((start?..end?).contains(&addr) && words.next()?.ends_with('s')).then_some(())
    };
    Ok(maps.lines().any(|line| shared(line).is_some()))
}

/// Not applicable where this account may lock too little: where pages of locked memory wait on their way is locked too, in blocks of
/// 2 MiB, one for each operation under way.
pub(crate) fn may_lock_blocks() -> CaseResult {
    const CAP_IPC_LOCK: u64 = 1 << 14;
    const ENOUGH_BYTES: u64 = 64 << 20;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = capabilities.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0);
    match rustix::process::getrlimit(rustix::process::Resource::Memlock).current {
        Some(limit) if limit < ENOUGH_BYTES && capabilities & CAP_IPC_LOCK == 0 => {
            not_applicable!(
                "This account may lock {} KiB (ulimit -l), not {}: pages of locked memory need locked places on their way",
                limit >> 10,
                ENOUGH_BYTES >> 10
            )
        }
        _ => Ok(()),
    }
}

/// What a device has read.
#[derive(Debug)]
pub(crate) struct Access {
    pub(crate) bytes: Vec<u8>,
    pub(crate) report: AccessReport,
}

/// A call must end with this error and no other.
pub(crate) fn refused<T>(result: Result<T, Error>, code: ErrorCode, what: &str) -> CaseResult<Error> {
    match result {
        Ok(_) => Err(Failure::Failed(format!("{what} succeeded where {code:?} was expected"))),
        Err(error) if error.code() == code => Ok(error),
        Err(error) => {
            let found = error.code();
            Err(Failure::Failed(format!("{what} ended with {found:?} ({error}) where {code:?} was expected")))
        }
    }
}

/// Stops the session's agent thread now and then until it is dropped.
struct Pauser {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Bounds of the time between two pauses, and of a pause.
const BETWEEN_PAUSES_MS: u64 = 60;
const PAUSE_MS: u64 = 80;

impl Pauser {
    fn start(session: Arc<Session>, seed: u64) -> Self {
        let (stop, stopped) = channel::<()>();
        let thread = std::thread::spawn(move || {
            let mut rng = Rng::new(seed ^ 0x7061_7573);
            // The agent may take its order later; the next one comes after this pause must be over, so that it also works.
            let mut pause_ms = 0;
            while let Err(RecvTimeoutError::Timeout) =
                stopped.recv_timeout(Duration::from_millis(pause_ms + 1 + rng.below(BETWEEN_PAUSES_MS)))
            {
                pause_ms = 1 + rng.below(PAUSE_MS);
                session.pause_agent(Duration::from_millis(pause_ms));
            }
        });
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Pauser {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!(?panic, "The thread that pauses the agent panicked");
        }
    }
}
