//! What the next supervisor must know and cannot get from the services: `supervisor.toml` in the run directory, mode 0600,
//! replaced as a whole at each change. The holder has the same text, so a full disk takes nothing away.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uhmm_ipc::OPERATORS;
use uhmm_kernel_hook::PidFd;
use uhmm_kernel_hook::process::{random_bytes, start_time};
use uhmm_manifest::Plan;

use crate::service::SupervisorError;

const KEY_BYTES: usize = 16;
/// The vault's second keeper, among the services' names.
pub const HOLDER: &str = "holder";

/// See the module head.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct SavedState {
    /// Of two texts the one with more is the younger.
    #[serde(default)]
    changes: u64,
    /// Times each service was started.
    pub incarnations: BTreeMap<String, u32>,
    /// The process of each.
    #[serde(default)]
    processes: BTreeMap<String, Process>,
    /// What is in force for each that was started confined.
    #[serde(default)]
    pub sandboxes: BTreeMap<String, u32>,
    /// `FROM->TO`: key in hexadecimal.
    keys: BTreeMap<String, String>,
    #[serde(skip)]
    path: PathBuf,
}

/// A started process: its number may mean another one by now, number and time do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pid: u32,
    started: u64,
    incarnation: u32,
}

/// What became of a process that an older supervisor has started.
#[derive(Debug)]
pub enum Fate {
    /// It runs.
    Alive(u32, PidFd),
    /// It has ended, or never began.
    Dead,
    /// The older supervisor died before it had written anything about it.
    Unknown,
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of such digits.
pub fn unhex(text: &str) -> Vec<u8> {
    let pairs = text.as_bytes().chunks(2).filter_map(|pair| std::str::from_utf8(pair).ok());
    pairs.filter_map(|pair| u8::from_str_radix(pair, 16).ok()).collect()
}

impl SavedState {
    /// What an older supervisor left, if it shall be adopted.
    pub fn open(run_dir: &Path, adopt: bool) -> Result<Self, SupervisorError> {
        let path = run_dir.join("supervisor.toml");
        let mut state = match std::fs::read_to_string(&path) {
            Ok(text) if adopt => toml::from_str(&text)
                .map_err(|error| SupervisorError::State { path: path.clone(), problem: error.to_string() })?,
            _ => Self::default(),
        };
        state.path = path;
        Ok(state)
    }

    /// The same, as the holder has it.
    pub fn replace_by_younger(&mut self, text: &str) {
        match toml::from_str::<Self>(text) {
            Ok(kept) if kept.changes > self.changes => {
                let own = std::mem::replace(self, kept);
                self.path = own.path;
                // Of channels that only the manifest of today has.
                for (name, key) in own.keys {
                    self.keys.entry(name).or_insert(key);
                }
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "What the holder has of an older supervisor is not readable"),
        }
    }

    /// A key for every channel that has none.
    pub fn make_keys(&mut self, plan: &Plan) -> Result<(), SupervisorError> {
        let state = self;
        let to_holder = std::iter::once(("supervisor".to_owned(), HOLDER.to_owned()));
        let to_supervisor = plan.services.iter().map(|service| (service.name.clone(), "supervisor".to_owned()));
        let channels = plan.channels.iter().map(|channel| (channel.from.clone(), channel.to.clone()));
        let operators = plan.services.iter().map(|service| (OPERATORS.to_owned(), service.name.clone()));
        for (from, to) in to_holder.chain(to_supervisor).chain(channels).chain(operators).collect::<Vec<_>>() {
            let name = format!("{from}->{to}");
            let mut key = [0u8; KEY_BYTES];
            random_bytes(&mut key)?;
            state.keys.entry(name).or_insert_with(|| hex(&key));
        }
        Ok(())
    }

    /// The text that is saved.
    pub fn text(&self) -> String {
        // Strings, numbers and maps of them.
        toml::to_string(self).unwrap_or_default()
    }

