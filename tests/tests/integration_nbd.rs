//! The whole system with far memory on block servers: nbdkit, qemu-nbd, and uhmm's own, which does wrong on order. What is killed, cut, delayed,
//! done late, damaged or lied about costs time, or a page that says so, and never a byte that is wrong.
//!
//! `UHMM_ROUNDS=50` makes the tests that kill something long.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use uhmm_sdk::{Region, Residency, Session, Target};
use uhmm_tests::block::{BlockServer, Kind};
use uhmm_tests::far::*;
use uhmm_tests::pattern::{Rng, spin, word};
use uhmm_tests::{PATIENCE, TestBed, uhmm_exe};

#[test]
fn integration_nbd_pages_are_on_the_server_and_nobody_can_read_them() {
    let server = BlockServer::start(Kind::ours(&["--memory", "64MiB", "--file", "FILE"]));
    let mut scene = Scene::over(&[&server], SIZE);
    scene.out();
    let file = std::fs::File::open(server.file()).expect("the medium");
    let first_words: std::collections::HashSet<u64> = (0..PAGES).map(|page| word(1, page * 512)).collect();
    let (mut used, mut readable) = (0, 0);
    for at in (HEADER_BYTES..64 * MIB).step_by(4096) {
        let mut page = vec![0; 4096];
        file.read_exact_at(&mut page, at).expect("read");
        used += u64::from(page.iter().any(|byte| *byte != 0));
        readable += u64::from(first_words.contains(&u64::from_le_bytes(page[..8].try_into().expect("8 bytes"))));
    }
    assert_eq!((used, readable), (PAGES, 0), "every page once, and sealed");
    scene.sum(1);
    scene.compare(1, "home again");
    let in_use = || {
        let mut header = [0; 24];
        file.read_exact_at(&mut header, 0).expect("read");
        assert_eq!(&header[..7], b"uhmmfar");
        header[16]
    };
    assert_eq!((in_use(), server.counter("trims")), (1, 0));
    scene.bed.stop();
    assert_eq!(in_use(), 0, "given back");
    assert!(server.counter("trims") > 0, "and so is its room");
    std::mem::forget(scene.region);
    std::mem::forget(scene.session);
}

#[test]
fn integration_nbd_with_every_kind_of_server() {
    let kinds = [
        ("nbdkit, memory", Kind::nbdkit(&["memory", "64M"])),
        ("nbdkit, file", Kind::nbdkit(&["file", "FILE"])),
        (
            "nbdkit, small blocks",
            Kind::nbdkit(&[
                "--filter=blocksize-policy",
                "memory",
                "64M",
                "blocksize-minimum=512",
                "blocksize-maximum=64k",
                "blocksize-error-policy=error",
            ]),
        ),
        ("nbdkit, slow", Kind::nbdkit(&["--filter=delay", "memory", "64M", "rdelay=2ms", "wdelay=2ms"])),
        ("qemu-nbd", Kind::qemu(&["--shared=4", "--format=raw", "--discard=unmap", "FILE"])),
        ("qemu-nbd, one client", Kind::qemu(&["--format=raw", "FILE"])),
        ("ours", Kind::ours(&["--memory", "64MiB"])),
        ("ours, simple replies", Kind::ours(&["--memory", "64MiB", "--no-structured"])),
        ("ours, one connection", Kind::ours(&["--memory", "64MiB", "--no-multi-conn"])),
    ];
    for (name, kind) in kinds {
        println!("{name}");
        let server = BlockServer::start(kind);
        let scene = Scene::over(&[&server], SIZE);
        round_trips(&scene);
        scene.nothing_is_lost();
    }
}

#[test]
fn integration_nbd_by_tcp_the_confined_driver_reaches_its_server() {
    let server = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = server.local_addr().expect("an address");
    drop(server);
    let mut command = std::process::Command::new(uhmm_exe());
    command.args(["device-model", "block", "--memory", "64MiB", "--export", "far 0", "--tcp", &address.to_string()]);
    let folder = tempfile::tempdir().expect("a folder");
    let mut process = uhmm_tests::process::Process::start("server", &mut command, folder.path());
    process.ask("", |line| line == "ready").expect("it serves");
    let scene = Scene::at(&[format!("nbd://{address}/far%200")], SIZE);
    round_trips(&scene);
    scene.nothing_is_lost();
}

