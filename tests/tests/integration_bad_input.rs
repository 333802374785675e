//! Bad input and hostile peers, through a raw client: each is refused with a clear error, costs only itself, and a good client
//! on the same system goes on.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use uhmm_ipc::message::{Aperture, Call, ErrorCode, Fd, Interface, Reply, Role, TraceId, WireError, pager};
use uhmm_ipc::{Endpoint, Identity, Limits, LinkId, Reactor, Wake};
use uhmm_kernel_hook::{ManagedMapping, SeqPacket, Userfaultfd, Window, memfd};
use uhmm_sdk::{Job, Session};
use uhmm_tests::{TestBed, pattern::word};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

/// A client that says whatever the test wants.
struct Raw {
    reactor: Reactor,
    link: LinkId,
}

impl Raw {
    fn connect(bed: &TestBed, role: Role) -> Self {
        let mut reactor = Reactor::new(Identity {
            name: "raw".to_owned(),
            role,
            incarnation: 0,
            interface: None,
            limits: Limits::default(),
        })
        .expect("reactor");
        let path = bed.run_dir().join("pager.sock");
        let link = reactor.link(Endpoint { path, interface: Interface::Pager, key: Vec::new() });
        Self { reactor, link }
    }

    /// A raw client with a space of its own; the descriptor must stay open.
    fn with_space(bed: &TestBed) -> (Self, Userfaultfd, u64) {
        let mut raw = Self::connect(bed, Role::Client);
        let (uffd, _) = Userfaultfd::create(None).expect("userfaultfd");
        let sent: Fd = Arc::new(uffd.try_clone_fd().expect("dup"));
        // The page stays mapped for the rest of the test.
        let sentinel = std::mem::ManuallyDrop::new(Window::anonymous(PAGE).expect("page"));
        let opened = raw.ask(open_space(sent, sentinel.addr())).expect("a space");
        let pager::Reply::SpaceOpened { space, .. } = opened else { panic!("{opened:?}") };
        (raw, uffd, space)
    }

    fn ask(&mut self, call: pager::Call) -> Result<pager::Reply, WireError> {
        let id = self.reactor.call(self.link, Call::Pager(call), TraceId::default(), Some(Duration::from_secs(10)));
        let mut wakes = Vec::new();
        loop {
            self.reactor.poll(None, &mut wakes).expect("poll");
            for wake in wakes.drain(..) {
                if let Wake::Done { call, result, .. } = wake
                    && call == id
                {
                    return result.map(|reply| match reply {
                        Reply::Pager(reply) => reply,
                        other => panic!("{other:?}"),
                    });
                }
            }
        }
    }

    fn refused(&mut self, call: pager::Call, code: ErrorCode, names: &str) {
        let shown = format!("{call:?}");
        let error = self.ask(call).expect_err(&shown);
        assert_eq!(error.code, code, "{shown}: {error}");
        assert!(error.text.contains(names), "{shown}: {:?} does not name {names:?}", error.text);
    }
}

fn region_memory(len_bytes: u64) -> (ManagedMapping, Fd) {
    let memory = memfd::create_sealed("uhmm-test", len_bytes).expect("memfd");
    let mapping = ManagedMapping::map(memory.as_fd(), len_bytes, None).expect("map");
    (mapping, Arc::new(memory))
}

fn dev_null() -> Fd {
    Arc::new(OwnedFd::from(std::fs::File::open("/dev/null").expect("/dev/null")))
}

/// The system still does its main job for somebody else.
fn good_client_works(bed: &TestBed) {
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    let region = session.allocate(MIB).expect("region");
    for index in 0..MIB / 8 {
        region.write_u64(index * 8, word(3, index)).expect("write");
    }
    assert!(session.migrate(region.addr(), MIB, &device).expect("migrate").complete());
    let sum = (0..MIB / 8).fold(0u64, |sum, index| sum.wrapping_add(word(3, index)));
    assert_eq!(device.run(Job::new("sum", [region.addr(), MIB]).idempotent()).expect("sum").results, [sum]);
}

