//! Coherent device memory: the program and the device use the same frames at once, and no write is lost when pages come and go.

use std::sync::atomic::{AtomicBool, Ordering};

use uhmm_sdk::{Residency, Session, SnapshotPage, Target};
use uhmm_tests::{TestBed, manifest};

const PAGE: u64 = 4096;
const PAGES: u64 = 600;

fn is_there(session: &Session, addr: u64, device: u8) -> bool {
    let runs = session.residency(addr, PAGES * PAGE).expect("residency");
    runs.iter().all(|run| run.residency == Residency::Device(device) && run.coherent)
}

#[test]
fn integration_coherent_memory_is_the_programs_and_the_devices_at_once() {
    let bed = TestBed::with_manifest(&manifest("16MiB", "coherent = true"));
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    assert!(device.info().coherent);
    let region = session.allocate(PAGES * PAGE).expect("region");
    (0..PAGES).for_each(|page| region.write_u64(page * PAGE, page).expect("write"));
    session.migrate(region.addr(), region.len_bytes(), &device).expect("migrate");
    // The first access may still wait for the mapping; after it there is no fault any more.
    assert_eq!(region.read_u64((PAGES - 1) * PAGE).expect("read"), PAGES - 1);
    assert_eq!(region.read_u64(0).expect("read"), 0);
    let faults = bed.metric("pager", "cpu_faults");
    for page in 0..PAGES {
        assert_eq!(region.read_u64(page * PAGE).expect("read"), page);
        region.write_u64(page * PAGE + 8, page + 1).expect("write");
    }
    assert_eq!(bed.metric("pager", "cpu_faults"), faults, "the program has faulted on memory that it reaches");
    assert!(is_there(&session, region.addr(), device.id()));
    let mut seen = vec![0; region.len_bytes() as usize];
    device.read(region.addr(), &mut seen).expect("device read");
    let word = |at: u64| u64::from_ne_bytes(seen[at as usize..at as usize + 8].try_into().expect("eight bytes"));
    assert!((0..PAGES).all(|page| (word(page * PAGE), word(page * PAGE + 8)) == (page, page + 1)));
    device.write(region.addr(), &vec![7; region.len_bytes() as usize]).expect("device write");
    assert_eq!(region.read_u64(100 * PAGE).expect("read"), 0x0707_0707_0707_0707);
    let snapshot = session.snapshot(&device, region.addr(), PAGE).expect("snapshot");
    assert_eq!(snapshot[0].bits(), SnapshotPage::COHERENT_LOCAL.bits() | SnapshotPage::WRITE.bits());
    assert_eq!(region.populated_bytes().expect("populated"), 0, "no system memory is behind pages on the device");
    session.pin(region.addr(), PAGE).expect("pin");
    assert_eq!(session.snapshot(&device, region.addr(), PAGE).expect("snapshot")[0], SnapshotPage::WRITE);
    assert_eq!(region.read_u64(8).expect("read"), 0x0707_0707_0707_0707);
}

/// Threads count in every page while all of it goes out and home, and while the services are killed.
#[test]
fn integration_coherent_memory_loses_no_write_while_it_moves() {
    const THREADS: u64 = 3;
    let bed = TestBed::with_manifest(&manifest("16MiB", "coherent = true"));
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    let region = session.allocate(PAGES * PAGE).expect("region");
    let stop = AtomicBool::new(false);
    let count = |thread: u64| {
        let mut count = 0u64;
        while !stop.load(Ordering::Relaxed) {
            let page = (count * 7 + thread * 31) % PAGES;
            let word = region.bytes().atomic_u64(page * PAGE + 8 * thread).expect("a word of the region");
            word.fetch_add(1, Ordering::Relaxed);
            count += 1;
        }
        count
    };
    let counts: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn({
                    let count = &count;
                    move || count(thread)
                })
            })
            .collect();
        for round in 0..32 {
            let target = if round % 2 == 0 { device.target() } else { Target::Home };
            let moving = session.migrate_async(region.addr(), region.len_bytes(), target).expect("migrate");
            // In the middle of it, as far as it goes.
            match round {
                7 | 12 | 16 | 21 => _ = bed.kill("pager"),
                10 | 23 => _ = bed.kill("soft0"),
                _ => {}
            }
            moving.wait().expect("migrated");
        }
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|thread| thread.join().expect("the thread counts")).collect()
    });
    for (thread, count) in (0..THREADS).zip(counts) {
        let words = (0..PAGES).map(|page| region.read_u64(page * PAGE + 8 * thread).expect("read"));
        assert_eq!(words.sum::<u64>(), count, "thread {thread}");
    }
}
