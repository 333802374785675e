//! What is at a client's addresses *now*. userfaultfd tells of munmap, mremap, MADV_DONTNEED and fork, and of nothing else: mprotect, guards
//! (MADV_GUARD_INSTALL), shmdt, shmat(SHM_REMAP), remap_file_pages and splits of a mapping are silent. So it is never remembered: whoever
//! grants memory to a device, fills it, takes it out or clones it asks here first.
//!
//! ```text
//!   addresses -- PROCMAP_QUERY --> mappings -- the region's own? --> Ours{read, write} -- PAGEMAP_SCAN --> Guard
//!                                                  `-- no, or nothing mapped --> Other
//!
//!   Ours    go on, within its rights
//!   Guard   private: the kernel has dropped the content, so it is dropped here.  shared: the content is the memfd's, it stays
//!   Other   once no event is unread (an mremap under way looks the same): the segment ends there, as after munmap
//! ```
//!
//! A forked child that never attached gave no descriptors to ask with, and kernels before 6.11 do not answer: `None`. What remains then is
//! what the kernel says when it is asked to fill (ENOENT).

use std::os::fd::AsFd;

use uhmm_kernel_hook::pagemap;
use uhmm_kernel_hook::procmap::{self, Vma};
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE, UffdState};
use uhmm_pager_core::{Backing, Entry, Event, Pages, RegionId};

use crate::service::Pager;
use crate::space::{Region, Segment, Space};

/// What the kernel shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    /// The memory that the segment stands for, with the program's own rights.
    Ours { read: bool, write: bool },
    /// A page that nobody may touch.
    Guard,
    /// Something else, or nothing.
    Other,
}

/// Neighbouring pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub range: AddrRange,
    pub shown: Shown,
}

/// What lies at the front of some pages that are to be filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Front {
    /// So many pages without a guard.
    Clear(u64),
    /// So many guards.
    Guards(u64),
}

/// What became of addresses that show something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// No segment has them any more.
    Yes,
    /// Not known before more events are read.
    NotYet,
}

/// Appends a part, joined to the last one where it can be.
fn push(parts: &mut Vec<Part>, part: Part) {
    match parts.last_mut() {
        _ if part.range.len == 0 => {}
        Some(last) if last.shown == part.shown && last.range.end() == part.range.start => {
            last.range.len += part.range.len;
        }
        _ => parts.push(part),
    }
}

/// The mappings of a range as parts; what lies between them is somebody else's.
fn with_holes(range: AddrRange, vmas: &[Vma], kind: impl Fn(&Vma) -> Shown) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut next = range.start;
    let between = |start: u64, end: u64| AddrRange { start, len: end.saturating_sub(start) };
    for vma in vmas {
        let (from, to) = (vma.start.max(range.start), vma.end.min(range.end()));
        push(&mut parts, Part { range: between(next, from), shown: Shown::Other });
        push(&mut parts, Part { range: between(from, to), shown: kind(vma) });
        next = to;
    }
    push(&mut parts, Part { range: between(next, range.end()), shown: Shown::Other });
    parts
}

/// Guards take the place of what they lie in.
fn with_guards(parts: &[Part], guards: &[AddrRange]) -> Vec<Part> {
    let mut all = Vec::new();
    for part in parts {
        let mut next = part.range.start;
        let in_part = guards.iter().filter_map(|guard| guard.intersection(&part.range));
        for guard in in_part.filter(|_| matches!(part.shown, Shown::Ours { .. })) {
            push(&mut all, Part { range: AddrRange { start: next, len: guard.start - next }, ..*part });
            push(&mut all, Part { range: guard, shown: Shown::Guard });
            next = guard.end();
        }
        push(&mut all, Part { range: AddrRange { start: next, len: part.range.end() - next }, ..*part });
    }
    all
}

impl Pager {
    /// Mappings of a client that touch a range, in order; `None` where the kernel cannot be asked.
    pub(crate) fn vmas(&self, space_id: u64, range: AddrRange) -> Option<Vec<Vma>> {
        let maps = &self.spaces.get(&space_id)?.agent.as_ref()?.memory.maps;
        let found = procmap::query_range(maps.as_fd(), range);
        found.inspect_err(|error| tracing::debug!(%error, "Mappings of a client cannot be asked for")).ok()
    }

