//! Peers that break the protocol in every way we could think of: each costs its own connection, while a good client on the same
//! reactor keeps working.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use capnp::message::Builder;
use rustix::event::{PollFd, PollFlags, Timespec};
use uhmm_ipc::message::{Call, ErrorCode, Interface, Reply, TraceId, WireError, driver};
use uhmm_ipc::{CallId, Wake};
use uhmm_kernel_hook::{RecvStatus, SendStatus, SeqPacket};
use uhmm_schema::common_capnp::{self as schema, Kind, envelope};
use uhmm_schema::driver_capnp;

use crate::support::{Caller, PATIENCE, Place, Server, memory_with};

/// A bare socket.
struct Raw {
    socket: SeqPacket,
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Kind(Kind),
    Closed,
}

impl Raw {
    fn connect(path: &Path) -> Self {
        Self { socket: SeqPacket::connect(path).expect("connected") }
    }

    /// A connection whose handshake is done.
    fn greeted(path: &Path) -> Self {
        let raw = Self::connect(path);
        raw.send(&hello(|_| ()), &[]);
        assert_eq!(raw.answer(), Answer::Kind(Kind::Welcome));
        raw
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.socket.send(bytes, fds).expect("sent"), SendStatus::Sent);
    }

    /// The next message's kind, or that the connection is closed.
    fn answer(&self) -> Answer {
        let mut buffer = capnp::Word::allocate_zeroed_vec(16 << 10);
        let end = Instant::now() + PATIENCE;
        loop {
            let bytes = capnp::Word::words_to_bytes_mut(&mut buffer);
            match self.socket.recv(bytes, &mut Vec::new(), 16).expect("received") {
                RecvStatus::Message { len, .. } => {
                    let message =
                        capnp::serialize::read_message_from_flat_slice(&mut &bytes[..len], Default::default())
                            .expect("an envelope");
                    let root = message.get_root::<envelope::Reader<'_>>().expect("an envelope");
                    return Answer::Kind(root.get_kind().expect("a kind"));
                }
                RecvStatus::Closed => return Answer::Closed,
                RecvStatus::WouldBlock => {
                    assert!(Instant::now() < end, "Neither an answer nor a close came");
                    let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
                    let _ = rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 1, tv_nsec: 0 })).expect("poll");
                }
            }
        }
    }

    /// The connection ends, after an error or at once (a close with unread messages loses what was sent before).
    fn assert_closed(&self, attack: &str) {
        loop {
            match self.answer() {
                Answer::Closed => return,
                Answer::Kind(Kind::Error) => {}
                Answer::Kind(other) => panic!("{attack}: answered by {other:?}"),
            }
        }
    }
}

