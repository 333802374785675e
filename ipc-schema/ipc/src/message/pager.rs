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
    /// Device memory, and no CPU and no other device may look without taking it back (atomics).
    Exclusive(u8),
    /// System memory, with a read-only copy on this device.
    Duplicated(u8),
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
    /// Part of 512 aligned pages in 512 consecutive, aligned frames.
    pub huge: bool,
    /// On a device, and the program reaches it there: a CPU access does not bring it home.
    pub coherent: bool,
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

/// How a device may use pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessMode {
    /// A device fault moves the page to the device (the default).
    Migrate,
    /// A device fault maps the page where it is, if the device can reach it there; else it moves.
    InPlace,
    /// The device may not use the page: its faults end with EPERM.
    None,
}

/// What the client says about a range. The same value again changes nothing and invalidates nothing.
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
    /// What one device may do. `InPlace` and `MigrateOnFault` set it for all devices.
    Access {
        /// Device.
        device: u8,
        /// How.
        mode: AccessMode,
    },
    /// Where the pages shall live if nobody has a better claim; `None`: nowhere in particular (the default).
    PreferredLocation(Option<Target>),
    /// Mostly read: reading devices get a copy and the system page stays valid; the first write collapses the copies.
    ReadMostly(bool),
    /// One CPU fault brings home an aligned block of 2^n pages; 0..=63. `None`: adaptive (the default).
    Granularity(Option<u8>),
}

/// 2 MiB of addresses that a device has used lately.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HotRange {
    /// First address, a multiple of 2 MiB.
    pub addr: u64,
    /// Share of its pages that the device uses in a period of 100 ms, on an average that halves with every period: 1000 is every
    /// page in every period, 1 is the least that is told.
    pub heat_permille: u16,
}

/// What was advised for neighbouring pages, and where they were prefetched to last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attributes {
    /// See [`Advice::PreferredLocation`].
    pub preferred: Option<Target>,
    /// Target of the last `Migrate` with `prefetch`.
    pub prefetched: Option<Target>,
    /// Bit d: device d maps in place.
    pub in_place_mask: u8,
    /// Bit d: device d may not use the pages.
    pub no_access_mask: u8,
    /// See [`Advice::ReadMostly`].
    pub read_mostly: bool,
    /// See [`Advice::DeviceReadOnly`].
    pub device_read_only: bool,
    /// See [`Advice::Granularity`].
    pub granularity_log2_pages: Option<u8>,
    /// See [`Advice::Pin`].
    pub pinned: bool,
}

/// Neighbouring pages of the same attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttributeRun {
    /// Offset in pages from the start of the request.
    pub first_page: u64,
    /// Pages.
    pub page_count: u64,
    /// What holds for them.
    pub attributes: Attributes,
}

/// What the test hook makes fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultPoint {
    /// Allocation of device frames for a run of 512 pages (a huge page): small runs are tried instead.
    HugeFrames,
    /// Allocation of device frames.
    Frames,
    /// Copy to a device.
    CopyOut,
    /// Copy to system memory.
    CopyHome,
}

/// What the client's agent is asked to do: what Linux lets only the process itself do. All are absolute and repeatable: the pager
/// asks again after a restart. The agent does them one after the other and answers each with [`Call::AgentDone`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AgentOp {
    /// Take private pages out of the address space (UFFDIO_MOVE to scratch memory) and copy them to the staging slot, page i to
    /// offset i. Pages that cannot be taken stay; so do all pages of a mapping without write permission (answer `ReadOnly`).
    MoveOut {
        /// Staging slot of 512 pages.
        slot: u32,
    },
    /// Copy pages to the staging slot and leave them where they are: the pager has write-protected them.
    CopyOut {
        /// Staging slot of 512 pages.
        slot: u32,
    },
    /// The copies are valid elsewhere: give back the scratch pages of `MoveOut`, and with `in_place` the pages that `CopyOut`
    /// left in the address space (MADV_DONTNEED).
    Drop {
        /// See above.
        in_place: bool,
    },
    /// Put the scratch pages of `MoveOut` back where they were. Pages that are not in scratch are where they belong.
    MoveBack,
    /// Bring 512 pages home as one huge page: scratch huge page, copy from the staging slot, UFFDIO_MOVE. Answer `Moved`, or
    /// `Failed` when there is no huge page or the range is not one (the pager then fills small pages).
    FillHuge {
        /// Staging slot of 512 pages.
        slot: u32,
    },
    /// Tell which pages exist in the address space: `Moved` for those that do, `Zero` for holes.
    Probe,
    /// Map frames of a coherent device over the pages of an allocated region. Answer `Moved` when all of them are, else `Failed`.
    MapDevice {
        /// Device.
        device: u8,
        /// Frame of the first page.
        frame: u32,
        /// Of the device's memory: what was given with the queue is no good when it is another.
        generation: u64,
    },
    /// Map the region's own memory again, watched by the pager. `Moved` when no page is a frame any more, `Failed`: ask again.
    UnmapDevice,
}

