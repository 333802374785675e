//! The NVMe driver is killed while it transfers, over vfio-user against the model: on this machine, without a guest. `guest-tier` is
//! the driver (see `tier.rs`), this process is the vault and plays the device.

use std::process::{Command, Stdio};
use std::time::Duration;

use uhmm_driver_nvme::shell::{Controller, DMA_NAME, Options};
use uhmm_guest::tier::{receive, send};
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::SeqPacket;
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

/// One driver that is killed: what the vault has then, and whether it had adopted the controller.
fn killed(path: &str, round: u64, kept: &[(String, Fd)]) -> (Vec<(String, Fd)>, bool) {
    let (socket, theirs) = SeqPacket::pair().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_guest-tier"))
        .args([path, &round.to_string()])
        .stdin(Stdio::from(theirs.into_fd()))
        .spawn()
        .unwrap();
    send(&socket, "open", kept).unwrap();
    let (word, kept) = receive(&socket).unwrap();
    // The kill is to come anywhere in its transfers; there is no event to wait for.
    std::thread::sleep(Duration::from_micros(round * 7919 % 20_000));
    child.kill().unwrap();
    child.wait().unwrap();
    (kept, word == "adopted")
}

#[test]
fn integration_nvme_fifty_killed_drivers_over_vfio_user_are_followed_by_ones_that_adopt_the_controller() {
    let folder = tempfile::tempdir().unwrap();
    let (path, control) = device(&folder);
    let (mut kept, adopted) = killed(&path, 0, &[]);
    assert!(!adopted);
    for round in 1..=ROUNDS {
        // Some die with commands in flight that the device has not even begun.
        control.set_latency(Duration::from_micros(100 * (round % 4)));
        // Each compares what the last one wrote.
        let (next, adopted) = killed(&path, round, &kept);
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
