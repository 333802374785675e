//! What drivers' authors select, look at without a fault, and make fail; a device that is emptied, a process that stays at home.

use uhmm_sdk::{ErrorCode, FaultPoint, Operator, PageStatus};

use crate::case::{CaseResult, During, Registry, ensure, ensure_eq};
use crate::ctx::{BUF, Ctx, PMD, refused};
use crate::mem::{Mem, PAGE};
use crate::pattern;

pub(super) fn register(list: &mut Registry) {
    list.one("D01_only_what_is_in_system_memory_goes_out", from_system).devices(2);
    list.one("D02_only_what_is_on_the_device_comes_home", from_device).devices(2);
    list.one("D03_a_migration_that_maps", maps);
    list.one("D04_a_device_reads_what_it_maps_and_brings_nothing", peek);
    list.one("D05_no_system_page_for_what_comes_home", no_system_page);
    list.one("D06_no_huge_system_page_for_what_comes_home", no_huge_system_page);
    list.one("D07_a_device_that_is_emptied_keeps_no_byte", emptied);
    list.one("D08_a_process_that_stays_at_home", at_home);
}

const LEN: u64 = 8 * PAGE;

/// Pages 0 to 3 on the first device, 4 and 5 on the second, 6 and 7 at home.
fn spread(ctx: &Ctx, seed: u64) -> CaseResult<Mem> {
    let mem = Mem::small(LEN)?;
    mem.fill(seed)?;
    ctx.adopt(&mem)?;
    ctx.to_device(0, &mem, 0, 4 * PAGE)?;
    ctx.to_device(1, &mem, 4 * PAGE, 2 * PAGE)?;
    Ok(mem)
}

fn from_system(ctx: &Ctx) -> CaseResult {
    let mem = spread(ctx, 1)?;
    let report = ctx.session.migrate_from_system(mem.addr(), LEN, ctx.device(0)?).during("Migrate from system")?;
    if ctx.undisturbed() {
        ensure_eq!(report.pages_with(PageStatus::Moved), 2, "Pages that were in system memory ({:?})", report.runs);
        ensure_eq!(report.pages_with(PageStatus::AlreadyThere), 4, "Pages that were there");
        ensure_eq!(report.pages_with(PageStatus::NotSelected), 2, "Pages on the other device");
    }
    ctx.on_device(1, &mem, 4 * PAGE, 2 * PAGE)?;
    mem.expect_all(1)
}

fn from_device(ctx: &Ctx) -> CaseResult {
    let mem = spread(ctx, 2)?;
    let report = ctx.session.migrate_from_device(mem.addr(), LEN, ctx.device(0)?).during("Migrate from a device")?;
    if ctx.undisturbed() {
        ensure_eq!(report.pages_with(PageStatus::Moved), 4, "Pages that were on the device ({:?})", report.runs);
        ensure_eq!(report.pages_with(PageStatus::AlreadyThere), 2, "Pages at home");
        ensure_eq!(report.pages_with(PageStatus::NotSelected), 2, "Pages on the other device");
    }
    ctx.at_home(&mem, 0, 4 * PAGE)?;
    ctx.on_device(1, &mem, 4 * PAGE, 2 * PAGE)?;
    mem.expect_all(2)
}

fn maps(ctx: &Ctx) -> CaseResult {
    let mem = Mem::small(LEN)?;
    mem.fill(3)?;
    ctx.adopt(&mem)?;
    ctx.session.migrate_and_map(mem.addr(), LEN, ctx.device(0)?, true).during("Migrate and map")?;
    let report = ctx.sees_all(0, &mem, 3)?;
    if ctx.undisturbed() {
        ensure_eq!(report.fault_count, 0, "Faults of a read of what was mapped");
        ensure_eq!(ctx.writes(0, &mem, 0, LEN, 4)?.fault_count, 0, "Faults of a write");
        return mem.expect_all(4);
    }
    mem.expect_all(3)
}

