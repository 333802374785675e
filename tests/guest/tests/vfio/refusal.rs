//! What cannot be done says why, and what to do.

use std::error::Error;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use uhmm_driver_edu::hardware::{DMA_LIMIT, Direction, Edu};
use uhmm_pci::{DmaMemory, DmaRight, PciDevice, PciError, PciPath};

use crate::common::{EDU, address, all, device_node, group_node, iommufd, kept_names, open, page};

/// The error and everything below it.
fn words(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut below = error.source();
    while let Some(error) = below {
        text += &format!(": {error}");
        below = error.source();
    }
    text
}

fn refused(path: &str) -> String {
    let opened: Result<PciDevice, PciError> = uhmm_pci::open(&path.parse::<PciPath>().unwrap(), &[]);
    words(&opened.unwrap_err())
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn a_second_opener_learns_that_the_device_is_taken() {
    let first = open(EDU);
    let text = refused(&address(EDU).to_string());
    // Who binds a device a second time gets EINVAL, who opens a group a second time EBUSY.
    let (node, errno) = if iommufd() { (device_node(EDU), 22) } else { (group_node(EDU), 16) };
    assert!(text.contains("another process has") && text.contains(&node), "{text}");
    assert!(text.contains(&format!("os error {errno}")), "{text}");
    let edu = Edu::new(&first).unwrap();
    assert_eq!(edu.factorial(5).unwrap(), 120, "the first one is not disturbed");
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn a_missing_permission_names_the_file_and_the_command() {
    let node = group_node(EDU);
    let mut closed = vec![Closed::new(&node)];
    if iommufd() {
        closed.push(Closed::new(&device_node(EDU)));
    }
    let text = refused(&address(EDU).to_string());
    drop(closed);
    assert!(text.contains(&format!("chown THIS_USER {node}")), "{text}");
    assert!(text.contains("Permission denied"), "{text}");
    if iommufd() {
        let command = format!("to go by iommufd: chown THIS_USER {} /dev/iommu", device_node(EDU));
        assert!(text.contains(&command), "{text}");
    }
}

/// A file that nobody may open, until this is dropped.
struct Closed {
    node: String,
    mode: Permissions,
}

impl Closed {
    fn new(node: &str) -> Self {
        let mode = fs::metadata(node).unwrap().permissions();
        fs::set_permissions(node, Permissions::from_mode(0o000)).unwrap();
        Self { node: node.to_owned(), mode }
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        fs::set_permissions(&self.node, self.mode.clone()).unwrap();
    }
}

#[test]
#[ignore = "runs in the guest: tests/guest/run --iommufd vfio"]
fn an_account_that_may_not_open_dev_iommu_goes_by_the_group_and_back_iommufd() {
    let closed = Closed::new("/dev/iommu");
    let device = open(EDU);
    assert_eq!(kept_names(&device), ["driver/pci-container", "driver/pci-device"]);
    assert_eq!(Edu::new(&device).unwrap().factorial(5).unwrap(), 120);
    drop(closed);
    let text = refused(&address(EDU).to_string());
    assert!(text.contains(&format!("fuser -v {}", group_node(EDU))) && text.contains("os error 16"), "{text}");
    drop(device);
    assert!(kept_names(&open(EDU)).contains(&"driver/pci-iommufd".to_owned()));
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn devices_that_are_not_there_or_not_bound_say_what_to_do() {
    let text = refused("0000:00:1e.7");
    assert!(text.contains("no such PCI device"), "{text}");
    // The host bridge.
    let text = refused("0000:00:00.0");
    assert!(
        text.contains("bound to no driver") && text.contains("echo 0000:00:00.0 > /sys/bus/pci/drivers_probe"),
        "{text}"
    );
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn memory_beyond_the_limit_of_locked_memory_is_refused_and_nothing_leaks() {
    let device = open(EDU);
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current.expect("the user has a limit");
    let memory = DmaMemory::create("guest-test", limit.next_multiple_of(4096) + (1 << 20)).unwrap();
    for _ in 0..3 {
        let error = device.map_dma(&memory, DmaRight::ReadWrite, u64::MAX).unwrap_err();
        assert!(error.to_string().contains("RLIMIT_MEMLOCK"), "{error}");
    }
    // What fits goes on fitting.
    let edu = Edu::new(&device).unwrap();
    for _ in 0..3 {
        let small = DmaMemory::create("guest-test", (limit / 2) & !4095).unwrap();
        let mapped = device.map_dma(&small, DmaRight::ReadWrite, DMA_LIMIT).unwrap();
        edu.transfer(Direction::FromMemory, mapped.iova(0), 0, 64).unwrap();
    }
    let target = page(&device, 9);
    edu.transfer(Direction::ToMemory, target.iova(0), 0, 64).unwrap();
    assert!(all(target.memory(), 0..64, 0));
}
