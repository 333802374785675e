//! Reproducers of what users of other systems complain about (anchors, section 5): pressure, idleness, storms, pins, teardown.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use uhmm_kernel_hook::process::PidFd;
use uhmm_sdk::{Advice, FaultPoint, Operator, PageStatus, Residency, Session, Target};

use super::joined;
use crate::case::{CaseResult, During, Failure, Registry, ensure, ensure_eq};
use crate::ctx::{BUF, Ctx, PMD};
use crate::forked::exit_of;
use crate::leaks::cpu_ticks;
use crate::mem::{Mem, MemAdvice, PAGE};

pub(super) fn register(list: &mut Registry) {
    list.one("P01_eviction_is_bounded_and_killable", eviction_is_bounded).deadline_s(60);
    list.one("P03_idle_process_costs_nothing", idle_costs_nothing);
    list.one("P04_reused_heap_addresses", reused_addresses).deadline_s(40);
    list.one("P04_parallel_cpu_faults", parallel_faults);
    list.one("P05_pin_is_a_promise", pin_is_a_promise);
    list.one("P05_failed_restore_is_not_fatal", failed_restore);
    for state in STATES {
        list.one(format!("P06_exit_when_{state}"), move |ctx| exit_in_state(ctx, state));
    }
}

/// P1: a process that wants twice the device's memory for ever is killed in the middle; another one gets what it wants meanwhile.
fn eviction_is_bounded(ctx: &Ctx) -> CaseResult {
    let memory = ctx.memory_in_huge_pages()?;
    if ctx.role().is_some() {
        let mem = ctx.huge(2 * memory, Some(1))?;
        println!("over-subscribed");
        loop {
            for part in 0..2 * memory / PMD {
                ctx.read(0, &mem, part * PMD, PMD)?;
            }
        }
    }
    let mut hog = ctx.spawn(&["hog".to_owned()])?;
    hog.wait_for_line()?;
    let mem = ctx.patterned(BUF, 1)?;
    for round in 1..=5u64 {
        let start = Instant::now();
        ctx.writes(0, &mem, 0, BUF, round)?;
        mem.expect_all(round)?;
        if ctx.undisturbed() {
            let elapsed = start.elapsed();
            ensure!(elapsed < Duration::from_secs(8), "4 MiB took {elapsed:?} beside a process that over-subscribes");
        }
    }
    hog.kill_and_reclaim(ctx)?;
    // Everything is given back: the device can be filled by us alone.
    let mine = ctx.huge(memory / 4 * 3, Some(2))?;
    ctx.all_to_device(0, &mine)?;
    ctx.on_device(0, &mine, 0, mine.len())?;
    mine.expect_all(2)?;
    mem.expect_all(5)
}

fn service_ticks(ctx: &Ctx) -> CaseResult<u64> {
    let services = Operator::connect(Some(ctx.run_dir()))?.status()?;
    Ok(services.iter().filter_map(|service| cpu_ticks(service.pid)).sum())
}

/// What was begun has ended: the pager copies nothing, waits for no agent and no revocation.
fn at_rest(ctx: &Ctx) -> CaseResult {
    const PATIENCE: Duration = Duration::from_secs(10);
    let end = Instant::now() + PATIENCE;
    for name in ["copies_waiting", "agent_jobs", "pending_revokes"] {
        // Each look is a question to the pager, which does its work in between.
        while ctx.metric("pager", name)? > 0 {
            ensure!(Instant::now() < end, "The pager's {name} do not end although nobody asks for anything");
        }
    }
    Ok(())
}

