//! Taking exports: whose they are, that they are large enough, and that nobody else uses them.
//!
//! ```text
//!   connect -> may it be written, is there room? -> whose header? -> (somebody's that may live: does its beat go on?) -> header of a new life
//! ```
//! NBD has no locks. Whoever has an export counts its header's beat every [`BEAT`], and looks whether it is still his; whoever finds a header in use
//! watches it for longer than that. So a second system is refused while the first one lives, and takes what a dead one has left.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use uhmm_driver_kit::{DeviceError, DevicePort, Hint, MemoryOrigin, PAGE_BYTES};
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::{HookError, Window};
use uhmm_manifest::RemotePlan;

use super::client::{Client, Epoch, Settings};
use super::connection::{Link, LinkError};
use super::wire::Kind;
use crate::engine::Hold;
use crate::file::open::shape;
use crate::header::{Found, HEADER_BYTES, Header};
use crate::lane::Shared;
use crate::table::{Life, Table};

/// Between two beats.
pub const BEAT: Duration = Duration::from_secs(2);
/// A header whose beat stands still for so long is a dead system's.
const WATCH: Duration = Duration::from_secs(7);
/// A driver that goes on waits so long for its servers, before the supervisor tries it again.
const GO_ON_PATIENCE: Duration = Duration::from_secs(5);
/// Silence that ends a connection: alone, and where another server has the pages.
const SILENCE: Duration = Duration::from_secs(30);
const SILENCE_MIRRORED: Duration = Duration::from_secs(5);
const PAGE: u32 = PAGE_BYTES as u32;

/// Why an export is no device.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// Not there, or no server.
    #[error("block server {url}: {reason}")]
    Link {
        /// Which.
        url: String,
        /// Why.
        reason: LinkError,
    },
    /// Read-only.
    #[error("block server {url}: its export is read-only: export it for writing, or name another one")]
    ReadOnly {
        /// Which.
        url: String,
    },
    /// Blocks larger than pages, or requests smaller.
    #[error(
        "block server {url}: it wants requests of {min} to {max} bytes, and pages have 4096: export it with smaller blocks"
    )]
    Units {
        /// Which.
        url: String,
        /// Smallest.
        min: u32,
        /// Largest.
        max: u32,
    },
    /// No room.
    #[error(
        "block server {url}: its export has {size} bytes, and {needed} are needed: give a smaller memory_bytes, or a larger export"
    )]
    NoRoom {
        /// Which.
        url: String,
        /// Bytes there are.
        size: u64,
        /// Bytes wanted.
        needed: u64,
    },
    /// Somebody's data.
    #[error(
        "block server {url}: its export holds data that is not uhmm's ({hint}): name another one, or destroy it with `format = true` in the manifest's [[device]]"
    )]
    Foreign {
        /// Which.
        url: String,
        /// What it looks like.
        hint: Hint,
    },
    /// Its beat goes on.
    #[error(
        "block server {url}: its export is in use by another uhmm: stop that one (uhmm down), or name another export"
    )]
    InUse {
        /// Which.
        url: String,
    },
    /// The table's memory, threads.
    #[error(transparent)]
    Hook(#[from] HookError),
}

/// Exports that are this system's.
#[derive(Debug)]
pub struct Exports {
    /// One for each replica.
    pub clients: Arc<Vec<Client>>,
    /// Frames and blocks.
    pub shared: Arc<Shared>,
    /// The table's memory.
    pub table: Fd,
    /// Which life it is in.
    pub life: Life,
    /// Whether that began before.
    pub origin: MemoryOrigin,
    /// Pages of one request.
    pub pages: u32,
    /// Writes wait for the server's medium.
    pub fua: bool,
}

struct Opened {
    link: Link,
    found: Found,
    page: Vec<u8>,
}

/// Twice before a read's patience is over, if that is long.
fn silence(patience_s: u32) -> Duration {
    Duration::from_secs(u64::from(patience_s) / 2).clamp(SILENCE_MIRRORED, SILENCE)
}

fn check_export(url: &str, link: &Link, needed: u64) -> Result<(), RemoteError> {
    let (url, export) = (url.to_owned(), link.export);
    if export.read_only {
        return Err(RemoteError::ReadOnly { url });
    }
    if export.block_min > PAGE || export.payload_max < PAGE {
        return Err(RemoteError::Units { url, min: export.block_min, max: export.payload_max });
    }
    if export.size < needed {
        return Err(RemoteError::NoRoom { url, size: export.size, needed });
    }
    Ok(())
}

