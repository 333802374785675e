//! Descriptors of the link thread that app threads know of: they live in its table, which the program cannot close.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::secluded::Summons;

use super::{Command, Links, Loop};
use crate::Error;

/// A descriptor in the link thread's table, by its name there. Dropping it closes it.
pub(crate) struct Held {
    key: u64,
    commands: Sender<Command>,
    summons: Summons,
}

impl Held {
    /// For [`Loop::fd`].
    pub(crate) fn key(&self) -> u64 {
        self.key
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let key = self.key;
        let forget = Command::Do(Box::new(move |links: &mut Loop| drop(links.held.remove(&key))));
        if self.commands.send(forget).is_ok() {
            // When the thread has ended, so has its table.
            drop(self.summons.call());
        }
    }
}

impl Links {
    /// Makes a descriptor on the link thread, where it stays; something of it that is no descriptor comes back with its handle.
    pub(crate) fn hold<T: Send + 'static>(
        &self,
        make: impl FnOnce() -> Result<(OwnedFd, T), Error> + Send + 'static,
    ) -> Result<(Held, T), Error> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let key = NEXT.fetch_add(1, Ordering::Relaxed);
        let made = self.ask(move |links| {
            let (fd, made) = make()?;
            links.held.insert(key, Arc::new(fd));
            Ok(made)
        })?;
        Ok((Held { key, commands: self.commands.clone(), summons: self.summons }, made))
    }
}

impl Loop {
    /// A descriptor that is [held](Links::hold).
    pub(crate) fn fd(&self, key: u64) -> Result<Fd, Error> {
        self.held.get(&key).cloned().ok_or(Error::AgentGone)
    }
}
