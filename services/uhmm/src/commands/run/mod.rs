//! `uhmm run -- PROGRAM`: a program that knows nothing of uhmm, with all its private memory under management.
//!
//! ```text
//!   uhmm run ---- uhmm up (one of its own, where none runs) ---- pager, mirror, driver of the far memory
//!      |  |                                                        ^
//!      |  `-- limit: looks, asks the policy, MoveRange ------------'
//!      `-- program, with libuhmm_preload.so: session, agent, adopt_all
//! ```
//! The program is a child of this process: signals go on to it, and its exit status is this one's. Nothing in the program decides where its
//! pages are, so this process may be killed at any time: the program runs on, and only its limit is not held any more.

mod adverse;
mod age;
mod auto;
mod history;
mod limit;
mod memory;
mod policy;
mod program;
mod rules;
mod summary;
mod system;

use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use uhmm_kernel_hook::signal::StopSignals;
use uhmm_kernel_hook::{PAGE_SIZE, PidFd};
use uhmm_manifest::ByteSize;
use uhmm_watch::events::bytes;
use uhmm_watch::sample::{Sample, Sampler};

use self::age::Ages;
use self::auto::{Auto, Measured, STEP_EVERY};
use self::history::History;
use self::limit::Limit;
use self::program::Unsuitable;
use self::rules::Rules;
use self::summary::{Summary, Waits};
use self::system::place;
use super::FarFile;

/// Between two samples of where everything is, without a limit to hold between two looks.
const SAMPLE_EVERY: Duration = Duration::from_millis(500);
/// A limit below this holds no program's code and stacks.
const RAM_MIN_BYTES: u64 = 16 << 20;
/// More than any machine has.
const NO_LIMIT_BYTES: u64 = 1 << 60;
/// Of `uhmm run` itself.
const FAILED: u8 = 125;
const LIBRARY: &str = "libuhmm_preload.so";

/// `uhmm run`
#[derive(clap::Args, Clone)]
pub struct RunArgs {
    /// Device of a running system that the program's memory goes to [default: the one with the most free memory]
    #[arg(long, conflicts_with_all = ["far", "soft"])]
    device: Option<String>,
    /// What the program and its children may have in memory, as in 512MiB; the rest lives on the device
    #[arg(long, value_name = "SIZE")]
    ram: Option<ByteSize>,
    /// Find the limit while the program runs: what it does not use leaves, and it has back at once what it needs
    #[arg(long, conflicts_with = "ram")]
    auto: bool,
    /// Which policy chooses what leaves, and what is left alone (docs/run.md, "Policy files")
    #[arg(long, value_name = "FILE", conflicts_with = "age")]
    policy: Option<PathBuf>,
    /// Take nothing, and say at the end how much could be taken at which age
    #[arg(long, conflicts_with_all = ["ram", "auto"])]
    age: bool,
    /// With --age: say it so often, too
    #[arg(long, value_name = "SECONDS", requires = "age", value_parser = clap::value_parser!(u64).range(1..))]
    every: Option<u64>,
    /// A system of its own, with far memory in a file: as in 8GiB or 8GiB:/data/far0 [default: 4 times --ram below /var/tmp]
    #[arg(long, value_name = "SIZE[:PATH]", conflicts_with = "soft")]
    far: Option<FarFile>,
    /// A system of its own, with the software device: its memory is this machine's, so it saves none. For trying things out
    #[arg(long, value_name = "SIZE")]
    soft: Option<ByteSize>,
    /// Say at the end what it came to: memory, what left, waits for pages
    #[arg(long)]
    stats: bool,
    /// Write the same as JSON
    #[arg(long, value_name = "FILE.json")]
    stats_json: Option<PathBuf>,
    /// Draw what was in memory, and what was on the device, over the program's life
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Where the program cannot run with uhmm (it is static, setuid, ...), run it without
    #[arg(long)]
    or_without: bool,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, required = true, value_name = "PROGRAM")]
    command: Vec<OsString>,
}

