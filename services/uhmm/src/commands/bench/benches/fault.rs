//! One CPU fault on a page that lives on the device: 4 KiB pages in random order, and a bare handler's fault in the same place.
//!
//! Unpinned, the floor is the one of the same CPU: a handler that follows the program gets near it, one that the scheduler puts on the
//! idle CPU does not.

use std::time::Duration;

use hdrhistogram::Histogram;
use uhmm_kernel_hook::PAGE_SIZE;

use super::super::bed::Spec;
use super::super::figure::Reach;
use super::super::floor::bare::{Bare, BareMemory};
use super::super::place::Place;
use super::super::plot::Plot;
use super::super::run::Run;
use super::managed::{Kind, Managed};
use super::touch::{Touch, shuffled};

const PAUSE: Duration = Duration::from_micros(50);

pub(in super::super) fn run(run: &mut Run<'_>) -> anyhow::Result<()> {
    for place in [Place::OneCpu, Place::OtherCpu, Place::Free] {
        at(run, place)?;
    }
    Ok(())
}

fn at(run: &mut Run<'_>, place: Place) -> anyhow::Result<()> {
    let pages = if run.short { 256 } else { 2048 };
    let len = pages * PAGE_SIZE;
    let spec = Spec { place, aperture: Some(true), ..Spec::of(4 * len) };
    let Some(bed) = run.bed(spec, place.name())? else { return Ok(()) };
    let session = bed.session()?;
    let device = session.device(bed.device(0))?;
    let memory = Managed::new(session, device, Kind::Shared, len)?;
    let floor_place = if place == Place::Free { Place::OneCpu } else { place };
    let bare = Bare::start(run, floor_place, &[])?;
    let floor = bare.memory(len)?;
    for threads in [1, 4] {
        for pause in [None, Some(PAUSE)] {
            let order = shuffled(pages);
            let ours = Touch { order: &order, threads, pause, cpus: place.program()? };
            let its = Touch { order: &order, threads, pause, cpus: floor_place.program()? };
            let pace = if pause.is_none() { "back to back" } else { "50 us between" };
            let case = format!("{}, {threads} thread{}, {pace}", place.name(), if threads == 1 { "" } else { "s" });
            if run.wants(&case) {
                case_of(run, &case, place, (&ours, &memory), (&its, &floor))?;
            }
        }
    }
    Ok(())
}

fn case_of(
    run: &mut Run<'_>,
    case: &str,
    place: Place,
    (ours, memory): (&Touch<'_>, &Managed),
    (its, floor): (&Touch<'_>, &BareMemory),
) -> anyhow::Result<()> {
    let mut rounds = Vec::new();
    // The first round of both touches everything for the first time.
    for round in run.rounds(9) {
        memory.out()?;
        let mine = ours.all(memory.mapping()?, false)?;
        floor.empty()?;
        let bare = its.all(floor.mapping(), false)?;
        if round > 0 {
            rounds.push((mine, bare));
        }
    }
    let at = |quantile: f64| {
        let us = |all: &Histogram<u64>| all.value_at_quantile(quantile) as f64 / 1000.0;
        rounds.iter().map(|(mine, bare)| (us(mine), us(bare))).collect::<Vec<_>>()
    };
    let p50 = if place == Place::Free { 1.5 } else { 1.15 };
    run.figure(format!("{case}, p50"), "us", Reach::AtMost(p50), at(0.5));
    let p99 = if place == Place::Free { Reach::Shown } else { Reach::AtMost(1.5) };
    run.figure(format!("{case}, p99"), "us", p99, at(0.99));
    if ours.threads == 1 && ours.pause.is_none() {
        run.plots.push(distribution(place, &rounds)?);
    }
    Ok(())
}

/// Which part of the faults took no longer than that.
fn distribution(place: Place, rounds: &[(Histogram<u64>, Histogram<u64>)]) -> anyhow::Result<Plot> {
    let (mut mine, mut bare) = (super::touch::histogram()?, super::touch::histogram()?);
    for (ours, its) in rounds {
        mine.add(ours)?;
        bare.add(its)?;
    }
    let curve = |all: &Histogram<u64>| {
        let part = |n: u32| f64::from(n) / 200.0;
        (0..200).map(|n| (all.value_at_quantile(part(n)) as f64 / 1000.0, part(n))).collect::<Vec<_>>()
    };
    Ok(Plot {
        name: format!("fault-{}", place.name().replace(' ', "-")),
        title: format!("CPU faults, back to back, {}: part that took no longer", place.name()),
        x: "us".into(),
        y: "part of the faults".into(),
        log_x: true,
        series: vec![("uhmm".into(), curve(&mine)), ("floor".into(), curve(&bare))],
    })
}
