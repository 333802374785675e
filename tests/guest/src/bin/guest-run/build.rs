//! Builds the guest's programs: static, so that the guest needs no libraries. The flags hold for this one target
//! directory (`TARGET/x86_64-unknown-linux-gnu`), so other builds stay as they are.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

const TARGET: &str = "x86_64-unknown-linux-gnu";
const INIT: &str = "guest-init";

/// The programs of the guest.
#[derive(Debug)]
pub struct Programs {
    /// Pid 1.
    pub init: PathBuf,
    /// Suites by name.
    pub suites: BTreeMap<String, PathBuf>,
    /// What suites start, by name.
    pub helpers: BTreeMap<String, PathBuf>,
}

/// Builds all suites, and `uhmm` itself as a helper; keeps the wanted suites.
pub fn suites(wanted: &[String]) -> Result<Programs> {
    eprintln!("== building the guest's programs");
    let mut programs = Programs { init: PathBuf::new(), suites: BTreeMap::new(), helpers: BTreeMap::new() };
    cargo(&["test", "--no-run", "-p", "uhmm-guest", "--bins", "--tests"], &mut programs)?;
    cargo(&["build", "-p", "uhmm"], &mut programs)?;
    ensure!(!programs.init.as_os_str().is_empty(), "cargo built no {INIT}");
    for name in wanted {
        let known: Vec<&String> = programs.suites.keys().collect();
        ensure!(programs.suites.contains_key(name), "There is no suite {name}: take one of {known:?}");
    }
    programs.suites.retain(|name, _| wanted.is_empty() || wanted.contains(name));
    Ok(programs)
}

fn cargo(what: &[&str], programs: &mut Programs) -> Result<()> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(what)
        // What is deployed: suite `nvme` compares speeds, and an emulated processor is slow enough.
        .args(["--release", "--locked", "-q", "--target", TARGET, "--message-format=json-render-diagnostics"])
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
