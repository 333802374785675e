//! What a device's coming, death or loss means for every page there is: a share of the pages each turn. Entries, not addresses, are walked:
//! regions by their numbers, and who begins anything meanwhile finds pages as they are.
//!
//! ```text
//!   Void      its process is dead: it maps nothing any more
//!   Failed    it will not return, and nobody else reaches its memory: what lived there is poisoned
//!   Rebuild   it has logged in: frames are claimed by the pages that name them. Until all are, nothing is sent there
//! ```
//! A device is answered when all of its walks have ended: what it is given before could be taken for what it had before.
//! Pages that come home from a device whose frames are being claimed give back what was claimed; what was not is never claimed then.

use crate::core::{CHUNK_PAGES, Core};
use crate::entry::{DEVICE_COUNT_MAX, Entry, PageState};
use crate::event::{Action, DeviceId, Directory, Pages, RegionId, SpaceId};
use crate::frames::{FrameTable, Owner};
use crate::policy::Policy;
use crate::recovery::Homecoming;

const START: (RegionId, u64) = (RegionId(0), 0);

/// One walk.
#[derive(Debug)]
pub(crate) struct Walk {
    device: DeviceId,
    /// The next page.
    at: (RegionId, u64),
    task: Task,
}

impl Walk {
    pub(crate) fn is_of(&self, device: DeviceId) -> bool {
        self.device == device
    }

    /// Whose frames are being claimed.
    pub(crate) fn table(&self) -> Option<&FrameTable> {
        match &self.task {
            Task::Rebuild(rebuild) => Some(&rebuild.table),
            Task::Void | Task::Failed => None,
        }
    }
}

#[derive(Debug)]
enum Task {
    Void,
    Failed,
    Rebuild(Box<Rebuild>),
}

/// Frames that are being claimed.
#[derive(Debug)]
struct Rebuild {
    table: FrameTable,
    /// Free frames may hold somebody's bytes.
    has_old_bytes: bool,
    /// The frames hold nothing any more. Such a walk is never interrupted: the next pager would not know.
    lost: bool,
    /// Its old mappings are void.
    fresh_mappings: bool,
}

/// What a share of a walk has found that is to be dealt with at its end.
#[derive(Default)]
struct Finds {
    homecomings: Vec<Homecoming>,
    given_up: Vec<(RegionId, Pages)>,
}

/// The entry of a page that a dead device maps no more; nothing is exclusive to it either.
fn without_device(entry: Entry, bit: u16) -> Entry {
    let mine = entry.mapped_mask() & bit != 0;
    let state = if mine && entry.state() == PageState::Exclusive { PageState::Device } else { entry.state() };
    entry.with_state(state).with_mapped_mask(entry.mapped_mask() & !bit)
}

impl<P: Policy> Core<P> {
    /// Something about every page is not done yet because of the device.
    pub(crate) fn walks_for(&self, device: DeviceId) -> bool {
        self.walks.iter().any(|walk| walk.device == device)
    }

    /// The device's process is dead: it maps nothing any more. Pages on the move clear their own bits when they arrive.
    pub(crate) fn device_void(&mut self, dir: &impl Directory, device: DeviceId, out: &mut Vec<Action>) {
        if device.0 < DEVICE_COUNT_MAX {
            self.walks.retain(|walk| walk.device != device || !matches!(walk.task, Task::Void));
            self.begin_walk(dir, device, Task::Void, out);
        }
    }

    /// The device will not return and nobody else reaches its memory.
    pub(crate) fn device_failed(&mut self, dir: &impl Directory, device: DeviceId, out: &mut Vec<Action>) {
        if device.0 >= DEVICE_COUNT_MAX {
            return;
        }
        self.failed_mask |= 1 << device.0;
        // Nobody will ask for its frames; that its mappings are void stays to be said.
        self.walks.retain_mut(|walk| match &walk.task {
            Task::Rebuild(rebuild) if walk.device == device => {
                let is_void = rebuild.fresh_mappings;
                (walk.task, walk.at) = (Task::Void, START);
                is_void
            }
            _ => true,
        });
        self.begin_walk(dir, device, Task::Failed, out);
    }

