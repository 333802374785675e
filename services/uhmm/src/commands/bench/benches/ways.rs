//! Out and home: whole ranges each way, beside memcpy between resident buffers and beside the bare kernel's steps by one thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::super::bed::{Bed, Spec};
use super::super::figure::Reach;
use super::super::floor::copies::{Copies, rate, resident};
use super::super::floor::steps::Steps;
use super::super::host;
use super::super::run::Run;
use super::managed::{Kind, Managed};

const BYTES: u64 = 1 << 30;
/// What a busy program works on meanwhile.
const OTHERS: u64 = 32 << 20;

/// What a case took, each way, in every round: uhmm, the bare steps, memcpy.
#[derive(Clone)]
pub(in super::super) struct Measured {
    case: String,
    out: Vec<[f64; 3]>,
    home: Vec<[f64; 3]>,
}

pub(in super::super) fn out(run: &mut Run<'_>) -> anyhow::Result<()> {
    for measured in both(run)? {
        show(run, &measured.case, &measured.out);
    }
    Ok(())
}

pub(in super::super) fn home(run: &mut Run<'_>) -> anyhow::Result<()> {
    for measured in both(run)? {
        show(run, &measured.case, &measured.home);
    }
    Ok(())
}

fn show(run: &mut Run<'_>, case: &str, rounds: &[[f64; 3]]) {
    let beside = |index: usize| rounds.iter().map(|all| (all[0], all[index])).collect();
    run.figure(format!("{case} : bare steps"), "GiB/s", Reach::AtLeast(0.9), beside(1));
    run.figure(format!("{case} : memcpy"), "GiB/s", Reach::Shown, beside(2));
}

/// What leaves must come home: both benches are measured at once.
fn both(run: &mut Run<'_>) -> anyhow::Result<Vec<Measured>> {
    if run.ways.is_none() {
        run.ways = Some(ways(run)?);
    }
    Ok(run.ways.clone().unwrap_or_default())
}

fn ways(run: &mut Run<'_>) -> anyhow::Result<Vec<Measured>> {
    let mut bytes = run.bytes(BYTES);
    // The floor's device, memory and buffers are as large.
    while bytes > 64 << 20 && host::room_for(6 * bytes)?.is_err() {
        bytes /= 2;
        run.leave_out("", format!("little memory is free: {} MiB each time", bytes >> 20));
    }
    let spec = Spec { needs: 6 * bytes, ..Spec::of(bytes + (64 << 20)) };
    let mut all = Vec::new();
    let Some(bed) = run.bed(spec, "")? else { return Ok(all) };
    for kind in Kind::ALL {
        if let Err(why) = kind.here() {
            run.leave_out(kind.name(), why);
            continue;
        }
        for busy in [false, true] {
            let case = format!("{}, program {}", kind.name(), if busy { "busy" } else { "idle" });
            if run.wants(&case) {
                // A program that is busy is in the way of every piece alike: a quarter shows it.
                let bytes = if busy { (bytes / 4).max(4 << 20) } else { bytes };
                all.push(case_of(run, &bed, (kind, busy), case, bytes)?);
            }
        }
    }
    Ok(all)
}

/// Runs `work` while a thread of this process writes other pages of it, if it is busy.
fn beside<T>(busy: bool, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    if !busy {
        return work();
    }
    let others = resident(OTHERS, false)?;
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let program = scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                others.fill(0, OTHERS, 3)?;
            }
            anyhow::Ok(())
        });
        let done = work();
        end.store(true, Ordering::Relaxed);
        program.join().map_err(|_| anyhow::anyhow!("The busy program panicked"))??;
        done
    })
}

/// GiB a second out, and home.
fn both_ways(memory: &Managed) -> anyhow::Result<(f64, f64)> {
    let begun = Instant::now();
    memory.out()?;
    let rate_out = rate(memory.len(), begun);
    let begun = Instant::now();
    memory.home()?;
    Ok((rate_out, rate(memory.len(), begun)))
}

fn steps_both_ways(steps: &mut Steps, bytes: u64) -> anyhow::Result<(f64, f64)> {
    let begun = Instant::now();
    steps.out()?;
    let rate_out = rate(bytes, begun);
    let begun = Instant::now();
    steps.home(|_| {})?;
    Ok((rate_out, rate(bytes, begun)))
}

fn case_of(run: &Run<'_>, bed: &Bed, (kind, busy): (Kind, bool), case: String, bytes: u64) -> anyhow::Result<Measured> {
    let session = bed.session()?;
    let device = session.device(bed.device(0))?;
    let memory = Managed::new(session, device, kind, bytes)?;
    let mut steps = Steps::new(kind, bytes)?;
    let copies = Copies::new(bytes.min(256 << 20), kind == Kind::Huge)?;
    let mut measured = Measured { case, out: Vec::new(), home: Vec::new() };
    // The first round touches everything for the first time.
    for round in run.rounds(3) {
        let (ours, its) = beside(busy, || Ok((both_ways(&memory)?, steps_both_ways(&mut steps, bytes)?)))?;
        let memcpy = copies.gib_s()?;
        if round > 0 {
            measured.out.push([ours.0, its.0, memcpy]);
            measured.home.push([ours.1, its.1, memcpy]);
        }
    }
    Ok(measured)
}