/// The first call of a client, with agent memory that is in order.
fn open_space(uffd: Fd, sentinel_addr: u64) -> pager::Call {
    let maps = uhmm_kernel_hook::procmap::open_own_maps().expect("maps");
    let memory = |name: &str, len_bytes| -> Fd { Arc::new(memfd::create_sealed(name, len_bytes).expect("memfd")) };
    let (maps, pagemap) = (Arc::new(maps), Arc::new(uhmm_kernel_hook::pagemap::open_own_pagemap().expect("pagemap")));
    let staging = memory("uhmm-test-staging", uhmm_kernel_hook::agent::STAGING_BYTES);
    let orders = memory("uhmm-test-orders", uhmm_kernel_hook::agent::ORDERS_BYTES);
    let done: Fd = Arc::new(uhmm_kernel_hook::EventFd::new().expect("eventfd").into_fd());
    let agent = pager::AgentMemory { maps: maps.clone(), smaps: maps, pagemap, staging, orders, done, agent: None };
    pager::Call::OpenSpace { nonce: 1, uffd, full: true, sentinel_addr, agent, claim: Vec::new() }
}

#[test]
fn integration_ranges_that_are_unaligned_empty_wrapping_or_unmapped_are_refused() {
    let bed = TestBed::start("16MiB");
    let (mut raw, _uffd, _) = Raw::with_space(&bed);
    let (mapping, memory) = region_memory(4 * PAGE);
    let create = |addr, len_bytes| pager::Call::CreateRegion { addr, len_bytes, memory: memory.clone() };
    raw.refused(create(mapping.addr() + 8, 4 * PAGE), ErrorCode::Invalid, "not a multiple");
    raw.refused(create(mapping.addr(), 4 * PAGE - 8), ErrorCode::Invalid, "not a multiple");
    raw.refused(create(mapping.addr(), 0), ErrorCode::Invalid, "mpty");
    raw.refused(create(u64::MAX - PAGE + 1, 4 * PAGE), ErrorCode::Invalid, "wrap");
    raw.refused(create(PAGE, 4 * PAGE), ErrorCode::Fault, "0x1000");
    raw.ask(create(mapping.addr(), 4 * PAGE)).expect("the honest range");
    let migrate = |addr, len_bytes| pager::Call::Migrate {
        addr,
        len_bytes,
        target: pager::Target::Device(0),
        prefetch: false,
        only: pager::Only::All,
    };
    raw.refused(migrate(mapping.addr() + 1, PAGE), ErrorCode::Invalid, "aligned");
    raw.refused(migrate(mapping.addr(), PAGE + 1), ErrorCode::Invalid, "aligned");
    raw.refused(migrate(mapping.addr(), 0), ErrorCode::Invalid, "empty");
    raw.refused(migrate(mapping.addr(), u64::MAX - PAGE + 1), ErrorCode::Invalid, "wraps");
    raw.refused(migrate(mapping.addr(), 5 * PAGE), ErrorCode::Invalid, "leaves its region");
    raw.refused(migrate(PAGE, PAGE), ErrorCode::Fault, "0x1000");
    let elsewhere = pager::Call::Migrate {
        addr: mapping.addr(),
        len_bytes: PAGE,
        target: pager::Target::Device(7),
        prefetch: false,
        only: pager::Only::All,
    };
    raw.refused(elsewhere, ErrorCode::NotFound, "Device 7");
    good_client_works(&bed);
}