/// Runs the program; its exit status is the answer.
pub fn run(args: &RunArgs, run_dir: Option<&Path>) -> anyhow::Result<ExitCode> {
    let name = args.command.first().context("Say which program: uhmm run -- PROGRAM")?;
    if let Some(ram) = args.ram.filter(|ram| ram.0 < RAM_MIN_BYTES) {
        bail!("--ram {} holds no program: give {} at least", bytes(ram.0), bytes(RAM_MIN_BYTES));
    }
    let rules = match &args.policy {
        Some(_) if args.ram.is_none() && !args.auto => {
            bail!("--policy says what leaves, and nothing does without a limit: give --ram SIZE or --auto, too")
        }
        Some(path) => Rules::read(path)?,
        None => Rules::default(),
    };
    match program::find(name, std::env::var_os("PATH")).and_then(|path| program::check(&path)) {
        Ok(()) => {}
        Err(why) if why.runs_without() && args.or_without => return without(&args.command, &why),
        Err(why) => {
            eprintln!("Error: {why}");
            return Ok(ExitCode::from(why.exit_code()));
        }
    }
    Ok(with(args, &rules, run_dir).unwrap_or_else(|error| {
        eprintln!("Error: {error:#}");
        ExitCode::from(FAILED)
    }))
}

/// Becomes the program.
fn without(command: &[OsString], why: &Unsuitable) -> anyhow::Result<ExitCode> {
    eprintln!("uhmm run: runs without uhmm: {why}");
    let error = Command::new(&command[0]).args(&command[1..]).exec();
    Err(error).with_context(|| format!("{} cannot be executed", command[0].display()))
}

fn with(args: &RunArgs, rules: &Rules, run_dir: Option<&Path>) -> anyhow::Result<ExitCode> {
    let library = library()?;
    // Before the first child and thread, so that a signal never ends this process and leaves the program without its system.
    let signals = StopSignals::block_to_pass_on()?;
    let place = place(args, run_dir)?;
    let mut sampler = Sampler::connect(Some(&place.run_dir))?;
    let waits_before = Waits::of(&sampler.sample()?);
    let begun = Instant::now();
    let mut child = start(args, &place.run_dir, &library, &signals)?;
    let mut run = Run {
        only_system: place.own.is_some(),
        main: child.id(),
        pids: vec![child.id()],
        limit: limit(args, rules, place.device),
        auto: args.auto.then(Auto::default),
        ages: args.age.then(|| Ages::new(place.device)),
        every: args.every.map(Duration::from_secs),
        sampler,
        sampled: None,
        summary: Summary { ram_bytes: args.ram.map(|ram| ram.0), ..Summary::default() },
        waits_before,
        begun,
        away_bytes: 0,
        history: History::default(),
    };
    let status = run.until_the_end(&mut child, &signals)?;
    run.summary.ran = begun.elapsed();
    run.tell(args);
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(i32::from(FAILED));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(FAILED)))
}

fn limit(args: &RunArgs, rules: &Rules, device: u8) -> Option<Limit> {
    let limit = |bytes| Limit::new(bytes, device, rules.policy(), rules.left_alone());
    match args.ram {
        Some(ram) => Some(limit(ram.0)),
        None => args.auto.then(|| limit(NO_LIMIT_BYTES).patient()),
    }
}

/// What is preloaded: as it was installed, or what `UHMM_RUN_LIBRARY` names.
fn library() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("UHMM_RUN_LIBRARY") {
        return Ok(path.into());
    }
    let exe = std::env::current_exe().context("The path of this program is unknown")?;
    let folder = exe.parent().context("The path of this program has no folder")?;
    let places = [folder.join(LIBRARY), folder.join("../lib/uhmm").join(LIBRARY)];
    let found = places.iter().find(|path| path.is_file());
    let path = found.with_context(|| {
        format!(
            "{LIBRARY} is neither in {} nor in ../lib/uhmm: build it with `cargo build --release -p uhmm-preload`",
            folder.display()
        )
    })?;
    let path = std::fs::canonicalize(path)?;
    // ld.so takes both for separators.
    if path.as_os_str().as_encoded_bytes().iter().any(|byte| *byte == b':' || byte.is_ascii_whitespace()) {
        bail!("{} cannot be preloaded, because its path has a colon or a space: move uhmm elsewhere", path.display());
    }
    Ok(path)
}

