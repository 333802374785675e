//! Coherent device memory: frames of a device stand in for pages of an allocated region, and the other way round.
//!
//! ```text
//!   MapDevice     aperture memfd --map elsewhere, DONTFORK--> stand-in ---mremap---> the pages' addresses
//!   UnmapDevice   region's memfd --map elsewhere, register--> stand-in ---mremap---> the pages' addresses
//! ```
//! The exchange is one step for every other thread. Only memory that the SDK itself has allocated is exchanged: nobody else may unmap
//! it, so the address cannot have become another's. Even so, what is not a mapping of the region or of a device is left alone.
//!
//! A child that is forked does not inherit frames, see `forking.rs`.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uhmm_ipc::message::Fd;
use uhmm_ipc::message::driver::CoherentMemory;
use uhmm_ipc::message::pager::FramesOp;
use uhmm_kernel_hook::own_memory::{self, RangeAdvice};
use uhmm_kernel_hook::pagemap;
use uhmm_kernel_hook::procmap::Vma;
use uhmm_kernel_hook::stand_in::StandIn;
use uhmm_kernel_hook::{AddrRange, HookError, PAGE_SIZE, RegisterMode, Userfaultfd};

/// A pager that is told of a failure asks again: not at once.
const FAILURE_PAUSE: Duration = Duration::from_millis(1);

/// Rights are read from a mapping and given to the one that takes its place: nobody changes them in between.
static RIGHTS: Mutex<()> = Mutex::new(());

/// Held while the rights of a range change.
pub(crate) fn rights_stay() -> MutexGuard<'static, ()> {
    RIGHTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One thing to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    /// Grows with every new order.
    pub id: u64,
    pub region: u64,
    pub first_page: u64,
    pub addr: u64,
    pub page_count: u64,
    pub op: FramesOp,
}

impl Order {
    fn whole(&self) -> AddrRange {
        AddrRange { start: self.addr, len: self.page_count * PAGE_SIZE }
    }
}

/// Where the session's allocated regions are, by region: known to the app's threads and to the link thread.
#[derive(Debug, Default)]
pub(crate) struct Allocations(Mutex<BTreeMap<u64, AddrRange>>);

impl Allocations {
    fn all(&self) -> MutexGuard<'_, BTreeMap<u64, AddrRange>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn insert(&self, region: u64, range: AddrRange) {
        self.all().insert(region, range);
    }

    pub(crate) fn remove(&self, region: u64) {
        self.all().remove(&region);
    }

    /// Where they are.
    pub(crate) fn ranges(&self) -> Vec<AddrRange> {
        self.all().values().copied().collect()
    }
}

/// An allocated region.
#[derive(Clone, Debug)]
pub(crate) struct Allocation {
    pub(crate) range: AddrRange,
    pub(crate) memory: Fd,
    /// Forked children inherit it.
    pub(crate) forks: bool,
}

/// See the module head. Lives on the link thread, whose descriptors it uses.
pub(crate) struct Frames {
    uffd: Option<Userfaultfd>,
    allocations: Arc<Allocations>,
    /// The same, with what they are made of.
    memories: BTreeMap<u64, Allocation>,
    /// Memory of coherent devices, by device and generation; also what a device had before, of which frames may be mapped.
    apertures: BTreeMap<(u8, u64), CoherentMemory>,
    /// Latest order.
    last_order: u64,
}

/// What shall be mapped at the first page of an order.
struct Wanted<'a> {
    memory: &'a Fd,
    offset: u64,
    /// The pager watches it.
    watched: bool,
    forks: bool,
}

impl Wanted<'_> {
    /// Offset in its file of an address of the order.
    fn offset_at(&self, order: &Order, addr: u64) -> u64 {
        self.offset + (addr - order.addr)
    }
}

impl Frames {
    /// A forked child's userfaultfd comes [later](Frames::know_uffd).
    pub(crate) fn new(uffd: Option<Userfaultfd>, allocations: Arc<Allocations>) -> Self {
        Self { uffd, allocations, memories: BTreeMap::new(), apertures: BTreeMap::new(), last_order: 0 }
    }

    pub(crate) fn know_uffd(&mut self, uffd: Userfaultfd) {
        self.uffd = Some(uffd);
    }

    /// A region was allocated.
    pub(crate) fn allocated(&mut self, region: u64, allocation: Allocation) {
        self.allocations.insert(region, allocation.range);
        self.memories.insert(region, allocation);
    }

