//! CPU faults that cost more than one copy: of pages that a device maps, of devices that the CPU does not see, of huge pages.

use std::time::Instant;

use hdrhistogram::Histogram;
use uhmm_kernel_hook::PAGE_SIZE;
use uhmm_sdk::Advice;

use super::super::bed::{Bed, Spec};
use super::super::figure::{Reach, median};
use super::super::floor::bare::{Bare, BareMemory};
use super::super::floor::copies::{Copies, PIECE};
use super::super::floor::echo::Echo;
use super::super::place::Place;
use super::super::run::Run;
use super::managed::{Kind, Managed};
use super::touch::{Touch, shuffled};

const HUGE_PAGES: u64 = 64;

fn pages(run: &Run<'_>) -> u64 {
    if run.short { 256 } else { 1024 }
}

fn memory(bed: &Bed, len: u64) -> anyhow::Result<Managed> {
    let session = bed.session()?;
    let device = session.device(bed.device(0))?;
    Managed::new(session, device, Kind::Shared, len)
}

fn us(all: &Histogram<u64>, quantile: f64) -> f64 {
    all.value_at_quantile(quantile) as f64 / 1000.0
}

/// Faults of both sides in turn; `away` before each round of uhmm's.
fn rounds(
    run: &Run<'_>,
    (touch, memory): (&Touch<'_>, &Managed),
    floor: &BareMemory,
    write: bool,
    mut away: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Vec<(Histogram<u64>, Histogram<u64>)>> {
    let mut rounds = Vec::new();
    for round in run.rounds(7) {
        away()?;
        let mine = touch.all(memory.mapping()?, write)?;
        floor.empty()?;
        let bare = touch.all(floor.mapping(), write)?;
        if round > 0 {
            rounds.push((mine, bare));
        }
    }
    Ok(rounds)
}

fn show(run: &mut Run<'_>, case: &str, reach: Reach, rounds: &[(Histogram<u64>, Histogram<u64>)]) {
    let at = |quantile| rounds.iter().map(|(mine, bare)| (us(mine, quantile), us(bare, quantile))).collect();
    run.figure(format!("{case}, p50"), "us", reach, at(0.5));
    run.figure(format!("{case}, p99"), "us", Reach::Shown, at(0.99));
}

/// A device maps the page: it is revoked first. With three of them the pages are copies for reading, and the CPU writes.
pub(in super::super) fn mapped(run: &mut Run<'_>) -> anyhow::Result<()> {
    let pages = pages(run);
    let len = pages * PAGE_SIZE;
    for mirrors in [1, 3] {
        let case = format!("{mirrors} mirror{}", if mirrors == 1 { "" } else { "s" });
        let spec = Spec { place: Place::OneCpu, aperture: Some(true), devices: mirrors, ..Spec::of(4 * len) };
        let Some(bed) = run.bed(spec, &case)? else { continue };
        let memory = memory(&bed, len)?;
        let bare = Bare::start(run, Place::OneCpu, &[])?;
        let floor = bare.memory(len)?;
        let order = shuffled(pages);
        let touch = Touch { order: &order, threads: 1, pause: None, cpus: Place::OneCpu.program()? };
        let found = if mirrors == 1 {
            rounds(run, (&touch, &memory), &floor, false, || {
                memory.out()?;
                memory.device().map(memory.addr(), len)?;
                Ok(())
            })?
        } else {
            let session = memory.session();
            session.advise(memory.addr(), len, Advice::ReadMostly(true))?;
            let devices = (0..mirrors).map(|index| session.device(bed.device(index)));
            let devices = devices.collect::<Result<Vec<_>, _>>()?;
            let mut buffer = vec![0; len as usize];
            rounds(run, (&touch, &memory), &floor, true, || {
                devices.iter().try_for_each(|device| device.read(memory.addr(), &mut buffer).map(drop))?;
                Ok(())
            })?
        };
        show(run, &case, Reach::AtMost(1.3), &found);
    }
    Ok(())
}

/// The CPU does not see device memory: the driver's copy engine brings the page. The floor asks another process before it copies.
pub(in super::super) fn hop(run: &mut Run<'_>) -> anyhow::Result<()> {
    let pages = pages(run);
    let len = pages * PAGE_SIZE;
    for place in [Place::OneCpu, Place::Free] {
        let spec = Spec { place, aperture: Some(false), ..Spec::of(4 * len) };
        let Some(bed) = run.bed(spec, place.name())? else { continue };
        let memory = memory(&bed, len)?;
        let echo = Echo::start(run, Place::OneCpu, false)?;
        let socket = echo.socket().display().to_string();
        let bare = Bare::start(run, Place::OneCpu, &["--hop", &socket])?;
        let floor = bare.memory(len)?;
        let order = shuffled(pages);
        let touch = Touch { order: &order, threads: 1, pause: None, cpus: place.program()? };
        let found = rounds(run, (&touch, &memory), &floor, false, || memory.out())?;
        let reach = if place == Place::Free { Reach::Shown } else { Reach::AtMost(1.2) };
        show(run, place.name(), reach, &found);
    }
    Ok(())
}

/// One fault brings 2 MiB: how much of its time is the copy?
pub(in super::super) fn huge(run: &mut Run<'_>) -> anyhow::Result<()> {
    if let Err(why) = Kind::Huge.here() {
        run.leave_out("", why);
        return Ok(());
    }
    let len = run.bytes(HUGE_PAGES * PIECE);
    let Some(bed) = run.bed(Spec::of(2 * len), "")? else { return Ok(()) };
    let copies = Copies::new(len, true)?;
    let order = shuffled(len / PIECE);
    let (mut found, mut first, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    for round in run.rounds(7) {
        // Of its own: pages that came home small would stay so.
        let session = bed.session()?;
        let device = session.device(bed.device(0))?;
        let memory = Managed::new(session, device, Kind::Huge, len)?;
        memory.out()?;
        let before = huge_pages(&memory)?;
        let (answered, took) = touch_huge(&memory, &order)?;
        let copy = copies.piece_us()?;
        memory.out()?;
        if round > 0 {
            found.push((took, copy));
            first.push((answered, copy));
            // Nothing is zero: a ratio of nothing to nothing says nothing.
            kept.push((huge_pages(&memory)? + 1.0, before + 1.0));
        }
    }
    // Four fifths of its time for the copy.
    run.figure("all of 2 MiB, p50 : memcpy of 2 MiB", "us", Reach::AtMost(1.25), found);
    run.figure("the first touch, p50 : memcpy of 2 MiB", "us", Reach::Shown, first);
    run.figure("huge pages on the device afterwards : before", "pages + 1", Reach::AtLeast(0.99), kept);
    Ok(())
}

/// 4 KiB pages on the device that are parts of huge ones.
fn huge_pages(memory: &Managed) -> anyhow::Result<f64> {
    let runs = memory.session().residency(memory.addr(), memory.len())?;
    let huge: u64 = runs.iter().filter(|run| run.huge).map(|run| run.page_count).sum();
    Ok(huge as f64)
}

/// Microseconds until the first word of a huge page was there, and until all of it was: the middle of all of them.
fn touch_huge(memory: &Managed, order: &[u64]) -> anyhow::Result<(f64, f64)> {
    let (mut answered, mut took) = (Vec::new(), Vec::new());
    for piece in order {
        let begun = Instant::now();
        memory.load(piece * PIECE)?;
        answered.push(begun.elapsed().as_secs_f64() * 1e6);
        (0..PIECE / PAGE_SIZE).try_for_each(|page| memory.load(piece * PIECE + page * PAGE_SIZE).map(drop))?;
        took.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    Ok((median(answered.into_iter()), median(took.into_iter())))
}
