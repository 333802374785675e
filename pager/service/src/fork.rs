//! Fork: the child becomes a space of its own, with regions that share device frames with the parent's.
//!
//! ```text
//!   FORK event (brings the child's userfaultfd) -> vault: space, Made
//!     -> per private region: clone, directory, core Forked
//!     -> per shared or file region: one more segment of the same region
//!     -> vault: directories, then Cloned
//!   ForkReady of every clone -> vault: Done -> the child's userfaultfd is read
//! ```
//! A pager that finds a child that is Made clones it again: nothing but the pager changes the parent's directories, so they are
//! what they were. One that finds it Cloned has the parent's device mappings revoked again.
//! The child may run at once; its faults wait in its userfaultfd until it is read. Who the child is nobody says: when it
//! attaches, it proves itself with what it finds in its sentinel page. Until then its death shows as ESRCH of any call on its
//! userfaultfd.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use uhmm_ipc::TimerToken;
use uhmm_kernel_hook::uffd::{Change, KeptEvent, KeptFork, UffdEvent, Userfaultfd};
use uhmm_kernel_hook::{AddrRange, HookError, PAGE_SIZE, random_bytes, smaps};
use uhmm_pager_core::{Backing, Event, Pages, RegionId, SpaceId};

use crate::directory::{DirectoryFile, Header};
use crate::keepers::Keepers;
use crate::rules::Rule;
use crate::segments::hidden;
use crate::service::Pager;
use crate::space::{Birth, Phase, Region, Segment, Space, SpaceState, TOKEN_BYTES};

pub(crate) const TIMER_CHILDREN: TimerToken = TimerToken(3);
/// How often forked children that nobody can watch are asked whether they live.
const CHILD_CHECK: Duration = Duration::from_millis(100);

/// Where a child's private memory differs from its parent's.
#[derive(Debug, Default)]
struct Inherited {
    /// MADV_DONTFORK: not mapped.
    absent: Vec<AddrRange>,
    /// MADV_WIPEONFORK: empty.
    wiped: Vec<AddrRange>,
    /// Guards of both.
    guards: Vec<AddrRange>,
}

impl Pager {
    /// The children that a batch of events brings, by the event's slot: into the vault at once, before anything else of the batch is
    /// acted on.
    pub(crate) fn make_children(&mut self, parent_id: u64, events: &[UffdEvent]) -> BTreeMap<usize, u64> {
        let mut children = BTreeMap::new();
        for (slot, event) in events.iter().enumerate() {
            let UffdEvent::Fork { uffd } = event else { continue };
            match self.journal.id(slot).and_then(|event| self.make_child(parent_id, uffd.as_fd(), event)) {
                Ok(id) => drop(children.insert(slot, id)),
                Err(error) => tracing::error!(%error, space = parent_id, "A forked child's userfaultfd cannot be kept"),
            }
        }
        children
    }

    /// A process forked.
    pub(crate) fn on_fork(&mut self, parent_id: u64, child_id: u64) {
        tracing::info!(parent = parent_id, space = child_id, "A process forked");
        let inherited = self.inherited(parent_id, child_id);
        // The child would wait for them, too.
        self.end_rest_of_space(parent_id);
        // Before the child gets its entries: it has the parent's guards too, and nothing below them.
        self.drop_guarded(parent_id, &inherited.guards);
        self.drain();
        let (clones, lost) = self.clone_regions(parent_id, child_id, &inherited.absent);
        if let Some(child) = self.spaces.get_mut(&child_id) {
            child.unready_regions = clones.len();
        }
        for (parent, child) in &clones {
            let space = SpaceId(child_id);
            self.push(Event::Forked { parent: RegionId(*parent), child: RegionId(*child), space });
        }
        for child in clones.values() {
            self.drop_what_is_not_inherited(child_id, *child, &inherited.wiped);
        }
        // Their entries are complete after this, whether they are ready or not.
        self.drain();
        for child in clones.values() {
            self.keep_clone(child_id, *child);
        }
        self.birth_is(child_id, if lost { Birth::ClonedInPart } else { Birth::Cloned });
        self.child_may_be_ready(child_id);
        self.check_children_soon();
    }

