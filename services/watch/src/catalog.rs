//! Every metric that uhmm has, with its meaning: what the exposition, docs/metrics.md, the dashboard and the alert rules are held against.

/// Where a metric comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// Of every service, from the supervisor.
    Every,
    /// Of this service's own record.
    Record(&'static str),
    /// Of regions and devices.
    Memory,
    /// Of the exposition itself.
    Own,
}

/// How it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// Only ever grows; `_total` is added.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Seconds by bucket.
    Histogram,
}

/// One metric.
#[derive(Clone, Copy, Debug)]
pub struct Meta {
    /// Where it comes from.
    pub of: Of,
    /// As the record or the exposition has it.
    pub name: &'static str,
    /// How it counts.
    pub kind: Type,
    /// Labels.
    pub labels: &'static str,
    /// Meaning.
    pub help: &'static str,
}

impl Meta {
    /// Name of its samples.
    pub fn full_name(&self) -> String {
        let suffix = match self.kind {
            Type::Counter => "_total",
            Type::Gauge => "",
            Type::Histogram => "_seconds",
        };
        format!("{}{suffix}", self.family())
    }

    /// Name without a suffix of the type.
    pub fn family(&self) -> String {
        match self.of {
            Of::Record(kind) => format!("uhmm_{kind}_{}", gauge_name(self.name)),
            Of::Every | Of::Memory | Of::Own => format!("uhmm_{}", self.name),
        }
    }
}

/// Times are in seconds everywhere.
pub fn gauge_name(name: &str) -> String {
    name.strip_suffix("_ms").map_or_else(|| name.to_owned(), |stem| format!("{stem}_seconds"))
}

const fn meta(of: Of, name: &'static str, kind: Type, labels: &'static str, help: &'static str) -> Meta {
    Meta { of, name, kind, labels, help }
}

const EVERY: Of = Of::Every;
const SUPERVISOR: Of = Of::Record("supervisor");
const PAGER: Of = Of::Record("pager");
const MIRROR: Of = Of::Record("mirror");
const DRIVER: Of = Of::Record("driver");
use Of::{Memory, Own};
use Type::{Counter, Gauge, Histogram};

