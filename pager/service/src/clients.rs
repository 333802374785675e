//! Clients: making spaces and regions. Nothing a client says is taken on trust, and nothing wrong costs anyone else.
//!
//! ```text
//!  OpenSpace:    UFFDIO_API -> vault (state, uffd, pidfd, agent) -> acknowledged -> SpaceOpened
//!  CreateRegion, AdoptRegion, AttachFile:
//!                check (create.rs) -> directory -> vault (dir, mem) -> acknowledged -> UFFDIO_REGISTER -> live -> RegionCreated
//! ```
//!
//! A crash before the last step leaves something that recovery forgets; the client's link asks again.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use uhmm_ipc::message::pager::AgentMemory;
use uhmm_ipc::message::{ErrorCode, Fd, Reply, WireError, pager};
use uhmm_ipc::{CallId, ConnId, PeerProcess};
use uhmm_kernel_hook::process::PidFd;
use uhmm_kernel_hook::uffd::{self, Features, RegisterMode, Userfaultfd};
use uhmm_kernel_hook::{AddrRange, HookError, PAGE_SIZE, random_bytes};
use uhmm_kit::record::What;
use uhmm_pager_core::{Backing, Event, RegionId, SpaceId};

use crate::calls::{Answer, refuse};
use crate::rules::Rule;
use crate::service::{Pager, VaultWait};
use crate::space::{Birth, PID_UNSEEN, Phase, Space, SpaceState, TOKEN_BYTES};

/// What the pager asks of every userfaultfd.
const FEATURES: Features = Features::PAGEFAULT_FLAG_WP
    .union(Features::MISSING_SHMEM)
    .union(Features::MINOR_SHMEM)
    .union(Features::WP_HUGETLBFS_SHMEM)
    .union(Features::EVENT_UNMAP)
    .union(Features::EVENT_REMOVE)
    .union(Features::EVENT_REMAP)
    .union(Features::THREAD_ID)
    .union(Features::EXACT_ADDRESS)
    .union(Features::POISON)
    .union(Features::MOVE);
/// And of one that raises kernel-mode faults, if this kernel grants it to us: forked children are managed too.
const FORK: Features = Features::EVENT_FORK;

/// What a client says when it opens its space.
pub(crate) struct Opening {
    pub nonce: u64,
    pub uffd: Fd,
    pub full: bool,
    pub sentinel_addr: u64,
    pub agent: AgentMemory,
    pub claim: Vec<u8>,
}

/// The handshake of a client's userfaultfd. An earlier incarnation may have made it before it died: then the kernel refuses, and
/// what was granted shows in what registering answers.
fn enable(uffd: &Userfaultfd, full: bool) -> Result<Features, WireError> {
    let wanted = if full { FEATURES.union(FORK) } else { FEATURES };
    match uffd.api(wanted) {
        Ok(features) => Ok(features),
        Err(error) if error.errno() == Some(EPERM) && full => enable(uffd, false),
        Err(error) if error.errno() == Some(EINVAL) => Ok(wanted),
        Err(error) => {
            let text = format!("The descriptor is not a usable userfaultfd: {error}");
            Err(WireError::new(ErrorCode::Invalid, text))
        }
    }
}

pub(crate) fn io_error(what: &str, error: &HookError) -> WireError {
    WireError::new(code_of(error).unwrap_or(ErrorCode::Io), format!("{what}: {error}"))
}

/// What a program can do something about is told by a code of its own.
pub(crate) fn code_of(error: &HookError) -> Option<ErrorCode> {
    match error.errno()? {
        EPERM | EACCES => Some(ErrorCode::Permission),
        ENOMEM => Some(ErrorCode::NoMemory),
        _ => None,
    }
}

/// A client's process, as the kernel vouches for it.
pub(crate) struct Caller {
    pub(crate) pid: u32,
    pub(crate) uid: u32,
    pub(crate) process: PeerProcess,
}

impl Caller {
    fn is(&self, space: &Space) -> bool {
        space.pidfd.as_ref().is_some_and(|pidfd| pidfd.name().is_ok_and(|name| name == self.process.name))
    }

    fn watched(&self) -> Result<PidFd, WireError> {
        let watched = self.process.pidfd.try_clone();
        watched.map_err(|error| io_error("The client's process cannot be watched", &error))
    }
}

