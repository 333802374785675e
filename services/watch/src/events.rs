//! Events as people and programs read them: one line each.
//!
//! ```text
//!     12.345678  pager     migrate-end  eviction  soft0 -> home  pid 4711  0x7f0000000000 +512 pages  812 us  [9e3779b97f4a7c15]
//! ```
//! Time is seconds since the machine was started (CLOCK_MONOTONIC), the same in all services; the last word names the request that it
//! belongs to, for `uhmm trace`.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use uhmm_shared::record::{Event, Place, What, Why};

/// One event.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// CLOCK_MONOTONIC.
    pub time_ns: u64,
    /// The service that has written it.
    pub service: String,
    /// Of that service.
    pub incarnation: u32,
    /// What: a name of `uhmm_shared::record::What`.
    pub what: String,
    /// Why: a name of `uhmm_shared::record::Why`; empty: nothing is said.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// Where pages were, or which device it is about.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub from: String,
    /// Where they go.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub to: String,
    /// The service that it is about.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The request that it belongs to, hexadecimal.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub trace: String,
    /// Address space; 0: none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub space: u64,
    /// Its process, where that is known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pid: u64,
    /// First address.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub addr: u64,
    /// How many bytes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub bytes: u64,
    /// How long it took.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub took_ns: u64,
    /// See `uhmm_shared::record::What`; where it is a time, `took_ns` has it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub value: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// Names that events have only numbers for.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// By id.
    pub devices: Vec<String>,
    /// Processes by space, learnt from events.
    pids: BTreeMap<u64, u64>,
}

impl Names {
    fn place(&self, place: Place) -> String {
        match place {
            Place::None => String::new(),
            Place::Home => "home".to_owned(),
            Place::Device(id) => {
                let named = self.devices.get(usize::from(id)).filter(|name| !name.is_empty());
                named.cloned().unwrap_or_else(|| format!("device {id}"))
            }
        }
    }

    /// An event of a service.
    pub fn line(&mut self, service: &str, event: &Event) -> Line {
        let mut line = Line {
            time_ns: event.time_ns,
            service: service.to_owned(),
            incarnation: event.incarnation,
            what: event.what.name().to_owned(),
            from: self.place(event.from),
            to: self.place(event.to),
            ..Line::default()
        };
        if event.why != Why::None {
            event.why.name().clone_into(&mut line.why);
        }
        if event.trace != 0 {
            line.trace = format!("{:016x}", event.trace);
        }
        if event.is_named() {
            let bytes = event.name_bytes();
            let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
            line.name = String::from_utf8_lossy(&bytes[..len]).into_owned();
        } else {
            (line.space, line.addr, line.bytes) = (event.space, event.addr, event.pages.saturating_mul(4096));
            if matches!(event.what, What::SpaceOpened) {
                self.pids.insert(event.space, event.value);
            }
            line.pid = self.pids.get(&event.space).copied().unwrap_or_default();
        }
        if is_time(event.what) {
            line.took_ns = event.value
        } else {
            line.value = event.value
        }
        line
    }
}

