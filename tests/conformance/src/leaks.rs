//! What a case may not leave behind: regions, spaces, vault entries, descriptors of services, processes.
//!
//! Everything is compared with what there was before the case. The end of a client is noticed by events, so the comparison
//! is repeated until it holds or patience ends. Descriptors of a service that was restarted meanwhile (chaos) cannot be
//! compared; its vault entries can.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use uhmm_sdk::{Operator, ServiceStatus};

use crate::error::ConformanceError;
use crate::system::wait_ready;

/// Between two looks.
const POLL: Duration = Duration::from_millis(5);

/// Everything countable about a system at rest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Inventory {
    /// Pid and open descriptors by service.
    descriptors: BTreeMap<String, (u32, usize)>,
    /// Vault entries by service.
    vault: BTreeMap<String, u32>,
    /// Region ids.
    regions: BTreeSet<u64>,
    /// Pages on devices.
    device_pages: u64,
    /// Client processes that the pager knows.
    spaces: u64,
    /// Children of the supervisor.
    services: usize,
}

impl Inventory {
    /// Takes stock of a system whose services are all ready.
    pub(crate) fn take(operator: &mut Operator, supervisor_pid: Option<u32>) -> Result<Self, ConformanceError> {
        let services = wait_ready(operator)?;
        let regions = operator.regions()?;
        let metrics = operator.stats("pager")?;
        let spaces = metrics.iter().find(|metric| metric.name == "spaces").map_or(0, |metric| metric.value);
        Ok(Self {
            descriptors: services.iter().map(descriptors).collect(),
            vault: services.iter().map(|service| (service.name.clone(), service.vault_entries)).collect(),
            device_pages: regions.iter().flat_map(|region| &region.device_pages).sum(),
            regions: regions.iter().map(|region| region.region).collect(),
            spaces,
            services: supervisor_pid.map_or(0, |pid| children(pid).len()),
        })
    }

    /// What there is more of than `before`, in words; `None` when nothing.
    fn more_than(&self, before: &Self) -> Option<String> {
        let mut words = Vec::new();
        let new_regions = self.regions.difference(&before.regions).count();
        if new_regions > 0 {
            words.push(format!("{new_regions} regions"));
        }
        if self.device_pages > before.device_pages {
            words.push(format!("{} device pages", self.device_pages - before.device_pages));
        }
        if self.spaces > before.spaces {
            words.push(format!("{} spaces", self.spaces - before.spaces));
        }
        if self.services > before.services {
            words.push(format!("{} children of the supervisor", self.services - before.services));
        }
        for (service, entries) in &self.vault {
            let had = before.vault.get(service).copied().unwrap_or(0);
            if *entries > had {
                words.push(format!("{} vault entries of {service}", entries - had));
            }
        }
        for (service, (pid, open)) in &self.descriptors {
            match before.descriptors.get(service) {
                Some((old_pid, had)) if old_pid == pid && open > had => {
                    words.push(format!("{} descriptors of {service}", open - had));
                }
                _ => {}
            }
        }
        (!words.is_empty()).then(|| format!("Left behind: {}", words.join(", ")))
    }
}

/// Waits until nothing is left of a case; what is left when patience ends.
pub(crate) fn wait_clean(
    operator: &mut Operator,
    supervisor_pid: Option<u32>,
    before: &Inventory,
    patience: Duration,
) -> Result<Option<String>, ConformanceError> {
    let end = Instant::now() + patience;
    loop {
        let left = Inventory::take(operator, supervisor_pid)?.more_than(before);
        if left.is_none() || Instant::now() > end {
            return Ok(left);
        }
        // Nobody tells when another process has closed its last descriptor: looked at now and then, not all the time, because the
        // services need the cores for just that.
        std::thread::sleep(POLL);
    }
}

fn descriptors(service: &ServiceStatus) -> (String, (u32, usize)) {
    let open = std::fs::read_dir(format!("/proc/{}/fd", service.pid)).map_or(0, |entries| entries.count());
    (service.name.clone(), (service.pid, open))
}

/// Fields after the command name in /proc/PID/stat: state, parent, group, ...
fn stat_fields(pid: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after = text.rsplit_once(')')?.1;
    Some(after.split_whitespace().map(str::to_owned).collect())
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn children(parent: u32) -> Vec<u32> {
    let parent = parent.to_string();
    pids().filter(|pid| stat_fields(*pid).is_some_and(|fields| fields.get(1) == Some(&parent))).collect()
}

/// Whether a process of the group runs (zombies do not).
pub(crate) fn runs_in_group(group: i32) -> bool {
    let group = group.to_string();
    pids().any(|pid| {
        stat_fields(pid).is_some_and(|fields| fields.get(2) == Some(&group) && fields.first().is_some_and(|s| s != "Z"))
    })
}

/// Processor time of a process in clock ticks (user and kernel), for cases that look at idle services.
pub(crate) fn cpu_ticks(pid: u32) -> Option<u64> {
    let fields = stat_fields(pid)?;
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_named_and_what_went_away_is_not() {
        let mut before = Inventory { spaces: 1, ..Inventory::default() };
        before.descriptors.insert("pager".into(), (10, 20));
        before.descriptors.insert("mirror".into(), (11, 20));
        before.vault.insert("pager".into(), 5);
        assert_eq!(before.more_than(&before), None);
        let mut after = before.clone();
        after.regions.insert(7);
        after.device_pages = 3;
        after.descriptors.insert("pager".into(), (10, 22));
        after.descriptors.insert("mirror".into(), (99, 30));
        after.vault.insert("pager".into(), 4);
        let words = after.more_than(&before).unwrap();
        assert_eq!(words, "Left behind: 1 regions, 3 device pages, 2 descriptors of pager");
        assert_eq!(before.more_than(&after).as_deref(), Some("Left behind: 1 vault entries of pager"));
    }

    #[test]
    fn this_process_is_found_in_its_group_and_has_used_time() {
        let fields = stat_fields(std::process::id()).unwrap();
        assert!(runs_in_group(fields[2].parse().unwrap()));
        assert!(cpu_ticks(std::process::id()).is_some());
        assert!(!runs_in_group(i32::MAX));
    }
}
