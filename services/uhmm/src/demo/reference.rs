//! The same word index in ordinary Rust collections: the truth that every answer is compared with. Nothing here is managed
//! memory and nothing here is read from managed memory.

use std::collections::HashMap;

use uhmm_ipc::shared::index_layout::{BUCKET_BYTES, fnv1a_64, posting, posting_checksum, word};

use super::text::words;

/// One word.
#[derive(Debug)]
pub struct Word {
    /// Its bytes.
    pub text: Box<[u8]>,
    /// FNV-1a of the text.
    pub hash: u64,
    /// (document, position), oldest first.
    pub postings: Vec<(u32, u32)>,
}

impl Word {
    /// Occurrences.
    pub fn count(&self) -> u64 {
        self.postings.len() as u64
    }
}

/// All words, in the order in which they were first seen.
#[derive(Debug, Default)]
pub struct Reference {
    words: Vec<Word>,
    by_text: HashMap<Box<[u8]>, u32>,
    posting_count: u64,
    text_bytes: u64,
    document_count: u32,
}

/// What `index_count` must answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Different words.
    pub words: u64,
    /// Occurrences of all words.
    pub occurrences: u64,
    /// Words in the longest chain.
    pub longest_chain: u64,
}

impl Reference {
    /// Adds a document. Its number is the count of documents before it.
    pub fn add(&mut self, text: &[u8]) {
        let document = self.document_count;
        for (position, text) in (0u32..).zip(words(text)) {
            let id = match self.by_text.get(text) {
                Some(id) => *id as usize,
                None => self.add_word(text),
            };
            self.words[id].postings.push((document, position));
            self.posting_count += 1;
        }
        self.document_count += 1;
    }

    fn add_word(&mut self, text: &[u8]) -> usize {
        let id = self.words.len();
        self.by_text.insert(text.into(), id as u32);
        self.words.push(Word { text: text.into(), hash: fnv1a_64(text), postings: Vec::new() });
        self.text_bytes += text.len() as u64;
        id
    }

    /// Words by first appearance.
    pub fn words(&self) -> &[Word] {
        &self.words
    }

    /// Occurrences of all words.
    pub fn posting_count(&self) -> u64 {
        self.posting_count
    }

    /// Buckets for this many words: about one word each.
    pub fn bucket_count(&self) -> u64 {
        (self.words.len() as u64).next_power_of_two().max(1 << 10)
    }

    /// Size of the index with `bucket_count` buckets, texts aligned to 8 bytes at most.
    pub fn index_bytes(&self, bucket_count: u64) -> u64 {
        let words = self.words.len() as u64;
        bucket_count * BUCKET_BYTES + words * (word::BYTES + 8) + self.text_bytes + self.posting_count * posting::BYTES
    }

    /// What `index_count` must answer.
    pub fn counts(&self, bucket_count: u64) -> Counts {
        let mut chains = vec![0u32; bucket_count as usize];
        for word in &self.words {
            chains[(word.hash % bucket_count) as usize] += 1;
        }
        let longest_chain = chains.iter().copied().max().map_or(0, u64::from);
        Counts { words: self.words.len() as u64, occurrences: self.posting_count, longest_chain }
    }

    /// What `postings_walk` must answer: postings and checksum.
    pub fn postings_checksum(&self) -> (u64, u64) {
        let postings = self.words.iter().flat_map(|word| &word.postings);
        let sum =
            postings.fold(0u64, |sum, (document, position)| sum.wrapping_add(posting_checksum(*document, *position)));
        (self.posting_count, sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Reference {
        let mut reference = Reference::default();
        reference.add(b"to be or not to be");
        reference.add(b"to do");
        reference
    }

    #[test]
    fn words_keep_every_occurrence() {
        let reference = small();
        let to = &reference.words()[0];
        assert_eq!((&*to.text, &to.postings[..]), (&b"to"[..], &[(0, 0), (0, 4), (1, 0)][..]));
        assert_eq!(reference.posting_count(), 8);
    }

    #[test]
    fn answers_agree_with_a_count_by_hand() {
        let reference = small();
        let counts = reference.counts(1);
        assert_eq!((counts.words, counts.occurrences, counts.longest_chain), (5, 8, 5));
        let checksum: u64 = (0..6).map(|position| posting_checksum(0, position)).sum::<u64>()
            + (0..2).map(|position| posting_checksum(1, position)).sum::<u64>();
        assert_eq!(reference.postings_checksum(), (8, checksum));
    }
}
