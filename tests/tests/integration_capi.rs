//! The C interface as a C program sees it: `tests/c` is compiled with warnings as errors, linked with `libuhmm.so`, and run against
//! a whole system.

use std::path::PathBuf;
use std::process::Command;

use uhmm_tests::{TestBed, c};

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

fn sources() -> Vec<PathBuf> {
    ["all.c", "ranges.c", "waits.c", "asked.c"].map(|name| c::top().join("tests/c").join(name)).to_vec()
}

#[test]
fn integration_a_c_program_uses_the_whole_interface_and_every_byte_is_right() {
    let bed = TestBed::start("64MiB");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let output = c::run(Command::new(c::compile(&sources(), &[], dir.path().join("all"))).arg(bed.run_dir()));
    let text = String::from_utf8_lossy(&output.stdout);
    let done: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("ok ")).collect();
    assert_eq!(done, PARTS);
    assert_eq!(text.lines().last(), Some("all parts passed"), "{text}");
    let left = bed.operator().regions().expect("regions");
    assert!(left.is_empty(), "the program left regions behind: {left:?}");
}

#[test]
fn the_c_program_calls_every_function_of_the_header() {
    let header = std::fs::read_to_string(c::top().join("sdk/capi/include/uhmm.h")).expect("the header is committed");
    let program: String =
        sources().iter().map(|path| std::fs::read_to_string(path).expect("the program is there")).collect();
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
