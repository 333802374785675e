//! `uhmm plan --sandbox`.

use std::fmt::Write;

use uhmm_kernel_hook::confine::{LandlockSupport, Limit};
use uhmm_manifest::SandboxMode;

use crate::{Call, Only, Profile, Rules, role_is_driver};

const WIDTH: usize = 120;

impl Profile {
    /// For people: everything that holds for the service.
    #[must_use]
    pub fn print(&self) -> String {
        let mode = match self.mode {
            SandboxMode::On => "confined as far as this kernel and account offer it",
            SandboxMode::Required => "started only where all of this is in force",
            SandboxMode::Off => "NOT CONFINED: it may do all that its user may",
        };
        let mut text = format!("{} - {}: {mode}\n", self.service, self.role.name());
        if let Some((uid, gid)) = self.account {
            let _ = writeln!(text, "  {:<14}{uid}:{gid}", "user");
        }
        let limits: Vec<String> =
            self.limits.iter().map(|(limit, value)| format!("{} {value}", name_of(*limit))).collect();
        if !limits.is_empty() {
            let _ = writeln!(text, "  {:<14}{}", "limits", limits.join(", "));
        }
        if let Some(rules) = &self.rules {
            rules.print(&mut text, role_is_driver(self.role) && self.account.is_none());
        }
        text
    }
}

fn name_of(limit: Limit) -> &'static str {
    match limit {
        Limit::Descriptors => "descriptors",
        Limit::AddressSpace => "address space bytes",
        Limit::Processes => "processes and threads",
        Limit::CoreFile => "core file bytes",
    }
}

impl Rules {
    fn print(&self, text: &mut String, warn_of_root: bool) {
        let names: Vec<&str> = self.capabilities.iter().map(|capability| capability.name()).collect();
        let kept = if names.is_empty() {
            "none".to_owned()
        } else {
            format!("{}, if the supervisor has them", names.join(" "))
        };
        let _ = writeln!(text, "  {:<14}{kept}; none more by exec (no_new_privs)", "capabilities");
        let servers = self.servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let network = match (self.network, servers.is_empty()) {
            (true, _) => "as the machine's".to_owned(),
            (false, true) => "none: a namespace with nothing in it, Unix sockets alone".to_owned(),
            (false, false) if LandlockSupport::probe().tcp() => {
                format!("the machine's, for TCP to the ports of its block servers alone: {servers}")
            }
            (false, false) => {
                format!("the machine's, for TCP to {servers}; this kernel's Landlock does not limit ports")
            }
        };
        let _ = writeln!(text, "  {:<14}{network}", "network");
        if let Some((view, run_dir)) = &self.folders.view {
            let _ = writeln!(text, "  {:<14}{} shows {}", "folders", run_dir.display(), view.display());
            let covered: Vec<String> = self.folders.covered.iter().map(|path| path.display().to_string()).collect();
            let _ = writeln!(text, "  {:<14}{} hidden", "", covered.join(", "));
        }
        for (path, access) in &self.files {
            let _ = writeln!(text, "  {:<14}{:<8} {}", "file", access.name(), path.display());
        }
        if LandlockSupport::probe().version == 0 {
            let _ = writeln!(text, "  {:<14}NOT in force here: this kernel has no Landlock", "file");
        }
        let _ = writeln!(
            text,
            "  {:<14}others get EPERM, and the supervisor's log names them; clone3 gets ENOSYS",
            "calls"
        );
        wrap(text, self.calls.iter().map(shown));
        if warn_of_root && uhmm_kernel_hook::confine::effective_uid() == 0 {
            let _ = writeln!(text, "  {:<14}threads are not limited while its user is root: give it a `user`", "note");
        }
    }
}

fn shown(call: &Call) -> String {
    let hex = |numbers: &[u32]| numbers.iter().map(|number| format!("{number:#x}")).collect::<Vec<_>>().join(" ");
    match &call.only {
        None => call.name.clone(),
        Some(Only::Unix) => format!("{}(AF_UNIX)", call.name),
        Some(Only::UnixAndTcp) => format!("{}(AF_UNIX, TCP)", call.name),
        Some(Only::Own) => format!("{}(own process)", call.name),
        Some(Only::Threads) => format!("{}(threads)", call.name),
        Some(Only::Options(options) | Only::Second(options)) => format!("{}({})", call.name, hex(options)),
        Some(Only::Ioctls { numbers, families }) => {
            let families = if families.is_empty() { String::new() } else { format!("; families {}", hex(families)) };
            format!("{}({}{families})", call.name, hex(numbers))
        }
    }
}

fn wrap(text: &mut String, words: impl Iterator<Item = String>) {
    let mut line = format!("  {:<13}", "");
    for word in words {
        if line.len() + word.len() + 1 > WIDTH {
            let _ = writeln!(text, "{line}");
            line = format!("  {:<13}", "");
        }
        line = format!("{line} {word}");
    }
    let _ = writeln!(text, "{line}");
}
