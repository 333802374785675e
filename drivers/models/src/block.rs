//! A block server (NBD) that does wrong on order: it drops, delays, reorders, duplicates, damages, lies, cuts, and executes writes late.
//!
//! ```text
//!   connection: reader thread --request--> which fault is its turn? --> medium, now or by the clock --> answer (or none, two, another one)
//!   clock: what happens later happens whether its connection lives or not
//! ```
//! [`session`] is the protocol's server side. The medium is memory, or a file that outlives the server.

mod session;

use std::collections::{BinaryHeap, HashMap};
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use session::Peer;

/// What goes wrong with one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockFault {
    /// Not done, not answered.
    Drop,
    /// Done, not answered.
    DropAnswer,
    /// Answered long after it was done.
    Delay,
    /// A write is done long after, and never answered; its connection is cut.
    Late,
    /// Answered after the next one.
    Reorder,
    /// Answered twice.
    Duplicate,
    /// A bit is another one: of what is read, or of what is written.
    Corrupt,
    /// Answered as done, and not done.
    Lie,
    /// EIO.
    Error,
    /// ENOSPC.
    Full,
    /// The connection is closed instead of an answer.
    Cut,
    /// An answer without its magic.
    WrongMagic,
    /// An answer to a request that nobody made.
    WrongHandle,
    /// An answer that says it has more bytes than were asked for.
    TooLong,
    /// The connection ends in the middle of an answer.
    Half,
}

const NAMES: [(&str, BlockFault); 15] = [
    ("drop", BlockFault::Drop),
    ("drop-answer", BlockFault::DropAnswer),
    ("delay", BlockFault::Delay),
    ("late", BlockFault::Late),
    ("reorder", BlockFault::Reorder),
    ("duplicate", BlockFault::Duplicate),
    ("corrupt", BlockFault::Corrupt),
    ("lie", BlockFault::Lie),
    ("error", BlockFault::Error),
    ("full", BlockFault::Full),
    ("cut", BlockFault::Cut),
    ("wrong-magic", BlockFault::WrongMagic),
    ("wrong-handle", BlockFault::WrongHandle),
    ("too-long", BlockFault::TooLong),
    ("half", BlockFault::Half),
];

impl FromStr for BlockFault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = NAMES.iter().find(|(name, _)| *name == text).map(|(_, fault)| *fault);
        found.ok_or_else(|| {
            let names: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
            format!("{text:?} is no fault of a block server: {}", names.join(", "))
        })
    }
}

/// The n-th request from now on meets a fault, or each one by chance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockOrder {
    /// `drop@17`: counted from now on, requests for blocks alone.
    At(BlockFault, u64),
    /// `drop=5`: of a thousand.
    Chance(BlockFault, u64),
}

impl FromStr for BlockOrder {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |word: &str| word.parse::<u64>().map_err(|_| format!("{word:?} in {text:?} is no number"));
        match (text.split_once('@'), text.split_once('=')) {
            (Some((fault, count)), None) => Ok(Self::At(fault.parse()?, number(count)?.max(1))),
            (None, Some((fault, chance))) => Ok(Self::Chance(fault.parse()?, number(chance)?.min(1000))),
            _ => Err(format!("{text:?} is no order: write FAULT@N, or FAULT=THOUSANDTHS")),
        }
    }
}

/// What it exports, and how.
#[derive(Clone, Debug)]
pub struct BlockOptions {
    /// Bytes.
    pub size: u64,
    /// The medium, if it shall outlive the server.
    pub file: Option<PathBuf>,
    /// Name of the export; any other one is refused.
    pub export: String,
    /// Says that it may not be written.
    pub read_only: bool,
    /// Offers structured replies.
    pub structured: bool,
    /// Says that connections see the same.
    pub multi_conn: bool,
    /// Most bytes of a request.
    pub payload_max: u32,
    /// How long "later" is.
    pub late: Duration,
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self {
            size: 256 << 20,
            file: None,
            export: String::new(),
            read_only: false,
            structured: true,
            multi_conn: true,
            payload_max: 32 << 20,
            late: Duration::from_secs(1),
        }
    }
}

