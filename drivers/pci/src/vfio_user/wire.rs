//! vfio-user's messages, for both ends: a 16-byte header, then fields in the order of VFIO's structs, little endian.
//!
//! ```text
//!   header: id u16 | command u16 | size of all u32 | flags u32 | errno u32        descriptors beside the first byte
//! ```
//! Nothing that comes is believed: sizes are checked before memory is taken for them, fields are read with bounds, and what is left over is
//! an error.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use uhmm_kernel_hook::{HookError, Stream, StreamStatus};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 16;
/// The most data bytes that one read or write of a region carries here.
pub const MAX_DATA_BYTES: usize = 1 << 20;
/// The most descriptors that one message carries here.
pub const MAX_MSG_FDS: usize = 64;
/// Room for fields and version text beside data.
const MAX_BODY_BYTES: usize = MAX_DATA_BYTES + 4096;

/// What a message asks for.
pub mod command {
    /// Both ends tell their version and limits, first of all.
    pub const VERSION: u16 = 1;
    /// The device may reach memory.
    pub const DMA_MAP: u16 = 2;
    /// The device may not any more.
    pub const DMA_UNMAP: u16 = 3;
    /// How many regions and interrupt kinds there are.
    pub const DEVICE_GET_INFO: u16 = 4;
    /// Size and rights of a region.
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    /// How many vectors a kind has.
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    /// Route vectors to eventfds.
    pub const DEVICE_SET_IRQS: u16 = 8;
    /// Read by call.
    pub const REGION_READ: u16 = 9;
    /// Write by call.
    pub const REGION_WRITE: u16 = 10;
    /// Function-level reset.
    pub const DEVICE_RESET: u16 = 13;
}

/// The bits of [`Header::flags`] and of the commands' own `flags`.
pub mod flag {
    /// Bits that tell commands (0) from replies (1).
    pub const TYPE_MASK: u32 = 0xf;
    /// This is a reply.
    pub const REPLY: u32 = 1;
    /// The sender wants no reply.
    pub const NO_REPLY: u32 = 1 << 4;
    /// A reply that only says why not.
    pub const ERROR: u32 = 1 << 5;

    /// Device info: it can be reset.
    pub const DEVICE_RESET: u32 = 1;
    /// Device info: it is a PCI device.
    pub const DEVICE_PCI: u32 = 2;

    /// Region info: readable, writable.
    pub const REGION_READ_WRITE: u32 = 3;
    /// Region info: it can be mapped.
    pub const REGION_MMAP: u32 = 4;
    /// Region info: capabilities follow.
    pub const REGION_CAPS: u32 = 8;

    /// The device reads.
    pub const DMA_READ: u32 = 1;
    /// The device writes.
    pub const DMA_WRITE: u32 = 2;
    /// Every mapping goes.
    pub const UNMAP_ALL: u32 = 4;

    /// Interrupt info: it goes to an eventfd.
    pub const IRQ_EVENTFD: u32 = 1;
    /// Set interrupts: no data.
    pub const IRQ_DATA_NONE: u32 = 1;
    /// Set interrupts: descriptors.
    pub const IRQ_DATA_EVENTFD: u32 = 4;
    /// Set interrupts: about signalling.
    pub const IRQ_ACTION_TRIGGER: u32 = 32;
}

/// The capability that lists which areas of a region can be mapped.
pub const CAP_SPARSE_MMAP: u16 = 1;
/// Bytes of a region's info without capabilities.
pub const REGION_INFO_BYTES: usize = 32;
/// Numbers of interrupt kinds: INTx, MSI, MSI-X, error, request.
pub const IRQ_KINDS: u32 = 5;
/// Regions of a PCI device: six BARs, ROM, config space, VGA.
pub const REGIONS: u32 = 9;

/// Why a message did not come or go. The connection is of no use any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The other end.
    #[error("The other end has closed the connection")]
    Closed,
    /// Nothing came for so long.
    #[error("The other end did not answer within {} ms", .0.as_millis())]
    Silent(Duration),
    /// Not the protocol.
    #[error("The other end broke the vfio-user protocol: {0}")]
    Broken(&'static str),
    /// The system.
    #[error("The socket failed")]
    Hook(#[source] HookError),
}

impl From<HookError> for WireError {
    fn from(error: HookError) -> Self {
        match error {
            HookError::BadMessage(_) => Self::Broken("a message carries too many descriptors, or nothing"),
            other => Self::Hook(other),
        }
    }
}

/// The first bytes of every message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// A reply has its command's.
    pub id: u16,
    /// See [`command`].
    pub command: u16,
    /// See [`flag`].
    pub flags: u32,
    /// The reason in an error reply.
    pub errno: u32,
}

