//! A PCI device that another process plays, over a Unix socket: the vfio-user protocol, version 0.
//!
//! ```text
//!   driver's threads --lock--> request ==socket==> model process          one request at a time, each with a deadline
//!                    <-------- reply   <==========
//!   watcher thread: the socket hangs up -> every call is `Gone`, the `Request` and `Error` events are signalled
//! ```
//! **Why not the crate `vfio_user`** (0.1.7; its source was read): its client takes error replies of DMA_MAP, DMA_UNMAP and SET_IRQS for success,
//! so nothing here could claim that a page is unmapped before it changes owner; it waits for ever when a region access is refused;
//! it cannot map for reading only; sizes from the peer make it panic or take gigabytes. None of this can be repaired from outside.
//! It serves as the other end in tests instead, so that both ends here speak the protocol that others speak.
//!
//! **The peer is not trusted** with this process: all it sends is checked, a BAR is mapped only if its memfd is sealed, silence and nonsense
//! make the device `Gone`. **It is trusted with memory that it was granted**: unlike an IOMMU's tables, a descriptor in
//! another process cannot be taken back. [`PciBackend::dma_unmap`] succeeds when the peer has said that it unmapped, or has hung up; a
//! peer that fell silent may still reach the memory, so that is an error and [`crate::DmaMapping`] gives the memory up.

mod connection;
pub mod wire;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::{EventFd, PAGE_SIZE, Stream, memfd};

use crate::backend::{InterruptKind, PciBackend, RegionIndex, RegionInfo};
use crate::dma::{DmaMemory, DmaRight};
use crate::error::PciError;
use crate::iova::IovaRange;
use connection::{CallError, Connection};
use wire::{Fields, WireError, command, flag};

/// How long a peer may take for an answer. Models answer within microseconds; this only has to outlast a busy machine.
pub const REPLY_LIMIT: Duration = Duration::from_secs(3);

const COMMAND: u64 = 4;
const COMMAND_MEMORY: u16 = 2;
/// What models and drivers here address. The protocol has no way to ask.
const IOVA_END: u64 = 1 << 48;
const ALL_REGIONS: [RegionIndex; 7] = [
    RegionIndex::Bar(0),
    RegionIndex::Bar(1),
    RegionIndex::Bar(2),
    RegionIndex::Bar(3),
    RegionIndex::Bar(4),
    RegionIndex::Bar(5),
    RegionIndex::Config,
];

/// See the module head.
#[derive(Debug)]
pub struct VfioUserBackend {
    name: String,
    connection: Arc<Connection>,
    regions: BTreeMap<RegionIndex, RegionInfo>,
    irq_counts: [u32; wire::IRQ_KINDS as usize],
    resettable: bool,
    adopted: bool,
    watcher: Option<JoinHandle<()>>,
}

impl VfioUserBackend {
    /// Connects to the process behind `path` and asks what it plays.
    ///
    /// # Errors
    /// `Open`.
    pub fn open(path: &Path) -> Result<Self, PciError> {
        let name = format!("vfio-user:{}", path.display());
        match Stream::connect(path) {
            Ok(stream) => Self::from_stream(stream, name, REPLY_LIMIT),
            Err(error) => Err(PciError::Open {
                device: name,
                problem: "nobody answers at its socket; start the process that plays it (`uhmm device-model`)".into(),
                source: Some(error.into()),
            }),
        }
    }

