//! The whole system with an NVMe controller that another process plays over vfio-user, beside a software device with a client of its own.
//!
//! The model counts how often it was enabled, so "nobody has reset it" is a number; its medium can be read by the test, so "where the bytes are" is
//! too. Faults of the device and deaths of the driver, of everything, and of the device itself.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use uhmm_driver_nvme::header::{Found, HEADER_BYTES, Header, State};
use uhmm_sdk::{Device, Job, PageStatus, Region, Session, Target};
use uhmm_tests::model::NvmeModel;
use uhmm_tests::pattern::{Rng, spin, word};
use uhmm_tests::{PATIENCE, RESTART, TestBed, manifest_nvme};

const MIB: u64 = 1 << 20;
const LEN: u64 = 2 * MIB;
const WORDS: u64 = LEN / 8;
const PAGES: u64 = LEN / 4096;
/// These tests look at the medium.
const OPEN: &str = "seal = \"none\"";

/// A model, a system that drives it, and a client with a region. Dropped from top to bottom: the region before its system, that before the device.
struct Scene {
    region: Region,
    device: Device,
    session: Session,
    bed: TestBed,
    model: NvmeModel,
    seed: u64,
}

impl Scene {
    fn new() -> Self {
        Self::with_restart(RESTART)
    }

    fn with_restart(restart: &str) -> Self {
        Self::with(OPEN, restart)
    }

    fn with(options: &str, restart: &str) -> Self {
        let model = NvmeModel::start("16MiB");
        let bed = TestBed::with_log(&manifest_nvme(&model.pci(), options, restart));
        let session = bed.session();
        let device = session.device("nvme0").expect("device");
        let region = session.allocate(LEN).expect("region");
        let scene = Self { region, device, session, bed, model, seed: 1 };
        scene.fill();
        scene
    }

    fn fill(&self) {
        for index in 0..WORDS {
            self.region.write_u64(index * 8, word(self.seed, index)).expect("write");
        }
    }

    fn sum(&self) -> u64 {
        (0..WORDS).fold(0u64, |sum, index| sum.wrapping_add(word(self.seed, index)))
    }

    fn sum_job(&self) -> Job {
        Job::new("sum", [self.region.addr(), LEN]).idempotent()
    }

    fn compare(&self, what: &str) {
        assert_eq!(self.device.run(self.sum_job()).expect("sum").results, [self.sum()], "{what}: the device differs");
        for index in 0..WORDS {
            let found = self.region.read_u64(index * 8).expect("read");
            assert_eq!(found, word(self.seed, index), "{what}: word {index} differs");
        }
    }

    /// Every page of the region is on the medium, byte for byte, each once.
    fn compare_medium(&self, what: &str) {
        let medium = self.model.medium();
        let mut page = [0; 4096];
        let mut found = vec![0; PAGES as usize];
        for at in (128 << 10..16 * MIB).step_by(4096) {
            medium.read_exact_at(&mut page, at).expect("the medium is read");
            let words = || page.chunks_exact(8).map(|bytes| u64::from_le_bytes(bytes.try_into().expect("8 bytes")));
            let first = words().next().unwrap_or_default();
            let Some(index) = (0..PAGES).find(|index| word(self.seed, index * 512) == first) else { continue };
            assert!(words().zip(index * 512..).all(|(found, at)| found == word(self.seed, at)), "{what}: page {index}");
            found[index as usize] += 1;
        }
        assert!(found.iter().all(|count| *count == 1), "{what}: not every page is on the medium once: {found:?}");
    }

    fn out(&self) {
        let report = self.session.migrate(self.region.addr(), LEN, &self.device).expect("migrate");
        assert!(report.complete(), "{report:?}");
    }

    fn home(&self) {
        let report = self.session.migrate(self.region.addr(), LEN, Target::Home).expect("migrate home");
        assert!(report.complete(), "{report:?}");
    }

