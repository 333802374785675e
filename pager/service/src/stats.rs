//! Counters of the shell beside the core's own, and their names on the wire.

use uhmm_kernel_hook::PAGE_SIZE;
use uhmm_kit::record::{Each, Kind};
use uhmm_pager_core::DeviceId;

use crate::noted::{CAUSES, WAYS};
use crate::service::Pager;

/// What the shell counts itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct ShellStats {
    /// Spaces adopted from the vault at start.
    pub recovered_spaces: u64,
    /// Regions adopted from the vault at start.
    pub recovered_regions: u64,
    /// Spaces whose process ended.
    pub spaces_ended: u64,
    /// Revocations done by swapping shared page table entries.
    pub revokes_direct: u64,
    /// Revocations that needed messages.
    pub revokes_by_message: u64,
    /// Sweeps over device page tables for hot ranges.
    pub heat_sweeps: u64,
    /// Private pages that nobody has touched while they rested on their way out.
    pub rested_pages: u64,
    /// Those that came back because one of them was touched.
    pub rest_touched_pages: u64,
}

impl Pager {
    /// Everything that `uhmm stats` and the record show of the pager.
    pub(crate) fn tell(&self, each: &mut Each<'_>) {
        for (name, value) in self.core.stats().counters() {
            each(format_args!("{name}"), Kind::Counter, value);
        }
        for (name, value) in [
            ("recovered_spaces", self.stats.recovered_spaces),
            ("recovered_regions", self.stats.recovered_regions),
            ("spaces_ended", self.stats.spaces_ended),
            ("revokes_direct", self.stats.revokes_direct),
            ("revokes_by_message", self.stats.revokes_by_message),
            ("heat_sweeps", self.stats.heat_sweeps),
            ("rested_pages", self.stats.rested_pages),
            ("rest_touched_pages", self.stats.rest_touched_pages),
            ("moves_beside_threads", self.follower.moves),
            ("quota_refusals", self.noted.quota_refusals),
        ] {
            each(format_args!("{name}"), Kind::Counter, value);
        }
        let agent_jobs = self.spaces.values().filter_map(|space| space.agent.as_ref()).map(|agent| agent.len() as u64);
        for (name, value) in [
            ("heat_spaces", self.watched_spaces()),
            ("pending_revokes", self.revokes.len() as u64),
            ("spaces", self.spaces.len() as u64),
            ("spaces_max", u64::from(self.service.plan.quota.max_spaces)),
            ("regions", self.regions.iter().count() as u64),
            ("requests_waiting", self.requests.len() as u64),
            ("copies_waiting", self.copies.len() as u64),
            ("agent_jobs", agent_jobs.sum()),
            ("resting_pages", self.resting.pages()),
        ] {
            each(format_args!("{name}"), Kind::Gauge, value);
        }
        for (cause, ways) in CAUSES.iter().zip(&self.noted.moved) {
            for (way, (count, pages)) in WAYS.iter().zip(ways) {
                let cause = cause.name();
                each(format_args!("migrations;cause={cause};way={way}"), Kind::Counter, *count);
                each(format_args!("migrated_bytes;cause={cause};way={way}"), Kind::Counter, *pages * PAGE_SIZE);
            }
        }
        for device in &self.service.plan.devices {
            let (frames, free) = self.core.frame_counts(DeviceId(device.id)).unwrap_or_default();
            let name = &device.name;
            each(format_args!("device_memory_bytes;device={name}"), Kind::Gauge, u64::from(frames) * PAGE_SIZE);
            each(format_args!("device_free_bytes;device={name}"), Kind::Gauge, u64::from(free) * PAGE_SIZE);
        }
    }
}
