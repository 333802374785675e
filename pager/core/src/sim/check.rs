//! What must hold after every single action, whatever has crashed.

use std::collections::{BTreeMap, BTreeSet};

use super::machine::{Grant, JUNK, Mapping, World};
use crate::policy::Policy;
use crate::{Core, DeviceId, Entry, LOST_FRAME, PageState, RegionId};

/// A rule was broken. `rule` is a name of design.md section 4 (`inv1` ... `inv7`), or says what the simulator itself met.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Rule {rule} was broken: {detail}")]
pub struct Violation {
    /// Which rule.
    pub rule: &'static str,
    /// What was seen.
    pub detail: String,
}

impl Violation {
    pub(super) fn new(rule: &'static str, detail: String) -> Self {
        Self { rule, detail }
    }
}

impl World {
    /// Checks everything that can be said without knowing what the pager is about to do.
    pub fn check(&self) -> Result<(), Violation> {
        let mut owners: BTreeMap<(DeviceId, u32), (RegionId, u64)> = BTreeMap::new();
        for (id, region) in &self.regions {
            for page in 0..region.directory.len() as u64 {
                let entry = Entry::decode(region.directory[page as usize])
                    .map_err(|error| Violation::new("inv3", error.to_string()))?;
                if entry.owns_frame()
                    && entry.frame() != LOST_FRAME
                    && let Some(other) = owners.insert((entry.device(), entry.frame()), (*id, page))
                    && !(entry.shared() && self.entry(other.0, other.1).shared())
                {
                    let text = format!("{id:?} page {page} and {other:?} are both in {entry:?}");
                    return Err(Violation::new("inv1", text));
                }
                self.check_valid_copy(*id, page, entry)?;
            }
        }
        self.check_cpu_frames()?;
        self.check_mappings()
    }

    /// The CPU reaches a frame only where the directory says so, and never one that is given away or a device's alone.
    fn check_cpu_frames(&self) -> Result<(), Violation> {
        for (id, region) in &self.regions {
            for (page, model) in (0..).zip(&region.pages) {
                let Some((device, frame)) = model.cpu_frame else { continue };
                let entry = self.entry(*id, page);
                let there = entry.owns_frame() && (entry.device(), entry.frame()) == (device, frame);
                let right = model.may_be_lost || there && entry.state() != PageState::Exclusive;
                if !entry.cpu_mapped() || !right || model.mapped {
                    let text =
                        format!("CPU maps frame {frame} of {device:?}: {id:?} page {page}, directory: {entry:?}");
                    return Err(Violation::new("inv2", text));
                }
            }
        }
        Ok(())
    }

    /// The copy that the directory calls valid holds what was written last.
    fn check_valid_copy(&self, region: RegionId, page: u64, entry: Entry) -> Result<(), Violation> {
        let model = &self.regions[&region].pages[page as usize];
        if !self.regions[&region].complete || entry == Entry::WAITS_FOR_PARENT {
            return Ok(());
        }
        let leaves_a_guard = model.met_guard.is_some() && entry.state() == PageState::MovingHome;
        if model.gone || model.may_be_lost || model.given_up || leaves_a_guard {
            return Ok(());
        }
        let frames = &self.devices[usize::from(entry.device().0)].frames;
        let frame = || frames.get(entry.frame() as usize).copied().unwrap_or(JUNK);
        let in_place = model.cache.unwrap_or(0);
        let (valid, rule) = match entry.state() {
            // Nothing may come of what its frame or scratch still hold.
            _ if entry.discarded() => (in_place, "inv3"),
            PageState::Absent | PageState::System => (in_place, "inv3"),
            PageState::MovingOut => (model.scratch.unwrap_or(in_place), "inv3"),
            // A copy in memory that was just lost is looked at by nobody.
            PageState::Duplicated if ![in_place, JUNK].contains(&frame()) => (frame(), "inv3"),
            PageState::Duplicated => (in_place, "inv3"),
            PageState::Device => (frame(), "inv3"),
            PageState::MovingHome => (model.cache.unwrap_or_else(frame), "inv4"),
            _ => return Ok(()),
        };
        if valid != model.expected {
            let text = format!("{region:?} page {page}: {entry:?} holds {valid:#x}, written was {:#x}", model.expected);
            return Err(Violation::new(rule, text));
        }
        Ok(())
    }

