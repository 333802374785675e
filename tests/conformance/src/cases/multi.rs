//! Several devices and more memory than they have: one owner a page, eviction, many processes.

use std::time::{Duration, Instant};

use uhmm_sdk::{AccessMode, Advice, ErrorCode, PageStatus, Residency};

use crate::case::{CaseResult, During, Registry, ensure, ensure_eq};
use crate::ctx::{BUF, Ctx, PMD, prot, refused};
use crate::mem::{Mem, PAGE};
use crate::pattern;

pub(super) fn register(list: &mut Registry) {
    list.both_with_devices("T17_migrate_mixed", 2, migrate_mixed);
    list.both_with_devices("T22_snapshot", 2, snapshot);
    list.both_with_devices("T24_double_map", 2, double_map);
    list.one("K15_MultiGPUMigrationTest", multi_migration).devices(2);
    list.one("K16_MultiGPUAccessInPlaceTest", multi_in_place).devices(2);
    list.one("K21_VramOvercommitTest", overcommit).deadline_s(40);
    list.one("K22_VramOvercommitGiantRangeTest", overcommit_giant).deadline_s(40);
    list.one("K24_SVMEvict_BasicTest", evict_basic).deadline_s(40);
    list.one("K24_SVMEvict_QueueTest", evict_queue).deadline_s(40);
    list.one("D01_device_to_device", device_to_device).devices(2);
    list.one("D02_two_devices_write_in_turn", write_in_turn).devices(2);
    list.one("D03_two_devices_at_once", at_once).devices(2);
}

/// Nothing of this range may be migrated: the call is refused, or every page is reported as staying.
fn nothing_moves(ctx: &Ctx, device: usize, mem: &Mem, off: u64, len: u64, what: &str) -> CaseResult {
    match ctx.migrate(mem.addr() + off, len, ctx.device(device)?.target()) {
        Err(error) => ensure_eq!(error.code(), ErrorCode::Invalid, "{what}: the error ({error})"),
        Ok(report) => {
            ensure_eq!(report.moved_pages, 0, "{what}: pages moved ({:?})", report.runs);
            ensure_eq!(report.pages_with(PageStatus::AlreadyThere), 0, "{what}: pages on the device");
        }
    }
    Ok(())
}

fn migrate_mixed(ctx: &Ctx) -> CaseResult {
    let mem = ctx.untouched(6 * PAGE)?;
    ctx.protect(&mem, 0, 6 * PAGE, false, false)?;
    nothing_moves(ctx, 1, &mem, 0, 6 * PAGE, "Migrating PROT_NONE")?;
    ctx.unreadable(&mem, PAGE, PAGE)?;
    nothing_moves(ctx, 1, &mem, 0, 3 * PAGE, "Migrating over a hole")?;
    ctx.protect(&mem, 2 * PAGE, PAGE, true, false)?;
    ensure_eq!(mem.load(2 * PAGE)?, 0, "The zero page, read by the CPU");
    ctx.protect(&mem, 3 * PAGE, 3 * PAGE, true, true)?;
    mem.fill_at(3 * PAGE, 3 * PAGE, 17)?;
    ctx.protect(&mem, 3 * PAGE, PAGE, true, false)?;
    ctx.to_device(1, &mem, 2 * PAGE, 4 * PAGE)?;
    ctx.on_device(1, &mem, 2 * PAGE, 4 * PAGE)?;
    ctx.sees_zero(1, &mem, 2 * PAGE, PAGE)?;
    ctx.sees(1, &mem, 3 * PAGE, 3 * PAGE, 17)?;
    // A page on another device: taken over or refused, but there is one owner and the bytes are right.
    match ctx.migrate(mem.addr() + 5 * PAGE, PAGE, ctx.device(0)?.target()) {
        Ok(report) if report.complete() => ctx.on_device(0, &mem, 5 * PAGE, PAGE)?,
        Ok(_) => ctx.on_device(1, &mem, 5 * PAGE, PAGE)?,
        Err(error) => ensure_eq!(error.code(), ErrorCode::NotFound, "Taking a page over from another device"),
    }
    ctx.sees(0, &mem, 5 * PAGE, PAGE, 17)?;
    mem.expect_zero(2 * PAGE, PAGE)?;
    mem.expect(3 * PAGE, 3 * PAGE, 17)
}

