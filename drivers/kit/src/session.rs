//! What a driver has at mirror and pager, and how it has it again on every new connection (`uplink.rs`): what each begins with, what becomes of
//! a refusal, and a session that is begun anew.

use uhmm_ipc::message::{Call, ErrorCode, Reply, TraceId, WireError, mirror, pager};
use uhmm_ipc::{CallId, LinkId};

use crate::copy_service::CopyService;
use crate::device::{Driver, RegionKey};
use crate::run::{DriverLoop, Due, LOGIN_PAUSE, RELINK_PAUSE, mirror_login};
use crate::uplink::{Restores, Upstream};

impl<D: Driver> DriverLoop<D> {
    /// A new pager has forgotten who mirrors which space; the mirror does not tell it by itself.
    pub(crate) fn open_spaces_again(&mut self) {
        let spaces: Vec<(u64, Vec<u8>)> = self.spaces.iter().map(|(space, token)| (*space, token.clone())).collect();
        for (space, token) in spaces {
            self.open_space(space, token, None, TraceId::default());
        }
    }

    /// A refusal says that something of ours is gone upstream: forget it, and begin the session anew without it.
    pub(crate) fn preamble_answered(&mut self, link: LinkId, call: &Call, result: &Result<Reply, WireError>) {
        let item = self.restored_by(call);
        let uplink = match link {
            link if link == self.mirror.link => &mut self.mirror,
            link if link == self.pager.link => &mut self.pager,
            _ => return,
        };
        let upstream = uplink.upstream;
        let refused = uplink.preamble_answered(item, result);
        if let (Some(item), Err(error)) = (refused, result) {
            tracing::warn!(?upstream, ?item, %error, "Session refused: trying again without it");
            match item {
                Restores::Login | Restores::Nothing => {}
                Restores::Space(space) => self.end_space(space, &error.text, false),
                Restores::Region(key) => self.region_gone(key),
            }
            let pause = if item == Restores::Login { LOGIN_PAUSE } else { RELINK_PAUSE };
            self.after(pause, Due::Relink(upstream));
        }
        self.maybe_ready();
    }

    /// What a call of a preamble restores. Its region may have gone since that preamble was made.
    fn restored_by(&self, call: &Call) -> Restores {
        match call {
            Call::Mirror(mirror::Call::Open { space, .. }) => Restores::Space(*space),
            Call::Mirror(mirror::Call::Lookup { space, addr }) => {
                let mut regions = self.regions.iter();
                let found = regions.find(|(key, region)| key.space == *space && region.map.addr == *addr);
                found.map_or(Restores::Nothing, |(key, _)| Restores::Region(*key))
            }
            Call::Pager(pager::Call::AttachTable { space, region, .. }) => {
                Restores::Region(RegionKey { space: *space, region: *region })
            }
            _ => Restores::Login,
        }
    }

    pub(crate) fn relink(&mut self, upstream: Upstream) {
        let (mirror, pager) = self.preambles();
        match upstream {
            Upstream::Mirror => self.mirror.reconnect(&mut self.service, mirror),
            Upstream::Pager => self.pager.reconnect(&mut self.service, pager),
        }
        // Calls of a dropped link never end by themselves.
        let lost: Vec<CallId> =
            self.asked.iter().filter(|(_, (to, _))| *to == upstream).map(|(call, _)| *call).collect();
        for call in lost {
            let text = "The session was begun anew";
            self.answered(call, Err(WireError::new(ErrorCode::Stale, text)));
        }
    }

    /// What a new connection to mirror and to pager begins with, as of now.
    fn preambles(&self) -> (Vec<Call>, Vec<Call>) {
        let mut mirror = vec![mirror_login(self.shown.device)];
        for (space, token) in &self.spaces {
            let open = mirror::Call::Open { space: *space, token: token.clone() };
            mirror.push(Call::Mirror(open));
        }
        let mut pager = vec![self.shown.login(self.copy.as_ref().map(CopyService::ring))];
        for (key, region) in &self.regions {
            // A mirror that was restarted knows no intervals: it learns them from lookups.
            let lookup = mirror::Call::Lookup { space: key.space, addr: region.map.addr };
            mirror.push(Call::Mirror(lookup));
            if let Some(table) = &region.table {
                let attach = pager::Call::AttachTable { space: key.space, region: key.region, table: table.clone() };
                pager.push(Call::Pager(attach));
            }
        }
        (mirror, pager)
    }

    pub(crate) fn refresh_preambles(&mut self) {
        let (mirror, pager) = self.preambles();
        self.mirror.set_preamble(&mut self.service, mirror);
        self.pager.set_preamble(&mut self.service, pager);
    }
}
