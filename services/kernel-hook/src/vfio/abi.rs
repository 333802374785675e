//! VFIO's structs and ioctl numbers (`linux/vfio.h`). Its numbers carry no size: each struct says its own in `argsz`, and the kernel
//! refuses one that is too short.

use std::os::fd::{AsRawFd, BorrowedFd};

const BASE: libc::c_ulong = (b';' as libc::c_ulong) << 8 | 100;

/// A struct whose first field is `argsz`, its own size in bytes, and whose layout is the kernel's.
///
/// # Safety
/// `repr(C)`, plain integers, no padding, begins with `argsz: u32`.
pub(super) unsafe trait Sized32: Sized {
    /// As the kernel will read it.
    fn argsz(&self) -> u32;
}

/// An ioctl whose argument is a `T`.
#[derive(Clone, Copy)]
pub(super) struct VfioCall<T> {
    pub(super) name: &'static str,
    pub(super) number: libc::c_ulong,
    argument: std::marker::PhantomData<T>,
}

impl<T: Sized32> VfioCall<T> {
    pub(super) const fn new(name: &'static str, nr: libc::c_ulong) -> Self {
        Self { name, number: BASE + nr, argument: std::marker::PhantomData }
    }

    /// Makes the call.
    ///
    /// # Safety
    /// Every address inside `argument` must be valid for what the kernel does with it.
    pub(super) unsafe fn call(&self, fd: BorrowedFd<'_>, argument: &mut T) -> std::io::Result<i32> {
        debug_assert_eq!(argument.argsz() as usize, size_of::<T>());
        // SAFETY: the kernel touches `argsz` bytes at most, which is the size of T; addresses in it are the caller's promise.
        let rc = unsafe { libc::ioctl(fd.as_raw_fd(), self.number, std::ptr::from_mut(argument)) };
        if rc < 0 { Err(std::io::Error::last_os_error()) } else { Ok(rc) }
    }
}

/// `VFIO_DEVICE_RESET`: no argument.
pub(super) const DEVICE_RESET: libc::c_ulong = BASE + 11;
pub(super) const GET_DEVICE_INFO: VfioCall<DeviceInfo> = VfioCall::new("VFIO_DEVICE_GET_INFO", 7);
pub(super) const GET_REGION_INFO: VfioCall<WithCaps<RegionInfo>> = VfioCall::new("VFIO_DEVICE_GET_REGION_INFO", 8);
pub(super) const GET_IRQ_INFO: VfioCall<IrqInfo> = VfioCall::new("VFIO_DEVICE_GET_IRQ_INFO", 9);
pub(super) const SET_IRQS: VfioCall<IrqSet> = VfioCall::new("VFIO_DEVICE_SET_IRQS", 10);
pub(super) const GET_IOMMU_INFO: VfioCall<WithCaps<IommuInfo>> = VfioCall::new("VFIO_IOMMU_GET_INFO", 12);
pub(super) const MAP_DMA: VfioCall<DmaMap> = VfioCall::new("VFIO_IOMMU_MAP_DMA", 13);
pub(super) const UNMAP_DMA: VfioCall<DmaUnmap> = VfioCall::new("VFIO_IOMMU_UNMAP_DMA", 14);

pub(super) const DEVICE_CAN_RESET: u32 = 1;
pub(super) const DEVICE_IS_PCI: u32 = 2;
pub(super) const REGION_CAN_MMAP: u32 = 4;
pub(super) const REGION_HAS_CAPS: u32 = 8;
pub(super) const REGION_CAP_SPARSE_MMAP: u16 = 1;
pub(super) const IOMMU_HAS_CAPS: u32 = 2;
pub(super) const IOMMU_CAP_IOVA_RANGES: u16 = 1;
pub(super) const MAP_READ: u32 = 1;
pub(super) const MAP_WRITE: u32 = 2;
pub(super) const MAP_NEW_OWNER: u32 = 4;
pub(super) const UNMAP_ALL: u32 = 2;
pub(super) const UNMAP_OWNER_ONLY: u32 = 4;
pub(super) const IRQ_DATA_NONE: u32 = 1;
pub(super) const IRQ_DATA_EVENTFD: u32 = 4;
pub(super) const IRQ_TRIGGER: u32 = 32;

