//! Always-on counters.

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters since the start of the pager.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Stats {
            /// Name and value of each.
            pub fn counters(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

counters! {
    /// CPU faults reported.
    cpu_faults,
    /// Of those: on a page that was on the move (raised again when it has arrived).
    parked,
    /// Device faults asked for.
    device_faults,
    /// Pages moved to devices.
    pages_out,
    /// Pages on coherent devices that the program reaches there.
    cpu_mapped,
    /// Pages brought home, for whatever reason.
    pages_home,
    /// Of those: because a device was full.
    evicted,
    /// Pages that eviction passed over because their device had used them since it came by last.
    second_chances,
    /// Pages moved from device to device.
    pages_across,
    /// Pages copied to devices for reading, the system page stays.
    duplicated,
    /// Such copies that ended.
    collapsed,
    /// Pages on devices that a forked child shares with its parent.
    shared,
    /// Device faults that had to wait because their block thrashes.
    throttled,
    /// Device faults that had to wait until a frame was free.
    faults_waited_for_frame,
    /// Pages zeroed for the CPU.
    zero_filled,
    /// Pages mapped for the CPU that the backing had already.
    continues,
    /// Revocations asked for.
    revokes,
    /// Steps repeated because an event of the address space was unread.
    retries,
    /// Frames scrubbed.
    scrubbed,
    /// Pages lost.
    poisoned,
    /// Transfers rolled back or finished after a restart.
    recovered_transfers,
    /// Copies that failed.
    copy_failures,
}
