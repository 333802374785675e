//! Memory of reserved huge pages (hugetlb): shared ones are used by devices in place, whatever becomes of the pool or the file meanwhile;
//! private ones are refused.
//!
//! Huge pages are reserved for the time of a case where this account may do so, and put back.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use uhmm_kernel_hook::huge_pool::{HUGE_BYTES, HugePool, huge_memfd, sealed_huge_memfd};
use uhmm_kernel_hook::memfd;
use uhmm_sdk::{ErrorCode, Operator};

use crate::case::{CaseResult, During, Failure, Registry, ensure, ensure_eq, not_applicable};
use crate::ctx::{Ctx, prot, refused};
use crate::forked::fork;
use crate::mem::{Mem, MemAdvice, PAGE};
use crate::pattern;

pub(super) fn register(list: &mut Registry) {
    list.both("T09_anon_write_hugetlbfs", anon_write_hugetlbfs);
    list.one("HT01_parts_and_borders_of_huge_pages", parts_and_borders);
    list.one("HT02_no_huge_page_is_left", none_left);
    list.one("HT03_file_of_huge_pages_is_truncated", truncated);
    list.one("HT04_driver_dies_between_accesses", driver_dies);
    list.one("HT05_children_share_huge_pages", shared_with_child);
    list.one("HT06_unmapped_huge_pages_are_gone_for_devices", unmapped);
    list.one("HT07_huge_pages_are_shown_as_huge", shown_as_huge);
    list.one("HT08_huge_pages_stay_where_they_are", stay);
}

/// Huge pages for the time of a case.
fn pool(page_count: u64) -> CaseResult<HugePool> {
    HugePool::reserve(page_count).map_err(|error| Failure::NotApplicable(format!("No hugetlb pages: {error}")))
}

/// A file of huge pages and a mapping of all of it.
fn file_of(page_count: u64) -> CaseResult<(OwnedFd, Mem)> {
    let file = huge_memfd(page_count * HUGE_BYTES)?;
    let mem = Mem::file_shared(file.as_fd(), page_count * HUGE_BYTES, true)?;
    Ok((file, mem))
}

/// A nameless file of one page on a mounted hugetlbfs of such pages, where this account may make one.
fn file_on_a_mount() -> CaseResult<Option<Mem>> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let folders = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        words.next().filter(|_| words.next() == Some("hugetlbfs"))
    });
    for folder in folders {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let Ok(file) = rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR) else { continue };
        if memfd::huge_page_bytes(file.as_fd())? == Some(HUGE_BYTES) {
            memfd::to_file(file.as_fd())?.set_len(HUGE_BYTES).during("Give a file its length")?;
            return Mem::file_shared(file.as_fd(), HUGE_BYTES, true).map(Some);
        }
    }
    Ok(None)
}

