//! What services can be confined with here.

use std::path::PathBuf;

use super::{Item, Status};
use crate::confine::{Confinement, Filter, Folders, Instruction, LandlockSupport, Outcome, Step};
use crate::error::HookError;

const ALLOW: u32 = 0x7fff_0000;

/// One item each for namespaces, Landlock and seccomp.
pub(super) fn items() -> Vec<Item> {
    vec![namespaces(), landlock(), seccomp()]
}

fn lost(outcome: &Outcome) -> String {
    let words: Vec<String> = outcome.missing().map(|(step, error)| format!("{} ({error})", step.name())).collect();
    words.join(", ")
}

fn tried(name: &'static str, tried: Result<Outcome, HookError>, so: &'static str, fix: &'static str) -> Item {
    let lost = tried.map_or_else(|error| error.to_string(), |outcome| lost(&outcome));
    if lost.is_empty() { Item::yes(name, "for services") } else { Item::lacking(name, Status::No, lost, so, fix) }
}

fn namespaces() -> Item {
    let folders = Folders { covered: vec![PathBuf::from("/run")], ..Folders::default() };
    let wanted = Confinement { folders: Some(folders), network: true, ipc: true, ..Confinement::default() };
    let so = "a hostile driver can connect to the sockets of other services of its user, and call itself a client";
    let fix = "run `uhmm up` as root, or sysctl user.max_user_namespaces=10000 (and kernel.unprivileged_userns_clone=1, \
               kernel.apparmor_restrict_unprivileged_userns=0 where there are such); in a container: one container a service";
    tried("sandbox: namespaces", wanted.try_out(), so, fix)
}

fn landlock() -> Item {
    let name = "sandbox: Landlock";
    let support = LandlockSupport::probe();
    let detail = format!("version {}", support.version);
    let fix = "a kernel of 6.12 or newer, with landlock among its LSMs (lsm=landlock,... on its command line)";
    match (support.version, support.signals()) {
        (0, _) => {
            let so = "services can open every file of their user: /proc/PID/mem of its other processes, devices, keys";
            Item::lacking(name, Status::No, "this kernel has none", so, fix)
        }
        (_, false) => Item::lacking(name, Status::Partly, detail, "abstract sockets stay within a driver's reach", fix),
        (_, true) => {
            let wanted = Confinement { files: Some(vec![]), ..Confinement::default() };
            let so = "services can open every file of their user";
            match tried(name, wanted.try_out(), so, fix) {
                item if item.status == Status::Yes => Item::yes(name, detail),
                item => item,
            }
        }
    }
}

fn seccomp() -> Item {
    let allow = vec![Instruction { code: 6, number: ALLOW, ..Instruction::default() }];
    let filter = Filter { special: vec![], telling: allow.clone(), silent: allow };
    let wanted = Confinement { filter: Some(filter), ..Confinement::default() };
    let name = "sandbox: seccomp";
    match wanted.try_out() {
        Ok(outcome) if outcome.in_force().any(|step| step == Step::Calls) && outcome.missing().next().is_some() => {
            let so = "calls that are refused are in the kernel's log (audit) by number, and the supervisor's does not name them";
            Item::lacking(name, Status::Partly, lost(&outcome), so, "")
        }
        tried_out => {
            tried(name, tried_out, "services may make every system call", "a kernel with CONFIG_SECCOMP_FILTER")
        }
    }
}
