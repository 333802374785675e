//! The whole soft driver service over real sockets, threads and shared memory, against a supervisor, a pager and a mirror
//! played by the test.

mod access;
mod common;

use std::os::fd::AsFd;

use common::{AT, AnyError, FIRST_FRAME, PAGE_BYTES, PAGES, SPACE, World, submit};
use uhmm_ipc::message::{ErrorCode, driver, mirror};
use uhmm_ipc::shared::table::Table;
use uhmm_kernel_hook::memfd;

const WITH_APERTURE: &str = include_str!("aperture.toml");
const WITHOUT_APERTURE: &str = include_str!("no_aperture.toml");

fn finished(reply: driver::Reply) -> Result<(Vec<u64>, u64), AnyError> {
    match reply {
        driver::Reply::Finished { results, fault_count, .. } => Ok((results, fault_count)),
        other => Err(format!("Not a job's end: {other:?}").into()),
    }
}

fn invalidate(id: u64, first_page: u64, page_count: u64, unmap: bool) -> mirror::Event {
    mirror::Event::Invalidate { id, space: SPACE, region: common::REGION, first_page, page_count, unmap, sequence: 2 }
}

#[test]
fn integration_a_job_faults_its_pages_in_and_its_bytes_are_in_device_memory() -> Result<(), AnyError> {
    World::play("integration_a_job_faults_its_pages_in_and_its_bytes_are_in_device_memory", WITH_APERTURE, |world| {
        world.open_queue()??;
        world.busy = 3;
        let (results, fault_count) = finished(world.submit("fill", &[AT + 100, 3 * PAGE_BYTES, 0x5a])??)?;
        assert_eq!(results, [0_u64; 0]);
        assert!((1..=4).contains(&fault_count), "{fault_count} faults for four pages of one window");
        let aperture = world.aperture()?;
        let base = FIRST_FRAME * PAGE_BYTES;
        let byte = |offset: u64| aperture.load_u8(base + offset);
        assert_eq!(
            [byte(99)?, byte(100)?, byte(99 + 3 * PAGE_BYTES)?, byte(100 + 3 * PAGE_BYTES)?],
            [0, 0x5a, 0x5a, 0]
        );
        assert_eq!(world.asked.len(), 4, "three times busy, then one answer for the window: {:?}", world.asked);
        assert_eq!(world.tables.len(), 1, "the pager got the table before the first fault");
        let (sum, _) = finished(world.submit("scan", &[AT, 4 * PAGE_BYTES, 0x5a])??)?;
        assert_eq!(sum, [3 * PAGE_BYTES]);
        Ok(())
    })
}

#[test]
fn integration_an_invalidation_is_acknowledged_after_the_entries_are_gone() -> Result<(), AnyError> {
    World::play("integration_an_invalidation_is_acknowledged_after_the_entries_are_gone", WITH_APERTURE, |world| {
        world.open_queue()??;
        world.submit("fill", &[AT, PAGES * PAGE_BYTES, 1])??;
        let table = Table::open(world.tables[0].as_ref(), PAGES)?;
        assert!((0..PAGES).all(|page| table.load(page).is_dirty()));
        // The pager revokes a page by itself, the mirror a range, both while nothing runs.
        table.revoke(200, 1);
        world.mirror_says(invalidate(77, 16, 32, false))?;
        world.turn_until("the invalidation is acknowledged", |world| world.acks == [77])?;
        let valid = (0..PAGES).filter(|page| table.load(*page).is_valid()).count() as u64;
        assert_eq!(valid, PAGES - 33);
        let asked = world.asked.len();
        let (counted, faults) = finished(world.submit("scan", &[AT, PAGES * PAGE_BYTES, 1])??)?;
        assert_eq!((counted, faults), (vec![PAGES * PAGE_BYTES], 2), "one fault for each hole");
        assert_eq!(world.asked.len(), asked + 2);
        world.mirror_says(invalidate(78, 0, PAGES, true))?;
        world.turn_until("the unmapping is acknowledged", |world| world.acks == [77, 78])?;
        assert!((0..PAGES).all(|page| !table.load(page).is_valid()));
        // Repeatable, also for a region that is not known any more.
        world.mirror_says(invalidate(78, 0, PAGES, true))?;
        world.turn_until("the repetition is acknowledged", |world| world.acks == [77, 78, 78])?;
        Ok(())
    })
}