    /// Guards in a range of a client. None where nobody can tell.
    pub(crate) fn guards(&self, space_id: u64, range: AddrRange) -> Vec<AddrRange> {
        let agent = self.spaces.get(&space_id).and_then(|space| space.agent.as_ref());
        let Some(agent) = agent else { return Vec::new() };
        pagemap::guards(agent.memory.pagemap.as_fd(), range).unwrap_or_else(|error| {
            tracing::debug!(%error, %range, "A client's guards cannot be asked for");
            Vec::new()
        })
    }

    /// What the kernel shows in a part of a segment's addresses; see the module head for `None`.
    pub(crate) fn view(&self, segment: &Segment, range: AddrRange) -> Option<Vec<Part>> {
        let parts = self.view_mappings(segment, range)?;
        let guards = self.guards(segment.space, range);
        Some(if guards.is_empty() { parts } else { with_guards(&parts, &guards) })
    }

    /// [`Pager::view`] without the guards: about a microsecond a mapping, however large it is.
    pub(crate) fn view_mappings(&self, segment: &Segment, range: AddrRange) -> Option<Vec<Part>> {
        let vmas = self.vmas(segment.space, range)?;
        let (space, region) = (self.spaces.get(&segment.space)?, self.regions.get(segment.region)?);
        Some(with_holes(range, &vmas, |vma| {
            let ours = is_ours(space, region, segment, vma, vma.start.max(range.start));
            if ours { Shown::Ours { read: vma.read, write: vma.write } } else { Shown::Other }
        }))
    }

    /// Before a fill: up to where nothing is a guard. The page of a fault is none: the kernel would have raised a signal.
    pub(crate) fn in_front(&self, space_id: u64, region: RegionId, pages: Pages, range: AddrRange) -> Front {
        if pages.count == 1 && self.faulted.contains(&(region, pages.first)) {
            return Front::Clear(1);
        }
        match self.guards(space_id, range).first() {
            None => Front::Clear(pages.count),
            Some(guard) if guard.start == range.start => Front::Guards(guard.len / PAGE_SIZE),
            Some(guard) => Front::Clear((guard.start - range.start) / PAGE_SIZE),
        }
    }

    /// Parts of a range that show something else although no event has said so: their segments end, and devices let go of them. A file may
    /// have been mapped elsewhere meanwhile, where `follow_file` finds it, unless it is to be freed.
    pub(crate) fn end_what_is_gone(&mut self, space_id: u64, range: AddrRange, frees_files: bool) -> Ended {
        let ids = self.touched(space_id, range.start, range.end());
        let other = |id: &u64| {
            let segment = self.regions.segment(*id)?;
            let parts = self.view_mappings(segment, segment.range().intersection(&range)?)?;
            Some(parts.into_iter().filter(|part| part.shown == Shown::Other).map(|part| part.range))
        };
        let gone: Vec<AddrRange> = ids.iter().filter_map(other).flatten().collect();
        if gone.is_empty() {
            return Ended::Yes;
        }
        // Asked after looking: what an mremap has moved away is not gone, and its event is unread still.
        let state = self.spaces.get(&space_id).map(|space| space.uffd.state());
        match state {
            Some(Ok(UffdState::Quiet)) => {}
            Some(Ok(UffdState::NoProcess)) | None => return Ended::Yes,
            Some(Ok(UffdState::EventUnread) | Err(_)) => {
                self.reread.insert(space_id);
                return Ended::NotYet;
            }
        }
        for range in gone {
            tracing::info!(space = space_id, %range, "Memory was unmapped or replaced without a word: it is not managed any more");
            self.end_addresses(space_id, range, frees_files);
        }
        Ended::Yes
    }

