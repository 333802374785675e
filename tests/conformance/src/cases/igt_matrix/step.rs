//! One execution on one buffer.

use std::sync::atomic::{AtomicBool, Ordering};

use super::Kind;
use super::buffer::{Buffer, make};
use crate::case::{CaseResult, During, Failure, ensure, ensure_eq};
use crate::ctx::{Ctx, refused};
use crate::forked::fork;
use crate::mem::PAGE;
use crate::pattern;

/// Which execution, where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) index: u64,
    pub(super) device: usize,
    pub(super) off: u64,
    pub(super) len: u64,
    /// Nobody has written there yet.
    pub(super) first_touch: bool,
}

/// Buffers that one device command touches at once.
const MULTI: u64 = 4;

/// An execution, and what happens to the mapping behind it.
pub(super) fn run_step(ctx: &Ctx, kind: &Kind, buffer: Buffer, step: Step, thread: u64) -> CaseResult<Buffer> {
    exec(ctx, kind, &buffer, step, thread)?;
    if kind.multi_fault {
        multi_fault(ctx, kind, step)?;
    }
    if kind.busy {
        busy(ctx, &buffer, step)?;
    }
    match kind.moves {
        Some(moves) if !moves.every_other || step.index % 2 == 1 => {
            let expected = seed_of(step, thread) + 1;
            let buffer = buffer.moved(moves)?;
            if moves.read_only {
                read_only_once(ctx, &buffer, step, expected)?;
            }
            buffer.expect(step.off, step.len, expected)?;
            Ok(buffer)
        }
        _ => Ok(buffer),
    }
}

fn seed_of(step: Step, thread: u64) -> u64 {
    1000 * (thread + 1) + 2 * step.index
}

/// CPU writes, device reads and writes, CPU reads; every byte compared by both.
pub(super) fn exec(ctx: &Ctx, kind: &Kind, buffer: &Buffer, step: Step, thread: u64) -> CaseResult {
    let seed = seed_of(step, thread);
    let Step { device, off, len, .. } = step;
    let untouched = kind.no_memset && step.first_touch;
    if !untouched {
        buffer.fill(off, len, seed)?;
    }
    if kind.prefetch {
        let target = ctx.device(device)?.target();
        let pending = ctx.session.prefetch(buffer.addr() + off, len, target);
        ctx.wait_prefetch(pending)?;
    }
    let read = ctx.try_read(device, buffer.addr() + off, len)?.during("Device read")?;
    let expected = if untouched { vec![0; len as usize] } else { pattern::bytes(seed, 0, len) };
    if let Some(difference) = pattern::difference(&read.bytes, &expected, off) {
        return Err(Failure::Failed(format!("The device sees other bytes: {difference}")));
    }
    if kind.race {
        racing_write(ctx, buffer, step, seed, untouched)?;
    } else {
        let bytes = pattern::bytes(seed + 1, 0, len);
        ctx.try_write(device, buffer.addr() + off, &bytes)?.during("Device write")?;
    }
    if kind.fork_read {
        let child = fork(|| buffer.expect(off, len, seed + 1))?;
        buffer.expect(off, len, seed + 1)?;
        child.join()?;
    }
    buffer.expect(off, len, seed + 1)
}

/// The CPU reads the same page while the device writes it: every word is the old one or the new one.
fn racing_write(ctx: &Ctx, buffer: &Buffer, step: Step, seed: u64, untouched: bool) -> CaseResult {
    let done = AtomicBool::new(false);
    let bytes = pattern::bytes(seed + 1, 0, step.len);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| -> CaseResult {
            let mut index = 0;
            while !done.load(Ordering::Acquire) {
                let found = buffer.load(step.off + 8 * index)?;
                let old = if untouched { 0 } else { pattern::word(seed, index) };
                let good = found == old || found == pattern::word(seed + 1, index);
                ensure!(good, "Word {index} is {found:#x}, which nobody has written there");
                index = (index + 67) % (step.len / 8);
            }
            Ok(())
        });
        let written = ctx.try_write(step.device, buffer.addr() + step.off, &bytes);
        done.store(true, Ordering::Release);
        super::super::joined(reader)?;
        written?.during("Device write").map(|_| ())
    })
}

/// One command after the other on four buffers, all on their way at once.
fn multi_fault(ctx: &Ctx, kind: &Kind, step: Step) -> CaseResult {
    ctx.fits(MULTI * step.len)?;
    let buffers = (0..MULTI).map(|_| make(ctx, kind, step.len)).collect::<CaseResult<Vec<_>>>()?;
    for (seed, buffer) in buffers.iter().enumerate() {
        buffer.fill(0, step.len, seed as u64)?;
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = buffers
            .iter()
            .enumerate()
            .map(|(seed, buffer)| {
                scope.spawn(move || -> CaseResult {
                    let read = ctx.try_read(step.device, buffer.addr(), step.len)?.during("Device read")?;
                    ensure!(read.bytes == pattern::bytes(seed as u64, 0, step.len), "Buffer {seed} has other bytes");
                    let bytes = pattern::bytes(100 + seed as u64, 0, step.len);
                    ctx.try_write(step.device, buffer.addr(), &bytes)?.during("Device write").map(|_| ())
                })
            })
            .collect();
        threads.into_iter().try_for_each(super::super::joined)
    })?;
    for (seed, buffer) in buffers.into_iter().enumerate() {
        buffer.expect(0, step.len, 100 + seed as u64)?;
        buffer.give_back(ctx)?;
    }
    Ok(())
}

/// A range is given back while the device reads it: the read is right or refused as a whole, and no byte is lost.
fn busy(ctx: &Ctx, buffer: &Buffer, step: Step) -> CaseResult {
    let seed = 77;
    buffer.fill(step.off, step.len, seed)?;
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| -> CaseResult {
            for _ in 0..4 {
                if let Ok(read) = ctx.try_read(step.device, buffer.addr() + step.off, step.len)? {
                    let good = pattern::bytes(seed, 0, step.len);
                    ensure!(read.bytes == good, "A read during the release has other bytes");
                }
            }
            Ok(())
        });
        ctx.session.release(buffer.addr(), buffer.len()).during("Release a range in use")?;
        super::super::joined(reader)
    })?;
    ensure!(ctx.try_read(step.device, buffer.addr(), PAGE)?.is_err(), "The device reads a released range");
    buffer.expect(step.off, step.len, seed)?;
    ctx.adopt_at(buffer.addr(), buffer.len())
}

/// The device may read the moved mapping and not write it, then write it again.
fn read_only_once(ctx: &Ctx, buffer: &Buffer, step: Step, seed: u64) -> CaseResult {
    let addr = buffer.addr();
    ctx.session.protect(addr, buffer.len(), true, false).during("Protect the moved mapping")?;
    let read = ctx.try_read(step.device, addr + step.off, step.len)?.during("Device read")?;
    ensure_eq!(pattern::difference(&read.bytes, &pattern::bytes(seed, 0, step.len), step.off), None, "Moved mapping");
    let bytes = pattern::bytes(1, 0, step.len);
    let code = uhmm_sdk::ErrorCode::Permission;
    refused(ctx.try_write(step.device, addr + step.off, &bytes)?, code, "A device write of PROT_READ")?;
    ctx.session.protect(addr, buffer.len(), true, true).during("Unprotect the moved mapping")
}