#[test]
fn integration_bad_jobs_fail_with_the_kernels_meanings() -> Result<(), AnyError> {
    World::play("integration_bad_jobs_fail_with_the_kernels_meanings", WITH_APERTURE, |world| {
        let code = |outcome: common::Outcome| outcome.err().map(|error| error.code);
        assert_eq!(code(world.submit("sum", &[AT, 8])?), Some(ErrorCode::Permission), "no queue yet");
        let stranger = driver::Call::OpenQueue { space: SPACE, token: b"guess".to_vec() };
        assert_eq!(code(world.call(stranger)?), Some(ErrorCode::Permission));
        world.open_queue()??;
        let wild = world.submit("sum", &[AT + PAGES * PAGE_BYTES, 8])?;
        assert!(wild.as_ref().is_err_and(|error| error.text.contains("0x700000100000")), "{wild:?}");
        assert_eq!(code(wild), Some(ErrorCode::Fault));
        world.write_refused = true;
        assert_eq!(code(world.submit("fill", &[AT, 8, 1])?), Some(ErrorCode::Permission));
        assert_eq!(finished(world.submit("sum", &[AT, 8])??)?.0, [0]);
        assert_eq!(code(world.submit("nonsense", &[])?), Some(ErrorCode::NotFound));
        Ok(())
    })
}

#[test]
fn integration_a_lost_space_ends_its_suspended_jobs() -> Result<(), AnyError> {
    World::play("integration_a_lost_space_ends_its_suspended_jobs", WITH_APERTURE, |world| {
        world.open_queue()??;
        world.busy = u32::MAX;
        let job = world.send(submit("sum", &[AT, 8]));
        world.turn_until("the job stands on its page", |world| world.asked.len() >= 2)?;
        world.mirror_says(mirror::Event::SpaceGone { space: SPACE })?;
        assert_eq!(world.answer(job)?.err().map(|error| error.code), Some(ErrorCode::NotFound));
        assert_eq!(world.submit("sum", &[AT, 8])?.err().map(|error| error.code), Some(ErrorCode::Permission));
        Ok(())
    })
}

#[test]
fn integration_the_next_incarnation_has_the_same_memory_and_generation_and_empty_tables() -> Result<(), AnyError> {
    World::play(
        "integration_the_next_incarnation_has_the_same_memory_and_generation_and_empty_tables",
        WITH_APERTURE,
        |world| {
            world.open_queue()??;
            world.submit("fill", &[AT, PAGE_BYTES, 9])??;
            world.stop_driver()?;
            world.start_driver()?;
            assert_eq!(world.logins[0].0, world.logins[1].0, "same generation");
            assert_eq!(world.aperture()?.load_u8(FIRST_FRAME * PAGE_BYTES)?, 9);
            world.open_queue()??;
            let (sum, faults) = finished(world.submit("scan", &[AT, PAGE_BYTES, 9])??)?;
            assert_eq!((sum, faults), (vec![PAGE_BYTES], 1), "its mappings are void, its bytes are not");
            Ok(())
        },
    )
}

#[test]
fn integration_without_an_aperture_there_is_a_copy_ring_and_no_table() -> Result<(), AnyError> {
    World::play("integration_without_an_aperture_there_is_a_copy_ring_and_no_table", WITHOUT_APERTURE, |world| {
        world.open_queue()??;
        let (sum, _) = finished(world.submit("scan", &[AT, PAGE_BYTES, 0])??)?;
        assert_eq!(sum, [PAGE_BYTES]);
        let (_, _, aperture, copy_ring) = &world.logins[0];
        assert!(aperture.is_none() && copy_ring.is_some() && world.tables.is_empty());
        world.mirror_says(invalidate(5, 0, PAGES, false))?;
        world.turn_until("the invalidation is acknowledged", |world| world.acks == [5])?;
        let (_, faults) = finished(world.submit("scan", &[AT, PAGE_BYTES, 0])??)?;
        assert_eq!(faults, 1, "revocation by message worked");
        Ok(())
    })
}

#[test]
fn integration_a_restarted_mirror_learns_spaces_and_regions_before_waiting_faults() -> Result<(), AnyError> {
    World::play(
        "integration_a_restarted_mirror_learns_spaces_and_regions_before_waiting_faults",
        WITH_APERTURE,
        |world| {
            world.open_queue()??;
            world.submit("fill", &[AT, PAGE_BYTES, 3])??;
            let asked = world.asked.len();
            world.busy = u32::MAX;
            let job = world.send(submit("scan", &[AT, PAGES * PAGE_BYTES, 3]));
            world.turn_until("the job stands on a page", |world| world.asked.len() > asked)?;
            world.restart_mirror()?;
            world.busy = 0;
            // The fake refuses faults of spaces and regions that it was not told about: a refused fault would fail the job.
            assert_eq!(finished(world.answer(job)??)?.0, [PAGE_BYTES]);
            Ok(())
        },
    )
}

