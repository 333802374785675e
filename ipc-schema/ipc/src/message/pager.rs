//! Pager interface. Clients own spaces and regions; drivers bring device memory; the mirror resolves device faults and carries
//! invalidations.

use super::Fd;

/// Where pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Device by id (its index in the plan).
    Device(u8),
    /// System memory.
    Home,
}

/// What became of a page in a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageStatus {
    /// Moved now.
    Moved,
    /// Was there already.
    AlreadyThere,
    /// Lost a race; try again.
    Busy,
    /// Pinned: stays.
    Pinned,
    /// Device full and nothing could be evicted.
    NoMemory,
    /// The copy failed; the page is valid where it was.
    Io,
    /// Lost with a device: accesses get SIGBUS.
    Poisoned,
    /// Unmapped meanwhile.
    Gone,
}

/// `page_count` neighbouring pages of one fate, beginning `first_page` pages after the start of the asked range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRun {
    /// Offset in pages from the start of the request.
    pub first_page: u64,
    /// Pages.
    pub page_count: u64,
    /// Their fate.
    pub status: PageStatus,
}

/// Where a page is, for residency queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Residency {
    /// Never touched; reads as zero.
    Absent,
    /// System memory.
    System,
    /// Device memory of this device.
    Device(u8),
    /// On its way.
    Moving,
    /// Lost.
    Poisoned,
}

/// Neighbouring pages of one residency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResidencyRun {
    /// Offset in pages from the start of the request.
    pub first_page: u64,
    /// Pages.
    pub page_count: u64,
    /// Where.
    pub residency: Residency,
    /// Pinned pages stay in system memory.
    pub pinned: bool,
    /// Bit d: device d maps the page now.
    pub mapped_mask: u8,
}

/// What a device page table entry shall point to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapKind {
    /// Consecutive frames of the device's memory, the first one here.
    Frame(u32),
    /// The system pages in place (the region's memfd at the same offset).
    System,
}

/// Device mappings to install. `first_page` counts from the start of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRun {
    /// Page index inside the region.
    pub first_page: u64,
    /// Pages.
    pub page_count: u64,
    /// Target.
    pub kind: MapKind,
    /// Device may write.
    pub writable: bool,
}

/// What the client says about a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Advice {
    /// Goes home and stays until `Unpin`.
    Pin,
    /// Ends `Pin`.
    Unpin,
    /// Devices map system pages in place instead of migrating on fault.
    InPlace,
    /// Ends `InPlace`: device faults migrate (the default).
    MigrateOnFault,
    /// Devices may only read.
    DeviceReadOnly,
    /// Ends `DeviceReadOnly`.
    DeviceReadWrite,
}

/// Requests to the pager. All are idempotent: targets are absolute, creations carry the client's own key.
#[derive(Clone, Debug)]
pub enum Call {
    /// Client: begin management of the calling process. The pager performs UFFDIO_API on the descriptor.
    OpenSpace {
        /// Chosen by the client; the same nonce from the same process finds the same space.
        nonce: u64,
        /// The process's userfaultfd (the client keeps a duplicate).
        uffd: Fd,
        /// Kernel-mode faults (system calls on migrated memory) are raised too.
        full: bool,
    },
    /// Client: same process, new connection.
    AttachSpace {
        /// Space.
        space: u64,
        /// From `SpaceOpened`.
        token: Vec<u8>,
    },
    /// Client: end of management; every region must have been freed.
    CloseSpace,
    /// Client: a range backed by `memory` from offset 0 (sealed SHRINK|GROW|SEAL, exactly `len_bytes`). Asking again for the same range finds the same region.
    CreateRegion {
        /// First address, page aligned.
        addr: u64,
        /// Bytes, a multiple of the page size.
        len_bytes: u64,
        /// The memfd.
        memory: Fd,
    },
    /// Client: forget the region and its content. Unmap after the reply.
    FreeRegion {
        /// Region.
        region: u64,
    },
    /// Client: move a range, page by page, partial success reported.
    Migrate {
        /// First address, page aligned.
        addr: u64,
        /// Bytes.
        len_bytes: u64,
        /// Where to.
        target: Target,
    },
    /// Client: where the pages are. Answers at most 2048 runs; ask again from where it ended.
    Query {
        /// First address, page aligned.
        addr: u64,
        /// Bytes.
        len_bytes: u64,
    },
    /// Client: advice.
    Advise {
        /// First address, page aligned.
        addr: u64,
        /// Bytes.
        len_bytes: u64,
        /// What.
        advice: Advice,
    },
    /// Driver: a device and its memory.
    DriverLogin {
        /// Device id from the plan.
        device: u8,
        /// Random number stored with the memory: another number means the memory is new and what was in it is lost.
        generation: u64,
        /// Size of device memory in pages.
        frame_count: u32,
        /// CPU-visible window onto all of device memory (sealed memfd). Without it the driver's copy engine moves the data.
        aperture: Option<Fd>,
        /// Where the device's threads say that they are inside (see `uhmm_ipc::shared::gate`): lets the pager revoke without a message.
        gate: Option<Fd>,
        /// Copy engine: ring memfd, submit eventfd, complete eventfd, staging memfd. Required without an aperture.
        copy_ring: Option<CopyRing>,
    },
    /// Driver: the device page table of one region, in shared memory, 8 bytes a page (see `uhmm_ipc::shared::table`).
    AttachTable {
        /// Space.
        space: u64,
        /// Region.
        region: u64,
        /// The memfd, sealed, `page_count * 8` bytes rounded up to a page.
        table: Fd,
    },
    /// Mirror: I carry invalidations now.
    MirrorLogin,
    /// Mirror: a driver wants to mirror a space; checks the client's token.
    OpenMirror {
        /// Space.
        space: u64,
        /// The client's token, passed on by the client to the driver.
        token: Vec<u8>,
        /// Device.
        device: u8,
    },
    /// Mirror: the driver does not need the space any more.
    CloseMirror {
        /// Space.
        space: u64,
        /// Device.
        device: u8,
    },
    /// Mirror: which region holds this address.
    Lookup {
        /// Space.
        space: u64,
        /// Any address.
        addr: u64,
    },
    /// Mirror: a device fault. `first_page` and `page_count` bound what may come along with `fault_page`.
    Resolve {
        /// Space.
        space: u64,
        /// Region.
        region: u64,
        /// First page that may be mapped.
        first_page: u64,
        /// How many.
        page_count: u64,
        /// The page that must be mapped.
        fault_page: u64,
        /// Device.
        device: u8,
        /// The access was a write.
        write: bool,
    },
    /// Mirror: answer to [`Event::Invalidate`].
    InvalidateDone {
        /// From the event.
        id: u64,
        /// Devices that did not acknowledge before the deadline (bit mask).
        late_mask: u8,
    },
    /// Operator: every region and how its pages are spread.
    ListRegions,
}