    /// CPU and device take the same pages from each other, so the device's mappings are revoked while units load and store frames.
    fn invalidations(&self) {
        let jobs = [0, 1].map(|_| self.device.submit(self.sum_job()));
        for page in (0..PAGES).step_by(17) {
            assert_eq!(self.region.read_u64(page * 4096).expect("read"), word(self.seed, page * 512));
        }
        for job in jobs {
            assert_eq!(job.wait().expect("sum").results, [self.sum()]);
        }
    }

    fn resets(&self) -> u64 {
        self.model.counter("enables") - 1 + self.model.counter("function_resets")
    }

    fn poisoned_pages(&self) -> u64 {
        let summary = self.session.residency_summary(self.region.addr(), LEN).expect("residency");
        summary.poisoned_pages
    }

    /// What is not poisoned has its bytes.
    fn compare_what_is_left(&self, what: &str) {
        for run in self.session.residency(self.region.addr(), LEN).expect("residency") {
            if run.residency == uhmm_sdk::Residency::Poisoned {
                continue;
            }
            for index in run.first_page * 512..(run.first_page + run.page_count) * 512 {
                let found = self.region.read_u64(index * 8).expect("read");
                assert_eq!(found, word(self.seed, index), "{what}: word {index} differs");
            }
        }
    }

    /// A client of the new system, which finds zeroes and uses them. The old system's has lost its pages, and its mapping is not
    /// touched any more.
    fn begin_anew(&mut self, what: &str) {
        let session = self.bed.session();
        self.device = session.device("nvme0").expect("device");
        let region = session.allocate(LEN).expect("region");
        std::mem::forget(std::mem::replace(&mut self.region, region));
        std::mem::forget(std::mem::replace(&mut self.session, session));
        assert_eq!(self.device.run(self.sum_job()).expect("sum").results, [0], "old bytes in new memory");
        self.seed = 9;
        self.fill();
        self.out();
        self.compare_medium(what);
        self.compare(what);
    }

    /// Kills the driver while `work` is under way; it must finish all the same.
    fn kill_during(&self, rng: &mut Rng, in_flight: bool, work: impl FnOnce(&Self) + Send) -> bool {
        let spins = rng.below(200_000);
        self.model.set_latency_us(if in_flight { 20_000 } else { 0 });
        let before = self.model.counter("io_commands");
        let moment = |ended: &AtomicBool| {
            if in_flight {
                // The device has fetched a command and is 20 ms away from carrying it out.
                while self.model.counter("io_commands") == before && !ended.load(Ordering::Acquire) {}
            } else {
                spin(spins);
            }
            // For what it fetches from now on.
            self.model.set_latency_us(0);
        };
        self.bed.kill_during("nvme0", moment, || work(self))
    }
}

/// A client of `soft0`, which must notice nothing of what happens to the NVMe device.
struct Bystander<'a> {
    bed: &'a TestBed,
    stop: AtomicBool,
}

impl Bystander<'_> {
    /// Fills, moves out, sums, compares at home, until it is told to stop. Returns rounds, and the longest one.
    fn run(&self) -> (u64, Duration) {
        let session = self.bed.session();
        let device = session.device("soft0").expect("soft0");
        let region = session.allocate(MIB / 4).expect("region");
        let words = region.len_bytes() / 8;
        let (mut rounds, mut longest) = (0, Duration::ZERO);
        while !self.stop.load(Ordering::Acquire) || rounds == 0 {
            let begun = Instant::now();
            let value = |index| word(!rounds, index);
            (0..words).for_each(|index| region.write_u64(index * 8, value(index)).expect("write"));
            let report = session.migrate(region.addr(), region.len_bytes(), &device).expect("migrate");
            assert!(report.complete(), "the bystander's pages do not move: {report:?}");
            let sum = (0..words).fold(0u64, |sum, index| sum.wrapping_add(value(index)));
            let job = Job::new("sum", [region.addr(), region.len_bytes()]).idempotent();
            assert_eq!(device.run(job).expect("sum").results, [sum], "the bystander's device sees other bytes");
            for index in 0..words {
                assert_eq!(region.read_u64(index * 8).expect("read"), value(index), "the bystander sees other bytes");
            }
            (rounds, longest) = (rounds + 1, longest.max(begun.elapsed()));
        }
        (rounds, longest)
    }
}