fn bytes(fill: impl FnOnce(envelope::Builder<'_>)) -> Vec<u8> {
    let mut message = Builder::new_default();
    fill(message.init_root());
    capnp::serialize::write_message_to_words(&message)
}

fn hello(change: impl FnOnce(schema::hello::Builder<'_>)) -> Vec<u8> {
    bytes(|mut root| {
        root.set_kind(Kind::Hello);
        let mut hello: schema::hello::Builder<'_> = root.init_body().init_as();
        hello.set_major(schema::MAJOR_VERSION);
        hello.set_minor(schema::MINOR_VERSION);
        hello.set_interface(schema::Interface::Driver);
        hello.set_name("raw");
        hello.set_max_message_bytes(65536);
        hello.set_max_fds(16);
        change(hello);
    })
}

/// A call as it should be, and what the attack changes.
fn submit(id: u64, args: u32, change: impl FnOnce(envelope::Builder<'_>)) -> Vec<u8> {
    bytes(|mut root| {
        root.set_kind(Kind::Call);
        root.set_interface(schema::Interface::Driver);
        root.set_call_id(id);
        root.set_interface_version(schema::MINOR_VERSION);
        let call: driver_capnp::call::Builder<'_> = root.reborrow().init_body().init_as();
        let mut submit = call.init_submit();
        submit.set_kernel("k");
        submit.init_args(args);
        change(root);
    })
}

/// Answers with many results, so that a peer which does not read fills its queue soon.
fn start(place: &Place) -> Server {
    Server::start(place, Interface::Driver, 1, |reactor, wake| {
        if let Wake::Call { conn, call, .. } = wake {
            let reply = driver::Reply::Finished { results: vec![1; 1000], fault_count: 0, run_time_ns: 0 };
            reactor.reply(conn, call, Ok(Reply::Driver(reply)));
        }
    })
}

fn assert_good_client_works(caller: &mut Caller, attack: &str) {
    let link = caller.link;
    let call = caller.reactor.call(link, Call::Driver(driver::Call::Info), TraceId::default(), None);
    let result = caller.until(attack, |wake| done(wake, call));
    assert!(result.is_ok(), "{attack}: {result:?}");
    assert!(!caller.rest().iter().any(|wake| matches!(wake, Wake::LinkDown { .. })), "{attack}");
}

fn done(wake: &Wake, call: CallId) -> Option<Result<(), WireError>> {
    match wake {
        Wake::Done { call: ended, result, .. } if *ended == call => {
            Some(result.as_ref().map(|_| ()).map_err(Clone::clone))
        }
        _ => None,
    }
}

/// Replaces the list pointer of the only one-element list of words by one that claims much more.
fn with_list_pointer(mut message: Vec<u8>, element_size: u64, count: u64) -> Vec<u8> {
    let mut patched = 0;
    for word in message[8..].chunks_exact_mut(8) {
        let value = u64::from_le_bytes(word.try_into().expect("eight bytes"));
        if value & 3 == 1 && value >> 32 & 7 == 5 && value >> 35 == 1 {
            let offset = value & 0xffff_fffc;
            word.copy_from_slice(&(offset | 1 | element_size << 32 | count << 35).to_le_bytes());
            patched += 1;
        }
    }
    assert_eq!(patched, 1);
    message
}

fn attacks_before_hello() -> Vec<(&'static str, Vec<u8>)> {
    let mut endless = vec![0xff, 0xff, 0xff, 0x7f];
    endless.resize(64, 0xff);
    let valid = hello(|_| ());
    vec![
        ("one byte", vec![7]),
        ("zeros", vec![0; 256]),
        ("garbage", (0..=255).collect()),
        ("a segment table without end", endless),
        ("a message without its last word", valid[..valid.len() - 8].to_vec()),
        ("a message without its last byte", valid[..valid.len() - 1].to_vec()),
        ("a message with a word too many", [valid.clone(), vec![0; 8]].concat()),
        ("a hello larger than a hello may be", [valid, vec![0; 4096]].concat()),
        ("a call before hello", submit(1, 1, |_| ())),
        ("a hello without body", bytes(|mut root| root.set_kind(Kind::Hello))),
        ("a hello for another interface", hello(|mut hello| hello.set_interface(schema::Interface::Pager))),
        ("a hello for no interface", hello(|mut hello| hello.set_interface(schema::Interface::Common))),
        ("a hello of another major version", hello(|mut hello| hello.set_major(99))),
        ("a service without a key", hello(|mut hello| hello.set_role(schema::Role::Pager))),
        ("a name that is too long", hello(|mut hello| hello.set_name("x".repeat(400)))),
    ]
}

fn attacks_after_hello() -> Vec<(&'static str, Vec<u8>)> {
    let valid = submit(1, 1, |_| ());
    let mut unknown_kind = valid.clone();
    let mut unknown_interface = valid.clone();
    // The envelope's first data word holds kind and interface, behind the segment table and the root pointer.
    unknown_kind[16] = 99;
    unknown_interface[18] = 99;
    let of_kind = |kind, id| {
        bytes(|mut root| {
            root.set_kind(kind);
            root.set_interface(schema::Interface::Driver);
            root.set_call_id(id);
            root.set_interface_version(schema::MINOR_VERSION);
            let reply = root.init_body().init_as::<driver_capnp::reply::Builder<'_>>();
            reply.init_queue_opened().set_memory_fd(schema::NO_FD);
        })
    };
    vec![
        ("garbage", (0..=255).collect()),
        ("an oversized message", vec![0; 100_000]),
        ("an unknown kind", unknown_kind),
        ("an unknown interface", unknown_interface),
        ("a reply to nothing", of_kind(Kind::Reply, 5)),
        ("an event from a caller", of_kind(Kind::Event, 0)),
        ("a second hello", hello(|_| ())),
        ("a call of another interface", submit(1, 1, |mut root| root.set_interface(schema::Interface::Mirror))),
        ("a call without id", submit(0, 1, |_| ())),
        ("another incarnation", submit(1, 1, |mut root| root.set_incarnation(9))),
        ("another version", submit(1, 1, |mut root| root.set_interface_version(9))),
        ("too many arguments", submit(1, 5000, |_| ())),
        ("descriptors announced that did not come", submit(1, 1, |mut root| root.set_fd_count(2))),
        ("a list beyond the end", with_list_pointer(valid.clone(), 5, 1 << 20)),
        ("a traversal bomb of words without size", with_list_pointer(valid.clone(), 0, (1 << 29) - 1)),
        ("a list of structs that is none", with_list_pointer(valid, 7, (1 << 29) - 1)),
    ]
}

#[test]
fn integration_a_malformed_message_costs_only_its_own_connection() {
    let place = Place::new();
    let _server = start(&place);
    let mut good = Caller::client(&place.path, Interface::Driver);
    for (attack, message) in attacks_before_hello() {
        let raw = Raw::connect(&place.path);
        raw.send(&message, &[]);
        raw.assert_closed(attack);
        assert_good_client_works(&mut good, attack);
    }
    for (attack, message) in attacks_after_hello() {
        let raw = Raw::greeted(&place.path);
        raw.send(&message, &[]);
        raw.assert_closed(attack);
        assert_good_client_works(&mut good, attack);
    }
}

#[test]
fn integration_the_message_that_the_attacks_are_made_from_is_a_good_one() {
    let place = Place::new();
    let _server = start(&place);
    let raw = Raw::greeted(&place.path);
    raw.send(&submit(1, 1, |_| ()), &[]);
    assert_eq!(raw.answer(), Answer::Kind(Kind::Reply));
    raw.send(&submit(2, 1000, |_| ()), &[]);
    assert_eq!(raw.answer(), Answer::Kind(Kind::Reply));
}

#[test]
fn integration_descriptors_that_nobody_asked_for_cost_the_connection_and_do_not_stay_open() {
    let place = Place::new();
    let _server = start(&place);
    let mut good = Caller::client(&place.path, Interface::Driver);
    let (reader, writer) = rustix::pipe::pipe().expect("pipe");
    let extra: Vec<OwnedFd> = (0..100).map(|_| writer.try_clone().expect("duplicate")).collect();
    let all: Vec<BorrowedFd<'_>> = extra.iter().map(|fd| fd.as_fd()).collect();
    for (attack, count) in [("a surplus descriptor", 1), ("a hundred descriptors", 100)] {
        let raw = Raw::greeted(&place.path);
        raw.send(&submit(1, 1, |mut root| root.set_fd_count(count as u16)), &all[..count]);
        raw.assert_closed(attack);
        assert_good_client_works(&mut good, attack);
        let raw = Raw::connect(&place.path);
        raw.send(&hello(|_| ()), &all[..count]);
        raw.assert_closed("descriptors with the hello");
        assert_good_client_works(&mut good, attack);
    }
    drop(all);
    drop(extra);
    drop(writer);
    // The last writer is gone only if the server kept none: then the pipe is at its end.
    let mut byte = [0];
    assert_eq!(rustix::io::read(&reader, &mut byte).expect("end of the pipe"), 0);
}

#[test]
fn integration_a_call_id_in_use_costs_the_connection() {
    let place = Place::new();
    let _server = Server::start(&place, Interface::Driver, 1, |_, _| ());
    let raw = Raw::greeted(&place.path);
    raw.send(&submit(7, 1, |_| ()), &[]);
    raw.send(&submit(7, 1, |_| ()), &[]);
    raw.assert_closed("a call id in use");
}

#[test]
fn integration_a_flood_from_a_peer_that_never_reads_ends_that_peer_only() {
    let place = Place::new();
    let _server = start(&place);
    let mut good = Caller::client(&place.path, Interface::Driver);
    let raw = Raw::greeted(&place.path);
    let end = Instant::now() + PATIENCE;
    let mut id = 0;
    loop {
        assert!(Instant::now() < end, "The flood was never stopped");
        id += 1;
        match raw.socket.send(&submit(id, 1, |_| ()), &[]).expect("sent") {
            SendStatus::Sent => {}
            SendStatus::PeerGone => break,
            SendStatus::WouldBlock => assert_good_client_works(&mut good, "during the flood"),
        }
    }
    assert_good_client_works(&mut good, "after the flood");
}

#[test]
fn integration_unanswered_calls_stop_the_reading_of_their_own_connection_only() {
    let place = Place::new();
    let limits = uhmm_ipc::Limits { max_inflight_per_conn: 8, ..Default::default() };
    let identity = crate::support::identity("server", uhmm_ipc::message::Role::Driver, 1, Some(Interface::Driver));
    let _server = Server::start_as(&place, uhmm_ipc::Identity { limits, ..identity }, |reactor, wake| {
        if let Wake::Call { conn, call, body: Call::Driver(driver::Call::Info), .. } = wake {
            reactor.reply(conn, call, Ok(Reply::Driver(driver::Reply::QueueOpened { coherent: None })));
        }
    });
    let raw = Raw::greeted(&place.path);
    let mut id = 0;
    let blocked = loop {
        id += 1;
        match raw.socket.send(&submit(id, 1, |_| ()), &[]).expect("sent") {
            SendStatus::Sent if id < 100_000 => {}
            other => break other,
        }
    };
    assert_eq!(blocked, SendStatus::WouldBlock);
    assert_good_client_works(&mut Caller::client(&place.path, Interface::Driver), "with a stalled peer");
}

#[test]
fn integration_connections_that_say_nothing_do_not_keep_services_out() {
    let place = Place::new();
    let limits = uhmm_ipc::Limits { max_connections: 4, ..Default::default() };
    let identity = crate::support::identity("server", uhmm_ipc::message::Role::Driver, 1, Some(Interface::Driver));
    let _server = Server::start_as(&place, uhmm_ipc::Identity { limits, ..identity }, |reactor, wake| {
        if let Wake::Call { conn, call, .. } = wake {
            reactor.reply(conn, call, Ok(Reply::Driver(driver::Reply::QueueOpened { coherent: None })));
        }
    });
    // More than there is room for: the oldest ones go.
    let silent: Vec<Raw> = (0..100).map(|_| Raw::connect(&place.path)).collect();
    let guests: Vec<Raw> = (0..4).map(|_| Raw::greeted(&place.path)).collect();
    let refused = Raw::connect(&place.path);
    refused.send(&hello(|_| ()), &[]);
    refused.assert_closed("one guest too many");
    let mirror = crate::support::identity("mirror", uhmm_ipc::message::Role::Mirror, 1, None);
    let mut service = Caller::new(mirror, &place.path, Interface::Driver, crate::support::KEY);
    assert_good_client_works(&mut service, "a service beside too many guests");
    let operator = Raw::connect(&place.path);
    operator.send(&hello(|mut hello| hello.set_role(schema::Role::Operator)), &[]);
    assert_eq!(operator.answer(), Answer::Kind(Kind::Welcome), "somebody can always look what is going on");
    drop((silent, guests));
}

#[test]
fn integration_who_finds_no_room_is_told_at_once_and_gets_in_when_there_is() {
    let place = Place::new();
    let limits = uhmm_ipc::Limits { max_connections: 1, ..Default::default() };
    let identity = crate::support::identity("server", uhmm_ipc::message::Role::Driver, 1, Some(Interface::Driver));
    let _server = Server::start_as(&place, uhmm_ipc::Identity { limits, ..identity }, |reactor, wake| {
        if let Wake::Call { conn, call, .. } = wake {
            reactor.reply(conn, call, Ok(Reply::Driver(driver::Reply::QueueOpened { coherent: None })));
        }
    });
    let guest = Raw::greeted(&place.path);
    let mut caller = Caller::client(&place.path, Interface::Driver);
    let error = caller.until("the refusal", |wake| match wake {
        Wake::Refused { error, .. } => Some(error.clone()),
        _ => None,
    });
    assert_eq!(error.code, ErrorCode::Busy);
    assert!(error.text.contains("1 clients") && error.text.contains("quota.max_spaces"), "{error}");
    drop(guest);
    assert_good_client_works(&mut caller, "the room of a guest that has gone");
}

#[test]
fn integration_a_server_that_answers_what_was_not_asked_loses_the_link_and_calls_survive_it() {
    let place = Place::new();
    let mut caller = Caller::client(&place.path, Interface::Driver);
    let link = caller.link;
    let call = caller.reactor.call(link, Call::Driver(driver::Call::Info), TraceId::default(), None);
    let fake = loop {
        if let Some(socket) = place.listener.accept().expect("accept") {
            break Raw { socket };
        }
    };
    assert_eq!(fake.answer(), Answer::Kind(Kind::Hello));
    let memory = memory_with(b"unasked");
    let surprise = bytes(|mut root| {
        root.set_kind(Kind::Reply);
        root.set_interface(schema::Interface::Driver);
        root.set_call_id(99);
        let reply = root.init_body().init_as::<driver_capnp::reply::Builder<'_>>();
        reply.init_queue_opened().set_memory_fd(schema::NO_FD);
    });
    fake.send(&surprise, &[memory.as_fd()]);
    let mut wakes = Vec::new();
    caller.reactor.poll(Some(PATIENCE), &mut wakes).expect("poll");
    assert!(wakes.is_empty(), "{wakes:?}");
    assert_eq!(fake.answer(), Answer::Closed);
    let _server = start(&place);
    assert_eq!(caller.until("the answer of a real server", |wake| done(wake, call)), Ok(()));
    let unsent = Call::Driver(driver::Call::Submit {
        space: 1,
        kernel: "x".repeat(300),
        args: Vec::new(),
        idempotent: true,
        ranges: Vec::new(),
    });
    let call = caller.reactor.call(link, unsent, TraceId::default(), None);
    let refused = caller.until("our own bounds", |wake| done(wake, call));
    assert_eq!(refused.map_err(|error| error.code), Err(ErrorCode::Protocol));
}
