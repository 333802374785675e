//! Fork: the child becomes a space of its own, with regions that share device frames with the parent's.
//!
//! ```text
//!   FORK event (brings the child's userfaultfd) -> space -> per private region: clone, directory, core Forked
//!                                                       -> per shared or file region: one more segment of the same region
//!   ForkReady of every clone -> vault -> the child's userfaultfd is read
//! ```
//! The child may run at once; its faults wait in its userfaultfd until it is read. Who the child is nobody says: when it
//! attaches, it proves itself with what it finds in its sentinel page. Until then its death shows as ESRCH of any call on its
//! userfaultfd.

use std::collections::BTreeMap;
use std::time::Duration;

use uhmm_ipc::TimerToken;
use uhmm_kernel_hook::uffd::Userfaultfd;
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE, random_bytes};
use uhmm_pager_core::{Backing, Event, Pages, RegionId, SpaceId};

use crate::directory::{DirectoryFile, Header};
use crate::service::Pager;
use crate::space::{Phase, Region, Space, SpaceState, TOKEN_BYTES};

pub(crate) const TIMER_CHILDREN: TimerToken = TimerToken(3);
/// How often forked children that nobody can watch are asked whether they live.
const CHILD_CHECK: Duration = Duration::from_millis(100);

impl Pager {
    /// A process forked.
    pub(crate) fn on_fork(&mut self, parent_id: u64, uffd: Userfaultfd) {
        let child_id = match self.make_child(parent_id, uffd) {
            Ok(id) => id,
            Err(error) => {
                tracing::error!(%error, space = parent_id, "A forked child cannot be managed: pages on devices are lost to it");
                return;
            }
        };
        tracing::info!(parent = parent_id, space = child_id, "A process forked");
        let segments: Vec<_> =
            self.spaces.get(&parent_id).map(|s| s.segments.values().copied().collect()).unwrap_or_default();
        let mut clones: BTreeMap<u64, u64> = BTreeMap::new();
        for id in segments {
            let Some(segment) = self.regions.segment(id) else { continue };
            let (region_id, addr, pages) = (segment.region, segment.addr, segment.pages());
            let Some(region) = self.regions.get(region_id).filter(|region| region.phase == Phase::Live) else {
                continue;
            };
            let target = match region.backing {
                Backing::Shared | Backing::File => region_id,
                Backing::Private => match clones.get(&region_id) {
                    Some(clone) => *clone,
                    None => {
                        let Some(clone) = self.clone_region(region_id, child_id) else { continue };
                        clones.insert(region_id, clone);
                        clone
                    }
                },
            };
            self.show(child_id, target, addr, pages);
            self.keep_segments(target);
        }
        if let Some(child) = self.spaces.get_mut(&child_id) {
            child.incomplete_regions = clones.len();
        }
        for (parent, child) in clones {
            self.push(Event::Forked { parent: RegionId(parent), child: RegionId(child), space: SpaceId(child_id) });
        }
        self.child_may_be_ready(child_id);
        self.check_children_soon();
    }

    /// One timer, however many processes there are to look after.
    pub(crate) fn check_children_soon(&mut self) {
        if !self.children_armed {
            self.children_armed = true;
            self.service.reactor.add_timer(CHILD_CHECK, TIMER_CHILDREN);
        }
    }

    fn make_child(&mut self, parent_id: u64, uffd: Userfaultfd) -> Result<u64, uhmm_kernel_hook::HookError> {
        let mut token = [0u8; TOKEN_BYTES];
        random_bytes(&mut token)?;
        let id = self.next_space;
        self.next_space += 1;
        let (features, full, sentinel_addr) = self
            .spaces
            .get(&parent_id)
            .map_or((0, false, 0), |parent| (parent.state.features, parent.state.full, parent.state.sentinel_addr));
        let state = SpaceState { id, nonce: 0, full, features, pid: 0, token, sentinel_addr };
        let space = Space {
            state,
            uffd,
            pidfd: None,
            segments: BTreeMap::new(),
            agent: None,
            dying: false,
            incomplete_regions: 0,
            vacated: Default::default(),
        };
        self.spaces.insert(id, space);
        self.keep_child(id);
        Ok(id)
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
        for page in 0..page_count {
            let attr = parent.directory.attr(page);
            if attr != Default::default()
                && let Err(error) = directory.set_attr(page, attr)
            {
                tracing::warn!(%error, "Advice was not inherited");
            }
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
        });
        Some(id)
    }

    /// The core has completed a child's region.
    pub(crate) fn fork_ready(&mut self, region_id: RegionId) {
        let Some(region) = self.regions.get(region_id.0) else { return };
        let space_id = region.space;
        if let Err(error) = region.directory.set_live() {
            tracing::error!(%error, region = region_id.0, "A directory cannot be written");
        }
        let directory = region.directory.fd();
        let name = format!("{}dir", Space::region_prefix(space_id, region_id.0));
        self.service.vault.put(&mut self.service.reactor, &name, directory);
        if let Some(space) = self.spaces.get_mut(&space_id) {
            space.incomplete_regions = space.incomplete_regions.saturating_sub(1);
        }
        self.child_may_be_ready(space_id);
    }

    fn child_may_be_ready(&mut self, space_id: u64) {
        let Some(space) = self.spaces.remove(&space_id) else { return };
        if space.incomplete_regions == 0
            && let Err(error) = self.watch_space(&space)
        {
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
        self.children_armed = false;
        let silent = |space: &&Space| space.agent.as_ref().is_none_or(|agent| agent.conn.is_none());
        let unwatched: Vec<u64> =
            self.spaces.values().filter(|space| !space.dying).filter(silent).map(|space| space.state.id).collect();
        for id in &unwatched {
            if !self.child_lives(*id) {
                tracing::info!(space = id, "An address space is gone: its pages are reclaimed");
                self.end_space(*id);
            }
        }
        if !unwatched.is_empty() {
            self.check_children_soon();
        }
    }

    fn child_lives(&self, space_id: u64) -> bool {
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
