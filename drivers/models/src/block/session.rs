//! One client of a block server: negotiation, and requests with what goes wrong with them.

use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::{BlockFault, BlockServer, lock};

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const ERR_UNSUPPORTED: u32 = (1 << 31) + 1;
const ERR_UNKNOWN: u32 = (1 << 31) + 6;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EPERM: u32 = 1;
/// Longest option.
const OPTION_MAX: u32 = 64 << 10;

type Cut = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// Where answers go.
pub(super) struct Peer {
    writer: Mutex<Box<dyn Write + Send>>,
    cut: Cut,
    /// An answer that goes after the next one.
    held: Mutex<Option<Vec<u8>>>,
}

impl Peer {
    pub(super) fn new(
        writer: impl Write + Send + 'static,
        cut: impl Fn() -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self { writer: Mutex::new(Box::new(writer)), cut: Box::new(cut), held: Mutex::default() }
    }

    /// Ends the connection. One that has ended already is none.
    pub(super) fn cut(&self) {
        drop((self.cut)());
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let held = lock(&self.held).take();
        let mut writer = lock(&self.writer);
        writer.write_all(bytes)?;
        held.into_iter().try_for_each(|held| writer.write_all(&held))?;
        writer.flush()
    }
}

fn word(reader: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    reader.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn long(reader: &mut impl Read) -> io::Result<u64> {
    Ok(u64::from(word(reader)?) << 32 | u64::from(word(reader)?))
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// From greeting to goodbye.
pub(super) fn serve(server: &Arc<BlockServer>, mut reader: impl Read, peer: &Arc<Peer>) -> io::Result<()> {
    let mut greeting = b"NBDMAGIC".to_vec();
    greeting.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    greeting.extend_from_slice(&3u16.to_be_bytes());
    peer.send(&greeting)?;
    word(&mut reader)?;
    let mut structured = false;
    loop {
        if long(&mut reader)? != OPTION_MAGIC {
            return Err(wrong("an option without its magic"));
        }
        let (option, len) = (word(&mut reader)?, word(&mut reader)?);
        if len > OPTION_MAX {
            return Err(wrong("an option that is too long"));
        }
        let mut data = vec![0; len as usize];
        reader.read_exact(&mut data)?;
        let reply = |kind: u32, data: &[u8]| {
            let mut bytes = REPLY_MAGIC.to_be_bytes().to_vec();
            [option, kind, data.len() as u32].iter().for_each(|word| bytes.extend_from_slice(&word.to_be_bytes()));
            bytes.extend_from_slice(data);
            peer.send(&bytes)
        };
        match option {
            2 => return reply(REP_ACK, &[]),
            8 if server.options.structured && data.is_empty() => {
                structured = true;
                reply(REP_ACK, &[])?;
            }
            7 => {
                let name_len =
                    data.get(..4).map_or(0, |bytes| bytes.iter().fold(0, |all, byte| all << 8 | usize::from(*byte)));
                if data.get(4..4 + name_len) != Some(server.options.export.as_bytes()) {
                    reply(ERR_UNKNOWN, b"there is no such export here")?;
                    continue;
                }
                reply(REP_INFO, &export(server))?;
                let sizes = [1, 4096, server.options.payload_max];
                let sizes: Vec<u8> = sizes.iter().flat_map(|word| word.to_be_bytes()).collect();
                reply(REP_INFO, &[&3u16.to_be_bytes()[..], &sizes].concat())?;
                reply(REP_ACK, &[])?;
                break;
            }
            _ => reply(ERR_UNSUPPORTED, &[])?,
        }
    }
    lock(&server.counters).connections += 1;
    let mut client = Client { server: server.clone(), peer: peer.clone(), structured };
    while client.request(&mut reader)? {}
    Ok(())
}

fn export(server: &BlockServer) -> Vec<u8> {
    let options = &server.options;
    // Flags, flush, FUA, trim.
    let flags = 0b10_1101 | u16::from(options.read_only) << 1 | u16::from(options.multi_conn) << 8;
    let size = server.size.load(Ordering::Relaxed);
    [&0u16.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat()
}

/// A request whose data has come.
struct Request {
    code: u16,
    id: u64,
    offset: u64,
    len: u32,
    data: Vec<u8>,
}

#[derive(Clone)]
struct Client {
    server: Arc<BlockServer>,
    peer: Arc<Peer>,
    structured: bool,
}

impl Client {
    /// False: goodbye.
    fn request(&mut self, reader: &mut impl Read) -> io::Result<bool> {
        if word(reader)? != REQUEST_MAGIC {
            return Err(wrong("a request without its magic"));
        }
        let kind = word(reader)?;
        let (id, offset, len) = (long(reader)?, long(reader)?, word(reader)?);
        let code = kind as u16;
        if code == 2 {
            return Ok(false);
        }
        let mut data = Vec::new();
        if code == 1 {
            if len > self.server.options.payload_max {
                return Err(wrong("a write that is too long"));
            }
            data.resize(len as usize, 0);
            reader.read_exact(&mut data)?;
        }
        self.handle(Request { code, id, offset, len, data })?;
        Ok(true)
    }

    fn handle(&self, request: Request) -> io::Result<()> {
        {
            let mut counters = lock(&self.server.counters);
            match request.code {
                0 => counters.reads += 1,
                1 => counters.writes += 1,
                4 => counters.trims += 1,
                _ => {}
            }
        }
        // Nothing goes wrong with headers: a device that is refused is another test.
        let is_block = request.code <= 1 && request.offset >= 1 << 20;
        let fault = if is_block { lock(&self.server.plan).next() } else { None };
        let Some(fault) = fault else {
            let answer = self.perform(&request);
            return self.peer.send(&answer);
        };
        lock(&self.server.counters).faults += 1;
        tracing::info!(?fault, code = request.code, offset = request.offset, len = request.len, "On order");
        self.go_wrong(fault, request)
    }

    fn go_wrong(&self, fault: BlockFault, mut request: Request) -> io::Result<()> {
        let id = request.id;
        match fault {
            BlockFault::Drop => Ok(()),
            BlockFault::DropAnswer => {
                self.perform(&request);
                Ok(())
            }
            BlockFault::Delay => {
                let (answer, peer) = (self.perform(&request), self.peer.clone());
                // A client that has gone meanwhile is no fault.
                self.server.agenda.add(self.server.late(), Box::new(move || drop(peer.send(&answer))));
                Ok(())
            }
            BlockFault::Late => {
                let client = self.clone();
                self.server.agenda.add(
                    self.server.late(),
                    Box::new(move || {
                        client.perform(&request);
                        lock(&client.server.counters).late_writes += u64::from(request.code == 1);
                    }),
                );
                self.peer.cut();
                Ok(())
            }
            BlockFault::Reorder => {
                let answer = self.perform(&request);
                // Not in one expression: the lock would be held while it is taken again.
                let earlier = lock(&self.peer.held).replace(answer);
                earlier.map_or(Ok(()), |earlier| self.peer.send(&earlier))?;
                // Without a next one it goes by itself.
                let peer = self.peer.clone();
                self.server.agenda.add(std::time::Duration::from_millis(5), Box::new(move || drop(peer.send(&[]))));
                Ok(())
            }
            BlockFault::Duplicate => {
                let answer = self.perform(&request);
                self.peer.send(&answer)?;
                self.peer.send(&answer)
            }
            BlockFault::Corrupt => {
                if let Some(byte) = request.data.get_mut(1000) {
                    *byte ^= 0x10;
                }
                let mut answer = self.perform(&request);
                if request.code == 0
                    && let Some(byte) = answer.iter_mut().rev().nth(1000)
                {
                    *byte ^= 0x10;
                }
                self.peer.send(&answer)
            }
            BlockFault::Lie => self.peer.send(&self.answer(&request, Ok(vec![0x5a; self.len_of(&request)]))),
            BlockFault::Error => self.peer.send(&self.answer(&request, Err(EIO))),
            BlockFault::Full => self.peer.send(&self.answer(&request, Err(ENOSPC))),
            BlockFault::Cut => Err(wrong("cut on order")),
            BlockFault::WrongMagic => {
                let mut answer = self.perform(&request);
                answer[0] ^= 0xff;
                self.peer.send(&answer)
            }
            BlockFault::WrongHandle => {
                request.id = id ^ 0x55;
                let answer = self.perform(&request);
                self.peer.send(&answer)
            }
            BlockFault::TooLong => {
                // What it says of a write is true: only a lie says otherwise.
                self.perform(&request);
                let longer = vec![0; self.len_of(&request) + 4096];
                self.peer.send(&self.answer(&request, Ok(longer)))
            }
            BlockFault::Half => {
                let answer = self.perform(&request);
                self.peer.send(&answer[..answer.len() / 2])?;
                Err(wrong("cut in the middle on order"))
            }
        }
    }

    fn len_of(&self, request: &Request) -> usize {
        if request.code == 0 { request.len as usize } else { 0 }
    }

    /// Does it, and says so.
    fn perform(&self, request: &Request) -> Vec<u8> {
        let server = &self.server;
        let end = request.offset.checked_add(u64::from(request.len));
        let inside = end.is_some_and(|end| end <= server.size.load(Ordering::Relaxed));
        let done = match request.code {
            3 => Ok(Vec::new()),
            _ if !inside || request.len > server.options.payload_max && request.code == 0 => Err(EINVAL),
            0 => {
                let mut bytes = vec![0; request.len as usize];
                server.medium.read_exact_at(&mut bytes, request.offset).map(|()| bytes).map_err(|_| EIO)
            }
            _ if server.options.read_only => Err(EPERM),
            1 => server.medium.write_all_at(&request.data, request.offset).map(|()| Vec::new()).map_err(|_| EIO),
            // Trimmed bytes may be anything.
            4 => Ok(Vec::new()),
            _ => Err(EINVAL),
        };
        self.answer(request, done)
    }

    fn answer(&self, request: &Request, done: Result<Vec<u8>, u32>) -> Vec<u8> {
        let mut bytes = Vec::new();
        if request.code != 0 || !self.structured {
            bytes.extend_from_slice(&SIMPLE_MAGIC.to_be_bytes());
            bytes.extend_from_slice(&done.as_ref().err().copied().unwrap_or(0).to_be_bytes());
            bytes.extend_from_slice(&request.id.to_be_bytes());
            bytes.extend(done.unwrap_or_default());
            return bytes;
        }
        let mut chunk = |flags: u16, kind: u16, payload: &[&[u8]]| {
            bytes.extend_from_slice(&CHUNK_MAGIC.to_be_bytes());
            bytes.extend_from_slice(&flags.to_be_bytes());
            bytes.extend_from_slice(&kind.to_be_bytes());
            bytes.extend_from_slice(&request.id.to_be_bytes());
            bytes.extend_from_slice(&(payload.iter().map(|part| part.len()).sum::<usize>() as u32).to_be_bytes());
            payload.iter().for_each(|part| bytes.extend_from_slice(part));
        };
        match done {
            Err(errno) => chunk(1, 1 << 15 | 1, &[&errno.to_be_bytes(), &[0, 0]]),
            // In two parts, the second one first: as a server may.
            Ok(data) if data.len() > 4096 => {
                let (first, second) = data.split_at(4096);
                chunk(0, 1, &[&(request.offset + 4096).to_be_bytes(), second]);
                chunk(1, 1, &[&request.offset.to_be_bytes(), first]);
            }
            Ok(data) if data.iter().all(|byte| *byte == 0) && !data.is_empty() => {
                chunk(0, 2, &[&request.offset.to_be_bytes(), &(data.len() as u32).to_be_bytes()]);
                chunk(1, 0, &[]);
            }
            Ok(data) => chunk(1, 1, &[&request.offset.to_be_bytes(), &data]),
        }
        bytes
    }
}
