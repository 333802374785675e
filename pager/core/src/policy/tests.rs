use super::thrash::{Direction, Thrash, Verdict};
use super::*;

const REGION: RegionId = RegionId(1);

fn fault(region: u64, page: u64) -> CpuFault {
    CpuFault { region: RegionId(region), page, attr: Attr::default(), huge: false, huge_phase: 0 }
}

#[test]
fn a_sequential_walk_doubles_and_a_jump_starts_again() {
    let mut policy = DefaultPolicy::default();
    let mut page = 100;
    let mut windows = Vec::new();
    for _ in 0..9 {
        let window = policy.cpu_fault(fault(1, page));
        assert_eq!(window.first, page);
        windows.push(window.count);
        page += window.count;
    }
    assert_eq!(windows, [1, 2, 4, 8, 16, 32, 64, 64, 64]);
    assert_eq!(policy.cpu_fault(fault(1, 5)).count, 1);
    assert_eq!(policy.cpu_fault(fault(2, page)).count, 1, "another region is another stream");
}

#[test]
fn what_is_held_to_a_limit_comes_home_in_blocks_and_a_walk_goes_on_from_there() {
    let mut policy = DefaultPolicy::default();
    policy.is_held_to_a_limit(REGION);
    let mut windows = |region, page| {
        let window = policy.cpu_fault(CpuFault { huge_phase: 3, ..fault(region, page) });
        (window.first, window.end())
    };
    assert_eq!(windows(1, 777), (771, 787), "by address");
    assert_eq!(windows(1, 787), (787, 819), "a walk");
    assert_eq!(windows(1, 819), (819, 883));
    assert_eq!(windows(1, 900), (899, 915), "a jump");
    assert_eq!(windows(2, 900), (900, 901), "another region");
    policy.region_gone(REGION);
    assert_eq!(policy.cpu_fault(fault(1, 5)), Pages::one(5));
}

#[test]
fn interleaved_streams_do_not_disturb_each_other() {
    let mut policy = DefaultPolicy::default();
    let (mut a, mut b) = (0, 10_000);
    for _ in 0..5 {
        a += policy.fault_around_zero(REGION, a);
        b += policy.fault_around_zero(REGION, b);
    }
    assert_eq!((a, b), (31, 10_031));
}

#[test]
fn granularity_is_an_aligned_block_around_the_page() {
    let mut policy = DefaultPolicy::default();
    let mut blocks = |log2, page, huge_phase| {
        let attr = Attr::default().with_granularity(Some(log2));
        let window = policy.cpu_fault(CpuFault { attr, huge_phase, ..fault(1, page) });
        (window.first, window.end())
    };
    assert_eq!(blocks(0, 77, 0), (77, 78));
    assert_eq!(blocks(4, 77, 0), (64, 80));
    assert_eq!(blocks(4, 77, 3), (67, 83), "blocks are aligned by address");
    assert_eq!(blocks(9, 2, 500), (0, 500), "the first block of a region is cut");
    assert_eq!(blocks(63, 77, 0).0, 0);
}

#[test]
fn a_huge_page_comes_home_whole() {
    let mut policy = DefaultPolicy::default();
    let window = policy.cpu_fault(CpuFault { huge: true, huge_phase: 100, ..fault(1, 700) });
    assert_eq!((window.first, window.count), (612, 512));
}

/// One turn: out and home again, which takes `lasts_us` each, `gap_us` apart. Returns what the device fault met and the time after it.
fn turn(thrash: &mut Thrash, mut now_us: u64, lasts_us: u64, gap_us: u64) -> (Verdict, u64) {
    let verdict = thrash.verdict(REGION, 3, now_us);
    if let Verdict::Wait { until_us } = verdict {
        assert_eq!(thrash.verdict(REGION, 3, now_us), verdict, "asking again does not help");
        now_us = until_us;
        assert_eq!(thrash.verdict(REGION, 3, now_us), Verdict::Calm, "it has waited");
    }
    let pages = Pages { first: 3, count: 1 };
    let out = now_us..now_us + lasts_us;
    let home = out.end + gap_us..out.end + gap_us + lasts_us;
    let later = home.end + gap_us;
    thrash.moved(REGION, pages, Direction::Out, &out);
    thrash.moved(REGION, pages, Direction::Home, &home);
    (verdict, later)
}

