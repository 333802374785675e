//! Which memory `adopt_all` puts under management: pure functions over plain data, so that this can be replaced by a policy from outside.

use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};

use super::maps::Mapping;
use crate::refused::is_kernels;

/// Neighbouring pieces that are smaller than this together are not worth a region of their own. Not for the heap.
pub const ADOPT_ALL_MIN_BYTES: u64 = 64 << 10;
/// What has grown onto managed heap waits until it is this part of it, so that the number of regions grows with the logarithm of the heap.
const HEAP_GROWTH_PART: u64 = 16;
/// A guard in front of a stack is no longer than this; a longer mapping without rights is something that the program has reserved.
const GUARD_MAX_BYTES: u64 = 1 << 20;
/// How much of the memory before a thread's control block may be its thread-local storage, where it is not part of a stack.
const TLS_BYTES: u64 = 64 << 10;
/// How much from the page of a robust list's head on belongs to the thread: the rest of its control block, with which a stack ends.
const CONTROL_BLOCK_BYTES: u64 = 2 * PAGE_SIZE;

/// Why [`Session::adopt_all`](crate::Session::adopt_all) leaves memory alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum LeftAlone {
    /// uhmm's own.
    Own,
    /// Shared mappings: adopt them one by one ([`Session::adopt`](crate::Session::adopt)).
    Shared,
    /// Private mappings of files, which Linux does not let anybody manage.
    File,
    /// Private hugetlb memory.
    HugePages,
    /// What the kernel maps into every process, and devices' memory.
    Kernel,
    /// Executable memory.
    Executable,
    /// Stacks that grow by themselves.
    GrowsDown,
    /// Neither readable nor writable: reserved addresses.
    NoAccess,
    /// Stacks and control blocks of threads: the kernel writes there when a thread ends, and does not wait for a page then.
    ThreadStack,
    /// Given back by [`Session::release`](crate::Session::release).
    Released,
    /// mlock.
    Locked,
    /// MADV_DONTFORK.
    NotInherited,
    /// MADV_WIPEONFORK.
    WipedInChildren,
    /// mseal.
    Sealed,
    /// Less than [`ADOPT_ALL_MIN_BYTES`] together with its neighbours, or a small growth of the heap.
    Small,
    /// The manifest's quota is reached.
    Quota,
    /// The pager or the kernel refused it: another userfaultfd has it, for example.
    Refused,
}

impl LeftAlone {
    /// All reasons, in the order of their numbers in the C interface.
    pub const ALL: [LeftAlone; 17] = [
        Self::Own,
        Self::Shared,
        Self::File,
        Self::HugePages,
        Self::Kernel,
        Self::Executable,
        Self::GrowsDown,
        Self::NoAccess,
        Self::ThreadStack,
        Self::Released,
        Self::Locked,
        Self::NotInherited,
        Self::WipedInChildren,
        Self::Sealed,
        Self::Small,
        Self::Quota,
        Self::Refused,
    ];

    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Self::Own => "uhmm's own",
            Self::Shared => "shared",
            Self::File => "private memory of files",
            Self::HugePages => "private hugetlb memory",
            Self::Kernel => "the kernel's or a device's",
            Self::Executable => "executable",
            Self::GrowsDown => "growing downwards",
            Self::NoAccess => "without any rights",
            Self::ThreadStack => "threads' stacks and control blocks",
            Self::Released => "given back by the program",
            Self::Locked => "locked",
            Self::NotInherited => "not inherited by children",
            Self::WipedInChildren => "wiped in children",
            Self::Sealed => "sealed",
            Self::Small => "too small",
            Self::Quota => "over the quota",
            Self::Refused => "refused by the pager or the kernel",
        }
    }
}

impl std::fmt::Display for LeftAlone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.text())
    }
}

/// What is around a mapping, or a piece of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Surroundings {
    /// A mapping of the SDK's own lies in it.
    pub(crate) own: bool,
    /// It holds words that the kernel writes when a thread ends, or belongs to such a thread's stack.
    pub(crate) thread: bool,
    /// A guard lies right before it, or is its first page.
    pub(crate) guarded: bool,
    /// The program has released it.
    pub(crate) released: bool,
}

/// Whether memory of this kind is adopted. Size and quota come later.
pub(crate) fn decide(mapping: &Mapping, around: &Surroundings) -> Result<(), LeftAlone> {
    let flags = &mapping.flags;
    let rules = [
        (around.own, LeftAlone::Own),
        (mapping.shared, LeftAlone::Shared),
        (flags.huge_pages || mapping.name.starts_with("/anon_hugepage"), LeftAlone::HugePages),
        (mapping.inode != 0, LeftAlone::File),
        (is_kernels(&mapping.name) || flags.device, LeftAlone::Kernel),
        (mapping.exec, LeftAlone::Executable),
        (mapping.name == "[stack]" || flags.grows_down, LeftAlone::GrowsDown),
        (!mapping.read && !mapping.write, LeftAlone::NoAccess),
        (around.thread || around.guarded, LeftAlone::ThreadStack),
        (around.released, LeftAlone::Released),
        (flags.locked, LeftAlone::Locked),
        (flags.not_inherited, LeftAlone::NotInherited),
        (flags.wiped_in_children, LeftAlone::WipedInChildren),
        (flags.sealed, LeftAlone::Sealed),
        // Whoever is registered here and is not managed is somebody else's.
        (flags.registered, LeftAlone::Refused),
    ];
    rules.iter().find(|(applies, _)| *applies).map_or(Ok(()), |(_, why)| Err(*why))
}

