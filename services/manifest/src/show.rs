//! The plan for people: a table and a picture.

use crate::parse::{Join, Kind};
use crate::plan::{DevicePlan, Plan};
use crate::resolve::MEMORY_BYTES_MAX;

/// A PCI device knows its aperture and, unless the manifest limits it, its size when it is open.
fn line(device: &DevicePlan) -> String {
    let DevicePlan { id, name, service, coherent, populate, workers, .. } = device;
    let mib = device.memory_bytes >> 20;
    let (mib, aperture, pci) = match &device.pci {
        None => {
            let path = device.path.as_ref().map_or("-".to_owned(), |path| path.display().to_string());
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
        text
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
