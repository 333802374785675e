//! Starting and ending the agent (`sdk/agent`): the memory that it lives in, and its process.
//!
//! ```text
//!   AgentSeat      private: guard | stack | records, configuration, life mark     scratch     staging, orders (memfds, shared with the pager)
//!     start() -> AgentProcess (pid, pidfd) --ended--> reap() -> start() again, with the next number: it finds everything as it was
//!     run_here()     the same on the calling thread, where no process can be made
//! ```
//! All of it is DONTFORK, never locked (whatever mlockall says of new mappings) and never managed. A seat outlives its agent: dropping it
//! tells the agent to end and waits for that.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use uhmm_agent::{BLOCK_BYTES, Config, SCRATCH_BYTES, Work};
use uhmm_shared::agent::{BELL, GRANTS, PAUSE_UNTIL_NS, SLOTS, STOP, WORDS};

use crate::bytes::Advice;
use crate::error::{HookError, making_processes};
use crate::own_memory;
use crate::process::PidFd;
use crate::range::{AddrRange, PAGE_SIZE};
use crate::secluded::LifeMark;
use crate::uffd::Userfaultfd;
use crate::window::{Prot, Window};

/// Bytes of orders.
pub const ORDERS_BYTES: u64 = (WORDS as u64 * 8).next_multiple_of(PAGE_SIZE);
/// Bytes of staging memory.
pub const STAGING_BYTES: u64 = SLOTS * BLOCK_BYTES;
const STACK_BYTES: u64 = 32 << 10;
/// Behind guard and stack: records, then configuration and life mark.
const RECORDS: u64 = PAGE_SIZE + STACK_BYTES;
const RECORDS_BYTES: u64 = (size_of::<Work>() as u64).next_multiple_of(64);
const CONFIG: u64 = RECORDS + RECORDS_BYTES;
const LIFE: u64 = CONFIG + (size_of::<Config>() as u64).next_multiple_of(64);
const PRIVATE_BYTES: u64 = (LIFE + 64).next_multiple_of(PAGE_SIZE);
/// How long a seat waits for its agent's end before it leaves its memory mapped for good.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// What the agent needs open; the numbers must be the calling thread's.
#[derive(Debug)]
pub struct AgentFiles {
    /// The session's userfaultfd.
    pub uffd: OwnedFd,
    /// /proc/self/pagemap.
    pub pagemap: OwnedFd,
    /// /proc/self/maps.
    pub maps: OwnedFd,
    /// /proc/self/mem, for reading; read-only memory cannot be copied without it.
    pub mem: Option<OwnedFd>,
    /// The pager's eventfd for answers.
    pub done: OwnedFd,
}

/// See the module head.
#[derive(Debug)]
pub struct AgentSeat {
    private: Arc<Window>,
    scratch: Window,
    staging: Window,
    orders: Window,
    life: LifeMark,
    last_number: u32,
}

/// An agent that was started. It is a child of this process and is reaped by [`AgentProcess::reap`].
#[derive(Debug)]
pub struct AgentProcess {
    pid: libc::pid_t,
    pidfd: PidFd,
}

/// Private memory of our own that mlockall cannot make locked from birth.
fn own_window(len: u64) -> Result<Window, HookError> {
    let window = Window::reserved(len)?;
    own_memory::lock(window.range(), false)?;
    own_memory::protect(window.range(), true, true)?;
    window.advise(0, len, Advice::DontFork)?;
    Ok(window)
}

impl AgentSeat {
    /// Maps everything. `staging` and `orders`: sealed memfds of [`STAGING_BYTES`] and [`ORDERS_BYTES`].
    ///
    /// # Errors
    /// `Call`: ENOMEM (RLIMIT_AS, vm.max_map_count), EAGAIN (RLIMIT_MEMLOCK under mlockall(MCL_FUTURE)).
    pub fn new(staging: BorrowedFd<'_>, orders: BorrowedFd<'_>) -> Result<Self, HookError> {
        let private = own_window(PRIVATE_BYTES)?;
        own_memory::protect(AddrRange { start: private.addr(), len: PAGE_SIZE }, false, false)?;
        let scratch = own_window(SCRATCH_BYTES + BLOCK_BYTES)?;
        let first = scratch.addr().next_multiple_of(BLOCK_BYTES) - scratch.addr();
        for block in (0..SCRATCH_BYTES / BLOCK_BYTES).step_by(2) {
            // Neighbours differ, so that each block is a mapping of its own and registering it splits none (vm.max_map_count).
            scratch.advise(first + block * BLOCK_BYTES, BLOCK_BYTES, Advice::DontDump)?;
        }
        let shared = |fd, len| {
            let window = Window::map(fd, 0, len, Prot::ReadWrite)?;
            window.advise(0, len, Advice::DontFork)?;
            Ok::<_, HookError>(window)
        };
        let (staging, orders) = (shared(staging, STAGING_BYTES)?, shared(orders, ORDERS_BYTES)?);
        uhmm_shared_format(&orders)?;
        let private = Arc::new(private);
        let life = LifeMark::new(private.clone(), LIFE)?;
        Ok(Self { private, scratch, staging, orders, life, last_number: 0 })
    }