fn peek(ctx: &Ctx) -> CaseResult {
    let mem = Mem::small(LEN)?;
    mem.fill(5)?;
    ctx.adopt(&mem)?;
    let device = ctx.device(0)?;
    let mut bytes = vec![0; LEN as usize];
    refused(device.peek(mem.addr(), &mut bytes), ErrorCode::NotFound, "A peek at what the device does not map")?;
    ctx.at_home(&mem, 0, LEN)?;
    ctx.sees(0, &mem, 0, 3 * PAGE, 5)?;
    if ctx.undisturbed() {
        ensure_eq!(device.peek(mem.addr(), &mut bytes).during("Peek")?, 3, "Pages that the device maps");
        ensure!(bytes[..3 * PAGE as usize] == pattern::bytes(5, 0, 3 * PAGE), "A peek saw other bytes");
    }
    ctx.at_home(&mem, 3 * PAGE, LEN - 3 * PAGE)?;
    mem.expect_all(5)
}

/// As when the process's control group is full: pages stay on the device, and the next try brings them.
fn no_system_page(ctx: &Ctx) -> CaseResult {
    let mem = Mem::small(LEN)?;
    mem.fill(6)?;
    ctx.adopt(&mem)?;
    ctx.all_to_device(0, &mem)?;
    ctx.session.inject(FaultPoint::SystemPages, 1).during("Inject")?;
    mem.expect_all(6)?;
    ctx.session.inject(FaultPoint::SystemPages, 0).during("Disarm")?;
    ctx.all_to_device(0, &mem)?;
    ctx.session.inject(FaultPoint::SystemPages, 1).during("Inject")?;
    ctx.to_home(&mem, 0, LEN)?;
    ctx.session.inject(FaultPoint::SystemPages, 0).during("Disarm")?;
    mem.expect_all(6)
}

fn no_huge_system_page(ctx: &Ctx) -> CaseResult {
    let mem = ctx.huge(PMD, Some(7))?;
    ctx.all_to_device(0, &mem)?;
    ctx.session.inject(FaultPoint::SystemHuge, 1).during("Inject")?;
    ctx.to_home(&mem, 0, PMD)?;
    ctx.session.inject(FaultPoint::SystemHuge, 0).during("Disarm")?;
    mem.expect_all(7)
}

fn emptied(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF / 2, 8)?;
    ctx.all_to_device(0, &mem)?;
    let id = ctx.device(0)?.id();
    let mut operator = Operator::connect(Some(ctx.run_dir())).during("Connect as operator")?;
    let came = operator.empty_device(id).during("Empty the device")?;
    if ctx.undisturbed() {
        ensure_eq!(came, BUF / 2 / PAGE, "Pages that came home");
    }
    ctx.at_home(&mem, 0, BUF / 2)?;
    mem.expect_all(8)
}

/// Nothing leaves, whoever asks; what a device faults on waits until it may.
fn at_home(ctx: &Ctx) -> CaseResult {
    let mem = Mem::private(LEN)?;
    mem.fill(9)?;
    ctx.adopt(&mem)?;
    ctx.all_to_device(0, &mem)?;
    ctx.session.stay_home(true).during("Stay at home")?;
    ctx.at_home(&mem, 0, LEN)?;
    let report = ctx.migrate(mem.addr(), LEN, ctx.device(0)?.target()).during("Migrate")?;
    ensure_eq!(report.pages_with(PageStatus::Pinned), LEN / PAGE, "Pages that stay ({:?})", report.runs);
    let job = ctx.device(0)?.read_at(mem.addr(), LEN, None).during("Device read")?;
    ensure!(!job.is_ready(), "A device has read memory that stays at home");
    ctx.at_home(&mem, 0, LEN)?;
    ctx.session.stay_home(false).during("Leave home")?;
    let (bytes, _) = job.wait().during("The device read that waited")?;
    ensure!(bytes == pattern::bytes(9, 0, LEN), "The device read that waited saw other bytes");
    mem.expect_all(9)
}
