//! What the next supervisor must know and cannot get from the services: `supervisor.toml` in the run directory, mode 0600,
//! replaced as a whole at each change.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uhmm_kernel_hook::process::random_bytes;
use uhmm_manifest::Plan;

use crate::service::SupervisorError;

const KEY_BYTES: usize = 16;

/// See the module head.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct SavedState {
    /// Times each service was started.
    pub incarnations: BTreeMap<String, u32>,
    /// `FROM->TO`: key in hexadecimal.
    keys: BTreeMap<String, String>,
    #[serde(skip)]
    path: PathBuf,
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let pairs = text.as_bytes().chunks(2).filter_map(|pair| std::str::from_utf8(pair).ok());
    pairs.filter_map(|pair| u8::from_str_radix(pair, 16).ok()).collect()
}

impl SavedState {
    /// What an older supervisor left (`adopt`), or nothing; then a key for every channel that has none.
    pub fn open(run_dir: &Path, plan: &Plan, adopt: bool) -> Result<Self, SupervisorError> {
        let path = run_dir.join("supervisor.toml");
        let mut state = match std::fs::read_to_string(&path) {
            Ok(text) if adopt => toml::from_str(&text)
                .map_err(|error| SupervisorError::State { path: path.clone(), problem: error.to_string() })?,
            _ => Self::default(),
        };
        state.path = path;
        let to_supervisor = plan.services.iter().map(|service| (service.name.clone(), "supervisor".to_owned()));
        let channels = plan.channels.iter().map(|channel| (channel.from.clone(), channel.to.clone()));
        for (from, to) in to_supervisor.chain(channels).collect::<Vec<_>>() {
            let name = format!("{from}->{to}");
            let mut key = [0u8; KEY_BYTES];
            random_bytes(&mut key)?;
            state.keys.entry(name).or_insert_with(|| hex(&key));
        }
        state.save()?;
        Ok(state)
    }

    /// Writes a new file and puts it in the old one's place.
    pub fn save(&self) -> Result<(), SupervisorError> {
        let failed = |error: &dyn std::fmt::Display| SupervisorError::State {
            path: self.path.clone(),
            problem: error.to_string(),
        };
        let text = toml::to_string(self).map_err(|error| failed(&error))?;
        let fresh = self.path.with_extension("toml.new");
        let mut options = std::fs::OpenOptions::new();
        let mut file =
            options.write(true).create(true).truncate(true).mode(0o600).open(&fresh).map_err(|error| failed(&error))?;
        file.write_all(text.as_bytes()).map_err(|error| failed(&error))?;
        std::fs::rename(&fresh, &self.path).map_err(|error| failed(&error))
    }

    /// Key of one channel.
    pub fn key(&self, from: &str, to: &str) -> Vec<u8> {
        self.keys.get(&format!("{from}->{to}")).map(|text| unhex(text)).unwrap_or_default()
    }

    /// Every channel that a service is an end of, except the one to the supervisor: (the other end, key).
    pub fn channel_keys(&self, plan: &Plan, service: &str) -> Vec<(String, Vec<u8>)> {
        let ends = plan.channels.iter().filter_map(|channel| {
            let other = match (channel.from == service, channel.to == service) {
                (true, _) => &channel.to,
                (_, true) => &channel.from,
                _ => return None,
            };
            Some((other.clone(), self.key(&channel.from, &channel.to)))
        });
        ends.collect()
    }
}
