//! Driver sessions and the mirror's requests on their behalf.
//!
//! ```text
//!  login (new incarnation) -> old mappings void, device up      session lost -> device down, what it owes stays owed
//!  login (same one again)  -> mappings still valid              process dead  -> mappings void, copies wait for the next
//!  device is taken away    -> its aperture is unmapped, copies wait     held by the supervisor -> what nobody can reach is poisoned
//! ```

use std::os::fd::AsFd;

use uhmm_ipc::ConnId;
use uhmm_ipc::message::pager::{CopyRing, RegionStatus};
use uhmm_ipc::message::{Aperture, ErrorCode, Fd, WireError, pager};
use uhmm_ipc::shared::gate::Gate;
use uhmm_ipc::shared::table::Table;
use uhmm_kernel_hook::error::chain;
use uhmm_kernel_hook::{PAGE_SIZE, Window};
use uhmm_kit::record::What;
use uhmm_pager_core::{DeviceId, Event, Pages};

use crate::devices::{CopyEngine, Device, DeviceError};
use crate::requests::residency;
use crate::revoke::PendingRevoke;
use crate::service::Pager;
use crate::space::{DEVICE_SLOTS, Memory, Phase};

type Result<T> = std::result::Result<T, WireError>;

impl Pager {
    #[allow(clippy::too_many_arguments, reason = "the message's own fields, checked one by one")]
    pub(crate) fn driver_login(
        &mut self,
        conn: ConnId,
        device_id: u8,
        generation: u64,
        frame_count: u32,
        aperture: Option<Aperture>,
        gate: Option<Fd>,
        copy_ring: Option<CopyRing>,
    ) -> Result<pager::Reply> {
        let Some(peer) = self.sessions.get(&conn).map(|session| session.peer.clone()) else {
            return Err(WireError::new(ErrorCode::Protocol, "The connection is gone"));
        };
        let owner = self.service.plan.device(device_id).map(|device| device.service.clone());
        if owner.as_deref() != Some(peer.name.as_str()) {
            let text = format!("Service {} does not drive device {device_id} in this plan", peer.name);
            return Err(WireError::new(ErrorCode::Permission, text));
        }
        if frame_count == 0 || generation == 0 {
            let text = "A device needs at least one page of memory and a generation that is not zero";
            return Err(WireError::new(ErrorCode::Invalid, text));
        }
        let device = self
            .open_device(conn, device_id, &peer, frame_count, aperture, gate, copy_ring)
            .map_err(|error| WireError::new(ErrorCode::Invalid, chain(&error)))?;
        self.replace_device(device);
        self.watch_engine(device_id).map_err(|error| WireError::new(ErrorCode::Io, error.to_string()))?;
        self.announce_device(device_id, peer.incarnation, generation, frame_count)?;
        if let Some(session) = self.sessions.get_mut(&conn) {
            session.device = Some(device_id);
        }
        self.note_device(What::DeviceUp, device_id, frame_count);
        self.drain();
        self.submit_copies();
        Ok(pager::Reply::Done)
    }

    #[allow(clippy::too_many_arguments, reason = "the message's own fields, checked one by one")]
    fn open_device(
        &self,
        conn: ConnId,
        device_id: u8,
        peer: &uhmm_ipc::Peer,
        frame_count: u32,
        aperture: Option<Aperture>,
        gate: Option<Fd>,
        copy_ring: Option<CopyRing>,
    ) -> std::result::Result<Device, DeviceError> {
        if aperture.is_none() && copy_ring.is_none() {
            return Err(DeviceError::NoCopyPath);
        }
        let shared = |error: uhmm_ipc::shared::words::WordsError| DeviceError::Shared(error.to_string());
        let len_bytes = u64::from(frame_count) * PAGE_SIZE;
        let map_all = |memory: Aperture| Window::map_aperture(memory.fd.as_fd(), memory.offset_bytes, len_bytes);
        let file = aperture.clone();
        let aperture = aperture.map(map_all).transpose()?;
        Ok(Device {
            id: device_id,
            service: peer.name.clone(),
            conn: Some(conn),
            incarnation: peer.incarnation,
            pidfd: peer.process.as_ref().ok_or(DeviceError::NoProcess)?.pidfd.try_clone()?,
            file: file.filter(|_| aperture.as_ref().is_some_and(|window| !window.is_guarded())),
            aperture,
            gate: gate.map(|fd| Gate::open(fd.as_fd()).map_err(shared)).transpose()?,
            engine: copy_ring.map(|ring| CopyEngine::open(&ring)).transpose()?,
            fenced: false,
        })
    }

    /// Copies that the old session had in hand are asked of the new one: they are absolute.
    fn replace_device(&mut self, device: Device) {
        let slot = usize::from(device.id);
        let old = self.devices[slot].replace(device);
        if let Some(engine) = old.and_then(|old| old.engine) {
            self.requeue_copies(engine);
        }
    }

