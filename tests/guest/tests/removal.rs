//! Hot-unplug while the whole system runs: the kernel takes a device away (unbind), which lasts until nobody has it open or mapped any more. Driver, vault and
//! pager let go by themselves; what was on the device is poisoned when the driver is given up, and nobody else notices anything.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use uhmm_guest::devices::{IVSHMEM, NVME, vfio_devices};
use uhmm_sdk::{Job, PageStatus, Region, Residency, Session, Target};
use uhmm_tests::{PATIENCE, RESTART, TestBed, pattern::word};

const PAGES: u64 = 256;
const LEN: u64 = PAGES * 4096;
/// Letting go takes what the slowest of the driver's threads takes to end, on a machine that is emulated.
const UNBIND_MAX: Duration = Duration::from_secs(15);

/// The device that is taken away, and a software device.
fn manifest(driver: &str, device: &str) -> String {
    let service =
        |name: &str, kind: &str, more: &str| format!("[[service]]\nname = \"{name}\"\nkind = \"{kind}\"\n{more}\n");
    // Given up after three attempts to open what is gone.
    let lost =
        format!("driver = \"{driver}\"\nrestart = {{ backoff_min_ms = 1, backoff_max_ms = 20, max_deaths = 3 }}");
    let soft = format!("driver = \"soft\"\n{RESTART}");
    [
        service("pager", "pager", RESTART),
        service("mirror", "mirror", RESTART),
        service("pci0", "driver", &lost),
        service("soft0", "driver", &soft),
        format!("[[device]]\nname = \"pci0\"\nservice = \"pci0\"\n{device}\n"),
        "[[device]]\nname = \"soft0\"\nservice = \"soft0\"\nmemory_bytes = \"16MiB\"\n".to_owned(),
    ]
    .concat()
}

fn fill(region: &Region, seed: u64) {
    for page in 0..region.len_bytes() / 4096 {
        [0, 511].iter().for_each(|at| region.write_u64(page * 4096 + at * 8, word(seed, page * 512 + at)).unwrap());
    }
}

fn compare_page(region: &Region, seed: u64, page: u64) {
    for at in [0, 511] {
        assert_eq!(
            region.read_u64(page * 4096 + at * 8).unwrap(),
            word(seed, page * 512 + at),
            "page {page} of {seed}"
        );
    }
}

/// Uses the software device until it is told to stop; returns how often, and the longest time of one round.
fn bystander(session: &Session, stop: &AtomicBool) -> (u64, Duration) {
    let device = session.device("soft0").unwrap();
    let region = session.allocate(64 * 4096).unwrap();
    let (mut rounds, mut longest) = (0, Duration::ZERO);
    while !stop.load(Ordering::Acquire) || rounds == 0 {
        let begun = Instant::now();
        fill(&region, rounds);
        assert!(session.migrate(region.addr(), region.len_bytes(), &device).unwrap().complete());
        let job = Job::new("scan", [region.addr(), region.len_bytes(), 0]).idempotent();
        device.run(job).unwrap();
        (0..64).for_each(|page| compare_page(&region, rounds, page));
        (rounds, longest) = (rounds + 1, longest.max(begun.elapsed()));
    }
    (rounds, longest)
}

