use uhmm_ipc::message::pager::MapKind;

use super::*;

const RANGE: PageRange = PageRange { region: 7, first_page: 10, page_count: 20 };

fn invalidation(id: u64, device_mask: u8) -> Invalidation {
    Invalidation { id, space: 1, range: RANGE, device_mask, unmap: false, deadline_ms: 100 }
}

fn core_with_devices(devices: &[u8]) -> MirrorCore {
    let mut core = MirrorCore::default();
    for device in devices {
        core.device_login(*device, 1, &mut Vec::new());
        core.open(1, *device);
        core.mirrored(1, *device, 7, 0x10_0000, 0x10_0000);
    }
    core
}

#[test]
fn all_devices_are_started_before_anyone_is_waited_for() {
    let mut core = core_with_devices(&[0, 1, 3]);
    let mut out = Vec::new();
    core.invalidate(invalidation(5, 0b1011), &mut out);
    let started: Vec<u8> =
        out.iter().filter_map(|a| if let Action::Start { device, .. } = a { Some(*device) } else { None }).collect();
    assert_eq!(started, [0, 1, 3]);
    out.clear();
    core.acknowledge(1, 5, &mut out);
    core.acknowledge(0, 5, &mut out);
    core.acknowledge(0, 5, &mut out);
    assert!(out.is_empty(), "finished before device 3 acknowledged");
    core.acknowledge(3, 5, &mut out);
    assert_eq!(out, [Action::Finished { id: 5, late_mask: 0 }]);
}

#[test]
fn silence_of_a_device_that_is_not_logged_in_is_not_consent() {
    let mut core = MirrorCore::default();
    let mut out = Vec::new();
    core.invalidate(invalidation(5, 0b1), &mut out);
    assert!(out.is_empty());
    core.device_login(0, 1, &mut out);
    assert!(matches!(out[..], [Action::Start { device: 0, .. }]));
    out.clear();
    core.acknowledge(0, 5, &mut out);
    assert_eq!(out, [Action::Finished { id: 5, late_mask: 0 }]);
}

#[test]
fn a_dead_device_owes_nothing_and_a_lost_session_still_does() {
    let mut core = core_with_devices(&[0]);
    let mut out = Vec::new();
    core.invalidate(invalidation(5, 0b1), &mut out);
    out.clear();
    core.device_lost(0);
    assert_eq!(core.pending_count(), 1);
    core.device_void(0, &mut out);
    assert_eq!(out, [Action::Finished { id: 5, late_mask: 0 }]);
    assert_eq!(core.interval_count(), 0);
}

#[test]
fn a_late_device_is_named_after_the_deadline() {
    let mut core = core_with_devices(&[0, 1]);
    let mut out = Vec::new();
    core.invalidate(invalidation(5, 0b11), &mut out);
    core.acknowledge(1, 5, &mut out);
    out.clear();
    core.tick(99, &mut out);
    assert!(out.is_empty());
    assert_eq!(core.next_deadline_ms(), Some(100));
    core.tick(100, &mut out);
    assert_eq!(out, [Action::Finished { id: 5, late_mask: 0b1 }]);
    assert_eq!(core.counters().late_devices, 1);
}

/// Begins a fault on the first page of a window of region 7.
fn begin(core: &mut MirrorCore, device: u8, first_page: u64, page_count: u64) -> u64 {
    core.fault_begin(1, device, PageRange { region: 7, first_page, page_count }, first_page).unwrap()
}

/// The whole of a window, mapped in place.
fn answer(first_page: u64, page_count: u64) -> Vec<MapRun> {
    vec![MapRun { first_page, page_count, kind: MapKind::System, writable: true }]
}

/// Pages of an answer that may be installed, as (first, count).
fn left(installable: Option<Installable>) -> Option<Vec<(u64, u64)>> {
    installable.map(|good| good.runs.iter().map(|run| (run.first_page, run.page_count)).collect())
}

#[test]
fn a_fault_whose_page_is_invalidated_must_retry_and_others_go_on() {
    let mut core = core_with_devices(&[0]);
    let mut out = Vec::new();
    let hit = begin(&mut core, 0, 12, 3);
    let miss = begin(&mut core, 0, 30, 5);
    core.invalidate(invalidation(5, 0b1), &mut out);
    let during = begin(&mut core, 0, 29, 1);
    assert_eq!(core.fault_end(hit, answer(12, 3)), None);
    assert_eq!(core.fault_end(miss, answer(30, 5)), Some(Installable { sequence: 0, runs: answer(30, 5) }));
    assert_eq!(core.fault_end(during, answer(29, 1)), None, "began while the invalidation ran");
    core.acknowledge(0, 5, &mut out);
    let after = begin(&mut core, 0, 29, 1);
    assert_eq!(core.fault_end(after, answer(29, 1)), Some(Installable { sequence: 1, runs: answer(29, 1) }));
    assert_eq!((core.counters().fault_retries, core.counters().fault_trims), (2, 0));
}