/// As `uhmm run` would have been started by whoever starts the program: its environment, and what is preloaded beside ours.
fn start(args: &RunArgs, run_dir: &Path, library: &Path, signals: &StopSignals) -> anyhow::Result<Child> {
    let mut preload = library.as_os_str().to_owned();
    if let Some(before) = std::env::var_os("LD_PRELOAD").filter(|before| !before.is_empty()) {
        preload.push(":");
        preload.push(before);
    }
    let mut command = Command::new(&args.command[0]);
    command.args(&args.command[1..]).env("LD_PRELOAD", preload).env("UHMM_RUN_SYSTEM", run_dir);
    if args.or_without {
        command.env("UHMM_RUN_OR_WITHOUT", "1");
    }
    signals.not_for(&mut command);
    command.spawn().with_context(|| format!("{} cannot be started", args.command[0].display()))
}

/// A program that runs.
struct Run {
    /// Whatever is managed there is this program's.
    only_system: bool,
    main: u32,
    /// Its processes that are known: the first one, and its children with managed memory.
    pids: Vec<u32>,
    limit: Option<Limit>,
    /// Changes the limit.
    auto: Option<Auto>,
    ages: Option<Ages>,
    every: Option<Duration>,
    sampler: Sampler,
    sampled: Option<Instant>,
    summary: Summary,
    waits_before: Waits,
    begun: Instant,
    /// As of the last sample.
    away_bytes: u64,
    history: History,
}

impl Run {
    /// Until the program has ended, and on a system of its own everybody whom it has started and who has managed memory.
    fn until_the_end(&mut self, child: &mut Child, signals: &StopSignals) -> anyhow::Result<std::process::ExitStatus> {
        let handle = PidFd::open(self.main)?;
        let mut status = None;
        loop {
            let pause = self.look();
            if status.is_some() && (!self.only_system || self.pids.is_empty()) {
                break;
            }
            let timeout = Timespec::try_from(pause).context("A pause is too long")?;
            let mut sources = vec![PollFd::new(signals, PollFlags::IN)];
            if status.is_none() {
                sources.push(PollFd::new(&handle, PollFlags::IN));
            }
            match poll(&mut sources, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("poll"),
            }
            let ended = sources.get(1).is_some_and(|source| !source.revents().is_empty());
            drop(sources);
            self.pass_on(signals, &handle)?;
            if ended {
                status = Some(child.wait()?);
                // What it has left is seen at once.
                self.sampled = None;
                self.pids.retain(|pid| *pid != self.main);
            }
        }
        status.context("The program has no exit status")
    }

    /// The program gets what this process was sent, but not twice.
    fn pass_on(&self, signals: &StopSignals, program: &PidFd) -> anyhow::Result<()> {
        while let Some(came) = signals.take_one()? {
            let signal = Signal::from_named_raw(came.number).filter(|_| !came.by_kernel);
            if let Some(signal) = signal {
                program.signal(signal)?;
            }
        }
        Ok(())
    }

    /// Looks after the limit, and now and then where everything is. Returns when to look again.
    fn look(&mut self) -> Duration {
        let every = if self.auto.is_some() { STEP_EVERY } else { SAMPLE_EVERY };
        let sampled = self.sampled.is_none_or(|at| at.elapsed() >= every);
        if sampled {
            self.sampled = Some(Instant::now());
            match self.sampler.sample() {
                Ok(sample) => self.take(&sample),
                // A service is being started again: the next one answers.
                Err(error) => tracing::debug!(%error, "No sample"),
            }
        }
        let (resident_bytes, pause) = self.hold(sampled);
        self.summary.peak_resident_bytes = self.summary.peak_resident_bytes.max(resident_bytes);
        self.history.add(self.begun.elapsed(), resident_bytes, self.away_bytes);
        pause
    }

