//! The newer way to a device: its own device file and an iommufd instead of group and container.
//!
//! ```text
//!   /dev/iommu --create--> address space     /dev/vfio/devices/vfioN --bind--> device of this iommufd --attach--> reaches the address space
//! ```
//! All calls are the kernel hook's. The crate's feature `vfio_cdev` does not fit: its device detaches itself when it is dropped and its
//! address space destroys itself (in-flight DMA of a driver that ends in order would hit nothing), neither can be built from
//! descriptors of the vault with the number of an address space, and it brings KVM's crates along.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::HookError;
use uhmm_kernel_hook::vfio::Ioas;

use super::space::Space;
use crate::error::PciError;
use crate::path::PciAddress;

/// What this machine and account offer.
#[derive(Debug)]
pub enum Way {
    /// Both files are open.
    Iommufd { node: PathBuf, device: File, iommu: File },
    /// Group and container.
    Group(WhyNot),
}

/// Why it is not iommufd.
#[derive(Debug)]
pub struct WhyNot {
    pub why: String,
    /// The command that would change that, if it is about the account's rights.
    pub remedy: Option<String>,
}

impl Way {
    /// Takes iommufd where device file and `/dev/iommu` are there and this account may open both. `sysfs` is the device's directory there, `dev` is `/dev`.
    pub fn choose(sysfs: &Path, dev: &Path) -> Self {
        Self::iommufd(sysfs, dev).unwrap_or_else(Self::Group)
    }

    fn iommufd(sysfs: &Path, dev: &Path) -> Result<Self, WhyNot> {
        let no_files = "this kernel has no device files for VFIO (CONFIG_VFIO_DEVICE_CDEV)";
        let name = device_name(sysfs).ok_or_else(|| WhyNot { why: no_files.to_owned(), remedy: None })?;
        let (node, iommu_node) = (dev.join("vfio/devices").join(name), dev.join("iommu"));
        let open = |path: &Path, to_have: &str| {
            OpenOptions::new().read(true).write(true).open(path).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => {
                    WhyNot { why: format!("there is no {}{to_have}", path.display()), remedy: None }
                }
                _ => WhyNot {
                    why: format!("{} cannot be opened ({error})", path.display()),
                    remedy: Some(format!("chown THIS_USER {} {}", node.display(), iommu_node.display())),
                },
            })
        };
        // A device file that is open and not bound changes nothing about the device.
        let device = open(&node, "")?;
        let iommu = open(&iommu_node, " (as root: modprobe iommufd)")?;
        Ok(Self::Iommufd { node, device, iommu })
    }
}

/// `vfioN`, where the kernel has made a device file of that name.
fn device_name(sysfs: &Path) -> Option<String> {
    let entry = std::fs::read_dir(sysfs.join("vfio-dev")).ok()?.find_map(Result::ok)?;
    // Kernels without these device files have the directory, but no number of a device file in it.
    entry.path().join("dev").exists().then(|| entry.file_name().to_string_lossy().into_owned())
}

/// The device with an empty address space.
pub fn bind(address: PciAddress, group: &str, node: &Path, device: File, iommu: File) -> Result<(Space, Fd), PciError> {
    let device: Fd = Arc::new(device.into());
    let ioas = Ioas::create(Arc::new(iommu.into())).map_err(|error| {
        let problem = "/dev/iommu gave no address space; see `dmesg`".to_owned();
        PciError::Open { device: address.to_string(), problem, source: Some(error.into()) }
    })?;
    ioas.bind(device.as_fd()).map_err(|error| refused(address, group, node, error))?;
    ioas.attach(device.as_fd()).map_err(|error| {
        let problem =
            "its IOMMU did not accept the address space; see `dmesg`. An account without /dev/iommu goes by the \
                       device's group instead"
                .to_owned();
        PciError::Open { device: address.to_string(), problem, source: Some(error.into()) }
    })?;
    Ok((Space::iommufd(ioas)?, device))
}

