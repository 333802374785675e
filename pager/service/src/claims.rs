//! Claims: rules that an operator gives out and takes back while the system runs (`uhmm dra` does, for containers). A client is named by the
//! token that it shows when it opens its space, whoever it is and wherever it runs.
//!
//! They lie in one memfd of the vault, a slot each, so that the next pager has them:
//!
//! ```text
//!   slot:  number (0: free; written last) | bytes of each device | token | lengths | id | name
//! ```
//! A claim's number goes on from the manifest's rules (`rules.rs`), is in the state of each space that uses it, and is not given again while
//! there is such a space: one whose claim was taken back keeps what it has and gets nothing more.

use std::os::fd::AsFd;
use std::sync::Arc;

use uhmm_ipc::message::pager::{self, Claim, ClaimShare, Claims, DeviceUse};
use uhmm_ipc::message::{ErrorCode, Fd, WireError};
use uhmm_ipc::same_bytes;
use uhmm_kernel_hook::window::{Prot, Window};
use uhmm_kernel_hook::{HookError, PAGE_SIZE, memfd};
use uhmm_pager_core::{DeviceId, Event, SpaceId};

use crate::rules::{CLAIMS_FROM, Rule};
use crate::service::Pager;
use crate::space::DEVICE_SLOTS;

const MAGIC: u64 = u64::from_le_bytes(*b"uhmm-clm");
const SLOTS: u64 = 256;
const SLOT_BYTES: u64 = 512;
const LEN_BYTES: u64 = (SLOTS + 1) * SLOT_BYTES;
/// Of the first slot, which is none: the number that the next claim gets, if nobody has it.
const OFF_NEXT: u64 = 8;
const OFF_BYTES: u64 = 8;
const OFF_TOKEN: u64 = OFF_BYTES + 8 * DEVICE_SLOTS as u64;
const OFF_LENGTHS: u64 = OFF_TOKEN + TOKEN_BYTES as u64;
const OFF_ID: u64 = OFF_LENGTHS + 8;
const OFF_NAME: u64 = OFF_ID + ID_BYTES as u64;

const TOKEN_BYTES: usize = 32;
const ID_BYTES: usize = 64;
const NAME_BYTES: usize = 256;
/// In one answer, which fits 64 KiB.
const TOLD: usize = 64;

/// One claim, as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Kept {
    number: u16,
    token: [u8; TOKEN_BYTES],
    id: String,
    name: String,
    bytes: [u64; DEVICE_SLOTS],
}

/// See the module head.
#[derive(Debug)]
pub struct ClaimTable {
    fd: Fd,
    window: Window,
    /// What the slots hold.
    slots: Vec<Option<Kept>>,
}

impl ClaimTable {
    /// Vault name.
    pub const VAULT_NAME: &'static str = "claims/state";

    /// New, empty.
    pub fn create() -> Result<Self, HookError> {
        let fd: Fd = Arc::new(memfd::create_sealed("uhmm-claims", LEN_BYTES.next_multiple_of(PAGE_SIZE))?);
        let window = Window::map(fd.as_fd(), 0, LEN_BYTES.next_multiple_of(PAGE_SIZE), Prot::ReadWrite)?;
        window.store_u64(0, MAGIC)?;
        Ok(Self { fd, window, slots: vec![None; SLOTS as usize] })
    }

    /// From the vault; `None` when it is something else.
    pub fn adopt(fd: Fd) -> Result<Option<Self>, HookError> {
        let window = Window::map(fd.as_fd(), 0, LEN_BYTES.next_multiple_of(PAGE_SIZE), Prot::ReadWrite)?;
        if window.load_u64(0)? != MAGIC {
            return Ok(None);
        }
        let slots = (0..SLOTS).map(|slot| load(&window, slot)).collect::<Result<_, _>>()?;
        Ok(Some(Self { fd, window, slots }))
    }

    /// For the vault.
    pub fn fd(&self) -> Fd {
        self.fd.clone()
    }

    fn of(&self, rule: Rule) -> Option<&Kept> {
        let number = rule.claim()?;
        self.slots.iter().flatten().find(|kept| kept.number == number)
    }

    /// What refusals call it.
    pub fn name(&self, rule: Rule) -> Option<&str> {
        self.of(rule).map(|kept| kept.name.as_str())
    }

    /// What it gives of a device.
    pub fn bytes(&self, rule: Rule, device: u8) -> u64 {
        self.of(rule).and_then(|kept| kept.bytes.get(usize::from(device)).copied()).unwrap_or(0)
    }

