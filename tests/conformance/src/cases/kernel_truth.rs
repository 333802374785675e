//! What no event tells of: guards, splits of a mapping, mprotect, shmdt, what a forked child is not given. The kernel's view holds for devices,
//! and nothing that a device had comes back over it.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use uhmm_kernel_hook::smaps;
use uhmm_kernel_hook::sysv::{self, SysvSegment};
use uhmm_sdk::{Advice, ErrorCode, PageStatus};

use crate::case::{CaseResult, During, Registry, ensure, ensure_eq, not_applicable};
use crate::ctx::{Ctx, PMD, refused};
use crate::forked::fork;
use crate::mem::{Mem, MemAdvice, PAGE};
use crate::pattern;

const LEN: u64 = 16 * PAGE;

pub(super) fn register(list: &mut Registry) {
    list.both("G01_guard_over_device_pages", guard_over_device_pages);
    list.one("G02_guard_inside_a_huge_page", guard_in_huge);
    list.one("G03_guards_stay_where_they_are", guards_before);
    list.one("G04_guard_over_allocated_pages", guard_over_allocated);
    list.one("G05_guard_next_to_a_fault", guard_next_to_fault);
    for (name, split) in SPLITS {
        for way in [Home::Migrate, Home::Touch, Home::Release, Home::Evict] {
            for before in [true, false] {
                let when = if before { "before" } else { "after" };
                let full = format!("G10_split.{name}.{when}.{way:?}").to_lowercase().replace("g10", "G10");
                list.one(full, move |ctx: &Ctx| split_case(ctx, split, way, before));
            }
        }
    }
    list.one("G11_split_page_by_page", split_everywhere);
    for (name, shared) in [("private", false), ("shared", true)] {
        list.one(format!("G20_mprotect_read.{name}"), move |ctx: &Ctx| mprotect_read(ctx, shared));
        list.one(format!("G21_mprotect_none.{name}"), move |ctx: &Ctx| mprotect_none(ctx, shared));
    }
    list.one("G22_mprotect_and_back", mprotect_and_back);
    list.one("G23_mprotect_of_an_exclusive_page", mprotect_exclusive);
    list.one("G30_shmdt_and_a_successor", shmdt);
    list.one("G31_shm_remap_over_private_memory", shm_remap);
    list.one("G32_remap_file_pages", remap_file_pages);
    list.one("G40_wipe_on_fork", wipe_on_fork);
    list.one("G41_dont_fork", dont_fork);
    list.one("G42_guards_are_inherited", guards_inherited);
    list.one("G43_forks_that_fail", forks_that_fail);
    list.one("G50_no_copies_of_mergeable_memory", mergeable);
    list.one("G60_snapshot_says_who_may_write", snapshot_rights);
}

fn guard(mem: &Mem, page: u64, count: u64) -> CaseResult {
    match mem.advise(page * PAGE, count * PAGE, MemAdvice::GuardInstall) {
        Err(_) if mem.len() > 0 && !uhmm_kernel_hook::pagemap::tells_guards() => {
            not_applicable!("This kernel has no guards, or does not tell of them (6.15)")
        }
        done => done,
    }
}

/// Brings everything home; guards have nothing to bring.
fn home(ctx: &Ctx, mem: &Mem) -> CaseResult {
    let report = ctx.migrate(mem.addr(), mem.len(), uhmm_sdk::Target::Home).during("Migrate home")?;
    let fine = |status| matches!(status, PageStatus::Moved | PageStatus::AlreadyThere | PageStatus::Gone);
    ensure!(report.runs.iter().all(|run| fine(run.status)), "Pages stay away: {:?}", report.runs);
    Ok(())
}

/// No device gets at a page, and what it had is not needed any more.
fn refused_to_devices(ctx: &Ctx, mem: &Mem, page: u64) -> CaseResult {
    let addr = mem.addr() + page * PAGE;
    refused(ctx.try_read(0, addr, PAGE)?, ErrorCode::Fault, "A device read of a guard")?;
    refused(ctx.try_write(0, addr, &pattern::bytes(9, 0, PAGE))?, ErrorCode::Fault, "A device write of a guard")?;
    Ok(())
}

