//! Placement policy: what the program advises, and what was advised.

use std::ffi::{c_int, c_void};

use uhmm_sdk::{AccessMode, Advice, RangeAttributes, Target, Uniform};

use crate::buffers::{Out, address};
use crate::device::uhmm_device;
use crate::error::{Failure, guard};
use crate::handles;
use crate::session::uhmm_session;

/// Advice: bring the range home and keep it there. No device, value 0.
pub const UHMM_ADVISE_PIN: u32 = 0;
/// Advice: ends UHMM_ADVISE_PIN. No device, value 0.
pub const UHMM_ADVISE_UNPIN: u32 = 1;
/// Advice: devices map system pages in place instead of migrating them. No device, value 0.
pub const UHMM_ADVISE_IN_PLACE: u32 = 2;
/// Advice: device faults migrate (the default). No device, value 0.
pub const UHMM_ADVISE_MIGRATE_ON_FAULT: u32 = 3;
/// Advice: devices may only read. No device, value 0.
pub const UHMM_ADVISE_DEVICE_READ_ONLY: u32 = 4;
/// Advice: devices may write too (the default). No device, value 0.
pub const UHMM_ADVISE_DEVICE_READ_WRITE: u32 = 5;
/// Advice: how one device may use the range. The value is UHMM_ACCESS_*.
pub const UHMM_ADVISE_ACCESS: u32 = 6;
/// Advice: the pages shall live on this device, or at home without a device, if nobody has a better claim. Value 0.
pub const UHMM_ADVISE_PREFER: u32 = 7;
/// Advice: nowhere in particular (the default). No device, value 0.
pub const UHMM_ADVISE_PREFER_NONE: u32 = 8;
/// Advice: value 1, mostly read: reading devices get copies, the first write collapses them; value 0 ends it (the default). No device.
/// End it before MADV_MERGEABLE (KSM takes away the write protection that copies live by; memory that is mergeable before is taken out of
/// KSM when it is copied), and before MADV_GUARD_INSTALL on allocated memory, which Linux 6.18 tries for ever under that protection.
pub const UHMM_ADVISE_READ_MOSTLY: u32 = 9;
/// Advice: one CPU fault brings home an aligned block of 2^value pages, 0 to 63, or UHMM_GRANULARITY_ADAPTIVE. Of a block of more than 2 MiB
/// the rest follows when the fault is answered, unless pages of the region are sent to a device meanwhile. No device.
pub const UHMM_ADVISE_GRANULARITY: u32 = 10;

/// Access: a device fault moves the page to the device (the default).
pub const UHMM_ACCESS_MIGRATE: u32 = 0;
/// Access: a device fault maps the page where it is, if the device can reach it there.
pub const UHMM_ACCESS_IN_PLACE: u32 = 1;
/// Access: the device may not use the page; its accesses end with -EPERM.
pub const UHMM_ACCESS_NONE: u32 = 2;

/// Granularity: adapts to the program (the default).
pub const UHMM_GRANULARITY_ADAPTIVE: u32 = 255;

/// Place: system memory. Places from 0 on are device ids.
pub const UHMM_PLACE_HOME: i32 = -1;
/// Place: nowhere in particular, never.
pub const UHMM_PLACE_NONE: i32 = -2;

/// Mixed: the preferred place differs inside the range.
pub const UHMM_MIXED_PREFERRED: u32 = 1;
/// Mixed: the last prefetch went to different places inside the range.
pub const UHMM_MIXED_PREFETCHED: u32 = 2;
/// Mixed: which devices map in place differs inside the range.
pub const UHMM_MIXED_IN_PLACE: u32 = 4;
/// Mixed: which devices may not use the pages differs inside the range.
pub const UHMM_MIXED_NO_ACCESS: u32 = 8;
/// Mixed: some pages are mostly read, some are not.
pub const UHMM_MIXED_READ_MOSTLY: u32 = 16;
/// Mixed: some pages are read-only for devices, some are not.
pub const UHMM_MIXED_DEVICE_READ_ONLY: u32 = 32;
/// Mixed: the granularity differs inside the range.
pub const UHMM_MIXED_GRANULARITY: u32 = 64;
/// Mixed: some pages are pinned, some are not.
pub const UHMM_MIXED_PINNED: u32 = 128;

/// What was advised for a range, and where it was prefetched to last. A field whose UHMM_MIXED_* bit is set has no one value and
/// holds its default.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct uhmm_attributes_info {
    /// UHMM_MIXED_* of the fields that differ inside the range.
    pub mixed: u32,
    /// Device id or UHMM_PLACE_*.
    pub preferred: i32,
    /// Device id or UHMM_PLACE_*.
    pub prefetched: i32,
    /// n for blocks of 2^n pages, or UHMM_GRANULARITY_ADAPTIVE.
    pub granularity: u32,
    /// Bit d: device d maps in place.
    pub in_place_mask: u8,
    /// Bit d: device d may not use the pages.
    pub no_access_mask: u8,
    /// See UHMM_ADVISE_READ_MOSTLY.
    pub read_mostly: bool,
    /// See UHMM_ADVISE_DEVICE_READ_ONLY.
    pub device_read_only: bool,
    /// See UHMM_ADVISE_PIN.
    pub pinned: bool,
}

