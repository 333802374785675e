//! The session's agent, as the link thread keeps it: its memory, its process, and another one when somebody has killed it alone.
//!
//! ```text
//!   none --start--> process --killed--> start_again --> process ...          pager: told each time (OpenSpace, AgentStarted)
//!             `-- clone forbidden --> thread (shares the link thread's descriptors, not the program's)
//! ```
//! A filter that the program has installed since the first start may kill whoever calls clone, so then none is started: the session
//! says so, and what is on a device comes home without an agent.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uhmm_ipc::message::Fd;
use uhmm_ipc::message::pager::AgentMemory;
use uhmm_kernel_hook::agent::{AgentFiles, AgentProcess, AgentSeat, ORDERS_BYTES, STAGING_BYTES};
use uhmm_kernel_hook::secluded::LifeWatch;
use uhmm_kernel_hook::{EventFd, HookError, PidFd, Userfaultfd, memfd, pagemap, procmap, smaps};

use crate::Error;
use crate::own::{self, Noted};
use crate::validation::View;

/// Name of the agent as a thread.
const AGENT_THREAD: &str = "uhmm-agent";
/// An agent that lives no longer than this was not killed by chance.
const SHORT_LIFE: Duration = Duration::from_millis(100);
/// So many short lives in a row, and no other agent is started.
const SHORT_LIVES_MAX: u32 = 20;

/// Who takes this process's private pages out of its address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentKind {
    /// A process that shares the program's memory and nothing else.
    Process {
        /// Its number.
        pid: u32,
    },
    /// A thread: making a process is forbidden to this program (a seccomp filter). It shares the program's filters and its death.
    Thread,
    /// Nobody: it was killed, and no other one can be started. Private memory moves to no device; what is on one comes home.
    None,
}

/// Process whose agent is the only one of its address space.
static ONLY_ONE: AtomicU32 = AtomicU32::new(0);

/// Held by the first session of a process: its agent knows exactly when nobody else uses the memory.
struct OnlyOne(u32);

impl OnlyOne {
    fn take() -> Option<Self> {
        let own = std::process::id();
        let known = ONLY_ONE.load(Ordering::Acquire);
        // A forked child finds its parent's number here.
        let free = known != own && ONLY_ONE.compare_exchange(known, own, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        free.then_some(Self(own))
    }
}

impl Drop for OnlyOne {
    fn drop(&mut self) {
        // Another one may be taken from now on, unless this is a child that took it anew.
        let _ = ONLY_ONE.compare_exchange(self.0, 0, Ordering::AcqRel, Ordering::Relaxed);
    }
}

/// See the module head.
pub(crate) struct AgentHost {
    seat: Option<AgentSeat>,
    noted: Vec<Noted>,
    life: LifeWatch,
    life_word: u64,
    /// For the pager.
    maps: Fd,
    pagemap: Fd,
    smaps: Fd,
    staging: Fd,
    orders: Fd,
    done: Fd,
    files: Option<AgentFiles>,
    process: Option<AgentProcess>,
    /// Number of the one before.
    dead: u32,
    thread: Option<JoinHandle<()>>,
    only_one: Option<OnlyOne>,
    started: Instant,
    short_lives: u32,
    /// Seccomp filters of this thread when the first agent began.
    filters: u64,
}

fn duplicate(fd: impl AsFd) -> Result<OwnedFd, Error> {
    memfd::try_clone(fd.as_fd()).map_err(Error::kernel("Duplicating a descriptor"))
}

/// How many seccomp filters this thread has.
fn filter_count() -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"));
    line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

impl AgentHost {
    /// Opens and maps what an agent needs. The calling thread's end is the session's.
    pub(crate) fn new() -> Result<Self, Error> {
        let failed = || Error::kernel("Preparing the agent's memory");
        let maps = procmap::open_own_maps().map_err(failed())?;
        let pagemap = pagemap::open_own_pagemap().map_err(failed())?;
        let smaps = smaps::open_own_smaps().map_err(failed())?;
        let staging = memfd::create_sealed("uhmm-staging", STAGING_BYTES).map_err(failed())?;
        let orders = memfd::create_sealed("uhmm-orders", ORDERS_BYTES).map_err(failed())?;
        let done = EventFd::new().map_err(failed())?;
        let mut seat = AgentSeat::new(staging.as_fd(), orders.as_fd()).map_err(failed())?;
        let life_word = seat.life().hold().map_err(failed())?;
        let noted = seat.ranges().map(|(range, what)| own::note_not_inherited(range, what)).into();
        let life = seat.life().watch();
        let (maps, pagemap, smaps) = (Arc::new(maps), Arc::new(pagemap), Arc::new(smaps));
        let (staging, orders, done) = (Arc::new(staging), Arc::new(orders), Arc::new(done.into_fd()));
        Ok(Self {
            seat: Some(seat),
            noted,
            life,
            life_word,
            maps,
            pagemap,
            smaps,
            staging,
            orders,
            done,
            files: None,
            process: None,
            dead: 0,
            thread: None,
            only_one: OnlyOne::take(),
            started: Instant::now(),
            short_lives: 0,
            filters: filter_count(),
        })
    }

    /// Tells when the link thread has died.
    pub(crate) fn life(&self) -> LifeWatch {
        self.life.clone()
    }

