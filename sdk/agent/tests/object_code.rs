//! What the agent's machine code refers to. Its process runs with the `fs` register of a thread of the program: one access through it, one
//! lock of the allocator, one lazily bound call, and it changes somebody else's variable or waits for somebody whom it holds up.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What the compiler may call by itself: plain loops over memory, in the C library.
const PLAIN: [&str; 4] = ["memset", "memcpy", "memmove", "memcmp"];

/// Runs a tool and returns what it prints.
fn output(tool: &str, arguments: &[&str], file: &Path) -> String {
    let output =
        Command::new(tool).args(arguments).arg(file).output().unwrap_or_else(|error| panic!("{tool}: {error}"));
    assert!(output.status.success(), "{tool}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn cargo(arguments: &[&str], target: &Path) {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into());
    let mut command = Command::new(cargo);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).arg(arguments[0]).args(["--locked", "--offline"]);
    command.arg("--target-dir").arg(target).args(&arguments[1..]);
    let output = command.output().expect("cargo");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The object file of this crate alone, as a profile makes it.
fn object(profile: &str, folder: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("agent-object-{profile}"));
    // What an older compiler left there has another name, and must not be taken for this one's.
    if target.exists() {
        std::fs::remove_dir_all(&target).expect("an old folder of this test");
    }
    let arguments =
        ["rustc", "-p", "uhmm-agent", "--lib", "--profile", profile, "--", "--emit=obj", "-Ccodegen-units=1"];
    cargo(&arguments, &target);
    let deps = std::fs::read_dir(target.join(folder).join("deps")).expect("deps");
    let is_object = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("uhmm_agent-") && name.ends_with(".o")
    };
    let objects: Vec<PathBuf> = deps.map(|entry| entry.expect("an entry").path()).filter(is_object).collect();
    assert_eq!(objects.len(), 1, "{objects:?}");
    objects.into_iter().next().expect("one")
}

/// `None`: nothing is wrong with it.
fn fault(line: &str) -> Option<&'static str> {
    const TLS: [&str; 7] = ["_TLSGD", "_TLSLD", "_TPOFF", "_DTPOFF", "_DTPMOD", "_GOTTPOFF", "_TLSDESC"];
    if TLS.iter().any(|kind| line.contains(kind)) || line.contains("R_X86_64_GOTPC32_TLS") {
        return Some("thread-local memory");
    }
    if ["__rust_alloc", "__rust_dealloc", "__rust_realloc", "__rg_", "5alloc"].iter().any(|name| line.contains(name)) {
        return Some("an allocator");
    }
    let panics = ["4core9panicking", "3std9panicking", "rust_begin_unwind", "rust_eh_personality", "_Unwind_"];
    panics.iter().any(|name| line.contains(name)).then_some("panics")
}

#[test]
fn integration_the_agents_object_code_is_free_of_tls_allocation_and_panics() {
    for (profile, folder) in [("dev", "debug"), ("release", "release")] {
        let object = object(profile, folder);
        let undefined = output("nm", &["-u"], &object);
        let names: Vec<&str> = undefined.lines().filter_map(|line| line.trim().strip_prefix("U ")).collect();
        let foreign: Vec<&&str> = names.iter().filter(|name| !PLAIN.contains(name)).collect();
        assert!(foreign.is_empty(), "{profile}: the agent's code refers to {foreign:?}");
        let relocations = output("readelf", &["-rW"], &object);
        assert!(relocations.contains("R_X86_64_"), "{profile}: no relocations at all: this is not the agent's code");
        for line in relocations.lines() {
            assert_eq!(fault(line), None, "{profile}: {line}");
        }
        let sections = output("readelf", &["-SW"], &object);
        assert!(!sections.contains(".tbss") && !sections.contains(".tdata"), "{profile}: {sections}");
        // A stack protector needs no relocation for its access.
        let code = output("objdump", &["-d"], &object);
        assert!(code.contains("syscall"), "{profile}: this is not the agent's code");
        let through_fs: Vec<&str> = code.lines().filter(|line| line.contains("%fs:")).collect();
        assert!(through_fs.is_empty(), "{profile}: {through_fs:?}");
    }
}

#[test]
fn integration_the_shipped_library_is_bound_at_once_and_stays_after_dlclose() {
    let own = std::env::current_exe().expect("this test's path");
    let folder = own.ancestors().nth(2).expect("target/PROFILE");
    let mut library = folder.join("libuhmm.so");
    if !library.exists() {
        // There a run of all tests leaves it.
        library = folder.join("deps/libuhmm.so");
    }
    if !library.exists() {
        let profile = match folder.file_name().and_then(|name| name.to_str()) {
            Some("debug") | None => "dev",
            Some(other) => other,
        };
        cargo(&["build", "-p", "uhmm-capi", "--profile", profile], folder.parent().expect("target"));
        library = folder.join("libuhmm.so");
    }
    let dynamic = output("readelf", &["-dW"], &library);
    let flags = dynamic.lines().find(|line| line.contains("(FLAGS_1)")).unwrap_or_else(|| panic!("{dynamic}"));
    for wanted in ["NOW", "NODELETE"] {
        assert!(flags.split_ascii_whitespace().any(|flag| flag == wanted), "{wanted} is not in {flags}");
    }
}
