use super::*;
use uhmm_manifest::Manifest;

const PAGER: usize = 0;

fn core() -> Core {
    Core::new(Manifest::built_in().resolve().expect("built in"), &[], None)
}

fn started() -> Core {
    let mut core = core();
    let mut out = Vec::new();
    core.tick(0, &mut out);
    for service in 0..3 {
        assert_eq!(out, [Action::Spawn { service }], "in order, each when the one before is ready");
        out.clear();
        core.spawned(service, 100 + service as u32, 0);
        assert_eq!(core.registered(service, 1, 100 + service as u32, 0), Ok(false));
        core.ready(service, 10, &mut out);
    }
    assert_eq!(out, [Action::AllReady]);
    core
}

/// Kills the pager at `now_ms` and says when it is spawned again.
fn die(core: &mut Core, now_ms: u64) -> Option<u64> {
    let mut out = Vec::new();
    core.exited(PAGER, "signal 9", now_ms, &mut out);
    let mut at_ms = now_ms;
    while !out.contains(&Action::Spawn { service: PAGER }) {
        if core.services()[PAGER].state == State::Held {
            return None;
        }
        at_ms += 1;
        core.tick(at_ms, &mut out);
    }
    core.spawned(PAGER, 500, at_ms);
    core.ready(PAGER, at_ms, &mut out);
    Some(at_ms - now_ms)
}

#[test]
fn services_start_in_order_and_ready_is_told_once() {
    let mut core = started();
    let mut out = Vec::new();
    core.ready(PAGER, 20, &mut out);
    assert!(out.is_empty());
}

#[test]
fn the_first_restart_is_immediate_then_waits_double_up_to_the_cap() {
    let mut core = started();
    let waits: Vec<u64> = (0..10).map(|i| die(&mut core, 1000 + i * 3000).expect("restarted")).collect();
    assert_eq!(waits, [0, 20, 40, 80, 160, 320, 640, 1280, 2000, 2000]);
    assert_eq!(core.services()[PAGER].incarnation, 11);
}

#[test]
fn a_long_life_wipes_the_slate() {
    let mut core = started();
    die(&mut core, 1000);
    assert_eq!(die(&mut core, 2000), Some(20));
    assert_eq!(die(&mut core, 2_000_000), Some(0));
}

#[test]
fn too_many_deaths_hold_the_service_and_say_so() {
    let mut core = started();
    let deaths = (0..60).take_while(|i| die(&mut core, 1000 + i * 10).is_some()).count();
    assert!(deaths <= 30, "{deaths}");
    assert_eq!(core.services()[PAGER].state, State::Held);
    assert_eq!(core.services()[PAGER].pid, 0);
}

#[test]
fn a_service_that_does_not_answer_heartbeats_is_killed() {
    let mut core = started();
    let mut out = Vec::new();
    for now_ms in (0..5000).step_by(100) {
        core.tick(now_ms, &mut out);
        for action in std::mem::take(&mut out) {
            match action {
                Action::Ping { service, sequence } if service != PAGER => core.pong(service, sequence),
                Action::Ping { .. } => {}
                Action::Kill { service } => {
                    assert_eq!(service, PAGER);
                    assert_eq!(core.services()[PAGER].missed, 4);
                    core.exited(PAGER, "signal 9", now_ms, &mut out);
                    assert!(core.services()[PAGER].last_exit.contains("heartbeats"));
                    return;
                }
                other => panic!("{other:?}"),
            }
        }
    }
    panic!("a hung pager was never killed");
}

#[test]
fn a_starting_service_has_a_free_pass_until_the_start_timeout() {
    let mut core = core();
    let mut out = Vec::new();
    core.tick(0, &mut out);
    core.spawned(PAGER, 7, 0);
    out.clear();
    core.tick(20_000, &mut out);
    assert!(out.is_empty(), "no ping, no kill: {out:?}");
    core.tick(20_001, &mut out);
    assert_eq!(out, [Action::Kill { service: PAGER }]);
}

