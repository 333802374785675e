//! What `uhmm driver new` writes: it builds offline with the versions that uhmm was tested with, is clean, passes its own tests, and runs as a
//! service. (Suite `new_driver` in the guest gives it a device.)

use std::path::{Path, PathBuf};
use std::process::Command;

use uhmm_tests::model::DeviceModel;
use uhmm_tests::{TestBed, uhmm_exe};

/// The folder of this build, whose crates need not be built again.
fn target_dir() -> PathBuf {
    let exe = uhmm_exe();
    exe.ancestors().nth(2).expect("programs lie in TARGET/PROFILE").to_owned()
}

/// In the new crate, with uhmm's own profile, so that what is built already is used. Returns what cargo said when it failed.
fn cargo(dir: &Path, args: &[&str]) -> Result<(), String> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(dir).env("CARGO_TARGET_DIR", target_dir()).env("CARGO_NET_OFFLINE", "true");
    command.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1").env("CARGO_PROFILE_DEV_DEBUG", "line-tables-only");
    let output = command.output().expect("cargo starts");
    let said = || format!("cargo {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(()) } else { Err(said()) }
}

fn installed(subcommand: &str) -> bool {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args([subcommand, "--version"]).output().is_ok_and(|output| output.status.success())
}

/// The written manifest with another device, and the program where this test builds it.
fn manifest(dir: &Path, pci: &str) -> String {
    let written = std::fs::read_to_string(dir.join("manifest.toml")).expect("it was written");
    let release = dir.join("target/release/big_chip").display().to_string();
    assert!(written.contains(&release), "the manifest names the program that step 1 builds: {written}");
    let written = written.replace(&release, &target_dir().join("debug/big_chip").display().to_string());
    assert!(written.contains("pci = \"0000:00:05.0\""), "{written}");
    written.replace("0000:00:05.0", pci)
}

#[test]
fn integration_a_new_driver_builds_clean_passes_its_tests_and_runs_as_a_service() -> Result<(), String> {
    // Always the same place: cargo keeps what it built by path.
    let dir = target_dir().join("new-driver");
    if dir.exists() {
        std::fs::remove_dir_all(&dir).expect("what an earlier run left is removed");
    }
    let made = Command::new(uhmm_exe()).args(["driver", "new", "big_chip", "--dir"]).arg(&dir).output();
    let made = made.expect("uhmm starts");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));

    // The first build leaves out of the lock file what this crate does not need; versions stay, and from then on it is complete.
    cargo(&dir, &["build"])?;
    cargo(&dir, &["test", "--locked"])?;
    if installed("clippy") {
        cargo(&dir, &["clippy", "--locked", "--all-targets", "--", "-D", "warnings"])?;
    }
    let lock = std::fs::read_to_string(dir.join("Cargo.lock")).expect("it was written");
    let ours = include_str!("../../Cargo.lock");
    let entry = |text: &str| text.lines().take(2).collect::<Vec<_>>().join("\n");
    let new: Vec<String> =
        lock.split("[[package]]\n").skip(1).map(entry).filter(|entry| !ours.contains(entry)).collect();
    assert_eq!(
        new,
        ["name = \"big_chip\"\nversion = \"0.1.0\""],
        "other versions than those that uhmm was tested with"
    );

    // A device that is none for it: it says so, and nobody else cares.
    let model = DeviceModel::start(&["accel", "--memory", "16MiB"]);
    let bed = TestBed::without_waiting(&manifest(&dir, &model.pci()));
    bed.wait_log("not QEMU's educational device (1234:11e8");
    assert!(bed.log().contains("give another address"), "{}", bed.log());
    let region = bed.session().allocate(4096).expect("region");
    region.write_u64(0, 5).expect("write");
    assert_eq!(region.read_u64(0).expect("read"), 5);
    Ok(())
}