    /// Held by the thread whose end the agent shall notice.
    pub fn life(&mut self) -> &mut LifeMark {
        &mut self.life
    }

    /// Mappings that must not be managed, with what they are.
    pub fn ranges(&self) -> [(AddrRange, &'static str); 4] {
        [
            (self.private.range(), "the agent's stack and records"),
            (self.scratch.range(), "the agent's scratch memory"),
            (self.staging.range(), "staging memory"),
            (self.orders.range(), "the agent's orders"),
        ]
    }

    fn configure(
        &mut self,
        files: &AgentFiles,
        life: u64,
        only_one: bool,
        is_process: bool,
    ) -> Result<*const Config, HookError> {
        self.last_number += 1;
        let scratch = self.scratch.addr().next_multiple_of(BLOCK_BYTES);
        let config = Config {
            uffd: files.uffd.as_raw_fd(),
            pagemap: files.pagemap.as_raw_fd(),
            maps: files.maps.as_raw_fd(),
            mem: files.mem.as_ref().map_or(-1, AsRawFd::as_raw_fd),
            done_event: files.done.as_raw_fd(),
            orders: self.orders.addr(),
            staging: self.staging.addr(),
            scratch,
            work: self.private.addr() + RECORDS,
            life,
            number: self.last_number,
            is_process,
            only_one,
        };
        let place = self.private.at_mut(CONFIG, size_of::<Config>() as u64)?.cast::<Config>();
        // SAFETY: that many bytes of this seat's own mapping, aligned to 64; no agent is running.
        unsafe { place.write(config) };
        Ok(place)
    }

    /// Starts an agent; the one before, if any, was reaped. `only_one`: no other seat of this address space has an agent.
    ///
    /// # Errors
    /// `Call`: what clone says. Nothing runs then.
    pub fn start(&mut self, files: &AgentFiles, life: u64, only_one: bool) -> Result<AgentProcess, HookError> {
        let config = self.configure(files, life, only_one, true)?;
        let stack_top = self.private.addr() + PAGE_SIZE + STACK_BYTES;
        // SAFETY: memory and stack stay until this seat is dropped, which waits for the agent; libuhmm is linked so that dlclose leaves
        // it mapped.
        let spawned = unsafe { uhmm_agent::spawn(config, stack_top) }.map_err(|errno| {
            let errno = errno as i32;
            HookError::hinted("clone(CLONE_VM)", io::Error::from_raw_os_error(errno), making_processes(errno))
        })?;
        // SAFETY: clone returned a new descriptor that nobody else owns.
        let pidfd = PidFd::from_fd(unsafe { OwnedFd::from_raw_fd(spawned.pidfd) });
        Ok(AgentProcess { pid: spawned.pid, pidfd })
    }

    /// Does the agent's work on the calling thread, whose signals are blocked, until [`AgentSeat::stop`]. Returns that closure, since the seat stays
    /// with its owner.
    ///
    /// # Errors
    /// `OutOfWindow`: never.
    pub fn work_here(&mut self, files: &AgentFiles) -> Result<impl FnOnce() + Send + use<>, HookError> {
        let config = self.configure(files, 0, false, false)?.expose_provenance();
        Ok(move || {
            // SAFETY: as for `start`: the seat waits for this thread.
            let end = unsafe { uhmm_agent::run_as_thread(std::ptr::with_exposed_provenance(config)) };
            debug_assert_eq!(end, uhmm_agent::End::Told);
        })
    }

    fn word(&self, index: usize) -> Result<&std::sync::atomic::AtomicU64, HookError> {
        self.orders.atomic_u64(index as u64 * 8)
    }

    /// Changes whenever the pager allows a device anything.
    pub fn grants(&self) -> u64 {
        self.word(GRANTS).map_or(0, |word| word.load(Acquire))
    }

    /// Tells the agent to end.
    ///
    /// # Errors
    /// `Call`.
    pub fn stop(&self) -> Result<(), HookError> {
        self.word(STOP)?.store(1, Release);
        self.ring_bell()
    }

    /// Test hook: the agent does nothing for a while.
    ///
    /// # Errors
    /// `Call`.
    pub fn pause(&self, duration: std::time::Duration) -> Result<(), HookError> {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let now_ns = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.word(PAUSE_UNTIL_NS)?.store(now_ns.saturating_add(ns), Release);
        self.ring_bell()
    }

    fn ring_bell(&self) -> Result<(), HookError> {
        self.word(BELL)?.fetch_add(1, Relaxed);
        self.orders.wake_futex(BELL as u64 * 8)
    }

    /// The agent that was started last has ended: it fills nothing.
    pub fn has_ended(&self) {
        let words = OrdersWords(&self.orders);
        uhmm_shared::fill_gate::FillGate::at(words, uhmm_shared::agent::GATE).agent_is_gone(self.last_number);
    }

    /// Ends the agent, waits for that, and unmaps everything. An agent that does not end in time keeps its memory.
    pub fn close(self, agent: Option<&AgentProcess>, uffd: Option<&Userfaultfd>) {
        let stopped = self.stop().is_ok() && agent.is_none_or(|agent| agent.wait(Some(&PATIENCE)));
        // One that was killed in the middle may have left scratch registered, and nobody would read of its unmapping.
        let quiet = uffd.is_none_or(|uffd| uffd.unregister(self.scratch.range()).is_ok());
        if !stopped || !quiet {
            std::mem::forget(self);
        }
    }
}

/// Makes the ring, once; a mapping of one that was made before is left as it is.
fn uhmm_shared_format(orders: &Window) -> Result<(), HookError> {
    let words = OrdersWords(orders);
    orders.atomic_u64(0)?;
    if orders.load_u64(0)? == 0 {
        uhmm_shared::ring::format(&words, uhmm_shared::agent::ENTRIES);
    }
    Ok(())
}

/// The orders as words, on the SDK's side.
struct OrdersWords<'a>(&'a Window);

