use std::os::fd::AsFd;
use std::sync::atomic::Ordering::SeqCst;

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
