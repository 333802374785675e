//! What a service has done, in memory that outlives it: counters, histograms of times, and its last events. One process writes, anybody
//! who was given the memory reads, and the writer neither knows nor waits for its readers.
//!
//! ```text
//!   words 0..8        format, incarnation, pid, events written ever, definitions, start
//!   definitions       192 x { name: 7 words, kind }      written once, kind last
//!   values            192 x 1                            a counter goes on where the incarnation before it stopped
//!   histograms          8 x { sum, 31 buckets }          bucket n: below 2^(n + 8) ns, the last one: anything
//!   events           8192 x { sequence, time, what, trace, 4 words }
//! ```
//! **An event is read whole or not at all.** Its sequence number goes to zero before its words change and comes back last; a reader that
//! finds the number before and after has read one event. A writer that is killed in between leaves a zero, and its successor goes on
//! behind it. **A slow reader loses events, and knows how many**: sequence numbers have no gaps but those.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::words::Words;

/// Format of what follows: another one is other memory.
const FORMAT: u64 = 0x7568_6d6d_7265_6301;
/// Definitions there is room for.
pub const METRICS_MAX: usize = 192;
/// Histograms there is room for.
pub const HISTOGRAMS_MAX: usize = 8;
/// Events kept.
pub const EVENTS_MAX: usize = 8192;
/// Buckets of a histogram.
pub const BUCKETS: usize = 31;
/// Longest name of a metric.
pub const NAME_BYTES_MAX: usize = 56;
/// Longest name in an event.
pub const EVENT_NAME_BYTES: usize = 24;
/// Nanoseconds below which the first bucket counts, as a power of two.
const FIRST_BUCKET_SHIFT: u32 = 8;

const INCARNATION: usize = 1;
const PID: usize = 2;
const HEAD: usize = 3;
const DEFINED: usize = 4;
const STARTED: usize = 5;
const DEFINITIONS: usize = 8;
const DEFINITION_WORDS: usize = 8;
const VALUES: usize = DEFINITIONS + METRICS_MAX * DEFINITION_WORDS;
const HISTOGRAMS: usize = VALUES + METRICS_MAX;
const HISTOGRAM_WORDS: usize = 1 + BUCKETS;
const EVENTS: usize = HISTOGRAMS + HISTOGRAMS_MAX * HISTOGRAM_WORDS;
const EVENT_WORDS: usize = 8;

/// Words of a record.
pub const WORDS: usize = EVENTS + EVENTS_MAX * EVENT_WORDS;

