//! The killer: kill -9 of a random service at random moments, seeded; now and then of two at once. (The holder is one of them, the
//! supervisor is not: nobody would start it again.)

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::Signal;
use uhmm_kernel_hook::PidFd;
use uhmm_sdk::Operator;

use crate::pattern::Rng;

/// Shortest and longest time between two kills.
const PAUSE_MS: (u64, u64) = (20, 300);

/// Of so many kills one is of two.
const PAIRS: u64 = 4;

/// Kills until it is dropped.
pub(crate) struct Killer {
    stop: Option<Sender<()>>,
    kills: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Killer {
    /// Starts the thread.
    pub(crate) fn start(run_dir: PathBuf, seed: u64) -> Self {
        let (stop, stopped) = channel();
        let kills = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&kills);
        let thread = std::thread::spawn(move || {
            let mut rng = Rng::new(seed);
            let mut operator = None;
            loop {
                let pause = Duration::from_millis(PAUSE_MS.0 + rng.below(PAUSE_MS.1 - PAUSE_MS.0));
                match stopped.recv_timeout(pause) {
                    Err(RecvTimeoutError::Timeout) => {}
                    _ => return,
                }
                if operator.is_none() {
                    operator = Operator::connect(Some(&run_dir)).ok();
                }
                let killed = operator.as_mut().is_some_and(|operator| kill_some(operator, &mut rng));
                count.fetch_add(u64::from(killed), Ordering::Release);
            }
        });
        Self { stop: Some(stop), kills, thread: Some(thread) }
    }

    /// How many services have died.
    pub(crate) fn kills(&self) -> u64 {
        self.kills.load(Ordering::Acquire)
    }
}

impl Drop for Killer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!(?panic, "The killer panicked");
        }
    }
}

/// Without the way through the supervisor: the moment is the killer's own.
fn kill_some(operator: &mut Operator, rng: &mut Rng) -> bool {
    let Ok(services) = operator.status() else { return false };
    let mut alive: Vec<u32> = services.iter().map(|service| service.pid).filter(|pid| *pid != 0).collect();
    let count = if rng.below(PAIRS) == 0 { 2 } else { 1 };
    let mut killed = false;
    for _ in 0..count.min(alive.len()) {
        let pid = alive.swap_remove(rng.below(alive.len() as u64) as usize);
        // The supervisor has not reaped a process that it lists, or its number is too young to be another one's.
        killed |= PidFd::open(pid).and_then(|process| process.signal(Signal::KILL)).unwrap_or(false);
    }
    killed
}
