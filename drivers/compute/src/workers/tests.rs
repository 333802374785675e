//! The units against a hand-driven loop: the test plays the driver kit, so that every order of events is its choice.

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use uhmm_driver_kit::{
    DeviceError, DeviceEvent, DevicePageTable, PAGE_BYTES, PageRange, RegionKey, RegionMap, SharedTable,
};
use uhmm_ipc::message::pager::{MapKind, MapRun, Memory};
use uhmm_kernel_hook::{Window, memfd};

use super::*;
use crate::kernels::{self, DeviceView};

const KEY: RegionKey = RegionKey { space: 1, region: 2 };
const AT: u64 = 0x5000_0000;
const PAGES: u64 = 16;
/// Only a broken test waits this long.
const PATIENCE: Duration = Duration::from_secs(20);

fn panics(_: &mut dyn DeviceView, _: &[u64]) -> KernelResult<Vec<u64>> {
    panic!("on purpose")
}

struct Bench {
    table: SharedTable,
    workers: Workers,
    memory: Arc<Window>,
    port: DevicePort,
    woken: Receiver<()>,
    events: VecDeque<DeviceEvent>,
    kernels: Arc<[Kernel]>,
}

impl Bench {
    fn new(threads: u32) -> Result<Self, DeviceError> {
        let mut table = SharedTable::create(threads, true)?;
        let memory = Arc::new(memfd::create_sealed("uhmm-test", PAGES * PAGE_BYTES)?);
        let memory = Memory::Sealed { memory, offset_bytes: 0 };
        table.attach(&RegionMap { key: KEY, addr: AT, page_count: PAGES, device_read_only: false, memory })?;
        let (wake, woken) = channel();
        let port = DevicePort::new(move || {
            // The receiver is gone only when the test is over.
            let _ = wake.send(());
        });
        let broken =
            Kernel { name: "panics", usage: "panics() -> never", argument_count: 0, idempotent: true, run: panics };
        let kernels: Arc<[Kernel]> = kernels::all().into_iter().chain([broken]).collect();
        let memory = Arc::new(Window::anonymous(PAGES * PAGE_BYTES)?);
        let frames = (0..threads).map(|_| UnitFrames::Window(memory.clone())).collect();
        let workers = Workers::start(&table, &port, &kernels, frames)?;
        Ok(Self { table, workers, memory, port, woken, events: VecDeque::new(), kernels })
    }

    fn submit(&mut self, id: u64, kernel: &str, args: &[u64]) {
        let kernel = self.kernels.iter().position(|known| known.name == kernel).expect("kernel exists");
        self.workers.submit(Job { id: JobId(id), space: 1, kernel, args: args.to_vec() });
    }

    fn next(&mut self) -> DeviceEvent {
        loop {
            if let Some(event) = self.events.pop_front() {
                return event;
            }
            self.woken.recv_timeout(PATIENCE).expect("the device says something");
            self.events.extend(self.port.drain());
        }
    }

    fn fault(&mut self) -> DeviceFault {
        match self.next() {
            DeviceEvent::Fault(fault) => fault,
            other => panic!("a fault was expected: {other:?}"),
        }
    }

    fn finished(&mut self) -> (u64, JobReport) {
        match self.next() {
            DeviceEvent::Finished { job, report } => (job.0, report),
            other => panic!("an end was expected: {other:?}"),
        }
    }

    /// Maps the page to the frame of the same number and resumes.
    fn resolve(&mut self, fault: &DeviceFault) -> Result<(), DeviceError> {
        let page = (fault.addr - AT) / PAGE_BYTES;
        let nonce = fault.fault.0 as u32;
        let pages = PageRange { first: page, count: 1 };
        self.table.begin(KEY, pages, nonce, fault.write.then_some(pages))?;
        let kind = MapKind::Frame(page as u32);
        self.table.install(KEY, nonce, &[MapRun { first_page: page, page_count: 1, kind, writable: fault.write }])?;
        self.workers.resume(fault.fault, Ok(()));
        Ok(())
    }
}

