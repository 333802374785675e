//! 2 MiB pages: kept huge in both directions when it can be, split when it cannot; zero pages are never copied.

use std::time::Instant;

use uhmm_sdk::{FaultPoint, PageStatus};

use crate::case::{CaseResult, During, Registry, ensure, ensure_eq, not_applicable};
use crate::ctx::{Ctx, PMD, prot};
use crate::mem::{Mem, MemAdvice, PAGE};
use crate::pattern;

pub(super) fn register(list: &mut Registry) {
    list.both("T08_anon_write_huge", anon_write_huge);
    list.both("T23_compound", compound);
    list.both("T30_migrate_anon_huge_empty", huge_empty);
    list.both("T31_migrate_anon_huge_zero", huge_zero);
    list.both("T32_migrate_anon_huge_free", huge_free);
    list.both("T33_migrate_anon_huge_fault", huge_fault);
    list.both("T36_migrate_anon_huge_err", huge_err);
    list.both("T37_migrate_anon_huge_zero_err", huge_zero_err);
    list.both("T38_benchmark_thp_migration", benchmark);
    list.one("H01_huge_pages_come_home_huge", home_huge);
    list.one("H02_zero_pages_cost_no_copy", zero_pages_cost_nothing);
}

/// A kernel without transparent huge pages has nothing to show here.
fn needs_thp() -> CaseResult {
    let text = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if text.contains("[never]") || text.is_empty() {
        not_applicable!("This kernel has no transparent huge pages (enabled: {})", text.trim());
    }
    Ok(())
}

fn anon_write_huge(ctx: &Ctx) -> CaseResult {
    needs_thp()?;
    let mem = ctx.huge(PMD, None)?;
    let report = ctx.writes(0, &mem, 0, PMD, 8)?;
    ctx.one_fault(&report)?;
    mem.expect_all(8)
}

/// Of a transparent huge page; of hugetlb pages: HT07.
fn compound(ctx: &Ctx) -> CaseResult {
    needs_thp()?;
    let mem = Mem::huge(PMD)?;
    mem.fill(23)?;
    if mem.advise(0, PMD, MemAdvice::Collapse).is_err() {
        not_applicable!("The kernel has no huge page to spare");
    }
    ctx.adopt(&mem)?;
    let pages = (PMD / PAGE) as usize;
    let snapshot = ctx.snapshot(0, &mem, 0, PMD)?;
    let level = snapshot[0] & (prot::PMD | prot::PUD);
    ensure!(level != 0, "A huge page is not shown as huge: {:#x}", snapshot[0]);
    ensure_eq!(snapshot, vec![prot::WRITE | level; pages], "Snapshot of a huge page");
    ctx.protect(&mem, 0, PMD, true, false)?;
    ensure_eq!(ctx.snapshot(0, &mem, 0, PMD)?, vec![prot::READ | level; pages], "Snapshot after PROT_READ");
    mem.expect_all(23)
}

fn read_only_huge(ctx: &Ctx) -> CaseResult<Mem> {
    needs_thp()?;
    let mem = ctx.huge(PMD, None)?;
    ctx.protect(&mem, 0, PMD, true, false)?;
    Ok(mem)
}

fn huge_empty(ctx: &Ctx) -> CaseResult {
    let mem = read_only_huge(ctx)?;
    ctx.all_to_device(0, &mem)?;
    ctx.sees_zero(0, &mem, 0, PMD)?;
    mem.expect_zero(0, PMD)
}

fn huge_zero(ctx: &Ctx) -> CaseResult {
    let mem = read_only_huge(ctx)?;
    ensure_eq!(mem.load(0)?, 0, "The CPU's read of an untouched page");
    ctx.all_to_device(0, &mem)?;
    ctx.sees_zero(0, &mem, 0, PMD)?;
    mem.expect_zero(0, PMD)
}

fn huge_free(ctx: &Ctx) -> CaseResult {
    needs_thp()?;
    let mem = ctx.huge(PMD, Some(32))?;
    ctx.all_to_device(0, &mem)?;
    ctx.sees_all(0, &mem, 32)?;
    mem.advise(0, PMD, MemAdvice::Free)?;
    mem.unmap(0, PMD)
}

fn huge_fault(ctx: &Ctx) -> CaseResult {
    if ctx.coherent() {
        not_applicable!("Allocated memory, which the CPU reaches on a device, goes there in pages of 4 KiB");
    }
    needs_thp()?;
    let mem = Mem::huge(PMD)?;
    mem.fill(33)?;
    if mem.advise(0, PMD, MemAdvice::Collapse).is_err() {
        not_applicable!("The kernel has no huge page to spare");
    }
    ctx.adopt(&mem)?;
    ctx.all_to_device(0, &mem)?;
    let snapshot = ctx.snapshot(0, &mem, 0, PMD)?;
    if ctx.undisturbed() {
        let expected = vec![prot::PRIVATE_LOCAL | prot::WRITE | prot::PMD; (PMD / PAGE) as usize];
        ensure_eq!(snapshot[0], expected[0], "First byte of the snapshot");
        ensure_eq!(snapshot, expected, "Snapshot of one large device mapping");
    }
    ensure_eq!(mem.present_pages(0, PMD)?, 0, "Pages that /proc/self/pagemap calls present");
    ctx.sees_all(0, &mem, 33)?;
    mem.expect_all(33)
}