    fn requeue_copies(&mut self, engine: CopyEngine) {
        if let Err(error) = self.service.reactor.remove_fd(&engine.completion_event.as_fd()) {
            tracing::debug!(%error, "Completion event was not watched");
        }
        let mut ids: Vec<u64> = engine.into_unfinished().map(|job| job.ticket).collect();
        ids.sort_unstable_by(|a, b| b.cmp(a));
        for id in ids {
            if let Some(deferred) = self.engine_jobs.remove(&id) {
                self.copies.push_front(deferred);
            }
        }
    }

    fn announce_device(&mut self, id: u8, incarnation: u32, generation: u64, frame_count: u32) -> Result<()> {
        let (old_incarnation, old_generation) = self.records.get(id);
        let fresh_mappings = old_incarnation != u64::from(incarnation);
        let memory_lost = old_generation != 0 && old_generation != generation;
        if memory_lost {
            tracing::error!(device = id, "The device came back with other memory: pages on it are lost");
            // What was in flight would read the new memory.
            self.fail_copies(id);
        }
        if fresh_mappings {
            self.void_mappings(id);
        }
        let memory_known = old_generation == generation;
        let reached = self.devices[usize::from(id)].as_ref().is_some_and(|device| device.aperture.is_some());
        let coherent = reached && self.service.plan.device(id).is_some_and(|plan| plan.coherent);
        self.push(Event::DeviceUp {
            device: DeviceId(id),
            frame_count,
            fresh_mappings,
            memory_known,
            memory_lost,
            coherent,
        });
        self.drain();
        self.records
            .set(id, u64::from(incarnation), generation)
            .map_err(|error| WireError::new(ErrorCode::Io, format!("The device record cannot be written: {error}")))
    }

    /// No device thread of the old incarnation lives: its tables go, and nobody waits for it any more.
    fn void_mappings(&mut self, id: u8) {
        for segment in self.regions.segments_mut() {
            segment.tables[usize::from(id)] = None;
        }
        for region in self.regions.iter_mut() {
            region.retired.iter_mut().for_each(|segment| segment.tables[usize::from(id)] = None);
        }
        for through in self.revokes.device_void(id) {
            self.revoke_through(through);
        }
    }

    /// The kernel's unbind waits until nobody maps the device. A file stays: it is only a file, and pages come home from it.
    pub(crate) fn device_lost(&mut self, conn: ConnId, id: u8) -> Result<pager::Reply> {
        let device = self.devices.get_mut(usize::from(id)).and_then(Option::as_mut);
        let device = device.filter(|device| device.conn == Some(conn));
        let device = device.ok_or_else(|| {
            WireError::new(ErrorCode::Permission, format!("Device {id} was not logged in on this connection"))
        })?;
        if device.aperture.as_ref().is_some_and(Window::is_guarded) {
            device.aperture = None;
            tracing::warn!(device = id, service = %device.service, "Device is taken away: its pages wait until it is back, or given up");
        }
        Ok(pager::Reply::Done)
    }

    pub(crate) fn driver_session_lost(&mut self, id: u8, conn: ConnId) {
        let Some(device) = &mut self.devices[usize::from(id)] else { return };
        if device.conn != Some(conn) {
            return;
        }
        tracing::warn!(device = id, service = %device.service, "Driver session lost");
        device.conn = None;
        let engine = device.engine.take();
        self.note_device(What::DeviceDown, id, 0);
        if let Some(engine) = engine {
            self.requeue_copies(engine);
        }
        self.push(Event::DeviceDown { device: DeviceId(id) });
    }

    /// The supervisor has reaped the process: nothing of it touches memory any more. Incarnations that died before they logged in had nothing to
    /// lose, but one of them is the last when the supervisor holds the service.
    pub(crate) fn driver_died(&mut self, id: u8, incarnation: u32, held: bool) {
        let device = self.devices[usize::from(id)].as_mut();
        let logged_in = device.as_ref().map_or(self.records.get(id).0, |device| u64::from(device.incarnation));
        if u64::from(incarnation) < logged_in {
            return;
        }
        if u64::from(incarnation) == logged_in {
            if let Some(device) = device {
                device.fenced = false;
            }
            self.void_mappings(id);
            self.tell_mirror(pager::Event::DeviceVoid { device: id });
            self.push(Event::DeviceVoid { device: DeviceId(id) });
        }
        let reachable = self.devices[usize::from(id)].as_ref().is_some_and(|device| device.aperture.is_some());
        if held && !reachable {
            tracing::error!(device = id, "The driver is held by the supervisor: what only it can reach is poisoned");
            self.push(Event::DeviceFailed { device: DeviceId(id) });
            self.drain();
            self.fail_copies(id);
        }
    }