/// `work` while somebody else uses the other device.
fn beside_a_bystander<T>(scene: &Scene, work: impl FnOnce() -> T) -> T {
    let bystander = Bystander { bed: &scene.bed, stop: AtomicBool::new(false) };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| bystander.run());
        // The flag is set even if the work fails, or the scope would never end.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        bystander.stop.store(true, Ordering::Release);
        let (rounds, longest) = other.join().expect("the bystander");
        println!("bystander: {rounds} rounds, the longest {longest:?}");
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn kill_rounds(name: &str, prepare: fn(&Scene), work: fn(&Scene)) {
    let mut scene = Scene::new();
    let mut hits = 0;
    for seed in 1..=10 {
        let mut rng = Rng::new(seed * 7919 + 17);
        scene.seed = seed;
        scene.fill();
        prepare(&scene);
        hits += u64::from(scene.kill_during(&mut rng, seed % 2 == 0, work));
        scene.compare(&format!("{name}, seed {seed}"));
        assert_eq!(scene.resets(), 0, "{name}, seed {seed}: the controller was reset\n{}", scene.bed.log());
        scene.out();
        scene.compare_medium(&format!("{name}, seed {seed}"));
        scene.home();
    }
    let faults = scene.model.counter("dma_faults");
    println!(
        "{name}: {hits} of 10 kills hit the work itself; {faults} times a dead driver's command found its memory gone"
    );
    assert!(hits >= 5, "the rounds with a slow device cannot end before the kill");
    assert_eq!(scene.bed.log().matches("adopted=true").count(), 10, "{}", scene.bed.log());
}

/// What everybody gets who does not ask for anything else.
#[test]
fn integration_nvme_pages_are_sealed_on_the_medium_and_a_damaged_one_is_lost_alone() {
    let scene = Scene::with("", RESTART);
    scene.out();
    let ours: std::collections::HashSet<u64> = (0..PAGES).map(|page| word(scene.seed, page * 512)).collect();
    assert_eq!(scene.model.pages_with(|found| ours.contains(&found)), 0, "nobody can read them");
    assert!(scene.model.pages_with(|found| found != 0) as u64 >= PAGES, "they are there");
    scene.compare("home again");
    scene.out();
    let medium = scene.model.medium();
    let is_used = |at: u64| {
        let mut page = [0; 4096];
        medium.read_exact_at(&mut page, at).expect("the medium is read");
        page.iter().any(|byte| *byte != 0)
    };
    // Blocks that hold pages, and blocks that held them before: one of each kind in a row may be damaged without harm, all of them not.
    for at in (HEADER_BYTES..16 * MIB).step_by(4096).filter(|at| is_used(*at)).step_by(7) {
        let mut byte = [0];
        medium.read_exact_at(&mut byte, at + 1000).expect("the medium is read");
        medium.write_all_at(&[byte[0] ^ 4], at + 1000).expect("the medium is written");
    }
    drop(scene.session.migrate(scene.region.addr(), LEN, Target::Home).expect("migrate home"));
    let lost = scene.poisoned_pages();
    assert!((PAGES / 16..PAGES / 2).contains(&lost), "{lost} of {PAGES} pages are lost");
    scene.bed.wait_log("not those that were put there last");
    scene.compare_what_is_left("the others");
}

#[test]
fn integration_nvme_with_seals_a_killed_driver_leaves_every_byte() {
    let mut scene = Scene::with("", RESTART);
    let mut rng = Rng::new(5);
    for round in 0..12 {
        if round % 2 == 0 {
            scene.seed = round / 2 + 1;
            scene.fill();
        }
        let way = if round % 2 == 0 { Target::from(&scene.device) } else { Target::Home };
        let steps = rng.below(400_000);
        scene.bed.kill_during(
            "nvme0",
            |_| spin(steps),
            || drop(scene.session.migrate(scene.region.addr(), LEN, way).expect("migrate")),
        );
        if round % 3 == 0 {
            scene.compare("after a kill");
        }
    }
    scene.compare("the end");
    assert_eq!(scene.resets(), 0, "nobody has reset the controller");
    assert_eq!(scene.poisoned_pages(), 0);
}

