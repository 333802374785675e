use std::cell::Cell;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::atomic::Ordering::SeqCst;

use uhmm_shared::agent::{Done, was_answered};
use uhmm_shared::ring::{HEAD, LANE, TAIL};

use super::*;
use crate::shared::model::ModelWords;

fn descriptor(value: u8) -> [u8; DESCRIPTOR_BYTES] {
    let mut descriptor = [value; DESCRIPTOR_BYTES];
    descriptor[0] = 0xa5;
    descriptor
}

/// The two ends of lane 0 of one memory, as the two processes have them.
fn model_ends(entries: u64) -> (Producer<ModelWords>, Consumer<ModelWords>) {
    let creator = Ring::format(ModelWords::new(word_count(entries)), entries);
    let opener = Ring { words: creator.words.clone(), entries, side: Side::Opener };
    let (producer, _) = creator.into_ends();
    let (_, consumer) = opener.into_ends();
    (producer, consumer)
}

#[test]
fn a_wake_up_is_never_lost() {
    const PUSHES: u8 = 2;
    loom::model(|| {
        let (mut producer, mut consumer) = model_ends(2);
        let bell = loom::sync::Arc::new(loom::sync::Notify::new());
        let rung = bell.clone();
        let pushing = loom::thread::spawn(move || {
            for value in 0..PUSHES {
                if producer.push(&descriptor(value)).expect("two entries are enough") {
                    rung.notify();
                }
            }
        });
        let mut next = 0;
        while next < PUSHES {
            match consumer.pop().expect("an honest producer") {
                Some(found) => {
                    assert_eq!(found, descriptor(next));
                    next += 1;
                }
                // loom reports a deadlock if the producer's signal does not come.
                None => {
                    if consumer.arm().expect("an honest producer") {
                        bell.wait();
                    }
                }
            }
        }
        pushing.join().expect("the producer");
    });
}

#[test]
fn descriptors_arrive_in_order_across_the_wrap_and_through_two_mappings() {
    let ring = Ring::create(4).expect("a ring");
    let peer = Ring::open(ring.fd().as_fd()).expect("the same ring");
    let (mut there, mut back_in) = ring.into_ends();
    let (mut back, mut there_out) = peer.into_ends();
    for round in 0..50_u8 {
        for step in 0..3 {
            assert!(!there.push(&descriptor(round.wrapping_mul(3) + step)).expect("room"));
        }
        back.push(&descriptor(round)).expect("room");
        for step in 0..3 {
            assert_eq!(there_out.pop().expect("honest"), Some(descriptor(round.wrapping_mul(3) + step)));
        }
        assert_eq!(there_out.pop().expect("honest"), None);
        assert_eq!(back_in.pop().expect("honest"), Some(descriptor(round)));
    }
}

#[test]
fn a_full_ring_refuses_until_something_is_taken() {
    let ring = Ring::create(2).expect("a ring");
    let (_, mut consumer) = Ring::open(ring.fd().as_fd()).expect("the same ring").into_ends();
    let (mut producer, _) = ring.into_ends();
    producer.push(&descriptor(1)).expect("room");
    producer.push(&descriptor(2)).expect("room");
    assert!(matches!(producer.push(&descriptor(3)), Err(RingError::Full)));
    assert_eq!(consumer.pop().expect("honest"), Some(descriptor(1)));
    producer.push(&descriptor(3)).expect("room again");
    assert_eq!(consumer.pop().expect("honest"), Some(descriptor(2)));
    assert_eq!(consumer.pop().expect("honest"), Some(descriptor(3)));
}

#[test]
fn a_signal_is_asked_for_once_and_only_by_an_armed_consumer() {
    let ring = Ring::create(8).expect("a ring");
    let (_, mut consumer) = Ring::open(ring.fd().as_fd()).expect("the same ring").into_ends();
    let (mut producer, _) = ring.into_ends();
    assert!(!producer.push(&descriptor(1)).expect("room"), "nobody sleeps");
    assert!(!consumer.arm().expect("honest"), "one waits: do not sleep");
    consumer.pop().expect("honest").expect("one");
    assert!(consumer.arm().expect("honest"));
    assert!(producer.push(&descriptor(2)).expect("room"), "the sleeper must be signalled");
    assert!(!producer.push(&descriptor(3)).expect("room"), "once");
}

