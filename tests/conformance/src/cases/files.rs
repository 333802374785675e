//! File-backed memory: the questions that a claim of file-backed device access has to answer (anchors, section 2.7).
//! uhmm's answer to most of them is: devices use files in place, so whatever holds for the page cache holds for devices.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use uhmm_sdk::ErrorCode;

use super::mirror::{content_of, file_with};
use crate::case::{CaseResult, During, Registry, ensure};
use crate::ctx::{BUF, Ctx, PMD, refused};
use crate::mem::{Mem, MemAdvice, PAGE, Remap};
use crate::pattern;

pub(super) fn register(list: &mut Registry) {
    list.one("FB01_truncate_while_in_use", truncate);
    list.one("FB02_hole_punch", hole_punch);
    list.one("FB03_pread_and_pwrite_agree_with_the_device", pread_and_pwrite);
    list.one("FB04_file_larger_than_device_memory", larger_than_device);
    list.one("FB05_read_only_mapping", read_only);
    list.one("FB06_part_of_a_file_at_an_offset", part_of_a_file);
    list.one("FB07_two_mappings_of_one_file", two_mappings);
    list.one("FB08_address_reused_by_another_file", address_reused);
}

/// Pages behind the end are gone for the device as for the CPU: an error, no crash; the pages before it go on.
fn truncate(ctx: &Ctx) -> CaseResult {
    let file = file_with(&pattern::bytes(1, 0, BUF))?;
    let mem = Mem::file_shared(file.as_fd(), BUF, true)?;
    ctx.adopt(&mem)?;
    ctx.sees_all(0, &mem, 1)?;
    file.set_len(BUF / 2).during("Truncate")?;
    ensure!(
        ctx.try_read(0, mem.addr() + BUF / 2, PAGE)?.is_err(),
        "A device read behind the end of the file succeeded"
    );
    let bytes = pattern::bytes(2, 0, PAGE);
    ensure!(ctx.try_write(0, mem.addr() + BUF / 2, &bytes)?.is_err(), "A device write behind the end succeeded");
    ensure!(file.metadata()?.len() == BUF / 2, "A device write has made the file longer");
    ctx.sees(0, &mem, 0, BUF / 2, 1)?;
    ctx.writes(0, &mem, 0, BUF / 2, 3)?;
    mem.expect(0, BUF / 2, 3)?;
    file.set_len(BUF).during("Make it longer again")?;
    ctx.sees_zero(0, &mem, BUF / 2, BUF / 2)?;
    mem.expect_zero(BUF / 2, BUF / 2)
}

fn hole_punch(ctx: &Ctx) -> CaseResult {
    let mut file = file_with(&pattern::bytes(1, 0, BUF))?;
    let mem = Mem::file_shared(file.as_fd(), BUF, true)?;
    ctx.adopt(&mem)?;
    ctx.sees_all(0, &mem, 1)?;
    mem.advise(BUF / 4, BUF / 4, MemAdvice::Remove)?;
    ctx.sees(0, &mem, 0, BUF / 4, 1)?;
    ctx.sees_zero(0, &mem, BUF / 4, BUF / 4)?;
    ctx.sees(0, &mem, BUF / 2, BUF / 2, 1)?;
    ctx.writes(0, &mem, BUF / 4, BUF / 4, 2)?;
    mem.expect(BUF / 4, BUF / 4, 2)?;
    let content = content_of(&mut file)?;
    let (start, end) = (BUF as usize / 4, BUF as usize / 2);
    ensure!(content[start..end] == pattern::bytes(2, BUF / 4, BUF / 4), "The file does not hold the device's bytes");
    Ok(())
}

fn pread_and_pwrite(ctx: &Ctx) -> CaseResult {
    let mut file = file_with(&pattern::bytes(1, 0, BUF))?;
    let mem = Mem::file_shared(file.as_fd(), BUF, true)?;
    ctx.adopt(&mem)?;
    ctx.sees_all(0, &mem, 1)?;
    for round in 2..6 {
        file.write_all_at(&pattern::bytes(round, 0, BUF), 0).during("pwrite")?;
        ctx.sees_all(0, &mem, round)?;
        ctx.writes(0, &mem, 0, BUF, 10 + round)?;
        ensure!(content_of(&mut file)? == pattern::bytes(10 + round, 0, BUF), "pread does not see the device's bytes");
        file.sync_data().during("fdatasync")?;
        mem.expect_all(10 + round)?;
    }
    Ok(())
}

