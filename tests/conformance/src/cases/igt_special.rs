//! IGT's special cases: bad addresses, partial unmap and remap around live device memory, eviction, fault and prefetch benchmarks.

use std::time::Instant;

use uhmm_sdk::{ErrorCode, Region, Target, TraceCause, TraceKind};

use super::joined;
use crate::case::{CaseResult, During, Registry, ensure, ensure_eq};
use crate::ctx::{BUF, Ctx, PMD, refused};
use crate::forked::fork;
use crate::mem::{Mem, PAGE};
use crate::pattern;

pub(super) fn register(list: &mut Registry) {
    list.one("IGT.fault", bad_address);
    for atomic in [false, true] {
        for middle in [false, true] {
            for remap in [false, true] {
                for touch in [false, true] {
                    let name = format!(
                        "IGT.partial-{}{}-{}cpu-fault{}",
                        if middle { "middle-" } else { "" },
                        if remap { "remap" } else { "munmap" },
                        if touch { "" } else { "no-" },
                        if atomic { "-atomic" } else { "" },
                    );
                    list.one(name, move |ctx| partial(ctx, middle, remap, touch, atomic));
                }
            }
        }
    }
    list.one("IGT.evict-malloc", |ctx| evict(ctx, false, 1)).deadline_s(40);
    list.one("IGT.evict-malloc-mix-bo", |ctx| evict(ctx, true, 1)).deadline_s(40);
    list.one("IGT.processes-evict-malloc", |ctx| evict(ctx, false, 3)).deadline_s(40);
    list.one("IGT.processes-evict-malloc-mix-bo", |ctx| evict(ctx, true, 3)).deadline_s(40);
    list.one("IGT.fault-benchmark", fault_benchmark);
    list.one("IGT.fault-threads-benchmark", fault_threads);
    list.one("IGT.fault-threads-same-page-benchmark", threads_same_page);
    list.one("IGT.fault-process-benchmark", fault_process);
    list.one("IGT.fault-process-same-page-benchmark", process_same_page);
    list.one("IGT.prefetch-benchmark", |ctx| prefetch_benchmark(ctx, false)).deadline_s(40);
    list.one("IGT.prefetch-sys-benchmark", |ctx| prefetch_benchmark(ctx, true)).deadline_s(40);
}

/// A bad address ends the access cleanly, and the device goes on with good ones.
fn bad_address(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 1)?;
    for round in 0..5 {
        let gone = Mem::private(PAGE)?;
        let addr = gone.addr();
        gone.unmap(0, PAGE)?;
        drop(gone);
        refused(ctx.try_read(0, addr, PAGE)?, ErrorCode::Fault, "A device read of a bad address")?;
        let bytes = pattern::bytes(1, 0, PAGE);
        refused(ctx.try_write(0, addr, &bytes)?, ErrorCode::Fault, "A device write to a bad address")?;
        ctx.sees_all(0, &mem, if round == 0 { 1 } else { 2 })?;
        ctx.writes(0, &mem, 0, BUF, 2)?;
    }
    mem.expect_all(2)
}

/// Half of 2 MiB on the device is dropped, the end or the middle; fresh memory may take its place; the device works on both sides.
fn partial(ctx: &Ctx, middle: bool, remap: bool, touch: bool, atomic: bool) -> CaseResult {
    let mem = ctx.huge(PMD, Some(1))?;
    if atomic {
        ctx.exclusive(0, &mem, 0, PMD)?;
    } else {
        ctx.all_to_device(0, &mem)?;
    }
    let half = PMD / 2;
    let start = if middle { PMD / 4 } else { half };
    mem.unmap(start, half)?;
    let fresh = if remap { Some(mem.map_fresh(start, half)?) } else { None };
    let sides: Vec<(u64, u64)> =
        [(0, start), (start + half, PMD - start - half)].into_iter().filter(|side| side.1 > 0).collect();
    if touch {
        for (off, len) in &sides {
            mem.expect(*off, *len, 1)?;
        }
    }
    if fresh.is_none() {
        ctx.unmapped(mem.addr() + start, "A device read of the unmapped half")?;
    }
    if let Some(fresh) = &fresh {
        fresh.expect_zero(0, half)?;
        ctx.adopt(fresh)?;
        ctx.sees_zero(0, fresh, 0, half)?;
        fresh.fill(5)?;
        ctx.sees_all(0, fresh, 5)?;
        ctx.writes(0, fresh, 0, half, 6)?;
    }
    for (off, len) in &sides {
        ctx.sees(0, &mem, *off, *len, 1)?;
        if atomic {
            ctx.exclusive(0, &mem, *off, *len)?;
        }
        ctx.writes(0, &mem, *off, *len, 2)?;
        mem.expect(*off, *len, 2)?;
    }
    if let Some(fresh) = &fresh {
        fresh.expect_all(6)?;
    }
    Ok(())
}

