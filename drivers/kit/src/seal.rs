//! The seal of frames that lie where others can read or change them: a disk, a server.
//!
//! ```text
//!   page --close--> ciphertext (4096 bytes, to the medium) + tag (16 bytes, to the vault's memory)
//!   ciphertext + tag --open--> the page that was closed under this name, or nothing
//! ```
//! AES-256-GCM. The key is drawn when a device's memory begins and exists in the vault's memory only: when the system has gone, nobody can
//! read what is left on the medium. A [`SealName`] says which page this is: its block and the block's generation are the nonce, so a key
//! never sees a name twice as long as a generation is counted **before** a page is closed under it, in memory that a killed driver leaves behind.
//! Frame and the life of the memory are authenticated with it.
//!
//! So what comes back is the page that was put there last, or an error: not a damaged one, an older one of the same block, one of another
//! block or of another system.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, Tag, UnboundKey};

use crate::device::PAGE_BYTES;

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;
/// Bytes of a tag.
pub const TAG_BYTES: usize = 16;
/// A page's bytes.
pub type Page = [u8; PAGE_BYTES as usize];

/// Which page it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SealName {
    /// Where it lies.
    pub block: u32,
    /// The how-manieth page of this block; never used before with this block.
    pub generation: u64,
    /// Whose page.
    pub frame: u32,
    /// Which life of the device's memory.
    pub life: u64,
}

impl SealName {
    fn nonce(&self) -> Nonce {
        let mut nonce = [0; 12];
        nonce[..4].copy_from_slice(&self.block.to_le_bytes());
        nonce[4..].copy_from_slice(&self.generation.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }

    fn aad(&self) -> Aad<[u8; 12]> {
        let mut aad = [0; 12];
        aad[..4].copy_from_slice(&self.frame.to_le_bytes());
        aad[4..].copy_from_slice(&self.life.to_le_bytes());
        Aad::from(aad)
    }
}

/// Why a page was not closed or opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// What was read is not the page that was put there last.
    #[error("the bytes that came back are not those that were put there last (damaged, stale, or somebody else's)")]
    Broken,
    /// Keys have 32 bytes, and pages are shorter than AES-GCM's limit.
    #[error("the cipher refused a page: this is a fault of uhmm's")]
    Refused,
}

/// See the module head.
pub struct Seal {
    key: LessSafeKey,
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seal")
    }
}

impl Seal {
    /// With this key.
    ///
    /// # Errors
    /// `Refused`.
    pub fn new(key: &[u8; KEY_BYTES]) -> Result<Self, SealError> {
        let key = UnboundKey::new(&AES_256_GCM, key).map_err(|_| SealError::Refused)?;
        Ok(Self { key: LessSafeKey::new(key) })
    }

    /// Makes the page unreadable for others.
    ///
    /// # Errors
    /// `Refused`.
    pub fn close(&self, name: SealName, page: &mut Page) -> Result<[u8; TAG_BYTES], SealError> {
        let tag = self.key.seal_in_place_separate_tag(name.nonce(), name.aad(), page);
        let tag = tag.map_err(|_| SealError::Refused)?;
        let mut bytes = [0; TAG_BYTES];
        bytes.copy_from_slice(tag.as_ref());
        Ok(bytes)
    }

    /// Gives the page back. After an error its bytes mean nothing.
    ///
    /// # Errors
    /// `Broken`.
    pub fn open(&self, name: SealName, tag: [u8; TAG_BYTES], page: &mut Page) -> Result<(), SealError> {
        let tag = Tag::from(tag);
        let opened = self.key.open_in_place_separate_tag(name.nonce(), name.aad(), tag, page, 0..);
        opened.map(|_| ()).map_err(|_| SealError::Broken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: SealName = SealName { block: 7, generation: 3, frame: 9, life: 11 };

    #[test]
    fn a_page_comes_back_under_its_own_name_and_no_other() {
        let seal = Seal::new(&[5; KEY_BYTES]).unwrap();
        let page: Page = std::array::from_fn(|at| (at * 7) as u8);
        let mut closed = page;
        let tag = seal.close(NAME, &mut closed).unwrap();
        assert!(closed.iter().zip(&page).filter(|(one, other)| one == other).count() < 100, "it is not readable");
        let mut opened = closed;
        seal.open(NAME, tag, &mut opened).unwrap();
        assert_eq!(opened, page);
        let others = [
            SealName { block: 6, ..NAME },
            SealName { generation: 2, ..NAME },
            SealName { frame: 8, ..NAME },
            SealName { life: 12, ..NAME },
        ];
        for name in others {
            assert_eq!(seal.open(name, tag, &mut closed.clone()), Err(SealError::Broken), "{name:?}");
        }
        let foreign = Seal::new(&[6; KEY_BYTES]).unwrap();
        assert_eq!(foreign.open(NAME, tag, &mut closed.clone()), Err(SealError::Broken));
    }

    #[test]
    fn every_single_bit_of_damage_is_noticed() {
        let seal = Seal::new(&[5; KEY_BYTES]).unwrap();
        let mut closed: Page = [0; PAGE_BYTES as usize];
        let tag = seal.close(NAME, &mut closed).unwrap();
        for bit in (0..PAGE_BYTES as usize * 8).step_by(101) {
            let mut damaged = closed;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(seal.open(NAME, tag, &mut damaged), Err(SealError::Broken), "bit {bit}");
        }
        for bit in 0..TAG_BYTES * 8 {
            let mut tag = tag;
            tag[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(seal.open(NAME, tag, &mut closed.clone()), Err(SealError::Broken), "bit {bit} of the tag");
        }
    }

    #[test]
    fn the_same_page_looks_different_in_each_generation() {
        let seal = Seal::new(&[5; KEY_BYTES]).unwrap();
        let (mut first, mut second): (Page, Page) = ([1; PAGE_BYTES as usize], [1; PAGE_BYTES as usize]);
        seal.close(NAME, &mut first).unwrap();
        seal.close(SealName { generation: 4, ..NAME }, &mut second).unwrap();
        assert_ne!(first, second);
    }
}
