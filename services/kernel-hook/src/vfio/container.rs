//! The container: what the device reaches.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::abi::{self, DmaMap, DmaUnmap, IommuInfo, WithCaps};
use crate::bytes::MappedBytes;
use crate::error::HookError;

/// A type 1 (version 2) container with its IOMMU set. Its mappings live as long as any descriptor of container or device does,
/// whichever process has it.
#[derive(Clone, Debug)]
pub struct Container {
    fd: Arc<OwnedFd>,
}

impl Container {
    /// Takes an open container.
    pub fn new(fd: Arc<OwnedFd>) -> Self {
        Self { fd }
    }

    /// Its descriptor.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Addresses that can be mapped, as start and last address. `None`: the kernel does not say (before 5.4).
    ///
    /// # Errors
    /// The kernel's; EINVAL for a descriptor that is no container with an IOMMU.
    pub fn iova_ranges(&self) -> io::Result<Option<Vec<(u64, u64)>>> {
        let argsz = size_of::<WithCaps<IommuInfo>>() as u32;
        let mut info = WithCaps::new(IommuInfo { argsz, ..IommuInfo::default() });
        // SAFETY: no addresses inside.
        unsafe { abi::GET_IOMMU_INFO.call(self.fd.as_fd(), &mut info) }?;
        if info.head.flags & abi::IOMMU_HAS_CAPS == 0 {
            return Ok(None);
        }
        // Header, count, one word unused, then pairs of 64-bit numbers.
        let words = info.capability(info.head.cap_offset, abi::IOMMU_CAP_IOVA_RANGES);
        Ok(words.filter(|words| words.len() > 4).map(|words| {
            let wide = |pair: &[u32]| u64::from(pair[0]) | u64::from(pair[1]) << 32;
            words[4..]
                .chunks_exact(4)
                .take(words[2] as usize)
                .map(|four| (wide(&four[..2]), wide(&four[2..])))
                .collect()
        }))
    }

    /// The device reaches all of `memory` at `iova` from now on, to write only if `writable`. The pages are pinned and count
    /// against RLIMIT_MEMLOCK.
    ///
    /// # Errors
    /// `Unaligned`, `ReadOnly`, the kernel's: ENOMEM (RLIMIT_MEMLOCK), EEXIST, EINVAL (addresses this platform reserves), EFAULT.
    pub fn map(&self, iova: u64, memory: &MappedBytes, writable: bool) -> Result<(), HookError> {
        let flags = abi::MAP_READ | if writable { abi::MAP_WRITE } else { 0 };
        if writable && !memory.is_writable() {
            return Err(HookError::ReadOnly);
        }
        self.map_call(flags, iova, memory)
    }

    fn map_call(&self, flags: u32, iova: u64, memory: &MappedBytes) -> Result<(), HookError> {
        let argsz = size_of::<DmaMap>() as u32;
        let mut map = DmaMap { argsz, flags, vaddr: memory.addr(), iova, size: memory.len() };
        // SAFETY: the addresses are a live mapping of shared or private memory that only `MappedBytes` accessors read, which bear
        // any other writer; the kernel pins its pages, so what the device reaches outlives the mapping (module head).
        unsafe { abi::MAP_DMA.call(self.fd.as_fd(), &mut map) }
            .map(drop)
            .map_err(|error| HookError::failed(abi::MAP_DMA.name, error))
    }

    /// The device reaches nothing in these addresses when this returns. Every mapping that begins in them goes; the ends must not
    /// cut one. Answers how many bytes were mapped. Mappings of processes that are gone can be removed by anybody.
    ///
    /// # Errors
    /// The kernel's; EINVAL when an end cuts a mapping.
    pub fn unmap(&self, iova: u64, len: u64) -> io::Result<u64> {
        self.unmap_call(0, iova, len)
    }

    /// Removes every mapping.
    ///
    /// # Errors
    /// The kernel's.
    pub fn unmap_all(&self) -> io::Result<u64> {
        self.unmap_call(abi::UNMAP_ALL, 0, 0)
    }

    /// Takes over the mapping of exactly these addresses from a process that is gone. It stays in force throughout: DMA in flight is
    /// not disturbed. `memory` must be the same pages (the same file). From now on they count against this process's limit.
    ///
    /// # Errors
    /// `Strange` when no mapping has exactly these addresses; the kernel's.
    pub fn adopt_map(&self, iova: u64, memory: &MappedBytes) -> Result<(), HookError> {
        // The kernel calls this "updating the virtual address": give up the old one, name the new one. The IOMMU's entries stay.
        let found = self.unmap_call(abi::UNMAP_OWNER_ONLY, iova, memory.len());
        match found {
            Ok(found) if found == memory.len() => {}
            // EINVAL: the last adopter died between the two steps. The address is given up already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Ok(found) => {
                let detail = format!("{found:#x} bytes are mapped in {iova:#x}+{:#x}", memory.len());
                return Err(HookError::Strange { call: "VFIO_IOMMU_UNMAP_DMA(VADDR)", detail });
            }
            Err(error) => return Err(HookError::failed("VFIO_IOMMU_UNMAP_DMA(VADDR)", error)),
        }
        self.map_call(abi::MAP_NEW_OWNER, iova, memory)
    }

    fn unmap_call(&self, flags: u32, iova: u64, len: u64) -> io::Result<u64> {
        let mut unmap = DmaUnmap { argsz: size_of::<DmaUnmap>() as u32, flags, iova, size: len };
        // SAFETY: IOVAs are no addresses of this process.
        unsafe { abi::UNMAP_DMA.call(self.fd.as_fd(), &mut unmap) }?;
        Ok(unmap.size)
    }
}
