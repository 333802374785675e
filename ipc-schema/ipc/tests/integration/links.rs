//! Calls, replies, events, descriptors, deadlines and reconnects between two reactors in two threads.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use uhmm_ipc::message::{
    Call, ErrorCode, Event, Interface, Reply, Role, TraceId, WireError, common, driver, mirror, pager,
};
use uhmm_ipc::{CallId, FdToken, Limits, Reactor, TimerToken, Wake};

use crate::support::{Caller, KEY, PATIENCE, Place, Server, identity, memory_with, text_of};

fn lookup(addr: u64) -> Call {
    Call::Pager(pager::Call::Lookup { space: 1, addr })
}

fn submit(kernel: &str, idempotent: bool) -> Call {
    Call::Driver(driver::Call::Submit {
        space: 1,
        kernel: kernel.into(),
        args: vec![1, 2],
        idempotent,
        ranges: Vec::new(),
    })
}

fn region(addr: u64, memory: &uhmm_ipc::message::Fd) -> Reply {
    let memory = memory.clone();
    let memory = pager::Memory::Sealed { memory, offset_bytes: 0 };
    Reply::Pager(pager::Reply::Region { region: 9, addr, len_bytes: 4096, device_read_only: true, memory })
}

fn done(call: CallId) -> impl FnMut(&Wake) -> Option<Result<String, ErrorCode>> {
    move |wake| match wake {
        Wake::Done { call: ended, result, .. } if *ended == call => {
            Some(result.as_ref().map(|reply| format!("{reply:?}")).map_err(|error| error.code))
        }
        _ => None,
    }
}

/// Remembers regions and gives their memory back on lookup.
fn keeper() -> impl FnMut(&mut Reactor, Wake) + Send {
    let mut kept = None;
    move |reactor, wake| {
        if let Wake::Call { conn, call, body, .. } = wake {
            let result = match body {
                Call::Pager(pager::Call::CreateRegion { memory, .. }) => {
                    kept = Some(memory);
                    Ok(Reply::Pager(pager::Reply::RegionCreated { region: 9 }))
                }
                Call::Pager(pager::Call::Lookup { addr, .. }) => match &kept {
                    Some(memory) => Ok(region(addr, memory)),
                    None => Err(WireError::new(ErrorCode::NotFound, format!("Nothing at {addr:#x}"))),
                },
                Call::Common(common::Call::Stats) => Ok(Reply::Common(common::Reply::Stats(Vec::new()))),
                other => Err(WireError::new(ErrorCode::Invalid, format!("{other:?}"))),
            };
            assert!(reactor.reply(conn, call, result));
        }
    }
}

#[test]
fn integration_calls_are_answered_and_descriptors_arrive_both_ways() {
    let place = Place::new();
    let _server = Server::start(&place, Interface::Pager, 4, keeper());
    let mut caller = Caller::client(&place.path, Interface::Pager);
    let link = caller.link;
    let call = caller.reactor.call(link, lookup(64), TraceId::fresh(), None);
    assert_eq!(caller.until("an error", done(call)), Err(ErrorCode::NotFound));
    let memory = memory_with(b"client's bytes");
    let create = Call::Pager(pager::Call::CreateRegion { addr: 4096, len_bytes: 4096, memory });
    let call = caller.reactor.call(link, create, TraceId::fresh(), None);
    assert!(caller.until("the region", done(call)).expect("created").contains("RegionCreated"));
    let call = caller.reactor.call(link, lookup(4096), TraceId::fresh(), None);
    let memory = caller.until("the region's memory", |wake| match wake {
        Wake::Done {
            call: ended,
            result: Ok(Reply::Pager(pager::Reply::Region { memory: pager::Memory::Sealed { memory, .. }, .. })),
            ..
        } => (*ended == call).then(|| memory.clone()),
        _ => None,
    });
    assert_eq!(text_of(&memory, 14), b"client's bytes");
    let welcome = caller.until("the welcome", |wake| match wake {
        Wake::LinkUp { welcome, reconnected, .. } => Some((welcome.clone(), *reconnected)),
        _ => None,
    });
    assert_eq!((welcome.0.name.as_str(), welcome.0.incarnation, welcome.1), ("server", 4, false));
}

