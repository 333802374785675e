use std::collections::{HashMap, HashSet};

use uhmm_ipc::message::pager::MapKind;

use super::*;

const BASE: u64 = 0x7000_0000_0000;
const KEY: RegionKey = RegionKey { space: 1, region: 10 };

fn step(book: &mut FaultBook, event: FaultEvent) -> Vec<FaultAction> {
    let mut out = Vec::new();
    book.handle(event, &mut out);
    out
}

fn fault(number: u64, page: u64, write: bool) -> FaultEvent {
    let addr = BASE + page * PAGE_BYTES + 8;
    FaultEvent::Fault { fault: FaultId(number), job: JobId(number), space: 1, addr, write, range: None }
}

fn run(first_page: u64, page_count: u64, writable: bool) -> MapRun {
    MapRun { first_page, page_count, kind: MapKind::Frame(0), writable }
}

/// A book that knows one attached region of 1000 pages.
fn book() -> FaultBook {
    let mut book = FaultBook::new();
    step(&mut book, fault(0, 999, false));
    step(&mut book, FaultEvent::Found { key: KEY, addr: BASE, page_count: 1000 });
    let out = step(&mut book, FaultEvent::Attached { key: KEY });
    let window = asked(&out).0;
    step(&mut book, FaultEvent::Installed { window, runs: vec![run(999, 1, true)], refused: vec![] });
    assert!(book.idle());
    book
}

fn asked(actions: &[FaultAction]) -> (WindowId, PageRange, u64, bool) {
    let found = actions.iter().find_map(|action| match action {
        FaultAction::Ask { window, pages, fault_page, write, .. } => Some((*window, *pages, *fault_page, *write)),
        _ => None,
    });
    found.unwrap_or_else(|| panic!("nothing was asked: {actions:?}"))
}

fn resumed(actions: &[FaultAction]) -> Vec<(u64, Option<ErrorCode>)> {
    actions
        .iter()
        .filter_map(|action| match action {
            FaultAction::Resume { fault, outcome } => Some((fault.0, outcome.as_ref().err().map(|error| error.code))),
            _ => None,
        })
        .collect()
}

#[test]
fn an_unknown_address_is_looked_up_attached_and_only_then_asked_for() {
    let mut book = FaultBook::new();
    let out = step(&mut book, fault(1, 70, true));
    assert_eq!(out, [FaultAction::Lookup { job: JobId(1), space: 1, addr: BASE + 70 * PAGE_BYTES + 8 }]);
    assert_eq!(step(&mut book, fault(2, 71, false)), [], "one lookup at a time");
    let out = step(&mut book, FaultEvent::Found { key: KEY, addr: BASE, page_count: 1000 });
    assert_eq!(out, [FaultAction::Attach { key: KEY }], "the pager must know the table first");
    let out = step(&mut book, FaultEvent::Attached { key: KEY });
    let (window, pages, page, write) = asked(&out);
    assert_eq!((pages, page, write), (PageRange { first: 64, count: 64 }, 70, true));
    let out = step(&mut book, FaultEvent::Installed { window, runs: vec![run(64, 64, true)], refused: vec![] });
    assert_eq!(resumed(&out), [(1, None), (2, None)]);
    assert!(book.idle());
}

#[test]
fn faults_of_one_window_share_one_question() {
    let mut book = book();
    let (window, ..) = asked(&step(&mut book, fault(1, 130, false)));
    assert_eq!(step(&mut book, fault(2, 191, false)), []);
    assert_ne!(asked(&step(&mut book, fault(3, 192, false))).0, window, "the next window is another question");
    let out = step(&mut book, FaultEvent::Installed { window, runs: vec![run(128, 64, false)], refused: vec![] });
    assert_eq!(resumed(&out), [(1, None), (2, None)]);
}

#[test]
fn a_page_that_the_answer_left_out_becomes_the_next_question_at_once() {
    let mut book = book();
    let (window, ..) = asked(&step(&mut book, fault(1, 130, false)));
    step(&mut book, fault(2, 140, true));
    let out = step(&mut book, FaultEvent::Installed { window, runs: vec![run(130, 11, false)], refused: vec![] });
    assert_eq!(resumed(&out), [(1, None)], "a read-only mapping does not serve a write");
    let (again, _, page, write) = asked(&out);
    assert_eq!((again, page, write), (window, 140, true));
}