#[test]
fn integration_nvme_driver_killed_during_migration_out_is_adopted_without_a_reset() {
    kill_rounds("migration out", Scene::home, Scene::out);
}

#[test]
fn integration_nvme_driver_killed_during_migration_home_is_adopted_without_a_reset() {
    kill_rounds("migration home", Scene::out, Scene::home);
}

#[test]
fn integration_nvme_driver_killed_during_cpu_faults_is_adopted_without_a_reset() {
    kill_rounds("CPU faults", Scene::out, |scene| {
        for page in 0..PAGES {
            assert_eq!(scene.region.read_u64(page * 4096).expect("read"), word(scene.seed, page * 512));
        }
    });
}

#[test]
fn integration_nvme_driver_killed_during_jobs_is_adopted_and_they_are_completed() {
    kill_rounds("jobs", Scene::out, |scene| {
        assert_eq!(scene.device.run(scene.sum_job()).expect("sum").results, [scene.sum()]);
    });
}

#[test]
fn integration_nvme_driver_killed_during_invalidation_is_adopted_without_a_reset() {
    kill_rounds("invalidation", Scene::out, Scene::invalidations);
}

#[test]
fn integration_nvme_job_that_must_not_run_twice_is_reported_when_the_driver_dies() {
    let scene = Scene::new();
    scene.region.write_u64(0, 0).expect("write");
    let job = scene.device.submit(Job::new("atomic_add", [scene.region.addr(), 1, 2_000_000_000]));
    let killed = scene.bed.kill("nvme0");
    let error = job.wait().expect_err("it cannot have been repeated");
    assert_eq!(error.code(), uhmm_sdk::ErrorCode::Stale, "{error}");
    scene.bed.wait_ready("nvme0", killed);
    assert!(scene.region.read_u64(0).expect("read") < 2_000_000_000);
    assert_eq!(scene.resets(), 0);
}

/// One fault in the middle of each way; everything ends as if nothing had been, and the log says what was.
fn survives(fault: &str, said: &[&str], resets: bool) {
    let scene = Scene::new();
    beside_a_bystander(&scene, || {
        for (round, nth) in [3, 1].into_iter().enumerate() {
            scene.fill();
            scene.model.inject(fault, nth);
            scene.out();
            scene.compare_medium(&format!("{fault} {round} on the way out"));
            scene.model.inject(fault, nth);
            scene.home();
            scene.compare(&format!("{fault} {round} on the way home"));
            scene.out();
            scene.model.inject(fault, 5);
            assert_eq!(scene.device.run(scene.sum_job()).expect("sum").results, [scene.sum()]);
            scene.compare(&format!("{fault} {round} under a job"));
        }
    });
    assert_eq!((scene.poisoned_pages(), scene.bed.status("nvme0").incarnation), (0, 1), "{}", scene.bed.log());
    assert_eq!(scene.resets() > 0, resets, "{} resets", scene.resets());
    let log = scene.bed.log();
    said.iter().for_each(|text| assert!(log.contains(text), "{text:?} is not said:\n{log}"));
}

#[test]
fn integration_nvme_command_error_is_retried() {
    survives("command-error", &["it is sent again"], false);
}

#[test]
fn integration_nvme_dropped_completion_ends_in_a_reset() {
    survives("drop-completion", &["is late: it is aborted", "everything in flight is sent again"], true);
}

#[test]
fn integration_nvme_stuck_queue_ends_in_a_reset() {
    survives("stuck-queue", &["is late: it is aborted", "everything in flight is sent again"], true);
}

#[test]
fn integration_nvme_corrupted_completion_id_ends_in_a_reset() {
    survives("corrupt-id", &["the controller is reset and everything in flight is sent again"], true);
}

