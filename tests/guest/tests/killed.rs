//! The NVMe driver is killed while it transfers, over vfio-user against the model: on this machine, without a guest. `guest-tier` is
//! the driver (see `tier.rs`), this process is the vault and plays the device.

use std::time::Duration;

use uhmm_driver_nvme::shell::{Controller, DMA_NAME, Options};
use uhmm_guest::tier::killed;
use uhmm_models::nvme::{NvmeControl, NvmeModel, NvmeOptions};
use uhmm_models::{Machine, Server};

const ROUNDS: u64 = 50;

/// A device that plays as long as this process lives: its path, and the hand on it.
fn device(folder: &tempfile::TempDir) -> (String, NvmeControl) {
    let (model, control) = NvmeModel::new(NvmeOptions::default()).unwrap();
    let socket = folder.path().join("device.sock");
    let server = Server::bind(&socket, Machine::start(Box::new(model)).unwrap()).unwrap();
    std::thread::spawn(move || server.run().map(|never| match never {}));
    (format!("vfio-user:{}", socket.display()), control)
}

/// The driver's program.
const TIER: &str = env!("CARGO_BIN_EXE_guest-tier");

#[test]
fn integration_nvme_fifty_killed_drivers_over_vfio_user_are_followed_by_ones_that_adopt_the_controller() {
    let folder = tempfile::tempdir().unwrap();
    let (path, control) = device(&folder);
    let (mut kept, adopted) = killed(TIER, &path, 0, &[]).unwrap();
    assert!(!adopted);
    for round in 1..=ROUNDS {
        // Some die with commands in flight that the device has not even begun.
        control.set_latency(Duration::from_micros(100 * (round % 4)));
        // Each compares what the last one wrote.
        let (next, adopted) = killed(TIER, &path, round, &kept).unwrap();
        assert!(adopted, "round {round}: the controller was reset");
        kept = next;
    }
    let counters = control.counters();
    assert_eq!((counters.enables, counters.function_resets, counters.bad_doorbells), (1, 0, 0), "{counters:?}");
    let memory = kept.iter().find(|(name, _)| name == DMA_NAME).map(|(_, fd)| fd.clone());
    let device = uhmm_pci::open(&path.parse().unwrap(), &kept).unwrap();
    let controller = Controller::open(device, memory, Options::default()).unwrap();
    assert!(controller.is_adopted() && controller.counters().resets == 0);
}
