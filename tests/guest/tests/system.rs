//! The whole system inside the guest: services, drivers, clients and drills of an ordinary user who has /dev/vfio/N and no more.
//!
//! ```text
//!   uhmm up (manifest with every device of the guest) <-- uhmm conformance, one process a case
//!   uhmm demo (starts its own), kill -9 of each service in the middle of work
//! ```
//! `tests/guest/run --full` passes every case; otherwise a selection that meets each mechanism once, without
//! the tests that end in `_full`.

use std::fs;
use std::path::PathBuf;

use uhmm_guest::devices::{EDU, IVSHMEM, NVME, vfio_devices};
use uhmm_guest::running::{BlockServer, System, uhmm};

/// A manifest of these devices: driver, and what is said about each.
fn manifest(name: &str, devices: &[(&str, String)]) -> PathBuf {
    let restart = "restart = { backoff_min_ms = 1, max_deaths = 50 }";
    // Software emulation and busy machines: a heartbeat may take its time.
    let mut text = format!(
        "fault_injection = true\n[supervisor]\nheartbeat_ms = 1000\nmissed_limit = 30\n\
         [[service]]\nname = \"pager\"\nkind = \"pager\"\n{restart}\n\
         [[service]]\nname = \"mirror\"\nkind = \"mirror\"\n{restart}\n"
    );
    for (index, (driver, more)) in devices.iter().enumerate() {
        let first = devices.iter().position(|(other, _)| other == driver).unwrap();
        let name = format!("{driver}{}", index - first);
        text += &format!(
            "[[service]]\nname = \"{name}\"\nkind = \"driver\"\ndriver = \"{driver}\"\n{restart}\n\
             [[device]]\nname = \"{name}\"\nservice = \"{name}\"\n{more}\n"
        );
    }
    let path = PathBuf::from(format!("/tmp/{name}.toml"));
    fs::write(&path, text).unwrap();
    path
}

fn up(name: &str, devices: &[(&str, String)]) -> System {
    System::up(name, &manifest(name, devices))
}

/// All shared memory devices.
fn bars(more: &str) -> Vec<(&'static str, String)> {
    let devices = vfio_devices(IVSHMEM);
    assert_eq!(devices.len(), 2, "{devices:?}");
    devices.iter().map(|address| ("bar", format!("pci = \"{address}\"\n{more}"))).collect()
}

/// Text of this project's own is there in every checkout.
fn text() -> String {
    let path = "/tmp/text.md";
    fs::write(path, concat!(include_str!("../../../README.md"), include_str!("../../../ARCHITECTURE.md"))).unwrap();
    path.to_owned()
}

fn demo(name: &str, devices: &[(&str, String)], device: &str) {
    let manifest = manifest(name, devices);
    uhmm(&["demo", &text(), "--index-mib", "1", "--manifest", manifest.to_str().unwrap(), "--device", device]);
}

#[test]
#[ignore = "runs in the guest: tests/guest/run system"]
fn doctor_says_that_it_works_here() {
    uhmm(&["doctor"]);
}

#[test]
#[ignore = "runs in the guest: tests/guest/run system"]
fn soft_conformance() {
    let device = || ("soft", "memory_bytes = \"32MiB\"".to_owned());
    up("soft", &[device(), device()]).conformance("soft");
}

#[test]
#[ignore = "runs in the guest: tests/guest/run system"]
fn soft_demo() {
    demo("soft-demo", &[("soft", "memory_bytes = \"64MiB\"".to_owned())], "soft0");
}

/// Coherent devices pass the cases of other devices too, with memory that was adopted.
#[test]
#[ignore = "runs in the guest: tests/guest/run system"]
fn bar_conformance() {
    up("bar", &bars("memory_bytes = \"32MiB\"\ncoherent = true")).conformance("bar");
}

/// The namespace, whatever it holds: the guest's disk is new at each boot. What it reaches by DMA must fit into the account's 8 MiB of
/// locked memory.
fn nvme(more: &str) -> Vec<(&'static str, String)> {
    let devices = vfio_devices(NVME);
    assert_eq!(devices.len(), 1, "{devices:?}");
    devices
        .iter()
        .map(|address| ("nvme", format!("pci = \"{address}\"\nformat = true\nstaging_bytes = \"4MiB\"\n{more}")))
        .collect()
}

#[test]
#[ignore = "runs in the guest: tests/guest/run system"]
fn nvme_conformance() {
    up("nvme", &nvme("memory_bytes = \"32MiB\"")).conformance("nvme");
}

/// Far memory on a partition: the same blocks, by an ordinary kernel driver.
#[test]
#[ignore = "runs in the guest: tests/guest/run system"]
fn file_conformance() {
    let disk = || ("file", "path = \"/dev/ram0\"\nformat = true\nmemory_bytes = \"32MiB\"".to_owned());
    up("file", &[disk()]).conformance("file");
}

/// And on a block server.
#[test]
#[ignore = "runs in the guest: tests/guest/run system"]
fn nbd_conformance() {
    let server = BlockServer::start();
    let url = format!("url = \"nbd+unix:///?socket={}\"\nmemory_bytes = \"32MiB\"", server.socket());
    up("nbd", &[("nbd", url)]).conformance("nbd");
}

/// Each load of a kernel that follows pointers is a read of the disk: minutes in software emulation.
#[test]
#[ignore = "runs in the guest: tests/guest/run system --full"]
fn nvme_demo_full() {
    demo("nvme-demo", &nvme(""), "nvme0");
}

/// Both teaching devices: one page of memory each, reached at 2 KiB in 100 ms. What takes more than a page is not applicable.
fn edus() -> Vec<(&'static str, String)> {
    let devices = vfio_devices(EDU);
    assert_eq!(devices.len(), 2, "{devices:?}");
    devices
        .iter()
        .map(|address| ("edu", format!("pci = \"{address}\"\nworkers = 1\nstaging_bytes = \"2MiB\"")))
        .collect()
}

#[test]
#[ignore = "runs in the guest: tests/guest/run system"]
fn edu_conformance() {
    up("edu", &edus()).conformance("edu");
}

/// One system of all the guest's devices; a program's pages on each of them in turn.
#[test]
#[ignore = "runs in the guest: tests/guest/run system"]
fn all_drivers_at_once() {
    let mut devices = bars("");
    devices.extend(nvme(""));
    devices.extend(edus());
    devices.push(("soft", "memory_bytes = \"32MiB\"".to_owned()));
    let system = up("all", &devices);
    for driver in ["bar", "nvme", "edu", "soft"] {
        system.cases(driver, "^(T01_open_close|T04_anon_write|T12_migrate|T14_migrate_fault|K08_.*|IGT.once.malloc)$");
    }
}

#[test]
#[ignore = "runs in the guest: tests/guest/run system"]
fn bar_demo() {
    demo("bar-demo", &bars(""), "bar0");
}