/// (a) No run of frames for a huge page on the way out. (b) No huge page on the way home.
fn huge_err(ctx: &Ctx) -> CaseResult {
    needs_thp()?;
    let mem = ctx.huge(PMD, Some(36))?;
    ctx.session.inject(FaultPoint::HugeFrames, 1).during("Inject")?;
    ctx.all_to_device(0, &mem)?;
    ctx.sees_all(0, &mem, 36)?;
    ensure_eq!(mem.load(8 * 2048)?, pattern::word(36, 2048), "Word 2048");
    mem.expect_all(36)?;
    ctx.session.inject(FaultPoint::HugeFrames, 0).during("Disarm")?;
    drop(mem);
    let mem = ctx.huge(PMD, Some(37))?;
    ctx.all_to_device(0, &mem)?;
    mem.advise(0, PMD, MemAdvice::NoHugePage)?;
    ctx.to_home(&mem, 0, PMD)?;
    ensure_eq!(mem.load(8 * 2048)?, pattern::word(37, 2048), "Word 2048");
    mem.expect_all(37)
}

fn huge_zero_err(ctx: &Ctx) -> CaseResult {
    needs_thp()?;
    for read in [false, true] {
        let mem = ctx.huge(PMD, None)?;
        if read {
            ensure_eq!(mem.load(0)?, 0, "The CPU's read of an untouched page");
        }
        ctx.session.inject(FaultPoint::HugeFrames, 1).during("Inject")?;
        ctx.all_to_device(0, &mem)?;
        ctx.sees_zero(0, &mem, 0, PMD)?;
        mem.expect_zero(0, PMD)?;
        ctx.session.inject(FaultPoint::HugeFrames, 0).during("Disarm")?;
    }
    Ok(())
}

/// Milliseconds of the best of some rounds, out and home.
fn timed(ctx: &Ctx, len: u64, huge: bool, rounds: usize) -> CaseResult<(f64, f64)> {
    let mem = if huge { ctx.huge(len, Some(38))? } else { ctx.patterned_small(len, 38)? };
    let mut best = (f64::INFINITY, f64::INFINITY);
    for round in 0..=rounds {
        let start = Instant::now();
        ctx.all_to_device(0, &mem)?;
        let out = start.elapsed().as_secs_f64() * 1e3;
        let start = Instant::now();
        ctx.to_home(&mem, 0, len)?;
        let home = start.elapsed().as_secs_f64() * 1e3;
        if round > 0 {
            best = (best.0.min(out), best.1.min(home));
        }
    }
    mem.expect_all(38)?;
    Ok(best)
}

fn benchmark(ctx: &Ctx) -> CaseResult {
    needs_thp()?;
    let memory = ctx.memory_in_huge_pages()?;
    let rounds = if ctx.undisturbed() { 5 } else { 1 };
    let mut lines = Vec::new();
    for quarters in [1, 2, 4, 8, 16, 32, 512] {
        let len = PMD / 4 * quarters;
        if len > memory / 2 {
            lines.push(format!("{} MiB skipped (device memory)", len >> 20));
            continue;
        }
        let (huge, small) = (timed(ctx, len, true, rounds)?, timed(ctx, len, false, rounds)?);
        let gb_per_s = |ms: f64| len as f64 / ms / 1e6;
        let better = |small: f64, huge: f64| (small / huge - 1.0) * 100.0;
        lines.push(format!(
            "{} KiB: out {:.2} ms {:.2} GB/s ({:+.0} % over 4 KiB), home {:.2} ms {:.2} GB/s ({:+.0} %)",
            len >> 10,
            huge.0,
            gb_per_s(huge.0),
            better(small.0, huge.0),
            huge.1,
            gb_per_s(huge.1),
            better(small.1, huge.1),
        ));
    }
    ctx.note(lines.join("; "));
    Ok(())
}

/// Whole huge pages of the range, as the kernel counts them.
fn huge_pages(mem: &Mem) -> CaseResult<u64> {
    mem.huge_mapped_pages(0, mem.len())
}

fn home_huge(ctx: &Ctx) -> CaseResult {
    needs_thp()?;
    let mem = Mem::huge(2 * PMD)?;
    mem.fill(1)?;
    if mem.advise(0, 2 * PMD, MemAdvice::Collapse).is_err() {
        not_applicable!("The kernel has no huge page to spare");
    }
    ctx.adopt(&mem)?;
    ensure_eq!(huge_pages(&mem)?, 2 * PMD / PAGE, "Pages mapped huge before");
    ctx.all_to_device(0, &mem)?;
    ctx.to_home(&mem, 0, 2 * PMD)?;
    mem.expect_all(1)?;
    if ctx.undisturbed() {
        ensure_eq!(huge_pages(&mem)?, 2 * PMD / PAGE, "Pages mapped huge after the round trip");
    }
    Ok(())
}

/// Never-touched pages go out without a copy: nothing but metadata moves, and no system memory is taken for them.
fn zero_pages_cost_nothing(ctx: &Ctx) -> CaseResult {
    let len = 4 * PMD;
    let mem = ctx.untouched(len)?;
    let report = ctx.all_to_device(0, &mem)?;
    if ctx.undisturbed() {
        ensure_eq!(report.pages_with(PageStatus::Busy), 0, "Busy pages");
        ensure_eq!(mem.present_pages(0, len)?, 0, "System pages behind memory that was never touched");
    }
    ctx.sees_zero(0, &mem, 0, len)?;
    // One touched page among untouched ones: only it has content.
    let mem = Mem::small(512 * PAGE)?;
    mem.fill_at(100 * PAGE, PAGE, 5)?;
    ctx.adopt(&mem)?;
    ctx.all_to_device(0, &mem)?;
    ctx.sees_zero(0, &mem, 0, 100 * PAGE)?;
    ctx.sees(0, &mem, 100 * PAGE, PAGE, 5)?;
    ctx.sees_zero(0, &mem, 101 * PAGE, 411 * PAGE)?;
    mem.expect_zero(0, 100 * PAGE)?;
    mem.expect(100 * PAGE, PAGE, 5)?;
    mem.expect_zero(101 * PAGE, 411 * PAGE)
}
