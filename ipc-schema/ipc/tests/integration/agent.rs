//! What the pager asks of a client about frames, and its answers.

use uhmm_ipc::message::pager::FramesOp;
use uhmm_ipc::message::{Call, Event, Interface, Reply, Role, TraceId, pager};
use uhmm_ipc::{CallId, ConnId, Identity, Limits, Reactor, Wake};

use crate::support::{Caller, PATIENCE, Place, Server, identity};

const WINDOW: u32 = 4;

fn limited(identity: Identity) -> Identity {
    Identity { limits: Limits { max_inflight_per_conn: WINDOW, ..Limits::default() }, ..identity }
}

fn order(id: u64) -> pager::Event {
    let op = FramesOp::UnmapDevice;
    pager::Event::Frames { id, region: 5, first_page: 6, addr: 0x7000, page_count: 512, op }
}

fn answer(id: u64) -> Call {
    Call::Pager(pager::Call::FramesDone { id, done: true })
}

fn evict() -> Call {
    Call::Pager(pager::Call::Evict { device: 0, page_count: 0 })
}

/// Answers evictions only after the agent has answered `order(9)`, which goes out with every `order_at`-th of them.
fn waits_for_the_agent(order_at: usize) -> impl FnMut(&mut Reactor, Wake) + Send {
    let mut waiting: Vec<(ConnId, CallId)> = Vec::new();
    let mut agent_answered = false;
    move |reactor, wake| {
        let Wake::Call { conn, call, body: Call::Pager(body), .. } = wake else { return };
        match body {
            pager::Call::FramesDone { id: 9, done: true } => {
                agent_answered = true;
                assert!(reactor.reply(conn, call, Ok(Reply::Pager(pager::Reply::Done))));
            }
            pager::Call::Evict { .. } => waiting.push((conn, call)),
            other => panic!("{other:?}"),
        }
        if !agent_answered && waiting.len() == order_at {
            assert!(reactor.event(conn, Event::Pager(order(9)), TraceId(77)));
        }
        if agent_answered {
            for (conn, call) in waiting.drain(..) {
                assert!(reactor.reply(conn, call, Ok(Reply::Pager(pager::Reply::Evicted { page_count: 1 }))));
            }
        }
    }
}

fn assert_all_evicted(caller: &mut Caller, calls: Vec<CallId>) {
    for wanted in calls {
        let evicted = caller.until("an eviction", |wake| match wake {
            Wake::Done { call, result, .. } if *call == wanted => {
                Some(matches!(result, Ok(Reply::Pager(pager::Reply::Evicted { page_count: 1 }))))
            }
            _ => None,
        });
        assert!(evicted);
    }
}

#[test]
fn integration_a_client_gets_the_pagers_orders_and_answers_them_past_a_full_window_of_calls() {
    let place = Place::new();
    let server = limited(identity("pager", Role::Pager, 1, Some(Interface::Pager)));
    let _server = Server::start_as(&place, server, waits_for_the_agent(WINDOW as usize));
    let client = limited(identity("client", Role::Client, 0, None));
    let mut caller = Caller::new(client, &place.path, Interface::Pager, &[]);
    let link = caller.link;
    let calls = (0..10 * WINDOW).map(|_| caller.reactor.call(link, evict(), TraceId::default(), None)).collect();
    let trace = caller.until("the order", |wake| match wake {
        Wake::Event { trace, body: Event::Pager(event), .. } => {
            assert_eq!(*event, order(9));
            Some(*trace)
        }
        _ => None,
    });
    assert_eq!(trace, TraceId(77));
    caller.reactor.call(link, answer(9), TraceId::default(), None);
    assert_all_evicted(&mut caller, calls);
}

#[test]
fn integration_an_agents_answer_that_waited_for_the_connection_goes_before_the_calls_that_wait_for_it() {
    let place = Place::new();
    let client = limited(identity("client", Role::Client, 0, None));
    let mut caller = Caller::new(client, &place.path, Interface::Pager, &[]);
    let link = caller.link;
    let calls = (0..10 * WINDOW).map(|_| caller.reactor.call(link, evict(), TraceId::default(), None)).collect();
    caller.reactor.call(link, answer(9), TraceId::default(), None);
    let server = limited(identity("pager", Role::Pager, 1, Some(Interface::Pager)));
    let _server = Server::start_as(&place, server, waits_for_the_agent(usize::MAX));
    assert_all_evicted(&mut caller, calls);
}

#[test]
fn integration_after_a_lost_connection_an_agents_answer_is_repeated_before_the_calls_that_wait_for_it() {
    let place = Place::new();
    let client = limited(identity("client", Role::Client, 0, None));
    let mut caller = Caller::new(client, &place.path, Interface::Pager, &[]);
    let link = caller.link;
    // The first incarnation takes everything and says nothing.
    let (told, seen) = std::sync::mpsc::channel();
    let first = limited(identity("pager", Role::Pager, 1, Some(Interface::Pager)));
    let first = Server::start_as(&place, first, move |_, wake| {
        if let Wake::Call { body: Call::Pager(pager::Call::FramesDone { id, .. }), .. } = wake {
            told.send(id).expect("the test listens");
        }
    });
    let calls = (0..10 * WINDOW).map(|_| caller.reactor.call(link, evict(), TraceId::default(), None)).collect();
    caller.until("the link", |wake| matches!(wake, Wake::LinkUp { .. }).then_some(()));
    caller.reactor.call(link, answer(9), TraceId::default(), None);
    assert_eq!(seen.recv_timeout(PATIENCE), Ok(9));
    first.kill();
    let second = limited(identity("pager", Role::Pager, 2, Some(Interface::Pager)));
    let _second = Server::start_as(&place, second, waits_for_the_agent(usize::MAX));
    assert_all_evicted(&mut caller, calls);
}