/// Servers whose medium outlives them are killed and come back in the middle of everything.
fn killed_again_and_again(kind: Kind, seed: u64) {
    let server = BlockServer::start(kind);
    let scene = Scene::over(&[&server], QUICK);
    let mut rng = Rng::new(seed);
    for round in 0..rounds(5) {
        let seed = round / 2 + 1;
        if round % 2 == 0 {
            scene.fill(seed);
        }
        let steps = rng.below(4_000_000);
        std::thread::scope(|scope| {
            let killer = scope.spawn(|| {
                spin(steps);
                server.kill();
                server.restart();
            });
            if round % 2 == 0 {
                scene.try_out();
            } else {
                assert_eq!(scene.home(), Vec::<u64>::new(), "round {round}: {}", scene.bed.log());
            }
            killer.join().expect("killed");
        });
        if round % 2 == 1 {
            scene.compare(seed, &format!("round {round}"));
        }
    }
    scene.compare((rounds(5) - 1) / 2 + 1, "the end");
    scene.nothing_is_lost();
    // And the device is as good as before.
    let deadline = Instant::now() + PATIENCE;
    scene.fill(99);
    while scene.on_device() < PAGES {
        assert!(Instant::now() < deadline, "{} of {PAGES} pages leave: {}", scene.on_device(), scene.bed.log());
        scene.try_out();
    }
    scene.sum(99);
    scene.compare(99, "after the last");
}

#[test]
fn integration_nbd_nbdkit_is_killed_and_started_again() {
    killed_again_and_again(Kind::nbdkit(&["file", "FILE"]), 1);
}

#[test]
fn integration_nbd_qemu_is_killed_and_started_again() {
    killed_again_and_again(Kind::qemu(&["--shared=4", "--format=raw", "FILE"]), 2);
}

#[test]
fn integration_nbd_driver_is_killed_in_the_middle_of_transfers() {
    let server = BlockServer::start(Kind::nbdkit(&["memory", "64M"]));
    let scene = Scene::over(&[&server], QUICK);
    let mut rng = Rng::new(42);
    let (mut in_the_middle, count) = (0, rounds(8));
    for round in 0..count {
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
        }
    }
    println!("{in_the_middle} of {count} rounds were in the middle");
    scene.nothing_is_lost();
}

/// A stalled write is done after the reconnect. Its block rests until then, so that nothing newer is under it.
#[test]
fn integration_nbd_a_server_that_does_old_writes_late_costs_nothing() {
    let server = BlockServer::start(Kind::ours(&["--memory", "64MiB", "--late-ms", "700"]));
    let scene = Scene::over(&[&server], "memory_bytes = \"16MiB\"\nsettle_s = 2");
    for seed in 1..rounds(12) {
        scene.fill(seed);
        if seed % 3 == 1 {
            server.order("fault late@4");
        }
        scene.try_out();
        assert_eq!(scene.home(), Vec::<u64>::new(), "{}", scene.bed.log());
        scene.compare(seed, "home again");
    }
    let deadline = Instant::now() + PATIENCE;
    while server.counter("late_writes") == 0 {
        assert!(Instant::now() < deadline, "no write was late");
    }
    scene.nothing_is_lost();
}

/// The same where the manifest says that there are no late writes, which is wrong: pages may be lost, and say so. None is wrong.
#[test]
fn integration_nbd_a_late_write_that_nobody_waited_for_is_noticed() {
    let server = BlockServer::start(Kind::ours(&["--memory", "23MiB", "--late-ms", "300"]));
    let scene = Scene::over(&[&server], "memory_bytes = \"16MiB\"\nsettle_s = 0");
    for seed in 1..rounds(30) {
        scene.session.migrate(scene.region.addr(), LEN, Target::Home).expect("home");
        let lost = scene.home();
        if !lost.is_empty() {
            scene.bed.wait_log("not those that were put there last");
            scene.compare_all_but(seed - 1, &lost);
            return;
        }
        scene.fill(seed);
        ["fault late@1", "fault late@9"].iter().for_each(|order| drop(server.order(order)));
        scene.try_out();
        let late = server.counter("late_writes");
        let deadline = Instant::now() + Duration::from_secs(1);
        while server.counter("late_writes") == late && Instant::now() < deadline {
            scene.try_out();
        }
    }
    println!("No late write has met a newer page");
}

