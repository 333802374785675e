//! Forks that take more than a turn, and what was read with them.
//!
//! ```text
//!   read:  change, FORK, change, fault        journal 0
//!                  `-- the core clones, some pages a turn -- Cloned --> change, fault --> journal 0 is free again
//!          meanwhile others are read:         journal 1, 2 ...
//! ```
//! Until a forked child has its entries nothing more is read of its parent's address space, nor acted on of what was read with the fork:
//! it happened after it. So nothing is put in place there either, its agent is not listened to (an answer would overtake the event of what
//! the agent has done), and calls of the parent wait. Its threads wait by themselves; nobody else does.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::sync::Arc;

use uhmm_ipc::message::{Call, TraceId, pager};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kernel_hook::uffd::{Change, EventJournal, KeptEvent, UffdEvent};
use uhmm_kernel_hook::window::Window;
use uhmm_kernel_hook::{AddrRange, HookError, Prot, memfd};
use uhmm_kit::Service;
use uhmm_pager_core::{Pages, RegionId};

use crate::service::Pager;
use crate::space::{Birth, Segment};

/// One is read into while others wait for their forks. When all wait, nobody is read.
const JOURNALS: usize = 16;
/// Names of events of one journal are none of another's.
const BATCHES: u64 = 1 << 40;
const VAULT_NAME: &str = "journal";

/// See the module head.
#[derive(Debug)]
pub(crate) struct Journals {
    all: Vec<EventJournal>,
    waiting: BTreeSet<usize>,
}

impl Journals {
    /// Those of the vault, or new ones.
    pub(crate) fn new(service: &mut Service) -> Result<Self, HookError> {
        let len = EventJournal::LEN_BYTES;
        let mut kept: BTreeMap<String, _> = service.vault.take(VAULT_NAME).into_iter().collect();
        let mut all = Vec::new();
        for index in 0..JOURNALS {
            let name = if index == 0 { VAULT_NAME.to_owned() } else { format!("{VAULT_NAME}/{index}") };
            let fd = match kept.remove(&name).filter(|fd| memfd::check_sealed(fd.as_fd(), len).is_ok()) {
                Some(fd) => fd,
                None => {
                    let fd = Arc::new(memfd::create_sealed("uhmm-journal", len)?);
                    service.vault.put(&mut service.reactor, &name, fd.clone());
                    fd
                }
            };
            let window = Window::map(fd.as_fd(), 0, len, Prot::ReadWrite)?;
            let journal = EventJournal::new(window, service.incarnation);
            journal.begin_at(index as u64 * BATCHES)?;
            all.push(journal);
        }
        Ok(Self { all, waiting: BTreeSet::new() })
    }

    /// Notes of children are in this one.
    pub(crate) fn notes(&self) -> &EventJournal {
        &self.all[0]
    }

    pub(crate) fn at(&self, index: usize) -> &EventJournal {
        &self.all[index]
    }

    /// One to read into.
    pub(crate) fn free(&self) -> Option<usize> {
        (0..self.all.len()).find(|index| !self.waiting.contains(index))
    }

    fn all(&self) -> impl Iterator<Item = (usize, &EventJournal)> {
        self.all.iter().enumerate()
    }
}

/// What a userfaultfd has told.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Told {
    Fault { addr: u64, write: bool, wp: bool, minor: bool },
    Unmap { start: u64, end: u64 },
    Remove { start: u64, end: u64 },
    Remap { from: u64, to: u64, len: u64 },
    Fork { child: Option<u64> },
}

impl Told {
    /// `child`: what was made of the descriptor that the event brought.
    pub(crate) fn of(event: &UffdEvent, child: Option<u64>) -> Self {
        match *event {
            UffdEvent::Fault { addr, write, wp, minor, .. } => Self::Fault { addr, write, wp, minor },
            UffdEvent::Unmap { start, end } => Self::Unmap { start, end },
            UffdEvent::Remove { start, end } => Self::Remove { start, end },
            UffdEvent::Remap { from, to, len } => Self::Remap { from, to, len },
            UffdEvent::Fork { .. } => Self::Fork { child },
        }
    }

