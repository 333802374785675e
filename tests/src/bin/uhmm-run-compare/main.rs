//! Programs as they are under `uhmm run`, beside the kernel's own swap in a memory cgroup of the same size, interleaved; every result is compared with
//! that of a plain run. Needs root, cgroup v1's memory controller, zram, and the programs' Debian packages:
//!
//! ```text
//! apt-get install -y --no-install-recommends redis-server memcached sqlite3 nodejs postgresql python3-numpy gcc
//! cargo build --release --locked -p uhmm -p uhmm-preload -p uhmm-tests && target/release/uhmm-run-compare
//!
//!   --programs a,b  --parts all,2,4,8  --rounds N  --mib MIB (256)  --full (1024)  --out FOLDER  --patience SECONDS
//!   --kill SECONDS   only uhmm, with pager and driver killed in turn so often; nothing is measured, results are compared
//! ```
//! `all` is twice the working set: what management costs when nothing must leave. Ends with 1 when any run failed, hung or gave another result.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use uhmm_kernel_hook::signal::StopSignals;
use uhmm_tests::compare::Outcome;
use uhmm_tests::compare::arrange::{Arrangement, Costs, Ground, clean_up_after_the_dead};
use uhmm_tests::compare::programs::{self, Program};
use uhmm_tests::compare::report::{self, Row};

struct Args {
    programs: Vec<String>,
    /// 0: all of it, twice.
    parts: Vec<u64>,
    rounds: usize,
    mib: u64,
    out: Option<PathBuf>,
    patience: Duration,
    kill: Option<Duration>,
}

fn args() -> Result<Args, String> {
    let mut args = Args {
        programs: Vec::new(),
        parts: vec![2, 4, 8],
        rounds: 1,
        mib: 256,
        out: None,
        patience: Duration::from_secs(300),
        kill: None,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut next = || words.next().ok_or_else(|| format!("{word} wants a value"));
        let number = |text: String| text.parse::<u64>().map_err(|error| format!("{text}: {error}"));
        match word.as_str() {
            "--programs" => args.programs = next()?.split(',').map(str::to_owned).collect(),
            "--parts" => {
                let part = |text: &str| if text == "all" { Ok(0) } else { number(text.to_owned()) };
                args.parts = next()?.split(',').map(part).collect::<Result<_, _>>()?;
            }
            "--rounds" => args.rounds = usize::try_from(number(next()?)?).map_err(|error| error.to_string())?,
            "--mib" => args.mib = number(next()?)?,
            "--full" => args.mib = 1024,
            "--out" => args.out = Some(next()?.into()),
            "--patience" => args.patience = Duration::from_secs(number(next()?)?),
            "--kill" => args.kill = Some(Duration::from_secs(number(next()?)?)),
            _ => {
                return Err(format!(
                    "{word} is none of --programs, --parts, --rounds, --mib, --full, --out, --patience, --kill"
                ));
            }
        }
    }
    Ok(args)
}

/// One whole comparison: whoever stops it has everything cleaned up.
struct Comparison<'a> {
    args: &'a Args,
    ground: &'a Ground,
    stop: &'a AtomicBool,
}