fn open(url: &uhmm_manifest::NbdUrl, needed: u64, whole: bool) -> Result<Opened, RemoteError> {
    let text = url.to_string();
    let failed = |reason| RemoteError::Link { url: text.clone(), reason };
    let mut link = Link::open(url).map_err(failed)?;
    check_export(&text, &link, needed)?;
    let len = if whole { HEADER_BYTES as u32 } else { PAGE };
    let step = len.min(link.export.payload_max & !(PAGE - 1));
    let mut begin = Vec::new();
    for at in (0..len).step_by(step as usize) {
        begin.extend(link.read(u64::from(at), step.min(len - at)).map_err(failed)?);
    }
    let found = Found::decode(&begin);
    begin.truncate(PAGE as usize);
    Ok(Opened { link, found, page: begin })
}

/// A header in use that is not ours: is anybody there?
fn watch(url: &str, opened: &mut Opened) -> Result<(), RemoteError> {
    let failed = |reason| RemoteError::Link { url: url.to_owned(), reason };
    let begin = std::time::Instant::now();
    tracing::info!(url, "Its header is in use: watching whether anybody is there");
    while begin.elapsed() < WATCH {
        std::thread::sleep(BEAT / 2);
        if opened.link.read(0, PAGE).map_err(failed)? != opened.page {
            return Err(RemoteError::InUse { url: url.to_owned() });
        }
    }
    Ok(())
}

/// What the manifest says, and what the last incarnation kept.
pub struct Wanted<'a> {
    /// Servers.
    pub plan: &'a RemotePlan,
    /// Bytes of device memory.
    pub memory_bytes: u64,
    /// Whatever it holds now.
    pub format: bool,
    /// Pages are sealed.
    pub sealed: bool,
    /// The table of the last incarnation.
    pub kept: Option<Fd>,
    /// Told when an export turns out to be somebody else's.
    pub port: DevicePort,
}

/// Goes on with what the last incarnation kept, or begins a new life.
///
/// # Errors
/// See [`RemoteError`].
pub fn take(wanted: &Wanted<'_>) -> Result<Exports, DeviceError> {
    if let Some(fd) = &wanted.kept {
        match go_on(wanted, fd)? {
            Some(exports) => return Ok(exports),
            None => tracing::error!("No server has what the last incarnation left there: the frames are given up"),
        }
    }
    begin(wanted)
}

/// With the table of the last incarnation, if a server has the header of its life.
fn go_on(wanted: &Wanted<'_>, fd: &Fd) -> Result<Option<Exports>, DeviceError> {
    let end = std::time::Instant::now() + GO_ON_PATIENCE;
    let (opened, life, blocks) = loop {
        let opened: Vec<_> = wanted.plan.urls.iter().map(|url| open(url, HEADER_BYTES, false)).collect();
        let ours = opened.iter().flatten().find_map(|opened| match opened.found {
            Found::Header(Header { in_use: true, life, blocks }) => Some((life, blocks)),
            _ => None,
        });
        // One that is away may be the one that has them.
        match (ours, opened.iter().all(Result::is_ok), std::time::Instant::now() > end) {
            (Some((life, blocks)), ..) => break (opened, life, blocks),
            (None, true, _) => return Ok(None),
            (None, _, true) => {
                let error = opened.into_iter().find_map(Result::err);
                return Err(error.map_or_else(|| "no server is here".into(), Into::into));
            }
            _ => std::thread::sleep(Duration::from_millis(100)),
        }
    };
    let frames = shape(wanted.memory_bytes).0;
    let Some(table) = Table::adopt(fd, frames, blocks, wanted.sealed)? else { return Ok(None) };
    if table.life()? != life {
        return Ok(None);
    }
    let shared = match Shared::open_after_death(table) {
        Ok(shared) => Arc::new(shared),
        Err(error) => {
            tracing::error!(%error, "The frames of the last incarnation are given up");
            return Ok(None);
        }
    };
    let links = opened.into_iter().map(Result::ok).collect();
    Ok(Some(start(wanted, links, shared, fd.clone(), life, MemoryOrigin::Adopted)?))
}

