//! A service's record as this process sees it: mapped for reading, named, and of a size that was checked.

use std::os::fd::AsFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::{HookError, Prot, Window, memfd};
use uhmm_shared::record::{Event, HISTOGRAMS_MAX, Kind, Next, Reader, WORDS};

/// Why there is nothing to read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be mapped.
    #[error("The record of {service} cannot be read")]
    Hook {
        /// Whose.
        service: String,
        /// Why.
        #[source]
        source: HookError,
    },
    /// Another version's.
    #[error("The record of {service} is of another version: use the `uhmm` that started it")]
    Format {
        /// Whose.
        service: String,
    },
}

/// A counter or a gauge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Value {
    /// Name with unit.
    pub name: String,
    /// Labels.
    pub labels: Vec<(String, String)>,
    /// Only ever grows, over restarts too.
    pub counter: bool,
    /// Value.
    pub value: u64,
}

/// Times by bucket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// Name.
    pub name: String,
    /// Labels.
    pub labels: Vec<(String, String)>,
    /// Sum of all, in nanoseconds.
    pub sum_ns: u64,
    /// See [`uhmm_shared::record::bucket_bound_ns`].
    pub buckets: Vec<u64>,
}

type Load = Box<dyn Fn(usize) -> u64 + Send>;

/// See the module head.
pub struct ServiceRecord {
    service: String,
    /// Device and inode of the memory.
    identity: (u64, u64),
    reader: Reader<Load>,
}

impl ServiceRecord {
    /// What the supervisor has given out.
    ///
    /// # Errors
    /// `Hook`, `Format`.
    pub fn open(service: &str, fd: &Fd) -> Result<Self, RecordError> {
        let failed = |source| RecordError::Hook { service: service.to_owned(), source };
        let len = memfd::len(fd.as_fd()).map_err(failed)?;
        // Sealed: it cannot be cut under the mapping.
        memfd::check_sealed(fd.as_fd(), len).map_err(failed)?;
        let window = Window::map(fd.as_fd(), 0, len, Prot::ReadOnly).map_err(failed)?;
        let window = Arc::new(window);
        let reader: Reader<Load> =
            Reader::new(Box::new(move |index| window.load_u64(8 * index as u64).unwrap_or_default()));
        if len < 8 * WORDS as u64 || !reader.is_record() {
            return Err(RecordError::Format { service: service.to_owned() });
        }
        let identity = memfd::identity(fd.as_fd()).map_err(failed)?;
        Ok(Self { service: service.to_owned(), identity, reader })
    }

    /// Whether both are the same memory.
    pub fn is_same(&self, other: &Self) -> bool {
        self.identity == other.identity
    }

    /// Whose.
    pub fn service(&self) -> &str {
        &self.service
    }

    /// Of the process that writes, or wrote last.
    pub fn incarnation(&self) -> u32 {
        self.reader.incarnation()
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.reader.pid()
    }

    /// When it began (CLOCK_MONOTONIC).
    pub fn started_ns(&self) -> u64 {
        self.reader.started_ns()
    }

    /// Events that were ever written.
    pub fn written(&self) -> u64 {
        self.reader.written()
    }

    /// The next event.
    pub fn take_next(&mut self) -> Next {
        self.reader.take_next()
    }

    /// Only what is written from now on.
    pub fn skip_to_end(&mut self) {
        self.reader.skip_to_end();
    }

    /// Only the last `count` events and what is written from now on.
    pub fn skip_to_last(&mut self, count: u64) {
        self.reader.skip_to_last(count);
    }

    /// All events that are there now, and how many are not any more.
    pub fn drain(&mut self) -> (Vec<Event>, u64) {
        let (mut events, mut lost) = (Vec::new(), 0);
        // A writer that is faster than this reader shall not keep it for ever.
        let until = self.reader.written();
        loop {
            match self.reader.take_next() {
                Next::Event(event) => {
                    events.push(event);
                    if event.sequence >= until {
                        return (events, lost);
                    }
                }
                Next::Lost(count) => lost += count,
                Next::End => return (events, lost),
            }
        }
    }

    /// Counters and gauges, and times.
    pub fn metrics(&self) -> (Vec<Value>, Vec<Times>) {
        let (mut values, mut times) = (Vec::new(), Vec::new());
        for slot in 0..self.reader.defined() {
            let Some(definition) = self.reader.definition(slot) else { continue };
            let len = definition.name.iter().position(|byte| *byte == 0).unwrap_or(definition.name.len());
            let Ok(text) = std::str::from_utf8(&definition.name[..len]) else { continue };
            let (name, labels) = parse(text);
            let value = self.reader.value(slot);
            match definition.kind {
                Kind::Histogram if value < HISTOGRAMS_MAX as u64 => {
                    let histogram = self.reader.histogram(value as usize);
                    let (sum_ns, buckets) = (histogram.sum_ns, histogram.buckets.to_vec());
                    times.push(Times { name, labels, sum_ns, buckets });
                }
                Kind::Histogram => {}
                kind => values.push(Value { name, labels, counter: kind == Kind::Counter, value }),
            }
        }
        (values, times)
    }
}

/// `name;label=value;label=value`
fn parse(text: &str) -> (String, Vec<(String, String)>) {
    let mut parts = text.split(';');
    let name = parts.next().unwrap_or_default().to_owned();
    let label = |part: &str| part.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    (name, parts.filter_map(label).collect())
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn names_carry_labels() {
        let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        assert_eq!(parse("plain"), ("plain".to_owned(), labels(&[])));
        assert_eq!(
            parse("m;cause=user;way=out;nonsense"),
            ("m".to_owned(), labels(&[("cause", "user"), ("way", "out")]))
        );
    }

    #[test]
    fn memory_that_is_no_record_is_refused_with_its_name() {
        let open = |len: u64| {
            let fd: OwnedFd = memfd::create_sealed("uhmm-no-record", len).unwrap();
            ServiceRecord::open("pager", &Arc::new(fd)).map(drop).unwrap_err().to_string()
        };
        for len in [4096, 8 * WORDS as u64 + 4096] {
            assert!(open(len).contains("pager"), "{}", open(len));
        }
    }
}
