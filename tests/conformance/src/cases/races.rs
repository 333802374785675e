//! Races: another thread changes the address space in the middle of a device access or a migration.

use std::os::unix::process::CommandExt;
use std::time::Duration;

use uhmm_sdk::{ErrorCode, Target};

use super::joined;
use crate::case::{CaseResult, During, Failure, Registry, ensure, ensure_eq};
use crate::ctx::{BUF, Ctx, refused};
use crate::mem::{Mem, MemAdvice, PAGE, Remap};
use crate::pattern::{self, Rng};

pub(super) fn register(list: &mut Registry) {
    list.both("T20_anon_teardown", |ctx| {
        if ctx.coherent() { freed_in_flight(ctx) } else { teardown(ctx, Racer::Unmap, Work::Read) }
    });
    for (racer, name) in [
        (Racer::Unmap, "munmap"),
        (Racer::DontNeed, "dontneed"),
        (Racer::Remap, "mremap"),
        (Racer::Protect, "mprotect"),
    ] {
        for (work, work_name) in [(Work::Read, "read"), (Work::Out, "migrate"), (Work::Home, "home")] {
            list.one(format!("T20_anon_teardown.{name}.{work_name}"), move |ctx| teardown(ctx, racer, work));
        }
    }
    // Huge pages come home by the agent's hand.
    for (racer, name) in [(Racer::Unmap, "munmap"), (Racer::DontNeed, "dontneed"), (Racer::Remap, "mremap")] {
        list.one(format!("T20_anon_teardown.{name}.home_huge"), move |ctx| teardown(ctx, racer, Work::HomeHuge));
    }
    list.one("T20_anon_teardown.dontneed.touch", |ctx| teardown(ctx, Racer::DontNeed, Work::Touch));
    for end in ["exit", "exec", "kill"] {
        for (work, work_name) in [(Work::Read, "read"), (Work::Out, "migrate"), (Work::Home, "home")] {
            let name = format!("T20_anon_teardown.{end}.{work_name}");
            list.one(name, move |ctx| end_in_flight(ctx, end, work));
        }
    }
    list.one("K17_MultiThreadMigrationTest", multi_thread).deadline_s(40);
    list.one("S01_fork_races_with_migration", fork_races).deadline_s(30);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Racer {
    Unmap,
    DontNeed,
    Remap,
    Protect,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Read,
    Out,
    Home,
    HomeHuge,
    /// The CPU, page by page from the end.
    Touch,
}

/// What the racer makes of the upper half. The moved mapping, if there is one.
fn race(racer: Racer, mem: &Mem, spins: u64) -> CaseResult<Option<Mem>> {
    // A seeded moment within the first tens of microseconds, counted in steps: a timer is too coarse for it.
    for _ in 0..spins {
        std::hint::spin_loop();
    }
    let half = mem.len() / 2;
    match racer {
        Racer::Unmap => mem.unmap(half, half).map(|()| None),
        Racer::DontNeed => mem.advise(half, half, MemAdvice::DontNeed).map(|()| None),
        Racer::Remap => mem.remap(half, half, Remap::Move).map(Some),
        Racer::Protect => mem.protect(half, half, false, false).map(|()| None),
    }
}

/// Complete and right, or an error; never part of it.
fn work_once(ctx: &Ctx, work: Work, racer: Racer, mem: &Mem, seed: u64) -> CaseResult {
    match work {
        Work::Out | Work::Home | Work::HomeHuge => {
            let target = if work == Work::Out { ctx.device(0)?.target() } else { Target::Home };
            if let Ok(report) = ctx.migrate(mem.addr(), mem.len(), target) {
                let pages: u64 = report.runs.iter().map(|run| run.page_count).sum();
                ensure_eq!(pages, mem.len() / PAGE, "Pages in the report of a raced migration");
            }
        }
        Work::Touch => {
            let good = pattern::bytes(seed, 0, mem.len());
            for page in (mem.len() / PAGE / 2..mem.len() / PAGE).rev() {
                let at = (page * PAGE) as usize;
                let found = mem.load(page * PAGE)?.to_le_bytes();
                ensure!(found == good[at..at + 8] || found == [0; 8], "Page {page} has neither its bytes nor zeros");
            }
        }
        Work::Read => {
            let Ok(access) = ctx.try_read(0, mem.addr(), mem.len())? else { return Ok(()) };
            ensure_eq!(access.report.page_count, mem.len() / PAGE, "Pages of a successful read");
            ensure!(access.report.fault_count >= 1, "A read of unmapped pages without a fault");
            let good = pattern::bytes(seed, 0, mem.len());
            let half = good.len() / 2;
            for (page, (found, expected)) in access.bytes.chunks(4096).zip(good.chunks(4096)).enumerate() {
                let dropped = racer == Racer::DontNeed && page * 4096 >= half && found.iter().all(|byte| *byte == 0);
                ensure!(found == expected || dropped, "Page {page} of a successful raced read is wrong");
            }
        }
    }
    Ok(())
}

/// What munmap is for memory of one's own: allocated memory is freed while a device reads it, or while it is on its way.
fn freed_in_flight(ctx: &Ctx) -> CaseResult {
    let mut rng = ctx.rng();
    for round in 0..20u64 {
        let seed = 2050 + round;
        let mem = ctx.patterned(BUF, seed)?;
        let (addr, len) = (mem.addr(), mem.len());
        ctx.to_device(0, &mem, 0, len / 2)?;
        let spins = rng.below(40_000);
        std::thread::scope(|scope| {
            let work = scope.spawn(|| -> CaseResult {
                if round % 2 == 0 {
                    // Refused or done; the report is about pages that are gone by now.
                    drop(ctx.migrate(addr, len, ctx.device(0)?.target()));
                    return Ok(());
                }
                let Ok(access) = ctx.try_read(0, addr, len)? else { return Ok(()) };
                ensure!(access.bytes == pattern::bytes(seed, 0, len), "A successful read of freed memory is wrong");
                Ok(())
            });
            for _ in 0..spins {
                std::hint::spin_loop();
            }
            drop(mem);
            joined(work)
        })?;
        refused(ctx.try_read(0, addr, PAGE)?, ErrorCode::Fault, "A device read of freed memory")?;
    }
    Ok(())
}

fn teardown(ctx: &Ctx, racer: Racer, work: Work) -> CaseResult {
    let mut rng = ctx.rng();
    for round in 0..10u64 {
        let seed = 2000 + round;
        let mem = if work == Work::HomeHuge { ctx.huge(BUF, Some(seed))? } else { ctx.patterned(BUF, seed)? };
        if matches!(work, Work::Home | Work::HomeHuge | Work::Touch) {
            ctx.all_to_device(0, &mem)?;
        }
        let spins = rng.below(40_000);
        let moved = std::thread::scope(|scope| {
            let thread = scope.spawn(|| race(racer, &mem, spins));
            work_once(ctx, work, racer, &mem, seed)?;
            joined(thread)
        });
        let moved = moved.during(&format!("round {round}"))?;
        mem.expect(0, BUF / 2, seed)?;
        ctx.sees(0, &mem, 0, BUF / 2, seed)?;
        match racer {
            Racer::Unmap => {}
            Racer::DontNeed => mem.expect_zero(BUF / 2, BUF / 2)?,
            Racer::Protect => {
                mem.protect(BUF / 2, BUF / 2, true, true)?;
                mem.expect(BUF / 2, BUF / 2, seed)?;
            }
            Racer::Remap => {
                let moved = moved.ok_or_else(|| Failure::Failed("The upper half was not moved".into()))?;
                moved.expect_moved(BUF / 2, seed)?;
            }
        }
    }
    Ok(())
}

/// A process exits, becomes another program or is killed with work in flight: everything of it goes away, others go on.
fn end_in_flight(ctx: &Ctx, end: &str, work: Work) -> CaseResult {
    if ctx.role().is_some() {
        return end_now(ctx, end, work);
    }
    let mem = ctx.patterned(BUF, 1)?;
    for round in 0..3u64 {
        let mut helper = ctx.spawn(&["ends".to_owned(), (ctx.args.seed ^ round).to_string()])?;
        if end == "kill" {
            helper.wait_for_line()?;
            helper.kill()?;
        } else {
            helper.join_silent()?;
        }
        ctx.sees_all(0, &mem, 1)?;
        mem.expect_all(1)?;
    }
    Ok(())
}

/// The helper: never returns with an outcome.
fn end_now(ctx: &Ctx, end: &str, work: Work) -> CaseResult {
    let mut rng = Rng::new(ctx.role_number(1)?);
    let mem = ctx.patterned(BUF, 9)?;
    if work == Work::Home {
        ctx.all_to_device(0, &mem)?;
    }
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| -> CaseResult {
            loop {
                work_once(ctx, work, Racer::Unmap, &mem, 9)?;
                if work == Work::Home {
                    work_once(ctx, Work::Out, Racer::Unmap, &mem, 9)?;
                }
            }
        });
        // No event: the end shall come at any moment of the work.
        std::thread::sleep(Duration::from_micros(rng.below(3000)));
        match end {
            "exit" => std::process::exit(0),
            "exec" => {
                // This program, since a container or a test's guest may have no other.
                let error = std::process::Command::new(std::env::current_exe()?).arg("--version").exec();
                Err(Failure::Failed(format!("exec: {error}")))
            }
            _ => {
                println!("working");
                joined(worker)
            }
        }
    })
}

