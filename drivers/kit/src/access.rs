//! Direct accesses: a client has the device read or write a range by virtual address, without any kernel. Every driver can do it,
//! because the kit does it: it walks the device's page table as the device would, and asks for the whole rest of the range at
//! the first page that is missing.
//!
//! ```text
//!   Access --> [ walk: 64 pages a turn ] --all pages--> Accessed{pages, faults}
//!                   |            ^
//!                   | missing    | resumed
//!                   v            |
//!              [ one range fault: fault book, mirror, pager ] --failed--> error
//! ```
//! The walk runs in the driver's loop, so revocations by message cannot run meanwhile; those that the pager does itself are kept out
//! by the loop's place in the gate ([`DevicePageTable::with_page`]).

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Instant;

use uhmm_ipc::message::driver::AccessOp;
use uhmm_ipc::message::{ErrorCode, Fd, Reply, TraceId, WireError, driver};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kernel_hook::{HookError, Prot, Window, memfd};

use crate::device::{DevicePageTable, Driver, FaultId, JobId, PAGE_BYTES, Place, RegionKey, SystemPages};
use crate::fault::{FaultEvent, FaultRange};
use crate::run::{DriverLoop, Due};

/// Pages of one turn: some tens of microseconds, so that the loop's other work is not kept waiting.
const TURN_PAGES: u64 = 64;
/// Faults of accesses are named by this bit and their job; the device's own never have it.
const ACCESS_FAULT: u64 = 1 << 63;

/// What a client asked for.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub space: u64,
    pub addr: u64,
    pub len_bytes: u64,
    pub op: AccessOp,
    pub buffer: Option<Fd>,
}

impl Wanted {
    fn page_count(&self) -> u64 {
        self.len_bytes / PAGE_BYTES
    }

    fn writes(&self) -> bool {
        self.op != AccessOp::Read
    }
}

/// One access under way.
#[derive(Debug)]
struct Access {
    wanted: Wanted,
    buffer: Option<Window>,
    done_pages: u64,
    fault_count: u64,
    trace: TraceId,
}

/// Accesses under way.
#[derive(Debug, Default)]
pub(crate) struct AccessBook {
    accesses: BTreeMap<JobId, Access>,
    /// Those that do not wait for a fault, in turn.
    ready: VecDeque<JobId>,
}

impl AccessBook {
    pub(crate) fn has_work(&self) -> bool {
        !self.ready.is_empty()
    }

    pub(crate) fn contains(&self, job: JobId) -> bool {
        self.accesses.contains_key(&job)
    }

    /// The access that a fault belongs to.
    pub(crate) fn job_of(fault: FaultId) -> Option<JobId> {
        (fault.0 & ACCESS_FAULT != 0).then_some(JobId(fault.0 & !ACCESS_FAULT))
    }
}

/// How a turn ended.
enum Turn {
    More,
    Done,
    Missing,
    Failed(WireError),
}

impl<D: Driver> DriverLoop<D> {
    pub(crate) fn begin_access(
        &mut self,
        conn: ConnId,
        call: CallId,
        trace: TraceId,
        deadline: Option<Instant>,
        wanted: Wanted,
    ) -> Result<(), WireError> {
        let buffer = check(&wanted)?;
        if self.window.is_none() && wanted.op != AccessOp::MakeExclusive {
            let text = "This device's memory has no aperture, so the driver kit cannot access it: submit a kernel";
            return Err(WireError::new(ErrorCode::Invalid, text));
        }
        let job = self.jobs.open_access(conn, call, wanted.space, trace)?;
        if let Some(deadline) = deadline {
            let timer = self.after(deadline.saturating_duration_since(Instant::now()), Due::JobDeadline(job));
            self.job_timers.insert(job, timer);
        }
        self.accesses.accesses.insert(job, Access { wanted, buffer, done_pages: 0, fault_count: 0, trace });
        self.accesses.ready.push_back(job);
        Ok(())
    }

    /// One turn of one access.
    pub(crate) fn step_access(&mut self) {
        let Some(job) = self.accesses.ready.pop_front() else { return };
        let Some(mut access) = self.accesses.accesses.remove(&job) else { return };
        let turn = self.walk(&mut access);
        let (pages, fault_count) = (access.wanted.page_count(), access.fault_count);
        let missing = matches!(turn, Turn::Missing).then(|| self.missing(job, &mut access));
        self.accesses.accesses.insert(job, access);
        match turn {
            Turn::More => self.accesses.ready.push_back(job),
            Turn::Missing => missing.into_iter().for_each(|fault| self.step_faults(fault)),
            Turn::Failed(error) => self.end_access(job, Err(error)),
            Turn::Done => self.end_access(job, Ok(driver::Reply::Accessed { page_count: pages, fault_count })),
        }
    }

