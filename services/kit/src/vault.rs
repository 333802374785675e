//! The service's side of the vault: descriptors that two processes keep, supervisor and holder, so that they outlive this one and any one
//! of those two.
//!
//! ```text
//!   put, remove:   service --> supervisor     the same, in the same order, to both; the owner's `Done` comes when both have answered
//!                     \-----> holder          (or the holder is dead)
//!   hand over:     every entry, then WHOLE_NAME: what the keeper had of this service is replaced by it in one step
//!   load:          supervisor whole? its entries; else the holder's; neither (three deaths): what there is
//! ```
//! A keeper is whole for a service as long as it has all that the service ever gave: from a hand-over on, until it dies itself. Whoever comes
//! anew (a keeper, or a service that has loaded) is handed over to before anything else happens. What a dead service has sent is read to its
//! end before anybody answers its successor, so what was sent is kept, also when sender and one keeper die together.
//!
//! Every entry is remembered here as well: a new keeper gets them back from us.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::time::{Duration, Instant};

use uhmm_ipc::message::{Call, Fd, Reply, TraceId, WireError, supervisor};
use uhmm_ipc::{CallId, LinkId, Reactor, Wake};

use crate::KitError;

/// Vault name of the mark behind everything else that is handed over.
pub const WHOLE_NAME: &str = "kit/whole";
/// How long a service that starts waits for a holder that is being started too.
const HOLDER_PATIENCE: Duration = Duration::from_secs(2);

/// See the module head.
#[derive(Debug)]
pub struct Vault {
    supervisor: LinkId,
    holder: LinkId,
    holder_up: bool,
    /// What there was is here: it can be handed over.
    loaded: bool,
    entries: BTreeMap<String, Fd>,
    /// What the mark is: any descriptor.
    mark: Fd,
    /// Calls to the holder, and the same to the supervisor.
    twins: HashMap<CallId, CallId>,
    /// Calls to the supervisor that the holder has not answered, with the supervisor's answer.
    half_kept: HashMap<CallId, Option<Result<Reply, WireError>>>,
    /// The last call of a hand-over to the holder.
    handing_over: Option<CallId>,
}

