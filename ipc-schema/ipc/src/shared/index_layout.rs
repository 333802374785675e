//! The word index that CPU and devices share: a chained hash table of words with their postings, built by a program with
//! ordinary pointers and walked by device kernels through the same pointers.
//!
//! ```text
//!   buckets: [u64; bucket_count]           word (40 bytes)                 posting (16 bytes)
//!   +------+                       +->  next      u64 @0  -> word     +->  next      u64 @0 -> posting
//!   | ptr  | ----------------------+    hash      u64 @8              |    document  u32 @8
//!   +------+                            text      u64 @16 -> bytes    |    position  u32 @12
//!   | 0    |                            text_len  u32 @24             |
//!   +------+                            count     u32 @28             |    query (16 bytes)
//!                                       postings  u64 @32 ------------+    text u64 @0 -> bytes, len u64 @8
//! ```
//! A null pointer ends a chain. A word's bucket is `fnv1a_64(text) % bucket_count`. The byte order is the machine's.
//! These are offsets and not Rust structures, because kernels never dereference: they load each field through the device's
//! page table, and any field may fault.

/// Bytes of a bucket: one pointer to a word, or 0.
pub const BUCKET_BYTES: u64 = 8;

/// Offsets inside a word.
pub mod word {
    /// Pointer to the next word of the chain, or 0.
    pub const NEXT: u64 = 0;
    /// FNV-1a of the text.
    pub const HASH: u64 = 8;
    /// Pointer to the text's bytes.
    pub const TEXT: u64 = 16;
    /// Length of the text in bytes, `u32`.
    pub const TEXT_LEN: u64 = 24;
    /// Occurrences of the word, `u32`.
    pub const COUNT: u64 = 28;
    /// Pointer to the first posting, or 0.
    pub const POSTINGS: u64 = 32;
    /// Size of a word.
    pub const BYTES: u64 = 40;
}

/// Offsets inside a posting.
pub mod posting {
    /// Pointer to the next posting, or 0.
    pub const NEXT: u64 = 0;
    /// Document number, `u32`.
    pub const DOCUMENT: u64 = 8;
    /// Position in the document, `u32`.
    pub const POSITION: u64 = 12;
    /// Size of a posting.
    pub const BYTES: u64 = 16;
}

/// Offsets inside a query.
pub mod query {
    /// Pointer to the text's bytes.
    pub const TEXT: u64 = 0;
    /// Length of the text in bytes, `u64`.
    pub const LEN: u64 = 8;
    /// Size of a query.
    pub const BYTES: u64 = 16;
}

/// Multiplier of the document number in the checksum of `postings_walk`.
pub const CHECKSUM_PRIME: u64 = 1_000_003;

/// What one posting adds (wrapping) to the checksum of `postings_walk`.
pub fn posting_checksum(document: u32, position: u32) -> u64 {
    u64::from(document).wrapping_mul(CHECKSUM_PRIME).wrapping_add(u64::from(position))
}

/// FNV-1a with 64 bits, the hash of every word.
pub fn fnv1a_64(bytes: &[u8]) -> u64 {
    const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    bytes.iter().fold(OFFSET_BASIS, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fnv_agrees_with_the_published_vectors() {
        assert_eq!(fnv1a_64(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a_64(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a_64(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn the_checksum_tells_documents_from_positions() {
        assert_ne!(posting_checksum(1, 2), posting_checksum(2, 1));
        assert_eq!(posting_checksum(2, 5), 2_000_011);
    }
}
