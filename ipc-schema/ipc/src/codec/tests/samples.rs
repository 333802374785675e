//! One message of every kind, with values that differ from every default.

use super::*;

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
        variants!("Supervisor", supervisor::Call: Register Ready VaultPut VaultGet VaultRemove Fence Status Shutdown Kill Pong),
        variants!("Pager", pager::Call: OpenSpace AttachSpace CloseSpace CreateRegion FreeRegion Migrate Query Advise DriverLogin
            AttachTable MirrorLogin OpenMirror CloseMirror Lookup Resolve InvalidateDone ListRegions),
        variants!("Mirror", mirror::Call: Login Open Close Lookup Fault Ack),
        variants!("Driver", driver::Call: Info OpenQueue Submit),
    ]
    .concat()
    .into_iter()
    .collect()
}

pub(super) fn reply_variants() -> BTreeSet<String> {
    [
        variants!("Common", common::Reply: Stats),
        variants!("Supervisor", supervisor::Reply: Done Registered Vault Status Killed),
        variants!("Pager", pager::Reply: Done SpaceOpened RegionCreated Migrated Residency Region Resolved Regions),
        variants!("Mirror", mirror::Reply: Done Region Mapped),
        variants!("Driver", driver::Reply: Info QueueOpened Finished),
    ]
    .concat()
    .into_iter()
    .collect()
}

pub(super) fn event_variants() -> BTreeSet<String> {
    [
        variants!("Supervisor", supervisor::Event: Ping ServiceDied Stop),
        variants!("Pager", pager::Event: Invalidate DeviceVoid SpaceGone),
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
        Pong { sequence: 9 },
    ]
    .map(Call::Supervisor)
    .to_vec()
}

fn client_calls() -> Vec<Call> {
    use pager::Advice::*;
    use pager::Call::*;
    let (addr, len_bytes) = (0x7f00_0000_0000, 1 << 21);
    let mut calls = vec![
        OpenSpace { nonce: u64::MAX, uffd: fd(4096), full: true },
        AttachSpace { space: 1, token: vec![5; 16] },
        CloseSpace,
        CreateRegion { addr, len_bytes, memory: fd(8192) },
        FreeRegion { region: 2 },
        Migrate { addr, len_bytes, target: pager::Target::Device(7) },
        Migrate { addr, len_bytes, target: pager::Target::Home },
        Query { addr, len_bytes },
        ListRegions,
    ];
    for advice in [Pin, Unpin, InPlace, MigrateOnFault, DeviceReadOnly, DeviceReadWrite] {
        calls.push(Advise { addr, len_bytes, advice });
    }
    calls.into_iter().map(Call::Pager).collect()
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
    [
        login(Some(fd(20480)), Some(fd(4096)), None),
        login(None, Some(fd(4096)), Some(ring.clone())),
        login(Some(fd(4096)), None, Some(ring)),
        login(None, None, None),
        AttachTable { space: 1, region: 2, table: fd(4096) },
        MirrorLogin,
        OpenMirror { space: 1, token: vec![6; 16], device: 3 },
        CloseMirror { space: 1, device: 3 },
        Lookup { space: 1, addr: 4097 },
        Resolve { space: 1, region: 2, first_page: 3, page_count: 4, fault_page: 5, device: 6, write: true },
        InvalidateDone { id: 8, late_mask: 0x81 },
    ]
    .map(Call::Pager)
    .to_vec()
}

fn mirror_calls() -> Vec<Call> {
    use mirror::Call::*;
    [
        Login { device: 4 },
        Open { space: 1, token: vec![1, 2] },
        Close { space: 1 },
        Lookup { space: 1, addr: 2 },
        Fault { space: 1, region: 2, first_page: 3, page_count: 4, fault_page: 5, write: true },
        Ack { id: 6 },
    ]
    .map(Call::Mirror)
    .to_vec()
}

fn driver_calls() -> Vec<Call> {
    use driver::Call::*;
    let submit = |idempotent| Submit { space: 1, kernel: "sum".into(), args: vec![1, u64::MAX, 3], idempotent };
    [Info, OpenQueue { space: 1, token: vec![3; 16] }, submit(true), submit(false)].map(Call::Driver).to_vec()
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
    ]
    .map(Reply::Supervisor)
    .to_vec()
}

fn map_runs() -> Vec<pager::MapRun> {
    [pager::MapKind::Frame(u32::MAX), pager::MapKind::System, pager::MapKind::Frame(0)]
        .map(|kind| pager::MapRun { first_page: 1, page_count: 2, kind, writable: kind == pager::MapKind::System })
        .to_vec()
}

fn pager_replies() -> Vec<Reply> {
    use pager::PageStatus::*;
    use pager::{RegionStatus, Reply as R, Residency, ResidencyRun, StatusRun};
    let statuses = [Moved, AlreadyThere, Busy, Pinned, NoMemory, Io, Poisoned, Gone];
    let places = [Residency::Absent, Residency::System, Residency::Device(0), Residency::Device(7), Residency::Moving];
    let place = |residency| ResidencyRun { first_page: 1, page_count: 2, residency, pinned: true, mapped_mask: 0x81 };
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
        R::RegionCreated { region: 2 },
        R::Migrated {
            moved_pages: 3,
            runs: statuses.map(|status| StatusRun { first_page: 1, page_count: 2, status }).to_vec(),
        },
        R::Residency { runs: places.map(place).into_iter().chain([place(Residency::Poisoned)]).collect() },
        R::Region { region: 1, addr: 2, len_bytes: 3, device_read_only: true, memory: fd(4096) },
        R::Resolved { runs: map_runs() },
        R::Regions(vec![region.clone(), region]),
    ]
    .map(Reply::Pager)
    .to_vec()
}

fn mirror_replies() -> Vec<Reply> {
    use mirror::Reply::*;
    [
        Done,
        Region { region: 1, addr: 2, len_bytes: 3, device_read_only: true, memory: fd(4096) },
        Mapped { sequence: 4, runs: map_runs() },
    ]
    .map(Reply::Mirror)
    .to_vec()
}

fn driver_replies() -> Vec<Reply> {
    use driver::Reply::*;
    let kernels = vec!["sum addr len".into(), "fill addr len value".into()];
    [
        Info { driver: "soft".into(), device: 2, memory_bytes: 1 << 30, aperture: true, kernels },
        QueueOpened,
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
    let mirror = [
        mirror::Event::Invalidate { id, space, region, first_page, page_count, unmap, sequence },
        mirror::Event::SpaceGone { space },
    ];
    let supervisor = supervisor.map(Event::Supervisor).to_vec();
    [supervisor, pager.map(Event::Pager).to_vec(), mirror.map(Event::Mirror).to_vec()].concat()
}
