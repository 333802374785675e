//! The MMU of one device thread: virtual addresses to frames (or to system pages in place), one page at a time.
//!
//! ```text
//!   access(addr): region (cached) -> gate: enter -> load entry -> touch (accessed, dirty) -> copy the bytes -> leave
//!                                                      |
//!                     invalid or not writable ---------+--> leave -> suspend until resumed -> forget the region -> again
//! ```
//! A gate section covers one access inside one page, at most 4 KiB, and nothing in it can block (but the read or write of a file that
//! stays in place, whose pages never change their owner): so whoever revokes a page never
//! waits long for this thread. The entry is loaded anew for every access; only the region is remembered.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use uhmm_driver_kit::{AddressSpaces, FilePages, MappedRegion, PAGE_BYTES, SystemPages};
use uhmm_ipc::message::{ErrorCode, WireError};
use uhmm_ipc::shared::gate::Slot;
use uhmm_kernel_hook::{HookError, MappedBytes, Window};

use crate::kernels::{DeviceView, KernelResult, invalid, page_pieces};

/// Where a device thread waits for its faults.
pub trait Suspend {
    /// Reports the fault and sleeps. `Ok`: touch the page again.
    fn suspend(&self, addr: u64, write: bool) -> KernelResult<()>;

    /// Why the job is to end, if it is cancelled.
    fn cancelled(&self) -> WireError;
}

/// See the module head.
pub struct Mmu<'a> {
    space: u64,
    memory: &'a Window,
    spaces: &'a AddressSpaces,
    slot: &'a mut Slot,
    suspend: &'a dyn Suspend,
    cancel: &'a AtomicBool,
    region: Option<Arc<MappedRegion>>,
    /// For pages of files.
    scratch: Option<Window>,
    fault_count: u64,
}

impl std::fmt::Debug for Mmu<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mmu(space {}, {} faults)", self.space, self.fault_count)
    }
}

impl<'a> Mmu<'a> {
    /// For one job. `cancel` is looked at before every access.
    pub fn new(
        space: u64,
        memory: &'a Window,
        spaces: &'a AddressSpaces,
        slot: &'a mut Slot,
        suspend: &'a dyn Suspend,
        cancel: &'a AtomicBool,
    ) -> Self {
        Self { space, memory, spaces, slot, suspend, cancel, region: None, scratch: None, fault_count: 0 }
    }

    /// Faults so far.
    pub fn fault_count(&self) -> u64 {
        self.fault_count
    }

    /// One access of `len` bytes inside one page: `act` gets the memory and the offset of `addr` in it, and must not block.
    fn access<R>(
        &mut self,
        addr: u64,
        len: usize,
        right: Right,
        mut act: impl FnMut(&MappedBytes, u64) -> Result<R, HookError>,
    ) -> KernelResult<R> {
        loop {
            if self.cancel.load(Ordering::Acquire) {
                return Err(self.suspend.cancelled());
            }
            match self.try_access(addr, len, right, &mut act) {
                Some(result) => return result.map_err(|failure| failure.at(addr)),
                None => {
                    // The region may have been detached: look it up again after the fault.
                    self.region = None;
                    self.fault_count += 1;
                    self.suspend.suspend(addr, right != Right::Read)?;
                }
            }
        }
    }

    /// `None`: a fault.
    fn try_access<R>(
        &mut self,
        addr: u64,
        len: usize,
        right: Right,
        act: &mut impl FnMut(&MappedBytes, u64) -> Result<R, HookError>,
    ) -> Option<Result<R, AccessError>> {
        if self.region.as_ref().is_none_or(|region| region.page_of(addr).is_none()) {
            self.region = self.spaces.find(self.space, addr);
        }
        let region = self.region.as_deref()?;
        let page = region.page_of(addr)?;
        let _inside = self.slot.enter();
        let pte = region.table.touch(page, region.table.load(page), right != Right::Read)?;
        let offset = addr % PAGE_BYTES;
        Some(match pte.frame_number() {
            Some(frame) => act(self.memory, u64::from(frame) * PAGE_BYTES + offset).map_err(AccessError::from),
            None => match &region.system {
                SystemPages::Mapped(window) => act(window, page * PAGE_BYTES + offset).map_err(AccessError::from),
                SystemPages::File(file) => {
                    let place = FilePlace { file, at: page * PAGE_BYTES + offset, offset, len };
                    place.access(&mut self.scratch, right, act)
                }
                SystemPages::Private => return None,
            },
        })
    }
}

