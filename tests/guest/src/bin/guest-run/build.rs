//! Builds the guest's programs: static, so that the guest needs no libraries. The flags hold for this one target
//! directory (`TARGET/x86_64-unknown-linux-gnu`), so other builds stay as they are.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::containers;

const TARGET: &str = "x86_64-unknown-linux-gnu";
const INIT: &str = "guest-init";
/// It needs a driver that somebody has begun with `uhmm driver new`.
const NEW_DRIVER_SUITE: &str = "new_driver";

/// The programs of the guest.
#[derive(Debug, Default)]
pub struct Programs {
    /// Pid 1.
    pub init: PathBuf,
    /// Suites by name.
    pub suites: BTreeMap<String, PathBuf>,
    /// What suites start, by name.
    pub helpers: BTreeMap<String, PathBuf>,
    /// Of this machine: path inside, and the file here.
    pub machine: BTreeMap<PathBuf, PathBuf>,
}

/// Builds all suites, and as helpers `uhmm` itself and what the image of the driver `nvme` holds; keeps the wanted suites. `out`: where a driver may be generated.
pub fn suites(wanted: &[String], out: &Path) -> Result<Programs> {
    eprintln!("== building the guest's programs");
    let mut programs = Programs::default();
    cargo(&["test", "--locked", "--no-run", "-p", "uhmm-guest", "--bins", "--tests"], &mut programs)?;
    cargo(&["build", "--locked", "--bins", "-p", "uhmm", "-p", "uhmm-driver-nvme"], &mut programs)?;
    ensure!(!programs.init.as_os_str().is_empty(), "cargo built no {INIT}");
    for name in wanted {
        let known: Vec<&String> = programs.suites.keys().collect();
        ensure!(programs.suites.contains_key(name), "There is no suite {name}: take one of {known:?}");
    }
    programs.suites.retain(|name, _| wanted.is_empty() || wanted.contains(name));
    if programs.suites.contains_key(NEW_DRIVER_SUITE) {
        new_driver(out, &mut programs)?;
    }
    if programs.suites.contains_key(containers::SUITE) {
        programs.machine = containers::files()?;
    }
    Ok(programs)
}

/// What a reader of docs/write-a-driver.md does: `uhmm driver new chip`, and builds it. Its lock file names what was downloaded for uhmm, so nothing else is.
fn new_driver(out: &Path, programs: &mut Programs) -> Result<()> {
    let dir = out.join("chip");
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("Remove {}", dir.display()))?;
    }
    let uhmm = programs.helpers.get("uhmm").context("cargo built no uhmm")?;
    let status = Command::new(uhmm).args(["driver", "new", "chip", "--uhmm", ".", "--dir"]).arg(&dir).status();
    let status = status.context("Start uhmm")?;
    ensure!(status.success(), "uhmm driver new ended with {status}");
    let (crate_file, target) = (dir.join("Cargo.toml"), out.parent().context("A folder in TARGET")?);
    let text = |path: &Path| path.to_str().map(str::to_owned).context("A path is text");
    let (crate_file, target) = (text(&crate_file)?, text(target)?);
    // As uhmm's own profile, so that what is built already is used.
    let profile = ["--config", "profile.release.debug='line-tables-only'"];
    let build = ["build", "--offline", "--manifest-path", &crate_file, "--target-dir", &target];
    cargo(&[&build[..], &profile].concat(), programs)?;
    ensure!(programs.helpers.contains_key("chip"), "cargo built no chip");
    programs.helpers.insert("chip.toml".to_owned(), dir.join("manifest.toml"));
    Ok(())
}

fn cargo(what: &[&str], programs: &mut Programs) -> Result<()> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(what)
        // What is deployed: suite `nvme` compares speeds, and an emulated processor is slow enough.
        .args(["--release", "-q", "--target", TARGET, "--message-format=json-render-diagnostics"])
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols")
        .stderr(Stdio::inherit())
        .output()
        .context("Start cargo")?;
    ensure!(output.status.success(), "The guest's programs do not build (cargo ended with {})", output.status);
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: Value = serde_json::from_str(line).context("Read cargo's messages")?;
        programs.take(&message);
    }
    Ok(())
}

impl Programs {
    fn take(&mut self, message: &Value) {
        let (target, test) = (&message["target"], message["profile"]["test"] == true);
        let (Some(name), Some(path)) = (target["name"].as_str(), message["executable"].as_str()) else { return };
        let entry = (name.to_owned(), PathBuf::from(path));
        match target["kind"][0].as_str() {
            Some("test") => drop(self.suites.insert(entry.0, entry.1)),
            Some("bin") if test => {}
            Some("bin") if name == INIT => self.init = entry.1,
            Some("bin") if name != "guest-run" => drop(self.helpers.insert(entry.0, entry.1)),
            _ => {}
        }
    }
}
