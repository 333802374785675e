//! Which pages lie in which scratch block. A block's record lies beside the orders, so that an agent that follows a killed one knows.
//!
//! A record names pages of a region and where the first of them goes in the block. Which of these really are there the kernel knows: a page
//! that is in scratch was taken out. So there is no order of two stores in which an agent could be killed and a page be lost.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use uhmm_shared::agent::{BLOCK_WORDS, BLOCKS, ORDER_PAGES, Order, SLOTS};
use uhmm_shared::words::Words;

use crate::memory::Orders;

const ID: usize = 0;
const REGION: usize = 1;
const FIRST: usize = 2;
const INTO: usize = 3;
/// Stored last; 0: the block is nobody's.
const COUNT: usize = 4;

/// What a block is for.
#[derive(Clone, Copy)]
pub(crate) struct Record {
    /// The order that took the pages out.
    pub(crate) id: u64,
    pub(crate) region: u64,
    pub(crate) first_page: u64,
    pub(crate) page_count: u64,
    /// Page of the block for `first_page`.
    pub(crate) into: u64,
}

/// A part of an order's pages that a block has a place for.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    /// First page, counted from the order's first.
    pub(crate) of_order: u64,
    /// First page, counted in the block.
    pub(crate) in_block: u64,
    pub(crate) count: u64,
    /// The part is all that the block is for.
    pub(crate) whole: bool,
}

fn word(block: u64, field: usize) -> usize {
    BLOCKS + block.min(SLOTS - 1) as usize * BLOCK_WORDS + field
}

pub(crate) fn record(words: &Orders, block: u64) -> Option<Record> {
    let page_count = words.load(word(block, COUNT), Acquire);
    let field = |field| words.load(word(block, field), Relaxed);
    let record =
        Record { id: field(ID), region: field(REGION), first_page: field(FIRST), into: field(INTO), page_count };
    // The program can write here.
    let legal = (1..=ORDER_PAGES).contains(&page_count)
        && record.into <= ORDER_PAGES - page_count
        && record.first_page.checked_add(page_count).is_some();
    legal.then_some(record)
}

pub(crate) fn keep(words: &Orders, block: u64, record: &Record) {
    words.store(word(block, COUNT), 0, Release);
    words.store(word(block, ID), record.id, Relaxed);
    words.store(word(block, REGION), record.region, Relaxed);
    words.store(word(block, FIRST), record.first_page, Relaxed);
    words.store(word(block, INTO), record.into, Relaxed);
    words.store(word(block, COUNT), record.page_count, Release);
}

pub(crate) fn forget(words: &Orders, block: u64) {
    words.store(word(block, COUNT), 0, Release);
}

/// What block `block` has of an order's pages.
pub(crate) fn part(words: &Orders, block: u64, order: &Order) -> Option<Part> {
    let record = record(words, block).filter(|record| record.region == order.region)?;
    let first = record.first_page.max(order.first_page);
    let record_end = record.first_page.wrapping_add(record.page_count);
    let end = record_end.min(order.first_page.wrapping_add(order.page_count));
    (first < end).then(|| Part {
        of_order: first.wrapping_sub(order.first_page),
        in_block: record.into.wrapping_add(first.wrapping_sub(record.first_page)),
        count: end.wrapping_sub(first),
        whole: first == record.first_page && end == record_end,
    })
}
