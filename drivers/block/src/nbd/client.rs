//! One block server: a queue, connections that take from it, and what is known of sessions that have ended.
//!
//! ```text
//!   lanes --submit--> queue --> connection threads --> server
//!     ^                            |  lost: reads go back to the queue; writes are unknown, and the session is noted as ended
//!     +--------- mailboxes <-------+  then again, with a longer pause each time
//! ```
//! **When an ended session is dead** (nothing of it lands any more): its server was seen to close it *and* the process behind its Unix socket has ended; or
//! the time that the manifest allows (`settle_s`) has passed since its end. A close alone proves nothing: servers close before they have done what they had
//! begun. What we had not sent is never sent: the socket is reset, not closed.
//!
//! Lock order: the state's lock, then a mailbox's. Nothing is waited for under either.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uhmm_driver_kit::DeviceError;
use uhmm_kernel_hook::{EventFd, HookError, PidFd, Window};
use uhmm_manifest::NbdUrl;

use super::connection::{Link, Served, serve};
use super::wire::{Export, Kind};
use crate::backend::Answer;
use crate::machine::Fault;

/// A write waits so long for a server that is away. Its page stays at home then.
const WRITE_PATIENCE: Duration = Duration::from_secs(1);
/// Pauses between two tries to connect.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Numbers of sessions, of all servers. 0 is the predecessor's.
static NEXT_SESSION: AtomicU64 = AtomicU64::new(1);

/// How a server is used.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where.
    pub url: NbdUrl,
    /// Which of the replicas.
    pub replica: u32,
    /// Connections, if it allows several.
    pub connections: u32,
    /// How long reads wait for it while it is away.
    pub patience: Duration,
    /// How long after its end a session's writes may land.
    pub settle: Duration,
    /// A request that is not answered for so long ends the connection.
    pub silence: Duration,
    /// Which server it is, as far as that is known: another one has lost what the first one had.
    pub epoch: Arc<Epoch>,
}

/// Counts servers in the same place.
#[derive(Debug, Default)]
pub struct Epoch(Mutex<u64>);

impl Epoch {
    fn lock(&self) -> MutexGuard<'_, u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which.
    pub fn now(&self) -> u64 {
        *self.lock()
    }

    /// Another one is here. `then`: before anybody believes anything of it.
    pub fn next<T>(&self, then: impl FnOnce() -> T) -> T {
        let mut count = self.lock();
        *count += 1;
        then()
    }

    /// Unless another one has come meanwhile.
    pub fn during<T>(&self, epoch: u64, then: impl FnOnce() -> T) -> Option<T> {
        let count = self.lock();
        (*count == epoch).then(then)
    }
}

/// Where answers go: replica, request, answer.
#[derive(Debug, Default)]
pub struct Mail {
    answers: Mutex<Vec<(u32, u64, Answer)>>,
    come: Condvar,
}

