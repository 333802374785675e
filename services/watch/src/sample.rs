//! All that is to be seen at one moment: plain data, so that it can be shown, served, written to a file and replayed.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use uhmm_sdk::{Error, Operator, RegionStatus, ServiceStatus};

use crate::events::{Line, Names};
use crate::record::{ServiceRecord, Times, Value};

/// How long somebody who only looks waits for an answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Strips of so many regions, the largest ones.
const STRIPS_MAX: usize = 64;

/// See the module head.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// CLOCK_MONOTONIC.
    pub time_ns: u64,
    /// In start order, the supervisor first.
    pub services: Vec<Service>,
    /// Devices of the plan, by id.
    pub devices: Vec<Device>,
    /// Regions, the largest first.
    pub regions: Vec<Region>,
    /// What has happened since the sample before, where that was asked for.
    pub events: Vec<Line>,
    /// Events that were overwritten meanwhile.
    pub lost_events: u64,
    /// What could not be seen, and why.
    pub problems: Vec<String>,
}

/// A service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Service {
    /// Name in the manifest.
    pub name: String,
    /// Process, 0 when it does not run.
    pub pid: u32,
    /// Times started.
    pub incarnation: u32,
    /// As `uhmm status` has it.
    pub state: String,
    /// Why it last ended, empty if it never did.
    pub last_exit: String,
    /// Since it is ready.
    pub uptime_ms: u64,
    /// Heartbeats missed in a row.
    pub missed_heartbeats: u32,
    /// From its last death to ready again.
    pub last_recovery_ms: u64,
    /// Descriptors that outlive it.
    pub vault_entries: u32,
    /// What it may not do any more: `seccomp`, `no_new_privs`, as the kernel says; empty when that cannot be seen.
    pub sandbox: Vec<String>,
    /// Events that it ever wrote.
    pub events_written: u64,
    /// Counters and gauges.
    pub values: Vec<Value>,
    /// Times.
    pub times: Vec<Times>,
}

/// A device of the plan.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Memory; 0 until its driver has logged in.
    pub memory_bytes: u64,
    /// Of that: free.
    pub free_bytes: u64,
}

/// A region of some process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its process.
    pub pid: u32,
    /// Space.
    pub space: u64,
    /// Id.
    pub id: u64,
    /// First address.
    pub addr: u64,
    /// Pages.
    pub pages: u64,
    /// Of those: in system memory.
    pub system_pages: u64,
    /// Never touched.
    pub absent_pages: u64,
    /// On the move.
    pub moving_pages: u64,
    /// Lost.
    pub poisoned_pages: u64,
    /// On devices, by id.
    pub device_pages: Vec<u64>,
    /// A byte a cell (`StripCell`), where that was asked for.
    pub strip: Vec<u8>,
}

impl Service {
    /// A value without labels.
    pub fn value(&self, name: &str) -> u64 {
        self.values.iter().find(|value| value.name == name && value.labels.is_empty()).map_or(0, |value| value.value)
    }
}

impl Sample {
    /// By name.
    pub fn service(&self, name: &str) -> Option<&Service> {
        self.services.iter().find(|service| service.name == name)
    }

    /// Services that do not serve, with their state.
    pub fn not_ready(&self) -> Vec<String> {
        let waits = |service: &&Service| service.state != "ready";
        self.services.iter().filter(waits).map(|service| format!("{} is {}", service.name, service.state)).collect()
    }
}

/// Takes samples of a running system.
pub struct Sampler {
    operator: Operator,
    records: BTreeMap<String, ServiceRecord>,
    names: Names,
    /// Cells of a region's strip; 0: none.
    strip_cells: u16,
    /// Whether events are read.
    events: bool,
}

impl Sampler {
    /// Of the system in `run_dir`.
    ///
    /// # Errors
    /// When none runs there.
    pub fn connect(run_dir: Option<&Path>) -> Result<Self, Error> {
        let mut operator = Operator::connect(run_dir)?;
        operator.set_patience(PATIENCE);
        let (records, names) = (BTreeMap::new(), Names::default());
        Ok(Self { operator, records, names, strip_cells: 0, events: false })
    }

    /// With a strip of so many cells for each region.
    #[must_use]
    pub fn with_strips(self, cells: u16) -> Self {
        Self { strip_cells: cells, ..self }
    }

