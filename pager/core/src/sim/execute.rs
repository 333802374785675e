//! What each action does to the machine.

use super::check::Violation;
use super::machine::{JUNK, Mapping, RegionModel, World};
use super::private::Taken;
use crate::{
    Action, CPU, Core, DefaultPolicy, DeviceId, Event, FillStop, Outcome, PageState, Pages, RegionId, ReqId,
    StepResult, Ticket,
};

/// An action that is answered later.
#[derive(Clone, Debug)]
pub(super) struct Pending {
    pub action: Action,
    /// Bytes that were read when it began; the rest of the work is done when it ends.
    pub early: Option<Vec<u64>>,
    /// The same of private pages that the agent has taken out.
    pub taken: Option<Vec<Taken>>,
    /// It cannot succeed any more.
    pub fail: bool,
    /// When it was asked: a client's agent does one thing after the other.
    order: u64,
}

impl Pending {
    /// The client's agent has to do something for it.
    fn is_the_agents(&self) -> bool {
        match &self.action {
            Action::MapCpu { .. } => true,
            Action::Revoke { devices, .. } => devices & CPU != 0,
            _ => false,
        }
    }

    /// The device that has to do something for it; revocations are the mirror's.
    pub fn device(&self) -> Option<DeviceId> {
        match &self.action {
            Action::CopyOut { device, .. }
            | Action::ZeroFrames { device, .. }
            | Action::Scrub { device, .. }
            | Action::Fill { device, .. }
            | Action::CopyAcross { to: device, .. } => Some(*device),
            _ => None,
        }
    }
}

impl World {
    /// Applies one action. Those that take time become pending.
    pub(super) fn execute(&mut self, action: Action) -> Result<(), Violation> {
        self.action_count += 1;
        match action {
            Action::Publish { region, first, entries } => {
                for (offset, entry) in entries.iter().enumerate() {
                    self.publish(region, first + offset as u64, entry)?;
                }
            }
            Action::WriteProtect { ticket, region, pages, on } => self.write_protect(ticket, region, pages, on)?,
            Action::Punch { ticket, region, pages } if !self.is_private(region) => {
                let result = self.punch(region, pages);
                self.events.push_back(Event::PunchDone { ticket, result });
            }
            Action::Wake { region, pages } => self.wake(region, pages)?,
            Action::Poison { region, pages } => drop(self.poison(region, pages)?),
            Action::PoisonLost { ticket, region, pages } => {
                let result = self.poison(region, pages)?;
                self.events.push_back(Event::PoisonDone { ticket, result });
            }
            Action::ZeroFill { ticket, region, pages } => {
                let zeroes = vec![0; pages.count as usize];
                let (done_pages, stop) = self.fill_pages(region, pages, &zeroes)?;
                self.events.push_back(Event::CpuFillDone { ticket, done_pages, stop });
            }
            Action::Continue { ticket, region, pages } => {
                let (done_pages, stop) = self.continue_pages(region, pages)?;
                self.events.push_back(Event::CpuFillDone { ticket, done_pages, stop });
            }
            Action::Reply { req, outcome } => self.answer(req, &outcome)?,
            Action::ForkReady { region } => self.serve(region)?,
            Action::DropRegion { region } => {
                let mapped = self.devices.iter().any(|d| d.mappings.keys().any(|(of, _)| *of == region));
                let cpu = |region: &RegionModel| region.pages.iter().any(|page| page.cpu_frame.is_some());
                let mapped = mapped || self.regions.get(&region).is_some_and(cpu);
                if mapped {
                    return Err(Violation::new(
                        "inv2",
                        format!("{region:?} is dropped while somebody maps its frames"),
                    ));
                }
                self.regions.remove(&region);
                self.blocked.retain(|access| access.region != region);
            }
            Action::Trace { .. } => {}
            action => self.begin(action),
        }
        Ok(())
    }

