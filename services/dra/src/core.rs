//! The running core, by the operator's door: claims are set and taken back there, and it says what is left of each device.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use uhmm_sdk::{Claim, ClaimShare, Claims, DeviceUse, Operator};

use crate::checkpoint::Entry;
use crate::quantity;

/// Ids of our claims in the core; others are other operators'.
const PREFIX: &str = "dra/";
/// A pager that is being started again answers when it can; the kubelet waits longer than this.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why the core does not give what it should.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// It does not run, or does not answer.
    #[error("uhmm on this node")]
    Sdk(#[from] uhmm_sdk::Error),
    /// A device that the core does not have.
    #[error("Device {device} is not one of this node's: `uhmm status` lists them")]
    NoDevice {
        /// As asked for.
        device: String,
    },
    /// It takes nothing now.
    #[error("Device {device} is {state}: nothing of it can be given out until that is over")]
    NotNow {
        /// Which.
        device: String,
        /// `drained`, or that its driver is away.
        state: &'static str,
    },
    /// More than there is.
    #[error(
        "{wanted} of device {device} are asked for, and {left} are left of the {capacity} that claims can have ({promised} are promised)"
    )]
    NoRoom {
        /// Which.
        device: String,
        /// What the claim says.
        wanted: String,
        /// What is not promised.
        left: String,
        /// What the device has, without what others than claims use.
        capacity: String,
        /// To other claims.
        promised: String,
    },
}

/// See the module head.
#[derive(Clone, Debug)]
pub struct Core {
    /// Where its sockets are.
    pub run_dir: PathBuf,
}

/// What claims of ours may have of a device, together: its memory without what others use of it or were promised.
pub fn capacity(device: &DeviceUse, claims: &Claims) -> u64 {
    let shares = |ours: bool| {
        let of = claims.claims.iter().filter(move |claim| claim.id.starts_with(PREFIX) == ours);
        of.flat_map(|claim| &claim.shares).filter(|share| share.device == device.device)
    };
    let in_use = device.memory_bytes.saturating_sub(device.free_bytes);
    let foreign: u64 = shares(false).map(|share| share.bytes.max(share.used_bytes)).sum();
    let claimed: u64 = shares(true).chain(shares(false)).map(|share| share.used_bytes).sum();
    device.memory_bytes.saturating_sub(in_use.saturating_sub(claimed)).saturating_sub(foreign)
}

/// Bytes of each device that entries give.
pub fn promised<'a>(entries: impl Iterator<Item = &'a Entry>) -> BTreeMap<&'a str, u64> {
    let mut sum = BTreeMap::new();
    for share in entries.flat_map(|entry| &entry.shares) {
        let bytes: &mut u64 = sum.entry(share.device.as_str()).or_default();
        *bytes = bytes.saturating_add(share.bytes);
    }
    sum
}

fn device<'a>(claims: &'a Claims, name: &str) -> Result<&'a DeviceUse, CoreError> {
    let found = claims.devices.iter().find(|device| device.name == name);
    found.ok_or_else(|| CoreError::NoDevice { device: name.to_owned() })
}

/// Whether what an entry wants is there, beside what others were promised.
pub fn check_room(wanted: &Entry, others: &BTreeMap<&str, u64>, claims: &Claims) -> Result<(), CoreError> {
    for (name, bytes) in promised(std::iter::once(wanted)) {
        let device = device(claims, name)?;
        let away = |state| CoreError::NotNow { device: name.to_owned(), state };
        if device.closed {
            return Err(away("drained"));
        }
        if device.memory_bytes == 0 {
            return Err(away("without its driver"));
        }
        let (capacity, promised) = (capacity(device, claims), others.get(name).copied().unwrap_or(0));
        let left = capacity.saturating_sub(promised);
        if bytes > left {
            let text = quantity::text;
            let (wanted, left, capacity, promised) = (text(bytes), text(left), text(capacity), text(promised));
            return Err(CoreError::NoRoom { device: name.to_owned(), wanted, left, capacity, promised });
        }
    }
    Ok(())
}