/// Says how a range will be used: `advice` is UHMM_ADVISE_*; `device` and `value` are what it says there, else NULL and 0. The same
/// advice again changes nothing.
///
/// Errors: -EINVAL not whole pages, or a part that is not managed; -EFAULT nothing of it is managed, or an advice, device or value that do not go
/// together; the services' own.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_advise(
    session: *mut uhmm_session,
    addr: *const c_void,
    len_bytes: u64,
    advice: u32,
    device: *mut uhmm_device,
    value: u32,
) -> c_int {
    guard(|| {
        let session = handles::get(session)?;
        let device = if device.is_null() { None } else { Some(handles::get(device)?.id()) };
        let advice = parse(advice, device, value)?;
        session.sdk.advise(address(addr)?, len_bytes, advice)?;
        Ok(())
    })
}

/// What was advised for a range.
///
/// Errors: -EINVAL not whole pages, or a part that is not managed; -EFAULT nothing of it is managed; the services' own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_attributes(
    session: *mut uhmm_session,
    addr: *const c_void,
    len_bytes: u64,
    attributes: *mut uhmm_attributes_info,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let attributes = unsafe { Out::new(attributes, "attributes") }?;
        let found = handles::get(session)?.sdk.attributes(address(addr)?, len_bytes)?;
        attributes.set(flatten(&found));
        Ok(())
    })
}

fn parse(advice: u32, device: Option<u8>, value: u32) -> Result<Advice, Failure> {
    let bad = |expected| Err(Failure::BadValue { name: "value", value: value.into(), expected });
    let parsed = match (advice, value) {
        (UHMM_ADVISE_PIN, 0) => Advice::Pin,
        (UHMM_ADVISE_UNPIN, 0) => Advice::Unpin,
        (UHMM_ADVISE_IN_PLACE, 0) => Advice::InPlace,
        (UHMM_ADVISE_MIGRATE_ON_FAULT, 0) => Advice::MigrateOnFault,
        (UHMM_ADVISE_DEVICE_READ_ONLY, 0) => Advice::DeviceReadOnly,
        (UHMM_ADVISE_DEVICE_READ_WRITE, 0) => Advice::DeviceReadWrite,
        (UHMM_ADVISE_ACCESS, mode) => {
            let Some(device) = device else { return Err(Failure::Null { name: "device" }) };
            let mode = match mode {
                UHMM_ACCESS_MIGRATE => AccessMode::Migrate,
                UHMM_ACCESS_IN_PLACE => AccessMode::InPlace,
                UHMM_ACCESS_NONE => AccessMode::None,
                _ => return bad("UHMM_ADVISE_ACCESS takes UHMM_ACCESS_*"),
            };
            return Ok(Advice::Access { device, mode });
        }
        (UHMM_ADVISE_PREFER, 0) => {
            return Ok(Advice::PreferredLocation(Some(device.map_or(Target::Home, Target::Device))));
        }
        (UHMM_ADVISE_PREFER_NONE, 0) => Advice::PreferredLocation(None),
        (UHMM_ADVISE_READ_MOSTLY, 0 | 1) => Advice::ReadMostly(value == 1),
        (UHMM_ADVISE_READ_MOSTLY, _) => return bad("UHMM_ADVISE_READ_MOSTLY takes 0 or 1"),
        (UHMM_ADVISE_GRANULARITY, UHMM_GRANULARITY_ADAPTIVE) => Advice::Granularity(None),
        (UHMM_ADVISE_GRANULARITY, 0..=63) => Advice::Granularity(Some(value as u8)),
        (UHMM_ADVISE_GRANULARITY, _) => {
            return bad("UHMM_ADVISE_GRANULARITY takes 0 to 63 or UHMM_GRANULARITY_ADAPTIVE");
        }
        (..=UHMM_ADVISE_GRANULARITY, _) => return bad("this advice takes no value: give 0"),
        _ => {
            let expected = "one of UHMM_ADVISE_*";
            return Err(Failure::BadValue { name: "advice", value: advice.into(), expected });
        }
    };
    match device {
        None => Ok(parsed),
        Some(id) => {
            let expected = "this advice takes no device: give NULL";
            Err(Failure::BadValue { name: "device", value: id.into(), expected })
        }
    }
}

pub(crate) fn place(target: Option<Target>) -> i32 {
    match target {
        None => UHMM_PLACE_NONE,
        Some(Target::Home) => UHMM_PLACE_HOME,
        Some(Target::Device(id)) => id.into(),
    }
}

