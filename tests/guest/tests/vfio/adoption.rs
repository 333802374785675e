//! A driver is killed while its device writes memory; the next incarnation goes on, and the device was not reset.
//!
//! ```text
//!   test (vault)                                   guest-victim (driver)
//!     |  spawn, a socket is its stdin ----------->   opens edu, maps two pages, starts a DMA to the first
//!     | <----------- device's and page fds -------  waits to be killed
//!     |  kill -9, wait
//!   adopts in a process of its own mm: takes the first mapping over, the second goes
//! ```

use std::process::{Command, Stdio};

use uhmm_driver_edu::hardware::{Direction, Edu};
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::SeqPacket;
use uhmm_pci::{DmaMapping, DmaMemory, DmaRight, PciDevice, PciError, PciPath};

use uhmm_guest::tier::receive;
use uhmm_guest::victim::{KEPT_IOVA, QUEUE, SCRATCH, STALE, STALE_IOVA};

use crate::common::{EDU, address, all, fill_buffer, open};

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
    let (word, mut kept) = receive(&socket).unwrap();
    assert_eq!(word, "started");
    child.kill().unwrap();
    child.wait().unwrap();
    let mut page = |name: &str| {
        let at = kept.iter().position(|(kept, _)| kept == name).unwrap();
        DmaMemory::adopt(kept.remove(at).1, 4096).unwrap()
    };
    let (queue, stale) = (page(QUEUE), page(STALE));
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

#[test]
#[ignore = "runs in the guest: tests/guest/run vfio"]
fn a_part_of_a_mapping_is_not_taken_over_and_its_neighbours_go_alone() {
    let first = open(EDU);
    let (kept, base) = (first.kept(), KEPT_IOVA);
    let double = DmaMemory::create("guest-test", 8192).unwrap();
    let single = DmaMemory::create("guest-test", 4096).unwrap();
    for (iova, memory) in [(base, &single), (base + 4096, &double), (base + 3 * 4096, &single)] {
        std::mem::forget(first.map_dma_at(iova, memory, DmaRight::ReadWrite).unwrap());
    }
    // The descriptors of the vault are what counts; as a process that was killed, this one unmaps nothing.
    let kept: Vec<_> = kept.into_iter().collect();
    drop(first);

    let device = uhmm_pci::open(&PciPath::Vfio(address(EDU)), &kept).unwrap();
    for iova in [base + 4096, base + 2 * 4096] {
        let half = device.adopt_dma(iova, &single, DmaRight::ReadWrite);
        assert!(matches!(half, Err(PciError::Map { .. })), "half of a mapping");
    }
    let over = device.adopt_dma(base + 3 * 4096, &double, DmaRight::ReadWrite);
    assert!(matches!(over, Err(PciError::Map { .. })), "more than the mapping");
    let adopted = device.adopt_dma(base + 4096, &double, DmaRight::ReadWrite).unwrap();
    device.finish_adoption().unwrap();
    device.allow_dma().unwrap();

    let edu = Edu::new(&device).unwrap();
    fill_buffer(&device, &edu, 0x99);
    for page in 0..4 {
        edu.transfer(Direction::ToMemory, base + page * 4096, 0, 2048).unwrap();
    }
    assert!(all(&double, 0..2048, 0x99) && all(&double, 4096..6144, 0x99), "what was taken over is written");
    assert!(all(&single, 0..4096, 0), "its neighbours on both sides are out of reach");
    drop(adopted);
}

/// iommufd counts pinned pages for the user: those of a dead process too, until its mapping goes, and never twice.
#[test]
#[ignore = "runs in the guest: tests/guest/run --iommufd vfio"]
fn what_a_dead_process_has_mapped_counts_for_its_user_until_it_is_unmapped_iommufd() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current.expect("the user has a limit");
    let vault = kill_a_driver_during_dma(3);
    let device = uhmm_pci::open(&PciPath::Vfio(address(EDU)), &vault.kept).unwrap();
    // The dead driver's three pages are all that is missing.
    let nearly = DmaMemory::create("guest-test", (limit & !4095) - 2 * 4096).unwrap();
    let fits = |far: u64| device.map_dma_at(far, &nearly, DmaRight::ReadWrite);
    let error = fits(1 << 32).unwrap_err().to_string();
    assert!(error.contains("all processes of this user"), "{error}");
    let queue = device.adopt_dma(KEPT_IOVA, &vault.queue, DmaRight::ReadWrite).unwrap();
    device.finish_adoption().unwrap();
    drop(fits(1 << 32).unwrap());
    drop(queue);
    let whole = DmaMemory::create("guest-test", limit & !4095).unwrap();
    device.map_dma_at(1 << 32, &whole, DmaRight::ReadWrite).unwrap();
}