fn stays_a_guard(mem: &Mem, page: u64) -> CaseResult {
    for write in [false, true] {
        ensure!(mem.access_faults(page * PAGE, write)?, "Page {page} is no guard any more");
    }
    Ok(())
}

fn guard_over_device_pages(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned_small(LEN, 1)?;
    ctx.all_moved_out(&mem)?;
    guard(&mem, 4, 2)?;
    refused_to_devices(ctx, &mem, 4)?;
    home(ctx, &mem)?;
    stays_a_guard(&mem, 4)?;
    stays_a_guard(&mem, 5)?;
    mem.expect(0, 4 * PAGE, 1)?;
    mem.expect(6 * PAGE, LEN - 6 * PAGE, 1)?;
    mem.advise(4 * PAGE, 2 * PAGE, MemAdvice::GuardRemove)?;
    if mem.is_private() { mem.expect_zero(4 * PAGE, 2 * PAGE) } else { mem.expect(4 * PAGE, 2 * PAGE, 1) }
}

/// Allocated memory is the memfd's: the guard hides it, and does not drop it.
fn guard_over_allocated(ctx: &Ctx) -> CaseResult {
    let mem = ctx.allocated(LEN, Some(1))?;
    ctx.all_moved_out(&mem)?;
    guard(&mem, 4, 1)?;
    refused_to_devices(ctx, &mem, 4)?;
    ctx.to_home(&mem, 0, LEN)?;
    ctx.at_home(&mem, 0, LEN)?;
    stays_a_guard(&mem, 4)?;
    mem.advise(4 * PAGE, PAGE, MemAdvice::GuardRemove)?;
    mem.expect_all(1)
}

fn guard_in_huge(ctx: &Ctx) -> CaseResult {
    let mem = ctx.huge(2 * PMD, Some(1))?;
    ctx.all_moved_out(&mem)?;
    guard(&mem, 700, 1)?;
    home(ctx, &mem)?;
    stays_a_guard(&mem, 700)?;
    mem.expect(0, 700 * PAGE, 1)?;
    mem.expect(701 * PAGE, 2 * PMD - 701 * PAGE, 1)?;
    mem.advise(700 * PAGE, PAGE, MemAdvice::GuardRemove)?;
    mem.expect_zero(700 * PAGE, PAGE)
}

fn guards_before(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned_small(LEN, 1)?;
    guard(&mem, 3, 1)?;
    guard(&mem, 9, 2)?;
    let report = ctx.migrate(mem.addr(), LEN, ctx.device(0)?).during("Migrate")?;
    let at =
        |page: u64| report.runs.iter().find(|run| (run.first_page..run.first_page + run.page_count).contains(&page));
    for page in [3, 9, 10] {
        let status = at(page).map(|run| run.status);
        ensure!(!mem.is_private() || status == Some(PageStatus::Gone), "Guard {page} has moved: {status:?}");
    }
    ensure_eq!(at(4).map(|run| run.status), Some(PageStatus::Moved), "The page behind a guard");
    refused_to_devices(ctx, &mem, 9)?;
    ctx.sees(0, &mem, 4 * PAGE, 5 * PAGE, 1)?;
    [3, 9, 10].into_iter().try_for_each(|page| stays_a_guard(&mem, page))?;
    mem.expect(4 * PAGE, 5 * PAGE, 1)?;
    [3, 9, 10].into_iter().try_for_each(|page| stays_a_guard(&mem, page))
}

/// Neighbours ride along with a fault; a guard does not.
fn guard_next_to_fault(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned_small(64 * PAGE, 1)?;
    ctx.all_moved_out(&mem)?;
    guard(&mem, 33, 1)?;
    for page in (0..64).filter(|page| *page != 33) {
        mem.expect(page * PAGE, PAGE, 1)?;
        stays_a_guard(&mem, 33)?;
    }
    Ok(())
}