    /// Takes a connected socket. `limit`: see [`REPLY_LIMIT`].
    ///
    /// # Errors
    /// `Open`.
    pub fn from_stream(stream: Stream, name: String, limit: Duration) -> Result<Self, PciError> {
        let failed = |name: &str, problem: &str, error: CallError| PciError::Open {
            device: name.to_owned(),
            problem: problem.to_owned(),
            source: Some(error.into()),
        };
        let connection = Connection::start(stream, limit).map_err(|error| {
            failed(&name, "its process does not answer as vfio-user does; perhaps another driver has the device", error)
        })?;
        let mut backend = Self {
            name,
            connection: Arc::new(connection),
            regions: BTreeMap::new(),
            irq_counts: [0; wire::IRQ_KINDS as usize],
            resettable: false,
            adopted: false,
            watcher: None,
        };
        if let Err(error) = backend.explore() {
            return Err(failed(&backend.name, "its process does not describe a PCI device", error));
        }
        let watched = Arc::clone(&backend.connection);
        let watcher = std::thread::Builder::new().name("vfio-user".into()).spawn(move || watched.watch());
        backend.watcher = Some(watcher.map_err(|error| PciError::Open {
            device: backend.name.clone(),
            problem: "no thread could be started; raise the process limit (ulimit -u)".into(),
            source: Some(error.into()),
        })?);
        let mut bytes = [0; 2];
        backend.read(RegionIndex::Config, COMMAND, &mut bytes)?;
        // A device answers memory accesses only after some driver switched that on: then it goes on where that driver left it.
        backend.adopted = u16::from_le_bytes(bytes) & COMMAND_MEMORY != 0;
        Ok(backend)
    }

    fn explore(&mut self) -> Result<(), CallError> {
        let mut body = Vec::new();
        for field in [16u32, 0, 0, 0] {
            body.extend(field.to_le_bytes());
        }
        let reply = self.connection.call(command::DEVICE_GET_INFO, &body, &[])?;
        let mut fields = Fields::new(&reply.body);
        let [_argsz, flags, region_count, irq_kinds] = [fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?];
        if flags & flag::DEVICE_PCI == 0 {
            return Err(WireError::Broken("it is no PCI device").into());
        }
        self.resettable = flags & flag::DEVICE_RESET != 0;
        for region in ALL_REGIONS.into_iter().filter(|region| region.number() < region_count) {
            if let Some(info) = self.ask_region(region)? {
                self.regions.insert(region, info);
            }
        }
        for index in 0..irq_kinds.min(wire::IRQ_KINDS) {
            let mut body = Vec::new();
            for field in [16u32, 0, index, 0] {
                body.extend(field.to_le_bytes());
            }
            let reply = self.connection.call(command::DEVICE_GET_IRQ_INFO, &body, &[])?;
            let mut fields = Fields::new(&reply.body);
            let [_argsz, flags, _index, count] = [fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?];
            if flags & flag::IRQ_EVENTFD != 0 {
                self.irq_counts[index as usize] = count.min(2048);
            }
        }
        Ok(())
    }

    fn ask_region(&self, region: RegionIndex) -> Result<Option<RegionInfo>, CallError> {
        // Asked with room for capabilities, so that one question is enough.
        let mut body = Vec::new();
        for field in [4096u32, 0, region.number(), 0] {
            body.extend(field.to_le_bytes());
        }
        body.extend([0; 16]);
        let mut reply = self.connection.call(command::DEVICE_GET_REGION_INFO, &body, &[])?;
        let mut fields = Fields::new(&reply.body);
        let [_argsz, flags, _index, cap_offset] = [fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?];
        let [len_bytes, offset] = [fields.u64()?, fields.u64()?];
        if len_bytes == 0 {
            return Ok(None);
        }
        let caps = if flags & flag::REGION_CAPS != 0 { cap_offset as usize } else { 0 };
        let whole = flags & flag::REGION_MMAP != 0 && covers_all(&reply.body, caps, len_bytes)?;
        let mappable =
            reply.fds.drain(..).next().filter(|_| whole).and_then(|fd| check_bar(region, fd, offset, len_bytes));
        Ok(Some(RegionInfo { len_bytes, mappable }))
    }

    fn region_len(&self, region: RegionIndex, offset: u64, len: u64) -> Result<(), PciError> {
        let region_len = self.regions.get(&region).map_or(0, |info| info.len_bytes);
        let inside = offset.checked_add(len).is_some_and(|end| end <= region_len);
        if inside { Ok(()) } else { Err(PciError::OutOfRegion { region, offset, len, region_len }) }
    }

    fn set_vectors(&self, kind: InterruptKind, start: u32, events: &[EventFd]) -> Result<(), CallError> {
        let (data, fds): (_, Vec<_>) = match events {
            [] => (flag::IRQ_DATA_NONE, Vec::new()),
            events => (flag::IRQ_DATA_EVENTFD, events.iter().map(AsFd::as_fd).collect()),
        };
        let mut body = Vec::new();
        for field in [20, data | flag::IRQ_ACTION_TRIGGER, irq_number(kind), start, events.len() as u32] {
            body.extend(field.to_le_bytes());
        }
        self.connection.call(command::DEVICE_SET_IRQS, &body, &fds).map(|_| ())
    }

