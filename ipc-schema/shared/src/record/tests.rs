use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::vec::Vec;

use super::*;

struct Memory(Vec<AtomicU64>);

impl Memory {
    fn new(words: usize) -> Arc<Self> {
        Arc::new(Self((0..words).map(|_| AtomicU64::new(0)).collect()))
    }
}

impl Words for Memory {
    fn word_count(&self) -> usize {
        self.0.len()
    }
    fn load(&self, index: usize, order: Ordering) -> u64 {
        self.0[index].load(order)
    }
    fn store(&self, index: usize, value: u64, order: Ordering) {
        self.0[index].store(value, order);
    }
    fn swap(&self, index: usize, value: u64, order: Ordering) -> u64 {
        self.0[index].swap(value, order)
    }
    fn compare_exchange(&self, index: usize, old: u64, new: u64, yes: Ordering, no: Ordering) -> Result<u64, u64> {
        self.0[index].compare_exchange(old, new, yes, no)
    }
    fn fence(&self, order: Ordering) {
        std::sync::atomic::fence(order);
    }
}

fn writer(memory: &Arc<Memory>, incarnation: u32) -> Writer<Arc<Memory>> {
    Writer::begin(memory.clone(), incarnation, 7, 1).unwrap()
}

fn reader(memory: &Arc<Memory>) -> Reader<impl Fn(usize) -> u64 + use<>> {
    let memory = memory.clone();
    Reader::new(move |index| memory.0[index].load(Ordering::Acquire))
}

fn numbered(n: u64) -> Event {
    Event { trace: n, space: n, addr: n, pages: n, value: n, ..Event::new(What::CpuFault, n) }
}

#[test]
fn events_come_in_order_and_whole_with_who_wrote_them() {
    let memory = Memory::new(WORDS);
    let mut writer = writer(&memory, 3);
    let mut reader = reader(&memory);
    assert_eq!(reader.take_next(), Next::End);
    let moved = Event { why: Why::Eviction, from: Place::Device(2), to: Place::Home, ..numbered(9) };
    writer.push(&moved);
    writer.push(&Event::named(What::ServiceDied, 5, "a name of more than twenty-four bytes", 4));
    assert_eq!(reader.take_next(), Next::Event(Event { sequence: 1, incarnation: 3, ..moved }));
    let Next::Event(named) = reader.take_next() else { panic!("a second one was written") };
    assert_eq!((&named.name_bytes()[..], named.value), (&b"a name of more than twen"[..], 4));
    assert_eq!(reader.take_next(), Next::End);
}

#[test]
fn a_slow_reader_is_told_how_much_it_has_lost() {
    let memory = Memory::new(WORDS);
    let mut writer = writer(&memory, 1);
    let mut reader = reader(&memory);
    let all = EVENTS_MAX as u64 + 100;
    (1..=all).for_each(|n| writer.push(&numbered(n)));
    assert_eq!(reader.take_next(), Next::Lost(100));
    for n in 101..=all {
        assert_eq!(reader.take_next(), Next::Event(Event { sequence: n, incarnation: 1, ..numbered(n) }));
    }
    assert_eq!(reader.take_next(), Next::End);
}

#[test]
fn what_a_reader_gets_while_events_are_overwritten_is_whole_and_complete() {
    let memory = Memory::new(WORDS);
    let mut writer = writer(&memory, 1);
    let mut reader = reader(&memory);
    const ALL: u64 = 300_000;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let thread = std::thread::spawn(move || {
        (1..=ALL).for_each(|n| writer.push(&numbered(n)));
        stopped.store(true, Ordering::Release);
    });
    let (mut read, mut lost) = (0, 0);
    loop {
        let ended = stop.load(Ordering::Acquire);
        match reader.take_next() {
            Next::Event(event) => {
                let n = event.sequence;
                assert_eq!(event, Event { sequence: n, incarnation: 1, ..numbered(n) });
                read += 1;
            }
            Next::Lost(count) => lost += count,
            Next::End if ended => break,
            Next::End => std::thread::yield_now(),
        }
    }
    thread.join().unwrap();
    assert_eq!(read + lost, ALL);
    assert!(read > 0);
}

