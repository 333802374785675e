//! What this kernel and account offer, for `uhmm doctor`: each item is tried, not guessed from a version number.

use std::fmt;

mod sandbox;

use std::os::fd::AsFd;

use crate::pagemap::{self, Categories};
use crate::process;
use crate::range::PAGE_SIZE;
use crate::socket::SeqPacket;
use crate::uffd::{Features, Userfaultfd, create as ways};

use crate::window::{Prot, Window};
use crate::{memfd, procmap};

/// Whether something works here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Fully.
    Yes,
    /// With limits.
    Partly,
    /// Not at all.
    No,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Yes => "yes",
            Self::Partly => "partly",
            Self::No => "no",
        })
    }
}

/// One thing that was tried.
#[derive(Clone, Debug)]
pub struct Item {
    /// What it is.
    pub name: &'static str,
    /// Whether it works.
    pub status: Status,
    /// What was seen: a value or the kernel's answer.
    pub detail: String,
    /// What does not work without it; empty when nothing is missing.
    pub consequence: &'static str,
    /// Whether nothing works without it.
    pub required: bool,
    /// A command that an administrator can run; empty when nothing is missing or nothing helps.
    pub fix: &'static str,
}

impl Item {
    fn yes(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, status: Status::Yes, detail: detail.into(), consequence: "", required: is_required(name), fix: "" }
    }

    fn lacking(
        name: &'static str,
        status: Status,
        detail: impl Into<String>,
        consequence: &'static str,
        fix: &'static str,
    ) -> Self {
        Self { name, status, detail: detail.into(), consequence, required: is_required(name), fix }
    }

    fn tried<E: fmt::Display>(
        name: &'static str,
        answer: Result<String, E>,
        consequence: &'static str,
        fix: &'static str,
    ) -> Self {
        match answer {
            Ok(detail) => Self::yes(name, detail),
            Err(error) => Self::lacking(name, Status::No, error.to_string(), consequence, fix),
        }
    }
}

/// What was found. A plain struct: print it, or turn it into JSON.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The kernel's release, as `uname -r`.
    pub kernel_release: String,
    /// The account that tried: effective user number.
    pub uid: u32,
    /// The features that userfaultfd has here; empty when none can be made.
    pub uffd_features: Features,
    /// Everything that was tried.
    pub items: Vec<Item>,
}

