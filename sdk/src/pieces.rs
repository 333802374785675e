//! Bytes between the program and a driver, for accesses of any length: through a few small buffers that are used again and again.
//!
//! ```text
//!   the whole range, once:  Map --one range fault--> everything is there and may be accessed, or nothing begins
//!   then, piece by piece:   [ asked ] [ asked ] [ asked ]      the driver copies the next ones
//!                               `--> answered: copied out      while the program's thread copies this one
//! ```
//! A buffer of the whole length would be allocated, zeroed, mapped page by page on both sides and freed again, which costs ten times
//! the copy; a small one stays in the cache between the two copies. One device's buffers are no other driver's to see.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use uhmm_ipc::message::driver::AccessOp;
use uhmm_kernel_hook::{Prot, Window, memfd};

use crate::Error;
use crate::device::{AccessReport, Device};
use crate::links::{Held, Links};
use crate::pending::Pending;
use crate::range::{check_length, check_range};

/// Some of them stay in the cache, and a message costs little beside the copy of one (measured: 1 MiB costs a fifth more CPU, 256 KiB a half).
/// Drivers keep buffers of up to this length mapped.
const PIECE_BYTES: u64 = 2 << 20;
/// Pieces that are asked for at once: one is being copied out, one in, and one waits for its turn.
const IN_FLIGHT: usize = 3;
/// Buffers that stay for the next access.
const KEPT: usize = 2 * IN_FLIGHT;

/// Memory between this process and a driver.
pub(crate) struct Buffer {
    pub(crate) memory: Held,
    pub(crate) window: Window,
}

impl Buffer {
    pub(crate) fn new(links: &Links, len_bytes: u64) -> Result<Self, Error> {
        check_length(len_bytes)?;
        let (memory, window) = links.hold(move || {
            let failed = || Error::kernel("Making a device buffer");
            let memory = memfd::create_sealed("uhmm-buffer", len_bytes).map_err(failed())?;
            let window = Window::map(memory.as_fd(), 0, len_bytes, Prot::ReadWrite).map_err(failed())?;
            Ok((memory, window))
        })?;
        Ok(Self { memory, window })
    }

    pub(crate) fn bytes(&self) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; self.window.len() as usize];
        self.window.read(0, &mut bytes).map_err(Error::kernel("Reading a device buffer"))?;
        Ok(bytes)
    }
}

/// Buffers of pieces that nobody uses now.
#[derive(Default)]
pub(crate) struct Buffers {
    free: Mutex<Vec<Buffer>>,
}

impl Buffers {
    fn take(&self, links: &Links) -> Result<Buffer, Error> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.map_or_else(|| Buffer::new(links, PIECE_BYTES), Ok)
    }

    fn put(&self, buffer: Buffer) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < KEPT {
            free.push(buffer);
        }
    }
}

/// The program's end of an access.
pub(crate) enum Bytes<'a> {
    Into(&'a mut [u8]),
    From(&'a [u8]),
    /// As many words as there is room for.
    Words(&'a mut [u64]),
}

impl Bytes<'_> {
    /// Before a piece is asked for.
    fn fill(&self, buffer: &Buffer, at: u64, len: u64) -> Result<(), Error> {
        match self {
            Self::From(from) => {
                let from = &from[at as usize..(at + len) as usize];
                buffer.window.write(0, from).map_err(Error::kernel("Filling a device buffer"))
            }
            Self::Into(_) | Self::Words(_) => Ok(()),
        }
    }

    /// When it is answered.
    fn take(&mut self, buffer: &Buffer, at: u64, len: u64) -> Result<(), Error> {
        let reading = Error::kernel("Reading a device buffer");
        match self {
            Self::From(_) => Ok(()),
            Self::Into(into) => {
                let into = &mut into[at as usize..(at + len) as usize];
                buffer.window.read(0, into).map_err(reading)
            }
            Self::Words(into) => {
                let room = into.len();
                let into = &mut into[room.min(at as usize / 8)..room.min((at + len) as usize / 8)];
                buffer.window.read_words(0, into).map_err(reading)
            }
        }
    }
}

/// A part of an access that the driver has been asked for.
struct Piece {
    at: u64,
    len: u64,
    answer: Pending<(Option<Buffer>, AccessReport)>,
}

impl Device {
    /// See the module head. What one of them fails with is the access's; those that were asked for have ended when this returns.
    pub(crate) fn access_in_pieces(
        &self,
        addr: u64,
        len_bytes: u64,
        op: AccessOp,
        mut bytes: Bytes<'_>,
    ) -> Result<AccessReport, Error> {
        let mut report = AccessReport { page_count: check_range(addr, len_bytes)?, fault_count: 0 };
        if len_bytes > PIECE_BYTES {
            let map = if op == AccessOp::Read { AccessOp::Map } else { AccessOp::MapForWrite };
            let mapped = self.access(addr, len_bytes, map, None, None, |_, report| Ok(report))?.wait()?;
            report.fault_count += mapped.fault_count;
        }
        let (mut asked, mut failed) = (0, None);
        let mut flight: VecDeque<Piece> = VecDeque::new();
        loop {
            let goes_on = failed.is_none() && asked < len_bytes;
            if goes_on && flight.len() < IN_FLIGHT {
                match self.ask_piece(addr, (asked, PIECE_BYTES.min(len_bytes - asked)), op, &bytes) {
                    Ok(piece) => {
                        asked += piece.len;
                        flight.push_back(piece);
                    }
                    Err(error) => failed = Some(error),
                }
                continue;
            }
            let Some(Piece { at, len, answer }) = flight.pop_front() else { break };
            match answer.wait() {
                Ok((buffer, part)) => {
                    report.fault_count += part.fault_count;
                    let Some(buffer) = buffer else { continue };
                    if failed.is_none() {
                        failed = bytes.take(&buffer, at, len).err();
                    }
                    self.buffers.put(buffer);
                }
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(report), Err)
    }

    fn ask_piece(&self, addr: u64, (at, len): (u64, u64), op: AccessOp, bytes: &Bytes<'_>) -> Result<Piece, Error> {
        let buffer = self.buffers.take(&self.session.links)?;
        bytes.fill(&buffer, at, len)?;
        let answer = self.access(addr + at, len, op, Some(buffer), None, |buffer, report| Ok((buffer, report)))?;
        Ok(Piece { at, len, answer })
    }
}
