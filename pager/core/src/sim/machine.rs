//! The state of the simulated machine, and what CPU threads and device jobs do with it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::check::Violation;
use super::execute::Pending;
use super::leftover::Leftover;
use super::{Faults, Rng};
use crate::{Attr, Backing, DeviceId, Directory, Entry, Event, MapKind, MapRun, Pages, RegionId, ReqId, SpaceId};

/// What memory that nobody may look at holds.
pub(super) const JUNK: u64 = u64::MAX;
/// Tokens carry the space that wrote them.
const SPACE_SHIFT: u32 = 40;

/// One page of a client.
#[derive(Clone, Copy, Debug, Default)]
pub struct PageModel {
    /// The memfd's page; a hole reads as zero.
    pub cache: Option<u64>,
    /// The client's page table has it.
    pub mapped: bool,
    /// Write-protected; on an unmapped page: a marker that no fill preserves.
    pub protected: bool,
    /// The client maps this frame itself, in the place of the memfd's page.
    pub cpu_frame: Option<(DeviceId, u32)>,
    /// Accesses get SIGBUS.
    pub poisoned: bool,
    /// What was written last.
    pub expected: u64,
    /// Unmapped by the client: nobody's content any more.
    pub gone: bool,
    /// It was on a device whose memory was lost: the core may poison it.
    pub may_be_lost: bool,
    /// Private: what the agent has taken out of the address space.
    pub scratch: Option<u64>,
    /// Private: the pager knows that the agent has taken it out, be it a hole.
    pub taken: bool,
    /// The program dropped it, and the pager that has read so has not dealt with it.
    pub given_up: bool,
    /// The program has put a guard there.
    pub guard: bool,
    /// A fill has met the guard and its answer is on the way; what was written before.
    pub met_guard: Option<u64>,
}

/// One region.
#[derive(Clone, Debug)]
pub struct RegionModel {
    /// Client.
    pub space: SpaceId,
    /// Shared or private.
    pub backing: Backing,
    /// Pages.
    pub pages: Vec<PageModel>,
    /// Directory of the vault.
    pub directory: Vec<u64>,
    /// What was advised, for all pages.
    pub attr: Attr,
    /// The client freed it.
    pub freeing: bool,
    /// Of a forked child: the parent's region.
    pub parent: Option<RegionId>,
    /// All entries are published.
    pub complete: bool,
    /// Faults are served.
    pub ready: bool,
}

/// What a device page table entry points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Device frame.
    Frame(u32),
    /// The memfd's page.
    InPlace,
}

/// A device page table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Where it points to.
    pub mapping: Mapping,
    /// The device may write.
    pub writable: bool,
}

/// One device and its driver.
#[derive(Clone, Debug)]
pub struct DeviceModel {
    /// Device memory.
    pub frames: Vec<u64>,
    /// Device page table.
    pub mappings: BTreeMap<(RegionId, u64), Grant>,
    /// Accessed marks of the page table.
    pub used: RefCell<BTreeSet<(RegionId, u64)>>,
    /// The driver is logged in at this pager.
    pub session: bool,
    /// Held by the supervisor.
    pub failed: bool,
    /// Counts driver processes.
    pub incarnation: u32,
    /// The memory is new and the pager's record does not say so yet.
    pub memory_is_new: bool,
}

/// A CPU access that waits in the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct CpuAccess {
    pub region: RegionId,
    pub page: u64,
    pub write: Option<u64>,
}

/// A request nobody has answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Open {
    pub region: RegionId,
    pub pages: Pages,
    /// A device job: device, its incarnation, page, value to write.
    pub job: Option<(u8, u32, u64, Option<u64>)>,
}

/// See the module head.
#[derive(Debug)]
pub struct World {
    /// Live regions.
    pub regions: BTreeMap<RegionId, RegionModel>,
    /// Devices by id.
    pub devices: Vec<DeviceModel>,
    /// Events that the pager has not handled, in order.
    pub events: VecDeque<Event>,
    /// Actions applied so far.
    pub action_count: u64,
    pub(super) pending: Vec<Pending>,
    pub(super) leftovers: Vec<Leftover>,
    pub(super) blocked: Vec<CpuAccess>,
    pub(super) open: BTreeMap<ReqId, Open>,
    pub(super) gone_spaces: BTreeSet<SpaceId>,
    /// What children of forks that nobody has read of have in place.
    pub(super) copies: BTreeMap<RegionId, Vec<PageModel>>,
    /// Clients whose bytes others may have.
    pub(super) forked: BTreeSet<SpaceId>,
    pub(super) faults: Faults,
    pub(super) rng: Rng,
    next_token: u64,
    next_req: u64,
}

impl Directory for World {
    fn load(&self, region: RegionId, page: u64) -> u64 {
        self.regions.get(&region).and_then(|r| r.directory.get(page as usize)).copied().unwrap_or(0)
    }

    fn page_count(&self, region: RegionId) -> u64 {
        self.regions.get(&region).map_or(0, |region| region.directory.len() as u64)
    }

