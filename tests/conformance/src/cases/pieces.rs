//! Memory that is cut, shared or left: what the pager must remember of it, also over its own death.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use uhmm_sdk::{Advice, ErrorCode, Operator};

use crate::case::{CaseResult, During, Failure, Registry, ensure, ensure_eq};
use crate::ctx::{Ctx, refused};
use crate::forked::{Latch, fork};
use crate::mem::{Mem, PAGE};
use crate::pattern;

pub(super) fn register(list: &mut Registry) {
    list.one("S02_many_pieces_survive_the_pager", many_pieces);
    list.one("S03_region_freed_by_one_of_two", freed_by_one_of_two);
    list.one("S04_read_only_advice_inside_a_range", read_only_inside);
    list.one("S05_exec_gives_device_memory_back", exec_gives_back);
    list.one("S06_unmapped_shared_memory_is_gone_for_devices", unmapped_shared);
}

/// Every second page of an allocation is unmapped; the other ones are on a device when the pager dies.
fn many_pieces(ctx: &Ctx) -> CaseResult {
    const PAGES: u64 = 256;
    let mem = ctx.patterned_small(PAGES * PAGE, 3)?;
    ctx.all_moved_out(&mem)?;
    for page in (1..PAGES).step_by(2) {
        mem.unmap(page * PAGE, PAGE)?;
    }
    let killed = Operator::connect(Some(ctx.run_dir()))?.kill("pager");
    ensure!(killed.is_ok() || ctx.args.chaos, "The pager cannot be killed: {killed:?}");
    (0..PAGES).step_by(2).try_for_each(|page| mem.expect(page * PAGE, PAGE, 3))
}

/// A region that the SDK has allocated belongs to both after a fork: one of them frees it, the other one goes on.
fn freed_by_one_of_two(ctx: &Ctx) -> CaseResult {
    ctx.needs_fork()?;
    let region = ctx.session.allocate(16 * PAGE).during("Allocate")?;
    let words = region.len_bytes() / 8;
    for word in 0..words {
        region.write_u64(8 * word, word + 1).during("Write")?;
    }
    ctx.migrate(region.addr(), region.len_bytes(), ctx.device(0)?.target()).during("Migrate")?;
    let (forked, freed) = (Latch::new()?, Latch::new()?);
    let child = fork(|| {
        let own = ctx.in_child()?;
        forked.open()?;
        freed.wait()?;
        for word in 0..words {
            ensure_eq!(region.read_u64(8 * word).during("Read")?, word + 1, "Word {word} in the child");
        }
        own.try_write(0, region.addr(), &pattern::bytes(9, 0, 16 * PAGE))?.during("Device write")?;
        ensure_eq!(region.read_u64(8).during("Read")?, pattern::word(9, 1), "Word written by the child's device");
        Ok(())
    })?;
    forked.wait()?;
    drop(region);
    freed.open()?;
    child.join()
}

fn read_only_inside(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(4 * PAGE, 1)?;
    ctx.session.advise(mem.addr() + 2 * PAGE, PAGE, Advice::DeviceReadOnly).during("Advise")?;
    ctx.sees_all(0, &mem, 1)?;
    let write = ctx.try_write(0, mem.addr(), &pattern::bytes(2, 0, 4 * PAGE))?;
    refused(write, ErrorCode::Permission, "A device write over a page that devices may only read")?;
    mem.expect(2 * PAGE, 2 * PAGE, 1)
}

/// Shared memory that a device has mapped in place: after munmap, and whatever is mapped there then, it is not reached any more.
fn unmapped_shared(ctx: &Ctx) -> CaseResult {
    let mem = Mem::shared(64 * PAGE)?;
    mem.fill(1)?;
    ctx.adopt(&mem)?;
    ctx.writes(0, &mem, 0, 64 * PAGE, 2)?;
    mem.expect_all(2)?;
    mem.unmap(32 * PAGE, 32 * PAGE)?;
    let gone = mem.addr() + 32 * PAGE;
    ctx.unmapped(gone, "A device read of unmapped shared memory")?;
    let other = mem.map_fresh(32 * PAGE, 32 * PAGE)?;
    other.fill(3)?;
    ctx.adopt(&other)?;
    ctx.sees_all(0, &other, 3)?;
    ctx.sees(0, &mem, 0, 32 * PAGE, 2).map(|_| ())
}

/// exec ends the address space and not the process.
fn exec_gives_back(ctx: &Ctx) -> CaseResult {
    const PATIENCE: Duration = Duration::from_secs(10);
    ctx.needs_fork()?;
    ctx.needs_living_services("A counter of the pager")?;
    let spaces = || ctx.metric("pager", "spaces");
    let before = spaces()?;
    let mem = ctx.patterned(64 * PAGE, 5)?;
    let ready = Latch::new()?;
    let child = fork(|| {
        let own = ctx.in_child()?;
        own.writes(0, &mem, 0, 64 * PAGE, 6)?;
        ready.open()?;
        let error = Command::new("sleep").arg("60").exec();
        Err(Failure::Failed(format!("exec: {error}")))
    })?;
    ready.wait()?;
    let end = Instant::now() + PATIENCE;
    // Each look is a question to the pager, which does its work in between.
    while spaces()? > before {
        ensure!(Instant::now() < end, "The space of a process that called exec is still there");
    }
    mem.expect_all(5)?;
    child.kill()
}
