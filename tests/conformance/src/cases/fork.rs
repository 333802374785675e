//! fork: both processes keep their own bytes, wherever the pages were; a child opens its own mirror.

use std::thread;
use std::time::{Duration, Instant};

use uhmm_sdk::Operator;

use crate::case::{CaseResult, During, Registry, ensure, ensure_eq};
use crate::ctx::{BUF, Ctx, PMD, prot};
use crate::forked::{Latch, fork};
use crate::mem::{Mem, PAGE};

pub(super) fn register(list: &mut Registry) {
    list.both("T06_anon_write_child", anon_write_child);
    list.both("T07_anon_write_child_shared", anon_write_child_shared);
    list.both("T29_hmm_cow_in_device", cow_in_device);
    list.one("K06_EvictSystemRangeTest", evict_system_range);
    list.one("F01_parent_and_child_use_devices_at_once", both_use_devices);
    list.one("F02_child_exits_while_parent_reads", child_exits);
    list.one("F03_grandchildren", grandchildren);
    list.one("F04_parent_exits_first", parent_exits_first);
    list.one("F05_managed_region_in_child", managed_region_in_child);
    list.one("F06_fork_while_the_pager_dies", fork_while_the_pager_dies);
}

fn anon_write_child(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    ctx.needs_copy_on_write()?;
    for migrated in [false, true] {
        for huge in [false, true] {
            write_in_child(ctx, migrated, huge).during(&format!("migrated {migrated}, huge {huge}"))?;
        }
    }
    Ok(())
}

fn write_in_child(ctx: &Ctx, migrated: bool, huge: bool) -> CaseResult {
    let mem = if huge { ctx.huge(2 * PMD, Some(6))? } else { ctx.patterned_small(BUF, 6)? };
    if migrated {
        ctx.all_to_device(0, &mem)?;
        ctx.sees_all(0, &mem, 6)?;
    }
    let child = fork(|| {
        mem.expect_all(6)?;
        let own = ctx.in_child()?;
        let report = own.writes(0, &mem, 0, mem.len(), 66)?;
        own.one_fault(&report)?;
        mem.expect_all(66)
    })?;
    child.join()?;
    mem.expect_all(6)?;
    ctx.sees_all(0, &mem, 6)?;
    mem.expect_all(6)
}

fn anon_write_child_shared(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    let mem = Mem::shared(BUF)?;
    mem.fill(7)?;
    ctx.adopt(&mem)?;
    let child = fork(|| {
        mem.expect_all(7)?;
        let own = ctx.in_child()?;
        let report = own.writes(0, &mem, 0, BUF, 77)?;
        own.one_fault(&report)?;
        mem.expect_all(77)
    })?;
    child.join()?;
    mem.expect_all(77)?;
    ctx.sees_all(0, &mem, 77).map(|_| ())
}

fn cow_in_device(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    let mem = ctx.patterned(4 * PAGE, 29)?;
    ctx.all_to_device(0, &mem)?;
    let never = Latch::new()?;
    let child = fork(|| never.wait())?;
    mem.fill(92)?;
    child.kill()?;
    let snapshot = ctx.snapshot(0, &mem, 0, 4 * PAGE)?;
    ensure_eq!(snapshot, [prot::WRITE; 4], "Snapshot after the parent has written");
    mem.expect_all(92)?;
    ctx.sees_all(0, &mem, 92).map(|_| ())
}

/// fork marks pages copy-on-write; the parent's write makes a new page; the device must see that one.
fn evict_system_range(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    let mem = ctx.patterned(16 * PAGE, 1)?;
    ctx.sees_all(0, &mem, 1)?;
    mem.expect_all(1)?;
    let (written, checked) = (Latch::new()?, Latch::new()?);
    let child = fork(|| {
        written.wait()?;
        mem.expect_all(1)?;
        checked.open()
    })?;
    mem.fill(2)?;
    written.open()?;
    for _ in 0..8 {
        ctx.sees_all(0, &mem, 2)?;
    }
    checked.wait()?;
    child.join()?;
    mem.expect_all(2)
}

fn both_use_devices(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    let last = ctx.device_count() - 1;
    let mem = ctx.patterned(BUF, 1)?;
    ctx.to_device(0, &mem, 0, BUF / 2)?;
    let child = fork(|| {
        let own = ctx.in_child()?;
        for round in 0..6 {
            own.writes(last, &mem, 0, BUF, 100 + round)?;
            mem.expect_all(100 + round)?;
            own.sees_all(last, &mem, 100 + round)?;
        }
        Ok(())
    })?;
    for round in 0..6 {
        ctx.writes(0, &mem, 0, BUF, 200 + round)?;
        mem.expect_all(200 + round)?;
        ctx.sees_all(0, &mem, 200 + round)?;
    }
    child.join()?;
    mem.expect_all(205)
}

