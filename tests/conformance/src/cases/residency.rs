//! Residency queries and error injection, as UVM's test hooks define them.

use std::time::{Duration, Instant};

use uhmm_sdk::{ErrorCode, FaultPoint, HotRange, PageStatus, Residency};

use crate::case::{CaseResult, During, Registry, ensure, ensure_eq, not_applicable};
use crate::ctx::{BUF, Ctx, PMD};
use crate::mem::{Mem, PAGE};

pub(super) fn register(list: &mut Registry) {
    list.one("R01_residency_info", residency_info);
    list.one("R02_queries_never_move_a_page", queries_move_nothing);
    list.one("R03_inject_frame_allocation", inject_frames);
    list.one("R04_inject_copy_out", inject_copy_out);
    list.one("R05_inject_copy_home", inject_copy_home);
    list.one("R06_inject_nth_and_disarm", inject_nth);
    list.one("R07_injection_is_the_callers_own", injection_is_own);
    list.one("R08_evict_some", evict_some);
    list.one("R09_evict_error_keeps_data", evict_error);
    list.one("R10_hot_ranges", hot_ranges);
    list.one("R11_overcommit_keeps_what_the_device_uses", overcommit_keeps_hot).deadline_s(60);
}

/// Every page of a mixed range: where it is, which devices map it, whether it is pinned.
fn residency_info(ctx: &Ctx) -> CaseResult {
    let mem = Mem::small(8 * PAGE)?;
    mem.fill_at(0, 4 * PAGE, 1)?;
    ctx.adopt(&mem)?;
    ctx.to_device(0, &mem, 0, 2 * PAGE)?;
    ctx.sees(0, &mem, 0, PAGE, 1)?;
    ctx.session.pin(mem.addr() + 2 * PAGE, PAGE).during("Pin")?;
    let runs = ctx.session.residency(mem.addr(), 8 * PAGE).during("Residency")?;
    let id = ctx.device(0)?.id();
    let mut pages = Vec::new();
    for run in &runs {
        ensure_eq!(run.first_page, pages.len() as u64, "First page of a run (runs have no gaps)");
        pages.extend((0..run.page_count).map(|_| *run));
    }
    ensure_eq!(pages.len(), 8, "Pages of the answer");
    ensure!(pages[..2].iter().all(|page| page.residency == Residency::Device(id)), "Pages 0 and 1: {runs:?}");
    ensure_eq!(pages[2].residency, Residency::System, "Page 2");
    ensure_eq!(pages[3].residency, Residency::System, "Page 3");
    let empty = pages[4..].iter().all(|page| matches!(page.residency, Residency::Absent | Residency::System));
    ensure!(empty, "Pages 4 to 7, never touched: {runs:?}");
    ensure!(pages[2].pinned && !pages[3].pinned, "Only page 2 is pinned: {runs:?}");
    if ctx.undisturbed() {
        ensure_eq!(pages[0].mapped_mask, 1 << id, "Devices that map page 0");
        ensure_eq!(pages[3].mapped_mask, 0, "Devices that map page 3");
    }
    mem.expect(0, 4 * PAGE, 1)?;
    mem.expect_zero(4 * PAGE, 4 * PAGE)
}

fn queries_move_nothing(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 2)?;
    ctx.to_device(0, &mem, 0, BUF / 2)?;
    for _ in 0..4 {
        ctx.residency(&mem, 0, BUF)?;
        ctx.snapshot(0, &mem, 0, BUF)?;
        ctx.session.attributes(mem.addr(), BUF).during("Attributes")?;
        ctx.on_device(0, &mem, 0, BUF / 2)?;
        ctx.at_home(&mem, BUF / 2, BUF / 2)?;
    }
    mem.expect_all(2)
}

