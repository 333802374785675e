//! kill -9 of two processes of the system at any distance, in every order, under load: no byte is wrong or zero, and nobody hangs.
//!
//! The load is a process of its own with two threads: allocated memory that is written, migrated and read by CPU and device; adopted memory that
//! is written by CPU and device, migrated, and forked into a child that never attaches and compares what it got. After every pair each of them
//! must come through a whole turn. (Whoever starts supervisors again must not be a client: a fork waits for the pager, with the C library's
//! locks held.)
//!
//! `UHMM_PAIRS=300 [UHMM_PAIRS_SEED=7] [UHMM_PAIRS_OF=pager,soft0] cargo nextest run --release -p uhmm-tests random_pairs`: so many random
//! pairs (of these alone) instead of few, with each kind of device.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Signal;
use uhmm_kernel_hook::PidFd;
use uhmm_kernel_hook::fork::{Ended, fork_child};
use uhmm_kernel_hook::program::ProgramMemory;
use uhmm_sdk::{Device, ErrorCode, Region, Session, Target};
use uhmm_tests::process::threads;
use uhmm_tests::{TestBed, manifest, pattern::Rng, pattern::word};

const MIB: u64 = 1 << 20;
const SHARED_LEN: u64 = 2 * MIB;
const PRIVATE_LEN: u64 = MIB;
/// Whatever takes so long hangs.
const HANGS: Duration = Duration::from_secs(60);
/// Random pairs of each kind of device when nothing else is said.
const PAIRS: u64 = 15;
/// Whoever can be killed: services of the plan, those who keep, and the process that keeps the pager's descriptors.
const VICTIMS: [&str; 6] = ["pager", "mirror", "soft0", "supervisor", "holder", "fd-keeper"];

/// Where the load's process finds its system.
const RUN_DIR: &str = "UHMM_PAIRS_RUN_DIR";

struct Load<'a> {
    session: &'a Session,
    device: &'a Device,
    which: usize,
}

impl Load<'_> {
    fn run(&self, mut turn: impl FnMut(u64)) {
        for number in 1.. {
            say(&format!("begun {} {number}", self.which));
            turn(number);
            say(&format!("ended {} {number}", self.which));
        }
    }

    fn out(&self, addr: u64, len: u64) {
        let report = self.session.migrate(addr, len, self.device).expect("migrate out");
        // A page that the CPU has touched meanwhile is at home, and a driver that died may have lost its copy: all are accounted for.
        assert_eq!(report.runs.iter().map(|run| run.page_count).sum::<u64>(), len / 4096, "{report:?}");
    }

    /// The device's view. A read is repeated for us.
    fn device_sees(&self, addr: u64, len: u64, seed: u64, what: &str) {
        let mut bytes = vec![0; len as usize];
        self.device.read(addr, &mut bytes).unwrap_or_else(|error| panic!("{what}: the device reads: {error}"));
        let words = bytes.chunks_exact(8).map(|bytes| u64::from_ne_bytes(bytes.try_into().expect("8 bytes")));
        compare(words, seed, 0, &format!("{what}, device"));
    }
}

fn compare(words: impl Iterator<Item = u64>, seed: u64, first: u64, what: &str) {
    let mut wrong = (first..).zip(words).filter(|(index, found)| *found != word(seed, *index));
    let Some((index, found)) = wrong.next() else { return };
    let (more, older) = (wrong.count(), (0..seed).rev().find(|seed| word(*seed, index) == found));
    panic!("{what}: word {index} of version {seed} is {found:#x} (version {older:?}), and {more} more are wrong");
}

fn shared_load(load: &Load<'_>, region: &Region) {
    let read = |index: u64| region.read_u64(index * 8).expect("inside");
    load.run(|turn| {
        for index in 0..SHARED_LEN / 8 {
            region.write_u64(index * 8, word(turn, index)).expect("inside");
        }
        load.out(region.addr(), SHARED_LEN);
        load.device_sees(region.addr(), SHARED_LEN, turn, "shared");
        // A part comes home by faults, the rest by request.
        compare((0..SHARED_LEN / 32).map(read), turn, 0, "shared, faults");
        load.session.migrate(region.addr(), SHARED_LEN, Target::Home).expect("migrate home");
        compare((0..SHARED_LEN / 8).map(read), turn, 0, "shared, home");
    });
}

/// A child that compares what it has got when it is let go.
struct Reader {
    child: uhmm_kernel_hook::fork::Child,
    go: OwnedFd,
}

impl Reader {
    fn fork(memory: &ProgramMemory, seed: u64) -> Self {
        let (wait, go) = rustix::pipe::pipe().expect("a pipe");
        let child = fork_child(|| {
            if !matches!(rustix::io::read(&wait, &mut [0]), Ok(1)) {
                return 2;
            }
            let wrong = |index: &u64| memory.load_u64(index * 8).ok() != Some(word(seed, *index));
            match (0..PRIVATE_LEN / 8).find(wrong) {
                None => 0,
                Some(index) => {
                    let found = memory.load_u64(index * 8);
                    let expected = word(seed, index);
                    drop(writeln!(std::io::stderr(), "child: word {index} is {found:x?}, not {expected:#x}"));
                    1
                }
            }
        });
        Self { child: child.expect("fork"), go }
    }

