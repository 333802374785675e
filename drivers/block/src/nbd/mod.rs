//! The backend `nbd`: exports of block servers, one, or two that mirror each other.
//!
//! ```text
//!   driver       the service: servers, lanes, keeper, filler
//!   medium       taking exports, headers and their beat
//!   backend      (here) a lane's requests, over the mirror
//!   mirror       whom to ask, what answers come to                                 (pure)
//!   fill         servers that are behind
//!   client       one server: queue, connections, ended sessions
//!   connection   a socket under the protocol
//!   wire         the protocol: bytes in -> events, commands -> bytes out            (pure)
//! ```
//! docs/remote.md says what is promised and how it is known that an old session is over. NVMe over TCP would be a third transport: another `client`.

pub mod client;
mod connection;
mod driver;
mod fill;
pub mod medium;
pub mod mirror;
pub mod wire;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub use driver::{NbdDriver, run};

use uhmm_driver_kit::PAGE_BYTES;

use self::client::{Client, Mail, Packet};
use self::medium::Exports;
use self::mirror::{Mirror, Step};
use self::wire::Kind;
use crate::backend::{Answer, Backend, BlockRequest, Buffers, Clock};
use crate::header::HEADER_BYTES;
use crate::lane::Shared;
use crate::runs::Run;

/// A lane's way to its servers.
#[derive(Debug)]
pub struct NbdBackend {
    clients: Arc<Vec<Client>>,
    shared: Arc<Shared>,
    buffers: Buffers,
    fua: bool,
    mail: Arc<Mail>,
    mirror: Mirror,
    /// Blocks of requests in flight.
    blocks: std::collections::HashMap<u64, BlockRequest>,
    /// Who answered the reads that were answered last.
    served: std::collections::HashMap<u64, u32>,
    /// Dead sessions of each server that this lane knows.
    known: Vec<usize>,
    dead: Vec<u64>,
    clock: Clock,
}

impl NbdBackend {
    /// To and from `buffers`.
    pub fn new(exports: &Exports, buffers: Buffers) -> Self {
        let count = exports.clients.len();
        Self {
            clients: exports.clients.clone(),
            shared: exports.shared.clone(),
            buffers,
            fua: exports.fua,
            mail: Arc::default(),
            mirror: Mirror::new(count as u32),
            blocks: std::collections::HashMap::new(),
            served: std::collections::HashMap::new(),
            known: vec![0; count],
            dead: Vec::new(),
            clock: Clock::default(),
        }
    }

    fn up(&self) -> u32 {
        (0u32..).zip(self.clients.iter()).filter(|(_, client)| client.is_up()).fold(0, |mask, (at, _)| mask | 1 << at)
    }

    /// Replicas that have all of these blocks.
    fn has(&self, blocks: Run) -> u32 {
        let missing = (blocks.first..blocks.end()).map(|block| self.shared.table().missing(block).unwrap_or(u32::MAX));
        !missing.fold(0, |all, one| all | one)
    }

    fn set_behind(&self, replica: u32, blocks: Run) {
        for block in blocks.first..blocks.end() {
            if let Err(error) = self.shared.table().set_missing(block, replica, true) {
                tracing::error!(%error, "A mark in the block table cannot be set");
            }
        }
    }

    fn send(&self, request: &BlockRequest, replica: u32, hurry: bool) {
        let Some(client) = self.clients.get(replica as usize) else { return };
        client.submit(Packet {
            mail: self.mail.clone(),
            id: request.id,
            kind: if request.write { Kind::Write { fua: self.fua } } else { Kind::Read },
            offset: HEADER_BYTES + u64::from(request.blocks.first) * PAGE_BYTES,
            len: request.blocks.count * PAGE_BYTES as u32,
            memory: self.buffers.window.clone(),
            at: self.buffers.at(request.slot, 0),
            hurry,
            since: Instant::now(),
        });
    }

    fn carry_out(&mut self, request: BlockRequest, steps: Vec<Step>, answers: &mut Vec<(u64, Answer)>) {
        for step in steps {
            match step {
                Step::Send { replica, hurry } => self.send(&request, replica, hurry),
                Step::Behind(replica) => self.set_behind(replica, request.blocks),
                Step::Haunted(session) => self.shared.store().haunt(session, request.blocks),
                Step::Answer(answer) => {
                    self.blocks.remove(&request.id);
                    answers.push((request.id, answer));
                }
            }
        }
    }
}

impl Backend for NbdBackend {
    fn submit(&mut self, request: BlockRequest) {
        let BlockRequest { id, write, blocks, tries, .. } = request;
        let has = if write { 0 } else { self.has(blocks) };
        let steps = self.mirror.submit(id, write, tries, self.up(), has);
        self.blocks.insert(id, request);
        // A request is answered by whoever it is sent to, so nothing is answered here.
        self.carry_out(request, steps, &mut Vec::new());
    }

    fn wait(&mut self, patience: Duration, answers: &mut Vec<(u64, Answer)>) {
        self.served.clear();
        // What is dead now has left its answers in the mailbox before.
        for (known, client) in self.known.iter_mut().zip(self.clients.iter()) {
            let dead = client.dead_sessions(*known);
            *known += dead.len();
            self.dead.extend(dead);
        }
        let end = Instant::now() + patience;
        while answers.is_empty() && self.mirror.in_flight() > 0 {
            let left = end.saturating_duration_since(Instant::now());
            for (replica, id, answer) in self.mail.wait(left) {
                let Some(request) = self.blocks.get(&id).copied() else { continue };
                if !request.write {
                    self.served.insert(id, replica);
                }
                let steps = self.mirror.answered(replica, id, answer);
                self.carry_out(request, steps, answers);
            }
            if left.is_zero() {
                return;
            }
        }
        if answers.is_empty() && self.mirror.in_flight() == 0 && patience > Duration::ZERO && self.dead.is_empty() {
            // The machine waits for a moment, not for an answer.
            drop(self.mail.wait(end.saturating_duration_since(Instant::now())));
        }
    }

    fn wrong(&mut self, id: u64, blocks: Run) {
        // Another one may have it; then this one is filled anew.
        let Some(replica) = self.served.get(&id).copied() else { return };
        let others = self.has(blocks) & !(1 << replica) & ((1 << self.clients.len()) - 1);
        if others != 0 {
            tracing::warn!(url = %self.clients[replica as usize].url(), block = blocks.first, "A page came back wrong: the other server is asked");
            self.set_behind(replica, blocks);
        }
    }

    fn dead_sessions(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.dead)
    }

    fn now_us(&self) -> u64 {
        self.clock.now_us()
    }
}
