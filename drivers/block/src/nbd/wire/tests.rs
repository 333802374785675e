//! Dialogues with servers that keep to the protocol, and with all kinds that do not.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

#[derive(Default, Debug, PartialEq)]
struct Heard {
    export: Option<Export>,
    /// Of each read: how often each byte has come, and the bytes.
    reads: HashMap<u64, Vec<(u32, u8)>>,
    ended: Vec<(u64, Result<(), ServerErrno>)>,
}

impl Heard {
    fn put(&mut self, id: u64, at: u32, bytes: impl Iterator<Item = u8>) {
        let read = self.reads.entry(id).or_insert_with(|| vec![(0, 0); LEN as usize]);
        for (place, byte) in read[at as usize..].iter_mut().zip(bytes) {
            *place = (place.0 + 1, byte);
        }
    }
}

impl Sink for Heard {
    fn ready(&mut self, export: Export) {
        assert!(self.export.replace(export).is_none(), "ready twice");
    }

    fn data(&mut self, id: u64, at: u32, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= LEN as usize, "beyond what was asked for");
        self.put(id, at, bytes.iter().copied());
    }

    fn zeroes(&mut self, id: u64, at: u32, len: u32) {
        assert!(at + len <= LEN, "beyond what was asked for");
        self.put(id, at, std::iter::repeat_n(0, len as usize));
    }

    fn ended(&mut self, id: u64, result: Result<(), ServerErrno>) {
        // What is whole is whole.
        if let (Ok(()), Some(read)) = (&result, self.reads.get(&id)) {
            assert!(read.iter().all(|(times, _)| *times == 1), "a byte came never or twice");
        }
        self.ended.push((id, result));
    }
}

const LEN: u32 = 8192;
const OFFSET: u64 = 1 << 20;