/// P3: pages were evicted, their process idles, and nobody works on its behalf; the next use brings them back.
fn idle_costs_nothing(ctx: &Ctx) -> CaseResult {
    ctx.needs_living_services("Processor time")?;
    const IDLE: Duration = Duration::from_millis(500);
    let memory = ctx.memory_in_huge_pages()?;
    let (first, second) = (ctx.huge(memory / 4 * 3, Some(1))?, ctx.huge(memory / 4 * 3, Some(2))?);
    ctx.all_to_device(0, &first)?;
    ctx.all_to_device(0, &second)?;
    ensure!(ctx.residency(&first, 0, first.len())?.system_pages > 0, "Nothing was evicted");
    at_rest(ctx)?;
    let before = service_ticks(ctx)?;
    // Time that passes is what the case is about: nobody asks for anything meanwhile.
    std::thread::sleep(IDLE);
    let used = service_ticks(ctx)? - before;
    // A tick is 10 ms. All services together may use a tenth of one core for heartbeats and their clocks.
    ensure!(used <= 5, "The services used {used} ticks in {IDLE:?} while nothing was to do");
    for part in 0..first.len() / PMD {
        ctx.sees(0, &first, part * PMD, PMD, 1)?;
    }
    first.expect_all(1)?;
    second.expect_all(2)
}

/// P4: heap addresses are freed and used again by many threads while their old pages were on the device.
fn reused_addresses(ctx: &Ctx) -> CaseResult {
    const THREADS: u64 = 4;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn(move || -> CaseResult {
                    for round in 0..8 {
                        let seed = 100 * thread + round;
                        let mem = ctx.patterned(BUF / 4, seed)?;
                        ctx.migrate(mem.addr(), mem.len(), ctx.device(0)?.target()).during("Migrate")?;
                        // Freed and used again at the same addresses: fresh, and not on the device any more.
                        mem.advise(0, mem.len(), MemAdvice::DontNeed)?;
                        mem.expect_zero(0, mem.len())?;
                        mem.fill(seed + 50)?;
                        ctx.at_home(&mem, 0, mem.len())?;
                        mem.expect_all(seed + 50)?;
                    }
                    Ok(())
                })
            })
            .collect();
        threads.into_iter().try_for_each(joined)
    })
}

/// P4: many threads touch device-resident pages at once; they do not serialise for ever on one lock.
fn parallel_faults(ctx: &Ctx) -> CaseResult {
    const THREADS: u64 = 8;
    let mem = ctx.patterned(4 * BUF, 1)?;
    ctx.all_to_device(0, &mem)?;
    let start = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let mem = &mem;
                // Each thread has every eighth page: neighbours fault together.
                scope.spawn(move || -> CaseResult {
                    (0..mem.len() / PAGE)
                        .filter(|page| page % THREADS == thread)
                        .try_for_each(|page| mem.expect(page * PAGE, PAGE, 1))
                })
            })
            .collect();
        threads.into_iter().try_for_each(joined)
    })?;
    if ctx.undisturbed() {
        let elapsed = start.elapsed();
        ensure!(elapsed < Duration::from_secs(8), "{THREADS} threads needed {elapsed:?} for 16 MiB");
    }
    mem.expect_all(1)
}

/// P5: a pinned page stays where it is, whoever asks.
fn pin_is_a_promise(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 1)?;
    ctx.all_to_device(0, &mem)?;
    ctx.session.pin(mem.addr(), BUF).during("Pin")?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let pusher = scope.spawn(|| -> CaseResult {
            let target = ctx.device(0)?.target();
            while !stop.load(Ordering::Acquire) {
                let report = ctx.migrate(mem.addr(), BUF, target).during("Migrate pinned memory")?;
                ensure_eq!(report.moved_pages, 0, "Pinned pages that moved");
                ensure_eq!(report.pages_with(PageStatus::Pinned), BUF / PAGE, "Pages reported as pinned");
                ctx.session.evict(ctx.device(0)?, 0).during("Evict")?;
            }
            Ok(())
        });
        let watch = || -> CaseResult {
            for round in 0..10u64 {
                let runs = ctx.session.residency(mem.addr(), BUF).during("Residency")?;
                let stays = runs.iter().all(|run| run.pinned && run.residency == Residency::System);
                ensure!(stays, "A pinned page is not in system memory: {runs:?}");
                mem.fill(10 + round)?;
                mem.expect_all(10 + round)?;
            }
            Ok(())
        };
        let watched = watch();
        stop.store(true, Ordering::Release);
        joined(pusher)?;
        watched
    })?;
    ctx.session.unpin(mem.addr(), BUF).during("Unpin")?;
    ctx.all_to_device(0, &mem)?;
    ctx.sees_all(0, &mem, 19)?;
    mem.expect_all(19)
}

