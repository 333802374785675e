//! Which frame of a device belongs to whom. Derived state: a frame is in use exactly if a directory entry names it, so a
//! new pager rebuilds this table from the directories and there is nothing to reconcile.
//!
//! After a fork several entries name one frame: one owner stands in the frame, the others in `sharers`. The frame is free when
//! the last of them has given it back.

use std::collections::{BTreeMap, HashMap};

use crate::event::{RegionId, SpaceId};
use crate::free::FreeFrames;
use crate::slots::{Frame, Holder, Slots};

/// Frames and pages of a huge page.
pub const HUGE_PAGES: u32 = 512;

/// Owner of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Region.
    pub region: RegionId,
    /// Page of it.
    pub page: u64,
}

/// Frames of one device.
#[derive(Debug)]
pub struct FrameTable {
    pub(crate) frames: Slots,
    free: FreeFrames,
    free_count: u32,
    /// Where the next search begins.
    next: u32,
    /// Hand of the eviction clock.
    pub(crate) hand: u32,
    /// Owners beside the one that stands in the frame.
    pub(crate) sharers: HashMap<u32, Vec<Owner>>,
    /// Free frames that hold something.
    dirty: BTreeMap<Holder, Dirty>,
    /// Who pays for a space's frames.
    groups: HashMap<SpaceId, u16>,
    /// Frames that each pays for.
    charged: HashMap<u16, u32>,
}

/// Free frames that hold somebody's bytes: how many, and none below `from`. So that a client that leaves nothing costs no search, and one
/// that leaves little a short one.
#[derive(Clone, Copy, Debug)]
struct Dirty {
    count: u32,
    from: u32,
}

impl FrameTable {
    /// All free; what they hold is unknown.
    pub fn new(frame_count: u32) -> Self {
        Self {
            frames: Slots::new(frame_count, Holder::Unknown),
            free: FreeFrames::new(frame_count),
            free_count: frame_count,
            next: 0,
            hand: 0,
            sharers: HashMap::new(),
            dirty: BTreeMap::from([(Holder::Unknown, Dirty { count: frame_count, from: 0 })]),
            groups: HashMap::new(),
            charged: HashMap::new(),
        }
    }

    /// Who pays for the frames that a space takes from now on; 0: nobody. A frame that is shared after a fork stays paid for by whoever took
    /// it, until the last owner gives it back.
    pub fn set_group(&mut self, space: SpaceId, group: u16) {
        match group {
            0 => drop(self.groups.remove(&space)),
            group => drop(self.groups.insert(space, group)),
        }
    }

    /// Frames that a group pays for.
    pub fn charged(&self, group: u16) -> u32 {
        self.charged.get(&group).copied().unwrap_or(0)
    }

    fn charge(&mut self, space: SpaceId) -> u16 {
        let group = if self.groups.is_empty() { 0 } else { self.groups.get(&space).copied().unwrap_or(0) };
        if group != 0 {
            *self.charged.entry(group).or_default() += 1;
        }
        group
    }

    /// The frame is owned no more, or by nobody who pays.
    fn discharge(&mut self, frame: u32) {
        let group = self.frames.change(frame, |frame| std::mem::take(&mut frame.group));
        if let Some(count) = self.charged.get_mut(&group) {
            *count = count.saturating_sub(1);
        }
    }

    /// The frame, which is free, holds what it is said to.
    fn is_dirty(&mut self, frame: u32) {
        let holder = self.frames.at(frame).last_space;
        if holder != Holder::Clean {
            let dirty = self.dirty.entry(holder).or_insert(Dirty { count: 0, from: frame });
            *dirty = Dirty { count: dirty.count + 1, from: dirty.from.min(frame) };
        }
    }

    /// The frame, which was free, is so no more, or holds something else.
    fn no_longer_dirty(&mut self, frame: u32) {
        let holder = self.frames.at(frame).last_space;
        if let Some(dirty) = self.dirty.get_mut(&holder) {
            dirty.count -= 1;
            if dirty.count == 0 {
                self.dirty.remove(&holder);
            }
        }
    }

    /// All free, and the memory is new: there is nothing in it.
    pub fn clean(frame_count: u32) -> Self {
        Self { frames: Slots::new(frame_count, Holder::Clean), dirty: BTreeMap::new(), ..Self::new(frame_count) }
    }

