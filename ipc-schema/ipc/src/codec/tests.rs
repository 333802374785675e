use std::collections::BTreeSet;
use std::fmt::Debug;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use uhmm_kernel_hook::memfd;

use super::*;
use crate::message::{Call, ErrorCode, Event, Fd, Hello, Interface, Reply, Role, TraceId, Welcome, WireError};
use crate::message::{common, driver, mirror, pager, supervisor};

mod samples;

use samples::{calls, events, replies};

fn fd(bytes: u64) -> Fd {
    Arc::new(memfd::create_sealed("codec", bytes).expect("memfd"))
}

fn header() -> Header {
    Header { call_id: u64::MAX - 1, trace: TraceId(0x0102_0304_0506_0708), minor: 1, incarnation: 7, deadline_ms: 250 }
}

fn encode(body: BodyRef<'_>) -> (Vec<capnp::Word>, Vec<OwnedFd>) {
    let mut encoder = Encoder::new();
    let (bytes, fds) = encoder.encode(header(), body, 1 << 16, 16).expect("it fits");
    let mut words = capnp::Word::allocate_zeroed_vec(bytes.len() / 8);
    capnp::Word::words_to_bytes_mut(&mut words).copy_from_slice(bytes);
    (words, fds.iter().map(|fd| fd.try_clone().expect("duplicate")).collect())
}

fn read(words: &[capnp::Word], fds: Vec<OwnedFd>) -> Result<Frame, String> {
    decode(capnp::Word::words_to_bytes(words), fds).map_err(|rejected| rejected.why.text())
}

/// Debug text in which every descriptor is named by its file's size, as numbers change on the way.
fn text(value: &impl Debug) -> String {
    let mut text = String::new();
    let shown = format!("{value:?}");
    let mut rest = shown.as_str();
    while let Some(at) = rest.find("OwnedFd { fd: ") {
        let (before, after) = rest.split_at(at + "OwnedFd { fd: ".len());
        let end = after.find(' ').expect("a number and a space");
        let size = std::fs::metadata(format!("/proc/self/fd/{}", &after[..end])).expect("an open file").len();
        text.push_str(before);
        text.push_str(&format!("file of {size}"));
        rest = &after[end..];
    }
    text + rest
}

fn variant(value: &impl Debug) -> String {
    format!("{value:?}").split(['{', '(', ')']).take(2).collect::<Vec<_>>().join("::").replace(' ', "")
}

#[test]
fn every_call_survives_the_wire() {
    for call in calls() {
        let (words, fds) = encode(BodyRef::Call(&call));
        let frame = read(&words, fds).unwrap_or_else(|why| panic!("{call:?}: {why}"));
        assert_eq!(frame.header, header());
        let FrameBody::Call(came) = frame.body else { panic!("{call:?} became {:?}", frame.body) };
        assert_eq!(text(&came), text(&call));
    }
}

#[test]
fn every_reply_survives_the_wire() {
    for reply in replies() {
        let (words, fds) = encode(BodyRef::Reply(&reply));
        let frame = read(&words, fds).unwrap_or_else(|why| panic!("{reply:?}: {why}"));
        let FrameBody::Reply(came) = frame.body else { panic!("{reply:?} became {:?}", frame.body) };
        assert_eq!(text(&came), text(&reply));
    }
}

#[test]
fn every_event_survives_the_wire() {
    for event in events() {
        let (words, fds) = encode(BodyRef::Event(&event));
        let frame = read(&words, fds).unwrap_or_else(|why| panic!("{event:?}: {why}"));
        let FrameBody::Event(came) = frame.body else { panic!("{event:?} became {:?}", frame.body) };
        assert_eq!(text(&came), text(&event));
    }
}

/// The samples name every variant: a new one without a sample fails here, and without a line here does not compile.
#[test]
fn the_samples_cover_every_variant() {
    let of_calls: BTreeSet<String> = calls().iter().map(variant).collect();
    let of_replies: BTreeSet<String> = replies().iter().map(variant).collect();
    let of_events: BTreeSet<String> = events().iter().map(variant).collect();
    assert_eq!(of_calls, samples::call_variants());
    assert_eq!(of_replies, samples::reply_variants());
    assert_eq!(of_events, samples::event_variants());
}

