//! Regions: ranges of this process's memory whose pages can live on a device.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use uhmm_ipc::message::{Call, ErrorCode, Reply, pager};
use uhmm_kernel_hook::{AddrRange, ManagedMapping, memfd};

use crate::arena::Arena;
use crate::frames::Allocation;
use crate::links::{Held, Loop, Peer};
use crate::range::{check_inside, check_length};
use crate::session::Inner;
use crate::{Error, PAGE_BYTES};

/// A drop must end even when the system was shut down for good.
const DROP_DEADLINE: Duration = Duration::from_secs(10);

/// Managed memory, mapped at [`addr`](Self::addr) until it is dropped.
///
/// Access by offset through [`read_u64`](Self::read_u64) and the like, or build structures with [`arena`](Self::arena).
/// Dropping a region frees it: its content is gone, on every device too. The mapping stays until the last arena of it is dropped.
pub struct Region {
    session: Arc<Inner>,
    mapping: Arc<ManagedMapping>,
    /// Its memfd.
    memory: Held,
    id: u64,
    freed: bool,
}

impl Region {
    pub(crate) fn create(session: Arc<Inner>, len_bytes: u64) -> Result<Self, Error> {
        check_length(len_bytes)?;
        if i64::try_from(len_bytes).is_err() {
            return Err(Error::TooLong { len_bytes });
        }
        let (memory, mapping) = session.links.hold(move || {
            let memory =
                memfd::create_sealed("uhmm-region", len_bytes).map_err(Error::kernel("Making a region's memory"))?;
            let mapping = ManagedMapping::map(memory.as_fd(), len_bytes, None);
            Ok((memory, mapping.map_err(Error::kernel("Mapping a region's memory"))?))
        })?;
        if session.forks() {
            mapping.allow_fork().map_err(Error::kernel("Letting children have a region"))?;
        }
        session.settle()?;
        let range = AddrRange { start: mapping.addr(), len: len_bytes };
        let (key, forks) = (memory.key(), session.forks());
        let create = move |links: &mut Loop| {
            let memory = links.fd(key)?;
            Ok(Call::Pager(pager::Call::CreateRegion { addr: range.start, len_bytes, memory }))
        };
        let pending = session.links.call_made(Peer::Pager, create, None, move |reply| match reply {
            Reply::Pager(pager::Reply::RegionCreated { region }) => Ok(region),
            _ => Err(Error::StrangeReply { question: "CreateRegion" }),
        });
        let id = pending.wait()?;
        // Before anybody can send pages of it to a coherent device.
        session.links.ask(move |links| {
            let memory = links.fd(key)?;
            links.frames().allocated(id, Allocation { range, memory, forks });
            Ok(())
        })?;
        Ok(Self { session, mapping: Arc::new(mapping), memory, id, freed: false })
    }

    /// First address.
    pub fn addr(&self) -> u64 {
        self.mapping.addr()
    }

    /// Length.
    pub fn len_bytes(&self) -> u64 {
        self.mapping.len()
    }

    /// Number at the pager.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// System memory that the region takes now; falls when pages leave for a device.
    pub fn populated_bytes(&self) -> Result<u64, Error> {
        let key = self.memory.key();
        self.session.links.ask(move |links| {
            let populated = memfd::populated_bytes(links.fd(key)?.as_fd());
            populated.map_err(Error::kernel("Asking for a region's system memory"))
        })
    }

    /// The region's only typed arena, from its first byte. From then on the bytes are the arena's: writes by offset are refused.
    pub fn arena(&self) -> Result<Arena, Error> {
        Arena::new(self.mapping.clone())
    }

    /// The mapping, for access by offset in all sizes.
    pub fn bytes(&self) -> &ManagedMapping {
        &self.mapping
    }

    /// Reads the word at a byte offset.
    pub fn read_u64(&self, offset: u64) -> Result<u64, Error> {
        check_inside(offset, 8, self.len_bytes())?;
        self.mapping.load_u64(offset).map_err(Error::kernel("Reading a region"))
    }

    /// Writes the word at a byte offset.
    pub fn write_u64(&self, offset: u64, value: u64) -> Result<(), Error> {
        check_inside(offset, 8, self.len_bytes())?;
        self.mapping.store_u64(offset, value).map_err(Error::kernel("Writing a region"))
    }

    /// Frees the region and says how that went; dropping it does the same silently.
    ///
    /// # Errors
    /// The pager's own. Waits for a pager that is restarting, without a limit; dropping gives up after ten seconds.
    pub fn free(mut self) -> Result<(), Error> {
        self.give_back(None)
    }

    fn give_back(&mut self, deadline: Option<Duration>) -> Result<(), Error> {
        if std::mem::replace(&mut self.freed, true) {
            return Ok(());
        }
        let free = pager::Call::FreeRegion { region: self.id };
        match self.session.done("FreeRegion", free, deadline).wait() {
            // Repeated after a restart of the pager: the first one had got through.
            Err(error) if error.code() == ErrorCode::NotFound && !matches!(error, Error::NotRunning { .. }) => {}
            Err(error) => {
                // Unmapping would wait for the pager too: the kernel tells it of the unmap and waits until it has listened.
                std::mem::forget(Arc::clone(&self.mapping));
                return Err(error);
            }
            Ok(()) => {}
        }
        let id = self.id;
        self.session.links.ask(move |links| {
            links.frames().freed(id);
            Ok(())
        })
    }

    /// Pages.
    pub fn page_count(&self) -> u64 {
        self.len_bytes() / PAGE_BYTES
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if let Err(error) = self.give_back(Some(DROP_DEADLINE)) {
            tracing::warn!(%error, region = self.id, "A region could not be freed: its addresses stay taken");
        }
    }
}
