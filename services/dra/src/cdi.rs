//! The Container Device Interface file of one claim: what a container that is given the claim sees of uhmm. No device node is among it (programs
//! reach devices through the services' sockets), but the token by which the core knows whose share it is.

use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::allocation::Share;
use crate::checkpoint::{Entry, write_whole};

/// Where a container sees the sockets.
const INSIDE: &str = "/run/uhmm";
/// What the file needs at least: mounts without a type, variables, names that begin with a letter.
const VERSION: &str = "0.3.0";

/// Where the files are, and what is the same in all of them.
#[derive(Clone, Debug)]
pub struct Cdi {
    /// The runtime's folder.
    pub dir: PathBuf,
    /// Of the devices: the driver's name.
    pub vendor: String,
    /// Folder of the sockets on this machine.
    pub sockets: PathBuf,
}

impl Cdi {
    fn path(&self, uid: &str) -> PathBuf {
        self.dir.join(format!("{}-claim-{uid}.json", self.vendor))
    }

    /// What a container runtime calls the claim's share number `index`.
    pub fn device(&self, uid: &str, index: usize) -> String {
        format!("{}/claim={}", self.vendor, name(uid, index))
    }

    /// The same file for the same claim, however often.
    pub fn give(&self, uid: &str, entry: &Entry) -> std::io::Result<()> {
        let text = serde_json::to_vec_pretty(&self.spec(uid, entry)?)?;
        std::fs::create_dir_all(&self.dir)?;
        write_whole(&self.path(uid), &text)
    }

    /// Nothing is there afterwards.
    pub fn take_back(&self, uid: &str) -> std::io::Result<()> {
        match std::fs::remove_file(self.path(uid)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Claims that there are files of.
    pub fn given(&self) -> std::io::Result<Vec<String>> {
        let before = format!("{}-claim-", self.vendor);
        let entries = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.filter_map(|name| Some(name.strip_prefix(&before)?.strip_suffix(".json")?.to_owned())).collect())
    }

    fn spec(&self, uid: &str, entry: &Entry) -> std::io::Result<Value> {
        let utf8 = |path: &Path| {
            let no = || Error::new(ErrorKind::InvalidInput, format!("{} is no UTF-8", path.display()));
            path.to_str().map(str::to_owned).ok_or_else(no)
        };
        let device = |(index, share): (usize, &Share)| {
            let Share { device, bytes, .. } = share;
            let variable = device.to_ascii_uppercase().replace('-', "_");
            let env = [format!("UHMM_DEVICE_{variable}={device}"), format!("UHMM_BYTES_{variable}={bytes}")];
            json!({ "name": name(uid, index), "containerEdits": { "env": env } })
        };
        Ok(json!({
            "cdiVersion": VERSION,
            "kind": format!("{}/claim", self.vendor),
            "devices": entry.shares.iter().enumerate().map(device).collect::<Vec<_>>(),
            "containerEdits": {
                "env": [format!("UHMM_RUN_DIR={INSIDE}"), format!("UHMM_CLAIM={}", entry.token)],
                // Connecting to a socket is no writing to its folder.
                "mounts": [{
                    "hostPath": utf8(&self.sockets)?,
                    "containerPath": INSIDE,
                    "options": ["ro", "nosuid", "nodev", "noexec", "rbind"],
                }],
            },
        }))
    }
}

fn name(uid: &str, index: usize) -> String {
    format!("claim-{uid}-{index}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(device: &str) -> Share {
        Share { request: "r".into(), device: device.into(), bytes: 4096, share_id: None }
    }

    #[test]
    fn the_file_has_what_version_0_3_knows_and_goes_away_again() {
        let dir = tempfile::tempdir().unwrap();
        let (vendor, sockets) = ("uhmm.internal".to_owned(), "/run/uhmm/clients".into());
        let cdi = Cdi { dir: dir.path().join("cdi"), vendor, sockets };
        let (namespace, name, token) = ("n".to_owned(), "c".to_owned(), "ab".repeat(32));
        let entry = Entry { namespace, name, token, shares: vec![share("soft0"), share("a-b")], prepared: false };
        assert!(cdi.given().unwrap().is_empty());
        for uid in ["0d", "e1"] {
            cdi.give(uid, &entry).unwrap();
            cdi.give(uid, &entry).unwrap();
        }
        let read: Value = serde_json::from_slice(&std::fs::read(cdi.path("0d")).unwrap()).unwrap();
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&read), ["cdiVersion", "containerEdits", "devices", "kind"]);
        assert_eq!((&read["cdiVersion"], &read["kind"]), (&json!("0.3.0"), &json!("uhmm.internal/claim")));
        assert_eq!(
            cdi.device("0d", 1),
            format!("{}={}", read["kind"].as_str().unwrap(), read["devices"][1]["name"].as_str().unwrap())
        );
        // Before version 0.5.0 a device's name begins with a letter.
        assert!(read["devices"][0]["name"].as_str().unwrap().starts_with(|c: char| c.is_ascii_alphabetic()));
        assert_eq!(read["devices"][1]["containerEdits"]["env"], json!(["UHMM_DEVICE_A_B=a-b", "UHMM_BYTES_A_B=4096"]));
        assert_eq!(keys(&read["containerEdits"]["mounts"][0]), ["containerPath", "hostPath", "options"]);
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(cdi.path("0d")).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600, "the token is in it");
        let mut given = cdi.given().unwrap();
        given.sort();
        assert_eq!(given, ["0d", "e1"]);
        cdi.take_back("0d").unwrap();
        cdi.take_back("0d").unwrap();
        assert_eq!(cdi.given().unwrap(), ["e1"]);
    }
}
