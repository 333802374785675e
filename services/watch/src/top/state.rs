//! What `uhmm top` knows: the last two samples, what follows from them, and where the operator is.

use std::collections::{BTreeMap, VecDeque};

use uhmm_shared::record::bucket_bound_ns;

use crate::events::Line;
use crate::sample::{Sample, Service};

/// Events kept for the log.
const LOG_MAX: usize = 200;
/// Samples in the sparkline.
const HISTORY_MAX: usize = 160;

/// What is shown where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pane {
    /// Services.
    Services,
    /// Devices.
    Devices,
    /// Regions.
    Regions,
}

/// A key that means something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// One up.
    Up,
    /// One down.
    Down,
    /// The next pane.
    Tab,
    /// Back.
    Escape,
    /// A letter or digit.
    Char(char),
}

/// What an operator wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Kill a service, which starts it again.
    Restart(String),
    /// Everybody's pages come home from a device.
    Drain(String),
    /// All of a region comes home.
    Evict {
        /// Region.
        region: u64,
    },
    /// All of a region goes to a device.
    Migrate {
        /// Region.
        region: u64,
        /// By id.
        device: u8,
    },
}

/// What happens in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// CPU faults.
    pub cpu_faults: f64,
    /// Device faults.
    pub device_faults: f64,
    /// Bytes to devices.
    pub out_bytes: f64,
    /// Bytes home.
    pub home_bytes: f64,
    /// Bytes from device to device.
    pub peer_bytes: f64,
    /// Bytes evicted, of those that come home.
    pub evicted_bytes: f64,
    /// Faults on pages of devices: so long the middle one took, in nanoseconds; 0: there were none.
    pub fault_p50_ns: u64,
    /// The same of the slowest of a hundred.
    pub fault_p99_ns: u64,
}

/// See the module head.
#[derive(Clone, Debug)]
pub struct Top {
    /// The last sample.
    pub now: Sample,
    pub(crate) before: Option<Sample>,
    /// Since the sample before.
    pub rates: Rates,
    /// Latencies of faults, oldest first.
    pub history: VecDeque<u64>,
    /// Events, oldest first.
    pub log: VecDeque<Line>,
    /// Where the operator is.
    pub pane: Pane,
    /// In each pane.
    pub selected: [usize; 3],
    /// What is asked before it is done.
    pub confirm: Option<Action>,
    /// A digit is expected: the device to migrate to.
    pub choosing_device: bool,
    /// What was done last, or went wrong.
    pub message: String,
    /// It ends.
    pub quit: bool,
    /// Keys that do something do nothing: what is shown is not what runs.
    pub replayed: bool,
}

impl Default for Top {
    fn default() -> Self {
        Self {
            now: Sample::default(),
            before: None,
            rates: Rates::default(),
            history: VecDeque::new(),
            log: VecDeque::new(),
            pane: Pane::Services,
            selected: [0; 3],
            confirm: None,
            choosing_device: false,
            message: String::new(),
            quit: false,
            replayed: false,
        }
    }
}

impl Top {
    /// Another sample.
    pub fn take(&mut self, sample: Sample) {
        self.before = Some(std::mem::replace(&mut self.now, sample)).filter(|before| before.time_ns != 0);
        self.log.extend(self.now.events.iter().cloned());
        let surplus = self.log.len().saturating_sub(LOG_MAX);
        self.log.drain(..surplus);
        if let Some(before) = &self.before {
            self.rates = rates(before, &self.now);
        }
        self.history.push_back(self.rates.fault_p99_ns);
        let surplus = self.history.len().saturating_sub(HISTORY_MAX);
        self.history.drain(..surplus);
        for (pane, selected) in self.selected.iter_mut().enumerate() {
            let len = [self.now.services.len(), self.now.devices.len(), self.now.regions.len()][pane];
            *selected = (*selected).min(len.saturating_sub(1));
        }
    }

    /// The selected line of a pane.
    pub fn selected(&self, pane: Pane) -> usize {
        self.selected[pane as usize]
    }

    /// A key.
    pub fn key(&mut self, key: Key) -> Option<Action> {
        if let Some(action) = self.confirm.take() {
            return match key {
                Key::Char('y') => Some(action),
                _ => {
                    self.message = "Nothing was done".to_owned();
                    None
                }
            };
        }
        if std::mem::take(&mut self.choosing_device) {
            self.choose_device(key);
            return None;
        }
        self.message.clear();
        match key {
            Key::Char('q') => self.quit = true,
            Key::Escape => {}
            Key::Tab => {
                self.pane = match self.pane {
                    Pane::Services => Pane::Devices,
                    Pane::Devices => Pane::Regions,
                    Pane::Regions => Pane::Services,
                };
            }
            Key::Up | Key::Down => {
                let len = match self.pane {
                    Pane::Services => self.now.services.len(),
                    Pane::Devices => self.now.devices.len(),
                    Pane::Regions => self.now.regions.len(),
                };
                let at = &mut self.selected[self.pane as usize];
                *at = if key == Key::Up { at.saturating_sub(1) } else { (*at + 1).min(len.saturating_sub(1)) };
            }
            Key::Char(letter @ ('r' | 'd' | 'e' | 'm')) if self.replayed => {
                self.message = format!("{letter} does nothing in a replay: what is shown does not run");
            }
            Key::Char('r') => self.ask_restart(),
            Key::Char('d') => self.ask_drain(),
            Key::Char('e') => self.confirm = self.region().map(|region| Action::Evict { region }),
            Key::Char('m') => self.choosing_device = self.region().is_some(),
            Key::Char(_) => {}
        }
        None
    }

