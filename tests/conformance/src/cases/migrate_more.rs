//! Migration as kfdtest has it: content over many rounds, files, policies, partial ranges.

use std::os::fd::AsFd;

use uhmm_sdk::Advice;

use super::mirror::{content_of, file_with};
use crate::case::{CaseResult, During, Registry, ensure, ensure_eq};
use crate::ctx::{BUF, Ctx, PMD};
use crate::mem::{Mem, PAGE};
use crate::pattern;

pub(super) fn register(list: &mut Registry) {
    list.one("K08_BasicVramTest", basic_vram);
    list.one("K10_MigrateTest", migrate_rounds);
    list.one("K13_MigrateLargeBufTest", migrate_large);
    list.one("K14_MigratePolicyTest", migrate_policy);
    list.one("K18_MigrateFileBackedRangeTest", file_backed);
    list.one("K23_PrefaultPartialRangeTest", prefault_partial);
    list.one("M03_release_gives_back", release_gives_back);
    list.one("M04_release_part", release_part);
    list.one("M05_discard", discard);
    list.one("M06_heap_memory", heap_memory);
    list.one("M07_dontneed_free_and_remove", dontneed_free_and_remove);
}

fn basic_vram(ctx: &Ctx) -> CaseResult {
    let (from, vram, to) = (ctx.patterned(PAGE, 108)?, ctx.untouched(PAGE)?, ctx.untouched(PAGE)?);
    ctx.all_to_device(0, &vram)?;
    let first = ctx.read(0, &from, 0, PAGE)?;
    ctx.try_write(0, vram.addr(), &first.bytes)?.during("Device write")?;
    ctx.on_device(0, &vram, 0, PAGE)?;
    let second = ctx.read(0, &vram, 0, PAGE)?;
    ctx.try_write(0, to.addr(), &second.bytes)?.during("Device write")?;
    to.expect_all(108)?;
    vram.expect_all(108)?;
    from.expect_all(108)
}

fn migrate_rounds(ctx: &Ctx) -> CaseResult {
    let (one, two) = (ctx.patterned(BUF, 1)?, ctx.patterned(BUF, 2)?);
    for round in 0..8 {
        for (mem, seed) in [(&one, 1000 + round), (&two, 2000 + round)] {
            ctx.all_to_device(0, mem)?;
            ctx.writes(0, mem, 0, BUF, seed)?;
        }
        one.expect_all(1000 + round)?;
        two.expect_all(2000 + round)?;
        ctx.sees_all(0, &one, 1000 + round)?;
        ctx.sees_all(0, &two, 2000 + round)?;
    }
    one.expect_all(1007)?;
    two.expect_all(2007)
}

/// Three quarters of device memory; a granularity without bound: one CPU fault brings everything home.
fn migrate_large(ctx: &Ctx) -> CaseResult {
    let len = ctx.memory_in_huge_pages()? / 4 * 3 / PMD * PMD;
    let mem = ctx.huge(len, Some(113))?;
    ctx.session.advise(mem.addr(), len, Advice::Granularity(Some(30))).during("Advise the granularity")?;
    ctx.all_to_device(0, &mem)?;
    ctx.on_device(0, &mem, 0, len)?;
    ctx.sees_all(0, &mem, 113)?;
    ensure_eq!(mem.load(len / 2)?, pattern::word(113, len / 16), "The word that is touched");
    if ctx.counters_hold() {
        // The touched word was served first, and the rest follows without another touch.
        while ctx.settled_residency(&mem, 0, len)?.all_device_pages() > 0 {
            std::thread::yield_now();
        }
    }
    mem.expect_all(113)?;
    if ctx.counters_hold() {
        ctx.at_home(&mem, 0, len)?;
    }
    ctx.all_to_device(0, &mem)?;
    ctx.writes(0, &mem, 0, len, 114)?;
    ctx.to_home(&mem, 0, len)?;
    mem.expect_all(114)
}