    /// What the pager gets.
    pub(crate) fn memory(&self) -> Result<AgentMemory, Error> {
        let agent = self.process.as_ref().map(|process| duplicate(process.pidfd()).map(Arc::new)).transpose()?;
        let (maps, pagemap, smaps) = (self.maps.clone(), self.pagemap.clone(), self.smaps.clone());
        let (staging, orders, done) = (self.staging.clone(), self.orders.clone(), self.done.clone());
        Ok(AgentMemory { maps, pagemap, smaps, staging, orders, done, agent })
    }

    /// What this process's mappings are compared by, for [`Validations`](crate::validation::Validations).
    pub(crate) fn view(&self) -> View<'_> {
        let grants = self.seat.as_ref().map(AgentSeat::grants);
        View { maps: self.maps.as_fd(), pagemap: self.pagemap.as_fd(), grants }
    }

    /// Its pidfd, while it is a process.
    pub(crate) fn pidfd(&self) -> Option<&PidFd> {
        self.process.as_ref().map(AgentProcess::pidfd)
    }

    pub(crate) fn kind(&self) -> AgentKind {
        match (&self.process, &self.thread) {
            (Some(process), _) => AgentKind::Process { pid: process.pid() },
            (None, Some(_)) => AgentKind::Thread,
            (None, None) => AgentKind::None,
        }
    }

    /// Starts the first agent.
    pub(crate) fn start(&mut self, uffd: &Userfaultfd) -> Result<(), Error> {
        let mem = File::open("/proc/self/mem").map(OwnedFd::from);
        let mem = mem.inspect_err(|error| tracing::warn!(%error, "Read-only memory cannot move to devices")).ok();
        self.files = Some(AgentFiles {
            uffd: duplicate(uffd)?,
            pagemap: duplicate(&self.pagemap)?,
            maps: duplicate(&self.maps)?,
            mem,
            done: duplicate(&self.done)?,
        });
        match self.start_process() {
            Err(error) if matches!(error.errno(), Some(EPERM | ENOSYS | EACCES)) => {
                tracing::warn!(%error, "The agent is a thread of the program: it shares the program's filters and its death");
                self.start_thread()
            }
            other => other.map_err(Error::kernel("Starting the agent")),
        }
    }

    fn start_process(&mut self) -> Result<(), HookError> {
        let (Some(seat), Some(files)) = (self.seat.as_mut(), self.files.as_ref()) else { return Ok(()) };
        self.process = Some(seat.start(files, self.life_word, self.only_one.is_some())?);
        self.started = Instant::now();
        Ok(())
    }

    fn start_thread(&mut self) -> Result<(), Error> {
        let (Some(seat), Some(files)) = (self.seat.as_mut(), self.files.as_ref()) else { return Ok(()) };
        let work = seat.work_here(files).map_err(Error::kernel("Starting the agent"))?;
        let thread = std::thread::Builder::new().name(AGENT_THREAD.into()).spawn(work).map_err(Error::Thread)?;
        self.thread = Some(thread);
        Ok(())
    }

    /// The agent's process has ended: takes its status, and starts another one if the program still may. An error that is
    /// [for want of processes](is_limit) may pass: then this is to be called again.
    pub(crate) fn start_again(&mut self) -> Result<(), Error> {
        if let Some(dead) = self.process.take() {
            self.dead = dead.pid();
            self.has_ended(dead);
        }
        if self.short_lives >= SHORT_LIVES_MAX {
            return Err(not_again(format!("{SHORT_LIVES_MAX} agents in a row ended at once")));
        }
        if filter_count() != self.filters {
            let detail = "a seccomp filter was installed since the first one began, and it may kill who calls clone";
            return Err(not_again(detail.into()));
        }
        self.start_process().map_err(Error::kernel("Starting another agent"))?;
        tracing::warn!(dead = self.dead, kind = ?self.kind(), "The agent was killed: another one goes on with its orders");
        Ok(())
    }

    fn has_ended(&mut self, dead: AgentProcess) {
        dead.reap();
        if let Some(seat) = &self.seat {
            seat.has_ended();
        }
        self.short_lives = if self.started.elapsed() < SHORT_LIFE { self.short_lives + 1 } else { 0 };
    }

    /// Test hook: it does nothing for a while.
    pub(crate) fn pause(&self, duration: Duration) -> Result<(), Error> {
        let paused = self.seat.as_ref().map_or(Ok(()), |seat| seat.pause(duration));
        paused.map_err(Error::kernel("Pausing the agent"))
    }

    /// The session is over: the agent ends, and its memory goes.
    pub(crate) fn close(mut self, uffd: Option<&Userfaultfd>) {
        let Some(mut seat) = self.seat.take() else { return };
        let stopped = seat.stop();
        if let Some(thread) = self.thread.take().filter(|_| stopped.is_ok())
            && thread.join().is_err()
        {
            tracing::error!("The agent's thread panicked");
        }
        seat.life().release();
        seat.close(self.process.as_ref(), uffd);
        if let Some(process) = self.process.take() {
            process.reap();
        }
        self.noted.clear();
    }
}

fn not_again(detail: String) -> Error {
    Error::kernel("Starting another agent")(HookError::Strange { call: "clone(CLONE_VM)", detail })
}

/// As many processes and threads are there as may be.
pub(crate) fn is_limit(error: &Error) -> bool {
    matches!(error, Error::Kernel { source, .. } if source.errno() == Some(EAGAIN))
}

/// Errors of the kernel without a libc dependency in this crate.
const EPERM: i32 = 1;
const EAGAIN: i32 = 11;
const ENOSYS: i32 = 38;
const EACCES: i32 = 13;