impl Pager {
    pub(crate) fn open_space(&mut self, conn: ConnId, call: CallId, opening: Opening) -> Answer {
        let caller = match self.caller(conn) {
            Ok(caller) => caller,
            Err(error) => return Some(Err(error)),
        };
        let nonce = opening.nonce;
        let known = self.spaces.values().find(|s| s.state.nonce == nonce && caller.is(s) && !s.dying);
        if let Some(id) = known.map(|space| space.state.id) {
            self.session_is(conn, id);
            return Some(Ok(self.space_opened(id)));
        }
        if let Err(error) = self.check_quota() {
            return Some(Err(error));
        }
        let gid = self.sessions.get(&conn).map_or(u32::MAX, |session| session.peer.gid);
        let rule = match opening.claim.as_slice() {
            [] => self.admit_client(&caller, gid),
            token => self.admit_claim(token),
        };
        let rule = match rule {
            Ok(rule) => rule,
            Err(error) => return Some(Err(error)),
        };
        match self.make_space(&caller, rule, opening) {
            Err(error) => Some(Err(error)),
            Ok(id) => {
                self.session_is(conn, id);
                self.keep_space(id, VaultWait::Space { space: id, conn, call });
                None
            }
        }
    }

    /// Room for one more process. What is on its end does not count, as long as the ends keep up; and before anybody is refused, those
    /// whose death nobody tells are looked at.
    fn check_quota(&mut self) -> Result<(), WireError> {
        let max = self.service.plan.quota.max_spaces as usize;
        let full = |pager: &Self| {
            let living = pager.spaces.values().filter(|space| !space.dying).count();
            living >= max || pager.spaces.len() >= 2 * max
        };
        if full(self) {
            self.check_children();
        }
        if full(self) {
            self.note_refusal(0, 0);
            let text = format!("{max} processes are managed already (quota.max_spaces in the manifest)");
            return Err(WireError::new(ErrorCode::NoMemory, text));
        }
        Ok(())
    }

    fn session_is(&mut self, conn: ConnId, space: u64) {
        if let Some(session) = self.sessions.get_mut(&conn) {
            session.space = Some(space);
        }
        self.client_connected(space, conn);
    }

    /// For clients that have neither the device node nor the right to make a userfaultfd that sees the kernel's accesses. What is made with it
    /// is their own: it reaches no other process's memory.
    pub(crate) fn userfaultfd_device(&self) -> Result<pager::Reply, WireError> {
        match uffd::open_device() {
            Ok(device) => Ok(pager::Reply::UserfaultfdDevice { device: Arc::new(device) }),
            Err(error) => {
                Err(WireError::new(ErrorCode::NotFound, format!("The pager may not open it either: {error}")))
            }
        }
    }

    /// Who asks for something that is a process's own.
    fn caller(&self, conn: ConnId) -> Result<Caller, WireError> {
        let peer = self.sessions.get(&conn).map(|session| &session.peer);
        let process = peer.and_then(|peer| Some((peer, peer.process.clone()?)));
        let (peer, process) = process.ok_or_else(|| WireError::new(ErrorCode::NotFound, "The process has ended"))?;
        Ok(Caller { pid: if peer.pid == 0 { PID_UNSEEN } else { peer.pid }, uid: peer.uid, process })
    }

    fn make_space(&mut self, caller: &Caller, rule: Rule, opening: Opening) -> Result<u64, WireError> {
        let Opening { nonce, uffd, full, sentinel_addr, agent, .. } = opening;
        let agent = self.open_agent(None, &agent).map_err(|text| WireError::new(ErrorCode::Invalid, text))?;
        let pidfd = caller.watched()?;
        let uffd = uffd.try_clone().map_err(|error| WireError::new(ErrorCode::Io, error.to_string()))?;
        let uffd = Userfaultfd::from_fd(uffd).map_err(|error| io_error("The userfaultfd cannot be used", &error))?;
        let features = enable(&uffd, full)?;
        let sentinel = AddrRange { start: sentinel_addr, len: PAGE_SIZE };
        uffd.register(sentinel, RegisterMode::MISSING).map_err(|error| {
            let text = format!("The sentinel page at {sentinel_addr:#x} cannot be registered: {error}");
            WireError::new(ErrorCode::Invalid, text)
        })?;
        // Another session of this process is: the process is.
        let at_home = self.spaces.values().any(|space| caller.is(space) && space.state.at_home && !space.dying);
        let mut token = [0u8; TOKEN_BYTES];
        random_bytes(&mut token).map_err(|error| io_error("No randomness for the token", &error))?;
        let id = self.next_space;
        self.next_space += 1;
        let state = SpaceState {
            id,
            nonce,
            full,
            features: features.bits(),
            pid: caller.pid,
            uid: caller.uid,
            rule,
            token,
            sentinel_addr,
            birth: Birth::Done,
            parent: 0,
            fork_event: 0,
            at_home,
        };
        let space = Space {
            state,
            uffd,
            pidfd: Some(pidfd),
            segments: BTreeMap::new(),
            agent: Some(agent),
            begun: None,
            dying: false,
            unready_regions: 0,
            vacated: Default::default(),
        };
        self.watch_space(&space).map_err(|error| WireError::new(ErrorCode::Io, error.to_string()))?;
        self.spaces.insert(id, space);
        self.note_space(What::SpaceOpened, id, caller.pid);
        self.tell_core_of_rule(id);
        self.watch_agent(id);
        Ok(id)
    }

