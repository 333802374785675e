//! What comes in and what goes out. Events are facts, actions are orders; both are plain data.

use crate::entry::Entry;

/// A run of pages inside a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pages {
    /// First page.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl Pages {
    /// One page.
    pub fn one(page: u64) -> Self {
        Self { first: page, count: 1 }
    }

    /// First page after the run.
    pub fn end(self) -> u64 {
        self.first + self.count
    }

    /// Whether the page is in the run.
    pub fn contains(self, page: u64) -> bool {
        (self.first..self.end()).contains(&page)
    }

    /// All pages.
    pub fn iter(self) -> std::ops::Range<u64> {
        self.first..self.end()
    }

    /// What is left after the first `count` pages.
    #[must_use]
    pub fn after(self, count: u64) -> Self {
        let count = count.min(self.count);
        Self { first: self.first + count, count: self.count - count }
    }
}

macro_rules! id {
    ($($(#[$doc:meta])* $name:ident($inner:ty);)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub $inner);
    )*};
}

id! {
    /// A region, named by the shell.
    RegionId(u64);
    /// A client process, named by the shell.
    SpaceId(u64);
    /// A device, below [`crate::DEVICE_COUNT_MAX`].
    DeviceId(u8);
    /// An action that will be answered by one event.
    Ticket(u64);
    /// A request that will be answered by one [`Action::Reply`].
    ReqId(u64);
}

/// Read access to the directories. The shell (or the simulator) applies [`Action::Publish`].
pub trait Directory {
    /// Raw entry of a page; pages or regions that do not exist read as zero.
    fn load(&self, region: RegionId, page: u64) -> u64;
    /// Pages of a region, zero when it does not exist.
    fn page_count(&self, region: RegionId) -> u64;
}

/// Where a migration goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Device memory.
    Device(DeviceId),
    /// System memory.
    Home,
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepResult {
    /// Done.
    Ok,
    /// Not now: an event of the address space is unread. The core tries again at the next [`Event::Tick`].
    Again,
    /// The process or the range is gone.
    Gone,
    /// It failed.
    Io,
}

/// Why a fill stopped before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillStop {
    /// See [`StepResult::Again`].
    Again,
    /// The next page is there already.
    Exists,
    /// The process is gone.
    NoProcess,
    /// The range is not registered any more.
    Gone,
    /// `Continue` met a hole.
    NoPage,
    /// The copy failed.
    Io,
}

/// Facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "field names are the fields' meaning; each variant is documented")]
pub enum Event {
    /// A driver logged in. `fresh_mappings`: a new incarnation, its old mappings are void. `memory_known`: it was used
    /// under an earlier pager, so free frames hold unknown bytes. `memory_lost`: the frames' content is gone.
    DeviceUp { device: DeviceId, frame_count: u32, fresh_mappings: bool, memory_known: bool, memory_lost: bool },
    /// The session is lost; the process may live on.
    DeviceDown { device: DeviceId },
    /// The process is dead: its mappings are void.
    DeviceVoid { device: DeviceId },
    /// It will not return and nobody else can reach its memory.
    DeviceFailed { device: DeviceId },
    /// A new region, all pages `Absent`.
    RegionAdded { region: RegionId, space: SpaceId, page_count: u64 },
    /// Give everything of the region back; ends with [`Action::DropRegion`].
    RegionFree { req: Option<ReqId>, region: RegionId },
    /// All regions of the space were dropped: what they left in device memory is scrubbed.
    SpaceGone { space: SpaceId },
    /// At start, for every region of the vault.
    RecoverRegion { region: RegionId, space: SpaceId, page_count: u64 },
    /// All regions are announced.
    Recovered,
    /// A CPU met a page. `wp`: write to a protected page. `minor`: the backing has the page, the page table does not.
    CpuFault { region: RegionId, page: u64, write: bool, wp: bool, minor: bool },
    /// The client unmapped part of a region: the content is gone.
    Unmapped { region: RegionId, pages: Pages },
    /// The client dropped page table entries (MADV_DONTNEED) or content (MADV_REMOVE) of system pages.
    Removed { region: RegionId, pages: Pages },
    /// Move, or prefetch.
    Migrate { req: ReqId, region: RegionId, pages: Pages, target: Target },
    /// A device fault: `fault_page` must be mapped, the rest of `pages` may come along.
    Resolve { req: ReqId, region: RegionId, pages: Pages, fault_page: u64, device: DeviceId, write: bool },
    /// Bring home and keep there, or allow migration again.
    Pin { req: ReqId, region: RegionId, pages: Pages, on: bool },
    /// Answer to [`Action::WriteProtect`].
    WpDone { ticket: Ticket, result: StepResult },
    /// Answer to [`Action::Revoke`].
    RevokeDone { ticket: Ticket, result: StepResult },
    /// Answer to [`Action::CopyOut`].
    CopyDone { ticket: Ticket, result: StepResult },
    /// Answer to [`Action::ZeroFrames`].
    ZeroDone { ticket: Ticket, result: StepResult },
    /// Answer to [`Action::Punch`].
    PunchDone { ticket: Ticket, result: StepResult },
    /// Answer to [`Action::Scrub`].
    ScrubDone { ticket: Ticket, result: StepResult },
    /// Answer to [`Action::Fill`].
    FillDone { ticket: Ticket, done_pages: u64, stop: Option<FillStop> },
    /// Answer to [`Action::ZeroFill`] and [`Action::Continue`].
    CpuFillDone { ticket: Ticket, done_pages: u64, stop: Option<FillStop> },
    /// Go on with background work: at most one chunk.
    Tick,
}