    /// The limit, or what `--age` takes for a try. Returns what is in memory, and when to look again.
    fn hold(&mut self, sampled: bool) -> (u64, Duration) {
        if let Some(ages) = &mut self.ages {
            let pause = ages.look(self.sampler.operator(), &self.pids);
            if let Some(text) = self.every.and_then(|every| ages.due(every)) {
                eprint!("{text}");
            }
            return (ages.resident_bytes, pause);
        }
        let Some(limit) = &mut self.limit else { return (memory::resident(&self.pids), SAMPLE_EVERY) };
        let look = limit.look(self.sampler.operator(), &self.pids);
        if let Some(auto) = self.auto.as_mut().filter(|_| sampled) {
            let (resident_bytes, waited_ns) = (look.resident_bytes, self.summary.waits.sum_ns);
            limit.set(auto.step(Measured { resident_bytes, waited_ns }, Instant::now()).unwrap_or(NO_LIMIT_BYTES));
        }
        (look.resident_bytes, look.pause)
    }

    fn take(&mut self, sample: &Sample) {
        self.summary.waits = Waits::of(sample).since(&self.waits_before);
        let mut pids: Vec<u32> = sample.regions.iter().map(|region| region.pid).collect();
        pids.push(self.main);
        pids.sort_unstable();
        pids.dedup();
        let alive = |pid: &u32| std::fs::exists(format!("/proc/{pid}/exe")).unwrap_or(false);
        pids.retain(|pid| alive(pid) && (self.only_system || self.pids.contains(pid) || descends(*pid, self.main)));
        for gone in self.pids.iter().filter(|pid| !pids.contains(pid)) {
            if let Some(limit) = &mut self.limit {
                limit.ended(*gone);
            }
        }
        let away = |pid: &u32| sample.regions.iter().filter(|region| region.pid == *pid).map(pages_away).sum::<u64>();
        self.away_bytes = pids.iter().map(away).sum::<u64>() * PAGE_SIZE;
        self.summary.peak_away_bytes = self.summary.peak_away_bytes.max(self.away_bytes);
        self.pids = pids;
    }

    fn tell(&mut self, args: &RunArgs) {
        // The last waits are not in the last sample.
        if let Ok(sample) = self.sampler.sample() {
            self.summary.waits = Waits::of(&sample).since(&self.waits_before);
        }
        if let Some(limit) = &self.limit {
            self.summary.limit = limit.tally;
        }
        if let Some(ages) = &self.ages {
            eprint!("{}", ages.text());
        }
        if let Some(warning) = self.summary.warning() {
            eprintln!("{warning}");
        }
        if args.stats {
            eprint!("{}", self.summary.text());
            if let Some(auto) = &self.auto {
                eprint!("{}", auto.text());
            }
        }
        let ram = self.summary.ram_bytes;
        let words: Vec<_> = args.command.iter().map(|word| word.to_string_lossy()).collect();
        let drawn =
            args.plot.as_ref().map(|path| self.history.draw(&format!("uhmm run -- {}", words.join(" ")), ram, path));
        let written = args.stats_json.as_ref().map(|path| {
            let text = format!("{:#}\n", self.summary.json());
            std::fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))
        });
        // The program's own end is the answer all the same.
        for error in [drawn, written].into_iter().flatten().filter_map(Result::err) {
            eprintln!("uhmm run: {error:#}");
        }
    }
}

fn pages_away(region: &uhmm_watch::sample::Region) -> u64 {
    region.device_pages.iter().sum()
}

/// Whether a process was started by another one, or by one that was.
fn descends(pid: u32, from: u32) -> bool {
    let parent = |pid: u32| -> Option<u32> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name before may have spaces and brackets of its own.
        text.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
    };
    let mut at = pid;
    while at > 1 {
        if at == from {
            return true;
        }
        let Some(next) = parent(at) else { return false };
        at = next;
    }
    false
}