    fn gone(&self, problem: String) -> PciError {
        PciError::Gone { device: self.name.clone(), problem }
    }

    /// `refused` makes an error of the peer's errno.
    fn error(&self, error: CallError, refused: impl FnOnce(io::Error) -> PciError) -> PciError {
        match error {
            CallError::Refused(errno) => refused(errno),
            gone @ CallError::Gone { .. } => self.gone(gone.to_string()),
        }
    }
}

impl Drop for VfioUserBackend {
    fn drop(&mut self) {
        self.connection.close();
        if let Some(watcher) = self.watcher.take()
            && watcher.join().is_err()
        {
            tracing::error!(device = self.name, "The watcher of a vfio-user connection panicked");
        }
    }
}

impl PciBackend for VfioUserBackend {
    fn describe(&self) -> String {
        self.name.clone()
    }

    fn is_adopted(&self) -> bool {
        self.adopted
    }

    fn region(&self, region: RegionIndex) -> Option<RegionInfo> {
        self.regions.get(&region).cloned()
    }

    fn read(&self, region: RegionIndex, offset: u64, bytes: &mut [u8]) -> Result<(), PciError> {
        self.region_len(region, offset, bytes.len() as u64)?;
        let limit = self.connection.limits().max_data_bytes;
        for (index, piece) in bytes.chunks_mut(limit).enumerate() {
            let offset = offset + (index * limit) as u64;
            let asked = access_body(region, offset, piece.len(), &[]);
            let read = self.connection.call(command::REGION_READ, &asked, &[]).and_then(|reply| {
                let data = reply.body.strip_prefix(asked.as_slice()).filter(|data| data.len() == piece.len());
                piece.copy_from_slice(data.ok_or_else(|| self.connection.broken("it answers another read"))?);
                Ok(())
            });
            read.map_err(|error| self.error(error, |source| PciError::Access { region, offset, source }))?;
        }
        Ok(())
    }

    fn write(&self, region: RegionIndex, offset: u64, bytes: &[u8]) -> Result<(), PciError> {
        self.region_len(region, offset, bytes.len() as u64)?;
        let limit = self.connection.limits().max_data_bytes;
        for (index, piece) in bytes.chunks(limit).enumerate() {
            let offset = offset + (index * limit) as u64;
            let body = access_body(region, offset, piece.len(), piece);
            self.connection
                .call(command::REGION_WRITE, &body, &[])
                .map_err(|error| self.error(error, |source| PciError::Access { region, offset, source }))?;
        }
        Ok(())
    }

    fn iova_ranges(&self) -> Vec<IovaRange> {
        vec![IovaRange { start: 0, end: IOVA_END }]
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, right: DmaRight) -> Result<(), PciError> {
        let rights = match right {
            DmaRight::Read => flag::DMA_READ,
            DmaRight::ReadWrite => flag::DMA_READ | flag::DMA_WRITE,
        };
        let len = memory.len_bytes();
        let mut body = Vec::new();
        body.extend(32u32.to_le_bytes());
        body.extend(rights.to_le_bytes());
        for field in [memory.offset_bytes, iova, len] {
            body.extend(field.to_le_bytes());
        }
        let hint = "give it whole pages of a sealed memfd, at addresses that are free";
        match self.connection.call(command::DMA_MAP, &body, &[memory.fd.as_fd()]) {
            Ok(_) => Ok(()),
            Err(error) => Err(self.error(error, |source| PciError::Map { iova, len, hint, source })),
        }
    }

    fn dma_unmap(&self, iova: u64, len_bytes: u64) -> Result<(), PciError> {
        let mut body = Vec::new();
        body.extend(24u32.to_le_bytes());
        body.extend(0u32.to_le_bytes());
        for field in [iova, len_bytes] {
            body.extend(field.to_le_bytes());
        }
        let hint = "unmap exactly what was mapped";
        match self.connection.call(command::DMA_UNMAP, &body, &[]) {
            // A peer that has hung up has dropped everything: the protocol says so, and a process that ended cannot do otherwise.
            Ok(_) | Err(CallError::Gone { hung_up: true, .. }) => Ok(()),
            Err(error) => Err(self.error(error, |source| PciError::Map { iova, len: len_bytes, hint, source })),
        }
    }

