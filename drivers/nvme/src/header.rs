//! Whose namespace this is: a header in front of the frames, and when it may be taken.
//!
//! ```text
//!   0           4 KiB                          128 KiB
//!   | header    | zeroes (or it is not ours)   | frame 0 | frame 1 | ...
//! ```
//! | found in the first 128 KiB | in the vault | what is done |
//! | --- | --- | --- |
//! | header, in use | the same owner and generation | the frames are those of the last incarnation |
//! | header of this host, or given back | nothing, or something else | a cold start: new generation, frames become zero |
//! | header, given back | the same owner and generation | as before: nobody has answered for the frames since then |
//! | header of another host, in use | | refused |
//! | zeroes | | taken |
//! | anything else | | refused |
//!
//! What is refused is taken when the manifest says `format = true`.
//!
//! ```text
//!   (anything) --taken--> in use --driver restarts, is killed, dies with its machine--> in use
//!                            \---the whole system ends in order (`uhmm down`)----------> given back --taken by any host--> in use
//! ```
//! Given back by `uhmm down` even if pages lived there at that moment: who knew which (the pager's directory) and whose generation it was (the vault)
//! ended with the system, so the frames are worth nothing to anybody.
//!
//! **Protected**: somebody's file system is never overwritten by accident; two managers of one machine never share a namespace, because VFIO
//! gives the controller to one process group (a second opener gets EBUSY); managers of two machines that see the same namespace one after the other
//! notice each other by host. **Not protected**: a second controller of the same subsystem that somebody drives at the same time without
//! looking at the header, and machines that have no `/etc/machine-id` (they all look alike).

use uhmm_driver_kit::Hint;

/// Bytes in front of the first frame.
pub const HEADER_BYTES: u64 = 128 << 10;
const MAGIC: [u8; 8] = *b"uhmmtier";
const VERSION: u32 = 1;
const CRC_AT: usize = 64;

/// Why the namespace was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Somebody's data.
    #[error(
        "Namespace holds data that is not uhmm's ({hint}): choose another one, or destroy it with `format = true` in the manifest's [[device]]"
    )]
    Foreign {
        /// What it looks like.
        hint: Hint,
    },
    /// Another machine has it.
    #[error(
        "Namespace is in use by another host ({host:016x}): stop uhmm there, or take it with `format = true` in the manifest's [[device]]"
    )]
    OtherHost {
        /// First half of its id.
        host: u64,
    },
    /// No room.
    #[error("Namespace of {0} bytes is too small")]
    TooSmall(u64),
    /// Somebody writes there who does not look at headers.
    #[error(
        "Namespace's header was changed while it was in use: it is left as it is; find out who else writes to this controller's namespace"
    )]
    Changed,
}

/// Whether a manager has the namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// One has it, or died with it.
    InUse,
    /// Given back in order.
    Released,
}

/// The header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// In use or not.
    pub state: State,
    /// Drawn when the namespace was taken.
    pub owner: [u64; 2],
    /// Drawn with it: names what the frames hold.
    pub generation: u64,
    /// Which machine.
    pub host: u64,
    /// Frames in use.
    pub frames: u64,
}

impl Header {
    /// The first 4 KiB.
    pub fn encode(&self) -> Vec<u8> {
        let mut page = vec![0; 4096];
        page[..8].copy_from_slice(&MAGIC);
        page[8..12].copy_from_slice(&VERSION.to_le_bytes());
        page[12..16].copy_from_slice(&u32::from(self.state == State::InUse).to_le_bytes());
        let words = [self.owner[0], self.owner[1], self.generation, self.host, self.frames];
        for (place, word) in page[16..56].chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        let sum = checksum(&page[..CRC_AT]);
        page[CRC_AT..CRC_AT + 4].copy_from_slice(&sum.to_le_bytes());
        page
    }
}

/// What the first [`HEADER_BYTES`] hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Zeroes.
    Empty,
    /// A header, whole.
    Header(Header),
    /// Something else.
    Foreign(Hint),
}

impl Found {
    /// Looks at them.
    pub fn decode(area: &[u8]) -> Self {
        let word = |at: usize| area[at..at + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        let half = |at: usize| word(at) as u32;
        if area.iter().all(|byte| *byte == 0) {
            return Self::Empty;
        }
        if area.len() < 4096 || area[..8] != MAGIC {
            return Self::Foreign(Hint::of_foreign(area));
        }
        if half(CRC_AT) != checksum(&area[..CRC_AT]) {
            return Self::Foreign(Hint::Torn);
        }
        if half(8) != VERSION {
            return Self::Foreign(Hint::Newer);
        }
        let state = if half(12) == 1 { State::InUse } else { State::Released };
        let (owner, generation) = ([word(16), word(24)], word(32));
        Self::Header(Header { state, owner, generation, host: word(40), frames: word(48) })
    }
}

/// What follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The frames are those that the vault speaks of.
    Keep,
    /// New generation, and frames of zeroes.
    Take,
}

