//! Who may use what: the manifest's `[[client]]` rules, and claims (`claims.rs`) for who shows one. A client is named when it opens its space, by what the kernel says of the process that
//! connected (user, group, control groups), and keeps its rule; its forked children have the same.
//!
//! ```text
//!   OpenSpace --admit_client--> no rule names it: Permission | over the rule's processes: NoMemory | Rule, kept in the space's state
//!   OpenMirror, Migrate --rule_allows--> device not in the rule: Permission
//!   CreateRegion, AdoptRegion ... --region_limits--> NoMemory
//!   device memory --Event::SpaceGroup--> the core: no frames beyond the rule's, and nobody else is evicted for them
//! ```

use uhmm_ipc::message::{ErrorCode, WireError};
use uhmm_kernel_hook::{PAGE_SIZE, process};
use uhmm_manifest::{Client, ClientPlan};
use uhmm_pager_core::{DeviceId, Event, SpaceId};

use crate::clients::Caller;
use crate::service::Pager;

/// Rules above are claims; no manifest has so many.
pub(crate) const CLAIMS_FROM: u16 = 0x8000;

/// A rule by its place in the plan, or a claim by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule(u32);

impl Rule {
    /// There are no rules: everything is allowed.
    pub const NONE: Self = Self(0);
    /// Nothing is.
    pub const NOBODY: Self = Self(u32::MAX);

    /// The claim of this number.
    pub(crate) fn of_claim(number: u16) -> Self {
        Self(number.into())
    }

    /// The number of its claim, if it is one.
    pub(crate) fn claim(self) -> Option<u16> {
        u16::try_from(self.0).ok().filter(|number| (CLAIMS_FROM..u16::MAX).contains(number))
    }

    fn of(index: Option<usize>) -> Self {
        index.map_or(Self::NONE, |index| u32::try_from(index + 1).map_or(Self::NOBODY, Self))
    }

    /// As the space's state has it.
    pub fn word(self) -> u64 {
        u64::from(self.0)
    }

    /// The same, read.
    pub fn from_word(word: u64) -> Self {
        u32::try_from(word).map_or(Self::NOBODY, Self)
    }

    fn index(self) -> Option<usize> {
        (self != Self::NONE && self.claim().is_none()).then(|| self.0 as usize - 1)
    }

    /// The core's word; rules beyond it are none that a manifest has.
    pub(crate) fn group(self) -> u16 {
        u16::try_from(self.0).unwrap_or(u16::MAX)
    }
}

impl Pager {
    /// Which rule names the process, if it may have one more space.
    pub(crate) fn admit_client(&mut self, caller: &Caller, gid: u32) -> Result<Rule, WireError> {
        let plan = &self.service.plan;
        if plan.clients.is_empty() {
            return Ok(Rule::NONE);
        }
        let refuse = |text: String| WireError::new(ErrorCode::Permission, text);
        let cgroups = if plan.rules_ask_for_groups() {
            groups_of(caller).unwrap_or_else(|text| {
                tracing::warn!(
                    pid = caller.pid,
                    text,
                    "A client's control groups are not known: no rule about such names it"
                );
                Vec::new()
            })
        } else {
            Vec::new()
        };
        let rule = Rule::of(plan.rule_of(&Client { uid: caller.uid, gid, cgroups }).map_err(refuse)?);
        let Some((name, Some(max))) = self.plan_of(rule).map(|plan| (plan.name.clone(), plan.max_spaces)) else {
            return Ok(rule);
        };
        let count = |pager: &Self| pager.spaces.values().filter(|s| !s.dying && s.state.rule == rule).count();
        if count(self) >= max as usize {
            self.check_children();
        }
        if count(self) >= max as usize {
            let text =
                format!("{max} processes are managed already (max_spaces of [[client]] {name:?} in the manifest)");
            return Err(WireError::new(ErrorCode::NoMemory, text));
        }
        Ok(rule)
    }

    fn plan_of(&self, rule: Rule) -> Option<&ClientPlan> {
        self.service.plan.clients.get(rule.index()?)
    }

    fn rule_of_space(&self, space: u64) -> Rule {
        self.spaces.get(&space).map_or(Rule::NOBODY, |space| space.state.rule)
    }

