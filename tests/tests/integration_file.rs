//! The whole system with far memory in a file: where the bytes are and that nobody can read them, deaths of its driver in the middle of work,
//! and a file that is damaged, shrunk, or somebody else's.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use uhmm_kernel_hook::program::ProgramMemory;
use uhmm_sdk::{Device, Job, PageStatus, Region, Residency, Session, Target};
use uhmm_tests::pattern::{Rng, spin, word};
use uhmm_tests::{RESTART, TestBed, manifest_of, uhmm_exe};

const MIB: u64 = 1 << 20;
const LEN: u64 = 4 * MIB;
const WORDS: u64 = LEN / 8;
const PAGES: u64 = LEN / 4096;
/// In front of the blocks.
const HEADER_BYTES: u64 = MIB;

/// `soft0` and `far0`, which is a file of 16 MiB.
fn manifest(path: &Path, options: &str) -> String {
    let soft = manifest_of(1, "16MiB", "");
    format!(
        r#"{soft}
[[service]]
name = "far0"
kind = "driver"
driver = "file"
{RESTART}

[[device]]
name = "far0"
service = "far0"
path = {path:?}
{options}
"#
    )
}

const SIZE: &str = "memory_bytes = \"16MiB\"";

/// On the disk where the build is: /tmp may be memory.
fn folder() -> tempfile::TempDir {
    let build = uhmm_exe().parent().expect("a folder").to_owned();
    tempfile::Builder::new().prefix("uhmm-far-").tempdir_in(build).expect("a folder")
}