fn flatten(found: &RangeAttributes) -> uhmm_attributes_info {
    let mut mixed = 0;
    let mut flags = Mixed(&mut mixed);
    let preferred = place(flags.one(&found.preferred, UHMM_MIXED_PREFERRED, None));
    let prefetched = place(flags.one(&found.prefetched, UHMM_MIXED_PREFETCHED, None));
    let granularity = flags.one(&found.granularity_log2_pages, UHMM_MIXED_GRANULARITY, None);
    let in_place_mask = flags.one(&found.in_place_mask, UHMM_MIXED_IN_PLACE, 0);
    let no_access_mask = flags.one(&found.no_access_mask, UHMM_MIXED_NO_ACCESS, 0);
    let read_mostly = flags.one(&found.read_mostly, UHMM_MIXED_READ_MOSTLY, false);
    let device_read_only = flags.one(&found.device_read_only, UHMM_MIXED_DEVICE_READ_ONLY, false);
    let pinned = flags.one(&found.pinned, UHMM_MIXED_PINNED, false);
    let granularity = granularity.map_or(UHMM_GRANULARITY_ADAPTIVE, u32::from);
    uhmm_attributes_info {
        mixed,
        preferred,
        prefetched,
        granularity,
        in_place_mask,
        no_access_mask,
        read_mostly,
        device_read_only,
        pinned,
    }
}

/// Collects which fields have no one value.
struct Mixed<'a>(&'a mut u32);

impl Mixed<'_> {
    fn one<T: Copy>(&mut self, field: &Uniform<T>, flag: u32, default: T) -> T {
        match field {
            Uniform::Same(value) => *value,
            Uniform::Mixed => {
                *self.0 |= flag;
                default
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_advice_is_understood() {
        for (advice, device, value, expected) in [
            (UHMM_ADVISE_PIN, None, 0, Advice::Pin),
            (UHMM_ADVISE_UNPIN, None, 0, Advice::Unpin),
            (UHMM_ADVISE_IN_PLACE, None, 0, Advice::InPlace),
            (UHMM_ADVISE_MIGRATE_ON_FAULT, None, 0, Advice::MigrateOnFault),
            (UHMM_ADVISE_DEVICE_READ_ONLY, None, 0, Advice::DeviceReadOnly),
            (UHMM_ADVISE_DEVICE_READ_WRITE, None, 0, Advice::DeviceReadWrite),
            (UHMM_ADVISE_ACCESS, Some(3), UHMM_ACCESS_NONE, Advice::Access { device: 3, mode: AccessMode::None }),
            (UHMM_ADVISE_PREFER, Some(3), 0, Advice::PreferredLocation(Some(Target::Device(3)))),
            (UHMM_ADVISE_PREFER, None, 0, Advice::PreferredLocation(Some(Target::Home))),
            (UHMM_ADVISE_PREFER_NONE, None, 0, Advice::PreferredLocation(None)),
            (UHMM_ADVISE_READ_MOSTLY, None, 1, Advice::ReadMostly(true)),
            (UHMM_ADVISE_GRANULARITY, None, 9, Advice::Granularity(Some(9))),
            (UHMM_ADVISE_GRANULARITY, None, UHMM_GRANULARITY_ADAPTIVE, Advice::Granularity(None)),
        ] {
            assert_eq!(parse(advice, device, value).unwrap(), expected);
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for (advice, device, value) in [
            (11, None, 0),
            (u32::MAX, None, 0),
            (UHMM_ADVISE_PIN, None, 1),
            (UHMM_ADVISE_PIN, Some(0), 0),
            (UHMM_ADVISE_ACCESS, None, UHMM_ACCESS_NONE),
            (UHMM_ADVISE_ACCESS, Some(0), 3),
            (UHMM_ADVISE_READ_MOSTLY, None, 2),
            (UHMM_ADVISE_GRANULARITY, None, 64),
            (UHMM_ADVISE_GRANULARITY, Some(0), 9),
        ] {
            assert_eq!(parse(advice, device, value).unwrap_err().errno(), libc::EINVAL, "{advice} {device:?} {value}");
        }
    }

    #[test]
    fn mixed_fields_are_flagged_and_hold_their_default() {
        let found = RangeAttributes {
            preferred: Uniform::Same(Some(Target::Device(1))),
            prefetched: Uniform::Mixed,
            in_place_mask: Uniform::Same(2),
            no_access_mask: Uniform::Mixed,
            read_mostly: Uniform::Same(true),
            device_read_only: Uniform::Mixed,
            granularity_log2_pages: Uniform::Same(Some(9)),
            pinned: Uniform::Same(false),
        };
        let expected = uhmm_attributes_info {
            mixed: UHMM_MIXED_PREFETCHED | UHMM_MIXED_NO_ACCESS | UHMM_MIXED_DEVICE_READ_ONLY,
            preferred: 1,
            prefetched: UHMM_PLACE_NONE,
            granularity: 9,
            in_place_mask: 2,
            no_access_mask: 0,
            read_mostly: true,
            device_read_only: false,
            pinned: false,
        };
        assert_eq!(flatten(&found), expected);
    }
}
