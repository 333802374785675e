//! The trace ring: what happened to pages, for profilers. Part of the pager's messages.

use super::pager::Target;

/// What happened, for profilers. Kept in a ring of the last 4096 a space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TraceKind {
    /// Pages begin to move.
    MigrateStart,
    /// They have moved (or stay; `page_count` is what moved).
    MigrateEnd,
    /// Devices lost their mappings.
    Invalidate,
    /// A fault was answered by waiting: the block thrashes.
    Throttle,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TraceCause {
    /// A client asked.
    Prefetch,
    /// A CPU fault.
    CpuFault,
    /// A device fault.
    DeviceFault,
    /// A device was full.
    Eviction,
    /// The address space changed (unmap, remap, fork, protection).
    AddressSpace,
}

/// One entry of the trace ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceRecord {
    /// Counts up by one; starts again at 1 with each pager incarnation.
    pub sequence: u64,
    /// Nanoseconds of CLOCK_MONOTONIC.
    pub time_ns: u64,
    /// What.
    pub kind: TraceKind,
    /// Why.
    pub cause: TraceCause,
    /// First address.
    pub addr: u64,
    /// Pages.
    pub page_count: u64,
    /// Where from.
    pub from: Target,
    /// Where to.
    pub to: Target,
}