/// As many vectors as PCI knows.
pub(super) const VECTORS_MAX: usize = 2048;
/// Room for capabilities behind an info struct, in words.
const CAPS_WORDS: usize = 1024;

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct DeviceInfo {
    pub argsz: u32,
    pub flags: u32,
    pub region_count: u32,
    pub irq_index_count: u32,
    pub cap_offset: u32,
    pub reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct RegionInfo {
    pub argsz: u32,
    pub flags: u32,
    pub index: u32,
    pub cap_offset: u32,
    pub size: u64,
    pub offset: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct IommuInfo {
    pub argsz: u32,
    pub flags: u32,
    pub page_sizes: u64,
    pub cap_offset: u32,
    pub reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct IrqInfo {
    pub argsz: u32,
    pub flags: u32,
    pub index: u32,
    pub count: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct IrqSet {
    pub argsz: u32,
    pub flags: u32,
    pub index: u32,
    pub start: u32,
    pub count: u32,
    pub eventfds: [i32; VECTORS_MAX],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct DmaMap {
    pub argsz: u32,
    pub flags: u32,
    pub vaddr: u64,
    pub iova: u64,
    pub size: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct DmaUnmap {
    pub argsz: u32,
    pub flags: u32,
    pub iova: u64,
    pub size: u64,
}

/// An info struct with room for the kernel's chain of capabilities. Their offsets count from the start of `head`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct WithCaps<H> {
    pub head: H,
    words: [u32; CAPS_WORDS],
}

impl<H> WithCaps<H> {
    pub(super) fn new(head: H) -> Self {
        Self { head, words: [0; CAPS_WORDS] }
    }

    /// The words of a capability, its two header words included (id and version; offset of the next), and all that follows it.
    pub(super) fn capability(&self, first_offset: u32, id: u16) -> Option<&[u32]> {
        let mut offset = first_offset;
        // Each step goes forward, so a chain that bites its tail ends.
        loop {
            let at = (offset as usize).checked_sub(size_of::<H>())? / 4;
            let words = self.words.get(at..).filter(|words| words.len() > 1)?;
            if words[0] as u16 == id {
                return Some(words);
            }
            if words[1] <= offset {
                return None;
            }
            offset = words[1];
        }
    }
}

macro_rules! sized {
    ($($struct:ty, $bytes:expr, $argsz:ident $(. $field:ident)?;)*) => { $(
        const _: () = assert!(size_of::<$struct>() == $bytes);
        // SAFETY: `repr(C)` integers that leave no gap (the size above says so), `argsz` first.
        unsafe impl Sized32 for $struct {
            fn argsz(&self) -> u32 { self.$argsz $(. $field)? }
        }
    )* };
}
pub(super) use sized;

sized! {
    DeviceInfo, 24, argsz;
    IrqInfo, 16, argsz;
    IrqSet, 20 + 4 * VECTORS_MAX, argsz;
    DmaMap, 32, argsz;
    DmaUnmap, 24, argsz;
    WithCaps<RegionInfo>, 32 + 4 * CAPS_WORDS, head.argsz;
    WithCaps<IommuInfo>, 24 + 4 * CAPS_WORDS, head.argsz;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_are_the_kernels() {
        assert_eq!(GET_DEVICE_INFO.number, 0x3b6b);
        assert_eq!(DEVICE_RESET, 0x3b6f);
        assert_eq!(GET_IOMMU_INFO.number, 0x3b70);
        assert_eq!(MAP_DMA.number, 0x3b71);
        assert_eq!(UNMAP_DMA.number, 0x3b72);
    }

    #[test]
    fn a_chain_of_capabilities_is_followed_and_a_bad_one_ends() {
        let mut info = WithCaps::new(IommuInfo::default());
        // At 24: id 3, next at 40. At 40: id 1.
        info.words[..6].copy_from_slice(&[3, 40, 7, 0, 1 | 1 << 16, 0]);
        assert_eq!(info.capability(24, 1).map(|words| words[0]), Some(1 | 1 << 16));
        assert_eq!(info.capability(24, 3).map(|words| words[2]), Some(7));
        assert!(info.capability(24, 9).is_none(), "the end");
        info.words[1] = 24;
        assert!(info.capability(24, 1).is_none(), "it leads back");
        info.words[1] = 1 << 20;
        assert!(info.capability(24, 1).is_none(), "it leads outside");
        assert!(info.capability(0, 3).is_none(), "it lies inside of the head");
    }
}
