//! One migration, fault or job through all services, with times: as text, and as a file for Perfetto (ui.perfetto.dev) or chrome://tracing.
//!
//! Every request draws a number where it enters the system, and every message that it causes carries it; so do events. A `..-done` event says
//! how long it took, so it is a span by itself; what has only begun is an instant.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Value, json};

use crate::events::{Line, duration};

/// Which trace is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// This one, or one that begins so.
    pub id: Option<String>,
    /// One with such an event: `request`, `cpu-fault`, `device-fault`, `job`.
    pub kind: Option<String>,
    /// The one that took longest; else the one that ended last.
    pub slowest: bool,
}

/// The number of the trace that is wanted.
pub fn choose(lines: &[Line], wanted: &Wanted) -> Option<String> {
    if let Some(id) = &wanted.id {
        return lines.iter().find(|line| line.trace.starts_with(id.as_str())).map(|line| line.trace.clone());
    }
    let of_kind = |line: &&Line| {
        let base = line.what.strip_suffix("-done").unwrap_or(&line.what);
        let whole = matches!(base, "request" | "cpu-fault" | "device-fault" | "job");
        !line.trace.is_empty() && line.took_ns > 0 && whole && wanted.kind.as_ref().is_none_or(|kind| kind == base)
    };
    let found = lines.iter().filter(of_kind);
    let found =
        if wanted.slowest { found.max_by_key(|line| line.took_ns) } else { found.max_by_key(|line| line.time_ns) };
    found.map(|line| line.trace.clone())
}

/// Its events, as they began.
pub fn of<'a>(lines: &'a [Line], trace: &str) -> Vec<&'a Line> {
    let mut mine: Vec<&Line> = lines.iter().filter(|line| line.trace == trace).collect();
    mine.sort_by_key(|line| (line.time_ns, std::cmp::Reverse(line.took_ns)));
    mine
}

/// One line an event, times since the first.
pub fn text(lines: &[&Line]) -> String {
    let Some(first) = lines.iter().map(|line| begun_ns(line)).min() else { return String::new() };
    let last = lines.iter().map(|line| line.time_ns).max().unwrap_or(first);
    let mut text = String::new();
    let trace = &lines[0].trace;
    let mut services: Vec<&str> = lines.iter().map(|line| line.service.as_str()).collect();
    services.dedup();
    // A String takes everything.
    let _ = writeln!(text, "trace {trace}: {} events, {}", lines.len(), duration(last - first));
    for line in lines {
        let at = (line.time_ns - first) as f64 / 1e3;
        let shown = Line { trace: String::new(), ..(*line).clone() };
        // Without its own time, which is another clock's.
        let shown = shown.to_string();
        let shown = shown.trim_start().split_once("  ").map_or("", |(_, rest)| rest);
        let _ = writeln!(text, "{at:>12.1} us  {shown}");
    }
    text
}

fn begun_ns(line: &Line) -> u64 {
    line.time_ns.saturating_sub(line.took_ns)
}