    fn alike(&self, region: RegionId, page: u64) -> u64 {
        // Nobody knows everything: both ways of going through a range are taken.
        if page.is_multiple_of(3) {
            return 1;
        }
        let entry = self.entry(region, page);
        let alike = |page: &u64| *page < self.page_count(region) && self.entry(region, *page) == entry;
        if entry.owns_frame() || entry.is_moving() { 1 } else { (page..).take_while(alike).count() as u64 }
    }

    fn attr(&self, region: RegionId, _page: u64) -> Attr {
        self.regions.get(&region).map_or(Attr::default(), |region| region.attr)
    }

    fn huge_phase(&self, _region: RegionId) -> u64 {
        0
    }

    fn take_used(&self, region: RegionId, page: u64, device: DeviceId) -> bool {
        let model = self.devices.get(usize::from(device.0));
        model.is_some_and(|model| model.used.borrow_mut().remove(&(region, page)))
    }
}

impl World {
    /// Devices of so many frames each; nobody has logged in.
    pub fn new(frame_counts: &[u32], faults: Faults, seed: u64) -> Self {
        let device = |count: &u32| DeviceModel {
            frames: vec![JUNK; *count as usize],
            mappings: BTreeMap::new(),
            used: RefCell::default(),
            session: false,
            failed: false,
            incarnation: 1,
            memory_is_new: false,
        };
        Self {
            regions: BTreeMap::new(),
            devices: frame_counts.iter().map(device).collect(),
            events: VecDeque::new(),
            action_count: 0,
            pending: Vec::new(),
            leftovers: Vec::new(),
            blocked: Vec::new(),
            open: BTreeMap::new(),
            gone_spaces: BTreeSet::new(),
            copies: BTreeMap::new(),
            forked: BTreeSet::new(),
            faults,
            rng: Rng::new(seed),
            next_token: 1,
            next_req: 1,
        }
    }

    /// A page's entry as the directory has it.
    pub fn entry(&self, region: RegionId, page: u64) -> Entry {
        Entry::decode(self.load(region, page)).unwrap_or(Entry::ABSENT)
    }

    pub(super) fn page(&mut self, region: RegionId, page: u64) -> Option<&mut PageModel> {
        self.regions.get_mut(&region)?.pages.get_mut(page as usize)
    }

    /// A value that nobody ever wrote, for a client's page.
    pub(super) fn token(&mut self, region: RegionId) -> u64 {
        self.next_token += 1;
        let space = self.regions.get(&region).map_or(0, |region| region.space.0);
        space << SPACE_SHIFT | self.next_token
    }

    pub(super) fn space_of_token(token: u64) -> SpaceId {
        SpaceId(token >> SPACE_SHIFT)
    }

    pub(super) fn request(&mut self, open: Open) -> ReqId {
        let req = ReqId(self.next_req);
        self.next_req += 1;
        self.open.insert(req, open);
        req
    }

    /// CPU accesses that wait, requests without an answer.
    pub fn waiting(&self) -> (usize, usize) {
        (self.blocked.len(), self.open.len())
    }

    /// A thread of the client reads or writes a page.
    pub fn cpu_access(&mut self, region: RegionId, page: u64, write: bool) -> Result<(), Violation> {
        let usable = self.regions.get(&region).is_some_and(|r| !r.freeing && !r.pages[page as usize].gone);
        if !usable {
            return Ok(());
        }
        let write = write.then(|| self.token(region));
        self.try_cpu(CpuAccess { region, page, write })
    }

    fn try_cpu(&mut self, access: CpuAccess) -> Result<(), Violation> {
        let CpuAccess { region, page, write } = access;
        let Some(model) = self.page(region, page).copied() else { return Ok(()) };
        if let Some((device, frame)) = model.cpu_frame {
            return self.through_aperture(access, model, device, frame);
        }
        let Some(model) = self.page(region, page) else { return Ok(()) };
        if model.guard {
            return Ok(());
        }
        if model.mapped && (write.is_none() || !model.protected) {
            match write {
                Some(token) => (model.cache, model.expected) = (Some(token), token),
                None if model.cache != Some(model.expected) => {
                    return Err(Violation::new(
                        "inv1",
                        format!("CPU reads a wrong value: {region:?} {page} {model:?}"),
                    ));
                }
                None => {}
            }
            return Ok(());
        }
        if model.poisoned {
            return Ok(());
        }
        let (wp, minor) = (model.mapped, !model.mapped && model.cache.is_some());
        self.blocked.push(access);
        if !self.regions.get(&region).is_some_and(|region| region.ready) {
            return Ok(());
        }
        self.events.push_back(Event::CpuFault { region, page, write: write.is_some(), wp, minor });
        Ok(())
    }