/// What became of pages under an [`AgentOp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AgentStatus {
    /// Done; for `MoveOut` and `CopyOut` the bytes are in the staging slot.
    Moved,
    /// As `Moved`, and part of a page that was mapped huge.
    MovedHuge,
    /// Nothing but zeros (a hole or the zero page): taken out, nothing in the staging slot.
    Zero,
    /// Pinned, or shared copy-on-write and not separable: stays where it is.
    Busy,
    /// No mapping there.
    Gone,
    /// The mapping may not be written: nothing was done, ask for `CopyOut` under write protection.
    ReadOnly,
    /// It failed for another reason; pages are where they were.
    Failed,
}

/// Neighbouring pages of one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgentRun {
    /// Pages.
    pub page_count: u64,
    /// What became of them.
    pub status: AgentStatus,
}

/// Memory of the agent that the pager works with. Kept in the vault.
#[derive(Clone, Debug)]
pub struct AgentMemory {
    /// /proc/self/maps of the client, opened by the client: PROCMAP_QUERY works on it without any right over the process.
    pub maps: Fd,
    /// Staging memory, sealed: some slots of 2 MiB, and [`DIARY_BYTES`] behind them.
    pub staging: Fd,
}

/// The agent's diary, at the end of its staging memory: the ranges that it last began to drop with madvise. The event of that names no
/// author, and a new pager must not take it for the program's. [`DIARY_ENTRIES`] times two words, first byte and end.
pub const DIARY_BYTES: u64 = 4096;
/// The agent is never more than one ahead of the event that is being dealt with: madvise returns when its event is read.
pub const DIARY_ENTRIES: u64 = 8;

/// What happened, for profilers. Kept in a ring of the last 4096 a space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TraceKind {
    /// Pages begin to move.
    MigrateStart,
    /// They have moved (or stay; `page_count` is what moved).
    MigrateEnd,
    /// Devices lost their mappings.
    Invalidate,
    /// A fault was answered by waiting: the block thrashes.
    Throttle,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TraceCause {
    /// A client asked.
    Prefetch,
    /// A CPU fault.
    CpuFault,
    /// A device fault.
    DeviceFault,
    /// A device was full.
    Eviction,
    /// The address space changed (unmap, remap, fork, protection).
    AddressSpace,
}

