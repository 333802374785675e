//! One message of every kind, with values that differ from every default.

use super::*;
use crate::message::Aperture;

/// Names every variant of an enum once: as a pattern, so that a forgotten one does not compile, and as text.
macro_rules! variants {
    ($outer:literal, $type:ty: $($name:ident)*) => {{
        #[allow(unused_variables)]
        fn all_named(value: &$type) {
            type T = $type;
            match value { $(T::$name { .. } => (),)* }
        }
        let _: fn(&$type) = all_named;
        vec![$(format!("{}::{}", $outer, stringify!($name))),*]
    }};
}

pub(super) fn call_variants() -> BTreeSet<String> {
    [
        variants!("Common", common::Call: Stats),
        variants!("Supervisor", supervisor::Call: Register Ready VaultPut VaultGet VaultRemove Fence Status Shutdown Kill Pong Join Record OperatorKey),
        variants!("Pager", pager::Call: OpenSpace AttachSpace CloseSpace CreateRegion FreeRegion Migrate Query Advise
            AdoptRegion AttachFile ReleaseRange Discard ProtectionChanged Revalidate Evict QueryAttributes HotRanges ReadTrace Inject FramesDone AgentStarted
            DriverLogin AttachTable DeviceLost MirrorLogin OpenMirror CloseMirror Lookup Resolve InvalidateDone ListRegions Home EmptyDevice
            UserfaultfdDevice Strip MoveRegion MoveRange SetClaim RemoveClaim ListClaims),
        variants!("Mirror", mirror::Call: Login Open Close Lookup Fault Ack),
        variants!("Driver", driver::Call: Info OpenQueue Submit Access),
    ]
    .concat()
    .into_iter()
    .collect()
}

pub(super) fn reply_variants() -> BTreeSet<String> {
    [
        variants!("Common", common::Reply: Stats),
        variants!("Supervisor", supervisor::Reply: Done Registered Vault Status Killed Joined Record Key),
        variants!("Pager", pager::Reply: Done SpaceOpened RegionCreated Migrated Residency Region Resolved Regions Attributes Trace
            Evicted ChildAttached HotRanges Granted UserfaultfdDevice Strip Claims),
        variants!("Mirror", mirror::Reply: Done Region Mapped),
        variants!("Driver", driver::Reply: Info QueueOpened Finished Accessed),
    ]
    .concat()
    .into_iter()
    .collect()
}

pub(super) fn event_variants() -> BTreeSet<String> {
    [
        variants!("Supervisor", supervisor::Event: Ping ServiceDied Stop),
        variants!("Pager", pager::Event: Invalidate DeviceVoid SpaceGone Frames),
        variants!("Mirror", mirror::Event: Invalidate SpaceGone),
    ]
    .concat()
    .into_iter()
    .collect()
}

pub(super) fn calls() -> Vec<Call> {
    let common = [common::Call::Stats].map(Call::Common);
    [common.to_vec(), supervisor_calls(), client_calls(), service_calls(), mirror_calls(), driver_calls()].concat()
}

fn supervisor_calls() -> Vec<Call> {
    use supervisor::Call::*;
    let service = || "soft0".to_owned();
    [
        Register { service: service(), incarnation: 3 },
        Ready,
        VaultPut { name: "space/7/uffd".into(), fd: fd(4096) },
        VaultGet { prefix: "space/".into(), after: "space/6".into() },
        VaultRemove { prefix: "space/7/".into() },
        Fence { service: service(), incarnation: 4, reason: "It does not revoke".into() },
        Status,
        Shutdown,
        Kill { service: service() },
        Record { service: service() },
        OperatorKey { socket: "driver-soft0.sock".into() },
        Pong { sequence: 9 },
        Join { guard: Some(fd(4096)) },
        Join { guard: None },
    ]
    .map(Call::Supervisor)
    .to_vec()
}

fn agent() -> pager::AgentMemory {
    pager::AgentMemory {
        maps: fd(4096),
        pagemap: fd(4097),
        smaps: fd(4098),
        staging: fd(8192),
        orders: fd(8193),
        done: fd(8194),
        agent: Some(fd(8195)),
    }
}

