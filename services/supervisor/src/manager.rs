//! The supervisor under a service manager (systemd, `Type=notify`): it says when it is ready and how its services are, gives signs of life
//! from its own loop, and has the vault kept ([`crate::store`]). Nothing here waits: what the manager has no room for goes later, in order.
//!
//! ```text
//!   READY=1        pager and mirror serve: clients can be served, whatever becomes of a device
//!   STATUS=        how many services are ready, and which are not
//!   WATCHDOG=1     twice in the time that the manager allows (WATCHDOG_USEC)
//!   STOPPING=1     told to end
//! ```

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use uhmm_ipc::TimerToken;
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::manager::{NotifySocket, VARIABLES, store_limit, watchdog};
use uhmm_kernel_hook::{HookError, SendStatus, memfd};
use uhmm_manifest::Kind;

use crate::core::State;
use crate::keeping::text_file;
use crate::service::Supervisor;
use crate::store::{Order, STATE, Store, What, is_whole};
use crate::vault::{Vault, split};

pub(crate) const TIMER_WATCHDOG: TimerToken = TimerToken(4);
pub(crate) const TIMER_RETRY: TimerToken = TimerToken(5);
/// Between two attempts to send what the manager had no room for.
const RETRY: Duration = Duration::from_millis(20);
/// What waits; a manager that takes nothing for so long gets no descriptors any more.
const WAITING_MAX: usize = 1 << 16;

/// See the module head.
#[derive(Default)]
pub(crate) struct Manager {
    socket: Option<NotifySocket>,
    period: Option<Duration>,
    waiting: VecDeque<(String, Option<Fd>)>,
    retrying: bool,
    store: Store,
    left: Option<(Vault, Option<Fd>)>,
    state: String,
    state_sent: bool,
    full_said: bool,
    ready: bool,
    status: String,
}

impl Manager {
    /// `inherited`: what the store has handed over.
    pub(crate) fn find(inherited: Vec<(String, OwnedFd)>) -> Self {
        let socket = NotifySocket::from_env().unwrap_or_else(|error| {
            tracing::warn!(%error, "The service manager cannot be told anything");
            None
        });
        let limit = if socket.is_some() { store_limit() } else { 0 };
        let store = Store::new(limit, inherited.iter().map(|(name, _)| name.clone()));
        let period = watchdog().map(|longest| longest / 2);
        Self { socket, period, store, left: left(inherited), ..Self::default() }
    }

    /// What an earlier supervisor has had kept, if it is whole: the vault and the saved state.
    pub(crate) fn take_left(&mut self) -> Option<(Vault, Option<Fd>)> {
        self.left.take()
    }

    pub(crate) fn keep_state(&mut self, text: String) {
        self.state_sent = self.state_sent && text == self.state;
        self.state = text;
    }

    pub(crate) fn stopping(&mut self) {
        self.say("STOPPING=1\nSTATUS=Stopping".to_owned());
    }

    fn say(&mut self, text: String) {
        self.send(text, None);
    }

    fn send(&mut self, text: String, fd: Option<Fd>) {
        if self.socket.is_some() && self.waiting.len() < WAITING_MAX {
            self.waiting.push_back((text, fd));
            self.flush();
        }
    }

    /// Sends what there is room for.
    fn flush(&mut self) {
        let Some(socket) = &self.socket else { return };
        while let Some((text, fd)) = self.waiting.front() {
            match socket.send(text, fd.as_ref().map(|fd| fd.as_fd())) {
                Ok(SendStatus::Sent) => {}
                Ok(SendStatus::WouldBlock) => return,
                Ok(SendStatus::PeerGone) => {
                    tracing::warn!("The service manager does not listen any more: it is told nothing from now on");
                    self.waiting.clear();
                    self.socket = None;
                    return;
                }
                Err(error) => tracing::error!(%error, "The service manager was not told something"),
            }
            self.waiting.pop_front();
        }
    }

    fn obey(&mut self, orders: Vec<Order>) {
        for order in orders {
            let sent = match order {
                Order::Forget(name) => Ok((format!("FDSTOREREMOVE=1\nFDNAME={name}"), None)),
                Order::Keep(name, what) => {
                    file_of(what).map(|fd| (format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), Some(fd)))
                }
            };
            match sent {
                Ok((text, fd)) => self.send(text, fd),
                Err(error) => tracing::error!(%error, "The service manager cannot be given a descriptor"),
            }
        }
        if self.store.is_full() && !self.full_said {
            tracing::error!(
                "The service manager's descriptor store is full: raise FileDescriptorStoreMax= (and FDSTORE=) of the unit; until then it is of no use when all processes die at once"
            );
        }
        self.full_said = self.store.is_full();
    }
}

