//! One queue pair as bookkeeping: which slot comes next, which command ids are out, whether a completion can be true.
//!
//! ```text
//!   submit:   submitted += 1, slot = submitted % entries, id = round << 8 | index of a free place      tail = submitted % entries
//!   complete: completed += 1, head = completed % entries, the phase of an entry changes each round     place free again
//! ```
//! Two counters and the set of commands in flight say everything, so that is all a next incarnation needs ([`QueuePair::adopt`]).
//! Two slots stay free: one because a full ring looks like an empty one, one for the command with which an adopting driver proves
//! that the queue works.
//!
//! An id carries the round of its place, so a completion that comes twice is noticed although the place is in use again.

use std::collections::VecDeque;

use crate::protocol::{Completion, QueueId};

/// Most entries of a queue: the low byte of an id is a place.
pub const ENTRIES_MAX: u16 = 128;
const ROUNDS: u16 = 0xff;
/// Most completions that a device is not told of. It can always post the others, and the next of those is the one that it is told of.
const UNTOLD_MAX: u16 = 8;

/// Where a command goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Slot of the submission queue.
    pub slot: u16,
    /// Its place among the commands in flight: which list page and which mark are its own.
    pub place: u16,
    /// Id of the command.
    pub id: u16,
    /// How many commands the queue has had, with this one.
    pub sequence: u64,
}

/// A completion that cannot be true. The device (or the memory between) is broken: nothing it says can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueFault {
    /// Nobody has such a command out.
    #[error("Queue {queue}: the device completed command {id:#06x}, which is not in flight")]
    UnknownId {
        /// Queue.
        queue: u16,
        /// As the device said.
        id: u16,
    },
    /// Another queue's command.
    #[error("Queue {queue}: the device completed a command of queue {said}")]
    OtherQueue {
        /// Queue.
        queue: u16,
        /// As the device said.
        said: u16,
    },
    /// A head outside the ring.
    #[error("Queue {queue}: the device has fetched up to slot {head}, but there are {entries}")]
    Head {
        /// Queue.
        queue: u16,
        /// As the device said.
        head: u16,
        /// Slots.
        entries: u16,
    },
}

#[derive(Clone, Debug)]
struct Place<T> {
    round: u16,
    owner: Option<T>,
}

/// See the module head. `T` is whatever the owner wants to know about a command in flight.
#[derive(Clone, Debug)]
pub struct QueuePair<T> {
    queue: QueueId,
    entries: u16,
    submitted: u64,
    completed: u64,
    places: Vec<Place<T>>,
    free: VecDeque<u16>,
    /// Completions taken that the device has not been told of.
    untold: u16,
    /// The last incarnation may have half taken the first completion: its command is then unknown here.
    first_may_be_known: bool,
}

impl<T> QueuePair<T> {
    /// Empty. `entries` is 4 to [`ENTRIES_MAX`].
    pub fn new(queue: QueueId, entries: u16) -> Self {
        let entries = entries.clamp(4, ENTRIES_MAX);
        let places = (0..entries - 2).map(|_| Place { round: 0, owner: None }).collect();
        let free = (0..entries - 2).collect();
        Self { queue, entries, submitted: 0, completed: 0, places, free, untold: 0, first_may_be_known: false }
    }

    /// As the last incarnation left it. `in_flight`: place, id.
    pub fn adopt(
        queue: QueueId,
        entries: u16,
        submitted: u64,
        completed: u64,
        in_flight: &[(u16, u16)],
        owner: impl Fn() -> T,
    ) -> Self {
        let base = Self::new(queue, entries);
        // How much the device was told of nobody knows: it is told at the next chance.
        let mut adopted = Self { submitted, completed, untold: base.entries, first_may_be_known: true, ..base };
        for (place, id) in in_flight {
            if let Some(entry) = adopted.places.get_mut(usize::from(*place)) {
                *entry = Place { round: id >> 8, owner: Some(owner()) };
                adopted.free.retain(|free| free != place);
            }
        }
        adopted
    }

    /// Its number.
    pub fn queue(&self) -> QueueId {
        self.queue
    }

    /// Slots.
    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// [`Self::submit`] would find a slot.
    pub fn has_room(&self) -> bool {
        self.free.len() >= 2
    }

    /// Takes a slot, if one is free (the last one stays free, see [`Self::submit_last`]).
    pub fn submit(&mut self, owner: T) -> Option<Placed> {
        if self.has_room() { self.submit_last(owner) } else { None }
    }

