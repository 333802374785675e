//! Carrying out what the fault book decides, and telling it what came of it.
//!
//! ```text
//!   device thread --port--> FaultBook --Lookup/Ask--> mirror --answer--> install --> FaultBook --Resume--> device thread
//!                               |
//!                               +--Attach--> own table, then AttachTable --> pager: only then may faults of the region leave,
//!                                            since the pager may revoke in the table without a message
//! ```

use std::collections::VecDeque;
use std::time::Instant;

use uhmm_ipc::CallId;
use uhmm_ipc::message::pager::{MapKind, MapRun};
use uhmm_ipc::message::{ErrorCode, Reply, WireError, mirror, pager};
use uhmm_kit::record::{self, Place, What, Why};

use crate::access::AccessBook;
use crate::device::{
    DeviceFault, DeviceMemory, DevicePageTable, Driver, JobQueue, PAGE_BYTES, PageRange, RegionKey, RegionMap,
};
use crate::error::DriverError;
use crate::fault::{FaultAction, FaultEvent, WindowId};
use crate::port::DeviceEvent;
use crate::run::{Asked, Attached, DriverLoop, Due};

impl<D: Driver> DriverLoop<D> {
    /// Everything that the device has reported.
    pub(crate) fn device_events(&mut self) -> Result<(), DriverError> {
        for event in self.port.drain() {
            match event {
                DeviceEvent::Fault(fault) => self.device_fault(fault),
                DeviceEvent::Finished { job, report } => self.job_finished(job, report),
                DeviceEvent::Quiesced { ticket } => self.quiescent(ticket),
                DeviceEvent::Lost { reason } => {
                    self.let_go_of_device()?;
                    return Err(DriverError::Lost { device: self.plan.name.clone(), reason });
                }
            }
        }
        Ok(())
    }

    fn device_fault(&mut self, fault: DeviceFault) {
        let DeviceFault { fault: id, job, space, addr, write, at } = fault;
        self.stats.device_faults += 1;
        if !self.jobs.is_running(job) || !self.spaces.contains_key(&space) {
            let text = format!("Space {space} of the job at address {addr:#x} is gone");
            return self.queue.resume(id, Err(WireError::new(ErrorCode::Fault, text)));
        }
        tracing::debug!(request = self.jobs.trace(job).0, job = job.0, space, addr, write, "Device fault");
        self.suspended.insert(id, (job, at));
        self.step_faults(FaultEvent::Fault { fault: id, job, space, addr, write, range: None });
    }

    /// Feeds the book until it has nothing more to say.
    pub(crate) fn step_faults(&mut self, event: FaultEvent) {
        let mut events = VecDeque::from([event]);
        let mut actions = Vec::new();
        while let Some(event) = events.pop_front() {
            self.book.handle(event, &mut actions);
            for action in actions.drain(..) {
                events.extend(self.act(action));
            }
        }
    }

    /// Does one thing; returns what is known of it at once.
    fn act(&mut self, action: FaultAction) -> Option<FaultEvent> {
        match action {
            FaultAction::Lookup { job, space, addr } => {
                let trace = self.jobs.trace(job);
                self.ask_mirror(mirror::Call::Lookup { space, addr }, trace, Asked::Lookup { space });
            }
            FaultAction::Attach { key } => return self.attach(key),
            FaultAction::Drop { key } => self.retire(vec![key], None, None),
            FaultAction::Ask { window, job, key, pages, fault_page, write, range, nonce } => {
                let exclusive = range.is_some_and(|range| range.exclusive);
                let upgrade = match range {
                    Some(_) => PageRange { first: fault_page, count: pages.end() - fault_page },
                    None => PageRange { first: fault_page, count: 1 },
                };
                if let Err(error) = self.table.begin(key, pages, nonce, (write || exclusive).then_some(upgrade)) {
                    let error = WireError::new(ErrorCode::Io, format!("The device's page table failed: {error}"));
                    return Some(FaultEvent::Failed { window, error });
                }
                self.stats.fault_asks += 1;
                let (space, region) = (key.space, key.region);
                let (first_page, page_count) = (pages.first, pages.count);
                let whole = range.is_some();
                let call =
                    mirror::Call::Fault { space, region, first_page, page_count, fault_page, write, whole, exclusive };
                let trace = self.jobs.trace(job);
                let addr = self.regions.get(&key).map_or(0, |region| region.map.addr + fault_page * PAGE_BYTES);
                let now = record::Event::new(What::DeviceFault, record::now_ns());
                let (pages, to) = (page_count, Place::Device(self.plan.id));
                let begun = record::Event { trace: trace.0, space, addr, pages, to, ..now };
                self.service.record.event(&begun);
                self.fault_begins.insert(window, begun);
                self.ask_mirror(call, trace, Asked::Fault { window });
            }
            FaultAction::Abandon { key, pages, nonce } => {
                if let Err(error) = self.table.abandon(key, pages, nonce) {
                    tracing::error!(%error, %key, "Pending pages could not be given up");
                }
            }
            FaultAction::Resume { fault, outcome } => {
                if let Some((_, since)) = self.suspended.remove(&fault) {
                    let waited = Instant::now().saturating_duration_since(since);
                    self.stats.fault_waited(waited);
                    let ns = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
                    self.service.record.observe(self.fault_waits, ns);
                }
                self.stats.failed_faults += u64::from(outcome.is_err());
                match AccessBook::job_of(fault) {
                    Some(job) => return self.access_resumed(job, outcome),
                    None => self.queue.resume(fault, outcome),
                }
            }
            FaultAction::RetryAfter { retry, after } => {
                self.after(after, Due::Retry(retry));
            }
        }
        None
    }