/// How a mapping becomes several.
#[derive(Clone, Copy)]
enum Split {
    Advice(MemAdvice),
    ReadOnly,
    Lock,
}

const SPLITS: [(&str, Split); 8] = [
    ("dontdump", Split::Advice(MemAdvice::DontDump)),
    ("sequential", Split::Advice(MemAdvice::Sequential)),
    ("hugepage", Split::Advice(MemAdvice::HugePage)),
    ("mergeable", Split::Advice(MemAdvice::Mergeable)),
    ("dontfork", Split::Advice(MemAdvice::DontFork)),
    ("wipeonfork", Split::Advice(MemAdvice::WipeOnFork)),
    ("mprotect", Split::ReadOnly),
    ("mlock", Split::Lock),
];

#[derive(Clone, Copy, Debug)]
enum Home {
    Migrate,
    Touch,
    Release,
    Evict,
}

impl Split {
    fn apply(self, mem: &Mem, off: u64, len: u64) -> CaseResult {
        match self {
            Self::Advice(advice) => mem.advise(off, len, advice),
            Self::ReadOnly => mem.protect(off, len, true, false),
            Self::Lock => mem.lock(off, len),
        }
    }
}

fn split_case(ctx: &Ctx, split: Split, way: Home, before: bool) -> CaseResult {
    if matches!(split, Split::Lock) {
        crate::ctx::may_lock_blocks()?;
    }
    let mem = ctx.patterned_small(LEN, 1)?;
    if before {
        split.apply(&mem, 5 * PAGE, 6 * PAGE)?;
    }
    ctx.migrate(mem.addr(), LEN, ctx.device(0)?).during("Migrate")?;
    if !before {
        split.apply(&mem, 5 * PAGE, 6 * PAGE)?;
    }
    match way {
        Home::Migrate => {
            ctx.to_home(&mem, 0, LEN)?;
            ctx.at_home(&mem, 0, LEN)?;
        }
        Home::Touch => {}
        Home::Release => ctx.session.release(mem.addr(), LEN).during("Release")?,
        Home::Evict => {
            ctx.session.evict(ctx.device(0)?, 0).during("Evict")?;
            if ctx.undisturbed() {
                ctx.at_home(&mem, 0, LEN)?;
            }
        }
    }
    mem.expect_all(1)
}

/// Every page is a mapping of its own.
fn split_everywhere(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned_small(PMD, 1)?;
    ctx.all_moved_out(&mem)?;
    for page in (0..PMD / PAGE).step_by(2) {
        mem.advise(page * PAGE, PAGE, MemAdvice::DontDump)?;
    }
    ctx.to_home(&mem, 0, PMD)?;
    ctx.at_home(&mem, 0, PMD)?;
    ctx.migrate(mem.addr(), PMD, ctx.device(0)?).during("Migrate again")?;
    ctx.sees_all(0, &mem, 1)?;
    mem.expect_all(1)
}

fn mapped_writable(ctx: &Ctx, shared: bool) -> CaseResult<Mem> {
    let mem = if shared { Mem::shared(LEN)? } else { Mem::small(LEN)? };
    mem.fill(1)?;
    ctx.adopt(&mem)?;
    ctx.writes(0, &mem, 0, LEN, 2)?;
    Ok(mem)
}

fn mprotect_read(ctx: &Ctx, shared: bool) -> CaseResult {
    let mem = mapped_writable(ctx, shared)?;
    mem.protect(4 * PAGE, 4 * PAGE, true, false)?;
    for _ in 0..3 {
        let write = ctx.try_write(0, mem.addr() + 4 * PAGE, &pattern::bytes(9, 0, PAGE))?;
        refused(write, ErrorCode::Permission, "A device write after mprotect(PROT_READ)")?;
    }
    ctx.sees_all(0, &mem, 2)?;
    ctx.try_write(0, mem.addr() + 8 * PAGE, &pattern::bytes(2, 8 * PAGE, PAGE))?.during("A write beside it")?;
    mem.expect_all(2)
}