fn larger_than_device(ctx: &Ctx) -> CaseResult {
    let len = ctx.memory_in_huge_pages()? / 4 * 5 / PMD * PMD;
    let file = file_with(&pattern::bytes(1, 0, len))?;
    let mem = Mem::file_shared(file.as_fd(), len, true)?;
    ctx.adopt(&mem)?;
    for part in 0..len / PMD {
        ctx.sees(0, &mem, part * PMD, PMD, 1)?;
        ctx.writes(0, &mem, part * PMD, PMD, 2)?;
    }
    mem.expect_all(2)
}

fn read_only(ctx: &Ctx) -> CaseResult {
    let mut file = file_with(&pattern::bytes(1, 0, BUF))?;
    let mem = Mem::file_shared(file.as_fd(), BUF, false)?;
    ctx.adopt(&mem)?;
    ctx.sees_all(0, &mem, 1)?;
    let bytes = pattern::bytes(2, 0, BUF);
    refused(ctx.try_write(0, mem.addr(), &bytes)?, ErrorCode::Permission, "A device write of a read-only file")?;
    ensure!(content_of(&mut file)? == pattern::bytes(1, 0, BUF), "A refused write has changed the file");
    mem.expect_all(1)
}

fn part_of_a_file(ctx: &Ctx) -> CaseResult {
    let mut file = file_with(&pattern::bytes(1, 0, 2 * BUF))?;
    let mem = Mem::file_part(file.as_fd(), BUF / 2, BUF)?;
    ctx.adopt_at(mem.addr() + BUF / 4, BUF / 2)?;
    let read = ctx.read(0, &mem, BUF / 4, BUF / 2)?;
    ensure!(read.bytes == pattern::bytes(1, BUF / 4 * 3, BUF / 2), "The device sees another part of the file");
    let bytes = pattern::bytes(2, 0, BUF / 2);
    ctx.try_write(0, mem.addr() + BUF / 4, &bytes)?.during("Device write")?;
    let mut expected = pattern::bytes(1, 0, 2 * BUF);
    let (start, end) = (BUF as usize / 4 * 3, BUF as usize / 4 * 5);
    expected[start..end].copy_from_slice(&bytes);
    ensure!(content_of(&mut file)? == expected, "The device has written to another part of the file");
    Ok(())
}

fn two_mappings(ctx: &Ctx) -> CaseResult {
    let file = file_with(&pattern::bytes(1, 0, BUF))?;
    let (one, two) = (Mem::file_shared(file.as_fd(), BUF, true)?, Mem::file_shared(file.as_fd(), BUF, true)?);
    ctx.adopt(&one)?;
    ctx.adopt(&two)?;
    let last = ctx.device_count() - 1;
    for round in 2..6 {
        ctx.writes(0, &one, 0, BUF, round)?;
        ctx.sees_all(last, &two, round)?;
        two.expect_all(round)?;
        two.fill(10 + round)?;
        ctx.sees_all(0, &one, 10 + round)?;
        one.expect_all(10 + round)?;
    }
    Ok(())
}

/// Replaced without a word at the same address: a device sees the new file, or private memory, never the old file.
/// (What a device already has mapped of a file on a disk it keeps after munmap, which nobody is told of; shared memory: S06.)
fn address_reused(ctx: &Ctx) -> CaseResult {
    let mut place = Mem::private(BUF)?;
    for round in 1..5 {
        let file = file_with(&pattern::bytes(round, 0, BUF))?;
        // mremap over the old mapping: the address is never free, so that nobody else can take it.
        let mem = Mem::file_shared(file.as_fd(), BUF, true)?.remap_over(0, BUF, Remap::Move, &place, 0)?;
        ctx.adopt(&mem)?;
        ctx.sees_all(0, &mem, round)?;
        ctx.writes(0, &mem, 0, BUF, 10 + round)?;
        mem.expect_all(10 + round)?;
        place = Mem::private(BUF)?.remap_over(0, BUF, Remap::Move, &mem, 0)?;
        ctx.adopt(&place)?;
        ctx.sees_zero(0, &place, 0, BUF)?;
        place.fill(20 + round)?;
        ctx.sees_all(0, &place, 20 + round)?;
        place.expect_all(20 + round)?;
    }
    Ok(())
}
