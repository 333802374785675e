//! The plan for people: a table and a picture.

use crate::parse::{Join, Kind, SandboxMode};
use crate::plan::{ClientPlan, DevicePlan, Plan};
use crate::resolve::MEMORY_BYTES_MAX;

/// A PCI device knows its aperture and, unless the manifest limits it, its size when it is open.
fn line(device: &DevicePlan) -> String {
    let DevicePlan { id, name, service, coherent, populate, workers, .. } = device;
    let mib = device.memory_bytes >> 20;
    let (mib, aperture, pci) = match &device.pci {
        None => {
            let urls = device.remote.iter().flat_map(|remote| &remote.urls).map(ToString::to_string);
            let places: Vec<String> = device.path.iter().map(|path| path.display().to_string()).chain(urls).collect();
            let path = if places.is_empty() { "-".to_owned() } else { places.join(" ") };
            (mib.to_string(), device.aperture.to_string(), path)
        }
        Some(pci) => {
            let most = if device.memory_bytes == MEMORY_BYTES_MAX { "all".to_owned() } else { format!("<= {mib}") };
            (most, "device".to_owned(), device.bar.map_or(pci.to_string(), |bar| format!("{pci}, BAR {bar}")))
        }
    };
    format!("{id:<4} {name:<16} {service:<16} {mib:>10} {aperture:<9} {coherent:<9} {populate:<9} {workers:<8} {pci}\n")
}

/// What a process that joins must prove.
fn proof(join: &Join) -> String {
    let token = join.token_file.as_ref().map(|path| format!("token {}", path.display()));
    let user = join.uid.map(|uid| format!("uid {uid}"));
    [token, user].into_iter().flatten().collect::<Vec<_>>().join(" and ")
}

fn who(rule: &ClientPlan) -> String {
    let number = |what: &str, id: Option<u32>| id.map(|id| format!("{what} {id}"));
    let path = |what: &str, path: &Option<String>| path.as_ref().map(|path| format!("{what} {path}"));
    let all = [number("uid", rule.uid), number("gid", rule.gid)].into_iter();
    let all = all.chain([path("cgroup", &rule.cgroup), path("container", &rule.container)]);
    let all: Vec<String> = all.flatten().collect();
    if all.is_empty() { "anybody".to_owned() } else { all.join(", ") }
}

fn limits(rule: &ClientPlan) -> String {
    let memory = rule.device_memory_bytes.map(|bytes| format!("{} MiB of devices", bytes >> 20));
    let spaces = rule.max_spaces.map(|count| format!("{count} processes"));
    let regions = format!("{} regions each of {} MiB", rule.max_regions_per_space, rule.max_region_bytes >> 20);
    memory.into_iter().chain(spaces).chain([regions]).collect::<Vec<_>>().join(", ")
}

impl Plan {
    /// Services in start order, devices, channels, limits.
    pub fn print(&self) -> String {
        let mut text = format!("{:<16} {:<7} {:<24} {:<28} RESTART\n", "SERVICE", "KIND", "NEEDS", "COMMAND");
        for service in &self.services {
            let kind = match service.kind {
                Kind::Pager => "pager",
                Kind::Mirror => "mirror",
                Kind::Driver => "driver",
            };
            let command = if service.external {
                service.command.join(" ")
            } else {
                format!("uhmm {}", service.command.join(" "))
            };
            let command = service.join.as_ref().map_or(command, |join| format!("joins by {}", proof(join)));
            let restart = &service.restart;
            text += &format!(
                "{:<16} {kind:<7} {:<24} {command:<28} at once, then {}..{} ms; held after {} deaths in {} s\n",
                service.name,
                service.needs.join(" "),
                restart.backoff_min_ms,
                restart.backoff_max_ms,
                restart.max_deaths,
                restart.window_s,
            );
        }
        text += &format!(
            "\n{:<4} {:<16} {:<16} {:>10} {:<9} {:<9} {:<9} {:<8} PCI OR PATH\n",
            "ID", "DEVICE", "SERVICE", "MIB", "APERTURE", "COHERENT", "POPULATE", "WORKERS"
        );
        for device in &self.devices {
            text += &line(device);
        }
        if let Some(join) = &self.holder_join {
            text += &format!("\nThe holder joins by {}.\n", proof(join));
        }
        text += &format!(
            "\nHeartbeat every {} ms, killed after {} missed. Clients: {} processes, {} regions each.\n",
            self.supervisor.heartbeat_ms,
            self.supervisor.missed_limit,
            self.quota.max_spaces,
            self.quota.max_regions_per_space,
        );
        text + &self.print_sandboxes() + &self.print_clients()
    }

    /// What is not as usual; `uhmm plan --sandbox` has the rest.
    fn print_sandboxes(&self) -> String {
        let mut text = String::new();
        for service in &self.services {
            match service.sandbox.mode {
                SandboxMode::Off => {
                    text += &format!("{} is NOT confined: it may do all that its user may\n", service.name);
                }
                SandboxMode::Required => text += &format!("{} starts in a whole sandbox only\n", service.name),
                SandboxMode::On => {}
            }
            if let Some(account) = &service.account {
                text += &format!("{} runs as {} ({}:{})\n", service.name, account.user, account.uid, account.gid);
            }
        }
        text
    }

    /// Who may use what.
    fn print_clients(&self) -> String {
        if self.clients.is_empty() {
            return "Every client whom the sockets let in may use every device (no [[client]] rules).\n".to_owned();
        }
        let mut text = format!("\n{:<16} {:<40} {:<24} LIMITS\n", "CLIENTS", "WHO", "DEVICES");
        for rule in &self.clients {
            let may_use = |device: &&DevicePlan| rule.device_mask & 1 << device.id != 0;
            let devices: Vec<&str> = self.devices.iter().filter(may_use).map(|device| device.name.as_str()).collect();
            let devices = if devices.is_empty() { "none".to_owned() } else { devices.join(" ") };
            text += &format!("{:<16} {:<40} {devices:<24} {}\n", rule.name, who(rule), limits(rule));
        }
        text + "Any other client is refused.\n"
    }

    /// Who calls whom.
    pub fn draw(&self) -> String {
        let mut text = String::from("supervisor <== every service (vault, heartbeat)\n");
        for service in self.services.iter().filter(|service| service.kind != Kind::Driver) {
            text += &format!("|-- {:<12} <-- {}\n", service.name, self.callers(&service.name, service.kind));
        }
        let drivers: Vec<_> = self.services.iter().filter(|service| service.kind == Kind::Driver).collect();
        for (index, service) in drivers.iter().enumerate() {
            let branch = if index + 1 == drivers.len() { "`--" } else { "|--" };
            let device = self.driver_service(&service.name).map_or("", |device| device.name.as_str());
            text += &format!("{branch} {:<12} <-- clients   ==> device {device:?}\n", service.name);
        }
        text
    }

    fn callers(&self, name: &str, kind: Kind) -> String {
        let mut callers: Vec<&str> =
            self.channels.iter().filter(|channel| channel.to == name).map(|channel| channel.from.as_str()).collect();
        if kind == Kind::Pager {
            callers.push("clients");
        }
        callers.join(", ")
    }
}
