//! A link to mirror or pager whose preamble restores our session after every reconnect.
//!
//! ```text
//!   down --connect--> preamble: Login, then what we have (spaces, regions)  --all Ok--> up, queued calls go out
//!                        |
//!                        +-- refused: the owner forgets that space or region, and the link is made anew after a pause.
//!                            Until then every answer counts as Stale: the queue was failed with the preamble's error,
//!                            which says nothing about the calls in it.
//! ```

use uhmm_ipc::message::{Call, ErrorCode, Interface, Reply, WireError};
use uhmm_ipc::{Endpoint, LinkId};
use uhmm_kit::Service;

use crate::device::RegionKey;

/// What a preamble call restores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Restores {
    /// The session itself.
    Login,
    /// One space.
    Space(u64),
    /// One region.
    Region(RegionKey),
    /// It has to be asked again, all of it.
    Nothing,
}

/// The other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Upstream {
    Mirror,
    Pager,
}

impl Upstream {
    pub(crate) fn interface(self) -> Interface {
        match self {
            Upstream::Mirror => Interface::Mirror,
            Upstream::Pager => Interface::Pager,
        }
    }

    /// As the service frame resolves it: the only service of this kind in the plan.
    fn kind_name(self) -> &'static str {
        match self {
            Upstream::Mirror => "mirror",
            Upstream::Pager => "pager",
        }
    }
}

/// One link and its session.
#[derive(Debug)]
pub(crate) struct Uplink {
    pub(crate) upstream: Upstream,
    pub(crate) link: LinkId,
    pub(crate) logged_in: bool,
    refused: bool,
}

impl Uplink {
    /// Connects; the preamble is set before the loop polls next, so that no connection goes without it.
    pub(crate) fn open(service: &mut Service, upstream: Upstream, preamble: Vec<Call>) -> Self {
        let link = connect(service, upstream);
        let uplink = Self { upstream, link, logged_in: false, refused: false };
        uplink.set_preamble(service, preamble);
        uplink
    }

    /// What the next connection begins with.
    pub(crate) fn set_preamble(&self, service: &mut Service, preamble: Vec<Call>) {
        service.reactor.set_preamble(self.link, preamble);
    }

    pub(crate) fn down(&mut self) {
        self.logged_in = false;
    }

    /// An answer of the preamble, to a call that restores `item`. Returns what was refused, first refusal of this connection only.
    pub(crate) fn preamble_answered(&mut self, item: Restores, result: &Result<Reply, WireError>) -> Option<Restores> {
        match result {
            Ok(_) => {
                self.logged_in |= item == Restores::Login;
                None
            }
            Err(_) if self.refused => None,
            // Nobody has refused anything: whoever was asked has begun a session of its own anew, and forgot the question.
            Err(error) if error.code == ErrorCode::Stale => {
                self.refused = true;
                Some(Restores::Nothing)
            }
            Err(_) => {
                self.refused = true;
                Some(item)
            }
        }
    }

    /// What an answer really says (see the module head).
    pub(crate) fn judge(&self, result: Result<Reply, WireError>) -> Result<Reply, WireError> {
        match result {
            Err(error) if self.refused => Err(WireError::new(ErrorCode::Stale, error.text)),
            result => result,
        }
    }

    /// Drops the refused connection and makes a new one; its unanswered calls never end by themselves.
    pub(crate) fn reconnect(&mut self, service: &mut Service, preamble: Vec<Call>) {
        service.reactor.drop_link(self.link);
        self.link = connect(service, self.upstream);
        self.refused = false;
        self.down();
        self.set_preamble(service, preamble);
    }
}

fn connect(service: &mut Service, upstream: Upstream) -> LinkId {
    let endpoint = Endpoint {
        path: service.endpoint_path(upstream.kind_name()),
        interface: upstream.interface(),
        key: service.channel_key(upstream.kind_name()),
    };
    service.reactor.link(endpoint)
}
