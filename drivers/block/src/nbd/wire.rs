//! The client's side of the NBD protocol, without a socket: bytes in -> events, commands -> bytes out. Pure.
//!
//! ```text
//!   Greeting --> (StructuredReply) --> Go --> Transmission --> whatever the server breaks: WireError, for good
//! ```
//! Fixed newstyle negotiation with NBD_OPT_GO; structured replies where the server has them. Nothing that a server says is believed: magics, lengths,
//! types and names of requests are checked where they enter, what a reply may carry is what was asked for, each byte of a read is taken once, and a read
//! has ended well only when all of it has come. Memory is bounded whatever a server says: 64 KiB of any reply that is no data.

use std::collections::HashMap;

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OLD_MAGIC: u64 = 0x0000_4202_8186_1253;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;
const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED: u32 = 8;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const FLAG_READ_ONLY: u16 = 1 << 1;
const FLAG_FLUSH: u16 = 1 << 2;
const FLAG_FUA: u16 = 1 << 3;
const FLAG_TRIM: u16 = 1 << 5;
const FLAG_MULTI_CONN: u16 = 1 << 8;

const COMMAND_FUA: u16 = 1;
const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_IS_ERROR: u16 = 1 << 15;
const CHUNK_ERROR_AT: u16 = CHUNK_IS_ERROR | 2;
/// Most bytes of a reply that is no data.
const TEXT_MAX: usize = 64 << 10;
/// Most replies to one option: a server that never stops answering is none.
const INFOS_MAX: u32 = 64;
/// A payload that every server takes, unless it says otherwise.
const PAYLOAD_DEFAULT: u32 = 32 << 20;

/// What a server offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// It has NBD_CMD_FLUSH.
    pub flush: bool,
    /// A write can be asked to be on the medium before it is acknowledged.
    pub fua: bool,
    /// It has NBD_CMD_TRIM.
    pub trim: bool,
    /// What is acknowledged on one connection is seen by all.
    pub multi_conn: bool,
    /// Answers reads in chunks.
    pub structured: bool,
    /// Smallest unit.
    pub block_min: u32,
    /// Most bytes of one request.
    pub payload_max: u32,
}

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes of the export.
    Read,
    /// Bytes to it. `fua`: to its medium.
    Write {
        /// See there.
        fua: bool,
    },
    /// They are not needed any more.
    Trim,
    /// What was acknowledged is on the medium.
    Flush,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// Never used twice on a connection.
    pub id: u64,
    /// What.
    pub kind: Kind,
    /// Where.
    pub offset: u64,
    /// How much.
    pub len: u32,
}

/// Why a connection is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not a server, or one of 2005.
    #[error("it is no NBD server of today ({0}): this driver needs newstyle negotiation with NBD_OPT_GO")]
    NotNbd(&'static str),
    /// It does not have the export, or not for us.
    #[error("it refuses export {name:?}: {reason}")]
    Refused {
        /// As asked for.
        name: String,
        /// What kind of refusal, and the server's own words.
        reason: String,
    },
    /// It breaks the protocol.
    #[error("it breaks the protocol: {0}")]
    Broken(&'static str),
}

/// An errno of a server's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerErrno(pub u32);

impl ServerErrno {
    /// The server goes away: the request was not done, and another connection may do it.
    pub fn is_shutdown(self) -> bool {
        self.0 == 108
    }
}

impl std::fmt::Display for ServerErrno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            1 => "EPERM (it does not allow that)",
            5 => "EIO (its medium failed)",
            12 => "ENOMEM (it is out of memory)",
            22 => "EINVAL (it does not know this request, or the export has shrunk)",
            28 => "ENOSPC (its medium is full)",
            75 => "EOVERFLOW (the request is too long)",
            95 => "ENOTSUP (it cannot do that)",
            108 => "ESHUTDOWN (it goes away)",
            other => return write!(f, "errno {other}"),
        })
    }
}

