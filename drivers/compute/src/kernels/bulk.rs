//! Bulk work on byte ranges, one page at a time.
//!
//! * `fill(addr, len_bytes, value) -> []`: every byte becomes `value` (0..=255).
//! * `copy(dst, src, len_bytes) -> []`: the ranges must not overlap.
//! * `sum(addr, len_bytes) -> [sum]`: wrapping sum of `u64`s; address and length are multiples of 8.
//! * `scan(addr, len_bytes, byte) -> [count]`: occurrences of a byte.

use super::{DeviceView, Kernel, KernelResult, field, invalid, page_pieces};
use uhmm_driver_kit::PAGE_BYTES;

/// Kernels of this family.
pub const KERNELS: &[Kernel] = &[
    Kernel {
        name: "fill",
        usage: "fill(addr, len_bytes, value 0..=255) -> []",
        argument_count: 3,
        idempotent: true,
        run: fill,
    },
    Kernel {
        name: "copy",
        usage: "copy(dst, src, len_bytes) -> [], ranges must not overlap",
        argument_count: 3,
        idempotent: true,
        run: copy,
    },
    Kernel {
        name: "sum",
        usage: "sum(addr, len_bytes) -> [wrapping sum of u64], both multiples of 8",
        argument_count: 2,
        idempotent: true,
        run: sum,
    },
    Kernel {
        name: "scan",
        usage: "scan(addr, len_bytes, byte 0..=255) -> [occurrences]",
        argument_count: 3,
        idempotent: true,
        run: scan,
    },
];

const PAGE: usize = PAGE_BYTES as usize;

fn fill(view: &mut dyn DeviceView, args: &[u64]) -> KernelResult<Vec<u64>> {
    let &[addr, len_bytes, value] = args else { return invalid("Kernel fill takes 3 arguments".into()) };
    let page = [byte_argument("value", value)?; PAGE];
    for (at, len) in page_pieces(addr, len_bytes)? {
        view.write(at, &page[..len])?;
    }
    Ok(Vec::new())
}

fn copy(view: &mut dyn DeviceView, args: &[u64]) -> KernelResult<Vec<u64>> {
    let &[dst, src, len_bytes] = args else { return invalid("Kernel copy takes 3 arguments".into()) };
    let (dst_end, src_end) = (field(dst, len_bytes)?, field(src, len_bytes)?);
    if dst < src_end && src < dst_end {
        return invalid(format!("Kernel copy: {len_bytes} bytes at {dst:#x} and at {src:#x} overlap"));
    }
    let mut page = [0; PAGE];
    for (at, len) in page_pieces(dst, len_bytes)? {
        view.read(src + (at - dst), &mut page[..len])?;
        view.write(at, &page[..len])?;
    }
    Ok(Vec::new())
}

fn sum(view: &mut dyn DeviceView, args: &[u64]) -> KernelResult<Vec<u64>> {
    let &[addr, len_bytes] = args else { return invalid("Kernel sum takes 2 arguments".into()) };
    if !addr.is_multiple_of(8) || !len_bytes.is_multiple_of(8) {
        return invalid(format!("Kernel sum: address {addr:#x} and length {len_bytes} must be multiples of 8"));
    }
    let mut page = [0; PAGE];
    let mut total = 0_u64;
    for (at, len) in page_pieces(addr, len_bytes)? {
        view.read(at, &mut page[..len])?;
        let (words, _) = page[..len].as_chunks::<8>();
        total = words.iter().fold(total, |total, word| total.wrapping_add(u64::from_ne_bytes(*word)));
    }
    Ok(vec![total])
}

fn scan(view: &mut dyn DeviceView, args: &[u64]) -> KernelResult<Vec<u64>> {
    let &[addr, len_bytes, byte] = args else { return invalid("Kernel scan takes 3 arguments".into()) };
    let wanted = byte_argument("byte", byte)?;
    let mut page = [0; PAGE];
    let mut count = 0;
    for (at, len) in page_pieces(addr, len_bytes)? {
        view.read(at, &mut page[..len])?;
        count += page[..len].iter().filter(|&&byte| byte == wanted).count() as u64;
    }
    Ok(vec![count])
}

fn byte_argument(name: &str, value: u64) -> KernelResult<u8> {
    u8::try_from(value).or_else(|_| invalid(format!("Argument {name} is {value}: it must be a byte, 0..=255")))
}
