use std::path::Path;

use uhmm_kernel_hook::confine::{Step, calls};
use uhmm_manifest::Manifest;

use super::*;

const CORE: &str =
    "[[service]]\nname = \"pager\"\nkind = \"pager\"\n[[service]]\nname = \"mirror\"\nkind = \"mirror\"\n";

fn place() -> Place {
    Place { run_dir: "/run/uhmm".into(), exe: std::env::current_exe().expect("this test has a path") }
}

fn plan(driver: &str, device: &str) -> Plan {
    let text = format!(
        "{CORE}[[service]]\nname = \"d0\"\nkind = \"driver\"\ncommand = [\"/bin/sh\"]\n{driver}\n\
         [[device]]\nname = \"d0\"\nservice = \"d0\"\n{device}\n"
    );
    Manifest::parse(&text).expect("a manifest").resolve().expect("a plan")
}

fn profile(driver: &str, device: &str) -> Result<Profile, SandboxError> {
    let plan = plan(driver, device);
    Profile::of(&plan, plan.service("d0").expect("d0"), &place())
}

fn rules(driver: &str, device: &str) -> Rules {
    profile(driver, device).expect("a profile").rules.expect("rules")
}

#[test]
fn every_call_of_the_table_exists() {
    for role in
        [Role::Holder, Role::Pager, Role::Mirror, Role::Software, Role::File, Role::Remote, Role::Vfio, Role::VfioUser]
    {
        for call in table::calls(role) {
            assert!(calls::number(&call.name).is_some(), "{}", call.name);
        }
    }
    assert!(table::NETWORK.iter().all(|name| calls::number(name).is_some()));
}

#[test]
fn no_driver_may_do_what_reaches_others() {
    let dangerous = [
        "ptrace",
        "pidfd_getfd",
        "pidfd_open",
        "pidfd_send_signal",
        "kill",
        "tkill",
        "rt_sigqueueinfo",
        "rt_tgsigqueueinfo",
        "kcmp",
        "userfaultfd",
        "mount",
        "umount2",
        "move_mount",
        "open_tree",
        "fsopen",
        "pivot_root",
        "chroot",
        "unshare",
        "setns",
        "bpf",
        "io_uring_setup",
        "io_uring_enter",
        "perf_event_open",
        "keyctl",
        "add_key",
        "request_key",
        "init_module",
        "finit_module",
        "kexec_load",
        "reboot",
        "swapon",
        "fork",
        "vfork",
        "bind",
        "listen",
        "open_by_handle_at",
        "name_to_handle_at",
        "setuid",
        "setresuid",
        "capset",
        "ioperm",
        "iopl",
        "process_madvise",
        "shmget",
        "shmat",
        "msgget",
        "semget",
        "mq_open",
        "fanotify_init",
        "seccomp",
        "personality",
        "syslog",
        "acct",
        "quotactl",
        "mknod",
        "mknodat",
    ];
    for device in ["", "pci = \"0000:00:05.0\"", "pci = \"vfio-user:/run/model/device.sock\""] {
        let allowed = rules("", device).calls;
        for name in dangerous {
            assert!(calls::number(name).is_some(), "{name}");
            assert!(!allowed.iter().any(|call| call.name == name), "{name} with {device:?}");
        }
        let form = |name: &str| allowed.iter().find(|call| call.name == name).and_then(|call| call.only.clone());
        assert_eq!((form("socket"), form("clone")), (Some(Only::Unix), Some(Only::Threads)));
        let signals_by_files = [8, 10, 15];
        assert!(
            matches!(form("fcntl"), Some(Only::Second(of)) if !signals_by_files.iter().any(|one| of.contains(one)))
        );
        for name in ["process_vm_readv", "process_vm_writev", "prlimit64", "sched_setaffinity", "tgkill"] {
            assert_eq!(form(name), Some(Only::Own), "{name}");
        }
    }
}

#[test]
fn a_driver_has_the_files_of_its_own_device_alone() {
    let files = |device: &str| rules("", device).files;
    let has = |files: &[(PathBuf, FileAccess)], path: &str| files.iter().any(|(found, _)| found == Path::new(path));
    let software = files("");
    assert!(!software.iter().any(|(path, access)| path.starts_with("/dev/vfio") || *access == FileAccess::Device));
    for closed in ["/", "/proc", "/dev", "/etc", "/home", "/root", "/tmp", "/dev/mem", "/dev/userfaultfd"] {
        assert!(!has(&software, closed), "{closed}");
    }
    assert!(has(&software, "/bin/sh"), "its program");
    assert!(has(&files("pci = \"0000:00:05.0\""), "/dev/vfio/vfio"));
    assert!(!has(&files("pci = \"vfio-user:/run/model/device.sock\""), "/dev/vfio/vfio"));
}

