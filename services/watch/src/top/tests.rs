use std::path::Path;

use uhmm_ipc::message::pager::StripCell;
use uhmm_shared::record::BUCKETS;

use super::picture::{render, svg, text};
use super::state::{Action, Key, Pane, Top, quantile};
use crate::events::Line;
use crate::record::{Times, Value};
use crate::sample::{Device, Region, Sample, Service};

const MIB: u64 = 1 << 20;

fn moved(cause: &str, way: &str, value: u64) -> Value {
    let labels = [("cause", cause), ("way", way)].map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
    Value { name: "migrated_bytes".to_owned(), labels, counter: true, value }
}

fn service(name: &str, state: &str, pid: u32, incarnation: u32) -> Service {
    let sandbox = if pid == 0 { Vec::new() } else { vec!["no_new_privs".to_owned()] };
    Service {
        name: name.to_owned(),
        state: state.to_owned(),
        pid,
        incarnation,
        sandbox,
        uptime_ms: 83_000,
        ..Service::default()
    }
}

fn pager(faults: u64, bytes: u64, slow: u64) -> Service {
    let mut buckets = vec![0; BUCKETS];
    (buckets[5], buckets[11]) = (faults, slow);
    let plain = |name: &str, value| Value { name: name.to_owned(), labels: Vec::new(), counter: true, value };
    let kind = vec![("kind".to_owned(), "device".to_owned())];
    Service {
        values: vec![
            plain("cpu_faults", faults),
            plain("device_faults", 3 * faults),
            moved("user", "out", bytes),
            moved("eviction", "home", bytes / 4),
        ],
        times: vec![Times { name: "fault".to_owned(), labels: kind, sum_ns: 1, buckets }],
        last_recovery_ms: 14,
        ..service("pager", "ready", 4243, 3)
    }
}

fn strip(parts: &[(StripCell, usize)]) -> Vec<u8> {
    parts.iter().flat_map(|(cell, count)| vec![cell.byte(); *count]).collect()
}

fn sample(second: u64) -> Sample {
    let device = |name: &str, memory_bytes, free_bytes| Device { name: name.to_owned(), memory_bytes, free_bytes };
    let region = |pid, addr, pages, strip| Region { pid, addr, pages, id: addr, strip, ..Region::default() };
    let line = |time_ns, service: &str, what: &str| Line {
        time_ns,
        service: service.to_owned(),
        what: what.to_owned(),
        ..Line::default()
    };
    let events = vec![
        Line { name: "soft1".to_owned(), value: 4, ..line(second * 1_000_000_000, "supervisor", "service-died") },
        Line {
            why: "eviction".to_owned(),
            from: "soft0".to_owned(),
            to: "home".to_owned(),
            pid: 9021,
            addr: 0x7f31_4000_0000,
            bytes: 2 * MIB,
            took_ns: 412_000,
            trace: "9e3779b97f4a7c15".to_owned(),
            ..line(second * 1_000_000_000 + 250_000, "pager", "migrate-end")
        },
    ];
    Sample {
        time_ns: second * 1_000_000_000,
        services: vec![
            service("supervisor", "ready", 4242, 1),
            pager(second * 1000, second * 512 * MIB, second % 3 * 20),
            service("mirror", "ready", 4244, 1),
            service("soft0", "ready", 4245, 1),
            Service { missed_heartbeats: 2, ..service("soft1", "backoff", 0, 4) },
            service("holder", "ready", 4246, 1),
        ],
        devices: vec![device("soft0", 1 << 30, 300 * MIB), device("soft1", 0, 0)],
        regions: vec![
            region(
                9021,
                0x7f31_4000_0000,
                262_144,
                strip(&[
                    (StripCell::System, 30),
                    (StripCell::Device(0), 60),
                    (StripCell::Moving, 4),
                    (StripCell::Absent, 34),
                ]),
            ),
            region(
                9021,
                0x7f30_0000_0000,
                4096,
                strip(&[(StripCell::Device(1), 64), (StripCell::Poisoned, 1), (StripCell::System, 63)]),
            ),
            region(9107, 0x5578_1234_5000, 900, strip(&[(StripCell::System, 128)])),
        ],
        events,
        ..Sample::default()
    }
}

fn top() -> Top {
    let mut top = Top::default();
    (1..40).for_each(|second| top.take(sample(second)));
    top
}

fn keys(top: &mut Top, keys: &[Key]) -> Option<Action> {
    keys.iter().fold(None, |_, key| top.key(*key))
}

#[test]
fn rates_are_what_happened_in_a_second() {
    let rates = top().rates;
    assert_eq!((rates.cpu_faults, rates.device_faults), (1000.0, 3000.0));
    assert_eq!(rates.out_bytes, (512 * MIB) as f64);
    assert_eq!((rates.home_bytes, rates.evicted_bytes), ((128 * MIB) as f64, (128 * MIB) as f64));
    assert_eq!(rates.fault_p50_ns, 1 << 13);
}

#[test]
fn a_record_that_begins_anew_is_no_negative_rate() {
    let mut top = top();
    top.take(Sample { time_ns: 100_000_000_000, ..sample(1) });
    assert_eq!((top.rates.cpu_faults, top.rates.out_bytes), (0.0, 0.0));
}

