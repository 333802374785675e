//! The pager's side of the simulation: its queue, its core, its death, and what tests make happen.

use super::Faults;
use super::check::Violation;
use super::machine::{Open, RegionModel, World};
use crate::{Action, Backing, Core, DefaultPolicy, DeviceId, Event, Pages, RegionId, SpaceId, Target};

/// Steps after which a machine that is left alone must have come to rest.
const REST_STEPS_MAX: u32 = 20_000;

/// What a machine looks like.
#[derive(Clone, Debug)]
pub struct Config {
    /// Pages of each region; every region has its own client.
    pub page_counts: Vec<u64>,
    /// Frames of each device.
    pub frame_counts: Vec<u32>,
    /// Bit n: region n is the client's private memory.
    pub private_mask: u8,
    /// How often steps fail.
    pub faults: Faults,
    /// The CPU reaches the memory of device 0.
    pub coherent: bool,
    /// Of everything random.
    pub seed: u64,
}

/// One thing that happens. Regions and devices are counted from zero; numbers that are too big wrap around.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "field names are the fields' meaning; each variant is documented")]
pub enum Op {
    /// A thread touches a page.
    Cpu { region: u8, page: u8, write: bool },
    /// A device job touches a page; `around` more pages may come along.
    Device { device: u8, region: u8, page: u8, around: u8, write: bool },
    /// Migration to a device, or home (`None`).
    Migrate { region: u8, page: u8, count: u8, device: Option<u8> },
    /// Pin or unpin.
    Pin { region: u8, page: u8, count: u8, on: bool },
    /// Devices map the region's system pages in place.
    Advise { region: u8, in_place: bool },
    /// Reading devices get copies of the region's pages, from now on; who has something mapped loses it.
    ReadMostly { region: u8, on: bool },
    /// Some devices lose their mappings (protection, advice). Bit n: device n.
    Revoke { region: u8, page: u8, count: u8, devices: u8 },
    /// A client wants its pages home from a device, coldest first.
    Evict { region: u8, device: u8, count: u8 },
    /// MADV_DONTNEED of private memory.
    DontNeed { region: u8, page: u8, count: u8 },
    /// The client of a private region forks: its child has one more region.
    Fork { region: u8 },
    /// Guards are put into private memory, or taken away. Nobody is told.
    Guard { region: u8, page: u8, count: u8, on: bool },
    /// munmap of a part.
    Unmap { region: u8, page: u8, count: u8 },
    /// The region is freed; `end_space`: with its client.
    Free { region: u8, end_space: bool },
    /// A freed region is made anew.
    Create { region: u8 },
    /// The driver dies; a new one logs in. `memory_lost`: with other memory.
    DriverDies { device: u8, memory_lost: bool },
    /// The driver dies and is held; it may be revived by [`Op::DriverDies`].
    DriverHeld { device: u8 },
    /// The pager handles so many events of its queue.
    Pump { count: u8 },
    /// One pending action ends.
    Deliver { index: u8 },
    /// The pager ticks.
    Tick,
    /// The pager dies after so many more actions.
    CrashAfter { actions: u8 },
}

/// See the module head of `sim`.
#[derive(Debug)]
pub struct Simulator {
    /// The core of the pager that lives now.
    pub core: Core<DefaultPolicy>,
    /// Everything else.
    pub world: World,
    pub(super) config: Config,
    pub(super) slots: Vec<RegionId>,
    pub(super) spaces: Vec<SpaceId>,
    crash_in: Option<u64>,
    next_id: u64,
    /// The clock: a microsecond an event, so that histories without pauses look like a fight.
    now_us: u64,
    /// Drivers that have not found the new pager yet, and whether their mappings are void.
    pub(super) late: Vec<(usize, bool)>,
    /// Pagers that died.
    pub crash_count: u32,
    /// Events and actions in order, when somebody wants to read them.
    pub log: Option<Vec<String>>,
}

