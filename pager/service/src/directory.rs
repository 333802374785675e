//! A region's directory: one page of header, then one 8-byte entry a page, in a sealed memfd that the vault keeps.
//!
//! ```text
//!  0        8          16      24        32       40        48          56        64 ...      4096 + 8 * page
//!  | magic  | version  | live  | region  | space  | addr    | pages     | flags   | (zero)    | entry entry entry ...
//! ```
//!
//! The pager alone writes it, with atomic stores; the next incarnation reads it back. `live` is stored last when a region
//! is made, so a half-made region is recognised and dropped.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::memfd;
use uhmm_kernel_hook::window::{Prot, Window};
use uhmm_kernel_hook::{HookError, PAGE_SIZE};

const MAGIC: u64 = u64::from_le_bytes(*b"uhmm-dir");
const VERSION: u64 = 1;
const HEADER_BYTES: u64 = PAGE_SIZE;

const OFF_MAGIC: u64 = 0;
const OFF_VERSION: u64 = 8;
const OFF_LIVE: u64 = 16;
const OFF_REGION: u64 = 24;
const OFF_SPACE: u64 = 32;
const OFF_ADDR: u64 = 40;
const OFF_PAGES: u64 = 48;
const OFF_FLAGS: u64 = 56;

/// Devices may only read the region.
pub const FLAG_DEVICE_READ_ONLY: u64 = 1;
/// Device faults map system pages in place instead of migrating.
pub const FLAG_IN_PLACE: u64 = 2;

/// Why a directory of the vault cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// The memory could not be made or mapped.
    #[error("Directory memory could not be mapped")]
    Hook(#[from] HookError),
    /// Not ours, or of another layout.
    #[error(
        "Directory has magic {magic:#x} version {version}, this pager reads {MAGIC:#x} version {VERSION}: stop the older uhmm first"
    )]
    Format {
        /// Found.
        magic: u64,
        /// Found.
        version: u64,
    },
    /// The pager died while it made the region.
    #[error("Directory of region {region} was never completed")]
    NotLive {
        /// Region.
        region: u64,
    },
    /// The page count does not fit the file.
    #[error("Directory names {page_count} pages but its file has {len_bytes} bytes")]
    Size {
        /// Pages by the header.
        page_count: u64,
        /// File size.
        len_bytes: u64,
    },
}

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Region id.
    pub region: u64,
    /// Space id.
    pub space: u64,
    /// First address in the client.
    pub addr: u64,
    /// Pages.
    pub page_count: u64,
}

/// See the module head.
#[derive(Debug)]
pub struct DirectoryFile {
    fd: Fd,
    window: Window,
    page_count: u64,
}

fn file_bytes(page_count: u64) -> u64 {
    HEADER_BYTES + (page_count * 8).next_multiple_of(PAGE_SIZE)
}

impl DirectoryFile {
    /// A new directory, every page `Absent`, not yet live.
    pub fn create(header: Header) -> Result<Self, DirectoryError> {
        let fd: OwnedFd = memfd::create_sealed("uhmm-directory", file_bytes(header.page_count))?;
        let window = Window::map(fd.as_fd(), 0, file_bytes(header.page_count), Prot::ReadWrite)?;
        window.store_u64(OFF_MAGIC, MAGIC)?;
        window.store_u64(OFF_VERSION, VERSION)?;
        window.store_u64(OFF_REGION, header.region)?;
        window.store_u64(OFF_SPACE, header.space)?;
        window.store_u64(OFF_ADDR, header.addr)?;
        window.store_u64(OFF_PAGES, header.page_count)?;
        Ok(Self { fd: Arc::new(fd), window, page_count: header.page_count })
    }

    /// A directory out of the vault.
    pub fn adopt(fd: Fd) -> Result<(Self, Header), DirectoryError> {
        let len_bytes = memfd::len(fd.as_fd())?;
        let window = Window::map(fd.as_fd(), 0, len_bytes, Prot::ReadWrite)?;
        let (magic, version) = (window.load_u64(OFF_MAGIC)?, window.load_u64(OFF_VERSION)?);
        if magic != MAGIC || version != VERSION {
            return Err(DirectoryError::Format { magic, version });
        }
        let header = Header {
            region: window.load_u64(OFF_REGION)?,
            space: window.load_u64(OFF_SPACE)?,
            addr: window.load_u64(OFF_ADDR)?,
            page_count: window.load_u64(OFF_PAGES)?,
        };
        if window.load_u64(OFF_LIVE)? != 1 {
            return Err(DirectoryError::NotLive { region: header.region });
        }
        if header.page_count > len_bytes / 8 || file_bytes(header.page_count) != len_bytes {
            return Err(DirectoryError::Size { page_count: header.page_count, len_bytes });
        }
        Ok((Self { fd, window, page_count: header.page_count }, header))
    }

    /// The memfd, for the vault.
    pub fn fd(&self) -> Fd {
        self.fd.clone()
    }

    /// The region is complete: from here on recovery keeps it.
    pub fn set_live(&self) -> Result<(), HookError> {
        self.window.store_u64(OFF_LIVE, 1)
    }

    /// The client moved the whole region with mremap.
    pub fn set_addr(&self, addr: u64) -> Result<(), HookError> {
        self.window.store_u64(OFF_ADDR, addr)
    }

    /// Advice flags.
    pub fn flags(&self) -> u64 {
        self.window.load_u64(OFF_FLAGS).unwrap_or(0)
    }

    /// Sets or clears one advice flag.
    pub fn set_flag(&self, flag: u64, on: bool) -> Result<(), HookError> {
        let flags = self.flags();
        self.window.store_u64(OFF_FLAGS, if on { flags | flag } else { flags & !flag })
    }

    /// One entry; a page outside the region reads as `Absent`.
    pub fn load(&self, page: u64) -> u64 {
        if page >= self.page_count {
            return 0;
        }
        self.window
            .atomic_u64(HEADER_BYTES + page * 8)
            .map_or(0, |entry| entry.load(std::sync::atomic::Ordering::Acquire))
    }

    /// Publishes one entry.
    pub fn store(&self, page: u64, entry: u64) {
        debug_assert!(page < self.page_count, "entry {page} of {}", self.page_count);
        if page >= self.page_count {
            return;
        }
        if let Ok(slot) = self.window.atomic_u64(HEADER_BYTES + page * 8) {
            slot.store(entry, std::sync::atomic::Ordering::Release);
        }
    }
}