    fn must_be_right(self) {
        rustix::io::write(&self.go, &[1]).expect("the child waits");
        let timeout = Timespec { tv_sec: HANGS.as_secs().cast_signed(), tv_nsec: 0 };
        let ended = rustix::event::poll(&mut [PollFd::new(self.child.pidfd(), PollFlags::IN)], Some(&timeout));
        assert_eq!(ended, Ok(1), "a forked child hangs");
        assert_eq!(self.child.wait().expect("reap"), Ended::Code(0), "a forked child has other bytes");
    }
}

fn private_load(load: &Load<'_>, memory: &ProgramMemory) {
    let half = PRIVATE_LEN / 2;
    let read = |index: u64| memory.load_u64(index * 8).expect("inside");
    load.run(|turn| {
        let (old, new) = (turn * 2, turn * 2 + 1);
        for index in 0..PRIVATE_LEN / 8 {
            memory.store_u64(index * 8, word(old, index)).expect("inside");
        }
        load.out(memory.addr(), PRIVATE_LEN);
        let reader = Reader::fork(memory, old);
        let bytes: Vec<u8> = (0..half / 8).flat_map(|index| word(new, index).to_ne_bytes()).collect();
        // What is not repeated for us by itself is repeated here: it writes the same again.
        while let Err(error) = load.device.write(memory.addr(), &bytes) {
            assert_eq!(error.code(), ErrorCode::Stale, "the device writes: {error}");
        }
        load.device_sees(memory.addr(), half, new, "private");
        compare((0..half / 8).map(read), new, 0, "private, written by the device");
        compare((half / 8..PRIVATE_LEN / 8).map(read), old, half / 8, "private, untouched");
        reader.must_be_right();
        compare((half / 8..PRIVATE_LEN / 8).map(read), old, half / 8, "private, after the child");
    });
}

/// To the test. Whoever cannot tell it is not wanted any more.
fn say(line: &str) {
    if writeln!(std::io::stdout(), "{line}").is_err() {
        std::process::exit(0);
    }
}

/// What is wrong ends the load at once: other threads could go on for ever.
fn guarded(work: impl FnOnce()) {
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
        std::process::abort();
    }
}

#[test]
#[ignore = "the load of the other tests here, in a process of its own"]
fn load() {
    let run_dir = std::env::var_os(RUN_DIR).expect("it is started by the other tests");
    let session = &Session::connect(Some(Path::new(&run_dir))).expect("a session");
    let device = &session.device("soft0").expect("device");
    let region = &session.allocate(SHARED_LEN).expect("region");
    let memory = &ProgramMemory::private(PRIVATE_LEN).expect("memory");
    let _adopted = session.adopt(memory.addr(), PRIVATE_LEN).expect("adopt");
    let load = |which| Load { session, device, which };
    std::thread::scope(|scope| {
        scope.spawn(move || guarded(|| shared_load(&load(0), region)));
        scope.spawn(move || guarded(|| private_load(&load(1), memory)));
    });
}

/// The load as the test sees it. Killed when it is dropped.
struct Loaded {
    child: Child,
    turns: Arc<[(AtomicU64, AtomicU64); 2]>,
    gone: Arc<AtomicBool>,
}

