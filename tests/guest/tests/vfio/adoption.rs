//! A driver is killed while its device writes memory; the next incarnation goes on, and the device was not reset.
//!
//! ```text
//!   test (vault)                                   guest-victim (driver)
//!     |  spawn, a socket is its stdin ----------->   opens edu, maps two pages, starts a DMA to the first
//!     | <----------- container, device, page fds --  waits to be killed
//!     |  kill -9, wait
//!   adopts in a process of its own mm: takes the first mapping over, the second goes
//! ```

use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use uhmm_driver_edu::hardware::{Direction, Edu};
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::{RecvStatus, SeqPacket};
use uhmm_pci::{DmaMapping, DmaMemory, DmaRight, PciDevice, PciError, PciPath};

use uhmm_guest::victim::{KEPT_IOVA, SCRATCH, STALE_IOVA};

use crate::common::{EDU, address, all, open};

const ROUNDS: u8 = 12;

/// What the vault has after the driver's death.
struct Vault {
    kept: Vec<(String, Fd)>,
    queue: DmaMemory,
    stale: DmaMemory,
}

fn kill_a_driver_during_dma(byte: u8) -> Vault {
    let (socket, theirs) = SeqPacket::pair().unwrap();
    let mut child = Command::new("/helpers/guest-victim")
        .args([address(EDU).to_string(), byte.to_string()])
        .stdin(Stdio::from(theirs.into_fd()))
        .spawn()
        .unwrap();
    let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&limit)).unwrap(), 1, "the child says something");
    let mut fds: Vec<OwnedFd> = Vec::new();
    let status = socket.recv(&mut [0; 16], &mut fds, 4).unwrap();
    assert!(matches!(status, RecvStatus::Message { len: 7, .. }), "{status:?}");
    child.kill().unwrap();
    child.wait().unwrap();
    let mut fds = fds.into_iter().map(Arc::new);
    let mut next = || fds.next().unwrap();
    let kept = vec![("driver/pci-container".to_owned(), next()), ("driver/pci-device".to_owned(), next())];
    let (queue, stale) = (DmaMemory::adopt(next(), 4096).unwrap(), DmaMemory::adopt(next(), 4096).unwrap());
    Vault { kept, queue, stale }
}

fn adopt(vault: &Vault) -> (PciDevice, Edu, DmaMapping) {
    let device = uhmm_pci::open(&PciPath::Vfio(address(EDU)), &vault.kept).unwrap();
    assert!(device.is_adopted());
    let queue = device.adopt_dma(KEPT_IOVA, &vault.queue, DmaRight::ReadWrite).unwrap();
    device.finish_adoption().unwrap();
    let edu = Edu::new(&device).unwrap();
    device.allow_dma().unwrap();
    (device, edu, queue)
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn dma_in_flight_ends_in_the_vaults_memory_and_the_device_goes_on_without_a_reset() {
    let mut in_flight_rounds = 0;
    for round in 1..=ROUNDS {
        let vault = kill_a_driver_during_dma(round);
        let (device, edu, queue) = adopt(&vault);
        in_flight_rounds += u32::from(edu.is_busy().unwrap());
        edu.finish().unwrap();
        assert!(all(&vault.queue, 0..2048, round), "the DMA of the dead driver arrived");
        assert_eq!(edu.scratch().unwrap(), SCRATCH, "no reset");

        // The device's memory is what it was, and the adopted mapping works on.
        queue.window().fill(0, 4096, 0).unwrap();
        edu.transfer(Direction::ToMemory, queue.iova(0), 0, 2048).unwrap();
        assert!(all(&vault.queue, 0..2048, round));

        // What nobody adopted is out of reach.
        edu.transfer(Direction::ToMemory, STALE_IOVA, 0, 2048).unwrap();
        assert!(all(&vault.stale, 0..4096, 0), "the dead driver's other page is not written any more");

        drop(queue);
        vault.queue.window.fill(0, 4096, 0x77).unwrap();
        edu.transfer(Direction::ToMemory, KEPT_IOVA, 0, 2048).unwrap();
        assert!(all(&vault.queue, 0..4096, 0x77), "an adopted mapping ends like any other");
        drop((edu, device, vault));
    }
    println!("{in_flight_rounds} of {ROUNDS} adoptions found the DMA still in flight");
    assert!(in_flight_rounds > 0, "no round was fast enough to say anything");
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn adoption_can_be_repeated_and_what_does_not_fit_is_refused() {
    let vault = kill_a_driver_during_dma(5);
    for _ in 0..3 {
        let device = uhmm_pci::open(&PciPath::Vfio(address(EDU)), &vault.kept).unwrap();
        // Nothing is mapped exactly there; the queue's mapping is not hurt by the attempt.
        let wrong = device.adopt_dma(KEPT_IOVA + 4096, &vault.queue, DmaRight::ReadWrite);
        assert!(matches!(wrong, Err(PciError::Map { .. })));
        let queue = device.adopt_dma(KEPT_IOVA, &vault.queue, DmaRight::ReadWrite).unwrap();
        // As a process that is killed does.
        std::mem::forget(queue);
    }
    let (_device, edu, _queue) = adopt(&vault);
    edu.finish().unwrap();
    assert!(all(&vault.queue, 0..2048, 5));
}

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn while_the_vault_holds_the_device_nobody_else_gets_it_and_afterwards_everybody() {
    let vault = kill_a_driver_during_dma(6);
    assert!(uhmm_pci::open(&PciPath::Vfio(address(EDU)), &[]).is_err());
    let (device, edu, _queue) = adopt(&vault);
    edu.finish().unwrap();
    drop((device, edu, _queue, vault));
    let fresh = open(EDU);
    assert!(!fresh.is_adopted());
    assert_eq!(Edu::new(&fresh).unwrap().factorial(4).unwrap(), 24);
}
