//! Placement policy as kfdtest and CUDA have it: advice, queries, granularity, prefetch, profiling.

use uhmm_sdk::{AccessMode, Advice, RangeAttributes, Target, TraceCause, TraceKind, Uniform};

use crate::case::{CaseResult, During, Registry, ensure, ensure_eq, not_applicable};
use crate::ctx::{BUF, Ctx, PMD};
use crate::mem::{Mem, PAGE};
use crate::pattern;

pub(super) fn register(list: &mut Registry) {
    list.one("K02_SetGetAttributesTest", set_get_attributes);
    list.one("K03_XNACKModeTest", xnack_mode);
    list.one("K05_SplitSystemRangeTest", |ctx| split_range(ctx, false));
    list.one("K05_SplitVramRangeTest", |ctx| split_range(ctx, true));
    list.one("K09_PrefetchTest", prefetch);
    list.one("K11_MigrateAccessInPlaceTest", access_in_place);
    list.one("K12_MigrateGranularityTest", granularity);
    list.one("K20_HMMProfilingEvent", profiling_event);
}

pub(super) fn attributes(ctx: &Ctx, mem: &Mem, off: u64, len: u64) -> CaseResult<RangeAttributes> {
    ctx.session.attributes(mem.addr() + off, len).during("Query the attributes")
}

pub(super) fn advise(ctx: &Ctx, mem: &Mem, off: u64, len: u64, advice: Advice) -> CaseResult {
    ctx.session.advise(mem.addr() + off, len, advice).during(&format!("Advise {advice:?}"))
}

fn set_get_attributes(ctx: &Ctx) -> CaseResult {
    let mem = ctx.untouched(BUF)?;
    let defaults = attributes(ctx, &mem, 0, BUF)?;
    ensure_eq!(defaults.prefetched, Uniform::Same(None), "Default prefetch location");
    ensure_eq!(defaults.preferred, Uniform::Same(None), "Default preferred location");
    ensure_eq!(defaults.granularity_log2_pages, Uniform::Same(None), "Default granularity");
    ensure_eq!(defaults.in_place_mask, Uniform::Same(0), "Default in-place devices");
    ensure_eq!(defaults.no_access_mask, Uniform::Same(0), "Default devices without access");
    ensure_eq!(defaults.read_mostly, Uniform::Same(false), "Default read-mostly");
    ensure_eq!(defaults.device_read_only, Uniform::Same(false), "Default read-only");
    ensure_eq!(defaults.pinned, Uniform::Same(false), "Default pin");
    let device = ctx.device(0)?;
    let (id, target) = (device.id(), device.target());
    for advice in [
        Advice::PreferredLocation(Some(target)),
        Advice::Granularity(Some(4)),
        Advice::ReadMostly(true),
        Advice::DeviceReadOnly,
        Advice::Access { device: id, mode: AccessMode::InPlace },
    ] {
        advise(ctx, &mem, 0, BUF, advice)?;
    }
    let set = attributes(ctx, &mem, 0, BUF)?;
    ensure_eq!(set.preferred, Uniform::Same(Some(target)), "Preferred location");
    ensure_eq!(set.granularity_log2_pages, Uniform::Same(Some(4)), "Granularity");
    ensure_eq!(set.read_mostly, Uniform::Same(true), "Read-mostly");
    ensure_eq!(set.device_read_only, Uniform::Same(true), "Read-only");
    ensure_eq!(set.in_place_mask, Uniform::Same(1 << id), "In-place devices");
    ensure_eq!(set.no_access_mask, Uniform::Same(0), "Devices without access");
    advise(ctx, &mem, BUF / 2, BUF / 4, Advice::Access { device: id, mode: AccessMode::None })?;
    let part = attributes(ctx, &mem, BUF / 2, BUF / 4)?;
    ensure_eq!((part.in_place_mask, part.no_access_mask), (Uniform::Same(0), Uniform::Same(1 << id)), "Masks");
    let whole = attributes(ctx, &mem, 0, BUF)?;
    ensure_eq!(whole.no_access_mask, Uniform::Mixed, "Devices without access, of different parts");
    ensure_eq!(whole.preferred, Uniform::Same(Some(target)), "Preferred location of the whole range");
    for advice in [
        Advice::PreferredLocation(None),
        Advice::Granularity(None),
        Advice::ReadMostly(false),
        Advice::DeviceReadWrite,
        Advice::Access { device: id, mode: AccessMode::Migrate },
    ] {
        advise(ctx, &mem, 0, BUF, advice)?;
    }
    ensure_eq!(attributes(ctx, &mem, 0, BUF)?, defaults, "Attributes after everything was taken back");
    Ok(())
}

