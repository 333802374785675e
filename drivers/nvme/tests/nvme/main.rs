//! The driver against the NVMe model, well-behaved and not.

mod common;
mod several;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{AnyError, Bench, Driver, engine};
use uhmm_compute::FramePort;
use uhmm_driver_kit::{CopyEngine, DeviceMemory, Frames, MemoryOrigin, PAGE_BYTES, Staging};
use uhmm_driver_nvme::cmb;
use uhmm_driver_nvme::engine::{NvmeEngine, NvmePort};
use uhmm_driver_nvme::error::NvmeError;
use uhmm_driver_nvme::header::{Found, HEADER_BYTES, Header, HeaderError, State};
use uhmm_driver_nvme::machine::Request;
use uhmm_driver_nvme::namespace::Namespace;
use uhmm_driver_nvme::protocol::Opcode;
use uhmm_driver_nvme::shell::{Controller, Options};
use uhmm_kernel_hook::{Prot, Window};
use uhmm_models::ModelBackend;
use uhmm_models::nvme::{NvmeFault, NvmeModel, NvmeOptions};
use uhmm_pci::PciDevice;

const STAGING_BYTES: u64 = 4 << 20;

fn frames(first: u32, count: u32) -> Frames {
    Frames { first, count }
}

/// Every page different, every `round` different.
fn fill(staging: &Staging, round: u64) -> Result<(), AnyError> {
    for page in 0..STAGING_BYTES / PAGE_BYTES {
        for at in (0..PAGE_BYTES).step_by(512) {
            staging.window.store_u64(page * PAGE_BYTES + at, round << 32 | page << 12 | at | 1)?;
        }
    }
    Ok(())
}

fn check(staging: &Staging, round: u64, from_page: u64, first: u64, count: u64) -> Result<(), AnyError> {
    for page in 0..count {
        for at in (0..PAGE_BYTES).step_by(512) {
            let found = staging.window.load_u64((first + page) * PAGE_BYTES + at)?;
            let wanted = round << 32 | (from_page + page) << 12 | at | 1;
            assert_eq!(found, wanted, "page {page}, byte {at}");
        }
    }
    Ok(())
}

/// The driver's namespace, how it was found, and an engine on it.
fn opened(driver: &Driver) -> Result<(Namespace, MemoryOrigin, NvmeEngine, Staging), AnyError> {
    let (namespace, origin) = driver.namespace(false)?;
    let (engine, staging) = engine(&namespace, STAGING_BYTES)?;
    Ok((namespace, origin, engine, staging))
}

/// A new driver whose first 512 frames hold what [`fill`] writes in this round.
fn written(bench: &Bench, round: u64) -> Result<(Driver, Namespace, NvmeEngine, Staging), AnyError> {
    let driver = bench.driver(None)?;
    let (namespace, _, mut engine, staging) = opened(&driver)?;
    fill(&staging, round)?;
    engine.copy_in(&staging, 0, frames(0, 512))?;
    Ok((driver, namespace, engine, staging))
}

#[test]
fn nvme_brings_back_every_byte_whatever_the_block_size_and_the_limits() -> Result<(), AnyError> {
    for (block_shift, mdts) in [(9, 0), (12, 1), (9, 3), (12, 5)] {
        let bench = Bench::new(NvmeOptions { block_shift, mdts, ..NvmeOptions::default() })?;
        let driver = bench.driver(None)?;
        let (namespace, origin, mut engine, staging) = opened(&driver)?;
        assert_eq!((origin, namespace.frame_count()), (MemoryOrigin::Created, (64 << 8) - 32));
        fill(&staging, 7)?;
        for (page, first, count) in [(0, 0, 1), (1, 1, 2), (3, 3, 3), (6, 100, 33), (40, 1000, 512), (0, 16350, 2)] {
            engine.copy_in(&staging, page, frames(first, count))?;
            engine.copy_out(frames(first, count), &staging, 512)?;
            check(&staging, 7, u64::from(page), 512, u64::from(count))?;
            fill(&staging, 7)?;
        }
        let counters = bench.control.counters();
        assert_eq!((counters.enables, counters.dma_faults, counters.bad_doorbells), (1, 0, 0), "{counters:?}");
        assert!(engine.copy_in(&staging, 0, frames(16351, 2)).is_err(), "beyond the end");
    }
    Ok(())
}

