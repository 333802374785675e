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
fn only_a_job_that_says_so_and_an_addition_are_not_idempotent() {
    for call in calls() {
        let adds = matches!(call, Call::Driver(driver::Call::Access { op: driver::AccessOp::FetchAdd(_), .. }));
        let expected = !adds && !matches!(call, Call::Driver(driver::Call::Submit { idempotent: false, .. }));
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
    let (first_page, page_count) = (u64::MAX, u64::MAX);
    let migrated = pager::StatusRun { first_page, page_count, status: pager::PageStatus::Gone };
    let mapped = pager::MapRun { first_page, page_count, kind: pager::MapKind::Frame(u32::MAX), writable: true };
    let residency = pager::Residency::Duplicated(7);
    let there = pager::ResidencyRun {
        first_page,
        page_count,
        residency,
        pinned: true,
        mapped_mask: 0xff,
        huge: true,
        coherent: true,
    };
    let advised = samples::attribute_runs()[1];
    let traced = samples::trace_records()[1];
    let warm = pager::HotRange { addr: u64::MAX, heat_permille: u16::MAX };
    let replies = [
        Reply::Pager(pager::Reply::Migrated { moved_pages: 1, runs: vec![migrated; 2048], why: "x".repeat(1024) }),
        Reply::Pager(pager::Reply::Resolved { runs: vec![mapped; 2048] }),
        Reply::Mirror(mirror::Reply::Mapped { sequence: 1, runs: vec![mapped; 2048] }),
        Reply::Pager(pager::Reply::Residency { runs: vec![there; 2048] }),
        Reply::Pager(pager::Reply::Attributes { runs: vec![advised; 2048] }),
        Reply::Pager(pager::Reply::Trace { records: vec![traced; 256] }),
        Reply::Pager(pager::Reply::HotRanges { ranges: vec![warm; 2048] }),
    ];
    for reply in replies {
        let (words, fds) = encode(BodyRef::Reply(&reply));
        assert_eq!(text(&read(&words, fds).map(|frame| frame.body)), text(&Ok::<_, String>(FrameBody::Reply(reply))));
    }
}

#[test]
fn values_that_mean_something_else_on_the_wire_are_refused_before_they_are_sent() {
    let refused = |advice| {
        let call = Call::Pager(pager::Call::Advise { addr: 0, len_bytes: 4096, advice });
        Encoder::new().encode(header(), BodyRef::Call(&call), 1 << 16, 16).map(|_| ())
    };
    assert!(refused(pager::Advice::Granularity(Some(63))).is_ok());
    for log2 in [64, 254, 255] {
        let refused = refused(pager::Advice::Granularity(Some(log2)));
        assert!(matches!(refused, Err(error::EncodeError::Value { field: "granularity", .. })), "{refused:?}");
    }
    for device in [8, 253, 254, 255] {
        let run = samples::attribute_runs()[0];
        let preferred = Some(pager::Target::Device(device));
        let run = pager::AttributeRun { attributes: pager::Attributes { preferred, ..run.attributes }, ..run };
        let reply = Reply::Pager(pager::Reply::Attributes { runs: vec![run] });
        let refused = Encoder::new().encode(header(), BodyRef::Reply(&reply), 1 << 16, 16).map(|_| ());
        assert!(matches!(refused, Err(error::EncodeError::Value { .. })), "{refused:?}");
    }
}

/// A message whose body a peer built as it liked.
fn forged(
    kind: uhmm_schema::common_capnp::Kind,
    interface: uhmm_schema::common_capnp::Interface,
    fd_count: u16,
    body: impl FnOnce(capnp::any_pointer::Builder<'_>),
) -> Vec<capnp::Word> {
    let mut message = capnp::message::Builder::new_default();
    let mut root: uhmm_schema::common_capnp::envelope::Builder<'_> = message.init_root();
    root.set_kind(kind);
    root.set_interface(interface);
    root.set_fd_count(fd_count);
    body(root.init_body());
    let bytes = capnp::serialize::write_message_to_words(&message);
    let mut words = capnp::Word::allocate_zeroed_vec(bytes.len() / 8);
    capnp::Word::words_to_bytes_mut(&mut words).copy_from_slice(&bytes);
    words
}

#[test]
fn hostile_values_of_agents_attributes_and_accesses_are_refused() {
    use uhmm_schema::common_capnp::{Interface as Scope, Kind};
    use uhmm_schema::{driver_capnp, pager_capnp};
    type PagerCall<'a> = pager_capnp::call::Builder<'a>;
    type PagerReply<'a> = pager_capnp::reply::Builder<'a>;
    let refused = |words: &[capnp::Word], fd_count: u64, part: &str| {
        let fds = (0..fd_count).map(|_| memfd::create_sealed("codec", 4096).expect("memfd")).collect();
        let read = read(words, fds);
        assert!(read.as_ref().is_err_and(|why| why.contains(part)), "{part}: {read:?}");
    };
    // A space without the agent's memory, and an agent that names one descriptor twice.
    let open = |maps: Option<(u16, u16)>, fd_count| {
        forged(Kind::Call, Scope::Pager, fd_count, |body| {
            let mut open = body.init_as::<PagerCall<'_>>().init_open_space();
            open.set_uffd_fd(0);
            if let Some((maps, staging)) = maps {
                let mut agent = open.init_agent();
                agent.set_maps_fd(maps);
                agent.set_pagemap_fd(maps.wrapping_add(1));
                agent.set_smaps_fd(maps.wrapping_add(2));
                agent.set_staging_fd(staging);
            }
        })
    };
    refused(&open(None, 1), 1, "agent.mapsFd");
    refused(&open(Some((1, 1)), 5), 5, "agent.stagingFd");
    refused(&open(Some((0xffff, 1)), 2), 2, "agent.mapsFd");
    for granularity in [64, 254] {
        let advice = forged(Kind::Call, Scope::Pager, 0, |body| {
            body.init_as::<PagerCall<'_>>().init_advise().init_advice().set_granularity(granularity);
        });
        refused(&advice, 0, "granularity has the impossible value");
    }
    for place in [8, 253] {
        let attributes = forged(Kind::Reply, Scope::Pager, 0, |body| {
            body.init_as::<PagerReply<'_>>().init_attributes(1).get(0).set_prefetched(place);
        });
        refused(&attributes, 0, "attributes.prefetched has the impossible value");
    }
    let trace = forged(Kind::Reply, Scope::Pager, 0, |body| {
        body.init_as::<PagerReply<'_>>().init_trace(257);
    });
    refused(&trace, 0, "trace has 257");
    let sealed = forged(Kind::Reply, Scope::Pager, 0, |body| {
        body.init_as::<PagerReply<'_>>().init_region().init_memory().init_sealed().set_file_fd(0xffff);
    });
    refused(&sealed, 0, "region.memory.sealed");
    let access = forged(Kind::Call, Scope::Driver, 1, |body| {
        let mut access = body.init_as::<driver_capnp::call::Builder<'_>>().init_access();
        access.set_buffer_fd(0xffff);
        access.init_op().set_fetch_add(1);
    });
    refused(&access, 1, "no field names");
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
        use uhmm_schema::common_capnp::{Interface as Scope, Kind};
        forged(Kind::Reply, Scope::Supervisor, count, |body| {
            let reply: uhmm_schema::supervisor_capnp::reply::Builder<'_> = body.init_as();
            let mut list = reply.init_vault().init_entries(2);
            for (index, fd) in indices.into_iter().enumerate() {
                list.reborrow().get(index as u32).set_entry_fd(fd);
            }
        })
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
