//! `uhmm cdi`: what a container runtime has to do so that a container may use a device of uhmm, as a Container Device Interface file. (No device
//! node is among it: programs reach devices through the services' sockets.)

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Value, json};

/// Where a container sees the sockets.
const INSIDE: &str = "/run/uhmm";
/// What the file needs at least: mounts without a type, variables, names that begin with a letter.
const VERSION: &str = "0.3.0";
/// From this one on a device's name may begin with a digit.
const VERSION_DIGITS: &str = "0.5.0";

#[derive(Args)]
pub struct CdiArgs {
    /// Manifest (TOML); without it the built-in one
    manifest: Option<PathBuf>,
    /// Folder of the sockets on this machine, if it is not RUN_DIR/clients or RUN_DIR
    #[arg(long)]
    sockets: Option<PathBuf>,
    /// First half of the devices' names: `uhmm.internal/device=soft0`
    #[arg(long, default_value = "uhmm.internal")]
    vendor: String,
}

/// To standard output: `uhmm cdi MANIFEST >/etc/cdi/uhmm.json`.
pub fn cdi(args: &CdiArgs, run_dir: &Path) -> anyhow::Result<()> {
    let plan = super::manifest(args.manifest.as_deref())?.resolve()?;
    let names: Vec<&str> = plan.devices.iter().map(|device| device.name.as_str()).collect();
    let clients = run_dir.join("clients");
    let sockets = args.sockets.clone().unwrap_or_else(|| if clients.is_dir() { clients } else { run_dir.to_owned() });
    let spec = spec(&args.vendor, &names, &std::path::absolute(&sockets)?)?;
    println!("{}", serde_json::to_string_pretty(&spec).context("The file cannot be written")?);
    Ok(())
}

fn spec(vendor: &str, names: &[&str], sockets: &Path) -> anyhow::Result<Value> {
    let inner = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    let legal = |text: &str| {
        let ends = [text.chars().next(), text.chars().last()].map(|c| c.is_some_and(|c| c.is_ascii_alphanumeric()));
        ends == [true, true] && text.chars().all(inner)
    };
    if !legal(vendor) || !vendor.starts_with(|c: char| c.is_ascii_alphabetic()) {
        bail!("{vendor:?} is no vendor name of CDI: give letters, digits, '.', '-' and '_', as in example.com");
    }
    if names.is_empty() {
        bail!("The manifest has no device: there is nothing that a container could be given");
    }
    if let Some(name) = names.iter().find(|name| !legal(name)) {
        bail!("Device {name:?} cannot have this name in CDI: begin and end it with a letter or digit");
    }
    let Some(sockets) = sockets.to_str() else { bail!("{} is no UTF-8: choose another folder", sockets.display()) };
    let digits = names.iter().any(|name| name.starts_with(|c: char| c.is_ascii_digit()));
    let device = |name: &&str| {
        let variable = name.to_ascii_uppercase().replace('-', "_");
        json!({ "name": name, "containerEdits": { "env": [format!("UHMM_DEVICE_{variable}={name}")] } })
    };
    Ok(json!({
        "cdiVersion": if digits { VERSION_DIGITS } else { VERSION },
        "kind": format!("{vendor}/device"),
        "devices": names.iter().map(device).collect::<Vec<_>>(),
        "containerEdits": {
            "env": [format!("UHMM_RUN_DIR={INSIDE}")],
            // Connecting to a socket is no writing to its folder.
            "mounts": [{ "hostPath": sockets, "containerPath": INSIDE, "options": ["ro", "nosuid", "nodev", "noexec", "rbind"] }],
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys<'a>(value: &'a Value, allowed: &[&str]) -> &'a serde_json::Map<String, Value> {
        let map = value.as_object().expect("an object");
        assert!(map.keys().all(|key| allowed.contains(&key.as_str())), "{map:?}: CDI knows {allowed:?}");
        map
    }

    /// The rules of the specification, version 0.3.0 (0.5.0 where a name begins with a digit).
    fn check(spec: &Value) {
        let top = keys(spec, &["cdiVersion", "kind", "devices", "containerEdits"]);
        let (vendor, class) = top["kind"].as_str().expect("text").split_once('/').expect("vendor/class");
        assert!(
            vendor.starts_with(|c: char| c.is_ascii_alphabetic()) && class.chars().all(|c| c.is_ascii_alphanumeric())
        );
        let edits = |edits: &Value| {
            let edits = keys(edits, &["env", "deviceNodes", "mounts", "hooks"]);
            assert!(!edits.is_empty(), "empty edits are refused");
            for variable in edits.get("env").into_iter().flat_map(|list| list.as_array().expect("a list")) {
                let (name, value) = variable.as_str().expect("text").split_once('=').expect("NAME=value");
                assert!(
                    !value.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
                );
            }
            for mount in edits.get("mounts").into_iter().flat_map(|list| list.as_array().expect("a list")) {
                let mount = keys(mount, &["hostPath", "containerPath", "options"]);
                assert!(
                    ["hostPath", "containerPath"]
                        .iter()
                        .all(|key| mount[*key].as_str().expect("text").starts_with('/'))
                );
            }
        };
        edits(&top["containerEdits"]);
        let devices = top["devices"].as_array().expect("a list");
        assert!(!devices.is_empty());
        let mut digits = false;
        for device in devices {
            let device = keys(device, &["name", "containerEdits"]);
            digits |= device["name"].as_str().expect("text").starts_with(|c: char| c.is_ascii_digit());
            edits(&device["containerEdits"]);
        }
        assert_eq!(
            top["cdiVersion"],
            if digits { "0.5.0" } else { "0.3.0" },
            "the lowest version that has what is used"
        );
    }

    #[test]
    fn the_file_keeps_the_rules_and_names_the_lowest_version() {
        for names in [vec!["soft0"], vec!["soft0", "far-memory-1"], vec!["0", "x"]] {
            check(&spec("uhmm.internal", &names, Path::new("/run/uhmm")).expect("a file"));
        }
        let spec = spec("uhmm.internal", &["a-b"], Path::new("/run/uhmm/clients")).expect("a file");
        assert_eq!(spec["devices"][0]["containerEdits"]["env"][0], "UHMM_DEVICE_A_B=a-b");
        assert_eq!(spec["containerEdits"]["mounts"][0]["hostPath"], "/run/uhmm/clients");
    }

    #[test]
    fn what_cdi_cannot_say_is_refused_with_the_reason() {
        let refused = |vendor: &str, names: &[&str]| spec(vendor, names, Path::new("/r")).unwrap_err().to_string();
        assert!(refused("-x", &["a"]).contains("vendor"));
        assert!(refused("x/y", &["a"]).contains("vendor"));
        assert!(refused("x.y", &[]).contains("no device"));
        assert!(refused("x.y", &["a-"]).contains("\"a-\""));
    }
}