/// A message that came.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// What follows.
    pub body: Vec<u8>,
    /// Descriptors.
    pub fds: Vec<OwnedFd>,
}

/// Sends one message.
///
/// # Errors
/// The connection is of no use any more.
pub fn send(
    stream: &Stream,
    header: Header,
    body: &[u8],
    fds: &[BorrowedFd<'_>],
    limit: Duration,
) -> Result<(), WireError> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend(header.id.to_le_bytes());
    bytes.extend(header.command.to_le_bytes());
    bytes.extend(((HEADER_BYTES + body.len()) as u32).to_le_bytes());
    bytes.extend(header.flags.to_le_bytes());
    bytes.extend(header.errno.to_le_bytes());
    bytes.extend(body);
    done(stream.send(&bytes, fds, Some(Instant::now() + limit))?, limit)
}

/// Waits for one message: for its first byte until `first` (`None`: for ever), for the rest `limit` long.
///
/// # Errors
/// The connection is of no use any more.
pub fn receive(stream: &Stream, first: Option<Duration>, limit: Duration) -> Result<Message, WireError> {
    let mut fds = Vec::new();
    let mut bytes = [0; HEADER_BYTES];
    let (start, rest) = bytes.split_at_mut(1);
    done(
        stream.recv(start, &mut fds, MAX_MSG_FDS, first.map(|first| Instant::now() + first))?,
        first.unwrap_or(limit),
    )?;
    let deadline = Some(Instant::now() + limit);
    done(stream.recv(rest, &mut fds, MAX_MSG_FDS, deadline)?, limit)?;
    let mut fields = Fields::new(&bytes);
    let (id, command) = (fields.u16()?, fields.u16()?);
    let size = fields.u32()? as usize;
    let header = Header { id, command, flags: fields.u32()?, errno: fields.u32()? };
    let len = size.checked_sub(HEADER_BYTES).filter(|len| *len <= MAX_BODY_BYTES);
    let mut body = vec![0; len.ok_or(WireError::Broken("a message has an impossible size"))?];
    done(stream.recv(&mut body, &mut fds, MAX_MSG_FDS, deadline)?, limit)?;
    Ok(Message { header, body, fds })
}

fn done(status: StreamStatus, limit: Duration) -> Result<(), WireError> {
    match status {
        StreamStatus::Done => Ok(()),
        StreamStatus::Closed => Err(WireError::Closed),
        StreamStatus::TimedOut => Err(WireError::Silent(limit)),
    }
}

/// Reads fields one after the other.
#[derive(Clone, Debug)]
pub struct Fields<'a> {
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    /// From the first byte.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// The next two bytes.
    ///
    /// # Errors
    /// `Broken`: there are no more.
    pub fn u16(&mut self) -> Result<u16, WireError> {
        self.take().map(u16::from_le_bytes)
    }

    /// The next four bytes.
    ///
    /// # Errors
    /// `Broken`: there are no more.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        self.take().map(u32::from_le_bytes)
    }

    /// The next eight bytes.
    ///
    /// # Errors
    /// `Broken`: there are no more.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        self.take().map(u64::from_le_bytes)
    }

    /// What is left.
    pub fn rest(self) -> &'a [u8] {
        self.bytes
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (taken, rest) = self.bytes.split_first_chunk().ok_or(WireError::Broken("a message is too short"))?;
        self.bytes = rest;
        Ok(*taken)
    }
}

/// What one end tells of itself in its version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Descriptors in a message.
    pub max_msg_fds: usize,
    /// Data bytes of a region access.
    pub max_data_bytes: usize,
}

/// The body of our own version message.
pub fn version_body() -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(0u16.to_le_bytes());
    body.extend(1u16.to_le_bytes());
    let text = serde_json::json!({ "capabilities": {
        "max_msg_fds": MAX_MSG_FDS,
        "max_data_xfer_size": MAX_DATA_BYTES,
        "migration": { "pgsize": uhmm_kernel_hook::PAGE_SIZE },
    }});
    body.extend(text.to_string().into_bytes());
    body.push(0);
    body
}

