use std::cell::RefCell;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use uhmm_driver_kit::{DeviceError, DevicePageTable, PageRange, RegionKey, RegionMap, SharedTable};
use uhmm_ipc::message::pager::{MapKind, MapRun, Memory};
use uhmm_kernel_hook::huge_pool::{HUGE_BYTES, HugePool, huge_memfd};
use uhmm_kernel_hook::memfd;

use super::*;
use crate::FramePort;

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
    frames: &mut UnitFrames,
    cancel: &AtomicBool,
    act: impl FnOnce(&mut Mmu<'_>) -> R,
) -> Result<R, DeviceError> {
    let (spaces, slot) = {
        let table = resolver.table.borrow();
        (table.spaces(), table.slot(0))
    };
    let mut slot = slot.ok_or("The gate has a slot")?;
    Ok(act(&mut Mmu::new(1, frames, &spaces, &mut slot, resolver, cancel)))
}

fn window(memory: &Arc<Window>) -> UnitFrames {
    UnitFrames::Window(memory.clone())
}

#[test]
fn bytes_cross_pages_frames_and_system_memory_as_one_range() -> Result<(), DeviceError> {
    let resolver = Resolver::new(true)?;
    let memory = Arc::new(Window::anonymous(32 * PAGE_BYTES)?);
    let Memory::Sealed { memory: fd, .. } = &resolver.region.memory else { return Err("a memfd".into()) };
    let system = Window::map(std::os::fd::AsFd::as_fd(fd), 0, PAGES * PAGE_BYTES, uhmm_kernel_hook::Prot::ReadWrite)?;
    let data: Vec<u8> = (0..3 * 4096 + 100).map(|i| (i % 251) as u8).collect();
    let start = AT + 4 * PAGE_BYTES - 50;
    let read = with_mmu(&resolver, &mut window(&memory), &AtomicBool::new(false), |mmu| {
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
    let memory = Arc::new(Window::anonymous(32 * PAGE_BYTES)?);
    with_mmu(&resolver, &mut window(&memory), &AtomicBool::new(false), |mmu| {
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
    let memory = Arc::new(Window::anonymous(32 * PAGE_BYTES)?);
    with_mmu(&resolver, &mut window(&memory), &AtomicBool::new(false), |mmu| {
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
    let memory = Arc::new(Window::anonymous(32 * PAGE_BYTES)?);
    let cancel = AtomicBool::new(false);
    with_mmu(&resolver, &mut window(&memory), &cancel, |mmu| {
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
    let memory = Arc::new(Window::anonymous(32 * PAGE_BYTES)?);
    let at = AT + 6 * PAGE_BYTES;
    with_mmu(&resolver, &mut window(&memory), &AtomicBool::new(false), |mmu| {
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
fn integration_huge_pages_of_a_file_are_written_by_kernels_and_an_empty_pool_is_no_crash() -> Result<(), DeviceError> {
    let pool = match HugePool::reserve(2) {
        Ok(pool) => pool,
        Err(error) => {
            eprintln!("skipped: {error}");
            return Ok(());
        }
    };
    let mut resolver = Resolver::new(true)?;
    let file = Arc::new(huge_memfd(2 * HUGE_BYTES)?);
    let punched = file.clone();
    let seen = FilePages::new(file.clone(), 0, HUGE_BYTES)?;
    // Pages 6 and 7 are mapped in place: the last one of a huge page, which is there, and the first one of a hole.
    resolver.region.memory = Memory::File { file, offset_bytes: HUGE_BYTES - 7 * PAGE_BYTES };
    let memory = Arc::new(Window::anonymous(32 * PAGE_BYTES)?);
    let at = AT + 7 * PAGE_BYTES;
    seen.write(0, &[1])?;
    let mut hog = pool.hog()?;
    let punch = || memfd::punch_hole(punched.as_fd(), HUGE_BYTES, HUGE_BYTES).expect("a hole is punched");
    with_mmu(&resolver, &mut window(&memory), &AtomicBool::new(false), |mmu| {
        mmu.write(at - 20, &[7; 20])?;
        assert_eq!((mmu.load_u64(at - 8)?, mmu.load_u64(at)?), (0x0707_0707_0707_0707, 0));
        let error = hog.starve(|| mmu.store_u64(at, 1), punch).expect("no page is left");
        assert_eq!(error.code, ErrorCode::NoMemory);
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
    let memory = Arc::new(Window::anonymous(4 * PAGE_BYTES)?);
    with_mmu(&resolver, &mut window(&memory), &AtomicBool::new(false), |mmu| {
        assert_eq!(mmu.load_u64(AT).map_err(|error| error.code), Err(ErrorCode::Io));
    })
}

/// A device that is late a few times, at reading or writing.
struct SlowPort {
    memory: Window,
    page: Window,
    late_loads: u32,
    late_stores: u32,
    patience: Duration,
}

impl SlowPort {
    fn late(left: &mut u32, patience: Duration) -> Result<(), DeviceError> {
        if *left == 0 {
            return Ok(());
        }
        *left -= 1;
        Err(Late { patience, reason: "It sleeps".to_owned() }.into())
    }
}

impl FramePort for SlowPort {
    fn page(&self) -> &Window {
        &self.page
    }

    fn load(&mut self, frame: u32, _: Range<u64>) -> Result<(), DeviceError> {
        Self::late(&mut self.late_loads, self.patience)?;
        let mut bytes = [0; PAGE_BYTES as usize];
        self.memory.read(u64::from(frame) * PAGE_BYTES, &mut bytes)?;
        Ok(self.page.write(0, &bytes)?)
    }

    fn store(&mut self, frame: u32, _: Range<u64>) -> Result<(), DeviceError> {
        Self::late(&mut self.late_stores, self.patience)?;
        let mut bytes = [0; PAGE_BYTES as usize];
        self.page.read(0, &mut bytes)?;
        Ok(self.memory.write(u64::from(frame) * PAGE_BYTES, &bytes)?)
    }
}

fn slow(late_loads: u32, late_stores: u32, patience: Duration) -> Result<UnitFrames, DeviceError> {
    let (memory, page) = (Window::anonymous(32 * PAGE_BYTES)?, Window::anonymous(PAGE_BYTES)?);
    Ok(UnitFrames::Port(Box::new(SlowPort { memory, page, late_loads, late_stores, patience }), Arc::default()))
}

#[test]
fn a_device_that_is_late_is_asked_again_and_an_addition_happens_once() -> Result<(), DeviceError> {
    let resolver = Resolver::new(false)?;
    with_mmu(&resolver, &mut slow(2, 3, Duration::from_secs(600))?, &AtomicBool::new(false), |mmu| {
        assert_eq!(mmu.fetch_add_u64(AT + 8, 3)?, 0);
        assert_eq!(mmu.load_u64(AT + 8)?, 3);
        assert_eq!(mmu.fault_count(), 1);
        Ok::<_, WireError>(())
    })??;
    Ok(())
}

#[test]
fn a_device_that_stays_late_ends_the_job() -> Result<(), DeviceError> {
    let resolver = Resolver::new(false)?;
    let error = with_mmu(&resolver, &mut slow(u32::MAX, 0, Duration::ZERO)?, &AtomicBool::new(false), |mmu| {
        mmu.load_u64(AT).expect_err("it never answers")
    })?;
    assert_eq!(error.code, ErrorCode::Io);
    assert!(error.text.contains("It sleeps"), "{error}");
    Ok(())
}

#[test]
fn a_job_that_waits_for_a_late_device_can_be_cancelled() -> Result<(), DeviceError> {
    let cancel = AtomicBool::new(false);
    let error = std::thread::scope(|scope| {
        let job = scope.spawn(|| {
            with_mmu(&Resolver::new(false)?, &mut slow(u32::MAX, 0, Duration::from_secs(600))?, &cancel, |mmu| {
                mmu.load_u64(AT).expect_err("it never answers")
            })
        });
        cancel.store(true, Ordering::Release);
        job.join().expect("no panic")
    })?;
    assert_eq!(error.code, ErrorCode::Stale);
    Ok(())
}
