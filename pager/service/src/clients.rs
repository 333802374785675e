//! Clients: making spaces and regions. Nothing a client says is taken on trust, and nothing wrong costs anyone else.
//!
//! ```text
//!  OpenSpace:    UFFDIO_API -> vault (state, uffd, pidfd) -> acknowledged -> SpaceOpened
//!  CreateRegion: check -> directory -> vault (dir, mem) -> acknowledged -> UFFDIO_REGISTER -> live -> RegionCreated
//! ```
//!
//! A crash before the last step leaves something that recovery forgets; the client's link asks again.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use uhmm_ipc::message::{ErrorCode, Fd, Reply, WireError, pager};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kernel_hook::process::PidFd;
use uhmm_kernel_hook::uffd::{Features, RegisterMode, Userfaultfd};
use uhmm_kernel_hook::{AddrRange, HookError, PAGE_SIZE, memfd, procmap, random_bytes};
use uhmm_pager_core::{Event, RegionId, SpaceId};

use crate::calls::{Answer, refuse};
use crate::directory::{DirectoryFile, Header};
use crate::service::{Pager, VaultWait};
use crate::space::{Phase, Region, Space, SpaceState, TOKEN_BYTES};

/// What the pager asks of a userfaultfd. Fork is absent: managed ranges are MADV_DONTFORK until private backing comes.
const FEATURES: Features = Features::PAGEFAULT_FLAG_WP
    .union(Features::MISSING_SHMEM)
    .union(Features::MINOR_SHMEM)
    .union(Features::WP_HUGETLBFS_SHMEM)
    .union(Features::EVENT_UNMAP)
    .union(Features::EVENT_REMOVE)
    .union(Features::EVENT_REMAP)
    .union(Features::THREAD_ID)
    .union(Features::EXACT_ADDRESS)
    .union(Features::POISON);

fn io_error(what: &str, error: &HookError) -> WireError {
    WireError::new(ErrorCode::Io, format!("{what}: {error}"))
}

impl Pager {
    pub(crate) fn open_space(&mut self, conn: ConnId, call: CallId, nonce: u64, uffd: &Fd, full: bool) -> Answer {
        let pid = self.sessions.get(&conn).map_or(0, |session| session.peer.pid);
        let known = self.spaces.values().find(|s| s.state.nonce == nonce && s.state.pid == pid && !s.dying);
        if let Some(id) = known.map(|space| space.state.id) {
            if let Some(session) = self.sessions.get_mut(&conn) {
                session.space = Some(id);
            }
            return Some(Ok(self.space_opened(id)));
        }
        let max = self.service.plan.quota.max_spaces as usize;
        if self.spaces.len() >= max {
            let text = format!("{max} processes are managed already (quota.max_spaces in the manifest)");
            return refuse(ErrorCode::NoMemory, text);
        }
        match self.make_space(nonce, pid, uffd, full) {
            Err(error) => Some(Err(error)),
            Ok(id) => {
                if let Some(session) = self.sessions.get_mut(&conn) {
                    session.space = Some(id);
                }
                self.keep_space(id, conn, call);
                None
            }
        }
    }

    fn make_space(&mut self, nonce: u64, pid: u32, uffd: &Fd, full: bool) -> Result<u64, WireError> {
        let pidfd = PidFd::open(pid).map_err(|error| io_error("The client's process cannot be watched", &error))?;
        let uffd = uffd.try_clone().map_err(|error| WireError::new(ErrorCode::Io, error.to_string()))?;
        let uffd = Userfaultfd::from_fd(uffd).map_err(|error| io_error("The userfaultfd cannot be used", &error))?;
        let features = match uffd.api(FEATURES) {
            Ok(features) => features,
            // An earlier incarnation already enabled it before it died: the same set was asked for.
            Err(error) if error.errno() == Some(libc_einval()) => FEATURES,
            Err(error) => {
                let text = format!("The descriptor is not a usable userfaultfd: {error}");
                return Err(WireError::new(ErrorCode::Invalid, text));
            }
        };
        let mut token = [0u8; TOKEN_BYTES];
        random_bytes(&mut token).map_err(|error| io_error("No randomness for the token", &error))?;
        let id = self.next_space;
        self.next_space += 1;
        let state = SpaceState { id, nonce, full, features: features.bits(), pid, token };
        let space = Space { state, uffd, pidfd, regions: BTreeMap::new(), dying: false };
        self.watch_space(&space).map_err(|error| WireError::new(ErrorCode::Io, error.to_string()))?;
        self.spaces.insert(id, space);
        Ok(id)
    }