    /// Size.
    pub fn frame_count(&self) -> u32 {
        self.frames.count()
    }

    /// Frames without an owner.
    pub fn free_count(&self) -> u32 {
        self.free_count
    }

    /// Who owns it.
    pub fn owner(&self, frame: u32) -> Option<Owner> {
        self.frames.owner(frame)
    }

    /// Takes up to `want` consecutive free frames for consecutive pages; fewer when memory is fragmented, `None` when it is full.
    pub fn allocate(&mut self, want: u32, first: Owner, space: SpaceId) -> Option<(u32, u32)> {
        if self.free_count == 0 || want == 0 {
            return None;
        }
        let (start, count) = self.free.find(want, self.next)?;
        self.occupy(start, count, first, space);
        Some((start, count))
    }

    /// Takes 512 aligned frames for 512 pages, or none.
    pub fn allocate_huge(&mut self, first: Owner, space: SpaceId) -> Option<u32> {
        let start = self.free.find_block()?;
        self.occupy(start, HUGE_PAGES, first, space);
        Some(start)
    }

    fn occupy(&mut self, start: u32, count: u32, first: Owner, space: SpaceId) {
        for offset in 0..count {
            let owner = Owner { page: first.page + u64::from(offset), ..first };
            self.no_longer_dirty(start + offset);
            let group = self.charge(space);
            let last_space = Holder::Space(space);
            self.frames.set(start + offset, Frame { owner: Some(owner), last_space, referenced: true, group });
        }
        self.free.set(start, count, false);
        self.free_count -= count;
        self.next = (start + count) % self.frame_count();
    }

    /// Recovery: the directory says who owns the frame; `shared` entries may name one together. `false`: out of range or owned
    /// already. All claims come before [`Self::claimed`].
    pub fn claim(&mut self, frame: u32, owner: Owner, space: SpaceId, shared: bool) -> bool {
        match self.frames.get(frame) {
            Some(slot) if slot.owner.is_none() => {
                self.no_longer_dirty(frame);
                let (last_space, group) = (Holder::Space(space), self.charge(space));
                self.frames.set(frame, Frame { owner: Some(owner), last_space, referenced: false, group });
                self.free.take(frame);
                self.free_count -= 1;
                true
            }
            Some(_) if shared => self.has(frame, owner) || self.share(frame, owner),
            _ => false,
        }
    }

    /// All that is in use was claimed.
    pub fn claimed(&mut self) {
        self.free.settle();
    }

    /// Another entry names the frame from now on. `false`: nobody owns it.
    pub fn share(&mut self, frame: u32, owner: Owner) -> bool {
        if self.frames.owner(frame).is_none() {
            return false;
        }
        // Whose bytes they are cannot be told any more: they are scrubbed when the last one has gone.
        self.frames.change(frame, |frame| frame.last_space = Holder::Unknown);
        self.sharers.entry(frame).or_default().push(owner);
        true
    }

    /// Whether it is one of the frame's owners.
    fn has(&self, frame: u32, owner: Owner) -> bool {
        self.owner(frame) == Some(owner) || self.sharers.get(&frame).is_some_and(|others| others.contains(&owner))
    }

    /// Several entries name the frame.
    pub fn is_shared(&self, frame: u32) -> bool {
        self.sharers.contains_key(&frame)
    }

    /// One of several owners goes: the frame stays in use. `false`: there are no others.
    fn unshare(&mut self, frame: u32, owner: Owner) -> bool {
        let Some(others) = self.sharers.get_mut(&frame) else { return false };
        match others.iter().position(|other| *other == owner) {
            Some(place) => drop(others.swap_remove(place)),
            None if self.frames.owner(frame) == Some(owner) => {
                let heir = others.pop();
                self.frames.change(frame, |frame| frame.owner = heir);
            }
            None => {}
        }
        if others.is_empty() {
            self.sharers.remove(&frame);
        }
        true
    }

