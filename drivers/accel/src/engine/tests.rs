//! The driver's parts against the model in this process: data, restarts, and every fault that the model knows.

use std::sync::Arc;

use uhmm_driver_kit::{CopyEngine, DeviceMemory, Frames, MemoryOrigin, PAGE_BYTES, Staging, StagingUse};
use uhmm_models::accel::Accel as Model;
use uhmm_models::faults::FaultPlan;
use uhmm_models::{Machine, ModelBackend};

use super::*;
use crate::memory::{AccelCopies, AccelMemory};

const MEMORY: u64 = 4 << 20;
const PAGES: u32 = 64;

fn machine(faults: &[&str]) -> Machine {
    let planned = faults.iter().map(|text| text.parse().unwrap()).collect();
    Machine::start(Box::new(Model::new(MEMORY, FaultPlan::new(planned)).unwrap())).unwrap()
}

fn open(machine: &Machine) -> Arc<Accel> {
    let device = PciDevice::new(Arc::new(ModelBackend::connect(machine).unwrap())).unwrap();
    Arc::new(Accel::open(device).unwrap())
}

fn staging() -> Staging {
    Staging::create(StagingUse::Pager, u64::from(PAGES) * PAGE_BYTES).unwrap()
}

impl Accel {
    fn ring_iova(&self) -> u64 {
        self.lock().memory.iova(0)
    }

    fn attempt(&self, command: Command) -> Result<(), Trouble> {
        self.lock().attempt(&self.registers, command)
    }
}

/// Out, wiped, back: the bytes are the same.
fn round_trip(copies: &mut AccelCopies, staging: &Staging) {
    let text: Vec<u8> = (0..u64::from(PAGES) * PAGE_BYTES).map(|n| (n * 31 % 253) as u8).collect();
    let frames = Frames { first: 5, count: PAGES };
    staging.window.write(0, &text).unwrap();
    copies.copy_in(staging, 0, frames).unwrap();
    staging.window.fill(0, staging.window.len(), 0).unwrap();
    copies.copy_out(frames, staging, 0).unwrap();
    assert!(staging.window.compare(0, &text).unwrap());
}

#[test]
fn every_fault_ends_in_a_restart_of_the_engine_and_the_right_bytes() {
    for fault in ["command-error", "drop-completion", "stuck-queue", "corrupt-id", "stray-dma"] {
        for at in 1..=2 {
            let machine = machine(&[format!("{fault}@{at}").as_str()]);
            let accel = open(&machine);
            let (mut copies, staging) = (AccelCopies::new(accel.clone()), staging());
            copies.attach(&staging).unwrap();
            round_trip(&mut copies, &staging);
            assert_eq!(accel.restarts(), 1, "{fault}@{at}");
            assert_eq!(machine.dma_fault_count(), u64::from(fault == "stray-dma"));
            round_trip(&mut copies, &staging);
        }
    }
}

#[test]
fn what_fails_twice_is_an_error_and_the_next_command_works() {
    let machine = machine(&["command-error@1", "command-error@2"]);
    let accel = open(&machine);
    let (mut copies, staging) = (AccelCopies::new(accel), staging());
    copies.attach(&staging).unwrap();
    let error = copies.scrub(Frames { first: 0, count: 1 }).unwrap_err().to_string();
    assert!(error.contains("failed twice") && error.contains("status 4"), "{error}");
    round_trip(&mut copies, &staging);
}

#[test]
fn a_device_that_is_gone_is_an_error_at_once() {
    let machine = machine(&["removal@2"]);
    let accel = open(&machine);
    let (mut copies, staging) = (AccelCopies::new(accel), staging());
    copies.attach(&staging).unwrap();
    copies.copy_in(&staging, 0, Frames { first: 0, count: 1 }).unwrap();
    let begin = Instant::now();
    assert!(copies.copy_in(&staging, 0, Frames { first: 0, count: 1 }).is_err());
    assert!(copies.copy_in(&staging, 0, Frames { first: 0, count: 1 }).is_err());
    assert!(begin.elapsed() < 4 * ATTEMPT_LIMIT);
}

#[test]
fn the_device_reaches_staging_areas_as_long_as_they_are_attached() {
    let machine = machine(&[]);
    let accel = open(&machine);
    let (mut copies, staging) = (AccelCopies::new(accel.clone()), staging());
    assert!(copies.copy_in(&staging, 0, Frames { first: 0, count: 1 }).is_err(), "it was not attached");
    copies.attach(&staging).unwrap();
    round_trip(&mut copies, &staging);
    drop(copies);
    // Whatever the device is told now: nothing but the ring is within its reach.
    for iova in (1..2 * u64::from(PAGES)).map(|page| page * PAGE_BYTES).filter(|iova| *iova != accel.ring_iova()) {
        let (before, outcome) =
            (machine.dma_fault_count(), accel.attempt(Command::CopyOut { iova, offset: 0, len: 64 }));
        assert!(matches!(outcome, Err(Trouble::Status(2))), "{iova:#x}: {outcome:?}");
        assert_eq!(machine.dma_fault_count(), before + 1);
    }
}

#[test]
fn memory_is_adopted_by_its_mark_and_a_new_device_begins_with_zeroes() {
    let machine = machine(&[]);
    let frames = Frames { first: 7, count: 1 };
    let staging = staging();
    let kept = {
        let accel = open(&machine);
        let watch = accel.device().watch_removal(|_| {}).unwrap();
        let (memory, origin) = AccelMemory::open(accel.clone(), &[], u64::MAX, watch).unwrap();
        assert_eq!((origin, u64::from(memory.frame_count())), (MemoryOrigin::Created, MEMORY / PAGE_BYTES - 1));
        let mut copies = AccelCopies::new(accel);
        copies.attach(&staging).unwrap();
        staging.window.fill(0, PAGE_BYTES, 0x77).unwrap();
        copies.copy_in(&staging, 0, frames).unwrap();
        memory.kept()
    };
    let other = self::machine(&[]);
    for (machine, expected, byte) in [(&machine, MemoryOrigin::Adopted, 0x77), (&other, MemoryOrigin::Created, 0)] {
        let accel = open(machine);
        let watch = accel.device().watch_removal(|_| {}).unwrap();
        let (_memory, origin) = AccelMemory::open(accel.clone(), &kept, u64::MAX, watch).unwrap();
        assert_eq!(origin, expected);
        let mut copies = AccelCopies::new(accel);
        copies.attach(&staging).unwrap();
        staging.window.fill(0, PAGE_BYTES, 1).unwrap();
        copies.copy_out(frames, &staging, 0).unwrap();
        assert!(staging.window.compare(0, &[byte; PAGE_BYTES as usize]).unwrap());
    }
}
