//! What a forked child needs to find itself, and the memory that an agent shares with the pager.

use std::sync::Arc;

use uhmm_ipc::message::pager::AgentMemory;
use uhmm_kernel_hook::{PAGE_SIZE, Window, memfd, procmap};

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

    /// Space and token of this process. Only in a child: reading it here would make it useless for all children to come.
    pub(crate) fn identity(&self) -> Result<(u64, Vec<u8>), Error> {
        let failed = Error::kernel("Reading the sentinel page");
        let mut token = vec![0; TOKEN_BYTES];
        let space = self.page.load_u64(0).and_then(|space| self.page.read(8, &mut token).map(|()| space));
        space.map(|space| (space, token)).map_err(failed)
    }

    /// The same page in a child, which has been read: the child's own children cannot be told who they are.
    pub(crate) fn inherited(&self) -> Self {
        self.clone()
    }
}

/// Memory that the pager keeps for this process's agent.
pub(crate) fn agent_memory() -> Result<AgentMemory, Error> {
    let maps = procmap::open_maps(std::process::id()).map_err(Error::kernel("Opening /proc/self/maps"))?;
    let staging = memfd::create_sealed("uhmm-staging", STAGING_SLOTS * SLOT_BYTES);
    let staging = staging.map_err(Error::kernel("Making the staging memory"))?;
    Ok(AgentMemory { maps: Arc::new(maps), staging: Arc::new(staging) })
}