    fn again(event: Change, child: Option<u64>) -> Self {
        match event {
            Change::Unmap { start, end } => Self::Unmap { start, end },
            Change::Remove { start, end } => Self::Remove { start, end },
            Change::Remap { from, to, len } => Self::Remap { from, to, len },
            Change::Fork { .. } => Self::Fork { child },
        }
    }

    pub(crate) fn is_fault(&self) -> bool {
        matches!(self, Self::Fault { .. })
    }
}

/// Events that were read at once, with their slots, as far as they are not dealt with.
#[derive(Debug)]
pub(crate) struct Batch {
    pub journal: usize,
    pub told: Vec<(usize, Told)>,
    /// A dead pager has read them.
    pub again: bool,
}

/// A fork whose child has not got all of its entries.
#[derive(Debug)]
pub(crate) struct Forking {
    pub parent: u64,
    /// All that is cloned, and what of it is not complete.
    pub clones: Vec<u64>,
    pub left: BTreeSet<u64>,
    /// Some regions could not be cloned.
    pub lost: bool,
    /// What the child finds empty.
    pub wiped: Vec<AddrRange>,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Forks {
    /// By child.
    under_way: BTreeMap<u64, Forking>,
    /// Children that have everything.
    complete: Vec<u64>,
    /// What parents' address spaces have told behind their forks.
    behind: BTreeMap<u64, Batch>,
    /// What parents have asked meanwhile.
    calls: BTreeMap<u64, Vec<(ConnId, CallId, TraceId, Call)>>,
}

impl Forks {
    pub(crate) fn is_any_complete(&self) -> bool {
        !self.complete.is_empty()
    }

    fn is_idle(&self) -> bool {
        self.under_way.is_empty() && self.behind.is_empty()
    }

    /// See the module head.
    pub(crate) fn stands_still(&self, space: u64) -> bool {
        self.under_way.values().any(|forking| forking.parent == space) || self.behind.contains_key(&space)
    }
}

impl Pager {
    /// The core has been told of a fork.
    pub(crate) fn begin_forking(&mut self, child: u64, forking: Forking) {
        if forking.left.is_empty() {
            self.forks.complete.push(child);
        }
        self.forks.under_way.insert(child, forking);
    }

    /// A child's region has all of its entries, or is gone.
    pub(crate) fn clone_is_complete(&mut self, region: u64) {
        let clones = |(_, forking): &(&u64, &mut Forking)| forking.left.contains(&region);
        if let Some((child, forking)) = self.forks.under_way.iter_mut().find(clones) {
            forking.left.remove(&region);
            if forking.left.is_empty() {
                self.forks.complete.push(*child);
            }
        }
    }

    /// Children that have everything are kept, and their parents go on.
    pub(crate) fn go_on_with_forks(&mut self) {
        for child in std::mem::take(&mut self.forks.complete) {
            let Some(forking) = self.forks.under_way.remove(&child) else { continue };
            self.fork_is_complete(child, &forking);
            let waits = self.forks.under_way.values().any(|other| other.parent == forking.parent);
            if !waits {
                self.work_off_behind(forking.parent);
            }
        }
    }

    fn fork_is_complete(&mut self, child: u64, forking: &Forking) {
        for region in &forking.clones {
            self.drop_what_is_not_inherited(child, *region, &forking.wiped);
        }
        self.drain();
        for region in &forking.clones {
            self.keep_clone(child, *region);
        }
        self.birth_is(child, if forking.lost { Birth::ClonedInPart } else { Birth::Cloned });
        self.child_may_be_ready(child);
        self.check_children_soon();
    }

    /// What was read behind a fork is acted on, what was asked meanwhile is answered, and the address space is read on.
    fn work_off_behind(&mut self, space: u64) {
        if let Some(batch) = self.forks.behind.remove(&space) {
            self.journals.waiting.remove(&batch.journal);
            if !self.work_off(space, batch) {
                return;
            }
        }
        self.has_read(space);
        self.take_answers(space);
        for (conn, call, trace, body) in self.forks.calls.remove(&space).unwrap_or_default() {
            self.on_call(conn, call, trace, body);
        }
        self.drain();
        self.unread.insert(space);
    }

