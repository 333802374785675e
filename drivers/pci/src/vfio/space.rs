//! What the device reaches, behind either of the kernel's two interfaces, and what of it the vault keeps.
//!
//! ```text
//!   type 1    driver/pci-container, driver/pci-device
//!   iommufd   driver/pci-ioas (a memfd with its number), driver/pci-iommufd, driver/pci-cdev
//! ```
//! The device goes to the vault last and under a name of its own for each interface: whichever device is there says which of the other entries count.
//! Without a device the rest is of an incarnation that died while it handed them over; it had not used the device yet.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::io::Errno;
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::vfio::{Container, Ioas};
use uhmm_kernel_hook::{HookError, memfd};

use crate::dma::{DmaMemory, DmaRight};
use crate::error::PciError;

const KEPT_CONTAINER: &str = "driver/pci-container";
const KEPT_DEVICE: &str = "driver/pci-device";
const KEPT_NUMBER: &str = "driver/pci-ioas";
const KEPT_IOMMUFD: &str = "driver/pci-iommufd";
const KEPT_CDEV: &str = "driver/pci-cdev";

const NUMBER_BYTES: u64 = 4096;
const NUMBER_MARK: [u8; 4] = *b"ioas";

/// See the module head.
#[derive(Debug)]
pub enum Space {
    Type1(Container),
    Iommufd { ioas: Ioas, number: Fd },
}

impl Space {
    /// A new iommufd address space, with its number written down for the next incarnation.
    pub fn iommufd(ioas: Ioas) -> Result<Self, PciError> {
        let number: Fd = Arc::new(memfd::create_sealed("ioas", NUMBER_BYTES)?);
        let written = memfd::to_file(number.as_fd())?.write_all_at(&to_bytes(ioas.id()), 0);
        written.map_err(|error| HookError::call("pwrite(memfd)", None, error))?;
        Ok(Self::Iommufd { ioas, number })
    }

    /// Address space and device that an earlier incarnation left in the vault. `None`: it left none.
    pub fn adopt(kept: &[(String, Fd)]) -> Result<Option<(Self, Fd)>, PciError> {
        let find = |wanted| kept.iter().find(|(name, _)| name == wanted).map(|(_, fd)| Arc::clone(fd));
        if let (Some(number), Some(fd), Some(device)) = (find(KEPT_NUMBER), find(KEPT_IOMMUFD), find(KEPT_CDEV)) {
            let ioas = Ioas::adopt(fd, read_number(&number)?);
            return Ok(Some((Self::Iommufd { ioas, number }, device)));
        }
        let type1 = find(KEPT_CONTAINER).zip(find(KEPT_DEVICE));
        Ok(type1.map(|(container, device)| (Self::Type1(Container::new(container)), device)))
    }

    /// For the vault.
    pub fn kept(&self, device: &Fd) -> Vec<(String, Fd)> {
        let kept = match self {
            Self::Type1(container) => vec![(KEPT_CONTAINER, container.fd()), (KEPT_DEVICE, device)],
            Self::Iommufd { ioas, number } => {
                vec![(KEPT_NUMBER, number), (KEPT_IOMMUFD, ioas.fd()), (KEPT_CDEV, device)]
            }
        };
        kept.into_iter().map(|(name, fd)| (name.to_owned(), Arc::clone(fd))).collect()
    }

    /// For the log.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Type1(_) => "type 1 container",
            Self::Iommufd { .. } => "iommufd",
        }
    }

    /// First and last addresses that can be mapped. `None`: the kernel does not say.
    pub fn iova_ranges(&self) -> io::Result<Option<Vec<(u64, u64)>>> {
        match self {
            Self::Type1(container) => container.iova_ranges(),
            Self::Iommufd { ioas, .. } => ioas.iova_ranges().map(Some),
        }
    }

    pub fn map(&self, iova: u64, memory: &DmaMemory, right: DmaRight) -> Result<(), PciError> {
        let writable = right == DmaRight::ReadWrite;
        let mapped = match self {
            Self::Type1(container) => container.map(iova, &memory.window, writable),
            Self::Iommufd { ioas, .. } => ioas.map(iova, &memory.window, writable),
        };
        mapped.map_err(|error| self.map_error(iova, memory, error))
    }

    pub fn adopt_map(&self, iova: u64, memory: &DmaMemory) -> Result<(), PciError> {
        let adopted = match self {
            Self::Type1(container) => container.adopt_map(iova, &memory.window),
            Self::Iommufd { ioas, .. } => ioas.adopt_map(iova, &memory.window),
        };
        adopted.map_err(|error| self.map_error(iova, memory, error))
    }

    pub fn unmap(&self, iova: u64, len: u64) -> Result<(), PciError> {
        let unmapped = match self {
            Self::Type1(container) => container.unmap(iova, len),
            Self::Iommufd { ioas, .. } => ioas.unmap(iova, len),
        };
        let hint = "the mapping could not be removed, the device may still reach it";
        unmapped.map(drop).map_err(|source| PciError::Map { iova, len, hint, source })
    }

    fn map_error(&self, iova: u64, memory: &DmaMemory, error: HookError) -> PciError {
        let iommufd = matches!(self, Self::Iommufd { .. });
        let hint = match error.errno().map(Errno::from_raw_os_error) {
            _ if matches!(error, HookError::Strange { .. }) => "no mapping has exactly these addresses",
            Some(Errno::NOMEM) if iommufd => {
                "it would lock more memory than RLIMIT_MEMLOCK allows, which iommufd counts over all processes of this user; \
                 raise it (ulimit -l, LimitMEMLOCK= of the service), map less, or give each driver a user of its own"
            }
            Some(Errno::NOMEM) => {
                "it would lock more memory than RLIMIT_MEMLOCK allows; raise it (ulimit -l, LimitMEMLOCK= of the service) or map less"
            }
            Some(Errno::EXIST) => "something is mapped there already; an adopted device needs finish_adoption first",
            Some(Errno::INVAL) => "the platform reserves these addresses, or they are beyond what its IOMMU has",
            Some(Errno::NOENT) => "nothing is mapped there that could be taken over",
            Some(Errno::NOSPC) => {
                "too many mappings; raise dma_entry_limit of module vfio_iommu_type1, or map larger pieces"
            }
            Some(Errno::FAULT) if iommufd => {
                "its pages could not be pinned; iommufd maps memory only, no registers of other devices"
            }
            _ => "its pages could not be pinned",
        };
        PciError::Map { iova, len: memory.len_bytes(), hint, source: io::Error::other(error) }
    }
}

