//! The provided page table: one `uhmm_ipc::shared::table` a region, for devices whose threads run in this process.
//!
//! ```text
//!   loop thread: SharedTable  --attach/detach-->  AddressSpaces  <--find(space, addr)--  device threads
//!        begin / install / revoke                  Arc<MappedRegion>                     enter gate, load, touch, access, leave
//! ```
//! A device thread may keep an `Arc<MappedRegion>` as long as it likes: once detached, all its entries are invalid and stay so,
//! and the thread looks the address up again after the fault that follows.
//!
//! **Use bits.** Every access marks its entry before it touches the page: accessed, and dirty for a write. That is `Table::touch`,
//! called by device threads and by [`DevicePageTable::with_page`]. Whoever holds the table's memfd (the pager, of a device with an
//! aperture) finds the bits there, with the entry that they belong to, and takes the accessed ones away when it has noted the use (for
//! eviction and hot ranges); they end with its revocation, which tells whether it was
//! dirty ([`DevicePageTable::revoke`]).
//!
//! The gate has one slot a device thread and one more, the last, for the loop's own accesses.
//!
//! Lock order: the lock of [`AddressSpaces`] is a leaf. Device threads take it for reading, outside the gate.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use uhmm_ipc::message::Fd;
use uhmm_ipc::message::pager::{MapKind, MapRun, Memory};
use uhmm_ipc::shared::gate::{Gate, Slot};
use uhmm_ipc::shared::table::{Begin, Pte, Table};
use uhmm_kernel_hook::memfd;
use uhmm_kernel_hook::{Prot, Window};

use crate::device::{
    DeviceError, DevicePageTable, InstallReport, PAGE_BYTES, PageRange, Place, Quiescence, RegionKey, RegionMap,
    SystemPages,
};
use crate::file_pages::FilePages;

/// How long one quiescence is waited for inside the loop. Threads stay inside for microseconds; only one that was preempted
/// there takes longer, and then the loop comes back later.
const QUIESCE_LIMIT: Duration = Duration::from_millis(20);

/// A region as device threads see it.
pub struct MappedRegion {
    /// Its name.
    pub key: RegionKey,
    /// First address.
    pub addr: u64,
    /// Pages.
    pub page_count: u64,
    /// Entries of the pages.
    pub table: Table,
    /// The system pages, for in-place entries.
    pub system: SystemPages,
}

impl MappedRegion {
    /// Page of an address inside the region.
    pub fn page_of(&self, addr: u64) -> Option<u64> {
        let page = addr.checked_sub(self.addr)? / PAGE_BYTES;
        (page < self.page_count).then_some(page)
    }
}

impl fmt::Debug for MappedRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MappedRegion({} at {:#x}, {} pages)", self.key, self.addr, self.page_count)
    }
}

type Regions = HashMap<u64, BTreeMap<u64, Arc<MappedRegion>>>;

/// The attached regions of all spaces; clones share one map.
#[derive(Clone, Debug, Default)]
pub struct AddressSpaces {
    regions: Arc<RwLock<Regions>>,
}

impl AddressSpaces {
    /// The region at an address, if it is attached.
    pub fn find(&self, space: u64, addr: u64) -> Option<Arc<MappedRegion>> {
        // A panic under the lock can only come between two whole map operations.
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        let (_, region) = regions.get(&space)?.range(..=addr).next_back()?;
        region.page_of(addr).map(|_| region.clone())
    }

    fn insert(&self, region: Arc<MappedRegion>) {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        regions.entry(region.key.space).or_default().insert(region.addr, region);
    }

    fn remove(&self, region: &MappedRegion) {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let Some(space) = regions.get_mut(&region.key.space) else { return };
        // A newer region may stand at the same address already.
        if space.get(&region.addr).is_some_and(|standing| standing.key == region.key) {
            space.remove(&region.addr);
        }
        if space.is_empty() {
            regions.remove(&region.key.space);
        }
    }
}

/// See the module head.
pub struct SharedTable {
    spaces: AddressSpaces,
    by_key: HashMap<RegionKey, Arc<MappedRegion>>,
    gate: Gate,
    /// The loop's own place in the gate, behind those of the device's threads.
    own_slot: Slot,
    thread_count: usize,
    shown_to_pager: bool,
}

impl fmt::Debug for SharedTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedTable").field("regions", &self.by_key.len()).finish_non_exhaustive()
    }
}

