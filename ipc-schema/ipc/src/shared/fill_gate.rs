//! The gate between an agent that fills and a pager that reads: `uhmm_shared::fill_gate`, here under loom and over a real memfd.

pub use uhmm_shared::fill_gate::{Fill, FillGate};

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::{Acquire, Release};

    use loom::sync::Arc as LoomArc;
    use loom::sync::atomic::AtomicBool;

    use super::*;
    use crate::shared::model::ModelWords;
    use crate::shared::words::SharedWords;

    #[test]
    fn model_nothing_is_filled_after_a_change_was_read() {
        loom::model(|| {
            let gate = LoomArc::new(FillGate::at(ModelWords::new(2), 0));
            let dropped = LoomArc::new(AtomicBool::new(false));
            let agent = {
                let (gate, dropped) = (gate.clone(), dropped.clone());
                loom::thread::spawn(move || {
                    gate.fill(1, 1, || assert!(!dropped.load(Acquire), "filled after the program had dropped the page"))
                })
            };
            let may_read = gate.begin_reading();
            if may_read {
                // From here on the program goes on.
                dropped.store(true, Release);
                gate.end_reading(1);
            }
            let filled = agent.join().expect("the agent");
            assert!(may_read || filled == Fill::Done(()), "nobody got anywhere");
            if !may_read {
                assert_eq!(gate.fill(1, 1, || ()), Fill::Reading, "READING stays, so that the pager's turn comes");
                assert!(gate.begin_reading());
                gate.end_reading(1);
            }
            assert_eq!(gate.fill(1, 1, || ()), Fill::Refused);
            assert_eq!(gate.fill(1, 2, || ()), Fill::Done(()));
        });
    }

    /// Both sides' view of one memory.
    fn gate() -> FillGate<SharedWords> {
        FillGate::at(SharedWords::create("uhmm-test-gate", 2).expect("memory"), 0)
    }

    #[test]
    fn whatever_else_an_agent_does_waits_for_the_pager_too_and_holds_it_up() {
        let gate = gate();
        let seen = gate.act(1, || gate.begin_reading());
        assert_eq!(seen, Some(false), "the pager reads later");
        assert_eq!(gate.act(1, || ()), None, "and its turn comes next");
        gate.end_reading(9);
        assert_eq!(gate.act(1, || ()), Some(()), "drops are no reason not to");
    }

    #[test]
    fn fills_wait_for_the_next_pager_when_one_dies_while_it_reads_and_its_orders_are_refused() {
        let gate = gate();
        assert!(gate.begin_reading());
        assert_eq!(gate.fill(1, 7, || ()), Fill::Reading);
        gate.end_reading(8);
        assert_eq!(gate.fill(1, 7, || ()), Fill::Refused);
        assert_eq!(gate.fill(1, 9, || ()), Fill::Done(()));
        gate.end_reading(3);
        assert_eq!(gate.fill(1, 8, || ()), Fill::Refused, "what is refused stays refused");
    }

    #[test]
    fn a_fill_that_panics_does_not_keep_the_pager_from_reading() {
        let gate = gate();
        let panicked =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| gate.fill(1, 1, || panic!("as asked"))));
        assert!(panicked.is_err() && gate.begin_reading());
    }

    #[test]
    fn an_agent_that_is_killed_while_it_fills_holds_up_nobody_once_its_death_is_known() {
        let gate = gate();
        gate.fill(5, 1, || {
            assert!(!gate.begin_reading(), "it fills");
            gate.agent_is_gone(4);
            assert!(!gate.begin_reading(), "an older one's death says nothing");
            gate.agent_is_gone(5);
            assert!(gate.begin_reading());
            gate.end_reading(0);
            // The next agent has begun when the end of the dead one is told once more.
            gate.fill(6, 1, || {
                gate.agent_is_gone(5);
                assert!(!gate.begin_reading());
            });
        });
        assert!(gate.begin_reading());
    }
}