/// See the module head.
pub const ALL: &[Meta] = &[
    meta(EVERY, "service_up", Gauge, "service", "1: it serves"),
    meta(EVERY, "service_held", Gauge, "service", "1: it died too often and is not started again"),
    meta(EVERY, "service_restarts", Counter, "service", "How often it was started again"),
    meta(EVERY, "service_recovery_seconds", Gauge, "service", "From its last death to ready again; 0: it never died"),
    meta(EVERY, "service_uptime_seconds", Gauge, "service", "Since it is ready"),
    meta(EVERY, "service_missed_heartbeats", Gauge, "service", "Heartbeats missed in a row"),
    meta(EVERY, "service_vault_entries", Gauge, "service", "Descriptors that outlive it"),
    meta(EVERY, "service_events", Counter, "service", "Events it has written (`uhmm events`)"),
    meta(SUPERVISOR, "services", Gauge, "service", "Services of the plan"),
    meta(SUPERVISOR, "restarts", Counter, "service", "Services that were started again"),
    meta(SUPERVISOR, "vault_entries", Gauge, "service", "Descriptors in the vault"),
    meta(SUPERVISOR, "denied_calls", Gauge, "service", "System calls that sandboxes refused to the services that run"),
    meta(SUPERVISOR, "uptime_ms", Gauge, "service", "Since the supervisor runs"),
    meta(
        PAGER,
        "fault",
        Histogram,
        "service, kind",
        "CPU faults from the kernel's word to the program going on, by what was found: zero (first touch), minor, protected, moving, device, lost",
    ),
    meta(PAGER, "request", Histogram, "service", "Migrations that clients and operators asked for"),
    meta(PAGER, "device_fault", Histogram, "service", "Device faults, from the mirror's question to the answer"),
    meta(
        PAGER,
        "cpu_faults",
        Counter,
        "service",
        "CPU faults reported by the kernel; a page on the move is reported again",
    ),
    meta(PAGER, "parked", Counter, "service", "Of those: on a page on the move"),
    meta(PAGER, "device_faults", Counter, "service", "Device faults asked for"),
    meta(PAGER, "faults_waited_for_frame", Counter, "service", "Device faults that had to wait until a frame was free"),
    meta(PAGER, "pages_out", Counter, "service", "Pages moved to devices"),
    meta(PAGER, "pages_home", Counter, "service", "Pages brought home"),
    meta(PAGER, "pages_across", Counter, "service", "Pages moved from device to device"),
    meta(PAGER, "cpu_mapped", Counter, "service", "Pages on coherent devices that programs reach there"),
    meta(PAGER, "evicted", Counter, "service", "Pages brought home because a device was full, or by order"),
    meta(PAGER, "second_chances", Counter, "service", "Pages that eviction passed over because their device uses them"),
    meta(PAGER, "duplicated", Counter, "service", "Pages copied to devices for reading"),
    meta(PAGER, "collapsed", Counter, "service", "Such copies that ended"),
    meta(PAGER, "shared", Counter, "service", "Pages on devices that a forked child shares"),
    meta(PAGER, "throttled", Counter, "service", "Device faults that had to wait because pages go to and fro (thrash)"),
    meta(PAGER, "zero_filled", Counter, "service", "Pages zeroed for the CPU"),
    meta(PAGER, "continues", Counter, "service", "Pages mapped for the CPU that were there"),
    meta(PAGER, "revokes", Counter, "service", "Revocations (invalidations) asked for"),
    meta(PAGER, "revokes_direct", Counter, "service", "Of those: in shared page tables, without a message"),
    meta(PAGER, "revokes_by_message", Counter, "service", "Of those: by messages"),
    meta(PAGER, "retries", Counter, "service", "Steps repeated because an event of the address space was unread"),
    meta(PAGER, "scrubbed", Counter, "service", "Frames scrubbed"),
    meta(PAGER, "poisoned", Counter, "service", "Pages lost"),
    meta(PAGER, "recovered_transfers", Counter, "service", "Transfers rolled back or finished after a restart"),
    meta(PAGER, "copy_failures", Counter, "service", "Copies that failed"),
    meta(PAGER, "recovered_spaces", Counter, "service", "Address spaces adopted from the vault"),
    meta(PAGER, "recovered_regions", Counter, "service", "Regions adopted from the vault"),
    meta(PAGER, "spaces_ended", Counter, "service", "Address spaces whose process ended"),
    meta(PAGER, "heat_sweeps", Counter, "service", "Sweeps for hot ranges"),
    meta(PAGER, "rested_pages", Counter, "service", "Pages that nobody touched while they rested on their way out"),
    meta(
        PAGER,
        "rest_touched_pages",
        Counter,
        "service",
        "Pages that came back because they were touched while they rested",
    ),
    meta(
        PAGER,
        "moves_beside_threads",
        Counter,
        "service",
        "Times that the pager went to the CPU of a thread that faults",
    ),
    meta(PAGER, "quota_refusals", Counter, "service", "Clients that were told that they have their share"),
    meta(PAGER, "heat_spaces", Gauge, "service", "Address spaces whose hot ranges are asked for"),
    meta(PAGER, "pending_revokes", Gauge, "service", "Revocations that wait for devices"),
    meta(PAGER, "spaces", Gauge, "service", "Address spaces"),
    meta(PAGER, "spaces_max", Gauge, "service", "Address spaces that the manifest allows"),
    meta(PAGER, "regions", Gauge, "service", "Regions"),
    meta(PAGER, "requests_waiting", Gauge, "service", "Requests under way"),
    meta(PAGER, "copies_waiting", Gauge, "service", "Copies that wait for a driver"),
    meta(PAGER, "resting_pages", Gauge, "service", "Pages that rest on their way out"),
    meta(PAGER, "agent_jobs", Gauge, "service", "Orders that clients' agents work on"),
    meta(
        PAGER,
        "migrations",
        Counter,
        "service, cause, way",
        "Transfers, by cause (user, prefetch, cpu-fault, device-fault, eviction, address-space) and way (out, home, peer)",
    ),
    meta(PAGER, "migrated_bytes", Counter, "service, cause, way", "Bytes moved by them"),
    meta(PAGER, "device_memory_bytes", Gauge, "service, device", "Memory of a device; 0: its driver has not logged in"),
    meta(PAGER, "device_free_bytes", Gauge, "service, device", "Of that: free"),
    meta(MIRROR, "invalidations", Counter, "service", "Invalidations by message"),
    meta(MIRROR, "invalidate_starts", Counter, "service", "Drivers that were told of one"),
    meta(MIRROR, "late_devices", Counter, "service", "Drivers that did not stop in time"),
    meta(MIRROR, "device_faults", Counter, "service", "Device faults passed on"),
    meta(MIRROR, "device_fault_retries", Counter, "service", "Of those: begun anew because of an invalidation"),
    meta(MIRROR, "device_fault_trims", Counter, "service", "Of those: cut because of one"),
    meta(MIRROR, "intervals", Gauge, "service", "Regions mirrored"),
    meta(MIRROR, "pending_invalidations", Gauge, "service", "Invalidations under way"),
    meta(MIRROR, "open_mirrors", Gauge, "service", "Address spaces times devices"),
    meta(DRIVER, "device_fault_wait", Histogram, "service", "How long device threads waited for a fault"),
    meta(DRIVER, "device_faults", Counter, "service", "Faults of device threads"),
    meta(DRIVER, "device_fault_asks", Counter, "service", "Questions to the mirror because of them"),
    meta(DRIVER, "failed_device_faults", Counter, "service", "Of those faults: failed"),
    meta(DRIVER, "suspended_faults", Gauge, "service", "Device threads that wait"),
    meta(DRIVER, "installed_pages", Counter, "service", "Pages mapped"),
    meta(DRIVER, "refused_pages", Counter, "service", "Pages that were revoked before they were mapped"),
    meta(DRIVER, "jobs", Counter, "service", "Jobs that ended"),
    meta(DRIVER, "failed_jobs", Counter, "service", "Of those: failed"),
    meta(DRIVER, "running_jobs", Gauge, "service", "Jobs that run"),
    meta(DRIVER, "invalidations", Counter, "service", "Invalidations by message"),
    meta(DRIVER, "invalidated_pages", Counter, "service", "Pages that they took away"),
    meta(DRIVER, "copies", Counter, "service", "Copies of the copy engine"),
    meta(DRIVER, "failed_copies", Counter, "service", "Of those: failed"),
    meta(DRIVER, "copied_bytes", Counter, "service", "Bytes that it has moved or scrubbed"),
    meta(DRIVER, "servers", Gauge, "service", "Block servers that a device of the driver nbd lies on"),
    meta(DRIVER, "servers_away", Gauge, "service", "Of those: no connection to them"),
    meta(DRIVER, "behind_pages", Gauge, "service", "Pages that only one of two servers has"),
    meta(Memory, "resident_bytes", Gauge, "place", "Managed memory by place: home, absent, moving, lost, or a device"),
    meta(Memory, "region_bytes", Gauge, "pid, region, place", "The same of the 32 largest regions"),
    meta(Own, "scrape_problems", Gauge, "", "What could not be seen at this scrape"),
];

