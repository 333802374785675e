//! Reproducers of users' complaints, continued: fork under mirrors, ping-pong, a fault a page, events that race with faults.

use std::sync::atomic::{AtomicBool, Ordering};

use uhmm_sdk::{Operator, Target};

use super::joined;
use crate::case::{CaseResult, During, Registry, ensure, ensure_eq};
use crate::ctx::{BUF, Ctx, PMD};
use crate::forked::{Latch, fork};
use crate::mem::{Mem, MemAdvice, PAGE, Remap};
use crate::pattern;

pub(super) fn register(list: &mut Registry) {
    list.one("P12_fork_reaches_every_mirror", fork_reaches_every_mirror);
    list.one("P13_ping_pong_is_noticed", ping_pong).deadline_s(40);
    list.one("P16_a_fault_brings_its_neighbours", neighbours);
    list.one("P16_one_device_fault_a_range", one_device_fault);
    list.one("P17_events_race_with_faults", events_race).deadline_s(40);
    list.one("P17_pager_dies_under_waiting_faults", pager_dies).deadline_s(40);
}

/// P12: every device maps the pages; after fork the parent writes; no device sees the old page, the child sees no new one.
fn fork_reaches_every_mirror(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    for round in 0..3u64 {
        let mem = ctx.patterned(BUF, 1)?;
        for device in 0..ctx.device_count() {
            ctx.writes(device, &mem, 0, BUF, 2 + device as u64)?;
            ctx.sees_all(device, &mem, 2 + device as u64)?;
        }
        let last = 1 + ctx.device_count() as u64;
        if round == 1 {
            mem.expect_all(last)?;
        }
        let (written, checked) = (Latch::new()?, Latch::new()?);
        let child = fork(|| {
            written.wait()?;
            mem.expect_all(last)?;
            checked.open()
        })?;
        if round == 2 {
            ctx.writes(0, &mem, 0, BUF, 50)?;
        } else {
            mem.fill(50)?;
        }
        for device in 0..ctx.device_count() {
            ctx.sees_all(device, &mem, 50)?;
        }
        written.open()?;
        checked.wait()?;
        child.join()?;
        mem.expect_all(50)?;
    }
    Ok(())
}

/// P13: CPU and device want the same page in turn, for ever. Both go on, and the page stops moving at every turn.
fn ping_pong(ctx: &Ctx) -> CaseResult {
    const ROUNDS: u64 = 400;
    let region = ctx.session.allocate(4 * PAGE).during("Allocate")?;
    let moved =
        |ctx: &Ctx| -> CaseResult<u64> { Ok(ctx.metric("pager", "pages_out")? + ctx.metric("pager", "pages_home")?) };
    let before = moved(ctx)?;
    for round in 0..ROUNDS {
        region.write_u64(0, round).during("Write")?;
        let access = ctx.try_read(0, region.addr(), PAGE)?.during("Device read")?;
        ensure_eq!(access.bytes[..8], round.to_ne_bytes(), "The device's word in round {round}");
        ctx.try_write(0, region.addr(), &pattern::bytes(round, 0, PAGE))?.during("Device write")?;
        ensure_eq!(region.read_u64(8).during("Read")?, pattern::word(round, 1), "The CPU's word in round {round}");
    }
    if ctx.counters_hold() {
        let moves = moved(ctx)? - before;
        ensure!(moves < ROUNDS, "The page has moved {moves} times in {ROUNDS} rounds");
    }
    Ok(())
}

/// P16: a CPU that walks through device-resident memory does not fault on every 4 KiB.
fn neighbours(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 1)?;
    ctx.all_to_device(0, &mem)?;
    let before = ctx.metric("pager", "cpu_faults")?;
    mem.expect_all(1)?;
    if ctx.counters_hold() {
        let faults = ctx.metric("pager", "cpu_faults")? - before;
        ensure!(faults <= BUF / PAGE / 8, "{faults} CPU faults for {} pages in a row", BUF / PAGE);
        ensure!(faults > 0, "Pages came home without a fault");
    }
    Ok(())
}

fn one_device_fault(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(4 * PMD, 1)?;
    let report = ctx.sees_all(0, &mem, 1)?;
    ctx.one_fault(&report)?;
    let again = ctx.sees_all(0, &mem, 1)?;
    if ctx.undisturbed() {
        ensure_eq!(again.fault_count, 0, "Faults of a second read");
    }
    mem.expect_all(1)
}

/// P17: unmap, remap and discard events come all the time while other pages fault home: nobody hangs, every byte is right.
fn events_race(ctx: &Ctx) -> CaseResult {
    const ROUNDS: u64 = 30;
    let mem = ctx.patterned(BUF, 1)?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let noise = scope.spawn(|| -> CaseResult {
            let mut round = 0u64;
            while !stop.load(Ordering::Acquire) {
                let other = ctx.patterned(64 * PAGE, round)?;
                match round % 3 {
                    0 => other.advise(0, 32 * PAGE, MemAdvice::DontNeed)?,
                    1 => other.unmap(16 * PAGE, 16 * PAGE)?,
                    _ => {
                        let moved = other.remap(32 * PAGE, 32 * PAGE, Remap::Move)?;
                        moved.expect_moved(32 * PAGE, round)?;
                        other.expect(0, 32 * PAGE, round)?;
                        round += 1;
                        continue;
                    }
                }
                other.expect(48 * PAGE, 16 * PAGE, round)?;
                round += 1;
            }
            Ok(())
        });
        let work = || -> CaseResult {
            for round in 0..ROUNDS {
                ctx.migrate(mem.addr(), BUF, ctx.device(0)?.target()).during("Migrate")?;
                mem.expect_all(1 + round)?;
                mem.fill(2 + round)?;
            }
            Ok(())
        };
        let worked = work();
        stop.store(true, Ordering::Release);
        joined(noise)?;
        worked
    })?;
    mem.expect_all(1 + ROUNDS)
}

/// P17: the pager is killed while threads wait for pages: they go on with the right bytes, never with zeros.
fn pager_dies(ctx: &Ctx) -> CaseResult {
    const THREADS: u64 = 4;
    let mem: Mem = ctx.patterned(4 * BUF, 1)?;
    for round in 0..3u64 {
        ctx.all_moved_out(&mem)?;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let (mem, share) = (&mem, 4 * BUF / THREADS);
                    scope.spawn(move || mem.expect(thread * share, share, 1))
                })
                .collect();
            // A drill; under chaos the pager may be dead already, which is no failure of the drill.
            let killed = Operator::connect(Some(ctx.run_dir()))?.kill("pager");
            ensure!(killed.is_ok() || ctx.args.chaos, "The pager cannot be killed: {killed:?}");
            threads.into_iter().try_for_each(joined)
        })
        .during(&format!("round {round}"))?;
    }
    ctx.migrate(mem.addr(), mem.len(), Target::Home).during("Migrate home")?;
    mem.expect_all(1)
}