/// Chrome's trace format: a process a service, a thread a kind of event, arrows from service to service.
pub fn perfetto(lines: &[Line]) -> Value {
    let numbers = |names: Vec<&str>| -> BTreeMap<String, usize> {
        let mut known = BTreeMap::new();
        for name in names {
            let next = known.len() + 1;
            known.entry(name.to_owned()).or_insert(next);
        }
        known
    };
    let services = numbers(lines.iter().map(|line| line.service.as_str()).collect());
    let kinds = numbers(lines.iter().map(|line| base(&line.what)).collect());
    let mut events: Vec<Value> = Vec::new();
    for (service, pid) in &services {
        events.push(json!({ "ph": "M", "name": "process_name", "pid": pid, "args": { "name": service } }));
        for (kind, tid) in &kinds {
            events.push(json!({ "ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": { "name": kind } }));
        }
    }
    let spanned: Vec<(&str, &str, u64)> = lines
        .iter()
        .filter(|line| line.took_ns > 0)
        .map(|line| (line.service.as_str(), base(&line.what), begun_ns(line)))
        .collect();
    let micros = |ns: u64| ns as f64 / 1e3;
    let mut last_of: BTreeMap<&str, (usize, usize, u64)> = BTreeMap::new();
    let mut sorted: Vec<&Line> = lines.iter().collect();
    sorted.sort_by_key(|line| begun_ns(line));
    for line in sorted {
        let (pid, tid) = (services[&line.service], kinds[base(&line.what)]);
        let args = serde_json::to_value(line).unwrap_or_default();
        let (name, ts) = (base(&line.what), micros(begun_ns(line)));
        if line.took_ns > 0 {
            let dur = micros(line.took_ns);
            events.push(json!({ "ph": "X", "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args }));
            if line.trace.is_empty() {
                continue;
            }
            let here = (pid, tid, begun_ns(line));
            if let Some((from_pid, from_tid, from_ns)) = last_of.insert(&line.trace, here)
                && from_pid != pid
            {
                let flow = |ph: &str, pid: usize, tid: usize, ts: f64| {
                    let id = format!("{}/{pid}/{}", line.trace, line.time_ns);
                    json!({ "ph": ph, "bp": "e", "cat": "request", "name": "request", "id": id, "pid": pid, "tid": tid, "ts": ts })
                };
                let mut begin = flow("s", from_pid, from_tid, micros(from_ns));
                let end = flow("f", pid, tid, ts);
                begin["id"] = end["id"].clone();
                events.extend([begin, end]);
            }
        } else if !spanned.contains(&(line.service.as_str(), name, line.time_ns)) {
            events.push(
                json!({ "ph": "i", "s": "t", "name": line.what, "pid": pid, "tid": tid, "ts": ts, "args": args }),
            );
        }
    }
    json!({ "displayTimeUnit": "ns", "traceEvents": events })
}

fn base(what: &str) -> &str {
    let cut = |suffix| what.strip_suffix(suffix);
    cut("-done").or_else(|| cut("-end")).or_else(|| cut("-start")).unwrap_or(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(service: &str, what: &str, time_ns: u64, took_ns: u64, trace: &str) -> Line {
        let owned = |text: &str| text.to_owned();
        Line { service: owned(service), what: owned(what), time_ns, took_ns, trace: owned(trace), ..Line::default() }
    }

    /// A device fault of a job, and a migration that took longer before it.
    fn lines() -> Vec<Line> {
        vec![
            line("pager", "request", 1_000, 0, "aaaa"),
            line("pager", "request-done", 90_000, 89_000, "aaaa"),
            line("soft0", "device-fault", 100_000, 0, "bbbb"),
            line("mirror", "device-fault", 110_000, 0, "bbbb"),
            line("pager", "device-fault", 120_000, 0, "bbbb"),
            line("pager", "migrate-end", 130_000, 8_000, "bbbb"),
            line("pager", "device-fault-done", 140_000, 20_000, "bbbb"),
            line("mirror", "device-fault-done", 150_000, 40_000, "bbbb"),
            line("soft0", "device-fault-done", 160_000, 60_000, "bbbb"),
            line("supervisor", "service-died", 170_000, 0, ""),
        ]
    }

    #[test]
    fn the_last_one_the_slowest_one_or_the_one_that_is_named() {
        let chosen = |wanted: Wanted| choose(&lines(), &wanted);
        assert_eq!(chosen(Wanted::default()).as_deref(), Some("bbbb"));
        assert_eq!(chosen(Wanted { slowest: true, ..Wanted::default() }).as_deref(), Some("aaaa"));
        assert_eq!(chosen(Wanted { id: Some("aa".to_owned()), ..Wanted::default() }).as_deref(), Some("aaaa"));
        assert_eq!(chosen(Wanted { kind: Some("job".to_owned()), ..Wanted::default() }), None);
    }

    #[test]
    fn a_fault_is_followed_through_the_services_in_order() {
        let all = lines();
        let mine = of(&all, "bbbb");
        let text = text(&mine);
        let services: Vec<&str> = text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(2)).collect();
        assert_eq!(services, ["soft0", "mirror", "pager", "pager", "pager", "mirror", "soft0"], "{text}");
        assert!(text.starts_with("trace bbbb: 7 events, 60 us") && text.contains("60.0 us"), "{text}");
    }

    #[test]
    fn a_perfetto_file_has_spans_names_and_arrows() {
        let file = perfetto(&lines());
        let events = file["traceEvents"].as_array().unwrap();
        let of = |ph: &str| events.iter().filter(|event| event["ph"] == ph).count();
        assert_eq!((of("X"), of("i")), (5, 1), "{file:#}");
        assert_eq!(of("s"), of("f"));
        assert_eq!(of("s"), 2, "soft0 -> mirror -> pager");
        let fault = events.iter().find(|event| event["ph"] == "X" && event["dur"] == 60.0).unwrap();
        assert_eq!((fault["ts"].as_f64(), fault["name"].as_str()), (Some(100.0), Some("device-fault")));
    }
}