fn failed_restore(ctx: &Ctx) -> CaseResult {
    let mem = ctx.patterned(BUF, 1)?;
    for nth in 1..=4 {
        ctx.all_to_device(0, &mem)?;
        ctx.session.inject(FaultPoint::CopyHome, nth).during("Inject")?;
        mem.expect_all(1)?;
        ctx.session.inject(FaultPoint::CopyHome, 0).during("Disarm")?;
        ctx.sees_all(0, &mem, 1)?;
    }
    mem.expect_all(1)
}

/// States in which a process may end; the last word of the case's name.
const STATES: [&str; 11] = [
    "nothing_is_open",
    "the_device_is_open",
    "memory_is_untouched",
    "memory_is_at_home",
    "memory_is_on_the_device",
    "memory_is_exclusive",
    "memory_is_pinned",
    "a_region_is_unused",
    "a_read_is_under_way",
    "a_child_lives_on",
    "a_failure_is_armed",
];

/// P6: the helper ends without a word, by exit and by kill -9; the services take no harm and keep nothing.
fn exit_in_state(ctx: &Ctx, state: &str) -> CaseResult {
    if ctx.role().is_some() {
        return reach_state(ctx, state);
    }
    if state == "a_child_lives_on" {
        ctx.needs_fork()?;
    }
    let mem = ctx.patterned(BUF, 1)?;
    ctx.all_to_device(0, &mem)?;
    let incarnations = |ctx: &Ctx| -> CaseResult<Vec<u32>> {
        let services = Operator::connect(Some(ctx.run_dir()))?.status()?;
        Ok(services.iter().map(|service| service.incarnation).collect())
    };
    let before = incarnations(ctx)?;
    for end in ["exit", "kill"] {
        let mut helper = ctx.spawn(&[end.to_owned()])?;
        helper.wait_for_line()?;
        if end == "kill" {
            helper.kill()?;
        } else {
            helper.join_silent()?;
        }
        ctx.sees_all(0, &mem, 1)?;
    }
    if !ctx.args.chaos {
        ensure_eq!(incarnations(ctx)?, before, "Incarnations of the services");
    }
    mem.expect_all(1)
}

fn reach_state(ctx: &Ctx, state: &str) -> CaseResult {
    let mem = Mem::private(BUF)?;
    if state.starts_with("memory") || state.starts_with("a_") {
        if state != "memory_is_untouched" {
            mem.fill(9)?;
        }
        ctx.adopt(&mem)?;
    }
    match state {
        "nothing_is_open" => std::mem::forget(Session::connect(Some(ctx.run_dir()))?),
        "memory_is_on_the_device" => ctx.all_to_device(0, &mem).map(|_| ())?,
        "memory_is_exclusive" => ctx.exclusive(0, &mem, 0, BUF).map(|_| ())?,
        "memory_is_pinned" => ctx.session.advise(mem.addr(), BUF, Advice::Pin)?,
        "a_region_is_unused" => std::mem::forget(ctx.session.allocate(BUF)?),
        "a_failure_is_armed" => ctx.session.inject(FaultPoint::CopyOut, 1)?,
        "a_child_lives_on" => {
            ctx.all_to_device(0, &mem)?;
            // Ends by itself after its parent, with the pages that it has from it.
            let parent = PidFd::open(std::process::id())?;
            std::mem::forget(crate::forked::fork(|| {
                exit_of(&parent)?;
                mem.expect_all(9)
            })?);
        }
        _ => {}
    }
    std::thread::scope(|scope| {
        if state == "a_read_is_under_way" {
            let (begun, begins) = channel();
            let mem = &mem;
            scope.spawn(move || -> CaseResult {
                loop {
                    // Nobody listens after the first time.
                    let _heard = begun.send(());
                    ctx.read(0, mem, 0, BUF)?;
                    ctx.migrate(mem.addr(), BUF, Target::Home)?;
                }
            });
            // The second turn: a whole one went well.
            for _ in 0..2 {
                begins.recv().map_err(|_| Failure::Failed("The reading thread has ended".into()))?;
            }
        }
        println!("reached");
        if ctx.role() == Some("exit") {
            std::process::exit(0);
        }
        // Until we are killed.
        loop {
            std::thread::park();
        }
    })
}
