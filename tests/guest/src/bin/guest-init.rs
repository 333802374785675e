//! Pid 1 of the guest: makes the devices available to an ordinary user, runs every suite as that user (one as root), reports, powers off.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::system::{RebootCommand, finit_module, reboot};
use uhmm_guest::devices::{EDU, IVSHMEM, NVME};
use uhmm_guest::records::{Record, TestRecord};
use uhmm_guest::wait::wait_or_kill;

/// In this order: each needs those before it.
const MODULES: [&str; 5] = ["irqbypass", "vfio", "vfio_iommu_type1", "vfio-pci-core", "vfio-pci"];
/// Comes before all others where the guest was started with it.
const IOMMUFD: &str = "iommufd";
/// `finit_module` flag: the kernel decompresses the file itself (Debian's modules are, those that were built here are not).
const MODULE_INIT_COMPRESSED_FILE: i32 = 4;
/// All are given to the suites.
const DEVICES: [(&str, &str); 3] = [EDU, IVSHMEM, NVME];
/// How many devices the guest has, each with a driver.
const DRIVERS: u64 = 5;
/// Who runs the suites, but one: containers are made by root.
const USER: u32 = 1000;
const SUITE_OF_ROOT: &str = "containers";
const TEST_LIMIT: Duration = Duration::from_secs(300);
/// When every conformance case is passed.
const FULL_TEST_LIMIT: Duration = Duration::from_secs(7200);
/// The table of a whole conformance run, and what services say meanwhile.
const LOG_LIMIT_BYTES: usize = 256 << 10;

fn main() {
    if std::process::id() != 1 {
        eprintln!("guest-init is the init program of the test guest: run tests/guest/run");
        std::process::exit(2);
    }
    if let Err(error) = run() {
        eprintln!("guest-init: {error:#}");
    }
    // A return of pid 1 would be a kernel panic; with -no-reboot a restart ends QEMU.
    if let Err(error) = reboot(RebootCommand::Restart) {
        eprintln!("guest-init: cannot power off: {error}");
    }
}

fn run() -> Result<()> {
    for (kind, place) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/tmp")] {
        mount(kind, place, kind, MountFlags::empty(), None).with_context(|| format!("Mount {place}"))?;
    }
    fs::set_permissions("/tmp", fs::Permissions::from_mode(0o1777))?;
    // For containers.
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", MountFlags::empty(), None).context("Mount /sys/fs/cgroup")?;
    let mut results = OpenOptions::new().write(true).open("/dev/ttyS1").context("Open the results line")?;
    let mut end = match prepare().and_then(|()| run_suites(&mut results)) {
        Ok(()) => Record::End,
        Err(error) => Record::Broken { why: format!("{error:#}") },
    };
    say(&mut results, &mut end)?;
    rustix::termios::tcdrain(&results).context("Drain the results line")
}

fn say(results: &mut File, record: &mut Record) -> Result<()> {
    let line = serde_json::to_string(record)?;
    writeln!(results, "{line}").context("Write a result")
}

/// Modules, devices bound to vfio-pci, their groups given to the user.
fn prepare() -> Result<()> {
    let first = iommufd().then_some(IOMMUFD);
    for name in first.into_iter().chain(MODULES) {
        load(name).with_context(|| format!("Load module {name}"))?;
    }
    if iommufd() {
        give(Path::new("/dev/iommu"))?;
        raise_locked_memory().context("Raise RLIMIT_MEMLOCK")?;
    }
    make_disk()?;
    give_devices()?;
    // Suites take devices away, as an operator may.
    Ok(fs::set_permissions("/sys/bus/pci/drivers/vfio-pci/unbind", fs::Permissions::from_mode(0o222))?)
}

/// A disk that is memory, for the driver `file`.
fn make_disk() -> Result<()> {
    load_with("brd", c"rd_nr=1 rd_size=65536").context("Load module brd")?;
    give(Path::new("/dev/ram0"))
}

fn load(name: &str) -> Result<()> {
    load_with(name, c"")
}

fn load_with(name: &str, parameters: &CStr) -> Result<()> {
    let (plain, compressed) = (format!("/modules/{name}.ko"), format!("/modules/{name}.ko.xz"));
    let (path, flags) = if Path::new(&plain).exists() { (plain, 0) } else { (compressed, MODULE_INIT_COMPRESSED_FILE) };
    Ok(finit_module(&File::open(path)?, parameters, flags)?)
}

/// iommufd counts locked memory for the user: all drivers of the guest share what each has for itself without.
fn raise_locked_memory() -> Result<()> {
    let each = getrlimit(Resource::Memlock).current.context("There is no limit to raise")?;
    let all = Some(each * DRIVERS);
    Ok(setrlimit(Resource::Memlock, Rlimit { current: all, maximum: all })?)
}

fn give(node: &Path) -> Result<()> {
    chown(node, Some(USER), Some(USER)).with_context(|| format!("Give {} to the user", node.display()))
}

