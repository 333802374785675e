//! The C interface as a C program sees it: `tests/c` is compiled with warnings as errors, linked with `libuhmm.so`, and run against
//! a whole system.
//!
//! `libuhmm.so` lies beside the test: building the workspace's tests builds it too, because `uhmm-capi` has a test of its own.

use std::process::Command;

use uhmm_tests::TestBed;
use uhmm_tests::c::{compile, run, source, top};

/// Files of the program that uses the whole interface.
const SOURCES: [&str; 4] = ["all.c", "ranges.c", "waits.c", "asked.c"];

/// Parts of the program, in order; each says "ok NAME".
const PARTS: [&str; 16] = [
    "handles_and_errors",
    "devices",
    "shared_memory",
    "private_memory",
    "device_accesses",
    "protections",
    "without_waiting",
    "jobs",
    "advice",
    "pins_and_eviction",
    "hot_ranges",
    "snapshots",
    "counters_and_trace",
    "injected_failures",
    "threads",
    "forks",
];

#[test]
fn integration_a_c_program_uses_the_whole_interface_and_every_byte_is_right() {
    let bed = TestBed::start("64MiB");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let output = run(Command::new(compile(&SOURCES, dir.path())).arg(bed.run_dir()));
    let text = String::from_utf8_lossy(&output.stdout);
    let done: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("ok ")).collect();
    assert_eq!(done, PARTS);
    assert_eq!(text.lines().last(), Some("all parts passed"), "{text}");
    let left = bed.operator().regions().expect("regions");
    assert!(left.is_empty(), "the program left regions behind: {left:?}");
}

#[test]
fn the_c_program_calls_every_function_of_the_header() {
    let header = std::fs::read_to_string(top().join("sdk/capi/include/uhmm.h")).expect("the header is committed");
    // What adopts everything, and what ends or stays at home, are programs of their own.
    let program: String = SOURCES.iter().chain(&["everything.c", "told.c"]).map(|name| source(name)).collect();
    let functions: Vec<_> = header.lines().filter_map(declared).collect();
    assert!(functions.len() > 40, "only {} functions were found in the header", functions.len());
    for name in functions {
        assert!(program.contains(&format!("{name}(")), "{name} is never called by tests/c");
    }
}

/// The function that a line of the header declares: it begins a line, and a parenthesis follows its name.
fn declared(line: &str) -> Option<&str> {
    let (before, _) = line.split_once('(')?;
    let (kind, name) = before.rsplit_once(' ')?;
    (["int", "size_t"].contains(&kind) && name.starts_with("uhmm_")).then_some(name)
}
