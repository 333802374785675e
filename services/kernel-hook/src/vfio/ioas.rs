//! The I/O address space of an iommufd: what the device reaches, as [`super::Container`] is for type 1.
//!
//! What is different here (Linux 6.12):
//!
//! * A device joins it by two calls, `bind` (the device becomes this iommufd's) and `attach` (its DMA goes by this address space). It is
//!   never detached: pages of a process that is gone could not be pinned a second time.
//! * It is a number in an iommufd, so an adopter needs descriptor and number.
//! * Pinned pages count against RLIMIT_MEMLOCK **of the user**, over all its processes. They stay counted when the process that
//!   mapped them dies, until somebody unmaps them; there is nothing that an adopter could or must move to itself.
//! * Memory only: registers of another device (peer to peer), which type 1 maps, are refused with EFAULT.
//! * No call tells what is mapped. Copying a mapping into an address space that no device uses costs neither pins nor IOMMU
//!   entries, and fails where nothing is mapped: that is how this module looks. Who dies meanwhile leaves an address space behind
//!   that pins nothing and goes with the iommufd.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::iommufd_abi::{self as abi, IovaSpan};
use crate::bytes::MappedBytes;
use crate::error::HookError;
use crate::range::PAGE_SIZE;

/// Room for spans at the first try; the kernel says how many there are.
const SPANS: usize = 64;

/// An address space of an open `/dev/iommu`. Its mappings live as long as any descriptor of the iommufd or of a device bound to it,
/// whichever process has it.
#[derive(Clone, Debug)]
pub struct Ioas {
    fd: Arc<OwnedFd>,
    id: u32,
}

impl Ioas {
    /// A new one, empty.
    ///
    /// # Errors
    /// The kernel's; ENOTTY for a descriptor that is no iommufd.
    pub fn create(fd: Arc<OwnedFd>) -> Result<Self, HookError> {
        let id = alloc(fd.as_fd()).map_err(|error| HookError::failed(abi::IOAS_ALLOC.name, error))?;
        Ok(Self { fd, id })
    }

    /// One that an earlier incarnation made. Nothing is asked of the kernel: [`Ioas::iova_ranges`] fails where it is none.
    pub fn adopt(fd: Arc<OwnedFd>, id: u32) -> Self {
        Self { fd, id }
    }

    /// The iommufd's descriptor.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Its number in the iommufd.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// An opened device file (`/dev/vfio/devices/vfioN`) becomes a device of this iommufd, usable, its DMA blocked.
    ///
    /// # Errors
    /// The kernel's: EINVAL (somebody else has bound it, or its DMA is not coherent), EBUSY (somebody has its group open), EPERM
    /// (its group has devices of others, or its interrupts cannot be isolated).
    pub fn bind(&self, device: BorrowedFd<'_>) -> Result<(), HookError> {
        let argsz = size_of::<abi::DeviceBind>() as u32;
        let mut bind = abi::DeviceBind { argsz, iommufd: self.fd.as_raw_fd(), ..Default::default() };
        // SAFETY: no addresses inside.
        let done = unsafe { abi::DEVICE_BIND.call(device, &mut bind) };
        done.map(drop).map_err(|error| HookError::failed(abi::DEVICE_BIND.name, error))
    }

    /// From now on the bound device reaches what is mapped here.
    ///
    /// # Errors
    /// The kernel's.
    pub fn attach(&self, device: BorrowedFd<'_>) -> Result<(), HookError> {
        let argsz = size_of::<abi::DeviceAttach>() as u32;
        let mut attach = abi::DeviceAttach { argsz, pt_id: self.id, ..Default::default() };
        // SAFETY: no addresses inside.
        let done = unsafe { abi::DEVICE_ATTACH.call(device, &mut attach) };
        done.map(drop).map_err(|error| HookError::failed(abi::DEVICE_ATTACH.name, error))
    }