/// A system, and a client with a region. Dropped from top to bottom.
struct Scene {
    region: Region,
    device: Device,
    session: Session,
    bed: TestBed,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Scene {
    fn new(options: &str) -> Self {
        let folder = folder();
        let path = folder.path().join("far0");
        let bed = TestBed::with_log(&manifest(&path, &format!("{SIZE}\n{options}")));
        let session = bed.session();
        let device = session.device("far0").expect("device");
        let region = session.allocate(LEN).expect("region");
        let scene = Self { region, device, session, bed, path, _folder: folder };
        scene.fill(1);
        scene
    }

    fn fill(&self, seed: u64) {
        for index in 0..WORDS {
            self.region.write_u64(index * 8, word(seed, index)).expect("write");
        }
    }

    fn compare(&self, seed: u64, what: &str) {
        for index in 0..WORDS {
            let found = self.region.read_u64(index * 8).expect("read");
            assert_eq!(found, word(seed, index), "{what}: word {index} differs");
        }
    }

    fn sum(&self, seed: u64) {
        let sum = (0..WORDS).fold(0u64, |sum, index| sum.wrapping_add(word(seed, index)));
        let job = Job::new("sum", [self.region.addr(), LEN]).idempotent();
        assert_eq!(self.device.run(job).expect("sum").results, [sum]);
    }

    fn out(&self) {
        let report = self.session.migrate(self.region.addr(), LEN, &self.device).expect("migrate");
        assert!(report.complete(), "{report:?}");
    }

    /// Brings everything home, and says which pages are lost.
    fn home(&self) -> Vec<u64> {
        let mut lost = Vec::new();
        let report = self.session.migrate(self.region.addr(), LEN, Target::Home).expect("migrate home");
        let runs = self.session.residency(self.region.addr(), LEN).expect("residency");
        let mut page = 0;
        for run in runs {
            if run.residency == Residency::Poisoned {
                lost.extend(page..page + run.page_count);
            }
            page += run.page_count;
        }
        assert_eq!(page, PAGES);
        let said = report.runs.iter().filter(|run| run.status == PageStatus::Poisoned);
        assert_eq!(said.map(|run| run.page_count).sum::<u64>(), lost.len() as u64, "{report:?}");
        lost
    }

    fn compare_all_but(&self, seed: u64, lost: &[u64]) {
        for index in (0..WORDS).filter(|index| !lost.contains(&(index / 512))) {
            assert_eq!(self.region.read_u64(index * 8).expect("read"), word(seed, index), "word {index} differs");
        }
    }

    fn file(&self) -> File {
        File::options().read(true).write(true).open(&self.path).expect("the file opens")
    }

    /// Blocks that hold anything, in the file, by their place.
    fn used_blocks(&self) -> Vec<(u64, Vec<u8>)> {
        let file = self.file();
        let len = file.metadata().expect("metadata").len();
        let mut used = Vec::new();
        for at in (HEADER_BYTES..len).step_by(4096) {
            let mut page = vec![0; 4096];
            file.read_exact_at(&mut page, at).expect("read");
            if page.iter().any(|byte| *byte != 0) {
                used.push((at, page));
            }
        }
        used
    }
}

/// Words of the pattern that are in these bytes.
fn readable(blocks: &[(u64, Vec<u8>)]) -> usize {
    let first_words: std::collections::HashSet<u64> = (0..PAGES).map(|page| word(1, page * 512)).collect();
    let begin = |page: &[u8]| u64::from_le_bytes(page[..8].try_into().expect("8 bytes"));
    blocks.iter().filter(|(_, page)| first_words.contains(&begin(page))).count()
}

#[test]
fn integration_file_pages_are_in_the_file_and_nobody_can_read_them() {
    let mut scene = Scene::new("");
    assert!(scene.used_blocks().is_empty());
    scene.out();
    let used = scene.used_blocks();
    assert_eq!((used.len() as u64, readable(&used)), (PAGES, 0), "every page once, and sealed");
    scene.sum(1);
    scene.compare(1, "home again");
    scene.out();
    scene.bed.wait_log("io_uring");
    let metadata = || std::fs::metadata(&scene.path).expect("metadata");
    assert!(metadata().blocks() * 512 > 16 * MIB, "its room is reserved");
    scene.bed.stop();
    assert!(metadata().blocks() * 512 < 4 * MIB, "given back: {} blocks", metadata().blocks());
    std::mem::forget(scene.region);
    std::mem::forget(scene.session);
}

#[test]
fn integration_file_pages_lie_open_only_when_that_is_asked_for() {
    let scene = Scene::new("seal = \"none\"");
    scene.out();
    assert_eq!(readable(&scene.used_blocks()) as u64, PAGES);
    scene.sum(1);
    let killed = scene.bed.kill("far0");
    scene.bed.wait_ready("far0", killed);
    assert_eq!(scene.home(), Vec::<u64>::new());
    scene.compare(1, "after a restart");
}

#[test]
fn integration_file_driver_is_killed_in_the_middle_of_transfers_fifty_times() {
    let scene = Scene::new("");
    let mut rng = Rng::new(42);
    let mut in_the_middle = 0;
    for round in 0..50u64 {
        let seed = round / 2 + 1;
        if round % 2 == 0 {
            scene.fill(seed);
        }
        let way = if round % 2 == 0 { Target::from(&scene.device) } else { Target::Home };
        let steps = rng.below(400_000);
        let hit = scene.bed.kill_during(
            "far0",
            |_| spin(steps),
            || drop(scene.session.migrate(scene.region.addr(), LEN, way).expect("migrate")),
        );
        in_the_middle += u64::from(hit);
        if round % 2 == 1 {
            scene.compare(seed, &format!("round {round}"));
        } else if round % 10 == 0 {
            scene.sum(seed);
        }
    }
    println!("{in_the_middle} of 50 rounds were in the middle");
    assert!(in_the_middle >= 10, "only {in_the_middle} rounds were in the middle");
    assert_eq!(scene.bed.metric("pager", "poisoned"), 0);
}

/// The device's first look at memory that may not be written, while pager and driver die: it sees what the CPU sees. (Such pages are
/// copied where they are, not moved.)
#[test]
fn integration_file_read_only_memory_is_seen_while_pager_and_driver_die() {
    let rounds = std::env::var("UHMM_ROUNDS").map_or(12, |text| text.parse().expect("a number"));
    let seed = std::env::var("UHMM_SEED").map_or(1, |text| text.parse().expect("a number"));
    let scene = Scene::new("");
    let mut rng = Rng::new(seed);
    for round in 0..rounds {
        let memory = ProgramMemory::private(LEN).expect("memory");
        // Two pages are zero, since nobody has touched them.
        let value = |index: u64| if index < 1024 { 0 } else { word(round, index) | 1 };
        (1024..WORDS).for_each(|index| memory.store_u64(index * 8, value(index)).expect("write"));
        scene.session.adopt(memory.addr(), LEN).expect("adopted");
        memory.protect(0, LEN, true, false).expect("mprotect");
        let victims = ["far0", "pager"].map(|name| (name, scene.bed.process(name)));
        let (first, second, pause, gap) =
            (rng.below(2) as usize, rng.below(3), rng.below(3_000_000), rng.below(500_000));
        let mut bytes = vec![0; LEN as usize];
        std::thread::scope(|scope| {
            let killer = scope.spawn(|| {
                spin(pause);
                victims[first].1.kill();
                if second > 0 {
                    spin(gap);
                    victims[1 - first].1.kill();
                }
            });
            scene.device.read(memory.addr(), &mut bytes).expect("the device reads");
            killer.join().expect("killed");
        });
        let words = bytes.chunks_exact(8).map(|bytes| u64::from_ne_bytes(bytes.try_into().expect("8 bytes")));
        let wrong: Vec<u64> = words
            .enumerate()
            .filter(|(at, found)| *found != value(*at as u64))
            .map(|(at, _)| at as u64 / 512)
            .collect();
        let cpu = (0..WORDS).filter(|index| memory.load_u64(index * 8).expect("read") != value(*index)).count();
        assert!(
            wrong.is_empty() && cpu == 0,
            "round {round}: {} words from page {:?} to {:?} differ for the device, {cpu} for the CPU",
            wrong.len(),
            wrong.first(),
            wrong.last()
        );
        scene.bed.wait_ready(victims[first].0, victims[first].1.incarnation());
        if second > 0 {
            scene.bed.wait_ready(victims[1 - first].0, victims[1 - first].1.incarnation());
        }
    }
}

#[test]
fn integration_file_a_damaged_page_is_lost_and_no_other_one() {
    let scene = Scene::new("");
    scene.out();
    let used = scene.used_blocks();
    let (at, mut page) = used[used.len() / 3].clone();
    page[1000] ^= 0x40;
    scene.file().write_all_at(&page, at).expect("the file is written");
    // Another one is exchanged for what lies beside it.
    let (other, _) = used[used.len() / 2];
    scene.file().write_all_at(&used[7].1, other).expect("the file is written");
    let lost = scene.home();
    assert_eq!(lost.len(), 2, "{lost:?}");
    scene.bed.wait_log("not those that were put there last");
    scene.compare_all_but(1, &lost);
    let summary = scene.session.residency_summary(scene.region.addr(), LEN).expect("residency");
    assert_eq!(summary.poisoned_pages, 2);
    // The device is as good as before.
    let region = scene.session.allocate(MIB).expect("region");
    region.write_u64(8, 7).expect("write");
    assert!(scene.session.migrate(region.addr(), MIB, &scene.device).expect("migrate").complete());
    assert_eq!(region.read_u64(8).expect("read"), 7);
}

#[test]
fn integration_file_what_was_in_front_of_a_shrunk_files_end_comes_home_and_the_rest_stays_at_home() {
    let scene = Scene::new("");
    scene.out();
    let used = scene.used_blocks();
    let half = used[used.len() / 2].0;
    scene.file().set_len(half).expect("the file is shrunk");
    // While it is short nothing leaves for what is not there any more, and nothing is lost by that.
    let other = scene.session.allocate(LEN).expect("region");
    for index in 0..WORDS {
        other.write_u64(index * 8, word(9, index)).expect("write");
    }
    drop(scene.session.migrate(other.addr(), LEN, &scene.device).expect("migrate"));
    for index in 0..WORDS {
        assert_eq!(other.read_u64(index * 8).expect("read"), word(9, index));
    }
    scene.bed.wait_log("somebody has shrunk");
    // The next incarnation makes it long again. What was cut off is lost, exactly that.
    let killed = scene.bed.kill("far0");
    scene.bed.wait_ready("far0", killed);
    let lost = scene.home();
    assert_eq!(lost.len(), used.len() - used.len() / 2, "{lost:?}");
    scene.compare_all_but(1, &lost);
}

#[test]
fn integration_file_a_cold_start_is_a_new_life_and_down_leaves_nothing() {
    let mut scene = Scene::new("");
    scene.out();
    scene.bed.kill_all();
    scene.bed.start_again(&manifest(&scene.path, SIZE));
    scene.bed.wait_ready("far0", 0);
    let session = scene.bed.session();
    let region = session.allocate(LEN).expect("region");
    region.write_u64(0, 5).expect("write");
    let device = session.device("far0").expect("device");
    assert!(session.migrate(region.addr(), LEN, &device).expect("migrate").complete());
    assert_eq!((region.read_u64(0).expect("read"), region.read_u64(4096).expect("read")), (5, 0));
    drop((region, session));
    std::mem::forget(scene.region);
    std::mem::forget(scene.session);
}

/// What is wrong with a file is said at the start, and everybody else goes on.
#[test]
fn integration_file_what_cannot_be_had_is_refused_at_the_start() {
    let scene = Scene::new("");
    let refused = |path: &Path, options: &str, said: &str| {
        let mut bed = TestBed::without_waiting(&manifest(path, options));
        bed.wait_log(said);
        assert_ne!(bed.status("far0").state, "ready");
        let session = bed.session();
        assert!(session.device("soft0").is_ok(), "the other device works");
        drop(session);
        bed.stop();
    };
    refused(&scene.path, SIZE, "in use by another uhmm");
    let folder = folder();
    let text = folder.path().join("letter");
    std::fs::write(&text, "Dear Sir").expect("written");
    refused(&text, SIZE, "holds data that is not uhmm's");
    assert_eq!(std::fs::read(&text).expect("read"), b"Dear Sir");
    refused(&folder.path().join("far0"), "memory_bytes = \"15TiB\"", "there is room for");
    refused(Path::new("/dev/shm/uhmm-far0"), SIZE, "lies in memory");
    scene.out();
    scene.compare(1, "the first one goes on");
}

/// `uhmm up --file`, some pages out and home, `uhmm down`; returns what was logged. `before`: what comes before the program on the command line.
fn up_with_two_words(before: &[&str]) -> String {
    let folder = folder();
    let run_dir = folder.path().join("run");
    let exe = uhmm_exe();
    let words: Vec<&std::ffi::OsStr> = before.iter().map(std::ffi::OsStr::new).chain([exe.as_os_str()]).collect();
    let mut command = std::process::Command::new(words[0]);
    command.args(&words[1..]).arg("--run-dir").arg(&run_dir).arg("up");
    command.arg("--file").arg(format!("16MiB:{}", folder.path().join("far0").display())).env("UHMM_LOG", "info");
    let log = folder.path().join("log");
    let errors = File::create(&log).expect("a file");
    let mut up = command.stdout(std::process::Stdio::piped()).stderr(errors).spawn().expect("uhmm up starts");
    let mut line = String::new();
    let mut said = std::io::BufReader::new(up.stdout.take().expect("piped"));
    std::io::BufRead::read_line(&mut said, &mut line).expect("it says something");
    assert_eq!(line.trim(), "ready", "{}", std::fs::read_to_string(&log).expect("a log"));
    let session = Session::connect(Some(&run_dir)).expect("a session");
    let region = session.allocate(MIB).expect("region");
    for index in 0..MIB / 8 {
        region.write_u64(index * 8, word(5, index)).expect("write");
    }
    let device = session.device("far0").expect("device");
    assert!(session.migrate(region.addr(), MIB, &device).expect("migrate").complete());
    let sum = (0..MIB / 8).fold(0u64, |sum, index| sum.wrapping_add(word(5, index)));
    assert_eq!(device.run(Job::new("sum", [region.addr(), MIB]).idempotent()).expect("sum").results, [sum]);
    for index in 0..MIB / 8 {
        assert_eq!(region.read_u64(index * 8).expect("read"), word(5, index));
    }
    drop((region, session));
    uhmm_sdk::Operator::connect(Some(&run_dir)).expect("operator").shutdown().expect("down");
    assert!(up.wait().expect("it ends").success());
    std::fs::read_to_string(&log).expect("a log")
}

#[test]
fn integration_file_up_needs_two_words() {
    let log = up_with_two_words(&[]);
    assert!(log.contains("io_uring"), "{log}");
}

/// What container runtimes do: io_uring_setup answers EPERM. (PR_SET_NO_NEW_PRIVS, then PR_SET_SECCOMP with four instructions.)
const WITHOUT_IO_URING: &str = "
import ctypes, os, struct, sys
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7fff0000)]
text = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *one) for one in code))
program = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', len(code), ctypes.addressof(text)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
os.execv(sys.argv[1], sys.argv[1:])
";

