//! Claims on the wire.

use uhmm_schema::pager_capnp::{
    MAX_CLAIM_ID_BYTES, MAX_CLAIM_NAME_BYTES, MAX_CLAIMS_TOLD, claim, claims, device_use, share,
};
use uhmm_schema::sdk_capnp::{MAX_DEVICES, MAX_TOKEN_BYTES};

use crate::codec::error::{DecodeError, EncodeError};
use crate::codec::limits::{in_data, in_len, in_text, out_data, out_len, out_text};
use crate::message::pager::{Claim, ClaimShare, Claims, DeviceUse};

pub(super) fn write_claim(from: &Claim, mut to: claim::Builder<'_>) -> Result<(), EncodeError> {
    to.set_id(out_text("claim.id", &from.id, MAX_CLAIM_ID_BYTES)?);
    to.set_name(out_text("claim.name", &from.name, MAX_CLAIM_NAME_BYTES)?);
    to.set_token(out_data("claim.token", &from.token, MAX_TOKEN_BYTES)?);
    to.set_spaces(from.spaces);
    let mut list = to.init_shares(out_len("claim.shares", from.shares.len(), MAX_DEVICES)?);
    for (index, share) in from.shares.iter().enumerate() {
        let mut to = list.reborrow().get(index as u32);
        to.set_device(share.device);
        to.set_bytes(share.bytes);
        to.set_used_bytes(share.used_bytes);
    }
    Ok(())
}

pub(super) fn read_claim(from: claim::Reader<'_>) -> Result<Claim, DecodeError> {
    let list = from.get_shares()?;
    in_len("claim.shares", list.len(), MAX_DEVICES)?;
    let share = |from: share::Reader<'_>| ClaimShare {
        device: from.get_device(),
        bytes: from.get_bytes(),
        used_bytes: from.get_used_bytes(),
    };
    Ok(Claim {
        id: in_text("claim.id", from.get_id(), MAX_CLAIM_ID_BYTES)?,
        name: in_text("claim.name", from.get_name(), MAX_CLAIM_NAME_BYTES)?,
        token: in_data("claim.token", from.get_token(), MAX_TOKEN_BYTES)?,
        shares: list.iter().map(share).collect(),
        spaces: from.get_spaces(),
    })
}

pub(super) fn write_claims(from: &Claims, mut to: claims::Builder<'_>) -> Result<(), EncodeError> {
    to.set_more(from.more);
    to.set_has_rules(from.has_rules);
    let mut list = to.reborrow().init_claims(out_len("claims.claims", from.claims.len(), MAX_CLAIMS_TOLD)?);
    for (index, claim) in from.claims.iter().enumerate() {
        write_claim(claim, list.reborrow().get(index as u32))?;
    }
    let mut list = to.init_devices(out_len("claims.devices", from.devices.len(), MAX_DEVICES)?);
    for (index, device) in from.devices.iter().enumerate() {
        let mut to = list.reborrow().get(index as u32);
        to.set_device(device.device);
        to.set_name(out_text("claims.device", &device.name, MAX_CLAIM_NAME_BYTES)?);
        to.set_memory_bytes(device.memory_bytes);
        to.set_free_bytes(device.free_bytes);
        to.set_closed(device.closed);
    }
    Ok(())
}

pub(super) fn read_claims(from: claims::Reader<'_>) -> Result<Claims, DecodeError> {
    let (claims, devices) = (from.get_claims()?, from.get_devices()?);
    in_len("claims.claims", claims.len(), MAX_CLAIMS_TOLD)?;
    in_len("claims.devices", devices.len(), MAX_DEVICES)?;
    let device = |from: device_use::Reader<'_>| -> Result<DeviceUse, DecodeError> {
        Ok(DeviceUse {
            device: from.get_device(),
            name: in_text("claims.device", from.get_name(), MAX_CLAIM_NAME_BYTES)?,
            memory_bytes: from.get_memory_bytes(),
            free_bytes: from.get_free_bytes(),
            closed: from.get_closed(),
        })
    };
    Ok(Claims {
        claims: claims.iter().map(read_claim).collect::<Result<_, _>>()?,
        more: from.get_more(),
        devices: devices.iter().map(device).collect::<Result<_, _>>()?,
        has_rules: from.get_has_rules(),
    })
}