impl Probe {
    /// Tries everything. Takes some milliseconds and changes nothing.
    #[must_use]
    pub fn run() -> Self {
        let uffd_features = Userfaultfd::supported_features().unwrap_or(Features::empty());
        let items = [
            device_node(),
            full_by_call(),
            user_mode_only(),
            features(uffd_features),
            fork_events(),
            mapped_files(),
            memory_file(),
            punch(),
            procmap_query(),
            pagemap_scan(),
            guards(),
            process_vm(),
            pidfd(),
            peer_pidfd(),
            memlock(),
            huge_pages(),
            shmem_huge_pages(),
            cgroup(),
            agent(),
        ]
        .into_iter()
        .chain(sandbox::items())
        .collect();
        let kernel_release = setting("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self { kernel_release, uid: rustix::process::geteuid().as_raw(), uffd_features, items }
    }

    /// Whether services and clients can run here at all.
    #[must_use]
    pub fn usable(&self) -> bool {
        self.items.iter().all(|item| !item.required || item.status != Status::No)
    }

    /// The item of that name.
    #[must_use]
    pub fn item(&self, name: &str) -> Option<&Item> {
        self.items.iter().find(|item| item.name == name)
    }
}

const NAME_DEVICE: &str = "userfaultfd device node";
const NAME_CALL: &str = "userfaultfd full";
const NAME_USER_MODE: &str = "userfaultfd user-mode-only";
const NAME_FEATURES: &str = "userfaultfd features";
const NAME_FORK: &str = "fork events";
const NAME_FILES: &str = "shared memory without a path";
const NAME_MEMFD: &str = "sealed memfd";
const NAME_PUNCH: &str = "punch hole";
const NAME_PIDFD: &str = "pidfd";

/// A full userfaultfd is not in this list: user-mode-only ones serve, with limits.
fn is_required(name: &str) -> bool {
    [NAME_USER_MODE, NAME_FEATURES, NAME_MEMFD, NAME_PUNCH, NAME_PIDFD].contains(&name)
}

fn device_node() -> Item {
    let made = ways::open_device().and_then(|node| ways::by_device(node.as_fd()));
    Item::tried(
        NAME_DEVICE,
        made.map(|_| ways::DEVICE_PATH.to_string()),
        "Without it only root gets full userfaultfds; the supervisor cannot hand the node to clients",
        "chgrp uhmm /dev/userfaultfd && chmod 660 /dev/userfaultfd (in containers: --device /dev/userfaultfd)",
    )
}

fn full_by_call() -> Item {
    Item::tried(
        NAME_CALL,
        ways::by_call(0).map(|_| "the call".to_string()),
        "Without the device node either, system calls fail with EFAULT on memory that is on a device, an alternate signal stack cannot be managed, and adopting all memory is refused",
        "sysctl vm.unprivileged_userfaultfd=1, or setcap cap_sys_ptrace+ep on the program",
    )
}

fn user_mode_only() -> Item {
    Item::tried(
        NAME_USER_MODE,
        Userfaultfd::create_user_mode_only().map(|_| "any account".to_string()),
        "Clients without the device node cannot manage memory at all",
        "Allow the userfaultfd call in the container's seccomp profile",
    )
}

fn features(found: Features) -> Item {
    let needed =
        Features::MISSING_SHMEM | Features::MINOR_SHMEM | Features::WP_HUGETLBFS_SHMEM | Features::WP_UNPOPULATED;
    let missing = Features::all() - found;
    if missing.is_empty() {
        return Item::yes(NAME_FEATURES, "all 17");
    }
    let (status, consequence) = if missing.intersects(needed) {
        (Status::No, "Shared regions cannot be migrated")
    } else {
        (Status::Partly, "Lost pages (POISON), private regions (MOVE) or fork may be unsupported")
    };
    let names: Vec<&str> = missing.iter_names().map(|(name, _)| name).collect();
    Item::lacking(NAME_FEATURES, status, format!("missing {}", names.join(", ")), consequence, "Use Linux 6.8 or newer")
}

/// Whether a userfaultfd of this account tells of forks: what the kernel lists is what root would get.
fn fork_events() -> Item {
    let granted = Userfaultfd::create(None).and_then(|(uffd, _)| uffd.api(Features::EVENT_FORK));
    let answer = match granted {
        Ok(features) if features.contains(Features::EVENT_FORK) => Ok("granted".to_string()),
        Ok(_) => Err("not in this kernel".to_string()),
        Err(error) => Err(error.to_string()),
    };
    Item::tried(
        NAME_FORK,
        answer,
        "Forked children find managed memory unmapped (MADV_DONTFORK), unless the pager may ask for the events: it runs as root and clients have the device node",
        "Run `uhmm up` as root, and give clients /dev/userfaultfd",
    )
}

/// Shared memory without a path (anonymous, or of a file that was deleted) is found by /proc/PID/map_files alone.
fn mapped_files() -> Item {
    let tried = memfd::create_sealed("uhmm-probe", PAGE_SIZE).and_then(|fd| {
        let window = Window::map(fd.as_fd(), 0, PAGE_SIZE, Prot::ReadWrite)?;
        let vmas = crate::own_memory::mappings(window.range())?;
        let vma =
            vmas.first().ok_or_else(|| crate::HookError::call("PROCMAP_QUERY", None, std::io::ErrorKind::NotFound))?;
        crate::own_memory::open_mapped_file(vma)
    });
    Item::tried(
        NAME_FILES,
        tried.map(|_| "found".to_string()),
        "Shared memory without a path (anonymous, memfd, files that were deleted) cannot be adopted; private memory and files with a path can",
        "setcap cap_checkpoint_restore+ep on the program, or allocate the memory from uhmm",
    )
}

fn memory_file() -> Item {
    let made = memfd::create_sealed("uhmm-probe", PAGE_SIZE).and_then(|fd| memfd::check_sealed(fd.as_fd(), PAGE_SIZE));
    let fix = "Allow memfd_create in the container's seccomp profile";
    Item::tried(NAME_MEMFD, made.map(|()| "size seals hold".to_string()), "Nothing works without it", fix)
}

fn punch() -> Item {
    let tried = memfd::create_sealed("uhmm-probe", PAGE_SIZE).and_then(|fd| {
        Window::map(fd.as_fd(), 0, PAGE_SIZE, Prot::ReadWrite)?.store_u8(0, 1)?;
        memfd::punch_hole(fd.as_fd(), 0, PAGE_SIZE)?;
        memfd::populated_bytes(fd.as_fd())
    });
    Item::tried(
        NAME_PUNCH,
        tried.map(|left_bytes| format!("{left_bytes} bytes left of {PAGE_SIZE}")),
        "Migrated pages would keep their system memory",
        "Allow fallocate in the container's seccomp profile",
    )
}

fn procmap_query() -> Item {
    let tried = Window::anonymous(PAGE_SIZE).and_then(|window| {
        let maps = procmap::open_own_maps()?;
        procmap::query(maps.as_fd(), window.addr())
    });
    let consequence = "Drivers cannot learn the protection of client memory at fault time";
    Item::tried("PROCMAP_QUERY", tried.map(|vma| found(vma.is_some())), consequence, "Use Linux 6.11 or newer")
}

fn pagemap_scan() -> Item {
    let tried = Window::anonymous(PAGE_SIZE).and_then(|window| {
        window.store_u8(0, 1)?;
        let pagemap = pagemap::open_own_pagemap()?;
        pagemap::scan(pagemap.as_fd(), window.range(), Categories::PRESENT)
    });
    let consequence = "Private regions are copied in full when adopted, zero pages included";
    Item::tried("PAGEMAP_SCAN", tried.map(|runs| found(!runs.is_empty())), consequence, "Use Linux 6.7 or newer")
}

fn guards() -> Item {
    if pagemap::tells_guards() {
        return Item::yes("guards in PAGEMAP_SCAN", "told");
    }
    let consequence =
        "A device may use pages that are under a guard (MADV_GUARD_INSTALL), and coming home they take its place";
    Item::lacking("guards in PAGEMAP_SCAN", Status::Partly, "not told", consequence, "Use Linux 6.15 or newer")
}

fn process_vm() -> Item {
    // The child we can always look at is this process itself; what Yama allows for others is a setting.
    let window = match Window::anonymous(PAGE_SIZE) {
        Ok(window) => window,
        Err(error) => return Item::lacking("process_vm_readv", Status::No, error.to_string(), "", ""),
    };
    let consequence = "Tests and tools that look into clients do not work; services do not need it";
    let fix = "sysctl kernel.yama.ptrace_scope=0";
    let mut byte = [0u8; 1];
    if let Err(error) = process::vm_read(std::process::id(), window.addr(), &mut byte) {
        return Item::lacking("process_vm_readv", Status::No, error.to_string(), consequence, fix);
    }
    match setting("/proc/sys/kernel/yama/ptrace_scope").as_deref() {
        None => Item::yes("process_vm_readv", "no Yama"),
        Some("0") => Item::yes("process_vm_readv", "Yama scope 0"),
        Some(scope) => {
            let detail = format!("Yama scope {scope}");
            Item::lacking("process_vm_readv", Status::Partly, detail, consequence, fix)
        }
    }
}

fn pidfd() -> Item {
    let tried = process::PidFd::open(std::process::id()).and_then(|pidfd| pidfd.exited());
    let consequence = "Deaths of clients and services are not noticed";
    Item::tried(NAME_PIDFD, tried.map(|_| "open and poll".to_string()), consequence, "Use Linux 5.3 or newer")
}

fn peer_pidfd() -> Item {
    let tried = SeqPacket::pair()
        .map_err(|error| std::io::Error::other(error.to_string()))
        .and_then(|(one, _other)| process::peer_pidfd(one.as_fd()).map(|_| "by the socket".to_string()));
    match tried {
        Ok(detail) => Item::yes("SO_PEERPIDFD", detail),
        Err(error) => Item::lacking(
            "SO_PEERPIDFD",
            Status::Partly,
            format!("{error}; falls back to SO_PEERCRED"),
            "A client that dies while connecting may be mistaken for another process",
            "Use Linux 6.5 or newer",
        ),
    }
}

/// Below this, the pager cannot lock its code, directories and staging memory.
const WANTED_MEMLOCK_BYTES: u64 = 64 << 20;

fn agent() -> Item {
    let tried = (|| {
        let staging = memfd::create_sealed("uhmm-probe", crate::agent::STAGING_BYTES)?;
        let orders = memfd::create_sealed("uhmm-probe", crate::agent::ORDERS_BYTES)?;
        let mut seat = crate::agent::AgentSeat::new(staging.as_fd(), orders.as_fd())?;
        let files = crate::agent::AgentFiles {
            uffd: memfd::try_clone(staging.as_fd())?,
            pagemap: pagemap::open_own_pagemap()?,
            maps: procmap::open_own_maps()?,
            mem: None,
            done: crate::EventFd::new()?.into_fd(),
        };
        let agent = seat.start(&files, 0, false)?;
        seat.close(Some(&agent), None);
        agent.reap();
        Ok::<_, crate::HookError>("a process of its own".to_string())
    })();
    let consequence = "The agent is a thread of its program: it shares the program's filters and its death";
    let fix = match &tried {
        Err(error) if error.errno() == Some(libc::EAGAIN) => "Raise the limit of processes (pids.max, ulimit -u)",
        _ => "Allow clone(CLONE_VM) in the container's seccomp profile",
    };
    Item::tried("agent", tried, consequence, fix)
}

fn memlock() -> Item {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    match limit {
        None => Item::yes("memlock limit", "unlimited"),
        Some(bytes) if bytes >= WANTED_MEMLOCK_BYTES => Item::yes("memlock limit", format!("{bytes} bytes")),
        Some(bytes) => Item::lacking(
            "memlock limit",
            Status::Partly,
            format!("{bytes} bytes"),
            "The pager can be swapped out, which makes faults slow (root is not limited)",
            "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit",
        ),
    }
}

fn huge_pages() -> Item {
    let consequence = "Private regions move in base pages: about a third of the speed";
    let fix = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled";
    chosen_setting("huge pages (private)", "/sys/kernel/mm/transparent_hugepage/enabled", consequence, fix)
}

fn shmem_huge_pages() -> Item {
    let consequence = "Shared regions move in base pages: about a third of the speed";
    let fix = "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled";
    chosen_setting("huge pages (shared)", "/sys/kernel/mm/transparent_hugepage/shmem_enabled", consequence, fix)
}

fn chosen_setting(name: &'static str, path: &str, consequence: &'static str, fix: &'static str) -> Item {
    let text = setting(path);
    match text.as_deref().and_then(bracketed) {
        None => Item::lacking(name, Status::No, "not in this kernel", consequence, ""),
        Some(value @ ("never" | "deny")) => Item::lacking(name, Status::Partly, value, consequence, fix),
        Some(value) => Item::yes(name, value),
    }
}

fn cgroup() -> Item {
    let usage =
        process::memcg_usage_bytes().map_or("usage not readable".to_string(), |bytes| format!("{bytes} bytes used"));
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    match cgroup_version(&own) {
        Some(2) => Item::yes("cgroup", format!("version 2, {usage}")),
        Some(version) => Item::yes("cgroup", format!("version {version} (memory controller), {usage}")),
        None => Item::lacking("cgroup", Status::Partly, "none", "Memory is not accounted per client", ""),
    }
}

fn cgroup_version(own_cgroups: &str) -> Option<u32> {
    let controllers = |line: &str| line.split(':').nth(1).map(str::to_string);
    let all: Vec<String> = own_cgroups.lines().filter_map(controllers).collect();
    if all.iter().any(|list| list.split(',').any(|name| name == "memory")) {
        return Some(1);
    }
    all.iter().any(String::is_empty).then_some(2)
}

fn found(yes: bool) -> String {
    if yes { "answers".to_string() } else { "answers, but found nothing".to_string() }
}

fn setting(path: &str) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_string())
}

