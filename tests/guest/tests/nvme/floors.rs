//! What the guest's kernel needs for the steps of a migration: the least that any way of doing it costs here. Prints each step, and
//! holds the choice of staging areas that stay mapped for DMA against mapping the program's own pages for every transfer.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uhmm_kernel_hook::managed::ManagedMapping;
use uhmm_kernel_hook::uffd::{CopyMode, RegisterMode, Userfaultfd, WpOutcome};
use uhmm_kernel_hook::{AddrRange, Prot, Window, memfd};
use uhmm_pci::{DmaMemory, DmaRight};

const TOTAL_BYTES: u64 = 32 << 20;
const CHUNK_BYTES: u64 = 2 << 20;
const ROUNDS: usize = 5;
/// The emulated processor's TLB has one place for an address: where both sides of a copy have the same, a copy takes seven times as long. So
/// each round copies elsewhere, and the best one counts.
const SHIFT_BYTES: u64 = 37 << 12;

/// Microseconds a page, of one pass over all chunks.
fn each(steps: &mut Vec<(&'static str, f64)>, name: &'static str, mut act: impl FnMut(u64)) {
    let begun = Instant::now();
    (0..TOTAL_BYTES / CHUNK_BYTES).for_each(|chunk| act(chunk * CHUNK_BYTES));
    steps.push((name, micros_a_page(begun.elapsed())));
}

fn micros_a_page(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6 / (TOTAL_BYTES >> 12) as f64
}

#[test]
#[ignore = "runs in the guest: tests/guest/run nvme"]
fn copying_to_a_mapped_area_costs_no_more_than_mapping_pages_for_each_transfer() {
    let device = crate::device();
    let file = Arc::new(memfd::create_sealed("uhmm-floor", TOTAL_BYTES).unwrap());
    let managed = ManagedMapping::map(file.as_fd(), TOTAL_BYTES, None).unwrap();
    let staging_bytes = CHUNK_BYTES + ROUNDS as u64 * SHIFT_BYTES;
    let staging = memfd::create_sealed("uhmm-floor-staging", staging_bytes).unwrap();
    let staging = Window::map(staging.as_fd(), 0, staging_bytes, Prot::ReadWrite).unwrap();
    staging.fill(0, staging_bytes, 7).unwrap();
    let (uffd, _) = Userfaultfd::create(None).unwrap();
    uffd.api_best(Userfaultfd::supported_features().unwrap()).unwrap();
    uffd.register(AddrRange { start: managed.addr(), len: TOTAL_BYTES }, RegisterMode::all()).unwrap();
    let range = |at: u64| AddrRange { start: managed.addr() + at, len: CHUNK_BYTES };

    let mut rounds = Vec::new();
    for round in 0..ROUNDS as u64 {
        let shift = round * SHIFT_BYTES;
        let mut steps = Vec::new();
        each(&mut steps, "home: UFFDIO_COPY", |at| {
            assert!(
                uffd.copy(range(at).start, &staging, shift, CHUNK_BYTES, CopyMode::default()).unwrap().is_complete()
            );
        });
        each(&mut steps, "out: write-protect", |at| {
            assert_eq!(uffd.write_protect(range(at), true, false).unwrap(), WpOutcome::Done);
        });
        each(&mut steps, "out: copy to staging", |at| {
            memfd::read_to_window(file.as_fd(), at, &staging, shift, CHUNK_BYTES).unwrap();
        });
        each(&mut steps, "out: or map for DMA, and unmap", |at| {
            let window = Arc::new(Window::map(file.as_fd(), at, CHUNK_BYTES, Prot::ReadWrite).unwrap());
            let memory = DmaMemory { fd: file.clone(), offset_bytes: at, window };
            drop(device.map_dma(&memory, DmaRight::Read, u64::MAX).unwrap());
        });
        each(&mut steps, "out: punch", |at| memfd::punch_hole(file.as_fd(), at, CHUNK_BYTES).unwrap());
        each(&mut steps, "home: or allocate", |at| memfd::allocate(file.as_fd(), at, CHUNK_BYTES).unwrap());
        each(&mut steps, "home: ... map for DMA, and unmap", |at| {
            let window = Arc::new(Window::map(file.as_fd(), at, CHUNK_BYTES, Prot::ReadWrite).unwrap());
            let memory = DmaMemory { fd: file.clone(), offset_bytes: at, window };
            drop(device.map_dma(&memory, DmaRight::ReadWrite, u64::MAX).unwrap());
        });
        each(&mut steps, "home: ... UFFDIO_CONTINUE", |at| {
            assert!(uffd.cont(range(at), false, false).unwrap().is_complete())
        });
        each(&mut steps, "punch again", |at| memfd::punch_hole(file.as_fd(), at, CHUNK_BYTES).unwrap());
        rounds.push(steps);
    }
    let best = |name: &str| {
        let of = |steps: &Vec<(&str, f64)>| steps.iter().find(|step| step.0 == name).unwrap().1;
        rounds.iter().map(of).fold(f64::INFINITY, f64::min)
    };
    for (name, _) in &rounds[0] {
        let us = best(name);
        println!("{name}: {us:.2} us a page, {:.0} MiB/s", 1e6 / 256.0 / us);
    }
    let (copied, mapped) = (best("out: copy to staging"), best("out: or map for DMA, and unmap"));
    assert!(copied < 1.5 * mapped, "out: {copied:.2} us a page copied, {mapped:.2} us mapped");
    let ways = ["home: or allocate", "home: ... map for DMA, and unmap", "home: ... UFFDIO_CONTINUE"];
    let (copied, mapped) = (best("home: UFFDIO_COPY"), ways.map(best).iter().sum::<f64>());
    assert!(copied < mapped, "home: {copied:.2} us a page copied, {mapped:.2} us mapped");
}
