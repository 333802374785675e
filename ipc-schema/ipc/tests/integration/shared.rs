//! Device page table and gate with real threads.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use uhmm_ipc::shared::gate::{Gate, GateError};
use uhmm_ipc::shared::table::{Begin, Pte, Table};

/// One frame per generation; a frame is "freed" when its revocation is complete. A thread that still uses it then has broken
/// the promise.
#[test]
fn integration_a_thread_never_uses_a_frame_after_its_revocation_returned() {
    const ROUNDS: u32 = 5_000;
    let table = Arc::new(Table::create(1).expect("table"));
    let gate = Gate::create(1).expect("gate");
    let pager_table = Table::open(table.fd().as_fd(), 1).expect("the pager's mapping");
    let pager_gate = Gate::open(gate.fd().as_fd()).expect("the pager's mapping");
    let freed = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let using = Arc::new(AtomicU64::new(0));
    let device = {
        let (table, freed, stop, using) = (table.clone(), freed.clone(), stop.clone(), using.clone());
        let mut slot = gate.slot(0).expect("slot");
        std::thread::spawn(move || {
            let mut uses = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let inside = slot.enter();
                let entry = table.load(0);
                if let Some(frame) = entry.frame_number()
                    && let Some(entry) = table.touch(0, entry, true)
                {
                    assert!(entry.is_dirty());
                    // Tells the revoker to strike now, in the middle of the access.
                    using.store(u64::from(frame), Ordering::SeqCst);
                    for _ in 0..200 {
                        let freed = freed.load(Ordering::SeqCst);
                        assert!(freed < u64::from(frame), "Frame {frame} used after its revocation");
                    }
                    uses += 1;
                }
                drop(inside);
            }
            uses
        })
    };
    let mut dirty = 0;
    for frame in 1..=ROUNDS {
        assert_eq!(table.begin(0, frame), Begin::Started);
        assert!(table.install(0, frame, Pte::frame(frame, true)));
        while using.load(Ordering::SeqCst) != u64::from(frame) && !device.is_finished() {
            std::thread::yield_now();
        }
        dirty += u32::from(pager_table.revoke(0, 1));
        pager_gate.wait(Duration::from_secs(10)).expect("the thread leaves");
        freed.store(u64::from(frame), Ordering::SeqCst);
    }
    stop.store(true, Ordering::Relaxed);
    let uses = device.join().expect("the device thread");
    assert!(uses >= u64::from(ROUNDS), "the threads met in every round");
    assert_eq!(dirty, ROUNDS, "every frame was written before it was revoked");
}

#[test]
fn integration_a_thread_that_stays_inside_is_named_and_one_that_leaves_is_waited_for() {
    let gate = Gate::create(4).expect("gate");
    let mut slot = gate.slot(2).expect("slot");
    let inside = slot.enter();
    assert_eq!(gate.inside().collect::<Vec<_>>(), [2]);
    assert_eq!(gate.wait(Duration::from_millis(5)), Err(GateError::StillInside { slot: 2 }));
    let waiter = gate.clone();
    let waiting = std::thread::spawn(move || waiter.wait(Duration::from_secs(10)));
    drop(inside);
    assert_eq!(waiting.join().expect("the waiter"), Ok(()));
    assert_eq!(gate.inside().count(), 0);
}

#[test]
fn integration_two_revokers_and_an_installer_leave_no_entry_behind() {
    const PAGES: u64 = 64;
    let table = Arc::new(Table::create(PAGES).expect("table"));
    let stop = Arc::new(AtomicBool::new(false));
    let revokers: Vec<_> = (0..2)
        .map(|_| {
            let (table, stop) = (table.clone(), stop.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    table.revoke(0, PAGES);
                }
            })
        })
        .collect();
    let (mut installed, mut lost) = (0, 0);
    for nonce in 0..5_000 {
        for page in 0..PAGES {
            if table.begin(page, nonce) == Begin::Started {
                if table.install(page, nonce, Pte::frame(nonce, false)) {
                    installed += 1;
                } else {
                    lost += 1;
                }
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    for revoker in revokers {
        revoker.join().expect("a revoker");
    }
    table.revoke(0, PAGES);
    assert!((0..PAGES).all(|page| table.load(page) == Pte::INVALID));
    assert!(installed > 0, "installed {installed}, lost {lost}");
}
