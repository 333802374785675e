//! Selections and fates of pages, advice, attributes, heat and injected faults: what a client says and asks about ranges. Part of the pager's messages.

use super::pager::Target;

/// What became of a page in a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageStatus {
    /// Moved now.
    Moved,
    /// Was there already.
    AlreadyThere,
    /// Lost a race; try again.
    Busy,
    /// Pinned: stays. Or locked, and RLIMIT_MEMLOCK has no room for it a second time while it moves.
    Pinned,
    /// Device full and nothing could be evicted.
    NoMemory,
    /// The copy failed, or the device is lost; the page is valid where it was.
    Io,
    /// Lost with a device: accesses get SIGBUS.
    Poisoned,
    /// Unmapped meanwhile.
    Gone,
    /// Not one of the pages that were to move.
    NotSelected,
}

/// Which pages of a range are to move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Only {
    /// All of them.
    #[default]
    All,
    /// To a device, those that are in system memory: what is on other devices stays there.
    InSystem,
    /// Home, those that are on this device.
    OnDevice(u8),
}

/// Private pages on their way out are out of the program's reach for a while before anything else becomes of them: who touches one has it
/// back at once, without a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rest {
    /// For so long, at most a minute.
    pub ms: u32,
    /// Those that nobody has touched stay in memory, too: [`PageStatus::NotSelected`].
    pub stays: bool,
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
    /// Mostly read: reading devices get a copy and the system page stays valid; the first write collapses the copies. End it before
    /// MADV_MERGEABLE, and before MADV_GUARD_INSTALL on allocated memory (docs/kernel-view.md says why).
    ReadMostly(bool),
    /// One CPU fault brings home an aligned block of 2^n pages; 0..=63. Of a block of more than 2 MiB the rest follows when the fault is
    /// answered, unless pages of the region are sent to a device meanwhile. `None`: adaptive (the default).
    Granularity(Option<u8>),
}

/// Addresses of which devices may have mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GrantedRange {
    /// First address, page aligned.
    pub addr: u64,
    /// Bytes.
    pub len_bytes: u64,
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
    /// Allocation of a page of 2 MiB in system memory, for pages that come home: small ones are tried instead.
    SystemHuge,
    /// Allocation of system memory for pages that come home: they stay on the device, and are tried again.
    SystemPages,
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

/// What most of the looked-at pages of a cell are. As a byte: what it is, or 16 and the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StripCell {
    /// Never touched.
    Absent,
    /// In system memory.
    System,
    /// On the move.
    Moving,
    /// Lost.
    Poisoned,
    /// On a device.
    Device(u8),
}

impl StripCell {
    /// See the type.
    pub fn byte(self) -> u8 {
        match self {
            Self::Absent => 0,
            Self::System => 1,
            Self::Moving => 2,
            Self::Poisoned => 3,
            Self::Device(device) => 16 | device & 0xf,
        }
    }

    /// Of a byte that means nothing: never touched.
    pub fn from_byte(byte: u8) -> Self {
        match byte {
            1 => Self::System,
            2 => Self::Moving,
            3 => Self::Poisoned,
            16..=31 => Self::Device(byte & 0xf),
            _ => Self::Absent,
        }
    }
}
