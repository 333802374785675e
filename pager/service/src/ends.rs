//! Ends of clients and of regions: a dead process's memory is given up, some of it each turn of the loop.
//!
//! ```text
//!   pidfd, ESRCH, goodbye -> dying -> ENDS_PER_TURN segments a turn -> core: RegionFree -> DropRegion of the last one -> space removed
//! ```

use uhmm_ipc::message::{Reply, pager};
use uhmm_kit::record::What;
use uhmm_pager_core::{Event, RegionId, SpaceId};

use crate::service::Pager;
use crate::space::{Phase, Segment, Space};

/// Segments of ended spaces that are given up in one turn of the loop: about a millisecond.
const ENDS_PER_TURN: usize = 64;

impl Pager {
    pub(crate) fn client_exited(&mut self, space_id: u64) {
        let Some(space) = self.spaces.get_mut(&space_id) else { return };
        let exited = space.pidfd.as_ref().is_some_and(|pidfd| pidfd.exited().unwrap_or(false));
        if space.dying || !exited {
            return;
        }
        let pid = space.state.pid;
        if self.address_space_lives(space_id) {
            // Its agent is about to end; or a child that the program has made with CLONE_VM goes on with the memory.
            return self.check_children_soon();
        }
        tracing::info!(space = space_id, pid, "Client is gone: its pages are reclaimed and scrubbed");
        self.end_space(space_id);
    }

    /// Ends a space whose process died or said goodbye.
    pub(crate) fn end_space(&mut self, space_id: u64) {
        let Some(space) = self.spaces.get_mut(&space_id) else { return };
        let pid = space.state.pid;
        if std::mem::replace(&mut space.dying, true) {
            return;
        }
        self.dying_spaces += 1;
        self.stats.spaces_ended += 1;
        if let Some(Err(error)) = space.pidfd.as_ref().map(|pidfd| self.service.reactor.remove_fd(pidfd)) {
            tracing::debug!(%error, "Pidfd was not watched");
        }
        self.tell_mirror(pager::Event::SpaceGone { space: space_id });
        self.agent_died(space_id);
        self.noted.timing.forget_space(space_id);
        self.note_space(What::SpaceGone, space_id, pid);
        self.ending.push_back(space_id);
    }

    /// A turn's share of the ends of spaces: first what they show, then regions that were on their end already, and those that are half
    /// made, or that a half-made child never got addresses for.
    pub(crate) fn end_some(&mut self) {
        let mut left = ENDS_PER_TURN;
        while left > 0
            && let Some(space_id) = self.ending.pop_front()
        {
            let shown = self.spaces.get(&space_id).into_iter().flat_map(|space| space.segments.values());
            let live =
                |segment: &&Segment| self.regions.get(segment.region).is_some_and(|region| region.phase == Phase::Live);
            let live = shown.filter_map(|id| self.regions.segment(*id)).filter(live);
            let ranges: Vec<_> = live.take(left).map(Segment::range).collect();
            left -= ranges.len();
            for range in ranges {
                for cut in self.cut(space_id, range.start, range.end()) {
                    self.settle_cut(cut);
                }
            }
            if left > 0 {
                self.end_regions_of(space_id);
                self.let_faults_go(space_id);
                self.finish_space_if_empty(space_id);
            } else {
                self.ending.push_back(space_id);
            }
            self.drain();
        }
    }

    fn end_regions_of(&mut self, space_id: u64) {
        let mine: Vec<u64> = self.regions.of_space(space_id).collect();
        for region in mine {
            self.free_or_pass_on(region);
        }
    }

    /// The space of a region ends: the region too, unless a forked child still shows it.
    pub(crate) fn free_or_pass_on(&mut self, region_id: u64) {
        let all = self.all_pages(region_id);
        let heir = self.regions.showing(region_id, all).map(|(segment, _)| segment.space).next();
        let Some(heir) = heir else { return self.begin_free(region_id) };
        let Some(region) = self.regions.get(region_id) else { return };
        let old_prefix = Space::region_prefix(region.space, region_id);
        self.keep_under(heir, region_id);
        self.service.vault.remove(&mut self.service.reactor, &old_prefix);
    }

    /// Last step: the core has let go.
    pub(crate) fn drop_region(&mut self, region: RegionId) {
        for id in self.regions.get(region.0).map(|region| region.segments.clone()).unwrap_or_default() {
            let hidden = self.regions.hide(id);
            let space = hidden.as_ref().and_then(|segment| self.spaces.get_mut(&segment.space));
            if let (Some(space), Some(segment)) = (space, hidden) {
                space.segments.remove(&segment.addr);
            }
        }
        let Some(region) = self.regions.remove(region.0) else { return };
        tracing::debug!(region = region.id, space = region.space, "A region is gone");
        for (space, range) in region.registered.iter() {
            // Somebody else may be shown there by now.
            let taken = !self.touched(space, range.start, range.end()).is_empty();
            let space = self.spaces.get(&space).filter(|_| !taken);
            if let Some(Err(error)) = space.map(|space| space.uffd.unregister(range)) {
                tracing::debug!(%error, "Region was not registered any more");
            }
        }
        // Its owner relies on the answer, and vault and pager may die before the vault has forgotten it.
        if let Err(error) = region.directory.set_gone() {
            tracing::error!(%error, region = region.id, "A directory cannot be written");
        }
        let prefix = Space::region_prefix(region.space, region.id);
        self.service.vault.remove(&mut self.service.reactor, &prefix);
        if let Some((conn, call)) = self.freeing.remove(&region.id) {
            self.service.reactor.reply(conn, call, Ok(Reply::Pager(pager::Reply::Done)));
        }
        self.finish_space_if_empty(region.space);
    }

    fn finish_space_if_empty(&mut self, space_id: u64) {
        let ended = self.spaces.get(&space_id).is_some_and(|space| space.dying && space.segments.is_empty());
        let ended = ended && !self.ending.contains(&space_id) && self.regions.of_space(space_id).next().is_none();
        if !ended {
            return;
        }
        self.birth_is_kept(space_id);
        self.dying_spaces -= 1;
        if let Some(space) = self.spaces.remove(&space_id)
            && let Err(error) = self.service.reactor.remove_fd(&space.uffd)
        {
            tracing::debug!(%error, "Userfaultfd was not watched");
        }
        self.service.vault.remove(&mut self.service.reactor, &Space::vault_prefix(space_id));
        self.traces.remove(&space_id);
        self.failures.forget_space(space_id);
        self.without_memory.remove(&space_id);
        self.injections.retain(|(of, _), _| *of != space_id);
        self.push(Event::SpaceGone { space: SpaceId(space_id) });
        self.answer_closing(space_id, Ok(pager::Reply::Done));
    }
}
