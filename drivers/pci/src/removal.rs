//! Notices that a device is taken away, though nobody accesses it just now.
//!
//! ```text
//!   VFIO: request and error interrupts     vfio-user: the socket hangs up     model in this process: removed
//!                     '------------ eventfds -> a thread that waits -> `tell`, once
//! ```

use std::os::fd::AsFd;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use uhmm_kernel_hook::EventFd;

use crate::backend::InterruptKind;
use crate::device::PciDevice;
use crate::error::PciError;

/// Watches until it is dropped.
#[derive(Debug)]
pub struct RemovalWatch {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl PciDevice {
    /// Calls `tell` once, from a thread of its own, when the device is taken away, somebody wants it back, or it reports an error that only a reset
    /// mends. The text says which. A driver ends then.
    ///
    /// # Errors
    /// The device refuses, or the process is out of descriptors or threads.
    pub fn watch_removal(&self, tell: impl FnOnce(String) + Send + 'static) -> Result<RemovalWatch, PciError> {
        let mut events = Vec::new();
        for (kind, text) in [
            (InterruptKind::Request, "it is being taken away"),
            (InterruptKind::Error, "it reports an error that cannot be recovered without a reset"),
        ] {
            if self.interrupt_count(kind) > 0 {
                let event = EventFd::new()?;
                self.set_interrupts(kind, &[event.try_clone()?])?;
                events.push((event, text));
            }
        }
        let stop = EventFd::new()?;
        let stopped = stop.try_clone()?;
        let device = self.describe();
        let wait = move || {
            if let Some(text) = wait(&stopped, &events) {
                tell(format!("{device}: {text}"));
            }
        };
        let thread = std::thread::Builder::new().name("removal".into()).spawn(wait);
        let thread = thread.map_err(|error| PciError::Open {
            device: self.describe(),
            problem: "no thread could be started; raise the process limit (ulimit -u)".to_owned(),
            source: Some(error.into()),
        })?;
        Ok(RemovalWatch { stop, thread: Some(thread) })
    }
}

impl Drop for RemovalWatch {
    fn drop(&mut self) {
        let stopped = self.stop.signal();
        if let (Ok(()), Some(thread)) = (stopped, self.thread.take())
            && thread.join().is_err()
        {
            tracing::error!("The thread that watches for the device's removal panicked");
        }
    }
}

/// `None`: stopped.
fn wait(stop: &EventFd, events: &[(EventFd, &'static str)]) -> Option<&'static str> {
    loop {
        let all = std::iter::once(stop).chain(events.iter().map(|(event, _)| event));
        let mut fds: Vec<_> = all.map(|event| PollFd::from_borrowed_fd(event.as_fd(), PollFlags::IN)).collect();
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "Nobody watches for the device's removal any more");
                return None;
            }
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        match ready.iter().position(|ready| *ready) {
            Some(0) => return None,
            Some(index) => return events.get(index - 1).map(|(_, text)| *text),
            None => {}
        }
    }
}