    fn publish(&mut self, region: RegionId, page: u64, entry: crate::Entry) -> Result<(), Violation> {
        let old = self.entry(region, page);
        let Some(target) = self.regions.get_mut(&region) else {
            return Err(Violation::new("inv3", format!("Publish to {region:?}, which was dropped")));
        };
        let Some(model) = target.pages.get(page as usize) else {
            return Err(Violation::new("inv3", format!("Publish to page {page} outside {region:?}")));
        };
        let newly_lost = entry.state() == PageState::Poisoned && old.state() != PageState::Poisoned;
        if newly_lost && !model.may_be_lost && !model.gone {
            return Err(Violation::new(
                "inv5",
                format!("{region:?} page {page} is poisoned but was not lost: {old:?}"),
            ));
        }
        let model = &mut target.pages[page as usize];
        if !entry.is_moving() {
            model.met_guard = None;
        }
        // A child's page was on its parent's way out, and did not arrive: it is lost to the child, which is told so by poison.
        let is_lost = old == crate::Entry::WAITS_FOR_PARENT && entry.state() == PageState::System;
        model.may_be_lost |= is_lost && model.cache.is_none() && model.expected != 0;
        target.directory[page as usize] = old.followed_by(entry).bits();
        Ok(())
    }

    fn write_protect(&mut self, ticket: Ticket, region: RegionId, pages: Pages, on: bool) -> Result<(), Violation> {
        let again = self.rng.chance(self.faults.again) || self.is_changing(region);
        let result = if again { StepResult::Again } else { StepResult::Ok };
        if result == StepResult::Ok {
            for page in pages.iter() {
                if let Some(model) = self.page(region, page) {
                    model.protected = on;
                }
            }
            if !on {
                self.wake(region, pages)?;
            }
        }
        self.events.push_back(Event::WpDone { ticket, result });
        Ok(())
    }

    /// As every fill, not while an event of the address space is unread.
    fn poison(&mut self, region: RegionId, pages: Pages) -> Result<StepResult, Violation> {
        if self.rng.chance(self.faults.again) || self.is_changing(region) {
            self.wake(region, pages)?;
            return Ok(if self.rng.chance(50) { StepResult::Again } else { StepResult::Later });
        }
        for page in pages.iter() {
            if let Some(model) = self.page(region, page) {
                model.poisoned |= !model.mapped;
            }
        }
        self.wake(region, pages)?;
        Ok(StepResult::Ok)
    }

    fn punch(&mut self, region: RegionId, pages: Pages) -> StepResult {
        let fails = self.rng.chance(self.faults.io);
        let count = if fails { self.rng.below(pages.count) } else { pages.count };
        for page in pages.iter().take(count as usize) {
            if let Some(model) = self.page(region, page) {
                (model.cache, model.mapped) = (None, false);
            }
        }
        if fails { StepResult::Io } else { StepResult::Ok }
    }

    fn fill_pages(
        &mut self,
        region: RegionId,
        pages: Pages,
        values: &[u64],
    ) -> Result<(u64, Option<FillStop>), Violation> {
        let mut done = 0;
        if self.is_changing(region) {
            return Ok((0, Some(FillStop::Again)));
        }
        for (page, value) in pages.iter().zip(values) {
            if self.rng.chance(self.faults.again) {
                let stop = if self.rng.chance(50) { FillStop::Again } else { FillStop::NoMemory };
                return Ok((done, Some(stop)));
            }
            if done > 0 && self.rng.chance(self.faults.partial) {
                return Ok((done, None));
            }
            let Some(model) = self.page(region, page) else { return Ok((done, Some(FillStop::NoProcess))) };
            if model.guard {
                return Ok((done, Some(self.met_guards(region, pages.after(done)))));
            }
            if model.cache.is_some() {
                return Ok((done, Some(FillStop::Exists)));
            }
            (model.cache, model.mapped, model.protected, model.poisoned) = (Some(*value), true, false, false);
            self.wake(region, Pages::one(page))?;
            done += 1;
        }
        Ok((done, None))
    }

