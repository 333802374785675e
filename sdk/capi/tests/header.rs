//! `include/uhmm.h` is what the source says.

use std::path::{Path, PathBuf};

use cbindgen::{Builder, Config, DocumentationStyle, Language, Style};

/// In the order of the header.
const SOURCES: [&str; 13] = [
    "error.rs",
    "session.rs",
    "memory.rs",
    "everything.rs",
    "device.rs",
    "device_async.rs",
    "migrate.rs",
    "home.rs",
    "jobs.rs",
    "pending.rs",
    "policy.rs",
    "observe.rs",
    "stats.rs",
];

const HEAD: &str = "\
/*
 * uhmm: memory whose pages move between system memory and devices while every pointer stays what it is.
 * Link with -luhmm. A system must run: `uhmm up`.
 *
 * Errors. A function answers 0 (where it says so, another number from 0 on) or a negative number of <errno.h>:
 *   -EFAULT    no mapping there, or not readable          -ENOMEM    device full, or no memory
 *   -EPERM     read-only, or not allowed                  -EIO       the device or a system call failed, or a bug here
 *   -EINVAL    misaligned, a hole, a wrong argument       -ESTALE    the service died; the call may or may not be done
 *   -ENOENT    nothing there                              -ETIMEDOUT the deadline passed
 *   -EBUSY     invalidated meanwhile: try again           -EPROTO    the service speaks another protocol
 *   -ENOTCONN  no system runs in the run directory        -EAGAIN    no process or thread can be made: a limit is reached
 * What each function gives is listed with it. Beside that, every function gives -EINVAL for a handle, pointer, length or value that is wrong, and
 * -EIO where a bug was met. \"The services' own\" are: -ESTALE, the session's thread was killed, or a service died in the middle of something
 * that must not be done twice; -EPERM, this process may not connect any more (it became another user, or a filter forbids it); -ENOMEM, no memory
 * for the call; -ETIMEDOUT, a deadline; -EPROTO.
 * uhmm_last_error() has the text of it. When a function fails, what it would have answered is not written; a buffer for data
 * may be written in part.
 *
 * Addresses and lengths of ranges are multiples of UHMM_PAGE_BYTES; nothing is rounded.
 *
 * Pointers. A pointer to a variable or buffer may be NULL only where it is said; otherwise it points to live memory of the
 * length that is given with it, which nobody else writes during the call. Handles (uhmm_session *, uhmm_device *,
 * uhmm_pending *) are numbers: a handle that is NULL, closed, or of another kind is -EINVAL, never a crash. After fork() the
 * parent's handles are refused in the child: see uhmm_in_child().
 *
 * What the kernel does not wait for. A page on a device is there for the program and, where uhmm_system_calls_wait() is 1, for its system calls.
 * It is not there for what the kernel does when a thread ends (robust and priority-inheriting futexes, clear_child_tid words: keep their pages home
 * with uhmm_pin()), nor for those who read the process from outside without waiting: core dumps, gcore, gdb, /proc/PID/mem. For them everything
 * comes home with `uhmm home PID`, uhmm_stay_home(), or before the end with uhmm_home_on_fatal_signals(). process_vm_readv(2) waits.
 *
 * Threads. Every function may be called from every thread, with the same handles.
 *
 * Generated from sdk/capi/src by sdk/capi/tests/header.rs: do not edit.
 */";

fn committed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("include/uhmm.h")
}

fn generate() -> String {
    let config = Config {
        language: Language::C,
        style: Style::Type,
        header: Some(HEAD.into()),
        include_guard: Some("UHMM_H".into()),
        no_includes: true,
        sys_includes: ["errno.h", "stdbool.h", "stddef.h", "stdint.h"].map(String::from).to_vec(),
        cpp_compat: true,
        documentation_style: DocumentationStyle::Doxy,
        line_length: 120,
        usize_is_size_t: true,
        ..Config::default()
    };
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let builder = SOURCES.iter().fold(Builder::new().with_config(config), |all, file| all.with_src(source.join(file)));
    let mut text = Vec::new();
    builder.generate().expect("cbindgen reads the source").write(&mut text);
    String::from_utf8(text).expect("the header is UTF-8")
}

/// Names of the exported functions.
fn exported(source: &str) -> impl Iterator<Item = &str> {
    source.lines().filter_map(|line| Some(line.split_once("extern \"C\" fn uhmm_")?.1.split_once('(')?.0))
}