fn mprotect_none(ctx: &Ctx, shared: bool) -> CaseResult {
    let mem = mapped_writable(ctx, shared)?;
    mem.protect(4 * PAGE, 4 * PAGE, false, false)?;
    let addr = mem.addr() + 7 * PAGE;
    refused(ctx.try_read(0, addr, PAGE)?, ErrorCode::Fault, "A device read after mprotect(PROT_NONE)")?;
    refused(ctx.try_write(0, addr, &pattern::bytes(9, 0, PAGE))?, ErrorCode::Fault, "A device write there")?;
    mem.protect(4 * PAGE, 4 * PAGE, true, true)?;
    mem.expect_all(2)
}

/// Rights that come and go between two accesses: the last one counts.
fn mprotect_and_back(ctx: &Ctx) -> CaseResult {
    let mem = mapped_writable(ctx, false)?;
    for round in 0..20u64 {
        let writable = round % 3 != 0;
        mem.protect(0, LEN, true, writable)?;
        let write = ctx.try_write(0, mem.addr(), &pattern::bytes(10 + round, 0, LEN))?;
        if writable {
            write.during("A device write where the program may write")?;
            mem.expect_all(10 + round)?;
        } else {
            refused(write, ErrorCode::Permission, "A device write where it may not")?;
        }
    }
    Ok(())
}

fn mprotect_exclusive(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned_small(LEN, 1)?;
    ctx.exclusive(0, &mem, 0, LEN)?;
    mem.protect(0, LEN, true, false)?;
    let write = ctx.try_write(0, mem.addr(), &pattern::bytes(9, 0, LEN))?;
    refused(write, ErrorCode::Permission, "A device write of an exclusive page after mprotect")?;
    mem.expect_all(1)
}

fn filled(segment: &SysvSegment, seed: u64) -> CaseResult<uhmm_kernel_hook::program::ProgramMemory> {
    let memory = segment.attach().during("shmat")?;
    memory.write(0, &pattern::bytes(seed, 0, LEN)).during("Fill")?;
    Ok(memory)
}

fn shmdt(ctx: &Ctx) -> CaseResult {
    let (one, other) = (SysvSegment::new(LEN).during("shmget")?, SysvSegment::new(LEN).during("shmget")?);
    let memory = filled(&one, 1)?;
    let addr = memory.addr();
    ctx.adopt_at(addr, LEN)?;
    ensure_eq!(
        ctx.try_read(0, addr, LEN)?.during("Device read")?.bytes,
        pattern::bytes(1, 0, LEN),
        "The device's bytes"
    );
    sysv::detach(memory).during("shmdt")?;
    refused(ctx.try_read(0, addr, LEN)?, ErrorCode::Fault, "A device read after shmdt")?;
    let successor = other.attach_at(addr).during("shmat")?;
    successor.write(0, &pattern::bytes(2, 0, LEN)).during("Fill")?;
    let again = one.attach().during("shmat")?;
    if let Ok(access) = ctx.try_read(0, addr, LEN)? {
        ensure_eq!(access.bytes, pattern::bytes(2, 0, LEN), "The successor through the device");
    }
    let written = ctx.try_write(0, addr, &pattern::bytes(3, 0, LEN))?.is_ok();
    let mut bytes = vec![0; LEN as usize];
    again.read(0, &mut bytes).during("Read")?;
    ensure_eq!(bytes, pattern::bytes(1, 0, LEN), "The segment that was detached");
    successor.read(0, &mut bytes).during("Read")?;
    ensure_eq!(bytes, pattern::bytes(if written { 3 } else { 2 }, 0, LEN), "The successor");
    ctx.adopt_at(addr, LEN)?;
    ctx.try_write(0, addr, &pattern::bytes(4, 0, LEN))?.during("A write to the successor once it is adopted")?;
    successor.read(0, &mut bytes).during("Read")?;
    ensure_eq!(bytes, pattern::bytes(4, 0, LEN), "The successor after it was adopted");
    Ok(())
}