/// Binds every device that no suite has bound to vfio-pci any more, and gives its group, and its own file if there is one, to the user.
fn give_devices() -> Result<()> {
    for device in fs::read_dir("/sys/bus/pci/devices")? {
        let device = device?;
        let word = |name| fs::read_to_string(device.path().join(name)).map(|text| text.trim().to_owned());
        let (vendor, id) = (word("vendor")?, word("device")?);
        if !DEVICES.contains(&(vendor.as_str(), id.as_str())) {
            continue;
        }
        let address = device.file_name().into_string().ok().context("A PCI address is text")?;
        fs::write(device.path().join("driver_override"), "vfio-pci")?;
        if fs::read_link(device.path().join("driver")).is_ok_and(|driver| driver.ends_with("vfio-pci")) {
            continue;
        }
        // The kernel's own driver (nvme is built in) may have been faster.
        let bound = device.path().join("driver/unbind");
        if bound.exists() {
            fs::write(&bound, &address).with_context(|| format!("Take {address} from its driver"))?;
        }
        fs::write("/sys/bus/pci/drivers_probe", &address).with_context(|| format!("Bind {address} to vfio-pci"))?;
        let group = fs::read_link(device.path().join("iommu_group")).with_context(|| {
            format!("{address} has no IOMMU group: boot with intel_iommu=on and an intel-iommu device")
        })?;
        give(&Path::new("/dev/vfio").join(group.file_name().context("A group has a number")?))?;
        if iommufd() {
            let names = fs::read_dir(device.path().join("vfio-dev")).context("Find the device's file")?;
            for name in names {
                give(&Path::new("/dev/vfio/devices").join(name?.file_name()))?;
            }
        }
    }
    Ok(())
}

fn run_suites(results: &mut File) -> Result<()> {
    let mut suites: Vec<PathBuf> = fs::read_dir("/suites")?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    suites.sort();
    for suite in suites {
        let name = suite.file_name().and_then(|name| name.to_str()).context("A suite has a name")?.to_owned();
        for test in list(&suite).with_context(|| format!("List suite {name}"))? {
            give_devices()?;
            eprintln!("== {name} {test}");
            let record = run_test(&suite, &name, &test).with_context(|| format!("Run {name} {test}"))?;
            say(results, &mut Record::Test(record))?;
        }
    }
    Ok(())
}

fn suite(program: &Path) -> Command {
    let mut command = Command::new(program);
    if !program.ends_with(SUITE_OF_ROOT) {
        command.uid(USER).gid(USER);
    }
    command
        .current_dir("/tmp")
        .env_clear()
        .env("RUST_BACKTRACE", "0")
        .env("UHMM_EXE", "/helpers/uhmm")
        .stdin(Stdio::null());
    if full() {
        command.env("UHMM_FULL", "1");
    }
    if iommufd() {
        command.env("UHMM_IOMMUFD", "1");
    }
    command
}

/// `--full`, by way of the kernel's command line.
fn full() -> bool {
    told("uhmm.full")
}

/// `--iommufd`, likewise.
fn iommufd() -> bool {
    told("uhmm.iommufd")
}

fn told(wanted: &str) -> bool {
    words().iter().any(|word| word == wanted)
}

/// Of the kernel's command line.
fn words() -> Vec<String> {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    line.split_whitespace().map(str::to_owned).collect()
}

fn list(program: &Path) -> Result<Vec<String>> {
    let output = suite(program).args(["--list", "--ignored", "--format", "terse"]).output()?;
    ensure!(output.status.success(), "it ended with {}", output.status);
    let text = String::from_utf8(output.stdout)?;
    let tests = text.lines().filter_map(|line| line.strip_suffix(": test"));
    // Tests that say so in their name take longer than a usual run may, or are about iommufd alone.
    let runs = |test: &str| (full() || !test.ends_with("_full")) && (iommufd() || !test.ends_with("_iommufd"));
    let only = words().iter().find_map(|word| word.strip_prefix("uhmm.only=").map(str::to_owned)).unwrap_or_default();
    Ok(tests.filter(|test| runs(test) && test.contains(&only)).map(str::to_owned).collect())
}

/// One process a test: what one leaves open cannot hurt the next.
fn run_test(program: &Path, suite_name: &str, test: &str) -> Result<TestRecord> {
    let mut log = OpenOptions::new().read(true).write(true).create(true).truncate(true).open("/tmp/.log")?;
    let started = Instant::now();
    let mut child = suite(program)
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?)
        .spawn()?;
    let limit = if full() { FULL_TEST_LIMIT } else { TEST_LIMIT };
    let status = wait_or_kill(&mut child, limit)?;
    let time_ms = started.elapsed().as_millis() as u64;
    let mut text = Vec::new();
    log.rewind()?;
    log.read_to_end(&mut text)?;
    let mut log = shortened(&String::from_utf8_lossy(&text));
    match status {
        None => log += &format!("\nKilled: it ran longer than {} s", limit.as_secs()),
        Some(status) if !status.success() => log += &format!("\nIt ended with {status}"),
        Some(_) => {}
    }
    let passed = status.is_some_and(|status| status.success());
    Ok(TestRecord { suite: suite_name.to_owned(), name: test.to_owned(), passed, time_ms, log })
}

fn shortened(text: &str) -> String {
    if text.len() <= LOG_LIMIT_BYTES {
        return text.to_owned();
    }
    let head: String = text.chars().take(LOG_LIMIT_BYTES / 2).collect();
    let tail: Vec<char> = text.chars().rev().take(LOG_LIMIT_BYTES / 2).collect();
    let tail: String = tail.into_iter().rev().collect();
    format!("{head}\n[...]\n{tail}")
}