#[test]
fn nvme_scrubs_with_and_without_write_zeroes() -> Result<(), AnyError> {
    for write_zeroes in [true, false] {
        let bench = Bench::new(NvmeOptions { write_zeroes, ..NvmeOptions::default() })?;
        let driver = bench.driver(None)?;
        let (_, _, mut engine, staging) = opened(&driver)?;
        fill(&staging, 1)?;
        engine.copy_in(&staging, 0, frames(50, 512))?;
        engine.scrub(frames(51, 510))?;
        engine.copy_out(frames(50, 512), &staging, 512)?;
        check(&staging, 1, 0, 512, 1)?;
        check(&staging, 1, 511, 1023, 1)?;
        let mut scrubbed = vec![1; 510 * PAGE_BYTES as usize];
        staging.window.read(513 * PAGE_BYTES, &mut scrubbed)?;
        assert!(scrubbed.iter().all(|byte| *byte == 0));
        assert_eq!(bench.control.counters().zeroings > 0, write_zeroes);
    }
    Ok(())
}

#[test]
fn nvme_units_reach_single_frames_while_the_engine_works() -> Result<(), AnyError> {
    let bench = Bench::new(NvmeOptions::default())?;
    bench.control.set_latency(Duration::from_micros(300));
    let driver = bench.driver_with(None, Default::default())?;
    let (namespace, _, mut engine, staging) = opened(&driver)?;
    fill(&staging, 3)?;
    std::thread::scope(|scope| -> Result<(), AnyError> {
        let units: Vec<_> = (0..4_u32)
            .map(|unit| {
                let mut port = NvmePort::new(namespace.clone())?;
                Ok(scope.spawn(move || -> Result<(), AnyError> {
                    for round in 0..20_u64 {
                        port.page().store_u64(8, round << 8 | u64::from(unit))?;
                        port.store(9000 + unit, 0..PAGE_BYTES)?;
                        port.page().store_u64(8, 0)?;
                        port.load(9000 + unit, 8..16)?;
                        assert_eq!(port.page().load_u64(8)?, round << 8 | u64::from(unit));
                    }
                    Ok(())
                }))
            })
            .collect::<Result<_, AnyError>>()?;
        for round in 0..10 {
            engine.copy_in(&staging, 0, frames(round * 512, 512))?;
            engine.copy_out(frames(round * 512, 512), &staging, 512)?;
            check(&staging, 3, 0, 512, 512)?;
        }
        units.into_iter().try_for_each(|unit| unit.join().map_err(|_| AnyError::from("a unit failed"))?)
    })
}

/// 4 MiB out and back with faults on the way: what the caller sees, and what it cost.
fn with_fault(faults: &[(u64, NvmeFault)]) -> Result<(Result<(), AnyError>, u64, Bench), AnyError> {
    let bench = Bench::new(NvmeOptions::default())?;
    let driver = bench.driver(None)?;
    let (_, _, mut engine, staging) = opened(&driver)?;
    fill(&staging, 9)?;
    faults.iter().for_each(|(nth, fault)| bench.control.inject(*nth, *fault));
    let mut outcome = Ok(());
    for half in 0..2_u32 {
        let written = engine.copy_in(&staging, half * 512, frames(half * 512, 512));
        outcome = outcome.and(written);
    }
    if outcome.is_ok() {
        staging.window.fill(0, STAGING_BYTES, 0)?;
        engine.copy_out(frames(0, 1024), &staging, 0)?;
        check(&staging, 9, 0, 0, 1024)?;
    }
    let resets = driver.controller.counters().resets - 1;
    // Whatever happened, the device works afterwards.
    engine.copy_in(&staging, 0, frames(4000, 64))?;
    Ok((outcome, resets, bench))
}