macro_rules! closed {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $number:literal $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum $name { $($(#[$vdoc])* $variant = $number,)* }

        impl $name {
            /// All there are.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// As people and programs read it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            fn from_byte(byte: u8) -> Option<Self> {
                match byte { $($number => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

closed! {
    /// What a value is.
    Kind {
        /// Only ever grows.
        Counter = 1 "counter",
        /// Goes up and down.
        Gauge = 2 "gauge",
        /// The value is the number of a histogram of nanoseconds.
        Histogram = 3 "histogram",
    }
}

closed! {
    /// What happened. `..Done` and `..End` carry the time since the beginning as their value, in nanoseconds, where nothing else is said.
    What {
        /// A process of the service begins; value: its pid.
        Started = 1 "started",
        /// It serves.
        Ready = 2 "ready",
        /// A service died; named, value: its incarnation.
        ServiceDied = 3 "service-died",
        /// A service will not be started again; named.
        ServiceHeld = 4 "service-held",
        /// A service serves again; named, value: milliseconds since its death.
        ServiceBack = 5 "service-back",
        /// A service is killed because it does not stop using memory, or as a drill; named, value: its incarnation.
        ServiceCondemned = 6 "service-condemned",
        /// A service was started; named, value: its incarnation.
        ServiceStarted = 7 "service-started",
        /// A program touched a page and waits.
        CpuFault = 10 "cpu-fault",
        /// It goes on.
        CpuFaultDone = 11 "cpu-fault-done",
        /// A client, or an operator, asked for pages to be moved.
        Request = 12 "request",
        /// It was answered.
        RequestDone = 13 "request-done",
        /// Pages begin to move.
        MigrateStart = 14 "migrate-start",
        /// They have arrived.
        MigrateEnd = 15 "migrate-end",
        /// Devices lose their mappings of pages.
        Invalidate = 16 "invalidate",
        /// They have lost them.
        InvalidateDone = 17 "invalidate-done",
        /// A device waits, because pages go to and fro.
        Thrash = 18 "thrash",
        /// A device asks for pages that it does not map.
        DeviceFault = 19 "device-fault",
        /// It has them.
        DeviceFaultDone = 20 "device-fault-done",
        /// A job begins.
        Job = 21 "job",
        /// It ended.
        JobDone = 22 "job-done",
        /// A copy engine begins.
        Copy = 23 "copy",
        /// It ended.
        CopyDone = 24 "copy-done",
        /// A client was told that it has its share already.
        QuotaRefused = 25 "quota-refused",
        /// Pages were lost.
        PagesLost = 26 "pages-lost",
        /// A process is managed from here on; value: its pid.
        SpaceOpened = 27 "space-opened",
        /// It is not any more; value: its pid.
        SpaceGone = 28 "space-gone",
        /// A driver has logged in; value: its frames.
        DeviceUp = 29 "device-up",
        /// Its session or process is gone.
        DeviceDown = 30 "device-down",
    }
}

closed! {
    /// Why.
    Why {
        /// Nothing is said.
        None = 0 "-",
        /// Somebody asked for it.
        User = 1 "user",
        /// Somebody said that it will be needed.
        Prefetch = 2 "prefetch",
        /// A program touched it.
        CpuFault = 3 "cpu-fault",
        /// A device touched it.
        DeviceFault = 4 "device-fault",
        /// Others needed the room.
        Eviction = 5 "eviction",
        /// The address space changed.
        AddressSpace = 6 "address-space",
        /// A fault: nothing was ever there.
        Zero = 7 "zero",
        /// A fault: it is there, the page table does not say so.
        Minor = 8 "minor",
        /// A fault: it may not be written for the moment.
        Protected = 9 "protected",
        /// A fault: it is on the move.
        Moving = 10 "moving",
        /// A fault: it is on a device.
        Device = 11 "device",
        /// A fault: it is lost.
        Lost = 12 "lost",
        /// It failed.
        Failed = 13 "failed",
    }
}

/// Where pages are, in an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// Nothing is said.
    None,
    /// System memory.
    Home,
    /// A device.
    Device(u8),
}

impl Place {
    const HOME: u8 = 0xfe;
    const NONE: u8 = 0xff;

    fn byte(self) -> u8 {
        match self {
            Self::None => Self::NONE,
            Self::Home => Self::HOME,
            Self::Device(device) => device,
        }
    }

    fn from_byte(byte: u8) -> Self {
        match byte {
            Self::NONE => Self::None,
            Self::HOME => Self::Home,
            device => Self::Device(device),
        }
    }
}

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The first one of a record is 1. Given by the writer.
    pub sequence: u64,
    /// CLOCK_MONOTONIC.
    pub time_ns: u64,
    /// What.
    pub what: What,
    /// Why.
    pub why: Why,
    /// From there.
    pub from: Place,
    /// To there.
    pub to: Place,
    /// Which incarnation of the service wrote it. Given by the writer.
    pub incarnation: u32,
    /// The request that it belongs to, the same in all services; 0: none.
    pub trace: u64,
    /// The address space; with `addr` and `pages` a name, where the event has one.
    pub space: u64,
    /// First address.
    pub addr: u64,
    /// How many pages.
    pub pages: u64,
    /// See [`What`].
    pub value: u64,
}

impl Event {
    /// An event of nothing in particular.
    pub fn new(what: What, time_ns: u64) -> Self {
        let (from, to) = (Place::None, Place::None);
        let (space, addr, pages, value) = (0, 0, 0, 0);
        Self {
            sequence: 0,
            time_ns,
            what,
            why: Why::None,
            from,
            to,
            incarnation: 0,
            trace: 0,
            space,
            addr,
            pages,
            value,
        }
    }

    /// An event about a service. Longer names are cut.
    pub fn named(what: What, time_ns: u64, name: &str, value: u64) -> Self {
        let mut words = [0; EVENT_NAME_BYTES / 8];
        pack(name, &mut words);
        let [space, addr, pages] = words;
        Self { space, addr, pages, value, ..Self::new(what, time_ns) }
    }

    /// Whether it has a name.
    pub fn is_named(&self) -> bool {
        use What::{ServiceBack, ServiceCondemned, ServiceDied, ServiceHeld, ServiceStarted};
        matches!(self.what, ServiceDied | ServiceHeld | ServiceBack | ServiceCondemned | ServiceStarted)
    }

    /// The name's bytes, zeroes behind it.
    pub fn name_bytes(&self) -> [u8; EVENT_NAME_BYTES] {
        let mut bytes = [0; EVENT_NAME_BYTES];
        for (to, word) in bytes.chunks_exact_mut(8).zip([self.space, self.addr, self.pages]) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn packed(&self) -> u64 {
        u64::from_le_bytes([self.what as u8, self.why as u8, self.from.byte(), self.to.byte(), 0, 0, 0, 0])
            | u64::from(self.incarnation) << 32
    }

    fn from_words(words: [u64; EVENT_WORDS]) -> Option<Self> {
        let [sequence, time_ns, packed, trace, space, addr, pages, value] = words;
        let [what, why, from, to, ..] = packed.to_le_bytes();
        Some(Self {
            sequence,
            time_ns,
            what: What::from_byte(what)?,
            why: Why::from_byte(why)?,
            from: Place::from_byte(from),
            to: Place::from_byte(to),
            incarnation: (packed >> 32) as u32,
            trace,
            space,
            addr,
            pages,
            value,
        })
    }
}

/// As many of the text's bytes as fit, whole characters.
fn pack(text: &str, words: &mut [u64]) {
    let mut len = text.len().min(words.len() * 8);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    let bytes = text.as_bytes().get(..len).unwrap_or_default();
    for (word, part) in words.iter_mut().zip(bytes.chunks(8)) {
        let mut padded = [0; 8];
        for (to, byte) in padded.iter_mut().zip(part) {
            *to = *byte;
        }
        *word = u64::from_le_bytes(padded);
    }
}

/// The one that writes. It believes nothing that it finds but the format.
#[derive(Debug)]
pub struct Writer<W> {
    words: W,
    incarnation: u32,
    head: u64,
    defined: usize,
}

impl<W: Words> Writer<W> {
    /// Takes over a record, or begins one: of another format nothing is kept.
    pub fn begin(words: W, incarnation: u32, pid: u32, now_ns: u64) -> Option<Self> {
        if words.word_count() < WORDS {
            return None;
        }
        if words.load(0, Acquire) != FORMAT {
            (1..WORDS).for_each(|index| words.store(index, 0, Relaxed));
            words.store(0, FORMAT, Release);
        }
        let head = words.load(HEAD, Relaxed);
        let defined = (words.load(DEFINED, Relaxed) as usize).min(METRICS_MAX);
        for (index, value) in [(INCARNATION, u64::from(incarnation)), (PID, u64::from(pid)), (STARTED, now_ns)] {
            words.store(index, value, Release);
        }
        Some(Self { words, incarnation, head, defined })
    }

    /// The place of a metric, which is the one that an earlier incarnation gave it; `None`: there is no room.
    pub fn define(&mut self, name: &str, kind: Kind) -> Option<usize> {
        let mut wanted = [0; DEFINITION_WORDS - 1];
        pack(name, &mut wanted);
        let at = |slot: usize, word: usize| DEFINITIONS + slot * DEFINITION_WORDS + word;
        let same = |slot: usize| {
            let name =
                wanted.iter().enumerate().all(|(word, wanted)| self.words.load(at(slot, word), Relaxed) == *wanted);
            name && self.words.load(at(slot, DEFINITION_WORDS - 1), Relaxed) == kind as u64
        };
        if let Some(slot) = (0..self.defined).find(|slot| same(*slot)) {
            return Some(slot);
        }
        let slot = self.defined;
        if slot == METRICS_MAX {
            return None;
        }
        wanted.iter().enumerate().for_each(|(word, value)| self.words.store(at(slot, word), *value, Relaxed));
        self.words.store(at(slot, DEFINITION_WORDS - 1), kind as u64, Release);
        self.defined += 1;
        self.words.store(DEFINED, self.defined as u64, Release);
        Some(slot)
    }

    /// The place of a histogram that is known by this name.
    pub fn define_histogram(&mut self, name: &str) -> Option<usize> {
        let slot = self.define(name, Kind::Histogram)?;
        let of_kind = |slot: &usize| {
            self.words.load(DEFINITIONS + slot * DEFINITION_WORDS + DEFINITION_WORDS - 1, Relaxed)
                == Kind::Histogram as u64
        };
        let number = (0..slot).filter(of_kind).count();
        self.set(slot, number as u64);
        (number < HISTOGRAMS_MAX).then_some(number)
    }

    /// What a metric is now.
    pub fn value(&self, slot: usize) -> u64 {
        self.words.load(VALUES + slot.min(METRICS_MAX - 1), Relaxed)
    }

    /// Sets it.
    pub fn set(&self, slot: usize, value: u64) {
        if slot < METRICS_MAX {
            self.words.store(VALUES + slot, value, Relaxed);
        }
    }

    /// Counts a time.
    pub fn observe(&self, histogram: usize, ns: u64) {
        if histogram >= HISTOGRAMS_MAX {
            return;
        }
        let base = HISTOGRAMS + histogram * HISTOGRAM_WORDS;
        for (index, more) in [(base, ns), (base + 1 + bucket_of(ns), 1)] {
            self.words.store(index, self.words.load(index, Relaxed).wrapping_add(more), Relaxed);
        }
    }

    /// Writes an event behind the last one.
    pub fn push(&mut self, event: &Event) {
        let sequence = self.head.wrapping_add(1);
        let base = EVENTS + (sequence % EVENTS_MAX as u64) as usize * EVENT_WORDS;
        self.words.store(base, 0, Relaxed);
        self.words.fence(Release);
        let packed = Event { incarnation: self.incarnation, ..*event }.packed();
        let rest = [event.time_ns, packed, event.trace, event.space, event.addr, event.pages, event.value];
        for (word, value) in rest.into_iter().enumerate() {
            self.words.store(base + 1 + word, value, Relaxed);
        }
        self.words.store(base, sequence, Release);
        self.head = sequence;
        self.words.store(HEAD, sequence, Release);
    }
}

/// Bucket of a time.
fn bucket_of(ns: u64) -> usize {
    let bits = u64::BITS - ns.leading_zeros();
    (bits.saturating_sub(FIRST_BUCKET_SHIFT) as usize).min(BUCKETS - 1)
}

/// Upper bound of a bucket in nanoseconds; `None`: there is none.
pub fn bucket_bound_ns(bucket: usize) -> Option<u64> {
    (bucket < BUCKETS - 1).then(|| 1 << (bucket as u32 + FIRST_BUCKET_SHIFT))
}

/// Times by bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Histogram {
    /// Of all, in nanoseconds.
    pub sum_ns: u64,
    /// How many in each bucket.
    pub buckets: [u64; BUCKETS],
}

/// One that was defined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Definition {
    /// Its name's bytes, zeroes behind it.
    pub name: [u8; NAME_BYTES_MAX],
    /// What the value is.
    pub kind: Kind,
}

/// What a reader got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// An event.
    Event(Event),
    /// So many were overwritten, or were never whole.
    Lost(u64),
    /// There is nothing more.
    End,
}

/// The one that reads, through a way to load a word (acquire); words that are not there read as zero.
#[derive(Clone, Debug)]
pub struct Reader<L> {
    load: L,
    next: u64,
}

impl<L: Fn(usize) -> u64> Reader<L> {
    /// Reads from the oldest event that is there on.
    pub fn new(load: L) -> Self {
        Self { load, next: 1 }
    }

    /// Whether it is a record at all.
    pub fn is_record(&self) -> bool {
        (self.load)(0) == FORMAT
    }

    /// Of the process that writes, or wrote last.
    pub fn incarnation(&self) -> u32 {
        (self.load)(INCARNATION) as u32
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        (self.load)(PID) as u32
    }

    /// When it began (CLOCK_MONOTONIC).
    pub fn started_ns(&self) -> u64 {
        (self.load)(STARTED)
    }

    /// Events that were ever written.
    pub fn written(&self) -> u64 {
        (self.load)(HEAD)
    }

    /// How many definitions there are.
    pub fn defined(&self) -> usize {
        ((self.load)(DEFINED) as usize).min(METRICS_MAX)
    }

    /// A definition.
    pub fn definition(&self, slot: usize) -> Option<Definition> {
        let at = |word: usize| DEFINITIONS + slot * DEFINITION_WORDS + word;
        let kind = Kind::from_byte((self.load)(at(DEFINITION_WORDS - 1)) as u8).filter(|_| slot < self.defined())?;
        let mut name = [0; NAME_BYTES_MAX];
        for (word, to) in name.chunks_exact_mut(8).enumerate() {
            to.copy_from_slice(&(self.load)(at(word)).to_le_bytes());
        }
        Some(Definition { name, kind })
    }

    /// The value at the definition's place.
    pub fn value(&self, slot: usize) -> u64 {
        (self.load)(VALUES + slot.min(METRICS_MAX - 1))
    }

    /// A histogram.
    pub fn histogram(&self, number: usize) -> Histogram {
        let base = HISTOGRAMS + number.min(HISTOGRAMS_MAX - 1) * HISTOGRAM_WORDS;
        let mut buckets = [0; BUCKETS];
        for (bucket, to) in buckets.iter_mut().enumerate() {
            *to = (self.load)(base + 1 + bucket);
        }
        Histogram { sum_ns: (self.load)(base), buckets }
    }

    /// Only what is written from now on.
    pub fn skip_to_end(&mut self) {
        self.next = self.written().wrapping_add(1);
    }

    /// Only the last `count` events and what is written from now on.
    pub fn skip_to_last(&mut self, count: u64) {
        self.next = self.next.max(self.written().saturating_sub(count).wrapping_add(1));
    }

    /// The next event.
    pub fn take_next(&mut self) -> Next {
        let head = self.written();
        if self.next > head {
            return Next::End;
        }
        let oldest = head.saturating_sub(EVENTS_MAX as u64 - 1).max(1);
        if self.next < oldest {
            let lost = oldest - self.next;
            self.next = oldest;
            // Of a record that nobody has read the beginning is not missed.
            return Next::Lost(lost);
        }
        let sequence = self.next;
        self.next += 1;
        let base = EVENTS + (sequence % EVENTS_MAX as u64) as usize * EVENT_WORDS;
        let mut words = [0; EVENT_WORDS];
        for (word, to) in words.iter_mut().enumerate() {
            *to = (self.load)(base + word);
        }
        let whole = words.first() == Some(&sequence) && (self.load)(base) == sequence;
        match Event::from_words(words).filter(|_| whole) {
            Some(event) => Next::Event(event),
            None => Next::Lost(1),
        }
    }
}

#[cfg(test)]
mod tests;
