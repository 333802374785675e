//! A machine behind a Unix socket, for drivers in other processes: the server's end of vfio-user.
//!
//! ```text
//!   accept -> connect -> VERSION -> requests, each answered -> peer closes, breaks the protocol or stalls -> disconnect -> accept
//! ```
//! One driver at a time, as with VFIO; who comes meanwhile waits in the backlog. What becomes of the device in between is in the crate's head.
//! Peers are not trusted: a request that makes no sense is refused with an errno, one that breaks the framing ends the connection.

use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::{EventFd, HookError, Stream, StreamListener};
use uhmm_pci::vfio_user::wire::{self, Fields, Header, Message, WireError, command, flag};
use uhmm_pci::{DmaRight, InterruptKind, RegionIndex};

use crate::dma::MapError;
use crate::machine::{Machine, MachineError};

/// How long a peer may take for the rest of a message, or for reading a reply.
const STALL_LIMIT: Duration = Duration::from_secs(3);

/// Why a server stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The listening socket.
    #[error("The device's socket cannot be served")]
    Socket(#[from] HookError),
    /// The device was pulled out, or another way has it.
    #[error("The device cannot be served")]
    Machine(#[from] MachineError),
}

/// See the module head.
#[derive(Debug)]
pub struct Server {
    machine: Machine,
    listener: StreamListener,
}

impl Server {
    /// Listens at `path` (mode 0600). A socket file that a dead server left is replaced.
    ///
    /// # Errors
    /// `Socket`.
    pub fn bind(path: &Path, machine: Machine) -> Result<Self, ServerError> {
        Ok(Self { machine, listener: StreamListener::bind(path)? })
    }

    /// Serves one driver after the other.
    ///
    /// # Errors
    /// The device was removed, or the listener failed.
    pub fn run(&self) -> Result<Infallible, ServerError> {
        loop {
            let stream = self.listener.accept()?;
            tracing::info!("A driver connected");
            let end = serve(&self.machine, &stream)?;
            tracing::info!(reason = %end, dma_faults = self.machine.dma_fault_count(), "The driver is gone; the device stays as it is");
        }
    }
}

/// Serves one driver until it goes. Returns why it went; the device is disconnected by then.
///
/// # Errors
/// `Machine`: the device was removed, or has a driver already.
pub fn serve(machine: &Machine, stream: &Stream) -> Result<WireError, ServerError> {
    machine.connect()?;
    let _guard = Disconnect(machine);
    let mut version_known = false;
    loop {
        let message = match wire::receive(stream, None, STALL_LIMIT) {
            Ok(message) => message,
            Err(error) => return Ok(error),
        };
        let header = message.header;
        if header.flags & flag::TYPE_MASK != 0 {
            return Ok(WireError::Broken("it sent a reply, though nothing was asked"));
        }
        let answer = match (header.command, version_known) {
            (command::VERSION, false) => wire::parse_version(&message.body).map_err(|_| Errno::INVAL).map(|_| {
                version_known = true;
                Answer::from(wire::version_body())
            }),
            (_, false) | (command::VERSION, true) => Err(Errno::INVAL),
            (_, true) => handle(machine, message),
        };
        if let Err(Errno::NODEV) = answer {
            return Err(MachineError::Removed.into());
        }
        if header.flags & flag::NO_REPLY == 0
            && let Err(error) = reply(stream, header, answer)
        {
            return Ok(error);
        }
    }
}

struct Disconnect<'a>(&'a Machine);

impl Drop for Disconnect<'_> {
    fn drop(&mut self) {
        self.0.disconnect();
    }
}

#[derive(Default)]
struct Answer {
    body: Vec<u8>,
    fd: Option<Fd>,
}

impl From<Vec<u8>> for Answer {
    fn from(body: Vec<u8>) -> Self {
        Self { body, fd: None }
    }
}

fn reply(stream: &Stream, asked: Header, answer: Result<Answer, Errno>) -> Result<(), WireError> {
    let (flags, errno, answer) = match answer {
        Ok(answer) => (flag::REPLY, 0, answer),
        Err(errno) => (flag::REPLY | flag::ERROR, errno.raw_os_error() as u32, Answer::default()),
    };
    let header = Header { id: asked.id, command: asked.command, flags, errno };
    let fds: Vec<_> = answer.fd.iter().map(AsFd::as_fd).collect();
    wire::send(stream, header, &answer.body, &fds, STALL_LIMIT)
}