#[test]
fn nvme_command_errors_are_retried_and_final_ones_reported() -> Result<(), AnyError> {
    let (outcome, resets, _) = with_fault(&[(3, NvmeFault::Status(0x281)), (5, NvmeFault::Status(0x06))])?;
    assert!(outcome.is_ok() && resets == 0);
    let (outcome, resets, bench) = with_fault(&[(3, NvmeFault::Status(0x4280))])?;
    let text = outcome.err().ok_or("reported")?.to_string();
    assert!(text.contains("write fault") && text.contains("Write of"), "{text}");
    assert_eq!((resets, bench.control.counters().enables), (0, 1));
    Ok(())
}

#[test]
fn nvme_dropped_completion_is_aborted_then_the_controller_is_reset() -> Result<(), AnyError> {
    let (outcome, resets, bench) = with_fault(&[(7, NvmeFault::DropCompletion)])?;
    assert!(outcome.is_ok());
    assert_eq!((resets, bench.control.counters().enables), (1, 2));
    assert!(bench.control.counters().aborts >= 1);
    Ok(())
}

#[test]
fn nvme_stuck_queue_ends_in_a_reset_and_everything_is_sent_again() -> Result<(), AnyError> {
    let (outcome, resets, _) = with_fault(&[(4, NvmeFault::StuckQueue)])?;
    assert!(outcome.is_ok() && resets == 1);
    Ok(())
}

#[test]
fn nvme_corrupted_and_doubled_completions_are_never_trusted() -> Result<(), AnyError> {
    for fault in [NvmeFault::WrongId, NvmeFault::DoubleCompletion, NvmeFault::Fatal] {
        let (outcome, resets, _) = with_fault(&[(10, fault)])?;
        assert!(outcome.is_ok() && resets == 1, "{fault:?}: {outcome:?}, {resets} resets");
    }
    Ok(())
}

#[test]
fn nvme_dma_to_an_unmapped_address_is_an_error_of_that_command() -> Result<(), AnyError> {
    let (outcome, resets, bench) = with_fault(&[(2, NvmeFault::WildAddress)])?;
    assert!(outcome.is_ok() && resets == 0, "sent again");
    assert_eq!(bench.control.counters().dma_faults, 1);
    Ok(())
}

#[test]
fn nvme_late_commands_are_aborted_without_a_reset() -> Result<(), AnyError> {
    let bench = Bench::new(NvmeOptions::default())?;
    let patient = Options { io_timeout: Duration::from_millis(60), ..Options::default() };
    let patient = Options { admin_timeout: Duration::from_secs(20), ..patient };
    let driver = bench.driver_with(None, patient)?;
    let (_, _, mut engine, staging) = opened(&driver)?;
    bench.control.set_latency(Duration::from_secs(3600));
    let error = engine.copy_in(&staging, 0, frames(0, 1)).err().ok_or("it is late for ever")?.to_string();
    assert!(error.contains("aborted on request") && error.contains("3 times"), "{error}");
    let counters = bench.control.counters();
    assert!(counters.aborts >= 3 && counters.enables == 1, "{counters:?}");
    bench.control.set_latency(Duration::ZERO);
    engine.copy_in(&staging, 0, frames(0, 1))?;
    Ok(())
}

#[test]
fn nvme_removal_is_an_error_at_once_and_no_hang() -> Result<(), AnyError> {
    for by_machine in [true, false] {
        let bench = Bench::new(NvmeOptions::default())?;
        let driver = bench.driver_with(None, Default::default())?;
        let (_, _, mut engine, staging) = opened(&driver)?;
        if by_machine {
            bench.machine.remove()
        } else {
            bench.control.vanish()
        }
        let begun = Instant::now();
        let error = engine.copy_in(&staging, 0, frames(0, 512)).err().ok_or("it is gone")?.to_string();
        assert!(error.contains("was removed"), "{error}");
        assert!(engine.scrub(frames(0, 1)).is_err() && begun.elapsed() < Duration::from_secs(1));
    }
    Ok(())
}

