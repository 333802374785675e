//! Every kernel runs twice: on plain memory, and on memory where each page must first be asked for and is taken away again
//! after every few accesses. Both must give the same answer: suspension and resumption are invisible to a kernel.

use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;
use uhmm_ipc::shared::index_layout::{fnv1a_64, posting, posting_checksum, word};

use super::*;

/// Memory in pages; `residency` pages are mapped at once when it is `Some`.
#[derive(Clone, Default)]
struct FakeView {
    pages: BTreeMap<u64, Box<[u8]>>,
    residency: Option<usize>,
    mapped: Vec<u64>,
    faults: u64,
}

impl FakeView {
    fn with_range(addr: u64, len_bytes: u64) -> Self {
        let mut view = Self::default();
        for page in addr / PAGE_BYTES..(addr + len_bytes).div_ceil(PAGE_BYTES) {
            view.pages.insert(page, vec![0; PAGE_BYTES as usize].into());
        }
        view
    }

    /// A suspended and resumed access: the page comes, another one goes.
    fn touch(&mut self, page: u64) -> KernelResult<&mut [u8]> {
        if let Some(residency) = self.residency
            && !self.mapped.contains(&page)
        {
            self.faults += 1;
            self.mapped.push(page);
            if self.mapped.len() > residency {
                self.mapped.remove(0);
            }
        }
        let missing = || WireError::new(ErrorCode::Fault, format!("No page at {:#x}", page * PAGE_BYTES));
        self.pages.get_mut(&page).map(AsMut::as_mut).ok_or_else(missing)
    }

    fn bytes(&mut self, addr: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.read(addr, &mut out).expect("test reads its own memory");
        out
    }

    fn put_u64(&mut self, addr: u64, value: u64) {
        self.write(addr, &value.to_ne_bytes()).expect("test writes its own memory");
    }

    fn put_u32(&mut self, addr: u64, value: u32) {
        self.write(addr, &value.to_ne_bytes()).expect("test writes its own memory");
    }
}

impl DeviceView for FakeView {
    fn read(&mut self, addr: u64, out: &mut [u8]) -> KernelResult<()> {
        let mut rest = out;
        for (at, len) in page_pieces(addr, rest.len() as u64)? {
            let (piece, later) = rest.split_at_mut(len);
            let offset = (at % PAGE_BYTES) as usize;
            piece.copy_from_slice(&self.touch(at / PAGE_BYTES)?[offset..offset + len]);
            rest = later;
        }
        Ok(())
    }

    fn write(&mut self, addr: u64, bytes: &[u8]) -> KernelResult<()> {
        let mut rest = bytes;
        for (at, len) in page_pieces(addr, bytes.len() as u64)? {
            let (piece, later) = rest.split_at(len);
            let offset = (at % PAGE_BYTES) as usize;
            self.touch(at / PAGE_BYTES)?[offset..offset + len].copy_from_slice(piece);
            rest = later;
        }
        Ok(())
    }