    fn continue_pages(&mut self, region: RegionId, pages: Pages) -> Result<(u64, Option<FillStop>), Violation> {
        if self.is_private(region) {
            let there = self.page(region, pages.first).is_some_and(|model| model.cache.is_some());
            return Ok((0, Some(if there { FillStop::Exists } else { FillStop::NoPage })));
        }
        for (done, page) in pages.iter().enumerate() {
            let done = done as u64;
            if self.rng.chance(self.faults.again) {
                return Ok((done, Some(FillStop::Again)));
            }
            match self.page(region, page) {
                None => return Ok((done, Some(FillStop::NoProcess))),
                Some(model) if model.cache.is_none() => return Ok((done, Some(FillStop::NoPage))),
                Some(model) if model.mapped => return Ok((done, Some(FillStop::Exists))),
                Some(model) => (model.mapped, model.protected) = (true, false),
            }
            self.wake(region, Pages::one(page))?;
        }
        Ok((pages.count, None))
    }

    fn answer(&mut self, req: ReqId, outcome: &Outcome) -> Result<(), Violation> {
        let Some(open) = self.open.remove(&req) else {
            return Err(Violation::new("inv5", format!("{req:?} was answered twice")));
        };
        match outcome {
            Outcome::Resolved { runs } => self.install(open, runs),
            Outcome::Migrated { runs, .. } => {
                let mut next = open.pages.first;
                for run in runs {
                    if run.first != next {
                        return Err(Violation::new("inv5", format!("Pages without a fate: {runs:?}")));
                    }
                    next += run.count;
                }
                let whole = next == open.pages.end();
                if whole { Ok(()) } else { Err(Violation::new("inv5", format!("Pages without a fate: {runs:?}"))) }
            }
            Outcome::Done if open.pages.count == 0 && self.regions.contains_key(&open.region) => {
                Err(Violation::new("inv4", format!("{:?} is said to be gone and is not", open.region)))
            }
            Outcome::Done | Outcome::Failed(_) => Ok(()),
        }
    }

    /// Copies may read their source at once and finish later, or do everything when they finish.
    fn begin(&mut self, action: Action) {
        let early = self.rng.chance(50);
        let order = self.action_count;
        let mut pending = Pending { action, early: None, taken: None, fail: false, order };
        match pending.action {
            Action::CopyOut { region, pages, keep, .. } if self.is_private(region) => {
                let early = early && !self.is_changing(region);
                pending.taken = early.then(|| self.take_out(region, pages, keep));
            }
            _ => pending.early = early.then(|| self.source(&pending.action)),
        }
        self.pending.push(pending);
    }