    /// `first` and the owners of the pages after it give consecutive frames back. What they hold stays noted until they are
    /// scrubbed or overwritten. Returns whether a frame needs a scrub.
    pub fn release(&mut self, frame: u32, count: u32, first: Owner) -> bool {
        // Frames that were used lately are warm in every mapping of the device: they go out again first.
        self.next = self.next.min(frame);
        let mut unknown = false;
        let mut freed = (frame, 0);
        for offset in 0..count {
            let owner = Owner { page: first.page + u64::from(offset), ..first };
            if self.unshare(frame + offset, owner) {
                continue;
            }
            let (was_used, last_space) =
                self.frames.change(frame + offset, |slot| (slot.owner.take().is_some(), slot.last_space));
            debug_assert!(was_used, "frame was free");
            unknown |= last_space == Holder::Unknown;
            if was_used {
                self.discharge(frame + offset);
                self.free_count += 1;
                self.is_dirty(frame + offset);
                freed = self.grown(freed, frame + offset);
            }
        }
        self.free.set(freed.0, freed.1, true);
        unknown
    }

    /// As `release`, of those that were claimed: while others are still being claimed. Another entry, which has not claimed it yet, may name
    /// the frame too: so it is scrubbed when all have, whoever had it.
    pub fn release_claimed(&mut self, frame: u32, count: u32, first: Owner) {
        for offset in 0..count {
            let owner = Owner { page: first.page + u64::from(offset), ..first };
            if self.has(frame + offset, owner) {
                self.frames.change(frame + offset, |slot| slot.last_space = Holder::Unknown);
                self.release(frame + offset, 1, owner);
            }
        }
    }

    /// A run of frames to be freed with one more; what it does not follow is freed.
    fn grown(&mut self, run: (u32, u32), frame: u32) -> (u32, u32) {
        if run.0 + run.1 == frame {
            return (run.0, run.1 + 1);
        }
        self.free.set(run.0, run.1, true);
        (frame, 1)
    }

    /// Gives frames back whose content is anybody's guess: they need a scrub.
    pub fn release_unknown(&mut self, frame: u32, count: u32, first: Owner) {
        self.release(frame, count, first);
        for frame in frame..frame + count {
            let is_free = self.frames.owner(frame).is_none();
            if is_free {
                self.no_longer_dirty(frame);
            }
            self.frames.change(frame, |slot| slot.last_space = Holder::Unknown);
            if is_free {
                self.is_dirty(frame);
            }
        }
    }

    /// Marks a frame as used lately.
    pub fn touch(&mut self, frame: u32) {
        self.frames.reference(frame);
    }

