use super::*;

const ONE: ThreadName = (10, 11);
const OTHER: ThreadName = (10, 12);
const ANSWER: Duration = Duration::from_micros(8);
const GAP: Duration = Duration::from_micros(60);

/// A machine: threads run where `cpu_of` says, and the pager where it was put.
struct Bed {
    follow: Follow,
    now: Instant,
    at: Option<u32>,
    asked: u32,
    moved: u32,
}

impl Bed {
    fn new() -> Self {
        let now = Instant::now();
        Self { follow: Follow::new(now), now, at: None, asked: 0, moved: 0 }
    }

    fn fault(&mut self, thread: ThreadName, took: Duration, cpu_of: Option<u32>) {
        self.now += GAP;
        let step = self.follow.answered(self.now, Some(thread), took);
        self.act(step, cpu_of);
    }

    fn faults(&mut self, count: u32, cpu: u32) {
        (0..count).for_each(|_| self.fault(ONE, ANSWER, Some(cpu)));
    }

    fn act(&mut self, step: Step, cpu_of: Option<u32>) {
        let next = match step {
            Step::Nothing => return,
            Step::Ask(thread) => {
                assert_eq!(thread, ONE, "nobody else made enough of them");
                self.asked += 1;
                match cpu_of {
                    Some(cpu) => self.follow.runs_on(self.now, cpu),
                    None => self.follow.cannot(self.now),
                }
            }
            Step::Move(cpu) => {
                (self.at, self.moved) = (Some(cpu), self.moved + 1);
                return;
            }
            Step::Leave => {
                self.at = None;
                return;
            }
        };
        self.act(next, cpu_of);
    }
}

#[test]
fn a_thread_that_faults_in_a_row_is_followed_and_asked_about_less_and_less() {
    let mut bed = Bed::new();
    bed.faults(STREAK, 1);
    assert_eq!((bed.at, bed.asked), (None, 0));
    bed.faults(1000, 1);
    assert_eq!((bed.at, bed.moved), (Some(1), 1));
    assert!(bed.asked < 8 + 1000 / ASK_EVERY_MAX, "{} questions", bed.asked);
}

#[test]
fn a_thread_that_moves_is_followed_at_the_next_question_and_watched_closely() {
    let mut bed = Bed::new();
    bed.faults(1000, 1);
    let late = (0..ASK_EVERY_MAX).position(|_| {
        bed.faults(1, 0);
        bed.moved == 2
    });
    assert!(late.is_some() && bed.at == Some(0), "no later than the next question");
    let asked = bed.asked;
    bed.faults(7, 0);
    assert_eq!(bed.asked, asked + 3, "after 1, 2 and 4");
}

#[test]
fn threads_that_take_turns_are_not_followed() {
    let mut bed = Bed::new();
    for fault in 0..1000 {
        bed.fault(if fault % 2 == 0 { ONE } else { OTHER }, ANSWER, Some(1));
    }
    assert_eq!((bed.at, bed.asked), (None, 0));
    bed.faults(100, 1);
    assert_eq!(bed.at, Some(1));
    for fault in 0..1000 {
        bed.fault(if fault % 2 == 0 { ONE } else { OTHER }, ANSWER, Some(1));
    }
    assert_eq!(bed.at, None, "another one has come");
    let mut batch = Bed::new();
    for _ in 0..1000 {
        batch.now += GAP;
        assert_eq!(batch.follow.answered(batch.now, None, ANSWER), Step::Nothing, "several at once");
    }
}

#[test]
fn long_answers_and_bulk_work_are_done_beside_the_program() {
    let mut bed = Bed::new();
    (0..1000).for_each(|_| bed.fault(ONE, 2 * SOON, Some(1)));
    assert_eq!((bed.at, bed.asked), (None, 0));
    bed.faults(100, 1);
    assert_eq!(bed.at, Some(1));
    for _ in 0..CREDIT_MAX / OTHER_COSTS {
        let step = bed.follow.other_work(bed.now);
        bed.act(step, None);
    }
    assert_eq!(bed.at, None);
}

#[test]
fn it_leaves_when_nobody_faults() {
    let mut bed = Bed::new();
    bed.faults(100, 1);
    let until = bed.follow.leaves_at().unwrap();
    assert_eq!(until, bed.now + QUIET);
    assert_eq!(bed.follow.is_due(until - GAP), Step::Nothing);
    let step = bed.follow.is_due(until);
    bed.act(step, None);
    assert_eq!((bed.at, bed.follow.leaves_at()), (None, None));
    bed.faults(STREAK + 1, 0);
    assert_eq!(bed.at, Some(0), "it lasted, so the next burst is followed at once");
}

#[test]
fn what_cannot_be_followed_is_tried_less_and_less() {
    let mut bed = Bed::new();
    let (faults, mut first) = (100_000, None);
    for fault in 0..faults {
        bed.fault(ONE, ANSWER, None);
        first = first.or((bed.asked > 0).then_some(fault));
    }
    assert_eq!((bed.at, first), (None, Some(STREAK)));
    let doublings = (REST.end() / REST.start()).ilog2();
    assert!(bed.asked <= 1 + doublings + faults / REST.end(), "{} questions", bed.asked);
}

#[test]
fn a_mask_that_somebody_else_has_set_stands() {
    std::thread::scope(|scope| {
        // A thread of its own: masks are a thread's.
        scope.spawn(|| {
            let all = Cpus::own().unwrap();
            let cpus: Vec<u32> = (0..1024).filter(|cpu| all.contains(*cpu)).collect();
            let [first, second, ..] = cpus[..] else { panic!("this test needs two CPUs, there are {cpus:?}") };
            let mut follower = Follower::new();
            assert_eq!(follower.go_to(first), Some(()));
            assert_eq!(Cpus::own().unwrap(), Cpus::only(first).unwrap());
            assert_eq!(follower.go_to(second), Some(()));
            follower.go_back();
            assert_eq!(Cpus::own().unwrap(), all);

            follower.go_to(first).unwrap();
            let operators = Cpus::only(second).unwrap();
            operators.stay().unwrap();
            assert_eq!(follower.go_to(first), None, "it may use one CPU, and that is not this one");
            follower.go_back();
            assert_eq!(Cpus::own().unwrap(), operators);
            all.stay().unwrap();
            follower.go_to(first).unwrap();
            operators.stay().unwrap();
            follower.go_back();
            assert_eq!(Cpus::own().unwrap(), operators, "set while it was beside the program");
        });
    });
}