    /// What the kernel has given a child of the private memory that is managed. Only the flags of the parent's mappings tell what it finds
    /// empty; they are read at once, since the parent runs on.
    fn inherited(&self, parent_id: u64, child_id: u64) -> Inherited {
        let mut inherited = Inherited::default();
        let (Some(parent), Some(child)) = (self.spaces.get(&parent_id), self.spaces.get(&child_id)) else {
            return inherited;
        };
        let private = |id: &u64| self.regions.segment(*id).filter(|segment| self.is_private(RegionId(segment.region)));
        let segments: Vec<&Segment> = parent.segments.values().filter_map(private).collect();
        // What is in system memory the kernel has treated as it should.
        let elsewhere = segments.iter().any(|segment| self.is_anywhere(segment.region, segment.pages()));
        if let Some(agent) = parent.agent.as_ref().filter(|_| elsewhere) {
            inherited.wiped =
                smaps::with_flag(agent.memory.smaps.as_fd(), smaps::WIPED_ON_FORK).unwrap_or_else(|error| {
                    tracing::warn!(%error, parent = parent_id, "What a forked child shall find empty is not known");
                    Vec::new()
                });
        }
        for range in segments.iter().map(|segment| segment.range()) {
            inherited.guards.extend(self.guards(parent_id, range));
            let mappings = self.vmas(parent_id, range).unwrap_or_default();
            for mapping in mappings.iter().filter_map(|vma| vma.range().intersection(&range)) {
                // MADV_DONTFORK: the child has nothing there, or something of its own.
                if child.uffd.has_private(mapping.start).is_ok_and(|has| has == Some(false)) {
                    inherited.absent.push(mapping);
                }
            }
        }
        inherited
    }

    /// MADV_WIPEONFORK, and what the child has no mapping of.
    fn drop_what_is_not_inherited(&mut self, child_id: u64, region_id: u64, wiped: &[AddrRange]) {
        let all = self.all_pages(region_id);
        let shown: Vec<_> = self.regions.showing(region_id, all).map(|(s, pages)| (s.range(), pages)).collect();
        let mut pages: Vec<Pages> = shown.iter().map(|(_, pages)| *pages).collect();
        for pages in hidden(all, &mut pages) {
            self.push(Event::Unmapped { region: RegionId(region_id), pages });
        }
        if shown.is_empty() {
            return self.begin_free(region_id);
        }
        for (range, of) in shown {
            for part in wiped.iter().filter_map(|wiped| wiped.intersection(&range)) {
                tracing::debug!(space = child_id, %part, "A forked child finds this empty");
                let first = of.first + (part.start - range.start) / PAGE_SIZE;
                let pages = Pages { first, count: part.len / PAGE_SIZE };
                self.push(Event::Removed { region: RegionId(region_id), pages });
            }
        }
    }

    /// Shows the child what its parent is shown, without what it has no mapping of; returns the clones of private regions by their
    /// originals. `true`: some could not be made.
    fn clone_regions(&mut self, parent_id: u64, child_id: u64, absent: &[AddrRange]) -> (BTreeMap<u64, u64>, bool) {
        let mut clones: BTreeMap<u64, u64> = BTreeMap::new();
        let Some(parent) = self.spaces.get(&parent_id) else { return (clones, true) };
        let segments: Vec<_> = parent.segments.values().copied().collect();
        let mut lost = false;
        for id in segments {
            let Some(segment) = self.regions.segment(id) else { continue };
            let (region_id, addr, pages) = (segment.region, segment.addr, segment.pages());
            let Some(region) = self.regions.get(region_id).filter(|region| region.phase == Phase::Live) else {
                continue;
            };
            let target = match region.backing {
                Backing::Shared | Backing::File => Some(region_id),
                Backing::Private => clones.get(&region_id).copied().or_else(|| self.clone_region(region_id, child_id)),
            };
            let Some(target) = target else {
                lost = true;
                continue;
            };
            if target != region_id {
                clones.insert(region_id, target);
            }
            let mut not_there: Vec<Pages> = absent
                .iter()
                .filter_map(|range| range.intersection(&AddrRange { start: addr, len: pages.count * PAGE_SIZE }))
                .map(|r| Pages { first: pages.first + (r.start - addr) / PAGE_SIZE, count: r.len / PAGE_SIZE })
                .collect();
            for part in hidden(pages, &mut not_there) {
                self.show(child_id, target, addr + (part.first - pages.first) * PAGE_SIZE, part);
            }
            self.keep_segments(target);
        }
        (clones, lost)
    }