/// Who is told.
pub trait Sink {
    /// Negotiated: commands may be sent.
    fn ready(&mut self, export: Export);
    /// Bytes of a read, counted from its first one.
    fn data(&mut self, id: u64, at: u32, bytes: &[u8]);
    /// Zeroes of a read.
    fn zeroes(&mut self, id: u64, at: u32, len: u32);
    /// A command has ended.
    fn ended(&mut self, id: u64, result: Result<(), ServerErrno>);
}

#[derive(Debug, Default)]
struct Flight {
    read: bool,
    offset: u64,
    len: u32,
    /// Parts of a read that have come, sorted, none touching another.
    come: Vec<(u32, u32)>,
    errno: Option<ServerErrno>,
}

impl Flight {
    /// A part comes. False: it was there, or is not of this read.
    fn take(&mut self, at: u32, len: u32) -> bool {
        let Some(end) = at.checked_add(len).filter(|end| len > 0 && *end <= self.len) else { return false };
        let place = self.come.partition_point(|(_, other_end)| *other_end <= at);
        if self.come.get(place).is_some_and(|(begin, _)| *begin < end) {
            return false;
        }
        self.come.insert(place, (at, end));
        // Neighbours become one: as many as there are gaps stay.
        if self.come.get(place + 1).is_some_and(|(begin, _)| *begin == end) {
            self.come[place].1 = self.come.remove(place + 1).1;
        }
        if place > 0 && self.come[place - 1].1 == at {
            self.come[place - 1].1 = self.come.remove(place).1;
        }
        true
    }