/// One entry of the trace ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceRecord {
    /// Counts up by one; starts again at 1 with each pager incarnation.
    pub sequence: u64,
    /// Nanoseconds of CLOCK_MONOTONIC.
    pub time_ns: u64,
    /// What.
    pub kind: TraceKind,
    /// Why.
    pub cause: TraceCause,
    /// First address.
    pub addr: u64,
    /// Pages.
    pub page_count: u64,
    /// Where from.
    pub from: Target,
    /// Where to.
    pub to: Target,
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
        /// An empty private page of the client that it never touches. The pager registers it; a forked child that reads it
        /// finds its own space id (8 bytes, little endian) and token (16 bytes) there.
        sentinel_addr: u64,
        /// For private memory.
        agent: AgentMemory,
    },
    /// Client: same process, new connection. A forked child's first call: with `agent`, once.
    AttachSpace {
        /// Space.
        space: u64,
        /// From `SpaceOpened`, or from the sentinel page.
        token: Vec<u8>,
        /// A forked child's own; `None` when the pager has it.
        agent: Option<AgentMemory>,
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
    /// Client: private anonymous memory that exists already, in place. Asking again for the same range finds the same region.
    AdoptRegion {
        /// First address, page aligned.
        addr: u64,
        /// Bytes, a multiple of the page size.
        len_bytes: u64,
    },
    /// Client: a shared mapping of a file, or shared anonymous memory: devices use it in place, it never migrates.
    AttachFile {
        /// First address, page aligned.
        addr: u64,
        /// Bytes, a multiple of the page size.
        len_bytes: u64,
        /// The file, opened for what devices may do (read, or read and write).
        file: Fd,
        /// Offset in the file of `addr`.
        offset_bytes: u64,
    },
    /// Client: forget the region and its content. Unmap after the reply.
    FreeRegion {
        /// Region.
        region: u64,
    },
    /// Client: end of management of part of an adopted or attached region: its pages come home first and stay.
    ReleaseRange {
        /// First address, page aligned.
        addr: u64,
        /// Bytes.
        len_bytes: u64,
    },
    /// Client: the content is not needed any more: reads as zero from now on. For shared memory; private memory is discarded
    /// with madvise(MADV_DONTNEED), which the pager sees.
    Discard {
        /// First address, page aligned.
        addr: u64,
        /// Bytes.
        len_bytes: u64,
    },
    /// Client: mprotect was called on the range. Answers when no device uses the range under the old protection.
    ProtectionChanged {
        /// First address, page aligned.
        addr: u64,
        /// Bytes.
        len_bytes: u64,
    },
    /// Client: bring pages of the caller's space home from a device, coldest first.
    Evict {
        /// Device.
        device: u8,
        /// How many; 0: all.
        page_count: u64,
    },
    /// Client: what was advised. Answers at most 2048 runs; ask again from where it ended.
    QueryAttributes {
        /// First address, page aligned.
        addr: u64,
        /// Bytes.
        len_bytes: u64,
    },
    /// Client: what a device has used lately of the caller's memory. Watching begins with the first call; it ends some seconds after
    /// the last one. NotFound: no such device, or one whose page table the pager cannot read.
    HotRanges {
        /// Device.
        device: u8,
    },
    /// Client: the trace ring from a sequence number on (0: all there is), at most 256 records.
    ReadTrace {
        /// First sequence number wanted.
        since: u64,
    },
    /// Client: test hook, refused unless the manifest says `fault_injection = true`: the n-th from now (1: the next one) of the
    /// caller's space fails; 0 disarms.
    Inject {
        /// What.
        point: FaultPoint,
        /// Which one.
        nth: u32,
    },
    /// Client's agent: answer to [`Event::Agent`].
    AgentDone {
        /// From the event.
        id: u64,
        /// What became of the pages, from the first one on.
        runs: Vec<AgentRun>,
    },
    /// Client: move a range, page by page, partial success reported.
    Migrate {
        /// First address, page aligned.
        addr: u64,
        /// Bytes.
        len_bytes: u64,
        /// Where to.
        target: Target,
        /// Note the target as the pages' last prefetch location.
        prefetch: bool,
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
        /// Answer when the whole window from `fault_page` on is mapped, or as much of it as can be: a range fault.
        whole: bool,
        /// The pages become the device's alone (atomics); implies `write` and migration.
        exclusive: bool,
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
    /// Answer to a forked child's first `AttachSpace`.
    ChildAttached {
        /// The child's own userfaultfd, which the kernel gave to the pager: its agent needs it, and it must not be closed.
        uffd: Fd,
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
        memory: Memory,
    },
    /// Answer to `Resolve`: always covers the faulting page.
    Resolved {
        /// What to map.
        runs: Vec<MapRun>,
    },
    /// Answer to `QueryAttributes`.
    Attributes {
        /// Runs from the start of the range.
        runs: Vec<AttributeRun>,
    },
    /// Answer to `HotRanges`.
    HotRanges {
        /// Hottest first; at most 2048.
        ranges: Vec<HotRange>,
    },
    /// Answer to `ReadTrace`.
    Trace {
        /// In order; empty when there is nothing newer.
        records: Vec<TraceRecord>,
    },
    /// Answer to `Evict`.
    Evicted {
        /// Pages that came home.
        page_count: u64,
    },
    /// Answer to `ListRegions`.
    Regions(Vec<RegionStatus>),
}

/// What a region's system pages are, for devices.
#[derive(Clone, Debug)]
pub enum Memory {
    /// Private pages of the client: nobody else can reach them, so they always move.
    Private,
    /// A memfd that can neither shrink nor grow: may be mapped.
    Sealed {
        /// The memfd.
        memory: Fd,
        /// Offset of the region's first page.
        offset_bytes: u64,
    },
    /// Any other file: it may shrink at any time, so it is read and written with pread and pwrite, never mapped.
    File {
        /// The file.
        file: Fd,
        /// Offset of the region's first page.
        offset_bytes: u64,
    },
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
    /// To the client's agent: do this, answer with `AgentDone`.
    Agent {
        /// Echo it.
        id: u64,
        /// Region: with the page, the agent's name for what it holds in scratch.
        region: u64,
        /// First page inside the region.
        first_page: u64,
        /// Address of that page now.
        addr: u64,
        /// Pages, at most 512.
        page_count: u64,
        /// What.
        op: AgentOp,
    },
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
