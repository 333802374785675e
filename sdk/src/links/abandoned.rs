//! Nobody serves this process any more: supervisor, holder and pager are gone, all three.
//!
//! Each of them has the pager's listening socket, so as long as one lives a connect waits in its backlog, however slow that one is. A connect that is
//! refused, or finds no socket any more (`uhmm down`), is the proof that none does, and what they kept is lost with them: no later system knows this
//! process. So nobody is left waiting for an answer. Threads that touch a page which was on a device do wait: that page is in no memory that anybody could read.

use std::time::Duration;

use uhmm_kernel_hook::Stream;

use super::{LOOK, Loop};
use crate::Error;
use crate::paths;

/// How often it is looked whether somebody listens, while the pager is away.
const LOOK_PAUSE: Duration = Duration::from_millis(500);
const ENOENT: i32 = 2;
const ECONNREFUSED: i32 = 111;

impl Loop {
    /// The connection is lost: most often it is there again before anybody looks.
    pub(super) fn pager_is_away(&mut self) {
        self.standing.pager_is_up = false;
        self.reactor.add_timer(LOOK_PAUSE, LOOK);
    }

    pub(super) fn pager_is_back(&mut self) {
        self.standing.pager_is_up = true;
        self.standing.abandoned = false;
    }

    pub(super) fn look_for_pager(&mut self) {
        if self.standing.pager_is_up {
            return;
        }
        let (socket, _) = paths::service(&self.run_dir, "pager");
        let nobody = [Some(ENOENT), Some(ECONNREFUSED)];
        // Of another type than the socket: that is refused as well where somebody listens, by another number, and takes no place in the backlog.
        let nobody = Stream::connect(&socket).is_err_and(|error| nobody.contains(&error.errno()));
        if nobody && !std::mem::replace(&mut self.standing.abandoned, true) {
            tracing::error!(
                "Supervisor, holder and pager are gone: nobody serves this process's memory. Unless they come back with what systemd has kept for them, who touches a page that was on a device waits for ever: end the process"
            );
            for (_, deliver) in std::mem::take(&mut self.waiting) {
                deliver(Err(self.nobody_serves()));
            }
            for call in self.validations.give_up() {
                (call.deliver)(Err(self.nobody_serves()));
            }
        }
        // Somebody may listen again, and tell that this process is unknown there.
        self.reactor.add_timer(LOOK_PAUSE, LOOK);
    }

    /// What a call ends with that nobody will answer.
    pub(super) fn nobody_serves(&self) -> Error {
        Error::NotRunning { run_dir: self.run_dir.clone() }
    }
}
