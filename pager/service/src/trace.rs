//! What happened to a client's pages, for profilers: the last records of each space. They are not kept over a restart.

use std::collections::VecDeque;
use std::time::Duration;

use uhmm_ipc::ConnId;
use uhmm_ipc::message::pager::{TraceCause, TraceKind, TraceRecord};
use uhmm_ipc::message::{WireError, pager};
use uhmm_pager_core::{Cause, Pages, RegionId, ReqId, Target, TraceKind as CoreKind};

use crate::advise::wire_target;
use crate::service::Pager;

/// Records kept a space.
const RECORDS_MAX: usize = 4096;
/// Records in one answer.
const ANSWER_MAX: usize = 256;

/// The ring of one space.
#[derive(Debug, Default)]
pub struct TraceRing {
    records: VecDeque<TraceRecord>,
    last: u64,
}

impl TraceRing {
    fn push(&mut self, record: TraceRecord) {
        self.last += 1;
        if self.records.len() == RECORDS_MAX {
            self.records.pop_front();
        }
        self.records.push_back(TraceRecord { sequence: self.last, ..record });
    }

    fn since(&self, since: u64) -> Vec<TraceRecord> {
        self.records.iter().filter(|record| record.sequence >= since).take(ANSWER_MAX).copied().collect()
    }
}

fn kind_of(kind: CoreKind) -> TraceKind {
    match kind {
        CoreKind::MigrateStart => TraceKind::MigrateStart,
        CoreKind::MigrateEnd => TraceKind::MigrateEnd,
        CoreKind::Invalidate => TraceKind::Invalidate,
        CoreKind::Throttle => TraceKind::Throttle,
    }
}

fn cause_of(cause: Cause) -> TraceCause {
    match cause {
        Cause::Prefetch => TraceCause::Prefetch,
        Cause::CpuFault => TraceCause::CpuFault,
        Cause::DeviceFault => TraceCause::DeviceFault,
        Cause::Eviction => TraceCause::Eviction,
        Cause::AddressSpace => TraceCause::AddressSpace,
    }
}

impl Pager {
    #[allow(clippy::too_many_arguments, reason = "the action's own fields")]
    pub(crate) fn trace(
        &mut self,
        kind: CoreKind,
        cause: Cause,
        req: ReqId,
        region: RegionId,
        pages: Pages,
        from: Target,
        to: Target,
    ) {
        let Some((segment, part)) = self.regions.showing(region.0, pages).next() else { return };
        let (space, addr) = (segment.space, segment.addr_of(part.first));
        self.note_migration((kind, cause, req), region, pages, (space, addr), (from, to));
        let record = TraceRecord {
            sequence: 0,
            time_ns: monotonic().as_nanos() as u64,
            kind: kind_of(kind),
            cause: cause_of(cause),
            addr,
            page_count: pages.count,
            from: wire_target(from),
            to: wire_target(to),
        };
        self.traces.entry(space).or_default().push(record);
    }

    pub(crate) fn read_trace(&self, conn: ConnId, since: u64) -> Result<pager::Reply, WireError> {
        let space = self.space_of(conn)?;
        let records = self.traces.get(&space).map(|ring| ring.since(since)).unwrap_or_default();
        Ok(pager::Reply::Trace { records })
    }
}

fn monotonic() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_last_records_and_answers_in_pieces() {
        let target = pager::Target::Home;
        let record = TraceRecord {
            sequence: 0,
            time_ns: 0,
            kind: TraceKind::MigrateStart,
            cause: TraceCause::Prefetch,
            addr: 0,
            page_count: 1,
            from: target,
            to: target,
        };
        let mut ring = TraceRing::default();
        (0..5000).for_each(|_| ring.push(record));
        let first = ring.since(0);
        assert_eq!((first.len(), first[0].sequence), (ANSWER_MAX, 5000 - RECORDS_MAX as u64 + 1));
        let last = ring.since(4999);
        assert_eq!(last.iter().map(|record| record.sequence).collect::<Vec<_>>(), [4999, 5000]);
        assert!(ring.since(5001).is_empty());
    }
}
