//! Atomic arithmetic, the one family that must not run twice.
//!
//! * `atomic_add(addr, value, times) -> [last old value]`: adds `value` to the `u64` at `addr`, `times` times, each in one
//!   atomic step even against CPU and other devices (the page has one owner at a time). `addr` is a multiple of 8.

use super::{DeviceView, Kernel, KernelResult, invalid};

/// Kernels of this family.
pub const KERNELS: &[Kernel] = &[Kernel {
    name: "atomic_add",
    usage: "atomic_add(addr, value, times) -> [value before the last addition], not idempotent",
    argument_count: 3,
    idempotent: false,
    run: atomic_add,
}];

fn atomic_add(view: &mut dyn DeviceView, args: &[u64]) -> KernelResult<Vec<u64>> {
    let &[addr, value, times] = args else { return invalid("Kernel atomic_add takes 3 arguments".into()) };
    let mut old = None;
    for _ in 0..times {
        old = Some(view.fetch_add_u64(addr, value)?);
    }
    match old {
        Some(old) => Ok(vec![old]),
        None => invalid("Kernel atomic_add: times is 0, there is no old value to return".into()),
    }
}