#[test]
fn a_job_is_suspended_at_each_page_and_gives_the_right_sum() -> Result<(), DeviceError> {
    let mut bench = Bench::new(1)?;
    for word in 0..PAGES * 512 {
        bench.memory.store_u64(word * 8, word)?;
    }
    bench.submit(1, "sum", &[AT, PAGES * PAGE_BYTES]);
    for page in 0..PAGES {
        let fault = bench.fault();
        assert_eq!((fault.addr, fault.write, fault.job), (AT + page * PAGE_BYTES, false, JobId(1)));
        bench.resolve(&fault)?;
    }
    let (_, report) = bench.finished();
    let words = PAGES * 512;
    assert_eq!(report.result, Ok(vec![words * (words - 1) / 2]));
    assert_eq!(report.fault_count, PAGES);
    assert!(report.run_time_ns > 0);
    Ok(())
}

#[test]
fn units_run_jobs_at_the_same_time_and_further_jobs_wait() -> Result<(), DeviceError> {
    let mut bench = Bench::new(2)?;
    for job in 0..3 {
        bench.submit(job, "sum", &[AT + job * PAGE_BYTES, 8]);
    }
    // Both units are inside their jobs, neither finished: the third job has no unit.
    let (first, second) = (bench.fault(), bench.fault());
    assert_ne!(first.job, second.job);
    assert!(bench.port.drain().is_empty());
    bench.resolve(&second)?;
    assert_eq!(JobId(bench.finished().0), second.job);
    let third = bench.fault();
    assert_eq!(third.job, JobId(2));
    bench.resolve(&third)?;
    bench.resolve(&first)?;
    let mut ended = [bench.finished().0, bench.finished().0];
    ended.sort_unstable();
    assert_eq!(ended.map(JobId), [first.job, JobId(2)]);
    Ok(())
}

#[test]
fn a_failed_fault_fails_its_job_with_the_same_error() -> Result<(), DeviceError> {
    let mut bench = Bench::new(1)?;
    bench.submit(1, "fill", &[AT - PAGE_BYTES, 10, 1]);
    let fault = bench.fault();
    assert!(fault.write && fault.addr == AT - PAGE_BYTES);
    let error = WireError::new(ErrorCode::Fault, "Device write of address 0x4ffff000 failed");
    bench.workers.resume(fault.fault, Err(error.clone()));
    assert_eq!(bench.finished().1.result, Err(error));
    Ok(())
}

#[test]
fn waiting_and_suspended_jobs_can_be_cancelled_and_are_reported_once() -> Result<(), DeviceError> {
    let mut bench = Bench::new(1)?;
    bench.submit(1, "sum", &[AT, 8]);
    bench.submit(2, "sum", &[AT, 8]);
    let fault = bench.fault();
    let why = |text: &str| WireError::new(ErrorCode::Stale, text);
    bench.workers.cancel(JobId(2), why("two"));
    assert_eq!(bench.finished(), (2, JobReport { result: Err(why("two")), fault_count: 0, run_time_ns: 0 }));
    bench.workers.cancel(JobId(1), why("one"));
    let (job, report) = bench.finished();
    assert_eq!((job, report.result), (1, Err(why("one"))));
    // Late answers and repeated cancels find nobody.
    bench.workers.resume(fault.fault, Ok(()));
    bench.workers.cancel(JobId(1), why("again"));
    bench.submit(3, "sum", &[AT, 8]);
    let fault = bench.fault();
    assert_eq!(fault.job, JobId(3));
    bench.resolve(&fault)?;
    assert_eq!(bench.finished().1.result, Ok(vec![0]));
    Ok(())
}

