//! The processes that keep this pager's descriptors while the vault has not all of them (`uhmm_kernel_hook::fd_keeper`): two, and a dead one
//! is replaced. They are named by the pager's incarnation, and those of dead pagers stay in the vault until their children are there: a
//! pager may die while it asks.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use uhmm_ipc::FdToken;
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::fd_keeper::FdKeeper;
use uhmm_kit::Service;

use crate::service::KIND_KEEPER;

const PREFIX: &str = "keeper/";
const COUNT: usize = 2;

/// See the module head.
#[derive(Debug)]
pub(crate) struct Keepers {
    own: [Option<FdKeeper>; COUNT],
    /// Of dead pagers, by incarnation.
    old: BTreeMap<u32, Vec<Fd>>,
}

impl Keepers {
    /// Finds the dead pagers', and starts this one's.
    pub(crate) fn start(service: &mut Service) -> Self {
        let mut old: BTreeMap<u32, Vec<Fd>> = BTreeMap::new();
        for (name, fd) in service.vault.take(PREFIX) {
            let incarnation = name[PREFIX.len()..].split('/').next().and_then(|word| word.parse().ok());
            old.entry(incarnation.unwrap_or(0)).or_default().push(fd);
        }
        let mut keepers = Self { own: Default::default(), old };
        (0..COUNT).for_each(|which| keepers.spawn(service, which));
        keepers
    }

    fn spawn(&mut self, service: &mut Service, which: usize) {
        let spawned = FdKeeper::spawn().map_err(|error| error.to_string());
        let watched = spawned.and_then(|(keeper, far)| {
            let token = FdToken(KIND_KEEPER | which as u64);
            service.reactor.add_fd(keeper.pidfd(), token).map_err(|error| error.to_string())?;
            Ok((keeper, far))
        });
        match watched {
            Ok((keeper, far)) => {
                let name = format!("{PREFIX}{}/{which}", service.incarnation);
                service.vault.put(&mut service.reactor, &name, Arc::new(far));
                self.own[which] = Some(keeper);
            }
            Err(error) => {
                tracing::warn!(
                    error,
                    "Without a keeper of descriptors: a fork that is read just before the pager is killed loses device pages"
                );
            }
        }
    }

    /// Somebody has killed one.
    pub(crate) fn ended(&mut self, service: &mut Service, which: usize) {
        let Some(keeper) = self.own.get_mut(which).and_then(Option::take) else { return };
        if let Err(error) = service.reactor.remove_fd(keeper.pidfd()) {
            tracing::debug!(%error, "A keeper was not watched");
        }
        drop(keeper);
        self.spawn(service, which);
    }

    /// Descriptors of dead pagers: (incarnation, number there). Their keepers live on until they are [forgotten](Self::forget_old).
    pub(crate) fn take(&mut self, wanted: &[(u32, i32)]) -> BTreeMap<(u32, i32), std::os::fd::OwnedFd> {
        let mut found = BTreeMap::new();
        for (incarnation, keepers) in &std::mem::take(&mut self.old) {
            for keeper in keepers {
                let left = wanted.iter().filter(|fd| fd.0 == *incarnation && !found.contains_key(*fd));
                let left: Vec<(u32, i32)> = left.copied().collect();
                let numbers: Vec<i32> = left.iter().map(|(_, number)| *number).collect();
                match FdKeeper::take(keeper.as_fd(), &numbers) {
                    Ok(fds) => found.extend(left.into_iter().zip(fds).filter_map(|(key, fd)| Some((key, fd?)))),
                    Err(error) => tracing::warn!(%error, "A dead pager's descriptors cannot be asked for"),
                }
            }
        }
        found
    }

    /// Whatever was taken is in the vault, or on its way there.
    pub(crate) fn forget_old(service: &mut Service) {
        let own = format!("{PREFIX}{}/", service.incarnation);
        let old = service.vault.take(PREFIX).into_iter().map(|(name, _)| name).filter(|name| !name.starts_with(&own));
        for name in old.collect::<Vec<_>>() {
            service.vault.remove(&mut service.reactor, &name);
        }
    }
}