fn fight(lasts_us: u64) {
    let mut thrash = Thrash::default();
    let mut now_us = 1_000_000;
    let mut met = Vec::new();
    for _ in 0..20 {
        let (verdict, later) = turn(&mut thrash, now_us, lasts_us, 100);
        met.push(verdict);
        now_us = later;
        if verdict == Verdict::Pinned {
            break;
        }
    }
    let calm = met.iter().take_while(|verdict| **verdict == Verdict::Calm).count();
    let waits = met[calm..].iter().filter(|verdict| matches!(verdict, Verdict::Wait { .. })).count();
    assert_eq!((calm, waits, met.last()), (4, 10, Some(&Verdict::Pinned)));
    assert!(thrash.is_pinned(REGION, 3) && !thrash.is_pinned(REGION, 600), "the block, not the region");
    assert_eq!(thrash.verdict(REGION, 3, now_us + 350 * lasts_us.max(2_000)), Verdict::Calm);
    assert!(!thrash.is_pinned(REGION, 3));
}

#[test]
fn a_fight_is_slowed_down_then_pinned_then_forgotten() {
    fight(0);
}

#[test]
fn a_fight_for_a_slow_device_is_one_too() {
    // A device that takes 100 ms for a page.
    fight(100_000);
    let mut thrash = Thrash::default();
    let (verdict, now_us) = turn(&mut thrash, 0, 100_000, 150_000);
    let (_, now_us) = turn(&mut thrash, now_us, 100_000, 150_000);
    let out = now_us..now_us + 100_000;
    thrash.moved(REGION, Pages { first: 3, count: 1 }, Direction::Out, &out);
    let waits = thrash.cpu_waits_until_us(REGION, 3, out.end, || false);
    assert_eq!((verdict, waits), (Verdict::Calm, Some(out.end + 75_000)));
}

#[test]
fn slow_turns_are_no_fight() {
    let mut thrash = Thrash::default();
    let mut now_us = 0;
    for _ in 0..50 {
        let (verdict, later) = turn(&mut thrash, now_us, 0, 10_000);
        assert_eq!(verdict, Verdict::Calm);
        now_us = later;
    }
}

/// A device gets page 3 and uses it when `uses` says so (asked with the time since it got it); the CPU wants it `wants_us` after that.
/// Returns how long the CPU waited.
fn cpu_wait(thrash: &mut Thrash, now_us: &mut u64, wants_us: u64, uses: impl Fn(u64) -> bool) -> u64 {
    let page = Pages { first: 3, count: 1 };
    let verdict = thrash.verdict(REGION, 3, *now_us);
    if let Verdict::Wait { until_us } = verdict {
        *now_us = until_us;
        thrash.verdict(REGION, 3, until_us);
    }
    let got_us = *now_us;
    thrash.moved(REGION, page, Direction::Out, &(got_us..got_us));
    *now_us += wants_us;
    let mut looks = 0;
    while let Some(until_us) = thrash.cpu_waits_until_us(REGION, 3, *now_us, || uses(*now_us - got_us)) {
        assert!(until_us > *now_us && looks < 100, "it gets on");
        (*now_us, looks) = (until_us, looks + 1);
    }
    let waited_us = *now_us - got_us - wants_us;
    thrash.moved(REGION, page, Direction::Home, &(*now_us..*now_us));
    *now_us += 50;
    waited_us
}

#[test]
fn a_page_that_is_handed_over_waits_for_nobody() {
    let (mut thrash, mut now_us) = (Thrash::default(), 0);
    let begun_us = now_us;
    for _ in 0..100 {
        // Used once before the job ended, 200 us before the CPU reads it.
        let is_first = std::cell::Cell::new(true);
        assert!(cpu_wait(&mut thrash, &mut now_us, 200, |_| is_first.replace(false)) <= 100);
    }
    assert!(
        now_us - begun_us <= 100 * (200 + 50) + 50 * 100,
        "{} us: every second turn is looked at",
        now_us - begun_us
    );
    assert!(thrash.is_pinned(REGION, 3), "nobody has waited, and it need not move for ever");
}

#[test]
fn a_device_that_goes_on_using_a_page_or_has_not_begun_keeps_it_for_its_slice() {
    for uses in [true, false] {
        let (mut thrash, mut now_us) = (Thrash::default(), 0);
        let waits: Vec<u64> = (0..4).map(|_| cpu_wait(&mut thrash, &mut now_us, 5, |_| uses)).collect();
        assert_eq!(waits[..3], [0, 1_495, 1_495], "used: {uses}");
    }
    // It begins late, and is done then.
    let (mut thrash, mut now_us) = (Thrash::default(), 0);
    cpu_wait(&mut thrash, &mut now_us, 5, |_| false);
    assert_eq!(cpu_wait(&mut thrash, &mut now_us, 5, |since_us| since_us > 1_000), 1_495, "nobody tells when it began");
}