fn snapshot(ctx: &Ctx) -> CaseResult {
    let mem = ctx.untouched(7 * PAGE)?;
    mem.fill_at(3 * PAGE, 4 * PAGE, 22)?;
    ctx.protect(&mem, 0, PAGE, false, false)?;
    ctx.unreadable(&mem, PAGE, PAGE)?;
    ctx.protect(&mem, 2 * PAGE, PAGE, true, false)?;
    ensure_eq!(mem.load(2 * PAGE)?, 0, "The zero page, read by the CPU");
    ctx.protect(&mem, 3 * PAGE, PAGE, true, false)?;
    ctx.to_device(0, &mem, 5 * PAGE, PAGE)?;
    ctx.to_device(1, &mem, 6 * PAGE, PAGE)?;
    let (local, remote) = if ctx.coherent() {
        (prot::COHERENT_LOCAL | prot::WRITE, prot::COHERENT_REMOTE | prot::WRITE)
    } else {
        (prot::PRIVATE_LOCAL | prot::WRITE, prot::NONE)
    };
    // A page of shared memory that was read is a page; only private memory has the zero page.
    let zero = if ctx.coherent() { prot::READ } else { prot::ZERO | prot::READ };
    let expected = [prot::ERROR, prot::ERROR, zero, prot::READ, prot::WRITE, local, remote];
    ensure_eq!(ctx.snapshot(0, &mem, 0, 7 * PAGE)?, expected, "Snapshot through the first device");
    // Looking has moved nothing.
    ctx.on_device(0, &mem, 5 * PAGE, PAGE)?;
    ctx.on_device(1, &mem, 6 * PAGE, PAGE)?;
    mem.expect(3 * PAGE, 4 * PAGE, 22)
}

fn double_map(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(6 * PAGE, 24)?;
    ctx.protect(&mem, 0, 6 * PAGE, true, false)?;
    let report = ctx.sees_all(0, &mem, 24)?;
    ctx.one_fault(&report)?;
    let report = ctx.sees_all(1, &mem, 24)?;
    ctx.one_fault(&report)?;
    ctx.all_to_device(1, &mem)?;
    ctx.on_device(1, &mem, 0, 6 * PAGE)?;
    let report = ctx.sees_all(0, &mem, 24)?;
    ctx.one_fault(&report)?;
    mem.expect_all(24)
}

fn multi_migration(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 1)?;
    let mut seed = 1;
    for round in 0..2 * ctx.device_count() {
        let device = round % ctx.device_count();
        ctx.all_to_device(device, &mem)?;
        ctx.on_device(device, &mem, 0, BUF)?;
        ctx.sees_all(device, &mem, seed)?;
        seed += 1;
        ctx.writes(device, &mem, 0, BUF, seed)?;
    }
    mem.expect_all(seed)
}

/// In place: system pages are mapped by every device and stay where they are.
fn multi_in_place(ctx: &Ctx) -> CaseResult {
    let region = ctx.session.allocate(BUF).during("Allocate")?;
    for word in 0..BUF / 8 {
        region.write_u64(8 * word, pattern::word(1, word)).during("Write")?;
    }
    let mut mask = 0u8;
    for index in 0..ctx.device_count() {
        let device = ctx.device(index)?.id();
        mask |= 1 << device;
        let advice = Advice::Access { device, mode: AccessMode::InPlace };
        ctx.session.advise(region.addr(), BUF, advice).during("Advise in place")?;
    }
    for index in 0..ctx.device_count() {
        let access = ctx.try_read(index, region.addr(), BUF)?.during("Device read")?;
        ensure!(access.bytes == pattern::bytes(1, 0, BUF), "Device {index} sees other bytes");
    }
    let runs = ctx.session.residency(region.addr(), BUF).during("Residency")?;
    let in_place = runs.iter().all(|run| run.residency == Residency::System);
    ensure!(in_place, "Pages with in-place access have moved: {runs:?}");
    if ctx.undisturbed() {
        ensure!(runs.iter().all(|run| run.mapped_mask == mask), "Not every device maps the pages: {runs:?}");
    }
    for index in 0..ctx.device_count() {
        let seed = 10 + index as u64;
        ctx.try_write(index, region.addr(), &pattern::bytes(seed, 0, BUF))?.during("Device write")?;
        for word in 0..BUF / 8 {
            let found = region.read_u64(8 * word).during("Read")?;
            ensure_eq!(found, pattern::word(seed, word), "Word {word} after device {index} has written");
        }
    }
    Ok(())
}

fn overcommit(ctx: &Ctx) -> CaseResult {
    let memory = ctx.memory_in_huge_pages()?;
    let buffer = memory / 4 / PMD * PMD;
    let buffers: Vec<Mem> = (0..6).map(|seed| ctx.patterned(buffer, seed)).collect::<CaseResult<_>>()?;
    for mem in &buffers {
        ctx.all_to_device(0, mem)?;
    }
    ctx.on_device(0, &buffers[5], 0, buffer)?;
    for (seed, mem) in buffers.iter().enumerate() {
        ctx.sees_all(0, mem, seed as u64)?;
    }
    for (seed, mem) in buffers.iter().enumerate() {
        mem.expect_all(seed as u64)?;
    }
    Ok(())
}