fn claim(uid: &str, entry: &Entry, claims: &Claims) -> Result<Claim, CoreError> {
    let share = |(name, bytes)| Ok(ClaimShare { device: device(claims, name)?.device, bytes, used_bytes: 0 });
    let shares = promised(std::iter::once(entry)).into_iter().map(share).collect::<Result<_, CoreError>>()?;
    let byte = |at: usize| entry.token.get(at..at + 2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
    let token = (0..entry.token.len()).step_by(2).filter_map(byte).collect();
    let mut name = format!("{}/{}", entry.namespace, entry.name);
    name.truncate(256);
    Ok(Claim { id: format!("{PREFIX}{uid}"), name, token, shares, spaces: 0 })
}

fn same(left: &Claim, right: &Claim) -> bool {
    let shares =
        |claim: &Claim| claim.shares.iter().map(|share| (share.device, share.bytes)).collect::<BTreeMap<_, _>>();
    shares(left) == shares(right)
}

impl Core {
    fn operator(&self) -> Result<Operator, CoreError> {
        let mut operator = Operator::connect(Some(&self.run_dir))?;
        operator.set_patience(PATIENCE);
        Ok(operator)
    }

    /// What there is.
    pub fn claims(&self) -> Result<Claims, CoreError> {
        Ok(self.operator()?.claims()?)
    }

    /// From the return on, whoever shows the entry's token has its shares and no more.
    pub fn give(&self, uid: &str, entry: &Entry, claims: &Claims) -> Result<(), CoreError> {
        Ok(self.operator()?.set_claim(&claim(uid, entry, claims)?)?)
    }

    /// Nobody has them any more.
    pub fn take_back(&self, uid: &str) -> Result<(), CoreError> {
        Ok(self.operator()?.remove_claim(&format!("{PREFIX}{uid}"))?)
    }

    /// The core has the entries' claims and no others of ours; it may have been started anew, or have missed what was said while it was away. `there`:
    /// what it said it has. What has changed since then is done once more, which changes nothing.
    pub fn reconcile(&self, entries: &BTreeMap<String, Entry>, there: Claims) -> Result<Claims, CoreError> {
        let mut operator = None;
        for (uid, entry) in entries {
            match claim(uid, entry, &there) {
                Ok(wanted) if there.claims.iter().any(|found| found.id == wanted.id && same(found, &wanted)) => {}
                Ok(wanted) => {
                    tracing::info!(claim = wanted.id, name = wanted.name, "The core did not have it");
                    self.once(&mut operator)?.set_claim(&wanted)?;
                }
                Err(error) => tracing::warn!(%error, uid, "A claim cannot be given out again"),
            }
        }
        for found in &there.claims {
            if found.id.strip_prefix(PREFIX).is_some_and(|uid| !entries.contains_key(uid)) {
                tracing::info!(claim = found.id, name = found.name, "The core had it still");
                self.once(&mut operator)?.remove_claim(&found.id)?;
            }
        }
        match operator {
            Some(mut operator) => Ok(operator.claims()?),
            None => Ok(there),
        }
    }

    fn once<'a>(&self, operator: &'a mut Option<Operator>) -> Result<&'a mut Operator, CoreError> {
        Ok(match operator {
            Some(operator) => operator,
            None => operator.insert(self.operator()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocation::Share;

    const GIB: u64 = 1 << 30;

    fn used(id: &str, bytes: u64, used_bytes: u64) -> Claim {
        Claim { id: id.into(), shares: vec![ClaimShare { device: 0, bytes, used_bytes }], ..Claim::default() }
    }

    fn entry(bytes: u64) -> Entry {
        let share = Share { request: "r".into(), device: "soft0".into(), bytes, share_id: None };
        let (namespace, name, token) = ("ns".into(), "c".into(), "0f".repeat(32));
        Entry { namespace, name, token, shares: vec![share.clone(), share], prepared: false }
    }

    fn claims(free_bytes: u64, claims: Vec<Claim>) -> Claims {
        let device = DeviceUse { device: 0, name: "soft0".into(), memory_bytes: 8 * GIB, free_bytes, closed: false };
        Claims { claims, devices: vec![device], ..Claims::default() }
    }

    #[test]
    fn capacity_is_what_others_than_our_claims_leave() {
        let of = |claims: &Claims| capacity(&claims.devices[0], claims);
        assert_eq!(of(&claims(8 * GIB, vec![])), 8 * GIB);
        // Three GiB are in use: one by a claim of ours, the rest by who has none.
        assert_eq!(of(&claims(5 * GIB, vec![used("dra/a", 2 * GIB, GIB)])), 6 * GIB);
        // What another operator has promised is not ours, used or not.
        assert_eq!(of(&claims(8 * GIB, vec![used("x", 3 * GIB, 0)])), 5 * GIB);
        assert_eq!(of(&claims(7 * GIB, vec![used("x", 3 * GIB, GIB)])), 5 * GIB);
        // A claim that was taken back has more than it may.
        assert_eq!(of(&claims(0, vec![used("dra/a", 0, 9 * GIB)])), 8 * GIB);
    }

    #[test]
    fn more_than_is_left_is_refused_with_all_numbers() {
        let there = claims(8 * GIB, vec![]);
        let others = BTreeMap::from([("soft0", 4 * GIB)]);
        assert!(check_room(&entry(2 * GIB), &others, &there).is_ok(), "both shares of the device, together");
        let error = check_room(&entry(2 * GIB + 1), &others, &there).expect_err("too much").to_string();
        assert!(["soft0", "4Gi", "8Gi"].iter().all(|word| error.contains(word)), "{error}");
        let mut drained = there.clone();
        drained.devices[0].closed = true;
        assert!(matches!(check_room(&entry(1), &others, &drained), Err(CoreError::NotNow { state: "drained", .. })));
        drained.devices.clear();
        assert!(matches!(check_room(&entry(1), &others, &drained), Err(CoreError::NoDevice { .. })));
    }

    #[test]
    fn a_claim_has_the_token_and_one_share_a_device() {
        let claim = claim("u-1", &entry(GIB), &claims(8 * GIB, vec![])).expect("a claim");
        assert_eq!((claim.id.as_str(), claim.name.as_str(), claim.token), ("dra/u-1", "ns/c", vec![0x0f; 32]));
        assert_eq!(claim.shares, [ClaimShare { device: 0, bytes: 2 * GIB, used_bytes: 0 }]);
    }
}
