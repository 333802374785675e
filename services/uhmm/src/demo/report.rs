//! The report: what was done, beside what the machine can do, and whether everything held.

use super::measure::Latency;

const BOUNDS_US: [u64; 7] = [8, 16, 32, 64, 128, 256, 1024];
const BAR_CELLS: u64 = 40;
const PAGE_BYTES: u64 = 4096;

/// One kill.
pub struct Drill {
    /// Service.
    pub service: String,
    /// What it was killed in.
    pub during: &'static str,
    /// The supervisor's figure: death to ready.
    pub recovery_ms: u64,
    /// One operation through all services (CPU fault, device fault) before the kill, amid the same work.
    pub usual_ms: f64,
    /// The kill until the first such operation after it was done.
    pub first_operation_ms: f64,
    /// Longest time that one access of the program stood still meanwhile.
    pub longest_pause_ms: f64,
}

/// Everything that is printed.
pub struct Report {
    /// Size of the managed index.
    pub index_bytes: u64,
    /// Bytes per second, medians of the same rounds.
    pub memcpy_rate: f64,
    /// To the device.
    pub out_rate: f64,
    /// Home.
    pub home_rate: f64,
    /// CPU faults through uhmm.
    pub faults: Latency,
    /// The bare floor.
    pub floor: Latency,
    /// Counters summed over incarnations: (name, value).
    pub counters: Vec<(String, u64)>,
    /// Kills.
    pub drills: Vec<Drill>,
    /// Answers compared, answers that differed.
    pub answers: (u64, u64),
    /// Bytes compared at the end, bytes that differed.
    pub bytes: (u64, u64),
}

/// Bytes as MiB.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn gib_s(rate: f64) -> f64 {
    rate / f64::from(1 << 30)
}

impl Report {
    /// Whether all held.
    pub fn held(&self) -> bool {
        self.answers.1 == 0 && self.bytes.1 == 0
    }

    /// Prints it.
    pub fn print(&self) {
        println!("\n== Report");
        println!("  index                {:>10.1} MiB", mib(self.index_bytes));
        println!("  memcpy               {:>10.2} GiB/s  (2 MiB pieces, same run, median)", gib_s(self.memcpy_rate));
        for (name, rate) in [("to the device", self.out_rate), ("home", self.home_rate)] {
            println!("  {name:<20} {:>10.2} GiB/s  {:>4.0} % of memcpy", gib_s(rate), 100.0 * rate / self.memcpy_rate);
        }
        println!("\n  CPU fault (us)            p50      p99    faults");
        for (name, latency) in [("uhmm", &self.faults), ("bare userfaultfd", &self.floor)] {
            let (p50, p99) = (latency.quantile_us(0.5), latency.quantile_us(0.99));
            println!("  {name:<20} {p50:>8.1} {p99:>8.1} {:>9}", latency.count());
        }
        self.print_histogram();
        println!();
        for (name, value) in &self.counters {
            match name.starts_with("pages") {
                true => println!("  {name:<24} {value:>12}  = {:.1} MiB", mib(value * PAGE_BYTES)),
                false => println!("  {name:<24} {value:>12}"),
            }
        }
        println!(
            "\n  kill -9    in the middle of              ready   first operation (usual)   longest pause of an access"
        );
        for drill in &self.drills {
            println!(
                "  {:<10} {:<28} {:>4} ms   {:>8.1} ms ({:>6.2} ms)   {:>8.1} ms",
                drill.service,
                drill.during,
                drill.recovery_ms,
                drill.first_operation_ms,
                drill.usual_ms,
                drill.longest_pause_ms
            );
        }
        println!("\n  answers compared: {}, different: {}", self.answers.0, self.answers.1);
        println!("  bytes compared: {}, bytes lost: {}", self.bytes.0, self.bytes.1);
        println!("\n{}", if self.held() { "Everything held." } else { "NOT EVERYTHING HELD." });
    }

    fn print_histogram(&self) {
        let (ours, floor) = (self.faults.bins(&BOUNDS_US), self.floor.bins(&BOUNDS_US));
        let largest = ours.iter().chain(&floor).copied().max().unwrap_or(0).max(1);
        let bar = |count: u64| "#".repeat((count * BAR_CELLS).div_ceil(largest) as usize);
        let mut from = 0;
        let bounds = BOUNDS_US.iter().map(|bound| Some(*bound)).chain([None]);
        for (index, to) in bounds.enumerate() {
            let label = to.map_or(format!("{from}.."), |to| format!("{from}..{to}"));
            if ours[index] + floor[index] > 0 {
                println!("    {label:>10}  uhmm {:>6} {}", ours[index], bar(ours[index]));
                println!("    {:>10}  bare {:>6} {}", "", floor[index], bar(floor[index]));
            }
            from = to.unwrap_or(from);
        }
    }
}
