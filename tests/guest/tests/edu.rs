//! The teaching driver as a service: one page lives on the device, jobs use it there, and the driver is killed while the device is
//! at a DMA.

use std::fs;

use uhmm_sdk::{Device, Job, Region, Residency, ServiceStatus, Session, Target};
use uhmm_tests::{TestBed, pattern::Rng, pattern::spin, pattern::word};

const PAGE: u64 = 4096;
const ROUNDS: u64 = 50;

/// The first edu of the machine.
fn address() -> String {
    let mut found: Vec<String> = fs::read_dir("/sys/bus/pci/devices")
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| fs::read_to_string(entry.path().join("device")).unwrap().trim() == "0x11e8")
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    found.sort();
    found.remove(0)
}

/// What `docs/write-a-driver.md` says, with short waits between deaths.
fn manifest() -> String {
    let restart = "restart = { backoff_min_ms = 1, backoff_max_ms = 20, max_deaths = 1000 }";
    let service = |name: &str, kind: &str, more: &str| {
        format!("[[service]]\nname = \"{name}\"\nkind = \"{kind}\"\n{more}{restart}\n\n")
    };
    let services = [
        service("pager", "pager", ""),
        service("mirror", "mirror", ""),
        service("edu0", "driver", "driver = \"edu\"\n"),
    ];
    let address = address();
    let device = format!(
        "[[device]]\nname = \"edu0\"\nservice = \"edu0\"\npci = \"{address}\"\nworkers = 1\nstaging_bytes = \"2MiB\"\n"
    );
    services.concat() + &device
}

/// Dropped from top to bottom: freeing a region asks the pager.
struct Scene {
    region: Region,
    device: Device,
    session: Session,
    bed: TestBed,
}

impl Scene {
    fn start(pages: u64) -> Self {
        let bed = TestBed::with_manifest(&manifest());
        let session = bed.session();
        let device = session.device("edu0").unwrap();
        let region = session.allocate(pages * PAGE).unwrap();
        Self { region, device, session, bed }
    }

    fn fill(&self, seed: u64) {
        for index in 0..PAGE / 8 {
            self.region.write_u64(index * 8, word(seed, index)).unwrap();
        }
    }

    fn compare(&self, seed: u64) {
        for index in 0..PAGE / 8 {
            assert_eq!(self.region.read_u64(index * 8).unwrap(), word(seed, index), "word {index} of {seed}");
        }
    }

    fn out(&self) {
        let report = self.session.migrate(self.region.addr(), PAGE, &self.device).unwrap();
        assert!(report.complete(), "{report:?}");
    }

    /// Pages on the device.
    fn there(&self) -> u64 {
        let runs = self.session.residency(self.region.addr(), self.region.len_bytes()).unwrap();
        runs.iter().filter(|run| matches!(run.residency, Residency::Device(_))).map(|run| run.page_count).sum()
    }
}

#[test]
#[ignore = "runs in the guest: tests/guest/run edu"]
fn a_page_lives_on_the_device_and_comes_back_byte_for_byte() {
    let scene = Scene::start(1);
    for seed in 1..=3 {
        scene.fill(seed);
        scene.out();
        assert_eq!(scene.there(), 1);
        scene.compare(seed);
        assert_eq!(scene.there(), 0, "the CPU's access has brought it home");
    }
}

#[test]
#[ignore = "runs in the guest: tests/guest/run edu"]
fn jobs_use_the_page_where_it_is_and_the_device_computes_itself() {
    let scene = Scene::start(1);
    scene.fill(1);
    scene.out();
    let sum = (0..PAGE / 8).fold(0u64, |sum, index| sum.wrapping_add(word(1, index)));
    let job = Job::new("sum", [scene.region.addr(), PAGE]);
    assert_eq!(scene.device.run(job).unwrap().results, [sum]);
    assert_eq!(scene.there(), 1, "the unit went to the page, not the page to the CPU");
    for (n, value) in [(0, 1), (5, 120), (12, 479_001_600)] {
        assert_eq!(scene.device.run(Job::new("factorial", [n])).unwrap().results, [value]);
    }
    assert!(scene.device.run(Job::new("factorial", [13])).unwrap_err().to_string().contains("0 to 12"));
    // The last byte of the frame, which is not in the DMA buffer.
    let last = scene.region.addr() + PAGE - 1;
    scene.device.run(Job::new("fill", [last, 1, 0x5a])).unwrap();
    assert_eq!(scene.device.run(Job::new("scan", [last, 1, 0x5a])).unwrap().results, [1]);
    assert_eq!(scene.there(), 1);
    let index = PAGE / 8 - 1;
    let expected = word(1, index) & !(0xff << 56) | 0x5a << 56;
    assert_eq!(scene.region.read_u64(index * 8).unwrap(), expected);
    assert_eq!(scene.region.read_u64(index * 8 - 8).unwrap(), word(1, index - 1));
}

