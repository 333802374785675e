//! What managing memory costs: memory of the services a managed byte, and CPU time while nobody asks for anything.

use std::time::{Duration, Instant};

use super::super::bed::{Bed, Spec};
use super::super::figure::Reach;
use super::super::host;
use super::super::run::Run;
use super::managed::all_go;

const GIB: u64 = 1 << 30;
/// Of managed bytes.
const SHARE: f64 = 0.003;
/// Of one core.
const IDLE: f64 = 0.001;

/// Memory of all services, without what devices hold.
fn services_bytes(bed: &Bed) -> anyhow::Result<u64> {
    let services = bed.operator()?.status()?;
    let pids: Vec<u32> = services.iter().map(|service| service.pid).filter(|pid| *pid != 0).collect();
    host::own_bytes(&pids)
}

pub(in super::super) fn run(run: &mut Run<'_>) -> anyhow::Result<()> {
    let bytes = run.bytes(4 * GIB);
    let Some(bed) = run.bed(Spec { needs: GIB / 2, ..Spec::of(bytes + (64 << 20)) }, "")? else { return Ok(()) };
    // First: what a region leaves behind is scrubbed after its end.
    if run.wants("idle CPU") {
        idle(run, &bed)?;
    }
    if run.wants("memory") {
        memory(run, &bed, bytes)?;
    }
    Ok(())
}

fn memory(run: &mut Run<'_>, bed: &Bed, bytes: u64) -> anyhow::Result<()> {
    let session = bed.session()?;
    let device = session.device(bed.device(0))?;
    // What the first region brings with it is not paid again for the second one.
    let _first = session.allocate(2 << 20)?;
    let before = services_bytes(bed)?;
    let region = session.allocate(bytes)?;
    all_go(&session, (region.addr(), bytes), device.target())?;
    device.map(region.addr(), bytes)?;
    let grown = services_bytes(bed)?.saturating_sub(before);
    let mib = |bytes: f64| bytes / (1 << 20) as f64;
    let rounds = vec![(mib(grown as f64), mib(bytes as f64 * SHARE))];
    let case = format!("memory, {} MiB managed, on the device and mapped : 0.3 %", bytes >> 20);
    run.figure(case, "MiB", Reach::AtMost(1.0), rounds);
    Ok(())
}

fn idle(run: &mut Run<'_>, bed: &Bed) -> anyhow::Result<()> {
    let session = bed.session()?;
    let _region = session.allocate(2 << 20)?;
    let services = bed.operator()?.status()?;
    let used = || {
        let all = services.iter().filter(|service| service.pid != 0).map(|service| host::cpu_ns(service.pid));
        all.sum::<anyhow::Result<u64>>()
    };
    let mut rounds = Vec::new();
    for _ in 0..run.most_rounds(3) {
        let (begun, before) = (Instant::now(), used()?);
        // What is measured is what happens while nothing happens.
        std::thread::sleep(Duration::from_millis(if run.short { 1500 } else { 4000 }));
        let share = (used()? - before) as f64 / begun.elapsed().as_nanos() as f64;
        rounds.push((share * 100.0, IDLE * 100.0));
    }
    run.figure("idle CPU of all services : 0.1 % of a core", "%", Reach::AtMost(1.0), rounds);
    Ok(())
}