/// The chosen word of a setting such as `always [madvise] never`.
fn bracketed(text: &str) -> Option<&str> {
    Some(text.split_once('[')?.1.split_once(']')?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_and_cgroups_parse() {
        assert_eq!(bracketed("always [madvise] never"), Some("madvise"));
        assert_eq!(bracketed("0"), None);
        assert_eq!(cgroup_version("0::/x\n"), Some(2));
        assert_eq!(cgroup_version("4:memory:/\n0::/\n"), Some(1));
        assert_eq!(cgroup_version(""), None);
    }

    #[test]
    fn features_that_migration_needs_decide() {
        assert_eq!(features(Features::all()).status, Status::Yes);
        assert_eq!(features(Features::all() - Features::MOVE).status, Status::Partly);
        assert_eq!(features(Features::all() - Features::MINOR_SHMEM).status, Status::No);
        assert!(features(Features::all() - Features::MOVE).detail.ends_with("missing MOVE"));
    }

    #[test]
    fn one_required_item_that_fails_makes_the_place_unusable() {
        let mut probe =
            Probe { kernel_release: String::new(), uid: 0, uffd_features: Features::all(), items: Vec::new() };
        probe.items.push(Item::yes(NAME_MEMFD, "seals"));
        probe.items.push(Item::lacking("PROCMAP_QUERY", Status::No, "ENOTTY", "so", "fix"));
        assert!(probe.usable());
        probe.items.push(Item::lacking(NAME_PUNCH, Status::No, "EPERM", "so", "fix"));
        assert!(!probe.usable());
    }

    #[test]
    fn what_is_lacking_names_its_consequence() {
        let probe = Probe::run();
        assert!(probe.kernel_release.contains('.'));
        assert!(probe.item(NAME_MEMFD).is_some_and(|item| item.status == Status::Yes));
        for item in &probe.items {
            assert!(!item.detail.is_empty(), "{item:?}");
            assert_eq!(item.status == Status::Yes, item.consequence.is_empty(), "{item:?}");
        }
    }
}
