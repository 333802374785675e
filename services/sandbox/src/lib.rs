//! What each service may do: one table by kind of service ([`table`]), plus what its device and the manifest add.
//!
//! ```text
//!   Plan + place --Profile::of--> Profile --print--> `uhmm plan --sandbox`
//!                                    `----confinement--> the kernel hook: the child confines itself between fork and exec
//! ```
//! One source for both, so what is shown is what is in force. A system call that is not in the list gets EPERM, and the supervisor's log names it
//! once (`uhmm_kernel_hook::confine::DeniedCalls`); where nobody can listen (a container whose engine listens already) it gets EPERM and the
//! kernel's log has its number.

mod filter;
mod place;
mod print;
pub mod table;

pub use filter::{Call, Only};
pub use place::Place;

use std::net::SocketAddr;
use std::path::PathBuf;

use uhmm_kernel_hook::confine::{Capability, Confinement, FileAccess, Folders, Limit, calls};
use uhmm_manifest::{Kind, Plan, SandboxMode, ServicePlan};
use uhmm_pci::PciPath;

/// Whose list of a driver's it is, by the way to its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Keeps the vault's second copy.
    Holder,
    /// Answers faults.
    Pager,
    /// Fans invalidations out.
    Mirror,
    /// A driver of a device made of software, or of none that the manifest knows.
    Software,
    /// A driver whose memory is a file or a partition.
    File,
    /// A driver whose memory is on block servers.
    Remote,
    /// A driver of a PCI device of this machine.
    Vfio,
    /// A driver of a device in another process.
    VfioUser,
}

impl Role {
    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Holder => "holder",
            Self::Pager => "pager",
            Self::Mirror => "mirror",
            Self::Software => "driver (software)",
            Self::File => "driver (file)",
            Self::Remote => "driver (block server)",
            Self::Vfio => "driver (VFIO)",
            Self::VfioUser => "driver (vfio-user)",
        }
    }

    fn of(plan: &Plan, service: &ServicePlan) -> Self {
        let device = plan.driver_service(&service.name);
        match (service.kind, device.and_then(|device| device.pci.as_ref())) {
            (Kind::Driver, None) if device.is_some_and(|device| device.path.is_some()) => Self::File,
            (Kind::Driver, None) if device.is_some_and(|device| device.remote.is_some()) => Self::Remote,
            (Kind::Pager, _) => Self::Pager,
            (Kind::Mirror, _) => Self::Mirror,
            (Kind::Driver, None) => Self::Software,
            (Kind::Driver, Some(PciPath::Vfio(_))) => Self::Vfio,
            (Kind::Driver, Some(PciPath::VfioUser(_))) => Self::VfioUser,
        }
    }
}

/// Why a sandbox cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The manifest names a call that does not exist.
    #[error(
        "Service {service:?}: sandbox.syscalls has {name:?}, which is no system call of this machine: see `man 2 syscalls`"
    )]
    NoSuchCall {
        /// Service.
        service: String,
        /// As given.
        name: String,
    },
    /// The filter is not one.
    #[error("Service {service:?}: its filter of system calls cannot be made: {problem}")]
    Filter {
        /// Service.
        service: String,
        /// What the compiler said.
        problem: String,
    },
    /// Only root can start a service as somebody else.
    #[error("Service {service:?}: only root starts it as {user}: run `uhmm up` as root, or remove `user`")]
    NotRoot {
        /// Service.
        service: String,
        /// User.
        user: String,
    },
}

/// What a service may do. `None` in [`Profile::rules`]: everything.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Name of the service.
    pub service: String,
    /// Whose list it has.
    pub role: Role,
    /// As the manifest says.
    pub mode: SandboxMode,
    /// Whom it runs as.
    pub account: Option<(u32, u32)>,
    /// Limits, in any mode.
    pub limits: Vec<(Limit, u64)>,
    /// What holds unless the mode is off.
    pub rules: Option<Rules>,
}

/// See [`Profile`].
#[derive(Clone, Debug)]
pub struct Rules {
    /// System calls, sorted.
    pub calls: Vec<Call>,
    /// Of those of the supervisor.
    pub capabilities: Vec<Capability>,
    /// Files.
    pub files: Vec<(PathBuf, FileAccess)>,
    /// What it sees.
    pub folders: Folders,
    /// The network stays.
    pub network: bool,
    /// It stays for TCP to these alone.
    pub servers: Vec<SocketAddr>,
}

