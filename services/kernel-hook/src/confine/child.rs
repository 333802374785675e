//! What the child does between fork and exec. It allocates nothing and takes no lock: another thread may have held one.

use std::ffi::{CStr, CString};
use std::io;

use super::filter;
use super::landlock::{self, LandlockSupport};
use super::{Confinement, Filter, Report, Step, c_path, mounts, privileges, tell};
use crate::error::HookError;
use crate::socket::SeqPacket;

/// Everything by name and number, as the system calls want it.
#[derive(Debug)]
pub(super) struct Prepared {
    parent: SeqPacket,
    /// `USER USER 1`, for a user namespace.
    user_map: CString,
    group_map: CString,
    folders: Option<mounts::Prepared>,
    network: bool,
    ipc: bool,
    limits: Vec<(libc::__rlimit_resource_t, u64)>,
    account: Option<(u32, u32)>,
    capabilities: Option<u64>,
    files: Option<landlock::Prepared>,
    filter: Option<Filter>,
}

impl Prepared {
    pub(super) fn of(wanted: &Confinement, parent: SeqPacket) -> Result<Self, HookError> {
        let map = |id: u32| CString::new(format!("{id} {id} 1")).unwrap_or_default();
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let files = match &wanted.files {
            None => None,
            Some(rules) => {
                let rules = rules.iter().map(|(path, access)| Ok((c_path(path)?, *access)));
                let rules = rules.collect::<Result<_, HookError>>()?;
                Some(landlock::Prepared {
                    support: LandlockSupport::probe(),
                    rules,
                    tcp: wanted.tcp,
                    ports: wanted.tcp_ports.clone(),
                })
            }
        };
        Ok(Self {
            parent,
            user_map: map(uid),
            group_map: map(gid),
            folders: wanted.folders.as_ref().map(mounts::Prepared::of).transpose()?,
            network: wanted.network,
            ipc: wanted.ipc,
            limits: wanted.limits.iter().map(|(limit, value)| (limit.resource(), *value)).collect(),
            account: wanted.account,
            capabilities: wanted.capabilities.as_ref().map(|kept| kept.iter().fold(0, |all, one| all | one.bit())),
            files,
            filter: wanted.filter.clone(),
        })
    }

    /// See the module head.
    pub(super) fn confine(&self) -> io::Result<()> {
        let mut report = Report::new();
        self.enter_namespaces(&mut report);
        self.limit(&mut report);
        // SAFETY: a call without pointers.
        if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if let Some((uid, gid)) = self.account {
            let changed = privileges::become_user(uid, gid);
            self.must(changed, Step::Account, &mut report)?;
        }
        if let Some(kept) = self.capabilities {
            self.must(privileges::keep_only(kept), Step::Capabilities, &mut report)?;
        }
        if let Some(files) = &self.files {
            files.restrict(&mut report);
        }
        let listener = self.filter.as_ref().and_then(|filter| filter::enforce(filter, &mut report));
        tell(&self.parent, report, listener.as_ref());
        Ok(())
    }

    /// What is offered and fails all the same leaves the child with more than it should have: it ends.
    fn must(&self, done: io::Result<()>, step: Step, report: &mut Report) -> io::Result<()> {
        match done {
            Ok(()) => report.note(step, 0),
            Err(error) => {
                report.note(step, errno(&error));
                tell(&self.parent, *report, None);
                return Err(error);
            }
        }
        Ok(())
    }

    fn enter_namespaces(&self, report: &mut Report) {
        let wanted = [
            (Step::Folders, libc::CLONE_NEWNS, self.folders.is_some()),
            (Step::Network, libc::CLONE_NEWNET, self.network),
            (Step::Ipc, libc::CLONE_NEWIPC, self.ipc),
        ];
        // Without privilege they are there in a user namespace, in which one may have the others.
        let mut in_user_namespace = false;
        for (step, flag, _) in wanted.into_iter().filter(|(_, _, wanted)| *wanted) {
            let mut done = unshare(flag);
            let refused = done.as_ref().err().is_some_and(|error| error.raw_os_error() == Some(libc::EPERM));
            if refused && !in_user_namespace && self.account.is_none() {
                in_user_namespace = self.enter_user_namespace().is_ok();
                done = unshare(flag);
            }
            if let (Step::Folders, Some(folders), Ok(())) = (step, &self.folders, &done) {
                done = folders.mount();
            }
            report.note(step, done.as_ref().map_or_else(errno, |()| 0));
        }
    }

    fn enter_user_namespace(&self) -> io::Result<()> {
        unshare(libc::CLONE_NEWUSER)?;
        write_file(c"/proc/self/setgroups", c"deny")?;
        write_file(c"/proc/self/uid_map", &self.user_map)?;
        write_file(c"/proc/self/gid_map", &self.group_map)
    }

    fn limit(&self, report: &mut Report) {
        for (resource, value) in &self.limits {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: a local of the calls' own form. A limit is never raised: that would need a privilege.
            let set = unsafe {
                libc::getrlimit(*resource, &mut limit);
                limit.rlim_max = limit.rlim_max.min(*value);
                limit.rlim_cur = limit.rlim_cur.min(limit.rlim_max);
                libc::setrlimit(*resource, &limit)
            };
            report.note(Step::Limits, if set == 0 { 0 } else { errno(&io::Error::last_os_error()) });
        }
    }
}

fn unshare(flag: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is concerned.
    if unsafe { libc::unshare(flag) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn write_file(name: &CStr, text: &CStr) -> io::Result<()> {
    // SAFETY: a name that ends with a zero, and as many bytes as the text has.
    unsafe {
        let fd = libc::open(name.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let written = libc::write(fd, text.as_ptr().cast(), text.count_bytes());
        let error = io::Error::last_os_error();
        libc::close(fd);
        if written < 0 { Err(error) } else { Ok(()) }
    }
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}
