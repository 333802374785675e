//! The device reaches what was granted and nothing else. The device is told nothing: what counts is what memory holds.

use uhmm_driver_edu::hardware::{DMA_LIMIT, Direction, Edu};
use uhmm_pci::{DmaMemory, DmaRight};

use crate::common::{EDU, all, fill_buffer, open, page};

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn dma_to_memory_that_was_unmapped_is_blocked_and_changes_nothing() {
    let device = open(EDU);
    let edu = Edu::new(&device).unwrap();
    fill_buffer(&device, &edu, 0xaa);
    let neighbour = page(&device, 0x11);
    let granted = page(&device, 0x22);
    let (iova, memory) = (granted.iova(0), granted.memory().clone());
    edu.transfer(Direction::ToMemory, iova, 0, 1024).unwrap();
    assert!(all(&memory, 0..1024, 0xaa), "while it is granted, the device writes it");

    // The page changes its owner: first the grant ends, then somebody else writes there.
    drop(granted);
    memory.window.fill(0, 4096, 0x33).unwrap();
    edu.transfer(Direction::ToMemory, iova, 0, 2048).unwrap();
    assert!(all(&memory, 0..4096, 0x33), "blocked");
    assert!(all(neighbour.memory(), 0..4096, 0x11));

    // Nor does it read there: the buffer keeps what it had.
    edu.transfer(Direction::FromMemory, iova, 0, 2048).unwrap();
    edu.transfer(Direction::ToMemory, neighbour.iova(0), 0, 2048).unwrap();
    assert!(!neighbour.window().compare(0, &[0x33; 16]).unwrap(), "nothing of the new owner came out");

    let granted = device.map_dma_at(iova, &memory, DmaRight::ReadWrite).unwrap();
    fill_buffer(&device, &edu, 0xbb);
    edu.transfer(Direction::ToMemory, granted.iova(0), 0, 2048).unwrap();
    assert!(all(&memory, 0..2048, 0xbb), "granted again, the device writes again");
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn dma_to_addresses_that_never_were_mapped_is_blocked() {
    let device = open(EDU);
    let edu = Edu::new(&device).unwrap();
    fill_buffer(&device, &edu, 0xcc);
    let pages: Vec<_> = (0..4).map(|n| page(&device, n)).collect();
    // Behind the last mapping, the guest's first megabyte (where its kernel has tables), the top of what edu can say.
    let behind = pages.iter().map(|page| page.iova(4096)).max().unwrap();
    for iova in [behind, 1 << 20, DMA_LIMIT - 4096] {
        edu.transfer(Direction::ToMemory, iova, 0, 2048).unwrap();
    }
    for (byte, page) in pages.iter().enumerate() {
        assert!(all(page.memory(), 0..4096, byte as u8));
    }
    edu.transfer(Direction::ToMemory, pages[2].iova(0), 0, 2048).unwrap();
    assert!(all(pages[2].memory(), 0..2048, 0xcc), "the device was not hurt by being blocked");
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn memory_that_was_granted_for_reading_is_not_written() {
    let device = open(EDU);
    let edu = Edu::new(&device).unwrap();
    let memory = DmaMemory::create("guest-test", 4096).unwrap();
    memory.window.fill(0, 4096, 0x44).unwrap();
    let granted = device.map_dma(&memory, DmaRight::Read, DMA_LIMIT).unwrap();
    fill_buffer(&device, &edu, 0xdd);
    edu.transfer(Direction::ToMemory, granted.iova(0), 0, 2048).unwrap();
    assert!(all(&memory, 0..4096, 0x44));
    edu.transfer(Direction::FromMemory, granted.iova(0), 0, 2048).unwrap();
    let target = page(&device, 0);
    edu.transfer(Direction::ToMemory, target.iova(0), 0, 2048).unwrap();
    assert!(all(target.memory(), 0..2048, 0x44), "it was read");
}