    pub(super) fn source(&mut self, action: &Action) -> Vec<u64> {
        match action {
            Action::CopyOut { region, pages, .. } => {
                pages.iter().map(|page| self.page(*region, page).and_then(|p| p.cache).unwrap_or(0)).collect()
            }
            Action::Fill { device, frame, pages, .. } => {
                let frames = &self.devices[usize::from(device.0)].frames;
                (0..pages.count).map(|offset| frames[*frame as usize + offset as usize]).collect()
            }
            Action::CopyAcross { from, from_frame, count, .. } => {
                let frames = &self.devices[usize::from(from.0)].frames;
                (0..*count).map(|offset| frames[(*from_frame + offset) as usize]).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Which pending actions can end now.
    pub(super) fn deliverable(&self) -> Vec<usize> {
        let ready = |pending: &Pending| {
            pending.fail
                || pending.device().is_none_or(|device| {
                    let device = &self.devices[usize::from(device.0)];
                    device.session || device.failed
                })
        };
        let next = self.pending.iter().filter(|pending| pending.is_the_agents()).map(|pending| pending.order).min();
        let in_turn = |pending: &Pending| !pending.is_the_agents() || Some(pending.order) == next;
        // While an event of the address space is unread the kernel moves nothing (EAGAIN).
        let stands_still = |pending: &Pending| match pending.action {
            Action::CopyOut { region, .. } => pending.taken.is_none() && self.is_changing(region),
            Action::MoveBack { region, .. } => self.is_changing(region),
            _ => false,
        };
        let able = |pending: &Pending| in_turn(pending) && ready(pending) && !stands_still(pending);
        (0..self.pending.len()).filter(|index| able(&self.pending[*index])).collect()
    }

    /// Finishes a pending action and returns the event that says so.
    pub(super) fn complete(&mut self, core: &Core<DefaultPolicy>, index: usize) -> Result<Event, Violation> {
        let pending = self.pending.swap_remove(index);
        let dead = pending.device().is_some_and(|device| self.devices[usize::from(device.0)].failed);
        let source = pending.early.clone().unwrap_or_else(|| self.source(&pending.action));
        let broken = pending.fail || dead;
        Ok(match pending.action {
            Action::Revoke { ticket, region, pages, devices } => {
                for (id, device) in self.devices.iter_mut().enumerate().filter(|(id, _)| devices & (1 << id) != 0) {
                    let _ = id;
                    device.mappings.retain(|(of, page), _| *of != region || !pages.contains(*page));
                    device.used.get_mut().retain(|(of, page)| *of != region || !pages.contains(*page));
                }
                for page in pages.iter().filter(|_| devices & CPU != 0) {
                    if let Some(model) = self.page(region, page) {
                        model.cpu_frame = None;
                    }
                }
                Event::RevokeDone { ticket, result: StepResult::Ok }
            }
            Action::MapCpu { ticket, region, pages, device, frame } => {
                let fails = self.rng.chance(self.faults.io);
                let count = if fails { self.rng.below(pages.count) } else { pages.count };
                for (offset, page) in pages.iter().take(count as usize).enumerate() {
                    if let Some(model) = self.page(region, page) {
                        model.cpu_frame = Some((device, frame + offset as u32));
                        (model.mapped, model.protected, model.poisoned) = (false, false, false);
                    }
                }
                Event::CpuMapped { ticket, result: if fails { StepResult::Io } else { StepResult::Ok } }
            }
            Action::CopyOut { ticket, region, pages, device, frame, keep, .. } if self.is_private(region) => {
                self.no_mapping(region, pages, |_| true)?;
                let taken = pending.taken.unwrap_or_else(|| self.take_out(region, pages, keep));
                let runs = self.taken_to_frames(device, frame, &taken, broken);
                Event::CopiedRuns { ticket, runs }
            }
            Action::MoveBack { ticket, region, pages } => {
                let result = match self.rng.chance(self.faults.again) {
                    true if self.rng.chance(50) => StepResult::Again,
                    true => StepResult::Later,
                    false => StepResult::Ok,
                };
                if result == StepResult::Ok {
                    self.move_back(core, ticket, region, pages);
                }
                Event::MoveBackDone { ticket, result }
            }
            Action::Punch { ticket, region, pages } => {
                self.punch_private(region, pages);
                Event::PunchDone { ticket, result: StepResult::Ok }
            }
            Action::CopyOut { ticket, region, pages, device, frame, .. } => {
                self.no_mapping(region, pages, |mapping| mapping == Mapping::InPlace)?;
                let result = self.write_frames(device, frame, &source, broken);
                Event::CopyDone { ticket, result }
            }
            Action::CopyAcross { ticket, from, to, frame, .. } => {
                let broken = broken || self.devices[usize::from(from.0)].failed;
                let result = self.write_frames(to, frame, &source, broken);
                Event::CopyDone { ticket, result }
            }
            Action::ZeroFrames { ticket, device, frame, count } => {
                let result = self.write_frames(device, frame, &vec![0; count as usize], broken);
                Event::ZeroDone { ticket, result }
            }
            Action::Scrub { ticket, device, runs } => {
                if !broken {
                    let frames = &mut self.devices[usize::from(device.0)].frames;
                    for (first, count) in &runs {
                        frames[*first as usize..(*first + *count) as usize].fill(0);
                    }
                }
                Event::ScrubDone { ticket, result: if broken { StepResult::Io } else { StepResult::Ok } }
            }
            Action::Fill { ticket, region, pages, .. } => {
                if broken || self.rng.chance(self.faults.io) {
                    return Ok(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Io) });
                }
                self.no_mapping(region, pages, |_| true)?;
                // The shell asks when it has the bytes: what was dropped since is not put in place.
                let pages = Pages { count: pages.count.min(core.fill_limit(ticket)), ..pages };
                let (done_pages, stop) = self.fill_pages(region, pages, &source)?;
                Event::FillDone { ticket, done_pages, stop }
            }
            other => return Err(Violation::new("simulator", format!("{other:?} is never pending"))),
        })
    }

    fn write_frames(&mut self, device: DeviceId, frame: u32, values: &[u64], broken: bool) -> StepResult {
        if broken {
            return StepResult::Io;
        }
        let fails = self.rng.chance(self.faults.io);
        let count = if fails { self.rng.below(values.len() as u64) as usize } else { values.len() };
        let frames = &mut self.devices[usize::from(device.0)].frames[frame as usize..];
        frames[..count].copy_from_slice(&values[..count]);
        if fails { StepResult::Io } else { StepResult::Ok }
    }

    /// No device may use the pages in this way while their owner changes.
    fn no_mapping(&self, region: RegionId, pages: Pages, bad: impl Fn(Mapping) -> bool) -> Result<(), Violation> {
        let inside = |region: &RegionModel| pages.iter().any(|page| region.pages[page as usize].cpu_frame.is_some());
        if self.regions.get(&region).is_some_and(inside) {
            let text = format!("The CPU has frames of {region:?} {pages:?} during their copy");
            return Err(Violation::new("inv2", text));
        }
        for (id, device) in self.devices.iter().enumerate() {
            for ((of, page), grant) in &device.mappings {
                let mapping = &grant.mapping;
                if *of == region && pages.contains(*page) && bad(*mapping) {
                    let text = format!("device {id} maps {region:?} page {page} ({mapping:?}) during its copy");
                    return Err(Violation::new("inv2", text));
                }
            }
        }
        Ok(())
    }

    /// The pager died inside a list of actions: this one may have happened in part.
    pub(super) fn execute_torn(&mut self, action: Action) -> Result<(), Violation> {
        match action {
            Action::Publish { region, first, entries } => {
                let count = self.rng.below(2 + entries.iter().count() as u64) as usize;
                for (offset, entry) in entries.iter().take(count).enumerate() {
                    self.publish(region, first + offset as u64, entry)?;
                }
                Ok(())
            }
            Action::Reply { .. } | Action::DropRegion { .. } => Ok(()),
            action if self.rng.chance(50) => self.execute(action),
            _ => Ok(()),
        }
    }

    /// The device's memory is not what it was; `usable`: it has other memory now.
    pub(super) fn lose_memory(&mut self, device: DeviceId) {
        for region in self.regions.values_mut() {
            for (page, bits) in region.pages.iter_mut().zip(&region.directory) {
                let entry = crate::Entry::decode(*bits).unwrap_or(crate::Entry::ABSENT);
                // (Of a hole's copy nobody can tell any more once its end has begun: on its way home a hole means that the frame counts.)
                let copied = entry.state() == PageState::Duplicated && page.cache.is_some() || entry.discarded();
                let mine = entry.owns_frame() && entry.device() == device && !copied;
                let came_home = entry.state() == PageState::MovingHome && page.cache.is_some();
                page.may_be_lost |= mine && !came_home;
            }
        }
        for pending in self.pending.iter_mut().filter(|pending| pending.device() == Some(device)) {
            pending.fail = true;
        }
        self.devices[usize::from(device.0)].frames.fill(JUNK);
    }
}
