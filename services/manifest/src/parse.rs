//! The manifest as it is written.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, de};
use uhmm_pci::PciPath;

use crate::ManifestError;
use crate::nbd::{NbdUrl, Urls};

/// A size in bytes; written as a number or with a suffix: `"64MiB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(bytes) => Ok(Self(bytes)),
            Written::Text(text) => text.parse().map_err(de::Error::custom),
        }
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse_size(text).map(Self)
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].trim() {
        "" | "B" => 1u64,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        other => return Err(format!("size {text:?} has unknown unit {other:?}: use KiB, MiB, GiB or TiB")),
    };
    let number: u64 = digits.trim().parse().map_err(|_| format!("size {text:?} does not begin with a whole number"))?;
    number.checked_mul(unit).ok_or_else(|| format!("size {text:?} is too large"))
}

/// What kind of service it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Exactly one.
    Pager,
    /// Exactly one.
    Mirror,
    /// Any number, one device each.
    Driver,
}

/// `[supervisor]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Supervisor {
    /// Period of the pings.
    pub heartbeat_ms: u64,
    /// Unanswered pings in a row after which a service is killed.
    pub missed_limit: u32,
    /// Time from start to ready.
    pub start_timeout_ms: u64,
    /// Time from Stop to SIGKILL.
    pub stop_timeout_ms: u64,
}

impl Default for Supervisor {
    fn default() -> Self {
        Self { heartbeat_ms: 500, missed_limit: 4, start_timeout_ms: 20_000, stop_timeout_ms: 2_000 }
    }
}

/// `[service.restart]`: the first restart is immediate, later ones wait twice as long each time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Restart {
    /// Wait before the second restart.
    pub backoff_min_ms: u64,
    /// Longest wait.
    pub backoff_max_ms: u64,
    /// More deaths than this within the window: held.
    pub max_deaths: u32,
    /// The window; a service that lives this long starts with a clean slate.
    pub window_s: u64,
}

impl Default for Restart {
    fn default() -> Self {
        Self { backoff_min_ms: 20, backoff_max_ms: 2_000, max_deaths: 30, window_s: 60 }
    }
}

/// Whether a service is confined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SandboxMode {
    /// As far as this kernel and account offer it; what they do not is said.
    #[default]
    On,
    /// The service does not start where anything is missing.
    Required,
    /// The service may do all that its user may.
    Off,
}

/// `[service.sandbox]`: what a service may do. Every kind of service has its own list (`uhmm plan --sandbox`); this adds to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sandbox {
    /// Whether at all.
    pub mode: SandboxMode,
    /// Most open descriptors (RLIMIT_NOFILE).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nofile: Option<u64>,
    /// Largest address space (RLIMIT_AS). Device memory and windows count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address_space_bytes: Option<ByteSize>,
    /// Most processes and threads of the service's user (RLIMIT_NPROC). The kernel limits nobody whose user is root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub processes: Option<u64>,
    /// More system calls, by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub syscalls: Vec<String>,
    /// More files, and folders with all that is below, that may be read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub read: Vec<PathBuf>,
    /// The same, that may be written: files that exist, and devices with their ioctls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub write: Vec<PathBuf>,
    /// The same, that may be executed: a driver that is a script needs its interpreter and what that starts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub execute: Vec<PathBuf>,
    /// The network may be used.
    pub network: bool,
}

/// `join = { ... }`: the process is not started here. It comes by itself, from a container or another unit, and is let in if it proves itself by
/// everything that is said here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Join {
    /// File with the token that it must show: 16 to 64 bytes of text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// Its user, as the supervisor's user namespace numbers it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
}

/// `[holder]`: the second process that keeps what the services share.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Holder {
    /// It has a container of its own, so that it outlives the supervisor's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub join: Option<Join>,
}

