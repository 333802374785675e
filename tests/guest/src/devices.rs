//! The devices of the guest, by what they are.

use std::fs;

/// Vendor and device of the shared memory device.
pub const IVSHMEM: (&str, &str) = ("0x1af4", "0x1110");
/// Of the teaching device.
pub const EDU: (&str, &str) = ("0x1234", "0x11e8");
/// Of the disk.
pub const NVME: (&str, &str) = ("0x1b36", "0x0010");

/// Addresses of the devices of this kind that are bound to vfio-pci, in order.
///
/// # Panics
/// Outside of the guest.
pub fn vfio_devices((vendor, device): (&str, &str)) -> Vec<String> {
    let mut found: Vec<String> = fs::read_dir("/sys/bus/pci/drivers/vfio-pci")
        .expect("vfio-pci is there: run this in the guest")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let is = |file: &str, wanted| fs::read_to_string(path.join(file)).is_ok_and(|word| word.trim() == wanted);
            is("vendor", vendor) && is("device", device)
        })
        .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
        .collect();
    found.sort();
    found
}
