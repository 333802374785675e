use super::*;

fn system(first_page: u64, page_count: u64) -> MapRun {
    MapRun { first_page, page_count, kind: MapKind::System, writable: true }
}

fn pages(runs: Option<Vec<MapRun>>) -> Vec<u64> {
    runs.expect("the fault's page is good")
        .iter()
        .flat_map(|run| run.first_page..run.first_page + run.page_count)
        .collect()
}

#[test]
fn an_undisturbed_answer_stays_as_it_is() {
    let window = Window::new(0, 10, 4);
    let runs = vec![system(0, 3), system(4, 6)];
    assert!(!window.is_hit());
    assert_eq!(window.keep(runs.clone()), Some(runs));
}

#[test]
fn frames_and_rights_follow_the_pages_when_a_run_is_cut() {
    let mut window = Window::new(100, 100, 100);
    window.invalidate(110, 5);
    let run = MapRun { first_page: 100, page_count: 20, kind: MapKind::Frame(7000), writable: false };
    let second = MapRun { first_page: 115, page_count: 5, kind: MapKind::Frame(7015), ..run };
    assert_eq!(window.keep(vec![run]), Some(vec![MapRun { page_count: 10, ..run }, second]));
}

#[test]
fn what_lies_outside_the_window_does_not_count() {
    let mut window = Window::new(100, 100, 150);
    for (first_page, page_count) in [(0, 100), (200, 100), (u64::MAX, u64::MAX), (150, 0)] {
        window.invalidate(first_page, page_count);
    }
    assert!(!window.is_hit());
    window.invalidate(0, 101);
    window.invalidate(199, u64::MAX);
    assert_eq!(pages(window.keep(vec![system(100, 100)])), (101..199).collect::<Vec<_>>());
}

#[test]
fn nothing_is_left_when_the_page_of_the_fault_or_everything_was_invalidated() {
    let mut window = Window::new(0, 10, 4);
    window.invalidate(4, 1);
    assert_eq!(window.keep(vec![system(0, 10)]), None);
    let mut window = Window::new(0, 10, 4);
    window.invalidate_all();
    assert_eq!(window.keep(vec![system(0, 10)]), None);
}

#[test]
fn many_small_invalidations_never_cost_the_page_of_the_fault_and_never_leave_an_invalidated_page() {
    // Every other page, from both ends towards the fault's page and in a scattered order.
    let scattered = (0..4096u64).map(|index| index * 1543 % 4096 * 2);
    let orders: [Vec<u64>; 2] = [(0..4096).map(|index| index * 2).collect(), scattered.collect()];
    for order in orders {
        let mut window = Window::new(0, 8192, 4001);
        for page in &order {
            window.invalidate(*page, 1);
            assert!(window.marks.len() <= MARKS_MAX);
            let apart = window.marks.windows(2).all(|two| two[0].end < two[1].first);
            assert!(apart && window.marks.iter().all(|mark| mark.first < mark.end), "{:?}", window.marks);
        }
        let good = pages(window.keep(vec![system(0, 8192)]));
        assert!(good.contains(&4001));
        assert!(good.iter().all(|page| page % 2 == 1), "{good:?}");
    }
}

#[test]
fn a_few_small_invalidations_cost_just_their_pages() {
    let mut window = Window::new(0, 8192, 0);
    let marks: Vec<u64> = (1..=MARKS_MAX as u64).map(|index| index * 200).collect();
    for page in &marks {
        window.invalidate(*page, 1);
    }
    let good = pages(window.keep(vec![system(0, 8192)]));
    assert_eq!(good, (0..8192).filter(|page| !marks.contains(page)).collect::<Vec<_>>());
}

#[test]
fn cuts_never_make_more_runs_than_a_message_takes_and_keep_the_page_of_the_fault() {
    let most = u64::from(MAX_RUNS);
    // Four pages a run and one page between runs, so that no two can be one.
    let runs: Vec<MapRun> = (0..most).map(|index| system(index * 5, 4)).collect();
    for fault_page in [0, 5 * 1000, 5 * (most - 1)] {
        let mut window = Window::new(0, most * 5, fault_page);
        for index in 1..30 {
            window.invalidate(index * 300 + 1, 1);
        }
        let kept = window.keep(runs.clone()).expect("the fault's page is good");
        assert_eq!(kept.len() as u64, most);
        assert!(kept.iter().any(|run| holds(run, fault_page)), "{fault_page}");
        assert!(kept.windows(2).all(|two| two[0].first_page < two[1].first_page));
    }
}