/// Whether the value is how long it took.
fn is_time(what: What) -> bool {
    use What::{CopyDone, CpuFaultDone, DeviceFaultDone, InvalidateDone, JobDone, MigrateEnd, RequestDone};
    matches!(what, CopyDone | CpuFaultDone | DeviceFaultDone | InvalidateDone | JobDone | MigrateEnd | RequestDone)
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, micros) = (self.time_ns / 1_000_000_000, self.time_ns % 1_000_000_000 / 1000);
        write!(f, "{seconds:>8}.{micros:06}  {:<10} {:<17}", self.service, self.what)?;
        if !self.why.is_empty() {
            write!(f, "  {}", self.why)?;
        }
        match (self.from.as_str(), self.to.as_str()) {
            ("", "") => {}
            (from, "") => write!(f, "  {from}")?,
            ("", to) => write!(f, "  -> {to}")?,
            (from, to) => write!(f, "  {from} -> {to}")?,
        }
        if !self.name.is_empty() {
            write!(f, "  {}", self.name)?;
        }
        match (self.pid, self.space) {
            (0, 0) => {}
            (0, space) => write!(f, "  space {space:#x}")?,
            (pid, _) => write!(f, "  pid {pid}")?,
        }
        if self.addr != 0 {
            write!(f, "  {:#x}", self.addr)?;
        }
        if self.bytes != 0 {
            write!(f, "  {}", bytes(self.bytes))?;
        }
        if self.took_ns != 0 {
            write!(f, "  {}", duration(self.took_ns))?;
        }
        match self.what.as_str() {
            "started" => write!(f, "  pid {}, incarnation {}", self.value, self.incarnation)?,
            "service-back" => write!(f, "  {} ms after its death", self.value)?,
            "service-died" | "service-held" | "service-started" | "service-condemned" => {
                write!(f, "  incarnation {}", self.value)?;
            }
            "device-up" => write!(f, "  {}", bytes(self.value.saturating_mul(4096)))?,
            _ => {}
        }
        if !self.trace.is_empty() {
            write!(f, "  [{}]", self.trace)?;
        }
        Ok(())
    }
}

/// As people say it.
pub fn bytes(bytes: u64) -> String {
    let units = [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.into_iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) if bytes.is_multiple_of(unit) => format!("{} {name}", bytes / unit),
        Some((name, unit)) => format!("{:.1} {name}", bytes as f64 / unit as f64),
        None => format!("{bytes} B"),
    }
}

/// As people say it.
pub fn duration(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..10_000 => format!("{:.1} us", ns as f64 / 1e3),
        10_000..1_000_000 => format!("{} us", ns / 1_000),
        1_000_000..10_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        10_000_000..1_000_000_000 => format!("{} ms", ns / 1_000_000),
        _ => format!("{:.1} s", ns as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names { devices: vec!["soft0".to_owned()], ..Names::default() }
    }

    #[test]
    fn a_migration_says_what_why_whose_and_how_long() {
        let mut names = names();
        let opened = Event { space: 5, value: 4711, ..Event::new(What::SpaceOpened, 1) };
        assert_eq!(names.line("pager", &opened).pid, 4711);
        let moved = Event {
            why: Why::Eviction,
            from: Place::Device(0),
            to: Place::Home,
            trace: 0xabc,
            space: 5,
            addr: 0x7f00_0000_0000,
            pages: 512,
            value: 812_345,
            ..Event::new(What::MigrateEnd, 12_345_678_000)
        };
        let line = names.line("pager", &moved);
        let text = line.to_string();
        for part in [
            "12.345678",
            "migrate-end",
            "eviction",
            "soft0 -> home",
            "pid 4711",
            "0x7f0000000000",
            "2 MiB",
            "812 us",
            "[0000000000000abc]",
        ] {
            assert!(text.contains(part), "{part} is missing in: {text}");
        }
        let json = serde_json::to_value(&line).unwrap();
        assert_eq!((json["took_ns"].as_u64(), json["bytes"].as_u64()), (Some(812_345), Some(2 << 20)));
        assert!(json.get("name").is_none(), "what is not said takes no room");
        assert_eq!(serde_json::from_value::<Line>(json).unwrap(), line);
    }

    #[test]
    fn events_about_services_name_them() {
        let died = Event::named(What::ServiceDied, 7, "soft0", 3);
        let text = names().line("supervisor", &died).to_string();
        assert!(text.contains("service-died") && text.contains("soft0  incarnation 3"), "{text}");
        let unknown = Event { from: Place::Device(6), ..Event::new(What::DeviceDown, 1) };
        assert!(names().line("pager", &unknown).to_string().contains("device 6"));
    }

    #[test]
    fn sizes_and_times_are_short() {
        assert_eq!([bytes(0), bytes(4096), bytes(3 << 19), bytes(1 << 40)], ["0 B", "4 KiB", "1.5 MiB", "1 TiB"]);
        assert_eq!(
            [duration(999), duration(1_500), duration(2_500_000), duration(61_000_000_000)],
            ["999 ns", "1.5 us", "2.5 ms", "61.0 s"]
        );
    }
}