/// Entries of a run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryRun {
    /// All the same.
    Same {
        /// The entry.
        entry: Entry,
        /// Pages.
        count: u64,
    },
    /// Consecutive frames.
    Frames {
        /// The first page's entry.
        entry_of_first: Entry,
        /// Pages.
        count: u64,
    },
}

impl EntryRun {
    /// Entry by entry.
    pub fn iter(self) -> impl Iterator<Item = Entry> {
        let (first, count, step) = match self {
            Self::Same { entry, count } => (entry, count, 0),
            Self::Frames { entry_of_first, count } => (entry_of_first, count, 1),
        };
        (0..count).map(move |index| first.plus_frames(index as u32 * step))
    }
}

/// Orders. Those with a ticket are answered by one event.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "field names are the fields' meaning; each variant is documented")]
pub enum Action {
    /// Store entries.
    Publish { region: RegionId, first: u64, entries: EntryRun },
    /// Protect against CPU writes, or allow them again (which wakes).
    WriteProtect { ticket: Ticket, region: RegionId, pages: Pages, on: bool },
    /// Remove the system pages, for every process.
    Punch { ticket: Ticket, region: RegionId, pages: Pages },
    /// Let waiting CPU accesses fault again.
    Wake { region: RegionId, pages: Pages },
    /// Accesses shall get SIGBUS.
    Poison { region: RegionId, pages: Pages },
    /// Remove device mappings; done when the devices have stopped using them.
    Revoke { ticket: Ticket, region: RegionId, pages: Pages, devices: u8 },
    /// System pages to consecutive frames.
    CopyOut { ticket: Ticket, region: RegionId, pages: Pages, device: DeviceId, frame: u32, req: ReqId },
    /// Zero frames.
    ZeroFrames { ticket: Ticket, device: DeviceId, frame: u32, count: u32 },
    /// Zero free frames, (first, count) each.
    Scrub { ticket: Ticket, device: DeviceId, runs: Vec<(u32, u32)> },
    /// Consecutive frames to pages that the CPU sees at once.
    Fill { ticket: Ticket, region: RegionId, pages: Pages, device: DeviceId, frame: u32 },
    /// Zero pages for the CPU.
    ZeroFill { ticket: Ticket, region: RegionId, pages: Pages },
    /// Map what the backing has.
    Continue { ticket: Ticket, region: RegionId, pages: Pages },
    /// A request is finished.
    Reply { req: ReqId, outcome: Outcome },
    /// The region owns nothing any more.
    DropRegion { region: RegionId },
}

/// Fate of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageStatus {
    /// Moved now.
    Ok,
    /// Was there.
    AlreadyThere,
    /// Lost a race.
    Busy,
    /// Pinned.
    Pinned,
    /// No frame and nothing to evict.
    NoMemory,
    /// Copy failed; valid where it was.
    Io,
    /// Lost.
    Poisoned,
    /// Unmapped.
    Gone,
}

/// Neighbours of one fate; `first` counts from the region's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRun {
    /// First page.
    pub first: u64,
    /// Pages.
    pub count: u64,
    /// Fate.
    pub status: PageStatus,
}

/// What a device page table entry points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapKind {
    /// Consecutive frames from here.
    Frame(u32),
    /// The system pages in place.
    System,
}

/// Mappings to install; `first` counts from the region's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRun {
    /// First page.
    pub first: u64,
    /// Pages.
    pub count: u64,
    /// Target.
    pub kind: MapKind,
    /// May be written.
    pub writable: bool,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answer to [`Event::Migrate`].
    Migrated {
        /// Every page's fate.
        runs: Vec<StatusRun>,
        /// Pages that moved because of this request.
        moved_pages: u64,
    },
    /// Answer to [`Event::Resolve`].
    Resolved {
        /// What to map.
        runs: Vec<MapRun>,
    },
    /// Answer to the others.
    Done,
    /// It could not be done at all.
    Failed(CoreError),
}

/// Why a request failed as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CoreError {
    /// Unknown or going away.
    #[error("Region {region} does not exist")]
    NoSuchRegion {
        /// Region.
        region: u64,
    },
    /// Pages outside the region.
    #[error("Pages {first}+{count} leave the region of {page_count} pages")]
    OutOfRange {
        /// First page.
        first: u64,
        /// Pages.
        count: u64,
        /// What there is.
        page_count: u64,
    },
    /// The faulting page is lost.
    #[error("Page {page} was lost with its device")]
    Poisoned {
        /// Page.
        page: u64,
    },
    /// The faulting page could not be moved.
    #[error("Page {page} could not be copied")]
    Io {
        /// Page.
        page: u64,
    },
}