#[test]
fn only_a_job_that_says_so_is_not_idempotent() {
    for call in calls() {
        let expected = !matches!(call, Call::Driver(driver::Call::Submit { idempotent: false, .. }));
        assert_eq!(call.idempotent(), expected, "{call:?}");
    }
    let of_both_kinds = calls().iter().filter(|call| matches!(call, Call::Driver(driver::Call::Submit { .. }))).count();
    assert_eq!(of_both_kinds, 2);
}

#[test]
fn the_handshake_and_every_error_survive_the_wire() {
    for interface in [Interface::Supervisor, Interface::Pager, Interface::Mirror, Interface::Driver] {
        for role in [Role::Client, Role::Operator, Role::Pager, Role::Mirror, Role::Driver, Role::Supervisor] {
            let (name, key) = ("soft0".to_owned(), vec![1, 2, 3]);
            let (max_message_bytes, max_fds) = (65536, 16);
            let hello =
                Hello { major: 0, minor: 1, interface, role, name, incarnation: 3, key, max_message_bytes, max_fds };
            let (words, fds) = encode(BodyRef::Hello(&hello));
            assert!(matches!(read(&words, fds).expect("hello").body, FrameBody::Hello(came) if came == hello));
        }
    }
    let name = "pager".to_owned();
    let welcome = Welcome { major: 0, minor: 1, name, incarnation: 4, max_message_bytes: 4096, max_fds: 2 };
    let (words, fds) = encode(BodyRef::Welcome(&welcome));
    assert!(matches!(read(&words, fds).expect("welcome").body, FrameBody::Welcome(came) if came == welcome));
    use ErrorCode::*;
    for code in [Fault, Permission, Invalid, NotFound, Busy, NoMemory, Io, Stale, TimedOut, Protocol] {
        let error = WireError::new(code, "Page 7 is gone: map it again");
        let (words, fds) = encode(BodyRef::Error(&error));
        assert!(matches!(read(&words, fds).expect("error").body, FrameBody::Error(came) if came == error));
    }
}

#[test]
fn a_long_error_text_is_cut_at_a_character_and_still_arrives() {
    let error = WireError::new(ErrorCode::Io, "é".repeat(5000));
    let (words, fds) = encode(BodyRef::Error(&error));
    let FrameBody::Error(came) = read(&words, fds).expect("error").body else { panic!("an error") };
    assert_eq!(came.code, ErrorCode::Io);
    assert!(error.text.starts_with(&came.text) && came.text.len() >= 500, "{}", came.text.len());
}

#[test]
fn the_largest_answers_fit_into_one_message() {
    let run = pager::StatusRun { first_page: u64::MAX, page_count: u64::MAX, status: pager::PageStatus::Gone };
    let reply = Reply::Pager(pager::Reply::Migrated { moved_pages: 1, runs: vec![run; 2048] });
    let (words, fds) = encode(BodyRef::Reply(&reply));
    assert_eq!(text(&read(&words, fds).map(|frame| frame.body)), text(&Ok::<_, String>(FrameBody::Reply(reply))));
}

#[test]
fn what_is_too_long_or_too_large_is_refused_before_it_is_sent() {
    let mut encoder = Encoder::new();
    let run = pager::MapRun { first_page: 0, page_count: 1, kind: pager::MapKind::System, writable: false };
    let too_many = Reply::Pager(pager::Reply::Resolved { runs: vec![run; 2049] });
    let refused = encoder.encode(header(), BodyRef::Reply(&too_many), 1 << 20, 16).map(|_| ());
    assert!(matches!(refused, Err(error::EncodeError::TooLong { len: 2049, max: 2048, .. })), "{refused:?}");
    let many = Reply::Pager(pager::Reply::Resolved { runs: vec![run; 2048] });
    let refused = encoder.encode(header(), BodyRef::Reply(&many), 1 << 12, 16).map(|_| ());
    assert!(matches!(refused, Err(error::EncodeError::TooLarge { .. })), "{refused:?}");
    let entries = (0..5).map(|index| (index.to_string(), fd(4096))).collect();
    let vault = Reply::Supervisor(supervisor::Reply::Vault { entries, more: false });
    let refused = encoder.encode(header(), BodyRef::Reply(&vault), 1 << 16, 4).map(|_| ());
    assert!(matches!(refused, Err(error::EncodeError::TooManyFds { fd_count: 5, max_fds: 4 })), "{refused:?}");
    // The encoder is fit for the next message after every refusal.
    let stats = Call::Common(common::Call::Stats);
    assert!(encoder.encode(header(), BodyRef::Call(&stats), 1 << 12, 0).is_ok());
}

