//! A device reads, writes and adds by address: a range that it maps already, a range at home, and a range that is there and mapped.

use std::time::Instant;

use super::super::bed::Spec;
use super::super::figure::Reach;
use super::super::floor::copies::{Copies, rate};
use super::super::run::Run;
use super::managed::{Kind, Managed};

const BYTES: u64 = 256 << 20;
/// What `fault_and_migrate` of a range reaches at least when there is nothing to do, whatever the machine.
const NOTHING_TO_DO: f64 = 10.0;

/// GiB a second.
fn timed(bytes: u64, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let begun = Instant::now();
    work()?;
    Ok(rate(bytes, begun))
}

pub(in super::super) fn run(run: &mut Run<'_>) -> anyhow::Result<()> {
    let bytes = run.bytes(BYTES);
    let Some(bed) = run.bed(Spec { needs: 8 * bytes, ..Spec::of(bytes + (64 << 20)) }, "")? else { return Ok(()) };
    for kind in Kind::ALL {
        if !run.wants(kind.name()) {
            continue;
        }
        if let Err(why) = kind.here() {
            run.leave_out(kind.name(), why);
            continue;
        }
        let session = bed.session()?;
        let device = session.device(bed.device(0))?;
        let memory = Managed::new(session, device, kind, bytes)?;
        mapped(run, &memory)?;
        faulted(run, &memory, kind)?;
    }
    Ok(())
}

fn mapped(run: &mut Run<'_>, memory: &Managed) -> anyhow::Result<()> {
    let (device, addr, bytes) = (memory.device(), memory.addr(), memory.len());
    let copies = Copies::new(bytes.min(128 << 20), false)?;
    let mut buffer = vec![2; bytes as usize];
    memory.out()?;
    device.map(addr, bytes)?;
    let (mut all, mut adds): ([Vec<(f64, f64)>; 3], _) = (Default::default(), Vec::new());
    for round in run.rounds(3) {
        let read = timed(bytes, || Ok(device.read(addr, &mut buffer).map(drop)?))?;
        let memcpy = copies.gib_s()?;
        let written = timed(bytes, || Ok(device.write(addr, &buffer).map(drop)?))?;
        let added = timed(bytes, || Ok(device.fetch_add(addr, bytes, 1).map(drop)?))?;
        let plain = copies.adds_gib_s()?;
        if round > 0 {
            adds.push((added, plain));
            let rates = [read, written, added];
            all.iter_mut().zip(rates).for_each(|(rounds, rate)| rounds.push((rate, memcpy)));
        }
    }
    for (op, rounds) in ["device_read", "device_write", "fetch_add"].into_iter().zip(all) {
        run.figure(format!("{}, {op}, mapped : memcpy", memory.kind().name()), "GiB/s", Reach::AtLeast(0.7), rounds);
    }
    let case = format!("{}, fetch_add, mapped : plain loop of additions", memory.kind().name());
    run.figure(case, "GiB/s", Reach::Shown, adds);
    Ok(())
}

fn faulted(run: &mut Run<'_>, memory: &Managed, kind: Kind) -> anyhow::Result<()> {
    let (device, addr, bytes) = (memory.device(), memory.addr(), memory.len());
    let mut all: [Vec<(f64, f64)>; 3] = Default::default();
    for round in run.rounds(3) {
        memory.home()?;
        let migrate = timed(bytes, || memory.out())?;
        memory.home()?;
        let from_home = timed(bytes, || Ok(device.map(addr, bytes).map(drop)?))?;
        let nothing = timed(bytes, || Ok(device.map(addr, bytes).map(drop)?))?;
        let used = timed(bytes, || memory.home())?;
        memory.out()?;
        let unused = timed(bytes, || memory.home())?;
        if round > 0 {
            let rates = [(from_home, migrate), (nothing, NOTHING_TO_DO), (used, unused)];
            all.iter_mut().zip(rates).for_each(|(rounds, rate)| rounds.push(rate));
        }
    }
    let [from_home, nothing, used] = all;
    let name = kind.name();
    run.figure(format!("{name}, fault_and_migrate from home : migrate"), "GiB/s", Reach::AtLeast(0.8), from_home);
    run.figure(format!("{name}, fault_and_migrate, all mapped : 10 GiB/s"), "GiB/s", Reach::AtLeast(1.0), nothing);
    run.figure(format!("{name}, home after the device has mapped it : not mapped"), "GiB/s", Reach::Shown, used);
    Ok(())
}