fn claim() -> pager::Claim {
    let shares = (0..8).map(|device| pager::ClaimShare { device, bytes: 1 << 40, used_bytes: 4096 }).collect();
    pager::Claim { id: "a".repeat(64), name: "n".repeat(256), token: vec![7; 32], shares, spaces: 3 }
}

fn devices() -> Vec<pager::DeviceUse> {
    let device = |device| {
        let name = "d".repeat(32);
        pager::DeviceUse { device, name, memory_bytes: 1 << 40, free_bytes: 1 << 39, closed: device == 3 }
    };
    (0..8).map(device).collect()
}

fn client_calls() -> Vec<Call> {
    use pager::Advice::*;
    use pager::Call::*;
    let (addr, len_bytes) = (0x7f00_0000_0000, 1 << 21);
    let mut calls = vec![
        OpenSpace { nonce: u64::MAX, uffd: fd(4096), full: true, sentinel_addr: addr, agent: agent(), claim: vec![] },
        OpenSpace { nonce: 1, uffd: fd(4096), full: true, sentinel_addr: addr, agent: agent(), claim: vec![9; 32] },
        AttachSpace { space: 1, token: vec![5; 16], agent: None },
        AttachSpace { space: 1, token: vec![5; 16], agent: Some(agent()) },
        CloseSpace,
        CreateRegion { addr, len_bytes, memory: fd(8192) },
        FreeRegion { region: 2 },
        Migrate { addr, len_bytes, target: pager::Target::Device(7), prefetch: true, only: pager::Only::InSystem },
        Migrate { addr, len_bytes, target: pager::Target::Home, prefetch: false, only: pager::Only::OnDevice(3) },
        Migrate { addr, len_bytes, target: pager::Target::Home, prefetch: false, only: pager::Only::All },
        Home { pid: 77, stay: true, process: 1 << 33 },
        UserfaultfdDevice,
        EmptyDevice { device: 2, then: pager::Emptied::Unchanged },
        EmptyDevice { device: 7, then: pager::Emptied::Closed },
        EmptyDevice { device: 0, then: pager::Emptied::Opened },
        Strip { region: 7, cells: 80 },
        MoveRegion { region: 7, target: pager::Target::Device(2) },
        MoveRange { pid: 7, process: 8, addr: 0x1000, len_bytes: 0x2000, target: pager::Target::Home, rest: None },
        MoveRange {
            pid: 7,
            process: 8,
            addr: 0x1000,
            len_bytes: 0x2000,
            target: pager::Target::Device(1),
            rest: Some(pager::Rest { ms: 250, stays: true }),
        },
        SetClaim(claim()),
        RemoveClaim { id: "5".to_owned() },
        ListClaims { after: String::new() },
        AdoptRegion { addr, len_bytes },
        AttachFile { addr, len_bytes, file: fd(12288), offset_bytes: 4096 },
        ReleaseRange { addr, len_bytes },
        Discard { addr, len_bytes },
        ProtectionChanged { addr, len_bytes },
        Revalidate { addr, len_bytes },
        QueryAttributes { addr, len_bytes },
        Evict { device: 7, page_count: u64::MAX },
        HotRanges { device: 7 },
        ReadTrace { since: 12 },
        Query { addr, len_bytes },
        ListRegions,
    ];
    let simple =
        [Pin, Unpin, InPlace, MigrateOnFault, DeviceReadOnly, DeviceReadWrite, ReadMostly(true), ReadMostly(false)];
    let modes = [pager::AccessMode::Migrate, pager::AccessMode::InPlace, pager::AccessMode::None];
    let access = modes.map(|mode| Access { device: 7, mode });
    let targets = [None, Some(pager::Target::Home), Some(pager::Target::Device(0)), Some(pager::Target::Device(7))];
    let places = targets.map(PreferredLocation);
    let blocks = [None, Some(0), Some(9), Some(63)].map(Granularity);
    for advice in simple.into_iter().chain(access).chain(places).chain(blocks) {
        calls.push(Advise { addr, len_bytes, advice });
    }
    use pager::FaultPoint::*;
    calls
        .extend([HugeFrames, Frames, CopyOut, CopyHome, SystemHuge, SystemPages].map(|point| Inject { point, nth: 3 }));
    calls.extend([true, false].map(|done| FramesDone { id: 9, done }));
    calls.extend([None, Some(fd(4096))].map(|agent| AgentStarted { agent }));
    calls.into_iter().map(Call::Pager).collect()
}

