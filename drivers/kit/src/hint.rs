//! What data looks like that is not ours, where a driver finds a medium in somebody else's use.

use std::fmt;

/// For people: what to look for before they say `format = true`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// Boot sector signature.
    Partitions,
    /// Our magic, but another sum.
    Torn,
    /// Of a newer version.
    Newer,
    /// Anything else.
    Unknown,
}

impl Hint {
    /// Of something that does not begin as ours does.
    pub fn of_foreign(begin: &[u8]) -> Self {
        let boots = begin.len() >= 512 && begin[510..512] == [0x55, 0xaa];
        if boots { Self::Partitions } else { Self::Unknown }
    }
}

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Partitions => "a partition table or boot sector",
            Self::Torn => "a damaged header of uhmm",
            Self::Newer => "a header of a newer uhmm",
            Self::Unknown => "of an unknown kind",
        })
    }
}
