//! `--age`: how much of a program's memory could be taken at which age, before anything is.
//!
//! ```text
//!   blocks in memory --by chance--> rest in scratch (pager/service/src/rest.rs), up to 0.1, 1 or 10 s, and then they stay
//!                                     |-- touched after t: in use at age t
//!                                     `-- not touched: older than that, nobody knows how much
//! ```
//! A few blocks rest at a time, so the program hardly notices; what was seen of them is what holds of all (Kaplan and Meier's estimate: blocks
//! that were given up early count as long as they were looked at). What the kernel tells of accesses (idle page tracking, DAMON's virtual
//! addresses) is not there on every kernel, and never for an ordinary user.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use uhmm_kernel_hook::{AddrRange, PAGE_SIZE, PidFd};
use uhmm_sdk::{MoveId, Operator, Rest, Rested};
use uhmm_watch::events::{bytes, duration};

use super::memory::{Hand, Process, blocks, resident, stretches};
use super::policy::BLOCK_BYTES;
use super::rules::LeftAlone;
use crate::rng::Rng;

/// How long blocks rest, in turns.
const RESTS: [Duration; 3] = [Duration::from_millis(100), Duration::from_secs(1), Duration::from_secs(10)];
/// Blocks that rest at a time, for each of these.
const AT_A_TIME: usize = 4;
/// The ages that are told.
const AGES: [Duration; 4] =
    [Duration::from_millis(10), Duration::from_millis(100), Duration::from_secs(1), Duration::from_secs(9)];
/// Between two looks at which blocks there are.
const SCAN_EVERY: Duration = Duration::from_secs(1);
/// What the newest look counts beside those before.
const NEWEST_WEIGHT: f64 = 0.3;
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A block that rests.
#[derive(Clone, Copy, Debug)]
struct Probe {
    begun: Instant,
    turn: usize,
}

/// What became of one.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Seen {
    after: Duration,
    touched: bool,
}

/// See the module head.
pub struct Ages {
    device: u8,
    rng: Rng,
    blocks: Vec<(u32, u64)>,
    scanned: Option<Instant>,
    probes: HashMap<MoveId, Probe>,
    seen: Vec<Seen>,
    /// Of the blocks drawn since the last scan: those that turned out not to be managed, and all.
    unmanaged: u32,
    drawn: u32,
    /// What is managed, by the last scans.
    managed_bytes: f64,
    pub resident_bytes: u64,
    told: Instant,
}

impl Ages {
    pub fn new(device: u8) -> Self {
        Self {
            device,
            rng: Rng::new(2),
            blocks: Vec::new(),
            scanned: None,
            probes: HashMap::new(),
            seen: Vec::new(),
            unmanaged: 0,
            drawn: 0,
            managed_bytes: 0.0,
            resident_bytes: 0,
            told: Instant::now(),
        }
    }

    /// Takes what has ended, and lets others rest. Returns when to look again.
    pub fn look(&mut self, operator: &mut Operator, pids: &[u32]) -> Duration {
        if self.scanned.is_none_or(|at| at.elapsed() >= SCAN_EVERY) {
            self.scan(pids);
        }
        match operator.moves_done(Duration::ZERO) {
            Ok(ended) => {
                for (id, result) in ended {
                    if let Some(probe) = self.probes.remove(&id) {
                        self.note(probe, result.ok());
                    }
                }
            }
            Err(error) => tracing::debug!(%error, "What became of blocks is not known"),
        }
        for turn in 0..RESTS.len() {
            let resting = self.probes.values().filter(|probe| probe.turn == turn).count();
            for _ in resting..AT_A_TIME {
                self.begin(operator, turn);
            }
        }
        LOOK_EVERY
    }

    fn scan(&mut self, pids: &[u32]) {
        self.note_managed();
        let nothing = LeftAlone::default();
        let processes: BTreeMap<u32, Process> =
            pids.iter().filter_map(|pid| Some((*pid, Process::open(*pid, &nothing)?))).collect();
        self.blocks.clear();
        for (pid, range) in stretches(&processes, Hand::default()) {
            let present = processes.get(&pid).map(|process| process.present(range)).unwrap_or_default();
            self.blocks.extend(blocks(&present).into_keys().map(|addr| (pid, addr)));
        }
        self.resident_bytes = resident(pids);
        self.scanned = Some(Instant::now());
    }

    /// Blocks are drawn evenly from all that are in memory, so of those as many are managed as of all.
    fn note_managed(&mut self) {
        let (unmanaged, drawn) = (std::mem::take(&mut self.unmanaged), std::mem::take(&mut self.drawn));
        if drawn > 0 {
            let share = 1.0 - f64::from(unmanaged.min(drawn)) / f64::from(drawn);
            let bytes = (self.blocks.len() as u64 * BLOCK_BYTES) as f64 * share;
            let weight = if self.managed_bytes == 0.0 { 1.0 } else { NEWEST_WEIGHT };
            self.managed_bytes += (bytes - self.managed_bytes) * weight;
        }
    }

    fn begin(&mut self, operator: &mut Operator, turn: usize) {
        let at = self.rng.below(self.blocks.len() as u64);
        let Some((pid, start)) = self.blocks.get(at as usize).copied() else { return };
        let Ok(process) = PidFd::open(pid) else { return };
        let ms = u32::try_from(RESTS[turn].as_millis()).unwrap_or(u32::MAX);
        let rest = Rest { ms, stays: true };
        let range = AddrRange { start, len: BLOCK_BYTES };
        match operator.begin_move(&process, range, self.device, Some(rest)) {
            Ok(id) => {
                self.drawn += 1;
                self.probes.insert(id, Probe { begun: Instant::now(), turn });
            }
            Err(error) => tracing::debug!(pid, %range, %error, "A block does not rest"),
        }
    }

