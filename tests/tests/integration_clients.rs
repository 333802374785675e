//! `[[client]]` rules: who may use what, by what the kernel says of a process. Over quota is told so, and costs nobody else.
//!
//! Other clients are processes of their own: this test program started again with a role in its environment.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use uhmm_kernel_hook::confine::effective_uid;
use uhmm_sdk::{ErrorCode, Session};
use uhmm_tests::{TestBed, manifest_of, uhmm_exe};

const MIB: u64 = 1 << 20;
const ROLE: &str = "UHMM_TEST_CLIENTS_RUN_DIR";

fn system(rules: &str) -> TestBed {
    TestBed::with_log(&format!("{}\n{rules}", manifest_of(2, "32MiB", "")))
}

fn own_rule(more: &str) -> String {
    format!("[[client]]\nname = \"mine\"\nuser = \"{}\"\n{more}\n", effective_uid())
}

fn refusal(result: Result<impl Sized, uhmm_sdk::Error>) -> (ErrorCode, String) {
    match result.map(drop).expect_err("it must be refused") {
        uhmm_sdk::Error::Service { code, text } => (code, text),
        other => panic!("{other}"),
    }
}

/// Not a test of its own: does nothing unless it is started as another client.
#[test]
fn integration_clients_other_role() {
    let Ok(run_dir) = std::env::var(ROLE) else { return };
    let session = match Session::connect(Some(Path::new(&run_dir))) {
        Ok(session) => session,
        Err(error) => return println!("refused: {error}"),
    };
    let Ok(region) = session.allocate(8 * MIB) else { return println!("no region") };
    region.write_u64(0, 7).expect("write");
    let migrated =
        session.device("soft0").and_then(|device| session.migrate(region.addr(), region.len_bytes(), &device));
    match migrated {
        Ok(report) => println!("migrated: {} {}", report.moved_pages, report.why),
        Err(error) => println!("not migrated: {error}"),
    }
}

fn other_client(bed: &TestBed, configure: impl FnOnce(&mut Command)) -> String {
    let mut command = Command::new(std::env::current_exe().expect("exe"));
    command.args(["--exact", "integration_clients_other_role", "--nocapture"]).env(ROLE, bed.run_dir());
    configure(&mut command);
    let Output { stdout, stderr, .. } = command.output().expect("the other client runs");
    format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr))
}

#[test]
fn integration_clients_that_no_rule_names_are_refused_and_told_why() {
    let bed = system("[[client]]\nname = \"somebody\"\nuser = \"4242\"\n");
    let (code, text) = refusal(Session::connect(Some(bed.run_dir())));
    assert_eq!(code, ErrorCode::Permission, "{text}");
    assert!(text.contains("[[client]]") && text.contains(&format!("user {}", effective_uid())), "{text}");
    // An operator is none, and sees that everything runs.
    assert_eq!(bed.status("pager").state, "ready");
}

#[test]
fn integration_clients_use_the_devices_of_their_rule_and_no_others() {
    let bed = system(&own_rule("devices = [\"soft1\"]"));
    let session = bed.session();
    let region = session.allocate(2 * MIB).expect("region");
    region.write_u64(0, 11).expect("write");
    let allowed = session.device("soft1").expect("device");
    assert!(session.migrate(region.addr(), region.len_bytes(), &allowed).expect("migrate").complete());
    let forbidden =
        session.device("soft0").and_then(|device| session.migrate(region.addr(), region.len_bytes(), &device));
    let (code, text) = refusal(forbidden);
    assert_eq!(code, ErrorCode::Permission, "{text}");
    assert!(text.contains("soft0") && text.contains("\"mine\""), "{text}");
    // By way of the driver, too.
    if let Ok(device) = session.device("soft0") {
        let (code, text) = refusal(device.write(region.addr(), &[1]));
        assert_eq!(code, ErrorCode::Permission, "{text}");
    }
    assert_eq!(region.read_u64(0).expect("read"), 11);
    // A new pager knows it, and so does one more.
    for _ in 0..2 {
        let killed = bed.kill("pager");
        bed.wait_ready("pager", killed);
        let device = session.device("soft0");
        let again = device.and_then(|device| session.migrate(region.addr(), region.len_bytes(), &device));
        assert_eq!(refusal(again).0, ErrorCode::Permission);
    }
}