    fn keep_space(&mut self, id: u64, wait: VaultWait) {
        let Some(entries) = self.space_entries(id) else {
            let error = WireError::new(ErrorCode::NoMemory, "Out of descriptors in the pager");
            return self.creation_failed(wait, error);
        };
        self.put_in_vault(wait, &Space::vault_prefix(id), entries);
    }

    /// A forked child goes to the vault, and nobody waits for it: what is put first is there first.
    pub(crate) fn keep_child(&mut self, id: u64) {
        let entries = self.space_entries(id).unwrap_or_default();
        self.put_in_vault(VaultWait::Born { space: id }, &Space::vault_prefix(id), entries);
    }

    fn space_entries(&self, id: u64) -> Option<Vec<(&'static str, Fd)>> {
        let space = self.spaces.get(&id)?;
        let duplicate = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map(Arc::new).ok();
        let mut entries = vec![("uffd", duplicate(space.uffd.as_fd())?)];
        if let Some(pidfd) = &space.pidfd {
            entries.push(("pidfd", duplicate(pidfd.as_fd())?));
        }
        if let Some(agent) = &space.agent {
            let AgentMemory { maps, pagemap, smaps, staging, orders, done, agent } = agent.memory.clone();
            entries.extend([("maps", maps), ("pagemap", pagemap), ("smaps", smaps)]);
            entries.extend([("staging", staging), ("orders", orders), ("done", done)]);
            entries.extend(agent.map(|agent| ("agent", agent)));
        }
        // Last, because it names the process: a child that has just attached is forgotten by nobody who finds only a part.
        entries.push(("state", space.state.to_memfd().ok()?));
        Some(entries)
    }

    /// Another agent has begun: the vault has its pidfd instead of the dead one's.
    pub(crate) fn keep_agent(&mut self, id: u64) {
        let agent = self.spaces.get(&id).and_then(|space| space.agent.as_ref());
        let Some(agent) = agent.and_then(|agent| agent.memory.agent.clone()) else { return };
        let name = format!("{}agent", Space::vault_prefix(id));
        self.service.vault.put(&mut self.service.reactor, &name, agent);
    }

    pub(crate) fn put_in_vault(&mut self, wait: VaultWait, prefix: &str, entries: Vec<(&'static str, Fd)>) {
        let count = entries.len() as u32;
        for (name, fd) in entries {
            let call = self.service.vault.put(&mut self.service.reactor, &format!("{prefix}{name}"), fd);
            self.vault_calls.insert(call, wait);
        }
        self.vault_left.insert(wait, count);
    }

    fn child_attached(&self, id: u64) -> Result<pager::Reply, WireError> {
        let gone = || WireError::new(ErrorCode::NotFound, "The space is gone");
        let space = self.spaces.get(&id).ok_or_else(gone)?;
        let uffd = space.uffd.as_fd().try_clone_to_owned();
        let uffd = uffd.map_err(|error| WireError::new(ErrorCode::NoMemory, error.to_string()))?;
        Ok(pager::Reply::ChildAttached { uffd: Arc::new(uffd), features: space.state.features })
    }

    fn space_opened(&self, id: u64) -> pager::Reply {
        let state = &self.spaces[&id].state;
        pager::Reply::SpaceOpened { space: id, token: state.token.to_vec(), features: state.features }
    }

    pub(crate) fn attach_space(
        &mut self,
        conn: ConnId,
        call: CallId,
        id: u64,
        token: &[u8],
        agent: Option<AgentMemory>,
    ) -> Answer {
        let caller = match self.caller(conn) {
            Ok(caller) => caller,
            Err(error) => return Some(Err(error)),
        };
        let known = self.spaces.get(&id).filter(|s| !s.dying && s.state.token == *token);
        let is_child = known.is_some_and(|known| known.state.pid == 0);
        if known.is_none_or(|known| !is_child && !caller.is(known)) {
            let text = format!("Space {id} is not this process's, or its token is wrong");
            return refuse(ErrorCode::Permission, text);
        }
        if !is_child {
            self.session_is(conn, id);
            // A child's first call again: what it asks for was kept, and then the pager died before it could say so.
            let again = agent.is_some();
            return Some(if again { self.child_attached(id) } else { Ok(pager::Reply::Done) });
        }
        let Some(agent) = agent else {
            return refuse(ErrorCode::Invalid, "A forked child's first AttachSpace brings its agent's memory");
        };
        match self.adopt_child(id, &caller, &agent) {
            Err(error) => Some(Err(error)),
            Ok(()) => {
                self.session_is(conn, id);
                self.keep_space(id, VaultWait::Child { space: id, conn, call });
                None
            }
        }
    }

    /// A forked child says who it is: from now on it is a client like any other.
    fn adopt_child(&mut self, id: u64, caller: &Caller, agent: &AgentMemory) -> Result<(), WireError> {
        let agent = self.open_agent(None, agent).map_err(|text| WireError::new(ErrorCode::Invalid, text))?;
        let pidfd = caller.watched()?;
        let Some(space) = self.spaces.get_mut(&id) else {
            return Err(WireError::new(ErrorCode::NotFound, "The space is gone"));
        };
        (space.state.pid, space.state.uid) = (caller.pid, caller.uid);
        (space.pidfd, space.agent) = (Some(pidfd), Some(agent));
        self.watch_pid(id).map_err(|error| WireError::new(ErrorCode::Io, error.to_string()))?;
        self.watch_agent(id);
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
            VaultWait::Born { space } => self.birth_is_kept(space),
            VaultWait::Child { space, conn, call } => {
                if self.spaces.contains_key(&space) {
                    let answer = self.child_attached(space).map(Reply::Pager);
                    self.service.reactor.reply(conn, call, answer);
                }
            }
            VaultWait::Region { region, conn, call } => match self.start_region(region) {
                Ok(()) => {
                    self.made_at_home(conn, call, region);
                    let Some(left) = self.makings.get_mut(&(conn, call)) else { return };
                    *left -= 1;
                    if *left == 0 {
                        self.makings.remove(&(conn, call));
                        self.answer_when_at_home(conn, call, pager::Reply::RegionCreated { region });
                    }
                }
                Err(error) => self.creation_failed(wait, error),
            },
        }
    }

