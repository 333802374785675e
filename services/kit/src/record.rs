//! What a service records of itself (`uhmm_shared::record`): a memfd of the vault that it alone writes, so that counters go on where a dead
//! incarnation stopped, and its last events can be read after its death.
//!
//! ```text
//!   service --event, observe: at once---> memfd <--- reads: metrics, top, events, trace, post-mortem
//!           --publish: when it has time-> memfd         (the supervisor gives it out for reading)
//! ```
//! Counters are copied when the service has nothing else to do, and every so many turns: that keeps them off the way of a fault, and
//! costs a death the counts of its last turns at most. A service that gets no memory for all this goes on without.

use std::fmt::Arguments;

use rustix::time::{ClockId, clock_gettime};
use uhmm_ipc::message::{Fd, Metric};
use uhmm_ipc::shared::words::{SharedWords, WordsError};
pub use uhmm_shared::record::{Event, Kind, Place, What, Why};
use uhmm_shared::record::{WORDS, Writer};

/// Its name in the vault.
pub const RECORD_NAME: &str = "kit/record";
/// Busy turns after which counters are copied all the same.
const BUSY_TURNS: u32 = 32;

/// A service tells its metrics through this: name (`name;label=value;...`, with the unit), kind and value, always in the same order.
pub type Each<'a> = dyn FnMut(Arguments<'_>, Kind, u64) + 'a;

/// Where a metric lies, and what an earlier incarnation has counted.
#[derive(Clone, Copy, Debug)]
struct Slot {
    place: Option<usize>,
    base: u64,
}

/// See the module head.
#[derive(Debug, Default)]
pub struct Recorder {
    writer: Option<Writer<SharedWords>>,
    fd: Option<Fd>,
    slots: Vec<Slot>,
    busy_turns: u32,
}

/// CLOCK_MONOTONIC, in which all events of all services are.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl Recorder {
    /// Goes on in what an earlier incarnation has left, if it is that.
    pub fn open(kept: Option<Fd>, incarnation: u32) -> Self {
        let adopted = kept.and_then(|fd| SharedWords::open(&fd, WORDS as u64).ok());
        let words = match adopted.map_or_else(|| SharedWords::create("uhmm-record", WORDS as u64), Ok) {
            Ok(words) => words,
            Err(error) => {
                without(&error);
                return Self::default();
            }
        };
        let pid = std::process::id();
        let mut recorder = Self {
            fd: Some(words.fd().clone()),
            writer: Writer::begin(words, incarnation, pid, now_ns()),
            ..Self::default()
        };
        recorder.event(&Event { value: u64::from(pid), ..Event::new(What::Started, now_ns()) });
        recorder
    }

    /// What the vault keeps.
    pub fn fd(&self) -> Option<&Fd> {
        self.fd.as_ref()
    }

    /// Writes an event.
    pub fn event(&mut self, event: &Event) {
        if let Some(writer) = &mut self.writer {
            writer.push(event);
        }
    }

    /// A histogram of nanoseconds. The same in every incarnation.
    pub fn histogram(&mut self, name: &str) -> HistogramId {
        HistogramId(self.writer.as_mut().and_then(|writer| writer.define_histogram(name)).unwrap_or(usize::MAX))
    }

    /// Counts a time in it.
    pub fn observe(&self, histogram: HistogramId, ns: u64) {
        if let Some(writer) = &self.writer {
            writer.observe(histogram.0, ns);
        }
    }

    /// Once a turn of the service's loop: whether [`publish`](Self::publish) is due. `idle`: nothing else was to do.
    pub fn is_due(&mut self, idle: bool) -> bool {
        self.busy_turns += u32::from(!idle);
        let due = if idle { self.busy_turns > 0 } else { self.busy_turns >= BUSY_TURNS };
        if due {
            self.busy_turns = 0;
        }
        due
    }

    /// Makes room for the service's metrics ([`names`]), once.
    pub fn define(&mut self, names: Vec<(String, Kind)>) {
        let Some(writer) = &mut self.writer else { return };
        let define = |(name, kind): (String, Kind)| {
            let place = writer.define(&name, kind);
            if place.is_none() {
                tracing::warn!(name, "There is no room for this metric in the record");
            }
            let base = place.filter(|_| kind == Kind::Counter).map_or(0, |place| writer.value(place));
            Slot { place, base }
        };
        self.slots = names.into_iter().map(define).collect();
    }

    /// Copies the service's metrics.
    pub fn publish(&self, tell: impl FnOnce(&mut Each<'_>)) {
        let Some(writer) = &self.writer else { return };
        let mut slots = self.slots.iter();
        tell(&mut |_, _, value| {
            if let Some(Slot { place: Some(place), base }) = slots.next() {
                writer.set(*place, base.wrapping_add(value));
            }
        });
    }
}