impl Mail {
    fn push(&self, replica: u32, id: u64, answer: Answer) {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).push((replica, id, answer));
        self.come.notify_one();
    }

    /// What has come, or comes until then.
    pub fn wait(&self, patience: Duration) -> Vec<(u32, u64, Answer)> {
        let end = Instant::now() + patience;
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if !answers.is_empty() || left.is_zero() {
                return std::mem::take(&mut answers);
            }
            answers = self.come.wait_timeout(answers, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A request.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Where its answer goes.
    pub mail: Arc<Mail>,
    /// The asker's name for it.
    pub id: u64,
    /// What.
    pub kind: Kind,
    /// Where on the export.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
    /// Memory that is read or written until it is answered.
    pub memory: Arc<Window>,
    /// Where in it.
    pub at: u64,
    /// Do not wait while the server is away.
    pub hurry: bool,
    /// When it was asked for.
    pub since: Instant,
}

/// A session with writes that nobody has answered.
#[derive(Debug)]
pub(super) struct Ended {
    pub session: u64,
    pub at: Instant,
    /// The server's end of it was seen.
    pub closed: bool,
    /// Who listened, if that is known.
    pub peer: Option<PidFd>,
}

impl Ended {
    fn is_dead(&self, settle: Duration) -> bool {
        let gone = || self.peer.as_ref().is_some_and(|peer| peer.exited().unwrap_or(false));
        self.at.elapsed() >= settle || self.closed && gone()
    }
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Packet>,
    up: u32,
    trim: bool,
    away_since: Option<Instant>,
    reason: String,
    /// Several connections see the same.
    multi: bool,
    sleeping: Vec<bool>,
    ended: Vec<Ended>,
    dead: Vec<u64>,
    stop: bool,
}

/// Who looks at an export before a new connection to it is used.
pub type Check = dyn Fn(&mut Link) -> Result<(), String> + Send + Sync;

/// What threads and lanes share.
pub(super) struct Shared {
    pub(super) settings: Settings,
    pub(super) wakes: Vec<EventFd>,
    check: Box<Check>,
    state: Mutex<State>,
    changed: Condvar,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("url", &self.settings.url.to_string()).finish_non_exhaustive()
    }
}