    /// Acts on what was read at once. `false`: a fork in it takes longer, and the rest waits for that.
    pub(crate) fn work_off(&mut self, space: u64, mut batch: Batch) -> bool {
        // Changes first: the program goes on with them already, and an older fault must not be answered with what it has dropped.
        let (changes, faults): (Vec<_>, Vec<_>) = batch.told.drain(..).partition(|(_, told)| !told.is_fault());
        for (at, (slot, told)) in changes.iter().copied().enumerate() {
            self.on_told(space, told, batch.again);
            if matches!(told, Told::Fork { .. }) && self.forks.stands_still(space) {
                self.settle_told(&changes[..at], batch.journal);
                // Its place in the journal is emptied when the child has everything.
                batch.told.push((slot, Told::Fork { child: None }));
                batch.told.extend(changes[at + 1..].iter().chain(&faults));
                self.tell_what_was_overtaken(space);
                self.journals.waiting.insert(batch.journal);
                self.forks.behind.insert(space, batch);
                return false;
            }
        }
        // Not before the directory says what has changed: the next pager has only that and the journal.
        self.settle_told(&changes, batch.journal);
        faults.iter().for_each(|(_, told)| self.on_told(space, *told, batch.again));
        self.settle_told(&faults, batch.journal);
        self.told = batch.told;
        true
    }

    fn settle_told(&mut self, told: &[(usize, Told)], journal: usize) {
        self.drain();
        self.faulted.clear();
        self.poison_what_is_due();
        self.forget_protection_that_is_due();
        for (slot, _) in told {
            if let Err(error) = self.journals.at(journal).handled(*slot) {
                tracing::error!(%error, slot, "An event's place in the journal cannot be emptied");
            }
        }
    }

    /// What dead pagers had read of address spaces' changes and perhaps not written down.
    pub(crate) fn repeat_kept_events(&mut self) -> Result<(), HookError> {
        let kept: Vec<(usize, u64, Vec<KeptEvent>)> = self
            .journals
            .all()
            .map(|(index, journal)| journal.kept().map(|(space, events)| (index, space, events)))
            .collect::<Result<_, _>>()?;
        let mut children = self.recover_children(&kept)?;
        for (journal, space, events) in kept {
            for kept in &events {
                tracing::info!(space, event = ?kept.event, "Event of an address space, read by the pager before");
            }
            let mut child = |kept: &KeptEvent| children.remove(&kept.id);
            let told = events.iter().map(|kept| (kept.slot, Told::again(kept.event, child(kept)))).collect();
            if self.work_off(space, Batch { journal, told, again: true }) {
                // Orders that wait; none of this pager's is out yet, and those of the dead one are refused anyway.
                self.tell_what_was_overtaken(space);
            }
        }
        Ok(())
    }

    /// The core stands still with the parent's regions, and so does all that is asked or told of the space. `None`: the call was put off.
    pub(crate) fn call_is_due(&mut self, conn: ConnId, call: CallId, trace: TraceId, body: Call) -> Option<Call> {
        let space = self.sessions.get(&conn).and_then(|session| session.space);
        let about_frames =
            matches!(&body, Call::Pager(pager::Call::FramesDone { .. } | pager::Call::AgentStarted { .. }));
        let Some(space) = space.filter(|space| !about_frames && self.forks.stands_still(*space)) else {
            return Some(body);
        };
        self.forks.calls.entry(space).or_default().push((conn, call, trace, body));
        None
    }

    /// Nothing is put in place where a fork is not through.
    pub(crate) fn waits_for_a_fork(&self, region: RegionId, pages: Pages) -> bool {
        let waits = |(segment, _): (&Segment, Pages)| self.forks.stands_still(segment.space);
        !self.forks.is_idle() && self.regions.showing(region.0, pages).any(waits)
    }
}
