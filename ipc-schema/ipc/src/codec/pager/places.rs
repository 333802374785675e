//! Targets, advice and attributes: small values that several messages carry.

use uhmm_schema::sdk_capnp::{
    self as sdk, ADAPTIVE, AT_HOME, MAX_DEVICES, NOWHERE, advice, attribute_run, only, place, target, trace_record,
};

use crate::codec::error::{DecodeError, EncodeError};
use crate::message::pager::{
    AccessMode, Advice, AttributeRun, Attributes, FaultPoint, Only, Target, TraceCause, TraceKind, TraceRecord,
};

pub(super) fn write_target(from: Target, mut to: target::Builder<'_>) {
    match from {
        Target::Home => to.set_home(()),
        Target::Device(device) => to.set_device(device),
    }
}

pub(super) fn read_target(from: target::Reader<'_>) -> Result<Target, DecodeError> {
    Ok(match from.which()? {
        target::Home(()) => Target::Home,
        target::Device(device) => Target::Device(device),
    })
}

pub(super) fn write_only(from: Only, mut to: only::Builder<'_>) {
    match from {
        Only::All => to.set_all(()),
        Only::InSystem => to.set_in_system(()),
        Only::OnDevice(device) => to.set_on_device(device),
    }
}

pub(super) fn read_only(from: only::Reader<'_>) -> Result<Only, DecodeError> {
    Ok(match from.which()? {
        only::All(()) => Only::All,
        only::InSystem(()) => Only::InSystem,
        only::OnDevice(device) => Only::OnDevice(device),
    })
}

fn write_place(from: Option<Target>, mut to: place::Builder<'_>) {
    match from {
        None => to.set_nowhere(()),
        Some(Target::Home) => to.set_home(()),
        Some(Target::Device(device)) => to.set_device(device),
    }
}

fn read_place(from: place::Reader<'_>) -> Result<Option<Target>, DecodeError> {
    Ok(match from.which()? {
        place::Nowhere(()) => None,
        place::Home(()) => Some(Target::Home),
        place::Device(device) => Some(Target::Device(device)),
    })
}

fn place_to_byte(field: &'static str, place: Option<Target>) -> Result<u8, EncodeError> {
    match place {
        None => Ok(NOWHERE),
        Some(Target::Home) => Ok(AT_HOME),
        Some(Target::Device(device)) if u32::from(device) < MAX_DEVICES => Ok(device),
        Some(Target::Device(device)) => Err(EncodeError::Value { field, value: u64::from(device) }),
    }
}

fn place_from_byte(field: &'static str, value: u8) -> Result<Option<Target>, DecodeError> {
    match value {
        NOWHERE => Ok(None),
        AT_HOME => Ok(Some(Target::Home)),
        device if u32::from(device) < MAX_DEVICES => Ok(Some(Target::Device(device))),
        _ => Err(DecodeError::Value { field, value: u64::from(value) }),
    }
}

fn granularity_to_wire(log2_pages: Option<u8>) -> Result<u8, EncodeError> {
    match log2_pages {
        None => Ok(ADAPTIVE),
        Some(log2 @ 0..=63) => Ok(log2),
        Some(log2) => Err(EncodeError::Value { field: "granularity", value: u64::from(log2) }),
    }
}

fn granularity_from_wire(value: u8) -> Result<Option<u8>, DecodeError> {
    match value {
        ADAPTIVE => Ok(None),
        0..=63 => Ok(Some(value)),
        _ => Err(DecodeError::Value { field: "granularity", value: u64::from(value) }),
    }
}

pub(super) fn write_advice(from: Advice, mut to: advice::Builder<'_>) -> Result<(), EncodeError> {
    match from {
        Advice::Pin => to.set_pin(()),
        Advice::Unpin => to.set_unpin(()),
        Advice::InPlace => to.set_in_place(()),
        Advice::MigrateOnFault => to.set_migrate_on_fault(()),
        Advice::DeviceReadOnly => to.set_device_read_only(()),
        Advice::DeviceReadWrite => to.set_device_read_write(()),
        Advice::Access { device, mode } => {
            let mut to = to.init_access();
            to.set_device(device);
            to.set_mode(match mode {
                AccessMode::Migrate => sdk::AccessMode::Migrate,
                AccessMode::InPlace => sdk::AccessMode::InPlace,
                AccessMode::None => sdk::AccessMode::None,
            });
        }
        Advice::PreferredLocation(target) => write_place(target, to.init_preferred_location()),
        Advice::ReadMostly(on) => to.set_read_mostly(on),
        Advice::Granularity(log2_pages) => to.set_granularity(granularity_to_wire(log2_pages)?),
    }
    Ok(())
}

pub(super) fn read_advice(from: advice::Reader<'_>) -> Result<Advice, DecodeError> {
    Ok(match from.which()? {
        advice::Pin(()) => Advice::Pin,
        advice::Unpin(()) => Advice::Unpin,
        advice::InPlace(()) => Advice::InPlace,
        advice::MigrateOnFault(()) => Advice::MigrateOnFault,
        advice::DeviceReadOnly(()) => Advice::DeviceReadOnly,
        advice::DeviceReadWrite(()) => Advice::DeviceReadWrite,
        advice::Access(from) => {
            let from = from?;
            let mode = match from.get_mode()? {
                sdk::AccessMode::Migrate => AccessMode::Migrate,
                sdk::AccessMode::InPlace => AccessMode::InPlace,
                sdk::AccessMode::None => AccessMode::None,
            };
            Advice::Access { device: from.get_device(), mode }
        }
        advice::PreferredLocation(from) => Advice::PreferredLocation(read_place(from?)?),
        advice::ReadMostly(on) => Advice::ReadMostly(on),
        advice::Granularity(value) => Advice::Granularity(granularity_from_wire(value)?),
    })
}

