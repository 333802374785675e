//! Frames that nobody owns and that may hold somebody's bytes are zeroed before anybody else sees them: what a region or a client has left,
//! and everything that is free after a restart. Part by part, so that faults get in between and frames come back early.

use crate::core::{Core, KEEPER};
use crate::entry::DEVICE_COUNT_MAX;
use crate::event::{Action, DeviceId, SpaceId, StepResult, Ticket};
use crate::policy::Policy;

/// Frames of one scrub.
const SCRUB_FRAMES: usize = 1024;
/// Scrubs of frames with unknown bytes that are under way at a time: what is not being scrubbed can be given to somebody.
const UNKNOWN_SCRUBS_MAX: usize = 4;

impl<P: Policy> Core<P> {
    pub(crate) fn scrub_space(&mut self, space: SpaceId, out: &mut Vec<Action>) {
        self.gone_spaces.push_back(space);
        self.scrub_gone(out);
    }

    /// A share of what a dead client has left.
    pub(crate) fn scrub_gone(&mut self, out: &mut Vec<Action>) {
        let Some(space) = self.gone_spaces.pop_front() else { return };
        let most = self.budget as usize;
        let mut more = false;
        for device in (0..DEVICE_COUNT_MAX).map(DeviceId) {
            let runs = self.table(device).map(|table| table.begin_scrub(Some(space), KEEPER, most));
            let runs = runs.unwrap_or_default();
            more |= runs.iter().map(|(_, count)| *count as usize).sum::<usize>() == most;
            self.start_scrub(device, runs, out);
        }
        if more {
            self.gone_spaces.push_back(space);
        }
    }

    pub(crate) fn may_scrub_unknown(&self) -> bool {
        self.unknown_mask != 0 && self.scrubs.len() < UNKNOWN_SCRUBS_MAX
    }

    pub(crate) fn scrub_unknown(&mut self, out: &mut Vec<Action>) {
        let device = DeviceId(self.unknown_mask.trailing_zeros() as u8);
        if self.is_failed(device) {
            self.unknown_mask &= !(1 << device.0);
            return;
        }
        let runs = self.table(device).map(|table| table.begin_scrub(None, KEEPER, SCRUB_FRAMES)).unwrap_or_default();
        if runs.is_empty() {
            self.unknown_mask &= !(1 << device.0);
        }
        self.start_scrub(device, runs, out);
    }

    pub(crate) fn note_unknown(&mut self, device: DeviceId) {
        self.unknown_mask |= 1 << device.0;
    }

    /// Frames of the runs are owned by [`KEEPER`] until the scrub is through; those of a failed device until it is back. They come back
    /// part by part.
    pub(crate) fn start_scrub(&mut self, device: DeviceId, runs: Vec<(u32, u32)>, out: &mut Vec<Action>) {
        if self.is_failed(device) {
            return;
        }
        for runs in parts_of(&runs, SCRUB_FRAMES as u32) {
            let ticket = self.ticket();
            self.stats.scrubbed += runs.iter().map(|(_, count)| u64::from(*count)).sum::<u64>();
            self.scrubs.insert(ticket, (device, runs.clone()));
            out.push(Action::Scrub { ticket, device, runs });
        }
    }

    /// The frames were replaced: scrubs of the old ones mean nothing.
    pub(crate) fn forget_scrubs(&mut self, device: DeviceId) {
        self.scrubs.retain(|_, (of, _)| *of != device);
    }

    pub(crate) fn scrub_done(&mut self, ticket: Ticket, result: StepResult) {
        let Some((device, runs)) = self.scrubs.remove(&ticket) else { return };
        // Frames that could not be scrubbed stay out of use: nobody shall read what they hold.
        if result == StepResult::Ok
            && let Some(table) = self.table(device)
        {
            table.scrubbed(&runs);
        }
        self.unblock_all();
    }
}

/// Runs of frames in parts of at most `most` frames.
fn parts_of(runs: &[(u32, u32)], most: u32) -> Vec<Vec<(u32, u32)>> {
    let mut parts: Vec<Vec<(u32, u32)>> = Vec::new();
    let mut room = 0;
    for (mut first, mut count) in runs.iter().copied() {
        while count > 0 {
            if room == 0 {
                parts.push(Vec::new());
                room = most;
            }
            let taken = count.min(room);
            parts.last_mut().into_iter().for_each(|part| part.push((first, taken)));
            (first, count, room) = (first + taken, count - taken, room - taken);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_every_frame_once_and_none_has_too_many() {
        assert_eq!(parts_of(&[], 4), Vec::<Vec<(u32, u32)>>::new());
        let parts = parts_of(&[(3, 2), (10, 7), (20, 1), (30, 4)], 4);
        assert_eq!(parts, [vec![(3, 2), (10, 2)], vec![(12, 4)], vec![(16, 1), (20, 1), (30, 2)], vec![(32, 2)]]);
    }
}
