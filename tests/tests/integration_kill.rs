//! kill -9 of each service in the middle of each kind of work, in seeded rounds; every byte is compared after each round.
//!
//! 4 victims (pager, mirror, driver with aperture, driver without) x 5 kinds of work x 10 seeds = 200 rounds.

use uhmm_sdk::{Device, Job, Region, Session};
use uhmm_tests::{TestBed, manifest, pattern::Rng, pattern::spin, pattern::word};

const MIB: u64 = 1 << 20;
const LEN: u64 = 8 * MIB;
const SEEDS: u64 = 10;

/// Dropped from top to bottom: the system ends last, because freeing a region asks the pager.
struct Scene {
    region: Region,
    device: Device,
    session: Session,
    bed: TestBed,
    seed: u64,
}

impl Scene {
    fn new(aperture: bool) -> Self {
        let options = if aperture { "" } else { "aperture = false" };
        let bed = TestBed::with_manifest(&manifest("12MiB", options));
        let session = bed.session();
        let device = session.device("soft0").expect("device");
        let region = session.allocate(LEN).expect("region");
        let scene = Self { region, device, session, bed, seed: 0 };
        scene.fill();
        scene
    }

    fn fill(&self) {
        for index in 0..LEN / 8 {
            self.region.write_u64(index * 8, word(self.seed, index)).expect("write");
        }
    }

    fn compare(&self, what: &str) {
        let sum = (0..LEN / 8).fold(0u64, |sum, index| sum.wrapping_add(word(self.seed, index)));
        let job = Job::new("sum", [self.region.addr(), LEN]).idempotent();
        assert_eq!(self.device.run(job).expect("sum").results, [sum], "{what}: the device sees other bytes");
        for index in 0..LEN / 8 {
            let found = self.region.read_u64(index * 8).expect("read");
            assert_eq!(found, word(self.seed, index), "{what}: word {index} differs");
        }
    }

    fn out(&self) {
        let report = self.session.migrate(self.region.addr(), LEN, &self.device).expect("migrate");
        assert!(report.complete(), "{report:?}");
    }

    fn home(&self) {
        self.session.migrate(self.region.addr(), LEN, uhmm_sdk::Target::Home).expect("evict");
    }

    fn kill_during(&self, victim: &str, rng: &mut Rng, work: impl FnOnce(&Self) + Send) -> bool {
        let spins = rng.below(50_000);
        self.bed.kill_during(victim, |_| spin(spins), || work(self))
    }

    fn fault_storm(&self) {
        self.region_threads(|scene, thread, quarter| {
            for index in thread * quarter..(thread + 1) * quarter {
                let found = scene.region.read_u64(index * 8).expect("read");
                assert_eq!(found, word(scene.seed, index), "word {index} during the storm");
            }
        });
    }

    fn region_threads(&self, body: impl Fn(&Self, u64, u64) + Sync) {
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let body = &body;
                scope.spawn(move || body(self, thread, LEN / 8 / 4));
            }
        });
    }

    /// CPU and device take the same pages from each other, so every step revokes device mappings.
    fn invalidations(&self) {
        let sum = (0..LEN / 8).fold(0u64, |sum, index| sum.wrapping_add(word(self.seed, index)));
        let jobs = [0, 1].map(|_| self.device.submit(Job::new("sum", [self.region.addr(), LEN]).idempotent()));
        for page in (0..LEN / 4096).step_by(7) {
            let index = page * 512;
            assert_eq!(self.region.read_u64(index * 8).expect("read"), word(self.seed, index));
        }
        for job in jobs {
            assert_eq!(job.wait().expect("sum").results, [sum]);
        }
    }
}

fn rounds(victim: &str, aperture: bool, name: &str, prepare: fn(&Scene), work: fn(&Scene)) {
    let mut scene = Scene::new(aperture);
    let mut hits = 0;
    for seed in 0..SEEDS {
        let mut rng = Rng::new(seed * 7919 + 17);
        scene.seed = seed;
        scene.fill();
        prepare(&scene);
        hits += u64::from(scene.kill_during(victim, &mut rng, work));
        scene.compare(&format!("{victim}, {name}, seed {seed}"));
    }
    println!("{victim}, {name}: {hits} of {SEEDS} kills hit the work itself");
    assert!(hits > 0, "no kill came before the work had ended: the rounds prove nothing");
}

