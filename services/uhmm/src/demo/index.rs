//! The index in managed memory: ordinary Rust structures with ordinary references. The layout is the one that the device's kernels
//! know (`uhmm_ipc::shared::index_layout`); what devices or later steps change is a `Cell`.

use std::cell::Cell;

use anyhow::Context;
use indicatif::ProgressBar;
use uhmm_sdk::{Arena, Region};

use super::reference::Reference;

/// One occurrence.
#[repr(C)]
pub struct Posting<'a> {
    next: Option<&'a Posting<'a>>,
    document: u32,
    position: u32,
}

/// One word.
#[repr(C)]
pub struct WordNode<'a> {
    next: Cell<Option<&'a WordNode<'a>>>,
    hash: u64,
    text: *const u8,
    text_len: u32,
    /// Occurrences; step 4 of the demo changes some.
    pub count: Cell<u32>,
    postings: Option<&'a Posting<'a>>,
}

type Bucket<'a> = Cell<Option<&'a WordNode<'a>>>;

/// The whole index.
pub struct Index<'a> {
    buckets: &'a [Bucket<'a>],
    /// Nodes in the reference's order, so that steps can pick some. Ordinary memory.
    pub nodes: Vec<&'a WordNode<'a>>,
}

impl<'a> Index<'a> {
    /// Builds the index of `reference` in the arena.
    pub fn build(arena: &'a Arena, reference: &Reference, bar: &ProgressBar) -> anyhow::Result<Self> {
        let full = "The region is too small for the index";
        let bucket_count = reference.bucket_count() as usize;
        let empty: &'a mut [Option<&'a WordNode<'a>>] = arena.alloc_slice_fill(bucket_count, None).context(full)?;
        let buckets: &'a [Bucket<'a>] = Cell::from_mut(empty).as_slice_of_cells();
        let mut nodes = Vec::with_capacity(reference.words().len());
        for word in reference.words() {
            let text = arena.alloc_slice_copy(&word.text).context(full)?;
            let mut postings: Option<&'a Posting<'a>> = None;
            for (document, position) in &word.postings {
                let posting = Posting { next: postings, document: *document, position: *position };
                postings = Some(arena.alloc(posting).context(full)?);
            }
            let bucket = &buckets[(word.hash % bucket_count as u64) as usize];
            let node: &'a WordNode<'a> = arena
                .alloc(WordNode {
                    next: Cell::new(bucket.get()),
                    hash: word.hash,
                    text: text.as_ptr(),
                    text_len: text.len() as u32,
                    count: Cell::new(word.postings.len() as u32),
                    postings,
                })
                .context(full)?;
            bucket.set(Some(node));
            nodes.push(node);
            bar.inc(word.postings.len() as u64);
        }
        Ok(Self { buckets, nodes })
    }

    /// First argument of the device's index kernels.
    pub fn buckets_addr(&self) -> u64 {
        self.buckets.as_ptr().addr() as u64
    }

    /// Second argument.
    pub fn bucket_count(&self) -> u64 {
        self.buckets.len() as u64
    }

    /// Walks everything on the CPU and counts bytes that are not what they should be. `counts` is the truth about occurrences.
    pub fn wrong_bytes(&self, region: &Region, reference: &Reference, counts: &[u32]) -> anyhow::Result<u64> {
        let mut wrong = 0;
        let mut text = Vec::new();
        for ((node, word), count) in self.nodes.iter().zip(reference.words()).zip(counts) {
            text.resize(node.text_len as usize, 0);
            region.bytes().read(node.text.addr() as u64 - region.addr(), &mut text)?;
            let differing = text.iter().zip(&word.text).filter(|(found, expected)| found != expected).count();
            wrong += differing as u64 + (text.len() as u64).abs_diff(word.text.len() as u64);
            wrong += 8 * u64::from(node.hash != word.hash) + 4 * u64::from(node.count.get() != *count);
            let mut next = node.postings;
            for (document, position) in word.postings.iter().rev() {
                match next {
                    Some(posting) => {
                        wrong += 4 * u64::from(posting.document != *document);
                        wrong += 4 * u64::from(posting.position != *position);
                        next = posting.next;
                    }
                    None => wrong += 16,
                }
            }
            wrong += 8 * u64::from(next.is_some());
        }
        let mut chained = 0u64;
        for bucket in self.buckets {
            let mut next = bucket.get();
            while let Some(node) = next {
                chained += 1;
                next = node.next.get();
            }
        }
        Ok(wrong + 8 * chained.abs_diff(reference.words().len() as u64))
    }
}