fn shm_remap(ctx: &Ctx) -> CaseResult {
    let private = uhmm_kernel_hook::program::ProgramMemory::private(LEN).during("mmap")?;
    private.write(0, &pattern::bytes(5, 0, LEN)).during("Fill")?;
    let addr = private.addr();
    ctx.adopt_at(addr, LEN)?;
    ctx.migrate(addr, LEN, ctx.device(0)?).during("Migrate")?;
    let segment = SysvSegment::new(LEN).during("shmget")?;
    let memory = segment.attach_over(private).during("shmat(SHM_REMAP)")?;
    memory.write(0, &pattern::bytes(6, 0, LEN)).during("Fill")?;
    refused(ctx.try_read(0, addr, LEN)?, ErrorCode::Fault, "A device read of what was mapped over")?;
    let home = ctx.session.migrate(addr, LEN, uhmm_sdk::Target::Home);
    refused(home, ErrorCode::Fault, "Bringing home what is not there any more")?;
    ctx.adopt_at(addr, LEN)?;
    ensure_eq!(ctx.try_read(0, addr, LEN)?.during("Device read")?.bytes, pattern::bytes(6, 0, LEN), "The successor");
    Ok(())
}

fn remap_file_pages(ctx: &Ctx) -> CaseResult {
    let mem = Mem::shared(LEN)?;
    mem.fill(1)?;
    ctx.adopt(&mem)?;
    ctx.sees_all(0, &mem, 1)?;
    mem.remap_file_page(2 * PAGE, 9)?;
    ensure_eq!(mem.bytes(2 * PAGE, PAGE)?, pattern::bytes(1, 9 * PAGE, PAGE), "The CPU's page");
    match ctx.try_read(0, mem.addr() + 2 * PAGE, PAGE)? {
        Ok(access) => ensure_eq!(access.bytes, pattern::bytes(1, 9 * PAGE, PAGE), "The device's page"),
        Err(error) => ensure_eq!(error.code(), ErrorCode::Fault, "A read of what is not managed any more"),
    }
    ctx.sees(0, &mem, 3 * PAGE, LEN - 3 * PAGE, 1)?;
    Ok(())
}

/// The address space is copied, and then there is no child.
fn forks_that_fail(ctx: &Ctx) -> CaseResult {
    const PATIENCE: Duration = Duration::from_secs(10);
    ctx.needs_fork()?;
    let mem = ctx.patterned_small(LEN, 1)?;
    ctx.all_to_device(0, &mem)?;
    let before = ctx.metric("pager", "spaces")?;
    for _ in 0..30 {
        let errno = uhmm_kernel_hook::fork::fork_in_vain().during("A fork in vain")?;
        ensure_eq!(errno, rustix::io::Errno::MFILE.raw_os_error(), "The fork's error");
        ctx.sees_all(0, &mem, 1)?;
    }
    let end = Instant::now() + PATIENCE;
    while ctx.metric("pager", "spaces")? > before && Instant::now() < end {
        std::thread::yield_now();
    }
    ensure_eq!(ctx.metric("pager", "spaces")?, before, "Processes that are managed");
    ctx.writes(0, &mem, 0, LEN, 2)?;
    mem.expect_all(2)
}

fn wipe_on_fork(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    ctx.needs_copy_on_write()?;
    for attached in [false, true] {
        let mem = ctx.patterned_small(LEN, 1)?;
        mem.advise(4 * PAGE, 4 * PAGE, MemAdvice::WipeOnFork)?;
        ctx.all_moved_out(&mem)?;
        let child = fork(|| {
            let own = if attached { Some(ctx.in_child()?) } else { None };
            if let Some(own) = &own {
                own.sees_zero(0, &mem, 4 * PAGE, 4 * PAGE)?;
            }
            mem.expect_zero(4 * PAGE, 4 * PAGE)?;
            mem.expect(0, 4 * PAGE, 1)?;
            mem.expect(8 * PAGE, 8 * PAGE, 1)
        })?;
        child.join()?;
        mem.expect_all(1)?;
    }
    Ok(())
}

