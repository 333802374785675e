//! Pager interface. Clients own spaces and regions; drivers bring device memory; the mirror resolves device faults and carries
//! invalidations.

pub use super::agent::*;
pub use super::claims::*;
pub use super::policy::*;
pub use super::traces::*;
use super::{Aperture, Fd};

/// Where pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Device by id (its index in the plan).
    Device(u8),
    /// System memory.
    Home,
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
        /// Token of the claim that it uses; empty: none, and the manifest's rules hold.
        claim: Vec<u8>,
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
    /// Client: a device is about to be given work on the range (no length: anywhere). Answers when no device uses any of it in a way that
    /// the kernel does not allow the program itself now: after mprotect, shmdt and whatever else no event tells of.
    Revalidate {
        /// First address, page aligned.
        addr: u64,
        /// Bytes; 0: the whole space.
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
    /// Client: answer to [`Event::Frames`].
    FramesDone {
        /// From the event.
        id: u64,
        /// All pages of the order are as it says.
        done: bool,
    },
    /// Client: its agent has ended, and another one carries out the orders from now on, beginning with what was not answered.
    AgentStarted {
        /// See [`AgentMemory::agent`].
        agent: Option<Fd>,
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
        /// The others stay where they are.
        only: Only,
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
        /// CPU-visible window onto all of device memory. Without it the driver's copy engine moves the data.
        aperture: Option<Aperture>,
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
    /// Driver: the device is being taken away, which lasts until nobody has it mapped. Answered after the pager has let go of an aperture that is the device's
    /// own; the driver ends then. Its pages wait for the next incarnation, and are poisoned when the supervisor holds the service.
    DeviceLost {
        /// Device id from the plan.
        device: u8,
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
    /// Every page of a process comes home; answered with `Evicted` when all that can be are. `stay`: none leaves again until it is said otherwise;
    /// device faults wait until then. An operator names the process, a client means its own space.
    Home {
        /// Process; 0: the caller's own space.
        pid: u32,
        /// Begin, or end.
        stay: bool,
        /// What the process is called everywhere, if the operator knows; its number is another one in another pid namespace. 0: not known.
        process: u64,
    },
    /// A client that may not make a userfaultfd for kernel-mode faults by itself asks for the open device that makes one.
    UserfaultfdDevice,
    /// Operator: every page of every process comes home from a device, as before it is taken away. Answered with `Evicted`.
    EmptyDevice {
        /// Device.
        device: u8,
        /// Whether pages may come again.
        then: Emptied,
    },
    /// Operator: every region and how its pages are spread.
    ListRegions,
    /// Operator: where a region's pages are, in cells of equal size. Answered with `Strip`.
    Strip {
        /// Region.
        region: u64,
        /// How many cells, at most 1024.
        cells: u16,
    },
    /// Operator: what of a process is managed in a range goes somewhere, as if it had asked itself. Answered with `Migrated`.
    MoveRange {
        /// Its process id.
        pid: u32,
        /// The same process by the name of its pidfd, which is the same in all pid namespaces; 0: not known.
        process: u64,
        /// First address.
        addr: u64,
        /// Bytes; whole pages.
        len_bytes: u64,
        /// Where to.
        target: Target,
        /// Private pages go only if nobody touches them for a while; `None`: at once.
        rest: Option<Rest>,
    },
    /// Operator: all of a region goes somewhere, as if its owner had asked. Answered with `Migrated`.
    MoveRegion {
        /// Region.
        region: u64,
        /// Where to.
        target: Target,
    },
    /// Operator: whoever shows this token may use so much of these devices, and no more. A claim of the same id is replaced.
    SetClaim(Claim),
    /// Operator: nobody gets anything by this claim any more; what its processes have on devices, they keep. Done also if there is none.
    RemoveClaim {
        /// Which.
        id: String,
    },
    /// Operator: claims in the order of their ids, and what there is of devices. Answered with `Claims`.
    ListClaims {
        /// Only those behind this one.
        after: String,
    },
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
    /// Answer to `UserfaultfdDevice`.
    UserfaultfdDevice {
        /// `/dev/userfaultfd`, open.
        device: Fd,
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
        /// Why pages of the fates `Io`, `NoMemory` and `Pinned` stayed; empty when there are none.
        why: String,
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
    /// Answer to `Revalidate` of a whole space: where devices may have mappings. `Done` when these are too many to be told.
    Granted {
        /// In order, apart from each other.
        ranges: Vec<GrantedRange>,
    },
    /// Answer to `Strip`: a byte a cell, see [`StripCell`].
    Strip(Vec<u8>),
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
    /// Answer to `ListClaims`.
    Claims(Claims),
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

/// Downward events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// To the client: map this, answer with `FramesDone`.
    Frames {
        /// Echo it.
        id: u64,
        /// Region.
        region: u64,
        /// First page inside the region.
        first_page: u64,
        /// Address of that page.
        addr: u64,
        /// Pages, at most 512.
        page_count: u64,
        /// What.
        op: FramesOp,
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

/// What holds for a device from [`Call::EmptyDevice`] on. On the wire it is in the device's number, above what a number can be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Emptied {
    /// As before.
    #[default]
    Unchanged,
    /// No page comes any more: migrations leave everything where it is, device faults are refused.
    Closed,
    /// Pages may come again; nothing is emptied.
    Opened,
}
