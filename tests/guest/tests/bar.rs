//! The driver of plain memory in a BAR as a service, on shared memory of the virtual machine: killed while the pager copies to and from the BAR
//! and while its units work there; what lies in the BAR is never lost, and the device is taken over as it is.

use uhmm_guest::devices::{IVSHMEM, vfio_devices};
use uhmm_sdk::{Device, Job, Region, Session, Target};
use uhmm_tests::{RESTART, TestBed, pattern::Rng, pattern::spin, pattern::word};

const ROUNDS: u64 = 50;
const PAGES: u64 = 512;
const LEN: u64 = PAGES * 4096;

fn manifest(more: &str) -> String {
    let service = |name: &str, kind: &str| format!("[[service]]\nname = \"{name}\"\nkind = \"{kind}\"\n{RESTART}\n");
    let address = vfio_devices(IVSHMEM).remove(0);
    format!(
        "{}{}{}driver = \"bar\"\n[[device]]\nname = \"bar0\"\nservice = \"bar0\"\npci = \"{address}\"\n{more}\n",
        service("pager", "pager"),
        service("mirror", "mirror"),
        service("bar0", "driver"),
    )
}

/// Dropped from top to bottom: freeing a region asks the pager.
struct Scene {
    region: Region,
    device: Device,
    session: Session,
    bed: TestBed,
}

impl Scene {
    fn start(more: &str) -> Self {
        let bed = TestBed::with_log(&manifest(more));
        let session = bed.session();
        let device = session.device("bar0").unwrap();
        let region = session.allocate(LEN).unwrap();
        Self { region, device, session, bed }
    }

    /// Every word of some pages would be more than software emulation likes: the first and the last of each.
    fn words() -> impl Iterator<Item = u64> {
        (0..PAGES).flat_map(|page| [page * 512, page * 512 + 511])
    }

    fn fill(&self, seed: u64) {
        Self::words().for_each(|index| self.region.write_u64(index * 8, word(seed, index)).unwrap());
    }

    fn compare(&self, seed: u64) {
        for index in Self::words() {
            assert_eq!(self.region.read_u64(index * 8).unwrap(), word(seed, index), "word {index} of {seed}");
        }
    }

    fn sum(seed: u64) -> u64 {
        Self::words().fold(0u64, |sum, index| sum.wrapping_add(word(seed, index)))
    }

    fn run_sum(&self, seed: u64) {
        let job = Job::new("sum", [self.region.addr(), LEN]).idempotent();
        assert_eq!(self.device.run(job).unwrap().results, [Self::sum(seed)], "the device differs, seed {seed}");
    }

    fn to(&self, target: Target) {
        let report = self.session.migrate(self.region.addr(), LEN, target).unwrap();
        assert!(report.complete(), "{report:?}");
    }

    /// Pages on the device, and poisoned ones.
    fn there(&self) -> (u64, u64) {
        let summary = self.session.residency_summary(self.region.addr(), LEN).unwrap();
        (summary.all_device_pages(), summary.poisoned_pages)
    }

    /// Kills the driver at a random moment of `work`, after so many turns of a loop at most: the next time it takes longer when the
    /// work was not through yet (true), and less when it was.
    fn kill_during(&self, rng: &mut Rng, spins_max: &mut u64, work: impl FnOnce() + Send) -> bool {
        let spins = rng.below(*spins_max);
        let hit = self.bed.kill_during("bar0", |_| spin(spins), work);
        *spins_max = if hit { *spins_max * 5 / 4 } else { *spins_max / 2 }.max(1000);
        hit
    }

    /// The device was opened once, and taken over as it was each time after that.
    fn was_adopted(&self, times: usize) {
        let log = self.bed.log();
        let count = |text: &str| log.matches(text).count();
        assert_eq!((count("adopted=false"), count("origin=Created")), (1, 1), "{log}");
        assert_eq!((count("adopted=true"), count("origin=Adopted")), (times, times), "{log}");
    }
}

fn kill_rounds(more: &str) {
    let scene = Scene::start(more);
    let device = Target::Device(scene.device.id());
    let (mut rng, mut hits, mut spins_max) = (Rng::new(4711), 0, [300_000; 3]);
    for seed in 1..=ROUNDS {
        scene.fill(seed);
        scene.to(if seed % 3 == 0 { Target::Home } else { device });
        hits += u64::from(scene.kill_during(&mut rng, &mut spins_max[(seed % 3) as usize], || match seed % 3 {
            0 => scene.to(device),
            1 => scene.to(Target::Home),
            _ => scene.run_sum(seed),
        }));
        assert_eq!(scene.there(), if seed % 3 == 1 { (0, 0) } else { (PAGES, 0) }, "round {seed}");
        // By the device where it is, then by the CPU.
        scene.run_sum(seed);
        scene.compare(seed);
    }
    println!("{hits} of {ROUNDS} kills hit work under way");
    assert!(hits >= ROUNDS / 4, "{hits}");
    scene.was_adopted(ROUNDS as usize);
}

#[test]
#[ignore = "runs in the guest: tests/guest/run bar"]
fn kill_9_during_copies_and_jobs_loses_nothing_and_resets_nothing() {
    kill_rounds("");
}

/// The program itself reads and writes frames of the BAR meanwhile.
#[test]
#[ignore = "runs in the guest: tests/guest/run bar"]
fn kill_9_of_a_coherent_devices_driver_loses_nothing_and_resets_nothing() {
    kill_rounds("coherent = true");
}

/// Nobody brings the pages home: the next incarnation finds them in the BAR.
#[test]
#[ignore = "runs in the guest: tests/guest/run bar"]
fn pages_in_the_bar_outlive_their_driver() {
    let scene = Scene::start("");
    scene.fill(9);
    scene.to(Target::Device(scene.device.id()));
    for _ in 0..3 {
        let killed = scene.bed.kill("bar0");
        scene.bed.wait_ready("bar0", killed);
        assert_eq!(scene.there(), (PAGES, 0));
        scene.run_sum(9);
    }
    scene.compare(9);
    scene.was_adopted(3);
}