#[test]
fn pending_pages_are_given_back_before_the_next_question() {
    let mut book = book();
    let out = step(&mut book, fault(1, 130, false));
    let FaultAction::Ask { nonce, pages, window, .. } = out[0] else { panic!("{out:?}") };
    let out =
        step(&mut book, FaultEvent::Failed { window, error: WireError::new(ErrorCode::Busy, "Invalidated meanwhile") });
    assert_eq!(out[0], FaultAction::Abandon { key: KEY, pages, nonce });
    let out = step(&mut book, FaultEvent::RetryDue(Retry::Window(window)));
    assert!(matches!(out[0], FaultAction::Ask { nonce: fresh, .. } if fresh != nonce), "{out:?}");
}

#[test]
fn lost_races_back_off_and_end_after_a_bounded_number_of_attempts() {
    let mut book = book();
    let mut out = step(&mut book, fault(1, 130, false));
    let mut pauses = Vec::new();
    loop {
        let (window, ..) = asked(&out);
        let refused = FaultEvent::Installed { window, runs: vec![run(128, 64, true)], refused: vec![130] };
        out = step(&mut book, refused);
        let Some(after) = out.iter().find_map(|action| match action {
            FaultAction::RetryAfter { after, .. } => Some(*after),
            _ => None,
        }) else {
            break;
        };
        pauses.push(after);
        out = step(&mut book, FaultEvent::RetryDue(Retry::Window(window)));
    }
    assert_eq!(resumed(&out), [(1, Some(ErrorCode::Busy))]);
    assert_eq!(pauses.len(), MAX_ATTEMPTS as usize);
    assert!(pauses.is_sorted() && pauses[0] == FIRST_PAUSE && pauses[pauses.len() - 1] == LONGEST_PAUSE);
    assert!(book.idle());
}

#[test]
fn an_unmanaged_address_fails_as_efault_and_names_it() {
    let mut book = FaultBook::new();
    step(&mut book, fault(1, 3, true));
    step(&mut book, fault(2, 900, false));
    let out = step(
        &mut book,
        FaultEvent::LookupFailed { space: 1, error: WireError::new(ErrorCode::NotFound, "No region holds it") },
    );
    assert_eq!(resumed(&out), [(1, Some(ErrorCode::Fault))]);
    let FaultAction::Resume { outcome: Err(error), .. } = &out[0] else { panic!("{out:?}") };
    assert!(error.text.contains("write of address 0x700000003008"), "{}", error.text);
    let next = BASE + 900 * PAGE_BYTES + 8;
    assert_eq!(
        out[1],
        FaultAction::Lookup { job: JobId(2), space: 1, addr: next },
        "the other address gets its own lookup"
    );
}

#[test]
fn a_refused_write_fails_writers_of_that_page_only() {
    let mut book = book();
    let (window, ..) = asked(&step(&mut book, fault(1, 130, true)));
    step(&mut book, fault(2, 130, false));
    step(&mut book, fault(3, 131, true));
    let out = step(
        &mut book,
        FaultEvent::Failed { window, error: WireError::new(ErrorCode::Permission, "Region is read-only for devices") },
    );
    assert_eq!(resumed(&out), [(1, Some(ErrorCode::Permission))]);
    let (_, _, page, write) = asked(&out);
    assert_eq!((page, write), (130, false), "the reader goes on");
}

#[test]
fn a_region_that_vanished_is_looked_up_again_and_the_answer_for_the_old_one_is_ignored() {
    let mut book = book();
    let (window, ..) = asked(&step(&mut book, fault(1, 130, false)));
    let out = step(&mut book, FaultEvent::Unmapped { key: KEY });
    assert!(matches!(out[..], [FaultAction::Lookup { space: 1, .. }]), "{out:?}");
    assert!(book.window(window).is_none());
    assert_eq!(step(&mut book, FaultEvent::Installed { window, runs: vec![run(128, 64, true)], refused: vec![] }), []);
    let newer = RegionKey { space: 1, region: 11 };
    let out = step(&mut book, FaultEvent::Found { key: newer, addr: BASE + 128 * PAGE_BYTES, page_count: 8 });
    assert_eq!(out, [FaultAction::Attach { key: newer }]);
    let out = step(&mut book, FaultEvent::Attached { key: newer });
    assert_eq!(asked(&out).1, PageRange { first: 0, count: 8 }, "pages count from the new region's start");
}