#[test]
fn integration_nbd_connections_that_are_cut_cost_time_only() {
    let server = BlockServer::start(Kind::ours(&["--memory", "64MiB"]));
    let scene = Scene::over(&[&server], QUICK);
    let mut rng = Rng::new(7);
    for round in 0..rounds(8) {
        scene.fill(round);
        let steps = rng.below(300_000);
        std::thread::scope(|scope| {
            let cutter = scope.spawn(|| {
                for _ in 0..3 {
                    spin(steps);
                    server.order("cut");
                }
            });
            scene.try_out();
            assert_eq!(scene.home(), Vec::<u64>::new(), "{}", scene.bed.log());
            cutter.join().expect("cut");
        });
        scene.compare(round, "home again");
    }
    assert!(server.counter("connections") > 4, "it was cut");
    scene.nothing_is_lost();
}

/// Everything that costs tries only, all at once.
#[test]
fn integration_nbd_a_moody_server_loses_nothing() {
    let moods = [
        "error=3",
        "full=3",
        "delay=10",
        "reorder=100",
        "cut=4",
        "half=4",
        "wrong-magic=2",
        "wrong-handle=2",
        "too-long=2",
    ];
    let args: Vec<&str> = moods.iter().flat_map(|mood| ["--fault", mood]).collect();
    let args = [&["--memory", "64MiB", "--late-ms", "30"], &args[..]].concat();
    let server = BlockServer::start(Kind::ours(&args));
    let scene = Scene::over(&[&server], QUICK);
    for seed in 1..rounds(10) {
        scene.fill(seed);
        scene.try_out();
        let lost = scene.home();
        assert_eq!(lost, Vec::<u64>::new(), "{}", scene.bed.log());
        scene.compare(seed, "home again");
    }
    assert!(server.counter("faults") > 10);
}

/// One that lies and damages costs pages, which say so.
#[test]
fn integration_nbd_a_server_that_lies_never_shows_a_wrong_byte() {
    let moods = ["lie=20", "corrupt=20", "duplicate=5", "late=5", "drop=2", "drop-answer=2", "error=20"];
    let args: Vec<&str> = moods.iter().flat_map(|mood| ["--fault", mood]).collect();
    let args = [&["--memory", "64MiB", "--late-ms", "200"], &args[..]].concat();
    let server = BlockServer::start(Kind::ours(&args));
    // Short patience: a connection with a request that is not answered is given up after 5 s.
    let scene = Scene::over(&[&server], &format!("{QUICK}\npatience_s = 10"));
    let mut all_lost = 0;
    for seed in 1..rounds(8) {
        let region = scene.session.allocate(LEN).expect("region");
        let scene = Scene2 { scene: &scene, region: &region };
        all_lost += scene.round(seed);
    }
    println!("{all_lost} pages were lost, none was wrong");
    assert!(server.counter("faults") > 10);
}

/// A region of its own: what is lost stays lost.
struct Scene2<'a> {
    scene: &'a Scene,
    region: &'a Region,
}

impl Scene2<'_> {
    fn round(&self, seed: u64) -> u64 {
        let (region, session) = (self.region, &self.scene.session);
        for index in 0..WORDS {
            region.write_u64(index * 8, word(seed, index)).expect("write");
        }
        drop(session.migrate(region.addr(), LEN, &self.scene.device).expect("migrate"));
        drop(session.migrate(region.addr(), LEN, Target::Home).expect("home"));
        let (mut page, mut lost) = (0, 0);
        for run in session.residency(region.addr(), LEN).expect("residency") {
            if run.residency == Residency::Poisoned {
                lost += run.page_count;
            } else {
                for index in page * 512..(page + run.page_count) * 512 {
                    assert_eq!(region.read_u64(index * 8).expect("read"), word(seed, index), "word {index}");
                }
            }
            page += run.page_count;
        }
        lost
    }
}

