//! Users and groups by name, from the files that have them, and the rules that name them.

use std::path::Path;

use crate::ManifestError;
use crate::clients::CONTAINER_ID_MIN;
use crate::parse::{ClientEntry, Kind, Manifest, Service};
use crate::plan::{Account, ClientPlan, DevicePlan};

const USERS: &str = "/etc/passwd";
const GROUPS: &str = "/etc/group";

/// Lines of `name:x:number:...`; `key` is the name or the number.
fn look_up(text: &str, key: &str) -> Option<(u32, Option<u32>)> {
    let fields = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let mut found = fields.filter(|fields| fields.first() == Some(&key) || fields.get(2) == Some(&key));
    let fields = found.next()?;
    Some((fields.get(2)?.parse().ok()?, fields.get(3).and_then(|gid| gid.parse().ok())))
}

fn find(from: &str, what: &'static str, file: &str, key: &str) -> Result<(u32, Option<u32>), ManifestError> {
    let text = std::fs::read_to_string(Path::new(file)).unwrap_or_default();
    match (look_up(&text, key), key.parse::<u32>()) {
        (Some(found), _) => Ok(found),
        // A number needs no name. The last one means nobody.
        (None, Ok(number)) if number != u32::MAX => Ok((number, None)),
        _ => {
            let (from, name, file) = (from.to_owned(), key.to_owned(), file.to_owned());
            Err(ManifestError::Account { from, what, name, file })
        }
    }
}

/// Whom a service runs as.
pub(crate) fn of_service(service: &Service) -> Result<Option<Account>, ManifestError> {
    let Some(user) = &service.user else { return Ok(None) };
    let (uid, gid) = find(&format!("Service {:?}", service.name), "user", USERS, user)?;
    if uid == 0 && service.kind == Kind::Driver {
        let problem = "user = \"root\" is what the supervisor gives anyway, and no confinement: remove it".to_owned();
        return Err(ManifestError::Sandbox { service: service.name.clone(), problem });
    }
    Ok(Some(Account { user: user.clone(), uid, gid: gid.unwrap_or(uid) }))
}

/// The rules, in order.
pub(crate) fn resolve_clients(manifest: &Manifest, devices: &[DevicePlan]) -> Result<Vec<ClientPlan>, ManifestError> {
    let rules = manifest.clients.iter().enumerate();
    let plans = rules.map(|(index, entry)| resolve_client(index, entry, manifest, devices));
    let plans: Vec<ClientPlan> = plans.collect::<Result<_, _>>()?;
    for (index, plan) in plans.iter().enumerate() {
        if plans[..index].iter().any(|other| other.name == plan.name) {
            return Err(ManifestError::Duplicate { what: "[[client]]", name: plan.name.clone() });
        }
    }
    Ok(plans)
}

fn resolve_client(
    index: usize,
    entry: &ClientEntry,
    manifest: &Manifest,
    devices: &[DevicePlan],
) -> Result<ClientPlan, ManifestError> {
    let name = entry.name.clone().unwrap_or_else(|| format!("client {}", index + 1));
    let wrong = |problem: String| Err(ManifestError::Client { rule: name.clone(), problem });
    let from = format!("[[client]] {name:?}");
    let number = |what, file, key: &Option<String>| {
        key.as_ref().map(|key| find(&from, what, file, key).map(|(number, _)| number)).transpose()
    };
    let (uid, gid) = (number("user", USERS, &entry.user)?, number("group", GROUPS, &entry.group)?);
    if entry.cgroup.as_ref().is_some_and(|path| !path.starts_with('/') || path.len() > 1 && path.ends_with('/')) {
        return wrong("cgroup is a path as /proc/PID/cgroup has it: begin it with /, and end it without".into());
    }
    let id = |id: &String| id.len() < CONTAINER_ID_MIN || !id.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if entry.container.as_ref().is_some_and(id) {
        return wrong(format!("container is the container's id: {CONTAINER_ID_MIN} letters and digits of it at least"));
    }
    let mut device_mask = if entry.devices.is_none() { u8::MAX } else { 0 };
    for device in entry.devices.iter().flatten() {
        let Some(found) = devices.iter().find(|found| found.name == *device) else {
            let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
            return wrong(format!("device {device:?} is not in the manifest, which has {}", names.join(", ")));
        };
        device_mask |= 1 << found.id;
    }
    let quota = &manifest.quota;
    Ok(ClientPlan {
        uid,
        gid,
        cgroup: entry.cgroup.clone(),
        container: entry.container.clone(),
        device_mask,
        device_memory_bytes: entry.device_memory_bytes.map(|bytes| bytes.0),
        max_spaces: entry.max_spaces,
        max_regions_per_space: entry.max_regions_per_space.unwrap_or(quota.max_regions_per_space),
        max_region_bytes: entry.max_region_bytes.unwrap_or(quota.max_region_bytes).0,
        name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_found_in_the_files_of_users_and_groups() {
        let users = "root:x:0:0:root:/root:/bin/sh\nbroken\nuhmm:x:990:991::/:/bin/false\n";
        assert_eq!(look_up(users, "uhmm"), Some((990, Some(991))));
        assert_eq!(look_up(users, "990"), Some((990, Some(991))));
        assert_eq!(look_up(users, "broken"), None);
        assert_eq!(look_up("kvm:x:104:a,b\n", "kvm"), Some((104, None)));
        let found = find("Service \"a\"", "user", USERS, "no-such-user").map_err(|error| error.to_string());
        assert!(found.as_ref().is_err_and(|text| text.contains("no-such-user") && text.contains(USERS)), "{found:?}");
        assert_eq!(find("", "user", "/nonexistent", "4242"), Ok((4242, None)));
        assert!(find("", "user", "/nonexistent", "4294967295").is_err());
    }
}
