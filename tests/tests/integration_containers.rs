//! Core, holder, driver and program each in a container of its own, as unprivileged as they can be: every one of them is killed and replaced
//! while the program works, and not one byte is wrong. What each container was not given it cannot reach. Wrong input is told by name.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use uhmm_kernel_hook::SeqPacket;
use uhmm_tests::container::system::{System, TOKEN, goes_on, path, say, start_driver, start_holder, work_until_killed};
use uhmm_tests::container::{CORE, DRIVER};

/// What runs in the program's container.
#[test]
#[ignore = "the other tests run it in a container"]
fn program() {
    work_until_killed();
}

#[test]
fn integration_every_container_is_killed_and_replaced_and_no_byte_is_wrong() {
    let mut system = System::start();
    let mut program = system.program("program");
    goes_on(&mut program);

    system.driver.end("KILL");
    system.driver = system.new_driver();
    goes_on(&mut program);

    // Another image is there before the old one is stopped: it waits for its turn.
    let mut next = system.new_driver();
    system.core.wait_log_times("A process asks to be this service", 4);
    goes_on(&mut program);
    assert!(!next.log().contains("Let in"), "one driver at a time");
    system.driver.end("TERM");
    next.wait_log("Let in");
    system.driver = next;
    goes_on(&mut program);

    // An upgrade of the core, and its sudden death: pager, mirror and supervisor at once.
    system.holder_is_full();
    for signal in ["TERM", "KILL"] {
        system.core.end(signal);
        system.new_core();
        goes_on(&mut program);
        assert!(!system.driver.has_ended(), "the driver outlives the core");
    }

    system.holder.end("KILL");
    system.holder = start_holder(&mut system.containers, &system.tokens[0]);
    system.holder.wait_log("Let in");
    goes_on(&mut program);
    system.holder_is_full();
    system.core.end("KILL");
    system.new_core();
    goes_on(&mut program);

    // A driver that is asleep while the core is replaced is no dead driver.
    system.driver.pause();
    system.core.end("KILL");
    system.new_core();
    system.driver.resume();
    goes_on(&mut program);
    program.end("KILL");
}

#[test]
fn integration_containers_of_an_ordinary_user_are_killed_and_replaced_too() {
    let mut system = System::rootless();
    let mut program = system.program("program");
    goes_on(&mut program);
    system.driver.end("KILL");
    system.driver = system.new_driver();
    goes_on(&mut program);
    system.holder_is_full();
    for signal in ["TERM", "KILL"] {
        system.core.end(signal);
        system.new_core();
        goes_on(&mut program);
    }
    assert!(!system.driver.has_ended() && !system.holder.has_ended());
}

#[test]
#[ignore = "the other tests run it in a driver's container"]
fn probe() {
    let denied = |what: &str, problem: Option<String>| {
        let problem = problem.unwrap_or_else(|| panic!("{what} is possible"));
        say(&format!("denied {what}: {problem}"));
    };
    let io = |result: std::io::Result<()>| result.err().map(|error| error.to_string());
    let opens = |path: &str| io(std::fs::File::open(path).map(drop));
    let connects = |name: &str| {
        let socket = SeqPacket::connect(&Path::new("/run/uhmm").join(name));
        socket.err().map(|error| error.to_string())
    };
    let own = std::process::id().to_string();
    let numbers =
        std::fs::read_dir("/proc").expect("/proc").filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let others: Vec<String> = numbers.filter(|name| name.parse::<u32>().is_ok() && *name != own).collect();
    denied("another process", others.is_empty().then(|| "none is seen".to_owned()));
    denied("a program's memory", opens("/proc/2/mem").or_else(|| opens("/proc/1/mem").filter(|_| own != "1")));
    for other in ["driver-soft0.sock", "../run/driver-soft0.sock", "../clients/pager.sock"] {
        denied(other, connects(other));
    }
    SeqPacket::connect(Path::new("/run/uhmm/pager.sock")).expect("what its channels lead to it may call");
    denied("the network", io(std::net::TcpStream::connect("1.1.1.1:53").map(drop)));
    denied("a listening port", io(std::net::TcpListener::bind("127.0.0.1:0").map(drop)));
    denied("userfaultfd", opens("/dev/userfaultfd"));
    denied("a disk", io(std::fs::write("/program", "x")));
    denied("a new file", io(std::fs::write("/tmp/x", "x")));
    denied("a socket of its own for others", io(std::fs::write("/run/uhmm/x", "x")));
    denied(
        "another user",
        rustix::thread::set_thread_uid(rustix::process::Uid::ROOT).err().map(|error| error.to_string()),
    );
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    for line in ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line:?} is missing in {status}");
    }
    say("all denied");
}