    fn load_u64(&mut self, addr: u64) -> KernelResult<u64> {
        let mut bytes = [0; 8];
        self.read(addr, &mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn store_u64(&mut self, addr: u64, value: u64) -> KernelResult<()> {
        self.write(addr, &value.to_ne_bytes())
    }

    fn fetch_add_u64(&mut self, addr: u64, value: u64) -> KernelResult<u64> {
        let old = self.load_u64(addr)?;
        self.store_u64(addr, old.wrapping_add(value))?;
        Ok(old)
    }
}

fn call(view: &mut FakeView, name: &str, args: &[u64]) -> KernelResult<Vec<u64>> {
    let kernel = all().into_iter().find(|kernel| kernel.name == name).expect("kernel exists");
    assert_eq!(kernel.argument_count, args.len());
    (kernel.run)(view, args)
}

/// Runs on plain memory, then with one and with two mapped pages; returns the common result and memory.
fn call_every_way(view: &FakeView, name: &str, args: &[u64]) -> (Vec<u64>, FakeView) {
    let mut plain = view.clone();
    let results = call(&mut plain, name, args).expect("kernel succeeds");
    for residency in [1, 2] {
        let mut faulting = FakeView { residency: Some(residency), ..view.clone() };
        assert_eq!(call(&mut faulting, name, args).as_ref(), Ok(&results), "{name} with {residency} mapped pages");
        assert!(faulting.faults > 0, "{name} touched nothing");
        assert!(faulting.pages == plain.pages, "{name} left other bytes with {residency} mapped pages");
    }
    (results, plain)
}

const AT: u64 = 0x7f00_0000_0000;

#[test]
fn names_are_unique_and_usage_lines_begin_with_them() {
    let kernels = all();
    let names: HashSet<_> = kernels.iter().map(|kernel| kernel.name).collect();
    assert_eq!(names.len(), kernels.len());
    for kernel in &kernels {
        let arguments = kernel.usage.split(['(', ')']).nth(1).expect("usage has an argument list");
        assert!(kernel.usage.starts_with(&format!("{}(", kernel.name)), "{}", kernel.usage);
        assert_eq!(arguments.split(", ").count(), kernel.argument_count, "{}", kernel.usage);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn fill_and_scan_agree_on_any_range(offset in 0_u64..5000, len in 1_u64..12_000, value in 1_u8..=255) {
        let view = FakeView::with_range(AT, 20_000);
        let (_, mut filled) = call_every_way(&view, "fill", &[AT + offset, len, value.into()]);
        let (count, _) = call_every_way(&filled, "scan", &[AT, 20_000, value.into()]);
        prop_assert_eq!(count, vec![len]);
        let bytes = filled.bytes(AT, 20_000);
        let inside = offset..offset + len;
        let expected: Vec<u8> = (0..20_000).map(|i| if inside.contains(&i) { value } else { 0 }).collect();
        prop_assert_eq!(bytes, expected);
    }

    #[test]
    fn copy_moves_unaligned_ranges(src in 0_u64..5000, dst in 20_000_u64..25_000, data in prop::collection::vec(any::<u8>(), 1..9000)) {
        let mut view = FakeView::with_range(AT, 40_000);
        view.write(AT + src, &data).expect("inside");
        let (_, mut copied) = call_every_way(&view, "copy", &[AT + dst, AT + src, data.len() as u64]);
        prop_assert_eq!(copied.bytes(AT + dst, data.len()), data);
    }

    #[test]
    fn sum_wraps_like_the_reference(start in 0_u64..700, values in prop::collection::vec(any::<u64>(), 1..1500)) {
        let mut view = FakeView::with_range(AT, 20_000);
        for (i, value) in values.iter().enumerate() {
            view.put_u64(AT + (start + i as u64) * 8, *value);
        }
        let (sum, _) = call_every_way(&view, "sum", &[AT + start * 8, values.len() as u64 * 8]);
        prop_assert_eq!(sum, vec![values.iter().fold(0, |sum: u64, value| sum.wrapping_add(*value))]);
    }

    #[test]
    fn list_walk_follows_nodes_that_straddle_pages(gaps in prop::collection::vec(16_u64..3000, 1..40)) {
        let mut view = FakeView::with_range(AT, 130_000);
        let addrs: Vec<u64> = gaps.iter().scan(AT, |at, gap| { *at += gap; Some(*at) }).collect();
        for (i, addr) in addrs.iter().enumerate() {
            view.put_u64(*addr, i as u64);
            view.put_u64(addr + 8, addrs.get(i + 1).copied().unwrap_or(0));
        }
        let (found, _) = call_every_way(&view, "list_walk", &[addrs[0], 8, 0]);
        let count = addrs.len() as u64;
        prop_assert_eq!(found, vec![count, count * (count - 1) / 2]);
    }
}

#[test]
fn overlapping_copies_bad_bytes_and_crooked_sums_are_refused() {
    let mut view = FakeView::with_range(AT, 8192);
    let refused = [
        ("copy", vec![AT, AT + 99, 100]),
        ("fill", vec![AT, 8, 256]),
        ("scan", vec![AT, 8, 1000]),
        ("sum", vec![AT + 4, 8]),
        ("sum", vec![AT, 12]),
        ("atomic_add", vec![AT, 1, 0]),
        ("top_k", vec![AT, 1, 0]),
        ("top_k", vec![AT, 1, 513]),
        ("hash_lookup", vec![AT, 0, AT, 0, AT]),
    ];
    for (name, args) in refused {
        let code = call(&mut view, name, &args).map_err(|error| error.code);
        assert_eq!(code, Err(ErrorCode::Invalid), "{name}{args:?}");
    }
    assert_eq!(call(&mut view, "copy", &[AT, AT + 100, 100]), Ok(vec![]), "touching ranges do not overlap");
}

#[test]
fn ranges_and_pointers_that_wrap_around_are_faults_and_not_panics() {
    let mut view = FakeView::with_range(AT, 8192);
    view.put_u64(AT, u64::MAX - 3);
    for (name, args) in [
        ("fill", vec![u64::MAX - 10, 100, 1]),
        ("sum", vec![u64::MAX - 7, 16]),
        ("list_walk", vec![u64::MAX - 3, 8, 0]),
        ("index_count", vec![AT, 1]),
        ("postings_walk", vec![AT, 1]),
        ("top_k", vec![AT, 1, 5]),
    ] {
        let code = call(&mut view, name, &args).map_err(|error| error.code);
        assert_eq!(code, Err(ErrorCode::Fault), "{name}{args:?}");
    }
}

#[test]
fn atomic_add_returns_the_value_before_the_last_addition() {
    let mut view = FakeView::with_range(AT, 4096);
    view.put_u64(AT + 64, 100);
    let (old, mut after) = call_every_way(&view, "atomic_add", &[AT + 64, 7, 5]);
    assert_eq!(old, [100 + 4 * 7]);
    assert_eq!(after.load_u64(AT + 64), Ok(135));
    assert!(!all().iter().any(|kernel| kernel.name == "atomic_add" && kernel.idempotent));
}

/// An index in fake memory, built as a client would, with awkward addresses.
struct Index {
    view: FakeView,
    free: u64,
    buckets: u64,
    bucket_count: u64,
    words: Vec<Word>,
}

struct Word {
    text: String,
    node: u64,
    occurrences: u32,
    postings: Vec<(u32, u32)>,
}

impl Index {
    fn build(bucket_count: u64, words: &[(&str, u32)]) -> Self {
        let view = FakeView::with_range(AT, 400_000);
        let mut index = Self { view, free: AT + bucket_count * 8 + 4, buckets: AT, bucket_count, words: Vec::new() };
        for (number, (text, occurrences)) in words.iter().enumerate() {
            index.add(text, *occurrences, number as u32);
        }
        index
    }

    fn take(&mut self, len_bytes: u64) -> u64 {
        let at = self.free;
        // An odd stride makes every field straddle a page boundary sooner or later.
        self.free += len_bytes + 37;
        at
    }

    fn add(&mut self, text: &str, occurrences: u32, document: u32) {
        let text_at = self.take(text.len() as u64);
        self.view.write(text_at, text.as_bytes()).expect("inside");
        let postings: Vec<(u32, u32)> = (0..occurrences).map(|i| (document, i * 3)).collect();
        let mut head = 0;
        for (document, position) in &postings {
            let at = self.take(posting::BYTES);
            self.view.put_u64(at + posting::NEXT, head);
            self.view.put_u32(at + posting::DOCUMENT, *document);
            self.view.put_u32(at + posting::POSITION, *position);
            head = at;
        }
        let hash = fnv1a_64(text.as_bytes());
        let bucket = self.buckets + hash % self.bucket_count * 8;
        let node = self.take(word::BYTES);
        let next = self.view.load_u64(bucket).expect("inside");
        self.view.put_u64(node + word::NEXT, next);
        self.view.put_u64(node + word::HASH, hash);
        self.view.put_u64(node + word::TEXT, text_at);
        self.view.put_u32(node + word::TEXT_LEN, text.len() as u32);
        self.view.put_u32(node + word::COUNT, occurrences);
        self.view.put_u64(node + word::POSTINGS, head);
        self.view.put_u64(bucket, node);
        self.words.push(Word { text: text.to_owned(), node, occurrences, postings });
    }
}

const WORDS: &[(&str, u32)] =
    &[("the", 40), ("whale", 17), ("sea", 17), ("Ahab", 9), ("ship", 12), ("white", 1), ("a", 60), ("harpooneer", 2)];

#[test]
fn hash_lookup_writes_occurrences_and_zero_for_strangers() {
    let mut index = Index::build(3, WORDS);
    let long = "x".repeat(9000);
    let questions = ["whale", "Whale", "a", "harpooneer", "", "thee", &long];
    let queries = index.take(questions.len() as u64 * 16);
    let results = index.take(questions.len() as u64 * 8);
    for (number, text) in questions.iter().enumerate() {
        let at = index.take(text.len() as u64);
        index.view.write(at, text.as_bytes()).expect("inside");
        index.view.put_u64(queries + number as u64 * 16, at);
        index.view.put_u64(queries + number as u64 * 16 + 8, text.len() as u64);
        index.view.put_u64(results + number as u64 * 8, 0xdead);
    }
    let args = [index.buckets, index.bucket_count, queries, questions.len() as u64, results];
    let (found, mut after) = call_every_way(&index.view, "hash_lookup", &args);
    assert_eq!(found, [3]);
    let answers: Vec<u64> =
        (0..questions.len() as u64).map(|i| after.load_u64(results + i * 8).expect("inside")).collect();
    assert_eq!(answers, [17, 0, 60, 2, 0, 0, 0]);
}

#[test]
fn index_count_and_postings_walk_see_every_word_and_posting() {
    let index = Index::build(3, WORDS);
    let total: u64 = WORDS.iter().map(|(_, occurrences)| u64::from(*occurrences)).sum();
    let longest = (0..3_u64)
        .map(|bucket| WORDS.iter().filter(|(text, _)| fnv1a_64(text.as_bytes()) % 3 == bucket).count() as u64)
        .max();
    let (counted, _) = call_every_way(&index.view, "index_count", &[index.buckets, 3]);
    assert_eq!(Some(counted), longest.map(|longest| vec![WORDS.len() as u64, total, longest]));
    let checksum = index
        .words
        .iter()
        .flat_map(|word| &word.postings)
        .fold(0_u64, |sum, (document, position)| sum.wrapping_add(posting_checksum(*document, *position)));
    let (walked, _) = call_every_way(&index.view, "postings_walk", &[index.buckets, 3]);
    assert_eq!(walked, [total, checksum]);
}

#[test]
fn top_k_orders_by_occurrences_then_hash() {
    let index = Index::build(3, WORDS);
    let mut order: Vec<_> = index.words.iter().collect();
    order.sort_by_key(|word| (std::cmp::Reverse(word.occurrences), fnv1a_64(word.text.as_bytes())));
    for k in [1, 4, 8, 100] {
        let expected: Vec<u64> =
            order.iter().take(k).flat_map(|word| [word.node, u64::from(word.occurrences)]).collect();
        let (best, _) = call_every_way(&index.view, "top_k", &[index.buckets, 3, k as u64]);
        assert_eq!(best, expected, "k = {k}");
    }
}