fn window(len: u64) -> Aperture {
    Aperture { fd: fd(len), offset_bytes: 2 << 40 }
}

fn service_calls() -> Vec<Call> {
    use pager::Call::*;
    let ring = pager::CopyRing { ring: fd(4096), submit: fd(8192), complete: fd(12288), staging: fd(16384) };
    let login = |aperture, gate, copy_ring| DriverLogin {
        device: 3,
        generation: 1 << 63,
        frame_count: 1000,
        aperture,
        gate,
        copy_ring,
    };
    let resolve = |write, whole, exclusive| Resolve {
        space: 1,
        region: 2,
        first_page: 3,
        page_count: 4,
        fault_page: 5,
        device: 6,
        write,
        whole,
        exclusive,
    };
    [
        login(Some(window(20480)), Some(fd(4096)), None),
        login(None, Some(fd(4096)), Some(ring.clone())),
        login(Some(window(4096)), None, Some(ring)),
        login(None, None, None),
        AttachTable { space: 1, region: 2, table: fd(4096) },
        DeviceLost { device: 3 },
        MirrorLogin,
        OpenMirror { space: 1, token: vec![6; 16], device: 3 },
        CloseMirror { space: 1, device: 3 },
        Lookup { space: 1, addr: 4097 },
        resolve(true, false, false),
        resolve(false, true, false),
        resolve(false, false, true),
        InvalidateDone { id: 8, late_mask: 0x81 },
    ]
    .map(Call::Pager)
    .to_vec()
}

fn mirror_calls() -> Vec<Call> {
    use mirror::Call::*;
    let fault = |write, whole, exclusive| Fault {
        space: 1,
        region: 2,
        first_page: 3,
        page_count: 4,
        fault_page: 5,
        write,
        whole,
        exclusive,
    };
    [
        Login { device: 4 },
        Open { space: 1, token: vec![1, 2] },
        Close { space: 1 },
        Lookup { space: 1, addr: 2 },
        fault(true, false, false),
        fault(false, true, false),
        fault(false, false, true),
        Ack { id: 6 },
    ]
    .map(Call::Mirror)
    .to_vec()
}

fn driver_calls() -> Vec<Call> {
    use driver::Call::*;
    let range = |write| driver::JobRange { addr: 4096, len_bytes: 8192, write };
    let submit = |idempotent| Submit {
        space: 1,
        kernel: "sum".into(),
        args: vec![1, u64::MAX, 3],
        idempotent,
        ranges: vec![range(true), range(false)],
    };
    use driver::AccessOp::*;
    let ops = [Read, Write, FetchAdd(u64::MAX), MakeExclusive, Map, Peek, MapForWrite];
    let access = |op| Access {
        space: 1,
        addr: 4096,
        len_bytes: 8192,
        op,
        buffer: (![MakeExclusive, Map, MapForWrite].contains(&op)).then(|| fd(8192)),
    };
    let simple = [Info, OpenQueue { space: 1, token: vec![3; 16] }, submit(true), submit(false)];
    simple.into_iter().chain(ops.map(access)).map(Call::Driver).collect()
}

pub(super) fn replies() -> Vec<Reply> {
    let metric = common::Metric { name: "fault_latency_p99_ns".into(), value: 17 };
    let common = [common::Reply::Stats(vec![metric.clone(), metric])].map(Reply::Common);
    [common.to_vec(), supervisor_replies(), pager_replies(), mirror_replies(), driver_replies()].concat()
}