#[test]
fn indices_that_a_hostile_peer_moves_are_refused_at_both_ends() {
    for head in [3, 1 << 40, u64::MAX] {
        let ring = Ring::create(2).expect("a ring");
        let words = ring.words.clone();
        let (_, mut consumer) = Ring::open(ring.fd().as_fd()).expect("the same ring").into_ends();
        words.store(LANE[0] + HEAD, head, SeqCst);
        assert!(matches!(consumer.pop(), Err(RingError::Corrupt { .. })), "head {head}");
        assert!(matches!(consumer.arm(), Err(RingError::Corrupt { .. })), "head {head}");
    }
    for tail in [3, u64::MAX] {
        let ring = Ring::create(2).expect("a ring");
        let words = ring.words.clone();
        let (mut producer, _) = ring.into_ends();
        producer.push(&descriptor(1)).expect("room");
        producer.push(&descriptor(2)).expect("room");
        words.store(LANE[0] + TAIL, tail, SeqCst);
        assert!(matches!(producer.push(&descriptor(3)), Err(RingError::Corrupt { .. })), "tail {tail}");
    }
    let ring = Ring::create(2).expect("a ring");
    let words = ring.words.clone();
    let (_, mut consumer) = Ring::open(ring.fd().as_fd()).expect("the same ring").into_ends();
    let (mut producer, _) = ring.into_ends();
    producer.push(&descriptor(1)).expect("room");
    consumer.pop().expect("honest").expect("one");
    words.store(LANE[0] + HEAD, 0, SeqCst);
    assert!(matches!(consumer.pop(), Err(RingError::Corrupt { .. })), "a head that goes back");
}

#[test]
fn memory_that_is_no_ring_is_refused() {
    let plain = SharedWords::create("not-a-ring", 512).expect("words");
    assert!(matches!(Ring::open(plain.fd().as_fd()), Err(RingError::Magic { found: 0 })));
    plain.store(0, MAGIC, SeqCst);
    assert!(matches!(Ring::open(plain.fd().as_fd()), Err(RingError::Entries { entries: 0 })));
    plain.store(ENTRIES, 3, SeqCst);
    assert!(matches!(Ring::open(plain.fd().as_fd()), Err(RingError::Entries { entries: 3 })));
    plain.store(ENTRIES, 64, SeqCst);
    assert!(matches!(Ring::open(plain.fd().as_fd()), Err(RingError::Words(WordsError::TooSmall { .. }))));
    plain.store(ENTRIES, 16, SeqCst);
    assert!(Ring::open(plain.fd().as_fd()).is_ok());
    for entries in [0, 3, MAX_ENTRIES * 2] {
        assert!(matches!(Ring::create(entries), Err(RingError::Entries { .. })));
    }
}

#[test]
fn a_file_that_could_shrink_under_us_is_refused() {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(1 << 16).expect("a size");
    assert!(matches!(Ring::open(file.as_fd()), Err(RingError::Words(WordsError::Hook(_)))));
}

/// Words of a process that is killed after so many writes: those behind that never happen, whatever its code goes on to do.
#[derive(Clone)]
struct Mortal {
    words: Arc<ModelWords>,
    writes_left: Rc<Cell<u32>>,
}

impl Mortal {
    fn new(words: &Arc<ModelWords>, writes: u32) -> Self {
        Self { words: words.clone(), writes_left: Rc::new(Cell::new(writes)) }
    }

    fn is_dead(&self) -> bool {
        self.writes_left.get() == 0
    }

    fn writes(&self) -> bool {
        let left = self.writes_left.get();
        self.writes_left.set(left.saturating_sub(1));
        left > 0
    }
}

