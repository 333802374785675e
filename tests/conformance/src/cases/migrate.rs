//! Migration: to the device, home by fault or by request, over unmapped and moved ranges. Kernel selftests.

use std::os::fd::AsFd;

use uhmm_sdk::{Advice, PageStatus, Residency, UffdKind};

use super::mirror::file_with;
use crate::case::{CaseResult, During, Failure, Registry, ensure, ensure_eq};
use crate::ctx::{BUF, Ctx, PMD, prot};
use crate::mem::{Mem, PAGE, Remap};
use crate::pattern;

pub(super) fn register(list: &mut Registry) {
    list.both("T12_migrate", migrate);
    list.both("T13_migrate_file_private", migrate_file_private);
    list.both("T14_migrate_fault", migrate_fault);
    list.both("T15_migrate_release", migrate_release);
    list.both("T16_migrate_shared", migrate_shared);
    list.both("T18_migrate_multiple", migrate_multiple);
    list.both("T28_hmm_gup_test", gup_test);
    list.both("T34_migrate_partial_unmap_fault", partial_unmap_fault);
    list.both("T35_migrate_remap_fault", remap_fault);
    list.both("T40_migrate_on_fault", migrate_on_fault);
}

fn migrate(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 12)?;
    let report = ctx.all_to_device(0, &mem)?;
    if ctx.undisturbed() {
        ensure_eq!(report.moved_pages, BUF / PAGE, "Pages moved");
    }
    ctx.on_device(0, &mem, 0, BUF)?;
    ctx.sees_all(0, &mem, 12)?;
    mem.expect_all(12)
}

fn migrate_file_private(ctx: &Ctx) -> CaseResult {
    let file = file_with(&pattern::bytes(1, 0, BUF))?;
    let mem = Mem::file_private(file.as_fd(), BUF)?;
    mem.fill(13)?;
    ctx.adopt_if_possible(&mem)?;
    ctx.all_to_device(0, &mem)?;
    ctx.sees_all(0, &mem, 13)?;
    mem.expect_all(13)
}

fn migrate_fault(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 14)?;
    ctx.all_to_device(0, &mem)?;
    ctx.sees_all(0, &mem, 14)?;
    mem.expect(0, BUF / 2, 14)?;
    // What a killed driver had asked for may still be served.
    if ctx.undisturbed() && !ctx.coherent() {
        ctx.at_home(&mem, 0, BUF / 2)?;
    }
    let report = ctx.all_to_device(0, &mem)?;
    if ctx.undisturbed() && !ctx.coherent() {
        // The first half at least has moved; what had stayed on the device was kept there.
        ensure!(report.moved_pages >= BUF / 2 / PAGE, "{} pages moved", report.moved_pages);
        ensure_eq!(
            report.moved_pages + report.pages_with(PageStatus::AlreadyThere),
            BUF / PAGE,
            "Pages moved or there already"
        );
    }
    ctx.on_device(0, &mem, 0, BUF)?;
    ctx.sees_all(0, &mem, 14)?;
    mem.expect_all(14)
}

fn migrate_release(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 15)?;
    ctx.all_to_device(0, &mem)?;
    ctx.sees_all(0, &mem, 15)?;
    let evicted = ctx.session.evict(ctx.device(0)?, 0).during("Evict everything")?;
    if ctx.undisturbed() {
        ensure_eq!(evicted, BUF / PAGE, "Pages evicted");
    }
    ctx.at_home(&mem, 0, BUF)?;
    mem.expect(0, BUF / 2, 15)?;
    mem.expect_all(15)
}

/// Shared memory is used in place; nothing of it moves, not even in part.
fn migrate_shared(ctx: &Ctx) -> CaseResult {
    let mem = Mem::shared(BUF)?;
    ctx.adopt(&mem)?;
    let target = ctx.device(0)?.target();
    for written in [false, true] {
        if written {
            mem.fill(16)?;
        }
        if let Ok(report) = ctx.migrate(mem.addr(), BUF, target) {
            ensure_eq!(report.moved_pages, 0, "Pages of shared memory that moved");
            ensure_eq!(report.pages_with(PageStatus::Moved), 0, "Pages reported as moved");
            ensure_eq!(report.pages_with(PageStatus::AlreadyThere), 0, "Pages reported as being on the device");
        }
        ctx.at_home(&mem, 0, BUF)?;
    }
    ctx.sees_all(0, &mem, 16)?;
    ctx.at_home(&mem, 0, BUF)?;
    mem.expect_all(16)
}

fn migrate_multiple(ctx: &Ctx) -> CaseResult {
    for round in 0..10 {
        let mem = ctx.patterned(BUF, 1800 + round)?;
        ctx.all_to_device(0, &mem)?;
        ctx.sees_all(0, &mem, 1800 + round)?;
        if ctx.coherent() {
            ctx.to_home(&mem, 0, BUF)?;
        }
        mem.expect_all(1800 + round)?;
        ctx.at_home(&mem, 0, BUF)?;
    }
    Ok(())
}