    /// Addresses that can be mapped, as start and last address: those of every attached device.
    ///
    /// # Errors
    /// The kernel's; ENOENT when the iommufd has no such address space, ENOTTY when it is none.
    pub fn iova_ranges(&self) -> io::Result<Vec<(u64, u64)>> {
        let mut spans = vec![IovaSpan::default(); SPANS];
        loop {
            let mut info = abi::IoasIovaRanges {
                size: size_of::<abi::IoasIovaRanges>() as u32,
                ioas_id: self.id,
                num_iovas: spans.len() as u32,
                allowed_iovas: spans.as_mut_ptr() as u64,
                ..Default::default()
            };
            // SAFETY: the kernel writes `num_iovas` spans at most, for which `spans` has room.
            match unsafe { abi::IOAS_IOVA_RANGES.call(self.fd.as_fd(), &mut info) } {
                Ok(_) => {
                    spans.truncate(info.num_iovas as usize);
                    return Ok(spans.iter().map(|span| (span.start, span.last)).collect());
                }
                // It has said how many there are.
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) && info.num_iovas as usize > spans.len() => {
                    spans.resize(info.num_iovas as usize, IovaSpan::default());
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The device reaches all of `memory` at `iova` from now on, to write only if `writable`. The pages are pinned and count
    /// against the user's RLIMIT_MEMLOCK.
    ///
    /// # Errors
    /// `ReadOnly`, the kernel's: ENOMEM (RLIMIT_MEMLOCK), EEXIST, EINVAL (addresses this platform reserves), EFAULT.
    pub fn map(&self, iova: u64, memory: &MappedBytes, writable: bool) -> Result<(), HookError> {
        if writable && !memory.is_writable() {
            return Err(HookError::ReadOnly);
        }
        let mut map = abi::IoasMap {
            size: size_of::<abi::IoasMap>() as u32,
            flags: abi::MAP_AT_IOVA | abi::MAP_READ | if writable { abi::MAP_WRITE } else { 0 },
            ioas_id: self.id,
            reserved: 0,
            user_va: memory.addr(),
            length: memory.len(),
            iova,
        };
        // SAFETY: as for `Container::map`: a live mapping whose accessors bear any other writer, and the kernel pins its pages.
        let done = unsafe { abi::IOAS_MAP.call(self.fd.as_fd(), &mut map) };
        done.map(drop).map_err(|error| HookError::failed(abi::IOAS_MAP.name, error))
    }

    /// The device reaches nothing in these addresses when this returns. Every mapping that begins in them goes; the ends must not
    /// cut one. Answers how many bytes were mapped. Anybody can remove mappings of processes that are gone.
    ///
    /// # Errors
    /// The kernel's; EINVAL when an end cuts a mapping (others may be gone then).
    pub fn unmap(&self, iova: u64, len: u64) -> io::Result<u64> {
        match unmap(self.fd.as_fd(), self.id, iova, len) {
            // The kernel's word for "nothing is mapped" and for "an end cuts a mapping".
            Err(error) if is_enoent(&error) => match self.cuts(iova, len)? {
                true => Err(io::Error::from_raw_os_error(libc::EINVAL)),
                false => Ok(0),
            },
            done => done,
        }
    }

    /// Takes over the mapping of exactly these addresses from a process that is gone: looks that it is there. It stays in force
    /// throughout, and its pages stay counted for the user.
    ///
    /// # Errors
    /// ENOENT when a part of the addresses is not mapped; `Strange` when an end lies inside of a mapping; the kernel's.
    pub fn adopt_map(&self, iova: u64, memory: &MappedBytes) -> Result<(), HookError> {
        let looked = |error| HookError::failed(abi::IOAS_COPY.name, error);
        let len = memory.len();
        Copies::of(self).and_then(|copies| copies.copy(iova, len)).map_err(looked)?;
        if self.cuts(iova, len).map_err(looked)? {
            let detail = format!("a mapping goes on outside of {iova:#x}+{len:#x}");
            return Err(HookError::Strange { call: abi::IOAS_COPY.name, detail });
        }
        Ok(())
    }

    /// An end of these addresses lies inside of a mapping.
    fn cuts(&self, iova: u64, len: u64) -> io::Result<bool> {
        for end in [Some(iova), iova.checked_add(len)].into_iter().flatten() {
            if self.is_inside(end)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// One mapping has both the page before `at` and the page from `at` on: copied together they are one piece, whose half does not go alone.
    fn is_inside(&self, at: u64) -> io::Result<bool> {
        let Some(before) = at.checked_sub(PAGE_SIZE).filter(|_| at <= u64::MAX - PAGE_SIZE) else { return Ok(false) };
        let copies = Copies::of(self)?;
        match copies.copy(before, 2 * PAGE_SIZE) {
            Ok(()) => {}
            Err(error) if is_enoent(&error) => return Ok(false),
            Err(error) => return Err(error),
        }
        match unmap(self.fd.as_fd(), copies.id, 0, PAGE_SIZE) {
            Ok(_) => Ok(false),
            Err(error) if is_enoent(&error) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

/// An address space without a device, to copy mappings to.
struct Copies<'a> {
    source: &'a Ioas,
    id: u32,
}

impl<'a> Copies<'a> {
    fn of(source: &'a Ioas) -> io::Result<Self> {
        Ok(Self { source, id: alloc(source.fd.as_fd())? })
    }

    /// These addresses of the source come to lie from 0 on. ENOENT: a part of them is not mapped.
    fn copy(&self, iova: u64, len: u64) -> io::Result<()> {
        let mut copy = abi::IoasCopy {
            size: size_of::<abi::IoasCopy>() as u32,
            flags: abi::MAP_AT_IOVA | abi::MAP_READ,
            dst_ioas_id: self.id,
            src_ioas_id: self.source.id,
            length: len,
            dst_iova: 0,
            src_iova: iova,
        };
        // SAFETY: IOVAs are no addresses of this process.
        unsafe { abi::IOAS_COPY.call(self.source.fd.as_fd(), &mut copy) }.map(drop)
    }
}

impl Drop for Copies<'_> {
    fn drop(&mut self) {
        let mut destroy = abi::Destroy { size: size_of::<abi::Destroy>() as u32, id: self.id };
        // SAFETY: no addresses inside; nobody else knows the number. It cannot fail, and if it did, the address space would go with the iommufd.
        let _gone = unsafe { abi::DESTROY.call(self.source.fd.as_fd(), &mut destroy) };
    }
}

fn alloc(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut alloc = abi::IoasAlloc { size: size_of::<abi::IoasAlloc>() as u32, ..Default::default() };
    // SAFETY: no addresses inside.
    unsafe { abi::IOAS_ALLOC.call(fd, &mut alloc) }?;
    Ok(alloc.out_ioas_id)
}

fn unmap(fd: BorrowedFd<'_>, ioas_id: u32, iova: u64, length: u64) -> io::Result<u64> {
    let mut unmap = abi::IoasUnmap { size: size_of::<abi::IoasUnmap>() as u32, ioas_id, iova, length };
    // SAFETY: IOVAs are no addresses of this process.
    unsafe { abi::IOAS_UNMAP.call(fd, &mut unmap) }?;
    Ok(unmap.length)
}

fn is_enoent(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memfd;
    use crate::window::{Prot, Window};

    /// This machine needs no iommufd for it: every call must come back with the kernel's error, and change nothing.
    #[test]
    fn what_is_no_iommufd_is_refused_call_by_call() {
        let fd: Arc<OwnedFd> = Arc::new(memfd::create_sealed("no-iommufd", PAGE_SIZE).unwrap());
        assert_eq!(Ioas::create(fd.clone()).unwrap_err().errno(), Some(libc::ENOTTY));
        let ioas = Ioas::adopt(fd.clone(), 7);
        assert_eq!(ioas.id(), 7);
        assert_eq!(ioas.iova_ranges().unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        let memory = Window::map(fd.as_fd(), 0, PAGE_SIZE, Prot::ReadOnly).unwrap();
        assert!(matches!(ioas.map(0, &memory, true), Err(HookError::ReadOnly)));
        assert_eq!(ioas.map(0, &memory, false).unwrap_err().errno(), Some(libc::ENOTTY));
        assert_eq!(ioas.adopt_map(0, &memory).unwrap_err().errno(), Some(libc::ENOTTY));
        assert_eq!(ioas.unmap(0, PAGE_SIZE).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        assert_eq!(ioas.bind(fd.as_fd()).unwrap_err().errno(), Some(libc::ENOTTY));
        assert_eq!(ioas.attach(fd.as_fd()).unwrap_err().errno(), Some(libc::ENOTTY));
    }
}
