//! Bad input on the command line: a clear error on stderr, an exit status, and nothing that runs is harmed.

use std::path::Path;
use std::process::{Command, Output};

use uhmm_tests::{TestBed, manifest, uhmm_exe};

/// A user who debugs a program of his own has this set, and did nothing that the insides of uhmm explain.
fn uhmm(args: &[&str]) -> Output {
    Command::new(uhmm_exe()).args(args).env("RUST_BACKTRACE", "1").output().expect("uhmm runs")
}

fn up_is_refused(manifest: &str, names: &[&str]) {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("manifest.toml");
    std::fs::write(&path, manifest).expect("manifest");
    let run_dir = dir.path().join("run");
    let output = uhmm(&["--run-dir", text(&run_dir), "up", "--manifest", text(&path)]);
    refused(&output, names);
    assert!(!run_dir.join("pager.sock").exists(), "something was started");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn refused(output: &Output, names: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    for name in names {
        assert!(said.contains(name), "{said:?} does not name {name:?}");
    }
    for inside in ["backtrace", "Backtrace", "::", "panicked"] {
        assert!(!said.contains(inside), "{said:?} shows the program's insides");
    }
}

#[test]
fn integration_a_manifest_with_an_unknown_key_is_refused() {
    up_is_refused(&manifest("8MiB", "colour = 3"), &["colour", "line"]);
}

#[test]
fn integration_a_manifest_with_a_missing_binary_is_refused() {
    let text = manifest("8MiB", "").replace("driver = \"soft\"", "command = [\"/nonexistent/driver\"]");
    up_is_refused(&text, &["/nonexistent/driver", "soft0"]);
}

#[test]
fn integration_a_manifest_with_a_cycle_is_refused() {
    let text = manifest("8MiB", "").replace("kind = \"pager\"", "kind = \"pager\"\nneeds = [\"soft0\"]");
    up_is_refused(&text, &["circle", "soft0"]);
}

#[test]
fn integration_a_manifest_that_is_not_there_is_named() {
    refused(&uhmm(&["up", "--manifest", "/nonexistent.toml"]), &["/nonexistent.toml"]);
}

#[test]
fn integration_a_socket_path_in_use_is_named_and_its_owner_unharmed() {
    let bed = TestBed::start("8MiB");
    let output = uhmm(&["--run-dir", text(bed.run_dir()), "up"]);
    refused(&output, &["supervisor.sock", "uhmm down"]);
    let services = bed.operator().status().expect("status");
    assert!(services.iter().all(|service| service.state == "ready" && service.incarnation == 1), "{services:#?}");
}

#[test]
fn integration_commands_without_a_running_system_say_so() {
    let dir = tempfile::tempdir().expect("folder");
    for command in ["status", "stats", "down"] {
        refused(&uhmm(&["--run-dir", text(dir.path()), command]), &["uhmm up"]);
    }
    refused(&uhmm(&["--run-dir", text(dir.path()), "kill", "pager"]), &["uhmm up"]);
}

#[test]
fn integration_a_service_that_is_not_in_the_plan_is_named() {
    let bed = TestBed::start("8MiB");
    refused(&uhmm(&["--run-dir", text(bed.run_dir()), "kill", "soft7"]), &["soft7"]);
    refused(&uhmm(&["device-model", "nvme", "--socket", "/nonexistent/folder/socket"]), &["/nonexistent/folder"]);
}

#[test]
fn integration_plan_doctor_status_and_stats_show_what_there_is() {
    let bed = TestBed::start("8MiB");
    let shown = |args: &[&str]| {
        let output = uhmm(&[&["--run-dir", text(bed.run_dir())], args].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    assert!(shown(&["plan"]).contains("soft0"));
    assert!(shown(&["doctor"]).contains("userfaultfd"));
    assert!(shown(&["status"]).contains("ready"));
    let stats: serde_json::Value = serde_json::from_str(&shown(&["stats", "--json"])).expect("JSON");
    assert_eq!(stats["pager"]["regions"], 0);
    assert_eq!(stats["supervisor"]["services"], 3);
}

#[test]
fn integration_output_that_nobody_reads_ends_the_command_without_a_panic() {
    let (reader, writer) = std::io::pipe().expect("pipe");
    drop(reader);
    let output = Command::new(uhmm_exe()).arg("doctor").stdout(writer).output().expect("uhmm runs");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn integration_the_demo_refuses_a_path_that_is_not_there() {
    refused(&uhmm(&["demo", "/nonexistent/text"]), &["/nonexistent/text"]);
}

#[test]
fn integration_a_run_directory_that_others_can_enter_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().expect("folder");
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("mode");
    refused(&uhmm(&["--run-dir", text(dir.path()), "up"]), &["0700", text(dir.path())]);
    assert!(!dir.path().join("supervisor.sock").exists());
}
