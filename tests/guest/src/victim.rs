//! What the suites agree on with `guest-victim`, a driver of edu that is there to be killed during DMA.

/// Where its "queue" is mapped, to which it starts a DMA before it says that it did.
pub const KEPT_IOVA: u64 = 0x10_0000;
/// Where it has mapped something that nobody will take over.
pub const STALE_IOVA: u64 = 0x20_0000;
/// What it leaves in the device's scratch register: a reset would clear it.
pub const SCRATCH: u32 = 0xfeed;
/// Names under which it sends the descriptors of the two, beside those of the device.
pub const QUEUE: &str = "queue";
/// See [`QUEUE`].
pub const STALE: &str = "stale";
