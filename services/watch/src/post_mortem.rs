//! What a service did before it died: its last events, what it had begun and not ended, its counters. The record outlives it; the
//! incarnation that came after it writes on in the same one, so the dead one's events are told by their incarnation.

use std::fmt::Write;

use crate::events::{Line, duration};
use crate::record::{Times, Value};
use crate::sample::Service;

/// See the module head.
#[derive(Clone, Debug, Default)]
pub struct PostMortem {
    /// The service as it is now.
    pub service: Service,
    /// All its events that are there.
    pub lines: Vec<Line>,
    /// Those that are not any more.
    pub lost: u64,
}

impl PostMortem {
    /// The incarnation that is looked at: the last one that is not the one that runs.
    pub fn incarnation(&self) -> u32 {
        let runs = self.service.pid != 0;
        let dead = self.lines.iter().rev().map(|line| line.incarnation);
        let dead = dead.filter(|incarnation| !runs || *incarnation != self.service.incarnation);
        dead.max().unwrap_or(self.service.incarnation)
    }

    /// What an incarnation had begun and not ended, oldest first.
    pub fn unfinished(&self, incarnation: u32) -> Vec<&Line> {
        let mut open: Vec<&Line> = Vec::new();
        for line in self.lines.iter().filter(|line| line.incarnation == incarnation) {
            match ends(&line.what) {
                Some(begin) => {
                    let same = |open: &&Line| {
                        let begun = line.time_ns.saturating_sub(line.took_ns);
                        open.what == begin
                            && open.trace == line.trace
                            && (open.addr == line.addr || open.time_ns == begun)
                    };
                    if let Some(at) = open.iter().position(same) {
                        open.remove(at);
                    }
                }
                None if begins(&line.what) => open.push(line),
                None => {}
            }
        }
        open
    }

    /// For people. `last`: so many events.
    pub fn text(&self, incarnation: u32, last: usize) -> String {
        let Self { service, lines, lost } = self;
        let mine: Vec<&Line> = lines.iter().filter(|line| line.incarnation == incarnation).collect();
        let mut text = String::new();
        let mut say = |line: String| {
            text.push_str(&line);
            text.push('\n');
        };
        let pid = mine.iter().find(|line| line.what == "started").map(|line| format!(", pid {}", line.value));
        say(format!("{}, incarnation {incarnation}{}", service.name, pid.unwrap_or_default()));
        match (incarnation == service.incarnation, service.pid) {
            (true, 0) => say(format!("It is {} since: {}", service.state, service.last_exit)),
            (true, pid) => say(format!("It runs (pid {pid}): nothing of it has died that is still recorded")),
            (false, _) => {
                say(format!(
                    "It ended ({}); incarnation {} is {}",
                    service.last_exit, service.incarnation, service.state
                ));
            }
        }
        if let (Some(first), Some(final_line)) = (mine.first(), mine.last()) {
            say(format!("Recorded: {} events over {}", mine.len(), duration(final_line.time_ns - first.time_ns)));
        }
        if *lost > 0 {
            say(format!("{lost} older events were overwritten"));
        }
        let unfinished = self.unfinished(incarnation);
        say(format!("\nBegun and not ended: {}", unfinished.len()));
        unfinished.iter().for_each(|line| say(line.to_string()));
        say(format!("\nLast events ({} of {}):", mine.len().min(last), mine.len()));
        mine.iter().skip(mine.len().saturating_sub(last)).for_each(|line| say(line.to_string()));
        say("\nCounters (all incarnations together):".to_owned());
        text.push_str(&counters(&service.values, &service.times));
        text
    }
}

fn begins(what: &str) -> bool {
    matches!(what, "cpu-fault" | "request" | "migrate-start" | "invalidate" | "device-fault" | "job" | "copy")
}

/// What an event ends.
fn ends(what: &str) -> Option<String> {
    if what == "migrate-end" {
        return Some("migrate-start".to_owned());
    }
    what.strip_suffix("-done").map(str::to_owned)
}

fn counters(values: &[Value], times: &[Times]) -> String {
    let mut text = String::new();
    let labels =
        |labels: &[(String, String)]| labels.iter().map(|(key, value)| format!(" {key}={value}")).collect::<String>();
    for value in values.iter().filter(|value| value.value != 0) {
        // A String takes everything.
        let _ = writeln!(text, "  {:<56} {}", format!("{}{}", value.name, labels(&value.labels)), value.value);
    }
    for times in times {
        let count: u64 = times.buckets.iter().sum();
        if let Some(mean_ns) = times.sum_ns.checked_div(count) {
            let name = format!("{}{}", times.name, labels(&times.labels));
            let _ = writeln!(text, "  {name:<56} {count}, {} on average", duration(mean_ns));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(incarnation: u32, what: &str, time_ns: u64, took_ns: u64, addr: u64) -> Line {
        Line { incarnation, what: what.to_owned(), time_ns, took_ns, addr, trace: "7".to_owned(), ..Line::default() }
    }

    fn dead() -> PostMortem {
        let service = Service {
            name: "pager".to_owned(),
            state: "ready".to_owned(),
            pid: 9,
            incarnation: 2,
            last_exit: "signal: 9 (SIGKILL)".to_owned(),
            values: vec![Value { name: "cpu_faults".to_owned(), labels: Vec::new(), counter: true, value: 4 }],
            ..Service::default()
        };
        let started = Line { value: 8, ..line(1, "started", 1, 0, 0) };
        let lines = vec![
            started,
            line(1, "migrate-start", 10, 0, 0x1000),
            line(1, "migrate-end", 20, 10, 0x1000),
            line(1, "cpu-fault", 30, 0, 0x2000),
            line(2, "started", 40, 0, 0),
            line(2, "cpu-fault", 50, 0, 0x3000),
        ];
        PostMortem { service, lines, lost: 5 }
    }

    #[test]
    fn the_dead_one_is_looked_at_and_what_it_had_begun() {
        let dead = dead();
        assert_eq!(dead.incarnation(), 1);
        let unfinished: Vec<u64> = dead.unfinished(1).iter().map(|line| line.addr).collect();
        assert_eq!(unfinished, [0x2000]);
        let text = dead.text(1, 2);
        for part in [
            "incarnation 1, pid 8",
            "SIGKILL",
            "Begun and not ended: 1",
            "0x2000",
            "Last events (2 of 4)",
            "cpu_faults",
            "5 older",
        ] {
            assert!(text.contains(part), "{part} is missing in:\n{text}");
        }
        assert!(!text.contains("0x3000"), "that is the living one's:\n{text}");
    }

    #[test]
    fn of_one_that_is_held_the_last_incarnation_counts() {
        let mut held = dead();
        (held.service.pid, held.service.state) = (0, "held".to_owned());
        assert_eq!(held.incarnation(), 2);
        assert!(held.text(2, 9).contains("It is held since: signal: 9"));
    }
}
