//! `uhmm drain`: everything comes home from a device, nothing goes there again, whoever dies, until `uhmm undrain`.

use uhmm_sdk::{Error, Job};
use uhmm_tests::{TestBed, manifest_of};

const WORDS: usize = 1 << 18;

#[test]
fn integration_drain_brings_everything_home_and_lets_nothing_leave_until_undrain() {
    let bed = TestBed::with_manifest(&manifest_of(2, "64MiB", ""));
    let session = bed.session();
    let region = session.allocate((WORDS * 8) as u64).expect("memory");
    let arena = region.arena().expect("an arena");
    let words = arena.alloc_slice_copy(&(0..WORDS as u64).collect::<Vec<_>>()).expect("room");
    let (first, second) = (session.device("soft0").expect("soft0"), session.device("soft1").expect("soft1"));
    let sum = |device: &uhmm_sdk::Device| {
        let job = Job::new("sum", [words.as_ptr() as u64, (WORDS * 8) as u64]).idempotent();
        device.run(job)
    };
    let there = |bed: &TestBed| -> u64 {
        bed.operator().regions().expect("regions").iter().map(|region| region.device_pages[0]).sum()
    };
    session.migrate(region.addr(), region.len_bytes(), &first).expect("migrate");
    assert_eq!(there(&bed), region.len_bytes() / 4096);
    let id = bed.operator().device_id("soft0").expect("soft0");
    assert_eq!(bed.operator().drain(id).expect("drain"), region.len_bytes() / 4096);
    for round in 0..2 {
        assert_eq!(there(&bed), 0);
        let report = session.migrate(region.addr(), region.len_bytes(), &first).expect("an answer");
        assert_eq!(report.moved_pages, 0, "round {round}");
        assert!(report.why.contains("drained") && report.why.contains("undrain soft0"), "{}", report.why);
        let error = sum(&first).map(drop).expect_err("a drained device fetches nothing");
        assert!(error.to_string().contains("drained"), "{error}");
        assert_eq!(there(&bed), 0);
        // Another device serves meanwhile.
        let expected = (WORDS as u64 - 1) * WORDS as u64 / 2;
        assert_eq!(sum(&second).expect("soft1").results, [expected]);
        assert!(words.iter().enumerate().all(|(index, word)| *word == index as u64));
        // Neither the next pager nor the next driver has forgotten it.
        for service in ["pager", "soft0"] {
            let killed = bed.kill(service);
            bed.wait_ready(service, killed);
        }
    }
    assert_eq!(bed.operator().drain(id).expect("once more"), 0, "it is empty already");
    bed.operator().undrain(id).expect("undrain");
    let report = session.migrate(region.addr(), region.len_bytes(), &first).expect("migrate");
    assert_eq!(report.moved_pages, region.len_bytes() / 4096, "{}", report.why);
    assert!(words.iter().enumerate().all(|(index, word)| *word == index as u64));
}

#[test]
fn integration_drain_of_a_device_that_is_not_there_says_so() {
    let bed = TestBed::start("16MiB");
    assert!(matches!(bed.operator().drain(5), Err(Error::Service { text, .. }) if text.contains("no device 5")));
}
