//! Who an epoll event is for, packed into mio's token: kind, slot, generation. An event for a slot that was reused meanwhile
//! is recognised by its generation and dropped.

use mio::Token;

use crate::ids::{ConnId, LinkId};

const KIND_SHIFT: u32 = 60;
const INDEX_SHIFT: u32 = 32;
/// Slots of one kind.
pub(super) const MAX_INDEX: usize = (1 << (KIND_SHIFT - INDEX_SHIFT)) - 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Waker,
    Listener(usize),
    Conn(ConnId),
    Link(LinkId),
    /// Slot and generation in the table of watched descriptors.
    Fd {
        index: u32,
        generation: u32,
    },
}

impl Source {
    pub(super) fn token(self) -> Token {
        let (kind, index, generation) = match self {
            Source::Waker => (0, 0, 0),
            Source::Listener(index) => (1, index as u32, 0),
            Source::Conn(ConnId { index, generation }) => (2, index, generation),
            Source::Link(LinkId { index, generation }) => (3, index, generation),
            Source::Fd { index, generation } => (4, index, generation),
        };
        Token(kind << KIND_SHIFT | (index as usize) << INDEX_SHIFT | generation as usize)
    }

    pub(super) fn from_token(Token(token): Token) -> Option<Self> {
        let index = (token >> INDEX_SHIFT & MAX_INDEX) as u32;
        let generation = token as u32;
        Some(match token >> KIND_SHIFT {
            0 => Source::Waker,
            1 => Source::Listener(index as usize),
            2 => Source::Conn(ConnId { index, generation }),
            3 => Source::Link(LinkId { index, generation }),
            4 => Source::Fd { index, generation },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_survives_its_token() {
        let (index, generation) = (MAX_INDEX as u32, u32::MAX);
        for source in [
            Source::Waker,
            Source::Listener(7),
            Source::Conn(ConnId { index, generation }),
            Source::Conn(ConnId { index: 0, generation: 1 }),
            Source::Link(LinkId { index, generation }),
            Source::Fd { index, generation },
        ] {
            assert_eq!(Source::from_token(source.token()), Some(source));
        }
    }
}