#[test]
fn integration_nvme_dma_to_what_is_not_mapped_is_blocked_and_retried() {
    survives("stray-dma", &["it is sent again"], false);
}

/// An error that retries do not help: reported, nothing is lost, and the next try is as good as any.
#[test]
fn integration_nvme_lasting_command_errors_are_reported_and_lose_nothing() {
    let scene = Scene::new();
    beside_a_bystander(&scene, || {
        for way in [Target::Device(scene.device.id()), Target::Home] {
            // Sixteen commands of 128 KiB, three times each.
            (1..=48).for_each(|nth| scene.model.inject("command-error", nth));
            let report = scene.session.migrate(scene.region.addr(), LEN, way).expect("migrate");
            assert!(report.pages_with(PageStatus::Io) > 0, "{way:?}: {report:?}");
            let end = Instant::now() + PATIENCE;
            while !scene.session.migrate(scene.region.addr(), LEN, way).expect("migrate").complete() {
                assert!(Instant::now() < end, "{way:?}: the device does not recover:\n{}", scene.bed.log());
            }
        }
    });
    scene.compare("after lasting errors");
    assert_eq!((scene.poisoned_pages(), scene.resets()), (0, 0));
    assert!(scene.bed.log().contains("failed 3 times"), "{}", scene.bed.log());
}

/// The device is pulled out in the middle of DMA and does not come back: what was on it is poisoned, everything else is whole.
#[test]
fn integration_nvme_pulled_out_for_good_poisons_what_was_on_it() {
    let scene = Scene::with_restart("restart = { backoff_min_ms = 1, backoff_max_ms = 20, max_deaths = 3 }");
    let (first_half, second_half) = (scene.region.addr(), scene.region.addr() + LEN / 2);
    beside_a_bystander(&scene, || {
        let there = scene.session.migrate(first_half, LEN / 2, &scene.device).expect("migrate");
        assert!(there.complete(), "{there:?}");
        scene.model.inject("removal", 3);
        let report = scene.session.migrate(second_half, LEN / 2, &scene.device).expect("migrate");
        assert!(!report.complete(), "the device was gone: {report:?}");
        scene.bed.wait_log("what only it can reach is poisoned");
        let end = Instant::now() + PATIENCE;
        while scene.poisoned_pages() < PAGES / 2 {
            assert!(Instant::now() < end, "never poisoned:\n{}", scene.bed.log());
        }
    });
    scene.compare_what_is_left("after the removal");
    assert_eq!(scene.poisoned_pages(), PAGES / 2, "more was lost than was on the device");
    assert_eq!(scene.bed.status("nvme0").state, "held");
    let report = scene.session.migrate(second_half, LEN / 2, &scene.device).expect("migrate");
    assert_eq!(report.pages_with(PageStatus::Io), PAGES / 2, "nothing can go there any more: {report:?}");
    scene.compare_what_is_left("after a migration to nowhere");
    assert!(
        scene.bed.log().contains("Controller is gone") || scene.bed.log().contains("is lost"),
        "{}",
        scene.bed.log()
    );
}

/// The model is killed and another one takes its place: its memory is not taken for the old one's.
#[test]
fn integration_nvme_exchanged_while_it_runs_loses_its_pages_and_nothing_else() {
    let mut scene = Scene::new();
    scene.out();
    scene.model = scene.model.replace("16MiB");
    scene.bed.wait_log("The device came back with other memory: pages on it are lost");
    let end = Instant::now() + PATIENCE;
    while scene.poisoned_pages() < PAGES {
        assert!(Instant::now() < end, "never poisoned:\n{}", scene.bed.log());
    }
    let region = scene.session.allocate(LEN).expect("region");
    let zero = scene.device.run(Job::new("sum", [region.addr(), LEN]).idempotent()).expect("sum");
    assert_eq!(zero.results, [0]);
    scene.region = region;
    scene.seed = 7;
    scene.fill();
    scene.out();
    scene.compare_medium("on the new device");
    scene.compare("on the new device");
}