macro_rules! kill_rounds {
    ($($test:ident: $victim:literal, $aperture:literal;)*) => {$(
        mod $test {
            use super::*;

            #[test]
            fn integration_kill_during_migration_out() {
                rounds($victim, $aperture, "migration out", Scene::home, Scene::out);
            }

            #[test]
            fn integration_kill_during_migration_home() {
                rounds($victim, $aperture, "migration home", Scene::out, Scene::home);
            }

            #[test]
            fn integration_kill_during_fault_storm_from_4_threads() {
                rounds($victim, $aperture, "fault storm", Scene::out, Scene::fault_storm);
            }

            #[test]
            fn integration_kill_during_invalidation() {
                rounds($victim, $aperture, "invalidation", Scene::out, Scene::invalidations);
            }

            #[test]
            fn integration_kill_during_device_faults() {
                rounds($victim, $aperture, "device faults", Scene::home, |scene| {
                    let sum = (0..LEN / 8).fold(0u64, |sum, index| sum.wrapping_add(word(scene.seed, index)));
                    let job = Job::new("sum", [scene.region.addr(), LEN]).idempotent();
                    assert_eq!(scene.device.run(job).expect("sum").results, [sum]);
                });
            }
        }
    )*};
}

kill_rounds! {
    pager: "pager", true;
    mirror: "mirror", false;
    driver_with_aperture: "soft0", true;
    driver_without_aperture: "soft0", false;
}

#[test]
fn integration_supervisor_killed_and_replaced_keeps_every_service_and_byte() {
    let mut scene = Scene::new(true);
    scene.out();
    let before: Vec<u32> = scene.bed.operator().status().expect("status").iter().map(|service| service.pid).collect();
    scene.bed.kill_supervisor();
    let refused = scene.bed.try_up();
    assert!(refused.contains("--adopt"), "running services must not be shut out: {refused}");
    scene.bed.adopt();
    scene.fault_storm();
    let services = scene.bed.operator().status().expect("status");
    let after: Vec<u32> = services.iter().map(|service| service.pid).collect();
    assert_eq!(before, after, "a service was restarted: {services:#?}");
    // The new supervisor has the vault: the pager can die under it.
    scene.out();
    let killed = scene.bed.kill("pager");
    scene.bed.wait_ready("pager", killed);
    scene.compare("supervisor replaced, then pager killed");
}

#[test]
fn integration_a_job_that_is_not_idempotent_is_reported_when_the_driver_dies() {
    let scene = Scene::new(true);
    scene.region.write_u64(0, 0).expect("write");
    let job = scene.device.submit(Job::new("atomic_add", [scene.region.addr(), 1, 2_000_000_000]));
    let killed = scene.bed.kill("soft0");
    let error = job.wait().expect_err("it cannot have been repeated");
    assert_eq!(error.code(), uhmm_sdk::ErrorCode::Stale, "{error}");
    scene.bed.wait_ready("soft0", killed);
    assert!(scene.region.read_u64(0).expect("read") < 2_000_000_000);
}

/// A driver that neither works nor dies: the CPU gets its pages all the same, after the driver was killed for it.
#[test]
fn integration_a_stopped_driver_is_killed_and_no_byte_is_lost() {
    for aperture in [true, false] {
        let scene = Scene::new(aperture);
        scene.out();
        let sum = Job::new("sum", [scene.region.addr(), LEN]).idempotent();
        scene.device.run(sum).expect("the device maps everything");
        let services = scene.bed.operator().status().expect("status");
        let driver = services.iter().find(|service| service.name == "soft0").expect("driver");
        let stopped = std::process::Command::new("kill").args(["-STOP", &driver.pid.to_string()]).status();
        assert!(stopped.expect("kill runs").success());
        scene.compare(&format!("driver stopped, aperture {aperture}"));
        scene.bed.wait_ready("soft0", driver.incarnation);
    }
}
