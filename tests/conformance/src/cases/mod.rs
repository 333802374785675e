//! The cases, by what they are about. Each is one function; its name in the table is the anchor's.

mod exclusive;
mod files;
mod fork;
mod huge;
mod hugetlb;
mod igt_matrix;
mod igt_special;
mod kernel_truth;
mod migrate;
mod migrate_more;
mod mirror;
mod multi;
mod pains;
mod pains_more;
mod pieces;
mod policy;
mod policy_more;
mod races;
mod residency;
mod told;
mod told_more;
mod warm_up;

pub(crate) use warm_up::warm_up;

use std::thread::ScopedJoinHandle;

use crate::case::{Case, CaseResult, Failure, Registry};

/// The result of a case's thread; a panic there is a failure like any other.
fn joined<T>(thread: ScopedJoinHandle<'_, CaseResult<T>>) -> CaseResult<T> {
    thread.join().unwrap_or_else(|_| Err(Failure::Failed("A thread of the case panicked".into())))
}

/// All cases in the order in which they run.
pub(crate) fn all() -> Vec<Case> {
    let mut list = Registry::default();
    mirror::register(&mut list);
    migrate::register(&mut list);
    migrate_more::register(&mut list);
    files::register(&mut list);
    fork::register(&mut list);
    exclusive::register(&mut list);
    huge::register(&mut list);
    hugetlb::register(&mut list);
    multi::register(&mut list);
    policy::register(&mut list);
    policy_more::register(&mut list);
    races::register(&mut list);
    kernel_truth::register(&mut list);
    residency::register(&mut list);
    told::register(&mut list);
    told_more::register(&mut list);
    igt_special::register(&mut list);
    igt_matrix::register(&mut list);
    pains::register(&mut list);
    pains_more::register(&mut list);
    pieces::register(&mut list);
    warm_up::register(&mut list);
    list.cases
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_every_anchor_has_its_case() {
        let cases = all();
        let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(names.len(), cases.len(), "two cases share a name");
        let has = |start: &str| names.iter().any(|name| name.starts_with(start));
        for number in 1..=40 {
            assert!(has(&format!("T{number:02}_")), "T{number:02} is missing");
            let twin = names.iter().any(|n| n.starts_with(&format!("T{number:02}_")) && n.ends_with(".coherent"));
            assert!(twin, "T{number:02} has no coherent twin");
        }
        for number in 1..=24 {
            assert!(has(&format!("K{number:02}_")), "K{number:02} is missing");
        }
        for number in 1..=8 {
            assert!(has(&format!("HT{number:02}_")), "HT{number:02} is missing");
        }
        for number in [1, 3, 4, 5, 6, 12, 13, 16, 17] {
            assert!(has(&format!("P{number:02}_")), "P{number:02} is missing");
        }
    }
}