/// What an access does to the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Right {
    Read,
    Write,
    /// Reads and writes in one step.
    Atomic,
}

/// Why bytes behind a mapped address were out of reach.
#[derive(Debug, thiserror::Error)]
enum AccessError {
    #[error("Device memory cannot be accessed: {0}")]
    Memory(#[from] HookError),
    #[error("It lies behind the end of its file")]
    BehindEnd,
    #[error("Its file failed: {0}")]
    File(std::io::Error),
    #[error("It is a page of a file that stays in place, where nothing can be changed atomically")]
    NotAtomic,
}

impl AccessError {
    fn at(&self, addr: u64) -> WireError {
        let code = match self {
            Self::File(error) if error.kind() == std::io::ErrorKind::StorageFull => ErrorCode::NoMemory,
            Self::Memory(_) | Self::File(_) => ErrorCode::Io,
            Self::BehindEnd => ErrorCode::Fault,
            Self::NotAtomic => ErrorCode::Invalid,
        };
        WireError::new(code, format!("Device access of address {addr:#x} failed: {self}"))
    }
}

impl From<std::io::Error> for AccessError {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::UnexpectedEof { Self::BehindEnd } else { Self::File(error) }
    }
}

/// Bytes of a page that is read and written through its file.
struct FilePlace<'a> {
    file: &'a FilePages,
    /// In the region.
    at: u64,
    /// In the page.
    offset: u64,
    len: usize,
}

impl FilePlace<'_> {
    /// Exactly these bytes, by way of a scratch page that `act` sees at the same offset.
    fn access<R>(
        &self,
        scratch: &mut Option<Window>,
        right: Right,
        act: &mut impl FnMut(&MappedBytes, u64) -> Result<R, HookError>,
    ) -> Result<R, AccessError> {
        let page = match scratch {
            Some(page) => page,
            none => none.insert(Window::anonymous(PAGE_BYTES)?),
        };
        let mut bytes = [0; PAGE_BYTES as usize];
        let bytes = &mut bytes[..self.len];
        match right {
            Right::Atomic => Err(AccessError::NotAtomic),
            Right::Read => {
                self.file.read(self.at, bytes)?;
                page.write(self.offset, bytes)?;
                Ok(act(page, self.offset)?)
            }
            Right::Write => {
                let result = act(page, self.offset)?;
                page.read(self.offset, bytes)?;
                self.file.write(self.at, bytes)?;
                Ok(result)
            }
        }
    }
}

