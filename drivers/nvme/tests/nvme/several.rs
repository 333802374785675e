//! Several copies of the pager in flight at once, on a device that fails meanwhile.

use std::time::Duration;

use crate::common::{AnyError, Bench, engine};
use uhmm_driver_kit::{CopyEngine, CopyOp, CopyWork, DeviceError, Frames, PAGE_BYTES, StagedCopy};
use uhmm_models::nvme::{NvmeFault, NvmeOptions};

const COPIES: u64 = 24;
const PAGES: u32 = 100;
/// Staging areas that are used in turns.
const SLOTS: u64 = 8;

/// The pager's side: a slot is filled when its copy is asked for and looked at when it has ended.
struct Pager<'a> {
    op: CopyOp,
    next: u64,
    in_flight: usize,
    most: usize,
    ended: Vec<(u64, bool)>,
    staging: &'a uhmm_kernel_hook::Window,
}

impl<'a> Pager<'a> {
    fn new(op: CopyOp, staging: &'a uhmm_kernel_hook::Window) -> Self {
        Self { op, next: 0, in_flight: 0, most: 0, ended: Vec::new(), staging }
    }

    fn word(ticket: u64, page: u64) -> u64 {
        ticket << 32 | page << 1 | 1
    }

    fn places(copy: &StagedCopy) -> impl Iterator<Item = (u64, u64)> + use<> {
        let first = u64::from(copy.staging_page);
        (0..u64::from(copy.frames.count)).map(move |page| (page, (first + page) * PAGE_BYTES + 8 * (page % 512)))
    }
}

impl CopyWork for Pager<'_> {
    fn next(&mut self) -> Option<StagedCopy> {
        if self.next == COPIES || self.in_flight as u64 == SLOTS {
            return None;
        }
        let ticket = self.next;
        self.next += 1;
        self.in_flight += 1;
        self.most = self.most.max(self.in_flight);
        let frames = Frames { first: ticket as u32 * PAGES, count: PAGES };
        let staging_page = (ticket % SLOTS) as u32 * PAGES;
        let copy = StagedCopy { ticket, op: self.op, frames, staging_page };
        for (page, at) in Self::places(&copy) {
            let word = if self.op == CopyOp::CopyIn { Self::word(ticket, page) } else { 0 };
            self.staging.store_u64(at, word).expect("inside");
        }
        Some(copy)
    }

    fn done(&mut self, copy: StagedCopy, outcome: Result<(), DeviceError>) {
        self.in_flight -= 1;
        if self.op == CopyOp::CopyOut && outcome.is_ok() {
            for (page, at) in Self::places(&copy) {
                let found = self.staging.load_u64(at).expect("inside");
                assert_eq!(found, Self::word(copy.ticket, page), "copy {}, page {page}", copy.ticket);
            }
        }
        self.ended.push((copy.ticket, outcome.is_ok()));
    }
}

/// There and back while a fault meets the command with this number; which copies failed on either way, and how many resets it took.
fn there_and_back(nth: u64, fault: NvmeFault) -> Result<([Vec<u64>; 2], u64), AnyError> {
    let bench = Bench::new(NvmeOptions { mdts: 3, ..NvmeOptions::default() })?;
    bench.control.set_latency(Duration::from_micros(50));
    let driver = bench.driver(None)?;
    let (namespace, _) = driver.namespace(false)?;
    let (mut engine, staging) = engine(&namespace, SLOTS * u64::from(PAGES) * PAGE_BYTES)?;
    let before = driver.controller.counters().resets;
    bench.control.inject(nth, fault);
    let mut failed = [Vec::new(), Vec::new()];
    for (op, failed) in [CopyOp::CopyIn, CopyOp::CopyOut].into_iter().zip(&mut failed) {
        let mut pager = Pager::new(op, &staging.window);
        engine.serve(&staging, &mut pager);
        assert!(pager.most > 1, "several at once");
        let mut told: Vec<u64> = pager.ended.iter().map(|(ticket, _)| *ticket).collect();
        told.sort_unstable();
        assert_eq!(told, (0..COPIES).collect::<Vec<_>>(), "each is told of once");
        failed.extend(pager.ended.iter().filter(|(_, ok)| !ok).map(|(ticket, _)| *ticket));
    }
    Ok((failed, driver.controller.counters().resets - before))
}

#[test]
fn nvme_several_copies_in_flight_survive_a_reset() -> Result<(), AnyError> {
    for fault in [NvmeFault::StuckQueue, NvmeFault::WrongId, NvmeFault::DropCompletion] {
        let (failed, resets) = there_and_back(20, fault)?;
        assert_eq!(failed, [Vec::<u64>::new(), Vec::new()], "{fault:?}");
        assert!(resets <= 1, "{fault:?}: {resets}");
    }
    Ok(())
}

#[test]
fn nvme_several_copies_in_flight_are_all_told_when_the_controller_is_pulled_out() -> Result<(), AnyError> {
    let (failed, _) = there_and_back(150, NvmeFault::Removal)?;
    let [out, home] = failed;
    assert!(!out.is_empty() && home.len() as u64 == COPIES, "out {out:?}, home {home:?}");
    assert!(!out.contains(&0), "what was complete before is not taken back: {out:?}");
    Ok(())
}
