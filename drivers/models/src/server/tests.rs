//! Both ends of the protocol against each other; against the crate `vfio_user` ([`foreign`]) and peers that mean harm ([`hostile`]).

use std::time::Instant;

use uhmm_pci::{DmaMemory, PciBackend, PciDevice, PciError, VfioUserBackend};

use super::*;
use crate::testing::{Copier, FAULTS, SOURCE, go, wait};

mod foreign;
mod hostile;

const LIMIT: Duration = Duration::from_secs(10);

/// A connection whose server ends with its peer.
fn connect(machine: &Machine) -> Stream {
    let (ours, theirs) = Stream::pair().unwrap();
    let machine = machine.clone();
    std::thread::spawn(move || serve(&machine, &theirs));
    ours
}

fn open(machine: &Machine, limit: Duration) -> PciDevice {
    // The server of an earlier connection may still be closing it.
    let deadline = Instant::now() + LIMIT;
    loop {
        match VfioUserBackend::from_stream(connect(machine), "test".into(), limit) {
            Ok(backend) => return PciDevice::new(Arc::new(backend)).unwrap(),
            Err(error) if Instant::now() > deadline => panic!("{error:?}"),
            Err(_) => std::thread::yield_now(),
        }
    }
}

fn events() -> [EventFd; 2] {
    [EventFd::new().unwrap(), EventFd::new().unwrap()]
}

#[test]
fn a_driver_in_another_process_does_what_one_in_this_process_does() {
    let machine = Machine::start(Copier::boxed()).unwrap();
    let device = open(&machine, LIMIT);
    assert!(!device.is_adopted());
    assert_eq!(device.id().unwrap(), (0x1234, 1));
    assert_eq!(device.interrupt_count(InterruptKind::Msix), 2);
    let events = events();
    device.set_interrupts(InterruptKind::Msix, &events).unwrap();
    let memory = DmaMemory::create("uhmm-test", 0x4000).unwrap();
    let mapping = device.map_dma(&memory, DmaRight::ReadWrite, u64::MAX).unwrap();
    memory.window.store_u64(0x10, 0x1122_3344_5566_7788).unwrap();
    go(&device, &events[1], mapping.iova(0x10), mapping.iova(0x3ff8));
    assert_eq!(memory.window.load_u64(0x3ff8).unwrap(), 0x1122_3344_5566_7788);
    let bar = device.bar(2).unwrap();
    bar.store_u64(8, 5).unwrap();
    assert!(bar.window().is_some());
    let mut by_call = [0; 8];
    machine.read(RegionIndex::Bar(2), 8, &mut by_call).unwrap();
    assert_eq!(u64::from_le_bytes(by_call), 5);

    // To what was only for reading, to what was never granted, and to what was taken back.
    let only_read = device.map_dma(&memory, DmaRight::Read, u64::MAX).unwrap();
    go(&device, &events[1], mapping.iova(0x10), only_read.iova(0x20));
    go(&device, &events[1], mapping.iova(0x10), 1 << 40);
    let (source, target) = (only_read.iova(0x10), mapping.iova(0x20));
    drop(mapping);
    go(&device, &events[1], source, target);
    assert_eq!(memory.window.load_u64(0x20).unwrap(), 0);
    assert_eq!((machine.dma_fault_count(), device.bar(0).unwrap().load_u64(FAULTS).unwrap()), (3, 3));
    assert!(matches!(device.map_dma_at(only_read.iova(0), &memory, DmaRight::Read), Err(PciError::IovaTaken { .. })));
}