    fn walk(&mut self, access: &mut Access) -> Turn {
        for _ in 0..TURN_PAGES {
            if access.done_pages == access.wanted.page_count() {
                return Turn::Done;
            }
            let addr = access.wanted.addr + access.done_pages * PAGE_BYTES;
            let Some((key, page)) = self.attached_at(access.wanted.space, addr) else { return Turn::Missing };
            // What was exclusive before its fault is not known: the first page of each piece is asked for.
            if access.wanted.op == AccessOp::MakeExclusive && access.fault_count == 0 {
                return Turn::Missing;
            }
            let (window, mut result) = (&self.window, Ok(()));
            let lent = self.table.with_page(key, page, access.wanted.writes(), &mut |place| {
                result = transfer(access, window.as_ref(), place);
            });
            match lent {
                Ok(true) => {}
                Ok(false) => return Turn::Missing,
                Err(error) => return Turn::Failed(broken(addr, &error.to_string())),
            }
            if let Err(failure) = result {
                return Turn::Failed(failure.at(addr));
            }
            access.done_pages += 1;
        }
        Turn::More
    }

    fn attached_at(&self, space: u64, addr: u64) -> Option<(RegionKey, u64)> {
        let of_space = RegionKey { space, region: 0 }..=RegionKey { space, region: u64::MAX };
        self.regions.range(of_space).find_map(|(key, attached)| {
            let page = addr.checked_sub(attached.map.addr)? / PAGE_BYTES;
            (page < attached.map.page_count).then_some((*key, page))
        })
    }

    fn missing(&mut self, job: JobId, access: &mut Access) -> FaultEvent {
        access.fault_count += 1;
        self.stats.device_faults += 1;
        let Wanted { space, addr, len_bytes, op, .. } = access.wanted;
        let (fault, at) = (FaultId(ACCESS_FAULT | job.0), addr + access.done_pages * PAGE_BYTES);
        tracing::debug!(request = access.trace.0, job = job.0, space, addr = at, ?op, "Range fault");
        self.suspended.insert(fault, (job, Instant::now()));
        let range = Some(FaultRange { end: addr + len_bytes, exclusive: op == AccessOp::MakeExclusive });
        FaultEvent::Fault { fault, job, space, addr: at, write: access.wanted.writes(), range }
    }

    /// The range fault was answered.
    pub(crate) fn access_resumed(&mut self, job: JobId, outcome: Result<(), WireError>) {
        match outcome {
            Ok(()) if self.accesses.contains(job) => self.accesses.ready.push_back(job),
            Ok(()) => {}
            Err(error) => self.end_access(job, Err(error)),
        }
    }

    /// Tells the client, unless it is gone.
    pub(crate) fn end_access(&mut self, job: JobId, result: Result<driver::Reply, WireError>) {
        if self.accesses.accesses.remove(&job).is_none() {
            return;
        }
        self.accesses.ready.retain(|other| *other != job);
        if let Some(timer) = self.job_timers.remove(&job) {
            self.cancel_timer(timer);
        }
        self.suspended.retain(|_, (of, _)| *of != job);
        self.step_faults(FaultEvent::JobGone { job });
        let Some(origin) = self.jobs.finished(job) else { return };
        self.stats.jobs += 1;
        self.stats.failed_jobs += u64::from(result.is_err());
        self.service.reactor.reply(origin.conn, origin.call, result.map(Reply::Driver));
    }
}

/// The range and its buffer.
fn check(wanted: &Wanted) -> Result<Option<Window>, WireError> {
    let invalid = |text: String| WireError::new(ErrorCode::Invalid, text);
    let Wanted { addr, len_bytes, op, buffer, .. } = wanted;
    let aligned = addr.is_multiple_of(PAGE_BYTES) && len_bytes.is_multiple_of(PAGE_BYTES);
    if *len_bytes == 0 || !aligned || addr.checked_add(*len_bytes).is_none() {
        return Err(invalid(format!("Range [{addr:#x}, +{len_bytes:#x}) is empty, wraps, or is not page aligned")));
    }
    let Some(buffer) = buffer else {
        let needless = *op == AccessOp::MakeExclusive;
        return if needless { Ok(None) } else { Err(invalid(format!("{op:?} needs a buffer"))) };
    };
    let refused = |error: HookError| invalid(format!("The buffer is refused: {error}"));
    memfd::check_sealed(buffer.as_fd(), *len_bytes).map_err(refused)?;
    Window::map(buffer.as_fd(), 0, *len_bytes, Prot::ReadWrite).map(Some).map_err(refused)
}

/// Why a page could not be accessed.
#[derive(Debug)]
struct TransferError {
    code: ErrorCode,
    text: String,
}

impl TransferError {
    fn at(self, addr: u64) -> WireError {
        WireError::new(self.code, format!("Device access of address {addr:#x} failed: {}", self.text))
    }
}