impl Words for Mortal {
    fn word_count(&self) -> usize {
        self.words.word_count()
    }
    fn load(&self, index: usize, order: Ordering) -> u64 {
        self.words.load(index, order)
    }
    fn store(&self, index: usize, value: u64, order: Ordering) {
        if self.writes() {
            self.words.store(index, value, order);
        }
    }
    fn swap(&self, index: usize, value: u64, order: Ordering) -> u64 {
        if self.writes() { self.words.swap(index, value, order) } else { 0 }
    }
    fn compare_exchange(&self, _: usize, _: u64, _: u64, _: Ordering, _: Ordering) -> Result<u64, u64> {
        unreachable!("rings need none")
    }
    fn fence(&self, order: Ordering) {
        self.words.fence(order);
    }
}

/// More than a ring of two holds.
const ORDERS: u64 = 3;

fn model(run: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    // Every place for two changes from one process to the other, beside those where one waits.
    builder.preemption_bound = Some(2);
    builder.check(run);
}

/// The agent's way with an order (`sdk/agent/src/orders.rs`): answer, and only then take it out.
fn serve(words: &Mortal) {
    let mut orders = ring::Consumer::open(words.clone(), 0, 2);
    let mut answers = ring::Producer::open(words.clone(), 1, 2);
    while orders.index() < ORDERS && !words.is_dead() {
        let Some([id, ..]) = orders.peek().expect("an honest pager") else {
            loom::thread::yield_now();
            continue;
        };
        let done = Done { id, area: orders.index() };
        if !was_answered(&answers, &done) {
            answers.push(&done.encode()).expect("there is room for all that were given");
        }
        orders.advance();
    }
}

#[test]
fn each_order_is_answered_once_whenever_agents_are_killed() {
    // Twelve writes an order at most; beyond, nobody is killed.
    for writes in 1..12 * ORDERS as u32 {
        model(move || {
            let words = Arc::new(ModelWords::new(word_count(2)));
            ring::format(&*words, 2);
            let theirs = words.clone();
            let agents = loom::thread::spawn(move || {
                for writes in [writes, writes * 5 % 13 + 1, u32::MAX] {
                    serve(&Mortal::new(&theirs, writes));
                }
            });
            let mut orders = ring::Producer::open(words.clone(), 0, 2);
            let mut answers = ring::Consumer::open(words.clone(), 1, 2);
            let (mut given, mut got) = (0, Vec::new());
            while got.len() < ORDERS as usize {
                // One fewer than there are entries: an order that is answered may not be taken out yet.
                if given < ORDERS && given == got.len() as u64 {
                    given += 1;
                    orders.push(&[given; 8]).expect("room");
                }
                match answers.pop().expect("an honest agent") {
                    Some([id, ..]) => got.push(id),
                    None => loom::thread::yield_now(),
                }
            }
            agents.join().expect("the agents");
            assert_eq!(got, [1, 2, 3]);
            assert_eq!(answers.pop().expect("an honest agent"), None, "answered twice");
        });
    }
}

#[test]
fn a_producer_that_is_opened_after_a_crash_overwrites_nothing_that_was_not_taken() {
    const NEW: u64 = 1000;
    for writes in 1..10 * ORDERS as u32 {
        model(move || {
            let words = Arc::new(ModelWords::new(word_count(2)));
            ring::format(&*words, 2);
            let theirs = words.clone();
            let pagers = loom::thread::spawn(move || {
                for (writes, mark) in [(writes, 0), (u32::MAX, NEW)] {
                    let words = Mortal::new(&theirs, writes);
                    let mut producer = ring::Producer::open(words.clone(), 0, 2);
                    while producer.index() < ORDERS && !words.is_dead() {
                        match producer.push(&[mark + producer.index(); 8]) {
                            Ok(_) => {}
                            Err(RingFault::Full) => loom::thread::yield_now(),
                            Err(fault) => panic!("{fault:?}"),
                        }
                    }
                }
            });
            let mut consumer = ring::Consumer::open(words, 0, 2);
            let mut is_new = false;
            for index in 0..ORDERS {
                let found = loop {
                    match consumer.pop().expect("an honest producer") {
                        Some(found) => break found,
                        None => loom::thread::yield_now(),
                    }
                };
                is_new |= found[0] >= NEW;
                assert_eq!(found, [if is_new { NEW + index } else { index }; 8]);
            }
            pagers.join().expect("the pagers");
            assert_eq!(consumer.pop().expect("an honest producer"), None);
        });
    }
}