#[test]
fn quantiles_are_bounds_of_buckets() {
    assert_eq!((quantile(&[], 99), quantile(&[0, 0], 50)), (0, 0));
    assert_eq!((quantile(&[98, 0, 2], 50), quantile(&[98, 0, 2], 99)), (256, 1024));
}

#[test]
fn nothing_is_done_before_it_is_confirmed() {
    let mut top = top();
    assert_eq!(keys(&mut top, &[Key::Down, Key::Char('r')]), None);
    assert_eq!(top.confirm, Some(Action::Restart("pager".to_owned())));
    assert_eq!(keys(&mut top, &[Key::Char('n')]), None);
    assert_eq!((top.confirm.clone(), top.message.as_str()), (None, "Nothing was done"));
    assert_eq!(keys(&mut top, &[Key::Char('r'), Key::Char('y')]), Some(Action::Restart("pager".to_owned())));
}

#[test]
fn every_pane_has_its_actions() {
    let mut top = top();
    assert_eq!(
        keys(&mut top, &[Key::Tab, Key::Down, Key::Char('d'), Key::Char('y')]),
        Some(Action::Drain("soft1".to_owned()))
    );
    let region = 0x7f30_0000_0000;
    assert_eq!(keys(&mut top, &[Key::Tab, Key::Down, Key::Char('e'), Key::Char('y')]), Some(Action::Evict { region }));
    let migrate = keys(&mut top, &[Key::Char('m'), Key::Char('1'), Key::Char('y')]);
    assert_eq!(migrate, Some(Action::Migrate { region, device: 1 }));
    assert_eq!(keys(&mut top, &[Key::Char('m'), Key::Char('7'), Key::Char('y')]), None);
    assert_eq!(top.pane, Pane::Regions);
    keys(&mut top, &[Key::Char('q')]);
    assert!(top.quit);
}

#[test]
fn a_selection_stays_inside_what_is_left() {
    let mut top = top();
    keys(&mut top, &[Key::Down; 50]);
    assert_eq!(top.selected(Pane::Services), 5);
    top.take(Sample { services: vec![service("supervisor", "ready", 1, 1)], ..sample(41) });
    assert_eq!(top.selected(Pane::Services), 0);
    assert_eq!(keys(&mut top, &[Key::Char('r'), Key::Char('y')]), None, "the supervisor restarts nobody but others");
}

#[test]
fn a_replay_changes_nothing() {
    let mut top = Top { replayed: true, ..top() };
    for letter in ['r', 'd', 'e', 'm'] {
        assert_eq!(keys(&mut top, &[Key::Char(letter), Key::Char('1'), Key::Char('y')]), None);
        assert!(top.confirm.is_none() && !top.choosing_device);
    }
}

#[test]
fn small_and_large_terminals_show_what_matters() {
    for (width, height) in [(80, 24), (160, 50)] {
        let picture = text(&render(&top(), width, height));
        assert_eq!(picture.lines().count(), usize::from(height));
        assert!(picture.lines().all(|line| line.chars().count() <= usize::from(width)), "{picture}");
        for part in [
            "5/6 ready",
            "pager",
            "14 ms",
            "backoff",
            "no_new_privs",
            "soft0",
            "724 MiB of 1 GiB",
            "not logged in",
            "out 512 MiB/s",
            "1000/s of programs",
            "9021",
            "0x7f3140000000",
            "1 GiB",
            "hhhh",
            "0000",
            "1111",
            ">",
            "....",
            "service-died",
            "eviction",
            "q quit",
        ] {
            assert!(picture.contains(part), "{part} is missing at {width}x{height}:\n{picture}");
        }
    }
}

#[test]
fn any_size_and_nothing_at_all_can_be_drawn() {
    for (width, height) in [(1, 1), (2, 3), (20, 5), (79, 7), (120, 4), (300, 100)] {
        for top in [Top::default(), top()] {
            let buffer = render(&top, width, height);
            assert_eq!(text(&buffer).lines().count(), usize::from(height));
        }
    }
}

#[test]
fn what_is_asked_is_at_the_bottom() {
    let mut top = top();
    keys(&mut top, &[Key::Tab, Key::Char('d')]);
    let picture = text(&render(&top, 80, 24));
    assert!(
        picture.lines().last().is_some_and(|line| line.starts_with("bring everybody's pages home from soft0?")),
        "{picture}"
    );
}

/// The pictures in the documentation are what this code draws.
#[test]
fn the_pictures_in_the_documentation_are_current() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    for (width, height) in [(80, 24), (160, 50)] {
        let buffer = render(&top(), width, height);
        for (kind, drawn) in [("txt", text(&buffer)), ("svg", svg(&buffer))] {
            let path = docs.join(format!("top-{width}x{height}.{kind}"));
            if std::env::var_os("UHMM_BLESS").is_some() {
                std::fs::write(&path, &drawn).unwrap();
            }
            let kept = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(
                kept == drawn,
                "{} is old: UHMM_BLESS=1 cargo nextest run -p uhmm-watch the_pictures",
                path.display()
            );
        }
    }
}
