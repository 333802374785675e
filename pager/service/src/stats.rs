//! Counters of the shell beside the core's own, and their names on the wire.

use uhmm_ipc::message::Metric;

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
}

impl Pager {
    /// Everything `uhmm stats` shows of the pager.
    pub(crate) fn metrics(&self) -> Vec<Metric> {
        let metric = |name: &str, value: u64| Metric { name: name.to_owned(), value };
        let mut metrics: Vec<Metric> =
            self.core.stats().counters().iter().map(|(name, value)| metric(name, *value)).collect();
        metrics.extend([
            metric("recovered_spaces", self.stats.recovered_spaces),
            metric("recovered_regions", self.stats.recovered_regions),
            metric("spaces_ended", self.stats.spaces_ended),
            metric("revokes_direct", self.stats.revokes_direct),
            metric("revokes_by_message", self.stats.revokes_by_message),
            metric("heat_sweeps", self.stats.heat_sweeps),
            metric("heat_spaces", self.watched_spaces()),
            metric("pending_revokes", self.revokes.len() as u64),
            metric("spaces", self.spaces.len() as u64),
            metric("regions", self.regions.iter().count() as u64),
            metric("copies_waiting", self.copies.len() as u64),
            metric(
                "agent_jobs",
                self.spaces.values().filter_map(|space| space.agent.as_ref()).map(|a| a.len() as u64).sum(),
            ),
        ]);
        metrics
    }
}