    /// Children whose making a dead pager has not finished: finished now, but for those whose FORK event is still to be repeated. They
    /// are returned by the event's name; what comes before it in the journal came before the fork.
    pub(crate) fn recover_children(
        &mut self,
        parent_id: u64,
        kept: &[KeptEvent],
    ) -> Result<BTreeMap<u64, u64>, HookError> {
        let noted = self.journal.noted_forks()?;
        let slots = kept.iter().filter_map(|kept| match kept.event {
            Change::Fork { reader, fd } => Some(KeptFork { owner: parent_id, id: kept.id, reader, fd }),
            Change::Remap { .. } | Change::Unmap { .. } | Change::Remove { .. } => None,
        });
        // The number on the note is the later one.
        let mut lost: BTreeMap<(u64, u64), (u32, i32)> =
            slots.chain(noted).map(|fork| ((fork.owner, fork.id), (fork.reader, fork.fd))).collect();
        for state in self.spaces.values().map(|space| &space.state) {
            if lost.remove(&(state.parent, state.fork_event)).is_some() {
                self.journal.fork_is_kept(state.parent, state.fork_event)?;
            }
        }
        self.children_of_the_dead(&lost)?;
        let mut waiting = BTreeMap::new();
        let unborn = self.spaces.values().filter(|space| !space.is_born()).map(|space| &space.state);
        let unborn: Vec<(u64, u64, u64, Birth)> =
            unborn.map(|state| (state.id, state.parent, state.fork_event, state.birth)).collect();
        for (child, parent, event, birth) in unborn {
            let is_kept = parent == parent_id && kept.iter().any(|kept| kept.id == event);
            match birth {
                Birth::Made if is_kept => drop(waiting.insert(event, child)),
                Birth::Made => self.on_fork(parent, child),
                Birth::Cloned | Birth::ClonedInPart => self.revoke_again(parent, child),
                Birth::Done | Birth::Lost => {}
            }
        }
        Ok(waiting)
    }

    /// Userfaultfds that dead pagers had and the vault has not.
    fn children_of_the_dead(&mut self, lost: &BTreeMap<(u64, u64), (u32, i32)>) -> Result<(), HookError> {
        let wanted: Vec<(u32, i32)> = lost.values().copied().collect();
        let mut taken = self.keepers.take(&wanted);
        for ((parent, event), place) in lost {
            match taken.remove(place) {
                // From here on it is noted as this pager's.
                Some(uffd) => drop(self.make_child(*parent, uffd.as_fd(), *event)?),
                None => {
                    self.journal.fork_is_kept(*parent, *event)?;
                    tracing::error!(parent, "A forked child is not managed: its pages on devices are lost to it");
                }
            }
        }
        Keepers::forget_old(&mut self.service);
        Ok(())
    }

    /// The child's regions are there; nobody knows whether the parent's devices had let go of what it shares.
    fn revoke_again(&mut self, parent_id: u64, child_id: u64) {
        let private = |region: &&Region| region.backing == Backing::Private;
        let of = |space: u64| {
            let mine = self.regions.of_space(space).filter_map(|id| self.regions.get(id));
            mine.filter(private).map(|region| RegionId(region.id))
        };
        let (parents, child): (Vec<_>, _) = (of(parent_id).collect(), of(child_id).next());
        if let (Some(space), Some(child)) = (self.spaces.get_mut(&child_id), child) {
            space.unready_regions = parents.len();
            for parent in parents {
                self.push(Event::ForkedBefore { parent, child });
            }
        }
        self.drain();
        self.child_may_be_ready(child_id);
    }

    /// One timer, however many processes there are to look after.
    pub(crate) fn check_children_soon(&mut self) {
        if !self.children_armed {
            self.children_armed = true;
            self.service.reactor.add_timer(CHILD_CHECK, TIMER_CHILDREN);
        }
    }