fn begin(wanted: &Wanted<'_>) -> Result<Exports, DeviceError> {
    let (frames, least) = shape(wanted.memory_bytes);
    let needed = HEADER_BYTES + u64::from(least) * PAGE_BYTES;
    let mut opened = Vec::new();
    for url in &wanted.plan.urls {
        let mut one = open(url, needed, true)?;
        match one.found {
            Found::Foreign(hint) if !wanted.format => {
                return Err(RemoteError::Foreign { url: url.to_string(), hint }.into());
            }
            Found::Header(Header { in_use: true, .. }) if !wanted.format => watch(&url.to_string(), &mut one)?,
            _ => {}
        }
        opened.push(one);
    }
    // What there is more of is room for pages to be written anew while old blocks rest.
    let room = opened.iter().map(|one| (one.link.export.size - HEADER_BYTES) / PAGE_BYTES).min().unwrap_or(0);
    let blocks = (room.min(u64::from(frames) * 2).min(u64::from(u32::MAX - 1)) as u32).max(least);
    let life = Life::draw()?;
    let (table, fd) = Table::create(frames, blocks, life, wanted.sealed)?;
    for (url, one) in wanted.plan.urls.iter().zip(&mut opened) {
        let failed = |reason| RemoteError::Link { url: url.to_string(), reason };
        one.link.write(0, &Header { in_use: true, life, blocks }.encode()).map_err(failed)?;
    }
    let shared = Arc::new(Shared::open(table).map_err(Box::new)?);
    let links = opened.into_iter().map(Some).collect();
    start(wanted, links, shared, fd, life, MemoryOrigin::Created)
}

fn start(
    wanted: &Wanted<'_>,
    opened: Vec<Option<Opened>>,
    shared: Arc<Shared>,
    table: Fd,
    life: Life,
    origin: MemoryOrigin,
) -> Result<Exports, DeviceError> {
    let plan = wanted.plan;
    let mirrored = plan.urls.len() > 1;
    let links = opened.iter().flatten().map(|opened| &opened.link.export);
    let payload = links.clone().map(|export| export.payload_max).min().unwrap_or(PAGE);
    let fua = plan.durable && links.clone().any(|export| export.fua);
    let mut clients = Vec::new();
    for ((replica, url), opened) in (0u32..).zip(&plan.urls).zip(opened) {
        let settings = Settings {
            url: url.clone(),
            replica,
            connections: plan.connections,
            patience: Duration::from_secs(u64::from(plan.patience_s)),
            settle: Duration::from_secs(u64::from(plan.settle_s)),
            silence: if mirrored { SILENCE_MIRRORED } else { silence(plan.patience_s) },
            epoch: Arc::default(),
        };
        let rule = Rule {
            url: url.to_string(),
            replica,
            mirrored,
            life,
            format: wanted.format,
            shared: shared.clone(),
            port: wanted.port.clone(),
            epoch: settings.epoch.clone(),
        };
        let mut link = opened.map(|opened| opened.link);
        if let Some(open) = &mut link
            && let Err(reason) = rule.check(open)
        {
            tracing::warn!(url = %url, reason, "Block server is not used");
            link = None;
        }
        // Blocks rest until the last server's time is over, and both have the same.
        let predecessor = origin == MemoryOrigin::Adopted && replica == 0;
        clients.push(Client::start(settings, link, predecessor, Box::new(move |link| rule.check(link)))?);
    }
    let pages = (payload / PAGE).clamp(1, crate::machine::PIECE_PAGES);
    Ok(Exports { clients: Arc::new(clients), shared, table, life, origin, pages, fua })
}

/// What a server must have when a connection to it is made.
struct Rule {
    url: String,
    replica: u32,
    mirrored: bool,
    life: Life,
    format: bool,
    shared: Arc<Shared>,
    port: DevicePort,
    epoch: Arc<Epoch>,
}

