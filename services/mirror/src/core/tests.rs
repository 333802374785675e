use super::*;

const RANGE: PageRange = PageRange { region: 7, first_page: 10, page_count: 20 };

fn invalidation(id: u64, device_mask: u8) -> Invalidation {
    Invalidation { id, space: 1, range: RANGE, device_mask, unmap: false, deadline_ms: 100 }
}

fn core_with_devices(devices: &[u8]) -> MirrorCore {
    let mut core = MirrorCore::default();
    for device in devices {
        core.device_login(*device, &mut Vec::new());
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
    core.device_login(0, &mut out);
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

#[test]
fn a_fault_that_overlaps_an_invalidation_must_retry() {
    let mut core = core_with_devices(&[0]);
    let mut out = Vec::new();
    let hit = core.fault_begin(1, 0, PageRange { region: 7, first_page: 0, page_count: 11 }).unwrap();
    let miss = core.fault_begin(1, 0, PageRange { region: 7, first_page: 30, page_count: 5 }).unwrap();
    core.invalidate(invalidation(5, 0b1), &mut out);
    let during = core.fault_begin(1, 0, PageRange { region: 7, first_page: 29, page_count: 1 }).unwrap();
    assert_eq!(core.fault_end(hit), None);
    assert_eq!(core.fault_end(miss), Some(0));
    assert_eq!(core.fault_end(during), None, "began while the invalidation ran");
    core.acknowledge(0, 5, &mut out);
    let after = core.fault_begin(1, 0, PageRange { region: 7, first_page: 29, page_count: 1 }).unwrap();
    assert_eq!(core.fault_end(after), Some(1));
    assert_eq!(core.counters().fault_retries, 2);
}

#[test]
fn a_device_cannot_fault_on_what_it_did_not_open_or_look_up() {
    let mut core = core_with_devices(&[0]);
    assert_eq!(core.fault_begin(2, 0, RANGE), Err(Refusal::NotOpen { space: 2, device: 0 }));
    assert_eq!(core.fault_begin(1, 1, RANGE), Err(Refusal::NotOpen { space: 1, device: 1 }));
    let foreign = PageRange { region: 8, ..RANGE };
    assert_eq!(core.fault_begin(1, 0, foreign), Err(Refusal::NotMirrored { space: 1, region: 8, device: 0 }));
}

#[test]
fn unmap_reaches_every_device_that_knows_the_region() {
    let mut core = core_with_devices(&[0, 2]);
    let mut out = Vec::new();
    core.invalidate(Invalidation { unmap: true, device_mask: 0, ..invalidation(6, 0) }, &mut out);
    assert_eq!(out.len(), 2);
    assert_eq!(core.interval_count(), 0);
    assert!(core.fault_begin(1, 0, RANGE).is_err());
}

#[test]
fn a_lost_pager_leaves_nothing_pending_and_no_fault_installable() {
    let mut core = core_with_devices(&[0]);
    let fault = core.fault_begin(1, 0, RANGE).unwrap();
    core.invalidate(invalidation(5, 0b1), &mut Vec::new());
    core.pager_lost();
    assert_eq!(core.pending_count(), 0);
    assert_eq!(core.fault_end(fault), None);
    let mut out = Vec::new();
    core.acknowledge(0, 5, &mut out);
    assert!(out.is_empty(), "an acknowledgement for the dead pager's id finished something");
}

#[test]
fn a_region_at_an_old_address_replaces_the_old_interval() {
    let mut core = core_with_devices(&[0]);
    core.mirrored(1, 0, 9, 0x18_0000, 0x1000);
    assert_eq!(core.interval_count(), 1);
    assert!(core.fault_begin(1, 0, RANGE).is_err());
    assert!(core.fault_begin(1, 0, PageRange { region: 9, first_page: 0, page_count: 1 }).is_ok());
}

#[test]
fn a_gone_client_is_reported_to_its_mirrors_only() {
    let mut core = core_with_devices(&[0, 2]);
    assert_eq!(core.space_gone(1), 0b101);
    assert_eq!(core.space_gone(1), 0);
}
