//! Spaces (client processes), their regions and the segments that show them, and how they lie in the vault.
//!
//! ```text
//!  space/ID/state            memfd: id, nonce, token, kind, features, pid
//!  space/ID/uffd             the process's userfaultfd (closing the last one would turn missing pages into zeros)
//!  space/ID/pidfd            readable when the process has exited: the one truth about its death
//!  space/ID/maps, pagemap, smaps, staging, orders, done, agent    for the agent (a forked child has none until it attaches)
//!  space/ID/region/ID/dir    directory (see `directory.rs`), `live` is stored last
//!  space/ID/region/ID/mem    the client's memfd or file; none for private memory
//! ```
//!
//! A space or region with a name missing was never reported to its client: recovery drops it and the client asks again.

use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use uhmm_ipc::message::Fd;
use uhmm_ipc::shared::table::Table;
use uhmm_kernel_hook::process::PidFd;
use uhmm_kernel_hook::procmap::Vma;
use uhmm_kernel_hook::uffd::Userfaultfd;
use uhmm_kernel_hook::window::{Prot, Window};
use uhmm_kernel_hook::{AddrRange, HookError, PAGE_SIZE, memfd, own_memory};
use uhmm_pager_core::{Attr, Backing, DeviceId, Directory, Pages, RegionId};

use crate::agent::{Agent, Begun};
use crate::directory::{DirectoryFile, SegmentRecord};
use crate::granted::Granted;
use crate::heat::{Heat, add_page};
use crate::moved::Vacated;
use crate::registered::Registered;
use crate::rules::Rule;

const MAGIC: u64 = u64::from_le_bytes(*b"uhmm-spc");
const OFF_MAGIC: u64 = 0;
const OFF_ID: u64 = 8;
const OFF_NONCE: u64 = 16;
const OFF_FULL: u64 = 24;
const OFF_FEATURES: u64 = 32;
const OFF_PID: u64 = 40;
const OFF_SENTINEL: u64 = 48;
const OFF_TOKEN: u64 = 56;
const OFF_BIRTH: u64 = 72;
const OFF_PARENT: u64 = 80;
const OFF_FORK_EVENT: u64 = 88;
const OFF_UID: u64 = 96;
const OFF_AT_HOME: u64 = 104;
const OFF_RULE: u64 = 112;

/// Bytes of a space token.
pub const TOKEN_BYTES: usize = 16;
/// The number of a client's process that has none in the pager's pid namespace. (0: a forked child that has not said who it is.)
pub const PID_UNSEEN: u32 = u32::MAX;
/// Device slots in a region (one bit each in an entry's mapped mask).
pub const DEVICE_SLOTS: usize = 8;

/// What is kept about a space in its state memfd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceState {
    /// Space id.
    pub id: u64,
    /// The client's nonce.
    pub nonce: u64,
    /// Kernel-mode faults are raised too.
    pub full: bool,
    /// Granted userfaultfd features.
    pub features: u64,
    /// Process.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Which rule of the manifest's names it: see `rules.rs`.
    pub rule: Rule,
    /// Where a forked child finds out who it is.
    pub sentinel_addr: u64,
    /// Proves ownership.
    pub token: [u8; TOKEN_BYTES],
    /// How far its birth has come.
    pub birth: Birth,
    /// Space of the process that forked; 0 for a space that is no child.
    pub parent: u64,
    /// Name of that FORK event in the journal.
    pub fork_event: u64,
    /// No page leaves: see `home.rs`.
    pub at_home: bool,
}

/// How far a forked child has come: what a new pager does about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Birth {
    /// Served like any other; also every space that is no child.
    Done,
    /// It has a userfaultfd: its regions are made, or made again.
    Made,
    /// Its regions are in the vault: the parent's device mappings are revoked, or revoked again.
    Cloned,
    /// The same, and some of them could not be made.
    ClonedInPart,
    /// Done, but some of its regions could not be made: there, what is not present is lost.
    Lost,
}

impl Birth {
    const ALL: [Self; 5] = [Self::Done, Self::Made, Self::Cloned, Self::ClonedInPart, Self::Lost];

    fn word(self) -> u64 {
        self as u64
    }

    fn from_word(word: u64) -> Self {
        Self::ALL.into_iter().find(|birth| birth.word() == word).unwrap_or(Self::Lost)
    }
}

