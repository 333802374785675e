//! Whose turn it is. Every client has a lane of its own, and so have all regions on their end together: one step of each lane, then the
//! next. A client with thousands of requests, or a dead one with thousands of regions, takes no more of the others' time than one with one.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;

use crate::event::SpaceId;

/// Who takes turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lane {
    /// A client's requests.
    Space(SpaceId),
    /// Ends of regions, whoever had them.
    Ends,
}

/// Requests that can go on.
#[derive(Debug, Default)]
pub(crate) struct Ready {
    lanes: BTreeMap<Lane, VecDeque<u64>>,
    /// What these have waited for is there: they look before anybody else, in whatever lane they are.
    first: VecDeque<u64>,
    /// Lane of the last turn.
    last: Option<Lane>,
}

impl Ready {
    pub fn is_empty(&self) -> bool {
        self.lanes.is_empty() && self.first.is_empty()
    }

    pub fn push(&mut self, lane: Lane, order: u64) {
        self.lanes.entry(lane).or_default().push_back(order);
    }

    /// The next one: of the lane behind the one that had the last turn.
    pub fn pop(&mut self) -> Option<u64> {
        if let Some(order) = self.first.pop_front() {
            return Some(order);
        }
        let after = self.last.map_or(Bound::Unbounded, Bound::Excluded);
        let lane = *self.lanes.range((after, Bound::Unbounded)).next().or_else(|| self.lanes.iter().next())?.0;
        self.last = Some(lane);
        self.take(lane, VecDeque::pop_front)
    }

    /// Takes it out again if nothing has come behind it in its lane.
    pub fn take_newest(&mut self, lane: Lane, order: u64) -> bool {
        let is_newest = self.lanes.get(&lane).and_then(VecDeque::back) == Some(&order);
        is_newest && self.take(lane, VecDeque::pop_back).is_some()
    }

    /// It goes before everybody else's, if it is there.
    pub fn prefer(&mut self, lane: Lane, order: u64) {
        let place = self.lanes.get(&lane).and_then(|lane| lane.iter().position(|other| *other == order));
        if let Some(place) = place
            && self.take(lane, |lane| lane.remove(place)).is_some()
        {
            self.first.push_front(order);
        }
    }

    fn take(&mut self, lane: Lane, one: impl FnOnce(&mut VecDeque<u64>) -> Option<u64>) -> Option<u64> {
        let queue = self.lanes.get_mut(&lane)?;
        let order = one(queue);
        if queue.is_empty() {
            self.lanes.remove(&lane);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(space: u64) -> Lane {
        Lane::Space(SpaceId(space))
    }

    #[test]
    fn who_has_much_to_do_does_not_keep_others_waiting() {
        let mut ready = Ready::default();
        (100..200).for_each(|order| ready.push(lane(1), order));
        (200..300).for_each(|order| ready.push(Lane::Ends, order));
        ready.push(lane(2), 1);
        let turns: Vec<u64> = std::iter::from_fn(|| ready.pop()).take(6).collect();
        assert_eq!(turns, [100, 1, 200, 101, 201, 102]);
        ready.push(lane(2), 2);
        let round: Vec<u64> = std::iter::from_fn(|| ready.pop()).take(3).collect();
        assert!(round.contains(&2), "its turn comes within one round: {round:?}");
        assert_eq!(std::iter::from_fn(|| ready.pop()).count() + 6 + 3, 202, "nobody is forgotten");
        assert!(ready.is_empty());
    }

    #[test]
    fn what_is_preferred_goes_first_and_what_has_just_come_can_be_taken_back() {
        let mut ready = Ready::default();
        [1, 2, 3].into_iter().for_each(|order| ready.push(lane(1), order));
        ready.push(lane(2), 4);
        ready.prefer(lane(2), 4);
        ready.prefer(lane(1), 3);
        ready.prefer(lane(1), 9);
        assert!(!ready.take_newest(lane(1), 1) && ready.take_newest(lane(1), 2) && !ready.take_newest(lane(2), 4));
        assert_eq!(std::iter::from_fn(|| ready.pop()).collect::<Vec<_>>(), [3, 4, 1]);
        assert!(ready.is_empty());
    }
}