#[test]
fn a_region_that_vanishes_again_and_again_ends_the_fault() {
    let mut book = book();
    step(&mut book, fault(1, 130, false));
    let mut answers = Vec::new();
    for region in 20..30 {
        let key = RegionKey { space: 1, region };
        answers
            .extend(resumed(&step(&mut book, FaultEvent::Unmapped { key: RegionKey { region: region - 1, ..key } })));
        if region == 20 {
            answers.extend(resumed(&step(&mut book, FaultEvent::Unmapped { key: KEY })));
        }
        step(&mut book, FaultEvent::Found { key, addr: BASE, page_count: 1000 });
        step(&mut book, FaultEvent::Attached { key });
    }
    assert_eq!(answers, [(1, Some(ErrorCode::Fault))]);
}

#[test]
fn a_new_region_over_an_old_one_drops_the_old_table() {
    let mut book = book();
    step(
        &mut book,
        FaultEvent::Fault {
            fault: FaultId(5),
            job: JobId(5),
            space: 1,
            addr: BASE + 1000 * PAGE_BYTES,
            write: false,
            range: None,
        },
    );
    let newer = RegionKey { space: 1, region: 11 };
    let out = step(&mut book, FaultEvent::Found { key: newer, addr: BASE + 999 * PAGE_BYTES, page_count: 5 });
    assert_eq!(out, [FaultAction::Drop { key: KEY }, FaultAction::Attach { key: newer }]);
}

#[test]
fn a_mirror_that_answers_beside_the_question_fails_the_fault() {
    let mut book = FaultBook::new();
    step(&mut book, fault(1, 3, false));
    let out = step(&mut book, FaultEvent::Found { key: KEY, addr: BASE, page_count: 3 });
    assert_eq!(resumed(&out), [(1, Some(ErrorCode::Protocol))]);
    step(&mut book, fault(2, 3, false));
    let out = step(&mut book, FaultEvent::Found { key: KEY, addr: BASE, page_count: u64::MAX });
    assert_eq!(resumed(&out), [(2, Some(ErrorCode::Protocol))], "a length that wraps around is no region");
}

#[test]
fn cancelled_jobs_and_lost_spaces_leave_nothing_behind() {
    let mut book = book();
    let (window, ..) = asked(&step(&mut book, fault(1, 130, false)));
    step(&mut book, FaultEvent::JobGone { job: JobId(1) });
    let out = step(&mut book, FaultEvent::Installed { window, runs: vec![run(128, 64, true)], refused: vec![] });
    assert_eq!(resumed(&out), []);
    step(&mut book, fault(2, 300, false));
    step(&mut book, FaultEvent::SpaceGone { space: 1 });
    assert!(book.idle());
    let out = step(&mut book, fault(3, 300, false));
    assert!(matches!(out[..], [FaultAction::Lookup { .. }]), "nothing of the old space is remembered");
}

/// Small deterministic generator: the seed is the test case.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// A mirror that answers late, partially, busily, or not as hoped.
fn answer(dice: &mut Dice, action: &FaultAction) -> Option<FaultEvent> {
    Some(match action {
        FaultAction::Lookup { space, .. } if dice.roll(4) == 0 => {
            FaultEvent::LookupFailed { space: *space, error: WireError::new(ErrorCode::TimedOut, "Late") }
        }
        FaultAction::Lookup { .. } => FaultEvent::Found { key: KEY, addr: BASE, page_count: 1000 },
        FaultAction::Attach { key } => FaultEvent::Attached { key: *key },
        FaultAction::Ask { window, pages, fault_page, write, .. } => match dice.roll(8) {
            0 => FaultEvent::Failed { window: *window, error: WireError::new(ErrorCode::Busy, "Invalidated") },
            1 => FaultEvent::Failed { window: *window, error: WireError::new(ErrorCode::NotFound, "Freed") },
            2 => FaultEvent::Installed { window: *window, runs: vec![run(*fault_page, 1, *write)], refused: vec![] },
            3 => FaultEvent::Installed {
                window: *window,
                runs: vec![run(pages.first, pages.count, *write)],
                refused: vec![*fault_page],
            },
            _ => FaultEvent::Installed {
                window: *window,
                runs: vec![run(pages.first, pages.count, true)],
                refused: vec![],
            },
        },
        FaultAction::RetryAfter { retry, .. } => FaultEvent::RetryDue(*retry),
        FaultAction::Drop { .. } | FaultAction::Abandon { .. } | FaultAction::Resume { .. } => return None,
    })
}