/// See the module head.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Client {
    /// Begins. `link`: a connection that is there already. `predecessor`: one may have left writes. `check`: on each new connection.
    ///
    /// # Errors
    /// Out of threads or descriptors.
    pub fn start(
        settings: Settings,
        link: Option<Link>,
        predecessor: bool,
        check: Box<Check>,
    ) -> Result<Self, DeviceError> {
        let count = settings.connections.max(1) as usize;
        let wakes = (0..count).map(|_| EventFd::new()).collect::<Result<_, HookError>>()?;
        let mut state = State { sleeping: vec![false; count], ..State::default() };
        state.multi = link.as_ref().is_some_and(|link| link.export.multi_conn);
        if link.is_none() {
            (state.away_since, state.reason) = (Some(Instant::now()), "it was away at the start".to_owned());
        }
        if predecessor {
            let session = crate::store::PREDECESSOR;
            state.ended.push(Ended { session, at: Instant::now(), closed: false, peer: None });
        }
        let shared = Arc::new(Shared { settings, wakes, check, state: Mutex::new(state), changed: Condvar::new() });
        let mut client = Self { shared, threads: Vec::new() };
        let mut first = link;
        for index in 0..count {
            let (shared, link) = (client.shared.clone(), first.take());
            let thread = std::thread::Builder::new().name("nbd".to_owned()).spawn(move || shared.run(index, link));
            client.threads.push(thread?);
        }
        Ok(client)
    }

    /// Which server.
    pub fn url(&self) -> &NbdUrl {
        &self.shared.settings.url
    }

    /// Asks. The answer comes into its mailbox, always.
    pub fn submit(&self, packet: Packet) {
        let mut state = self.shared.lock();
        if let Some(fault) = self.shared.refusal(&state, &packet) {
            drop(state);
            return packet.mail.push(self.shared.settings.replica, packet.id, Answer::Failed(fault));
        }
        state.queue.push_back(packet);
        self.shared.wake_one(&mut state);
    }

    /// One from start to end.
    ///
    /// # Errors
    /// It was not done in time, or at all.
    pub fn transfer(&self, kind: Kind, offset: u64, memory: &Arc<Window>, len: u32, hurry: bool) -> Result<(), Fault> {
        match self.ask(kind, offset, memory, len, hurry) {
            Answer::Done => Ok(()),
            Answer::Failed(fault) | Answer::Unknown(_, fault) => Err(fault),
        }
    }

    /// The same, in full.
    pub fn ask(&self, kind: Kind, offset: u64, memory: &Arc<Window>, len: u32, hurry: bool) -> Answer {
        let mail = Arc::new(Mail::default());
        let (memory, since) = (memory.clone(), Instant::now());
        self.submit(Packet { mail: mail.clone(), id: 0, kind, offset, len, memory, at: 0, hurry, since });
        loop {
            // It is answered in any case, and its memory is used until then.
            if let Some((.., answer)) = mail.wait(Duration::from_secs(60)).pop() {
                return answer;
            }
        }
    }

    /// It has NBD_CMD_TRIM.
    pub fn can_trim(&self) -> bool {
        self.shared.lock().trim
    }

    /// Which server it is.
    pub fn epoch(&self) -> &Epoch {
        &self.shared.settings.epoch
    }

    /// A connection is up.
    pub fn is_up(&self) -> bool {
        self.shared.lock().up > 0
    }

    /// Sessions of which nothing lands any more, in the order in which that was noticed; those behind the first `known`.
    pub fn dead_sessions(&self, known: usize) -> Vec<u64> {
        let mut state = self.shared.lock();
        if !state.ended.is_empty() {
            let settle = self.shared.settings.settle;
            let (dead, alive) = std::mem::take(&mut state.ended).into_iter().partition(|ended| ended.is_dead(settle));
            state.ended = alive;
            let dead: Vec<Ended> = dead;
            state.dead.extend(dead.iter().map(|ended| ended.session));
        }
        state.dead.get(known..).unwrap_or_default().to_vec()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        for wake in &self.shared.wakes {
            if let Err(error) = wake.signal() {
                tracing::warn!(%error, "A connection was not told to end");
            }
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("A connection's thread has panicked");
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics under it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_one(&self, state: &mut State) {
        let Some(index) = state.sleeping.iter().position(|sleeping| *sleeping) else { return };
        state.sleeping[index] = false;
        if let Err(error) = self.wakes[index].signal() {
            tracing::error!(%error, "A connection was not woken");
        }
    }

    /// While the server is away, not everybody waits for it.
    fn refusal(&self, state: &State, packet: &Packet) -> Option<Fault> {
        let since = state.away_since.filter(|_| state.up == 0)?;
        let patience = match packet.kind {
            _ if packet.hurry => Duration::ZERO,
            Kind::Read => self.settings.patience,
            _ => WRITE_PATIENCE,
        };
        let waited = since.elapsed();
        let fault = || {
            let seconds = since.elapsed().as_secs();
            Fault::Refused(format!(
                "block server {} has been away for {seconds} s: {}",
                self.settings.url, state.reason
            ))
        };
        (waited >= patience || state.stop).then(fault)
    }

    /// Those who do not wait any longer are told so.
    fn expire(&self) {
        let mut state = self.lock();
        let queue = std::mem::take(&mut state.queue);
        let mut told = Vec::new();
        for packet in queue {
            match self.refusal(&state, &packet) {
                Some(fault) => told.push((packet, fault)),
                None => state.queue.push_back(packet),
            }
        }
        drop(state);
        for (packet, fault) in told {
            packet.mail.push(self.settings.replica, packet.id, Answer::Failed(fault));
        }
    }

    /// For a connection: up to `room` packets that it sends now. Without any it is woken when there is one.
    pub(super) fn take(&self, index: usize, room: usize) -> (Vec<Packet>, bool) {
        let mut state = self.lock();
        let count = state.queue.len().min(room);
        let packets: Vec<Packet> = state.queue.drain(..count).collect();
        // One that is full looks again when it is not.
        state.sleeping[index] = state.queue.is_empty() && room > 0;
        (packets, state.stop)
    }

    pub(super) fn answer(&self, packet: &Packet, answer: Answer) {
        packet.mail.push(self.settings.replica, packet.id, answer);
    }

    /// A connection has ended with these in flight.
    fn broken(&self, left: Vec<Packet>, closed: bool, peer: Option<PidFd>, reason: &str) {
        let session = NEXT_SESSION.fetch_add(1, Ordering::Relaxed);
        let lost = |what: &str| Fault::Refused(format!("block server {}: {what}: {reason}", self.settings.url));
        let (reads, others): (Vec<Packet>, Vec<Packet>) =
            left.into_iter().partition(|packet| packet.kind == Kind::Read);
        let writes = others.iter().any(|packet| matches!(packet.kind, Kind::Write { .. }));
        for packet in others {
            let fault = lost("the connection was lost before it had answered");
            let may_land = matches!(packet.kind, Kind::Write { .. });
            self.answer(&packet, if may_land { Answer::Unknown(session, fault) } else { Answer::Failed(fault) });
        }
        // A read changes nothing, so it may be asked again.
        let (again, over): (Vec<Packet>, Vec<Packet>) =
            reads.into_iter().partition(|packet| !packet.hurry && packet.since.elapsed() < self.settings.patience);
        over.iter().for_each(|packet| self.answer(packet, Answer::Failed(lost("it did not answer a read"))));
        let mut state = self.lock();
        again.into_iter().rev().for_each(|packet| state.queue.push_front(packet));
        // After the answers: whoever is told that a session is dead has been told before what it left.
        if writes {
            state.ended.push(Ended { session, at: Instant::now(), closed, peer });
        }
        self.wake_one(&mut state);
    }

    fn note_up(&self, export: Option<&Export>) {
        let mut state = self.lock();
        if let Some(export) = export {
            state.up += 1;
            state.away_since = None;
            (state.multi, state.trim) = (export.multi_conn, export.trim);
        } else {
            state.up -= 1;
            if state.up == 0 {
                state.away_since = Some(Instant::now());
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// A pause in which nobody is kept waiting too long. False: it is over for good.
    fn pause(&self, length: Duration) -> bool {
        let end = Instant::now() + length;
        loop {
            self.expire();
            let state = self.lock();
            let left = end.saturating_duration_since(Instant::now());
            if state.stop || left.is_zero() {
                return !state.stop;
            }
            // Hurried and patient ones come in at any time: `submit` refuses the first, this loop the others.
            let left = left.min(Duration::from_millis(100));
            drop(self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// All but the first connection exist where several see the same.
    fn wait_for_turn(&self, index: usize) -> bool {
        let mut state = self.lock();
        while !state.stop && index > 0 && !(state.multi && state.up > 0) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        !state.stop
    }

    fn run(&self, index: usize, mut link: Option<Link>) {
        let mut length = PAUSE_MIN;
        while self.wait_for_turn(index) {
            let opened = match link.take() {
                Some(link) => Ok(link),
                None => Link::open(&self.settings.url).map_err(|error| error.to_string()).and_then(|mut link| {
                    (self.check)(&mut link)?;
                    Ok(link)
                }),
            };
            match opened {
                Ok(link) if index > 0 && !link.export.multi_conn => drop(link),
                Ok(link) => {
                    // One that has answered is worth another try soon.
                    if self.use_link(index, link) {
                        length = PAUSE_MIN;
                    }
                }
                Err(reason) => {
                    let mut state = self.lock();
                    if state.reason != reason {
                        tracing::warn!(url = %self.settings.url, reason, "Block server cannot be reached");
                    }
                    state.reason = reason;
                }
            }
            if !self.pause(length) {
                break;
            }
            length = (length * 2).min(PAUSE_MAX);
        }
        self.expire();
    }

    /// True: it has answered something.
    fn use_link(&self, index: usize, mut link: Link) -> bool {
        self.note_up(Some(&link.export));
        let Export { size, structured, multi_conn, trim, fua, .. } = link.export;
        tracing::info!(url = %self.settings.url, index, size, structured, multi_conn, trim, fua, "Block server is here");
        let Served { reason, closed, left, answered } = serve(self, index, &mut link);
        let stopped = self.lock().stop;
        let peer = link.reset();
        if !stopped {
            tracing::warn!(url = %self.settings.url, index, reason, in_flight = left.len(), "Block server's connection is lost");
        }
        self.lock().reason.clone_from(&reason);
        self.note_up(None);
        self.broken(left, closed, peer, &reason);
        answered
    }
}