    fn make_child(&mut self, parent_id: u64, uffd: BorrowedFd<'_>, event: u64) -> Result<u64, HookError> {
        let own = uffd.try_clone_to_owned().map_err(|source| HookError::call("dup", None, source))?;
        let uffd = Userfaultfd::from_fd(own)?;
        let mut token = [0u8; TOKEN_BYTES];
        random_bytes(&mut token)?;
        let id = self.next_space;
        self.next_space += 1;
        let (features, full, sentinel_addr, uid) =
            self.spaces.get(&parent_id).map_or((0, false, 0, u32::MAX), |parent| {
                (parent.state.features, parent.state.full, parent.state.sentinel_addr, parent.state.uid)
            });
        // Whatever it becomes, it began with the parent's memory.
        let rule = self.spaces.get(&parent_id).map_or(Rule::NOBODY, |parent| parent.state.rule);
        let state = SpaceState {
            id,
            nonce: 0,
            full,
            features,
            pid: 0,
            uid,
            rule,
            token,
            sentinel_addr,
            birth: Birth::Made,
            parent: parent_id,
            fork_event: event,
            at_home: false,
        };
        let space = Space {
            state,
            uffd,
            pidfd: None,
            segments: BTreeMap::new(),
            agent: None,
            begun: None,
            dying: false,
            unready_regions: 0,
            vacated: Default::default(),
        };
        let fork = KeptFork {
            owner: parent_id,
            id: event,
            reader: self.service.incarnation,
            fd: space.uffd.as_fd().as_raw_fd(),
        };
        self.journal.fork_is_kept(parent_id, event)?;
        if !self.journal.note_fork(fork)? {
            tracing::warn!(
                parent = parent_id,
                "Too many forks at once: this one may be lost if the pager is killed now"
            );
        }
        self.spaces.insert(id, space);
        self.tell_core_of_rule(id);
        self.keep_child(id);
        Ok(id)
    }

    /// The vault has a child's userfaultfd, or nobody needs it any more.
    pub(crate) fn birth_is_kept(&mut self, space_id: u64) {
        let Some(state) = self.spaces.get(&space_id).map(|space| &space.state).filter(|state| state.parent != 0) else {
            return;
        };
        if let Err(error) = self.journal.fork_is_kept(state.parent, state.fork_event) {
            tracing::error!(%error, space = space_id, "The journal cannot be written");
        }
    }

    /// The child's view of a private region: the core gives it its entries.
    fn clone_region(&mut self, parent_id: u64, child_space: u64) -> Option<u64> {
        let parent = self.regions.get(parent_id)?;
        let (page_count, backing) = (parent.page_count, parent.backing);
        let registered = parent.registered.in_child(child_space);
        let id = self.next_region;
        let header = Header { region: id, space: child_space, backing, page_count, offset_bytes: 0 };
        let directory = match DirectoryFile::create(header) {
            Ok(directory) => directory,
            Err(error) => {
                tracing::error!(%error, region = parent_id, "No memory for a forked child's directory");
                return None;
            }
        };
        if let Err(error) = directory.inherit_attrs(&parent.directory) {
            tracing::warn!(%error, "Advice was not inherited");
        }
        self.next_region += 1;
        self.regions.insert(Region {
            id,
            space: child_space,
            backing,
            page_count,
            memory: None,
            directory,
            phase: Phase::Live,
            segments: Vec::new(),
            retired: Vec::new(),
            registered,
            cpu_home: None,
        });
        Some(id)
    }

    /// The core has given a child's region its entries.
    fn keep_clone(&mut self, space_id: u64, region_id: u64) {
        let Some(region) = self.regions.get(region_id) else { return };
        if let Err(error) = region.directory.set_live() {
            tracing::error!(%error, region = region_id, "A directory cannot be written");
        }
        let directory = region.directory.fd();
        let name = format!("{}dir", Space::region_prefix(space_id, region_id));
        self.service.vault.put(&mut self.service.reactor, &name, directory);
    }

    /// Nobody writes what a child's region shares.
    pub(crate) fn fork_ready(&mut self, region_id: RegionId) {
        let Some(space_id) = self.regions.get(region_id.0).map(|region| region.space) else { return };
        if let Some(space) = self.spaces.get_mut(&space_id) {
            space.unready_regions = space.unready_regions.saturating_sub(1);
        }
        self.child_may_be_ready(space_id);
    }

