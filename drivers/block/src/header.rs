//! Whose medium this is: a page in front of the blocks.
//!
//! ```text
//!   0           4 KiB                         1 MiB
//!   | header    | zeroes (or it is not ours)  | block 0 | block 1 | ...
//! ```
//! | found in the first MiB | what is done at a cold start |
//! | --- | --- |
//! | nothing (a new file), zeroes | taken |
//! | header of uhmm's, in use or given back | taken: its lock was free, so nobody has it, and what it holds nobody can read |
//! | anything else | refused, unless the manifest says `format = true` |
//!
//! A driver that goes on with what its predecessor kept in the vault wants the header of that life; with any other one the frames are lost.

use uhmm_driver_kit::Hint;

use crate::table::Life;

/// Bytes in front of the first block.
pub const HEADER_BYTES: u64 = 1 << 20;
const MAGIC: [u8; 8] = *b"uhmmfar\0";
const VERSION: u64 = 1;
const SUM_AT: usize = 64;

/// The header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// A system has it, or died with it.
    pub in_use: bool,
    /// Whose.
    pub life: Life,
    /// Blocks behind it.
    pub blocks: u32,
}

/// What the first bytes of a medium are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Zeroes, or nothing at all.
    Empty,
    /// Ours.
    Header(Header),
    /// Somebody's.
    Foreign(Hint),
}

impl Header {
    /// The first 4 KiB.
    pub fn encode(&self) -> Vec<u8> {
        self.encode_with_beat(0)
    }

    /// The same, with a count that says that somebody is there, where no lock does.
    pub fn encode_with_beat(&self, beat: u64) -> Vec<u8> {
        let mut page = vec![0; 4096];
        page[..8].copy_from_slice(&MAGIC);
        let Life { owner, number } = self.life;
        let words = [VERSION, u64::from(self.in_use), owner[0], owner[1], number, u64::from(self.blocks), beat];
        for (place, word) in page[8..SUM_AT].chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        let sum = checksum(&page[..SUM_AT]);
        page[SUM_AT..SUM_AT + 8].copy_from_slice(&sum.to_le_bytes());
        page
    }
}

impl Found {
    /// `begin`: the first bytes, up to [`HEADER_BYTES`].
    pub fn decode(begin: &[u8]) -> Self {
        if begin.iter().all(|byte| *byte == 0) {
            return Self::Empty;
        }
        if begin.len() < 4096 || begin[..8] != MAGIC {
            return Self::Foreign(Hint::of_foreign(begin));
        }
        let word = |at: usize| begin[at..at + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        if word(SUM_AT) != checksum(&begin[..SUM_AT]) {
            return Self::Foreign(Hint::Torn);
        }
        if word(8) != VERSION {
            return Self::Foreign(Hint::Newer);
        }
        let life = Life { owner: [word(24), word(32)], number: word(40) };
        Self::Header(Header { in_use: word(16) == 1, life, blocks: word(48) as u32 })
    }
}

/// FNV-1a: notices a torn header. Nobody trusts it for more.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header { in_use: true, life: Life { owner: [1, 2], number: 3 }, blocks: 5 };

    #[test]
    fn a_header_comes_back_as_it_was_and_every_damage_is_noticed() {
        assert_eq!(Found::decode(&HEADER.encode()), Found::Header(HEADER));
        assert_eq!(Found::decode(&HEADER.encode_with_beat(7)), Found::Header(HEADER));
        assert_ne!(HEADER.encode_with_beat(7), HEADER.encode());
        let given_back = Header { in_use: false, ..HEADER };
        assert_eq!(Found::decode(&given_back.encode()), Found::Header(given_back));
        for at in 8..72 {
            let mut damaged = HEADER.encode();
            damaged[at] ^= 0x10;
            assert_eq!(Found::decode(&damaged), Found::Foreign(Hint::Torn), "byte {at}");
        }
    }

    #[test]
    fn only_zeroes_are_empty() {
        assert_eq!((Found::decode(&[]), Found::decode(&[0; 5000])), (Found::Empty, Found::Empty));
        assert_eq!(Found::decode(b"short"), Found::Foreign(Hint::Unknown));
        let mut late = vec![0; HEADER_BYTES as usize];
        late[65536 + 64] = 1;
        assert_eq!(Found::decode(&late), Found::Foreign(Hint::Unknown), "where btrfs has its superblock");
        let mut boots = vec![0; 4096];
        (boots[510], boots[511]) = (0x55, 0xaa);
        assert_eq!(Found::decode(&boots), Found::Foreign(Hint::Partitions));
    }
}
