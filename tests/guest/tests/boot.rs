//! The guest is what the other suites rely on.

use std::fs;

#[test]
#[ignore = "runs in the guest: tests/guest/run boot"]
fn suites_run_without_privilege() {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim).map(str::to_owned);
    assert_eq!(field("Uid:").as_deref(), Some("1000\t1000\t1000\t1000"));
    assert_eq!(field("CapEff:").as_deref(), Some("0000000000000000"));
    assert_eq!(field("Groups:").as_deref(), Some(""));
    assert!(fs::read("/dev/mem").is_err());
}

#[test]
#[ignore = "runs in the guest: tests/guest/run boot"]
fn every_device_has_an_iommu_group_of_its_own_that_this_user_may_open() {
    let mut groups: Vec<String> = fs::read_dir("/sys/bus/pci/drivers/vfio-pci")
        .unwrap()
        .map(|entry| entry.unwrap().path().join("iommu_group"))
        .filter(|group| group.exists())
        .map(|group| fs::read_link(group).unwrap().file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert_eq!(groups.len(), 5, "two edu, two ivshmem, one nvme");
    groups.sort();
    groups.dedup();
    assert_eq!(groups.len(), 5);
    for group in groups {
        fs::OpenOptions::new().read(true).write(true).open(format!("/dev/vfio/{group}")).unwrap();
    }
}
