//! Device to device where one of the two has no aperture: through memory of the pager.
//!
//! ```text
//!   aperture -> engine:  frames -> the target engine's staging -> CopyIn
//!   engine -> anything:  CopyOut to the source engine's staging -> buffer -> aperture, or the target engine's staging -> CopyIn
//! ```
//! The second half is an ordinary copy of zero-based pages out of the buffer.

use uhmm_kernel_hook::PAGE_SIZE;
use uhmm_kernel_hook::window::Window;
use uhmm_pager_core::{Event, StepResult, Ticket};

use crate::copies::{Copy, Deferred};
use crate::devices::EngineJob;
use crate::service::Pager;

/// Why a copy from device to device has failed on its way.
pub(crate) const NOT_BOUNCED: &str =
    "Copying from device to device failed: there is no memory for it, or one of the two is lost";

impl Pager {
    /// The source has an aperture, the target has none.
    pub(crate) fn bounce(&mut self, deferred: Deferred) {
        let Copy::Across { ticket, from_frame, count, .. } = deferred.copy else { return };
        let len = u64::from(count) * PAGE_SIZE;
        let read = || -> Option<Window> {
            let buffer = Window::anonymous(len).ok()?;
            let aperture = self.devices[usize::from(deferred.device)].as_ref()?.aperture.as_ref()?;
            aperture.copy_to(u64::from(from_frame) * PAGE_SIZE, &buffer, 0, len).ok()?;
            Some(buffer)
        };
        match read() {
            Some(buffer) => self.bounce_write(deferred, buffer),
            None => self.not_bounced(ticket),
        }
    }

    /// The source's engine has brought the frames to its staging area.
    pub(crate) fn bounce_read(&mut self, device_id: u8, job: EngineJob, deferred: Deferred, ok: bool) {
        let Copy::Across { ticket, count, .. } = deferred.copy else { return };
        let len = u64::from(count) * PAGE_SIZE;
        let read = || -> Option<Window> {
            let buffer = Window::anonymous(len).ok()?;
            let engine = self.devices[usize::from(device_id)].as_ref()?.engine.as_ref()?;
            engine.staging.copy_to(u64::from(job.staging_page) * PAGE_SIZE, &buffer, 0, len).ok()?;
            Some(buffer)
        };
        match ok.then(read).flatten() {
            Some(buffer) => self.bounce_write(deferred, buffer),
            None => self.not_bounced(ticket),
        }
    }

    fn not_bounced(&mut self, ticket: Ticket) {
        self.note_failure_of(ticket, NOT_BOUNCED);
        self.push(Event::CopyDone { ticket, result: StepResult::Io });
    }

    fn bounce_write(&mut self, deferred: Deferred, buffer: Window) {
        let Copy::Across { ticket, to, frame, count, .. } = deferred.copy else { return };
        let id = self.next_bounce;
        self.next_bounce += 1;
        self.bounces.insert(id, buffer);
        let copy = Copy::Bounced { ticket, buffer: id, frame, count };
        self.start_copy(Deferred { device: to, copy });
    }

    /// The second half is done.
    pub(crate) fn bounced(&mut self, ticket: Ticket, buffer: u64, ok: bool) {
        self.bounces.remove(&buffer);
        let result = if ok { StepResult::Ok } else { StepResult::Io };
        self.push(Event::CopyDone { ticket, result });
    }
}
