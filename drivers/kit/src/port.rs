//! How a device talks to its driver's loop: a queue and a waker.
//!
//! ```text
//!   device thread / interrupt thread                       loop thread
//!   port.fault(..)  port.finished(..)  --- mutex queue -->  drain(), after the waker ended its poll
//! ```
//! Lock order: the queue's lock is a leaf; nothing is called while it is held.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::device::{DeviceFault, JobId, JobReport};

/// What a device says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// A job stands on a page that is not mapped (or not writable).
    Fault(DeviceFault),
    /// A job ended.
    Finished {
        /// Which.
        job: JobId,
        /// How.
        report: JobReport,
    },
    /// Everything revoked before [`crate::DevicePageTable::quiesce`] got this ticket is out of use.
    Quiesced {
        /// The ticket.
        ticket: u64,
    },
    /// The device is gone, or of no use until it is opened anew.
    Lost {
        /// How that was noticed.
        reason: String,
    },
}

struct Shared {
    queue: Mutex<VecDeque<DeviceEvent>>,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// Cloned into every thread of the device; none of its methods waits.
#[derive(Clone)]
pub struct DevicePort {
    shared: Arc<Shared>,
}

impl fmt::Debug for DevicePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevicePort").finish_non_exhaustive()
    }
}

impl DevicePort {
    /// `wake` must end the loop's wait; it is called after each event, from the device's threads.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self { shared: Arc::new(Shared { queue: Mutex::new(VecDeque::new()), wake: Box::new(wake) }) }
    }

    /// Reports a fault; [`crate::JobQueue::resume`] answers it.
    pub fn fault(&self, fault: DeviceFault) {
        self.push(DeviceEvent::Fault(fault));
    }

    /// Reports the end of a job, once for each.
    pub fn finished(&self, job: JobId, report: JobReport) {
        self.push(DeviceEvent::Finished { job, report });
    }

    /// Reports a quiescence that was [`crate::Quiescence::Pending`].
    pub fn quiesced(&self, ticket: u64) {
        self.push(DeviceEvent::Quiesced { ticket });
    }

    /// Reports that the device is gone. The driver ends, and the next incarnation opens what it finds.
    pub fn lost(&self, reason: String) {
        self.push(DeviceEvent::Lost { reason });
    }

    /// Ends the loop's wait without saying anything: something else of the kit's has news.
    pub(crate) fn nudge(&self) {
        (self.shared.wake)();
    }

    /// Takes everything reported so far, in order. Called by the loop.
    pub fn drain(&self) -> VecDeque<DeviceEvent> {
        // A panic cannot happen under this lock (only pushes), so a poisoned queue is still whole.
        std::mem::take(&mut *self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn push(&self, event: DeviceEvent) {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(event);
        (self.shared.wake)();
    }
}
