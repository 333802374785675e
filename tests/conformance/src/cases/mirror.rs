//! Mirroring: device reads and writes of memory in every state of the address space, and the errors that belong to it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;

use uhmm_kernel_hook::{AddrRange, Features, RegisterMode, Userfaultfd};
use uhmm_sdk::{Advice, ErrorCode, Session};

use crate::case::{CaseResult, During, Failure, Registry, ensure, ensure_eq, not_applicable};
use crate::ctx::{BUF, Ctx, refused};
use crate::mem::{Mem, PAGE};
use crate::pattern;

pub(super) fn register(list: &mut Registry) {
    list.both("T01_open_close", open_close);
    list.both("T02_anon_read", anon_read);
    list.both("T03_anon_read_prot", anon_read_prot);
    list.both("T04_anon_write", anon_write);
    list.both("T05_anon_write_prot", anon_write_prot);
    list.both("T10_file_read", file_read);
    list.both("T11_file_write", file_write);
    list.both("T19_anon_read_multiple", anon_read_multiple);
    list.both("T21_mixedmap", mixedmap);
    list.both("T39_userfaultfd_read", userfaultfd_read);
    list.one("K01_BasicSystemMemTest", basic_system_mem);
    list.one("K04_InvalidRangeTest", invalid_range);
    list.one("K07_PartialUnmapSysMemTest", partial_unmap_sys_mem);
    list.one("K19_ReadOnlyRangeTest", read_only_range);
    list.one("M01_errors_of_device_access", errors_of_device_access);
    list.one("M02_device_read_only_advice", device_read_only_advice);
}

/// An unlinked file with this content.
pub(super) fn file_with(content: &[u8]) -> CaseResult<File> {
    let mut file = temp_file()?;
    file.write_all(content).during("Write a file")?;
    Ok(file)
}

/// An unlinked file of the run's folder.
pub(super) fn temp_file() -> CaseResult<File> {
    let path = std::env::temp_dir().join(format!("uhmm-conformance-file-{}-{:x}", std::process::id(), next_number()));
    let file = File::options().read(true).write(true).create_new(true).open(&path).during("Make a file")?;
    std::fs::remove_file(&path).during("Unlink a file")?;
    Ok(file)
}

fn next_number() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// All bytes of a file, through read(2).
pub(super) fn content_of(file: &mut File) -> CaseResult<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).during("Seek")?;
    file.read_to_end(&mut bytes).during("Read a file")?;
    Ok(bytes)
}

fn open_close(ctx: &Ctx) -> CaseResult {
    for _ in 0..3 {
        let session = Session::connect(Some(ctx.run_dir())).during("Open")?;
        let device = session.device(ctx.device(0)?.name()).during("Open the device")?;
        ensure_eq!(device.id(), ctx.device(0)?.id(), "Device id");
        drop(device);
        drop(session);
    }
    Ok(())
}

fn anon_read(ctx: &Ctx) -> CaseResult {
    let mem = if ctx.coherent() { ctx.allocated(BUF, None)? } else { Mem::private(BUF)? };
    mem.fill_at(2 * PAGE, BUF - 2 * PAGE, 2)?;
    if !ctx.coherent() {
        ctx.adopt(&mem)?;
    }
    ctx.protect(&mem, 0, BUF, true, false)?;
    ensure_eq!(mem.load(PAGE)?, 0, "The zero page, read by the CPU");
    let access = ctx.read(0, &mem, 0, BUF)?;
    ctx.one_fault(&access.report)?;
    let mut expected = vec![0; 2 * PAGE as usize];
    expected.extend(pattern::bytes(2, 2 * PAGE, BUF - 2 * PAGE));
    if let Some(difference) = pattern::difference(&access.bytes, &expected, 0) {
        return Err(Failure::Failed(format!("The device sees other bytes: {difference}")));
    }
    mem.expect_zero(0, 2 * PAGE)?;
    mem.expect(2 * PAGE, BUF - 2 * PAGE, 2)
}

fn anon_read_prot(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 3)?;
    ctx.protect(&mem, 0, BUF, false, false)?;
    let before = pattern::bytes(33, 0, BUF);
    let mut buffer = before.clone();
    let result = ctx.device(0)?.read(mem.addr(), &mut buffer);
    refused(result, ErrorCode::Fault, "A device read of PROT_NONE")?;
    ensure!(buffer == before, "A failed device read has changed the buffer");
    ctx.protect(&mem, 0, BUF, true, false)?;
    mem.expect_all(3)
}

