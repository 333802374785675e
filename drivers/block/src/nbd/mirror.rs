//! One request, one or two servers: whom to ask, and what their answers come to. Pure.
//!
//! ```text
//!   write --> every replica that is here --> done: those that did it have the page, the others are marked as behind
//!   read  --> one that has it; tried again: the other one
//! ```
//! A write that nobody did has failed; one that a lost session may still do, and nobody has done, is unknown. Where one has done it and the other's
//! session broke, the same bytes may still land there: the block is haunted until that session is dead, and the page is good.

use std::collections::HashMap;

use crate::backend::Answer;
use crate::machine::Fault;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Ask this replica. `hurry`: another one could do it.
    Send {
        /// Which.
        replica: u32,
        /// Do not wait for it while it is away.
        hurry: bool,
    },
    /// It does not have what this write brought. Before the answer.
    Behind(u32),
    /// A write may still land on it, of this session. Before the answer.
    Haunted(u64),
    /// To whoever asked.
    Answer(Answer),
}

#[derive(Debug)]
struct Flight {
    write: bool,
    waits: u32,
    done: u32,
    fault: Option<Fault>,
    unknown: Option<u64>,
    haunts: Vec<u64>,
}

/// See the module head. Replicas are bits.
#[derive(Debug)]
pub struct Mirror {
    count: u32,
    flights: HashMap<u64, Flight>,
}

impl Mirror {
    /// Over so many servers.
    pub fn new(count: u32) -> Self {
        Self { count, flights: HashMap::new() }
    }

    /// Requests that were not answered.
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// A request. `up`: who is here. `has`: who has all of its blocks (of a read).
    pub fn submit(&mut self, id: u64, write: bool, tries: u32, up: u32, has: u32) -> Vec<Step> {
        let all = (1 << self.count) - 1;
        let (up, has) = (up & all, has & all);
        let asked = if write {
            // Nobody is here: the first one says so.
            if up == 0 { 1 } else { up }
        } else {
            one_of([up & has, has, up, all], tries)
        };
        let of = |mask: u32| (0..self.count).filter(move |replica| mask & 1 << replica != 0);
        let others_can = |replica: u32| {
            let others = if write { up } else { up & has };
            others & !(1 << replica) != 0
        };
        let mut steps: Vec<Step> = Vec::new();
        if write {
            steps.extend(of(all & !asked).map(Step::Behind));
        }
        steps.extend(of(asked).map(|replica| Step::Send { replica, hurry: others_can(replica) }));
        let flight = Flight { write, waits: asked, done: 0, fault: None, unknown: None, haunts: Vec::new() };
        self.flights.insert(id, flight);
        steps
    }

    /// A replica has answered.
    pub fn answered(&mut self, replica: u32, id: u64, answer: Answer) -> Vec<Step> {
        let bit = 1 << replica;
        let Some(flight) = self.flights.get_mut(&id).filter(|flight| flight.waits & bit != 0) else {
            return Vec::new();
        };
        flight.waits &= !bit;
        match answer {
            Answer::Done => flight.done |= bit,
            Answer::Failed(fault) => drop(flight.fault.get_or_insert(fault)),
            Answer::Unknown(session, fault) => {
                flight.fault.get_or_insert(fault);
                // The last one is told; the earlier ones are held by their pins.
                flight.haunts.extend(flight.unknown.replace(session));
            }
        }
        if flight.waits != 0 {
            return Vec::new();
        }
        let Some(flight) = self.flights.remove(&id) else { return Vec::new() };
        self.ended(flight)
    }

    fn ended(&self, flight: Flight) -> Vec<Step> {
        let Flight { write, done, fault, unknown, mut haunts, .. } = flight;
        let no_reason = || Fault::Refused("no server has answered".to_owned());
        let answer = match (done, unknown) {
            (0, None) => Answer::Failed(fault.unwrap_or_else(no_reason)),
            (0, Some(session)) => Answer::Unknown(session, fault.unwrap_or_else(no_reason)),
            _ => {
                haunts.extend(unknown);
                Answer::Done
            }
        };
        let mut steps: Vec<Step> = haunts.into_iter().map(Step::Haunted).collect();
        if write && answer == Answer::Done {
            let behind = (0..self.count).filter(|replica| done & 1 << replica == 0);
            steps.extend(behind.map(Step::Behind));
        }
        steps.push(Step::Answer(answer));
        steps
    }
}