#[test]
fn fence_names_an_incarnation_and_leaves_younger_ones_alone() {
    let mut core = started();
    let mut out = Vec::new();
    assert!(!core.condemn(PAGER, 7, "stuck", &mut out));
    assert!(out.is_empty());
    assert!(core.condemn(PAGER, 1, "stuck", &mut out));
    assert_eq!(out, [Action::Kill { service: PAGER }]);
    core.exited(PAGER, "signal 9", 50, &mut out);
    assert_eq!(core.services()[PAGER].last_exit, "signal 9: stuck");
}

#[test]
fn shutdown_asks_then_kills_and_restarts_nobody() {
    let mut core = started();
    let mut out = Vec::new();
    core.shutdown(100, &mut out);
    assert_eq!(out, [Action::Stop { service: 2 }, Action::Stop { service: 1 }, Action::Stop { service: 0 }]);
    out.clear();
    core.exited(2, "status 0", 110, &mut out);
    core.tick(2099, &mut out);
    assert_eq!(out, [Action::Died { service: 2, incarnation: 1, held: true }]);
    out.clear();
    core.tick(2100, &mut out);
    assert_eq!(out, [Action::Kill { service: 0 }, Action::Kill { service: 1 }]);
    core.exited(0, "signal 9", 2101, &mut out);
    core.exited(1, "signal 9", 2101, &mut out);
    assert_eq!(out.last(), Some(&Action::AllStopped));
}

#[test]
fn a_stranger_is_not_registered_and_an_orphan_is_adopted() {
    let mut core = started();
    assert!(core.registered(PAGER, 1, 999, 0).is_err());
    let mut core = Core::new(Manifest::built_in().resolve().expect("built in"), &[3, 1, 1], Some(1000));
    let mut out = Vec::new();
    core.tick(10, &mut out);
    assert!(out.is_empty(), "nothing is started while running services may report");
    assert_eq!(core.registered(PAGER, 3, 77, 10), Ok(true));
    core.ready(PAGER, 11, &mut out);
    core.tick(1000, &mut out);
    assert!(out.contains(&Action::Spawn { service: 1 }), "who did not report is started: {out:?}");
    assert_eq!(core.services()[1].incarnation, 2);
}

#[test]
fn what_an_older_supervisor_has_started_goes_on_or_is_started_again_at_once() {
    let mut core = Core::new(Manifest::built_in().resolve().expect("built in"), &[3, 1, 2], Some(2_000));
    let mut out = Vec::new();
    core.found_alive(PAGER, 70, 0);
    core.found_dead(1, 0, &mut out);
    assert_eq!(out, [Action::Died { service: 1, incarnation: 1, held: false }]);
    assert_eq!(core.dead().collect::<Vec<_>>(), [(1, 1, false)], "whoever comes later is told too");
    out.clear();
    core.tick(0, &mut out);
    assert_eq!(out, [Action::Spawn { service: 1 }]);
    assert_eq!(core.dead().count(), 0);
    assert_eq!(core.registered(PAGER, 3, 70, 10), Ok(false), "it is watched already");
    // One that lives and does not register is no reason to start another beside it.
    out.clear();
    core.found_alive(PAGER, 70, 0);
    core.tick(20_001, &mut out);
    assert!(
        out.contains(&Action::Kill { service: PAGER }) && !out.contains(&Action::Spawn { service: PAGER }),
        "{out:?}"
    );
}

#[test]
fn a_process_that_nobody_has_seen_die_is_not_told_to_be_dead() {
    let adopting = || Core::new(Manifest::built_in().resolve().expect("built in"), &[3, 1, 2], Some(2_000));
    let (mut core, mut out) = (adopting(), Vec::new());
    assert!(core.condemn(2, 2, "it does not let go", &mut out), "it may live, and write");
    assert!(out.is_empty());
    assert_eq!(core.registered(2, 2, 90, 10), Ok(true));
    assert!(core.is_condemned(2));
    // And one that does not come is told when nobody waits for it any more.
    let mut core = adopting();
    assert!(core.condemn(2, 2, "it does not let go", &mut out));
    core.tick(2_000, &mut out);
    assert!(out.contains(&Action::Died { service: 2, incarnation: 2, held: false }), "{out:?}");
}

const JOINS: &str = r#"
[[service]]
name = "pager"
kind = "pager"
[[service]]
name = "mirror"
kind = "mirror"
[[service]]
name = "d0"
kind = "driver"
join = { uid = 7 }
restart = { max_deaths = 2 }
[[device]]
name = "d0"
service = "d0"
"#;
const D0: usize = 2;