#[test]
fn integration_file_works_where_io_uring_is_refused() {
    let log = up_with_two_words(&["python3", "-c", WITHOUT_IO_URING]);
    assert!(log.contains("threads with pread and pwrite"), "{log}");
}

/// One or two cases of every group; `uhmm conformance --driver file` holds for all.
const CONFORMANCE: &str = "^(T0[1-5]_|T1[0-3]_|T2[24]_|T3[0-4]_|K06_|K10_|K12_|F0[12]_|X01_|C01_|P16_|S04_|Z01_|\
                           IGT\\.(once|many-64k)\\.(malloc|mmap|mmap-shared|region)$)";

#[test]
fn integration_file_conformance_subset_holds() {
    let scene = Scene::new("");
    let mut command = std::process::Command::new(uhmm_exe());
    command.arg("--run-dir").arg(scene.bed.run_dir());
    command.args(["conformance", "--json", "--driver", "file", "--filter", CONFORMANCE]);
    let output = command.output().expect("uhmm conformance starts");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("the report is JSON");
    let failed = report["cases"].as_array().expect("cases").iter().filter(|case| case["status"] == "failed");
    assert_eq!(failed.collect::<Vec<_>>(), Vec::<&serde_json::Value>::new());
    assert!(report["passed"].as_u64().expect("a number") >= 30, "{report}");
}
