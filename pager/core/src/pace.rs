//! What a turn does, in order, and when what could not be done is tried again.

use crate::core::Core;
use crate::event::{Action, Directory, Ticket};
use crate::policy::Policy;

/// Between two tries of a step that finds no memory.
const NO_MEMORY_PAUSE_US: std::ops::Range<u64> = 1_000..256_000;
impl<P: Policy> Core<P> {
    /// One step of one request, and whatever met EAGAIN once more.
    pub(crate) fn tick(&mut self, dir: &impl Directory, out: &mut Vec<Action>) {
        let now_us = self.now_us;
        let due = self.later.extract_if(.., |(until_us, _)| *until_us <= now_us);
        self.again.extend(due.map(|(_, ticket)| ticket));
        let ended = self.ended;
        for ticket in std::mem::take(&mut self.again) {
            self.stats.retries += 1;
            self.repeat_step(dir, ticket, out);
        }
        if ended != self.ended {
            // All of a transfer was discarded while it waited. Who looked in this call would see its pages on the move, and wait for
            // an end that has been.
            return;
        }
        if !self.doomed.is_empty() {
            // These publish, so nobody looks at the directory in the same call.
            for ticket in std::mem::take(&mut self.doomed) {
                self.end_doomed(ticket, out);
            }
            return;
        }
        self.wake_delayed();
        self.wake_late(out);
        self.scrub_gone(out);
        if self.walk_in_turn(dir, out) {
            return;
        }
        if let Some(order) = self.ready.pop() {
            self.step(dir, order, out);
        } else if self.may_scrub_unknown() {
            self.scrub_unknown(out);
        }
    }

    /// The client may have no more memory, and nobody tells when it may: a step is tried again less and less often.
    pub(crate) fn found_no_memory(&mut self, ticket: Ticket) {
        let op = self.cpu_ops.get_mut(&ticket).map(|op| &mut op.pause_us);
        let Some(pause_us) = op.or(self.transfers.get_mut(&ticket).map(|transfer| &mut transfer.pause_us)) else {
            return;
        };
        *pause_us = (*pause_us * 2).clamp(NO_MEMORY_PAUSE_US.start, NO_MEMORY_PAUSE_US.end);
        let until_us = self.now_us + *pause_us;
        self.later.push((until_us, ticket));
    }

    /// Requests whose pause is over look again.
    fn wake_delayed(&mut self) {
        let now_us = self.now_us;
        let (requests, ready) = (&mut self.requests, &mut self.ready);
        self.paused.retain(|order| {
            let Some(request) = requests.get_mut(order) else { return false };
            let over = request.end_pause(now_us);
            if over {
                ready.push(request.lane, *order);
            }
            !over
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::{Kind, Phase, Transfer};
    use crate::{FillStop, PageStatus, Pages, RegionId, StepResult};

    type AnyCore = Core<crate::DefaultPolicy>;

    fn under_way(kind: Kind, phase: Phase) -> (AnyCore, Ticket) {
        let mut core = Core::new(crate::DefaultPolicy::default());
        let transfer = Transfer { phase, ..Transfer::new(RegionId(1), Pages { first: 0, count: 9 }, kind) };
        let ticket = core.begin(transfer, &mut Vec::new());
        (core, ticket)
    }

    /// `fail`: the answer to each try.
    fn is_tried_less_and_less_often(core: &mut AnyCore, fail: impl Fn(&mut AnyCore)) {
        let tries = |core: &mut AnyCore, milliseconds: u64| {
            let end_us = core.now_us + milliseconds * 1000;
            let mut count = 0;
            while core.now_us < end_us {
                fail(core);
                core.now_us = core.next_deadline_us().expect("it is tried again");
                core.later.clear();
                count += 1;
            }
            count
        };
        let first_second = tries(core, 1000);
        assert!((5..20).contains(&first_second), "{first_second} tries");
        assert!(tries(core, 10_000) <= 50, "no more than four a second from then on, and no fewer than that");
        assert!(tries(core, 10_000) >= 35);
    }

    #[test]
    fn what_cannot_be_put_back_is_asked_back_less_and_less_often() {
        let kind = Kind::Out { zero: false, keep: false };
        let (mut core, ticket) = under_way(kind, Phase::MoveBack(PageStatus::Busy));
        is_tried_less_and_less_often(&mut core, |core| {
            core.move_back_done(ticket, StepResult::Later, &mut Vec::new());
        });
        let (mut core, ticket) = under_way(Kind::Lost, Phase::Poison);
        is_tried_less_and_less_often(&mut core, |core| core.poison_done(ticket, StepResult::Later, &mut Vec::new()));
    }

    #[test]
    fn who_finds_no_memory_is_tried_less_and_less_often_until_it_has_some() {
        let (mut core, ticket) = under_way(Kind::Home { recovering: false }, Phase::Fill);
        is_tried_less_and_less_often(&mut core, |core| {
            core.fill_done(ticket, 0, Some(FillStop::NoMemory), &mut Vec::new());
        });
        core.fill_done(ticket, 3, Some(FillStop::NoMemory), &mut Vec::new());
        assert_eq!(core.next_deadline_us(), Some(core.now_us + 1000), "there was some: it may be quick again");
    }
}
