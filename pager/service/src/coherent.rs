//! Coherent device memory: the program maps frames itself, through its agent; and who may do that at all.
//!
//! ```text
//!   core: MapCpu -> MapDevice{frame} --> agent: mremap of the aperture over the pages     kernel: UNMAP of the pages   (not the program's)
//!   core: Revoke{CPU} -> UnmapDevice --> agent: mremap of the memfd over the pages        kernel: REMAP to the pages   (not the program's)
//! ```
//! The kernel tells of what the agent does as of any munmap and mremap. The directory tells them apart: the cpu bit is set before the
//! first order is sent and cleared after the last one is answered, also across restarts, so an UNMAP of a page with that bit, and a
//! REMAP from nowhere onto such pages, is the agent's. Orders of one process are carried out in turn, so an `UnmapDevice` that is answered
//! has undone every `MapDevice` before it.
//!
//! **One user a device.** A program that maps an aperture reaches all of the memory behind it, and a descriptor that was given away cannot
//! be taken back. So a coherent device belongs to the first user who opens it or sends pages there, for as long as its memory lives
//! (the record is in the vault); all others get `Permission`.

use uhmm_ipc::ConnId;
use uhmm_ipc::message::{ErrorCode, WireError};
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};
use uhmm_pager_core::{Entry, Event, Pages, RegionId, StepResult, Ticket};
use uhmm_shared::agent::Status;

use crate::agent::{AgentRun, Job, Order, Purpose, SLOT_PAGES};
use crate::service::Pager;

impl Pager {
    /// Checks that a user may use a device, and makes a coherent one his if it is nobody's.
    pub(crate) fn lease(&self, device: u8, uid: u32) -> Result<(), WireError> {
        if !self.service.plan.device(device).is_some_and(|plan| plan.coherent) {
            return Ok(());
        }
        match self.records.user(device) {
            Some(user) if user == uid => Ok(()),
            Some(user) => {
                let text = format!(
                    "Device {device} is coherent and belongs to user {user}: who maps its memory sees all of it. Use another device, \
                     or give each user one in the manifest"
                );
                Err(WireError::new(ErrorCode::Permission, text))
            }
            None => self.records.set_user(device, uid).map_err(|error| {
                WireError::new(ErrorCode::Io, format!("The device record cannot be written: {error}"))
            }),
        }
    }

    /// The same for whoever is connected there.
    pub(crate) fn may_use(&self, conn: ConnId, device: u8) -> Result<(), WireError> {
        let uid = self.sessions.get(&conn).map_or(u32::MAX, |session| session.peer.uid);
        self.rule_allows(self.space_of(conn)?, device)?;
        self.lease(device, uid)
    }

    fn has_coherent_devices(&self) -> bool {
        self.service.plan.devices.iter().any(|device| device.coherent)
    }

    fn is_cpu_mapped(&self, region: u64, page: u64) -> bool {
        let raw = self.regions.get(region).map_or(0, |region| region.directory.load(page));
        Entry::decode(raw).is_ok_and(Entry::cpu_mapped)
    }

    /// Where the process that made a region has a page of it; `None` when that process is gone.
    pub(crate) fn cpu_home(&self, region: RegionId, page: u64) -> Option<(u64, u64)> {
        let (space, addr) = self.regions.get(region.0)?.cpu_home?;
        self.spaces.get(&space).filter(|space| !space.dying && space.agent.is_some())?;
        Some((space, addr + page * PAGE_SIZE))
    }

    /// Asks for frames to be mapped. Only where the program has allocated the memory, and nobody else shows it.
    pub(crate) fn map_cpu(&mut self, ticket: Ticket, region: RegionId, pages: Pages, device: u8, frame: u32) {
        let shown: Vec<_> = self.regions.showing(region.0, pages).collect();
        let place = match (&shown[..], self.cpu_home(region, pages.first)) {
            ([(segment, part)], Some((space, addr))) if *part == pages && segment.space == space => {
                (segment.addr_of(pages.first) == addr).then_some(space)
            }
            _ => None,
        };
        let Some(space) = place.filter(|_| pages.count <= SLOT_PAGES) else {
            return self.push(Event::CpuMapped { ticket, result: StepResult::Io });
        };
        let generation = self.records.get(device).1;
        let order = Order::MapDevice { device, frame, generation };
        self.ask_about_frames(space, region, pages, order, Purpose::Show { ticket });
    }