#[test]
fn integration_clients_have_the_device_memory_of_their_rule_together() {
    let rules = own_rule("device_memory_bytes = \"6MiB\"") + "[[client]]\nname = \"rest\"\n";
    let bed = system(&rules);
    let session = bed.session();
    let (soft0, soft1) = (session.device("soft0").expect("device"), session.device("soft1").expect("device"));
    let region = session.allocate(8 * MIB).expect("region");
    for offset in (0..region.len_bytes()).step_by(4096) {
        region.write_u64(offset, offset).expect("write");
    }
    let report = session.migrate(region.addr(), 4 * MIB, &soft0).expect("migrate");
    assert!(report.complete());
    let report = session.migrate(region.addr() + 4 * MIB, 4 * MIB, &soft1).expect("migrate");
    assert_eq!(report.moved_pages, 2 * MIB / 4096, "over both devices");
    assert!(report.why.contains("\"mine\"") && report.why.contains(&(6 * MIB).to_string()), "{}", report.why);
    // A process of the same rule finds nothing left, a new pager counts the same, and what came home is free again.
    assert!(other_client(&bed, |_| {}).contains("migrated: 0"), "the rule's memory is used up");
    let killed = bed.kill("pager");
    bed.wait_ready("pager", killed);
    assert!(other_client(&bed, |_| {}).contains("migrated: 0"), "counted again");
    if effective_uid() == 0 {
        std::fs::set_permissions(bed.run_dir(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).expect("mode");
    }
    assert!(session.migrate(region.addr(), 8 * MIB, uhmm_sdk::Target::Home).expect("home").complete());
    let said = other_client(&bed, |_| {});
    assert!(said.contains(&format!("migrated: {}", 6 * MIB / 4096)), "{said}");
    for offset in (0..region.len_bytes()).step_by(4096) {
        assert_eq!(region.read_u64(offset).expect("read"), offset);
    }
}

#[test]
fn integration_clients_have_the_processes_and_regions_of_their_rule() {
    let bed = system(&own_rule("max_spaces = 1\nmax_regions_per_space = 2\nmax_region_bytes = \"4MiB\""));
    let session = bed.session();
    let said = other_client(&bed, |_| {});
    assert!(said.contains("refused") && said.contains("max_spaces") && said.contains("\"mine\""), "{said}");
    let (code, text) = refusal(session.allocate(8 * MIB));
    assert_eq!(code, ErrorCode::NoMemory, "{text}");
    assert!(text.contains("max_region_bytes") && text.contains("\"mine\""), "{text}");
    let kept: Vec<_> = (0..2).map(|_| session.allocate(MIB).expect("a region")).collect();
    let (code, text) = refusal(session.allocate(MIB));
    assert_eq!(code, ErrorCode::NoMemory, "{text}");
    assert!(text.contains("max_regions_per_space"), "{text}");
    drop((kept, session));
}

#[test]
fn integration_clients_are_told_apart_by_group() {
    if effective_uid() != 0 {
        // An ordinary user cannot take another group; the rule is looked up all the same.
        let bed = system(&own_rule(&format!("group = \"{}\"", rustix::process::getegid().as_raw())));
        drop(bed.session());
        return;
    }
    let rules = "[[client]]\nname = \"few\"\nuser = \"0\"\ngroup = \"4242\"\ndevices = []\n[[client]]\nname = \"all\"\nuser = \"0\"\n";
    let bed = system(rules);
    let said = other_client(&bed, |command| {
        command.gid(4242);
    });
    assert!(said.contains("\"few\"") && said.contains("soft0"), "{said}");
    assert!(other_client(&bed, |_| {}).contains("migrated: 2048"));
}

#[test]
fn integration_clients_rules_that_cannot_hold_are_refused_before_anything_starts() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("manifest.toml");
    for (rule, word) in [("user = \"no-such-user\"", "no-such-user"), ("devices = [\"gpu9\"]", "gpu9")] {
        std::fs::write(&path, format!("{}[[client]]\n{rule}\n", manifest_of(1, "8MiB", ""))).expect("a manifest");
        for words in [["plan"].as_slice(), ["--run-dir", "/nonexistent/run", "up", "--manifest"].as_slice()] {
            let output = Command::new(uhmm_exe()).args(words).arg(&path).output().expect("uhmm runs");
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && text.contains(word), "{words:?}: {text}");
        }
    }
}