    /// Takes a slot, if one is free.
    pub fn submit_last(&mut self, owner: T) -> Option<Placed> {
        let place = self.free.pop_front()?;
        let slot = self.tail();
        let entry = &mut self.places[usize::from(place)];
        entry.round = (entry.round + 1) % ROUNDS;
        entry.owner = Some(owner);
        self.submitted += 1;
        Some(Placed { slot, place, id: entry.round << 8 | place, sequence: self.submitted })
    }

    /// One past the last slot in use: for the doorbell.
    pub fn tail(&self) -> u16 {
        (self.submitted % u64::from(self.entries)) as u16
    }

    /// The entry of the completion queue that comes next: for the doorbell too.
    pub fn head(&self) -> u16 {
        (self.completed % u64::from(self.entries)) as u16
    }

    /// The phase of that entry once the device has written it.
    pub fn phase(&self) -> bool {
        (self.completed / u64::from(self.entries)).is_multiple_of(2)
    }

    /// Completions so far.
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// Commands out.
    pub fn in_flight(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Those commands: id, owner.
    pub fn owners(&mut self) -> impl Iterator<Item = (u16, &mut T)> {
        self.places.iter_mut().enumerate().filter_map(|(place, entry)| {
            let id = entry.round << 8 | place as u16;
            entry.owner.as_mut().map(|owner| (id, owner))
        })
    }

    /// Takes the completion at [`Self::head`], whose phase is [`Self::phase`]: the place, and whose command it was. `None`: the last
    /// incarnation's, which had taken it already.
    ///
    /// # Errors
    /// It cannot be true; nothing changes.
    pub fn complete(&mut self, entry: &Completion) -> Result<Option<(u16, T)>, QueueFault> {
        let (queue, entries) = (self.queue.0, self.entries);
        if entry.submission_queue != queue {
            return Err(QueueFault::OtherQueue { queue, said: entry.submission_queue });
        }
        if entry.submission_head >= entries {
            return Err(QueueFault::Head { queue, head: entry.submission_head, entries });
        }
        let (place, round) = (entry.id & 0xff, entry.id >> 8);
        let found = self.places.get_mut(usize::from(place)).filter(|entry| entry.round == round);
        let owner = found.and_then(|entry| entry.owner.take());
        let tolerated = std::mem::take(&mut self.first_may_be_known);
        match owner {
            Some(owner) => {
                self.completed += 1;
                self.free.push_back(place);
                Ok(Some((place, owner)))
            }
            None if tolerated => {
                self.completed += 1;
                Ok(None)
            }
            None => Err(QueueFault::UnknownId { queue, id: entry.id }),
        }
    }

    /// What the device is to be told of completions taken: its doorbell, now and then. It needs room for what it completes next, not
    /// each place at once, and a doorbell takes longer than everything else about a completion.
    pub fn head_to_tell(&mut self) -> Option<u16> {
        self.untold = self.untold.saturating_add(1);
        let due = self.untold >= (self.entries / 4).min(UNTOLD_MAX);
        due.then(|| {
            self.untold = 0;
            self.head()
        })
    }

    /// Everything in flight, given up.
    pub fn drain(&mut self) -> Vec<T> {
        self.places.iter_mut().filter_map(|entry| entry.owner.take()).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::Status;

    fn done(queue: u16, id: u16) -> Completion {
        Completion { result: 0, submission_head: 0, submission_queue: queue, id, phase: true, status: Status::OK }
    }

    #[test]
    fn a_queue_is_full_two_before_its_size_and_one_before_that_for_ordinary_commands() {
        let mut pair = QueuePair::new(QueueId(1), 8);
        let placed: Vec<Placed> = (0..5).map_while(|n| pair.submit(n)).collect();
        assert_eq!(placed.len(), 5);
        assert_eq!((pair.submit(9), pair.tail(), pair.in_flight()), (None, 5, 5));
        assert!(pair.submit_last(9).is_some() && pair.submit_last(10).is_none());
        assert_eq!((pair.tail(), pair.in_flight()), (6, 6));
    }

    #[test]
    fn rings_wrap_and_the_phase_turns_with_them() {
        let mut pair = QueuePair::new(QueueId(1), 4);
        for round in 0..10_u64 {
            let placed = pair.submit(round).unwrap();
            assert_eq!(u64::from(placed.slot), round % 4);
            assert_eq!((u64::from(pair.head()), pair.phase()), (round % 4, round / 4 % 2 == 0));
            assert_eq!(pair.complete(&done(1, placed.id)), Ok(Some((placed.place, round))));
        }
        assert_eq!((pair.tail(), pair.head(), pair.phase()), (2, 2, true));
    }

    #[test]
    fn ids_that_are_unknown_doubled_or_of_other_queues_are_faults_and_change_nothing() {
        let mut pair = QueuePair::new(QueueId(2), 16);
        let first = pair.submit('a').unwrap();
        let second = pair.submit('b').unwrap();
        assert_eq!(pair.complete(&done(2, 0x4242)), Err(QueueFault::UnknownId { queue: 2, id: 0x4242 }));
        assert_eq!(pair.complete(&done(3, first.id)), Err(QueueFault::OtherQueue { queue: 2, said: 3 }));
        let wild = Completion { submission_head: 16, ..done(2, first.id) };
        assert_eq!(pair.complete(&wild), Err(QueueFault::Head { queue: 2, head: 16, entries: 16 }));
        assert_eq!((pair.completed(), pair.in_flight()), (0, 2));
        assert_eq!(pair.complete(&done(2, second.id)), Ok(Some((second.place, 'b'))));
        assert_eq!(pair.complete(&done(2, second.id)), Err(QueueFault::UnknownId { queue: 2, id: second.id }));
        // The place is in use again, the id is not the same.
        while pair.submit('c').is_some() {}
        assert!(pair.complete(&done(2, second.id)).is_err());
    }

    #[test]
    fn an_adopted_queue_goes_on_where_it_was_and_knows_one_half_taken_completion() {
        let pair = || QueuePair::adopt(QueueId(1), 8, 13, 11, &[(3, 0x0503), (4, 0x0104)], || 'o');
        let mut adopted = pair();
        assert_eq!((adopted.tail(), adopted.head(), adopted.phase(), adopted.in_flight()), (5, 3, false, 2));
        assert_eq!(adopted.complete(&done(1, 0x0901)), Ok(None), "its taker died before he counted it");
        assert_eq!(adopted.complete(&done(1, 0x0503)), Ok(Some((3, 'o'))));
        assert!(adopted.complete(&done(1, 0x0902)).is_err(), "only the first");
        let mut adopted = pair();
        assert_eq!(adopted.complete(&done(1, 0x0104)), Ok(Some((4, 'o'))));
        assert!(adopted.complete(&done(1, 0x0901)).is_err(), "only the first");
    }

    #[test]
    fn a_device_is_told_of_completions_before_it_runs_out_of_room() {
        for entries in [4, 8, 16, 64, 128] {
            let mut pair = QueuePair::new(QueueId(1), entries);
            let (mut told, mut rings) = (0, 0);
            for number in 1..=1000_u64 {
                let placed = pair.submit(number).unwrap();
                pair.complete(&done(1, placed.id)).unwrap();
                if let Some(head) = pair.head_to_tell() {
                    assert_eq!(u64::from(head), number % u64::from(entries));
                    (told, rings) = (number, rings + 1);
                }
                assert!(number - told < u64::from(entries.min(32)) / 4);
            }
            assert_eq!(rings, 1000 / u64::from(entries / 4).min(8));
        }
        let mut adopted = QueuePair::adopt(QueueId(1), 64, 13, 11, &[(3, 0x0503)], || 0);
        adopted.complete(&done(1, 0x0503)).unwrap();
        assert_eq!(adopted.head_to_tell(), Some(12), "nobody knows what it was told");
    }

    proptest! {
        #[test]
        fn whatever_order_a_device_completes_in_each_command_ends_once(
            entries in 4_u16..40, order in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..400)
        ) {
            let mut pair = QueuePair::new(QueueId(1), entries);
            let (mut out, mut sent, mut ended) = (Vec::new(), 0_u64, Vec::new());
            for (submit, which) in order {
                if submit {
                    if let Some(placed) = pair.submit(sent) {
                        prop_assert!(out.iter().all(|(id, _)| *id != placed.id));
                        out.push((placed.id, sent));
                        sent += 1;
                    } else {
                        prop_assert_eq!(out.len(), usize::from(entries) - 3);
                    }
                } else if !out.is_empty() {
                    let (id, number) = out.swap_remove(which.index(out.len()));
                    prop_assert_eq!(pair.complete(&done(1, id)).map(|done| done.map(|(_, owner)| owner)), Ok(Some(number)));
                    ended.push(number);
                }
                prop_assert_eq!(pair.in_flight(), out.len());
                prop_assert_eq!(u64::from(pair.tail()), sent % u64::from(entries));
            }
            ended.extend(out.iter().map(|(_, number)| *number));
            ended.sort_unstable();
            prop_assert_eq!(ended, (0..sent).collect::<Vec<_>>());
        }
    }
}