#[test]
fn integration_the_peer_is_known_by_name_role_and_credentials() {
    let place = Place::new();
    let (told, peers) = mpsc::channel();
    let _server = Server::start(&place, Interface::Pager, 1, move |_, wake| {
        if let Wake::Connected { peer, .. } = wake {
            told.send(peer).expect("the test listens");
        }
    });
    let mut caller = Caller::new(identity("mirror", Role::Mirror, 7, None), &place.path, Interface::Pager, KEY);
    caller.until("the link", |wake| matches!(wake, Wake::LinkUp { .. }).then_some(()));
    let peer = peers.recv().expect("a peer");
    assert_eq!((peer.name.as_str(), peer.role, peer.incarnation), ("mirror", Role::Mirror, 7));
    assert_eq!((peer.pid, peer.uid), (std::process::id(), rustix::process::getuid().as_raw()));
}

#[test]
fn integration_traces_and_deadlines_reach_the_callee_and_an_expired_call_ends_with_timed_out() {
    let place = Place::new();
    let (told, calls) = mpsc::channel();
    let _server = Server::start(&place, Interface::Pager, 1, move |reactor, wake| {
        if let Wake::Call { conn, call, trace, deadline, body } = wake {
            told.send((trace, deadline)).expect("the test listens");
            if !matches!(body, Call::Pager(pager::Call::Lookup { addr: 0, .. })) {
                reactor.reply(conn, call, Ok(Reply::Pager(pager::Reply::Done)));
            }
        }
    });
    let mut caller = Caller::client(&place.path, Interface::Pager);
    let link = caller.link;
    let start = Instant::now();
    let call = caller.reactor.call(link, lookup(0), TraceId(77), Some(Duration::from_millis(60)));
    assert_eq!(caller.until("the deadline", done(call)), Err(ErrorCode::TimedOut));
    assert!(start.elapsed() >= Duration::from_millis(60));
    let (trace, deadline) = calls.recv().expect("the call");
    assert_eq!(trace, TraceId(77));
    assert!(deadline.is_some_and(|deadline| deadline <= start + Duration::from_secs(5)));
    // The link is none the worse for it.
    let call = caller.reactor.call(link, lookup(1), TraceId::default(), None);
    assert!(caller.until("an answer", done(call)).is_ok());
    assert_eq!(calls.recv().expect("the call"), (TraceId(0), None));
}

#[test]
fn integration_a_late_answer_to_an_expired_call_is_dropped_and_the_link_goes_on() {
    let place = Place::new();
    let mut late = None;
    let _server = Server::start(&place, Interface::Pager, 1, move |reactor, wake| {
        if let Wake::Call { conn, call, .. } = wake {
            match late.take() {
                None => late = Some(call),
                Some(first) => {
                    reactor.reply(conn, first, Ok(Reply::Pager(pager::Reply::Done)));
                    reactor.reply(conn, call, Ok(Reply::Pager(pager::Reply::Done)));
                }
            }
        }
    });
    let mut caller = Caller::client(&place.path, Interface::Pager);
    let link = caller.link;
    let call = caller.reactor.call(link, lookup(0), TraceId::default(), Some(Duration::from_millis(30)));
    assert_eq!(caller.until("the deadline", done(call)), Err(ErrorCode::TimedOut));
    let call = caller.reactor.call(link, lookup(1), TraceId::default(), None);
    assert!(caller.until("an answer", done(call)).is_ok());
    assert!(!caller.rest().iter().any(|wake| matches!(wake, Wake::LinkDown { .. })), "{:?}", caller.rest());
}