fn overcommit_giant(ctx: &Ctx) -> CaseResult {
    let memory = ctx.memory_in_huge_pages()?;
    let len = memory + memory / 2;
    let mem = ctx.huge(len, Some(122))?;
    // One request that cannot be held at once: it goes through by eviction of its own beginning.
    let report = ctx.migrate(mem.addr(), len, ctx.device(0)?.target()).during("Migrate")?;
    if ctx.undisturbed() {
        ensure!(report.complete(), "Prefetch of a giant range: {:?}", report.runs);
    }
    let summary = ctx.residency(&mem, 0, len)?;
    let on_device = summary.all_device_pages();
    let there = ctx.device(0)?.info().memory_bytes / PAGE;
    ensure!(on_device <= there, "{on_device} pages on a device of {there}");
    ensure!(on_device >= memory / PAGE / 2, "Only {on_device} pages stay on a device of {}", memory / PAGE);
    for part in 0..len / PMD {
        ctx.sees(0, &mem, part * PMD, PMD, 122)?;
    }
    mem.expect_all(122)
}

/// Each of four processes has three eighths of the device's memory.
fn evict(ctx: &Ctx, queue: bool) -> CaseResult {
    if ctx.role().is_some() {
        let number = ctx.role_number(1)?;
        return evict_worker(ctx, number, queue);
    }
    let workers: Vec<_> =
        (0..4u64).map(|number| ctx.spawn(&["worker".to_owned(), number.to_string()])).collect::<CaseResult<_>>()?;
    workers.into_iter().try_for_each(|worker| worker.join())
}

fn evict_worker(ctx: &Ctx, number: u64, queue: bool) -> CaseResult {
    let memory = ctx.memory_in_huge_pages()?;
    let len = memory / 8 * 3 / PMD * PMD;
    let mem = ctx.patterned(len, number)?;
    let mut seed = number;
    let end = Instant::now() + Duration::from_millis(if queue { 1500 } else { 0 });
    loop {
        // Others take the memory at the same time: what is refused now is asked for by the device's own faults.
        let report = ctx.migrate(mem.addr(), len, ctx.device(0)?.target()).during("Migrate")?;
        ensure_eq!(report.pages_with(PageStatus::Poisoned), 0, "Pages lost");
        for part in 0..len / BUF {
            ctx.sees(0, &mem, part * BUF, BUF, seed)?;
        }
        if queue {
            let part = seed % (len / BUF) * BUF;
            ctx.writes(0, &mem, part, BUF, seed)?;
        } else {
            seed += 100;
            ctx.writes(0, &mem, 0, len / BUF * BUF, seed)?;
            mem.expect(0, len / BUF * BUF, seed)?;
        }
        if Instant::now() >= end {
            break;
        }
    }
    mem.expect(0, len / BUF * BUF, seed)
}

fn evict_basic(ctx: &Ctx) -> CaseResult {
    evict(ctx, false)
}

fn evict_queue(ctx: &Ctx) -> CaseResult {
    evict(ctx, true)
}

fn device_to_device(ctx: &Ctx) -> CaseResult {
    let mem = ctx.huge(2 * PMD, Some(1))?;
    for round in 0..3 {
        for device in [0, 1] {
            ctx.all_to_device(device, &mem)?;
            ctx.on_device(device, &mem, 0, 2 * PMD)?;
            ctx.sees_all(device, &mem, if round == 0 { 1 } else { 2 })?;
        }
        ctx.writes(1, &mem, 0, 2 * PMD, 2)?;
    }
    mem.expect_all(2)
}

fn write_in_turn(ctx: &Ctx) -> CaseResult {
    let mem = ctx.untouched(BUF)?;
    for round in 0..10 {
        let device = round as usize % 2;
        ctx.writes(device, &mem, 0, BUF, round)?;
        ctx.on_device(device, &mem, 0, BUF)?;
        ctx.sees_all(1 - device, &mem, round)?;
    }
    mem.expect_all(9)
}

/// Each device writes its half of every page pair while the other one does the same: pages never have two owners.
fn at_once(ctx: &Ctx) -> CaseResult {
    let mem = ctx.untouched(64 * PAGE)?;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2usize)
            .map(|device| {
                let mem = &mem;
                scope.spawn(move || -> CaseResult {
                    for round in 0..10u64 {
                        for page in 0..32u64 {
                            let off = (2 * page + device as u64) * PAGE;
                            ctx.writes(device, mem, off, PAGE, round * 10 + device as u64)?;
                        }
                        // The other one's pages, whatever they hold by now, and one's own, which nobody else writes.
                        ctx.read(device, mem, 0, 64 * PAGE)?;
                        for page in 0..32u64 {
                            let off = (2 * page + device as u64) * PAGE;
                            ctx.sees(device, mem, off, PAGE, round * 10 + device as u64)?;
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| super::joined(worker))
    })?;
    for page in 0..64u64 {
        mem.expect(page * PAGE, PAGE, 90 + page % 2)?;
    }
    refused(ctx.try_read(0, mem.addr() + 1, PAGE)?, ErrorCode::Invalid, "A misaligned device read")?;
    Ok(())
}