#[test]
fn nvme_controller_that_cannot_be_disabled_gets_a_function_level_reset() -> Result<(), AnyError> {
    let (outcome, _, bench) = with_fault(&[])?;
    outcome?;
    let driver = bench.driver(None)?;
    let (_, _, mut engine, staging) = opened(&driver)?;
    bench.control.set_stubborn();
    bench.control.inject(1, NvmeFault::Fatal);
    engine.copy_in(&staging, 0, frames(0, 64))?;
    assert_eq!(bench.control.counters().function_resets, 1);
    Ok(())
}

/// Dies before each of the first register stores of a transfer in turn: the next incarnation goes on, without a reset.
#[test]
fn nvme_killed_driver_is_followed_by_one_that_adopts_the_controller() -> Result<(), AnyError> {
    let bench = Bench::new(NvmeOptions::default())?;
    let mut driver = bench.driver_with(None, Options::default())?;
    let mut origin = MemoryOrigin::Created;
    let mut deaths = 0;
    for round in 0..50_u64 {
        let (namespace, found, mut engine, staging) = opened(&driver)?;
        assert_eq!(found, origin, "round {round}");
        if round > 0 {
            engine.copy_out(frames(2000, 512), &staging, 0)?;
            check(&staging, round - 1, 0, 0, 512)?;
        }
        fill(&staging, round)?;
        engine.copy_in(&staging, 0, frames(2000, 512))?;
        bench.control.set_latency(Duration::from_micros(200 * (round % 3)));
        let (kept, died) = driver.killed_at(&bench, 1 + round % 12, || {
            let done = (0..8).try_for_each(|n| engine.copy_in(&staging, 512, frames(n * 200, 200)));
            (engine, staging, namespace.clone(), done)
        });
        std::mem::forget(namespace);
        deaths += u64::from(died);
        bench.control.set_latency(Duration::ZERO);
        driver = bench.driver_with(Some(kept), Options::default())?;
        assert!(driver.controller.is_adopted(), "round {round}");
        assert_eq!((driver.controller.last_report(), bench.control.counters().enables), (None, 1), "round {round}");
        origin = MemoryOrigin::Adopted;
    }
    let counters = bench.control.counters();
    assert!(deaths >= 48, "{deaths} deaths within a transfer");
    assert_eq!((counters.enables, counters.bad_doorbells, counters.aborts), (1, 0, 0), "{counters:?}");
    Ok(())
}

#[test]
fn nvme_broken_controller_of_a_killed_driver_is_reset_and_its_frames_are_kept() -> Result<(), AnyError> {
    let bench = Bench::new(NvmeOptions::default())?;
    let (driver, namespace, mut first, staging) = written(&bench, 5)?;
    bench.control.inject(1, NvmeFault::StuckQueue);
    let (kept, _) = driver.killed_at(&bench, 4, || (first.copy_in(&staging, 0, frames(600, 100)), first));
    std::mem::forget(namespace);
    let driver = bench.driver(Some(kept))?;
    let (_, origin, mut second, staging) = opened(&driver)?;
    assert_eq!((origin, bench.control.counters().enables), (MemoryOrigin::Adopted, 2));
    second.copy_out(frames(0, 512), &staging, 0)?;
    check(&staging, 5, 0, 0, 512)
}

#[test]
fn nvme_orderly_end_leaves_a_controller_that_is_off_and_frames_that_stay() -> Result<(), AnyError> {
    let bench = Bench::new(NvmeOptions::default())?;
    let (driver, namespace, first, _staging) = written(&bench, 6)?;
    let kept = driver.kept.clone();
    drop((first, namespace, driver));
    let driver = bench.driver(Some(kept))?;
    assert!(!driver.controller.is_adopted());
    let (_, origin, mut second, staging) = opened(&driver)?;
    assert_eq!(origin, MemoryOrigin::Adopted);
    second.copy_out(frames(0, 512), &staging, 0)?;
    check(&staging, 6, 0, 0, 512)
}

