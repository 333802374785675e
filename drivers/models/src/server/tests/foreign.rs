//! The crate `vfio_user` as the other end: what is spoken here is what others speak.

use std::fs::File;
use std::io::{self, ErrorKind, Seek, Write};
use std::os::fd::AsRawFd;

use uhmm_kernel_hook::PAGE_SIZE;
use vfio_bindings::bindings::vfio::vfio_region_info;
use vfio_user::{Client, DmaMapFlags, DmaUnmapFlags, IrqInfo, ServerBackend, ServerRegion};

use super::*;

#[test]
fn the_crates_client_drives_our_server() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device.sock");
    let machine = Machine::start(Copier::boxed()).unwrap();
    let server = Server::bind(&path, machine.clone()).unwrap();
    std::thread::spawn(move || server.run());
    let mut client = Client::new(&path).unwrap();
    client.region_write(7, 4, &[6, 0]).unwrap();
    let region = client.region(2).unwrap();
    assert_eq!((region.size, region.sparse_areas.len()), (0x10000, 1));
    assert!(region.file_offset.is_some());
    assert_eq!(client.get_irq_info(2).unwrap().count, 2);
    let memory = DmaMemory::create("uhmm-test", 0x1000).unwrap();
    memory.window.store_u64(0, 77).unwrap();
    client.dma_map(0, 0x8000, 0x1000, memory.fd.as_raw_fd()).unwrap();
    let events = events();
    let fds = [events[0].as_fd().as_raw_fd(), events[1].as_fd().as_raw_fd()];
    client.set_irqs(2, flag::IRQ_DATA_EVENTFD | flag::IRQ_ACTION_TRIGGER, 0, 2, &fds).unwrap();
    for (register, value) in [0x8000u64, 0x8008, 1].iter().enumerate() {
        client.region_write(0, 8 * register as u64, &value.to_le_bytes()).unwrap();
    }
    wait(&events[1]);
    assert_eq!(memory.window.load_u64(8).unwrap(), 77);
    client.dma_unmap(0x8000, 0x1000).unwrap();
    client.reset().unwrap();
    let mut bytes = [0; 8];
    client.region_write(7, 4, &[6, 0]).unwrap();
    client.region_read(0, SOURCE, &mut bytes).unwrap();
    assert_eq!((bytes, machine.dma_fault_count()), ([0; 8], 0));
}

/// A device behind the crate's server: config space and a BAR that stores.
struct Store {
    config: [u8; 256],
    bar: [u8; 4096],
    mapped: Vec<(u64, u64)>,
}

impl ServerBackend for Store {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let from = if region == 7 { &self.config[..] } else { &self.bar[..] };
        data.copy_from_slice(&from[offset as usize..][..data.len()]);
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        if region == 0 && offset == 0x800 {
            return Err(io::Error::other("for reading only"));
        }
        let to = if region == 7 { &mut self.config[..] } else { &mut self.bar[..] };
        to[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn dma_map(&mut self, _: DmaMapFlags, _: u64, address: u64, size: u64, fd: Option<File>) -> io::Result<()> {
        if size > PAGE_SIZE {
            return Err(ErrorKind::OutOfMemory.into());
        }
        // The driver sees the device's mark in its memory.
        let mut file = fd.ok_or(ErrorKind::InvalidInput)?;
        file.rewind()?;
        file.write_all(b"mark")?;
        self.mapped.push((address, size));
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        let before = self.mapped.len();
        self.mapped.retain(|mapped| *mapped != (address, size));
        if self.mapped.len() < before { Ok(()) } else { Err(ErrorKind::NotFound.into()) }
    }

    fn reset(&mut self) -> io::Result<()> {
        self.bar = [0; 4096];
        Ok(())
    }

    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, fds: Vec<File>) -> io::Result<()> {
        // The crate's server says that it takes one descriptor a message.
        if fds.len() > 1 { Err(ErrorKind::InvalidInput.into()) } else { Ok(()) }
    }
}

fn store_regions() -> Vec<ServerRegion> {
    let region = |index| {
        let size = match index {
            0 => 4096,
            7 => 256,
            _ => 0,
        };
        let argsz = wire::REGION_INFO_BYTES as u32;
        let region_info = vfio_region_info { argsz, index, size, flags: 3, ..Default::default() };
        ServerRegion { region_info, sparse_areas: Vec::new(), mmap_fd: None }
    };
    (0..9).map(region).collect()
}

#[test]
fn our_client_drives_the_crates_server_and_takes_its_refusals() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device.sock");
    let irqs = (0..5).map(|index| IrqInfo { index, flags: 1, count: if index == 2 { 4 } else { 0 } }).collect();
    let server = vfio_user::Server::new(&path, true, irqs, store_regions()).unwrap();
    let thread = std::thread::spawn(move || {
        let mut store = Store { config: [0x34; 256], bar: [0; 4096], mapped: Vec::new() };
        store.config[4..6].fill(0);
        server.run(&mut store).map(|()| store.mapped)
    });
    let device = PciDevice::new(Arc::new(VfioUserBackend::open(&path).unwrap())).unwrap();
    assert_eq!((device.id().unwrap(), device.config_u16(4).unwrap()), ((0x3434, 0x3434), 6));
    let bar = device.bar(0).unwrap();
    bar.store_u64(8, 0x1234).unwrap();
    assert_eq!(bar.load_u64(8).unwrap(), 0x1234);
    let memory = DmaMemory::create("uhmm-test", PAGE_SIZE).unwrap();
    let mapping = device.map_dma(&memory, DmaRight::ReadWrite, u64::MAX).unwrap();
    assert!(memory.window.compare(0, b"mark").unwrap());
    let big = DmaMemory::create("uhmm-test", 2 * PAGE_SIZE).unwrap();
    assert!(matches!(device.map_dma(&big, DmaRight::ReadWrite, u64::MAX), Err(PciError::Map { .. })));
    drop(mapping);
    assert!(matches!(bar.store_u32(0x800, 1), Err(PciError::Access { .. })));
    assert_eq!(bar.load_u64(8).unwrap(), 0x1234, "a refusal must not shift the stream");
    let four: Vec<_> = (0..4).map(|_| EventFd::new().unwrap()).collect();
    device.set_interrupts(InterruptKind::Msix, &four).unwrap();
    device.reset().unwrap();
    assert_eq!(bar.load_u64(8).unwrap(), 0);
    drop((bar, device));
    assert_eq!(thread.join().unwrap().unwrap(), []);
}
