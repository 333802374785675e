//! iommufd's structs and ioctl numbers (`linux/iommufd.h`), and the two that bring a VFIO device to it (`linux/vfio.h`). As with VFIO's,
//! each struct says its own size first.

use super::abi::{Sized32, VfioCall, sized};

/// Counted from VFIO's first number: both use the same letter.
const IOMMUFD_BASE: libc::c_ulong = 0x80 - 100;

pub(super) const DEVICE_BIND: VfioCall<DeviceBind> = VfioCall::new("VFIO_DEVICE_BIND_IOMMUFD", 18);
pub(super) const DEVICE_ATTACH: VfioCall<DeviceAttach> = VfioCall::new("VFIO_DEVICE_ATTACH_IOMMUFD_PT", 19);
pub(super) const DESTROY: VfioCall<Destroy> = VfioCall::new("IOMMU_DESTROY", IOMMUFD_BASE);
pub(super) const IOAS_ALLOC: VfioCall<IoasAlloc> = VfioCall::new("IOMMU_IOAS_ALLOC", IOMMUFD_BASE + 1);
pub(super) const IOAS_COPY: VfioCall<IoasCopy> = VfioCall::new("IOMMU_IOAS_COPY", IOMMUFD_BASE + 3);
pub(super) const IOAS_IOVA_RANGES: VfioCall<IoasIovaRanges> = VfioCall::new("IOMMU_IOAS_IOVA_RANGES", IOMMUFD_BASE + 4);
pub(super) const IOAS_MAP: VfioCall<IoasMap> = VfioCall::new("IOMMU_IOAS_MAP", IOMMUFD_BASE + 5);
pub(super) const IOAS_UNMAP: VfioCall<IoasUnmap> = VfioCall::new("IOMMU_IOAS_UNMAP", IOMMUFD_BASE + 6);

pub(super) const MAP_AT_IOVA: u32 = 1;
pub(super) const MAP_WRITE: u32 = 2;
pub(super) const MAP_READ: u32 = 4;

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct DeviceBind {
    pub argsz: u32,
    pub flags: u32,
    pub iommufd: i32,
    pub out_devid: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct DeviceAttach {
    pub argsz: u32,
    pub flags: u32,
    pub pt_id: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Destroy {
    pub size: u32,
    pub id: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct IoasAlloc {
    pub size: u32,
    pub flags: u32,
    pub out_ioas_id: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct IoasCopy {
    pub size: u32,
    pub flags: u32,
    pub dst_ioas_id: u32,
    pub src_ioas_id: u32,
    pub length: u64,
    pub dst_iova: u64,
    pub src_iova: u64,
}

/// Start and last address.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct IovaSpan {
    pub start: u64,
    pub last: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct IoasIovaRanges {
    pub size: u32,
    pub ioas_id: u32,
    pub num_iovas: u32,
    pub reserved: u32,
    /// Address of `num_iovas` spans.
    pub allowed_iovas: u64,
    pub out_iova_alignment: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct IoasMap {
    pub size: u32,
    pub flags: u32,
    pub ioas_id: u32,
    pub reserved: u32,
    pub user_va: u64,
    pub length: u64,
    pub iova: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct IoasUnmap {
    pub size: u32,
    pub ioas_id: u32,
    pub iova: u64,
    pub length: u64,
}

sized! {
    DeviceBind, 16, argsz;
    DeviceAttach, 12, argsz;
    Destroy, 8, size;
    IoasAlloc, 12, size;
    IoasCopy, 40, size;
    IoasIovaRanges, 32, size;
    IoasMap, 40, size;
    IoasUnmap, 24, size;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_are_the_kernels() {
        assert_eq!(DEVICE_BIND.number, 0x3b76);
        assert_eq!(DEVICE_ATTACH.number, 0x3b77);
        assert_eq!(DESTROY.number, 0x3b80);
        assert_eq!(IOAS_ALLOC.number, 0x3b81);
        assert_eq!(IOAS_COPY.number, 0x3b83);
        assert_eq!(IOAS_IOVA_RANGES.number, 0x3b84);
        assert_eq!(IOAS_MAP.number, 0x3b85);
        assert_eq!(IOAS_UNMAP.number, 0x3b86);
    }
}