/// Power failure of everything but the device. The new system takes the namespace again, and nothing of the old one shows.
#[test]
fn integration_nvme_cold_restart_shows_nothing_old() {
    let mut scene = Scene::new();
    scene.out();
    scene.compare_medium("before");
    let old = |word_found| (0..PAGES).any(|page| word(1, page * 512) == word_found);
    assert_eq!(scene.model.pages_with(old), PAGES as usize);
    let header = |scene: &Scene| {
        let mut header = [0; 4096];
        scene.model.medium().read_exact_at(&mut header, 0).expect("the header is read");
        header
    };
    let header_before = header(&scene);
    scene.bed.kill_all();
    scene.bed.start_again(&manifest_nvme(&scene.model.pci(), OPEN, RESTART));
    scene.bed.wait_ready("nvme0", 0);
    let header_now = header(&scene);
    assert_eq!(header_before[..16], header_now[..16], "a header of the same kind");
    assert_ne!(header_before[32..40], header_now[32..40], "the generation is another one");
    assert_eq!(scene.model.pages_with(old), 0, "old bytes are on the medium");
    assert_eq!(scene.resets(), 1, "the controller of an unknown manager begins anew");
    let error = scene.session.migrate(scene.region.addr(), LEN, Target::Home).expect_err("the old system is gone");
    println!("a client of the old system is told: {error}");
    scene.begin_anew("after the restart");
}

/// What the medium begins with.
fn header(model: &NvmeModel) -> Header {
    let mut begin = vec![0; HEADER_BYTES as usize];
    model.medium().read_exact_at(&mut begin, 0).expect("the header is read");
    let Found::Header(header) = Found::decode(&begin) else { panic!("the medium has no header") };
    header
}

/// Takes the medium to another machine: its header is not of the new system's host any more. Returns what it was.
fn carry_away(model: &NvmeModel) -> Header {
    let header = header(model);
    let theirs = Header { host: !header.host, ..header };
    model.medium().write_all_at(&theirs.encode(), 0).expect("the header is written");
    header
}

/// `uhmm down`, with pages on the device: the next system may be another machine's, needs no `format`, and finds zeroes.
#[test]
fn integration_nvme_given_back_by_down_is_taken_by_another_host_without_format() {
    let mut scene = Scene::new();
    scene.out();
    let first = header(&scene.model);
    let killed = scene.bed.kill("nvme0");
    scene.bed.wait_ready("nvme0", killed);
    assert_eq!((header(&scene.model), first.state), (first, State::InUse), "a restart gives nothing back");
    scene.compare_medium("after a restart");
    scene.bed.stop();
    let old = carry_away(&scene.model);
    assert_eq!(old, Header { state: State::Released, ..first }, "{}", scene.bed.log());
    scene.bed.start_again(&manifest_nvme(&scene.model.pci(), OPEN, RESTART));
    scene.bed.wait_ready("nvme0", 0);
    let new = header(&scene.model);
    assert_eq!((new.state, new.host, new.frames), (State::InUse, old.host, old.frames));
    assert!(new.generation != old.generation && new.owner != old.owner, "{old:?} {new:?}");
    assert_eq!(scene.model.pages_with(|found| found == word(1, 0)), 0, "old bytes are on the medium");
    scene.begin_anew("on the other host");
}

/// kill -9 of everything gives nothing back: for another machine it looks as if the first one were still at it.
#[test]
fn integration_nvme_of_another_host_that_was_killed_is_refused_until_format_is_said() {
    let mut scene = Scene::new();
    scene.out();
    scene.bed.kill_all();
    let old = carry_away(&scene.model);
    assert_eq!(old.state, State::InUse);
    let mut bed = TestBed::without_waiting(&manifest_nvme(&scene.model.pci(), OPEN, RESTART));
    bed.wait_log("Namespace is in use by another host");
    assert_ne!(bed.status("nvme0").state, "ready");
    bed.stop();
    assert_eq!(header(&scene.model), Header { host: !old.host, ..old }, "refused, and touched all the same");
    scene.compare_medium("after the refusal");
    bed.start_again(&manifest_nvme(&scene.model.pci(), "format = true\nseal = \"none\"", RESTART));
    bed.wait_ready("nvme0", 0);
    let new = header(&scene.model);
    assert_eq!((new.state, new.host), (State::InUse, old.host));
    assert_ne!(new.generation, old.generation);
    assert_eq!(scene.model.pages_with(|found| found == word(1, 0)), 0, "old bytes are on the medium");
    std::mem::forget(scene.region);
    std::mem::forget(scene.session);
}