    /// And was freed.
    pub(crate) fn freed(&mut self, region: u64) {
        self.allocations.remove(region);
        self.memories.remove(&region);
    }

    /// The allocation that an order is about, if its pages are where the order says.
    fn allocation_of(&self, order: &Order) -> Option<Allocation> {
        let allocation = self.memories.get(&order.region).cloned()?;
        let addr = allocation.range.start.checked_add(order.first_page.checked_mul(PAGE_SIZE)?)?;
        let inside = order.whole().end() <= allocation.range.end();
        (addr == order.addr && inside).then_some(allocation)
    }

    /// Does one thing. `false`: not all of its pages are as it says.
    pub(crate) fn run(&mut self, order: &Order) -> bool {
        let done = match order.op {
            FramesOp::MapDevice { device, frame, generation } => self.map_device(order, device, frame, generation),
            FramesOp::UnmapDevice => self.unmap_device(order).map(|()| true),
        };
        done.unwrap_or_else(|error| {
            tracing::warn!(%error, ?order, "Frames could not be exchanged as the pager asked");
            false
        })
    }

    /// The driver has given its memory.
    pub(crate) fn know_aperture(&mut self, memory: CoherentMemory) {
        self.apertures.insert((memory.device, memory.generation), memory);
    }

    /// An order that was carried out before and is sent again after a reconnect: what came after it may have been carried out too, so
    /// that nothing of it may be done any more.
    fn is_late(&mut self, order: &Order) -> bool {
        let late = order.id <= self.last_order;
        self.last_order = self.last_order.max(order.id);
        late
    }

    fn map_device(&mut self, order: &Order, device: u8, frame: u32, generation: u64) -> Result<bool, HookError> {
        let late = self.is_late(order);
        let aperture = self.apertures.get(&(device, generation));
        let (Some(allocation), Some(aperture)) = (self.allocation_of(order), aperture) else {
            return Ok(false);
        };
        let offset = aperture.memory.offset_bytes + u64::from(frame) * PAGE_SIZE;
        let wanted = Wanted { memory: &aperture.memory.fd, offset, watched: false, forks: false };
        let _unchanged = rights_stay();
        let missing = self.others(order, &allocation, &wanted)?;
        if missing.is_empty() {
            return Ok(true);
        }
        if late {
            return Ok(false);
        }
        self.exchange(order, &wanted, &missing)?;
        Ok(self.others(order, &allocation, &wanted)?.is_empty())
    }

    fn unmap_device(&mut self, order: &Order) -> Result<(), HookError> {
        self.is_late(order);
        if let Some(allocation) = self.allocation_of(order) {
            let offset = order.first_page * PAGE_SIZE;
            let wanted = Wanted { memory: &allocation.memory, offset, watched: true, forks: allocation.forks };
            let _unchanged = rights_stay();
            let done =
                self.others(order, &allocation, &wanted).and_then(|others| self.exchange(order, &wanted, &others));
            if done.is_err() {
                std::thread::park_timeout(FAILURE_PAUSE);
            }
            done?;
        }
        Ok(())
    }

    /// Mappings of the region or of a device inside the order's range that are not the wanted one, cut to the range.
    fn others(&self, order: &Order, allocation: &Allocation, wanted: &Wanted<'_>) -> Result<Vec<Vma>, HookError> {
        let whole = order.whole();
        let mut others = Vec::new();
        let mut next = whole.start;
        while next < whole.end() {
            let vmas = own_memory::mappings(AddrRange { start: next, len: whole.end() - next })?;
            for vma in &vmas {
                let identity = (vma.device, vma.inode);
                // Asked where the file has something: a device's has only its BARs.
                let is = |memory: &Fd, offset: u64| {
                    Ok::<bool, HookError>(own_memory::identity_of(memory, offset, PAGE_SIZE)? == identity)
                };
                let start = vma.start.max(whole.start);
                let part =
                    Vma { start, end: vma.end.min(whole.end()), offset: vma.offset + (start - vma.start), ..*vma };
                if !vma.shared {
                    continue;
                }
                if is(wanted.memory, wanted.offset)? {
                    if part.offset != wanted.offset_at(order, start) {
                        others.push(part);
                    }
                    continue;
                }
                let mut ours = is(&allocation.memory, 0)?;
                for aperture in self.apertures.values() {
                    ours = ours || is(&aperture.memory.fd, aperture.memory.offset_bytes)?;
                }
                if ours {
                    others.push(part);
                }
            }
            // Behind a hole, page by page.
            next = vmas.last().map_or(next, |vma| vma.end.max(next)) + PAGE_SIZE;
        }
        Ok(others)
    }