impl Rule {
    fn check(&self, link: &mut Link) -> Result<(), String> {
        let blocks = self.shared.table().blocks();
        let needed = HEADER_BYTES + u64::from(blocks) * PAGE_BYTES;
        check_export(&self.url, link, needed).map_err(|error| error.to_string())?;
        let begin = link.read(0, PAGE).map_err(|error| error.to_string())?;
        let found = Found::decode(&begin);
        let taken = match found {
            Found::Header(Header { in_use: true, life, .. }) if life == self.life => return Ok(()),
            Found::Empty | Found::Header(Header { in_use: false, .. }) => false,
            Found::Header(_) | Found::Foreign(_) => true,
        };
        let reason = format!("it holds something else than before ({found:?})");
        if !self.mirrored {
            self.port.lost(format!("block server {}: {reason}", self.url));
            return Err(reason);
        }
        if taken && !self.format {
            return Err(reason);
        }
        // A new one in the place of the old: it has nothing, before it is used.
        let header = Header { in_use: true, life: self.life, blocks }.encode();
        self.epoch.next(|| {
            for block in 0..blocks {
                self.shared.table().set_missing(block, self.replica, true).map_err(|error| error.to_string())?;
            }
            Ok::<(), String>(())
        })?;
        link.write(0, &header).map_err(|error| error.to_string())?;
        tracing::warn!(url = self.url, "A server without our pages is here: it is filled in the background");
        Ok(())
    }
}

/// Counts the beat of headers, and looks whether they are still ours.
#[derive(Debug)]
pub struct Keeper {
    clients: Arc<Vec<Client>>,
    blocks: u32,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Begins.
    ///
    /// # Errors
    /// Out of memory or threads.
    pub fn start(exports: &Exports, port: DevicePort) -> Result<Self, DeviceError> {
        let (clients, life, blocks) = (exports.clients.clone(), exports.life, exports.shared.table().blocks());
        let (stop, stopped) = mpsc::channel();
        let page = Arc::new(Window::anonymous(PAGE_BYTES)?);
        let beating = clients.clone();
        let thread = std::thread::Builder::new().name("nbd-beat".to_owned()).spawn(move || {
            let mut count = 0;
            while stopped.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
                count += 1;
                for client in beating.iter().filter(|client| client.is_up()) {
                    if let Err(reason) = beat(client, &page, Header { in_use: true, life, blocks }, count) {
                        port.lost(format!("block server {}: {reason}", client.url()));
                    }
                }
            }
        })?;
        Ok(Self { clients, blocks, stop: Some(stop), thread: Some(thread) })
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("The thread that keeps headers has panicked");
        }
    }
}

/// An error: somebody else has the export.
fn beat(client: &Client, page: &Arc<Window>, header: Header, count: u64) -> Result<(), String> {
    let mut begin = vec![0; PAGE as usize];
    // Whoever is away is looked at when it comes.
    let Ok(()) = client.transfer(Kind::Read, 0, page, PAGE, true) else { return Ok(()) };
    page.read(0, &mut begin).map_err(|error| error.to_string())?;
    match Found::decode(&begin) {
        Found::Header(found) if found == header => {}
        // A server that has just been exchanged: its connection's check decides.
        Found::Empty => return Ok(()),
        found => return Err(format!("somebody else has taken it ({found:?})")),
    }
    page.write(0, &header.encode_with_beat(count)).map_err(|error| error.to_string())?;
    if let Err(error) = client.transfer(Kind::Write { fua: false }, 0, page, PAGE, true) {
        tracing::warn!(%error, "A header's beat was not written");
    }
    Ok(())
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end();
    }
}

impl Hold for Keeper {
    fn kept(&self) -> Vec<(String, Fd)> {
        Vec::new()
    }

    /// Each server is told as far as it is here: one that is not finds a dead system's header later.
    fn give_back(&mut self, life: Life) -> Result<(), DeviceError> {
        self.end();
        let page = Arc::new(Window::anonymous(PAGE_BYTES)?);
        page.write(0, &Header { in_use: false, life, blocks: self.blocks }.encode())?;
        for client in self.clients.iter() {
            if let Err(error) = trim(client, self.blocks, &page) {
                tracing::warn!(%error, url = %client.url(), "Its room was not given back");
                continue;
            }
            if let Err(error) = client.transfer(Kind::Write { fua: true }, 0, &page, PAGE, true) {
                tracing::warn!(%error, url = %client.url(), "It was not given back");
            }
        }
        Ok(())
    }
}

/// Where it can. Nothing depends on it, but it must have ended before the export is somebody else's.
fn trim(client: &Client, blocks: u32, page: &Arc<Window>) -> Result<(), crate::machine::Fault> {
    if !client.can_trim() {
        return Ok(());
    }
    const STEP: u64 = 256 << 20;
    let end = HEADER_BYTES + u64::from(blocks) * PAGE_BYTES;
    for at in (HEADER_BYTES..end).step_by(STEP as usize) {
        client.transfer(Kind::Trim, at, page, STEP.min(end - at) as u32, true)?;
    }
    Ok(())
}