    /// Asks for the program's mappings of frames to be undone. Returns how many answers there will be.
    pub(crate) fn unmap_cpu(&mut self, ticket: Ticket, region: RegionId, pages: Pages) -> usize {
        let Some((space, _)) = self.cpu_home(region, pages.first) else { return 0 };
        let mut parts: Vec<Pages> = Vec::new();
        for page in pages.iter().filter(|page| self.is_cpu_mapped(region.0, *page)) {
            match parts.last_mut() {
                Some(part) if part.end() == page && part.count < SLOT_PAGES => part.count += 1,
                _ => parts.push(Pages::one(page)),
            }
        }
        for part in &parts {
            self.ask_about_frames(space, region, *part, Order::UnmapDevice, Purpose::Hide { ticket });
        }
        parts.len()
    }

    fn ask_about_frames(&mut self, space: u64, region: RegionId, pages: Pages, order: Order, purpose: Purpose) {
        let agent = self.spaces.get_mut(&space).and_then(|space| space.agent.as_mut());
        if let Some(agent) = agent {
            agent.ask(Job::new(region, pages, order, purpose));
        }
        self.send_to_agent(space);
    }

    /// The agent's answer; no runs: its process is gone, and with it what it had mapped.
    pub(crate) fn frames_done(&mut self, space: u64, job: Job, runs: &[AgentRun]) {
        let failed = runs.iter().any(|run| run.status != Status::Moved);
        match job.purpose {
            Purpose::Show { ticket } => {
                let result = match failed {
                    _ if runs.is_empty() => StepResult::Gone,
                    true => StepResult::Io,
                    false => StepResult::Ok,
                };
                self.push(Event::CpuMapped { ticket, result });
            }
            Purpose::Hide { .. } if failed => {
                tracing::warn!(space, region = job.region.0, pages = ?job.pages, "A program keeps frames of a device: asked again");
                self.ask_about_frames(space, job.region, job.pages, job.order, job.purpose);
            }
            Purpose::Hide { ticket } => self.revoke_part_through(ticket.0),
            _ => {}
        }
    }

    /// The parts of an unmapped range that the program has unmapped: not those where frames took the place of its memory.
    pub(crate) fn unmapped_by_program(&self, space_id: u64, range: AddrRange) -> Vec<AddrRange> {
        if !self.has_coherent_devices() {
            return vec![range];
        }
        let mut parts = Vec::new();
        let mut next = range.start;
        for (region, pages, addr) in self.shown_in(space_id, range) {
            for page in pages.iter().filter(|page| self.is_cpu_mapped(region, *page)) {
                let start = addr + (page - pages.first) * PAGE_SIZE;
                if start > next {
                    parts.push(AddrRange { start: next, len: start - next });
                }
                next = start + PAGE_SIZE;
            }
        }
        if range.end() > next {
            parts.push(AddrRange { start: next, len: range.end() - next });
        }
        parts
    }

    /// Memory that is not managed has come to pages that the program may map as frames: their own memfd takes its place again.
    pub(crate) fn is_return_of_memory(&self, space_id: u64, from: AddrRange, to: AddrRange) -> bool {
        if !self.has_coherent_devices() || !self.touched(space_id, from.start, from.end()).is_empty() {
            return false;
        }
        let shown = self.shown_in(space_id, to);
        let all = shown.iter().map(|(_, pages, _)| pages.count * PAGE_SIZE).sum::<u64>() == to.len;
        all && shown.iter().all(|(region, pages, _)| pages.iter().all(|page| self.is_cpu_mapped(*region, page)))
    }

    /// What live segments show in a range: region, pages, address of the first one.
    fn shown_in(&self, space_id: u64, range: AddrRange) -> Vec<(u64, Pages, u64)> {
        let piece = |id: &u64| {
            let segment = self.regions.segment(*id)?;
            let part = segment.range().intersection(&range)?;
            let first = segment.first_page + (part.start - segment.addr) / PAGE_SIZE;
            Some((segment.region, Pages { first, count: part.len / PAGE_SIZE }, part.start))
        };
        self.touched(space_id, range.start, range.end()).iter().filter_map(piece).collect()
    }
}