    /// Also in the vault.
    fn birth_is(&mut self, space_id: u64, birth: Birth) {
        let Some(space) = self.spaces.get_mut(&space_id) else { return };
        space.state.birth = birth;
        self.keep_state(space_id);
    }

    /// What is known of a space, as it is now, in the vault.
    pub(crate) fn keep_state(&mut self, space_id: u64) {
        let Some(space) = self.spaces.get(&space_id) else { return };
        match space.state.to_memfd() {
            Ok(state) => {
                let name = format!("{}state", Space::vault_prefix(space_id));
                self.service.vault.put(&mut self.service.reactor, &name, state);
            }
            Err(error) => tracing::error!(%error, space = space_id, "The state of a space cannot be kept"),
        }
    }

    fn child_may_be_ready(&mut self, space_id: u64) {
        let Some(space) = self.spaces.get(&space_id) else { return };
        let end = match space.state.birth {
            Birth::Cloned => Birth::Done,
            Birth::ClonedInPart => Birth::Lost,
            Birth::Done | Birth::Made | Birth::Lost => return,
        };
        if space.unready_regions > 0 {
            return;
        }
        self.birth_is(space_id, end);
        let Some(space) = self.spaces.remove(&space_id) else { return };
        if let Err(error) = self.watch_space(&space) {
            tracing::error!(%error, space = space_id, "A forked child cannot be watched");
        }
        self.spaces.insert(space_id, space);
    }

    /// A forked child reads who it is. Returns whether the address was the sentinel's.
    pub(crate) fn serve_sentinel(&mut self, space_id: u64, addr: u64) -> bool {
        let Some(space) = self.spaces.get(&space_id) else { return false };
        let page = addr & !(PAGE_SIZE - 1);
        if page != space.state.sentinel_addr || page == 0 {
            return false;
        }
        let mut bytes = vec![0u8; PAGE_SIZE as usize];
        bytes[..8].copy_from_slice(&space.state.id.to_le_bytes());
        bytes[8..8 + TOKEN_BYTES].copy_from_slice(&space.state.token);
        let filled = self.sentinel_page.write(0, &bytes).and_then(|()| {
            space.uffd.copy(page, &self.sentinel_page, 0, PAGE_SIZE, uhmm_kernel_hook::CopyMode::default())
        });
        match filled {
            Err(error) => tracing::warn!(%error, space = space_id, "The sentinel page cannot be filled"),
            // An event of the space is unread: the fault is raised again after it was read.
            Ok(outcome) if !outcome.is_complete() => {
                self.reread.insert(space_id);
                if let Err(error) = space.uffd.wake(AddrRange { start: page, len: PAGE_SIZE }) {
                    tracing::debug!(%error, "Wake failed");
                }
            }
            Ok(_) => {}
        }
        true
    }

    /// Forked children without a pidfd, and processes that lost their connection: is the address space still there? (exec ends it,
    /// and the process lives on.)
    pub(crate) fn check_children(&mut self) {
        let silent = |space: &&Space| space.agent.as_ref().is_none_or(|agent| agent.conn.is_none());
        let unwatched: Vec<u64> =
            self.spaces.values().filter(|space| !space.dying).filter(silent).map(|space| space.state.id).collect();
        for id in &unwatched {
            if !self.address_space_lives(*id) {
                tracing::info!(space = id, "An address space is gone: its pages are reclaimed");
                self.end_space(*id);
            }
        }
        if !unwatched.is_empty() {
            self.check_children_soon();
        }
    }

    pub(crate) fn address_space_lives(&self, space_id: u64) -> bool {
        let Some(space) = self.spaces.get(&space_id) else { return false };
        // The sentinel is not registered for write protection, so a living process answers with a refusal that changes nothing.
        let sentinel = AddrRange { start: space.state.sentinel_addr, len: PAGE_SIZE };
        let outcome = space.uffd.write_protect(sentinel, false, true);
        !matches!(outcome, Ok(uhmm_kernel_hook::WpOutcome::NoProcess))
    }

    /// All pages of a region.
    pub(crate) fn all_pages(&self, region_id: u64) -> Pages {
        Pages { first: 0, count: self.regions.get(region_id).map_or(0, |region| region.page_count) }
    }
}