#[test]
fn missing_surplus_and_repeated_descriptors_are_refused() {
    let entries = vec![("a".to_owned(), fd(4096)), ("b".to_owned(), fd(8192))];
    let vault = Reply::Supervisor(supervisor::Reply::Vault { entries, more: true });
    let (words, mut fds) = encode(BodyRef::Reply(&vault));
    let copies = |fds: &[OwnedFd]| fds.iter().map(|fd| fd.try_clone().expect("duplicate")).collect::<Vec<_>>();
    assert!(read(&words, copies(&fds)).is_ok());
    assert!(read(&words, copies(&fds[..1])).is_err_and(|why| why.contains("announces 2")));
    fds.push(fds[0].try_clone().expect("duplicate"));
    assert!(read(&words, copies(&fds)).is_err_and(|why| why.contains("3 descriptors came")));

    let named = |indices: [u16; 2], count: u16| {
        let mut message = capnp::message::Builder::new_default();
        let mut root: uhmm_schema::common_capnp::envelope::Builder<'_> = message.init_root();
        root.set_kind(uhmm_schema::common_capnp::Kind::Reply);
        root.set_interface(uhmm_schema::common_capnp::Interface::Supervisor);
        root.set_fd_count(count);
        let reply: uhmm_schema::supervisor_capnp::reply::Builder<'_> = root.init_body().init_as();
        let mut list = reply.init_vault().init_entries(2);
        for (index, fd) in indices.into_iter().enumerate() {
            list.reborrow().get(index as u32).set_entry_fd(fd);
        }
        let bytes = capnp::serialize::write_message_to_words(&message);
        let mut words = capnp::Word::allocate_zeroed_vec(bytes.len() / 8);
        capnp::Word::words_to_bytes_mut(&mut words).copy_from_slice(&bytes);
        words
    };
    assert!(read(&named([0, 1], 2), copies(&fds[..2])).is_ok());
    for (indices, count) in [([0, 0], 2), ([1, 0], 2), ([0, 2], 2), ([0, 0xffff], 1), ([0, 1], 1), ([0, 1], 3)] {
        let refused = read(&named(indices, count), copies(&fds[..usize::from(count)]));
        assert!(refused.as_ref().is_err_and(|why| why.contains("descriptor")), "{indices:?}: {refused:?}");
    }
}

#[test]
fn every_cut_of_a_message_is_refused_without_a_panic() {
    for call in calls() {
        let (words, _) = encode(BodyRef::Call(&call));
        for len in 0..words.len() {
            assert!(read(&words[..len], Vec::new()).is_err(), "{call:?} cut to {len} words");
        }
    }
}

#[test]
fn no_single_flipped_bit_makes_the_reader_panic() {
    for call in calls() {
        let (words, fds) = encode(BodyRef::Call(&call));
        let bytes = capnp::Word::words_to_bytes(&words).to_vec();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = capnp::Word::allocate_zeroed_vec(words.len());
            let into = capnp::Word::words_to_bytes_mut(&mut flipped);
            into.copy_from_slice(&bytes);
            into[bit / 8] ^= 1 << (bit % 8);
            let fds = fds.iter().map(|fd| fd.as_fd().try_clone_to_owned().expect("duplicate")).collect();
            if let Ok(frame) = read(&flipped, fds) {
                assert!(!frame.body.kind().is_empty());
            }
        }
    }
}
