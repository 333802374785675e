//! Three deaths at once, supervisor, holder and pager: all that was kept of a program is lost. Its pages on devices are poisoned, never zero, what is
//! at home is whole, calls end with an error, and nobody hangs.

use std::io::{BufRead as _, Write as _};
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use uhmm_kernel_hook::PidFd;
use uhmm_kernel_hook::process::vm_read;
use uhmm_kernel_hook::program::ProgramMemory;
use uhmm_sdk::{ErrorCode, Session};
use uhmm_tests::pattern::word;
use uhmm_tests::process::Process;
use uhmm_tests::{TestBed, manifest};

const PAGE: u64 = 4096;
const LEN: u64 = 64 * PAGE;
const RUN_DIR: &str = "UHMM_FORSAKEN_RUN_DIR";

fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").expect("the test listens");
}

fn wait_for_a_line() {
    std::io::stdin().lock().read_line(&mut String::new()).expect("the test speaks");
}

#[test]
#[ignore = "the program of the test below, in a process of its own"]
fn program() {
    let run_dir = std::env::var_os(RUN_DIR).expect("it is started by the test");
    let session = Session::connect(Some(Path::new(&run_dir))).expect("a session");
    let device = session.device("soft0").expect("device");
    let region = session.allocate(LEN).expect("region");
    let memory = ProgramMemory::private(LEN).expect("memory");
    let _adopted = session.adopt(memory.addr(), LEN).expect("adopt");
    for index in 0..LEN / 8 {
        region.write_u64(index * 8, word(1, index)).expect("inside");
        memory.store_u64(index * 8, word(2, index)).expect("inside");
    }
    // The second half of each stays at home.
    for addr in [region.addr(), memory.addr()] {
        assert!(session.migrate(addr, LEN / 2, &device).expect("migrate").complete());
    }
    say("out");
    wait_for_a_line();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| memory.access_faults(0, false).expect("it is told"));
        let waits_too = scope.spawn(|| vm_read(std::process::id(), region.addr() + LEN / 4, &mut [0; 8]).is_err());
        say("touched");
        wait_for_a_line();
        assert!(waits.join().expect("no panic"), "adopted memory that was on a device is there: it must be zeros");
        assert!(
            waits_too.join().expect("no panic"),
            "allocated memory that was on a device is there: it must be zeros"
        );
    });
    for index in LEN / 16..LEN / 8 {
        assert_eq!(memory.load_u64(index * 8).expect("inside"), word(2, index));
        assert_eq!(region.read_u64(index * 8).expect("inside"), word(1, index));
    }
    // Every page of the first half, one way or the other.
    for page in 0..LEN / 2 / PAGE {
        assert!(memory.access_faults(page * PAGE, true).expect("it is told"), "page {page}");
    }
    let error = session.migrate(memory.addr(), LEN, &device).expect_err("nobody knows this memory");
    assert_eq!(error.code(), ErrorCode::Permission, "{error}");
    // The rest is the program's own again.
    memory.store_u64(LEN - 8, 7).expect("inside");
    assert_eq!(memory.load_u64(LEN - 8).expect("inside"), 7);
    say("done");
    std::process::exit(0);
}

#[test]
fn integration_what_three_deaths_take_is_poisoned_and_nobody_hangs() {
    let mut bed = TestBed::with_manifest(&manifest("8MiB", "aperture = false"));
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "program", "--ignored", "--nocapture"]).env(RUN_DIR, bed.run_dir());
    let folder = tempfile::tempdir().expect("a folder");
    let mut program = Process::start("program", &mut command, folder.path());
    program.ask("", |line| line == "out").unwrap_or_else(|why| panic!("{why}"));
    let victims = ["holder", "pager"].map(|name| PidFd::open(bed.status(name).pid).expect("it runs"));
    bed.kill_supervisor();
    for victim in &victims {
        victim.signal(Signal::KILL).expect("kill");
    }
    program.ask("go\n", |line| line == "touched").unwrap_or_else(|why| panic!("{why}"));
    bed.adopt();
    program.ask("go\n", |line| line == "done").unwrap_or_else(|why| panic!("{why}"));
    program.end().unwrap_or_else(|why| panic!("{why}"));
}