    fn keep_space(&mut self, id: u64, conn: ConnId, call: CallId) {
        let Some(space) = self.spaces.get(&id) else { return };
        let wait = VaultWait::Space { space: id, conn, call };
        let duplicate = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map(Arc::new);
        let (uffd, pidfd) = (duplicate(space.uffd.as_fd()), duplicate(space.pidfd.as_fd()));
        let (Ok(state), Ok(uffd), Ok(pidfd)) = (space.state.to_memfd(), uffd, pidfd) else {
            self.creation_failed(wait, WireError::new(ErrorCode::NoMemory, "Out of descriptors in the pager"));
            return;
        };
        let prefix = Space::vault_prefix(id);
        let entries = [("uffd", uffd), ("pidfd", pidfd), ("state", state)];
        self.put_in_vault(wait, &prefix, entries);
    }

    fn put_in_vault<const N: usize>(&mut self, wait: VaultWait, prefix: &str, entries: [(&str, Fd); N]) {
        for (name, fd) in entries {
            let call = self.service.vault.put(&mut self.service.reactor, &format!("{prefix}{name}"), fd);
            self.vault_calls.insert(call, wait);
        }
        self.vault_left.insert(wait, N as u32);
    }

    fn space_opened(&self, id: u64) -> pager::Reply {
        let state = &self.spaces[&id].state;
        pager::Reply::SpaceOpened { space: id, token: state.token.to_vec(), features: state.features }
    }

    pub(crate) fn attach_space(&mut self, conn: ConnId, space: u64, token: &[u8]) -> Answer {
        let pid = self.sessions.get(&conn).map(|session| session.peer.pid);
        let known = self.spaces.get(&space).filter(|s| !s.dying && s.state.token == *token);
        if known.is_none_or(|known| Some(known.state.pid) != pid) {
            let text = format!("Space {space} is not this process's, or its token is wrong");
            return refuse(ErrorCode::Permission, text);
        }
        if let Some(session) = self.sessions.get_mut(&conn) {
            session.space = Some(space);
        }
        Some(Ok(pager::Reply::Done))
    }

    pub(crate) fn close_space(&mut self, conn: ConnId) -> Answer {
        let space_id = match self.space_of(conn) {
            Ok(id) => id,
            Err(error) => return Some(Err(error)),
        };
        let left = self.spaces.get(&space_id).map_or(0, |space| space.regions.len());
        if left > 0 {
            return refuse(ErrorCode::Busy, format!("{left} regions are still managed: free them first"));
        }
        self.end_space(space_id);
        if let Some(session) = self.sessions.get_mut(&conn) {
            session.space = None;
        }
        Some(Ok(pager::Reply::Done))
    }

    pub(crate) fn create_region(
        &mut self,
        conn: ConnId,
        call: CallId,
        addr: u64,
        len_bytes: u64,
        memory: Fd,
    ) -> Answer {
        let space_id = match self.space_of(conn) {
            Ok(id) => id,
            Err(error) => return Some(Err(error)),
        };
        if let Some(existing) = self.same_region(space_id, addr, len_bytes) {
            return Some(Ok(pager::Reply::RegionCreated { region: existing }));
        }
        if let Err(error) = self.check_region(space_id, addr, len_bytes, &memory) {
            return Some(Err(error));
        }
        let id = self.next_region;
        let page_count = len_bytes / PAGE_SIZE;
        let directory = match DirectoryFile::create(Header { region: id, space: space_id, addr, page_count }) {
            Ok(directory) => directory,
            Err(error) => return refuse(ErrorCode::NoMemory, format!("No memory for the directory: {error}")),
        };
        self.next_region += 1;
        let entries = [("mem", memory.clone()), ("dir", directory.fd())];
        self.regions.insert(Region {
            id,
            space: space_id,
            addr,
            page_count,
            memory,
            directory,
            phase: Phase::Creating,
            tables: Default::default(),
            granted_mask: 0,
        });
        if let Some(space) = self.spaces.get_mut(&space_id) {
            space.regions.insert(addr, id);
        }
        let wait = VaultWait::Region { region: id, conn, call };
        self.put_in_vault(wait, &Space::region_prefix(space_id, id), entries);
        None
    }

    fn same_region(&self, space_id: u64, addr: u64, len_bytes: u64) -> Option<u64> {
        let id = *self.spaces.get(&space_id)?.regions.get(&addr)?;
        let region = self.regions.get(id)?;
        (region.phase == Phase::Live && region.page_count * PAGE_SIZE == len_bytes).then_some(id)
    }

