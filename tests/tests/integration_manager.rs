//! The supervisor as the main process of a systemd unit (`services/deploy/systemd`), against a manager that the test plays. (A real systemd:
//! `integration_packages.rs`.)

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use uhmm_kernel_hook::PidFd;
use uhmm_sdk::{Operator, Session};
use uhmm_tests::PATIENCE;
use uhmm_tests::manager::Manager;

/// What the manager allows between two signs of life.
const WATCHDOG: Duration = Duration::from_millis(500);
/// Longer than any pause of a supervisor that lives.
const QUIET: Duration = Duration::from_secs(3);

struct Unit {
    manager: Manager,
    dir: tempfile::TempDir,
    main: Child,
}

impl Unit {
    fn start() -> Self {
        let private = std::fs::Permissions::from_mode(0o700);
        let dir = tempfile::Builder::new().prefix("uhmm-unit-").permissions(private).tempdir().expect("a folder");
        let manager = Manager::default();
        std::fs::write(dir.path().join("manifest.toml"), uhmm_tests::manifest("64MiB", "")).expect("the manifest");
        let main = manager.start(dir.path(), &dir.path().join("manifest.toml"), WATCHDOG);
        Self { manager, dir, main }
    }

    fn manifest(&self) -> PathBuf {
        self.dir.path().join("manifest.toml")
    }

    fn operator(&self) -> Operator {
        Operator::connect(Some(self.dir.path())).expect("an operator connection")
    }

    /// kill -9 of all processes, the supervisor first.
    fn kill_all(&mut self) {
        let services = self.operator().status().expect("status");
        let open = |pid: u32| PidFd::open(pid).expect("it runs");
        let services: Vec<PidFd> = services.iter().filter(|service| service.pid != 0).map(|s| open(s.pid)).collect();
        assert_eq!(services.len(), 4, "pager, mirror, soft0, holder");
        self.main.kill().expect("kill the supervisor");
        for service in &services {
            service.signal(Signal::KILL).expect("kill");
        }
        self.main.wait().expect("reap");
        for service in &services {
            let mut entry = [rustix::event::PollFd::new(service, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut entry, None).expect("it ends");
        }
    }

    /// Until nothing has been on the move for a tenth of a second: services that have come back go on telling what they keep.
    fn wait_until_whole(&self) {
        let deadline = Instant::now() + PATIENCE;
        let mut since = Instant::now();
        while since.elapsed() < Duration::from_millis(100) {
            let heard = self.manager.heard();
            if heard.kept.contains_key("supervisor!moving") {
                since = Instant::now();
            }
            drop(heard);
            assert!(Instant::now() < deadline, "the store is on the move all the time");
            std::thread::yield_now();
        }
    }

    fn start_again(&mut self) {
        self.main = self.manager.start(self.dir.path(), &self.manifest(), WATCHDOG);
        self.manager.wait_for("READY=1");
    }

    fn stop(mut self) {
        self.operator().shutdown().expect("shutdown");
        assert!(self.main.wait().expect("reap").success());
        self.manager.wait_for("STOPPING=1");
    }
}

impl Drop for Unit {
    /// A test that fails leaves nothing running: what does not listen ends when its folder is gone.
    fn drop(&mut self) {
        if !self.main.try_wait().is_ok_and(|ended| ended.is_some()) {
            if Operator::connect(Some(self.dir.path())).and_then(Operator::shutdown).is_err() {
                let _ = self.main.kill();
            }
            let _ = self.main.wait();
        }
    }
}

#[test]
fn integration_manager_hears_that_all_is_ready_and_signs_of_life_until_the_loop_hangs() {
    let unit = Unit::start();
    unit.manager.wait_for("READY=1");
    // Services that are no part of the core come later, and the first words may say that they are missing.
    let all_ready = |line: &String| line == "STATUS=3 of 3 services are ready";
    if !unit.manager.heard().lines.iter().any(all_ready) {
        unit.manager.wait_for("STATUS=3 of 3 services are ready");
    }
    for _ in 0..3 {
        unit.manager.wait_for("WATCHDOG=1");
    }
    let supervisor = PidFd::open(unit.main.id()).expect("it runs");
    supervisor.signal(Signal::STOP).expect("stop");
    unit.manager.wait_until_quiet(QUIET);
    supervisor.signal(Signal::CONT).expect("continue");
    let before = unit.manager.heard().lines.len();
    while unit.manager.heard().lines.len() < before + 2 {
        unit.manager.wait_for("WATCHDOG=1");
    }
    let killed = unit.operator().kill("soft0").expect("kill");
    assert!(unit.manager.wait_for("STATUS=2 of 3").contains("not soft0"), "incarnation {}", killed.incarnation);
    unit.manager.wait_for("STATUS=3 of 3");
    unit.stop();
}

#[test]
fn integration_manager_keeps_the_vault_when_every_process_dies_at_once() {
    let mut unit = Unit::start();
    unit.manager.wait_for("READY=1");
    let session = Session::connect(Some(unit.dir.path())).expect("a session");
    let region = session.allocate(8 << 20).expect("memory");
    let arena = region.arena().expect("an arena");
    let words = arena.alloc_slice_copy(&vec![7u64; 1 << 19]).expect("room");
    let device = session.device("soft0").expect("a device");
    for round in 0..3u64 {
        words.iter_mut().enumerate().for_each(|(index, word)| *word = round << 32 | index as u64);
        session.migrate(region.addr(), region.len_bytes(), &device).expect("migrate");
        // What dies while the store is being changed is not believed: this is about one that is whole.
        unit.wait_until_whole();
        unit.kill_all();
        // What they had sent lies in the socket.
        unit.manager.wait_until_quiet(Duration::from_millis(200));
        let heard = unit.manager.heard();
        for name in ["pager!journal", "pager!kit/whole", "soft0!kit/listener", "supervisor!state"] {
            assert!(heard.kept.contains_key(name), "{name}: {:?}", heard.kept.keys());
        }
        assert!(!heard.kept.contains_key("supervisor!moving"));
        drop(heard);
        unit.start_again();
        let wrong = words.iter().enumerate().filter(|(index, word)| **word != round << 32 | *index as u64).count();
        assert_eq!(wrong, 0, "words that are not what was written, in round {round}");
    }
    unit.stop();
}

#[test]
fn integration_manager_store_follows_what_comes_and_goes() {
    let unit = Unit::start();
    unit.manager.wait_for("READY=1");
    // Signs of life never end; the store is quiet when several of them came without anything else.
    let settle = |unit: &Unit| loop {
        let given = unit.manager.heard().given;
        (0..4).for_each(|_| drop(unit.manager.wait_for("WATCHDOG=1")));
        let heard = unit.manager.heard();
        if heard.given == given {
            break heard.kept.len();
        }
    };
    let names = |unit: &Unit| unit.manager.heard().kept.keys().cloned().collect::<Vec<_>>();
    let before = settle(&unit);
    let session = Session::connect(Some(unit.dir.path())).expect("a session");
    let with_space = settle(&unit);
    assert!(with_space >= before + 2, "userfaultfd and state: {:?}", names(&unit));
    let region = session.allocate(1 << 20).expect("memory");
    assert_eq!(settle(&unit), with_space + 2, "memory and directory: {:?}", names(&unit));
    drop(region);
    assert_eq!(settle(&unit), with_space, "{:?}", names(&unit));
    unit.stop();
}