#[test]
fn a_driver_that_comes_back_finds_the_device_as_it_was_and_nothing_of_its_mappings() {
    let machine = Machine::start(Copier::boxed()).unwrap();
    let memory = DmaMemory::create("uhmm-test", 0x1000).unwrap();
    let backend = VfioUserBackend::from_stream(connect(&machine), "test".into(), LIMIT).unwrap();
    // What a kill leaves behind: mapped memory, and a socket that closes without good-bye.
    backend.dma_map(0x10000, &memory, DmaRight::ReadWrite).unwrap();
    let first = PciDevice::new(Arc::new(backend)).unwrap();
    first.bar(0).unwrap().store_u64(SOURCE, 0x10000).unwrap();
    first.bar(2).unwrap().store_u64(0, 42).unwrap();
    drop(first);

    let second = open(&machine, LIMIT);
    assert!(second.is_adopted());
    assert_eq!(second.bar(0).unwrap().load_u64(SOURCE).unwrap(), 0x10000);
    assert_eq!(second.bar(2).unwrap().load_u64(0).unwrap(), 42);
    let events = events();
    second.set_interrupts(InterruptKind::Msix, &events).unwrap();
    second.allow_dma().unwrap();
    go(&second, &events[1], 0x10000, 0x10008);
    assert_eq!(machine.dma_fault_count(), 1, "a mapping outlived its connection");
    let _mapping = second.map_dma_at(0x10000, &memory, DmaRight::ReadWrite).unwrap();
    go(&second, &events[1], 0x10000, 0x10008);
    assert_eq!(machine.dma_fault_count(), 1);
    second.reset().unwrap();
    assert_eq!(second.bar(0).unwrap().load_u64(SOURCE).unwrap(), 0);
}

#[test]
fn a_removed_device_is_told_and_every_call_is_an_error() {
    let machine = Machine::start(Copier::boxed()).unwrap();
    let device = open(&machine, LIMIT);
    let memory = DmaMemory::create("uhmm-test", 0x1000).unwrap();
    let mapping = device.map_dma(&memory, DmaRight::ReadWrite, u64::MAX).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let _watch = device.watch_removal(move |text| tell.send(text).unwrap()).unwrap();
    machine.remove();
    assert!(told.recv().unwrap().contains("taken away"));
    assert!(matches!(device.id(), Err(PciError::Gone { .. })));
    assert!(matches!(device.reset(), Err(PciError::Gone { .. })));
    drop(mapping);
}

#[test]
fn a_process_that_ends_is_noticed_without_an_access_and_then_reaches_nothing() {
    let machine = Machine::start(Copier::boxed()).unwrap();
    let (ours, theirs) = Stream::pair().unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(&machine, &theirs));
        let backend = VfioUserBackend::from_stream(ours, "test".into(), LIMIT).unwrap();
        let memory = DmaMemory::create("uhmm-test", 0x1000).unwrap();
        backend.dma_map(0x1000, &memory, DmaRight::Read).unwrap();
        let ends = [EventFd::new().unwrap()];
        backend.set_interrupts(InterruptKind::Error, &ends).unwrap();
        theirs.shutdown().unwrap();
        wait(&ends[0]);
        assert!(matches!(server.join().unwrap(), Ok(WireError::Closed)));
        assert!(backend.dma_unmap(0x1000, 0x1000).is_ok());
        assert!(matches!(backend.dma_map(0x1000, &memory, DmaRight::Read), Err(PciError::Gone { .. })));
    });
}

#[test]
fn refusals_are_errors_and_the_connection_goes_on() {
    let machine = Machine::start(Copier::boxed()).unwrap();
    let backend = VfioUserBackend::from_stream(connect(&machine), "test".into(), LIMIT).unwrap();
    let bar = RegionIndex::Bar(0);
    assert!(matches!(backend.read(bar, 1, &mut [0; 4]), Err(PciError::Access { .. })));
    assert!(matches!(backend.write(bar, 4094, &[0; 4]), Err(PciError::OutOfRegion { .. })));
    let memory = DmaMemory::create("uhmm-test", 0x2000).unwrap();
    backend.dma_map(0x1000, &memory, DmaRight::Read).unwrap();
    assert!(matches!(backend.dma_map(0x2000, &memory, DmaRight::Read), Err(PciError::Map { .. })));
    assert!(matches!(backend.dma_unmap(0x2000, 0x1000), Err(PciError::Map { .. })));
    let [one, two] = events();
    let three = [one, two, EventFd::new().unwrap()];
    assert!(backend.set_interrupts(InterruptKind::Msix, &three).is_err());
    backend.dma_unmap(0x1000, 0x2000).unwrap();
    let mut id = [0; 2];
    backend.read(RegionIndex::Config, 0, &mut id).unwrap();
    assert_eq!(u16::from_le_bytes(id), 0x1234);
}