/// See [`Recorder::histogram`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistogramId(usize);

fn without(error: &WordsError) {
    tracing::warn!(%error, "No memory for the record: metrics and events of this service cannot be read");
}

/// What the metrics of a service are called.
pub fn names(tell: impl FnOnce(&mut Each<'_>)) -> Vec<(String, Kind)> {
    let mut names = Vec::new();
    tell(&mut |name, kind, _| names.push((name.to_string(), kind)));
    names
}

/// The same for `uhmm stats`.
pub fn metrics(tell: impl FnOnce(&mut Each<'_>)) -> Vec<Metric> {
    let mut metrics = Vec::new();
    tell(&mut |name, _, value| metrics.push(Metric { name: name.to_string(), value }));
    metrics
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use uhmm_shared::record::{Next, Reader};
    use uhmm_shared::words::Words;

    use super::*;

    fn reader(recorder: &Recorder) -> Reader<impl Fn(usize) -> u64 + use<>> {
        let words = SharedWords::open_whole(recorder.fd().unwrap()).unwrap();
        Reader::new(move |index| words.load(index, Ordering::Acquire))
    }

    fn tell(each: &mut Each<'_>, faults: u64, spaces: u64) {
        each(format_args!("faults"), Kind::Counter, faults);
        each(format_args!("spaces;of={}", "all"), Kind::Gauge, spaces);
    }

    fn opened(kept: Option<Fd>, incarnation: u32) -> Recorder {
        let mut recorder = Recorder::open(kept, incarnation);
        recorder.define(names(|each| tell(each, 0, 0)));
        recorder
    }

    #[test]
    fn counters_go_on_in_the_next_incarnation_and_gauges_begin_anew() {
        let first = opened(None, 1);
        first.publish(|each| tell(each, 40, 7));
        let second = opened(first.fd().cloned(), 2);
        second.publish(|each| tell(each, 2, 1));
        second.publish(|each| tell(each, 3, 0));
        let reader = reader(&second);
        assert_eq!((reader.value(0), reader.value(1), reader.incarnation()), (43, 0, 2));
    }

    #[test]
    fn what_is_no_record_is_not_written_to() {
        let foreign: Fd = std::sync::Arc::new(uhmm_kernel_hook::memfd::create_sealed("other", 4096).unwrap());
        let recorder = Recorder::open(Some(foreign), 1);
        let mut reader = reader(&recorder);
        assert!(matches!(reader.take_next(), Next::Event(Event { what: What::Started, .. })));
    }

    #[test]
    fn counters_are_due_when_there_is_nothing_else_to_do_or_after_many_turns() {
        let mut recorder = Recorder::open(None, 1);
        assert!(!recorder.is_due(true), "nothing has happened");
        assert!(!recorder.is_due(false) && recorder.is_due(true) && !recorder.is_due(true));
        assert_eq!((0..BUSY_TURNS * 2).filter(|_| recorder.is_due(false)).count(), 2);
    }
}
