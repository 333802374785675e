//! What the tests share.

use std::fs;

use uhmm_driver_edu::hardware::{DMA_LIMIT, Direction, Edu};
use uhmm_pci::{DmaMapping, DmaMemory, DmaRight, PciAddress, PciDevice, PciPath};

pub const EDU: &str = "0x11e8";
pub const NVME: &str = "0x0010";
pub const IVSHMEM: &str = "0x1110";

/// The first device with this device id.
pub fn address(id: &str) -> PciAddress {
    let mut found: Vec<String> = fs::read_dir("/sys/bus/pci/devices")
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| fs::read_to_string(entry.path().join("device")).unwrap().trim() == id)
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    found.sort();
    found[0].parse().unwrap()
}

pub fn open(id: &str) -> PciDevice {
    uhmm_pci::open(&PciPath::Vfio(address(id)), &[]).unwrap()
}

/// `/dev/vfio/GROUP` of the device.
pub fn group_node(id: &str) -> String {
    let group = fs::read_link(format!("/sys/bus/pci/devices/{}/iommu_group", address(id))).unwrap();
    format!("/dev/vfio/{}", group.file_name().unwrap().to_str().unwrap())
}

/// This guest has iommufd (`tests/guest/run --iommufd`).
pub fn iommufd() -> bool {
    std::env::var_os("UHMM_IOMMUFD").is_some()
}

/// `/dev/vfio/devices/vfioN` of the device.
pub fn device_node(id: &str) -> String {
    let entries = fs::read_dir(format!("/sys/bus/pci/devices/{}/vfio-dev", address(id))).unwrap();
    let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(names.len(), 1);
    format!("/dev/vfio/devices/{}", names[0])
}

/// The names under which this device goes to the vault.
pub fn kept_names(device: &PciDevice) -> Vec<String> {
    device.kept().into_iter().map(|(name, _)| name).collect()
}

/// A page for edu, filled with `byte`.
pub fn page(device: &PciDevice, byte: u8) -> DmaMapping {
    let memory = DmaMemory::create("guest-test", 4096).unwrap();
    memory.window.fill(0, 4096, byte).unwrap();
    device.map_dma(&memory, DmaRight::ReadWrite, DMA_LIMIT).unwrap()
}

/// The first 2 KiB of edu's buffer become `byte`.
pub fn fill_buffer(device: &PciDevice, edu: &Edu, byte: u8) {
    let source = page(device, byte);
    edu.transfer(Direction::FromMemory, source.iova(0), 0, 2048).unwrap();
}

/// Every byte of the memory's range is this one.
pub fn all(memory: &DmaMemory, range: std::ops::Range<u64>, byte: u8) -> bool {
    memory.window.compare(range.start, &vec![byte; (range.end - range.start) as usize]).unwrap()
}