impl SpaceState {
    /// Writes the state into a new memfd for the vault.
    pub fn to_memfd(&self) -> Result<Fd, HookError> {
        let fd: OwnedFd = memfd::create_sealed("uhmm-space", PAGE_SIZE)?;
        let window = Window::map(fd.as_fd(), 0, PAGE_SIZE, Prot::ReadWrite)?;
        window.store_u64(OFF_ID, self.id)?;
        window.store_u64(OFF_NONCE, self.nonce)?;
        window.store_u64(OFF_FULL, u64::from(self.full))?;
        window.store_u64(OFF_FEATURES, self.features)?;
        window.store_u64(OFF_PID, u64::from(self.pid))?;
        window.store_u64(OFF_UID, u64::from(self.uid))?;
        window.store_u64(OFF_SENTINEL, self.sentinel_addr)?;
        window.write(OFF_TOKEN, &self.token)?;
        window.store_u64(OFF_BIRTH, self.birth.word())?;
        window.store_u64(OFF_PARENT, self.parent)?;
        window.store_u64(OFF_FORK_EVENT, self.fork_event)?;
        window.store_u64(OFF_AT_HOME, u64::from(self.at_home))?;
        window.store_u64(OFF_RULE, self.rule.word())?;
        window.store_u64(OFF_MAGIC, MAGIC)?;
        Ok(Arc::new(fd))
    }

    /// Reads it back; `None` when it is not such a memfd.
    pub fn from_memfd(fd: &Fd) -> Result<Option<Self>, HookError> {
        let window = Window::map(fd.as_fd(), 0, PAGE_SIZE, Prot::ReadOnly)?;
        if window.load_u64(OFF_MAGIC)? != MAGIC {
            return Ok(None);
        }
        let mut token = [0u8; TOKEN_BYTES];
        window.read(OFF_TOKEN, &mut token)?;
        let pid = u32::try_from(window.load_u64(OFF_PID)?).unwrap_or(0);
        Ok(Some(Self {
            id: window.load_u64(OFF_ID)?,
            nonce: window.load_u64(OFF_NONCE)?,
            full: window.load_u64(OFF_FULL)? != 0,
            features: window.load_u64(OFF_FEATURES)?,
            pid,
            uid: u32::try_from(window.load_u64(OFF_UID)?).unwrap_or(u32::MAX),
            sentinel_addr: window.load_u64(OFF_SENTINEL)?,
            token,
            birth: Birth::from_word(window.load_u64(OFF_BIRTH)?),
            parent: window.load_u64(OFF_PARENT)?,
            fork_event: window.load_u64(OFF_FORK_EVENT)?,
            at_home: window.load_u64(OFF_AT_HOME)? != 0,
            rule: Rule::from_word(window.load_u64(OFF_RULE)?),
        }))
    }
}

/// How far a region has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for the vault.
    Creating,
    /// In use.
    Live,
    /// No new mapping or migration; going away.
    Dying,
}

/// A file that shows a region's system pages to devices.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Memfd or file.
    pub fd: Fd,
    /// Offset of the region's first page.
    pub offset_bytes: u64,
    /// It can neither shrink nor grow.
    pub sealed: bool,
    /// What the kernel shows for mappings of it, once asked.
    identity: OnceCell<((u32, u32), u64)>,
}

impl Memory {
    /// A file.
    pub fn new(fd: Fd, offset_bytes: u64, sealed: bool) -> Self {
        Self { fd, offset_bytes, sealed, identity: OnceCell::new() }
    }

    /// Whether a mapping shows this file; not known where the file cannot be mapped here.
    pub fn is_in(&self, vma: &Vma) -> Option<bool> {
        let identity = match self.identity.get() {
            Some(known) => *known,
            None => {
                let asked = own_memory::identity_of(&*self.fd, vma.offset, vma.page_size_bytes).ok()?;
                *self.identity.get_or_init(|| asked)
            }
        };
        Some(identity == (vma.device, vma.inode))
    }
}

