//! Which rule names a client.

use crate::plan::{ClientPlan, Plan};

/// Engines show as many digits of a container's id at least.
pub(crate) const CONTAINER_ID_MIN: usize = 12;

/// Who a client is, by the kernel's word.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Client {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Paths of its control groups, as /proc/PID/cgroup has them; none when that cannot be read.
    pub cgroups: Vec<String>,
}

impl ClientPlan {
    fn names(&self, client: &Client) -> bool {
        let below = |path: &str, of: &str| {
            of == "/" || path.strip_prefix(of).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let in_group = |of: &String| client.cgroups.iter().any(|path| below(path, of));
        let in_container = |id: &String| client.cgroups.iter().any(|path| path.split('/').any(|part| is_of(part, id)));
        self.uid.is_none_or(|uid| uid == client.uid)
            && self.gid.is_none_or(|gid| gid == client.gid)
            && self.cgroup.as_ref().is_none_or(in_group)
            && self.container.as_ref().is_none_or(in_container)
    }

    /// It says something about control groups.
    fn asks_for_groups(&self) -> bool {
        self.cgroup.is_some() || self.container.is_some()
    }
}

/// `docker-ID.scope`, `libpod-ID.scope`, `cri-containerd-ID.scope`, `crio-ID`, or the id alone.
fn is_of(part: &str, id: &str) -> bool {
    let part = part.strip_suffix(".scope").unwrap_or(part);
    part.rsplit(['-', ':']).next().is_some_and(|last| last.starts_with(id))
}

impl Plan {
    /// The rule for a client, by its place in [`Plan::clients`]. `Ok(None)`: there are no rules. `Err`: none names it.
    ///
    /// # Errors
    /// What the client is told.
    pub fn rule_of(&self, client: &Client) -> Result<Option<usize>, String> {
        if self.clients.is_empty() {
            return Ok(None);
        }
        match self.clients.iter().position(|rule| rule.names(client)) {
            Some(rule) => Ok(Some(rule)),
            None => Err(format!(
                "No [[client]] rule of the manifest names this process (user {}, group {}, control group {}): an operator \
                 has to add one",
                client.uid,
                client.gid,
                client.cgroups.first().map_or("unknown", String::as_str),
            )),
        }
    }

    /// Whether the rules want to know control groups.
    pub fn rules_ask_for_groups(&self) -> bool {
        self.clients.iter().any(ClientPlan::asks_for_groups)
    }
}