/// One huge page of every kind.
struct EveryKind {
    shared: Vec<(&'static str, Mem)>,
    private: Mem,
}

impl EveryKind {
    fn map() -> CaseResult<Self> {
        let private = Mem::hugetlb(HUGE_BYTES, false)?;
        let mut shared =
            vec![("MAP_SHARED|MAP_HUGETLB", Mem::hugetlb(HUGE_BYTES, true)?), ("MFD_HUGETLB", file_of(1)?.1)];
        shared.extend(file_on_a_mount()?.map(|mem| ("a file of hugetlbfs", mem)));
        Ok(Self { shared, private })
    }
}

/// Every kind of shared memory: what the device writes the CPU sees, and the other way round. Private memory is refused as it is.
fn anon_write_hugetlbfs(ctx: &Ctx) -> CaseResult {
    // Without the right to reserve some, there may be some all the same.
    let reserved = HugePool::reserve(4);
    let kinds = match (EveryKind::map(), &reserved) {
        (Err(Failure::Failed(why)), Err(error)) => not_applicable!("No hugetlb pages: {error}; {why}"),
        (kinds, _) => kinds?,
    };
    let last = ctx.device_count() - 1;
    for (kind, mem) in &kinds.shared {
        ctx.adopt_if_possible(mem).during(kind)?;
        let report = ctx.writes(0, mem, 0, HUGE_BYTES, 9).during(kind)?;
        ctx.one_fault(&report)?;
        mem.expect_all(9).during(kind)?;
        ctx.sees_all(last, mem, 9).during(kind)?;
        mem.fill(10)?;
        ctx.sees_all(0, mem, 10).during(kind)?;
        mem.expect_all(10).during(kind)?;
    }
    let private = &kinds.private;
    private.fill(11)?;
    let error = refused(ctx.session.adopt(private.addr(), HUGE_BYTES), ErrorCode::Invalid, "Adopting private hugetlb")?;
    ensure!(error.to_string().contains("MAP_SHARED"), "The refusal does not say what else to do: {error}");
    private.expect_all(11)?;
    let shared: Vec<&str> = kinds.shared.iter().map(|(kind, _)| *kind).collect();
    ctx.note(format!("{}; private hugetlb memory is refused", shared.join(", ")));
    Ok(())
}

/// Managed from the middle of one huge page to the middle of another one: exactly those bytes change that the device writes.
fn parts_and_borders(ctx: &Ctx) -> CaseResult {
    let _pool = pool(3)?;
    let (_file, mem) = file_of(3)?;
    mem.fill(1)?;
    let (start, end) = (HUGE_BYTES / 2 + PAGE, 2 * HUGE_BYTES + HUGE_BYTES / 4);
    ctx.adopt_at(mem.addr() + start, end - start)?;
    ctx.sees(0, &mem, start, end - start, 1)?;
    let parts = [(HUGE_BYTES - 3 * PAGE, 7 * PAGE), (HUGE_BYTES + 100 * PAGE, PAGE), (end - PAGE, PAGE), (start, PAGE)];
    let mut expected = pattern::bytes(1, 0, mem.len());
    for (round, (off, len)) in (2..).zip(parts) {
        ctx.writes(0, &mem, off, len, round)?;
        expected[off as usize..(off + len) as usize].copy_from_slice(&pattern::bytes(round, off, len));
        let difference = pattern::difference(&mem.bytes(0, mem.len())?, &expected, 0);
        ensure!(difference.is_none(), "After a write at {off:#x} the CPU sees other bytes: {difference:?}");
    }
    let seen = ctx.read(ctx.device_count() - 1, &mem, start, end - start)?;
    ensure!(seen.bytes == expected[start as usize..end as usize], "The device reads other bytes than the CPU");
    ensure!(ctx.try_read(0, mem.addr() + end, PAGE)?.is_err(), "A device read a part that was never adopted");
    Ok(())
}

fn pid_of(ctx: &Ctx, service: &str) -> CaseResult<u32> {
    let services = Operator::connect(Some(ctx.run_dir()))?.status()?;
    let found = services.iter().find(|status| status.name == service);
    found.map(|status| status.pid).ok_or_else(|| Failure::Failed(format!("There is no service {service}")))
}

/// A hole of the file that there is no page for: an error, and everything else goes on. A program that stored there would get SIGBUS.
/// The size of the file is sealed, so that no truncation is to be feared, and yet nobody may map it as if it were safe.
fn none_left(ctx: &Ctx) -> CaseResult {
    let pool = pool(3)?;
    let file = sealed_huge_memfd(2 * HUGE_BYTES)?;
    let mem = Mem::file_shared(file.as_fd(), 2 * HUGE_BYTES, true)?;
    mem.fill(1)?;
    ctx.adopt(&mem)?;
    ctx.writes(0, &mem, 0, mem.len(), 2)?;
    let driver = &ctx.args.devices[0];
    let before = pid_of(ctx, driver)?;
    memfd::punch_hole(file.as_fd(), HUGE_BYTES, HUGE_BYTES).during("Punch a hole")?;
    let mut hog = pool.hog()?;
    ctx.sees_zero(0, &mem, HUGE_BYTES, HUGE_BYTES)?;
    let bytes = pattern::bytes(3, 0, 2 * PAGE);
    let at = mem.addr() + HUGE_BYTES;
    let punch = || drop(memfd::punch_hole(file.as_fd(), HUGE_BYTES, HUGE_BYTES));
    let device = ctx.device(0)?;
    let starved = hog.starve(|| device.write(at, &bytes), punch)?;
    let error = refused(Err::<(), _>(starved), ErrorCode::NoMemory, "A device write without a page for it")?;
    ensure!(error.to_string().contains("nr_hugepages"), "The error does not say what to do: {error}");
    hog.starve(|| device.write(at - PAGE, &bytes), punch).during("A device write into a page and a hole")?;
    if ctx.counters_hold() {
        ensure_eq!(pid_of(ctx, driver)?, before, "The driver's process");
    }
    ctx.writes(0, &mem, 0, HUGE_BYTES, 4)?;
    mem.expect(0, HUGE_BYTES, 4)?;
    drop(hog);
    ctx.writes(0, &mem, HUGE_BYTES, HUGE_BYTES, 5)?;
    mem.expect(HUGE_BYTES, HUGE_BYTES, 5)
}

/// As FB01 and FB02.
fn truncated(ctx: &Ctx) -> CaseResult {
    let _pool = pool(2)?;
    let (file, mem) = file_of(2)?;
    mem.fill(1)?;
    ctx.adopt(&mem)?;
    ctx.writes(0, &mem, 0, mem.len(), 2)?;
    let file = memfd::to_file(file.as_fd())?;
    file.set_len(HUGE_BYTES).during("Truncate")?;
    let (behind, bytes) = (mem.addr() + HUGE_BYTES, pattern::bytes(3, 0, PAGE));
    refused(ctx.try_read(0, behind, PAGE)?, ErrorCode::Fault, "A device read behind the end of the file")?;
    refused(ctx.try_write(0, behind, &bytes)?, ErrorCode::Fault, "A device write behind the end of the file")?;
    ensure_eq!(file.metadata()?.len(), HUGE_BYTES, "Length of the file after a device write behind its end");
    ctx.sees(0, &mem, 0, HUGE_BYTES, 2)?;
    ctx.writes(0, &mem, 0, HUGE_BYTES, 4)?;
    mem.expect(0, HUGE_BYTES, 4)?;
    file.set_len(2 * HUGE_BYTES).during("Make it longer again")?;
    ctx.sees_zero(0, &mem, HUGE_BYTES, HUGE_BYTES)?;
    ctx.writes(0, &mem, HUGE_BYTES, HUGE_BYTES, 5)?;
    mem.expect(HUGE_BYTES, HUGE_BYTES, 5)?;
    mem.advise(0, HUGE_BYTES, MemAdvice::Remove)?;
    ctx.sees_zero(0, &mem, 0, HUGE_BYTES)?;
    ctx.writes(0, &mem, 0, HUGE_BYTES / 2, 6)?;
    mem.expect(0, HUGE_BYTES / 2, 6)?;
    mem.expect_zero(HUGE_BYTES / 2, HUGE_BYTES / 2)
}

/// kill -9 of the driver: the next one finds the bytes where they were.
fn driver_dies(ctx: &Ctx) -> CaseResult {
    let _pool = pool(1)?;
    let mem = Mem::hugetlb(HUGE_BYTES, true).during("Map")?;
    mem.fill(1)?;
    ctx.adopt(&mem)?;
    for round in 2..5 {
        ctx.writes(0, &mem, HUGE_BYTES / 2, HUGE_BYTES / 4, round)?;
        let killed = Operator::connect(Some(ctx.run_dir()))?.kill(&ctx.args.devices[0]);
        ensure!(killed.is_ok() || ctx.args.chaos, "The driver cannot be killed: {killed:?}");
        mem.expect(HUGE_BYTES / 2, HUGE_BYTES / 4, round)?;
        ctx.sees(0, &mem, HUGE_BYTES / 2, HUGE_BYTES / 4, round)?;
        ctx.sees(0, &mem, 0, HUGE_BYTES / 2, 1)?;
    }
    mem.fill(6)?;
    ctx.sees_all(0, &mem, 6).map(|_| ())
}

fn shared_with_child(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    let _pool = pool(2)?;
    let mem = Mem::hugetlb(2 * HUGE_BYTES, true).during("Map")?;
    mem.fill(7)?;
    ctx.adopt(&mem)?;
    ctx.sees_all(0, &mem, 7)?;
    let child = fork(|| {
        mem.expect_all(7)?;
        let own = ctx.in_child()?;
        own.sees_all(0, &mem, 7)?;
        own.writes(0, &mem, HUGE_BYTES - 4 * PAGE, 8 * PAGE, 77)?;
        mem.expect(HUGE_BYTES - 4 * PAGE, 8 * PAGE, 77)
    })?;
    child.join()?;
    mem.expect(HUGE_BYTES - 4 * PAGE, 8 * PAGE, 77)?;
    ctx.sees(0, &mem, HUGE_BYTES - 4 * PAGE, 8 * PAGE, 77)?;
    mem.expect(0, HUGE_BYTES - 4 * PAGE, 7)?;
    ctx.writes(0, &mem, 0, mem.len(), 8)?;
    mem.expect_all(8)
}

/// As S06: what is mapped there afterwards is what the device gets.
fn unmapped(ctx: &Ctx) -> CaseResult {
    let _pool = pool(2)?;
    let mem = Mem::hugetlb(2 * HUGE_BYTES, true).during("Map")?;
    mem.fill(1)?;
    ctx.adopt(&mem)?;
    ctx.writes(0, &mem, 0, mem.len(), 2)?;
    mem.unmap(HUGE_BYTES, HUGE_BYTES)?;
    ctx.unmapped(mem.addr() + HUGE_BYTES, "A device read of unmapped hugetlb memory")?;
    let other = mem.map_fresh(HUGE_BYTES, HUGE_BYTES)?;
    other.fill(3)?;
    ctx.adopt(&other)?;
    ctx.sees_all(0, &other, 3)?;
    ctx.sees(0, &mem, 0, HUGE_BYTES, 2)?;
    ctx.writes(0, &mem, 0, HUGE_BYTES, 4)?;
    mem.expect(0, HUGE_BYTES, 4)?;
    other.expect_all(3)
}

/// As T23, of hugetlb pages.
fn shown_as_huge(ctx: &Ctx) -> CaseResult {
    let _pool = pool(1)?;
    let mem = Mem::hugetlb(HUGE_BYTES, true).during("Map")?;
    mem.fill(23)?;
    ctx.adopt(&mem)?;
    let pages = (HUGE_BYTES / PAGE) as usize;
    ensure_eq!(ctx.snapshot(0, &mem, 0, HUGE_BYTES)?, vec![prot::WRITE | prot::PMD; pages], "Snapshot of a huge page");
    ctx.protect(&mem, 0, HUGE_BYTES, true, false)?;
    ensure_eq!(ctx.snapshot(0, &mem, 0, HUGE_BYTES)?, vec![prot::READ | prot::PMD; pages], "Snapshot after PROT_READ");
    let bytes = pattern::bytes(5, 0, PAGE);
    refused(ctx.try_write(0, mem.addr(), &bytes)?, ErrorCode::Permission, "A device write of PROT_READ")?;
    ctx.sees_all(0, &mem, 23)?;
    ctx.protect(&mem, 0, HUGE_BYTES, true, true)?;
    ctx.writes(0, &mem, 0, HUGE_BYTES, 24)?;
    mem.expect_all(24)
}

/// They never move, nothing is added to them atomically, and what is given back is the kernel's alone.
fn stay(ctx: &Ctx) -> CaseResult {
    let _pool = pool(1)?;
    let mem = Mem::hugetlb(HUGE_BYTES, true).during("Map")?;
    mem.fill(1)?;
    ctx.adopt(&mem)?;
    let moved = ctx.migrate(mem.addr(), HUGE_BYTES, ctx.device(0)?.target());
    ensure!(moved.is_err(), "Huge pages have moved to a device: {moved:?}");
    ctx.writes(0, &mem, 0, HUGE_BYTES, 2)?;
    ctx.at_home(&mem, 0, HUGE_BYTES)?;
    let added = ctx.device(0)?.fetch_add(mem.addr(), PAGE, 1).map(|_| ());
    refused(added, ErrorCode::Invalid, "An addition in hugetlb memory")?;
    mem.expect_all(2)?;
    ctx.session.release(mem.addr(), HUGE_BYTES).during("Release")?;
    ensure!(ctx.try_read(0, mem.addr(), PAGE)?.is_err(), "A device read memory that was given back");
    mem.expect_all(2)?;
    ctx.adopt(&mem)?;
    ctx.sees_all(0, &mem, 2).map(|_| ())
}