/// An object of pages under management; [`Segment`]s show it at addresses.
pub struct Region {
    /// Region id.
    pub id: u64,
    /// The space that made it, or one that still shows it.
    pub space: u64,
    /// What the system pages are.
    pub backing: Backing,
    /// Pages.
    pub page_count: u64,
    /// What devices can reach in place, and for shared backing what the pager copies from and punches.
    pub memory: Option<Memory>,
    /// Page states.
    pub directory: DirectoryFile,
    /// Progress.
    pub phase: Phase,
    /// Segments that show it.
    pub segments: Vec<u64>,
    /// Segments that show it no more, while devices may still use their tables.
    pub retired: Vec<Segment>,
    /// Ranges to unregister when the region is dropped.
    pub registered: Registered,
    /// Allocated memory: the process that made it and the address of page 0 there. Frames may be mapped at its addresses.
    pub cpu_home: Option<(u64, u64)>,
}

/// Addresses of one space that show consecutive pages of a region. Mirror and drivers know segments, by the name "region".
pub struct Segment {
    /// Segment id.
    pub id: u64,
    /// Whose addresses.
    pub space: u64,
    /// Region.
    pub region: u64,
    /// First address.
    pub addr: u64,
    /// First page of the region.
    pub first_page: u64,
    /// Pages.
    pub page_count: u64,
    /// Device page tables in shared memory, by device id; entry 0 is the segment's first page.
    pub tables: [Option<Table>; DEVICE_SLOTS],
    /// Bit d: device d has been told about the segment.
    pub granted_mask: u8,
    /// What devices may do with its pages by what they were answered.
    pub granted: Granted,
}

impl Segment {
    /// Its addresses.
    pub fn range(&self) -> AddrRange {
        AddrRange { start: self.addr, len: self.page_count * PAGE_SIZE }
    }

    /// Its pages of the region.
    pub fn pages(&self) -> Pages {
        Pages { first: self.first_page, count: self.page_count }
    }

    /// Address of a page of the region.
    pub fn addr_of(&self, page: u64) -> u64 {
        self.addr + (page - self.first_page) * PAGE_SIZE
    }

    /// What the directory keeps of it.
    pub fn record(&self) -> SegmentRecord {
        let Self { id, space, addr, first_page, page_count, .. } = *self;
        SegmentRecord { id, space, addr, first_page, page_count, retired: false }
    }
}

/// One client process.
#[derive(Debug)]
pub struct Space {
    /// What the vault keeps.
    pub state: SpaceState,
    /// Its userfaultfd.
    pub uffd: Userfaultfd,
    /// Tells when it dies; a forked child has none until it attaches.
    pub pidfd: Option<PidFd>,
    /// Segment ids by first address.
    pub segments: BTreeMap<u64, u64>,
    /// Its agent; a forked child has none until it attaches.
    pub agent: Option<Agent>,
    /// What it may be doing for a pager that is dead.
    pub begun: Option<Begun>,
    /// The process is dead or said goodbye; the space is removed with its last region.
    pub dying: bool,
    /// Revocations that a forked child waits for.
    pub unready_regions: usize,
    /// What mremap has left and the kernel has more to tell about.
    pub vacated: Vacated,
}

impl Space {
    /// Its faults and events may be read: a forked child's wait until its regions are complete.
    pub fn is_born(&self) -> bool {
        matches!(self.state.birth, Birth::Done | Birth::Lost)
    }

    /// A forked child without its regions.
    pub fn is_half_made(&self) -> bool {
        self.state.birth == Birth::Made
    }

    /// Vault prefix of everything that belongs to the space.
    pub fn vault_prefix(id: u64) -> String {
        format!("space/{id}/")
    }

    /// Vault prefix of one region.
    pub fn region_prefix(space: u64, region: u64) -> String {
        format!("space/{space}/region/{region}/")
    }
}

/// All regions and segments by id: what the core reads through [`Directory`].
#[derive(Default)]
pub struct Regions {
    /// Boxed, as segments are: they are large, and a search that passes them by would touch as many cache lines as it passes.
    by_id: BTreeMap<u64, Box<Region>>,
    /// Their ids by space.
    by_space: BTreeMap<u64, BTreeSet<u64>>,
    /// Regions on their end, by the spaces in which they may be registered; and the other way round.
    dying: BTreeMap<u64, BTreeSet<u64>>,
    dying_in: BTreeMap<u64, Vec<u64>>,
    /// Regions with retired segments.
    with_retired: BTreeSet<u64>,
    segments: BTreeMap<u64, Box<Segment>>,
    /// Marks of devices that eviction takes are heat too; it looks through [`Directory`], which changes nothing else.
    pub(crate) heat: RefCell<Heat>,
}

impl Regions {
    /// By id.
    pub fn get(&self, id: u64) -> Option<&Region> {
        self.by_id.get(&id).map(Box::as_ref)
    }

