//! The pager's death, and what drivers do about it.

use super::check::Violation;
use super::machine::RegionModel;
use super::simulator::Simulator;
use crate::{DeviceId, Event};

impl Simulator {
    /// The pager dies and the next one recovers. What was pending may have happened, wholly or not at all.
    pub fn crash(&mut self) -> Result<(), Violation> {
        self.crash_count += 1;
        while !self.world.pending.is_empty() {
            // What the agent was asked it does before what the next pager asks, or never.
            let able = self.world.deliverable().contains(&0);
            if able && self.world.rng.chance(50) {
                self.world.complete(&self.core, 0)?;
            } else {
                let pending = self.world.pending.swap_remove(0);
                self.world.leave_over(&pending);
            }
        }
        let read = std::mem::take(&mut self.world.events);
        self.world.tidy_scratch();
        self.world.check()?;
        self.world.open.clear();
        self.late.clear();
        self.core = Self::new_core(self.config.seed);
        for event in &read {
            if let Event::Forked { child, .. } = event {
                self.world.unborn(*child);
            }
        }
        let regions: Vec<_> = self.world.regions.keys().copied().collect();
        for region in &regions {
            let RegionModel { space, backing, ref directory, .. } = self.world.regions[region];
            let (region, page_count, strays) = (*region, directory.len() as u64, Vec::new());
            self.world.events.push_back(Event::RecoverRegion { region, space, page_count, backing, strays });
        }
        self.world.events.push_back(Event::Recovered);
        let (kept, read): (Vec<_>, Vec<_>) = read.into_iter().partition(|event| self.is_kept(event));
        self.finish_births();
        self.world.events.extend(kept);
        for region in &regions {
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

    /// What the kernel says of private memory is in the journal until it was dealt with.
    fn is_kept(&self, event: &Event) -> bool {
        match *event {
            Event::Removed { region, .. } | Event::Unmapped { region, .. } => self.world.is_private(region),
            Event::Forked { .. } => true,
            _ => false,
        }
    }

    /// The pager dies while it deals with this event.
    pub(super) fn keep(&mut self, event: &Event) {
        if self.is_kept(event) {
            self.world.events.push_front(event.clone());
        }
    }

    /// Faults that the dead pager had not read are read by the next one; those that it had read are lost.
    fn repeat_faults(&mut self, events: impl IntoIterator<Item = Event>) {
        for event in events {
            let lost = match event {
                Event::CpuFault { .. } => self.world.rng.chance(50),
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

    pub(super) fn log_in_late(&mut self) {
        if let Some((device, fresh)) = self.late.pop() {
            self.log_in(device, fresh, true);
        }
    }

    pub(super) fn driver_dies(&mut self, device: u8, memory_lost: bool) {
        self.late.retain(|(late, _)| *late != usize::from(device));
        let id = DeviceId(device);
        let model = &mut self.world.devices[usize::from(device)];
        model.session = false;
        model.mappings.clear();
        model.memory_is_new |= memory_lost || model.failed;
        self.world.events.push_back(Event::DeviceVoid { device: id });
        self.log_in(usize::from(device), true, true);
    }

    pub(super) fn driver_held(&mut self, device: u8) {
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
}
