//! The pager's side of the simulation: its queue, its core, its death, and what tests make happen.

use super::Faults;
use super::check::Violation;
use super::machine::{CpuAccess, Open, RegionModel, World};
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
    config: Config,
    slots: Vec<RegionId>,
    spaces: Vec<SpaceId>,
    crash_in: Option<u64>,
    next_id: u64,
    /// The clock: a microsecond an event, so that histories without pauses look like a fight.
    now_us: u64,
    /// Drivers that have not found the new pager yet, and whether their mappings are void.
    late: Vec<(usize, bool)>,
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
            core: Core::new(DefaultPolicy::default()),
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

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn make_region(&mut self, slot: usize) {
        let (region, space) = (self.slots[slot], self.spaces[slot]);
        let page_count = self.config.page_counts[slot];
        let model = RegionModel {
            space,
            pages: vec![Default::default(); page_count as usize],
            directory: vec![0; page_count as usize],
            attr: Default::default(),
            freeing: false,
        };
        self.world.regions.insert(region, model);
        self.world.events.push_back(Event::RegionAdded { region, space, page_count, backing: Backing::Shared });
    }

    fn log_in(&mut self, device: usize, fresh_mappings: bool, memory_known: bool) {
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

    fn pages(&self, slot: u8, page: u8, count: u8) -> (RegionId, Pages) {
        let slot = usize::from(slot) % self.slots.len();
        let page_count = self.config.page_counts[slot];
        let first = u64::from(page) % page_count;
        (self.slots[slot], Pages { first, count: (u64::from(count).max(1)).min(page_count - first) })
    }

    fn device(&self, device: u8) -> u8 {
        device % self.config.frame_counts.len() as u8
    }

    fn usable(&self, region: RegionId) -> bool {
        self.world.regions.get(&region).is_some_and(|region| !region.freeing)
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
            Op::Unmap { region, page, count } => {
                let (region, pages) = self.pages(region, page, count);
                self.unmap(region, pages);
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

    fn unmap(&mut self, region: RegionId, pages: Pages) {
        if !self.usable(region) {
            return;
        }
        let gone = |access: &CpuAccess| access.region == region && pages.contains(access.page);
        self.world.blocked.retain(|access| !gone(access));
        for page in pages.iter() {
            if let Some(model) = self.world.page(region, page) {
                (model.gone, model.mapped) = (true, false);
            }
        }
        self.world.events.push_back(Event::Unmapped { region, pages });
    }

    fn free(&mut self, slot: u8, end_space: bool) {
        let slot = usize::from(slot) % self.slots.len();
        let region = self.slots[slot];
        if !self.usable(region) {
            return;
        }
        self.world.blocked.retain(|access| access.region != region);
        if let Some(model) = self.world.regions.get_mut(&region) {
            model.freeing = true;
        }
        self.ask_to_free(region);
        if end_space {
            self.world.gone_spaces.insert(self.spaces[slot]);
        }
    }

    fn ask_to_free(&mut self, region: RegionId) {
        let pages = Pages { first: 0, count: 0 };
        let req = self.world.request(Open { region, pages, job: None });
        self.world.events.push_back(Event::RegionFree { req: Some(req), region });
    }

    fn create(&mut self, slot: u8) {
        let slot = usize::from(slot) % self.slots.len();
        if self.world.regions.contains_key(&self.slots[slot]) {
            return;
        }
        self.slots[slot] = RegionId(self.new_id());
        if self.world.gone_spaces.contains(&self.spaces[slot]) {
            self.spaces[slot] = SpaceId(self.new_id());
        }
        self.make_region(slot);
    }

    fn log_in_late(&mut self) {
        if let Some((device, fresh)) = self.late.pop() {
            self.log_in(device, fresh, true);
        }
    }

    fn driver_dies(&mut self, device: u8, memory_lost: bool) {
        self.late.retain(|(late, _)| *late != usize::from(device));
        let id = DeviceId(device);
        let model = &mut self.world.devices[usize::from(device)];
        model.session = false;
        model.mappings.clear();
        model.memory_is_new |= memory_lost || model.failed;
        self.world.events.push_back(Event::DeviceVoid { device: id });
        self.log_in(usize::from(device), true, true);
    }

    fn driver_held(&mut self, device: u8) {
        self.late.retain(|(late, _)| *late != usize::from(device));
        let id = DeviceId(device);
        let model = &mut self.world.devices[usize::from(device)];
        model.session = false;
        model.mappings.clear();
        model.incarnation += 1;
        model.memory_is_new = true;
        self.world.events.push_back(Event::DeviceVoid { device: id });
        self.world.events.push_back(Event::DeviceFailed { device: id });
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
        self.note(|| format!("{event:?}"));
        let mut actions = Vec::new();
        self.now_us += 1;
        self.core.handle(&self.world, self.now_us, event.clone(), &mut actions);
        for action in actions {
            self.note(|| format!("  -> {action:?}"));
            if self.crash_in == Some(0) {
                self.crash_in = None;
                self.world.execute_torn(action)?;
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
        if let Event::DeviceUp { device, memory_lost: true, .. } = event {
            self.world.devices[usize::from(device.0)].memory_is_new = false;
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
            let event = self.world.complete(ready[index % ready.len()])?;
            self.world.events.push_back(event);
        }
        Ok(())
    }

    /// The pager dies and the next one recovers. What was pending may have happened, wholly or not at all.
    pub fn crash(&mut self) -> Result<(), Violation> {
        self.crash_count += 1;
        let read = std::mem::take(&mut self.world.events);
        while !self.world.pending.is_empty() {
            // What the agent was asked it does before what the next pager asks, or never.
            let able = self.world.deliverable().contains(&0);
            if able && self.world.rng.chance(50) {
                self.world.complete(0)?;
            } else {
                let pending = self.world.pending.swap_remove(0);
                self.world.leave_over(&pending);
            }
        }
        self.world.check()?;
        self.world.open.clear();
        self.late.clear();
        self.core = Core::new(DefaultPolicy::default());
        self.world.events.clear();
        let regions: Vec<_> =
            self.world.regions.iter().map(|(id, r)| (*id, r.space, r.directory.len() as u64)).collect();
        for (region, space, page_count) in &regions {
            let (region, space, page_count) = (*region, *space, *page_count);
            self.world.events.push_back(Event::RecoverRegion {
                region,
                space,
                page_count,
                backing: Backing::Shared,
                strays: Vec::new(),
            });
        }
        self.world.events.push_back(Event::Recovered);
        for (region, ..) in &regions {
            if self.world.regions[region].freeing {
                self.ask_to_free(*region);
            }
        }
        self.repeat_faults(read);
        for device in 0..self.world.devices.len() {
            let held = self.world.devices[device].failed;
            self.world.devices[device].session = false;
            if held {
                self.world.events.push_back(Event::DeviceFailed { device: DeviceId(device as u8) });
            } else {
                let fresh = self.world.rng.chance(50);
                if self.world.rng.chance(50) {
                    self.late.push((device, fresh));
                } else {
                    self.log_in(device, fresh, true);
                }
            }
        }
        Ok(())
    }

    /// Faults that the dead pager had not read are read by the next one; those that it had read are lost.
    fn repeat_faults(&mut self, events: impl IntoIterator<Item = Event>) {
        for event in events {
            let lost = match event {
                Event::CpuFault { .. } => self.world.rng.chance(50),
                // The kernel's word about the address space is repeated by nobody, but a page without content harms nobody either.
                Event::DeviceFailed { device } => {
                    self.world.devices[usize::from(device.0)].failed = true;
                    true
                }
                _ => true,
            };
            if !lost {
                self.world.events.push_back(event);
            }
        }
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
