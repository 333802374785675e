use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

use super::*;

#[test]
fn a_name_is_made_without_an_allocation() {
    for number in [0, 7, 10, 255, 65_536, i32::MAX] {
        assert_eq!(mounts::name_of(number), format!("/proc/self/fd/{number}"));
    }
}

#[test]
fn what_is_shown_below_a_hidden_folder_gets_its_folders_there() {
    let dir = tempfile::tempdir().expect("a folder");
    let deep = dir.path().join("a/b");
    std::fs::create_dir_all(&deep).expect("folders");
    let file = deep.join("file");
    std::fs::write(&file, b"x").expect("a file");
    let hidden = dir.path().to_path_buf();
    let folders = Folders { covered: vec![hidden.clone()], shown: vec![file, "/usr".into()], view: None };
    let text = |path: &Path| path.display().to_string();
    assert_eq!(
        mounts::parents_of(&folders),
        [vec![text(&hidden.join("a")), text(&deep)]],
        "not /usr, which nothing hides"
    );
}

#[test]
fn calls_are_known_by_name_and_number() {
    assert_eq!(calls::number("openat"), Some(libc::SYS_openat));
    assert_eq!(calls::name(libc::SYS_process_vm_readv as i32), "process_vm_readv");
    assert_eq!(calls::number("no_such_call"), None);
    assert_eq!(calls::name(9999), "system call 9999");
}

fn run(confinement: &Confinement, command: &mut Command) -> (std::process::Output, Outcome) {
    let pending = confinement.install(command).expect("install");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("spawn");
    let outcome = pending.outcome().expect("an outcome").expect("a report");
    (child.wait_with_output().expect("its output"), outcome)
}

#[test]
fn a_confined_program_sees_its_view_and_nothing_of_what_is_hidden() {
    let dir = tempfile::tempdir().expect("a folder");
    let (hidden, view, target) = (dir.path().join("hidden"), dir.path().join("view"), dir.path().join("target"));
    for (folder, file) in [(&hidden, "secret"), (&view, "inside"), (&target, "outside")] {
        std::fs::create_dir(folder).expect("a folder");
        std::fs::write(folder.join(file), file).expect("a file");
    }
    let shown = hidden.join("below");
    std::fs::create_dir(&shown).expect("a folder");
    let folders = Folders { covered: vec![hidden.clone()], shown: vec![shown], view: Some((view, target.clone())) };
    let confinement = Confinement { folders: Some(folders), network: true, ipc: true, ..Confinement::default() };
    let (output, outcome) = run(&confinement, Command::new("/bin/ls").arg(&hidden).arg(&target));
    let missing: Vec<_> = outcome.missing().collect();
    assert!(missing.is_empty(), "neither privilege nor user namespaces here: {missing:?}");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("inside") && text.contains("below"), "{text}");
    assert!(!text.contains("secret") && !text.contains("outside"), "{text}");
    for inside in [&hidden, &target] {
        let (output, _) = run(&confinement, Command::new("/bin/ls").arg(".").current_dir(inside));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!text.contains("secret") && !text.contains("outside"), "by the working directory: {text}");
    }
    let files = std::fs::read_dir(&hidden).expect("the folder").count();
    assert_eq!(files, 2, "nothing changed for others");
}

#[test]
fn landlock_lets_a_program_read_what_its_rules_name() {
    let dir = tempfile::tempdir().expect("a folder");
    let (yes, no) = (dir.path().join("yes"), dir.path().join("no"));
    std::fs::write(&yes, "readable").expect("a file");
    std::fs::write(&no, "unreadable").expect("a file");
    let mut files: Vec<(PathBuf, FileAccess)> =
        ["/usr", "/lib", "/lib64", "/bin"].map(|path| (path.into(), FileAccess::Execute)).into();
    files.extend([("/etc/ld.so.cache".into(), FileAccess::Read), (yes.clone(), FileAccess::Read)]);
    let confinement = Confinement { files: Some(files), ..Confinement::default() };
    let (output, outcome) = run(&confinement, Command::new("/bin/cat").arg(&yes).arg(&no));
    let in_force: Vec<Step> = outcome.in_force().collect();
    if LandlockSupport::probe().version == 0 {
        assert!(!in_force.contains(&Step::Files), "said, where there is none");
        return;
    }
    assert!(in_force.contains(&Step::Files), "{in_force:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "readable", "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("ermission denied"), "{output:?}");
}

