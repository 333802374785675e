//! The first open of a device, and what is wrong when it fails.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::vfio::duplicate;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError};

use crate::error::PciError;
use crate::path::PciAddress;

/// The crate's objects. They hold group, container and device open; nothing is asked of them any more.
pub struct Opened(#[expect(dead_code, reason = "it is there to be dropped")] VfioDevice);

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opened")
    }
}

/// Group, container with its IOMMU, device; answers container and device as descriptors of our own.
pub fn open(address: PciAddress) -> Result<(Opened, Fd, Fd), PciError> {
    let sysfs = PathBuf::from(format!("/sys/bus/pci/devices/{address}"));
    let group = check(address, &sysfs)?;
    let failed = |error: VfioError| refused(address, &group, error);
    let container = Arc::new(VfioContainer::new(None).map_err(failed)?);
    let device = VfioDevice::new(&sysfs, container.clone(), false).map_err(failed)?;
    let fds = (Arc::new(duplicate(&*container)?), Arc::new(duplicate(&device)?));
    Ok((Opened(device), fds.0, fds.1))
}

/// What sysfs says before anything is opened; answers the group's number.
fn check(address: PciAddress, sysfs: &Path) -> Result<String, PciError> {
    let problem = |problem: String| PciError::Open { device: address.to_string(), problem, source: None };
    if !sysfs.exists() {
        return Err(problem("this machine has no such PCI device (`lspci -D` lists them)".to_owned()));
    }
    let name_of = |link: &str| {
        let target = std::fs::read_link(sysfs.join(link)).ok()?;
        target.file_name().map(|name| name.to_string_lossy().into_owned())
    };
    let driver = name_of("driver");
    if driver.as_deref() != Some("vfio-pci") {
        return Err(problem(how_to_bind(address, driver.as_deref())));
    }
    name_of("iommu_group").ok_or_else(|| {
        problem(
            "it has no IOMMU group; switch the IOMMU on (firmware: VT-d or AMD-Vi; kernel command line: intel_iommu=on)"
                .to_owned(),
        )
    })
}

fn how_to_bind(address: PciAddress, driver: Option<&str>) -> String {
    let dir = format!("/sys/bus/pci/devices/{address}");
    let (state, unbind) = match driver {
        Some(driver) => {
            (format!("it belongs to the kernel's driver {driver}"), format!("echo {address} > {dir}/driver/unbind; "))
        }
        None => ("it is bound to no driver".to_owned(), String::new()),
    };
    format!(
        "{state}, not to vfio-pci; as root: modprobe vfio-pci; echo vfio-pci > {dir}/driver_override; \
         {unbind}echo {address} > /sys/bus/pci/drivers_probe"
    )
}

fn refused(address: PciAddress, group: &str, error: VfioError) -> PciError {
    let node = format!("/dev/vfio/{group}");
    let problem = match &error {
        VfioError::OpenGroup(reason, _) | VfioError::OpenContainer(reason) => {
            let node = if matches!(error, VfioError::OpenContainer(_)) { "/dev/vfio/vfio".to_owned() } else { node };
            match reason.kind() {
                io::ErrorKind::PermissionDenied => {
                    format!("this account may not open {node}; as root: chown THIS_USER {node} (lasting: a udev rule)")
                }
                io::ErrorKind::ResourceBusy => {
                    format!("another process has {node} open; only one may (`fuser -v {node}` names it)")
                }
                io::ErrorKind::NotFound => format!("there is no {node}; as root: modprobe vfio-pci (and give it to containers)"),
                _ => format!("{node} cannot be opened"),
            }
        }
        VfioError::GroupViable => format!(
            "its IOMMU group {group} is not viable: other devices of the group (ls /sys/kernel/iommu_groups/{group}/devices) \
             have kernel drivers; bind them to vfio-pci too, or put the device into another slot"
        ),
        VfioError::VfioExtension | VfioError::VfioType1V2 | VfioError::ContainerSetIOMMU(_) => {
            "the kernel cannot give it an IOMMU address space; as root: modprobe vfio_iommu_type1, and see `dmesg` for interrupt remapping"
                .to_owned()
        }
        _ => "the kernel refused".to_owned(),
    };
    PciError::Open { device: address.to_string(), problem, source: Some(Box::new(error)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(error: PciError) -> String {
        error.to_string()
    }

    #[test]
    fn every_refusal_says_what_to_do() -> Result<(), PciError> {
        let address: PciAddress = "0000:00:05.0".parse()?;
        let open = |kind: io::ErrorKind| text(refused(address, "7", VfioError::OpenGroup(kind.into(), "7".into())));
        assert!(open(io::ErrorKind::PermissionDenied).contains("chown THIS_USER /dev/vfio/7"));
        assert!(open(io::ErrorKind::ResourceBusy).contains("another process has /dev/vfio/7 open"));
        assert!(open(io::ErrorKind::NotFound).contains("modprobe vfio-pci"));
        assert!(text(refused(address, "7", VfioError::GroupViable)).contains("/sys/kernel/iommu_groups/7/devices"));
        let bind = how_to_bind(address, Some("nvme"));
        assert!(
            bind.contains("driver nvme") && bind.contains("echo 0000:00:05.0 > /sys/bus/pci/drivers_probe"),
            "{bind}"
        );
        assert!(!how_to_bind(address, None).contains("unbind"));
        Ok(())
    }

    #[test]
    fn a_device_that_is_not_there_is_said_to_be_not_there() -> Result<(), PciError> {
        let found = open("ffff:ff:1f.7".parse()?).map(|_| ()).map_err(text);
        assert!(found.is_err_and(|text| text.contains("no such PCI device")));
        Ok(())
    }
}