impl DeviceView for Mmu<'_> {
    fn read(&mut self, addr: u64, out: &mut [u8]) -> KernelResult<()> {
        let mut rest = out;
        for (at, len) in page_pieces(addr, rest.len() as u64)? {
            let (piece, later) = rest.split_at_mut(len);
            self.access(at, len, Right::Read, |bytes, offset| bytes.read(offset, piece))?;
            rest = later;
        }
        Ok(())
    }

    fn write(&mut self, addr: u64, bytes: &[u8]) -> KernelResult<()> {
        let mut rest = bytes;
        for (at, len) in page_pieces(addr, bytes.len() as u64)? {
            let (piece, later) = rest.split_at(len);
            self.access(at, len, Right::Write, |bytes, offset| bytes.write(offset, piece))?;
            rest = later;
        }
        Ok(())
    }

    fn load_u64(&mut self, addr: u64) -> KernelResult<u64> {
        if addr.is_multiple_of(8) {
            return self.access(addr, 8, Right::Read, |bytes, offset| bytes.load_u64(offset));
        }
        let mut bytes = [0; 8];
        self.read(addr, &mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn store_u64(&mut self, addr: u64, value: u64) -> KernelResult<()> {
        if addr.is_multiple_of(8) {
            return self.access(addr, 8, Right::Write, |bytes, offset| bytes.store_u64(offset, value));
        }
        self.write(addr, &value.to_ne_bytes())
    }

    fn fetch_add_u64(&mut self, addr: u64, value: u64) -> KernelResult<u64> {
        if !addr.is_multiple_of(8) {
            return invalid(format!("Atomic access at {addr:#x}: the address must be a multiple of 8"));
        }
        self.access(addr, 8, Right::Atomic, |bytes, offset| {
            Ok(bytes.atomic_u64(offset)?.fetch_add(value, Ordering::SeqCst))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::Arc;

    use uhmm_driver_kit::{DeviceError, DevicePageTable, PageRange, RegionKey, RegionMap, SharedTable};
    use uhmm_ipc::message::pager::{MapKind, MapRun, Memory};
    use uhmm_kernel_hook::huge_pool::{HUGE_BYTES, HugePool, huge_memfd};
    use uhmm_kernel_hook::memfd;

    use super::*;

    const KEY: RegionKey = RegionKey { space: 1, region: 2 };
    const AT: u64 = 0x5000_0000;
    const PAGES: u64 = 8;

    /// Resolves every fault at once, with frames in reverse order; the last pages in place.
    struct Resolver {
        table: RefCell<SharedTable>,
        region: RegionMap,
        faults: RefCell<Vec<(u64, bool)>>,
        attach_late: bool,
    }

    fn mapping(page: u64, writable: bool) -> MapRun {
        let kind = if page < 6 { MapKind::Frame(20 - page as u32) } else { MapKind::System };
        MapRun { first_page: page, page_count: 1, kind, writable }
    }

    impl Resolver {
        fn new(attach_late: bool) -> Result<Self, DeviceError> {
            let memory = Arc::new(memfd::create_sealed("uhmm-test", PAGES * PAGE_BYTES)?);
            let memory = Memory::Sealed { memory, offset_bytes: 0 };
            let region = RegionMap { key: KEY, addr: AT, page_count: PAGES, device_read_only: false, memory };
            let mut table = SharedTable::create(1, false)?;
            if !attach_late {
                table.attach(&region)?;
            }
            Ok(Self { table: RefCell::new(table), region, faults: RefCell::default(), attach_late })
        }
    }

    impl Suspend for Resolver {
        fn suspend(&self, addr: u64, write: bool) -> KernelResult<()> {
            let mut faults = self.faults.borrow_mut();
            faults.push((addr, write));
            let mut table = self.table.borrow_mut();
            if self.attach_late && faults.len() == 1 {
                table.attach(&self.region).expect("region attaches");
                return Ok(());
            }
            let page = (addr - AT) / PAGE_BYTES;
            if page >= PAGES {
                return Err(WireError::new(ErrorCode::Fault, format!("Nothing at {addr:#x}")));
            }
            let nonce = faults.len() as u32;
            let pages = PageRange { first: page, count: 1 };
            table.begin(KEY, pages, nonce, write.then_some(pages)).expect("region is attached");
            table.install(KEY, nonce, &[mapping(page, write)]).expect("region is attached");
            Ok(())
        }

        fn cancelled(&self) -> WireError {
            WireError::new(ErrorCode::Stale, "Cancelled")
        }
    }

    fn with_mmu<R>(
        resolver: &Resolver,
        memory: &Window,
        cancel: &AtomicBool,
        act: impl FnOnce(&mut Mmu<'_>) -> R,
    ) -> Result<R, DeviceError> {
        let (spaces, slot) = {
            let table = resolver.table.borrow();
            (table.spaces(), table.slot(0))
        };
        let mut slot = slot.ok_or("The gate has a slot")?;
        Ok(act(&mut Mmu::new(1, memory, &spaces, &mut slot, resolver, cancel)))
    }

    #[test]
    fn bytes_cross_pages_frames_and_system_memory_as_one_range() -> Result<(), DeviceError> {
        let resolver = Resolver::new(true)?;
        let memory = Window::anonymous(32 * PAGE_BYTES)?;
        let Memory::Sealed { memory: fd, .. } = &resolver.region.memory else { return Err("a memfd".into()) };
        let system =
            Window::map(std::os::fd::AsFd::as_fd(fd), 0, PAGES * PAGE_BYTES, uhmm_kernel_hook::Prot::ReadWrite)?;
        let data: Vec<u8> = (0..3 * 4096 + 100).map(|i| (i % 251) as u8).collect();
        let start = AT + 4 * PAGE_BYTES - 50;
        let read = with_mmu(&resolver, &memory, &AtomicBool::new(false), |mmu| {
            mmu.write(start, &data)?;
            let mut back = vec![0; data.len()];
            mmu.read(start, &mut back)?;
            // One fault for the unknown region, one for each of the pages 3..=7; none for reading it all back.
            assert_eq!(mmu.fault_count(), 6);
            Ok::<_, WireError>(back)
        })??;
        assert_eq!(read, data);
        assert_eq!(memory.load_u8(17 * PAGE_BYTES + 4095 - 49 + 49)?, data[49], "page 3 is frame 17");
        assert_eq!(system.load_u8(6 * PAGE_BYTES)?, data[50 + 2 * 4096], "page 6 is in place");
        Ok(())
    }

    #[test]
    fn a_read_only_mapping_faults_again_for_the_write() -> Result<(), DeviceError> {
        let resolver = Resolver::new(false)?;
        let memory = Window::anonymous(32 * PAGE_BYTES)?;
        with_mmu(&resolver, &memory, &AtomicBool::new(false), |mmu| {
            assert_eq!(mmu.load_u64(AT + 8)?, 0);
            mmu.store_u64(AT + 8, 5)?;
            assert_eq!(mmu.fetch_add_u64(AT + 8, 3)?, 5);
            assert_eq!(mmu.load_u64(AT + 8)?, 8);
            Ok::<_, WireError>(())
        })??;
        assert_eq!(*resolver.faults.borrow(), [(AT + 8, false), (AT + 8, true)]);
        let entry = resolver.table.borrow().spaces().find(1, AT).ok_or("attached")?.table.load(0);
        assert!(entry.is_accessed() && entry.is_dirty());
        Ok(())
    }

    #[test]
    fn revoked_pages_fault_again_and_the_thread_is_outside_while_it_waits() -> Result<(), DeviceError> {
        let resolver = Resolver::new(false)?;
        let memory = Window::anonymous(32 * PAGE_BYTES)?;
        with_mmu(&resolver, &memory, &AtomicBool::new(false), |mmu| {
            mmu.store_u64(AT, 1)?;
            let mut table = resolver.table.borrow_mut();
            assert_eq!(table.revoke(KEY, PageRange { first: 0, count: 1 }).ok(), Some(true), "it was dirty");
            assert!(table.quiesce(1).is_ok(), "between two accesses nobody is inside");
            drop(table);
            assert_eq!(mmu.load_u64(AT)?, 1);
            assert_eq!(mmu.fault_count(), 2);
            Ok::<_, WireError>(())
        })??;
        Ok(())
    }

    #[test]
    fn wild_addresses_and_cancellation_end_the_access() -> Result<(), DeviceError> {
        let resolver = Resolver::new(false)?;
        let memory = Window::anonymous(32 * PAGE_BYTES)?;
        let cancel = AtomicBool::new(false);
        with_mmu(&resolver, &memory, &cancel, |mmu| {
            let wild = mmu.load_u64(AT + PAGES * PAGE_BYTES).map_err(|error| error.code);
            assert_eq!(wild, Err(ErrorCode::Fault));
            assert_eq!(mmu.fetch_add_u64(AT + 4, 1).map_err(|error| error.code), Err(ErrorCode::Invalid));
            assert_eq!(mmu.read(u64::MAX - 4, &mut [0; 8]).map_err(|error| error.code), Err(ErrorCode::Fault));
            cancel.store(true, Ordering::Release);
            assert_eq!(mmu.load_u64(AT).map_err(|error| error.code), Err(ErrorCode::Stale));
        })
    }

    #[test]
    fn a_file_is_read_and_written_by_exactly_the_bytes_and_never_added_to() -> Result<(), DeviceError> {
        let mut resolver = Resolver::new(true)?;
        let file = Arc::new(memfd::create_sealed("uhmm-test-file", PAGES * PAGE_BYTES - 100)?);
        let seen = FilePages::new(file.clone(), 0, PAGES * PAGE_BYTES)?;
        // The region begins at page 1 of the file; its pages 6 and 7 are mapped in place, and 7 is behind the end.
        resolver.region.memory = Memory::File { file, offset_bytes: PAGE_BYTES };
        let memory = Window::anonymous(32 * PAGE_BYTES)?;
        let at = AT + 6 * PAGE_BYTES;
        with_mmu(&resolver, &memory, &AtomicBool::new(false), |mmu| {
            mmu.write(at + 5, &[7; 20])?;
            mmu.store_u64(at + 64, 99)?;
            assert_eq!((mmu.load_u64(at + 64)?, mmu.load_u32(at + 22)?), (99, 0x0007_0707));
            assert_eq!(mmu.fetch_add_u64(at + 64, 1).map_err(|error| error.code), Err(ErrorCode::Invalid));
            assert_eq!(mmu.load_u64(at + PAGE_BYTES).map_err(|error| error.code), Err(ErrorCode::Fault));
            assert_eq!(mmu.store_u64(at + PAGE_BYTES, 1).map_err(|error| error.code), Err(ErrorCode::Fault));
            Ok::<_, WireError>(())
        })??;
        let mut bytes = [0; 72];
        seen.read(7 * PAGE_BYTES, &mut bytes)?;
        assert_eq!((bytes[4], bytes[5], bytes[24], bytes[25], bytes[64]), (0, 7, 7, 0, 99));
        Ok(())
    }

    #[test]
    fn integration_huge_pages_of_a_file_are_written_by_kernels_and_an_empty_pool_is_no_crash() -> Result<(), DeviceError>
    {
        let pool = match HugePool::reserve(2) {
            Ok(pool) => pool,
            Err(error) => {
                eprintln!("skipped: {error}");
                return Ok(());
            }
        };
        let mut resolver = Resolver::new(true)?;
        let file = Arc::new(huge_memfd(2 * HUGE_BYTES)?);
        let seen = FilePages::new(file.clone(), 0, HUGE_BYTES)?;
        // Pages 6 and 7 are mapped in place: the last one of a huge page, which is there, and the first one of a hole.
        resolver.region.memory = Memory::File { file, offset_bytes: HUGE_BYTES - 7 * PAGE_BYTES };
        let memory = Window::anonymous(32 * PAGE_BYTES)?;
        let at = AT + 7 * PAGE_BYTES;
        seen.write(0, &[1])?;
        let hog = uhmm_kernel_hook::program::ProgramMemory::hugetlb(pool.unclaimed()? * HUGE_BYTES)?;
        with_mmu(&resolver, &memory, &AtomicBool::new(false), |mmu| {
            mmu.write(at - 20, &[7; 20])?;
            assert_eq!((mmu.load_u64(at - 8)?, mmu.load_u64(at)?), (0x0707_0707_0707_0707, 0));
            assert_eq!(mmu.store_u64(at, 1).map_err(|error| error.code), Err(ErrorCode::NoMemory));
            assert_eq!(mmu.fetch_add_u64(at - 8, 1).map_err(|error| error.code), Err(ErrorCode::Invalid));
            drop(hog);
            mmu.store_u64(at, 5)?;
            assert_eq!(mmu.load_u64(at)?, 5);
            Ok::<_, WireError>(())
        })??;
        let mut bytes = [0; 24];
        seen.read(HUGE_BYTES - 24, &mut bytes)?;
        assert_eq!((&bytes[..4], &bytes[4..]), (&[0; 4][..], &[7; 20][..]));
        Ok(())
    }

    #[test]
    fn a_frame_beyond_device_memory_is_an_io_error_and_not_a_crash() -> Result<(), DeviceError> {
        let resolver = Resolver::new(false)?;
        let memory = Window::anonymous(4 * PAGE_BYTES)?;
        with_mmu(&resolver, &memory, &AtomicBool::new(false), |mmu| {
            assert_eq!(mmu.load_u64(AT).map_err(|error| error.code), Err(ErrorCode::Io));
        })
    }
}