/// What the child maps at a place that it was not given is its own.
fn dont_fork(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    ctx.needs_copy_on_write()?;
    let mem = ctx.patterned_small(LEN, 1)?;
    mem.advise(4 * PAGE, 4 * PAGE, MemAdvice::DontFork)?;
    ctx.all_moved_out(&mem)?;
    let child = fork(|| {
        let fresh = mem.map_fresh(4 * PAGE, 4 * PAGE)?;
        fresh.expect_zero(0, 4 * PAGE)?;
        fresh.fill(7)?;
        let own = ctx.in_child()?;
        refused(own.try_read(0, fresh.addr(), PAGE)?, ErrorCode::Fault, "A device read of memory that is not managed")?;
        own.adopt(&fresh)?;
        own.sees_all(0, &fresh, 7)?;
        mem.expect(0, 4 * PAGE, 1)?;
        fresh.expect_all(7)
    })?;
    child.join()?;
    mem.expect_all(1)
}

fn guards_inherited(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    ctx.needs_copy_on_write()?;
    let mem = ctx.patterned_small(LEN, 1)?;
    ctx.all_moved_out(&mem)?;
    guard(&mem, 4, 1)?;
    let child = fork(|| {
        mem.expect(0, 4 * PAGE, 1)?;
        mem.expect(5 * PAGE, LEN - 5 * PAGE, 1)?;
        stays_a_guard(&mem, 4)?;
        mem.advise(4 * PAGE, PAGE, MemAdvice::GuardRemove)?;
        mem.expect_zero(4 * PAGE, PAGE)
    })?;
    child.join()?;
    stays_a_guard(&mem, 4)?;
    mem.advise(4 * PAGE, PAGE, MemAdvice::GuardRemove)?;
    mem.expect_zero(4 * PAGE, PAGE)
}

/// KSM takes the write protection away that a read-mostly copy lives by.
fn mergeable(ctx: &Ctx) -> CaseResult {
    ctx.needs_copy_on_write()?;
    let mem = ctx.patterned_small(LEN, 1)?;
    if mem.advise(0, LEN, MemAdvice::Mergeable).is_err() {
        not_applicable!("This kernel merges no pages");
    }
    ctx.session.advise(mem.addr(), LEN, Advice::ReadMostly(true)).during("Advise")?;
    ctx.sees_all(0, &mem, 1)?;
    let flags = smaps::open_own_smaps().and_then(|smaps| smaps::with_flag(smaps.as_fd(), smaps::MERGEABLE));
    let merging = flags.during("Read smaps")?.into_iter().find(|range| range.contains(mem.addr()));
    ensure!(merging.is_none(), "Copied memory can be merged: {merging:?}");
    mem.fill(2)?;
    ctx.sees_all(0, &mem, 2)?;
    Ok(())
}

fn snapshot_rights(ctx: &Ctx) -> CaseResult {
    let file = std::fs::File::open("/proc/self/exe")?;
    let mapped = Mem::file_private(file.as_fd(), 4 * PAGE)?;
    mapped.load(0)?;
    mapped.store(PAGE, 1)?;
    ensure_eq!(ctx.snapshot(0, &mapped, 0, 2 * PAGE)?, [1, 2], "A private mapping of a file: read, and written");
    let mem = Mem::small(2 * PAGE)?;
    mem.store(0, 1)?;
    ensure_eq!(ctx.snapshot(0, &mem, 0, 2 * PAGE)?, [2, 0], "Private memory");
    let (seen, done) = (crate::forked::Latch::new()?, crate::forked::Latch::new()?);
    let child = fork(|| {
        seen.open()?;
        done.wait()
    })?;
    seen.wait()?;
    let shared = ctx.snapshot(0, &mem, 0, PAGE)?;
    done.open()?;
    child.join()?;
    ensure_eq!(shared, [1], "Private memory that a child has too");
    Ok(())
}
