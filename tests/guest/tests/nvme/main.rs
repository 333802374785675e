//! The NVMe driver against QEMU's controller, behind VFIO, as an ordinary user.

mod floors;
mod raw;
mod speed;

use std::fs;

use uhmm_driver_kit::{CopyEngine, DeviceMemory, Frames, MemoryOrigin, PAGE_BYTES, Staging, StagingUse};
use uhmm_driver_nvme::cmb;
use uhmm_driver_nvme::engine::NvmeEngine;
use uhmm_driver_nvme::header::{Found, Header, State};
use uhmm_driver_nvme::machine::Request;
use uhmm_driver_nvme::namespace::Namespace;
use uhmm_driver_nvme::protocol::Opcode;
use uhmm_driver_nvme::shell::{Controller, DMA_NAME, Options};
use uhmm_guest::tier::{PATTERN_AT, PATTERN_FRAMES, check, fill, killed};
use uhmm_pci::{DmaMemory, DmaRight, PciDevice, PciPath};

const ROUNDS: u64 = 50;
/// The driver's program.
const TIER: &str = "/helpers/guest-tier";

/// The first NVMe controller.
pub fn path() -> PciPath {
    let mut found: Vec<String> = fs::read_dir("/sys/bus/pci/devices")
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| fs::read_to_string(entry.path().join("class")).unwrap().trim() == "0x010802")
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    found.sort();
    found[0].parse().unwrap()
}

/// It, open.
pub fn device() -> PciDevice {
    uhmm_pci::open(&path(), &[]).unwrap()
}

/// A copy engine with the pager's staging area.
pub fn engine(namespace: &Namespace, staging_bytes: u64) -> (NvmeEngine, Staging) {
    let staging = Staging::create(StagingUse::Pager, staging_bytes).unwrap();
    let mut engine = NvmeEngine::new(namespace.clone());
    engine.attach(&staging).unwrap();
    (engine, staging)
}

#[test]
#[ignore = "runs in the guest: tests/guest/run nvme"]
fn a_real_controller_comes_up_and_brings_every_byte_back() {
    let controller = Controller::open(device(), None, Options::default()).unwrap();
    let identity = controller.identity().unwrap();
    assert_eq!((identity.controller.serial.as_str(), identity.namespace.block_shift), ("uhmm0", 9));
    assert_eq!(controller.pairs(), 2);
    let (namespace, origin) = Namespace::open(controller.clone(), u64::MAX, true).unwrap();
    assert_eq!(origin, MemoryOrigin::Created);
    let (mut engine, staging) = engine(&namespace, 2 << 20);
    for (first, count) in [(0, 1), (1, 2), (100, 33), (1000, 256)] {
        fill(&staging.window, u64::from(count), u64::from(first)).unwrap();
        engine.copy_in(&staging, 0, Frames { first, count }).unwrap();
        staging.window.fill(0, u64::from(count) * PAGE_BYTES, 0).unwrap();
        engine.copy_out(Frames { first, count }, &staging, 0).unwrap();
        check(&staging.window, u64::from(count), u64::from(first)).unwrap();
    }
    engine.scrub(Frames { first: 1000, count: 256 }).unwrap();
    engine.copy_out(Frames { first: 1000, count: 256 }, &staging, 0).unwrap();
    assert!(staging.window.compare(0, &vec![0; 256 << 12]).unwrap());
    let counters = controller.counters();
    assert_eq!((counters.resets, controller.last_report()), (1, None), "switched off once, before the start");
    println!("{} ({}), {counters:?}", identity.controller.model, namespace.frame_count());
}

#[test]
#[ignore = "runs in the guest: tests/guest/run nvme"]
fn fifty_killed_drivers_are_followed_by_ones_that_adopt_the_controller_without_a_reset() {
    let (mut kept, adopted) = killed(TIER, &path().to_string(), 0, &[]).unwrap();
    assert!(!adopted);
    for round in 1..=ROUNDS {
        let (next, adopted) = killed(TIER, &path().to_string(), round, &kept).unwrap();
        assert!(adopted, "round {round}: the controller was reset");
        kept = next;
    }
    let memory = kept.iter().find(|(name, _)| name == DMA_NAME).map(|(_, fd)| fd.clone());
    let controller = Controller::open(uhmm_pci::open(&path(), &kept).unwrap(), memory, Options::default()).unwrap();
    assert!(controller.is_adopted() && controller.counters().resets == 0);
    let (namespace, origin) = Namespace::open(controller, u64::MAX, false).unwrap();
    assert_eq!(origin, MemoryOrigin::Adopted);
    let (mut engine, staging) = engine(&namespace, 2 << 20);
    engine.copy_out(Frames { first: PATTERN_AT, count: PATTERN_FRAMES }, &staging, 0).unwrap();
    check(&staging.window, u64::from(PATTERN_FRAMES), ROUNDS).unwrap();
}