impl Loaded {
    fn start(bed: &TestBed) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", "load", "--ignored", "--nocapture"]).env(RUN_DIR, bed.run_dir());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("the load starts");
        let lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let (turns, gone) = (Arc::<[(AtomicU64, AtomicU64); 2]>::default(), Arc::<AtomicBool>::default());
        let (told, over) = (Arc::clone(&turns), Arc::clone(&gone));
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let mut words = line.split(' ');
                let (what, which, number) = (words.next(), words.next(), words.next());
                let number = number.and_then(|word| word.parse::<u64>().ok());
                let turns = which.and_then(|word| told.get(word.parse::<usize>().ok()?));
                match (what, turns, number) {
                    (Some("begun"), Some((begun, _)), Some(number)) => begun.store(number, Ordering::Release),
                    (Some("ended"), Some((_, ended)), Some(number)) => ended.store(number, Ordering::Release),
                    _ => {}
                }
            }
            over.store(true, Ordering::Release);
        });
        Self { child, turns, gone }
    }

    /// Each of its threads comes through a whole turn.
    fn must_go_on(&self, what: &str) {
        let end = Instant::now() + HANGS;
        for (begun, ended) in self.turns.iter() {
            let next = begun.load(Ordering::Acquire) + 1;
            while ended.load(Ordering::Acquire) < next {
                assert!(!self.gone.load(Ordering::Acquire), "{what}: the load has found something wrong");
                assert!(Instant::now() < end, "{what}: the load hangs\n{}", threads(self.child.id()));
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_ready(bed: &TestBed, what: &str) {
    let end = Instant::now() + HANGS;
    loop {
        let services = bed.operator().status().expect("status");
        if services.iter().all(|service| service.state == "ready") {
            return;
        }
        assert!(Instant::now() < end, "{what}: not ready again: {services:#?}");
        std::thread::yield_now();
    }
}

/// The process that shares the pager's descriptors.
fn fd_keeper(pager: u32) -> Option<PidFd> {
    let pids = std::fs::read_dir("/proc").expect("proc").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_keeper = |pid: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.starts_with("Name:\tuhmm-fd-keeper") && status.contains(&format!("\nPPid:\t{pager}\n"))
    };
    pids.filter(is_keeper).find_map(|pid| PidFd::open(pid).ok())
}

fn victim(bed: &TestBed, name: &str) -> Option<PidFd> {
    match name {
        "supervisor" => PidFd::open(bed.supervisor_pid()).ok(),
        "fd-keeper" => fd_keeper(bed.status("pager").pid),
        service => PidFd::open(bed.status(service).pid).ok(),
    }
}

/// Half of them almost at once, the others somewhere in what the first death has begun.
fn distance(rng: &mut Rng) -> Duration {
    let longest_us = if rng.below(2) == 0 { 200 } else { 30_000 };
    Duration::from_micros(rng.below(longest_us))
}

fn pause(time: Duration) {
    let until = Instant::now() + time;
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}

fn kill_pair(bed: &mut TestBed, (first, second): (&str, &str), rng: &mut Rng) {
    // Found before, because the supervisor may be the first to die.
    let mut victims = [victim(bed, first), victim(bed, second)];
    let dead = if first == second { bed.status(first).incarnation } else { 0 };
    pause(Duration::from_micros(rng.below(20_000)));
    let distance = distance(rng);
    for index in 0..2 {
        if index == 1 && first == second {
            victims[1] = next_of(bed, first, dead);
        }
        if index == 1 {
            pause(distance);
        }
        if let Some(victim) = &victims[index] {
            victim.signal(Signal::KILL).expect("kill");
        }
    }
    if [first, second].contains(&"supervisor") {
        // Whoever looks after the supervisor starts it again some time.
        std::thread::sleep(Duration::from_micros(rng.below(40_000)));
        bed.kill_supervisor();
        bed.adopt();
    }
}

/// The next incarnation of one that was just killed, as soon as there is one.
fn next_of(bed: &TestBed, name: &str, dead: u32) -> Option<PidFd> {
    let end = Instant::now() + HANGS;
    loop {
        let found = bed.status(name);
        if found.pid != 0 && found.incarnation > dead {
            return PidFd::open(found.pid).ok();
        }
        assert!(Instant::now() < end, "{name} does not come again: {found:?}");
    }
}

fn pairs(aperture: bool, pairs: impl IntoIterator<Item = (&'static str, &'static str)>, seed: u64) {
    let options = if aperture { "" } else { "aperture = false" };
    let mut bed = TestBed::with_manifest(&manifest("6MiB", options));
    let load = Loaded::start(&bed);
    load.must_go_on("before the first pair");
    let mut rng = Rng::new(seed);
    for (number, pair) in pairs.into_iter().enumerate() {
        let what = format!("seed {seed}, aperture {aperture}, pair {number}: {} then {}", pair.0, pair.1);
        kill_pair(&mut bed, pair, &mut rng);
        wait_ready(&bed, &what);
        load.must_go_on(&what);
    }
}

fn every_pair() -> impl Iterator<Item = (&'static str, &'static str)> {
    let all = VICTIMS.into_iter().flat_map(|first| VICTIMS.into_iter().map(move |second| (first, second)));
    // The same one twice: its next incarnation, in the middle of what it does first. A supervisor has none that comes by itself.
    all.filter(|(first, second)| first != second || !["supervisor", "fd-keeper"].contains(first))
}

#[test]
fn integration_pairs_of_every_kind_with_aperture() {
    pairs(true, every_pair(), 1);
}

#[test]
fn integration_pairs_of_every_kind_without_aperture() {
    pairs(false, every_pair(), 2);
}

#[test]
fn integration_random_pairs() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (count, seed) = (number("UHMM_PAIRS").unwrap_or(PAIRS), number("UHMM_PAIRS_SEED").unwrap_or(3));
    let of = std::env::var("UHMM_PAIRS_OF").unwrap_or_default();
    let wanted = |name: &str| of.is_empty() || of.split(',').any(|wanted| wanted == name);
    for aperture in [true, false] {
        let mut rng = Rng::new(seed + u64::from(aperture));
        let all: Vec<_> = every_pair().filter(|(first, second)| wanted(first) && wanted(second)).collect();
        let random: Vec<_> = (0..count).map(|_| all[rng.below(all.len() as u64) as usize]).collect();
        pairs(aperture, random, seed);
    }
}