#[test]
fn integration_nbd_filters_of_nbdkit_that_fail_now_and_then() {
    let args = ["--filter=error", "memory", "64M", "error=EIO", "error-pread-rate=1%", "error-pwrite-rate=10%"];
    let server = BlockServer::start(Kind::nbdkit(&args));
    // A header that cannot be written at the start is another story: the supervisor tries again.
    let scene = Scene::over(&[&server], SIZE);
    for seed in 1..4 {
        scene.fill(seed);
        scene.try_out();
        assert_eq!(scene.home(), Vec::<u64>::new(), "{}", scene.bed.log());
        scene.compare(seed, "home again");
    }
}

#[test]
fn integration_nbd_a_server_that_stays_away_poisons_what_it_had_and_nothing_leaves_for_it() {
    let server = BlockServer::start(Kind::nbdkit(&["file", "FILE"]));
    let scene = Scene::over(&[&server], "memory_bytes = \"16MiB\"\npatience_s = 2");
    scene.session.migrate(scene.region.addr(), LEN / 2, &scene.device).expect("migrate");
    server.kill();
    // The other half stays at home, soon.
    scene.session.migrate(scene.region.addr() + LEN / 2, LEN / 2, &scene.device).expect("migrate");
    for index in WORDS / 2..WORDS {
        assert_eq!(scene.region.read_u64(index * 8).expect("read"), word(1, index));
    }
    let lost = scene.home();
    assert_eq!(lost, (0..PAGES / 2).collect::<Vec<_>>());
    scene.bed.wait_log("has been away for");
    server.restart();
    scene.compare_all_but(1, &lost);
}

#[test]
fn integration_nbd_a_server_that_comes_back_in_time_costs_nothing_but_time() {
    let server = BlockServer::start(Kind::nbdkit(&["file", "FILE"]));
    let scene = Scene::over(&[&server], SIZE);
    scene.out();
    server.kill();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| scene.region.read_u64(8).expect("read"));
        scene.bed.wait_log("cannot be reached");
        server.restart();
        assert_eq!(reader.join().expect("read"), word(1, 1));
    });
    scene.compare(1, "home again");
    scene.nothing_is_lost();
}

/// A server that has lost everything is another one: pages that were there are gone, at once, and the next ones may go there.
#[test]
fn integration_nbd_a_server_that_comes_back_empty_has_lost_its_pages() {
    let server = BlockServer::start(Kind::nbdkit(&["memory", "64M"]));
    let scene = Scene::over(&[&server], SIZE);
    scene.out();
    server.kill();
    server.restart();
    scene.bed.wait_log("holds something else than before");
    let deadline = Instant::now() + PATIENCE;
    while scene.bed.metric("pager", "poisoned") < PAGES {
        assert!(Instant::now() < deadline, "{}", scene.bed.log());
        std::thread::yield_now();
    }
    let other = scene.session.allocate(MIB).expect("region");
    other.write_u64(0, 5).expect("write");
    let deadline = Instant::now() + PATIENCE;
    while !scene.session.migrate(other.addr(), MIB, &scene.device).is_ok_and(|report| report.complete()) {
        assert!(Instant::now() < deadline, "{}", scene.bed.log());
    }
    assert_eq!(other.read_u64(0).expect("read"), 5);
}

#[test]
fn integration_nbd_a_shrunk_export_is_said() {
    let server = BlockServer::start(Kind::ours(&["--memory", "64MiB"]));
    let scene = Scene::over(&[&server], "memory_bytes = \"16MiB\"\npatience_s = 2");
    scene.out();
    server.order(&format!("size {}", 2 * MIB));
    server.order("cut");
    let lost = scene.home();
    assert!(!lost.is_empty());
    scene.bed.wait_log("are needed");
    scene.compare_all_but(1, &lost);
}

