//! From manifest to plan: every check, every default.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::parse::{Device, Join, Kind, Manifest, Service};
use crate::plan::{Channel, DevicePlan, Plan, RemotePlan, ServicePlan};
use crate::{DEVICE_COUNT_MAX, ManifestError};

const PAGE_BYTES: u64 = 4096;
/// Most memory of one device: frame numbers have 32 bits.
pub const MEMORY_BYTES_MAX: u64 = (u32::MAX as u64) * PAGE_BYTES;
/// Of a software device when the manifest says nothing.
const MEMORY_BYTES_DEFAULT: u64 = 1 << 30;
/// The copy engine moves chunks of 2 MiB.
const STAGING_BYTES_MIN: u64 = 2 << 20;
/// To a block server, where it allows several.
const CONNECTIONS_DEFAULT: u32 = 4;
/// A server's machine starts again meanwhile.
const PATIENCE_S_DEFAULT: u32 = 120;
/// Longer than a segment lives in a network (two minutes).
const SETTLE_S_DEFAULT: u32 = 180;
/// Built-in drivers and whether they drive PCI devices. `uhmm driver NAME` runs them.
const BUILT_IN_DRIVERS: &[(&str, bool)] =
    &[("soft", false), ("bar", true), ("nvme", true), ("edu", true), ("accel", true), ("file", false), ("nbd", false)];

impl Manifest {
    /// Checks everything and decides what was left open. Programs of third parties must exist now.
    pub fn resolve(&self) -> Result<Plan, ManifestError> {
        self.check_names()?;
        self.check_numbers()?;
        let devices = self.resolve_devices()?;
        let services = self.resolve_services()?;
        let channels = self.resolve_channels()?;
        let services = start_order(services)?;
        let (supervisor, quota) = (self.supervisor.clone(), self.quota.clone());
        let holder_join = self.holder.join.clone();
        if let Some(join) = &holder_join {
            check_join("holder", join)?;
        }
        let clients = crate::accounts::resolve_clients(self, &devices)?;
        let fault_injection = self.fault_injection;
        Ok(Plan { fault_injection, supervisor, holder_join, quota, clients, services, devices, channels })
    }