    fn interrupt_count(&self, kind: InterruptKind) -> u32 {
        match kind {
            InterruptKind::Msi | InterruptKind::Msix => self.irq_counts[irq_number(kind) as usize],
            // This end makes them itself when the peer is gone.
            InterruptKind::Error | InterruptKind::Request => 1,
        }
    }

    fn set_interrupts(&self, kind: InterruptKind, events: &[EventFd]) -> Result<(), PciError> {
        let count = self.interrupt_count(kind) as usize;
        let failed = |source| PciError::Interrupts { kind, source };
        if events.len() > count {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, format!("there are only {count} vectors"))));
        }
        if matches!(kind, InterruptKind::Error | InterruptKind::Request) {
            self.connection.tell_end(kind, events.first()).map_err(|problem| self.gone(problem))?;
            if self.irq_counts[irq_number(kind) as usize] == 0 {
                return Ok(());
            }
        }
        self.set_vectors(kind, 0, &[]).map_err(|error| self.error(error, failed))?;
        let most = self.connection.limits().max_msg_fds;
        for (index, piece) in events.chunks(most).enumerate() {
            self.set_vectors(kind, (index * most) as u32, piece).map_err(|error| self.error(error, failed))?;
        }
        Ok(())
    }

    fn reset(&self) -> Result<(), PciError> {
        let device = self.name.clone();
        if !self.resettable {
            return Err(PciError::Unsupported { device, what: "be reset" });
        }
        match self.connection.call(command::DEVICE_RESET, &[], &[]) {
            Ok(_) => Ok(()),
            Err(error) => Err(self.error(error, |source| PciError::Reset { device, source })),
        }
    }

    fn kept(&self) -> Vec<(String, Fd)> {
        Vec::new()
    }
}

fn irq_number(kind: InterruptKind) -> u32 {
    match kind {
        InterruptKind::Msi => 1,
        InterruptKind::Msix => 2,
        InterruptKind::Error => 3,
        InterruptKind::Request => 4,
    }
}

fn access_body(region: RegionIndex, offset: u64, len: usize, data: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(16 + data.len());
    body.extend(offset.to_le_bytes());
    body.extend(region.number().to_le_bytes());
    body.extend((len as u32).to_le_bytes());
    body.extend(data);
    body
}

/// Whether the whole region can be mapped: no list of areas, or a list with one area that is all of it.
fn covers_all(info: &[u8], first_cap: usize, len_bytes: u64) -> Result<bool, WireError> {
    let mut at = first_cap;
    while at != 0 {
        let capability = info.get(at..).filter(|_| at >= wire::REGION_INFO_BYTES);
        let mut fields = Fields::new(capability.ok_or(WireError::Broken("a capability lies outside its message"))?);
        let (id, _version, next) = (fields.u16()?, fields.u16()?, fields.u32()? as usize);
        if id == wire::CAP_SPARSE_MMAP {
            let (count, _reserved) = (fields.u32()?, fields.u32()?);
            return Ok(count == 1 && (fields.u64()?, fields.u64()?) == (0, len_bytes));
        }
        if next != 0 && next <= at {
            return Err(WireError::Broken("its capabilities form a circle"));
        }
        at = next;
    }
    Ok(true)
}

/// A file that the peer may shorten would raise SIGBUS here: such a BAR is reached by call.
fn check_bar(region: RegionIndex, fd: OwnedFd, offset: u64, len_bytes: u64) -> Option<(Fd, u64)> {
    let file_len = memfd::len(fd.as_fd()).ok()?;
    let inside = offset.is_multiple_of(PAGE_SIZE) && offset.checked_add(len_bytes).is_some_and(|end| end <= file_len);
    if !inside || memfd::check_sealed(fd.as_fd(), file_len).is_err() {
        tracing::warn!(%region, "This BAR's memory is no sealed memfd of its size: it is not mapped, every access is a message");
        return None;
    }
    Some((Arc::new(fd), offset))
}
