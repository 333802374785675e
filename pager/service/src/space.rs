//! Spaces (client processes) and their regions, and how they lie in the vault.
//!
//! ```text
//!  space/ID/state            memfd: id, nonce, token, kind, features, pid
//!  space/ID/uffd             the process's userfaultfd (closing the last one would turn missing pages into zeros)
//!  space/ID/pidfd            readable when the process has exited: the one truth about its death
//!  space/ID/region/ID/dir    directory (see `directory.rs`), `live` is stored last
//!  space/ID/region/ID/mem    the client's memfd
//! ```
//!
//! A space or region with a name missing was never reported to its client: recovery drops it and the client asks again.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use uhmm_ipc::message::Fd;
use uhmm_ipc::shared::table::Table;
use uhmm_kernel_hook::memfd;
use uhmm_kernel_hook::process::PidFd;
use uhmm_kernel_hook::uffd::Userfaultfd;
use uhmm_kernel_hook::window::{Prot, Window};
use uhmm_kernel_hook::{AddrRange, HookError, PAGE_SIZE};
use uhmm_pager_core::{Directory, RegionId};

use crate::directory::DirectoryFile;

const MAGIC: u64 = u64::from_le_bytes(*b"uhmm-spc");
const OFF_MAGIC: u64 = 0;
const OFF_ID: u64 = 8;
const OFF_NONCE: u64 = 16;
const OFF_FULL: u64 = 24;
const OFF_FEATURES: u64 = 32;
const OFF_PID: u64 = 40;
const OFF_TOKEN: u64 = 48;

/// Bytes of a space token.
pub const TOKEN_BYTES: usize = 16;
/// Device slots in a region (one bit each in an entry's mapped mask).
pub const DEVICE_SLOTS: usize = 8;

/// What is kept about a space in its state memfd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceState {
    /// Space id.
    pub id: u64,
    /// The client's nonce.
    pub nonce: u64,
    /// Kernel-mode faults are raised too.
    pub full: bool,
    /// Granted userfaultfd features.
    pub features: u64,
    /// Process.
    pub pid: u32,
    /// Proves ownership.
    pub token: [u8; TOKEN_BYTES],
}

impl SpaceState {
    /// Writes the state into a new memfd for the vault.
    pub fn to_memfd(&self) -> Result<Fd, HookError> {
        let fd: OwnedFd = memfd::create_sealed("uhmm-space", PAGE_SIZE)?;
        let window = Window::map(fd.as_fd(), 0, PAGE_SIZE, Prot::ReadWrite)?;
        window.store_u64(OFF_ID, self.id)?;
        window.store_u64(OFF_NONCE, self.nonce)?;
        window.store_u64(OFF_FULL, u64::from(self.full))?;
        window.store_u64(OFF_FEATURES, self.features)?;
        window.store_u64(OFF_PID, u64::from(self.pid))?;
        window.write(OFF_TOKEN, &self.token)?;
        window.store_u64(OFF_MAGIC, MAGIC)?;
        Ok(Arc::new(fd))
    }

    /// Reads it back; `None` when it is not such a memfd.
    pub fn from_memfd(fd: &Fd) -> Result<Option<Self>, HookError> {
        let window = Window::map(fd.as_fd(), 0, PAGE_SIZE, Prot::ReadOnly)?;
        if window.load_u64(OFF_MAGIC)? != MAGIC {
            return Ok(None);
        }
        let mut token = [0u8; TOKEN_BYTES];
        window.read(OFF_TOKEN, &mut token)?;
        let pid = u32::try_from(window.load_u64(OFF_PID)?).unwrap_or(0);
        Ok(Some(Self {
            id: window.load_u64(OFF_ID)?,
            nonce: window.load_u64(OFF_NONCE)?,
            full: window.load_u64(OFF_FULL)? != 0,
            features: window.load_u64(OFF_FEATURES)?,
            pid,
            token,
        }))
    }
}

/// How far a region has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for the vault.
    Creating,
    /// In use.
    Live,
    /// No new mapping or migration; going away.
    Dying,
}

/// One range of a client's addresses under management.
pub struct Region {
    /// Region id.
    pub id: u64,
    /// Its space.
    pub space: u64,
    /// First address.
    pub addr: u64,
    /// Pages.
    pub page_count: u64,
    /// The client's memfd.
    pub memory: Fd,
    /// Page states.
    pub directory: DirectoryFile,
    /// Progress.
    pub phase: Phase,
    /// Device page tables in shared memory, by device id.
    pub tables: [Option<Table>; DEVICE_SLOTS],
    /// Bit d: device d has been told about the region.
    pub granted_mask: u8,
}

impl Region {
    /// Address range in the client.
    pub fn range(&self) -> AddrRange {
        AddrRange { start: self.addr, len: self.page_count * PAGE_SIZE }
    }

    /// Client addresses of some pages.
    pub fn addresses(&self, first_page: u64, page_count: u64) -> AddrRange {
        AddrRange { start: self.addr + first_page * PAGE_SIZE, len: page_count * PAGE_SIZE }
    }
}

/// One client process.
#[derive(Debug)]
pub struct Space {
    /// What the vault keeps.
    pub state: SpaceState,
    /// Its userfaultfd.
    pub uffd: Userfaultfd,
    /// Tells when it dies.
    pub pidfd: PidFd,
    /// Region ids by first address.
    pub regions: BTreeMap<u64, u64>,
    /// The process is dead or said goodbye; the space is removed with its last region.
    pub dying: bool,
}

impl Space {
    /// Region that holds an address, by id.
    pub fn region_at(&self, addr: u64, regions: &Regions) -> Option<u64> {
        let (start, id) = self.regions.range(..=addr).next_back()?;
        let region = regions.get(*id)?;
        (addr - start < region.page_count * PAGE_SIZE).then_some(*id)
    }

    /// Vault prefix of everything that belongs to the space.
    pub fn vault_prefix(id: u64) -> String {
        format!("space/{id}/")
    }

    /// Vault prefix of one region.
    pub fn region_prefix(space: u64, region: u64) -> String {
        format!("space/{space}/region/{region}/")
    }
}

/// All regions by id: what the core reads through [`Directory`].
#[derive(Default)]
pub struct Regions {
    by_id: BTreeMap<u64, Region>,
}

impl Regions {
    /// By id.
    pub fn get(&self, id: u64) -> Option<&Region> {
        self.by_id.get(&id)
    }

    /// By id.
    pub fn get_mut(&mut self, id: u64) -> Option<&mut Region> {
        self.by_id.get_mut(&id)
    }

    /// Adds one.
    pub fn insert(&mut self, region: Region) {
        self.by_id.insert(region.id, region);
    }

    /// Removes one.
    pub fn remove(&mut self, id: u64) -> Option<Region> {
        self.by_id.remove(&id)
    }

    /// All, by id.
    pub fn iter(&self) -> impl Iterator<Item = &Region> {
        self.by_id.values()
    }

    /// All, by id.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Region> {
        self.by_id.values_mut()
    }
}

impl Directory for Regions {
    fn load(&self, region: RegionId, page: u64) -> u64 {
        self.by_id.get(&region.0).map_or(0, |r| r.directory.load(page))
    }

    fn page_count(&self, region: RegionId) -> u64 {
        self.by_id.get(&region.0).map_or(0, |r| r.page_count)
    }
}