#[test]
fn integration_a_client_that_lies_about_its_memory_is_refused() {
    let bed = TestBed::start("16MiB");
    let (mut raw, _uffd, _) = Raw::with_space(&bed);
    let (mapping, memory) = region_memory(4 * PAGE);
    let (_other_mapping, other) = region_memory(4 * PAGE);
    let (_long_mapping, long) = region_memory(8 * PAGE);
    let unsealed = tempfile::tempfile().expect("file");
    unsealed.set_len(4 * PAGE).expect("length");
    let create = |memory: Fd| pager::Call::CreateRegion { addr: mapping.addr(), len_bytes: 4 * PAGE, memory };
    raw.refused(create(Arc::new(unsealed.into())), ErrorCode::Invalid, "seal");
    // A kernel without huge pages cannot make one: nor can a client there.
    if let Ok(huge) = uhmm_kernel_hook::huge_pool::sealed_huge_memfd(2 * MIB) {
        let call = pager::Call::CreateRegion { addr: mapping.addr(), len_bytes: 2 * MIB, memory: Arc::new(huge) };
        raw.refused(call, ErrorCode::Invalid, "hugetlb");
    }
    raw.refused(create(dev_null()), ErrorCode::Invalid, "memfd");
    raw.refused(create(long), ErrorCode::Invalid, "32768");
    raw.refused(create(other), ErrorCode::Fault, "another file");
    raw.ask(create(memory.clone())).expect("the truth");
    let inside = pager::Call::CreateRegion { addr: mapping.addr() + PAGE, len_bytes: 2 * PAGE, memory };
    raw.refused(inside, ErrorCode::Invalid, "overlaps");
    good_client_works(&bed);
}

#[test]
fn integration_a_descriptor_that_is_no_userfaultfd_is_refused() {
    let bed = TestBed::start("16MiB");
    let mut raw = Raw::connect(&bed, Role::Client);
    raw.refused(open_space(dev_null(), 0), ErrorCode::Invalid, "userfaultfd");
    good_client_works(&bed);
}

#[test]
fn integration_a_foreign_region_or_space_is_refused() {
    let bed = TestBed::start("16MiB");
    let owner = Session::connect(Some(bed.run_dir())).expect("session");
    let region = owner.allocate(MIB).expect("region");
    region.write_u64(0, 42).expect("write");
    let (mut raw, _uffd, space) = Raw::with_space(&bed);
    assert_ne!(space, owner.space());
    raw.refused(pager::Call::FreeRegion { region: region.id() }, ErrorCode::Permission, "another process");
    raw.refused(pager::Call::FreeRegion { region: 9999 }, ErrorCode::NotFound, "9999");
    let migrate = pager::Call::Migrate {
        addr: region.addr(),
        len_bytes: MIB,
        target: pager::Target::Device(0),
        prefetch: false,
        only: pager::Only::All,
    };
    raw.refused(migrate, ErrorCode::Fault, "no region of this process");
    let attach = pager::Call::AttachSpace { space: owner.space(), token: vec![0; 16], agent: None };
    raw.refused(attach, ErrorCode::Permission, "token");
    assert_eq!(region.read_u64(0).expect("read"), 42);
    good_client_works(&bed);
}

#[test]
fn integration_calls_out_of_turn_or_out_of_role_are_refused() {
    let bed = TestBed::start("16MiB");
    let mut raw = Raw::connect(&bed, Role::Client);
    raw.refused(pager::Call::CloseSpace, ErrorCode::Permission, "Open or attach a space");
    raw.refused(pager::Call::ListRegions, ErrorCode::Permission, "Client");
    raw.refused(pager::Call::MirrorLogin, ErrorCode::Permission, "Client");
    let login = pager::Call::DriverLogin {
        device: 0,
        generation: 1,
        frame_count: 1,
        aperture: Some(Aperture { fd: dev_null(), offset_bytes: 0 }),
        gate: None,
        copy_ring: None,
    };
    raw.refused(login, ErrorCode::Permission, "Client");
    let resolve = pager::Call::Resolve {
        space: 1,
        region: 1,
        first_page: 0,
        page_count: 1,
        fault_page: 0,
        device: 0,
        write: true,
        whole: false,
        exclusive: false,
    };
    raw.refused(resolve, ErrorCode::Permission, "Client");
    // A service role without the channel's key does not even get a connection.
    let mut service = Raw::connect(&bed, Role::Driver);
    let error = service.ask(pager::Call::ListRegions).expect_err("no key");
    assert!(matches!(error.code, ErrorCode::Permission | ErrorCode::TimedOut), "{error}");
    good_client_works(&bed);
}

