//! Direct accesses (`Access` calls) to the soft device, with and without an aperture, against a supervisor, a pager and a mirror
//! played by the test.

use crate::common::{AT, AnyError, FIRST_FRAME, PAGE_BYTES, PAGES, REGION, SPACE, World, submit, submit_with};
use crate::{WITH_APERTURE, WITHOUT_APERTURE};
use uhmm_ipc::message::driver::{AccessOp, Call, JobRange, Reply};
use uhmm_ipc::message::{ErrorCode, mirror};

/// Pages and faults of an access.
fn accessed(reply: &Reply) -> Option<(u64, u64)> {
    if let Reply::Accessed { page_count, fault_count } = reply { Some((*page_count, *fault_count)) } else { None }
}

fn pattern(page_count: u64) -> Vec<u8> {
    (0..page_count * PAGE_BYTES).map(|i| (i % 251) as u8 ^ (i / PAGE_BYTES) as u8).collect()
}

/// One range of 200 pages: written, read, added to; revoked in between.
fn a_range_goes_through(world: &mut World) -> Result<(), AnyError> {
    world.open_queue()??;
    world.busy = 2;
    let mut bytes = pattern(200);
    assert_eq!(
        accessed(&world.access(AccessOp::Write, 3, &mut bytes)??),
        Some((200, 1)),
        "lost races are no further faults"
    );
    assert_eq!(world.ranges, [(3, 200, false); 3]);
    let mut seen = vec![0; bytes.len()];
    world.device_memory()?.read((FIRST_FRAME + 3) * PAGE_BYTES, &mut seen)?;
    assert!(seen == bytes, "the bytes are in the frames");

    let mut back = vec![0; bytes.len()];
    assert_eq!(accessed(&world.access(AccessOp::Read, 3, &mut back)??), Some((200, 0)));
    assert!(back == bytes, "the same bytes come back");

    let invalidate = mirror::Event::Invalidate {
        id: 9,
        space: SPACE,
        region: REGION,
        first_page: 100,
        page_count: 1,
        unmap: false,
        sequence: 2,
    };
    world.mirror_says(invalidate)?;
    world.turn_until("the invalidation is acknowledged", |world| world.acks == [9])?;
    back.fill(0);
    assert_eq!(accessed(&world.access(AccessOp::Read, 3, &mut back)??), Some((200, 1)), "one fault for the hole");
    assert!(back == bytes, "and nothing is lost");

    let mut before = vec![0; 2 * PAGE_BYTES as usize];
    assert_eq!(world.access(AccessOp::FetchAdd(5), 150, &mut before)??.page_count(), Some(2));
    assert!(before == bytes[147 * 4096..149 * 4096], "the words from before");
    let word = |bytes: &[u8]| u64::from_ne_bytes(std::array::from_fn(|i| bytes[4096 + 8 + i]));
    let now = world.device_memory()?.load_u64((FIRST_FRAME + 151) * PAGE_BYTES + 8)?;
    assert_eq!(now, word(&before).wrapping_add(5));
    Ok(())
}

trait PageCount {
    fn page_count(&self) -> Option<u64>;
}

impl PageCount for Reply {
    fn page_count(&self) -> Option<u64> {
        match self {
            Reply::Accessed { page_count, .. } => Some(*page_count),
            _ => None,
        }
    }
}

#[test]
fn integration_a_range_is_written_read_and_added_to_with_an_aperture() -> Result<(), AnyError> {
    let test = "access::integration_a_range_is_written_read_and_added_to_with_an_aperture";
    World::play(test, WITH_APERTURE, a_range_goes_through)
}

#[test]
fn integration_a_range_is_written_read_and_added_to_without_an_aperture() -> Result<(), AnyError> {
    let test = "access::integration_a_range_is_written_read_and_added_to_without_an_aperture";
    World::play(test, WITHOUT_APERTURE, a_range_goes_through)
}