fn handle(machine: &Machine, message: Message) -> Result<Answer, Errno> {
    let Message { header, body, fds } = message;
    let fields = Fields::new(&body);
    match header.command {
        command::DMA_MAP => dma_map(machine, fields, fds),
        command::DMA_UNMAP => dma_unmap(machine, fields, &body),
        command::DEVICE_GET_INFO => {
            Ok(words(&[16, flag::DEVICE_PCI | flag::DEVICE_RESET, wire::REGIONS, wire::IRQ_KINDS]))
        }
        command::DEVICE_GET_REGION_INFO => region_info(machine, fields),
        command::DEVICE_GET_IRQ_INFO => irq_info(machine, fields),
        command::DEVICE_SET_IRQS => set_irqs(machine, fields, fds),
        command::REGION_READ => region_read(machine, fields, &body),
        command::REGION_WRITE => region_write(machine, fields, &body),
        command::DEVICE_RESET => machine.reset().map(|()| Answer::default()).map_err(|error| errno(&error)),
        _ => Err(Errno::OPNOTSUPP),
    }
}

fn dma_map(machine: &Machine, mut fields: Fields<'_>, mut fds: Vec<OwnedFd>) -> Result<Answer, Errno> {
    let (_argsz, flags) = (u32_of(&mut fields)?, u32_of(&mut fields)?);
    let [offset, iova, len] = [u64_of(&mut fields)?, u64_of(&mut fields)?, u64_of(&mut fields)?];
    let right = match flags {
        flag::DMA_READ => DmaRight::Read,
        both if both == flag::DMA_READ | flag::DMA_WRITE => DmaRight::ReadWrite,
        _ => return Err(Errno::INVAL),
    };
    // Without a descriptor the device would have to ask for every access by message, which nobody here does.
    let (Some(fd), true) = (fds.pop(), fds.is_empty()) else { return Err(Errno::INVAL) };
    machine.dma_map(iova, &Arc::new(fd), offset, len, right).map_err(|error| errno(&error))?;
    Ok(Answer::default())
}

fn dma_unmap(machine: &Machine, mut fields: Fields<'_>, body: &[u8]) -> Result<Answer, Errno> {
    let (_argsz, flags) = (u32_of(&mut fields)?, u32_of(&mut fields)?);
    let (iova, len) = (u64_of(&mut fields)?, u64_of(&mut fields)?);
    match (flags, iova, len) {
        (0, _, _) => machine.dma_unmap(iova, len).map_err(|error| errno(&error))?,
        (flag::UNMAP_ALL, 0, 0) => machine.dma_unmap_all(),
        _ => return Err(Errno::INVAL),
    }
    Ok(body[..24].to_vec().into())
}

fn region_info(machine: &Machine, mut fields: Fields<'_>) -> Result<Answer, Errno> {
    let [room, _flags, index] = [u32_of(&mut fields)?, u32_of(&mut fields)?, u32_of(&mut fields)?];
    if index >= wire::REGIONS {
        return Err(Errno::INVAL);
    }
    let info = region(index).and_then(|region| machine.region(region));
    let (len_bytes, mappable) = info.map_or((0, None), |info| (info.len_bytes, info.mappable));
    // One area that is the whole region: some clients take the descriptor only with such a list.
    let cap_bytes = if mappable.is_some() { 32 } else { 0 };
    let argsz = wire::REGION_INFO_BYTES as u32 + cap_bytes;
    let with_caps = mappable.is_some() && room >= argsz;
    let flags = if len_bytes > 0 { flag::REGION_READ_WRITE } else { 0 }
        | if mappable.is_some() { flag::REGION_MMAP | flag::REGION_CAPS } else { 0 };
    let cap_offset = if with_caps { wire::REGION_INFO_BYTES as u32 } else { 0 };
    let mut body = words(&[argsz, flags, index, cap_offset]).body;
    body.extend(len_bytes.to_le_bytes());
    body.extend(mappable.as_ref().map_or(0, |(_, offset)| *offset).to_le_bytes());
    if with_caps {
        body.extend(wire::CAP_SPARSE_MMAP.to_le_bytes());
        body.extend(1u16.to_le_bytes());
        body.extend([0; 4]);
        body.extend(words(&[1, 0]).body);
        body.extend(0u64.to_le_bytes());
        body.extend(len_bytes.to_le_bytes());
    }
    Ok(Answer { body, fd: mappable.map(|(fd, _)| fd).filter(|_| with_caps) })
}

