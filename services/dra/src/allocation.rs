//! What the scheduler gave a ResourceClaim of this driver's devices on this node. Nothing in the object is believed to have any shape.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::quantity;

/// Name of the capacity, in ResourceSlices and claims.
pub const MEMORY: &str = "memory";

/// One result of the allocation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// The claim's request that it answers.
    pub request: String,
    /// The device.
    pub device: String,
    /// Bytes of it.
    pub bytes: u64,
    /// Which share of the device it is, to the scheduler.
    pub share_id: Option<String>,
}

/// Why a claim cannot be prepared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// The kubelet's words are no names.
    #[error("{what} {given:?} is no name of Kubernetes: letters, digits, '-' and '.', at most {max} of them")]
    Name {
        /// Which.
        what: &'static str,
        /// As given.
        given: String,
        /// How long it may be.
        max: usize,
    },
    /// A claim of the same name was made after this one was deleted.
    #[error("It has the uid {found} by now: it was deleted and made again")]
    Other {
        /// The new one's.
        found: String,
    },
    /// The scheduler has not seen it.
    #[error("It is not allocated (status.allocation): the scheduler has to do that first")]
    NotAllocated,
    /// Nothing of it is ours.
    #[error("None of its allocated devices is one of driver {driver} on node {node}")]
    NotOurs {
        /// Ours.
        driver: String,
        /// This one.
        node: String,
    },
    /// It is another node's.
    #[error("Its device {device} is in pool {pool}, and this is node {node}")]
    OtherPool {
        /// Device.
        device: String,
        /// Its pool.
        pool: String,
        /// This one.
        node: String,
    },
    /// A field that must be there is not, or is something else.
    #[error("Its allocation is malformed: result {index} {problem}")]
    Malformed {
        /// Which result.
        index: usize,
        /// What is wrong with it.
        problem: String,
    },
}

/// Kubernetes lets no other names in; and they become parts of paths and addresses here.
pub fn check_name(what: &'static str, given: &str, max: usize) -> Result<(), ClaimError> {
    let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = given.as_bytes();
    if bytes.len() <= max && bytes.iter().all(|byte| legal(*byte)) && ends(bytes.first()) && ends(bytes.last()) {
        return Ok(());
    }
    Err(ClaimError::Name { what, given: given.chars().take(300).collect(), max })
}

/// What of `claim` (the object) is ours.
pub fn shares(claim: &Value, uid: &str, driver: &str, node: &str) -> Result<Vec<Share>, ClaimError> {
    let found = claim["metadata"]["uid"].as_str().unwrap_or_default();
    if found != uid {
        return Err(ClaimError::Other { found: found.to_owned() });
    }
    let results = claim["status"]["allocation"]["devices"]["results"].as_array().ok_or(ClaimError::NotAllocated)?;
    let ours = results.iter().enumerate().filter(|(_, result)| result["driver"] == driver);
    let shares: Vec<Share> = ours.map(|(index, result)| share(index, result, node)).collect::<Result<_, _>>()?;
    if shares.is_empty() {
        return Err(ClaimError::NotOurs { driver: driver.to_owned(), node: node.to_owned() });
    }
    Ok(shares)
}

fn share(index: usize, result: &Value, node: &str) -> Result<Share, ClaimError> {
    let malformed = |problem: String| ClaimError::Malformed { index, problem };
    let text = |key: &str| result[key].as_str().ok_or_else(|| malformed(format!("has no {key:?}")));
    let (request, device, pool) = (text("request")?, text("device")?, text("pool")?);
    if pool != node {
        let owned = |text: &str| text.to_owned();
        return Err(ClaimError::OtherPool { device: owned(device), pool: owned(pool), node: owned(node) });
    }
    if result["adminAccess"] == true {
        return Err(malformed("asks for administrative access, which this driver has none of".to_owned()));
    }
    let consumed = result["consumedCapacity"].get(MEMORY).and_then(Value::as_str).ok_or_else(|| {
        let problem = "has no consumedCapacity of \"memory\": the cluster needs the feature gate DRAConsumableCapacity";
        malformed(problem.to_owned())
    })?;
    let bytes = quantity::bytes(consumed).filter(|bytes| *bytes != 0);
    let bytes = bytes.ok_or_else(|| malformed(format!("consumes {consumed:?} of memory, which is no amount")))?;
    let share_id = result["shareID"].as_str().map(str::to_owned);
    Ok(Share { request: request.to_owned(), device: device.to_owned(), bytes, share_id })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn claim(results: Value) -> Value {
        json!({ "metadata": { "uid": "u" }, "status": { "allocation": { "devices": { "results": results } } } })
    }

    fn result(change: impl FnOnce(&mut Value)) -> Value {
        let mut result = json!({
            "request": "far", "driver": "d", "pool": "n", "device": "soft0", "shareID": "s",
            "consumedCapacity": { "memory": "64Mi" },
        });
        change(&mut result);
        result
    }

    #[test]
    fn what_is_ours_is_found_among_the_rest() {
        let other = result(|result| result["driver"] = "gpu.example.com".into());
        let found = shares(&claim(json!([other, result(|_| {})])), "u", "d", "n").expect("ours");
        let (request, device, share_id) = ("far".to_owned(), "soft0".to_owned(), Some("s".to_owned()));
        assert_eq!(found, [Share { request, device, bytes: 64 << 20, share_id }]);
        assert!(matches!(shares(&claim(json!([other])), "u", "d", "n"), Err(ClaimError::NotOurs { .. })));
    }

    #[test]
    fn what_is_malformed_says_where() {
        type Change = fn(&mut Value);
        let cases: &[(Change, &str)] = &[
            (|result| result["consumedCapacity"] = json!({}), "DRAConsumableCapacity"),
            (|result| result["consumedCapacity"] = json!({ "memory": 5 }), "DRAConsumableCapacity"),
            (|result| result["consumedCapacity"] = json!({ "memory": "many" }), "many"),
            (|result| result["consumedCapacity"] = json!({ "memory": "0" }), "no amount"),
            (|result| result["device"] = Value::Null, "device"),
            (|result| result["request"] = json!([]), "request"),
            (|result| result["adminAccess"] = true.into(), "administrative"),
            (|result| result["pool"] = "other".into(), "pool other"),
        ];
        for (change, word) in cases {
            let error = shares(&claim(json!([result(change)])), "u", "d", "n").expect_err(word).to_string();
            assert!(error.contains(word), "{error}: {word}");
        }
        for object in [json!(null), json!([]), json!({ "metadata": { "uid": "u" }, "status": 7 })] {
            assert!(shares(&object, "u", "d", "n").is_err(), "{object}");
        }
        assert!(matches!(shares(&claim(json!([])), "v", "d", "n"), Err(ClaimError::Other { found }) if found == "u"));
    }

    #[test]
    fn names_that_would_be_other_paths_are_refused() {
        assert!(check_name("Name", "my-claim.x7", 253).is_ok());
        for wrong in ["", ".", "..", "-a", "a-", "a/b", "../x", "a%2fb", "A", "a b", "a\n", &"a".repeat(254)] {
            assert!(check_name("Name", wrong, 253).is_err(), "{wrong:?}");
        }
    }
}
