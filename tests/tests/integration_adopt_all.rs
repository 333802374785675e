//! What must not be managed is refused by name, and everything else is adopted by one call. Each test is a part of `tests/c/everything.c`, run as a
//! process of its own: a program whose whole memory is managed, with the C library's heap, arenas, stacks and signals.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use uhmm_kernel_hook::PidFd;
use uhmm_tests::TestBed;
use uhmm_tests::c::compile;

/// A part that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(90);

/// Runs a part; its output, once it has succeeded.
fn passes(part: &str) {
    passes_on(&TestBed::start("64MiB"), part);
}

fn passes_on(bed: &TestBed, part: &str) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut command = Command::new(compile(&["everything.c"], dir.path()));
    command.arg(bed.run_dir()).arg(part).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    let hangs = !ends(&child);
    if hangs {
        child.kill().expect("kill -9");
    }
    let output = child.wait_with_output().expect("the program is reaped");
    let (said, failed) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!hangs, "{part} hung: {said}{failed}");
    assert!(output.status.success(), "{part} ended with {}: {said}{failed}", output.status);
    assert_eq!(said.trim(), format!("ok {part}"));
}

fn ends(child: &Child) -> bool {
    let pidfd = PidFd::open(child.id()).expect("the program is not reaped");
    let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&patience)).expect("poll") == 1
}

#[test]
fn integration_what_must_not_be_managed_is_refused_by_name() {
    passes("refusals");
}

#[test]
fn integration_sealed_memory_that_may_be_written_moves_like_any_other() {
    passes("sealed");
}

#[test]
fn integration_with_a_userfaultfd_for_user_mode_what_the_kernel_touches_is_refused() {
    passes("user_mode_only");
}

#[test]
fn integration_all_memory_is_adopted_what_appears_later_too_and_stacks_are_left_alone() {
    passes("finds");
}

#[test]
fn integration_heap_arenas_and_mmapped_memory_leave_and_come_home() {
    passes("migrates");
}

#[test]
fn integration_threads_begin_and_end_while_half_of_all_memory_is_moved_out() {
    passes("threads_end");
}

#[test]
fn integration_managed_memory_that_becomes_a_threads_stack_is_given_back() {
    passes("becomes_a_stack");
}

#[test]
fn integration_the_thread_that_looks_for_memory_takes_no_signal() {
    passes("signals");
}

#[test]
fn integration_over_the_quota_memory_stays_unmanaged_and_that_is_no_error() {
    let manifest = format!("{}\n[quota]\nmax_regions_per_space = 2\n", uhmm_tests::manifest("64MiB", ""));
    passes_on(&TestBed::with_manifest(&manifest), "quota");
}