    /// A process was started.
    pub fn started(&mut self, name: &str, pid: u32) {
        let incarnation = self.incarnations.get(name).copied().unwrap_or(0);
        match start_time(pid) {
            Ok(started) => drop(self.processes.insert(name.to_owned(), Process { pid, started, incarnation })),
            Err(error) => tracing::warn!(%error, name, pid, "A process that was just started is not found"),
        }
    }

    /// What became of it. Of services that were never started there is nothing to say.
    pub fn fate(&self, name: &str) -> Fate {
        let latest = self.incarnations.get(name).copied().unwrap_or(0);
        let Some(process) = self.processes.get(name).filter(|process| process.incarnation == latest) else {
            return Fate::Unknown;
        };
        match PidFd::open_started_at(process.pid, process.started) {
            Ok(Some(pidfd)) => Fate::Alive(process.pid, pidfd),
            Ok(None) => Fate::Dead,
            Err(error) => {
                tracing::warn!(%error, name, "Whether an older process runs cannot be found out");
                Fate::Unknown
            }
        }
    }

    /// Something has changed.
    pub fn save(&mut self) -> Result<(), SupervisorError> {
        self.changes += 1;
        self.write()
    }

    /// Writes a new file and puts it in the old one's place. By itself, as a supervisor does that begins, it is no change: what the holder has may be
    /// younger by a single one, which could not be written (a full run directory).
    pub fn write(&self) -> Result<(), SupervisorError> {
        let failed = |error: &dyn std::fmt::Display| SupervisorError::State {
            path: self.path.clone(),
            problem: error.to_string(),
        };
        let text = self.text();
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

    /// Every channel that a service is an end of, except the one to the supervisor: (the other end, key). The last one is its operators'.
    pub fn channel_keys(&self, plan: &Plan, service: &str) -> Vec<(String, Vec<u8>)> {
        let ends = plan.channels.iter().filter_map(|channel| {
            let other = match (channel.from == service, channel.to == service) {
                (true, _) => &channel.to,
                (_, true) => &channel.from,
                _ => return None,
            };
            Some((other.clone(), self.key(&channel.from, &channel.to)))
        });
        let operators = (OPERATORS.to_owned(), self.key(OPERATORS, service));
        ends.chain(std::iter::once(operators)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_known_by_number_and_time_and_only_in_their_last_incarnation() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut state = SavedState::open(dir.path(), false).expect("state");
        assert!(matches!(state.fate("pager"), Fate::Unknown));
        state.incarnations.insert("pager".to_owned(), 1);
        state.started("pager", std::process::id());
        state.save().expect("save");
        let mut read = SavedState::open(dir.path(), true).expect("state");
        assert!(matches!(read.fate("pager"), Fate::Alive(pid, _) if pid == std::process::id()));
        state.incarnations.insert("pager".to_owned(), 2);
        assert!(matches!(state.fate("pager"), Fate::Unknown), "the second one may have been started");
        state.save().expect("save");
        read.replace_by_younger(&state.text());
        assert_eq!(read.incarnations["pager"], 2);
        state.changes = 1;
        state.incarnations.insert("pager".to_owned(), 7);
        read.replace_by_younger(&state.text());
        assert_eq!(read.incarnations["pager"], 2, "an older text");
        // A single change that only the holder knows, and a supervisor that has begun with what was written before it.
        state = SavedState::open(dir.path(), true).expect("state");
        let mut next = SavedState::open(dir.path(), true).expect("state");
        next.keys.insert("new->pager".to_owned(), "00".to_owned());
        next.write().expect("save");
        state.incarnations.insert("pager".to_owned(), 3);
        state.path = dir.path().join("no-such-folder/supervisor.toml");
        state.save().expect_err("no room");
        next.replace_by_younger(&state.text());
        assert_eq!((next.incarnations["pager"], next.keys.len()), (3, state.keys.len() + 1));
        let child = uhmm_kernel_hook::fork::fork_child(|| 0).expect("fork");
        state.started("pager", child.pid());
        child.wait().expect("reap");
        assert!(matches!(state.fate("pager"), Fate::Dead));
    }
}