    /// Makes the region's table. When the pager shall revoke in it, the region waits for the pager's word.
    fn attach(&mut self, key: RegionKey) -> Option<FaultEvent> {
        let failed = |error: WireError| Some(FaultEvent::AttachFailed { key, error });
        let Some(region) = self.regions.get_mut(&key) else {
            return failed(WireError::new(ErrorCode::Io, format!("The driver does not know {key}")));
        };
        match self.table.attach(&region.map) {
            Err(error) => {
                self.regions.remove(&key);
                failed(WireError::new(ErrorCode::Io, format!("The device cannot map {key}: {error}")))
            }
            // Without aperture or gate the pager cannot do without us: revocation goes by message.
            Ok(Some(table)) if self.table.gate().is_some() && self.memory.aperture().is_some() => {
                region.table = Some(table.clone());
                self.refresh_preambles();
                let call = pager::Call::AttachTable { space: key.space, region: key.region, table };
                self.ask_pager(call, Default::default(), Asked::Attach { key });
                None
            }
            Ok(_) => {
                self.refresh_preambles();
                Some(FaultEvent::Attached { key })
            }
        }
    }

    /// A call to mirror or pager ended.
    pub(crate) fn answered(&mut self, call: CallId, result: Result<Reply, WireError>) {
        let Some((upstream, asked)) = self.asked.remove(&call) else { return };
        let result = match upstream {
            crate::uplink::Upstream::Mirror => self.mirror.judge(result),
            crate::uplink::Upstream::Pager => self.pager.judge(result),
        };
        match asked {
            Asked::Lookup { space } => self.looked_up(space, result),
            Asked::Fault { window } => self.fault_answered(window, result),
            Asked::Open { space, token, client } => self.space_opened(space, token, client, result),
            Asked::Attach { key } => self.table_shown(key, result),
            Asked::Told => {
                if let Err(error) = result {
                    tracing::debug!(%error, ?upstream, "A notice was refused");
                }
            }
        }
    }

    fn looked_up(&mut self, space: u64, result: Result<Reply, WireError>) {
        let event = match result {
            Ok(Reply::Mirror(mirror::Reply::Region { region, addr, len_bytes, device_read_only, memory })) => {
                let key = RegionKey { space, region };
                let page_count = len_bytes / PAGE_BYTES;
                let map = RegionMap { key, addr, page_count, device_read_only, memory };
                if self.spaces.contains_key(&space) {
                    self.regions.insert(key, Attached { map, table: None });
                }
                FaultEvent::Found { key, addr, page_count }
            }
            Ok(_) => FaultEvent::LookupFailed { space, error: unexpected("Lookup") },
            Err(error) => FaultEvent::LookupFailed { space, error },
        };
        self.step_faults(event);
    }

    fn table_shown(&mut self, key: RegionKey, result: Result<Reply, WireError>) {
        match result {
            Err(error) if error.code == ErrorCode::NotFound => self.region_gone(key),
            result => {
                if let Err(error) = result {
                    tracing::warn!(%error, %key, "The pager did not take the table: revocation goes by message");
                }
                self.step_faults(FaultEvent::Attached { key });
            }
        }
    }

