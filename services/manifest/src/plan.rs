//! The plan: the manifest with everything checked and decided. Immutable; services get it as TOML.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uhmm_pci::PciPath;

use crate::ManifestError;
use crate::nbd::NbdUrl;
use crate::parse::{Join, Kind, Quota, Restart, Sandbox, Seal, Supervisor};

/// One service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePlan {
    /// Name.
    pub name: String,
    /// Kind.
    pub kind: Kind,
    /// Subcommand of `uhmm` (`["pager"]`, `["driver", "soft"]`), or a third party's program with its arguments.
    pub command: Vec<String>,
    /// The command is a program of its own.
    pub external: bool,
    /// Its process comes by itself; the command says what that runs, if the manifest does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub join: Option<Join>,
    /// Services that must be ready first.
    pub needs: Vec<String>,
    /// Restart policy.
    pub restart: Restart,
    /// Whom it runs as; without: as the supervisor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<Account>,
    /// What it may do.
    pub sandbox: Sandbox,
}

/// A user, looked up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// As the manifest has it.
    pub user: String,
    /// Its number.
    pub uid: u32,
    /// Its group's.
    pub gid: u32,
}

/// A rule about clients, looked up. A client is named by it when all that it says about clients is true of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientPlan {
    /// What refusals call it.
    pub name: String,
    /// A user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// A group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// A control group and all below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    /// How a part of the control group's path begins, but for what engines write before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// A bit for each device that it may use.
    pub device_mask: u8,
    /// Most device memory at once of all whom it names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_memory_bytes: Option<u64>,
    /// Most processes whom it names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_spaces: Option<u32>,
    /// Most regions of one process.
    pub max_regions_per_space: u32,
    /// Largest region.
    pub max_region_bytes: u64,
}

/// Memory on block servers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemotePlan {
    /// One for each replica.
    pub urls: Vec<NbdUrl>,
    /// Connections to each.
    pub connections: u32,
    /// How long a read waits for a server that is away.
    pub patience_s: u32,
    /// How long after the end of a session a write of it may land.
    pub settle_s: u32,
    /// Writes are on the server's medium before they count, where it can say so.
    pub durable: bool,
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicePlan {
    /// Its bit in directory entries.
    pub id: u8,
    /// Name.
    pub name: String,
    /// Service that drives it.
    pub service: String,
    /// The PCI device, for drivers of such.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci: Option<PciPath>,
    /// The base address register with device memory, if the manifest says which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bar: Option<u8>,
    /// The memory buffer of an NVMe controller, not its namespace.
    #[serde(default)]
    pub cmb: bool,
    /// Taken whatever it holds.
    #[serde(default)]
    pub format: bool,
    /// File or partition whose blocks are its memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Block servers, one for each replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<RemotePlan>,
    /// Whether pages are sealed there.
    #[serde(default)]
    pub seal: Seal,
    /// Device memory, a multiple of the page size. Of a PCI device: use at most this much of what there is
    /// ([`crate::MEMORY_BYTES_MAX`]: all of it).
    pub memory_bytes: u64,
    /// Touch all of it at start.
    pub populate: bool,
    /// CPU-visible.
    pub aperture: bool,
    /// Programs map frames themselves; one user only.
    #[serde(default)]
    pub coherent: bool,
    /// Device threads.
    pub workers: u32,
    /// Copy engine's data area, a multiple of the page size.
    pub staging_bytes: u64,
}

/// An allowed connection between services.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Channel {
    /// Caller.
    pub from: String,
    /// Callee.
    pub to: String,
}

/// See the module head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Clients may order failures of their own allocations and copies (tests).
    #[serde(default)]
    pub fault_injection: bool,
    /// Heartbeats and timeouts.
    pub supervisor: Supervisor,
    /// How a holder that the supervisor does not start proves itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder_join: Option<Join>,
    /// Limits for clients.
    pub quota: Quota,
    /// Who may use what; see [`ClientPlan`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clients: Vec<ClientPlan>,
    /// In start order.
    pub services: Vec<ServicePlan>,
    /// By id.
    pub devices: Vec<DevicePlan>,
    /// Sorted.
    pub channels: Vec<Channel>,
}

impl Plan {
    /// For the wire.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_else(|error| unreachable!("a plan is plain data: {error}"))
    }

    /// From the wire.
    pub fn from_toml(text: &str) -> Result<Self, ManifestError> {
        toml::from_str(text).map_err(|error| ManifestError::Syntax(error.to_string()))
    }

    /// By id.
    pub fn device(&self, id: u8) -> Option<&DevicePlan> {
        self.devices.get(usize::from(id))
    }

    /// By name.
    pub fn device_by_name(&self, name: &str) -> Option<&DevicePlan> {
        self.devices.iter().find(|device| device.name == name)
    }

    /// The device that a driver service drives.
    pub fn driver_service(&self, service: &str) -> Option<&DevicePlan> {
        self.devices.iter().find(|device| device.service == service)
    }

    /// By name.
    pub fn service(&self, name: &str) -> Option<&ServicePlan> {
        self.services.iter().find(|service| service.name == name)
    }

    /// Name of the only service of this kind (pager, mirror).
    pub fn service_of_kind(&self, kind: Kind) -> Option<&ServicePlan> {
        self.services.iter().find(|service| service.kind == kind)
    }

    /// Whether any process comes by itself: then the run directory has folders to be given to such, and to clients in containers.
    pub fn has_joining(&self) -> bool {
        self.holder_join.is_some() || self.services.iter().any(|service| service.join.is_some())
    }

    /// Where a service listens: `pager.sock`, `mirror.sock`, `driver-DEVICE.sock`.
    pub fn endpoint_path(&self, run_dir: &Path, service: &str) -> PathBuf {
        let file = match self.driver_service(service) {
            Some(device) => format!("driver-{}.sock", device.name),
            None => match self.service(service).map(|service| service.kind) {
                Some(Kind::Pager) => "pager.sock".to_owned(),
                Some(Kind::Mirror) => "mirror.sock".to_owned(),
                _ => format!("{service}.sock"),
            },
        };
        run_dir.join(file)
    }
}