/// What is wrong with a server is said at the start, with its url, and everybody else goes on.
#[test]
fn integration_nbd_what_cannot_be_had_is_refused_at_the_start() {
    let refused = |url: String, options: &str, said: &str| {
        let mut bed = TestBed::without_waiting(&manifest(std::slice::from_ref(&url), options));
        bed.wait_log(said);
        assert!(bed.log().contains(&url), "the url is named: {}", bed.log());
        assert_ne!(bed.status("far0").state, "ready");
        let session = bed.session();
        assert!(session.device("soft0").is_ok(), "the other device works");
        drop(session);
        bed.stop();
    };
    let folder = tempfile::tempdir().expect("a folder");
    refused(format!("nbd+unix:///?socket={}", folder.path().join("nobody").display()), SIZE, "cannot be reached");
    let server = BlockServer::start(Kind::nbdkit(&["--readonly", "memory", "64M"]));
    refused(server.url(), SIZE, "read-only");
    let server = BlockServer::start(Kind::nbdkit(&["memory", "8M"]));
    refused(server.url(), SIZE, "are needed");
    let server = BlockServer::start(Kind::ours(&["--memory", "64MiB", "--export", "far0"]));
    let url = format!("nbd+unix:///far1?socket={}", server.socket().display());
    refused(url, SIZE, "it has no export of that name");
    let server = BlockServer::start(Kind::qemu(&["--export-name=far0", "--format=raw", "FILE"]));
    refused(server.url(), SIZE, "it refuses export");
    let large = ["blocksize-minimum=64k", "blocksize-preferred=64k", "blocksize-maximum=32M"];
    let args = [&["--filter=blocksize-policy", "memory", "64M"], &large[..]].concat();
    let server = BlockServer::start(Kind::nbdkit(&args));
    refused(server.url(), SIZE, "smaller blocks");
    let server = BlockServer::start(Kind::nbdkit(&["--filter=cow", "pattern", "64M"]));
    refused(server.url(), SIZE, "holds data that is not uhmm's");
    // Something that is no block server.
    let socket = folder.path().join("letter");
    let listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            drop(std::io::Write::write_all(&mut { stream }, b"220 mail.example ESMTP Postfix (Debian/GNU)\r\n"));
        }
    });
    refused(format!("nbd+unix:///?socket={}", socket.display()), SIZE, "no NBD server");
}

#[test]
fn integration_nbd_two_systems_never_share_an_export_and_a_dead_ones_is_taken() {
    let server = BlockServer::start(Kind::nbdkit(&["memory", "64M"]));
    let mut scene = Scene::over(&[&server], SIZE);
    scene.out();
    let mut other = TestBed::without_waiting(&manifest(&[server.url()], SIZE));
    other.wait_log("in use by another uhmm");
    other.stop();
    scene.compare(1, "the first one goes on");
    scene.bed.kill_all();
    let other = TestBed::with_log(&manifest(&[server.url()], SIZE));
    other.wait_ready("far0", 0);
    let session = other.session();
    let region = session.allocate(MIB).expect("region");
    region.write_u64(0, 5).expect("write");
    assert!(session.migrate(region.addr(), MIB, &session.device("far0").expect("device")).expect("migrate").complete());
    assert_eq!((region.read_u64(0).expect("read"), region.read_u64(4096).expect("read")), (5, 0));
    drop((region, session));
    std::mem::forget(scene.region);
    std::mem::forget(scene.session);
}

/// Two servers: either may go at any time, and a new one that has nothing takes its place.
#[test]
fn integration_nbd_of_two_servers_either_may_go_and_nobody_notices() {
    let servers = [0, 1].map(|_| BlockServer::start(Kind::nbdkit(&["memory", "64M"])));
    let scene = Scene::over(&[&servers[0], &servers[1]], &format!("{QUICK}\nreplicas = 2"));
    for round in 0..rounds(4) {
        scene.fill(round);
        let victim = &servers[(round % 2) as usize];
        std::thread::scope(|scope| {
            let killer = scope.spawn(|| {
                spin(500_000);
                victim.kill();
            });
            scene.out();
            scene.sum(round);
            scene.out();
            killer.join().expect("killed");
        });
        // Alone, the other one has everything.
        assert_eq!(scene.home(), Vec::<u64>::new(), "{}", scene.bed.log());
        scene.compare(round, "with one server");
        scene.out();
        // The operator sees it.
        scene.wait_metrics(|away, behind| away == 1 && behind > 0);
        victim.restart();
        // All of it, before the other one goes in the next round.
        scene.wait_metrics(|away, behind| away == 0 && behind == 0);
    }
    scene.nothing_is_lost();
}

