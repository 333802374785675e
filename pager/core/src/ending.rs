//! The end of a region: nobody begins anything any more, devices let go, its frames are scrubbed. It costs what the region is large, cut
//! into steps; how large devices are, and how many regions there are, does not matter.
//!
//! ```text
//!   wait until nothing of it moves -> look at its entries, slice by slice: who maps it, which frames -> [Revoke]
//!     -> DropRegion -> give the frames back, slice by slice -> Done
//! ```

use std::collections::BTreeMap;

use crate::core::{Core, KEEPER};
use crate::entry::DEVICE_COUNT_MAX;
use crate::event::{Action, CoreError, DeviceId, Directory, Outcome, Pages, RegionId, ReqId, Ticket};
use crate::frames::Owner;
use crate::policy::Policy;
use crate::request::{Next, Request};
use crate::transfer::{Kind, Transfer};

/// Longest run of frames that is given back at a time.
const RUN_PAGES: u64 = 512;

/// What is known so far of a region on its end.
#[derive(Debug)]
pub(crate) struct Ending {
    /// Who maps any of the pages looked at.
    mask: u16,
    /// Frames that their entries name, and how many runs of them were given back.
    frames: Vec<Named>,
    given_back: usize,
}

/// Consecutive frames of consecutive pages.
#[derive(Clone, Copy, Debug)]
struct Named {
    device: DeviceId,
    frame: u32,
    pages: Pages,
}

pub(crate) type Endings = BTreeMap<RegionId, Ending>;

impl<P: Policy> Core<P> {
    /// Some region is on its end: its frames come back soon.
    pub(crate) fn something_dies(&self) -> bool {
        !self.endings.is_empty()
    }

    /// Begins the end of a region: nothing new, and everybody who waits for it is told.
    pub(crate) fn begin_teardown(&mut self, req: Option<ReqId>, region: RegionId, out: &mut Vec<Action>) {
        self.stop_following(region);
        let known = self.regions.get_mut(&region).filter(|info| !info.dying);
        let Some(info) = known else {
            let error = CoreError::NoSuchRegion { region: region.0 };
            self.reply(req, Outcome::Failed(error), out);
            return;
        };
        info.dying = true;
        let (page_count, waiting) = (info.page_count, info.requests);
        if waiting > 0 {
            let waiting = self.requests.iter().filter(|(_, request)| request.region == region);
            let orders: Vec<u64> = waiting.map(|(order, _)| *order).collect();
            for order in orders {
                self.searches.remove(&order);
                self.half_mapped.remove(&order);
                self.frame_waits.remove(&order);
                if let Some(request) = self.requests.remove(&order) {
                    self.reply(request.id, Outcome::Failed(CoreError::NoSuchRegion { region: region.0 }), out);
                }
            }
        }
        let ops: Vec<_> = self.cpu_ops.iter().filter(|(_, op)| op.region == region).map(|(t, _)| *t).collect();
        for ticket in ops {
            self.cpu_ops.remove(&ticket);
        }
        let order = self.next_request_order();
        self.endings.insert(region, Ending { mask: 0, frames: Vec::new(), given_back: 0 });
        self.queue(order, Request::teardown(req, region, page_count));
    }

    pub(crate) fn step_teardown(&mut self, dir: &impl Directory, request: &mut Request, out: &mut Vec<Action>) -> Next {
        let region = request.region;
        if !self.regions.contains_key(&region) {
            return self.hand_over(region, out);
        }
        if self.regions.get(&region).is_none_or(|info| info.transfers > 0) {
            return Next::Wait;
        }
        let budget = self.budget;
        let Some(ending) = self.endings.get_mut(&region) else { return Next::Reply(Outcome::Done) };
        let left = request.left();
        let mut looked_at = 0;
        for (run, entry) in Self::alike_parts(dir, region, left) {
            ending.mask |= entry.mapped_mask();
            if entry.owns_frame() {
                ending.name(entry.device(), entry.frame(), run.first);
            }
            request.cursor = run.end();
            looked_at += 1;
            if looked_at == budget {
                break;
            }
        }
        if request.left().count > 0 {
            return Next::Again;
        }
        let mask = ending.mask;
        let ticket = self.begin(Transfer { mask, ..Transfer::new(region, request.pages, Kind::Teardown) }, out);
        self.revoke_or(ticket, out, Self::finish_teardown);
        // Nothing had to be revoked: the region was dropped already.
        if self.regions.contains_key(&region) { Next::Wait } else { self.hand_over(region, out) }
    }

    pub(crate) fn finish_teardown(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let region = transfer.region;
        // First nothing names the frames any more, then they are scrubbed: a crash in between must not find zeroed pages.
        out.push(Action::DropRegion { region });
        self.regions.remove(&region);
        self.fork_waits.retain(|wait| wait.child != region && wait.parent != region);
        self.policy.region_gone(region);
        self.no_huge_until_us.remove(&region);
        // Its request looks again, and gives the frames back.
        self.end(ticket);
    }

    /// A part of the frames of a region that was dropped.
    fn hand_over(&mut self, region: RegionId, out: &mut Vec<Action>) -> Next {
        let Some(mut ending) = self.endings.remove(&region) else { return Next::Reply(Outcome::Done) };
        let mut scrubs: [Vec<(u32, u32)>; DEVICE_COUNT_MAX as usize] = Default::default();
        let mut left = self.budget;
        for Named { device, frame, pages } in &ending.frames[ending.given_back..] {
            if left == 0 {
                break;
            }
            if let (Some(table), Some(runs)) = (self.table(*device), scrubs.get_mut(usize::from(device.0))) {
                table.hand_over(*frame, pages.count as u32, Owner { region, page: pages.first }, KEEPER, runs);
            } else if let Some(claimed) = self.rebuilding(*device) {
                claimed.release_claimed(*frame, pages.count as u32, Owner { region, page: pages.first });
            }
            left = left.saturating_sub(pages.count);
            ending.given_back += 1;
        }
        for (device, runs) in (0..DEVICE_COUNT_MAX).map(DeviceId).zip(scrubs) {
            self.start_scrub(device, runs, out);
        }
        if ending.given_back == ending.frames.len() {
            // Who has waited for the frames looks what has come of it, be it nothing.
            self.unblock_all();
            return Next::Reply(Outcome::Done);
        }
        self.endings.insert(region, ending);
        Next::Again
    }
}

impl Ending {
    fn name(&mut self, device: DeviceId, frame: u32, page: u64) {
        match self.frames.last_mut() {
            Some(run)
                if run.device == device
                    && run.pages.end() == page
                    && run.pages.count < RUN_PAGES
                    && u64::from(run.frame) + run.pages.count == u64::from(frame) =>
            {
                run.pages.count += 1;
            }
            _ => self.frames.push(Named { device, frame, pages: Pages::one(page) }),
        }
    }
}