    /// Devices map what the directory says, and never what the CPU maps as something else.
    fn check_mappings(&self) -> Result<(), Violation> {
        for (id, device) in self.devices.iter().enumerate() {
            for ((region, page), Grant { mapping, writable }) in &device.mappings {
                let entry = self.entry(*region, *page);
                let told = entry.mapped_mask() & (1 << id) != 0;
                let right = match mapping {
                    Mapping::Frame(frame) => {
                        entry.owns_frame() && usize::from(entry.device().0) == id && entry.frame() == *frame
                    }
                    // The system page of a copy, until the copy's end has been told to everybody.
                    Mapping::InPlace if entry.owns_frame() => {
                        !writable && matches!(entry.state(), PageState::Duplicated | PageState::MovingHome)
                    }
                    Mapping::InPlace => matches!(entry.state(), PageState::System | PageState::MovingOut),
                };
                if !told || !right {
                    let text = format!("device {id} maps {region:?} page {page} as {mapping:?}, directory: {entry:?}");
                    return Err(Violation::new("inv2", text));
                }
                let model = &self.regions[region].pages[*page as usize];
                let copy = model.protected && !writable;
                if model.mapped && *mapping != Mapping::InPlace && !copy {
                    let text = format!("CPU and device {id} map different copies of {region:?} page {page}");
                    return Err(Violation::new("inv1", text));
                }
            }
        }
        Ok(())
    }

    /// Nothing is in flight any more: nobody may wait, no frame may be lost, nothing of a dead client may be left.
    pub fn check_at_rest<P: Policy>(&self, core: &Core<P>) -> Result<(), Violation> {
        if !core.idle() {
            let text =
                format!("The core is not idle though nothing is in flight: {:?} {:?}", core.requests, core.transfers);
            return Err(Violation::new("inv7", text));
        }
        if let Some(access) = self.blocked.first() {
            let entry = self.entry(access.region, access.page);
            return Err(Violation::new("inv7", format!("{access:?} waits for ever, directory: {entry:?}")));
        }
        if let Some((req, open)) = self.open.first_key_value() {
            return Err(Violation::new("inv5", format!("{req:?} was never answered: {open:?}")));
        }
        for (id, region) in &self.regions {
            if !region.ready {
                return Err(Violation::new("inv7", format!("{id:?} of a forked child is never served")));
            }
            if let Some(page) = (0..region.directory.len() as u64).find(|page| self.entry(*id, *page).is_moving()) {
                let text = format!("{id:?} page {page} is on the move for ever: {:?}", self.entry(*id, page));
                return Err(Violation::new("inv3", text));
            }
            if let Some(page) = (0..region.directory.len() as u64).find(|page| self.entry(*id, *page).discarded()) {
                let text = format!("{id:?} page {page} was given up and is still there: {:?}", self.entry(*id, page));
                return Err(Violation::new("inv3", text));
            }
        }
        let is_gone = |space| self.gone_spaces.contains(&space) && !self.forked.contains(&space);
        for (id, device) in self.devices.iter().enumerate().filter(|(_, device)| !device.failed) {
            let Some(table) = &core.frames[id] else { continue };
            let entries = self.regions.values().flat_map(|region| &region.directory);
            let owned = entries
                .filter_map(|bits| Entry::decode(*bits).ok())
                .filter(|entry| entry.owns_frame() && usize::from(entry.device().0) == id)
                .map(Entry::frame)
                .collect::<BTreeSet<_>>()
                .len();
            if owned as u32 + table.free_count() != table.frame_count() {
                let text =
                    format!("device {id}: {owned} owned + {} free of {}", table.free_count(), table.frame_count());
                return Err(Violation::new("inv4", text));
            }
            if let Some(left) = device.frames.iter().find(|v| is_gone(Self::space_of_token(**v))) {
                let text = format!("device {id} still holds {left:#x} of a dead client: {:x?}", device.frames);
                return Err(Violation::new("inv4", text));
            }
        }
        Ok(())
    }
}