/// One of the first mask that is not empty, another one with each try.
fn one_of(masks: [u32; 4], tries: u32) -> u32 {
    let mask = masks.into_iter().find(|mask| *mask != 0).unwrap_or(1);
    let at = tries % mask.count_ones();
    (0..32).filter(|replica| mask & 1 << replica != 0).nth(at as usize).map_or(1, |replica| 1 << replica)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn send(replica: u32, hurry: bool) -> Step {
        Step::Send { replica, hurry }
    }

    fn no() -> Fault {
        Fault::Refused("no".to_owned())
    }

    #[test]
    fn a_write_goes_to_both_and_counts_when_one_has_it() {
        let mut mirror = Mirror::new(2);
        assert_eq!(mirror.submit(1, true, 0, 0b11, 0), [send(0, true), send(1, true)]);
        assert_eq!(mirror.answered(1, 1, Answer::Done), []);
        assert_eq!(mirror.answered(1, 1, Answer::Done), [], "twice changes nothing");
        assert_eq!(mirror.answered(0, 1, Answer::Done), [Step::Answer(Answer::Done)]);
        mirror.submit(2, true, 0, 0b11, 0);
        mirror.answered(0, 2, Answer::Failed(no()));
        assert_eq!(mirror.answered(1, 2, Answer::Done), [Step::Behind(0), Step::Answer(Answer::Done)]);
        mirror.submit(3, true, 0, 0b11, 0);
        mirror.answered(1, 3, Answer::Unknown(7, no()));
        let expected = [Step::Haunted(7), Step::Behind(1), Step::Answer(Answer::Done)];
        assert_eq!(mirror.answered(0, 3, Answer::Done), expected);
        assert_eq!(mirror.submit(4, true, 0, 0b10, 0), [Step::Behind(0), send(1, false)]);
        assert_eq!(mirror.answered(1, 4, Answer::Done), [Step::Behind(0), Step::Answer(Answer::Done)]);
        assert_eq!(mirror.in_flight(), 0);
    }

    #[test]
    fn a_write_that_nobody_did_has_failed_and_one_that_may_land_is_unknown() {
        let mut mirror = Mirror::new(2);
        assert_eq!(mirror.submit(1, true, 0, 0, 0), [Step::Behind(1), send(0, false)]);
        assert_eq!(mirror.answered(0, 1, Answer::Failed(no())), [Step::Answer(Answer::Failed(no()))]);
        mirror.submit(2, true, 0, 0b11, 0);
        mirror.answered(0, 2, Answer::Unknown(7, no()));
        assert_eq!(mirror.answered(1, 2, Answer::Failed(no())), [Step::Answer(Answer::Unknown(7, no()))]);
        mirror.submit(3, true, 0, 0b11, 0);
        mirror.answered(0, 3, Answer::Unknown(7, no()));
        let expected = [Step::Haunted(7), Step::Answer(Answer::Unknown(8, no()))];
        assert_eq!(mirror.answered(1, 3, Answer::Unknown(8, no())), expected, "both sessions hold the blocks");
    }

    #[test]
    fn a_read_asks_who_has_it_and_then_the_other_one() {
        let mut mirror = Mirror::new(2);
        assert_eq!(mirror.submit(1, false, 0, 0b11, 0b11), [send(0, true)]);
        assert_eq!(mirror.submit(2, false, 1, 0b11, 0b11), [send(1, true)]);
        assert_eq!(mirror.submit(3, false, 0, 0b10, 0b11), [send(1, false)]);
        assert_eq!(mirror.submit(4, false, 1, 0b11, 0b01), [send(0, false)], "the other one does not have it");
        assert_eq!(mirror.submit(5, false, 0, 0b10, 0b01), [send(0, false)], "it is waited for");
        assert_eq!(mirror.answered(0, 5, Answer::Done), [Step::Answer(Answer::Done)]);
        let mut alone = Mirror::new(1);
        assert_eq!(alone.submit(1, false, 3, 0, 0), [send(0, false)]);
    }

    proptest! {
        /// Whatever happens to two servers: a page that counts as written is on a server that is not marked as behind, and every session that may still
        /// write a block holds it.
        #[test]
        fn what_counts_is_somewhere(up in 0u32..4, first in 0u8..3, second in 0u8..3, turn in any::<bool>()) {
            let mut mirror = Mirror::new(2);
            let (mut behind, mut sent, mut told, mut held) = (0u32, 0u32, None, Vec::new());
            let mut answers = [(0u32, first), (1, second)];
            if turn { answers.reverse() }
            let mut steps = mirror.submit(1, true, 0, up, 0);
            for round in 0..3 {
                for step in steps.drain(..) {
                    match step {
                        Step::Send { replica, .. } => sent |= 1 << replica,
                        Step::Behind(replica) => behind |= 1 << replica,
                        Step::Haunted(session) => held.push(session),
                        Step::Answer(answer) => prop_assert!(told.replace(answer).is_none()),
                    }
                }
                if let Some((replica, kind)) = answers.get(round).copied().filter(|(replica, _)| sent & 1 << replica != 0) {
                    let session = u64::from(replica) + 10;
                    let answer = [Answer::Done, Answer::Failed(no()), Answer::Unknown(session, no())][usize::from(kind)].clone();
                    steps = mirror.answered(replica, 1, answer);
                }
            }
            let did = answers.iter().filter(|(replica, kind)| sent & 1 << replica != 0 && *kind == 0).fold(0, |mask, (replica, _)| mask | 1 << replica);
            let told = told.expect("it is answered");
            prop_assert_eq!(told == Answer::Done, did != 0);
            if did != 0 {
                prop_assert_eq!(!behind & 0b11, did, "those that are not behind are those that did it");
            }
            if let Answer::Unknown(session, _) = &told {
                held.push(*session);
            }
            for (replica, _) in answers.iter().filter(|(replica, kind)| sent & 1 << replica != 0 && *kind == 2) {
                prop_assert!(held.contains(&(u64::from(*replica) + 10)));
            }
        }
    }
}