    /// Whether a space may use a device.
    pub(crate) fn rule_allows(&self, space: u64, device: u8) -> Result<(), WireError> {
        let rule = self.rule_of_space(space);
        if rule.claim().is_some() {
            return self.claim_allows(rule, device);
        }
        let plan = self.plan_of(rule);
        if rule == Rule::NONE
            || plan.is_some_and(|plan| plan.device_mask & 1u8.checked_shl(device.into()).unwrap_or(0) != 0)
        {
            return Ok(());
        }
        let name = plan.map_or("of an earlier manifest", |plan| plan.name.as_str());
        let device = self.service.plan.device(device).map_or_else(|| device.to_string(), |device| device.name.clone());
        let text =
            format!("Device {device} is not for this client: [[client]] {name:?} of the manifest does not list it");
        Err(WireError::new(ErrorCode::Permission, text))
    }

    fn claim_allows(&self, rule: Rule, device: u8) -> Result<(), WireError> {
        if self.claims.bytes(rule, device) != 0 {
            return Ok(());
        }
        let device = self.service.plan.device(device).map_or_else(|| device.to_string(), |device| device.name.clone());
        let text = match self.claims.name(rule) {
            Some(name) => format!("Claim {name:?} gives nothing of device {device}: ask for a share of it"),
            None => format!("The claim of this process was taken back: device {device} is not for it any more"),
        };
        Err(WireError::new(ErrorCode::Permission, text))
    }

    /// Most regions of a space, most bytes of one, and where that is said.
    pub(crate) fn region_limits(&self, space: u64) -> (u32, u64, String) {
        let quota = &self.service.plan.quota;
        match self.plan_of(self.rule_of_space(space)) {
            Some(plan) => (plan.max_regions_per_space, plan.max_region_bytes, format!("[[client]] {:?}", plan.name)),
            None => (quota.max_regions_per_space, quota.max_region_bytes.0, "[quota]".to_owned()),
        }
    }

    /// Before the space's first region.
    pub(crate) fn tell_core_of_rule(&mut self, space: u64) {
        let rule = self.rule_of_space(space);
        if rule.claim().is_some() {
            // Of each device its share, so over all of them there is nothing more to say.
            self.push(Event::SpaceGroup { space: SpaceId(space), group: rule.group(), limit_pages: u64::MAX });
            return self.tell_core_of_claim(rule);
        }
        let limit = match self.plan_of(rule) {
            Some(plan) => plan.device_memory_bytes,
            // Of a manifest that there is no more: it keeps what it has.
            None => (rule != Rule::NONE).then_some(0),
        };
        if let Some(bytes) = limit {
            let limit_pages = bytes / PAGE_SIZE;
            self.push(Event::SpaceGroup { space: SpaceId(space), group: rule.group(), limit_pages });
        }
    }

    /// Why a space gets no more frames, if that is its rule's doing.
    pub(crate) fn over_quota(&self, space: u64) -> Option<String> {
        let rule = self.rule_of_space(space);
        if rule.claim().is_some() {
            return self.over_claim(space, rule);
        }
        let plan = self.plan_of(rule)?;
        let bytes = plan.device_memory_bytes?;
        // The limit is one over all devices, so any of them tells.
        (self.core.left_of_group(SpaceId(space), DeviceId(0)) == 0).then(|| {
            let name = &plan.name;
            format!("All {bytes} bytes of device memory that [[client]] {name:?} of the manifest gives are in use")
        })
    }
}

/// Of a process that is held meanwhile, so that they are no other one's.
fn groups_of(caller: &Caller) -> Result<Vec<String>, String> {
    let text = |error: uhmm_kernel_hook::HookError| error.to_string();
    let groups = process::control_groups(caller.pid).map_err(text)?;
    if caller.process.pidfd.exited().map_err(text)? { Err("it has ended".to_owned()) } else { Ok(groups) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_survives_its_word_and_a_strange_word_allows_nothing() {
        for rule in [Rule::NONE, Rule::of(Some(0)), Rule::of(Some(41)), Rule::NOBODY] {
            assert_eq!(Rule::from_word(rule.word()), rule);
        }
        assert_eq!(Rule::from_word(u64::MAX), Rule::NOBODY);
        assert_eq!((Rule::NONE.index(), Rule::of(Some(3)).index()), (None, Some(3)));
        assert_eq!((Rule::of(Some(0)).group(), Rule::NOBODY.group()), (1, u16::MAX));
        let claim = Rule::of_claim(CLAIMS_FROM + 7);
        assert_eq!((claim.claim(), claim.index(), claim.group()), (Some(CLAIMS_FROM + 7), None, CLAIMS_FROM + 7));
        assert_eq!(Rule::from_word(claim.word()), claim);
        assert!([Rule::NONE, Rule::NOBODY, Rule::of(Some(41))].iter().all(|rule| rule.claim().is_none()));
    }
}