impl Profile {
    /// Of a service in a plan.
    ///
    /// # Errors
    /// The manifest asks for something that does not exist, or that this account cannot give.
    pub fn of(plan: &Plan, service: &ServicePlan, place: &Place) -> Result<Self, SandboxError> {
        let role = Role::of(plan, service);
        let wanted = &service.sandbox;
        let own = uhmm_kernel_hook::confine::effective_uid();
        let account = service.account.as_ref().map(|account| (account.uid, account.gid));
        if let Some(account) = service.account.as_ref().filter(|account| own != 0 && account.uid != own) {
            return Err(SandboxError::NotRoot { service: service.name.clone(), user: account.user.clone() });
        }
        let given = [
            (Limit::Descriptors, wanted.nofile),
            (Limit::AddressSpace, wanted.address_space_bytes.map(|bytes| bytes.0)),
            (Limit::Processes, wanted.processes),
        ];
        let mut limits: Vec<(Limit, u64)> =
            given.into_iter().filter_map(|(limit, value)| Some((limit, value?))).collect();
        let mut rules = None;
        if wanted.mode != SandboxMode::Off {
            limits.push((Limit::CoreFile, 0));
            rules = Some(Rules::of(plan, service, role, place)?);
        }
        Ok(Self {
            service: service.name.clone(),
            role,
            mode: wanted.mode,
            account: account.filter(|account| account.0 != own),
            limits,
            rules,
        })
    }

    /// Of the holder, which is in no manifest.
    #[must_use]
    pub fn of_holder(place: &Place) -> Self {
        let rules = Rules {
            calls: table::calls(Role::Holder),
            capabilities: table::capabilities(Role::Holder).to_vec(),
            files: place.files_of_built_in(),
            folders: Folders::default(),
            network: false,
            servers: Vec::new(),
        };
        Self {
            service: "holder".to_owned(),
            role: Role::Holder,
            mode: SandboxMode::On,
            account: None,
            limits: vec![(Limit::CoreFile, 0)],
            rules: Some(rules),
        }
    }

    /// For the kernel hook.
    ///
    /// # Errors
    /// The filter cannot be compiled.
    pub fn confinement(&self) -> Result<Confinement, SandboxError> {
        let limits = self.limits.clone();
        let account = self.account;
        let Some(rules) = &self.rules else { return Ok(Confinement { limits, account, ..Confinement::default() }) };
        let filter = filter::compile(&rules.calls)
            .map_err(|problem| SandboxError::Filter { service: self.service.clone(), problem })?;
        // The holder finds its sockets by the run directory, whose end it must see.
        let has_view = self.role != Role::Holder;
        Ok(Confinement {
            folders: has_view.then(|| rules.folders.clone()),
            network: !rules.network && rules.servers.is_empty(),
            ipc: true,
            limits,
            account,
            capabilities: Some(rules.capabilities.clone()),
            files: Some(rules.files.clone()),
            tcp: rules.network,
            tcp_ports: rules.servers.iter().map(SocketAddr::port).collect(),
            filter: Some(filter),
        })
    }
}

impl Rules {
    fn of(plan: &Plan, service: &ServicePlan, role: Role, place: &Place) -> Result<Self, SandboxError> {
        let wanted = &service.sandbox;
        let mut calls = table::calls(role);
        for name in &wanted.syscalls {
            let unknown = || SandboxError::NoSuchCall { service: service.name.clone(), name: name.clone() };
            calls::number(name).ok_or_else(unknown)?;
            calls.retain(|call| call.name != *name);
            calls.push(Call { name: name.clone(), only: None });
        }
        if wanted.network {
            calls.retain(|call| call.name != "socket");
            calls.extend(table::NETWORK.iter().map(|name| Call { name: (*name).to_owned(), only: None }));
        }
        let servers = place::server_addresses(plan, &service.name);
        if !servers.is_empty() && !wanted.network {
            let sockets = calls.iter_mut().filter(|call| call.only == Some(Only::Unix));
            sockets.for_each(|call| call.only = Some(Only::UnixAndTcp));
        }
        calls.sort();
        calls.dedup();
        Ok(Self {
            calls,
            capabilities: table::capabilities(role).to_vec(),
            files: place.files_of(plan, service, role),
            folders: place.folders_of(plan, service),
            network: wanted.network,
            servers,
        })
    }
}

fn role_is_driver(role: Role) -> bool {
    matches!(role, Role::Software | Role::File | Role::Remote | Role::Vfio | Role::VfioUser)
}

#[cfg(test)]
mod tests;
