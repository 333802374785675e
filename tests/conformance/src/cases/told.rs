//! What an access counts and refuses, whatever its range is made of.

use uhmm_sdk::ErrorCode;

use crate::case::{CaseResult, Registry, ensure_eq};
use crate::ctx::{BUF, Ctx, refused};
use crate::mem::{Mem, PAGE};
use crate::pattern;

pub(super) fn register(list: &mut Registry) {
    list.one("M03_one_fault_whatever_was_adopted_in_pieces", pieces);
    list.one("M04_one_fault_across_alternating_protections", alternating);
    list.one("M05_what_cannot_be_accessed_further_on_fails_the_access_before_it_begins", fails_first);
    list.one("M06_what_was_read_as_writable_is_written_without_a_fault", read_then_written);
}

/// The kernel counts one fault for everything from the first missing page to the end of the range, through all its mappings.
fn pieces(ctx: &Ctx) -> CaseResult {
    for count in [4, 16] {
        let mem = Mem::private(BUF)?;
        let piece = BUF / count;
        (0..count).try_for_each(|at| ctx.adopt_at(mem.addr() + at * piece, piece))?;
        ctx.one_fault(&ctx.writes(0, &mem, 0, BUF, count)?)?;
        mem.expect_all(count)?;
    }
    let mem = Mem::private(BUF)?;
    ctx.adopt_at(mem.addr(), PAGE)?;
    ctx.adopt_at(mem.addr(), BUF)?;
    ctx.one_fault(&ctx.writes(0, &mem, 0, BUF, 1)?)?;
    mem.expect_all(1)
}

fn alternating(ctx: &Ctx) -> CaseResult {
    let mem = Mem::private(BUF)?;
    mem.fill(3)?;
    (0..BUF / PAGE).step_by(2).try_for_each(|page| mem.protect(page * PAGE, PAGE, true, false))?;
    ctx.adopt(&mem)?;
    ctx.one_fault(&ctx.sees_all(0, &mem, 3)?)?;
    mem.expect_all(3)
}

fn fails_first(ctx: &Ctx) -> CaseResult {
    let (len, half) = (64 * PAGE, 32 * PAGE);
    let mem = Mem::private(len)?;
    mem.fill(5)?;
    mem.protect(half, half, true, false)?;
    ctx.adopt_at(mem.addr(), half)?;
    ctx.adopt_at(mem.addr() + half, half)?;
    let bytes = pattern::bytes(6, 0, len);
    refused(ctx.try_write(0, mem.addr(), &bytes)?, ErrorCode::Permission, "A device write that ends read-only")?;
    mem.expect_all(5)?;
    mem.unmap(half, half)?;
    refused(ctx.try_write(0, mem.addr(), &bytes)?, ErrorCode::Fault, "A device write that ends unmapped")?;
    mem.expect(0, half, 5)
}

/// Nothing is missing then. (A kernel's device that has read an untouched page has the zero page, and meets a fault to write it; here it has a
/// page of its own.)
fn read_then_written(ctx: &Ctx) -> CaseResult {
    for touched in [false, true] {
        let mem = Mem::private(BUF)?;
        if touched {
            mem.fill(0)?;
        }
        ctx.adopt(&mem)?;
        ctx.one_fault(&ctx.read(0, &mem, 0, BUF)?.report)?;
        let report = ctx.writes(0, &mem, 0, BUF, 7)?;
        if ctx.undisturbed() && BUF <= ctx.device(0)?.info().memory_bytes / 2 {
            ensure_eq!(report.fault_count, 0, "Faults of a write of pages that the device has");
        }
        mem.expect_all(7)?;
    }
    Ok(())
}
