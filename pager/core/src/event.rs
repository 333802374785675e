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

    /// What both have.
    pub fn overlap(self, other: Self) -> Option<Self> {
        let first = self.first.max(other.first);
        let end = self.end().min(other.end());
        (first < end).then(|| Self { first, count: end - first })
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

/// What a region's system pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A memfd: the pager reads, fills and punches it; every mapping of it shows the same page.
    Shared,
    /// Anonymous memory of one process: only its agent can take pages out ([`Action::CopyOut`] moves them away).
    Private,
    /// A file that somebody else keeps: always `System`, used in place, never migrated, never filled.
    File,
}

/// Read access to the directories. The shell (or the simulator) applies [`Action::Publish`].
pub trait Directory {
    /// What was advised for a page, see [`crate::Attr`]. The shell stores it when the client advises.
    fn attr(&self, region: RegionId, page: u64) -> crate::Attr;
    /// First page of the region whose address is a multiple of 2 MiB (0..512).
    fn huge_phase(&self, region: RegionId) -> u64;
    /// Raw entry of a page; pages or regions that do not exist read as zero.
    fn load(&self, region: RegionId, page: u64) -> u64;
    /// How many pages from this one on certainly have the same entry: at least one. The shell knows it of what was never written, or only
    /// as a whole: that is what makes large untouched memory cost nothing. Entries that are alike name no frame.
    fn alike(&self, region: RegionId, page: u64) -> u64;
    /// Both at once: who walks over all pages asks once a page.
    fn look(&self, region: RegionId, page: u64) -> (u64, u64) {
        (self.alike(region, page), self.load(region, page))
    }
    /// Pages of a region, zero when it does not exist.
    fn page_count(&self, region: RegionId) -> u64;
    /// Whether the device used the page since this (or [`Event::Used`]) told so last: the mark is taken away. Asked by eviction
    /// only, see [`crate::SECOND_CHANCES_MAX`]. False where nobody can tell.
    fn take_used(&self, region: RegionId, page: u64, device: DeviceId) -> bool;
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
    /// Not now (no memory, as a rule), and nobody tells when: later, and ever later.
    Later,
}

/// Why a fill stopped before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillStop {
    /// See [`StepResult::Again`].
    Again,
    /// The client may have no more memory (the limit of a control group): later, and ever later.
    NoMemory,
    /// The next page is there already.
    Exists,
    /// The process is gone.
    NoProcess,
    /// The range is not registered any more.
    Gone,
    /// The content of the next pages is not wanted any more, and no event has said so: the program has put guards there, or
    /// something else.
    Dropped {
        /// How many.
        page_count: u64,
    },
    /// `Continue` met a hole.
    NoPage,
    /// The copy failed.
    Io,
    /// The device has the next pages no more, however often it is asked; it goes on working.
    Lost {
        /// How many.
        page_count: u64,
    },
    /// `FillHuge` found no huge page, or the place is not one: fill small pages.
    NotHuge,
}

/// How the copy of neighbouring private pages ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyRun {
    /// Pages.
    pub count: u64,
    /// What became of them.
    pub status: CopyStatus,
}

/// See [`CopyRun`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyStatus {
    /// In the frames. (Nothing but zeros counts too: the shell has zeroed the frames.)
    Ok,
    /// As `Ok`, and the page was part of one that was mapped huge.
    OkHuge,
    /// Pinned, or shared and not separable: stays where it is.
    Busy,
    /// Unmapped meanwhile.
    Gone,
    /// Locked, and the process may not lock more: stays where it is.
    Locked,
    /// The system has no memory for the way out: stays where it is.
    NoMemory,
    /// The copy failed; in scratch or where it was.
    Io,
    /// Nobody wants it on the device any more: it goes back from scratch.
    Kept,
}