#[test]
fn an_endless_job_ends_when_it_is_cancelled() -> Result<(), DeviceError> {
    let mut bench = Bench::new(1)?;
    // A list of one node that is its own successor.
    bench.memory.store_u64(0, AT)?;
    bench.submit(1, "list_walk", &[AT, 0, 8]);
    let fault = bench.fault();
    bench.resolve(&fault)?;
    bench.workers.cancel(JobId(1), WireError::new(ErrorCode::TimedOut, "Deadline"));
    assert_eq!(bench.finished().1.result.map_err(|error| error.code), Err(ErrorCode::TimedOut));
    Ok(())
}

#[test]
fn a_kernel_that_panics_costs_its_job_and_not_the_unit() -> Result<(), DeviceError> {
    let mut bench = Bench::new(1)?;
    bench.submit(1, "panics", &[]);
    assert_eq!(bench.finished().1.result.map_err(|error| error.code), Err(ErrorCode::Io));
    bench.submit(2, "list_walk", &[0, 0, 0]);
    assert_eq!(bench.finished().1.result, Ok(vec![0, 0]));
    Ok(())
}

#[test]
fn stop_ends_suspended_jobs_and_joins_the_units() -> Result<(), DeviceError> {
    let mut bench = Bench::new(2)?;
    bench.submit(1, "sum", &[AT, 8]);
    bench.submit(2, "sum", &[AT, 8]);
    bench.submit(3, "sum", &[AT, 8]);
    bench.fault();
    bench.fault();
    bench.workers.stop();
    let mut ended = [bench.finished().0, bench.finished().0, bench.finished().0];
    ended.sort_unstable();
    assert_eq!(ended, [1, 2, 3]);
    Ok(())
}

#[test]
fn revocation_races_lose_no_addition() -> Result<(), DeviceError> {
    const ADDITIONS: u64 = 200_000;
    let mut bench = Bench::new(2)?;
    let slot = AT + 3 * PAGE_BYTES + 16;
    bench.submit(1, "atomic_add", &[slot, 1, ADDITIONS]);
    bench.submit(2, "atomic_add", &[slot, 1, ADDITIONS]);
    // Whenever a unit faults, the page moves to another frame first: bytes are copied only while nobody is inside.
    let (mut submitted, mut ended, mut frame, mut moves) = (2, 0, 3, 0);
    while ended < submitted {
        match bench.next() {
            DeviceEvent::Finished { report, .. } => {
                assert!(report.result.is_ok(), "{report:?}");
                ended += 1;
                // On a busy machine a job may end before this thread took the page away once: then there is one more.
                if moves < 20 {
                    submitted += 1;
                    bench.submit(submitted, "atomic_add", &[slot, 1, ADDITIONS]);
                }
            }
            DeviceEvent::Fault(fault) => {
                bench.table.revoke(KEY, PageRange { first: 3, count: 1 })?;
                while bench.table.quiesce(0).is_err() {}
                let target = if frame == 3 { 9 } else { 3 };
                bench.memory.copy_within(frame * PAGE_BYTES, target * PAGE_BYTES, PAGE_BYTES)?;
                bench.memory.fill(frame * PAGE_BYTES, PAGE_BYTES, 0)?;
                frame = target;
                moves += 1;
                let pages = PageRange { first: 3, count: 1 };
                bench.table.begin(KEY, pages, moves, Some(pages))?;
                let kind = MapKind::Frame(frame as u32);
                bench.table.install(KEY, moves, &[MapRun { first_page: 3, page_count: 1, kind, writable: true }])?;
                bench.workers.resume(fault.fault, Ok(()));
                // Take it away again, so that the units keep faulting.
                if moves < 200 {
                    bench.table.revoke(KEY, PageRange { first: 3, count: 1 })?;
                }
            }
            DeviceEvent::Quiesced { .. } => {}
            DeviceEvent::Lost { reason } => panic!("{reason}"),
        }
    }
    assert_eq!(bench.memory.load_u64(frame * PAGE_BYTES + 16)?, submitted * ADDITIONS, "after {moves} moves");
    Ok(())
}
