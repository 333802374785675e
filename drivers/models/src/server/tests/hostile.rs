//! Peers that fall silent, talk nonsense or try to break in: an error in time at either end, never a hang or a crash.

use proptest::prelude::*;
use uhmm_kernel_hook::{PAGE_SIZE, StreamStatus, memfd};

use super::*;
use crate::testing::GO;

/// What is sent instead of a reply.
type Evil = dyn Fn(&Stream, &Message) + Sync;

/// Answers all honestly but accesses to BAR 0 and DMA_UNMAP: those go to `evil`.
fn evil_peer(stream: &Stream, evil: &dyn Fn(&Stream, &Message)) {
    let machine = Machine::start(Copier::boxed()).unwrap();
    machine.connect().unwrap();
    while let Ok(message) = wire::receive(stream, None, LIMIT) {
        let header = message.header;
        let to_bar = message.body.get(8..12) == Some(&[0; 4]);
        if header.command >= command::REGION_READ && to_bar || header.command == command::DMA_UNMAP {
            evil(stream, &message);
            continue;
        }
        let answer = match header.command {
            command::VERSION => Ok(wire::version_body().into()),
            _ => handle(&machine, message),
        };
        if reply(stream, header, answer).is_err() {
            return;
        }
    }
}

/// What an evil peer sends instead of a reply; that nobody takes it any more is no failure of the test.
fn send_anyway(stream: &Stream, header: Header, body: &[u8]) {
    drop(wire::send(stream, header, body, &[], LIMIT));
}

#[test]
fn a_peer_that_is_silent_or_talks_nonsense_is_an_error_in_time_and_never_a_hang() {
    let silent = |_: &Stream, _: &Message| {};
    let wrong_id = |stream: &Stream, message: &Message| {
        let header = Header { id: message.header.id ^ 1, flags: flag::REPLY, ..message.header };
        send_anyway(stream, header, &message.body);
    };
    let short = |stream: &Stream, message: &Message| {
        send_anyway(stream, Header { flags: flag::REPLY, ..message.header }, &message.body);
    };
    let asks = |stream: &Stream, message: &Message| send_anyway(stream, message.header, &message.body);
    let huge = |stream: &Stream, _: &Message| drop(stream.send(&[0xff; 16], &[], None));
    let half = |stream: &Stream, _: &Message| drop(stream.send(&[0, 0, 9, 0, 64], &[], None));
    let all: [&Evil; 6] = [&silent, &wrong_id, &short, &asks, &huge, &half];
    for (index, evil) in all.into_iter().enumerate() {
        let (ours, theirs) = Stream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| evil_peer(&theirs, evil));
            let backend = VfioUserBackend::from_stream(ours, "evil".into(), Duration::from_millis(300)).unwrap();
            let ends = [EventFd::new().unwrap()];
            backend.set_interrupts(InterruptKind::Request, &ends).unwrap();
            let begin = Instant::now();
            let mut bytes = [0; 4];
            assert!(matches!(backend.read(RegionIndex::Bar(0), 0, &mut bytes), Err(PciError::Gone { .. })), "{index}");
            assert!(begin.elapsed() < Duration::from_secs(5));
            wait(&ends[0]);
            assert!(matches!(backend.read(RegionIndex::Config, 0, &mut bytes), Err(PciError::Gone { .. })));
        });
    }
}

#[test]
fn memory_that_a_silent_peer_may_still_reach_is_not_called_unmapped() {
    let (ours, theirs) = Stream::pair().unwrap();
    std::thread::scope(|scope| {
        let (hold, held) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            evil_peer(&theirs, &|_, _| {
                let _ = held.recv();
            });
        });
        let backend = VfioUserBackend::from_stream(ours, "evil".into(), Duration::from_millis(300)).unwrap();
        let memory = DmaMemory::create("uhmm-test", 0x1000).unwrap();
        backend.dma_map(0x1000, &memory, DmaRight::ReadWrite).unwrap();
        assert!(matches!(backend.dma_unmap(0x1000, 0x1000), Err(PciError::Gone { .. })));
        assert!(matches!(backend.dma_unmap(0x1000, 0x1000), Err(PciError::Gone { .. })));
        // The peer wakes up, sees the end and closes: now it is harmless.
        drop(hold);
        let deadline = Instant::now() + LIMIT;
        while backend.dma_unmap(0x1000, 0x1000).is_err() {
            assert!(Instant::now() < deadline, "the peer's end was not noticed");
            std::thread::yield_now();
        }
    });
}