impl uhmm_shared::words::Words for OrdersWords<'_> {
    fn word_count(&self) -> usize {
        WORDS
    }
    fn load(&self, index: usize, order: std::sync::atomic::Ordering) -> u64 {
        self.0.atomic_u64(index as u64 * 8).map_or(0, |word| word.load(order))
    }
    fn store(&self, index: usize, value: u64, order: std::sync::atomic::Ordering) {
        if let Ok(word) = self.0.atomic_u64(index as u64 * 8) {
            word.store(value, order);
        }
    }
    fn swap(&self, index: usize, value: u64, order: std::sync::atomic::Ordering) -> u64 {
        self.0.atomic_u64(index as u64 * 8).map_or(0, |word| word.swap(value, order))
    }
    fn compare_exchange(
        &self,
        index: usize,
        current: u64,
        new: u64,
        success: std::sync::atomic::Ordering,
        failure: std::sync::atomic::Ordering,
    ) -> Result<u64, u64> {
        let word = self.0.atomic_u64(index as u64 * 8);
        word.map_or(Ok(current), |word| word.compare_exchange(current, new, success, failure))
    }
    fn fence(&self, order: std::sync::atomic::Ordering) {
        std::sync::atomic::fence(order);
    }
}

impl AgentProcess {
    /// Tells when it has ended; to be sent to the pager, too.
    #[must_use]
    pub fn pidfd(&self) -> &PidFd {
        &self.pidfd
    }

    /// Its number, for logs.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid as u32
    }

    /// Waits for its end. `false`: not in time.
    pub fn wait(&self, timeout: Option<&Timespec>) -> bool {
        loop {
            match poll(&mut [PollFd::new(&self.pidfd.as_fd(), PollFlags::IN)], timeout) {
                Ok(count) => return count > 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// Takes its exit status, so that no zombie stays. It has ended.
    pub fn reap(self) {
        // SAFETY: a child of ours that nobody else reaps: `wait` does not see it.
        unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WCLONE | libc::WNOHANG) };
    }
}
