//! Memory that CPU and device take from each other, and memory that does not fit.

use std::time::Instant;

use uhmm_kernel_hook::PAGE_SIZE;
use uhmm_sdk::Job;

use super::super::bed::Spec;
use super::super::figure::Reach;
use super::super::floor::bare::Bare;
use super::super::floor::copies::rate;
use super::super::place::Place;
use super::super::run::Run;
use super::managed::{Kind, Managed};
use super::touch::{Touch, shuffled};

/// Of one ping-pong.
const TURNS: u32 = 8;
const DEVICE: u64 = 128 << 20;

/// CPU and device touch the same pages in turn: microseconds a page and turn of both. The floor: two bare faults (each with its copy).
pub(in super::super) fn ping_pong(run: &mut Run<'_>) -> anyhow::Result<()> {
    let spec = Spec { place: Place::OneCpu, kernel: Some("fill"), ..Spec::of(64 << 20) };
    let Some(bed) = run.bed(spec, "")? else { return Ok(()) };
    let bare = Bare::start(run, Place::OneCpu, &[])?;
    for pages in [1, 16, 64] {
        let case = format!("{pages} page{}", if pages == 1 { "" } else { "s" });
        if !run.wants(&case) {
            continue;
        }
        let order = shuffled(pages);
        let touch = Touch { order: &order, threads: 1, pause: None, cpus: Place::OneCpu.program()? };
        let floor = bare.memory(pages * PAGE_SIZE)?;
        let mut rounds = Vec::new();
        for round in run.rounds(7) {
            // Nobody remembers that these pages were fought about before.
            let session = bed.session()?;
            let device = session.device(bed.device(0))?;
            let memory = Managed::new(session, device, Kind::Shared, pages * PAGE_SIZE)?;
            let begun = Instant::now();
            for _ in 0..TURNS {
                memory.device().run(Job::new("fill", [memory.addr(), memory.len(), 7]).idempotent())?;
                touch.all(memory.mapping()?, true)?;
            }
            let ours = begun.elapsed();
            let begun = Instant::now();
            for _ in 0..2 * TURNS {
                floor.empty()?;
                touch.all(floor.mapping(), true)?;
            }
            let each = |took: std::time::Duration| took.as_secs_f64() * 1e6 / f64::from(TURNS) / pages as f64;
            if round > 0 {
                rounds.push((each(ours), each(begun.elapsed())));
            }
        }
        run.figure(format!("{case}, a turn of CPU and device"), "us a page", Reach::AtMost(1.3), rounds);
    }
    Ok(())
}

/// A job streams over four times what the device holds. The floor: each page once out and once home, by migrations of the same run.
pub(in super::super) fn over_commit(run: &mut Run<'_>) -> anyhow::Result<()> {
    let device_bytes = run.bytes(DEVICE);
    let bytes = 4 * device_bytes;
    let spec = Spec { kernel: Some("sum"), needs: 6 * device_bytes, ..Spec::of(device_bytes) };
    let Some(bed) = run.bed(spec, "")? else { return Ok(()) };
    for kind in Kind::ALL {
        if let Err(why) = kind.here() {
            run.leave_out(kind.name(), why);
            continue;
        }
        if !run.wants(kind.name()) {
            continue;
        }
        let session = bed.session()?;
        let device = session.device(bed.device(0))?;
        let memory = Managed::new(session, device, kind, bytes)?;
        let part = Managed::new(bed.session()?, memory.device().clone(), kind, device_bytes / 2)?;
        let mut rounds = Vec::new();
        for round in run.rounds(3) {
            let begun = Instant::now();
            memory.device().run(Job::new("sum", [memory.addr(), bytes]).idempotent())?;
            let ours = rate(bytes, begun);
            memory.home()?;
            let begun = Instant::now();
            part.out()?;
            part.home()?;
            if round > 0 {
                rounds.push((ours, rate(part.len(), begun)));
            }
        }
        run.figure(
            format!("{}, sum over 4x the device : out + home", kind.name()),
            "GiB/s",
            Reach::AtLeast(0.6),
            rounds,
        );
    }
    Ok(())
}