#[test]
fn integration_malformed_messages_cost_only_their_own_connection() {
    let bed = TestBed::start("16MiB");
    let session = bed.session();
    let region = session.allocate(MIB).expect("region");
    region.write_u64(8, 7).expect("write");
    for socket in ["supervisor.sock", "pager.sock", "mirror.sock", "driver-soft0.sock"] {
        let path = bed.run_dir().join(socket);
        let garbage: [&[u8]; 5] = [&[0], &[0xff; 64], &[0; 4096], b"GET / HTTP/1.1\r\n\r\n", &[0x41; 100_000]];
        for bytes in garbage {
            let peer = SeqPacket::connect(&path).expect("connect");
            // The service may close before it has read everything: that is its right.
            let _ = peer.send(bytes, &[]);
            let null = std::fs::File::open("/dev/null").expect("/dev/null");
            let _ = peer.send(bytes, &[null.as_fd(); 64]);
        }
    }
    let device = session.device("soft0").expect("device");
    assert!(session.migrate(region.addr(), MIB, &device).expect("migrate").complete());
    assert_eq!(region.read_u64(8).expect("read"), 7);
    let services = bed.operator().status().expect("status");
    assert!(services.iter().all(|service| service.incarnation == 1), "somebody died of garbage: {services:#?}");
    good_client_works(&bed);
}

#[test]
fn integration_jobs_with_bad_arguments_are_refused_by_name() {
    let bed = TestBed::start("16MiB");
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    let refused = |job: Job, code: ErrorCode, names: &str| {
        let error = device.run(job).expect_err(names);
        assert_eq!(error.code(), code, "{error}");
        assert!(error.to_string().contains(names), "{error} does not name {names}");
    };
    refused(Job::new("warp", [1u64]), ErrorCode::NotFound, "warp");
    refused(Job::new("sum", [1u64]), ErrorCode::Invalid, "sum");
    refused(Job::new("sum", [PAGE, PAGE]), ErrorCode::Fault, "0x1000");
    refused(Job::new("sum", [u64::MAX - 7, 16]), ErrorCode::Fault, "0xffff");
    assert!(session.device("nobody").is_err());
    assert!(session.allocate(0).is_err() && session.allocate(PAGE + 1).is_err());
    good_client_works(&bed);
}

#[test]
fn integration_a_session_can_be_dropped_after_its_system_ended() {
    let mut bed = TestBed::start("16MiB");
    let session = bed.session();
    let region = session.allocate(MIB).expect("region");
    region.write_u64(0, 7).expect("write");
    bed.stop();
    let (told, ended) = std::sync::mpsc::channel();
    let dropper = std::thread::spawn(move || {
        drop(region);
        drop(session);
        told.send(()).expect("the test waits");
    });
    // A region is given up after ten seconds.
    ended.recv_timeout(std::time::Duration::from_secs(40)).expect("both are dropped");
    dropper.join().expect("no panic");
}

/// Programs in containers are shown sockets of pager and drivers, the same ones that operators use, and never the supervisor's.
#[test]
fn integration_who_is_shown_clients_sockets_alone_is_no_operator() {
    let bed = TestBed::start("16MiB");
    let empty = || pager::Call::EmptyDevice { device: 0, then: pager::Emptied::Closed };
    let claim = pager::Claim { id: "mine".to_owned(), token: vec![7; 32], ..pager::Claim::default() };
    for call in [empty(), pager::Call::ListRegions, pager::Call::SetClaim(claim.clone())] {
        Raw::connect(&bed, Role::Operator).refused(call, ErrorCode::Permission, "no operator");
    }
    // Nor does a client become one by asking for more.
    Raw::connect(&bed, Role::Client).refused(pager::Call::SetClaim(claim), ErrorCode::Permission, "Client");
    assert!(bed.operator().claims().expect("claims").claims.is_empty());
    // Who may come to the supervisor is one, also of the next pager and of the one after that.
    for _ in 0..2 {
        assert_eq!(bed.operator().regions().expect("regions"), []);
        let killed = bed.kill("pager");
        bed.wait_ready("pager", killed);
    }
    good_client_works(&bed);
}