    /// Every lie a client can tell about a region, in the order in which it is cheapest to find.
    fn check_region(&self, space_id: u64, addr: u64, len_bytes: u64, memory: &Fd) -> Result<(), WireError> {
        let invalid = |text: String| WireError::new(ErrorCode::Invalid, text);
        let range = AddrRange::new(addr, len_bytes).map_err(|error| invalid(error.to_string()))?;
        let quota = &self.service.plan.quota;
        if len_bytes > quota.max_region_bytes.0 {
            let text = format!("{len_bytes} bytes are more than quota.max_region_bytes = {}", quota.max_region_bytes.0);
            return Err(WireError::new(ErrorCode::NoMemory, text));
        }
        let Some(space) = self.spaces.get(&space_id).filter(|space| !space.dying) else {
            return Err(WireError::new(ErrorCode::NotFound, "The space is gone"));
        };
        if space.regions.len() >= quota.max_regions_per_space as usize {
            let text = format!("{} regions are the most (quota.max_regions_per_space)", quota.max_regions_per_space);
            return Err(WireError::new(ErrorCode::NoMemory, text));
        }
        let mine = space.regions.values().filter_map(|id| self.regions.get(*id));
        if let Some(other) = mine.map(|region| region.range()).find(|other| other.overlaps(&range)) {
            let text = format!("{range} overlaps region {other}, which is managed already");
            return Err(invalid(text));
        }
        memfd::check_sealed(memory.as_fd(), len_bytes)
            .map_err(|error| invalid(format!("The memfd is refused: {error}")))?;
        self.check_mapping(space.state.pid, range, memory)
    }

    /// The address range must be a shared, writable mapping of this very memfd from its start.
    fn check_mapping(&self, pid: u32, range: AddrRange, memory: &Fd) -> Result<(), WireError> {
        let Ok(maps) = procmap::open_maps(pid) else { return Ok(()) };
        let found = match procmap::query(maps.as_fd(), range.start) {
            Ok(found) => found,
            // Kernels before 6.11 have no PROCMAP_QUERY: registration itself still refuses unmapped ranges.
            Err(_) => return Ok(()),
        };
        let fault = |text: String| Err(WireError::new(ErrorCode::Fault, text));
        let Some(vma) = found.filter(|vma| vma.start <= range.start && vma.end >= range.end()) else {
            return fault(format!("{range} is not one mapping of this process: map the memfd there first"));
        };
        if !(vma.shared && vma.read && vma.write) {
            return fault(format!("{range} is not mapped shared, readable and writable"));
        }
        let inode = memfd::inode(memory.as_fd()).map_err(|error| io_error("The memfd cannot be examined", &error))?;
        let offset = vma.offset + (range.start - vma.start);
        if vma.inode != inode || offset != 0 {
            return fault(format!("{range} maps another file or offset than the memfd that was sent"));
        }
        Ok(())
    }

    /// The vault has everything: finish.
    pub(crate) fn creation_kept(&mut self, wait: VaultWait) {
        match wait {
            VaultWait::Space { space, conn, call } => {
                if self.spaces.contains_key(&space) {
                    let opened = self.space_opened(space);
                    self.service.reactor.reply(conn, call, Ok(Reply::Pager(opened)));
                }
            }
            VaultWait::Region { region, conn, call } => match self.start_region(region) {
                Ok(()) => {
                    let created = pager::Reply::RegionCreated { region };
                    self.service.reactor.reply(conn, call, Ok(Reply::Pager(created)));
                }
                Err(error) => self.creation_failed(wait, error),
            },
        }
    }

    fn start_region(&mut self, id: u64) -> Result<(), WireError> {
        let gone = || WireError::new(ErrorCode::NotFound, "The client ended while its region was made");
        let region = self.regions.get_mut(id).ok_or_else(gone)?;
        let space = self.spaces.get(&region.space).filter(|space| !space.dying).ok_or_else(gone)?;
        let mode = RegisterMode::MISSING | RegisterMode::MINOR | RegisterMode::WP;
        space.uffd.register(region.range(), mode).map_err(|error| {
            let text = format!("{} cannot be registered with userfaultfd: {error}", region.range());
            WireError::new(ErrorCode::Fault, text)
        })?;
        region.directory.set_live().map_err(|error| io_error("The directory cannot be written", &error))?;
        region.phase = Phase::Live;
        let (space, page_count) = (SpaceId(region.space), region.page_count);
        self.push(Event::RegionAdded { region: RegionId(id), space, page_count });
        Ok(())
    }

    /// Undo, and tell the client why.
    pub(crate) fn creation_failed(&mut self, wait: VaultWait, error: WireError) {
        let (conn, call) = match wait {
            VaultWait::Space { space, conn, call } => {
                self.end_space(space);
                (conn, call)
            }
            VaultWait::Region { region, conn, call } => {
                self.drop_region(RegionId(region));
                (conn, call)
            }
        };
        self.service.reactor.reply(conn, call, Err(error));
    }

    pub(crate) fn free_region(&mut self, conn: ConnId, call: CallId, region_id: u64) -> Answer {
        let space_id = match self.space_of(conn) {
            Ok(id) => id,
            Err(error) => return Some(Err(error)),
        };
        let Some(region) = self.regions.get(region_id) else {
            return refuse(ErrorCode::NotFound, format!("Region {region_id} does not exist: it was freed already"));
        };
        if region.space != space_id {
            let text = format!("Region {region_id} belongs to another process");
            return refuse(ErrorCode::Permission, text);
        }
        self.freeing.insert(region_id, (conn, call));
        self.begin_free(region_id);
        None
    }
}

/// EINVAL without a libc dependency in this crate.
fn libc_einval() -> i32 {
    22
}