#[test]
fn integration_a_drivers_container_reaches_no_memory_no_other_socket_and_no_network() {
    let mut system = System::start();
    let mut program = system.program("program");
    goes_on(&mut program);
    let mut probe = system.in_drivers_place("probe");
    assert!(probe.wait(), "{}", probe.log());
    assert!(probe.log().contains("all denied"), "{}", probe.log());
    goes_on(&mut program);
}

#[test]
fn integration_what_is_wrong_with_a_container_is_told_by_name_and_costs_nobody_anything() {
    let mut system = System::start();
    let mut program = system.program("program");
    goes_on(&mut program);
    let (manifest, token) = (system.manifest.clone(), system.tokens[1].clone());
    let driver_uid = DRIVER.to_string();

    // Another token; another user; a token that is none.
    let other = path(&system.containers.file("other.token", "another token of 32 bytes, yes..", DRIVER));
    let short = path(&system.containers.file("short.token", "short", DRIVER));
    let stranger = (DRIVER + 100).to_string();
    let readable = path(&system.containers.file("readable.token", TOKEN, DRIVER + 100));
    for (uid, token, told) in [
        (&driver_uid, &other, "may not connect"),
        (&stranger, &readable, "must run as user"),
        (&driver_uid, &short, "16 to 64"),
    ] {
        let mut wrong =
            system.containers.start(&["driver", "soft0", "--manifest", &manifest, "--uid", uid, "--token", token]);
        assert!(!wrong.wait(), "{}", wrong.log());
        assert!(wrong.log().contains(told), "{told:?} is not in {}", wrong.log());
    }

    // A folder that others may write to.
    let folder = system.containers.run_dir().join("join/soft0");
    let chmod = |mode| std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(mode)).expect("chmod");
    chmod(0o777);
    let mut wrong = start_driver(&mut system.containers, &manifest, &token);
    assert!(!wrong.wait() && wrong.log().contains("chmod go-w"), "{}", wrong.log());
    chmod(0o755);

    // A second core.
    let uid = CORE.to_string();
    let mut words = vec!["core", "--manifest", &manifest, "--uid", &uid];
    system.tokens.iter().for_each(|token| words.extend(["--secrets", token]));
    let mut second = system.containers.start(&words);
    assert!(!second.wait() && second.log().contains("supervisor.sock"), "{}", second.log());
    // And one that may not use the folder.
    let plain = "[[service]]\nname = \"pager\"\nkind = \"pager\"\n[[service]]\nname = \"mirror\"\nkind = \"mirror\"\n";
    let plain = path(&system.containers.file("plain.toml", plain, DRIVER));
    let mut foreign = system.containers.start(&["core", "--manifest", &plain, "--uid", &driver_uid]);
    assert!(!foreign.wait() && foreign.log().contains("must be a folder of this user"), "{}", foreign.log());

    // What is not in the manifest has no bundle.
    let refused = system.containers.bundle(&["driver", "soft7", "--manifest", &manifest]).expect_err("no such driver");
    assert!(refused.contains("soft7") && refused.contains("join"), "{refused}");
    assert!(!system.driver.has_ended());
    goes_on(&mut program);
}