fn migrate_policy(ctx: &Ctx) -> CaseResult {
    let mem = ctx.untouched(BUF)?;
    ctx.writes(0, &mem, 0, BUF, 1)?;
    mem.expect_all(1)?;
    mem.fill(2)?;
    ctx.sees_all(0, &mem, 2)?;
    mem.expect_all(2)
}

fn file_backed(ctx: &Ctx) -> CaseResult {
    let mut file = file_with(&vec![0; BUF as usize])?;
    let mem = Mem::file_shared(file.as_fd(), BUF, true)?;
    ctx.adopt(&mem)?;
    let device = ctx.device(0)?.target();
    ctx.session.advise(mem.addr(), BUF, Advice::PreferredLocation(Some(device))).during("Advise the location")?;
    ctx.writes(0, &mem, 0, BUF, 118)?;
    mem.unmap(0, BUF)?;
    drop(mem);
    ensure!(content_of(&mut file)? == pattern::bytes(118, 0, BUF), "The file does not hold the device's bytes");
    let again = Mem::file_shared(file.as_fd(), BUF, false)?;
    again.expect_all(118)
}

fn prefault_partial(ctx: &Ctx) -> CaseResult {
    let mem = Mem::small(4 * PAGE)?;
    mem.fill_at(PAGE, 2 * PAGE, 123)?;
    ctx.adopt(&mem)?;
    ctx.all_to_device(0, &mem)?;
    ctx.writes(0, &mem, 0, PAGE, 124)?;
    ctx.writes(0, &mem, 3 * PAGE, PAGE, 124)?;
    mem.expect(0, PAGE, 124)?;
    mem.expect(PAGE, 2 * PAGE, 123)?;
    mem.expect(3 * PAGE, PAGE, 124)
}

/// After `release` the kernel alone has the memory: same bytes, and no device reaches it any more.
fn release_gives_back(ctx: &Ctx) -> CaseResult {
    for on_device in [false, true] {
        let mem = ctx.patterned(BUF, 3)?;
        if on_device {
            ctx.all_to_device(0, &mem)?;
        }
        ctx.session.release(mem.addr(), BUF).during("Release")?;
        ensure!(ctx.try_read(0, mem.addr(), PAGE)?.is_err(), "A device reads memory that was released");
        ensure!(ctx.session.residency(mem.addr(), BUF).is_err(), "Released memory still has a residency");
        mem.expect_all(3)?;
        mem.fill(4)?;
        ctx.adopt(&mem)?;
        ctx.sees_all(0, &mem, 4)?;
        mem.expect_all(4)?;
    }
    Ok(())
}

fn release_part(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 5)?;
    ctx.all_to_device(0, &mem)?;
    let (start, len) = (BUF / 4, BUF / 2);
    ctx.session.release(mem.addr() + start, len).during("Release the middle")?;
    ensure!(ctx.try_read(0, mem.addr() + start, PAGE)?.is_err(), "A device reads memory that was released");
    ctx.on_device(0, &mem, 0, start)?;
    ctx.on_device(0, &mem, start + len, BUF - start - len)?;
    ctx.sees(0, &mem, 0, start, 5)?;
    ctx.sees(0, &mem, start + len, BUF - start - len, 5)?;
    mem.expect_all(5)?;
    ctx.adopt_at(mem.addr() + start, len)?;
    ctx.sees_all(0, &mem, 5)?;
    mem.expect_all(5)
}

fn discard(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 6)?;
    ctx.all_to_device(0, &mem)?;
    ctx.session.discard(mem.addr() + BUF / 4, BUF / 2).during("Discard")?;
    mem.expect(0, BUF / 4, 6)?;
    mem.expect_zero(BUF / 4, BUF / 2)?;
    mem.expect(BUF / 4 * 3, BUF / 4, 6)?;
    ctx.sees_zero(0, &mem, BUF / 4, BUF / 2)?;
    mem.fill(7)?;
    ctx.sees_all(0, &mem, 7)?;
    let region = ctx.session.allocate(BUF).during("Allocate")?;
    region.write_u64(0, 5).during("Write")?;
    ctx.migrate(region.addr(), BUF, ctx.device(0)?.target()).during("Migrate")?;
    ctx.session.discard(region.addr(), BUF).during("Discard shared memory")?;
    ensure_eq!(region.read_u64(0).during("Read")?, 0, "A word of discarded shared memory");
    Ok(())
}

