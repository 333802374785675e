//! Questions to a word index that a program built with ordinary pointers (layout: `uhmm_ipc::shared::index_layout`).
//!
//! * `hash_lookup(buckets, bucket_count, queries, query_count, results) -> [found]`: one `u64` a query, occurrences or 0,
//!   is stored at `results`.
//! * `index_count(buckets, bucket_count) -> [words, occurrences, longest chain]`
//! * `postings_walk(buckets, bucket_count) -> [postings, checksum]`
//! * `top_k(buckets, bucket_count, k) -> [node, occurrences]*`: by occurrences descending, then hash ascending, then address.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use uhmm_driver_kit::PAGE_BYTES;
use uhmm_ipc::constants::MAX_JOB_WORDS;
use uhmm_ipc::shared::index_layout::{BUCKET_BYTES, fnv1a_64, posting, posting_checksum, query, word};

use super::{DeviceView, Kernel, KernelResult, field, invalid, page_pieces};

/// Longest text of a query.
const MAX_QUERY_BYTES: u64 = 1 << 20;
/// Most results of `top_k`: two words each, in one message.
const MAX_TOP: u64 = MAX_JOB_WORDS as u64 / 2;

/// Kernels of this family.
pub const KERNELS: &[Kernel] = &[
    Kernel {
        name: "hash_lookup",
        usage: "hash_lookup(buckets, bucket_count, queries, query_count, results) -> [queries found]; u64 a query at results",
        argument_count: 5,
        idempotent: true,
        run: hash_lookup,
    },
    Kernel {
        name: "index_count",
        usage: "index_count(buckets, bucket_count) -> [words, sum of occurrences, longest chain]",
        argument_count: 2,
        idempotent: true,
        run: index_count,
    },
    Kernel {
        name: "postings_walk",
        usage: "postings_walk(buckets, bucket_count) -> [postings, checksum]",
        argument_count: 2,
        idempotent: true,
        run: postings_walk,
    },
    Kernel {
        name: "top_k",
        usage: "top_k(buckets, bucket_count, k 1..=512) -> [word address, occurrences] for each of the k most frequent",
        argument_count: 3,
        idempotent: true,
        run: top_k,
    },
];

fn hash_lookup(view: &mut dyn DeviceView, args: &[u64]) -> KernelResult<Vec<u64>> {
    let &[buckets, bucket_count, queries, query_count, results] = args else {
        return invalid("Kernel hash_lookup takes 5 arguments".into());
    };
    if bucket_count == 0 {
        return invalid("Kernel hash_lookup: bucket_count is 0".into());
    }
    let mut found = 0;
    let mut text = Vec::new();
    for number in 0..query_count {
        let at = element(queries, number, query::BYTES)?;
        let text_addr = view.load_u64(field(at, query::TEXT)?)?;
        let len_bytes = view.load_u64(field(at, query::LEN)?)?;
        let Some(len) = usize::try_from(len_bytes).ok().filter(|_| len_bytes <= MAX_QUERY_BYTES) else {
            return invalid(format!("Query {number} has {len_bytes} bytes: at most {MAX_QUERY_BYTES} are possible"));
        };
        text.resize(len, 0);
        view.read(text_addr, &mut text)?;
        let occurrences = look_up(view, buckets, bucket_count, &text)?;
        found += u64::from(occurrences > 0);
        view.store_u64(element(results, number, 8)?, occurrences)?;
    }
    Ok(vec![found])
}

/// Occurrences of one word, 0 if the index does not have it.
fn look_up(view: &mut dyn DeviceView, buckets: u64, bucket_count: u64, text: &[u8]) -> KernelResult<u64> {
    let hash = fnv1a_64(text);
    let mut node = view.load_u64(element(buckets, hash % bucket_count, BUCKET_BYTES)?)?;
    while node != 0 {
        if view.load_u64(field(node, word::HASH)?)? == hash
            && view.load_u32(field(node, word::TEXT_LEN)?)? as usize == text.len()
        {
            let node_text = view.load_u64(field(node, word::TEXT)?)?;
            if text_equals(view, node_text, text)? {
                return Ok(u64::from(view.load_u32(field(node, word::COUNT)?)?));
            }
        }
        node = view.load_u64(field(node, word::NEXT)?)?;
    }
    Ok(0)
}

