//! What the scheduler is told: one ResourceSlice of this node, with a device for each of uhmm's that can be used, and how much of its memory claims
//! can have. The scheduler subtracts what it has given away, so that is not subtracted here.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use uhmm_sdk::Claims;

use crate::allocation::{self, MEMORY};
use crate::api::{Api, ApiError};
use crate::core::capacity;
use crate::quantity;

/// Claims get multiples of it: what the pager moves at once.
const STEP: u64 = 2 << 20;
/// What is in use by others changes all the time; the scheduler is told of steps of the device's memory, so many.
const STEPS: u64 = 64;
/// Looks at a device that is not there before it is withdrawn: its driver may be starting again.
const MISSES: u32 = 3;
/// How often a slice that somebody else changes is read again.
const TRIES: u32 = 3;

/// One device of the slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Its name.
    pub name: String,
    /// What claims can have, together.
    pub bytes: u64,
}

/// What was seen of devices, and what follows.
#[derive(Debug, Default)]
pub struct Offers {
    seen: BTreeMap<String, (u64, u32)>,
}

impl Offers {
    /// `claims`: what the core says, if it says anything; `promised`: what claims of this node may have of each device.
    pub fn look(&mut self, claims: Option<&Claims>, promised: &BTreeMap<&str, u64>) -> Vec<Offer> {
        for (_, misses) in self.seen.values_mut() {
            *misses += 1;
        }
        for device in claims.iter().flat_map(|claims| &claims.devices) {
            if allocation::check_name("Device", &device.name, 63).is_err() || device.name.contains('.') {
                tracing::warn!(device = device.name, "Kubernetes knows no such names: it is not offered");
            } else if device.closed {
                self.seen.remove(&device.name);
            } else if let Some(claims) = claims.filter(|_| device.memory_bytes != 0) {
                let step = (device.memory_bytes / STEPS).next_multiple_of(STEP);
                let free = capacity(device, claims);
                let whole = if free == device.memory_bytes { free } else { free / step * step };
                let bytes = whole.max(promised.get(device.name.as_str()).copied().unwrap_or(0)) / STEP * STEP;
                self.seen.insert(device.name.clone(), (bytes, 0));
            }
        }
        self.seen.retain(|_, (_, misses)| *misses < MISSES);
        self.seen.iter().map(|(name, (bytes, _))| Offer { name: name.clone(), bytes: *bytes }).collect()
    }
}

fn device(driver: &str, offer: &Offer) -> Value {
    let amount = quantity::text;
    let mut memory = json!({ "value": amount(offer.bytes) });
    // A range must have room for two steps.
    if offer.bytes >= 2 * STEP {
        memory["requestPolicy"] = json!({
            "default": amount(STEP),
            "validRange": { "min": amount(STEP), "step": amount(STEP) },
        });
    }
    json!({
        "name": offer.name,
        "allowMultipleAllocations": true,
        "attributes": { format!("{driver}/name"): { "string": offer.name } },
        "capacity": { MEMORY: memory },
    })
}

/// Whose slice it is.
#[derive(Clone, Debug)]
pub struct Slices {
    /// The driver.
    pub driver: String,
    /// The node, which is the pool's name too.
    pub node: String,
    /// The node's uid: the slice goes with it.
    pub node_uid: Option<String>,
}

impl Slices {
    /// Names of objects are longer than those of nodes and drivers.
    fn name(&self) -> String {
        format!("{}-{}", self.node, self.driver)
    }

    fn slice(&self, offers: &[Offer], generation: u64, node_uid: &str) -> Value {
        let Self { driver, node, .. } = self;
        json!({
            "apiVersion": "resource.k8s.io/v1",
            "kind": "ResourceSlice",
            "metadata": {
                "name": self.name(),
                "ownerReferences": [{ "apiVersion": "v1", "kind": "Node", "name": node, "uid": node_uid, "controller": true }],
            },
            "spec": {
                "driver": driver,
                "nodeName": node,
                "pool": { "name": node, "generation": generation, "resourceSliceCount": 1 },
                "devices": offers.iter().map(|offer| device(driver, offer)).collect::<Vec<_>>(),
            },
        })
    }

    /// The API server has these and nothing else of us afterwards.
    pub fn publish(&mut self, api: &Api, offers: &[Offer]) -> Result<(), ApiError> {
        let mut result = Ok(());
        for _ in 0..TRIES {
            result = self.try_publish(api, offers);
            if !matches!(result, Err(ApiError::Conflict { .. })) {
                break;
            }
        }
        result
    }