/// What is known of a metric of a record; a driver of somebody else's may have more.
pub fn find(kind: &str, name: &str) -> Option<&'static Meta> {
    ALL.iter().find(|meta| matches!(meta.of, Of::Record(of) if of == kind) && meta.name == name)
}

/// docs/metrics.md.
pub fn document() -> String {
    let mut text = String::from(
        "# Metrics\n\nWhat `uhmm metrics` serves (docs/operate.md, \"Watching\"). Made from `services/watch/src/catalog.rs`: a test compares them, and says how to make it again.\n\
         Counters go on over restarts: they lie in the vault. A kill -9 costs the counts of the last turns of a loop at most (32), and they begin anew when supervisor and holder die with the service.\n\n\
         | metric | type | labels | meaning |\n| --- | --- | --- | --- |\n",
    );
    for meta in ALL {
        let kind = match meta.kind {
            Type::Counter => "counter",
            Type::Gauge => "gauge",
            Type::Histogram => "histogram",
        };
        text.push_str(&format!("| `{}` | {kind} | {} | {} |\n", meta.full_name(), meta.labels, meta.help));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    #[test]
    fn every_name_is_there_once_and_legal() {
        let names: BTreeSet<String> = ALL.iter().map(Meta::full_name).collect();
        assert_eq!(names.len(), ALL.len());
        for name in names {
            assert!(
                name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_'),
                "{name}"
            );
        }
    }

    #[test]
    fn the_documentation_is_current() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/metrics.md");
        if std::env::var_os("UHMM_BLESS").is_some() {
            std::fs::write(&path, document()).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            written == document(),
            "{} is not what the catalog says: UHMM_BLESS=1 cargo nextest run -p uhmm-watch the_documentation",
            path.display()
        );
    }
}