fn region_of(ctx: &Ctx, len: u64, seed: u64) -> CaseResult<Region> {
    let region = ctx.session.allocate(len).during("Allocate")?;
    for word in 0..len / 8 {
        region.write_u64(8 * word, pattern::word(seed, word)).during("Write")?;
    }
    Ok(region)
}

/// Together nine eighths of the device's memory; `mixed`: half of it in regions that the SDK has allocated.
fn evict(ctx: &Ctx, mixed: bool, processes: u64) -> CaseResult {
    if processes > 1 && ctx.role().is_none() {
        let helpers = (0..processes).map(|_| ctx.spawn(&["evict".to_owned()])).collect::<CaseResult<Vec<_>>>()?;
        return helpers.into_iter().try_for_each(|helper| helper.join());
    }
    let total = ctx.memory_in_huge_pages()? / 8 * 9 / processes;
    let count = total.div_ceil(BUF);
    let (mut mems, mut regions) = (Vec::new(), Vec::new());
    for index in 0..count {
        if mixed && index % 2 == 0 {
            regions.push((index, region_of(ctx, BUF, index)?));
        } else {
            mems.push((index, ctx.patterned(BUF, index)?));
        }
    }
    for round in 0..2u64 {
        for (index, mem) in &mems {
            ctx.sees_all(0, mem, index + 100 * round)?;
            ctx.writes(0, mem, 0, BUF, index + 100 * (round + 1))?;
        }
        for (index, region) in &regions {
            let access = ctx.try_read(0, region.addr(), BUF)?.during("Device read")?;
            ensure!(access.bytes == pattern::bytes(index + 100 * round, 0, BUF), "Region {index} has other bytes");
            let bytes = pattern::bytes(index + 100 * (round + 1), 0, BUF);
            ctx.try_write(0, region.addr(), &bytes)?.during("Device write")?;
        }
    }
    for (index, mem) in &mems {
        mem.expect_all(index + 200)?;
    }
    for (index, region) in &regions {
        for word in 0..BUF / 8 {
            let found = region.read_u64(8 * word).during("Read")?;
            ensure_eq!(found, pattern::word(index + 200, word), "Word {word} of region {index}");
        }
    }
    Ok(())
}

/// The CPU faults a device-resident range home.
fn fault_benchmark(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 1)?;
    ctx.all_to_device(0, &mem)?;
    let start = Instant::now();
    for page in 0..BUF / PAGE {
        ensure_eq!(mem.load(page * PAGE)?, pattern::word(1, page * PAGE / 8), "Page {page}");
    }
    ctx.note(format!("{:.2} us a page", start.elapsed().as_secs_f64() * 1e6 / (BUF / PAGE) as f64));
    mem.expect_all(1)
}

fn fault_threads(ctx: &Ctx) -> CaseResult {
    const THREADS: u64 = 4;
    let mem = ctx.patterned(BUF, 1)?;
    ctx.all_to_device(0, &mem)?;
    let start = Instant::now();
    std::thread::scope(|scope| {
        let share = BUF / THREADS;
        let threads: Vec<_> = (0..THREADS)
            .map(|index| {
                let mem = &mem;
                scope.spawn(move || mem.expect(index * share, share, 1))
            })
            .collect();
        threads.into_iter().try_for_each(joined)
    })?;
    ctx.note(format!("{:.2} us a page", start.elapsed().as_secs_f64() * 1e6 / (BUF / PAGE) as f64));
    Ok(())
}

/// Pages that came home by CPU faults at this address since a point of the trace.
fn homecomings(ctx: &Ctx, since: u64, addr: u64) -> CaseResult<u64> {
    let (mut next, mut pages) = (since, 0);
    loop {
        let records = ctx.session.read_trace(next).during("Read the trace")?;
        let Some(last) = records.last() else { return Ok(pages) };
        next = last.sequence + 1;
        for record in records {
            let covers = (record.addr..record.addr + record.page_count * PAGE).contains(&addr);
            let home = record.kind == TraceKind::MigrateEnd && record.to == Target::Home;
            pages += u64::from(covers && home && record.cause == TraceCause::CpuFault);
        }
    }
}

