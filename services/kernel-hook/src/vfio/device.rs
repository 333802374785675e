//! The device: regions, interrupts, reset.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::abi::{self, DeviceInfo, IrqInfo, IrqSet, RegionInfo, WithCaps};

/// A region of the device's descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Bytes; 0: the device has no such region.
    pub len: u64,
    /// Where in the descriptor it begins.
    pub offset: u64,
    /// All of it can be mapped.
    pub mappable: bool,
}

/// VFIO's interrupt indices of a PCI device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Irq {
    /// Message-signalled.
    Msi = 1,
    /// Message-signalled, with a table.
    Msix = 2,
    /// Error of the link or the device.
    Error = 3,
    /// The kernel wants the device back.
    Request = 4,
}

/// An open PCI device in a container.
#[derive(Clone, Debug)]
pub struct VfioDevice {
    fd: Arc<OwnedFd>,
    can_reset: bool,
}

impl VfioDevice {
    /// Takes an open device.
    ///
    /// # Errors
    /// The kernel's; ENODEV for what is no PCI device.
    pub fn new(fd: Arc<OwnedFd>) -> io::Result<Self> {
        let mut info = DeviceInfo { argsz: size_of::<DeviceInfo>() as u32, ..DeviceInfo::default() };
        // SAFETY: no addresses inside.
        unsafe { abi::GET_DEVICE_INFO.call(fd.as_fd(), &mut info) }?;
        if info.flags & abi::DEVICE_IS_PCI == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        Ok(Self { fd, can_reset: info.flags & abi::DEVICE_CAN_RESET != 0 })
    }

    /// Its descriptor. Regions can be mapped from it.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// A reset is more than an error.
    pub fn can_reset(&self) -> bool {
        self.can_reset
    }

    /// A region by VFIO's number (BARs 0 to 5, config space 7).
    ///
    /// # Errors
    /// The kernel's.
    pub fn region(&self, index: u32) -> io::Result<Region> {
        let argsz = size_of::<WithCaps<RegionInfo>>() as u32;
        let mut info = WithCaps::new(RegionInfo { argsz, index, ..RegionInfo::default() });
        // SAFETY: no addresses inside.
        unsafe { abi::GET_REGION_INFO.call(self.fd.as_fd(), &mut info) }?;
        let RegionInfo { flags, size, offset, cap_offset, .. } = info.head;
        let has_caps = flags & abi::REGION_HAS_CAPS != 0;
        let holes = has_caps && info.capability(cap_offset, abi::REGION_CAP_SPARSE_MMAP).is_some();
        Ok(Region { len: size, offset, mappable: flags & abi::REGION_CAN_MMAP != 0 && !holes })
    }

    /// Reads all of `bytes`, in one access where the length is 1, 2, 4 or 8 and the offset a multiple of it.
    ///
    /// # Errors
    /// The kernel's; `UnexpectedEof` outside of the region.
    pub fn read(&self, region: &Region, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let done = rustix::io::pread(&self.fd, &mut *bytes, region.offset + offset)?;
        if done == bytes.len() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Writes all of `bytes`, in one access as for reads.
    ///
    /// # Errors
    /// As [`VfioDevice::read`].
    pub fn write(&self, region: &Region, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let done = rustix::io::pwrite(&self.fd, bytes, region.offset + offset)?;
        if done == bytes.len() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Vectors of this kind; 0 for a kind that the device does not have.
    pub fn irq_count(&self, irq: Irq) -> u32 {
        let mut info = IrqInfo { argsz: size_of::<IrqInfo>() as u32, index: irq as u32, ..IrqInfo::default() };
        // SAFETY: no addresses inside.
        let known = unsafe { abi::GET_IRQ_INFO.call(self.fd.as_fd(), &mut info) };
        // The kernel answers EINVAL for kinds that this device has not.
        if known.is_ok() { info.count } else { 0 }
    }

    /// Vector n signals `events[n]`. None: the kind is switched off. The kernel keeps the eventfds, whoever closes them here.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_irqs(&self, irq: Irq, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        if events.len() > abi::VECTORS_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let single = matches!(irq, Irq::Error | Irq::Request);
        let mut eventfds = [-1; abi::VECTORS_MAX];
        for (slot, event) in eventfds.iter_mut().zip(events) {
            *slot = event.as_raw_fd();
        }
        // MSI is switched off by setting no vector, the two others by setting "no eventfd".
        let (data, count) = match events.len() {
            0 if single => (abi::IRQ_DATA_EVENTFD, 1),
            0 => (abi::IRQ_DATA_NONE, 0),
            count => (abi::IRQ_DATA_EVENTFD, count as u32),
        };
        match self.set_call(irq, data, count, eventfds) {
            // The kernel's word for "it is off already".
            Err(error) if events.is_empty() && error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            set => set,
        }
    }

    /// Signals the eventfd of vector 0 as the device would: to test what hangs on it.
    ///
    /// # Errors
    /// The kernel's; EINVAL when it is not set.
    pub fn trigger_irq(&self, irq: Irq) -> io::Result<()> {
        self.set_call(irq, abi::IRQ_DATA_NONE, 1, [-1; abi::VECTORS_MAX])
    }

    fn set_call(&self, irq: Irq, data: u32, count: u32, eventfds: [i32; abi::VECTORS_MAX]) -> io::Result<()> {
        let (argsz, flags, index) = (size_of::<IrqSet>() as u32, abi::IRQ_TRIGGER | data, irq as u32);
        let mut set = IrqSet { argsz, flags, index, start: 0, count, eventfds };
        // SAFETY: descriptors are numbers; the kernel takes its own references to the eventfds.
        unsafe { abi::SET_IRQS.call(self.fd.as_fd(), &mut set) }.map(drop)
    }

    /// Function-level reset, or what the bus has for it.
    ///
    /// # Errors
    /// The kernel's; EINVAL or ENOTTY for a device that has none.
    pub fn reset(&self) -> io::Result<()> {
        // SAFETY: no argument.
        let rc = unsafe { libc::ioctl(self.fd.as_raw_fd(), abi::DEVICE_RESET) };
        if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