/// The other end's limits, cut to ours. What it does not tell has the protocol's defaults.
///
/// # Errors
/// `Broken`: another major version, or no JSON.
pub fn parse_version(body: &[u8]) -> Result<Limits, WireError> {
    let mut fields = Fields::new(body);
    let (major, _minor) = (fields.u16()?, fields.u16()?);
    if major != 0 {
        return Err(WireError::Broken("it speaks another major version than 0"));
    }
    let text = fields.rest();
    let text = text.strip_suffix(&[0]).unwrap_or(text);
    let json = match text {
        [] => serde_json::Value::Null,
        text => serde_json::from_slice(text).map_err(|_| WireError::Broken("its capabilities are no JSON"))?,
    };
    let number = |name: &str, default: usize, most: usize| {
        let value = json.get("capabilities").and_then(|all| all.get(name)).and_then(serde_json::Value::as_u64);
        value.map_or(default, |value| usize::try_from(value).unwrap_or(most)).min(most)
    };
    let max_msg_fds = number("max_msg_fds", 1, MAX_MSG_FDS);
    let max_data_bytes = number("max_data_xfer_size", MAX_DATA_BYTES, MAX_DATA_BYTES);
    if max_data_bytes < 8 {
        return Err(WireError::Broken("it takes less than 8 bytes at once"));
    }
    Ok(Limits { max_msg_fds: max_msg_fds.max(1), max_data_bytes })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use uhmm_kernel_hook::EventFd;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(200);

    #[test]
    fn a_message_comes_as_it_went() {
        let (one, other) = Stream::pair().unwrap();
        let event = EventFd::new().unwrap();
        let header = Header { id: 7, command: command::DMA_MAP, flags: flag::NO_REPLY, errno: 3 };
        send(&one, header, &[1, 2, 3, 4, 5, 6], &[event.as_fd()], LIMIT).unwrap();
        let message = receive(&other, Some(LIMIT), LIMIT).unwrap();
        assert_eq!((message.header, message.fds.len()), (header, 1));
        let mut fields = Fields::new(&message.body);
        assert_eq!((fields.u16().unwrap(), fields.u32().unwrap()), (0x201, 0x0605_0403));
        assert!(fields.u16().is_err() && fields.u64().is_err() && fields.rest().is_empty());
    }

    #[test]
    fn impossible_sizes_and_silence_end_at_once() {
        for size in [0u32, 15, (HEADER_BYTES + MAX_BODY_BYTES) as u32 + 1, u32::MAX] {
            let (one, other) = Stream::pair().unwrap();
            let mut bytes = [0; HEADER_BYTES];
            bytes[4..8].copy_from_slice(&size.to_le_bytes());
            assert_eq!(one.send(&bytes, &[], None).unwrap(), StreamStatus::Done);
            assert!(matches!(receive(&other, Some(LIMIT), LIMIT), Err(WireError::Broken(_))), "{size}");
        }
        let (one, other) = Stream::pair().unwrap();
        assert!(matches!(receive(&other, Some(LIMIT), LIMIT), Err(WireError::Silent(_))));
        assert_eq!(one.send(&[1, 2, 3], &[], None).unwrap(), StreamStatus::Done);
        assert!(matches!(receive(&other, None, LIMIT), Err(WireError::Silent(_))));
        drop(one);
        assert!(matches!(receive(&other, None, LIMIT), Err(WireError::Closed)));
    }

    #[test]
    fn versions_bring_limits_within_our_own() {
        let ours = parse_version(&version_body()).unwrap();
        assert_eq!(ours, Limits { max_msg_fds: MAX_MSG_FDS, max_data_bytes: MAX_DATA_BYTES });
        assert_eq!(parse_version(&[0, 0, 9, 0]).unwrap().max_msg_fds, 1);
        let huge = b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":99999999999999999999,\"max_data_xfer_size\":4096}}\0";
        assert_eq!(parse_version(huge).unwrap(), Limits { max_msg_fds: 1, max_data_bytes: 4096 });
        for bad in [&b""[..], b"\x01\0\0\0", b"\0\0\0\0{", b"\0\0\0\0{\"capabilities\":{\"max_data_xfer_size\":1}}"] {
            assert!(parse_version(bad).is_err(), "{bad:?}");
        }
    }
}
