//! Hello and Welcome: who may connect, and under which limits. Pure decisions, no I/O.
//!
//! ```text
//!   major numbers differ        -> Protocol       other interface than served -> Invalid
//!   service role, no/wrong key  -> Permission     role not the name's         -> Permission
//!   client that cannot be held  -> Permission     client at a service's door  -> Permission
//!   operator without the key    -> Permission, where the supervisor gave one out: who was shown clients' sockets alone cannot ask it
//!   otherwise Welcome: the smaller minor number and the smaller limits of both sides
//! ```

use std::collections::HashMap;

use uhmm_kernel_hook::HookError;

use crate::constants::{MAJOR_VERSION, MINOR_VERSION};
use crate::identity::{Endpoint, Identity, Limits};
use crate::message::{ErrorCode, Hello, Role, Welcome, WireError};

/// Keys that service peers must present, by service name.
#[derive(Default)]
pub(crate) struct Keys {
    by_name: HashMap<String, Channel>,
}

#[derive(Default)]
struct Channel {
    key: Vec<u8>,
    role: Option<Role>,
}

impl Keys {
    pub(crate) fn set_key(&mut self, name: &str, key: Vec<u8>) {
        self.by_name.entry(name.to_owned()).or_default().key = key;
    }

    pub(crate) fn set_role(&mut self, name: &str, role: Role) {
        self.by_name.entry(name.to_owned()).or_default().role = Some(role);
    }

    fn admits(&self, hello: &Hello) -> bool {
        self.by_name.get(&hello.name).is_some_and(|channel| {
            !channel.key.is_empty()
                && same_bytes(&channel.key, &hello.key)
                && channel.role.is_none_or(|role| role == hello.role)
        })
    }

    fn admits_operator(&self, hello: &Hello) -> bool {
        self.by_name.get(OPERATORS).is_none_or(|channel| same_bytes(&channel.key, &hello.key))
    }
}

/// The name under which a service has the key of its operators. No service has such a one.
pub const OPERATORS: &str = ":operators";

/// Comparison whose time does not tell where the first difference is: for keys and tokens.
#[must_use]
pub fn same_bytes(left: &[u8], right: &[u8]) -> bool {
    left.len() == right.len() && left.iter().zip(right).fold(0, |all, (l, r)| all | (l ^ r)) == 0
}

/// Roles that must prove themselves.
pub(crate) fn is_service(role: Role) -> bool {
    match role {
        Role::Client | Role::Operator => false,
        Role::Pager | Role::Mirror | Role::Driver | Role::Supervisor => true,
    }
}

/// Our first message on a link.
pub(crate) fn hello(identity: &Identity, endpoint: &Endpoint) -> Hello {
    Hello {
        major: MAJOR_VERSION,
        minor: MINOR_VERSION,
        interface: endpoint.interface,
        role: identity.role,
        name: identity.name.clone(),
        incarnation: identity.incarnation,
        key: endpoint.key.clone(),
        max_message_bytes: identity.limits.max_message_bytes,
        max_fds: identity.limits.max_fds,
    }
}

/// A client whose process cannot be held could neither be watched nor be told from others. What a service has sent counts even if it has
/// died since (its last words).
pub(crate) fn judge_process(name: &str, role: Role, problem: Option<&HookError>) -> Result<(), WireError> {
    match problem {
        Some(problem) if !is_service(role) => {
            let text = format!("The process of {name} cannot be watched: {}", uhmm_kernel_hook::error::chain(problem));
            Err(WireError::new(ErrorCode::Permission, text))
        }
        _ => Ok(()),
    }
}

/// Clients and operators have a socket of their own, which confined services do not see.
pub(crate) fn judge_door(hello: &Hello, services_only: bool) -> Result<(), WireError> {
    if !services_only || is_service(hello.role) {
        return Ok(());
    }
    let text = format!("{} came through a socket for services as {:?}: a service is neither", hello.name, hello.role);
    Err(WireError::new(ErrorCode::Permission, text))
}

/// The callee's decision.
pub(crate) fn judge(identity: &Identity, keys: &Keys, hello: &Hello) -> Result<Welcome, WireError> {
    let refuse = |code, text: String| Err(WireError::new(code, text));
    if hello.major != MAJOR_VERSION {
        return refuse(
            ErrorCode::Protocol,
            format!("Version {} is spoken here, not {}: install matching versions", MAJOR_VERSION, hello.major),
        );
    }
    if Some(hello.interface) != identity.interface {
        return refuse(
            ErrorCode::Invalid,
            format!("{} does not serve the interface {:?}: check the socket's path", identity.name, hello.interface),
        );
    }
    if hello.name.is_empty() || hello.max_message_bytes < Limits::MIN_MESSAGE_BYTES {
        return refuse(
            ErrorCode::Invalid,
            format!("A caller needs a name and takes messages of {} bytes at least", Limits::MIN_MESSAGE_BYTES),
        );
    }
    if is_service(hello.role) && !keys.admits(hello) {
        return refuse(
            ErrorCode::Permission,
            format!(
                "{} may not connect to {} as {:?}: the channel is not in the manifest, or its key is old",
                hello.name, identity.name, hello.role
            ),
        );
    }
    if hello.role == Role::Operator && !keys.admits_operator(hello) {
        let text = format!("{} is no operator: it does not show what the supervisor gives to operators", hello.name);
        return refuse(ErrorCode::Permission, text);
    }
    Ok(Welcome {
        major: MAJOR_VERSION,
        minor: MINOR_VERSION.min(hello.minor),
        name: identity.name.clone(),
        incarnation: identity.incarnation,
        max_message_bytes: identity.limits.max_message_bytes.min(hello.max_message_bytes),
        max_fds: identity.limits.max_fds.min(hello.max_fds),
    })
}

/// The caller's check of what the callee decided.
pub(crate) fn check_welcome(identity: &Identity, welcome: &Welcome) -> Result<(), WireError> {
    let limits = identity.limits;
    let fair = welcome.major == MAJOR_VERSION
        && welcome.minor <= MINOR_VERSION
        && (Limits::MIN_MESSAGE_BYTES..=limits.max_message_bytes).contains(&welcome.max_message_bytes)
        && welcome.max_fds <= limits.max_fds;
    if fair {
        return Ok(());
    }
    Err(WireError::new(
        ErrorCode::Protocol,
        format!(
            "{} offers version {}.{} with {} bytes and {} descriptors, which was not asked for",
            welcome.name, welcome.major, welcome.minor, welcome.max_message_bytes, welcome.max_fds
        ),
    ))
}

#[cfg(test)]
mod tests;