#[test]
fn limits_and_capabilities_hold_in_the_program() {
    let confinement = Confinement {
        limits: vec![(Limit::Descriptors, 77), (Limit::CoreFile, 0)],
        capabilities: Some(vec![]),
        ..Confinement::default()
    };
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "ulimit -n; grep -E '^(Cap|NoNew)' /proc/self/status"]);
    let (output, outcome) = run(&confinement, &mut command);
    assert_eq!(outcome.missing().count(), 0);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.starts_with("77\n"), "{text}");
    assert!(text.contains("NoNewPrivs:\t1"), "{text}");
    for set in ["CapPrm", "CapEff", "CapAmb"] {
        assert!(text.contains(&format!("{set}:\t0000000000000000")), "{text}");
    }
}

/// if the call's number is `number` then `answer` else allow
fn filter(number: i64, answer: u32) -> Vec<Instruction> {
    let (load, jump, give) = (0x20, 0x15, 0x06);
    let instruction = |code, jump_false, number| Instruction { code, jump_true: 0, jump_false, number };
    vec![
        instruction(load, 0, 0),
        instruction(jump, 1, number as u32),
        instruction(give, 0, answer),
        instruction(give, 0, 0x7fff_0000),
    ]
}

#[test]
fn a_refused_call_is_told_to_the_parent_and_gets_eperm() {
    let (notify, eperm) = (0x7fc0_0000, 0x0005_0001);
    let number = calls::number("mkdir").expect("mkdir");
    let filter = Filter { special: vec![], telling: filter(number, notify), silent: filter(number, eperm) };
    let confinement = Confinement { filter: Some(filter), ..Confinement::default() };
    let dir = tempfile::tempdir().expect("a folder");
    let mut command = Command::new("/bin/mkdir");
    command.arg(dir.path().join("new")).stderr(Stdio::piped());
    let pending = confinement.install(&mut command).expect("install");
    let child = command.spawn().expect("spawn");
    let outcome = pending.outcome().expect("an outcome").expect("a report");
    let denied = outcome.denied.expect("a listener: nobody else listens to this test");
    let call = loop {
        match denied.take().expect("take") {
            filter::Taken::Call(call) => break call,
            filter::Taken::Nothing => {
                poll_in(&denied);
            }
            filter::Taken::Ended => panic!("it never called"),
        }
    };
    assert_eq!((call.pid, calls::name(call.number).as_str()), (child.id(), "mkdir"));
    let output = child.wait_with_output().expect("its output");
    assert!(String::from_utf8_lossy(&output.stderr).contains("not permitted"), "{output:?}");
    assert_eq!(denied.take().expect("take"), filter::Taken::Ended);
}

fn poll_in(denied: &DeniedCalls) {
    use rustix::event::{PollFd, PollFlags, poll};
    poll(&mut [PollFd::new(denied, PollFlags::IN)], None).expect("poll");
}

#[test]
fn what_cannot_be_done_ends_the_child_and_is_told() {
    // A user that an ordinary user cannot become; root can.
    let confinement = Confinement { account: Some((12_345, 12_345)), ..Confinement::default() };
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "id -u"]).stdout(Stdio::piped());
    let pending = confinement.install(&mut command).expect("install");
    match command.spawn() {
        Ok(child) => {
            assert_eq!(pending.outcome().expect("an outcome").expect("a report").missing().count(), 0);
            let output = child.wait_with_output().expect("its output");
            assert!(output.status.signal().is_none());
            assert_eq!(String::from_utf8_lossy(&output.stdout), "12345\n");
        }
        Err(error) => {
            let outcome = pending.outcome().expect("an outcome").expect("a report");
            let missing: Vec<Step> = outcome.missing().map(|(step, _)| step).collect();
            assert_eq!((missing, error.kind()), (vec![Step::Account], io::ErrorKind::PermissionDenied));
        }
    }
}