/// `known`: owner, generation and frames from the vault. See the table in the module head.
///
/// # Errors
/// `Foreign`, `OtherHost`.
pub fn decide(
    found: Found,
    known: Option<([u64; 2], u64)>,
    frames: u64,
    host: u64,
    format: bool,
) -> Result<Decision, HeaderError> {
    match found {
        Found::Header(Header { state: State::InUse, owner, generation, frames: had, .. })
            if known == Some((owner, generation)) && had == frames =>
        {
            Ok(Decision::Keep)
        }
        Found::Empty => Ok(Decision::Take),
        _ if format => Ok(Decision::Take),
        Found::Header(header) if header.host == host || header.state == State::Released => Ok(Decision::Take),
        Found::Header(header) => Err(HeaderError::OtherHost { host: header.host }),
        Found::Foreign(hint) => Err(HeaderError::Foreign { hint }),
    }
}

/// CRC-32 (reflected, polynomial 0x04c11db7), bit by bit: 64 bytes once in a driver's life.
fn checksum(bytes: &[u8]) -> u32 {
    let update = |sum: u32| if sum & 1 != 0 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 };
    !bytes.iter().fold(u32::MAX, |sum, byte| (0..8).fold(sum ^ u32::from(*byte), |sum, _| update(sum)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header { state: State::InUse, owner: [1, 2], generation: 3, host: 4, frames: 5 };

    fn area(begin: &[u8]) -> Vec<u8> {
        let mut area = begin.to_vec();
        area.resize(HEADER_BYTES as usize, 0);
        area
    }

    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!(checksum(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_header_comes_back_as_it_was_and_every_damage_is_noticed() {
        assert_eq!(Found::decode(&area(&HEADER.encode())), Found::Header(HEADER));
        let released = Header { state: State::Released, ..HEADER };
        assert_eq!(Found::decode(&area(&released.encode())), Found::Header(released));
        for at in 8..68 {
            let mut damaged = area(&HEADER.encode());
            damaged[at] ^= 0x10;
            assert_eq!(Found::decode(&damaged), Found::Foreign(Hint::Torn), "byte {at}");
        }
    }

    #[test]
    fn only_zeroes_are_empty() {
        assert_eq!(Found::decode(&area(&[])), Found::Empty);
        let mut late = area(&[]);
        late[65536 + 64] = 1;
        assert_eq!(Found::decode(&late), Found::Foreign(Hint::Unknown), "where btrfs has its superblock");
        let mut partitions = area(&[]);
        (partitions[510], partitions[511]) = (0x55, 0xaa);
        assert_eq!(Found::decode(&partitions), Found::Foreign(Hint::Partitions));
    }

    #[test]
    fn the_table_of_the_module_head() {
        let known = Some(([1, 2], 3));
        let header = Found::Header(HEADER);
        assert_eq!(decide(header, known, 5, 4, false), Ok(Decision::Keep));
        assert_eq!(decide(header, known, 6, 4, false), Ok(Decision::Take), "another size");
        assert_eq!(decide(header, Some(([1, 2], 4)), 5, 4, false), Ok(Decision::Take), "another generation");
        assert_eq!(decide(header, None, 5, 4, false), Ok(Decision::Take), "a cold start");
        assert_eq!(decide(header, None, 5, 9, false), Err(HeaderError::OtherHost { host: 4 }));
        assert_eq!(decide(header, None, 5, 9, true), Ok(Decision::Take));
        let released = Found::Header(Header { state: State::Released, ..HEADER });
        assert_eq!(decide(released, None, 5, 9, false), Ok(Decision::Take));
        assert_eq!(decide(released, known, 5, 4, false), Ok(Decision::Take), "given back, and not taken since");
        assert_eq!(decide(Found::Empty, None, 5, 9, false), Ok(Decision::Take));
        let foreign = Found::Foreign(Hint::Partitions);
        assert_eq!(decide(foreign, None, 5, 4, false), Err(HeaderError::Foreign { hint: Hint::Partitions }));
        assert_eq!(decide(foreign, known, 5, 4, true), Ok(Decision::Take));
        let text = HeaderError::Foreign { hint: Hint::Partitions }.to_string();
        assert!(text.contains("partition table") && text.contains("format = true"), "{text}");
    }
}
