//! Pointer chasing: one dependent load after the other, the access pattern that only works with shared virtual addresses.
//!
//! * `list_walk(head, next_offset, value_offset) -> [nodes, sum]`: follows `next` until null; wrapping sum of the `u64` values.
//!   A cyclic list is walked until the job is cancelled.

use super::{DeviceView, Kernel, KernelResult, field, invalid};

/// Kernels of this family.
pub const KERNELS: &[Kernel] = &[Kernel {
    name: "list_walk",
    usage: "list_walk(head, next_offset, value_offset) -> [nodes, wrapping sum of u64 values]",
    argument_count: 3,
    idempotent: true,
    run: list_walk,
}];

fn list_walk(view: &mut dyn DeviceView, args: &[u64]) -> KernelResult<Vec<u64>> {
    let &[head, next_offset, value_offset] = args else {
        return invalid("Kernel list_walk takes 3 arguments".into());
    };
    let (mut node, mut nodes, mut sum) = (head, 0_u64, 0_u64);
    while node != 0 {
        sum = sum.wrapping_add(view.load_u64(field(node, value_offset)?)?);
        nodes += 1;
        node = view.load_u64(field(node, next_offset)?)?;
    }
    Ok(vec![nodes, sum])
}