/// `[[service]]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Unique; part of the socket's path.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Built-in driver (`"soft"`, `"bar"`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// A third party's driver: program and arguments; the usual service arguments are appended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// A driver that the supervisor does not start: see [`Join`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub join: Option<Join>,
    /// Services that must be ready before this one starts, beside what its kind needs anyway.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub needs: Vec<String>,
    /// Restart policy.
    #[serde(default)]
    pub restart: Restart,
    /// The user whom the service runs as, by name or number, when the supervisor is root. Its group is the user's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// What it may do.
    #[serde(default)]
    pub sandbox: Sandbox,
}

/// `seal`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seal {
    /// What comes back is what was put there last, or an error; without the system's key nobody can read it.
    #[default]
    #[serde(rename = "aes-gcm")]
    AesGcm,
    /// Whoever reads the medium reads the pages, and whoever changes it changes them.
    #[serde(rename = "none")]
    None,
}

impl Seal {
    /// Pages are sealed.
    pub fn is_sealed(self) -> bool {
        self == Self::AesGcm
    }
}

/// `[[device]]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Unique. Applications ask for it by this name.
    pub name: String,
    /// The service that drives it.
    pub service: String,
    /// The PCI device: `"0000:00:05.0"` (bound to vfio-pci), or `"vfio-user:/path"` (a process that plays one). For drivers of PCI
    /// devices only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci: Option<PciPath>,
    /// Which base address register of the PCI device holds its memory, 0 to 5. Without it the largest one that can be mapped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bar: Option<u8>,
    /// Device memory is the NVMe controller's own memory buffer, which the CPU reaches, and not its namespace. For driver `"nvme"`.
    #[serde(default)]
    pub cmb: bool,
    /// A storage device is taken whatever it holds: **everything on it is destroyed**. Without it a device that holds anybody else's data is
    /// refused. For drivers of PCI devices, `"file"` and `"nbd"`.
    #[serde(default)]
    pub format: bool,
    /// A file on a local disk, or a partition, whose blocks are the device's memory. For driver `"file"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// The block server whose export is the device's memory, or one for each replica. For driver `"nbd"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<Urls>,
    /// Connections to a server, where it allows several. For driver `"nbd"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u32>,
    /// How many servers have each page: as many as `url` names. For driver `"nbd"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
    /// How long a read waits for a server that is away, before its page is lost. For driver `"nbd"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience_s: Option<u32>,
    /// How long after the end of a session a server may still execute a write of it. For driver `"nbd"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settle_s: Option<u32>,
    /// Whether a write is on the server's own medium before it counts. For driver `"nbd"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub durable: Option<bool>,
    /// Whether pages are sealed where they lie: `"aes-gcm"`, or `"none"`. For drivers `"file"`, `"nbd"` and `"nvme"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seal: Option<Seal>,
    /// Device memory. A software device has exactly this much, 1 GiB if nothing is said; of a PCI device it is the most that is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<ByteSize>,
    /// Touch all of device memory at start, as hardware has it from the beginning.
    #[serde(default)]
    pub populate: bool,
    /// The CPU sees device memory through a window. PCI devices decide that themselves.
    #[serde(default = "yes")]
    pub aperture: bool,
    /// A program reaches pages of memory that uhmm allocated for it where they are, on the device too. Needs `aperture`. Such a device
    /// serves one user: the first one, as long as the services run.
    #[serde(default)]
    pub coherent: bool,
    /// Device threads.
    #[serde(default = "default_workers")]
    pub workers: u32,
    /// Data area of the copy engine of a device without aperture.
    #[serde(default = "default_staging")]
    pub staging_bytes: ByteSize,
}

fn yes() -> bool {
    true
}

fn default_workers() -> u32 {
    2
}

fn default_staging() -> ByteSize {
    ByteSize(16 << 20)
}

/// `[[channel]]`: a connection that is allowed. Without any, every driver may call the mirror and the pager.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelEntry {
    /// Caller.
    pub from: String,
    /// Callee.
    pub to: String,
}