#[test]
fn nvme_cold_start_is_a_new_generation_of_zeroes() -> Result<(), AnyError> {
    let options = NvmeOptions { len_bytes: 16 << 20, ..NvmeOptions::default() };
    let bench = Bench::new(options.clone())?;
    let (driver, namespace, first, _staging) = written(&bench, 6)?;
    let blocks = bench.blocks.clone();
    drop((first, namespace, driver, bench));
    // The machine was off; the vault is empty.
    let (model, control) = NvmeModel::with_blocks(options, blocks.clone())?;
    let bench = Bench { machine: uhmm_models::Machine::start(Box::new(model))?, control, blocks };
    let driver = bench.driver(None)?;
    let (namespace, origin) = driver.namespace(false)?;
    assert_eq!(origin, MemoryOrigin::Created);
    let window = Window::map(bench.blocks.as_fd(), 0, 16 << 20, Prot::ReadOnly)?;
    for at in (HEADER_BYTES..16 << 20).step_by(8) {
        assert_eq!(window.load_u64(at)?, 0, "nobody's bytes are shown to anybody");
    }
    drop(namespace);
    Ok(())
}

#[test]
fn nvme_namespace_with_anybody_elses_data_is_refused_unless_told_otherwise() -> Result<(), AnyError> {
    let bench = Bench::new(NvmeOptions::default())?;
    let window = Window::map(bench.blocks.as_fd(), 0, 64 << 20, Prot::ReadWrite)?;
    window.store_u16(510, 0xaa55)?;
    let driver = bench.driver(None)?;
    let refused = |outcome: Result<(Namespace, MemoryOrigin), NvmeError>| match outcome {
        Err(NvmeError::Header(error @ HeaderError::Foreign { .. })) => Ok(error.to_string()),
        other => Err(format!("not refused: {other:?}")),
    };
    assert!(refused(driver.namespace(false))?.contains("partition table"));
    assert_eq!(window.load_u16(510)?, 0xaa55, "as it was");
    let (_, origin) = driver.namespace(true)?;
    assert_eq!((origin, window.load_u16(510)?), (MemoryOrigin::Created, 0));
    assert_eq!(driver.namespace(false)?.1, MemoryOrigin::Adopted);
    Ok(())
}

/// What the medium begins with.
fn header(bench: &Bench) -> Result<Header, AnyError> {
    let mut bytes = vec![0; HEADER_BYTES as usize];
    Window::map(bench.blocks.as_fd(), 0, HEADER_BYTES, Prot::ReadOnly)?.read(0, &mut bytes)?;
    match Found::decode(&bytes) {
        Found::Header(header) => Ok(header),
        other => Err(format!("no header: {other:?}").into()),
    }
}

fn put_header(bench: &Bench, header: Header) -> Result<(), AnyError> {
    Ok(Window::map(bench.blocks.as_fd(), 0, HEADER_BYTES, Prot::ReadWrite)?.write(0, &header.encode())?)
}

#[test]
fn nvme_given_back_namespace_is_anybodys_and_one_in_use_is_not() -> Result<(), AnyError> {
    for given_back in [true, false] {
        let bench = Bench::new(NvmeOptions::default())?;
        let (driver, namespace, first, _staging) = written(&bench, 6)?;
        if given_back {
            namespace.release()?;
        }
        let old = header(&bench)?;
        assert_eq!(old.state, if given_back { State::Released } else { State::InUse });
        drop((first, namespace, driver));
        // From here on another machine looks at it: nothing in the vault, and the header is not of this host.
        put_header(&bench, Header { host: !old.host, ..old })?;
        let driver = bench.driver(None)?;
        if !given_back {
            let refused = driver.namespace(false);
            let host = !old.host;
            assert!(
                matches!(refused, Err(NvmeError::Header(HeaderError::OtherHost { host: found })) if found == host),
                "{refused:?}"
            );
            assert_eq!(header(&bench)?, Header { host, ..old }, "as it was");
            continue;
        }
        let (namespace, origin) = driver.namespace(false)?;
        let new = header(&bench)?;
        assert_eq!((origin, new.state, new.host), (MemoryOrigin::Created, State::InUse, old.host));
        assert!(new.generation != old.generation && new.owner != old.owner, "{old:?} {new:?}");
        let (mut second, staging) = engine(&namespace, STAGING_BYTES)?;
        fill(&staging, 1)?;
        second.copy_out(frames(0, 512), &staging, 0)?;
        assert!(staging.window.compare(0, &vec![0; 512 << 12])?, "the last owner's bytes");
    }
    Ok(())
}

