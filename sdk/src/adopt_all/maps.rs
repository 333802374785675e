//! /proc/self/maps and smaps as plain data. Read through /proc/thread-self: by number it would be somebody else's under another PID
//! namespace's /proc.

use std::io::{self, BufRead, BufReader};

use uhmm_kernel_hook::AddrRange;

/// What smaps alone tells of a mapping: the line `VmFlags`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct VmFlags {
    /// `lo`: mlock.
    pub(crate) locked: bool,
    /// `dc`: MADV_DONTFORK.
    pub(crate) not_inherited: bool,
    /// `wf`: MADV_WIPEONFORK.
    pub(crate) wiped_in_children: bool,
    /// `gd`: MAP_GROWSDOWN.
    pub(crate) grows_down: bool,
    /// `ht`: hugetlb.
    pub(crate) huge_pages: bool,
    /// `sl`: mseal.
    pub(crate) sealed: bool,
    /// `io`, `pf`: a device's memory.
    pub(crate) device: bool,
    /// `um`, `uw`, `ui`: registered with some userfaultfd.
    pub(crate) registered: bool,
}

impl VmFlags {
    fn parse(words: &str) -> Self {
        let has = |flag: &str| words.split_whitespace().any(|word| word == flag);
        Self {
            locked: has("lo"),
            not_inherited: has("dc"),
            wiped_in_children: has("wf"),
            grows_down: has("gd"),
            huge_pages: has("ht"),
            sealed: has("sl"),
            device: has("io") || has("pf"),
            registered: has("um") || has("uw") || has("ui"),
        }
    }
}

/// One mapping of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) range: AddrRange,
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) exec: bool,
    pub(crate) shared: bool,
    /// Of the file below, 0 for none.
    pub(crate) inode: u64,
    /// A path, the kernel's name in brackets, or nothing.
    pub(crate) name: String,
    /// None of them, where only maps was read.
    pub(crate) flags: VmFlags,
}

impl Mapping {
    /// One line of maps, or the first of an entry of smaps.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        let len = end.checked_sub(start)?;
        let rights = fields.next()?.as_bytes();
        let [read, write, exec, shared, ..] = *rights else { return None };
        let (_offset, _device) = (fields.next()?, fields.next()?);
        let inode = fields.next()?.trim().parse().ok()?;
        Some(Self {
            range: AddrRange { start, len },
            read: read == b'r',
            write: write == b'w',
            exec: exec == b'x',
            shared: shared == b's',
            inode,
            name: fields.next().unwrap_or_default().trim_start().trim_end_matches('\n').into(),
            flags: VmFlags::default(),
        })
    }

    /// Private memory of no file: what can be adopted at all.
    pub(crate) fn is_private_anonymous(&self) -> bool {
        !self.shared && self.inode == 0
    }
}

/// All mappings, in order.
pub(crate) fn read_maps() -> io::Result<Vec<Mapping>> {
    Ok(std::fs::read_to_string("/proc/thread-self/maps")?.lines().filter_map(Mapping::parse).collect())
}

/// The flags of mappings, in the order of their addresses.
pub(crate) struct FlagsOf(Vec<(AddrRange, VmFlags)>);

impl FlagsOf {
    /// Those of the mapping that a range lies in now. It may have grown since the range was seen, as a heap does all the time.
    pub(crate) fn around(&self, range: &AddrRange) -> Option<VmFlags> {
        let next = self.0.partition_point(|(mapping, _)| mapping.start <= range.start);
        let (mapping, flags) = self.0.get(next.checked_sub(1)?)?;
        mapping.contains_range(range).then_some(*flags)
    }
}

/// The flags of the mappings up to `end`. The kernel makes smaps while it is read, and walks the page
/// tables of every mapping that it tells of: what lies behind `end` costs nothing.
pub(crate) fn read_flags(end: u64) -> io::Result<FlagsOf> {
    flags_of(BufReader::new(std::fs::File::open("/proc/thread-self/smaps")?), end)
}

fn flags_of(smaps: impl BufRead, end: u64) -> io::Result<FlagsOf> {
    let mut found = Vec::new();
    let mut current = None;
    for line in smaps.lines() {
        let line = line?;
        if let Some(words) = line.strip_prefix("VmFlags:") {
            found.extend(current.map(|range| (range, VmFlags::parse(words))));
        } else if !line.starts_with(|first: char| first.is_ascii_uppercase())
            && let Some(mapping) = Mapping::parse(&line)
        {
            if mapping.range.start >= end {
                break;
            }
            current = Some(mapping.range);
        }
    }
    Ok(FlagsOf(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps_are_read() {
        let line = "7f1000-7f5000 rw-s 00001000 08:01 77                         /tmp/a file (deleted)";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!(mapping.range, AddrRange { start: 0x7f1000, len: 0x4000 });
        assert!(mapping.read && mapping.write && !mapping.exec && mapping.shared && mapping.inode == 77);
        assert_eq!(mapping.name, "/tmp/a file (deleted)");
        let plain = Mapping::parse("7f1000-7f5000 ---p 00000000 00:00 0 ").unwrap();
        assert!(!plain.read && plain.is_private_anonymous() && plain.name.is_empty());
        assert_eq!(Mapping::parse("1000-2000 rwxp 00000000 00:00 0    [heap]").unwrap().name, "[heap]");
        for nonsense in ["", "Rss:                   4 kB", "1000 rw-p", "2000-1000 rw-p 0 00:00 0"] {
            assert_eq!(Mapping::parse(nonsense), None, "{nonsense:?}");
        }
    }

    #[test]
    fn flags_are_read_up_to_an_end() {
        let smaps = "1000-2000 rw-p 00000000 00:00 0 \nSize:                  4 kB\nVmFlags: rd wr mr mw me ac sd \n\
                     2000-3000 rw-p 00000000 00:00 0 [heap]\nVmFlags: rd wr lo dc wf gd ht sl pf um \n\
                     3000-4000 rw-p 00000000 00:00 0 \nVmFlags: rd lo \n";
        let flags = flags_of(smaps.as_bytes(), 0x3000).unwrap();
        let range = |start, len| AddrRange { start, len };
        assert_eq!(flags.around(&range(0x1000, 0x1000)), Some(VmFlags::default()));
        assert!(flags.around(&range(0, 0x1000)).is_none() && flags.around(&range(0x3000, 0x1000)).is_none());
        assert!(flags.around(&range(0x1000, 0x2000)).is_none(), "of no single mapping");
        let all = VmFlags {
            locked: true,
            not_inherited: true,
            wiped_in_children: true,
            grows_down: true,
            huge_pages: true,
            sealed: true,
            device: true,
            registered: true,
        };
        assert_eq!(flags.around(&range(0x2000, 0x800)), Some(all), "it has grown");
    }

    #[test]
    fn this_process_is_read() {
        let maps = read_maps().unwrap();
        let stack = maps.iter().find(|mapping| mapping.name == "[stack]").unwrap();
        let flags = read_flags(stack.range.end()).unwrap();
        assert!(flags.around(&stack.range).unwrap().grows_down);
        assert!(maps.windows(2).all(|pair| pair[0].range.end() <= pair[1].range.start));
    }
}
