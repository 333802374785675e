//! BARs, config space, interrupts, DMA, reset.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use uhmm_driver_edu::hardware::{DMA_LIMIT, Direction, Edu, EduError};
use uhmm_kernel_hook::vfio::{Irq, VfioDevice};
use uhmm_pci::{DmaMemory, DmaRight, InterruptKind, IovaRange, PciBackend, PciError, RegionIndex, VfioBackend};

use crate::common::{EDU, IVSHMEM, NVME, address, all, fill_buffer, iommufd, kept_names, open, page};

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn the_device_is_opened_by_the_interface_that_this_guest_was_started_with() {
    let names = kept_names(&open(EDU));
    match iommufd() {
        true => assert_eq!(names, ["driver/pci-ioas", "driver/pci-iommufd", "driver/pci-cdev"]),
        false => assert_eq!(names, ["driver/pci-container", "driver/pci-device"]),
    }
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn registers_are_the_same_by_window_and_by_call_and_end_where_the_device_says() {
    let backend = VfioBackend::open(address(EDU), &[]).unwrap();
    let (bar, config) = (RegionIndex::Bar(0), RegionIndex::Config);
    let mut ident = [0; 4];
    backend.read(bar, 0, &mut ident).unwrap();
    assert_eq!(u32::from_le_bytes(ident), 0x0100_00ed);
    backend.write(bar, 4, &0x1234_5678u32.to_le_bytes()).unwrap();
    let mut inverted = [0; 4];
    backend.read(bar, 4, &mut inverted).unwrap();
    assert_eq!(u32::from_le_bytes(inverted), !0x1234_5678);
    let mut header = [0; 64];
    backend.read(config, 0, &mut header).unwrap();
    assert_eq!(header[..4], [0x34, 0x12, 0xe8, 0x11]);
    let end = backend.region(bar).unwrap().len_bytes;
    assert_eq!(end, 1 << 20);
    assert!(matches!(backend.read(bar, end - 2, &mut [0; 4]), Err(PciError::OutOfRegion { .. })));
    assert!(matches!(backend.read(RegionIndex::Bar(3), 0, &mut [0; 4]), Err(PciError::OutOfRegion { .. })));
    assert!(matches!(backend.write(bar, u64::MAX, &[0; 4]), Err(PciError::OutOfRegion { .. })));
    assert!(!backend.is_adopted());

    drop(backend);
    let device = open(EDU);
    assert_eq!(device.id().unwrap(), (0x1234, 0x11e8));
    let bar = device.bar(0).unwrap();
    assert!(bar.window().is_some(), "a BAR of whole pages can be mapped");
    assert_eq!(bar.load_u32(0).unwrap(), 0x0100_00ed);
    bar.store_u32(4, 7).unwrap();
    assert_eq!(bar.load_u32(4).unwrap(), !7);
    assert!(device.bar(5).is_err());
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn memory_behind_a_bar_keeps_bytes_for_whoever_maps_it() {
    let device = open(IVSHMEM);
    let bar = device.bar(2).unwrap();
    let window = bar.window().unwrap();
    window.write(4096, b"plain memory").unwrap();
    let (fd, offset) = bar.mappable().unwrap();
    let again =
        uhmm_kernel_hook::Window::map(fd.as_fd(), offset + 4096, 4096, uhmm_kernel_hook::Prot::ReadOnly).unwrap();
    assert!(again.compare(0, b"plain memory").unwrap());
    assert_eq!(bar.len_bytes(), 64 << 20);
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn interrupts_arrive_on_an_eventfd_and_stop_when_they_are_switched_off() {
    let device = open(EDU);
    assert_eq!(device.interrupt_count(InterruptKind::Msi), 1);
    assert_eq!(device.interrupt_count(InterruptKind::Msix), 0);
    let events = device.interrupts(InterruptKind::Msi, 1).unwrap();
    let bar = device.bar(0).unwrap();
    let fired = |limit: Duration| {
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        poll(&mut [PollFd::new(&events[0], PollFlags::IN)], Some(&limit)).unwrap() == 1
    };
    for _ in 0..3 {
        bar.store_u32(0x60, 1).unwrap();
        assert!(fired(Duration::from_secs(10)));
        assert_eq!(events[0].drain().unwrap(), 1);
        bar.store_u32(0x64, 1).unwrap();
    }
    device.set_interrupts(InterruptKind::Msi, &[]).unwrap();
    bar.store_u32(0x60, 1).unwrap();
    assert!(!fired(Duration::from_millis(200)));
    bar.store_u32(0x64, 1).unwrap();
    let two = device.interrupts(InterruptKind::Msi, 2);
    assert!(matches!(two, Err(PciError::Interrupts { .. })), "it has one vector");
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn every_vector_of_an_msix_table_can_be_routed_and_the_number_changed() {
    let device = open(NVME);
    let count = device.interrupt_count(InterruptKind::Msix);
    assert!(count > 8, "{count} vectors");
    for wanted in [1, 8, count as usize, 3] {
        assert_eq!(device.interrupts(InterruptKind::Msix, wanted).unwrap().len(), wanted);
    }
    device.set_interrupts(InterruptKind::Msix, &[]).unwrap();
}

/// Hot-unplug: the kernel asks on this eventfd; here it is made to ask.
#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn the_kernels_request_for_the_device_and_its_errors_arrive() {
    let backend = VfioBackend::open(address(NVME), &[]).unwrap();
    let kept = backend.kept();
    let (_, fd) = kept.iter().find(|(name, _)| name.ends_with("pci-device") || name.ends_with("pci-cdev")).unwrap();
    let raw = VfioDevice::new(fd.clone()).unwrap();
    for (kind, irq) in [(InterruptKind::Request, Irq::Request), (InterruptKind::Error, Irq::Error)] {
        assert_eq!(backend.interrupt_count(kind), 1, "{kind:?}");
        let event = uhmm_kernel_hook::EventFd::new().unwrap();
        backend.set_interrupts(kind, &[event.try_clone().unwrap()]).unwrap();
        assert_eq!(event.drain().unwrap(), 0);
        raw.trigger_irq(irq).unwrap();
        assert_eq!(event.drain().unwrap(), 1, "{kind:?}");
        backend.set_interrupts(kind, &[]).unwrap();
        assert!(raw.trigger_irq(irq).is_err(), "nobody listens any more");
    }
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn dma_brings_bytes_to_the_device_and_back() {
    let device = open(EDU);
    let edu = Edu::new(&device).unwrap();
    assert_eq!(edu.factorial(10).unwrap(), 3_628_800);
    let (source, target) = (page(&device, 0), page(&device, 0));
    let bytes: Vec<u8> = (0..2048u32).map(|n| (n * 7 % 251) as u8).collect();
    source.window().write(0, &bytes).unwrap();
    edu.transfer(Direction::FromMemory, source.iova(0), 0, 2048).unwrap();
    edu.transfer(Direction::ToMemory, target.iova(1024), 0, 2048).unwrap();
    assert!(target.window().compare(1024, &bytes).unwrap());
    assert!(all(target.memory(), 0..1024, 0) && all(target.memory(), 3072..4096, 0));
    // The second half too, but for its last byte.
    edu.transfer(Direction::FromMemory, source.iova(0), 2048, 2047).unwrap();
    edu.transfer(Direction::ToMemory, target.iova(0), 2048, 2047).unwrap();
    assert!(target.window().compare(0, &bytes[..2047]).unwrap());
    for (iova, offset, len) in [(DMA_LIMIT - 1, 0, 2), (4096, 0, 4096), (4096, 4095, 1), (4096, 0, 0)] {
        let refused = edu.start(Direction::ToMemory, iova, offset, len);
        assert!(matches!(refused, Err(EduError::Transfer { .. })));
    }
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn bus_addresses_respect_device_and_platform() {
    let device = open(EDU);
    let memory = DmaMemory::create("guest-test", 1 << 20).unwrap();
    let low = device.map_dma(&memory, DmaRight::ReadWrite, DMA_LIMIT).unwrap();
    assert!(low.iova(memory.len_bytes()) <= DMA_LIMIT);
    let limit = low.iova(0) + memory.len_bytes();
    assert!(matches!(device.map_dma(&memory, DmaRight::Read, limit), Err(PciError::NoIova { .. })));
    assert!(matches!(device.map_dma_at(low.iova(4096), &memory, DmaRight::Read), Err(PciError::IovaTaken { .. })));
    // x86 keeps this megabyte for interrupts.
    assert!(matches!(device.map_dma_at(0xfee0_0000, &memory, DmaRight::Read), Err(PciError::IovaTaken { .. })));
    let identity = memory.window.addr();
    let mapped = device.map_dma_at(identity, &memory, DmaRight::Read).unwrap();
    assert_eq!(mapped.iova(0), identity, "IOVA = virtual address");
    drop(low);
    let again = device.map_dma(&memory, DmaRight::ReadWrite, DMA_LIMIT).unwrap();
    assert!(again.iova(0) < limit, "a mapping that is dropped gives its addresses back");
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn the_kernel_says_which_addresses_it_reserves() {
    let backend = VfioBackend::open(address(EDU), &[]).unwrap();
    let ranges = backend.iova_ranges();
    let holds = |iova| ranges.iter().any(|range: &IovaRange| range.start <= iova && iova < range.end);
    assert!(holds(0x1000) && holds(0xfedf_f000) && !holds(0xfee0_0000) && holds(0xfef0_0000), "{ranges:x?}");
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn a_reset_gives_first_values_and_a_device_without_one_says_so() {
    let nvme = open(NVME);
    let bar = nvme.bar(0).unwrap();
    let (configuration, status, queue_sizes) = (0x14, 0x1c, 0x24);
    let queues = DmaMemory::create("guest-test", 8192).unwrap();
    let queues = nvme.map_dma(&queues, DmaRight::ReadWrite, u64::MAX).unwrap();
    bar.store_u32(queue_sizes, 0x001f_001f).unwrap();
    bar.store_u64(0x28, queues.iova(0)).unwrap();
    bar.store_u64(0x30, queues.iova(4096)).unwrap();
    bar.store_u32(configuration, 0x0046_0001).unwrap();
    assert_eq!(bar.load_u32(status).unwrap() & 1, 1, "the controller is ready");
    nvme.reset().unwrap();
    assert_eq!((bar.load_u32(configuration).unwrap(), bar.load_u32(status).unwrap() & 1), (0, 0));
    let error = open(EDU).reset().unwrap_err();
    assert!(matches!(error, PciError::Unsupported { .. }), "{error}");
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn a_device_that_was_let_go_can_be_opened_again() {
    for byte in 1..=3 {
        let device = open(EDU);
        let edu = Edu::new(&device).unwrap();
        fill_buffer(&device, &edu, byte);
        assert!(!device.is_adopted());
    }
}