fn supervisor_replies() -> Vec<Reply> {
    use supervisor::Reply::*;
    let status = supervisor::ServiceStatus {
        name: "pager".into(),
        pid: 1,
        incarnation: 2,
        state: "ready".into(),
        last_exit: "killed by signal 9".into(),
        uptime_ms: 3,
        missed_heartbeats: 4,
        last_recovery_ms: 5,
        vault_entries: 6,
    };
    let registered = |listener| Registered {
        plan_toml: "[supervisor]\n".repeat(100),
        listener,
        channel_keys: vec![("mirror".into(), vec![1; 32]), ("soft0".into(), vec![2; 32])],
    };
    [
        Done,
        registered(Some(fd(4096))),
        registered(None),
        Vault { entries: vec![("a".into(), fd(4096)), ("b".into(), fd(8192))], more: true },
        Status(vec![status.clone(), status]),
        Killed { incarnation: 3, pid: 4 },
        Joined { incarnation: 5, key: vec![3; 16], listener: Some(fd(4096)), keys_toml: "soft0 = \"00\"\n".into() },
        Joined { incarnation: 5, key: vec![3; 16], listener: None, keys_toml: String::new() },
        Record(fd(4096)),
        Key(vec![3; 16]),
    ]
    .map(Reply::Supervisor)
    .to_vec()
}

fn map_runs() -> Vec<pager::MapRun> {
    [pager::MapKind::Frame(u32::MAX), pager::MapKind::System, pager::MapKind::Frame(0)]
        .map(|kind| pager::MapRun { first_page: 1, page_count: 2, kind, writable: kind == pager::MapKind::System })
        .to_vec()
}

pub(super) fn attribute_runs() -> Vec<pager::AttributeRun> {
    let none = pager::Attributes {
        preferred: None,
        prefetched: Some(pager::Target::Home),
        in_place_mask: 0,
        no_access_mask: 0x80,
        read_mostly: false,
        device_read_only: true,
        granularity_log2_pages: None,
        pinned: false,
    };
    let all = pager::Attributes {
        preferred: Some(pager::Target::Device(7)),
        prefetched: Some(pager::Target::Device(0)),
        in_place_mask: 0xff,
        no_access_mask: 0,
        read_mostly: true,
        device_read_only: false,
        granularity_log2_pages: Some(9),
        pinned: true,
    };
    [none, all].map(|attributes| pager::AttributeRun { first_page: 1, page_count: 2, attributes }).to_vec()
}

pub(super) fn trace_records() -> Vec<pager::TraceRecord> {
    use pager::{TraceCause as Cause, TraceKind as Kind};
    let (from, to) = (pager::Target::Home, pager::Target::Device(6));
    let record = |kind, cause| pager::TraceRecord {
        sequence: 1,
        time_ns: u64::MAX,
        kind,
        cause,
        addr: 4096,
        page_count: 512,
        from,
        to,
    };
    let kinds = [Kind::MigrateStart, Kind::MigrateEnd, Kind::Invalidate, Kind::Throttle];
    let causes = [Cause::Prefetch, Cause::CpuFault, Cause::DeviceFault, Cause::Eviction, Cause::AddressSpace];
    let of_kinds = kinds.map(|kind| record(kind, Cause::Prefetch));
    of_kinds.into_iter().chain(causes.map(|cause| record(Kind::MigrateEnd, cause))).collect()
}