/// Copy engine rings of a driver without an aperture.
#[derive(Clone, Debug)]
pub struct CopyRing {
    /// Ring memory, both directions (see `uhmm_ipc::ring`).
    pub ring: Fd,
    /// Rung by the pager.
    pub submit: Fd,
    /// Rung by the driver.
    pub complete: Fd,
    /// Data area, sealed.
    pub staging: Fd,
}

/// Answers.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Nothing to say.
    Done,
    /// Answer to `OpenSpace`.
    SpaceOpened {
        /// Space id.
        space: u64,
        /// Proves ownership to drivers and after reconnects; 16 random bytes.
        token: Vec<u8>,
        /// Granted userfaultfd features.
        features: u64,
    },
    /// Answer to `CreateRegion`.
    RegionCreated {
        /// Region id.
        region: u64,
    },
    /// Answer to `Migrate`. At most 2048 runs; a more fragmented result merges its tail into a `Busy` run (ask again: targets are absolute).
    Migrated {
        /// Pages moved now.
        moved_pages: u64,
        /// Fate of every page.
        runs: Vec<StatusRun>,
    },
    /// Answer to `Query`.
    Residency {
        /// Runs from the start of the range.
        runs: Vec<ResidencyRun>,
    },
    /// Answer to `Lookup`.
    Region {
        /// Region id.
        region: u64,
        /// First address.
        addr: u64,
        /// Bytes.
        len_bytes: u64,
        /// Devices may not write.
        device_read_only: bool,
        /// The backing, granted to the driver for in-place mappings.
        memory: Fd,
    },
    /// Answer to `Resolve`: always covers the faulting page.
    Resolved {
        /// What to map.
        runs: Vec<MapRun>,
    },
    /// Answer to `ListRegions`.
    Regions(Vec<RegionStatus>),
}

/// One line of `uhmm status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionStatus {
    /// Space.
    pub space: u64,
    /// Client's pid.
    pub pid: u32,
    /// Region.
    pub region: u64,
    /// First address.
    pub addr: u64,
    /// Pages.
    pub page_count: u64,
    /// Pages in system memory.
    pub system_pages: u64,
    /// Pages never touched.
    pub absent_pages: u64,
    /// Pages on the move.
    pub moving_pages: u64,
    /// Lost pages.
    pub poisoned_pages: u64,
    /// Pages on each device, by device id.
    pub device_pages: Vec<u64>,
}

/// Downward events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// To the mirror: revoke these pages on these devices, answer with `InvalidateDone`. Absolute and repeatable.
    Invalidate {
        /// Echo it.
        id: u64,
        /// Space.
        space: u64,
        /// Region.
        region: u64,
        /// First page inside the region.
        first_page: u64,
        /// Pages.
        page_count: u64,
        /// Bit d: device d must acknowledge.
        device_mask: u8,
        /// The region is going away: drop its table too.
        unmap: bool,
        /// Time for the slowest device.
        deadline_ms: u32,
    },
    /// To the mirror: the device's process is dead, do not wait for it.
    DeviceVoid {
        /// Device.
        device: u8,
    },
    /// To the mirror: the client is gone.
    SpaceGone {
        /// Space.
        space: u64,
    },
}