fn anon_write(ctx: &Ctx) -> CaseResult {
    let mem = ctx.untouched(BUF)?;
    let report = ctx.writes(0, &mem, 0, BUF, 4)?;
    ctx.one_fault(&report)?;
    mem.expect_all(4)
}

fn anon_write_prot(ctx: &Ctx) -> CaseResult {
    let mem = ctx.untouched(BUF)?;
    ctx.protect(&mem, 0, BUF, true, false)?;
    let report = ctx.sees_zero(0, &mem, 0, PAGE)?;
    ctx.one_fault(&report)?;
    let bytes = pattern::bytes(5, 0, BUF);
    refused(ctx.try_write(0, mem.addr(), &bytes)?, ErrorCode::Permission, "A device write of PROT_READ")?;
    mem.expect_zero(0, BUF)?;
    ctx.protect(&mem, 0, BUF, true, true)?;
    let report = ctx.writes(0, &mem, 0, BUF, 5)?;
    ctx.one_fault(&report)?;
    mem.expect_all(5)
}

fn file_read(ctx: &Ctx) -> CaseResult {
    let file = file_with(&pattern::bytes(10, 0, BUF))?;
    let mem = Mem::file_shared(file.as_fd(), BUF, false)?;
    ctx.adopt(&mem)?;
    let report = ctx.sees_all(0, &mem, 10)?;
    ctx.one_fault(&report)?;
    mem.expect_all(10)
}

fn file_write(ctx: &Ctx) -> CaseResult {
    let mut file = file_with(&vec![0; BUF as usize])?;
    let mem = Mem::file_shared(file.as_fd(), BUF, true)?;
    ctx.adopt(&mem)?;
    let report = ctx.writes(0, &mem, 0, BUF, 11)?;
    ctx.one_fault(&report)?;
    mem.expect_all(11)?;
    ensure!(content_of(&mut file)? == pattern::bytes(11, 0, BUF), "pread of the file does not see the device's bytes");
    Ok(())
}

fn anon_read_multiple(ctx: &Ctx) -> CaseResult {
    for round in 0..10 {
        let mem = ctx.patterned(BUF, 1900 + round)?;
        let report = ctx.sees_all(0, &mem, 1900 + round)?;
        ctx.one_fault(&report)?;
        mem.expect_all(1900 + round)?;
    }
    Ok(())
}

fn mixedmap(_: &Ctx) -> CaseResult {
    not_applicable!("A driver in user mode cannot insert kernel pages into a client's mapping")
}

/// A device fault is answered by a pager in user space: uhmm's own always is. Memory that belongs to another pager's
/// userfaultfd is refused as a whole, and taken when that one has let go.
fn userfaultfd_read(ctx: &Ctx) -> CaseResult {
    let len = 4 * PAGE;
    let mem = Mem::private(len)?;
    let (other, _) = Userfaultfd::create(None).during("Make another pager's userfaultfd")?;
    other.api(Features::empty()).during("UFFDIO_API")?;
    let range = AddrRange { start: mem.addr(), len };
    other.register(range, RegisterMode::MISSING).during("UFFDIO_REGISTER")?;
    ensure!(ctx.session.adopt(mem.addr(), len).is_err(), "Memory of another pager was adopted");
    drop(other);
    mem.write(0, &vec![0xab; len as usize])?;
    ctx.adopt(&mem)?;
    let last = ctx.device_count() - 1;
    ctx.all_to_device(last, &mem)?;
    let access = ctx.read(0, &mem, 0, len)?;
    ensure!(access.bytes.iter().all(|byte| *byte == 0xab), "The device does not see what the pager supplies");
    ensure!(mem.bytes(0, len)?.iter().all(|byte| *byte == 0xab), "The CPU does not see what the pager supplies");
    Ok(())
}

fn basic_system_mem(ctx: &Ctx) -> CaseResult {
    let (from, to) = (ctx.patterned(PAGE, 101)?, ctx.untouched(PAGE)?);
    let read = ctx.read(0, &from, 0, PAGE)?;
    ctx.try_write(0, to.addr(), &read.bytes)?.during("Device write")?;
    to.expect_all(101)?;
    from.expect_all(101)
}