#[test]
fn integration_after_a_restart_idempotent_calls_are_sent_again_and_others_end_stale() {
    let place = Place::new();
    let (told, calls) = mpsc::channel();
    let server = Server::start(&place, Interface::Driver, 1, move |_, wake| {
        if let Wake::Call { body, .. } = wake {
            told.send(body.idempotent()).expect("the test listens");
        }
    });
    let mut caller = Caller::client(&place.path, Interface::Driver);
    let link = caller.link;
    let again = caller.reactor.call(link, submit("again", true), TraceId::default(), None);
    let once = caller.reactor.call(link, submit("once", false), TraceId::default(), None);
    caller.until("the link", |wake| matches!(wake, Wake::LinkUp { .. }).then_some(()));
    assert_eq!((calls.recv(), calls.recv()), (Ok(true), Ok(false)));
    server.kill();
    assert_eq!(caller.until("the loss", done(once)), Err(ErrorCode::Stale));
    caller.until("the loss", |wake| matches!(wake, Wake::LinkDown { .. }).then_some(()));
    let down = caller.reactor.call(link, submit("down", false), TraceId::default(), None);
    assert_eq!(caller.until("a refusal while down", done(down)), Err(ErrorCode::Stale));
    let _server = Server::start(&place, Interface::Driver, 2, |reactor, wake| {
        if let Wake::Call { conn, call, body: Call::Driver(driver::Call::Submit { kernel, .. }), .. } = wake {
            assert_eq!(kernel, "again");
            let reply = driver::Reply::Finished { results: vec![5], fault_count: 0, run_time_ns: 1 };
            reactor.reply(conn, call, Ok(Reply::Driver(reply)));
        }
    });
    assert!(caller.until("the answer of the next incarnation", done(again)).expect("finished").contains("[5]"));
    let incarnation = caller.until("the new link", |wake| match wake {
        Wake::LinkUp { welcome, reconnected: true, .. } => Some(welcome.incarnation),
        _ => None,
    });
    assert_eq!(incarnation, 2);
}

#[test]
fn integration_a_link_waits_for_a_service_that_does_not_exist_yet() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("later.sock");
    let mut caller = Caller::client(&path, Interface::Pager);
    let link = caller.link;
    let call = caller.reactor.call(link, lookup(1), TraceId::default(), None);
    let mut wakes = Vec::new();
    caller.reactor.poll(Some(Duration::from_millis(20)), &mut wakes).expect("poll");
    assert!(wakes.is_empty(), "{wakes:?}");
    let listener = uhmm_kernel_hook::SeqListener::bind(&path).expect("listener");
    let place = Place::at(dir, path, listener);
    let _server = Server::start(&place, Interface::Pager, 1, keeper());
    assert_eq!(caller.until("an answer", done(call)), Err(ErrorCode::NotFound));
}

/// Tells what it is asked.
fn log(told: mpsc::Sender<String>) -> impl FnMut(&mut Reactor, Wake) + Send + 'static {
    move |reactor, wake| {
        if let Wake::Call { conn, call, body: Call::Mirror(body), .. } = wake {
            told.send(format!("{body:?}")).expect("the test listens");
            reactor.reply(conn, call, Ok(Reply::Mirror(mirror::Reply::Done)));
        }
    }
}

#[test]
fn integration_the_preamble_comes_first_on_every_connection_and_in_order() {
    let place = Place::new();
    let (told, calls) = mpsc::channel();
    let server = Server::start(&place, Interface::Mirror, 1, log(told.clone()));
    let mut caller = Caller::client(&place.path, Interface::Mirror);
    let link = caller.link;
    let preamble =
        vec![Call::Mirror(mirror::Call::Login { device: 2 }), Call::Mirror(mirror::Call::Close { space: 3 })];
    caller.reactor.set_preamble(link, preamble);
    let ack = caller.reactor.call(link, Call::Mirror(mirror::Call::Ack { id: 4 }), TraceId::default(), None);
    assert!(caller.until("an answer", done(ack)).is_ok());
    server.kill();
    caller.until("the loss", |wake| matches!(wake, Wake::LinkDown { .. }).then_some(()));
    let ack = caller.reactor.call(link, Call::Mirror(mirror::Call::Ack { id: 5 }), TraceId::default(), None);
    let _server = Server::start(&place, Interface::Mirror, 2, log(told));
    assert!(caller.until("an answer", done(ack)).is_ok());
    let order: Vec<String> = calls.try_iter().collect();
    let expected = ["Login { device: 2 }", "Close { space: 3 }", "Ack { id: 4 }"];
    let again = ["Login { device: 2 }", "Close { space: 3 }", "Ack { id: 5 }"];
    assert_eq!(order, [expected, again].concat());
    let mut indices = Vec::new();
    for _ in 0..4 {
        indices.push(caller.until("a preamble result", |wake| match wake {
            Wake::Preamble { call: Call::Mirror(call), result: Ok(_), .. } => Some(format!("{call:?}")),
            _ => None,
        }));
    }
    let both = &expected[..2];
    assert_eq!(indices, [both, both].concat());
}