    /// The client's own mapping of a frame.
    fn through_aperture(
        &mut self,
        access: CpuAccess,
        model: PageModel,
        device: DeviceId,
        frame: u32,
    ) -> Result<(), Violation> {
        let CpuAccess { region, page, write } = access;
        if model.may_be_lost {
            return Ok(());
        }
        let slot = &mut self.devices[usize::from(device.0)].frames[frame as usize];
        let seen = *slot;
        if let Some(token) = write {
            *slot = token;
            if let Some(model) = self.page(region, page) {
                model.expected = token;
            }
        } else if seen != model.expected {
            let text = format!("CPU reads {seen:#x} in frame {frame} of {device:?}: {region:?} {page} {model:?}");
            return Err(Violation::new("inv1", text));
        }
        Ok(())
    }

    /// Threads that wait at these pages try again.
    pub(super) fn wake(&mut self, region: RegionId, pages: Pages) -> Result<(), Violation> {
        let waiting = std::mem::take(&mut self.blocked);
        let (woken, others): (Vec<_>, Vec<_>) =
            waiting.into_iter().partition(|access| access.region == region && pages.contains(access.page));
        self.blocked = others;
        woken.into_iter().try_for_each(|access| self.try_cpu(access))
    }

    /// A job of a device reads or writes a page: through its mapping, or after a device fault.
    pub fn device_access(
        &mut self,
        device: u8,
        region: RegionId,
        window: Pages,
        page: u64,
        write: bool,
    ) -> Result<(), Violation> {
        let model = &self.devices[usize::from(device)];
        let incarnation = model.incarnation;
        if model.failed || self.regions.get(&region).is_none_or(|region| region.freeing || !region.ready) {
            return Ok(());
        }
        if let Some(Grant { mapping, .. }) = model.mappings.get(&(region, page)).filter(|g| g.writable || !write) {
            let mapping = *mapping;
            let write = write.then(|| self.token(region));
            return self.through(device, mapping, region, page, write);
        }
        if !model.session {
            return Ok(());
        }
        let write = write.then(|| self.token(region));
        let job = Some((device, incarnation, page, write));
        let req = self.request(Open { region, pages: window, job });
        let (device, write) = (DeviceId(device), write.is_some());
        let (whole, exclusive) = (self.rng.chance(30), false);
        let resolve = Event::Resolve { req, region, pages: window, fault_page: page, device, write, whole, exclusive };
        self.events.push_back(resolve);
        Ok(())
    }

    fn through(
        &mut self,
        device: u8,
        mapping: Mapping,
        region: RegionId,
        page: u64,
        write: Option<u64>,
    ) -> Result<(), Violation> {
        self.devices[usize::from(device)].used.get_mut().insert((region, page));
        let discarded = self.entry(region, page).discarded();
        let Some(model) = self.page(region, page) else { return Ok(()) };
        // A job that goes on with what the program has dropped: the device is about to lose it.
        let dropped = discarded || model.given_up;
        let (expected, gone) = (model.expected, model.gone || dropped);
        if let Some(token) = write.filter(|_| !dropped) {
            model.expected = token;
        }
        let seen = match (mapping, write) {
            (Mapping::InPlace, Some(token)) => {
                model.cache = Some(token);
                token
            }
            (Mapping::InPlace, None) => model.cache.unwrap_or(0),
            (Mapping::Frame(frame), _) => {
                let slot = &mut self.devices[usize::from(device)].frames[frame as usize];
                *slot = write.unwrap_or(*slot);
                let seen = *slot;
                if let Some(token) = write {
                    self.others_see(DeviceId(device), frame, (region, page), token)?;
                }
                seen
            }
        };
        if write.is_none() && seen != expected && !gone {
            let text = format!("device {device} reads {seen:#x}, not {expected:#x}: {region:?} {page} {mapping:?}");
            return Err(Violation::new("inv1", text));
        }
        Ok(())
    }

    /// A device fault was answered: the driver installs the mappings and runs its job.
    pub(super) fn install(&mut self, open: Open, runs: &[MapRun]) -> Result<(), Violation> {
        let Some((device, incarnation, page, write)) = open.job else { return Ok(()) };
        let model = &mut self.devices[usize::from(device)];
        if model.incarnation != incarnation {
            return Ok(());
        }
        for run in runs {
            for offset in 0..run.count {
                let mapping = match run.kind {
                    MapKind::Frame(first) => Mapping::Frame(first + offset as u32),
                    MapKind::System => Mapping::InPlace,
                };
                model.mappings.insert((open.region, run.first + offset), Grant { mapping, writable: run.writable });
            }
        }
        let granted = model.mappings.get(&(open.region, page)).copied();
        let mut pages = runs.iter().flat_map(|run| Pages { first: run.first, count: run.count }.iter());
        if let Some(page) = pages.find(|page| self.entry(open.region, *page).discarded()) {
            let text = format!("device {device} is given {:?} page {page}, whose content was given up", open.region);
            return Err(Violation::new("inv3", text));
        }
        match granted {
            Some(grant) if grant.writable || write.is_none() => {
                self.through(device, grant.mapping, open.region, page, write)
            }
            Some(_) => {
                Err(Violation::new("inv5", format!("Resolve of page {page} for a write was answered read-only")))
            }
            None => Err(Violation::new("inv5", format!("Resolve of page {page} was answered without it"))),
        }
    }
}
