//! The service's side of the vault: descriptors that the supervisor keeps, so that they outlive this process.
//!
//! Every entry is remembered here as well: when the supervisor itself dies, the next one gets them back from us.

use std::collections::BTreeMap;
use std::ops::Bound;

use uhmm_ipc::message::{Call, Fd, Reply, TraceId, supervisor};
use uhmm_ipc::{CallId, LinkId, Reactor, Wake};

use crate::KitError;

/// See the module head.
#[derive(Debug)]
pub struct Vault {
    supervisor: LinkId,
    entries: BTreeMap<String, Fd>,
}

impl Vault {
    pub(crate) fn new(supervisor: LinkId) -> Self {
        Self { supervisor, entries: BTreeMap::new() }
    }

    pub(crate) fn remember(&mut self, name: &str, fd: Fd) {
        self.entries.insert(name.to_owned(), fd);
    }

    /// Everything that an earlier incarnation left.
    pub(crate) fn load(&mut self, reactor: &mut Reactor) -> Result<(), KitError> {
        let mut after = String::new();
        loop {
            let get = supervisor::Call::VaultGet { prefix: String::new(), after: after.clone() };
            let call = reactor.call(self.supervisor, Call::Supervisor(get), TraceId::default(), None);
            let (entries, more) = answer(reactor, call)?;
            after = entries.last().map(|(name, _)| name.clone()).unwrap_or_default();
            self.entries.extend(entries);
            if !more {
                return Ok(());
            }
        }
    }

    /// Keeps a descriptor under a name. The call's `Wake::Done` on the supervisor link says that it is kept: rely on it
    /// only then.
    pub fn put(&mut self, reactor: &mut Reactor, name: &str, fd: Fd) -> CallId {
        self.entries.insert(name.to_owned(), fd.clone());
        let put = supervisor::Call::VaultPut { name: name.to_owned(), fd };
        reactor.call(self.supervisor, Call::Supervisor(put), TraceId::default(), None)
    }

    /// Forgets every name that starts with `prefix`. The call's `Wake::Done` on the supervisor link says that it is forgotten; of a
    /// service that ends before that, nothing is.
    pub fn remove(&mut self, reactor: &mut Reactor, prefix: &str) -> CallId {
        let below = self.entries.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        let below = below.map(|(name, _)| name).take_while(|name| name.starts_with(prefix));
        for name in below.cloned().collect::<Vec<_>>() {
            self.entries.remove(&name);
        }
        let remove = supervisor::Call::VaultRemove { prefix: prefix.to_owned() };
        reactor.call(self.supervisor, Call::Supervisor(remove), TraceId::default(), None)
    }

    /// What is kept below a prefix, by name. The entries stay kept.
    pub fn take(&self, prefix: &str) -> Vec<(String, Fd)> {
        let below = self.entries.iter().filter(|(name, _)| name.starts_with(prefix));
        below.map(|(name, fd)| (name.clone(), fd.clone())).collect()
    }

    pub(crate) fn put_all(&mut self, reactor: &mut Reactor) {
        for (name, fd) in &self.entries {
            let put = supervisor::Call::VaultPut { name: name.clone(), fd: fd.clone() };
            reactor.call(self.supervisor, Call::Supervisor(put), TraceId::default(), None);
        }
    }
}

type Page = (Vec<(String, Fd)>, bool);

fn answer(reactor: &mut Reactor, asked: CallId) -> Result<Page, KitError> {
    let mut wakes = Vec::new();
    loop {
        reactor.poll(None, &mut wakes)?;
        for wake in wakes.drain(..) {
            let Wake::Done { call, result, .. } = wake else { continue };
            if call != asked {
                continue;
            }
            return match result {
                Ok(Reply::Supervisor(supervisor::Reply::Vault { entries, more })) => Ok((entries, more)),
                Ok(_) => Err(KitError::StrangeReply { question: "VaultGet" }),
                Err(error) => Err(KitError::Refused { error }),
            };
        }
    }
}
