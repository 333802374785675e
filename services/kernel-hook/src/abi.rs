//! Kernel structs and ioctl numbers of 6.18, written down here because a distribution's headers are often older.
//! The size of each struct is part of its ioctl number, so a wrong layout is refused by the kernel; the asserts find it earlier.

use crate::sys::{Dir, Ioctl};

pub(crate) const UFFD_API: u64 = 0xAA;
pub(crate) const UFFD_USER_MODE_ONLY: libc::c_int = 1;
/// `ioctl(/dev/userfaultfd, USERFAULTFD_IOC_NEW, flags)`: no struct, the flags are the argument itself.
pub(crate) const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xAA00;

pub(crate) const EVENT_PAGEFAULT: u8 = 0x12;
pub(crate) const EVENT_FORK: u8 = 0x13;
pub(crate) const EVENT_REMAP: u8 = 0x14;
pub(crate) const EVENT_REMOVE: u8 = 0x15;
pub(crate) const EVENT_UNMAP: u8 = 0x16;

pub(crate) const PAGEFAULT_WRITE: u64 = 1;
pub(crate) const PAGEFAULT_WP: u64 = 2;
pub(crate) const PAGEFAULT_MINOR: u64 = 4;

pub(crate) const COPY_DONTWAKE: u64 = 1;
pub(crate) const COPY_WP: u64 = 2;
pub(crate) const ZEROPAGE_DONTWAKE: u64 = 1;
pub(crate) const CONTINUE_DONTWAKE: u64 = 1;
pub(crate) const CONTINUE_WP: u64 = 2;
pub(crate) const WRITEPROTECT_WP: u64 = 1;
pub(crate) const WRITEPROTECT_DONTWAKE: u64 = 2;
pub(crate) const MOVE_ALLOW_SRC_HOLES: u64 = 2;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UffdioApi {
    pub api: u64,
    pub features: u64,
    pub ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UffdioRange {
    pub start: u64,
    pub len: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UffdioRegister {
    pub range: UffdioRange,
    pub mode: u64,
    pub ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UffdioCopy {
    pub dst: u64,
    pub src: u64,
    pub len: u64,
    pub mode: u64,
    pub copy: i64,
}

/// ZEROPAGE, CONTINUE and POISON share this shape; only the last field's name differs in the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UffdioFill {
    pub range: UffdioRange,
    pub mode: u64,
    pub done: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UffdioMove {
    pub dst: u64,
    pub src: u64,
    pub len: u64,
    pub mode: u64,
    pub moved: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UffdioWriteprotect {
    pub range: UffdioRange,
    pub mode: u64,
}

/// One message of a userfaultfd. `arg` is a union in the kernel; which fields count follows from `event`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UffdMsg {
    pub event: u8,
    pub reserved1: u8,
    pub reserved2: u16,
    pub reserved3: u32,
    pub arg: [u64; 3],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ProcmapQuery {
    pub size: u64,
    pub query_flags: u64,
    pub query_addr: u64,
    pub vma_start: u64,
    pub vma_end: u64,
    pub vma_flags: u64,
    pub vma_page_size: u64,
    pub vma_offset: u64,
    pub inode: u64,
    pub dev_major: u32,
    pub dev_minor: u32,
    pub vma_name_size: u32,
    pub build_id_size: u32,
    pub vma_name_addr: u64,
    pub build_id_addr: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PmScanArg {
    pub size: u64,
    pub flags: u64,
    pub start: u64,
    pub end: u64,
    pub walk_end: u64,
    pub vec: u64,
    pub vec_len: u64,
    pub max_pages: u64,
    pub category_inverted: u64,
    pub category_mask: u64,
    pub category_anyof_mask: u64,
    pub return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageRegion {
    pub start: u64,
    pub end: u64,
    pub categories: u64,
}

const _: () = {
    assert!(size_of::<UffdioApi>() == 24);
    assert!(size_of::<UffdioRange>() == 16);
    assert!(size_of::<UffdioRegister>() == 32);
    assert!(size_of::<UffdioCopy>() == 40);
    assert!(size_of::<UffdioFill>() == 32);
    assert!(size_of::<UffdioMove>() == 40);
    assert!(size_of::<UffdioWriteprotect>() == 24);
    assert!(size_of::<UffdMsg>() == 32);
    assert!(size_of::<ProcmapQuery>() == 104);
    assert!(size_of::<PmScanArg>() == 96);
    assert!(size_of::<PageRegion>() == 24);
};

pub(crate) const UFFDIO_API: Ioctl<UffdioApi> = Ioctl::new(Dir::ReadWrite, 0xAA, 0x3F);
pub(crate) const UFFDIO_REGISTER: Ioctl<UffdioRegister> = Ioctl::new(Dir::ReadWrite, 0xAA, 0x00);
pub(crate) const UFFDIO_UNREGISTER: Ioctl<UffdioRange> = Ioctl::new(Dir::Read, 0xAA, 0x01);
pub(crate) const UFFDIO_WAKE: Ioctl<UffdioRange> = Ioctl::new(Dir::Read, 0xAA, 0x02);
pub(crate) const UFFDIO_COPY: Ioctl<UffdioCopy> = Ioctl::new(Dir::ReadWrite, 0xAA, 0x03);
pub(crate) const UFFDIO_ZEROPAGE: Ioctl<UffdioFill> = Ioctl::new(Dir::ReadWrite, 0xAA, 0x04);
pub(crate) const UFFDIO_MOVE: Ioctl<UffdioMove> = Ioctl::new(Dir::ReadWrite, 0xAA, 0x05);
pub(crate) const UFFDIO_WRITEPROTECT: Ioctl<UffdioWriteprotect> = Ioctl::new(Dir::ReadWrite, 0xAA, 0x06);
pub(crate) const UFFDIO_CONTINUE: Ioctl<UffdioFill> = Ioctl::new(Dir::ReadWrite, 0xAA, 0x07);
pub(crate) const UFFDIO_POISON: Ioctl<UffdioFill> = Ioctl::new(Dir::ReadWrite, 0xAA, 0x08);
pub(crate) const PAGEMAP_SCAN: Ioctl<PmScanArg> = Ioctl::new(Dir::ReadWrite, b'f', 16);
pub(crate) const PROCMAP_QUERY: Ioctl<ProcmapQuery> = Ioctl::new(Dir::ReadWrite, b'f', 17);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_are_the_kernels() {
        // Spelled out so that a change of the encoding in `Ioctl::new` shows up.
        assert_eq!(UFFDIO_API.number(), 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER.number(), 0xc020_aa00);
        assert_eq!(UFFDIO_WAKE.number(), 0x8010_aa02);
        assert_eq!(UFFDIO_COPY.number(), 0xc028_aa03);
        assert_eq!(PAGEMAP_SCAN.number(), 0xc060_6610);
        assert_eq!(PROCMAP_QUERY.number(), 0xc068_6611);
    }
}
