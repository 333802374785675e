//! Pointers of the C program, checked as far as they can be: null, alignment, length. What is left is the header's contract: a
//! pointer that is not null points to as much live memory as its length says, and nobody else writes there during the call.

use std::ffi::{CStr, c_char, c_void};
use std::mem::MaybeUninit;
use std::ptr::NonNull;

use crate::error::Failure;

/// Where one answer goes. Made before anything is done, so that no result is lost to a null pointer.
pub(crate) struct Out<T>(NonNull<T>);

impl<T> Out<T> {
    /// # Safety
    /// `place` is null, or the caller's variable for as long as this value lives.
    pub(crate) unsafe fn new(place: *mut T, name: &'static str) -> Result<Self, Failure> {
        checked(place, 1, name).map(Self)
    }

    /// For answers that the caller need not want: null is allowed.
    ///
    /// # Safety
    /// As [`Out::new`].
    pub(crate) unsafe fn optional(place: *mut T, name: &'static str) -> Result<Option<Self>, Failure> {
        if place.is_null() { Ok(None) } else { checked(place, 1, name).map(|place| Some(Self(place))) }
    }

    /// Gives the answer.
    pub(crate) fn set(self, value: T) {
        // SAFETY: not null and aligned (checked), and the caller's variable by the contract of `new`.
        unsafe { self.0.write(value) }
    }
}

/// `count` elements that the caller wrote.
///
/// # Safety
/// `first` is null, or points to `count` initialised elements that nobody changes for `'a`.
pub(crate) unsafe fn items<'a, T>(first: *const T, count: usize, name: &'static str) -> Result<&'a [T], Failure> {
    if count == 0 {
        return Ok(&[]);
    }
    let first = checked(first.cast_mut(), count, name)?;
    // SAFETY: not null, aligned and of a possible size (checked); initialised and unchanged by the contract.
    Ok(unsafe { std::slice::from_raw_parts(first.as_ptr(), count) })
}

/// Room for `count` elements, with no promise about what is there now.
///
/// # Safety
/// `first` is null, or points to room for `count` elements that nobody else uses for `'a`.
pub(crate) unsafe fn items_mut<'a, T>(
    first: *mut T,
    count: usize,
    name: &'static str,
) -> Result<&'a mut [MaybeUninit<T>], Failure> {
    if count == 0 {
        return Ok(&mut []);
    }
    let first = checked(first, count, name)?;
    // SAFETY: not null, aligned and of a possible size (checked), ours alone by the contract; MaybeUninit needs no initial value.
    Ok(unsafe { std::slice::from_raw_parts_mut(first.as_ptr().cast::<MaybeUninit<T>>(), count) })
}

/// Bytes that will be overwritten.
///
/// # Safety
/// As [`items_mut`].
pub(crate) unsafe fn bytes_mut<'a>(
    first: *mut c_void,
    len_bytes: u64,
    name: &'static str,
) -> Result<&'a mut [u8], Failure> {
    // SAFETY: the same contract.
    let bytes = unsafe { items_mut(first.cast::<u8>(), host_len(len_bytes, name)?, name) }?;
    // SAFETY: memory that C allocated has some byte everywhere, and every byte is a valid u8.
    Ok(unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast::<u8>(), bytes.len()) })
}

/// Words that will be overwritten.
///
/// # Safety
/// As [`items_mut`].
pub(crate) unsafe fn words_mut<'a>(
    first: *mut u64,
    count: usize,
    name: &'static str,
) -> Result<&'a mut [u64], Failure> {
    // SAFETY: the same contract.
    let words = unsafe { items_mut(first, count, name) }?;
    // SAFETY: memory that C allocated has some byte everywhere, and any bytes make words.
    Ok(unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u64>(), words.len()) })
}

/// Bytes that the caller wrote.
///
/// # Safety
/// As [`items`].
pub(crate) unsafe fn bytes<'a>(first: *const c_void, len_bytes: u64, name: &'static str) -> Result<&'a [u8], Failure> {
    // SAFETY: the same contract.
    unsafe { items(first.cast::<u8>(), host_len(len_bytes, name)?, name) }
}

/// Text that ends with a zero.
///
/// # Safety
/// `text` is null, or points to bytes that end with a zero and do not change for `'a`.
pub(crate) unsafe fn text<'a>(text: *const c_char, name: &'static str) -> Result<&'a str, Failure> {
    if text.is_null() {
        return Err(Failure::Null { name });
    }
    // SAFETY: not null (checked), ends with a zero by the contract.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| Failure::NotText { name })
}