fn refused(address: PciAddress, group: &str, node: &Path, error: HookError) -> PciError {
    let node = node.display();
    let problem = match error.errno().map(Errno::from_raw_os_error) {
        Some(Errno::INVAL) => format!(
            "another process has {node} open; only one may (`fuser -v {node}` names it). If nobody has, this platform's DMA \
             is not coherent with its caches and the device cannot be used"
        ),
        Some(Errno::BUSY) => format!(
            "another process has it through its group, /dev/vfio/{group} (`fuser -v /dev/vfio/{group}` names it); end that one"
        ),
        Some(Errno::PERM) => format!(
            "its IOMMU group {group} has devices of kernel drivers or of other processes (ls /sys/kernel/iommu_groups/{group}/devices): \
             bind them to vfio-pci too; or its interrupts cannot be isolated: switch interrupt remapping on in the firmware"
        ),
        Some(Errno::NODEV) => "it is being taken away; start the driver again when it is back".to_owned(),
        _ => format!("the kernel refused {node}"),
    };
    PciError::Open { device: address.to_string(), problem, source: Some(error.into()) }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    type Done = Result<(), Box<dyn std::error::Error>>;

    /// A machine with a device that is vfio3, whose kernel has both device files.
    fn machine() -> Result<(tempfile::TempDir, PathBuf, PathBuf), io::Error> {
        let dir = tempfile::tempdir()?;
        let (sysfs, dev) = (dir.path().join("sysfs"), dir.path().join("dev"));
        fs::create_dir_all(sysfs.join("vfio-dev/vfio3"))?;
        fs::write(sysfs.join("vfio-dev/vfio3/dev"), "511:3\n")?;
        fs::create_dir_all(dev.join("vfio/devices"))?;
        fs::write(dev.join("vfio/devices/vfio3"), "")?;
        fs::write(dev.join("iommu"), "")?;
        Ok((dir, sysfs, dev))
    }

    fn why(sysfs: &Path, dev: &Path) -> Option<(String, Option<String>)> {
        match Way::choose(sysfs, dev) {
            Way::Iommufd { .. } => None,
            Way::Group(WhyNot { why, remedy }) => Some((why, remedy)),
        }
    }

    #[test]
    fn iommufd_is_taken_where_both_files_are_there() -> Done {
        let (_dir, sysfs, dev) = machine()?;
        assert!(
            matches!(Way::choose(&sysfs, &dev), Way::Iommufd { node, .. } if node == dev.join("vfio/devices/vfio3"))
        );
        Ok(())
    }

    #[test]
    fn whatever_is_missing_is_named_and_the_group_is_taken() -> Done {
        let (_dir, sysfs, dev) = machine()?;
        fs::remove_file(dev.join("iommu"))?;
        assert!(
            why(&sysfs, &dev).is_some_and(|(why, _)| why.contains("dev/iommu") && why.contains("modprobe iommufd"))
        );
        fs::remove_file(dev.join("vfio/devices/vfio3"))?;
        assert!(why(&sysfs, &dev).is_some_and(|(why, _)| why.contains("there is no") && why.contains("vfio3")));
        fs::remove_file(sysfs.join("vfio-dev/vfio3/dev"))?;
        assert!(why(&sysfs, &dev).is_some_and(|(why, _)| why.contains("CONFIG_VFIO_DEVICE_CDEV")));
        fs::remove_dir_all(sysfs.join("vfio-dev"))?;
        assert!(why(&sysfs, &dev).is_some(), "an old kernel");
        Ok(())
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_named_with_the_command_that_gives_it() -> Done {
        let (_dir, sysfs, dev) = machine()?;
        // A link to itself cannot be opened by anybody, root included.
        fs::remove_file(dev.join("iommu"))?;
        symlink("iommu", dev.join("iommu"))?;
        let (why, remedy) = why(&sysfs, &dev).ok_or("the group is taken")?;
        assert!(why.contains("dev/iommu cannot be opened"), "{why}");
        let remedy = remedy.ok_or("a command")?;
        assert!(remedy.contains("chown THIS_USER") && remedy.contains("devices/vfio3"), "{remedy}");
        Ok(())
    }

    #[test]
    fn every_refusal_says_what_to_do() -> Done {
        let address: PciAddress = "0000:00:05.0".parse()?;
        let said = |errno: Errno| {
            let error = HookError::call("BIND", None, io::Error::from(errno));
            refused(address, "7", Path::new("/dev/vfio/devices/vfio3"), error).to_string()
        };
        assert!(said(Errno::INVAL).contains("another process has /dev/vfio/devices/vfio3 open"));
        assert!(said(Errno::BUSY).contains("fuser -v /dev/vfio/7"));
        assert!(said(Errno::PERM).contains("/sys/kernel/iommu_groups/7/devices"));
        assert!(said(Errno::NODEV).contains("taken away"));
        assert!(said(Errno::IO).contains("refused /dev/vfio/devices/vfio3"));
        Ok(())
    }
}