/// The owner's list may become shorter while the calls of a connection are made: each of that connection's is made all the same.
#[test]
fn integration_a_preamble_that_is_changed_while_it_runs_loses_no_call() {
    let place = Place::new();
    let (told, calls) = mpsc::channel();
    let _server = Server::start(&place, Interface::Mirror, 1, log(told));
    let mut caller = Caller::client(&place.path, Interface::Mirror);
    let link = caller.link;
    let close = |space| Call::Mirror(mirror::Call::Close { space });
    caller.reactor.set_preamble(link, vec![close(1), close(2), close(3)]);
    let first = |wake: &Wake| {
        matches!(wake, Wake::Preamble { call: Call::Mirror(mirror::Call::Close { space: 1 }), .. }).then_some(())
    };
    caller.until("the first call", first);
    // What the first call was about is gone.
    caller.reactor.set_preamble(link, vec![close(2), close(3)]);
    let ack = caller.reactor.call(link, Call::Mirror(mirror::Call::Ack { id: 4 }), TraceId::default(), None);
    assert!(caller.until("an answer", done(ack)).is_ok());
    let order: Vec<String> = calls.try_iter().collect();
    assert_eq!(order, ["Close { space: 1 }", "Close { space: 2 }", "Close { space: 3 }", "Ack { id: 4 }"]);
}

#[test]
fn integration_a_failed_preamble_ends_queued_and_later_calls_until_the_link_is_reset() {
    let place = Place::new();
    let mut logins = 0;
    let _server = Server::start(&place, Interface::Mirror, 1, move |reactor, wake| {
        if let Wake::Call { conn, call, body, .. } = wake {
            logins += u32::from(matches!(body, Call::Mirror(mirror::Call::Login { .. })));
            let result = match logins {
                1 => Err(WireError::new(ErrorCode::Busy, "The old session still exists")),
                _ => Ok(Reply::Mirror(mirror::Reply::Done)),
            };
            reactor.reply(conn, call, result);
        }
    });
    let mut caller = Caller::client(&place.path, Interface::Mirror);
    let link = caller.link;
    caller.reactor.set_preamble(link, vec![Call::Mirror(mirror::Call::Login { device: 2 })]);
    let ack = Call::Mirror(mirror::Call::Ack { id: 4 });
    let queued = caller.reactor.call(link, ack.clone(), TraceId::default(), None);
    assert_eq!(caller.until("the queued call's end", done(queued)), Err(ErrorCode::Busy));
    let later = caller.reactor.call(link, ack.clone(), TraceId::default(), None);
    assert_eq!(caller.until("the later call's end", done(later)), Err(ErrorCode::Busy));
    caller.until("the preamble's error", |wake| {
        matches!(wake, Wake::Preamble { call: Call::Mirror(mirror::Call::Login { .. }), result: Err(_), .. })
            .then_some(())
    });
    caller.reactor.reset_link(link);
    let after = caller.reactor.call(link, ack, TraceId::default(), None);
    assert!(caller.until("an answer", done(after)).is_ok());
}

#[test]
fn integration_a_service_with_a_wrong_key_is_refused_and_its_calls_learn_why() {
    let place = Place::new();
    let _server = Server::start(&place, Interface::Pager, 1, keeper());
    let mirror = identity("mirror", Role::Mirror, 1, None);
    let mut caller = Caller::new(mirror, &place.path, Interface::Pager, b"wrong");
    let link = caller.link;
    let call = caller.reactor.call(link, lookup(1), TraceId::default(), None);
    assert_eq!(caller.until("the refusal", done(call)), Err(ErrorCode::Permission));
    assert!(!caller.rest().iter().any(|wake| matches!(wake, Wake::LinkUp { .. })));
}

#[test]
fn integration_events_arrive_in_order_and_not_at_a_connection_that_is_gone() {
    let place = Place::new();
    let _server = Server::start(&place, Interface::Mirror, 1, |reactor, wake| {
        if let Wake::Connected { conn, .. } = wake {
            for space in 0..200 {
                assert!(reactor.event(conn, Event::Mirror(mirror::Event::SpaceGone { space }), TraceId(space)));
            }
            reactor.close(conn);
            assert!(!reactor.event(conn, Event::Mirror(mirror::Event::SpaceGone { space: 200 }), TraceId(200)));
        }
    });
    let mut caller = Caller::client(&place.path, Interface::Mirror);
    for expected in 0..200 {
        let (trace, space) = caller.until("an event", |wake| match wake {
            Wake::Event { trace, body: Event::Mirror(mirror::Event::SpaceGone { space }), .. } => {
                Some((trace.0, *space))
            }
            _ => None,
        });
        assert_eq!((trace, space), (expected, expected));
    }
    caller.until("the loss", |wake| matches!(wake, Wake::LinkDown { .. }).then_some(()));
}