    fn region(&mut self) -> Option<u64> {
        let region = self.now.regions.get(self.selected(Pane::Regions)).map(|region| region.id);
        if region.is_none() {
            self.message = "There is no region".to_owned();
        }
        region
    }

    fn ask_restart(&mut self) {
        let service = self.now.services.get(self.selected(Pane::Services)).map(|service| service.name.clone());
        match service.as_deref() {
            None => {}
            Some("supervisor") => self.message = "The supervisor is restarted by `uhmm up --adopt`".to_owned(),
            Some(service) => self.confirm = Some(Action::Restart(service.to_owned())),
        }
    }

    fn ask_drain(&mut self) {
        let device = self.now.devices.get(self.selected(Pane::Devices));
        self.confirm = device.map(|device| Action::Drain(device.name.clone()));
    }

    fn choose_device(&mut self, key: Key) {
        let Key::Char(digit) = key else { return };
        let device = digit.to_digit(10).filter(|id| (*id as usize) < self.now.devices.len());
        match (device, self.region()) {
            (Some(device), Some(region)) => self.confirm = Some(Action::Migrate { region, device: device as u8 }),
            (None, _) => self.message = format!("{digit} is no device"),
            _ => {}
        }
    }

    /// The action in words.
    pub fn words(&self, action: &Action) -> String {
        let of = |id: &u64| {
            let region = self.now.regions.iter().find(|region| region.id == *id);
            region.map_or_else(
                || format!("region {id:#x}"),
                |region| format!("{:#x} of process {}", region.addr, region.pid),
            )
        };
        match action {
            Action::Restart(service) => format!("kill -9 {service}, which starts it again"),
            Action::Drain(device) => format!("bring everybody's pages home from {device}"),
            Action::Evict { region } => format!("bring home {}", of(region)),
            Action::Migrate { region, device } => {
                let name = self.now.devices.get(usize::from(*device)).map_or("?", |device| device.name.as_str());
                format!("move {} to {name}", of(region))
            }
        }
    }
}

/// What has happened from one sample to the next, in a second.
fn rates(before: &Sample, now: &Sample) -> Rates {
    let seconds = now.time_ns.saturating_sub(before.time_ns) as f64 / 1e9;
    if seconds <= 0.0 {
        return Rates::default();
    }
    let empty = Service::default();
    let pager = |sample: &'_ Sample| sample.service("pager").cloned().unwrap_or_else(|| empty.clone());
    let (old, new) = (pager(before), pager(now));
    // A record that was lost begins anew: nothing happened rather than something negative.
    let grown = |old: u64, new: u64| new.saturating_sub(old) as f64 / seconds;
    let moved = |service: &Service, key: &str, value: &str| -> u64 {
        let with = |labels: &[(String, String)]| labels.iter().any(|(k, v)| k == key && v == value);
        let values = service.values.iter().filter(|v| v.name == "migrated_bytes" && with(&v.labels));
        values.map(|value| value.value).sum()
    };
    let of = |key: &str, value: &str| grown(moved(&old, key, value), moved(&new, key, value));
    let buckets = difference(&fault_buckets(&old), &fault_buckets(&new));
    Rates {
        cpu_faults: grown(old.value("cpu_faults"), new.value("cpu_faults")),
        device_faults: grown(old.value("device_faults"), new.value("device_faults")),
        out_bytes: of("way", "out"),
        home_bytes: of("way", "home"),
        peer_bytes: of("way", "peer"),
        evicted_bytes: of("cause", "eviction"),
        fault_p50_ns: quantile(&buckets, 50),
        fault_p99_ns: quantile(&buckets, 99),
    }
}

/// Faults that a device had to do with.
fn fault_buckets(pager: &Service) -> Vec<u64> {
    let mut sum: BTreeMap<usize, u64> = BTreeMap::new();
    let far = |labels: &[(String, String)]| labels.iter().any(|(_, kind)| kind == "device" || kind == "moving");
    for times in pager.times.iter().filter(|times| times.name == "fault" && far(&times.labels)) {
        for (bucket, count) in times.buckets.iter().enumerate() {
            *sum.entry(bucket).or_default() += count;
        }
    }
    sum.into_values().collect()
}

fn difference(old: &[u64], new: &[u64]) -> Vec<u64> {
    let before = old.iter().copied().chain(std::iter::repeat(0));
    new.iter().zip(before).map(|(new, old)| new.saturating_sub(old)).collect()
}

/// The bound below which so many of a hundred are.
pub fn quantile(buckets: &[u64], percent: u64) -> u64 {
    let all: u64 = buckets.iter().sum();
    let mut seen = 0;
    for (bucket, count) in buckets.iter().enumerate() {
        seen += count;
        if *count > 0 && seen * 100 >= all * percent {
            return bucket_bound_ns(bucket).unwrap_or(u64::MAX);
        }
    }
    0
}