#[test]
fn a_successor_goes_on_where_the_dead_one_stopped() {
    let memory = Memory::new(WORDS);
    let mut first = writer(&memory, 1);
    let faults = first.define("faults", Kind::Counter).unwrap();
    let waits = first.define_histogram("waits").unwrap();
    first.set(faults, 41);
    first.observe(waits, 300);
    first.push(&numbered(1));
    // Killed in the middle of its second event.
    memory.0[EVENTS + 2 * EVENT_WORDS].store(0, Ordering::Relaxed);
    memory.0[HEAD].store(2, Ordering::Relaxed);
    let mut second = writer(&memory, 2);
    assert_ne!(second.define("younger", Kind::Gauge), Some(faults));
    assert_eq!(second.define("faults", Kind::Counter), Some(faults));
    assert_eq!((second.value(faults), second.define_histogram("waits")), (41, Some(waits)));
    second.observe(waits, 300);
    second.push(&numbered(3));
    let mut reader = reader(&memory);
    assert!(matches!(reader.take_next(), Next::Event(Event { sequence: 1, incarnation: 1, .. })));
    assert_eq!(reader.take_next(), Next::Lost(1));
    assert!(matches!(reader.take_next(), Next::Event(Event { sequence: 3, incarnation: 2, .. })));
    let times = reader.histogram(waits);
    assert_eq!((times.sum_ns, times.buckets[1]), (600, 2));
    assert_eq!(reader.defined(), 3);
    assert_eq!(&reader.definition(faults).unwrap().name[..7], b"faults\0");
}

#[test]
fn a_time_counts_in_the_first_bucket_whose_bound_is_above_it() {
    for ns in [0, 1, 255, 256, 257, 511, 512, 1 << 20, (1 << 37) - 1, 1 << 37, u64::MAX] {
        let bucket = bucket_of(ns);
        assert!(bucket_bound_ns(bucket).is_none_or(|bound| ns < bound), "{ns} in {bucket}");
        assert!(bucket == 0 || bucket_bound_ns(bucket - 1).is_some_and(|bound| ns >= bound), "{ns} in {bucket}");
    }
}

#[test]
fn memory_that_is_no_record_becomes_one_and_nonsense_in_one_is_no_event() {
    let memory = Memory::new(WORDS);
    memory.0.iter().for_each(|word| word.store(u64::MAX, Ordering::Relaxed));
    assert!(!reader(&memory).is_record());
    drop(writer(&memory, 1));
    assert!(reader(&memory).is_record());
    assert_eq!((reader(&memory).defined(), reader(&memory).take_next()), (0, Next::End));
    // A writer that lies about everything ends nobody.
    memory.0.iter().skip(1).for_each(|word| word.store(u64::MAX - 1, Ordering::Relaxed));
    let mut reader = reader(&memory);
    assert!(matches!(reader.take_next(), Next::Lost(_)));
    (0..10).for_each(|_| assert_eq!(reader.take_next(), Next::Lost(1)));
    assert_eq!(reader.definition(0).map(|definition| definition.kind), None);
    assert!(Writer::begin(Memory::new(WORDS - 1), 1, 1, 1).is_none());
}

#[test]
fn there_is_room_for_so_much_and_no_more() {
    let memory = Memory::new(WORDS);
    let mut writer = writer(&memory, 1);
    let names: Vec<_> = (0..METRICS_MAX).map(|n| std::format!("metric_{n}")).collect();
    assert!(names.iter().enumerate().all(|(n, name)| writer.define(name, Kind::Counter) == Some(n)));
    assert_eq!(writer.define("one more", Kind::Counter), None);
    writer.set(METRICS_MAX, 1);
    writer.observe(HISTOGRAMS_MAX, 1);
    assert_eq!(writer.value(0), 0);
}
