//! Policy beyond kfdtest: change detection, no access, read-mostly copies, preferred location, splitting of advice.

use uhmm_sdk::{AccessMode, Advice, ErrorCode, Residency, Target, Uniform};

use super::policy::{advise, attributes};
use crate::case::{CaseResult, During, Registry, ensure, ensure_eq};
use crate::ctx::{BUF, Ctx, refused};
use crate::mem::{Mem, PAGE};
use crate::pattern;

pub(super) fn register(list: &mut Registry) {
    list.one("IGT.madvise-no-range-invalidate-same-attr", same_attribute);
    list.one("IGT.madvise-range-invalidate-change-attr", changed_attribute);
    list.one("IGT.madvise-multi-vma", multi_vma);
    list.one("IGT.madvise-split-vma", split_vma);
    list.one("IGT.madvise-preferred-loc-device", preferred_device);
    list.one("IGT.madvise-preferred-loc-system", preferred_system);
    list.one("IGT.madvise-preferred-loc-undefined", preferred_undefined);
    list.one("IGT.madvise-preferred-loc-atomic-device", |ctx| preferred_atomic(ctx, true));
    list.one("IGT.madvise-preferred-loc-atomic-system", |ctx| preferred_atomic(ctx, false));
    list.one("C01_read_mostly_duplicates", read_mostly);
    list.one("C02_read_mostly_collapses_on_device_write", read_mostly_device_write);
    list.one("C03_no_access", no_access);
    list.one("C04_pin_and_unpin", pin_and_unpin);
    list.one("C05_advice_survives_migration", advice_survives);
}

/// The same value again invalidates nothing: the device's mappings stay.
fn same_attribute(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 1)?;
    let all = |advice| advise(ctx, &mem, 0, BUF, advice);
    let target = ctx.device(0)?.target();
    let again = [
        Advice::PreferredLocation(Some(target)),
        Advice::Granularity(Some(9)),
        Advice::DeviceReadWrite,
        Advice::MigrateOnFault,
        Advice::ReadMostly(false),
    ];
    again.into_iter().try_for_each(all)?;
    ctx.writes(0, &mem, 0, BUF, 2)?;
    let settled = ctx.writes(0, &mem, 0, BUF, 3)?;
    let revokes = ctx.metric("pager", "revokes")?;
    again.into_iter().try_for_each(all)?;
    let report = ctx.writes(0, &mem, 0, BUF, 4)?;
    if ctx.undisturbed() {
        ensure_eq!(settled.fault_count, 0, "Faults of a second write");
        ensure_eq!(report.fault_count, 0, "Faults of a write after the same advice was given again");
    }
    if ctx.counters_hold() {
        ensure_eq!(ctx.metric("pager", "revokes")?, revokes, "Revocations for the same advice again");
    }
    mem.expect_all(4)
}

fn changed_attribute(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 1)?;
    ctx.writes(0, &mem, 0, BUF, 2)?;
    advise(ctx, &mem, 0, BUF, Advice::DeviceReadOnly)?;
    let bytes = pattern::bytes(3, 0, BUF);
    refused(ctx.try_write(0, mem.addr(), &bytes)?, ErrorCode::Permission, "A write through a mapping from before")?;
    ctx.sees_all(0, &mem, 2)?;
    mem.expect_all(2)
}

/// Advice over several mappings with different protection, one call.
fn multi_vma(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 1)?;
    ctx.protect(&mem, BUF / 4, BUF / 4, true, false)?;
    ctx.protect(&mem, BUF / 2, PAGE, false, false)?;
    let target = ctx.device(0)?.target();
    advise(ctx, &mem, 0, BUF, Advice::PreferredLocation(Some(target)))?;
    ensure_eq!(attributes(ctx, &mem, 0, BUF)?.preferred, Uniform::Same(Some(target)), "Preferred location");
    ctx.sees(0, &mem, 0, BUF / 2, 1)?;
    ctx.sees(0, &mem, BUF / 2 + PAGE, BUF / 2 - PAGE, 1)?;
    mem.expect(0, BUF / 2, 1)?;
    mem.expect(BUF / 2 + PAGE, BUF / 2 - PAGE, 1)
}