    fn start_region(&mut self, id: u64) -> Result<(), WireError> {
        let gone = || WireError::new(ErrorCode::NotFound, "The client ended while its region was made");
        let region = self.regions.get_mut(id).ok_or_else(gone)?;
        let space = self.spaces.get(&region.space).filter(|space| !space.dying).ok_or_else(gone)?;
        let mode = match region.backing {
            Backing::Shared => Some(RegisterMode::MISSING | RegisterMode::MINOR | RegisterMode::WP),
            Backing::Private => Some(RegisterMode::MISSING | RegisterMode::WP),
            Backing::File => None,
        };
        if region.backing == Backing::File {
            // Nothing is ever protected, so this raises no fault; but the kernel tells when the mapping moves or goes. It can do so for
            // shared memory only: mappings of files on a disk are looked for (`follow_file`).
            for (_, range) in region.registered.iter() {
                if let Err(error) = space.uffd.register(range, RegisterMode::WP) {
                    tracing::debug!(%error, %range, "Nobody will tell when this mapping changes");
                }
            }
        }
        for (mode, (_, range)) in mode.into_iter().flat_map(|mode| region.registered.iter().map(move |on| (mode, on))) {
            space.uffd.register(range, mode).map_err(|error| {
                let text = format!("{range} cannot be registered with userfaultfd: {error}");
                WireError::new(code_of(&error).unwrap_or(ErrorCode::Fault), text)
            })?;
        }
        region.directory.set_live().map_err(|error| io_error("The directory cannot be written", &error))?;
        region.phase = Phase::Live;
        let (space, page_count, backing) = (SpaceId(region.space), region.page_count, region.backing);
        self.push(Event::RegionAdded { region: RegionId(id), space, page_count, backing });
        Ok(())
    }

    /// Undo, and tell the client why.
    pub(crate) fn creation_failed(&mut self, wait: VaultWait, error: WireError) {
        let (conn, call) = match wait {
            VaultWait::Space { space, conn, call } | VaultWait::Child { space, conn, call } => {
                self.end_space(space);
                (conn, call)
            }
            VaultWait::Born { .. } => return,
            VaultWait::Region { region, conn, call } => {
                self.drop_region(RegionId(region));
                if self.makings.remove(&(conn, call)).is_none() {
                    return;
                }
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
        if self.regions.get(region_id).is_none() {
            return refuse(ErrorCode::NotFound, format!("Region {region_id} does not exist: it was freed already"));
        }
        if !self.regions.showing(region_id, self.all_pages(region_id)).any(|(segment, _)| segment.space == space_id) {
            let text = format!("Region {region_id} belongs to another process");
            return refuse(ErrorCode::Permission, text);
        }
        if self.shown_elsewhere(region_id, space_id) {
            self.hide_from(region_id, space_id);
            return Some(Ok(pager::Reply::Done));
        }
        self.freeing.insert(region_id, (conn, call));
        self.begin_free(region_id);
        None
    }
}

/// Errors of the kernel without a libc dependency in this crate.
const EPERM: i32 = 1;
const ENOMEM: i32 = 12;
const EACCES: i32 = 13;
const EINVAL: i32 = 22;
