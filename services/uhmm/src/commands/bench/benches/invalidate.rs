//! A range that devices map goes away: by munmap, and by the program's word (`Session::discard`), with 1, 2, 4 and 8 mirrors, one of which
//! is slow: its page table is its own, so it is told by a message and answers by one.

use std::time::Instant;

use uhmm_kernel_hook::program::ProgramMemory;
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};
use uhmm_sdk::{Advice, Device, Region, Session};

use super::super::bed::{Bed, Spec};
use super::super::figure::{Reach, median};
use super::super::floor::bare::Bare;
use super::super::place::Place;
use super::super::run::Run;

const LEN: u64 = 16 * PAGE_SIZE;
const FAST: usize = 7;

/// Who maps it: so many of the fast ones, and the slow one.
const PARTIES: [(usize, bool); 5] = [(1, false), (2, false), (4, false), (0, true), (7, true)];

fn name(fast: usize, slow: bool) -> String {
    match (fast, slow) {
        (1, false) => "1 mirror".into(),
        (0, true) => "the slow mirror alone".into(),
        (_, false) => format!("{fast} mirrors"),
        (_, true) => format!("{} mirrors, one slow", fast + 1),
    }
}

struct Mirrors {
    fast: Vec<Device>,
    slow: Device,
}

impl Mirrors {
    fn open(bed: &Bed, session: &Session) -> anyhow::Result<Self> {
        let fast = (0..FAST).map(|index| session.device(bed.device(index))).collect::<Result<_, _>>()?;
        Ok(Self { fast, slow: session.device(bed.device(FAST))? })
    }

    /// All of them read it where it is.
    fn read(&self, addr: u64, (fast, slow): (usize, bool)) -> anyhow::Result<()> {
        let mut bytes = vec![0; LEN as usize];
        for device in self.fast.iter().take(fast).chain(slow.then_some(&self.slow)) {
            device.read(addr, &mut bytes)?;
        }
        Ok(())
    }
}

/// Times in microseconds, for each party.
fn parties(mut each: impl FnMut((usize, bool)) -> anyhow::Result<f64>) -> anyhow::Result<Vec<f64>> {
    PARTIES.iter().map(|party| each(*party)).collect()
}

/// Microseconds.
fn timed(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let begun = Instant::now();
    work()?;
    Ok(begun.elapsed().as_secs_f64() * 1e6)
}

pub(in super::super) fn run(run: &mut Run<'_>) -> anyhow::Result<()> {
    let spec = Spec { devices: FAST, slow: 1, aperture: Some(true), place: Place::OneCpu, ..Spec::of(16 << 20) };
    let Some(bed) = run.bed(spec, "")? else { return Ok(()) };
    let session = bed.session()?;
    let mirrors = Mirrors::open(&bed, &session)?;
    let bare = Bare::start(run, Place::OneCpu, &[])?;
    let region = session.allocate(LEN)?;
    session.advise(region.addr(), LEN, Advice::ReadMostly(true))?;
    let samples = if run.short { 3 } else { 15 };
    let (mut discards, mut unmaps, mut events) = (Vec::new(), Vec::new(), Vec::new());
    for round in run.rounds(5) {
        let middle = |each: &dyn Fn() -> anyhow::Result<f64>| {
            let all = (0..samples).map(|_| each()).collect::<anyhow::Result<Vec<_>>>()?;
            anyhow::Ok(median(all.into_iter()))
        };
        let discard = parties(|party| middle(&|| discard(&session, &region, &mirrors, party)))?;
        let unmap = parties(|party| middle(&|| unmap(&session, &mirrors, party)))?;
        let event = middle(&|| event(&bare))?;
        if round > 0 {
            discards.push(discard);
            unmaps.push(unmap);
            events.push(event);
        }
    }
    show(run, "discard", &discards);
    show(run, "munmap", &unmaps);
    for (index, (fast, slow)) in PARTIES.into_iter().enumerate() {
        let rounds = unmaps.iter().zip(&events).map(|(all, event)| (all[index], *event)).collect();
        run.figure(format!("munmap, {} : bare event", name(fast, slow)), "us", Reach::Shown, rounds);
    }
    Ok(())
}

/// Each beside the slowest of its mirrors alone.
fn show(run: &mut Run<'_>, what: &str, rounds: &[Vec<f64>]) {
    const ALONE: usize = 0;
    const SLOW_ALONE: usize = 3;
    for (index, (fast, slow)) in PARTIES.into_iter().enumerate() {
        let slowest = if slow { SLOW_ALONE } else { ALONE };
        if index == slowest {
            continue;
        }
        let beside = rounds.iter().map(|all| (all[index], all[slowest])).collect();
        let case = format!("{what}, {} : the slowest alone", name(fast, slow));
        run.figure(case, "us", Reach::AtMost(1.3), beside);
    }
}

fn discard(session: &Session, region: &Region, mirrors: &Mirrors, party: (usize, bool)) -> anyhow::Result<f64> {
    region.bytes().fill(0, LEN, 1)?;
    mirrors.read(region.addr(), party)?;
    timed(|| Ok(session.discard(region.addr(), LEN)?))
}

/// Shared anonymous memory, which devices map where it is.
fn unmap(session: &Session, mirrors: &Mirrors, party: (usize, bool)) -> anyhow::Result<f64> {
    let memory = ProgramMemory::shared(LEN)?;
    memory.write(0, &vec![1; LEN as usize])?;
    session.adopt(memory.addr(), LEN)?;
    mirrors.read(memory.addr(), party)?;
    timed(|| Ok(memory.unmap(0, LEN)?))
}

/// munmap of memory whose userfaultfd tells a bare handler of it.
fn event(bare: &Bare) -> anyhow::Result<f64> {
    let memory = ProgramMemory::private(LEN)?;
    memory.write(0, &vec![1; LEN as usize])?;
    let _told = bare.hear_of(AddrRange { start: memory.addr(), len: LEN })?;
    timed(|| Ok(memory.unmap(0, LEN)?))
}