    /// The claim that a client shows.
    pub fn by_token(&self, token: &[u8]) -> Option<Rule> {
        let found = self.slots.iter().flatten().find(|kept| same_bytes(&kept.token, token));
        found.map(|kept| Rule::of_claim(kept.number))
    }

    /// A new one, or another for the same id. `used`: whether a number is some space's.
    fn set(&mut self, claim: &Claim, used: impl Fn(u16) -> bool) -> Result<Rule, WireError> {
        let token = claim.token.as_slice().try_into().unwrap_or([0; TOKEN_BYTES]);
        let mut bytes = [0; DEVICE_SLOTS];
        for share in &claim.shares {
            bytes[usize::from(share.device)] = share.bytes;
        }
        let same = |kept: &Kept| kept.id == claim.id;
        let known = self.slots.iter().position(|slot| slot.as_ref().is_some_and(same));
        let free = || self.slots.iter().position(Option::is_none);
        let full = || WireError::new(ErrorCode::NoMemory, format!("{SLOTS} claims are in use: take some back first"));
        let slot = known.or_else(free).ok_or_else(full)?;
        let taken = |number: u16| used(number) || self.slots.iter().flatten().any(|kept| kept.number == number);
        let number = match &self.slots[slot] {
            Some(kept) => kept.number,
            None => self.next_number(taken).ok_or_else(full)?,
        };
        let kept = Kept { number, token, id: claim.id.clone(), name: claim.name.clone(), bytes };
        store(&self.window, slot as u64, &kept).map_err(not_kept)?;
        self.slots[slot] = Some(kept);
        Ok(Rule::of_claim(number))
    }

    fn next_number(&self, taken: impl Fn(u16) -> bool) -> Option<u16> {
        let all = CLAIMS_FROM..u16::MAX;
        let from = self.window.load_u64(OFF_NEXT).ok().and_then(|from| u16::try_from(from).ok());
        let from = from.filter(|from| all.contains(from)).unwrap_or(CLAIMS_FROM);
        let number = (from..u16::MAX).chain(CLAIMS_FROM..from).find(|number| !taken(*number))?;
        self.window.store_u64(OFF_NEXT, u64::from(number) + 1).ok()?;
        Some(number)
    }

    fn remove(&mut self, id: &str) -> Result<Option<Rule>, WireError> {
        let found = self.slots.iter().position(|slot| slot.as_ref().is_some_and(|kept| kept.id == id));
        let Some(slot) = found else { return Ok(None) };
        self.window.store_u64((slot as u64 + 1) * SLOT_BYTES, 0).map_err(not_kept)?;
        Ok(self.slots[slot].take().map(|kept| Rule::of_claim(kept.number)))
    }
}

fn not_kept(error: HookError) -> WireError {
    WireError::new(ErrorCode::Io, format!("The claim cannot be kept: {error}"))
}