#[test]
fn bars_that_the_peer_may_shorten_are_not_mapped() {
    let (ours, theirs) = Stream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let machine = Machine::start(Copier::boxed()).unwrap();
            machine.connect().unwrap();
            let open_file: Fd = Arc::new(tempfile::tempfile().unwrap().into());
            while let Ok(message) = wire::receive(&theirs, None, LIMIT) {
                let header = message.header;
                let mut answer = match header.command {
                    command::VERSION => Ok(wire::version_body().into()),
                    _ => handle(&machine, message),
                };
                if let Ok(Answer { fd: Some(fd), .. }) = &mut answer {
                    *fd = Arc::clone(&open_file);
                }
                if reply(&theirs, header, answer).is_err() {
                    return;
                }
            }
        });
        let backend = VfioUserBackend::from_stream(ours, "evil".into(), LIMIT).unwrap();
        assert!(backend.region(RegionIndex::Bar(2)).is_some_and(|info| info.mappable.is_none()));
    });
}

/// A request with a plausible head and anything behind it.
fn any_request() -> impl Strategy<Value = (u16, u32, Vec<u8>, usize)> {
    let known = [0, 1, 2, 7, 32, 4096, 0x10_0000_0000, 0x5_0000_0020, 0x1_0000_0002, u64::MAX, u64::MAX - 4095];
    let field = prop_oneof![4 => prop::sample::select(known.to_vec()), 1 => any::<u64>()];
    let body = prop::collection::vec(field, 0..8)
        .prop_map(|fields| fields.iter().flat_map(|field| field.to_le_bytes()).collect::<Vec<u8>>());
    (0u16..16, prop_oneof![9 => Just(0u32), 1 => Just(flag::NO_REPLY)], body, 0usize..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn hostile_requests_neither_crash_nor_stall_the_server(
        requests in prop::collection::vec(any_request(), 1..40),
        tail in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let machine = Machine::start(Copier::boxed()).unwrap();
        let stream = connect(&machine);
        let memory = memfd::create_sealed("uhmm-test", PAGE_SIZE).unwrap();
        let call = |header: Header, body: &[u8], fd_count: usize| {
            let fds = vec![memory.as_fd(); fd_count];
            wire::send(&stream, header, body, &fds, LIMIT).unwrap();
            (header.flags == 0).then(|| wire::receive(&stream, Some(LIMIT), LIMIT).unwrap())
        };
        call(Header { command: command::VERSION, ..Header::default() }, &wire::version_body(), 0);
        for (index, (command, flags, body, fd_count)) in requests.iter().enumerate() {
            let header = Header { id: index as u16, command: *command, flags: *flags, errno: 0 };
            if let Some(reply) = call(header, body, *fd_count) {
                prop_assert_eq!((reply.header.id, reply.header.command), (header.id, header.command));
            }
        }
        // Then noise: it may answer or close, and the next driver is served.
        if !tail.is_empty() {
            prop_assert_eq!(stream.send(&tail, &[], None).unwrap(), StreamStatus::Done);
        }
        drop(stream);
        prop_assert_eq!(open(&machine, LIMIT).id().unwrap(), (0x1234, 1));
    }
}

#[test]
fn what_comes_before_the_version_or_asks_for_too_much_is_refused() {
    let machine = Machine::start(Copier::boxed()).unwrap();
    let stream = connect(&machine);
    let ask = |command, body: &[u8]| {
        wire::send(&stream, Header { command, ..Header::default() }, body, &[], LIMIT).unwrap();
        wire::receive(&stream, Some(LIMIT), LIMIT).unwrap().header
    };
    let refused = (flag::REPLY | flag::ERROR, Errno::INVAL.raw_os_error() as u32);
    for (command, body) in
        [(command::DEVICE_RESET, &b""[..]), (command::VERSION, b"\x05\0\0\0"), (command::VERSION, b"")]
    {
        let header = ask(command, body);
        assert_eq!((header.flags, header.errno), refused);
    }
    assert_eq!(ask(command::VERSION, &wire::version_body()).flags, flag::REPLY);
    assert_eq!(ask(command::VERSION, &wire::version_body()).errno, refused.1);
    assert_eq!(ask(99, b"").errno, Errno::OPNOTSUPP.raw_os_error() as u32);
    let mut read = GO.to_le_bytes().to_vec();
    read.extend([0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(ask(command::REGION_READ, &read).errno, refused.1, "4 GiB at once");
}