impl SharedTable {
    /// An empty table for this many device threads. `shown_to_pager`: the pager revokes by itself, without a message; only for
    /// devices with an aperture, since it must be able to fetch the data by itself too.
    pub fn create(thread_count: u32, shown_to_pager: bool) -> Result<Self, DeviceError> {
        let gate = Gate::create(thread_count + 1)?;
        let own_slot = gate.slot(thread_count as usize).ok_or("The gate has no slot for the loop")?;
        let thread_count = thread_count as usize;
        let (spaces, by_key) = (AddressSpaces::default(), HashMap::new());
        Ok(Self { spaces, by_key, gate, own_slot, thread_count, shown_to_pager })
    }

    /// For the device's threads.
    pub fn spaces(&self) -> AddressSpaces {
        self.spaces.clone()
    }

    /// Places for device threads.
    pub fn thread_count(&self) -> usize {
        self.thread_count
    }

    /// The gate's slot of one device thread; each index for one thread only.
    pub fn slot(&self, index: usize) -> Option<Slot> {
        self.gate.slot(index)
    }

    fn region(&self, key: RegionKey) -> Result<&Arc<MappedRegion>, DeviceError> {
        self.by_key.get(&key).ok_or_else(|| format!("The device has no table of {key}").into())
    }
}

impl DevicePageTable for SharedTable {
    fn attach(&mut self, region: &RegionMap) -> Result<Option<Fd>, DeviceError> {
        let len_bytes =
            region.page_count.checked_mul(PAGE_BYTES).ok_or("The region is larger than the address space")?;
        let system = match &region.memory {
            Memory::Private => SystemPages::Private,
            Memory::Sealed { memory, offset_bytes } => {
                // Sealed: an access through the window can never meet the end of the file.
                let file_bytes = memfd::len(memory.as_fd())?;
                memfd::check_sealed(memory.as_fd(), file_bytes)?;
                SystemPages::Mapped(Window::map(memory.as_fd(), *offset_bytes, len_bytes, Prot::ReadWrite)?)
            }
            Memory::File { file, offset_bytes } => {
                SystemPages::File(FilePages::new(file.clone(), *offset_bytes, len_bytes)?)
            }
        };
        let mapped = Arc::new(MappedRegion {
            key: region.key,
            addr: region.addr,
            page_count: region.page_count,
            table: Table::create(region.page_count)?,
            system,
        });
        let fd = mapped.table.fd().clone();
        self.spaces.insert(mapped.clone());
        if let Some(old) = self.by_key.insert(region.key, mapped) {
            old.table.revoke(0, old.page_count);
        }
        Ok(self.shown_to_pager.then_some(fd))
    }

    fn gate(&self) -> Option<Fd> {
        self.shown_to_pager.then(|| self.gate.fd().clone())
    }

    fn begin(
        &mut self,
        key: RegionKey,
        pages: PageRange,
        nonce: u32,
        upgrade: Option<PageRange>,
    ) -> Result<(), DeviceError> {
        let table = &self.region(key)?.table;
        for page in pages.first..pages.end().min(table.page_count()) {
            match table.begin(page, nonce) {
                Begin::Started | Begin::OutOfRange => {}
                Begin::Valid(pte) if pte.is_writable() || !upgrade.is_some_and(|pages| pages.contains(page)) => {}
                // Other threads may go on reading through the old entry: whoever changes the page's owner waits for the gate.
                Begin::Valid(_) | Begin::Pending => {
                    table.revoke(page, 1);
                    table.begin(page, nonce);
                }
            }
        }
        Ok(())
    }

    fn install(&mut self, key: RegionKey, nonce: u32, runs: &[MapRun]) -> Result<InstallReport, DeviceError> {
        let region = self.region(key)?;
        let table = &region.table;
        let mut report = InstallReport::default();
        for run in runs {
            if run.kind == MapKind::System && matches!(region.system, SystemPages::Private) {
                return Err(format!("{key} is private memory, which cannot be mapped in place").into());
            }
            for offset in 0..run.page_count {
                let page = run.first_page + offset;
                let pte = match run.kind {
                    MapKind::Frame(first) => Pte::frame(first.wrapping_add(offset as u32), run.writable),
                    MapKind::System => Pte::system(run.writable),
                };
                if table.install(page, nonce, pte) {
                    report.installed_pages += 1;
                } else if !table.load(page).is_valid() {
                    report.refused.push(page);
                }
            }
        }
        Ok(report)
    }

