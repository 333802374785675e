//! What this node has prepared, in a file that outlives the driver: written whole and then put in the place of the old one, checked when it is read.
//!
//! ```text
//!   uhmm-dra 1 5d0c...            name, version, check sum of the rest
//!   {"claims": {"UID": {...}}}
//! ```
//! An entry is there before anything of its claim is anywhere else, and is gone before anything of it is taken away. So whatever there is of claims
//! without an entry is to be removed, and what entries say can be done again.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::allocation::Share;

const HEAD: &str = "uhmm-dra 1 ";

/// Why the file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// It cannot be read or written.
    #[error("Checkpoint {} cannot be {doing}", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Somebody has written to it, or a disk has lost something.
    #[error(
        "Checkpoint {} is damaged ({problem}): it says what pods of this node were given, so it is not overwritten. Drain the node, then remove it",
        .path.display()
    )]
    Damaged {
        /// Which.
        path: PathBuf,
        /// How it shows.
        problem: String,
    },
    /// Another driver works on it.
    #[error("Another uhmm dra works in {}: end that one first, or give each a --driver-name of its own", .path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
}

/// One claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Where the claim is.
    pub namespace: String,
    /// What it is called.
    pub name: String,
    /// Who shows it has the claim, in hexadecimal.
    pub token: String,
    /// What it gives.
    pub shares: Vec<Share>,
    /// Everything was done: it may be answered without asking the API server again.
    pub prepared: bool,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Body {
    claims: BTreeMap<String, Entry>,
}

/// See the module head.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    body: Body,
    /// Held as long as the driver lives.
    _lock: File,
}

/// FNV-1a: against damage, not against anybody.
fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn parse(text: &str) -> Result<Body, String> {
    let (head, body) = text.split_once('\n').ok_or("it has no second line")?;
    let expected = head.strip_prefix(HEAD).ok_or_else(|| format!("it begins with {head:?}"))?;
    let found = format!("{:016x}", sum(body.as_bytes()));
    if expected != found {
        return Err(format!("its check sum is {found}, and should be {expected}"));
    }
    serde_json::from_str(body).map_err(|error| error.to_string())
}

impl Checkpoint {
    /// The one of this folder, which is made if need be.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let failed = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| CheckpointError::Io { path, doing, source }
        };
        std::fs::create_dir_all(folder).map_err(failed("made", folder))?;
        let lock = File::open(folder).map_err(failed("locked", folder))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(CheckpointError::InUse { path: folder.to_owned() }),
            locked => locked.map_err(|errno| failed("locked", folder)(errno.into()))?,
        }
        let path = folder.join("claims");
        let body = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Body::default(),
            opened => {
                let mut file = opened.map_err(failed("read", &path))?;
                let mut bytes = Vec::new();
                file.read_to_end(&mut bytes).map_err(failed("read", &path))?;
                let text = String::from_utf8(bytes).map_err(|error| error.to_string());
                text.and_then(|text| parse(&text))
                    .map_err(|problem| CheckpointError::Damaged { path: path.clone(), problem })?
            }
        };
        Ok(Self { path, body, _lock: lock })
    }

    /// By uid.
    pub fn claims(&self) -> &BTreeMap<String, Entry> {
        &self.body.claims
    }

    /// A new or another entry (`None`: no more) is what the next driver finds, from the return on. On an error nothing has changed.
    pub fn set(&mut self, uid: &str, entry: Option<Entry>) -> Result<(), CheckpointError> {
        let before = match entry {
            Some(entry) => self.body.claims.insert(uid.to_owned(), entry),
            None => self.body.claims.remove(uid),
        };
        self.write().map_err(|source| {
            match before {
                Some(before) => drop(self.body.claims.insert(uid.to_owned(), before)),
                None => drop(self.body.claims.remove(uid)),
            }
            CheckpointError::Io { path: self.path.clone(), doing: "written", source }
        })
    }

    fn write(&self) -> std::io::Result<()> {
        let body = serde_json::to_string(&self.body)?;
        let text = format!("{HEAD}{:016x}\n{body}", sum(body.as_bytes()));
        write_whole(&self.path, text.as_bytes())
    }
}

/// Either the old file is there or the new one, whatever dies; nobody but the owner reads it, because it holds tokens.
pub fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    // Not an ending that anybody reads, who looks for files here (`.json` in the folder of CDI).
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(bytes: u64) -> Entry {
        let share = Share { request: "r".into(), device: "soft0".into(), bytes, share_id: None };
        let text = str::to_owned;
        Entry { namespace: text("n"), name: text("c"), token: text("00"), shares: vec![share], prepared: true }
    }

    #[test]
    fn the_next_driver_finds_what_was_set_and_only_one_works_here() {
        let dir = tempfile::tempdir().unwrap();
        let mut one = Checkpoint::open(&dir.path().join("plugin")).unwrap();
        one.set("a", Some(entry(1))).unwrap();
        one.set("b", Some(entry(2))).unwrap();
        one.set("a", None).unwrap();
        assert!(matches!(Checkpoint::open(&dir.path().join("plugin")), Err(CheckpointError::InUse { .. })));
        drop(one);
        let two = Checkpoint::open(&dir.path().join("plugin")).unwrap();
        assert_eq!(two.claims().iter().collect::<Vec<_>>(), [(&"b".to_owned(), &entry(2))]);
    }

    #[test]
    fn every_damaged_byte_is_noticed_and_the_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut one = Checkpoint::open(dir.path()).unwrap();
        one.set("a", Some(entry(1))).unwrap();
        let path = one.path.clone();
        drop(one);
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            let error = Checkpoint::open(dir.path()).expect_err("damaged");
            assert!(matches!(error, CheckpointError::Damaged { .. }), "byte {at}: {error}");
            std::fs::write(&path, &whole[..at]).unwrap();
            assert!(Checkpoint::open(dir.path()).is_err(), "cut at {at}");
            assert_eq!(std::fs::read(&path).unwrap(), whole[..at]);
        }
        // A file that was not finished is none.
        std::fs::write(&path, &whole).unwrap();
        std::fs::write(dir.path().join("claims.new"), "half").unwrap();
        assert_eq!(Checkpoint::open(dir.path()).unwrap().claims().len(), 1);
    }

    #[test]
    fn what_cannot_be_written_has_not_happened() {
        let dir = tempfile::tempdir().unwrap();
        let mut one = Checkpoint::open(dir.path()).unwrap();
        one.set("a", Some(entry(1))).unwrap();
        std::fs::create_dir(dir.path().join("claims.new")).unwrap();
        assert!(one.set("a", Some(entry(9))).is_err() && one.set("b", Some(entry(2))).is_err());
        assert!(one.set("a", None).is_err());
        assert_eq!(one.claims().iter().collect::<Vec<_>>(), [(&"a".to_owned(), &entry(1))]);
    }
}