/// A device access faults pages out while a thread prefetches them out; then the CPU faults them home while a thread does.
fn multi_thread(ctx: &Ctx) -> CaseResult {
    let len = 4 * BUF;
    let mem = ctx.patterned(len, 1)?;
    let target = ctx.device(0)?.target();
    for round in 1..=2u64 {
        std::thread::scope(|scope| {
            let prefetch = scope.spawn(|| ctx.migrate(mem.addr(), len, target).during("Prefetch out").map(|_| ()));
            ctx.writes(0, &mem, 0, len, round * 10)?;
            joined(prefetch)
        })?;
        ctx.sees_all(0, &mem, round * 10)?;
        std::thread::scope(|scope| {
            let prefetch =
                scope.spawn(|| ctx.migrate(mem.addr(), len, Target::Home).during("Prefetch home").map(|_| ()));
            mem.expect_all(round * 10)?;
            joined(prefetch)
        })?;
        mem.expect_all(round * 10)?;
        mem.fill(round)?;
    }
    mem.expect_all(2)
}

/// Forks in the middle of migrations in both directions: every child has the bytes of the moment of its fork.
fn fork_races(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    let mem = ctx.patterned(BUF, 1)?;
    let target = ctx.device(0)?.target();
    for round in 0..6u64 {
        std::thread::scope(|scope| {
            let mover = scope.spawn(|| -> CaseResult {
                let to = if round % 2 == 0 { target } else { Target::Home };
                ctx.migrate(mem.addr(), BUF, to).during("Migrate").map(|_| ())
            });
            let child = crate::forked::fork(|| mem.expect_all(round + 1))?;
            joined(mover)?;
            child.join()
        })
        .during(&format!("round {round}"))?;
        mem.expect_all(round + 1)?;
        ctx.writes(0, &mem, 0, BUF, round + 2)?;
    }
    let result = ctx.try_read(0, mem.addr() + BUF, PAGE)?;
    ensure!(result.is_err_and(|error| error.code() != ErrorCode::Protocol), "A read behind the mapping succeeded");
    mem.expect_all(7)
}