fn invalid_range(ctx: &Ctx) -> CaseResult {
    let mem = Mem::private(4 * PAGE)?;
    let addr = mem.addr();
    mem.unmap(0, 4 * PAGE)?;
    ensure!(ctx.session.adopt(addr, 4 * PAGE).is_err(), "Adopting an address without a mapping succeeded");
    let again = Mem::private(4 * PAGE)?;
    refused(ctx.session.adopt(again.addr() + 8, PAGE), ErrorCode::Invalid, "Adopting a misaligned address")?;
    refused(ctx.session.adopt(again.addr(), 100), ErrorCode::Invalid, "Adopting a part of a page")?;
    refused(ctx.session.adopt(again.addr(), 0), ErrorCode::Invalid, "Adopting nothing")?;
    Ok(())
}

fn partial_unmap_sys_mem(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(16 * PAGE, 107)?;
    ctx.sees_all(0, &mem, 107)?;
    mem.unmap(6 * PAGE, 4 * PAGE)?;
    ctx.sees(0, &mem, 0, 6 * PAGE, 107)?;
    ctx.sees(0, &mem, 10 * PAGE, 6 * PAGE, 107)?;
    ctx.unmapped(mem.addr() + 6 * PAGE, "A device read of an unmapped page")?;
    refused(ctx.try_read(0, mem.addr(), 16 * PAGE)?, ErrorCode::Fault, "A device read over an unmapped page")?;
    mem.expect(0, 6 * PAGE, 107)?;
    mem.expect(10 * PAGE, 6 * PAGE, 107)
}

fn read_only_range(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(8 * PAGE, 119)?;
    ctx.protect(&mem, 0, 8 * PAGE, true, false)?;
    ctx.sees_all(0, &mem, 119)?;
    let addr = mem.addr() + 5 * PAGE;
    let error = ctx.try_write(0, addr, &pattern::bytes(1, 0, PAGE))?;
    let error = refused(error, ErrorCode::Permission, "A device write of a read-only range")?;
    ensure!(error.to_string().contains(&format!("{addr:#x}")), "The error does not name {addr:#x}: {error}");
    mem.expect_all(119)?;
    ctx.sees_all(0, &mem, 119).map(|_| ())
}

fn errors_of_device_access(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(4 * PAGE, 1)?;
    let device = ctx.device(0)?;
    let mut page = vec![0; PAGE as usize];
    refused(device.read(mem.addr() + 8, &mut page), ErrorCode::Invalid, "A misaligned device read")?;
    refused(device.read(mem.addr(), &mut page[..100]), ErrorCode::Invalid, "A device read of part of a page")?;
    refused(device.write(mem.addr() + 8, &page), ErrorCode::Invalid, "A misaligned device write")?;
    refused(device.read(0, &mut page), ErrorCode::Fault, "A device read of address zero")?;
    refused(device.write(0, &page), ErrorCode::Fault, "A device write of address zero")?;
    // A mapping of this process that nobody has put under management.
    let unmanaged = Mem::private(PAGE)?;
    ensure!(device.read(unmanaged.addr(), &mut page).is_err(), "A device read memory that was never adopted");
    mem.expect_all(1)?;
    ctx.sees_all(0, &mem, 1).map(|_| ())
}

fn device_read_only_advice(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(8 * PAGE, 7)?;
    ctx.writes(0, &mem, 0, 8 * PAGE, 8)?;
    ctx.session.advise(mem.addr(), mem.len(), Advice::DeviceReadOnly).during("Advise read-only")?;
    let bytes = pattern::bytes(9, 0, 8 * PAGE);
    refused(ctx.try_write(0, mem.addr(), &bytes)?, ErrorCode::Permission, "A device write against the advice")?;
    ctx.sees_all(0, &mem, 8)?;
    mem.expect_all(8)?;
    ctx.session.advise(mem.addr(), mem.len(), Advice::DeviceReadWrite).during("Advise read-write")?;
    ctx.writes(0, &mem, 0, 8 * PAGE, 9)?;
    mem.expect_all(9)
}