impl Simulator {
    /// Regions made, devices logged in, nothing touched.
    pub fn new(config: Config) -> Self {
        let world = World::new(&config.frame_counts, config.faults, config.seed);
        let mut simulator = Self {
            core: Self::new_core(config.seed),
            world,
            slots: Vec::new(),
            spaces: Vec::new(),
            crash_in: None,
            now_us: 0,
            next_id: 1,
            late: Vec::new(),
            crash_count: 0,
            log: None,
            config,
        };
        for slot in 0..simulator.config.page_counts.len() {
            let (region, space) = (simulator.new_id(), simulator.new_id());
            simulator.slots.push(RegionId(region));
            simulator.spaces.push(SpaceId(space));
            simulator.make_region(slot);
        }
        for device in 0..simulator.config.frame_counts.len() {
            simulator.log_in(device, false, false);
        }
        simulator
    }

    /// Half of the machines look at so few pages a step that their small regions take several, too.
    pub(super) fn new_core(seed: u64) -> Core<DefaultPolicy> {
        let core = Core::new(DefaultPolicy::default());
        if seed.is_multiple_of(2) { core } else { core.with_budget(1 + seed / 2 % 7) }
    }

    pub(super) fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub(super) fn make_region(&mut self, slot: usize) {
        let (region, space) = (self.slots[slot], self.spaces[slot]);
        let page_count = self.config.page_counts[slot];
        let private = self.config.private_mask >> slot & 1 != 0;
        let backing = if private { Backing::Private } else { Backing::Shared };
        let model = RegionModel {
            space,
            backing,
            pages: vec![Default::default(); page_count as usize],
            directory: vec![0; page_count as usize],
            attr: Default::default(),
            freeing: false,
            parent: None,
            complete: true,
            ready: true,
        };
        self.world.regions.insert(region, model);
        self.world.events.push_back(Event::RegionAdded { region, space, page_count, backing });
    }

    pub(super) fn log_in(&mut self, device: usize, fresh_mappings: bool, memory_known: bool) {
        let model = &mut self.world.devices[device];
        let memory_lost = model.memory_is_new;
        if fresh_mappings {
            model.mappings.clear();
            model.incarnation += 1;
        }
        let frame_count = model.frames.len() as u32;
        let device = DeviceId(device as u8);
        self.world.end_leftovers(device);
        let memory_known = memory_known && !memory_lost;
        let coherent = self.config.coherent && device.0 == 0;
        let event = Event::DeviceUp { device, frame_count, fresh_mappings, memory_known, memory_lost, coherent };
        self.world.events.push_back(event);
    }

    /// The region that a slot holds now.
    pub fn region(&self, slot: u8) -> RegionId {
        self.slots[usize::from(slot) % self.slots.len()]
    }

    pub(super) fn pages(&self, slot: u8, page: u8, count: u8) -> (RegionId, Pages) {
        let slot = usize::from(slot) % self.slots.len();
        let page_count = self.config.page_counts[slot];
        let first = u64::from(page) % page_count;
        (self.slots[slot], Pages { first, count: (u64::from(count).max(1)).min(page_count - first) })
    }

    pub(super) fn device(&self, device: u8) -> u8 {
        device % self.config.frame_counts.len() as u8
    }

    pub(super) fn usable(&self, region: RegionId) -> bool {
        self.world.regions.get(&region).is_some_and(|region| !region.freeing && region.ready)
    }