fn trace_end(ctx: &Ctx) -> CaseResult<u64> {
    let mut next = 0;
    loop {
        let records = ctx.session.read_trace(next).during("Read the trace")?;
        let Some(last) = records.last() else { return Ok(next) };
        next = last.sequence + 1;
    }
}

/// Eight threads touch the same page of the device at once: one migration, everybody right.
fn threads_same_page(ctx: &Ctx) -> CaseResult {
    const THREADS: usize = 8;
    let mem = ctx.patterned(16 * PAGE, 1)?;
    for round in 0..20u64 {
        ctx.all_to_device(0, &mem)?;
        let since = trace_end(ctx)?;
        let page = round % 16;
        let barrier = std::sync::Barrier::new(THREADS);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|_| {
                    let (mem, barrier) = (&mem, &barrier);
                    scope.spawn(move || {
                        barrier.wait();
                        mem.expect(page * PAGE, PAGE, 1)
                    })
                })
                .collect();
            threads.into_iter().try_for_each(joined)
        })?;
        if ctx.counters_hold() {
            ensure_eq!(homecomings(ctx, since, mem.addr() + page * PAGE)?, 1, "Migrations of page {page}");
        }
    }
    mem.expect_all(1)
}

fn fault_process(ctx: &Ctx) -> CaseResult {
    if ctx.role().is_some() {
        return fault_benchmark(ctx);
    }
    let helpers = (0..3).map(|_| ctx.spawn(&["fault".to_owned()])).collect::<CaseResult<Vec<_>>>()?;
    helpers.into_iter().try_for_each(|helper| helper.join())
}

/// Processes that share a region by fork touch the same page of the device at once: one migration, everybody right.
fn process_same_page(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    let region = region_of(ctx, 16 * PAGE, 1)?;
    let check = |page: u64| -> CaseResult {
        for word in page * 512..(page + 1) * 512 {
            ensure_eq!(region.read_u64(8 * word).during("Read")?, pattern::word(1, word), "Word {word}");
        }
        Ok(())
    };
    let private = ctx.patterned(16 * PAGE, 2)?;
    for page in 0..3u64 {
        ctx.migrate(region.addr(), 16 * PAGE, ctx.device(0)?.target()).during("Migrate")?;
        ctx.all_to_device(0, &private)?;
        let since = trace_end(ctx)?;
        let gates = (0..3).map(|_| crate::forked::Latch::new()).collect::<CaseResult<Vec<_>>>()?;
        let children: Vec<_> = gates
            .iter()
            .map(|gate| {
                fork(|| {
                    gate.wait()?;
                    check(page)?;
                    private.expect(page * PAGE, PAGE, 2)
                })
            })
            .collect::<CaseResult<_>>()?;
        gates.iter().try_for_each(|gate| gate.open())?;
        check(page)?;
        private.expect(page * PAGE, PAGE, 2)?;
        children.into_iter().try_for_each(|child| child.join())?;
        if ctx.counters_hold() {
            let moves = homecomings(ctx, since, region.addr() + page * PAGE)?;
            ensure!(moves <= 1, "The shared page {page} came home {moves} times");
        }
    }
    private.expect_all(2)
}

fn prefetch_benchmark(ctx: &Ctx, both_ways: bool) -> CaseResult {
    let rounds = if ctx.undisturbed() { 16 } else { 4 };
    let mem = ctx.huge(2 * BUF, Some(1))?;
    let target = ctx.device(0)?.target();
    let (mut out_s, mut home_s) = (0.0, 0.0);
    for _ in 0..rounds {
        let start = Instant::now();
        let pending = ctx.session.prefetch(mem.addr(), mem.len(), target);
        ctx.wait_prefetch(pending)?;
        out_s += start.elapsed().as_secs_f64();
        let start = Instant::now();
        if both_ways {
            let pending = ctx.session.prefetch(mem.addr(), mem.len(), Target::Home);
            ctx.wait_prefetch(pending)?;
            home_s += start.elapsed().as_secs_f64();
        } else {
            mem.expect_all(1)?;
        }
    }
    let gb_per_s = |seconds: f64| (mem.len() * rounds) as f64 / seconds / 1e9;
    let home = if both_ways { format!(", home {:.2} GB/s", gb_per_s(home_s)) } else { String::new() };
    ctx.note(format!("out {:.2} GB/s{home}", gb_per_s(out_s)));
    ctx.sees_all(0, &mem, 1)?;
    mem.expect_all(1)
}