fn joined(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn greeting() -> Vec<u8> {
    joined(&[b"NBDMAGIC", b"IHAVEOPT", &[0, 3]])
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let words: Vec<u8> = [option, kind, data.len() as u32].iter().flat_map(|word| word.to_be_bytes()).collect();
    joined(&[&REPLY_MAGIC.to_be_bytes(), &words, data])
}

fn export_info(flags: u16) -> Vec<u8> {
    reply(OPTION_GO, REP_INFO, &joined(&[&[0, 0], &(64u64 << 20).to_be_bytes(), &flags.to_be_bytes()]))
}

fn block_info(min: u32, max: u32) -> Vec<u8> {
    let words: Vec<u8> = [min, 4096, max].iter().flat_map(|word| word.to_be_bytes()).collect();
    reply(OPTION_GO, REP_INFO, &joined(&[&[0, 3], &words]))
}

fn chunk(flags: u16, kind: u16, id: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = CHUNK_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&id.to_be_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn data_chunk(flags: u16, id: u64, at: u64, len: u32) -> Vec<u8> {
    let data: Vec<u8> = (0..len).map(|byte| byte as u8 ^ 0x5a).collect();
    chunk(flags, CHUNK_DATA, id, &joined(&[&(OFFSET + at).to_be_bytes(), &data]))
}

fn hole(flags: u16, id: u64, at: u64, len: u32) -> Vec<u8> {
    chunk(flags, CHUNK_HOLE, id, &joined(&[&(OFFSET + at).to_be_bytes(), &len.to_be_bytes()]))
}

fn simple(id: u64, errno: u32) -> Vec<u8> {
    joined(&[&SIMPLE_MAGIC.to_be_bytes(), &errno.to_be_bytes(), &id.to_be_bytes()])
}

/// A server with everything, up to where commands begin.
fn hello() -> Vec<u8> {
    joined(&[
        &greeting(),
        &reply(OPTION_STRUCTURED, REP_ACK, &[]),
        &export_info(0b1_0010_1101),
        &block_info(512, 1 << 20),
        &reply(OPTION_GO, REP_INFO, &[0, 1, b'x']),
        &reply(OPTION_GO, REP_ACK, &[]),
    ])
}

fn ready(structured: bool) -> (Wire, Heard) {
    let (mut wire, mut heard) = (Wire::new("far"), Heard::default());
    let begin = if structured {
        hello()
    } else {
        joined(&[
            &greeting(),
            &reply(OPTION_STRUCTURED, REP_ERROR | 1, b"no"),
            &export_info(1),
            &reply(OPTION_GO, REP_ACK, &[]),
        ])
    };
    wire.receive(&begin, &mut heard).expect("a server as it should be");
    wire.output().clear();
    (wire, heard)
}

fn read(wire: &mut Wire, id: u64) {
    wire.command(Command { id, kind: Kind::Read, offset: OFFSET, len: LEN });
}

#[test]
fn negotiation_comes_to_what_the_server_offers_however_its_bytes_are_cut() {
    for step in [1, 2, 7, 19, 1000] {
        let (mut wire, mut heard) = (Wire::new("far"), Heard::default());
        for bytes in hello().chunks(step) {
            wire.receive(bytes, &mut heard).unwrap();
        }
        let expected = Export {
            size: 64 << 20,
            read_only: false,
            flush: true,
            fua: true,
            trim: true,
            multi_conn: true,
            structured: true,
            block_min: 512,
            payload_max: 1 << 20,
        };
        assert_eq!(heard.export, Some(expected), "in steps of {step}");
        let said = wire.output().clone();
        assert_eq!(said[..4], [0, 0, 0, 3], "fixed newstyle, no zeroes");
        assert_eq!(said[4..20], joined(&[b"IHAVEOPT", &[0, 0, 0, 8, 0, 0, 0, 0]]));
        assert_eq!(said[20..], joined(&[b"IHAVEOPT", &[0, 0, 0, 7, 0, 0, 0, 11, 0, 0, 0, 3], b"far", &[0, 1, 0, 3]]));
    }
}

#[test]
fn a_command_is_what_the_protocol_says() {
    let (mut wire, _) = ready(true);
    wire.command(Command { id: 0x0102, kind: Kind::Write { fua: true }, offset: 0x1000, len: 2 });
    wire.output().extend_from_slice(&[7, 8]);
    let expected = joined(&[
        &[0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1],
        &[0, 0, 0, 0, 0, 0, 1, 2],
        &[0, 0, 0, 0, 0, 0, 0x10, 0],
        &[0, 0, 0, 2, 7, 8],
    ]);
    assert_eq!((wire.output().clone(), wire.in_flight()), (expected, 1));
}

#[test]
fn servers_that_are_none_and_refusals_are_told_apart() {
    let said = |bytes: &[u8]| {
        let error = Wire::new("far").receive(bytes, &mut Heard::default()).unwrap_err();
        error.to_string()
    };
    assert!(said(b"SSH-2.0-OpenSSH_9.2p1 Debian").contains("no NBD server"));
    assert!(said(&joined(&[b"NBDMAGIC", &OLD_MAGIC.to_be_bytes(), &[0, 0]])).contains("oldstyle"));
    assert!(said(&joined(&[b"NBDMAGIC", b"IHAVEOPT", &[0, 0]])).contains("fixed newstyle"));
    let begin = joined(&[&greeting(), &reply(OPTION_STRUCTURED, REP_ACK, &[])]);
    let refused = |kind: u32, text: &[u8]| said(&joined(&[&begin, &reply(OPTION_GO, REP_ERROR | kind, text)]));
    assert_eq!(
        refused(6, b"only \x1b\"disk\"\n here"),
        "it refuses export \"far\": it has no export of that name (\"only \\\"disk\\\" here\")"
    );
    assert!(refused(5, b"").contains("TLS") && refused(1, b"").contains("NBD_OPT_GO"));
    assert!(said(&joined(&[&begin, &reply(OPTION_GO, REP_ACK, &[])])).contains("without a size"));
    assert!(said(&joined(&[&begin, &block_info(3, 4096)])).contains("cannot be"));
    assert!(said(&joined(&[&begin, &reply(OPTION_GO, REP_INFO, &[0, 0, 1])])).contains("wrong length"));
    assert!(said(&joined(&[&begin, &reply(OPTION_STRUCTURED, REP_ACK, &[])])).contains("nobody asked for"));
    let endless = joined(&[&begin, &export_info(1).repeat(100)]);
    assert!(said(&endless).contains("does not stop"));
    let mut long = reply(OPTION_GO, REP_INFO, &[]);
    long[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(said(&joined(&[&begin, &long])).contains("too long"));
}

#[test]
fn a_read_may_come_in_any_order_in_parts_and_holes() {
    let (mut wire, mut heard) = ready(true);
    read(&mut wire, 1);
    read(&mut wire, 2);
    let answers = joined(&[
        &data_chunk(0, 2, 4096, 4096),
        &hole(0, 1, 0, 100),
        &data_chunk(0, 1, 100, 8000),
        &hole(1, 2, 0, 4096),
        &hole(0, 1, 8100, 92),
        &chunk(1, CHUNK_NONE, 1, &[]),
    ]);
    for bytes in answers.chunks(777) {
        wire.receive(bytes, &mut heard).unwrap();
    }
    assert_eq!(heard.ended, [(2, Ok(())), (1, Ok(()))]);
    let first = &heard.reads[&1];
    assert_eq!((first[99].1, first[100].1, first[101].1), (0, 0x5a, 1 ^ 0x5a));
    assert_eq!(wire.in_flight(), 0);
}

#[test]
fn errors_end_their_request_alone() {
    let (mut wire, mut heard) = ready(true);
    (1..4).for_each(|id| read(&mut wire, id));
    wire.command(Command { id: 4, kind: Kind::Trim, offset: 0, len: 4096 });
    let error = |errno: u32, text: &[u8]| joined(&[&errno.to_be_bytes(), &(text.len() as u16).to_be_bytes(), text]);
    let answers = joined(&[
        &data_chunk(0, 1, 0, 4096),
        &chunk(1, CHUNK_IS_ERROR | 1, 1, &error(5, b"bad sector")),
        &chunk(0, CHUNK_ERROR_AT, 2, &joined(&[&error(28, b""), &OFFSET.to_be_bytes()])),
        &chunk(1, CHUNK_NONE, 2, &[]),
        &simple(3, 108),
        &simple(4, 22),
    ]);
    wire.receive(&answers, &mut heard).unwrap();
    let expected = [(1, 5), (2, 28), (3, 108), (4, 22)].map(|(id, errno)| (id, Err(ServerErrno(errno))));
    assert_eq!(heard.ended, expected);
    assert!(ServerErrno(108).is_shutdown() && ServerErrno(5).to_string().contains("EIO"));
}

#[test]
fn simple_replies_where_the_server_has_no_others() {
    let (mut wire, mut heard) = ready(false);
    read(&mut wire, 9);
    wire.command(Command { id: 8, kind: Kind::Write { fua: false }, offset: 0, len: 4096 });
    let data = vec![3; LEN as usize];
    wire.receive(&joined(&[&simple(8, 0), &simple(9, 0), &data]), &mut heard).unwrap();
    assert_eq!(heard.ended, [(8, Ok(())), (9, Ok(()))]);
    assert!(heard.reads[&9].iter().all(|byte| *byte == (1, 3)));
}

#[test]
fn whatever_breaks_the_protocol_ends_the_connection_for_good() {
    let error = |errno: u32| joined(&[&errno.to_be_bytes(), &[0, 0]]);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("magic", vec![0; 16]),
        ("an answer to nothing", simple(5, 0)),
        ("a chunk of nothing", chunk(1, CHUNK_NONE, 5, &[])),
        ("a simple reply to a read", simple(1, 0)),
        ("data in front", chunk(1, CHUNK_DATA, 1, &joined(&[&(OFFSET - 1).to_be_bytes(), &[0; 8]]))),
        ("data behind", data_chunk(1, 1, u64::from(LEN) - 1, 2)),
        ("data far behind", data_chunk(1, 1, 1 << 40, 2)),
        ("data twice", joined(&[&data_chunk(0, 1, 0, 10), &data_chunk(0, 1, 9, 10)])),
        ("a hole twice", joined(&[&hole(0, 1, 0, 10), &hole(0, 1, 0, 10)])),
        ("a hole of nothing", hole(0, 1, 0, 0)),
        ("a hole that wraps", hole(0, 1, 10, u32::MAX)),
        ("no data", chunk(1, CHUNK_DATA, 1, &OFFSET.to_be_bytes())),
        ("an end too early", chunk(1, CHUNK_NONE, 1, &[])),
        ("an end with data missing", data_chunk(1, 1, 0, LEN - 1)),
        ("an end that is not the last", chunk(0, CHUNK_NONE, 1, &[])),
        ("an unknown kind", chunk(1, 9, 1, &[])),
        ("data for a write", chunk(1, CHUNK_DATA, 2, &joined(&[&OFFSET.to_be_bytes(), &[0; 8]]))),
        ("an error without a number", chunk(1, CHUNK_IS_ERROR | 1, 1, &[0])),
        ("an error that is none", chunk(1, CHUNK_IS_ERROR | 1, 1, &error(0))),
        ("an error that is longer than it is", chunk(1, CHUNK_IS_ERROR | 1, 1, &[0, 0, 0, 5, 0, 9])),
    ];
    for (what, bytes) in cases {
        let (mut wire, mut heard) = ready(true);
        read(&mut wire, 1);
        wire.command(Command { id: 2, kind: Kind::Write { fua: false }, offset: OFFSET, len: 4096 });
        let mut said = wire.receive(&bytes, &mut heard);
        if said.is_ok() {
            // Some of these are seen with the next byte.
            said = wire.receive(&[0; 64], &mut heard);
        }
        let error = said.expect_err(what);
        assert!(matches!(error, WireError::Broken(_)), "{what}: {error}");
        assert!(heard.ended.is_empty(), "{what}: {:?}", heard.ended);
        assert_eq!(wire.receive(&simple(2, 0), &mut heard), Err(error), "{what}");
    }
    let (mut wire, mut heard) = ready(false);
    read(&mut wire, 1);
    assert!(wire.receive(&hole(1, 1, 0, LEN), &mut heard).is_err(), "chunks that were not agreed");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Any damage, any cut: no panic, no byte twice, nothing whole that is not (the sink asserts it), and never more memory than a reply's bound.
    #[test]
    fn a_damaged_dialogue_is_noticed_or_harmless(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        structured: bool,
        step in 1usize..3000,
    ) {
        let (mut wire, mut heard) = ready(structured);
        read(&mut wire, 1);
        read(&mut wire, 2);
        wire.command(Command { id: 3, kind: Kind::Write { fua: false }, offset: OFFSET, len: 4096 });
        let mut bytes = if structured {
            joined(&[
                &data_chunk(0, 1, 4096, 4096), &simple(3, 0), &hole(0, 2, 0, LEN), &data_chunk(1, 1, 0, 4096),
                &chunk(1, CHUNK_NONE, 2, &[]),
            ])
        } else {
            let data = vec![1; LEN as usize];
            joined(&[&simple(3, 0), &simple(2, 0), &data, &simple(1, 0), &data])
        };
        for (at, byte) in &damage {
            let at = at.index(bytes.len());
            bytes[at] ^= byte;
        }
        for part in bytes.chunks(step) {
            if wire.receive(part, &mut heard).is_err() {
                break;
            }
            prop_assert!(wire.held.len() <= TEXT_MAX + 20);
        }
        let mut ended: Vec<u64> = heard.ended.iter().map(|(id, _)| *id).collect();
        ended.sort_unstable();
        ended.dedup();
        prop_assert_eq!(ended.len(), heard.ended.len(), "each ends once");
    }

    /// Bytes that are nothing at all.
    #[test]
    fn noise_is_no_server(bytes in prop::collection::vec(any::<u8>(), 0..300), behind_hello: bool) {
        let (mut wire, mut heard) = if behind_hello { ready(true) } else { (Wire::new(""), Heard::default()) };
        drop(wire.receive(&bytes, &mut heard));
        prop_assert!(heard.ended.is_empty());
    }
}