/// What it has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounters {
    /// Connections that were negotiated.
    pub connections: u64,
    /// Requests for blocks.
    pub reads: u64,
    /// See above.
    pub writes: u64,
    /// See above.
    pub trims: u64,
    /// Requests that met a fault.
    pub faults: u64,
    /// Late writes that were done.
    pub late_writes: u64,
}

#[derive(Debug, Default)]
struct Plan {
    at: Vec<(u64, BlockFault)>,
    chances: HashMap<BlockFault, u64>,
    count: u64,
    rng: u64,
}

impl Plan {
    fn next(&mut self) -> Option<BlockFault> {
        self.count += 1;
        if let Some(at) = self.at.iter().position(|(at, _)| *at == self.count) {
            return Some(self.at.swap_remove(at).1);
        }
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        let mut turn = self.rng % 1000;
        NAMES.iter().map(|(_, fault)| *fault).find(|fault| {
            let chance = self.chances.get(fault).copied().unwrap_or(0);
            let hit = turn < chance;
            turn = turn.saturating_sub(chance);
            hit
        })
    }
}

type Task = Box<dyn FnOnce() + Send>;

struct Due {
    at: Instant,
    number: u64,
    task: Task,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    /// The earliest one is the greatest.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

/// What happens later.
#[derive(Default)]
struct Agenda {
    due: Mutex<BinaryHeap<Due>>,
    changed: Condvar,
    number: AtomicU64,
}

impl Agenda {
    fn add(&self, after: Duration, task: Task) {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        due.push(Due { at: Instant::now() + after, number, task });
        self.changed.notify_one();
    }