    fn fault_answered(&mut self, window: WindowId, result: Result<Reply, WireError>) {
        if let Some(begun) = self.fault_begins.remove(&window) {
            let time_ns = record::now_ns();
            let why = if result.is_ok() { Why::None } else { Why::Failed };
            let value = time_ns.saturating_sub(begun.time_ns);
            self.service.record.event(&record::Event { what: What::DeviceFaultDone, why, time_ns, value, ..begun });
        }
        // Nobody wants a window whose region is gone; its table is gone as well.
        let Some(open) = self.book.window(window) else { return };
        let (key, nonce, pages, range_job) = (open.key, open.nonce, open.pages, open.range_job());
        let runs = match result {
            Ok(Reply::Mirror(mirror::Reply::Mapped { runs, .. })) => clip_runs(&runs, pages, self.memory.frame_count()),
            Ok(_) => Err(unexpected("Fault")),
            Err(error) => Err(error),
        };
        let installed = runs.and_then(|runs| match self.table.install(key, nonce, &runs) {
            Ok(report) => Ok((runs, report)),
            Err(error) => Err(WireError::new(ErrorCode::Io, format!("The device's page table failed: {error}"))),
        });
        let event = match installed {
            Ok((runs, report)) => {
                self.stats.installed_pages += report.installed_pages;
                self.stats.refused_pages += report.refused.len() as u64;
                if let (Some((job, writable)), Some(region)) = (range_job, self.regions.get(&key)) {
                    let end = answered_end(&runs, &report.refused, pages, writable);
                    self.accesses.covered_until(job, region.map.addr + end * PAGE_BYTES);
                }
                FaultEvent::Installed { window, runs, refused: report.refused }
            }
            Err(error) => FaultEvent::Failed { window, error },
        };
        self.step_faults(event);
    }
}

fn unexpected(call: &str) -> WireError {
    WireError::new(ErrorCode::Protocol, format!("{call} was answered with something else than was asked"))
}

/// One past the last page, from the first of the window on without a gap, that was answered (`writable`: to be written) and not revoked
/// meanwhile.
fn answered_end(runs: &[MapRun], refused: &[u64], pages: PageRange, writable: bool) -> u64 {
    let answered = runs.iter().filter(|run| run.writable || !writable).fold(pages.first, |end, run| {
        if run.first_page <= end { end.max(run.first_page + run.page_count) } else { end }
    });
    refused.iter().copied().filter(|page| *page >= pages.first).fold(answered.min(pages.end()), u64::min)
}

/// The parts of the runs inside the window. Frames that the device does not have fail the whole answer.
fn clip_runs(runs: &[MapRun], pages: PageRange, frame_count: u32) -> Result<Vec<MapRun>, WireError> {
    let mut clipped = Vec::with_capacity(runs.len());
    for run in runs {
        if let MapKind::Frame(first) = run.kind
            && u64::from(first).checked_add(run.page_count).is_none_or(|end| end > u64::from(frame_count))
        {
            let text = format!("The pager names {} frames from {first}, the device has {frame_count}", run.page_count);
            return Err(WireError::new(ErrorCode::Protocol, text));
        }
        let first = run.first_page.max(pages.first);
        let end = run.first_page.saturating_add(run.page_count).min(pages.end());
        if first >= end {
            continue;
        }
        let kind = match run.kind {
            // In range: the run's frames were checked above.
            MapKind::Frame(frame) => MapKind::Frame(frame.saturating_add((first - run.first_page) as u32)),
            MapKind::System => MapKind::System,
        };
        clipped.push(MapRun { first_page: first, page_count: end - first, kind, writable: run.writable });
    }
    Ok(clipped)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first_page: u64, page_count: u64, kind: MapKind) -> MapRun {
        MapRun { first_page, page_count, kind, writable: true }
    }

    #[test]
    fn runs_are_cut_to_the_window_and_frames_move_along() {
        let runs = [run(60, 10, MapKind::Frame(5)), run(70, 100, MapKind::System), run(500, 4, MapKind::System)];
        let clipped = clip_runs(&runs, PageRange { first: 64, count: 64 }, 1000);
        assert_eq!(clipped, Ok(vec![run(64, 6, MapKind::Frame(9)), run(70, 58, MapKind::System)]));
    }

    #[test]
    fn an_answer_counts_up_to_its_first_gap() {
        let window = PageRange { first: 10, count: 10 };
        let runs = [run(10, 3, MapKind::Frame(1)), run(13, 7, MapKind::Frame(9))];
        assert_eq!(answered_end(&runs, &[], window, true), 20);
        assert_eq!(answered_end(&runs, &[15], window, true), 15);
        assert_eq!(answered_end(&runs[..1], &[], window, true), 13);
        assert_eq!(answered_end(&runs[1..], &[], window, true), 10);
        let read_only = [MapRun { writable: false, ..runs[0] }, runs[1]];
        assert_eq!(answered_end(&read_only, &[], window, false), 20, "enough for a read");
        assert_eq!(answered_end(&[MapRun { writable: false, ..runs[0] }, runs[1]], &[], window, true), 10);
    }

    #[test]
    fn frames_beyond_the_device_are_refused_even_when_the_sum_overflows() {
        let window = PageRange { first: 0, count: 64 };
        for bad in [run(0, 9, MapKind::Frame(56)), run(0, u64::MAX, MapKind::Frame(1))] {
            assert_eq!(clip_runs(&[bad], window, 64).map_err(|error| error.code), Err(ErrorCode::Protocol));
        }
        assert!(clip_runs(&[run(0, 8, MapKind::Frame(56))], window, 64).is_ok());
    }
}