#[test]
fn the_manifest_adds_what_it_names_and_nothing_that_does_not_exist() {
    let more = "sandbox = { syscalls = [\"pidfd_open\", \"socket\"], read = [\"/etc/chip\"], write = [\"/dev/chip0\"], network = true }";
    let rules = rules(more, "");
    let form = |name: &str| {
        rules.calls.iter().filter(|call| call.name == name).map(|call| call.only.clone()).collect::<Vec<_>>()
    };
    assert_eq!((form("pidfd_open"), form("socket"), form("bind")), (vec![None], vec![None], vec![None]));
    assert!(rules.network && rules.files.contains(&("/dev/chip0".into(), FileAccess::Device)));
    let error = profile("sandbox = { syscalls = [\"frobnicate\"] }", "").map(drop).map_err(|error| error.to_string());
    assert!(error.as_ref().is_err_and(|text| text.contains("frobnicate") && text.contains("\"d0\"")), "{error:?}");
}

#[test]
fn a_service_without_sandbox_has_its_limits_only() {
    let profile = profile("sandbox = { mode = \"off\", nofile = 64 }", "").expect("a profile");
    let confinement = profile.confinement().expect("a confinement");
    assert!(confinement.filter.is_none() && confinement.files.is_none() && confinement.folders.is_none());
    assert_eq!(confinement.limits, [(Limit::Descriptors, 64)]);
    assert!(profile.print().contains("NOT CONFINED"));
}

#[test]
fn what_is_printed_is_what_holds() {
    let profile = profile("", "pci = \"vfio-user:/run/model/device.sock\"").expect("a profile");
    let text = profile.print();
    let rules = profile.rules.as_ref().expect("rules");
    for call in &rules.calls {
        assert!(text.contains(&call.name), "{}: {text}", call.name);
    }
    for (path, _) in &rules.files {
        assert!(text.contains(&path.display().to_string()), "{}", path.display());
    }
    assert!(
        text.contains("socket(AF_UNIX)")
            && text.contains("clone(threads)")
            && text.contains("/run/uhmm shows /run/uhmm/view/d0")
    );
    assert!(rules.folders.shown.contains(&"/run/model".into()), "the device's socket: {:?}", rules.folders.shown);
}

/// The filter itself, in a real process: what it refuses is told by name.
#[test]
fn a_shell_under_the_filter_cannot_fork_and_that_is_told() {
    let calls = table::calls(Role::Software);
    let confinement =
        Confinement { filter: Some(filter::compile(&calls).expect("a filter")), ..Confinement::default() };
    let mut command = std::process::Command::new("/bin/sh");
    command
        .args(["-c", "/bin/true & echo forked"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null());
    let pending = confinement.install(&mut command).expect("install");
    let child = command.spawn().expect("spawn");
    let outcome = pending.outcome().expect("an outcome").expect("a report");
    assert!(outcome.in_force().any(|step| step == Step::Calls), "{outcome:?}");
    let denied = outcome.denied.expect("a listener");
    let mut names = Vec::new();
    loop {
        match denied.take().expect("take") {
            uhmm_kernel_hook::confine::Taken::Call(call) => names.push(calls::name(call.number)),
            uhmm_kernel_hook::confine::Taken::Nothing => std::thread::yield_now(),
            uhmm_kernel_hook::confine::Taken::Ended => break,
        }
    }
    let output = child.wait_with_output().expect("its output");
    assert!(!String::from_utf8_lossy(&output.stdout).contains("forked"), "{output:?}");
    assert!(names.iter().any(|name| ["clone", "fork", "vfork"].contains(&name.as_str())), "{names:?}");
}

#[test]
fn a_driver_of_block_servers_reaches_them_and_nothing_else() {
    let tcp = profile("", "url = \"nbd://192.0.2.7:99/x\"").expect("a profile");
    let rules = tcp.rules.as_ref().expect("rules");
    let socket = rules.calls.iter().find(|call| call.name == "socket").expect("sockets");
    assert_eq!((tcp.role, socket.only.clone(), rules.network), (Role::Remote, Some(Only::UnixAndTcp), false));
    assert!(!rules.calls.iter().any(|call| ["bind", "listen", "sendmmsg"].contains(&call.name.as_str())));
    let confinement = tcp.confinement().expect("a confinement");
    assert_eq!((confinement.network, confinement.tcp, confinement.tcp_ports), (false, false, vec![99]));
    assert!(tcp.print().contains("192.0.2.7:99") && tcp.print().contains("socket(AF_UNIX, TCP)"), "{}", tcp.print());
    let unix = profile("", "url = \"nbd+unix:///x?socket=/run/server/s\"").expect("a profile");
    let rules = unix.rules.as_ref().expect("rules");
    let socket = rules.calls.iter().find(|call| call.name == "socket").expect("sockets");
    assert_eq!((socket.only.clone(), unix.confinement().expect("a confinement").network), (Some(Only::Unix), true));
    assert!(rules.folders.shown.contains(&"/run/server".into()), "the server's socket: {:?}", rules.folders.shown);
}