/// Page 0: touched by the CPU. Page 1: read by the kernel on the process's behalf. Pages 2 and 3: pinned for long.
fn gup_test(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(4 * PAGE, 28)?;
    ctx.session.advise(mem.addr(), mem.len(), Advice::Granularity(Some(0))).during("Advise the granularity")?;
    ctx.all_to_device(0, &mem)?;
    ensure_eq!(mem.load(0)?, pattern::word(28, 0), "Page 0, read by the CPU");
    if ctx.session.uffd_kind() == UffdKind::Full {
        let mut page = vec![0; PAGE as usize];
        uhmm_kernel_hook::process::vm_read(std::process::id(), mem.addr() + PAGE, &mut page)?;
        ensure!(page == pattern::bytes(28, PAGE, PAGE), "The kernel reads other bytes of page 1");
    } else {
        mem.expect(PAGE, PAGE, 28)?;
    }
    ctx.session.pin(mem.addr() + 2 * PAGE, 2 * PAGE).during("Pin")?;
    let snapshot = ctx.snapshot(0, &mem, 0, 4 * PAGE)?;
    let first = if ctx.coherent() { prot::COHERENT_LOCAL | prot::WRITE } else { prot::WRITE };
    ensure_eq!(snapshot, [first, first, prot::WRITE, prot::WRITE], "Snapshot after pinning");
    let report = ctx.migrate(mem.addr(), 4 * PAGE, ctx.device(0)?.target()).during("Migrate pinned pages")?;
    ensure_eq!(report.pages_with(PageStatus::Pinned), 2, "Pages that stay because they are pinned ({report:?})");
    let runs = ctx.session.residency(mem.addr() + 2 * PAGE, 2 * PAGE).during("Residency")?;
    let stays = runs.iter().all(|run| run.pinned && run.residency == Residency::System);
    ensure!(stays, "Pinned pages are not in system memory: {runs:?}");
    mem.expect_all(28)?;
    ctx.session.unpin(mem.addr() + 2 * PAGE, 2 * PAGE).during("Unpin")?;
    ctx.all_to_device(0, &mem)?;
    ctx.sees_all(0, &mem, 28)?;
    mem.expect_all(28)
}

fn partial_unmap_fault(ctx: &Ctx) -> CaseResult {
    for huge in [true, false] {
        for quarter in [0, 1, 2] {
            let what = format!("huge {huge}, half unmapped at {quarter}/4");
            let run = || -> CaseResult {
                let mem = if huge { ctx.huge(PMD, Some(34))? } else { ctx.patterned_small(PMD, 34)? };
                ctx.all_to_device(0, &mem)?;
                ctx.sees_all(0, &mem, 34)?;
                let start = quarter * PMD / 4;
                mem.unmap(start, PMD / 2)?;
                mem.expect(0, start, 34)?;
                mem.expect(start + PMD / 2, PMD / 2 - start, 34)
            };
            run().during(&what)?;
        }
    }
    Ok(())
}

fn remap_fault(ctx: &Ctx) -> CaseResult {
    for after in [false, true] {
        for keep in [false, true] {
            for huge in [false, true] {
                for quarter in [0, 1, 2] {
                    let what = format!(
                        "mremap {}, dontunmap {keep}, huge {huge}, {quarter}/4 beyond a huge page's boundary",
                        if after { "after migration" } else { "before migration" }
                    );
                    remap_once(ctx, after, keep, huge, quarter * PMD / 4).during(&what)?;
                }
            }
        }
    }
    Ok(())
}

fn remap_once(ctx: &Ctx, after: bool, keep: bool, huge: bool, offset: u64) -> CaseResult {
    let mem = if huge { ctx.huge(PMD, Some(35))? } else { ctx.patterned_small(PMD, 35)? };
    let target = Mem::huge(2 * PMD)?;
    let how = if keep { Remap::KeepOld } else { Remap::Move };
    if after {
        ctx.all_to_device(0, &mem)?;
        ctx.sees_all(0, &mem, 35)?;
    }
    let moved = mem.remap_over(0, PMD, how, &target, offset)?;
    if !after {
        ctx.all_to_device(0, &moved)?;
        ctx.sees_all(0, &moved, 35)?;
    }
    moved.expect_all(35)?;
    if keep {
        // The old range is still mapped, and empty.
        mem.expect_zero(0, PMD)?;
    }
    ctx.sees_all(0, &moved, 35)?;
    moved.expect_all(35)
}

fn migrate_on_fault(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 40)?;
    let report = ctx.sees_all(0, &mem, 40)?;
    ctx.one_fault(&report)?;
    ctx.on_device(0, &mem, 0, BUF)?;
    let report = ctx.writes(0, &mem, 0, BUF, 41)?;
    if ctx.undisturbed() && report.fault_count > 1 {
        return Err(Failure::Failed(format!("{} faults for a write to pages that are there", report.fault_count)));
    }
    mem.expect_all(41)
}