#[test]
fn integration_a_space_that_died_while_the_mirror_was_away_ends_its_jobs() -> Result<(), AnyError> {
    World::play("integration_a_space_that_died_while_the_mirror_was_away_ends_its_jobs", WITH_APERTURE, |world| {
        world.open_queue()??;
        world.busy = u32::MAX;
        let job = world.send(submit("sum", &[AT, 8]));
        world.turn_until("the job stands on a page", |world| !world.asked.is_empty())?;
        world.space_lives = false;
        world.restart_mirror()?;
        assert_eq!(world.answer(job)?.err().map(|error| error.code), Some(ErrorCode::NotFound));
        // The session goes on without it: another client can open its space.
        world.space_lives = true;
        world.busy = 0;
        world.open_queue()??;
        assert_eq!(finished(world.submit("sum", &[AT, 8])??)?.0, [0]);
        Ok(())
    })
}

#[test]
fn integration_a_restarted_pager_gets_memory_and_tables_again() -> Result<(), AnyError> {
    World::play("integration_a_restarted_pager_gets_memory_and_tables_again", WITH_APERTURE, |world| {
        world.open_queue()??;
        world.submit("fill", &[AT, PAGE_BYTES, 3])??;
        world.restart_pager()?;
        world.turn_until("the table is attached again", |world| world.tables.len() == 2)?;
        assert_eq!(world.logins[0].0, world.logins[1].0, "same memory, same generation");
        let table = Table::open(world.tables[1].as_ref(), PAGES)?;
        assert!(table.load(0).is_dirty(), "the same table: mappings of a living driver stay");
        Ok(())
    })
}

#[test]
fn integration_a_restarted_pager_gets_a_new_copy_ring() -> Result<(), AnyError> {
    World::play("integration_a_restarted_pager_gets_a_new_copy_ring", WITHOUT_APERTURE, |world| {
        world.restart_pager()?;
        world.turn_until("the driver logs in again", |world| world.logins.len() == 2)?;
        let ring = |login: usize| world.logins[login].3.as_ref().map(|ring| ring.ring.as_fd()).ok_or("a ring");
        assert_ne!(memfd::identity(ring(0)?)?, memfd::identity(ring(1)?)?);
        Ok(())
    })
}

#[test]
fn integration_a_client_that_disconnects_takes_its_endless_job_along() -> Result<(), AnyError> {
    World::play("integration_a_client_that_disconnects_takes_its_endless_job_along", WITH_APERTURE, |world| {
        world.open_queue()??;
        let adding = world.send(submit("atomic_add", &[AT, 1, u64::MAX]));
        let scanning = world.send(submit("scan", &[AT + PAGE_BYTES, 8, 0]));
        world.answer(scanning)??;
        world.client.drop_link(world.link);
        world.link = world.new_client_link();
        // Both units are needed for these two: the endless job has left its unit.
        let metric = |world: &mut World, name: &str| -> Result<u64, AnyError> {
            let metrics = world.stats()?;
            Ok(metrics.iter().find(|metric| metric.name == name).map(|metric| metric.value).ok_or("metric exists")?)
        };
        while metric(world, "running_jobs")? > 0 {}
        assert_eq!(metric(world, "failed_jobs")?, 1);
        assert!(metric(world, "fault_wait_p99_ns")? > 0);
        assert!(!world.done.contains_key(&adding), "nobody is told about a job of a dropped link");
        Ok(())
    })
}

#[test]
fn integration_a_call_made_while_the_driver_is_down_is_answered_by_the_next_incarnation() -> Result<(), AnyError> {
    World::play(
        "integration_a_call_made_while_the_driver_is_down_is_answered_by_the_next_incarnation",
        WITH_APERTURE,
        |world| {
            world.stop_driver()?;
            let early = world.send(driver::Call::Info);
            world.slow_vault_turns = 50;
            world.start_driver()?;
            let driver::Reply::Info { memory_bytes, aperture, kernels, .. } = world.answer(early)?? else {
                return Err("Not an answer to Info".into());
            };
            assert_eq!((memory_bytes, aperture), (4 << 20, true));
            assert!(kernels.iter().any(|line| line.starts_with("hash_lookup(")), "{kernels:?}");
            Ok(())
        },
    )
}
