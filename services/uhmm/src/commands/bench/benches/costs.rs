//! Bench `cost`: CPU time of each service for one piece of work, beside the CPU time of a bare handler for one fault. Times by the clock
//! say how long somebody waits; these say how much of it one core can do, on machines of any size (docs/scaling.md).

use uhmm_kernel_hook::PAGE_SIZE;

use super::super::bed::{Bed, Spec};
use super::super::figure::Reach;
use super::super::floor::bare::{Bare, BareMemory};
use super::super::host;
use super::super::place::Place;
use super::super::run::Run;
use super::managed::{Kind, Managed};
use super::touch::{Touch, shuffled};

/// What is counted for each piece of work.
const SERVICES: [&str; 3] = ["pager", "mirror", "driver"];
/// Below this a service had nothing to do.
const NOTHING_US: f64 = 0.05;
/// Sessions of a round.
const SESSIONS: u32 = 8;

/// CPU time of the services.
struct Meter {
    pids: Vec<u32>,
}

impl Meter {
    fn new(bed: &Bed) -> anyhow::Result<Self> {
        let status = bed.operator()?.status()?;
        let names = SERVICES.map(|part| bed.service(part));
        let pid = |name: &String| status.iter().find(|service| service.name == *name).map_or(0, |service| service.pid);
        Ok(Self { pids: names.iter().map(pid).collect() })
    }

    /// Microseconds of each, for one of `count` pieces.
    fn each(&self, count: f64, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Vec<f64>> {
        let before = self.pids.iter().map(|pid| host::cpu_ns(*pid)).collect::<anyhow::Result<Vec<_>>>()?;
        work()?;
        let used = self
            .pids
            .iter()
            .zip(before)
            .map(|(pid, before)| Ok(host::cpu_ns(*pid)?.saturating_sub(before) as f64 / 1000.0 / count));
        used.collect()
    }
}

pub(in super::super) fn run(run: &mut Run<'_>) -> anyhow::Result<()> {
    let pages: u64 = if run.short { 512 } else { 4096 };
    let len = pages * PAGE_SIZE;
    // Nobody looks again while there is nothing to do: on one CPU that is the same for both sides.
    let spec = Spec { place: Place::OneCpu, ..Spec::of(4 * len) };
    let Some(bed) = run.bed(spec, "")? else { return Ok(()) };
    let meter = Meter::new(&bed)?;
    let bare = Bare::start(run, Place::OneCpu, &[])?;
    let floor = bare.memory(len)?;
    let session = bed.session()?;
    let device = session.device(bed.device(0))?;
    let memory = Managed::new(session, device, Kind::Shared, len)?;
    let order = shuffled(pages);
    let touch = Touch { order: &order, threads: 1, pause: None, cpus: Place::OneCpu.program()? };
    let mut rows: Vec<(&str, Vec<Vec<f64>>)> =
        ["a page migrated", "a CPU fault", "a device fault", "a session"].map(|what| (what, Vec::new())).into();
    let mut bare_us = Vec::new();
    for round in run.rounds(5) {
        let migrated = meter.each(pages as f64, || memory.out())?;
        let faulted = meter.each(pages as f64, || touch.all(memory.mapping()?, false).map(drop))?;
        let by_device = meter.each((pages / 8) as f64, || by_device(&memory, &order[..(pages / 8) as usize]))?;
        memory.home()?;
        let sessions = meter.each(f64::from(SESSIONS), || sessions(&bed))?;
        let its = bare_fault(&bare, &floor, &touch)?;
        if round > 0 {
            rows.iter_mut()
                .zip([migrated, faulted, by_device, sessions])
                .for_each(|((_, rounds), row)| rounds.push(row));
            bare_us.push(its);
        }
    }
    for (what, rounds) in &rows {
        for (index, service) in SERVICES.iter().enumerate() {
            if rounds.iter().all(|row| row[index] < NOTHING_US) {
                continue;
            }
            let beside = rounds.iter().zip(&bare_us).map(|(row, bare)| (row[index], *bare)).collect();
            run.figure(format!("{service}, {what} : bare handler, a fault"), "us of CPU", Reach::Shown, beside);
        }
    }
    Ok(())
}

/// The device maps pages one by one, each of which is at home.
fn by_device(memory: &Managed, pages: &[u64]) -> anyhow::Result<()> {
    pages.iter().try_for_each(|page| {
        memory.device().map(memory.addr() + page * PAGE_SIZE, PAGE_SIZE)?;
        Ok(())
    })
}

/// Sessions that open the device, allocate, and end.
fn sessions(bed: &Bed) -> anyhow::Result<()> {
    (0..SESSIONS).try_for_each(|_| {
        let session = bed.session()?;
        session.device(bed.device(0))?;
        session.allocate(PAGE_SIZE)?;
        Ok(())
    })
}

fn bare_fault(bare: &Bare, floor: &BareMemory, touch: &Touch<'_>) -> anyhow::Result<f64> {
    floor.empty()?;
    let before = host::cpu_ns(bare.pid())?;
    touch.all(floor.mapping(), false)?;
    Ok((host::cpu_ns(bare.pid())? - before) as f64 / 1000.0 / touch.order.len() as f64)
}