    fn run(&self) {
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = due.peek().map(|next| next.at.saturating_duration_since(Instant::now()));
            due = match left {
                None => self.changed.wait(due).unwrap_or_else(PoisonError::into_inner),
                Some(left) if !left.is_zero() => {
                    self.changed.wait_timeout(due, left).unwrap_or_else(PoisonError::into_inner).0
                }
                Some(_) => {
                    let next = due.pop();
                    drop(due);
                    next.into_iter().for_each(|next| (next.task)());
                    self.due.lock().unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }
}

/// See the module head.
pub struct BlockServer {
    options: BlockOptions,
    medium: File,
    size: AtomicU64,
    late_ms: AtomicU64,
    plan: Mutex<Plan>,
    counters: Mutex<BlockCounters>,
    agenda: Arc<Agenda>,
    peers: Mutex<Vec<Weak<Peer>>>,
}

impl BlockServer {
    /// With an empty medium, or what its file holds.
    ///
    /// # Errors
    /// No memory, or no such file.
    pub fn new(options: BlockOptions) -> std::io::Result<Arc<Self>> {
        let medium = match &options.file {
            Some(path) => File::options().read(true).write(true).create(true).truncate(false).open(path)?,
            None => {
                let memory = uhmm_kernel_hook::memfd::create_sealed("uhmm-block-server", options.size);
                File::from(memory.map_err(std::io::Error::other)?)
            }
        };
        if options.file.is_some() && medium.metadata()?.len() < options.size {
            medium.set_len(options.size)?;
        }
        let server = Self {
            size: AtomicU64::new(options.size),
            late_ms: AtomicU64::new(options.late.as_millis() as u64),
            plan: Mutex::new(Plan { rng: 0x9e37_79b9_7f4a_7c15, ..Plan::default() }),
            counters: Mutex::default(),
            agenda: Arc::default(),
            peers: Mutex::default(),
            options,
            medium,
        };
        let agenda = server.agenda.clone();
        std::thread::Builder::new().name("clock".into()).spawn(move || agenda.run())?;
        Ok(Arc::new(server))
    }

    /// Serves whoever connects to a Unix socket. A socket that an earlier server has left is replaced.
    ///
    /// # Errors
    /// It cannot be bound, or not accept any more.
    pub fn serve_unix(self: &Arc<Self>, socket: &std::path::Path, ready: impl FnOnce()) -> std::io::Result<()> {
        if std::fs::symlink_metadata(socket).is_ok() {
            std::fs::remove_file(socket)?;
        }
        let listener = UnixListener::bind(socket)?;
        ready();
        for stream in listener.incoming() {
            let stream = stream?;
            self.begin(stream.try_clone()?, stream.try_clone()?, move || stream.shutdown(std::net::Shutdown::Both))?;
        }
        Ok(())
    }

    /// Serves whoever connects by TCP. `ready`: where it listens.
    ///
    /// # Errors
    /// It cannot be bound, or not accept any more.
    pub fn serve_tcp(self: &Arc<Self>, address: SocketAddr, ready: impl FnOnce(SocketAddr)) -> std::io::Result<()> {
        let listener = TcpListener::bind(address)?;
        ready(listener.local_addr()?);
        for stream in listener.incoming() {
            let stream = stream?;
            stream.set_nodelay(true)?;
            self.begin(stream.try_clone()?, stream.try_clone()?, move || stream.shutdown(std::net::Shutdown::Both))?;
        }
        Ok(())
    }

    fn begin(
        self: &Arc<Self>,
        reader: impl std::io::Read + Send + 'static,
        writer: impl std::io::Write + Send + 'static,
        cut: impl Fn() -> std::io::Result<()> + Send + Sync + 'static,
    ) -> std::io::Result<()> {
        let peer = Arc::new(Peer::new(writer, cut));
        let mut peers = lock(&self.peers);
        peers.retain(|peer| peer.strong_count() > 0);
        peers.push(Arc::downgrade(&peer));
        drop(peers);
        let server = self.clone();
        std::thread::Builder::new().name("connection".into()).spawn(move || {
            let ended = session::serve(&server, reader, &peer);
            tracing::info!(?ended, "Connection ended");
            peer.cut();
        })?;
        Ok(())
    }

    /// From now on.
    pub fn order(&self, order: BlockOrder) {
        let mut plan = lock(&self.plan);
        match order {
            BlockOrder::At(fault, count) => {
                let at = plan.count + count;
                plan.at.push((at, fault));
            }
            BlockOrder::Chance(fault, chance) => drop(plan.chances.insert(fault, chance)),
        }
    }

    /// How long "later" is from now on.
    pub fn set_late(&self, late: Duration) {
        self.late_ms.store(late.as_millis() as u64, Ordering::Relaxed);
    }

    /// Clients see another size from the next connection on; what lies behind it is refused from now on.
    pub fn set_size(&self, size: u64) {
        self.size.store(size.min(self.options.size), Ordering::Relaxed);
    }

    /// Closes every connection.
    pub fn cut(&self) {
        lock(&self.peers).iter().filter_map(Weak::upgrade).for_each(|peer| peer.cut());
    }

    /// What it has done.
    pub fn counters(&self) -> BlockCounters {
        *lock(&self.counters)
    }

    fn late(&self) -> Duration {
        Duration::from_millis(self.late_ms.load(Ordering::Relaxed))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_counted_from_when_they_are_given() {
        assert_eq!("late@3".parse(), Ok(BlockOrder::At(BlockFault::Late, 3)));
        assert_eq!("lie=7".parse(), Ok(BlockOrder::Chance(BlockFault::Lie, 7)));
        for wrong in ["late", "late@", "nothing@1", "lie=x", "a@1=2"] {
            assert!(wrong.parse::<BlockOrder>().is_err(), "{wrong}");
        }
        let server = BlockServer::new(BlockOptions { size: 4096, ..BlockOptions::default() }).unwrap();
        let next = || lock(&server.plan).next();
        assert_eq!(next(), None);
        server.order(BlockOrder::At(BlockFault::Cut, 2));
        assert_eq!((next(), next(), next()), (None, Some(BlockFault::Cut), None));
        server.order(BlockOrder::Chance(BlockFault::Error, 500));
        let hits = (0..1000).filter(|_| next() == Some(BlockFault::Error)).count();
        assert!((350..650).contains(&hits), "{hits} of 1000");
    }
}
