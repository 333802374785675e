//! Bad times for a system of containers: no room in the run directory, an image of another version. Each is told, and no byte is lost.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use capnp::message::Builder;
use uhmm_kernel_hook::{RecvStatus, SendStatus, SeqListener, SeqPacket};
use uhmm_schema::common_capnp::{self as schema, MAJOR_VERSION, MINOR_VERSION};
use uhmm_tests::container::Containers;
use uhmm_tests::container::system::{System, goes_on, say, try_core, work_until_killed};
use uhmm_tests::{PATIENCE, uhmm_exe};

/// What runs in the program's container.
#[test]
#[ignore = "the other tests run it in a container"]
fn program() {
    work_until_killed();
}

/// Fills the file system of that folder to the last byte.
fn fill(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("filler");
    let mut file = File::create(&path).expect("a file");
    for piece in [vec![1; 4096], vec![1]] {
        while file.write_all(&piece).is_ok() {}
    }
    path
}

#[test]
fn integration_a_full_run_directory_is_told_and_when_there_is_room_again_everything_goes_on() {
    let mut system = System::over(Containers::in_small_space(512), false);
    let mut program = system.program("program");
    goes_on(&mut program);
    system.holder_is_full();
    let filler = fill(&system.containers.run_dir());

    // What is there goes on, and what joins needs no room.
    goes_on(&mut program);
    system.driver.end("KILL");
    system.driver = system.new_driver();
    goes_on(&mut program);

    // A core that is started now says what it lacks; the program waits, and has lost nothing.
    system.core.end("KILL");
    let mut core = try_core(&mut system.containers, &system.manifest, &system.tokens);
    assert!(!core.wait(), "{}", core.log());
    let last = core.log().lines().rev().find(|line| line.starts_with("Error")).unwrap_or_default().to_owned();
    assert!(last.contains("No space left") && last.contains("/run/uhmm"), "{}", core.log());
    assert!(!program.has_ended() && !system.driver.has_ended() && !system.holder.has_ended());
    std::fs::remove_file(filler).expect("removed");
    system.new_core();
    goes_on(&mut program);
}

/// An envelope as another version would send it.
fn envelope(kind: schema::Kind, body: impl FnOnce(capnp::any_pointer::Builder<'_>)) -> Vec<u8> {
    let mut message = Builder::new_default();
    let mut root = message.init_root::<schema::envelope::Builder<'_>>();
    root.set_kind(kind);
    root.set_interface(schema::Interface::Common);
    root.set_incarnation(1);
    root.set_interface_version(MINOR_VERSION);
    body(root.init_body());
    capnp::serialize::write_message_to_words(&message)
}

/// The first message of a driver that speaks that version.
fn hello(major: u16) -> Vec<u8> {
    envelope(schema::Kind::Hello, |body| {
        let mut hello: schema::hello::Builder<'_> = body.init_as();
        hello.set_major(major);
        hello.set_interface(schema::Interface::Supervisor);
        hello.set_role(schema::Role::Driver);
        hello.set_name("join:soft0");
        hello.set_max_message_bytes(1 << 20);
        hello.set_max_fds(16);
    })
}

fn receive(peer: &SeqPacket) -> Vec<u8> {
    let deadline = Instant::now() + PATIENCE;
    let mut bytes = vec![0; 1 << 16];
    while Instant::now() < deadline {
        match peer.recv(&mut bytes, &mut Vec::new(), 16).expect("received") {
            RecvStatus::Message { len, .. } => return bytes[..len].to_vec(),
            RecvStatus::Closed => panic!("closed without a word"),
            RecvStatus::WouldBlock => std::thread::yield_now(),
        }
    }
    panic!("no answer");
}

#[test]
#[ignore = "another test runs it in a driver's container"]
fn driver_of_the_next_version() {
    let peer = SeqPacket::connect(Path::new("/run/uhmm/supervisor.sock")).expect("connected");
    assert_eq!(peer.send(&hello(MAJOR_VERSION + 1), &[]).expect("connected"), SendStatus::Sent);
    let answer = receive(&peer);
    let reader = capnp::serialize::read_message(answer.as_slice(), Default::default()).expect("a message");
    let root = reader.get_root::<schema::envelope::Reader<'_>>().expect("an envelope");
    assert_eq!(root.get_kind().expect("known"), schema::Kind::Error);
    let error: schema::error::Reader<'_> = root.get_body().get_as().expect("an error");
    assert_eq!(error.get_code().expect("known"), schema::ErrorCode::Protocol);
    say(&format!("refused: {}", error.get_text().expect("text").to_str().expect("UTF-8")));
}

#[test]
fn integration_a_driver_image_of_another_version_is_refused_with_both_versions_and_costs_nobody_anything() {
    let mut system = System::start();
    let mut program = system.program("program");
    goes_on(&mut program);
    // While the right one is there, and while nobody is.
    for _ in 0..2 {
        let mut next = system.in_drivers_place("driver_of_the_next_version");
        assert!(next.wait(), "{}", next.log());
        let told =
            format!("Version {MAJOR_VERSION} is spoken here, not {}: install matching versions", MAJOR_VERSION + 1);
        assert!(next.log().contains(&told), "{}", next.log());
        if !system.driver.has_ended() {
            goes_on(&mut program);
            system.driver.end("KILL");
        }
    }
    system.driver = system.new_driver();
    goes_on(&mut program);
    assert!(!system.core.has_ended() && !system.holder.has_ended());
}

/// The other way round: what the driver of today says to whoever looks at its container, when the core is of tomorrow.
#[test]
fn integration_a_driver_that_meets_a_core_of_another_version_ends_and_says_so() {
    let dir = tempfile::tempdir().expect("a folder");
    let listener = SeqListener::bind(&dir.path().join("supervisor.sock")).expect("a socket");
    let mut driver = Command::new(uhmm_exe());
    driver.arg("--run-dir").arg(dir.path()).args(["driver", "soft", "--name", "soft0"]);
    let mut driver = driver.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("uhmm runs");
    let told = format!("Version {} is spoken here, not {MAJOR_VERSION}: install matching versions", MAJOR_VERSION + 1);
    let refusal = envelope(schema::Kind::Error, |body| {
        let mut error: schema::error::Builder<'_> = body.init_as();
        error.set_code(schema::ErrorCode::Protocol);
        error.set_text(&told);
    });
    // It asks some times before it believes it.
    let deadline = Instant::now() + PATIENCE;
    while driver.try_wait().expect("wait").is_none() {
        if let Some(peer) = listener.accept().expect("accepted") {
            receive(&peer);
            assert_eq!(peer.send(&refusal, &[]).expect("connected"), SendStatus::Sent);
        }
        assert!(Instant::now() < deadline, "it does not end");
        std::thread::yield_now();
    }
    let output = driver.wait_with_output().expect("it has ended");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.lines().any(|line| line.starts_with("Error") && line.contains(&told)),
        "{said}"
    );
}
