//! What a forked child needs to find itself, and the memory that an agent shares with the pager.

use std::sync::Arc;

use uhmm_ipc::message::pager::{AgentMemory, DIARY_BYTES};
use uhmm_kernel_hook::{AddrRange, Advice, PAGE_SIZE, Window, memfd, procmap};

use crate::Error;

/// Slots of 2 MiB in the staging memory: operations that the pager can have under way with one process.
const STAGING_SLOTS: u64 = 16;
const SLOT_BYTES: u64 = 2 << 20;
const TOKEN_BYTES: usize = 16;

/// One page of private memory that this process never touches. It is registered with the userfaultfd; a forked child that reads
/// its copy is answered by the pager with who it is.
#[derive(Clone, Debug)]
pub(crate) struct Sentinel {
    page: Arc<Window>,
}

impl Sentinel {
    pub(crate) fn new() -> Result<Self, Error> {
        let page = Window::anonymous(PAGE_SIZE).map_err(Error::kernel("Making the sentinel page"))?;
        Ok(Self { page: Arc::new(page) })
    }

    pub(crate) fn addr(&self) -> u64 {
        self.page.addr()
    }

    pub(crate) fn range(&self) -> AddrRange {
        self.page.range()
    }

    /// Space and token of this process. The page is empty again afterwards, so that children of this process find theirs.
    pub(crate) fn identity(&self) -> Result<(u64, Vec<u8>), Error> {
        let failed = Error::kernel("Reading the sentinel page");
        let mut bytes = [0; 8 + TOKEN_BYTES];
        let read = self.page.read(0, &mut bytes).and_then(|()| self.page.advise(0, PAGE_SIZE, Advice::DontNeed));
        read.map_err(failed)?;
        let (space, token) = bytes.split_at(8);
        let space = space.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        Ok((space, token.to_vec()))
    }
}

/// Memory that the pager keeps for this process's agent.
pub(crate) fn agent_memory() -> Result<AgentMemory, Error> {
    let maps = procmap::open_maps(std::process::id()).map_err(Error::kernel("Opening /proc/self/maps"))?;
    let staging = memfd::create_sealed("uhmm-staging", STAGING_SLOTS * SLOT_BYTES + DIARY_BYTES);
    let staging = staging.map_err(Error::kernel("Making the staging memory"))?;
    Ok(AgentMemory { maps: Arc::new(maps), staging: Arc::new(staging) })
}
