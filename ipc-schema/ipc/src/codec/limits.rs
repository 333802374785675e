//! Bounded texts, blobs and lists, in both directions.

use capnp::{data, text};

use super::error::{DecodeError, EncodeError};

/// A text to be written, if it is short enough.
pub(super) fn out_text<'a>(field: &'static str, value: &'a str, max: u32) -> Result<&'a str, EncodeError> {
    out_len(field, value.len(), max).map(|_| value)
}

/// A blob to be written, if it is short enough.
pub(super) fn out_data<'a>(field: &'static str, value: &'a [u8], max: u32) -> Result<&'a [u8], EncodeError> {
    out_len(field, value.len(), max).map(|_| value)
}

/// A list length to be written, if it is small enough.
pub(super) fn out_len(field: &'static str, len: usize, max: u32) -> Result<u32, EncodeError> {
    let max = max as usize;
    if len <= max { Ok(len as u32) } else { Err(EncodeError::TooLong { field, len, max }) }
}

/// A text that came.
pub(super) fn in_text(
    field: &'static str,
    value: capnp::Result<text::Reader<'_>>,
    max: u32,
) -> Result<String, DecodeError> {
    let value = value?;
    in_len(field, value.len() as u32, max)?;
    value.to_string().map_err(|_| DecodeError::Text { field })
}

/// A blob that came.
pub(super) fn in_data(
    field: &'static str,
    value: capnp::Result<data::Reader<'_>>,
    max: u32,
) -> Result<Vec<u8>, DecodeError> {
    let value = value?;
    in_len(field, value.len() as u32, max)?;
    Ok(value.to_vec())
}

/// A list length that came.
pub(super) fn in_len(field: &'static str, len: u32, max: u32) -> Result<usize, DecodeError> {
    let (len, max) = (len as usize, max as usize);
    if len <= max { Ok(len) } else { Err(DecodeError::TooLong { field, len, max }) }
}

/// A pointer field that must be there.
pub(super) fn present(field: &'static str, has: bool) -> Result<(), DecodeError> {
    if has { Ok(()) } else { Err(DecodeError::Missing { field }) }
}