impl From<HookError> for TransferError {
    fn from(error: HookError) -> Self {
        Self { code: ErrorCode::Io, text: error.to_string() }
    }
}

impl From<&str> for TransferError {
    fn from(text: &str) -> Self {
        Self { code: ErrorCode::Io, text: text.into() }
    }
}

impl From<std::io::Error> for TransferError {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Self { code: ErrorCode::Fault, text: "it lies behind the end of its file".into() },
            _ => Self { code: ErrorCode::Io, text: error.to_string() },
        }
    }
}

/// One page.
fn transfer(access: &Access, memory: Option<&Window>, place: Place<'_>) -> Result<(), TransferError> {
    let (Some(buffer), op) = (&access.buffer, access.wanted.op) else { return Ok(()) };
    let at = access.done_pages * PAGE_BYTES;
    let (bytes, offset) = match place {
        Place::Frame(frame) => (memory.ok_or("the device has no aperture")?, u64::from(frame) * PAGE_BYTES),
        Place::System(SystemPages::Mapped(window), page) => (window, page * PAGE_BYTES),
        Place::System(SystemPages::Private, _) => return Err("private memory was mapped in place".into()),
        Place::System(SystemPages::File(file), page) => {
            let mut page_bytes = vec![0; PAGE_BYTES as usize];
            let offset = page * PAGE_BYTES;
            match op {
                AccessOp::Read => {
                    file.read(offset, &mut page_bytes)?;
                    buffer.write(at, &page_bytes)?;
                }
                AccessOp::Write => {
                    buffer.read(at, &mut page_bytes)?;
                    file.write(offset, &page_bytes)?;
                }
                AccessOp::FetchAdd(_) => return Err("a file's pages cannot be changed atomically from here".into()),
                AccessOp::MakeExclusive => {}
            }
            return Ok(());
        }
    };
    match op {
        AccessOp::Read => bytes.copy_to(offset, buffer, at, PAGE_BYTES)?,
        AccessOp::Write => buffer.copy_to(at, bytes, offset, PAGE_BYTES)?,
        AccessOp::FetchAdd(value) => {
            for word in (0..PAGE_BYTES).step_by(8) {
                let before = bytes.atomic_u64(offset + word)?.fetch_add(value, Ordering::SeqCst);
                buffer.store_u64(at + word, before)?;
            }
        }
        AccessOp::MakeExclusive => {}
    }
    Ok(())
}

fn broken(addr: u64, why: &str) -> WireError {
    WireError::new(ErrorCode::Io, format!("Device access of address {addr:#x} failed: {why}"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn wanted(addr: u64, len_bytes: u64, op: AccessOp, buffer_bytes: Option<u64>) -> Wanted {
        let buffer = buffer_bytes.map(|len| Arc::new(memfd::create_sealed("uhmm-test", len).unwrap()));
        Wanted { space: 1, addr, len_bytes, op, buffer }
    }

    #[test]
    fn ranges_and_buffers_are_checked_before_anything_begins() {
        let ok = |wanted: Wanted| check(&wanted).map(|_| ()).map_err(|error| error.code);
        assert_eq!(ok(wanted(4096, 8192, AccessOp::Read, Some(8192))), Ok(()));
        assert_eq!(ok(wanted(4096, 8192, AccessOp::MakeExclusive, None)), Ok(()));
        for bad in [
            wanted(4097, 8192, AccessOp::Read, Some(8192)),
            wanted(4096, 0, AccessOp::Read, Some(4096)),
            wanted(4096, 100, AccessOp::Read, Some(4096)),
            wanted(u64::MAX - 4095, 8192, AccessOp::Read, Some(8192)),
            wanted(4096, 8192, AccessOp::Write, None),
            wanted(4096, 8192, AccessOp::Write, Some(4096)),
        ] {
            assert_eq!(ok(bad), Err(ErrorCode::Invalid));
        }
    }

    #[test]
    fn faults_of_accesses_are_told_from_the_devices_own() {
        assert_eq!(AccessBook::job_of(FaultId(ACCESS_FAULT | 7)), Some(JobId(7)));
        assert_eq!(AccessBook::job_of(FaultId(7)), None);
    }

    #[test]
    fn an_addition_returns_the_words_from_before() {
        let memory = Window::anonymous(8192).unwrap();
        memory.store_u64(4096 + 8, 5).unwrap();
        let of = wanted(0, 4096, AccessOp::FetchAdd(u64::MAX), Some(4096));
        let buffer = check(&of).unwrap();
        let access = Access { wanted: of, buffer, done_pages: 0, fault_count: 0, trace: TraceId(0) };
        transfer(&access, Some(&memory), Place::Frame(1)).unwrap();
        assert_eq!((memory.load_u64(4096).unwrap(), memory.load_u64(4096 + 8).unwrap()), (u64::MAX, 4));
        assert_eq!(access.buffer.unwrap().load_u64(8).unwrap(), 5);
    }
}