#[test]
fn nvme_given_back_frames_are_not_adopted_even_by_who_knows_them() -> Result<(), AnyError> {
    let bench = Bench::new(NvmeOptions::default())?;
    let driver = bench.driver(None)?;
    let (namespace, _) = driver.namespace(false)?;
    namespace.release()?;
    let (old, kept) = (header(&bench)?, driver.kept.clone());
    drop((namespace, driver));
    let driver = bench.driver(Some(kept))?;
    assert_eq!(driver.namespace(false)?.1, MemoryOrigin::Created);
    assert_ne!(header(&bench)?.generation, old.generation);
    Ok(())
}

#[test]
fn nvme_header_of_somebody_else_is_not_released() -> Result<(), AnyError> {
    let bench = Bench::new(NvmeOptions::default())?;
    let driver = bench.driver(None)?;
    let (namespace, _) = driver.namespace(false)?;
    let theirs = Header { generation: 4711, ..header(&bench)? };
    put_header(&bench, theirs)?;
    let refused = namespace.release();
    assert!(matches!(refused, Err(NvmeError::Header(HeaderError::Changed))), "{refused:?}");
    assert_eq!(header(&bench)?, theirs);
    Ok(())
}

#[test]
fn nvme_buffer_is_device_memory_that_cpu_and_commands_reach() -> Result<(), AnyError> {
    let bench = Bench::new(NvmeOptions { cmb_bytes: 4 << 20, ..NvmeOptions::default() })?;
    let connect =
        || -> Result<PciDevice, AnyError> { Ok(PciDevice::new(Arc::new(ModelBackend::connect(&bench.machine)?))?) };
    let device = connect()?;
    let (memory, origin) = cmb::open(device.clone(), &[], u64::MAX)?;
    assert_eq!((origin, memory.frame_count()), (MemoryOrigin::Created, 1023), "the last page has the mark");
    assert!(memory.aperture().is_some());
    memory.window().store_u64(5 * PAGE_BYTES, 4711)?;
    // A command reads blocks straight into it.
    let controller = Controller::open(device.clone(), None, common::options())?;
    Window::map(bench.blocks.as_fd(), 0, 64 << 20, Prot::ReadWrite)?.store_u64(1 << 20, 815)?;
    let iova = cmb::CMB_ADDRESS + 6 * PAGE_BYTES;
    controller.run([Request { opcode: Opcode::Read, lba: 2048, blocks: 8, iova, bytes: 4096 }])?;
    assert_eq!(memory.window().load_u64(6 * PAGE_BYTES)?, 815);
    let kept = memory.kept();
    drop((controller, memory, device));
    let (memory, origin) = cmb::open(connect()?, &kept, u64::MAX)?;
    assert_eq!((origin, memory.window().load_u64(5 * PAGE_BYTES)?), (MemoryOrigin::Adopted, 4711));
    let without = Bench::new(NvmeOptions::default())?;
    let device = PciDevice::new(Arc::new(ModelBackend::connect(&without.machine)?))?;
    let refused = cmb::open(device, &[], u64::MAX).err().ok_or("there is none")?.to_string();
    assert!(refused.contains("no memory buffer"), "{refused}");
    Ok(())
}