    /// With what happens from now on, and the last `past` events of each service.
    ///
    /// # Errors
    /// When the supervisor does not answer.
    pub fn with_events(mut self, past: u64) -> Result<Self, Error> {
        self.events = true;
        for service in self.operator.status()? {
            self.refresh_record(&service.name, service.incarnation);
        }
        self.refresh_record(SUPERVISOR, 1);
        self.records.values_mut().for_each(|record| record.skip_to_last(past));
        Ok(self)
    }

    /// For what an operator does.
    pub fn operator(&mut self) -> &mut Operator {
        &mut self.operator
    }

    /// A record is asked for again when it is not that of the process that runs.
    fn refresh_record(&mut self, service: &str, incarnation: u32) -> Option<String> {
        if service == HOLDER || self.records.get(service).is_some_and(|record| record.incarnation() == incarnation) {
            return None;
        }
        let opened = self
            .operator
            .record(service)
            .map_err(|error| error.to_string())
            .and_then(|fd| ServiceRecord::open(service, &fd).map_err(|error| error.to_string()));
        match opened {
            // The same memory, which the next incarnation goes on writing: a reader's place in it stays.
            Ok(fresh) => match self.records.get(service) {
                Some(known) if known.is_same(&fresh) => {}
                _ => drop(self.records.insert(service.to_owned(), fresh)),
            },
            Err(problem) => return Some(problem),
        }
        None
    }

    /// Now.
    ///
    /// # Errors
    /// When the supervisor does not answer. What else cannot be seen is one of the sample's problems.
    pub fn sample(&mut self) -> Result<Sample, Error> {
        let statuses = self.operator.status()?;
        let mut sample = Sample { time_ns: now_ns(), ..Sample::default() };
        sample.problems.extend(self.refresh_record(SUPERVISOR, 1));
        sample.services.push(self.supervisor());
        for status in statuses {
            sample.problems.extend(self.refresh_record(&status.name, status.incarnation));
            sample.services.push(self.service(status));
        }
        sample.devices = devices(sample.service("pager"));
        self.names.devices = sample.devices.iter().map(|device| device.name.clone()).collect();
        if sample.service("pager").is_some_and(|pager| pager.state == "ready") {
            match self.regions() {
                Ok(regions) => sample.regions = regions,
                Err(error) => sample.problems.push(format!("Regions cannot be listed: {error}")),
            }
        }
        if self.events {
            (sample.events, sample.lost_events) = self.read_events();
        }
        Ok(sample)
    }

    /// Only events since the last time, merged by time.
    pub fn read_events(&mut self) -> (Vec<Line>, u64) {
        let (mut all, mut lost) = (Vec::new(), 0);
        for record in self.records.values_mut() {
            let (events, missed) = record.drain();
            lost += missed;
            all.extend(events.into_iter().map(|event| (record.service().to_owned(), event)));
        }
        all.sort_by_key(|(_, event)| event.time_ns);
        (all.iter().map(|(service, event)| self.names.line(service, event)).collect(), lost)
    }

    /// Looks whether services were started anew since.
    ///
    /// # Errors
    /// When the supervisor does not answer.
    pub fn refresh(&mut self) -> Result<(), Error> {
        for service in self.operator.status()? {
            self.refresh_record(&service.name, service.incarnation);
        }
        Ok(())
    }

    /// Names in events.
    pub fn learn_names(&mut self) {
        if let Some(record) = self.records.get("pager") {
            let pager = Service { values: record.metrics().0, ..Service::default() };
            self.names.devices = devices(Some(&pager)).into_iter().map(|device| device.name).collect();
        }
    }

    fn supervisor(&self) -> Service {
        let record = self.records.get(SUPERVISOR);
        let pid = record.map_or(0, ServiceRecord::pid);
        let mut service = Service { name: SUPERVISOR.to_owned(), pid, incarnation: 1, ..Service::default() };
        "ready".clone_into(&mut service.state);
        self.fill(&mut service);
        service.uptime_ms = service.value("uptime_ms");
        service
    }