impl Vault {
    pub(crate) fn new(supervisor: LinkId, holder: LinkId, mark: Fd) -> Self {
        Self {
            supervisor,
            holder,
            holder_up: false,
            loaded: false,
            entries: BTreeMap::new(),
            mark,
            twins: HashMap::new(),
            half_kept: HashMap::new(),
            handing_over: None,
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<Fd> {
        self.entries.get(name).cloned()
    }

    pub(crate) fn remember(&mut self, name: &str, fd: Fd) {
        self.entries.insert(name.to_owned(), fd);
    }

    /// Everything that an earlier incarnation left; then both keepers have it. `early` gets what came meanwhile and is not about that.
    /// `holder_expected`: waits for a holder that does not answer yet.
    pub(crate) fn load(
        &mut self,
        reactor: &mut Reactor,
        holder_expected: bool,
        early: &mut Vec<Wake>,
    ) -> Result<(), KitError> {
        let until = Instant::now() + HOLDER_PATIENCE;
        let left = || if holder_expected { until.saturating_duration_since(Instant::now()) } else { Duration::ZERO };
        let mut entries = self.load_from(self.supervisor, reactor, None, early)?.unwrap_or_default();
        let whole = entries.remove(WHOLE_NAME).is_some();
        if !whole {
            let kept = self.load_from(self.holder, reactor, Some(left()), early)?;
            if let Some(mut kept) = kept {
                if kept.remove(WHOLE_NAME).is_some() {
                    entries = kept;
                } else {
                    tracing::warn!(
                        "Neither supervisor nor holder has all that this service has kept: going on with what there is"
                    );
                    kept.append(&mut entries);
                    entries = kept;
                }
            }
        }
        for (name, fd) in entries {
            self.entries.entry(name).or_insert(fd);
        }
        self.loaded = true;
        if !whole {
            self.put_all(self.supervisor, reactor);
        }
        self.hand_over(reactor);
        while !self.holder_up || self.handing_over.is_some() {
            let left = left();
            if left.is_zero() {
                break;
            }
            let mut wakes = Vec::new();
            reactor.poll(Some(left), &mut wakes)?;
            for wake in wakes {
                if !self.is_about_holder(reactor, &wake) {
                    early.push(wake);
                }
            }
        }
        Ok(())
    }

    /// `None`: not answered in time.
    fn load_from(
        &mut self,
        keeper: LinkId,
        reactor: &mut Reactor,
        patience: Option<Duration>,
        early: &mut Vec<Wake>,
    ) -> Result<Option<BTreeMap<String, Fd>>, KitError> {
        let until = patience.map(|patience| Instant::now() + patience);
        let mut found = BTreeMap::new();
        let mut after = String::new();
        loop {
            let get = supervisor::Call::VaultGet { prefix: String::new(), after: after.clone() };
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            let call = reactor.call(keeper, Call::Supervisor(get), TraceId::default(), left);
            let (entries, more) = match self.answer(reactor, call, early)? {
                Ok(Reply::Supervisor(supervisor::Reply::Vault { entries, more })) => (entries, more),
                Ok(_) => return Err(KitError::StrangeReply { question: "VaultGet" }),
                Err(_) if until.is_some() => return Ok(None),
                Err(error) => return Err(KitError::Refused { error }),
            };
            after = entries.last().map(|(name, _)| name.clone()).unwrap_or_default();
            found.extend(entries);
            if !more {
                return Ok(Some(found));
            }
        }
    }

    fn answer(
        &mut self,
        reactor: &mut Reactor,
        asked: CallId,
        early: &mut Vec<Wake>,
    ) -> Result<Result<Reply, WireError>, KitError> {
        let (mut wakes, mut answer) = (Vec::new(), None);
        loop {
            reactor.poll(None, &mut wakes)?;
            for wake in wakes.drain(..) {
                match wake {
                    Wake::Done { call, result, .. } if call == asked => answer = Some(result),
                    wake if self.is_about_holder(reactor, &wake) => {}
                    wake => early.push(wake),
                }
            }
            if let Some(answer) = answer {
                return Ok(answer);
            }
        }
    }

    /// Keeps a descriptor under a name. The call's `Wake::Done` on the supervisor link says that it is kept: rely on it
    /// only then.
    pub fn put(&mut self, reactor: &mut Reactor, name: &str, fd: Fd) -> CallId {
        self.entries.insert(name.to_owned(), fd.clone());
        self.tell_both(reactor, &supervisor::Call::VaultPut { name: name.to_owned(), fd })
    }

    /// Forgets every name that starts with `prefix`. The call's `Wake::Done` on the supervisor link says that it is forgotten; of a
    /// service that ends before that, nothing is.
    pub fn remove(&mut self, reactor: &mut Reactor, prefix: &str) -> CallId {
        let below = self.entries.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        let below = below.map(|(name, _)| name).take_while(|name| name.starts_with(prefix));
        for name in below.cloned().collect::<Vec<_>>() {
            self.entries.remove(&name);
        }
        self.tell_both(reactor, &supervisor::Call::VaultRemove { prefix: prefix.to_owned() })
    }

    fn tell_both(&mut self, reactor: &mut Reactor, what: &supervisor::Call) -> CallId {
        let call = reactor.call(self.supervisor, Call::Supervisor(what.clone()), TraceId::default(), None);
        // One that is not there gets everything when it comes.
        if self.holder_up {
            let twin = reactor.call(self.holder, Call::Supervisor(what.clone()), TraceId::default(), None);
            self.twins.insert(twin, call);
            self.half_kept.insert(call, None);
        }
        call
    }

    /// What is kept below a prefix, by name. The entries stay kept.
    pub fn take(&self, prefix: &str) -> Vec<(String, Fd)> {
        let below = self.entries.iter().filter(|(name, _)| name.starts_with(prefix));
        below.map(|(name, fd)| (name.clone(), fd.clone())).collect()
    }

    /// A new supervisor has registered this service.
    pub(crate) fn hand_back(&mut self, reactor: &mut Reactor) {
        self.put_all(self.supervisor, reactor);
    }

    fn hand_over(&mut self, reactor: &mut Reactor) {
        if self.holder_up && self.loaded {
            self.handing_over = Some(self.put_all(self.holder, reactor));
        }
    }

    fn put_all(&self, keeper: LinkId, reactor: &mut Reactor) -> CallId {
        for (name, fd) in &self.entries {
            let put = supervisor::Call::VaultPut { name: name.clone(), fd: fd.clone() };
            reactor.call(keeper, Call::Supervisor(put), TraceId::default(), None);
        }
        let mark = supervisor::Call::VaultPut { name: WHOLE_NAME.to_owned(), fd: self.mark.clone() };
        reactor.call(keeper, Call::Supervisor(mark), TraceId::default(), None)
    }

    /// The vault's share of a wake-up: `true` when the owner shall not see it.
    pub(crate) fn is_about_holder(&mut self, reactor: &mut Reactor, wake: &Wake) -> bool {
        match wake {
            Wake::LinkUp { link, .. } if *link == self.holder => {
                self.holder_up = true;
                self.hand_over(reactor);
                true
            }
            Wake::LinkDown { link } if *link == self.holder => {
                tracing::info!("The holder is gone: the supervisor keeps what there is until the next one has it");
                self.holder_up = false;
                self.twins.clear();
                for (call, answer) in std::mem::take(&mut self.half_kept) {
                    self.kept(reactor, call, answer);
                }
                true
            }
            Wake::Done { link, call, .. } if *link == self.holder => {
                if self.handing_over == Some(*call) {
                    self.handing_over = None;
                }
                if let Some(call) = self.twins.remove(call)
                    && let Some(answer) = self.half_kept.remove(&call)
                {
                    self.kept(reactor, call, answer);
                }
                true
            }
            Wake::Done { call, result, .. } => match self.half_kept.get_mut(call) {
                Some(answer) => {
                    *answer = Some(result.clone());
                    true
                }
                None => false,
            },
            Wake::Preamble { link, result, .. } if *link == self.holder => {
                if let Err(error) = result {
                    tracing::warn!(%error, "The holder refused this service: the supervisor alone keeps its descriptors");
                }
                true
            }
            _ => false,
        }
    }

    /// The holder keeps it, or never will. When the supervisor has said so too, the owner hears it.
    fn kept(&self, reactor: &mut Reactor, call: CallId, answer: Option<Result<Reply, WireError>>) {
        if let Some(result) = answer {
            reactor.put_back(Wake::Done { link: self.supervisor, call, result });
        }
    }
}