/// malloc's memory, with its neighbours in the same pages left alone.
fn heap_memory(ctx: &Ctx) -> CaseResult {
    use std::sync::atomic::{AtomicU64, Ordering};
    let words: Vec<AtomicU64> = (0..BUF / 8).map(|index| AtomicU64::new(pattern::word(8, index))).collect();
    let addr = (words.as_ptr().addr() as u64).next_multiple_of(PAGE);
    let skipped = (addr - words.as_ptr().addr() as u64) / 8;
    let len = (BUF - 8 * skipped) / PAGE * PAGE;
    ctx.adopt_at(addr, len)?;
    let target = ctx.device(0)?.target();
    let report = ctx.migrate(addr, len, target).during("Migrate the heap")?;
    ensure!(report.complete() || !ctx.undisturbed(), "The heap did not move: {report:?}");
    let access = ctx.try_read(0, addr, len)?.during("Device read of the heap")?;
    ensure!(access.bytes == pattern::bytes(8, 8 * skipped, len), "The device sees other bytes of the heap");
    ctx.try_write(0, addr, &pattern::bytes(9, 8 * skipped, len))?.during("Device write of the heap")?;
    for (index, word) in words.iter().enumerate() {
        let inside = (skipped..skipped + len / 8).contains(&(index as u64));
        let expected = pattern::word(if inside { 9 } else { 8 }, index as u64);
        ensure_eq!(word.load(Ordering::Relaxed), expected, "Word {index} of the heap");
    }
    ctx.session.release(addr, len).during("Release the heap")
}

fn dontneed_free_and_remove(ctx: &Ctx) -> CaseResult {
    use crate::mem::MemAdvice;
    for on_device in [false, true] {
        let mem = ctx.patterned(BUF, 7)?;
        if on_device {
            ctx.all_to_device(0, &mem)?;
        }
        mem.advise(BUF / 2, BUF / 4, MemAdvice::DontNeed)?;
        mem.expect_zero(BUF / 2, BUF / 4)?;
        ctx.sees_zero(0, &mem, BUF / 2, BUF / 4)?;
        // Lazily freed pages have their old bytes or zeros, page by page, for CPU and device; nothing else.
        mem.advise(0, BUF / 4, MemAdvice::Free)?;
        let freed = mem.bytes(0, BUF / 4)?;
        let good = pattern::bytes(7, 0, BUF / 4);
        for (page, (found, old)) in freed.chunks(PAGE as usize).zip(good.chunks(PAGE as usize)).enumerate() {
            let zero = found.iter().all(|byte| *byte == 0);
            ensure!(zero || found == old, "Page {page} after MADV_FREE is neither old nor zero");
        }
        mem.expect(BUF / 4, BUF / 4, 7)?;
        mem.expect(BUF / 4 * 3, BUF / 4, 7)?;
        mem.fill(8)?;
        ctx.sees_all(0, &mem, 8)?;
        mem.expect_all(8)?;
    }
    let shared = Mem::shared(BUF)?;
    shared.fill(9)?;
    ctx.adopt(&shared)?;
    ctx.sees_all(0, &shared, 9)?;
    shared.advise(0, BUF / 2, MemAdvice::Remove)?;
    shared.expect_zero(0, BUF / 2)?;
    ctx.sees_zero(0, &shared, 0, BUF / 2)?;
    ctx.sees(0, &shared, BUF / 2, BUF / 2, 9)?;
    shared.expect(BUF / 2, BUF / 2, 9)
}