    pub(crate) fn attach_table(
        &mut self,
        conn: ConnId,
        space: u64,
        segment_id: u64,
        table: &Fd,
    ) -> Result<pager::Reply> {
        let device = self.sessions.get(&conn).and_then(|session| session.device);
        let device = device.ok_or_else(|| WireError::new(ErrorCode::Permission, "Log in before attaching tables"))?;
        let segment = self.regions.segment_mut(segment_id).filter(|segment| segment.space == space);
        let Some(segment) = segment.filter(|segment| segment.granted_mask & (1 << device) != 0) else {
            let text = format!("Region {segment_id} of space {space} was not granted to device {device}");
            return Err(WireError::new(ErrorCode::NotFound, text));
        };
        let opened = Table::open(table.as_fd(), segment.page_count)
            .map_err(|error| WireError::new(ErrorCode::Invalid, format!("The device table is refused: {error}")))?;
        segment.tables[usize::from(device)] = Some(opened);
        Ok(pager::Reply::Done)
    }

    pub(crate) fn mirror_login(&mut self, conn: ConnId) -> Result<pager::Reply> {
        self.mirror = Some(conn);
        let pending: Vec<(u64, PendingRevoke)> = self.revokes.unanswered().map(|(id, r)| (id, *r)).collect();
        tracing::info!(pending = pending.len(), "The mirror logged in");
        for (id, revoke) in pending {
            self.send_invalidate(id, &revoke);
        }
        Ok(pager::Reply::Done)
    }

    pub(crate) fn open_mirror(&mut self, space: u64, token: &[u8], device: u8) -> Result<pager::Reply> {
        let known = self.spaces.get(&space).is_some_and(|known| !known.dying && known.state.token == *token);
        if !known || usize::from(device) >= DEVICE_SLOTS {
            let text = format!("Space {space} does not exist or the token is not its own");
            return Err(WireError::new(ErrorCode::Permission, text));
        }
        let uid = self.spaces.get(&space).map_or(u32::MAX, |known| known.state.uid);
        self.rule_allows(space, device)?;
        self.lease(device, uid)?;
        self.open_mirrors.insert((space, device));
        Ok(pager::Reply::Done)
    }

    pub(crate) fn close_mirror(&mut self, space: u64, device: u8) -> Result<pager::Reply> {
        self.open_mirrors.remove(&(space, device));
        Ok(pager::Reply::Done)
    }

    pub(crate) fn lookup(&mut self, space: u64, addr: u64) -> Result<pager::Reply> {
        let granted = self.open_mirrors.iter().filter(|(of, _)| *of == space).fold(0, |mask, (_, d)| mask | 1 << d);
        if self.segment_at(space, addr).is_none() {
            self.follow_file(space, addr);
        }
        let found = self.segment_at(space, addr).map(|segment| (segment.id, segment.region));
        let region = found.and_then(|(_, id)| self.regions.get(id)).filter(|region| region.phase == Phase::Live);
        let (Some((segment_id, _)), Some(region)) = (found, region) else {
            return Err(WireError::new(ErrorCode::Fault, format!("No region of space {space} holds {addr:#x}")));
        };
        let memory = region.memory.clone();
        let device_read_only = false;
        let Some(segment) = self.regions.segment_mut(segment_id) else {
            return Err(WireError::new(ErrorCode::NotFound, "The region is gone"));
        };
        segment.granted_mask |= granted;
        let memory = match memory {
            None => pager::Memory::Private,
            Some(Memory { fd, offset_bytes, sealed, .. }) => {
                let offset_bytes = offset_bytes + segment.first_page * PAGE_SIZE;
                match sealed {
                    true => pager::Memory::Sealed { memory: fd, offset_bytes },
                    false => pager::Memory::File { file: fd, offset_bytes },
                }
            }
        };
        let (region, addr, len_bytes) = (segment.id, segment.addr, segment.range().len);
        Ok(pager::Reply::Region { region, addr, len_bytes, device_read_only, memory })
    }

    pub(crate) fn list_regions(&self) -> Vec<RegionStatus> {
        let live = self.regions.iter().filter(|region| region.phase == Phase::Live);
        live.map(|region| {
            let mut status = RegionStatus {
                space: region.space,
                pid: self.spaces.get(&region.space).map_or(0, |space| space.state.pid),
                region: region.id,
                addr: self
                    .regions
                    .showing(region.id, Pages { first: 0, count: region.page_count })
                    .next()
                    .map_or(0, |(s, _)| s.addr),
                page_count: region.page_count,
                system_pages: 0,
                absent_pages: 0,
                moving_pages: 0,
                poisoned_pages: 0,
                device_pages: vec![0; DEVICE_SLOTS],
            };
            let mut page = 0;
            while page < region.page_count {
                let count = region.directory.alike(page);
                match residency(region.directory.load(page)).0 {
                    pager::Residency::Absent => status.absent_pages += count,
                    pager::Residency::System => status.system_pages += count,
                    pager::Residency::Duplicated(id) => {
                        status.system_pages += count;
                        status.device_pages[usize::from(id) % DEVICE_SLOTS] += count;
                    }
                    pager::Residency::Moving => status.moving_pages += count,
                    pager::Residency::Poisoned => status.poisoned_pages += count,
                    pager::Residency::Device(id) | pager::Residency::Exclusive(id) => {
                        status.device_pages[usize::from(id) % DEVICE_SLOTS] += count
                    }
                }
                page += count;
            }
            status
        })
        .collect()
    }
}