fn child_exits(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    let mem = ctx.patterned(BUF, 1)?;
    ctx.all_to_device(0, &mem)?;
    for _ in 0..5 {
        let child = fork(|| Ok(()))?;
        ctx.sees_all(0, &mem, 1)?;
        child.join()?;
        ctx.sees_all(0, &mem, 1)?;
    }
    ctx.writes(0, &mem, 0, BUF, 2)?;
    mem.expect_all(2)
}

fn grandchildren(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    let mem = ctx.patterned(64 * PAGE, 1)?;
    ctx.to_device(0, &mem, 0, 32 * PAGE)?;
    let child = fork(|| {
        let own = ctx.in_child()?;
        own.writes(0, &mem, 0, 16 * PAGE, 2)?;
        let grandchild = fork(|| {
            mem.expect(0, 16 * PAGE, 2)?;
            mem.expect(16 * PAGE, 48 * PAGE, 1)?;
            let own = own.in_child()?;
            own.writes(0, &mem, 0, 64 * PAGE, 3)?;
            mem.expect_all(3)
        })?;
        grandchild.join()?;
        mem.expect(0, 16 * PAGE, 2)?;
        mem.expect(16 * PAGE, 48 * PAGE, 1)?;
        own.sees(0, &mem, 0, 16 * PAGE, 2).map(|_| ())
    })?;
    child.join()?;
    mem.expect_all(1)
}

/// The pages that a child shares with its parent outlive the parent.
fn parent_exits_first(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    let (gone, checked) = (Latch::new()?, Latch::new()?);
    let mem = ctx.patterned(BUF, 4)?;
    ctx.all_to_device(0, &mem)?;
    // The child forks and ends at once; its own child goes on with pages that both have from us, and then from nobody.
    let child = fork(|| {
        let own = ctx.in_child()?;
        own.writes(0, &mem, 0, BUF / 2, 5)?;
        let grandchild = fork(|| {
            gone.wait()?;
            mem.expect(0, BUF / 2, 5)?;
            mem.expect(BUF / 2, BUF / 2, 4)?;
            mem.fill(7)?;
            mem.expect_all(7)?;
            checked.open()
        })?;
        // Nobody waits for it here: it outlives us.
        std::mem::forget(grandchild);
        Ok(())
    })?;
    child.join()?;
    mem.fill(6)?;
    gone.open()?;
    checked.wait()?;
    mem.expect_all(6)
}

/// A region that the SDK has allocated is shared with the child, like any shared memory.
fn managed_region_in_child(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    let region = ctx.session.allocate(16 * PAGE).during("Allocate")?;
    let addr = region.addr();
    for word in 0..region.len_bytes() / 8 {
        region.write_u64(8 * word, word + 1).during("Write")?;
    }
    ctx.migrate(region.addr(), region.len_bytes(), ctx.device(0)?.target()).during("Migrate")?;
    let child = fork(|| {
        for word in 0..region.len_bytes() / 8 {
            ensure_eq!(region.read_u64(8 * word).during("Read")?, word + 1, "Word {word} in the child");
        }
        let own = ctx.in_child()?;
        own.try_write(0, addr, &crate::pattern::bytes(9, 0, region.len_bytes()))?.during("Device write").map(|_| ())
    })?;
    child.join()?;
    for word in 0..region.len_bytes() / 8 {
        let found = region.read_u64(8 * word).during("Read")?;
        ensure_eq!(found, crate::pattern::word(9, word), "Word {word} of the region, written by the child's device");
    }
    Ok(())
}

/// The pager is killed at other moments of a fork in every round: the child reads what the parent had, whatever the parent's device
/// writes from then on.
fn fork_while_the_pager_dies(ctx: &Ctx) -> CaseResult {
    const ROUNDS: u32 = 8;
    const STEP: Duration = Duration::from_micros(100);
    ctx.needs_fork()?;
    for round in 0..ROUNDS {
        let mem = ctx.patterned_small(BUF, 6)?;
        ctx.all_to_device(0, &mem)?;
        let mut operator = Operator::connect(Some(ctx.run_dir()))?;
        let begun = Instant::now();
        let killer = thread::spawn(move || {
            while begun.elapsed() < STEP * round {
                std::hint::spin_loop();
            }
            operator.kill("pager")
        });
        let child = fork(|| mem.expect_all(6));
        let killed = killer.join().is_ok_and(|killed| killed.is_ok());
        ensure!(killed || ctx.args.chaos, "The pager cannot be killed");
        ctx.writes(0, &mem, 0, BUF, 66)?;
        child?.join().during(&format!("Round {round}, the child"))?;
        mem.expect_all(66).during(&format!("Round {round}, the parent"))?;
    }
    Ok(())
}