#[test]
fn integration_a_window_of_calls_is_kept_and_all_are_answered() {
    let place = Place::new();
    let limits = Limits { max_inflight_per_conn: 4, ..Limits::default() };
    let server = identity("server", Role::Pager, 1, Some(Interface::Pager));
    let _server = Server::start_as(&place, uhmm_ipc::Identity { limits, ..server }, keeper());
    let client = uhmm_ipc::Identity { limits, ..identity("client", Role::Client, 0, None) };
    let mut caller = Caller::new(client, &place.path, Interface::Pager, &[]);
    let link = caller.link;
    let calls: Vec<CallId> =
        (0..500).map(|addr| caller.reactor.call(link, lookup(addr), TraceId::default(), None)).collect();
    for call in calls {
        assert_eq!(caller.until("an answer", done(call)), Err(ErrorCode::NotFound));
    }
}

#[test]
fn integration_a_call_that_is_too_large_for_the_peer_ends_and_the_link_goes_on() {
    let place = Place::new();
    let server = identity("server", Role::Driver, 1, Some(Interface::Driver));
    let limits = Limits { max_message_bytes: 4096, ..Limits::default() };
    let _server = Server::start_as(&place, uhmm_ipc::Identity { limits, ..server }, |reactor, wake| {
        if let Wake::Call { conn, call, .. } = wake {
            // Too large for the peer as well: becomes an error.
            let reply = driver::Reply::Finished { results: vec![0; 1000], fault_count: 0, run_time_ns: 0 };
            reactor.reply(conn, call, Ok(Reply::Driver(reply)));
        }
    });
    let mut caller = Caller::client(&place.path, Interface::Driver);
    let link = caller.link;
    let body = |count| {
        Call::Driver(driver::Call::Submit {
            space: 1,
            kernel: "k".into(),
            args: vec![0; count],
            idempotent: true,
            ranges: Vec::new(),
        })
    };
    for count in [1000, 2000, 1] {
        let call = caller.reactor.call(link, body(count), TraceId::default(), None);
        assert_eq!(caller.until("an end", done(call)), Err(ErrorCode::Protocol), "{count} arguments");
    }
    assert!(!caller.rest().iter().any(|wake| matches!(wake, Wake::LinkDown { .. })));
}

#[test]
fn integration_descriptors_timers_and_wakers_wake_the_loop() {
    let mut reactor = Reactor::new(identity("test", Role::Client, 0, None)).expect("reactor");
    let bell = uhmm_kernel_hook::EventFd::new().expect("eventfd");
    reactor.add_fd(&bell, FdToken(5)).expect("watched");
    let cancelled = reactor.add_timer(Duration::from_millis(1), TimerToken(8));
    reactor.add_timer(Duration::from_millis(10), TimerToken(9));
    assert!(reactor.cancel_timer(cancelled));
    bell.signal().expect("signalled");
    let waker = reactor.waker();
    std::thread::spawn(move || waker.wake()).join().expect("woken");
    let mut wakes = Vec::new();
    let end = Instant::now() + PATIENCE;
    while !wakes.iter().any(|wake| matches!(wake, Wake::Timer(_))) {
        assert!(Instant::now() < end, "{wakes:?}");
        reactor.poll(None, &mut wakes).expect("poll");
    }
    let mut names: Vec<String> = wakes.iter().map(|wake| format!("{wake:?}")).collect();
    names.sort();
    assert_eq!(names, ["Fd(FdToken(5))", "Timer(TimerToken(9))", "Woken"]);
    bell.drain().expect("drained");
    reactor.remove_fd(&bell).expect("removed");
    assert!(reactor.remove_fd(&bell).is_err());
    bell.signal().expect("signalled");
    wakes.clear();
    reactor.poll(Some(Duration::from_millis(5)), &mut wakes).expect("poll");
    assert!(wakes.is_empty(), "{wakes:?}");
}
