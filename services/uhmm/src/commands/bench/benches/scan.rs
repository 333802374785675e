//! The CPU reads a range that lives on the device: from its start to its end, with a stride, and in runs of 64 KiB in random order; by
//! page size. The floor: one thread fills the pages with the bare kernel's steps, ahead of a reader that goes from start to end.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use uhmm_kernel_hook::PAGE_SIZE;
use uhmm_sdk::Advice;

use super::super::bed::{Bed, Spec};
use super::super::figure::Reach;
use super::super::floor::copies::{Copies, rate};
use super::super::floor::steps::Steps;
use super::super::run::Run;
use super::managed::{Kind, Managed};
use super::touch::shuffled;

const BYTES: u64 = 512 << 20;
const RUN: u64 = 64 << 10;
const STRIDE: u64 = 4 * PAGE_SIZE;
/// Bytes that are read of each page that is met out of order.
const SOME: usize = 64;

#[derive(Clone, Copy, PartialEq)]
enum Pattern {
    Sequential,
    Strided,
    Runs,
}

impl Pattern {
    fn name(self) -> &'static str {
        match self {
            Self::Sequential => "from start to end",
            Self::Strided => "every 4th page",
            Self::Runs => "random runs of 64 KiB",
        }
    }

    /// Reads, and says how many bytes of pages it has met.
    fn read(self, len: u64, mut read: impl FnMut(u64, &mut [u8]) -> anyhow::Result<()>) -> anyhow::Result<u64> {
        let mut buffer = vec![0; RUN as usize];
        match self {
            Self::Sequential => {
                (0..len / RUN).try_for_each(|run| read(run * RUN, &mut buffer))?;
                Ok(len)
            }
            Self::Strided => {
                (0..len / STRIDE).try_for_each(|step| read(step * STRIDE, &mut buffer[..SOME]))?;
                Ok(len / STRIDE * PAGE_SIZE)
            }
            Self::Runs => {
                // A quarter of the range: nobody knows that the other runs will not be met.
                let runs = shuffled(len / RUN);
                let some = &runs[..runs.len().div_ceil(4)];
                some.iter().try_for_each(|run| read(run * RUN, &mut buffer))?;
                Ok(some.len() as u64 * RUN)
            }
        }
    }
}

pub(in super::super) fn run(run: &mut Run<'_>) -> anyhow::Result<()> {
    let bytes = run.bytes(BYTES);
    let Some(bed) = run.bed(Spec { needs: 6 * bytes, ..Spec::of(bytes + (64 << 20)) }, "")? else { return Ok(()) };
    for kind in Kind::ALL {
        if !run.wants(kind.name()) {
            continue;
        }
        if let Err(why) = kind.here() {
            run.leave_out(kind.name(), why);
            continue;
        }
        sequential(run, &bed, kind, bytes)?;
        if kind != Kind::Huge {
            around(run, &bed, kind, bytes / 4)?;
        }
    }
    Ok(())
}

fn managed(bed: &Bed, kind: Kind, bytes: u64) -> anyhow::Result<Managed> {
    let session = bed.session()?;
    let device = session.device(bed.device(0))?;
    Managed::new(session, device, kind, bytes)
}

fn scan(memory: &Managed, pattern: Pattern) -> anyhow::Result<f64> {
    memory.out()?;
    let begun = Instant::now();
    let met = pattern.read(memory.len(), |off, into| memory.read(off, into))?;
    Ok(rate(met, begun))
}

fn sequential(run: &mut Run<'_>, bed: &Bed, kind: Kind, bytes: u64) -> anyhow::Result<()> {
    let memory = managed(bed, kind, bytes)?;
    let mut steps = Steps::new(kind, bytes)?;
    let copies = Copies::new(bytes.min(128 << 20), kind == Kind::Huge)?;
    let (mut rounds, mut memcpy) = (Vec::new(), Vec::new());
    for round in run.rounds(3) {
        let ours = scan(&memory, Pattern::Sequential)?;
        let its = read_behind(&mut steps, bytes)?;
        if round > 0 {
            rounds.push((ours, its));
            memcpy.push((ours, copies.gib_s()?));
        }
    }
    let case = format!("{}, {}", kind.name(), Pattern::Sequential.name());
    run.figure(format!("{case} : bare steps"), "GiB/s", Reach::AtLeast(0.9), rounds);
    let reach = if kind == Kind::Huge { Reach::AtLeast(0.6) } else { Reach::Shown };
    run.figure(format!("{case} : memcpy"), "GiB/s", reach, memcpy);
    Ok(())
}

/// One thread brings the pages, this one reads what is there.
fn read_behind(steps: &mut Steps, bytes: u64) -> anyhow::Result<f64> {
    steps.out()?;
    let there = AtomicU64::new(0);
    let steps = &*steps;
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let filler = scope.spawn(|| {
            let done = steps.home(|done| there.store(done, Ordering::Release));
            // A reader must not wait for pages that do not come.
            there.store(bytes, Ordering::Release);
            done
        });
        let mut buffer = vec![0; RUN as usize];
        let mut filled = Ok(());
        for off in (0..bytes).step_by(RUN as usize) {
            while there.load(Ordering::Acquire) <= off {
                std::thread::yield_now();
            }
            if filler.is_finished() && there.load(Ordering::Acquire) < bytes {
                break;
            }
            filled = steps.read(off, &mut buffer);
            if filled.is_err() {
                break;
            }
        }
        filler.join().map_err(|_| anyhow::anyhow!("The filler of the floor panicked"))?.and(filled)
    })?;
    Ok(rate(bytes, begun))
}

/// No pattern may lose by the neighbours that come along: the same with one page a fault.
fn around(run: &mut Run<'_>, bed: &Bed, kind: Kind, bytes: u64) -> anyhow::Result<()> {
    let memory = managed(bed, kind, bytes)?;
    for pattern in [Pattern::Strided, Pattern::Runs] {
        let mut rounds = Vec::new();
        for round in run.rounds(3) {
            let advise = |advice| memory.session().advise(memory.addr(), memory.len(), advice);
            advise(Advice::Granularity(None))?;
            let ours = scan(&memory, pattern)?;
            advise(Advice::Granularity(Some(0)))?;
            let alone = scan(&memory, pattern)?;
            if round > 0 {
                rounds.push((ours, alone));
            }
        }
        let case = format!("{}, {} : without fault-around", kind.name(), pattern.name());
        run.figure(case, "GiB/s", Reach::AtLeast(0.95), rounds);
    }
    Ok(())
}