fn pager_replies() -> Vec<Reply> {
    use pager::PageStatus::*;
    use pager::{RegionStatus, Reply as R, Residency, ResidencyRun, StatusRun};
    let statuses = [Moved, AlreadyThere, Busy, Pinned, NoMemory, Io, Poisoned, Gone, NotSelected];
    let places = [
        Residency::Absent,
        Residency::System,
        Residency::Device(0),
        Residency::Device(7),
        Residency::Exclusive(7),
        Residency::Duplicated(3),
        Residency::Moving,
        Residency::Poisoned,
    ];
    let place = |residency| {
        let huge = residency == Residency::Device(7);
        ResidencyRun { first_page: 1, page_count: 2, residency, pinned: true, mapped_mask: 0x81, huge, coherent: huge }
    };
    let region = RegionStatus {
        space: 1,
        pid: 2,
        region: 3,
        addr: 4,
        page_count: 5,
        system_pages: 6,
        absent_pages: 7,
        moving_pages: 8,
        poisoned_pages: 9,
        device_pages: vec![10, 11],
    };
    [
        R::Done,
        R::SpaceOpened { space: 1, token: vec![4; 16], features: 0x1ffff },
        R::ChildAttached { uffd: fd(4096), features: 0x1ffff },
        R::UserfaultfdDevice { device: fd(4096) },
        R::RegionCreated { region: 2 },
        R::Migrated {
            moved_pages: 3,
            runs: statuses.map(|status| StatusRun { first_page: 1, page_count: 2, status }).to_vec(),
            why: "The copy failed".to_owned(),
        },
        R::Residency { runs: places.map(place).to_vec() },
        R::Region { region: 1, addr: 2, len_bytes: 3, device_read_only: true, memory: pager::Memory::Private },
        R::Attributes { runs: attribute_runs() },
        R::HotRanges { ranges: vec![pager::HotRange { addr: 3 << 21, heat_permille: 1000 }] },
        R::Granted { ranges: vec![pager::GrantedRange { addr: 4096, len_bytes: 8192 }] },
        R::Strip(vec![0, 1, 2, 3, 17]),
        R::Trace { records: trace_records() },
        R::Evicted { page_count: 77 },
        R::Resolved { runs: map_runs() },
        R::Regions(vec![region.clone(), region]),
        R::Claims(pager::Claims { claims: vec![claim(); 64], more: true, devices: devices(), has_rules: true }),
    ]
    .map(Reply::Pager)
    .to_vec()
}

fn mirror_replies() -> Vec<Reply> {
    use mirror::Reply::*;
    let region = |memory| Region { region: 1, addr: 2, len_bytes: 3, device_read_only: true, memory };
    [
        Done,
        region(pager::Memory::Sealed { memory: fd(4096), offset_bytes: 8192 }),
        region(pager::Memory::File { file: fd(4096), offset_bytes: 0 }),
        Mapped { sequence: 4, runs: map_runs() },
    ]
    .map(Reply::Mirror)
    .to_vec()
}

fn driver_replies() -> Vec<Reply> {
    use driver::CoherentMemory;
    use driver::Reply::*;
    let kernels = vec!["sum addr len".into(), "fill addr len value".into()];
    [
        Info { driver: "soft".into(), device: 2, memory_bytes: 1 << 30, aperture: true, coherent: true, kernels },
        QueueOpened { coherent: None },
        QueueOpened { coherent: Some(CoherentMemory { device: 2, generation: u64::MAX, memory: window(4096) }) },
        Accessed { page_count: 1024, fault_count: 1 },
        Finished { results: vec![1, 2, 3], fault_count: 4, run_time_ns: 5 },
    ]
    .map(Reply::Driver)
    .to_vec()
}

pub(super) fn events() -> Vec<Event> {
    let supervisor = [
        supervisor::Event::Ping { sequence: 1 },
        supervisor::Event::ServiceDied { service: "soft0".into(), incarnation: 2, held: true },
        supervisor::Event::Stop,
    ];
    let (id, space, region, first_page, page_count, unmap) = (1, 2, 3, 4, 5, true);
    let (device_mask, deadline_ms, sequence) = (6, 7, 8);
    let pager = [
        pager::Event::Invalidate { id, space, region, first_page, page_count, device_mask, unmap, deadline_ms },
        pager::Event::DeviceVoid { device: 7 },
        pager::Event::SpaceGone { space },
    ];
    use pager::FramesOp::*;
    let ops = [MapDevice { device: 7, frame: u32::MAX, generation: u64::MAX }, UnmapDevice];
    let agent = ops.map(|op| pager::Event::Frames { id, region, first_page, addr: 4096, page_count, op });
    let pager: Vec<_> = pager.into_iter().chain(agent).collect();
    let mirror = [
        mirror::Event::Invalidate { id, space, region, first_page, page_count, unmap, sequence },
        mirror::Event::SpaceGone { space },
    ];
    let supervisor = supervisor.map(Event::Supervisor).to_vec();
    [supervisor, pager.into_iter().map(Event::Pager).collect(), mirror.map(Event::Mirror).to_vec()].concat()
}