/// Whether neighbouring pieces, each of which is adopted by its kind, are worth a region. `heap`: they lie in `[heap]`; then
/// `managed_before` bytes right before them are managed already.
pub(crate) fn worth(run: AddrRange, heap: bool, managed_before: u64) -> Result<(), LeftAlone> {
    let least = match (heap, managed_before) {
        (true, 0) => PAGE_SIZE,
        (true, before) => ADOPT_ALL_MIN_BYTES.max(before / HEAP_GROWTH_PART),
        (false, _) => ADOPT_ALL_MIN_BYTES,
    };
    if run.len < least { Err(LeftAlone::Small) } else { Ok(()) }
}

/// Whether `mapping` follows a guard as the C library puts in front of a thread's stack, also of one that is kept for the next thread.
pub(crate) fn follows_guard(before: Option<&Mapping>, mapping: &Mapping) -> bool {
    before.is_some_and(|guard| {
        let no_rights = !guard.read && !guard.write && !guard.exec;
        no_rights
            && guard.is_private_anonymous()
            && guard.range.len <= GUARD_MAX_BYTES
            && guard.range.end() == mapping.range.start
    })
}

/// Cuts a mapping where threads' control blocks are; `heads`: of the robust lists in it, in order. A stack belongs to its thread from the
/// mapping's start to its control block, with which it ends: the kernel may have joined other memory of the same kind to it. Where the C
/// library has put a control block in the middle of other memory (the first thread's), that and what may be its thread-local
/// storage is left out. The second value of a piece: it belongs to a thread.
pub(crate) fn cut(mapping: AddrRange, stack: bool, heads: &[u64]) -> Vec<(AddrRange, bool)> {
    let mut pieces = Vec::new();
    let mut next = mapping.start;
    let mut push = |from: u64, end: u64, thread: bool| {
        if from < end {
            pieces.push((AddrRange { start: from, len: end - from }, thread));
        }
    };
    for (index, head) in heads.iter().enumerate() {
        let page = head / PAGE_SIZE * PAGE_SIZE;
        let end = (page + CONTROL_BLOCK_BYTES).min(mapping.end());
        let start = if stack && index == 0 { mapping.start } else { page.saturating_sub(TLS_BYTES).max(next) };
        push(next, start, false);
        push(start.max(next), end, true);
        next = next.max(end);
    }
    push(next, mapping.end(), false);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adopt_all::maps::VmFlags;

    fn mapping(line: &str) -> Mapping {
        Mapping::parse(line).unwrap()
    }

    fn plain() -> Mapping {
        mapping("10000-90000 rw-p 00000000 00:00 0 ")
    }

    #[test]
    fn private_anonymous_memory_is_adopted_whatever_it_is_called() {
        let nothing = Surroundings::default();
        for line in [
            "10000-90000 rw-p 00000000 00:00 0 ",
            "10000-90000 r--p 00000000 00:00 0 ",
            "10000-90000 rw-p 00000000 00:00 0 [heap]",
            "10000-90000 rw-p 00000000 00:00 0 [anon:a name]",
        ] {
            assert_eq!(decide(&mapping(line), &nothing), Ok(()), "{line}");
        }
    }

    #[test]
    fn what_maps_tells_is_left_alone_by_name() {
        for (line, why) in [
            ("10000-90000 rw-s 00000000 00:01 7 /dev/zero (deleted)", LeftAlone::Shared),
            ("10000-90000 rw-p 00000000 08:01 7 /lib/libc.so.6", LeftAlone::File),
            ("10000-90000 rw-p 00000000 00:0f 7 /anon_hugepage (deleted)", LeftAlone::HugePages),
            ("10000-90000 r--p 00000000 00:00 0 [vvar]", LeftAlone::Kernel),
            ("10000-90000 r-xp 00000000 00:00 0 [vdso]", LeftAlone::Kernel),
            ("10000-90000 --xp 00000000 00:00 0 [vsyscall]", LeftAlone::Kernel),
            ("10000-90000 rwxp 00000000 00:00 0 ", LeftAlone::Executable),
            ("10000-90000 rw-p 00000000 00:00 0 [stack]", LeftAlone::GrowsDown),
            ("10000-90000 ---p 00000000 00:00 0 ", LeftAlone::NoAccess),
        ] {
            assert_eq!(decide(&mapping(line), &Surroundings::default()), Err(why), "{line}");
        }
    }

    #[test]
    fn what_the_surroundings_tell_is_left_alone() {
        let nothing = Surroundings::default();
        for (around, why) in [
            (Surroundings { own: true, ..nothing }, LeftAlone::Own),
            (Surroundings { thread: true, ..nothing }, LeftAlone::ThreadStack),
            (Surroundings { guarded: true, ..nothing }, LeftAlone::ThreadStack),
            (Surroundings { released: true, ..nothing }, LeftAlone::Released),
        ] {
            assert_eq!(decide(&plain(), &around), Err(why));
        }
    }

    #[test]
    fn what_smaps_tells_is_left_alone() {
        let none = VmFlags::default();
        for (flags, why) in [
            (VmFlags { locked: true, ..none }, LeftAlone::Locked),
            (VmFlags { not_inherited: true, ..none }, LeftAlone::NotInherited),
            (VmFlags { wiped_in_children: true, ..none }, LeftAlone::WipedInChildren),
            (VmFlags { grows_down: true, ..none }, LeftAlone::GrowsDown),
            (VmFlags { huge_pages: true, ..none }, LeftAlone::HugePages),
            (VmFlags { sealed: true, ..none }, LeftAlone::Sealed),
            (VmFlags { device: true, ..none }, LeftAlone::Kernel),
            (VmFlags { registered: true, ..none }, LeftAlone::Refused),
        ] {
            assert_eq!(decide(&Mapping { flags, ..plain() }, &Surroundings::default()), Err(why));
        }
    }

    #[test]
    fn small_runs_and_small_growth_of_the_heap_wait() {
        let run = |len| AddrRange { start: 0x100000, len };
        assert_eq!(worth(run(ADOPT_ALL_MIN_BYTES), false, 0), Ok(()));
        assert_eq!(worth(run(ADOPT_ALL_MIN_BYTES - PAGE_SIZE), false, 1 << 30), Err(LeftAlone::Small));
        assert_eq!(worth(run(PAGE_SIZE), true, 0), Ok(()), "the heap as it begins");
        assert_eq!(worth(run(ADOPT_ALL_MIN_BYTES), true, 1 << 20), Ok(()));
        assert_eq!(worth(run(1 << 20), true, 32 << 20), Err(LeftAlone::Small));
        assert_eq!(worth(run(2 << 20), true, 32 << 20), Ok(()));
    }

    #[test]
    fn a_guard_is_short_has_no_rights_and_lies_right_before() {
        let stack = plain();
        let follows = |line| follows_guard(Some(&mapping(line)), &stack);
        assert!(follows("f000-10000 ---p 00000000 00:00 0 "));
        assert!(!follows("e000-f000 ---p 00000000 00:00 0 "), "a gap");
        assert!(!follows("f000-10000 r--p 00000000 00:00 0 "));
        assert!(!follows("f000-10000 ---p 00000000 08:01 5 /lib/libc.so.6"));
        assert!(!follows_guard(None, &stack));
        let far = mapping("10000000-10010000 rw-p 00000000 00:00 0 ");
        assert!(!follows_guard(Some(&mapping("f000000-10000000 ---p 00000000 00:00 0 ")), &far), "16 MiB are reserved");
    }

    const P: u64 = PAGE_SIZE;

    fn pieces(stack: bool, heads: &[u64]) -> Vec<(u64, u64, bool)> {
        let whole = AddrRange { start: 1000 * P, len: 1000 * P };
        let cut = cut(whole, stack, heads);
        assert_eq!(cut.iter().map(|(piece, _)| piece.len).sum::<u64>(), whole.len, "nothing is lost");
        cut.into_iter().map(|(piece, thread)| (piece.start / P, piece.len / P, thread)).collect()
    }

    #[test]
    fn a_stack_ends_with_its_control_block_and_what_was_joined_to_it_does_not_belong_to_it() {
        assert_eq!(pieces(true, &[1998 * P + 0x2e0]), [(1000, 1000, true)]);
        assert_eq!(pieces(true, &[1499 * P]), [(1000, 501, true), (1501, 499, false)]);
    }

    #[test]
    fn a_control_block_in_the_middle_is_cut_out_with_its_thread_local_storage() {
        assert_eq!(pieces(false, &[]), [(1000, 1000, false)]);
        assert_eq!(pieces(false, &[1500 * P]), [(1000, 484, false), (1484, 18, true), (1502, 498, false)]);
        assert_eq!(pieces(false, &[1000 * P]), [(1000, 2, true), (1002, 998, false)]);
        assert_eq!(pieces(false, &[1999 * P]), [(1000, 983, false), (1983, 17, true)]);
    }

    #[test]
    fn several_threads_in_one_mapping_are_cut_out_each() {
        let two = pieces(true, &[1099 * P, 1500 * P]);
        assert_eq!(two, [(1000, 101, true), (1101, 383, false), (1484, 18, true), (1502, 498, false)]);
        assert_eq!(
            pieces(false, &[1500 * P, 1500 * P + 64, 1503 * P]),
            [(1000, 484, false), (1484, 18, true), (1502, 3, true), (1505, 495, false)]
        );
    }
}