fn split_vma(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 1)?;
    let target = ctx.device(0)?.target();
    advise(ctx, &mem, BUF / 4, BUF / 2, Advice::PreferredLocation(Some(target)))?;
    ensure_eq!(attributes(ctx, &mem, 0, BUF)?.preferred, Uniform::Mixed, "Preferred location of the whole");
    let middle = attributes(ctx, &mem, BUF / 4, BUF / 2)?.preferred;
    ensure_eq!(middle, Uniform::Same(Some(target)), "Preferred location of the middle");
    for (off, len) in [(0, BUF / 4), (BUF / 4 * 3, BUF / 4)] {
        ensure_eq!(attributes(ctx, &mem, off, len)?.preferred, Uniform::Same(None), "Preferred location beside it");
    }
    // The advice goes with the addresses that are left, and with nothing else.
    mem.unmap(BUF / 2, BUF / 4)?;
    let left = attributes(ctx, &mem, BUF / 4, BUF / 4)?.preferred;
    ensure_eq!(left, Uniform::Same(Some(target)), "Preferred location of what is left of the middle");
    ctx.sees(0, &mem, 0, BUF / 2, 1)?;
    mem.expect(0, BUF / 2, 1)?;
    mem.expect(BUF / 4 * 3, BUF / 4, 1)
}

fn preferred_device(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 1)?;
    advise(ctx, &mem, 0, BUF, Advice::PreferredLocation(Some(ctx.device(0)?.target())))?;
    ctx.sees_all(0, &mem, 1)?;
    ctx.on_device(0, &mem, 0, BUF)?;
    mem.expect_all(1)?;
    ctx.writes(0, &mem, 0, BUF, 2)?;
    mem.expect_all(2)
}

/// A region whose home is system memory is used by the device where it is.
fn preferred_system(ctx: &Ctx) -> CaseResult {
    let region = ctx.session.allocate(BUF).during("Allocate")?;
    let advice = Advice::PreferredLocation(Some(Target::Home));
    ctx.session.advise(region.addr(), BUF, advice).during("Advise")?;
    for word in 0..BUF / 8 {
        region.write_u64(8 * word, pattern::word(1, word)).during("Write")?;
    }
    let access = ctx.try_read(0, region.addr(), BUF)?.during("Device read")?;
    ensure!(access.bytes == pattern::bytes(1, 0, BUF), "The device sees other bytes");
    ctx.try_write(0, region.addr(), &pattern::bytes(2, 0, BUF))?.during("Device write")?;
    let summary = ctx.session.residency_summary(region.addr(), BUF).during("Residency")?;
    ensure_eq!(summary.system_pages, BUF / PAGE, "Pages at their preferred location ({summary:?})");
    for word in 0..BUF / 8 {
        ensure_eq!(region.read_u64(8 * word).during("Read")?, pattern::word(2, word), "Word {word}");
    }
    Ok(())
}

fn preferred_undefined(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 1)?;
    advise(ctx, &mem, 0, BUF, Advice::PreferredLocation(None))?;
    ctx.sees_all(0, &mem, 1)?;
    ctx.on_device(0, &mem, 0, BUF)?;
    mem.expect_all(1)
}

/// Atomics work whatever the preferred location is.
fn preferred_atomic(ctx: &Ctx, device: bool) -> CaseResult {
    let mem = ctx.patterned(16 * PAGE, 1)?;
    let location = if device { ctx.device(0)?.target() } else { Target::Home };
    advise(ctx, &mem, 0, mem.len(), Advice::PreferredLocation(Some(location)))?;
    ctx.exclusive(0, &mem, 0, mem.len())?;
    ctx.sees_all(0, &mem, 1)?;
    ctx.writes(0, &mem, 0, mem.len(), 2)?;
    mem.expect_all(2)?;
    ctx.session.check_exclusive(mem.addr(), mem.len()).during("The check after the CPU's access")
}