fn text_equals(view: &mut dyn DeviceView, addr: u64, text: &[u8]) -> KernelResult<bool> {
    let mut page = [0; PAGE_BYTES as usize];
    let mut rest = text;
    for (at, len) in page_pieces(addr, text.len() as u64)? {
        let (wanted, later) = rest.split_at(len);
        view.read(at, &mut page[..len])?;
        if page[..len] != *wanted {
            return Ok(false);
        }
        rest = later;
    }
    Ok(true)
}

fn index_count(view: &mut dyn DeviceView, args: &[u64]) -> KernelResult<Vec<u64>> {
    let &[buckets, bucket_count] = args else { return invalid("Kernel index_count takes 2 arguments".into()) };
    let (mut words, mut occurrences, mut longest) = (0_u64, 0_u64, 0_u64);
    for bucket in 0..bucket_count {
        let mut length = 0;
        for_each_word(view, buckets, bucket, |view, node| {
            occurrences += u64::from(view.load_u32(field(node, word::COUNT)?)?);
            length += 1;
            Ok(())
        })?;
        words += length;
        longest = longest.max(length);
    }
    Ok(vec![words, occurrences, longest])
}

fn postings_walk(view: &mut dyn DeviceView, args: &[u64]) -> KernelResult<Vec<u64>> {
    let &[buckets, bucket_count] = args else { return invalid("Kernel postings_walk takes 2 arguments".into()) };
    let (mut postings, mut checksum) = (0_u64, 0_u64);
    for bucket in 0..bucket_count {
        for_each_word(view, buckets, bucket, |view, node| {
            let mut at = view.load_u64(field(node, word::POSTINGS)?)?;
            while at != 0 {
                let document = view.load_u32(field(at, posting::DOCUMENT)?)?;
                let position = view.load_u32(field(at, posting::POSITION)?)?;
                checksum = checksum.wrapping_add(posting_checksum(document, position));
                postings += 1;
                at = view.load_u64(field(at, posting::NEXT)?)?;
            }
            Ok(())
        })?;
    }
    Ok(vec![postings, checksum])
}

fn top_k(view: &mut dyn DeviceView, args: &[u64]) -> KernelResult<Vec<u64>> {
    let &[buckets, bucket_count, k] = args else { return invalid("Kernel top_k takes 3 arguments".into()) };
    if !(1..=MAX_TOP).contains(&k) {
        return invalid(format!("Kernel top_k: k is {k}: it must be 1..={MAX_TOP}"));
    }
    // Sorted best first; never more than k entries, so the last one is the one to beat.
    let mut best: BTreeSet<(Reverse<u32>, u64, u64)> = BTreeSet::new();
    for bucket in 0..bucket_count {
        for_each_word(view, buckets, bucket, |view, node| {
            let occurrences = view.load_u32(field(node, word::COUNT)?)?;
            let hash = view.load_u64(field(node, word::HASH)?)?;
            best.insert((Reverse(occurrences), hash, node));
            if best.len() as u64 > k {
                best.pop_last();
            }
            Ok(())
        })?;
    }
    Ok(best.into_iter().flat_map(|(Reverse(occurrences), _, node)| [node, u64::from(occurrences)]).collect())
}

fn for_each_word(
    view: &mut dyn DeviceView,
    buckets: u64,
    bucket: u64,
    mut visit: impl FnMut(&mut dyn DeviceView, u64) -> KernelResult<()>,
) -> KernelResult<()> {
    let mut node = view.load_u64(element(buckets, bucket, BUCKET_BYTES)?)?;
    while node != 0 {
        visit(view, node)?;
        node = view.load_u64(field(node, word::NEXT)?)?;
    }
    Ok(())
}

/// Address of an array's element.
fn element(base: u64, index: u64, stride: u64) -> KernelResult<u64> {
    match index.checked_mul(stride) {
        Some(offset) => field(base, offset),
        None => invalid(format!("Element {index} of the array at {base:#x} leaves the address space")),
    }
}