fn irq_info(machine: &Machine, mut fields: Fields<'_>) -> Result<Answer, Errno> {
    let [_argsz, _flags, index] = [u32_of(&mut fields)?, u32_of(&mut fields)?, u32_of(&mut fields)?];
    let count = match (irq_kind(index), index) {
        (Some(kind), _) => machine.interrupt_count(kind),
        (None, 0) => 0,
        _ => return Err(Errno::INVAL),
    };
    Ok(words(&[16, if count > 0 { flag::IRQ_EVENTFD } else { 0 }, index, count]))
}

fn set_irqs(machine: &Machine, mut fields: Fields<'_>, fds: Vec<OwnedFd>) -> Result<Answer, Errno> {
    const OFF: u32 = flag::IRQ_DATA_NONE | flag::IRQ_ACTION_TRIGGER;
    const ROUTE: u32 = flag::IRQ_DATA_EVENTFD | flag::IRQ_ACTION_TRIGGER;
    let [_argsz, flags, index] = [u32_of(&mut fields)?, u32_of(&mut fields)?, u32_of(&mut fields)?];
    let (start, count) = (u32_of(&mut fields)?, u32_of(&mut fields)?);
    let kind = irq_kind(index).ok_or(Errno::INVAL)?;
    let there = machine.interrupt_count(kind);
    let events = match (flags, count, fds.len()) {
        (OFF, 0, 0) if start == 0 => (0..there).map(|_| None).collect(),
        (ROUTE, _, 0) if count <= there => (0..count).map(|_| None).collect(),
        (ROUTE, _, given) if given == count as usize => {
            let events = fds.into_iter().map(|fd| EventFd::from_fd(fd).map(Some));
            events.collect::<Result<Vec<_>, _>>().map_err(|_| Errno::INVAL)?
        }
        (OFF | ROUTE, _, _) => return Err(Errno::INVAL),
        _ => return Err(Errno::OPNOTSUPP),
    };
    machine.set_interrupts(kind, start, events).map_err(|error| errno(&error))?;
    Ok(Answer::default())
}

fn region_read(machine: &Machine, mut fields: Fields<'_>, body: &[u8]) -> Result<Answer, Errno> {
    let (region, offset, len) = access(&mut fields)?;
    if !fields.rest().is_empty() {
        return Err(Errno::INVAL);
    }
    let mut answer = body.to_vec();
    answer.resize(body.len() + len, 0);
    machine.read(region, offset, &mut answer[body.len()..]).map_err(|error| errno(&error))?;
    Ok(answer.into())
}

fn region_write(machine: &Machine, mut fields: Fields<'_>, body: &[u8]) -> Result<Answer, Errno> {
    let (region, offset, len) = access(&mut fields)?;
    let data = fields.rest();
    if data.len() != len {
        return Err(Errno::INVAL);
    }
    machine.write(region, offset, data).map_err(|error| errno(&error))?;
    Ok(body[..16].to_vec().into())
}

fn access(fields: &mut Fields<'_>) -> Result<(RegionIndex, u64, usize), Errno> {
    let offset = u64_of(fields)?;
    let (index, len) = (u32_of(fields)?, u32_of(fields)? as usize);
    let region = region(index).ok_or(Errno::INVAL)?;
    if len <= wire::MAX_DATA_BYTES { Ok((region, offset, len)) } else { Err(Errno::INVAL) }
}

fn region(index: u32) -> Option<RegionIndex> {
    match index {
        0..=5 => Some(RegionIndex::Bar(index as u8)),
        7 => Some(RegionIndex::Config),
        _ => None,
    }
}

fn irq_kind(index: u32) -> Option<InterruptKind> {
    match index {
        1 => Some(InterruptKind::Msi),
        2 => Some(InterruptKind::Msix),
        3 => Some(InterruptKind::Error),
        4 => Some(InterruptKind::Request),
        _ => None,
    }
}

fn u32_of(fields: &mut Fields<'_>) -> Result<u32, Errno> {
    fields.u32().map_err(|_| Errno::INVAL)
}

fn u64_of(fields: &mut Fields<'_>) -> Result<u64, Errno> {
    fields.u64().map_err(|_| Errno::INVAL)
}

fn words(words: &[u32]) -> Answer {
    words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>().into()
}

fn errno(error: &MachineError) -> Errno {
    tracing::debug!(%error, "A request was refused");
    match error {
        MachineError::Removed => Errno::NODEV,
        MachineError::Map(MapError::Overlap { .. }) => Errno::EXIST,
        MachineError::Map(MapError::TooMany) => Errno::NOSPC,
        MachineError::Map(MapError::NotMapped { .. }) => Errno::NOENT,
        _ => Errno::INVAL,
    }
}

#[cfg(test)]
mod tests;