/// The address that the SDK shall work on. Never dereferenced here.
pub(crate) fn address<T>(addr: *const T) -> Result<u64, Failure> {
    if addr.is_null() { Err(Failure::Null { name: "addr" }) } else { Ok(addr.addr() as u64) }
}

fn checked<T>(first: *mut T, count: usize, name: &'static str) -> Result<NonNull<T>, Failure> {
    let found = NonNull::new(first).ok_or(Failure::Null { name })?;
    if !found.is_aligned() {
        return Err(Failure::Misaligned { name, align: align_of::<T>() });
    }
    match count.checked_mul(size_of::<T>()) {
        Some(size) if isize::try_from(size).is_ok() && found.addr().checked_add(size).is_some() => Ok(found),
        _ => Err(Failure::TooLong { name, count }),
    }
}

pub(crate) fn host_len(len_bytes: u64, name: &'static str) -> Result<usize, Failure> {
    usize::try_from(len_bytes).map_err(|_| Failure::TooLong { name, count: usize::MAX })
}

/// As much of `text` as there is room for, always with its final zero (cut between characters). Returns nothing: the caller
/// says the full length where it matters.
pub(crate) fn copy_text(text: &str, into: &mut [MaybeUninit<c_char>]) {
    let Some(room) = into.len().checked_sub(1) else { return };
    let end = (0..=room.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    for (place, byte) in into.iter_mut().zip(text.as_bytes()[..end].iter().chain(&[0])) {
        place.write(*byte as c_char);
    }
}

/// A fixed field of a structure: text, zeros behind it.
pub(crate) fn text_field<const N: usize>(text: &str) -> [c_char; N] {
    let mut field = [MaybeUninit::new(0); N];
    copy_text(text, &mut field);
    // Every element was initialised above.
    field.map(|char| {
        // SAFETY: see above.
        unsafe { char.assume_init() }
    })
}

/// Copies what there is room for to the caller's array.
pub(crate) fn copy_items<T: Copy>(from: impl IntoIterator<Item = T>, into: &mut [MaybeUninit<T>]) -> usize {
    into.iter_mut().zip(from).map(|(place, item)| place.write(item)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_misaligned_and_endless_buffers_are_refused() {
        let mut words = [0u64; 2];
        let odd = words.as_mut_ptr().cast::<u8>().wrapping_add(1).cast::<u64>();
        // SAFETY: nothing that is refused is touched, and the array has two elements.
        unsafe {
            assert!(matches!(items(std::ptr::null::<u64>(), 1, "x"), Err(Failure::Null { name: "x" })));
            assert!(matches!(items(odd, 1, "x"), Err(Failure::Misaligned { align: 8, .. })));
            assert!(matches!(items(words.as_ptr(), usize::MAX / 8, "x"), Err(Failure::TooLong { .. })));
            assert!(matches!(bytes_mut(words.as_mut_ptr().cast(), u64::MAX, "x"), Err(Failure::TooLong { .. })));
            assert!(matches!(Out::new(odd, "x"), Err(Failure::Misaligned { .. })));
            assert_eq!(items(std::ptr::null::<u64>(), 0, "x").unwrap(), [0u64; 0]);
            assert_eq!(items(words.as_ptr(), 2, "x").unwrap(), [0, 0]);
            assert!(matches!(text(c"\xff".as_ptr(), "x"), Err(Failure::NotText { .. })));
            assert_eq!(text(c"soft0".as_ptr(), "x").unwrap(), "soft0");
        }
        assert!(matches!(address(std::ptr::null::<u8>()), Err(Failure::Null { name: "addr" })));
    }

    #[test]
    fn text_is_cut_between_characters_and_always_ends() {
        assert_eq!(text_field::<4>("ab"), [b'a' as c_char, b'b' as c_char, 0, 0]);
        assert_eq!(text_field::<3>("abcd"), [b'a' as c_char, b'b' as c_char, 0]);
        assert_eq!(text_field::<3>("aü"), [b'a' as c_char, 0, 0], "half of a character is left out");
        assert_eq!(text_field::<1>("a"), [0]);
    }

    #[test]
    fn arrays_get_what_fits() {
        let mut room = [MaybeUninit::new(9u64); 3];
        assert_eq!(copy_items([1, 2], &mut room), 2);
        assert_eq!(copy_items([1, 2, 3, 4], &mut room), 3);
    }
}