/// Facts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "field names are the fields' meaning; each variant is documented")]
pub enum Event {
    /// A driver logged in. `fresh_mappings`: a new incarnation, its old mappings are void. `memory_known`: it was used
    /// under an earlier pager, so free frames hold unknown bytes. `memory_lost`: the frames' content is gone. `coherent`: the program
    /// may map frames itself.
    DeviceUp {
        device: DeviceId,
        frame_count: u32,
        fresh_mappings: bool,
        memory_known: bool,
        memory_lost: bool,
        coherent: bool,
    },
    /// The session is lost; the process may live on.
    DeviceDown { device: DeviceId },
    /// The process is dead: its mappings are void.
    DeviceVoid { device: DeviceId },
    /// It will not return and nobody else can reach its memory.
    DeviceFailed { device: DeviceId },
    /// A new region; its entries are in the directory (`Absent`, or `System` for memory that existed before).
    RegionAdded { region: RegionId, space: SpaceId, page_count: u64, backing: Backing },
    /// Give everything of the region back; ends with [`Action::DropRegion`].
    RegionFree { req: Option<ReqId>, region: RegionId },
    /// The space is of a group whose spaces have so many frames together, at most; told before its first region. Groups begin with 1.
    SpaceGroup { space: SpaceId, group: u16, limit_pages: u64 },
    /// Of that, at most so many on one device.
    GroupOnDevice { group: u16, device: DeviceId, limit_pages: u64 },
    /// All regions of the space were dropped: what they left in device memory is scrubbed.
    SpaceGone { space: SpaceId },
    /// At start, for every region of the vault. `strays`: pages of a private one that may be in the address space although their
    /// entries say that they are on a device, and pages on their way home of which what is there was being taken away. What is not
    /// named is known to be gone from there. What takes long goes on with every [`Event::Tick`].
    RecoverRegion { region: RegionId, space: SpaceId, page_count: u64, backing: Backing, strays: Vec<Pages> },
    /// All that is left to do for this region after a pager's death, at once: the shell is told so by [`crate::Core::first`].
    RecoverNow { region: RegionId },
    /// The process forked. `child` is a new region of a new space, as large as `parent`, all entries `Absent`: the core publishes
    /// the child's entries, revokes what devices may write, and says [`Action::ForkReady`]. Private regions only.
    Forked { parent: RegionId, child: RegionId, space: SpaceId },
    /// A pager died between `Forked` and `ForkReady`: the child's entries are complete, and what devices may write of the parent's is
    /// revoked again, then [`Action::ForkReady`] names the child. `child` need not be a clone of `parent` itself.
    ForkedBefore { parent: RegionId, child: RegionId },
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
    /// The same of some of the pages; the others stay where they are.
    MigrateOnly { req: ReqId, region: RegionId, pages: Pages, target: Target, only: Only },
    /// A device fault: `fault_page` must be mapped, the rest of `pages` may come along.
    /// `whole`: answer when everything from `fault_page` on is mapped, or as much as can be. `exclusive`: the device's alone.
    Resolve {
        req: ReqId,
        region: RegionId,
        pages: Pages,
        fault_page: u64,
        device: DeviceId,
        write: bool,
        whole: bool,
        exclusive: bool,
    },
    /// Content is not needed any more: the pages become `Absent`, frames are freed. Answered with [`Outcome::Done`].
    Discard { req: ReqId, region: RegionId, pages: Pages },
    /// Take mappings away from these devices (protection or advice changed); what lives on a device stays there.
    RevokeMappings { req: ReqId, region: RegionId, pages: Pages, devices: u8 },
    /// Bring pages of the space home from a device, coldest first; 0: all. Answered with [`Outcome::Migrated`] without runs.
    Evict { req: ReqId, space: SpaceId, device: DeviceId, page_count: u64 },
    /// The device has used these pages lately: they are not the next ones that must make room.
    Used { region: RegionId, pages: Pages, device: DeviceId },
    /// Test hook: the n-th allocation for the space from now on fails (1: the next one, 0: disarm).
    InjectAllocation { space: SpaceId, huge: bool, nth: u32 },
    /// Bring home and keep there, or allow migration again.
    Pin { req: ReqId, region: RegionId, pages: Pages, on: bool },
    /// Answer to [`Action::WriteProtect`].
    WpDone { ticket: Ticket, result: StepResult },
    /// Answer to [`Action::Revoke`].
    RevokeDone { ticket: Ticket, result: StepResult },
    /// Answer to [`Action::MapCpu`].
    CpuMapped { ticket: Ticket, result: StepResult },
    /// Answer to [`Action::CopyOut`] of shared pages and to [`Action::CopyAcross`].
    CopyDone { ticket: Ticket, result: StepResult },
    /// Answer to [`Action::CopyOut`] of private pages; the runs cover the pages from the first one on.
    CopiedRuns { ticket: Ticket, runs: Vec<CopyRun> },
    /// Answer to [`Action::MoveBack`].
    MoveBackDone { ticket: Ticket, result: StepResult },
    /// Answer to [`Action::ZeroFrames`].
    ZeroDone { ticket: Ticket, result: StepResult },
    /// Answer to [`Action::Punch`].
    PunchDone { ticket: Ticket, result: StepResult },
    /// Another answer to [`Action::Punch`] of private pages: nobody can, and these are still in the address space, as they were when they
    /// were copied.
    NotPunched { ticket: Ticket, left: Vec<Pages> },
    /// Answer to [`Action::PoisonLost`].
    PoisonDone { ticket: Ticket, result: StepResult },
    /// Answer to [`Action::Scrub`].
    ScrubDone { ticket: Ticket, result: StepResult },
    /// Answer to [`Action::Fill`] and [`Action::FillHuge`].
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
    /// Remove the system pages, for every process. Private: scratch pages are given back.
    Punch { ticket: Ticket, region: RegionId, pages: Pages },
    /// Let waiting CPU accesses fault again.
    Wake { region: RegionId, pages: Pages },
    /// Accesses shall get SIGBUS. The entries say that the pages are lost, so whoever is not kept from them faults, and it is said again.
    Poison { region: RegionId, pages: Pages },
    /// The same where no page is, and done when it is answered: no entry will say it.
    PoisonLost { ticket: Ticket, region: RegionId, pages: Pages },
    /// Remove mappings of devices, and with [`CPU`](crate::CPU) the program's mapping of frames; done when nobody uses them any more.
    Revoke { ticket: Ticket, region: RegionId, pages: Pages, devices: u16 },
    /// Show the program consecutive frames at the pages' addresses. Repeatable; not before every earlier `Revoke` of them is done.
    MapCpu { ticket: Ticket, region: RegionId, pages: Pages, device: DeviceId, frame: u32 },
    /// System pages to consecutive frames. Private pages are taken out of the address space first, unless `keep`: then they are
    /// write-protected already and stay (read-mostly copies).
    CopyOut { ticket: Ticket, region: RegionId, pages: Pages, device: DeviceId, frame: u32, keep: bool, req: ReqId },
    /// Frames of one device to frames of another.
    CopyAcross { ticket: Ticket, from: DeviceId, from_frame: u32, to: DeviceId, frame: u32, count: u32 },
    /// Private pages that `CopyOut` has taken out go back where they were; those that were not taken are there already.
    MoveBack { ticket: Ticket, region: RegionId, pages: Pages },
    /// Zero frames.
    ZeroFrames { ticket: Ticket, device: DeviceId, frame: u32, count: u32 },
    /// Zero free frames, (first, count) each.
    Scrub { ticket: Ticket, device: DeviceId, runs: Vec<(u32, u32)> },
    /// Consecutive frames to pages that the CPU sees at once.
    Fill { ticket: Ticket, region: RegionId, pages: Pages, device: DeviceId, frame: u32 },
    /// As `Fill`, 512 aligned private pages from 512 frames, as one huge page.
    FillHuge { ticket: Ticket, region: RegionId, pages: Pages, device: DeviceId, frame: u32 },
    /// Zero pages for the CPU.
    ZeroFill { ticket: Ticket, region: RegionId, pages: Pages },
    /// Map what the backing has. Private: only tells whether the first page exists (`Exists` or `NoPage`).
    Continue { ticket: Ticket, region: RegionId, pages: Pages },
    /// A request is finished.
    Reply { req: ReqId, outcome: Outcome },
    /// The region owns nothing any more.
    DropRegion { region: RegionId },
    /// The entries of a forked child's region are complete and nobody writes what it shares: serve its faults.
    ForkReady { region: RegionId },
    /// For the trace ring.
    /// `req`: the request that has begun it, or 0.
    Trace { kind: TraceKind, cause: Cause, req: ReqId, region: RegionId, pages: Pages, from: Target, to: Target },
}