/// Somebody else's data is never overwritten unless the manifest says so.
#[test]
fn integration_nvme_namespace_with_foreign_data_is_refused_until_format_is_said() {
    let model = NvmeModel::start("16MiB");
    let mut foreign = vec![0x3d; 16 << 20];
    foreign[510..512].copy_from_slice(&[0x55, 0xaa]);
    model.medium().write_all_at(&foreign, 0).expect("the medium is written");
    let mut bed = TestBed::without_waiting(&manifest_nvme(&model.pci(), OPEN, RESTART));
    bed.wait_log("Namespace holds data that is not uhmm's (a partition table or boot sector)");
    assert!(bed.log().contains("`format = true` in the manifest's [[device]]"), "{}", bed.log());
    assert_ne!(bed.status("nvme0").state, "ready");
    let bystander = Bystander { bed: &bed, stop: AtomicBool::new(true) };
    assert_eq!(bystander.run().0, 1, "the other device is as good as ever");
    bed.stop();
    let mut found = vec![0; foreign.len()];
    model.medium().read_exact_at(&mut found, 0).expect("the medium is read");
    assert!(found == foreign, "somebody's data was touched");
    bed.start_again(&manifest_nvme(&model.pci(), "format = true\nseal = \"none\"", RESTART));
    bed.wait_ready("nvme0", 0);
    assert_eq!(model.pages_with(|word| word == u64::from_le_bytes([0x3d; 8])), 0, "formatting leaves nothing");
    let session = bed.session();
    let region = session.allocate(LEN).expect("region");
    region.write_u64(8, 77).expect("write");
    let report = session.migrate(region.addr(), LEN, &session.device("nvme0").expect("device")).expect("migrate");
    assert!(report.complete(), "{report:?}");
    assert_eq!(region.read_u64(8).expect("read"), 77);
}

/// One or two cases of every group; `uhmm conformance --driver nvme` against such a system holds for all.
const CONFORMANCE: &str = "^(T0[1-5]_|T1[0-3]_|T2[24]_|T3[0-4]_|K06_|K10_|K12_|F0[12]_|X01_|C01_|P16_|S04_|Z01_|\
                           IGT\\.(once|many-64k)\\.(malloc|mmap|mmap-shared|region)$)";

#[test]
fn integration_nvme_conformance_subset_holds() {
    let model = NvmeModel::start("33MiB");
    let manifest = manifest_nvme(&model.pci(), "memory_bytes = \"32MiB\"\nseal = \"none\"", RESTART);
    let bed = TestBed::with_log(&manifest);
    let mut command = std::process::Command::new(uhmm_tests::uhmm_exe());
    command.arg("--run-dir").arg(bed.run_dir());
    command.args(["conformance", "--json", "--driver", "nvme", "--filter", CONFORMANCE]);
    let output = command.output().expect("uhmm conformance starts");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("the report is JSON");
    let count = |key: &str| report[key].as_u64().expect("a number");
    let failed = report["cases"].as_array().expect("cases").iter().filter(|case| case["status"] == "failed");
    assert_eq!(failed.collect::<Vec<_>>(), Vec::<&serde_json::Value>::new());
    println!("{} passed, {} not applicable", count("passed"), count("not_applicable"));
    assert!(count("passed") >= 30, "only {} cases passed", count("passed"));
    assert_eq!(model.counter("enables"), 1, "the controller was reset");
}