    fn is_whole(&self) -> bool {
        !self.read || self.come == [(0, self.len)]
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Await {
    Greeting,
    OptionReply {
        option: u32,
    },
    Reply,
    /// What remains of a read's data.
    Data {
        id: u64,
        at: u32,
        left: u32,
        last: bool,
        simple: bool,
    },
}

/// See the module head.
#[derive(Debug)]
pub struct Wire {
    name: String,
    awaits: Await,
    export: Export,
    infos: u32,
    has_size: bool,
    flights: HashMap<u64, Flight>,
    /// Of a reply that has not come in full.
    held: Vec<u8>,
    out: Vec<u8>,
    broken: Option<WireError>,
}

fn be16(bytes: &[u8]) -> u16 {
    bytes.iter().take(2).fold(0, |word, byte| word << 8 | u16::from(*byte))
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).fold(0, |word, byte| word << 8 | u32::from(*byte))
}

fn be64(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// What a server wrote for people, as far as it can be shown.
fn words(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

impl Wire {
    /// Wants this export.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            awaits: Await::Greeting,
            export: Export { block_min: 1, payload_max: PAYLOAD_DEFAULT, ..Export::default() },
            infos: 0,
            has_size: false,
            flights: HashMap::new(),
            held: Vec::new(),
            out: Vec::new(),
            broken: None,
        }
    }

    /// To be sent, in order. Whoever sends a part of it takes that part away.
    pub fn output(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    /// Commands without an answer.
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Sends a command. What a write brings is appended to [`Wire::output`] by the caller: `len` bytes, at once.
    pub fn command(&mut self, command: Command) {
        let Command { id, kind, offset, len } = command;
        let (flags, code) = match kind {
            Kind::Read => (0, 0u16),
            Kind::Write { fua } => (if fua { COMMAND_FUA } else { 0 }, 1),
            Kind::Flush => (0, 3),
            Kind::Trim => (0, 4),
        };
        self.out.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        self.out.extend_from_slice(&flags.to_be_bytes());
        self.out.extend_from_slice(&code.to_be_bytes());
        self.out.extend_from_slice(&id.to_be_bytes());
        self.out.extend_from_slice(&offset.to_be_bytes());
        self.out.extend_from_slice(&len.to_be_bytes());
        self.flights.insert(id, Flight { read: kind == Kind::Read, offset, len, ..Flight::default() });
    }

    /// Says goodbye. Only when nothing is in flight.
    pub fn disconnect(&mut self) {
        self.out.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        self.out.extend_from_slice(&[0, 0, 0, 2]);
        self.out.extend_from_slice(&[0; 20]);
    }

    /// Bytes came from the server.
    ///
    /// # Errors
    /// The connection is of no use any more; every later call says the same.
    pub fn receive(&mut self, mut bytes: &[u8], sink: &mut dyn Sink) -> Result<(), WireError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        while !bytes.is_empty() {
            if let Err(error) = self.step(&mut bytes, sink) {
                self.broken = Some(error.clone());
                return Err(error);
            }
        }
        Ok(())
    }

    fn step(&mut self, bytes: &mut &[u8], sink: &mut dyn Sink) -> Result<(), WireError> {
        if let Await::Data { id, at, left, last, simple } = self.awaits {
            let count = bytes.len().min(left as usize);
            let (now, later) = bytes.split_at(count);
            *bytes = later;
            sink.data(id, at, now);
            let (at, left) = (at + count as u32, left - count as u32);
            self.awaits = Await::Data { id, at, left, last, simple };
            if left == 0 {
                self.awaits = Await::Reply;
                self.chunk_ended(id, last, sink)?;
            }
            return Ok(());
        }
        // Up to what is needed for the next decision.
        let needed = self.needed()?;
        let more = needed.saturating_sub(self.held.len()).min(bytes.len());
        let (now, later) = bytes.split_at(more);
        self.held.extend_from_slice(now);
        *bytes = later;
        if self.held.len() < needed || self.needed()? > self.held.len() {
            return Ok(());
        }
        let held = std::mem::take(&mut self.held);
        match self.awaits {
            Await::Greeting => self.greeted(&held),
            Await::OptionReply { option } => self.option_answered(option, &held, sink),
            Await::Reply => self.replied(&held, sink),
            Await::Data { .. } => Ok(()),
        }
    }

    /// Bytes of the reply that is awaited, as far as it is known.
    fn needed(&self) -> Result<usize, WireError> {
        let held = &self.held;
        match self.awaits {
            Await::Greeting => Ok(18),
            Await::OptionReply { .. } if held.len() < 20 => Ok(20),
            Await::OptionReply { .. } => bounded(20, be32(&held[16..]), "an option's reply is too long"),
            Await::Reply if held.len() < 4 => Ok(4),
            Await::Reply if be32(held) == SIMPLE_MAGIC => Ok(16),
            Await::Reply if be32(held) == CHUNK_MAGIC && self.export.structured => {
                if held.len() < 20 {
                    return Ok(20);
                }
                match be16(&held[6..]) {
                    // What follows is data, and is not held.
                    CHUNK_DATA => Ok(28),
                    _ => bounded(20, be32(&held[16..]), "a chunk without data is too long"),
                }
            }
            Await::Reply if be32(held) == CHUNK_MAGIC => {
                Err(WireError::Broken("a structured reply that nobody asked for"))
            }
            Await::Reply => Err(WireError::Broken("a reply without its magic")),
            Await::Data { .. } => Ok(0),
        }
    }

    fn greeted(&mut self, held: &[u8]) -> Result<(), WireError> {
        if be64(held) != NBD_MAGIC {
            return Err(WireError::NotNbd("its first bytes are something else's"));
        }
        match be64(&held[8..]) {
            OPTION_MAGIC => {}
            OLD_MAGIC => return Err(WireError::NotNbd("it speaks oldstyle")),
            _ => return Err(WireError::NotNbd("its greeting is unknown")),
        }
        let offered = be16(&held[16..]);
        if offered & FIXED_NEWSTYLE == 0 {
            return Err(WireError::NotNbd("it does not offer fixed newstyle"));
        }
        self.out.extend_from_slice(&u32::from(offered & (FIXED_NEWSTYLE | NO_ZEROES)).to_be_bytes());
        self.option(OPTION_STRUCTURED, &[]);
        Ok(())
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        self.out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        self.out.extend_from_slice(&option.to_be_bytes());
        self.out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        self.out.extend_from_slice(data);
        self.awaits = Await::OptionReply { option };
        self.infos = 0;
    }

    fn go(&mut self) {
        let mut data = (self.name.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(self.name.as_bytes());
        data.extend_from_slice(&1u16.to_be_bytes());
        data.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
        self.option(OPTION_GO, &data);
    }

    fn option_answered(&mut self, option: u32, held: &[u8], sink: &mut dyn Sink) -> Result<(), WireError> {
        if be64(held) != REPLY_MAGIC {
            return Err(WireError::Broken("an option's reply without its magic"));
        }
        if be32(&held[8..]) != option {
            return Err(WireError::Broken("a reply to an option that nobody asked for"));
        }
        let (kind, data) = (be32(&held[12..]), &held[20..]);
        self.infos += 1;
        match (option, kind) {
            _ if self.infos > INFOS_MAX => Err(WireError::Broken("it does not stop answering an option")),
            (OPTION_STRUCTURED, REP_ACK) => {
                self.export.structured = true;
                self.go();
                Ok(())
            }
            (OPTION_STRUCTURED, _) if kind & REP_ERROR != 0 => {
                self.go();
                Ok(())
            }
            (OPTION_GO, REP_INFO) => self.informed(data),
            (OPTION_GO, REP_ACK) => self.went(sink),
            (OPTION_GO, _) if kind & REP_ERROR != 0 => {
                Err(WireError::Refused { name: self.name.clone(), reason: refusal(kind, data) })
            }
            _ => Err(WireError::Broken("an answer of a kind that this option does not have")),
        }
    }

    fn informed(&mut self, data: &[u8]) -> Result<(), WireError> {
        if data.len() < 2 {
            return Err(WireError::Broken("an information without its kind"));
        }
        let (kind, data) = (be16(data), &data[2..]);
        match (kind, data.len()) {
            (INFO_EXPORT, 10) => {
                let flags = be16(&data[8..]);
                let has = |flag: u16| flags & flag != 0;
                self.export.size = be64(data);
                self.export.read_only = has(FLAG_READ_ONLY);
                (self.export.flush, self.export.fua) = (has(FLAG_FLUSH), has(FLAG_FUA));
                (self.export.trim, self.export.multi_conn) = (has(FLAG_TRIM), has(FLAG_MULTI_CONN));
                self.has_size = true;
                Ok(())
            }
            (INFO_BLOCK_SIZE, 12) => {
                let (min, max) = (be32(data), be32(&data[8..]));
                if !min.is_power_of_two() || max < min {
                    return Err(WireError::Broken("block sizes that cannot be"));
                }
                (self.export.block_min, self.export.payload_max) = (min, max);
                Ok(())
            }
            (INFO_EXPORT | INFO_BLOCK_SIZE, _) => Err(WireError::Broken("an information of a wrong length")),
            _ => Ok(()),
        }
    }

    fn went(&mut self, sink: &mut dyn Sink) -> Result<(), WireError> {
        if !self.has_size {
            return Err(WireError::Broken("an export without a size"));
        }
        self.awaits = Await::Reply;
        sink.ready(self.export);
        Ok(())
    }

    fn replied(&mut self, held: &[u8], sink: &mut dyn Sink) -> Result<(), WireError> {
        if be32(held) == SIMPLE_MAGIC {
            return self.simple(be64(&held[8..]), be32(&held[4..]), sink);
        }
        let (flags, kind, id, len) = (be16(&held[4..]), be16(&held[6..]), be64(&held[8..]), be32(&held[16..]));
        let last = flags & CHUNK_DONE != 0;
        let Some(flight) = self.flights.get_mut(&id) else {
            return Err(WireError::Broken("an answer to a request that nobody made"));
        };
        let place =
            |flight: &Flight, offset: u64| offset.checked_sub(flight.offset).and_then(|at| u32::try_from(at).ok());
        match kind {
            CHUNK_NONE if len == 0 && last => self.chunk_ended(id, true, sink),
            CHUNK_DATA if flight.read && len > 8 => {
                let at = place(flight, be64(&held[20..]));
                let Some(at) = at.filter(|at| flight.take(*at, len - 8)) else {
                    return Err(WireError::Broken("data that was not asked for, or came already"));
                };
                self.awaits = Await::Data { id, at, left: len - 8, last, simple: false };
                Ok(())
            }
            CHUNK_HOLE if flight.read && len == 12 => {
                let count = be32(&held[28..]);
                let at = place(flight, be64(&held[20..]));
                let Some(at) = at.filter(|at| flight.take(*at, count)) else {
                    return Err(WireError::Broken("a hole that was not asked for, or came already"));
                };
                sink.zeroes(id, at, count);
                self.chunk_ended(id, last, sink)
            }
            _ if kind & CHUNK_IS_ERROR != 0 => {
                let text = usize::from(be16(held.get(24..).unwrap_or_default()));
                let behind = if kind == CHUNK_ERROR_AT { 8 } else { 0 };
                let errno = be32(&held[20..]);
                // Errors of kinds that are not known may carry more.
                if held.len() < 26 + text + behind || errno == 0 {
                    return Err(WireError::Broken("an error of a wrong length, or without one"));
                }
                flight.errno = Some(ServerErrno(errno));
                self.chunk_ended(id, last, sink)
            }
            _ => Err(WireError::Broken("a chunk of a kind that this request does not have")),
        }
    }

    fn simple(&mut self, id: u64, errno: u32, sink: &mut dyn Sink) -> Result<(), WireError> {
        let Some(flight) = self.flights.get_mut(&id) else {
            return Err(WireError::Broken("an answer to a request that nobody made"));
        };
        if errno != 0 {
            flight.errno.get_or_insert(ServerErrno(errno));
        } else if flight.read && self.export.structured {
            return Err(WireError::Broken("a read that is not answered in chunks, as was agreed"));
        } else if flight.read {
            let len = flight.len;
            flight.take(0, len);
            self.awaits = Await::Data { id, at: 0, left: len, last: true, simple: true };
            return Ok(());
        }
        self.chunk_ended(id, true, sink)
    }

    fn chunk_ended(&mut self, id: u64, last: bool, sink: &mut dyn Sink) -> Result<(), WireError> {
        if !last {
            return Ok(());
        }
        let Some(flight) = self.flights.remove(&id) else {
            return Err(WireError::Broken("an answer to a request that nobody made"));
        };
        match flight.errno {
            Some(errno) => sink.ended(id, Err(errno)),
            None if flight.is_whole() => sink.ended(id, Ok(())),
            None => return Err(WireError::Broken("a read that ends before all of it has come")),
        }
        Ok(())
    }
}

fn bounded(head: usize, len: u32, why: &'static str) -> Result<usize, WireError> {
    if len as usize > TEXT_MAX { Err(WireError::Broken(why)) } else { Ok(head + len as usize) }
}

/// Why a server does not give an export.
fn refusal(kind: u32, data: &[u8]) -> String {
    let why = match kind & !REP_ERROR {
        1 => "it has no NBD_OPT_GO: use a newer server",
        2 => "its policy forbids it",
        3 => "it calls the request invalid",
        4 => "it cannot on its platform",
        5 => "it wants TLS, which this driver does not have: reach it through a tunnel, or a Unix socket",
        6 => "it has no export of that name",
        7 => "it is shutting down",
        8 => "it wants block sizes that this driver does not use",
        9 => "the name is too long",
        _ => "it does not say why",
    };
    match words(data) {
        text if text.is_empty() => why.to_owned(),
        text => format!("{why} ({text:?})"),
    }
}

#[cfg(test)]
mod tests;