    /// By id.
    pub fn get_mut(&mut self, id: u64) -> Option<&mut Region> {
        self.by_id.get_mut(&id).map(Box::as_mut)
    }

    /// Adds one.
    pub fn insert(&mut self, region: Region) {
        self.by_space.entry(region.space).or_default().insert(region.id);
        self.by_id.insert(region.id, Box::new(region));
    }

    /// Removes one, with what is left of its segments.
    pub fn remove(&mut self, id: u64) -> Option<Region> {
        let region = self.by_id.remove(&id)?;
        region.segments.iter().for_each(|segment| drop(self.segments.remove(segment)));
        forget(&mut self.by_space, region.space, id);
        self.with_retired.remove(&id);
        let dying_in = self.dying_in.remove(&id).unwrap_or_default();
        dying_in.into_iter().for_each(|space| forget(&mut self.dying, space, id));
        Some(*region)
    }

    /// Ids of those that belong to a space.
    pub fn of_space(&self, space: u64) -> impl Iterator<Item = u64> + '_ {
        self.by_space.get(&space).into_iter().flatten().copied()
    }

    /// Another space has it from now on.
    pub fn pass_on(&mut self, id: u64, space: u64) {
        let Some(region) = self.by_id.get_mut(&id) else { return };
        let before = std::mem::replace(&mut region.space, space);
        forget(&mut self.by_space, before, id);
        self.by_space.entry(space).or_default().insert(id);
    }

    /// Begins its end: nothing shows it from here on, but it is registered until it is dropped.
    pub fn dies(&mut self, id: u64) {
        let Some(region) = self.by_id.get_mut(&id) else { return };
        region.phase = Phase::Dying;
        let spaces: Vec<u64> = region.registered.iter().map(|(space, _)| space).collect();
        for space in &spaces {
            self.dying.entry(*space).or_default().insert(id);
        }
        self.dying_in.insert(id, spaces);
    }

    /// Addresses of a space are no region's any more, also not of one that is on its end: those of `shown`, which are shown there, and of
    /// whatever dies.
    pub fn not_registered(&mut self, space: u64, range: AddrRange, shown: impl Iterator<Item = u64>) {
        let dying = self.dying.get(&space).into_iter().flatten().copied();
        for id in shown.chain(dying).collect::<BTreeSet<u64>>() {
            if let Some(region) = self.by_id.get_mut(&id) {
                region.registered.left(space, range);
            }
        }
    }

    /// All, by id.
    pub fn iter(&self) -> impl Iterator<Item = &Region> {
        self.by_id.values().map(Box::as_ref)
    }

    /// All, by id.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Region> {
        self.by_id.values_mut().map(Box::as_mut)
    }

    /// A segment that is shown.
    pub fn segment(&self, id: u64) -> Option<&Segment> {
        self.segments.get(&id).map(Box::as_ref)
    }

    /// A segment that is shown.
    pub fn segment_mut(&mut self, id: u64) -> Option<&mut Segment> {
        self.segments.get_mut(&id).map(Box::as_mut)
    }

    /// All segments that are shown.
    pub fn segments_mut(&mut self) -> impl Iterator<Item = &mut Segment> {
        self.segments.values_mut().map(Box::as_mut)
    }

    /// Shows one.
    pub fn show(&mut self, segment: Segment) {
        if let Some(region) = self.by_id.get_mut(&segment.region) {
            region.segments.push(segment.id);
        }
        self.segments.insert(segment.id, Box::new(segment));
    }

    /// Hides one.
    pub fn hide(&mut self, id: u64) -> Option<Segment> {
        let segment = self.segments.remove(&id)?;
        if let Some(region) = self.by_id.get_mut(&segment.region) {
            region.segments.retain(|other| *other != id);
        }
        Some(*segment)
    }

    /// Segments of a region that show any of the pages.
    pub fn showing(&self, region: u64, pages: Pages) -> impl Iterator<Item = (&Segment, Pages)> {
        let ids = self.by_id.get(&region).map_or(&[][..], |region| &region.segments);
        let segments = ids.iter().filter_map(|id| self.segment(*id));
        segments.filter_map(move |segment| Some((segment, segment.pages().overlap(pages)?)))
    }

    /// Devices may not have dropped a segment that shows nothing any more.
    pub fn retire(&mut self, segment: Segment) {
        if let Some(region) = self.by_id.get_mut(&segment.region) {
            self.with_retired.insert(region.id);
            region.retired.push(segment);
        }
    }

    /// They have. Returns whether it was the region's last one.
    pub fn retired_is_dropped(&mut self, region: u64, segment: u64) -> bool {
        let Some(region) = self.by_id.get_mut(&region) else { return false };
        region.retired.retain(|retired| retired.id != segment);
        if region.retired.is_empty() {
            self.with_retired.remove(&region.id);
        }
        region.retired.is_empty()
    }

    /// All that are retired.
    pub fn all_retired(&self) -> impl Iterator<Item = &Segment> {
        self.with_retired.iter().filter_map(|id| self.by_id.get(id)).flat_map(|region| &region.retired)
    }

    /// Takes the accessed marks of entries of a segment's table, notes them as heat, and returns the pages of the region.
    pub(crate) fn take_marks(&self, segment: &Segment, device: u8, entries: Range<u64>) -> Vec<Pages> {
        let mut runs = Vec::new();
        let Some(table) = segment.tables.get(usize::from(device)).and_then(Option::as_ref) else { return runs };
        for entry in entries.filter(|entry| table.take_accessed(*entry)) {
            let page = segment.first_page + entry;
            self.heat.borrow_mut().note(segment.space, device, segment.addr_of(page));
            add_page(&mut runs, page);
        }
        runs
    }

    /// The same, and those that are retired: wherever a device may have a table.
    pub fn with_tables(&self, region: u64, pages: Pages) -> impl Iterator<Item = (&Segment, Pages)> {
        let retired = self.by_id.get(&region).map_or(&[][..], |region| &region.retired);
        let retired = retired.iter().filter_map(move |segment| Some((segment, segment.pages().overlap(pages)?)));
        self.showing(region, pages).chain(retired)
    }
}