/// Some pages are refused with this status and stay valid; the same request again moves them.
fn fails_once(ctx: &Ctx, point: FaultPoint, nth: u32, status: PageStatus, mem: &Mem, seed: u64) -> CaseResult {
    ctx.session.inject(point, nth).during("Inject")?;
    let target = ctx.device(0)?.target();
    let report = ctx.migrate(mem.addr(), mem.len(), target).during("Migrate")?;
    if ctx.undisturbed() {
        let refused = report.pages_with(status);
        ensure!(refused > 0, "Nothing failed although {point:?} number {nth} should have: {:?}", report.runs);
        ensure_eq!(refused + report.moved_pages, mem.len() / PAGE, "Pages that failed or moved ({:?})", report.runs);
        let summary = ctx.residency(mem, 0, mem.len())?;
        ensure_eq!(summary.system_pages, refused, "Pages that stayed in system memory");
    }
    ctx.session.inject(point, 0).during("Disarm")?;
    ctx.all_to_device(0, mem)?;
    ctx.sees_all(0, mem, seed)?;
    mem.expect_all(seed)
}

fn inject_frames(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned_small(BUF, 3)?;
    fails_once(ctx, FaultPoint::Frames, 1, PageStatus::NoMemory, &mem, 3)
}

fn inject_copy_out(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 4)?;
    fails_once(ctx, FaultPoint::CopyOut, 1, PageStatus::Io, &mem, 4)
}

/// A copy home that fails once is asked again: nobody sees an error, nothing is poisoned.
fn inject_copy_home(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 5)?;
    for by_cpu in [true, false] {
        ctx.all_to_device(0, &mem)?;
        ctx.session.inject(FaultPoint::CopyHome, 1).during("Inject")?;
        if !by_cpu {
            let report = ctx.migrate(mem.addr(), BUF, uhmm_sdk::Target::Home).during("Migrate home")?;
            ensure_eq!(report.pages_with(PageStatus::Poisoned), 0, "Poisoned pages");
        }
        mem.expect_all(5)?;
        ctx.session.inject(FaultPoint::CopyHome, 0).during("Disarm")?;
        let summary = ctx.residency(&mem, 0, BUF)?;
        ensure_eq!(summary.poisoned_pages, 0, "Poisoned pages ({summary:?})");
    }
    ctx.sees_all(0, &mem, 5)?;
    mem.expect_all(5)
}

fn inject_nth(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(4 * PMD, 6)?;
    // Chunks are of 2 MiB at most, so there are at least four copies.
    fails_once(ctx, FaultPoint::CopyOut, 3, PageStatus::Io, &mem, 6)?;
    let mem = ctx.patterned(BUF, 7)?;
    for point in [FaultPoint::Frames, FaultPoint::CopyOut, FaultPoint::CopyHome, FaultPoint::HugeFrames] {
        ctx.session.inject(point, 1).during("Inject")?;
        ctx.session.inject(point, 0).during("Disarm")?;
    }
    ctx.all_to_device(0, &mem)?;
    ctx.sees_all(0, &mem, 7)?;
    mem.expect_all(7)
}

fn injection_is_own(ctx: &Ctx) -> CaseResult {
    if ctx.role().is_some() {
        let mem = ctx.patterned(BUF, 8)?;
        ctx.all_to_device(0, &mem)?;
        ctx.sees_all(0, &mem, 8)?;
        return mem.expect_all(8);
    }
    ctx.session.inject(FaultPoint::CopyOut, 1).during("Inject")?;
    ctx.session.inject(FaultPoint::Frames, 1).during("Inject")?;
    ctx.spawn(&["other".to_owned()])?.join()?;
    let mem = ctx.patterned(BUF, 9)?;
    let report = ctx.migrate(mem.addr(), BUF, ctx.device(0)?.target()).during("Migrate")?;
    if ctx.undisturbed() {
        ensure!(!report.complete(), "The injected failures were used up by another process");
    }
    ctx.session.inject(FaultPoint::CopyOut, 0).during("Disarm")?;
    ctx.session.inject(FaultPoint::Frames, 0).during("Disarm")?;
    ctx.all_to_device(0, &mem)?;
    ctx.sees_all(0, &mem, 9)?;
    mem.expect_all(9)
}