    /// Takes the free frames that may hold the space's bytes (or, with `None`, anybody's) out of use for a scrub.
    /// At most `max` frames. They are marked clean at once: they are owned by nobody until [`Self::scrubbed`] gives them back.
    pub fn begin_scrub(&mut self, space: Option<SpaceId>, keeper: Owner, max: usize) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        let holder = space.map_or(Holder::Unknown, Holder::Space);
        let mut taken = 0;
        while taken < max
            && let Some(Dirty { from, .. }) = self.dirty.get(&holder).copied()
        {
            let holds = |frame: Frame| frame.owner.is_none() && frame.last_space == holder;
            let found = (from..self.frames.count()).find(|at| holds(self.frames.at(*at)));
            // Counted and not there: nothing is lost by not scrubbing what does not exist.
            let Some(at) = found else { break };
            self.no_longer_dirty(at);
            if let Some(dirty) = self.dirty.get_mut(&holder) {
                dirty.from = at + 1;
            }
            self.frames.set(at, Frame { owner: Some(keeper), last_space: Holder::Clean, referenced: false, group: 0 });
            self.free_count -= 1;
            taken += 1;
            match runs.last_mut() {
                Some(run) if run.0 + run.1 == at => run.1 += 1,
                _ => runs.push((at, 1)),
            }
        }
        runs.iter().for_each(|(first, count)| self.free.set(*first, *count, false));
        runs
    }

    /// A region ended: consecutive frames of `first` and the pages after it go to `keeper` for a scrub, and are added to `runs`, except
    /// those that others name too, and those that are somebody else's by now (the memory was replaced meanwhile).
    pub fn hand_over(&mut self, frame: u32, count: u32, first: Owner, keeper: Owner, runs: &mut Vec<(u32, u32)>) {
        for offset in 0..count {
            let (at, owner) = (frame + offset, Owner { page: first.page + u64::from(offset), ..first });
            if self.unshare(at, owner) || self.owner(at) != Some(owner) {
                continue;
            }
            self.discharge(at);
            self.frames.set(at, Frame { owner: Some(keeper), last_space: Holder::Clean, referenced: false, group: 0 });
            match runs.last_mut() {
                Some(run) if run.0 + run.1 == at => run.1 += 1,
                _ => runs.push((at, 1)),
            }
        }
    }

    /// The scrub of these runs is through.
    pub fn scrubbed(&mut self, runs: &[(u32, u32)]) {
        for (first, count) in runs {
            for frame in *first..*first + *count {
                self.free_count += u32::from(self.frames.change(frame, |slot| slot.owner.take().is_some()));
            }
            self.free.set(*first, *count, true);
            self.next = self.next.min(*first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(page: u64) -> Owner {
        Owner { region: RegionId(1), page }
    }

    #[test]
    fn allocation_prefers_whole_runs_and_gives_fragments_when_it_must() {
        let mut table = FrameTable::new(16);
        assert_eq!(table.allocate(4, owner(0), SpaceId(1)), Some((0, 4)));
        assert_eq!(table.allocate(4, owner(4), SpaceId(1)), Some((4, 4)));
        table.release(1, 2, owner(1));
        assert_eq!(table.allocate(10, owner(20), SpaceId(1)), Some((8, 8)), "the longest run there is");
        assert_eq!(table.allocate(4, owner(40), SpaceId(1)), Some((1, 2)));
        assert_eq!(table.allocate(1, owner(50), SpaceId(1)), None);
        assert_eq!(table.free_count(), 0);
    }

    #[test]
    fn whoever_takes_a_frame_pays_until_the_last_owner_gives_it_back() {
        let mut table = FrameTable::new(16);
        table.set_group(SpaceId(1), 7);
        table.set_group(SpaceId(2), 8);
        table.allocate(4, owner(0), SpaceId(1));
        table.allocate(2, owner(10), SpaceId(2));
        table.allocate(2, owner(20), SpaceId(3));
        assert_eq!((table.charged(7), table.charged(8), table.charged(0)), (4, 2, 0));
        // A fork's child names two of them too.
        let child = |page| Owner { region: RegionId(2), page };
        assert!(table.share(0, child(0)) && table.share(1, child(1)));
        table.release(0, 2, owner(0));
        assert_eq!(table.charged(7), 4, "the child still has them");
        table.release(0, 2, child(0));
        assert_eq!(table.charged(7), 2);
        let mut runs = Vec::new();
        table.hand_over(2, 2, owner(2), owner(99), &mut runs);
        assert_eq!((table.charged(7), &runs[..]), (0, &[(2, 2)][..]));
        table.scrubbed(&runs);
        table.release_unknown(4, 2, owner(10));
        assert_eq!(table.charged(8), 0);
        assert!(table.claim(9, owner(1), SpaceId(2), false));
        assert_eq!(table.charged(8), 1, "a new pager counts what it finds");
        table.set_group(SpaceId(2), 0);
        table.release(9, 1, owner(1));
        assert_eq!(table.charged(8), 0, "also when the space is gone by then");
    }

    #[test]
    fn a_frame_is_claimed_once() {
        let mut table = FrameTable::new(2);
        assert!(table.claim(1, owner(0), SpaceId(1), false));
        assert!(!table.claim(1, owner(1), SpaceId(1), false));
        assert!(!table.claim(2, owner(1), SpaceId(1), false));
    }

    #[test]
    fn scrubbing_covers_what_a_space_left_and_nothing_else() {
        let mut table = FrameTable::new(8);
        assert_eq!(table.begin_scrub(None, owner(0), usize::MAX), [(0, 8)], "nothing is known at first");
        table.scrubbed(&[(0, 8)]);
        table.allocate(2, owner(0), SpaceId(1));
        table.allocate(2, owner(9), SpaceId(2));
        table.release(0, 2, owner(0));
        assert_eq!(table.begin_scrub(Some(SpaceId(2)), owner(0), usize::MAX), []);
        let runs = table.begin_scrub(Some(SpaceId(1)), owner(0), usize::MAX);
        assert_eq!(runs, [(0, 2)]);
        assert_eq!(table.free_count(), 4, "frames under scrub cannot be allocated");
        table.scrubbed(&runs);
        assert_eq!(table.free_count(), 6);
        assert_eq!(table.begin_scrub(Some(SpaceId(1)), owner(0), usize::MAX), []);
    }

    #[test]
    fn a_shared_frame_is_free_when_its_last_owner_has_gone() {
        let other = Owner { region: RegionId(2), page: 0 };
        let mut table = FrameTable::clean(4);
        table.allocate(2, owner(0), SpaceId(1));
        assert!(table.share(0, other) && table.is_shared(0) && !table.is_shared(1));
        assert!(!table.release(0, 1, owner(0)), "the other one keeps it");
        assert_eq!((table.owner(0), table.free_count()), (Some(other), 2));
        assert!(table.release(0, 1, other), "whose bytes they were is not known any more");
        assert_eq!(table.free_count(), 3);
        assert_eq!(table.begin_scrub(None, owner(9), usize::MAX), [(0, 1)]);
        assert!(!table.share(3, other), "a free frame cannot be shared");
    }

    #[test]
    fn a_region_that_ends_leaves_shared_frames_to_the_others() {
        let other = Owner { region: RegionId(2), page: 0 };
        let mut table = FrameTable::new(4);
        table.allocate(3, owner(0), SpaceId(1));
        table.share(1, other);
        let keeper = Owner { region: RegionId(99), page: 0 };
        let mut runs = Vec::new();
        table.hand_over(0, 3, owner(0), keeper, &mut runs);
        assert_eq!(runs, [(0, 1), (2, 1)]);
        assert_eq!((table.owner(1), table.is_shared(1)), (Some(other), false));
        assert_eq!((table.owner(0), table.owner(2), table.free_count()), (Some(keeper), Some(keeper), 1));
    }

    #[test]
    fn what_is_counted_as_dirty_is_there() {
        let mut table = FrameTable::new(40);
        let mut used: Vec<(u32, u32, Owner)> = Vec::new();
        let mut seed = 1u64;
        for _ in 0..4000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (choice, space) = ((seed >> 33) % 8, SpaceId((seed >> 40) % 3));
            let first = owner(seed % 1000 * 100);
            match choice {
                0..=3 => used.extend(table.allocate(5, first, space).map(|(frame, count)| (frame, count, first))),
                4 | 5 if !used.is_empty() => {
                    let (frame, count, first) = used.swap_remove(seed as usize % used.len());
                    if choice == 4 {
                        table.release(frame, count, first);
                    } else {
                        table.release_unknown(frame, count, first);
                    }
                }
                6 => {
                    let runs = table.begin_scrub(Some(space), owner(7), usize::MAX);
                    table.scrubbed(&runs);
                }
                _ => {
                    let runs = table.begin_scrub(None, owner(7), 3);
                    table.scrubbed(&runs);
                }
            }
            for holder in (0..3).map(|space| Holder::Space(SpaceId(space))).chain([Holder::Unknown]) {
                let holds = |frame: &u32| {
                    let frame = table.frames.at(*frame);
                    frame.owner.is_none() && frame.last_space == holder
                };
                let there = (0..40).filter(holds).count() as u32;
                let first = (0..40).find(holds).unwrap_or(u32::MAX);
                let known = table.dirty.get(&holder);
                assert_eq!(known.map_or(0, |dirty| dirty.count), there, "{holder:?}");
                assert!(known.is_none_or(|dirty| dirty.from <= first), "{holder:?}");
            }
        }
    }

    #[test]
    fn a_region_that_ends_takes_no_frame_that_is_somebody_elses_by_now() {
        let other = Owner { region: RegionId(2), page: 0 };
        let keeper = Owner { region: RegionId(99), page: 0 };
        let mut table = FrameTable::new(4);
        table.allocate(2, other, SpaceId(2));
        let mut runs = Vec::new();
        table.hand_over(0, 3, owner(0), keeper, &mut runs);
        assert_eq!(runs, [], "the device came back with other memory");
        assert_eq!((table.owner(0), table.free_count()), (Some(other), 2));
    }

    #[test]
    fn huge_frames_are_aligned_or_refused() {
        let mut table = FrameTable::new(1024 + 100);
        table.allocate(1, owner(0), SpaceId(1));
        assert_eq!(table.allocate_huge(owner(512), SpaceId(1)), Some(512));
        assert_eq!(table.allocate_huge(owner(1024), SpaceId(1)), None, "only 511 and 100 are left in a row");
    }
}