    fn check_names(&self) -> Result<(), ManifestError> {
        let services = self.services.iter().map(|service| ("Service", &service.name));
        let devices = self.devices.iter().map(|device| ("Device", &device.name));
        let mut seen = BTreeSet::new();
        for (what, name) in services.chain(devices) {
            let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            let ours = name == "supervisor" || name == "holder";
            if name.is_empty() || name.len() > 32 || !name.chars().all(legal) || ours {
                return Err(ManifestError::Name { name: name.clone() });
            }
            if !seen.insert((what, name)) {
                return Err(ManifestError::Duplicate { what, name: name.clone() });
            }
        }
        for (kind, text) in [(Kind::Pager, "pager"), (Kind::Mirror, "mirror")] {
            let count = self.services.iter().filter(|service| service.kind == kind).count();
            if count != 1 {
                return Err(ManifestError::Count { kind: text, count });
            }
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<(), ManifestError> {
        let supervisor = &self.supervisor;
        let range = |key: &str, value: u64, low: u64, high: u64, allowed: &'static str| {
            let fits = (low..=high).contains(&value);
            if fits { Ok(()) } else { Err(ManifestError::Range { key: key.to_owned(), value, allowed }) }
        };
        range("supervisor.heartbeat_ms", supervisor.heartbeat_ms, 10, 60_000, "10 to 60000")?;
        range("supervisor.missed_limit", u64::from(supervisor.missed_limit), 2, 1000, "2 to 1000")?;
        range("supervisor.start_timeout_ms", supervisor.start_timeout_ms, 100, 600_000, "100 to 600000")?;
        range("supervisor.stop_timeout_ms", supervisor.stop_timeout_ms, 10, 600_000, "10 to 600000")?;
        range("quota.max_spaces", u64::from(self.quota.max_spaces), 1, 65_536, "1 to 65536")?;
        for service in &self.services {
            let restart = &service.restart;
            let key = |name: &str| format!("{}.restart.{name}", service.name);
            range(&key("backoff_min_ms"), restart.backoff_min_ms, 1, restart.backoff_max_ms, "1 to backoff_max_ms")?;
            range(&key("max_deaths"), u64::from(restart.max_deaths), 1, 1_000_000, "1 to 1000000")?;
            range(&key("window_s"), restart.window_s, 1, 86_400, "1 to 86400")?;
        }
        Ok(())
    }

    fn resolve_devices(&self) -> Result<Vec<DevicePlan>, ManifestError> {
        if self.devices.len() > DEVICE_COUNT_MAX {
            let device = self.devices[DEVICE_COUNT_MAX].name.clone();
            return Err(ManifestError::Device {
                device,
                problem: "at most 8 devices are possible: remove some".into(),
            });
        }
        let mut driven = BTreeMap::new();
        for device in &self.devices {
            let service = self.services.iter().find(|service| service.name == device.service);
            let Some(service) = service else {
                let from = format!("Device {:?}", device.name);
                return Err(ManifestError::Dangling { from, to: device.service.clone() });
            };
            check_device(device, service)?;
            if let Some(other) = driven.insert(&device.service, &device.name) {
                let problem = format!("service {:?} drives {other:?} already: one service a device", device.service);
                return Err(ManifestError::Device { device: device.name.clone(), problem });
            }
        }
        let idle = self.services.iter().find(|s| s.kind == Kind::Driver && !driven.contains_key(&s.name));
        if let Some(service) = idle {
            let problem = "it drives no device: add a [[device]] with this service".to_owned();
            return Err(ManifestError::Program { service: service.name.clone(), problem });
        }
        let plans = self.devices.iter().enumerate().map(|(id, device)| DevicePlan {
            id: id as u8,
            name: device.name.clone(),
            service: device.service.clone(),
            pci: device.pci.clone(),
            bar: device.bar,
            cmb: device.cmb,
            format: device.format,
            path: device.path.clone(),
            remote: remote(device),
            seal: device.seal.unwrap_or_default(),
            memory_bytes: memory_bytes(device),
            populate: device.populate,
            aperture: device.aperture && device.path.is_none() && device.url.is_none(),
            coherent: device.coherent,
            workers: device.workers,
            staging_bytes: device.staging_bytes.0,
        });
        Ok(plans.collect())
    }

    fn resolve_services(&self) -> Result<Vec<ServicePlan>, ManifestError> {
        let name_of = |kind| self.services.iter().find(|s| s.kind == kind).map(|s| s.name.clone());
        let (pager, mirror) = (name_of(Kind::Pager), name_of(Kind::Mirror));
        let mut plans = Vec::new();
        for service in &self.services {
            for need in &service.needs {
                if !self.services.iter().any(|other| other.name == *need) {
                    let from = format!("Service {:?}", service.name);
                    return Err(ManifestError::Dangling { from, to: need.clone() });
                }
            }
            let natural = match service.kind {
                Kind::Pager => vec![],
                Kind::Mirror => vec![pager.clone()],
                Kind::Driver => vec![pager.clone(), mirror.clone()],
            };
            let mut needs: Vec<String> = natural.into_iter().flatten().collect();
            needs.extend(service.needs.iter().filter(|need| !needs.contains(need)).cloned().collect::<Vec<_>>());
            let (command, external) = program(service)?;
            plans.push(ServicePlan {
                name: service.name.clone(),
                kind: service.kind,
                command,
                external,
                join: service.join.clone(),
                needs,
                restart: service.restart.clone(),
                account: crate::accounts::of_service(service)?,
                sandbox: service.sandbox.clone(),
            });
        }
        Ok(plans)
    }

    fn resolve_channels(&self) -> Result<Vec<Channel>, ManifestError> {
        let rank = |name: &str| {
            let kind = self.services.iter().find(|service| service.name == name)?.kind;
            Some(match kind {
                Kind::Driver => 2,
                Kind::Mirror => 1,
                Kind::Pager => 0,
            })
        };
        let mut channels = BTreeSet::new();
        for channel in &self.channels {
            for end in [&channel.from, &channel.to] {
                if rank(end).is_none() {
                    let from = format!("Channel {:?} -> {:?}", channel.from, channel.to);
                    return Err(ManifestError::Dangling { from, to: end.clone() });
                }
            }
            if rank(&channel.from) <= rank(&channel.to) {
                return Err(ManifestError::Channel { from: channel.from.clone(), to: channel.to.clone() });
            }
            channels.insert(Channel { from: channel.from.clone(), to: channel.to.clone() });
        }
        if self.channels.is_empty() {
            for from in &self.services {
                let lower = self.services.iter().filter(|to| rank(&from.name) > rank(&to.name));
                channels.extend(lower.map(|to| Channel { from: from.name.clone(), to: to.name.clone() }));
            }
        }
        Ok(channels.into_iter().collect())
    }
}

fn check_device(device: &Device, service: &Service) -> Result<(), ManifestError> {
    let wrong = |problem: String| Err(ManifestError::Device { device: device.name.clone(), problem });
    if service.kind != Kind::Driver {
        return wrong(format!("service {:?} is no driver: give kind = \"driver\"", service.name));
    }
    check_pci(device, service)?;
    check_path(device, service)?;
    check_url(device, service)?;
    let sealable = device.path.is_some() || device.url.is_some() || service.driver.as_deref() == Some("nvme");
    if device.seal.is_some() && (!sealable || device.cmb) {
        return wrong("`seal` is for devices with `path` or `url`, and for namespaces of NVMe: remove it".into());
    }
    let memory_bytes = memory_bytes(device);
    if memory_bytes == 0 || !memory_bytes.is_multiple_of(PAGE_BYTES) || memory_bytes > MEMORY_BYTES_MAX {
        return wrong(format!("memory_bytes = {memory_bytes} must be a multiple of {PAGE_BYTES}, from 4KiB to 16TiB"));
    }
    if device.coherent && !device.aperture {
        return wrong("coherent = true needs aperture = true: programs map its memory".into());
    }
    let staging_bytes = device.staging_bytes.0;
    if staging_bytes < STAGING_BYTES_MIN || !staging_bytes.is_multiple_of(PAGE_BYTES) {
        return wrong(format!("staging_bytes = {staging_bytes} must be a multiple of {PAGE_BYTES}, 2MiB or more"));
    }
    if !(1..=64).contains(&device.workers) {
        return wrong(format!("workers = {} must be 1 to 64", device.workers));
    }
    Ok(())
}

fn memory_bytes(device: &Device) -> u64 {
    let default = if device.pci.is_some() { MEMORY_BYTES_MAX } else { MEMORY_BYTES_DEFAULT };
    device.memory_bytes.map_or(default, |given| given.0)
}

/// Third parties' drivers may have files of their own.
fn check_path(device: &Device, service: &Service) -> Result<(), ManifestError> {
    let wrong = |problem: String| Err(ManifestError::Device { device: device.name.clone(), problem });
    let by_file = service.driver.as_deref() == Some("file");
    match &device.path {
        None if by_file => wrong("driver \"file\" needs a file or a partition: path = \"/var/lib/uhmm/far0\"".into()),
        Some(_) if !by_file && service.driver.is_some() => {
            wrong("`path` is for driver \"file\": remove it, or use that driver".into())
        }
        Some(path) if !path.is_absolute() => wrong(format!("path = {path:?} must begin with /")),
        Some(_) if device.coherent => {
            wrong("coherent = true needs memory that programs can map, and blocks of a file are not: remove it".into())
        }
        Some(_) if device.populate => wrong("a file's room is always reserved at the start: remove `populate`".into()),
        _ => Ok(()),
    }
}

/// Third parties' drivers may have servers of their own.
fn check_url(device: &Device, service: &Service) -> Result<(), ManifestError> {
    let wrong = |problem: String| Err(ManifestError::Device { device: device.name.clone(), problem });
    let by_nbd = service.driver.as_deref() == Some("nbd");
    let Some(urls) = &device.url else {
        let numbers = [device.connections, device.replicas, device.patience_s, device.settle_s];
        return match (by_nbd, numbers.iter().any(Option::is_some) || device.durable.is_some()) {
            (true, _) => wrong("driver \"nbd\" needs a block server: url = \"nbd://192.0.2.7/export\"".into()),
            (_, true) => {
                wrong("connections, replicas, patience_s, settle_s and durable are for devices with `url`".into())
            }
            _ => Ok(()),
        };
    };
    let count = urls.parsed().map_err(|problem| ManifestError::Device { device: device.name.clone(), problem })?.len();
    let range = |key: &str, given: Option<u32>, low: u32, high: u32| match given {
        Some(value) if !(low..=high).contains(&value) => wrong(format!("{key} = {value} must be {low} to {high}")),
        _ => Ok(()),
    };
    range("connections", device.connections, 1, 16)?;
    range("patience_s", device.patience_s, 1, 3600)?;
    range("settle_s", device.settle_s, 0, 86_400)?;
    if service.driver.is_some() && !by_nbd {
        return wrong("`url` is for driver \"nbd\": remove it, or use that driver".into());
    }
    if count == 0 || count > 2 || device.replicas.is_some_and(|replicas| replicas as usize != count) {
        let replicas = device.replicas.unwrap_or(1);
        return wrong(format!("replicas = {replicas} and {count} urls: name one server for each replica, 1 or 2"));
    }
    if device.coherent || device.populate || device.path.is_some() {
        return wrong(
            "a block server's memory is no window and no file: remove `coherent`, `populate` and `path`".into(),
        );
    }
    Ok(())
}

/// What was checked, and what nobody has said.
fn remote(device: &Device) -> Option<RemotePlan> {
    Some(RemotePlan {
        urls: device.url.as_ref()?.parsed().ok()?,
        connections: device.connections.unwrap_or(CONNECTIONS_DEFAULT),
        patience_s: device.patience_s.unwrap_or(PATIENCE_S_DEFAULT),
        settle_s: device.settle_s.unwrap_or(SETTLE_S_DEFAULT),
        durable: device.durable.unwrap_or(true),
    })
}

/// Third parties' drivers may drive either kind of device.
fn check_pci(device: &Device, service: &Service) -> Result<(), ManifestError> {
    let wrong = |problem: String| Err(ManifestError::Device { device: device.name.clone(), problem });
    let built_in = BUILT_IN_DRIVERS.iter().find(|(name, _)| service.driver.as_deref() == Some(*name));
    match (&device.pci, built_in) {
        (None, Some((driver, true))) => {
            return wrong(format!("driver {driver:?} drives a PCI device: say which, as in pci = \"0000:00:05.0\""));
        }
        (Some(_), Some((driver, false))) => {
            return wrong(format!("driver {driver:?} drives no PCI device: remove `pci`, or use another driver"));
        }
        _ => {}
    }
    if device.pci.is_some() && (!device.aperture || device.populate) {
        return wrong("a PCI device decides about its memory itself: remove `aperture` and `populate`".into());
    }
    for (key, given) in
        [("format", device.format && device.path.is_none() && device.url.is_none()), ("cmb", device.cmb)]
    {
        if given && device.pci.is_none() {
            return wrong(format!("`{key}` is for PCI devices: remove it, or give `pci`"));
        }
    }
    match device.bar {
        Some(_) if device.pci.is_none() => wrong("`bar` is for PCI devices: remove it, or give `pci`".into()),
        Some(bar) if bar > 5 => wrong(format!("bar = {bar} must be 0 to 5")),
        _ => Ok(()),
    }
}

/// The command of a service, and whether it is a program of its own.
fn program(service: &Service) -> Result<(Vec<String>, bool), ManifestError> {
    let wrong =
        |problem: &str| Err(ManifestError::Program { service: service.name.clone(), problem: problem.to_owned() });
    if let Some(join) = &service.join {
        check_join(&service.name, join)?;
        match (service.kind, &service.driver, &service.command) {
            (Kind::Pager | Kind::Mirror, ..) => {
                return wrong("pager and mirror run beside the supervisor: remove `join`");
            }
            (.., Some(_)) => {
                return wrong("`join` and `command` exclude each other: whoever joins is started by somebody else");
            }
            // Any program.
            (_, None, None) => return Ok((Vec::new(), true)),
            (_, Some(_), None) => {}
        }
    }
    let built_in = |words: &[&str]| Ok((words.iter().map(|word| (*word).to_owned()).collect(), false));
    match (service.kind, &service.driver, &service.command) {
        (Kind::Pager, None, None) => built_in(&["pager"]),
        (Kind::Mirror, None, None) => built_in(&["mirror"]),
        (Kind::Pager | Kind::Mirror, ..) => wrong("pager and mirror are built in: remove `driver` and `command`"),
        (Kind::Driver, Some(driver), None) if BUILT_IN_DRIVERS.iter().any(|(name, _)| name == driver) => {
            built_in(&["driver", driver])
        }
        (Kind::Driver, Some(_), None) => {
            let names: Vec<&str> = BUILT_IN_DRIVERS.iter().map(|(name, _)| *name).collect();
            wrong(&format!("the built-in drivers are: {}; for any other give `command`", names.join(", ")))
        }
        (Kind::Driver, None, Some(command)) => match command.first() {
            None => wrong("`command` is empty: give program and arguments"),
            Some(path) => executable(service, path).map(|()| (command.clone(), true)),
        },
        (Kind::Driver, Some(_), Some(_)) => wrong("give either `driver` or `command`, not both"),
        (Kind::Driver, None, None) => wrong("a driver needs `driver` (built in) or `command` (a program)"),
    }
}

/// Files are read by the supervisor, which may run elsewhere than `uhmm plan`.
fn check_join(service: &str, join: &Join) -> Result<(), ManifestError> {
    let wrong = |problem: &str| {
        Err(ManifestError::Program { service: service.to_owned(), problem: format!("`join`: {problem}") })
    };
    match (&join.token_file, join.uid) {
        (None, None) => wrong("say how its process proves itself: `token_file`, `uid` or both"),
        (Some(path), _) if !path.is_absolute() => wrong("give `token_file` as an absolute path"),
        _ => Ok(()),
    }
}

fn executable(service: &Service, path: &str) -> Result<(), ManifestError> {
    use std::os::unix::fs::PermissionsExt;
    let missing = |problem: String| {
        Err(ManifestError::MissingBinary { service: service.name.clone(), path: path.to_owned(), problem })
    };
    if !path.starts_with('/') {
        return missing("give an absolute path".to_owned());
    }
    match std::fs::metadata(Path::new(path)) {
        Err(error) => missing(error.to_string()),
        Ok(meta) if !meta.is_file() => missing("it is no file".to_owned()),
        Ok(meta) if meta.permissions().mode() & 0o111 == 0 => missing("it is not executable (chmod +x)".to_owned()),
        Ok(_) => Ok(()),
    }
}

/// Depth first by `needs`; stable for services that do not need each other.
fn start_order(services: Vec<ServicePlan>) -> Result<Vec<ServicePlan>, ManifestError> {
    let by_name: BTreeMap<&str, &ServicePlan> = services.iter().map(|s| (s.name.as_str(), s)).collect();
    let mut order: Vec<String> = Vec::new();
    for service in &services {
        visit(&service.name, &by_name, &mut Vec::new(), &mut order)?;
    }
    let ordered = order.iter().filter_map(|name| by_name.get(name.as_str()).map(|service| (*service).clone()));
    Ok(ordered.collect())
}

fn visit(
    name: &str,
    by_name: &BTreeMap<&str, &ServicePlan>,
    path: &mut Vec<String>,
    order: &mut Vec<String>,
) -> Result<(), ManifestError> {
    if order.iter().any(|done| done == name) {
        return Ok(());
    }
    if let Some(at) = path.iter().position(|on_path| on_path == name) {
        let mut path = path[at..].to_vec();
        path.push(name.to_owned());
        return Err(ManifestError::Cycle { path });
    }
    path.push(name.to_owned());
    for need in by_name.get(name).map(|service| service.needs.as_slice()).unwrap_or_default() {
        visit(need, by_name, path, order)?;
    }
    path.pop();
    order.push(name.to_owned());
    Ok(())
}
