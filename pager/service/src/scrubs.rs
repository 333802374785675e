//! Scrubs in parts: frames are free when every part of their scrub has ended, in whatever order parts end.
//!
//! A driver is given more than one part at a time and may end them as it likes. Whoever took the end of the last part for the end of all would
//! give frames away that are zeroed afterwards, with somebody's bytes in them, or that have kept somebody's bytes.

use std::collections::BTreeMap;

use uhmm_pager_core::{StepResult, Ticket};

/// Parts that have not ended.
#[derive(Debug, Default)]
pub(crate) struct Scrubs {
    parts: BTreeMap<Ticket, Parts>,
}

#[derive(Debug)]
struct Parts {
    left: usize,
    failed: bool,
}

impl Scrubs {
    /// A scrub begins, of one part at least.
    pub(crate) fn begin(&mut self, ticket: Ticket, parts: usize) {
        self.parts.insert(ticket, Parts { left: parts, failed: false });
    }

    /// A part has ended; what the whole comes to, when it was the last one to end. One that failed spoils it.
    pub(crate) fn ended(&mut self, ticket: Ticket, result: StepResult) -> Option<StepResult> {
        let parts = self.parts.get_mut(&ticket)?;
        parts.left = parts.left.saturating_sub(1);
        parts.failed |= result != StepResult::Ok;
        if parts.left > 0 {
            return None;
        }
        let whole = if parts.failed { StepResult::Io } else { StepResult::Ok };
        self.parts.remove(&ticket);
        Some(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrub_ends_with_the_part_that_ends_last_and_one_that_failed_spoils_it() {
        let (mut scrubs, one, other) = (Scrubs::default(), Ticket(1), Ticket(2));
        scrubs.begin(one, 3);
        scrubs.begin(other, 1);
        assert_eq!(scrubs.ended(one, StepResult::Ok), None);
        assert_eq!(scrubs.ended(other, StepResult::Ok), Some(StepResult::Ok));
        assert_eq!(scrubs.ended(one, StepResult::Io), None, "the others are still under way");
        assert_eq!(scrubs.ended(one, StepResult::Ok), Some(StepResult::Io), "not all frames are clean");
        assert_eq!(scrubs.ended(one, StepResult::Ok), None, "it has ended before");
    }
}