/// Copies on every reading device, and the CPU keeps reading its own page; the CPU's write ends the copies.
fn read_mostly(ctx: &Ctx) -> CaseResult {
    ctx.fits(BUF)?;
    let region = ctx.session.allocate(BUF).during("Allocate")?;
    let fill = |seed| -> CaseResult {
        for word in 0..BUF / 8 {
            region.write_u64(8 * word, pattern::word(seed, word)).during("Write")?;
        }
        Ok(())
    };
    let check = |seed| -> CaseResult {
        for word in 0..BUF / 8 {
            ensure_eq!(region.read_u64(8 * word).during("Read")?, pattern::word(seed, word), "Word {word}");
        }
        for index in 0..ctx.device_count() {
            let access = ctx.try_read(index, region.addr(), BUF)?.during("Device read")?;
            ensure!(access.bytes == pattern::bytes(seed, 0, BUF), "Device {index} sees other bytes than {seed}");
        }
        Ok(())
    };
    fill(1)?;
    ctx.session.advise(region.addr(), BUF, Advice::ReadMostly(true)).during("Advise read-mostly")?;
    check(1)?;
    if ctx.undisturbed() {
        let runs = ctx.session.residency(region.addr(), BUF).during("Residency")?;
        let copies = runs.iter().all(|run| matches!(run.residency, Residency::Duplicated(_)));
        ensure!(copies, "Read-mostly pages that a device has read are not duplicated: {runs:?}");
    }
    // The CPU reads without a fault while the copies live, and a device without one too.
    check(1)?;
    fill(2)?;
    check(2)?;
    fill(3)?;
    check(3)?;
    ctx.session.advise(region.addr(), BUF, Advice::ReadMostly(false)).during("Take it back")?;
    check(3)
}

fn read_mostly_device_write(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 1)?;
    advise(ctx, &mem, 0, BUF, Advice::ReadMostly(true))?;
    let last = ctx.device_count() - 1;
    ctx.sees_all(0, &mem, 1)?;
    ctx.sees_all(last, &mem, 1)?;
    mem.expect_all(1)?;
    for seed in 2..5 {
        ctx.writes(last, &mem, 0, BUF, seed)?;
        ctx.sees_all(0, &mem, seed)?;
        mem.expect_all(seed)?;
    }
    Ok(())
}

fn no_access(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 1)?;
    ctx.sees_all(0, &mem, 1)?;
    let id = ctx.device(0)?.id();
    advise(ctx, &mem, 0, BUF, Advice::Access { device: id, mode: AccessMode::None })?;
    refused(ctx.try_read(0, mem.addr(), BUF)?, ErrorCode::Permission, "A device read without access")?;
    let bytes = pattern::bytes(2, 0, BUF);
    refused(ctx.try_write(0, mem.addr(), &bytes)?, ErrorCode::Permission, "A device write without access")?;
    if ctx.device_count() > 1 {
        ctx.sees_all(1, &mem, 1)?;
    }
    mem.expect_all(1)?;
    advise(ctx, &mem, 0, BUF, Advice::Access { device: id, mode: AccessMode::Migrate })?;
    ctx.writes(0, &mem, 0, BUF, 3)?;
    mem.expect_all(3)
}

fn pin_and_unpin(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 1)?;
    ctx.all_to_device(0, &mem)?;
    ctx.session.pin(mem.addr(), BUF / 2).during("Pin")?;
    ctx.at_home(&mem, 0, BUF / 2)?;
    ctx.on_device(0, &mem, BUF / 2, BUF / 2)?;
    ensure_eq!(ctx.residency(&mem, 0, BUF)?.pinned_pages, BUF / 2 / PAGE, "Pinned pages");
    ensure_eq!(attributes(ctx, &mem, 0, BUF / 2)?.pinned, Uniform::Same(true), "Attribute of the pinned half");
    ensure_eq!(attributes(ctx, &mem, 0, BUF)?.pinned, Uniform::Mixed, "Attribute of both halves");
    ctx.session.pin(mem.addr(), BUF / 2).during("Pin again")?;
    ctx.session.unpin(mem.addr(), BUF / 2).during("Unpin")?;
    ctx.all_to_device(0, &mem)?;
    ctx.sees_all(0, &mem, 1)?;
    mem.expect_all(1)
}

fn advice_survives(ctx: &Ctx) -> CaseResult {
    let mem: Mem = ctx.patterned(BUF, 1)?;
    let target = ctx.device(0)?.target();
    advise(ctx, &mem, 0, BUF, Advice::PreferredLocation(Some(target)))?;
    advise(ctx, &mem, 0, BUF, Advice::Granularity(Some(3)))?;
    for _ in 0..3 {
        ctx.all_to_device(0, &mem)?;
        mem.expect_all(1)?;
        ctx.to_home(&mem, 0, BUF)?;
    }
    let found = attributes(ctx, &mem, 0, BUF)?;
    ensure_eq!(found.preferred, Uniform::Same(Some(target)), "Preferred location");
    ensure_eq!(found.granularity_log2_pages, Uniform::Same(Some(3)), "Granularity");
    Ok(())
}