#[test]
fn integration_a_range_is_made_exclusive_even_where_it_is_mapped_already() -> Result<(), AnyError> {
    let test = "access::integration_a_range_is_made_exclusive_even_where_it_is_mapped_already";
    World::play(test, WITHOUT_APERTURE, |world| {
        world.open_queue()??;
        world.access(AccessOp::Write, 0, &mut pattern(8))??;
        let call = Call::Access {
            space: SPACE,
            addr: AT + 2 * PAGE_BYTES,
            len_bytes: 4 * PAGE_BYTES,
            op: AccessOp::MakeExclusive,
            buffer: None,
        };
        assert_eq!(accessed(&world.call(call)??), Some((4, 1)));
        assert_eq!(world.ranges, [(0, 8, false), (2, 4, true)]);
        Ok(())
    })
}

#[test]
fn integration_bad_accesses_fail_with_the_kernels_meanings_and_name_the_address() -> Result<(), AnyError> {
    let test = "access::integration_bad_accesses_fail_with_the_kernels_meanings_and_name_the_address";
    World::play(test, WITH_APERTURE, |world| {
        let mut page = pattern(1);
        let code = |outcome: crate::common::Outcome| outcome.err().map(|error| error.code);
        assert_eq!(code(world.access(AccessOp::Read, 0, &mut page)?), Some(ErrorCode::Permission), "no queue yet");
        world.open_queue()??;
        assert_eq!(code(world.access(AccessOp::Read, 0, &mut page[..100])?), Some(ErrorCode::Invalid));
        let last = world.access(AccessOp::Read, PAGES - 1, &mut pattern(2))?;
        assert!(last.as_ref().is_err_and(|error| error.text.contains("0x700000100000")), "{last:?}");
        assert_eq!(code(last), Some(ErrorCode::Fault), "the range leaves the region");
        world.write_refused = true;
        let refused = world.access(AccessOp::Write, 9, &mut page)?;
        assert!(refused.as_ref().is_err_and(|error| error.text.contains("0x700000009000")), "{refused:?}");
        assert_eq!(code(refused), Some(ErrorCode::Permission));
        assert_eq!(accessed(&world.access(AccessOp::Read, 9, &mut page)??), Some((1, 1)));
        world.busy = u32::MAX;
        assert_eq!(code(world.access(AccessOp::Read, 20, &mut page)?), Some(ErrorCode::Busy));
        let suspended = world.send(Call::Access {
            space: SPACE,
            addr: AT + 30 * PAGE_BYTES,
            len_bytes: PAGE_BYTES,
            op: AccessOp::MakeExclusive,
            buffer: None,
        });
        let asked = world.asked.len();
        world.turn_until("the access stands on its page", |world| world.asked.len() > asked)?;
        world.mirror_says(mirror::Event::SpaceGone { space: SPACE })?;
        assert_eq!(code(world.answer(suspended)?), Some(ErrorCode::NotFound));
        Ok(())
    })
}

#[test]
fn integration_the_engine_adds_only_while_no_kernel_of_the_space_runs() -> Result<(), AnyError> {
    let test = "access::integration_the_engine_adds_only_while_no_kernel_of_the_space_runs";
    World::play(test, WITHOUT_APERTURE, |world| {
        world.open_queue()??;
        let endless = world.send(submit("atomic_add", &[AT, 1, u64::MAX]));
        world.turn_until("the kernel runs", |world| !world.asked.is_empty())?;
        let first_link = {
            let next = world.new_client_link();
            std::mem::replace(&mut world.link, next)
        };
        world.open_queue()??;
        let mut before = pattern(1);
        let contended = world.access(AccessOp::FetchAdd(1), 0, &mut before)?;
        assert_eq!(contended.err().map(|error| error.code), Some(ErrorCode::Busy));
        assert_eq!(
            world.access(AccessOp::Read, 0, &mut before)??.page_count(),
            Some(1),
            "reading needs no pause of theirs"
        );
        world.client.drop_link(first_link);
        // The kernel is cancelled with its client; the addition waits for its end.
        assert_eq!(world.access(AccessOp::FetchAdd(1), 0, &mut before)??.page_count(), Some(1));
        let word = u64::from_ne_bytes(std::array::from_fn(|i| before[i]));
        assert_eq!(world.device_memory()?.load_u64(FIRST_FRAME * PAGE_BYTES)?, word + 1);
        assert!(!world.done.contains_key(&endless));
        Ok(())
    })
}