/// `[quota]`: what clients may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Quota {
    /// Client processes at once.
    pub max_spaces: u32,
    /// Regions of one process.
    pub max_regions_per_space: u32,
    /// Largest region.
    pub max_region_bytes: ByteSize,
}

impl Default for Quota {
    fn default() -> Self {
        Self { max_spaces: 256, max_regions_per_space: 4096, max_region_bytes: ByteSize(1 << 40) }
    }
}

/// `[[client]]`: who may use what. The first rule that names a client holds for it; with rules, a client that none of them names is refused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClientEntry {
    /// What refusals call it; `client N` without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// A user, by name or number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// A group, by name or number: the client's effective group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// A control group and all below it, as `/proc/PID/cgroup` has it: `"/system.slice/app.service"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    /// A container: a part of the control group's path that begins with this id (12 digits or more), whatever the engine writes around it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// Devices that it may use; all without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<String>>,
    /// Most device memory at once, over all devices and all processes whom this rule names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_memory_bytes: Option<ByteSize>,
    /// Most processes at once whom this rule names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_spaces: Option<u32>,
    /// Most regions of one process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_regions_per_space: Option<u32>,
    /// Largest region.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_region_bytes: Option<ByteSize>,
}

/// The manifest as it is written; see [`Manifest::resolve`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Clients may order failures of their own allocations and copies (tests).
    #[serde(default)]
    pub fault_injection: bool,
    /// Heartbeats and timeouts.
    #[serde(default)]
    pub supervisor: Supervisor,
    /// The second keeper.
    #[serde(default)]
    pub holder: Holder,
    /// Services.
    #[serde(rename = "service")]
    pub services: Vec<Service>,
    /// Devices; their order gives their ids.
    #[serde(rename = "device", default)]
    pub devices: Vec<Device>,
    /// Allowed connections.
    #[serde(rename = "channel", default, skip_serializing_if = "Vec::is_empty")]
    pub channels: Vec<ChannelEntry>,
    /// Limits for clients.
    #[serde(default)]
    pub quota: Quota,
    /// Who may use what; without any, every client whom the sockets let in may use everything.
    #[serde(rename = "client", default, skip_serializing_if = "Vec::is_empty")]
    pub clients: Vec<ClientEntry>,
}

const BUILT_IN: &str = r#"
[[service]]
name = "pager"
kind = "pager"

[[service]]
name = "mirror"
kind = "mirror"

[[service]]
name = "soft0"
kind = "driver"
driver = "soft"

[[device]]
name = "soft0"
service = "soft0"
memory_bytes = "1GiB"
"#;

impl Manifest {
    /// Reads TOML. Unknown keys are refused by name and line.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        toml::from_str(text).map_err(|error| ManifestError::Syntax(error.to_string()))
    }

    /// Pager, mirror and one software device `soft0` of 1 GiB.
    pub fn built_in() -> Self {
        Self::parse(BUILT_IN).unwrap_or_else(|error| unreachable!("the built-in manifest is tested: {error}"))
    }

    /// Pager, mirror and one device `far0` in a file.
    pub fn far_memory(size: ByteSize, path: &Path) -> Self {
        Self::far(size, "file", |device| device.path = Some(path.to_owned()))
    }

    /// Pager, mirror and one device `far0` on a block server.
    pub fn remote_memory(size: ByteSize, url: &NbdUrl) -> Self {
        Self::far(size, "nbd", |device| device.url = Some(Urls::One(url.to_string())))
    }

    fn far(size: ByteSize, driver: &str, place: impl Fn(&mut Device)) -> Self {
        let mut manifest = Self::built_in();
        for service in manifest.services.iter_mut().filter(|service| service.kind == Kind::Driver) {
            (service.name, service.driver) = ("far0".to_owned(), Some(driver.to_owned()));
        }
        for device in &mut manifest.devices {
            (device.name, device.service) = ("far0".to_owned(), "far0".to_owned());
            device.memory_bytes = Some(size);
            place(device);
        }
        manifest
    }
}