impl Comparison<'_> {
    fn run(
        &self,
        program: &Program,
        arrangement: Arrangement,
        ram_bytes: u64,
        set_bytes: u64,
    ) -> Result<(Outcome, Costs), String> {
        if self.stop.load(Ordering::Relaxed) {
            return Err("it was stopped".into());
        }
        let far_bytes = (set_bytes * 4).max(512 << 20);
        let place = self.ground.place(arrangement, ram_bytes, far_bytes)?;
        let ended = AtomicBool::new(false);
        let outcome = std::thread::scope(|scope| {
            let killer = (arrangement == Arrangement::Uhmm).then_some(self.args.kill).flatten();
            if let Some(every) = killer {
                let (place, ended) = (&place, &ended);
                scope.spawn(move || place.kill_in_turn(every, u64::MAX, ended));
            }
            let outcome = program.run(&place, self.args.mib, self.args.patience);
            ended.store(true, Ordering::Relaxed);
            outcome
        })?;
        Ok((outcome, place.costs()?))
    }

    /// The plain run, then all others, interleaved.
    fn compare(&self, program: &Program) -> Result<Vec<Row>, String> {
        let (plain, costs) = self.run(program, Arrangement::Plain, 0, 1 << 30)?;
        let set_bytes = costs.resident_bytes;
        let mut rows = Vec::new();
        for part in &self.args.parts {
            let ram_bytes =
                if *part == 0 { set_bytes * 2 } else { set_bytes / part }.next_multiple_of(1 << 20).max(16 << 20);
            let part = if *part == 0 { "all".to_owned() } else { format!("1/{part}") };
            let mut row = Row { program: program.name, set_bytes, ram_bytes, part, runs: BTreeMap::new() };
            let others: &[Arrangement] = match (self.args.kill, row.part.as_str()) {
                (Some(_), _) => &[Arrangement::Uhmm],
                (None, "all") => &[Arrangement::Plain, Arrangement::Uhmm],
                _ => &[Arrangement::Plain, Arrangement::Uhmm, Arrangement::Zram, Arrangement::SwapFile],
            };
            for arrangement in (0..self.args.rounds).flat_map(|_| others) {
                let run = self.run(program, *arrangement, ram_bytes, set_bytes).and_then(|run| {
                    let same = run.0.result == plain.result;
                    same.then_some(run.clone()).ok_or_else(|| {
                        format!(
                            "{} under {}: {:?} instead of {:?}",
                            program.name,
                            arrangement.name(),
                            run.0.result,
                            plain.result
                        )
                    })
                });
                if let Err(why) = &run {
                    eprintln!("{why}");
                }
                eprintln!(
                    "{} {} {}: {:.1?} s",
                    row.program,
                    row.part,
                    arrangement.name(),
                    run.as_ref().map(|run| run.0.seconds).ok()
                );
                row.runs.entry(*arrangement).or_default().push(run);
            }
            rows.push(row);
        }
        Ok(rows)
    }
}

fn ground(signals: &Arc<StopSignals>) -> Result<Ground, String> {
    let exe = std::env::current_exe().map_err(|error| error.to_string())?;
    let folder = exe.parent().ok_or("this program lies in no folder")?;
    Ground::new(&folder.join("uhmm"), &folder.join("libuhmm_preload.so"), Some(Arc::clone(signals)))?.with_groups()
}

fn compare_all(args: &Args, ground: &Ground, stop: &AtomicBool) -> Result<bool, String> {
    let head = report::head();
    let (mut rows, mut whole) = (Vec::new(), true);
    let known = programs::all();
    if let Some(name) = args.programs.iter().find(|name| known.iter().all(|program| program.name != **name)) {
        let names: Vec<_> = known.iter().map(|program| program.name).collect();
        return Err(format!("{name} is none of {}", names.join(", ")));
    }
    for program in known.iter().filter(|program| {
        (args.programs.is_empty() && !program.only_when_named) || args.programs.iter().any(|name| name == program.name)
    }) {
        program.must_be_installed();
        match (Comparison { args, ground, stop }).compare(program) {
            Ok(more) => rows.extend(more),
            Err(why) => {
                eprintln!("{why}");
                whole = false;
            }
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    let table = report::table(&rows);
    println!("{head}\n\n{table}");
    if let Some(out) = &args.out {
        let write = |name: &str, text: String| {
            std::fs::write(out.join(name), text).map_err(|error| format!("{}: {error}", out.display()))
        };
        write("run-compare.md", format!("{head}\n\n{table}"))?;
        write("run-compare.json", format!("{:#}\n", report::json(&rows, &head)))?;
    }
    let failures: Vec<_> = rows.iter().flat_map(Row::failures).collect();
    failures.iter().for_each(|why| println!("FAILED: {why}"));
    Ok(whole && failures.is_empty())
}

fn main() -> ExitCode {
    // Before any thread: Ctrl-C ends what runs, and everything is cleaned up.
    let signals = Arc::new(StopSignals::block().expect("signals can be blocked"));
    clean_up_after_the_dead();
    let (args, ground) = match args().and_then(|args| Ok((args, ground(&signals)?))) {
        Ok(both) => both,
        Err(why) => {
            eprintln!("Error: {why}");
            return ExitCode::from(2);
        }
    };
    let (stop, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    let done = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                if signals.take_one().is_ok_and(|came| came.is_some()) {
                    stop.store(true, Ordering::Relaxed);
                    ground.end_all();
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| compare_all(&args, &ground, &stop)));
        ended.store(true, Ordering::Relaxed);
        done
    });
    match done {
        Ok(Ok(true)) => ExitCode::SUCCESS,
        Ok(Ok(false)) => ExitCode::FAILURE,
        Ok(Err(why)) => {
            eprintln!("Error: {why}");
            ExitCode::FAILURE
        }
        Err(_) => ExitCode::FAILURE,
    }
}