/// What a trace record tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceKind {
    /// A transfer begins.
    MigrateStart,
    /// It ended; `pages` is what moved.
    MigrateEnd,
    /// Devices lose mappings.
    Invalidate,
    /// A device fault waits because its block thrashes.
    Throttle,
}

/// Why something moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A client asked.
    Prefetch,
    /// A CPU fault.
    CpuFault,
    /// A device fault.
    DeviceFault,
    /// A device was full.
    Eviction,
    /// The address space changed.
    AddressSpace,
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
    /// It was not to move.
    NotSelected,
}

/// Which pages are to move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Only {
    /// All.
    #[default]
    All,
    /// Those in system memory.
    InSystem,
    /// Those on this device.
    OnDevice(DeviceId),
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
    /// The faulting page was unmapped.
    #[error("Page {page} is not mapped any more")]
    Gone {
        /// Page.
        page: u64,
    },
    /// The page cannot leave system memory (pinned, or its owner keeps it) and the device cannot reach it there.
    #[error("Page {page} is pinned or busy and the device cannot reach it in place: try again, or unpin it")]
    Busy {
        /// Page.
        page: u64,
    },
    /// The device is full (or the program has all that it may have) and cannot reach the page in place.
    #[error(
        "Page {page} finds no room on the device: it is full, or what the manifest gives this client is used up          (device_memory_bytes of its [[client]] rule)"
    )]
    NoMemory {
        /// Page.
        page: u64,
    },
    /// No such device, or it never logged in.
    #[error("Device {device} is not there")]
    NoSuchDevice {
        /// Device.
        device: u8,
    },
    /// The pages are a file's: devices use them in place.
    #[error("Region {region} shows a file: devices use it in place and it never migrates")]
    NotMigratable {
        /// Region.
        region: u64,
    },
    /// The device may not use the page.
    #[error("Page {page} is not accessible to the device by advice")]
    NoAccess {
        /// Page.
        page: u64,
    },
}