    /// Something happens, and what the pager must do at once is done and checked.
    pub fn apply(&mut self, op: Op) -> Result<(), Violation> {
        match op {
            Op::Cpu { region, page, write } => {
                let (region, pages) = self.pages(region, page, 1);
                self.world.cpu_access(region, pages.first, write)?;
            }
            Op::Device { device, region, page, around, write } => {
                let (region, window) = self.pages(region, page.saturating_sub(around / 2), around.max(1));
                let fault_page = window.first + u64::from(around / 2).min(window.count - 1);
                self.world.device_access(self.device(device), region, window, fault_page, write)?;
            }
            Op::Migrate { region, page, count, device } => {
                let (region, pages) = self.pages(region, page, count);
                if self.usable(region) {
                    let target = device.map_or(Target::Home, |device| Target::Device(DeviceId(self.device(device))));
                    let req = self.world.request(Open { region, pages, job: None });
                    self.world.events.push_back(Event::Migrate { req, region, pages, target });
                }
            }
            Op::Pin { region, page, count, on } => {
                let (region, pages) = self.pages(region, page, count);
                if self.usable(region) {
                    let req = self.world.request(Open { region, pages, job: None });
                    self.world.events.push_back(Event::Pin { req, region, pages, on });
                }
            }
            Op::Advise { region, in_place } => {
                let mask = if in_place { u8::MAX } else { 0 };
                if let Some(model) = self.world.regions.get_mut(&self.region(region)) {
                    model.attr = model.attr.with_in_place_mask(mask);
                }
            }
            Op::ReadMostly { .. } | Op::Revoke { .. } | Op::Evict { .. } => self.advise(op),
            Op::Unmap { region, page, count } => {
                let (region, pages) = self.pages(region, page, count);
                self.unmap(region, pages);
            }
            Op::DontNeed { region, page, count } => {
                let (region, pages) = self.pages(region, page, count);
                self.dont_need(region, pages);
            }
            Op::Fork { region } => self.fork(region),
            Op::Guard { region, page, count, on } => {
                let (region, pages) = self.pages(region, page, count);
                self.world.guard(region, pages, on);
            }
            Op::Free { region, end_space } => self.free(region, end_space),
            Op::Create { region } => self.create(region),
            Op::DriverDies { device, memory_lost } => self.driver_dies(self.device(device), memory_lost),
            Op::DriverHeld { device } => self.driver_held(self.device(device)),
            Op::Pump { count } => self.pump(u32::from(count))?,
            Op::Deliver { index } => self.deliver(usize::from(index))?,
            Op::Tick => {
                self.world.events.push_back(Event::Tick);
                if self.world.rng.chance(30) {
                    self.log_in_late();
                }
            }
            Op::CrashAfter { actions } => self.crash_in = Some(u64::from(actions)),
        }
        self.world.check()
    }

    /// Handles up to `count` events.
    pub fn pump(&mut self, count: u32) -> Result<(), Violation> {
        for _ in 0..count {
            let Some(event) = self.world.events.pop_front() else { break };
            self.handle(event)?;
        }
        Ok(())
    }

    fn handle(&mut self, event: Event) -> Result<(), Violation> {
        self.before(&event);
        let crashes = self.crash_count;
        while let Some(first) = self.core.first(&event) {
            self.decide(&first, &event)?;
            if self.crash_count != crashes {
                return Ok(());
            }
        }
        self.decide(&event, &event)?;
        if self.crash_count != crashes {
            return Ok(());
        }
        match event {
            Event::DeviceUp { device, memory_lost: true, .. } => {
                self.world.devices[usize::from(device.0)].memory_is_new = false;
            }
            Event::Removed { region, pages } | Event::Unmapped { region, pages } => {
                self.world.content_is_dropped(region, pages);
            }
            Event::Forked { child, .. } => self.world.is_born(child),
            _ => {}
        }
        Ok(())
    }