    fn end_addresses(&mut self, space_id: u64, range: AddrRange, frees_files: bool) {
        self.not_registered(space_id, range);
        for cut in self.cut(space_id, range.start, range.end()) {
            if let Some(agent) = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut()) {
                agent.unmapped(RegionId(cut.region), cut.pages);
            }
            let is_file = self.regions.get(cut.region).is_some_and(|region| region.backing == Backing::File);
            if frees_files || !is_file {
                self.settle_cut(cut);
            }
        }
    }

    /// The kernel has dropped what private guards stood on.
    pub(crate) fn drop_guarded(&mut self, space_id: u64, guards: &[AddrRange]) {
        for guard in guards {
            for (region, pages) in self.pieces(space_id, guard.start, guard.end()) {
                if self.is_private(RegionId(region)) && self.is_anywhere(region, pages) {
                    self.push(Event::Removed { region: RegionId(region), pages });
                }
            }
        }
    }

    /// Whether any of the pages is more than what the address space has anyway.
    pub(crate) fn is_anywhere(&self, region: u64, pages: Pages) -> bool {
        let Some(region) = self.regions.get(region) else { return false };
        region.directory.any(pages, |entry| entry != Entry::ABSENT && !entry.is_settled_system())
    }
}

/// Whether a mapping is the memory that a segment stands for. `addr`: where the part in question begins.
fn is_ours(space: &Space, region: &Region, segment: &Segment, vma: &Vma, addr: u64) -> bool {
    let page = segment.first_page + (addr - segment.addr) / PAGE_SIZE;
    match (region.backing, &region.memory) {
        (Backing::Private, _) => {
            let anonymous = !vma.shared && vma.inode == 0 && vma.page_size_bytes == PAGE_SIZE;
            // Without an answer it counts as before: an event will tell.
            anonymous && space.uffd.has_private(addr).ok().flatten().unwrap_or(true)
        }
        (_, None) => true,
        // The program maps the frames of a coherent device itself.
        (Backing::Shared, _) if Entry::decode(region.directory.load(page)).is_ok_and(Entry::cpu_mapped) => vma.shared,
        (_, Some(memory)) => {
            let offset = vma.offset + (addr - vma.start);
            vma.shared && offset == memory.offset_bytes + page * PAGE_SIZE && memory.is_in(vma).unwrap_or(true)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RW: Shown = Shown::Ours { read: true, write: true };

    fn range(first: u64, count: u64) -> AddrRange {
        AddrRange { start: first * PAGE_SIZE, len: count * PAGE_SIZE }
    }

    fn part(first: u64, count: u64, shown: Shown) -> Part {
        Part { range: range(first, count), shown }
    }

    fn vma(first: u64, count: u64, write: bool) -> Vma {
        let Part { range, .. } = part(first, count, RW);
        let (start, end) = (range.start, range.end());
        let (read, exec, shared) = (true, false, false);
        Vma { start, end, read, write, exec, shared, page_size_bytes: PAGE_SIZE, offset: 0, inode: 0, device: (0, 0) }
    }

    fn kind(vma: &Vma) -> Shown {
        Shown::Ours { read: vma.read, write: vma.write }
    }

    #[test]
    fn what_lies_between_mappings_is_somebody_elses() {
        let vmas = [vma(0, 12, true), vma(14, 2, false), vma(16, 1, true), vma(17, 1, true)];
        let ro = Shown::Ours { read: true, write: false };
        let all =
            [part(10, 2, RW), part(12, 2, Shown::Other), part(14, 2, ro), part(16, 2, RW), part(18, 2, Shown::Other)];
        assert_eq!(with_holes(range(10, 10), &vmas, kind), all);
        assert_eq!(with_holes(range(10, 10), &[], kind), [part(10, 10, Shown::Other)]);
    }

    #[test]
    fn guards_count_where_the_memory_is_ours() {
        let parts = [part(0, 4, RW), part(4, 2, Shown::Other)];
        let guards = [range(1, 1), range(3, 2)];
        let all = [
            part(0, 1, RW),
            part(1, 1, Shown::Guard),
            part(2, 1, RW),
            part(3, 1, Shown::Guard),
            part(4, 2, Shown::Other),
        ];
        assert_eq!(with_guards(&parts, &guards), all);
    }
}