    fn note(&mut self, probe: Probe, rested: Option<Rested>) {
        let Some(rested) = rested.filter(|rested| rested.refused_pages == 0) else { return };
        let after = probe.begun.elapsed();
        match (rested.busy_pages, rested.untouched_pages) {
            (0, 0) => self.unmanaged += 1,
            (0, _) => self.seen.push(Seen { after: after.min(RESTS[probe.turn]), touched: false }),
            _ => self.seen.push(Seen { after, touched: true }),
        }
    }

    /// A table, so often as is wanted.
    pub fn due(&mut self, every: Duration) -> Option<String> {
        if self.told.elapsed() < every {
            return None;
        }
        self.told = Instant::now();
        Some(self.text())
    }

    /// The table, for a person.
    pub fn text(&self) -> String {
        // Those that rest yet have been looked at for so long, too: without them the quick ones would count for more than they are.
        let resting = self.probes.values().map(|probe| Seen { after: probe.begun.elapsed(), touched: false });
        let seen: Vec<Seen> = self.seen.iter().copied().chain(resting).collect();
        let mut text = format!(
            "uhmm run --age: of {} in blocks of 64 KiB that can leave, by {} looks at single ones:\n",
            bytes(self.managed_bytes as u64),
            seen.len()
        );
        for age in AGES {
            let untouched = format!("  nobody touches for {:>6}:", duration(age.as_nanos() as u64));
            text += &match untouched_for(&seen, age) {
                Some((share, error)) => format!(
                    "{untouched} {:>9}, {:.0} % (+-{:.0})\n",
                    bytes((self.managed_bytes * share) as u64 / PAGE_SIZE * PAGE_SIZE),
                    share * 100.0,
                    error * 100.0
                ),
                None => format!("{untouched}   unknown, it did not run for so long\n"),
            };
        }
        text
    }
}

/// The share of blocks that nobody touches for so long, and how far off that may be (19 of 20 times). `None`: none was looked at for so long.
fn untouched_for(seen: &[Seen], age: Duration) -> Option<(f64, f64)> {
    let mut times: Vec<Seen> = seen.to_vec();
    times.sort_by_key(|seen| (seen.after, !seen.touched));
    let (mut share, mut variance) = (1.0, 0.0);
    for (index, seen) in times.iter().enumerate() {
        if seen.after >= age {
            return Some((share, 1.96 * share * f64::sqrt(variance)));
        }
        if seen.touched {
            let left = (times.len() - index) as f64;
            share *= 1.0 - 1.0 / left;
            if left > 1.0 {
                variance += 1.0 / (left * (left - 1.0));
            }
        }
    }
    // All that were looked at were touched before.
    times.last().filter(|last| last.touched).map(|_| (0.0, 0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(ms: u64, touched: bool) -> Seen {
        Seen { after: Duration::from_millis(ms), touched }
    }

    #[test]
    fn without_any_given_up_it_is_the_plain_share() {
        let all: Vec<Seen> = (1..=100).map(|ms| seen(ms, true)).collect();
        let share = |ms| untouched_for(&all, Duration::from_millis(ms)).unwrap().0;
        assert!((share(26) - 0.75).abs() < 1e-9 && (share(51) - 0.5).abs() < 1e-9);
        assert_eq!(share(1), 1.0);
        assert_eq!(untouched_for(&all, Duration::from_secs(1)), Some((0.0, 0.0)));
    }

    #[test]
    fn those_that_were_given_up_count_as_long_as_they_were_looked_at() {
        // Half is hot; of the rest a part was looked at for 100 ms only, and those that were looked at for longer were touched by half then.
        let mut all = vec![seen(1, true); 50];
        all.extend(vec![seen(100, false); 30]);
        all.extend(vec![seen(500, true); 10]);
        all.extend(vec![seen(1000, false); 10]);
        let share = |ms| untouched_for(&all, Duration::from_millis(ms)).map(|(share, _)| (share * 1000.0).round());
        assert_eq!((share(100), share(1000), share(1001)), (Some(500.0), Some(250.0), None));
        let (_, error) = untouched_for(&all, Duration::from_millis(100)).unwrap();
        assert!((0.09..0.11).contains(&error), "{error}");
        assert_eq!(untouched_for(&[], Duration::ZERO), None);
    }

    #[test]
    fn as_much_is_managed_as_of_the_blocks_that_were_drawn() {
        let mut ages = Ages::new(0);
        ages.blocks = vec![(1, 0); 1024];
        (ages.drawn, ages.unmanaged) = (40, 10);
        ages.note_managed();
        assert_eq!((ages.managed_bytes, ages.drawn, ages.unmanaged), (f64::from(48 << 20), 0, 0));
        ages.note_managed();
        assert_eq!(ages.managed_bytes, f64::from(48 << 20), "nothing was drawn since");
        ages.drawn = 10;
        ages.note_managed();
        assert!(ages.managed_bytes > f64::from(48 << 20) && ages.managed_bytes < f64::from(64 << 20));
    }

    #[test]
    fn the_table_says_what_is_not_known() {
        let mut ages = Ages::new(0);
        ages.managed_bytes = f64::from(64 << 20);
        ages.seen = vec![seen(1, true), seen(100, false), seen(100, false), seen(100, false)];
        let text = ages.text();
        assert!(text.contains("75 %") && text.contains("48 MiB") && text.contains("unknown"), "{text}");
    }
}