/// Pager and mirror are ready.
fn joinable(adopt_until_ms: Option<u64>) -> (Core, Vec<Action>) {
    let mut core = Core::new(Manifest::parse(JOINS).expect("TOML").resolve().expect("a plan"), &[], adopt_until_ms);
    let mut out = Vec::new();
    core.tick(adopt_until_ms.unwrap_or(0), &mut out);
    for service in 0..D0 {
        core.spawned(service, 100 + service as u32, 0);
        core.ready(service, 10, &mut out);
    }
    (core, out)
}

#[test]
fn a_service_that_joins_is_awaited_and_the_system_is_ready_without_it() {
    let (mut core, mut out) = joinable(None);
    assert_eq!(core.services()[D0].state, State::Awaited);
    assert!(out.contains(&Action::AllReady) && !out.contains(&Action::Spawn { service: D0 }));
    out.clear();
    core.tick(100_000, &mut out);
    assert!(!out.contains(&Action::Spawn { service: D0 }) && core.services()[D0].state == State::Awaited);
    out.clear();
    core.asks(D0, 100_000, &mut out);
    assert_eq!(out, [Action::Admit { service: D0 }]);
    core.spawned(D0, u32::MAX, 100_000);
    assert_eq!(core.registered(D0, 1, u32::MAX, 100_000), Ok(false));
    core.ready(D0, 100_001, &mut out);
    assert!(matches!(core.services()[D0].state, State::Ready { .. }));
}

#[test]
fn whoever_asks_before_its_turn_waits_and_whoever_has_gone_is_not_let_in() {
    let mut core = Core::new(Manifest::parse(JOINS).expect("TOML").resolve().expect("a plan"), &[], None);
    let mut out = Vec::new();
    core.asks(D0, 0, &mut out);
    assert!(out.is_empty(), "what it needs is not there");
    core.tick(0, &mut out);
    for service in 0..D0 {
        core.spawned(service, 100 + service as u32, 0);
        core.ready(service, 10, &mut out);
    }
    assert!(out.contains(&Action::Admit { service: D0 }));
    core.spawned(D0, u32::MAX, 10);
    core.ready(D0, 20, &mut out);
    out.clear();
    core.asks(D0, 30, &mut out);
    core.asks(D0, 30, &mut out);
    core.asks_no_more(D0);
    assert!(out.is_empty(), "one process at a time");
    core.exited(D0, "ended", 40, &mut out);
    assert!(out.contains(&Action::Died { service: D0, incarnation: 1, held: false }));
    assert!(out.contains(&Action::Admit { service: D0 }), "the one that waits");
    core.spawned(D0, u32::MAX, 40);
    out.clear();
    core.exited(D0, "ended", 50, &mut out);
    core.tick(10_000, &mut out);
    assert_eq!(core.services()[D0].state, State::Awaited, "nobody asks");
    assert_eq!(core.dead().collect::<Vec<_>>(), [(D0, 2, false)], "a service that comes now hears that it is dead");
}

#[test]
fn a_service_that_joins_and_dies_too_often_is_held_like_any_other() {
    let (mut core, mut out) = joinable(None);
    for death in 0..3 {
        let now_ms = (death + 1) * 10_000;
        out.clear();
        core.asks(D0, now_ms, &mut out);
        core.tick(now_ms, &mut out);
        assert!(out.contains(&Action::Admit { service: D0 }), "{out:?}");
        core.spawned(D0, u32::MAX, now_ms);
        core.exited(D0, "ended", now_ms, &mut out);
        assert_eq!(core.services()[D0].state == State::Held, death == 2, "{:?}", core.services()[D0]);
    }
}

#[test]
fn a_process_that_joined_an_older_supervisor_is_taken_over_within_the_grace() {
    let (core, _) = joinable(Some(2_000));
    assert_eq!(core.services()[D0].state, State::Awaited, "it has not come in time");
    let mut core = Core::new(Manifest::parse(JOINS).expect("TOML").resolve().expect("a plan"), &[1, 1, 4], Some(2_000));
    assert_eq!(core.registered(D0, 4, u32::MAX, 100), Ok(true));
}