#[test]
fn the_header_is_what_the_source_says() {
    let text = generate();
    if std::env::var_os("UHMM_BLESS").is_some_and(|value| value == "1") {
        std::fs::write(committed(), &text).expect("the header is written");
    }
    let found = std::fs::read_to_string(committed()).unwrap_or_default();
    let first_difference = found.lines().zip(text.lines()).position(|(old, new)| old != new);
    assert!(
        found == text,
        "{} is not what the source says (first difference in line {:?}): run this test with UHMM_BLESS=1 and commit it",
        committed().display(),
        first_difference.map_or(found.lines().count().min(text.lines().count()) + 1, |index| index + 1)
    );
}

#[test]
fn every_source_file_with_an_exported_function_is_in_the_header() {
    let text = generate();
    let mut count = 0;
    for file in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).expect("the source is there") {
        let path = file.expect("a file").path();
        let source = std::fs::read_to_string(&path).expect("source is text");
        for name in exported(&source) {
            assert!(text.contains(&format!("uhmm_{name}(")), "uhmm_{name} of {} is not in the header", path.display());
            count += 1;
        }
    }
    assert!(count > 40, "only {count} exported functions were found in the source");
}

/// Name, and what is listed as its errors, of every function of the header.
fn listed() -> Vec<(String, String)> {
    let text = generate();
    let mut all = Vec::new();
    for part in text.split("/**").skip(1) {
        let Some((doc, code)) = part.split_once("*/") else { continue };
        let code: String = code.split_whitespace().collect::<Vec<_>>().join(" ");
        let name = code.strip_prefix("int uhmm_").and_then(|rest| rest.split_once('(')).map(|(name, _)| name);
        let doc: Vec<&str> = doc.lines().map(|line| line.trim_start_matches([' ', '*'])).collect();
        let doc = doc.join(" ");
        if let Some(name) = name {
            all.push((
                format!("uhmm_{name}"),
                doc.split_once("Errors: ").map(|(_, errors)| errors.to_owned()).unwrap_or_default(),
            ));
        }
    }
    all
}

/// With what stands behind "as uhmm_other()" and "the services' own".
fn gives(all: &[(String, String)], name: &str, errno: &str, depth: u32) -> bool {
    let Some((_, errors)) = all.iter().find(|(listed, _)| listed == name) else { return false };
    let says = |errno: &str| errors.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == errno);
    let services = ["ESTALE", "EPERM", "ENOMEM", "ETIMEDOUT", "EPROTO"];
    // For every function.
    if ["EINVAL", "EIO"].contains(&errno) || says(errno) {
        return true;
    }
    if errors.contains("services' own") && services.contains(&errno) {
        return true;
    }
    let others = all.iter().filter(|(other, _)| errors.contains(&format!("{other}()")));
    depth > 0 && others.into_iter().any(|(other, _)| gives(all, other, errno, depth - 1))
}

#[test]
fn every_function_lists_its_errors_and_knows_no_number_that_the_head_does_not() {
    let all = listed();
    assert!(all.len() > 45, "only {} functions were found", all.len());
    for (name, errors) in &all {
        assert!(!errors.is_empty(), "{name} does not say which errors it gives");
        for errno in errors.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| word.starts_with('E')) {
            let known = errno == "Errors" || !errno.chars().all(|c| c.is_ascii_uppercase()) || errno.len() == 1;
            assert!(
                known || HEAD.contains(&format!("-{errno} ")),
                "{name} gives {errno}, which the head does not know"
            );
        }
    }
}

#[test]
fn what_the_c_programs_of_the_tests_are_given_is_listed() {
    let all = listed();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/c");
    let mut count = 0;
    for file in std::fs::read_dir(folder).expect("the programs are there") {
        let path = file.expect("a file").path();
        let text: String =
            std::fs::read_to_string(&path).expect("text").split_whitespace().collect::<Vec<_>>().join(" ");
        for call in ["FAILS(uhmm_", "TELLS(uhmm_"].into_iter().flat_map(|call| text.split(call).skip(1)) {
            let statement = call.split_once(';').map_or(call, |(statement, _)| statement);
            let name = format!("uhmm_{}", statement.split_once('(').map_or("", |(name, _)| name));
            let words = statement.split(|c: char| !c.is_ascii_alphanumeric());
            let Some(errno) =
                words.rev().find(|word| word.starts_with('E') && word.chars().all(|c| c.is_ascii_uppercase()))
            else {
                continue;
            };
            assert!(
                gives(&all, &name, errno, 3),
                "{} is given {errno} by {name}, which does not list it",
                path.display()
            );
            count += 1;
        }
    }
    assert!(count > 60, "only {count} refusals were found in the programs");
}
