//! Device-exclusive access: the page is the device's alone until anybody else wants it.

use uhmm_sdk::{ErrorCode, Residency};

use crate::case::{CaseResult, During, Registry, ensure, ensure_eq};
use crate::ctx::{BUF, Ctx, refused};
use crate::forked::fork;
use crate::mem::{Mem, PAGE};
use crate::pattern;

pub(super) fn register(list: &mut Registry) {
    list.both("T25_exclusive", exclusive);
    list.both("T26_exclusive_mprotect", exclusive_mprotect);
    list.both("T27_exclusive_cow", exclusive_cow);
    list.one("X01_other_device_takes_it_back", other_device).devices(2);
    list.one("X02_release_and_unmap_take_it_back", release_and_unmap);
    list.one("X03_atomic_add_counts_every_step", atomic_add);
    list.one("X04_atomics_of_device_and_cpu", atomics_of_both);
}

/// Reads every word, checks it and adds one: by the CPU.
fn read_and_increment(mem: &Mem, seed: u64) -> CaseResult {
    for index in 0..mem.len() / 8 {
        let found = mem.load(8 * index)?;
        ensure_eq!(found, pattern::word(seed, index), "Word {index} before the CPU's increment");
        mem.store(8 * index, found.wrapping_add(1))?;
    }
    for index in 0..mem.len() / 8 {
        let expected = pattern::word(seed, index).wrapping_add(1);
        ensure_eq!(mem.load(8 * index)?, expected, "Word {index} after the CPU's increment");
    }
    Ok(())
}

fn made_exclusive(ctx: &Ctx, len: u64, seed: u64) -> CaseResult<Mem> {
    let mem = ctx.patterned(len, seed)?;
    ctx.exclusive(0, &mem, 0, len)?;
    if ctx.undisturbed() {
        let check = ctx.session.check_exclusive(mem.addr(), len);
        refused(check, ErrorCode::Permission, "The check while every page is exclusive")?;
    }
    ctx.sees_all(0, &mem, seed)?;
    Ok(mem)
}

fn exclusive(ctx: &Ctx) -> CaseResult {
    let mem = made_exclusive(ctx, BUF, 25)?;
    let id = ctx.device(0)?.id();
    if ctx.undisturbed() {
        let runs = ctx.session.residency(mem.addr(), BUF).during("Residency")?;
        let alone = runs.iter().all(|run| run.residency == Residency::Exclusive(id));
        ensure!(alone, "Not every page is exclusive: {runs:?}");
    }
    read_and_increment(&mem, 25)?;
    ctx.session.check_exclusive(mem.addr(), BUF).during("The check after the CPU's access")
}

fn exclusive_mprotect(ctx: &Ctx) -> CaseResult {
    let mem = made_exclusive(ctx, BUF, 26)?;
    ctx.protect(&mem, 0, BUF, true, false)?;
    ctx.session.check_exclusive(mem.addr(), BUF).during("The check after mprotect")?;
    let bytes = pattern::bytes(1, 0, BUF);
    refused(ctx.try_write(0, mem.addr(), &bytes)?, ErrorCode::Permission, "A device write of PROT_READ")?;
    let again = ctx.device(0)?.make_exclusive(mem.addr(), BUF);
    refused(again, ErrorCode::Permission, "Making PROT_READ exclusive")?;
    mem.expect_all(26)
}

fn exclusive_cow(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    ctx.needs_copy_on_write()?;
    let mem = made_exclusive(ctx, BUF, 27)?;
    let child = fork(|| read_and_increment(&mem, 27))?;
    read_and_increment(&mem, 27)?;
    child.join()?;
    ctx.session.check_exclusive(mem.addr(), BUF).during("The check after fork")
}

fn other_device(ctx: &Ctx) -> CaseResult {
    let mem = made_exclusive(ctx, BUF, 1)?;
    ctx.sees_all(1, &mem, 1)?;
    ctx.session.check_exclusive(mem.addr(), BUF).during("The check after another device's read")?;
    ctx.exclusive(1, &mem, 0, BUF)?;
    ctx.exclusive(0, &mem, 0, BUF)?;
    ctx.writes(1, &mem, 0, BUF, 2)?;
    ctx.sees_all(0, &mem, 2)?;
    mem.expect_all(2)
}

fn release_and_unmap(ctx: &Ctx) -> CaseResult {
    let mem = made_exclusive(ctx, BUF, 2)?;
    ctx.session.release(mem.addr(), BUF / 4).during("Release a part")?;
    mem.unmap(BUF / 2, BUF / 4)?;
    ctx.sees(0, &mem, BUF / 4, BUF / 4, 2)?;
    mem.expect(0, BUF / 2, 2)?;
    mem.expect(BUF / 4 * 3, BUF / 4, 2)
}

/// The device's read-modify-write of every word; not repeatable, so after a restart the words are written anew.
fn add(ctx: &Ctx, mem: &Mem, seed: u64, value: u64) -> CaseResult {
    loop {
        match ctx.device(0)?.fetch_add(mem.addr(), mem.len(), value) {
            Err(error) if ctx.args.chaos && error.code() == ErrorCode::Stale => mem.fill(seed)?,
            Err(error) => return Err(error).during("Device fetch-and-add"),
            Ok((before, report)) => {
                ensure_eq!(report.page_count, mem.len() / PAGE, "Pages of a fetch-and-add");
                ensure_eq!(before.len() as u64, mem.len() / 8, "Words of a fetch-and-add");
                for (index, found) in before.iter().enumerate() {
                    ensure_eq!(*found, pattern::word(seed, index as u64), "Word {index} before the addition");
                }
                return Ok(());
            }
        }
    }
}

fn atomic_add(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(16 * PAGE, 3)?;
    add(ctx, &mem, 3, 5)?;
    for index in 0..mem.len() / 8 {
        ensure_eq!(mem.load(8 * index)?, pattern::word(3, index).wrapping_add(5), "Word {index} after the addition");
    }
    Ok(())
}

/// CPU and device count in the same words at the same time: no step is lost.
fn atomics_of_both(ctx: &Ctx) -> CaseResult {
    if ctx.args.chaos {
        crate::case::not_applicable!("Additions cannot be repeated, and services are being killed");
    }
    const ROUNDS: u64 = 40;
    let mem = ctx.untouched(PAGE)?;
    std::thread::scope(|scope| {
        let cpu = scope.spawn(|| -> CaseResult {
            for round in 0..ROUNDS * 50 {
                mem.fetch_add(8 * (round % (PAGE / 8)), 1)?;
            }
            Ok(())
        });
        for _ in 0..ROUNDS {
            ctx.device(0)?.fetch_add(mem.addr(), PAGE, 1).during("Device fetch-and-add")?;
        }
        super::joined(cpu)
    })?;
    let mut sum = 0;
    for index in 0..PAGE / 8 {
        sum += mem.load(8 * index)?;
    }
    ensure_eq!(sum, ROUNDS * 50 + ROUNDS * PAGE / 8, "Sum of all counters");
    ensure!(mem.load(0)? >= ROUNDS, "The device's steps were lost");
    Ok(())
}