#[test]
fn every_fault_is_answered_exactly_once_whatever_the_order_of_answers() {
    for seed in 1..=300 {
        let mut dice = Dice(seed);
        let mut book = FaultBook::new();
        let mut todo: Vec<FaultEvent> = Vec::new();
        let mut open: HashMap<u64, u64> = HashMap::new();
        let mut asked_pages: HashSet<(WindowId, u64)> = HashSet::new();
        let mut next = 0;
        while next < 60 || !todo.is_empty() {
            let event = if next < 60 && (todo.is_empty() || dice.roll(3) == 0) {
                next += 1;
                let page = dice.roll(1000);
                open.insert(next, page);
                fault(next, page, dice.roll(2) == 0)
            } else {
                let pick = usize::try_from(dice.roll(todo.len() as u64)).unwrap_or(0);
                todo.swap_remove(pick)
            };
            for action in step(&mut book, event) {
                if let FaultAction::Ask { window, pages, fault_page, .. } = &action {
                    assert!(pages.contains(*fault_page), "seed {seed}");
                    asked_pages.insert((*window, *fault_page));
                }
                if let FaultAction::Resume { fault, .. } = &action {
                    assert!(open.remove(&fault.0).is_some(), "seed {seed}: fault {} answered twice", fault.0);
                }
                todo.extend(answer(&mut dice, &action));
            }
        }
        assert!(open.is_empty(), "seed {seed}: never answered {open:?}");
        assert!(book.idle() && !asked_pages.is_empty(), "seed {seed}");
    }
}

fn range_fault(number: u64, page: u64, end_page: u64, exclusive: bool) -> FaultEvent {
    let range = Some(FaultRange { end: BASE + end_page * PAGE_BYTES, exclusive });
    let addr = BASE + page * PAGE_BYTES;
    FaultEvent::Fault { fault: FaultId(number), job: JobId(number), space: 1, addr, write: true, range }
}

#[test]
fn a_range_fault_asks_for_the_rest_of_its_range_inside_the_region() {
    let mut book = book();
    let (first, pages, page, write) = asked(&step(&mut book, range_fault(1, 3, 300, false)));
    assert_eq!((pages, page, write), (PageRange { first: 3, count: 297 }, 3, true));
    assert!(book.window(first).is_some_and(|window| window.range_job() == Some((JobId(1), true))));
    let (second, pages, ..) = asked(&step(&mut book, range_fault(2, 990, 5000, true)));
    assert_eq!(pages, PageRange { first: 990, count: 10 }, "the region ends there");
    assert_eq!(book.window(second).and_then(Window::range_job), Some((JobId(2), true)));
    let out = step(&mut book, FaultEvent::Installed { window: first, runs: vec![run(3, 1, true)], refused: vec![] });
    assert_eq!(resumed(&out), [(1, None)], "the first page is enough to go on");
}

#[test]
fn a_range_is_bounded_and_shares_no_question_with_others() {
    let mut book = FaultBook::new();
    step(&mut book, range_fault(1, 0, 100_000, false));
    step(&mut book, FaultEvent::Found { key: KEY, addr: BASE, page_count: 100_000 });
    let (range, pages, ..) = asked(&step(&mut book, FaultEvent::Attached { key: KEY }));
    assert_eq!(pages, PageRange { first: 0, count: RANGE_PAGES_MAX });
    let (single, pages, ..) = asked(&step(&mut book, fault(2, 70, false)));
    assert_eq!(pages, PageRange { first: 64, count: 64 }, "a job's fault does not wait for the whole range");
    assert_ne!(range, single);
    let (other, ..) = asked(&step(&mut book, range_fault(3, 64, 65, false)));
    assert!(other != range && other != single);
}
