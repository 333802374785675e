//! The Debian packages under a real systemd (`tests/packages/machine`): installed, started, restarted, upgraded with a program at work, and
//! removed without a trace. And the recipes of `services/deploy`, as far as they can be held against something without running them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use uhmm_tests::{c, uhmm_exe};

fn deploy(path: &str) -> PathBuf {
    c::top().join("services/deploy").join(path)
}

fn output(command: &mut Command, missing: &str) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; {missing}"))
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(deploy(folder))
        .expect("the folder")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == ending))
        .collect();
    found.sort();
    assert!(!found.is_empty(), "{folder} has no .{ending}");
    found
}

/// What the packages are made of, in one folder. Cargo leaves the library of a test build where the tests are, and not beside the program.
fn built(into: &Path) -> PathBuf {
    let folder = into.join("built");
    std::fs::create_dir_all(&folder).expect("a folder");
    let libraries = ["libuhmm.so", "libuhmm_preload.so"].map(|name| c::library_dir().join(name));
    for file in [uhmm_exe()].into_iter().chain(libraries) {
        std::fs::copy(&file, folder.join(file.file_name().expect("a name"))).expect("copied");
    }
    folder
}

fn build(version: &str, shared: &Path, name: &str) {
    let mut command = Command::new(deploy("debian/build"));
    command.arg(built(shared)).arg(shared.join(name)).env("VERSION", version).env("COMPRESS", "gzip -z1");
    let output = output(&mut command, "bash runs it");
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(said(&output).lines().filter(|line| line.ends_with(".deb")).count(), 3, "{}", said(&output));
}

#[test]
fn integration_packages_install_run_upgrade_under_a_client_and_leave_nothing() {
    let shared = tempfile::tempdir().expect("a folder");
    build("0.1.0-1", shared.path(), "1");
    build("0.1.0-2", shared.path(), "2");
    for file in ["inside", "rounds.c"] {
        std::fs::copy(c::top().join("tests/packages").join(file), shared.path().join(file)).expect("copied");
    }
    let mut command = Command::new(c::top().join("tests/packages/machine"));
    let output = output(command.arg(shared.path()), "bash runs it");
    let log = std::fs::read_to_string(shared.path().join("log")).unwrap_or_default();
    assert!(output.status.success(), "{}\n{log}", said(&output));
    assert!(log.lines().last().is_some_and(|line| line.starts_with("ok: ")), "{log}");
    println!("{log}");
}

#[test]
fn integration_packages_units_confine_their_services() {
    // Points of `systemd-analyze security`: 10 is nothing at all. What raises them is a hole that somebody has to mean.
    for (unit, most) in [("uhmm.service", 4.0), ("uhmm-driver@.service", 1.5)] {
        let mut command = Command::new("systemd-analyze");
        command.args(["security", "--offline=true", "--no-pager"]).arg(deploy("systemd").join(unit));
        let said = said(&output(&mut command, "apt-get install -y systemd"));
        let line =
            said.lines().find(|line| line.contains("Overall exposure level")).unwrap_or_else(|| panic!("{said}"));
        let points = line.split(": ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
        assert!(points.is_some_and(|points| points <= most), "{line}: at most {most}");
    }
}

#[test]
fn integration_packages_manifests_are_some_and_kubernetes_has_the_same() {
    for name in ["manifest.toml", "manifest-joining.toml"] {
        let mut command = Command::new(uhmm_exe());
        let output = output(command.arg("plan").arg(deploy(name)), "cargo build");
        assert!(output.status.success() && said(&output).contains("soft0"), "{name}: {}", said(&output));
    }
    let read = |name: &str| std::fs::read_to_string(deploy(name)).expect("the file");
    let (joining, map) = (read("manifest-joining.toml"), read("kubernetes/namespace.yaml"));
    for line in joining.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        assert!(map.lines().any(|other| other.strip_prefix("    ") == Some(line)), "namespace.yaml lacks {line:?}");
    }
}

#[test]
fn integration_packages_kubernetes_manifests_are_valid() {
    let install = "pip install kubernetes-validate (its schemas come with it)";
    for file in files("kubernetes", "yaml") {
        let mut command = Command::new("kubernetes-validate");
        let output = output(command.arg("--strict").arg(&file), install);
        assert!(output.status.success() && said(&output).contains("passed"), "{}", said(&output));
    }
}

#[test]
fn integration_packages_compose_file_is_valid() {
    for file in files("compose", "yaml") {
        let mut command = Command::new("docker-compose");
        command.arg("-f").arg(&file).args(["config", "-q"]);
        let output = output(&mut command, "apt-get install -y --no-install-recommends docker-compose");
        assert!(output.status.success(), "{}: {}", file.display(), said(&output));
    }
}

/// No generator of Quadlet runs here (Debian 12 has podman 4.3, Quadlet began with 4.4): keys are held against the manual of podman 4.8.
#[test]
fn integration_packages_quadlet_files_have_keys_that_podman_knows() {
    let known: &[(&str, &[&str])] = &[
        ("Unit", &["Description", "After", "StartLimitIntervalSec"]),
        (
            "Container",
            &[
                "Image",
                "ContainerName",
                "Exec",
                "Environment",
                "AddDevice",
                "Volume",
                "Network",
                "ReadOnly",
                "NoNewPrivileges",
                "DropCapability",
                "AddCapability",
                "Ulimit",
                "PidsLimit",
                "Notify",
                "HealthCmd",
                "HealthInterval",
                "PodmanArgs",
                "User",
                "Group",
            ],
        ),
        ("Service", &["Restart", "RestartSec", "ExecStartPre"]),
        ("Install", &["WantedBy"]),
    ];
    for file in files("quadlet", "container") {
        let text = std::fs::read_to_string(&file).expect("the file");
        let mut section = "";
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                section = name;
                continue;
            }
            let (key, value) = line.split_once('=').unwrap_or_else(|| panic!("{}: {line}", file.display()));
            let keys = known.iter().find(|(name, _)| *name == section).map(|(_, keys)| *keys).unwrap_or_default();
            assert!(keys.contains(&key) && !value.is_empty(), "{}: [{section}] {line}", file.display());
        }
        assert!(text.contains("Network=none") && text.contains("DropCapability=all") && text.contains("ReadOnly=true"));
    }
}