    fn exchange(&self, order: &Order, wanted: &Wanted<'_>, others: &[Vma]) -> Result<(), HookError> {
        let pagemap = pagemap::open_own_pagemap()?;
        for vma in others {
            let offset = wanted.offset_at(order, vma.start);
            let stand_in = StandIn::map(wanted.memory.as_fd(), offset, vma.end - vma.start, vma.read, vma.write)?;
            if !wanted.forks {
                own_memory::advise(stand_in.range(), RangeAdvice::DontFork)?;
            }
            if wanted.watched {
                let modes = RegisterMode::MISSING | RegisterMode::MINOR | RegisterMode::WP;
                let uffd = self.uffd.as_ref().ok_or(HookError::Strange {
                    call: "order about frames",
                    detail: "it came before the userfaultfd".into(),
                })?;
                uffd.register(stand_in.range(), modes)?;
            }
            // They are not the mapping's to lose.
            for guard in pagemap::guards(pagemap.as_fd(), vma.range())? {
                let start = stand_in.range().start + (guard.start - vma.start);
                own_memory::advise(AddrRange { start, ..guard }, RangeAdvice::GuardInstall)?;
            }
            stand_in.take_place_at(vma.start)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uhmm_ipc::message::Aperture;
    use uhmm_kernel_hook::{Features, ManagedMapping, Prot, Userfaultfd, Window, memfd};

    use super::*;

    const P: u64 = PAGE_SIZE;
    const GENERATION: u64 = 9;
    /// Device memory does not begin where its file does (a BAR).
    const SKIPPED: u64 = 4 * P;

    /// A region of eight pages and a device of sixteen frames. Nobody answers faults, so every page is there before.
    struct Bed {
        frames: Frames,
        mapping: ManagedMapping,
        device: Window,
        next_id: u64,
    }

    fn aperture(fd: &Fd) -> Aperture {
        Aperture { fd: fd.clone(), offset_bytes: SKIPPED }
    }

    impl Bed {
        fn new() -> Self {
            let (uffd, _) = Userfaultfd::create(None).unwrap();
            let shared = Features::MISSING_SHMEM.union(Features::MINOR_SHMEM).union(Features::WP_HUGETLBFS_SHMEM);
            uffd.api(shared.union(Features::PAGEFAULT_FLAG_WP)).unwrap();
            let memory: Fd = Arc::new(memfd::create_sealed("uhmm-test-region", 8 * P).unwrap());
            let frames: Fd = Arc::new(memfd::create_sealed("uhmm-test-vram", SKIPPED + 16 * P).unwrap());
            let mapping = ManagedMapping::map(memory.as_fd(), 8 * P, None).unwrap();
            (0..8).for_each(|page| mapping.store_u64(page * P, page).unwrap());
            let device = Window::map(frames.as_fd(), SKIPPED, 16 * P, Prot::ReadWrite).unwrap();
            let memory_of_device = aperture(&frames);
            let mut frames = Frames::new(Some(uffd), Arc::default());
            let range = AddrRange { start: mapping.addr(), len: 8 * P };
            frames.allocated(1, Allocation { range, memory, forks: false });
            frames.know_aperture(CoherentMemory { device: 3, generation: GENERATION, memory: memory_of_device });
            Self { frames, mapping, device, next_id: 1 }
        }

        fn order(&mut self, first_page: u64, page_count: u64, op: FramesOp) -> Order {
            self.next_id += 1;
            let addr = self.mapping.addr() + first_page * P;
            Order { id: self.next_id, region: 1, first_page, addr, page_count, op }
        }

        fn run(&mut self, order: &Order) -> bool {
            self.frames.run(order)
        }

        fn part(&self, first_page: u64, page_count: u64) -> AddrRange {
            AddrRange { start: self.mapping.addr() + first_page * P, len: page_count * P }
        }
    }

    fn map(frame: u32) -> FramesOp {
        FramesOp::MapDevice { device: 3, frame, generation: GENERATION }
    }

    #[test]
    fn frames_stand_in_for_pages_and_the_pages_come_back() {
        let mut bed = Bed::new();
        let order = bed.order(2, 4, map(5));
        // The second time there is nothing to do.
        for _ in 0..2 {
            assert!(bed.run(&order));
            bed.mapping.store_u64(3 * P, 77).unwrap();
            assert_eq!((bed.device.load_u64(6 * P).unwrap(), bed.mapping.load_u64(P).unwrap()), (77, 1));
        }
        let part = bed.order(3, 1, FramesOp::UnmapDevice);
        assert!(bed.run(&part));
        assert_eq!((bed.mapping.load_u64(3 * P).unwrap(), bed.mapping.load_u64(2 * P).unwrap()), (3, 0));
        let all = bed.order(0, 8, FramesOp::UnmapDevice);
        assert!(bed.run(&all));
        (0..8).for_each(|page| assert_eq!(bed.mapping.load_u64(page * P).unwrap(), page));
    }

    #[test]
    fn an_order_that_is_sent_again_does_not_bring_frames_back() {
        let mut bed = Bed::new();
        let (first, then) = (bed.order(0, 8, map(0)), bed.order(0, 8, FramesOp::UnmapDevice));
        assert_eq!((bed.run(&first), bed.run(&then)), (true, true));
        assert!(!bed.run(&first), "the frames may be another's by now");
        assert_eq!(bed.mapping.load_u64(7 * P).unwrap(), 7);
        assert!(bed.run(&then));
    }

    #[test]
    fn other_memory_of_the_device_and_other_addresses_are_refused() {
        let mut bed = Bed::new();
        let old = FramesOp::MapDevice { device: 3, frame: 0, generation: GENERATION + 1 };
        let unknown = FramesOp::MapDevice { device: 4, frame: 0, generation: GENERATION };
        for order in [bed.order(0, 8, old), bed.order(0, 8, unknown), bed.order(4, 5, map(0))] {
            assert!(!bed.run(&order));
        }
        let elsewhere = Order { addr: bed.mapping.addr() + P, ..bed.order(0, 1, map(0)) };
        assert!(!bed.run(&elsewhere));
        let nobodys = Order { region: 2, ..bed.order(0, 8, FramesOp::UnmapDevice) };
        assert!(bed.run(&nobodys), "nothing of it is a frame");
        (0..8).for_each(|page| assert_eq!(bed.mapping.load_u64(page * P).unwrap(), page));
    }

    #[test]
    fn frames_of_memory_that_the_device_has_lost_are_found_and_go() {
        let mut bed = Bed::new();
        let order = bed.order(0, 8, map(0));
        bed.run(&order);
        let memory: Fd = Arc::new(memfd::create_sealed("uhmm-test-vram", SKIPPED + 16 * P).unwrap());
        bed.frames.know_aperture(CoherentMemory { device: 3, generation: GENERATION + 1, memory: aperture(&memory) });
        let order = bed.order(0, 8, FramesOp::UnmapDevice);
        bed.run(&order);
        (0..8).for_each(|page| assert_eq!(bed.mapping.load_u64(page * P).unwrap(), page));
    }

    #[test]
    fn rights_stay_and_what_is_nobodys_business_stays_too() {
        let mut bed = Bed::new();
        own_memory::protect(bed.part(1, 2), true, false).unwrap();
        if pagemap::tells_guards() {
            own_memory::advise(bed.part(4, 1), RangeAdvice::GuardInstall).unwrap();
        }
        let foreign: Fd = Arc::new(memfd::create_sealed("uhmm-test-foreign", P).unwrap());
        let foreign = StandIn::map(foreign.as_fd(), 0, P, true, true).unwrap();
        foreign.take_place_at(bed.part(6, 1).start).unwrap();
        bed.mapping.store_u64(6 * P, 66).unwrap();
        let rights = |bed: &Bed| {
            let vma = |page| own_memory::mappings(bed.part(page, 1)).unwrap()[0];
            [0, 1, 2, 3].map(|page| vma(page).write)
        };
        for op in [map(8), FramesOp::UnmapDevice] {
            let order = bed.order(0, 8, op);
            assert!(bed.run(&order));
            let guarded = own_memory::access_faults(bed.part(4, 1).start, false).unwrap();
            assert_eq!(guarded, pagemap::tells_guards(), "{op:?}");
            assert_eq!(rights(&bed), [true, false, false, true], "{op:?}");
            assert_eq!(bed.mapping.load_u64(6 * P).unwrap(), 66, "{op:?}");
        }
    }
}