pub(super) fn write_attribute_run(from: &AttributeRun, mut to: attribute_run::Builder<'_>) -> Result<(), EncodeError> {
    let Attributes {
        preferred,
        prefetched,
        in_place_mask,
        no_access_mask,
        read_mostly,
        device_read_only,
        granularity_log2_pages,
        pinned,
    } = from.attributes;
    to.set_first_page(from.first_page);
    to.set_page_count(from.page_count);
    to.set_preferred(place_to_byte("attributes.preferred", preferred)?);
    to.set_prefetched(place_to_byte("attributes.prefetched", prefetched)?);
    to.set_in_place_mask(in_place_mask);
    to.set_no_access_mask(no_access_mask);
    to.set_read_mostly(read_mostly);
    to.set_device_read_only(device_read_only);
    to.set_granularity(granularity_to_wire(granularity_log2_pages)?);
    to.set_pinned(pinned);
    Ok(())
}

pub(super) fn read_attribute_run(from: attribute_run::Reader<'_>) -> Result<AttributeRun, DecodeError> {
    let attributes = Attributes {
        preferred: place_from_byte("attributes.preferred", from.get_preferred())?,
        prefetched: place_from_byte("attributes.prefetched", from.get_prefetched())?,
        in_place_mask: from.get_in_place_mask(),
        no_access_mask: from.get_no_access_mask(),
        read_mostly: from.get_read_mostly(),
        device_read_only: from.get_device_read_only(),
        granularity_log2_pages: granularity_from_wire(from.get_granularity())?,
        pinned: from.get_pinned(),
    };
    Ok(AttributeRun { first_page: from.get_first_page(), page_count: from.get_page_count(), attributes })
}

pub(super) fn point_to_wire(point: FaultPoint) -> sdk::FaultPoint {
    match point {
        FaultPoint::HugeFrames => sdk::FaultPoint::HugeFrames,
        FaultPoint::Frames => sdk::FaultPoint::Frames,
        FaultPoint::CopyOut => sdk::FaultPoint::CopyOut,
        FaultPoint::CopyHome => sdk::FaultPoint::CopyHome,
        FaultPoint::SystemHuge => sdk::FaultPoint::SystemHuge,
        FaultPoint::SystemPages => sdk::FaultPoint::SystemPages,
    }
}

pub(super) fn point_from_wire(point: sdk::FaultPoint) -> FaultPoint {
    match point {
        sdk::FaultPoint::HugeFrames => FaultPoint::HugeFrames,
        sdk::FaultPoint::Frames => FaultPoint::Frames,
        sdk::FaultPoint::CopyOut => FaultPoint::CopyOut,
        sdk::FaultPoint::CopyHome => FaultPoint::CopyHome,
        sdk::FaultPoint::SystemHuge => FaultPoint::SystemHuge,
        sdk::FaultPoint::SystemPages => FaultPoint::SystemPages,
    }
}

pub(super) fn write_trace_record(from: &TraceRecord, mut to: trace_record::Builder<'_>) {
    to.set_sequence(from.sequence);
    to.set_time_ns(from.time_ns);
    to.set_kind(match from.kind {
        TraceKind::MigrateStart => sdk::TraceKind::MigrateStart,
        TraceKind::MigrateEnd => sdk::TraceKind::MigrateEnd,
        TraceKind::Invalidate => sdk::TraceKind::Invalidate,
        TraceKind::Throttle => sdk::TraceKind::Throttle,
    });
    to.set_cause(match from.cause {
        TraceCause::Prefetch => sdk::TraceCause::Prefetch,
        TraceCause::CpuFault => sdk::TraceCause::CpuFault,
        TraceCause::DeviceFault => sdk::TraceCause::DeviceFault,
        TraceCause::Eviction => sdk::TraceCause::Eviction,
        TraceCause::AddressSpace => sdk::TraceCause::AddressSpace,
    });
    to.set_addr(from.addr);
    to.set_page_count(from.page_count);
    write_target(from.from, to.reborrow().init_from());
    write_target(from.to, to.init_to());
}

pub(super) fn read_trace_record(from: trace_record::Reader<'_>) -> Result<TraceRecord, DecodeError> {
    Ok(TraceRecord {
        sequence: from.get_sequence(),
        time_ns: from.get_time_ns(),
        kind: match from.get_kind()? {
            sdk::TraceKind::MigrateStart => TraceKind::MigrateStart,
            sdk::TraceKind::MigrateEnd => TraceKind::MigrateEnd,
            sdk::TraceKind::Invalidate => TraceKind::Invalidate,
            sdk::TraceKind::Throttle => TraceKind::Throttle,
        },
        cause: match from.get_cause()? {
            sdk::TraceCause::Prefetch => TraceCause::Prefetch,
            sdk::TraceCause::CpuFault => TraceCause::CpuFault,
            sdk::TraceCause::DeviceFault => TraceCause::DeviceFault,
            sdk::TraceCause::Eviction => TraceCause::Eviction,
            sdk::TraceCause::AddressSpace => TraceCause::AddressSpace,
        },
        addr: from.get_addr(),
        page_count: from.get_page_count(),
        from: read_target(from.get_from()?)?,
        to: read_target(from.get_to()?)?,
    })
}