#[test]
fn integration_nbd_of_two_servers_the_one_that_lies_is_found_out() {
    let liar = BlockServer::start(Kind::ours(&["--memory", "64MiB", "--fault", "lie=100", "--fault", "corrupt=100"]));
    let honest = BlockServer::start(Kind::ours(&["--memory", "64MiB"]));
    let scene = Scene::over(&[&liar, &honest], &format!("{QUICK}\nreplicas = 2"));
    for seed in 1..5 {
        scene.fill(seed);
        scene.out();
        scene.sum(seed);
        scene.out();
        assert_eq!(scene.home(), Vec::<u64>::new(), "{}", scene.bed.log());
        scene.compare(seed, "home again");
    }
    scene.bed.wait_log("the other server is asked");
    assert!(liar.counter("faults") > 5 && liar.counter("reads") > 0);
    scene.nothing_is_lost();
}

/// The driver dies while one server is behind, and the other one goes afterwards.
#[test]
fn integration_nbd_who_is_behind_is_known_to_the_next_driver() {
    let servers = [0, 1].map(|_| BlockServer::start(Kind::nbdkit(&["file", "FILE"])));
    let scene = Scene::over(&[&servers[0], &servers[1]], &format!("{QUICK}\nreplicas = 2"));
    scene.out();
    assert_eq!(scene.home(), Vec::<u64>::new());
    servers[0].kill();
    scene.fill(2);
    scene.out();
    let killed = scene.bed.kill("far0");
    scene.bed.wait_ready("far0", killed);
    // With its old pages, which are no good.
    servers[0].restart();
    scene.bed.wait_log("Server filled");
    servers[1].kill();
    assert_eq!(scene.home(), Vec::<u64>::new(), "{}", scene.bed.log());
    scene.compare(2, "from the one that was behind");
    scene.nothing_is_lost();
}

#[test]
fn integration_nbd_up_needs_a_url_and_a_size() {
    let server = BlockServer::start(Kind::nbdkit(&["memory", "64M"]));
    let folder = tempfile::tempdir().expect("a folder");
    let run_dir = folder.path().join("run");
    let mut command = std::process::Command::new(uhmm_exe());
    command.arg("--run-dir").arg(&run_dir).args(["up", "--nbd", &server.url(), "16MiB"]);
    let mut up = uhmm_tests::process::Process::start("up", &mut command, folder.path());
    up.ask("", |line| line == "ready").expect("it is up");
    let session = Session::connect(Some(&run_dir)).expect("a session");
    let region = session.allocate(MIB).expect("region");
    region.write_u64(8, 5).expect("write");
    let device = session.device("far0").expect("device");
    assert!(session.migrate(region.addr(), MIB, &device).expect("migrate").complete());
    assert_eq!(region.read_u64(8).expect("read"), 5);
    drop((region, session));
    uhmm_sdk::Operator::connect(Some(&run_dir)).expect("operator").shutdown().expect("down");
    up.end().expect("it ends in order");
}

/// One or two cases of every group; `uhmm conformance --driver nbd` holds for all.
const CONFORMANCE: &str = "^(T0[1-5]_|T1[0-3]_|T2[24]_|T3[0-4]_|K06_|K10_|K12_|F0[12]_|X01_|C01_|P16_|S04_|Z01_|\
                           IGT\\.(once|many-64k)\\.(malloc|mmap|mmap-shared|region)$)";

#[test]
fn integration_nbd_conformance_subset_holds() {
    let mut command = std::process::Command::new(uhmm_exe());
    command.args(["conformance", "--json", "--driver", "nbd", "--filter", CONFORMANCE]);
    let output = command.output().expect("uhmm conformance starts");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let failed = report["cases"].as_array().expect("cases").iter().filter(|case| case["status"] == "failed");
    assert_eq!(failed.collect::<Vec<_>>(), Vec::<&serde_json::Value>::new());
    assert!(report["passed"].as_u64().expect("a number") >= 30, "{report}");
}