fn xnack_mode(_: &Ctx) -> CaseResult {
    not_applicable!("Recoverable device faults are always on and cannot be switched off")
}

/// Beginning and end of a range, in sixteenths of a mapping.
type Sixteenths = (u64, u64);

/// Overlapping management of one mapping in all topologies; `on_device`: with its data there.
fn split_range(ctx: &Ctx, on_device: bool) -> CaseResult {
    let topologies: [(&str, Sixteenths, Sixteenths); 7] = [
        ("inside", (0, 16), (4, 12)),
        ("tail", (0, 16), (8, 16)),
        ("tail beyond", (0, 12), (8, 16)),
        ("head", (4, 16), (0, 8)),
        ("identical", (0, 16), (0, 16)),
        ("larger", (4, 12), (0, 16)),
        ("neighbour", (0, 8), (8, 16)),
    ];
    let part = BUF / 16;
    for (name, first, second) in topologies {
        let run = || -> CaseResult {
            let mem = Mem::private(BUF)?;
            mem.fill(105)?;
            for (start, end) in [first, second] {
                ctx.adopt_at(mem.addr() + start * part, (end - start) * part)?;
                if on_device {
                    ctx.to_device(0, &mem, start * part, (end - start) * part)?;
                }
            }
            let (start, end) = (first.0.min(second.0) * part, first.1.max(second.1) * part);
            ctx.sees(0, &mem, start, end - start, 105)?;
            mem.expect_all(105)
        };
        run().during(name)?;
    }
    bridge(ctx, on_device).during("bridging two islands")?;
    let mem = ctx.patterned(BUF, 106)?;
    if on_device {
        ctx.all_to_device(0, &mem)?;
    }
    let addr = mem.addr();
    mem.unmap(0, BUF)?;
    // The mapping is gone and its management with it: giving it back says so, or has nothing to do.
    if let Err(error) = ctx.session.release(addr, BUF) {
        ensure!(!error.is_transient(), "Release after munmap: {error}");
    }
    ensure!(ctx.session.residency(addr, PAGE).is_err(), "An unmapped range still has a residency");
    Ok(())
}

fn bridge(ctx: &Ctx, on_device: bool) -> CaseResult {
    let mem = Mem::private(BUF)?;
    mem.fill(107)?;
    let part = BUF / 8;
    for (start, count) in [(0, 2), (5, 2), (1, 5)] {
        ctx.adopt_at(mem.addr() + start * part, count * part)?;
        if on_device {
            ctx.to_device(0, &mem, start * part, count * part)?;
        }
    }
    ctx.sees(0, &mem, 0, 7 * part, 107)?;
    mem.expect_all(107)
}

fn prefetch(ctx: &Ctx) -> CaseResult {
    let mem = Mem::private(BUF)?;
    mem.fill(109)?;
    ensure!(ctx.session.attributes(mem.addr(), BUF).is_err(), "A range that is not managed has attributes");
    ctx.adopt(&mem)?;
    ensure_eq!(attributes(ctx, &mem, 0, BUF)?.prefetched, Uniform::Same(None), "Prefetch location of a fresh range");
    let target = ctx.device(0)?.target();
    let pending = ctx.session.prefetch(mem.addr() + BUF / 2, BUF / 2, target);
    let report = ctx.wait_prefetch(pending)?;
    ensure!(report.complete() || !ctx.undisturbed(), "Prefetch: {:?}", report.runs);
    let upper = attributes(ctx, &mem, BUF / 2, BUF / 2)?;
    ensure_eq!(upper.prefetched, Uniform::Same(Some(target)), "Prefetch location of the upper half");
    ensure_eq!(attributes(ctx, &mem, 0, BUF)?.prefetched, Uniform::Mixed, "Prefetch location of the whole range");
    let lower = attributes(ctx, &mem, 0, BUF / 2)?;
    ensure_eq!(lower.prefetched, Uniform::Same(None), "Prefetch location of the lower half");
    let pending = ctx.session.prefetch(mem.addr(), BUF, Target::Home);
    ctx.wait_prefetch(pending)?;
    let whole = attributes(ctx, &mem, 0, BUF)?;
    ensure_eq!(whole.prefetched, Uniform::Same(Some(Target::Home)), "Prefetch location after prefetching home");
    ctx.sees_all(0, &mem, 109)?;
    mem.expect_all(109)
}