fn pages(first: u64, count: u64, write: bool) -> JobRange {
    JobRange { addr: AT + first * PAGE_BYTES, len_bytes: count * PAGE_BYTES, write }
}

fn faults_of(reply: &Reply) -> Option<u64> {
    if let Reply::Finished { fault_count, .. } = reply { Some(*fault_count) } else { None }
}

/// A job finds there what it has named; what it may not have is no reason for it not to run.
fn ranges_come_first(world: &mut World) -> Result<(), AnyError> {
    world.open_queue()??;
    world.busy = 1;
    let args = [AT, 200 * PAGE_BYTES];
    let ranges = vec![pages(0, 150, false), pages(150, 50, false)];
    let done = world.call(submit_with("sum", &args, ranges))??;
    assert_eq!(faults_of(&done), Some(0));
    assert_eq!(
        world.ranges,
        [(0, 150, false), (0, 150, false), (150, 50, false)],
        "asked for as ranges, one after the other"
    );
    world.ranges.clear();
    let asked = world.asked.len();
    assert_eq!(faults_of(&world.call(submit_with("sum", &args, vec![pages(0, 200, false)]))??), Some(0));
    assert_eq!(world.asked.len(), asked, "all of it is there");

    world.write_refused = true;
    let behind = PAGES * PAGE_BYTES + AT;
    let ranges = vec![pages(210, 10, true), JobRange { addr: behind, ..pages(0, 4, false) }];
    let done = world.call(submit_with("sum", &[AT + 210 * PAGE_BYTES, PAGE_BYTES], ranges))??;
    assert!(faults_of(&done).is_some_and(|count| count > 0), "it reads what it may read: {done:?}");
    let writes = world.call(submit_with("fill", &[AT + 230 * PAGE_BYTES, PAGE_BYTES, 1], vec![pages(230, 1, true)]))?;
    assert_eq!(
        writes.map_err(|error| error.code).err(),
        Some(ErrorCode::Permission),
        "and fails where it may not write"
    );
    world.write_refused = false;

    for bad in [JobRange { addr: AT + 1, ..pages(0, 1, false) }, JobRange { len_bytes: 0, ..pages(0, 1, false) }] {
        let refused = world.call(submit_with("sum", &args, vec![bad]))?;
        assert_eq!(refused.map_err(|error| error.code).err(), Some(ErrorCode::Invalid), "{bad:?}");
    }
    // One that waits for its range ends with its space, and has not begun.
    world.busy = u32::MAX;
    let waits = world.send(submit_with("fill", &[AT, PAGE_BYTES, 7], vec![pages(240, 1, true)]));
    let asked = world.asked.len();
    world.turn_until("its range is asked for", |world| world.asked.len() > asked)?;
    world.mirror_says(mirror::Event::SpaceGone { space: SPACE })?;
    assert_eq!(world.answer(waits)?.map_err(|error| error.code).err(), Some(ErrorCode::NotFound));
    Ok(())
}

#[test]
fn integration_a_job_finds_its_ranges_there_with_an_aperture() -> Result<(), AnyError> {
    World::play("access::integration_a_job_finds_its_ranges_there_with_an_aperture", WITH_APERTURE, ranges_come_first)
}

#[test]
fn integration_a_job_finds_its_ranges_there_without_an_aperture() -> Result<(), AnyError> {
    let test = "access::integration_a_job_finds_its_ranges_there_without_an_aperture";
    World::play(test, WITHOUT_APERTURE, ranges_come_first)
}