/// Takes the device at `address` away while pages lie on it, others are on their way there and back, and somebody else uses another device.
fn taken_away(driver: &str, address: &str, device: &str) {
    let bed = TestBed::with_log(&manifest(driver, device));
    let (session, other) = (bed.session(), bed.session());
    let pci = session.device("pci0").unwrap();
    let (there, moving) = (session.allocate(LEN).unwrap(), session.allocate(LEN).unwrap());
    fill(&there, 1);
    fill(&moving, 2);
    assert!(session.migrate(there.addr(), LEN, &pci).unwrap().complete());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let bystander = scope.spawn(|| bystander(&other, &stop));
        let mover = scope.spawn(|| {
            // Until something of it is refused.
            let targets = [pci.target(), Target::Home];
            let way = |round: usize| session.migrate(moving.addr(), LEN, targets[round % 2]);
            (0..).map(way).take_while(|report| report.as_ref().is_ok_and(|report| report.complete())).count()
        });
        // The flag is set even if something here fails, or the scope would never end.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let begun = Instant::now();
            // Returns when the device is free.
            fs::write("/sys/bus/pci/drivers/vfio-pci/unbind", address).unwrap();
            let took = begun.elapsed();
            assert!(!Path::new("/sys/bus/pci/devices").join(address).join("driver").exists());
            bed.wait_log("what only it can reach is poisoned");
            println!(
                "unbind took {took:?}, all of it {:?}; migrations before: {}",
                begun.elapsed(),
                mover.join().unwrap()
            );
            assert!(took < UNBIND_MAX, "{took:?}: somebody held the device");
            let deadline = Instant::now() + PATIENCE;
            while session.residency_summary(there.addr(), LEN).unwrap().poisoned_pages < PAGES {
                assert!(Instant::now() < deadline, "never poisoned:\n{}", bed.log());
                std::thread::yield_now();
            }
        }));
        stop.store(true, Ordering::Release);
        let (rounds, longest) = bystander.join().unwrap();
        println!("bystander: {rounds} rounds, the longest {longest:?}");
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });

    // A clear report: of every page, to everybody who asks, and to the operator.
    let report = session.migrate(there.addr(), LEN, Target::Home).unwrap();
    assert_eq!(report.pages_with(PageStatus::Poisoned), PAGES, "{report:?}");
    let job = pci.submit(Job::new("sum", [there.addr(), LEN]).deadline(Duration::from_secs(5)));
    println!("a job is told: {}", job.wait().expect_err("nobody can run it"));
    let log = bed.log();
    for text in ["is lost: ", "it is being taken away", "The driver is held by the supervisor"] {
        assert!(log.contains(text), "{text:?} is not said:\n{log}");
    }
    assert_eq!(bed.status("pci0").state, "held");

    // Whatever is not poisoned has its bytes; new memory goes where there is a device.
    for run in session.residency(moving.addr(), LEN).unwrap() {
        if run.residency != Residency::Poisoned {
            let first = run.first_page;
            (first..first + run.page_count).for_each(|page| compare_page(&moving, 2, page));
        }
    }
    let fresh = session.allocate(LEN).unwrap();
    fill(&fresh, 3);
    let refused = session.migrate(fresh.addr(), LEN, &pci);
    assert!(!refused.as_ref().is_ok_and(|report| report.complete()), "{refused:?}");
    println!("a migration is told: {refused:?}");
    assert!(session.migrate(fresh.addr(), LEN, &session.device("soft0").unwrap()).unwrap().complete());
    (0..PAGES).for_each(|page| compare_page(&fresh, 3, page));
    for service in ["pager", "mirror", "soft0"] {
        assert_eq!((bed.status(service).state.as_str(), bed.status(service).incarnation), ("ready", 1), "{service}");
    }
}

/// The pager has the BAR mapped, which keeps the device as an open descriptor does.
#[test]
#[ignore = "runs in the guest: tests/guest/run removal"]
fn a_bar_is_let_go_of_and_nobody_else_is_hurt() {
    let address = vfio_devices(IVSHMEM).remove(0);
    taken_away("bar", &address, &format!("pci = \"{address}\"\nmemory_bytes = \"16MiB\""));
}

#[test]
#[ignore = "runs in the guest: tests/guest/run removal"]
fn an_nvme_controller_is_let_go_of_and_nobody_else_is_hurt() {
    let address = vfio_devices(NVME).remove(0);
    let more = "format = true\nstaging_bytes = \"2MiB\"\nmemory_bytes = \"16MiB\"";
    taken_away("nvme", &address, &format!("pci = \"{address}\"\n{more}"));
}