#[test]
#[ignore = "runs in the guest: tests/guest/run nvme"]
fn a_cold_start_finds_no_frames_of_an_earlier_life() {
    let (kept, _) = killed(TIER, &path().to_string(), 7, &[]).unwrap();
    // The whole system ends: nobody holds the device any more.
    drop(kept);
    let controller = Controller::open(device(), None, Options::default()).unwrap();
    let (namespace, origin) = Namespace::open(controller, u64::MAX, false).unwrap();
    assert_eq!(origin, MemoryOrigin::Created);
    let (mut engine, staging) = engine(&namespace, 2 << 20);
    engine.copy_out(Frames { first: PATTERN_AT, count: PATTERN_FRAMES }, &staging, 0).unwrap();
    assert!(staging.window.compare(0, &vec![0; 2 << 20]).unwrap());
}

#[test]
#[ignore = "runs in the guest: tests/guest/run nvme"]
fn a_namespace_that_was_given_back_says_so_and_begins_anew() {
    let controller = Controller::open(device(), None, Options::default()).unwrap();
    let (namespace, _) = Namespace::open(controller, u64::MAX, true).unwrap();
    let (mut first, staging) = engine(&namespace, 2 << 20);
    fill(&staging.window, 64, 3).unwrap();
    first.copy_in(&staging, 0, Frames { first: 0, count: 64 }).unwrap();
    namespace.release().unwrap();
    drop((first, namespace));
    let controller = Controller::open(device(), None, Options::default()).unwrap();
    // Blocks of 512 bytes: the first 4 KiB, past the driver.
    let page =
        controller.device().map_dma(&DmaMemory::create("page", PAGE_BYTES).unwrap(), DmaRight::ReadWrite, u64::MAX);
    let page = page.unwrap();
    controller.run([Request { opcode: Opcode::Read, lba: 0, blocks: 8, iova: page.iova(0), bytes: 4096 }]).unwrap();
    let mut begin = vec![0; PAGE_BYTES as usize];
    page.window().read(0, &mut begin).unwrap();
    let found = Found::decode(&begin);
    assert!(matches!(found, Found::Header(Header { state: State::Released, .. })), "{found:?}");
    let (namespace, origin) = Namespace::open(controller, u64::MAX, false).unwrap();
    assert_eq!(origin, MemoryOrigin::Created);
    let (mut second, staging) = engine(&namespace, 2 << 20);
    fill(&staging.window, 64, 1).unwrap();
    second.copy_out(Frames { first: 0, count: 64 }, &staging, 0).unwrap();
    assert!(staging.window.compare(0, &vec![0; 64 << 12]).unwrap());
}

#[test]
#[ignore = "runs in the guest: tests/guest/run nvme"]
fn the_controllers_own_buffer_is_device_memory_that_cpu_and_commands_reach() {
    let device = device();
    let (memory, origin) = cmb::open(device.clone(), &[], u64::MAX).unwrap();
    assert_eq!((origin, memory.frame_count()), (MemoryOrigin::Created, 16 * 256 - 1), "the last page has the mark");
    let controller = Controller::open(device, None, Options::default()).unwrap();
    let (namespace, _) = Namespace::open(controller, u64::MAX, true).unwrap();
    let (mut engine, staging) = engine(&namespace, 2 << 20);
    fill(&staging.window, 64, 3).unwrap();
    engine.copy_in(&staging, 0, Frames { first: 10, count: 64 }).unwrap();
    // Blocks to buffer, without the machine's memory in between.
    namespace.read(Frames { first: 10, count: 64 }, cmb::CMB_ADDRESS + (7 << 12)).unwrap();
    let at = (7 << 12) + 5 * 4096;
    assert_eq!(memory.window().load_u64(at).unwrap(), staging.window.load_u64(5 * 4096).unwrap());
    // And back: what the CPU wrote there is read by a command.
    memory.window().store_u64(at, 4711).unwrap();
    namespace.write(Frames { first: 100, count: 64 }, cmb::CMB_ADDRESS + (7 << 12)).unwrap();
    engine.copy_out(Frames { first: 105, count: 1 }, &staging, 0).unwrap();
    assert_eq!(staging.window.load_u64(0).unwrap(), 4711);
}