fn evict_some(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 10)?;
    ctx.all_to_device(0, &mem)?;
    let count = ctx.session.evict(ctx.device(0)?, 100).during("Evict")?;
    let summary = ctx.residency(&mem, 0, BUF)?;
    if ctx.undisturbed() {
        ensure!(count >= 100, "{count} pages evicted of 100");
        ensure_eq!(summary.system_pages, count, "Pages at home after eviction");
    }
    ensure!(summary.all_device_pages() < BUF / PAGE, "Nothing was evicted: {summary:?}");
    ctx.sees_all(0, &mem, 10)?;
    mem.expect_all(10)
}

fn evict_error(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 11)?;
    ctx.all_to_device(0, &mem)?;
    ctx.session.inject(FaultPoint::CopyHome, 1).during("Inject")?;
    // Refused, partly done or repeated: the data must be right whichever it is.
    let evicted = ctx.session.evict(ctx.device(0)?, 0);
    ensure!(evicted.as_ref().is_ok_and(|count| *count <= BUF / PAGE) || evicted.is_err(), "More pages than there are");
    ctx.session.inject(FaultPoint::CopyHome, 0).during("Disarm")?;
    ctx.session.evict(ctx.device(0)?, 0).during("Evict again")?;
    ctx.at_home(&mem, 0, BUF)?;
    mem.expect_all(11)
}

/// What the first device uses, for devices whose page table can be looked at.
fn heat(ctx: &Ctx) -> CaseResult<Vec<HotRange>> {
    match ctx.session.hot_ranges(ctx.device(0)?) {
        Err(error) if error.code() == ErrorCode::NotFound => not_applicable!("The device tells no use: {error}"),
        other => other.during("Hot ranges"),
    }
}

/// Both ranges were used once, one is used again and again: it gets hot, the other one is forgotten.
fn hot_ranges(ctx: &Ctx) -> CaseResult {
    /// Heat halves in 100 ms and needs some periods without a restart.
    const PATIENCE: Duration = Duration::from_secs(15);
    let mem = ctx.patterned(5 * PMD, 12)?;
    heat(ctx)?;
    let hot = mem.addr().next_multiple_of(PMD);
    let cold = hot + 2 * PMD;
    let off = hot - mem.addr();
    ctx.sees_all(0, &mem, 12)?;
    let end = Instant::now() + PATIENCE;
    let ranges = loop {
        ctx.sees(0, &mem, off, PMD, 12)?;
        let ranges = heat(ctx)?;
        let of = |addr| ranges.iter().find(|range| range.addr == addr).map_or(0, |range| range.heat_permille);
        if of(hot) >= 250 && of(cold) == 0 {
            break ranges;
        }
        ensure!(Instant::now() < end, "{hot:#x} is used all the time and {cold:#x} is not, but: {ranges:?}");
    };
    ensure_eq!(ranges.first().map(|range| range.addr), Some(hot), "The hottest range of {ranges:?}");
    mem.expect_all(12)
}

/// The device keeps reading one range while twice its memory comes by: the range stays, what is not used makes room.
fn overcommit_keeps_hot(ctx: &Ctx) -> CaseResult {
    let memory = ctx.memory_in_huge_pages()? / PMD * PMD;
    let hot = ctx.patterned(2 * PMD, 13)?;
    ctx.all_to_device(0, &hot)?;
    ctx.sees_all(0, &hot, 13)?;
    let cold = ctx.patterned(2 * memory, 14)?;
    let (mut faults, evicted) = (0, ctx.metric("pager", "evicted")?);
    for off in (0..2 * memory).step_by(PMD as usize) {
        ctx.to_device(0, &cold, off, PMD)?;
        faults += ctx.sees_all(0, &hot, 13)?.fault_count;
    }
    if ctx.undisturbed() {
        let evicted = ctx.metric("pager", "evicted")? - evicted;
        ensure!(evicted >= memory / PAGE, "Only {evicted} pages made room: the device was never full");
        if faults > 0 {
            // A device whose marks nobody can read is evicted in turn. Not asked before: who asks for heat takes the marks away.
            heat(ctx)?;
        }
        ensure_eq!(faults, 0, "Faults in the range that the device uses all the time");
        ctx.on_device(0, &hot, 0, hot.len())?;
    }
    cold.expect_all(14)?;
    hot.expect_all(13)
}