    fn try_publish(&mut self, api: &Api, offers: &[Offer]) -> Result<(), ApiError> {
        let there = api.slices(&self.driver, &self.node)?;
        let name = self.name();
        let (own, others): (Vec<_>, Vec<_>) = there.iter().partition(|slice| slice["metadata"]["name"] == name);
        for other in others.iter().filter_map(|slice| slice["metadata"]["name"].as_str()) {
            tracing::info!(slice = other, "A slice of an earlier driver of this node is deleted");
            api.delete_slice(other)?;
        }
        let own = own.first();
        if offers.is_empty() {
            return own.map_or(Ok(()), |_| api.delete_slice(&name));
        }
        if self.node_uid.is_none() {
            self.node_uid = api.node(&self.node)?["metadata"]["uid"].as_str().map(str::to_owned);
        }
        let generations = there.iter().filter_map(|slice| slice["spec"]["pool"]["generation"].as_u64());
        let generation = generations.max().unwrap_or(0);
        let wanted = self.slice(offers, generation + 1, self.node_uid.as_deref().unwrap_or_default());
        let Some(own) = own else { return api.create_slice(&wanted).map(drop) };
        let mut same = wanted.clone();
        same["spec"]["pool"]["generation"] = generation.into();
        if others.is_empty() && same["spec"] == own["spec"] {
            return Ok(());
        }
        let mut next = wanted;
        next["metadata"]["resourceVersion"] = own["metadata"]["resourceVersion"].clone();
        api.replace_slice(&name, &next).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uhmm_sdk::DeviceUse;

    const GIB: u64 = 1 << 30;

    fn claims(devices: &[(&str, u64, u64, bool)]) -> Claims {
        let device = |(index, (name, memory_bytes, free_bytes, closed)): (usize, &(&str, u64, u64, bool))| {
            let (memory_bytes, free_bytes, closed) = (*memory_bytes, *free_bytes, *closed);
            DeviceUse { device: index as u8, name: (*name).to_owned(), memory_bytes, free_bytes, closed }
        };
        Claims { devices: devices.iter().enumerate().map(device).collect(), ..Claims::default() }
    }

    fn offer(name: &str, bytes: u64) -> Offer {
        Offer { name: name.to_owned(), bytes }
    }

    #[test]
    fn small_changes_are_not_told_and_promises_are_kept() {
        let none = BTreeMap::new();
        let mut offers = Offers::default();
        let mut look = |free: u64, promised: &BTreeMap<&str, u64>| {
            offers.look(Some(&claims(&[("far0", 64 * GIB, free, false)])), promised).remove(0).bytes
        };
        assert_eq!(look(64 * GIB, &none), 64 * GIB);
        assert_eq!([look(64 * GIB - 1, &none), look(63 * GIB + 5, &none)], [63 * GIB; 2]);
        assert_eq!(
            look(10 * GIB, &BTreeMap::from([("far0", 20 * GIB)])),
            20 * GIB,
            "the scheduler has given that away"
        );
    }

    #[test]
    fn what_cannot_be_used_is_not_offered_and_a_driver_may_start_again() {
        let none = BTreeMap::new();
        let mut offers = Offers::default();
        let two = [("a", GIB, GIB, false), ("b", GIB, GIB, false), ("b-", GIB, GIB, false)];
        assert_eq!(offers.look(Some(&claims(&two)), &none), [offer("a", GIB), offer("b", GIB)]);
        // The core is away for a moment, then a driver is.
        assert_eq!(offers.look(None, &none).len(), 2);
        let away = [("a", GIB, GIB, true), ("b", 0, 0, false)];
        assert_eq!(offers.look(Some(&claims(&away)), &none), [offer("b", GIB)], "drained counts at once");
        assert_eq!(offers.look(Some(&claims(&away)), &none), []);
    }

    #[test]
    fn a_small_device_has_no_range_that_would_not_fit() {
        assert_eq!(device("d", &offer("a", STEP))["capacity"]["memory"], json!({ "value": "2Mi" }));
        let memory = &device("d", &offer("a", 2 * STEP))["capacity"]["memory"];
        assert_eq!(memory["requestPolicy"]["validRange"], json!({ "min": "2Mi", "step": "2Mi" }));
    }
}
