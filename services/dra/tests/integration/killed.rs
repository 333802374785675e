//! kill -9 of the driver: between Prepare and Unprepare and within both, at known places and at any.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode};
use uhmm_tests::PATIENCE;
use uhmm_tests::process::threads;

use crate::bed::{Node, ONLY_CLAIMS};
use crate::kubelet::Kubelet;
use crate::{MIB, PAGES};

/// Everything of a claim, as it is after it was prepared: rule and file.
fn is_whole(node: &Node, name: &str, bytes: u64) -> Vec<u8> {
    assert_eq!(node.core_claims(), [(format!("dra/uid-{name}"), vec![bytes])]);
    let files = node.cdi_files();
    assert_eq!(files.len(), 1, "{files:?}");
    std::fs::read(&files[0]).expect("the file")
}

fn is_gone(node: &Node) {
    assert_eq!(node.core_claims(), []);
    assert!(node.cdi_files().is_empty());
}

/// A file that nobody reads, in the way of one that is to be written: whoever opens it waits.
fn block(path: &Path) {
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("the folder");
    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a fifo");
}

fn until(is_so: impl Fn() -> bool) {
    let late = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < late, "it never came to that");
        std::thread::yield_now();
    }
}

/// The driver is where the kernel lets whoever opens a fifo wait for the other end.
fn waits_at_fifo(node: &Node) {
    until(|| threads(node.driver_pid()).contains("wait_for_partner"));
}

/// Kills the driver while it answers `method`, as soon as `moment` returns.
fn kill_within(node: &mut Node, method: fn(&Kubelet) -> Result<(), String>, moment: impl FnOnce(&Node)) {
    std::thread::scope(|scope| {
        let kubelet = node.kubelet.clone();
        let asked = scope.spawn(move || method(&kubelet));
        moment(node);
        node.kill_driver();
        asked.join().expect("asked").expect_err("it was killed before it had answered");
    });
}

#[test]
fn integration_dra_killed_at_known_places_of_prepare_and_unprepare() {
    let mut node = Node::start(ONLY_CLAIMS);
    node.api.allocate("far", &[("soft0", "6Mi")]);
    let folder = node.kubelet.dir.join("plugins/uhmm.internal");
    let (checkpoint, checkpoint_new) = (folder.join("claims"), folder.join("claims.new"));
    let has_it = || std::fs::read_to_string(&checkpoint).is_ok_and(|text| text.contains("uid-far"));
    let cdi_new = node.dir.path().join("cdi/uhmm.internal-claim-uid-far.json.new");
    let prepare: fn(&Kubelet) -> _ = |kubelet| kubelet.prepare("far").map(drop);
    let unprepare: fn(&Kubelet) -> _ = |kubelet| kubelet.unprepare("far").map(drop);

    // Prepare, while the claim is read: nothing has happened yet, and the next driver knows of nothing.
    node.api.change(|state| state.hold = true);
    kill_within(&mut node, prepare, |node| node.api.wait("the claim is read", |state| (state.held == 1).then_some(())));
    node.api.change(|state| state.hold = false);
    assert!(!has_it());
    node.start_driver();
    is_gone(&node);

    // Between checkpoint and file: the core has the rule. Then the next driver is killed there too.
    block(&cdi_new);
    let mut tokens = Vec::new();
    for _ in 0..2 {
        kill_within(&mut node, prepare, waits_at_fifo);
        assert_eq!(node.core_claims().len(), 1);
        assert!(has_it() && node.cdi_files().is_empty());
        tokens.push(std::fs::read_to_string(&checkpoint).expect("it"));
        node.start_driver();
    }
    assert_eq!(tokens[0], tokens[1], "one token for all that may have been given out");
    std::fs::remove_file(&cdi_new).expect("out of the way");
    let prepared = node.kubelet.prepared("far");
    let file = is_whole(&node, "far", 6 * MIB);

    // Between Prepare and Unprepare: the same claim again is the same, and its program has what it had.
    let mut pod = node.pod("pod", &prepared);
    assert_eq!(pod.migrate("soft0", 4).0, 4 * PAGES);
    node.kill_driver();
    assert_eq!(pod.migrate("soft0", 4).0, 2 * PAGES, "claims hold without the driver");
    node.start_driver();
    assert_eq!(node.kubelet.prepared("far"), prepared);
    assert_eq!(is_whole(&node, "far", 6 * MIB), file, "the same token");
    assert_eq!(node.pod("pod-2", &prepared).migrate("soft0", 4).0, 0, "and the same share, which is used up");

    // Unprepare, before the checkpoint: nothing was taken back.
    block(&checkpoint_new);
    let text = std::fs::read_to_string(&checkpoint).expect("it");
    kill_within(&mut node, unprepare, waits_at_fifo);
    std::fs::remove_file(&checkpoint_new).expect("out of the way");
    assert_eq!(std::fs::read_to_string(&checkpoint).expect("it"), text);
    assert_eq!(is_whole(&node, "far", 6 * MIB), file);
    node.start_driver();
    assert_eq!(node.kubelet.prepared("far"), prepared);

    // After it: the core was not told, because the pager stands. The next driver tells it.
    let pager = node.uhmm.process("pager");
    pager.pause();
    kill_within(&mut node, unprepare, |_| until(|| !has_it()));
    pager.resume();
    node.start_driver();
    node.wait_core(&[]);
    assert_eq!(node.kubelet.unprepare("far").expect("an answer"), "");
    is_gone(&node);
    assert_eq!(pod.say("end"), "ok");
}

#[test]
fn integration_dra_killed_at_any_moment_both_are_done_when_they_are_asked_again() {
    let mut node = Node::start(ONLY_CLAIMS);
    node.api.allocate("far", &[("soft1", "4Mi")]);
    let (mut cut, mut last) = ([0, 0], None);
    for round in 0..10u32 {
        for (which, times) in cut.iter_mut().enumerate() {
            let kubelet = node.kubelet.clone();
            let answered = std::thread::scope(|scope| {
                let asked = scope.spawn(move || match which {
                    0 => kubelet.prepare("far").map(drop),
                    _ => kubelet.unprepare("far").map(drop),
                });
                // Somewhere in the few milliseconds that a call takes.
                let until = Instant::now() + Duration::from_micros(u64::from(round) * 900);
                while Instant::now() < until && !asked.is_finished() {
                    std::hint::spin_loop();
                }
                node.kill_driver();
                asked.join().expect("asked").is_ok()
            });
            *times += u32::from(!answered);
            node.start_driver();
            if which == 0 {
                let prepared = node.kubelet.prepared("far");
                assert_eq!(*last.get_or_insert_with(|| prepared.clone()), prepared);
                is_whole(&node, "far", 4 * MIB);
            } else {
                assert_eq!(node.kubelet.unprepare("far").expect("an answer"), "");
                is_gone(&node);
            }
        }
    }
    assert!(cut.iter().all(|times| *times > 0), "{cut:?}: some calls were cut off");
    println!("cut off: {cut:?} of 10 each");
}