    fn with_page(
        &mut self,
        key: RegionKey,
        page: u64,
        write: bool,
        act: &mut dyn FnMut(Place<'_>),
    ) -> Result<bool, DeviceError> {
        let Some(region) = self.by_key.get(&key) else { return Ok(false) };
        let _inside = self.own_slot.enter();
        let Some(pte) = region.table.touch(page, region.table.load(page), write) else { return Ok(false) };
        act(match pte.frame_number() {
            Some(frame) => Place::Frame(frame),
            None => Place::System(&region.system, page),
        });
        Ok(true)
    }

    fn mapped_pages(&mut self, key: RegionKey, pages: PageRange, write: bool) -> Result<u64, DeviceError> {
        let Some(region) = self.by_key.get(&key) else { return Ok(0) };
        let table = &region.table;
        let end = pages.end().min(table.page_count());
        let missing = (pages.first..end).find(|page| table.touch(*page, table.load(*page), write).is_none());
        Ok(missing.unwrap_or(end).saturating_sub(pages.first))
    }

    fn abandon(&mut self, key: RegionKey, pages: PageRange, nonce: u32) -> Result<(), DeviceError> {
        let table = &self.region(key)?.table;
        for page in pages.first..pages.end().min(table.page_count()) {
            table.cancel(page, nonce);
        }
        Ok(())
    }

    fn revoke(&mut self, key: RegionKey, pages: PageRange) -> Result<bool, DeviceError> {
        Ok(self.by_key.get(&key).is_some_and(|region| region.table.revoke(pages.first, pages.count)))
    }

    fn quiesce(&mut self, _ticket: u64) -> Result<Quiescence, DeviceError> {
        self.gate.wait(QUIESCE_LIMIT)?;
        Ok(Quiescence::Reached)
    }

    fn detach(&mut self, key: RegionKey) {
        if let Some(region) = self.by_key.remove(&key) {
            self.spaces.remove(&region);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: RegionKey = RegionKey { space: 3, region: 9 };
    const ADDR: u64 = 0x10_0000;

    fn region(page_count: u64) -> Result<RegionMap, DeviceError> {
        let memory = Arc::new(memfd::create_sealed("uhmm-test-region", page_count * PAGE_BYTES)?);
        let memory = Memory::Sealed { memory, offset_bytes: 0 };
        Ok(RegionMap { key: KEY, addr: ADDR, page_count, device_read_only: false, memory })
    }

    fn run(first_page: u64, page_count: u64, writable: bool) -> MapRun {
        MapRun { first_page, page_count, kind: MapKind::Frame(40), writable }
    }

    fn pages(first: u64, count: u64) -> PageRange {
        PageRange { first, count }
    }

    fn attached() -> Result<(SharedTable, Arc<MappedRegion>), DeviceError> {
        let mut table = SharedTable::create(2, true)?;
        table.attach(&region(16)?)?;
        let mapped = table.spaces().find(3, ADDR + 5000).ok_or("The region is attached")?;
        Ok((table, mapped))
    }

    #[test]
    fn a_page_revoked_between_begin_and_install_is_refused_and_the_rest_mapped() -> Result<(), DeviceError> {
        let (mut table, mapped) = attached()?;
        table.begin(KEY, pages(0, 8), 1, None)?;
        table.revoke(KEY, pages(3, 1))?;
        let report = table.install(KEY, 1, &[run(0, 8, true)])?;
        assert_eq!(report, InstallReport { installed_pages: 7, refused: vec![3] });
        assert_eq!(mapped.table.load(4).frame_number(), Some(44));
        assert!(!mapped.table.load(3).is_valid());
        Ok(())
    }

    #[test]
    fn only_the_page_to_be_written_loses_its_read_only_mapping() -> Result<(), DeviceError> {
        let (mut table, mapped) = attached()?;
        table.begin(KEY, pages(0, 2), 1, None)?;
        table.install(KEY, 1, &[run(0, 2, false)])?;
        table.begin(KEY, pages(0, 2), 2, Some(pages(1, 1)))?;
        assert!(mapped.table.load(0).is_valid() && !mapped.table.load(1).is_valid());
        let report = table.install(KEY, 2, &[run(0, 2, true)])?;
        assert_eq!(report, InstallReport { installed_pages: 1, refused: vec![] });
        assert!(mapped.table.load(1).is_writable() && !mapped.table.load(0).is_writable());
        Ok(())
    }

    #[test]
    fn abandoned_pages_can_be_begun_again() -> Result<(), DeviceError> {
        let (mut table, mapped) = attached()?;
        table.begin(KEY, pages(0, 4), 1, None)?;
        table.install(KEY, 1, &[run(0, 1, true)])?;
        table.abandon(KEY, pages(0, 4), 1)?;
        assert!(mapped.table.load(0).is_valid(), "what was installed stays");
        table.begin(KEY, pages(0, 4), 2, None)?;
        assert_eq!(table.install(KEY, 2, &[run(1, 3, true)])?.installed_pages, 3);
        Ok(())
    }

    #[test]
    fn a_detached_region_is_found_no_more_and_its_kept_table_stays_invalid() -> Result<(), DeviceError> {
        let (mut table, mapped) = attached()?;
        table.begin(KEY, pages(0, 4), 1, None)?;
        table.install(KEY, 1, &[run(0, 4, true)])?;
        table.revoke(KEY, pages(0, 16))?;
        assert_eq!(table.quiesce(1)?, Quiescence::Reached);
        table.detach(KEY);
        assert!(table.spaces().find(3, ADDR).is_none());
        assert!((0..16).all(|page| !mapped.table.load(page).is_valid()));
        assert!(table.install(KEY, 1, &[run(0, 4, true)]).is_err());
        Ok(())
    }

    #[test]
    fn a_page_is_lent_only_with_the_right_that_it_has() -> Result<(), DeviceError> {
        let (mut table, _mapped) = attached()?;
        table.begin(KEY, pages(0, 2), 1, None)?;
        table.install(KEY, 1, &[run(0, 1, false)])?;
        let mut seen = Vec::new();
        let mut act = |place: Place<'_>| seen.push(matches!(place, Place::Frame(40)));
        assert!(table.with_page(KEY, 0, false, &mut act)?);
        assert!(!table.with_page(KEY, 0, true, &mut act)? && !table.with_page(KEY, 1, false, &mut act)?);
        assert_eq!(seen, [true]);
        table.begin(KEY, pages(2, 4), 2, None)?;
        table.install(KEY, 2, &[run(2, 4, true)])?;
        let mut count = |first, count, write| table.mapped_pages(KEY, pages(first, count), write);
        assert_eq!((count(0, 16, false)?, count(0, 16, true)?), (1, 0));
        assert_eq!((count(2, 3, true)?, count(2, 16, true)?, count(2, u64::MAX - 2, false)?), (3, 4, 4));
        assert_eq!((count(16, 1, false)?, count(u64::MAX, 1, false)?), (0, 0));
        Ok(())
    }

    #[test]
    fn private_memory_is_never_mapped_in_place() -> Result<(), DeviceError> {
        let mut table = SharedTable::create(1, true)?;
        table.attach(&RegionMap { memory: Memory::Private, ..region(4)? })?;
        table.begin(KEY, pages(0, 4), 1, None)?;
        assert_eq!(table.install(KEY, 1, &[run(0, 2, true)])?.installed_pages, 2);
        let system = MapRun { kind: MapKind::System, ..run(2, 1, true) };
        assert!(table.install(KEY, 1, &[system]).is_err());
        Ok(())
    }

    #[test]
    fn quiescence_is_not_reported_while_a_thread_is_inside() -> Result<(), DeviceError> {
        let (mut table, _mapped) = attached()?;
        let mut slot = table.slot(1).ok_or("Two slots were asked for")?;
        let inside = slot.enter();
        assert!(table.quiesce(1).is_err());
        drop(inside);
        assert_eq!(table.quiesce(2)?, Quiescence::Reached);
        Ok(())
    }

    #[test]
    fn a_memfd_that_is_too_short_or_of_huge_pages_is_refused() -> Result<(), DeviceError> {
        let mut table = SharedTable::create(1, false)?;
        let honest = region(16)?;
        assert!(table.attach(&RegionMap { page_count: 17, ..honest.clone() }).is_err());
        if let Ok(huge) = uhmm_kernel_hook::huge_pool::sealed_huge_memfd(2 << 20) {
            let memory = Memory::Sealed { memory: Arc::new(huge), offset_bytes: 0 };
            assert!(table.attach(&RegionMap { memory, ..honest.clone() }).is_err(), "it would not be safe to touch");
        }
        assert!(table.attach(&honest)?.is_none(), "a table that the pager must not see is not given out");
        Ok(())
    }
}
