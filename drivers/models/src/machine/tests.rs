//! A small device against the whole way: `PciDevice`, backend, machine, model.

use std::sync::Arc;

use uhmm_pci::{DmaMemory, PciBackend, PciDevice, PciError};

use super::*;
use crate::local::ModelBackend;
use crate::testing::{Copier, FAULTS, GO, SOURCE, TARGET, go, wait};

fn open(machine: &Machine) -> PciDevice {
    PciDevice::new(Arc::new(ModelBackend::connect(machine).unwrap())).unwrap()
}

#[test]
fn a_driver_drives_a_model_through_registers_dma_and_interrupts() {
    let machine = Machine::start(Copier::boxed()).unwrap();
    let device = open(&machine);
    assert!(!device.is_adopted());
    assert_eq!(device.id().unwrap(), (0x1234, 1));
    let events = [EventFd::new().unwrap(), EventFd::new().unwrap()];
    device.set_interrupts(InterruptKind::Msix, &events).unwrap();
    let memory = DmaMemory::create("uhmm-test", 0x4000).unwrap();
    let mapping = device.map_dma(&memory, DmaRight::ReadWrite, u64::MAX).unwrap();
    memory.window.store_u64(0x10, 0x1122_3344_5566_7788).unwrap();
    go(&device, &events[1], mapping.iova(0x10), mapping.iova(0x3ff8));
    assert_eq!(memory.window.load_u64(0x3ff8).unwrap(), 0x1122_3344_5566_7788);
    assert_eq!(events[0].drain().unwrap(), 0);
    let aperture = device.bar(2).unwrap();
    aperture.store_u32(0xfffc, 77).unwrap();
    assert!(aperture.window().is_some());
    assert_eq!(machine.dma_fault_count(), 0);
}

#[test]
fn dma_to_what_was_not_granted_or_was_taken_back_is_refused() {
    let machine = Machine::start(Copier::boxed()).unwrap();
    let device = open(&machine);
    let events = [EventFd::new().unwrap(), EventFd::new().unwrap()];
    device.set_interrupts(InterruptKind::Msix, &events).unwrap();
    let memory = DmaMemory::create("uhmm-test", 0x2000).unwrap();
    let mapping = device.map_dma(&memory, DmaRight::ReadWrite, u64::MAX).unwrap();
    let only_read = device.map_dma(&memory, DmaRight::Read, u64::MAX).unwrap();
    memory.window.store_u64(0, 5).unwrap();
    go(&device, &events[1], mapping.iova(0), only_read.iova(8));
    go(&device, &events[1], mapping.iova(0), mapping.iova(0x2000) + (1 << 30));
    let (source, target) = (only_read.iova(0), mapping.iova(8));
    drop(mapping);
    go(&device, &events[1], source, target);
    assert_eq!(memory.window.load_u64(8).unwrap(), 0);
    assert_eq!((machine.dma_fault_count(), device.bar(0).unwrap().load_u64(FAULTS).unwrap()), (3, 3));
}

#[test]
fn work_in_flight_waits_for_the_next_driver_and_its_mappings() {
    let machine = Machine::start(Copier::boxed()).unwrap();
    let memory = DmaMemory::create("uhmm-test", 0x1000).unwrap();
    memory.window.store_u64(0, 99).unwrap();
    let first = open(&machine);
    let bar = first.bar(0).unwrap();
    let mapping = first.map_dma_at(0x10000, &memory, DmaRight::ReadWrite).unwrap();
    // Stopped between request and work, as the death of a driver may hit it.
    first.write_config_u16(4, COMMAND_MEMORY).unwrap();
    bar.store_u64(SOURCE, 0x10000).unwrap();
    bar.store_u64(TARGET, 0x10008).unwrap();
    bar.store_u64(GO, 1).unwrap();
    assert!(matches!(ModelBackend::connect(&machine), Err(MachineError::Busy)));
    drop((mapping, bar, first));

    let second = open(&machine);
    assert!(second.is_adopted());
    assert_eq!(second.bar(0).unwrap().load_u64(SOURCE).unwrap(), 0x10000);
    let events = [EventFd::new().unwrap(), EventFd::new().unwrap()];
    second.set_interrupts(InterruptKind::Msix, &events).unwrap();
    let _mapping = second.map_dma_at(0x10000, &memory, DmaRight::ReadWrite).unwrap();
    second.allow_dma().unwrap();
    wait(&events[1]);
    assert_eq!((memory.window.load_u64(8).unwrap(), machine.dma_fault_count()), (99, 0));

    second.reset().unwrap();
    assert_eq!(second.bar(0).unwrap().load_u64(SOURCE).unwrap(), 0);
}

#[test]
fn a_device_that_is_pulled_out_says_so_and_answers_errors() {
    let machine = Machine::start(Copier::boxed()).unwrap();
    let device = open(&machine);
    let memory = DmaMemory::create("uhmm-test", 0x1000).unwrap();
    let mapping = device.map_dma(&memory, DmaRight::ReadWrite, u64::MAX).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let watch = device.watch_removal(move |text| tell.send(text).unwrap()).unwrap();
    machine.remove();
    assert!(told.recv().unwrap().contains("taken away"));
    drop(watch);
    assert!(matches!(device.id(), Err(PciError::Gone { .. })));
    assert!(matches!(device.reset(), Err(PciError::Gone { .. })));
    assert!(device.map_dma(&memory, DmaRight::Read, u64::MAX).is_err());
    drop(mapping);
}

#[test]
fn accesses_that_no_device_answers_are_errors() {
    let backend = ModelBackend::start(Copier::boxed()).unwrap();
    let bar = RegionIndex::Bar(0);
    for (region, offset, len) in [(bar, 4096, 4), (bar, 2, 4), (bar, 0, 3), (bar, 0, 0), (bar, u64::MAX, 8)] {
        assert!(backend.read(region, offset, &mut vec![0; len]).is_err(), "{offset} {len}");
        assert!(backend.write(region, offset, &vec![0; len]).is_err(), "{offset} {len}");
    }
    assert!(backend.read(RegionIndex::Bar(1), 0, &mut [0; 4]).is_err());
    assert!(backend.read(RegionIndex::Config, 254, &mut [0; 4]).is_err());
    let mut off = [0; 4];
    backend.read(bar, 0, &mut off).unwrap();
    assert_eq!(off, [0xff; 4], "memory is not switched on");
    let three = [EventFd::new().unwrap(), EventFd::new().unwrap(), EventFd::new().unwrap()];
    assert!(backend.set_interrupts(InterruptKind::Msix, &three).is_err());
}