#[test]
fn a_range_fault_keeps_what_was_not_invalidated_before_it_and_during_it() {
    let mut core = core_with_devices(&[0]);
    let part = |id, first_page, page_count| Invalidation {
        range: PageRange { region: 7, first_page, page_count },
        ..invalidation(id, 0b1)
    };
    core.invalidate(part(1, 8000, 500), &mut Vec::new());
    let fault = begin(&mut core, 0, 0, 8192);
    core.invalidate(part(2, 100, 1), &mut Vec::new());
    core.invalidate(Invalidation { space: 2, ..part(3, 0, 8192) }, &mut Vec::new());
    let elsewhere = PageRange { region: 8, first_page: 0, page_count: 8192 };
    core.invalidate(Invalidation { range: elsewhere, ..invalidation(4, 0b1) }, &mut Vec::new());
    // Acknowledged or not: the device may have been told about these pages before.
    core.acknowledge(0, 2, &mut Vec::new());
    assert_eq!(left(core.fault_end(fault, answer(0, 8192))), Some(vec![(0, 100), (101, 7899)]));
    assert_eq!((core.counters().fault_retries, core.counters().fault_trims), (0, 1));
}

/// The fault is the reason why the pages are taken from device 1; asking again would take them back and forth for ever.
#[test]
fn a_fault_is_not_disturbed_by_the_revocation_of_other_devices() {
    let mut core = core_with_devices(&[0, 1]);
    let exclusive = begin(&mut core, 0, 10, 20);
    let loser = begin(&mut core, 1, 10, 20);
    core.invalidate(invalidation(5, 0b10), &mut Vec::new());
    let later = begin(&mut core, 0, 10, 20);
    assert_eq!(left(core.fault_end(exclusive, answer(10, 20))), Some(vec![(10, 20)]));
    assert_eq!(left(core.fault_end(later, answer(10, 20))), Some(vec![(10, 20)]));
    assert_eq!(core.fault_end(loser, answer(10, 20)), None);
}

#[test]
fn an_unmap_disturbs_every_device_that_knows_the_region_whomever_the_pager_names() {
    let mut core = core_with_devices(&[0, 1]);
    let fault = begin(&mut core, 0, 10, 20);
    core.invalidate(Invalidation { unmap: true, ..invalidation(5, 0b10) }, &mut Vec::new());
    assert_eq!(core.fault_end(fault, answer(10, 20)), None);
}

#[test]
fn a_refused_fault_is_over() {
    let mut core = core_with_devices(&[0]);
    let fault = begin(&mut core, 0, 10, 20);
    core.fault_failed(fault);
    assert_eq!(core.fault_end(fault, answer(10, 20)), None);
    assert_eq!(core.counters().fault_retries, 0);
}

#[test]
fn a_device_cannot_fault_on_what_it_did_not_open_or_look_up() {
    let mut core = core_with_devices(&[0]);
    assert_eq!(core.fault_begin(2, 0, RANGE, 10), Err(Refusal::NotOpen { space: 2, device: 0 }));
    assert_eq!(core.fault_begin(1, 1, RANGE, 10), Err(Refusal::NotOpen { space: 1, device: 1 }));
    let foreign = PageRange { region: 8, ..RANGE };
    assert_eq!(core.fault_begin(1, 0, foreign, 10), Err(Refusal::NotMirrored { space: 1, region: 8, device: 0 }));
}

#[test]
fn unmap_reaches_every_device_that_knows_the_region() {
    let mut core = core_with_devices(&[0, 2]);
    let mut out = Vec::new();
    core.invalidate(Invalidation { unmap: true, device_mask: 0, ..invalidation(6, 0) }, &mut out);
    assert_eq!(out.len(), 2);
    assert_eq!(core.interval_count(), 0);
    assert!(core.fault_begin(1, 0, RANGE, 10).is_err());
}

#[test]
fn a_lost_pager_leaves_nothing_pending_and_no_fault_installable() {
    let mut core = core_with_devices(&[0]);
    let fault = core.fault_begin(1, 0, RANGE, 10).unwrap();
    core.invalidate(invalidation(5, 0b1), &mut Vec::new());
    core.pager_lost();
    assert_eq!(core.pending_count(), 0);
    assert_eq!(core.fault_end(fault, answer(10, 20)), None);
    let mut out = Vec::new();
    core.acknowledge(0, 5, &mut out);
    assert!(out.is_empty(), "an acknowledgement for the dead pager's id finished something");
}

#[test]
fn a_region_at_an_old_address_replaces_the_old_interval() {
    let mut core = core_with_devices(&[0]);
    core.mirrored(1, 0, 9, 0x18_0000, 0x1000);
    assert_eq!(core.interval_count(), 1);
    assert!(core.fault_begin(1, 0, RANGE, 10).is_err());
    assert!(core.fault_begin(1, 0, PageRange { region: 9, first_page: 0, page_count: 1 }, 0).is_ok());
}

#[test]
fn a_gone_client_is_reported_to_its_mirrors_only() {
    let mut core = core_with_devices(&[0, 2]);
    assert_eq!(core.space_gone(1), 0b101);
    assert_eq!(core.space_gone(1), 0);
}

#[test]
fn a_driver_that_came_before_the_pager_heard_of_its_predecessors_death_keeps_what_it_has_opened() {
    let mut core = core_with_devices(&[0]);
    let mut out = Vec::new();
    core.open(2, 0);
    core.device_lost(0);
    core.device_login(0, 2, &mut out);
    core.open(1, 0);
    core.device_void(0, &mut out);
    assert_eq!(core.is_open(1, 0), Ok(()));
    assert_eq!(core.is_open(2, 0), Err(Refusal::NotOpen { space: 2, device: 0 }), "the dead one's");
    assert_eq!(core.interval_count(), 0, "nothing is mapped before the pager knows the new one");
    // Its own death, whether its connection is gone already or not.
    core.device_lost(0);
    core.device_void(0, &mut out);
    assert_eq!(core.is_open(1, 0), Err(Refusal::NotOpen { space: 1, device: 0 }));
}