    /// It has logged in, and which frames are in use nobody knows.
    #[allow(clippy::too_many_arguments, reason = "the event's own fields")]
    pub(crate) fn rebuild_frames(
        &mut self,
        dir: &impl Directory,
        device: DeviceId,
        frame_count: u32,
        has_old_bytes: bool,
        lost: bool,
        fresh_mappings: bool,
        out: &mut Vec<Action>,
    ) {
        self.forget_scrubs(device);
        self.frames[usize::from(device.0)] = None;
        if lost {
            self.mark_lost(device);
        }
        let void = |walk: &Walk| match &walk.task {
            Task::Void => true,
            Task::Failed => false,
            Task::Rebuild(rebuild) => rebuild.fresh_mappings,
        };
        let fresh_mappings = fresh_mappings || self.walks.iter().any(|walk| walk.device == device && void(walk));
        let old = |walk: &Walk| matches!(&walk.task, Task::Rebuild(rebuild) if rebuild.has_old_bytes);
        let has_old_bytes = has_old_bytes || !lost && self.walks.iter().any(|walk| walk.device == device && old(walk));
        self.walks.retain(|walk| walk.device != device);
        let mut table = if has_old_bytes { FrameTable::new(frame_count) } else { FrameTable::clean(frame_count) };
        self.groups.iter().for_each(|(space, group)| table.set_group(*space, *group));
        let rebuild = Rebuild { table, has_old_bytes, lost, fresh_mappings };
        self.begin_walk(dir, device, Task::Rebuild(Box::new(rebuild)), out);
    }

    /// Tables of all devices, also those whose frames are being claimed.
    pub(crate) fn all_tables(&self) -> impl Iterator<Item = &FrameTable> {
        self.frames.iter().flatten().chain(self.walks.iter().filter_map(Walk::table))
    }

    /// The same, to be changed.
    pub(crate) fn all_tables_mut(&mut self) -> impl Iterator<Item = &mut FrameTable> {
        let claimed = self.walks.iter_mut().filter_map(|walk| match &mut walk.task {
            Task::Rebuild(rebuild) => Some(&mut rebuild.table),
            Task::Void | Task::Failed => None,
        });
        self.frames.iter_mut().flatten().chain(claimed)
    }

    /// Frames of a device, also while they are being claimed: for entries that name more of them.
    pub(crate) fn named_table(&mut self, device: DeviceId) -> Option<&mut FrameTable> {
        if self.frames.get(usize::from(device.0))?.is_some() { self.table(device) } else { self.rebuilding(device) }
    }

    /// Frames that are being claimed.
    pub(crate) fn rebuilding(&mut self, device: DeviceId) -> Option<&mut FrameTable> {
        self.walks.iter_mut().filter(|walk| walk.device == device).find_map(|walk| match &mut walk.task {
            Task::Rebuild(rebuild) => Some(&mut rebuild.table),
            _ => None,
        })
    }

    fn begin_walk(&mut self, dir: &impl Directory, device: DeviceId, task: Task, out: &mut Vec<Action>) {
        self.walks.push_back(Walk { device, at: START, task });
        // What is small is done at once, but not before what a dead pager has left is what it shall be.
        if !self.recovering.any() {
            self.walk_some(dir, device, out);
        }
    }

    /// A turn's share, if it is a walk's turn: one request's step is between two.
    pub(crate) fn walk_in_turn(&mut self, dir: &impl Directory, out: &mut Vec<Action>) -> bool {
        let device = self.walks.front().map(|walk| walk.device);
        let recovers = self.recovering.any();
        self.walked = (recovers || device.is_some()) && (!self.walked || self.ready.is_empty());
        if self.walked && recovers {
            self.recover_some(dir, self.budget, out);
        } else if let Some(device) = device.filter(|_| self.walked) {
            self.walk_some(dir, device, out);
        }
        self.walked
    }

    /// A share of the device's first walk.
    fn walk_some(&mut self, dir: &impl Directory, device: DeviceId, out: &mut Vec<Action>) {
        let Some(place) = self.walks.iter().position(|walk| walk.device == device) else { return };
        let Some(mut walk) = self.walks.remove(place) else { return };
        let mut finds = Finds::default();
        let is_done = self.walk_on(dir, &mut walk, &mut finds, out);
        if is_done {
            self.walk_ended(walk);
        } else {
            self.walks.insert(place, walk);
        }
        let Finds { mut homecomings, given_up } = finds;
        homecomings.retain(|coming| {
            // Those that only hold pages bring nothing home.
            let in_flight = |t: &crate::transfer::Transfer| {
                !t.holds() && t.region == coming.region && t.pages.contains(coming.page)
            };
            !self.transfers.values().any(in_flight)
        });
        self.finish_homecomings(&homecomings, out);
        for (region, pages) in given_up.into_iter().filter(|(region, _)| !self.is_dying(*region)).collect::<Vec<_>>() {
            self.discard_now(dir, region, pages, out);
        }
        if is_done {
            self.unblock_all();
        }
    }