impl<F: FnOnce()> Supervisor<F> {
    /// The vault is what it shall be: from now on the store follows it.
    pub(crate) fn begin_store(&mut self) {
        // Whatever is not wanted by now nobody wants any more.
        self.manager.left = None;
        if self.manager.socket.is_none() {
            return;
        }
        if !self.manager.store.is_absent() {
            let mut orders = Vec::new();
            self.vault.tell_changes();
            self.manager.store.begin(&mut orders);
            self.manager.obey(orders);
        }
        self.sign_of_life();
    }

    /// The loop runs.
    pub(crate) fn sign_of_life(&mut self) {
        if let Some(period) = self.manager.period {
            self.manager.say("WATCHDOG=1".to_owned());
            self.reactor.add_timer(period, TIMER_WATCHDOG);
        }
    }

    /// There may be room now.
    pub(crate) fn tell_rest(&mut self) {
        self.manager.retrying = false;
        self.manager.flush();
        self.retry_later();
    }

    fn retry_later(&mut self) {
        if !self.manager.waiting.is_empty() && !std::mem::replace(&mut self.manager.retrying, true) {
            self.reactor.add_timer(RETRY, TIMER_RETRY);
        }
    }

    /// After anything may have changed.
    pub(crate) fn tell_manager(&mut self) {
        if self.manager.socket.is_none() {
            return;
        }
        if !self.manager.store.is_absent() {
            let changed = self.vault.take_changed();
            let new_state = !self.manager.state_sent || self.manager.store.is_full();
            if !changed.is_empty() || new_state {
                let state = new_state.then(|| self.manager.state.clone());
                let mut orders = Vec::new();
                self.manager.store.follow(&self.vault, &changed, state, &mut orders);
                self.manager.state_sent = true;
                self.manager.obey(orders);
            }
        }
        self.tell_status();
        self.retry_later();
    }

    fn tell_status(&mut self) {
        let (services, plans) = (self.core.services(), &self.plan.services);
        let is_ready = |state: State| matches!(state, State::Ready { .. });
        let core = services.iter().zip(plans).filter(|(_, plan)| plan.kind != Kind::Driver);
        let serving = core.clone().all(|(service, _)| is_ready(service.state));
        let missing: Vec<&str> =
            services.iter().filter(|service| !is_ready(service.state)).map(|service| service.name.as_str()).collect();
        let mut status = format!("{} of {} services are ready", services.len() - missing.len(), services.len());
        if !missing.is_empty() {
            status += &format!("; not {}", missing.join(", "));
        }
        if serving && !self.manager.ready {
            self.manager.ready = true;
            self.manager.say(format!("READY=1\nSTATUS={status}"));
            self.manager.status = status;
        } else if status != self.manager.status && !self.core.is_stopping() {
            self.manager.say(format!("STATUS={status}"));
            self.manager.status = status;
        }
    }
}

/// What is for the supervisor alone.
pub(crate) fn not_for_children(command: &mut Command) {
    for name in VARIABLES {
        command.env_remove(name);
    }
}

fn file_of(what: What) -> Result<Fd, HookError> {
    match what {
        What::Entry(fd) => Ok(memfd::reopened(fd.as_fd()).map_or(fd, Arc::new)),
        What::Mark => text_file("uhmm-mark", "-"),
        What::State(text) => text_file("uhmm-state", &text),
    }
}

fn left(inherited: Vec<(String, OwnedFd)>) -> Option<(Vault, Option<Fd>)> {
    if inherited.is_empty() {
        return None;
    }
    if !is_whole(inherited.iter().map(|(name, _)| name.as_str())) {
        tracing::error!("What the service manager has kept is not whole, and of no use");
        return None;
    }
    let (mut vault, mut state) = (Vault::default(), None);
    for (name, fd) in inherited {
        let fd = Arc::new(fd);
        match split(&name) {
            _ if name == STATE => state = Some(fd),
            Some((owner, name)) => {
                if let Err(text) = vault.put(owner, name.to_owned(), fd) {
                    tracing::error!(text, owner, "An entry of the descriptor store is not taken over");
                }
            }
            None => tracing::warn!(name, "The service manager has handed over something unknown"),
        }
    }
    Some((vault, state))
}