    fn service(&self, status: ServiceStatus) -> Service {
        let mut service = Service {
            name: status.name,
            pid: status.pid,
            incarnation: status.incarnation,
            state: status.state,
            last_exit: status.last_exit,
            uptime_ms: status.uptime_ms,
            missed_heartbeats: status.missed_heartbeats,
            last_recovery_ms: status.last_recovery_ms,
            vault_entries: status.vault_entries,
            ..Service::default()
        };
        self.fill(&mut service);
        service
    }

    fn fill(&self, service: &mut Service) {
        service.sandbox = sandbox_of(service.pid);
        if let Some(record) = self.records.get(&service.name) {
            service.events_written = record.written();
            (service.values, service.times) = record.metrics();
        }
    }

    fn regions(&mut self) -> Result<Vec<Region>, Error> {
        let mut statuses = self.operator.regions()?;
        statuses.sort_by_key(|status| (std::cmp::Reverse(status.page_count), status.pid, status.addr));
        let mut regions = Vec::with_capacity(statuses.len());
        for (index, status) in statuses.into_iter().enumerate() {
            let strip = if self.strip_cells > 0 && index < STRIPS_MAX {
                // A region that has just been freed has none.
                self.operator.strip(status.region, self.strip_cells).unwrap_or_default()
            } else {
                Vec::new()
            };
            regions.push(region(status, strip));
        }
        Ok(regions)
    }
}

const SUPERVISOR: &str = "supervisor";
const HOLDER: &str = "holder";

fn region(status: RegionStatus, strip: Vec<u8>) -> Region {
    Region {
        pid: status.pid,
        space: status.space,
        id: status.region,
        addr: status.addr,
        pages: status.page_count,
        system_pages: status.system_pages,
        absent_pages: status.absent_pages,
        moving_pages: status.moving_pages,
        poisoned_pages: status.poisoned_pages,
        device_pages: status.device_pages,
        strip,
    }
}

/// The pager tells of devices in the plan's order, which is their ids'.
fn devices(pager: Option<&Service>) -> Vec<Device> {
    let values = |name: &'static str| pager.into_iter().flat_map(|pager| &pager.values).filter(move |v| v.name == name);
    let device = |value: &Value| {
        let name = value.labels.first().map(|(_, name)| name.clone()).unwrap_or_default();
        let free = values("device_free_bytes").find(|free| free.labels == value.labels);
        Device { name, memory_bytes: value.value, free_bytes: free.map_or(0, |free| free.value) }
    };
    values("device_memory_bytes").map(device).collect()
}

/// What the kernel says of a process.
fn sandbox_of(pid: u32) -> Vec<String> {
    if pid == 0 {
        return Vec::new();
    }
    let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { return Vec::new() };
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.map(|value| value.trim_start_matches(':').trim()).unwrap_or_default()
    };
    let mut what = Vec::new();
    if field("Seccomp") == "2" {
        what.push("seccomp".to_owned());
    }
    if field("NoNewPrivs") == "1" {
        what.push("no_new_privs".to_owned());
    }
    if !field("CapEff").is_empty() && field("CapEff").bytes().all(|digit| digit == b'0') {
        what.push("no_caps".to_owned());
    }
    what
}

/// CLOCK_MONOTONIC.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_come_from_the_pagers_own_words() {
        let value = |name: &str, device: &str, value| Value {
            name: name.to_owned(),
            labels: vec![("device".to_owned(), device.to_owned())],
            counter: false,
            value,
        };
        let values = vec![
            value("device_memory_bytes", "soft0", 10),
            value("device_free_bytes", "soft0", 4),
            value("device_memory_bytes", "soft1", 0),
            value("device_free_bytes", "soft1", 0),
        ];
        let pager = Service { values, ..Service::default() };
        let device = |name: &str, memory_bytes, free_bytes| Device { name: name.to_owned(), memory_bytes, free_bytes };
        assert_eq!(devices(Some(&pager)), [device("soft0", 10, 4), device("soft1", 0, 0)]);
        assert!(devices(None).is_empty());
    }

    #[test]
    fn the_kernel_knows_what_this_process_may() {
        assert!(sandbox_of(0).is_empty());
        let own = sandbox_of(std::process::id());
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        assert_eq!(own.contains(&"no_new_privs".to_owned()), status.contains("NoNewPrivs:\t1"));
    }
}