    /// Whether it has come to the end.
    fn walk_on(&mut self, dir: &impl Directory, walk: &mut Walk, finds: &mut Finds, out: &mut Vec<Action>) -> bool {
        let whole = matches!(&walk.task, Task::Rebuild(rebuild) if rebuild.lost);
        let mut left = if whole { u64::MAX } else { self.budget };
        while left > 0 {
            let next = self.regions.range(walk.at.0..).next().map(|(id, info)| (*id, info.space, info.page_count));
            let Some((region, space, page_count)) = next else { return true };
            if region != walk.at.0 {
                walk.at = (region, 0);
            }
            let pages = Pages { first: walk.at.1, count: page_count.saturating_sub(walk.at.1) };
            for (run, entry) in Self::alike_parts(dir, region, pages) {
                if left == 0 {
                    return false;
                }
                left -= 1;
                walk.at.1 = run.end();
                match &mut walk.task {
                    Task::Void => Self::walk_void(walk.device, region, run, entry, out),
                    Task::Failed => self.walk_failed(walk.device, region, run, entry, finds, out),
                    Task::Rebuild(rebuild) => {
                        self.walk_rebuild(walk.device, rebuild, (region, space), run, entry, finds, out);
                    }
                }
            }
            walk.at = (RegionId(region.0 + 1), 0);
            // Regions are looked at, too.
            left = left.saturating_sub(1);
        }
        false
    }

    fn walk_ended(&mut self, walk: Walk) {
        if let Task::Rebuild(rebuild) = walk.task {
            let mut table = rebuild.table;
            table.claimed();
            // What has come home meanwhile, too.
            self.note_unknown(walk.device);
            self.frames[usize::from(walk.device.0)] = Some(table);
        }
    }

    fn walk_void(device: DeviceId, region: RegionId, run: Pages, entry: Entry, out: &mut Vec<Action>) {
        let bit = 1u16 << device.0;
        if entry.mapped_mask() & bit != 0 && !entry.is_moving() {
            Self::publish_same(region, run, without_device(entry, bit), out);
        }
    }

    fn walk_failed(
        &mut self,
        device: DeviceId,
        region: RegionId,
        run: Pages,
        entry: Entry,
        finds: &mut Finds,
        out: &mut Vec<Action>,
    ) {
        // Pages that are more than one name no frame.
        let page = run.first;
        let owner = Owner { region, page };
        let mask = entry.mapped_mask() & !(1 << device.0);
        if !entry.owns_frame() || entry.device() != device {
            return;
        }
        match entry.state() {
            PageState::Duplicated => {
                Self::publish_same(region, Pages::one(page), Entry::SYSTEM.with_mapped_mask(mask), out);
                self.release(device, entry.frame(), 1, owner);
            }
            PageState::MovingHome => {
                let entry = entry.with_mapped_mask(mask).without_frame();
                finds.homecomings.push(Homecoming { region, page, entry, lost: true });
            }
            _ => {
                self.poison_page(region, page, entry, out);
                self.release(device, entry.frame(), 1, owner);
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "a page and what is known of it")]
    fn walk_rebuild(
        &mut self,
        device: DeviceId,
        rebuild: &mut Rebuild,
        (region, space): (RegionId, SpaceId),
        run: Pages,
        entry: Entry,
        finds: &mut Finds,
        out: &mut Vec<Action>,
    ) {
        // Pages that are more than one name no frame.
        let page = run.first;
        let mine = entry.owns_frame() && entry.device() == device;
        let table = &mut rebuild.table;
        let mut claim = || table.claim(entry.frame(), Owner { region, page }, space, entry.shared());
        let lost = mine && (rebuild.lost || !claim());
        let cleared = if rebuild.fresh_mappings { without_device(entry, 1 << device.0) } else { entry };
        if mine && entry.state() == PageState::MovingHome {
            let entry = if lost { cleared.without_frame() } else { cleared };
            if lost {
                Self::publish_same(region, Pages::one(page), entry, out);
            }
            // Unless a CPU fault came before the device, and it is on its way already.
            finds.homecomings.push(Homecoming { region, page, entry, lost });
        } else if mine && entry.discarded() && !lost {
            match finds.given_up.last_mut() {
                Some((of, run)) if *of == region && run.end() == page => run.count += 1,
                _ => finds.given_up.push((region, Pages::one(page))),
            }
        } else if lost && entry.state() == PageState::Duplicated {
            let system = Entry::SYSTEM.with_mapped_mask(cleared.mapped_mask());
            Self::publish_same(region, Pages::one(page), system, out);
        } else if lost {
            self.poison_page(region, page, entry, out);
        } else if cleared != entry {
            Self::publish_same(region, run, cleared, out);
        }
    }

    /// Transfers that a dead pager had begun: consecutive pages in consecutive frames go on together.
    fn finish_homecomings(&mut self, pages: &[Homecoming], out: &mut Vec<Action>) {
        let mut rest = pages;
        while let Some(first) = rest.first().copied() {
            let limit = rest.iter().take(CHUNK_PAGES as usize);
            let count = limit.enumerate().take_while(|(offset, next)| **next == first.plus(*offset)).count();
            rest = &rest[count..];
            let Homecoming { region, page, entry, lost } = first;
            // What dies is not brought home: the teardown takes the frames.
            if !self.is_dying(region) {
                let run = Pages { first: page, count: count as u64 };
                self.continue_home(region, run, entry, lost, out);
            }
        }
    }
}