fn load(window: &Window, slot: u64) -> Result<Option<Kept>, HookError> {
    let base = (slot + 1) * SLOT_BYTES;
    let Some(number) = u16::try_from(window.load_u64(base)?).ok().filter(|number| *number >= CLAIMS_FROM) else {
        return Ok(None);
    };
    let mut bytes = [0; DEVICE_SLOTS];
    for (device, bytes) in bytes.iter_mut().enumerate() {
        *bytes = window.load_u64(base + OFF_BYTES + 8 * device as u64)?;
    }
    let mut token = [0; TOKEN_BYTES];
    window.read(base + OFF_TOKEN, &mut token)?;
    let lengths = window.load_u64(base + OFF_LENGTHS)?;
    let text = |off: u64, len: u64, max: usize| -> Result<String, HookError> {
        let mut text = vec![0; (len as usize).min(max)];
        window.read(base + off, &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    let id = text(OFF_ID, lengths & 0xffff, ID_BYTES)?;
    let name = text(OFF_NAME, lengths >> 16 & 0xffff, NAME_BYTES)?;
    Ok(Some(Kept { number, token, id, name, bytes }))
}

/// A slot is in use from its last store on. One that was in use before has the same number: a pager that dies in the middle leaves some of the old
/// shares, and whoever asked has no answer and asks again.
fn store(window: &Window, slot: u64, kept: &Kept) -> Result<(), HookError> {
    let base = (slot + 1) * SLOT_BYTES;
    for (device, bytes) in kept.bytes.iter().enumerate() {
        window.store_u64(base + OFF_BYTES + 8 * device as u64, *bytes)?;
    }
    window.write(base + OFF_TOKEN, &kept.token)?;
    let name = &kept.name.as_bytes()[..kept.name.len().min(NAME_BYTES)];
    window.store_u64(base + OFF_LENGTHS, kept.id.len() as u64 | (name.len() as u64) << 16)?;
    window.write(base + OFF_ID, kept.id.as_bytes())?;
    window.write(base + OFF_NAME, name)?;
    window.store_u64(base, u64::from(kept.number))
}

fn check(claim: &Claim, devices: usize) -> Result<(), WireError> {
    let wrong = |text: String| Err(WireError::new(ErrorCode::Invalid, text));
    if claim.id.is_empty() || claim.id.len() > ID_BYTES {
        return wrong(format!("A claim's id has 1 to {ID_BYTES} bytes, not {}", claim.id.len()));
    }
    if claim.token.len() != TOKEN_BYTES || claim.token.iter().all(|byte| *byte == 0) {
        return wrong(format!("A claim's token has {TOKEN_BYTES} random bytes, not {}", claim.token.len()));
    }
    if let Some(share) = claim.shares.iter().find(|share| usize::from(share.device) >= devices) {
        return Err(WireError::new(ErrorCode::NotFound, format!("Device {} is not in the plan", share.device)));
    }
    Ok(())
}

impl Pager {
    /// Which claim a client shows.
    pub(crate) fn admit_claim(&self, token: &[u8]) -> Result<Rule, WireError> {
        self.claims.by_token(token).ok_or_else(|| {
            let text = "The claim that this process shows (UHMM_CLAIM) is not known here: it was taken back, or is another node's";
            WireError::new(ErrorCode::Permission, text)
        })
    }

    /// The core holds all spaces of the claim to its shares.
    pub(crate) fn tell_core_of_claim(&mut self, rule: Rule) {
        for device in self.service.plan.devices.iter().map(|device| device.id).collect::<Vec<_>>() {
            let limit_pages = self.claims.bytes(rule, device) / PAGE_SIZE;
            self.push(Event::GroupOnDevice { group: rule.group(), device: DeviceId(device), limit_pages });
        }
    }

    pub(crate) fn set_claim(&mut self, claim: &Claim) -> Result<pager::Reply, WireError> {
        check(claim, self.service.plan.devices.len().min(DEVICE_SLOTS))?;
        let spaces = &self.spaces;
        let used = |number: u16| spaces.values().any(|space| space.state.rule == Rule::of_claim(number));
        let rule = self.claims.set(claim, used)?;
        tracing::info!(claim = claim.id, name = claim.name, shares = ?claim.shares, "Claim given out");
        self.tell_core_of_claim(rule);
        Ok(pager::Reply::Done)
    }

    pub(crate) fn remove_claim(&mut self, id: &str) -> Result<pager::Reply, WireError> {
        if let Some(rule) = self.claims.remove(id)? {
            tracing::info!(claim = id, "Claim taken back");
            self.tell_core_of_claim(rule);
        }
        Ok(pager::Reply::Done)
    }

    pub(crate) fn list_claims(&self, after: &str) -> pager::Reply {
        let mut found: Vec<&Kept> =
            self.claims.slots.iter().flatten().filter(|kept| kept.id.as_str() > after).collect();
        found.sort_by(|left, right| left.id.cmp(&right.id));
        let more = found.len() > TOLD;
        found.truncate(TOLD);
        let devices = self.service.plan.devices.iter().map(|device| {
            let (frames, free) = self.core.frame_counts(DeviceId(device.id)).unwrap_or_default();
            DeviceUse {
                device: device.id,
                name: device.name.clone(),
                memory_bytes: u64::from(frames) * PAGE_SIZE,
                free_bytes: u64::from(free) * PAGE_SIZE,
                closed: self.records.is_closed(device.id),
            }
        });
        let devices = devices.collect();
        let has_rules = !self.service.plan.clients.is_empty();
        let claims = found.into_iter().map(|kept| self.told(kept)).collect();
        pager::Reply::Claims(Claims { claims, more, devices, has_rules })
    }

    fn told(&self, kept: &Kept) -> Claim {
        let share = |(device, bytes): (usize, &u64)| {
            let used_pages = self.core.charged_to(kept.number, DeviceId(device as u8));
            ClaimShare { device: device as u8, bytes: *bytes, used_bytes: used_pages * PAGE_SIZE }
        };
        let shares = kept.bytes.iter().enumerate().filter(|(_, bytes)| **bytes != 0).map(share).collect();
        let rule = Rule::of_claim(kept.number);
        let spaces = self.spaces.values().filter(|space| !space.dying && space.state.rule == rule).count() as u32;
        Claim { id: kept.id.clone(), name: kept.name.clone(), token: Vec::new(), shares, spaces }
    }

    /// Why a space gets no more of any device by its claim, if that is so.
    pub(crate) fn over_claim(&self, space: u64, rule: Rule) -> Option<String> {
        let Some(kept) = self.claims.of(rule) else {
            return Some("The claim of this process was taken back: it gets no more device memory".to_owned());
        };
        let full = |device: u8| self.core.left_of_group(SpaceId(space), DeviceId(device)) == 0;
        let used_up = (0..DEVICE_SLOTS as u8).filter(|device| kept.bytes[usize::from(*device)] != 0 && full(*device));
        let used_up = used_up.map(|device| {
            let name = self.service.plan.device(device).map_or("a device", |device| device.name.as_str());
            format!("{} bytes of {name}", kept.bytes[usize::from(device)])
        });
        let used_up: Vec<String> = used_up.collect();
        let text = format!("All that claim {:?} gives is in use: {}", kept.name, used_up.join(", "));
        (!used_up.is_empty()).then_some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(id: &str, token: u8, bytes: u64) -> Claim {
        let shares = vec![ClaimShare { device: 1, bytes, used_bytes: 0 }];
        Claim { id: id.to_owned(), name: format!("default/{id}"), token: vec![token; 32], shares, spaces: 0 }
    }

    #[test]
    fn the_next_pager_has_the_claims_and_nothing_else() {
        let mut table = ClaimTable::create().unwrap();
        let one = table.set(&claim("one", 1, 4096), |_| false).unwrap();
        let two = table.set(&claim("two", 2, 8192), |_| false).unwrap();
        assert_eq!(table.set(&claim("one", 1, 12288), |_| false).unwrap(), one, "the same one, with another share");
        let next = ClaimTable::adopt(table.fd()).unwrap().expect("a table");
        assert_eq!(next.slots, table.slots);
        assert_eq!((next.by_token(&[1; 32]), next.by_token(&[2; 32])), (Some(one), Some(two)));
        assert_eq!((next.bytes(one, 1), next.bytes(one, 0), next.bytes(two, 1)), (12288, 0, 8192));
        assert_eq!(next.name(two), Some("default/two"));
        for token in [vec![], vec![0; 32], vec![1; 31], vec![3; 32]] {
            assert_eq!(next.by_token(&token), None, "{token:?}");
        }
        table.remove("one").unwrap();
        let next = ClaimTable::adopt(table.fd()).unwrap().expect("a table");
        assert_eq!((next.by_token(&[1; 32]), next.by_token(&[2; 32])), (None, Some(two)));
        let other: Fd = Arc::new(memfd::create_sealed("other", LEN_BYTES.next_multiple_of(PAGE_SIZE)).unwrap());
        assert!(ClaimTable::adopt(other).unwrap().is_none());
    }

    #[test]
    fn a_number_that_a_space_still_has_is_no_other_claims() {
        let mut table = ClaimTable::create().unwrap();
        let first = table.set(&claim("first", 1, 1), |_| false).unwrap();
        assert_eq!(table.remove("first").unwrap(), Some(first));
        assert_eq!(table.remove("first").unwrap(), None);
        let taken = first.claim().unwrap();
        for round in 0..3u8 {
            let rule = table.set(&claim(&format!("c{round}"), 2 + round, 1), |number| number == taken).unwrap();
            assert_ne!(rule, first);
        }
        // Once around, and when there is no slot that is free, a refusal.
        table.window.store_u64(OFF_NEXT, u64::from(u16::MAX) - 1).unwrap();
        for round in 0..SLOTS - 3 {
            table.set(&claim(&format!("d{round}"), 77, 1), |number| number == taken).unwrap();
        }
        assert!(table.slots.iter().flatten().all(|kept| kept.number != taken && kept.number != u16::MAX));
        let refused = table.set(&claim("one more", 78, 1), |_| false).expect_err("no slot");
        assert!(refused.to_string().contains("256 claims"), "{refused}");
    }

    #[test]
    fn what_is_no_claim_is_refused() {
        assert!(check(&claim("a", 1, 1), 2).is_ok());
        for (wrong, devices) in [
            (claim("", 1, 1), 2),
            (claim(&"x".repeat(65), 1, 1), 2),
            (claim("a", 0, 1), 2),
            (Claim { token: vec![1; 16], ..claim("a", 1, 1) }, 2),
            (claim("a", 1, 1), 1),
        ] {
            assert!(check(&wrong, devices).is_err(), "{wrong:?}");
        }
    }
}
