//! Preparing claims and taking them back. Both can be killed anywhere and asked again:
//!
//! ```text
//!   prepare:    checkpoint (token, shares) -> core: rule -> CDI file -> checkpoint (prepared) -> answer
//!   unprepare:  checkpoint (gone) -> CDI file gone -> core: rule gone -> answer
//!   start:      of each entry rule and file are made again, of everything else they are removed
//! ```
//! A claim that was prepared is answered from the checkpoint, so the API server may be away.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use uhmm_sdk::Claims;

use uhmm_kernel_hook::error::chain;

use crate::allocation::{self, ClaimError};
use crate::api::{Api, ApiError};
use crate::cdi::Cdi;
use crate::checkpoint::{Checkpoint, CheckpointError, Entry};
use crate::core::{Core, CoreError, check_room, promised};
use crate::slices::{Offers, Slices};
use crate::wire;

/// Why a claim is not prepared, or not taken back.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// What was asked for.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The API server.
    #[error("The claim cannot be read")]
    Api(#[from] ApiError),
    /// The same, about what is offered.
    #[error("The scheduler cannot be told of this node's devices")]
    Offers(#[source] ApiError),
    /// The core.
    #[error(transparent)]
    Core(#[from] CoreError),
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The runtime's file.
    #[error("The CDI file in {} cannot be written or removed", .folder.display())]
    Cdi {
        /// Where.
        folder: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The kernel gives no randomness.
    #[error("There is no randomness for the claim's token")]
    Random(#[source] std::io::Error),
}

const UNBOUND: &str = "The manifest has no [[client]] rules: a program that shows no claim may use everything, so that claims hold \
                       nobody; add one with `devices = []` (docs/kubernetes.md)";

/// See the module head.
pub struct Plugin {
    api: Api,
    core: Core,
    cdi: Cdi,
    driver: String,
    node: String,
    /// One thing at a time is done to claims.
    checkpoint: Mutex<Checkpoint>,
    slices: Mutex<(Slices, Offers)>,
}

fn check(claim: &wire::Claim) -> Result<(), ClaimError> {
    allocation::check_name("Uid", &claim.uid, 60)?;
    allocation::check_name("Namespace", &claim.namespace, 63)?;
    allocation::check_name("Name", &claim.name, 253)
}

fn fresh_token() -> Result<String, PluginError> {
    let mut token = [0u8; 32];
    let got = rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty());
    match got {
        Ok(32) => Ok(token.iter().map(|byte| format!("{byte:02x}")).collect()),
        Ok(_) => Err(PluginError::Random(std::io::ErrorKind::UnexpectedEof.into())),
        Err(errno) => Err(PluginError::Random(errno.into())),
    }
}

impl Plugin {
    /// With what an earlier driver left.
    pub fn new(api: Api, core: Core, cdi: Cdi, slices: Slices, checkpoint: Checkpoint) -> Self {
        let (driver, node) = (slices.driver.clone(), slices.node.clone());
        let (checkpoint, slices) = (Mutex::new(checkpoint), Mutex::new((slices, Offers::default())));
        Self { api, core, cdi, driver, node, checkpoint, slices }
    }

    fn checkpoint(&self) -> MutexGuard<'_, Checkpoint> {
        self.checkpoint.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every claim by itself: one that cannot be prepared is told why, and costs the others nothing.
    pub fn prepare(&self, claims: &[wire::Claim]) -> HashMap<String, wire::PreparedClaim> {
        let one = |claim: &wire::Claim| {
            let prepared = self.prepare_one(claim).map_or_else(
                |error| {
                    let error = chain(&error);
                    tracing::warn!(claim.uid, claim.namespace, claim.name, error, "A claim is not prepared");
                    wire::PreparedClaim { devices: Vec::new(), error }
                },
                |devices| wire::PreparedClaim { devices, error: String::new() },
            );
            (claim.uid.clone(), prepared)
        };
        claims.iter().map(one).collect()
    }

    fn prepare_one(&self, claim: &wire::Claim) -> Result<Vec<wire::Device>, PluginError> {
        check(claim)?;
        let known = self.checkpoint().claims().get(&claim.uid).cloned();
        if let Some(entry) = known.filter(|entry| entry.prepared) {
            let there = self.core.claims()?;
            self.give(&mut self.checkpoint(), &claim.uid, entry.clone(), &there)?;
            return Ok(self.devices(&claim.uid, &entry));
        }
        let object = self.api.claim(&claim.namespace, &claim.name)?;
        let shares = allocation::shares(&object, &claim.uid, &self.driver, &self.node)?;
        // A core that does not answer is not waited for with the checkpoint in hand: pods that end need it.
        let there = self.core.claims()?;
        let mut checkpoint = self.checkpoint();
        let token = match checkpoint.claims().get(&claim.uid) {
            Some(entry) => entry.token.clone(),
            None => fresh_token()?,
        };
        let (namespace, name) = (claim.namespace.clone(), claim.name.clone());
        let entry = Entry { namespace, name, token, shares, prepared: false };
        let others = checkpoint.claims().iter().filter(|(uid, _)| **uid != claim.uid).map(|(_, entry)| entry);
        check_room(&entry, &promised(others), &there)?;
        checkpoint.set(&claim.uid, Some(entry.clone()))?;
        self.give(&mut checkpoint, &claim.uid, entry.clone(), &there)?;
        tracing::info!(claim.uid, claim.namespace, claim.name, shares = ?entry.shares, "Prepared");
        Ok(self.devices(&claim.uid, &entry))
    }

    /// Rule and file. The checkpoint, which has the entry, is held meanwhile.
    fn give(&self, checkpoint: &mut Checkpoint, uid: &str, entry: Entry, claims: &Claims) -> Result<(), PluginError> {
        // Taken back while somebody waited for the checkpoint: the kubelet does not do that, and nothing would ever remove what is made here.
        let Some(there) = checkpoint.claims().get(uid) else { return Err(ClaimError::NotAllocated.into()) };
        let prepared = there.prepared;
        self.core.give(uid, &entry, claims)?;
        self.cdi.give(uid, &entry).map_err(|source| PluginError::Cdi { folder: self.cdi.dir.clone(), source })?;
        if !prepared {
            checkpoint.set(uid, Some(Entry { prepared: true, ..entry }))?;
        }
        Ok(())
    }

    fn devices(&self, uid: &str, entry: &Entry) -> Vec<wire::Device> {
        let device = |(index, share): (usize, &allocation::Share)| wire::Device {
            // `request/alternative`, where there were some: the kubelet takes either form.
            request_names: vec![share.request.clone()],
            pool_name: self.node.clone(),
            device_name: share.device.clone(),
            cdi_device_ids: vec![self.cdi.device(uid, index)],
        };
        entry.shares.iter().enumerate().map(device).collect()
    }

    /// The same the other way round. A claim that is not known was taken back before.
    pub fn unprepare(&self, claims: &[wire::Claim]) -> HashMap<String, wire::UnpreparedClaim> {
        let one = |claim: &wire::Claim| {
            let error = self.unprepare_one(claim).map_or_else(|error| chain(&error), |()| String::new());
            if !error.is_empty() {
                tracing::warn!(claim.uid, claim.namespace, claim.name, error, "A claim is not taken back");
            }
            (claim.uid.clone(), wire::UnpreparedClaim { error })
        };
        claims.iter().map(one).collect()
    }

    fn unprepare_one(&self, claim: &wire::Claim) -> Result<(), PluginError> {
        check(claim)?;
        let mut checkpoint = self.checkpoint();
        if checkpoint.claims().contains_key(&claim.uid) {
            checkpoint.set(&claim.uid, None)?;
            tracing::info!(claim.uid, claim.namespace, claim.name, "Taken back");
        }
        self.cdi.take_back(&claim.uid).map_err(|source| PluginError::Cdi { folder: self.cdi.dir.clone(), source })?;
        if let Err(error) = self.core.take_back(&claim.uid) {
            // Pods must end where uhmm does not run; when it does again, it is told (`reconcile`).
            tracing::warn!(%error, claim.uid, "The core is not told yet that a claim was taken back");
        }
        Ok(())
    }

    /// Core, files and API server have what they should; what could not be done is told, and done the next time.
    pub fn look(&self) -> Vec<String> {
        let mut wrong: Vec<PluginError> = Vec::new();
        let there = self.core.claims();
        let checkpoint = self.checkpoint();
        wrong.extend(self.reconcile_files(&checkpoint).err());
        let core = there.and_then(|there| self.core.reconcile(checkpoint.claims(), there));
        let mut slices = self.slices.lock().unwrap_or_else(PoisonError::into_inner);
        let offers = slices.1.look(core.as_ref().ok(), &promised(checkpoint.claims().values()));
        // The API server may take its time, and claims do not wait for that.
        drop(checkpoint);
        wrong.extend(slices.0.publish(&self.api, &offers).err().map(PluginError::Offers));
        let unbound = core.as_ref().is_ok_and(|claims| !claims.has_rules);
        wrong.extend(core.err().map(PluginError::from));
        let unbound = unbound.then(|| UNBOUND.to_owned());
        wrong.iter().map(|error| chain(error)).chain(unbound).collect()
    }

    fn reconcile_files(&self, checkpoint: &Checkpoint) -> Result<(), PluginError> {
        let failed = |source| PluginError::Cdi { folder: self.cdi.dir.clone(), source };
        let given = self.cdi.given().map_err(failed)?;
        for uid in given.iter().filter(|uid| !checkpoint.claims().contains_key(*uid)) {
            self.cdi.take_back(uid).map_err(failed)?;
        }
        for (uid, entry) in checkpoint.claims().iter().filter(|(uid, entry)| entry.prepared && !given.contains(uid)) {
            self.cdi.give(uid, entry).map_err(failed)?;
        }
        Ok(())
    }
}
