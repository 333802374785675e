//! The first open of a device, and what is wrong when it fails.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::vfio::{Container, duplicate};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError};

use super::cdev::{self, Way, WhyNot};
use super::space::Space;
use crate::error::PciError;
use crate::path::PciAddress;

/// The crate's objects. They hold group, container and device open; nothing is asked of them any more.
pub struct Opened(#[expect(dead_code, reason = "it is there to be dropped")] VfioDevice);

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opened")
    }
}

/// A device that nobody had.
pub struct Fresh {
    pub space: Space,
    pub device: Fd,
    /// To be dropped last.
    pub opened: Option<Opened>,
}

/// By iommufd where this machine and account offer it, by group and container otherwise.
pub fn open(address: PciAddress) -> Result<Fresh, PciError> {
    let sysfs = PathBuf::from(format!("/sys/bus/pci/devices/{address}"));
    let group = check(address, &sysfs)?;
    match Way::choose(&sysfs, Path::new("/dev")) {
        Way::Iommufd { node, device, iommu } => {
            let (space, device) = cdev::bind(address, &group, &node, device, iommu)?;
            tracing::info!(device = %address, node = %node.display(), "Opened by its device file and iommufd");
            Ok(Fresh { space, device, opened: None })
        }
        Way::Group(WhyNot { why, remedy }) => {
            let fresh = open_group(address, &sysfs, &group, remedy.as_deref())?;
            tracing::info!(device = %address, group, why, "Opened by its group and a type 1 container");
            Ok(fresh)
        }
    }
}

/// Group, container with its IOMMU, device; container and device as descriptors of our own.
fn open_group(address: PciAddress, sysfs: &Path, group: &str, remedy: Option<&str>) -> Result<Fresh, PciError> {
    let failed = |error: VfioError| refused(address, group, remedy, error);
    let container = Arc::new(VfioContainer::new(None).map_err(failed)?);
    let device = VfioDevice::new(sysfs, container.clone(), false).map_err(failed)?;
    let space = Space::Type1(Container::new(Arc::new(duplicate(&*container)?)));
    Ok(Fresh { space, device: Arc::new(duplicate(&device)?), opened: Some(Opened(device)) })
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

fn refused(address: PciAddress, group: &str, remedy: Option<&str>, error: VfioError) -> PciError {
    let node = format!("/dev/vfio/{group}");
    let problem = match &error {
        VfioError::OpenGroup(reason, _) | VfioError::OpenContainer(reason) => {
            let node = if matches!(error, VfioError::OpenContainer(_)) { "/dev/vfio/vfio".to_owned() } else { node };
            match reason.kind() {
                io::ErrorKind::PermissionDenied => {
                    let iommufd = remedy.map_or(String::new(), |command| format!("; or, to go by iommufd: {command}"));
                    format!("this account may not open {node}; as root: chown THIS_USER {node} (lasting: a udev rule){iommufd}")
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
        let open = |kind: io::ErrorKind| {
            text(refused(address, "7", Some("chown A B"), VfioError::OpenGroup(kind.into(), "7".into())))
        };
        assert!(open(io::ErrorKind::PermissionDenied).contains("chown THIS_USER /dev/vfio/7"));
        assert!(open(io::ErrorKind::PermissionDenied).contains("to go by iommufd: chown A B"));
        assert!(open(io::ErrorKind::ResourceBusy).contains("another process has /dev/vfio/7 open"));
        assert!(open(io::ErrorKind::NotFound).contains("modprobe vfio-pci"));
        assert!(
            text(refused(address, "7", None, VfioError::GroupViable)).contains("/sys/kernel/iommu_groups/7/devices")
        );
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