fn access_in_place(ctx: &Ctx) -> CaseResult {
    const LEN: u64 = 4 * BUF;
    ctx.fits(BUF)?;
    let region = ctx.session.allocate(LEN).during("Allocate")?;
    ctx.session.advise(region.addr(), LEN, Advice::InPlace).during("Advise in place")?;
    ctx.migrate(region.addr(), LEN, ctx.device(0)?.target()).during("Prefetch")?;
    for page in 0..LEN / PAGE {
        region.write_u64(page * PAGE, page).during("Write")?;
    }
    let summary = ctx.session.residency_summary(region.addr(), LEN).during("Residency")?;
    if ctx.device(0)?.info().coherent {
        ensure_eq!(summary.all_device_pages(), LEN / PAGE, "Pages that the CPU reaches on the device");
        ctx.migrate(region.addr(), LEN, Target::Home).during("Migrate home")?;
    } else {
        ensure_eq!(summary.all_device_pages(), 0, "Pages on the device after the CPU has touched every page");
    }
    let fill = 0x55aa_aa55_55aa_aa55u64.to_ne_bytes().repeat(LEN as usize / 8);
    ctx.try_write(0, region.addr(), &fill)?.during("Device fill")?;
    let summary = ctx.session.residency_summary(region.addr(), LEN).during("Residency")?;
    ensure_eq!(summary.system_pages, LEN / PAGE, "Pages that stayed in place ({summary:?})");
    for word in 0..LEN / 8 {
        let found = region.read_u64(8 * word).during("Read")?;
        ensure_eq!(found, 0x55aa_aa55_55aa_aa55, "Word {word} after the device's fill");
    }
    Ok(())
}

/// One touched page brings home its aligned block of 2^n pages, no more and no less.
fn granularity(ctx: &Ctx) -> CaseResult {
    let mem = Mem::huge(2 * PMD)?;
    mem.fill(112)?;
    ctx.adopt(&mem)?;
    let pages = 2 * PMD / PAGE;
    for log2 in (0..=9u8).rev() {
        advise(ctx, &mem, 0, 2 * PMD, Advice::Granularity(Some(log2)))?;
        ctx.all_to_device(0, &mem)?;
        let block = 1u64 << log2;
        for touched in [5u64, 700, 1023] {
            let expected = pattern::word(112, touched * PAGE / 8);
            ensure_eq!(mem.load(touched * PAGE)?, expected, "Page {touched}");
        }
        let mut blocks: Vec<u64> = [5, 700, 1023].map(|page: u64| page / block).to_vec();
        blocks.dedup();
        // Killed in the middle of a block, the pager may leave the rest of it for the next touch.
        for index in (0..pages / block).filter(|_| ctx.counters_hold()) {
            let summary = ctx.settled_residency(&mem, index * block * PAGE, block * PAGE)?;
            let home = if blocks.contains(&index) { block } else { 0 };
            ensure_eq!(summary.system_pages, home, "Pages at home of block {index} of 2^{log2} pages");
        }
        mem.expect_all(112)?;
    }
    Ok(())
}

fn profiling_event(ctx: &Ctx) -> CaseResult {
    ctx.needs_living_services("The trace")?;
    let mem = ctx.patterned(BUF, 120)?;
    let since = ctx.session.read_trace(0).during("Read the trace")?.last().map_or(0, |record| record.sequence + 1);
    let target = ctx.device(0)?.target();
    let pending = ctx.session.prefetch(mem.addr(), BUF, target);
    ctx.wait_prefetch(pending)?;
    mem.expect_all(120)?;
    let mut records = Vec::new();
    let mut next = since;
    loop {
        let more = ctx.session.read_trace(next).during("Read the trace")?;
        let Some(last) = more.last() else { break };
        next = last.sequence + 1;
        records.extend(more);
    }
    ensure!(records.windows(2).all(|pair| pair[0].sequence + 1 == pair[1].sequence), "The trace has gaps");
    ensure!(records.windows(2).all(|pair| pair[0].time_ns <= pair[1].time_ns), "The trace's clock goes backwards");
    let pages = |kind: TraceKind, cause: TraceCause, from: Target, to: Target| -> u64 {
        let fitting = records.iter().filter(|record| (record.kind, record.cause) == (kind, cause));
        let fitting = fitting.filter(|record| (record.from, record.to) == (from, to));
        let inside = fitting.filter(|record| (mem.addr()..mem.addr() + BUF).contains(&record.addr));
        inside.map(|record| record.page_count).sum()
    };
    let all = BUF / PAGE;
    let started = pages(TraceKind::MigrateStart, TraceCause::Prefetch, Target::Home, target);
    let ended = pages(TraceKind::MigrateEnd, TraceCause::Prefetch, Target::Home, target);
    ensure!(started >= all, "MIGRATE_START for {started} of {all} prefetched pages: {records:?}");
    ensure_eq!(ended, all, "Pages in MIGRATE_END of the prefetch");
    let home = pages(TraceKind::MigrateEnd, TraceCause::CpuFault, target, Target::Home);
    ensure_eq!(home, all, "Pages in MIGRATE_END of CPU faults");
    Ok(())
}
