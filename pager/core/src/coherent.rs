//! Coherent device memory: the program reaches frames itself, where they are.
//!
//! The program's mapping of a frame is one more mapping of the page, beside those of devices: [`CPU`] in the entry's mask. It is
//! published with the entry, before anybody is asked to map anything, and only a revocation takes it away. So it says *may be mapped*,
//! and every path that takes a frame away waits for it as it waits for devices.
//!
//! ```text
//!   arrived on a coherent device --publish Device + cpu--> MapCpu -- done ----> wake
//!                                                            \---- failed --> Revoke{CPU} -> Device: a CPU access brings it home
//!   CPU fault on Device + cpu:   MapCpu under way: parked      not (lost in a crash): MapCpu again
//! ```
//! Only for shared backing: the memfd's mapping and the frame's can stand for each other at an address, and the SDK owns the address.

use crate::core::Core;
use crate::entry::{CPU, Entry, PoisonReason};
use crate::event::{Action, Backing, DeviceId, Directory, Pages, RegionId, StepResult, Ticket};
use crate::policy::Policy;
use crate::transfer::{Kind, Transfer};

/// A `MapCpu` that is not answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuMap {
    region: RegionId,
    pages: Pages,
}

impl<P: Policy> Core<P> {
    pub(crate) fn note_coherent(&mut self, device: DeviceId, coherent: bool) {
        let bit = 1u8.checked_shl(u32::from(device.0)).unwrap_or(0);
        self.coherent_mask = if coherent { self.coherent_mask | bit } else { self.coherent_mask & !bit };
    }

    /// The entry of a page that has just arrived in a frame.
    pub(crate) fn arrived_entry(&self, region: RegionId, device: DeviceId, frame: u32) -> Entry {
        let shown = self.coherent_mask & (1 << device.0) != 0 && self.backing(region) == Some(Backing::Shared);
        Entry::on_device(device, frame).with_mapped_mask(if shown { CPU } else { 0 })
    }

    /// Has consecutive frames mapped by the program, if the first one's entry says so.
    pub(crate) fn show_frames(&mut self, region: RegionId, pages: Pages, first: Entry, out: &mut Vec<Action>) {
        if first.cpu_mapped() && pages.count > 0 {
            let ticket = self.ticket();
            self.cpu_maps.insert(ticket, CpuMap { region, pages });
            out.push(Action::MapCpu { ticket, region, pages, device: first.device(), frame: first.frame() });
        }
    }

    /// A CPU fault on a frame that the program should have: at the first of `rest`.
    pub(crate) fn missed_a_frame(
        &mut self,
        dir: &impl Directory,
        rest: Pages,
        region: RegionId,
        out: &mut Vec<Action>,
    ) {
        self.stats.parked += 1;
        let under_way = |map: &CpuMap| map.region == region && map.pages.contains(rest.first);
        if self.cpu_maps.values().any(under_way) {
            return;
        }
        let (run, first, _) = self.frame_run(dir, region, rest);
        let run = Self::run_while(dir, region, run, |_, entry| entry.cpu_mapped());
        self.show_frames(region, run, first, out);
    }

    /// The answer to a `MapCpu`.
    pub(crate) fn frames_shown(
        &mut self,
        dir: &impl Directory,
        ticket: Ticket,
        result: StepResult,
        out: &mut Vec<Action>,
    ) {
        let Some(CpuMap { region, pages }) = self.cpu_maps.remove(&ticket) else { return };
        if self.is_dying(region) {
            return;
        }
        if result == StepResult::Ok {
            self.stats.cpu_mapped += pages.count;
            out.push(Action::Wake { region, pages });
            return;
        }
        // Some may be mapped. What is on the move by now is revoked by whoever moves it.
        let mut left = pages;
        while left.count > 0 {
            let shown = |page: u64, entry: Entry| entry.cpu_mapped() && !self.busy(region, page, entry);
            let first = shown(left.first, Self::entry(dir, region, left.first));
            let run = Self::run_while(dir, region, left, |at, entry| shown(left.first + at, entry) == first);
            if first {
                self.hide_frames(region, run, out);
            }
            left = left.after(run.count);
        }
    }

    /// The program loses its mappings of frames that stay where they are.
    fn hide_frames(&mut self, region: RegionId, pages: Pages, out: &mut Vec<Action>) {
        let ticket =
            self.begin(Transfer { mask: CPU, ..Transfer::new(region, pages, Kind::Revoke { devices: CPU }) }, out);
        self.revoke_or(ticket, out, |core, ticket, _| core.end(ticket));
    }

    /// The page's frame is lost. A program that still has it mapped loses that first, and meets the poison at its next access.
    pub(crate) fn poison_page(&mut self, region: RegionId, page: u64, entry: Entry, out: &mut Vec<Action>) {
        let pages = Pages::one(page);
        if entry.discarded() {
            // Nothing that anybody wanted is lost.
            Self::publish_same(region, pages, Entry::ABSENT, out);
            out.push(Action::Wake { region, pages });
            return;
        }
        if !entry.cpu_mapped() {
            return self.poison(region, pages, out);
        }
        self.stats.poisoned += 1;
        let poisoned = Entry::poisoned(PoisonReason::DeviceLost).with_mapped_mask(CPU);
        Self::publish_same(region, pages, poisoned, out);
        self.hide_poisoned(region, pages, out);
    }

    /// Frames that are lost; the end of a region revokes by itself.
    pub(crate) fn hide_poisoned(&mut self, region: RegionId, pages: Pages, out: &mut Vec<Action>) {
        if pages.count > 0 && !self.is_dying(region) {
            self.hide_frames(region, pages, out);
        }
    }
}