fn to_bytes(id: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&NUMBER_MARK);
    bytes[4..].copy_from_slice(&id.to_le_bytes());
    bytes
}

/// `None`: nobody has written it there, or somebody something else.
fn from_bytes(bytes: [u8; 8]) -> Option<u32> {
    let [mark @ .., a, b, c, d] = bytes;
    (mark == NUMBER_MARK).then(|| u32::from_le_bytes([a, b, c, d]))
}

fn read_number(number: &Fd) -> Result<u32, PciError> {
    memfd::check_sealed(number.as_fd(), NUMBER_BYTES)?;
    let mut bytes = [0; 8];
    let read = memfd::to_file(number.as_fd())?.read_exact_at(&mut bytes, 0);
    read.map_err(|error| HookError::call("pread(memfd)", None, error))?;
    from_bytes(bytes).ok_or_else(|| PciError::Open {
        device: "The kept device".to_owned(),
        problem: format!("{KEPT_NUMBER} of the vault has no address space's number; stop uhmm, so that the device is closed, and start it again"),
        source: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fd() -> Result<Fd, PciError> {
        Ok(Arc::new(memfd::create_sealed("stands-for-a-descriptor", 4096)?))
    }

    fn names(kept: &[(String, Fd)]) -> Vec<&str> {
        kept.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn an_iommufd_comes_back_from_the_vault_with_its_number_even_beside_what_a_dead_incarnation_left()
    -> Result<(), PciError> {
        let space = Space::iommufd(Ioas::adopt(fd()?, 0x1234_5678))?;
        let mut kept = space.kept(&fd()?);
        assert_eq!(names(&kept), ["driver/pci-ioas", "driver/pci-iommufd", "driver/pci-cdev"], "the device last");
        kept.insert(0, (KEPT_CONTAINER.to_owned(), fd()?));
        let found = Space::adopt(&kept)?;
        assert!(matches!(found, Some((Space::Iommufd { ioas, .. }, _)) if ioas.id() == 0x1234_5678));
        kept.pop();
        assert!(Space::adopt(&kept)?.is_none(), "without a device it was not used");
        kept.push((KEPT_DEVICE.to_owned(), fd()?));
        assert!(matches!(Space::adopt(&kept)?, Some((Space::Type1(_), _))), "the device says which");
        Ok(())
    }

    #[test]
    fn a_number_that_nobody_wrote_is_refused_with_what_to_do() -> Result<(), PciError> {
        assert_eq!(from_bytes(to_bytes(7)), Some(7));
        let kept = [KEPT_NUMBER, KEPT_IOMMUFD, KEPT_CDEV].map(|name| fd().map(|fd| (name.to_owned(), fd)));
        let kept = kept.into_iter().collect::<Result<Vec<_>, _>>()?;
        let text = Space::adopt(&kept).map(|_| ()).map_err(|error| error.to_string());
        assert!(text.is_err_and(|text| text.contains("driver/pci-ioas") && text.contains("stop uhmm")));
        Ok(())
    }

    #[test]
    fn what_cannot_be_mapped_says_whose_limit_it_is() -> Result<(), PciError> {
        let memory = DmaMemory::create("test", 4096)?;
        let said = |space: &Space, errno: Errno| {
            let error = HookError::call("MAP", None, io::Error::from(errno));
            space.map_error(0, &memory, error).to_string()
        };
        let type1 = Space::Type1(Container::new(fd()?));
        let iommufd = Space::iommufd(Ioas::adopt(fd()?, 1))?;
        assert!(said(&iommufd, Errno::NOMEM).contains("all processes of this user"));
        assert!(!said(&type1, Errno::NOMEM).contains("all processes"));
        assert!(said(&iommufd, Errno::FAULT).contains("no registers of other devices"));
        assert!(said(&type1, Errno::NOSPC).contains("dma_entry_limit"));
        let strange = HookError::Strange { call: "COPY", detail: String::new() };
        assert!(iommufd.map_error(0, &memory, strange).to_string().contains("exactly these addresses"));
        Ok(())
    }
}