    /// The core decides about an event, and it is done. `kept`: what the next pager is told again when this one dies meanwhile.
    fn decide(&mut self, event: &Event, kept: &Event) -> Result<(), Violation> {
        self.note(|| format!("{event:?}"));
        let mut actions = Vec::new();
        self.now_us += 1;
        self.core.handle(&self.world, self.now_us, event.clone(), &mut actions);
        for action in actions {
            self.note(|| format!("  -> {action:?}"));
            if self.crash_in == Some(0) {
                self.crash_in = None;
                self.world.execute_torn(action)?;
                self.keep(kept);
                return self.crash();
            }
            self.crash_in = self.crash_in.map(|left| left - 1);
            let dropped = match action {
                Action::DropRegion { region } => Some(region),
                _ => None,
            };
            self.world.execute(action)?;
            self.world.check()?;
            if let Some(region) = dropped {
                self.announce_end(region);
            }
        }
        Ok(())
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(line());
        }
    }

    /// The client's last region is gone.
    fn announce_end(&mut self, region: RegionId) {
        let slot = self.slots.iter().position(|slot| *slot == region);
        if let Some(space) = slot.map(|slot| self.spaces[slot]).filter(|s| self.world.gone_spaces.contains(s)) {
            self.world.events.push_back(Event::SpaceGone { space });
        }
    }

    /// What the event says becomes true in the world.
    fn before(&mut self, event: &Event) {
        match *event {
            Event::DeviceUp { device, memory_lost, .. } => {
                if memory_lost {
                    self.world.lose_memory(device);
                }
                // A driver that has died since was never spoken to.
                let died = self.world.events.contains(&Event::DeviceVoid { device });
                let model = &mut self.world.devices[usize::from(device.0)];
                (model.session, model.failed) = (!died, false);
            }
            Event::Removed { region, pages } | Event::Unmapped { region, pages } => {
                self.world.drop_content(region, pages);
            }
            Event::Forked { parent, child, space } => self.world.bear(parent, child, space),
            Event::DeviceFailed { device } => {
                self.world.lose_memory(device);
                let model = &mut self.world.devices[usize::from(device.0)];
                (model.session, model.failed) = (false, true);
            }
            _ => {}
        }
    }

    /// One pending action ends, if any can.
    pub fn deliver(&mut self, index: usize) -> Result<(), Violation> {
        let ready = self.world.deliverable();
        if !ready.is_empty() {
            let event = self.world.complete(&self.core, ready[index % ready.len()])?;
            self.world.events.push_back(event);
        }
        Ok(())
    }

    /// From now on steps fail this often.
    pub fn set_faults(&mut self, faults: Faults) {
        self.world.faults = faults;
    }

    /// No more faults (a crash that was armed still comes): everything must come to rest, and every value must be where the directory says.
    pub fn finish(&mut self) -> Result<(), Violation> {
        self.set_faults(Faults::default());
        for _ in 0..REST_STEPS_MAX {
            if !self.world.events.is_empty() {
                self.pump(1)?;
            } else if !self.world.deliverable().is_empty() {
                let index = self.world.rng.next_u64() as usize % 64;
                self.deliver(index)?;
            } else if self.core.has_runnable_work() || !self.core.again.is_empty() {
                self.world.events.push_back(Event::Tick);
            } else if let Some(deadline_us) = self.core.next_deadline_us() {
                self.now_us = self.now_us.max(deadline_us);
                self.world.events.push_back(Event::Tick);
            } else if !self.late.is_empty() {
                self.log_in_late();
            } else {
                self.world.check()?;
                return self.world.check_at_rest(&self.core);
            }
        }
        let (blocked, open) = self.world.waiting();
        let text = format!("No rest after {REST_STEPS_MAX} steps: {blocked} accesses and {open} requests wait");
        Err(Violation { rule: "inv7", detail: text })
    }

    /// Comes to rest, then reads every page by CPU and sees what was written last.
    pub fn finish_and_read_all(&mut self) -> Result<(), Violation> {
        self.finish()?;
        let all: Vec<_> = self.world.regions.iter().map(|(id, region)| (*id, region.pages.len() as u64)).collect();
        for (region, page_count) in all {
            for page in 0..page_count {
                self.world.cpu_access(region, page, false)?;
            }
        }
        self.finish()
    }
}