fn forget(index: &mut BTreeMap<u64, BTreeSet<u64>>, space: u64, region: u64) {
    if let Some(ids) = index.get_mut(&space) {
        ids.remove(&region);
        if ids.is_empty() {
            index.remove(&space);
        }
    }
}

impl Directory for Regions {
    fn alike(&self, region: RegionId, page: u64) -> u64 {
        self.by_id.get(&region.0).map_or(1, |region| region.directory.alike(page))
    }

    fn load(&self, region: RegionId, page: u64) -> u64 {
        self.by_id.get(&region.0).map_or(0, |r| r.directory.load(page))
    }

    fn look(&self, region: RegionId, page: u64) -> (u64, u64) {
        self.by_id.get(&region.0).map_or((1, 0), |r| r.directory.look(page))
    }

    fn page_count(&self, region: RegionId) -> u64 {
        self.by_id.get(&region.0).map_or(0, |r| r.page_count)
    }

    fn take_used(&self, region: RegionId, page: u64, device: DeviceId) -> bool {
        self.showing(region.0, Pages::one(page)).fold(false, |any, (segment, pages)| {
            let entry = pages.first - segment.first_page;
            !self.take_marks(segment, device.0, entry..entry + 1).is_empty() || any
        })
    }

    fn attr(&self, region: RegionId, page: u64) -> Attr {
        self.by_id.get(&region.0).map_or(Attr::default(), |r| r.directory.attr(page))
    }

    fn huge_phase(&self, region: RegionId) -> u64 {
        let first = self.by_id.get(&region.0).and_then(|r| self.segments.get(r.segments.first()?));
        first.map_or(0, |segment| {
            let address_page = segment.addr / PAGE_SIZE;
            // Page p is at address page `address_page + p - first_page`; the smallest p >= 0 with a multiple of 512.
            (512 - (address_page + 512 - segment.first_page % 512) % 512) % 512
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_space_is_read_back_as_it_was_kept() {
        for birth in Birth::ALL {
            let token = [5; TOKEN_BYTES];
            let (parent, fork_event) = (6, 7);
            let state = SpaceState {
                id: 1,
                nonce: 2,
                full: true,
                features: 3,
                pid: 4,
                uid: 1000,
                rule: Rule::from_word(5),
                sentinel_addr: 4096,
                token,
                birth,
                parent,
                fork_event,
                at_home: birth == Birth::Done,
            };
            assert_eq!(SpaceState::from_memfd(&state.to_memfd().unwrap()).unwrap(), Some(state));
        }
    }
}