#[test]
#[ignore = "runs in the guest: tests/guest/run edu"]
fn two_pages_take_turns_on_a_device_with_one_frame() {
    let scene = Scene::start(2);
    scene.fill(7);
    scene.region.write_u64(PAGE, 77).unwrap();
    for page in [0, 1, 0, 1] {
        let report = scene.session.migrate(scene.region.addr() + page * PAGE, PAGE, &scene.device).unwrap();
        assert!(report.complete(), "{report:?}");
        assert_eq!(scene.there(), 1);
    }
    scene.compare(7);
    assert_eq!(scene.region.read_u64(PAGE).unwrap(), 77);
}

/// The driver dies at a random moment of a migration out, of one home, or of a job; what the page holds is never lost.
#[test]
#[ignore = "runs in the guest: tests/guest/run edu"]
fn kill_9_during_dma_loses_nothing() {
    let scene = Scene::start(1);
    let (mut rng, mut in_the_middle) = (Rng::new(4711), 0);
    for seed in 1..=ROUNDS {
        scene.fill(seed);
        let before = seed % 3 != 0;
        if before {
            scene.out();
        }
        let spins = rng.below(400_000);
        let work = || match seed % 3 {
            0 => scene.out(),
            1 => drop(scene.session.migrate(scene.region.addr(), PAGE, Target::Home).unwrap()),
            _ => {
                let sum = (0..PAGE / 8).fold(0u64, |sum, index| sum.wrapping_add(word(seed, index)));
                let job = Job::new("sum", [scene.region.addr(), PAGE]).idempotent();
                assert_eq!(scene.device.run(job).unwrap().results, [sum]);
            }
        };
        in_the_middle += u64::from(scene.bed.kill_during("edu0", |_| spin(spins), work));
        scene.compare(seed);
    }
    println!("{in_the_middle} of {ROUNDS} kills hit work under way");
    assert!(in_the_middle >= ROUNDS / 2, "{in_the_middle}");
}

/// The next incarnation takes the device over: the page that lies on it is still there, without having been home.
#[test]
#[ignore = "runs in the guest: tests/guest/run edu"]
fn the_frame_outlives_its_driver() {
    let scene = Scene::start(1);
    scene.fill(9);
    scene.out();
    for _ in 0..3 {
        let killed = scene.bed.kill("edu0");
        scene.bed.wait_ready("edu0", killed);
        assert_eq!(scene.there(), 1, "nobody brought it home");
    }
    scene.compare(9);
}

/// Hot-unplug: the kernel waits until driver and vault have let go of the device.
#[test]
#[ignore = "runs in the guest: tests/guest/run edu"]
fn unplugging_lets_go_of_the_device_and_hurts_nobody_else() {
    let scene = Scene::start(1);
    scene.fill(3);
    scene.out();
    let incarnation = scene.bed.operator().status().unwrap().iter().find(|s| s.name == "edu0").unwrap().incarnation;
    // Returns when the device is free. Without the vault's help it never would.
    fs::write("/sys/bus/pci/drivers/vfio-pci/unbind", address()).unwrap();
    assert!(!fs::exists(format!("/sys/bus/pci/devices/{}/driver", address())).unwrap());

    // The device is free as soon as its last descriptor is closed, an instant before the supervisor has reaped the driver.
    let same = |status: &ServiceStatus| status.state == "ready" && status.incarnation == 1;
    let mut operator = scene.bed.operator();
    let mut services = operator.status().unwrap();
    while services.iter().any(|status| status.name == "edu0" && same(status)) {
        std::thread::yield_now();
        services = operator.status().unwrap();
    }
    assert!(services.iter().all(|status| status.name == "edu0" || same(status)), "{services:#?}");
    assert_eq!(incarnation, 1);
    let other = scene.bed.session();
    let memory = other.allocate(PAGE).unwrap();
    memory.write_u64(0, 5).unwrap();
    assert_eq!(memory.read_u64(0).unwrap(), 5);
}
